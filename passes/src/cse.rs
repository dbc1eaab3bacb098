//! Common subexpressions: nodes with equal op and operands become one.
//!
//! Forward and backward nodes stay apart where the op is elementwise: computing a cheap value again in the backward
//! is better than keeping it in memory from the forward.

use crate::autodiff::GRAD;
use crate::rewrite::rewrite;
use rambac_ir::ops::Op;
use rambac_ir::{Graph, Node, Value};
use std::collections::HashMap;

/// Whether `n` belongs to the backward.
pub fn is_backward(n: &Node) -> bool {
    n.scope.as_deref().is_some_and(|s| s == GRAD || s.strip_prefix(GRAD).is_some_and(|r| r.starts_with('.')))
}

/// An op with its operands and what it became.
type Seen = (Op, Vec<Value>, Vec<Value>);

/// See the module's comment.
pub fn cse(g: &Graph) -> Graph {
    let mut seen: HashMap<String, Vec<Seen>> = HashMap::new();
    rewrite(g, |b, _, n, inputs| {
        if matches!(n.op, Op::Source(_)) {
            return None;
        }
        let phase = if n.op.def().is_elementwise() { is_backward(n) as u8 } else { 2 };
        let key = format!("{}{phase}{inputs:?}", n.op.mnemonic());
        let bucket = seen.entry(key).or_default();
        if let Some((_, _, out)) = bucket.iter().find(|(op, i, _)| *op == n.op && i == inputs) {
            return Some(out.clone());
        }
        let out = b.copy(n, inputs);
        bucket.push((n.op.clone(), inputs.to_vec(), out.clone()));
        Some(out)
    })
}
