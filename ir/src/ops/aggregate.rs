//! The mix of what each selected chunk gave: `y = Σ_slot w_slot · o_slot`.

use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, exactly, float, mismatch, rank, traffic};
use crate::dim::Dim;
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, Ty};

op_struct! {
    /// `aggregate o, w`: `o: [N, L, H, K, d]`, `w: [N, L, h, K]` → `[N, L, H, d]`; head `i` uses weights `i·h/H`.
    Aggregate = "aggregate" {}
}

op_struct! {
    /// `aggregate_grad o, w, dy` → `do`, `dw`.
    AggregateGrad = "aggregate_grad" {}
}

fn check(x: &[&Ty]) -> Result<(), OpError> {
    float(x, 0)?;
    rank(x, 0, 5)?;
    rank(x, 1, 4)?;
    let (o, w) = (&x[0].shape, &x[1].shape);
    exactly(x, 1, x[0].dtype, &[&o[0], &o[1], &w[2], &o[3]])?;
    match (o[2].as_int(), w[2].as_int()) {
        (Some(a), Some(b)) if b > 0 && a % b == 0 => Ok(()),
        _ => Err(mismatch(format!("heads {} must be a multiple of the weights' heads {}", o[2], w[2]))),
    }
}

/// For every `(row of y, slot)`: calls `f(y row, o row, weight position)`.
fn each(o: &[usize], heads: usize, mut f: impl FnMut(usize, usize, usize)) {
    let (hq, slots) = (o[2], o[3]);
    for row in 0..o[0] * o[1] * hq {
        let w = (row / hq * heads + row % hq * heads / hq) * slots;
        (0..slots).for_each(|s| f(row, row * slots + s, w + s));
    }
}

impl OpDef for Aggregate {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 2)?;
        check(x)?;
        let o = &x[0].shape;
        Ok(vec![Ty::new(x[0].dtype, [&o[0], &o[1], &o[2], &o[4]].map(Dim::clone))])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 2.0 * x[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let d = x[0].shape[4];
        let mut out = vec![0.0; y[0].elements()];
        each(&x[0].shape, x[1].shape[2], |row, o, w| {
            (0..d).for_each(|i| out[row * d + i] += x[1].f()[w] * x[0].f()[o * d + i])
        });
        vec![HostArray::from_f64(&y[0], out)]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let dy = cx.dy(0);
        let d = cx.b.push_all(AggregateGrad {}, &[cx.x[0], cx.x[1], dy]);
        Ok(vec![Some(d[0]), Some(d[1])])
    }
}

impl OpDef for AggregateGrad {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 3)?;
        check(x)?;
        let o = &x[0].shape;
        exactly(x, 2, x[0].dtype, &[&o[0], &o[1], &o[2], &o[4]])?;
        Ok(vec![x[0].clone(), x[1].clone()])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 3.0 * x[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let d = x[0].shape[4];
        let (mut dout, mut dw) = (vec![0.0; y[0].elements()], vec![0.0; y[1].elements()]);
        each(&x[0].shape, x[1].shape[2], |row, o, w| {
            for i in 0..d {
                let g = x[2].f()[row * d + i];
                dout[o * d + i] = x[1].f()[w] * g;
                dw[w] += x[0].f()[o * d + i] * g;
            }
        });
        vec![HostArray::from_f64(&y[0], dout), HostArray::from_f64(&y[1], dw)]
    }
}
