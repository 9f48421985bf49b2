//! The part of the Hub's HTTP protocol that writes to a repository: making it, commits, and how a request is sent and retried.
//!
//! The addresses of LFS uploads come from the Hub and are secrets while they last, as the token is: no message holds one.

use std::thread::sleep;
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use serde_json::{Value, json};
use ureq::http::{HeaderMap, Response};
use ureq::typestate::WithBody;
use ureq::{AsSendBody, Body, RequestBuilder};

use super::api::{Api, Fault, RepoKind, fault};
use crate::process::message::note;

/// Characters of a branch's name that are not escaped in an address.
const KEPT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Pauses before a request is retried, where the Hub names none.
pub(super) const PAUSES: [Duration; 4] =
    [Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(20)];

/// The longest pause that the Hub can ask for; its limits of requests are per five minutes.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

/// A pause that the user is told of.
const WORTH_A_LINE: Duration = Duration::from_secs(5);

/// Timeout for the answer to a request that may take the Hub long, such as a commit of many files.
const PATIENCE: Duration = Duration::from_secs(300);

/// The most that is read of an answer (bytes).
const MAX_ANSWER: u64 = 64 << 20;

/// Bytes at the beginning of a file by which the Hub judges whether it is text.
pub const SAMPLE: usize = 512;

pub(super) const LFS_JSON: &str = "application/vnd.git-lfs+json";

/// A branch of a repository.
#[derive(Debug)]
pub struct Branch<'a> {
    /// Model or data set.
    pub kind: RepoKind,
    /// `owner/name`.
    pub id: &'a str,
    /// The branch.
    pub name: &'a str,
}

impl Branch<'_> {
    fn api(&self, endpoint: &str, what: &str) -> String {
        format!("{endpoint}/api/{}/{}/{what}/{}", self.kind.plural(), self.id, utf8_percent_encode(self.name, KEPT))
    }
}

/// What the Hub says of a file that is to be uploaded.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Mode {
    /// Its name in the repository.
    pub path: String,
    /// `lfs`, or `regular` for a file that goes into the commit.
    pub upload_mode: String,
    /// Whether the repository's .gitignore names it.
    #[serde(default)]
    pub should_ignore: bool,
    /// The id of its content in the branch's last commit, if it is there: of LFS, or of Git.
    #[serde(default)]
    pub oid: Option<String>,
}

/// A request that failed, and the pause that the Hub asks for.
pub(super) struct Failure {
    fault: Fault,
    pause: Option<Duration>,
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self { fault, pause: None }
    }
}

pub(super) type Attempt<T> = std::result::Result<T, Failure>;

impl Api {
    /// Makes a repository; `false` if there is one.
    pub fn create(&self, kind: RepoKind, id: &str, visibility: &str) -> Result<bool, Fault> {
        let (owner, name) = id.split_once('/').expect("an id is owner/name");
        let kind = if kind == RepoKind::Model { "model" } else { "dataset" };
        let private = visibility == "private";
        let body =
            json!({"organization": owner, "name": name, "type": kind, "visibility": visibility, "private": private});
        made(self.post_json(&format!("{}/api/repos/create", self.endpoint()), &body))
    }

    /// Makes a branch; `false` if there is one.
    pub fn create_branch(&self, branch: &Branch<'_>) -> Result<bool, Fault> {
        made(self.post_json(&branch.api(self.endpoint(), "branch"), &json!({})))
    }

    /// Asks how each of these files, given as name, beginning in base64, and size, is to be uploaded.
    pub fn upload_modes(&self, branch: &Branch<'_>, files: &[(&str, String, u64)]) -> Result<Vec<Mode>, Fault> {
        #[derive(Deserialize)]
        struct Modes {
            files: Vec<Mode>,
        }
        let entry = |(path, sample, size): &(&str, String, u64)| json!({"path": path, "sample": sample, "size": size});
        let body = json!({"files": files.iter().map(entry).collect::<Vec<_>>()});
        let answer = self.post_json(&branch.api(self.endpoint(), "preupload"), &body)?;
        Ok(parsed::<Modes>(&answer)?.files)
    }

    /// Commits the lines that describe it, and returns the commit's id.
    pub fn commit_lines(&self, branch: &Branch<'_>, lines: &[u8]) -> Result<String, Fault> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Commit {
            commit_oid: String,
        }
        let answer = self.post(&branch.api(self.endpoint(), "commit"), "application/x-ndjson", lines)?;
        Ok(parsed::<Commit>(&answer)?.commit_oid)
    }

    fn post_json(&self, address: &str, body: &Value) -> Result<Vec<u8>, Fault> {
        self.post(address, "application/json", body.to_string().as_bytes())
    }

    /// Sends a body, with the token if the address is the Hub's own and not that of an upload.
    pub(super) fn post(&self, address: &str, content_type: &str, body: &[u8]) -> Result<Vec<u8>, Fault> {
        persistently(&PAUSES, || {
            let mut request = self.patient(self.agent.post(address)).header("Content-Type", content_type);
            if content_type == LFS_JSON {
                request = request.header("Accept", LFS_JSON);
            }
            let own = address.strip_prefix(self.endpoint()).is_some_and(|rest| rest.starts_with('/'));
            if let Some(token) = self.token.as_ref().filter(|_| own) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let mut answer = self.answer(request, body)?;
            let read = answer.body_mut().with_config().limit(MAX_ANSWER).read_to_vec();
            read.map_err(|err| fault(err).into())
        })
    }

    pub(super) fn patient(&self, request: RequestBuilder<WithBody>) -> RequestBuilder<WithBody> {
        request.config().timeout_recv_response(Some(PATIENCE)).timeout_per_write(Some(PATIENCE)).build()
    }

    pub(super) fn answer(&self, request: RequestBuilder<WithBody>, body: impl AsSendBody) -> Attempt<Response<Body>> {
        let mut answer = request.send(body).map_err(|err| match fault(err) {
            Fault::Garbled(_) => Fault::Garbled("cannot send a request".into()), // the details may hold the address
            fault => fault,
        })?;
        let status = answer.status().as_u16();
        if answer.status().is_success() {
            return Ok(answer);
        }
        let pause = pause_asked(answer.headers());
        let fault = Fault::Status(status);
        if fault.is_passing() {
            return Err(Failure { fault, pause });
        }
        let text = answer.body_mut().with_config().limit(1 << 16).read_to_string().unwrap_or_default();
        let words = serde_json::from_str(&text).map_or_else(|_| String::new(), |error| words_of(&error));
        let tells_the_token = self.token.as_ref().is_some_and(|token| words.contains(token));
        Err(Fault::Refused(status, if tells_the_token { String::new() } else { words }).into())
    }
}

/// Retries an attempt that failed for a passing reason, after the pause that the Hub asks for, or the next of `pauses`.
pub(super) fn persistently<T>(pauses: &[Duration], mut attempt: impl FnMut() -> Attempt<T>) -> Result<T, Fault> {
    for pause in pauses {
        match attempt() {
            Err(failure) if failure.fault.is_passing() => {
                let pause = failure.pause.unwrap_or(*pause).min(LONGEST_PAUSE);
                if pause >= WORTH_A_LINE {
                    note(
                        "export-hf",
                        &format!("the Hub cannot be reached or is busy; trying again in {} s", pause.as_secs()),
                    );
                }
                sleep(pause);
            }
            done => return done.map_err(|failure| failure.fault),
        }
    }
    attempt().map_err(|failure| failure.fault)
}

/// The pause of `Retry-After: 7`, or of `RateLimit: "api";r=0;t=7`.
fn pause_asked(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let limit = || text("ratelimit")?.split(';').find_map(|part| part.trim().strip_prefix("t="));
    let seconds = text("retry-after").or_else(limit)?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

/// Whether something was made; it was not if it is there.
fn made<T>(done: Result<T, Fault>) -> Result<bool, Fault> {
    match done {
        Ok(_) => Ok(true),
        Err(Fault::Refused(409, _)) => Ok(false),
        Err(fault) => Err(fault),
    }
}

/// What an answer or an object says of its error: `{"error": "..."}`, `{"message": "..."}`, or a list of these.
pub(super) fn words_of(error: &Value) -> String {
    let one = |value: &Value| value.as_str().map(ToOwned::to_owned);
    let direct = one(&error["error"]).or_else(|| one(&error["message"])).or_else(|| one(&error["error"]["message"]));
    let listed = || error["errors"].as_array().map(|all| all.iter().map(words_of).collect::<Vec<_>>().join("; "));
    direct.or_else(listed).unwrap_or_default()
}

pub(super) fn parsed<'a, T: Deserialize<'a>>(answer: &'a [u8]) -> Result<T, Fault> {
    serde_json::from_slice(answer).map_err(|err| Fault::Garbled(err.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passing_failure_is_retried_as_often_as_there_are_pauses_and_another_is_not() {
        let tries = |fault: fn() -> Fault, pause| {
            let mut tries = 0;
            let done = persistently(&[Duration::ZERO; 3], || -> Attempt<()> {
                tries += 1;
                Err(Failure { fault: fault(), pause })
            });
            assert!(done.is_err());
            tries
        };
        assert_eq!(tries(|| Fault::Status(503), None), 4);
        assert_eq!(tries(|| Fault::Unreachable("cut".into()), Some(Duration::ZERO)), 4);
        assert_eq!(tries(|| Fault::Refused(403, String::new()), None), 1);
    }

    #[test]
    fn the_pause_is_the_one_that_the_hub_asks_for() {
        let asked = |name: &'static str, value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().unwrap());
            pause_asked(&headers).map(|pause| pause.as_secs())
        };
        assert_eq!(asked("retry-after", "7"), Some(7));
        assert_eq!(asked("ratelimit", "\"api\";r=0;t=55"), Some(55));
        assert_eq!(asked("retry-after", "Fri, 31 Dec 1999 23:59:59 GMT"), None);
        assert_eq!(asked("etag", "7"), None);
    }
}
