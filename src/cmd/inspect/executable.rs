//! What is in an executable; all of it is checked.

use super::{Source, tensors};
use crate::cli::Inspect;
use crate::cmd::compile::what;
use crate::cmd::explain::describe;
use crate::error::{Result, wrap};
use crate::show::{self, Table};
use rambac_codegen::cuda::Target;
use rambac_ir::ops::SourceKind;
use rambac_models::Config;
use rambac_runtime::Executable;
use rambac_runtime::checkpoint::TensorFile;
use serde_json::json;

/// Prints it.
pub fn print(a: &Inspect, file: &TensorFile) -> Result<()> {
    let e = Executable::open(&a.path).map_err(wrap)?;
    e.verify().map_err(wrap)?;
    if a.json {
        println!(
            "{}",
            json!({
                "kind": "executable", "path": a.path, "model": e.model, "mode": e.mode.name(), "compiler": e.compiler,
                "settings": e.settings, "targets": e.targets.iter().map(|t| t.name()).collect::<Vec<_>>(),
                "weights": e.weights_size().0, "weight_bytes": e.weights_size().1, "whole": true,
            })
        );
    } else {
        println!("{}: {} of {}, by {}", a.path.display(), what(e.mode), e.model, e.compiler);
        if let Some(c) = e.config.as_ref().and_then(|t| Config::from_json(t, "").ok()) {
            println!("  {}", show::wrapped(&describe(&c.config), 96, "  "));
        }
        if let Some(settings) = e.settings.as_object() {
            let all: Vec<String> =
                settings.iter().map(|(k, v)| format!("{k} {}", v.to_string().trim_matches('"'))).collect();
            println!("  {}", all.join(", "));
        }
    }
    parts(a, &e);
    kernels(a, &e)?;
    if e.has_weights() {
        let weights: Vec<&str> = e.params().map(|(n, _)| n).collect();
        tensors(a, "weights", &Source::Part(file, weights))?;
    } else if !a.json && e.params().next().is_some() {
        println!("\nno weights: `run` draws them");
    }
    if !a.json {
        println!("\nevery byte is what was written, and its programs are what this version makes of its graphs");
    }
    Ok(())
}

fn parts(a: &Inspect, e: &Executable) {
    let mut t =
        Table::new(2, &["part", "symbols", "nodes", "steps", "buffers", "inputs", "params", "states", "outputs"]);
    for p in &e.parts {
        let count = |k| p.program.sources.iter().filter(|s| s.kind == k).count();
        let sources = [count(SourceKind::Input), count(SourceKind::Param), count(SourceKind::State)];
        let outputs = p.program.outputs.iter().filter(|o| !o.update).count();
        let syms: Vec<&str> = p.program.syms.iter().map(|s| s.as_str()).collect();
        let (nodes, steps, buffers) = (p.program.graph.nodes.len(), p.program.steps.len(), p.program.buffers.len());
        if a.json {
            println!(
                "{}",
                json!({
                    "kind": "part", "name": p.name, "symbols": syms, "nodes": nodes, "steps": steps, "buffers": buffers,
                    "inputs": sources[0], "params": sources[1], "states": sources[2], "outputs": outputs,
                })
            );
        }
        let numbers = [nodes, steps, buffers].into_iter().chain(sources).chain([outputs]);
        t.row([p.name.clone(), syms.join(", ")].into_iter().chain(numbers.map(|n| n.to_string())));
    }
    if !a.json {
        println!();
        t.print();
    }
}

fn kernels(a: &Inspect, e: &Executable) -> Result<()> {
    for &arch in &e.targets {
        let all = e.kernels(arch).map_err(wrap)?;
        let target = Target::of(arch);
        let head = ["kernel", "threads", "registers", "spilled", "shared", "blocks/SM", "PTX", "CUBIN"];
        let mut t = Table::new(1, &head);
        for k in all {
            let u = k.usage.clone().unwrap_or_default();
            let shared = (u.shared + k.kernel.shared) as usize;
            let blocks = target.occupancy(k.kernel.threads as usize, u.registers as usize, shared);
            let spilled = u.spill_stores + u.spill_loads;
            if a.json {
                println!(
                    "{}",
                    json!({
                        "kind": "kernel", "name": k.kernel.name, "target": arch.name(), "threads": k.kernel.threads,
                        "registers": u.registers, "spill_stores": u.spill_stores, "spill_loads": u.spill_loads,
                        "shared": shared, "blocks_per_sm": blocks, "ptx_bytes": k.bytes[0], "cubin_bytes": k.bytes[1],
                    })
                );
            }
            let sizes = k.bytes.map(show::bytes);
            let numbers = [k.kernel.threads as usize, u.registers as usize, spilled as usize, shared, blocks];
            t.row([show::fit(&k.kernel.name, 46)].into_iter().chain(numbers.map(|n| n.to_string())).chain(sizes));
        }
        if !a.json {
            println!("\nkernels for {arch}: {}", all.len());
            t.print();
        }
    }
    Ok(())
}
