//! Chunk → the pairs (token, slot) that chose it: three launches that other kernels build on.

use crate::cuda::expr::Expr;
use crate::cuda::form::{Call, Form, Operand};
use crate::cuda::stub::Stub;
use rambac_ir::{DType, Dim};

const THREADS: usize = 128;
/// A block of threads scans all chunks of a list.
const SCAN_THREADS: usize = 1024;
/// Tokens that a warp puts in place one after the other; more where a table of blocks by chunks would outgrow the pairs.
const BLOCK_TOKENS: usize = 256;

/// The index of `indices: [N, L, h, K]` with `count: [N, L, h]`, in five workspaces from `first` on.
pub(super) struct InvertedIndex {
    pub n: Expr,
    pub l: Expr,
    pub h: usize,
    pub k: usize,
    pub chunks: Dim,
    /// Pairs of a slab, at most.
    pub slab: usize,
    pub first: usize,
    /// The first token of `indices` and `count` that it is about.
    pub token: Expr,
}

impl InvertedIndex {
    /// Workspaces that it takes.
    pub const WORKSPACES: usize = 5;

    /// Of all tokens of `shape: [N, L, ..]` and the `(h, k)` slots that each has, in a form with no other workspace so far.
    pub fn whole(shape: &[Dim], (h, k): (usize, usize), chunks: &Dim, slab: usize) -> InvertedIndex {
        let (n, l) = (shape[0].clone().into(), shape[1].clone().into());
        InvertedIndex { n, l, h, k, chunks: chunks.clone(), slab, first: 0, token: Expr::int(0) }
    }

    pub fn lists(&self) -> Expr {
        self.n.clone() * self.h
    }
    /// Slabs of a list, at most.
    pub fn max_slabs(&self) -> Expr {
        (self.l.clone() * self.k).ceil_div(self.slab) + &self.chunks
    }
    fn block_tokens(&self) -> Expr {
        Expr::from(&self.chunks).ceil_div(self.k).max(BLOCK_TOKENS)
    }
    fn blocks(&self) -> Expr {
        self.l.clone().ceil_div_by(self.block_tokens())
    }
    fn at(&self, i: usize) -> Operand {
        Operand::Workspace(self.first + i)
    }

    /// Offsets of every chunk's pairs, `[N·h, C + 1]`.
    pub fn offsets(&self) -> Operand {
        self.at(1)
    }
    /// The pairs, `[N·h, L·K]`.
    pub fn entries(&self) -> Operand {
        self.at(4)
    }

    /// Adds its workspaces to a form that has `first` so far.
    pub fn reserve(&self, f: Form) -> Form {
        assert_eq!(f.workspace.len(), self.first, "BUG: the index's workspaces begin at {}", self.first);
        let per_chunk = self.lists() * (Expr::from(&self.chunks) + 1);
        f.with("index.table", DType::I32, self.lists() * self.blocks() * &self.chunks)
            .with("index.offsets", DType::I32, per_chunk.clone())
            .with("index.slab_first", DType::I32, per_chunk)
            .with("index.slabs", DType::I32, self.lists() * self.max_slabs() * 2)
            .with("index.entries", DType::I32, self.lists() * self.l.clone() * self.k)
    }

    /// The launches that make it.
    pub fn calls(&self, indices: Operand, count: Operand) -> Vec<Call> {
        let stub = |template, threads: usize| {
            Stub::new("inverted_index", template, threads)
                .int("slots", self.k)
                .int("slab", self.slab)
                .int("threads", threads)
                .tag(format!("k{}_s{}", self.k, self.slab))
        };
        let sizes = |s: Stub| {
            s.i32("l", self.l.clone())
                .i32("h", self.h)
                .i32("chunks", &self.chunks)
                .i32("block_tokens", self.block_tokens())
        };
        let count_them = stub("index_count", THREADS).write("table", DType::I32, self.at(0));
        let choices = |s: Stub| {
            let lists = self.token.clone() * self.h;
            s.read_from("indices", DType::I32, indices, lists.clone() * self.k).read_from(
                "count",
                DType::I32,
                count,
                lists,
            )
        };
        let count_them = choices(count_them);
        let scan = stub("index_scan", SCAN_THREADS)
            .write("offsets", DType::I32, self.at(1))
            .write("slab_first", DType::I32, self.at(2))
            .write("slabs", DType::I32, self.at(3))
            .write("table", DType::I32, self.at(0))
            .i32("blocks", self.blocks())
            .i32("chunks", &self.chunks)
            .i32("max_slabs", self.max_slabs());
        let fill =
            stub("index_fill", THREADS).write("entries", DType::I32, self.at(4)).write("table", DType::I32, self.at(0));
        let fill = choices(fill).i32("pairs", self.l.clone() * self.k).i32("lists", self.lists());
        let warps = (self.lists() * self.blocks()).ceil_div(THREADS / 32);
        vec![
            sizes(count_them).launch((self.lists() * self.blocks(), 1, 1)).into(),
            scan.launch((self.lists(), 1, 1)).into(),
            sizes(fill).launch((warps, 1, 1)).into(),
        ]
    }

    /// The parameters by which a kernel reads it, and the sizes that go with them.
    pub fn read(&self, s: Stub) -> Stub {
        self.read_from_list(s, Expr::int(0))
    }
    /// The same from a list on.
    pub fn read_from_list(&self, s: Stub, first: Expr) -> Stub {
        let per_chunk = first.clone() * (Expr::from(&self.chunks) + 1);
        s.read_from("entries", DType::I32, self.at(4), first.clone() * self.l.clone() * self.k)
            .read_from("offsets", DType::I32, self.at(1), per_chunk.clone())
            .read_from("slab_first", DType::I32, self.at(2), per_chunk)
            .read_from("slabs", DType::I32, self.at(3), first * self.max_slabs() * 2)
            .i32("l", self.l.clone())
            .i32("h", self.h)
            .i32("chunks", &self.chunks)
            .i32("max_slabs", self.max_slabs())
    }
    /// The same for a kernel that goes through chunks alone.
    pub fn read_slabs(&self, s: Stub) -> Stub {
        s.read("slab_first", DType::I32, self.at(2))
            .i32("h", self.h)
            .i32("chunks", &self.chunks)
            .i32("max_slabs", self.max_slabs())
    }
}
