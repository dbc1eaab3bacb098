//! `rambac kernels`: the table of all GPU kernels of tiny, small, 370m and 3b, as docs/kernels.md holds it (`cargo xtask kernels`).

use crate::cli::Kernels;
use crate::cmd::explain::gpu::{Chosen, Forms};
use crate::cmd::explain::model_step;
use crate::error::{Result, wrap};
use crate::{model, show};
use miette::miette;
use rambac_codegen::cuda::Arch;
use rambac_codegen::lower;
use rambac_codegen::nvrtc::Nvrtc;
use rambac_ir::{Bindings, Cost, Graph};
use rambac_models::{Config, preset};
use rambac_passes::train_step::AdamW;
use rambac_passes::{Options, optimise};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::process::ExitCode;
use std::sync::Arc;

const PRESETS: [&str; 4] = ["tiny", "small", "370m", "3b"];

/// Tokens of a text.
const LEN: usize = 4096;

/// What is run, at which sizes.
const MODES: [&str; 3] = ["a training step", "prefill", "decode"];

/// Runs the verb.
pub fn run(a: &Kernels, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    let text = pool.install(table_of_all)?;
    match &a.out {
        Some(path) => std::fs::write(path, text).map_err(|e| miette!("{}: {e}", path.display()))?,
        None => print!("{text}"),
    }
    Ok(ExitCode::SUCCESS)
}

/// A kernel as the compiler left it.
struct Row {
    numbers: String,
    spills: bool,
    used: BTreeSet<&'static str>,
}

fn table_of_all() -> Result<String> {
    let nvrtc = Nvrtc::open_any().map_err(wrap)?;
    let mut out = format!(
        "# Kernels of the presets\n\n\
         Made by `cargo xtask kernels` with NVRTC {}.{}. FLOPs and bytes are predicted from the ops' definitions, for one run at\n\
         N=1 and {LEN} tokens (decode: one token after so many). Products are the vendor library's, dense ones.\n",
        nvrtc.version.0, nvrtc.version.1
    );
    for arch in Arch::ALL {
        let mut kernels: BTreeMap<String, Row> = BTreeMap::new();
        let mut tables = String::new();
        for name in PRESETS {
            let config = preset(name).map_err(wrap)?;
            for mode in MODES {
                let _ = writeln!(tables, "\n### {name}: {mode}\n");
                table(&mut tables, &mut kernels, (name, mode), &config, arch)?;
            }
        }
        let spilling = kernels.values().filter(|k| k.spills).count();
        let _ = writeln!(
            out,
            "\n## {arch}\n\n{}, {spilling} of them spill registers.",
            show::plural(kernels.len(), "kernel")
        );
        out += &tables;
        let _ = writeln!(out, "\n### All kernels of {arch}\n");
        out += "| kernel | threads | registers | spilled bytes | shared bytes | blocks/SM (counted on) | presets |\n";
        out += "|---|---|---|---|---|---|---|\n";
        for (name, k) in &kernels {
            let used: Vec<&str> = k.used.iter().copied().collect();
            let _ = writeln!(out, "| `{name}` | {} | {} |", k.numbers, used.join(", "));
        }
    }
    Ok(out)
}

/// The graphs of a mode with their sizes.
fn graphs(c: &Config, mode: &str) -> Result<Vec<(Graph, Bindings)>> {
    if mode == MODES[0] {
        return Ok(vec![(model_step(c, &AdamW::default())?, Bindings::new([("N", 1), ("L", LEN)]))]);
    }
    let chunks = LEN / c.chunk_size;
    let (l, b) = if mode == MODES[1] { (LEN, chunks) } else { (1, 1) };
    let parts = model::session_graphs(c)?;
    // A token in `chunk_size` makes a chunk, and nothing here skims.
    let run = |name: &str| name != "upper_flash" && (name != "chunks" || mode == MODES[1]);
    let all = parts.named().into_iter().filter(|(name, _)| run(name));
    let dims = Bindings::new([("N", 1), ("L", l), ("C", chunks), ("B", b)]);
    Ok(all.map(|(_, g)| (g.clone(), dims.clone())).collect())
}

fn table(
    out: &mut String,
    kernels: &mut BTreeMap<String, Row>,
    (preset, mode): (&'static str, &str),
    config: &Config,
    arch: Arch,
) -> Result<()> {
    // Steps that run alike are one line; maps are told apart by nothing but their hash.
    let mut lines: Vec<(Key, usize, usize, BTreeSet<String>, Cost)> = vec![];
    let mut missing: Vec<String> = vec![];
    for (graph, dims) in graphs(config, mode)? {
        let p = lower(&optimise(&graph, &Options::default()));
        let costs = p.costs(&dims).map_err(wrap)?;
        let f = Forms::new(&p, &costs, &dims, arch, true)?;
        missing.extend(f.none.iter().map(|(op, why, n)| format!("{n} {op}: {why}")));
        for c in &f.chosen {
            let key = Key::of(c);
            let at = lines.iter().position(|l| l.0 == key).unwrap_or_else(|| {
                lines.push((key, 0, 0, BTreeSet::new(), Cost::default()));
                lines.len() - 1
            });
            let l = &mut lines[at];
            (l.1, l.2, l.4) = (l.1 + 1, l.2 + c.products, l.4 + c.cost);
            l.3.extend(c.kernels.iter().cloned());
        }
        for (name, u) in &f.kernels {
            let usage = u.usage.clone().unwrap_or_default();
            let spilled = usage.spill_stores + usage.spill_loads;
            let row = || Row {
                numbers: format!(
                    "{} | {} | {spilled} | {} | {} ({})",
                    u.kernel.threads,
                    usage.registers,
                    usage.shared + u.kernel.shared,
                    f.blocks(u).unwrap_or(0),
                    u.kernel.blocks_per_sm
                ),
                spills: spilled > 0,
                used: BTreeSet::new(),
            };
            kernels.entry(name.clone()).or_insert_with(row).used.insert(preset);
        }
    }
    *out += "| op | form | steps | products | FLOPs | bytes | kernels |\n|---|---|---|---|---|---|---|\n";
    for (key, steps, products, names, cost) in lines {
        let names: Vec<String> = names.iter().map(|n| format!("`{n}`")).collect();
        let names = if names.len() > 4 { format!("{} of them", names.len()) } else { names.join(", ") };
        let (flops, bytes) = (show::si(cost.flops, ""), show::si(cost.bytes, "B"));
        let _ = writeln!(out, "| {} | {} | {steps} | {products} | {flops} | {bytes} | {names} |", key.op, key.form);
    }
    missing.sort();
    missing.iter().for_each(|m| *out += &format!("\nCan't run: {m}\n"));
    Ok(())
}

#[derive(PartialEq)]
struct Key {
    op: &'static str,
    form: &'static str,
    kernels: Vec<String>,
}

impl Key {
    fn of(c: &Chosen) -> Key {
        let hashed = c.op == "map" || c.op == "copy";
        Key { op: c.op, form: c.form, kernels: if hashed { vec![] } else { c.kernels.clone() } }
    }
}
