//! Attention to selected chunks: by query tiles or chunk by chunk, and its gradient.
//!
//! What decides: ρ = L·K / C, the pairs (token, slot) per chunk, which is how often a chunk that stays on chip is used.  Chunk
//! by chunk a pair moves its queries, a slot written and the slot read, 3·G rows of d, and 2·chunk / ρ rows of keys and values;
//! by query tiles 2·chunk rows of keys and values, shared by as many pairs of the tile as chose the chunk, for which we take
//! [`SHARED_BY`].  Where tokens are so few that most multiprocessors would idle, every pair has a block.

use super::any_size::AnyAttention;
use super::inverted_index::InvertedIndex;
use super::{Cuda, Pages, Site, Unsupported, because};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Call, Condition, Form, Launch, Operand};
use crate::cuda::stub::Stub;
use crate::cuda::target::{Arch, Target};
use rambac_ir::ops::*;
use rambac_ir::{DType, Dim};

/// Pairs of a query tile that neighbouring tokens' choices let share a load of a chunk: a guess, on the careful side.
const SHARED_BY: usize = 2;
/// Rows (pair, query head) that a block goes through before it writes its part of dk and dv.
const SLAB_ROWS: usize = 2048;
/// Threads of the kernels that add up.
const ADD_THREADS: usize = 128;

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
    fn pairs_bytes(&self) -> usize {
        self.slab() * 8
    }
    /// Tokens that a block of so many rows can touch.
    fn tokens(&self, rows: usize) -> usize {
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
    fn grad_bytes(&self, warps: usize, keys: usize) -> usize {
        let rows = 16 * warps;
        self.rows(2 * keys + 4 * rows) + 2 * rows * self.pitch(keys) * self.element + self.pairs_bytes()
    }
    /// Bytes of `GradStats`.
    fn stats_bytes(&self, warps: usize, keys: usize) -> usize {
        self.rows(2 * keys + 32 * warps) + self.pairs_bytes() + self.slab() * self.group * 12
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

/// Operands of an attending op, by name.
struct Attending<'a> {
    sizes: Sizes,
    dtype: DType,
    /// Of the chunks' weights.
    exact: DType,
    n: Dim,
    l: Dim,
    h: usize,
    tokens_kv: Dim,
    /// Of a sequence.
    chunks: Dim,
    pages: Option<Pages<'a>>,
    scale: f64,
    off_by_one: f64,
    /// Distance of rows: q, k, v.
    strides: [Expr; 3],
}

const Q: Operand = Operand::Input(0);
const K: Operand = Operand::Input(1);
const V: Operand = Operand::Input(2);
const INDICES: Operand = Operand::Input(3);
const COUNT: Operand = Operand::Input(4);
const WEIGHTS: Operand = Operand::Input(5);
const DY: Operand = Operand::Input(6);

impl<'a> Attending<'a> {
    fn new(
        site: &'a Site<'a>,
        chunk: usize,
        scale: f64,
        off_by_one: f64,
        rows: &[Operand],
        pages: Option<Pages<'a>>,
        joint: bool,
    ) -> Result<Attending<'a>, Unsupported> {
        let dtype = site.dtype(Q);
        let shape = |at: Operand| &site.view(at).ty.shape;
        let (heads, head_dim, h, slots) = (site.int(Q, 2)?, site.int(Q, 3)?, site.int(K, 2)?, site.int(INDICES, 3)?);
        if !head_dim.is_multiple_of(16) || !(16..=128).contains(&head_dim) {
            return because(format!("head_dim is {head_dim}; kernels take multiples of 16 from 16 to 128"));
        }
        if !chunk.is_multiple_of(16) || !(16..=256).contains(&chunk) {
            return because(format!("chunks have {chunk} tokens; kernels take multiples of 16 from 16 to 256"));
        }
        if scale <= 0.0 {
            return because(format!("the scale is {scale}; kernels take positive ones"));
        }
        if slots > 64 {
            return because(format!("{slots} slots per token; kernels take at most 64"));
        }
        [INDICES, COUNT].into_iter().chain((!joint).then_some(WEIGHTS)).try_for_each(|at| site.contiguous(at))?;
        let piece = 16 / dtype.size();
        if site.vector(rows, piece) < piece {
            return because("rows of q, k, v and of what goes with them must begin at multiples of 16 bytes");
        }
        let chunks = match pages {
            Some(p) => p.entries.clone(),
            None => match shape(K)[1].checked_div(chunk as u64) {
                Some(chunks) => chunks,
                None => return because(format!("{} keys are no whole number of chunks of {chunk}", shape(K)[1])),
            },
        };
        Ok(Attending {
            sizes: Sizes { element: dtype.size(), head_dim, chunk, group: heads / h, slots, joint },
            dtype,
            exact: if joint { DType::F32 } else { site.dtype(WEIGHTS) },
            n: shape(Q)[0].clone(),
            l: shape(Q)[1].clone(),
            h,
            tokens_kv: shape(K)[1].clone(),
            chunks,
            pages,
            scale,
            off_by_one,
            strides: [site.row_stride(Q, 2)?, site.row_stride(K, 2)?, site.row_stride(V, 2)?],
        })
    }
    fn does_not_fit<T>(&self, target: &Target) -> Result<T, Unsupported> {
        let s = &self.sizes;
        because(format!(
            "a chunk of {} keys of {} elements of {} bytes does not fit {} bytes of shared memory",
            s.chunk, s.head_dim, s.element, target.shared_per_block
        ))
    }
    /// All tokens.
    fn whole(&self) -> Part {
        Part { n: Expr::from(&self.n), l: Expr::from(&self.l), sequence: Expr::int(0), token: Expr::int(0) }
    }
    fn index(&self, first: usize, part: &Part) -> InvertedIndex {
        InvertedIndex {
            n: part.n.clone(),
            l: part.l.clone(),
            token: part.token.clone(),
            h: self.h,
            k: self.sizes.slots,
            chunks: self.chunks.clone(),
            slab: self.sizes.slab(),
            first,
        }
    }
    /// A stub with what every kernel's config says.
    fn stub(&self, header: &'static str, template: &'static str, threads: usize) -> Stub {
        let s = &self.sizes;
        Stub::new(header, template, threads)
            .element("T", self.dtype)
            .int("head_dim", s.head_dim)
            .int("heads_per_kv", s.group)
            .int("slots", s.slots)
            .tag(format!("d{}_g{}_k{}", s.head_dim, s.group, s.slots))
            .hashed()
    }
    fn tiled(&self, header: &'static str, template: &'static str, t: &Tile, shared: usize, slab: usize) -> Stub {
        self.stub(header, template, 32 * t.warps)
            .int("chunk", self.sizes.chunk)
            .tag(format!("s{}", self.sizes.chunk))
            .int("warps", t.warps)
            .int("keys", t.keys)
            .int("slab", slab)
            .int("shared", shared)
            .float("scale", self.scale)
            .float("off_by_one", self.off_by_one)
            .flag("joint", self.sizes.joint)
            .shared(shared)
            .blocks_per_sm(t.blocks_per_sm)
    }
    fn read_qkv(&self, s: Stub) -> Stub {
        self.read_part(s, &self.whole())
    }
    /// As [`read_qkv`](Self::read_qkv), from a part's first token and sequence on.
    fn read_part(&self, s: Stub, part: &Part) -> Stub {
        let [q, k, v] = self.strides.clone();
        let stored = self.pages.map_or(self.dtype, |p| p.stored);
        let keys = part.sequence.clone() * &self.tokens_kv;
        let s = s.read_from("q", self.dtype, Q, part.token.clone() * q.clone()).i64("q_stride", q);
        match self.pages {
            // A pool belongs to all sequences.
            Some(p) => s
                .read("k", stored, K)
                .i64("k_stride", k)
                .read("v", stored, V)
                .i64("v_stride", v)
                .element("Stored", stored)
                .read("table", DType::I32, p.table),
            None => s
                .read_from("k", stored, K, keys.clone() * k.clone())
                .i64("k_stride", k)
                .read_from("v", stored, V, keys * v.clone())
                .i64("v_stride", v),
        }
    }
    /// The template that reads keys where they lie.
    fn template(&self, array: &'static str, paged: &'static str) -> &'static str {
        if self.pages.is_some() { paged } else { array }
    }
    fn slots_elements(&self, parts: usize) -> Expr {
        let whole = self.whole();
        self.slots_of(whole.n * whole.l, parts)
    }
    fn slots_of(&self, tokens: Expr, parts: usize) -> Expr {
        let s = &self.sizes;
        tokens * (s.slots * parts * self.h * s.group * s.head_dim)
    }
    /// Adds a token's slots to `out`.
    fn reduce_slots(&self, out: Operand, stride: Expr, slots: Operand, parts: usize) -> Call {
        self.reduce_part(out, stride, slots, parts, &self.whole())
    }
    fn reduce_part(&self, out: Operand, stride: Expr, slots: Operand, parts: usize, part: &Part) -> Call {
        let tokens = part.n.clone() * part.l.clone();
        let width = self.h * self.sizes.group * self.sizes.head_dim * self.sizes.element / 16;
        self.stub("attend_chunks", "attend_reduce_slots", ADD_THREADS)
            .int("parts", parts)
            .write_from("out", self.dtype, out, part.token.clone() * stride.clone())
            .i64("stride", stride)
            .read("slots", self.dtype, slots)
            .read_from("count", DType::I32, COUNT, part.token.clone() * self.h)
            .i64("tokens", tokens.clone())
            .i32("h", self.h)
            .launch(((tokens * width).ceil_div(ADD_THREADS), 1, 1))
            .into()
    }

    fn query_tile(&self, t: &Tile, o_stride: Expr) -> Form {
        let template = self.template("attend_query_tile", "attend_query_tile_paged");
        let stub = self.tiled("attend", template, t, t.shared, self.sizes.slab());
        let launch = self.query_tile_launch(stub, t, Operand::Output(0), o_stride);
        let why = format!(
            "{} tokens side by side share the chunks they chose; {} warps, {} keys at a time, {} blocks per SM",
            self.sizes.tokens(16 * t.warps),
            t.warps,
            t.keys,
            t.blocks_per_sm
        );
        Form::new("query_tile", why, vec![launch.into()])
    }
    /// One softmax over all chunks, with its log-sum-exp, an array of `exact`.
    fn joint_tile(&self, t: &Tile, lse: (Operand, DType), o: Operand, o_stride: Expr) -> Launch {
        let stub = self.tiled("attend", "attend_query_tile_joint", t, t.shared, self.sizes.slab());
        self.query_tile_launch(stub.write("lse", lse.1, lse.0), t, o, o_stride)
    }
    fn query_tile_launch(&self, stub: Stub, t: &Tile, o: Operand, o_stride: Expr) -> Launch {
        let rows = Expr::from(&self.l) * self.sizes.group;
        let kv = if self.pages.is_some() { ("chunks", &self.chunks) } else { ("tokens_kv", &self.tokens_kv) };
        let stub = stub.write("o", self.dtype, o).i64("o_stride", o_stride);
        let mut stub = self.read_qkv(stub).read("indices", DType::I32, INDICES).read("count", DType::I32, COUNT);
        if !self.sizes.joint {
            stub = stub.read("weights", self.exact, WEIGHTS);
        }
        stub.i32("all_rows", rows.clone()).i32("l", &self.l).i32(kv.0, kv.1).i32("h", self.h).launch((
            rows.ceil_div(16 * t.warps) * self.lists(),
            1,
            1,
        ))
    }

    fn lists(&self) -> Expr {
        Expr::from(&self.n) * self.h
    }

    /// Every pair has a block of its own, where the blocks of query tiles would leave half of the multiprocessors idle.
    fn pairs(&self, target: &Target, blocks: Expr, o_stride: Expr) -> Option<Form> {
        let mut t = self.sizes.chunk_major(target)?;
        t.shared -= self.sizes.pairs_bytes() - 8;
        let slots = Operand::Workspace(0);
        let template = self.template("attend_pairs", "attend_pairs_paged");
        let stub = self.tiled("attend_chunks", template, &t, t.shared, 1).write("slots", self.dtype, slots);
        let launch = self
            .read_qkv(stub)
            .read("indices", DType::I32, INDICES)
            .read("count", DType::I32, COUNT)
            .read("weights", self.exact, WEIGHTS)
            .i32("l", &self.l)
            .i32("h", self.h)
            .i32("chunks", &self.chunks)
            .launch((self.lists() * &self.l * self.sizes.slots, 1, 1));
        let calls = vec![launch.into(), self.reduce_slots(Operand::Output(0), o_stride, slots, 1)];
        let why = format!("few tokens: a block per pair; {} warps, {} keys at a time", t.warps, t.keys);
        let form = Form::new("pairs", why, calls)
            .with("slots", self.dtype, self.slots_elements(1))
            .when(Condition::Below(blocks * 2, Expr::int(target.sms)));
        Some(form)
    }

    /// Parts of the tokens that share a workspace, one after another: of one sequence's tokens, or of the sequences.
    fn parts(&self, cut: Cut) -> Vec<Part> {
        let (n, l) = (Expr::from(&self.n), Expr::from(&self.l));
        let part = |all: &Expr, parts: usize, i: usize| {
            let each = all.clone().ceil_div(parts);
            let first = each.clone() * i;
            (first.clone(), each.min(all.clone().less(first)))
        };
        match cut {
            Cut::Whole => vec![self.whole()],
            Cut::Tokens(parts) => (0..parts)
                .map(|i| {
                    let (token, l) = part(&l, parts, i);
                    Part { n: Expr::int(1), l, sequence: Expr::int(0), token }
                })
                .collect(),
            Cut::Sequences(parts) => (0..parts)
                .map(|i| {
                    let (sequence, n) = part(&n, parts, i);
                    Part { n, l: l.clone(), sequence: sequence.clone(), token: sequence * l.clone() }
                })
                .collect(),
        }
    }

    fn chunk_major(&self, target: &Target, from: usize, o_stride: Expr, cut: Cut) -> Option<Form> {
        let (template, t) = match self.sizes.chunk_major_hopper(target) {
            Some(t) => (("attend_chunks_hopper", "attend_chunks_hopper"), t),
            None => (("attend_chunks", "attend_chunks"), self.sizes.chunk_major(target)?),
        };
        let slots = Operand::Workspace(InvertedIndex::WORKSPACES);
        let parts = self.parts(cut);
        let mut calls = vec![];
        for part in &parts {
            let index = self.index(0, part);
            calls.extend(index.calls(INDICES, COUNT));
            let stub =
                self.tiled(template.0, template.1, &t, t.shared, self.sizes.slab()).write("slots", self.dtype, slots);
            let weights = part.token.clone() * (self.h * self.sizes.slots);
            let stub = self.read_part(stub, part).read_from("weights", self.exact, WEIGHTS, weights);
            calls.push(index.read(stub).launch((index.lists() * index.max_slabs(), 1, 1)).into());
            calls.push(self.reduce_part(Operand::Output(0), o_stride.clone(), slots, 1, part));
        }
        // The first part is the largest.
        let index = self.index(0, &parts[0]);
        let (name, manner) = match cut {
            Cut::Whole => ("chunk_major", String::new()),
            Cut::Tokens(parts) => ("chunk_major_tokens", format!("; tokens in {parts} parts")),
            Cut::Sequences(parts) => ("chunk_major_sequences", format!("; sequences in {parts} parts")),
        };
        let why = format!(
            "at least {from} pairs per chunk: its keys and values are loaded once per {} pairs; {} warps, {} keys at a time, \
             {} blocks per SM{manner}",
            index.slab, t.warps, t.keys, t.blocks_per_sm
        );
        let pairs = Expr::from(&self.l) * self.sizes.slots;
        let taken = self.slots_of(parts[0].n.clone() * parts[0].l.clone(), 1);
        let form = index
            .reserve(Form::new(name, why, calls))
            .with("slots", self.dtype, taken.clone())
            .needs(Condition::Below(taken * self.sizes.element, Expr::int(target.workspace + 1)))
            .when(Condition::AtLeast(pairs, Expr::from(&self.chunks) * from))
            // Where there are no chunks, nobody would fill the index.
            .needs(Condition::AtLeast(Expr::from(&self.chunks), Expr::int(1)));
        Some(match cut {
            // Tokens of several sequences do not follow each other.
            Cut::Tokens(_) => form.needs(Condition::Below(Expr::from(&self.n), Expr::int(2))),
            _ => form,
        })
    }

    /// Chunk by chunk, in as few parts as keep the workspace within the target's.
    fn chunk_majors(&self, target: &Target, from: usize, o_stride: &Expr) -> Vec<Form> {
        let cuts = [Cut::Whole, Cut::Tokens(8), Cut::Sequences(8)];
        cuts.into_iter().filter_map(|c| self.chunk_major(target, from, o_stride.clone(), c)).collect()
    }
}

/// How tokens are cut where their workspace would be too large at once.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cut {
    Whole,
    /// Of one sequence.
    Tokens(usize),
    Sequences(usize),
}

/// `n` sequences of `l` tokens, and which is the first of both.
struct Part {
    n: Expr,
    l: Expr,
    sequence: Expr,
    token: Expr,
}

/// What tiles do not take runs a warp per row.
fn or_any_size(
    tiled: Result<Vec<Form>, Unsupported>,
    site: &Site,
    (chunk, scale, off_by_one): (usize, f64, f64),
    dy: Option<Operand>,
) -> Result<Vec<Form>, Unsupported> {
    tiled.or_else(|why| {
        let (op, why) = (rambac_ir::ops::Attention::new(scale, false), why.to_string());
        AnyAttention { site, op, chunk: Some(chunk), weighed: true, off_by_one, dy, dlse: None, why }.forms()
    })
}

impl Cuda for ChunkAttention {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        or_any_size(forward(self, site), site, (self.chunk, self.scale, self.off_by_one), None)
    }
    fn candidates(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let mut all = self.forms(site)?;
        let o = Operand::Output(0);
        let pages = site.pages(6, K)?;
        let Ok(a) = Attending::new(site, self.chunk, self.scale, self.off_by_one, &[Q, K, V, o], pages, false) else {
            return Ok(all);
        };
        for t in a.sizes.query_tiles(site.target) {
            all.push(a.query_tile(&t, site.row_stride(o, 2)?));
        }
        // Chunk by chunk wherever there are chunks.
        if a.pages.is_none() && a.sizes.chunk_major_from().is_none() {
            all.extend(a.chunk_majors(site.target, 0, &site.row_stride(o, 2)?));
        }
        Ok(all)
    }
}

/// What attending ops run where no tile takes them.
fn attend_any(op: &Attend, site: &Site, grad: bool, why: String) -> Result<Vec<Form>, Unsupported> {
    let attention = rambac_ir::ops::Attention { lse: op.joint, ..rambac_ir::ops::Attention::new(op.scale, false) };
    let dy = grad.then_some(Operand::Input(if op.joint { 7 } else { 5 }));
    let dlse = dy.filter(|_| op.joint).map(|_| Operand::Input(8));
    let (chunk, off_by_one) = (Some(op.chunk), op.off_by_one);
    AnyAttention { site, op: attention, chunk, weighed: false, off_by_one, dy, dlse, why }.forms()
}

impl Cuda for Attend {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        joint(self, site).or_else(|why| attend_any(self, site, false, why.to_string()))
    }
}

impl Cuda for AttendGrad {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let AttendGrad { chunk, scale, off_by_one, joint } = *self;
        let op = Attend { chunk, scale, off_by_one, joint };
        joint_gradient(&op, site).or_else(|why| attend_any(&op, site, true, why.to_string()))
    }
}

/// Tiles make a softmax per chunk only together with the sum over chunks, which is another op.
fn refuse_apart(op: &Attend) -> Result<(), Unsupported> {
    if op.joint {
        Ok(())
    } else {
        because("it was not fused with the sum over chunks, so the output of every chunk is in memory")
    }
}

fn joint(op: &Attend, site: &Site) -> Result<Vec<Form>, Unsupported> {
    refuse_apart(op)?;
    let [o, lse] = [0, 1].map(Operand::Output);
    if site.pages(5, K)?.is_some() {
        return because("keys lie in pages, which tiles with one softmax over all chunks do not read");
    }
    let a = Attending::new(site, op.chunk, op.scale, op.off_by_one, &[Q, K, V, o], None, true)?;
    site.contiguous(lse)?;
    let Some(t) = a.sizes.query_tile(site.target) else { return a.does_not_fit(site.target) };
    let launch = a.joint_tile(&t, (lse, a.dtype), o, site.row_stride(o, 2)?);
    let why = format!(
        "one softmax over what {} tokens side by side chose; {} warps, {} keys at a time, {} blocks per SM",
        a.sizes.tokens(16 * t.warps),
        t.warps,
        t.keys,
        t.blocks_per_sm
    );
    Ok(vec![Form::new("query_tile", why, vec![launch.into()])])
}

/// Chunk by chunk, with the log-sum-exp of the forward; where that was rounded to 16 bits, it is computed again.
fn joint_gradient(op: &Attend, site: &Site) -> Result<Vec<Form>, Unsupported> {
    refuse_apart(op)?;
    let [o, lse, dy, dlse] = [5, 6, 7, 8].map(Operand::Input);
    let rows = [Q, K, V, dy].into_iter().chain([0, 1, 2].map(Operand::Output)).collect::<Vec<_>>();
    let a = Attending::new(site, op.chunk, op.scale, op.off_by_one, &rows, None, true)?;
    [lse, dlse].into_iter().try_for_each(|at| site.contiguous(at))?;
    let stats = Operand::Workspace(InvertedIndex::WORKSPACES + 2);
    let (mut before, mut from) = (vec![], (lse, (o, site.row_stride(o, 2)?)));
    let exact = a.dtype == DType::F32;
    if !exact {
        let Some(t) = a.sizes.query_tile(site.target) else { return a.does_not_fit(site.target) };
        // The slots of dq are not in use yet.
        let (again, slots) =
            (Operand::Workspace(InvertedIndex::WORKSPACES + 4), Operand::Workspace(InvertedIndex::WORKSPACES));
        let stride = Expr::from(a.h * a.sizes.group * a.sizes.head_dim);
        before.push(a.joint_tile(&t, (again, DType::F32), slots, stride.clone()).into());
        from = (again, (slots, stride));
    }
    let tokens = a.whole().n * a.whole().l;
    let all = tokens * (a.h * a.sizes.group);
    let found = a
        .stub("attend_grad", "attend_joint_stats", ADD_THREADS)
        .write("log2_sum", DType::F32, Operand::Workspace(InvertedIndex::WORKSPACES + 3))
        .write("delta", DType::F32, stats)
        .read("o", a.dtype, from.1.0)
        .i64("o_stride", from.1.1)
        .read("lse", if exact { a.dtype } else { DType::F32 }, from.0)
        .read("dy", a.dtype, dy)
        .i64("dy_stride", site.row_stride(dy, 2)?)
        .read("dlse", a.dtype, dlse)
        .i64("rows", all.clone())
        .i32("heads", a.h * a.sizes.group)
        .launch(((all.clone() * 32).ceil_div(ADD_THREADS), 1, 1));
    before.push(found.into());
    let forms = by_chunks(&a, site, dy, before, all.clone())?;
    Ok(forms.into_iter().map(|f| if exact { f } else { f.with("lse", DType::F32, all.clone()) }).collect())
}

impl Cuda for ChunkAttentionGrad {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        or_any_size(gradient(self, site), site, (self.chunk, self.scale, self.off_by_one), Some(DY))
    }
}

fn forward(op: &ChunkAttention, site: &Site) -> Result<Vec<Form>, Unsupported> {
    let o = Operand::Output(0);
    let a = Attending::new(site, op.chunk, op.scale, op.off_by_one, &[Q, K, V, o], site.pages(6, K)?, false)?;
    let o_stride = site.row_stride(o, 2)?;
    let Some(t) = a.sizes.query_tile(site.target) else { return a.does_not_fit(site.target) };
    let blocks = (Expr::from(&a.l) * a.sizes.group).ceil_div(16 * t.warps) * a.lists();
    let mut forms: Vec<Form> = a.pairs(site.target, blocks, o_stride.clone()).into_iter().collect();
    // Segments of a long context choose each chunk a few times: no index of all chunks.
    if let Some(from) = a.sizes.chunk_major_from().filter(|_| a.pages.is_none()) {
        forms.extend(a.chunk_majors(site.target, from, &o_stride));
    }
    forms.push(a.query_tile(&t, o_stride));
    Ok(forms)
}

fn gradient(op: &ChunkAttentionGrad, site: &Site) -> Result<Vec<Form>, Unsupported> {
    let [dq, dk, dv, dw] = [0, 1, 2, 3].map(Operand::Output);
    let a = Attending::new(site, op.chunk, op.scale, op.off_by_one, &[Q, K, V, DY, dq, dk, dv], None, false)?;
    site.contiguous(dw)?;
    let rows = a.lists() * &a.l * (a.sizes.slots * a.sizes.group);
    by_chunks(&a, site, DY, vec![], rows)
}

/// The gradient chunk by chunk; `before`: what finds the `rows` log2-sums and δ of joint softmaxes, once the index is there.
fn by_chunks(a: &Attending, site: &Site, dy: Operand, before: Vec<Call>, rows: Expr) -> Result<Vec<Form>, Unsupported> {
    let [dq, dk, dv, dw] = [0, 1, 2, 3].map(Operand::Output);
    let s = &a.sizes;
    let (template, t, shared) = match (s.grad_hopper(site.target), s.grad(site.target)) {
        (Some(t), _) => (("attend_chunks_hopper", "attend_grad_hopper"), t, t.shared),
        (None, Some(t)) => (("attend_grad", "attend_grad"), t, s.grad_bytes(t.warps, t.keys)),
        (None, None) => return a.does_not_fit(site.target),
    };
    let parts = s.chunk / t.keys;
    let index = a.index(0, &a.whole());
    let [slots, partial, delta, log2_sum] = [0, 1, 2, 3].map(|i| Operand::Workspace(InvertedIndex::WORKSPACES + i));
    let operands = |stub: Stub| -> Result<Stub, Unsupported> {
        let stub = a.read_qkv(stub);
        let stub = if s.joint { stub } else { stub.read("weights", a.exact, WEIGHTS) };
        let stub = stub.read("dy", a.dtype, dy);
        Ok(index.read(stub.i64("dy_stride", site.row_stride(dy, 2)?)))
    };
    let mut calls = index.calls(INDICES, COUNT);
    calls.extend(before);
    let slabs = index.lists() * index.max_slabs();
    let two_passes = parts > 1 && !s.joint;
    if two_passes {
        let shared = s.stats_bytes(t.warps, t.keys);
        let stub = a.tiled("attend_grad", "attend_grad_stats", &Tile { blocks_per_sm: 1, ..t }, shared, s.slab());
        let stub = stub.write("log2_sum", DType::F32, log2_sum).write("delta", DType::F32, delta);
        calls.push(operands(stub)?.launch((slabs.clone(), 1, 1)).into());
    }
    let template = if s.joint { ("attend_grad", "attend_grad_joint") } else { template };
    let stub = a
        .tiled(template.0, template.1, &t, shared, s.slab())
        .write("slots", a.dtype, slots)
        .write("partial", DType::F32, partial)
        .write("delta", DType::F32, delta)
        .read("log2_sum", DType::F32, log2_sum);
    calls.push(operands(stub)?.launch((slabs * parts, 1, 1)).into());
    calls.push(a.reduce_slots(dq, site.row_stride(dq, 2)?, slots, parts));
    if !s.joint {
        let weights = a.lists() * &a.l * s.slots;
        calls.push(
            a.stub("attend_grad", "attend_grad_heads", ADD_THREADS)
                .write("dw", site.dtype(dw), dw)
                .read("delta", DType::F32, delta)
                .read("count", DType::I32, COUNT)
                .i64("lists_tokens", a.lists() * &a.l)
                .launch((weights.ceil_div(ADD_THREADS), 1, 1))
                .into(),
        );
    }
    let stub = a
        .stub("attend_grad", "attend_grad_chunks", ADD_THREADS)
        .int("chunk", s.chunk)
        .int("keys", t.keys)
        .write("dk", a.dtype, dk)
        .i64("dk_stride", site.row_stride(dk, 2)?)
        .write("dv", a.dtype, dv)
        .i64("dv_stride", site.row_stride(dv, 2)?)
        .read("partial", DType::F32, partial);
    calls.push(index.read_slabs(stub).launch((a.lists() * &a.chunks, 1, 1)).into());
    let why = format!(
        "chunk by chunk, {} products; {} pairs a slab, {} warps, {} keys at a time, {} blocks per SM",
        if two_passes { 7 } else { 5 },
        index.slab,
        t.warps,
        t.keys,
        t.blocks_per_sm
    );
    let form = index
        .reserve(Form::new("chunk_major", why, calls))
        .with("slots", a.dtype, a.slots_elements(parts))
        .with("partial", DType::F32, index.lists() * index.max_slabs() * (2 * s.chunk * s.head_dim))
        .with("delta", DType::F32, rows.clone())
        .with("log2_sum", DType::F32, if two_passes || s.joint { rows } else { Expr::int(0) });
    Ok(vec![form])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::target::Arch;

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
