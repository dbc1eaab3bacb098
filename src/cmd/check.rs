//! `rambac check`: a device against stored values and gradients.
//!
//! An op fixture is a safetensors file with inputs, upstream gradients, expected results and `grad.<input>`; which op it
//! is follows from the tensors it holds.  A model fixture is a folder with config.json, weights and expected.safetensors; where that
//! has the gradient of every parameter, a whole training step is run: clipping and the update must be what these give ([`update`]).
//! In bf16 what is compared with is not stored: it is what the ops' definitions give with values rounded where the graph says.

mod update;

use crate::cli::{Check, PrecisionArg};
use crate::device::{Gpu, On};
use crate::error::{Result, report, wrap};
use crate::model;
use miette::{IntoDiagnostic, miette};
use rambac_codegen::{Kernels, Program, lower, lower_for};
use rambac_ir::interp;
use rambac_ir::ops::*;
use rambac_ir::{Bindings, Builder, DType, Graph, HostArray, Ty, Value};
use rambac_models::stack::{self, Carry};
use rambac_passes::mixed::{shadow_name, shadowed};
use rambac_passes::train_step::{gradient_graph, train_step_with_gradients};
use rambac_passes::{Options, Precision, gradients, optimise};
use rambac_runtime::checkpoint::{Dtype, TensorFile};
use rambac_runtime::gpu::Bytes;
use rambac_runtime::{Executor, Store, Tensor};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

/// Runs the verb.
pub fn run(a: &Check, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    if a.device.gpu() {
        // That there is none is said once, not of every fixture.
        Gpu::open(a.device)?;
    }
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&a.dir)
        .map_err(|e| miette!("{}: cannot read this folder: {e}", a.dir.display()))?
        .map(|e| Ok(e?.path()))
        .collect::<std::io::Result<_>>()
        .into_diagnostic()?;
    paths.sort();
    let is_fixture = |p: &PathBuf| p.extension().is_some_and(|e| e == "safetensors") || p.join("config.json").exists();
    paths.retain(is_fixture);
    if let (Some(only), false) = (&a.only, paths.is_empty()) {
        let name = |p: &PathBuf| p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let all: Vec<String> = paths.iter().map(name).collect();
        paths.retain(|p| name(p).contains(only.as_str()));
        if paths.is_empty() {
            return Err(miette!(
                help = format!("there are {}", all.join(", ")),
                "--only {only}: no fixture in {} has that in its name",
                a.dir.display()
            ));
        }
    }
    if paths.is_empty() {
        return Err(miette!(
            help = "a fixture is a .safetensors file (an op) or a folder with config.json (a model)",
            "{}: no fixtures in this folder",
            a.dir.display()
        ));
    }
    if a.precision == PrecisionArg::Bf16 && !a.device.gpu() {
        return Err(miette!(
            help = "use --device cuda:0 or --device simulator",
            "--precision bf16 is about GPUs: the CPU's kernels compute in f32 alone, and the definitions are what is compared with"
        ));
    }
    let (mut tensors, mut failed, mut unable, mut worst) = (0, 0, 0, 0.0f64);
    for p in &paths {
        let precision = a.precision.into();
        let (values, gradients) = limits(a, p.is_dir());
        let mut case = if p.is_dir() { model_case(p, precision)? } else { op_case(p, precision)? };
        case.expect_rounded()?;
        let name = p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let got = match case.run(a.device, &pool) {
            Ok(mut got) => {
                case.differences(&mut got);
                got
            }
            // The others may still run.
            Err(e) => {
                report(e.wrap_err(format!("{name} can't be run on {}", a.device)));
                unable += 1;
                continue;
            }
        };
        let mut shown = false;
        let mut rows: Vec<(String, f64, f64)> = vec![];
        for (tensor, want) in &case.expected {
            let Some(have) = got.get(tensor) else {
                return Err(miette!("{name}: the program computes no {tensor}, which the fixture expects"));
            };
            let of_gradients = ["grad.", update::UPDATE, "optim."].iter().any(|p| tensor.starts_with(p));
            let limit = if of_gradients { gradients } else { values };
            rows.push((tensor.clone(), error(have, want)?, limit));
        }
        rows.sort_by(|x, y| (y.1 / y.2).total_cmp(&(x.1 / x.2)));
        for (tensor, e, limit) in &rows {
            let ok = e <= limit;
            tensors += 1;
            failed += !ok as usize;
            worst = worst.max(e / limit);
            if a.json {
                let row =
                    serde_json::json!({ "fixture": name, "tensor": tensor, "error": e, "limit": limit, "ok": ok });
                println!("{row}");
            } else if !ok || !shown {
                let mark = if ok { "ok  " } else { "FAIL" };
                println!("{mark} {name:<32} {:>3} tensors, worst {tensor}: {e:.2e} (limit {limit:.0e})", rows.len());
                shown = true;
            }
        }
    }
    if !a.json {
        println!(
            "{tensors} tensors of {} fixtures on {}: {failed} over tolerance, worst at {:.0} % of its limit",
            paths.len() - unable,
            a.device,
            worst * 100.0
        );
    }
    if unable == paths.len() {
        return Err(miette!("no fixture can be run on {}", a.device));
    }
    Ok(if failed + unable == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Limits of values and of gradients.
fn limits(a: &Check, model: bool) -> (f64, f64) {
    let (values, gradients) = match (a.precision, model) {
        (PrecisionArg::F32, _) => (1e-5, 1e-4),
        // A value has 8 bits, and kernels round more than graphs say: what tensor cores multiply.
        (PrecisionArg::Bf16, false) => (0.01, 0.03),
        // That of all layers adds up, and where two chunks score alike the other one may be chosen.
        (PrecisionArg::Bf16, true) => (0.06, 0.2),
    };
    (a.tolerance.unwrap_or(values), a.grad_tolerance.unwrap_or(gradients))
}

/// `‖a-b‖/‖b‖`; where fewer slots are expected than computed, the rest must be zero.
fn error(have: &HostArray, want: &HostArray) -> Result<f64> {
    let have = if have.shape == want.shape { have.clone() } else { trimmed(have, &want.shape)? };
    let (mut d, mut n) = (0.0, 0.0);
    for i in 0..want.len() {
        d += (have.get(i) - want.get(i)).powi(2);
        n += want.get(i).powi(2);
    }
    // An expected zero is compared to single-precision noise.
    let floor = 1e-6 * (want.len().max(1) as f64).sqrt();
    let e = d.sqrt() / n.sqrt().max(floor);
    Ok(if e.is_nan() { f64::INFINITY } else { e })
}

/// The leading part of the last axis; what is cut off must be zero.
fn trimmed(have: &HostArray, shape: &[usize]) -> Result<HostArray> {
    let wrong = || miette!("computed shape {:?}, expected {shape:?}", have.shape);
    if have.len() == shape.iter().product::<usize>() {
        return Ok(have.reshaped(shape));
    }
    let (Some((&k, rows)), Some((&w, want_rows))) = (have.shape.split_last(), shape.split_last()) else {
        return Err(wrong());
    };
    if rows != want_rows || w > k || (0..have.len()).any(|i| i % k >= w && have.get(i) != 0.0) {
        return Err(wrong());
    }
    Ok(have.gathered(shape, (0..have.len()).filter(|i| i % k < w)))
}

/// A graph, what goes in and what must come out.
struct Case {
    graph: Graph,
    /// As it runs in this precision; `None` in f32, where the graph is its own definition.
    narrowed: Option<Graph>,
    dims: Bindings,
    given: HashMap<String, HostArray>,
    expected: BTreeMap<String, HostArray>,
}

impl Case {
    fn new(
        graph: Graph,
        precision: Precision,
        dims: Bindings,
        mut given: HashMap<String, HostArray>,
        expected: BTreeMap<String, HostArray>,
    ) -> Case {
        let narrowed =
            (precision == Precision::Bf16).then(|| optimise(&graph, &Options { precision, ..Options::default() }));
        // What products read of parameters are rounded copies, which a run keeps.
        for name in narrowed.iter().flat_map(shadowed) {
            let mut half = HostArray { dtype: DType::BF16, ..given[name].clone() };
            half.round_to_dtype();
            given.insert(shadow_name(name), half);
        }
        Case { graph, narrowed, dims, given, expected }
    }

    /// In bf16 stored values are no measure: a choice that falls otherwise by a rounding changes all behind it.  What the
    /// ops' definitions give with the same roundings takes their place.
    fn expect_rounded(&mut self) -> Result<()> {
        if let Some(g) = &self.narrowed {
            let all = interp::outputs(g, &self.dims, &self.given, interp::Precision::Typed).map_err(wrap)?;
            let mut all: BTreeMap<String, HostArray> = all.into_iter().collect();
            self.differences(&mut all);
            for (name, a) in &mut self.expected {
                // What the graph lacks is told of later.
                if let Some(rounded) = all.remove(name) {
                    *a = rounded;
                }
            }
        }
        Ok(())
    }

    fn run(&self, on: On, pool: &Arc<rayon::ThreadPool>) -> Result<BTreeMap<String, HostArray>> {
        if on == On::Reference {
            return Ok(interp::outputs(&self.graph, &self.dims, &self.given, interp::Precision::Exact)
                .map_err(wrap)?
                .into_iter()
                .collect());
        }
        let graph = self.narrowed.clone().unwrap_or_else(|| optimise(&self.graph, &Options::default()));
        if on.gpu() {
            let program = lower_for(&graph, Kernels::Gpu);
            return pool.install(|| self.run_on(Gpu::open(on)?, program));
        }
        let program = lower(&graph);
        let mut e = Executor::new(program, pool.clone());
        let mut store = Store::default();
        let mut inputs: Vec<(String, Tensor)> = vec![];
        for (name, a) in &self.given {
            match self.graph.source(name) {
                Some((_, s)) if s.kind == SourceKind::Input => inputs.push((name.clone(), Tensor::from_host(a))),
                _ => store.insert(name.clone(), Tensor::from_host(a)),
            }
        }
        let views: Vec<_> = inputs.iter().map(|(n, t)| (n.as_str(), t.view())).collect();
        let out = e.run(&self.dims, &views, &mut store).map_err(wrap)?;
        let updated = store.0.iter().filter(|(n, _)| self.graph.output(n).is_some());
        let updated: Vec<_> = updated.map(|(n, t)| (n.clone(), t.to_host())).collect();
        Ok(out.into_iter().map(|(n, t)| (n, t.to_host())).chain(updated).collect())
    }

    fn run_on(&self, mut gpu: Gpu, program: Program) -> Result<BTreeMap<String, HostArray>> {
        let id = gpu.compile(program)?;
        // Inputs may lie there as well as params do.
        for (name, a) in &self.given {
            gpu.machine.set(name, &Bytes::from_host(a)).map_err(wrap)?;
        }
        let mut out = gpu.machine.run(id, &self.dims, &[]).map_err(wrap)?;
        for name in self.given.keys().filter(|n| self.graph.output(n).is_some()) {
            let new = gpu.machine.get(name).map_err(wrap)?;
            out.extend(new.map(|b| (name.clone(), b)));
        }
        Ok(out.into_iter().map(|(n, b)| (n, b.to_host())).collect())
    }

    /// Beside every new value of a parameter what was added to it: of the value itself that is a small part.
    fn differences(&self, got: &mut BTreeMap<String, HostArray>) {
        for name in self.expected.keys().filter_map(|n| n.strip_prefix(update::UPDATE)) {
            if let (Some(new), Some(old)) = (got.get(name), self.given.get(name)) {
                let d = HostArray::f32(&old.shape, (0..old.len()).map(|i| new.get(i) - old.get(i)));
                got.insert(format!("{}{name}", update::UPDATE), d);
            }
        }
    }
}

fn read(file: &TensorFile, name: &str) -> Result<HostArray> {
    let integer = matches!(file.info(name).map(|i| i.dtype), Some(Dtype::I32 | Dtype::I64));
    if integer {
        let (shape, v) = file.get_i32(name).map_err(wrap)?;
        return Ok(HostArray::i32(&shape, v));
    }
    let (shape, v) = file.get_f32(name).map_err(wrap)?;
    Ok(HostArray::f32(&shape, v.into_iter().map(f64::from)))
}

fn model_case(dir: &Path, precision: Precision) -> Result<Case> {
    let (config, weights) = model::config(&dir.to_string_lossy())?;
    let weights = weights.ok_or_else(|| miette!("{}: there are no weights beside config.json", dir.display()))?;
    let store = model::parameters(&config, Some(&weights), Default::default(), 0)?;
    let file = TensorFile::open(dir.join("expected.safetensors")).map_err(wrap)?;
    let mut expected = BTreeMap::new();
    let mut given: HashMap<String, HostArray> = store.0.iter().map(|(n, t)| (n.clone(), t.to_host())).collect();
    for name in file.names() {
        let a = read(&file, name)?;
        match name {
            "input_ids" | "labels" => {
                given.insert(name.to_string(), a);
            }
            _ => {
                expected.insert(name.to_string(), a);
            }
        }
    }
    let ids =
        given.get("input_ids").ok_or_else(|| miette!("{}: expected.safetensors has no input_ids", dir.display()))?;
    let (n, l) = match ids.shape[..] {
        [n, l] => (n, l),
        _ => return Err(miette!("{}: input_ids must be [N, L], but is {:?}", dir.display(), ids.shape)),
    };
    given.insert("loss_weights".into(), HostArray::f32(&[n, l], vec![1.0; n * l]));
    let loss = stack::loss(&config, Carry::Zero, true).map_err(wrap)?;
    let graph = match update::Step::of(&config, &given, &expected) {
        Some(step) => {
            let graph = train_step_with_gradients(&loss, &step.optimiser, |n| step.decays(n)).map_err(wrap)?;
            step.states(&mut given);
            step.expect(&given, &mut expected);
            graph
        }
        None => gradient_graph(&loss).map_err(wrap)?,
    };
    Ok(Case::new(graph, precision, Bindings::new([("N", n), ("L", l)]), given, expected))
}

/// Tensors of op fixtures that stay in f32: steps, decays, states and weights.
const EXACT: &[&str] = &["dt", "A", "D", "h0", "dh", "weight", "bias"];

/// Builds the graph of an op fixture.
struct OpCase<'f> {
    file: &'f TensorFile,
    precision: Precision,
    b: Builder,
    given: HashMap<String, HostArray>,
}

impl OpCase<'_> {
    fn input(&mut self, name: &str) -> Result<Value> {
        let a = read(self.file, name)?;
        let float = a.dtype.is_float();
        let v = self.b.input(name, Ty::new(a.dtype, a.shape.iter().copied()));
        self.given.insert(name.into(), a);
        Ok(if EXACT.contains(&name) || !float { v } else { self.rounded(v) })
    }
    /// What activations are: in bf16 rounded, in f32 as they are.
    fn rounded(&mut self, v: Value) -> Value {
        if self.precision == Precision::F32 {
            return v;
        }
        let half = self.b.cast(v, DType::BF16);
        self.b.cast(half, DType::F32)
    }
    fn inputs(&mut self, names: &[&str]) -> Result<Vec<Value>> {
        names.iter().map(|n| self.input(n)).collect()
    }
    fn zeros(&mut self, shape: &[usize]) -> Value {
        self.b.constant(0.0, Ty::f32(shape.iter().copied()))
    }
    fn number<T: std::str::FromStr>(&self, key: &str) -> Result<T> {
        let text = self.file.metadata().get(key);
        text.and_then(|t| t.parse().ok()).ok_or_else(|| {
            miette!("{}: the metadata's `{key}` is {text:?}, a number is wanted", self.file.path().display())
        })
    }
    /// Results and the gradients of `Σ y·dy` at `wrt`.
    fn finish(mut self, outputs: &[(&str, Value, Option<&str>)], wrt: &[(&str, Value)]) -> Result<Case> {
        let mut loss: Option<Value> = None;
        for (name, y, dy) in outputs {
            let y = if dy.is_none_or(|dy| EXACT.contains(&dy)) { *y } else { self.rounded(*y) };
            self.b.output(name, y);
            if let Some(dy) = dy {
                let dy = self.input(dy)?;
                let part = self.b.mul(y, dy);
                let part = self.b.sum_all(part);
                loss = Some(loss.map_or(part, |l| self.b.add(l, part)));
            }
        }
        let g = self.b.finish().map_err(wrap)?;
        let values: Vec<Value> = wrt.iter().map(|w| w.1).collect();
        let loss = loss.ok_or_else(|| miette!("{}: no upstream gradient", self.file.path().display()))?;
        let (g, grads) = gradients(g, loss, &values).map_err(wrap)?;
        let mut b = Builder::extend(g);
        for ((name, _), d) in wrt.iter().zip(grads) {
            b.output(&format!("grad.{name}"), d);
        }
        let mut expected = BTreeMap::new();
        for name in self.file.names().filter(|n| !self.given.contains_key(*n)) {
            expected.insert(name.to_string(), read(self.file, name)?);
        }
        let graph = b.finish().map_err(wrap)?;
        Ok(Case::new(graph, self.precision, Bindings::default(), self.given, expected))
    }
}

/// An unfilled slot has no weight to differentiate; a stored value there is what a dense computation made of index 0.
fn clear_unfilled(g: &mut HostArray, chunk: usize) {
    let [_, l, h, k] = g.shape[..] else { return };
    let filled = |i: usize| i % k < i / (k * h) % l / chunk;
    *g = HostArray::f32(&g.shape, (0..g.len()).map(|i| if filled(i) { g.get(i) } else { 0.0 }).collect::<Vec<_>>());
}

fn op_case(path: &Path, precision: Precision) -> Result<Case> {
    let file = TensorFile::open(path).map_err(wrap)?;
    let has = |names: &[&str]| names.iter().all(|n| file.info(n).is_some());
    let shape = |name: &str| file.info(name).map(|i| i.shape.clone()).unwrap_or_default();
    let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let mut c = OpCase { file: &file, precision, b: Builder::new(&stem, &[]), given: HashMap::new() };
    if has(&["x", "dt", "A", "B", "C", "D", "h0"]) {
        let names = ["x", "dt", "A", "B", "C", "D", "h0"];
        let x = c.inputs(&names)?;
        let y = c.b.push_all(SelectiveScan { block: c.number("chunk")? }, &x);
        let wrt: Vec<(&str, Value)> = names.into_iter().zip(x).collect();
        return c.finish(&[("y", y[0], Some("dy")), ("h", y[1], Some("dh"))], &wrt);
    }
    if has(&["x", "weight", "bias", "dy"]) {
        let names = ["x", "weight", "bias"];
        let mut x = c.inputs(&names)?;
        let wrt: Vec<(&str, Value)> = names.into_iter().zip(x.clone()).collect();
        let (s, w) = (shape("x"), shape("weight"));
        let (Some(&n), Some(&ch), Some(&k)) = (s.first(), s.get(2), w.get(2)) else {
            return Err(miette!("{}: x must be [N, L, c] and weight [c, 1, k]", path.display()));
        };
        x.push(c.zeros(&[n, k.saturating_sub(1), ch]));
        let y = c.b.push(CausalConv1d { silu: true }, &x);
        return c.finish(&[("y", y, Some("dy"))], &wrt);
    }
    if has(&["q", "k", "v", "retrieval_q", "landmarks", "do"]) {
        let names = ["q", "k", "v", "retrieval_q", "landmarks"];
        let x = c.inputs(&names)?;
        let (qs, rs) = (shape("q"), shape("retrieval_q"));
        let (Some(&n), Some(&d), Some(&r)) = (qs.first(), qs.get(3), rs.get(3)) else {
            return Err(miette!("{}: q and retrieval_q must have rank 4", path.display()));
        };
        let (chunk, k, off_by_one) = (c.number("chunk_size")?, c.number("topk")?, c.number("off_by_one")?);
        let rule = match file.metadata().get("weighting").map(String::as_str) {
            Some("softmax") => Weighting::Softmax,
            Some("stick_breaking") => Weighting::StickBreaking,
            other => return Err(miette!("{}: unknown weighting {other:?}", path.display())),
        };
        let start = c.b.constant(0.0, Ty::i32([n]));
        let s = c.b.push(Score { chunk, scale: 1.0 / (r as f64).sqrt() }, &[x[3], x[4], start]);
        let i = c.b.push_all(Select::new(k, Order::Recent), &[s]);
        let w = c.b.push(Weigh { rule }, &[s, i[0], i[1]]);
        let attend = Attend { chunk, scale: 1.0 / (d as f64).sqrt(), off_by_one, joint: false };
        let o = c.b.push(attend, &[x[0], x[1], x[2], i[0], i[1]]);
        let y = c.b.push(Aggregate {}, &[o, w]);
        let mut wrt: Vec<(&str, Value)> = names.into_iter().zip(x).collect();
        wrt.push(("weights", w));
        let mut case = c.finish(&[("o", y, Some("do")), ("weights", w, None), ("indices", i[0], None)], &wrt)?;
        if let Some(g) = case.expected.get_mut("grad.weights") {
            clear_unfilled(g, chunk);
        }
        return Ok(case);
    }
    let names: Vec<&str> = file.names().collect();
    Err(miette!(
        help = "known ops: scan (x dt A B C D h0), conv (x weight bias dy), hsa (q k v retrieval_q landmarks do)",
        "{}: the tensors {} belong to no known op",
        path.display(),
        names.join(", ")
    ))
}
