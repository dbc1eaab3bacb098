//! Dense products go to the vendor's library.

use super::{Cuda, Site, Unsupported};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Call, Form, Gemm, GemmOperand, Operand};
use rambac_ir::ops::*;

impl Cuda for MatMul {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let (a, b, c) = (Operand::Input(0), Operand::Input(1), Operand::Output(0));
        let shape = |at| &site.view(at).ty.shape;
        // One matrix for all rows of `a`: the rows are one matrix too.
        let shared = shape(b).len() == 2 && shape(a).len() > 2;
        let rank = shape(c).len();
        let operand = |at: Operand, trans: bool, flat: bool| -> Result<GemmOperand, Unsupported> {
            let axis = shape(at).len() - 1;
            let ld = site.row_stride(at, axis)?;
            let rows = Expr::from(&shape(at)[axis - 1]);
            let step = if flat || axis == 1 { Expr::int(0) } else { rows * ld.clone() };
            Ok(GemmOperand { at, first: Expr::int(0), dtype: site.dtype(at), ld, step, trans })
        };
        let (batch, m) = if shared {
            (Expr::int(1), Expr::product(&shape(c)[..rank - 1]))
        } else {
            (Expr::product(&shape(c)[..rank - 2]), Expr::from(&shape(c)[rank - 2]))
        };
        let inner = shape(a).len() - if self.trans_a { 2 } else { 1 };
        let gemm = Gemm {
            batch,
            m,
            n: Expr::from(&shape(c)[rank - 1]),
            k: Expr::from(&shape(a)[inner]),
            a: operand(a, self.trans_a, shared)?,
            b: operand(b, self.trans_b, false)?,
            c: operand(c, false, shared)?,
            add: false,
        };
        Ok(vec![Form::new("gemm", "a dense product of the vendor's library", vec![Call::Gemm(gemm)])])
    }
}
