//! Shared memory of a block with the last accesses of every grain.
//!
//! Every access is stamped with its thread and the clock of its warp; what lies in a thread's past is said by [`Past`].  Of a
//! grain's readers the lanes that read last are kept, warp by warp; so a race with a lane that read further back can be
//! missed in one schedule.  Writes that leave the bytes as they are clash with nothing: several threads may set the same
//! flag.

use super::past::Past;

/// Bits of a stamp: clock, thread within the cluster, instruction, flags.
const CLOCK: u32 = 28;
const THREAD: u32 = 14;
const PC: u32 = 18;
pub const MAX_PC: usize = 1 << PC;
const VALID: u64 = 1 << 60;
const STRONG: u64 = 1 << 61;
const PENDING: u64 = 1 << 62;
const ASYNC: u64 = 1 << 63;

/// Who accesses, and what it knows.
#[derive(Clone, Copy)]
pub struct Actor<'a> {
    /// Within the cluster.
    pub warp: u32,
    pub clock: u32,
    pub pc: u32,
    pub past: &'a Past,
}

/// A conflict with an earlier access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clash {
    Uninitialised,
    /// Written by (thread in the cluster, pc) with nothing between.
    Write {
        thread: u32,
        pc: u32,
    },
    Read {
        thread: u32,
        pc: u32,
    },
    /// An asynchronous copy by (thread, pc) is under way.
    Pending {
        thread: u32,
        pc: u32,
    },
    /// Written by an ordinary store or `cp.async` of (thread, pc); the asynchronous engine can't see it yet.
    Proxy {
        thread: u32,
        pc: u32,
    },
    /// A product issued by (thread, pc) still reads it.
    Product {
        thread: u32,
        pc: u32,
    },
}

fn clock(stamp: u64) -> u32 {
    (stamp & ((1 << CLOCK) - 1)) as u32
}

fn thread(stamp: u64) -> u32 {
    (stamp >> CLOCK) as u32 & ((1 << THREAD) - 1)
}

fn pc(stamp: u64) -> u32 {
    (stamp >> (CLOCK + THREAD)) as u32 & ((1 << PC) - 1)
}

pub struct SharedMemory {
    pub bytes: Vec<u8>,
    shift: u32,
    n_warps: usize,
    writers: Vec<u64>,
    /// Per grain and warp: clock and pc of the last read, 0 if none, and the lanes that read at this clock.
    readers: Vec<u64>,
    reader_lanes: Vec<u32>,
    /// Per grain: how many products under way read it, and the stamp of the last that began to.  Empty where there was none.
    products: Vec<(u16, u64)>,
    races: bool,
    initialised: bool,
}

impl SharedMemory {
    /// `grain` is 1, 2 or 4 bytes.
    pub fn new(bytes: usize, grain: u32, n_warps: usize, races: bool, initialised: bool) -> SharedMemory {
        let grains = bytes.div_ceil(grain as usize);
        SharedMemory {
            bytes: vec![0; bytes],
            shift: grain.trailing_zeros(),
            n_warps,
            writers: vec![0; grains],
            readers: if races { vec![0; grains * n_warps] } else { vec![] },
            reader_lanes: if races { vec![0; grains * n_warps] } else { vec![] },
            products: vec![],
            races,
            initialised,
        }
    }

    /// As new.
    pub fn clear(&mut self) {
        self.products.clear();
        self.bytes.fill(0);
        self.writers.fill(0);
        self.readers.fill(0);
    }

    fn grains(&self, at: usize, size: usize) -> std::ops::Range<usize> {
        at >> self.shift..((at + size - 1) >> self.shift) + 1
    }

    #[inline(always)]
    fn ordered(stamp: u64, lane: u32, a: &Actor) -> bool {
        let t = thread(stamp);
        t == a.warp * 32 + lane || a.past.knows(t, clock(stamp))
    }

    /// A load by a lane of `size` bytes inside the memory.
    #[inline(always)]
    pub fn read(&mut self, at: usize, size: usize, lane: u32, strong: bool, a: &Actor) -> Option<Clash> {
        let mut clash = None;
        for g in self.grains(at, size) {
            let w = self.writers[g];
            if w & (VALID | PENDING) != VALID {
                if w & PENDING != 0 {
                    clash = Some(Clash::Pending { thread: thread(w), pc: pc(w) });
                } else if self.initialised && clash.is_none() {
                    clash = Some(Clash::Uninitialised);
                }
            } else if self.races && !Self::ordered(w, lane, a) && !(strong && w & STRONG != 0) {
                clash = Some(Clash::Write { thread: thread(w), pc: pc(w) });
            }
            if self.races && !strong {
                let at = g * self.n_warps + a.warp as usize;
                let r = &mut self.readers[at];
                let lanes = if *r != 0 && clock(*r) == a.clock { self.reader_lanes[at] } else { 0 };
                self.reader_lanes[at] = lanes | 1 << lane;
                *r = u64::from(a.clock) | u64::from(a.pc) << CLOCK | 1 << 63;
            }
        }
        clash
    }

    /// What stands against a write by a lane; `same` tells that the bytes don't change.
    #[inline(always)]
    fn before_write(&self, g: usize, lane: u32, strong: bool, same: bool, a: &Actor) -> Option<Clash> {
        let w = self.writers[g];
        if w & PENDING != 0 {
            return Some(Clash::Pending { thread: thread(w), pc: pc(w) });
        }
        if same {
            return None;
        }
        if let Some(&(1.., by)) = self.products.get(g) {
            return Some(Clash::Product { thread: thread(by), pc: pc(by) });
        }
        if !self.races {
            return None;
        }
        if w & VALID != 0 && !Self::ordered(w, lane, a) && !(strong && w & STRONG != 0) {
            return Some(Clash::Write { thread: thread(w), pc: pc(w) });
        }
        let all = g * self.n_warps..(g + 1) * self.n_warps;
        for (warp, (&r, &lanes)) in (0..).zip(self.readers[all.clone()].iter().zip(&self.reader_lanes[all])) {
            if r != 0 {
                let own = if warp == a.warp { 1 << lane } else { 0 };
                let lanes = a.past.unknown(warp, clock(r), lanes & !own);
                if lanes != 0 {
                    let pc = (r >> CLOCK) as u32 & ((1 << PC) - 1);
                    return Some(Clash::Read { thread: warp * 32 + lanes.trailing_zeros(), pc });
                }
            }
        }
        None
    }

    fn stamp(lane: u32, a: &Actor) -> u64 {
        u64::from(a.clock) | u64::from(a.warp * 32 + lane) << CLOCK | u64::from(a.pc) << (CLOCK + THREAD) | VALID
    }

    /// A store by a lane.
    #[inline(always)]
    pub fn write(&mut self, at: usize, size: usize, lane: u32, strong: bool, same: bool, a: &Actor) -> Option<Clash> {
        let mut clash = None;
        let stamp = Self::stamp(lane, a) | if strong { STRONG } else { 0 };
        for g in self.grains(at, size) {
            clash = clash.or(self.before_write(g, lane, strong, same, a));
            self.writers[g] = stamp;
        }
        clash
    }

    /// An asynchronous copy begins: until it is waited for, nobody may touch its destination.
    pub fn begin_copy(&mut self, at: usize, size: usize, lane: u32, a: &Actor) -> Option<Clash> {
        let mut clash = None;
        for g in self.grains(at, size) {
            clash = clash.or(self.before_write(g, lane, false, false, a));
            self.writers[g] = Self::stamp(lane, a) | PENDING | ASYNC;
        }
        clash
    }

    /// An asynchronous copy is complete for `a`, who waited for it.  What the asynchronous engine copied (`bulk`) it sees itself;
    /// `cp.async` is a thread's own.
    pub fn end_copy(&mut self, at: usize, size: usize, lane: u32, bulk: bool, a: &Actor) {
        for g in self.grains(at, size) {
            let issued = self.writers[g];
            let keep_pc = issued & (((1 << PC) - 1) << (CLOCK + THREAD));
            self.writers[g] = Self::stamp(lane, &Actor { pc: 0, ..*a }) | keep_pc | if bulk { ASYNC } else { 0 };
        }
    }

    /// A product that reads a place begins: until it is waited for, nobody may write there.
    pub fn begin_product(&mut self, at: usize, size: usize, lane: u32, a: &Actor) {
        if self.products.is_empty() {
            self.products.resize(self.writers.len(), (0, 0));
        }
        for g in self.grains(at, size) {
            self.products[g] = (self.products[g].0 + 1, Self::stamp(lane, a));
        }
    }

    /// It is over: the place counts as read now.
    pub fn end_product(&mut self, at: usize, size: usize, lane: u32, a: &Actor) {
        for g in self.grains(at, size) {
            self.products[g].0 -= 1;
        }
        self.read(at, size, lane, false, a);
    }

    /// A read by the asynchronous engine on behalf of a lane.
    pub fn async_read(&mut self, at: usize, size: usize, lane: u32, a: &Actor, proxied: &Past) -> Option<Clash> {
        let clash = self.read(at, size, lane, false, a);
        if clash.is_some() {
            return clash;
        }
        for g in self.grains(at, size) {
            let w = self.writers[g];
            if w & VALID != 0 && w & ASYNC == 0 && !proxied.knows(thread(w), clock(w)) {
                return Some(Clash::Proxy { thread: thread(w), pc: pc(w) });
            }
        }
        None
    }

    /// Whether a byte was ever written (or counts as such).
    pub fn is_written(&self, at: usize) -> bool {
        self.writers[at >> self.shift] & VALID != 0
    }

    #[inline(always)]
    pub fn load(&self, at: usize, width: u8) -> u64 {
        let b = &self.bytes;
        match width {
            4 => u64::from(u32::from_le_bytes(b[at..at + 4].try_into().expect("BUG: 4 bytes"))),
            8 => u64::from_le_bytes(b[at..at + 8].try_into().expect("BUG: 8 bytes")),
            2 => u64::from(u16::from_le_bytes(b[at..at + 2].try_into().expect("BUG: 2 bytes"))),
            _ => u64::from(b[at]),
        }
    }

    #[inline(always)]
    pub fn store(&mut self, at: usize, width: u8, value: u64) {
        let n = width as usize;
        self.bytes[at..at + n].copy_from_slice(&value.to_le_bytes()[..n]);
    }
}
