//! The templates, compiled into the program.

use crate::hash::{Parts, sha256};
use std::sync::OnceLock;

macro_rules! headers {
    ($($name:literal),* $(,)?) => {
        /// Every header of `codegen/kernels`: (name, text).
        pub const HEADERS: &[(&str, &str)] = &[$((concat!($name, ".cuh"), include_str!(concat!("../../kernels/", $name, ".cuh")))),*];
    };
}

headers! {
    "types", "warp", "earlier", "mma", "copy", "pages",
    "tile", "chunk_softmax", "attend", "inverted_index", "attend_chunks", "attend_grad", "select", "select_grad",
    "select_scan", "few_rows", "score", "choose", "mix",
    "attention", "wgmma", "bulk", "tensor_map", "attend_chunks_hopper", "attend_tile_hopper", "any_size",
    "map", "map_each", "move", "reduce", "cross_entropy", "embedding",
    "slots", "conv", "rms_norm", "rotary", "scan", "scan_backward", "scan_hopper", "scan_grad_hopper",
    "scan_step",
}

/// What is known of a header once it was looked at.
struct Known {
    sha256: String,
    /// Places of the headers that it includes, in one step.
    includes: Vec<usize>,
}

fn known() -> &'static [Known] {
    static KNOWN: OnceLock<Vec<Known>> = OnceLock::new();
    let one = |h: &(&str, &str)| Known { sha256: sha256(h.1.as_bytes()), includes: includes(h.1) };
    KNOWN.get_or_init(|| HEADERS.iter().map(one).collect())
}

fn includes(text: &str) -> Vec<usize> {
    let names = text.lines().filter_map(|l| l.trim().strip_prefix("#include \"")?.strip_suffix('"'));
    names.filter_map(|name| HEADERS.iter().position(|h| h.0 == name)).collect()
}

/// Places of the headers that `source` includes, and of those that they include, in order.
fn needed(source: &str) -> impl Iterator<Item = usize> {
    let mut wanted = vec![false; HEADERS.len()];
    let mut todo = includes(source);
    while let Some(i) = todo.pop() {
        if !std::mem::replace(&mut wanted[i], true) {
            todo.extend(&known()[i].includes);
        }
    }
    (0..HEADERS.len()).filter(move |&i| wanted[i])
}

/// The headers that `source` includes, and those that they include, in the order of [`HEADERS`].
pub fn included(source: &str) -> Vec<(&'static str, &'static str)> {
    needed(source).map(|i| HEADERS[i]).collect()
}

/// A hash of all of them.
pub fn hash(source: &str) -> String {
    let mut all = Parts::default();
    needed(source).for_each(|i| {
        all.add(HEADERS[i].0.as_bytes()).add(known()[i].sha256.as_bytes());
    });
    all.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_header_is_listed_and_known() {
        let mut files: Vec<String> = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        let mut listed: Vec<String> = HEADERS.iter().map(|h| h.0.to_string()).collect();
        listed.sort();
        assert_eq!(files, listed);
        for (name, text) in HEADERS {
            for line in text.lines().filter(|l| l.starts_with("#include")) {
                let known = HEADERS.iter().any(|h| line == format!("#include \"{}\"", h.0));
                assert!(known, "{name}: {line}");
            }
        }
    }

    #[test]
    fn includes_are_followed() {
        let names: Vec<&str> = included("#include \"copy.cuh\"\n").iter().map(|h| h.0).collect();
        assert_eq!(names, ["types.cuh", "mma.cuh", "copy.cuh"]);
    }
}
