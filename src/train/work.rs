//! Runs this rank's share of a step's sequences through the model, and brings together what all ranks found.

use crate::error::Result;
use crate::model::TokenStats;
use crate::train::microbatch::{self, MicroBatch, Sequence};
use crate::train::ranks::all_stats;
use crate::train::trainer::Trainer;

/// The sequences of a step, shared out.
pub struct Work<'a> {
    /// Prompts and completions.
    pub sequences: &'a [Sequence<'a>],
    /// The rank that each belongs to.
    pub owners: &'a [usize],
    /// The most tokens in the model at once.
    pub max_tokens: usize,
}

/// A pass over one micro-batch, given the index of the list that its sequences are from: the statistics of its targets, in order.
pub type Pass<'a> = &'a mut dyn FnMut(&mut Trainer, usize, &MicroBatch) -> Result<Vec<TokenStats>>;

impl Work<'_> {
    /// Passes over each rank's sequences in these lists of indices; returns the statistics of every sequence's tokens.
    ///
    /// # Errors
    /// Those of `pass`, on whatever rank.
    pub fn run(&self, trainer: &mut Trainer, lists: &[&[usize]], pass: Pass<'_>) -> Result<Vec<Vec<TokenStats>>> {
        let own = self.run_own(trainer, lists, pass);
        all_stats(trainer.ranks(), self.owners, own)
    }

    fn run_own(&self, trainer: &mut Trainer, lists: &[&[usize]], pass: Pass<'_>) -> Result<Vec<Vec<TokenStats>>> {
        let (rank, mut all) = (trainer.ranks().rank(), vec![Vec::new(); self.sequences.len()]);
        for (list, members) in lists.iter().enumerate() {
            let own: Vec<usize> = members.iter().copied().filter(|&member| self.owners[member] == rank).collect();
            for run in microbatch::cut(self.sequences, &own, self.max_tokens) {
                let batch = microbatch::pack(self.sequences, &run);
                let stats = pass(trainer, list, &batch)?;
                batch.origins.iter().zip(stats).for_each(|(&(member, _), stats)| all[member].push(stats));
            }
        }
        Ok(all)
    }
}
