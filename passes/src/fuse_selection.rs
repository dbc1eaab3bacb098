//! `score` + mask + `select` + `weigh` become `selection`, and their gradients `selection_grad`.
//!
//! ```text
//! %s = score %q, %lm, %st                      %i, %n, %w, %p = selection %q, %lm, %st
//! %i, %n = select %s                     ⇒
//! %w = weigh %s, %i, %n
//! %ds = weigh_grad %s, %i, %n, %dw             %dq, %dl = selection_grad %q, %lm, %i, %n, %p, %w, %dw
//! %dq, %dl = score_grad %q, %lm, %ds
//! ```
//! Where only the choice is wanted, there are no weights and no gradient.
//!
//! Requires: nothing else reads the scores or their gradient.  Ensures: no value of shape `[.., L, C]` is left there.

use crate::rewrite::Rewrite;
use rambac_ir::ops::{Op, Select, Selection, SelectionGrad, Weighting};
use rambac_ir::{Graph, NodeId, Value};

/// Names of a node's results.
pub(crate) type Names = Vec<Option<std::sync::Arc<str>>>;

/// One fusable group.
struct Group {
    score: NodeId,
    select: NodeId,
    /// `None`: the choice alone is wanted.
    weigh: Option<NodeId>,
    /// `(weigh_grad, score_grad)` in training graphs.
    grad: Option<(NodeId, NodeId)>,
}

fn find(g: &Graph, users: &[Vec<NodeId>], score: NodeId) -> Result<Group, String> {
    let s = score.result(0);
    if g.outputs.iter().any(|o| o.value == s) {
        return Err("the scores are an output of the graph".into());
    }
    let (mut select, mut weigh, mut weigh_grad, mut score_grad) = (None, None, None, None);
    for &u in &users[score.index()] {
        let slot = match g.node(u).op {
            Op::Select(_) => &mut select,
            Op::Weigh(_) => &mut weigh,
            Op::WeighGrad(_) => &mut weigh_grad,
            ref op => return Err(format!("{} also reads the scores", op.mnemonic())),
        };
        if slot.replace(u).is_some() {
            return Err(format!("two ops {} read the scores", g.node(u).op.mnemonic()));
        }
    }
    let select = select.ok_or("nothing selects from the scores")?;
    if matches!(&g.node(select).op, Op::Select(s) if s.sinks + s.recent > 0) {
        return Err("the choice is forced in part (sinks, recent), which the fused op does not know".into());
    }
    if g.ty(g.node(score).inputs[0]).shape[2] != g.ty(g.node(score).inputs[1]).shape[2] {
        return Err("several query heads share the landmarks of one".into());
    }
    let from_select = |n: NodeId| {
        let x = &g.node(n).inputs;
        x[0] == s && x[1] == select.result(0) && x[2] == select.result(1)
    };
    if weigh.is_some_and(|w| !from_select(w)) {
        return Err("the weights use indices of another selection".into());
    }
    if let Some(wg) = weigh_grad {
        let rules = (weigh.map(|w| &g.node(w).op), &g.node(wg).op);
        if !matches!(rules, (Some(Op::Weigh(w)), Op::WeighGrad(d)) if w.rule == d.rule) {
            return Err("the gradient of the weights has another rule".into());
        }
        if !from_select(wg) || g.outputs.iter().any(|o| o.value.node == wg) {
            return Err("the gradient of the scores is used elsewhere".into());
        }
        for &u in &users[wg.index()] {
            let same = |scale| matches!(&g.node(score).op, Op::Score(s) if s.scale == scale);
            let operands = g.node(u).inputs.get(..2) == g.node(score).inputs.get(..2);
            match &g.node(u).op {
                Op::ScoreGrad(d) if score_grad.is_none() && operands && same(d.scale) => score_grad = Some(u),
                op => return Err(format!("{} reads the gradient of the scores", op.mnemonic())),
            }
        }
    }
    let grad = match (weigh_grad, score_grad) {
        (Some(w), Some(s)) => Some((w, s)),
        (None, _) => None,
        (Some(_), None) => return Err("the gradient of the scores reaches no query or landmark".into()),
    };
    Ok(Group { score, select, weigh, grad })
}

fn rule_of(g: &Graph, weigh: NodeId) -> Weighting {
    match &g.node(weigh).op {
        Op::Weigh(w) => w.rule,
        _ => unreachable!("BUG: a group's weights are weighed"),
    }
}

/// Scores that stay, each with the reason; `explain` prints them.
pub fn unfused(g: &Graph) -> Vec<(NodeId, String)> {
    let users = g.users();
    g.iter()
        .filter(|(_, n)| matches!(n.op, Op::Score(_)))
        .map(|(id, _)| (id, find(g, &users, id).err().unwrap_or_else(|| "the pass did not run".into())))
        .collect()
}

/// See the module's comment.
pub fn fuse_selection(g: &Graph) -> Graph {
    let users = g.users();
    let groups: Vec<Group> =
        g.iter().filter(|(_, n)| matches!(n.op, Op::Score(_))).filter_map(|(id, _)| find(g, &users, id).ok()).collect();
    let mut r = Rewrite::new(g);
    let mut selections: Vec<(NodeId, Vec<Value>)> = vec![];
    for (id, node) in g.iter() {
        if r.has(id) {
            continue;
        }
        if groups.iter().any(|k| k.select == id || k.weigh == Some(id) || k.grad.is_some_and(|(w, _)| w == id)) {
            continue;
        }
        if let Some(k) = groups.iter().find(|k| k.score == id) {
            let (Op::Score(s), Op::Select(Select { k: slots, order, .. })) = (&node.op, &g.node(k.select).op) else {
                unreachable!("BUG: a group holds a score and a select")
            };
            let rule = k.weigh.map_or(Weighting::One, |w| rule_of(g, w));
            let x: Vec<Value> = node.inputs.iter().map(|&v| r.get(v)).collect();
            let op = Selection { chunk: s.chunk, scale: s.scale, k: *slots, order: *order, rule };
            let mut names = g.node(k.select).names.clone();
            names.extend(k.weigh.map_or(vec![None], |w| g.node(w).names.clone()));
            names.push(None);
            let out = push_in_scope(&mut r, id, names, op.into(), &x);
            r.set(k.select, vec![out[0], out[1]]);
            if let Some(w) = k.weigh {
                r.set(w, vec![out[2]]);
            }
            selections.push((id, out));
            continue;
        }
        if let Some(k) = groups.iter().find(|k| k.grad.is_some_and(|(_, s)| s == id)) {
            let (wg, _) = k.grad.expect("BUG: tested above");
            let Op::Score(s) = &g.node(k.score).op else { unreachable!("BUG: a group holds a score") };
            let rule = rule_of(g, k.weigh.expect("BUG: a gradient of weights has weights"));
            let y = &selections.iter().find(|(s, _)| *s == k.score).expect("BUG: forward comes first").1;
            let (idx, count, weights, picked) = (y[0], y[1], y[2], y[3]);
            let (q, lm, dw) = (r.get(node.inputs[0]), r.get(node.inputs[1]), r.get(g.node(wg).inputs[3]));
            let op = SelectionGrad { scale: s.scale, rule };
            let out =
                push_in_scope(&mut r, id, node.names.clone(), op.into(), &[q, lm, idx, count, picked, weights, dw]);
            r.set(id, out);
            continue;
        }
        r.copy(id);
    }
    r.finish()
}

/// Adds `op` under the scope and location of the old node `like`.
///
/// `names` are the results' names, as many as there are results.
pub(crate) fn push_in_scope(r: &mut Rewrite, like: NodeId, names: Names, op: Op, x: &[Value]) -> Vec<Value> {
    let old = r.old.node(like);
    let node =
        rambac_ir::Node { op, inputs: vec![], tys: vec![], names, scope: old.scope.clone(), loc: old.loc.clone() };
    r.b.copy(&node, x)
}
