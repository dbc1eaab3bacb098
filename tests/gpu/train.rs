//! Training on a GPU: losses like the CPU's, and runs that go on on the other device.

use crate::harness::Case;
use crate::rig::{NOT_HERE, Rig, cache, schedules};
use rambac_codegen::Memory;
use rambac_codegen::Program;
use rambac_codegen::cuda::{Arch, Cache, Target, emit};
use rambac_codegen::nvrtc::Nvrtc;
use rambac_driver::testing::{Fault, Faulty, INJECTED, Late};
use rambac_ir::Bindings;
use rambac_ir::testing::Rng;
use rambac_models::stack::{self, Carry};
use rambac_models::{Config, InitRule, ModelType, init_tensor, preset};
use rambac_passes::Precision;
use rambac_passes::train_step::AdamW;
use rambac_runtime::checkpoint::{Checkpoint, CheckpointDir, CheckpointError, Snapshot, TensorRef};
use rambac_runtime::gpu::{Code, Device, Machine, Placement, ProgramId};
use rambac_runtime::trainer_gpu::Gpu;
use rambac_runtime::{MicroBatch, Store, Tensor, TrainError, Trainer};
use rambac_simulator::device::Simulator;
use serde_json::Value as Json;
use std::path::Path;
use std::sync::Arc;

pub const ALL: &[Case] = &[
    ("training_ramba", ramba),
    ("training_mamba2", mamba2),
    ("training_accumulated", accumulated),
    ("training_moves", moves),
    ("training_runs_ahead", ahead),
    ("training_loses_its_device", lost),
    ("training_is_traced", traced),
    ("training_variants", variants),
    ("training_is_validated_where_it_runs", validated),
];

/// Largest relative distance of a step's loss from the CPU's, over all steps.
const F32: f32 = 1e-5;
const BF16: f32 = 0.01;

/// A device that loads programs.
struct Tested {
    arch: Arch,
    machine: Machine,
    nvrtc: Nvrtc,
    cache: Cache,
}

impl Gpu for Tested {
    fn machine(&mut self) -> &mut Machine {
        &mut self.machine
    }
    fn target(&self) -> Target {
        Target::of(self.arch)
    }
    fn load(&mut self, program: Program) -> Result<ProgramId, String> {
        let gpu = Arc::new(emit(program, self.target()).map_err(|e| e.to_string())?);
        let code = Code::compile(&self.nvrtc, &[&gpu], &self.cache).map_err(|e| e.to_string())?;
        self.machine.load(gpu, &code).map_err(|e| e.to_string())
    }
}

fn optimiser() -> AdamW {
    AdamW { lr: 4e-3, warmup: 4, steps: 100, ..AdamW::default() }
}

/// As the command tells weights from what else a run has.
fn is_weight(name: &str) -> bool {
    ["optim.", "carry.", "accum."].iter().all(|p| !name.starts_with(p))
}

fn decays(name: &str) -> bool {
    name.ends_with("proj.weight")
}

struct Bench<'a> {
    rig: &'a Rig,
    config: Config,
    parts: usize,
    memory: Memory,
}

const STEPS: u64 = 20;
const FEW: u64 = 5;

impl<'a> Bench<'a> {
    fn new(rig: &'a Rig, config: Config) -> Bench<'a> {
        Bench { rig, config, parts: 1, memory: Memory::Keep }
    }

    fn weights(&self) -> Store {
        let mut s = Store::default();
        for p in self.config.parameters_with(InitRule::FanIn) {
            s.insert(p.name.clone(), Tensor::f32(&p.shape, init_tensor(&p, 5)));
        }
        s
    }

    /// On the GPU in a precision, or on the CPU.
    fn trainer(&self, on: Option<Precision>, store: Store) -> Result<Trainer, String> {
        let loss = stack::loss(&self.config, Carry::States, false).map_err(|e| format!("{e:?}"))?;
        let (opt, decays) = (optimiser(), decays);
        let Some(precision) = on else {
            let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("two threads"));
            return Trainer::new(&loss, &opt, decays, self.parts, &self.memory, store, pool).map_err(|e| e.to_string());
        };
        let device: Box<dyn Device> = self.rig.device(schedules()[1])?;
        let placement = if self.rig.cuda.is_some() { Placement::Arena } else { Placement::Apart };
        self.trainer_on(device, placement, precision, store)
    }

    fn trainer_on(
        &self,
        device: Box<dyn Device>,
        placement: Placement,
        precision: Precision,
        store: Store,
    ) -> Result<Trainer, String> {
        let loss = stack::loss(&self.config, Carry::States, false).map_err(|e| format!("{e:?}"))?;
        let gpu = Tested {
            arch: self.rig.arch(),
            machine: Machine::new(device, placement),
            nvrtc: Nvrtc::open(&self.rig.nvrtc.path).map_err(|e| e.to_string())?,
            cache: cache(),
        };
        let opt = optimiser();
        Trainer::on_gpu(&loss, &opt, decays, self.parts, &self.memory, precision, store, Box::new(gpu))
            .map_err(|e| e.to_string())
    }

    /// The batch of a step: a pattern that repeats, so that there is something to learn, with other letters each time.
    fn batch(&self, step: u64) -> Vec<MicroBatch> {
        let len = self.config.chunk_size * 3;
        let part = |k: usize| {
            let mut rng = Rng(1000 * step + k as u64);
            let word: Vec<i32> = (0..8).map(|_| rng.below(32) as i32).collect();
            let ids: Vec<i32> = (0..len).map(|t| word[t % word.len()]).collect();
            let labels = (0..len).map(|t| word[(t + 1) % word.len()]).collect();
            let inputs = vec![
                ("input_ids", Tensor::i32(&[1, len], ids)),
                ("labels", Tensor::i32(&[1, len], labels)),
                ("loss_weights", Tensor::f32(&[1, len], vec![1.0; len])),
                ("carry", Tensor::f32(&[1], vec![(step % 2) as f32])),
            ];
            MicroBatch { dims: Bindings::new([("N", 1), ("L", len)]), inputs }
        };
        (0..self.parts).map(part).collect()
    }

    /// A checkpoint, as a run writes it and another one reads it.
    fn through_disk(&self, store: &Store, step: u64) -> Result<Store, String> {
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        self.save(dir.path(), store, step)?;
        let back = self.read(dir.path())?;
        if back.0 != store.0 {
            return Err("what came back from the disk is another store".into());
        }
        Ok(back)
    }

    fn save(&self, dir: &Path, store: &Store, step: u64) -> Result<(), String> {
        let text = |e: CheckpointError| e.to_string();
        let folder = CheckpointDir::open(dir, None).map_err(text)?;
        let part = |weights: bool| store.0.iter().filter(move |(n, _)| is_weight(n) == weights);
        if let Some((n, _)) = part(true).chain(part(false)).find(|(_, t)| t.as_f32().is_none()) {
            return Err(format!("{n} is no f32"));
        }
        let tensors = |weights: bool| -> Vec<TensorRef> {
            part(weights).filter_map(|(n, t)| Some(TensorRef::f32(n.as_str(), &t.shape, t.as_f32()?))).collect()
        };
        let (weights, state) = (tensors(true), tensors(false));
        let snapshot =
            Snapshot { config: &self.config.to_json(), weights: &weights, state: &state, trainer: "{}", files: &[] };
        folder.save(step, &snapshot).map(drop).map_err(text)
    }

    fn read(&self, dir: &Path) -> Result<Store, String> {
        let c = Checkpoint::open(dir).map_err(|e| e.to_string())?;
        let mut back = Store::default();
        for f in [&c.model, &c.state] {
            for name in f.names() {
                let (shape, v) = f.get_f32(name).map_err(|e| e.to_string())?;
                back.insert(name, Tensor::f32(&shape, v));
            }
        }
        Ok(back)
    }

    fn run(&self, t: &mut Trainer, steps: std::ops::Range<u64>) -> Result<Vec<f32>, String> {
        steps.map(|s| t.step(s, &self.batch(s)).map(|r| r.loss).map_err(|e| e.to_string())).collect()
    }

    /// Losses of both devices beside each other.
    fn compare(&self, precision: Precision, steps: u64, most: f32) -> Result<String, String> {
        let cpu = self.run(&mut self.trainer(None, self.weights())?, 0..steps)?;
        let gpu = self.run(&mut self.trainer(Some(precision), self.weights())?, 0..steps)?;
        let worst = cpu.iter().zip(&gpu).map(|(a, b)| (a - b).abs() / a).fold(0.0, f32::max);
        if worst.is_nan() || worst > most {
            return Err(format!("losses {worst:.1e} apart, {most:.1e} allowed:\n{cpu:?}\n{gpu:?}"));
        }
        let (first, last) = (cpu[0], cpu[cpu.len() - 1]);
        if steps == STEPS && last > 0.9 * first {
            return Err(format!("nothing was learnt: {first} → {last}"));
        }
        Ok(format!(", {precision:?}: {first:.3} → {last:.3}, {worst:.1e} apart"))
    }
}

/// Every kind of layer, as small as kernels with tiles allow.
fn small() -> Result<Config, String> {
    let tiny = preset("tiny").map_err(|e| e.to_string())?;
    Ok(Config { num_lower_layers: 1, num_upper_layers: 1, num_upper_groups: 1, num_mamba_per_gca: 1, ..tiny })
}

fn plain() -> Result<Config, String> {
    Ok(Config { model_type: ModelType::Mamba2, num_upper_groups: 0, ..small()? })
}

fn ramba(rig: &Rig) -> Result<String, String> {
    let b = Bench::new(rig, small()?);
    Ok(b.compare(Precision::F32, STEPS, F32)? + &b.compare(Precision::Bf16, FEW, BF16)?)
}

fn mamba2(rig: &Rig) -> Result<String, String> {
    let b = Bench::new(rig, plain()?);
    Ok(b.compare(Precision::F32, FEW, F32)? + &b.compare(Precision::Bf16, STEPS, BF16)?)
}

/// A variant of attention between Mamba-2 blocks: a joint softmax over chosen chunks and the own one.  What single ops give is seen
/// by `variants`.
fn variants(rig: &Rig) -> Result<String, String> {
    let attention = Some(rambac_models::Attention::named("moba")?);
    let c = Config { attention, encoder_layers: 0, ..small()? };
    Bench::new(rig, c).compare(Precision::Bf16, 1, BF16)
}

/// Two micro-batches a step, with everything computed again.
fn accumulated(rig: &Rig) -> Result<String, String> {
    let mut b = Bench::new(rig, plain()?);
    (b.parts, b.memory) = (2, Memory::Recompute);
    Ok(b.compare(Precision::F32, 2, F32)? + &b.compare(Precision::Bf16, 2, BF16)?)
}

/// A run that changes its device goes on: what moves is f32 and the same bits on both sides.
fn moves(rig: &Rig) -> Result<String, String> {
    let b = Bench::new(rig, plain()?);
    let stay = b.run(&mut b.trainer(None, b.weights())?, 0..6)?;
    let mut losses = vec![];
    let mut store = b.weights();
    for (at, on) in [None, Some(Precision::F32), None].into_iter().enumerate() {
        let mut t = b.trainer(on, store)?;
        losses.extend(b.run(&mut t, 2 * at as u64..2 * (at as u64 + 1))?);
        t.sync().map_err(|e| e.to_string())?;
        store = b.through_disk(&t.store, at as u64)?;
    }
    let worst = stay.iter().zip(&losses).map(|(a, b)| (a - b).abs() / a).fold(0.0, f32::max);
    if worst.is_nan() || worst > F32 {
        return Err(format!("losses {worst:.1e} apart:\n{stay:?}\n{losses:?}"));
    }
    // bf16 copies stay where they are.
    let before = store.clone();
    let mut t = b.trainer(Some(Precision::Bf16), store)?;
    b.run(&mut t, 6..7)?;
    t.sync().map_err(|e| e.to_string())?;
    if let Some(n) = t.store.names().find(|n| before.get(n).is_none() && !n.starts_with("carry.")) {
        return Err(format!("{n} is new in the store: a checkpoint would differ from the CPU's"));
    }
    Ok(format!(", {worst:.1e} apart"))
}

/// A step is started before anyone looks at how the one before went, on a device that does all as late as may be: the same
/// losses, in the same order, and what is not finite is told by the number of its step.
fn ahead(rig: &Rig) -> Result<String, String> {
    if rig.cuda.is_some() {
        return Err(format!("{NOT_HERE} what is as late as may be: it is for the simulator"));
    }
    let mut b = Bench::new(rig, plain()?);
    for parts in [1, 2] {
        b.parts = parts;
        let want = b.run(&mut b.trainer(Some(Precision::F32), b.weights())?, 0..4)?;
        let device = Faulty::new(Late::new(Simulator::strict(schedules()[1])), None);
        let seen = device.seen();
        let mut t = b.trainer_on(Box::new(device), Placement::Arena, Precision::F32, b.weights())?;
        let mut got = vec![];
        for s in 0..4 {
            let before = seen.calls().len();
            let known = t.start(s, &b.batch(s)).map_err(|e| e.to_string())?;
            let told = known.map(|(n, _)| n);
            if told != s.checked_sub(1) {
                return Err(format!("step {s} was started, and {told:?} is known"));
            }
            got.extend(known.map(|(_, r)| r.loss));
            // The first steps are started op by op, and each is waited for.
            if s == 3 && seen.calls()[before..].contains(&"synchronise") {
                return Err(format!("step {s} was waited for"));
            }
        }
        got.extend(t.finish().map_err(|e| e.to_string())?.map(|(_, r)| r.loss));
        if got != want {
            return Err(format!("{got:?}, {want:?} wanted"));
        }
        let mut broken = b.batch(4);
        broken[0].inputs[2].1 = Tensor::f32(&[1, b.config.chunk_size * 3], vec![f32::NAN; b.config.chunk_size * 3]);
        t.start(4, &broken).map_err(|e| e.to_string())?;
        match t.start(5, &b.batch(5)) {
            Err(TrainError::NotFinite { step: 4, .. }) => {}
            other => return Err(format!("a loss that is no number: {other:?}")),
        }
        drop(t);
        if seen.live() + seen.records() > 0 {
            return Err(format!("{} buffers and {} records live on", seen.live(), seen.records()));
        }
    }
    Ok(String::new())
}

/// A device that is lost within a step, or while a checkpoint's values are read: an error that says so and what to do, nothing is
/// left, and the checkpoint before is whole and goes on elsewhere.
fn lost(rig: &Rig) -> Result<String, String> {
    if rig.cuda.is_some() {
        return Err(format!("{NOT_HERE} injected faults: they are for the simulator"));
    }
    let b = Bench::new(rig, plain()?);
    // Two steps, a checkpoint, two more and the values of another one; the calls after each, and what became of the last two.
    let train = |fails| {
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        let device = Faulty::new(Late::new(Simulator::strict(schedules()[1])), fails);
        let seen = device.seen();
        let mut t = b.trainer_on(Box::new(device), Placement::Arena, Precision::F32, b.weights())?;
        b.run(&mut t, 0..2)?;
        t.sync().map_err(|e| e.to_string())?;
        b.save(dir.path(), &t.store, 2)?;
        let (saved, store) = (seen.calls().len(), t.store.clone());
        let ran = b.run(&mut t, 2..4);
        let stepped = seen.calls().len();
        let ended = ran.and_then(|_| t.sync().map_err(|e| e.to_string()));
        let calls = [saved, stepped, seen.calls().len()];
        drop(t);
        Ok::<_, String>((calls, dir, store, ended, seen))
    };
    let ([saved, stepped, all], dir, _, ended, _) = train(None)?;
    ended?;
    let places = [saved, (saved + stepped) / 2, stepped - 1, stepped, (stepped + all) / 2, all - 1];
    for at in places {
        let (_, dir, store, ended, seen) = train(Some((at, Fault::Lost)))?;
        match ended {
            Err(e) if e.contains(INJECTED) && e.contains("start anew from the last checkpoint") => {}
            other => return Err(format!("call {at} of {all}: {other:?}")),
        }
        if seen.live() + seen.records() > 0 {
            return Err(format!("call {at}: {} buffers and {} records live on", seen.live(), seen.records()));
        }
        if b.read(dir.path())?.0 != store.0 {
            return Err(format!("call {at}: the checkpoint is another"));
        }
    }
    let losses = b.run(&mut b.trainer(None, b.read(dir.path())?)?, 2..4)?;
    if losses.iter().all(|l| l.is_finite()) {
        Ok(format!(", {} times", places.len()))
    } else {
        Err(format!("{losses:?}"))
    }
}

/// `train --profile` on the simulator: every step of every run, in order, with what it cost; no share of a limit, for there is no
/// clock.
fn traced(rig: &Rig) -> Result<String, String> {
    if rig.cuda.is_some() {
        return Err(format!("{NOT_HERE} the command on the simulator"));
    }
    let c = plain()?;
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let at = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(at("config.json"), c.to_json()).map_err(|e| e.to_string())?;
    let len = (c.chunk_size * 2).to_string();
    let run = std::process::Command::new(env!("CARGO_BIN_EXE_rambac"))
        .args(["train", &at("config.json"), "--device", "simulator", "--len", &len, "--batch", "1", "--steps", "3"])
        .args(["--task", "copy", "--profile", &at("t.json"), "--profile-steps", "2", "--out", &at("run"), "--json"])
        .env("RAMBAC_NVRTC", &rig.nvrtc.path)
        .env("RAMBAC_CACHE", concat!(env!("CARGO_TARGET_TMPDIR"), "/kernels"))
        .output()
        .map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&run.stderr);
    if !run.status.success() || !said.contains("the simulator has no clock") {
        return Err(format!("{}: {said}", run.status));
    }
    let text = std::fs::read_to_string(at("t.json")).map_err(|e| e.to_string())?;
    let all: Vec<Json> = serde_json::from_str(&text).map_err(|e| e.to_string())?;
    let of = |tid: u64, ph: &str| -> Vec<&Json> {
        all.iter().filter(|e| e["pid"] == 2 && e["ph"] == ph && (ph == "C" || e["tid"] == tid)).collect()
    };
    let (runs, steps, copies) = (of(1, "X"), of(2, "X"), of(3, "X"));
    let ordered = steps.windows(2).all(|w| w[0]["ts"].as_f64() <= w[1]["ts"].as_f64());
    let told =
        |e: &&&Json| e["args"]["form"].is_string() && e["args"]["flops"].is_f64() && e["args"]["of_limit"].is_null();
    if runs.len() != 2
        || steps.len() < 40
        || copies.len() != 4
        || !ordered
        || steps.iter().filter(told).count() != steps.len()
    {
        return Err(format!(
            "{} runs, {} steps, {} copies, {ordered}: {:?}",
            runs.len(),
            steps.len(),
            copies.len(),
            steps[0]
        ));
    }
    let counted = |name: &str| of(0, "C").iter().any(|e| e["name"] == name && e["args"]["value"].as_f64() > Some(0.0));
    match ["loss", "device memory (bytes)", "activations alive (bytes)"].iter().find(|n| !counted(n)) {
        Some(n) => Err(format!("nothing counts {n}")),
        None => Ok(format!(", {} steps", steps.len())),
    }
}

/// The loss of a text that is held out is made on the device, of the weights that are there, and is the CPU's; and a device that
/// does not run ahead tells of every step when it is started, so that its time is that step's.
fn validated(rig: &Rig) -> Result<String, String> {
    if rig.cuda.is_some() {
        return Err(format!("{NOT_HERE} a look at what is asked of a device: it is for the simulator"));
    }
    let text = |e: TrainError| e.to_string();
    let b = Bench::new(rig, small()?);
    let loss = stack::loss(&b.config, Carry::Zero, false).map_err(|e| format!("{e:?}"))?;
    let mut held_out: Vec<MicroBatch> = (50..52).flat_map(|s| b.batch(s)).collect();
    held_out.iter_mut().for_each(|m| m.inputs.retain(|(n, _)| *n != "carry"));
    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("two threads"));
    let mut all = vec![];
    for placement in [None, Some(Placement::Arena), Some(Placement::Apart)] {
        let device = Faulty::new(Late::new(Simulator::strict(schedules()[1])), None);
        let seen = device.seen();
        let mut t = match placement {
            None => b.trainer(None, b.weights())?,
            Some(p) => b.trainer_on(Box::new(device), p, Precision::F32, b.weights())?,
        };
        for s in 0..2 {
            let told = t.start(s, &b.batch(s)).map_err(text)?.map(|(n, _)| n);
            if placement == Some(Placement::Apart) && told != Some(s) {
                return Err(format!("step {s} was started, and {told:?} is known"));
            }
        }
        t.finish().map_err(text)?;
        // The host's store is old.
        let before = seen.calls().len();
        all.push(t.evaluate(&loss, &held_out, &pool).map_err(text)?);
        let launches = seen.calls()[before..].iter().filter(|c| **c == "launch").count();
        if (launches > 0) != placement.is_some() {
            return Err(format!("{placement:?}: {launches} launches to validate"));
        }
    }
    let worst = all.iter().map(|l| (l - all[0]).abs() / all[0]).fold(0.0, f32::max);
    if worst.is_nan() || worst > F32 {
        return Err(format!("losses {worst:.1e} apart: {all:?}"));
    }
    Ok(format!(", {:.3}, {worst:.1e} apart", all[0]))
}
