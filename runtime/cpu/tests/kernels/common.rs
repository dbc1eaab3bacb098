//! Seeded inputs, padded matrices, comparisons, thread pools.

use rambac_cpu::{Mat, MatMut};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub struct Source(ChaCha8Rng);

impl Source {
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }
    /// Uniform in [-1, 1).
    pub fn vec(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.0.random_range(-1.0..1.0)).collect()
    }
    pub fn range(&mut self, n: usize, low: f32, high: f32) -> Vec<f32> {
        (0..n).map(|_| self.0.random_range(low..high)).collect()
    }
    pub fn ids(&mut self, n: usize, vocab: i32) -> Vec<i32> {
        (0..n).map(|_| self.0.random_range(0..vocab)).collect()
    }
}

/// A matrix inside a wider buffer: column offset 3, stride cols + pad, a sentinel around it.
#[derive(Clone)]
pub struct Padded {
    pub data: Vec<f32>,
    rows: usize,
    cols: usize,
    stride: usize,
}

const GUARD: f32 = 1234.5;

impl Padded {
    pub fn new(values: &[f32], rows: usize, cols: usize, pad: usize) -> Self {
        assert_eq!(values.len(), rows * cols);
        let stride = cols + pad;
        let mut data = vec![GUARD; 3 + rows * stride];
        for r in 0..rows {
            data[3 + r * stride..][..cols].copy_from_slice(&values[r * cols..(r + 1) * cols]);
        }
        Self { data, rows, cols, stride }
    }
    /// To be overwritten: full of NaN.
    pub fn out(rows: usize, cols: usize, pad: usize) -> Self {
        Self::new(&vec![f32::NAN; rows * cols], rows, cols, pad)
    }
    pub fn mat(&self) -> Mat<'_> {
        unsafe { Mat::from_raw(self.data[3..].as_ptr(), self.rows, self.cols, self.stride) }
    }
    pub fn mat_mut(&mut self) -> MatMut<'_> {
        unsafe { MatMut::from_raw(self.data[3..].as_mut_ptr(), self.rows, self.cols, self.stride) }
    }
    /// The values, after checking that nothing was written between rows.
    pub fn values(&self) -> Vec<f32> {
        let mut out = Vec::new();
        for (i, &v) in self.data.iter().enumerate() {
            let col = (i + self.stride - 3 % self.stride) % self.stride;
            if i >= 3 && col < self.cols { out.push(v) } else { assert_eq!(v, GUARD, "written outside, at {i}") }
        }
        out
    }
}

/// Largest |got - want| relative to the largest |want| must stay below `tol`.
#[track_caller]
pub fn close(what: &str, got: &[f32], want: &[f64], tol: f64) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let scale = want.iter().fold(1e-30f64, |m, v| m.max(v.abs()));
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        assert!((g as f64 - w).abs() <= tol * scale, "{what}[{i}]: got {g}, want {w} (scale {scale})");
    }
}

pub fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| v as f64).collect()
}

/// Runs `f` on pools of 1, 2 and 3 threads; the bits must agree.  Returns the result.
#[track_caller]
pub fn same_bits(f: impl Fn() -> Vec<f32> + Sync + Send) -> Vec<f32> {
    let run = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(&f);
    let one = run(1);
    for threads in [2, 3] {
        let other = run(threads);
        assert_eq!(one.len(), other.len());
        let equal = one.iter().zip(&other).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(equal, "{threads} threads give other bits than one");
    }
    one
}

/// Central differences of `f` at `x`, for every entry in `which`.
pub fn differences(x: &[f64], which: impl Iterator<Item = usize>, f: impl Fn(&[f64]) -> f64) -> Vec<(usize, f64)> {
    let mut x = x.to_vec();
    which
        .map(|i| {
            let (at, h) = (x[i], 1e-5);
            x[i] = at + h;
            let up = f(&x);
            x[i] = at - h;
            let down = f(&x);
            x[i] = at;
            (i, (up - down) / (2.0 * h))
        })
        .collect()
}

/// All gradients of `f` over the concatenation of `inputs`, by differences, split like the inputs.
pub fn gradients(inputs: &[&[f32]], f: impl Fn(&[Vec<f64>]) -> f64) -> Vec<Vec<f64>> {
    let flat: Vec<f64> = inputs.iter().flat_map(|x| f64s(x)).collect();
    let split = |x: &[f64]| {
        let mut at = 0;
        inputs.iter().map(|i| (x[at..at + i.len()].to_vec(), at += i.len()).0).collect::<Vec<_>>()
    };
    let d: Vec<f64> = differences(&flat, 0..flat.len(), |x| f(&split(x))).into_iter().map(|d| d.1).collect();
    split(&d)
}

pub fn dot(a: &[f64], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, &b)| a * b as f64).sum()
}
