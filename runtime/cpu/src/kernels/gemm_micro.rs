//! The register-tiled micro-kernel of dense products on strided operands, which other kernels use as well.

// Index loops over several arrays at once read like the formulas.
#![allow(clippy::needless_range_loop)]

use crate::simd::dispatch;
use pulp::{Simd, WithSimd};

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
    dispatch(Small { m, n, k, a: Left::strided(a.0, a.1, a.2), b, c, add })
}

/// Rows that the micro-kernel takes together.
pub(crate) const ROWS: usize = 6;

/// A left operand: element (i, p) is `panel * (i / ROWS) + row * (i % ROWS) + step * p` elements from `ptr`.
#[derive(Clone, Copy)]
pub(crate) struct Left {
    pub ptr: *const f32,
    pub row: usize,
    pub step: usize,
    pub panel: usize,
}

impl Left {
    pub fn strided(ptr: *const f32, row: usize, step: usize) -> Self {
        Self { ptr, row, step, panel: ROWS * row }
    }
}

/// See [`small`], whose promises the maker of a value gives.
pub(crate) struct Small {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Left,
    pub b: (*const f32, usize),
    pub c: (*mut f32, usize),
    pub add: bool,
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
            let rows = (self.m - i).min(ROWS);
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
        let Left { ptr, row, step, panel } = self.a;
        let mask = simd.mask_between_m32s(0, tail as u32);
        let zero = simd.splat_f32s(0.0);
        let mut acc = [[zero; NV]; MR];
        // SAFETY: every access is inside the matrices; the partial vector is masked.
        unsafe {
            let (a, b, c) = (ptr.add(i / ROWS * panel), self.b.0.add(j), self.c.0.add(i * self.c.1 + j));
            for p in 0..self.k {
                let (ap, bp) = (a.add(p * step), b.add(p * self.b.1));
                let mut bv = [zero; NV];
                for v in 0..NV {
                    bv[v] = if TAIL && v == NV - 1 {
                        simd.mask_load_ptr_f32s(mask, bp.add(v * lanes))
                    } else {
                        bp.add(v * lanes).cast::<S::f32s>().read_unaligned()
                    };
                }
                for r in 0..MR {
                    let av = simd.splat_f32s(*ap.add(r * row));
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

    #[test]
    fn gemm_small_matches_dot_products() {
        for (m, n, k) in [(1, 1, 1), (7, 19, 5), (13, 77, 31)] {
            let a: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.7).sin()).collect();
            let b: Vec<f32> = (0..k * n).map(|i| (i as f32 * 0.3).cos()).collect();
            let mut c = vec![1.0f32; m * n];
            // SAFETY: the matrices just made.
            unsafe { small(m, n, k, (a.as_ptr(), k, 1), (b.as_ptr(), n), (c.as_mut_ptr(), n), true) };
            for (i, got) in c.into_iter().enumerate() {
                let dot: f64 = (0..k).map(|p| a[i / n * k + p] as f64 * b[p * n + i % n] as f64).sum();
                assert!((got as f64 - 1.0 - dot).abs() < 1e-5, "{got} for {}", dot + 1.0);
            }
        }
    }
}
