//! Named ranges for NVIDIA's tools (NVTX), where their library is installed: Nsight Systems shows them over kernels.
//!
//! Opt-in by an environment variable, for a range costs a call; without the library nothing happens.

use libloading::Library;
use std::ffi::{CString, c_char, c_int};

/// Asks for ranges.
pub const RANGES: &str = "RAMBAC_NVTX";

/// CUDA 13's, then that of older ones.
const NAMES: [&str; 4] = ["libnvtx3interop.so.1", "libnvtx3interop.so", "libnvToolsExt.so.1", "libnvToolsExt.so"];

pub(crate) struct Ranges {
    push: unsafe extern "C" fn(*const c_char) -> c_int,
    pop: unsafe extern "C" fn() -> c_int,
    /// The functions are its.
    _library: Library,
}

impl Ranges {
    /// `None` where nobody asked, or the library is not here.
    pub fn wanted() -> Option<Ranges> {
        std::env::var_os(RANGES).filter(|v| !v.is_empty() && v != "0")?;
        NAMES.iter().find_map(|name| Ranges::open(name))
    }

    fn open(name: &str) -> Option<Ranges> {
        // SAFETY: NVIDIA's library, whose initialisers do nothing to us; the functions are declared as its header has them, and
        // live as long as the library, which is kept.
        unsafe {
            let library = Library::new(name).ok()?;
            let push = *library.get::<unsafe extern "C" fn(*const c_char) -> c_int>(b"nvtxRangePushA\0").ok()?;
            let pop = *library.get::<unsafe extern "C" fn() -> c_int>(b"nvtxRangePop\0").ok()?;
            Some(Ranges { push, pop, _library: library })
        }
    }

    pub fn begin(&self, name: &str) {
        // Every begin has its end, so that a name with a zero byte begins one, too.
        let name = CString::new(name.replace('\0', " ")).unwrap_or_default();
        // SAFETY: a string that lives during the call.
        unsafe { (self.push)(name.as_ptr()) };
    }

    pub fn end(&self) {
        // SAFETY: no arguments.
        unsafe { (self.pop)() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Ranges of a library that writes down what it is told: names in order, each begun and ended.
    #[test]
    fn ranges_are_told() {
        const TOOL: &str = r#"#include <stdio.h>
            static void say(const char* what) { FILE* f = fopen(TOLD, "a"); fprintf(f, "%s\n", what); fclose(f); }
            int nvtxRangePushA(const char* name) { say(name); return 0; }
            int nvtxRangePop(void) { say("."); return 0; }"#;
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
        let (source, library, told) = (at("tool.c"), at("libtool.so"), at("told"));
        std::fs::write(&source, TOOL).unwrap();
        let told_there = format!("-DTOLD=\"{told}\"");
        match Command::new("cc").args([&told_there, "-shared", "-fPIC", "-o", &library, &source]).status() {
            Ok(s) => assert!(s.success(), "cc refuses the tool"),
            Err(e) => return eprintln!("skipped: ranges need a C compiler to be tested: cc: {e}"),
        }
        let ranges = Ranges::open(&library).unwrap();
        ranges.begin("outer");
        ranges.begin("zero\0byte");
        ranges.end();
        ranges.end();
        assert_eq!(std::fs::read_to_string(&told).unwrap(), "outer\nzero byte\n.\n.\n");
        assert!(Ranges::open("libthere-is-no-such.so").is_none());
    }
}
