//! The last accesses of every grain of global memory in one launch.
//!
//! Within a cluster order is kept as in shared memory.  Between clusters an access lies in another's past only through
//! a release (a device-wide fence, then an atomic or strong store) that a thread of the other read by an atomic or strong load.
//! Kept per grain: the last writer and the last readers of two clusters; so a race with a reader further back can be
//! missed in one schedule.

use crate::check::past::{Known, Past};
use crate::check::shared::Actor;
use crate::memory::{Buffer, FRESH, GlobalMemory};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Mutex, OnceLock};

const CLOCK: u32 = 28;
const THREAD: u32 = 14;
const CLUSTER: u32 = 20;
const VALID: u64 = 1 << 62;
const STRONG: u64 = 1 << 63;
/// Clusters a launch may have.
pub const MAX_CLUSTERS: u64 = (1 << CLUSTER) - 1;
/// The host, or an earlier launch.
const BEFORE: u64 = VALID | MAX_CLUSTERS << (CLOCK + THREAD);

fn clock(stamp: u64) -> u32 {
    (stamp & ((1 << CLOCK) - 1)) as u32
}

fn thread(stamp: u64) -> u32 {
    (stamp >> CLOCK) as u32 & ((1 << THREAD) - 1)
}

fn cluster(stamp: u64) -> u32 {
    (stamp >> (CLOCK + THREAD)) as u32 & ((1 << CLUSTER) - 1)
}

/// A conflict with an earlier access: (cluster, thread within it, pc where known).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clash {
    Uninitialised,
    Write { cluster: u32, thread: u32, pc: Option<u32> },
    Read { cluster: u32, thread: u32 },
}

/// Accesses to one buffer.
pub struct Shadow {
    shift: u32,
    races: bool,
    writers: Vec<AtomicU64>,
    writer_pcs: Vec<AtomicU32>,
    readers: [Vec<AtomicU64>; 2],
}

/// Those of all buffers, each made when it is first touched.
pub struct Shadows<'a> {
    cells: Vec<OnceLock<Shadow>>,
    memory: &'a GlobalMemory,
    grain: u32,
    races: bool,
}

impl<'a> Shadows<'a> {
    pub fn new(memory: &'a GlobalMemory, grain: u32, races: bool) -> Shadows<'a> {
        Shadows { cells: memory.buffers.iter().map(|_| OnceLock::new()).collect(), memory, grain, races }
    }

    /// By buffer; `None` was not touched.
    pub fn into_touched(self) -> impl Iterator<Item = Option<Shadow>> {
        self.cells.into_iter().map(OnceLock::into_inner)
    }
}

impl std::ops::Index<usize> for Shadows<'_> {
    type Output = Shadow;

    #[inline(always)]
    fn index(&self, buffer: usize) -> &Shadow {
        self.cells[buffer].get_or_init(|| Shadow::new(&self.memory.buffers[buffer], self.grain, self.races))
    }
}

/// The cluster that accesses.
pub struct Side<'a> {
    pub cluster: u32,
    pub actor: Actor<'a>,
}

impl Side<'_> {
    fn ordered(&self, stamp: u64, lane: u32) -> bool {
        let (t, past) = (thread(stamp), self.actor.past);
        if cluster(stamp) == self.cluster {
            t == self.actor.warp * 32 + lane || past.knows(t, clock(stamp))
        } else {
            past.knows_of(cluster(stamp), t, clock(stamp))
        }
    }

    fn stamp(&self, lane: u32) -> u64 {
        u64::from(self.actor.clock)
            | u64::from(self.actor.warp * 32 + lane) << CLOCK
            | u64::from(self.cluster) << (CLOCK + THREAD)
            | VALID
    }
}

impl Shadow {
    pub fn new(buffer: &Buffer, grain: u32, races: bool) -> Shadow {
        let grain = grain as usize;
        let n = buffer.bytes.div_ceil(grain);
        let start = |g: usize| {
            let part = &buffer.written[g * grain..(g * grain + grain).min(buffer.bytes)];
            AtomicU64::new(if part.iter().all(|&w| w != 0) { BEFORE } else { 0 })
        };
        let some = if races { n } else { 0 };
        Shadow {
            shift: grain.trailing_zeros(),
            races,
            writers: (0..n).map(start).collect(),
            writer_pcs: (0..some).map(|_| AtomicU32::new(0)).collect(),
            readers: std::array::from_fn(|_| (0..some).map(|_| AtomicU64::new(0)).collect()),
        }
    }

    /// Marks what was written in this launch.
    pub fn finish(&self, buffer: &mut Buffer) {
        for (g, w) in self.writers.iter().enumerate() {
            let w = w.load(Relaxed);
            if w != 0 && w != BEFORE {
                let from = g << self.shift;
                let to = (from + (1 << self.shift)).min(buffer.bytes);
                buffer.written[from..to].fill(FRESH);
                buffer.fresh = true;
            }
        }
    }

    fn grains(&self, at: usize, size: usize) -> std::ops::Range<usize> {
        at >> self.shift..((at + size - 1) >> self.shift) + 1
    }

    /// A load of `size` bytes inside the buffer.
    #[inline(always)]
    pub fn read(&self, at: usize, size: usize, lane: u32, strong: bool, s: &Side) -> Option<Clash> {
        let mut clash = None;
        for g in self.grains(at, size) {
            if self.races && !strong {
                let mine = s.stamp(lane);
                // Swaps on both sides: of a read and a write at once on two threads, one sees the other.
                let last = self.readers[0][g].swap(mine, SeqCst);
                if last != 0 && cluster(last) != s.cluster {
                    self.readers[1][g].store(last, Relaxed);
                }
            }
            let w = self.writers[g].load(SeqCst);
            if w == 0 {
                clash = clash.or(Some(Clash::Uninitialised));
            } else if w != BEFORE && self.races && !(strong && w & STRONG != 0) && !s.ordered(w, lane) {
                let pc = Some(self.writer_pcs[g].load(Relaxed));
                clash = Some(Clash::Write { cluster: cluster(w), thread: thread(w), pc });
            }
        }
        clash
    }

    /// A store; `same` tells that the bytes don't change.
    #[inline(always)]
    pub fn write(&self, at: usize, size: usize, lane: u32, strong: bool, same: bool, s: &Side) -> Option<Clash> {
        let mut clash = None;
        let mine = s.stamp(lane) | if strong { STRONG } else { 0 };
        for g in self.grains(at, size) {
            let w = self.writers[g].swap(mine, SeqCst);
            if !self.races {
                continue;
            }
            let last_pc = self.writer_pcs[g].swap(s.actor.pc, Relaxed);
            if same {
                continue;
            }
            if w != 0 && w != BEFORE && !(strong && w & STRONG != 0) && !s.ordered(w, lane) {
                clash = Some(Clash::Write { cluster: cluster(w), thread: thread(w), pc: Some(last_pc) });
            }
            for r in &self.readers {
                let r = r[g].load(SeqCst);
                if r != 0 && !s.ordered(r, lane) {
                    clash = clash.or(Some(Clash::Read { cluster: cluster(r), thread: thread(r) }));
                }
            }
        }
        clash
    }
}

/// What was released through each address.
#[derive(Default)]
pub struct Releases {
    any: AtomicBool,
    by_address: Mutex<HashMap<u64, Known>>,
}

impl Releases {
    /// A strong write at `address` by a thread with this past.
    pub fn release(&self, address: u64, own: u32, past: &Past) {
        let mut map = self.by_address.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let entry = map.entry(address).or_default();
        entry.entry(own).or_default().join_own(past);
        for (c, past) in past.others().into_iter().flatten() {
            entry.entry(*c).or_default().join_own(past);
        }
        self.any.store(true, Ordering::Release);
    }

    /// A strong read at `address`: what is learnt by it.
    pub fn acquire(&self, address: u64) -> Option<Known> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        let map = self.by_address.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        map.get(&address).cloned()
    }
}
