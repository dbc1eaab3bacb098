//! Mamba layers as decoding runs them: three launches each, which begin before those before them have ended.

use crate::harness::Case;
use crate::rig::{Rig, near, random};
use rambac_codegen::cuda::{Arch, Target, emit};
use rambac_codegen::{Kernels, lower_for};
use rambac_ir::interp::{self, Precision};
use rambac_ir::ops::*;
use rambac_ir::testing::Rng;
use rambac_ir::{Bindings, Builder, Dim, Graph, HostArray, Ty, Value};
use rambac_passes::{Options, optimise};
use rambac_runtime::gpu::Bytes;
use std::collections::HashMap;

pub const ALL: &[Case] = &[("layers_of_one_token", layers)];

const D: usize = 32;
const HEADS: usize = 4;
const P: usize = 16;
const R: usize = 16;
const K: usize = 4;
const E: usize = HEADS * P;
const CONV: usize = E + 2 * R;

/// What is given to a graph, with its type and range.
type Given = Vec<(String, Ty, [f64; 2])>;

/// A layer whose parameters begin with `name`.
fn layer(b: &mut Builder, given: &mut Given, name: &str, x: Value) -> Value {
    let dims = |tail: &[usize]| -> Vec<Dim> {
        [Dim::sym("N"), Dim::sym("L")].into_iter().chain(tail.iter().map(|&d| Dim::int(d))).collect()
    };
    let mut param = |b: &mut Builder, what: &str, shape: &[usize], range: [f64; 2]| {
        let (name, ty) = (format!("{name}.{what}"), Ty::f32(shape.to_vec()));
        given.push((name.clone(), ty.clone(), range));
        b.param(&name, ty)
    };
    let w = param(b, "norm", &[D], [0.5, 1.5]);
    let u = b.rms_norm(x, w, 1e-2);
    let w = param(b, "in", &[E + CONV + HEADS, D], [-0.5, 0.5]);
    let all = b.linear(u, w);
    let (z, xbc) = (b.slice(all, 2, 0, E), b.slice(all, 2, E, E + CONV));
    let dt = b.slice(all, 2, E + CONV, E + CONV + HEADS);
    let (w, bias) = (param(b, "conv", &[CONV, 1, K], [-1.0, 1.0]), param(b, "bias", &[CONV], [-1.0, 1.0]));
    let (dt_bias, a_log) = (param(b, "dt_bias", &[HEADS], [-1.0, 1.0]), param(b, "a_log", &[HEADS], [-1.0, 1.0]));
    let (skip, gain) = (param(b, "d", &[HEADS], [-1.0, 1.0]), param(b, "gain", &[E], [0.5, 1.5]));
    let out = param(b, "out", &[D, E], [-0.5, 0.5]);
    let mut state = |b: &mut Builder, what: &str, shape: Vec<Dim>| {
        let (name, ty) = (format!("{name}.{what}"), Ty::f32(shape));
        given.push((name.clone(), ty.clone(), [-1.0, 1.0]));
        b.input(&name, ty)
    };
    let n = Dim::sym("N");
    let s0 = state(b, "conv_state", vec![n.clone(), Dim::int(K - 1), Dim::int(CONV)]);
    let h0 = state(b, "state", vec![n, Dim::int(HEADS), Dim::int(P), Dim::int(R)]);
    let conv = b.push_all(CausalConv1d { silu: true }, &[xbc, w, bias, s0]);
    let part = |b: &mut Builder, from: usize, to: usize, shape: &[usize]| {
        let x = b.slice(conv[0], 2, from, to);
        b.reshape(x, dims(shape))
    };
    let (xs, bs, cs) = (part(b, 0, E, &[HEADS, P]), part(b, E, E + R, &[1, R]), part(b, E + R, E + 2 * R, &[1, R]));
    let dt = b.add(dt, dt_bias);
    let dt = b.softplus(dt);
    let a = b.exp(a_log);
    let a = b.neg(a);
    let scan = b.push_all(SelectiveScan { block: 64 }, &[xs, dt, a, bs, cs, skip, h0]);
    b.output(&format!("{name}.conv_end"), conv[1]);
    b.output(&format!("{name}.end"), scan[1]);
    let y = b.reshape(scan[0], dims(&[E]));
    let gate = b.silu(z);
    let y = b.mul(y, gate);
    let y = b.rms_norm(y, gain, 1e-2);
    let y = b.linear(y, out);
    b.add(x, y)
}

fn stack() -> (Graph, Given) {
    let mut b = Builder::new("layers", &["N", "L"]);
    let ty = Ty::f32([Dim::sym("N"), Dim::sym("L"), Dim::int(D)]);
    let mut given = vec![("x".to_string(), ty.clone(), [-1.0, 1.0])];
    let mut x = b.input("x", ty);
    for name in ["a", "b"] {
        x = layer(&mut b, &mut given, name, x);
    }
    b.output("y", x);
    (b.finish().expect("the layers fit"), given)
}

/// Runs two layers, and says how many launches and products that took.
fn check(rig: &Rig, [n, l]: [usize; 2], half: bool, arch: Arch) -> Result<usize, String> {
    let dims = Bindings::new([("N", n), ("L", l)]);
    let precision = if half { rambac_passes::Precision::Bf16 } else { rambac_passes::Precision::F32 };
    let (graph, types) = stack();
    let graph = optimise(&graph, &Options { bf16_weights: half, precision, ..Options::default() });
    let mut rng = Rng(41);
    let mut given: HashMap<String, HostArray> = HashMap::new();
    for (name, ty, [low, high]) in &types {
        let wanted = graph.source(name).map_or(ty, |(_, s)| &s.ty);
        given.insert(name.clone(), random(&mut rng, wanted, &dims, *low, *high));
    }
    let want = interp::outputs(&graph, &dims, &given, Precision::Exact).map_err(|e| e.to_string())?;
    let program = emit(lower_for(&graph, Kernels::Gpu), Target::of(arch)).map_err(|e| e.to_string())?;
    let calls = program.forms(&dims).map_err(|e| e.to_string())?.iter().map(|f| f.calls.len()).sum();
    let bytes = |kind: SourceKind| -> Vec<(String, Bytes)> {
        let of = graph.sources().filter(|(_, s)| s.kind == kind);
        of.map(|(_, s)| (s.name.clone(), Bytes::from_host(&given[&s.name]))).collect()
    };
    let (_, _, got, _) = rig.run(program, &dims, &bytes(SourceKind::Param), &bytes(SourceKind::Input))?;
    let tolerance = if half { 2e-2 } else { 1e-5 };
    near(&want, &got, tolerance).map_err(|e| format!("{e}, {n}x{l}"))?;
    Ok(calls)
}

/// What finds defects of the templates.
pub fn quick(rig: &Rig) -> Result<(), String> {
    check(rig, [2, 1], false, Arch::Sm90a).map(drop)
}

fn layers(rig: &Rig) -> Result<String, String> {
    for arch in Arch::ALL {
        for (size, half) in [([1, 1], true), ([1, 1], false), ([3, 1], true)] {
            let calls = check(rig, size, half, arch)?;
            if calls != 6 {
                return Err(format!("{size:?} on {arch}: two layers take {calls} launches, 3 each wanted"));
            }
        }
        // Several tokens: the convolution and the scan run by themselves.  Many rows: products are the library's.
        for size in [[2, 3], [9, 1], [1, 70], [1, 0]] {
            check(rig, size, false, arch)?;
        }
    }
    Ok(String::new())
}
