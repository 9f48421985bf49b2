//! Gives a command the numbers of a recipe as options.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue};
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command};

use super::{DYNAMIC_SAMPLING, PROMPTS_PER_STEP, Recipe, SEED, STEPS};
use crate::error::{Error, Result};

/// Names of a recipe, each with the option that it is.
type Options = &'static [(&'static str, &'static str)];

/// Those of `rollout`.
pub const OF_ROLLOUT: Options = &[
    ("CHAT_TEMPLATE_ARG", "chat-template-arg"),
    ("DTYPE", "dtype"),
    (SEED, "seed"),
    (PROMPTS_PER_STEP, "groups-per-step"),
    ("NUM_GENERATIONS", "num-generations"),
    ("TEMPERATURE", "temperature"),
    ("MAX_PROMPT_TOKENS", "max-prompt-tokens"),
    ("MAX_COMPLETION_TOKENS", "max-completion-tokens"),
    ("MAX_STALENESS", "max-staleness"),
    (DYNAMIC_SAMPLING, "dynamic-sampling"),
];

/// Those of `grpo-step`, besides what `GRPO_OPTIONS` has.
pub const OF_GRPO_STEP: Options = &[
    ("DTYPE", "dtype"),
    (SEED, "seed"),
    (PROMPTS_PER_STEP, "groups-per-step"),
    (STEPS, "total-steps"),
    ("MAX_COMPLETION_TOKENS", "max-completion-tokens"),
    ("LOSS", "loss"),
    ("BETA", "beta"),
    ("KL_ESTIMATOR", "kl-estimator"),
    ("EPSILON", "epsilon"),
    ("EPSILON_HIGH", "epsilon-high"),
    ("SCALE_REWARDS", "scale-rewards"),
    ("IMPORTANCE_SAMPLING_CLIP_MAX", "importance-sampling-clip-max"),
    ("MAX_STALENESS", "max-staleness"),
    (DYNAMIC_SAMPLING, "dynamic-sampling"),
    ("LEARNING_RATE", "learning-rate"),
    ("SCHEDULE", "schedule"),
    ("WARMUP_RATIO", "warmup-ratio"),
    ("ADAM_BETA1", "adam-beta1"),
    ("ADAM_BETA2", "adam-beta2"),
    ("WEIGHT_DECAY", "weight-decay"),
    ("MAX_GRAD_NORM", "max-grad-norm"),
    ("OPTIMIZER_STATE", "optimizer-state"),
    ("LORA_RANK", "lora-rank"),
    ("LORA_ALPHA", "lora-alpha"),
    ("LORA_TARGETS", "lora-targets"),
    ("SAVE_EVERY", "save-every"),
    ("KEEP", "keep"),
];

/// The arguments of this process. After them come the options that the recipe of `--recipe` has under their names, except for empty
/// ones, for options that are given, and for options that conflict with those.
///
/// # Errors
/// Those of [`Recipe::of_file`]; [`Error::Usage`] when a value of the recipe is refused.
pub fn arguments(command: Command, options: Options) -> Result<Vec<OsString>> {
    add_to(std::env::args_os().collect(), command, options)
}

fn add_to(mut arguments: Vec<OsString>, command: Command, options: Options) -> Result<Vec<OsString>> {
    let mut command = command.ignore_errors(true); // the parse that follows reports those of the command line
    let Ok(given) = command.try_get_matches_from_mut(&arguments) else { return Ok(arguments) };
    let Some(file) = given.get_one::<PathBuf>("recipe").filter(|_| !is_another_task(&command, &given)) else {
        return Ok(arguments);
    };
    let recipe = Recipe::of_file(file)?;
    let named = options.iter().map(|(name, option)| (*option, Some(recipe.get(name))));
    let more = recipe.get("GRPO_OPTIONS").split_whitespace().map(|option| match option.split_once('=') {
        Some((option, value)) => (option, Some(value)),
        None => (option, None),
    });
    let mut added = Vec::new();
    for (option, value) in named.chain(more).filter(|(_, value)| *value != Some("")) {
        let Some(arg) = command.get_arguments().find(|arg| arg.get_long() == Some(option)) else { continue };
        let is_default = value.is_some_and(|value| arg.get_default_values() == [value]);
        if !is_default && !is_given(&given, arg) && !is_excluded(&command, &given, arg) {
            added.push(format!("--{option}"));
            arguments.push(format!("--{option}").into());
            arguments.extend(value.map(OsString::from));
        }
    }
    match command.ignore_errors(false).try_get_matches_from(&arguments) {
        Err(err) if added.contains(&refused_option(&err)) => {
            let what = err.to_string();
            let what = what.trim_start_matches("error: ").split("\n\n").next().unwrap_or_default();
            Err(Error::Usage(format!("{}: {what}", file.display())))
        }
        _ => Ok(arguments),
    }
}

/// Whether the recipe is one to keep, or does not go with what is asked.
fn is_another_task(command: &Command, given: &ArgMatches) -> bool {
    let recipe = command.get_arguments().find(|arg| arg.get_id() == "recipe");
    matches!(given.try_contains_id("begin"), Ok(true))
        || recipe.is_some_and(|recipe| is_excluded(command, given, recipe))
}

fn is_given(given: &ArgMatches, arg: &Arg) -> bool {
    given.value_source(arg.get_id().as_str()).is_some_and(|from| from != ValueSource::DefaultValue)
}

/// Whether an option that is given conflicts with this one.
fn is_excluded(command: &Command, given: &ArgMatches, arg: &Arg) -> bool {
    let excludes = |one: &Arg, other: &Arg| command.get_arg_conflicts_with(one).contains(&other);
    command.get_arguments().any(|other| is_given(given, other) && (excludes(arg, other) || excludes(other, arg)))
}

/// `--name` of the option that an error is about.
fn refused_option(err: &clap::Error) -> String {
    match err.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(usage)) => usage.split(' ').next().unwrap_or_default().to_owned(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_recipe_gives_what_the_command_line_does_not_settle() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(
            file.path(),
            "SEED=7\nTEMPERATURE=0.5\nNUM_GENERATIONS=4\nDTYPE=auto\nMAX_STALENESS=3\nCHAT_TEMPLATE_ARG=\nMODEL=x",
        )
        .unwrap();
        let option = |name: &'static str| Arg::new(name).long(name);
        let command = Command::new("rollout").args([
            option("recipe").value_parser(clap::value_parser!(PathBuf)),
            option("model"),
            option("seed"),
            option("temperature"),
            option("num-generations").short('n'),
            option("dtype").default_value("auto"),
            option("max-staleness").conflicts_with("model"),
            option("chat-template-arg"),
        ]);
        let path = file.path().to_str().unwrap();
        let added = |line: &str| {
            let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            let all = add_to(words.clone(), command.clone(), OF_ROLLOUT).unwrap();
            assert_eq!(all[..words.len()], words);
            all[words.len()..].iter().map(|word| word.to_str().unwrap().to_owned()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(added("rollout --seed 1"), "");
        let rest = "--seed 7 --num-generations 4 --temperature 0.5";
        assert_eq!(added(&format!("rollout --recipe {path}")), format!("{rest} --max-staleness 3"));
        assert_eq!(added(&format!("rollout --recipe {path} --model m")), rest, "conflicts with --model");
        assert_eq!(added(&format!("rollout --recipe={path} --model m -n 1 --seed=0")), "--temperature 0.5");
        let missing = add_to(vec!["rollout".into(), "--recipe".into(), "/none".into()], command.clone(), OF_ROLLOUT);
        assert!(missing.unwrap_err().to_string().contains("/none"));
    }

    #[test]
    fn options_of_grpo_step_come_with_and_without_a_value() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "STEPS=9\nGRPO_OPTIONS=delta=3 leave-one-out").unwrap();
        let option = |name: &'static str| Arg::new(name).long(name);
        let flag = option("leave-one-out").action(clap::ArgAction::SetTrue);
        let recipe = option("recipe").value_parser(clap::value_parser!(PathBuf));
        let command =
            Command::new("grpo-step").args([recipe, option("delta"), flag, option("total-steps"), option("begin")]);
        let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        let line = format!("grpo-step --recipe {}", file.path().display());
        let all = add_to(words(&line), command.clone(), OF_GRPO_STEP).unwrap();
        assert_eq!(all, words(&format!("{line} --total-steps 9 --delta 3 --leave-one-out")));
        fs::write(file.path(), "STEPS=9\nGRPO_OPTIONS=delta=x").unwrap();
        let strict = command.clone().mut_arg("delta", |arg| arg.value_parser(clap::value_parser!(f64)));
        let refused = add_to(words(&line), strict, OF_GRPO_STEP).unwrap_err().to_string();
        assert!(
            refused.starts_with(&format!("{}: invalid value 'x' for '--delta", file.path().display())),
            "{refused}"
        );
        let begin = words(&format!("{line} --begin run"));
        assert_eq!(add_to(begin.clone(), command.clone(), OF_GRPO_STEP).unwrap(), begin, "a recipe to keep");
    }
}
