//! Runs a GPU program step by step.
//!
//! Params and states stay on the device; a run copies inputs in and outputs out.  Activations lie in one arena at the
//! plan's addresses, or, to see accesses that leave their buffer, each in memory of its own.

use super::bytes::Bytes;
use super::code::Code;
use rambac_codegen::cuda::{Call, Expr, Form, Gemm, GemmOperand, GpuProgram, Launch, Operand, Param};
use rambac_codegen::{BufferKind, MemoryPlan, View};
use rambac_ir::ops::SourceKind;
use rambac_ir::ty::ConcreteTy;
use rambac_ir::{Bindings, DType, DimError};
use rambac_simulator::device::{Arg, BufferId, Device, Extent, ModuleId};
use rambac_simulator::product::{Float, Matrix, Product};
use std::collections::HashMap;
use std::sync::Arc;

/// Where activations lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// At the plan's addresses in one piece of memory.
    Arena,
    /// Each in memory of its own: a simulator then sees every access that leaves its buffer, and every value that is read
    /// before it was written.
    Apart,
}

/// Why a run failed.
#[derive(Debug, thiserror::Error)]
pub enum GpuError<E: std::error::Error> {
    #[error(transparent)]
    Dim(#[from] DimError),
    #[error("{kind} \"{name}\" ({expected}) was not given to program {program}")]
    Missing { program: String, kind: &'static str, name: String, expected: String },
    #[error("{kind} \"{name}\" of program {program} must be {expected}, but {found} was given")]
    Wrong { program: String, kind: &'static str, name: String, expected: String, found: String },
    #[error("{program} has no compiled kernel {kernel}; compile it again for this target")]
    NoCode { program: String, kernel: String },
    #[error("{program}: {what}: {error}")]
    Device { program: String, what: String, error: E },
    #[error("{program}: step {step} ({op}) can't be launched: {what} is {value}, more than {most}; use smaller sizes")]
    TooLarge { program: String, step: usize, op: &'static str, what: &'static str, value: usize, most: usize },
}

/// A buffer on the device and the first byte that is meant.
type Place = (BufferId, usize);

/// A GPU program with its device.
pub struct GpuExecutor<D: Device> {
    pub device: D,
    program: Arc<GpuProgram>,
    placement: Placement,
    modules: HashMap<String, ModuleId>,
    /// Params and states.
    sources: HashMap<String, (ConcreteTy, BufferId)>,
    /// The arena and its size.
    arena: Option<(BufferId, usize)>,
}

type Outcome<T, D> = Result<T, GpuError<<D as Device>::Error>>;

impl<D: Device> GpuExecutor<D>
where
    D::Error: std::error::Error,
{
    /// Loads a program's kernels.
    ///
    /// # Errors
    /// A kernel is missing in `code`, or the device does not take it.
    pub fn new(mut device: D, program: Arc<GpuProgram>, code: &Code, placement: Placement) -> Outcome<Self, D> {
        let name = || program.program.name.clone();
        let mut modules = HashMap::new();
        for k in &program.kernels {
            let c = code.0.get(&k.name).ok_or_else(|| GpuError::NoCode { program: name(), kernel: k.name.clone() })?;
            let failed = |error| GpuError::Device { program: name(), what: format!("kernel {}", k.name), error };
            modules.insert(k.name.clone(), device.load(&c.ptx).map_err(failed)?);
        }
        Ok(Self { device, program, placement, modules, sources: HashMap::new(), arena: None })
    }

    pub fn program(&self) -> &GpuProgram {
        &self.program
    }

    fn name(&self) -> String {
        self.program.program.name.clone()
    }

    fn failed(&self, what: impl Into<String>) -> impl FnOnce(D::Error) -> GpuError<D::Error> {
        let (program, what) = (self.name(), what.into());
        move |error| GpuError::Device { program, what, error }
    }

    /// Gives a param or a state its value.
    ///
    /// # Errors
    /// The device has no memory left.
    pub fn set(&mut self, name: &str, value: &Bytes) -> Outcome<(), D> {
        let buffer = match self.sources.get(name) {
            Some((ty, b)) if *ty == value.ty => *b,
            old => {
                let old = old.map(|(_, b)| *b);
                if let Some(b) = old {
                    self.device.free(b).map_err(self.failed(name))?;
                }
                let b = self.device.alloc(name, value.data.len()).map_err(self.failed(name))?;
                self.sources.insert(name.into(), (value.ty.clone(), b));
                b
            }
        };
        self.device.copy_in(buffer, 0, &value.data).map_err(self.failed(name))
    }

    /// The value of a param or a state; `None` if it was never set.
    ///
    /// # Errors
    /// The device fails.
    pub fn get(&mut self, name: &str) -> Outcome<Option<Bytes>, D> {
        let Some((ty, buffer)) = self.sources.get(name).cloned() else { return Ok(None) };
        let mut data = vec![0; ty.bytes()];
        self.device.copy_out(buffer, 0, &mut data).map_err(self.failed(name))?;
        Ok(Some(Bytes { ty, data }))
    }

    /// Runs once: reads `inputs`, updates params and states, returns the other outputs in order.
    ///
    /// # Errors
    /// See [`GpuError`].  Params and states may be half updated after an error of the device or an argument that
    /// overflows, not after any other.
    pub fn run(&mut self, dims: &Bindings, inputs: &[(&str, &Bytes)]) -> Outcome<Vec<(String, Bytes)>, D> {
        let mut temporary = vec![];
        let result = self.run_with(dims, inputs, &mut temporary);
        let mut freed = Ok(());
        for b in temporary {
            freed = freed.and(self.device.free(b).map_err(self.failed("free")));
        }
        result.and_then(|out| freed.map(|()| out))
    }

    fn run_with(
        &mut self,
        dims: &Bindings,
        inputs: &[(&str, &Bytes)],
        temporary: &mut Vec<BufferId>,
    ) -> Outcome<Vec<(String, Bytes)>, D> {
        let gpu = self.program.clone();
        let p = &gpu.program;
        let plan = gpu.plan(dims)?;
        let forms = gpu.forms(dims)?;
        let mut places: Vec<Option<Place>> = vec![None; p.buffers.len()];
        for slot in &p.sources {
            let expected = slot.ty.bind(dims)?;
            let kind = match slot.kind {
                SourceKind::Input => "input",
                SourceKind::Param => "param",
                SourceKind::State => "state",
            };
            let found = match slot.kind {
                SourceKind::Input => inputs.iter().find(|(n, _)| *n == slot.name).map(|(_, b)| b.ty.clone()),
                _ => self.sources.get(&slot.name).map(|(ty, _)| ty.clone()),
            };
            let (program, name) = (p.name.clone(), slot.name.clone());
            let Some(found) = found else {
                return Err(GpuError::Missing { program, kind, name, expected: expected.to_string() });
            };
            if found != expected {
                let (expected, found) = (expected.to_string(), found.to_string());
                return Err(GpuError::Wrong { program, kind, name, expected, found });
            }
            let buffer = match slot.kind {
                SourceKind::Input => {
                    let (_, v) = inputs.iter().find(|(n, _)| *n == slot.name).expect("BUG: found above");
                    let b = self.device.alloc(&slot.name, v.data.len()).map_err(self.failed(&slot.name))?;
                    temporary.push(b);
                    self.device.copy_in(b, 0, &v.data).map_err(self.failed(&slot.name))?;
                    b
                }
                _ => self.sources[&slot.name].1,
            };
            places[slot.buffer.index()] = Some((buffer, 0));
        }
        self.place_activations(&plan, dims, &mut places, temporary)?;
        for (i, form) in forms.iter().enumerate() {
            form.launches().try_for_each(|l| self.extent(i, l, dims).map(drop))?;
        }
        for (i, form) in forms.iter().enumerate() {
            self.step(i, form, plan.scratch[i].0, dims, &places)?;
        }
        self.device.synchronise().map_err(self.failed("synchronise"))?;
        let mut out = vec![];
        for o in p.outputs.iter().filter(|o| !o.update) {
            let ty = o.view.ty.bind(dims)?;
            let (buffer, at) = self.place(&o.view, dims, &places)?;
            let mut data = vec![0; ty.bytes()];
            self.device.copy_out(buffer, at, &mut data).map_err(self.failed(&o.name))?;
            out.push((o.name.clone(), Bytes { ty, data }));
        }
        Ok(out)
    }

    fn place_activations(
        &mut self,
        plan: &MemoryPlan,
        dims: &Bindings,
        places: &mut [Option<Place>],
        temporary: &mut Vec<BufferId>,
    ) -> Outcome<(), D> {
        let gpu = self.program.clone();
        if self.placement == Placement::Arena && self.arena.is_none_or(|(_, size)| size < plan.arena) {
            if let Some((old, _)) = self.arena.take() {
                self.device.free(old).map_err(self.failed("the arena"))?;
            }
            let b = self.device.alloc("arena", plan.arena).map_err(self.failed("the arena"))?;
            self.arena = Some((b, plan.arena));
        }
        for (i, b) in gpu.program.buffers.iter().enumerate() {
            if b.kind != BufferKind::Arena {
                continue;
            }
            places[i] = match (self.placement, plan.offsets[i]) {
                (_, None) => None,
                (Placement::Arena, Some(offset)) => self.arena.map(|(b, _)| (b, offset)),
                (Placement::Apart, Some(_)) => {
                    let name = label(&gpu, i);
                    let bytes = b.ty.bind(dims)?.bytes();
                    let b = self.device.alloc(&name, bytes).map_err(self.failed(name))?;
                    temporary.push(b);
                    Some((b, 0))
                }
            };
        }
        Ok(())
    }

    fn place(&self, v: &View, dims: &Bindings, places: &[Option<Place>]) -> Outcome<Place, D> {
        let (buffer, at) = places[v.buffer.index()].expect("BUG: the plan has a place for every buffer that is used");
        Ok((buffer, at + v.offset.eval(dims)? * v.ty.dtype.size()))
    }

    fn step(
        &mut self,
        i: usize,
        form: &Form,
        scratch: usize,
        dims: &Bindings,
        places: &[Option<Place>],
    ) -> Outcome<(), D> {
        let gpu = self.program.clone();
        let step = &gpu.program.steps[i];
        let mut workspace: Vec<Place> = vec![];
        for (w, at) in form.workspace.iter().zip(form.workspace_places(dims)?.0) {
            workspace.push(match (self.placement, self.arena) {
                (Placement::Arena, Some((arena, _))) => (arena, scratch + at),
                _ => {
                    let bytes = w.elements.eval(dims)? * w.dtype.size();
                    (self.device.alloc(w.name, bytes).map_err(self.failed(w.name))?, 0)
                }
            });
        }
        let place = |o: Operand| match o {
            Operand::Input(k) => self.place(&step.inputs[k], dims, places),
            Operand::Output(k) => self.place(&step.outputs[k], dims, places),
            Operand::Workspace(k) => Ok(workspace[k]),
        };
        let mut work = vec![];
        for c in &form.calls {
            work.push(match c {
                Call::Launch(l) => Work::Launch(l, self.extent(i, l, dims)?, arguments(l, dims, &place)?),
                Call::Gemm(g) => Work::Product(product(g, dims, &place)?),
            });
        }
        for w in work {
            match w {
                // A grid without blocks has nothing to do.
                Work::Launch(_, e, _) if e.grid.contains(&0) => {}
                Work::Launch(l, extent, args) => {
                    let module = self.modules[&l.kernel.name];
                    let what = format!("step {i} ({}), kernel {}", step.op.mnemonic(), l.kernel.name);
                    self.device.launch(module, &l.kernel.name, extent, &args).map_err(self.failed(what))?;
                }
                Work::Product(p) => {
                    let what = format!("step {i} ({}), {}×{}×{}", step.op.mnemonic(), p.m, p.n, p.k);
                    self.device.product(&p).map_err(self.failed(what))?;
                }
            }
        }
        if self.placement == Placement::Apart {
            for (b, _) in workspace {
                self.device.free(b).map_err(self.failed("workspace"))?;
            }
        }
        Ok(())
    }

    fn extent(&self, i: usize, l: &Launch, dims: &Bindings) -> Outcome<Extent, D> {
        const MOST: [usize; 3] = [(1 << 31) - 1, 65535, 65535];
        let mut grid = [0u32; 3];
        for (k, e) in l.grid.iter().enumerate() {
            let value = e.eval(dims)?;
            if value > MOST[k] {
                let what = ["its grid along x", "its grid along y", "its grid along z"][k];
                let op = self.program.program.steps[i].op.mnemonic();
                return Err(GpuError::TooLarge { program: self.name(), step: i, op, what, value, most: MOST[k] });
            }
            grid[k] = value as u32;
        }
        Ok(Extent { grid, block: [l.kernel.threads, 1, 1], cluster: [1; 3], shared: l.kernel.shared })
    }
}

enum Work<'a> {
    Launch(&'a Launch, Extent, Vec<Arg>),
    Product(Product),
}

/// The name of a buffer: what makes it.
fn label(gpu: &GpuProgram, buffer: usize) -> String {
    let p = &gpu.program;
    let made = p.steps.iter().position(|s| s.outputs.iter().any(|v| v.buffer.index() == buffer));
    match made {
        Some(i) => format!("%{} of step {i} ({})", p.steps[i].node.index(), p.steps[i].op.mnemonic()),
        None => format!("buffer {buffer}"),
    }
}

fn arguments<E: std::error::Error>(
    l: &Launch,
    dims: &Bindings,
    place: &impl Fn(Operand) -> Result<Place, GpuError<E>>,
) -> Result<Vec<Arg>, GpuError<E>> {
    let overflow = |e: &Expr| DimError::Overflow { dim: e.to_string(), bindings: dims.to_string() };
    l.params
        .iter()
        .map(|p| {
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
            })
        })
        .collect()
}

fn product<E: std::error::Error>(
    g: &Gemm,
    dims: &Bindings,
    place: &impl Fn(Operand) -> Result<Place, GpuError<E>>,
) -> Result<Product, GpuError<E>> {
    let matrix = |o: &GemmOperand| -> Result<Matrix, GpuError<E>> {
        let (buffer, at) = place(o.at)?;
        let at = at + o.first.eval(dims)? * o.dtype.size();
        let float = match o.dtype {
            DType::BF16 => Float::Bf16,
            DType::F16 => Float::F16,
            _ => Float::F32,
        };
        Ok(Matrix { buffer, at, float, ld: o.ld.eval(dims)?, step: o.step.eval(dims)?, trans: o.trans })
    };
    Ok(Product {
        batch: g.batch.eval(dims)?,
        m: g.m.eval(dims)?,
        n: g.n.eval(dims)?,
        k: g.k.eval(dims)?,
        a: matrix(&g.a)?,
        b: matrix(&g.b)?,
        c: matrix(&g.c)?,
        add: g.add,
    })
}
