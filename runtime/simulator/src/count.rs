//! What a launch did, in numbers: instructions, traffic, conflicts.

use crate::isa::{Class, Op, Place, Program};
use std::collections::BTreeMap;

/// Of one instruction of the program.
#[derive(Clone, Copy, Debug, Default)]
pub struct PcCount {
    /// Times a warp executed it.
    pub warps: u64,
    /// Times a thread did.
    pub threads: u64,
    /// 32-byte sectors of global memory.
    pub sectors: u64,
    /// Of those that were moved: the ones that the block had moved before.  Counted with [`Traffic::moved_sectors`].
    pub again: u64,
    /// Passes through shared memory, and those that conflicts added.
    pub passes: u64,
    pub conflicts: u64,
}

/// An instruction that costs much.
#[derive(Clone, Debug)]
pub struct Hot {
    pub place: Place,
    /// The place in words; empty until a device has said it.
    pub at: String,
    pub mnemonic: String,
    pub count: PcCount,
}

/// Instructions that are told one by one, at most.
const HOT: usize = 8;

/// Of one buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes that threads asked for, and 32-byte sectors these lie in, instruction by instruction.
    pub read_bytes: u64,
    pub read_sectors: u64,
    pub write_bytes: u64,
    pub write_sectors: u64,
    pub atomics: u64,
    /// Sectors that go to or come from beyond the caches next to a block, see [`Footprint`]; and the least that the blocks could
    /// do with: every sector that a cluster of blocks reads or writes counts once for it.
    /// Both are counted if [`Options::footprint`](crate::Options) says so.
    pub moved_sectors: u64,
    pub least_sectors: u64,
}

/// How a sector is accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Load,
    /// A load that the first cache doesn't answer: asynchronous copies, volatile and ordered loads.
    Past,
    Store,
    /// Happens where all blocks meet, each by itself.
    Atomic,
}

impl Way {
    pub fn stores(self) -> bool {
        matches!(self, Way::Store | Way::Atomic)
    }
    /// Whether a cache next to the block, or what gathers stores, may spare the way.
    fn kept(self) -> bool {
        matches!(self, Way::Load | Way::Store)
    }
}

/// Sectors that a cluster of blocks has read and written, by buffer, and which of them are still near.
///
/// A sector is near while no more others were moved since its last use than a block's share of the first cache holds: so two instructions that
/// take half a sector each move it once, as on a device, where the first cache has it or the second one merges what is written.
/// The share is that of a multiprocessor of sm_80 with as many such blocks as threads and shared memory allow.
pub struct Footprint {
    /// When a sector was last used (in sectors moved), 0 for never; of buffer `b` reads at `2·b`, writes after it.
    maps: Vec<Vec<u32>>,
    /// Sectors that were.
    touched: Vec<(u32, u32)>,
    moved: u32,
    near: u32,
}

/// What became of an access to a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    First,
    Again,
    /// Not moved: it was near.
    Near,
}

impl Footprint {
    /// Of a cluster of `blocks` of so many warps and bytes of shared memory each.
    pub fn new(blocks: usize, warps: usize, shared: usize) -> Footprint {
        // Of a multiprocessor: warps, blocks, shared memory (1 KiB of it a block's overhead), which is taken from the cache.
        const KIB: usize = 1024;
        let shared = shared + KIB;
        let resident = (64 / warps.max(1)).min(32).min(164 * KIB / shared).max(1);
        let near = blocks * (192 * KIB / resident).saturating_sub(shared) / 32;
        Footprint { maps: vec![], touched: vec![], moved: 0, near: near as u32 }
    }

    pub fn access(&mut self, buffer: usize, sector: usize, way: Way) -> Move {
        let map = 2 * buffer + usize::from(way.stores());
        if self.maps.len() <= map {
            self.maps.resize_with(map + 1, Vec::new);
        }
        let times = &mut self.maps[map];
        if times.len() <= sector {
            times.resize(sector + 1, 0);
        }
        let before = times[sector];
        if before != 0 && way.kept() && self.moved - before < self.near {
            // Used again, it stays the longer.
            times[sector] = self.moved;
            return Move::Near;
        }
        if before == 0 {
            self.touched.push((map as u32, sector as u32));
        }
        self.moved += 1;
        times[sector] = self.moved;
        if before == 0 { Move::First } else { Move::Again }
    }

    pub fn clear(&mut self) {
        for (map, sector) in self.touched.drain(..) {
            self.maps[map as usize][sector as usize] = 0;
        }
        self.moved = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_sectors_move_once() {
        // 8 warps without shared memory: 8 blocks, 23 KiB each.
        let mut f = Footprint::new(1, 8, 0);
        assert_eq!(f.near, 736);
        let moved: Vec<Move> = [Way::Load, Way::Load, Way::Past, Way::Store, Way::Store, Way::Atomic]
            .map(|way| f.access(3, 7, way))
            .to_vec();
        assert_eq!(moved, [Move::First, Move::Near, Move::Again, Move::First, Move::Near, Move::Again]);
        // As many others drive it out.
        (0..736).for_each(|s| assert_eq!(f.access(0, s, Way::Load), Move::First));
        assert_eq!((f.access(3, 7, Way::Load), f.access(0, 735, Way::Load)), (Move::Again, Move::Near));
        f.clear();
        assert_eq!(f.access(3, 7, Way::Load), Move::First);
        // One block with all of the shared memory there is; a cluster of two has twice as much.
        assert_eq!(Footprint::new(1, 8, 163 * 1024).near, 896);
        assert_eq!(Footprint::new(2, 8, 163 * 1024).near, 1792);
    }
}

/// Counts of a launch.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    pub kernel: String,
    /// Instructions by class: (warps, threads).
    pub classes: BTreeMap<Class, (u64, u64)>,
    pub warp_instructions: u64,
    pub thread_instructions: u64,
    /// Of mma and wgmma: 2·m·n·k each.
    pub tensor_flops: u64,
    /// Block-wide barriers passed by warps.
    pub barriers: u64,
    pub shared_passes: u64,
    pub shared_conflicts: u64,
    /// By buffer's name, in order of allocation.
    pub buffers: Vec<(String, Traffic)>,
    /// Where most conflicts come from, worst first; and where most is moved that was moved before.
    pub conflicting: Vec<Hot>,
    pub moved_again: Vec<Hot>,
}

impl Counts {
    pub fn new(program: &Program, pcs: &[PcCount], names: &[String], traffic: &[Traffic]) -> Counts {
        let mut c = Counts { kernel: program.name.clone(), ..Counts::default() };
        for (i, p) in pcs.iter().enumerate() {
            if p.warps == 0 {
                continue;
            }
            let entry = c.classes.entry(program.classes[i]).or_default();
            entry.0 += p.warps;
            entry.1 += p.threads;
            c.warp_instructions += p.warps;
            c.thread_instructions += p.threads;
            c.shared_passes += p.passes;
            c.shared_conflicts += p.conflicts;
            match &program.code[i].op {
                Op::Mma(m) => c.tensor_flops += p.warps * 2 * u64::from(m.m) * u64::from(m.n) * u64::from(m.k),
                // Four warps do one together.
                Op::Wgmma(w) => c.tensor_flops += p.warps * 2 * 16 * u64::from(w.n) * u64::from(w.k),
                Op::Bar(_) => c.barriers += p.warps,
                _ => {}
            }
        }
        let hot = |i: usize| Hot {
            place: program.places[i],
            at: String::new(),
            mnemonic: program.mnemonics[i].clone(),
            count: pcs[i],
        };
        let worst = |by: fn(&PcCount) -> u64| {
            let mut worst: Vec<usize> = (0..pcs.len()).filter(|&i| by(&pcs[i]) > 0).collect();
            worst.sort_by_key(|&i| (std::cmp::Reverse(by(&pcs[i])), i));
            worst.into_iter().take(HOT).map(hot).collect()
        };
        c.conflicting = worst(|p| p.conflicts);
        c.moved_again = worst(|p| p.again);
        c.buffers = names.iter().cloned().zip(traffic.iter().copied()).collect();
        c
    }

    pub fn traffic(&self, buffer: &str) -> Option<Traffic> {
        self.buffers.iter().find(|b| b.0 == buffer).map(|b| b.1)
    }
}

/// Distinct 32-byte sectors of accesses that don't cross one.
pub fn sectors(addresses: &[u64; 32], mask: u32) -> ([u64; 32], usize) {
    let mut out = [0u64; 32];
    let mut n = 0;
    let mut sorted = true;
    for (lane, a) in addresses.iter().enumerate() {
        if mask >> lane & 1 == 0 {
            continue;
        }
        let s = a >> 5;
        if n > 0 {
            if out[n - 1] == s {
                continue;
            }
            sorted &= out[n - 1] < s;
        }
        out[n] = s;
        n += 1;
    }
    if !sorted {
        out[..n].sort_unstable();
        let mut k = 0;
        for i in 1..n {
            if out[i] != out[k] {
                k += 1;
                out[k] = out[i];
            }
        }
        n = k + 1;
    }
    (out, n)
}

/// Passes that accesses of `width` bytes at `addresses` take through 32 banks of 4 bytes, and how many of them are due to
/// conflicts.  A pass serves 128 bytes: wide accesses go by half or quarter warps; equal words are served together.
pub fn banks(addresses: &[u64; 32], mask: u32, width: usize) -> (u64, u64) {
    let lanes = match width {
        0..=4 => 32,
        8 => 16,
        _ => 8,
    };
    let (mut passes, mut conflicts) = (0, 0);
    for part in (0..32).step_by(lanes) {
        let m = mask >> part & if lanes == 32 { u32::MAX } else { (1 << lanes) - 1 };
        if m == 0 {
            continue;
        }
        let most = worst_bank(&addresses[part..part + lanes], m, width.div_ceil(4));
        passes += most;
        conflicts += most - 1;
    }
    (passes, conflicts)
}

/// Most distinct words in one bank.
fn worst_bank(addresses: &[u64], mask: u32, words: usize) -> u64 {
    let mut first = [u64::MAX; 32];
    let mut clash = false;
    for (i, a) in addresses.iter().enumerate() {
        if mask >> i & 1 == 0 {
            continue;
        }
        for w in 0..words as u64 {
            let word = (a >> 2) + w;
            let f = &mut first[(word & 31) as usize];
            if *f == u64::MAX {
                *f = word;
            } else if *f != word {
                clash = true;
            }
        }
    }
    if !clash {
        return 1;
    }
    let mut all: Vec<u64> = Vec::with_capacity(64);
    for (i, a) in addresses.iter().enumerate() {
        if mask >> i & 1 == 1 {
            all.extend((0..words as u64).map(|w| (a >> 2) + w));
        }
    }
    all.sort_unstable();
    all.dedup();
    let mut count = [0u64; 32];
    for w in all {
        count[(w & 31) as usize] += 1;
    }
    count.into_iter().max().unwrap_or(1)
}
