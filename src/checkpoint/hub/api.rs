//! The Hub's protocol over HTTP, as far as reading a repository takes it: its commit, its list of files, their bytes.
//!
//! The names in it are of whoever answers, so callers check them before they become paths.

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

/// What a file's name keeps in an address.
const KEPT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~').remove(b'/');

/// To connect, to be answered, and for the next bytes of an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Before a request is tried again.
const PAUSES: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(1)];

/// The most parts in which a list of files may come; each holds a thousand.
const MAX_PAGES: usize = 1000;

/// The longest of these parts, and of a repository's description [bytes].
const MAX_ANSWER: u64 = 64 << 20;

/// What kind of repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A model.
    Model,
    /// A data set.
    Dataset,
}

impl Kind {
    /// Its name in the addresses of the interface and in the cache.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }

    /// What stands before `owner/name` in the addresses of files.
    fn prefix(self) -> &'static str {
        match self {
            Self::Model => "",
            Self::Dataset => "datasets/",
        }
    }
}

/// Why there is no answer.
#[derive(Debug)]
pub enum Fault {
    /// The Hub answered with this status.
    Status(u16),
    /// It cannot be reached, or stopped answering.
    Unreachable(String),
    /// It answered with something else than its protocol says.
    Garbled(String),
    /// A file here cannot be written.
    Disk(io::Error),
}

impl Fault {
    /// Whether the Hub, not the request, is the trouble.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable(_) => true,
            Self::Status(status) => matches!(status, 408 | 429 | 500..),
            Self::Garbled(_) | Self::Disk(_) => false,
        }
    }
}

/// A file in a repository's list.
#[derive(Debug, Clone)]
pub struct Object {
    /// Hexadecimal digits that name its content, if the list is right.
    pub id: String,
    /// Bytes.
    pub size: u64,
}

/// One Hub, asked as one user.
pub struct Api {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

impl Api {
    /// Asks the Hub at `endpoint`; the token goes to no other host.
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

    /// Where it is.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The commit that a repository's `main` is.
    pub fn commit(&self, kind: Kind, id: &str) -> Result<String, Fault> {
        #[derive(Deserialize)]
        struct Info {
            sha: String,
        }
        let (info, _): (Info, _) = self.json(&format!("{}/api/{}/{id}", self.endpoint, kind.plural()))?;
        Ok(info.sha)
    }

    /// The files of a commit by their names.
    pub fn files(&self, kind: Kind, id: &str, commit: &str) -> Result<BTreeMap<String, Object>, Fault> {
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

    /// Writes a file of a commit to `target`, going on behind what stands there of an earlier try. It may end early: callers look
    /// at the length.
    pub fn download(&self, kind: Kind, id: &str, commit: &str, name: &str, target: &Path) -> Result<(), Fault> {
        let name = utf8_percent_encode(name, KEPT);
        let address = format!("{}/{}{id}/resolve/{commit}/{name}", self.endpoint, kind.prefix());
        let mut file = OpenOptions::new().create(true).append(true).open(target).map_err(Fault::Disk)?;
        let mut reached = 0;
        loop {
            let done = patiently(|| self.go_on(&address, &mut file));
            let length = file.metadata().map_err(Fault::Disk)?.len();
            match done {
                Err(fault) if fault.is_passing() && length > reached => reached = length, // it is getting there
                done => return done,
            }
        }
    }

    /// Appends the rest of a file to what is there of it.
    fn go_on(&self, address: &str, file: &mut File) -> Result<(), Fault> {
        let had = file.metadata().map_err(Fault::Disk)?.len();
        let answer = self.get(address, had)?;
        if answer.status() != 206 {
            file.set_len(0).map_err(Fault::Disk)?; // the whole file comes
        }
        copy(answer.into_body().into_reader(), file)
    }

    /// An answer as JSON, and the address at which it goes on.
    fn json<T: DeserializeOwned>(&self, address: &str) -> Result<(T, Option<String>), Fault> {
        patiently(|| {
            let mut answer = self.get(address, 0)?;
            let next = answer.headers().get("link").and_then(|link| next_page(link.to_str().ok()?));
            let text = answer.body_mut().with_config().limit(MAX_ANSWER).read_to_string().map_err(fault)?;
            let value = serde_json::from_str(&text).map_err(|err| Fault::Garbled(err.to_string()))?;
            Ok((value, next))
        })
    }

    /// An answer from the byte `from` on, or from the first.
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

/// Tries again where that may help.
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

/// `<address>; rel="next"` among the links of an answer.
fn next_page(links: &str) -> Option<String> {
    let next = links.split(',').find(|link| link.contains("rel=\"next\""))?;
    Some(next.split_once('<')?.1.split_once('>')?.0.to_owned())
}

fn fault(err: ureq::Error) -> Fault {
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
