//! `rambac kernels`: the table of all GPU kernels of tiny, small, 370m and 3b, as docs/kernels.md holds it (`cargo xtask kernels`).
//!
//! Everything but what ptxas and the simulator say of a kernel is made again in a second; that is why `--check` compiles and runs
//! nothing: it takes those figures from the file, where they stand beside a hash of the kernel's text (stub and headers), and
//! refuses them where the text is another.

mod traffic;

use crate::cli;
use crate::cmd::explain::gpu::{Chosen, Forms};
use crate::cmd::explain::model_step;
use crate::error::{Result, warn, wrap};
use crate::{model, show};
use miette::miette;
use rambac_codegen::cuda::{Arch, Cache, Kernel, Target, kernel};
use rambac_codegen::hash::sha256;
use rambac_codegen::nvrtc::{Nvrtc, NvrtcError};
use rambac_codegen::{Kernels, Machine, Program, fit, lower_for};
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
pub fn run(a: &cli::Kernels, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
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
    let help = "cargo xtask kernels writes it again";
    let text = std::fs::read_to_string(path).map_err(|e| miette!(help = help, "{}: {e}", path.display()))?;
    let known = known(&text);
    // Each of the two generations of compilers must take every kernel.
    if !known.by.contains(" and ") {
        return Err(miette!(help = help, "{} is of one compiler alone ({})", path.display(), known.by));
    }
    let now = report(&Figures::Known(known))?;
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
    /// Name and text.
    fn key(&self) -> String {
        format!("{} {}", self.kernel.name, self.text())
    }
}

/// Where the figures of kernels come from.
enum Figures {
    Compiled {
        by: Vec<Nvrtc>,
        cache: Cache,
    },
    /// A report's compilers, and cells by architecture, name and text.
    Known(Known),
}

/// What a report says.
struct Known {
    by: String,
    cells: Cells,
    /// As `cells`, of what kernels move.
    moved: Cells,
}

type Cells = BTreeMap<(String, String, String), String>;

/// Cells of a line between its threads and its presets: registers, spilled bytes, shared bytes, blocks.
const CELLS: usize = 4;
/// Cells of a line of what a kernel moves, between its text and its models: bytes, ratio, accesses of shared memory, conflicts.
const MOVED: usize = 4;

/// What a report says of compilers and kernels.
fn known(report: &str) -> Known {
    let (mut cells, mut moved, mut arch) = (Cells::new(), Cells::new(), String::new());
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
        if let (Some(name), true) = (name, parts.len() == MOVED + 3) {
            moved.insert((arch.clone(), name.into(), parts[1].into()), parts[2..2 + MOVED].join(" | "));
        }
    }
    Known { by, cells, moved }
}

impl Figures {
    fn by(&self) -> String {
        match self {
            Figures::Compiled { by, .. } => by.iter().map(Nvrtc::name).collect::<Vec<_>>().join(" and "),
            Figures::Known(k) => k.by.clone(),
        }
    }

    /// The cells of every kernel, in order.
    fn cells(&self, arch: Arch, rows: &BTreeMap<String, Row>) -> Result<Vec<String>> {
        let (by, cache) = match self {
            Figures::Compiled { by, cache } => (by, cache),
            Figures::Known(k) => return k.of(&k.cells, arch, rows),
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

impl Known {
    /// The cells of every kernel, in order.
    fn of(&self, cells: &Cells, arch: Arch, rows: &BTreeMap<String, Row>) -> Result<Vec<String>> {
        let one = |(name, r): (&String, &Row)| {
            let key = (arch.to_string(), name.clone(), r.text());
            let stale = || {
                let help = "cargo xtask kernels compiles and counts what is new and writes it again";
                miette!(help = help, "the report's figures are not of {name} for {arch} as it is now")
            };
            cells.get(&key).cloned().ok_or_else(stale)
        };
        rows.iter().map(one).collect()
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
    let programs = graphs(&config, mode, LEN)?.into_iter().map(one).collect::<Result<_>>()?;
    Ok(Section { preset: preset_name, mode, programs })
}

/// What stands before the names of the compilers.
const BY: &str = "Made by `cargo xtask kernels` with ";

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
    memory(&mut out)?;
    let mut counted = BTreeMap::new();
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
        moved(&mut out, figures, arch, &mut counted)?;
    }
    Ok(out)
}

/// What a training step of the 370M model may take of a GPU's memory.
const MEMORY: usize = 120 << 30;

/// Batches and lengths whose training steps must fit into it.
const STEPS: [(usize, usize); 2] = [(8, 4096), (1, 1 << 20)];

/// The plans of a training step at both ends of lengths.
fn memory(out: &mut String) -> Result<()> {
    let graph = model_step(&preset("370m").map_err(wrap)?, &AdamW::default())?;
    let options = Options { precision: Precision::Bf16, ..Options::default() };
    let machine = Machine::Gpu(Target::of(Arch::Sm90a));
    let _ = writeln!(
        out,
        "\n## Memory of a training step\n\n\
         370m in bf16 for sm_90a within {}, as planned. What does not fit is thrown away and computed again. No array grows faster\n\
         than the text.\n\n\
         | batch | tokens | everything kept | planned | its largest array | of it a token | work |\n|---|---|---|---|---|---|---|",
        show::bytes(MEMORY)
    );
    let one = |(n, l): (usize, usize)| {
        let dims = Bindings::new([("N", n), ("L", l)]);
        let fit = fit::fit(&graph, MEMORY, &[dims], &machine, 0, &options).map_err(crate::error::unfit)?;
        let ((kept, before), (plan, after)) = (&fit.kept, &fit.fitted);
        let most = plan.sizes.iter().copied().max().unwrap_or(0);
        let line = format!(
            "| {n} | {l} | {} | {} | {} | {} | {:.2} |\n",
            show::bytes(kept.peak()),
            show::bytes(plan.peak()),
            show::bytes(most),
            show::bytes(most / (n * l)),
            after.flops / before.flops
        );
        Ok::<_, miette::Report>((line, most / (n * l)))
    };
    let lines = STEPS.into_par_iter().map(one).collect::<Result<Vec<_>>>()?;
    if lines.windows(2).any(|w| w[1].1 > w[0].1) {
        return Err(miette!("an array of 370m's training step grows faster than the text:\n{}", lines[1].0));
    }
    lines.iter().for_each(|(line, _)| *out += line);
    Ok(())
}

/// What kernels move and how they meet in shared memory.
fn moved(
    out: &mut String,
    figures: &Figures,
    arch: Arch,
    counted: &mut BTreeMap<String, traffic::Moved>,
) -> Result<()> {
    let runs = traffic::Runs::new(arch)?;
    let cells: Vec<String> = match figures {
        Figures::Known(k) => k.of(&k.moved, arch, &runs.kernels)?,
        Figures::Compiled { by, cache } => {
            runs.count(&by[0], cache, counted)?;
            let one = |row: &Row| {
                let m = counted[&row.key()];
                let (ratio, share) = m.shares();
                let mark = |bad: bool, text: String| if bad { format!("**{text}**") } else { text };
                let ratio = mark(ratio > traffic::MOST.0, format!("{ratio:.2}"));
                let share = mark(share > traffic::MOST.1, format!("{:.1} %", 100.0 * share));
                format!("{} | {ratio} | {} | {share}", show::si(m.moved as f64, "B"), show::si(m.passes as f64, ""))
            };
            runs.kernels.values().map(one).collect()
        }
    };
    traffic::within_limits(runs.kernels.keys().map(String::as_str).zip(cells.iter().map(String::as_str)))?;
    let _ = writeln!(
        out,
        "\n### What kernels of {arch} move\n\n\
         Counted by the simulator at N=1 and {} tokens, for 370m with a layer of each kind and for tiny. *Bytes* are those of the\n\
         32-byte sectors that go past a block's share of the first cache (two instructions that take half a sector each move it\n\
         once; asynchronous copies and atomics always go past), over all launches; *of the least* is their ratio to what the kernel's\n\
         blocks can't do without, by the order of its loops: whatever a block reads or writes, once. *Conflicts* are passes through\n\
         shared memory beyond those that accesses of their width take. None of the {} kernels moves more than {} of the least, and\n\
         of none are more than {} % of shared accesses conflicts.\n",
        traffic::LEN,
        cells.len(),
        traffic::MOST.0,
        100.0 * traffic::MOST.1
    );
    *out += "| kernel | text | bytes | of the least | shared accesses | conflicts | models |\n|---|---|---|---|---|---|---|\n";
    for ((name, k), cells) in runs.kernels.iter().zip(cells) {
        let used: Vec<&str> = k.used.iter().copied().collect();
        let _ = writeln!(out, "| `{name}` | {} | {cells} | {} |", k.text(), used.join(", "));
    }
    Ok(())
}

/// The graphs of a mode with their sizes, of a text of `len` tokens.
fn graphs(c: &Config, mode: &str, len: usize) -> Result<Vec<(Graph, Bindings)>> {
    if mode.starts_with(MODES[0]) {
        return Ok(vec![(model_step(c, &AdamW::default())?, Bindings::new([("N", 1), ("L", len)]))]);
    }
    let chunks = len / c.chunk_size;
    let prefill = mode.starts_with(MODES[1]);
    let (l, b) = if prefill { (len, chunks) } else { (1, 1) };
    let parts = model::session_graphs(c, len)?;
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
        let text = "Made by `cargo xtask kernels` with NVRTC 12.9 and NVRTC 13.0. FLOPs\n\n## sm_80\n\n\
                    | kernel | text | threads | registers | spilled bytes | shared bytes | blocks/SM (counted on) | presets |\n\
                    |---|---|---|---|---|---|---|---|\n\
                    | `map_1` | 0a1b2c3d | 256 | 32, 40 | 0 | 0 | 8 (1) | tiny, 3b |\n\n\
                    | `map_1` | 0a1b2c3d | 1.5 MB | 1.00 | 0 | 0.0 % | tiny |\n";
        let k = known(text);
        assert_eq!(k.by, "NVRTC 12.9 and NVRTC 13.0");
        let key: (String, String, String) = ("sm_80".into(), "map_1".into(), "0a1b2c3d".into());
        assert_eq!(k.cells, Cells::from([(key.clone(), "32, 40 | 0 | 0 | 8 (1)".into())]));
        assert_eq!(k.moved, Cells::from([(key, "1.5 MB | 1.00 | 0 | 0.0 %".into())]));
    }
}
