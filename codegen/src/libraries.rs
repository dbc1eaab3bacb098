//! Where NVIDIA's libraries may lie.

use std::path::{Path, PathBuf};

/// Files that begin with `name` (`libnvrtc.so.`) and go on with a version, best place first: in the file or folder that the
/// environment's `variable` names, `target/cuda` of the working folder, CUDA installations, Python environments.  The
/// linker's own places are not among them.
pub fn installed(name: &str, variable: &str) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = vec![];
    let mut found: Vec<PathBuf> = vec![];
    if let Some(v) = std::env::var_os(variable) {
        let v = PathBuf::from(v);
        if v.is_file() {
            found.push(v);
        } else {
            // A wheel's folders are as good as the one that holds the library.
            wheels(&v, &mut folders);
            folders.push(v);
        }
    }
    let mut here = std::env::current_dir().ok();
    while let Some(dir) = here {
        if let Ok(all) = std::fs::read_dir(dir.join("target/cuda")) {
            let mut all: Vec<PathBuf> = all.flatten().map(|e| e.path()).collect();
            all.sort();
            all.iter().for_each(|d| wheels(d, &mut folders));
        }
        here = dir.parent().map(Path::to_path_buf);
    }
    for home in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(v) = std::env::var_os(home) {
            folders.push(PathBuf::from(&v).join("lib64"));
            folders.push(PathBuf::from(v).join("lib"));
        }
    }
    if let Ok(all) = std::fs::read_dir("/usr/local") {
        let mut all: Vec<PathBuf> = all.flatten().map(|e| e.path()).collect();
        all.retain(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("cuda")));
        all.sort();
        folders.extend(all.into_iter().rev().map(|p| p.join("lib64")));
    }
    let mut prefixes: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(std::env::var_os).map(PathBuf::from).collect();
    if let Some(path) = std::env::var_os("PATH") {
        for dir in std::env::split_paths(&path) {
            let real = std::fs::canonicalize(dir.join("python3")).ok();
            let prefix = real.as_deref().and_then(Path::parent).and_then(Path::parent);
            prefixes.extend(prefix.map(Path::to_path_buf));
            prefixes.extend(dir.parent().map(Path::to_path_buf));
        }
    }
    prefixes.extend(std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".local")));
    for prefix in prefixes {
        let Ok(all) = std::fs::read_dir(prefix.join("lib")) else { continue };
        for dir in all.flatten().map(|e| e.path()) {
            if dir.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python3")) {
                wheels(&dir.join("site-packages"), &mut folders);
                wheels(&dir.join("dist-packages"), &mut folders);
            }
        }
    }
    for folder in folders {
        let Ok(all) = std::fs::read_dir(&folder) else { continue };
        let mut here: Vec<PathBuf> = all.flatten().map(|e| e.path()).collect();
        // `libnvrtc.so.12`, not its builtins, its variant without optimisations, or links by longer names.
        here.retain(|p| {
            let file = p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            file.strip_prefix(name).is_some_and(|v| v.bytes().all(|b| b.is_ascii_digit()))
        });
        here.sort();
        found.extend(here.into_iter().rev());
    }
    let mut known = std::collections::HashSet::new();
    found.retain(|p| known.insert(std::fs::canonicalize(p).unwrap_or_else(|_| p.clone())));
    found
}

/// Folders of wheels below a `site-packages`: `nvidia/cuda_nvrtc/lib` of CUDA 12, `nvidia/cu13/lib` of 13.
fn wheels(site: &Path, into: &mut Vec<PathBuf>) {
    if let Ok(all) = std::fs::read_dir(site.join("nvidia")) {
        let mut all: Vec<PathBuf> = all.flatten().map(|e| e.path().join("lib")).filter(|p| p.is_dir()).collect();
        all.sort();
        into.extend(all);
    }
}
