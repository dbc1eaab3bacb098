//! Dense products, which programs leave to a vendor's library.

use crate::BufferId;

/// A float format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Float {
    F32,
    Bf16,
    F16,
}

impl Float {
    pub fn bytes(self) -> usize {
        if self == Float::F32 { 4 } else { 2 }
    }
}

/// Matrices in a buffer: element (i, j) of matrix g is at `at` (bytes) and `g·step + i·ld + j` elements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Matrix {
    pub buffer: BufferId,
    pub at: usize,
    pub float: Float,
    pub ld: usize,
    pub step: usize,
    /// Taken as (j, i).
    pub trans: bool,
}

/// `c[g] = op(a[g]) · op(b[g]) + plus[g]` with sums in f32 or better; what is added, if anything is, has the float format of
/// `c` and may be it.  f32 stays f32: no operand is rounded to TF32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Product {
    pub batch: usize,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Matrix,
    pub b: Matrix,
    pub c: Matrix,
    pub plus: Option<Matrix>,
}
