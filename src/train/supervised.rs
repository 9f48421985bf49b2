//! Cross-entropy on demonstrations: the start from which reinforcement learning has something to reinforce.

use std::borrow::Cow;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::grpo::metrics::{Mean, Metrics};
use crate::lines::prompt::{self, Prompt};
use crate::lines::record::{Line, Message};
use crate::model::Config;
use crate::train::microbatch::{self, Sequence};
use crate::train::trainer::{Trained, Trainer};

/// Turns a prompt and its completion into tokens: the prompt as a chat that awaits the assistant, and the completion with the
/// token that ends its turn.
pub type Encode = dyn Fn(&[Message], &str) -> Result<(Vec<u32>, Vec<u32>)> + Send;

/// A demonstration in tokens.
#[derive(Debug, Clone)]
pub struct Example {
    /// At least one token.
    pub prompt: Vec<u32>,
    /// At least one token.
    pub completion: Vec<u32>,
    /// Hash of the record's text.
    pub digest: [u8; 32],
}

/// Numbers of a supervised step.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct SupervisedConfig {
    /// Whether the prompt's tokens are learned too.
    pub loss_on_prompt: bool,
    /// Most tokens in the model at once.
    pub micro_batch_tokens: usize,
}

/// The demonstration of a record with a prompt and a `completion`, or with messages that end in the assistant's answer.
///
/// # Errors
/// [`Error::Record`] when it is none, or does not fit a model of shape `limits`.
pub fn example(line: &Line, limits: &Config, encode: &Encode) -> Result<Example> {
    let record = line.record()?;
    let Prompt { messages, answer, .. } = Prompt::of(&record)?;
    let text = prompt::completion(&record)?.map(Cow::into_owned).or(answer);
    let text = text.ok_or_else(|| record.error("no field \"completion\", and no answer in \"messages\""))?;
    let (prompt, completion) = encode(&messages, &text).map_err(|err| record.error(err.to_string()))?;
    if prompt.is_empty() || completion.is_empty() {
        return Err(record.error("prompt or completion has no tokens"));
    }
    let (length, positions) = (prompt.len() + completion.len(), limits.positions());
    if length > positions {
        return Err(record.error(format!("{length} tokens; the policy has {positions} positions")));
    }
    if let Some(token) = prompt.iter().chain(&completion).find(|token| **token as usize >= limits.vocab_size) {
        return Err(record.error(format!("token {token} is not in the policy's vocabulary of {}", limits.vocab_size)));
    }
    Ok(Example { prompt, completion, digest: blake3::hash(line.text.as_bytes()).into() })
}

/// One optimizer step on the mean negative log-likelihood of all target tokens.
///
/// # Errors
/// [`Error::Numerics`] when loss or gradients are not finite, and as [`Trainer::update`].
pub fn step(trainer: &mut Trainer, config: SupervisedConfig, examples: &[Example]) -> Result<Metrics> {
    let joined: Vec<Vec<u32>> = examples.iter().map(|one| [&one.prompt[..], &one.completion].concat()).collect();
    let split = |(one, joined): (&Example, &'_ Vec<u32>)| {
        if config.loss_on_prompt { 1 } else { joined.len() - one.completion.len() }
    };
    let borders: Vec<usize> = examples.iter().zip(&joined).map(split).collect();
    let sequences: Vec<Sequence<'_>> = joined
        .iter()
        .zip(&borders)
        .map(|(tokens, border)| Sequence { prompt: &tokens[..*border], completion: &tokens[*border..] })
        .collect();
    let targets: usize = sequences.iter().map(|one| one.completion.len()).sum();
    let weight = 1.0 / targets as f64;
    let (mut loss, mut entropy) = (0.0, Mean::default());
    let members: Vec<usize> = (0..sequences.len()).collect();
    for run in microbatch::cut(&sequences, &members, config.micro_batch_tokens) {
        let batch = microbatch::pack(&sequences, &run);
        let slope = |_: usize, _: f32| -weight as f32;
        let stats = trainer.machine.accumulate(&batch, 1.0, &slope)?;
        for stats in stats {
            loss -= weight * f64::from(stats.logprob);
            entropy.add(f64::from(stats.entropy));
        }
    }
    if !loss.is_finite() {
        return Err(Error::Numerics("the loss is not finite; nothing was published".into()));
    }
    let update = trainer.update(true)?;
    let digests: Vec<u8> = examples.iter().flat_map(|one| one.digest).collect();
    let tokens = joined.iter().map(Vec::len).sum::<usize>() as u64;
    trainer.advance(&digests, &config, Trained { prompts: examples.len() as u64, tokens });
    let mut line = Metrics::default();
    line.count("step", trainer.updates());
    line.real("loss", loss);
    update.report(&mut line);
    line.real("entropy", entropy.mean());
    line.count("num_tokens", trainer.state.tokens_consumed);
    Ok(line)
}
