//! A variant of attention for a segment of a text: queries of the new tokens over all keys so far.
//!
//! A fragment sees whole texts.  Every value of it that its output needs is wanted for the segment's tokens (*rows*), or for the
//! text so far (*memory*), or both; which, the ops say, from the output back:
//!
//! ```text
//! attention q, k, v          q of the rows, k and v of the memory; the rows' place by `start`
//! score q, landmarks, t0     likewise; so mask, attend, a product's right-hand side
//! what takes rows apart      (maps, softmax, select, weigh, merge, …) of the side that it is wanted for
//! what mixes tokens          (summaries, scans, convolutions) of the memory alone, where all of them are
//! ```
//! The memory holds as many tokens as the session has room for, zeros beyond those that came; nothing of these is ever seen, for
//! what a token sees is decided by its place.  What is derived from the memory (summaries of chunks, an indexer's keys) is computed
//! anew for every segment, which reads the memory once.  An op that needs other rows than its own to give a row has no such form,
//! and is named.

use crate::variants::Fragment;
use rambac_ir::ops::*;
use rambac_ir::{Builder, Dim, Node, NodeId, Value};

/// Where an op's operand comes from, wanted for the rows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Rows,
    Memory,
    /// The place of the first row.
    Start,
}

/// What a segment's form needs of the stack around it.
pub struct Around<'a> {
    /// `i32[N]`: tokens before the segment.
    pub start: Value,
    /// Tokens that the memory has room for.
    pub capacity: usize,
    /// The segment's `x`, `q`, `k`, `v`.
    pub rows: [Value; 4],
    /// The memory of an input of that name with the segment's rows in it.
    pub memory: &'a mut dyn FnMut(&mut Builder, &str, Value) -> Value,
}

const INPUTS: [&str; 4] = ["x", "q", "k", "v"];

fn mentions(d: &Dim) -> bool {
    d.syms().iter().any(|s| s.as_str() == "L")
}

impl Fragment {
    fn label(&self, id: NodeId) -> String {
        format!("{} = {}", self.graph.label(id.result(0)), self.graph.node(id).op.mnemonic())
    }

    /// The axis of a value that counts tokens as rows: the first, unless it was moved.
    fn row_axis(&self, axes: &[Option<usize>], n: &Node) -> Option<usize> {
        let first = || n.tys[0].shape.iter().position(mentions);
        let of = |i: usize| n.inputs.get(i).and_then(|v| axes[v.node.index()]);
        match &n.op {
            Op::Transpose(t) => of(0).and_then(|a| t.perm.iter().position(|&p| p == a)),
            Op::Reduce(r) if !r.keep => of(0).map(|a| a - r.axes.iter().filter(|&&k| k < a).count()),
            Op::Reduce(_) | Op::Unary(_) | Op::Cast(_) | Op::Slice(_) | Op::Pad(_) => of(0),
            _ => first(),
        }
    }

    /// Where the operands of a node come from that is wanted for the rows.
    ///
    /// # Errors
    /// It has no form for a segment, and why.
    fn sources(&self, id: NodeId, axes: &[Option<usize>]) -> Result<Vec<Side>, String> {
        let n = self.graph.node(id);
        let all = |f: Side| vec![f; n.inputs.len()];
        let row = |i: usize| axes[n.inputs[i].node.index()];
        let mixes = |axis: usize| (0..n.inputs.len()).any(|i| row(i) == Some(axis));
        let refuse = |why: &str| Err(format!("{} {why}", self.label(id)));
        Ok(match &n.op {
            Op::Attention(a) if a.causal || a.unit > 0 => vec![Side::Rows, Side::Memory, Side::Memory],
            Op::Attention(_) => return refuse("sees all tokens, those that are still to come too"),
            Op::Score(_) => vec![Side::Rows, Side::Memory, Side::Start],
            Op::Mask(_) => vec![Side::Rows, Side::Start],
            Op::Attend(_) => vec![Side::Rows, Side::Memory, Side::Memory, Side::Rows, Side::Rows],
            Op::MatMul(m) if m.trans_a => return refuse("has its rows in columns"),
            Op::MatMul(_) => vec![Side::Rows, Side::Memory],
            Op::Reduce(r) if r.axes.iter().any(|&a| mixes(a)) => return refuse("goes over the tokens"),
            Op::Concat(c) if mixes(c.axis) => return refuse("puts tokens behind each other"),
            Op::Slice(s) if mixes(s.axis) => return refuse("takes some of the tokens"),
            Op::Pad(p) if mixes(p.axis) => return refuse("adds tokens"),
            Op::Iota(i) if n.tys[0].shape.iter().position(mentions) == Some(i.axis) => {
                return refuse("counts tokens from the segment's first");
            }
            Op::Unary(_)
            | Op::Binary(_)
            | Op::Where(_)
            | Op::Cast(_)
            | Op::Reshape(_)
            | Op::Broadcast(_)
            | Op::Transpose(_)
            | Op::Concat(_)
            | Op::Slice(_)
            | Op::Pad(_)
            | Op::Reduce(_)
            | Op::Softmax(_)
            | Op::Select(_)
            | Op::Weigh(_)
            | Op::Aggregate(_)
            | Op::Merge(_)
            | Op::RmsNorm(_)
            | Op::Constant(_)
            | Op::Iota(_)
            | Op::Source(_) => all(Side::Rows),
            _ => return refuse("mixes tokens of which a segment has only some"),
        })
    }

    /// Adds the fragment's output for a segment to a graph; its params get `prefix`.
    ///
    /// # Errors
    /// The op that has no form for a segment, and why.
    pub fn segment(&self, b: &mut Builder, prefix: &str, around: Around) -> Result<Value, String> {
        let Around { start, capacity, rows, memory } = around;
        let g = &self.graph;
        let mut axes: Vec<Option<usize>> = vec![];
        for n in &g.nodes {
            axes.push(self.row_axis(&axes, n));
        }
        // Which sides are wanted: [rows, memory].
        let mut wanted = vec![[false; 2]; g.nodes.len()];
        let o = g.output("o").ok_or("BUG: a checked fragment has an output o")?;
        wanted[o.node.index()][0] = true;
        let mut starts = vec![false; g.nodes.len()];
        for (id, n) in g.iter().rev() {
            let [of_rows, of_memory] = wanted[id.index()];
            if of_rows {
                for (v, from) in n.inputs.iter().zip(self.sources(id, &axes)?) {
                    match from {
                        Side::Rows => wanted[v.node.index()][0] = true,
                        Side::Memory => wanted[v.node.index()][1] = true,
                        Side::Start => starts[v.node.index()] = true,
                    }
                }
            }
            if of_memory {
                n.inputs.iter().for_each(|v| wanted[v.node.index()][1] = true);
            }
        }
        for (id, n) in g.iter().filter(|(id, _)| starts[id.index()]) {
            if !matches!(&n.op, Op::Constant(c) if c.value == 0.0) {
                return Err(format!("{} says where tokens stand, and is no constant 0", self.label(id)));
            }
        }
        let mut made: [Vec<Vec<Value>>; 2] = [vec![], vec![]];
        for (id, n) in g.iter() {
            for side in 0..2 {
                let out = if !wanted[id.index()][side] {
                    vec![]
                } else if let Op::Source(s) = &n.op {
                    match INPUTS.iter().position(|i| *i == s.name).filter(|_| s.kind == SourceKind::Input) {
                        Some(i) if side == 0 => vec![rows[i]],
                        Some(i) => vec![memory(b, INPUTS[i], rows[i])],
                        // Both sides read the one param.
                        None if side == 1 && wanted[id.index()][0] => made[0][id.index()].clone(),
                        None => vec![b.param(&format!("{prefix}{}", s.name), s.ty.clone())],
                    }
                } else {
                    let froms = if side == 0 { self.sources(id, &axes)? } else { vec![Side::Memory; n.inputs.len()] };
                    let mut inputs: Vec<Value> = n
                        .inputs
                        .iter()
                        .zip(froms)
                        .map(|(v, from)| match from {
                            Side::Rows => made[0][v.node.index()][v.result as usize],
                            Side::Memory => made[1][v.node.index()][v.result as usize],
                            Side::Start => start,
                        })
                        .collect();
                    if side == 0 && matches!(n.op, Op::Attention(_)) {
                        inputs.push(start);
                    }
                    let row = axes[id.index()].filter(|_| side == 0);
                    b.copy(&Node { op: sized(&n.op, capacity, row)?, ..n.clone() }, &inputs)
                };
                made[side].push(out);
            }
        }
        Ok(made[0][o.node.index()][o.result as usize])
    }
}

/// An op with `capacity` for the tokens of every axis but the rows'.
fn sized(op: &Op, capacity: usize, row: Option<usize>) -> Result<Op, String> {
    let of = |shape: &[Dim]| -> Result<Vec<Dim>, String> {
        let one = |(i, d): (usize, &Dim)| match Some(i) == row {
            true => Ok(d.clone()),
            false => d.with("L", capacity).ok_or_else(|| format!("{d} overflows at {capacity} tokens")),
        };
        shape.iter().enumerate().map(one).collect()
    };
    Ok(match op {
        Op::Reshape(r) => Reshape { shape: of(&r.shape)? }.into(),
        Op::Broadcast(x) => Broadcast { shape: of(&x.shape)? }.into(),
        Op::Constant(c) => Constant { ty: rambac_ir::Ty::new(c.ty.dtype, of(&c.ty.shape)?), ..c.clone() }.into(),
        Op::Iota(i) => Iota { ty: rambac_ir::Ty::new(i.ty.dtype, of(&i.ty.shape)?), ..i.clone() }.into(),
        op => op.clone(),
    })
}
