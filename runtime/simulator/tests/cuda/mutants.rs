//! Seeded defects: each must be found by a check or by comparison.

use crate::support::{Case, compile, once, schedules};
use rambac_codegen::nvrtc::Nvrtc;
use rayon::prelude::*;
use std::collections::BTreeSet;

struct Mutant {
    file: &'static str,
    name: String,
    source: String,
    /// The kernel that the defect lies in, or all of the file.
    kernels: Vec<&'static Case>,
}

/// `    // MUT name: code` → (name, code).
fn mutation(line: &str) -> Option<(&str, &str)> {
    line.trim_start().strip_prefix("// MUT ")?.split_once(':')
}

fn mutants() -> Vec<Mutant> {
    let mut all = vec![];
    let mut files = BTreeSet::new();
    for case in crate::all() {
        if !files.insert(case.file) {
            continue;
        }
        let lines: Vec<&str> = case.source.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let Some((name, code)) = mutation(line) else { continue };
            let at = (0..i).rev().find(|&k| mutation(lines[k]).is_none()).expect("code above a defect");
            let mut text: Vec<&str> = lines.clone();
            text[at] = code;
            // The last kernel that begins above, unless it is a helper's defect.
            let kernel = lines[..at].iter().rev().find_map(|l| l.split_once("__global__ void ")?.1.split('(').next());
            let kernels: Vec<&Case> = crate::all().filter(|c| c.file == case.file).collect();
            let own: Vec<&Case> = kernels.iter().copied().filter(|c| Some(c.kernel) == kernel).collect();
            let kernels = if own.is_empty() { kernels } else { own };
            all.push(Mutant { file: case.file, name: name.into(), source: text.join("\n"), kernels });
        }
    }
    all
}

struct Verdict {
    line: String,
    caught: bool,
    error: Option<String>,
}

fn judge(m: &Mutant, n: &Nvrtc) -> Verdict {
    let mut kinds: BTreeSet<String> = BTreeSet::new();
    let (mut caught, mut runs) = (0, 0);
    let mut first = String::new();
    let ptx = match compile(n, m.kernels[0], &m.source) {
        Ok(p) => p,
        Err(e) => {
            return Verdict { line: String::new(), caught: false, error: Some(format!("{}/{}: {e}", m.file, m.name)) };
        }
    };
    for o in schedules() {
        runs += 1;
        let mut found = false;
        for case in &m.kernels {
            let (result, findings) = once(case, &ptx, o);
            if let Err(e) = result {
                kinds.insert("comparison".into());
                found = true;
                if first.is_empty() {
                    first = e;
                }
            }
            for f in findings {
                if first.is_empty() || kinds.is_empty() {
                    first = f.message.clone();
                }
                kinds.insert(f.kind.name().into());
                found = true;
            }
        }
        caught += u32::from(found);
    }
    let kinds: Vec<String> = kinds.into_iter().collect();
    let mark = if caught > 0 { "found " } else { "MISSED" };
    let line = format!("    {mark} {caught}/{runs} {:<14} {:<14} {}", m.file, m.name, kinds.join(", "));
    Verdict { line, caught: caught > 0, error: None }
}

pub fn run(n: &Nvrtc) -> Result<String, String> {
    // A defect is only found if the program without it passes.
    for case in crate::all() {
        crate::support::run(case, std::slice::from_ref(n)).map_err(|e| format!("{} fails as it is: {e}", case.name))?;
    }
    let all = mutants();
    let verdicts: Vec<Verdict> = all.par_iter().map(|m| judge(m, n)).collect();
    let errors: Vec<String> = verdicts.iter().filter_map(|v| v.error.clone()).collect();
    if !errors.is_empty() {
        return Err(errors.join("\n"));
    }
    let lines: Vec<&str> = verdicts.iter().map(|v| v.line.as_str()).collect();
    let caught = verdicts.iter().filter(|v| v.caught).count();
    let text = format!("\n{}\n    {caught} of {} seeded defects found", lines.join("\n"), all.len());
    if caught == all.len() { Ok(text) } else { Err(text) }
}
