//! The requests of OpenAI's API: what is understood of them, and what is refused.

use serde_json::{Map, Value, json};

use crate::model::Sampling;

/// Most samples of a request.
const MAX_SAMPLES: u64 = 128;
/// Most stop texts of a request.
const MAX_STOPS: usize = 16;

/// A request that is not answered with a completion.
#[derive(Debug)]
pub struct Refusal {
    /// The status code of HTTP.
    pub status: u16,
    /// Why, and what to do.
    pub message: String,
    /// The field that is wrong.
    pub param: Option<String>,
    /// OpenAI's name of some errors.
    pub code: Option<&'static str>,
}

impl Refusal {
    /// A refusal without field or code.
    pub fn new(status: u16, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None }
    }

    /// A field that is wrong.
    pub fn of(param: &str, what: impl std::fmt::Display) -> Self {
        Self { param: Some(param.into()), ..Self::new(400, format!("{param}: {what}")) }
    }

    /// The same, under a name of OpenAI's.
    #[must_use]
    pub fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// The answer's body.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        let kind = match self.status {
            500.. => "server_error",
            401 => "authentication_error",
            _ => "invalid_request_error",
        };
        let Self { message, param, code, .. } = self;
        let error = json!({ "message": message, "type": kind, "param": param, "code": code });
        json!({ "error": error }).to_string().into_bytes()
    }
}

/// What applies where a request says nothing.
#[derive(Debug, Clone)]
pub struct Defaults {
    /// The name of the model.
    pub model: String,
    /// The distribution.
    pub sampling: Sampling,
    /// Longest completion, also of those that ask for more (tokens).
    pub max_completion_tokens: usize,
}

/// A request for chat completions.
#[derive(Debug)]
pub struct ChatRequest {
    /// As they came.
    pub messages: Value,
    /// Number of completions.
    pub samples: usize,
    /// Seed of the draws.
    pub seed: Option<u64>,
    /// The distribution.
    pub sampling: Sampling,
    /// Longest completion (tokens).
    pub max_completion_tokens: usize,
    /// Texts that end a completion, and are no part of it.
    pub stops: Vec<String>,
    /// Whether the answer comes as events.
    pub stream: bool,
    /// Whether the last event says how many tokens there were.
    pub stream_usage: bool,
    /// Whether each token comes with its log-probability.
    pub logprobs: bool,
    /// Whether the tokens come by their ids, the end token included. A field of vLLM's.
    pub token_ids: bool,
    /// What seeds the draws beside `seed`, in place of the messages. A field of our own.
    pub prompt_id: Option<String>,
}

/// Fields that change no completion.
const IGNORED: [&str; 9] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
    "stream_options",
];

impl ChatRequest {
    /// Reads a body.
    ///
    /// # Errors
    /// A refusal that names the field.
    pub fn parse(body: &[u8], defaults: &Defaults) -> Result<Self, Refusal> {
        let mut fields: Map<String, Value> = match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => fields,
            Ok(_) => return Err(Refusal::new(400, "the body is not a JSON object")),
            Err(err) => return Err(Refusal::new(400, format!("the body is not JSON: {err}"))),
        };
        fields.retain(|_, value| !value.is_null());
        let mut sampling = defaults.sampling;
        sampling.temperature = number(&mut fields, "temperature")?.unwrap_or(sampling.temperature);
        sampling.top_p = number(&mut fields, "top_p")?.unwrap_or(sampling.top_p);
        sampling.min_p = number(&mut fields, "min_p")?.unwrap_or(sampling.min_p);
        sampling.top_k =
            whole(&mut fields, "top_k", 0, u64::from(u32::MAX))?.map_or(sampling.top_k, |top_k| top_k as usize);
        sampling.check().map_err(|err| {
            let what = err.to_string();
            let names = [("top-p", "top_p"), ("min-p", "min_p")];
            let name =
                names.into_iter().find(|(option, _)| what.starts_with(option)).map_or("temperature", |(_, name)| name);
            Refusal::of(name, what)
        })?;
        check_model(fields.remove("model"), &defaults.model)?;
        let request = Self {
            messages: messages(fields.remove("messages"))?,
            samples: whole(&mut fields, "n", 1, MAX_SAMPLES)?.unwrap_or(1) as usize,
            seed: whole(&mut fields, "seed", 0, u64::MAX)?,
            sampling,
            max_completion_tokens: longest(&mut fields, defaults.max_completion_tokens)?,
            stops: stops(fields.remove("stop"))?,
            stream: flag(&mut fields, "stream")?,
            stream_usage: fields.get("stream_options").is_some_and(|options| options["include_usage"] == true),
            logprobs: flag(&mut fields, "logprobs")?,
            token_ids: flag(&mut fields, "return_token_ids")?,
            prompt_id: text(&mut fields, "prompt_id")?,
        };
        if request.token_ids && request.stream {
            return Err(Refusal::of("return_token_ids", "does not go with \"stream\""));
        }
        match fields.iter().find(|(name, value)| !IGNORED.contains(&name.as_str()) && !is_neutral(name, value)) {
            Some((name, _)) if name == "top_logprobs" => {
                Err(Refusal::of(name, "is not supported above 0; \"logprobs\" gives the sampled token's"))
            }
            Some((name, _)) => Err(Refusal::of(name, "is not supported").with_code("unsupported_parameter")),
            None => Ok(request),
        }
    }
}

/// Whether a field says what holds anyway.
fn is_neutral(name: &str, value: &Value) -> bool {
    match name {
        "frequency_penalty" | "presence_penalty" | "top_logprobs" => value.as_f64() == Some(0.0),
        "logit_bias" => value.as_object().is_some_and(Map::is_empty),
        "response_format" => *value == json!({ "type": "text" }),
        "tools" | "functions" => value.as_array().is_some_and(Vec::is_empty),
        "tool_choice" | "function_call" => *value == "none" || *value == "auto",
        "modalities" => *value == json!(["text"]),
        _ => false,
    }
}

fn check_model(given: Option<Value>, served: &str) -> Result<(), Refusal> {
    match given {
        Some(Value::String(name)) if name == served => Ok(()),
        Some(Value::String(name)) => Err(Refusal {
            status: 404,
            ..Refusal::of("model", format!("\"{name}\" is not served here; \"{served}\" is"))
                .with_code("model_not_found")
        }),
        Some(_) => Err(Refusal::of("model", "is not a text")),
        None => Err(Refusal::of("model", format!("is missing; \"{served}\" is served"))),
    }
}

fn messages(given: Option<Value>) -> Result<Value, Refusal> {
    given.filter(Value::is_array).ok_or_else(|| Refusal::of("messages", "is missing, or not a list"))
}

fn number(fields: &mut Map<String, Value>, name: &str) -> Result<Option<f32>, Refusal> {
    let value = fields.remove(name);
    value
        .map(|value| value.as_f64().map(|number| number as f32).ok_or_else(|| Refusal::of(name, "is not a number")))
        .transpose()
}

fn whole(fields: &mut Map<String, Value>, name: &str, least: u64, most: u64) -> Result<Option<u64>, Refusal> {
    let Some(value) = fields.remove(name) else { return Ok(None) };
    let number = value.as_u64().filter(|number| (least..=most).contains(number));
    number.map(Some).ok_or_else(|| Refusal::of(name, format!("is not a whole number from {least} to {most}")))
}

fn text(fields: &mut Map<String, Value>, name: &str) -> Result<Option<String>, Refusal> {
    match fields.remove(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(Refusal::of(name, "is not a text")),
    }
}

fn flag(fields: &mut Map<String, Value>, name: &str) -> Result<bool, Refusal> {
    let value = fields.remove(name).unwrap_or(Value::Bool(false));
    value.as_bool().ok_or_else(|| Refusal::of(name, "is neither true nor false"))
}

/// The longest completion, under either of its names.
fn longest(fields: &mut Map<String, Value>, most: usize) -> Result<usize, Refusal> {
    let mut longest = None;
    for name in ["max_tokens", "max_completion_tokens"] {
        let Some(given) = whole(fields, name, 1, u64::from(u32::MAX))? else { continue };
        if given > most as u64 {
            return Err(Refusal::of(name, format!("is more than {most}, the server's --max-completion-tokens")));
        }
        if longest.is_some_and(|longest| longest != given) {
            return Err(Refusal::of(name, "differs from max_tokens"));
        }
        longest = Some(given);
    }
    Ok(longest.map_or(most, |longest| longest as usize))
}

fn stops(value: Option<Value>) -> Result<Vec<String>, Refusal> {
    let wrong = || Refusal::of("stop", format!("is neither a text nor up to {MAX_STOPS} texts, none of them empty"));
    let list = match value {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(one) => vec![one],
    };
    let text = |value: Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned).ok_or_else(wrong);
    if list.len() > MAX_STOPS {
        return Err(wrong());
    }
    list.into_iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(more: Value) -> Result<ChatRequest, Refusal> {
        let mut body = json!({ "model": "m", "messages": [] });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let defaults = Defaults { model: "m".into(), sampling: Sampling::default(), max_completion_tokens: 64 };
        ChatRequest::parse(body.to_string().as_bytes(), &defaults)
    }

    #[test]
    fn what_a_request_says_is_taken_and_the_rest_is_the_servers() {
        let plain = parse(json!({ "temperature": null, "user": "u", "frequency_penalty": 0, "tools": [] })).unwrap();
        assert_eq!((plain.samples, plain.seed, plain.max_completion_tokens), (1, None, 64));
        assert_eq!((plain.sampling, plain.stream, plain.logprobs), (Sampling::default(), false, false));
        let full = json!({
            "n": 3, "seed": 7, "temperature": 0, "top_p": 0.5, "max_tokens": 9, "stop": ["a", "b"], "stream": true,
            "stream_options": { "include_usage": true }, "logprobs": true, "top_logprobs": 0,
        });
        let full = parse(full).unwrap();
        assert_eq!((full.samples, full.seed, full.max_completion_tokens), (3, Some(7), 9));
        assert_eq!((full.sampling.temperature, full.sampling.top_p), (0.0, 0.5));
        assert!(full.stream && full.stream_usage && full.logprobs && full.stops == ["a", "b"]);
        assert_eq!(parse(json!({ "stop": "x", "max_completion_tokens": 64 })).unwrap().stops, ["x"]);
    }

    #[test]
    fn a_field_that_would_change_numbers_is_refused_by_name() {
        let fields = [
            json!({ "top_logprobs": 5 }),
            json!({ "frequency_penalty": 0.1 }),
            json!({ "presence_penalty": -1 }),
            json!({ "logit_bias": { "5": 1 } }),
            json!({ "response_format": { "type": "json_object" } }),
            json!({ "tools": [{}] }),
            json!({ "top_k": -1 }),
            json!({ "min_p": 2 }),
            json!({ "return_token_ids": true, "stream": true }),
            json!({ "prompt_id": 7 }),
            json!({ "reasoning_effort": "low" }),
            json!({ "never_heard_of": false }),
            json!({ "temperature": "hot" }),
            json!({ "temperature": -1 }),
            json!({ "top_p": 0 }),
            json!({ "n": 0 }),
            json!({ "n": 129 }),
            json!({ "seed": -1 }),
            json!({ "max_tokens": 65 }),
            json!({ "max_tokens": 0 }),
            json!({ "max_completion_tokens": 3, "max_tokens": 4 }),
            json!({ "stop": [""] }),
            json!({ "stream": 1 }),
            json!({ "model": 7 }),
        ];
        for field in fields {
            let refusal = parse(field.clone()).unwrap_err();
            let name = field.as_object().unwrap().keys().next().unwrap();
            assert_eq!((refusal.status, refusal.param.as_ref()), (400, Some(name)), "{field}");
            assert!(refusal.message.starts_with(&format!("{name}: ")), "{}", refusal.message);
        }
        let refusal = parse(json!({ "model": "gpt-4o" })).unwrap_err();
        assert_eq!((refusal.status, refusal.code), (404, Some("model_not_found")));
    }
}
