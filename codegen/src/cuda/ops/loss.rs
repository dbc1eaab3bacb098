//! A linear layer with the cross-entropy of its logits: rows in parts, so that an eighth of the logits exists at a time, or
//! less where rows are many.  Logits are f32; their gradient overwrites them, or stands beside them in bf16.

use super::reduce::rows_of;
use super::rows::{CrossEntropyStub, cross_entropy, row_vector};
use super::{Cuda, Site, Unsupported};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Call, Condition, Form, Gemm, GemmOperand, Operand};
use crate::cuda::stub::Stub;
use rambac_ir::DType;
use rambac_ir::ops::*;

/// Parts that the rows are cut into, and from how many rows on.
const PARTS: [(usize, usize); 2] = [(64, 1 << 17), (8, 0)];

/// Operands of the op, the same in both directions.
const H: Operand = Operand::Input(0);
const W: Operand = Operand::Input(1);
const LABELS: Operand = Operand::Input(2);
const DLOSS: Operand = Operand::Input(3);
const LOGITS: Operand = Operand::Workspace(0);
/// The logits' gradient, where it is no f32.
const DZ: Operand = Operand::Workspace(1);

struct Parts<'a> {
    site: &'a Site<'a>,
    dtype: DType,
    rows: Expr,
    /// Rows of a part.
    part: Expr,
    vocab: Expr,
    width: Expr,
    h_stride: Expr,
    ignore: i64,
}

impl<'a> Parts<'a> {
    fn new(site: &'a Site, ignore: i64, parts: usize) -> Result<Self, Unsupported> {
        [W, LABELS].into_iter().try_for_each(|at| site.contiguous(at))?;
        let shape = &site.inputs[0].ty.shape;
        let rows = rows_of(shape);
        Ok(Self {
            site,
            dtype: site.dtype(H),
            part: rows.clone().ceil_div(parts),
            rows,
            vocab: Expr::from(&site.inputs[1].ty.shape[0]),
            width: Expr::from(&site.inputs[1].ty.shape[1]),
            h_stride: site.row_stride(H, shape.len() - 1)?,
            ignore,
        })
    }

    /// The first row of a part, and how many it has.
    fn range(&self, i: usize) -> (Expr, Expr) {
        let first = self.part.clone() * i;
        (first.clone(), self.part.clone().min(self.rows.clone().less(first)))
    }

    fn matrix(&self, at: Operand, first: Expr, ld: Expr, trans: bool) -> GemmOperand {
        GemmOperand { at, first, dtype: self.dtype, ld, step: Expr::int(0), trans }
    }

    fn gemm(&self, (m, n, k): (Expr, Expr, Expr), a: GemmOperand, b: GemmOperand, c: GemmOperand, add: bool) -> Call {
        let plus = add.then(|| c.clone());
        Call::Gemm(Gemm { batch: Expr::int(1), m, n, k, a, b, c, plus })
    }

    /// `logits = h·wᵀ` of a part.
    fn logits(&self, i: usize) -> Call {
        let (first, m) = self.range(i);
        let h = self.matrix(H, first * self.h_stride.clone(), self.h_stride.clone(), false);
        let w = self.matrix(W, Expr::int(0), self.width.clone(), true);
        let c = self.matrix(LOGITS, Expr::int(0), self.vocab.clone(), false);
        let c = GemmOperand { dtype: DType::F32, ..c };
        self.gemm((m, self.vocab.clone(), self.width.clone()), h, w, c, false)
    }

    /// The losses of a part from its logits.
    fn losses(&self, i: usize, to: Operand) -> Result<Call, Unsupported> {
        let (first, rows) = self.range(i);
        let y = self.site.dtype(to);
        let stub = self.stub(first.clone(), "cross_entropy")?.tag(y).write_from("y", y, to, first);
        Ok(stub.i32("cols", self.vocab.clone()).launch((rows, 1, 1)).into())
    }

    fn stub(&self, first: Expr, template: &'static str) -> Result<Stub, Unsupported> {
        let cols = &self.site.inputs[1].ty.shape[0];
        let s = CrossEntropyStub {
            template,
            dtype: DType::F32,
            cols,
            ignore: self.ignore,
            // Of workspace, so that only rows' length matters.
            vec: row_vector(cols, 4),
            target: self.site.target,
        };
        Ok(cross_entropy(&s)?.read("z", DType::F32, LOGITS).i64("stride", self.vocab.clone()).read_from(
            "labels",
            DType::I32,
            LABELS,
            first,
        ))
    }

    fn workspace(&self, name: &'static str, why: String, calls: Vec<Call>) -> Form {
        Form::new(name, why, calls).with("logits", DType::F32, self.part.clone() * self.vocab.clone())
    }
}

/// A form for each number of parts.
fn each(make: impl Fn(usize) -> Result<(Form, Expr), Unsupported>) -> Result<Vec<Form>, Unsupported> {
    let one = |(parts, from): (usize, usize)| {
        let (form, rows) = make(parts)?;
        Ok(if from > 0 { form.when(Condition::AtLeast(rows, Expr::int(from))) } else { form })
    };
    PARTS.into_iter().map(one).collect()
}

impl Cuda for LinearCrossEntropy {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        site.contiguous(Operand::Output(0))?;
        each(|parts| {
            let p = Parts::new(site, self.ignore, parts)?;
            let mut calls = vec![];
            for i in 0..parts {
                calls.push(p.logits(i));
                calls.push(p.losses(i, Operand::Output(0))?);
            }
            let why = format!("logits in {parts} parts of the rows");
            Ok((p.workspace("linear_cross_entropy", why, calls), p.rows))
        })
    }
}

impl Cuda for LinearCrossEntropyGrad {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let (dh, dw, loss) = (Operand::Output(0), Operand::Output(1), Operand::Output(2));
        [DLOSS, dw, loss].into_iter().try_for_each(|at| site.contiguous(at))?;
        let dh_stride = site.row_stride(dh, site.inputs[0].ty.shape.len() - 1)?;
        each(|parts| {
            let p = Parts::new(site, self.ignore, parts)?;
            let over = p.dtype == DType::F32;
            let grad = if over { LOGITS } else { DZ };
            // Sums over parts are kept in f32.
            let single = site.dtype(dw) == DType::F32;
            let sum = if single { dw } else { Operand::Workspace(if over { 1 } else { 2 }) };
            let mut calls = vec![];
            for i in 0..parts {
                let (first, rows) = p.range(i);
                calls.push(p.logits(i));
                let dz = p
                    .stub(first.clone(), "cross_entropy_both")?
                    .tag(site.dtype(DLOSS))
                    .tag(site.dtype(loss))
                    .tag(p.dtype)
                    .read_from("dloss", site.dtype(DLOSS), DLOSS, first.clone())
                    .write_from("y", site.dtype(loss), loss, first.clone())
                    .write("dz", p.dtype, grad)
                    .i64("dz_stride", p.vocab.clone())
                    .i32("cols", p.vocab.clone())
                    .launch((rows.clone(), 1, 1));
                calls.push(dz.into());
                let z = |trans| p.matrix(grad, Expr::int(0), p.vocab.clone(), trans);
                let to = p.matrix(dh, first.clone() * dh_stride.clone(), dh_stride.clone(), false);
                let w = p.matrix(W, Expr::int(0), p.width.clone(), false);
                calls.push(p.gemm((rows.clone(), p.width.clone(), p.vocab.clone()), z(false), w, to, false));
                let h = p.matrix(H, first * p.h_stride.clone(), p.h_stride.clone(), false);
                let to = GemmOperand { dtype: DType::F32, ..p.matrix(sum, Expr::int(0), p.width.clone(), false) };
                calls.push(p.gemm((p.vocab.clone(), p.width.clone(), rows), z(true), h, to, i > 0));
            }
            let why = format!("logits in {parts} parts of the rows, computed once for both directions");
            let mut form = p.workspace("linear_cross_entropy_grad", why, calls);
            if !over {
                form = form.with("dz", p.dtype, p.part.clone() * p.vocab.clone());
            }
            if !single {
                let n = p.vocab.clone() * p.width.clone();
                form.calls.push(super::map::cast(sum, DType::F32, dw, site.dtype(dw), n.clone()).into());
                form = form.with("dw", DType::F32, n);
            }
            Ok((form, p.rows))
        })
    }
}
