//! Reverse-mode differentiation: emits every op's `vjp` in reverse order.
//!
//! ```text
//! %w = param "w" : f32[4]          …the same nodes, then
//! %y = square %w                   %dy = constant 1.0 : f32[4]   (from the loss)
//! %l = reduce %y {sum}        ⇒    %dw = mul (mul %dy, %w), 2
//! ```
//! Requires: the loss is a scalar float.  Ensures: the old nodes are untouched; new nodes carry the scope
//! `grad.<scope of the forward node>`, by which later passes tell backward from forward.

use rambac_ir::ops::{OpError, Vjp};
use rambac_ir::{Builder, Graph, Value};

/// The scope prefix of backward nodes.
pub const GRAD: &str = "grad";

/// Why a graph can't be differentiated.
#[derive(Debug, thiserror::Error)]
pub enum AutodiffError {
    #[error("the loss {label} must be a scalar of a float type, but is {ty}; reduce it first")]
    NotScalar { label: String, ty: String },
    #[error("{label} = {op} (at {loc}): {error}")]
    NoGradient { label: String, op: &'static str, loc: String, error: OpError },
    #[error("the gradient of {op} is ill-typed: {error}")]
    IllTyped { op: &'static str, error: String },
}

/// Appends the gradient of `loss` at each of `wrt`; zeros where none flows.
///
/// # Errors
/// The loss is no float scalar, or an op between it and `wrt` has no gradient.
pub fn gradients(g: Graph, loss: Value, wrt: &[Value]) -> Result<(Graph, Vec<Value>), AutodiffError> {
    let ty = g.ty(loss).clone();
    if ty.rank() != 0 || !ty.dtype.is_float() {
        return Err(AutodiffError::NotScalar { label: g.label(loss), ty: ty.to_string() });
    }
    // Only nodes that depend on `wrt` need gradients.
    let mut needs = vec![false; g.nodes.len()];
    wrt.iter().for_each(|v| needs[v.node.index()] = true);
    for (id, n) in g.iter() {
        needs[id.index()] |= n.inputs.iter().any(|v| needs[v.node.index()]);
    }

    let mut dys: Vec<Vec<Option<Value>>> = g.nodes.iter().map(|n| vec![None; n.tys.len()]).collect();
    let forward = g.nodes.clone();
    let mut b = Builder::extend(g);
    let one = b.scoped(GRAD, |b| b.constant(1.0, ty));
    dys[loss.node.index()][loss.result as usize] = Some(one);
    for (i, node) in forward.iter().enumerate().take(loss.node.index() + 1).rev() {
        if !needs[i] || node.inputs.is_empty() || dys[i].iter().all(Option::is_none) {
            continue;
        }
        let id = rambac_ir::NodeId(i as u32);
        let y: Vec<Value> = (0..node.tys.len()).map(|r| id.result(r)).collect();
        let scope = node.scope.as_ref().map_or(GRAD.to_string(), |s| format!("{GRAD}.{s}"));
        let dy = std::mem::take(&mut dys[i]);
        b.scoped(&scope, |b| -> Result<(), AutodiffError> {
            let mut cx = Vjp::new(b, &node.inputs, &y, &dy);
            let dx = node.op.def().vjp(&mut cx).map_err(|error| AutodiffError::NoGradient {
                label: b.graph().label(y[0]),
                op: node.op.mnemonic(),
                loc: node.loc.to_string(),
                error,
            })?;
            for (&x, d) in node.inputs.iter().zip(dx) {
                let Some(d) = d.filter(|_| needs[x.node.index()]) else { continue };
                let slot = &mut dys[x.node.index()][x.result as usize];
                *slot = Some(match *slot {
                    None => d,
                    Some(sum) => b.add(sum, d),
                });
            }
            Ok(())
        })?;
        dys[i] = dy;
    }
    let out = b.scoped(GRAD, |b| {
        wrt.iter()
            .map(|v| {
                dys[v.node.index()][v.result as usize].unwrap_or_else(|| {
                    let ty = b.ty(*v).clone();
                    b.constant(0.0, ty)
                })
            })
            .collect()
    });
    let g = b.finish().map_err(|e| AutodiffError::IllTyped { op: "an op", error: e.to_string() })?;
    Ok((g, out))
}
