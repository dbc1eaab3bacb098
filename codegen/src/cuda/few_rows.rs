//! Norms within the products that read them, where rows are few: a decoding step is then a launch less per product, and the
//! normalised row is never stored.
//!
//! ```text
//! %1 = rms_norm %x, %w          with at most 8 rows, step 1 launches nothing, and the product reads x and w itself:
//! %2 = matmul %1, %p            r·Σ x·w·p, where r comes of a sum that the product's threads make on their way (few_rows.cuh)
//! ```
//! What is joined is a program's form, not its meaning: with more rows both steps run as ever.

use super::ops::{Site, takes_few_rows};
use super::target::Target;
use crate::program::{Program, View};
use rambac_ir::Dim;
use rambac_ir::ops::Op;
use std::sync::Arc;

/// Rows of a product that few_rows.cuh takes, at most.
pub const FEW: usize = 8;

/// How a step stands to the norm before it, or to the products behind it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Joined {
    #[default]
    No,
    /// A norm that all its readers compute themselves where rows are few.
    Within,
    /// A product whose first operand is such a norm of the last operands `x, w`, or `x, z, w` of a gated one.
    Norm { eps: f64, gated: bool },
}

impl Joined {
    /// Operands behind those that the op has.
    pub fn operands(self) -> usize {
        match self {
            Joined::Norm { gated, .. } => 2 + usize::from(gated),
            _ => 0,
        }
    }
}

/// Finds norms that products can compute, and gives these products the norms' operands.
pub fn join_norms(mut program: Arc<Program>, target: &Target) -> (Arc<Program>, Vec<Joined>) {
    let p = &*program;
    let (mut pairs, mut joined) = (vec![], vec![Joined::default(); p.steps.len()]);
    for i in 0..p.steps.len() {
        let norm = match &p.steps[i].op {
            Op::RmsNorm(n) => Joined::Norm { eps: n.eps, gated: false },
            Op::GatedRmsNorm(n) => Joined::Norm { eps: n.eps, gated: true },
            _ => continue,
        };
        let readers = readers(p, i);
        if readers.is_empty() || !readers.iter().all(|&r| joinable(p, i, r, norm, target)) {
            continue;
        }
        joined[i] = Joined::Within;
        for r in readers {
            joined[r] = norm;
            pairs.push((i, r));
        }
    }
    if !pairs.is_empty() {
        let p = Arc::make_mut(&mut program);
        for (i, r) in pairs {
            let more = p.steps[i].inputs.clone();
            p.steps[r].inputs.extend(more);
        }
    }
    (program, joined)
}

/// Steps that read a norm's result; none if it is a result of the program too.
fn readers(p: &Program, norm: usize) -> Vec<usize> {
    let y = p.steps[norm].outputs[0].buffer;
    // A buffer may hold another value before and after: this one lives until it is overwritten.
    let writes = |s: usize| p.steps[s].outputs.iter().any(|v| v.buffer == y);
    let end = (norm + 1..p.steps.len()).find(|&s| writes(s)).unwrap_or(p.steps.len());
    if end == p.steps.len() && p.outputs.iter().any(|o| o.view.buffer == y) {
        return vec![];
    }
    (norm + 1..(end + 1).min(p.steps.len())).filter(|&s| p.steps[s].inputs.iter().any(|v| v.buffer == y)).collect()
}

fn joinable(p: &Program, norm: usize, reader: usize, joined: Joined, target: &Target) -> bool {
    let (n, r) = (&p.steps[norm], &p.steps[reader]);
    let y = &n.outputs[0];
    let (width, rows) = (y.ty.shape.last(), |v: &View| Dim::product(&v.ty.shape[..v.ty.rank() - 1]));
    // The whole norm as it is, once, as rows of one matrix's operand.
    let a = &r.inputs[0];
    let whole = a.offset == y.offset && a.strided == y.strided && a.ty.shape.last() == width && rows(a) == rows(y);
    let once = r.inputs.iter().filter(|v| v.buffer == y.buffer).count() == 1 && a.buffer == y.buffer;
    let inputs: Vec<View> = r.inputs.iter().chain(&n.inputs).cloned().collect();
    let site = Site { inputs: &inputs, outputs: &r.outputs, target, joined };
    if !whole || !once || !takes_few_rows(&r.op, &site) {
        return false;
    }
    // What the norm reads must be as it was, also while the product runs.
    let kept = |v: &View| (norm + 1..=reader).all(|s| p.steps[s].outputs.iter().all(|o| o.buffer != v.buffer));
    n.inputs.iter().all(kept)
}
