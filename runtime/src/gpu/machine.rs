//! A device, the values that stay on it, and the programs that share both.
//!
//! Values have names: params and states of all programs, and inputs that are not given anew every run (a program that
//! is given no input of some name takes the value of that name).  So a program that accumulates gradients and one that
//! applies them work on the same ones, and what one program keeps ([`Machine::run_keeping`]) another reads, without the
//! host.  Activations lie in one arena at the plan's addresses, as large as the largest program asks for; or, to see
//! accesses that leave their buffer, each in memory of its own.
//!
//! What a run starts (kernels with their arguments) is worked out once per sizes and kept until a value moves.

use super::bound::{Bound, Place, Places, What, Work, bind, label};
use super::bytes::Bytes;
use super::code::Code;
use super::error::GpuError;
use crate::executor::StepTimes;
use rambac_codegen::cuda::GpuProgram;
use rambac_codegen::{BufferKind, MemoryPlan};
use rambac_driver::{BufferId, Device, Error as DriverError, ModuleId, RecordId};
use rambac_ir::Bindings;
use rambac_ir::ops::SourceKind;
use rambac_ir::ty::ConcreteTy;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

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
pub struct ProgramId(usize);

type Outcome<T> = Result<T, GpuError>;

/// Hears which chunks a step is about to attend to, see [`Machine::run_choosing`].
pub type Chosen<'a, D> = dyn FnMut(&mut Machine<D>, &[i32], &[i32]) -> Outcome<()> + 'a;

/// What a run is watched for.
enum Watch<'a, 'f, D: Device> {
    Nothing,
    Choices(&'a mut Chosen<'f, D>),
    Steps(&'a mut StepTimes),
}

struct Loaded {
    gpu: Arc<GpuProgram>,
    /// As many as the program has kernels.
    modules: Vec<ModuleId>,
    /// Inputs that a run gave: where they are, and the buffer's bytes.
    inputs: HashMap<String, (BufferId, usize)>,
    bound: HashMap<Bindings, Kept>,
}

/// What is worked out once per sizes.
#[derive(Clone)]
struct Kept {
    /// Of the machine when this was made.
    layout: u64,
    /// Of the program's sources, in order.
    sources: Arc<Vec<BufferId>>,
    bound: Arc<Bound>,
    record: Record,
}

/// Work that comes again is recorded, where the device can: then a run starts it at once.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Record {
    /// What a device does once for a product or kernel, such as choosing an algorithm, is not to be recorded.
    First,
    Second,
    Made(RecordId),
    /// The device does not record.
    Never,
}

/// See the module's comment.
pub struct Machine<D: Device = Box<dyn Device>> {
    device: D,
    placement: Placement,
    /// By the kernel's text and architecture.
    modules: HashMap<(String, &'static str), ModuleId>,
    values: HashMap<String, (ConcreteTy, BufferId)>,
    /// The arena and its size.
    arena: Option<(BufferId, usize)>,
    /// Counts buffers that went or moved: what was bound before is stale.
    layout: u64,
    programs: Vec<Loaded>,
}

fn device(program: &str, what: impl Into<String>) -> impl FnOnce(DriverError) -> GpuError {
    let (program, what) = (program.to_string(), what.into());
    move |error| GpuError::Device { program, what, error }
}

/// The error of a run.  A device may tell only when it is waited for what an earlier launch did.
fn blame(gpu: &GpuProgram, bound: &Bound, what: String, e: DriverError) -> GpuError {
    let culprit = match &e {
        DriverError::Lost { finished: Some(n), .. } => bound.work.get(*n),
        _ => None,
    };
    device(&gpu.program.name, culprit.map_or(what, |w| w.describe(gpu)))(e)
}

impl<D: Device> Machine<D> {
    pub fn new(device: D, placement: Placement) -> Machine<D> {
        Machine {
            device,
            placement,
            modules: HashMap::new(),
            values: HashMap::new(),
            arena: None,
            layout: 0,
            programs: vec![],
        }
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
        self.device.copy_in(buffer, 0, &value.data).map_err(device(name, "its value"))
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
        let Some((ty, buffer)) = self.values.get(name) else { return Err(failed("it is not on the device".into())) };
        if at.checked_add(data.len()).is_none_or(|end| end > ty.bytes()) {
            return Err(failed(format!("{} bytes at {at} are outside of {ty}", data.len())));
        }
        self.device.copy_in(*buffer, at, data).map_err(device(name, "its value"))
    }

    /// Takes a value away.
    ///
    /// # Errors
    /// The device fails.
    pub fn remove(&mut self, name: &str) -> Outcome<()> {
        let Some((_, b)) = self.values.remove(name) else { return Ok(()) };
        self.layout += 1;
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
    fn room(&mut self, name: &str, ty: &ConcreteTy) -> Outcome<BufferId> {
        match self.values.get_mut(name) {
            Some((old, b)) if old.bytes() == ty.bytes() => {
                if old != ty {
                    *old = ty.clone();
                    self.layout += 1;
                }
                return Ok(*b);
            }
            Some(_) => self.remove(name)?,
            None => {}
        }
        let b = self.device.alloc(name, ty.bytes()).map_err(device(name, "its value"))?;
        self.values.insert(name.into(), (ty.clone(), b));
        self.layout += 1;
        Ok(b)
    }

    /// Makes the arena large enough for a program at these sizes: then no run of it asks for memory of that kind.
    ///
    /// # Errors
    /// A dim without a value; no memory.
    pub fn reserve(&mut self, id: ProgramId, dims: &Bindings) -> Outcome<()> {
        let plan = self.programs[id.0].gpu.plan(dims)?;
        self.arena(id, &plan).map(drop)
    }

    fn arena(&mut self, id: ProgramId, plan: &MemoryPlan) -> Outcome<Option<BufferId>> {
        if self.placement == Placement::Apart {
            return Ok(None);
        }
        let name = self.programs[id.0].gpu.program.name.clone();
        if self.arena.is_none_or(|(_, size)| size < plan.arena) {
            self.layout += 1;
            if let Some((old, _)) = self.arena.take() {
                self.device.free(old).map_err(device(&name, "the arena"))?;
            }
            let b = self.device.alloc("arena", plan.arena).map_err(device(&name, "the arena"))?;
            self.arena = Some((b, plan.arena));
        }
        Ok(self.arena.map(|a| a.0))
    }

    /// Runs once: reads `inputs` (those not given are values of their name), updates params and states, returns the
    /// other outputs in order.
    ///
    /// # Errors
    /// See [`GpuError`].  Params and states may be half updated after an error of the device, not after any other.
    pub fn run(&mut self, id: ProgramId, dims: &Bindings, inputs: &[(&str, &Bytes)]) -> Outcome<Vec<(String, Bytes)>> {
        self.run_keeping(id, dims, inputs, &[])
    }

    /// As [`run`](Self::run); the outputs named in `keep` become values of the name that stands beside them, and are not
    /// returned.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_keeping(
        &mut self,
        id: ProgramId,
        dims: &Bindings,
        inputs: &[(&str, &Bytes)],
        keep: &[(&str, &str)],
    ) -> Outcome<Vec<(String, Bytes)>> {
        self.run_all(id, dims, inputs, keep, Watch::Nothing)
    }

    /// As [`run_keeping`](Self::run_keeping); adds the seconds of every step of the program to `times`, by the device's
    /// clock, which such a run is launched one by one for.  They stay empty where a device has no clock.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_timed(
        &mut self,
        id: ProgramId,
        dims: &Bindings,
        inputs: &[(&str, &Bytes)],
        keep: &[(&str, &str)],
        times: &mut StepTimes,
    ) -> Outcome<Vec<(String, Bytes)>> {
        self.run_all(id, dims, inputs, keep, Watch::Steps(times))
    }

    /// As [`run`](Self::run); before a step attends to chunks in pages, `chosen` hears which: their indices
    /// `[N, L, h, K]`, of which the first `count` `[N, L, h]` of a row are meant.  It may write values, not move them.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_choosing(
        &mut self,
        id: ProgramId,
        dims: &Bindings,
        inputs: &[(&str, &Bytes)],
        chosen: &mut Chosen<D>,
    ) -> Outcome<Vec<(String, Bytes)>> {
        self.run_all(id, dims, inputs, &[], Watch::Choices(chosen))
    }

    fn run_all(
        &mut self,
        id: ProgramId,
        dims: &Bindings,
        inputs: &[(&str, &Bytes)],
        keep: &[(&str, &str)],
        watch: Watch<D>,
    ) -> Outcome<Vec<(String, Bytes)>> {
        let mut temporary = vec![];
        let result = self.run_with(id, dims, inputs, keep, &mut temporary, watch);
        let mut freed = Ok(());
        for b in temporary {
            let name = &self.programs[id.0].gpu.program.name;
            freed = freed.and(self.device.free(b).map_err(device(name, "free")));
        }
        result.and_then(|out| freed.map(|()| out))
    }

    fn run_with(
        &mut self,
        id: ProgramId,
        dims: &Bindings,
        inputs: &[(&str, &Bytes)],
        keep: &[(&str, &str)],
        temporary: &mut Vec<BufferId>,
        watch: Watch<D>,
    ) -> Outcome<Vec<(String, Bytes)>> {
        let gpu = self.programs[id.0].gpu.clone();
        let (p, name) = (&gpu.program, gpu.program.name.as_str());
        self.check(&gpu, dims, inputs)?;
        let mut sources = vec![];
        for slot in &p.sources {
            let given = inputs.iter().find(|(n, _)| slot.kind == SourceKind::Input && *n == slot.name);
            sources.push(match given {
                None => self.values[&slot.name].1,
                Some((_, v)) => {
                    let b = self.input(id, &slot.name, v.data.len(), temporary)?;
                    self.device.copy_in(b, 0, &v.data).map_err(device(name, &slot.name))?;
                    b
                }
            });
        }
        let bound = self.bound(id, dims, &sources, temporary)?;
        let late = |what: String| {
            let (gpu, bound) = (&gpu, &bound);
            move |e| blame(gpu, bound, what, e)
        };
        match watch {
            // The host looks in between, so this is never recorded.
            Watch::Choices(f) if !bound.choices.is_empty() => {
                for (i, w) in bound.work.iter().enumerate() {
                    if let Some(c) = bound.choices.iter().find(|c| c.work == i) {
                        let (indices, count) = (self.integers(name, &c.indices)?, self.integers(name, &c.count)?);
                        f(self, &indices, &count)?;
                    }
                    self.one(id, &gpu, &bound, w)?;
                }
            }
            Watch::Steps(times) => self.timed(id, &gpu, &bound, times)?,
            _ => self.start(id, dims, &gpu, &bound)?,
        }
        let mut out = vec![];
        for (o, (ty, place)) in p.outputs.iter().filter(|o| !o.update).zip(&bound.outputs) {
            if let Some((_, value)) = keep.iter().find(|(output, _)| *output == o.name) {
                let to = self.room(value, ty)?;
                self.device.copy(*place, (to, 0), ty.bytes()).map_err(late(o.name.clone()))?;
                continue;
            }
            let mut data = vec![0; ty.bytes()];
            self.device.copy_out(place.0, place.1, &mut data).map_err(late(o.name.clone()))?;
            out.push((o.name.clone(), Bytes { ty: ty.clone(), data }));
        }
        self.device.synchronise().map_err(late("its end".into()))?;
        Ok(out)
    }

    fn integers(&mut self, program: &str, (ty, at): &(ConcreteTy, Place)) -> Outcome<Vec<i32>> {
        let mut data = vec![0; ty.bytes()];
        self.device.copy_out(at.0, at.1, &mut data).map_err(device(program, "the choice of chunks"))?;
        Ok(data.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect())
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

    /// Starts all work of a run.
    fn start(&mut self, id: ProgramId, dims: &Bindings, gpu: &GpuProgram, bound: &Bound) -> Outcome<()> {
        let record = self.programs[id.0].bound.get(dims).map_or(Record::Never, |k| k.record);
        let whole = |e| blame(gpu, bound, "its steps".into(), e);
        let next = match record {
            Record::Made(r) => return self.device.replay(r).map_err(whole),
            Record::First => Record::Second,
            Record::Second if self.device.begin_record().map_err(whole)? => {
                let kept = self.each(id, gpu, bound);
                // A record that was begun is ended, whatever it holds.
                let record = self.device.end_record().map_err(whole);
                if kept.is_err() {
                    if let Ok(r) = record {
                        self.device.forget(r).map_err(whole)?;
                    }
                    return kept;
                }
                let record = record?;
                self.keep_record(id, dims, Record::Made(record));
                return self.device.replay(record).map_err(whole);
            }
            Record::Second | Record::Never => Record::Never,
        };
        self.each(id, gpu, bound)?;
        self.keep_record(id, dims, next);
        Ok(())
    }

    fn keep_record(&mut self, id: ProgramId, dims: &Bindings, record: Record) {
        if let Some(k) = self.programs[id.0].bound.get_mut(dims) {
            k.record = record;
        }
    }

    fn each(&mut self, id: ProgramId, gpu: &GpuProgram, bound: &Bound) -> Outcome<()> {
        bound.work.iter().try_for_each(|w| self.one(id, gpu, bound, w))
    }

    /// Starts all work, with a mark after each.
    fn timed(&mut self, id: ProgramId, gpu: &GpuProgram, bound: &Bound, times: &mut StepTimes) -> Outcome<()> {
        let clock = |e| blame(gpu, bound, "the clock".into(), e);
        self.device.mark().map_err(clock)?;
        for w in &bound.work {
            self.one(id, gpu, bound, w)?;
            self.device.mark().map_err(clock)?;
        }
        let Some(laps) = self.device.laps().map_err(clock)? else { return Ok(()) };
        times.resize(gpu.program.steps.len(), Duration::ZERO);
        bound.work.iter().zip(laps).for_each(|(w, s)| times[w.step] += Duration::from_secs_f64(s));
        Ok(())
    }

    fn one(&mut self, id: ProgramId, gpu: &GpuProgram, bound: &Bound, w: &Work) -> Outcome<()> {
        let started = match &w.what {
            What::Launch(k, extent, args) => {
                let module = self.programs[id.0].modules[*k];
                self.device.launch(module, &gpu.kernels[*k].name, *extent, args)
            }
            What::Product(x) => self.device.product(x),
        };
        started.map_err(|e| blame(gpu, bound, w.describe(gpu), e))
    }

    /// Every source is there and of the right type.
    fn check(&self, gpu: &GpuProgram, dims: &Bindings, inputs: &[(&str, &Bytes)]) -> Outcome<()> {
        for slot in &gpu.program.sources {
            let expected = slot.ty.bind(dims)?;
            let kind = slot.kind.name();
            let given = inputs.iter().find(|(n, _)| slot.kind == SourceKind::Input && *n == slot.name);
            let found = given.map(|(_, b)| &b.ty).or_else(|| self.ty(&slot.name));
            let (program, name) = (gpu.program.name.clone(), slot.name.clone());
            match found {
                None => return Err(GpuError::Missing { program, kind, name, expected: expected.to_string() }),
                Some(found) if *found != expected => {
                    let (expected, found) = (expected.to_string(), found.to_string());
                    return Err(GpuError::Wrong { program, kind, name, expected, found });
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// A buffer for an input that is given.
    fn input(&mut self, id: ProgramId, name: &str, bytes: usize, temporary: &mut Vec<BufferId>) -> Outcome<BufferId> {
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
                self.layout += 1;
                self.device.free(b).map_err(device(&program, name))?;
            }
            (_, None) => {}
        }
        let b = self.device.alloc(name, bytes).map_err(device(&program, name))?;
        self.programs[id.0].inputs.insert(name.into(), (b, bytes));
        Ok(b)
    }

    /// The work of a run, kept where addresses stay.
    fn bound(
        &mut self,
        id: ProgramId,
        dims: &Bindings,
        sources: &[BufferId],
        temporary: &mut Vec<BufferId>,
    ) -> Outcome<Arc<Bound>> {
        if let Some(k) = self.programs[id.0].bound.get(dims)
            && k.layout == self.layout
            && k.sources[..] == *sources
        {
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
            let kept = Kept { layout: self.layout, sources, bound: bound.clone(), record: Record::First };
            let old = self.programs[id.0].bound.insert(dims.clone(), kept);
            if let Some(Kept { record: Record::Made(r), .. }) = old {
                self.device.forget(r).map_err(device(&gpu.program.name, "a record of its steps"))?;
            }
        }
        Ok(bound)
    }
}

impl<D: Device> Drop for Machine<D> {
    /// What fails now has no one to hear it.
    fn drop(&mut self) {
        for k in self.programs.iter_mut().flat_map(|p| p.bound.drain().map(|(_, k)| k)) {
            if let Record::Made(r) = k.record {
                let _ = self.device.forget(r);
            }
        }
        let values = self.values.drain().map(|(_, (_, b))| b);
        let inputs = self.programs.iter_mut().flat_map(|p| p.inputs.drain().map(|(_, (b, _))| b));
        for b in values.chain(inputs).chain(self.arena.take().map(|a| a.0)) {
            let _ = self.device.free(b);
        }
    }
}
