//! Attentions over disjoint sets of keys become the attention over their union.
//!
//! Every part is an output with the log-sum-exp of its scaled scores: `y = Σ_i softmax(lse)_i · o_i`, `lse = log Σ exp(lse_i)`.
//! What sees nothing has the log-sum-exp -inf and takes no part; where no part sees anything, the result is 0.

use super::softmax::softmax;
use super::{Cost, Gradients, OpDef, OpError, Vjp, exactly, float, mismatch, rank, traffic};
use crate::dim::Dim;
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, Ty};

op_struct! {
    /// `merge o1, lse1, o2, lse2, ..`: `o: [N, L, H, d]`, `lse: [N, L, h]` → `[N, L, H, d]`, `[N, L, H]`; head `i` uses
    /// the log-sum-exp of head `i·h/H`.
    Merge = "merge" {}
}

op_struct! {
    /// `merge_grad o1, lse1, .., dy, dlse` → `do1`, `dlse1`, ..
    MergeGrad = "merge_grad" {}
}

fn check(x: &[&Ty]) -> Result<(), OpError> {
    if x.len() < 2 || x.len() % 2 == 1 {
        return Err(OpError::Arity { expected: "pairs of an output and its log-sum-exp as".into(), found: x.len() });
    }
    float(x, 0)?;
    rank(x, 0, 4)?;
    let o = &x[0].shape;
    for i in (0..x.len()).step_by(2) {
        exactly(x, i, x[0].dtype, &o.iter().collect::<Vec<_>>())?;
        rank(x, i + 1, 3)?;
        let h = &x[i + 1].shape[2];
        exactly(x, i + 1, x[0].dtype, &[&o[0], &o[1], h])?;
        match (o[2].as_int(), h.as_int()) {
            (Some(a), Some(b)) if b > 0 && a % b == 0 => {}
            _ => return Err(mismatch(format!("heads {} must be a multiple of the log-sum-exp's heads {h}", o[2]))),
        }
    }
    Ok(())
}

/// Of row `(n, t, head)` of the outputs: where each part's log-sum-exp is, the weights and the log-sum-exp of all.
fn weights(x: &[&HostArray], row: usize) -> (Vec<usize>, Vec<f64>, f64) {
    let heads = x[0].shape[2];
    let at: Vec<usize> =
        x.chunks_exact(2).map(|p| row / heads * p[1].shape[2] + row % heads * p[1].shape[2] / heads).collect();
    let z: Vec<f64> = x.chunks_exact(2).zip(&at).map(|(p, &at)| p[1].f()[at]).collect();
    let (w, lse) = softmax(&z);
    (at, w, lse)
}

impl OpDef for Merge {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        check(x)?;
        let o = &x[0].shape;
        Ok(vec![x[0].clone(), Ty::new(x[0].dtype, [&o[0], &o[1], &o[2]].map(Dim::clone))])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: (x.len() * y[0].elements()) as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let d = y[0].shape[3];
        let (mut out, mut all) = (vec![0.0; y[0].elements()], vec![]);
        for row in 0..y[1].elements() {
            let (_, w, lse) = weights(x, row);
            all.push(lse);
            for (part, w) in x.chunks_exact(2).zip(w) {
                (0..d).for_each(|i| out[row * d + i] += w * part[0].f()[row * d + i]);
            }
        }
        vec![HostArray::from_f64(&y[0], out), HostArray::from_f64(&y[1], all)]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let d = [cx.dy(0), cx.dy(1)];
        let n = cx.x.len();
        Ok(cx.b.push_all(MergeGrad {}, &[cx.x, &d].concat())[..n].iter().map(|&v| Some(v)).collect())
    }
}

impl OpDef for MergeGrad {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        let n = x.len().saturating_sub(2);
        check(&x[..n])?;
        let o = &x[0].shape;
        exactly(x, n, x[0].dtype, &o.iter().collect::<Vec<_>>())?;
        exactly(x, n + 1, x[0].dtype, &[&o[0], &o[1], &o[2]])?;
        Ok(x[..n].iter().map(|t| (*t).clone()).collect())
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 2.0 * (x.len() * y[0].elements()) as f64, bytes: traffic(x, y) }
    }
    /// `do_i = w_i dy`, `dlse_i = w_i (dy·o_i - Σ_j w_j dy·o_j + dlse)`.
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let n = x.len() - 2;
        let (parts, dy, dlse, d) = (&x[..n], x[n].f(), x[n + 1].f(), x[0].shape[3]);
        let mut out: Vec<Vec<f64>> = y.iter().map(|t| vec![0.0; t.elements()]).collect();
        for row in 0..x[n + 1].len() {
            let (at, w, _) = weights(parts, row);
            let dy = &dy[row * d..][..d];
            let dots: Vec<f64> = parts
                .chunks_exact(2)
                .map(|p| p[0].f()[row * d..][..d].iter().zip(dy).map(|(o, g)| o * g).sum())
                .collect();
            let mean: f64 = w.iter().zip(&dots).map(|(w, d)| w * d).sum();
            for i in 0..n / 2 {
                (0..d).for_each(|j| out[2 * i][row * d + j] = w[i] * dy[j]);
                out[2 * i + 1][at[i]] += w[i] * (dots[i] - mean + dlse[row]);
            }
        }
        out.into_iter().zip(y).map(|(o, t)| HostArray::from_f64(t, o)).collect()
    }
}
