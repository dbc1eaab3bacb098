//! Weights of products and embedding tables in bf16: half the bytes, which is what decoding one token waits for.
//!
//! ```text
//! %w = param "w" : f32[n, k]                     %w = param "w" : bf16[n, k]
//! %y = matmul %x, %w {trans_b = true}     ⇒      %c = cast %w {to = f32}
//!                                                %y = matmul %x, %c {trans_b = true}
//! ```
//! Takes every f32 param of rank 2 that the graph does not update and that is nothing but the matrix all rows of a
//! product share, or the table of an embedding; norms, biases and the like stay.  The result is the same function of
//! rounded weights: whoever runs it rounds the stored ones, to nearest even.  Unlike the other passes it adds work on paper
//! (the casts); kernels that read bf16 leave none.

use crate::rewrite::rewrite;
use rambac_ir::ops::{Op, Source, SourceKind};
use rambac_ir::{DType, Graph, Node, NodeId};

/// Whether operand `i` of `n` is a weight matrix or a table.
fn is_weight(g: &Graph, n: &Node, i: usize) -> bool {
    match &n.op {
        // Not one matrix by another: such a product is symmetric in its operands.
        Op::MatMul(_) => i == 1 && g.ty(n.inputs[0]).rank() > 2,
        Op::Embedding(_) => i == 1,
        _ => false,
    }
}

fn narrows(g: &Graph, users: &[Vec<NodeId>], id: NodeId, s: &Source) -> bool {
    let fits = s.kind == SourceKind::Param && s.ty.dtype == DType::F32 && s.ty.rank() == 2;
    let only_weight = |user: &NodeId| {
        let n = g.node(*user);
        n.inputs.iter().enumerate().all(|(i, v)| v.node != id || is_weight(g, n, i))
    };
    let leaves = g.outputs.iter().any(|o| o.value.node == id || *o.name == *s.name);
    fits && !leaves && !users[id.index()].is_empty() && users[id.index()].iter().all(only_weight)
}

/// The params that [`narrow`] takes.
pub fn narrowed(g: &Graph) -> impl Iterator<Item = &str> {
    let users = g.users();
    g.sources().filter(move |(id, s)| narrows(g, &users, *id, s)).map(|(_, s)| s.name.as_str())
}

/// See the module's comment.
pub fn narrow(g: &Graph) -> Graph {
    let users = g.users();
    rewrite(g, |b, id, n, _| {
        let Op::Source(s) = &n.op else { return None };
        if !narrows(g, &users, id, s) {
            return None;
        }
        let stored = Source { ty: s.ty.with_dtype(DType::BF16), ..s.clone() };
        let stored = b.copy(&Node { op: stored.into(), ..n.clone() }, &[]);
        Some(vec![b.cast(stored[0], DType::F32)])
    })
}
