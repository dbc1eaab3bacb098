//! Reductions over neighbouring axes, and summaries of chunks, as the middle of [outer, mid, inner].

use super::{Cuda, Site, Unsupported};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Form, Launch, Operand};
use crate::cuda::stub::Stub;
use rambac_ir::ops::*;
use rambac_ir::{DType, Dim};

/// Rows of `mid` that one block combines.
const PART: usize = 256;

/// Neighbouring axes that are reduced together: one pass where a block can hold them, else two.
pub(super) struct Group {
    pub outer: Expr,
    pub mid: Expr,
    pub inner: Expr,
}

impl Group {
    pub fn pass(
        &self,
        f: &str,
        from: (Operand, DType),
        to: (Operand, DType),
        mid: Expr,
        parts: Expr,
        part: Expr,
    ) -> Launch {
        let inner = self.inner.clone();
        // Columns side by side as far as there are any, else all lanes walk along mid.
        let lanes = match inner.as_int() {
            Some(n) if n < 32 => n.next_power_of_two().max(1),
            _ => 32,
        };
        Stub::new("reduce", "reduce", 256)
            .tag(f.to_lowercase().trim_end_matches('>').replace('<', "_"))
            .element("In", from.1)
            .element("Out", to.1)
            .line(format!("using F = {f};"))
            .int("lanes", lanes)
            .int("rows", 256 / lanes)
            .tag(lanes)
            .read("x", from.1, from.0)
            .i64("outer_stride", mid.clone() * inner.clone())
            .i64("mid_stride", inner.clone())
            .write("y", to.1, to.0)
            .i64("mid", mid)
            .i64("inner", inner.clone())
            .i64("part", part)
            .launch((inner.ceil_div(lanes) * self.outer.clone(), parts, 1))
    }
}

/// Runs of reduced axes, first to last; axes of size 1 belong to any run.
fn groups(shape: &[Dim], axes: &[usize]) -> Vec<std::ops::Range<usize>> {
    let mut all: Vec<std::ops::Range<usize>> = vec![];
    for &k in axes.iter().filter(|&&k| !shape[k].is_one()) {
        match all.last_mut() {
            Some(r) if shape[r.end..k].iter().all(Dim::is_one) => r.end = k + 1,
            _ => all.push(k..k + 1),
        }
    }
    if all.is_empty() {
        all.push(0..0);
    }
    all
}

impl Cuda for Reduce {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let (x, y) = (Operand::Input(0), Operand::Output(0));
        site.contiguous(x)?;
        site.contiguous(y)?;
        let mut shape = site.inputs[0].ty.shape.clone();
        let groups = groups(&shape, &self.axes);
        let f = match self.f {
            ReduceFn::Sum => "Sum",
            ReduceFn::Max => "Max",
        };
        let mut form = Form::new("reduce", "", vec![]);
        let mut at = (x, site.dtype(x));
        let mut two = false;
        for (k, r) in groups.iter().enumerate().rev() {
            let g = Group {
                outer: Expr::product(&shape[..r.start]),
                mid: Expr::product(&shape[r.clone()]),
                inner: Expr::product(&shape[r.end..]),
            };
            // The last axis group is reduced first, so those before it keep their places.
            shape.splice(r.clone(), []);
            let last = (y, site.dtype(y));
            let result = g.outer.clone() * g.inner.clone();
            let parts = g.mid.clone().ceil_div(PART);
            let mut from = at;
            if parts.as_int() != Some(1) {
                two = true;
                let w = (Operand::Workspace(form.workspace.len()), DType::F32);
                form = form.with("parts", DType::F32, result.clone() * parts.clone());
                form.calls.push(g.pass(f, from, w, g.mid.clone(), parts.clone(), Expr::int(PART)).into());
                from = w;
            }
            let to = if k == 0 {
                last
            } else {
                form = form.with("reduced", DType::F32, result);
                (Operand::Workspace(form.workspace.len() - 1), DType::F32)
            };
            let mid = if two && from.0 != at.0 { parts } else { g.mid.clone() };
            form.calls.push(g.pass(f, from, to, mid.clone(), Expr::int(1), mid.max(1)).into());
            at = to;
        }
        form.why = match (two, groups.len()) {
            (false, 1) => "one pass: a block holds the reduced axes".into(),
            (true, 1) => format!("two passes: parts of {PART} rows, then the parts"),
            (_, n) => format!("{n} groups of axes, one after another"),
        };
        Ok(vec![form])
    }
}

impl Cuda for Summarise {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let (x, y) = (Operand::Input(0), Operand::Output(0));
        site.contiguous(x)?;
        site.contiguous(y)?;
        let shape = &site.outputs[0].ty.shape;
        let (outer, inner) = (Expr::product(&shape[..2]), Expr::product(&shape[2..]));
        let (f, form) = match self.mode {
            Summary::Mean => (format!("Mean<{}>", self.chunk), "mean"),
            Summary::Max => ("Max".into(), "max"),
            Summary::Min => ("Min".into(), "min"),
        };
        let mid = Expr::int(self.chunk);
        let group = Group { outer, mid: mid.clone(), inner };
        let call = group.pass(&f, (x, site.dtype(x)), (y, site.dtype(y)), mid.clone(), Expr::int(1), mid);
        Ok(vec![Form::new(form, "a block takes the rows of a chunk", vec![call.into()])])
    }
}

/// Rows of an operand: the product of all axes but the last.
pub(super) fn rows_of(shape: &[Dim]) -> Expr {
    Expr::product(&shape[..shape.len().saturating_sub(1)])
}
