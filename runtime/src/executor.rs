//! Runs a Program on the CPU.
//!
//! Dims are bound once per binding: the plan, the addresses and the shapes are kept, so that a run only resolves
//! pointers and calls kernels.  The arena is allocated once and grows to the largest plan it has served.

use crate::cpu::{Arg, KernelError, run_kernel, scratch};
use crate::store::Store;
use crate::tensor::{Tensor, TensorRef};
use memmap2::MmapMut;
use rambac_codegen::plan::ALIGN;
use rambac_codegen::program::{OutputSlot, SourceSlot};
use rambac_codegen::traits::{kernel_traits, reads_bf16};
use rambac_codegen::{BufferId, BufferKind, MemoryPlan, Program, Step, View, plan};
use rambac_cpu::{ChunkRows, par};
use rambac_ir::ops::{MatMul, MatMulMap, Op, SourceKind};
use rambac_ir::ty::ConcreteTy;
use rambac_ir::{Bindings, DType, DimError, Ty};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Why a run failed.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    #[error(transparent)]
    Dim(#[from] DimError),
    #[error("{kind} \"{name}\" ({expected}) was not given to program {program}")]
    Missing { program: String, kind: &'static str, name: String, expected: String },
    #[error("{kind} \"{name}\" of program {program} must be {expected}, but {found} was given")]
    Wrong { program: String, kind: &'static str, name: String, expected: String, found: String },
    #[error("{program}: step {step} ({op}): {error}")]
    Kernel { program: String, step: usize, op: &'static str, error: KernelError },
    #[error(
        "{program}: step {step} ({op}) works on {ty}; the CPU computes in f32 and knows bf16 only as the stored form of \
         weights: cast to f32 before it"
    )]
    Half { program: String, step: usize, op: &'static str, ty: String },
    #[error("{program}: input \"{name}\" was given in pages, but {op} reads it as an array")]
    Paged { program: String, name: String, op: &'static str },
    #[error(
        "{program} needs {} MiB for activations at {dims}, which this machine did not give; use a shorter length, a \
         smaller batch or --memory-limit", need >> 20
    )]
    OutOfMemory { program: String, need: usize, dims: String },
}

/// Memory for activations and scratch, straight from the system: pages that nothing touches cost nothing.
#[derive(Default)]
struct Arena(Option<MmapMut>);

impl Arena {
    /// At least `size` bytes; contents are lost on growth.
    fn reserve(&mut self, size: usize) -> bool {
        if size <= self.0.as_ref().map_or(0, |m| m.len()) {
            return true;
        }
        self.0 = None;
        let Ok(memory) = MmapMut::map_anon(size) else { return false };
        // Fewer faults at first and fewer misses of the address cache after; where the system refuses, all goes on.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        self.0 = Some(memory);
        true
    }
    /// Its first byte, on a page; of an empty arena an address that is only aligned.
    fn base(&mut self) -> *mut u8 {
        self.0.as_mut().map_or(std::ptr::without_provenance_mut(ALIGN), |m| m.as_mut_ptr())
    }
}

/// A view with its dims bound.
#[derive(Clone, Debug)]
struct BoundView {
    buffer: usize,
    offset: usize,
    ty: ConcreteTy,
    strided: Option<(usize, usize)>,
}

/// FLOPs of a step, on average, up to which waking threads for each step would cost more than it gives.
const SHORT_STEP: f64 = 2e7;

struct Bound {
    /// Many short steps: the pool's threads stay awake for the run.
    short: bool,
    plan: MemoryPlan,
    steps: Vec<(Vec<BoundView>, Vec<BoundView>)>,
    /// Per step of a short program the weights that the next product reads as one stream: buffer and bytes.
    streams: Vec<Option<(usize, usize)>>,
    outputs: Vec<BoundView>,
    sources: Vec<ConcreteTy>,
}

/// First byte of every buffer during one run.
struct Bases<'p> {
    at: Vec<*mut u8>,
    arena: *mut u8,
    /// Inputs that are pages.
    pages: Vec<(usize, &'p dyn ChunkRows)>,
}

impl Default for Bases<'_> {
    fn default() -> Self {
        Self { at: vec![], arena: std::ptr::null_mut(), pages: vec![] }
    }
}

// SAFETY: they point to memory that outlives the run; steps run one after another, and a kernel's tasks touch disjoint
// parts of its results.
unsafe impl Send for Bases<'_> {}
unsafe impl Sync for Bases<'_> {}

impl<'p> Bases<'p> {
    fn arg<'a>(&self, v: &'a BoundView) -> Arg<'a>
    where
        'p: 'a,
    {
        match self.pages.iter().find(|(b, _)| *b == v.buffer) {
            Some((_, pages)) => Arg::paged(&v.ty, *pages),
            None => Arg::new(self.at[v.buffer], v.offset, &v.ty, v.strided),
        }
    }
    /// Runs a step with its scratch, `(offset, bytes)` of the arena.
    fn with_scratch<R>(&self, (at, bytes): (usize, usize), f: impl FnOnce() -> R) -> R {
        // SAFETY: the plan gives these bytes to nothing else that lives during the step.
        unsafe { par::lend(self.arena.add(at).cast(), bytes / size_of::<f32>(), f) }
    }
}

/// See [`Bound::streams`].
fn streams(p: &Program, steps: &[(Vec<BoundView>, Vec<BoundView>)]) -> Vec<Option<(usize, usize)>> {
    let mut next = None;
    let mut all: Vec<_> = p
        .steps
        .iter()
        .zip(steps)
        .rev()
        .map(|(step, (x, _))| {
            let after = next;
            if matches!(
                &step.op,
                Op::MatMul(MatMul { trans_b: true, .. }) | Op::MatMulMap(MatMulMap { trans_b: true, .. })
            ) && let BufferKind::Source(_) = p.buffers[x[1].buffer].kind
                && x[1].offset == 0
                && x[1].strided.is_none()
            {
                next = Some((x[1].buffer, x[1].ty.bytes()));
            }
            after
        })
        .collect();
    all.reverse();
    all
}

/// Time spent per step, for profiles.
pub type StepTimes = Vec<Duration>;

/// Whether a run ends after a step that gave these results.
type Ends<'a> = &'a mut (dyn FnMut(usize, &[Arg]) -> bool + Send);

/// A Program ready to run.
pub struct Executor {
    program: Arc<Program>,
    /// Whether a run replaces the value of each source.
    updated: Arc<[bool]>,
    /// The first step that works on halves and has no kernel for them.
    half: Option<(usize, Ty)>,
    bound: HashMap<Bindings, Arc<Bound>>,
    arena: Arena,
    pool: Arc<rayon::ThreadPool>,
    /// Time of every step since [`record`](Executor::record).
    recorded: Option<StepTimes>,
    /// See [`guard`](Executor::guard): the step, and which of its results.
    guard: Option<(usize, usize)>,
    workspace: Workspace,
}

/// What a run builds, empty between runs: kept for its allocations.
#[derive(Default)]
struct Workspace {
    bases: Bases<'static>,
    x: Vec<Arg<'static>>,
    y: Vec<Arg<'static>>,
}

/// An empty vector with the allocation of `v`: a collection of as many elements of one layout happens in place.
pub(crate) fn emptied<A, B>(mut v: Vec<A>) -> Vec<B> {
    v.clear();
    v.into_iter().map(|_| unreachable!("BUG: the vector is empty")).collect()
}

/// Results of a run by name, in the program's order.
pub type Outputs = Vec<(String, Tensor)>;

impl Executor {
    pub fn new(program: Program, pool: Arc<rayon::ThreadPool>) -> Self {
        let updated =
            program.sources.iter().map(|s| program.outputs.iter().any(|o| o.update && o.name == s.name)).collect();
        let half = half_step(&program);
        par::prepare(&pool);
        Self {
            program: Arc::new(program),
            updated,
            half,
            bound: HashMap::new(),
            arena: Arena::default(),
            pool,
            recorded: None,
            guard: None,
            workspace: Workspace::default(),
        }
    }
    pub fn program(&self) -> &Program {
        &self.program
    }
    /// Gives the arena back; the next run takes it again.
    pub fn rest(&mut self) {
        self.arena = Arena::default();
    }
    /// From now on [`run`](Self::run) adds up the time of every step.
    pub fn record(&mut self) {
        self.recorded = Some(StepTimes::new());
    }
    /// Times since [`record`](Self::record), one per step of the program; none before the first run.
    pub fn recorded(&self) -> &[Duration] {
        self.recorded.as_deref().unwrap_or_default()
    }

    /// From now on a run ends as soon as the scalar `output` is known and is not finite: what comes after it, updates of the
    /// store above all, is not done, and later outputs mean nothing.
    pub fn guard(&mut self, output: &str) {
        let float = |o: &&OutputSlot| o.name == output && o.view.ty.dtype == DType::F32 && o.view.strided.is_none();
        let Some(slot) = self.program.outputs.iter().find(float) else { return };
        let made = |s: &Step| s.outputs.iter().position(|v| *v == slot.view);
        self.guard = self.program.steps.iter().enumerate().rev().find_map(|(i, s)| Some((i, made(s)?)));
    }

    /// Runs until a step gives results of which `found` says so; the step.  The store is updated as far as the run came.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_until(
        &mut self,
        dims: &Bindings,
        inputs: &[(&str, TensorRef)],
        store: &mut Store,
        found: &mut (dyn FnMut(&[Tensor]) -> bool + Send),
    ) -> Result<Option<usize>, ExecError> {
        let mut at = None;
        let mut ends = |i: usize, y: &[Arg]| {
            let all: Vec<Tensor> = y.iter().map(Arg::to_tensor).collect();
            let end = found(&all);
            at = end.then_some(i);
            end
        };
        self.execute(dims, inputs, store, &mut Outputs::new(), None, Some(&mut ends))?;
        Ok(at)
    }

    fn bind(&mut self, dims: &Bindings) -> Result<Arc<Bound>, DimError> {
        if let Some(b) = self.bound.get(dims) {
            return Ok(b.clone());
        }
        let p = &self.program;
        let plan = plan(p, dims, scratch)?;
        let view = |v: &View| -> Result<BoundView, DimError> {
            Ok(BoundView {
                buffer: v.buffer.index(),
                offset: v.offset.eval(dims)?,
                ty: v.ty.bind(dims)?,
                strided: match &v.strided {
                    Some(s) => Some((s.cols.eval(dims)?, s.stride.eval(dims)?)),
                    None => None,
                },
            })
        };
        let views = |vs: &[View]| vs.iter().map(view).collect::<Result<Vec<_>, _>>();
        let steps = p
            .steps
            .iter()
            .map(|s| Ok((views(&s.inputs)?, views(&s.outputs)?)))
            .collect::<Result<Vec<_>, DimError>>()?;
        let outputs = p.outputs.iter().map(|o| view(&o.view)).collect::<Result<_, _>>()?;
        let sources = p.sources.iter().map(|s| s.ty.bind(dims)).collect::<Result<_, _>>()?;
        let flops: f64 = p.costs(dims)?.iter().map(|c| c.flops).sum();
        let short = flops < SHORT_STEP * p.steps.len() as f64;
        let streams = if short { streams(p, &steps) } else { vec![None; p.steps.len()] };
        let b = Arc::new(Bound { short, plan, steps, streams, outputs, sources });
        // Decoding binds ever new lengths; old bindings must not pile up.
        if self.bound.len() >= 64 {
            self.bound.clear();
        }
        self.bound.insert(dims.clone(), b.clone());
        Ok(b)
    }

    /// Calls `f` with every source and its type at `dims`.
    pub(crate) fn sources(
        &mut self,
        dims: &Bindings,
        mut f: impl FnMut(&SourceSlot, &ConcreteTy),
    ) -> Result<(), DimError> {
        let bound = self.bind(dims)?;
        self.program.sources.iter().zip(&bound.sources).for_each(|(slot, ty)| f(slot, ty));
        Ok(())
    }

    /// The memory plan at `dims`.
    ///
    /// # Errors
    /// A dim without a value.
    pub fn plan(&mut self, dims: &Bindings) -> Result<MemoryPlan, DimError> {
        Ok(self.bind(dims)?.plan.clone())
    }

    /// Runs once: reads `inputs` and the store, updates the store, returns the other outputs in order.
    ///
    /// # Errors
    /// See [`ExecError`].  Params and states may be half updated after a kernel's error, not after any other.
    pub fn run(
        &mut self,
        dims: &Bindings,
        inputs: &[(&str, TensorRef)],
        store: &mut Store,
    ) -> Result<Outputs, ExecError> {
        self.run_timed(dims, inputs, store, None)
    }

    /// As [`run`](Self::run); adds the time of every step to `times`, if given.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_timed(
        &mut self,
        dims: &Bindings,
        inputs: &[(&str, TensorRef)],
        store: &mut Store,
        times: Option<&mut StepTimes>,
    ) -> Result<Outputs, ExecError> {
        let mut outputs = Outputs::new();
        self.run_into(dims, inputs, store, &mut outputs, times)?;
        Ok(outputs)
    }

    /// As [`run_timed`](Self::run_timed), into the outputs of a run before: where its dims were the same, nothing is
    /// allocated, after the first runs.
    ///
    /// # Errors
    /// As [`run`](Self::run); the outputs are then those of the run before.
    pub fn run_into(
        &mut self,
        dims: &Bindings,
        inputs: &[(&str, TensorRef)],
        store: &mut Store,
        outputs: &mut Outputs,
        times: Option<&mut StepTimes>,
    ) -> Result<(), ExecError> {
        if times.is_some() {
            return self.execute(dims, inputs, store, outputs, times, None);
        }
        let mut times = self.recorded.take();
        let done = self.execute(dims, inputs, store, outputs, times.as_mut(), None);
        self.recorded = times;
        done
    }

    fn execute(
        &mut self,
        dims: &Bindings,
        inputs: &[(&str, TensorRef)],
        store: &mut Store,
        outputs: &mut Outputs,
        mut times: Option<&mut StepTimes>,
        mut ends: Option<Ends>,
    ) -> Result<(), ExecError> {
        let bound = self.bind(dims)?;
        let p = self.program.clone();
        let name = || p.name.clone();
        if let Some((step, ty)) = &self.half {
            let op = p.steps[*step].op.mnemonic();
            return Err(ExecError::Half { program: name(), step: *step, op, ty: ty.to_string() });
        }

        // Resolve every source before anything runs.
        let Workspace { bases, x, y } = std::mem::take(&mut self.workspace);
        let mut bases = Bases { pages: emptied(bases.pages), ..bases };
        bases.at.clear();
        bases.at.resize(p.buffers.len(), std::ptr::null_mut());
        for ((slot, expected), updated) in p.sources.iter().zip(&bound.sources).zip(&*self.updated) {
            let wrong = |kind, found: String| ExecError::Wrong {
                program: name(),
                kind,
                name: slot.name.clone(),
                expected: expected.to_string(),
                found,
            };
            let missing = |kind| ExecError::Missing {
                program: name(),
                kind,
                name: slot.name.clone(),
                expected: expected.to_string(),
            };
            bases.at[slot.buffer.index()] = match slot.kind {
                SourceKind::Input => {
                    let (_, t) = inputs.iter().find(|(n, _)| *n == slot.name).ok_or_else(|| missing("input"))?;
                    if !t.is(expected) {
                        return Err(wrong("input", format!("{} ({} elements)", t.ty(), t.len())));
                    }
                    if let Some(pages) = t.pages() {
                        if let Some(op) = reads_array(&p, slot.buffer) {
                            return Err(ExecError::Paged { program: name(), name: slot.name.clone(), op });
                        }
                        bases.pages.push((slot.buffer.index(), pages));
                    }
                    t.as_ptr().cast_mut()
                }
                SourceKind::Param | SourceKind::State => {
                    let kind = slot.kind.name();
                    let t = store.0.get_mut(&slot.name).ok_or_else(|| missing(kind))?;
                    if !t.is(expected) {
                        return Err(wrong(kind, t.ty().to_string()));
                    }
                    // What a run only reads may lie in a mapped file.
                    if *updated { t.as_mut_ptr() } else { t.view().as_ptr().cast_mut() }
                }
            };
        }
        if !self.arena.reserve(bound.plan.arena) {
            return Err(ExecError::OutOfMemory { program: name(), need: bound.plan.arena, dims: dims.to_string() });
        }
        bases.arena = self.arena.base();
        for (b, offset) in bound.plan.offsets.iter().enumerate() {
            if let (Some(o), BufferKind::Arena) = (offset, p.buffers[b].kind) {
                // SAFETY: the plan's offsets lie inside the arena.
                bases.at[b] = unsafe { bases.arena.add(*o) };
            }
        }

        if let Some(t) = &mut times {
            t.resize(p.steps.len(), Duration::ZERO);
        }
        let guard = self.guard;
        let (mut x, mut y) = (emptied(x), emptied(y));
        let steps = || -> Result<(), ExecError> {
            for (i, (step, (ins, outs))) in p.steps.iter().zip(&bound.steps).enumerate() {
                x.clear();
                x.extend(ins.iter().map(|v| bases.arg(v)));
                y.clear();
                y.extend(outs.iter().map(|v| bases.arg(v)));
                if let Some((weights, bytes)) = bound.streams[i] {
                    rambac_cpu::team::ahead(bases.at[weights], bytes);
                }
                let t = std::time::Instant::now();
                let done = bases.with_scratch(bound.plan.scratch[i], || run_kernel(&step.op, &x, &y));
                done.map_err(|error| ExecError::Kernel { program: name(), step: i, op: step.op.mnemonic(), error })?;
                if let Some(times) = &mut times {
                    times[i] += t.elapsed();
                }
                let guarded = guard.is_some_and(|(step, result)| step == i && !y[result].is_finite());
                if guarded || ends.as_mut().is_some_and(|ends| ends(i, &y)) {
                    break;
                }
            }
            Ok(())
        };
        if bound.short { rambac_cpu::team::run(&self.pool, steps) } else { self.pool.install(steps) }?;
        let results = || p.outputs.iter().zip(&bound.outputs).filter(|(o, _)| !o.update);
        if outputs.len() != results().count() || results().zip(&*outputs).any(|((o, _), (name, _))| o.name != *name) {
            outputs.clear();
            outputs.extend(results().map(|(o, v)| (o.name.clone(), bases.arg(v).to_tensor())));
        } else {
            results().zip(&mut *outputs).for_each(|((_, v), (_, t))| bases.arg(v).copy_to(t));
        }
        let bases = Bases { at: bases.at, arena: bases.arena, pages: emptied(bases.pages) };
        self.workspace = Workspace { x: emptied(x), y: emptied(y), bases };
        Ok(())
    }
}

/// An op that wants the whole of a buffer in memory.
fn reads_array(p: &Program, buffer: BufferId) -> Option<&'static str> {
    let array = |s: &Step| {
        let paged = kernel_traits(&s.op).paged_inputs;
        s.inputs.iter().enumerate().any(|(i, v)| v.buffer == buffer && !(paged.contains(&i) && v.strided.is_none()))
    };
    let step = p.steps.iter().find(|s| array(s)).map(|s| s.op.mnemonic());
    step.or_else(|| p.outputs.iter().any(|o| o.view.buffer == buffer).then_some("an output"))
}

/// The first step that works on f16, or on bf16 without a kernel for it.
fn half_step(p: &Program) -> Option<(usize, Ty)> {
    let unfit = |s: &Step| {
        let t = kernel_traits(&s.op);
        let fits = |v: &View, read: bool| match v.ty.dtype {
            DType::F16 => false,
            DType::BF16 => t.moves || read,
            _ => true,
        };
        let read = |i: usize, v: &View| fits(v, reads_bf16(&s.op, i, &v.ty));
        let inputs = s.inputs.iter().enumerate().find(|(i, v)| !read(*i, v)).map(|(_, v)| v);
        inputs.or_else(|| s.outputs.iter().find(|v| !fits(v, false))).map(|v| v.ty.clone())
    };
    p.steps.iter().enumerate().find_map(|(i, s)| unfit(s).map(|ty| (i, ty)))
}

/// Whether an op of the program runs by its reference evaluation, with the reason.
pub fn slow_steps(p: &Program) -> Vec<(usize, &'static str)> {
    let slow = |op: &Op| kernel_traits(op).reference;
    p.steps.iter().enumerate().filter_map(|(i, s)| slow(&s.op).map(|r| (i, r))).collect()
}
