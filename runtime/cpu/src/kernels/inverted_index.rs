//! Which tokens chose a chunk: the inverse of a selection, as compressed rows.
//!
//! A counting sort per (sequence, head), so building costs O(tokens·k + chunks) and nothing is ever of size
//! tokens x chunks.  Invariant: the entries of one chunk are in increasing token order, hence sums over them have
//! one fixed order.

use rayon::prelude::*;

/// For every (sequence, head, chunk) the (token, slot) pairs that selected it.
#[derive(Default)]
pub struct InvertedIndex {
    /// Per (sequence, head): `chunks + 1` offsets into its region of `entries`.
    offsets: Vec<u32>,
    /// Per (sequence, head): a region of `l * k`, filled up to its last offset with `token * k + slot`.
    entries: Vec<u32>,
    heads: usize,
    chunks: usize,
    k: usize,
    region: usize,
}

impl InvertedIndex {
    /// The index of `indices` (n, l, heads, k), of which the first `count` (n, l, heads) slots are filled.
    ///
    /// Panics when a filled slot names a chunk outside `0..chunks`.
    pub fn build(
        indices: &[i32],
        count: &[i32],
        n: usize,
        l: usize,
        heads: usize,
        k: usize,
        chunks: usize,
    ) -> InvertedIndex {
        let mut index = InvertedIndex::default();
        index.rebuild(indices, count, n, l, heads, k, chunks);
        index
    }

    /// As [`InvertedIndex::build`], reusing the buffers.
    #[allow(clippy::too_many_arguments)]
    pub fn rebuild(
        &mut self,
        indices: &[i32],
        count: &[i32],
        n: usize,
        l: usize,
        heads: usize,
        k: usize,
        chunks: usize,
    ) {
        assert_eq!(indices.len(), n * l * heads * k, "BUG: indices");
        assert_eq!(count.len(), n * l * heads, "BUG: counts");
        assert!(l * k <= u32::MAX as usize, "BUG: {l} tokens of {k} slots do not fit the index");
        (self.heads, self.chunks, self.k, self.region) = (heads, chunks, k, l * k);
        // Stale entries beyond the last offset are never read, so only a growing buffer is filled.
        self.offsets.resize(n * heads * (chunks + 1), 0);
        self.entries.resize(n * heads * l * k, 0);
        if self.entries.is_empty() {
            self.offsets.fill(0);
            return;
        }
        let tasks = self.offsets.par_chunks_mut(chunks + 1).zip(self.entries.par_chunks_mut(l * k));
        tasks.enumerate().for_each(|(task, (offsets, entries))| {
            let (seq, head) = (task / heads, task % heads);
            let rows = move || {
                (0..l).map(move |t| {
                    let row = (seq * l + t) * heads + head;
                    (t, &indices[row * k..][..count[row] as usize])
                })
            };
            offsets.fill(0);
            for (_, chosen) in rows() {
                for &chunk in chosen {
                    assert!((chunk as usize) < chunks, "BUG: chunk {chunk} of {chunks} selected");
                    offsets[chunk as usize] += 1;
                }
            }
            let mut total = 0;
            for x in offsets.iter_mut() {
                total += std::mem::replace(x, total);
            }
            for (t, chosen) in rows() {
                for (slot, &chunk) in chosen.iter().enumerate() {
                    let at = &mut offsets[chunk as usize];
                    entries[*at as usize] = (t * k + slot) as u32;
                    *at += 1;
                }
            }
            // Every offset has moved to its chunk's end, which is the next chunk's start.
            offsets.copy_within(..chunks, 1);
            offsets[0] = 0;
        });
    }

    /// The entries of one chunk, each `token * k + slot`, in increasing order of tokens.
    pub fn chosen_by(&self, seq: usize, head: usize, chunk: usize) -> &[u32] {
        let row = seq * self.heads + head;
        let offsets = &self.offsets[row * (self.chunks + 1) + chunk..][..2];
        &self.entries[row * self.region..][offsets[0] as usize..offsets[1] as usize]
    }

    /// Slots per token: an entry `e` is token `e / k`, slot `e % k`.
    pub fn k(&self) -> usize {
        self.k
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_every_pair_once_in_token_order() {
        let (n, l, heads, k, chunks) = (2, 9, 3, 4, 5);
        let count: Vec<i32> = (0..n * l * heads).map(|i| (i * 7 % (k + 1)) as i32).collect();
        let indices: Vec<i32> = (0..n * l * heads * k).map(|i| (i * 13 % chunks) as i32).collect();
        let mut index = InvertedIndex::build(&[], &[], 0, 3, 2, 2, 9);
        index.rebuild(&indices, &count, n, l, heads, k, chunks);
        for seq in 0..n {
            for head in 0..heads {
                for chunk in 0..chunks {
                    let mut expected = Vec::new();
                    for t in 0..l {
                        let row = (seq * l + t) * heads + head;
                        for slot in 0..count[row] as usize {
                            if indices[row * k + slot] as usize == chunk {
                                expected.push((t * k + slot) as u32);
                            }
                        }
                    }
                    assert_eq!(index.chosen_by(seq, head, chunk), expected);
                }
            }
        }
    }

    #[test]
    fn empty_shapes() {
        let index = InvertedIndex::build(&[0, 0], &[0], 1, 1, 1, 2, 0);
        assert_eq!(index.k(), 2);
        let index = InvertedIndex::build(&[], &[0, 0], 1, 2, 1, 0, 3);
        assert!(index.chosen_by(0, 0, 2).is_empty());
    }
}
