//! The KV cache, in the layout that attention reads (see [`super::attention`]).

use super::attention::{Heads, Segment};
use super::config::Config;
use super::simd::LANES;
use crate::numbers::aligned::AlignedVec;

/// Keys (after rope) and values of consecutive positions in every layer. Memory for `capacity` positions is allocated at once.
pub struct KvCache {
    width: usize,
    capacity: usize,
    len: usize,
    /// `(K * E, capacity)` per layer.
    keys: Vec<AlignedVec<f32>>,
    /// `(capacity, K * E)` per layer.
    values: Vec<AlignedVec<f32>>,
}

impl KvCache {
    /// An empty cache with room for `capacity` positions.
    #[must_use]
    pub fn new(config: &Config, capacity: usize) -> Self {
        let (width, capacity) = (config.kv_width(), capacity.next_multiple_of(LANES));
        let layers = || (0..config.num_hidden_layers).map(|_| AlignedVec::zeros(width * capacity)).collect();
        Self { width, capacity, len: 0, keys: layers(), values: layers() }
    }

    /// Positions held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Drops all positions and keeps the memory.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Writes one layer's part of the position `len + ahead` from a row of queries, keys and values.
    pub(super) fn write(&mut self, layer: usize, ahead: usize, heads: Heads, row: &[f32]) {
        let position = self.len + ahead;
        assert!(position < self.capacity, "the engine reserves room for every token it may sample");
        let (keys, values) = row[heads.queries * heads.dim..].split_at(self.width);
        for (i, &key) in keys.iter().enumerate() {
            self.keys[layer][i * self.capacity + position] = key;
        }
        self.values[layer][position * self.width..][..self.width].copy_from_slice(&values[..self.width]);
    }

    /// Marks `positions` more positions as held, once all layers have written theirs.
    pub(super) fn advance(&mut self, positions: usize) {
        self.len += positions;
    }

    /// One layer's positions, including `ahead` that are written but not yet marked as held.
    pub(super) fn segment(&self, layer: usize, ahead: usize) -> Segment<'_> {
        let (keys, values) = (&self.keys[layer], &self.values[layer]);
        Segment { keys, capacity: self.capacity, values, stride: self.width, len: self.len + ahead }
    }
}
