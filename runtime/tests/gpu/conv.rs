//! The causal convolution and its gradient.

use crate::harness::Case;
use crate::rig::{Check, Input, Rig};
use rambac_ir::ops::*;
use rambac_ir::testing::Rng;
use rambac_ir::{Bindings, DType, Dim, Ty};

pub const ALL: &[Case] = &[
    ("conv_shapes", shapes),
    ("conv_types", types),
    ("conv_one_token", one_token),
    ("conv_random", random),
    ("conv_traffic", traffic),
];

/// Operands of the convolution, then dy and ds.
pub fn inputs(rng: &mut Rng, dtype: DType, c: usize, k: usize, d: &Bindings, wide: bool) -> Vec<Input> {
    let ty = |s: &[Dim]| Ty::new(dtype, s.iter().cloned());
    let (n, l, int) = (Dim::sym("N"), Dim::sym("L"), |v| Dim::int(v));
    let rows = ty(&[n.clone(), l, int(c)]);
    let state = ty(&[n, int(k - 1), int(c)]);
    let shapes = [rows.clone(), ty(&[int(c), int(1), int(k)]), ty(&[int(c)]), state.clone(), rows, state];
    let mut all: Vec<Input> = shapes.into_iter().map(|t| Input::new(rng, t, d, -1.0, 1.0)).collect();
    if wide {
        all[0].wide = Some(2);
        all[4].wide = Some(2);
    }
    all
}

fn both(rig: &Rig, silu: bool, all: &[Input], d: &Bindings, tolerance: f64, sms: usize) -> Result<(), String> {
    rig.check(&Check::new(CausalConv1d { silu }, all[..4].to_vec(), d, tolerance).sms(sms))?;
    rig.check(&Check::new(CausalConv1dGrad { silu }, all.to_vec(), d, tolerance).sms(sms))?;
    Ok(())
}

/// Channels that are no multiple of a vector, kernels of 1 to 5, sequences shorter than the kernel, walks long and short.
fn shapes(rig: &Rig) -> Result<String, String> {
    quick(rig)?;
    let mut rng = Rng(1);
    for (c, k, wide) in [(24, 4, true), (7, 3, false), (6, 1, false), (16, 5, true)] {
        for (n, l, sms) in [(2, 37, 108), (1, 2, 108), (2, 100, 0), (3, 0, 108), (0, 5, 108)] {
            let d = Bindings::new([("N", n), ("L", l)]);
            both(rig, k != 3, &inputs(&mut rng, DType::F32, c, k, &d, wide), &d, 1e-6, sms)?;
        }
    }
    Ok(String::new())
}

fn types(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(2);
    for (dtype, tolerance) in [(DType::BF16, 4e-3), (DType::F16, 5e-4)] {
        let d = Bindings::new([("N", 2), ("L", 70)]);
        both(rig, true, &inputs(&mut rng, dtype, 80, 4, &d, true), &d, tolerance, 0)?;
    }
    Ok(String::new())
}

fn one_token(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(3);
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::BF16, 4e-3)] {
        let d = Bindings::new([("N", 3), ("L", 1)]);
        let all = inputs(&mut rng, dtype, 40, 4, &d, true);
        let seen = rig.check(&Check::new(CausalConv1d { silu: true }, all[..4].to_vec(), &d, tolerance))?;
        let form = seen.program.steps.last().and_then(|s| s.form(&d).ok()).map(|f| f.name);
        if form != Some("causal_conv_step") {
            return Err(format!("one token takes {form:?}"));
        }
    }
    Ok(String::new())
}

/// What finds defects of the templates: several threads in time, more slots than lanes that add them, one token.
pub fn quick(rig: &Rig) -> Result<(), String> {
    let mut rng = Rng(6);
    let d = Bindings::new([("N", 33), ("L", 37)]);
    both(rig, true, &inputs(&mut rng, DType::F32, 24, 4, &d, true), &d, 1e-6, 108)?;
    let d = Bindings::new([("N", 2), ("L", 1)]);
    both(rig, true, &inputs(&mut rng, DType::F32, 24, 4, &d, true), &d, 1e-6, 108)
}

/// Lengths around the walks' ends.
fn random(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(4);
    for _ in 0..12 {
        let (n, l) = (1 + rng.below(3), rng.below(200));
        let d = Bindings::new([("N", n), ("L", l)]);
        let all = inputs(&mut rng, DType::F32, 24, 4, &d, true);
        both(rig, true, &all, &d, 1e-6, if rng.below(2) == 0 { 0 } else { 108 })?;
    }
    Ok(String::new())
}

/// At the 370M model's width: one pass over memory, no conflicts of banks.
fn traffic(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(5);
    let (c, l) = (2304, 128);
    let d = Bindings::new([("N", 1), ("L", l)]);
    let all = inputs(&mut rng, DType::BF16, c, 4, &d, true);
    let seen = [
        rig.check(&Check::new(CausalConv1d { silu: true }, all[..4].to_vec(), &d, 4e-3).sms(0))?,
        rig.check(&Check::new(CausalConv1dGrad { silu: true }, all, &d, 4e-3).sms(0))?,
    ];
    if seen.iter().all(|s| s.counts.is_empty()) {
        return Ok(", the device does not count".into());
    }
    let mut text = String::new();
    for (seen, arrays) in seen.iter().zip([2, 3]) {
        let moved: u64 =
            seen.counts.iter().flat_map(|c| &c.buffers).map(|(_, t)| 32 * (t.read_sectors + t.write_sectors)).sum();
        let part = moved as f64 / (arrays * c * l * 2) as f64;
        let conflicts: u64 = seen.counts.iter().map(|c| c.shared_conflicts).sum();
        if part > 1.5 || conflicts > 0 {
            return Err(format!("{part:.2} of the minimum moved, {conflicts} conflicts"));
        }
        text += &format!(", {part:.2} of the minimum moved");
    }
    Ok(text)
}
