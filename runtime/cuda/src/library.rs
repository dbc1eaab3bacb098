//! Finding the libraries.

use rambac_driver::{Error, Result};
use std::path::PathBuf;
use std::sync::Mutex;

/// What to do where there is no driver.
pub const DRIVER_HELP: &str = "install NVIDIA's driver, and in a container give it the GPU (docker run --gpus all)";

/// What to do where there is no cuBLASLt.
pub const CUBLASLT_HELP: &str = "pip install nvidia-cublas (CUDA 13) or nvidia-cublas-cu12, or install a CUDA toolkit, or \
                                 name a folder with libcublasLt.so.* in RAMBAC_CUBLASLT";

/// How the files of the products' library begin.
pub const CUBLASLT: &str = "libcublasLt.so.";

/// A library as it was loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Library {
    /// `None`: by the linker's own search.
    pub path: Option<PathBuf>,
    /// cuBLASLt's own number, such as 130001.
    pub version: usize,
}

/// The oldest driver that has every function in use, as the driver counts versions (CUDA 12.0).
const OLDEST: i32 = 12000;

/// Makes the driver ready; its version as (major, minor).
///
/// # Errors
/// There is none, it is too old or does not work.
pub(crate) fn driver() -> Result<(i32, i32)> {
    use cudarc::driver::sys;
    // SAFETY: asks the linker for NVIDIA's library, whose initialisers do nothing to us.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Absent(format!("there is no NVIDIA driver (libcuda.so.1) on this machine: {DRIVER_HELP}")));
    }
    let mut version = 0;
    // SAFETY: a valid pointer; this call needs no initialisation.
    crate::api::check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
    let (major, minor) = (version / 1000, version % 1000 / 10);
    if version < OLDEST {
        return Err(Error::Absent(format!(
            "NVIDIA's driver is too old: it knows CUDA {major}.{minor}, 12.0 is needed; install a driver of version 525 or \
             later"
        )));
    }
    // SAFETY: the flags must be 0, and are.
    crate::api::check("cuInit", unsafe { sys::cuInit(0) })?;
    Ok((major, minor))
}

/// Loads cuBLASLt: of `places` the first that can be, else where the linker finds it.
///
/// # Errors
/// It is nowhere.
pub(crate) fn cublaslt(places: &[PathBuf]) -> Result<Library> {
    use cudarc::cublaslt::sys;
    static LOADED: Mutex<Option<Library>> = Mutex::new(None);
    let mut loaded = LOADED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(l) = &*loaded {
        return Ok(l.clone());
    }
    let mut path = None;
    let mut trouble = vec![];
    for p in places {
        // SAFETY: NVIDIA's library, whose initialisers do nothing to us.  It is never unloaded: the binding finds it by the
        // name that it has in itself.
        match unsafe { libloading::Library::new(p) } {
            Ok(l) => {
                std::mem::forget(l);
                path = Some(p.clone());
                break;
            }
            Err(e) => trouble.push(format!("; {} can't be loaded ({e})", p.display())),
        }
    }
    // SAFETY: as above.
    if !unsafe { sys::is_culib_present() } {
        let trouble = trouble.concat();
        return Err(Error::Absent(format!(
            "cuBLASLt, the library of dense products, is not here{trouble}: {CUBLASLT_HELP}"
        )));
    }
    // SAFETY: no arguments.
    let version = unsafe { sys::cublasLtGetVersion() };
    let l = Library { path, version };
    *loaded = Some(l.clone());
    Ok(l)
}

impl Library {
    /// Loads cuBLASLt without a device: from these places, else where the linker finds it.
    ///
    /// # Errors
    /// It is nowhere.
    pub fn cublaslt(places: &[PathBuf]) -> Result<Library> {
        cublaslt(places)
    }
}
