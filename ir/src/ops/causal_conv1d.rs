//! Depthwise causal convolution over time with the inputs before the first as a state.
//!
//! `y_t = act(bias + Σ_j w_j · x_{t-(k-1)+j})`, where `x` before time 0 comes from `s0`, oldest first.

use super::map::sigmoid;
use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, exactly, float, mismatch, rank, traffic};
use crate::dim::Dim;
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, Ty};

op_struct! {
    /// `causal_conv1d x, w, bias, s0`: `x: [N, L, c]`, `w: [c, 1, k]`, `bias: [c]`, `s0: [N, k-1, c]`
    /// → `y: [N, L, c]` and the last `k-1` inputs `s: [N, k-1, c]`.  `silu`: act is SiLU, else the identity.
    CausalConv1d = "causal_conv1d" { silu: bool = true }
}

op_struct! {
    /// `causal_conv1d_grad x, w, bias, s0, dy, ds` → `dx`, `dw`, `dbias`, `ds0`.
    CausalConv1dGrad = "causal_conv1d_grad" { silu: bool = true }
}

fn check(x: &[&Ty]) -> Result<(), OpError> {
    float(x, 0)?;
    rank(x, 0, 3)?;
    rank(x, 1, 3)?;
    let (dt, n, c) = (x[0].dtype, &x[0].shape[0], &x[0].shape[2]);
    let Some(k) = x[1].shape[2].as_int().filter(|&k| k >= 1) else {
        return Err(mismatch("the kernel's size must be an integer of at least 1"));
    };
    exactly(x, 1, dt, &[c, &Dim::int(1), &Dim::int(k)])?;
    exactly(x, 2, dt, &[c])?;
    exactly(x, 3, dt, &[n, &Dim::int(k - 1), c])
}

struct Conv<'a> {
    n: usize,
    l: usize,
    c: usize,
    k: usize,
    x: &'a [f64],
    s0: &'a [f64],
}

impl<'a> Conv<'a> {
    fn new(x: &[&'a HostArray]) -> Self {
        let s = &x[0].shape;
        Self { n: s[0], l: s[1], c: s[2], k: x[1].shape[2], x: x[0].f(), s0: x[3].f() }
    }
    /// Input of channel `c` at padded time `p` (`p = 0` is the oldest of `s0`).
    fn at(&self, n: usize, p: usize, c: usize) -> f64 {
        match p.checked_sub(self.k - 1) {
            Some(t) => self.x[(n * self.l + t) * self.c + c],
            None => self.s0[(n * (self.k - 1) + p) * self.c + c],
        }
    }
    fn pre(&self, w: &[f64], bias: &[f64], n: usize, t: usize, c: usize) -> f64 {
        bias[c] + (0..self.k).map(|j| w[c * self.k + j] * self.at(n, t + j, c)).sum::<f64>()
    }
}

impl OpDef for CausalConv1d {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 4)?;
        check(x)?;
        Ok(vec![x[0].clone(), x[3].clone()])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: (2.0 * x[1].shape[2] as f64 + 4.0) * y[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let v = Conv::new(x);
        let (mut out, mut s) = (vec![], vec![]);
        for n in 0..v.n {
            for t in 0..v.l {
                out.extend((0..v.c).map(|c| {
                    let p = v.pre(x[1].f(), x[2].f(), n, t, c);
                    if self.silu { p * sigmoid(p) } else { p }
                }));
            }
            for j in 0..v.k - 1 {
                s.extend((0..v.c).map(|c| v.at(n, v.l + j, c)));
            }
        }
        vec![HostArray::from_f64(&y[0], out), HostArray::from_f64(&y[1], s)]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let (dy, ds) = (cx.dy(0), cx.dy(1));
        let x = [cx.x, &[dy, ds]].concat();
        Ok(cx.b.push_all(CausalConv1dGrad { silu: self.silu }, &x)[..4].iter().map(|&v| Some(v)).collect())
    }
}

impl OpDef for CausalConv1dGrad {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 6)?;
        check(x)?;
        exactly(x, 4, x[0].dtype, &x[0].shape.iter().collect::<Vec<_>>())?;
        exactly(x, 5, x[0].dtype, &x[3].shape.iter().collect::<Vec<_>>())?;
        Ok(x[..4].iter().map(|t| (*t).clone()).collect())
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: (6.0 * x[1].shape[2] as f64 + 8.0) * y[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let v = Conv::new(x);
        let (w, bias, dy, ds) = (x[1].f(), x[2].f(), x[4].f(), x[5].f());
        // The gradient at the padded input, then split.
        let rows = v.l + v.k - 1;
        let (mut dp, mut dw, mut db) = (vec![0.0; v.n * rows * v.c], vec![0.0; w.len()], vec![0.0; v.c]);
        for n in 0..v.n {
            for c in 0..v.c {
                for t in 0..v.l {
                    let mut g = dy[(n * v.l + t) * v.c + c];
                    if self.silu {
                        let p = v.pre(w, bias, n, t, c);
                        let s = sigmoid(p);
                        g *= s * (1.0 + p * (1.0 - s));
                    }
                    db[c] += g;
                    for j in 0..v.k {
                        dw[c * v.k + j] += g * v.at(n, t + j, c);
                        dp[(n * rows + t + j) * v.c + c] += g * w[c * v.k + j];
                    }
                }
                for j in 0..v.k - 1 {
                    dp[(n * rows + v.l + j) * v.c + c] += ds[(n * (v.k - 1) + j) * v.c + c];
                }
            }
        }
        let (mut dx, mut ds0) = (vec![], vec![]);
        for d in dp.chunks((rows * v.c).max(1)) {
            ds0.extend_from_slice(&d[..(v.k - 1) * v.c]);
            dx.extend_from_slice(&d[(v.k - 1) * v.c..]);
        }
        [dx, dw, db, ds0].into_iter().zip(y).map(|(d, t)| HostArray::from_f64(t, d)).collect()
    }
}
