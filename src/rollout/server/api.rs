//! What servers are asked and what they answer, as far as they differ from one another.

use std::thread;

use serde::Deserialize;
use serde_json::{Value, json};

use super::client::Client;
use crate::checkpoint::derive_id;
use crate::error::Result;
use crate::lines::record::Message;
use crate::model::Sampling;

/// Longest completion where nothing is said (tokens); a server's own may be endless.
const COMPLETION_TOKENS: usize = 256;

/// A model behind a server.
pub struct Served {
    client: Client,
    /// As the server calls it.
    model: String,
    kind: Kind,
    /// Steps of its weights, if it says so.
    pub policy_step: Option<u64>,
}

/// Whose server it is, as its list of models says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// `rollout --serve`.
    Own,
    /// SGLang, to which -1 means all tokens in `top_k`.
    Sglang,
    /// OpenAI, which refuses fields that it does not know.
    OpenAi,
    /// vLLM, llama.cpp and others.
    Other,
}

/// How to sample.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Completions of each prompt.
    pub group_size: usize,
    /// The distribution.
    pub sampling: Sampling,
    /// Longest completion, if one was requested (tokens).
    pub max_completion_tokens: Option<usize>,
    /// Seed of all draws.
    pub seed: u64,
}

/// The completions of a prompt.
pub struct Group {
    /// The id of the weights, or the model's name where the server has none.
    pub policy_id: String,
    /// Tokens of the prompt, if the server returns them.
    pub prompt_token_ids: Option<Vec<u32>>,
    /// One per sample.
    pub completions: Vec<Completion>,
    /// Tokens sampled, as far as the server counts them.
    pub sampled: usize,
}

/// A completion as the server returns it.
pub struct Completion {
    /// Its text.
    pub text: String,
    /// The text before it that the server split off.
    pub reasoning: Option<String>,
    /// Its tokens, the end token included.
    pub tokens: Option<Vec<u32>>,
    /// The log-probability of each of these tokens (nats).
    pub logprobs: Option<Vec<f32>>,
    /// Why it ended.
    pub finish_reason: String,
}

#[derive(Deserialize)]
struct Models {
    data: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    id: String,
    #[serde(default)]
    owned_by: String,
    policy_step: Option<u64>,
}

#[derive(Deserialize)]
struct Answer {
    choices: Vec<Choice>,
    prompt_token_ids: Option<Vec<u32>>,
    usage: Option<Usage>,
    system_fingerprint: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    #[serde(default)]
    completion_tokens: usize,
}

#[derive(Deserialize)]
struct Choice {
    message: Text,
    logprobs: Option<Logprobs>,
    finish_reason: Option<String>,
    token_ids: Option<Vec<u32>>,
}

#[derive(Deserialize)]
struct Text {
    content: Option<String>,
    #[serde(alias = "reasoning")]
    reasoning_content: Option<String>,
}

#[derive(Deserialize)]
struct Logprobs {
    content: Option<Vec<TokenLogprob>>,
}

#[derive(Deserialize)]
struct TokenLogprob {
    /// llama.cpp's.
    id: Option<u32>,
    logprob: f64,
}

impl Served {
    /// The model of this name, or the only one that the server has.
    ///
    /// # Errors
    /// [`crate::Error::Server`] when there is none, or more than one and no name.
    pub fn find(client: Client, name: Option<&str>) -> Result<Self> {
        let Models { mut data } = client.get("/models")?;
        let names = data.iter().map(|entry| entry.id.as_str()).collect::<Vec<_>>().join(", ");
        let place = match name {
            Some(name) => data.iter().position(|entry| entry.id == name),
            None => (data.len() == 1).then_some(0),
        };
        let Some(place) = place else {
            return Err(client.error(format!("--model must be one of those that it serves: {names}")));
        };
        let Entry { id, owned_by, policy_step } = data.swap_remove(place);
        let kind = match owned_by.as_str() {
            "grpo-pipes" => Kind::Own,
            "sglang" => Kind::Sglang,
            owner if owner.starts_with("openai") || owner == "system" => Kind::OpenAi,
            _ => Kind::Other,
        };
        Ok(Self { client, model: id, kind, policy_step })
    }

    /// The server, the model and the way it is asked, in words.
    pub fn describe(&self) -> String {
        let how = match self.kind {
            Kind::Own => "a rollout --serve, whose records are those of rollout",
            _ => "a request per completion, each with a seed of its own",
        };
        format!("{} of {}: {how}", self.model, self.client.base())
    }

    /// Whether log-probabilities are those of the distribution that is sampled from. Other servers take them before temperature and
    /// filters.
    pub fn has_logprobs(&self, sampling: &Sampling) -> bool {
        self.kind == Kind::Own || *sampling == Sampling::default()
    }

    /// Samples the completions of a prompt, whose name seeds them.
    ///
    /// # Errors
    /// Those of the client; [`crate::Error::Server`] for an answer without the completions.
    pub fn sample(&self, prompt_id: &str, messages: &[Message], asked: &Asked) -> Result<Group> {
        let answers = if self.kind == Kind::Own {
            let mut body = self.body(messages, asked);
            body["n"] = asked.group_size.into();
            body["seed"] = asked.seed.into();
            body["prompt_id"] = prompt_id.into();
            vec![self.client.post("/chat/completions", &body)?]
        } else {
            thread::scope(|scope| {
                let one = |sample| scope.spawn(move || self.sample_one(prompt_id, sample, messages, asked));
                let all: Vec<_> = (0..asked.group_size).map(one).collect();
                all.into_iter().map(|one| one.join().expect("it does not panic")).collect::<Result<Vec<Answer>>>()
            })?
        };
        self.group(answers, asked.group_size)
    }

    /// A server may refuse several completions at once, or draw them from one seed alike.
    fn sample_one(&self, prompt_id: &str, sample: usize, messages: &[Message], asked: &Asked) -> Result<Answer> {
        let mut body = self.body(messages, asked);
        let id = derive_id(&[&asked.seed.to_le_bytes(), prompt_id.as_bytes(), &sample.to_le_bytes()]);
        let seed = u32::from_str_radix(&id[..8], 16).expect("an id is hexadecimal digits");
        body["seed"] = (seed >> 1).into(); // some servers take 31 bits
        self.client.post("/chat/completions", &body)
    }

    fn body(&self, messages: &[Message], asked: &Asked) -> Value {
        let Sampling { temperature, top_p, top_k, min_p, repetition_penalty: _ } = asked.sampling;
        let mut body = json!({ "model": self.model, "messages": messages, "temperature": temperature, "top_p": top_p });
        let longest = asked.max_completion_tokens.or((self.kind != Kind::Own).then_some(COMPLETION_TOKENS));
        if let Some(longest) = longest {
            let name = if self.kind == Kind::OpenAi { "max_completion_tokens" } else { "max_tokens" };
            body[name] = longest.into();
        }
        if self.has_logprobs(&asked.sampling) {
            body["logprobs"] = true.into();
        }
        if self.kind != Kind::OpenAi {
            body["return_token_ids"] = true.into();
            body["min_p"] = min_p.into();
            body["top_k"] = if self.kind == Kind::Sglang && top_k == 0 { (-1).into() } else { top_k.into() };
        }
        body
    }

    fn group(&self, answers: Vec<Answer>, size: usize) -> Result<Group> {
        let sampled =
            answers.iter().filter_map(|answer| answer.usage.as_ref()).map(|usage| usage.completion_tokens).sum();
        let prompt_token_ids = answers.first().and_then(|answer| answer.prompt_token_ids.clone());
        let fingerprint = answers.first().and_then(|answer| answer.system_fingerprint.clone());
        let policy_id = fingerprint.filter(|_| self.kind == Kind::Own).unwrap_or_else(|| self.model.clone());
        let completions: Vec<Completion> =
            answers.into_iter().flat_map(|answer| answer.choices).map(Into::into).collect();
        if completions.len() != size {
            return Err(self
                .client
                .error(format!("{} completions came, and {size} were asked for", completions.len())));
        }
        Ok(Group { policy_id, prompt_token_ids, completions, sampled })
    }
}

impl From<Choice> for Completion {
    fn from(choice: Choice) -> Self {
        let Choice { message: Text { content, reasoning_content }, logprobs, finish_reason, token_ids } = choice;
        let of_tokens = logprobs.and_then(|logprobs| logprobs.content);
        let ids = of_tokens.as_ref().and_then(|all| all.iter().map(|one| one.id).collect::<Option<Vec<u32>>>());
        let tokens = token_ids.or(ids).filter(|tokens| !tokens.is_empty());
        let logprobs = of_tokens.map(|all| all.iter().map(|one| one.logprob as f32).collect::<Vec<f32>>());
        let logprobs = logprobs.filter(|logprobs| tokens.as_ref().is_some_and(|tokens| tokens.len() == logprobs.len()));
        Self {
            text: content.unwrap_or_default(),
            reasoning: reasoning_content.filter(|text| !text.is_empty()),
            tokens,
            logprobs,
            finish_reason: finish_reason.unwrap_or_else(|| "unknown".into()),
        }
    }
}
