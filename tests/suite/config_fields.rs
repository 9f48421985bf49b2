//! Every entry of `config.json` that transformers reads for a family (`tests/fixtures/make_config_fields.py` lists them): it changes the
//! model as it does there, is refused by name, or has no effect here, and why.

use std::collections::{BTreeMap, BTreeSet};

use grpo_pipes::model::{Config, Scaling};
use serde_json::{Value, json};

use crate::fixtures::directory;

const FAMILIES: [&str; 4] = ["qwen2", "qwen3", "llama", "mistral"];

fn read(entries: &Value) -> Result<Config, String> {
    read_as("qwen2", entries)
}

/// The class's defaults with fewer layers and without a window of all layers, and other entries.
fn read_as(family: &str, entries: &Value) -> Result<Config, String> {
    let mut config = json!({"model_type": family, "num_hidden_layers": 2}).as_object().unwrap().clone();
    if family == "mistral" {
        config.insert("sliding_window".into(), Value::Null);
    }
    config.extend(entries.as_object().unwrap().clone());
    serde_json::from_value(Value::Object(config)).map_err(|err| err.to_string())
}

/// An entry, and values with which there is another model.
fn implemented(family: &str) -> Vec<(&'static str, Value)> {
    let yarn = json!({"rope_type": "yarn", "factor": 2.0});
    let llama3 = json!({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4});
    let mut list = vec![
        ("vocab_size", json!({"vocab_size": 300})),
        ("hidden_size", json!({"hidden_size": 2048})),
        ("intermediate_size", json!({"intermediate_size": 100})),
        ("num_hidden_layers", json!({"num_hidden_layers": 3})),
        ("num_attention_heads", json!({"num_attention_heads": 64})),
        ("num_key_value_heads", json!({"num_key_value_heads": 4})),
        ("max_position_embeddings", json!({"max_position_embeddings": 100})),
        ("rms_norm_eps", json!({"rms_norm_eps": 1e-5})),
        ("tie_word_embeddings", json!({"tie_word_embeddings": true})),
        ("initializer_range", json!({"initializer_range": 0.1})),
        ("pad_token_id", json!({"pad_token_id": -1})),
        ("rope_theta", json!({"rope_theta": 1e6})),
        ("rope_scaling", json!({"rope_scaling": {"type": "linear", "factor": 2}})),
        ("rope_parameters", json!({"rope_parameters": yarn})),
        (
            "original_max_position_embeddings",
            json!({"rope_parameters": yarn, "original_max_position_embeddings": 1000}),
        ),
        ("rope_scaling", json!({"rope_scaling": llama3})),
    ];
    if family != "qwen2" {
        list.push(("head_dim", json!({"head_dim": 64})));
    }
    list
}

/// The same for what only some families refuse.
fn refused_of(family: &str) -> Vec<(&'static str, Value)> {
    let of_qwen = vec![
        (
            "use_sliding_window with sliding_window = 16 ",
            json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1}),
        ),
        ("max_window_layers = 0", json!({"use_sliding_window": true, "max_window_layers": 0})),
        ("layer_types has \\\"sliding_attention\\\"", json!({"layer_types": ["full_attention", "sliding_attention"]})),
        ("layer_types has 1 layers", json!({"layer_types": ["full_attention"]})),
    ];
    let attention_bias = ("attention_bias = true", json!({"attention_bias": true}));
    match family {
        "qwen2" => [of_qwen, vec![("head_dim = 64", json!({"head_dim": 64}))]].concat(),
        "qwen3" => [of_qwen, vec![attention_bias]].concat(),
        "llama" => vec![attention_bias, ("mlp_bias = true", json!({"mlp_bias": true}))],
        _ => vec![("sliding_window = 4096 is not supported with max_position", json!({"sliding_window": 4096}))],
    }
}

/// An entry, and values with which it is refused.
fn refused(family: &str) -> Vec<(&'static str, Value)> {
    let common = vec![
        ("model_type", json!({"model_type": "gemma2"})),
        ("model_type \\\"mixtral\\\", a mixture of experts", json!({"model_type": "mixtral"})),
        ("model_type \\\"qwen2_moe\\\", a mixture of experts", json!({"model_type": "qwen2_moe"})),
        ("model_type", json!({"model_type": null})),
        (
            "architecture \\\"Qwen2ForSequenceClassification\\\"",
            json!({"architectures": ["Qwen2ForSequenceClassification"]}),
        ),
        ("hidden_act \\\"gelu\\\"", json!({"hidden_act": "gelu"})),
        ("attention_dropout = 0.1", json!({"attention_dropout": 0.1})),
        ("is_causal", json!({"is_causal": false})),
        ("is_encoder_decoder", json!({"is_encoder_decoder": true})),
        ("pruned_heads", json!({"pruned_heads": {"1": [0]}})),
        ("per_layer_config", json!({"per_layer_config": {"1": {"rms_norm_eps": 1.0}}})),
        ("quantization_config (gptq)", json!({"quantization_config": {"quant_method": "gptq", "bits": 4}})),
        ("quantization_config (bitsandbytes)", json!({"quantization_config": {"load_in_4bit": true}})),
        ("transformers_weights", json!({"transformers_weights": "other.safetensors"})),
        ("configuration_files", json!({"configuration_files": ["config.4.0.0.json"]})),
        ("head_dim = 7 is not", json!({"head_dim": 7})),
        ("partial_rotary_factor = 0.5", json!({"partial_rotary_factor": 0.5})),
        ("partial_rotary_factor = 0.5", json!({"rope_parameters": {"partial_rotary_factor": 0.5}})),
        ("rope_theta = 0", json!({"rope_theta": 0})),
        ("pad_token_id = 151936", json!({"pad_token_id": 151_936})),
        (
            "rope_scaling and rope_parameters differ",
            json!({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 1e6}}),
        ),
        (
            "rope_theta = 1000000 and rope_theta = 10000",
            json!({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 10_000}}),
        ),
        (
            "type \\\"yarn\\\" and rope_type \\\"linear\\\"",
            json!({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2}}),
        ),
        ("needs low_freq_factor", json!({"rope_scaling": {"rope_type": "llama3", "factor": 2}})),
        (
            "low_freq_factor = 4",
            json!({"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}}),
        ),
        ("rope type \\\"mrope\\\"", json!({"rope_scaling": {"type": "mrope", "mrope_section": [1]}})),
        ("mrope_section = [1]", json!({"rope_scaling": {"type": "default", "mrope_section": [1]}})),
        ("full_attention = {", json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}})),
        ("factor = 2", json!({"rope_scaling": {"rope_theta": 5000.0, "factor": 2}})),
        ("needs a factor", json!({"rope_scaling": {"type": "linear"}})),
        ("factor = 0", json!({"rope_scaling": {"type": "dynamic", "factor": 0}})),
        ("needs a factor", json!({"rope_scaling": {"type": "yarn"}})),
        ("low_freq_factor = 1", json!({"rope_scaling": {"type": "yarn", "factor": 2, "low_freq_factor": 1}})),
        ("truncate = 1", json!({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": 1}})),
        ("beta_fast = \\\"a\\\"", json!({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": "a"}})),
        ("lengthened by its rope's factor", json!({"rope_scaling": {"type": "linear", "factor": 1e9}})),
    ];
    [common, refused_of(family)].concat()
}

/// Entries that change nothing here, and why.
const NO_EFFECT: [(&str, &str); 14] = [
    (
        "torch_dtype dtype use_bfloat16 tf_legacy_loss xla_device torchscript",
        "how a program of PyTorch or TensorFlow holds numbers; here --dtype",
    ),
    (
        "attn_implementation experts_implementation fusion_config distributed_config gradient_checkpointing use_cache",
        "how it is computed, not what",
    ),
    ("output_attentions output_hidden_states return_dict", "what Python gets back"),
    ("transformers_version name_or_path tokenizer_class", "where the files come from; tokenizer.json is read"),
    ("bos_token_id sep_token_id decoder_start_token_id prefix", "text before a prompt; the chat template writes it"),
    ("eos_token_id", "ends completions, tokenizer::stop_ids"),
    (
        "id2label label2id num_labels problem_type finetuning_task task_specific_params classifier_dropout hidden_dropout",
        "of classifiers, whose architectures are refused",
    ),
    (
        "summary_activation summary_first_dropout summary_last_dropout summary_proj_to_labels summary_type summary_use_proj",
        "of classifiers of other architectures",
    ),
    (
        "is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder",
        "of encoders and decoders; Qwen2 looks at none of them",
    ),
    (
        "chunk_size_feed_forward attention_chunk_size kv_sharing_modes",
        "of other architectures; Qwen2 looks at none of them",
    ),
    ("init_std initializer_factor", "of architectures without initializer_range"),
    (
        "temperature top_k top_p typical_p do_sample repetition_penalty encoder_repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty epsilon_cutoff eta_cutoff",
        "sampling defaults, which rollout does not apply",
    ),
    (
        "max_length min_length num_return_sequences return_dict_in_generate output_scores",
        "of Python's generate; here options of rollout",
    ),
    (
        "num_beams num_beam_groups diversity_penalty length_penalty early_stopping num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind target_lookbehind",
        "of searches that rollout does not do",
    ),
];

/// Entries that change nothing, each with some value.
fn no_effect(family: &str) -> Vec<(&'static str, Value)> {
    let window = ("sliding_window", json!({"sliding_window": 16}));
    let layers = ("layer_types", json!({"layer_types": ["sliding_attention", "full_attention"]}));
    let own = match family {
        "llama" => vec![("pretraining_tp", json!({"pretraining_tp": 2})), window, layers], // the first: how products were cut
        "mistral" => vec![layers],                                                         // one window for all layers
        _ => Vec::new(),
    };
    let common = NO_EFFECT.iter().flat_map(|(names, _)| names.split(' ')).map(|name| (name, json!({name: 0.25})));
    common.chain(own).collect()
}

fn named(list: &[(&'static str, Value)]) -> BTreeSet<String> {
    list.iter().flat_map(|(_, entries)| entries.as_object().unwrap().keys().cloned()).collect()
}

#[test]
fn each_entry_of_transformers_classes_is_accounted_for() {
    let text = std::fs::read_to_string(directory().join("config_fields.json")).unwrap();
    let versions: BTreeMap<String, BTreeMap<String, BTreeSet<String>>> = serde_json::from_str(&text).unwrap();
    for (version, family, names) in versions.iter().flat_map(|(v, of)| of.iter().map(move |(f, names)| (v, f, names))) {
        let mut known = &named(&implemented(family)) | &named(&refused(family));
        known.extend(named(&no_effect(family)));
        assert_eq!(names - &known, BTreeSet::new(), "{family} of transformers {version}");
    }
}

#[test]
fn an_entry_makes_another_model_or_is_refused_by_name_or_has_no_effect() {
    for family in FAMILIES {
        let read = |entries: &Value| read_as(family, entries);
        let plain = read(&json!({})).unwrap();
        for (name, entries) in implemented(family) {
            assert_ne!(read(&entries).unwrap(), plain, "{family}: {name}");
        }
        for (name, entries) in refused(family) {
            let said = read(&entries).unwrap_err();
            assert!(said.contains(&name.replace('\\', "")) && !said.contains('\n'), "{family}: {name}: {said}");
        }
        for (name, entries) in no_effect(family) {
            assert_eq!(read(&entries).unwrap(), plain, "{family}: {name}");
        }
    }
}

#[test]
fn the_defaults_of_each_class_are_transformers_own() {
    let of = |family: &str| {
        let c = read_as(family, &json!({"num_hidden_layers": 32})).unwrap();
        (c.vocab_size, c.intermediate_size, c.num_key_value_heads, c.head_dim(), c.max_position_embeddings)
    };
    assert_eq!(of("qwen2"), (151_936, 22_016, 32, 128, 32_768));
    assert_eq!(of("qwen3"), (151_936, 22_016, 32, 128, 32_768));
    assert_eq!(of("llama"), (32_000, 11_008, 32, 128, 2048));
    assert_eq!(of("mistral"), (32_000, 14_336, 8, 128, 131_072));
    assert_eq!(
        read_as("qwen3", &json!({"num_attention_heads": 16, "num_key_value_heads": 8})).unwrap().head_dim(),
        128,
        "not 4096 / 16"
    );
    assert_eq!(read_as("llama", &json!({"num_attention_heads": 16})).unwrap().head_dim(), 256);
    let window = json!({"sliding_window": 4096, "max_position_embeddings": 4096});
    assert!(read_as("mistral", &window).is_ok(), "no sequence is longer than the window");
}

#[test]
fn what_is_missing_has_the_default_of_the_class_and_null_that_of_the_class_too() {
    let config =
        read(&json!({"rope_scaling": null, "sliding_window": null, "layer_types": null, "quantization_config": null}));
    let want = json!({"model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22_016,
        "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6_f32, "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
        "tie_word_embeddings": false, "initializer_range": 0.02_f32});
    assert_eq!(serde_json::to_value(config.unwrap()).unwrap(), want);
    let heads = json!({"num_attention_heads": 16, "hidden_size": 64, "num_key_value_heads": null});
    assert_eq!(read(&heads).unwrap().num_key_value_heads, 16);
    assert!(read(&json!({"hidden_size": null})).unwrap_err().contains("hidden_size = null: invalid type: null"));
    assert!(serde_json::from_value::<Config>(json!({})).unwrap_err().to_string().contains("no model_type; "));
    assert!(serde_json::from_value::<Config>(json!({"architectures": ["Qwen2ForCausalLM"]})).is_ok());
}

#[test]
fn both_spellings_are_the_same_model_and_so_is_a_config_written_from_it() {
    let old = json!({"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 8192}});
    let new = json!({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "beta_fast": null,
        "original_max_position_embeddings": 8192}});
    let mut both = new.clone();
    both.as_object_mut().unwrap().extend(old.as_object().unwrap().clone());
    both["rope_parameters"].as_object_mut().unwrap().remove("beta_fast");
    let config = read(&old).unwrap();
    for other in [&new, &both, &serde_json::to_value(&config).unwrap()] {
        assert_eq!(read(other).unwrap(), config, "{other}");
    }
}

#[test]
fn a_window_that_no_layer_has_is_no_window() {
    for entries in [
        json!({"use_sliding_window": false, "sliding_window": 16, "max_window_layers": 0}),
        json!({"use_sliding_window": true, "sliding_window": null, "max_window_layers": 0}),
        json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 2}),
        json!({"layer_types": ["full_attention", "full_attention"]}),
        json!({"head_dim": 128, "hidden_act": "swish", "partial_rotary_factor": 1.0, "pruned_heads": {}, "is_causal": true}),
    ] {
        assert_eq!(read(&entries), read(&json!({})), "{entries}");
    }
}

#[test]
fn a_factor_lengthens_what_fits() {
    let positions =
        |rope: Value| read(&json!({"max_position_embeddings": 1000, "rope_scaling": rope})).unwrap().positions();
    assert_eq!(positions(json!(null)), 1000);
    assert_eq!(positions(json!({"type": "linear", "factor": 2.5})), 2500);
    assert_eq!(
        positions(json!({"type": "dynamic", "factor": 4})),
        1000,
        "longer ones would follow the length of a batch"
    );
    assert_eq!(positions(json!({"type": "yarn", "factor": 4})), 4000);
    assert_eq!(positions(json!({"type": "yarn", "factor": 4, "original_max_position_embeddings": 200})), 1000);
}

#[test]
fn configs_that_people_have_are_read() {
    let cases = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/cases");
    let read = |name: &str| Config::read(&cases.join(name).join("config.json"));
    if !cases.exists() {
        println!("skipped: there is no {}", cases.display());
        return;
    }
    let plain = read("transformers5").unwrap();
    assert_eq!((plain.rope.rope_theta, plain.rope.scaling, plain.num_hidden_layers), (1e6, Scaling::Default, 2));
    let Scaling::Yarn(yarn) = read("yarn").unwrap().rope.scaling else { panic!("YaRN is read") };
    assert_eq!((yarn.factor, yarn.original_max_position_embeddings), (4.0, 8192.0));
}
