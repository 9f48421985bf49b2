//! A client of servers that speak OpenAI's API: asks, waits, and asks again after a failure that may pass.

use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::Value;
use ureq::http::Response;
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use crate::error::{Error, Result};
use crate::process::cancel::Stop;
use crate::process::message::one_line;

/// Timeout for connecting.
const TO_CONNECT: Duration = Duration::from_secs(30);
/// Timeout for an answer: a busy server may let a request wait for long.
const TO_ANSWER: Duration = Duration::from_secs(3600);
/// The first pause before a request is repeated; each is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The longest pause, also of those that a server asks for.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How often a request is repeated.
const REPETITIONS: u32 = 8;
/// How often a signal is looked for.
const LOOK: Duration = Duration::from_millis(50);
/// The longest answer (bytes).
const MAX_ANSWER: u64 = 256 << 20;

/// A client of one server.
pub struct Client {
    agent: Agent,
    /// Up to and with `/v1`.
    base: String,
    key: Option<String>,
    stop: Stop,
}

/// Why a request failed.
enum Fault {
    /// The server, or the way to it, failed; after this pause it may not.
    Passing(String, Option<Duration>),
    /// Asking again would not help.
    Lasting(String),
}

impl Client {
    /// A client of the server at `url`, with or without its `/v1`. `key` goes to no other host.
    ///
    /// # Errors
    /// [`Error::Usage`] when this is no address of a server.
    pub fn new(url: &str, key: Option<String>, stop: &Stop) -> Result<Self> {
        let place = url.trim_end_matches('/');
        if !["http://", "https://"].iter().any(|scheme| place.strip_prefix(scheme).is_some_and(|host| !host.is_empty()))
        {
            return Err(Error::Usage(format!("--server {url}: an address begins with http:// or https://")));
        }
        let base = if place.ends_with("/v1") { place.to_owned() } else { format!("{place}/v1") };
        let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(concat!("grpo-pipes/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(TO_CONNECT))
            .timeout_recv_response(Some(TO_ANSWER))
            .build();
        Ok(Self { agent: config.into(), base, key, stop: stop.clone() })
    }

    /// What the server has at `path`.
    ///
    /// # Errors
    /// [`Error::Server`] when it does not answer, refuses, or answers with something else; that of the stop.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.patiently(&|| {
            let request = self.agent.get(format!("{}{path}", self.base));
            let request =
                self.authorization().into_iter().fold(request, |request, value| request.header("Authorization", value));
            request.call()
        })
    }

    /// The server's answer to `body` at `path`.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub fn post<T: DeserializeOwned>(&self, path: &str, body: &Value) -> Result<T> {
        let body = body.to_string();
        self.patiently(&|| {
            let request = self.agent.post(format!("{}{path}", self.base)).header("Content-Type", "application/json");
            let request =
                self.authorization().into_iter().fold(request, |request, value| request.header("Authorization", value));
            request.send(&body)
        })
    }

    /// An error that names the server.
    pub fn error(&self, what: impl Into<String>) -> Error {
        Error::Server { address: self.base.clone(), what: what.into() }
    }

    /// Its address.
    pub fn base(&self) -> &str {
        &self.base
    }

    fn authorization(&self) -> Option<String> {
        self.key.as_ref().map(|key| format!("Bearer {key}"))
    }

    fn patiently<T: DeserializeOwned>(
        &self,
        ask: &dyn Fn() -> std::result::Result<Response<Body>, ureq::Error>,
    ) -> Result<T> {
        let mut pause = FIRST_PAUSE;
        for repetition in 0.. {
            self.stop.check()?;
            match ask().map_err(fault).and_then(read) {
                Ok(answer) => return Ok(answer),
                Err(Fault::Passing(_, wanted)) if repetition < REPETITIONS => {
                    self.wait(wanted.unwrap_or(pause).min(LONGEST_PAUSE))?;
                    pause *= 2;
                }
                Err(Fault::Passing(what, _)) => {
                    return Err(self.error(format!("{what}, also after {repetition} more tries")));
                }
                Err(Fault::Lasting(what)) => return Err(self.error(what)),
            }
        }
        unreachable!("the last repetition returns")
    }

    fn wait(&self, pause: Duration) -> Result<()> {
        let began = Instant::now();
        while began.elapsed() < pause {
            self.stop.check()?;
            sleep(LOOK.min(pause));
        }
        Ok(())
    }
}

fn fault(err: ureq::Error) -> Fault {
    match err {
        ureq::Error::Io(_) | ureq::Error::Timeout(_) | ureq::Error::HostNotFound | ureq::Error::ConnectionFailed => {
            Fault::Passing(one_line(&err.to_string()), None)
        }
        other => Fault::Lasting(one_line(&other.to_string())),
    }
}

fn read<T: DeserializeOwned>(mut answer: Response<Body>) -> std::result::Result<T, Fault> {
    let status = answer.status().as_u16();
    let header = answer.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
    let text = answer.body_mut().with_config().limit(MAX_ANSWER).read_to_string();
    let text = text.map_err(|err| Fault::Passing(one_line(&err.to_string()), None))?;
    match status {
        200 => serde_json::from_str(&text).map_err(|err| Fault::Lasting(format!("no answer of OpenAI's API: {err}"))),
        408 | 429 | 500.. => Err(Fault::Passing(refusal(status, &text), header.map(Duration::from_secs))),
        401 | 403 => Err(Fault::Lasting(format!("{}; --api-key gives a key", refusal(status, &text)))),
        300..=399 => Err(Fault::Lasting(format!("it sends to another address (status {status}); give that one"))),
        _ => Err(Fault::Lasting(refusal(status, &text))),
    }
}

/// What a server says with a status, in one line.
fn refusal(status: u16, body: &str) -> String {
    let json: Value = serde_json::from_str(body).unwrap_or_default();
    let places = [&json["error"]["message"], &json["message"], &json["detail"], &json["error"]];
    let said = places.into_iter().find_map(Value::as_str).unwrap_or_default();
    if said.is_empty() { format!("status {status}") } else { format!("status {status}: {}", one_line(said)) }
}
