//! `rambac inspect`: what is in an executable, a run, a checkpoint, a model's folder or a safetensors file.
//!
//! Every value is read, so that broken ones (NaN, infinities) are found.

mod executable;

use crate::cli::Inspect;
use crate::cmd::explain::describe;
use crate::error::{Result, warn, wrap};
use crate::show::{self, Table};
use miette::miette;
use rambac_models::{Config, canonical_name};
use rambac_runtime::checkpoint::{Checkpoint, Dtype, TensorFile, TensorInfo, WeightsFolder};
use serde_json::{Value as Json, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Lines of trainer.json that are shown at most.
const SETTINGS: usize = 60;

/// Runs the verb.
pub fn run(a: &Inspect, pool: &rayon::ThreadPool) -> Result<ExitCode> {
    let path = a.path.as_path();
    let meta = std::fs::metadata(path).map_err(|e| miette!("{}: {e}", path.display()))?;
    let index = path.file_name().is_some_and(|n| n.to_string_lossy().ends_with(".index.json"));
    if meta.is_dir() {
        folder(a)?;
    } else if path.extension().is_some_and(|e| e == "json") && !index {
        config(a, path)?;
    } else if index {
        tensors(a, "weights", &Source::Folder(&WeightsFolder::open(path).map_err(wrap)?))?;
    } else {
        let file = TensorFile::open(path).map_err(wrap)?;
        if file.metadata().contains_key("rambac_executable") {
            pool.install(|| executable::print(a, &file))?;
            return Ok(ExitCode::SUCCESS);
        }
        for (key, value) in file.metadata() {
            if a.json {
                println!("{}", json!({ "kind": "metadata", "key": key, "value": value }));
            } else {
                println!("{key}: {}", show::fit(value, 80));
            }
        }
        tensors(a, "tensors", &Source::File(&file))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A folder: a run's newest checkpoint, a checkpoint, or a published model.
fn folder(a: &Inspect) -> Result<()> {
    let path = a.path.as_path();
    let published = path.join("config.json").exists() && !path.join("trainer.json").exists();
    let loose = WeightsFolder::open(path).is_ok() && !path.join("trainer.json").exists();
    if published || loose {
        let c = if published { Some(config(a, path)?) } else { None };
        let weights = WeightsFolder::open(path).map_err(wrap)?;
        tensors(a, "weights", &Source::Folder(&weights))?;
        if let Some(c) = c {
            fits(a, weights, &c);
        }
        return Ok(());
    }
    let checkpoint = Checkpoint::open(path).map_err(wrap)?;
    if a.json {
        println!("{}", json!({ "kind": "checkpoint", "path": checkpoint.path, "step": checkpoint.step }));
    } else {
        println!("checkpoint {}", checkpoint.path.display());
    }
    let c = config(a, &checkpoint.path)?;
    trainer(a, &checkpoint.trainer);
    tensors(a, "weights", &Source::File(&checkpoint.model))?;
    fits(a, WeightsFolder::open(&checkpoint.path).map_err(wrap)?, &c);
    tensors(a, "training state", &Source::File(&checkpoint.state))
}

fn config(a: &Inspect, path: &Path) -> Result<Config> {
    let parsed = Config::from_path(path).map_err(wrap)?;
    parsed.warnings.iter().for_each(warn);
    let c = parsed.config;
    if a.json {
        let keys: Json = serde_json::from_str(&c.to_json()).unwrap_or_default();
        println!("{}", json!({ "kind": "config", "parameters": c.n_parameters(), "config": keys }));
    } else {
        println!("{}", show::wrapped(&describe(&c), 98, "  "));
    }
    Ok(c)
}

/// Says whether the weights are those that the configuration asks for.
fn fits(a: &Inspect, mut weights: WeightsFolder, c: &Config) {
    let specs = c.parameters();
    let expected = specs.iter().map(|s| (s.name.as_str(), s.shape.as_slice()));
    let checked = weights.rename(canonical_name).and_then(|()| weights.check(expected, &["lm_head.weight"]));
    match (checked, a.json) {
        (Ok(()), true) => println!("{}", json!({ "kind": "fit", "ok": true })),
        (Err(e), true) => println!("{}", json!({ "kind": "fit", "ok": false, "problem": e.to_string() })),
        (Ok(()), false) => println!("  names and shapes are those of config.json"),
        (Err(e), false) => warn(e),
    }
}

/// trainer.json as `key = value`, whatever it holds.
fn trainer(a: &Inspect, text: &str) {
    let value: Json = serde_json::from_str(text).unwrap_or_default();
    if a.json {
        println!("{}", json!({ "kind": "trainer", "trainer": value }));
        return;
    }
    let mut lines = vec![];
    flatten("", &value, &mut lines);
    println!("\ntraining");
    for (key, value) in lines.iter().take(SETTINGS) {
        println!("  {key} = {}", show::fit(value, 94usize.saturating_sub(key.len())));
    }
    if lines.len() > SETTINGS {
        println!("  … and {} more in trainer.json", lines.len() - SETTINGS);
    }
}

fn flatten(prefix: &str, value: &Json, out: &mut Vec<(String, String)>) {
    match value {
        Json::Object(o) => {
            for (k, v) in o {
                let key = if prefix.is_empty() { k.clone() } else { format!("{prefix}.{k}") };
                flatten(&key, v, out);
            }
        }
        v => out.push((prefix.to_string(), v.to_string())),
    }
}

/// Where tensors come from.
enum Source<'a> {
    File(&'a TensorFile),
    /// Some of a file's tensors.
    Part(&'a TensorFile, Vec<&'a str>),
    Folder(&'a WeightsFolder),
}

impl Source<'_> {
    fn names(&self) -> Vec<&str> {
        match self {
            Source::File(f) => f.names().collect(),
            Source::Part(_, names) => names.clone(),
            Source::Folder(f) => f.names().collect(),
        }
    }
    fn info(&self, name: &str) -> Option<&TensorInfo> {
        match self {
            Source::File(f) | Source::Part(f, _) => f.info(name),
            Source::Folder(f) => f.info(name),
        }
    }
    fn values(&self, name: &str) -> Result<Vec<f32>> {
        let (_, v) = match self {
            Source::File(f) | Source::Part(f, _) => f.get_f32(name).map_err(wrap)?,
            Source::Folder(f) => f.get_f32(name).map_err(wrap)?,
        };
        Ok(v)
    }
    fn path(&self) -> PathBuf {
        match self {
            Source::File(f) | Source::Part(f, _) => f.path().into(),
            Source::Folder(f) => f.path().into(),
        }
    }
}

/// Of the finite values of a tensor.
struct Stats {
    broken: usize,
    min: f64,
    max: f64,
    mean: f64,
    std: f64,
}

fn stats(values: &[f32]) -> Stats {
    let finite = || values.iter().filter(|v| v.is_finite()).map(|&v| f64::from(v));
    let n = finite().count();
    let mean = finite().sum::<f64>() / n.max(1) as f64;
    let variance = finite().map(|v| (v - mean).powi(2)).sum::<f64>() / n.max(1) as f64;
    let (min, max) = finite().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
    let none = |x: f64| if n == 0 { f64::NAN } else { x };
    Stats { broken: values.len() - n, min: none(min), max: none(max), mean: none(mean), std: none(variance.sqrt()) }
}

/// Whether `get_f32` reads it.
fn is_float(d: Dtype) -> bool {
    matches!(d, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

fn tensors(a: &Inspect, title: &str, source: &Source) -> Result<()> {
    let mut head = vec!["tensor", "type", "shape", "bytes"];
    if a.stats {
        head.extend(["min", "max", "mean", "std"]);
    }
    let mut table = Table::new(3, &head);
    let (mut elements, mut bytes, mut count) = (0usize, 0usize, 0usize);
    let mut types: BTreeMap<String, usize> = BTreeMap::new();
    let mut broken = vec![];
    for name in source.names() {
        let Some(info) = source.info(name) else { continue };
        // Checked when the file was opened: the product is the tensor's size in the file.
        let n: usize = info.shape.iter().product();
        let size = n * info.dtype.size();
        let s = if is_float(info.dtype) { Some(stats(&source.values(name)?)) } else { None };
        (elements, bytes, count) = (elements + n, bytes + size, count + 1);
        *types.entry(info.dtype.to_string()).or_default() += 1;
        if let Some(s) = s.as_ref().filter(|s| s.broken > 0) {
            broken.push((name.to_string(), s.broken, n));
        }
        if a.json {
            let mut row = json!({
                "kind": "tensor", "of": title, "name": name, "dtype": info.dtype.to_string(), "shape": info.shape,
                "bytes": size, "not_finite": s.as_ref().map(|s| s.broken),
            });
            if let (Some(s), true) = (&s, a.stats) {
                // NaN, of a tensor without finite values, becomes null.
                row["min"] = json!(s.min);
                row["max"] = json!(s.max);
                row["mean"] = json!(s.mean);
                row["std"] = json!(s.std);
            }
            println!("{row}");
            continue;
        }
        let width = if a.stats { 40 } else { 60 };
        let shape = format!("{:?}", info.shape);
        let mut row = vec![show::fit(name, width), info.dtype.to_string(), shape, show::bytes(size)];
        if a.stats {
            let number = |x: f64| if x.is_nan() { "-".to_string() } else { format!("{x:.2e}") };
            let cells = |s: Stats| [s.min, s.max, s.mean, s.std].map(number).to_vec();
            row.extend(s.map(cells).unwrap_or_else(|| vec!["-".into(); 4]));
        }
        table.row(row);
    }
    if a.json {
        println!(
            "{}",
            json!({
                "kind": "total", "of": title, "path": source.path(), "tensors": count, "elements": elements,
                "bytes": bytes, "not_finite": broken.iter().map(|b| b.1).sum::<usize>(),
            })
        );
        return Ok(());
    }
    let types: Vec<String> = types.iter().map(|(t, n)| format!("{n} {t}")).collect();
    println!(
        "\n{title}: {} ({}), {} elements, {}",
        show::plural(count, "tensor"),
        types.join(", "),
        show::count(elements as u64),
        show::bytes(bytes)
    );
    if count > 0 {
        table.print();
    }
    for (name, n, of) in &broken {
        println!("  BROKEN {name}: {n} of {} are NaN or infinite", show::plural(*of, "value"));
    }
    if broken.is_empty() && count > 0 {
        println!("  all values are finite");
    }
    Ok(())
}
