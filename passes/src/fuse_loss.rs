//! A linear layer and `cross_entropy` become `linear_cross_entropy`; with their gradients `linear_cross_entropy_grad`.
//!
//! ```text
//! %z = matmul %h, %w {trans_b}                  %dh, %dw, %l = linear_cross_entropy_grad %h, %w, %labels, %g
//! %l = cross_entropy %z, %labels          ⇒
//! %dz = cross_entropy_grad %z, %labels, %g
//! %dh = matmul %dz, %w
//! %dw = matmul %dz, %h {trans_a}
//! ```
//! The gradient's op gives the losses as well, so the logits are computed once: what reads the losses moves behind it.
//! Requires: nothing else reads the logits or their gradient, and the upstream gradient `%g` does not depend on the
//! losses (else they would have to be computed twice).  Ensures: no `[.., V]` logits and no gradient of them is left there.

use crate::fuse_selection::push_in_scope;
use crate::rewrite::Rewrite;
use rambac_ir::ops::{LinearCrossEntropy, LinearCrossEntropyGrad, MatMul, Op};
use rambac_ir::{Graph, NodeId, Value};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// One fusable group.
struct Group {
    /// The `matmul` of the logits; `None` if the forward is already one op.
    linear: Option<NodeId>,
    /// `cross_entropy` or `linear_cross_entropy`.
    loss: NodeId,
    /// `h`, `w` and the labels.
    x: [Value; 3],
    ignore: i64,
    grad: Option<Grad>,
}

struct Grad {
    /// `cross_entropy_grad` or `linear_cross_entropy_grad`.
    loss_grad: NodeId,
    dloss: Value,
    /// The products with the gradient of the logits; `None` if the backward is already one op.
    products: Option<Products>,
}

struct Products {
    dh: NodeId,
    /// The logits' gradient as one matrix, where it has more axes.
    flat: Option<NodeId>,
    dw: NodeId,
}

impl Group {
    /// The node that stands for the fused op in the order of nodes.
    fn unit(&self) -> NodeId {
        self.grad.as_ref().map_or(self.loss, |d| d.loss_grad)
    }
    fn members(&self) -> Vec<NodeId> {
        let mut all: Vec<NodeId> = self.linear.into_iter().chain([self.loss]).collect();
        if let Some(d) = &self.grad {
            all.push(d.loss_grad);
            all.extend(d.products.iter().flat_map(|p| [Some(p.dh), p.flat, Some(p.dw)]).flatten());
        }
        all
    }
}

fn is_output(g: &Graph, v: Value) -> bool {
    g.outputs.iter().any(|o| o.value == v)
}

/// What `v` is a reshape of.
fn behind_reshapes(g: &Graph, mut v: Value) -> Value {
    while matches!(g.node(v.node).op, Op::Reshape(_)) {
        v = g.node(v.node).inputs[0];
    }
    v
}

/// The products that read the logits' gradient `dz`.
fn products(g: &Graph, users: &[Vec<NodeId>], dz: NodeId, h: Value, w: Value) -> Result<Products, String> {
    let is = |n: NodeId, trans_a: bool| g.node(n).op == MatMul { trans_a, trans_b: false }.into();
    let (mut dh, mut dw, mut flat) = (None, None, None);
    for &u in &users[dz.index()] {
        let n = g.node(u);
        let (slot, ok) = match &n.op {
            Op::MatMul(m) if m.trans_a => (&mut dw, is(u, true) && n.inputs == [dz.result(0), h]),
            Op::MatMul(_) => (&mut dh, is(u, false) && n.inputs == [dz.result(0), w]),
            Op::Reshape(_) => {
                let product = match users[u.index()][..] {
                    [p] if is(p, true) && !is_output(g, u.result(0)) => p,
                    _ => return Err("the gradient of the logits is reshaped for another op".into()),
                };
                let x = &g.node(product).inputs;
                let same = behind_reshapes(g, x[1]) == behind_reshapes(g, h) && x[1] != u.result(0);
                let rows = g.ty(x[1]).shape.last() == g.ty(h).shape.last();
                flat = Some(u);
                if dw.replace(product).is_some() || x[0] != u.result(0) || !same || !rows {
                    return Err("the gradient of the logits is multiplied with something else".into());
                }
                continue;
            }
            op => return Err(format!("{} reads the gradient of the logits", op.mnemonic())),
        };
        if !ok || slot.replace(u).is_some() {
            return Err("the gradient of the logits is multiplied with something else".into());
        }
    }
    match (dh, dw) {
        (Some(dh), Some(dw)) => Ok(Products { dh, flat, dw }),
        (None, _) => Err("the linear layer's operand needs no gradient".into()),
        (_, None) => Err("the linear layer's weight needs no gradient".into()),
    }
}

fn find(g: &Graph, users: &[Vec<NodeId>], loss: NodeId) -> Result<Group, String> {
    let n = g.node(loss);
    let ignore = match &n.op {
        Op::CrossEntropy(c) => c.ignore,
        Op::LinearCrossEntropy(c) => {
            // Already one op; what is left is to compute the logits once for both directions.
            let x = [n.inputs[0], n.inputs[1], n.inputs[2]];
            let grad = users[x[2].node.index()].iter().copied().find(|&u| {
                let same = matches!(&g.node(u).op, Op::LinearCrossEntropyGrad(d) if d.ignore == c.ignore);
                same && g.node(u).inputs[..3] == x
            });
            let grad = grad.ok_or("it has no gradient")?;
            let grad = Grad { loss_grad: grad, dloss: g.node(grad).inputs[3], products: None };
            return Ok(Group { linear: None, loss, x, ignore: c.ignore, grad: Some(grad) });
        }
        op => unreachable!("BUG: {} is no loss", op.mnemonic()),
    };
    let (z, labels) = (n.inputs[0], n.inputs[1]);
    let linear = g.node(z.node);
    let one_matrix = |w: Value| g.ty(w).rank() == 2;
    let plain = linear.op == MatMul { trans_a: false, trans_b: true }.into();
    if !plain || !one_matrix(linear.inputs[1]) {
        return Err("the logits are not made by a matmul with trans_b and one matrix for all rows".into());
    }
    let (h, w) = (linear.inputs[0], linear.inputs[1]);
    if is_output(g, z) {
        return Err("the logits are an output of the graph".into());
    }
    let mut loss_grad = None;
    for &u in &users[z.node.index()] {
        let n = g.node(u);
        match &n.op {
            _ if u == loss => (),
            Op::CrossEntropyGrad(d) if d.ignore == ignore && n.inputs[..2] == [z, labels] && loss_grad.is_none() => {
                loss_grad = Some(u)
            }
            op => return Err(format!("{} also reads the logits", op.mnemonic())),
        }
    }
    let grad = match loss_grad {
        None => None,
        Some(d) if is_output(g, d.result(0)) => {
            return Err("the gradient of the logits is an output of the graph".into());
        }
        Some(d) => {
            let products = Some(products(g, users, d, h, w)?);
            Some(Grad { loss_grad: d, dloss: g.node(d).inputs[2], products })
        }
    };
    Ok(Group { linear: Some(z.node), loss, x: [h, w, labels], ignore, grad })
}

/// Nodes, with every group as one, in topological order; ties go to what came first.  `None` if there is a circle: a
/// group that waits for itself.
fn order(g: &Graph, groups: &[Group]) -> Option<Vec<NodeId>> {
    let mut unit: Vec<NodeId> = g.iter().map(|(id, _)| id).collect();
    for k in groups {
        k.members().into_iter().for_each(|m| unit[m.index()] = k.unit());
    }
    let mut waits = vec![0usize; g.nodes.len()];
    let mut wakes: Vec<Vec<NodeId>> = vec![vec![]; g.nodes.len()];
    for (id, n) in g.iter() {
        let to = unit[id.index()];
        // The products are members that only read what the group makes itself, or reshapes of its operands.
        let reads_own = groups
            .iter()
            .any(|k| k.grad.as_ref().and_then(|d| d.products.as_ref()).is_some_and(|p| [p.dh, p.dw].contains(&id)));
        for from in n.inputs.iter().map(|v| unit[v.node.index()]).filter(|&f| f != to && !reads_own) {
            wakes[from.index()].push(to);
            waits[to.index()] += 1;
        }
    }
    let mut ready: BinaryHeap<Reverse<NodeId>> = g
        .iter()
        .map(|(id, _)| id)
        .filter(|id| unit[id.index()] == *id && waits[id.index()] == 0)
        .map(Reverse)
        .collect();
    let mut out = vec![];
    while let Some(Reverse(id)) = ready.pop() {
        out.push(id);
        for w in &wakes[id.index()] {
            waits[w.index()] -= 1;
            if waits[w.index()] == 0 {
                ready.push(Reverse(*w));
            }
        }
    }
    let units = g.iter().filter(|(id, _)| unit[id.index()] == *id).count();
    (out.len() == units).then_some(out)
}

/// Groups that fuse, and the losses that do not with the reason.
fn groups(g: &Graph) -> (Vec<Group>, Vec<(NodeId, String)>) {
    let users = g.users();
    let (mut groups, mut left) = (vec![], vec![]);
    for (id, n) in g.iter() {
        let direct = matches!(n.op, Op::LinearCrossEntropy(_));
        if !direct && !matches!(n.op, Op::CrossEntropy(_)) {
            continue;
        }
        let why = match find(g, &users, id) {
            Err(why) => why,
            Ok(k) if groups.iter().any(|o: &Group| o.unit() == k.unit()) => "its gradient is another's".into(),
            Ok(k) => {
                groups.push(k);
                if order(g, &groups).is_some() {
                    continue;
                }
                groups.pop();
                "the gradient of the losses depends on the losses, so the logits would be computed twice".into()
            }
        };
        // What lies in memory are the logits; an op that is fused already has none.
        if !direct {
            left.push((n.inputs[0].node, why));
        }
    }
    (groups, left)
}

/// The makers of logits that stay, each with the reason; `explain` prints them.
pub fn unfused(g: &Graph) -> Vec<(NodeId, String)> {
    let (fusable, mut left) = groups(g);
    let stays = |k: &Group| k.linear.map(|l| (l, "the pass did not run".to_string()));
    left.extend(fusable.iter().filter_map(stays));
    left
}

/// See the module's comment.
pub fn fuse_loss(g: &Graph) -> Graph {
    let (groups, _) = groups(g);
    let order = order(g, &groups).expect("BUG: every group was tried");
    let mut r = Rewrite::new(g);
    for id in order {
        let Some(k) = groups.iter().find(|k| k.unit() == id) else {
            r.copy(id);
            continue;
        };
        let mut x: Vec<Value> = k.x.iter().map(|&v| r.get(v)).collect();
        let losses = g.node(k.loss).names[0].clone();
        let Some(d) = &k.grad else {
            let op = LinearCrossEntropy { ignore: k.ignore };
            let out = push_in_scope(&mut r, id, vec![losses], op.into(), &x);
            r.set(id, out);
            continue;
        };
        x.push(r.get(d.dloss));
        let mut names = match &d.products {
            Some(p) => vec![g.node(p.dh).names[0].clone(), g.node(p.dw).names[0].clone(), None],
            None => g.node(id).names.clone(),
        };
        if names[2].is_none() {
            names[2] = losses;
        }
        let op = LinearCrossEntropyGrad { ignore: k.ignore };
        let out = push_in_scope(&mut r, id, names, op.into(), &x);
        r.set(k.loss, vec![out[2]]);
        if let Some(p) = &d.products {
            r.set(p.dh, vec![out[0]]);
            r.set(p.dw, vec![out[1]]);
        } else {
            r.set(id, out);
        }
    }
    r.finish()
}
