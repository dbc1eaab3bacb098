//! A program at given sizes and addresses: launches and products with all their arguments, ready to be started.

use super::error::GpuError;
use rambac_codegen::cuda::{Arch, Call, Expr, Form, Gemm, GemmOperand, GpuProgram, Launch, Operand, Param};
use rambac_codegen::{BufferKind, View};
use rambac_driver::{Arg, BufferId, Extent, Float, Matrix, Product, Tensor};
use rambac_ir::ops::Op;
use rambac_ir::ty::ConcreteTy;
use rambac_ir::{Bindings, DType, DimError};

/// A buffer on the device and the first byte that is meant.
pub type Place = (BufferId, usize);

/// Something to start, and the step it belongs to.
pub struct Work {
    pub step: usize,
    pub what: What,
}

pub enum What {
    /// Of the program's kernel with this number.
    Launch(usize, Extent, Vec<Arg>),
    Product(Product),
}

impl Work {
    /// `step 3 (rms_norm), kernel rms_norm_f32_64`
    pub fn describe(&self, gpu: &GpuProgram) -> String {
        let op = gpu.program.steps[self.step].op.mnemonic();
        let what = match &self.what {
            What::Launch(k, ..) => format!("kernel {}", gpu.kernels[*k].name),
            What::Product(p) => format!("a product {}×{}×{}", p.m, p.n, p.k),
        };
        format!("step {} ({op}), {what}", self.step)
    }
}

/// See the module's comment.
pub struct Bound {
    pub work: Vec<Work>,
    /// As many as the program has outputs that are no updates.
    pub outputs: Vec<(ConcreteTy, Place)>,
    /// Where the host may have to bring what lies in pages, in order.
    pub stops: Vec<Stop>,
}

/// A step that reads pages which may not be on the device.
pub enum Stop {
    /// This work looks through landmarks: once per part of them.
    Landmarks { work: usize },
    /// From this work on chunks are attended to: i32 `[N, L, h, K]` and, of each row, how many of these `[N, L, h]`.
    Choice { work: usize, indices: (ConcreteTy, Place), count: (ConcreteTy, Place) },
}

/// Where the operands of a program are.
pub struct Places<'a> {
    /// As many as the program has buffers; those that nothing uses have none.
    pub buffers: &'a [Option<Place>],
    /// Of every step, as its form counts them.
    pub workspace: &'a [Vec<Place>],
}

/// Evaluates every size and address.
///
/// # Errors
/// An argument that overflows, a grid that no device takes.
pub fn bind(gpu: &GpuProgram, forms: &[&Form], dims: &Bindings, at: &Places) -> Result<Bound, GpuError> {
    let p = &gpu.program;
    let of = |v: &View| -> Result<Place, DimError> {
        let (buffer, first) = at.buffers[v.buffer.index()].expect("BUG: the plan has a place for every buffer in use");
        Ok((buffer, first + v.offset.eval(dims)? * v.ty.dtype.size()))
    };
    let (mut work, mut stops) = (vec![], vec![]);
    // Several steps attend to one choice.
    let mut known: Option<Place> = None;
    for (step, form) in forms.iter().enumerate() {
        let s = &p.steps[step];
        match &s.op {
            Op::Selection(_) => {
                known = None;
                if s.inputs.len() > 3 {
                    stops.push(Stop::Landmarks { work: work.len() });
                }
            }
            Op::ChunkAttention(_) if s.inputs.len() > 6 && known != Some(of(&s.inputs[3])?) => {
                let operand = |i: usize| Ok::<_, DimError>((s.inputs[i].ty.bind(dims)?, of(&s.inputs[i])?));
                let (indices, count) = (operand(3)?, operand(4)?);
                known = Some(indices.1);
                stops.push(Stop::Choice { work: work.len(), indices, count });
            }
            _ => {}
        }
        let place = |o: Operand| match o {
            Operand::Input(k) => of(&s.inputs[k]),
            Operand::Output(k) => of(&s.outputs[k]),
            Operand::Workspace(k) => Ok(at.workspace[step][k]),
        };
        for c in &form.calls {
            let what = match c {
                Call::Gemm(g) => What::Product(product(g, dims, &place)?),
                Call::Launch(l) => {
                    let e = extent(gpu, step, l, dims)?;
                    // A grid without blocks has nothing to do.
                    if e.grid.contains(&0) {
                        continue;
                    }
                    let early = gpu.target.arch == Arch::Sm90a && !work.is_empty() && may_begin(gpu, step, &l.ahead);
                    let kernel = gpu.kernels.iter().position(|k| k.name == l.kernel.name);
                    What::Launch(
                        kernel.expect("BUG: `emit` lists every kernel"),
                        Extent { early, ..e },
                        arguments(l, dims, &place)?,
                    )
                }
            };
            work.push(Work { step, what });
        }
    }
    let outputs = p.outputs.iter().filter(|o| !o.update);
    let outputs = outputs.map(|o| Ok((o.view.ty.bind(dims)?, of(&o.view)?))).collect::<Result<_, DimError>>()?;
    Ok(Bound { work, outputs, stops })
}

/// Whether no step before this one writes what the launch reads before it waits.  The first launch of a run never begins early, so
/// what other runs write is there.
fn may_begin(gpu: &GpuProgram, step: usize, ahead: &[Operand]) -> bool {
    let p = &gpu.program;
    let view = |o: &Operand| match *o {
        Operand::Input(k) => p.steps[step].inputs.get(k),
        Operand::Output(k) => p.steps[step].outputs.get(k),
        Operand::Workspace(_) => None,
    };
    let arena = |v: &View| matches!(p.buffers[v.buffer.index()].kind, BufferKind::Arena);
    let written = |v: &View| p.steps[..step].iter().any(|s| s.outputs.iter().any(|o| o.buffer == v.buffer));
    ahead.iter().all(|o| view(o).is_some_and(|v| !arena(v) && !written(v)))
}

fn extent(gpu: &GpuProgram, step: usize, l: &Launch, dims: &Bindings) -> Result<Extent, GpuError> {
    const MOST: [usize; 3] = [(1 << 31) - 1, 65535, 65535];
    let mut grid = [0u32; 3];
    for (k, e) in l.grid.iter().enumerate() {
        let value = e.eval(dims)?;
        if value > MOST[k] {
            let what = ["its grid along x", "its grid along y", "its grid along z"][k];
            let (program, op) = (gpu.program.name.clone(), gpu.program.steps[step].op.mnemonic());
            return Err(GpuError::TooLarge { program, step, op, what, value, most: MOST[k] });
        }
        grid[k] = value as u32;
    }
    Ok(Extent { grid, block: [l.kernel.threads, 1, 1], cluster: [1; 3], shared: l.kernel.shared, early: false })
}

fn arguments(
    l: &Launch,
    dims: &Bindings,
    place: &impl Fn(Operand) -> Result<Place, DimError>,
) -> Result<Vec<Arg>, DimError> {
    l.params.iter().map(|p| argument(p, dims, place)).collect()
}

fn argument(p: &Param, dims: &Bindings, place: &impl Fn(Operand) -> Result<Place, DimError>) -> Result<Arg, DimError> {
    let overflow = |e: &Expr| DimError::Overflow { dim: e.to_string(), bindings: dims.to_string() };
    Ok(match p {
        Param::Address(o) => {
            let (b, at) = place(*o)?;
            Arg::Buffer(b, at as u64)
        }
        Param::Element { at, dtype, first } => {
            let (b, from) = place(*at)?;
            Arg::Buffer(b, (from + first.eval(dims)? * dtype.size()) as u64)
        }
        Param::Int(e) => i32::try_from(e.eval(dims)?).map_err(|_| overflow(e))?.into(),
        Param::Long(e) => i64::try_from(e.eval(dims)?).map_err(|_| overflow(e))?.into(),
        Param::Float(v) => (*v).into(),
        Param::Tensor(t) => {
            let (buffer, from) = place(t.at)?;
            let all = |of: &[Expr]| of.iter().map(|e| e.eval(dims)).collect::<Result<Vec<_>, _>>();
            Arg::Tensor(Tensor {
                buffer,
                at: (from + t.first.eval(dims)? * t.dtype.size()) as u64,
                float: float(t.dtype),
                dims: all(&t.dims)?,
                strides: all(&t.strides)?,
                tile: t.tile.clone(),
            })
        }
        Param::Table(words) => Arg::Table(words.iter().map(|w| argument(w, dims, place)).collect::<Result<_, _>>()?),
    })
}

/// What devices call a float type.
fn float(t: DType) -> Float {
    match t {
        DType::BF16 => Float::Bf16,
        DType::F16 => Float::F16,
        DType::F32 => Float::F32,
        other => unreachable!("BUG: {other} is no float"),
    }
}

fn product(
    g: &Gemm,
    dims: &Bindings,
    place: &impl Fn(Operand) -> Result<Place, DimError>,
) -> Result<Product, DimError> {
    let matrix = |o: &GemmOperand| -> Result<Matrix, DimError> {
        let (buffer, at) = place(o.at)?;
        let at = at + o.first.eval(dims)? * o.dtype.size();
        Ok(Matrix { buffer, at, float: float(o.dtype), ld: o.ld.eval(dims)?, step: o.step.eval(dims)?, trans: o.trans })
    };
    Ok(Product {
        batch: g.batch.eval(dims)?,
        m: g.m.eval(dims)?,
        n: g.n.eval(dims)?,
        k: g.k.eval(dims)?,
        a: matrix(&g.a)?,
        b: matrix(&g.b)?,
        c: matrix(&g.c)?,
        plus: g.plus.as_ref().map(matrix).transpose()?,
    })
}

/// The name of a buffer: what makes it.
pub fn label(gpu: &GpuProgram, buffer: usize) -> String {
    let p = &gpu.program;
    let made = p.steps.iter().position(|s| s.outputs.iter().any(|v| v.buffer.index() == buffer));
    match made {
        Some(i) => format!("%{} of step {i} ({})", p.steps[i].node.index(), p.steps[i].op.mnemonic()),
        None => format!("buffer {buffer}"),
    }
}
