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

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::attn_micro::{Left, Product, carve, carved, pack_row, pack_transposed, padded};
use super::inverted_index::InvertedIndex;
use crate::par::{floats_of, plain, with_scratch};
use crate::{Mat, MatMut, RowShape, Rows, simd};
use std::ops::Range;

/// Tokens of one task.
const TOKENS: usize = 128;
/// Chunks scored at a time.
const PANEL: usize = 64;
/// Paged landmarks read at a time; a multiple of PANEL.
const LOAD: usize = 256;
/// Where few tokens meet more chunks than this, so many are one task; a multiple of LOAD.
const SPLIT: usize = 1 << 14;

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
    /// The scores themselves, -inf where nothing is chosen.
    Logit,
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
/// `q` is (n·l x heads·dim), landmarks are (n, chunks, heads, dim) or paged; indices, weights and scores (n, l, heads, k),
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
        landmarks: Rows,
        start: &[i32],
        indices: &mut [i32],
        count: &mut [i32],
        weights: &mut [f32],
        scores: &mut [f32],
    ) {
        self.check(q, indices, count);
        if let Rows::Dense(x) = landmarks {
            self.check_landmarks(x);
        }
        assert_eq!(start.len(), self.n, "BUG: one start per sequence");
        assert!(weights.len() == indices.len() && scores.len() == indices.len(), "BUG: weights, scores");
        indices.fill(0);
        scores.fill(0.0);
        count.fill(0);
        let Selection { l, heads, k, .. } = *self;
        if self.n * l * heads * k == 0 {
            return;
        }
        let rows = l * heads;
        let job = Job { rules: self, q, landmarks, start };
        let furthest = start.iter().map(|&s| self.visible(s as usize + l - 1)).max().unwrap_or(0);
        if l <= TOKENS && furthest > SPLIT {
            job.split(furthest.div_ceil(SPLIT), indices, count, scores);
            let outputs = (indices.par_chunks_mut(rows * k), count.par_chunks_mut(rows))
                .into_par_iter()
                .zip((weights.par_chunks_mut(rows * k), scores.par_chunks_mut(rows * k)));
            outputs.for_each(|((indices, count), (weights, scores))| self.finish(indices, count, weights, scores));
            return;
        }
        job.with_packed(|packed| {
            let sequences = (indices.par_chunks_mut(rows * k), count.par_chunks_mut(rows))
                .into_par_iter()
                .zip((weights.par_chunks_mut(rows * k), scores.par_chunks_mut(rows * k)));
            sequences.enumerate().for_each(|(seq, ((indices, count), (weights, scores)))| {
                let rows = TOKENS * heads;
                let blocks = (indices.par_chunks_mut(rows * k), count.par_chunks_mut(rows))
                    .into_par_iter()
                    .zip((weights.par_chunks_mut(rows * k), scores.par_chunks_mut(rows * k)));
                blocks.enumerate().for_each(|(block, ((indices, count), (weights, scores)))| {
                    job.block(packed, (seq, block * TOKENS), 0..usize::MAX, indices, count, scores);
                    self.finish(indices, count, weights, scores);
                });
            });
        });
    }

    /// Puts lists into their order and weighs them.
    fn finish(&self, indices: &mut [i32], count: &[i32], weights: &mut [f32], scores: &mut [f32]) {
        self.arrange(indices, count, scores);
        weigh(self.weighting, scores, count, self.k, weights);
    }

    fn row_shape(&self) -> RowShape {
        RowShape { chunks: self.chunks, per_chunk: 1, dim: self.dim }
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
        self.check(q, indices, count);
        self.check_landmarks(Mat::new(landmarks, self.n * self.chunks, self.heads * self.dim));
        let Selection { n, l, heads, dim, chunks, k, .. } = *self;
        assert!(dq.rows() == q.rows() && dq.cols() == q.cols(), "BUG: dq");
        assert_eq!(dlandmarks.len(), landmarks.len(), "BUG: dlandmarks");
        assert!([scores, weights, dweights].iter().all(|x| x.len() == indices.len()), "BUG: scores, weights");
        let arch = simd::arch();
        let sizes = self.backward_sizes();
        with_scratch(carved(&sizes), |scratch| {
            let [ds, index] = carve(scratch, sizes);
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
            let index = InvertedIndex::build(plain(index), indices, count, n, l, heads, k, chunks);
            dlandmarks.par_chunks_mut(dim.max(1)).enumerate().for_each(|(i, out)| {
                let (seq, chunk, head) = (i / heads / chunks, i / heads % chunks, i % heads);
                let terms = index.chosen_by(seq, head, chunk).iter().map(|&entry| {
                    let (token, slot) = (entry as usize / k, entry as usize % k);
                    let row = seq * l + token;
                    (ds[(row * heads + head) * k + slot], &q.row(row)[head * dim..][..dim])
                });
                arch.dispatch(Combine { out, terms });
            });
        });
    }

    /// The slope of every pair, and the index.
    fn backward_sizes(&self) -> [usize; 2] {
        let Selection { n, l, heads, chunks, k, .. } = *self;
        [n * l * heads * k, InvertedIndex::words(n, l, heads, k, chunks)]
    }

    /// Transposed landmarks, which several blocks of tokens share.
    fn packed_landmarks(&self) -> usize {
        self.n * self.heads * self.chunks.div_ceil(PANEL) * self.dim * PANEL
    }

    /// Indices, counts and scores of the lists of `parts` of the chunks.
    fn split_sizes(&self, parts: usize) -> [usize; 3] {
        let lists = self.n * parts * self.l * self.heads;
        [floats_of::<i32>(lists * self.k), floats_of::<i32>(lists), lists * self.k]
    }

    /// Floats of scratch that `forward` takes on the calling thread, at most.
    pub fn forward_scratch(&self) -> usize {
        if self.l > TOKENS {
            carved(&[self.packed_landmarks()])
        } else if self.chunks > SPLIT {
            carved(&self.split_sizes(self.chunks.div_ceil(SPLIT)))
        } else {
            0
        }
    }

    /// Floats of scratch that `backward` takes on the calling thread.
    pub fn backward_scratch(&self) -> usize {
        carved(&self.backward_sizes())
    }

    fn check(&self, q: Mat, indices: &[i32], count: &[i32]) {
        assert!(self.chunk > 0, "BUG: chunks of no tokens");
        assert!(q.rows() == self.n * self.l && q.cols() == self.heads * self.dim, "BUG: q");
        assert_eq!(count.len(), self.n * self.l * self.heads, "BUG: counts");
        assert_eq!(indices.len(), count.len() * self.k, "BUG: indices");
    }

    fn check_landmarks(&self, x: Mat) {
        assert!(x.rows() == self.n * self.chunks && x.cols() == self.heads * self.dim, "BUG: landmarks");
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

/// What all tasks of a forward read.
#[derive(Clone, Copy)]
struct Job<'a> {
    rules: &'a Selection,
    q: Mat<'a>,
    landmarks: Rows<'a>,
    start: &'a [i32],
}

impl Job<'_> {
    /// Several blocks of tokens share the transposed landmarks, (sequences, heads, panels, dim, PANEL); a single one
    /// transposes as it goes, and so does everyone whose landmarks are paged: there may be too many to hold.
    fn with_packed(&self, f: impl FnOnce(Option<&[f32]>)) {
        let Selection { l, heads, dim, chunks, .. } = *self.rules;
        let (Rows::Dense(_), true) = (self.landmarks, l > TOKENS) else { return f(None) };
        let (panel, panels) = (dim * PANEL, chunks.div_ceil(PANEL));
        with_scratch(self.rules.packed_landmarks(), |packed| {
            packed.par_chunks_mut(panel.max(1)).enumerate().for_each(|(i, out)| {
                let (seq, head, first) = (i / panels / heads, i / panels % heads, i % panels * PANEL);
                if first < self.rules.visible(self.start[seq] as usize + l - 1) {
                    let rows = (chunks - first).min(PANEL);
                    let lines = self.landmarks.chunks(self.rules.row_shape(), (seq, head), first, rows, &mut []);
                    pack_transposed(lines, PANEL, out);
                }
            });
            f(Some(packed));
        });
    }

    /// Lists, best first, of the tokens from `first` on of sequence `seq`, among the chunks of `range`.
    fn block(
        &self,
        packed: Option<&[f32]>,
        (seq, first): (usize, usize),
        range: Range<usize>,
        indices: &mut [i32],
        count: &mut [i32],
        scores: &mut [f32],
    ) {
        let Selection { l, heads, dim, chunks, .. } = *self.rules;
        let q = self.q.block(seq * l + first, count.len() / heads, 0, heads * dim);
        let panel = dim * PANEL;
        let of_sequence = heads * chunks.div_ceil(PANEL) * panel;
        let packed = packed.map(|all| &all[seq * of_sequence..][..of_sequence]);
        let sizes =
            [q.rows() * padded(dim), self.landmarks.scratch(self.rules.row_shape(), LOAD), panel, q.rows() * PANEL];
        with_scratch(carved(&sizes), |scratch| {
            let [rows, loaded, transposed, tile] = carve(scratch, sizes);
            for head in 0..heads {
                simd::dispatch(SelectBlock {
                    rules: self.rules,
                    q: q.block(0, q.rows(), head * dim, dim),
                    landmarks: self.landmarks,
                    packed,
                    place: (seq, head),
                    start: self.start[seq] as usize + first,
                    range: range.clone(),
                    rows,
                    loaded,
                    transposed,
                    tile,
                    indices,
                    count,
                    scores,
                });
            }
        });
    }

    /// Few tokens before many chunks: parts of the chunks make lists side by side, which are merged in their order.
    fn split(&self, parts: usize, indices: &mut [i32], count: &mut [i32], scores: &mut [f32]) {
        let Selection { l, heads, k, .. } = *self.rules;
        let (rows, sizes) = (l * heads, self.rules.split_sizes(parts));
        with_scratch(carved(&sizes), |scratch| {
            let [part_indices, part_count, part_scores] = carve(scratch, sizes);
            let (part_indices, part_count) = (plain::<i32>(part_indices), plain::<i32>(part_count));
            let tasks = part_indices.par_chunks_mut(rows * k).zip(part_count.par_chunks_mut(rows));
            tasks.zip(part_scores.par_chunks_mut(rows * k)).enumerate().for_each(|(i, ((indices, count), scores))| {
                let first = i % parts * SPLIT;
                count.fill(0);
                self.block(None, (i / parts, 0), first..first + SPLIT, indices, count, scores);
            });
            for (row, count) in count.iter_mut().enumerate() {
                let mut list =
                    List { indices: &mut indices[row * k..][..k], scores: &mut scores[row * k..][..k], count: 0 };
                for part in 0..parts {
                    let from = (row / rows * parts + part) * rows + row % rows;
                    for i in from * k..from * k + part_count[from] as usize {
                        list.offer(part_scores[i], part_indices[i] as usize);
                    }
                }
                *count = list.count as i32;
            }
        });
    }
}

/// Selection of one head for a block of tokens; leaves lists best first.
struct SelectBlock<'a> {
    rules: &'a Selection,
    /// The block's queries of this head.
    q: Mat<'a>,
    landmarks: Rows<'a>,
    /// The sequence's transposed landmarks (heads, panels, dim, PANEL), if they were made beforehand.
    packed: Option<&'a [f32]>,
    /// Sequence and head.
    place: (usize, usize),
    /// Position of the block's first token.
    start: usize,
    /// Chunks to choose from; begins at a panel.
    range: Range<usize>,
    rows: &'a mut [f32],
    loaded: &'a mut [f32],
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
        let SelectBlock { rules, q, rows, loaded, transposed, tile, .. } = self;
        let Selection { heads, dim, chunks, k, .. } = *rules;
        let (tokens, width, head) = (q.rows(), padded(dim), self.place.1);
        for (t, row) in rows.chunks_exact_mut(width.max(1)).take(tokens).enumerate() {
            pack_row(q.row(t), rules.scale, row, dim);
        }
        for t in 0..tokens {
            self.count[t * heads + head] = 0;
        }
        let end = rules.visible(self.start + tokens - 1).min(self.range.end);
        for first in (self.range.start..end).step_by(PANEL) {
            let b = match self.packed {
                Some(all) => &all[(head * chunks.div_ceil(PANEL) + first / PANEL) * dim * PANEL..][..dim * PANEL],
                None => {
                    // Pages are read several panels at a time.
                    let skip = (first - self.range.start) % LOAD;
                    let lines = match self.landmarks {
                        Rows::Paged(_) if skip > 0 => {
                            let here = PANEL.min(end - first);
                            Mat::new(&loaded[skip * dim..(skip + here) * dim], here, dim)
                        }
                        _ => {
                            let many = if matches!(self.landmarks, Rows::Paged(_)) { LOAD } else { PANEL };
                            let many = many.min(end - first);
                            let all = self.landmarks.chunks(rules.row_shape(), self.place, first, many, loaded);
                            all.block(0, many.min(PANEL), 0, dim)
                        }
                    };
                    pack_transposed(lines, PANEL, transposed);
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
                let row = t * heads + head;
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

    /// Takes in a later chunk if there is room or it is better than the worst.
    fn offer(&mut self, score: f32, chunk: usize) {
        let full = self.count == self.indices.len();
        if !full || score > self.scores[self.count - 1] {
            self.count += usize::from(!full);
            self.insert(score, chunk);
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
        unfilled.fill(if rule == Weighting::Logit { f32::NEG_INFINITY } else { 0.0 });
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
            Weighting::Logit => w.copy_from_slice(&s[..w.len()]),
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
            Weighting::Logit => ds.copy_from_slice(&g[..ds.len()]),
        }
    }
}
