//! Dense matrix products.
//!
//! `matmul` cuts C in tiles and k in blocks, packs B once in panels of 64 columns, a transposed A tile by tile, and runs
//! the micro-kernel of gemm_micro.rs.
//! A long contraction with a small result (weight gradients: k = tokens) is cut in parts whose results are summed in
//! order.  Few rows (decoding) read B once, see matvec.rs.  A B in bf16 is widened while it is packed.
//! Invariants: tile and part counts never depend on threads (bits do depend on the instruction set); C is overwritten
//! unless `accumulate`.  An epilogue sees every part of C once, finished, while it is in a cache.

// Index loops over several arrays at once read like the formulas.
#![allow(clippy::needless_range_loop)]

use super::gemm_micro::{Left, Small, small};
use super::matvec::{planes_len, rows_times};
use super::transpose::transpose_small;
use crate::par::{self, SharedMut};
use crate::simd::dispatch;
use crate::{Mat, MatMut};
use half::bf16;
use std::ops::Range;

/// Products with at most this many rows read B once, in place.
const FEW_ROWS: usize = 6;
/// The same where B's columns are contiguous: dot products need no packing, which costs as much as many rows do.
const DOT_ROWS: usize = 32;

/// What is done with a finished part of C, `then(rows, columns)`, by the thread that finished it: every element is in
/// exactly one part.
pub type Epilogue<'a> = &'a (dyn Fn(Range<usize>, Range<usize>) + Sync);

/// c (m x n) = op(a) op(b), plus the old c if `accumulate`; op transposes where its flag is set.
pub fn matmul(a: Mat, trans_a: bool, b: Mat, trans_b: bool, c: MatMut, accumulate: bool) {
    product(a, trans_a, b, trans_b, c, accumulate, None);
}

/// c (m x n) = op(a) op(b), and `then` on each part of it while that is in a cache.
pub fn matmul_then(a: Mat, trans_a: bool, b: Mat, trans_b: bool, c: MatMut, then: Epilogue) {
    product(a, trans_a, b, trans_b, c, false, Some(then));
}

fn product(a: Mat, trans_a: bool, b: Mat, trans_b: bool, c: MatMut, accumulate: bool, then: Option<Epilogue>) {
    let (m, k) = if trans_a { (a.cols(), a.rows()) } else { (a.rows(), a.cols()) };
    let (kb, n) = if trans_b { (b.cols(), b.rows()) } else { (b.rows(), b.cols()) };
    assert!(
        k == kb && c.rows() == m && c.cols() == n,
        "BUG: matmul {m}x{k} by {kb}x{n} into {}x{}",
        c.rows(),
        c.cols()
    );
    let (ars, acs) = if trans_a { (1, a.stride()) } else { (a.stride(), 1) };
    let (brs, bcs) = if trans_b { (1, b.stride()) } else { (b.stride(), 1) };
    let p = Product { m, n, k, a: a.as_ptr(), ars, acs, b: b.as_ptr(), brs, bcs };
    // SAFETY: the strides describe the matrices just checked; `c` is exclusive.
    unsafe { p.run(c.as_mut_ptr(), c.stride(), accumulate, then) }
}

/// Floats of scratch that [`matmul`] takes on the calling thread for contiguous operands of these sizes.
pub fn scratch(m: usize, n: usize, k: usize, trans_a: bool, trans_b: bool) -> usize {
    let (ars, acs) = if trans_a { (1, m) } else { (k, 1) };
    let (brs, bcs) = if trans_b { (1, k) } else { (n, 1) };
    let p = Product { m, n, k, a: std::ptr::null(), ars, acs, b: std::ptr::null(), brs, bcs };
    match p.path() {
        Path::Dots => par::rounded(planes_len::<1>(m, k)),
        Path::Few => par::rounded(m * k),
        Path::Nothing | Path::Small => 0,
        Path::Tiled => tiles_scratch(m, n, k, p.packs_b()),
    }
}

/// As [`scratch`], of [`matmul_bf16`].
pub fn scratch_bf16(m: usize, n: usize, k: usize) -> usize {
    if m <= DOT_ROWS { par::rounded(planes_len::<2>(m, k)) } else { tiles_scratch(m, n, k, true) }
}

/// Of packed B and of partial results.
fn tiles_scratch(m: usize, n: usize, k: usize, pack: bool) -> usize {
    let parts = Plan::new(m, n, k).parts(k);
    let packed = if pack { k * n.next_multiple_of(PANEL) } else { 0 };
    par::rounded(packed) + par::rounded(if parts > 1 { parts * m * n } else { 0 })
}

/// c (m x n) = a (m x k) wᵀ with w (n x k) in bf16, products and sums in f32; then the epilogue, if any.
pub fn matmul_bf16(a: Mat, w: Mat<bf16>, c: MatMut, then: Option<Epilogue>) {
    let (m, n, k) = (a.rows(), w.rows(), a.cols());
    assert!(
        w.cols() == k && c.rows() == m && c.cols() == n,
        "BUG: matmul {m}x{k} by {}x{n} into {}x{}",
        w.cols(),
        c.rows(),
        c.cols()
    );
    // SAFETY: the matrices just checked; `c` is exclusive.
    unsafe {
        if m <= DOT_ROWS {
            let (a, w) = ((a.as_ptr(), a.stride(), 1), (w.as_ptr(), w.stride()));
            rows_times::<bf16, 2>(m, n, k, a, w, (c.as_mut_ptr(), c.stride()), false);
            return after(m, n, then);
        }
        // B is read from its packed copy alone.
        let p = Product { m, n, k, a: a.as_ptr(), ars: a.stride(), acs: 1, b: std::ptr::null(), brs: 0, bcs: 0 };
        let plan = Plan::new(m, n, k);
        par::with_scratch(k * n.next_multiple_of(PANEL), |packed| {
            pack_panels(n, k, plan.depth, packed, |(p0, kb), (j0, width), to| {
                par::with_scratch(width * kb, |wide| {
                    for (j, row) in wide.chunks_exact_mut(kb).enumerate() {
                        widen(&w.row(j0 + j)[p0..p0 + kb], row);
                    }
                    transpose_small(Mat::new(wide, width, kb), to, PANEL);
                });
            });
            p.tiles(Some(packed), &plan, c.as_mut_ptr(), c.stride(), false, then);
        });
    }
}

/// The epilogue of a product that was not made part by part.
fn after(m: usize, n: usize, then: Option<Epilogue>) {
    if let Some(then) = then {
        par::for_blocks(m, par::rows_per_task(8 * n), 8 * m * n, |_, start, end| then(start..end, 0..n));
    }
}

super::vmath::simd_fn! {
    /// The same numbers as f32.
    pub fn widen<'a, S>(x: &'a [bf16], y: &'a mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = f32::from_bits(u32::from(x.to_bits()) << 16);
        }
    }
}

/// A k x n matrix in blocks of `depth` rows, each in panels (depth, PANEL), by `pack((p0, kb), (j0, width), panel)`, which
/// writes rows p0.. and columns j0.. of it; columns beyond n are never read.
fn pack_panels(
    n: usize,
    k: usize,
    depth: usize,
    to: &mut [f32],
    pack: impl Fn((usize, usize), (usize, usize), &mut [f32]) + Sync + Send,
) {
    let (wide, panels) = (n.next_multiple_of(PANEL), n.div_ceil(PANEL));
    let out = SharedMut::new(to);
    par::for_each(k.div_ceil(depth) * panels, 2 * k * n, |t| {
        let (p0, j0) = (t / panels * depth, t % panels * PANEL);
        let (kb, width) = (depth.min(k - p0), PANEL.min(n - j0));
        // SAFETY: one panel per task.
        pack((p0, kb), (j0, width), unsafe { out.slice(p0 * wide + j0 * kb, kb * PANEL) });
    });
}

/// `batch` independent products of contiguous matrices: `c[i]` (m x n) = `op(a[i]) op(b[i])`.
#[allow(clippy::too_many_arguments)]
pub fn batched_matmul(
    batch: usize,
    a: &[f32],
    b: &[f32],
    c: &mut [f32],
    m: usize,
    n: usize,
    k: usize,
    trans_a: bool,
    trans_b: bool,
) {
    assert!(
        a.len() == batch * m * k && b.len() == batch * k * n && c.len() == batch * m * n,
        "BUG: batched_matmul sizes"
    );
    let (ars, acs) = if trans_a { (1, m) } else { (k, 1) };
    let (brs, bcs) = if trans_b { (1, k) } else { (n, 1) };
    let out = SharedMut::new(c);
    // Several small products per task; large ones are cut further by `run`.
    let per_task = par::rows_per_task(2 * m * n * k);
    par::for_blocks(batch, per_task, 2 * batch * m * n * k, |_, start, end| {
        for i in start..end {
            let p = Product { m, n, k, a: a[i * m * k..].as_ptr(), ars, acs, b: b[i * k * n..].as_ptr(), brs, bcs };
            // SAFETY: product `i` owns its part of c; sizes were checked.
            unsafe { p.run(out.slice(i * m * n, m * n).as_mut_ptr(), n, false, None) }
        }
    });
}

/// Operands of one product, as raw strided matrices.
#[derive(Clone, Copy)]
struct Product {
    m: usize,
    n: usize,
    k: usize,
    a: *const f32,
    ars: usize,
    acs: usize,
    b: *const f32,
    brs: usize,
    bcs: usize,
}

// SAFETY: shared reads of memory that outlives the parallel loops of `run`.
unsafe impl Send for Product {}
unsafe impl Sync for Product {}

struct SharedPtr(*mut f32);
// SAFETY: tasks write disjoint tiles.
unsafe impl Send for SharedPtr {}
unsafe impl Sync for SharedPtr {}
impl SharedPtr {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

/// Columns of a packed panel of B.
const PANEL: usize = 64;
/// Up to this many rows, a B whose rows are contiguous is used in place: packing it would not pay.
const UNPACKED_ROWS: usize = 160;

/// How a product is cut: a function of its shape alone.
#[derive(Debug, PartialEq)]
struct Plan {
    /// Rows of a tile, a multiple of the micro-kernel's 6.
    rows: usize,
    /// Columns of a tile, a multiple of PANEL.
    cols: usize,
    /// Contraction steps of a block: a panel of B stays in L2, better L1.
    depth: usize,
    /// Blocks of k whose sum is one partial result.
    blocks: usize,
}

impl Plan {
    fn new(m: usize, n: usize, k: usize) -> Self {
        let cols = n.div_ceil(n.div_ceil(256)).next_multiple_of(PANEL);
        let mut rows = 192;
        while rows > 48 && m.div_ceil(rows) * n.div_ceil(cols) < 16 && k <= 1024 {
            rows /= 2;
        }
        let tiles = m.div_ceil(rows) * n.div_ceil(cols);
        // Enough tasks for many cores; the parts' results must stay small beside the operands.
        let parts = if tiles >= 16 { 1 } else { (32 / tiles).min(k / 512).max(1) };
        // Equal parts of equal blocks: a short last one would leave threads idle.
        let part = k.div_ceil(parts);
        let blocks = part.div_ceil(320);
        Self { rows, cols, depth: part.div_ceil(blocks).next_multiple_of(4), blocks }
    }
    /// Parts of k with a partial result each.
    fn parts(&self, k: usize) -> usize {
        k.div_ceil(self.depth * self.blocks)
    }
}

/// How a product is computed.
enum Path {
    Nothing,
    Dots,
    Few,
    Small,
    Tiled,
}

/// Floats from one step of a packed A to the next: an odd number of cache lines, so that steps do not share the same few
/// sets of the cache.
fn step_of(m: usize) -> usize {
    (m.div_ceil(16) | 1) * 16
}

impl Product {
    /// Rows `i..i+m`, columns `j..j+n`, contraction `p..p+k`.
    unsafe fn part(&self, i: usize, m: usize, j: usize, n: usize, p: usize, k: usize) -> Product {
        // SAFETY: inside the matrices by the caller's ranges.
        let a = unsafe { self.a.add(i * self.ars + p * self.acs) };
        // Not read where B is packed, and perhaps null.
        let b = self.b.wrapping_add(p * self.brs + j * self.bcs);
        Product { m, n, k, a, b, ..*self }
    }

    fn path(&self) -> Path {
        let &Product { m, n, k, .. } = self;
        if m == 0 || n == 0 {
            Path::Nothing
        } else if m <= DOT_ROWS && k > 0 && self.brs == 1 {
            Path::Dots
        } else if m <= FEW_ROWS && k > 0 {
            Path::Few
        } else if k == 0 || (self.bcs == 1 && m * n * k <= 1 << 18) {
            Path::Small
        } else {
            Path::Tiled
        }
    }

    /// Whether all of B is packed beforehand.
    fn packs_b(&self) -> bool {
        self.bcs != 1 || (!self.transposed_a() && self.m > UNPACKED_ROWS)
    }

    unsafe fn run(&self, c: *mut f32, crs: usize, add: bool, then: Option<Epilogue>) {
        let &Product { m, n, k, .. } = self;
        let a = (self.a, self.ars, self.acs);
        // SAFETY: the caller's matrices, forwarded.
        unsafe {
            match self.path() {
                Path::Nothing => {}
                Path::Dots => rows_times::<f32, 1>(m, n, k, a, (self.b, self.bcs), (c, crs), add),
                Path::Few => self.few_rows(c, crs, add),
                Path::Small => small(m, n, k, a, (self.b, self.brs), (c, crs), add),
                Path::Tiled => return self.tiled(c, crs, add, then),
            }
        }
        after(m, n, then);
    }

    unsafe fn tiled(&self, c: *mut f32, crs: usize, add: bool, then: Option<Epilogue>) {
        let &Product { m, n, k, .. } = self;
        let plan = Plan::new(m, n, k);
        let pack = self.packs_b();
        par::with_scratch(if pack { k * n.next_multiple_of(PANEL) } else { 0 }, |packed| {
            if pack {
                self.pack_b(packed, plan.depth);
            }
            // SAFETY: the caller's matrices.
            unsafe { self.tiles(pack.then_some(&*packed), &plan, c, crs, add, then) }
        });
    }

    /// Every tile and part; `packed` as by `pack_panels`, or B is read in place.
    unsafe fn tiles(
        &self,
        packed: Option<&[f32]>,
        plan: &Plan,
        c: *mut f32,
        crs: usize,
        add: bool,
        then: Option<Epilogue>,
    ) {
        let &Product { m, n, k, .. } = self;
        let step = plan.depth * plan.blocks;
        let (rows, cols, parts) = (m.div_ceil(plan.rows), n.div_ceil(plan.cols), plan.parts(k));
        par::with_scratch(if parts > 1 { parts * m * n } else { 0 }, |partial| {
            let (shared, c) = (SharedMut::new(partial), SharedPtr(c));
            par::for_each(parts * rows * cols, 2 * m * n * k, |t| {
                let (p, i, j) = (t / (rows * cols), t / cols % rows * plan.rows, t % cols * plan.cols);
                let (tm, tn) = (plan.rows.min(m - i), plan.cols.min(n - j));
                // SAFETY: tasks own disjoint tiles of c, or of their part's partial result.
                unsafe {
                    let ks = (p * step, step.min(k - p * step));
                    if parts == 1 {
                        self.tile(packed, (i, tm), (j, tn), ks, plan.depth, c.get().add(i * crs + j), crs, add);
                        if let Some(then) = then {
                            then(i..i + tm, j..j + tn);
                        }
                    } else {
                        let to = shared.ptr(p * m * n + i * n + j, (tm - 1) * n + tn);
                        self.tile(packed, (i, tm), (j, tn), ks, plan.depth, to, n, false);
                    }
                }
            });
            if parts > 1 {
                par::for_blocks(m, par::rows_per_task(n * parts), parts * m * n, |_, start, end| {
                    for i in start..end {
                        // SAFETY: row i of c belongs to this task.
                        let row = unsafe { std::slice::from_raw_parts_mut(c.get().add(i * crs), n) };
                        sum_rows(partial, m * n, i * n, parts, row, add);
                    }
                    if let Some(then) = then {
                        then(start..end, 0..n);
                    }
                });
            }
        });
    }

    /// One tile and part on the calling thread: rows, columns and contraction as (start, length).
    #[allow(clippy::too_many_arguments)]
    unsafe fn tile(
        &self,
        packed: Option<&[f32]>,
        (i, m): (usize, usize),
        (j, n): (usize, usize),
        (p, k): (usize, usize),
        depth: usize,
        c: *mut f32,
        crs: usize,
        add: bool,
    ) {
        // A transposed A is packed here, tile by tile, and so is a B that is not packed yet.
        let turned = if self.transposed_a() { step_of(m) * depth } else { 0 };
        let local = if turned > 0 && packed.is_none() { PANEL * depth } else { 0 };
        par::with_scratch(turned + local, |scratch| {
            let (left, right) = scratch.split_at_mut(turned);
            for p0 in (p..p + k).step_by(depth) {
                let kb = depth.min(p + k - p0);
                let add = add || p0 > p;
                // SAFETY: ranges inside the operands, and in the packed copies as laid out by `pack_a` and `pack_panel`.
                unsafe {
                    let block = self.part(i, m, j, n, p0, kb);
                    let mut a = Left::strided(block.a, block.ars, block.acs);
                    if turned > 0 {
                        block.pack_a(left);
                        a = Left::strided(left.as_ptr(), 1, step_of(m));
                    }
                    for j0 in (0..n).step_by(PANEL) {
                        let width = PANEL.min(n - j0);
                        let b = match packed {
                            // Panels of a block of k follow each other; all blocks before are full.
                            Some(all) => {
                                let wide = self.n.next_multiple_of(PANEL);
                                (all[p0 * wide + (j + j0) * kb..].as_ptr(), PANEL)
                            }
                            None if local > 0 => {
                                block.part(0, 0, j0, width, 0, kb).pack_panel(&mut right[..kb * PANEL]);
                                (right.as_ptr(), PANEL)
                            }
                            None => (block.b.add(j0), block.brs),
                        };
                        dispatch(Small { m, n: width, k: kb, a, b, c: (c.add(j0), crs), add });
                    }
                }
            }
        });
    }

    /// A's columns, not its rows, are contiguous.
    fn transposed_a(&self) -> bool {
        self.acs != 1 && self.ars == 1
    }

    /// A compact copy of a transposed A's block: steps of m neighbours, [`step_of`] floats apart.
    unsafe fn pack_a(&self, to: &mut [f32]) {
        let &Product { m, k, .. } = self;
        for (p, to) in to.chunks_exact_mut(step_of(m)).take(k).enumerate() {
            // SAFETY: step p of Aᵀ has m elements.
            to[..m].copy_from_slice(unsafe { std::slice::from_raw_parts(self.a.add(p * self.acs), m) });
        }
    }

    /// B as `pack_panels` lays it out.
    fn pack_b(&self, to: &mut [f32], depth: usize) {
        pack_panels(self.n, self.k, depth, to, |(p0, kb), (j0, width), to| {
            // SAFETY: reads stay inside B.
            unsafe { self.part(0, 0, j0, width, p0, kb).pack_panel(to) };
        });
    }

    /// All of B, at most PANEL columns of it, as one panel.
    unsafe fn pack_panel(&self, to: &mut [f32]) {
        let &Product { n, k, .. } = self;
        // SAFETY: reads stay inside B.
        unsafe {
            if self.bcs == 1 {
                for (p, row) in to.chunks_exact_mut(PANEL).take(k).enumerate() {
                    row[..n].copy_from_slice(std::slice::from_raw_parts(self.b.add(p * self.brs), n));
                }
            } else {
                transpose_small(Mat::from_raw(self.b, n, k, self.bcs), to, PANEL);
            }
        }
    }

    /// m <= FEW_ROWS, rows of B contiguous: B is read once, in parallel over its columns.
    unsafe fn few_rows(&self, c: *mut f32, crs: usize, add: bool) {
        let &Product { m, n, k, a, ars, acs, brs, bcs, .. } = self;
        assert!(bcs == 1, "BUG: one stride of B must be 1");
        let (work, c) = (m * n * k, SharedPtr(c));
        let columns = |j: usize| self.b.wrapping_add(j);
        // SAFETY: reads of A inside its m x k range, blocks of C are disjoint columns.
        par::with_scratch(m * k, |packed| unsafe {
            for i in 0..m {
                for p in 0..k {
                    packed[i * k + p] = *a.add(i * ars + p * acs);
                }
            }
            let packed = &*packed;
            // 256 columns: the running results stay in registers or L1, rows of B are read a kilobyte at a time.
            par::for_blocks(n, 256, work, |_, start, end| {
                let (a, b) = ((packed.as_ptr(), k, 1), (columns(start), brs));
                small(m, end - start, k, a, b, (c.get().add(start), crs), add);
            });
        });
    }
}

super::vmath::simd_fn! {
    /// Sum of products.
    pub(crate) fn dot<'a, S>(x: &'a [f32], y: &'a [f32]) -> f32 {
        super::vmath::fold::dot::<S>(x, y)
    }
}

super::vmath::simd_fn! {
    /// out = [out +] sum over parts of partial[part * step + offset ..], in order.
    fn sum_rows<'a, S>(partial: &'a [f32], step: usize, offset: usize, parts: usize, out: &'a mut [f32], add: bool) {
        if !add {
            out.fill(0.0);
        }
        for p in 0..parts {
            let row = &partial[p * step + offset..][..out.len()];
            for (o, v) in out.iter_mut().zip(row) {
                *o += v;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gemm_plan_cuts_long_contractions() {
        assert_eq!(Plan::new(4096, 292, 64).blocks, 1);
        let plan = Plan::new(64, 292, 4096);
        assert!(4096 / (plan.depth * plan.blocks) >= 4, "{plan:?}");
    }
}
