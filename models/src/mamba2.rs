//! The Mamba-2 block as IR (spec: `x + mixer(RMSNorm(x))`), with its conv and scan states as values.

use crate::config::{Config, ModelType};
use rambac_ir::ops::{CausalConv1d, SelectiveScan};
use rambac_ir::{Builder, Dim, Ty, Value};

/// What a block carries from one segment of a sequence to the next.
#[derive(Clone, Copy, Debug)]
pub struct MambaState {
    /// The last `k - 1` inputs of the convolution, `[N, k-1, E + 2gR]`.
    pub conv: Value,
    /// The scan's state, `[N, M, P, R]`.
    pub scan: Value,
}

/// Types of a block's `(conv, scan)` state for a batch of `n`.
pub fn state_types(c: &Config, n: &Dim) -> (Ty, Ty) {
    let d = |x: usize| Dim::int(x);
    (
        Ty::f32([n.clone(), d(c.conv_kernel - 1), d(c.conv_dim())]),
        Ty::f32([n.clone(), d(c.n_ssm_heads()), d(c.head_dim), d(c.state_size)]),
    )
}

/// Adds one block on `x: [N, L, D]` with the parameters `p…`; returns its output and final state.
pub fn block(b: &mut Builder, c: &Config, p: &str, x: Value, state: MambaState) -> (Value, MambaState) {
    let (n, l) = (b.ty(x).shape[0].clone(), b.ty(x).shape[1].clone());
    let (e, m, gr) = (c.d_inner(), c.n_ssm_heads(), c.n_groups * c.state_size);
    let param = |b: &mut Builder, name: &str, shape: &[usize]| b.param(&format!("{p}{name}"), Ty::f32(shape.to_vec()));
    let dims = |tail: &[usize]| -> Vec<Dim> {
        [n.clone(), l.clone()].into_iter().chain(tail.iter().map(|&t| Dim::int(t))).collect()
    };

    let w = param(b, "norm.weight", &[c.hidden_size]);
    let u = b.rms_norm(x, w, c.layer_norm_epsilon);
    let w = param(b, "mixer.in_proj.weight", &[c.in_proj_dim(), c.hidden_size]);
    let zxbcdt = b.linear(u, w);
    let z = b.slice(zxbcdt, 2, 0, e);
    let xbc = b.slice(zxbcdt, 2, e, e + c.conv_dim());
    let dt = b.slice(zxbcdt, 2, e + c.conv_dim(), c.in_proj_dim());

    let w = param(b, "mixer.conv1d.weight", &[c.conv_dim(), 1, c.conv_kernel]);
    let bias = param(b, "mixer.conv1d.bias", &[c.conv_dim()]);
    let conv = b.push_all(CausalConv1d { silu: true }, &[xbc, w, bias, state.conv]);
    let xs = b.slice(conv[0], 2, 0, e);
    let xs = b.reshape(xs, dims(&[m, c.head_dim]));
    let bs = b.slice(conv[0], 2, e, e + gr);
    let bs = b.reshape(bs, dims(&[c.n_groups, c.state_size]));
    let cs = b.slice(conv[0], 2, e + gr, e + 2 * gr);
    let cs = b.reshape(cs, dims(&[c.n_groups, c.state_size]));

    let dt_bias = param(b, "mixer.dt_bias", &[m]);
    let dt = b.add(dt, dt_bias);
    let mut dt = b.softplus(dt);
    let (low, high) = c.time_step_limit;
    if low > 0.0 {
        let low = b.scalar_like(low, dt);
        dt = b.max(dt, low);
    }
    if high.is_finite() {
        let high = b.scalar_like(high, dt);
        dt = b.min(dt, high);
    }
    let a_log = param(b, "mixer.A_log", &[m]);
    let a = b.exp(a_log);
    let a = b.neg(a);
    let d = param(b, "mixer.D", &[m]);
    let scan = SelectiveScan { block: c.mamba_chunk_size };
    let scan = b.push_all(scan, &[xs, dt, a, bs, cs, d, state.scan]);

    let y = b.reshape(scan[0], dims(&[e]));
    let gate = b.silu(z);
    let y = b.mul(y, gate);
    let w = param(b, "mixer.norm.weight", &[e]);
    let y = if c.model_type == ModelType::Mamba2 && c.n_groups > 1 {
        // transformers' Mamba-2 normalises each group by itself; RAMba normalises over E.
        let ones = b.constant(1.0, Ty::f32([e / c.n_groups]));
        let y = b.reshape(y, dims(&[c.n_groups, e / c.n_groups]));
        let y = b.rms_norm(y, ones, c.layer_norm_epsilon);
        let y = b.reshape(y, dims(&[e]));
        b.mul(y, w)
    } else {
        b.rms_norm(y, w, c.layer_norm_epsilon)
    };
    let w = param(b, "mixer.out_proj.weight", &[c.hidden_size, e]);
    let y = b.linear(y, w);
    (b.add(x, y), MambaState { conv: conv[1], scan: scan[1] })
}
