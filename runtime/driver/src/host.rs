//! Memory of this machine for devices that are nowhere else.

use crate::{Error, HostId, Result};

/// What [`Device::alloc_host`](crate::Device::alloc_host) gives, as plain memory.
#[derive(Clone, Debug, Default)]
pub struct HostMemory(Vec<Option<Vec<u8>>>);

fn missing(host: HostId) -> Error {
    Error::refused(format!("there is no memory {} of this machine", host.0))
}

impl HostMemory {
    pub fn alloc(&mut self, bytes: usize) -> HostId {
        let free = self.0.iter().position(Option::is_none);
        let at = free.unwrap_or_else(|| {
            self.0.push(None);
            self.0.len() - 1
        });
        self.0[at] = Some(vec![0; bytes]);
        HostId(at)
    }

    /// # Errors
    /// There is no such memory.
    pub fn free(&mut self, host: HostId) -> Result<()> {
        self.0.get_mut(host.0).and_then(Option::take).map(drop).ok_or_else(|| missing(host))
    }

    /// Bytes from `at` on.
    ///
    /// # Errors
    /// There is no such memory, or it is too small.
    pub fn part(&mut self, host: HostId, at: usize, bytes: usize) -> Result<&mut [u8]> {
        let all = self.0.get_mut(host.0).and_then(Option::as_mut).ok_or_else(|| missing(host))?;
        let have = all.len();
        let part = at.checked_add(bytes).and_then(|end| all.get_mut(at..end));
        part.ok_or_else(|| {
            Error::refused(format!("{bytes} bytes from byte {at} of memory of this machine are more than its {have}"))
        })
    }
}
