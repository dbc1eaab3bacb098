//! `rambac explain`: what compiling does to a model, what did not fuse and why, and what a run will cost.
//!
//! Nothing runs and no weights are read: everything here follows from the graph and the sizes.

pub mod gpu;
mod memory;

use crate::cli::{Explain, MemoryArgs};
use crate::error::{self, Result, wrap};
use crate::model::{self, Named};
use crate::show::{self, Table};
use crate::work::{self, Sums};
use miette::miette;
use rambac_codegen::program::Strided;
use rambac_codegen::{Fit, FitError, Kernels, Machine, MemoryPlan, Program, View, fit, lower_for, no_scratch, plan};
use rambac_ir::ops::Op;
use rambac_ir::{Bindings, Cost, Diagnostic, Graph, NodeId, Sym};
use rambac_models::stack::{self, Carry};
use rambac_models::{Config, LayerKind};
use rambac_passes::train_step::{AdamW, train_step};
use rambac_passes::{
    Options, Recompute, Target, fuse_attention, fuse_epilogue, fuse_loss, fuse_selection, pipeline, recompute,
};
use rambac_runtime::cpu::scratch;
use rambac_runtime::executor::slow_steps;
use serde_json::{Value as Json, json};
use std::collections::{BTreeMap, HashSet};
use std::process::ExitCode;

/// Lines are this wide at most.
const WIDTH: usize = 98;

/// Runs the verb.
pub fn run(a: &Explain, pool: &rayon::ThreadPool) -> Result<ExitCode> {
    let named = model::resolve_with(&a.model, &a.attention)?;
    let (graph, config) = match &named {
        Named::Model { config, .. } if a.train => (model_step(config, &AdamW::default())?, Some(config)),
        Named::Model { config, .. } => (stack::loss(config, Carry::Zero, false).map_err(wrap)?, Some(config)),
        Named::Ir { graph, .. } if a.train => (ir_step(graph, &AdamW::default())?, None),
        Named::Ir { graph, .. } => (graph.clone(), None),
    };
    let dims = dims(&graph, a.batch, a.len, &a.dims)?;
    let options = Options { precision: a.precision(), ..Options::default() };
    let machine = match a.gpu() {
        Some(arch) => Machine::Gpu(rambac_codegen::cuda::Target::of(arch)),
        None => Machine::Cpu(scratch),
    };
    let fit = match a.memory {
        MemoryArgs { memory_limit: Some(limit), .. } => {
            Some(fit::fit(&graph, limit, std::slice::from_ref(&dims), &machine, 0, &options))
        }
        MemoryArgs { recompute: true, .. } => Some(fit::everything(&graph, &dims, &machine, &options)),
        _ => None,
    };
    let r = Report::new(&graph, &dims, &options, &machine, fit.transpose().map_err(error::unfit)?)?;
    let gpu = match a.gpu() {
        Some(arch) => Some(pool.install(|| gpu::Forms::new(&r.program, &r.costs, &dims, arch, a.compile))?),
        None => None,
    };
    if a.ir {
        print!("{}", rambac_ir::text::print(&r.program.graph));
    } else if a.program {
        r.print_program();
    } else if a.json {
        let forms = gpu.iter().flat_map(|g| g.json());
        r.json(a, config)?.into_iter().chain(forms).for_each(|line| println!("{line}"));
    } else {
        r.print(a, config)?;
        if let Some(g) = &gpu {
            g.print();
        }
        if let Named::Ir { path, text, .. } = &named
            && !r.lints.is_empty()
        {
            println!();
            error::report(error::findings(path, text, r.lints));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A model's training step.
pub fn model_step(c: &Config, adamw: &AdamW) -> Result<Graph> {
    let loss = stack::loss(c, Carry::Zero, false).map_err(wrap)?;
    let decays: HashSet<String> = c.parameters().into_iter().filter(|p| p.decay).map(|p| p.name).collect();
    train_step(&loss, adamw, |name| decays.contains(name)).map_err(wrap)
}

/// The training step of a graph in text form.
pub fn ir_step(g: &Graph, adamw: &AdamW) -> Result<Graph> {
    if g.output("loss").is_none() {
        let have: Vec<&str> = g.outputs.iter().map(|o| &*o.name).collect();
        return Err(miette!(
            help = "give the graph an output \"loss\", a scalar, or leave --train out",
            "{}: a training step needs an output \"loss\", but the outputs are {}",
            g.name,
            have.join(", ")
        ));
    }
    // The file's params may be anything; matrices decay, as in models.
    let matrices: HashSet<String> = g.sources().filter(|(_, s)| s.ty.rank() > 1).map(|(_, s)| s.name.clone()).collect();
    let step = train_step(g, adamw, |name| matrices.contains(name)).map_err(wrap)?;
    rambac_ir::verify::verify(&step).map_err(|e| {
        let all: Vec<String> = e.iter().map(ToString::to_string).collect();
        miette!("{}: its training step is not well-formed: {}", g.name, all.join("; "))
    })?;
    Ok(step)
}

/// Values of the graph's symbols: what `--dims` gave, else `--batch` and `--len` for N and L.
pub fn dims(g: &Graph, batch: usize, len: usize, given: &[(String, usize)]) -> Result<Bindings> {
    let mut dims = Bindings::default();
    for (name, value) in [("N", batch), ("L", len)] {
        if g.syms.contains(&Sym::new(name)) {
            dims.set(Sym::new(name), value);
        }
    }
    let known: Vec<&str> = g.syms.iter().map(Sym::as_str).collect();
    for (name, value) in given {
        let sym = Sym::new(name);
        if !g.syms.contains(&sym) {
            return Err(miette!("--dims {name}={value}: the symbols of {} are {}", g.name, known.join(", ")));
        }
        dims.set(sym, *value);
    }
    let missing: Vec<&str> = g.syms.iter().filter(|s| dims.get(s).is_none()).map(Sym::as_str).collect();
    if !missing.is_empty() {
        let example: Vec<String> = missing.iter().map(|s| format!("{s}=64")).collect();
        return Err(miette!(
            help = format!("add --dims {}", example.join(",")),
            "{}: the symbol {} has no value",
            g.name,
            missing.join(", ")
        ));
    }
    Ok(dims)
}

/// What one pass did.
struct PassReport {
    name: &'static str,
    before: usize,
    after: usize,
    /// Change in the number of each op.
    changes: Vec<(String, isize)>,
}

/// An op that stays unfused.
struct Unfused {
    what: String,
    reason: String,
    bytes: usize,
    ty: String,
}

struct Report {
    dims: Bindings,
    passes: Vec<PassReport>,
    unfused: Vec<Unfused>,
    /// Elementwise ops before `fuse_map`.
    elementwise: usize,
    program: Program,
    costs: Vec<Cost>,
    plan: MemoryPlan,
    /// Why the plan has no workspace in it.
    uncounted: Option<String>,
    /// Of the machine, by which recomputation was weighed.
    rates: Target,
    lints: Vec<Diagnostic>,
    fit: Option<Fit>,
}

fn op_counts(g: &Graph) -> BTreeMap<&'static str, isize> {
    let mut counts = BTreeMap::new();
    g.nodes.iter().for_each(|n| *counts.entry(n.op.mnemonic()).or_insert(0) += 1);
    counts
}

/// `%7 = score @layers.3`, for one of the node's results.
fn place(g: &Graph, id: NodeId, result: usize) -> String {
    let n = g.node(id);
    let scope = n.scope.as_deref().map(|s| format!(" @{s}")).unwrap_or_default();
    // A step made for a node, such as a copy, may have other results than the node.
    let result = if result < n.tys.len() { result } else { 0 };
    format!("{} = {}{scope}", g.label(id.result(result)), n.op.mnemonic())
}

/// A lowered graph and its plan; if a step can't run on the machine, without workspace, and the reason.
fn planned(machine: &Machine, g: &Graph, dims: &Bindings) -> Result<(Program, MemoryPlan, Option<String>)> {
    match machine.plans(g, std::slice::from_ref(dims)) {
        Ok((program, mut plans)) => Ok((program, plans.remove(0), None)),
        Err(FitError::Emit(e)) => {
            let program = lower_for(g, Kernels::Gpu);
            let plan = plan(&program, dims, no_scratch).map_err(wrap)?;
            Ok((program, plan, Some(e.to_string())))
        }
        Err(e) => Err(error::unfit(e)),
    }
}

impl Report {
    fn new(graph: &Graph, dims: &Bindings, options: &Options, machine: &Machine, fit: Option<Fit>) -> Result<Self> {
        let recompute = fit.as_ref().map_or(Recompute::Nothing, |f| Recompute::Nodes(f.again.clone()));
        let held = fit.as_ref().map_or(0, |f| f.held);
        let options = &Options { recompute, held, ..options.clone() };
        let mut passes: Vec<PassReport> = vec![];
        let mut unfused = vec![];
        let mut counts = op_counts(graph);
        let (mut nodes, mut elementwise) = (graph.nodes.len(), 0);
        let mut problem = Ok(());
        let optimised = pipeline::optimise_with(graph, options, |name, g| {
            let now = op_counts(g);
            let kinds: std::collections::BTreeSet<&str> = counts.keys().chain(now.keys()).copied().collect();
            let of = |c: &BTreeMap<&str, isize>, k: &str| c.get(k).copied().unwrap_or(0);
            let changes = kinds.iter().map(|k| (k.to_string(), of(&now, k) - of(&counts, k)));
            let changes = changes.filter(|(_, d)| *d != 0).collect();
            if name == "fuse_map" {
                // What it absorbed was elementwise, or a constant or broadcast on the way.
                elementwise = nodes - g.nodes.len() + of(&now, "map") as usize;
            }
            passes.push(PassReport { name, before: nodes, after: g.nodes.len(), changes });
            (counts, nodes) = (now, g.nodes.len());
            let stay = match name {
                "fuse_selection" => fuse_selection::unfused(g),
                "fuse_attention" => fuse_attention::unfused(g),
                "fuse_epilogue" => fuse_epilogue::unfused(g),
                "fuse_loss" => fuse_loss::unfused(g),
                _ => vec![],
            };
            for (id, reason) in stay {
                match g.ty(id.result(0)).bind(dims) {
                    Ok(ty) => {
                        unfused.push(Unfused { what: place(g, id, 0), reason, bytes: ty.bytes(), ty: ty.to_string() })
                    }
                    Err(e) => problem = Err(e),
                }
            }
        });
        problem.map_err(wrap)?;
        let (program, plan, uncounted) = planned(machine, &optimised, dims)?;
        let costs = program.costs(dims).map_err(wrap)?;
        let lints = rambac_ir::verify::lint(graph);
        Ok(Self {
            dims: dims.clone(),
            passes,
            unfused,
            elementwise,
            program,
            costs,
            plan,
            uncounted,
            rates: machine.rates(),
            lints,
            fit,
        })
    }

    fn graph(&self) -> &Graph {
        &self.program.graph
    }

    fn scope(&self, node: NodeId) -> Option<&str> {
        self.graph().node(node).scope.as_deref()
    }

    /// Sums per kind of op and phase, most FLOPs first, and per layer and phase in order.
    #[allow(clippy::type_complexity)]
    fn sums(&self) -> (Sums<(&str, &str)>, Sums<(&str, &str)>) {
        let (mut ops, mut layers) = (Sums::new(), Sums::new());
        for (step, cost) in self.program.steps.iter().zip(&self.costs) {
            let scope = self.scope(step.node);
            let phase = work::phase(scope);
            ops.add((work::kind(step), phase), 0.0, *cost);
            layers.add((work::layer(scope), phase), 0.0, *cost);
        }
        ops.lines.sort_by(|a, b| {
            (b.1.cost.flops, b.1.cost.bytes).partial_cmp(&(a.1.cost.flops, a.1.cost.bytes)).unwrap_or(a.0.cmp(&b.0))
        });
        (ops, layers)
    }

    /// Fused ops: name, places of the forward, number of backward ones.
    fn fused(&self) -> Vec<(&'static str, Vec<&str>, usize)> {
        let g = self.graph();
        let of = |forward: &'static str, backward: &str| {
            let at =
                |name: &str| g.iter().filter(|(_, n)| n.op.mnemonic() == name).map(|(id, _)| id).collect::<Vec<_>>();
            let places = at(forward).into_iter().map(|id| work::layer(self.scope(id))).collect::<Vec<_>>();
            (forward, places, at(backward).len())
        };
        let all = [
            of("gated_rms_norm", "gated_rms_norm_grad"),
            of("selection", "selection_grad"),
            of("chunk_attention", "chunk_attention_grad"),
        ];
        all.into_iter().filter(|f| !f.1.is_empty()).collect()
    }

    /// Products with a map as their epilogue, forward and backward.
    fn epilogues(&self) -> (usize, usize) {
        let all = self.graph().nodes.iter().filter(|n| matches!(n.op, Op::MatMulMap(_)));
        all.fold((0, 0), |(f, b), n| match work::phase(n.scope.as_deref()) {
            "backward" => (f, b + 1),
            _ => (f + 1, b),
        })
    }

    /// Maps, and the instructions of the longest.
    fn maps(&self) -> (usize, usize) {
        let lengths = self.graph().nodes.iter().filter_map(|n| match &n.op {
            Op::FusedMap(m) => Some(m.body.len()),
            Op::MatMulMap(m) => Some(m.body.len()),
            _ => None,
        });
        lengths.fold((0, 0), |(n, longest), len| (n + 1, longest.max(len)))
    }

    /// Steps without a kernel: why, and the ops with their number.
    fn slow(&self) -> Vec<(&'static str, Vec<(&'static str, usize)>)> {
        let mut all: Vec<(&str, Vec<(&str, usize)>)> = vec![];
        for (i, why) in slow_steps(&self.program) {
            let op = self.program.steps[i].op.mnemonic();
            let at = all.iter().position(|s| s.0 == why).unwrap_or_else(|| {
                all.push((why, vec![]));
                all.len() - 1
            });
            let ops = &mut all[at].1;
            match ops.iter_mut().find(|o| o.0 == op) {
                Some(o) => o.1 += 1,
                None => ops.push((op, 1)),
            }
        }
        all
    }

    fn print(&self, a: &Explain, config: Option<&Config>) -> Result<()> {
        let what = if a.train { "a training step" } else { "one run" };
        println!("{}: {what} at {}", a.model, self.dims);
        if let Some(c) = config {
            println!("  {}", show::wrapped(&describe(c), WIDTH - 2, "  "));
        }

        println!("\nPasses");
        let width = self.passes.iter().map(|p| p.name.len()).max().unwrap_or(0);
        for p in &self.passes {
            // The spaces within an item do not break.
            let changes: Vec<String> = p.changes.iter().map(|(op, d)| format!("{d:+}\u{a0}{op}")).collect();
            let changes = if changes.is_empty() { "nothing to do".into() } else { changes.join(", ") };
            let nodes = if p.before == p.after { p.after.to_string() } else { format!("{} → {}", p.before, p.after) };
            let head = format!("  {:<width$}  {nodes:<11}  ", p.name);
            let indent = " ".repeat(head.chars().count());
            println!("{head}{}", show::wrapped(&changes, WIDTH - indent.len(), &indent).replace('\u{a0}', " "));
        }

        println!("\nFused");
        for (op, places, backward) in self.fused() {
            let backward = if backward > 0 { format!(" and {backward} backward") } else { String::new() };
            let text = format!("{} {op}{backward}: {}", places.len(), places.join(", "));
            println!("  {}", show::wrapped(&text, WIDTH - 4, "    "));
        }
        let (maps, longest) = self.maps();
        if maps > 0 {
            let (ops, maps) = (show::plural(self.elementwise, "small op"), show::plural(maps, "map"));
            println!("  {ops} in {maps}, the longest of {}", show::plural(longest, "instruction"));
        }
        let (forward, backward) = self.epilogues();
        if forward + backward > 0 {
            let maps = show::plural(forward + backward, "map");
            println!("  {maps} in products as their epilogue, {backward} of them backward");
        } else if self.fused().is_empty() {
            println!("  nothing");
        }
        self.print_unfused();

        let (ops, layers) = self.sums();
        let all = ops.cost();
        println!("\nWork per kind of op");
        let mut t = Table::new(2, &["op", "phase", "steps", "FLOPs", "share", "bytes", "share", "FLOP/B"]);
        let cells = |c: Cost| {
            let intensity = if c.bytes > 0.0 { show::digits(c.flops / c.bytes) } else { "-".into() };
            [
                show::si(c.flops, ""),
                show::share(c.flops, all.flops),
                show::si(c.bytes, "B"),
                show::share(c.bytes, all.bytes),
                intensity,
            ]
        };
        for ((op, phase), s) in &ops.lines {
            t.row([op.to_string(), phase.to_string(), s.steps.to_string()].into_iter().chain(cells(s.cost)));
        }
        let total = ["all".to_string(), String::new(), self.program.steps.len().to_string()];
        t.row(total.into_iter().chain(cells(all)));
        t.print();

        println!("\nWork per layer");
        let mut t = Table::new(1, &["layer", "steps", "FLOPs", "backward", "share", "bytes", "backward", "share"]);
        let mut names: Vec<&str> = vec![];
        layers.lines.iter().map(|l| l.0.0).for_each(|l| {
            if !names.contains(&l) {
                names.push(l);
            }
        });
        for name in names {
            let of = |back: bool| {
                let lines = layers.lines.iter().filter(move |l| l.0.0 == name && (l.0.1 == "backward") == back);
                lines.fold((0, Cost::default()), |(n, c), l| (n + l.1.steps, c + l.1.cost))
            };
            let ((n, f), (m, b)) = (of(false), of(true));
            let both = f + b;
            t.row([
                layer_name(name, config),
                (n + m).to_string(),
                show::si(f.flops, ""),
                show::si(b.flops, ""),
                show::share(both.flops, all.flops),
                show::si(f.bytes, "B"),
                show::si(b.bytes, "B"),
                show::share(both.bytes, all.bytes),
            ]);
        }
        t.print();
        self.print_memory();
        if let Some(f) = &self.fit {
            print_fit(f, &self.rates, a.memory.memory_limit, config)?;
        }
        if config.is_some() {
            self.lints.iter().for_each(|l| println!("\n{}", show::wrapped(&l.to_string(), WIDTH, "  ")));
        }
        Ok(())
    }

    fn print_unfused(&self) {
        let slow = self.slow();
        if self.unfused.is_empty() && slow.is_empty() {
            println!("  nothing that can be fused was left");
            return;
        }
        println!("\nNot fused");
        for u in &self.unfused {
            let text = format!("{}: {}; so {} = {} lie in memory", u.what, u.reason, u.ty, show::bytes(u.bytes));
            println!("  {}", show::wrapped(&text, WIDTH - 4, "    "));
        }
        for (why, ops) in &slow {
            let ops: Vec<String> = ops.iter().map(|(op, n)| format!("{n} {op}")).collect();
            println!("  {}", show::wrapped(&format!("{}: {why}", ops.join(", ")), WIDTH - 4, "    "));
        }
    }

    fn print_program(&self) {
        let p = &self.program;
        println!("program {}: {} steps, {} buffers", p.name, p.steps.len(), p.buffers.len());
        for s in &p.sources {
            println!("  b{:<4} {:?} {:?} : {}", s.buffer.index(), s.kind, s.name, s.ty);
        }
        for (i, s) in p.steps.iter().enumerate() {
            let list = |vs: &[View]| vs.iter().map(view).collect::<Vec<_>>().join(", ");
            let scope = self.scope(s.node).map(|s| format!("  @{s}")).unwrap_or_default();
            println!("{i:>5}  {} {} -> {}{scope}", work::kind(s), list(&s.inputs), list(&s.outputs));
        }
        for o in &p.outputs {
            let how = if o.update { "updates" } else { "is" };
            println!("  output {:?} {how} {}", o.name, view(&o.view));
        }
    }

    fn json(&self, a: &Explain, config: Option<&Config>) -> Result<Vec<Json>> {
        let (ops, layers) = self.sums();
        let all = ops.cost();
        let dims: serde_json::Map<String, Json> = self.dims.iter().map(|(s, v)| (s.to_string(), json!(v))).collect();
        let mut out = vec![json!({
            "section": "model", "model": a.model, "train": a.train,
            "recompute": a.memory.recompute, "memory_limit": a.memory.memory_limit, "dims": dims,
            "parameters": config.map(Config::n_parameters), "nodes": self.graph().nodes.len(),
            "steps": self.program.steps.len(), "flops": all.flops, "bytes": all.bytes, "peak_bytes": self.plan.peak(),
        })];
        for p in &self.passes {
            let changes: serde_json::Map<String, Json> = p.changes.iter().map(|(k, d)| (k.clone(), json!(d))).collect();
            out.push(json!({
                "section": "pass", "pass": p.name, "before": p.before, "after": p.after, "changes": changes,
            }));
        }
        for (op, places, backward) in self.fused() {
            out.push(json!({ "section": "fused", "op": op, "places": places, "backward": backward }));
        }
        let (maps, longest) = self.maps();
        out.push(json!({
            "section": "fused", "op": "map", "count": maps, "of": self.elementwise, "longest": longest,
        }));
        for u in &self.unfused {
            out.push(json!({
                "section": "unfused", "node": u.what, "reason": u.reason, "type": u.ty, "bytes": u.bytes,
            }));
        }
        for (why, ops) in self.slow() {
            let ops: serde_json::Map<String, Json> = ops.iter().map(|(op, n)| (op.to_string(), json!(n))).collect();
            out.push(json!({ "section": "slow", "ops": ops, "reason": why }));
        }
        for (section, sums) in [("op", ops), ("layer", layers)] {
            for ((key, phase), s) in &sums.lines {
                out.push(json!({
                    "section": section, section: key, "phase": phase, "steps": s.steps, "flops": s.cost.flops,
                    "bytes": s.cost.bytes,
                }));
            }
        }
        out.extend(self.memory_json());
        if let Some(f) = &self.fit {
            let (before, after) = (f.kept.1, f.fitted.1);
            out.push(json!({
                "section": "recompute", "peak_bytes_kept": f.kept.0.peak(), "peak_bytes": f.fitted.0.peak(),
                "flops": after.flops - before.flops, "bytes": after.bytes - before.bytes,
                "time_factor": seconds(after, &self.rates) / seconds(before, &self.rates),
            }));
            for (layer, c) in recompute::by_layer(&f.prepared, &f.dims, &f.again).map_err(wrap)? {
                out.push(json!({
                    "section": "recompute_layer", "layer": layer, "kept_bytes": c.kept, "again_bytes": c.again,
                    "ops": c.ops,
                }));
            }
        }
        out.extend(self.lints.iter().map(|l| json!({ "section": "lint", "message": l.message, "help": l.help })));
        Ok(out)
    }
}

/// Seconds that work takes at the rates by which it was weighed.
fn seconds(c: Cost, t: &Target) -> f64 {
    c.flops / t.flops_per_second + c.bytes / t.bytes_per_second
}

/// What is kept and what is computed again, and what that costs.
fn print_fit(f: &Fit, t: &Target, limit: Option<usize>, config: Option<&Config>) -> Result<()> {
    let (before, after) = (f.kept.1, f.fitted.1);
    let within = limit.map(|l| format!(", within {}", show::bytes(l))).unwrap_or_default();
    println!(
        "\nRecomputation: {} → {} at its peak{within}",
        show::bytes(f.kept.0.peak()),
        show::bytes(f.fitted.0.peak())
    );
    let more = |a: f64, b: f64| format!("{:+.1} %", (b / a - 1.0) * 100.0);
    println!(
        "  price: {} ({}), {} ({}), time {} at {} and {}",
        show::si(after.flops - before.flops, "FLOP"),
        more(before.flops, after.flops),
        show::si(after.bytes - before.bytes, "B"),
        more(before.bytes, after.bytes),
        more(seconds(before, t), seconds(after, t)),
        show::si(t.flops_per_second, "FLOP/s"),
        show::si(t.bytes_per_second, "B/s")
    );
    if f.held > 0 {
        let layers = recompute::layers(&f.prepared).len();
        println!("  of the inputs of {layers} layers {} are held at once, the others computed again", f.held);
    }
    let mut table = Table::new(1, &["layer", "kept", "again", "computed again"]);
    for (layer, c) in recompute::by_layer(&f.prepared, &f.dims, &f.again).map_err(wrap)? {
        let ops = c.ops.iter().map(|(op, n)| if *n > 1 { format!("{n} {op}") } else { op.to_string() });
        let ops = show::fit(&ops.collect::<Vec<_>>().join(", "), WIDTH - 44);
        table.row([layer_name(&layer, config), show::bytes(c.kept), show::bytes(c.again), ops]);
    }
    table.print();
    Ok(())
}

/// `b3 : f32[N, L, 128]`, with its offset and rows where they are not the whole buffer.
fn view(v: &View) -> String {
    let offset = if v.offset.as_int() == Some(0) { String::new() } else { format!("+{}", v.offset) };
    let rows = match &v.strided {
        Some(Strided { cols, stride }) => format!(" (rows of {cols} every {stride})"),
        None => String::new(),
    };
    format!("b{}{offset} : {}{rows}", v.buffer.index(), v.ty)
}

/// `layers.3 retrieval`
fn layer_name(layer: &str, config: Option<&Config>) -> String {
    let index = layer.strip_prefix("layers.").and_then(|i| i.parse::<usize>().ok());
    let kind = config.zip(index).and_then(|(c, i)| c.layers().get(i).copied());
    match kind {
        Some(LayerKind::Mamba) => format!("{layer} mamba"),
        Some(LayerKind::Chunking) => format!("{layer} chunking"),
        Some(LayerKind::Retrieval) => format!("{layer} retrieval"),
        Some(LayerKind::Attention) => format!("{layer} attention"),
        Some(LayerKind::Variant) => {
            format!("{layer} {}", config.and_then(|c| c.attention.as_ref()).map_or("variant", |a| a.name.as_str()))
        }
        Some(LayerKind::Window) => format!("{layer} window"),
        Some(LayerKind::Mlp) => format!("{layer} mlp"),
        None => layer.to_string(),
    }
}

/// A model in one line.
pub fn describe(c: &Config) -> String {
    let count = |kind| c.layers().into_iter().filter(|k| *k == kind).count();
    let mamba = show::plural(count(LayerKind::Mamba), "Mamba-2 block");
    let head = if c.tie_word_embeddings { "tied head" } else { "own head" };
    let parameters = show::count(c.n_parameters());
    let (d, m, r, v) = (c.hidden_size, c.n_ssm_heads(), c.state_size, c.vocab_size);
    let common = format!("D {d}, {mamba} ({m} heads of {}, state {r})", c.head_dim);
    if c.is_plain() {
        return format!("plain Mamba-2: {parameters} parameters, {common}, vocabulary {v}, {head}");
    }
    if let Some(a) = &c.attention {
        let layers = show::plural(count(LayerKind::Variant), "layer");
        let rest = match c.transformer {
            true => format!("{} of {} tokens", show::plural(count(LayerKind::Window), "window layer"), c.window_size),
            false => format!("{mamba} ({m} heads of {}, state {r})", c.head_dim),
        };
        return format!(
            "{parameters} parameters, D {d}, {layers} of {} ({} query and {} kv heads), {rest}, vocabulary {v}, {head}",
            a.name, c.num_attention_heads, c.num_kv_heads
        );
    }
    format!(
        "RAMba: {parameters} parameters, {common}, {} in {}, chunks of {} of which {} are selected, {} query and {} kv \
         heads, vocabulary {v}, {head}",
        show::plural(count(LayerKind::Attention), "attention layer"),
        show::plural(c.num_upper_groups, "group"),
        c.chunk_size,
        c.chunk_topk,
        c.num_attention_heads,
        c.num_kv_heads,
    )
}
