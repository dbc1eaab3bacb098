//! Hierarchical sparse attention: softmax within each selected chunk, mixed by the selection's weights.
//!
//! ```text
//! y_t,head = Σ_i w_t,i · softmax_over_chunk_i(q_t,head · kᵀ · scale) v          (arXiv 2504.16795)
//! ```
//!
//! Chunk-major: an inverted index lists the tokens that chose a chunk, a *slab* is a part of one such list, and the
//! keys and values of a chunk are packed once per slab.  A chunk is one tile, so its softmax is complete there and
//! the backward recomputes it: five products a pair.  What a pair contributes to a token (`w·o`, or dq) goes to the
//! pair's own slot and is summed in slot order afterwards; dK and dV of a slab are summed in slab order.  So the
//! bits do not depend on threads, and a popular chunk is shared by many.
//!
//! A *joint* softmax over all chosen chunks runs the same way: slots hold a chunk's own output with its log-sum-exp, and the
//! sum over slots weighs them by that; the backward knows the softmax's denominator from the forward.
//!
//! Slots are the only large workspace; tokens are processed in segments of bounded size (see
//! `ChunkAttention::segments`), never more than `k` times the size of `q`.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::attn_micro::{
    Attend, AttendBackward, Block, LN_2, LOG2_E, Upstream, carve, carved, pack_row, pack_rows, pack_transposed, padded,
};
use super::inverted_index::InvertedIndex;
use crate::par::{Plain, SharedMut, floats_of, plain, rounded, with_scratch};
use crate::{Mat, MatMut, RowShape, Rows, simd};

/// Query rows (pair, head) of one tile: its operands fit the first-level cache.
const ROWS: usize = 48;
/// Query rows of one slab: enough to pay for packing the chunk.
const SLAB_ROWS: usize = 512;
/// Floats of slots that a segment may take without further reason: they stay in the last-level cache.
const SLOT_BUDGET: usize = 2 << 20;
/// Floats of slots that a segment never exceeds by more than one token.
const SLOT_LIMIT: usize = 12 << 20;
/// Query rows per chunk that a segment aims at.
const SEGMENT_ROWS: usize = 256;
/// Tokens of one task of the sums over slots.
const REDUCE_TOKENS: usize = 32;

/// Shapes of chunk attention: `q` and `y` are (n·l x heads·dim), `k` and `v` (n·keys x kv_heads·dim), indices and
/// weights (n, l, kv_heads, k), counts (n, l, kv_heads).  Query head → kv head: `head / (heads / kv_heads)`.
#[derive(Clone, Copy, Debug)]
pub struct ChunkAttention {
    pub n: usize,
    /// Query tokens per sequence.
    pub l: usize,
    /// Rows of keys per sequence: whole chunks; unrelated to `l`.
    pub keys: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    /// Slots per token.
    pub k: usize,
    /// Keys per chunk.
    pub chunk: usize,
    pub scale: f32,
    /// Zero logits added to the denominator of every softmax.
    pub off_by_one: f32,
}

/// What both directions read.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    q: Mat<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    indices: &'a [i32],
    count: &'a [i32],
    weights: Weights<'a>,
}

/// How the chunks of a token are mixed.
#[derive(Clone, Copy)]
enum Weights<'a> {
    /// (n, l, kv_heads, k).
    Given(&'a [f32]),
    /// One softmax over all.
    Joint,
    /// The same in the backward: its log-sum-exps and the gradient at them (n, l, heads), and the output.
    Known { o: Mat<'a>, lse: &'a [f32], dlse: &'a [f32] },
}

impl Weights<'_> {
    fn is_joint(&self) -> bool {
        !matches!(self, Weights::Given(_))
    }
}

/// Tokens `token..token + l` of sequences `seq..seq + n`; a part of a sequence only when `n` is 1.
#[derive(Clone, Copy)]
struct Segment {
    seq: usize,
    n: usize,
    token: usize,
    l: usize,
}

/// A part of the list of one chunk.
#[derive(Clone, Copy)]
struct Slab {
    /// Within the segment.
    seq: usize,
    head: usize,
    chunk: usize,
    /// Range of the chunk's list.
    first: usize,
    last: usize,
    /// Where partial sums of dK and dV go; [`ALONE`] when the slab is the chunk's only one.
    partial: usize,
}

const ALONE: usize = usize::MAX;

// SAFETY: numbers of one word each.
unsafe impl Plain for Slab {}

/// A chunk of several slabs, whose partial sums are `first..last`.
#[derive(Clone, Copy)]
struct Shared {
    seq: usize,
    head: usize,
    chunk: usize,
    first: usize,
    last: usize,
}

// SAFETY: numbers of one word each.
unsafe impl Plain for Shared {}

/// The work of a segment, in scratch.
struct Plan<'a> {
    index: InvertedIndex<'a>,
    slabs: &'a [Slab],
    shared: &'a [Shared],
    partials: usize,
    /// The chosen chunks in order, by which the plan numbers them: so that nothing is as long as the memory.  Empty where
    /// it uses the memory's own numbers.
    chosen: &'a [i32],
}

/// Adds `item` to the first `len` of `list`.
fn push<T>(list: &mut [T], len: &mut usize, item: T) {
    list[*len] = item;
    *len += 1;
}

impl Plan<'_> {
    /// Most chunks that a segment of so many pairs is indexed by.
    fn chunks(shape: &ChunkAttention, pairs: usize) -> usize {
        (shape.keys / shape.chunk).min(pairs)
    }

    /// Most slabs, and most chunks that several share: how many there are hangs on the choices.
    fn most(shape: &ChunkAttention, segment: Segment) -> (usize, usize) {
        let pairs = shape.pairs(segment);
        let (lists, full) = (segment.n * shape.kv_heads * Self::chunks(shape, pairs), pairs / shape.slab_pairs());
        // A list of p pairs makes at most p / slab_pairs + 1 slabs, and several if it fills one.
        (full + lists.min(pairs), full.min(lists))
    }

    /// Most partial sums: those of shared chunks.
    fn most_partials(shape: &ChunkAttention, segment: Segment) -> usize {
        shape.pairs(segment) / shape.slab_pairs() + Self::most(shape, segment).1
    }

    /// Floats of the chosen chunks and the selection by their numbers, of the index, the slabs and the shared chunks.
    fn sizes(shape: &ChunkAttention, segment: Segment) -> [usize; 5] {
        let pairs = shape.pairs(segment);
        let renumbered = if shape.keys / shape.chunk > pairs { pairs } else { 0 };
        let chunks = Self::chunks(shape, pairs);
        let index = InvertedIndex::words(segment.n, segment.l, shape.kv_heads, shape.k, chunks);
        let (slabs, shared) = Self::most(shape, segment);
        [renumbered, renumbered, index, floats_of::<Slab>(slabs), floats_of::<Shared>(shared)]
    }

    /// Calls `f` with the plan of a segment.
    fn with<R>(shape: &ChunkAttention, inputs: &Inputs, segment: Segment, f: impl FnOnce(&Plan) -> R) -> R {
        let (row, rows) =
            ((segment.seq * shape.l + segment.token) * shape.kv_heads, segment.n * segment.l * shape.kv_heads);
        let (count, indices) = (&inputs.count[row..][..rows], &inputs.indices[row * shape.k..][..rows * shape.k]);
        let sizes = Self::sizes(shape, segment);
        with_scratch(carved(&sizes), |scratch| {
            let [chosen, local, index, slabs, shared] = carve(scratch, sizes);
            let (chosen, indices) = renumber(indices, count, shape.k, plain(chosen), plain(local));
            let chunks = if chosen.is_empty() { Self::chunks(shape, indices.len()) } else { chosen.len() };
            let (n, l) = (segment.n, segment.l);
            let index = InvertedIndex::build(plain(index), indices, count, n, l, shape.kv_heads, shape.k, chunks);
            let (all_slabs, all_shared) = (plain::<Slab>(slabs), plain::<Shared>(shared));
            let (mut slabs, mut shared, mut partials) = (0, 0, 0);
            let size = shape.slab_pairs();
            for seq in 0..segment.n {
                for head in 0..shape.kv_heads {
                    for chunk in 0..chunks {
                        let pairs = index.chosen_by(seq, head, chunk).len();
                        let parts = pairs.div_ceil(size);
                        if parts > 1 {
                            let (first, last) = (partials, partials + parts);
                            push(all_shared, &mut shared, Shared { seq, head, chunk, first, last });
                        }
                        for first in (0..pairs).step_by(size) {
                            let partial = if parts > 1 { partials } else { ALONE };
                            partials += (parts > 1) as usize;
                            let last = pairs.min(first + size);
                            push(all_slabs, &mut slabs, Slab { seq, head, chunk, first, last, partial });
                        }
                    }
                }
            }
            f(&Plan { index, slabs: &all_slabs[..slabs], shared: &all_shared[..shared], partials, chosen })
        })
    }

    /// The chunk that is called `chunk` here.
    fn global(&self, chunk: usize) -> usize {
        self.chosen.get(chunk).map_or(chunk, |&c| c as usize)
    }
}

/// The chosen chunks and the selection by their numbers, or no chunks and the selection as it is where there is no memory
/// for them.
fn renumber<'a>(
    indices: &'a [i32],
    count: &[i32],
    k: usize,
    chosen: &'a mut [i32],
    local: &'a mut [i32],
) -> (&'a [i32], &'a [i32]) {
    if local.is_empty() {
        return (&[], indices);
    }
    let mut all = 0;
    for (row, &n) in indices.chunks_exact(k.max(1)).zip(count) {
        chosen[all..all + n as usize].copy_from_slice(&row[..n as usize]);
        all += n as usize;
    }
    let chosen = &mut chosen[..all];
    chosen.par_sort_unstable();
    let mut distinct = 0;
    for i in 0..all {
        if i == 0 || chosen[i] != chosen[distinct - 1] {
            chosen[distinct] = chosen[i];
            distinct += 1;
        }
    }
    let chosen = &chosen[..distinct];
    local.par_iter_mut().zip(indices).with_min_len(1024).for_each(|(local, i)| {
        // Unfilled slots are never read.
        *local = chosen.partition_point(|c| c < i) as i32;
    });
    (chosen, local)
}

impl ChunkAttention {
    /// Attention; `y` is overwritten, with zeros for tokens that selected nothing.
    #[allow(clippy::too_many_arguments)]
    pub fn forward(&self, q: Mat, k: Rows, v: Rows, indices: &[i32], count: &[i32], weights: &[f32], y: MatMut) {
        self.attend(&Inputs { q, k, v, indices, count, weights: Weights::Given(weights) }, y, None);
    }

    /// Attention with one softmax over all chosen chunks; `y` and the natural log-sum-exps (n, l, heads) are overwritten,
    /// with 0 and -inf for tokens that selected nothing.
    #[allow(clippy::too_many_arguments)]
    pub fn forward_joint(&self, q: Mat, k: Rows, v: Rows, indices: &[i32], count: &[i32], y: MatMut, lse: &mut [f32]) {
        assert_eq!(lse.len(), self.n * self.l * self.heads, "BUG: lse");
        let inputs = Inputs { q, k, v, indices, count, weights: Weights::Joint };
        self.attend(&inputs, y, Some(SharedMut::new(lse)));
    }

    fn attend(&self, inputs: &Inputs, y: MatMut, lse: Option<SharedMut>) {
        self.check(inputs);
        assert!(y.rows() == inputs.q.rows() && y.cols() == inputs.q.cols(), "BUG: y");
        let arch = simd::arch();
        for segment in self.segments() {
            Plan::with(self, inputs, segment, |plan| {
                let sizes = [segment.n * segment.l * self.token_slots(), self.tops(segment, lse.is_some())];
                with_scratch(carved(&sizes), |scratch| {
                    let [slots, tops] = carve(scratch, sizes);
                    let (shared, shared_tops) = (SharedMut::new(slots), SharedMut::new(tops));
                    plan.slabs.par_iter().for_each(|slab| {
                        let task = SlabTask { shape: self, inputs, segment, slab, plan, slots: shared };
                        with_scratch(carved(&task.forward_sizes()), |scratch| {
                            arch.dispatch(ForwardSlab { task, scratch, tops: shared_tops });
                        });
                    });
                    if let Some(lse) = lse {
                        self.weigh_slots(inputs, segment, slots, tops, lse);
                    }
                    self.sum_slots(arch, inputs, segment, slots, &y);
                });
            });
        }
    }

    /// Base-2 log-sum-exps of the segment's pairs, for each head of the group.
    fn tops(&self, segment: Segment, joint: bool) -> usize {
        if joint { self.pairs(segment) * self.group() } else { 0 }
    }

    /// Scales every slot by its share of the token's softmax and writes the log-sum-exp over all.
    fn weigh_slots(&self, inputs: &Inputs, segment: Segment, slots: &mut [f32], tops: &[f32], lse: SharedMut) {
        let (group, wide) = (self.group(), padded(self.dim));
        let offset = (segment.seq * self.l + segment.token) * self.kv_heads;
        let zeros = if self.off_by_one > 0.0 { self.off_by_one.log2() } else { f32::NEG_INFINITY };
        slots.par_chunks_mut((self.k * self.slot()).max(1)).enumerate().for_each(|(row, slots)| {
            let count = inputs.count[offset + row] as usize;
            let tops = &tops[row * self.k * group..][..self.k * group];
            // SAFETY: every task has its own row and heads.
            let out = unsafe { lse.slice((offset + row) * group, group) };
            for (g, out) in out.iter_mut().enumerate() {
                let top = (0..count).fold(zeros, |m, i| m.max(tops[i * group + g]));
                let part = |x: f32| if x == f32::NEG_INFINITY { 0.0 } else { (x - top).exp2() };
                let sum = (0..count).fold(part(zeros), |s, i| s + part(tops[i * group + g]));
                *out = (top + sum.log2()) * LN_2;
                if sum == 0.0 {
                    *out = f32::NEG_INFINITY;
                }
                for i in 0..count {
                    let w = part(tops[i * group + g]) / sum;
                    slots[i * self.slot() + g * wide..][..wide].iter_mut().for_each(|x| *x *= w);
                }
            }
        });
    }

    /// Gradients from `dy`: of `q`, `k`, `v` and the weights (unfilled slots: 0); all are overwritten.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        q: Mat,
        k: Mat,
        v: Mat,
        indices: &[i32],
        count: &[i32],
        weights: &[f32],
        dy: Mat,
        dq: MatMut,
        dk: MatMut,
        dv: MatMut,
        dweights: &mut [f32],
    ) {
        assert_eq!(dweights.len(), weights.len(), "BUG: dweights");
        let weights = Weights::Given(weights);
        let inputs = Inputs { q, k: Rows::Dense(k), v: Rows::Dense(v), indices, count, weights };
        self.attend_backward(&inputs, k, dy, dq, dk, dv, dweights);
    }

    /// Gradients of [`forward_joint`](Self::forward_joint) from its results, `dy` and the gradient at the log-sum-exps.
    #[allow(clippy::too_many_arguments)]
    pub fn backward_joint(
        &self,
        q: Mat,
        k: Mat,
        v: Mat,
        indices: &[i32],
        count: &[i32],
        (o, lse): (Mat, &[f32]),
        (dy, dlse): (Mat, &[f32]),
        dq: MatMut,
        dk: MatMut,
        dv: MatMut,
    ) {
        assert!(lse.len() == self.n * self.l * self.heads && dlse.len() == lse.len(), "BUG: lse");
        assert!(o.rows() == q.rows() && o.cols() == q.cols(), "BUG: o");
        let weights = Weights::Known { o, lse, dlse };
        let inputs = Inputs { q, k: Rows::Dense(k), v: Rows::Dense(v), indices, count, weights };
        self.attend_backward(&inputs, k, dy, dq, dk, dv, &mut []);
    }

    #[allow(clippy::too_many_arguments)]
    fn attend_backward(
        &self,
        inputs: &Inputs,
        k: Mat,
        dy: Mat,
        dq: MatMut,
        dk: MatMut,
        dv: MatMut,
        dweights: &mut [f32],
    ) {
        self.check(inputs);
        let q = inputs.q;
        assert!(dy.rows() == q.rows() && dy.cols() == q.cols(), "BUG: dy");
        assert!(dq.rows() == q.rows() && dq.cols() == q.cols(), "BUG: dq");
        assert!([&dk, &dv].iter().all(|x| x.rows() == k.rows() && x.cols() == k.cols()), "BUG: dk, dv");
        (0..k.rows()).into_par_iter().with_min_len(64).for_each(|row| {
            // SAFETY: every task has its own row of both.
            unsafe {
                dk.row_unchecked(row).fill(0.0);
                dv.row_unchecked(row).fill(0.0);
            }
        });
        dweights.fill(0.0);
        let dweights = SharedMut::new(dweights);
        let arch = simd::arch();
        for segment in self.segments() {
            Plan::with(self, inputs, segment, |plan| {
                let size = self.chunk * padded(self.dim);
                let sizes = [segment.n * segment.l * self.token_slots(), plan.partials * 2 * size];
                with_scratch(carved(&sizes), |workspace| {
                    let [slots, partials] = carve(workspace, sizes);
                    let (shared, parts) = (SharedMut::new(slots), SharedMut::new(partials));
                    let (dk, dv) = (&dk, &dv);
                    plan.slabs.par_iter().for_each(|slab| {
                        let task = SlabTask { shape: self, inputs, segment, slab, plan, slots: shared };
                        with_scratch(carved(&task.backward_sizes()), |scratch| {
                            arch.dispatch(BackwardSlab { task, scratch, dy, dk, dv, dweights, partials: parts });
                        });
                    });
                    self.sum_slots(arch, inputs, segment, slots, &dq);
                    let partials = &*partials;
                    plan.shared.par_iter().for_each(|chunk| {
                        let parts = partials[chunk.first * 2 * size..chunk.last * 2 * size].chunks_exact(2 * size);
                        for part in parts {
                            let (part_k, part_v) = part.split_at(size);
                            let at = plan.global(chunk.chunk);
                            self.add_to_chunk(dk, segment.seq + chunk.seq, chunk.head, at, part_k);
                            self.add_to_chunk(dv, segment.seq + chunk.seq, chunk.head, at, part_v);
                        }
                    });
                });
            });
        }
    }

    fn check(&self, x: &Inputs) {
        assert!(self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads), "BUG: {} heads", self.heads);
        assert!(self.chunk > 0, "BUG: chunks of no keys");
        assert!(x.q.rows() == self.n * self.l && x.q.cols() == self.heads * self.dim, "BUG: q");
        let (rows, cols) = (self.n * self.keys, self.kv_heads * self.dim);
        for x in [x.k, x.v] {
            if let Rows::Dense(x) = x {
                assert!(x.rows() == rows && x.cols() == cols, "BUG: k, v");
            }
        }
        assert_eq!(x.count.len(), self.n * self.l * self.kv_heads, "BUG: counts");
        assert_eq!(x.indices.len(), x.count.len() * self.k, "BUG: indices");
        if let Weights::Given(w) = x.weights {
            assert_eq!(w.len(), x.indices.len(), "BUG: weights");
        }
        assert!(x.count.iter().all(|&c| c >= 0 && c as usize <= self.k), "BUG: a count exceeds {}", self.k);
    }

    fn row_shape(&self) -> RowShape {
        RowShape { chunks: self.keys / self.chunk, per_chunk: self.chunk, dim: self.dim }
    }

    /// Query heads per kv head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Floats of one pair's slot: the group's heads, padded.
    fn slot(&self) -> usize {
        self.group() * padded(self.dim)
    }

    /// Floats of a token's slots.
    fn token_slots(&self) -> usize {
        self.kv_heads * self.k * self.slot()
    }

    /// Pairs of one slab.
    fn slab_pairs(&self) -> usize {
        (SLAB_ROWS / self.group()).max(1)
    }

    /// Pairs of a segment.
    fn pairs(&self, segment: Segment) -> usize {
        segment.n * segment.l * self.kv_heads * self.k
    }

    /// Splits the tokens by shape alone: segments as small as the cache likes, but large enough that a chunk meets
    /// about [`SEGMENT_ROWS`] rows if choices are spread evenly.  The first is the largest.
    fn segments(&self) -> impl Iterator<Item = Segment> + use<> {
        let Self { n, l, .. } = *self;
        let token = self.token_slots().max(1);
        let busy = SEGMENT_ROWS * (self.keys / self.chunk) / (self.k * self.group()).max(1);
        let tokens = (SLOT_BUDGET / token).max(busy).min(SLOT_LIMIT / token).max(1);
        // Several whole sequences, or even parts of one.
        let whole = (tokens / l.max(1)).max(1);
        let part = l.div_ceil(l.div_ceil(tokens).max(1)).max(1);
        let sequences = if l * self.heads * self.dim == 0 { 0 } else { n };
        (0..sequences).step_by(whole).flat_map(move |seq| {
            let parts = (0..l).step_by(part);
            parts.map(move |token| Segment { seq, n: whole.min(n - seq), token, l: part.min(l - token) })
        })
    }

    /// Floats of scratch that `forward` takes on the calling thread.
    pub fn forward_scratch(&self) -> usize {
        self.segments().next().map_or(0, |s| carved(&Plan::sizes(self, s)) + rounded(s.n * s.l * self.token_slots()))
    }

    /// Floats of scratch that `forward_joint` takes on the calling thread.
    pub fn joint_scratch(&self) -> usize {
        self.segments().next().map_or(0, |s| {
            carved(&Plan::sizes(self, s)) + carved(&[s.n * s.l * self.token_slots(), self.tops(s, true)])
        })
    }

    /// Floats of scratch that `backward` and `backward_joint` take on the calling thread, at most.
    pub fn backward_scratch(&self) -> usize {
        self.segments().next().map_or(0, |s| {
            let partials = Plan::most_partials(self, s) * 2 * self.chunk * padded(self.dim);
            carved(&Plan::sizes(self, s)) + carved(&[s.n * s.l * self.token_slots(), partials])
        })
    }

    /// Sums every token's filled slots, in slot order, into its row of `out`.
    fn sum_slots(&self, arch: Arch, inputs: &Inputs, segment: Segment, slots: &[f32], out: &MatMut) {
        let rows = segment.n * segment.l;
        (0..rows.div_ceil(REDUCE_TOKENS)).into_par_iter().for_each(|block| {
            let first = block * REDUCE_TOKENS;
            arch.dispatch(SumSlots {
                shape: self,
                count: inputs.count,
                slots,
                first,
                last: rows.min(first + REDUCE_TOKENS),
                offset: segment.seq * self.l + segment.token,
                out,
            });
        });
    }

    /// Adds padded rows to the rows of a chunk.
    #[inline(always)]
    fn add_to_chunk(&self, out: &MatMut, seq: usize, head: usize, chunk: usize, rows: &[f32]) {
        let first = seq * self.keys + chunk * self.chunk;
        for (i, row) in rows.chunks_exact(padded(self.dim)).enumerate() {
            // SAFETY: at any time one task handles a (sequence, head, chunk), and no other touches these columns.
            let mut line = unsafe { out.block_unchecked(first + i, 1, head * self.dim, self.dim) };
            for (y, &x) in line.row_mut(0).iter_mut().zip(row) {
                *y += x;
            }
        }
    }
}

/// See [`ChunkAttention::sum_slots`]; rows `first..last` of the segment.
struct SumSlots<'a> {
    shape: &'a ChunkAttention,
    count: &'a [i32],
    slots: &'a [f32],
    first: usize,
    last: usize,
    /// The segment's first row in `out`.
    offset: usize,
    out: &'a MatMut<'a>,
}

impl WithSimd for SumSlots<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let shape = self.shape;
        let (dim, wide, slot) = (shape.dim, padded(shape.dim), shape.slot());
        for row in self.first..self.last {
            // SAFETY: every task has its own rows.
            let out = unsafe { self.out.row_unchecked(self.offset + row) };
            for (head, out) in out.chunks_exact_mut(shape.group() * dim).enumerate() {
                let count = self.count[(self.offset + row) * shape.kv_heads + head] as usize;
                let pairs = &self.slots[(row * shape.kv_heads + head) * shape.k * slot..][..count * slot];
                for (g, out) in out.chunks_exact_mut(dim).enumerate() {
                    for column in (0..dim).step_by(S::F32_LANES) {
                        let mut sum = simd.splat_f32s(0.0);
                        for pair in 0..count {
                            let at = pair * slot + g * wide + column;
                            let part = &pairs[at..at + S::F32_LANES];
                            // SAFETY: a whole vector, as just cut; rows of slots are padded to whole ones.
                            sum = simd.add_f32s(sum, unsafe { part.as_ptr().cast::<S::f32s>().read_unaligned() });
                        }
                        let out = &mut out[column..dim.min(column + S::F32_LANES)];
                        match S::as_mut_simd_f32s(out) {
                            ([whole], []) => *whole = sum,
                            _ => simd.partial_store_f32s(out, sum),
                        }
                    }
                }
            }
        }
    }
}

/// One slab and where its pairs live.
#[derive(Clone, Copy)]
struct SlabTask<'a> {
    shape: &'a ChunkAttention,
    inputs: &'a Inputs<'a>,
    segment: Segment,
    slab: &'a Slab,
    plan: &'a Plan<'a>,
    slots: SharedMut<'a>,
}

impl<'a> SlabTask<'a> {
    /// The slab's (token, slot) pairs, as many at a time as make a tile.
    fn tiles(&self) -> std::slice::Chunks<'a, u32> {
        let Slab { seq, head, chunk, first, last, .. } = *self.slab;
        self.plan.index.chosen_by(seq, head, chunk)[first..last].chunks(self.tile())
    }

    /// Kᵀ, V; queries, exponentials, outputs, denominators and maxima of a tile; rows read from pages.
    fn forward_sizes(&self) -> [usize; 8] {
        let (wide, width) = (padded(self.shape.dim), padded(self.shape.chunk));
        let rows = self.tile() * self.shape.group();
        let loaded = self.inputs.k.scratch(self.shape.row_shape(), 1);
        [self.shape.dim * width, self.shape.chunk * wide, rows * wide, rows * width, rows * wide, rows, rows, loaded]
    }

    /// Kᵀ, Vᵀ, K, dK, dV; of a tile queries, dy, dq, exponentials, their gradient, dots, maxima and what comes from above.
    fn backward_sizes(&self) -> [usize; 14] {
        let [turned, keys, queries, square, _, rows, _, _] = self.forward_sizes();
        [turned, turned, keys, keys, keys, queries, queries, queries, square, square, rows, rows, rows, rows]
    }

    /// Pairs of a tile.
    fn tile(&self) -> usize {
        (ROWS / self.shape.group()).max(1)
    }

    /// An entry's row in the segment and its slot.
    #[inline(always)]
    fn pair(&self, entry: u32) -> (usize, usize) {
        let k = self.shape.k as u32;
        (self.slab.seq * self.segment.l + (entry / k) as usize, (entry % k) as usize)
    }

    /// The row in `q` of a row of the segment.
    #[inline(always)]
    fn token(&self, row: usize) -> usize {
        self.segment.seq * self.shape.l + self.segment.token + row
    }

    /// Position of a pair within the segment.
    #[inline(always)]
    fn pair_at(&self, entry: u32) -> usize {
        let (row, slot) = self.pair(entry);
        (row * self.shape.kv_heads + self.slab.head) * self.shape.k + slot
    }

    /// Position of a pair in (n, l, kv_heads, k).
    #[inline(always)]
    fn weight_at(&self, entry: u32) -> usize {
        let (row, slot) = self.pair(entry);
        (self.token(row) * self.shape.kv_heads + self.slab.head) * self.shape.k + slot
    }

    /// Of a pair's token and the group's heads: the base-2 log-sum-exp, and `dy·o` less the gradient at the log-sum-exp.
    #[inline(always)]
    fn known(
        &self,
        entry: u32,
        (o, dy): (Mat, Mat),
        (lse, dlse): (&[f32], &[f32]),
        (total, delta): (&mut [f32], &mut [f32]),
    ) {
        let (row, dim, group) = (self.token(self.pair(entry).0), self.shape.dim, self.shape.group());
        let (o, dy) = (o.row(row), dy.row(row));
        for g in 0..group {
            let head = self.slab.head * group + g;
            let at = row * self.shape.heads + head;
            let dot: f32 = o[head * dim..][..dim].iter().zip(&dy[head * dim..][..dim]).map(|(o, g)| o * g).sum();
            (total[g], delta[g]) = (lse[at] * LOG2_E, dot - dlse[at]);
        }
    }

    /// The rows of the slab's chunk and head in keys or values.
    #[inline(always)]
    fn chunk<'s>(&self, x: Rows<'a>, scratch: &'s mut [f32]) -> Mat<'s>
    where
        'a: 's,
    {
        let Slab { seq, head, chunk, .. } = *self.slab;
        let place = (self.segment.seq + seq, head);
        x.chunks(self.shape.row_shape(), place, self.plan.global(chunk), 1, scratch)
    }

    /// Copies the group's heads of every pair's token into padded rows.
    #[inline(always)]
    fn gather(&self, pairs: &[u32], x: Mat, factor: f32, out: &mut [f32]) {
        let dim = self.shape.dim;
        let width = self.shape.group() * dim;
        let mut rows = out.chunks_exact_mut(padded(dim));
        for &entry in pairs {
            let row = self.token(self.pair(entry).0);
            let heads = x.row(row)[self.slab.head * width..][..width].chunks_exact(dim);
            for (head, out) in heads.zip(&mut rows) {
                pack_row(head, factor, out, dim);
            }
        }
    }

    /// Writes the group's rows of every pair, times `factor(row)`, to the pair's slot.
    #[inline(always)]
    fn scatter(&self, pairs: &[u32], rows: &[f32], factor: impl Fn(usize) -> f32) {
        let (shape, wide) = (self.shape, padded(self.shape.dim));
        let group = shape.group();
        for (i, (&entry, rows)) in pairs.iter().zip(rows.chunks_exact(shape.slot())).enumerate() {
            let (row, slot) = self.pair(entry);
            let at = ((row * shape.kv_heads + self.slab.head) * shape.k + slot) * shape.slot();
            // SAFETY: a pair is in one list, once.
            let out = unsafe { self.slots.slice(at, shape.slot()) };
            for (g, (out, row)) in out.chunks_exact_mut(wide).zip(rows.chunks_exact(wide)).enumerate() {
                pack_row(row, factor(i * group + g), out, wide);
            }
        }
    }
}

struct ForwardSlab<'a> {
    task: SlabTask<'a>,
    scratch: &'a mut [f32],
    /// Base-2 log-sum-exps per pair and head, if the softmax is joint.
    tops: SharedMut<'a>,
}

impl WithSimd for ForwardSlab<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let task = self.task;
        let shape = task.shape;
        let (dim, chunk, group) = (shape.dim, shape.chunk, shape.group());
        let width = padded(chunk);
        let [keys_t, values, q, s, o, sums, tops, loaded] = carve(self.scratch, task.forward_sizes());
        pack_transposed(task.chunk(task.inputs.k, loaded), width, keys_t);
        pack_rows(task.chunk(task.inputs.v, loaded), 1.0, values);
        let joint = task.inputs.weights.is_joint();
        let zeros = if joint { 0.0 } else { shape.off_by_one };
        let block = Block { keys: chunk, dim, zeros, keys_t, rows: values, values_t: &[] };
        for pairs in task.tiles() {
            task.gather(pairs, task.inputs.q, shape.scale * LOG2_E, q);
            let rows = pairs.len() * group;
            simd.vectorize(Attend { block, rows, visible: &|_| 0..chunk, q, s, o, sums, tops });
            let Weights::Given(weights) = task.inputs.weights else {
                task.scatter(pairs, o, |row| 1.0 / sums[row]);
                for (i, &entry) in pairs.iter().enumerate() {
                    // SAFETY: a pair is in one list, once.
                    let out = unsafe { self.tops.slice(task.pair_at(entry) * group, group) };
                    for (g, out) in out.iter_mut().enumerate() {
                        *out = tops[i * group + g] + sums[i * group + g].log2();
                    }
                }
                continue;
            };
            task.scatter(pairs, o, |row| weights[task.weight_at(pairs[row / group])] / sums[row]);
        }
    }
}

struct BackwardSlab<'a> {
    task: SlabTask<'a>,
    scratch: &'a mut [f32],
    dy: Mat<'a>,
    dk: &'a MatMut<'a>,
    dv: &'a MatMut<'a>,
    dweights: SharedMut<'a>,
    partials: SharedMut<'a>,
}

impl WithSimd for BackwardSlab<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let BackwardSlab { task, scratch, .. } = self;
        let shape = task.shape;
        let (dim, chunk, group) = (shape.dim, shape.chunk, shape.group());
        let (width, keys) = (padded(chunk), chunk * padded(dim));
        let [keys_t, values_t, key_rows, dk, dv, q, dy, dq, s, ds, dots, tops, above, delta] =
            carve(scratch, task.backward_sizes());
        pack_transposed(task.chunk(task.inputs.k, &mut []), width, keys_t);
        pack_transposed(task.chunk(task.inputs.v, &mut []), width, values_t);
        pack_rows(task.chunk(task.inputs.k, &mut []), 1.0, key_rows);
        let joint = task.inputs.weights.is_joint();
        let zeros = if joint { 0.0 } else { shape.off_by_one };
        let block = Block { keys: chunk, dim, zeros, keys_t, rows: key_rows, values_t };
        let mut first = true;
        for pairs in task.tiles() {
            task.gather(pairs, task.inputs.q, shape.scale * LOG2_E, q);
            task.gather(pairs, self.dy, 1.0, dy);
            for (i, &entry) in pairs.iter().enumerate() {
                let rows = i * group..(i + 1) * group;
                match task.inputs.weights {
                    Weights::Given(w) => above[rows].fill(w[task.weight_at(entry)]),
                    Weights::Known { o, lse, dlse } => {
                        task.known(entry, (o, self.dy), (lse, dlse), (&mut above[rows.clone()], &mut delta[rows]))
                    }
                    Weights::Joint => unreachable!("BUG: a backward without the forward's results"),
                }
            }
            let upstream = match task.inputs.weights {
                Weights::Given(_) => Upstream::Weighted(above),
                _ => Upstream::Part { total: above, delta },
            };
            simd.vectorize(AttendBackward {
                block,
                rows: pairs.len() * group,
                visible: &|_| 0..chunk,
                upstream,
                q,
                dy,
                s,
                ds,
                dots,
                tops,
                dq,
                dk,
                dv,
                first,
            });
            first = false;
            task.scatter(pairs, dq, |_| shape.scale);
            if joint {
                continue;
            }
            for (&entry, dots) in pairs.iter().zip(dots.chunks_exact(group)) {
                // SAFETY: a pair is in one list, once.
                let out = unsafe { self.dweights.slice(task.weight_at(entry), 1) };
                out[0] = dots.iter().sum();
            }
        }
        dk.iter_mut().for_each(|x| *x *= LN_2);
        let Slab { seq, head, chunk, partial, .. } = *task.slab;
        let chunk = task.plan.global(chunk);
        match partial {
            ALONE => {
                shape.add_to_chunk(self.dk, task.segment.seq + seq, head, chunk, dk);
                shape.add_to_chunk(self.dv, task.segment.seq + seq, head, chunk, dv);
            }
            part => {
                // SAFETY: every slab has its own part.
                let out = unsafe { self.partials.slice(part * 2 * keys, 2 * keys) };
                out[..keys].copy_from_slice(dk);
                out[keys..].copy_from_slice(dv);
            }
        }
    }
}
