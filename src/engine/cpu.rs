//! Decodes on the CPU.

use std::collections::HashMap;
use std::sync::Arc;

use rayon::prelude::*;

use super::Settings;
use super::decoder::{Decoder, Drawn, Prefill};
use super::sampler::Sampler;
use super::scheduler::Start;
use crate::error::Result;
use crate::model::{DecodeRow, KvCache, Model, Sampling};
use crate::numbers::rng::Stream;

/// Models up to this size (bytes of weights) prefill prompts in parallel; larger ones parallelise each matrix product instead.
const SMALL_MODEL: usize = 16 << 20;

/// Most tokens of prompts prefilled together, without their common beginning (tokens). Enough for matrix products at full speed; bounds
/// memory.
const PREFILL_TOKENS: usize = 512;

/// A model with KV caches for each slot.
pub struct CpuDecoder<'m> {
    model: &'m Model,
    max_completion_tokens: usize,
    prompts: HashMap<usize, Arc<Prefilled>>,
    slots: Vec<Slot>,
    samplers: Vec<Sampler>,
    logits: Vec<f32>,
}

#[derive(Default)]
struct Slot {
    /// Keys and values of the completion; allocated when the slot is first used, and kept.
    own: Option<KvCache>,
    sequence: Option<Sequence>,
}

struct Prefilled {
    cache: KvCache,
    logits: Vec<f32>,
    stream: Stream,
    sampling: Sampling,
    tokens: Vec<u32>,
}

struct Sequence {
    sample: usize,
    prompt: Arc<Prefilled>,
    tokens: Vec<u32>,
}

impl<'m> CpuDecoder<'m> {
    /// Makes empty slots for the sequences of `settings`.
    #[must_use]
    pub fn new(model: &'m Model, settings: &Settings) -> Self {
        Self {
            model,
            max_completion_tokens: settings.max_completion_tokens,
            prompts: HashMap::new(),
            slots: (0..settings.max_sequences).map(|_| Slot::default()).collect(),
            samplers: (0..rayon::current_num_threads()).map(|_| Sampler::default()).collect(),
            logits: Vec::new(),
        }
    }
}

impl Decoder for CpuDecoder<'_> {
    fn prefill(&mut self, prompts: &[Prefill<'_>]) -> Result<()> {
        let tokens: Vec<&[u32]> = prompts.iter().map(|prompt| prompt.tokens).collect();
        let (stem, rests) = split_stem(&tokens);
        let together = PREFILL_TOKENS.max(stem.len()); // or a long stem would be most of the work of each run
        let run = |rests| in_runs(rests, together).into_iter().flat_map(|run| self.model.prefill(stem, run));
        let computed: Vec<(KvCache, Vec<f32>)> = if self.model.weight_bytes() <= SMALL_MODEL {
            let share = rests.len().div_ceil(rayon::current_num_threads()).max(1);
            rests.par_chunks(share).flat_map_iter(run).collect()
        } else {
            run(&rests).collect()
        };
        self.model.stop().check()?; // a stopped model returns garbage
        for (prompt, (cache, logits)) in prompts.iter().zip(computed) {
            let Prefill { stream, sampling, .. } = *prompt;
            let prefilled = Prefilled { cache, logits, stream, sampling, tokens: prompt.tokens.to_vec() };
            self.prompts.insert(prompt.group, Arc::new(prefilled));
        }
        Ok(())
    }

    fn begin(&mut self, starts: &[Start], drawn: &mut Vec<Drawn>) -> Result<()> {
        for start in starts {
            let slot = &mut self.slots[start.slot];
            match &mut slot.own {
                Some(own) => own.clear(),
                None => slot.own = Some(KvCache::new(self.model.config(), self.max_completion_tokens)),
            }
            let tokens = Vec::with_capacity(self.max_completion_tokens);
            slot.sequence =
                Some(Sequence { sample: start.sample, prompt: Arc::clone(&self.prompts[&start.group]), tokens });
        }
        let running = self.slots.iter_mut().enumerate().filter_map(|(i, slot)| Some((i, slot.sequence.as_mut()?)));
        let new = running.filter(|(_, sequence)| sequence.tokens.is_empty());
        let mut rows: Vec<_> = new.map(|(slot, sequence)| Row { slot, logits: None, sequence }).collect();
        drawn.par_extend(draw(&mut rows, &mut self.samplers));
        Ok(())
    }

    fn step(&mut self, drawn: &mut Vec<Drawn>) -> Result<()> {
        let mut rows: Vec<DecodeRow<'_>> = Vec::with_capacity(self.slots.len());
        for slot in &mut self.slots {
            if let (Some(sequence), Some(own)) = (&slot.sequence, &mut slot.own) {
                let token = *sequence.tokens.last().expect("drawn when it started");
                rows.push(DecodeRow { token, prompt: &sequence.prompt.cache, own });
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
        let vocabulary = self.model.config().vocab_size;
        self.logits.resize(rows.len() * vocabulary, 0.0);
        self.model.decode(&mut rows, &mut self.logits);
        let running = self.slots.iter_mut().enumerate().filter_map(|(i, slot)| Some((i, slot.sequence.as_mut()?)));
        let logits = self.logits.chunks_exact(vocabulary).map(Some);
        let mut rows: Vec<_> =
            running.zip(logits).map(|((slot, sequence), logits)| Row { slot, logits, sequence }).collect();
        drawn.par_extend(draw(&mut rows, &mut self.samplers));
        Ok(())
    }

    fn end(&mut self, slot: usize) {
        self.slots[slot].sequence = None;
    }

    fn forget(&mut self, group: usize) {
        self.prompts.remove(&group);
    }

    fn first_not_finite(&mut self, tokens: &[u32]) -> Result<Option<usize>> {
        Ok(self.model.first_not_finite(tokens))
    }
}

/// A sequence and the logits of its next token; `None` means those of its prompt.
struct Row<'a> {
    slot: usize,
    logits: Option<&'a [f32]>,
    sequence: &'a mut Sequence,
}

/// Draws one token per row, with the rows divided among the samplers.
fn draw<'a>(rows: &'a mut [Row<'_>], samplers: &'a mut [Sampler]) -> impl ParallelIterator<Item = Drawn> + 'a {
    let share = rows.len().div_ceil(samplers.len()).max(1);
    let runs = rows.par_chunks_mut(share).zip(samplers);
    runs.flat_map_iter(move |(rows, sampler)| rows.iter_mut().map(move |row| row.draw(sampler)))
}

impl Row<'_> {
    fn draw(&mut self, sampler: &mut Sampler) -> Drawn {
        let Sequence { sample, prompt, tokens } = self.sequence;
        let uniform = prompt.stream.uniform(*sample as u64, tokens.len() as u64);
        let logits = self.logits.unwrap_or(&prompt.logits);
        let drawn = sampler.draw(logits, [&prompt.tokens, tokens], uniform, &prompt.sampling);
        tokens.extend(drawn.map(|(token, _)| token));
        Drawn { slot: self.slot, drawn }
    }
}

/// Splits prompts into their common beginning, such as a system prompt, and the rest of each, at least one token. A single prompt has no
/// common beginning.
fn split_stem<'a>(prompts: &[&'a [u32]]) -> (&'a [u32], Vec<&'a [u32]>) {
    let [first, _, ..] = prompts else { return (&[], prompts.to_vec()) };
    let shared = |prompt: &&[u32]| first.iter().zip(&prompt[..prompt.len() - 1]).take_while(|(a, b)| a == b).count();
    let stem = prompts.iter().map(shared).min().unwrap_or(0);
    (&first[..stem], prompts.iter().map(|prompt| &prompt[stem..]).collect())
}

/// Divides prompts into runs of at most `max_tokens`; a longer prompt is a run of its own.
pub(super) fn in_runs<'a, 'b>(mut prompts: &'a [&'b [u32]], max_tokens: usize) -> Vec<&'a [&'b [u32]]> {
    let mut runs = Vec::new();
    while !prompts.is_empty() {
        let mut tokens = 0;
        let fit = prompts.iter().take_while(|prompt| {
            tokens += prompt.len();
            tokens <= max_tokens
        });
        let (run, rest) = prompts.split_at(fit.count().max(1));
        runs.push(run);
        prompts = rest;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_share_what_they_all_begin_with_and_each_keeps_a_token() {
        fn split(prompts: &[&'static [u32]]) -> (&'static [u32], Vec<&'static [u32]>) {
            split_stem(prompts)
        }
        assert_eq!(split(&[&[1, 2, 3, 4], &[1, 2, 5], &[1, 2, 3]]), (&[1, 2][..], vec![&[3, 4][..], &[5], &[3]]));
        assert_eq!(split(&[&[1, 2, 3], &[1, 2]]), (&[1][..], vec![&[2, 3][..], &[2]]));
        assert_eq!(split(&[&[1, 2], &[1, 2, 3]]), (&[1][..], vec![&[2][..], &[2, 3]]));
        assert_eq!(split(&[&[1, 2], &[1, 2]]), (&[1][..], vec![&[2][..], &[2]]));
        assert_eq!(split(&[&[1, 2], &[2, 2]]), (&[][..], vec![&[1, 2][..], &[2, 2]]));
        assert_eq!(split(&[&[1, 2]]), (&[][..], vec![&[1, 2][..]]));
        assert_eq!(split(&[]), (&[][..], vec![]));
    }

    #[test]
    fn runs_of_prompts_are_full_and_a_long_prompt_goes_alone() {
        let prompts: Vec<Vec<u32>> = [3, 3, 9, 2, 4, 1].map(|len| vec![0; len]).to_vec();
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let lengths = |max| -> Vec<Vec<usize>> {
            in_runs(&prompts, max).into_iter().map(|run| run.iter().map(|prompt| prompt.len()).collect()).collect()
        };
        assert_eq!(lengths(6), [vec![3, 3], vec![9], vec![2, 4], vec![1]]);
        assert_eq!(lengths(100), [[3, 3, 9, 2, 4, 1]]);
    }
}
