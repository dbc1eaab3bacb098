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
use std::ops::Range;

/// Elements of a register: 2 KiB, so that a dozen registers fit in L1.
const BLOCK: usize = 512;
/// Operands of most maps, and registers: those that fusion makes have no more.
const OPERANDS: usize = 16;
const REGISTERS: usize = 96;
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

/// A region with its operands and results bound.
pub(super) struct Region<'a> {
    body: &'a [MapInst],
    outs: &'a [usize],
    /// The first operand of an epilogue: the product.
    product: Option<&'a Arg<'a>>,
    rest: &'a [Arg<'a>],
    /// Behind them: what serves many regions.
    shared: &'a [Arg<'a>],
    ix: Few<Index, OPERANDS>,
    y: &'a [Arg<'a>],
}

/// As many values as there are, without the heap if there are no more than `N`.
struct Few<T, const N: usize> {
    few: [T; N],
    many: Vec<T>,
    len: usize,
}

impl<T: Copy, const N: usize> Few<T, N> {
    fn new(len: usize, filler: T) -> Self {
        let many = if len > N { vec![filler; len] } else { vec![] };
        Self { few: [filler; N], many, len }
    }
    fn all(&mut self) -> &mut [T] {
        if self.len > N { &mut self.many } else { &mut self.few[..self.len] }
    }
    fn at(&self, i: usize) -> T {
        if self.len > N { self.many[i] } else { self.few[i] }
    }
}

impl<'a> Region<'a> {
    /// The operands are `product`, if any, and `rest`.
    pub(super) fn new(
        body: &'a [MapInst],
        outs: &'a [usize],
        product: Option<&'a Arg<'a>>,
        rest: &'a [Arg<'a>],
        y: &'a [Arg<'a>],
    ) -> Self {
        Self::with(body, outs, product, rest, &[], y)
    }

    /// As [`new`](Self::new), with operands behind the rest.
    fn with(
        body: &'a [MapInst],
        outs: &'a [usize],
        product: Option<&'a Arg<'a>>,
        rest: &'a [Arg<'a>],
        shared: &'a [Arg<'a>],
        y: &'a [Arg<'a>],
    ) -> Self {
        let mut ix = Few::new(product.is_some() as usize + rest.len() + shared.len(), Index::Scalar);
        for (ix, x) in ix.all().iter_mut().zip(product.into_iter().chain(rest).chain(shared)) {
            *ix = index(x.shape(), y[0].shape());
        }
        Self { body, outs, product, rest, shared, ix, y }
    }

    fn operands(&self) -> impl Iterator<Item = &'a Arg<'a>> {
        self.product.into_iter().chain(self.rest).chain(self.shared)
    }

    /// The whole region.
    fn run(&self) {
        // Blocks are cut by the size alone, so any number of threads gives the same bits.
        let n = self.y[0].len();
        par::for_blocks(n.div_ceil(BLOCK), TASK, n * self.registers(), |_, start, end| {
            // SAFETY: the operands broadcast to the shape, blocks are disjoint.
            unsafe { self.blocks(start..end) };
        });
    }

    fn registers(&self) -> usize {
        self.ix.len + self.body.len()
    }

    /// Where instruction `k` can write elements `start..start + len` in place of a register: in the result that it
    /// makes, but not where that lies over an operand, which later instructions may read.
    fn direct(&self, k: usize, start: usize, len: usize) -> Option<(usize, *mut f32)> {
        let o = self.outs.iter().position(|&r| r == self.ix.len + k)?;
        let own = self.operands().all(|x| !x.is(&self.y[o]));
        own.then(|| run(&self.y[o], Index::Same, start, len)).flatten().map(|at| (o, at))
    }

    /// Elements `start..start + len`, at most [`BLOCK`].
    ///
    /// # Safety
    /// The region has them, operands that lie in results' memory hold their values, and nobody else touches the results'
    /// elements.
    unsafe fn block(&self, start: usize, len: usize, file: &mut [f32], at: &mut [*mut f32]) {
        let (n, file) = (self.ix.len, file.as_mut_ptr());
        // SAFETY: registers are BLOCK floats apart in the file, or runs of an operand or a result; an instruction reads
        // registers made before it, and results that operands lie in are written at the end.
        unsafe {
            for (k, a) in self.operands().enumerate() {
                let own = file.add(k * BLOCK);
                // A register that leaves as it came must outlive the results' writing.
                let leaves = self.y.iter().zip(self.outs).any(|(y, &r)| r == k && !a.is(y));
                let run = if leaves { None } else { run(a, self.ix.at(k), start, len) };
                at[k] = run.unwrap_or(own);
                if run.is_none() {
                    load(a, self.ix.at(k), start, std::slice::from_raw_parts_mut(own, len));
                }
            }
            for (k, inst) in self.body.iter().enumerate() {
                at[n + k] = self.direct(k, start, len).map_or(file.add((n + k) * BLOCK), |(_, at)| at);
                let arg = |j: usize| match inst.args.get(j) {
                    Some(&r) => std::slice::from_raw_parts(at[r as usize], len),
                    None => &[][..],
                };
                step(inst, [arg(0), arg(1), arg(2)], std::slice::from_raw_parts_mut(at[n + k], len));
            }
            for (o, (out, &r)) in self.y.iter().zip(self.outs).enumerate() {
                let there = match r.checked_sub(n) {
                    Some(k) => self.direct(k, start, len).is_some_and(|(to, _)| to == o),
                    None => self.operands().nth(r).is_some_and(|x| x.is(out)),
                };
                if !there {
                    store(out, start, std::slice::from_raw_parts(at[r], len));
                }
            }
        }
    }

    /// Blocks `blocks` of [`BLOCK`] elements of the whole.
    ///
    /// # Safety
    /// As [`block`](Self::block).
    unsafe fn blocks(&self, blocks: Range<usize>) {
        let n = self.y[0].len();
        self.with_file(|file, at| {
            for start in blocks.map(|b| b * BLOCK) {
                // SAFETY: the caller's promise.
                unsafe { self.block(start, BLOCK.min(n - start), file, at) };
            }
        });
    }

    /// A part of the region seen as a matrix of `n` columns.
    ///
    /// # Safety
    /// As [`block`](Self::block).
    pub(super) unsafe fn part(&self, n: usize, rows: Range<usize>, cols: Range<usize>) {
        self.with_file(|file, at| {
            let mut run = |start: usize, len: usize| {
                for first in (start..start + len).step_by(BLOCK) {
                    // SAFETY: the caller's promise.
                    unsafe { self.block(first, BLOCK.min(start + len - first), file, at) };
                }
            };
            if cols.len() == n {
                return run(rows.start * n, rows.len() * n);
            }
            rows.for_each(|r| run(r * n + cols.start, cols.len()));
        });
    }

    fn with_file(&self, f: impl FnOnce(&mut [f32], &mut [*mut f32])) {
        let mut at = Few::<_, REGISTERS>::new(self.registers(), std::ptr::null_mut());
        par::with_scratch(self.registers() * BLOCK, |file| f(file, at.all()));
    }
}

/// Where elements `start..start + len` lie, if they are neighbours in memory, as floats.
fn run(x: &Arg, ix: Index, start: usize, len: usize) -> Option<*mut f32> {
    if x.ty.dtype != DType::F32 {
        return None;
    }
    let (from, left) = match ix {
        Index::Same => {
            let (_, cols, stride) = x.rows();
            (start / cols * stride + start % cols, cols - start % cols)
        }
        Index::Period(p) => (start % p, p - start % p),
        Index::Scalar | Index::Repeat(_) => return None,
    };
    // SAFETY: inside the operand.
    (len <= left).then(|| unsafe { x.ptr().cast::<f32>().add(from) })
}

impl CpuKernel for FusedMap {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        Region::new(&self.body, &self.outs, None, x, y).run();
        Ok(())
    }
}

impl CpuKernel for MapEach {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let (tensors, shared) = self.split(x);
        for (own, y) in tensors.zip(y.chunks(self.outs.len())) {
            Region::with(&self.body, &self.outs, None, own, shared, y).run();
        }
        Ok(())
    }
}
