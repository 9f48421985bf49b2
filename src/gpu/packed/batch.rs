//! The tables by which kernels find sequences among packed rows.

use std::cmp::Reverse;
use std::sync::Arc;

use crate::error::Result;
use crate::gpu::Buffer;
use crate::gpu::driver::{Address, Driver};
use crate::model::Packed;

/// Rows per tile of the attention kernels: `Tiling::OWN` of `attend.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TileRows(
    /// How many rows.
    pub usize,
);

/// Packed sequences on the device, with the tables of the attention kernels.
pub struct PackedBatch {
    numbers: Buffer<u32>,
    at: Places,
    /// T, the number of packed rows.
    pub rows: usize,
    /// Number of tiles of query rows.
    pub query_tiles: usize,
    /// Number of tiles of positions; a prefix counts once for each sequence that continues it.
    pub key_tiles: usize,
    /// Number of positions of all sequences; a prefix counts once for each sequence that continues it.
    pub entries: usize,
}

/// Index of the first word of each table.
struct Places {
    tokens: usize,
    positions: usize,
    owners: usize,
    sequences: usize,
    query_tiles: usize,
    key_tiles: usize,
}

/// The fields of `Sequence` of `attend.cuh` for each sequence, and the number of entries.
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

/// `{sequence, first row}` of each tile, where sequence i has `counts[i]` rows.
fn tiles(counts: impl Iterator<Item = u32>, TileRows(size): TileRows) -> Vec<[u32; 2]> {
    let of = |(i, count): (usize, u32)| (0..count).step_by(size).map(move |first| [i as u32, first]);
    counts.enumerate().flat_map(of).collect()
}

impl PackedBatch {
    /// Copies `packed` to the device.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device fails or has not enough memory.
    pub fn new(driver: &Arc<dyn Driver>, packed: &Packed, tile: TileRows) -> Result<Self> {
        let (sequences, entries) = describe(packed);
        // The longest-running tiles come first, so that none of them starts when all others are done.
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

    /// The token of each row, `(T)`.
    pub(crate) fn tokens(&self) -> Address {
        self.numbers.at(self.at.tokens)
    }

    /// The position of each row, `(T)`, counted from the start of the prefix.
    pub(crate) fn positions(&self) -> Address {
        self.numbers.at(self.at.positions)
    }

    /// The sequence of each row, `(T)`.
    pub(crate) fn owners(&self) -> Address {
        self.numbers.at(self.at.owners)
    }

    /// `Sequence` of `attend.cuh` for each sequence.
    pub(crate) fn sequences(&self) -> Address {
        self.numbers.at(self.at.sequences)
    }

    /// Sequence and first row of each tile of queries, `(query_tiles, 2)`.
    pub(crate) fn query_tile(&self) -> Address {
        self.numbers.at(self.at.query_tiles)
    }

    /// Sequence and first position of each tile of keys, `(key_tiles, 2)`.
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
