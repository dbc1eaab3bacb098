//! A map of a product becomes the product's epilogue: it runs on each tile while that is in a cache.
//!
//! ```text
//! %p = matmul %x, %w {trans_b = true}          %r = matmul_map %x, %w, %h {trans_b = true,
//! %r = map %p, %h {body = ["add v0 v1"], …} ⇒                    body = ["add v0 v1"], …}
//! ```
//! Biases, residuals, gates and scalings are such maps, forward and backward.  A product that others read as well is
//! one more result.  Requires: maps are fused.  Ensures: no map reads a product of its phase from memory but where
//! [`unfused`] says why, or where it is another product's epilogue.

use crate::cse::is_backward;
use crate::fuse_selection::push_in_scope;
use crate::rewrite::Rewrite;
use rambac_ir::ops::{MatMul, MatMulMap, Op};
use rambac_ir::{DType, Graph, NodeId, Value};
use std::collections::HashMap;

/// What map a product goes into, or why it stays.
fn find(g: &Graph, users: &[Vec<NodeId>], product: NodeId) -> Option<Result<NodeId, String>> {
    let n = g.node(product);
    let Op::MatMul(m) = &n.op else { return None };
    let readers = &users[product.index()];
    let map = *readers.iter().find(|u| matches!(g.node(**u).op, Op::FusedMap(_)))?;
    let Op::FusedMap(f) = &g.node(map).op else { unreachable!("BUG: tested in the search") };
    if is_backward(n) != is_backward(g.node(map)) {
        return None; // Far away: the optimiser's, or the backward's.
    }
    let stays = |why: &str| Some(Err(why.to_string()));
    if m.trans_a || g.ty(n.inputs[1]).rank() != 2 {
        return stays("products in parts and batches of products have no epilogue");
    }
    if f.shape != n.tys[0].shape {
        return stays("the map has another shape than the product");
    }
    if readers.iter().any(|&u| u < map) {
        return stays("something reads the product before the map");
    }
    // The product waits in the first result.
    if n.tys[0].dtype != DType::F32 || f.dtypes[0] != DType::F32 {
        return stays("epilogues work in f32");
    }
    Some(Ok(map))
}

/// Whether something beside its map reads the product.
fn kept(g: &Graph, users: &[Vec<NodeId>], product: NodeId) -> bool {
    users[product.index()].len() > 1 || g.outputs.iter().any(|o| o.value.node == product)
}

/// The product that each map becomes the epilogue of: of several, the last.
fn pairs(g: &Graph, users: &[Vec<NodeId>]) -> HashMap<NodeId, NodeId> {
    g.iter().filter_map(|(id, _)| Some((find(g, users, id)?.ok()?, id))).collect()
}

/// Products that maps read from memory, each with the reason; `explain` prints them.
pub fn unfused(g: &Graph) -> Vec<(NodeId, String)> {
    let users = g.users();
    let why = |id| match find(g, &users, id)? {
        Ok(_) => Some("the pass did not run".into()),
        Err(why) => Some(why),
    };
    g.iter().filter_map(|(id, _)| Some((id, why(id)?))).collect()
}

/// See the module's comment.
pub fn fuse_epilogue(g: &Graph) -> Graph {
    let users = g.users();
    let pairs = pairs(g, &users);
    let mut r = Rewrite::new(g);
    for (id, n) in g.iter() {
        let (Some(&product), Op::FusedMap(map)) = (pairs.get(&id), &n.op) else {
            // A product that goes elsewhere is made there.
            if !pairs.values().any(|p| *p == id) {
                r.copy(id);
            }
            continue;
        };
        let Op::MatMul(MatMul { trans_a, trans_b }) = g.node(product).op else {
            unreachable!("BUG: pairs are of products")
        };
        // Registers: the product first, then the other operands, then the instructions as they were.
        let at = n.inputs.iter().position(|v| v.node == product).expect("BUG: the map reads the product");
        let register = |k: usize| if k == at { 0 } else { k + (k < at) as usize };
        let mut map = map.clone();
        map.body.iter_mut().flat_map(|i| &mut i.args).for_each(|a| *a = register(*a as usize) as u32);
        map.outs.iter_mut().for_each(|o| *o = register(*o));
        let mut names = n.names.clone();
        let keep = kept(g, &users, product);
        if keep {
            map.outs.insert(0, 0);
            map.dtypes.insert(0, DType::F32);
            names.insert(0, g.node(product).names[0].clone());
        }
        let rest = n.inputs.iter().filter(|v| v.node != product);
        let x: Vec<Value> = g.node(product).inputs.iter().chain(rest).map(|&v| r.get(v)).collect();
        let op = MatMulMap { trans_a, trans_b, body: map.body, outs: map.outs, dtypes: map.dtypes };
        let mut out = push_in_scope(&mut r, id, names, op.into(), &x);
        if keep {
            r.set(product, vec![out.remove(0)]);
        }
        r.set(id, out);
    }
    r.finish()
}
