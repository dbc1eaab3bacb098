//! Matrix products.

use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, float, mismatch, traffic};
use crate::dim::Dim;
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, Ty};

op_struct! {
    /// `op(a)[.., m, k] · op(b)[.., k, n]`, where `op` transposes the last two axes if `trans_*`.
    ///
    /// Either both have the same leading (batch) dims, or `b` is one matrix that all rows of `a` share
    /// (a linear layer: `matmul x, w {trans_b = true}` with `w: [out, in]`); then `trans_a` is not allowed.
    MatMul = "matmul" { trans_a: bool = false, trans_b: bool = false }
}

struct Dims<'a> {
    batch: &'a [Dim],
    m: &'a Dim,
    n: &'a Dim,
}

impl MatMul {
    fn dims<'a>(&self, a: &'a Ty, b: &'a Ty) -> Result<Dims<'a>, OpError> {
        if a.rank() < 2 || b.rank() < 2 {
            return Err(mismatch(format!("operands must have rank 2 or more: {a}, {b}")));
        }
        let split = |t: &'a Ty, trans: bool| {
            let (batch, mat) = t.shape.split_at(t.rank() - 2);
            if trans { (batch, &mat[1], &mat[0]) } else { (batch, &mat[0], &mat[1]) }
        };
        let (batch, m, k) = split(a, self.trans_a);
        let (batch_b, k2, n) = split(b, self.trans_b);
        let shared = b.rank() == 2 && a.rank() > 2;
        if shared && self.trans_a {
            return Err(mismatch(format!("trans_a needs operands of equal rank: {a}, {b}; reshape first")));
        }
        if !shared && batch != batch_b {
            return Err(mismatch(format!("batch dims {batch:?} vs {batch_b:?}")));
        }
        if k != k2 {
            return Err(mismatch(format!("inner dims {k} vs {k2} ({a}, {b})")));
        }
        Ok(Dims { batch, m, n })
    }
}

impl OpDef for MatMul {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 2)?;
        float(x, 0)?;
        if x[0].dtype != x[1].dtype {
            return Err(mismatch(format!("element types {} vs {}", x[0].dtype, x[1].dtype)));
        }
        let d = self.dims(x[0], x[1])?;
        Ok(vec![Ty::new(x[0].dtype, d.batch.iter().chain([d.m, d.n]).cloned())])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        let k = x[0].shape[x[0].shape.len() - if self.trans_a { 2 } else { 1 }];
        Cost { flops: 2.0 * k as f64 * y[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let (a, b, r) = (x[0].f(), x[1].f(), y[0].shape.len());
        let (m, n) = (y[0].shape[r - 2], y[0].shape[r - 1]);
        let k = x[0].shape[r - if self.trans_a { 2 } else { 1 }];
        let batch: usize = y[0].shape[..r - 2].iter().product();
        let shared = x[1].shape.len() == 2;
        let mut out = vec![0.0; y[0].elements()];
        for g in 0..batch {
            let (a, b) = (&a[g * m * k..], if shared { b } else { &b[g * k * n..] });
            for i in 0..m {
                for p in 0..k {
                    let s = if self.trans_a { a[p * m + i] } else { a[i * k + p] };
                    for j in 0..n {
                        out[(g * m + i) * n + j] += s * if self.trans_b { b[j * k + p] } else { b[p * n + j] };
                    }
                }
            }
        }
        vec![HostArray::from_f64(&y[0], out)]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let dy = cx.dy(0);
        let (a, c) = (cx.x[0], cx.x[1]);
        let b = &mut *cx.b;
        let (a_ty, c_ty) = (b.ty(a).clone(), b.ty(c).clone());
        // Rows of `a` that share `c` are one matrix for `c`'s gradient.
        let (fa, fdy) =
            if c_ty.rank() == 2 && a_ty.rank() > 2 { (b.flatten_rows(a), b.flatten_rows(dy)) } else { (a, dy) };
        let da = match (self.trans_a, self.trans_b) {
            (false, false) => b.matmul(dy, c, false, true),
            (false, true) => b.matmul(dy, c, false, false),
            (true, false) => b.matmul(c, dy, false, true),
            (true, true) => b.matmul(c, dy, true, true),
        };
        let dc = match (self.trans_a, self.trans_b) {
            (false, false) => b.matmul(fa, fdy, true, false),
            (false, true) => b.matmul(fdy, fa, true, false),
            (true, false) => b.matmul(fa, fdy, false, false),
            (true, true) => b.matmul(fdy, fa, true, true),
        };
        Ok(vec![Some(da), Some(dc)])
    }
}
