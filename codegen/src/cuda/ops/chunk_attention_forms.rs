//! Forms of attention to selected chunks: query tiles, pairs, and chunk by chunk, in parts where the workspace asks for it.

use super::chunk_attention_sizes::{Sizes, Tile, WORTH_SHARING};
use super::inverted_index::InvertedIndex;
use super::{Pages, Site, Unsupported, because};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Call, Condition, Form, Launch, Operand, TensorParam};
use crate::cuda::stub::Stub;
use crate::cuda::target::Target;
use rambac_ir::{DType, Dim};

/// Threads of the kernels that add up.
pub(super) const ADD_THREADS: usize = 128;
/// Tokens whose slots a block adds up, one after the other.
const ADD_TOKENS: usize = 8;

/// Operands of an attending op, by name.
pub(super) struct Attending<'a> {
    pub sizes: Sizes,
    pub dtype: DType,
    /// Of the chunks' weights.
    pub exact: DType,
    pub n: Dim,
    pub l: Dim,
    pub h: usize,
    tokens_kv: Dim,
    /// Of a sequence.
    pub chunks: Dim,
    pub pages: Option<Pages<'a>>,
    scale: f64,
    off_by_one: f64,
    /// Distance of rows: q, k, v.
    strides: [Expr; 3],
}

pub(super) const Q: Operand = Operand::Input(0);
pub(super) const K: Operand = Operand::Input(1);
pub(super) const V: Operand = Operand::Input(2);
pub(super) const INDICES: Operand = Operand::Input(3);
pub(super) const COUNT: Operand = Operand::Input(4);
pub(super) const WEIGHTS: Operand = Operand::Input(5);
pub(super) const DY: Operand = Operand::Input(6);

impl<'a> Attending<'a> {
    pub fn new(
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
    pub fn does_not_fit<T>(&self, target: &Target) -> Result<T, Unsupported> {
        let s = &self.sizes;
        because(format!(
            "a chunk of {} keys of {} elements of {} bytes does not fit {} bytes of shared memory",
            s.chunk, s.head_dim, s.element, target.shared_per_block
        ))
    }
    /// All tokens.
    pub fn whole(&self) -> Part {
        Part { n: Expr::from(&self.n), l: Expr::from(&self.l), sequence: Expr::int(0), token: Expr::int(0) }
    }
    pub fn index(&self, first: usize, part: &Part) -> InvertedIndex {
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
    pub fn stub(&self, header: &'static str, template: &'static str, threads: usize) -> Stub {
        let s = &self.sizes;
        Stub::new(header, template, threads)
            .element("T", self.dtype)
            .int("head_dim", s.head_dim)
            .int("heads_per_kv", s.group)
            .int("slots", s.slots)
            .tag(format!("d{}_g{}_k{}", s.head_dim, s.group, s.slots))
            .hashed()
    }
    pub fn tiled(&self, header: &'static str, template: &'static str, t: &Tile, shared: usize, slab: usize) -> Stub {
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
    pub fn read_qkv(&self, s: Stub) -> Stub {
        self.read_part(s, &self.whole())
    }
    /// As [`read_qkv`](Self::read_qkv), from a part's first token and sequence on.
    pub fn read_part(&self, s: Stub, part: &Part) -> Stub {
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
    pub fn template(&self, array: &'static str, paged: &'static str) -> &'static str {
        if self.pages.is_some() { paged } else { array }
    }
    pub fn slots_elements(&self, parts: usize) -> Expr {
        let whole = self.whole();
        self.slots_of(whole.n * whole.l, parts)
    }
    pub fn slots_of(&self, tokens: Expr, parts: usize) -> Expr {
        let s = &self.sizes;
        tokens * (s.slots * parts * self.h * s.group * s.head_dim)
    }
    /// Adds a token's slots to `out`.
    pub fn reduce_slots(&self, out: Operand, stride: Expr, slots: Operand, parts: usize, count: Operand) -> Call {
        self.reduce_part((out, stride), (slots, parts), count, &self.whole())
    }
    /// A token whose count is below zero keeps what `out` has.
    fn reduce_part(
        &self,
        (out, stride): (Operand, Expr),
        (slots, parts): (Operand, usize),
        count: Operand,
        part: &Part,
    ) -> Call {
        let tokens = part.n.clone() * part.l.clone();
        let width = self.h * self.sizes.group * self.sizes.head_dim * self.sizes.element / 16;
        self.stub("attend_chunks", "attend_reduce_slots", ADD_THREADS)
            .int("parts", parts)
            .write_from("out", self.dtype, out, part.token.clone() * stride.clone())
            .i64("stride", stride)
            .read("slots", self.dtype, slots)
            .read_from("count", DType::I32, count, part.token.clone() * self.h)
            .int("times", ADD_TOKENS)
            .i64("tokens", tokens.clone())
            .i32("h", self.h)
            .launch(((tokens * width).ceil_div(ADD_THREADS * ADD_TOKENS), 1, 1))
            .into()
    }

    pub fn query_tile(&self, t: &Tile, o_stride: Expr) -> Form {
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
    pub fn joint_tile(&self, t: &Tile, lse: (Operand, DType), o: Operand, o_stride: Expr) -> Launch {
        let stub = self.tiled("attend", "attend_query_tile_joint", t, t.shared, self.sizes.slab());
        self.query_tile_launch(stub.write("lse", lse.1, lse.0), t, o, o_stride)
    }
    pub fn query_tile_launch(&self, stub: Stub, t: &Tile, o: Operand, o_stride: Expr) -> Launch {
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

    pub fn lists(&self) -> Expr {
        Expr::from(&self.n) * self.h
    }

    /// Every pair has a block of its own, where the blocks of query tiles would leave half of the multiprocessors idle.
    pub fn pairs(&self, target: &Target, blocks: Expr, o_stride: Expr) -> Option<Form> {
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
        let calls = vec![launch.into(), self.reduce_slots(Operand::Output(0), o_stride, slots, 1, COUNT)];
        let why = format!("few tokens: a block per pair; {} warps, {} keys at a time", t.warps, t.keys);
        let form = Form::new("pairs", why, calls)
            .with("slots", self.dtype, self.slots_elements(1))
            .when(Condition::Below(blocks * 2, Expr::int(target.sms)));
        Some(form)
    }

    /// Parts of the tokens that share a workspace, one after another: of one sequence's tokens, or of the sequences.
    pub fn parts(&self, cut: Cut) -> Vec<Part> {
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

    /// Tiles of what neighbours share: which they are, and their launch.  Returns the counts of the others.
    fn shared_tiles(&self, t: &Tile, o_stride: Expr, calls: &mut Vec<Call>, target: &Target) -> Operand {
        let s = &self.sizes;
        let [scattered, numbers, unions, ordered] =
            [1, 2, 3, 4].map(|i| Operand::Workspace(InvertedIndex::WORKSPACES + i));
        let tiles = Expr::from(&self.l).ceil_div(s.shared_tokens());
        let all = tiles.clone() * self.lists();
        let stub = |template, threads| {
            self.stub("attend_tile_hopper", template, threads).int("tiles", 2).int("shared_by", WORTH_SHARING)
        };
        let split = stub("attend_split", ADD_THREADS)
            .write("scattered", DType::I32, scattered)
            .write("numbers", DType::I32, numbers)
            .write("unions", DType::I32, unions)
            .write("ordered", DType::F32, ordered)
            .read("indices", DType::I32, INDICES)
            .read("count", DType::I32, COUNT)
            .read("weights", self.exact, WEIGHTS)
            .i64("all_tiles", all.clone())
            .i32("tiles", tiles.clone())
            .i32("l", &self.l)
            .i32("h", self.h);
        calls.push(split.launch((all.clone().ceil_div(ADD_THREADS / 32), 1, 1)).into());
        let attend = stub("attend_tiles", 32 * t.warps)
            .int("chunk", s.chunk)
            .int("keys", t.keys)
            .int("shared", t.shared)
            .float("scale", self.scale)
            .float("off_by_one", self.off_by_one)
            .flag("joint", false)
            .shared(t.shared)
            .blocks_per_sm(t.blocks_per_sm)
            .write("o", self.dtype, Operand::Output(0))
            .i64("o_stride", o_stride);
        let [q, k, v] = self.tensors(64);
        let attend = attend
            .tensor("q", q)
            .tensor("k", k)
            .tensor("v", v)
            .read("numbers", DType::I32, numbers)
            .read("unions", DType::I32, unions)
            .read("ordered", DType::F32, ordered)
            .i32("all_tiles", all.clone())
            .i32("tiles", tiles)
            .i32("l", &self.l)
            .i32("h", self.h);
        calls.push(attend.launch((all.min(Expr::int(target.sms * t.blocks_per_sm)), 1, 1)).into());
        scattered
    }
    /// Queries in boxes of so many rows (token, query head of a key head), keys and values in boxes of a chunk; 128 bytes wide.
    fn tensors(&self, rows: usize) -> [TensorParam; 3] {
        let Sizes { element, head_dim, chunk, group, .. } = self.sizes;
        let [q, k, v] = self.strides.clone();
        let tensor = |at, strides: Vec<Expr>, dims: Vec<Expr>, tile: Vec<usize>| TensorParam {
            at,
            first: Expr::int(0),
            dtype: self.dtype,
            dims,
            strides,
            tile: [128 / element].into_iter().chain(tile).collect(),
        };
        let (n, l, tokens) = (Expr::from(&self.n), Expr::from(&self.l), Expr::from(&self.tokens_kv));
        let keys = |at, row: Expr| {
            let dims = vec![Expr::int(self.h * head_dim), tokens.clone(), n.clone()];
            tensor(at, vec![row.clone(), row * tokens.clone()], dims, vec![chunk, 1])
        };
        let heads = group.min(rows);
        let dims = vec![Expr::int(head_dim), Expr::int(self.h * group), l.clone(), n.clone()];
        let strides = vec![Expr::int(head_dim), q.clone(), q * l];
        [tensor(Q, strides, dims, vec![heads, rows / heads, 1]), keys(K, k), keys(V, v)]
    }
    /// Reserves what [`shared_tiles`](Self::shared_tiles) writes.
    fn reserve_shared(&self, f: Form) -> Form {
        let s = &self.sizes;
        let tiles = Expr::from(&self.l).ceil_div(s.shared_tokens()) * self.lists();
        f.with("scattered", DType::I32, self.lists() * &self.l)
            .with("tiles.numbers", DType::I32, tiles.clone())
            .with("tiles.unions", DType::I32, tiles.clone() * (2 * s.shared_most()))
            .with("tiles.weights", DType::F32, tiles * (s.slots * s.shared_tokens()))
    }

    /// `tile`: what neighbours share runs as such tiles.
    fn chunk_major(&self, target: &Target, from: usize, o_stride: Expr, cut: Cut, tile: Option<Tile>) -> Option<Form> {
        let (template, t) = match self.sizes.chunk_major_hopper(target) {
            Some(t) => (("attend_chunks_hopper", "attend_chunks_hopper"), t),
            None => (("attend_chunks", "attend_chunks"), self.sizes.chunk_major(target)?),
        };
        let slots = Operand::Workspace(InvertedIndex::WORKSPACES);
        let parts = self.parts(cut);
        let mut calls = vec![];
        let count = tile.map_or(COUNT, |t| self.shared_tiles(&t, o_stride.clone(), &mut calls, target));
        // One index where parts are of whole sequences, else the first part is the largest.
        let once = !matches!(cut, Cut::Tokens(_));
        let index = self.index(0, &parts[0]);
        let whole = self.index(0, &self.whole());
        if once {
            calls.extend(whole.calls(INDICES, count));
        }
        for part in &parts {
            let index = self.index(0, part);
            if !once {
                calls.extend(index.calls(INDICES, count));
            }
            let stub =
                self.tiled(template.0, template.1, &t, t.shared, self.sizes.slab()).write("slots", self.dtype, slots);
            let weights = part.token.clone() * (self.h * self.sizes.slots);
            let stub = self.read_part(stub, part).read_from("weights", self.exact, WEIGHTS, weights);
            let first = if once { part.sequence.clone() * self.h } else { Expr::int(0) };
            calls.push(index.read_from_list(stub, first).launch((index.lists() * index.max_slabs(), 1, 1)).into());
            calls.push(self.reduce_part((Operand::Output(0), o_stride.clone()), (slots, 1), count, part));
        }
        let (name, manner) = match (cut, tile.is_some()) {
            (Cut::Whole, false) => ("chunk_major", String::new()),
            (Cut::Tokens(parts), false) => ("chunk_major_tokens", format!("; tokens in {parts} parts")),
            (Cut::Sequences(2), false) => ("chunk_major_halves", "; sequences in 2 parts".into()),
            (Cut::Sequences(parts), false) => ("chunk_major_sequences", format!("; sequences in {parts} parts")),
            (Cut::Whole, true) => ("shared_tiles", String::new()),
            (Cut::Tokens(parts), true) => ("shared_tiles_tokens", format!("; tokens in {parts} parts")),
            (Cut::Sequences(2), true) => ("shared_tiles_halves", "; sequences in 2 parts".into()),
            (Cut::Sequences(parts), true) => ("shared_tiles_sequences", format!("; sequences in {parts} parts")),
        };
        let mut why = format!(
            "at least {from} pairs per chunk: its keys and values are loaded once per {} pairs; {} warps, {} keys at a time, \
             {} blocks per SM{manner}",
            index.slab, t.warps, t.keys, t.blocks_per_sm
        );
        if let Some(t) = tile {
            why = format!(
                "{} tokens side by side run as a tile where a chunk serves {WORTH_SHARING} of their pairs, {} blocks per SM; else {why}",
                self.sizes.shared_tokens(),
                t.blocks_per_sm
            );
        }
        let pairs = Expr::from(&self.l) * self.sizes.slots;
        let taken = self.slots_of(parts[0].n.clone() * parts[0].l.clone(), 1);
        let form = if once { &whole } else { &index }.reserve(Form::new(name, why, calls)).with(
            "slots",
            self.dtype,
            taken.clone(),
        );
        let form = if tile.is_some() { self.reserve_shared(form) } else { form };
        let form = form
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

    /// Chunk by chunk, in as few parts as keep the workspace within the target's; with tiles of what neighbours share, if `tile`.
    pub fn chunk_majors(&self, target: &Target, from: usize, o_stride: &Expr, tile: Option<Tile>) -> Vec<Form> {
        let cuts = [Cut::Whole, Cut::Tokens(8), Cut::Sequences(2), Cut::Sequences(8)];
        cuts.into_iter().filter_map(|c| self.chunk_major(target, from, o_stride.clone(), c, tile)).collect()
    }
}

/// How tokens are cut where their workspace would be too large at once.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    Whole,
    /// Of one sequence.
    Tokens(usize),
    Sequences(usize),
}

/// `n` sequences of `l` tokens, and which is the first of both.
pub(super) struct Part {
    pub n: Expr,
    pub l: Expr,
    pub sequence: Expr,
    pub token: Expr,
}
