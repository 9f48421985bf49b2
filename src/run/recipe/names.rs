//! The names that a recipe may have, and what their values must look like.

use super::{DYNAMIC_SAMPLING, FORK, PROMPTS_PER_STEP, SCORER, SEED, STEPS};

/// What a value must look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A whole number.
    Count,
    Number,
    /// Any text that does not begin like an option.
    Text,
    /// Options of `grpo-step`, see [`GRPO_OPTIONS`].
    Options,
    /// A whole number or nothing.
    OptionalCount,
    /// A number or nothing.
    Optional,
}
use Kind::{Count, Number, Optional, OptionalCount, Options, Text};

/// Options of `grpo-step` that have no name of their own in a recipe: numbers of the loss, the advantages and the reference.
const GRPO_OPTIONS: [&str; 15] = [
    "delta",
    "entropy-coef",
    "importance-sampling-clip-min",
    "importance-sampling-mode",
    "logprob-band",
    "micro-batch-tokens",
    "normalize-then-sum",
    "off-policy-mask-threshold",
    "ratio-level",
    "reference-mixup-alpha",
    "reference-sync-steps",
    "sapo-temperature-neg",
    "sapo-temperature-pos",
    "top-entropy-quantile",
    "adam-epsilon",
];

/// Those among them that take no value.
const GRPO_FLAGS: [&str; 2] = ["leave-one-out", "mask-truncated"];

/// The names that a recipe may have, the kind of each, and its meaning.
pub(super) const NAMES: [(&str, Kind, &str); 48] = [
    (FORK, Text, "run and checkpoint that a fork began from"),
    (SEED, Count, "seed of everything random"),
    (SCORER, Text, "command in the place of score; empty: score"),
    ("MODEL", Text, "model directory or Hub id; without weights: starts at random"),
    ("SYSTEM_PROMPT", Text, "file with the system prompt; empty: the XML format"),
    ("CHAT_TEMPLATE_ARG", Text, "NAME=VALUE for the chat template; empty: none"),
    ("DTYPE", Text, "numbers that are multiplied"),
    ("DATA", Text, "`generate`, or a data set"),
    ("MAX_NUMBER", Count, "largest number in a generated problem"),
    ("EPOCHS", Count, "passes over the problems"),
    ("TEST_PROMPTS", Count, "held-out problems of an evaluation"),
    ("TEST_SAMPLES", Count, "completions per problem in the sampled evaluation"),
    ("SUPERVISED_STEPS", Count, "optimizer steps of the supervised start; 0: none"),
    ("SUPERVISED_BATCH", Count, "demonstrations per step"),
    ("SUPERVISED_LEARNING_RATE", Number, "learning rate of the supervised start"),
    ("SLOPPY_FORMAT", Number, "fraction of demonstrations in a broken format"),
    ("SLOPPY_ARITHMETIC", Number, "fraction of demonstrations with a wrong result"),
    (PROMPTS_PER_STEP, Count, "groups per step"),
    ("NUM_GENERATIONS", Count, "completions per group"),
    ("TEMPERATURE", Number, "sampling temperature"),
    ("MAX_PROMPT_TOKENS", Count, "longest prompt (tokens)"),
    ("MAX_COMPLETION_TOKENS", Count, "longest completion (tokens)"),
    (STEPS, Count, "steps of the run"),
    ("LOSS", Text, "grpo, bnpo, dr_grpo, dapo, cispo, sapo, gspo or luspo"),
    ("BETA", Number, "weight of the KL divergence from the start"),
    ("KL_ESTIMATOR", Text, "of that divergence: k1, k2, k3 or k3-weighted"),
    ("EPSILON", Number, "clip range of the ratio"),
    ("EPSILON_HIGH", Text, "upper clip range; empty: EPSILON"),
    ("LEARNING_RATE", Number, "largest learning rate"),
    ("SCHEDULE", Text, "constant, linear or cosine"),
    ("WARMUP_RATIO", Number, "fraction of the steps in which the learning rate rises"),
    ("ADAM_BETA1", Number, "decay of AdamW's first moment"),
    ("ADAM_BETA2", Number, "decay of AdamW's second moment"),
    ("WEIGHT_DECAY", Number, "weight decay of matrices"),
    ("OPTIMIZER_STATE", Text, "type of AdamW's moments"),
    ("LORA_RANK", OptionalCount, "rank of an adapter that is trained in the place of the weights; empty: none"),
    ("LORA_ALPHA", Optional, "what the adapter adds is multiplied by this / LORA_RANK; empty: 2 LORA_RANK"),
    ("LORA_TARGETS", Text, "matrices that get an adapter; empty: all of each layer"),
    ("MAX_GRAD_NORM", Number, "gradients are clipped to this norm; 0: never"),
    ("REWARDS", Text, "weights of score's rewards"),
    ("SCALE_REWARDS", Text, "what advantages are divided by: group, batch or none"),
    (DYNAMIC_SAMPLING, OptionalCount, "most groups sampled per step, times PROMPTS_PER_STEP; empty: no more than that"),
    ("GRPO_OPTIONS", Options, "more options of grpo-step: NAME=VALUE, or NAME alone"),
    ("MAX_STALENESS", Count, "steps that sampling is ahead of training"),
    ("IMPORTANCE_SAMPLING_CLIP_MAX", Text, "largest weight of a token for weights that differ; empty: off"),
    ("EVALUATE_EVERY", OptionalCount, "steps between evaluations during training; empty: none"),
    ("SAVE_EVERY", Count, "steps between checkpoints"),
    ("KEEP", Count, "checkpoints kept besides the start"),
];

/// Says what is wrong with a value. One that begins with a minus would be taken for an option.
pub(super) fn check(name: &str, value: &str) -> std::result::Result<(), String> {
    let kind = NAMES.iter().find(|(known, ..)| *known == name).map(|(_, kind, _)| *kind);
    let is_absent = value.is_empty() && matches!(kind, Some(Optional | OptionalCount));
    if matches!(kind, Some(Count | OptionalCount)) && !is_absent && !looks_like_a_count(value) {
        return Err(format!("{name} is a whole number, and not \"{value}\""));
    }
    if matches!(kind, Some(Number | Optional)) && !is_absent && !looks_like_a_number(value) {
        return Err(format!("{name} is a number, and not \"{value}\""));
    }
    if kind == Some(Options) {
        value.split_whitespace().try_for_each(check_option)?;
    }
    if value.starts_with('-') {
        return Err(format!("{name} begins with a minus"));
    }
    if value.contains(char::is_control) {
        return Err(format!("{name} has a control character"));
    }
    if value.contains(char::REPLACEMENT_CHARACTER) {
        return Err(format!("{name} is not UTF-8 text"));
    }
    Ok(())
}

/// Digits, a point, digits, and an exponent: the form that shells and commands read alike.
fn looks_like_a_number(text: &str) -> bool {
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let (mantissa, exponent) = text.split_once('e').unwrap_or((text, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or(("", mantissa));
    let exponent = exponent.strip_prefix(['-', '+']).unwrap_or(exponent);
    digits(whole) && [fraction, exponent].iter().all(|part| !part.is_empty() && digits(part))
}

/// Digits without zeros before them, which a shell would take for the sign of another base.
fn looks_like_a_count(text: &str) -> bool {
    text == "0" || !text.is_empty() && !text.starts_with('0') && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Accepts the options that are numbers of a step, and none that names a file.
fn check_option(option: &str) -> std::result::Result<(), String> {
    let known = match option.split_once('=') {
        Some((name, _)) => GRPO_OPTIONS.contains(&name),
        None => GRPO_FLAGS.contains(&option),
    };
    let [with_value, without] = [GRPO_OPTIONS.join(", "), GRPO_FLAGS.join(", ")];
    known
        .then_some(())
        .ok_or_else(|| format!("GRPO_OPTIONS has {option}, and may have NAME=VALUE of {with_value}, and {without}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_one_form() {
        for text in ["1", "0.5", ".5", "3e-3", "1e+4", "12.25e3"] {
            assert!(looks_like_a_number(text), "{text}");
        }
        for text in ["", ".", "1.", "-1", "1e", "e3", "0x1", "1,0", "a[$(x)]", "1e-", "1.5.2", "inf"] {
            assert!(!looks_like_a_number(text), "{text}");
        }
        for (text, whether) in [("0", true), ("120", true), ("08", false), ("", false), ("1.0", false), ("1e3", false)]
        {
            assert_eq!(looks_like_a_count(text), whether, "{text}");
        }
        assert_eq!(check("EVALUATE_EVERY", ""), Ok(()));
        assert!(check("EVALUATE_EVERY", "0.5").is_err_and(|what| what.contains("a whole number, and not \"0.5\"")));
    }

    #[test]
    fn options_are_numbers_of_a_step_and_no_files() {
        assert_eq!(check("GRPO_OPTIONS", "delta=3 leave-one-out"), Ok(()));
        for bad in ["output=x", "delta", "leave-one-out=1", "policy=x", "--delta=3"] {
            assert!(check("GRPO_OPTIONS", bad).is_err_and(|what| what.contains("may have")), "{bad}");
        }
    }
}
