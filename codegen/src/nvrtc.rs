//! CUDA C++ → PTX and CUBIN by NVIDIA's runtime compiler, which is loaded when it is asked for: it needs neither a GPU
//! nor a driver.
//!
//! [`installed`] finds libraries, [`Nvrtc::open`] loads one, [`Nvrtc::compile`] compiles.  Several versions can be open
//! at once.  That it is missing is an ordinary error.

use crate::libraries;
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

/// Names a library or a folder that holds one.
pub const VARIABLE: &str = "RAMBAC_NVRTC";

/// What to do where it is missing.
pub const HELP: &str = "pip install nvidia-cuda-nvrtc-cu12==12.9.86 (or nvidia-cuda-nvrtc, or a CUDA toolkit), or name a \
                        folder with libnvrtc.so.* in RAMBAC_NVRTC";

#[derive(Debug, thiserror::Error)]
pub enum NvrtcError {
    #[error("NVRTC, the CUDA compiler library, is not here; {HELP}")]
    Missing,
    #[error("{path}: can't be loaded as NVRTC ({source})", path = path.display())]
    Load { path: PathBuf, source: libloading::Error },
    #[error("{0} can't be given to NVRTC: it holds a zero byte")]
    Zero(&'static str),
    #[error("{name} does not compile ({options}):\n{log}")]
    Compile { name: String, options: String, log: String },
    #[error("NVRTC fails at {call} ({what})")]
    Call { call: &'static str, what: String },
}

type Result<T> = std::result::Result<T, NvrtcError>;
type Program = *mut c_void;
type Strings = *const *const c_char;

/// An open compiler.
pub struct Nvrtc {
    pub path: PathBuf,
    /// Of CUDA, e.g. (12, 9).
    pub version: (i32, i32),
    calls: Calls,
}

/// Functions of the library, which stays loaded as long as the process.
struct Calls {
    error: unsafe extern "C" fn(c_int) -> *const c_char,
    create: unsafe extern "C" fn(*mut Program, *const c_char, *const c_char, c_int, Strings, Strings) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, Strings) -> c_int,
    log: Text,
    ptx: Text,
    cubin: Text,
}

/// A pair of functions: size, then content.
struct Text {
    name: &'static str,
    size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    get: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
}

/// What came of a compilation.
#[derive(Clone, Debug)]
pub struct Compiled {
    pub ptx: String,
    /// Only of real architectures (`sm_90a`, not `compute_90`).
    pub cubin: Option<Vec<u8>>,
    /// Warnings and what ptxas says.
    pub log: String,
    /// Per kernel, where the architecture is real and `--ptxas-options=-v` was given.
    pub usage: Vec<Usage>,
}

/// What a kernel takes, as ptxas says.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Usage {
    pub kernel: String,
    /// Per thread.
    pub registers: u32,
    /// Bytes per thread.
    pub stack: u32,
    pub spill_stores: u32,
    pub spill_loads: u32,
    /// Static, bytes per block.
    pub shared: u32,
    pub barriers: u32,
}

/// Compilers on this machine, best place first; see [`libraries::installed`].
pub fn installed() -> Vec<PathBuf> {
    libraries::installed("libnvrtc.so.", VARIABLE)
}

impl Nvrtc {
    /// The first library that there is.
    ///
    /// # Errors
    /// There is none, or the one named by the variable can't be loaded.
    pub fn open_any() -> Result<Nvrtc> {
        if let Some(path) = installed().first() {
            return Nvrtc::open(path);
        }
        for name in ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"] {
            if let Ok(n) = Nvrtc::open(Path::new(name)) {
                return Ok(n);
            }
        }
        Err(NvrtcError::Missing)
    }

    /// Every version that there is, once, in the order of [`installed`]; what can't be loaded is left out.
    pub fn open_all() -> Vec<Nvrtc> {
        let mut all: Vec<Nvrtc> = vec![];
        for n in installed().iter().filter_map(|p| Nvrtc::open(p).ok()) {
            if all.iter().all(|o| o.version != n.version) {
                all.push(n);
            }
        }
        if all.is_empty() { Nvrtc::open_any().into_iter().collect() } else { all }
    }

    /// `NVRTC 12.9`.
    pub fn name(&self) -> String {
        format!("NVRTC {}.{}", self.version.0, self.version.1)
    }

    /// Loads a library.
    ///
    /// # Errors
    /// It can't be loaded or lacks a function.
    pub fn open(path: &Path) -> Result<Nvrtc> {
        let failed = |source| NvrtcError::Load { path: path.to_path_buf(), source };
        // SAFETY: loading NVIDIA's library runs its initialisers, which do nothing to us.  It is never unloaded, so the
        // functions taken from it stay valid.
        let library: &'static Library = Box::leak(Box::new(unsafe { Library::new(path) }.map_err(failed)?));
        macro_rules! call {
            ($name:literal) => {
                // SAFETY: the signature is that of nvrtc.h, the same in all versions since 11.
                *unsafe { library.get(concat!($name, "\0").as_bytes()) }.map_err(failed)?
            };
        }
        let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int = call!("nvrtcVersion");
        let calls = Calls {
            error: call!("nvrtcGetErrorString"),
            create: call!("nvrtcCreateProgram"),
            destroy: call!("nvrtcDestroyProgram"),
            compile: call!("nvrtcCompileProgram"),
            log: Text { name: "its log", size: call!("nvrtcGetProgramLogSize"), get: call!("nvrtcGetProgramLog") },
            ptx: Text { name: "the PTX", size: call!("nvrtcGetPTXSize"), get: call!("nvrtcGetPTX") },
            cubin: Text { name: "the CUBIN", size: call!("nvrtcGetCUBINSize"), get: call!("nvrtcGetCUBIN") },
        };
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two valid pointers.
        let code = unsafe { version(&raw mut major, &raw mut minor) };
        let n = Nvrtc { path: path.into(), version: (major, minor), calls };
        n.check("nvrtcVersion", code)?;
        Ok(n)
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: any code is allowed; the text is static.
        let what = unsafe { CStr::from_ptr((self.calls.error)(code)) };
        Err(NvrtcError::Call { call, what: what.to_string_lossy().into_owned() })
    }

    fn text(&self, text: &Text, program: Program) -> Result<Vec<u8>> {
        let mut n = 0;
        // SAFETY: the program is alive; `n` is valid.
        self.check(text.name, unsafe { (text.size)(program, &raw mut n) })?;
        let mut out = vec![0u8; n];
        if n > 0 {
            // SAFETY: `out` has the size that was asked for.
            self.check(text.name, unsafe { (text.get)(program, out.as_mut_ptr().cast()) })?;
        }
        Ok(out)
    }

    /// Compiles a source named `name` with headers given as (name, text).
    ///
    /// # Errors
    /// The source has mistakes (with the compiler's log), or the library fails.
    pub fn compile(&self, name: &str, source: &str, headers: &[(&str, &str)], options: &[&str]) -> Result<Compiled> {
        let c = |s: &str, what| CString::new(s).map_err(|_| NvrtcError::Zero(what));
        let (c_name, c_source) = (c(name, "the name")?, c(source, "the source")?);
        let list = |all: &[&str], what| all.iter().map(|s| c(s, what)).collect::<Result<Vec<_>>>();
        let names = list(&headers.iter().map(|h| h.0).collect::<Vec<_>>(), "a header's name")?;
        let texts = list(&headers.iter().map(|h| h.1).collect::<Vec<_>>(), "a header")?;
        let mut flags = list(options, "an option")?;
        // Where there is a driver, it would take code from a cache of its own, and ptxas would say nothing of registers.
        if self.version >= (12, 9) {
            flags.push(c("--no-cache", "an option")?);
        }
        let pointers = |all: &[CString]| all.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (names, texts, flags) = (pointers(&names), pointers(&texts), pointers(&flags));
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: all strings end in zero and live until after the call; counts are those of the lists.
        let code = unsafe {
            (self.calls.create)(
                &raw mut program,
                c_source.as_ptr(),
                c_name.as_ptr(),
                headers.len() as c_int,
                texts.as_ptr(),
                names.as_ptr(),
            )
        };
        self.check("nvrtcCreateProgram", code)?;
        // SAFETY: the program was made above; the flags live until after the call.
        let code = unsafe { (self.calls.compile)(program, flags.len() as c_int, flags.as_ptr()) };
        let result = self.results(name, program, code, options);
        // SAFETY: the program is alive and not used afterwards.
        unsafe { (self.calls.destroy)(&raw mut program) };
        result
    }

    fn results(&self, name: &str, program: Program, code: c_int, options: &[&str]) -> Result<Compiled> {
        let string = |b: Vec<u8>| String::from_utf8_lossy(&b).trim_end_matches('\0').trim_end().to_string();
        let log = string(self.text(&self.calls.log, program)?);
        if code != 0 {
            let log = if log.is_empty() {
                // SAFETY: any code is allowed; the text is static.
                unsafe { CStr::from_ptr((self.calls.error)(code)) }.to_string_lossy().into_owned()
            } else {
                log
            };
            return Err(NvrtcError::Compile { name: name.into(), options: options.join(" "), log });
        }
        let ptx = string(self.text(&self.calls.ptx, program)?);
        // Without a real architecture there is none, and asking is an error.
        let cubin = self.text(&self.calls.cubin, program).ok().filter(|b| !b.is_empty());
        let usage = usage(&log);
        Ok(Compiled { ptx, cubin, log, usage })
    }
}

/// Reads ptxas's report of kernels.
fn usage(log: &str) -> Vec<Usage> {
    let mut all: Vec<Usage> = vec![];
    let number = |line: &str, after: &str| -> Option<u32> {
        line[..line.find(after)?].rsplit(|c: char| !c.is_ascii_digit()).find(|s| !s.is_empty())?.parse().ok()
    };
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_string();
            all.push(Usage { kernel, ..Usage::default() });
        }
        let Some(u) = all.last_mut() else { continue };
        u.stack = number(line, " bytes stack frame").unwrap_or(u.stack);
        u.spill_stores = number(line, " bytes spill stores").unwrap_or(u.spill_stores);
        u.spill_loads = number(line, " bytes spill loads").unwrap_or(u.spill_loads);
        u.registers = number(line, " registers").unwrap_or(u.registers);
        u.barriers = number(line, " barriers").unwrap_or(u.barriers);
        u.shared = number(line, " bytes smem").unwrap_or(u.shared);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_ptxas_says() {
        let log = "ptxas info    : 0 bytes gmem\n\
                   ptxas info    : Compiling entry function 'gemm' for 'sm_90a'\n\
                   ptxas info    : Function properties for gemm\n    \
                   8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n\
                   ptxas info    : Used 96 registers, used 1 barriers, 20480 bytes smem, 392 bytes cmem[0]\n";
        let want = Usage {
            kernel: "gemm".into(),
            registers: 96,
            stack: 8,
            spill_stores: 12,
            spill_loads: 16,
            shared: 20480,
            barriers: 1,
        };
        assert_eq!(usage(log), [want]);
    }

    #[test]
    fn a_library_that_is_none_is_an_error() {
        let e = Nvrtc::open(Path::new("/nowhere/libnvrtc.so.12")).err().map(|e| e.to_string());
        assert!(e.is_some_and(|e| e.starts_with("/nowhere/libnvrtc.so.12: can't be loaded as NVRTC")));
    }
}
