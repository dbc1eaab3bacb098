//! Fused elementwise regions: a register machine over blocks that stay in L1.
//!
//! Every register is a block of [`BLOCK`] floats; an instruction is one vectorised loop.  Operands are read once and
//! results written once, whatever the number of instructions.

use super::{Arg, CpuKernel, KernelError, Shaped};
use rambac_cpu::kernels::vmath;
use rambac_cpu::par;
use rambac_cpu::simd::dispatch;
use rambac_ir::DType;
use rambac_ir::ops::*;

/// Elements of a register: 2 KiB, so that a dozen registers fit in L1.
const BLOCK: usize = 512;
/// Operands of most maps: those that fusion makes have no more.
const FEW: usize = 16;
/// Blocks per parallel task.
const TASK: usize = 32;

/// How an operand's index follows from an element's index.
#[derive(Clone, Copy)]
enum Index {
    Same,
    Scalar,
    /// A suffix of the shape: repeats with this period.
    Period(usize),
    /// A prefix of the shape: each element serves this many.
    Repeat(usize),
}

fn index(from: &[usize], to: &[usize]) -> Index {
    let n: usize = to.iter().product();
    let m: usize = from.iter().product();
    if m == n {
        return Index::Same;
    }
    if m == 1 {
        return Index::Scalar;
    }
    let lead = from.iter().take_while(|&&d| d == 1).count();
    if from[lead..] == to[to.len() - (from.len() - lead)..] { Index::Period(m) } else { Index::Repeat(n / m) }
}

/// Fills `out` with elements `start..` of an operand.
///
/// # Safety
/// The operand holds every element the index asks for.
unsafe fn load(x: &Arg, ix: Index, start: usize, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    let at = |i: usize| unsafe {
        match x.ty.dtype {
            DType::Bool => *x.ptr().add(i) as f32,
            _ => *x.ptr().cast::<f32>().add(i),
        }
    };
    let plain = x.ty.dtype == DType::F32;
    let base = x.ptr().cast::<f32>();
    // A run of neighbours in memory.
    let take = |from: usize, to: &mut [f32]| {
        if plain {
            // SAFETY: the run lies inside one row of the operand.
            to.copy_from_slice(unsafe { std::slice::from_raw_parts(base.add(from), to.len()) });
        } else {
            to.iter_mut().enumerate().for_each(|(k, o)| *o = at(from + k));
        }
    };
    match ix {
        Index::Scalar => out.fill(at(0)),
        Index::Same => {
            let (_, cols, stride) = x.rows();
            let mut done = 0;
            while done < out.len() {
                let i = start + done;
                let run = (cols - i % cols).min(out.len() - done);
                let from = i / cols * stride + i % cols;
                take(from, &mut out[done..done + run]);
                done += run;
            }
        }
        Index::Period(p) => {
            let mut done = 0;
            while done < out.len() {
                let from = (start + done) % p;
                let run = (p - from).min(out.len() - done);
                take(from, &mut out[done..done + run]);
                done += run;
            }
        }
        Index::Repeat(r) => {
            let mut done = 0;
            while done < out.len() {
                let i = start + done;
                let run = (r - i % r).min(out.len() - done);
                out[done..done + run].fill(at(i / r));
                done += run;
            }
        }
    }
}

/// Writes a register to elements `start..` of a result.
///
/// # Safety
/// The result holds them and nothing else touches them.
unsafe fn store(y: &Arg, start: usize, from: &[f32]) {
    let (_, cols, stride) = y.rows();
    let mut done = 0;
    while done < from.len() {
        let i = start + done;
        let run = (cols - i % cols).min(from.len() - done);
        let to = i / cols * stride + i % cols;
        // SAFETY: the run lies inside one row.
        unsafe {
            match y.ty.dtype {
                DType::Bool => {
                    let out = std::slice::from_raw_parts_mut(y.ptr().add(to), run);
                    out.iter_mut().zip(&from[done..]).for_each(|(o, v)| *o = (*v != 0.0) as u8);
                }
                _ => std::slice::from_raw_parts_mut(y.ptr().cast::<f32>().add(to), run)
                    .copy_from_slice(&from[done..done + run]),
            }
        }
        done += run;
    }
}

fn unary(f: UnaryFn, x: &[f32], y: &mut [f32]) {
    match f {
        UnaryFn::Neg => vmath::neg(x, y),
        UnaryFn::Exp => vmath::exp(x, y),
        UnaryFn::Log => vmath::log(x, y),
        UnaryFn::Sqrt => vmath::sqrt(x, y),
        UnaryFn::Rsqrt => vmath::rsqrt(x, y),
        UnaryFn::Recip => vmath::recip(x, y),
        UnaryFn::Sigmoid => vmath::sigmoid(x, y),
        UnaryFn::Silu => vmath::silu(x, y),
        UnaryFn::Softplus => vmath::softplus(x, y),
        UnaryFn::Tanh => vmath::tanh(x, y),
        UnaryFn::Relu => vmath::relu(x, y),
        UnaryFn::Abs => vmath::abs(x, y),
        UnaryFn::Square => vmath::square(x, y),
        UnaryFn::Sin => vmath::sin(x, y),
        UnaryFn::Cos => vmath::cos(x, y),
    }
}

fn binary(f: BinaryFn, a: &[f32], b: &[f32], y: &mut [f32]) {
    macro_rules! each {
        ($e:expr) => {
            dispatch(|| y.iter_mut().zip(a.iter().zip(b)).for_each(|(y, (a, b))| *y = $e(*a, *b)))
        };
    }
    match f {
        BinaryFn::Add => each!(|a: f32, b: f32| a + b),
        BinaryFn::Sub => each!(|a: f32, b: f32| a - b),
        BinaryFn::Mul => each!(|a: f32, b: f32| a * b),
        BinaryFn::Div => each!(|a: f32, b: f32| a / b),
        BinaryFn::Max => each!(|a: f32, b: f32| a.max(b)),
        BinaryFn::Min => each!(|a: f32, b: f32| a.min(b)),
        BinaryFn::Lt => each!(|a: f32, b: f32| (a < b) as u8 as f32),
        BinaryFn::Le => each!(|a: f32, b: f32| (a <= b) as u8 as f32),
        BinaryFn::Gt => each!(|a: f32, b: f32| (a > b) as u8 as f32),
        BinaryFn::Ge => each!(|a: f32, b: f32| (a >= b) as u8 as f32),
        BinaryFn::Eq => each!(|a: f32, b: f32| (a == b) as u8 as f32),
        BinaryFn::Ne => each!(|a: f32, b: f32| (a != b) as u8 as f32),
    }
}

fn step(inst: &MapInst, args: [&[f32]; 3], y: &mut [f32]) {
    match inst.f {
        MapFn::Const(c) => y.fill(c as f32),
        MapFn::Unary(f) => unary(f, args[0], y),
        MapFn::Binary(f) => binary(f, args[0], args[1], y),
        MapFn::Where => dispatch(|| {
            for i in 0..y.len() {
                y[i] = if args[0][i] != 0.0 { args[1][i] } else { args[2][i] };
            }
        }),
        MapFn::Cast(DType::Bool) => y.iter_mut().zip(args[0]).for_each(|(y, x)| *y = (*x != 0.0) as u8 as f32),
        MapFn::Cast(DType::I32) => y.iter_mut().zip(args[0]).for_each(|(y, x)| *y = x.trunc()),
        MapFn::Cast(_) => y.copy_from_slice(args[0]),
    }
}

impl CpuKernel for FusedMap {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let n = y[0].len();
        let shape = y[0].shape();
        let (mut few, many): ([Index; FEW], Vec<Index>);
        let of = |a: &Arg| index(a.shape(), shape);
        let ix = if x.len() <= FEW {
            few = [Index::Scalar; FEW];
            few.iter_mut().zip(x).for_each(|(ix, a)| *ix = of(a));
            &few[..]
        } else {
            many = x.iter().map(of).collect();
            &many
        };
        let regs = x.len() + self.body.len();
        // Blocks are cut by the size alone, so any number of threads gives the same bits.
        let work = |blocks: std::ops::Range<usize>, file: &mut [f32]| {
            for b in blocks {
                let start = b * BLOCK;
                let len = BLOCK.min(n - start);
                for (k, a) in x.iter().enumerate() {
                    // SAFETY: the operand broadcasts to the shape.
                    unsafe { load(a, ix[k], start, &mut file[k * BLOCK..k * BLOCK + len]) };
                }
                for (k, inst) in self.body.iter().enumerate() {
                    let (done, rest) = file.split_at_mut((x.len() + k) * BLOCK);
                    let arg = |j: usize| match inst.args.get(j) {
                        Some(&r) => &done[r as usize * BLOCK..][..len],
                        None => &[][..],
                    };
                    step(inst, [arg(0), arg(1), arg(2)], &mut rest[..len]);
                }
                for (out, &r) in y.iter().zip(&self.outs) {
                    // SAFETY: blocks are disjoint; an operand that shares the buffer was read above.
                    unsafe { store(out, start, &file[r * BLOCK..r * BLOCK + len]) };
                }
            }
        };
        let blocks = n.div_ceil(BLOCK);
        par::for_blocks(blocks, TASK, n * regs, |_, start, end| {
            par::with_scratch(regs * BLOCK, |file| work(start..end, file));
        });
        Ok(())
    }
}
