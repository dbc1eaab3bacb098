//! The reference interpreter: runs a graph by each op's `eval`.

use crate::dim::{Bindings, DimError};
use crate::graph::{Graph, Value};
use crate::host::HostArray;
use crate::ops::Op;
use crate::ty::ConcreteTy;
use std::collections::HashMap;

/// Why a graph can't be interpreted.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum InterpError {
    #[error(transparent)]
    Dim(#[from] DimError),
    #[error("{kind} \"{name}\" ({ty}) was not given")]
    Missing { kind: &'static str, name: String, ty: String },
    #[error("{kind} \"{name}\" must be {expected}, but {found} was given")]
    Wrong { kind: &'static str, name: String, expected: String, found: String },
}

/// How floats are kept between ops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// `f64` throughout: for finite differences and as the value that rounding errors are measured from.
    Exact,
    /// Every result is rounded to its element type.
    Typed,
}

/// Runs `g` and returns the values asked for.
///
/// # Errors
/// An unbound or indivisible dim; a source missing from `sources` or of another type.
pub fn run(
    g: &Graph,
    dims: &Bindings,
    sources: &HashMap<String, HostArray>,
    wanted: &[Value],
    precision: Precision,
) -> Result<Vec<HostArray>, InterpError> {
    // Values die after their last use, so that long graphs fit in memory.
    let mut last = vec![0usize; g.nodes.len()];
    for (id, n) in g.iter() {
        n.inputs.iter().for_each(|v| last[v.node.index()] = id.index());
    }
    wanted.iter().for_each(|v| last[v.node.index()] = usize::MAX);
    let mut values: Vec<Vec<HostArray>> = Vec::with_capacity(g.nodes.len());
    for (id, n) in g.iter() {
        let tys = n.tys.iter().map(|t| t.bind(dims)).collect::<Result<Vec<ConcreteTy>, _>>()?;
        let mut out = match &n.op {
            Op::Source(s) => {
                let kind = n.op.mnemonic();
                let a = sources.get(&s.name).ok_or_else(|| InterpError::Missing {
                    kind,
                    name: s.name.clone(),
                    ty: s.ty.to_string(),
                })?;
                if a.ty() != tys[0] {
                    let (expected, found) = (tys[0].to_string(), a.ty().to_string());
                    return Err(InterpError::Wrong { kind, name: s.name.clone(), expected, found });
                }
                vec![a.clone()]
            }
            op => {
                let x: Vec<&HostArray> = n.inputs.iter().map(|v| &values[v.node.index()][v.result as usize]).collect();
                op.def().eval(&x, &tys)
            }
        };
        for (a, t) in out.iter().zip(&tys) {
            assert_eq!(&a.ty(), t, "BUG: {} evaluated to another type than it inferred", n.op.mnemonic());
        }
        if precision == Precision::Typed {
            out.iter_mut().for_each(HostArray::round_to_dtype);
        }
        values.push(out);
        for v in &n.inputs {
            if last[v.node.index()] == id.index() {
                values[v.node.index()].clear();
            }
        }
    }
    Ok(wanted.iter().map(|v| values[v.node.index()][v.result as usize].clone()).collect())
}

/// Runs `g` and returns its outputs by name.
///
/// # Errors
/// As [`run`].
pub fn outputs(
    g: &Graph,
    dims: &Bindings,
    sources: &HashMap<String, HostArray>,
    precision: Precision,
) -> Result<Vec<(String, HostArray)>, InterpError> {
    let wanted: Vec<Value> = g.outputs.iter().map(|o| o.value).collect();
    let values = run(g, dims, sources, &wanted, precision)?;
    Ok(g.outputs.iter().map(|o| o.name.to_string()).zip(values).collect())
}
