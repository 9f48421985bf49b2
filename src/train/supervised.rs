//! Trains with cross-entropy on demonstrations, to give reinforcement learning something to reinforce.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::grpo::limits::SequenceLimits;
use crate::grpo::metrics::Metrics;
use crate::lines::prompt::{self, Prompt};
use crate::lines::record::{Line, Message};
use crate::numbers::mean::Mean;
use crate::train::config::SupervisedConfig;
use crate::train::identity::StepNumbers;
use crate::train::microbatch::Sequence;
use crate::train::ranks::{self, Order};
use crate::train::trainer::{Trained, Trainer};
use crate::train::work::Work;

/// Encodes a prompt, as a chat in which the assistant speaks next, and its completion, with the token that ends the turn.
pub type Encode = dyn Fn(&[Message], &str) -> Result<(Vec<u32>, Vec<u32>)> + Send;

/// A tokenized demonstration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Example {
    /// At least one token.
    pub prompt: Vec<u32>,
    /// At least one token.
    pub completion: Vec<u32>,
    /// Hash of the record's line.
    pub digest: [u8; 32],
}

/// Reads the demonstration in a record: a prompt and a `completion`, or messages that end in the assistant's answer.
///
/// # Errors
/// [`Error::Record`] when the record has no demonstration, or one that does not fit the model.
pub fn example(line: &Line, limits: SequenceLimits, encode: &Encode) -> Result<Example> {
    let record = line.record()?;
    let Prompt { messages, answer, .. } = Prompt::of(&record)?;
    let text = prompt::completion(&record)?.map(Cow::into_owned).or(answer);
    let text = text.ok_or_else(|| record.error("no field \"completion\", and no answer in \"messages\""))?;
    let (prompt, completion) = encode(&messages, &text).map_err(|err| record.error(err.to_string()))?;
    if prompt.is_empty() || completion.is_empty() {
        return Err(record.error("prompt or completion has no tokens"));
    }
    limits.check(&prompt, &completion).map_err(|what| record.error(what))?;
    Ok(Example { prompt, completion, digest: blake3::hash(line.text.as_bytes()).into() })
}

/// Makes one optimizer step on the mean negative log-likelihood of all target tokens; returns its metrics.
///
/// # Errors
/// [`Error::Numerics`] when loss or gradients are not finite, and as [`Trainer::update`].
pub fn step(trainer: &mut Trainer, config: SupervisedConfig, examples: &[Example]) -> Result<Metrics> {
    ranks::send(trainer.ranks(), || Order::Examples(examples.to_vec()));
    let joined: Vec<Vec<u32>> = examples.iter().map(|one| [&one.prompt[..], &one.completion].concat()).collect();
    let mut sequences: Vec<Sequence<'_>> = Vec::with_capacity(examples.len());
    for (example, tokens) in examples.iter().zip(&joined) {
        let (prompt, completion) = tokens.split_at(if config.loss_on_prompt { 1 } else { example.prompt.len() });
        sequences.push(Sequence { prompt, completion });
    }
    let targets: usize = sequences.iter().map(|one| one.completion.len()).sum();
    let weight = 1.0 / targets as f64;
    let (mut loss, mut entropy) = (0.0, Mean::default());
    let members: Vec<usize> = (0..sequences.len()).collect();
    let costs: Vec<usize> = joined.iter().map(Vec::len).collect();
    let owners = ranks::deal(&costs, trainer.ranks().count());
    let slope = |_: usize, _: f32| (-weight as f32).into();
    let work = Work { sequences: &sequences, owners: &owners, max_tokens: config.micro_batch_tokens };
    let stats = work.run(trainer, &[&members], &mut |trainer, _, batch| trainer.accumulate(batch, 1.0, &slope))?;
    for stats in stats.iter().flatten() {
        loss -= weight * f64::from(stats.logprob);
        entropy.add(f64::from(stats.entropy));
    }
    if !loss.is_finite() {
        return Err(Error::Numerics("the loss is not finite; nothing was published".into()));
    }
    let update = trainer.update(true)?;
    let digests: Vec<u8> = examples.iter().flat_map(|one| one.digest).collect();
    let tokens = joined.iter().map(Vec::len).sum::<usize>() as u64;
    trainer.advance(&digests, StepNumbers::Supervised(config), Trained { prompts: examples.len() as u64, tokens });
    let mut line = Metrics::default();
    line.count("step", trainer.updates());
    line.real("loss", loss);
    update.report(&mut line);
    line.real("entropy", entropy.mean().unwrap_or(0.0));
    line.count("num_tokens", trainer.tokens_consumed());
    Ok(line)
}
