//! Where sequences stand among packed rows, as the kernels read it.

use std::cmp::Reverse;
use std::sync::Arc;

use crate::error::Result;
use crate::gpu::Buffer;
use crate::gpu::driver::{Address, Driver};
use crate::model::Packed;

/// Rows of one side that a block of the attention holds: `Tiling::OWN` of `kernels/attend.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TileRows(
    /// How many.
    pub usize,
);

/// Packed sequences on the device.
pub struct PackedBatch {
    numbers: Buffer<u32>,
    at: Places,
    /// T.
    pub rows: usize,
    /// Tiles of query rows.
    pub query_tiles: usize,
    /// Tiles of positions, those of prefixes once for each sequence that goes on from them.
    pub key_tiles: usize,
    /// Positions of all sequences, those of prefixes once for each sequence that goes on from them.
    pub entries: usize,
}

/// First number of each array.
struct Places {
    tokens: usize,
    positions: usize,
    owners: usize,
    sequences: usize,
    query_tiles: usize,
    key_tiles: usize,
}

/// `Sequence` of `kernels/attend.cuh`.
fn describe(packed: &Packed) -> (Vec<[u32; 6]>, usize) {
    let len = |i: usize| (packed.starts[i + 1] - packed.starts[i]) as u32;
    let mut entries = 0;
    let mut all: Vec<[u32; 6]> = Vec::with_capacity(packed.prefixes.len());
    for (i, prefix) in packed.prefixes.iter().enumerate() {
        let (prefix_start, prefix_len) = prefix.map_or((0, 0), |prefix| (packed.starts[prefix] as u32, len(prefix)));
        all.push([packed.starts[i] as u32, len(i), prefix_start, prefix_len, entries, 0]);
        entries += prefix_len + len(i);
        if let Some(prefix) = *prefix {
            all[prefix][5] += 1;
        }
    }
    (all, entries as usize)
}

/// `{sequence, first}` of each tile of `counts[sequence]` rows.
fn tiles(counts: impl Iterator<Item = u32>, TileRows(size): TileRows) -> Vec<[u32; 2]> {
    let of = |(i, count): (usize, u32)| (0..count).step_by(size).map(move |first| [i as u32, first]);
    counts.enumerate().flat_map(of).collect()
}

impl PackedBatch {
    /// Copies `packed` to the device.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device fails or has no room.
    pub fn new(driver: &Arc<dyn Driver>, packed: &Packed, tile: TileRows) -> Result<Self> {
        let (sequences, entries) = describe(packed);
        // Tiles whose blocks work longest come first, so that none of them begins when the others are done.
        let mut query_tiles = tiles(sequences.iter().map(|one| one[1]), tile);
        query_tiles.sort_by_key(|&[i, first]| Reverse(sequences[i as usize][3] + first));
        let mut key_tiles = tiles(sequences.iter().map(|one| one[1] + one[3]), tile);
        key_tiles.sort_by_key(|&[i, first]| {
            let [_, len, _, prefix_len, ..] = sequences[i as usize];
            Reverse(prefix_len + len - first.max(prefix_len))
        });
        let owners = sequences.iter().enumerate().flat_map(|(i, one)| std::iter::repeat_n(i as u32, one[1] as usize));
        let mut numbers: Vec<u32> = Vec::new();
        let mut lay = |part: &[u32]| {
            numbers.resize(numbers.len().next_multiple_of(4), 0);
            numbers.extend(part);
            numbers.len() - part.len()
        };
        let at = Places {
            tokens: lay(&packed.tokens),
            positions: lay(&packed.positions()),
            owners: lay(&owners.collect::<Vec<_>>()),
            sequences: lay(sequences.as_flattened()),
            query_tiles: lay(query_tiles.as_flattened()),
            key_tiles: lay(key_tiles.as_flattened()),
        };
        let (query_tiles, key_tiles, rows) = (query_tiles.len(), key_tiles.len(), packed.tokens.len());
        Ok(Self { numbers: Buffer::from_slice(driver, &numbers)?, at, rows, query_tiles, key_tiles, entries })
    }

    /// `(T)`.
    pub(crate) fn tokens(&self) -> Address {
        self.numbers.at(self.at.tokens)
    }

    /// `(T)`, counted from the start of the prefix.
    pub(crate) fn positions(&self) -> Address {
        self.numbers.at(self.at.positions)
    }

    /// `(T)`: the sequence of each row.
    pub(crate) fn owners(&self) -> Address {
        self.numbers.at(self.at.owners)
    }

    pub(crate) fn sequences(&self) -> Address {
        self.numbers.at(self.at.sequences)
    }

    /// `(query_tiles, 2)`: sequence, first row in it.
    pub(crate) fn query_tile(&self) -> Address {
        self.numbers.at(self.at.query_tiles)
    }

    /// `(key_tiles, 2)`: sequence, first position in it.
    pub(crate) fn key_tile(&self) -> Address {
        self.numbers.at(self.at.key_tiles)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_of_a_prefix_count_once_for_each_that_goes_on_from_it() {
        let packed =
            Packed { tokens: vec![0; 12], starts: vec![0, 3, 8, 9, 12], prefixes: vec![None, None, Some(1), Some(1)] };
        let (sequences, entries) = describe(&packed);
        assert_eq!(sequences[1], [3, 5, 0, 0, 3, 2]);
        assert_eq!(sequences[3], [9, 3, 3, 5, 14, 0]);
        assert_eq!(entries, 22);
        let counts = sequences.iter().map(|one| one[1]);
        assert_eq!(tiles(counts, TileRows(4)), [[0, 0], [1, 0], [1, 4], [2, 0], [3, 0]]);
    }
}
