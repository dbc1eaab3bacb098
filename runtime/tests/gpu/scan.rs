//! The selective scan and its gradients in every form.

use crate::harness::Case;
use crate::rig::{Check, Input, Rig, Seen};
use rambac_codegen::cuda::Arch;
use rambac_ir::ops::*;
use rambac_ir::testing::Rng;
use rambac_ir::{Bindings, DType, Dim, Ty};

pub const ALL: &[Case] = &[
    ("scan_one_token", one_token),
    ("scan_one_pass", one_pass),
    ("scan_segments", segments),
    ("scan_large_steps", large_steps),
    ("scan_grad_whole", grad_whole),
    ("scan_grad_segments", grad_segments),
    ("scan_hopper", hopper),
    ("scan_370m", model),
    ("scan_conflicts_in_f32", conflicts),
];

/// Sizes of a scan: heads, head_dim, groups, state.
pub type Sizes = (usize, usize, usize, usize);

/// x, dt, a, b, c, d, h0, then dy and dh.
pub fn inputs(rng: &mut Rng, dtype: DType, (m, p, g, r): Sizes, d: &Bindings, wide: bool) -> Vec<Input> {
    let (n, l, int) = (Dim::sym("N"), Dim::sym("L"), |v| Dim::int(v));
    let ty = |s: &[Dim]| Ty::new(dtype, s.iter().cloned());
    let x = ty(&[n.clone(), l.clone(), int(m), int(p)]);
    let bc = ty(&[n.clone(), l.clone(), int(g), int(r)]);
    let h = ty(&[n.clone(), int(m), int(p), int(r)]);
    let mut one = |t: Ty, low: f64, high: f64| Input::new(rng, t, d, low, high);
    let mut all = vec![
        one(x.clone(), -1.0, 1.0),
        one(ty(&[n, l, int(m)]), 0.001, 0.4),
        one(ty(&[int(m)]), -4.0, -0.1),
        one(bc.clone(), -1.0, 1.0),
        one(bc, -1.0, 1.0),
        one(ty(&[int(m)]), -1.0, 1.0),
        one(h.clone(), -1.0, 1.0),
        one(x, -1.0, 1.0),
        one(h, -1.0, 1.0),
    ];
    if wide {
        [0, 1, 3, 4, 7].into_iter().for_each(|i| all[i].wide = Some(2));
    }
    all
}

pub fn form(seen: &Seen, d: &Bindings) -> &'static str {
    seen.program.steps.last().and_then(|s| s.form(d).ok()).map_or("none", |f| f.name)
}

fn forward(all: &[Input], d: &Bindings, tolerance: f64, sms: usize) -> Check {
    Check::new(SelectiveScan { block: 64 }, all[..7].to_vec(), d, tolerance).sms(sms)
}
fn backward(all: &[Input], d: &Bindings, tolerance: f64, sms: usize) -> Check {
    Check::new(SelectiveScanGrad { block: 64 }, all.to_vec(), d, tolerance).sms(sms)
}

/// A check that must take a certain form.
fn takes(rig: &Rig, c: Check, want: &str) -> Result<Seen, String> {
    let seen = rig.check(&c)?;
    match form(&seen, &c.dims) {
        f if f == want => Ok(seen),
        f => Err(format!("it takes {f}, {want} is wanted\n{}", c.describe())),
    }
}

/// What finds defects of scan.cuh: several blocks and warps, both forms, both kinds of elements.
pub fn quick_forward(rig: &Rig) -> Result<(), String> {
    let mut rng = Rng(8);
    for (dtype, tolerance) in [(DType::F32, 2e-6), (DType::BF16, 8e-3)] {
        let d = Bindings::new([("N", 1), ("L", 70)]);
        let all = inputs(&mut rng, dtype, (2, 16, 1, 16), &d, false);
        takes(rig, forward(&all, &d, tolerance, 1), "selective_scan")?;
    }
    let d = Bindings::new([("N", 1), ("L", 530)]);
    let all = inputs(&mut rng, DType::F32, (1, 16, 1, 16), &d, false);
    takes(rig, forward(&all, &d, 2e-6, 108), "scan_segments")?;
    Ok(())
}

/// As [`quick_forward`], of scan_backward.cuh: stages are used twice.
pub fn quick_grad(rig: &Rig) -> Result<(), String> {
    let d = Bindings::new([("N", 1), ("L", 70)]);
    let all = inputs(&mut Rng(9), DType::F32, (3, 16, 1, 16), &d, false);
    takes(rig, backward(&all, &d, 2e-5, 1), "scan_grad")?;
    Ok(())
}

/// As [`quick_forward`], of scan_hopper.cuh: every stage is used again, both ways of walking.
pub fn quick_hopper(rig: &Rig) -> Result<(), String> {
    let d = Bindings::new([("N", 1), ("L", 300)]);
    let all = inputs(&mut Rng(11), DType::BF16, (2, 64, 1, 64), &d, false);
    takes(rig, forward(&all, &d, 8e-3, 1).on(Arch::Sm90a), "selective_scan")?;
    Ok(())
}

/// As [`quick_forward`], of scan_grad_hopper.cuh: more heads than stages, more blocks than places for states, one that is not whole.
pub fn quick_grad_hopper(rig: &Rig) -> Result<(), String> {
    let d = Bindings::new([("N", 1), ("L", 150)]);
    let mut all = inputs(&mut Rng(13), DType::BF16, (4, 64, 1, 64), &d, false);
    // Slow enough that a block's first state still counts at its end.
    if let rambac_ir::host::Data::Float(a) = &mut all[2].value.data {
        a.fill(-0.0625);
    }
    takes(rig, backward(&all, &d, 1e-2, 1).on(Arch::Sm90a), "scan_grad")?;
    Ok(())
}

/// As [`quick_forward`], of scan_step.cuh.
pub fn quick_step(rig: &Rig) -> Result<(), String> {
    let d = Bindings::new([("N", 2), ("L", 1)]);
    let all = inputs(&mut Rng(10), DType::F32, (4, 16, 2, 48), &d, false);
    takes(rig, forward(&all, &d, 1e-6, 1), "scan_step")?;
    Ok(())
}

fn one_token(rig: &Rig) -> Result<String, String> {
    quick_step(rig)?;
    let mut rng = Rng(1);
    for (dtype, sizes, tolerance) in
        [(DType::BF16, (2, 64, 1, 128), 5e-3), (DType::F16, (3, 16, 1, 16), 6e-4), (DType::F32, (3, 7, 1, 5), 1e-6)]
    {
        let d = Bindings::new([("N", 3), ("L", 1)]);
        takes(rig, forward(&inputs(&mut rng, dtype, sizes, &d, true), &d, tolerance, 1), "scan_step")?;
    }
    Ok(String::new())
}

fn one_pass(rig: &Rig) -> Result<String, String> {
    quick_forward(rig)?;
    let mut rng = Rng(2);
    for (dtype, sizes, n, l, tolerance) in [
        (DType::F32, (4, 32, 2, 48), 2, 100, 2e-6),
        (DType::F32, (4, 32, 2, 48), 1, 32, 2e-6),
        (DType::F32, (4, 32, 2, 48), 1, 0, 2e-6),
        (DType::F32, (4, 32, 2, 48), 2, 7, 2e-6),
        (DType::BF16, (4, 48, 2, 32), 2, 150, 8e-3),
        (DType::BF16, (4, 48, 2, 32), 1, 65, 8e-3),
        (DType::F16, (3, 16, 1, 64), 1, 64, 1e-3),
        // No multiples of 16.
        (DType::F32, (4, 7, 2, 3), 2, 70, 2e-6),
        (DType::BF16, (2, 17, 1, 20), 1, 70, 8e-3),
    ] {
        let d = Bindings::new([("N", n), ("L", l)]);
        let all = inputs(&mut rng, dtype, sizes, &d, true);
        takes(rig, forward(&all, &d, tolerance, 1), "selective_scan")?;
        // One head a block, as for short sequences on a large GPU.
        if l != 1 && l < 40 {
            takes(rig, forward(&all, &d, tolerance, 108), "selective_scan")?;
        }
    }
    Ok(String::new())
}

fn segments(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(3);
    for (dtype, n, l, tolerance) in [(DType::F32, 2, 530, 2e-6), (DType::BF16, 1, 640, 8e-3)] {
        let d = Bindings::new([("N", n), ("L", l)]);
        let all = inputs(&mut rng, dtype, (2, 16, 1, 32), &d, false);
        takes(rig, forward(&all, &d, tolerance, 108), "scan_segments")?;
    }
    Ok(String::new())
}

/// Walks of warpgroups: one and two heads a block, one head in two slices, segments, gradients.
fn hopper(rig: &Rig) -> Result<String, String> {
    quick_hopper(rig)?;
    quick_grad_hopper(rig)?;
    let mut rng = Rng(12);
    for (dtype, sizes, n, l, sms, tolerance, form) in [
        (DType::BF16, (3, 64, 1, 128), 1, 65, 1, 8e-3, "selective_scan"),
        (DType::BF16, (4, 64, 2, 64), 2, 7, 1, 8e-3, "selective_scan"),
        (DType::BF16, (2, 64, 1, 64), 1, 0, 1, 8e-3, "selective_scan"),
        (DType::F16, (2, 128, 2, 64), 1, 130, 1, 1e-3, "selective_scan"),
        (DType::F16, (2, 64, 1, 128), 1, 100, 108, 1e-3, "selective_scan"),
        (DType::BF16, (2, 64, 1, 64), 1, 530, 108, 8e-3, "scan_segments"),
    ] {
        let d = Bindings::new([("N", n), ("L", l)]);
        let all = inputs(&mut rng, dtype, sizes, &d, true);
        takes(rig, forward(&all, &d, tolerance, sms).on(Arch::Sm90a), form)?;
    }
    for (dtype, sizes, n, l, sms, tolerance, form) in [
        (DType::BF16, (3, 64, 1, 128), 1, 130, 1, 1e-2, "scan_grad"),
        (DType::BF16, (2, 64, 1, 64), 2, 0, 1, 1e-2, "scan_grad"),
        (DType::F16, (2, 64, 2, 64), 1, 64, 108, 2e-3, "scan_grad"),
        (DType::BF16, (2, 64, 1, 64), 1, 530, 4, 1e-2, "scan_grad_segments"),
    ] {
        let d = Bindings::new([("N", n), ("L", l)]);
        let all = inputs(&mut rng, dtype, sizes, &d, true);
        takes(rig, backward(&all, &d, tolerance, sms).on(Arch::Sm90a), form)?;
    }
    Ok(String::new())
}

/// A step of 500 forgets everything and costs no accuracy behind it.
fn large_steps(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(4);
    let d = Bindings::new([("N", 1), ("L", 90)]);
    let mut all = inputs(&mut rng, DType::F32, (2, 16, 1, 16), &d, false);
    if let rambac_ir::host::Data::Float(v) = &mut all[1].value.data {
        v[40] = 500.0;
        v[41] = 500.0;
        // The value itself enters y as dt x: keep it from hiding the others.
        if let rambac_ir::host::Data::Float(x) = &mut all[0].value.data {
            x[20 * 2 * 16..21 * 2 * 16].fill(0.0);
        }
    }
    takes(rig, forward(&all, &d, 2e-6, 1), "selective_scan")?;
    Ok(String::new())
}

fn grad_whole(rig: &Rig) -> Result<String, String> {
    quick_grad(rig)?;
    let mut rng = Rng(5);
    for (dtype, sizes, n, l, sms, tolerance) in [
        // All heads of a group by one block of threads; then in parts.
        (DType::F32, (4, 32, 2, 48), 2, 70, 1, 2e-5),
        (DType::F32, (4, 32, 2, 48), 1, 33, 108, 2e-5),
        (DType::F32, (4, 32, 2, 48), 2, 0, 108, 2e-5),
        (DType::BF16, (3, 48, 1, 64), 1, 150, 1, 1e-2),
        (DType::F16, (2, 16, 1, 16), 1, 64, 108, 2e-3),
        (DType::F32, (4, 7, 2, 3), 1, 70, 1, 2e-5),
    ] {
        let d = Bindings::new([("N", n), ("L", l)]);
        let all = inputs(&mut rng, dtype, sizes, &d, true);
        takes(rig, backward(&all, &d, tolerance, sms), "scan_grad")?;
    }
    Ok(String::new())
}

fn grad_segments(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(6);
    for (dtype, sms, tolerance) in [(DType::F32, 108, 2e-5), (DType::BF16, 4, 1e-2)] {
        let d = Bindings::new([("N", 1), ("L", 530)]);
        let all = inputs(&mut rng, dtype, (2, 16, 1, 16), &d, false);
        takes(rig, backward(&all, &d, tolerance, sms), "scan_grad_segments")?;
    }
    Ok(String::new())
}

/// The 370M model's sizes in f32: where accesses to shared memory meet in a bank.
fn conflicts(rig: &Rig) -> Result<String, String> {
    let d = Bindings::new([("N", 1), ("L", 64)]);
    let all = inputs(&mut Rng(11), DType::F32, (2, 64, 1, 128), &d, false);
    let mut text = String::new();
    for c in [forward(&all, &d, 4e-6, 1), backward(&all, &d, 2e-5, 1)] {
        let seen = rig.check(&c)?;
        for c in &seen.counts {
            let part = c.shared_conflicts as f64 / c.shared_passes.max(1) as f64;
            let lines: Vec<String> =
                c.conflicting.iter().map(|h| format!("      {} at {}", h.count.conflicts, h.at)).collect();
            text += &format!("\n    {}: {:.1} % of {}\n{}", c.kernel, 100.0 * part, c.shared_passes, lines.join("\n"));
        }
    }
    Ok(text)
}

/// The 370M model's sizes on both architectures: no spills, conflicts below 2 %, the states of whole sequences on chip.
fn model(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(7);
    let sizes = (2, 64, 1, 128);
    let d = Bindings::new([("N", 1), ("L", 128)]);
    let all = inputs(&mut rng, DType::BF16, sizes, &d, false);
    let mut text = String::new();
    for arch in Arch::ALL {
        for c in [forward(&all, &d, 8e-3, 1), backward(&all, &d, 1e-2, 1)] {
            let seen = rig.check(&c.on(arch))?;
            if seen.counts.is_empty() {
                return Ok(", the device does not count".into());
            }
            let sum = |f: fn(&rambac_simulator::count::Counts) -> u64| seen.counts.iter().map(f).sum::<u64>() as f64;
            let part = sum(|c| c.shared_conflicts) / sum(|c| c.shared_passes);
            if part > 0.02 {
                return Err(format!("{:.1} % of accesses conflict", 100.0 * part));
            }
            let most = seen.code.0.values().flat_map(|c| &c.usage).map(|u| u.registers).max().unwrap_or(0);
            text += &format!(", {} on {arch}: {most} registers, {:.1} % conflicts", form(&seen, &d), 100.0 * part);
        }
    }
    Ok(text)
}
