//! Runs launches.  `launch`: spreads clusters of blocks over threads; `cluster`: blocks that run together and their
//! scheduler; `warp`: paths of threads and the instruction loop; the rest is one file per family of instructions.
//!
//! A block is no thread of ours but a value that can be put aside: so blocks that wait for other blocks make progress on
//! any number of threads.

mod async_copy;
mod atomics;
mod barriers;
mod bulk;
mod cluster;
mod exchange;
pub mod launch;
mod matrix;
mod mbarrier;
mod memory;
mod paths;
pub mod tensor_map;
mod trouble;
mod views;
mod warp;
mod wgmma;

use crate::check::Findings;
use crate::check::global::{Releases, Shadows};
use crate::count::{Move, PcCount, Traffic};
use crate::isa::Program;
use crate::memory::GlobalMemory;
use cluster::{Block, Common};

/// How to run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// 0: warps and blocks in order; else they are mixed.
    pub seed: u64,
    /// Asynchronous copies happen when they are waited for rather than when they are issued.
    pub lazy: bool,
    pub races: bool,
    pub uninitialised: bool,
    /// Counts what blocks move beyond their caches and what they could do with, too.
    pub footprint: bool,
    /// Instructions of warps after which a cluster of blocks is stopped.
    pub limit: u64,
}

impl Default for Options {
    fn default() -> Options {
        Options { seed: 0, lazy: false, races: true, uninitialised: true, footprint: false, limit: 1 << 30 }
    }
}

/// What all blocks of a launch share.
pub(crate) struct Env<'a> {
    pub program: &'a Program,
    pub memory: &'a GlobalMemory,
    pub shadows: &'a Shadows<'a>,
    pub constants: &'a [u8],
    pub params: &'a [u8],
    pub releases: &'a Releases,
    pub options: Options,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub cluster: [u32; 3],
    pub dynamic_shared: u32,
    /// Earlier launches may still run until it waits for them.
    pub early: bool,
}

/// Where an instruction of a warp runs: what it may use and change beside the warp.
pub(crate) struct Site<'a> {
    pub pc: u32,
    pub env: &'a Env<'a>,
    pub sink: &'a mut Sink,
    /// Those of the cluster.
    pub blocks: &'a mut [Block],
    pub common: &'a mut Common,
}

impl Site<'_> {
    /// The same for the instruction at `pc`.
    pub fn at(&mut self, pc: u32) -> Site<'_> {
        Site { pc, env: self.env, sink: self.sink, blocks: self.blocks, common: self.common }
    }
}

/// What one worker notes.
pub(crate) struct Sink {
    pub pcs: Vec<PcCount>,
    pub traffic: Vec<Traffic>,
    pub findings: Findings,
}

impl Sink {
    /// Notes what an access to a sector of a buffer moved.
    pub fn moves(&mut self, m: Move, unit: usize, pc: u32) {
        let t = &mut self.traffic[unit];
        t.moved_sectors += u64::from(m != Move::Near);
        t.least_sectors += u64::from(m == Move::First);
        self.pcs[pc as usize].again += u64::from(m == Move::Again);
    }
}

/// Numbers that look random: SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Clone)]
pub(crate) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }

    pub fn shuffle<T>(&mut self, all: &mut [T]) {
        for i in (1..all.len()).rev() {
            all.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

/// Lanes of a mask, lowest first.
pub(crate) fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    let mut m = mask;
    std::iter::from_fn(move || {
        if m == 0 {
            return None;
        }
        let lane = m.trailing_zeros() as usize;
        m &= m - 1;
        Some(lane)
    })
}
