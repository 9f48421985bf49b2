//! A small server that speaks the Hub's protocol, and misbehaves on request.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use super::writes::{self, Writes};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How the server misbehaves, and what it was asked.
#[derive(Default)]
pub struct State {
    pub files: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Downloads that are cut off in the middle, counted down.
    pub cut: AtomicU32,
    /// Downloads that are answered with an error page, counted down.
    pub fail: AtomicU32,
    /// Requests that are answered with 503, counted down.
    pub busy: AtomicU32,
    /// Downloads that went on where an earlier one was cut off.
    pub resumed: AtomicU32,
    /// A path, and in which part of the answers it stands in place of the name of a content or commit.
    pub astray: Mutex<Option<(&'static str, String)>>,
    pub log: Mutex<Vec<String>>,
    pub writes: Writes,
}

pub struct Hub {
    pub endpoint: String,
    pub state: Arc<State>,
    pub home: tempfile::TempDir,
}

/// A reply: status and reason, further headers, body.
pub type Reply = (&'static str, Vec<String>, Vec<u8>);

impl Hub {
    /// Serves `openai/gsm8k` and the model `own/er` from `files`, and says 401 to whom asks for `own/secret` without the token.
    pub fn start(files: &[(&str, &[u8])]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(State::default());
        *state.files.lock().unwrap() = files.iter().map(|(name, bytes)| ((*name).into(), bytes.to_vec())).collect();
        let served = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&served);
                std::thread::spawn(move || serve(stream, &state));
            }
        });
        Self { endpoint, state, home: tempfile::tempdir().unwrap() }
    }

    pub fn prep(&self, source: &str, settings: &[(&str, &str)]) -> Output {
        let mut command = self.command(env!("CARGO_BIN_EXE_gsm8k-prep"));
        command.arg(source).envs(settings.iter().copied()).output().unwrap()
    }

    /// A command with this server as its Hub, and nothing else of the environment's that concerns a Hub.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for name in ["HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"] {
            command.env_remove(name);
        }
        for proxy in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
            command.env_remove(proxy);
        }
        command.env("HF_HOME", self.home.path()).env("HF_ENDPOINT", &self.endpoint).stdin(Stdio::null());
        command
    }

    pub fn downloads(&self) -> usize {
        self.state.log.lock().unwrap().iter().filter(|line| line.starts_with("GET /cdn/")).count()
    }
}

fn serve(mut stream: TcpStream, state: &State) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut lines = reader.by_ref().lines().map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    state.log.lock().unwrap().push(request.clone());
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap(), words.next().unwrap());
    if ["POST", "PUT"].contains(&method) {
        return writes::serve(&mut stream, &mut reader, &writes::Head { method, path, headers: &headers }, state);
    }
    let headers: Vec<String> = headers.iter().map(|line| line.to_lowercase()).collect();
    let (mut status, mut fields, mut body) = reply(method, path, &headers, state);
    if let Some(("headers", path)) = &*state.astray.lock().unwrap() {
        fields.retain(|field| !field.starts_with("ETag") && !field.starts_with("X-Repo-Commit"));
        fields.extend(["ETag", "X-Linked-ETag"].map(|name| format!("{name}: \"{path}\"")));
        fields.push(format!("X-Repo-Commit: {path}"));
    }
    let is_file = path.starts_with("/cdn/");
    assert!(
        !is_file || !headers.iter().any(|line| line.starts_with("authorization")),
        "the token went to another host"
    );
    let from = headers.iter().find_map(|line| line.strip_prefix("range: bytes=")?.strip_suffix('-')?.parse().ok());
    if let Some(from) = from.filter(|_| is_file && status == "200 OK") {
        state.resumed.fetch_add(1, Ordering::SeqCst);
        (status, body) = ("206 Partial Content", body[from..].to_vec());
    }
    if !fields.iter().any(|field| field.starts_with("Content-Length")) {
        fields.push(format!("Content-Length: {}", body.len()));
    }
    let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\n{}\r\n\r\n", fields.join("\r\n"));
    let mut sent: &[u8] = if method == "HEAD" { &[] } else { &body };
    if is_file && method == "GET" && take(&state.cut) {
        sent = &sent[..sent.len() / 2];
    }
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(sent));
}

pub fn take(counter: &AtomicU32) -> bool {
    counter.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
}

fn reply(method: &str, address: &str, headers: &[String], state: &State) -> Reply {
    let (path, query) = address.split_once('?').unwrap_or((address, ""));
    let files = state.files.lock().unwrap();
    let astray = state.astray.lock().unwrap().clone();
    let named =
        |what, right: String| astray.clone().filter(|(wrong, _)| *wrong == what).map_or(right, |(_, path)| path);
    let plain = |status, text: &str| (status, Vec::new(), text.as_bytes().to_vec());
    if path.contains("own/secret")
        && !path.starts_with("/cdn/")
        && !headers.contains(&"authorization: bearer sesame".to_owned())
    {
        return plain("401 Unauthorized", "{\"error\":\"Invalid username or password.\"}");
    }
    if take(&state.busy) {
        return plain("503 Service Unavailable", "");
    }
    let repo = ["/own/secret", "/own/er", "/openai/gsm8k"].into_iter().find(|repo| path.contains(repo));
    let Some(repo) = repo else { return plain("404 Not Found", "{\"error\":\"Repository not found\"}") };
    if path.starts_with("/api/") && path.ends_with(repo) {
        let info = serde_json::json!({"id": &repo[1..], "sha": named("commit", COMMIT.into())});
        return plain("200 OK", &info.to_string());
    }
    if path.starts_with("/api/") && path.ends_with(&format!("{repo}/tree/{COMMIT}")) {
        let entry = |(name, bytes): (&String, &Vec<u8>)| {
            let oid = named("object", blake3::hash(bytes).to_hex().to_string());
            serde_json::json!({"type": "file", "oid": oid, "size": bytes.len(), "path": name})
        };
        // In parts of two, as the Hub cuts it into parts of a thousand.
        let (all, part): (Vec<_>, usize) = (files.iter().map(entry).collect(), query_number(query, "part="));
        let tree = &all[2 * part..all.len().min(2 * part + 2)];
        let host = headers.iter().find_map(|line| line.strip_prefix("host: ")).unwrap();
        let next = format!("Link: <http://{host}{path}?part={}>; rel=\"next\"", part + 1);
        let more = (2 * part + 2 < all.len()).then_some(next);
        return ("200 OK", more.into_iter().collect(), serde_json::to_vec(tree).unwrap());
    }
    let resolved = path.split_once(&format!("{repo}/resolve/{COMMIT}/")).map(|(_, name)| name);
    if let Some((name, bytes)) = resolved.and_then(|name| files.get_key_value(name)) {
        let host = headers.iter().find_map(|line| line.strip_prefix("host: ")).unwrap();
        return redirect(repo, name, bytes, host);
    }
    let small = path.strip_prefix(&format!("/api/resolve-cache{repo}/")).and_then(|name| files.get(name));
    if let Some(bytes) = small {
        return ("200 OK", metadata(bytes), bytes.clone());
    }
    match path.strip_prefix(&format!("/cdn{repo}/")).and_then(|name| files.get(name)) {
        Some(_) if method == "GET" && take(&state.fail) => plain("403 Forbidden", "link expired"),
        Some(bytes) => ("200 OK", vec!["ETag: \"of the file server\"".into()], bytes.clone()),
        None => plain("404 Not Found", "{\"error\":\"Entry not found\"}"),
    }
}

fn query_number(query: &str, name: &str) -> usize {
    query.split('&').find_map(|part| part.strip_prefix(name)?.parse().ok()).unwrap_or(0)
}

fn metadata(bytes: &[u8]) -> Vec<String> {
    vec![format!("ETag: \"{}\"", blake3::hash(bytes).to_hex()), format!("X-Repo-Commit: {COMMIT}")]
}

/// As the Hub does it: small files by a relative redirect, large ones by an absolute one to a file server, which does not know the
/// commit.
fn redirect(repo: &str, name: &str, bytes: &[u8], host: &str) -> Reply {
    if name.ends_with(".json") {
        let location = format!("Location: /api/resolve-cache{repo}/{name}");
        return ("307 Temporary Redirect", vec![location], Vec::new());
    }
    let mut fields = metadata(bytes);
    fields.push(format!("X-Linked-Size: {}", bytes.len()));
    let (_, port) = host.split_once(':').unwrap();
    fields.push(format!("Location: http://localhost:{port}/cdn{repo}/{name}"));
    ("302 Found", fields, Vec::new())
}
