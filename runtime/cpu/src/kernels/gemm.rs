//! Dense matrix products.
//!
//! `matmul` cuts C in tiles by shape alone; large tiles go to the `gemm` crate, single-threaded, small ones and the
//! products inside other kernels to `small`, an own micro-kernel on strided operands that needs no packing.
//! A long contraction with a small result (weight gradients: k = tokens) is cut in parts whose results are summed in
//! order.  Few rows (decoding) stream B once, as matrix-vector products.
//! Invariants: tile and part counts never depend on threads; C is overwritten unless `accumulate`.

use crate::par::{self, SharedMut};
use crate::{Mat, MatMut};
use pulp::{Arch, Simd, WithSimd};

/// Products with at most this many rows take the matrix-vector path.
const FEW_ROWS: usize = 6;

/// c (m x n) = op(a) op(b), plus the old c if `accumulate`; op transposes where its flag is set.
pub fn matmul(a: Mat, trans_a: bool, b: Mat, trans_b: bool, c: MatMut, accumulate: bool) {
    let (m, k) = if trans_a { (a.cols(), a.rows()) } else { (a.rows(), a.cols()) };
    let (kb, n) = if trans_b { (b.cols(), b.rows()) } else { (b.rows(), b.cols()) };
    assert!(k == kb && c.rows() == m && c.cols() == n, "BUG: matmul {m}x{k} by {kb}x{n} into {}x{}", c.rows(), c.cols());
    let (ars, acs) = if trans_a { (1, a.stride()) } else { (a.stride(), 1) };
    let (brs, bcs) = if trans_b { (1, b.stride()) } else { (b.stride(), 1) };
    let p = Product { m, n, k, a: a.as_ptr(), ars, acs, b: b.as_ptr(), brs, bcs };
    // SAFETY: the strides describe the matrices just checked; `c` is exclusive.
    unsafe { p.run(c.as_mut_ptr(), c.stride(), accumulate) }
}

/// `batch` independent products of contiguous matrices: c[i] (m x n) = op(a[i]) op(b[i]).
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
    assert!(a.len() == batch * m * k && b.len() == batch * k * n && c.len() == batch * m * n, "BUG: batched_matmul sizes");
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

/// Rows and columns of a tile, and the number of parts of k: functions of the shape alone.
fn plan(m: usize, n: usize, k: usize) -> (usize, usize, usize) {
    let tn = if n <= 1024 { n } else { n.div_ceil(n.div_ceil(768)) };
    let tn = tn.next_multiple_of(16);
    // About 4 MFLOP a tile, rows in multiples of 48.
    let tm = (2_000_000 / (tn * k.max(1))).clamp(48, 512).min(m.max(1)).next_multiple_of(48);
    let tiles = m.div_ceil(tm) * n.div_ceil(tn);
    let parts = if tiles >= 16 || k < 512 { 1 } else { (k / 256).min(32 / tiles).max(1) };
    (tm, tn, parts)
}

impl Product {
    /// Rows `i..i+m`, columns `j..j+n`, contraction `p..p+k`.
    unsafe fn part(&self, i: usize, m: usize, j: usize, n: usize, p: usize, k: usize) -> Product {
        // SAFETY: inside the matrices by the caller's ranges.
        let a = unsafe { self.a.add(i * self.ars + p * self.acs) };
        let b = unsafe { self.b.add(p * self.brs + j * self.bcs) };
        Product { m, n, k, a, b, ..*self }
    }

    unsafe fn run(&self, c: *mut f32, crs: usize, add: bool) {
        let &Product { m, n, k, .. } = self;
        if m == 0 || n == 0 {
            return;
        }
        if m <= FEW_ROWS && k > 0 {
            // SAFETY: forwarded.
            return unsafe { self.few_rows(c, crs, add) };
        }
        let work = 2 * m * n * k;
        if work < 8 * par::INLINE_WORK {
            // SAFETY: forwarded.
            return unsafe { self.tile(c, crs, add) };
        }
        let (tm, tn, parts) = plan(m, n, k);
        let (rows, cols) = (m.div_ceil(tm), n.div_ceil(tn));
        if parts == 1 {
            let c = SharedPtr(c);
            par::for_each(rows * cols, work, |t| {
                let (i, j) = (t / cols * tm, t % cols * tn);
                // SAFETY: tiles are disjoint parts of the product.
                unsafe {
                    let tile = self.part(i, tm.min(m - i), j, tn.min(n - j), 0, k);
                    tile.tile(c.get().add(i * crs + j), crs, add);
                }
            });
            return;
        }
        let step = k.div_ceil(parts).next_multiple_of(16);
        let parts = k.div_ceil(step);
        par::with_scratch(parts * m * n, |partial| {
            let shared = SharedMut::new(partial);
            par::for_each(parts * rows * cols, work, |t| {
                let (p, i, j) = (t / (rows * cols) * step, t / cols % rows * tm, t % cols * tn);
                let (tm, tn) = (tm.min(m - i), tn.min(n - j));
                // SAFETY: tasks own disjoint tiles of their part's partial result.
                unsafe {
                    let tile = self.part(i, tm, j, tn, p, step.min(k - p));
                    let base = p / step * m * n + i * n + j;
                    tile.tile(shared.slice(base, (tm - 1) * n + tn).as_mut_ptr(), n, false);
                }
            });
            let c = SharedPtr(c);
            par::for_blocks(m, par::rows_per_task(n * parts), parts * m * n, |_, start, end| {
                for i in start..end {
                    // SAFETY: row i of c belongs to this task.
                    let row = unsafe { std::slice::from_raw_parts_mut(c.get().add(i * crs), n) };
                    sum_rows(partial, m * n, i * n, parts, row, add);
                }
            });
        });
    }

    /// One tile on the calling thread.
    unsafe fn tile(&self, c: *mut f32, crs: usize, add: bool) {
        let &Product { m, n, k, a, ars, acs, b, brs, bcs } = self;
        // SAFETY: the caller's matrices; C is row-major with unit column stride.
        unsafe {
            if bcs == 1 && m * n * k <= 48 * 48 * 48 {
                return small(m, n, k, (a, ars, acs), (b, brs), (c, crs), add);
            }
            gemm::gemm(
                m,
                n,
                k,
                c,
                1,
                crs as isize,
                add,
                a,
                acs as isize,
                ars as isize,
                b,
                bcs as isize,
                brs as isize,
                1.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            )
        }
    }

    /// m <= FEW_ROWS: B is read once, in parallel over its columns (or rows, if transposed).
    unsafe fn few_rows(&self, c: *mut f32, crs: usize, add: bool) {
        let &Product { m, n, k, a, ars, acs, brs, bcs, .. } = self;
        let (work, c) = (m * n * k, SharedPtr(c));
        let columns = |j: usize| self.b.wrapping_add(j * self.bcs);
        // SAFETY: reads of A inside its m x k range, blocks of C are disjoint columns.
        par::with_scratch(m * k, |packed| unsafe {
            for i in 0..m {
                for p in 0..k {
                    packed[i * k + p] = *a.add(i * ars + p * acs);
                }
            }
            let packed = &*packed;
            if bcs == 1 {
                // 256 columns: the running results stay in registers or L1, rows of B are read a kilobyte at a time.
                par::for_blocks(n, 256, work, |_, start, end| {
                    small(m, end - start, k, (packed.as_ptr(), k, 1), (columns(start), brs), (c.get().add(start), crs), add);
                });
            } else {
                assert!(brs == 1, "BUG: one stride of B must be 1");
                par::for_blocks(n, par::rows_per_task(m * k), work, |_, start, end| {
                    for j in start..end {
                        let col = std::slice::from_raw_parts(columns(j), k);
                        for i in 0..m {
                            let v = dot(&packed[i * k..(i + 1) * k], col);
                            let out = c.get().add(i * crs + j);
                            *out = if add { *out + v } else { v };
                        }
                    }
                });
            }
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
