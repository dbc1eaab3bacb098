//! Chunk selection: for every token and head the best visible chunks by landmark score, and their weights.
//!
//! ```text
//! score[t,c] = scale * q_t · landmark_c          visible only if t >= (c+1) * chunk
//! take the k best, order them, weigh their scores (arXiv 2504.16795)
//! ```
//!
//! Scores live in blocks of `TOKENS` x `PANEL` only; a row's k-th best score rejects most of a block before any
//! insertion.  Invariants: equal scores are won by the smaller chunk index; unfilled slots hold index 0, weight 0,
//! score 0; the choice itself has no gradient.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::attn_micro::{Left, Product, carve, carved, pack_row, pack_transposed, padded};
use super::inverted_index::InvertedIndex;
use crate::par::with_scratch;
use crate::{Mat, MatMut};

/// Tokens of one task.
const TOKENS: usize = 128;
/// Chunks scored at a time.
const PANEL: usize = 64;

/// How the selected scores become weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weighting {
    /// `w_i = σ(s_i) Π_{j<i} (1 - σ(s_j))`, in the list's order.
    StickBreaking,
    /// Softmax over the filled slots.
    Softmax,
    /// `σ(s_i)`.
    Sigmoid,
    /// 1 for every filled slot; no gradient.
    One,
}

/// The order of a token's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Largest chunk index first.
    Recent,
    /// Best score first; equal scores by smaller index.
    Score,
}

/// Shapes and rules of a selection.
///
/// `q` is (n·l x heads·dim), landmarks are (n, chunks, heads, dim); indices, weights and scores (n, l, heads, k),
/// counts (n, l, heads).
#[derive(Clone, Copy, Debug)]
pub struct Selection {
    pub n: usize,
    pub l: usize,
    pub heads: usize,
    pub dim: usize,
    /// Landmarks per sequence; may be 0 and may be more than any token sees.
    pub chunks: usize,
    /// Slots per token; may exceed `chunks`.
    pub k: usize,
    /// Tokens per chunk.
    pub chunk: usize,
    pub scale: f32,
    pub order: Order,
    pub weighting: Weighting,
}

impl Selection {
    /// Chunks that the token at absolute position `t` sees.
    fn visible(&self, t: usize) -> usize {
        (t / self.chunk).min(self.chunks)
    }

    /// Selects and weighs.  `start[n]` is the absolute position of each sequence's row 0; every output is overwritten.
    #[allow(clippy::too_many_arguments)]
    pub fn forward(
        &self,
        q: Mat,
        landmarks: &[f32],
        start: &[i32],
        indices: &mut [i32],
        count: &mut [i32],
        weights: &mut [f32],
        scores: &mut [f32],
    ) {
        self.check(q, landmarks, indices, count);
        assert_eq!(start.len(), self.n, "BUG: one start per sequence");
        assert!(weights.len() == indices.len() && scores.len() == indices.len(), "BUG: weights, scores");
        indices.fill(0);
        scores.fill(0.0);
        let Selection { l, heads, dim, chunks, k, .. } = *self;
        if self.n * l * heads == 0 {
            return;
        }
        if k == 0 {
            count.fill(0);
            return;
        }
        let panel = dim * PANEL;
        let panels = chunks.div_ceil(PANEL);
        let arch = Arch::new();
        // Several blocks of tokens share the transposed landmarks; a single one transposes as it goes.
        let shared = l > TOKENS;
        with_scratch(if shared { self.n * heads * panels * panel } else { 0 }, |packed| {
            if shared && panel > 0 {
                packed.par_chunks_mut(panel).enumerate().for_each(|(i, out)| {
                    let (seq, head, first) = (i / panels / heads, i / panels % heads, i % panels * PANEL);
                    if first < self.visible(start[seq] as usize + l - 1) {
                        pack_transposed(self.landmarks(landmarks, seq, head, first), PANEL, out);
                    }
                });
            }
            let packed = &*packed;
            let rows = l * heads;
            let sequences = (indices.par_chunks_mut(rows * k), count.par_chunks_mut(rows))
                .into_par_iter()
                .zip((weights.par_chunks_mut(rows * k), scores.par_chunks_mut(rows * k)));
            sequences.enumerate().for_each(|(seq, ((indices, count), (weights, scores)))| {
                let rows = TOKENS * heads;
                let blocks = (indices.par_chunks_mut(rows * k), count.par_chunks_mut(rows))
                    .into_par_iter()
                    .zip((weights.par_chunks_mut(rows * k), scores.par_chunks_mut(rows * k)));
                blocks.enumerate().for_each(|(block, ((indices, count), (weights, scores)))| {
                    let first = block * TOKENS;
                    let q = q.block(seq * l + first, count.len() / heads, 0, heads * dim);
                    let start = start[seq] as usize + first;
                    let packed = shared.then(|| &packed[seq * heads * panels * panel..][..heads * panels * panel]);
                    let tokens = TOKENS.min(l);
                    let sizes = [tokens * padded(dim), panel, tokens * PANEL];
                    with_scratch(carved(&sizes), |scratch| {
                        let [rows, transposed, tile] = carve(scratch, sizes);
                        for head in 0..heads {
                            arch.dispatch(SelectBlock {
                                rules: self,
                                q: q.block(0, q.rows(), head * dim, dim),
                                landmarks,
                                packed,
                                seq,
                                head,
                                start,
                                rows,
                                transposed,
                                tile,
                                indices,
                                count,
                                scores,
                            });
                        }
                    });
                    self.arrange(indices, count, scores);
                    weigh(self.weighting, scores, count, k, weights);
                });
            });
        });
    }

    /// Gradients of `q` and the landmarks (both overwritten) from `dweights`, the gradient of the weights;
    /// `indices`, `count`, `scores` and `weights` are what `forward` wrote.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        q: Mat,
        landmarks: &[f32],
        indices: &[i32],
        count: &[i32],
        scores: &[f32],
        weights: &[f32],
        dweights: &[f32],
        dq: MatMut,
        dlandmarks: &mut [f32],
    ) {
        self.check(q, landmarks, indices, count);
        let Selection { n, l, heads, dim, chunks, k, .. } = *self;
        assert!(dq.rows() == q.rows() && dq.cols() == q.cols(), "BUG: dq");
        assert_eq!(dlandmarks.len(), landmarks.len(), "BUG: dlandmarks");
        assert!([scores, weights, dweights].iter().all(|x| x.len() == indices.len()), "BUG: scores, weights");
        let arch = Arch::new();
        let mut ds = vec![0.0; indices.len()];
        if k > 0 && heads > 0 {
            // The slope of the scores, times the scale: what each pair contributes.
            ds.par_chunks_mut(TOKENS * k).enumerate().for_each(|(i, ds)| {
                let range = i * TOKENS * k..i * TOKENS * k + ds.len();
                let count = &count[i * TOKENS..][..ds.len() / k];
                let (scores, weights) = (&scores[range.clone()], &weights[range.clone()]);
                weigh_backward(self.weighting, scores, weights, count, k, &dweights[range], ds);
                ds.iter_mut().for_each(|x| *x *= self.scale);
            });
        }
        let ds = &ds[..];
        let row_of = |seq: usize, chunk: usize, head: usize| ((seq * chunks + chunk) * heads + head) * dim;
        (0..n * l).into_par_iter().with_min_len(16).for_each(|row| {
            // SAFETY: every task has its own row.
            let out = unsafe { dq.row_unchecked(row) };
            for (head, out) in out.chunks_exact_mut(dim.max(1)).enumerate() {
                let first = (row * heads + head) * k;
                let pairs = || first..first + count[row * heads + head] as usize;
                let line = |i: usize| &landmarks[row_of(row / l, indices[i] as usize, head)..][..dim];
                arch.dispatch(Combine { out, terms: pairs().map(|i| (ds[i], line(i))) });
            }
        });
        let index = InvertedIndex::build(indices, count, n, l, heads, k, chunks);
        dlandmarks.par_chunks_mut(dim.max(1)).enumerate().for_each(|(i, out)| {
            let (seq, chunk, head) = (i / heads / chunks, i / heads % chunks, i % heads);
            let terms = index.chosen_by(seq, head, chunk).iter().map(|&entry| {
                let (token, slot) = (entry as usize / k, entry as usize % k);
                let row = seq * l + token;
                (ds[(row * heads + head) * k + slot], &q.row(row)[head * dim..][..dim])
            });
            arch.dispatch(Combine { out, terms });
        });
    }

    fn check(&self, q: Mat, landmarks: &[f32], indices: &[i32], count: &[i32]) {
        assert!(self.chunk > 0, "BUG: chunks of no tokens");
        assert!(q.rows() == self.n * self.l && q.cols() == self.heads * self.dim, "BUG: q");
        assert_eq!(landmarks.len(), self.n * self.chunks * self.heads * self.dim, "BUG: landmarks");
        assert_eq!(count.len(), self.n * self.l * self.heads, "BUG: counts");
        assert_eq!(indices.len(), count.len() * self.k, "BUG: indices");
    }

    /// Up to [`PANEL`] landmarks of a head from chunk `first` on, as rows.
    fn landmarks<'a>(&self, landmarks: &'a [f32], seq: usize, head: usize, first: usize) -> Mat<'a> {
        let row = self.heads * self.dim;
        let sequence = Mat::new(&landmarks[seq * self.chunks * row..][..self.chunks * row], self.chunks, row);
        sequence.block(first, (self.chunks - first).min(PANEL), head * self.dim, self.dim)
    }

    /// Puts lists that are best first into the final order.
    fn arrange(&self, indices: &mut [i32], count: &[i32], scores: &mut [f32]) {
        if self.order == Order::Score {
            return;
        }
        for ((indices, scores), &count) in
            indices.chunks_exact_mut(self.k).zip(scores.chunks_exact_mut(self.k)).zip(count)
        {
            // Insertion sort: lists are short and often nearly ordered.
            for i in 1..count as usize {
                let mut at = i;
                while at > 0 && indices[at - 1] < indices[at] {
                    indices.swap(at - 1, at);
                    scores.swap(at - 1, at);
                    at -= 1;
                }
            }
        }
    }
}

/// Selection of one head for a block of tokens; leaves lists best first.
struct SelectBlock<'a> {
    rules: &'a Selection,
    /// The block's queries of this head.
    q: Mat<'a>,
    landmarks: &'a [f32],
    /// The sequence's transposed landmarks (heads, panels, dim, PANEL), if they were made beforehand.
    packed: Option<&'a [f32]>,
    seq: usize,
    head: usize,
    /// Position of the block's first token.
    start: usize,
    rows: &'a mut [f32],
    transposed: &'a mut [f32],
    tile: &'a mut [f32],
    /// (tokens, heads, k).
    indices: &'a mut [i32],
    count: &'a mut [i32],
    scores: &'a mut [f32],
}

impl WithSimd for SelectBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let SelectBlock { rules, q, rows, transposed, tile, .. } = self;
        let Selection { heads, dim, chunks, k, .. } = *rules;
        let (tokens, width) = (q.rows(), padded(dim));
        for (t, row) in rows.chunks_exact_mut(width.max(1)).take(tokens).enumerate() {
            pack_row(q.row(t), rules.scale, row, dim);
        }
        for t in 0..tokens {
            self.count[t * heads + self.head] = 0;
        }
        for first in (0..rules.visible(self.start + tokens - 1)).step_by(PANEL) {
            let b = match self.packed {
                Some(all) => &all[(self.head * chunks.div_ceil(PANEL) + first / PANEL) * dim * PANEL..][..dim * PANEL],
                None => {
                    pack_transposed(rules.landmarks(self.landmarks, self.seq, self.head, first), PANEL, transposed);
                    &*transposed
                }
            };
            // Tokens that see nothing of this panel need no scores.
            let skip = ((first + 1) * rules.chunk).saturating_sub(self.start).min(tokens);
            simd.vectorize(Product {
                m: tokens - skip,
                n: PANEL,
                k: dim,
                a: Left::rows(&rows[skip * width..], width),
                b,
                b_row: PANEL,
                c: &mut tile[skip * PANEL..],
                c_row: PANEL,
                accumulate: false,
            });
            for t in skip..tokens {
                let visible = (rules.visible(self.start + t) - first).min(PANEL);
                let row = t * heads + self.head;
                let mut list = List {
                    indices: &mut self.indices[row * k..][..k],
                    scores: &mut self.scores[row * k..][..k],
                    count: self.count[row] as usize,
                };
                list.merge(simd, &tile[t * PANEL..][..visible], first);
                self.count[row] = list.count as i32;
            }
        }
    }
}

/// A token's best chunks so far, best first.
struct List<'a> {
    indices: &'a mut [i32],
    scores: &'a mut [f32],
    count: usize,
}

impl List<'_> {
    /// Takes in the scores of chunks `first..`; chunks come in increasing order.
    #[inline(always)]
    fn merge<S: Simd>(&mut self, simd: S, scores: &[f32], first: usize) {
        let fill = (self.indices.len() - self.count).min(scores.len());
        for (i, &score) in scores[..fill].iter().enumerate() {
            self.count += 1;
            self.insert(score, first + i);
        }
        // A later chunk has to be strictly better than the worst of the list.
        let last = self.scores.len() - 1;
        let mut at = fill;
        let (vectors, tail) = S::as_simd_f32s(&scores[fill..]);
        for &vector in vectors {
            let better = simd.greater_than_f32s(vector, simd.splat_f32s(self.scores[last]));
            // Only whether any lane is set: with AVX-512 masks pulp 0.22 counts lanes from the wrong end.
            if simd.first_true_m32s(better) < S::F32_LANES {
                for i in 0..S::F32_LANES {
                    if scores[at + i] > self.scores[last] {
                        self.insert(scores[at + i], first + at + i);
                    }
                }
            }
            at += S::F32_LANES;
        }
        for (i, &score) in tail.iter().enumerate() {
            if score > self.scores[last] {
                self.insert(score, first + at + i);
            }
        }
    }

    /// Puts an entry into its place, over the list's last one.
    #[inline(always)]
    fn insert(&mut self, score: f32, chunk: usize) {
        let mut at = self.count - 1;
        while at > 0 && score > self.scores[at - 1] {
            self.scores[at] = self.scores[at - 1];
            self.indices[at] = self.indices[at - 1];
            at -= 1;
        }
        self.scores[at] = score;
        self.indices[at] = chunk as i32;
    }
}

/// `out = Σ factor * row` over the terms, in their order.
struct Combine<'a, I> {
    out: &'a mut [f32],
    terms: I,
}

impl<'a, I: Iterator<Item = (f32, &'a [f32])>> WithSimd for Combine<'_, I> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (out, out_tail) = S::as_mut_simd_f32s(self.out);
        out.fill(simd.splat_f32s(0.0));
        out_tail.fill(0.0);
        for (factor, row) in self.terms {
            let (row, tail) = S::as_simd_f32s(row);
            let f = simd.splat_f32s(factor);
            for (y, &x) in out.iter_mut().zip(row) {
                *y = simd.mul_add_e_f32s(f, x, *y);
            }
            for (y, &x) in out_tail.iter_mut().zip(tail) {
                *y += factor * x;
            }
        }
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// `ln(1 + e^x)`.
fn softplus(x: f32) -> f32 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// Weights of selected scores: rows of `k`, of which the first `count` are filled; the others get weight 0.
pub fn weigh(rule: Weighting, scores: &[f32], count: &[i32], k: usize, out: &mut [f32]) {
    if k == 0 {
        return;
    }
    for ((s, w), &count) in scores.chunks_exact(k).zip(out.chunks_exact_mut(k)).zip(count) {
        let (w, unfilled) = w.split_at_mut(count as usize);
        unfilled.fill(0.0);
        match rule {
            Weighting::StickBreaking => {
                let mut left = 0.0;
                for (w, &s) in w.iter_mut().zip(s) {
                    left += softplus(s);
                    *w = (s - left).exp();
                }
            }
            Weighting::Softmax => {
                let max = s[..w.len()].iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let mut sum = 0.0;
                for (w, &s) in w.iter_mut().zip(s) {
                    *w = (s - max).exp();
                    sum += *w;
                }
                w.iter_mut().for_each(|w| *w /= sum);
            }
            Weighting::Sigmoid => w.iter_mut().zip(s).for_each(|(w, &s)| *w = sigmoid(s)),
            Weighting::One => w.fill(1.0),
        }
    }
}

/// Gradient of the scores from `dweights`, the gradient of [`weigh`]'s weights; unfilled slots get 0.
///
/// Stick-breaking: `ds_m = w_m g_m - σ(s_m) Σ_{i>=m} w_i g_i`.
pub fn weigh_backward(
    rule: Weighting,
    scores: &[f32],
    weights: &[f32],
    count: &[i32],
    k: usize,
    dweights: &[f32],
    out: &mut [f32],
) {
    if k == 0 {
        return;
    }
    let rows = scores.chunks_exact(k).zip(weights.chunks_exact(k)).zip(dweights.chunks_exact(k));
    for ((((s, w), g), ds), &count) in rows.zip(out.chunks_exact_mut(k)).zip(count) {
        let (ds, unfilled) = ds.split_at_mut(count as usize);
        unfilled.fill(0.0);
        match rule {
            Weighting::StickBreaking => {
                let mut rest = 0.0;
                for i in (0..ds.len()).rev() {
                    rest += w[i] * g[i];
                    ds[i] = w[i] * g[i] - sigmoid(s[i]) * rest;
                }
            }
            Weighting::Softmax => {
                let mean: f32 = w[..ds.len()].iter().zip(g).map(|(w, g)| w * g).sum();
                ds.iter_mut().zip(w).zip(g).for_each(|((ds, w), g)| *ds = w * (g - mean));
            }
            Weighting::Sigmoid => ds.iter_mut().zip(w).zip(g).for_each(|((ds, w), g)| *ds = g * w * (1.0 - w)),
            Weighting::One => ds.fill(0.0),
        }
    }
}
