//! Tiles of attention to selected chunks: what fits shared memory and registers, and which of it is best.

use crate::cuda::target::{Arch, Target};

/// Pairs of a query tile that neighbouring tokens' choices let share a load of a chunk: a guess, on the careful side.
const SHARED_BY: usize = 2;
/// Pairs that a chunk must serve in a tile of warpgroups: two tiles of 64 rows take about 1400 cycles of a multiprocessor for it,
/// a pair chunk by chunk about 450.
pub const WORTH_SHARING: usize = 3;
/// Slots that a lane holds when it looks for what neighbours share.
const HELD_SLOTS: usize = 16;
/// Rows (pair, query head) that a block goes through before it writes its part of dk and dv.
const SLAB_ROWS: usize = 2048;
/// Sizes that are compiled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes of an element.
    pub element: usize,
    pub head_dim: usize,
    pub chunk: usize,
    /// Query heads per key head.
    pub group: usize,
    pub slots: usize,
    /// One softmax over all chosen chunks.
    pub joint: bool,
}

/// How a kernel's tiles are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    pub warps: usize,
    /// Keys of a part; divides the chunk.
    pub keys: usize,
    /// Dynamic shared memory, in bytes.
    pub shared: usize,
    pub blocks_per_sm: usize,
}

impl Sizes {
    /// Elements from row to row of a tile in shared memory.
    fn pitch(&self, cols: usize) -> usize {
        cols + 16 / self.element
    }
    /// Bytes of so many rows of queries, keys or values.
    fn rows(&self, n: usize) -> usize {
        n * self.pitch(self.head_dim) * self.element
    }
    /// Parts a chunk may be cut in, largest first.
    fn keys(&self, most: usize) -> impl Iterator<Item = usize> {
        let chunk = self.chunk;
        (1..=most / 16).rev().map(|k| 16 * k).filter(move |k| chunk.is_multiple_of(*k))
    }
    /// Pairs of a slab.
    pub fn slab(&self) -> usize {
        (SLAB_ROWS / self.group).clamp(1, 256)
    }
    pub(super) fn pairs_bytes(&self) -> usize {
        self.slab() * 8
    }
    /// Tokens that a block of so many rows can touch.
    pub(super) fn tokens(&self, rows: usize) -> usize {
        match self.group {
            g if rows.is_multiple_of(g) => rows / g,
            g if g.is_multiple_of(rows) => 1,
            g => (rows + g - 2) / g + 1,
        }
    }

    /// Bytes of `QueryTile`.
    fn query_tile_bytes(&self, warps: usize, keys: usize) -> usize {
        self.rows(16 * warps + 4 * keys) + 3 * self.slots * 32 * 4
    }
    /// Bytes of `ChunkMajor`.
    fn chunk_major_bytes(&self, warps: usize) -> usize {
        self.rows(2 * self.chunk + 32 * warps) + self.pairs_bytes()
    }
    /// Bytes of `ChunkGrad`.
    pub(super) fn grad_bytes(&self, warps: usize, keys: usize) -> usize {
        let rows = 16 * warps;
        self.rows(2 * keys + 4 * rows) + 2 * rows * self.pitch(keys) * self.element + self.pairs_bytes()
    }
    /// Bytes of `GradStats`, which holds so many keys at once.
    fn stats_bytes(&self, warps: usize, held: usize) -> usize {
        let kept = if held == self.chunk { 1 } else { self.slab() * self.group };
        self.rows(2 * held + 32 * warps) + self.pairs_bytes() + kept * 12
    }
    /// Keys that `GradStats` holds at once, the whole chunk where it fits, and its bytes.
    pub fn stats(&self, t: &Tile, target: &Target) -> (usize, usize) {
        let whole = self.stats_bytes(t.warps, self.chunk);
        if whole <= target.shared_per_block { (self.chunk, whole) } else { (t.keys, self.stats_bytes(t.warps, t.keys)) }
    }

    /// Warps that a multiprocessor can hold where the compiler may give each thread what the tile takes: 16 if the
    /// accumulators and the logits leave room within 128 registers (seen: 127 at head_dim 64, 64 keys, 16 bits), else 8.
    fn warps_by_registers(&self, keys: usize) -> usize {
        let whole = keys == self.chunk && !self.joint;
        let (floats, most) = if whole { (self.head_dim / 2 + keys / 2, 64) } else { (self.head_dim + keys / 2, 48) };
        if self.element == 2 && floats <= most { 16 } else { 8 }
    }

    /// Of all tiles that fit, the one with most warps on a multiprocessor, then most keys, then most warps in a block.
    fn best(
        &self,
        target: &Target,
        warps: &[usize],
        most_keys: usize,
        bytes: impl Fn(usize, usize) -> usize,
        resident: impl Fn(usize) -> usize,
    ) -> Option<Tile> {
        let mut best: Option<(usize, Tile)> = None;
        for keys in self.keys(most_keys) {
            for &warps in warps {
                let shared = bytes(warps, keys);
                let blocks = (resident(keys) / warps).min(target.shared_per_sm / (shared + Target::SHARED_RESERVED));
                if blocks == 0 || shared > target.shared_per_block {
                    continue;
                }
                let tile = Tile { warps, keys, shared, blocks_per_sm: blocks };
                // Small parts of a chunk cost more than few warps gain.
                let worth = (blocks * warps).min(8) * keys.min(32);
                if best.is_none_or(|(w, t)| (worth, blocks * warps, keys) > (w, t.blocks_per_sm * t.warps, t.keys)) {
                    best = Some((worth, tile));
                }
            }
        }
        best.map(|(_, t)| t)
    }

    /// Warps of a query tile.
    fn query_tile_warps(&self) -> Vec<usize> {
        // A lane of a warp holds the choices of a token.
        [8, 4, 2, 1].into_iter().filter(|w| self.tokens(16 * w) <= 32).collect()
    }
    /// Keys of a part, at most: the logits of more and an output beside the total take all registers of f32.
    fn most_keys(&self) -> usize {
        if self.joint && self.element == 4 { 32 } else { 64 }
    }
    /// All tiles of the forward by query tiles, one for each number of warps.
    pub fn query_tiles(&self, target: &Target) -> impl Iterator<Item = Tile> {
        let resident = |keys| self.warps_by_registers(keys);
        let one = move |w| self.best(target, &[w], self.most_keys(), |w, k| self.query_tile_bytes(w, k), resident);
        self.query_tile_warps().into_iter().filter_map(one)
    }
    /// The tile of the forward by query tiles.
    pub fn query_tile(&self, target: &Target) -> Option<Tile> {
        let warps = self.query_tile_warps();
        let resident = |keys| self.warps_by_registers(keys);
        self.best(target, &warps, self.most_keys(), |w, k| self.query_tile_bytes(w, k), resident)
    }
    /// The tile of the forward chunk by chunk, with the whole chunk in shared memory.
    pub fn chunk_major(&self, target: &Target) -> Option<Tile> {
        let resident = |keys| self.warps_by_registers(keys);
        self.best(target, &[4], 64, |w, _| self.chunk_major_bytes(w), resident)
    }
    /// The tile of the gradient.
    pub fn grad(&self, target: &Target) -> Option<Tile> {
        // dk and dv of 64 keys take all registers at 128 columns, and at 96 of f32.
        let most = if self.head_dim > if self.element == 2 { 96 } else { 64 } { 32 } else { 64 };
        let bytes = |w, k| match k {
            // A warp holds dk and dv of 16 keys.
            k if k > 16 * w => usize::MAX / 2,
            k if k == self.chunk || self.joint => self.grad_bytes(w, k),
            k => self.grad_bytes(w, k).max(self.stats_bytes(w, k)),
        };
        self.best(target, &[4, 2, 1], most, bytes, |_| 8)
    }

    /// The tile of the forward chunk by chunk with warpgroups, two of them.
    pub fn chunk_major_hopper(&self, target: &Target) -> Option<Tile> {
        let fits = |n: usize| n == 64 || n == 128;
        if target.arch != Arch::Sm90a || self.element != 2 || !fits(self.head_dim) || !fits(self.chunk) {
            return None;
        }
        let shared = 2 * self.head_dim * (2 * self.chunk + 2 * 2 * 64) + self.pairs_bytes();
        // By registers (seen: 80 at 64 by 64, 128 at 64 by 128).
        let most = match self.head_dim + self.chunk {
            128 => 3,
            192 => 2,
            _ => 1,
        };
        let blocks = most.min(target.shared_per_sm / (shared + Target::SHARED_RESERVED));
        (blocks > 0).then_some(Tile { warps: 8, keys: self.chunk, shared, blocks_per_sm: blocks })
    }
    /// The tile that neighbours who share chunks have on warpgroups: 128 rows.
    pub fn shared_tile(&self, target: &Target) -> Option<Tile> {
        let fits = target.arch == Arch::Sm90a && self.element == 2 && self.head_dim == 64 && self.chunk == 64;
        let divides = 128usize.is_multiple_of(self.group) && self.shared_tokens() <= 32;
        if !fits
            || self.joint
            || !divides
            || self.slots > HELD_SLOTS
            || !(self.slots * self.shared_tokens()).is_multiple_of(4)
        {
            return None;
        }
        let lists = 3 * (8 * self.shared_most() + 4 * self.slots * self.shared_tokens() + 16);
        // Two tiles of queries, two of keys and values; 164 registers, 168 where the two rows of a thread are of two tokens.
        let barriers = 3 * 2 * 8;
        let shared = 2 * 64 * (2 * 128 + 2 * 2 * 64) + lists + barriers;
        let blocks_per_sm = 3.min(target.shared_per_sm / (shared + Target::SHARED_RESERVED));
        (blocks_per_sm > 0).then_some(Tile { warps: 4, keys: 64, shared, blocks_per_sm })
    }
    /// Tokens of a shared tile.
    pub fn shared_tokens(&self) -> usize {
        128 / self.group
    }
    /// Chunks of its union, at most.
    pub fn shared_most(&self) -> usize {
        (self.shared_tokens() * self.slots / WORTH_SHARING).next_multiple_of(2)
    }

    /// The tile of the gradient with a warpgroup.
    pub fn grad_hopper(&self, target: &Target) -> Option<Tile> {
        if target.arch != Arch::Sm90a || self.element != 2 || self.head_dim != 64 || self.chunk != 64 || self.joint {
            return None;
        }
        // Eight tiles of 64 by 64; 168 registers, more where rows must be divided to find their pair.
        let blocks_per_sm = if self.group.is_power_of_two() { 3 } else { 2 };
        Some(Tile { warps: 4, keys: 64, shared: 8 * 64 * 64 * 2 + self.pairs_bytes(), blocks_per_sm })
    }

    /// From how many pairs per chunk on the chunk-major form moves less; `None`: never.
    pub fn chunk_major_from(&self) -> Option<usize> {
        let (tile, pair) = (2 * self.chunk / SHARED_BY, 3 * self.group);
        (tile > pair).then(|| (2 * self.chunk).div_ceil(tile - pair))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(element: usize, head_dim: usize, chunk: usize, group: usize) -> Sizes {
        Sizes { element, head_dim, chunk, group, slots: 8, joint: false }
    }

    #[test]
    fn tiles_of_the_370m_shape() {
        let (s, t) = (sizes(2, 64, 64, 16), Target::of(Arch::Sm80));
        assert_eq!(s.query_tile(&t), Some(Tile { warps: 8, keys: 64, shared: 58368, blocks_per_sm: 2 }));
        assert_eq!(s.chunk_major(&t), Some(Tile { warps: 4, keys: 64, shared: 37888, blocks_per_sm: 4 }));
        assert_eq!(s.grad(&t), Some(Tile { warps: 4, keys: 64, shared: 74752, blocks_per_sm: 2 }));
        assert_eq!((s.slab(), s.tokens(128)), (128, 8));
        assert_eq!((s.chunk_major_hopper(&t), s.grad_hopper(&t)), (None, None));
        let h = Target::of(Arch::Sm90a);
        assert_eq!(s.chunk_major_hopper(&h), Some(Tile { warps: 8, keys: 64, shared: 50176, blocks_per_sm: 3 }));
        assert_eq!(s.shared_tile(&h), Some(Tile { warps: 4, keys: 64, shared: 66928, blocks_per_sm: 3 }));
        assert_eq!((s.shared_tokens(), s.shared_most(), s.shared_tile(&t)), (8, 22, None));
        assert_eq!(s.grad_hopper(&h), Some(Tile { warps: 4, keys: 64, shared: 66560, blocks_per_sm: 3 }));
    }

    #[test]
    fn every_size_has_a_tile_that_fits() {
        for arch in Arch::ALL {
            let t = Target::of(arch);
            for element in [2, 4] {
                for (head_dim, chunk) in (1..=8).flat_map(|d| (1..=16).map(move |c| (16 * d, 16 * c))) {
                    for group in [1, 2, 3, 5, 16, 40, 128, 300] {
                        for joint in [false, true] {
                            let s = Sizes { slots: 64, joint, ..sizes(element, head_dim, chunk, group) };
                            for tile in [s.query_tile(&t), s.grad(&t)] {
                                let tile = tile.unwrap_or_else(|| panic!("no tile for {s:?} on {arch}"));
                                assert!(tile.shared <= t.shared_per_block && chunk % tile.keys == 0, "{s:?}: {tile:?}");
                            }
                            let tile = s.query_tile(&t).unwrap();
                            assert!(s.tokens(16 * tile.warps) <= 32, "{s:?}: {tile:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn chunk_major_pays_where_pairs_are_many_and_groups_small() {
        // 64 rows of a shared chunk against 3·16 of a pair and 128 / ρ of its chunk.
        assert_eq!(sizes(2, 64, 64, 16).chunk_major_from(), Some(8));
        assert_eq!(sizes(2, 64, 64, 1).chunk_major_from(), Some(3));
        assert_eq!(sizes(2, 64, 64, 24).chunk_major_from(), None);
        // ρ does not depend on the element's size or the head's.
        assert_eq!(sizes(4, 16, 64, 4).chunk_major_from(), sizes(2, 128, 64, 4).chunk_major_from());
    }
}
