//! `rambac check --device simulator`: stored values and gradients of ops and of whole models, by the command itself.

use crate::harness::Case;
use crate::rig::Rig;
use std::process::Command;

pub const ALL: &[Case] = &[("check_ops_on_the_simulator", ops), ("check_a_model_on_the_simulator", model)];

fn check(only: &str, fixtures: usize) -> Result<String, String> {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
    let mut c = Command::new(env!("CARGO_BIN_EXE_rambac"));
    let out = c.args(["check", dir, "--device", "simulator", "--only", only, "--threads", "2"]).output();
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
    Ok([check("hsa_", 4)?, check("scan_", 3)?, check("causal_conv1d", 1)?].concat())
}

fn model(_: &Rig) -> Result<String, String> {
    check("ramba_tiny", 1)
}
