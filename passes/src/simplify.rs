//! Algebraic rules, as a table.  Each rule looks at one node and the ops that made its operands.
//!
//! Rules that drop a rounding or an infinity times zero are deliberately absent: a rule keeps every finite value.

use crate::rewrite::rewrite;
use rambac_ir::ops::*;
use rambac_ir::{Builder, Graph, Node, Value};

type Rule = fn(&mut Builder, &Node, &[Value]) -> Option<Value>;

/// Every rule with its name, in the order tried.
pub const RULES: &[(&str, Rule)] = &[
    ("x + 0 = x", |b, n, x| binary(n, BinaryFn::Add)?.pick(b, x, 0.0)),
    ("x * 1 = x", |b, n, x| binary(n, BinaryFn::Mul)?.pick(b, x, 1.0)),
    ("x - 0 = x, x / 1 = x", |b, n, x| match &n.op {
        Op::Binary(Binary { f: BinaryFn::Sub }) if is_splat(b, x[1], 0.0) => Some(x[0]),
        Op::Binary(Binary { f: BinaryFn::Div }) if is_splat(b, x[1], 1.0) => Some(x[0]),
        _ => None,
    }),
    ("reshape of reshape", |b, n, x| match (&n.op, op(b, x[0])) {
        (Op::Reshape(r), Op::Reshape(_)) => {
            let shape = r.shape.clone();
            let from = operand(b, x[0], 0);
            Some(b.reshape(from, shape))
        }
        _ => None,
    }),
    ("reshape, broadcast to the same shape", |b, n, x| {
        (matches!(n.op, Op::Reshape(_) | Op::Broadcast(_)) && *b.ty(x[0]) == n.tys[0]).then(|| x[0])
    }),
    ("transpose of transpose, transpose by the identity", |b, n, x| {
        let Op::Transpose(t) = &n.op else { return None };
        if t.perm.is_sorted() {
            return Some(x[0]);
        }
        let Op::Transpose(inner) = op(b, x[0]) else { return None };
        let perm = t.perm.iter().map(|&p| inner.perm[p]).collect();
        let from = operand(b, x[0], 0);
        Some(b.transpose(from, perm))
    }),
    ("neg of neg", |b, n, x| match (&n.op, op(b, x[0])) {
        (Op::Unary(Unary { f: UnaryFn::Neg }), Op::Unary(Unary { f: UnaryFn::Neg })) => Some(operand(b, x[0], 0)),
        _ => None,
    }),
    ("slice, pad of nothing", |b, n, x| match &n.op {
        Op::Slice(_) if *b.ty(x[0]) == n.tys[0] => Some(x[0]),
        Op::Pad(Pad { before: 0, after: 0, .. }) => Some(x[0]),
        _ => None,
    }),
    ("concat of one", |_, n, x| (matches!(n.op, Op::Concat(_)) && x.len() == 1).then(|| x[0])),
    // Gradients of the slices of one value: padded parts that touch are one concat.
    ("pad(a) + pad(b) = pad(concat(a, b))", |b, n, x| {
        binary(n, BinaryFn::Add)?;
        let (Op::Pad(p), Op::Pad(q)) = (op(b, x[0]).clone(), op(b, x[1]).clone()) else { return None };
        let (pv, qv) = (operand(b, x[0], 0), operand(b, x[1], 0));
        let size = |v: Value| b.ty(v).shape[p.axis].as_int();
        if p.axis != q.axis {
            return None;
        }
        let (first, second, before, after) = if q.before + size(qv)? == p.before {
            (qv, pv, q.before, p.after)
        } else if p.before + size(pv)? == q.before {
            (pv, qv, p.before, q.after)
        } else {
            return None;
        };
        let c = b.concat(&[first, second], p.axis);
        Some(b.push(Pad { axis: p.axis, before, after }, &[c]))
    }),
    ("concat of concat", |b, n, x| {
        let Op::Concat(c) = &n.op else { return None };
        let flat = |v: &Value| match op(b, *v) {
            Op::Concat(i) if i.axis == c.axis => b.graph().node(v.node).inputs.clone(),
            _ => vec![*v],
        };
        let parts: Vec<Value> = x.iter().flat_map(flat).collect();
        (parts.len() > x.len()).then(|| b.concat(&parts, c.axis))
    }),
];

fn op(b: &Builder, v: Value) -> &Op {
    &b.graph().node(v.node).op
}

fn operand(b: &Builder, v: Value, i: usize) -> Value {
    b.graph().node(v.node).inputs[i]
}

fn is_splat(b: &Builder, v: Value, c: f64) -> bool {
    matches!(op(b, v), Op::Constant(k) if k.value == c)
}

struct Commutative;

impl Commutative {
    /// The operand beside a splat of `neutral`.
    fn pick(&self, b: &Builder, x: &[Value], neutral: f64) -> Option<Value> {
        if is_splat(b, x[1], neutral) { Some(x[0]) } else { is_splat(b, x[0], neutral).then(|| x[1]) }
    }
}

fn binary(n: &Node, f: BinaryFn) -> Option<Commutative> {
    matches!(&n.op, Op::Binary(b) if b.f == f).then_some(Commutative)
}

/// Applies the rules until none fires.
pub fn simplify(g: &Graph) -> Graph {
    let mut g = g.clone();
    loop {
        let mut fired = false;
        let next = rewrite(&g, |b, _, n, x| {
            if x.is_empty() {
                return None;
            }
            let v = RULES.iter().find_map(|(_, rule)| rule(b, n, x))?;
            fired = true;
            Some(vec![v])
        });
        if !fired {
            return g;
        }
        g = crate::dce::dce(&next);
    }
}
