//! `attend` + `aggregate` become `chunk_attention`, and their gradients `chunk_attention_grad`.
//!
//! ```text
//! %o = attend %q, %k, %v, %i, %n                     %y = chunk_attention %q, %k, %v, %i, %n, %w
//! %y = aggregate %o, %w                        ⇒
//! %do, %dw = aggregate_grad %o, %w, %dy              %dq, %dk, %dv, %dw = chunk_attention_grad …, %w, %dy
//! %dq, %dk, %dv = attend_grad …, %do
//! ```
//! Requires: nothing else reads the per-chunk outputs or their gradient.  Ensures: no `[N, L, H, K, d]` is left there.

use crate::fuse_selection::push_in_scope;
use crate::rewrite::Rewrite;
use rambac_ir::ops::{Attend, AttendGrad, ChunkAttention, ChunkAttentionGrad, Op};
use rambac_ir::{Graph, NodeId, Value};

struct Group {
    attend: NodeId,
    aggregate: NodeId,
    /// `aggregate_grad` in training graphs, and `attend_grad` unless no query, key or value needs a gradient.
    grad: Option<(NodeId, Option<NodeId>)>,
}

fn find(g: &Graph, users: &[Vec<NodeId>], attend: NodeId) -> Result<Group, String> {
    let o = attend.result(0);
    if g.outputs.iter().any(|out| out.value == o) {
        return Err("the per-chunk outputs are an output of the graph".into());
    }
    let (mut aggregate, mut aggregate_grad, mut attend_grad) = (None, None, None);
    for &u in &users[attend.index()] {
        let slot = match g.node(u).op {
            Op::Aggregate(_) => &mut aggregate,
            Op::AggregateGrad(_) => &mut aggregate_grad,
            ref op => return Err(format!("{} also reads the per-chunk outputs", op.mnemonic())),
        };
        if slot.replace(u).is_some() {
            return Err(format!("two ops {} read the per-chunk outputs", g.node(u).op.mnemonic()));
        }
    }
    let aggregate = aggregate.ok_or("nothing aggregates the per-chunk outputs")?;
    if g.node(aggregate).inputs.len() != 2 || aggregate_grad.is_some_and(|a| g.node(a).inputs.len() != 3) {
        return Err("they are aggregated with other outputs".into());
    }
    if let Some(ag) = aggregate_grad {
        if g.node(ag).inputs[1] != g.node(aggregate).inputs[1] || g.outputs.iter().any(|o| o.value == ag.result(0)) {
            return Err("the gradient of the per-chunk outputs is used elsewhere".into());
        }
        let readers = users[ag.index()].iter().filter(|&&u| g.node(u).inputs.contains(&ag.result(0)));
        for &u in readers {
            let Op::Attend(a) = &g.node(attend).op else { unreachable!("BUG: a group holds an attend") };
            let same = |d: &AttendGrad| (a.chunk, a.scale, a.off_by_one) == (d.chunk, d.scale, d.off_by_one);
            let operands = g.node(u).inputs.get(..5) == g.node(attend).inputs.get(..5);
            match &g.node(u).op {
                Op::AttendGrad(d) if attend_grad.is_none() && operands && same(d) => attend_grad = Some(u),
                op => return Err(format!("{} reads the gradient of the per-chunk outputs", op.mnemonic())),
            }
        }
    }
    Ok(Group { attend, aggregate, grad: aggregate_grad.map(|a| (a, attend_grad)) })
}

/// A joint softmax gives no per-chunk outputs: it is one op as it is.
fn attends_per_chunk(op: &Op) -> bool {
    matches!(op, Op::Attend(a) if !a.joint)
}

/// Attends that stay, each with the reason; `explain` prints them.
pub fn unfused(g: &Graph) -> Vec<(NodeId, String)> {
    let users = g.users();
    g.iter()
        .filter(|(_, n)| attends_per_chunk(&n.op))
        .map(|(id, _)| (id, find(g, &users, id).err().unwrap_or_else(|| "the pass did not run".into())))
        .collect()
}

/// See the module's comment.
pub fn fuse_attention(g: &Graph) -> Graph {
    let users = g.users();
    let groups: Vec<Group> =
        g.iter().filter(|(_, n)| attends_per_chunk(&n.op)).filter_map(|(id, _)| find(g, &users, id).ok()).collect();
    let mut r = Rewrite::new(g);
    for (id, node) in g.iter() {
        if r.has(id) || groups.iter().any(|k| k.attend == id || k.grad.is_some_and(|(_, a)| a == Some(id))) {
            continue;
        }
        let Some(k) = groups.iter().find(|k| k.aggregate == id || k.grad.is_some_and(|(a, _)| a == id)) else {
            r.copy(id);
            continue;
        };
        let attend = g.node(k.attend);
        let Op::Attend(Attend { chunk, scale, off_by_one, .. }) = attend.op else {
            unreachable!("BUG: a group holds an attend")
        };
        let mut x: Vec<Value> = attend.inputs.iter().map(|&v| r.get(v)).collect();
        x.push(r.get(node.inputs[1]));
        if k.aggregate == id {
            let out =
                push_in_scope(&mut r, id, node.names.clone(), ChunkAttention { chunk, scale, off_by_one }.into(), &x);
            r.set(id, out);
        } else {
            x.push(r.get(node.inputs[2]));
            let (_, attend_grad) = k.grad.expect("BUG: tested above");
            let mut names = attend_grad.map_or(vec![None; 3], |a| g.node(a).names.clone());
            names.push(node.names[1].clone());
            let op = ChunkAttentionGrad { chunk, scale, off_by_one };
            let out = push_in_scope(&mut r, id, names, op.into(), &x);
            // `do` disappears; its place is never read.
            r.set(id, vec![out[0], out[3]]);
            if let Some(a) = attend_grad {
                r.set(a, out[..3].to_vec());
            }
        }
    }
    r.finish()
}
