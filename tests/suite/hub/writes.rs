//! What the server does with requests that write: repositories, LFS uploads, commits.
//!
//! `HF_TOKEN=sesame` may write to `own/...`, `HF_TOKEN=reader` may not. A request that no Hub would take is noted in `wrong`.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use ring::digest;
use serde_json::{Value, json};

use super::server::{COMMIT, State, take};

/// A repository: who may see it, and the files of each branch.
#[derive(Default)]
pub struct Repo {
    pub visibility: String,
    pub branches: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    pub messages: Vec<String>,
}

/// What was written, and how the server misbehaves.
#[derive(Default)]
pub struct Writes {
    pub repos: Mutex<BTreeMap<String, Repo>>,
    objects: Mutex<BTreeMap<String, Vec<u8>>>,
    parts: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Bytes of a part; 0 for uploads in one piece.
    pub part_size: AtomicUsize,
    /// Uploads whose connection is cut in the middle, counted down.
    pub cut: AtomicU32,
    /// Answers to requests whose address contains the first text, each given once: status and further header.
    pub answers: Mutex<Vec<(&'static str, &'static str, &'static str)>>,
    /// Bytes of uploads that arrived whole.
    pub stored: AtomicUsize,
    pub wrong: Mutex<Vec<String>>,
}

/// The head of a request.
pub struct Head<'a> {
    pub method: &'a str,
    pub path: &'a str,
    pub headers: &'a [String],
}

impl Head<'_> {
    fn field(&self, name: &str) -> Option<&str> {
        self.headers.iter().find_map(|line| {
            let (field, value) = line.split_once(':')?;
            field.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

type Answer = Result<(&'static str, Value), (&'static str, &'static str)>;

pub fn serve(stream: &mut TcpStream, reader: &mut impl BufRead, head: &Head<'_>, state: &State) {
    let writes = &state.writes;
    let is_upload = head.path.starts_with("/storage/");
    let length = head.field("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = vec![0; if is_upload && take(&writes.cut) { length / 2 } else { length }];
    if reader.read_exact(&mut body).is_err() || body.len() < length {
        return; // the connection is cut
    }
    if is_upload && (head.field("content-length").is_none() || head.field("authorization").is_some()) {
        writes.wrong.lock().unwrap().push(format!("{} without a length, or with the token", head.path));
    }
    let asked = {
        let mut answers = writes.answers.lock().unwrap();
        let found = answers.iter().position(|(part, ..)| head.path.contains(part));
        found.map(|index| answers.remove(index))
    };
    let (status, field, text) = match asked {
        Some((_, "cut", _)) => {
            let _ = answer(head, &body, state); // what was asked is done, and nobody hears of it
            return;
        }
        Some((_, status, field)) => {
            let echo = head.field("authorization").unwrap_or_default();
            (status, field.to_owned(), json!({"error": format!("as the test wants, {echo}")}).to_string())
        }
        None => match answer(head, &body, state) {
            Ok((status, value)) => (status, etag(&body), value.to_string()),
            Err((status, why)) => (status, etag(&body), json!({"error": why}).to_string()),
        },
    };
    let length = text.len();
    let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\n{field}\r\nContent-Length: {length}\r\n\r\n");
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(text.as_bytes()));
}

fn answer(head: &Head<'_>, body: &[u8], state: &State) -> Answer {
    let writes = &state.writes;
    if let Some(place) = head.path.strip_prefix("/storage/") {
        return store(head.method, place, body, writes);
    }
    match head.field("authorization") {
        Some("Bearer sesame") => {}
        Some("Bearer reader") => return Err(("403 Forbidden", "the token has no write access")),
        _ => return Err(("401 Unauthorized", "Invalid username or password.")),
    }
    let value = || serde_json::from_slice::<Value>(body).map_err(|_| ("400 Bad Request", "not JSON"));
    if head.path == "/api/validate-yaml" {
        return Ok(("200 OK", json!({})));
    }
    if head.path == "/verify" {
        let (asked, objects) = (value()?, writes.objects.lock().unwrap());
        let size = objects.get(asked["oid"].as_str().unwrap()).map(Vec::len);
        let is_there = size.is_some_and(|size| asked["size"] == size);
        return if is_there { Ok(("200 OK", json!({}))) } else { Err(("404 Not Found", "no such object")) };
    }
    if head.path == "/api/repos/create" {
        return create(&value()?, writes);
    }
    if let Some(repo) = head.path.strip_suffix(".git/info/lfs/objects/batch") {
        if head.field("accept") != Some("application/vnd.git-lfs+json") {
            writes.wrong.lock().unwrap().push("an LFS batch that does not accept LFS".into());
        }
        let repo = repo.strip_prefix("/datasets/").map_or(format!("models{repo}"), |id| format!("datasets/{id}"));
        return batch(&repo, &value()?, head.field("host").unwrap(), writes);
    }
    let words: Vec<&str> = head.path.trim_start_matches("/api/").split('/').collect();
    let [kind, owner, name, what, branch] = words[..] else { return Err(("404 Not Found", "no such address")) };
    let id = format!("{kind}/{owner}/{name}");
    let mut repos = writes.repos.lock().unwrap();
    let repo = repos.get_mut(&id).ok_or(("404 Not Found", "Repository not found"))?;
    if what == "branch" {
        let fresh = !repo.branches.contains_key(branch);
        let main = repo.branches["main"].clone();
        repo.branches.entry(branch.into()).or_insert(main);
        return if fresh { Ok(("201 Created", json!({}))) } else { Err(("409 Conflict", "Reference exists")) };
    }
    let files = repo.branches.get_mut(branch).ok_or(("404 Not Found", "Invalid rev id"))?;
    match what {
        "preupload" => Ok(("200 OK", modes(&value()?, files))),
        "commit" => {
            repo.messages.push(commit(body, files, writes)?);
            if id == "models/own/er" && branch == "main" {
                state.files.lock().unwrap().clone_from(files);
            }
            let url = format!("/{owner}/{name}/commit/{COMMIT}");
            Ok(("200 OK", json!({"success": true, "commitUrl": url, "commitOid": COMMIT})))
        }
        _ => Err(("404 Not Found", "no such address")),
    }
}

fn create(asked: &Value, writes: &Writes) -> Answer {
    let (owner, name) = (asked["organization"].as_str().unwrap_or("own"), asked["name"].as_str().unwrap());
    if owner != "own" {
        return Err(("403 Forbidden", "you may not create a repository in this namespace"));
    }
    let id = format!("{}s/{owner}/{name}", asked["type"].as_str().unwrap_or("model"));
    let mut repos = writes.repos.lock().unwrap();
    if repos.contains_key(&id) {
        return Err(("409 Conflict", "You already created this repo"));
    }
    let visibility = asked["visibility"].as_str().unwrap_or("public").to_owned();
    let branches = [("main".to_owned(), BTreeMap::new())].into();
    repos.insert(id, Repo { visibility, branches, messages: Vec::new() });
    Ok(("200 OK", json!({"url": format!("https://huggingface.co/{owner}/{name}"), "id": format!("{owner}/{name}")})))
}

/// Weights and compressed files go by LFS, all else into the commit.
fn modes(asked: &Value, files: &BTreeMap<String, Vec<u8>>) -> Value {
    let mode = |file: &Value| {
        let path = file["path"].as_str().unwrap();
        let lfs = path.ends_with(".safetensors") || path.ends_with(".zst");
        let blob = |content: &Vec<u8>| [format!("blob {}\0", content.len()).as_bytes(), content].concat();
        let oid = files.get(path).map(|content| match lfs {
            true => hex(&digest::SHA256, content),
            false => hex(&digest::SHA1_FOR_LEGACY_USE_ONLY, &blob(content)),
        });
        BASE64_STANDARD.decode(file["sample"].as_str().unwrap()).unwrap();
        json!({"path": path, "uploadMode": if lfs { "lfs" } else { "regular" }, "shouldIgnore": path == "ignored.json", "oid": oid})
    };
    json!({"files": asked["files"].as_array().unwrap().iter().map(mode).collect::<Vec<_>>()})
}

fn batch(repo: &str, asked: &Value, host: &str, writes: &Writes) -> Answer {
    if !writes.repos.lock().unwrap().contains_key(repo) {
        return Err(("404 Not Found", "Repository not found"));
    }
    // Another host than the Hub's: no token may reach it.
    let storage = format!("http://localhost:{}/storage", host.split_once(':').unwrap().1);
    let part_size = writes.part_size.load(Ordering::SeqCst);
    let objects = writes.objects.lock().unwrap();
    let object = |object: &Value| {
        let (oid, size) = (object["oid"].as_str().unwrap(), object["size"].as_u64().unwrap() as usize);
        if objects.contains_key(oid) {
            return json!({"oid": oid, "size": size});
        }
        if part_size == 0 {
            let upload = json!({"href": format!("{storage}/{oid}?secret=x")});
            let verify = json!({"href": format!("http://{host}/verify")});
            return json!({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}});
        }
        let mut header = json!({"chunk_size": part_size.to_string()});
        for part in 1..=size.div_ceil(part_size) {
            header[format!("{part:05}")] = format!("{storage}/{oid}.{part}?secret=x").into();
        }
        let upload = json!({"href": format!("{storage}/{oid}.complete"), "header": header});
        json!({"oid": oid, "size": size, "actions": {"upload": upload}})
    };
    let objects: Vec<Value> = asked["objects"].as_array().unwrap().iter().map(object).collect();
    Ok(("200 OK", json!({"transfer": if part_size == 0 { "basic" } else { "multipart" }, "objects": objects})))
}

/// Takes an object, a part of one, or the list of its parts.
fn store(method: &str, place: &str, body: &[u8], writes: &Writes) -> Answer {
    let place = place.split('?').next().unwrap();
    let (oid, part) = place.split_once('.').map_or((place, None), |(oid, part)| (oid, Some(part)));
    let whole = match part {
        Some("complete") if method == "POST" => {
            let asked: Value = serde_json::from_slice(body).map_err(|_| ("400 Bad Request", "not JSON"))?;
            let parts = writes.parts.lock().unwrap();
            let mut whole = Vec::new();
            for (index, part) in asked["parts"].as_array().unwrap().iter().enumerate() {
                let bytes =
                    parts.get(&format!("{oid}.{}", index + 1)).ok_or(("400 Bad Request", "a part is missing"))?;
                if format!("ETag: {}", part["etag"].as_str().unwrap()) != etag(bytes) || part["partNumber"] != index + 1
                {
                    return Err(("400 Bad Request", "another part"));
                }
                whole.extend(bytes);
            }
            whole
        }
        Some(_) => {
            writes.stored.fetch_add(body.len(), Ordering::SeqCst);
            writes.parts.lock().unwrap().insert(place.into(), body.to_vec());
            return Ok(("200 OK", json!({})));
        }
        None => {
            writes.stored.fetch_add(body.len(), Ordering::SeqCst);
            body.to_vec()
        }
    };
    if hex(&digest::SHA256, &whole) != oid {
        return Err(("400 Bad Request", "another content"));
    }
    writes.objects.lock().unwrap().insert(oid.into(), whole);
    Ok(("200 OK", json!({})))
}

/// Applies the lines of a commit to a branch, and returns its message.
fn commit(
    body: &[u8],
    files: &mut BTreeMap<String, Vec<u8>>,
    writes: &Writes,
) -> Result<String, (&'static str, &'static str)> {
    let mut message = None;
    for line in body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let line: Value = serde_json::from_slice(line).map_err(|_| ("400 Bad Request", "not NDJSON"))?;
        let value = &line["value"];
        let path = || value["path"].as_str().unwrap().to_owned();
        match line["key"].as_str() {
            Some("header") => message = value["summary"].as_str().map(Into::into),
            Some("file") => {
                let content = BASE64_STANDARD.decode(value["content"].as_str().unwrap());
                files.insert(path(), content.map_err(|_| ("400 Bad Request", "not base64"))?);
            }
            Some("lfsFile") => {
                let objects = writes.objects.lock().unwrap();
                let object =
                    objects.get(value["oid"].as_str().unwrap()).ok_or(("400 Bad Request", "no such object"))?;
                files.insert(path(), object.clone());
            }
            _ => return Err(("400 Bad Request", "no such line")),
        }
    }
    message.ok_or(("400 Bad Request", "no header"))
}

fn etag(bytes: &[u8]) -> String {
    format!("ETag: \"{}\"", blake3::hash(bytes).to_hex())
}

pub fn hex(algorithm: &'static digest::Algorithm, bytes: &[u8]) -> String {
    digest::digest(algorithm, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
