//! Dense products, which programs leave to a vendor's library: here a plain one on this machine's processor.

use crate::check::Kind;
use crate::device::BufferId;
use crate::error::Error;
use crate::memory::GlobalMemory;
use half::{bf16, f16};
use rayon::prelude::*;

/// A float format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    pub buffer: BufferId,
    pub at: usize,
    pub float: Float,
    pub ld: usize,
    pub step: usize,
    /// Taken as (j, i).
    pub trans: bool,
}

/// `c[g] = op(a[g]) · op(b[g])` with sums in f32 or better; `add`: plus what `c` held.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    pub batch: usize,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Matrix,
    pub b: Matrix,
    pub c: Matrix,
    pub add: bool,
}

impl Matrix {
    /// Rows of a matrix as it lies in memory.
    fn rows(&self, m: usize, n: usize) -> (usize, usize) {
        if self.trans { (n, m) } else { (m, n) }
    }

    /// Where row `i` begins, in bytes.
    fn row(&self, memory: &GlobalMemory, g: usize, i: usize, cols: usize) -> Result<usize, Error> {
        let b = &memory.buffers[self.buffer.0];
        let at = self.at + (g * self.step + i * self.ld) * self.float.bytes();
        if at + cols * self.float.bytes() <= b.bytes {
            return Ok(at);
        }
        let what = format!("a product reads or writes {} bytes at {at} of {}", cols * self.float.bytes(), b.bytes);
        Err(Error::Product { buffer: b.name.clone(), kind: Kind::OutOfBounds.name(), what })
    }

    /// `op(matrix g)` of m × n values.
    fn read(&self, memory: &GlobalMemory, g: usize, m: usize, n: usize) -> Result<Vec<f32>, Error> {
        let b = &memory.buffers[self.buffer.0];
        let (rows, cols) = self.rows(m, n);
        let width = self.float.bytes();
        let mut out = vec![0f32; m * n];
        let mut bytes = vec![0u8; cols * width];
        for i in 0..rows {
            let at = self.row(memory, g, i, cols)?;
            if let Some(k) = b.written[at..at + bytes.len()].iter().position(|&w| w == 0) {
                let what = format!("a product reads byte {}, which nothing has written", at + k);
                return Err(Error::Product { buffer: b.name.clone(), kind: Kind::Uninitialised.name(), what });
            }
            b.read(at, &mut bytes);
            for (j, e) in bytes.chunks_exact(width).enumerate() {
                let v = match self.float {
                    Float::F32 => f32::from_le_bytes([e[0], e[1], e[2], e[3]]),
                    Float::Bf16 => bf16::from_le_bytes([e[0], e[1]]).to_f32(),
                    Float::F16 => f16::from_le_bytes([e[0], e[1]]).to_f32(),
                };
                out[if self.trans { j * n + i } else { i * n + j }] = v;
            }
        }
        Ok(out)
    }

    fn write(&self, memory: &mut GlobalMemory, g: usize, n: usize, values: &[f32]) -> Result<(), Error> {
        for (i, row) in values.chunks(n.max(1)).enumerate() {
            let at = self.row(memory, g, i, n)?;
            let bytes: Vec<u8> = match self.float {
                Float::F32 => row.iter().flat_map(|v| v.to_le_bytes()).collect(),
                Float::Bf16 => row.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
                Float::F16 => row.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            };
            let b = &mut memory.buffers[self.buffer.0];
            if !b.writable {
                let what = "a product writes it".into();
                return Err(Error::Product { buffer: b.name.clone(), kind: Kind::ReadOnlyWrite.name(), what });
            }
            b.write(at, &bytes);
            b.written[at..at + bytes.len()].fill(1);
        }
        Ok(())
    }
}

/// Runs `p`.
pub(crate) fn run(memory: &mut GlobalMemory, p: &Product) -> Result<(), Error> {
    for g in 0..p.batch {
        let a = p.a.read(memory, g, p.m, p.k)?;
        // Rows of b's columns, so that both run along k.
        let b = Matrix { trans: !p.b.trans, ..p.b }.read(memory, g, p.n, p.k)?;
        let mut c = if p.add { p.c.read(memory, g, p.m, p.n)? } else { vec![0f32; p.m * p.n] };
        c.par_chunks_mut(p.n.max(1)).enumerate().for_each(|(i, row)| {
            let x = &a[i * p.k..][..p.k];
            for (j, c) in row.iter_mut().enumerate() {
                let sum: f64 = x.iter().zip(&b[j * p.k..][..p.k]).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
                *c = (f64::from(*c) + sum) as f32;
            }
        });
        p.c.write(memory, g, p.n, &c)?;
    }
    Ok(())
}
