//! Maps that do the same to many tensors and are read by nobody become one op: an optimiser's update of all parameters.
//!
//! ```text
//! %p, %m = map %w1, %m1, %g1, %rate {body}          %p, %m, %q, %n = map_each %w1, %m1, %g1,
//! %q, %n = map %w2, %m2, %g2, %rate {body}    ⇒                      %w2, %m2, %g2, %rate {own = 3, shared = 1, body}
//! ```
//! A source that is emptied in the same step (`output "s" = constant`) and that such a map reads is emptied by it.
//! Requires: maps are fused.  Ensures: of maps with equal bodies, scalars and types whose results are outputs and nothing
//! else, one op is left.

use crate::rewrite::Rewrite;
use rambac_ir::ops::{FusedMap, MapEach, MapFn, MapInst, Op, SourceKind};
use rambac_ir::{DType, Graph, Node, NodeId, Output, Value};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// A map in the form of [`MapEach`]: what is equal for all of a group, and what is a tensor's own.
struct Member {
    node: NodeId,
    op: MapEach,
    own: Vec<Value>,
    shared: Vec<Value>,
    /// Outputs that the constants at the end of the results replace.
    emptied: Vec<Arc<str>>,
}

/// The constant that replaces a state after this step, if its value is read here.
fn emptied(g: &Graph, v: Value) -> Option<(&Output, f64)> {
    let Op::Source(s) = &g.node(v.node).op else { return None };
    let out = g.outputs.iter().find(|o| *o.name == *s.name && s.kind == SourceKind::State)?;
    match &g.node(out.value.node).op {
        Op::Constant(c) if c.ty == s.ty => Some((out, c.value)),
        _ => None,
    }
}

fn member(g: &Graph, id: NodeId) -> Option<Member> {
    let n = g.node(id);
    let Op::FusedMap(m) = &n.op else { return None };
    let whole = |v: &Value| g.ty(*v).shape == m.shape;
    let scalar = |v: &Value| g.ty(*v).rank() == 0;
    if m.shape.is_empty() || !n.inputs.iter().all(|v| whole(v) || scalar(v)) || !n.inputs.iter().any(whole) {
        return None;
    }
    let (own, shared): (Vec<Value>, Vec<Value>) = n.inputs.iter().partition(|v| whole(v));
    // A map without a scalar has what it needs early: together with others it would keep that for longer.
    if shared.is_empty() {
        return None;
    }
    let order: Vec<Value> = own.iter().chain(&shared).copied().collect();
    let register = |r: usize| match n.inputs.get(r) {
        Some(v) => order.iter().position(|o| o == v).expect("BUG: the operands are the same"),
        None => r,
    };
    let mut m: FusedMap = m.clone();
    m.body.iter_mut().flat_map(|i| &mut i.args).for_each(|a| *a = register(*a as usize) as u32);
    m.outs.iter_mut().for_each(|o| *o = register(*o));
    let mut names = vec![];
    for v in &own {
        if let Some((out, c)) = emptied(g, *v) {
            m.outs.push(order.len() + m.body.len());
            m.dtypes.push(g.ty(*v).dtype);
            m.body.push(MapInst { f: MapFn::Const(c), args: vec![] });
            names.push(out.name.clone());
        }
    }
    let op = MapEach { own: own.len(), shared: shared.len(), body: m.body, outs: m.outs, dtypes: m.dtypes };
    Some(Member { node: id, op, own, shared, emptied: names })
}

/// What members of a group have in common.
type Key = (String, Vec<DType>, Vec<Value>);

fn groups(g: &Graph) -> Vec<Vec<Member>> {
    let users = g.users();
    let mut at: HashMap<Key, usize> = HashMap::new();
    let mut all: Vec<Vec<Member>> = vec![];
    for (id, _) in g.iter().filter(|(id, _)| users[id.index()].is_empty()) {
        let Some(m) = member(g, id) else { continue };
        let types = m.own.iter().map(|v| g.ty(*v).dtype).collect();
        let key = (format!("{:?}", m.op), types, m.shared.clone());
        let k = *at.entry(key).or_insert_with(|| {
            all.push(vec![]);
            all.len() - 1
        });
        all[k].push(m);
    }
    all.retain(|m| m.len() > 1);
    all
}

/// See the module's comment.
pub fn fuse_each(g: &Graph) -> Graph {
    let groups = groups(g);
    // A group stands where its last member stood: nobody waits for the others.
    let last: HashMap<NodeId, &Vec<Member>> = groups.iter().map(|m| (m[m.len() - 1].node, m)).collect();
    let members: HashSet<NodeId> = groups.iter().flatten().map(|m| m.node).collect();
    let mut r = Rewrite::new(g);
    let mut emptied: HashMap<Arc<str>, Value> = HashMap::new();
    for (id, n) in g.iter() {
        let Some(group) = last.get(&id) else {
            if !members.contains(&id) {
                r.copy(id);
            }
            continue;
        };
        let own = group.iter().flat_map(|m| &m.own).chain(&group[0].shared);
        let x: Vec<Value> = own.map(|&v| r.get(v)).collect();
        let op = group[0].op.clone();
        let results = op.outs.len();
        let node =
            Node { op: op.into(), inputs: vec![], tys: vec![], names: vec![None; results * group.len()], ..n.clone() };
        let out = r.b.copy(&node, &x);
        for (m, out) in group.iter().zip(out.chunks(results)) {
            let (kept, more) = out.split_at(results - m.emptied.len());
            r.set(m.node, kept.to_vec());
            emptied.extend(m.emptied.iter().cloned().zip(more.iter().copied()));
        }
    }
    let mut out = r.finish();
    for o in &mut out.outputs {
        if let Some(v) = emptied.get(&o.name) {
            o.value = *v;
        }
    }
    crate::dce::dce(&out)
}
