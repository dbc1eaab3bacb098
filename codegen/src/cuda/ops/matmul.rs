//! Dense products go to the vendor's library; those of a few rows are ours.

use super::few_rows::{FewRows, products};
use super::{Cuda, Site, Unsupported, row_stride};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Call, Form, Gemm, GemmOperand, Operand};
use crate::{BufferId, View};
use rambac_ir::ops::*;
use rambac_ir::{DType, Dim, Ty};

fn few_rows(name: &'static str, all: Vec<FewRows>) -> impl Iterator<Item = Form> {
    all.into_iter().map(move |f| Form { needs: f.needs, ..Form::new(name, f.why, vec![f.call]) })
}

/// The product of the step's first two operands, and `plus`, into `c`, which is `result`.
fn gemm(op: &MatMul, site: &Site, c: Operand, result: &View, plus: Option<Operand>) -> Result<Gemm, Unsupported> {
    let (a, b) = (Operand::Input(0), Operand::Input(1));
    let view = |at| if at == c { result } else { site.view(at) };
    let shape = |at| &view(at).ty.shape;
    // One matrix for all rows of `a`: the rows are one matrix too.
    let shared = shape(b).len() == 2 && shape(a).len() > 2;
    let rank = shape(c).len();
    let operand = |at: Operand, trans: bool, flat: bool| -> Result<GemmOperand, Unsupported> {
        let axis = shape(at).len() - 1;
        let ld = row_stride(view(at), axis)?;
        let rows = Expr::from(&shape(at)[axis - 1]);
        let step = if flat || axis == 1 { Expr::int(0) } else { rows * ld.clone() };
        Ok(GemmOperand { at, first: Expr::int(0), dtype: view(at).ty.dtype, ld, step, trans })
    };
    let (batch, m) = if shared {
        (Expr::int(1), Expr::product(&shape(c)[..rank - 1]))
    } else {
        (Expr::product(&shape(c)[..rank - 2]), Expr::from(&shape(c)[rank - 2]))
    };
    let inner = shape(a).len() - if op.trans_a { 2 } else { 1 };
    Ok(Gemm {
        batch,
        m,
        n: Expr::from(&shape(c)[rank - 1]),
        k: Expr::from(&shape(a)[inner]),
        a: operand(a, op.trans_a, shared)?,
        b: operand(b, op.trans_b, false)?,
        c: operand(c, false, shared)?,
        plus: plus.map(|at| operand(at, false, shared)).transpose()?,
    })
}

impl Cuda for MatMul {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let g = gemm(self, site, Operand::Output(0), &site.outputs[0], None)?;
        let mut forms = vec![];
        if !self.trans_a && self.trans_b {
            forms.extend(few_rows("few_rows", products(site, None)));
        }
        forms.push(Form::new("gemm", "a dense product of the vendor's library", vec![Call::Gemm(g)]));
        Ok(forms)
    }
}

/// What a map only adds to its product, in the product's own shape: the library does that.
fn addend(op: &MatMulMap, site: &Site) -> Option<Operand> {
    let [MapInst { f: MapFn::Binary(BinaryFn::Add), args }] = &op.body[..] else { return None };
    let own = site.inputs.len() - site.joined.operands();
    let sum = matches!(args[..], [0, 1] | [1, 0]) && op.outs == [2] && op.dtypes == [DType::F32] && own == 3;
    (sum && site.inputs[2].ty == site.outputs[0].ty).then_some(Operand::Input(2))
}

impl Cuda for MatMulMap {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let product = Operand::Workspace(0);
        let shape = &site.outputs[0].ty.shape;
        let ty = Ty::new(DType::F32, shape.iter().cloned());
        // A view of workspace: its buffer is never asked for.
        let view = View { buffer: BufferId(u32::MAX), offset: Dim::int(0), ty, strided: None };
        let g = gemm(&self.product(), site, product, &view, None)?;
        let map = super::map::of_product(&self.map(shape.clone()), &view, product, site)?;
        let form = |name, why: String, first| {
            let calls = std::iter::once(first).chain(map.iter().cloned()).collect();
            Form::new(name, why, calls).with("product", DType::F32, Expr::product(shape))
        };
        let mut forms = vec![];
        if !self.trans_a && self.trans_b {
            let all = products(site, Some(&self.map(shape.clone())));
            forms.extend(
                few_rows("few_rows_map", all).map(|f| Form { why: format!("{}; the map ends them", f.why), ..f }),
            );
        }
        if let Some(plus) = addend(self, site) {
            let g = gemm(&self.product(), site, Operand::Output(0), &site.outputs[0], Some(plus))?;
            let why = "a dense product of the vendor's library, which adds to it";
            forms.push(Form::new("gemm_plus", why, vec![Call::Gemm(g)]));
            return Ok(forms);
        }
        let why = "a dense product of the vendor's library, then one pass over its result";
        forms.push(form("gemm_map", why.into(), Call::Gemm(g)));
        Ok(forms)
    }
}
