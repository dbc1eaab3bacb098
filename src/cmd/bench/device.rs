//! What `rambac bench` runs on a GPU: programs with random operands that stay there, timed by its own clock.

use super::{Bencher, Limits, Timed, WARM_UP, ops};
use crate::cli::PrecisionArg;
use crate::device::{Gpu, On};
use crate::error::{Result, wrap};
use half::bf16;
use miette::miette;
use rambac_codegen::{Kernels, MemoryPlan, Program, lower_for};
use rambac_ir::ops::SourceKind;
use rambac_ir::ty::ConcreteTy;
use rambac_ir::{DType, Graph};
use rambac_models::data::rng;
use rambac_passes::{Options, optimise};
use rambac_runtime::executor::StepTimes;
use rambac_runtime::gpu::{Bytes, Device, ProgramId};
use rambac_runtime::{MicroBatch, Store};
use rand::Rng;
use std::time::{Duration, Instant};

/// Random numbers that are made; arrays repeat them.
const RANDOM: usize = (1 << 20) + 7;

/// What a device reaches in plain work, and in products of this precision.
///
/// # Errors
/// It has no clock, or no memory for that.
pub fn limits(on: On, precision: PrecisionArg) -> Result<Limits> {
    let mut gpu = Gpu::open(on)?;
    let rates = gpu.machine.rates().map_err(wrap)?;
    let of = gpu.machine.device().name().to_string();
    let rates = rates.ok_or_else(|| {
        let help = "use --device cpu, or a CUDA driver of version 12.8 or later";
        miette!(help = help, "{of} has no clock, so there is nothing to time")
    })?;
    let (gemm, name) = match precision {
        PrecisionArg::Bf16 => (rates.bf16, "bf16"),
        PrecisionArg::F32 => (rates.f32, "f32"),
    };
    Ok(Limits { of, gpu: true, products: format!("large products in {name}"), gemm, copy: rates.copy })
}

/// Random floats in a range, of which only the first [`RANDOM`] are made.
fn pattern(ty: &ConcreteTy, (low, high): (f32, f32), key: usize) -> Vec<u8> {
    let mut r = rng::stream(0, "bench", &[key as u64]);
    let n = ty.elements();
    let some: Vec<f32> = (0..n.min(RANDOM)).map(|_| r.random_range(low..high)).collect();
    let bytes: Vec<u8> = match ty.dtype {
        DType::BF16 => some.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        _ => some.iter().flat_map(|x| x.to_le_bytes()).collect(),
    };
    let mut all = Vec::with_capacity(ty.bytes());
    while all.len() < ty.bytes() {
        all.extend_from_slice(&bytes[..bytes.len().min(ty.bytes() - all.len())]);
    }
    all
}

/// A program on a device.
struct Loaded {
    gpu: Gpu,
    id: ProgramId,
    plan: MemoryPlan,
}

impl Bencher<'_> {
    fn load(&self, g: &Graph) -> Result<Loaded> {
        let precision = self.a.place.precision.unwrap_or_default().into();
        let program = lower_for(&optimise(g, &Options { precision, ..Options::default() }), Kernels::Gpu);
        let (mut gpu, id) = self.pool.install(|| {
            let mut gpu = Gpu::open(self.a.place.device)?.at(vec![self.dims.clone()]);
            let id = gpu.compile(program)?;
            Result::Ok((gpu, id))
        })?;
        let plan = gpu.machine.program(id).plan(&self.dims).map_err(wrap)?;
        if let Some(space) = gpu.machine.device().space().map_err(wrap)? {
            self.room(&plan, "the device", space.total, space.free)?;
        }
        Ok(Loaded { gpu, id, plan })
    }

    /// Only the steps `op` of a program count.
    pub fn op_on_device(&self, g: &Graph, direction: &str, op: &str) -> Result<Timed> {
        let mut l = self.load(g)?;
        let p = l.gpu.machine.program(l.id).clone();
        for (i, s) in p.program.sources.iter().enumerate() {
            let ty = s.ty.bind(&self.dims).map_err(wrap)?;
            let data = match ty.dtype {
                DType::I32 => self.choices(&s.name, &ty).iter().flat_map(|x| x.to_le_bytes()).collect(),
                _ => pattern(&ty, ops::range(&s.name), i),
            };
            l.gpu.machine.set(&s.name, &Bytes { ty, data }).map_err(wrap)?;
        }
        self.run_on_device(l, format!("{} {direction}", g.name), &[], |s| s.op.mnemonic() == op)
    }

    /// The loss of a batch.
    pub fn forward_on_device(&self, g: &Graph, params: &Store, batch: &MicroBatch) -> Result<Timed> {
        let mut l = self.load(g)?;
        let p = l.gpu.machine.program(l.id).clone();
        for s in p.program.sources.iter().filter(|s| s.kind != SourceKind::Input) {
            let mut t = params.get(&s.name).ok_or_else(|| miette!("BUG: {} has no value", s.name))?.clone();
            if s.ty.dtype == DType::BF16 {
                t.narrow();
            }
            l.gpu.machine.set(&s.name, &Bytes::from_tensor(t.view())).map_err(wrap)?;
        }
        let inputs: Vec<(&str, Bytes)> = batch.inputs.iter().map(|(n, t)| (*n, Bytes::from_tensor(t.view()))).collect();
        self.run_on_device(l, "forward".into(), &inputs, |_| true)
    }

    /// Runs a program whose sources are there: the wanted steps alone by the device's clock, or the whole by the host's.
    fn run_on_device(
        &self,
        mut l: Loaded,
        name: String,
        inputs: &[(&str, Bytes)],
        wanted: impl Fn(&rambac_codegen::program::Step) -> bool,
    ) -> Result<Timed> {
        let p = l.gpu.machine.program(l.id).clone();
        let program: &Program = &p.program;
        let wanted: Vec<bool> = program.steps.iter().map(wanted).collect();
        if !wanted.contains(&true) {
            return Err(miette!("BUG: the program of {name} holds no step that was to be timed"));
        }
        let inputs: Vec<(&str, &Bytes)> = inputs.iter().map(|(n, b)| (*n, b)).collect();
        let names: Vec<String> = program.outputs.iter().filter(|o| !o.update).map(|o| o.name.to_string()).collect();
        let large = |n: &str| n != "loss";
        let kept: Vec<String> = names.iter().map(|n| format!("kept.{n}")).collect();
        let keep: Vec<(&str, &str)> =
            names.iter().zip(&kept).filter(|(n, _)| large(n)).map(|(n, k)| (n.as_str(), k.as_str())).collect();
        let (mut seconds, mut steps) = (vec![], StepTimes::new());
        let whole = wanted.iter().all(|w| *w);
        for run in 0..WARM_UP + self.a.runs {
            let mut times = StepTimes::new();
            let began = Instant::now();
            if whole {
                l.gpu.machine.run_keeping(l.id, &self.dims, &inputs, &keep).map_err(wrap)?;
            } else {
                l.gpu.machine.run_timed(l.id, &self.dims, &inputs, &keep, &mut times).map_err(wrap)?;
            }
            if run < WARM_UP {
                continue;
            }
            let of_steps = || times.iter().zip(&wanted).filter(|(_, w)| **w).map(|(t, _)| t.as_secs_f64()).sum();
            seconds.push(if whole { began.elapsed().as_secs_f64() } else { of_steps() });
            steps.resize(program.steps.len(), Duration::ZERO);
            steps.iter_mut().zip(&times).for_each(|(s, t)| *s += *t);
        }
        if whole {
            // Step by step it takes longer: apart from the runs that count.
            steps.clear();
            l.gpu.machine.run_timed(l.id, &self.dims, &inputs, &keep, &mut steps).map_err(wrap)?;
            steps.iter_mut().for_each(|t| *t *= self.a.runs as u32);
        }
        seconds.sort_by(f64::total_cmp);
        let device = l.gpu.machine.device().space().map_err(wrap)?.map(|s| s.total - s.free);
        let mut t = self.timed(&name, program.clone(), l.plan, seconds, steps)?;
        t.cost = t.costs.iter().zip(&wanted).filter(|(_, w)| **w).map(|(c, _)| *c).sum();
        t.device = device;
        Ok(t)
    }
}
