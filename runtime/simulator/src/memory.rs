//! Global memory: named buffers, each in an address window of its own, so that an address tells its buffer and an
//! access a little outside a buffer still tells which one was meant.
//!
//! Buffers are words that blocks on several threads may touch at once; each access is a relaxed atomic of one word, so
//! a kernel's race is a race of values, never undefined behaviour here.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// First byte of a buffer within its window of 4 GiB.
const START: u64 = 1 << 30;
/// Most bytes of a buffer.
pub const MAX_BYTES: usize = 2 << 30;

/// Mark of a byte that was written by a launch which the next one may not wait for.
pub const FRESH: u8 = 2;

/// A named piece of global memory.
pub struct Buffer {
    pub name: String,
    pub bytes: usize,
    pub words: Vec<AtomicU32>,
    /// Per byte: 1 where a value was ever written, [`FRESH`] where one may still be on its way.
    pub written: Vec<u8>,
    /// Some are fresh.
    pub fresh: bool,
    /// Kernels may write it.
    pub writable: bool,
}

/// All buffers.
#[derive(Default)]
pub struct GlobalMemory {
    pub buffers: Vec<Buffer>,
    /// Held for accesses of 64 bits that must be whole.
    pub wide: Mutex<()>,
}

/// Address of a buffer's first byte.
pub fn address_of(index: usize) -> u64 {
    ((index as u64 + 1) << 32) + START
}

/// Buffer and offset of an address, which may lie outside the buffer.
#[inline(always)]
pub fn locate(address: u64) -> (usize, i64) {
    (((address >> 32) as usize).wrapping_sub(1), (address & 0xffff_ffff) as i64 - START as i64)
}

impl GlobalMemory {
    /// All that was started has ended.
    pub fn settle(&mut self) {
        for b in self.buffers.iter_mut().filter(|b| b.fresh) {
            b.written.iter_mut().for_each(|w| *w = (*w).min(1));
            b.fresh = false;
        }
    }
}

impl Buffer {
    pub fn new(name: &str, bytes: usize) -> Buffer {
        let words = (0..bytes.div_ceil(4)).map(|_| AtomicU32::new(0)).collect();
        Buffer { name: name.into(), bytes, words, written: vec![0; bytes], fresh: false, writable: true }
    }

    /// Bytes at `at`, which must lie inside.
    pub fn read(&self, at: usize, out: &mut [u8]) {
        for (i, b) in out.iter_mut().enumerate() {
            *b = (self.words[(at + i) / 4].load(Relaxed) >> (8 * ((at + i) % 4))) as u8;
        }
    }

    pub fn write(&self, at: usize, data: &[u8]) {
        let mut i = 0;
        while i < data.len() {
            if (at + i).is_multiple_of(4) && data.len() - i >= 4 {
                let word = u32::from_le_bytes([data[i], data[i + 1], data[i + 2], data[i + 3]]);
                self.words[(at + i) / 4].store(word, Relaxed);
                i += 4;
            } else {
                self.store(at + i, 1, u64::from(data[i]));
                i += 1;
            }
        }
    }

    /// A value of 1, 2, 4 or 8 bytes at an aligned offset inside.
    #[inline(always)]
    pub fn load(&self, at: usize, width: u8) -> u64 {
        let word = u64::from(self.words[at / 4].load(Relaxed));
        match width {
            4 => word,
            8 => word | u64::from(self.words[at / 4 + 1].load(Relaxed)) << 32,
            2 => word >> (8 * (at % 4)) & 0xffff,
            _ => word >> (8 * (at % 4)) & 0xff,
        }
    }

    #[inline(always)]
    pub fn store(&self, at: usize, width: u8, value: u64) {
        match width {
            4 => self.words[at / 4].store(value as u32, Relaxed),
            8 => {
                self.words[at / 4].store(value as u32, Relaxed);
                self.words[at / 4 + 1].store((value >> 32) as u32, Relaxed);
            }
            _ => {
                let shift = 8 * (at % 4);
                let mask = if width == 2 { 0xffffu32 } else { 0xff } << shift;
                let new = (value as u32) << shift & mask;
                // Never refused: the closure always gives a value.
                let _ = self.words[at / 4].fetch_update(Relaxed, Relaxed, |old| Some(old & !mask | new));
            }
        }
    }

    /// Replaces a value of 2, 4 or 8 bytes by `f` of it as one step; the value before.
    pub fn update(&self, at: usize, width: u8, wide: &Mutex<()>, f: impl Fn(u64) -> u64) -> u64 {
        match width {
            8 => {
                let _held = wide.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                let old = self.load(at, 8);
                self.store(at, 8, f(old));
                old
            }
            _ => {
                let shift = 8 * (at % 4);
                let mask = if width == 4 { u32::MAX } else { 0xffffu32 << shift };
                let word = &self.words[at / 4];
                let mut old = word.load(Relaxed);
                loop {
                    let value = u64::from((old & mask) >> shift);
                    let new = old & !mask | (f(value) as u32) << shift & mask;
                    match word.compare_exchange_weak(old, new, Relaxed, Relaxed) {
                        Ok(_) => return value,
                        Err(now) => old = now,
                    }
                }
            }
        }
    }
}
