//! A gate in front of a norm becomes part of it: row by row, nothing between them reaches memory.
//!
//! ```text
//! %s = silu %z                                 %n = gated_rms_norm %y, %z, %w
//! %u = mul %y, %s                        ⇒
//! %n = rms_norm %u, %w
//! ```
//! Requires: nothing else reads the gate or the gated value; so a training step is fused before autodiff, whose gradient
//! of the one op then computes both again instead of keeping them.  Ensures: one op in place of three.

use crate::fuse_selection::push_in_scope;
use crate::rewrite::Rewrite;
use rambac_ir::ops::{BinaryFn, Cast, GatedRmsNorm, MapFn, MapInst, Op, UnaryFn};
use rambac_ir::{DType, Graph, NodeId, Value};
use std::collections::HashMap;

/// What a norm's operand is made of: `(value, gate's argument)`.
fn gate(g: &Graph, users: &[Vec<NodeId>], norm: NodeId) -> Option<(Value, Value)> {
    let alone = |v: Value| users[v.node.index()].len() == 1 && g.outputs.iter().all(|o| o.value != v);
    let u = *g.node(norm).inputs.first()?;
    let Op::Binary(b) = &g.node(u.node).op else { return None };
    if b.f != BinaryFn::Mul || !alone(u) {
        return None;
    }
    let x = &g.node(u.node).inputs;
    [(x[0], x[1]), (x[1], x[0])].into_iter().find_map(|(value, gate)| match &g.node(gate.node).op {
        Op::Unary(f) if f.f == UnaryFn::Silu && alone(gate) => Some((value, g.node(gate.node).inputs[0])),
        _ => None,
    })
}

/// See the module's comment.
pub fn fuse_norm(g: &Graph) -> Graph {
    let users = g.users();
    let mut r = Rewrite::new(g);
    for (id, n) in g.iter() {
        let Op::RmsNorm(norm) = &n.op else {
            r.copy(id);
            continue;
        };
        let Some((y, z)) = gate(g, &users, id) else {
            r.copy(id);
            continue;
        };
        let x = [y, z, n.inputs[1]].map(|v| r.get(v));
        let out = push_in_scope(&mut r, id, n.names.clone(), GatedRmsNorm { eps: norm.eps }.into(), &x);
        r.set(id, out);
    }
    crate::dce::dce(&r.finish())
}

/// The norm's gradient that a map adds to something else, and that.  The map may round the sum, too.
fn residual(g: &Graph, users: &[Vec<NodeId>], map: NodeId) -> Option<(NodeId, Value)> {
    let n = g.node(map);
    let Op::FusedMap(m) = &n.op else { return None };
    let [a, c] = n.inputs[..] else { return None };
    let (add, rounded) = m.body.split_first()?;
    let rounds = |i: &MapInst| i.f == MapFn::Cast(DType::BF16) && i.args[..] == [2];
    let results = m.outs[0] == 2 && m.dtypes[0] == DType::F32 && rounded.iter().all(rounds) && m.outs.len() <= 2;
    if !matches!(add.f, MapFn::Binary(BinaryFn::Add)) || add.args[0] == add.args[1] || !results {
        return None;
    }
    [(a, c), (c, a)].into_iter().find_map(|(d, base)| {
        let norm = g.node(d.node);
        let readers = users[d.node.index()].iter().filter(|u| g.node(**u).inputs.contains(&d)).count();
        let alone = readers == 1 && g.outputs.iter().all(|o| o.value != d);
        let fits = matches!(norm.op, Op::RmsNormGrad(_)) && d.result == 0 && norm.inputs.len() == 3;
        let same = g.ty(base) == g.ty(d) && n.tys[0] == *g.ty(d);
        (fits && same && alone && base.node < d.node).then_some((d.node, base))
    })
}

/// See the module's comment.
pub fn fuse_residual(g: &Graph) -> Graph {
    let users = g.users();
    let found: Vec<(NodeId, NodeId, Value)> =
        g.iter().filter_map(|(map, _)| residual(g, &users, map).map(|(norm, base)| (map, norm, base))).collect();
    let sums: HashMap<NodeId, NodeId> = found.iter().map(|f| (f.0, f.1)).collect();
    let bases: HashMap<NodeId, Value> = found.iter().map(|f| (f.1, f.2)).collect();
    let mut r = Rewrite::new(g);
    for (id, n) in g.iter() {
        if let Some(base) = bases.get(&id) {
            let x: Vec<Value> = n.inputs.iter().chain([base]).map(|&v| r.get(v)).collect();
            let out = push_in_scope(&mut r, id, n.names.clone(), n.op.clone(), &x);
            r.set(id, out);
        } else if let Some(norm) = sums.get(&id) {
            let mut all = vec![r.get(norm.result(0))];
            if n.tys.len() > 1 {
                all.extend(push_in_scope(&mut r, id, vec![n.names[1].clone()], Cast { to: DType::BF16 }.into(), &all));
            }
            r.set(id, all);
        } else {
            r.copy(id);
        }
    }
    r.finish()
}
