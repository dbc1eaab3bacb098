//! Memory of this machine that a device reaches by itself: bytes on their way to it, and results on their way back.

use super::bound::Place;
use rambac_driver::{Device, EventId, HostId, Result};

/// Bytes on their way to the device: two halves of pinned memory that are filled in turns.  One is written again when the device
/// has come past the copies out of it, so a copy waits for another only if many are under way.
#[derive(Default)]
pub(super) struct Stage {
    host: Option<HostId>,
    /// The half that is being filled, and how far.
    half: usize,
    used: usize,
    /// Behind the last copy out of each half.
    ends: [Option<EventId>; 2],
}

impl Stage {
    /// Bytes of a half; what is larger goes the device's own way.
    const HALF: usize = 4 << 20;

    /// Starts a copy; `data` is no longer read when this returns.
    pub fn bring<D: Device>(&mut self, d: &mut D, data: &[u8], to: Place) -> Result<()> {
        if data.len() > Self::HALF {
            return d.copy_in(to.0, to.1, data);
        }
        if data.is_empty() {
            return Ok(());
        }
        let host = match self.host {
            Some(h) => h,
            None => *self.host.insert(d.alloc_host("what goes to the device", 2 * Self::HALF)?),
        };
        if self.used + data.len() > Self::HALF {
            self.ends[self.half] = Some(d.event()?);
            (self.half, self.used) = (1 - self.half, 0);
        }
        if let Some(m) = self.ends[self.half].take() {
            let waited = d.wait(m);
            waited.and(d.release(m))?;
        }
        let at = self.half * Self::HALF + self.used;
        d.write_host(host, at, data)?;
        self.used += data.len().next_multiple_of(64);
        d.upload((host, at), to, data.len())
    }

    /// Gives all back, when the device has nothing to do.
    pub fn clear<D: Device>(&mut self, d: &mut D) -> Result<()> {
        let ends = self.ends.iter_mut().filter_map(Option::take).map(|m| d.release(m)).fold(Ok(()), Result::and);
        let host = self.host.take().map_or(Ok(()), |h| d.free_host(h));
        self.used = 0;
        ends.and(host)
    }
}

/// Memory for results, given to a run and taken back.
#[derive(Default)]
pub(super) struct Pinned {
    /// With how much each holds.
    free: Vec<(HostId, usize)>,
}

impl Pinned {
    /// Largest results, in bytes, that come through such memory; what is larger is waited for.
    pub const MOST: usize = 32 << 20;
    /// Pieces that are kept for later.
    const KEPT: usize = 4;

    pub fn take<D: Device>(&mut self, d: &mut D, bytes: usize) -> Result<(HostId, usize)> {
        if let Some(i) = self.free.iter().position(|(_, size)| *size >= bytes) {
            return Ok(self.free.swap_remove(i));
        }
        if self.free.len() >= Self::KEPT
            && let Some(i) = (0..self.free.len()).min_by_key(|&i| self.free[i].1)
        {
            d.free_host(self.free.swap_remove(i).0)?;
        }
        let size = bytes.next_power_of_two().max(4096);
        Ok((d.alloc_host("results", size)?, size))
    }

    pub fn give(&mut self, piece: (HostId, usize)) {
        self.free.push(piece);
    }

    /// As [`Stage::clear`].
    pub fn clear<D: Device>(&mut self, d: &mut D) -> Result<()> {
        self.free.drain(..).map(|(h, _)| d.free_host(h)).fold(Ok(()), Result::and)
    }
}
