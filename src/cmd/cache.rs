//! `rambac cache`: the compiled kernels that are kept between runs.

use crate::cli::{Cache as Args, CacheTask};
use crate::error::{Result, wrap};
use crate::show::{self, Table};
use miette::miette;
use rambac_codegen::cuda::Cache;
use rambac_codegen::cuda::cache::{Entry, VARIABLE};
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
            println!("{}", json!({ "folder": folder, "removed": c.entries, "files": c.files, "bytes": c.bytes }));
        } else {
            let n = show::plural(c.entries, "kernel");
            println!("{folder}: {n} removed, {}", show::bytes(c.bytes as usize));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let all = cache.entries(a.task == CacheTask::Verify).map_err(wrap)?;
    if a.json {
        all.iter().for_each(|e| println!("{}", line(e)));
    } else {
        print(&all, a.task);
        let bytes: u64 = all.iter().map(|e| e.bytes).sum();
        println!("{folder}: {}, {}", show::plural(all.len(), "kernel"), show::bytes(bytes as usize));
    }
    let damaged: Vec<&Entry> = all.iter().filter(|e| e.damage.is_some()).collect();
    for e in &damaged {
        eprintln!("damaged: {}: {}", e.path.display(), e.damage.as_deref().unwrap_or_default());
    }
    if !damaged.is_empty() {
        eprintln!("damaged entries are compiled again when they are needed");
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
