//! Recomputation: values of the forward are thrown away and computed again for the backward.
//!
//! ```text
//! %a = f %x        @layers.0                  %a = f %x
//! %b = g %a        @layers.0                  %b = g %a
//! …                                     ⇒    …
//! %d = g_grad %a…  @grad.layers.0             %a' = f %x        @grad.layers.0
//!                                             %d = g_grad %a'…
//! ```
//! A layer is the first two parts of a scope.  What crosses from one layer to the next is always kept; of the rest any
//! set of nodes may be computed again: each is cloned once, in front of its first use in the backward, on operands that
//! are kept or cloned themselves.  Requires: gradients are in the graph, nothing is fused yet into maps (so clones fuse
//! with the backward).  Must come after common subexpressions, which would undo it.
//!
//! # Which set
//! [`choose`] answers for a price of memory, in seconds per byte: the set of least time + price · bytes kept.  Whether a
//! node is worth it hangs on its operands, which must be there too, so the choice is not one per node.  But it is a
//! minimum cut, found exactly: with a vertex per value (on the source's side: needed in the backward) and one per node
//! (on the source's side: computed again),
//!
//! ```text
//! source ──∞──▶ value     the backward reads it                 value ──price·bytes──▶ its node    needed but kept
//! node ──∞──▶ operand     computed again, so this is needed     node ──seconds──▶ sink             computed again
//! ```
//! Rising prices give sets of falling memory, from which the caller takes the cheapest whose real memory plan fits (in
//! codegen, which knows the plan).  Prices are per value, as a value is only in the way where the plan is full.

use crate::cse::is_backward;
use crate::min_cut::{INFINITE, Network};
use crate::mixed::{narrows, widens};
use rambac_ir::ops::{Op, traffic};
use rambac_ir::ty::ConcreteTy;
use rambac_ir::{Bindings, Builder, DimError, Graph, Node, NodeId, Output, Value};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// What is computed again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Everything is kept.
    #[default]
    Nothing,
    /// Everything that does not cross layers.
    All,
    /// These nodes of the graph as this pass meets it.
    Nodes(BTreeSet<NodeId>),
}

/// Rates of a device, for prices: nothing else is known of it here.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Of large matrix products.
    pub flops_per_second: f64,
    /// Read and written, of large copies.
    pub bytes_per_second: f64,
}

impl Target {
    /// An H200 in bf16: about half of what one card was seen to reach, in both.
    pub const GPU: Target = Target { flops_per_second: 4e14, bytes_per_second: 2.2e12 };
}

impl Default for Target {
    /// Two cores with AVX-512.  What is chosen hangs on the quotient alone, which most machines share within a factor of two.
    fn default() -> Self {
        Self { flops_per_second: 3e11, bytes_per_second: 2.8e10 }
    }
}

/// The layer of a node, forward or backward.
pub fn layer(n: &Node) -> Option<&str> {
    let s = n.scope.as_deref()?;
    let s = s.strip_prefix("grad.").unwrap_or(s);
    let end = s.match_indices('.').nth(1).map_or(s.len(), |(i, _)| i);
    Some(&s[..end])
}

/// What may be computed again: nodes of the forward whose values stay within their layer and hang on no gradient.
pub fn candidates(g: &Graph) -> BTreeSet<NodeId> {
    within(g, layer)
}

/// A node's operand and, where that is a view, what lies behind it: all that a reader keeps.
fn kept_by(g: &Graph, v: Value) -> impl Iterator<Item = NodeId> {
    std::iter::successors(Some(v.node), |id| {
        let n = g.node(*id);
        is_view(g, n).then(|| n.inputs[0].node)
    })
}

/// As [`candidates`], with other parts of a model in place of layers.
fn within<'g, K: PartialEq>(g: &'g Graph, part: impl Fn(&'g Node) -> Option<K>) -> BTreeSet<NodeId> {
    let (mut fixed, mut late) = (vec![false; g.nodes.len()], vec![false; g.nodes.len()]);
    for (id, n) in g.iter() {
        late[id.index()] = is_backward(n) || n.inputs.iter().any(|v| late[v.node.index()]);
        fixed[id.index()] |= n.inputs.is_empty() || part(n).is_none() || late[id.index()];
        for from in n.inputs.iter().filter(|_| !is_backward(n)).flat_map(|v| kept_by(g, *v)) {
            fixed[from.index()] |= part(g.node(from)) != part(n);
        }
    }
    g.outputs.iter().for_each(|o| fixed[o.value.node.index()] = true);
    // A value that is not made again and that nothing reads but rounded is kept rounded.
    let mut plain: BTreeSet<Value> = g.outputs.iter().map(|o| o.value).collect();
    plain.extend(g.nodes.iter().filter(|n| !narrows(g, n)).flat_map(|n| n.inputs.iter().copied()));
    for (id, n) in g.iter().filter(|(_, n)| narrows(g, n) && !plain.contains(&n.inputs[0])) {
        fixed[id.index()] |= fixed[n.inputs[0].node.index()];
    }
    g.iter().map(|(id, _)| id).filter(|id| !fixed[id.index()]).collect()
}

/// Values of nodes `among` that the backward needs if `again` are computed again: what it reads, and operands of the
/// latter.
fn needed(g: &Graph, among: &BTreeSet<NodeId>, again: &BTreeSet<NodeId>) -> BTreeSet<Value> {
    let mut need = BTreeSet::new();
    let read = g.nodes.iter().filter(|n| is_backward(n)).flat_map(|n| &n.inputs);
    let mut open: Vec<Value> = read.copied().filter(|v| among.contains(&v.node)).collect();
    while let Some(v) = open.pop() {
        if need.insert(v) && again.contains(&v.node) {
            open.extend(g.node(v.node).inputs.iter().copied().filter(|v| among.contains(&v.node)));
        }
    }
    need
}

/// Results that lie in the memory of an operand, or that maps read from behind: to keep them means nothing.
fn is_view(g: &Graph, n: &Node) -> bool {
    matches!(n.op, Op::Reshape(_) | Op::Slice(_) | Op::Broadcast(_)) || widens(g, n)
}

/// Nodes with their concrete types.
struct Sized<'g> {
    g: &'g Graph,
    dims: &'g Bindings,
}

impl Sized<'_> {
    fn ty(&self, v: Value) -> Result<ConcreteTy, DimError> {
        self.g.ty(v).bind(self.dims)
    }
    /// Seconds to compute a node again.
    fn seconds(&self, id: NodeId, target: &Target) -> Result<f64, DimError> {
        let n = self.g.node(id);
        if is_view(self.g, n) {
            return Ok(0.0);
        }
        let x = n.inputs.iter().map(|v| self.ty(*v)).collect::<Result<Vec<_>, _>>()?;
        let y = (0..n.tys.len()).map(|r| self.ty(id.result(r))).collect::<Result<Vec<_>, _>>()?;
        if n.op.def().is_elementwise() {
            // It becomes part of a map that reads and writes other things anyway.
            return Ok(traffic(&[], &y) / target.bytes_per_second);
        }
        let c = n.op.def().cost(&x, &y);
        Ok(c.flops / target.flops_per_second + c.bytes / target.bytes_per_second)
    }
}

/// The set of least time and memory at `price`, in seconds per byte of a node's kept results; see the module's comment.
///
/// # Errors
/// A dim without a value.
pub fn choose(
    g: &Graph,
    dims: &Bindings,
    target: &Target,
    price: impl Fn(NodeId) -> f64,
) -> Result<BTreeSet<NodeId>, DimError> {
    const UNITS: f64 = 1e12; // picoseconds
    let capacity = |seconds: f64| (seconds * UNITS).clamp(0.0, (1u64 << 46) as f64) as u64;
    let among = candidates(g);
    let reachable = needed(g, &among, &among);
    let sized = Sized { g, dims };
    let (source, sink) = (0, 1);
    let nodes: BTreeSet<NodeId> = reachable.iter().map(|v| v.node).collect();
    let node_at: BTreeMap<NodeId, usize> = nodes.iter().enumerate().map(|(i, id)| (*id, 2 + i)).collect();
    let value_at: BTreeMap<Value, usize> =
        reachable.iter().enumerate().map(|(i, v)| (*v, 2 + nodes.len() + i)).collect();
    let mut net = Network::new(2 + nodes.len() + reachable.len());
    let none = BTreeSet::new();
    for v in needed(g, &among, &none) {
        net.edge(source, value_at[&v], INFINITE);
    }
    for (v, at) in &value_at {
        let p = price(v.node);
        let kept = if is_view(g, g.node(v.node)) || p.is_infinite() {
            INFINITE
        } else {
            capacity(p * sized.ty(*v)?.bytes() as f64)
        };
        net.edge(*at, node_at[&v.node], kept);
    }
    for (id, at) in &node_at {
        // Nothing is quite free: without need, nothing is done twice.
        net.edge(*at, sink, capacity(sized.seconds(*id, target)?).max(1));
        for v in g.node(*id).inputs.iter().filter_map(|v| value_at.get(v)) {
            net.edge(*at, *v, INFINITE);
        }
    }
    let side = net.cut(source, sink);
    Ok(node_at.into_iter().filter(|(_, at)| side[*at]).map(|(id, _)| id).collect())
}

/// When the place of a value computed again is free: after the last node of the forward that reads its node, before the
/// first of the backward.  `None` if the backward does not read it.
pub fn free_between(g: &Graph) -> Vec<Option<(NodeId, NodeId)>> {
    let mut last = vec![None; g.nodes.len()];
    let mut first = vec![None; g.nodes.len()];
    for (id, n) in g.iter() {
        for v in &n.inputs {
            let at = v.node.index();
            if !is_backward(n) {
                last[at] = Some(id);
            } else if first[at].is_none() {
                first[at] = Some(id);
            }
        }
    }
    g.iter().map(|(id, _)| first[id.index()].map(|f| (last[id.index()].unwrap_or(id), f))).collect()
}

/// What becomes of a layer's values that the backward needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerChoice {
    /// Bytes of values that are kept although they could be computed again.
    pub kept: usize,
    /// Bytes of values that are computed again.
    pub again: usize,
    /// Ops that are computed again, with their number.
    pub ops: BTreeMap<&'static str, usize>,
}

/// [`LayerChoice`] of every layer that has a choice, in the order of the forward.
///
/// # Errors
/// A dim without a value.
pub fn by_layer(g: &Graph, dims: &Bindings, again: &BTreeSet<NodeId>) -> Result<Vec<(String, LayerChoice)>, DimError> {
    let among = candidates(g);
    let sized = Sized { g, dims };
    let mut out: Vec<(String, LayerChoice)> = vec![];
    let mut counted = BTreeSet::new();
    for v in needed(g, &among, again) {
        let n = g.node(v.node);
        if is_view(g, n) {
            continue;
        }
        let name = layer(n).unwrap_or_default();
        let at = out.iter().position(|l| l.0 == name).unwrap_or_else(|| {
            out.push((name.to_string(), LayerChoice::default()));
            out.len() - 1
        });
        let bytes = sized.ty(v)?.bytes();
        let choice = &mut out[at].1;
        if again.contains(&v.node) {
            choice.again += bytes;
            if counted.insert(v.node) {
                *choice.ops.entry(n.op.mnemonic()).or_default() += 1;
            }
        } else {
            choice.kept += bytes;
        }
    }
    Ok(out)
}

struct Pass<'g> {
    g: &'g Graph,
    b: Builder,
    map: Vec<Option<Vec<Value>>>,
    again: &'g BTreeSet<NodeId>,
    /// One clone per node, so that the backward computes each value once.
    clones: HashMap<NodeId, Vec<Value>>,
}

impl Pass<'_> {
    fn operand(&mut self, user: &Node, v: Value) -> Value {
        if !is_backward(user) || !self.again.contains(&v.node) {
            return self.map[v.node.index()].as_ref().expect("BUG: operands come first")[v.result as usize];
        }
        if let Some(c) = self.clones.get(&v.node) {
            return c[v.result as usize];
        }
        // The clone belongs to the backward: its own operands are cloned in turn.
        let n = self.g.node(v.node);
        let mut clone = n.clone();
        clone.scope = n.scope.as_ref().map(|s| format!("grad.{s}").into());
        clone.names = vec![None; n.tys.len()];
        let x: Vec<Value> = n.inputs.iter().map(|&v| self.operand(&clone, v)).collect();
        let out = self.b.copy(&clone, &x);
        self.clones.insert(v.node, out.clone());
        out[v.result as usize]
    }
}

/// Which nodes' values the backward reads, and which later layers read, from behind views too.
fn readers(g: &Graph) -> (Vec<bool>, Vec<bool>) {
    let (mut read, mut crosses) = (vec![false; g.nodes.len()], vec![false; g.nodes.len()]);
    for n in &g.nodes {
        for from in n.inputs.iter().flat_map(|v| kept_by(g, *v)) {
            read[from.index()] |= is_backward(n);
            crosses[from.index()] |= !is_backward(n) && layer(g.node(from)) != layer(n);
        }
    }
    (read, crosses)
}

/// The layers whose values later layers and the backward read, in the order of the forward.
pub fn layers(g: &Graph) -> Vec<&str> {
    let (read, crosses) = readers(g);
    let among = within(g, |n| layer(n).map(drop));
    let mut order: Vec<&str> = vec![];
    let counts = |id: &NodeId| read[id.index()] && crosses[id.index()] && !is_view(g, g.node(*id));
    for id in among.into_iter().filter(counts) {
        if let Some(l) = layer(g.node(id)).filter(|l| !order.contains(l)) {
            order.push(l);
        }
    }
    order
}

/// Layers that `held` inputs do for, where each is computed again for `times` levels of groups at most.
fn reach(held: usize, times: usize) -> usize {
    match times {
        0 => held,
        _ => (1..=held).map(|m| reach(m, times - 1)).sum(),
    }
}

/// Levels of groups that [`recompute_layers`] makes at most.
pub const LEVELS: usize = 2;

/// Fewest inputs of layers that [`recompute_layers`] can do with in so many levels of groups.
pub fn least_held(layers: usize, levels: usize) -> usize {
    (0..).find(|m| reach(*m, levels) >= layers).expect("BUG: sums grow")
}

/// The first layer of every group at every level, the finest first; see [`recompute_layers`].
fn starts(layers: usize, held: usize) -> Vec<Vec<usize>> {
    let levels = (0..=LEVELS).find(|t| reach(held, *t) >= layers).unwrap_or(LEVELS);
    let mut starts = vec![vec![]; levels];
    divide(0, layers, held, levels, &mut starts);
    starts
}

fn divide(from: usize, layers: usize, held: usize, levels: usize, starts: &mut [Vec<usize>]) {
    let Some(level) = levels.checked_sub(1) else { return };
    if reach(held, level) >= layers {
        // A level less will do: then groups of this one are of one layer.
        starts[level].extend(from..from + if level == 0 { layers } else { 1 });
        return divide(from, layers, held, level, starts);
    }
    // One for each; the rest go to the first groups, of which the i-th may have held - i at once.
    let (mut spare, mut at) = (layers - held, from);
    for i in 0..held {
        starts[level].push(at);
        let more = spare.min(reach(held - i, level) - 1);
        spare -= more;
        divide(at, 1 + more, held - i, level, starts);
        at += 1 + more;
    }
}

/// Keeps what crosses layers only between groups of them: within a group it is computed again from there, layer by layer,
/// before the group's backward.  Nothing within a layer is kept for that: what the backward needs of it stays as
/// [`recompute`], which runs before, left it.
///
/// Groups grow towards the first layer: when the backward comes to it, the inputs of later groups are free.  So `held`
/// inputs at once do for `held · (held + 1) / 2` layers, each computed again once at most (arXiv 1604.06174 has groups of one
/// size).  Where that is too few, groups are made of such groups, and layers are computed again twice: then `held` do for
/// `held · (held + 1) · (held + 2) / 6` (the binomials of doi 10.1145/347837.347846).
///
/// ```text
/// layers       0 1 2 3 | 4 5 6 | 7 8 | 9          held = 4: the inputs of 0, 4, 7 and 9 when the backward begins,
/// again          1 2 3     5 6     8              those of 0, 4, 5 and 6 when it comes to 6, of 0 to 3 in the end
/// ```
pub fn recompute_layers(g: &Graph, held: usize) -> Graph {
    let layers = layers(g);
    if held == 0 || held >= layers.len() {
        return g.clone();
    }
    let all = starts(layers.len(), held.max(least_held(layers.len(), LEVELS)));
    let group = |starts: &Vec<usize>| -> HashMap<&str, usize> {
        // Layers between those belong to the ones before them.
        let (mut group, mut now) = (HashMap::new(), 0);
        for l in g.nodes.iter().filter(|n| !is_backward(n)).filter_map(layer) {
            if let Some(i) = layers.iter().position(|x| *x == l) {
                now = starts.partition_point(|s| *s <= i);
            }
            group.entry(l).or_insert(now);
        }
        group
    };
    all.iter().map(group).fold(g.clone(), |g, group| recompute_groups(&g, &group))
}

/// Computes what crosses layers again from what crosses groups of them.
fn recompute_groups(g: &Graph, group: &HashMap<&str, usize>) -> Graph {
    let mut again = within(g, |n| layer(n).and_then(|l| group.get(l)));
    // What the backward reads and does not cross layers was kept on purpose.
    let (read, crosses) = readers(g);
    again.retain(|id| !read[id.index()] || crosses[id.index()] || is_view(g, g.node(*id)));
    clone_for_backward(g, &again)
}

/// Computes nodes again for the backward, as far as they are [`candidates`]; see the module's comment.
pub fn recompute(g: &Graph, what: &Recompute) -> Graph {
    let again = match what {
        Recompute::Nothing => return g.clone(),
        Recompute::All => candidates(g),
        Recompute::Nodes(nodes) => candidates(g).intersection(nodes).copied().collect(),
    };
    clone_for_backward(g, &again)
}

fn clone_for_backward(g: &Graph, again: &BTreeSet<NodeId>) -> Graph {
    let empty = Graph { name: g.name.clone(), syms: g.syms.clone(), ..Graph::default() };
    let map = vec![None; g.nodes.len()];
    let mut p = Pass { g, b: Builder::extend(empty), map, again, clones: HashMap::new() };
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Inputs that are held at once when the backward comes to each layer, and how often layers are computed again.
    fn walked(layers: usize, starts: &[Vec<usize>]) -> (usize, Vec<usize>) {
        let first = |s: &Vec<usize>, i: usize| s.iter().rev().find(|a| **a <= i).copied().unwrap();
        let held = |i: usize| {
            // Of the coarsest level those up to here; of each finer one those of the group around it; then its own layers.
            let mut from = 0;
            let mut all: BTreeSet<usize> = BTreeSet::new();
            for s in starts.iter().rev() {
                all.extend(s.iter().filter(|a| (from..=i).contains(*a)));
                from = first(s, i);
            }
            all.extend(from..=i);
            all.len()
        };
        let again = |i: usize| starts.iter().filter(|s| !s.contains(&i)).count();
        ((0..layers).map(held).max().unwrap_or(0), (0..layers).map(again).collect())
    }

    #[test]
    fn groups_hold_no_more_than_they_may() {
        for layers in 1..80 {
            for held in least_held(layers, LEVELS)..layers {
                let all = starts(layers, held);
                let (most, again) = walked(layers, &all);
                assert!(most <= held, "{layers} layers, {held} held: {most}, {all:?}");
                assert!(all.iter().all(|s| s.first() == Some(&0) && s.is_sorted()), "{all:?}");
                if reach(held, 1) >= layers {
                    assert_eq!(again.iter().sum::<usize>(), layers - held, "as few as can be");
                }
            }
        }
        assert_eq!([55, 56, 57].map(|n| least_held(n, 2)), [6, 6, 7]);
        assert_eq!([55, 56].map(|n| least_held(n, 1)), [10, 11]);
        assert_eq!(starts(10, 4), [vec![0, 4, 7, 9]]);
    }
}
