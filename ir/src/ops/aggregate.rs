//! The mix of what each selected chunk gave: `y = Σ_slot w_slot · o_slot`.  Slots are an axis, or given one by one: so
//! gates mix branches.

use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, exactly, float, mismatch, rank, traffic};
use crate::dim::Dim;
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, Ty};

op_struct! {
    /// `aggregate o, w`: `o: [N, L, H, K, d]`, `w: [N, L, h, K]` → `[N, L, H, d]`; head `i` uses weights `i·h/H`.
    /// `aggregate o1, .., oK, w`: every slot `[N, L, H, d]`.
    Aggregate = "aggregate" {}
}

op_struct! {
    /// `aggregate_grad o.., w, dy` → `do..`, `dw`.
    AggregateGrad = "aggregate_grad" {}
}

/// Checks the slots and the weights; what the result is.
fn check(x: &[&Ty]) -> Result<Ty, OpError> {
    if x.len() < 2 {
        return Err(OpError::Arity { expected: "outputs and their weights: at least 2".into(), found: x.len() });
    }
    let w = x.len() - 1;
    float(x, 0)?;
    rank(x, w, 4)?;
    let o = &x[0].shape;
    let y = if w == 1 && x[0].rank() == 5 {
        exactly(x, w, x[0].dtype, &[&o[0], &o[1], &x[w].shape[2], &o[3]])?;
        Ty::new(x[0].dtype, [&o[0], &o[1], &o[2], &o[4]].map(Dim::clone))
    } else if w == 1 {
        rank(x, 0, 5)?;
        x[0].clone()
    } else {
        rank(x, 0, 4)?;
        (1..w).try_for_each(|i| exactly(x, i, x[0].dtype, &o.iter().collect::<Vec<_>>()))?;
        exactly(x, w, x[0].dtype, &[&o[0], &o[1], &x[w].shape[2], &Dim::int(w)])?;
        x[0].clone()
    };
    match (o[2].as_int(), x[w].shape[2].as_int()) {
        (Some(a), Some(b)) if b > 0 && a % b == 0 => Ok(y),
        _ => Err(mismatch(format!("heads {} must be a multiple of the weights' heads {}", o[2], x[w].shape[2]))),
    }
}

/// For every `(row of y, slot)`: calls `f(y row, operand, its row, weight position)`; `slots` are the outputs.
fn each(slots: &[&HostArray], w: &HostArray, mut f: impl FnMut(usize, usize, usize, usize)) {
    let (o, heads, k) = (&slots[0].shape, w.shape[2], w.shape[3]);
    let hq = o[2];
    for row in 0..o[0] * o[1] * hq {
        let at = (row / hq * heads + row % hq * heads / hq) * k;
        (0..k).for_each(|s| match slots.len() {
            1 => f(row, 0, row * k + s, at + s),
            _ => f(row, s, row, at + s),
        });
    }
}

impl OpDef for Aggregate {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        Ok(vec![check(x)?])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        let slots: usize = x[..x.len() - 1].iter().map(ConcreteTy::elements).sum();
        Cost { flops: 2.0 * slots as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let (w, slots) = x.split_last().expect("BUG: inference asked for weights");
        let d = y[0].shape[3];
        let mut out = vec![0.0; y[0].elements()];
        each(slots, w, |row, i, o, w_at| {
            (0..d).for_each(|j| out[row * d + j] += w.f()[w_at] * slots[i].f()[o * d + j])
        });
        vec![HostArray::from_f64(&y[0], out)]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let dy = cx.dy(0);
        let d = cx.b.push_all(AggregateGrad {}, &[cx.x, &[dy]].concat());
        Ok(d[..cx.x.len()].iter().map(|&v| Some(v)).collect())
    }
}

impl OpDef for AggregateGrad {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        let Some((dy, rest)) = x.split_last() else { return arity(x, 3).map(|()| vec![]) };
        let y = check(rest)?;
        if **dy != y {
            exactly(x, x.len() - 1, y.dtype, &y.shape.iter().collect::<Vec<_>>())?;
        }
        Ok(rest.iter().map(|t| (*t).clone()).collect())
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        let slots: usize = x[..x.len() - 2].iter().map(ConcreteTy::elements).sum();
        Cost { flops: 3.0 * slots as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let (slots, w, dy) = (&x[..x.len() - 2], x[x.len() - 2], x[x.len() - 1]);
        let d = dy.shape[3];
        let mut out: Vec<Vec<f64>> = y.iter().map(|t| vec![0.0; t.elements()]).collect();
        each(slots, w, |row, i, o, w_at| {
            for j in 0..d {
                let g = dy.f()[row * d + j];
                out[i][o * d + j] += w.f()[w_at] * g;
                out[slots.len()][w_at] += slots[i].f()[o * d + j] * g;
            }
        });
        out.into_iter().zip(y).map(|(o, t)| HostArray::from_f64(t, o)).collect()
    }
}
