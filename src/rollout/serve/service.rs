//! Answers requests.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;

use super::answers::{Answers, NotQueued, Queue};
use super::api::{ChatRequest, Defaults, Refusal};
use super::choice::Choice;
use super::completions::Completions;
use super::http::{Connection, HttpRequest};
use crate::checkpoint::Identity;
use crate::engine::{OwnSettings, Request};
use crate::error::Error;
use crate::rollout::RequestBuilder;
use crate::tokenizer::Tokenizer;

/// What all connections share.
pub struct Service {
    queue: Queue,
    builder: Mutex<RequestBuilder>,
    tokenizer: Arc<Tokenizer>,
    defaults: Defaults,
    /// The weights.
    identity: Identity,
    key: Option<blake3::Hash>,
    /// The seed of the next request that has none.
    next_seed: AtomicU64,
    requests: AtomicU64,
    began: u64,
    /// Requests being answered.
    busy: AtomicUsize,
    has_ended: AtomicBool,
}

/// Why an answer ends early.
pub enum Broken {
    /// The client is gone.
    Gone(io::Error),
    /// It is told why.
    Refused(Refusal),
}

impl From<io::Error> for Broken {
    fn from(err: io::Error) -> Self {
        Self::Gone(err)
    }
}

impl From<Error> for Broken {
    fn from(err: Error) -> Self {
        Self::Refused(Refusal::new(500, err.to_string()))
    }
}

impl Service {
    /// Requests without a seed get `seed`, `seed + 1`, and so on.
    pub fn new(
        queue: Queue,
        (builder, tokenizer): (RequestBuilder, Arc<Tokenizer>),
        (defaults, seed): (Defaults, u64),
        identity: Identity,
        key: Option<blake3::Hash>,
    ) -> Self {
        Self {
            queue,
            builder: Mutex::new(builder),
            tokenizer,
            defaults,
            identity,
            key,
            next_seed: AtomicU64::new(seed),
            requests: AtomicU64::new(0),
            began: now(),
            busy: AtomicUsize::new(0),
            has_ended: AtomicBool::new(false),
        }
    }

    /// Takes no more requests for completions.
    pub fn close(&self) {
        self.queue.close();
    }

    /// Whether requests for completions are taken.
    pub fn is_open(&self) -> bool {
        self.queue.is_open()
    }

    /// The engine has ended.
    pub fn end(&self) {
        self.close();
        self.has_ended.store(true, Ordering::Relaxed);
    }

    /// Whether the engine has ended.
    pub fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Relaxed)
    }

    /// Waits until all answers are sent, but no longer than `limit`.
    pub fn wait_for_answers(&self, limit: Duration) {
        let began = Instant::now();
        while self.busy.load(Ordering::Relaxed) > 0 && began.elapsed() < limit {
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Answers a request.
    ///
    /// # Errors
    /// When the client is gone.
    pub fn answer(&self, request: &HttpRequest, connection: &mut Connection) -> io::Result<()> {
        self.busy.fetch_add(1, Ordering::Relaxed);
        if !self.is_open() {
            connection.end_after_answer();
        }
        let answered = match self.route(request, connection) {
            Err(Broken::Refused(refusal)) => self.refuse(&refusal, connection),
            Err(Broken::Gone(err)) => Err(err),
            Ok(()) => Ok(()),
        };
        self.busy.fetch_sub(1, Ordering::Relaxed);
        answered
    }

    fn refuse(&self, refusal: &Refusal, connection: &mut Connection) -> io::Result<()> {
        let header = match refusal.status {
            401 => vec![("WWW-Authenticate", "Bearer")],
            503 => vec![("Retry-After", "1")],
            _ => Vec::new(),
        };
        connection.respond(refusal.status, &header, &refusal.body())
    }

    fn route(&self, request: &HttpRequest, connection: &mut Connection) -> Result<(), Broken> {
        let path = request.path.trim_end_matches('/');
        if path != "/health" {
            self.check_key(request).map_err(Broken::Refused)?;
        }
        let of_model =
            path.strip_prefix("/v1/models/").map(|name| percent_encoding::percent_decode_str(name).decode_utf8_lossy());
        let method = match path {
            "/v1/chat/completions" => "POST",
            "/health" | "/v1/models" => "GET",
            _ if of_model.as_deref() == Some(self.defaults.model.as_str()) => "GET",
            _ => return Err(Broken::Refused(Refusal::new(404, format!("{path} is not served here")))),
        };
        if request.method != method {
            let refusal = Refusal::new(405, format!("{path} takes {method}"));
            return Ok(connection.respond(405, &[("Allow", method)], &refusal.body())?);
        }
        let model = json!({ "id": self.defaults.model, "object": "model", "created": self.began, "owned_by": "grpo-pipes",
                    "policy_id": self.identity.policy_id, "policy_step": self.identity.step });
        let body = match path {
            "/v1/chat/completions" => return self.complete(&request.body, connection),
            "/health" => json!({ "status": "ok" }),
            "/v1/models" => json!({ "object": "list", "data": [model] }),
            _ => model,
        };
        Ok(connection.respond(200, &[], body.to_string().as_bytes())?)
    }

    fn check_key(&self, request: &HttpRequest) -> Result<(), Refusal> {
        let Some(key) = &self.key else { return Ok(()) };
        let given = request.authorization.as_deref().and_then(|value| value.strip_prefix("Bearer ")).map(str::trim);
        // Hashes compare in constant time.
        match given.map(|given| blake3::hash(given.as_bytes()) == *key) {
            Some(true) => Ok(()),
            Some(false) => Err(Refusal::new(401, "the API key is wrong").with_code("invalid_api_key")),
            None => {
                Err(Refusal::new(401, "the API key is missing: Authorization: Bearer KEY").with_code("invalid_api_key"))
            }
        }
    }

    fn complete(&self, body: &[u8], connection: &mut Connection) -> Result<(), Broken> {
        let chat = ChatRequest::parse(body, &self.defaults).map_err(Broken::Refused)?;
        let (answers, prompt) = self.submit(&chat)?;
        let id = self.requests.fetch_add(1, Ordering::Relaxed);
        let answer = Completions {
            id: format!("chatcmpl-{:x}-{id}", self.began),
            created: now(),
            model: &self.defaults.model,
            policy_id: &self.identity.policy_id,
            prompt,
        };
        let stops: Arc<[String]> = chat.stops.clone().into();
        let choices = (0..chat.samples).map(|_| Choice::new(&self.tokenizer, &stops, &chat)).collect();
        if chat.stream {
            answer.send_events(&chat, choices, (answers, connection))
        } else {
            answer.send_whole(choices, (answers, connection))
        }
    }

    /// Hands a request to the engine.
    fn submit(&self, chat: &ChatRequest) -> Result<(Answers, Vec<u32>), Broken> {
        let built = self.builder.lock().unwrap_or_else(PoisonError::into_inner).chat(chat.messages.clone());
        let (prompt_id, _, tokens) = built.map_err(|err| match err {
            Error::Data(what) if what.contains("--on-long-prompt") => {
                Broken::Refused(Refusal::of("messages", what).with_code("context_length_exceeded"))
            }
            Error::Data(what) => Broken::Refused(Refusal::of("messages", what)),
            other => other.into(),
        })?;
        let (answers, listener) = Answers::new(chat.samples);
        let own = OwnSettings {
            group_size: chat.samples,
            max_completion_tokens: chat.max_completion_tokens,
            sampling: chat.sampling,
            seed: chat.seed.unwrap_or_else(|| self.next_seed.fetch_add(1, Ordering::Relaxed)),
            listener,
        };
        let prompt_id = chat.prompt_id.clone().unwrap_or(prompt_id);
        let request = Request { prompt_id, tokens: tokens.clone(), payload: (), own: Some(own) };
        let refused = |why| {
            Broken::Refused(match why {
                NotQueued::Full => Refusal::new(503, "too many requests wait already"),
                NotQueued::Closed => stopping(),
            })
        };
        self.queue.add(request, &answers).map_err(refused)?;
        Ok((answers, tokens))
    }
}

/// To whoever comes, or waits, after the engine has ended.
pub fn stopping() -> Refusal {
    Refusal::new(503, "the server is stopping")
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
