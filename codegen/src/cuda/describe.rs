//! A GPU program as JSON: forms with their conditions, launches with sizes and arguments as expressions of the symbols,
//! workspace, library calls.
//!
//! An expression is a dim (`N*L/64`), `ceil(E / 4)`, `(E + E)`, `(E - E)` (at least 0), `E·E`, `min(E, E)` or `max(E, E)`.  There is no way back,
//! see [`describe`](crate::describe).
//!
//! ```json
//! [{"forms": [{"name": "rows", "why": "…", "chosen": "predicted", "needs": [], "when": ["N*L >= 64"],
//!              "workspace": [{"name": "partial", "type": "f32", "elements": "64*N"}],
//!              "calls": [{"kernel": "rms_norm_bf16_1024", "grid": ["L*N", "1", "1"],
//!                         "arguments": [{"address": "input 0"}, {"i64": "1024"}, {"address": "output 0"}]}]}]}]
//! ```

use super::emit::{GpuProgram, GpuStep};
use super::form::{Call, Form, Gemm, GemmOperand, Kernel, Launch, Operand, Param, TensorParam, Workspace};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;

// Structs are taken apart field by field: one that is added must be described too, or an executable could differ in it
// unseen.

/// The steps of a GPU program, as text.
pub fn describe(p: &GpuProgram) -> String {
    // Steps that are alike are written once and copied.
    let mut known: HashMap<*const Vec<Form>, String> = HashMap::new();
    let mut out = String::from("[");
    for (i, s) in p.steps.iter().enumerate() {
        let text = known.entry(Arc::as_ptr(&s.forms)).or_insert_with(|| step(s).to_string());
        out += if i > 0 { "," } else { "" };
        out += text;
    }
    out + "]"
}

fn step(s: &GpuStep) -> Value {
    json!({ "forms": s.forms.iter().map(form).collect::<Vec<_>>() })
}

/// A kernel, without what it was compiled to; the hash of its headers tells code of another version.
pub fn kernel(k: &Kernel) -> Value {
    let Kernel { name, source, threads, shared, blocks_per_sm } = k;
    json!({
        "name": name, "threads": threads, "dynamic_shared": shared, "blocks_per_sm": blocks_per_sm, "source": source,
        "headers": super::headers::hash(&k.source),
    })
}

fn texts<T: ToString>(all: &[T]) -> Vec<String> {
    all.iter().map(T::to_string).collect()
}

pub(super) fn form(f: &Form) -> Value {
    let Form { name, why, measured, needs, when, workspace, calls } = f;
    let workspace = workspace.iter().map(|w| {
        let Workspace { name, dtype, elements } = w;
        json!({ "name": name, "type": dtype.name(), "elements": elements.to_string() })
    });
    let chosen = if *measured { "measured" } else { "predicted" };
    json!({
        "name": name, "why": why, "chosen": chosen, "needs": texts(needs), "when": texts(when), "workspace": workspace.collect::<Vec<_>>(),
        "calls": calls.iter().map(call).collect::<Vec<_>>(),
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
    match c {
        Call::Launch(Launch { kernel, grid, params, ahead }) => {
            let mut all = json!({
                "kernel": kernel.name, "grid": texts(grid), "arguments": params.iter().map(param).collect::<Vec<_>>(),
            });
            if !ahead.is_empty() {
                all["ahead"] = ahead.iter().map(|o| operand(*o)).collect();
            }
            all
        }
        Call::Gemm(Gemm { batch, m, n, k, a, b, c, plus }) => json!({
            "product": {
                "batch": batch.to_string(), "m": m.to_string(), "n": n.to_string(), "k": k.to_string(),
                "a": matrix(a), "b": matrix(b), "c": matrix(c), "plus": plus.as_ref().map(matrix),
            }
        }),
    }
}

fn matrix(m: &GemmOperand) -> Value {
    let GemmOperand { at, first, dtype, ld, step, trans } = m;
    json!({
        "at": operand(*at), "first": first.to_string(), "type": dtype.name(), "row": ld.to_string(),
        "matrix": step.to_string(), "transposed": trans,
    })
}

fn param(p: &Param) -> Value {
    match p {
        Param::Address(o) => json!({ "address": operand(*o) }),
        Param::Element { at, dtype, first } => {
            json!({ "address": operand(*at), "type": dtype.name(), "first": first.to_string() })
        }
        Param::Int(e) => json!({ "i32": e.to_string() }),
        Param::Long(e) => json!({ "i64": e.to_string() }),
        // JSON has no infinities.
        Param::Float(v) => json!({ "f32": format!("{v:?}") }),
        Param::Table(words) => json!({ "table": words.iter().map(param).collect::<Vec<_>>() }),
        Param::Tensor(TensorParam { at, first, dtype, dims, strides, tile }) => json!({
            "tensor": operand(*at), "first": first.to_string(), "type": dtype.name(), "dims": texts(dims),
            "strides": texts(strides), "box": tile,
        }),
    }
}
