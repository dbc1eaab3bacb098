//! The command with `--device simulator`: stored values and gradients of ops and of whole models, and inference.

use crate::harness::Case;
use crate::rig::Rig;
use std::process::Command;

pub const ALL: &[Case] = &[
    ("check_ops_on_the_simulator", ops),
    ("check_a_model_on_the_simulator", model),
    ("executable_session_on_the_simulator", executable),
];

/// What the command writes; it must succeed.
fn command(args: &[&str]) -> Result<String, String> {
    let out = Command::new(env!("CARGO_BIN_EXE_rambac")).args(args).args(["--threads", "2"]).output();
    let out = out.map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    if out.status.success() {
        return Ok(said);
    }
    Err(format!("{args:?}: {}\n{said}\n{}", out.status, String::from_utf8_lossy(&out.stderr)))
}

/// Writes on from a text: an executable's own programs, and a model's that are compiled now, with little memory.
fn executable(_: &Rig) -> Result<String, String> {
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let file = dir.path().join("tiny.rambac").display().to_string();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/ramba_tiny");
    let text = "The quick brown fox jumps over the lazy dog, again and again and again.";
    command(&["compile", model, "-o", &file, "--target", "cpu,sm_80"])?;
    let of = |device: &[&str]| {
        command(&[&["run", file.as_str(), "--prompt", text, "--tokens", "6", "--segment", "32"], device].concat())
    };
    let (want, got) = (of(&[])?, of(&["--device", "simulator"])?);
    if want != got {
        return Err(format!("the executable wrote {got:?}, on this machine's cores {want:?}"));
    }
    let device = ["--device", "simulator", "--device-memory", "2M"];
    let base = ["generate", model, "--prompt", text, "--tokens", "6", "--segment", "32"];
    let got = command(&[&base[..], &device].concat())?;
    if want != got {
        return Err(format!("with little memory {got:?} was written, {want:?} on this machine's cores"));
    }
    Ok(String::new())
}

fn check(only: &str, fixtures: usize, precision: &str) -> Result<String, String> {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
    let mut c = Command::new(env!("CARGO_BIN_EXE_rambac"));
    c.args(["check", dir, "--device", "simulator", "--only", only, "--precision", precision, "--threads", "2"]);
    let out = c.output();
    let out = out.map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&out.stdout);
    let summary = said.lines().last().unwrap_or_default().to_string();
    let wanted = format!("of {fixtures} fixture");
    if out.status.success() && summary.contains(&wanted) && summary.contains("0 over tolerance") {
        return Ok(format!(": {summary}"));
    }
    Err(format!("{only}: {}\n{said}\n{}", out.status, String::from_utf8_lossy(&out.stderr)))
}

fn ops(_: &Rig) -> Result<String, String> {
    let in_f32 = [check("hsa_", 4, "f32")?, check("scan_", 3, "f32")?, check("causal_conv1d", 1, "f32")?];
    let in_bf16 = [check("hsa_gqa", 1, "bf16")?, check("scan_small", 1, "bf16")?, check("causal_conv1d", 1, "bf16")?];
    Ok([in_f32.concat(), in_bf16.concat()].concat())
}

/// Values, gradients and the update of a whole training step.
fn model(_: &Rig) -> Result<String, String> {
    let said = check("ramba_tiny", 1, "f32")?;
    let tensors = said.trim_start_matches(": ").split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
    // 17 values, 65 gradients, and of each parameter two moments and what was added to it.
    if tensors < 17 + 4 * 65 { Err(format!("no whole training step was compared{said}")) } else { Ok(said) }
}
