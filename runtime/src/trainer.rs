//! Training: compiled steps over a store.
//!
//! A step is one Program (or two with gradient accumulation) and a pure function of the store and the batch, so a run
//! that stops and goes on gives the same bits as one that never stopped.

use crate::cpu::scratch;
use crate::executor::{ExecError, Executor, Outputs, StepTimes, emptied};
use crate::gpu::{GpuError, Machine as GpuMachine, RunTimes};
use crate::store::Store;
use crate::tensor::{Tensor, TensorRef};
use crate::trainer_gpu::{Ended, Gpu, OnGpu};
use rambac_codegen::program::SourceSlot;
use rambac_codegen::{FitError, Kernels, Machine, Memory, MemoryPlan, Program, lower, lower_for, plan};
use rambac_ir::ops::SourceKind;
use rambac_ir::{Bindings, Graph};
use rambac_passes::mixed::shadowed;
use rambac_passes::train_step::{AdamW, GRAD_NORM, accumulate, apply, train_step};
use rambac_passes::{AutodiffError, Options, Precision, optimise};
use std::sync::Arc;

/// Why training can't go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error(transparent)]
    Autodiff(#[from] AutodiffError),
    #[error(transparent)]
    Exec(#[from] ExecError),
    #[error(transparent)]
    Fit(#[from] FitError),
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// A program could not be made ready for its device.
    #[error("{0}")]
    Load(String),
    #[error("step {step}: the loss is {loss} and the gradient's norm {grad_norm}")]
    NotFinite { step: u64, loss: f32, grad_norm: f32 },
    #[error("{given} micro-batches for {expected} accumulation parts")]
    Parts { expected: usize, given: usize },
}

/// What one step reports.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Mean over the step's labelled tokens.
    pub loss: f32,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f32,
    pub lr: f32,
}

/// One micro-batch.
pub struct MicroBatch {
    pub dims: Bindings,
    pub inputs: Vec<(&'static str, Tensor)>,
}

/// Inputs of a run, empty between runs: kept for its allocation.
#[derive(Default)]
struct Views(Vec<(&'static str, TensorRef<'static>)>);

impl Views {
    /// Calls `f` with the inputs of `m`.
    fn with<R>(&mut self, m: &MicroBatch, f: impl FnOnce(&[(&str, TensorRef)]) -> R) -> R {
        let mut views = emptied(std::mem::take(&mut self.0));
        views.extend(m.inputs.iter().map(|(n, t)| (*n, t.view())));
        let r = f(&views);
        self.0 = emptied(views);
        r
    }
}

enum Programs {
    Whole(Executor),
    Parts { accumulate: Executor, apply: Box<Executor>, parts: usize },
    Gpu { on: Box<OnGpu>, parts: usize },
}

/// Bytes of the update that the accumulation of gradients does not hold anyway: its arena and the optimiser's states.
fn beside(apply: &Program, plan: &MemoryPlan) -> usize {
    let own = |s: &&SourceSlot| s.name.starts_with("optim.");
    plan.arena + apply.sources.iter().filter(own).map(|s| plan.sizes[s.buffer.index()]).sum::<usize>()
}

/// See the module's comment.
pub struct Trainer {
    programs: Programs,
    pub store: Store,
    views: Views,
    /// Of the program that reads the batch, and of the update where it is another.
    outputs: [Outputs; 2],
}

impl Trainer {
    /// Compiles the step of a loss graph.  `params` must hold every param; missing states start at zero.
    ///
    /// # Errors
    /// An op without a gradient; a limit of memory below what the step can do with.
    pub fn new(
        loss: &Graph,
        opt: &AdamW,
        decays: impl Fn(&str) -> bool,
        parts: usize,
        memory: &Memory,
        params: Store,
        pool: Arc<rayon::ThreadPool>,
    ) -> Result<Self, TrainError> {
        let compile = |g: Graph, reserved: usize| -> Result<Executor, TrainError> {
            let options =
                rambac_codegen::fit::options(&g, memory, &Machine::Cpu(scratch), reserved, &Options::default())?;
            let mut e = Executor::new(lower(&optimise(&g, &options)), pool.clone());
            e.guard(GRAD_NORM);
            Ok(e)
        };
        let programs = if parts <= 1 {
            Programs::Whole(compile(train_step(loss, opt, decays)?, 0)?)
        } else {
            // The update has no sizes of its own and nothing to compute again.
            let apply = lower(&optimise(&apply(loss, opt, decays, &[])?, &Options::default()));
            let reserved = beside(&apply, &plan(&apply, &Bindings::default(), scratch).map_err(FitError::from)?);
            let accumulate = compile(accumulate(loss)?, reserved)?;
            let mut apply = Box::new(Executor::new(apply, pool.clone()));
            apply.guard(GRAD_NORM);
            Programs::Parts { accumulate, apply, parts }
        };
        Ok(Self { programs, store: params, views: Views::default(), outputs: Default::default() })
    }

    /// As [`new`](Self::new), on a GPU; activations are kept in `precision`.
    ///
    /// # Errors
    /// As [`new`](Self::new); a step that the device has no kernel for.
    #[allow(clippy::too_many_arguments)]
    pub fn on_gpu(
        loss: &Graph,
        opt: &AdamW,
        decays: impl Fn(&str) -> bool,
        parts: usize,
        memory: &Memory,
        precision: Precision,
        params: Store,
        gpu: Box<dyn Gpu>,
    ) -> Result<Self, TrainError> {
        let machine = Machine::Gpu(gpu.target());
        let others = Options { precision, ..Options::default() };
        let compile = |g: &Graph, reserved: usize| -> Result<Graph, TrainError> {
            Ok(optimise(g, &rambac_codegen::fit::options(g, memory, &machine, reserved, &others)?))
        };
        let (step, update) = if parts <= 1 {
            (compile(&train_step(loss, opt, decays)?, 0)?, None)
        } else {
            let micro = accumulate(loss)?;
            // What is computed again changes no source.
            let read = optimise(&micro, &others);
            let shadows: Vec<&str> = shadowed(&read).collect();
            let apply = optimise(&apply(loss, opt, decays, &shadows)?, &Options::default());
            let (program, plans) = machine.plans(&apply, &[Bindings::default()])?;
            let reserved = beside(&program, &plans[0]) - plans[0].arena;
            (compile(&micro, reserved)?, Some(apply))
        };
        let program = |g: &Graph| lower_for(g, Kernels::Gpu);
        let on = Box::new(OnGpu::new(gpu, program(&step), update.as_ref().map(program))?);
        let programs = Programs::Gpu { on, parts };
        Ok(Self { programs, store: params, views: Views::default(), outputs: Default::default() })
    }

    /// Brings what the device holds to [`store`](Self::store): parameters, optimiser, carried states.
    ///
    /// # Errors
    /// The device fails.
    pub fn sync(&mut self) -> Result<(), TrainError> {
        if let Programs::Gpu { on, .. } = &mut self.programs {
            on.download(&mut self.store)?;
        }
        Ok(())
    }

    /// Mean over batches of the output `loss` of a graph whose params are those that are trained, as they are now: made and run
    /// where training runs, in f32.
    ///
    /// # Errors
    /// A refused input; a step that the device has no kernel for; the device fails.
    pub fn evaluate(
        &mut self,
        loss: &Graph,
        batches: &[MicroBatch],
        pool: &Arc<rayon::ThreadPool>,
    ) -> Result<f32, TrainError> {
        // A limit of memory holds for this too, whose forward keeps nothing.
        self.rest();
        let g = optimise(loss, &Options::default());
        let mut sum = 0.0;
        if let Programs::Gpu { on, .. } = &mut self.programs {
            let losses = on.evaluate(lower_for(&g, Kernels::Gpu), batches, &self.store)?;
            sum = losses.iter().sum();
        } else {
            let mut e = Executor::new(lower(&g), pool.clone());
            for m in batches {
                let views: Vec<(&str, TensorRef)> = m.inputs.iter().map(|(n, t)| (*n, t.view())).collect();
                let out = e.run(&m.dims, &views, &mut self.store)?;
                let loss = out.iter().find(|(n, _)| n == "loss").and_then(|(_, t)| t.as_f32()?.first().copied());
                sum += loss.unwrap_or(f32::NAN);
            }
        }
        Ok(sum / batches.len().max(1) as f32)
    }

    /// Gives the memory of activations on this machine back until the next step.
    pub fn rest(&mut self) {
        match &mut self.programs {
            Programs::Whole(e) => e.rest(),
            Programs::Parts { accumulate, apply, .. } => {
                accumulate.rest();
                apply.rest();
            }
            Programs::Gpu { .. } => {}
        }
    }

    /// Gives a state a value.
    ///
    /// # Errors
    /// The device fails.
    pub fn set(&mut self, name: &str, t: Tensor) -> Result<(), TrainError> {
        if let Programs::Gpu { on, .. } = &mut self.programs {
            on.set(name, &t)?;
        }
        self.store.insert(name, t);
        Ok(())
    }

    /// The program that reads a batch.
    pub fn program(&mut self) -> &Program {
        match &mut self.programs {
            Programs::Whole(e) | Programs::Parts { accumulate: e, .. } => e.program(),
            Programs::Gpu { on, .. } => on.program(),
        }
    }

    /// The memory plan of the whole step at `dims`: with accumulation both programs', whose arenas exist at once.
    ///
    /// # Errors
    /// A dim without a value.
    pub fn plan(&mut self, dims: &Bindings) -> Result<MemoryPlan, TrainError> {
        Ok(match &mut self.programs {
            Programs::Whole(e) => e.plan(dims).map_err(FitError::from)?,
            Programs::Parts { accumulate, apply, .. } => {
                let mut all = accumulate.plan(dims).map_err(FitError::from)?;
                let update = apply.plan(&Bindings::default()).map_err(FitError::from)?;
                all.arena += update.arena;
                all.persistent += beside(apply.program(), &update) - update.arena;
                all
            }
            Programs::Gpu { on, .. } => on.plan(dims)?,
        })
    }

    /// States that the store lacks, or that have another shape (carried states of another batch size), become zero.
    fn prepare(&mut self, dims: &Bindings) -> Result<(), ExecError> {
        let (first, second) = match &mut self.programs {
            Programs::Whole(e) => (e, None),
            Programs::Parts { accumulate, apply, .. } => (accumulate, Some(&mut **apply)),
            Programs::Gpu { .. } => return Ok(()),
        };
        for e in std::iter::once(first).chain(second) {
            e.sources(dims, |slot, ty| {
                let other_batch = |t: &Tensor| slot.name.starts_with("carry.") && !t.is(ty);
                if slot.kind == SourceKind::State && self.store.get(&slot.name).is_none_or(other_batch) {
                    self.store.insert(slot.name.clone(), Tensor::zeros(ty));
                }
            })?;
        }
        Ok(())
    }

    /// One step over `batch`, which has as many micro-batches as the trainer has parts.
    ///
    /// # Errors
    /// A refused input, or a loss or gradient that is not finite: where the gradient's norm is not, parameters and moments on this
    /// machine's cores are then what they were before the step; a GPU's are spoilt.
    pub fn step(&mut self, step: u64, batch: &[MicroBatch]) -> Result<StepReport, TrainError> {
        self.step_timed(step, batch, None)
    }

    /// Starts a step; the report of a step that is known now, with its number.  On this machine's cores that is this one; a GPU
    /// runs it while the host makes the next batch, and what is known then is the one before: [`finish`](Self::finish) waits
    /// for the last.
    ///
    /// # Errors
    /// As [`step`](Self::step), of the step that is reported; the one that was started since is then spoilt, too.
    pub fn start(&mut self, step: u64, batch: &[MicroBatch]) -> Result<Option<(u64, StepReport)>, TrainError> {
        match &mut self.programs {
            Programs::Gpu { on, parts } if batch.len() == *parts => {
                on.start(step, batch, &self.store)?.map(gpu_report).transpose()
            }
            _ => self.step(step, batch).map(|r| Some((step, r))),
        }
    }

    /// Waits for the step that was started last; its report, if that is still to come.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn finish(&mut self) -> Result<Option<(u64, StepReport)>, TrainError> {
        match &mut self.programs {
            Programs::Gpu { on, .. } => on.finish()?.map(gpu_report).transpose(),
            _ => Ok(None),
        }
    }

    /// The device and its programs, where it trains on one.
    pub fn machine(&mut self) -> Option<&mut GpuMachine> {
        match &mut self.programs {
            Programs::Gpu { on, .. } => Some(on.machine()),
            _ => None,
        }
    }

    /// On a GPU: watches the next steps, op by op.
    ///
    /// # Errors
    /// The device fails.
    pub fn watch(&mut self, steps: usize) -> Result<(), TrainError> {
        match &mut self.programs {
            Programs::Gpu { on, parts } => Ok(on.watch(steps, *parts)?),
            _ => Ok(()),
        }
    }

    /// Runs on a GPU that were watched since the last call.
    pub fn watched(&mut self) -> Vec<RunTimes> {
        match &mut self.programs {
            Programs::Gpu { on, .. } => on.watched(),
            _ => vec![],
        }
    }

    /// As [`step`](Self::step); adds the time of every step of [`program`](Self::program) to `times`; on a GPU such a step is
    /// started op by op, not replayed.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_timed(
        &mut self,
        step: u64,
        batch: &[MicroBatch],
        mut times: Option<&mut StepTimes>,
    ) -> Result<StepReport, TrainError> {
        let expected = match &self.programs {
            Programs::Whole(_) => 1,
            Programs::Parts { parts, .. } | Programs::Gpu { parts, .. } => *parts,
        };
        if batch.len() != expected {
            return Err(TrainError::Parts { expected, given: batch.len() });
        }
        for m in batch {
            self.prepare(&m.dims)?;
        }
        let scalar = |out: &Outputs, name: &str| {
            out.iter().find(|(n, _)| n == name).and_then(|(_, t)| t.as_f32()?.first().copied()).unwrap_or(f32::NAN)
        };
        if let Programs::Gpu { on, .. } = &mut self.programs {
            if let Some(before) = on.finish()? {
                gpu_report(before)?;
            }
            let ended = match times {
                Some(times) => on.timed(step, batch, &self.store, times)?,
                None => match on.start(step, batch, &self.store)? {
                    Some(ended) => ended,
                    None => on.finish()?.expect("BUG: a step was begun above"),
                },
            };
            return Ok(gpu_report(ended)?.1);
        }
        let Self { programs, store, views, outputs: [out, last] } = self;
        let (loss, last) = match programs {
            Programs::Whole(e) => {
                views.with(&batch[0], |inputs| e.run_into(&batch[0].dims, inputs, store, out, times))?;
                (scalar(out, "loss"), out)
            }
            Programs::Parts { accumulate, apply, .. } => {
                let (mut sum, mut tokens) = (0.0, 0.0);
                for m in batch {
                    let times = times.as_deref_mut();
                    views.with(m, |inputs| accumulate.run_into(&m.dims, inputs, store, out, times))?;
                    sum += scalar(out, "loss_sum");
                    tokens += scalar(out, "tokens");
                }
                apply.run_into(&Bindings::default(), &[], store, last, None)?;
                (sum / tokens.max(1e-6), last)
            }
            Programs::Gpu { .. } => unreachable!("BUG: returned above"),
        };
        let scalar = |name: &str| scalar(last, name);
        finite(step, StepReport { loss, grad_norm: scalar(GRAD_NORM), lr: scalar("lr") })
    }
}

/// The report, if its numbers are.
fn finite(step: u64, r: StepReport) -> Result<StepReport, TrainError> {
    if !r.loss.is_finite() || !r.grad_norm.is_finite() {
        return Err(TrainError::NotFinite { step, loss: r.loss, grad_norm: r.grad_norm });
    }
    Ok(r)
}

/// The report of a step from the outputs of its micro-batches, and of its update where that is a program of its own.
fn gpu_report((step, each, last): Ended) -> Result<(u64, StepReport), TrainError> {
    let of = |out: &[(String, f32)], name: &str| out.iter().find(|(n, _)| n == name).map_or(f32::NAN, |(_, v)| *v);
    let (loss, update) = match &last {
        None => (of(&each[0], "loss"), &each[0]),
        Some(update) => {
            let sum = |name: &str| each.iter().map(|out| of(out, name)).sum::<f32>();
            (sum("loss_sum") / sum("tokens").max(1e-6), update)
        }
    };
    let report = StepReport { loss, grad_norm: of(update, GRAD_NORM), lr: of(update, "lr") };
    Ok((step, finite(step, report)?))
}
