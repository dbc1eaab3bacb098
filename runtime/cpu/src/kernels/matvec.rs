//! Products of a few rows with a weight matrix, c (m x n) = a (m x k) wᵀ (k x n), which read w once: decoding.
//!
//! The limit is how fast memory is read, so w is read as one stream, row after row, and all rows of `a` meet a row of w
//! while it is in L1; where there are many, four rows of w share what is loaded of `a`.  The stream is asked for far
//! ahead into L2 and near ahead into L1: the first keeps more reads under way than L1 can.  Weights may be bf16: a
//! vector of 32-bit words holds the even elements in its upper halves and, shifted by 16 bits, the odd ones, so `a` is
//! laid out as even and odd planes and every product is of an exactly widened weight with an f32 activation, summed in
//! f32.
//! Invariants: an element of c depends on its row of `a` and its row of w alone: not on m, n, tasks or threads (its bits
//! do depend on the instruction set).

// Index loops over several arrays at once read like the formulas.
#![allow(clippy::needless_range_loop)]

use crate::par;
use crate::simd::dispatch;
use half::bf16;
use pulp::{Simd, WithSimd};

#[cfg(target_endian = "big")]
compile_error!("bf16 weights are read two at a time as little-endian words");

/// Rows of `a` that share a pass over w; more are taken in several passes over what is then in L1.
const ROWS: usize = 6;
/// Bytes of w that a task reads: a few microseconds.
const TASK_BYTES: usize = 1 << 16;
/// Bytes of the stream between those used and those that L2 is asked for, and L1.
const FAR: usize = 16 << 10;
const NEAR: usize = 1 << 10;
/// Rows of `a` up to which one row of w at a time loads less than L1 gives while memory is waited for.
const SINGLE: usize = 2;
/// Lanes of the widest vector: planes of `a` are padded to it.
const LANES: usize = 16;

/// An element of a weight matrix: `P` vectors of f32 come from one vector of memory.
pub trait Weight<const P: usize>: Copy + Send + Sync + 'static {
    const ZERO: Self;
    /// Widens `P · S::F32_LANES` elements; vector p holds elements p, p + P, p + 2P, ….
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load<S: Simd>(simd: S, at: *const Self) -> [S::f32s; P];
}

impl Weight<1> for f32 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    unsafe fn load<S: Simd>(_: S, at: *const Self) -> [S::f32s; 1] {
        // SAFETY: the caller's promise.
        [unsafe { at.cast::<S::f32s>().read_unaligned() }]
    }
}

impl Weight<2> for bf16 {
    const ZERO: Self = bf16::ZERO;
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, at: *const Self) -> [S::f32s; 2] {
        // SAFETY: the caller's promise.
        let words = unsafe { at.cast::<S::u32s>().read_unaligned() };
        let even = simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(16));
        let odd = simd.and_u32s(words, simd.splat_u32s(0xffff_0000));
        [simd.transmute_f32s_u32s(even), simd.transmute_f32s_u32s(odd)]
    }
}

/// Floats that [`lay_out`] writes for `m` rows of `k` elements.
pub(crate) fn planes_len<const P: usize>(m: usize, k: usize) -> usize {
    m * P * plane(k, P)
}

/// Floats of one plane.
fn plane(k: usize, p: usize) -> usize {
    k.div_ceil(p).max(1).next_multiple_of(LANES)
}

/// Row i of `a` as planes `i * P..(i + 1) * P`, padded with zeros; `a` is (pointer, row stride, column stride).
///
/// # Safety
/// `a` must be readable as m x k.
unsafe fn lay_out<const P: usize>(m: usize, k: usize, a: (*const f32, usize, usize), to: &mut [f32]) {
    let (a, ars, acs) = a;
    let len = plane(k, P);
    for (i, planes) in to.chunks_exact_mut(P * len).enumerate().take(m) {
        for (p, plane) in planes.chunks_exact_mut(len).enumerate() {
            let n = (k + P - 1 - p) / P;
            plane[n..].fill(0.0);
            // SAFETY: element e * P + p < k of row i.
            let at = |e: usize, acs: usize| unsafe { *a.add(i * ars + (e * P + p) * acs) };
            let plane = plane[..n].iter_mut().enumerate();
            // The usual stride is known to the compiler, which then takes vectors.
            match acs {
                1 => plane.for_each(|(e, v)| *v = at(e, 1)),
                _ => plane.for_each(|(e, v)| *v = at(e, acs)),
            }
        }
    }
}

/// c (m x n) = a wᵀ [+ c]: a (m x k) as (pointer, row stride, column stride), w (n x k) as (pointer, row stride), c as
/// (pointer, row stride).
///
/// # Safety
/// The strided matrices must be readable, `c` writable and disjoint from both.
pub(crate) unsafe fn rows_times<W: Weight<P>, const P: usize>(
    m: usize,
    n: usize,
    k: usize,
    a: (*const f32, usize, usize),
    w: (*const W, usize),
    c: (*mut f32, usize),
    add: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    par::with_scratch(planes_len::<P>(m, k), |planes| {
        // SAFETY: forwarded.
        unsafe { lay_out::<P>(m, k, a, planes) };
        let job = Job { m, k, planes, w, c, add };
        let block = (TASK_BYTES / (k * size_of::<W>()).max(1)).next_multiple_of(4).max(4);
        par::for_blocks(n, block, m * n * k, |_, start, end| dispatch(Part { job: &job, start, end }));
    });
}

/// One product.
struct Job<'a, W> {
    m: usize,
    k: usize,
    planes: &'a [f32],
    w: (*const W, usize),
    c: (*mut f32, usize),
    add: bool,
}

// SAFETY: w is shared reads of memory that outlives the loop over parts, and parts write disjoint columns of c.
unsafe impl<W: Sync> Sync for Job<'_, W> {}

/// Columns start..end of c.
struct Part<'a, W, const P: usize> {
    job: &'a Job<'a, W>,
    start: usize,
    end: usize,
}

impl<W: Weight<P>, const P: usize> WithSimd for Part<'_, W, P> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // 6 x 4 sums, 4 vectors of w and one of a fill 32 registers; 6 x 2 fill 16.
        let most = match self.job.m {
            0..=SINGLE => 1,
            _ if S::REGISTER_COUNT >= 32 => 4,
            _ => 2,
        };
        let mut j = self.start;
        while j < self.end {
            let rows = (self.end - j).min(most);
            // SAFETY: rows j..j+rows of w exist.
            unsafe {
                match rows {
                    4 => self.sweep::<S, 4>(simd, j),
                    3 => self.sweep::<S, 3>(simd, j),
                    2 => self.sweep::<S, 2>(simd, j),
                    _ => self.sweep::<S, 1>(simd, j),
                }
            }
            j += rows;
        }
    }
}

impl<W: Weight<P>, const P: usize> Part<'_, W, P> {
    /// All rows of `a` with `NR` rows of w.
    #[inline(always)]
    unsafe fn sweep<S: Simd, const NR: usize>(&self, simd: S, j: usize) {
        let mut i = 0;
        while i < self.job.m {
            let rows = (self.job.m - i).min(ROWS);
            // SAFETY: rows i..i+rows of a exist.
            unsafe {
                match rows {
                    1 => self.dots::<S, 1, NR>(simd, i, j),
                    2 => self.dots::<S, 2, NR>(simd, i, j),
                    3 => self.dots::<S, 3, NR>(simd, i, j),
                    4 => self.dots::<S, 4, NR>(simd, i, j),
                    5 => self.dots::<S, 5, NR>(simd, i, j),
                    _ => self.dots::<S, 6, NR>(simd, i, j),
                }
            }
            i += rows;
        }
    }

    /// `MR` rows of `a` with `NR` rows of w: the sums stay in registers.
    #[inline(always)]
    unsafe fn dots<S: Simd, const MR: usize, const NR: usize>(&self, simd: S, i: usize, j: usize) {
        let Job { k, planes, w: (w, ws), c: (c, cs), add, .. } = *self.job;
        let (lanes, len) = (S::F32_LANES, plane(k, P));
        let step = P * lanes;
        let mut acc = [[simd.splat_f32s(0.0); NR]; MR];
        // SAFETY: rows i.. of the planes, j.. of w, and the elements of c they give; planes are padded to whole vectors.
        unsafe {
            let x = planes.as_ptr().add(i * P * len);
            let rows: [*const W; NR] = std::array::from_fn(|r| w.add((j + r) * ws));
            for v in 0..k / step {
                for r in 0..NR {
                    let at = rows[r].add(v * step);
                    if !S::IS_SCALAR {
                        // In the order of memory, whatever that of use.
                        prefetch_far(rows[0].wrapping_add((v * NR + r) * step).wrapping_byte_add(FAR));
                        prefetch(at.wrapping_byte_add(NEAR / NR));
                    }
                    let w = W::load(simd, at);
                    for p in 0..P {
                        for i in 0..MR {
                            let x = x.add((i * P + p) * len + v * lanes).cast::<S::f32s>().read_unaligned();
                            acc[i][r] = simd.mul_add_e_f32s(x, w[p], acc[i][r]);
                        }
                    }
                }
            }
            let (full, rest) = (k / step * step, k % step);
            if rest > 0 {
                for r in 0..NR {
                    let mut tail = [W::ZERO; 2 * LANES];
                    std::ptr::copy_nonoverlapping(rows[r].add(full), tail.as_mut_ptr(), rest);
                    let w = W::load(simd, tail.as_ptr());
                    for p in 0..P {
                        for i in 0..MR {
                            let at = (i * P + p) * len + k / step * lanes;
                            let x = x.add(at).cast::<S::f32s>().read_unaligned();
                            acc[i][r] = simd.mul_add_e_f32s(x, w[p], acc[i][r]);
                        }
                    }
                }
            }
            for (i, sums) in (i..).zip(acc) {
                for (r, sum) in (j..).zip(sums) {
                    let (out, sum) = (c.add(i * cs + r), simd.reduce_sum_f32s(sum));
                    *out = if add { *out + sum } else { sum };
                }
            }
        }
    }
}

/// Asks for the cache line at `at`, which need not exist.
#[inline(always)]
pub(super) fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; it reads nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// As [`prefetch`], into L2 alone.
#[inline(always)]
pub(crate) fn prefetch_far<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; it reads nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Sum of `x` on the calling thread, as one stream that is asked for `ahead` bytes ahead: a measure of how fast memory
/// can be read.
pub fn total(x: &[f32], ahead: usize) -> f32 {
    dispatch(Total { x, ahead })
}

struct Total<'a> {
    x: &'a [f32],
    ahead: usize,
}

impl WithSimd for Total<'_> {
    type Output = f32;
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let (body, rest) = S::as_simd_f32s(self.x);
        let (blocks, tail) = body.as_chunks::<8>();
        let mut acc = [simd.splat_f32s(0.0); 8];
        for block in blocks {
            for (a, v) in acc.iter_mut().zip(block) {
                if !S::IS_SCALAR {
                    prefetch(std::ptr::from_ref(v).wrapping_byte_add(self.ahead));
                }
                *a = simd.add_f32s(*a, *v);
            }
        }
        let mut sum = simd.splat_f32s(0.0);
        for v in acc.iter().chain(tail) {
            sum = simd.add_f32s(sum, *v);
        }
        simd.reduce_sum_f32s(sum) + rest.iter().sum::<f32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One part on every instruction set this machine has, the portable one included.
    fn on_every_instruction_set<W: Weight<P>, const P: usize>(narrow: impl Fn(f32) -> (W, f64)) {
        for (m, n, k) in [(1, 5, 1), (1, 9, 64), (2, 4, 33), (6, 7, 31), (7, 3, 96), (13, 6, 131), (3, 2, 0)] {
            let a: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.7).sin()).collect();
            let b: Vec<(W, f64)> = (0..n * k).map(|i| narrow((i as f32 * 0.3).cos())).collect();
            let w: Vec<W> = b.iter().map(|b| b.0).collect();
            let mut planes = vec![f32::NAN; planes_len::<P>(m, k)];
            unsafe { lay_out::<P>(m, k, (a.as_ptr(), k, 1), &mut planes) };
            let run = |which: usize| {
                let mut c = vec![1.0f32; m * n];
                let job = Job { m, k, planes: &planes, w: (w.as_ptr(), k), c: (c.as_mut_ptr(), n), add: true };
                let part = Part { job: &job, start: 0, end: n };
                match which {
                    0 => Simd::vectorize(pulp::Scalar::new(), part),
                    #[cfg(target_arch = "x86_64")]
                    1 => match pulp::x86::V3::try_new() {
                        Some(simd) => Simd::vectorize(simd, part),
                        None => return None,
                    },
                    #[cfg(target_arch = "x86_64")]
                    2 => match pulp::x86::V4::try_new() {
                        Some(simd) => Simd::vectorize(simd, part),
                        None => return None,
                    },
                    _ => dispatch(part),
                }
                Some(c)
            };
            for which in 0..4 {
                let Some(got) = run(which) else {
                    println!("no AVX{} here: its path is not tested", ["", "2", "-512"][which]);
                    continue;
                };
                for (i, got) in got.into_iter().enumerate() {
                    let terms = (0..k).map(|p| a[i / n * k + p] as f64 * b[i % n * k + p].1);
                    let dot: f64 = terms.sum();
                    assert!((got as f64 - 1.0 - dot).abs() < 1e-5, "{which}: {m}x{n}x{k}: {got} for {}", dot + 1.0);
                }
            }
        }
    }

    #[test]
    fn matvec_total_sums_all() {
        for n in [0, 1, 15, 16, 127, 128, 1000, 16384] {
            let x: Vec<f32> = (0..n).map(|i| (i % 7) as f32).collect();
            assert_eq!(total(&x, 512), x.iter().sum::<f32>(), "{n}");
        }
    }

    #[test]
    fn matvec_f32_on_every_instruction_set() {
        on_every_instruction_set::<f32, 1>(|x| (x, x as f64));
    }

    #[test]
    fn matvec_bf16_on_every_instruction_set() {
        on_every_instruction_set::<bf16, 2>(|x| (bf16::from_f32(x), bf16::from_f32(x).to_f64()));
    }
}
