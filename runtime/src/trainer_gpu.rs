//! A training step on a GPU: parameters, optimiser and carried states stay on the device between steps.
//!
//! The host's store is where values come from before the first step and go to when it is asked for
//! ([`Trainer::sync`](crate::Trainer::sync)).  bf16 copies of parameters are made from the f32 ones when these are
//! uploaded, and are in no checkpoint: so checkpoints are the same for all devices.
//!
//! A step is begun and not waited for: its scalars are read when the next one has been begun, so that the device never waits
//! for the host.

use crate::executor::StepTimes;
use crate::gpu::{Bytes, GpuError, Machine, ProgramId, RunTimes, Ticket};
use crate::store::Store;
use crate::tensor::Tensor;
use crate::trainer::{MicroBatch, TrainError};
use rambac_codegen::cuda::Target;
use rambac_codegen::{MemoryPlan, Program};
use rambac_ir::Bindings;
use rambac_ir::ops::SourceKind;
use rambac_ir::ty::ConcreteTy;
use rambac_passes::mixed::SHADOW;
use std::collections::BTreeMap;

/// A device that programs are made for and loaded on.
pub trait Gpu: Send {
    fn machine(&mut self) -> &mut Machine;
    /// What programs are made for.
    fn target(&self) -> Target;
    /// Makes a lowered program ready to run.
    ///
    /// # Errors
    /// A step that no kernel takes; no compiler; the device refuses.  In words for people.
    fn load(&mut self, program: Program) -> Result<ProgramId, String>;
}

/// See the module's comment.
pub(crate) struct OnGpu {
    gpu: Box<dyn Gpu>,
    /// Reads a batch; with several parts it accumulates.
    step: ProgramId,
    apply: Option<ProgramId>,
    /// The device has the values; what the store says of them is old.
    resident: bool,
    /// The sizes of the last batch, for which every value is there.
    placed: Option<Bindings>,
    /// A step that was begun: its number, its micro-batches, its update where that is a program of its own.
    begun: Option<(u64, Vec<Ticket>, Option<Ticket>)>,
}

/// What a step of a device gave: its number, the outputs of every micro-batch, and of the update where it is a program of its
/// own.
pub(crate) type Ended = (u64, Vec<Scalars>, Option<Scalars>);

/// Scalars that a run returned.
pub(crate) type Scalars = Vec<(String, f32)>;

fn scalars(out: Vec<(String, Bytes)>) -> Scalars {
    let first = |b: Bytes| b.to_tensor().as_f32().and_then(|v| v.first().copied()).unwrap_or(f32::NAN);
    out.into_iter().map(|(n, b)| (n, first(b))).collect()
}

impl OnGpu {
    pub fn new(mut gpu: Box<dyn Gpu>, step: Program, apply: Option<Program>) -> Result<OnGpu, TrainError> {
        let mut load = |p| gpu.load(p).map_err(TrainError::Load);
        let (step, apply) = (load(step)?, apply.map(load).transpose()?);
        Ok(OnGpu { gpu, step, apply, resident: false, placed: None, begun: None })
    }

    pub fn program(&mut self) -> &Program {
        let id = self.step;
        &self.gpu.machine().program(id).program
    }

    /// As [`Trainer::plan`](crate::Trainer::plan).
    pub fn plan(&mut self, dims: &Bindings) -> Result<MemoryPlan, GpuError> {
        let (step, apply) = (self.step, self.apply);
        let machine = self.gpu.machine();
        let mut all = machine.program(step).plan(dims)?;
        if let Some(id) = apply {
            // One arena serves both.
            let update = machine.program(id);
            let p = update.plan(&Bindings::default())?;
            let own = update.program.sources.iter().filter(|s| s.name.starts_with("optim."));
            all.arena = all.arena.max(p.arena);
            all.persistent += own.map(|s| p.sizes[s.buffer.index()]).sum::<usize>();
        }
        Ok(all)
    }

    /// Params and states of all programs with their types at these dims.
    fn values(&mut self, dims: &Bindings) -> Result<BTreeMap<String, (SourceKind, ConcreteTy)>, GpuError> {
        let mut all = BTreeMap::new();
        for id in [Some(self.step), self.apply].into_iter().flatten() {
            for s in &self.gpu.machine().program(id).program.sources {
                if s.kind != SourceKind::Input {
                    all.insert(s.name.clone(), (s.kind, s.ty.bind(dims)?));
                }
            }
        }
        Ok(all)
    }

    /// Brings the store to the device, if it is not there yet; states that it lacks are zero, and so are carried ones of
    /// another batch size.
    fn upload(&mut self, dims: &Bindings, store: &Store) -> Result<(), TrainError> {
        if self.resident && self.placed.as_ref() == Some(dims) {
            return Ok(());
        }
        for (name, (kind, ty)) in self.values(dims)? {
            let known = self.gpu.machine().ty(&name) == Some(&ty);
            if self.resident && known {
                continue;
            }
            let value = match name.strip_prefix(SHADOW) {
                Some(param) => store.get(param).map(|t| {
                    let mut t = t.clone();
                    t.narrow();
                    t
                }),
                // What the device knows under another type is newer than the store, and of another batch.
                None => store.get(&name).filter(|_| !self.resident).cloned(),
            };
            let other_batch = |t: &Tensor| name.starts_with("carry.") && !t.is(&ty);
            let value = match value {
                Some(t) if !other_batch(&t) => t,
                _ if kind == SourceKind::State => Tensor::zeros(&ty),
                Some(t) => t,
                None => continue, // The run says what is missing.
            };
            self.gpu.machine().set(&name, &Bytes::from_tensor(value.view()))?;
        }
        (self.resident, self.placed) = (true, Some(dims.clone()));
        Ok(())
    }

    /// Brings the device's values to the store.
    pub fn download(&mut self, store: &mut Store) -> Result<(), GpuError> {
        if !self.resident {
            return Ok(());
        }
        let machine = self.gpu.machine();
        let names: Vec<String> = machine.names().filter(|n| !n.starts_with(SHADOW)).map(str::to_string).collect();
        for name in names {
            if let Some(b) = machine.get(&name)? {
                store.insert(name, b.to_tensor());
            }
        }
        Ok(())
    }

    /// Gives a state a value.
    pub fn set(&mut self, name: &str, t: &Tensor) -> Result<(), GpuError> {
        if self.resident { self.gpu.machine().set(name, &Bytes::from_tensor(t.view())) } else { Ok(()) }
    }

    fn begin(&mut self, id: ProgramId, dims: &Bindings, inputs: &[(&'static str, Tensor)]) -> Result<Ticket, GpuError> {
        let bytes: Vec<(&str, Bytes)> = inputs.iter().map(|(n, t)| (*n, Bytes::from_tensor(t.view()))).collect();
        let views: Vec<(&str, &Bytes)> = bytes.iter().map(|(n, b)| (*n, b)).collect();
        self.gpu.machine().begin(id, dims, &views)
    }

    /// Begins a step; what the one before gave.
    pub fn start(&mut self, step: u64, batch: &[MicroBatch], store: &Store) -> Result<Option<Ended>, TrainError> {
        let mut each = vec![];
        for m in batch {
            self.upload(&m.dims, store)?;
            each.push(self.begin(self.step, &m.dims, &m.inputs)?);
        }
        let last = self.apply.map(|id| self.begin(id, &Bindings::default(), &[])).transpose()?;
        let before = self.begun.replace((step, each, last));
        // A device that does not run ahead has come to its end: its time is this step's.
        let ended = if before.is_none() && self.gpu.machine().waits() { self.begun.take() } else { before };
        Ok(ended.map(|b| self.end(b)).transpose()?)
    }

    /// The outputs `loss` of another program over batches: its params are those that are here.
    pub fn evaluate(
        &mut self,
        program: Program,
        batches: &[MicroBatch],
        store: &Store,
    ) -> Result<Vec<f32>, TrainError> {
        let id = self.gpu.load(program).map_err(TrainError::Load)?;
        if let Some(m) = batches.first().filter(|_| !self.resident) {
            self.upload(&m.dims, store)?;
        }
        let mut losses = vec![];
        for m in batches {
            let ticket = self.begin(id, &m.dims, &m.inputs)?;
            let out = scalars(self.gpu.machine().finish(ticket)?);
            losses.push(out.iter().find(|(n, _)| n == "loss").map_or(f32::NAN, |(_, v)| *v));
        }
        Ok(losses)
    }

    /// A step that is waited for, with the time of every step of the program that reads a batch.
    pub fn timed(
        &mut self,
        step: u64,
        batch: &[MicroBatch],
        store: &Store,
        times: &mut StepTimes,
    ) -> Result<Ended, TrainError> {
        let mut each = vec![];
        for m in batch {
            self.upload(&m.dims, store)?;
            let bytes: Vec<(&str, Bytes)> = m.inputs.iter().map(|(n, t)| (*n, Bytes::from_tensor(t.view()))).collect();
            let views: Vec<(&str, &Bytes)> = bytes.iter().map(|(n, b)| (*n, b)).collect();
            each.push(scalars(self.gpu.machine().run_timed(self.step, &m.dims, &views, &[], times)?));
        }
        let last = self.apply.map(|id| self.gpu.machine().run(id, &Bindings::default(), &[])).transpose()?;
        Ok((step, each, last.map(scalars)))
    }

    /// Waits for the step that was begun last; what it gave.
    pub fn finish(&mut self) -> Result<Option<Ended>, GpuError> {
        self.begun.take().map(|b| self.end(b)).transpose()
    }

    fn end(&mut self, (step, each, last): (u64, Vec<Ticket>, Option<Ticket>)) -> Result<Ended, GpuError> {
        let machine = self.gpu.machine();
        let each = each.into_iter().map(|t| machine.finish(t).map(scalars)).collect::<Result<_, _>>()?;
        Ok((step, each, last.map(|t| machine.finish(t).map(scalars)).transpose()?))
    }

    pub fn machine(&mut self) -> &mut Machine {
        self.gpu.machine()
    }
    /// Watches the next runs of programs; one of `runs` steps has as many as it has micro-batches, and its update.
    pub fn watch(&mut self, steps: usize, parts: usize) -> Result<(), GpuError> {
        let each = parts + usize::from(self.apply.is_some());
        self.gpu.machine().watch(steps * each)
    }
    pub fn watched(&mut self) -> Vec<RunTimes> {
        self.gpu.machine().watched()
    }
}
