//! A graph as text.

use super::{ANNOTATED, is_anonymous, is_label_char, is_scope_char, is_word};
use crate::attr::quoted;
use crate::graph::{Graph, Node, Value};
use std::collections::HashMap;
use std::sync::Arc;

/// The text of `g`; see [`text`](crate::text) for the form.  Graphs that the verifier refuses print as far as they go.
pub fn print(g: &Graph) -> String {
    let labels = labels(g);
    let label = |v: &Value| match labels.get(v.node.index()).and_then(|l| l.get(v.result as usize)) {
        Some(l) => format!("%{l}"),
        None => g.label(*v),
    };
    let syms: Vec<&str> = g.syms.iter().map(|s| s.as_str()).collect();
    let name = if is_word(&g.name) { g.name.clone() } else { quoted(&g.name) };
    let mut out = format!("graph {name}({}) {{\n", syms.join(", "));
    for (id, n) in g.iter() {
        let results: Vec<String> = (0..n.tys.len()).map(|r| label(&id.result(r))).collect();
        let operands: Vec<String> = n.inputs.iter().map(&label).collect();
        out += &format!("  {} = {}\n", results.join(", "), rhs(n, &operands));
    }
    let outputs: Vec<String> =
        g.outputs.iter().map(|o| format!(" {} = {}", quoted(&o.name), label(&o.value))).collect();
    out + &format!("  return{}\n}}\n", outputs.join(","))
}

/// What stands to the right of `=`.
fn rhs(n: &Node, operands: &[String]) -> String {
    let mnemonic = n.op.mnemonic();
    let (mut head, mut attrs) = (vec![], vec![]);
    for (name, a) in n.op.attrs() {
        match (mnemonic, name) {
            ("input" | "param" | "state", "name") | ("constant", "value") => head.push(a.to_string()),
            (m, "ty") if ANNOTATED.contains(&m) => {}
            _ => attrs.push(format!("{name} = {}", a)),
        }
    }
    head.extend_from_slice(operands);
    let mut out = mnemonic.to_string();
    if !head.is_empty() {
        out += &format!(" {}", head.join(", "));
    }
    if !attrs.is_empty() {
        out += &format!(" {{{}}}", attrs.join(", "));
    }
    let tys: Vec<String> = n.tys.iter().map(|t| t.to_string()).collect();
    out += &format!(" : {}", tys.join(", "));
    if let Some(s) = &n.scope {
        let plain = !s.is_empty() && s.chars().all(is_scope_char);
        out += &if plain { format!(" @{s}") } else { format!(" @{}", quoted(s)) };
    }
    out
}

/// Every value's label without `%`, unique.
fn labels(g: &Graph) -> Vec<Vec<String>> {
    let mut uses: HashMap<Arc<str>, usize> = HashMap::new();
    g.iter()
        .map(|(id, n)| {
            (0..n.tys.len())
                .map(|r| match n.names.get(r) {
                    Some(Some(name)) => {
                        let plain = !name.is_empty() && name.chars().all(is_label_char) && !is_anonymous(name);
                        let text = if plain { name.to_string() } else { quoted(name) };
                        let nth = uses.entry(name.clone()).or_default();
                        *nth += 1;
                        if *nth == 1 { text } else { format!("{text}~{nth}") }
                    }
                    _ if n.tys.len() > 1 => format!("{}_{r}", id.0),
                    _ => id.0.to_string(),
                })
                .collect()
        })
        .collect()
}
