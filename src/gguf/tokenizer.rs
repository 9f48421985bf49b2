//! The tokenizer of a GGUF file as the `tokenizer.json` and `tokenizer_config.json` that it would have, and back.

use candle_core::quantized::gguf_file::Value;
use serde_json::{Map, Value as Json, json};

use super::Gguf;
use crate::error::Result;

/// Kinds of tokens, as llama.cpp numbers them.
mod kind {
    pub const NORMAL: u64 = 1;
    pub const UNKNOWN: u64 = 2;
    pub const CONTROL: u64 = 3;
    pub const USER_DEFINED: u64 = 4;
    pub const UNUSED: u64 = 5;
    pub const BYTE: u64 = 6;
}

/// Tokens that end a completion whatever the header calls the end, as in llama.cpp.
const ENDS: [&str; 9] = [
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|eot|>",
    "<EOS>",
];

/// How a text is cut into words before byte-level BPE, and what else goes with that.
struct Splitter {
    /// llama.cpp's name, `tokenizer.ggml.pre`.
    name: &'static str,
    /// The pattern of a word; `None` is that of GPT-2.
    pattern: Option<&'static str>,
    /// Whether each digit is a word.
    digits_alone: bool,
    /// Whether a word that is a token needs no merges.
    ignore_merges: bool,
    /// Whether the text is brought into Unicode's form NFC first.
    nfc: bool,
}

const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const SPLITTERS: [Splitter; 5] = [
    Splitter { name: "qwen2", pattern: Some(QWEN2), digits_alone: false, ignore_merges: false, nfc: true },
    Splitter { name: "llama-bpe", pattern: Some(LLAMA3), digits_alone: false, ignore_merges: true, nfc: false },
    Splitter { name: "tekken", pattern: Some(TEKKEN), digits_alone: false, ignore_merges: true, nfc: false },
    Splitter { name: "smollm", pattern: None, digits_alone: true, ignore_merges: false, nfc: false },
    Splitter { name: "gpt-2", pattern: None, digits_alone: false, ignore_merges: false, nfc: false },
];

impl Splitter {
    /// The pre-tokenizer of a `tokenizer.json`.
    fn json(&self) -> Json {
        let digits = json!({"type": "Digits", "individual_digits": true});
        let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": use_regex});
        let parts = match self.pattern {
            Some(pattern) => {
                let pattern = json!({"Regex": pattern});
                vec![
                    json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false}),
                    bytes(false),
                ]
            }
            None if self.digits_alone => vec![digits, bytes(true)],
            None => vec![bytes(true)],
        };
        json!({"type": "Sequence", "pretokenizers": parts})
    }

    /// The splitter of a `tokenizer.json`.
    fn of(tokenizer: &Json) -> Option<&'static Self> {
        let pre = &tokenizer["pre_tokenizer"];
        let alone = [pre.clone()];
        let parts = pre["pretokenizers"].as_array().map_or(&alone[..], Vec::as_slice);
        let pattern = parts.iter().find_map(|part| part["pattern"]["Regex"].as_str());
        let digits_alone = parts.iter().any(|part| part["type"] == "Digits" && part["individual_digits"] == true);
        let known = ["Split", "Digits", "ByteLevel"];
        let all_known = parts.iter().all(|part| known.iter().any(|kind| part["type"] == *kind));
        SPLITTERS.iter().find(|one| all_known && one.pattern == pattern && one.digits_alone == digits_alone)
    }
}

impl Gguf {
    /// What its `tokenizer.json` and its `tokenizer_config.json` would hold.
    ///
    /// # Errors
    /// [`crate::Error::Model`] naming what is missing in the header, or not supported.
    pub fn tokenizer(&self) -> Result<[Json; 2]> {
        let tokens = self.strings("tokenizer.ggml.tokens")?;
        let kinds: Vec<u64> = match self.list("tokenizer.ggml.token_type") {
            Some(list) => list.iter().map(|kind| super::integer(kind).unwrap_or(kind::NORMAL)).collect(),
            None => vec![kind::NORMAL; tokens.len()],
        };
        if kinds.len() != tokens.len() {
            return Err(self.error("tokenizer.ggml.token_type and tokenizer.ggml.tokens differ in length"));
        }
        let tokenizer = match self.text("tokenizer.ggml.model") {
            Some("gpt2") => self.byte_level(&tokens, &kinds)?,
            Some("llama") => self.sentence_piece(&tokens, &kinds)?,
            other => {
                let other = other.unwrap_or("none");
                return Err(self.error(format!(
                    "tokenizer.ggml.model \"{other}\" is not supported; put a tokenizer.json beside the file"
                )));
            }
        };
        Ok([self.with_special_tokens(tokenizer, &tokens, &kinds), self.tokenizer_config(&tokens)])
    }

    /// The ids that end a completion.
    ///
    /// # Errors
    /// [`crate::Error::Model`] when there are none.
    pub fn stop_ids(&self) -> Result<Vec<u32>> {
        let tokens = self.strings("tokenizer.ggml.tokens")?;
        let named = ["eos", "eot", "eom"].map(|end| self.integer(&format!("tokenizer.ggml.{end}_token_id")));
        let mut ids: Vec<u32> = named.into_iter().flatten().filter_map(|id| u32::try_from(id).ok()).collect();
        ids.extend((0..tokens.len() as u32).filter(|id| ENDS.contains(&tokens[*id as usize].as_str())));
        ids.sort_unstable();
        ids.dedup();
        match ids.is_empty() {
            true => Err(self.error("the header names no end token; completions would never end")),
            false => Ok(ids),
        }
    }

    fn strings(&self, key: &str) -> Result<Vec<String>> {
        let list = self.list(key).ok_or_else(|| self.error(format!("the header has no list {key}")))?;
        list.iter().map(|text| text.to_string().cloned().map_err(|err| self.error(format!("{key}: {err}")))).collect()
    }

    fn byte_level(&self, tokens: &[String], kinds: &[u64]) -> Result<Json> {
        let name = self.text("tokenizer.ggml.pre").unwrap_or("gpt-2");
        let name = if name == "default" { "gpt-2" } else { name };
        let splitter = SPLITTERS.iter().find(|splitter| splitter.name == name);
        let splitter = splitter.ok_or_else(|| {
            self.error(format!("tokenizer.ggml.pre \"{name}\" is not known; put a tokenizer.json beside the file"))
        })?;
        Ok(json!({
            "version": "1.0",
            "normalizer": splitter.nfc.then(|| json!({"type": "NFC"})),
            "pre_tokenizer": splitter.json(),
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "ignore_merges": splitter.ignore_merges, "vocab": vocabulary(tokens, kinds),
                "merges": self.strings("tokenizer.ggml.merges")?},
        }))
    }

    /// SentencePiece's BPE merges two pieces if the result is a piece, the one with the highest score first.
    fn sentence_piece(&self, tokens: &[String], kinds: &[u64]) -> Result<Json> {
        let scores = self.list("tokenizer.ggml.scores").unwrap_or_default();
        let score = |id: usize| scores.get(id).and_then(|score| score.to_f32().ok()).unwrap_or_default();
        let ids: Map<String, Json> = vocabulary(tokens, kinds);
        let mut merges: Vec<(f32, usize, [&str; 2])> = Vec::new();
        for (id, token) in tokens.iter().enumerate().filter(|(id, _)| kinds[*id] == kind::NORMAL) {
            let cuts = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
            let both = cuts.filter(|(left, right)| ids.contains_key(*left) && ids.contains_key(*right));
            merges.extend(both.map(|(left, right)| (score(id), id, [left, right])));
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let merges: Vec<[&str; 2]> = merges.into_iter().map(|(_, _, pair)| pair).collect();
        let space = "\u{2581}";
        let prefix = self.flag("tokenizer.ggml.add_space_prefix").unwrap_or(true);
        let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": space})];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": space}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": space}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let unknown = tokens.iter().zip(kinds).find(|(_, kind)| **kind == kind::UNKNOWN).map(|(token, _)| token);
        Ok(json!({
            "version": "1.0",
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {"type": "BPE", "unk_token": unknown, "fuse_unk": true, "byte_fallback": true, "vocab": ids, "merges": merges},
        }))
    }

    /// Adds the special tokens, and BOS in front of a text where the header asks for it.
    fn with_special_tokens(&self, mut tokenizer: Json, tokens: &[String], kinds: &[u64]) -> Json {
        let special = |kind: u64| kind == kind::CONTROL || kind == kind::UNKNOWN;
        let added = tokens
            .iter()
            .zip(kinds)
            .enumerate()
            .filter(|(_, (_, kind))| special(**kind) || **kind == kind::USER_DEFINED);
        let added = added.map(|(id, (content, kind))| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": special(*kind)})
        });
        tokenizer["added_tokens"] = added.collect();
        let is_spm = self.text("tokenizer.ggml.model") == Some("llama");
        if let (true, Some((id, bos))) =
            (self.flag("tokenizer.ggml.add_bos_token").unwrap_or(is_spm), self.token("bos", tokens))
        {
            let first = json!({"SpecialToken": {"id": bos, "type_id": 0}});
            tokenizer["post_processor"] = json!({"type": "TemplateProcessing",
                "single": [first.clone(), {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}}});
        }
        tokenizer
    }

    /// A special token by its role, with its id.
    fn token<'a>(&self, role: &str, tokens: &'a [String]) -> Option<(u64, &'a str)> {
        let id = self.integer(&format!("tokenizer.ggml.{role}_token_id"))?;
        Some((id, tokens.get(usize::try_from(id).ok()?)?))
    }

    fn tokenizer_config(&self, tokens: &[String]) -> Json {
        let mut config = Map::new();
        for (role, name) in
            [("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token"), ("unknown", "unk_token")]
        {
            if let Some((_, token)) = self.token(role, tokens) {
                config.insert(name.into(), token.into());
            }
        }
        if let Some(template) = self.text("tokenizer.chat_template") {
            config.insert("chat_template".into(), template.into());
        }
        Json::Object(config)
    }
}

/// The ids of tokens, without those that only fill the embedding.
fn vocabulary(tokens: &[String], kinds: &[u64]) -> Map<String, Json> {
    let used = tokens.iter().zip(kinds).enumerate().filter(|(_, (_, kind))| **kind != kind::UNUSED);
    used.map(|(id, (token, _))| (token.clone(), id.into())).collect()
}

/// The header's entries of a tokenizer, from its `tokenizer.json` and `tokenizer_config.json`, for a vocabulary of `size` tokens. A
/// completion ends with `end`, or with another of `stops`.
///
/// # Errors
/// Says what of it GGUF has no entry for.
pub(super) fn entries(
    [tokenizer, config]: [&Json; 2],
    size: usize,
    (end, stops): (u32, &[u32]),
) -> std::result::Result<Vec<(String, Value)>, String> {
    let model = &tokenizer["model"];
    if model["type"] != "BPE" {
        return Err(format!("a tokenizer of type {} has no name in GGUF", model["type"]));
    }
    if let Some(id) = stops.iter().find(|id| **id as usize >= size) {
        return Err(format!("the end token {id} is not in the vocabulary of {size}"));
    }
    let is_spm = model["byte_fallback"] == true;
    let (tokens, kinds) = tokens(tokenizer, size, is_spm);
    let id_of = |role: &str| {
        let token = &config[role];
        let content = token.as_str().or_else(|| token["content"].as_str())?;
        tokens.iter().position(|other| other == content)
    };
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let text = |name: &str, text: &str| (key(name), Value::String(text.into()));
    let strings = |list: Vec<String>| Value::Array(list.into_iter().map(Value::String).collect());
    let mut entries = vec![text("model", if is_spm { "llama" } else { "gpt2" })];
    if is_spm {
        let scores = scores(tokenizer, &tokens);
        entries.push((key("scores"), Value::Array(scores.into_iter().map(Value::F32).collect())));
        let prepends = tokenizer["normalizer"].to_string().contains("\"Prepend\"");
        entries.push((key("add_space_prefix"), Value::Bool(prepends)));
    } else {
        let splitter = Splitter::of(tokenizer).ok_or("the pattern that splits its words has no name in GGUF")?;
        if splitter.nfc != (tokenizer["normalizer"]["type"] == "NFC") {
            return Err(format!("its normalizer is not the one of GGUF's \"{}\"", splitter.name));
        }
        entries.push(text("pre", splitter.name));
        entries.push((key("merges"), strings(merges(tokenizer).into_iter().map(|pair| pair.join(" ")).collect())));
    }
    entries.push((key("token_type"), Value::Array(kinds.iter().map(|kind| Value::I32(*kind as i32)).collect())));
    let adds_bos = tokenizer["post_processor"]["single"][0].get("SpecialToken").is_some();
    entries.push((key("add_bos_token"), Value::Bool(adds_bos)));
    let other_end = stops.iter().find(|id| **id != end && !ENDS.contains(&tokens[**id as usize].as_str()));
    let ids = [
        ("bos", id_of("bos_token")),
        ("eos", Some(end as usize)),
        ("eot", other_end.map(|id| *id as usize)),
        ("padding", id_of("pad_token")),
        ("unknown", id_of("unk_token")),
    ];
    entries.extend(
        ids.into_iter().filter_map(|(role, id)| Some((key(&format!("{role}_token_id")), Value::U32(id? as u32)))),
    );
    entries.push((key("tokens"), strings(tokens)));
    if let Some(template) = config["chat_template"].as_str() {
        entries.push(("tokenizer.chat_template".into(), Value::String(template.into())));
    }
    Ok(entries)
}

/// The tokens in the order of their ids, and the kind of each.
fn tokens(tokenizer: &Json, size: usize, is_spm: bool) -> (Vec<String>, Vec<u64>) {
    let mut tokens: Vec<String> = (0..size).map(|id| format!("[PAD{id}]")).collect();
    let mut kinds = vec![kind::UNUSED; size];
    let mut set = |id: &Json, token: &str, kind: u64| {
        if let Some(id) = id.as_u64().map(|id| id as usize).filter(|id| *id < size) {
            (tokens[id], kinds[id]) = (token.to_owned(), kind);
        }
    };
    for (token, id) in tokenizer["model"]["vocab"].as_object().into_iter().flatten() {
        let is_byte = is_spm && token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
        set(id, token, if is_byte { kind::BYTE } else { kind::NORMAL });
    }
    for added in tokenizer["added_tokens"].as_array().into_iter().flatten() {
        let content = added["content"].as_str().unwrap_or_default();
        let kind = match (added["special"] == true, tokenizer["model"]["unk_token"] == content) {
            (_, true) => kind::UNKNOWN,
            (true, _) => kind::CONTROL,
            _ => kind::USER_DEFINED,
        };
        set(&added["id"], content, kind);
    }
    (tokens, kinds)
}

/// The merges in order, which a `tokenizer.json` has as pairs or as texts.
fn merges(tokenizer: &Json) -> Vec<[&str; 2]> {
    fn pair(merge: &Json) -> Option<[&str; 2]> {
        match merge {
            Json::String(text) => text.split_once(' ').map(|(left, right)| [left, right]),
            _ => Some([merge[0].as_str()?, merge[1].as_str()?]),
        }
    }
    tokenizer["model"]["merges"].as_array().into_iter().flatten().filter_map(pair).collect()
}

/// A SentencePiece score for each token: the earlier its first merge, the higher.
fn scores(tokenizer: &Json, tokens: &[String]) -> Vec<f32> {
    let mut ranks = std::collections::HashMap::new();
    for (rank, pair) in merges(tokenizer).iter().enumerate() {
        ranks.entry(pair.concat()).or_insert(rank);
    }
    tokens.iter().map(|token| ranks.get(token).map_or(0.0, |rank| -(*rank as f32) - 1.0)).collect()
}
