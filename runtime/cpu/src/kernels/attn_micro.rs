//! Micro-kernels shared by the attention and selection kernels: a register-blocked product, a vector exp2,
//! and the forward and backward of softmax attention over one block of keys.
//!
//! Everything works on small, 64-byte-aligned, row-major tiles whose widths are padded to [`PAD`] columns of
//! zeros, so the inner loops never see a partial vector.  Sums run in index order (one fused multiply-add per
//! term), so a result does not depend on how rows or columns were blocked.
//!
//! Logits are kept in base 2: queries arrive multiplied by `scale * log2(e)`, see [`LOG2_E`].

use pulp::{Simd, WithSimd};

use crate::Mat;
use std::ops::Range;

/// Widths of tiles are multiples of this; every vector length divides it.
pub(crate) const PAD: usize = 16;

pub(crate) const LOG2_E: f32 = std::f32::consts::LOG2_E;
pub(crate) const LN_2: f32 = std::f32::consts::LN_2;

/// `n` rounded up to whole vectors.
pub(crate) fn padded(n: usize) -> usize {
    n.next_multiple_of(PAD)
}

// ---------------------------------------------------------------------------------------------------------
// Memory

/// Floats of scratch that [`carve`] needs for pieces of these sizes.
pub(crate) fn carved(sizes: &[usize]) -> usize {
    sizes.iter().map(|&size| padded(size)).sum()
}

/// Cuts aligned scratch of [`carved`] floats into pieces that start on cache lines; contents are unspecified.
pub(crate) fn carve<const N: usize>(scratch: &mut [f32], sizes: [usize; N]) -> [&mut [f32]; N] {
    let mut rest = scratch;
    sizes.map(|size| {
        let (piece, tail) = std::mem::take(&mut rest).split_at_mut(padded(size));
        rest = tail;
        &mut piece[..size]
    })
}

// ---------------------------------------------------------------------------------------------------------
// Packing

/// Copies `src` into `dst`, rows of `padded(src.cols())`, times `factor`; the padding becomes zero.
#[inline(always)]
pub(crate) fn pack_rows(src: Mat, factor: f32, dst: &mut [f32]) {
    let (cols, width) = (src.cols(), padded(src.cols()));
    for (r, out) in dst.chunks_exact_mut(width).take(src.rows()).enumerate() {
        pack_row(src.row(r), factor, &mut out[..], cols);
    }
}

/// Copies the `cols` elements of `src` times `factor` and fills the rest of `dst` with zeros.
#[inline(always)]
pub(crate) fn pack_row(src: &[f32], factor: f32, dst: &mut [f32], cols: usize) {
    let (head, tail) = dst.split_at_mut(cols);
    for (y, &x) in head.iter_mut().zip(src) {
        *y = x * factor;
    }
    tail.fill(0.0);
}

/// Writes the transpose of `src` into `dst`: `src.cols()` rows of `width` columns (`width` a multiple of
/// [`PAD`], at least `src.rows()`); the padding becomes zero.
#[inline(always)]
pub(crate) fn pack_transposed(src: Mat, width: usize, dst: &mut [f32]) {
    assert!(width >= src.rows() && dst.len() >= src.cols() * width, "BUG: transpose does not fit");
    let (rows, cols) = (src.rows(), src.cols());
    for first in (0..width).step_by(PAD) {
        let here = rows.saturating_sub(first).min(PAD);
        let mut lines: [&[f32]; PAD] = [&[]; PAD];
        for (r, line) in lines[..here].iter_mut().enumerate() {
            *line = src.row(first + r);
        }
        if here == PAD {
            for (c, out) in dst.chunks_exact_mut(width).take(cols).enumerate() {
                let out = &mut out[first..first + PAD];
                for (y, line) in out.iter_mut().zip(&lines) {
                    *y = line[c];
                }
            }
        } else {
            for (c, out) in dst.chunks_exact_mut(width).take(cols).enumerate() {
                let out = &mut out[first..first + PAD];
                for (y, line) in out.iter_mut().zip(&lines[..here]) {
                    *y = line[c];
                }
                out[here..].fill(0.0);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------
// Products

/// One left operand of [`Product`]: element `(i, p)` is `data[i * row + p * step]`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub data: &'a [f32],
    pub row: usize,
    pub step: usize,
}

impl<'a> Left<'a> {
    /// Row-major rows of `width`.
    pub(crate) fn rows(data: &'a [f32], width: usize) -> Self {
        Self { data, row: width, step: 1 }
    }
    /// The transpose of row-major rows of `width`.
    pub(crate) fn transposed(data: &'a [f32], width: usize) -> Self {
        Self { data, row: 1, step: width }
    }
}

/// `C (m x n) = A (m x k) · B (k x n)`, or `+=`.
///
/// `b` and `c` are row-major with rows of `b_row` and `c_row` elements; `n` is a multiple of [`PAD`].
pub(crate) struct Product<'a> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Left<'a>,
    pub b: &'a [f32],
    pub b_row: usize,
    pub c: &'a mut [f32],
    pub c_row: usize,
    pub accumulate: bool,
}

/// The pointers of a [`Product`] at one tile.
#[derive(Clone, Copy)]
struct Tile {
    k: usize,
    a: *const f32,
    a_row: usize,
    a_step: usize,
    b: *const f32,
    b_row: usize,
    c: *mut f32,
    c_row: usize,
    accumulate: bool,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Product { m, n, k, a, b, b_row, c, c_row, accumulate } = self;
        if m == 0 || n == 0 {
            return;
        }
        assert!(n % PAD == 0 && c_row >= n && c.len() >= (m - 1) * c_row + n, "BUG: product's output");
        if k > 0 {
            assert!(a.data.len() > (m - 1) * a.row + (k - 1) * a.step, "BUG: product's left operand");
            assert!(b.len() >= (k - 1) * b_row + n, "BUG: product's right operand");
        }
        let tile = Tile {
            k,
            a: a.data.as_ptr(),
            a_row: a.row,
            a_step: a.step,
            b: b.as_ptr(),
            b_row,
            c: c.as_mut_ptr(),
            c_row,
            accumulate,
        };
        // SAFETY: every tile lies inside the ranges asserted above.
        unsafe {
            if S::REGISTER_COUNT >= 32 {
                // 24 accumulators, up to 4 vectors of B, one of A.
                let mut column = 0;
                while column < n {
                    let at = tile.at_column(column);
                    match (n - column) / S::F32_LANES {
                        1 => panel::<S, 12, 1>(simd, m, at),
                        2 => panel::<S, 12, 2>(simd, m, at),
                        3 => panel::<S, 8, 3>(simd, m, at),
                        _ => panel::<S, 6, 4>(simd, m, at),
                    }
                    column += 4 * S::F32_LANES;
                }
            } else {
                for column in (0..n).step_by(2 * S::F32_LANES) {
                    panel::<S, 6, 2>(simd, m, tile.at_column(column));
                }
            }
        }
    }
}

impl Tile {
    #[inline(always)]
    unsafe fn at_column(mut self, column: usize) -> Self {
        // SAFETY: the caller stays inside the matrices.
        unsafe {
            self.b = self.b.add(column);
            self.c = self.c.add(column);
        }
        self
    }
    #[inline(always)]
    unsafe fn at_row(mut self, row: usize) -> Self {
        // SAFETY: the caller stays inside the matrices.
        unsafe {
            self.a = self.a.add(row * self.a_row);
            self.c = self.c.add(row * self.c_row);
        }
        self
    }
}

/// All `m` rows of a panel of `NV` vectors, `MR` at a time.
#[inline(always)]
unsafe fn panel<S: Simd, const MR: usize, const NV: usize>(simd: S, m: usize, tile: Tile) {
    let mut row = 0;
    // SAFETY: `row + (rows of the kernel) <= m` each time.
    unsafe {
        while row + MR <= m {
            kernel::<S, MR, NV>(simd, tile.at_row(row));
            row += MR;
        }
        while row + 4 <= m {
            kernel::<S, 4, NV>(simd, tile.at_row(row));
            row += 4;
        }
        if row + 2 <= m {
            kernel::<S, 2, NV>(simd, tile.at_row(row));
            row += 2;
        }
        if row < m {
            kernel::<S, 1, NV>(simd, tile.at_row(row));
        }
    }
}

/// `MR x NV` vectors of the product, held in registers over the whole inner dimension.
#[inline(always)]
unsafe fn kernel<S: Simd, const MR: usize, const NV: usize>(simd: S, t: Tile) {
    let mut acc = [[simd.splat_f32s(0.0); NV]; MR];
    // SAFETY: the caller's ranges; loads and stores are unaligned.
    unsafe {
        if t.accumulate {
            for (i, row) in acc.iter_mut().enumerate() {
                for (j, x) in row.iter_mut().enumerate() {
                    *x = load(simd, t.c.add(i * t.c_row + j * S::F32_LANES));
                }
            }
        }
        for p in 0..t.k {
            let b = t.b.add(p * t.b_row);
            let a = t.a.add(p * t.a_step);
            let mut bv = [simd.splat_f32s(0.0); NV];
            for (j, x) in bv.iter_mut().enumerate() {
                *x = load(simd, b.add(j * S::F32_LANES));
            }
            for (i, row) in acc.iter_mut().enumerate() {
                let av = simd.splat_f32s(*a.add(i * t.a_row));
                for (x, &y) in row.iter_mut().zip(&bv) {
                    *x = simd.mul_add_e_f32s(av, y, *x);
                }
            }
        }
        for (i, row) in acc.iter().enumerate() {
            for (j, &x) in row.iter().enumerate() {
                t.c.add(i * t.c_row + j * S::F32_LANES).cast::<S::f32s>().write_unaligned(x);
            }
        }
    }
}

/// A vector from `p`.
///
/// # Safety
/// `S::F32_LANES` elements from `p` on must be readable.
#[inline(always)]
unsafe fn load<S: Simd>(_simd: S, p: *const f32) -> S::f32s {
    // SAFETY: the caller's promise.
    unsafe { p.cast::<S::f32s>().read_unaligned() }
}

// ---------------------------------------------------------------------------------------------------------
// Softmax

/// `2^x` for `x <= 127`, exactly 0 below the normal range: round to an integer by adding 1.5·2^23, a polynomial
/// (Cephes' exp2f) for the fraction in [-1/2, 1/2], and the integer added to the exponent field.  Relative error below 2 ulp.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let c = |v: f32| simd.splat_f32s(v);
    let magic = c(12_582_912.0);
    let rounded = simd.add_f32s(x, magic);
    let fraction = simd.sub_f32s(x, simd.sub_f32s(rounded, magic));
    let mut p = c(1.535_336_2e-4);
    p = simd.mul_add_e_f32s(p, fraction, c(1.339_887_4e-3));
    p = simd.mul_add_e_f32s(p, fraction, c(9.618_437e-3));
    p = simd.mul_add_e_f32s(p, fraction, c(5.550_332_5e-2));
    p = simd.mul_add_e_f32s(p, fraction, c(2.402_264_8e-1));
    p = simd.mul_add_e_f32s(p, fraction, c(6.931_472e-1));
    p = simd.mul_add_e_f32s(p, fraction, c(1.0));
    let exponent = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(rounded), simd.splat_u32s(23));
    let y = simd.transmute_f32s_u32s(simd.add_u32s(simd.transmute_u32s_f32s(p), exponent));
    simd.select_f32s(simd.less_than_f32s(x, c(-126.0)), c(0.0), y)
}

/// Replaces the `visible` base-2 logits of `row` by `2^(x - max)` and the rest by 0; returns their sum plus `zeros`
/// further logits of 0, and the maximum.  Nothing visible: the sum is 1, so that it divides, and the maximum -inf.
#[inline(always)]
fn exp_row<S: Simd>(simd: S, row: &mut [f32], visible: Range<usize>, zeros: f32) -> (f32, f32) {
    if visible.is_empty() {
        row.fill(0.0);
        return (1.0, f32::NEG_INFINITY);
    }
    row[..visible.start].fill(f32::NEG_INFINITY);
    row[visible.end..].fill(f32::NEG_INFINITY);
    let used = padded(visible.end);
    let (vectors, _) = S::as_mut_simd_f32s(&mut row[..used]);
    let mut max = simd.splat_f32s(f32::NEG_INFINITY);
    for &v in vectors.iter() {
        max = simd.max_f32s(max, v);
    }
    let mut max = simd.reduce_max_f32s(max);
    if zeros != 0.0 {
        max = max.max(0.0);
    }
    let shift = simd.splat_f32s(max);
    let mut sum = simd.splat_f32s(0.0);
    for v in vectors.iter_mut() {
        *v = exp2(simd, simd.sub_f32s(*v, shift));
        sum = simd.add_f32s(sum, *v);
    }
    row[used..].fill(0.0);
    let sum = simd.reduce_sum_f32s(sum);
    (if zeros != 0.0 { sum + zeros * (-max).exp2() } else { sum }, max)
}

/// A block of keys and values packed for the products of attention.
#[derive(Clone, Copy)]
pub(crate) struct Block<'a> {
    /// Keys of the block.
    pub keys: usize,
    /// Width of a head.
    pub dim: usize,
    /// Zero logits added to every softmax.
    pub zeros: f32,
    /// Kᵀ: `dim` rows of `padded(keys)`.
    pub keys_t: &'a [f32],
    /// `keys` rows of `padded(dim)`: V in the forward, K in the backward direction.
    pub rows: &'a [f32],
    /// Vᵀ, laid out as Kᵀ (backward only).
    pub values_t: &'a [f32],
}

/// Softmax attention of `rows` query rows over a block.
///
/// `q`: rows of `padded(dim)`, in base 2; row `i` sees the keys `visible(i)`, which end no earlier than row `i - 1`'s.
/// Out: `s`, rows of `padded(keys)`, the exponentials; `o`, rows of `padded(dim)`, their product with V; `sums`, the
/// denominators (`o / sums` is the attention's value); `tops`, what was subtracted from the logits (so the base-2
/// log-sum-exp is `top + log2 sum`).
pub(crate) struct Attend<'a, V> {
    pub block: Block<'a>,
    pub rows: usize,
    pub visible: &'a V,
    pub q: &'a [f32],
    pub s: &'a mut [f32],
    pub o: &'a mut [f32],
    pub sums: &'a mut [f32],
    pub tops: &'a mut [f32],
}

impl<V: Fn(usize) -> Range<usize>> WithSimd for Attend<'_, V> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Attend { block, rows, visible, q, s, o, sums, tops } = self;
        let used = exponentials(simd, &block, rows, visible, q, s, (sums, tops));
        let (wide, width) = (padded(block.dim), padded(block.keys));
        simd.vectorize(Product {
            m: rows,
            n: wide,
            k: used,
            a: Left::rows(s, width),
            b: block.rows,
            b_row: wide,
            c: o,
            c_row: wide,
            accumulate: false,
        });
    }
}

/// `s = exp2(q Kᵀ - rowmax)` and its row sums; returns the number of leading keys that any row sees.
#[inline(always)]
fn exponentials<S: Simd>(
    simd: S,
    block: &Block,
    rows: usize,
    visible: &impl Fn(usize) -> Range<usize>,
    q: &[f32],
    s: &mut [f32],
    (sums, tops): (&mut [f32], &mut [f32]),
) -> usize {
    let (wide, width) = (padded(block.dim), padded(block.keys));
    let used = visible(rows - 1).end;
    simd.vectorize(Product {
        m: rows,
        n: padded(used),
        k: block.dim,
        a: Left::rows(q, wide),
        b: block.keys_t,
        b_row: width,
        c: s,
        c_row: width,
        accumulate: false,
    });
    for (i, (row, (sum, top))) in s.chunks_exact_mut(width).zip(sums.iter_mut().zip(tops)).take(rows).enumerate() {
        (*sum, *top) = exp_row(simd, &mut row[..padded(used)], visible(i), block.zeros);
    }
    used
}

/// What comes into [`AttendBackward`] beside `dy`, a number per row.
#[derive(Clone, Copy)]
pub(crate) enum Upstream<'a> {
    /// `y_i = weights[i] * (o / sums)_i`.
    Weighted(&'a [f32]),
    /// `y_i = (o / sums)_i`, and the gradient at the natural log-sum-exp.
    LogSumExp(&'a [f32]),
    /// The block is a part of a softmax over more keys: its base-2 log-sum-exp, and `Σ p·dp` over all keys less the
    /// gradient at the log-sum-exp.
    Part { total: &'a [f32], delta: &'a [f32] },
}

/// The backward of [`Attend`] for what [`Upstream`] says, recomputing the softmax.
///
/// `dy`: upstream rows of `padded(dim)`.  Out: `dots[i] = dy_i · (o / sums)_i`, which is the gradient of
/// `weights[i]`; `dq`, rows of `padded(dim)`, to be multiplied by the logits' scale; `dk` and `dv`, `keys` rows of
/// `padded(dim)`, overwritten when `first`, else added to; `dk` is to be multiplied by ln 2 at the end
/// (`q` carries `scale * log2(e)`).
pub(crate) struct AttendBackward<'a, V> {
    pub block: Block<'a>,
    pub rows: usize,
    pub visible: &'a V,
    pub upstream: Upstream<'a>,
    pub q: &'a [f32],
    pub dy: &'a [f32],
    pub s: &'a mut [f32],
    pub ds: &'a mut [f32],
    pub dots: &'a mut [f32],
    pub tops: &'a mut [f32],
    pub dq: &'a mut [f32],
    pub dk: &'a mut [f32],
    pub dv: &'a mut [f32],
    pub first: bool,
}

impl<V: Fn(usize) -> Range<usize>> WithSimd for AttendBackward<'_, V> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let AttendBackward { block, rows, visible, upstream, q, dy, s, ds, dots, tops, dq, dk, dv, first } = self;
        let (wide, width) = (padded(block.dim), padded(block.keys));
        let used = exponentials(simd, &block, rows, visible, q, s, (dots, tops));
        simd.vectorize(Product {
            m: rows,
            n: padded(used),
            k: block.dim,
            a: Left::rows(dy, wide),
            b: block.values_t,
            b_row: width,
            c: ds,
            c_row: width,
            accumulate: false,
        });
        let lines = s.chunks_exact_mut(width).zip(ds.chunks_exact_mut(width));
        for (i, ((p, dp), dot)) in lines.zip(dots.iter_mut()).take(rows).enumerate() {
            let inverse = 1.0 / *dot;
            let (factor, shift) = match upstream {
                Upstream::Weighted(w) => (w[i] * inverse, Shift::Less(0.0)),
                Upstream::LogSumExp(d) => (inverse, Shift::Less(d[i])),
                Upstream::Part { total, delta } => ((tops[i] - total[i]).exp2(), Shift::By(delta[i])),
            };
            *dot = softmax_backward(simd, &mut p[..padded(used)], &mut dp[..padded(used)], factor, inverse, shift);
        }
        simd.vectorize(Product {
            m: rows,
            n: wide,
            k: used,
            a: Left::rows(ds, width),
            b: block.rows,
            b_row: wide,
            c: dq,
            c_row: wide,
            accumulate: false,
        });
        // Keys that no row of the first tile sees still need their zeros.
        let keys = if first { block.keys } else { used };
        if first && used < block.keys {
            for line in s.chunks_exact_mut(width).chain(ds.chunks_exact_mut(width)) {
                line[padded(used)..].fill(0.0);
            }
        }
        for (p, x, out) in [(&*s, dy, dv), (&*ds, q, dk)] {
            simd.vectorize(Product {
                m: keys,
                n: wide,
                k: rows,
                a: Left::transposed(p, width),
                b: x,
                b_row: wide,
                c: out,
                c_row: wide,
                accumulate: !first,
            });
        }
    }
}

/// What is subtracted from `dp`.
#[derive(Clone, Copy)]
enum Shift {
    /// The row's dot, less this.
    Less(f32),
    By(f32),
}

/// From the exponentials `p` (their sum's inverse is `inverse`) and `dp = dy·Vᵀ`: the row's dot `Σ softmax·dp`, which
/// is returned, `p` times `factor`, and `dp = p∘(dp - shift)`.
#[inline(always)]
fn softmax_backward<S: Simd>(simd: S, p: &mut [f32], dp: &mut [f32], factor: f32, inverse: f32, shift: Shift) -> f32 {
    let (p, _) = S::as_mut_simd_f32s(p);
    let (dp, _) = S::as_mut_simd_f32s(dp);
    let mut dot = simd.splat_f32s(0.0);
    for (&p, &dp) in p.iter().zip(dp.iter()) {
        dot = simd.mul_add_e_f32s(p, dp, dot);
    }
    let dot = simd.reduce_sum_f32s(dot) * inverse;
    let shift = match shift {
        Shift::Less(by) => dot - by,
        Shift::By(by) => by,
    };
    let (factor, shift) = (simd.splat_f32s(factor), simd.splat_f32s(shift));
    for (p, dp) in p.iter_mut().zip(dp) {
        *p = simd.mul_f32s(*p, factor);
        *dp = simd.mul_f32s(*p, simd.sub_f32s(*dp, shift));
    }
    dot
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::dispatch;

    #[test]
    fn exp2_is_accurate() {
        struct Check;
        impl WithSimd for Check {
            type Output = f64;
            fn with_simd<S: Simd>(self, simd: S) -> f64 {
                let mut worst = 0.0f64;
                for i in 0..2_000_000 {
                    let x = -126.0 + i as f32 * (200.0 / 2_000_000.0);
                    let mut lanes = vec![0.0f32; S::F32_LANES];
                    let (v, _) = S::as_mut_simd_f32s(&mut lanes);
                    v[0] = exp2(simd, simd.splat_f32s(x));
                    let exact = (x as f64).exp2();
                    worst = worst.max((lanes[0] as f64 - exact).abs() / exact);
                }
                worst
            }
        }
        let worst = dispatch(Check);
        assert!(worst < 2.0 * f32::EPSILON as f64, "relative error {worst:e}");
    }

    #[test]
    fn product_matches_loops() {
        for (m, n, k) in [(1, 16, 1), (7, 32, 5), (13, 48, 16), (23, 80, 3), (6, 64, 0), (31, 128, 17)] {
            let a: Vec<f32> = (0..m * (k + 1)).map(|i| ((i * 7919) % 31) as f32 - 15.0).collect();
            let b: Vec<f32> = (0..k * n).map(|i| ((i * 104_729) % 29) as f32 - 14.0).collect();
            for transposed in [false, true] {
                let left = if transposed { Left::transposed(&a, m) } else { Left::rows(&a, k + 1) };
                let mut c = vec![1.0; m * n];
                dispatch(Product { m, n, k, a: left, b: &b, b_row: n, c: &mut c, c_row: n, accumulate: transposed });
                for i in 0..m {
                    for j in 0..n {
                        let mut x = if transposed { 1.0 } else { 0.0 };
                        for p in 0..k {
                            x += a[i * left.row + p * left.step] * b[p * n + j];
                        }
                        assert_eq!(c[i * n + j], x, "{m}x{n}x{k} at {i},{j}");
                    }
                }
            }
        }
    }
}
