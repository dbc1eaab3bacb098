//! Which tokens chose a chunk: the inverse of a selection, as compressed rows.
//!
//! A counting sort per (sequence, head), so building costs O(tokens·k + chunks) and nothing is ever of size
//! tokens x chunks.  Invariant: the entries of one chunk are in increasing token order, hence sums over them have
//! one fixed order.

use rayon::prelude::*;

/// For every (sequence, head, chunk) the (token, slot) pairs that selected it.
pub struct InvertedIndex<'a> {
    /// Per (sequence, head): `chunks + 1` offsets into its region of `entries`.
    offsets: &'a [u32],
    /// Per (sequence, head): a region of `l * k`, filled up to its last offset with `token * k + slot`.
    entries: &'a [u32],
    heads: usize,
    chunks: usize,
    k: usize,
    region: usize,
}

impl<'a> InvertedIndex<'a> {
    /// Words that an index takes: its offsets and its entries.
    pub fn words(n: usize, l: usize, heads: usize, k: usize, chunks: usize) -> usize {
        n * heads * (chunks + 1 + l * k)
    }

    /// The index of `indices` (n, l, heads, k), of which the first `count` (n, l, heads) slots are filled, in memory of
    /// [`words`](Self::words).
    ///
    /// Panics when a filled slot names a chunk outside `0..chunks`.
    #[allow(clippy::too_many_arguments)]
    pub fn build(
        memory: &'a mut [u32],
        indices: &[i32],
        count: &[i32],
        n: usize,
        l: usize,
        heads: usize,
        k: usize,
        chunks: usize,
    ) -> InvertedIndex<'a> {
        assert_eq!(indices.len(), n * l * heads * k, "BUG: indices");
        assert_eq!(count.len(), n * l * heads, "BUG: counts");
        assert!(l * k <= u32::MAX as usize, "BUG: {l} tokens of {k} slots do not fit the index");
        assert!(memory.len() >= Self::words(n, l, heads, k, chunks), "BUG: {} words for an index", memory.len());
        let (offsets, entries) = memory.split_at_mut(n * heads * (chunks + 1));
        // Entries beyond the last offset are never read.
        let entries = &mut entries[..n * heads * l * k];
        if entries.is_empty() {
            offsets.fill(0);
            return Self { offsets, entries, heads, chunks, k, region: l * k };
        }
        let tasks = offsets.par_chunks_mut(chunks + 1).zip(entries.par_chunks_mut(l * k));
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
        Self { offsets, entries, heads, chunks, k, region: l * k }
    }

    /// The entries of one chunk, each `token * k + slot`, in increasing order of tokens.
    pub fn chosen_by(&self, seq: usize, head: usize, chunk: usize) -> &'a [u32] {
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
        let mut memory = vec![u32::MAX; InvertedIndex::words(n, l, heads, k, chunks)];
        let index = InvertedIndex::build(&mut memory, &indices, &count, n, l, heads, k, chunks);
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
        let mut memory = [u32::MAX; 8];
        let index = InvertedIndex::build(&mut memory, &[0, 0], &[0], 1, 1, 1, 2, 0);
        assert_eq!(index.k(), 2);
        let index = InvertedIndex::build(&mut memory, &[], &[0, 0], 1, 2, 1, 0, 3);
        assert!(index.chosen_by(0, 0, 2).is_empty());
    }
}
