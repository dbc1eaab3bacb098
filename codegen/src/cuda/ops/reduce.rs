//! Reductions over neighbouring axes, as the middle of [outer, mid, inner].

use super::{Cuda, Site, Unsupported, because};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Form, Launch, Operand};
use crate::cuda::stub::Stub;
use rambac_ir::ops::*;
use rambac_ir::{DType, Dim};

/// Rows of `mid` that one block combines.
const PART: usize = 4096;

impl Cuda for Reduce {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let (x, y) = (Operand::Input(0), Operand::Output(0));
        site.contiguous(x)?;
        site.contiguous(y)?;
        let shape = &site.inputs[0].ty.shape;
        let (first, last) = match (self.axes.first(), self.axes.last()) {
            (Some(&f), Some(&l)) => (f, l + 1),
            _ => (shape.len(), shape.len()),
        };
        // Axes of size 1 between the reduced ones do not matter.
        if let Some(k) = (first..last).find(|k| !self.axes.contains(k) && !shape[*k].is_one()) {
            return because(format!("axis {k} lies between the reduced axes {:?}", self.axes));
        }
        let (outer, mid, inner) =
            (Expr::product(&shape[..first]), Expr::product(&shape[first..last]), Expr::product(&shape[last..]));
        let parts = mid.clone().ceil_div(PART);
        let whole = parts.as_int() == Some(1);
        let pass = |from: Operand, to: Operand, types: (DType, DType), mid: Expr, parts: Expr, part: Expr| -> Launch {
            // Columns side by side as far as there are any, else all lanes walk along mid.
            let lanes = match inner.as_int() {
                Some(n) if n < 32 => n.next_power_of_two().max(1),
                _ => 32,
            };
            let rows = 256 / lanes;
            let f = match self.f {
                ReduceFn::Sum => "Sum",
                ReduceFn::Max => "Max",
            };
            Stub::new("reduce", "reduce", 256)
                .tag(f.to_lowercase())
                .element("In", types.0)
                .element("Out", types.1)
                .line(format!("using F = {f};"))
                .int("lanes", lanes)
                .int("rows", rows)
                .tag(lanes)
                .read("x", types.0, from)
                .i64("outer_stride", mid.clone() * inner.clone())
                .i64("mid_stride", inner.clone())
                .write("y", types.1, to)
                .i64("mid", mid)
                .i64("inner", inner.clone())
                .i64("part", part)
                .launch((inner.clone().ceil_div(lanes), parts, outer.clone()))
        };
        let (tx, ty) = (site.dtype(x), site.dtype(y));
        if whole {
            let l = pass(x, y, (tx, ty), mid.clone(), Expr::int(1), mid.max(1));
            return Ok(vec![Form::new("reduce", "one pass: a block holds the reduced axes", vec![l.into()])]);
        }
        let w = Operand::Workspace(0);
        let a = pass(x, w, (tx, DType::F32), mid, parts.clone(), Expr::int(PART));
        let b = pass(w, y, (DType::F32, ty), parts.clone(), Expr::int(1), parts.clone().max(1));
        let form = Form::new(
            "reduce_parts",
            format!("two passes: parts of {PART} rows, then the parts"),
            vec![a.into(), b.into()],
        );
        Ok(vec![form.with("parts", DType::F32, outer.clone() * parts * inner.clone())])
    }
}

/// Rows of an operand: the product of all axes but the last.
pub(super) fn rows_of(shape: &[Dim]) -> Expr {
    Expr::product(&shape[..shape.len().saturating_sub(1)])
}
