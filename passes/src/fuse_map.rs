//! Elementwise regions become one `map`: one pass over memory however many ops.
//!
//! ```text
//! %s = silu %z : f32[N, L, 8]                  %g = map %z, %y, %b {body = ["silu v0", "mul v3 v1", "add v4 v2"], …}
//! %g = mul %s, %y                        ⇒
//! %c = broadcast %b                            (%b: f32[8] broadcasts inside the map)
//! %r = add %g, %c
//! ```
//! A region is a convex set of elementwise nodes of one shape and one phase (forward or backward); broadcasts and
//! splats are absorbed as operands and constants, casts from bf16 as operands, casts to bf16 as results.  Regions that read
//! the same operands are one, too.  What a region would read of an earlier one in f32, while it could be computed from bf16
//! in less memory, it computes itself.  Requires: constants are folded.  Ensures: no float elementwise op is left, only maps.

use crate::cse::is_backward;
use crate::mixed::widens;
use crate::rewrite::Rewrite;
use rambac_ir::ops::*;
use rambac_ir::{DType, Graph, Node, NodeId, Value};
use std::collections::{BTreeSet, HashMap};

/// Bounds that keep a region's working set in registers or L1.
const MAX_OPERANDS: usize = 12;
const MAX_INSTS: usize = 48;
/// Instructions that are done again rather than a value kept.
const MAX_AGAIN: usize = 8;

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

/// Whether a node adds the gradient of a norm to what else there is of the residual stream's.
fn is_residual(g: &Graph, n: &Node) -> bool {
    let norm = |v: &Value| v.result == 0 && matches!(g.node(v.node).op, Op::RmsNormGrad(_));
    matches!(&n.op, Op::Binary(b) if b.f == BinaryFn::Add) && n.inputs.iter().any(norm)
}

struct Regions<'g> {
    g: &'g Graph,
    users: Vec<Vec<NodeId>>,
    /// Region of each node, if it has one.
    of: Vec<Option<usize>>,
    members: Vec<BTreeSet<NodeId>>,
    /// Members of earlier regions that a region computes again for itself.
    again: HashMap<usize, BTreeSet<NodeId>>,
    /// Sums that become part of a norm's gradient, see `fuse_residual`: nothing but a cast goes with them.
    residual: Vec<bool>,
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
            let apart = self.residual[id.index()] || (self.residual[v.node.index()] && !matches!(n.op, Op::Cast(_)));
            if apart || absorbed.contains(&r) || p.tys[0].shape != n.tys[0].shape || is_backward(p) != is_backward(n) {
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

    /// Joins regions that read the same: one whose operands another, later one reads as well.  The operands are read once, and
    /// nothing waits for that.
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
                // What reads the first region's results waits for the other's operands.
                let inside = |u: &&NodeId| self.of[u.index()].is_some_and(|o| o == r || o == other);
                let readers = self.members[r].iter().flat_map(|m| &self.users[m.index()]).filter(|u| !inside(u));
                let waits = |u: &NodeId| *u < end && operands[other].iter().any(|v| v.node > *u);
                let union = || self.members[r].union(&self.members[other]).copied().collect();
                end > last
                    && alike
                    && !readers.into_iter().any(waits)
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

    /// The last node that reads a value, also from behind a view.
    fn last_use(&self, v: Value) -> NodeId {
        let g = self.g;
        let reads = |u: &&NodeId| g.node(**u).inputs.contains(&v);
        let one = |u: &NodeId| match &g.node(*u).op {
            Op::Reshape(_) | Op::Slice(_) | Op::Broadcast(_) => self.last_use(u.result(0)),
            _ if widens(g, g.node(*u)) => self.last_use(u.result(0)),
            _ => *u,
        };
        self.users[v.node.index()].iter().filter(reads).map(one).max().unwrap_or(v.node)
    }

    /// What of a member's own region it is computed from, with itself.
    fn closure(&self, m: NodeId) -> BTreeSet<NodeId> {
        let region = self.of[m.index()];
        let mut all = BTreeSet::from([m]);
        let mut open = vec![m];
        while let Some(id) = open.pop() {
            let own = self.g.node(id).inputs.iter().map(|v| v.node).filter(|p| self.of[p.index()] == region);
            open.extend(own.filter(|p| all.insert(*p)));
        }
        all
    }

    /// Lets later regions compute again what they would read of earlier ones in f32: where all that it is computed from has
    /// less bytes, counting what is not read at that time anyway, and some of it is bf16.
    fn compute_again(&mut self) {
        self.again.clear();
        for (m, n) in self.g.iter() {
            let Some(own) = self.of[m.index()] else { continue };
            let outside = self.users[m.index()].iter().filter(|u| self.of[u.index()] != Some(own));
            let by: Option<BTreeSet<usize>> = outside.map(|u| self.of[u.index()]).collect();
            let (Some(by), DType::F32) = (by, n.tys[0].dtype) else { continue };
            if by.is_empty() || self.g.outputs.iter().any(|o| o.value.node == m) {
                continue;
            }
            let closure = self.closure(m);
            let from = self.operands(&closure);
            let whole = |v: &Value| self.g.ty(*v).shape == n.tys[0].shape;
            let half = from.iter().any(|v| whole(v) && self.g.ty(*v).dtype == DType::BF16);
            if closure.len() > MAX_AGAIN || !half {
                continue;
            }
            let fits = |r: &usize| {
                let (Some(end), Some(first)) = (self.members[*r].last(), self.members[*r].first()) else {
                    return false;
                };
                let late = |v: &&Value| whole(v) && self.last_use(**v) < *end;
                let bytes: usize = from.iter().filter(late).map(|v| self.g.ty(*v).dtype.size()).sum();
                let mut all = self.computed(*r);
                all.extend(&closure);
                let alike = self.g.node(*first).tys[0].shape == n.tys[0].shape;
                alike && bytes < 4 && all.len() <= MAX_INSTS && self.operands(&all).len() <= MAX_OPERANDS
            };
            if by.iter().all(fits) {
                by.into_iter().for_each(|r| self.again.entry(r).or_default().extend(&closure));
            }
        }
    }

    /// Members and what is computed again with them.
    fn computed(&self, r: usize) -> BTreeSet<NodeId> {
        let mut all = self.members[r].clone();
        all.extend(self.again.get(&r).into_iter().flatten());
        all
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
        let again = |r: &usize, id: &NodeId| self.again.get(r).is_some_and(|a| a.contains(id));
        // Whoever computes a user, in its own region or again, without computing the member.
        let outside = |u: &NodeId, id: &NodeId| match self.of[u.index()] {
            None => true,
            Some(r) => {
                (!set.contains(u) && !again(&r, id)) || self.again.iter().any(|(_, a)| a.contains(u) && !a.contains(id))
            }
        };
        let read = |id: &&NodeId| {
            self.users[id.index()].iter().any(|u| outside(u, id)) || self.g.outputs.iter().any(|o| o.value.node == **id)
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

fn build(r: &mut Rewrite, regions: &Regions, region: usize) {
    let g = regions.g;
    let results = regions.results(&regions.members[region]);
    if results.is_empty() {
        return; // Dead: nothing outside reads it.
    }
    let last = g.node(*regions.members[region].last().expect("BUG: regions are not empty"));
    let set = &regions.computed(region);
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
    let residual = g.iter().map(|(_, n)| is_residual(g, n)).collect();
    let (of, members, again) = (vec![None; g.nodes.len()], vec![], HashMap::new());
    let mut regions = Regions { g, users: g.users(), of, members, again, residual };
    for (id, n) in g.iter() {
        if inst(g, n).is_some() {
            regions.grow(id);
        }
    }
    regions.join_siblings();
    let order = loop {
        regions.compute_again();
        match order(&regions) {
            Ok(order) => break order,
            Err(stuck) => regions.split(stuck),
        }
    };
    let mut r = Rewrite::new(g);
    for id in order {
        match regions.of[id.index()] {
            Some(k) => build(&mut r, &regions, k),
            None => r.copy(id),
        }
    }
    crate::dce::dce(&r.finish())
}

/// Regions, by their last node, and other nodes in topological order: everything stands where it stood, a region where its last
/// member did, but before the first that reads it, and what it reads itself before that.  So what is computed again for
/// the backward stays in front of its use.  A region that waits for ever if there is one: regions are convex one by one, but
/// two of them may still read each other.
fn order(regions: &Regions) -> Result<Vec<NodeId>, usize> {
    let g = regions.g;
    let unit = |id: NodeId| regions.of[id.index()].map_or(id, |r| *regions.members[r].last().expect("BUG: not empty"));
    // Sources keep their order: each waits for the one before it.
    let sources: Vec<NodeId> = g.sources().map(|(id, _)| id).collect();
    let reads = |u: NodeId| -> Vec<NodeId> {
        if let Ok(i) = sources.binary_search(&u) {
            return i.checked_sub(1).map(|i| sources[i]).into_iter().collect();
        }
        let all = regions.of[u.index()].map_or_else(|| BTreeSet::from([u]), |r| regions.computed(r));
        let read = all.iter().flat_map(|id| &g.node(*id).inputs).filter(|v| !all.contains(&v.node));
        let mut from: Vec<NodeId> = read.flat_map(|v| looked_through(g, *v)).map(unit).collect();
        from.sort_unstable();
        from.dedup();
        from.retain(|f| *f != u);
        from
    };
    #[derive(Clone, Copy, PartialEq)]
    enum State {
        New,
        Waits,
        Done,
    }
    let mut state = vec![State::New; g.nodes.len()];
    let mut order = vec![];
    for (id, _) in g.iter().filter(|(id, _)| unit(*id) == *id) {
        // The units that wait for each other, each with what it has still to wait for, the first last.
        let mut open = vec![];
        let mut next = (state[id.index()] == State::New).then_some(id);
        loop {
            if let Some(u) = next.take() {
                state[u.index()] = State::Waits;
                let mut from = reads(u);
                from.reverse();
                open.push((u, from));
            }
            let Some((u, from)) = open.last_mut() else { break };
            match from.pop() {
                Some(f) if state[f.index()] == State::New => next = Some(f),
                Some(f) if state[f.index()] == State::Waits => {
                    // A circle of units, of which some are regions of several nodes.
                    let circle = open.iter().rev().map(|o| o.0).take_while(|o| *o != f).chain([f]);
                    let stuck = circle.filter_map(|u| regions.of[u.index()]).find(|&r| regions.members[r].len() > 1);
                    return Err(stuck.expect("BUG: nodes alone are in order"));
                }
                Some(_) => {}
                None => {
                    state[u.index()] = State::Done;
                    order.push(*u);
                    open.pop();
                }
            }
        }
    }
    Ok(order)
}

/// The node an operand comes from, and those [`behind`] it: all must be there first.
fn looked_through(g: &Graph, v: Value) -> Vec<NodeId> {
    std::iter::once(v).chain(behind(g, v)).map(|v| v.node).collect()
}
