//! A device, the values that stay on it, and the programs that share both.
//!
//! Values have names: params and states of all programs, and inputs that are not given anew every run (a program that
//! is given no input of some name takes the value of that name).  So a program that accumulates gradients and one that
//! applies them work on the same ones, and what one program keeps ([`Machine::run_keeping`]) another reads, without the
//! host.  Activations lie in one arena at the plan's addresses, as large as the largest program asks for; or, to see
//! accesses that leave their buffer, each in memory of its own.
//!
//! What a run starts (kernels with their arguments) is worked out once per sizes and kept until a value moves; of programs that
//! see ever new sizes only the last ones are kept ([`Machine::KEPT`]).  `run.rs` runs programs, `chain.rs` several as one.

use super::bound::{Bound, Place, Places, Work, bind, label};
use super::bytes::Bytes;
use super::chain::Chain;
use super::code::Code;
use super::error::GpuError;
use super::profile::Profiling;
use super::run::Flight;
use super::stage::{Pinned, Stage};
use rambac_codegen::cuda::GpuProgram;
use rambac_codegen::{BufferKind, MemoryPlan};
use rambac_driver::{BufferId, Device, Error as DriverError, ModuleId, RecordId};
use rambac_ir::Bindings;
use rambac_ir::ty::ConcreteTy;
use std::collections::{BTreeMap, HashMap};
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

/// A program of a [`Machine`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProgramId(pub(super) usize);

pub(super) type Outcome<T> = Result<T, GpuError>;

/// Who brings to the device what a run reads in pages, see [`Machine::run_paged`].  It may write values, not move them.
pub trait Pager<D: Device = Box<dyn Device>> {
    /// In how many parts landmarks come; 0: they are all there.
    fn parts(&self) -> usize {
        0
    }
    /// A step is about to look through a part of the landmarks.
    ///
    /// # Errors
    /// The device fails.
    fn landmarks(&mut self, _: &mut Machine<D>, _part: usize) -> Result<(), GpuError> {
        Ok(())
    }
    /// A step is about to attend to chunks: their indices `[N, L, h, K]`, of which the first `count` `[N, L, h]` of a row are meant.
    ///
    /// # Errors
    /// The device fails.
    fn chosen(&mut self, m: &mut Machine<D>, indices: &[i32], count: &[i32]) -> Result<(), GpuError>;
}

pub(super) struct Loaded {
    pub gpu: Arc<GpuProgram>,
    /// As many as the program has kernels.
    pub modules: Vec<ModuleId>,
    /// Inputs that a run gave: where they are, and the buffer's bytes.
    pub inputs: HashMap<String, (BufferId, usize)>,
    pub bound: HashMap<Bindings, Kept>,
}

/// What is worked out once per sizes.
#[derive(Clone)]
pub(super) struct Kept {
    /// Of the machine when this was made.
    gone: u64,
    /// Of the program's sources, in order.
    sources: Arc<Vec<BufferId>>,
    bound: Arc<Bound>,
    /// Of all its work; and of every stretch, where the host looks in between.
    pub records: Vec<Record>,
    /// The tick of the last run.
    used: u64,
}

impl Kept {
    fn made(&self) -> impl Iterator<Item = RecordId> {
        self.records.iter().filter_map(|r| if let Record::Made(r) = r { Some(*r) } else { None })
    }
}

/// Work that comes again is recorded, where the device can: then a run starts it at once.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Record {
    /// What a device does once for a product or kernel, such as choosing an algorithm, is not to be recorded.
    First,
    Second,
    Made(RecordId),
    /// The device does not record.
    Never,
}

/// See the module's comment.
pub struct Machine<D: Device = Box<dyn Device>> {
    pub(super) device: D,
    pub(super) placement: Placement,
    /// By the kernel's text and architecture.
    modules: HashMap<(String, &'static str), ModuleId>,
    pub(super) values: HashMap<String, (ConcreteTy, BufferId)>,
    /// The arena and its size.
    arena: Option<(BufferId, usize)>,
    /// Counts buffers that went or moved, and names that changed: what was worked out for names before is stale.
    pub(super) layout: u64,
    /// Counts buffers that went or moved alone: what was worked out for buffers before is stale.
    pub(super) gone: u64,
    pub(super) programs: Vec<Loaded>,
    /// On the way to the device, and back.
    stage: Stage,
    pub(super) pinned: Pinned,
    /// Runs whose results are still to come.
    pub(super) flights: BTreeMap<u64, Flight>,
    pub(super) chains: Vec<Chain>,
    /// Counts runs.
    pub(super) tick: u64,
    pub(super) profiling: Option<Profiling>,
    /// Who hears once that work runs more slowly than it could; and that it was told.
    warn: Warn,
    warned: bool,
}

/// Hears what is not as it should be, but goes on.
pub type Warn = Box<dyn FnMut(String) + Send>;

pub(super) fn device(program: &str, what: impl Into<String>) -> impl FnOnce(DriverError) -> GpuError {
    let (program, what) = (program.to_string(), what.into());
    move |error| GpuError::Device { program, what, error }
}

/// The error of a run.  A device may tell only when it is waited for what an earlier launch did.
pub(super) fn blame(gpu: &GpuProgram, bound: &Bound, what: String, e: DriverError) -> GpuError {
    let culprit = match &e {
        DriverError::Lost { finished: Some(n), .. } => bound.work.get(*n),
        _ => None,
    };
    device(&gpu.program.name, culprit.map_or(what, |w| w.describe(gpu)))(e)
}

/// What was started as one.
pub(super) fn span(gpu: &GpuProgram, work: &[Work]) -> String {
    let name = |w: &Work| format!("step {} ({})", w.step, gpu.program.steps[w.step].op.mnemonic());
    match work {
        [] => "nothing".into(),
        [only] => only.describe(gpu),
        [first, .., last] => format!("one of {} launches of a record, {} to {}", work.len(), name(first), name(last)),
    }
}

impl<D: Device> Machine<D> {
    /// Sizes of a program whose work is kept, and records with it.
    pub const KEPT: usize = 24;

    pub fn new(device: D, placement: Placement) -> Machine<D> {
        Machine {
            device,
            placement,
            modules: HashMap::new(),
            values: HashMap::new(),
            arena: None,
            layout: 0,
            gone: 0,
            programs: vec![],
            stage: Stage::default(),
            pinned: Pinned::default(),
            flights: BTreeMap::new(),
            chains: vec![],
            tick: 0,
            profiling: None,
            warn: Box::new(|text| eprintln!("warning: {text}")),
            warned: false,
        }
    }

    /// Who hears warnings; without anybody they go to standard error.
    pub fn on_warning(&mut self, warn: Warn) {
        self.warn = warn;
    }

    pub fn device(&mut self) -> &mut D {
        &mut self.device
    }

    /// Loads a program's kernels; those that it shares with others are there already.
    ///
    /// # Errors
    /// A kernel is missing in `code`, or the device does not take it.
    pub fn load(&mut self, program: Arc<GpuProgram>, code: &Code) -> Outcome<ProgramId> {
        let (name, arch) = (&program.program.name, program.target.arch.name());
        let mut modules = vec![];
        for k in &program.kernels {
            let key = (k.source.clone(), arch);
            let known = self.modules.get(&key).copied();
            let module = match known {
                Some(m) => m,
                None => {
                    let c = code.0.get(&k.name);
                    let c = c.ok_or_else(|| GpuError::NoCode { program: name.clone(), kernel: k.name.clone() })?;
                    let code =
                        rambac_driver::Code { ptx: &c.ptx, cubin: c.cubin.as_deref().map(|bytes| (arch, bytes)) };
                    self.device.load(&code).map_err(device(name, format!("kernel {}", k.name)))?
                }
            };
            self.modules.insert(key, module);
            modules.push(module);
        }
        self.programs.push(Loaded { gpu: program, modules, inputs: HashMap::new(), bound: HashMap::new() });
        Ok(ProgramId(self.programs.len() - 1))
    }

    pub fn program(&self, id: ProgramId) -> &Arc<GpuProgram> {
        &self.programs[id.0].gpu
    }

    /// Names of values that are here.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// The type of a value.
    pub fn ty(&self, name: &str) -> Option<&ConcreteTy> {
        self.values.get(name).map(|(ty, _)| ty)
    }

    /// Gives a value: a param, a state, an input that stays.
    ///
    /// # Errors
    /// The device has no memory left.
    pub fn set(&mut self, name: &str, value: &Bytes) -> Outcome<()> {
        let buffer = self.room(name, &value.ty)?;
        self.bring(&value.data, (buffer, 0)).map_err(device(name, "its value"))
    }

    /// Starts a copy of bytes to the device; they are no longer read when this returns.
    pub(super) fn bring(&mut self, data: &[u8], to: Place) -> Result<(), DriverError> {
        self.stage.bring(&mut self.device, data, to)
    }

    /// Bytes of the device that values, inputs and the arena take.
    pub fn bytes(&self) -> usize {
        let values = self.values.values().map(|(ty, _)| ty.bytes());
        let inputs = self.programs.iter().flat_map(|p| p.inputs.values().map(|(_, bytes)| *bytes));
        values.chain(inputs).sum::<usize>() + self.arena.map_or(0, |a| a.1)
    }

    /// How many sizes of a program are kept.
    pub fn kept(&self, id: ProgramId) -> usize {
        self.programs[id.0].bound.len()
    }

    /// Room for a value, without content; what had that name before is taken away if it is of another size.
    ///
    /// # Errors
    /// The device has no memory left.
    pub fn allocate(&mut self, name: &str, ty: &ConcreteTy) -> Outcome<()> {
        self.room(name, ty).map(drop)
    }

    /// Overwrites a part of a value, from its byte `at` on.
    ///
    /// # Errors
    /// The part lies outside; there is no such value.
    pub fn write(&mut self, name: &str, at: usize, data: &[u8]) -> Outcome<()> {
        let failed = |what: String| GpuError::Device {
            program: name.into(),
            what: "its value".into(),
            error: DriverError::refused(what),
        };
        let Some((ty, buffer)) = self.values.get(name).cloned() else {
            return Err(failed("it is not on the device".into()));
        };
        if at.checked_add(data.len()).is_none_or(|end| end > ty.bytes()) {
            return Err(failed(format!("{} bytes at {at} are outside of {ty}", data.len())));
        }
        self.bring(data, (buffer, at)).map_err(device(name, "its value"))
    }

    /// A part of a value, from its byte `at` on.
    ///
    /// # Errors
    /// The part lies outside; there is no such value; the device fails.
    pub fn part(&mut self, name: &str, at: usize, bytes: usize) -> Outcome<Vec<u8>> {
        let buffer = self.values.get(name).map_or(BufferId(usize::MAX), |v| v.1);
        let mut data = vec![0; bytes];
        self.device.copy_out(buffer, at, &mut data).map_err(device(name, "its value"))?;
        Ok(data)
    }

    /// Takes a value away.
    ///
    /// # Errors
    /// The device fails.
    pub fn remove(&mut self, name: &str) -> Outcome<()> {
        let Some((_, b)) = self.values.remove(name) else { return Ok(()) };
        self.moved();
        self.device.free(b).map_err(device(name, "its value"))
    }

    /// The value of a name; `None` if it was never set.
    ///
    /// # Errors
    /// The device fails.
    pub fn get(&mut self, name: &str) -> Outcome<Option<Bytes>> {
        let Some((ty, buffer)) = self.values.get(name).cloned() else { return Ok(None) };
        let mut data = vec![0; ty.bytes()];
        self.device.copy_out(buffer, 0, &mut data).map_err(device(name, "its value"))?;
        Ok(Some(Bytes { ty, data }))
    }

    /// A buffer for a value of this type: the one that it has, or a new one.
    pub(super) fn room(&mut self, name: &str, ty: &ConcreteTy) -> Outcome<BufferId> {
        match self.values.get_mut(name) {
            Some((old, b)) if old.bytes() == ty.bytes() => {
                let (same, b) = (old == ty, *b);
                if !same {
                    *old = ty.clone();
                    self.moved();
                }
                return Ok(b);
            }
            Some(_) => self.remove(name)?,
            None => {}
        }
        let b = self.device.alloc(name, ty.bytes()).map_err(device(name, "its value"))?;
        self.values.insert(name.into(), (ty.clone(), b));
        self.moved();
        Ok(b)
    }

    /// A record of what `start` starts.  `None`: the device records nothing, or not this, which is told once; nothing was started.
    ///
    /// # Errors
    /// The device is lost.
    pub(super) fn record(
        &mut self,
        failed: impl Fn(DriverError) -> GpuError,
        start: impl FnOnce(&mut Self) -> Outcome<()>,
    ) -> Outcome<Option<RecordId>> {
        match self.device.begin_record() {
            Ok(true) => {}
            Ok(false) => return Ok(None),
            Err(e) => return self.unrecorded(failed(e)),
        }
        let started = start(self);
        // What was begun is ended, whatever it holds.
        match (started, self.device.end_record()) {
            (Ok(()), Ok(r)) => Ok(Some(r)),
            (Ok(()), Err(e)) => self.unrecorded(failed(e)),
            (Err(e), Err(_)) => self.unrecorded(e),
            (Err(e), Ok(r)) => {
                self.device.forget(r).map_err(failed)?;
                self.unrecorded(e)
            }
        }
    }

    fn unrecorded(&mut self, e: GpuError) -> Outcome<Option<RecordId>> {
        if e.lost() {
            return Err(e);
        }
        if !std::mem::replace(&mut self.warned, true) {
            (self.warn)(format!("{e}; what can't be recorded is started kernel by kernel each time, which is slower"));
        }
        Ok(None)
    }

    /// Buffers went or moved.
    fn moved(&mut self) {
        (self.layout, self.gone) = (self.layout + 1, self.gone + 1);
    }

    fn arena(&mut self, id: ProgramId, plan: &MemoryPlan) -> Outcome<Option<BufferId>> {
        if self.placement == Placement::Apart {
            return Ok(None);
        }
        let name = self.programs[id.0].gpu.program.name.clone();
        if self.arena.is_none_or(|(_, size)| size < plan.arena) {
            self.moved();
            if let Some((old, _)) = self.arena.take() {
                self.device.free(old).map_err(device(&name, "the arena"))?;
            }
            let b = self.device.alloc("arena", plan.arena).map_err(device(&name, "the arena"))?;
            self.arena = Some((b, plan.arena));
        }
        Ok(self.arena.map(|a| a.0))
    }

    /// Copies a part of a value (its name and byte) to another value.
    ///
    /// # Errors
    /// There is no such value, or the part lies outside of one.
    pub fn copy_value(&mut self, from: (&str, usize), to: (&str, usize), bytes: usize) -> Outcome<()> {
        let place = |(name, at): (&str, usize)| {
            let known = self.values.get(name).filter(|(ty, _)| at.checked_add(bytes).is_some_and(|e| e <= ty.bytes()));
            known.map(|v| (v.1, at)).ok_or_else(|| GpuError::Device {
                program: name.into(),
                what: "its value".into(),
                error: DriverError::refused(format!("there are no {bytes} bytes at {at} of it on the device")),
            })
        };
        let (from_place, to_place) = (place(from)?, place(to)?);
        self.device.copy(from_place, to_place, bytes).map_err(device(to.0, "its value"))
    }

    /// Gives a value another name; what had that name before is taken away.
    ///
    /// # Errors
    /// The device fails.
    pub fn rename(&mut self, from: &str, to: &str) -> Outcome<()> {
        self.remove(to)?;
        if let Some(v) = self.values.remove(from) {
            self.layout += 1;
            self.values.insert(to.into(), v);
        }
        Ok(())
    }

    /// A buffer for an input that is given.
    pub(super) fn input(
        &mut self,
        id: ProgramId,
        name: &str,
        bytes: usize,
        temporary: &mut Vec<BufferId>,
    ) -> Outcome<BufferId> {
        let program = self.programs[id.0].gpu.program.name.clone();
        let known = self.programs[id.0].inputs.get(name).copied();
        match (self.placement, known) {
            (Placement::Apart, _) => {
                let b = self.device.alloc(name, bytes).map_err(device(&program, name))?;
                temporary.push(b);
                return Ok(b);
            }
            (_, Some((b, size))) if size >= bytes => return Ok(b),
            (_, Some((b, _))) => {
                self.programs[id.0].inputs.remove(name);
                self.moved();
                self.device.free(b).map_err(device(&program, name))?;
            }
            (_, None) => {}
        }
        let b = self.device.alloc(name, bytes).map_err(device(&program, name))?;
        self.programs[id.0].inputs.insert(name.into(), (b, bytes));
        Ok(b)
    }

    /// The work of a run, kept where addresses stay.
    pub(super) fn bound(
        &mut self,
        id: ProgramId,
        dims: &Bindings,
        sources: &[BufferId],
        temporary: &mut Vec<BufferId>,
    ) -> Outcome<Arc<Bound>> {
        self.tick += 1;
        let used = self.tick;
        if let Some(k) = self.programs[id.0].bound.get_mut(dims)
            && k.gone == self.gone
            && k.sources[..] == *sources
        {
            k.used = used;
            return Ok(k.bound.clone());
        }
        let gpu = self.programs[id.0].gpu.clone();
        let (plan, forms) = (gpu.plan(dims)?, gpu.forms(dims)?);
        let arena = self.arena(id, &plan)?;
        let mut buffers: Vec<Option<Place>> = vec![None; gpu.program.buffers.len()];
        for (slot, b) in gpu.program.sources.iter().zip(sources) {
            buffers[slot.buffer.index()] = Some((*b, 0));
        }
        let mut apart = |device_: &mut D, what: &str, bytes: usize| -> Outcome<Place> {
            let b = device_.alloc(what, bytes).map_err(device(&gpu.program.name, what))?;
            temporary.push(b);
            Ok((b, 0))
        };
        for (i, b) in gpu.program.buffers.iter().enumerate().filter(|(_, b)| b.kind == BufferKind::Arena) {
            buffers[i] = match (arena, plan.offsets[i]) {
                (_, None) => None,
                (Some(arena), Some(offset)) => Some((arena, offset)),
                (None, Some(_)) => Some(apart(&mut self.device, &label(&gpu, i), b.ty.bind(dims)?.bytes())?),
            };
        }
        let mut workspace = vec![];
        for (form, (scratch, _)) in forms.iter().zip(&plan.scratch) {
            let mut own = vec![];
            for (w, at) in form.workspace.iter().zip(form.workspace_places(dims)?.0) {
                own.push(match arena {
                    Some(arena) => (arena, scratch + at),
                    None => apart(&mut self.device, w.name, w.elements.eval(dims)? * w.dtype.size())?,
                });
            }
            workspace.push(own);
        }
        let bound = Arc::new(bind(&gpu, &forms, dims, &Places { buffers: &buffers, workspace: &workspace })?);
        if self.placement == Placement::Arena {
            let sources = Arc::new(sources.to_vec());
            let kept = Kept { gone: self.gone, sources, bound: bound.clone(), records: vec![], used };
            let all = &mut self.programs[id.0].bound;
            let mut old = all.insert(dims.clone(), kept);
            if all.len() > Self::KEPT
                && let Some(oldest) = all.iter().min_by_key(|(_, k)| k.used).map(|(d, _)| d.clone())
            {
                old = all.remove(&oldest);
            }
            let forgotten = old.iter().flat_map(Kept::made).map(|r| self.device.forget(r));
            forgotten.fold(Ok(()), Result::and).map_err(device(&gpu.program.name, "a record of its steps"))?;
        }
        Ok(bound)
    }
}

impl<D: Device> Drop for Machine<D> {
    /// What fails now has no one to hear it.
    fn drop(&mut self) {
        let _ = self.give_up();
        let _ = self.end_watch();
        let _ = self.device.synchronise();
        while let Some(c) = self.chains.pop() {
            let _ = self.drop_chain(c);
        }
        for k in self.programs.iter_mut().flat_map(|p| p.bound.drain().map(|(_, k)| k)) {
            for r in k.made() {
                let _ = self.device.forget(r);
            }
        }
        let values = self.values.drain().map(|(_, (_, b))| b);
        let inputs = self.programs.iter_mut().flat_map(|p| p.inputs.drain().map(|(_, (b, _))| b));
        for b in values.chain(inputs).chain(self.arena.take().map(|a| a.0)) {
            let _ = self.device.free(b);
        }
        let _ = self.stage.clear(&mut self.device);
        let _ = self.pinned.clear(&mut self.device);
    }
}
