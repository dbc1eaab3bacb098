//! `rambac cache`: the compiled kernels that are kept between runs.

use crate::cli::{Cache as Args, CacheTask};
use crate::error::{Result, wrap};
use crate::show::{self, Table};
use miette::miette;
use rambac_codegen::cuda::Cache;
use rambac_codegen::cuda::cache::{Entry, VARIABLE};
use rambac_codegen::cuda::choices::Kept;
use serde_json::json;
use std::process::ExitCode;

/// Runs the verb.
pub fn run(a: &Args) -> Result<ExitCode> {
    let cache = Cache::standard();
    let Some(folder) = cache.folder().map(|f| f.display().to_string()) else {
        return Err(miette!(
            "there is no cache: {VARIABLE} is empty, or there is no home folder; set {VARIABLE} to a folder"
        ));
    };
    if a.task == CacheTask::Clear {
        let c = cache.clear().map_err(wrap)?;
        if a.json {
            let line = json!({
                "folder": folder, "removed": c.entries, "choices": c.choices, "files": c.files, "bytes": c.bytes,
            });
            println!("{line}");
        } else {
            let (n, m) = (show::plural(c.entries, "kernel"), show::plural(c.choices, "measured choice"));
            println!("{folder}: {n} and {m} removed, {}", show::bytes(c.bytes as usize));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let all = cache.entries(a.task == CacheTask::Verify).map_err(wrap)?;
    let choices = cache.choices().map_err(wrap)?;
    if a.json {
        all.iter().for_each(|e| println!("{}", line(e)));
        choices.iter().for_each(|k| println!("{}", choice_line(k)));
    } else {
        print(&all, a.task);
        print_choices(&choices, a.task);
        let bytes = all.iter().map(|e| e.bytes).chain(choices.iter().map(|k| k.bytes)).sum::<u64>() as usize;
        let (n, m) = (show::plural(all.len(), "kernel"), show::plural(choices.len(), "measured choice"));
        println!("{folder}: {n}, {m}, {}", show::bytes(bytes));
    }
    let kernels = all.iter().filter_map(|e| Some((&e.path, e.damage.as_deref()?)));
    let damaged: Vec<_> =
        kernels.chain(choices.iter().filter_map(|k| Some((&k.path, k.choice.as_ref().err()?.as_str())))).collect();
    for (path, what) in &damaged {
        eprintln!("damaged: {}: {what}", path.display());
    }
    if !damaged.is_empty() {
        eprintln!("damaged entries are made again when they are needed");
    } else if a.task == CacheTask::Verify && !a.json {
        println!("all are what was written");
    }
    let failed = a.task == CacheTask::Verify && !damaged.is_empty();
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn line(e: &Entry) -> serde_json::Value {
    let u = e.usage.as_ref();
    json!({
        "kernel": e.kernel, "target": e.arch.name(), "compiler": e.compiler, "bytes": e.bytes, "path": e.path,
        "registers": u.map(|u| u.registers), "spill_stores": u.map(|u| u.spill_stores),
        "spill_loads": u.map(|u| u.spill_loads), "shared": u.map(|u| u.shared), "damage": e.damage,
    })
}

fn choice_line(k: &Kept) -> serde_json::Value {
    let c = k.choice.as_ref().ok();
    json!({
        "device": c.map(|c| &c.device), "target": c.map(|c| &c.arch), "step": c.map(|c| &c.step),
        "form": c.map(|c| &c.best().0.form), "seconds": c.map(|c| c.best().1), "gain": c.and_then(|c| c.gain()),
        "candidates": c.map(|c| c.candidates.len()), "bytes": k.bytes, "path": k.path, "damage": k.choice.as_ref().err(),
    })
}

fn print_choices(all: &[Kept], task: CacheTask) {
    if task == CacheTask::Verify || all.is_empty() {
        return;
    }
    let mut t = Table::new(4, &["measured step", "device", "target", "form", "µs", "gain", "of"]);
    for c in all.iter().filter_map(|k| k.choice.as_ref().ok()) {
        let (best, seconds) = c.best();
        t.row([
            show::fit(&c.step, 48),
            show::fit(&c.device, 24),
            c.arch.clone(),
            best.form.clone(),
            format!("{:.1}", seconds * 1e6),
            c.gain().map_or("?".into(), |g| format!("{g:.2}")),
            c.candidates.len().to_string(),
        ]);
    }
    t.print();
}

fn print(all: &[Entry], task: CacheTask) {
    if task == CacheTask::Verify || all.is_empty() {
        return;
    }
    let mut t = Table::new(3, &["kernel", "target", "compiler", "registers", "spilled", "shared", "bytes"]);
    for e in all {
        let of =
            |f: fn(&rambac_codegen::nvrtc::Usage) -> u32| e.usage.as_ref().map_or("?".into(), |u| f(u).to_string());
        t.row([
            show::fit(&e.kernel, 56),
            e.arch.to_string(),
            e.compiler.split(" (").next().unwrap_or_default().to_string(),
            of(|u| u.registers),
            of(|u| u.spill_stores + u.spill_loads),
            of(|u| u.shared),
            show::bytes(e.bytes as usize),
        ]);
    }
    t.print();
}
