//! Rotary position embedding: tables of cosines and sines, and the rotation of heads by them.

mod frequencies;
mod parameters;
mod spelling;

use std::sync::OnceLock;

use rayon::prelude::*;

use super::ops::ROW_BLOCK;

use spelling::DEFAULT_THETA;

pub use parameters::{Llama3, RopeParameters, Scaling, Yarn};
pub use spelling::Spelling;

/// Positions whose table is computed together, when the first of them is needed: a model of a million positions loads as fast as any.
const BLOCK: usize = 1024;

/// Cosines and sines of the rotary positions.
pub struct RotaryTable {
    /// Angle per position of each pair of numbers in a head, `(E / 2)` (rad).
    frequencies: Vec<f32>,
    /// Factor of cosines and sines.
    scale: f32,
    positions: usize,
    blocks: Vec<OnceLock<Block>>,
}

/// The table of [`BLOCK`] positions, fewer in the last block, `(BLOCK, E / 2)` each.
struct Block {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// The direction of a rotation: backward for the gradient.
#[derive(Clone, Copy)]
pub enum Turn {
    /// By the position's angle.
    Forward,
    /// By its negative, scaled alike: the transpose.
    Backward,
}

impl RotaryTable {
    /// A table for positions `0..positions`, in f32 whatever type the weights have: bf16 angles are wrong beyond a few hundred tokens.
    pub fn new(parameters: &RopeParameters, head_dim: usize, positions: usize) -> Self {
        let (frequencies, scale) = parameters.frequencies(head_dim);
        let blocks = (0..positions.div_ceil(BLOCK)).map(|_| OnceLock::new()).collect();
        Self { frequencies, scale, positions, blocks }
    }

    /// The number of positions.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Cosines, then sines of the first `positions` positions, `(positions, E / 2)` each.
    pub fn table(&self, positions: usize) -> Vec<f32> {
        let (half, blocks) = (self.frequencies.len(), positions.div_ceil(BLOCK));
        let of = |part: fn(&Block) -> &[f32]| {
            let all = (0..blocks).into_par_iter().flat_map_iter(|at| part(self.block(at)).iter().copied());
            let mut all: Vec<f32> = all.collect();
            all.truncate(positions * half);
            all
        };
        let (mut table, sines) = (of(|block| &block.cos), of(|block| &block.sin));
        table.extend(sines);
        table
    }

    /// Computes the block on this thread alone: while waiting for others it could be given a task that waits for the same block.
    fn block(&self, at: usize) -> &Block {
        self.blocks[at].get_or_init(|| {
            let angles = (BLOCK * at..self.positions.min(BLOCK * (at + 1)))
                .flat_map(|position| self.frequencies.iter().map(move |frequency| position as f32 * frequency));
            let turned = angles.map(f32::sin_cos).map(|(sin, cos)| (cos * self.scale, sin * self.scale));
            let (cos, sin) = turned.unzip();
            Block { cos, sin }
        })
    }

    /// Cosines and sines of a position, `(E / 2)` each.
    fn row(&self, position: usize) -> (&[f32], &[f32]) {
        let (block, half) = (self.block(position / BLOCK), self.frequencies.len());
        let at = position % BLOCK * half;
        (&block.cos[at..at + half], &block.sin[at..at + half])
    }

    /// Rotates the first `heads` heads of each row of `x`, `(T, stride)`, in place.
    pub fn apply(&self, x: &mut [f32], stride: usize, heads: usize, positions: &[u32], turn: Turn) {
        let half = self.frequencies.len();
        x.par_chunks_mut(ROW_BLOCK * stride).zip(positions.par_chunks(ROW_BLOCK)).for_each(|(x, positions)| {
            for (row, &position) in x.chunks_exact_mut(stride).zip(positions) {
                let (cos, sin) = self.row(position as usize);
                for head in row.chunks_exact_mut(2 * half).take(heads) {
                    let (first, second) = head.split_at_mut(half);
                    for i in 0..half {
                        let sin = match turn {
                            Turn::Forward => sin[i],
                            Turn::Backward => -sin[i],
                        };
                        let (a, b) = (first[i], second[i]);
                        first[i] = a * cos[i] - b * sin;
                        second[i] = b * cos[i] + a * sin;
                    }
                }
            }
        });
    }
}
