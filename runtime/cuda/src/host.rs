//! Pinned memory of this machine: what the device copies from and to by itself.

use crate::api::check;
use cudarc::driver::sys::{self, CUresult};
use rambac_driver::{Error, HostId, Result};

struct Piece {
    at: *mut u8,
    bytes: usize,
}

/// All of it; a context must be current for every call.
#[derive(Default)]
pub(crate) struct Pinned(Vec<Option<Piece>>);

impl Pinned {
    pub fn alloc(&mut self, name: &str, bytes: usize) -> Result<HostId> {
        let mut at = std::ptr::null_mut();
        // SAFETY: a valid pointer; nothing of 0 bytes is asked for.
        let code = unsafe { sys::cuMemHostAlloc(&raw mut at, bytes.max(1), sys::CU_MEMHOSTALLOC_PORTABLE) };
        if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(Error::OutOfMemory {
                name: format!("{name} (pinned, on this machine)"),
                asked: bytes,
                free: None,
            });
        }
        check("cuMemHostAlloc", code)?;
        let free = self.0.iter().position(Option::is_none);
        let id = free.unwrap_or_else(|| {
            self.0.push(None);
            self.0.len() - 1
        });
        self.0[id] = Some(Piece { at: at.cast(), bytes });
        Ok(HostId(id))
    }

    pub fn free(&mut self, host: HostId) -> Result<()> {
        let piece = self.0.get_mut(host.0).and_then(Option::take).ok_or_else(|| missing(host))?;
        // SAFETY: it was given by `cuMemHostAlloc` and is freed once.
        check("cuMemFreeHost", unsafe { sys::cuMemFreeHost(piece.at.cast()) })
    }

    /// The byte `at` of memory that has `bytes` from there on.
    pub fn place(&self, host: HostId, at: usize, bytes: usize) -> Result<*mut u8> {
        let piece = self.0.get(host.0).and_then(Option::as_ref).ok_or_else(|| missing(host))?;
        match at.checked_add(bytes).is_some_and(|end| end <= piece.bytes) {
            // SAFETY: inside of the piece.
            true => Ok(unsafe { piece.at.add(at) }),
            false => {
                let have = piece.bytes;
                Err(Error::refused(format!("{bytes} bytes from byte {at} of pinned memory are more than its {have}")))
            }
        }
    }

    /// Gives all back; what fails has no one to hear it.
    pub fn clear(&mut self) {
        for piece in self.0.drain(..).flatten() {
            // SAFETY: as above.
            unsafe { sys::cuMemFreeHost(piece.at.cast()) };
        }
    }
}

fn missing(host: HostId) -> Error {
    Error::refused(format!("there is no pinned memory {}", host.0))
}
