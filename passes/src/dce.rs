//! Dead code: drops nodes that no output needs.  Sources stay: they are the graph's signature.

use crate::rewrite::Rewrite;
use rambac_ir::Graph;
use rambac_ir::ops::Op;

/// See the module's comment.
pub fn dce(g: &Graph) -> Graph {
    let mut live = vec![false; g.nodes.len()];
    g.outputs.iter().for_each(|o| live[o.value.node.index()] = true);
    for (id, n) in g.iter().rev() {
        live[id.index()] |= matches!(n.op, Op::Source(_));
        if live[id.index()] {
            n.inputs.iter().for_each(|v| live[v.node.index()] = true);
        }
    }
    let mut r = Rewrite::new(g);
    for (id, _) in g.iter() {
        if live[id.index()] {
            r.copy(id);
        }
    }
    r.finish()
}
