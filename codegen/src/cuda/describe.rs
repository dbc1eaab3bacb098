//! A GPU program as JSON: forms with their conditions, launches with sizes and arguments as expressions of the symbols,
//! workspace, library calls.
//!
//! An expression is a dim (`N*L/64`), `ceil(E / 4)`, `(E + E)`, `(E - E)` (at least 0), `E·E`, `min(E, E)` or `max(E, E)`.  There is no way back,
//! see [`describe`](crate::describe).
//!
//! ```json
//! [{"forms": [{"name": "rows", "why": "…", "when": ["N*L >= 64"],
//!              "workspace": [{"name": "partial", "type": "f32", "elements": "64*N"}],
//!              "calls": [{"kernel": "rms_norm_bf16_1024", "grid": ["L*N", "1", "1"],
//!                         "arguments": [{"address": "input 0"}, {"i64": "1024"}, {"address": "output 0"}]}]}]}]
//! ```

use super::emit::{GpuProgram, GpuStep};
use super::form::{Call, Form, GemmOperand, Kernel, Operand, Param};
use serde_json::{Value, json};

/// The steps of a GPU program.
pub fn describe(p: &GpuProgram) -> Value {
    let step = |s: &GpuStep| json!({ "forms": s.forms.iter().map(form).collect::<Vec<_>>() });
    p.steps.iter().map(step).collect()
}

/// A kernel, without what it was compiled to.
pub fn kernel(k: &Kernel) -> Value {
    json!({
        "name": k.name, "threads": k.threads, "dynamic_shared": k.shared, "blocks_per_sm": k.blocks_per_sm,
        "source": k.source,
    })
}

fn form(f: &Form) -> Value {
    let workspace = f
        .workspace
        .iter()
        .map(|w| json!({ "name": w.name, "type": w.dtype.name(), "elements": w.elements.to_string() }));
    json!({
        "name": f.name, "why": f.why,
        "when": f.when.iter().map(|c| c.to_string()).collect::<Vec<_>>(),
        "workspace": workspace.collect::<Vec<_>>(),
        "calls": f.calls.iter().map(call).collect::<Vec<_>>(),
    })
}

fn operand(o: Operand) -> String {
    match o {
        Operand::Input(i) => format!("input {i}"),
        Operand::Output(i) => format!("output {i}"),
        Operand::Workspace(i) => format!("workspace {i}"),
    }
}

fn call(c: &Call) -> Value {
    let matrix = |m: &GemmOperand| {
        json!({
            "at": operand(m.at), "first": m.first.to_string(), "type": m.dtype.name(), "row": m.ld.to_string(), "matrix": m.step.to_string(),
            "transposed": m.trans,
        })
    };
    match c {
        Call::Launch(l) => json!({
            "kernel": l.kernel.name,
            "grid": l.grid.iter().map(|e| e.to_string()).collect::<Vec<_>>(),
            "arguments": l.params.iter().map(param).collect::<Vec<_>>(),
        }),
        Call::Gemm(g) => json!({
            "product": {
                "batch": g.batch.to_string(), "m": g.m.to_string(), "n": g.n.to_string(), "k": g.k.to_string(),
                "a": matrix(&g.a), "b": matrix(&g.b), "c": matrix(&g.c), "add": g.add,
            }
        }),
    }
}

fn param(p: &Param) -> Value {
    match p {
        Param::Address(o) => json!({ "address": operand(*o) }),
        Param::Element { at, first, .. } => json!({ "address": operand(*at), "first": first.to_string() }),
        Param::Int(e) => json!({ "i32": e.to_string() }),
        Param::Long(e) => json!({ "i64": e.to_string() }),
        // JSON has no infinities.
        Param::Float(v) => json!({ "f32": format!("{v:?}") }),
    }
}
