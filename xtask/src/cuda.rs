//! The CUDA compilers that tests of generated kernels need: wheels of NVRTC in `target/cuda`, by their names from the
//! package index.  They need no GPU.  Where they can't be had the tests that need them say so and count as skipped.

use std::path::Path;
use std::process::Command;

/// (folder, package)
const WHEELS: &[(&str, &str)] = &[("12.9", "nvidia-cuda-nvrtc-cu12==12.9.86"), ("13", "nvidia-cuda-nvrtc>=13,<14")];

/// Installs what is missing; what could not be installed.
pub fn install() -> Vec<String> {
    let mut failed = vec![];
    for (folder, package) in WHEELS {
        let dir = Path::new("target/cuda").join(folder);
        if dir.join("nvidia").is_dir() {
            continue;
        }
        println!("installing {package} in {}", dir.display());
        let pip = Command::new("python3")
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"])
            .args(["--timeout", "15", "--retries", "1", "--target"])
            .arg(&dir)
            .arg(package)
            .output();
        let trouble = match pip {
            Ok(o) if o.status.success() => continue,
            Ok(o) => {
                let text = String::from_utf8_lossy(&o.stderr).into_owned();
                text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("pip failed").to_string()
            }
            Err(e) => format!("python3 can't be run: {e}"),
        };
        failed.push(format!("{package}: {trouble}"));
    }
    failed
}
