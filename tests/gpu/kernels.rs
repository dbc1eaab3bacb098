//! Every kernel of the preset `tiny` under every compiler: none spills, and as many blocks fit on a multiprocessor as the choice
//! of its tile counted on.  Those of the larger presets are held to the same by `cargo xtask report`.

use crate::harness::Case;
use crate::rig::{Rig, cache};
use rambac_codegen::cuda::{Arch, Kernel, Target, emit};
use rambac_codegen::nvrtc::Nvrtc;
use rambac_codegen::{Kernels, lower_for};
use rambac_ir::Graph;
use rambac_models::preset;
use rambac_models::stack::{self, Carry};
use rambac_passes::train_step::{AdamW, train_step};
use rambac_passes::{Options, Precision, optimise};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

pub const ALL: &[Case] = &[("kernels_of_tiny", kernels_of_tiny)];

/// A training step and the parts of a session.
fn graphs() -> Result<Vec<Graph>, String> {
    let c = preset("tiny").map_err(|e| e.to_string())?;
    let loss = stack::loss(&c, Carry::States, false).map_err(|e| format!("{e:?}"))?;
    let step = train_step(&loss, &AdamW::default(), |n| n.ends_with("proj.weight")).map_err(|e| e.to_string())?;
    let parts = [stack::lower(&c).map(Some), stack::chunks(&c), stack::upper(&c), stack::head(&c).map(Some)];
    let parts = parts.into_iter().filter_map(Result::transpose).collect::<Result<Vec<_>, _>>();
    let mut all = vec![step];
    all.extend(parts.map_err(|e| format!("{e:?}"))?);
    Ok(all)
}

fn kernels_of_tiny(_: &Rig) -> Result<String, String> {
    let compilers = Nvrtc::open_all();
    // Kernels differ in names where they differ in anything that can spill: one of the maps stands for all.
    let mut all: BTreeMap<(Arch, String), Kernel> = BTreeMap::new();
    let graphs = graphs()?;
    for (g, precision) in graphs.iter().flat_map(|g| [Precision::F32, Precision::Bf16].map(|p| (g, p))) {
        let g = optimise(g, &Options { precision, ..Options::default() });
        let program = Arc::new(lower_for(&g, Kernels::Gpu));
        for arch in Arch::ALL {
            let p = emit(program.clone(), Target::of(arch)).map_err(|e| e.to_string())?;
            let maps = p.kernels.iter().filter(|k| k.name.starts_with("map_")).take(1);
            let rest = p.kernels.iter().filter(|k| !k.name.starts_with("map_"));
            all.extend(maps.chain(rest).map(|k| ((arch, k.name.clone()), k.clone())));
        }
    }
    // Compilers take turns, by names and architectures.
    let cache = cache();
    let names: Vec<&String> = all.keys().map(|k| &k.1).collect::<BTreeSet<_>>().into_iter().collect();
    let one = |((arch, name), k): (&(Arch, String), &Kernel)| {
        let at = names.binary_search(&name).expect("BUG: it is one of the names") + *arch as usize;
        let c = cache.compile(&compilers[at % compilers.len()], k, *arch).map_err(|e| e.to_string())?;
        let usage = c.usage.first().ok_or_else(|| format!("ptxas says nothing of {name}"))?;
        k.hold_to(usage, &Target::of(*arch))
    };
    all.par_iter().map(one).collect::<Result<Vec<()>, String>>()?;
    Ok(format!(", {} kernels by {}", all.len(), compilers.iter().map(Nvrtc::name).collect::<Vec<_>>().join(" and ")))
}
