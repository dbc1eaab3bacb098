//! Recomputation: activations of a layer are thrown away after the forward and computed again for its backward.
//!
//! ```text
//! %a = f %x        @layers.0                  %a = f %x
//! %b = g %a        @layers.0                  %b = g %a
//! …                                     ⇒    …
//! %d = g_grad %a…  @grad.layers.0             %a' = f %x        @grad.layers.0
//!                                             %d = g_grad %a'…
//! ```
//! A layer is the first two parts of a scope.  What crosses from one layer to the next is kept; everything else a
//! layer's backward needs is cloned in front of its first use.  Requires: gradients are in the graph, nothing is fused
//! yet into maps.  Must come after common subexpressions, which would undo it.

use crate::cse::is_backward;
use rambac_ir::ops::Op;
use rambac_ir::{Builder, Graph, Node, NodeId, Output, Value};
use std::collections::HashMap;

fn layer(n: &Node) -> Option<&str> {
    let s = n.scope.as_deref()?;
    let s = s.strip_prefix("grad.").unwrap_or(s);
    let end = s.match_indices('.').nth(1).map_or(s.len(), |(i, _)| i);
    Some(&s[..end])
}

struct Pass<'g> {
    g: &'g Graph,
    b: Builder,
    map: Vec<Option<Vec<Value>>>,
    /// Clones per layer, so that one backward computes each value once.
    clones: HashMap<(String, NodeId), Vec<Value>>,
    /// Kept: sources, constants, what other layers of the forward or outputs read.
    kept: Vec<bool>,
}

impl Pass<'_> {
    fn operand(&mut self, user: &Node, v: Value) -> Value {
        let n = self.g.node(v.node);
        let same = layer(n).is_some() && layer(n) == layer(user);
        if !is_backward(user) || is_backward(n) || !same || self.kept[v.node.index()] {
            return self.map[v.node.index()].as_ref().expect("BUG: operands come first")[v.result as usize];
        }
        let key = (layer(n).unwrap_or_default().to_string(), v.node);
        if let Some(c) = self.clones.get(&key) {
            return c[v.result as usize];
        }
        // The clone belongs to the backward: its own operands are cloned in turn.
        let mut clone = n.clone();
        clone.scope = n.scope.as_ref().map(|s| format!("grad.{s}").into());
        clone.names = vec![None; n.tys.len()];
        let x: Vec<Value> = n.inputs.iter().map(|&v| self.operand(&clone, v)).collect();
        let out = self.b.copy(&clone, &x);
        self.clones.insert(key, out.clone());
        out[v.result as usize]
    }
}

/// See the module's comment.
pub fn recompute(g: &Graph) -> Graph {
    let mut kept = vec![false; g.nodes.len()];
    for (id, n) in g.iter() {
        kept[id.index()] |= n.inputs.is_empty() || matches!(n.op, Op::Source(_));
        for v in &n.inputs {
            let p = g.node(v.node);
            kept[v.node.index()] |= !is_backward(n) && layer(p) != layer(n);
        }
    }
    g.outputs.iter().for_each(|o| kept[o.value.node.index()] = true);
    let empty = Graph { name: g.name.clone(), syms: g.syms.clone(), ..Graph::default() };
    let mut p = Pass { g, b: Builder::extend(empty), map: vec![None; g.nodes.len()], clones: HashMap::new(), kept };
    for (id, n) in g.iter() {
        let x: Vec<Value> = n.inputs.iter().map(|&v| p.operand(n, v)).collect();
        let out = p.b.copy(n, &x);
        p.map[id.index()] = Some(out);
    }
    let get = |v: Value| p.map[v.node.index()].as_ref().expect("BUG: every node was copied")[v.result as usize];
    let outputs = g.outputs.iter().map(|o| Output { name: o.name.clone(), value: get(o.value) }).collect();
    let mut out = p.b.finish().unwrap_or_else(|e| panic!("BUG: recompute built an ill-typed graph: {e}"));
    out.outputs = outputs;
    out
}
