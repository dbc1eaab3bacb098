//! What kernels move and how they meet in shared memory, counted by the simulator: at the shapes of the 370M model (its widths,
//! heads, states and chunks; fewer layers, a small vocabulary, a short text), and in a whole training step of `tiny`.
//!
//! Of each kernel, over its launches: the 32-byte sectors that go past the first cache, of which a block has its share (asynchronous
//! copies and atomics always do); and the least that its blocks could do with, by the order of its loops: what a block reads or
//! writes counts once for it, however often it does.  Conflicts are passes through shared memory beyond those that the width of
//! an access takes: four of a warp's 16-byte accesses.  Counts depend on nothing but the kernels' code, so they are the same on
//! any machine; a kernel above a limit is an error.

use super::{MODES, Row, graphs};
use crate::error::{Result, warn, wrap};
use miette::miette;
use rambac_codegen::cuda::{Arch, Cache, Form, GpuProgram, Kernel, Target, emit};
use rambac_codegen::nvrtc::Nvrtc;
use rambac_codegen::{Kernels, lower_for};
use rambac_ir::{Bindings, DType, Graph};
use rambac_models::stack::{self, Carry};
use rambac_models::{Config, preset};
use rambac_passes::train_step::gradient_graph;
use rambac_passes::{Options, Precision, optimise};
use rambac_runtime::gpu::{Bytes, Code, Machine, Placement};
use rambac_simulator::Options as Schedule;
use rambac_simulator::count::Counts;
use rambac_simulator::device::Simulator;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

/// Tokens of a text.
pub const LEN: usize = 128;

/// What counts as too much: moved bytes as a multiple of the least, conflicts as a part of shared accesses.
pub const MOST: (f64, f64) = (1.3, 0.02);

/// That no kernel with these cells is above a limit.
///
/// # Errors
/// Those that are.
pub fn within_limits<'a>(cells: impl Iterator<Item = (&'a str, &'a str)>) -> Result<()> {
    let above: Vec<String> = cells
        .filter(|(_, c)| c.contains("**"))
        .map(|(name, c)| format!("\n  {name}: {}", c.replace("**", "")))
        .collect();
    if above.is_empty() {
        return Ok(());
    }
    Err(miette!(
        help = "cargo xtask kernels says where",
        "{} above a limit ({} of the least bytes, {} % of shared accesses):{}",
        crate::show::plural(above.len(), "kernel"),
        MOST.0,
        100.0 * MOST.1,
        above.concat()
    ))
}

/// What is run.
const RUNS: [&str; 2] = ["370m", "tiny"];

/// The sums over a kernel's launches.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moved {
    /// In bytes.
    pub moved: u64,
    pub least: u64,
    /// Passes through shared memory, and those that conflicts added.
    pub passes: u64,
    pub conflicts: u64,
}

impl Moved {
    fn add(&mut self, c: &Counts) {
        for (_, t) in &c.buffers {
            self.moved += 32 * t.moved_sectors;
            self.least += 32 * t.least_sectors;
        }
        self.passes += c.shared_passes;
        self.conflicts += c.shared_conflicts;
    }

    /// Whether it is too much.
    fn above(&self) -> bool {
        let (ratio, share) = self.shares();
        ratio > MOST.0 || share > MOST.1
    }

    /// Bytes as a multiple of the least; conflicts as a part of all accesses.
    pub fn shares(&self) -> (f64, f64) {
        (self.moved as f64 / self.least.max(1) as f64, self.conflicts as f64 / self.passes.max(1) as f64)
    }
}

/// Where a kernel's conflicts come from, and what it moves again: the worst places of its launches.
fn places(log: &[Counts], kernel: &str) -> String {
    let mut at: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for c in log.iter().filter(|c| c.kernel == kernel) {
        c.conflicting.iter().for_each(|h| *at.entry(("conflicts", &h.at)).or_default() += h.count.conflicts);
        c.moved_again.iter().for_each(|h| *at.entry(("sectors moved again", &h.at)).or_default() += h.count.again);
    }
    let mut at: Vec<_> = at.into_iter().collect();
    at.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    let lines: String = at.iter().take(6).map(|((what, place), n)| format!("\n  {n} {what} at {place}")).collect();
    format!("{kernel} is above a limit:{lines}")
}

/// Programs with their sizes, and the kernels that they launch at these.
pub struct Runs {
    programs: Vec<(GpuProgram, Bindings)>,
    pub kernels: BTreeMap<String, Row>,
}

/// The 370M model with as few layers as there are kinds, and a short vocabulary.
fn short(c: Config) -> Config {
    Config { vocab_size: 512, num_lower_layers: 1, num_upper_layers: 1, num_upper_groups: 1, num_mamba_per_gca: 1, ..c }
}

/// Without the optimiser, whose kernels do not depend on the model's shapes, where the model is wide.
fn texts(name: &str, mode: &str) -> Result<Vec<(Graph, Bindings)>> {
    let c = preset(name).map_err(wrap)?;
    if name == "tiny" {
        return graphs(&c, mode, LEN);
    }
    let c = short(c);
    if mode.starts_with(MODES[0]) {
        let loss = stack::loss(&c, Carry::Zero, false).map_err(wrap)?;
        return Ok(vec![(gradient_graph(&loss).map_err(wrap)?, Bindings::new([("N", 1), ("L", LEN)]))]);
    }
    graphs(&c, mode, LEN)
}

impl Runs {
    /// Chooses the forms of everything that is run.
    ///
    /// # Errors
    /// A model that does not build; a step that no kernel takes.
    pub fn new(arch: Arch) -> Result<Runs> {
        let mut all = Runs { programs: vec![], kernels: BTreeMap::new() };
        for name in RUNS {
            for mode in MODES {
                let precision = if mode.ends_with("bf16") { Precision::Bf16 } else { Precision::F32 };
                let options = Options { precision, ..Options::default() };
                for (graph, dims) in texts(name, mode)? {
                    let p = lower_for(&optimise(&graph, &options), Kernels::Gpu);
                    let mut gpu = emit(p, Target::of(arch)).map_err(wrap)?;
                    for s in &mut gpu.steps {
                        let taken = s.form(&dims).map_err(wrap)?.clone();
                        s.forms = Arc::new(vec![Form { needs: vec![], when: vec![], ..taken }]);
                    }
                    let launched = gpu.steps.iter().flat_map(|s| s.forms.iter()).flat_map(Form::launches);
                    let kernels: BTreeMap<&str, &Kernel> = launched.map(|l| (&*l.kernel.name, &l.kernel)).collect();
                    for (k, kernel) in &kernels {
                        let row = || Row { kernel: (*kernel).clone(), used: BTreeSet::new() };
                        all.kernels.entry(k.to_string()).or_insert_with(row).used.insert(name);
                    }
                    gpu.kernels = kernels.into_values().cloned().collect();
                    all.programs.push((gpu, dims));
                }
            }
        }
        Ok(all)
    }

    /// Runs everything that has kernels whose texts are not among `known`, and adds what they move: an architecture shares most
    /// kernels with the one before it.
    ///
    /// # Errors
    /// A kernel that does not compile or does something wrong.
    pub fn count(&self, nvrtc: &Nvrtc, cache: &Cache, known: &mut BTreeMap<String, Moved>) -> Result<()> {
        let log = Arc::new(Mutex::new(vec![]));
        let new: BTreeMap<&str, String> = (self.kernels.iter())
            .map(|(name, r)| (name.as_str(), r.key()))
            .filter(|(_, key)| !known.contains_key(key))
            .collect();
        for (gpu, dims) in &self.programs {
            if gpu.kernels.iter().all(|k| !new.contains_key(k.name.as_str())) {
                continue;
            }
            let code = Code::compile(nvrtc, &[gpu], cache).map_err(wrap)?;
            let watch = Schedule { races: false, uninitialised: false, footprint: true, ..Schedule::default() };
            let device = Simulator::strict(watch).logged(log.clone());
            let mut machine = Machine::new(device, Placement::Apart);
            for s in &gpu.program.sources {
                let value = value(&s.name, &s.ty.bind(dims).map_err(wrap)?, dims);
                machine.set(&s.name, &value).map_err(wrap)?;
            }
            let id = machine.load(Arc::new(gpu.clone()), &code).map_err(wrap)?;
            machine.run(id, dims, &[]).map_err(wrap)?;
        }
        let log = log.lock().unwrap_or_else(PoisonError::into_inner);
        for c in log.iter() {
            if let Some(key) = new.get(c.kernel.as_str()) {
                known.entry(key.clone()).or_default().add(c);
            }
        }
        for (name, key) in &new {
            if known.get(key).is_some_and(Moved::above) {
                warn(places(&log, name));
            }
        }
        match new.iter().find(|(_, key)| !known.contains_key(*key)) {
            Some((name, _)) => Err(miette!("{name} was not launched: its step has no work at {LEN} tokens")),
            None => Ok(()),
        }
    }
}

/// A value for a source: small numbers of no pattern, ids of the smallest vocabulary; of other integers the text's length, as a
/// position that has all chunks before it.
fn value(name: &str, ty: &rambac_ir::ty::ConcreteTy, dims: &Bindings) -> Bytes {
    let n: usize = ty.shape.iter().product();
    let mut state = 0x9e37_79b9_7f4a_7c15u64 ^ name.len() as u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state >> 40
    };
    let ids = name.contains("ids") || name.contains("labels");
    let decoding = dims.iter().any(|(s, v)| s.as_str() == "L" && v == 1);
    let at = if decoding { LEN as i32 } else { 0 };
    let data = match ty.dtype {
        DType::I32 if ids => (0..n).flat_map(|_| ((next() % 256) as i32).to_le_bytes()).collect(),
        DType::I32 => (0..n).flat_map(|_| at.to_le_bytes()).collect(),
        DType::Bool => vec![1; n],
        DType::F32 => (0..n).flat_map(|_| ((next() as f32 / (1 << 24) as f32 - 0.5) * 0.1).to_le_bytes()).collect(),
        // A number in 0.03 … 0.06 with a sign.
        DType::BF16 => (0..n).flat_map(|_| (0x3d00u16 | (next() & 0x807f) as u16).to_le_bytes()).collect(),
        DType::F16 => (0..n).flat_map(|_| (0x2800u16 | (next() & 0x83ff) as u16).to_le_bytes()).collect(),
    };
    Bytes { ty: ty.clone(), data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_above_a_limit_are_refused() {
        let fine = ("map_1", "1 B | 1.00 | 0 | 0.0 %");
        assert!(within_limits([fine].into_iter()).is_ok());
        let e = within_limits([fine, ("map_2", "1 B | **1.50** | 0 | 0.0 %")].into_iter()).unwrap_err().to_string();
        assert!(e.contains("map_2: 1 B | 1.50") && !e.contains("map_1"), "{e}");
    }
}
