//! Which casts from bf16 and to bf16 are no steps, because a kernel reads or writes bf16 in their place.
//!
//! On GPUs an op's operands and results that go together (`rambac_passes::mixed::halves`) are all bf16 or none is; a memory that will be
//! pages of bf16 counts as such.

use crate::traits::{Kernels, kernel_traits, reads_bf16};
use rambac_ir::ops::{Op, SourceKind};
use rambac_ir::{DType, Graph, Node, NodeId, Ty, Value};
use rambac_passes::mixed::{halves, narrows, widens};
use std::collections::HashMap;

/// See the module's comment.
pub struct Narrow {
    /// Per node, per operand: whether it is read from behind a cast from bf16.
    reads: Vec<Vec<bool>>,
    /// Results that are written as bf16, and the cast that says so; `None` where nothing reads the result.
    writes: HashMap<Value, Option<Value>>,
    /// Results that are written in bf16 too, and the cast that says so.
    copies: HashMap<Value, Value>,
}

/// Whether a node is a memory that `op` can read in pages.
fn in_pages(op: &Op, operand: usize, memory: &Node) -> bool {
    let input = matches!(&memory.op, Op::Source(s) if s.kind == SourceKind::Input);
    input && kernel_traits(op).paged_inputs.contains(&operand)
}

/// What a result's readers say of it.
enum Readers {
    Nobody,
    /// A cast to bf16, alone.
    Cast(Value),
    Others,
}

impl Narrow {
    pub fn new(g: &Graph, kernels: Kernels) -> Narrow {
        let users = g.users();
        let readers = |v: Value| {
            let mut all = users[v.node.index()].iter().filter(|u| g.node(**u).inputs.contains(&v));
            if g.outputs.iter().any(|o| o.value == v) {
                return Readers::Others;
            }
            match (all.next(), all.next()) {
                (None, _) => Readers::Nobody,
                (Some(u), None) if narrows(g, g.node(*u)) => Readers::Cast(u.result(0)),
                _ => Readers::Others,
            }
        };
        let rounded = |v: Value| {
            let mut all = users[v.node.index()].iter().filter(|u| g.node(**u).inputs.contains(&v));
            all.find(|u| narrows(g, g.node(**u))).map(|u| u.result(0))
        };
        let mut n = Narrow { reads: vec![], writes: HashMap::new(), copies: HashMap::new() };
        for (id, node) in g.iter() {
            let half = |i: usize| {
                let of = node.inputs.get(i).map(|v| g.node(v.node));
                of.is_some_and(|n| widens(g, n) || (kernels == Kernels::GpuPages && in_pages(&node.op, i, n)))
            };
            if kernels == Kernels::Cpu {
                let reads = |(i, v): (usize, &Value)| reads_bf16(&node.op, i, g.ty(*v));
                n.reads.push(node.inputs.iter().enumerate().map(reads).collect());
                continue;
            }
            let h = halves(&node.op);
            let single = |r: usize| node.tys[r].dtype == DType::F32;
            let results = h.results.iter().all(|&r| single(r) && !matches!(readers(id.result(r)), Readers::Others));
            let together = h.operands.iter().all(|&i| half(i)) && results;
            let alone = |i: usize| h.wants.contains(&i) || h.takes.contains(&i);
            let reads = |i: usize| alone(i) || (together && h.operands.contains(&i));
            n.reads.push((0..node.inputs.len()).map(reads).collect());
            for r in (0..node.tys.len()).filter(|&r| single(r) && together) {
                let v = id.result(r);
                match readers(v) {
                    Readers::Nobody if h.results.contains(&r) => drop(n.writes.insert(v, None)),
                    Readers::Cast(c) if h.results.contains(&r) || h.gives.contains(&r) => {
                        n.writes.insert(v, Some(c));
                    }
                    _ => {}
                }
            }
            for v in h.copies.iter().filter(|&&r| single(r)).map(|&r| id.result(r)) {
                if let (None, Some(c)) = (n.writes.get(&v), rounded(v)) {
                    n.copies.insert(v, c);
                }
            }
        }
        n
    }

    /// Whether the node's kernel reads operand `i` as bf16 if it is a cast from bf16, or a memory that will be pages of bf16.
    pub fn reads(&self, id: NodeId, i: usize) -> bool {
        self.reads[id.index()][i]
    }
    /// The cast that a result is written as.
    pub fn cast_of(&self, v: Value) -> Option<Value> {
        self.writes.get(&v).copied().flatten()
    }
    /// The cast that a result is written as beside itself.
    pub fn copy_of(&self, v: Value) -> Option<Value> {
        self.copies.get(&v).copied()
    }
    /// Whether the maker of its operand writes this cast too.
    pub fn copied(&self, g: &Graph, cast: NodeId) -> bool {
        let from = g.node(cast).inputs.first();
        from.is_some_and(|v| self.copy_of(*v) == Some(cast.result(0)))
    }
    /// The value whose maker writes this cast in its place.
    pub fn written(&self, g: &Graph, cast: NodeId) -> Option<Value> {
        let n = g.node(cast);
        let from = *n.inputs.first().filter(|_| matches!(n.op, Op::Cast(_)))?;
        (self.cast_of(from) == Some(cast.result(0))).then_some(from)
    }
    /// The type that a result is written as.
    pub fn result(&self, g: &Graph, v: Value) -> Ty {
        let ty = g.ty(v);
        if self.writes.contains_key(&v) { ty.with_dtype(DType::BF16) } else { ty.clone() }
    }
}
