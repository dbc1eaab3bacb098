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
    /// The least that the blocks could do with: every sector that a cluster of blocks reads or writes counts once for it.
    /// Counted if [`Options::footprint`](crate::Options) says so.
    pub least_sectors: u64,
}

/// Sectors that a cluster of blocks has read and written, by buffer.
#[derive(Default)]
pub struct Footprint {
    /// Bits by sector; of buffer `b` reads at `2·b`, writes after it.
    maps: Vec<Vec<u64>>,
    /// Words that are not 0.
    dirty: Vec<(u32, u32)>,
}

impl Footprint {
    /// Whether this is the first time.
    pub fn first(&mut self, buffer: usize, sector: usize, store: bool) -> bool {
        let map = 2 * buffer + usize::from(store);
        if self.maps.len() <= map {
            self.maps.resize_with(map + 1, Vec::new);
        }
        let (bits, word) = (&mut self.maps[map], sector / 64);
        if bits.len() <= word {
            bits.resize(word + 1, 0);
        }
        let old = bits[word];
        if old == 0 {
            self.dirty.push((map as u32, word as u32));
        }
        bits[word] |= 1 << (sector % 64);
        old >> (sector % 64) & 1 == 0
    }

    pub fn clear(&mut self) {
        for (map, word) in self.dirty.drain(..) {
            self.maps[map as usize][word as usize] = 0;
        }
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
    /// Where most conflicts come from, worst first.
    pub conflicting: Vec<Hot>,
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
        let mut worst: Vec<usize> = (0..pcs.len()).filter(|&i| pcs[i].conflicts > 0).collect();
        worst.sort_by_key(|&i| (std::cmp::Reverse(pcs[i].conflicts), i));
        worst.truncate(HOT);
        let hot = |i: usize| Hot {
            place: program.places[i],
            at: String::new(),
            mnemonic: program.mnemonics[i].clone(),
            count: pcs[i],
        };
        c.conflicting = worst.into_iter().map(hot).collect();
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
