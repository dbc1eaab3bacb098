//! Weights of the chosen chunks from their scores `s_1..s_n`, in slot order.
//!
//! - `stick_breaking`: `w_i = σ(s_i)·Π_{j<i}(1-σ(s_j)) = exp(s_i - Σ_{j≤i} softplus(s_j))`; `Σ w ≤ 1`.
//! - `softmax` over the filled slots; `sigmoid` per slot; `one`.
//! - `logit`: the scores themselves, for a softmax further on.
//!
//! Unfilled slots weigh exactly 0; as logits they are -inf.

use super::map::{sigmoid, softplus};
use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, exactly, float, rank, traffic};
use crate::dim::Dim;
use crate::host::HostArray;
use crate::ty::{ConcreteTy, DType, Ty};
use crate::{op_struct, word_enum};

word_enum! {
    /// The rule that turns scores into weights.
    Weighting { StickBreaking = "stick_breaking", Softmax = "softmax", Sigmoid = "sigmoid", One = "one", Logit = "logit" }
}

impl Weighting {
    /// What an unfilled slot holds.
    pub fn unfilled(self) -> f64 {
        if self == Weighting::Logit { f64::NEG_INFINITY } else { 0.0 }
    }
    /// Weights of the filled slots.
    pub fn weights(self, s: &[f64]) -> Vec<f64> {
        match self {
            Weighting::StickBreaking => {
                let mut used = 0.0;
                s.iter()
                    .map(|&x| {
                        used += softplus(x);
                        (x - used).exp()
                    })
                    .collect()
            }
            Weighting::Softmax => {
                let top = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let e: Vec<f64> = s.iter().map(|x| (x - top).exp()).collect();
                let sum: f64 = e.iter().sum();
                e.iter().map(|e| e / sum).collect()
            }
            Weighting::Sigmoid => s.iter().map(|&x| sigmoid(x)).collect(),
            Weighting::One => vec![1.0; s.len()],
            Weighting::Logit => s.to_vec(),
        }
    }
    /// `dL/ds` of the filled slots from `dL/dw`.
    pub fn grad(self, s: &[f64], dw: &[f64]) -> Vec<f64> {
        let w = self.weights(s);
        match self {
            // dL/ds_m = w_m g_m - σ(s_m) Σ_{k≥m} w_k g_k
            Weighting::StickBreaking => {
                let mut tail = 0.0;
                let mut ds = vec![0.0; s.len()];
                for m in (0..s.len()).rev() {
                    tail += w[m] * dw[m];
                    ds[m] = w[m] * dw[m] - sigmoid(s[m]) * tail;
                }
                ds
            }
            Weighting::Softmax => {
                let dot: f64 = w.iter().zip(dw).map(|(w, g)| w * g).sum();
                w.iter().zip(dw).map(|(w, g)| w * (g - dot)).collect()
            }
            Weighting::Sigmoid => w.iter().zip(dw).map(|(w, g)| g * w * (1.0 - w)).collect(),
            Weighting::One => vec![0.0; s.len()],
            Weighting::Logit => dw.to_vec(),
        }
    }
}

op_struct! {
    /// `weigh s, indices, count`: `s: [N, L, h, C]`, `indices: i32[N, L, h, K]`, `count: i32[N, L, h]` → `[N, L, h, K]`.
    Weigh = "weigh" { rule: Weighting }
}

op_struct! {
    /// `weigh_grad s, indices, count, dw` → `ds: [N, L, h, C]`.
    WeighGrad = "weigh_grad" { rule: Weighting }
}

fn check(x: &[&Ty]) -> Result<(), OpError> {
    float(x, 0)?;
    rank(x, 0, 4)?;
    rank(x, 1, 4)?;
    let rows = &x[0].shape[..3];
    let slots: Vec<&Dim> = rows.iter().chain([&x[1].shape[3]]).collect();
    exactly(x, 1, DType::I32, &slots)?;
    exactly(x, 2, DType::I32, &rows.iter().collect::<Vec<_>>())
}

/// Scores of the filled slots of `row`.
fn picked(x: &[&HostArray], row: usize) -> Vec<f64> {
    let (c, k) = (x[0].shape[3], x[1].shape[3]);
    let n = x[2].i()[row] as usize;
    x[1].i()[row * k..][..n].iter().map(|&i| x[0].f()[row * c + i as usize]).collect()
}

impl OpDef for Weigh {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 3)?;
        check(x)?;
        Ok(vec![x[1].with_dtype(x[0].dtype)])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        let bytes = (x[1].bytes() + x[2].bytes() + 2 * y[0].bytes()) as f64;
        Cost { flops: 4.0 * y[0].elements() as f64, bytes }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let k = y[0].shape[3];
        let mut out = vec![self.rule.unfilled(); y[0].elements()];
        for row in 0..x[2].len() {
            let w = self.rule.weights(&picked(x, row));
            out[row * k..][..w.len()].copy_from_slice(&w);
        }
        vec![HostArray::from_f64(&y[0], out)]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let dw = cx.dy(0);
        let ds = cx.b.push(WeighGrad { rule: self.rule }, &[cx.x[0], cx.x[1], cx.x[2], dw]);
        Ok(vec![Some(ds), None, None])
    }
}

impl OpDef for WeighGrad {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 4)?;
        check(x)?;
        exactly(x, 3, x[0].dtype, &x[1].shape.iter().collect::<Vec<_>>())?;
        Ok(vec![x[0].clone()])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 8.0 * x[3].elements() as f64, bytes: traffic(&x[1..], y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let (c, k) = (x[0].shape[3], x[1].shape[3]);
        let mut out = vec![0.0; y[0].elements()];
        for row in 0..x[2].len() {
            let s = picked(x, row);
            let ds = self.rule.grad(&s, &x[3].f()[row * k..][..s.len()]);
            for (i, g) in ds.into_iter().enumerate() {
                out[row * c + x[1].i()[row * k + i] as usize] += g;
            }
        }
        vec![HostArray::from_f64(&y[0], out)]
    }
}
