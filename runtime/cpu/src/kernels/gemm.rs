//! Dense matrix products.
//!
//! `matmul` cuts C in tiles and k in blocks, packs B once in panels of 64 columns, and runs `small`, a register-tiled
//! micro-kernel on strided operands that other kernels use as well.  Tiles with a transposed A (weight gradients) go to
//! the `gemm` crate, single-threaded: measured side by side on one core it is faster there, on the rest about equal.
//! A long contraction with a small result (weight gradients: k = tokens) is cut in parts whose results are summed in
//! order.  Few rows (decoding) read B once, see matvec.rs.  A B in bf16 is widened while it is packed.
//! Invariants: tile and part counts never depend on threads (bits do depend on the instruction set); C is overwritten
//! unless `accumulate`.

// Index loops over several arrays at once read like the formulas.
#![allow(clippy::needless_range_loop)]

use super::matvec::rows_times;
use super::transpose::transpose_small;
use crate::par::{self, SharedMut};
use crate::{Mat, MatMut};
use half::bf16;
use pulp::{Arch, Simd, WithSimd};

/// Products with at most this many rows read B once, in place.
const FEW_ROWS: usize = 6;
/// The same where B's columns are contiguous: dot products need no packing, which costs as much as many rows do.
const DOT_ROWS: usize = 32;

/// c (m x n) = op(a) op(b), plus the old c if `accumulate`; op transposes where its flag is set.
pub fn matmul(a: Mat, trans_a: bool, b: Mat, trans_b: bool, c: MatMut, accumulate: bool) {
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
    unsafe { p.run(c.as_mut_ptr(), c.stride(), accumulate) }
}

/// c (m x n) = a (m x k) wᵀ with w (n x k) in bf16, products and sums in f32.
pub fn matmul_bf16(a: Mat, w: Mat<bf16>, c: MatMut) {
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
            return rows_times::<bf16, 2>(m, n, k, a, w, (c.as_mut_ptr(), c.stride()), false);
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
            p.tiles(Some(packed), &plan, c.as_mut_ptr(), c.stride(), false);
        });
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
            unsafe { p.run(out.slice(i * m * n, m * n).as_mut_ptr(), n, false) }
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
        let depth = k.div_ceil(k.div_ceil(320)).next_multiple_of(4);
        let cols = n.div_ceil(n.div_ceil(256)).next_multiple_of(PANEL);
        let mut rows = 192;
        while rows > 48 && m.div_ceil(rows) * n.div_ceil(cols) < 16 && k <= 1024 {
            rows /= 2;
        }
        let (tiles, all) = (m.div_ceil(rows) * n.div_ceil(cols), k.div_ceil(depth));
        // Enough tasks for many cores; the parts' results must stay small beside the operands.
        let parts = if tiles >= 16 { 1 } else { (32 / tiles).min(all / 2).max(1) };
        Self { rows, cols, depth, blocks: all.div_ceil(parts) }
    }
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

    unsafe fn run(&self, c: *mut f32, crs: usize, add: bool) {
        let &Product { m, n, k, .. } = self;
        if m == 0 || n == 0 {
            return;
        }
        // SAFETY: the caller's matrices, forwarded.
        unsafe {
            if m <= DOT_ROWS && k > 0 && self.brs == 1 {
                rows_times::<f32, 1>(m, n, k, (self.a, self.ars, self.acs), (self.b, self.bcs), (c, crs), add);
            } else if m <= FEW_ROWS && k > 0 {
                self.few_rows(c, crs, add);
            } else if k == 0 || (self.bcs == 1 && m * n * k <= 1 << 18) {
                small(m, n, k, (self.a, self.ars, self.acs), (self.b, self.brs), (c, crs), add);
            } else {
                self.tiled(c, crs, add);
            }
        }
    }

    unsafe fn tiled(&self, c: *mut f32, crs: usize, add: bool) {
        let &Product { m, n, k, .. } = self;
        let plan = Plan::new(m, n, k);
        let pack = !self.transposed_a() && (self.bcs != 1 || m > UNPACKED_ROWS);
        par::with_scratch(if pack { k * n.next_multiple_of(PANEL) } else { 0 }, |packed| {
            if pack {
                self.pack_b(packed, plan.depth);
            }
            // SAFETY: the caller's matrices.
            unsafe { self.tiles(pack.then_some(&*packed), &plan, c, crs, add) }
        });
    }

    /// Every tile and part; `packed` as by `pack_panels`, or B is read in place.
    unsafe fn tiles(&self, packed: Option<&[f32]>, plan: &Plan, c: *mut f32, crs: usize, add: bool) {
        let &Product { m, n, k, .. } = self;
        let step = plan.depth * plan.blocks;
        let (rows, cols, parts) = (m.div_ceil(plan.rows), n.div_ceil(plan.cols), k.div_ceil(step));
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
        if self.transposed_a() {
            // SAFETY: the tile's ranges; C is row-major with unit column stride.
            return unsafe { self.part(i, m, j, n, p, k).library(c, crs, add) };
        }
        for p0 in (p..p + k).step_by(depth) {
            let kb = depth.min(p + k - p0);
            let add = add || p0 > p;
            // SAFETY: ranges inside the operands, and in the packed copy as laid out by `pack_panels`.
            unsafe {
                let block = self.part(i, m, j, n, p0, kb);
                for j0 in (0..n).step_by(PANEL) {
                    let width = PANEL.min(n - j0);
                    let b = match packed {
                        // Panels of a block of k follow each other; all blocks before are full.
                        Some(all) => {
                            let wide = self.n.next_multiple_of(PANEL);
                            (all[p0 * wide + (j + j0) * kb..].as_ptr(), PANEL)
                        }
                        None => (block.b.add(j0), block.brs),
                    };
                    small(m, width, kb, (block.a, block.ars, block.acs), b, (c.add(j0), crs), add);
                }
            }
        }
    }

    /// A's columns, not its rows, are contiguous.
    fn transposed_a(&self) -> bool {
        self.acs != 1 && self.ars == 1
    }

    /// The whole product by the gemm crate on this thread; it packs both operands.
    unsafe fn library(&self, c: *mut f32, crs: usize, add: bool) {
        let &Product { m, n, k, a, ars, acs, b, brs, bcs } = self;
        let [crs, ars, acs, brs, bcs] = [crs, ars, acs, brs, bcs].map(|s| s as isize);
        let alone = gemm::Parallelism::None;
        // SAFETY: the caller's matrices.
        unsafe { gemm::gemm(m, n, k, c, 1, crs, add, a, acs, ars, b, bcs, brs, 1.0, 1.0, false, false, false, alone) }
    }

    /// B as `pack_panels` lays it out.
    fn pack_b(&self, to: &mut [f32], depth: usize) {
        pack_panels(self.n, self.k, depth, to, |(p0, kb), (j0, width), to| {
            // SAFETY: reads stay inside B.
            unsafe {
                let b = self.part(0, 0, j0, width, p0, kb);
                if self.bcs == 1 {
                    for (p, row) in to.chunks_exact_mut(PANEL).enumerate() {
                        row[..width].copy_from_slice(std::slice::from_raw_parts(b.b.add(p * b.brs), width));
                    }
                } else {
                    transpose_small(Mat::from_raw(b.b, width, kb, b.bcs), to, PANEL);
                }
            }
        });
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

/// c (m x n) = a (m x k) b (k x n) [+ c] on one thread, without packing: for operands that fit the nearest caches.
/// `a` is (pointer, row stride, column stride), `b` and `c` are (pointer, row stride) with unit column stride.
///
/// # Safety
/// The strided matrices must be readable, `c` writable and disjoint from both.
pub(crate) unsafe fn small(
    m: usize,
    n: usize,
    k: usize,
    a: (*const f32, usize, usize),
    b: (*const f32, usize),
    c: (*mut f32, usize),
    add: bool,
) {
    Arch::new().dispatch(Small { m, n, k, a, b, c, add })
}

struct Small {
    m: usize,
    n: usize,
    k: usize,
    a: (*const f32, usize, usize),
    b: (*const f32, usize),
    c: (*mut f32, usize),
    add: bool,
}

impl WithSimd for Small {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // 6 x 4 vectors of results fill 32 registers, 6 x 2 fill 16.
        let vectors = if S::REGISTER_COUNT >= 32 { 4 } else { 2 };
        let mut j = 0;
        while j < self.n {
            let width = (self.n - j).min(vectors * S::F32_LANES);
            let (count, tail) = (width.div_ceil(S::F32_LANES), width % S::F32_LANES);
            // SAFETY: columns j..j+width exist.
            unsafe {
                match (count, tail) {
                    (1, 0) => self.sweep::<S, 1, false>(simd, j, tail),
                    (1, _) => self.sweep::<S, 1, true>(simd, j, tail),
                    (2, 0) => self.sweep::<S, 2, false>(simd, j, tail),
                    (2, _) => self.sweep::<S, 2, true>(simd, j, tail),
                    (3, 0) => self.sweep::<S, 3, false>(simd, j, tail),
                    (3, _) => self.sweep::<S, 3, true>(simd, j, tail),
                    (_, 0) => self.sweep::<S, 4, false>(simd, j, tail),
                    _ => self.sweep::<S, 4, true>(simd, j, tail),
                }
            }
            j += width;
        }
    }
}

impl Small {
    /// All rows of one panel of `NV` vectors of columns.
    #[inline(always)]
    unsafe fn sweep<S: Simd, const NV: usize, const TAIL: bool>(&self, simd: S, j: usize, tail: usize) {
        let mut i = 0;
        while i < self.m {
            let rows = (self.m - i).min(6);
            // SAFETY: rows i..i+rows exist.
            unsafe {
                match rows {
                    1 => self.micro::<S, 1, NV, TAIL>(simd, i, j, tail),
                    2 => self.micro::<S, 2, NV, TAIL>(simd, i, j, tail),
                    3 => self.micro::<S, 3, NV, TAIL>(simd, i, j, tail),
                    4 => self.micro::<S, 4, NV, TAIL>(simd, i, j, tail),
                    5 => self.micro::<S, 5, NV, TAIL>(simd, i, j, tail),
                    _ => self.micro::<S, 6, NV, TAIL>(simd, i, j, tail),
                }
            }
            i += rows;
        }
    }

    /// `MR` rows by `NV` vectors of C in registers; the last vector is partial (`tail` lanes) if `TAIL`.
    #[inline(always)]
    unsafe fn micro<S: Simd, const MR: usize, const NV: usize, const TAIL: bool>(
        &self,
        simd: S,
        i: usize,
        j: usize,
        tail: usize,
    ) {
        let lanes = S::F32_LANES;
        let (a, ars, acs) = self.a;
        let mask = simd.mask_between_m32s(0, tail as u32);
        let zero = simd.splat_f32s(0.0);
        let mut acc = [[zero; NV]; MR];
        // SAFETY: every access is inside the matrices; the partial vector is masked.
        unsafe {
            let (a, b, c) = (a.add(i * ars), self.b.0.add(j), self.c.0.add(i * self.c.1 + j));
            for p in 0..self.k {
                let (ap, bp) = (a.add(p * acs), b.add(p * self.b.1));
                let mut bv = [zero; NV];
                for v in 0..NV {
                    bv[v] = if TAIL && v == NV - 1 {
                        simd.mask_load_ptr_f32s(mask, bp.add(v * lanes))
                    } else {
                        bp.add(v * lanes).cast::<S::f32s>().read_unaligned()
                    };
                }
                for r in 0..MR {
                    let av = simd.splat_f32s(*ap.add(r * ars));
                    for v in 0..NV {
                        acc[r][v] = simd.mul_add_e_f32s(av, bv[v], acc[r][v]);
                    }
                }
            }
            for r in 0..MR {
                for v in 0..NV {
                    let at = c.add(r * self.c.1 + v * lanes);
                    if TAIL && v == NV - 1 {
                        let old = if self.add { simd.mask_load_ptr_f32s(mask, at) } else { zero };
                        simd.mask_store_ptr_f32s(mask, at, simd.add_f32s(old, acc[r][v]));
                    } else {
                        let old = if self.add { at.cast::<S::f32s>().read_unaligned() } else { zero };
                        at.cast::<S::f32s>().write_unaligned(simd.add_f32s(old, acc[r][v]));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `small` on every instruction set this machine has, the portable one included.
    #[test]
    fn gemm_small_on_every_instruction_set() {
        for (m, n, k) in [(1, 1, 1), (7, 19, 5), (13, 77, 31)] {
            let a: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.7).sin()).collect();
            let b: Vec<f32> = (0..k * n).map(|i| (i as f32 * 0.3).cos()).collect();
            let run = |which: usize| {
                let mut c = vec![1.0f32; m * n];
                let op =
                    Small { m, n, k, a: (a.as_ptr(), k, 1), b: (b.as_ptr(), n), c: (c.as_mut_ptr(), n), add: true };
                match which {
                    0 => Simd::vectorize(pulp::Scalar::new(), op),
                    #[cfg(target_arch = "x86_64")]
                    1 => match pulp::x86::V3::try_new() {
                        Some(simd) => Simd::vectorize(simd, op),
                        None => println!("no AVX2 here: its path is not tested"),
                    },
                    _ => Arch::new().dispatch(op),
                }
                c
            };
            for which in 0..3 {
                for (i, got) in run(which).into_iter().enumerate() {
                    let dot: f64 = (0..k).map(|p| a[i / n * k + p] as f64 * b[p * n + i % n] as f64).sum();
                    assert!((got as f64 - 1.0 - dot).abs() < 1e-5, "{which}: {got} for {}", dot + 1.0);
                }
            }
        }
    }

    #[test]
    fn gemm_plan_cuts_long_contractions() {
        assert_eq!(Plan::new(4096, 292, 64).blocks, 1);
        let plan = Plan::new(64, 292, 4096);
        assert!(4096 / (plan.depth * plan.blocks) >= 4, "{plan:?}");
    }
}
