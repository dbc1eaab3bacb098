//! Attention to selected chunks: by query tiles or chunk by chunk, and its gradient.
//!
//! What decides: ρ = L·K / C, the pairs (token, slot) per chunk, which is how often a chunk that stays on chip is used.  Chunk
//! by chunk a pair moves its queries, a slot written and the slot read, 3·G rows of d, and 2·chunk / ρ rows of keys and values;
//! by query tiles 2·chunk rows of keys and values, shared by as many pairs of the tile as chose the chunk, for which we take
//! [`SHARED_BY`].  Where tokens are so few that most multiprocessors would idle, every pair has a block.

use super::any_size::AnyAttention;
use super::inverted_index::InvertedIndex;
use super::{Cuda, Site, Unsupported, because};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Call, Condition, Form, Operand};
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
    fn warps_by_registers(&self, keys: usize, whole: bool) -> usize {
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
    /// All tiles of the forward by query tiles, one for each number of warps.
    pub fn query_tiles(&self, target: &Target) -> impl Iterator<Item = Tile> {
        let resident = |keys| self.warps_by_registers(keys, keys == self.chunk);
        let one = move |w| self.best(target, &[w], 64, |w, k| self.query_tile_bytes(w, k), resident);
        self.query_tile_warps().into_iter().filter_map(one)
    }
    /// The tile of the forward by query tiles.
    pub fn query_tile(&self, target: &Target) -> Option<Tile> {
        let warps = self.query_tile_warps();
        let resident = |keys| self.warps_by_registers(keys, keys == self.chunk);
        self.best(target, &warps, 64, |w, k| self.query_tile_bytes(w, k), resident)
    }
    /// The tile of the forward chunk by chunk, with the whole chunk in shared memory.
    pub fn chunk_major(&self, target: &Target) -> Option<Tile> {
        let resident = |keys| self.warps_by_registers(keys, keys == self.chunk);
        self.best(target, &[4], 64, |w, _| self.chunk_major_bytes(w), resident)
    }
    /// The tile of the gradient.
    pub fn grad(&self, target: &Target) -> Option<Tile> {
        // dk and dv of 64 keys take all registers at 128 columns, and at 96 of f32.
        let most = if self.head_dim > if self.element == 2 { 96 } else { 64 } { 32 } else { 64 };
        let bytes = |w, k| match k {
            // A warp holds dk and dv of 16 keys.
            k if k > 16 * w => usize::MAX / 2,
            k if k == self.chunk => self.grad_bytes(w, k),
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
        if target.arch != Arch::Sm90a || self.element != 2 || self.head_dim != 64 || self.chunk != 64 {
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
struct Attending {
    sizes: Sizes,
    dtype: DType,
    /// Of the chunks' weights.
    exact: DType,
    n: Dim,
    l: Dim,
    h: usize,
    tokens_kv: Dim,
    chunks: Dim,
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

impl Attending {
    fn new(site: &Site, chunk: usize, scale: f64, off_by_one: f64, rows: &[Operand]) -> Result<Attending, Unsupported> {
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
        [INDICES, COUNT, WEIGHTS].into_iter().try_for_each(|at| site.contiguous(at))?;
        let piece = 16 / dtype.size();
        if site.vector(rows, piece) < piece {
            return because("rows of q, k, v and of what goes with them must begin at multiples of 16 bytes");
        }
        let Some(chunks) = shape(K)[1].checked_div(chunk as u64) else {
            return because(format!("{} keys are no whole number of chunks of {chunk}", shape(K)[1]));
        };
        Ok(Attending {
            sizes: Sizes { element: dtype.size(), head_dim, chunk, group: heads / h, slots },
            dtype,
            exact: site.dtype(WEIGHTS),
            n: shape(Q)[0].clone(),
            l: shape(Q)[1].clone(),
            h,
            tokens_kv: shape(K)[1].clone(),
            chunks,
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
    fn index(&self, first: usize) -> InvertedIndex {
        InvertedIndex {
            n: self.n.clone(),
            l: self.l.clone(),
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
            .shared(shared)
            .blocks_per_sm(t.blocks_per_sm)
    }
    fn read_qkv(&self, s: Stub) -> Stub {
        let [q, k, v] = self.strides.clone();
        s.read("q", self.dtype, Q)
            .i64("q_stride", q)
            .read("k", self.dtype, K)
            .i64("k_stride", k)
            .read("v", self.dtype, V)
            .i64("v_stride", v)
    }
    fn slots_elements(&self, parts: usize) -> Expr {
        let s = &self.sizes;
        Expr::from(&self.n) * &self.l * (s.slots * parts * self.h * s.group * s.head_dim)
    }
    /// Adds a token's slots to `out`.
    fn reduce_slots(&self, out: Operand, stride: Expr, slots: Operand, parts: usize) -> Call {
        let tokens = Expr::from(&self.n) * &self.l;
        let width = self.h * self.sizes.group * self.sizes.head_dim * self.sizes.element / 16;
        self.stub("attend_chunks", "attend_reduce_slots", ADD_THREADS)
            .int("parts", parts)
            .write("out", self.dtype, out)
            .i64("stride", stride)
            .read("slots", self.dtype, slots)
            .read("count", DType::I32, COUNT)
            .i64("tokens", tokens.clone())
            .i32("h", self.h)
            .launch(((tokens * width).ceil_div(ADD_THREADS), 1, 1))
            .into()
    }

    fn query_tile(&self, t: &Tile, o_stride: Expr) -> Form {
        let o = Operand::Output(0);
        let rows = Expr::from(&self.l) * self.sizes.group;
        let stub = self
            .tiled("attend", "attend_query_tile", t, t.shared, self.sizes.slab())
            .write("o", self.dtype, o)
            .i64("o_stride", o_stride);
        let launch = self
            .read_qkv(stub)
            .read("indices", DType::I32, INDICES)
            .read("count", DType::I32, COUNT)
            .read("weights", self.exact, WEIGHTS)
            .i32("all_rows", rows.clone())
            .i32("l", &self.l)
            .i32("tokens_kv", &self.tokens_kv)
            .i32("h", self.h)
            .launch((rows.ceil_div(16 * t.warps) * self.lists(), 1, 1));
        let why = format!(
            "{} tokens side by side share the chunks they chose; {} warps, {} keys at a time, {} blocks per SM",
            self.sizes.tokens(16 * t.warps),
            t.warps,
            t.keys,
            t.blocks_per_sm
        );
        Form::new("query_tile", why, vec![launch.into()])
    }

    fn lists(&self) -> Expr {
        Expr::from(&self.n) * self.h
    }

    /// Every pair has a block of its own, where the blocks of query tiles would leave half of the multiprocessors idle.
    fn pairs(&self, target: &Target, blocks: Expr, o_stride: Expr) -> Option<Form> {
        let mut t = self.sizes.chunk_major(target)?;
        t.shared -= self.sizes.pairs_bytes() - 8;
        let slots = Operand::Workspace(0);
        let stub = self.tiled("attend_chunks", "attend_pairs", &t, t.shared, 1).write("slots", self.dtype, slots);
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

    fn chunk_major(&self, target: &Target, from: usize, o_stride: Expr) -> Option<Form> {
        let (template, t) = match self.sizes.chunk_major_hopper(target) {
            Some(t) => (("attend_chunks_hopper", "attend_chunks_hopper"), t),
            None => (("attend_chunks", "attend_chunks"), self.sizes.chunk_major(target)?),
        };
        let index = self.index(0);
        let slots = Operand::Workspace(InvertedIndex::WORKSPACES);
        let mut calls = index.calls(INDICES, COUNT);
        let stub =
            self.tiled(template.0, template.1, &t, t.shared, self.sizes.slab()).write("slots", self.dtype, slots);
        let stub = self.read_qkv(stub).read("weights", self.exact, WEIGHTS);
        calls.push(index.read(stub).launch((index.lists() * index.max_slabs(), 1, 1)).into());
        calls.push(self.reduce_slots(Operand::Output(0), o_stride, slots, 1));
        let why = format!(
            "at least {from} pairs per chunk: its keys and values are loaded once per {} pairs; {} warps, {} keys at a time, \
             {} blocks per SM",
            index.slab, t.warps, t.keys, t.blocks_per_sm
        );
        let pairs = Expr::from(&self.l) * self.sizes.slots;
        let form = index
            .reserve(Form::new("chunk_major", why, calls))
            .with("slots", self.dtype, self.slots_elements(1))
            .when(Condition::AtLeast(pairs, Expr::from(&self.chunks) * from))
            // Where there are no chunks, nobody would fill the index.
            .needs(Condition::AtLeast(Expr::from(&self.chunks), Expr::int(1)));
        Some(form)
    }
}

/// What tiles do not take runs a warp per row.
fn or_any_size(
    tiled: Result<Vec<Form>, Unsupported>,
    site: &Site,
    (chunk, scale, off_by_one): (usize, f64, f64),
    dy: Option<Operand>,
) -> Result<Vec<Form>, Unsupported> {
    tiled.or_else(|why| {
        AnyAttention { site, chunk: Some(chunk), scale, off_by_one, causal: false, dy, why: why.to_string() }.forms()
    })
}

impl Cuda for ChunkAttention {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        or_any_size(forward(self, site), site, (self.chunk, self.scale, self.off_by_one), None)
    }
    fn candidates(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let mut all = self.forms(site)?;
        let o = Operand::Output(0);
        let Ok(a) = Attending::new(site, self.chunk, self.scale, self.off_by_one, &[Q, K, V, o]) else {
            return Ok(all);
        };
        for t in a.sizes.query_tiles(site.target) {
            all.push(a.query_tile(&t, site.row_stride(o, 2)?));
        }
        // Chunk by chunk wherever there are chunks.
        if a.sizes.chunk_major_from().is_none() {
            all.extend(a.chunk_major(site.target, 0, site.row_stride(o, 2)?));
        }
        Ok(all)
    }
}

impl Cuda for ChunkAttentionGrad {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        or_any_size(gradient(self, site), site, (self.chunk, self.scale, self.off_by_one), Some(DY))
    }
}

fn forward(op: &ChunkAttention, site: &Site) -> Result<Vec<Form>, Unsupported> {
    let o = Operand::Output(0);
    let a = Attending::new(site, op.chunk, op.scale, op.off_by_one, &[Q, K, V, o])?;
    let o_stride = site.row_stride(o, 2)?;
    let Some(t) = a.sizes.query_tile(site.target) else { return a.does_not_fit(site.target) };
    let blocks = (Expr::from(&a.l) * a.sizes.group).ceil_div(16 * t.warps) * a.lists();
    let mut forms: Vec<Form> = a.pairs(site.target, blocks, o_stride.clone()).into_iter().collect();
    if let Some(from) = a.sizes.chunk_major_from() {
        forms.extend(a.chunk_major(site.target, from, o_stride.clone()));
    }
    forms.push(a.query_tile(&t, o_stride));
    Ok(forms)
}

fn gradient(op: &ChunkAttentionGrad, site: &Site) -> Result<Vec<Form>, Unsupported> {
    let [dq, dk, dv, dw] = [0, 1, 2, 3].map(Operand::Output);
    let a = Attending::new(site, op.chunk, op.scale, op.off_by_one, &[Q, K, V, DY, dq, dk, dv])?;
    site.contiguous(dw)?;
    let s = &a.sizes;
    let (template, t, shared) = match (s.grad_hopper(site.target), s.grad(site.target)) {
        (Some(t), _) => (("attend_chunks_hopper", "attend_grad_hopper"), t, t.shared),
        (None, Some(t)) => (("attend_grad", "attend_grad"), t, s.grad_bytes(t.warps, t.keys)),
        (None, None) => return a.does_not_fit(site.target),
    };
    let parts = s.chunk / t.keys;
    let index = a.index(0);
    let [slots, partial, delta, log2_sum] = [0, 1, 2, 3].map(|i| Operand::Workspace(InvertedIndex::WORKSPACES + i));
    let rows = |stub: Stub| -> Result<Stub, Unsupported> {
        let stub = a.read_qkv(stub).read("weights", a.exact, WEIGHTS).read("dy", a.dtype, DY);
        Ok(index.read(stub.i64("dy_stride", site.row_stride(DY, 2)?)))
    };
    let mut calls = index.calls(INDICES, COUNT);
    let slabs = index.lists() * index.max_slabs();
    if parts > 1 {
        let shared = s.stats_bytes(t.warps, t.keys);
        let stub = a.tiled("attend_grad", "attend_grad_stats", &Tile { blocks_per_sm: 1, ..t }, shared, s.slab());
        let stub = stub.write("log2_sum", DType::F32, log2_sum).write("delta", DType::F32, delta);
        calls.push(rows(stub)?.launch((slabs.clone(), 1, 1)).into());
    }
    let stub = a
        .tiled(template.0, template.1, &t, shared, s.slab())
        .write("slots", a.dtype, slots)
        .write("partial", DType::F32, partial)
        .write("delta", DType::F32, delta)
        .read("log2_sum", DType::F32, log2_sum);
    calls.push(rows(stub)?.launch((slabs * parts, 1, 1)).into());
    calls.push(a.reduce_slots(dq, site.row_stride(dq, 2)?, slots, parts));
    let weights = a.lists() * &a.l * s.slots;
    calls.push(
        a.stub("attend_grad", "attend_grad_heads", ADD_THREADS)
            .write("dw", site.dtype(dw), dw)
            .read("delta", DType::F32, delta)
            .read("count", DType::I32, COUNT)
            .i64("lists_tokens", a.lists() * &a.l)
            .launch((weights.clone().ceil_div(ADD_THREADS), 1, 1))
            .into(),
    );
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
        if parts > 1 { 7 } else { 5 },
        index.slab,
        t.warps,
        t.keys,
        t.blocks_per_sm
    );
    let rows = weights * s.group;
    let form = index
        .reserve(Form::new("chunk_major", why, calls))
        .with("slots", a.dtype, a.slots_elements(parts))
        .with("partial", DType::F32, index.lists() * index.max_slabs() * (2 * s.chunk * s.head_dim))
        .with("delta", DType::F32, rows.clone())
        .with("log2_sum", DType::F32, if parts > 1 { rows } else { Expr::int(0) });
    Ok(vec![form])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::target::Arch;

    fn sizes(element: usize, head_dim: usize, chunk: usize, group: usize) -> Sizes {
        Sizes { element, head_dim, chunk, group, slots: 8 }
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
                        let s = Sizes { slots: 64, ..sizes(element, head_dim, chunk, group) };
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
