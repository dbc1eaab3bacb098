//! How fast a device is: what steps are measured against.

use super::machine::{Machine, Outcome, device};
use rambac_codegen::Program;
use rambac_codegen::program::Step;
use rambac_driver::{BufferId, Device, Error, Float, Matrix, Product, Result};
use rambac_ir::{Bindings, Cost, DType, DimError};

/// Rates that a device reaches in plain work, as its own clock has it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Bytes read and written per second by a large copy.
    pub copy: f64,
    /// FLOP/s of a large product of its library, in f32 and in bf16.
    pub f32: f64,
    pub bf16: f64,
}

/// What a step can't be faster than.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Floor {
    /// Seconds that its FLOPs take, and its bytes.
    pub work: f64,
    pub traffic: f64,
}

impl Floor {
    pub fn seconds(self) -> f64 {
        self.work.max(self.traffic)
    }
    /// What limits it.
    pub fn limit(self) -> &'static str {
        if self.work > self.traffic { "FLOPs" } else { "bytes" }
    }
}

impl Rates {
    /// The floor of a step: its FLOPs at the rate of products in the type of its operands, or its bytes at that of copies.
    pub fn floor(&self, s: &Step, c: &Cost) -> Floor {
        let half = s.inputs.iter().any(|v| matches!(v.ty.dtype, DType::BF16 | DType::F16));
        Floor { work: c.flops / if half { self.bf16 } else { self.f32 }, traffic: c.bytes / self.copy }
    }

    /// Floors of all steps of a program.
    ///
    /// # Errors
    /// A dim without a value.
    pub fn floors(&self, p: &Program, dims: &Bindings) -> std::result::Result<Vec<Floor>, DimError> {
        Ok(p.steps.iter().zip(p.costs(dims)?).map(|(s, c)| self.floor(s, &c)).collect())
    }
}

/// Largest side of a product, and bytes of a copy; both are halved where there is no memory for them.
const SIDE: usize = 8192;
const BYTES: usize = 1 << 30;
/// Runs, of which the shortest counts; the first ones warm up.
const RUNS: usize = 6;

impl<D: Device> Machine<D> {
    /// Measures the device's rates; `None`: it has no clock.
    ///
    /// # Errors
    /// The device fails, or has hardly any memory left.
    pub fn rates(&mut self) -> Outcome<Option<Rates>> {
        rates(&mut self.device).map_err(device("rates of the device", "a measurement"))
    }
}

fn rates<D: Device>(d: &mut D) -> Result<Option<Rates>> {
    d.mark()?;
    if d.laps()?.is_none() {
        return Ok(None);
    }
    let copy = smaller(BYTES, &mut |bytes| {
        with_buffers(d, [bytes, bytes, 0], &mut |d, [a, b, _]| {
            let t = shortest(d, &mut |d| d.copy((a, 0), (b, 0), bytes))?;
            Ok(t.map(|t| 2.0 * bytes as f64 / t))
        })
    })?;
    let mut product = |float: Float| {
        smaller(SIDE, &mut |n| {
            let bytes = n * n * float.bytes();
            with_buffers(d, [bytes; 3], &mut |d, [a, b, c]| {
                fill(d, float, [a, b], bytes)?;
                let matrix = |buffer, trans| Matrix { buffer, at: 0, float, ld: n, step: 0, trans };
                let (a, b, c) = (matrix(a, false), matrix(b, true), matrix(c, false));
                let p = Product { batch: 1, m: n, n, k: n, a, b, c, plus: None };
                let t = shortest(d, &mut |d| d.product(&p))?;
                Ok(t.map(|t| 2.0 * (n as f64).powi(3) / t))
            })
        })
    };
    let (f32, bf16) = (product(Float::F32)?, product(Float::Bf16)?);
    Ok(copy.zip(f32).zip(bf16).map(|((copy, f32), bf16)| Rates { copy, f32, bf16 }))
}

/// `f` of a size, or of a smaller one where memory does not suffice.
fn smaller(size: usize, f: &mut dyn FnMut(usize) -> Result<Option<f64>>) -> Result<Option<f64>> {
    match f(size) {
        Err(Error::OutOfMemory { .. }) if size > 256 => smaller(size / 2, f),
        other => other,
    }
}

fn with_buffers<D: Device>(
    d: &mut D,
    bytes: [usize; 3],
    f: &mut dyn FnMut(&mut D, [BufferId; 3]) -> Result<Option<f64>>,
) -> Result<Option<f64>> {
    let mut all: Vec<BufferId> = vec![];
    let mut made = Ok(());
    for b in bytes {
        made = made.and_then(|()| d.alloc("a measurement", b).map(|b| all.push(b)));
    }
    let result = made.and_then(|()| f(d, [all[0], all[1], all[2]]));
    let freed = all.into_iter().map(|b| d.free(b)).fold(Ok(()), Result::and);
    result.and_then(|r| freed.map(|()| r))
}

/// Numbers in ±1, for a product of zeros takes less power, and is faster than any other.
fn fill<D: Device>(d: &mut D, float: Float, buffers: [BufferId; 2], bytes: usize) -> Result<()> {
    const PIECE: usize = 1 << 20;
    let mut x = 1u32;
    let mut piece = vec![];
    while piece.len() < PIECE.min(bytes) {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // A sign, and an exponent of 2^-8 to 2^-1.
        let v = f32::from_bits(x & 0x807f_ffff | (119 + (x >> 24 & 7)) << 23);
        match float {
            Float::F32 => piece.extend(v.to_le_bytes()),
            Float::Bf16 => piece.extend(half::bf16::from_f32(v).to_le_bytes()),
            Float::F16 => piece.extend(half::f16::from_f32(v).to_le_bytes()),
        }
    }
    for b in buffers {
        d.copy_in(b, 0, &piece)?;
        for at in (PIECE..bytes).step_by(PIECE) {
            d.copy((b, 0), (b, at), PIECE.min(bytes - at))?;
        }
    }
    Ok(())
}

/// Seconds of the shortest of a few runs.
fn shortest<D: Device>(d: &mut D, f: &mut dyn FnMut(&mut D) -> Result<()>) -> Result<Option<f64>> {
    d.mark()?;
    for _ in 0..RUNS {
        f(d)?;
        d.mark()?;
    }
    // The first warms up.
    Ok(d.laps()?.map(|laps| laps[1..].iter().copied().fold(f64::INFINITY, f64::min).max(1e-9)))
}
