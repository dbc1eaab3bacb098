//! Elementwise regions become one `map`: one pass over memory however many ops.
//!
//! ```text
//! %s = silu %z : f32[N, L, 8]                  %g = map %z, %y, %b {body = ["silu v0", "mul v3 v1", "add v4 v2"], …}
//! %g = mul %s, %y                        ⇒
//! %c = broadcast %b                            (%b: f32[8] broadcasts inside the map)
//! %r = add %g, %c
//! ```
//! A region is a convex set of elementwise nodes of one shape and one phase (forward or backward); broadcasts and
//! splats are absorbed as operands and constants, casts from bf16 as operands, casts to bf16 as results.  Regions that read the same operands are one, too.  Requires: constants are folded.  Ensures: no float elementwise op
//! is left, only maps.

use crate::cse::is_backward;
use crate::mixed::widens;
use crate::rewrite::Rewrite;
use rambac_ir::ops::*;
use rambac_ir::{DType, Graph, Node, NodeId, Value};
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};

/// Bounds that keep a region's working set in registers or L1.
const MAX_OPERANDS: usize = 12;
const MAX_INSTS: usize = 48;

/// The instruction a node becomes, if it computes elementwise in floating point.
fn inst(g: &Graph, n: &Node) -> Option<MapFn> {
    // Halves round at every op; a map keeps registers in f32, and rounds what it writes.
    let fits = |d: DType| matches!(d, DType::F32 | DType::Bool);
    let rounds = matches!(&n.op, Op::Cast(c) if c.to == DType::BF16);
    if !n.inputs.iter().all(|v| fits(g.ty(*v).dtype)) || !(fits(n.tys[0].dtype) || rounds) {
        return None;
    }
    // What another op makes it may round itself.
    if rounds && inst(g, g.node(n.inputs[0].node)).is_none() {
        return None;
    }
    match &n.op {
        Op::Unary(u) => Some(MapFn::Unary(u.f)),
        Op::Binary(b) => Some(MapFn::Binary(b.f)),
        Op::Where(_) => Some(MapFn::Where),
        Op::Cast(c) => Some(MapFn::Cast(c.to)),
        _ => None,
    }
}

struct Regions<'g> {
    g: &'g Graph,
    users: Vec<Vec<NodeId>>,
    /// Region of each node, if it has one.
    of: Vec<Option<usize>>,
    members: Vec<BTreeSet<NodeId>>,
}

impl Regions<'_> {
    /// Values a region reads from outside, in order; broadcasts and casts from bf16 are looked through.
    fn operands(&self, set: &BTreeSet<NodeId>) -> Vec<Value> {
        let mut out = vec![];
        for &id in set {
            for &v in &self.g.node(id).inputs {
                if let Arg::Outside(v) = arg(self.g, v, set)
                    && !out.contains(&v)
                {
                    out.push(v);
                }
            }
        }
        out
    }

    /// Whether no path leaves the set and comes back.
    fn convex(&self, set: &BTreeSet<NodeId>) -> bool {
        let (Some(first), Some(last)) = (set.first(), set.last()) else { return true };
        let mut tainted = vec![false; last.index() - first.index() + 1];
        for i in first.0..=last.0 {
            let id = NodeId(i);
            let inside = set.contains(&id);
            let after = |v: &Value| {
                v.node >= *first && (tainted[v.node.index() - first.index()] || (!inside && set.contains(&v.node)))
            };
            let hit = self.g.node(id).inputs.iter().any(after);
            if hit && inside {
                return false;
            }
            tainted[(i - first.0) as usize] = hit;
        }
        true
    }

    fn grow(&mut self, id: NodeId) {
        let n = self.g.node(id);
        let mut set = BTreeSet::from([id]);
        let mut absorbed = vec![];
        for v in &n.inputs {
            let p = self.g.node(v.node);
            let Some(r) = self.of[v.node.index()] else { continue };
            if absorbed.contains(&r) || p.tys[0].shape != n.tys[0].shape || is_backward(p) != is_backward(n) {
                continue;
            }
            let union: BTreeSet<NodeId> = set.union(&self.members[r]).copied().collect();
            if union.len() <= MAX_INSTS && self.operands(&union).len() <= MAX_OPERANDS && self.convex(&union) {
                set = union;
                absorbed.push(r);
            }
        }
        let r = self.members.len();
        for a in absorbed {
            self.members[a].clear();
        }
        set.iter().for_each(|m| self.of[m.index()] = Some(r));
        self.members.push(set);
    }

    /// Joins regions that read the same: one whose operands another, later one reads as well.  No value lives longer
    /// for it, and the operands are read once.
    fn join_siblings(&mut self) {
        let mut readers: HashMap<Value, Vec<usize>> = HashMap::new();
        let operands: Vec<Vec<Value>> = self.members.iter().map(|m| self.operands(m)).collect();
        for (r, of) in operands.iter().enumerate() {
            of.iter().for_each(|&v| readers.entry(v).or_default().push(r));
        }
        for r in 0..self.members.len() {
            let (Some(&last), Some(first)) = (self.members[r].last(), operands[r].first()) else { continue };
            let n = self.g.node(last);
            let whole = |v: &Value| self.g.ty(*v).shape == n.tys[0].shape;
            if !operands[r].iter().any(whole) {
                continue;
            }
            let fits = |&other: &usize| {
                let Some(&end) = self.members[other].last() else { return false };
                let m = self.g.node(end);
                let alike = m.tys[0].shape == n.tys[0].shape && is_backward(m) == is_backward(n);
                let union = || self.members[r].union(&self.members[other]).copied().collect();
                end > last
                    && alike
                    && operands[r].iter().all(|v| operands[other].contains(v))
                    && self.members[r].len() + self.members[other].len() <= MAX_INSTS
                    && self.convex(&union())
            };
            if let Some(other) = readers[first].iter().copied().find(|o| *o != r && fits(o)) {
                let moved = std::mem::take(&mut self.members[r]);
                moved.iter().for_each(|m| self.of[m.index()] = Some(other));
                self.members[other].extend(moved);
            }
        }
    }

    /// Makes every member a region of its own.
    fn split(&mut self, r: usize) {
        for id in std::mem::take(&mut self.members[r]) {
            self.of[id.index()] = Some(self.members.len());
            self.members.push(BTreeSet::from([id]));
        }
    }

    /// Members whose value is read outside the region.
    fn results(&self, set: &BTreeSet<NodeId>) -> Vec<NodeId> {
        let read = |id: &&NodeId| {
            self.users[id.index()].iter().any(|u| !set.contains(u))
                || self.g.outputs.iter().any(|o| o.value.node == **id)
        };
        set.iter().filter(read).copied().collect()
    }
}

/// What an operand of a member is to the region.
enum Arg {
    Inside(NodeId),
    Splat(f64),
    Outside(Value),
}

fn arg(g: &Graph, v: Value, set: &BTreeSet<NodeId>) -> Arg {
    if set.contains(&v.node) {
        return Arg::Inside(v.node);
    }
    let from = behind(g, v).last().unwrap_or(v);
    match &g.node(from.node).op {
        Op::Constant(c) => Arg::Splat(c.value),
        _ => Arg::Outside(from),
    }
}

/// What a map reads in place of an operand: from behind a broadcast, and bf16 from behind its cast to f32.
fn behind(g: &Graph, v: Value) -> impl Iterator<Item = Value> {
    let n = g.node(v.node);
    let broadcast = matches!(n.op, Op::Broadcast(_)).then(|| n.inputs[0]);
    let m = g.node(broadcast.unwrap_or(v).node);
    let half = widens(g, m).then(|| m.inputs[0]);
    broadcast.into_iter().chain(half)
}

fn build(r: &mut Rewrite, regions: &Regions, set: &BTreeSet<NodeId>) {
    let g = regions.g;
    let results = regions.results(set);
    if results.is_empty() {
        return; // Dead: nothing outside reads it.
    }
    let operands = regions.operands(set);
    let mut body: Vec<MapInst> = vec![];
    let mut consts: HashMap<u64, u32> = HashMap::new();
    let mut reg: HashMap<NodeId, u32> = HashMap::new();
    let base = operands.len() as u32;
    for &id in set {
        let n = g.node(id);
        let args = n
            .inputs
            .iter()
            .map(|&v| match arg(g, v, set) {
                Arg::Inside(p) => reg[&p],
                Arg::Outside(v) => operands.iter().position(|&o| o == v).expect("BUG: operands are complete") as u32,
                Arg::Splat(c) => *consts.entry(c.to_bits()).or_insert_with(|| {
                    body.push(MapInst { f: MapFn::Const(c), args: vec![] });
                    base + body.len() as u32 - 1
                }),
            })
            .collect();
        body.push(MapInst { f: inst(g, n).expect("BUG: members are elementwise"), args });
        reg.insert(id, base + body.len() as u32 - 1);
    }
    let op = FusedMap {
        shape: g.node(results[0]).tys[0].shape.clone(),
        body,
        outs: results.iter().map(|m| reg[m] as usize).collect(),
        dtypes: results.iter().map(|m| g.node(*m).tys[0].dtype).collect(),
    };
    let last = g.node(*set.last().expect("BUG: regions are not empty"));
    let node = Node {
        op: op.into(),
        inputs: vec![],
        tys: vec![],
        names: results.iter().map(|m| g.node(*m).names[0].clone()).collect(),
        scope: last.scope.clone(),
        loc: last.loc.clone(),
    };
    let x: Vec<Value> = operands.iter().map(|&v| r.get(v)).collect();
    let out = r.b.copy(&node, &x);
    for (&m, v) in results.iter().zip(out) {
        r.set(m, vec![v]);
    }
}

/// See the module's comment.
pub fn fuse_map(g: &Graph) -> Graph {
    // A region that nothing reads has no result.
    let g = &crate::dce::dce(g);
    let mut regions = Regions { g, users: g.users(), of: vec![None; g.nodes.len()], members: vec![] };
    for (id, n) in g.iter() {
        if inst(g, n).is_some() {
            regions.grow(id);
        }
    }
    regions.join_siblings();

    let order = loop {
        match order(&regions) {
            Ok(order) => break order,
            Err(stuck) => regions.split(stuck),
        }
    };
    let mut r = Rewrite::new(g);
    for id in order {
        match regions.of[id.index()] {
            Some(k) => build(&mut r, &regions, &regions.members[k]),
            None => r.copy(id),
        }
    }
    crate::dce::dce(&r.finish())
}

/// Regions, by their last node, and other nodes in topological order; ties go to what came first.  A region that waits
/// for ever if there is one: regions are convex one by one, but two of them may still read each other.
fn order(regions: &Regions) -> Result<Vec<NodeId>, usize> {
    let g = regions.g;
    let unit = |id: NodeId| regions.of[id.index()].map_or(id, |r| *regions.members[r].last().expect("BUG: not empty"));
    let mut waits = vec![0usize; g.nodes.len()];
    let mut wakes: Vec<Vec<NodeId>> = vec![vec![]; g.nodes.len()];
    for (id, n) in g.iter() {
        let to = unit(id);
        let mut from: Vec<NodeId> = n.inputs.iter().flat_map(|v| looked_through(g, *v)).map(unit).collect();
        from.sort();
        from.dedup();
        for f in from.into_iter().filter(|&f| f != to) {
            wakes[f.index()].push(to);
            waits[to.index()] += 1;
        }
    }
    let mut ready: BinaryHeap<Reverse<NodeId>> =
        g.iter().map(|(id, _)| id).filter(|&id| unit(id) == id && waits[id.index()] == 0).map(Reverse).collect();
    let mut order = vec![];
    while let Some(Reverse(id)) = ready.pop() {
        order.push(id);
        for &w in &wakes[id.index()] {
            waits[w.index()] -= 1;
            if waits[w.index()] == 0 {
                ready.push(Reverse(w));
            }
        }
    }
    let waiting = |m: &BTreeSet<NodeId>| m.len() > 1 && m.last().is_some_and(|l| waits[l.index()] > 0);
    regions.members.iter().position(waiting).map_or(Ok(order), Err)
}

/// The node an operand comes from, and those [`behind`] it: all must be there first.
fn looked_through(g: &Graph, v: Value) -> Vec<NodeId> {
    std::iter::once(v).chain(behind(g, v)).map(|v| v.node).collect()
}
