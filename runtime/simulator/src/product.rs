//! Dense products, which programs leave to a vendor's library: here a plain one on this machine's processor.

use crate::check::Kind;
use crate::error::Error;
use crate::memory::GlobalMemory;
use half::{bf16, f16};
use rambac_driver::{Float, Matrix, Product};
use rayon::prelude::*;

/// Where row `i` begins, in bytes.
fn row(x: &Matrix, memory: &GlobalMemory, g: usize, i: usize, cols: usize) -> Result<usize, Error> {
    let b = &memory.buffers[x.buffer.0];
    let at = x.at + (g * x.step + i * x.ld) * x.float.bytes();
    if at + cols * x.float.bytes() <= b.bytes {
        return Ok(at);
    }
    let what = format!("a product reads or writes {} bytes at {at} of {}", cols * x.float.bytes(), b.bytes);
    Err(Error::Product { buffer: b.name.clone(), kind: Kind::OutOfBounds.name(), what })
}

/// `op(matrix g)` of m × n values.
fn read(x: &Matrix, memory: &GlobalMemory, g: usize, m: usize, n: usize) -> Result<Vec<f32>, Error> {
    let b = &memory.buffers[x.buffer.0];
    // As it lies in memory.
    let (rows, cols) = if x.trans { (n, m) } else { (m, n) };
    let width = x.float.bytes();
    let mut out = vec![0f32; m * n];
    let mut bytes = vec![0u8; cols * width];
    for i in 0..rows {
        let at = row(x, memory, g, i, cols)?;
        if let Some(k) = b.written[at..at + bytes.len()].iter().position(|&w| w == 0) {
            let what = format!("a product reads byte {}, which nothing has written", at + k);
            return Err(Error::Product { buffer: b.name.clone(), kind: Kind::Uninitialised.name(), what });
        }
        b.read(at, &mut bytes);
        for (j, e) in bytes.chunks_exact(width).enumerate() {
            let v = match x.float {
                Float::F32 => f32::from_le_bytes([e[0], e[1], e[2], e[3]]),
                Float::Bf16 => bf16::from_le_bytes([e[0], e[1]]).to_f32(),
                Float::F16 => f16::from_le_bytes([e[0], e[1]]).to_f32(),
            };
            out[if x.trans { j * n + i } else { i * n + j }] = v;
        }
    }
    Ok(out)
}

fn write(x: &Matrix, memory: &mut GlobalMemory, g: usize, n: usize, values: &[f32]) -> Result<(), Error> {
    for (i, line) in values.chunks(n.max(1)).enumerate() {
        let at = row(x, memory, g, i, n)?;
        let bytes: Vec<u8> = match x.float {
            Float::F32 => line.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Float::Bf16 => line.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            Float::F16 => line.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        };
        let b = &mut memory.buffers[x.buffer.0];
        if !b.writable {
            let what = "a product writes it".into();
            return Err(Error::Product { buffer: b.name.clone(), kind: Kind::ReadOnlyWrite.name(), what });
        }
        b.write(at, &bytes);
        b.written[at..at + bytes.len()].fill(1);
    }
    Ok(())
}

/// In eight sums, so that one need not wait for the one before it.
fn dot(x: &[f32], y: &[f32]) -> f64 {
    let (xs, ys) = (x.as_chunks::<8>(), y.as_chunks::<8>());
    let mut sums = [0f64; 8];
    for (x, y) in xs.0.iter().zip(ys.0) {
        for ((s, &x), &y) in sums.iter_mut().zip(x).zip(y) {
            *s += f64::from(x) * f64::from(y);
        }
    }
    let rest: f64 = xs.1.iter().zip(ys.1).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
    sums.iter().sum::<f64>() + rest
}

/// Runs `p`.
pub(crate) fn run(memory: &mut GlobalMemory, p: &Product) -> Result<(), Error> {
    for g in 0..p.batch {
        let a = read(&p.a, memory, g, p.m, p.k)?;
        // Rows of b's columns, so that both run along k.
        let b = read(&Matrix { trans: !p.b.trans, ..p.b }, memory, g, p.n, p.k)?;
        let mut c = match &p.plus {
            Some(x) => read(x, memory, g, p.m, p.n)?,
            None => vec![0f32; p.m * p.n],
        };
        c.par_chunks_mut(p.n.max(1)).enumerate().for_each(|(i, row)| {
            let x = &a[i * p.k..][..p.k];
            for (j, c) in row.iter_mut().enumerate() {
                *c = (f64::from(*c) + dot(x, &b[j * p.k..][..p.k])) as f32;
            }
        });
        write(&p.c, memory, g, p.n, &c)?;
    }
    Ok(())
}
