//! RMS norm, its gradient, and the rotary embedding.

use crate::harness::Case;
use crate::rig::{Check, Input, Rig};
use rambac_ir::ops::*;
use rambac_ir::testing::Rng;
use rambac_ir::{Bindings, DType, Dim, HostArray, Ty};

pub const ALL: &[Case] = &[("rms_norm", rms_norm), ("rotary", rotary)];

/// x, w, dy.
pub fn inputs(rng: &mut Rng, dtype: DType, width: usize, d: &Bindings, wide: bool) -> Vec<Input> {
    let rows = Ty::new(dtype, [Dim::sym("N"), Dim::sym("L"), Dim::int(width)]);
    let w = Ty::new(dtype, [Dim::int(width)]);
    let mut all: Vec<Input> = [rows.clone(), w, rows].map(|t| Input::new(rng, t, d, -2.0, 2.0)).to_vec();
    if wide {
        all[0].wide = Some(2);
        all[2].wide = Some(2);
    }
    all
}

/// Rows of part of a warp, a warp, a block; more rows than blocks; none.
fn rms_norm(rig: &Rig) -> Result<String, String> {
    quick(rig)?;
    let mut rng = Rng(1);
    let f32s = [(33, 5, 108), (64, 37, 1), (1000, 6, 108), (2304, 5, 1), (128, 0, 108)];
    let narrow = [(DType::BF16, 1024, 9, 4e-3), (DType::F16, 2048, 3, 5e-4), (DType::BF16, 64, 20, 4e-3)];
    let all = f32s.into_iter().map(|(w, l, sms)| (DType::F32, w, l, 1e-6, sms));
    for (dtype, width, l, tolerance, sms) in all.chain(narrow.into_iter().map(|(t, w, l, e)| (t, w, l, e, 1))) {
        let d = Bindings::new([("N", 2), ("L", l)]);
        for wide in [false, true] {
            let all = inputs(&mut rng, dtype, width, &d, wide);
            rig.check(&Check::new(RmsNorm { eps: 1e-5 }, all[..2].to_vec(), &d, tolerance).sms(sms))?;
            fused(rig, 1e-5, &all, &d, 2.0 * tolerance, sms)?;
            rig.check(&Check::new(RmsNormGrad { eps: 1e-5 }, all.clone(), &d, tolerance).sms(sms))?;
            if dtype == DType::F32 {
                rig.check(&Check::new(RmsNormGrad { eps: 1e-5 }, all, &d, tolerance).sms(sms).with_copies())?;
            }
        }
    }
    Ok(String::new())
}

/// The gated norm of x with the gate z = dy of the others, its gradient, and the norm's gradient on top of a base.
fn fused(rig: &Rig, eps: f64, all: &[Input], d: &Bindings, tolerance: f64, sms: usize) -> Result<(), String> {
    let [x, w, dy] = [0, 1, 2].map(|i| all[i].clone());
    let z = Input { value: x.value.clone(), ..dy.clone() };
    let run = |c: Check| rig.check(&c.sms(sms)).map(|_| ());
    let gated = vec![x.clone(), z.clone(), w.clone()];
    run(Check::new(GatedRmsNorm { eps }, gated.clone(), d, tolerance))?;
    run(Check::new(GatedRmsNormGrad { eps }, [gated, vec![dy.clone()]].concat(), d, tolerance))?;
    let on_top = Check::new(RmsNormGrad { eps }, vec![x, w, dy, z], d, tolerance);
    if all[0].ty.dtype == DType::F32 {
        run(on_top.clone().with_copies())?;
    }
    run(on_top)
}

/// What finds defects of the templates.
pub fn quick(rig: &Rig) -> Result<(), String> {
    let mut rng = Rng(3);
    let d = Bindings::new([("N", 1), ("L", 37)]);
    let all = inputs(&mut rng, DType::F32, 128, &d, true);
    rig.check(&Check::new(RmsNorm { eps: 0.5 }, all[..2].to_vec(), &d, 1e-6).sms(1))?;
    fused(rig, 0.5, &all, &d, 2e-6, 1)?;
    rig.check(&Check::new(RmsNormGrad { eps: 0.5 }, all, &d, 1e-6).sms(1))?;
    Ok(())
}

/// As [`quick`], of the rotary embedding: positions at which a float's angle is not enough.
pub fn quick_rotary(rig: &Rig) -> Result<(), String> {
    let d = Bindings::new([("N", 1), ("L", 2000)]);
    let ty = Ty::new(DType::F32, [Dim::sym("N"), Dim::sym("L"), Dim::int(1), Dim::int(8)]);
    let x = Input::new(&mut Rng(4), ty, &d, -1.0, 1.0).wide(2);
    rig.check(&Check::new(Rotary { base: 10000.0, inverse: false }, vec![x], &d, 1e-6))?;
    started(rig, &mut Rng(5), DType::F32, [2, 3, 1, 8], 1e-6)
}

/// Sequences that go on at different places; sizes are tokens, sequences, heads, width.
fn started(rig: &Rig, rng: &mut Rng, dtype: DType, sizes: [usize; 4], tolerance: f64) -> Result<(), String> {
    let [l, n, heads, width] = sizes;
    let d = Bindings::new([("N", n), ("L", l)]);
    let ty = Ty::new(dtype, [Dim::sym("N"), Dim::sym("L"), Dim::int(heads), Dim::int(width)]);
    let start = HostArray::i32(&[n], (0..n as i32).map(|i| 5000 * i + i % 2).collect());
    let start = Input::of(Ty::i32([Dim::sym("N")]), start);
    for inverse in [false, true] {
        let x = Input::new(rng, ty.clone(), &d, -1.0, 1.0).wide(2);
        rig.check(&Check::new(Rotary { base: 10000.0, inverse }, vec![x, start.clone()], &d, tolerance))?;
    }
    Ok(())
}

fn rotary(rig: &Rig) -> Result<String, String> {
    quick_rotary(rig)?;
    let mut rng = Rng(2);
    for (dtype, heads, width, l, tolerance) in [
        (DType::F32, 3, 16, 33, 1e-6),
        (DType::F32, 1, 6, 9, 1e-6),
        (DType::BF16, 4, 64, 70, 4e-3),
        (DType::F16, 2, 32, 5, 5e-4),
    ] {
        let d = Bindings::new([("N", 2), ("L", l)]);
        let ty = Ty::new(dtype, [Dim::sym("N"), Dim::sym("L"), Dim::int(heads), Dim::int(width)]);
        for inverse in [false, true] {
            let x = Input::new(&mut rng, ty.clone(), &d, -1.0, 1.0).wide(2);
            rig.check(&Check::new(Rotary { base: 10000.0, inverse }, vec![x], &d, tolerance))?;
        }
        started(rig, &mut rng, dtype, [l, 3, heads, width], tolerance)?;
        started(rig, &mut rng, dtype, [1, 2, heads, width], tolerance)?;
    }
    Ok(String::new())
}
