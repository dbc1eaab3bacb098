//! `rambac report`: the table of all GPU kernels of tiny, small, 370m and 3b, as docs/kernels.md holds it (`cargo xtask report`).
//!
//! Everything but what ptxas says of a kernel is made again in a second; that is why `--check` compiles nothing: it takes those figures
//! from the file, where they stand beside a hash of the kernel's text (stub and headers), and refuses them where the text is another.

use crate::cli::Report;
use crate::cmd::explain::gpu::{Chosen, Forms};
use crate::cmd::explain::model_step;
use crate::error::{Result, warn, wrap};
use crate::{model, show};
use miette::miette;
use rambac_codegen::cuda::{Arch, Cache, Kernel, Target, kernel};
use rambac_codegen::hash::sha256;
use rambac_codegen::nvrtc::{Nvrtc, NvrtcError};
use rambac_codegen::{Kernels, Program, lower_for};
use rambac_ir::{Bindings, Cost, Graph};
use rambac_models::{Config, preset};
use rambac_passes::train_step::AdamW;
use rambac_passes::{Options, Precision, optimise};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

const PRESETS: [&str; 4] = ["tiny", "small", "370m", "3b"];

/// Tokens of a text.
const LEN: usize = 4096;

/// What is run, at which sizes.
const MODES: [&str; 6] =
    ["a training step", "prefill", "decode", "a training step in bf16", "prefill in bf16", "decode in bf16"];

/// Runs the verb.
pub fn run(a: &Report, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    if let Some(path) = &a.check {
        return pool.install(|| check(path));
    }
    let text = pool.install(|| report(&Figures::Compiled { by: compilers()?, cache: Cache::standard() }))?;
    match &a.out {
        Some(path) => std::fs::write(path, text).map_err(|e| miette!("{}: {e}", path.display()))?,
        None => print!("{text}"),
    }
    Ok(ExitCode::SUCCESS)
}

fn compilers() -> Result<Vec<Nvrtc>> {
    let all = Nvrtc::open_all();
    if all.is_empty() { Err(wrap(NvrtcError::Missing)) } else { Ok(all) }
}

/// Compares a report with what would be written now.
fn check(path: &Path) -> Result<ExitCode> {
    let help = "cargo xtask report writes it again";
    let text = std::fs::read_to_string(path).map_err(|e| miette!(help = help, "{}: {e}", path.display()))?;
    let now = report(&Figures::Known(known(&text)))?;
    if text == now {
        return Ok(ExitCode::SUCCESS);
    }
    let (a, b): (Vec<&str>, Vec<&str>) = (text.lines().collect(), now.lines().collect());
    let at = a.iter().zip(&b).position(|(x, y)| x != y).unwrap_or(a.len().min(b.len()));
    let line = |v: &[&str]| v.get(at).map_or("(nothing)", |l| *l).to_string();
    let at = at + 1;
    Err(miette!(help = help, "{}, line {at} is not of these kernels:\n  {}\n  {}", path.display(), line(&a), line(&b)))
}

/// A kernel's line in the report.
struct Row {
    kernel: Kernel,
    used: BTreeSet<&'static str>,
}

impl Row {
    /// Of stub and headers.
    fn text(&self) -> String {
        sha256(kernel(&self.kernel).to_string().as_bytes())[..8].to_string()
    }
}

/// Where the figures of kernels come from.
enum Figures {
    Compiled {
        by: Vec<Nvrtc>,
        cache: Cache,
    },
    /// A report's compilers, and cells by architecture, name and text.
    Known((String, Cells)),
}

type Cells = BTreeMap<(String, String, String), String>;

/// Cells of a line between its threads and its presets: registers, spilled bytes, shared bytes, blocks.
const CELLS: usize = 4;

/// What a report says of compilers and kernels.
fn known(report: &str) -> (String, Cells) {
    let (mut cells, mut arch) = (Cells::new(), String::new());
    let by = report.lines().find_map(|l| l.strip_prefix(BY)?.split_once(". ")).map_or(String::new(), |l| l.0.into());
    for line in report.lines() {
        if let Some(a) = line.strip_prefix("## ") {
            arch = a.into();
        }
        let parts: Vec<&str> = line.split(" | ").collect();
        let name = parts[0].strip_prefix("| `").and_then(|n| n.strip_suffix('`'));
        if let (Some(name), true) = (name, parts.len() == CELLS + 4) {
            cells.insert((arch.clone(), name.into(), parts[1].into()), parts[3..3 + CELLS].join(" | "));
        }
    }
    (by, cells)
}

impl Figures {
    fn by(&self) -> String {
        match self {
            Figures::Compiled { by, .. } => by.iter().map(Nvrtc::name).collect::<Vec<_>>().join(" and "),
            Figures::Known((by, _)) => by.clone(),
        }
    }

    /// The cells of every kernel, in order.
    fn cells(&self, arch: Arch, rows: &BTreeMap<String, Row>) -> Result<Vec<String>> {
        let (by, cache) = match self {
            Figures::Compiled { by, cache } => (by, cache),
            Figures::Known((_, cells)) => {
                let one = |(name, r): (&String, &Row)| {
                    let key = (arch.to_string(), name.clone(), r.text());
                    let stale = || {
                        let help = "cargo xtask report compiles what is new and writes it again";
                        miette!(help = help, "the report's figures are not of {name} for {arch} as it is now")
                    };
                    cells.get(&key).cloned().ok_or_else(stale)
                };
                return rows.iter().map(one).collect();
            }
        };
        let target = Target::of(arch);
        let all: Vec<&Row> = rows.values().collect();
        let one = |r: &&Row| {
            let (k, mut columns) = (&r.kernel, vec![vec![]; CELLS]);
            for nvrtc in by {
                let c = cache.compile(nvrtc, k, arch).map_err(wrap)?;
                let u = c.usage.first().ok_or_else(|| miette!("ptxas says nothing of {}", k.name))?;
                k.hold_to(u, &target).map_err(|e| miette!("{}: {e}", nvrtc.name()))?;
                columns[0].push(u.registers.to_string());
                columns[1].push((u.spill_stores + u.spill_loads).to_string());
                columns[2].push((u.shared + k.shared).to_string());
                columns[3].push(k.fit(u, &target).to_string());
            }
            // What compilers agree on is said once.
            columns.iter_mut().for_each(|c| c.dedup());
            let mut cells: Vec<String> = columns.iter().map(|c| c.join(", ")).collect();
            cells[3] += &format!(" ({})", k.blocks_per_sm);
            Ok::<_, miette::Report>(cells.join(" | "))
        };
        let cells = all.par_iter().map(one).collect::<Result<Vec<String>>>()?;
        if let Some(t) = cache.trouble() {
            warn(t);
        }
        Ok(cells)
    }
}

/// A mode of a preset: its programs with the work of their steps and their sizes.
struct Section {
    preset: &'static str,
    mode: &'static str,
    programs: Vec<(Program, Vec<Cost>, Bindings)>,
}

fn section(preset_name: &'static str, mode: &'static str) -> Result<Section> {
    let config = preset(preset_name).map_err(wrap)?;
    let precision = if mode.ends_with("bf16") { Precision::Bf16 } else { Precision::F32 };
    let options = Options { precision, ..Options::default() };
    let one = |(graph, dims): (Graph, Bindings)| {
        let p = lower_for(&optimise(&graph, &options), Kernels::Gpu);
        let costs = p.costs(&dims).map_err(wrap)?;
        Ok((p, costs, dims))
    };
    let programs = graphs(&config, mode)?.into_iter().map(one).collect::<Result<_>>()?;
    Ok(Section { preset: preset_name, mode, programs })
}

/// What stands before the names of the compilers.
const BY: &str = "Made by `cargo xtask report` with ";

fn report(figures: &Figures) -> Result<String> {
    let mut out = format!(
        "# Kernels of the presets\n\n\
         {BY}{}. FLOPs and bytes are predicted from the ops' definitions, for one run at\n\
         N=1 and {LEN} tokens (decode: one token after so many). Products are the vendor library's, dense ones. None of the kernels\n\
         spills registers, and of each as many blocks fit on a multiprocessor as the choice of its tile counted on (in brackets); two\n\
         numbers are those of the two compilers.\n",
        figures.by()
    );
    let all: Vec<_> = PRESETS.into_iter().flat_map(|p| MODES.map(|m| (p, m))).collect();
    let sections = all.into_par_iter().map(|(p, m)| section(p, m)).collect::<Result<Vec<Section>>>()?;
    for arch in Arch::ALL {
        let mut kernels: BTreeMap<String, Row> = BTreeMap::new();
        let mut tables = String::new();
        for s in &sections {
            let _ = writeln!(tables, "\n### {}: {}\n", s.preset, s.mode);
            table(&mut tables, &mut kernels, s, arch)?;
        }
        let _ = writeln!(out, "\n## {arch}\n\n{}.", show::plural(kernels.len(), "kernel"));
        out += &tables;
        let _ = writeln!(out, "\n### All kernels of {arch}\n");
        out += "| kernel | text | threads | registers | spilled bytes | shared bytes | blocks/SM (counted on) | presets |\n";
        out += "|---|---|---|---|---|---|---|---|\n";
        let cells = figures.cells(arch, &kernels)?;
        for ((name, k), cells) in kernels.iter().zip(cells) {
            let used: Vec<&str> = k.used.iter().copied().collect();
            let (text, threads) = (k.text(), k.kernel.threads);
            let _ = writeln!(out, "| `{name}` | {text} | {threads} | {cells} | {} |", used.join(", "));
        }
    }
    Ok(out)
}

/// The graphs of a mode with their sizes.
fn graphs(c: &Config, mode: &str) -> Result<Vec<(Graph, Bindings)>> {
    if mode.starts_with(MODES[0]) {
        return Ok(vec![(model_step(c, &AdamW::default())?, Bindings::new([("N", 1), ("L", LEN)]))]);
    }
    let chunks = LEN / c.chunk_size;
    let prefill = mode.starts_with(MODES[1]);
    let (l, b) = if prefill { (LEN, chunks) } else { (1, 1) };
    let parts = model::session_graphs(c)?;
    // A token in `chunk_size` makes a chunk, and nothing here skims.
    let run = |name: &str| name != "upper_flash" && (name != "chunks" || prefill);
    let all = parts.named().into_iter().filter(|(name, _)| run(name));
    let dims = Bindings::new([("N", 1), ("L", l), ("C", chunks), ("B", b)]);
    Ok(all.map(|(_, g)| (g.clone(), dims.clone())).collect())
}

fn table(out: &mut String, kernels: &mut BTreeMap<String, Row>, s: &Section, arch: Arch) -> Result<()> {
    // Steps that run alike are one line; maps are told apart by nothing but their hash.
    let mut lines: Vec<(Key, usize, usize, BTreeSet<String>, Cost)> = vec![];
    let mut missing: Vec<String> = vec![];
    for (p, costs, dims) in &s.programs {
        let f = Forms::new(p, costs, dims, arch, false)?;
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
            let row = || Row { kernel: u.kernel.clone(), used: BTreeSet::new() };
            kernels.entry(name.clone()).or_insert_with(row).used.insert(s.preset);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_back() {
        let text = "Made by `cargo xtask report` with NVRTC 12.9 and NVRTC 13.0. FLOPs\n\n## sm_80\n\n\
                    | kernel | text | threads | registers | spilled bytes | shared bytes | blocks/SM (counted on) | presets |\n\
                    |---|---|---|---|---|---|---|---|\n\
                    | `map_1` | 0a1b2c3d | 256 | 32, 40 | 0 | 0 | 8 (1) | tiny, 3b |\n";
        let (by, cells) = known(text);
        assert_eq!(by, "NVRTC 12.9 and NVRTC 13.0");
        let key = ("sm_80".into(), "map_1".into(), "0a1b2c3d".into());
        assert_eq!(cells, Cells::from([(key, "32, 40 | 0 | 0 | 8 (1)".into())]));
    }
}
