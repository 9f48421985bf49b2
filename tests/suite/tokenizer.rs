//! The tokenizer and its chat template against transformers, and what of a model directory decides about them.

use std::fs;
use std::path::{Path, PathBuf};

use grpo_pipes::gsm8k::prompt::SYSTEM_PROMPT;
use grpo_pipes::lines::record::Message;
use grpo_pipes::process::message::note;
use grpo_pipes::tokenizer::{Tokenizer, stop_ids};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::fixtures::{directory, ids};

fn message(role: &str, content: &str) -> Message {
    Message::new(role, content)
}

fn shared(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(name);
    if !path.exists() {
        note("tokenizer test skipped", &format!("no {}", path.display()));
    }
    path.exists().then_some(path)
}

fn qwen() -> Option<Tokenizer> {
    shared("qwen2.5-0.5b-instruct").map(|dir| Tokenizer::load(&dir).unwrap())
}

/// Lines of the reference that have a field.
fn reference(field: &str) -> Vec<Value> {
    let text = fs::read_to_string(directory().join("chat_reference.jsonl")).unwrap();
    let all = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    all.filter(|line| line.get(field).is_some()).collect()
}

fn digest(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..16].to_owned()
}

#[test]
fn all_questions_of_gsm8k_become_the_prompts_of_transformers() {
    let (Some(tokenizer), Some(questions)) = (qwen(), shared("gsm8k/test.jsonl")) else { return };
    let questions = fs::read_to_string(questions).unwrap();
    let wanted = reference("text_hash");
    assert_eq!((wanted.len(), questions.lines().count()), (1319, 1319));
    for (line, want) in questions.lines().zip(wanted) {
        let row: Value = serde_json::from_str(line).unwrap();
        let question = row["question"].as_str().unwrap();
        let text = tokenizer.chat(&[message("system", SYSTEM_PROMPT), message("user", question)]).unwrap();
        let ids = tokenizer.encode(&text).unwrap();
        assert_eq!(digest(text.as_bytes()), want["text_hash"], "{text}");
        assert_eq!(ids.len() as u64, want["num_tokens"], "{text}");
        let packed: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        assert_eq!(digest(&packed), want["ids_hash"], "{text}");
    }
}

#[test]
fn chats_with_every_kind_of_text_are_those_of_transformers() {
    let Some(tokenizer) = qwen() else { return };
    let wanted = reference("messages");
    assert_eq!(wanted.len(), 24);
    for want in wanted {
        let messages: Vec<Message> = serde_json::from_value(want["messages"].clone()).unwrap();
        let text = tokenizer.chat(&messages).unwrap();
        assert_eq!(text, want["text"].as_str().unwrap());
        assert_eq!(tokenizer.encode(&text).unwrap(), ids(&want["ids"]), "{text}");
    }
}

#[test]
fn any_ids_decode_to_the_text_of_transformers() {
    let Some(tokenizer) = qwen() else { return };
    let wanted = reference("decoded");
    assert_eq!(wanted.len(), 40);
    for want in wanted {
        assert_eq!(tokenizer.decode(&ids(&want["ids"])).unwrap(), want["decoded"].as_str().unwrap());
    }
}

/// The tiny model's tokenizer, to be changed.
fn tiny() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"] {
        fs::copy(directory().join("tiny-qwen2").join(name), dir.path().join(name)).unwrap();
    }
    dir
}

fn change(dir: &TempDir, file: &str, field: &str, value: Option<Value>) {
    let path = dir.path().join(file);
    let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    match value {
        Some(value) => json[field] = value,
        None => drop(json.as_object_mut().unwrap().remove(field)),
    }
    fs::write(&path, json.to_string()).unwrap();
}

fn chat(dir: &TempDir, messages: &[Message]) -> Result<String, String> {
    Tokenizer::load(dir.path()).unwrap().chat(messages)
}

#[test]
fn a_template_file_wins_over_the_configs_and_a_list_has_its_default() {
    let dir = tiny();
    let hello = [message("user", "Hello")];
    assert!(chat(&dir, &hello).unwrap().ends_with("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"));

    let named = |name: &str, template: &str| json!({"name": name, "template": template});
    let list = json!([named("tool_use", "T"), named("default", "D {{ messages[0].content }} {{ eos_token }}")]);
    change(&dir, "tokenizer_config.json", "chat_template", Some(list));
    assert_eq!(chat(&dir, &hello).unwrap(), "D Hello <|im_end|>");

    let described = json!({"content": "<end>", "lstrip": false});
    change(&dir, "tokenizer_config.json", "eos_token", Some(described));
    assert_eq!(chat(&dir, &hello).unwrap(), "D Hello <end>");

    let blocks =
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content.strip() }}\n  {% endif %}\n{% endfor %}\n";
    fs::write(dir.path().join("chat_template.jinja"), blocks).unwrap();
    assert_eq!(chat(&dir, &[message("system", "x"), message("user", " Hello ")]).unwrap(), "Hello\n");
}

#[test]
fn a_template_that_refuses_says_why() {
    let dir = tiny();
    fs::write(dir.path().join("chat_template.jinja"), "{{ raise_exception('Roles must alternate') }}").unwrap();
    assert_eq!(chat(&dir, &[message("user", "x")]).unwrap_err(), "Roles must alternate");
}

#[test]
fn a_directory_that_cannot_make_prompts_is_refused_with_the_file() {
    let refusal = |dir: &TempDir| {
        let err = Tokenizer::load(dir.path()).err().unwrap();
        assert_eq!(err.exit_code(), 1);
        err.to_string()
    };
    let dir = tiny();
    for none in [None, Some(json!([{"name": "tool_use", "template": "T"}]))] {
        change(&dir, "tokenizer_config.json", "chat_template", none);
        let without = Tokenizer::load(dir.path()).unwrap();
        let messages =
            [without.check_template().unwrap_err().to_string(), without.chat(&[message("user", "Q")]).unwrap_err()];
        assert!(messages.iter().all(|message| message.contains("no chat template; base models")), "{messages:?}");
    }
    change(&dir, "tokenizer_config.json", "chat_template", Some(json!("{% if %}")));
    assert!(refusal(&dir).contains("tokenizer_config.json: chat template: "), "{}", refusal(&dir));
    fs::write(dir.path().join("tokenizer_config.json"), "{").unwrap();
    assert!(refusal(&dir).contains("tokenizer_config.json: EOF"), "{}", refusal(&dir));
    fs::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    assert!(refusal(&dir).contains("tokenizer.json: "));
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    assert!(refusal(&dir).contains("tokenizer.json: "));
}

#[test]
fn padding_and_truncation_that_somebody_saved_are_not_applied() {
    let dir = tiny();
    let text = "How many apples? ".repeat(20);
    let want = Tokenizer::load(dir.path()).unwrap().encode(&text).unwrap();
    let truncation = json!({"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0});
    change(&dir, "tokenizer.json", "truncation", Some(truncation));
    let padding = json!({"strategy": {"Fixed": 999}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 317,
                         "pad_type_id": 0, "pad_token": "<|endoftext|>"});
    change(&dir, "tokenizer.json", "padding", Some(padding));
    assert_eq!(Tokenizer::load(dir.path()).unwrap().encode(&text).unwrap(), want);
}

#[test]
fn completions_end_at_the_ids_of_the_generation_config_else_of_the_config() {
    let dir = tiny();
    assert_eq!(stop_ids(dir.path()).unwrap(), [319, 317]);
    change(&dir, "generation_config.json", "eos_token_id", Some(json!(318)));
    assert_eq!(stop_ids(dir.path()).unwrap(), [318]);
    for none in [Some(json!([])), Some(Value::Null), None] {
        change(&dir, "generation_config.json", "eos_token_id", none);
        assert_eq!(stop_ids(dir.path()).unwrap(), [319]);
    }
    fs::remove_file(dir.path().join("generation_config.json")).unwrap();
    assert_eq!(stop_ids(dir.path()).unwrap(), [319]);
    change(&dir, "config.json", "eos_token_id", None);
    let err = stop_ids(dir.path()).unwrap_err();
    assert!(err.exit_code() == 1 && err.to_string().contains("no eos_token_id"), "{err}");
    change(&dir, "config.json", "eos_token_id", Some(json!("x")));
    assert_eq!(stop_ids(dir.path()).unwrap_err().exit_code(), 1);
}
