//! The templates, compiled into the program.

macro_rules! headers {
    ($($name:literal),* $(,)?) => {
        /// Every header of `codegen/kernels`: (name, text).
        pub const HEADERS: &[(&str, &str)] = &[$((concat!($name, ".cuh"), include_str!(concat!("../../kernels/", $name, ".cuh")))),*];
    };
}

headers! {
    "types", "warp", "mma", "copy", "pages",
    "tile", "chunk_softmax", "attend", "inverted_index", "attend_chunks", "attend_grad", "select", "select_grad",
    "select_scan", "few_rows",
    "attention", "wgmma", "attend_chunks_hopper", "any_size",
    "map", "move", "reduce", "cross_entropy", "embedding",
    "slots", "conv", "rms_norm", "rotary", "scan", "scan_backward", "scan_step",
}

/// The headers that `source` includes, and those that they include, in the order of [`HEADERS`].
pub fn included(source: &str) -> Vec<(&'static str, &'static str)> {
    let mut wanted = vec![false; HEADERS.len()];
    let mut todo = vec![source];
    while let Some(text) = todo.pop() {
        for name in text.lines().filter_map(|l| l.trim().strip_prefix("#include \"")?.strip_suffix('"')) {
            if let Some(i) = HEADERS.iter().position(|h| h.0 == name)
                && !std::mem::replace(&mut wanted[i], true)
            {
                todo.push(HEADERS[i].1);
            }
        }
    }
    HEADERS.iter().zip(wanted).filter(|(_, w)| *w).map(|(h, _)| *h).collect()
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
