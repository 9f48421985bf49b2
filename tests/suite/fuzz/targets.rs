//! Who reads what comes from outside, each given an input that is damaged.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[cfg(feature = "candle")]
use grpo_pipes::checkpoint::export::{self, Card};
use grpo_pipes::checkpoint::{self, State};
use grpo_pipes::directory::{ADAPTER, ADAPTER_WEIGHTS};
use grpo_pipes::error::Result;
use grpo_pipes::eval::{Fold, Judge};
#[cfg(feature = "candle")]
use grpo_pipes::gguf::Gguf;
use grpo_pipes::grpo::advantage::{ScaleRewards, advantages};
use grpo_pipes::grpo::groups::{self, Group, Groups};
use grpo_pipes::grpo::health::Health;
use grpo_pipes::gsm8k::columns::AskedColumns;
use grpo_pipes::gsm8k::source;
use grpo_pipes::lines::jsonl::Input;
use grpo_pipes::lines::record::Message;
use grpo_pipes::model::{AdapterConfig, Config, Model, TARGETS as TARGETS_OF_ADAPTERS};
use grpo_pipes::numbers::dtype::Dtype;
#[cfg(feature = "candle")]
use grpo_pipes::numbers::quantization::Quantization;
use grpo_pipes::optim::Moments;
use grpo_pipes::reward::lm_eval::LmEvalTask;
use grpo_pipes::reward::number::Number;
use grpo_pipes::reward::{RewardWeights, Scorer, Semantics};
use grpo_pipes::rollout::{LineFormat, LongPrompt, ModelLimits, PromptOptions, RequestBuilder};
#[cfg(feature = "candle")]
use grpo_pipes::tokenizer::TemplateArgs;
use grpo_pipes::tokenizer::{Tokenizer, stop_ids};
use grpo_pipes::train::supervised;

use super::mutate::{Dice, JSON, mutate};
use crate::fixtures::directory;

/// A reader, and how many of 10,000 inputs are for it: the cheaper, the more.
pub struct Target {
    pub name: &'static str,
    pub share: u64,
    pub take: fn(&mut Place, &mut Dice),
}

pub const TARGETS: [Target; 8] = [
    Target { name: "texts", share: 6_000, take: texts },
    Target { name: "records", share: 3_000, take: records },
    Target { name: "configs", share: 400, take: configs },
    Target { name: "weights", share: 300, take: weights },
    Target { name: "adapters", share: 200, take: adapters },
    Target { name: "states", share: 200, take: states },
    Target { name: "gguf", share: 50, take: gguf },
    Target { name: "tokenizers", share: 50, take: tokenizers },
];

/// A folder of one thread, with good inputs in memory.
pub struct Place {
    dir: tempfile::TempDir,
    config: Config,
    tokenizer: Arc<Tokenizer>,
    texts: Vec<Vec<u8>>,
    records: Vec<Vec<u8>>,
    /// Files of a model that takes a few kilobytes.
    files: Vec<(&'static str, Vec<u8>)>,
    /// Files of an adapter of it, which lies in a folder beside them.
    adapter: [Vec<u8>; 2],
    /// The same as a GGUF file.
    #[cfg(feature = "candle")]
    gguf: Vec<u8>,
}

const FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    checkpoint::WEIGHTS,
    checkpoint::OPTIMIZER,
    checkpoint::STATE,
];

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let texts = [
            "<think>x</think> The answer is $\\frac{1}{2}$ or \\boxed{1.5\\times 10^{3}\\text{ km/h}}.\n#### 1 1/2",
            "<reasoning>\nOne.\nTwo.\n</reasoning>\n<answer>\n72\n</answer>\n",
            "<reasoning>a</reasoning> <answer>-$1,234.50%</answer> so $12,345.",
            "\u{1c}\u{3000}\u{661} <answer>\u{2212}5</answer></reasoning>",
        ];
        let files = small_model(dir.path());
        Self {
            config: Config::load(dir.path()).unwrap(),
            tokenizer: Arc::new(Tokenizer::load(dir.path()).unwrap()),
            texts: texts.map(|text| text.as_bytes().to_vec()).to_vec(),
            records: seeds(),
            files,
            adapter: small_adapter(dir.path()),
            #[cfg(feature = "candle")]
            gguf: as_gguf(dir.path()),
            dir,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn good(&self, name: &str) -> &Vec<u8> {
        &self.files.iter().find(|(other, _)| *other == name).unwrap().1
    }

    /// Writes a file damaged, lets somebody look, and writes it whole again.
    fn with(&self, name: &str, bytes: &[u8], look: impl FnOnce(&Path)) {
        fs::write(self.path(name), bytes).unwrap();
        look(self.dir.path());
        fs::write(self.path(name), self.good(name)).unwrap();
    }

    fn damaged(&self, name: &str, dice: &mut Dice) -> Vec<u8> {
        mutate(dice, std::slice::from_ref(self.good(name)), &JSON)
    }
}

/// A checkpoint of the smallest model there is; its files as they are.
fn small_model(dir: &Path) -> Vec<(&'static str, Vec<u8>)> {
    checkpoint::copy_companions(&directory().join("tiny-qwen2"), dir, "float32").unwrap();
    let mut config = Config::load(dir).unwrap();
    (config.hidden_size, config.intermediate_size, config.num_hidden_layers) = (8, 8, 1);
    (config.num_attention_heads, config.num_key_value_heads, config.max_position_embeddings) = (2, 1, 64);
    fs::write(dir.join("config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
    let model = Model::random(config.clone(), 1);
    model.save(&dir.join(checkpoint::WEIGHTS), Dtype::F32).unwrap();
    let parameters = config.trainable().named();
    Moments::zeros(&parameters, Dtype::F32).save(&dir.join(checkpoint::OPTIMIZER), &parameters).unwrap();
    State { step: 3, policy_id: "p".into(), ..State::default() }.seal(dir).unwrap();
    FILES.map(|name| (name, fs::read(dir.join(name)).unwrap())).to_vec()
}

const ADAPTER_FILES: [&str; 2] = [ADAPTER, ADAPTER_WEIGHTS];

/// An adapter of the model in `dir`; its files as they are.
fn small_adapter(dir: &Path) -> [Vec<u8>; 2] {
    let (out, targets) = (dir.join("adapter"), TARGETS_OF_ADAPTERS.to_vec());
    fs::create_dir(&out).unwrap();
    let config = AdapterConfig { rank: 2, alpha: 4.0, is_rank_stabilized: false, targets };
    Model::load(dir).unwrap().with_adapter(config, 1).save_trained(&out).unwrap();
    ADAPTER_FILES.map(|name| fs::read(out.join(name)).unwrap())
}

#[cfg(feature = "candle")]
fn as_gguf(dir: &Path) -> Vec<u8> {
    let (out, card) = (dir.join("gguf"), Card::of(dir, None, None).unwrap());
    export::gguf::directory(dir, &out, Quantization::F32, &card).unwrap();
    let name = dir.file_name().unwrap().to_str().unwrap();
    let bytes = fs::read(out.join(format!("{name}-f32.gguf"))).unwrap();
    fs::remove_dir_all(out).unwrap();
    bytes
}

/// Lines of all kinds that some command reads.
fn seeds() -> Vec<Vec<u8>> {
    let rollout = |group: &str, sample: u32| {
        format!(
            r#"{{"prompt_id":"{group}","prompt":[{{"role":"user","content":"1 + 2?"}}],"answer":"3","group_id":"0:{group}","group_size":2,"sample_index":{sample},"policy_id":"p","policy_step":3,"seed":1,"temperature":1.0,"prompt_token_ids":[1,2],"completion_token_ids":[5,319],"logprobs":[-1.5,-0.25],"finish_reason":"stop","completion":"<answer>3</answer>","rewards":{{"correctness":2.0,"strict_format":null}},"reward":2.5,"extracted":"3"}}"#
        ) + "\n"
    };
    let whole = rollout("a", 0) + &rollout("b", 1) + &rollout("a", 1) + &rollout("b", 0);
    let metrics = r#"{"step":1,"policy_step":1,"loss":0.5,"entropy":0.25,"frac_reward_zero_std":1.0,"rewards/xmlcount/mean":0.25,"rewards/correctness/mean":1.5}"#;
    let row = r##"{"question":"How many?","answer":"One and two.\n#### 3","more":[1,{"a":"\u00fc"}]}"##;
    [whole, metrics.repeat(2).replace("}{", "}\n{"), format!("{row}\n{row}")].map(String::into_bytes).to_vec()
}

/// An error is one that says what is wrong with the input, or that the input cannot be read.
fn refused<T>(result: Result<T>) -> Option<T> {
    result.map_err(|err| assert!([1, 3].contains(&err.exit_code()), "{err:?}")).ok()
}

fn texts(place: &mut Place, dice: &mut Dice) {
    let words = [
        "<reasoning>",
        "</reasoning>\n",
        "<answer>\n",
        "</answer>",
        "\n",
        " ",
        "-",
        "$",
        ",",
        ".",
        "1,000",
        "\u{2028}",
        "\u{1d7d8}",
        "\\boxed{",
        "\\frac",
        "#### ",
        "answer is ",
        "e999999999",
        "/",
    ];
    let text = String::from_utf8_lossy(&mutate(dice, &place.texts, &words)).into_owned();
    let answer = String::from_utf8_lossy(&mutate(dice, &[b"1,000".to_vec(), b"-72".to_vec()], &words)).into_owned();
    for semantics in [Semantics::Fixed, Semantics::Seed] {
        let score = Scorer { semantics, weights: RewardWeights::default(), lengths: None, command: None }.score(
            &text,
            Some(&answer),
            None,
        );
        assert!(score.reward.is_some_and(|reward| reward.is_finite() && reward <= 4.0), "{score:?}");
        assert!(score.extracted.is_none_or(|extracted| text.contains(extracted)));
    }
    let math = Scorer { semantics: Semantics::Fixed, weights: "math=1".parse().unwrap(), lengths: None, command: None };
    let score = math.score(&text, Some(&answer), None);
    assert!(score.reward.is_some_and(|reward| reward == 0.0 || reward == 1.0), "{score:?}");
    assert!(score.extracted.is_none_or(|extracted| text.contains(extracted)));
    let extracted = score.extracted.map(str::to_owned);
    if let Some(extracted) =
        extracted.filter(|extracted| !extracted.contains(['<', '\\', '#']) && !extracted.contains("nswer"))
    {
        let itself = format!("<answer>{extracted}</answer>");
        assert_eq!(math.score(&itself, Some(&extracted), None).reward, Some(1.0), "{extracted:?} is itself");
    }
    assert!(Number::last_in(&text).is_none() || text.contains(|c: char| c.is_ascii_digit()));
}

/// A file of lines through one of those who read lines.
fn records(place: &mut Place, dice: &mut Dice) {
    let path = place.path("records.jsonl");
    fs::write(&path, mutate(dice, &place.records, &JSON)).unwrap();
    let lines = || Input::open(&path).unwrap().map_while(refused);
    match dice.below(7) {
        0 | 1 => {
            let groups: Vec<Group> =
                Groups::new(Input::open(&path).unwrap(), (&place.config).into()).map_while(refused).collect();
            let rewards: Vec<Vec<_>> =
                groups.iter().map(|group| group.completions.iter().map(|one| one.reward).collect()).collect();
            assert_eq!(advantages(&rewards, ScaleRewards::Group, false).groups.len(), groups.len());
            refused(groups::temperature(&groups));
            assert!(groups::parts(&groups).len() < 1000);
        }
        2 => {
            let scorer =
                Scorer { semantics: Semantics::Fixed, weights: RewardWeights::default(), lengths: None, command: None };
            for line in lines() {
                let mut json = Vec::new();
                if refused(scorer.score_line(&line, &mut json)).is_some() {
                    serde_json::from_slice::<serde::de::IgnoredAny>(&json).unwrap();
                }
            }
        }
        3 => {
            for judge in [Judge::Rewards, Judge::LmEval(LmEvalTask::Gsm8k), Judge::LmEval(LmEvalTask::Gsm8kCot)] {
                let mut fold = Fold::new(judge);
                lines().for_each(|line| _ = refused(fold.add(&line)));
                refused(fold.finish().map(|summary| summary.to_json() + &summary.to_string()));
            }
        }
        4 => {
            let encode = |_: &[Message], text: &str| Ok((vec![1], text.bytes().map(u32::from).collect()));
            lines().for_each(|line| drop(refused(supervised::example(&line, (&place.config).into(), &encode))));
        }
        5 => {
            let prompts = PromptOptions { format: LineFormat::Records, raw: false, on_long: LongPrompt::TruncateLeft };
            let limits = ModelLimits { prompt_tokens: 32, positions: 32, vocabulary: 320 };
            let mut requests = RequestBuilder::new(prompts, String::new(), limits, Arc::clone(&place.tokenizer), None);
            lines().for_each(|line| drop(refused(requests.build(line))));
        }
        _ => {
            refused(Input::open(&path).and_then(|lines| Health::of_run(0.05, lines)));
            source::rows(&path, &AskedColumns::default()).unwrap().for_each(|row| drop(refused(row)));
        }
    }
}

fn configs(place: &mut Place, dice: &mut Dice) {
    let name = *dice.pick(&["config.json", "config.json", "generation_config.json"]);
    let bytes = place.damaged(name, dice);
    place.with(name, &bytes, |dir| {
        refused(stop_ids(dir));
        refused(Config::load(dir));
        refused(Model::load(dir));
        refused(checkpoint::copy_companions(dir, tempfile::tempdir().unwrap().path(), "float32"));
    });
}

/// Damage anywhere, or in the header alone, whose length is then right.
fn weights(place: &mut Place, dice: &mut Dice) {
    let name = *dice.pick(&[checkpoint::WEIGHTS, checkpoint::OPTIMIZER]);
    let good = place.good(name).clone();
    let length = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let bytes = if dice.below(4) == 0 {
        mutate(dice, &[good], &JSON)
    } else {
        let words =
            ["F32", "BF16", "I64", "F4", "F8_E4M3", "\"shape\":[4611686018427387904,4]", "[0,0]", "\"x\":", "}", "{"];
        let header = mutate(dice, &[good[8..8 + length].to_vec()], &words);
        [&(header.len() as u64).to_le_bytes()[..], &header, &good[8 + length..]].concat()
    };
    let parameters = place.config.trainable().named();
    place.with(name, &bytes, |dir| {
        if name == checkpoint::OPTIMIZER {
            refused(Moments::load(&dir.join(name), &parameters, Dtype::F32));
        } else if let Some(model) = refused(Model::load(dir)) {
            assert!(model.parameters().iter().map(|numbers| numbers.len()).sum::<usize>() < 10_000);
            refused(Model::load_as(dir, Dtype::Bf16));
        }
    });
}

/// An adapter with a damaged config or damaged tensors, beside a whole base model.
fn adapters(place: &mut Place, dice: &mut Dice) {
    let which = dice.below(2);
    let words =
        ["1000000000000000000", "\"..\"", "\"r\":", "lora_B", "\"shape\":[4611686018427387904,2]", "true", "F64"];
    let path = place.path("adapter").join(ADAPTER_FILES[which]);
    fs::write(&path, mutate(dice, std::slice::from_ref(&place.adapter[which]), &words)).unwrap();
    if let Some(model) = refused(Model::load(path.parent().unwrap())) {
        assert!(model.trained().len() <= 2 * TARGETS_OF_ADAPTERS.len());
    }
    fs::write(&path, &place.adapter[which]).unwrap();
}

/// A file that `export-hf --gguf` wrote.
#[cfg(feature = "candle")]
fn gguf(place: &mut Place, dice: &mut Dice) {
    let words = ["general.alignment", "qwen2.block_count", "token_embd.weight", "output.weight", "rope_freqs.weight"];
    let bytes = mutate(dice, std::slice::from_ref(&place.gguf), &words);
    let path = place.path("x.gguf");
    fs::write(&path, bytes).unwrap();
    if let Some(file) = refused(Gguf::open(&path)) {
        refused(file.load(Dtype::F32));
        refused(file.stop_ids());
        if let Some(parts) = refused(file.tokenizer()) {
            refused(Tokenizer::of_json(&path, parts, &TemplateArgs::default()));
        }
    }
    fs::remove_file(path).unwrap();
}

#[cfg(not(feature = "candle"))]
fn gguf(_: &mut Place, _: &mut Dice) {}

/// Half of them with the checksum that they should have.
fn states(place: &mut Place, dice: &mut Dice) {
    let mut bytes = place.damaged(checkpoint::STATE, dice);
    if dice.below(2) == 0
        && let Ok(mut entries) = serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&bytes)
    {
        entries.shift_remove("checksum");
        let sealed = serde_json::to_string_pretty(&entries).unwrap() + "\n";
        entries.insert("checksum".into(), checkpoint::derive_id(&[sealed.as_bytes()]).into());
        bytes = serde_json::to_vec(&entries).unwrap();
    }
    place.with(checkpoint::STATE, &bytes, |dir| {
        refused(checkpoint::identity(dir));
        refused(checkpoint::verify(dir));
    });
}

fn tokenizers(place: &mut Place, dice: &mut Dice) {
    let name = *dice.pick(&["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]);
    let bytes = if name == "chat_template.jinja" {
        let words = [
            "{%",
            "%}",
            "{{",
            "}}",
            "for m in messages",
            "endfor",
            "if",
            "|",
            "range(99999)",
            "~",
            "messages",
            "[0]",
            ".x",
            "-%}",
            "raise_exception('x')",
        ];
        mutate(dice, &[TEMPLATE.as_bytes().to_vec()], &words)
    } else {
        place.damaged(name, dice)
    };
    fs::write(place.path(name), bytes).unwrap();
    if let Some(tokenizer) = refused(Tokenizer::load(place.dir.path())) {
        let message = Message::new("user", "1 + 2? \u{fc}\u{1f600}");
        let text = tokenizer.chat(&[message]).unwrap_or_else(|_| "<|im_start|>1 + 2".into());
        if let Some(ids) = refused(tokenizer.encode(&text)) {
            refused(tokenizer.decode(&ids));
        }
        refused(tokenizer.decode(&[0, 317, 319, 4_000_000_000]));
    }
    match name {
        "chat_template.jinja" => fs::remove_file(place.path(name)).unwrap(),
        _ => fs::write(place.path(name), place.good(name)).unwrap(),
    }
}

const TEMPLATE: &str = "{% set n = namespace(x='') %}{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.role + '\\n' + \
    m.content|trim + '<|im_end|>' }}{% set n.x = n.x ~ m.content %}{% endif %}{% endfor %}{{ n.x[:3] }}{% if add_generation_prompt %}\
    {{ '<|im_start|>assistant' }}{% endif %}";
