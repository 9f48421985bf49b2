//! `rollout --server`: records from our own server, and from others that answer more or less.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};

use crate::process::{Finished, lines, run};
use crate::serve::Server;

const ROLLOUT: &str = env!("CARGO_BIN_EXE_rollout");

fn prompts(count: usize) -> Vec<Value> {
    let one = |i: usize| match i % 3 {
        0 => {
            json!({ "prompt_id": format!("p{i}"), "prompt": [{ "role": "user", "content": format!("{i} + 2?") }], "answer": "7" })
        }
        1 => json!({ "prompt": "What is 1 + 1?", "mine": [i] }),
        _ => {
            json!({ "messages": [{ "role": "user", "content": format!("{i}?") }, { "role": "assistant", "content": "x" }] })
        }
    };
    (0..count).map(one).collect()
}

#[test]
fn records_through_our_own_server_are_those_of_rollout() {
    let server = Server::start(&["--max-completion-tokens", "24", "--api-key", "s3cret"]);
    let url = format!("http://{}/", server.address);
    let input = lines(&prompts(40));
    let draws =
        ["-n", "3", "--seed", "9", "--temperature", "0.8", "--top-k", "12", "--min-p", "0.01", "--top-p", "0.95"];
    let of_model = |more: &[&str]| {
        run(ROLLOUT, &[&["--model", &server.model, "--max-completion-tokens", "24"], &draws[..], more].concat(), &input)
    };
    let of_server =
        |more: &[&str]| run(ROLLOUT, &[&["--server", &url, "--api-key", "s3cret"], &draws[..], more].concat(), &input);
    let (want, got) = (of_model(&[]), of_server(&[]));
    assert_eq!(want.records().len(), 120);
    assert!(want.stdout == got.stdout, "{}", got.stderr);
    assert!(!got.stderr.contains("s3cret"), "{}", got.stderr);
    // In parts, by name, in another number of requests at once, and shorter than the server allows.
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &input).unwrap();
    let part = ["--shard", "2/3", file.path().to_str().unwrap()];
    let [want, got] =
        [of_model(&part), of_server(&[&part[..], &["--model", &server.model, "--max-sequences", "1"]].concat())];
    assert!(want.stdout == got.stdout && !got.stdout.is_empty(), "{}", got.stderr);
    assert!(
        of_server(&["--max-completion-tokens", "5"]).records().iter().all(|record| record["logprobs"]
            .as_array()
            .unwrap()
            .len()
            <= 5)
    );

    let refused = |options: &[&str], what: &str| {
        let done = run(ROLLOUT, options, &input);
        assert!(done.code.is_some_and(|code| code != 0) && done.stdout.is_empty(), "{options:?}");
        assert!(done.stderr.contains(what), "{}", done.stderr);
    };
    refused(&["--server", &url], "the API key is missing: Authorization: Bearer KEY; --api-key gives a key");
    refused(&["--server", &url, "--api-key", "x"], "status 401: the API key is wrong; --api-key gives a key");
    refused(
        &["--server", &url, "--api-key", "s3cret", "--model", "other"],
        "--model must be one of those that it serves: /",
    );
    refused(&["--server", &url, "--api-key", "s3cret", "--max-completion-tokens", "25"], "max_tokens: is more than 24");
    refused(&["--server", "localhost:80"], "an address begins with http:// or https://");
    refused(&["--server", &url, "--raw"], "--raw does not go with --server");
}

/// A server that answers as the test says. It counts the requests for completions and keeps their bodies.
struct Other {
    url: String,
    bodies: Arc<Mutex<Vec<Value>>>,
}

type Answer = (u16, Value);

impl Other {
    fn start(owner: &'static str, complete: impl Fn(usize, &Value) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let bodies = Arc::new(Mutex::new(Vec::new()));
        let (kept, complete, count) = (Arc::clone(&bodies), Arc::new(complete), Arc::new(AtomicUsize::new(0)));
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (kept, complete, count) = (Arc::clone(&kept), Arc::clone(&complete), Arc::clone(&count));
                thread::spawn(move || {
                    answer(stream.unwrap(), |body| {
                        if body.is_null() {
                            return (200, json!({ "data": [{ "id": "m", "owned_by": owner }] }));
                        }
                        kept.lock().unwrap().push(body.clone());
                        complete(count.fetch_add(1, Ordering::Relaxed), body)
                    });
                });
            }
        });
        Self { url, bodies }
    }

    fn sample(&self, more: &[&str], count: usize) -> Finished {
        run(ROLLOUT, &[&["--server", &self.url], more].concat(), &lines(&prompts(count)))
    }
}

fn answer(stream: TcpStream, mut answer: impl FnMut(&Value) -> Answer) {
    let mut reader = BufReader::new(&stream);
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            if let Some((_, value)) = line.to_lowercase().split_once("content-length:") {
                length = value.trim().parse().unwrap();
            }
            if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        let (status, body) = answer(&serde_json::from_slice(&body).unwrap_or_default());
        let body = body.to_string();
        let head = format!("HTTP/1.1 {status} x\r\nRetry-After: 0\r\nContent-Length: {}\r\n\r\n", body.len());
        if (&stream).write_all(format!("{head}{body}").as_bytes()).is_err() {
            return;
        }
    }
}

/// As vLLM does with `return_token_ids`.
fn with_ids(_: usize, body: &Value) -> Answer {
    let logprobs = json!({ "content": [{ "token": "a", "logprob": -0.5 }, { "token": "", "logprob": -1.25 }] });
    let choice = json!({ "message": { "content": "a", "reasoning_content": "why" }, "finish_reason": "stop",
                         "token_ids": [5, 2], "logprobs": if body["logprobs"] == true { logprobs } else { Value::Null } });
    (200, json!({ "choices": [choice], "prompt_token_ids": [1, 2, 3], "usage": { "completion_tokens": 2 } }))
}

#[test]
fn what_another_server_returns_becomes_records_in_the_order_of_the_prompts() {
    // The first answers come last.
    let server = Other::start("vllm", |at, body| {
        thread::sleep(std::time::Duration::from_millis(if at < 4 { 150 } else { 0 }));
        with_ids(at, body)
    });
    let done = server.sample(&["-n", "2", "--seed", "4"], 9);
    let records = done.records();
    assert_eq!((records.len(), done.code), (18, Some(0)), "{}", done.stderr);
    let ids: Vec<&str> = records.iter().step_by(6).map(|record| record["prompt_id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["p0", "p3", "p6"]);
    let first = &records[1];
    assert_eq!(
        (&first["group_id"], &first["group_size"], &first["sample_index"]),
        (&json!("0:p0"), &json!(2), &json!(1))
    );
    assert_eq!((&first["prompt_token_ids"], &first["completion_token_ids"]), (&json!([1, 2, 3]), &json!([5, 2])));
    assert_eq!((&first["logprobs"], &first["completion"]), (&json!([-0.5, -1.25]), &json!("a")));
    assert_eq!((&first["policy_id"], first.get("policy_step"), &first["answer"]), (&json!("m"), None, &json!("7")));
    assert_eq!(first["reasoning_content"], "why");
    assert!(done.stderr.contains("18 sequences, 36 tokens"), "{}", done.stderr);

    let mut bodies = server.bodies.lock().unwrap().clone();
    let mut seeds: Vec<u64> = bodies.iter().map(|body| body["seed"].as_u64().unwrap()).collect();
    seeds.sort_unstable();
    seeds.dedup();
    assert_eq!(seeds.len(), 18, "each completion has a seed of its own");
    let body = bodies.remove(0);
    let sent =
        json!([body["temperature"], body["top_p"], body["top_k"], body["min_p"], body["max_tokens"], body["logprobs"]]);
    assert_eq!(sent, json!([1.0, 1.0, 0, 0.0, 256, true]));
    assert!(body.get("n").is_none() && body.get("prompt_id").is_none());
    // Its log-probabilities are those before a temperature.
    let cooler = server.sample(&["--temperature", "0.5"], 1);
    assert!(
        cooler.records()[0].get("logprobs").is_none() && cooler.stderr.contains("records get no log-probabilities"),
        "{}",
        cooler.stderr
    );
}

#[test]
fn a_server_that_is_busy_is_asked_again_and_one_that_refuses_is_not() {
    let busy = Other::start("vllm", |at, body| if at < 5 { (429, json!({})) } else { with_ids(at, body) });
    assert_eq!(busy.sample(&["--max-sequences", "1"], 2).records().len(), 2);
    let broken = Other::start("vllm", |at, body| {
        if at < 2 { with_ids(at, body) } else { (503, json!({ "error": { "message": "no\nroom" } })) }
    });
    let done = broken.sample(&["--max-sequences", "1"], 6);
    assert_eq!((done.records().len(), done.code), (2, Some(1)), "{}", done.stderr);
    assert!(
        done.stderr.contains("/v1: prompt ") && done.stderr.contains("status 503: no\\nroom, also after 8 more tries"),
        "{}",
        done.stderr
    );
    assert_eq!(broken.bodies.lock().unwrap().len(), 2 + 9);
    let refuses = Other::start("vllm", |_, _| (400, json!({ "detail": "the prompt is too long" })));
    let done = refuses.sample(&["--max-sequences", "1"], 3);
    assert!(done.stderr.contains("prompt p0: status 400: the prompt is too long"), "{}", done.stderr);
    assert_eq!(refuses.bodies.lock().unwrap().len(), 1);
}

#[test]
fn records_without_token_ids_are_no_records_to_train_on_and_that_is_said() {
    let bare = Other::start("me", |_, _| {
        (200, json!({ "choices": [{ "message": { "content": "8" }, "finish_reason": "length" }] }))
    });
    let done = bare.sample(&[], 2);
    assert!(done.stderr.contains("this server returns no token ids"), "{}", done.stderr);
    let record = &done.records()[0];
    assert_eq!((&record["completion"], &record["finish_reason"]), (&json!("8"), &json!("length")));
    let scored = run(env!("CARGO_BIN_EXE_score"), &["--reward", "int=1"], &done.stdout);
    assert!(scored.records()[0]["reward"].is_number(), "{}", scored.stderr);
    let model = crate::fixtures::directory().join("tiny-qwen2").display().to_string();
    let args = ["--policy", &model, "--dry-run", "--max-staleness", "any", "--device", "cpu"];
    let refused = run(env!("CARGO_BIN_EXE_grpo-step"), &args, &scored.stdout);
    assert!(refused.stderr.contains("no field \"prompt_token_ids\""), "{}", refused.stderr);
    // llama.cpp's ids stand with the log-probabilities.
    let llama = Other::start("llamacpp", |_, _| {
        let content = json!([{ "id": 7, "token": "8", "logprob": -0.25 }, { "id": 0, "token": "", "logprob": -2.0 }]);
        (
            200,
            json!({ "choices": [{ "message": { "content": "8" }, "finish_reason": "stop", "logprobs": { "content": content } }] }),
        )
    });
    let record = llama.sample(&[], 1).records().remove(0);
    assert_eq!((&record["completion_token_ids"], &record["logprobs"]), (&json!([7, 0]), &json!([-0.25, -2.0])));
}
