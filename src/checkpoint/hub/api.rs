//! The part of the Hub's HTTP protocol that reads a repository: its commit, its list of files, their bytes.
//!
//! Names come from whoever answers, so callers check them before using them as paths.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use ureq::config::RedirectAuthHeaders;
use ureq::http::Response;
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

/// Characters of a file name that are not escaped in an address.
const KEPT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~').remove(b'/');

/// Timeout for connecting, for the answer, and for its next bytes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Pauses before a request is retried.
const PAUSES: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(1)];

/// The most pages of a list of files; each holds a thousand.
const MAX_PAGES: usize = 1000;

/// The longest page, and the longest description of a repository (bytes).
const MAX_ANSWER: u64 = 64 << 20;

/// The kind of a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepoKind {
    /// A model.
    Model,
    /// A data set.
    Dataset,
}

impl RepoKind {
    /// Its name in the addresses of the API and in the cache.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }

    /// The prefix of `owner/name` in the addresses of files.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Model => "",
            Self::Dataset => "datasets/",
        }
    }
}

/// Why a request failed.
#[derive(Debug)]
pub enum Fault {
    /// The Hub answered with this status.
    Status(u16),
    /// It refused what was to be uploaded with this status, and said why.
    Refused(u16, String),
    /// It cannot be reached, or stopped answering.
    Unreachable(String),
    /// It answered with something other than its protocol.
    Garbled(String),
    /// A local file cannot be written.
    Disk(io::Error),
}

impl Fault {
    /// Whether the Hub failed, not the request, so that a retry may help.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable(_) => true,
            Self::Status(status) => matches!(status, 408 | 429 | 500..),
            Self::Refused(..) | Self::Garbled(_) | Self::Disk(_) => false,
        }
    }
}

/// A file in a repository's list.
#[derive(Debug, Clone)]
pub struct Object {
    /// Id of its content, in hexadecimal digits if the list is correct.
    pub id: String,
    /// Its size (bytes).
    pub size: u64,
}

/// A client of one Hub, for one user.
pub struct Api {
    pub(super) agent: Agent,
    endpoint: String,
    pub(super) token: Option<String>,
}

impl Api {
    /// A client of the Hub at `endpoint`; the token is sent to no other host.
    pub fn new(endpoint: String, token: Option<String>) -> Self {
        let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .user_agent(concat!("grpo-pipes/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(PATIENCE))
            .timeout_recv_response(Some(PATIENCE))
            .timeout_per_read(Some(PATIENCE))
            .build();
        Self { agent: config.into(), endpoint, token }
    }

    /// The Hub's address.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The commit of a repository's `main`.
    pub fn commit(&self, kind: RepoKind, id: &str) -> Result<String, Fault> {
        #[derive(Deserialize)]
        struct Info {
            sha: String,
        }
        let (info, _): (Info, _) = self.json(&format!("{}/api/{}/{id}", self.endpoint, kind.plural()))?;
        Ok(info.sha)
    }

    /// The files of a commit, by name.
    pub fn files(&self, kind: RepoKind, id: &str, commit: &str) -> Result<BTreeMap<String, Object>, Fault> {
        #[derive(Deserialize)]
        struct Entry {
            r#type: String,
            path: String,
            #[serde(default)]
            oid: String,
            #[serde(default)]
            size: u64,
        }
        let mut files = BTreeMap::new();
        let mut address = format!("{}/api/{}/{id}/tree/{commit}?recursive=true", self.endpoint, kind.plural());
        for _ in 0..MAX_PAGES {
            let (entries, next): (Vec<Entry>, _) = self.json(&address)?;
            let of_file = entries.into_iter().filter(|entry| entry.r#type == "file");
            files.extend(of_file.map(|entry| (entry.path, Object { id: entry.oid, size: entry.size })));
            match next {
                None => return Ok(files),
                Some(next) if next.starts_with(&format!("{}/", self.endpoint)) => address = next,
                Some(next) => return Err(Fault::Garbled(format!("the list of files goes on at {next:?}"))),
            }
        }
        Err(Fault::Garbled("the list of files does not end".into()))
    }

    /// Downloads a file of a commit to `target`, after the bytes that an earlier try left there. It may end early, so callers check the
    /// length.
    pub fn download(&self, kind: RepoKind, id: &str, commit: &str, name: &str, target: &Path) -> Result<(), Fault> {
        let name = utf8_percent_encode(name, KEPT);
        let address = format!("{}/{}{id}/resolve/{commit}/{name}", self.endpoint, kind.prefix());
        let mut file = OpenOptions::new().create(true).append(true).open(target).map_err(Fault::Disk)?;
        let mut reached = 0;
        loop {
            let done = patiently(|| self.go_on(&address, &mut file));
            let length = file.metadata().map_err(Fault::Disk)?.len();
            match done {
                Err(fault) if fault.is_passing() && length > reached => reached = length, // there was progress
                done => return done,
            }
        }
    }

    /// Downloads the rest of a file.
    fn go_on(&self, address: &str, file: &mut File) -> Result<(), Fault> {
        let had = file.metadata().map_err(Fault::Disk)?.len();
        let answer = self.get(address, had)?;
        if answer.status() != 206 {
            file.set_len(0).map_err(Fault::Disk)?; // the server sends the whole file
        }
        copy(answer.into_body().into_reader(), file)
    }

    /// Reads an answer as JSON, and the address of the next page.
    fn json<T: DeserializeOwned>(&self, address: &str) -> Result<(T, Option<String>), Fault> {
        patiently(|| {
            let mut answer = self.get(address, 0)?;
            let next = answer.headers().get("link").and_then(|link| next_page(link.to_str().ok()?));
            let text = answer.body_mut().with_config().limit(MAX_ANSWER).read_to_string().map_err(fault)?;
            let value = serde_json::from_str(&text).map_err(|err| Fault::Garbled(err.to_string()))?;
            Ok((value, next))
        })
    }

    /// Requests the bytes from `from` on.
    fn get(&self, address: &str, from: u64) -> Result<Response<Body>, Fault> {
        let mut request = self.agent.get(address);
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        let answer = request.call().map_err(fault)?;
        match answer.status().as_u16() {
            200 | 206 => Ok(answer),
            status => Err(Fault::Status(status)),
        }
    }
}

/// Retries an attempt that failed for a passing reason.
fn patiently<T>(mut attempt: impl FnMut() -> Result<T, Fault>) -> Result<T, Fault> {
    for pause in PAUSES {
        match attempt() {
            Err(fault) if fault.is_passing() => sleep(pause),
            done => return done,
        }
    }
    attempt()
}

fn copy(mut from: impl Read, to: &mut impl Write) -> Result<(), Fault> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => to.write_all(&buffer[..read]).map_err(Fault::Disk)?,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(Fault::Unreachable(err.to_string())),
        }
    }
}

/// The address of `<address>; rel="next"` among the links of an answer.
fn next_page(links: &str) -> Option<String> {
    let next = links.split(',').find(|link| link.contains("rel=\"next\""))?;
    Some(next.split_once('<')?.1.split_once('>')?.0.to_owned())
}

pub(super) fn fault(err: ureq::Error) -> Fault {
    match err {
        ureq::Error::StatusCode(status) => Fault::Status(status),
        ureq::Error::Io(_) | ureq::Error::Timeout(_) | ureq::Error::HostNotFound | ureq::Error::ConnectionFailed => {
            Fault::Unreachable(err.to_string())
        }
        other => Fault::Garbled(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_part_of_a_list_is_where_its_link_says() {
        assert_eq!(next_page("<https://h/x?cursor=a>; rel=\"next\""), Some("https://h/x?cursor=a".into()));
        assert_eq!(next_page("<https://h/1>; rel=\"prev\", <https://h/3>; rel=\"next\""), Some("https://h/3".into()));
        for none in ["", "<https://h/1>; rel=\"prev\"", "rel=\"next\""] {
            assert_eq!(next_page(none), None, "{none}");
        }
    }

    #[test]
    fn a_name_in_an_address_keeps_its_folders_and_nothing_that_an_address_understands() {
        assert_eq!(utf8_percent_encode("main/a b?#%.txt", KEPT).to_string(), "main/a%20b%3F%23%25.txt");
    }
}
