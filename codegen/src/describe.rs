//! A Program as JSON, whole: what the executable file shows to other tools.
//!
//! Sizes are dims in text form (`N*L/64`).  There is no way back on purpose: who loads a file lowers its graph again and
//! compares, so that no index from a file is ever used.
//!
//! ```json
//! {"name": "loss", "symbols": ["N", "L"],
//!  "buffers": [{"type": "f32[N, L]", "in": "arena"}, {"type": "f32[64]", "in": "source"}],
//!  "sources": [{"kind": "param", "name": "w", "type": "f32[64]", "buffer": 1}],
//!  "steps": [{"op": "matmul", "attributes": {"trans_b": "true"}, "node": 7, "inputs": [{"buffer": 0, "type": "f32[N, L]"}],
//!             "outputs": [{"buffer": 4, "type": "f32[N, L]", "offset": "64", "rows": {"length": "64", "every": "256"}}]}],
//!  "outputs": [{"name": "y", "view": {"buffer": 4, "type": "f32[N, L]"}, "updates": false}]}
//! ```

use crate::program::{Buffer, BufferKind, OutputSlot, Program, SourceSlot, Step, Strided, View};
use serde_json::{Map, Value, json};

// Structs are taken apart field by field: one that is added must be described too, or an executable could differ in it
// unseen.

/// See the module's comment.
pub fn program(p: &Program) -> Value {
    // The graph stands beside it, as text.
    let Program { name, syms, buffers, steps, sources, outputs, graph: _ } = p;
    let buffer = |b: &Buffer| {
        let Buffer { ty, kind } = b;
        let place = match kind {
            BufferKind::Arena => "arena",
            BufferKind::Source(_) => "source",
        };
        json!({ "type": ty.to_string(), "in": place })
    };
    let source = |s: &SourceSlot| {
        let SourceSlot { kind, name, ty, buffer } = s;
        json!({ "kind": kind.name(), "name": name, "type": ty.to_string(), "buffer": buffer.index() })
    };
    let output = |o: &OutputSlot| {
        let OutputSlot { name, view: v, update } = o;
        json!({ "name": name, "view": view(v), "updates": update })
    };
    json!({
        "name": name,
        "symbols": syms.iter().map(|s| s.as_str()).collect::<Vec<_>>(),
        "buffers": buffers.iter().map(buffer).collect::<Vec<_>>(),
        "sources": sources.iter().map(source).collect::<Vec<_>>(),
        "steps": steps.iter().map(step).collect::<Vec<_>>(),
        "outputs": outputs.iter().map(output).collect::<Vec<_>>(),
    })
}

fn step(s: &Step) -> Value {
    let Step { op, node, inputs, outputs } = s;
    let attributes: Map<String, Value> =
        op.attrs().into_iter().map(|(name, a)| (name.to_string(), a.to_string().into())).collect();
    json!({
        "op": op.mnemonic(), "attributes": attributes, "node": node.index(),
        "inputs": inputs.iter().map(view).collect::<Vec<_>>(),
        "outputs": outputs.iter().map(view).collect::<Vec<_>>(),
    })
}

fn view(v: &View) -> Value {
    let View { buffer, offset, ty, strided } = v;
    let mut out = json!({ "buffer": buffer.index(), "type": ty.to_string() });
    if offset.as_int() != Some(0) {
        out["offset"] = offset.to_string().into();
    }
    if let Some(Strided { cols, stride }) = strided {
        out["rows"] = json!({ "length": cols.to_string(), "every": stride.to_string() });
    }
    out
}

/// Where two descriptions first differ, and how: `steps[3].inputs[0].offset: 4 in the first, 8 in the second`.
pub fn difference(a: &Value, b: &Value) -> Option<String> {
    fn walk(at: &str, a: &Value, b: &Value) -> Option<String> {
        match (a, b) {
            (Value::Object(x), Value::Object(y)) => {
                let dot = if at.is_empty() { "" } else { "." };
                let keys = x.keys().chain(y.keys().filter(|k| !x.contains_key(*k)));
                keys.map(|k| (k, x.get(k).unwrap_or(&Value::Null), y.get(k).unwrap_or(&Value::Null)))
                    .find_map(|(k, p, q)| walk(&format!("{at}{dot}{k}"), p, q))
            }
            (Value::Array(x), Value::Array(y)) => {
                let none = Value::Null;
                let n = x.len().max(y.len());
                let of = |v: &'_ [Value], i: usize| v.get(i).unwrap_or(&none).clone();
                (0..n).find_map(|i| walk(&format!("{at}[{i}]"), &of(x, i), &of(y, i)))
            }
            _ if a == b => None,
            _ => {
                let short = |v: &Value| {
                    let s = v.to_string();
                    if s.chars().count() > 60 { s.chars().take(60).chain(['…']).collect() } else { s }
                };
                Some(format!("{at}: {} in the first, {} in the second", short(a), short(b)))
            }
        }
    }
    if a == b { None } else { walk("", a, b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rambac_ir::{Builder, Dim, Ty};

    #[test]
    fn a_program_in_full() {
        let mut b = Builder::new("g", &["N"]);
        let x = b.input("x", Ty::f32([Dim::sym("N"), Dim::int(8)]));
        let w = b.param("w", Ty::f32([4, 4]));
        let part = b.slice(x, 1, 4, 8);
        let y = b.linear(part, w);
        b.output("y", y);
        let p = crate::lower(&b.finish().unwrap());
        let d = program(&p);
        assert_eq!(d["sources"][1], json!({ "kind": "param", "name": "w", "type": "f32[4, 4]", "buffer": 1 }));
        let x = &d["steps"][0]["inputs"][0];
        assert_eq!(x["offset"], "4");
        assert_eq!(x["rows"], json!({ "length": "4", "every": "8" }));
        assert_eq!(d["steps"][0]["attributes"]["trans_b"], "true");
        assert_eq!(difference(&d, &d), None);
        let mut other = d.clone();
        other["steps"][0]["inputs"][0]["offset"] = "5".into();
        assert_eq!(
            difference(&d, &other).unwrap(),
            "steps[0].inputs[0].offset: \"4\" in the first, \"5\" in the second"
        );
        other["steps"].as_array_mut().unwrap().clear();
        assert!(difference(&d, &other).unwrap().starts_with("steps[0]: {\"op\":\"matmul\""));
    }
}
