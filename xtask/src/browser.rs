//! The browser in which tests open pages: Chromium by Debian's package, where this runs as root and may install it, as in a
//! container.  Elsewhere the tests that need one say so and count as skipped.

use std::process::{Command, Stdio};

/// Names under which tests look for it.
const NAMES: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];

fn runs(program: &str, args: &[&str]) -> bool {
    let quiet = Command::new(program).args(args).stdout(Stdio::null()).stderr(Stdio::null()).status();
    quiet.is_ok_and(|s| s.success())
}

/// Installs it if there is none; why not.
pub fn install() -> Option<String> {
    if NAMES.iter().any(|n| runs(n, &["--version"])) {
        return None;
    }
    let root = Command::new("id").arg("-u").output().is_ok_and(|o| o.stdout == b"0\n");
    if !root || !runs("apt-get", &["--version"]) {
        return Some("there is no Chromium, and only root on Debian can be helped: apt-get install chromium".into());
    }
    println!("installing chromium by apt-get");
    let apt = |args: &[&str]| {
        let o = Command::new("apt-get").args(args).env("DEBIAN_FRONTEND", "noninteractive").output();
        o.map_err(|e| e.to_string()).and_then(|o| match o.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&o.stderr).lines().last().unwrap_or("it failed").to_string()),
        })
    };
    let install = ["install", "-y", "-qq", "--no-install-recommends", "chromium"];
    let done = apt(&["update", "-qq"]).and_then(|()| apt(&install));
    done.err().map(|e| format!("chromium cannot be installed: apt-get: {e}"))
}
