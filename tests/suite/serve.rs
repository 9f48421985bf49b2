//! `rollout --serve`, seen from its clients.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fixtures::directory;
use crate::process::{lines, run};
use crate::runs::send;

const ROLLOUT: &str = env!("CARGO_BIN_EXE_rollout");

/// `rollout --serve` on a tiny model.
pub struct Server {
    child: Child,
    pub address: String,
    pub model: String,
}

impl Server {
    pub fn start(more: &[&str]) -> Self {
        let model = directory().join("tiny-qwen2").display().to_string();
        let mut command = Command::new(ROLLOUT);
        command.args(["--model", &model, "--serve", "0", "--device", "cpu"]).args(more);
        command.env_remove("GRPO_PIPES_API_KEY").stderr(Stdio::piped()).stdin(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        let place = said.find_map(|line| Some(line.split_once(" at http://")?.1.to_owned())).expect("it serves");
        // The rest is read, too, or the server would wait for room in the pipe.
        thread::spawn(move || said.for_each(|line| assert!(!line.contains("s3cret"), "{line}")));
        Self { child, address: place.strip_suffix("/v1").unwrap().to_owned(), model }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        stream
    }

    fn ask(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Answer {
        let mut stream = self.connect();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}");
        let head = format!("{head}Content-Length: {}\r\n\r\n", body.len());
        stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
        Answer::read(stream)
    }

    /// A request for completions of a question.
    fn chat(&self, more: Value) -> Value {
        let mut body = json!({ "model": self.model, "messages": messages(7) });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    }

    fn complete(&self, more: Value) -> Answer {
        self.ask("POST", "/v1/chat/completions", "", self.chat(more).to_string().as_bytes())
    }

    fn end(mut self, signal: &str) -> Option<i32> {
        send(signal, &self.child.id().to_string());
        self.child.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn read(mut stream: TcpStream) -> Self {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let (head, mut rest) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head: {text:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let mut body = String::new();
        if head.contains("Transfer-Encoding: chunked") {
            while let Some((size, after)) = rest.split_once("\r\n") {
                let size = usize::from_str_radix(size, 16).unwrap();
                body += &after[..size];
                rest = after[size..].strip_prefix("\r\n").unwrap();
            }
        } else {
            body += rest;
        }
        Self { status, head: head.into(), body }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("{} {}", self.head, self.body))
    }

    fn events(&self) -> Vec<Value> {
        assert!(self.body.ends_with("data: [DONE]\n\n"), "{}", self.body);
        let data = self.body.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
        data.filter(|data| *data != "[DONE]").map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    /// The status, and the field that an error names.
    fn refusal(&self) -> (u16, Value) {
        let error = &self.json()["error"];
        assert!(error["message"].is_string() && error["type"].is_string(), "{error}");
        (self.status, error["param"].clone())
    }
}

fn messages(i: usize) -> Value {
    json!([{ "role": "system", "content": "one two" }, { "role": "user", "content": format!("{i} + 2?") }])
}

/// Whatever else is sampled: text, log-probabilities and ends.
#[test]
fn clients_at_once_get_what_rollout_samples_with_the_same_seed() {
    let server = Server::start(&["--max-completion-tokens", "24", "--max-sequences", "48"]);
    let prompts: Vec<Value> = (0..64).map(|i| json!({ "prompt": messages(i) })).collect();
    let more = ["--model", &server.model, "-n", "2", "--seed", "5", "--top-p", "0.9", "--temperature", "0.8"];
    let sampled = run(ROLLOUT, &[&more[..], &["--max-completion-tokens", "24"]].concat(), &lines(&prompts)).records();
    thread::scope(|scope| {
        for (i, group) in sampled.chunks(2).enumerate() {
            let server = &server;
            scope.spawn(move || {
                let body = json!({ "messages": messages(i), "n": 2, "seed": 5, "top_p": 0.9, "temperature": 0.8,
                                   "logprobs": true, "stream": i % 2 == 1 });
                let answer = server.complete(body);
                assert_eq!(answer.status, 200, "{}", answer.body);
                let got = if i % 2 == 1 { of_events(&answer.events()) } else { of_whole(&answer.json()) };
                let want: Vec<Completion> = group.iter().map(of_record).collect();
                assert_eq!(got, want, "{i}");
            });
        }
    });
}

/// Text, log-probabilities but that of an end token, and the reason of the end.
type Completion = (String, Vec<f32>, String);

fn of_record(record: &Value) -> Completion {
    let mut logprobs: Vec<f32> = serde_json::from_value(record["logprobs"].clone()).unwrap();
    let reason = record["finish_reason"].as_str().unwrap().to_owned();
    if reason == "stop" {
        logprobs.pop();
    }
    (record["completion"].as_str().unwrap().into(), logprobs, reason)
}

fn logprobs(choice: &Value) -> Vec<f32> {
    let list = choice["logprobs"]["content"].as_array().cloned().unwrap_or_default();
    list.iter().map(|one| serde_json::from_value(one["logprob"].clone()).unwrap()).collect()
}

fn of_whole(answer: &Value) -> Vec<Completion> {
    let choices = answer["choices"].as_array().unwrap();
    let of = |choice: &Value| {
        let text = choice["message"]["content"].as_str().unwrap().to_owned();
        (text, logprobs(choice), choice["finish_reason"].as_str().unwrap().to_owned())
    };
    choices.iter().map(of).collect()
}

fn of_events(events: &[Value]) -> Vec<Completion> {
    let mut all: Vec<Completion> = Vec::new();
    for choice in events.iter().flat_map(|event| event["choices"].as_array().unwrap()) {
        let index = choice["index"].as_u64().unwrap() as usize;
        all.resize(all.len().max(index + 1), Completion::default());
        all[index].0 += choice["delta"]["content"].as_str().unwrap_or_default();
        all[index].1.extend(logprobs(choice));
        all[index].2 += choice["finish_reason"].as_str().unwrap_or_default();
    }
    all
}

#[test]
fn a_stream_ends_with_its_usage_and_a_stop_text_ends_a_completion() {
    let server = Server::start(&["--max-completion-tokens", "40"]);
    let whole = server.complete(json!({ "seed": 1 })).json();
    let again = server.complete(json!({ "seed": 1, "stream": true, "stream_options": { "include_usage": true } }));
    assert!(again.head.contains("Content-Type: text/event-stream"), "{}", again.head);
    let events = again.events();
    assert_eq!(of_events(&events), of_whole(&whole));
    assert_eq!(events.last().unwrap()["usage"], whole["usage"]);
    assert_eq!(events[0]["choices"][0]["delta"], json!({ "role": "assistant", "content": "" }));
    assert!(whole["usage"]["completion_tokens"].as_u64() > Some(5), "{whole}");

    let text = whole["choices"][0]["message"]["content"].as_str().unwrap();
    let middle: Vec<char> = text.chars().skip(text.chars().count() / 2).take(3).collect();
    let stop: String = middle.into_iter().collect();
    let before = &text[..text.find(&stop).unwrap()];
    for stream in [false, true] {
        let cut = server.complete(json!({ "seed": 1, "stop": ["never to be seen", stop], "stream": stream }));
        let got = if stream { of_events(&cut.events()) } else { of_whole(&cut.json()) };
        assert_eq!((got[0].0.as_str(), got[0].2.as_str()), (before, "stop"));
    }
    let short = server.complete(json!({ "seed": 1, "max_tokens": 3 })).json();
    assert_eq!(
        (&short["usage"]["completion_tokens"], &short["choices"][0]["finish_reason"]),
        (&json!(3), &json!("length"))
    );
    assert!(text.starts_with(short["choices"][0]["message"]["content"].as_str().unwrap()));
    // Without a seed, each request gets the next one; --seed is the first.
    let [first, second] = [(); 2].map(|()| server.complete(json!({})).json()["choices"].clone());
    assert_eq!(first, server.complete(json!({ "seed": 0 })).json()["choices"]);
    assert_eq!(second, whole["choices"]);
}

#[test]
fn what_is_wrong_is_refused_by_name_and_the_server_goes_on() {
    let server = Server::start(&["--max-completion-tokens", "8", "--api-key", "s3cret"]);
    let (chat, key) = ("/v1/chat/completions", "Authorization: Bearer s3cret\r\n");
    let post = |body: &[u8]| server.ask("POST", chat, key, body).refusal();
    assert_eq!(post(b"{\"model\":"), (400, Value::Null));
    assert_eq!(post(b"[]"), (400, Value::Null));
    assert_eq!(post(&[0xff; 100]), (400, Value::Null));
    assert_eq!(post(&vec![b' '; (1 << 20) + 1]), (413, Value::Null));
    let cases = [
        (json!({ "messages": [] }), 400, "messages"),
        (json!({ "messages": "hello" }), 400, "messages"),
        (json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }), 400, "messages"),
        (json!({ "messages": [{ "role": "user", "content": "1 2 ".repeat(3000) }] }), 400, "messages"),
        (json!({ "messages": null }), 400, "messages"),
        (json!({ "top_logprobs": 2, "logprobs": true }), 400, "top_logprobs"),
        (json!({ "logit_bias": { "1": 5 } }), 400, "logit_bias"),
        (json!({ "max_tokens": 9 }), 400, "max_tokens"),
        (json!({ "model": "gpt-4o" }), 404, "model"),
    ];
    for (more, status, param) in cases {
        let mut body = server.chat(json!({}));
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        assert_eq!(post(body.to_string().as_bytes()), (status, json!(param)), "{more}");
    }
    for headers in ["", "Authorization: Bearer other\r\n", "Authorization: s3cret\r\n"] {
        let refused = server.ask("GET", "/v1/models", headers, b"");
        assert_eq!((refused.status, &refused.json()["error"]["code"]), (401, &json!("invalid_api_key")));
    }
    assert_eq!(server.ask("GET", "/v1/nothing", key, b"").refusal().0, 404);
    assert_eq!(server.ask("GET", chat, key, b"").refusal().0, 405);
    assert_eq!(server.ask("POST", chat, &format!("{key}Transfer-Encoding: chunked\r\n"), b"").refusal().0, 411);
    assert_eq!(server.ask("POST", chat, &format!("{key}X: {}\r\n", "y".repeat(40_000)), b"").refusal().0, 431);
    let mut garbage = server.connect();
    garbage.write_all(b"\x16\x03\x01 no HTTP\r\n\r\n").unwrap();
    assert_eq!(Answer::read(garbage).status, 400);

    assert_eq!(server.ask("GET", "/health", "", b"").json(), json!({ "status": "ok" }));
    let models = server.ask("GET", "/v1/models", key, b"").json();
    assert_eq!((&models["object"], &models["data"][0]["id"]), (&json!("list"), &json!(server.model)));
    let one = server.ask("GET", &format!("/v1/models/{}", server.model.replace('/', "%2F")), key, b"");
    assert_eq!(one.json(), models["data"][0]);
    assert_eq!(server.ask("POST", chat, key, server.chat(json!({})).to_string().as_bytes()).status, 200);
}

#[test]
fn a_connection_takes_one_request_after_another() {
    let server = Server::start(&["--max-completion-tokens", "4"]);
    let mut stream = server.connect();
    let body = server.chat(json!({ "stream": true })).to_string();
    let post = format!("POST /v1/chat/completions HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    // The second comes before the first is answered, in pieces, and the third asks for leave to send its body.
    stream.write_all(format!("{post}{}", &post[..40]).as_bytes()).unwrap();
    thread::sleep(Duration::from_millis(100));
    stream.write_all(&post.as_bytes()[40..]).unwrap();
    let (head, body) = post.split_once("\r\n\r\n").unwrap();
    stream.write_all(format!("{head}\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n").as_bytes()).unwrap();
    let mut reader = BufReader::new(&stream);
    let mut all = String::new();
    while !all.contains("HTTP/1.1 100 Continue\r\n\r\n") {
        assert!(reader.read_line(&mut all).unwrap() > 0, "{all}");
    }
    (&stream).write_all(body.as_bytes()).unwrap();
    reader.read_to_string(&mut all).unwrap();
    assert_eq!((all.matches("HTTP/1.1 200 OK").count(), all.matches("data: [DONE]").count()), (3, 3), "{all}");
}

#[test]
fn clients_that_leave_or_dawdle_hold_nobody_up() {
    let server = Server::start(&["--max-completion-tokens", "200", "--max-sequences", "4"]);
    let long = |more: Value| {
        let mut body = server.chat(json!({ "n": 64 }));
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body.to_string()
    };
    let began = Instant::now();
    assert_eq!(server.ask("POST", "/v1/chat/completions", "", long(json!({})).as_bytes()).status, 200);
    let whole = began.elapsed();
    // Half of a head, and half of a body.
    let slow: Vec<TcpStream> = (0..20).map(|_| server.connect()).collect();
    for (i, mut stream) in slow.iter().enumerate() {
        let begun =
            if i % 2 == 0 { "POST /v1/chat" } else { "POST /v1/models HTTP/1.1\r\nContent-Length: 100\r\n\r\n{" };
        stream.write_all(begun.as_bytes()).unwrap();
    }
    // Each of these is as much work as the first; some leave before the answer begins, some in the middle of it.
    for i in 0..30 {
        let mut stream = server.connect();
        let body = long(json!({ "stream": i % 2 == 0, "seed": i }));
        let head = format!("POST /v1/chat/completions HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        if i % 4 == 0 {
            stream.read_exact(&mut [0; 200]).unwrap();
        }
    }
    let began = Instant::now();
    assert_eq!(server.complete(json!({ "max_tokens": 2 })).status, 200);
    assert!(began.elapsed() < 10 * whole, "{:?} after 30 requests that took {whole:?} each", began.elapsed());
}

#[test]
fn more_requests_than_can_wait_are_told_to_come_back() {
    let server = Server::start(&["--max-completion-tokens", "200", "--max-sequences", "1"]);
    let body = server.chat(json!({ "n": 128 })).to_string();
    let post = format!("POST /v1/chat/completions HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let mut waiting: Vec<TcpStream> = (0..270).map(|_| server.connect()).collect();
    for stream in &mut waiting {
        stream.write_all(post.as_bytes()).unwrap();
    }
    let mut told = 0;
    let began = Instant::now();
    while told == 0 {
        assert!(began.elapsed() < Duration::from_secs(60), "nobody was sent away");
        thread::sleep(Duration::from_millis(300));
        waiting.retain_mut(|stream| {
            stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
            let mut head = [0; 400];
            let read = stream.read(&mut head).unwrap_or(0);
            let head = String::from_utf8_lossy(&head[..read]);
            let is_told = head.starts_with("HTTP/1.1 503") && head.contains("\r\nRetry-After: 1\r\n");
            assert!(head.is_empty() || is_told || head.starts_with("HTTP/1.1 200"), "{head}");
            told += usize::from(is_told);
            head.is_empty()
        });
    }
    // One is with the engine, at least, and 256 wait.
    assert!(told <= 270 - 257, "{told}");
    drop(waiting);
    assert_eq!(server.complete(json!({ "max_tokens": 2 })).status, 200);
}

#[test]
fn a_signal_lets_answers_end_and_then_the_server() {
    for (signal, code) in [("TERM", 143), ("INT", 130)] {
        let server = Server::start(&["--max-completion-tokens", "200", "--max-sequences", "2"]);
        let mut stream = server.connect();
        let body = server.chat(json!({ "n": 8, "stream": true })).to_string();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        let mut first = [0; 100];
        stream.read_exact(&mut first).unwrap();
        let reader = thread::spawn(move || {
            let mut rest = String::new();
            stream.read_to_string(&mut rest).unwrap();
            rest
        });
        assert_eq!(server.end(signal), Some(code));
        let rest = reader.join().unwrap();
        assert!(rest.contains("\"finish_reason\":\"length\"") && rest.contains("data: [DONE]"), "{rest}");
    }
}

#[test]
fn an_address_that_is_open_to_others_needs_a_key() {
    let model = directory().join("tiny-qwen2").display().to_string();
    for address in ["0.0.0.0:0", "[::]:0"] {
        let refused = run(ROLLOUT, &["--model", &model, "--serve", address], "");
        assert_eq!(refused.code, Some(2));
        let want = format!("rollout: --serve {address} is open to other machines: it needs an --api-key\n");
        assert_eq!(refused.stderr, want);
    }
    let refused = run(ROLLOUT, &["--model", &model, "--serve", "here"], "");
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("it takes HOST:PORT or PORT"), "{}", refused.stderr);
}

/// OpenAI's own client, where there is a Python that has it: `PYTHON`, else python3.
#[test]
fn openais_client_reads_the_answers() {
    let python = std::env::var("PYTHON").unwrap_or("python3".into());
    let has = Command::new(&python).args(["-c", "import openai"]).stderr(Stdio::null()).status();
    if !has.is_ok_and(|status| status.success()) {
        eprintln!("left out: {python} has no package openai");
        return;
    }
    let server = Server::start(&["--max-completion-tokens", "12", "--api-key", "s3cret"]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/openai_client.py");
    let url = format!("http://{}/v1", server.address);
    let done = run(&python, &[script.to_str().unwrap(), &url, &server.model, "s3cret"], "");
    assert_eq!((done.code, done.stdout.as_str()), (Some(0), "ok\n"), "{}", done.stderr);
}
