//! What a GPU gives a kernel: numbers, never a device.

use std::fmt;

/// An instruction set that code is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Arch {
    /// A100 and everything after it: mma.sync, ldmatrix, cp.async.
    Sm80,
    /// H100 and H200 alone: wgmma, TMA, mbarrier.
    Sm90a,
}

impl Arch {
    pub const ALL: [Arch; 2] = [Arch::Sm80, Arch::Sm90a];

    pub fn name(self) -> &'static str {
        match self {
            Arch::Sm80 => "sm_80",
            Arch::Sm90a => "sm_90a",
        }
    }
    pub fn from_name(s: &str) -> Option<Arch> {
        Arch::ALL.into_iter().find(|a| a.name() == s)
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Limits that choices of tiles depend on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    pub arch: Arch,
    /// Streaming multiprocessors.
    pub sms: usize,
    /// Shared memory that one block may take, in bytes.
    pub shared_per_block: usize,
    /// Shared memory of a multiprocessor, in bytes; each resident block takes [`Target::SHARED_RESERVED`] more than it asks.
    pub shared_per_sm: usize,
    /// 32-bit registers of a multiprocessor.
    pub registers_per_sm: usize,
    pub threads_per_sm: usize,
    pub blocks_per_sm: usize,
    /// Memory that a step may take beside its operands, in bytes, where another form needs less.
    pub workspace: usize,
}

impl Target {
    /// Shared memory that the driver keeps per block, in bytes.
    pub const SHARED_RESERVED: usize = 1024;

    /// The card that stands for an instruction set: A100 (108 SMs) and H200 (132 SMs).
    pub fn of(arch: Arch) -> Target {
        let (sms, block, sm) = match arch {
            Arch::Sm80 => (108, 163 * 1024, 164 * 1024),
            Arch::Sm90a => (132, 227 * 1024, 228 * 1024),
        };
        Target {
            arch,
            sms,
            shared_per_block: block,
            shared_per_sm: sm,
            registers_per_sm: 65536,
            threads_per_sm: 2048,
            blocks_per_sm: 32,
            workspace: 1 << 30,
        }
    }

    /// Blocks that fit on a multiprocessor with so many threads, registers per thread and bytes of shared memory.
    pub fn occupancy(&self, threads: usize, registers: usize, shared: usize) -> usize {
        // Registers are given to warps in units of 256.
        let per_block = (registers.max(1) * 32).next_multiple_of(256) * threads.div_ceil(32);
        let by_registers = self.registers_per_sm / per_block.max(1);
        let by_shared = self.shared_per_sm / (shared + Self::SHARED_RESERVED);
        by_registers.min(by_shared).min(self.threads_per_sm / threads.max(1)).min(self.blocks_per_sm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_that_fit() {
        let t = Target::of(Arch::Sm80);
        assert_eq!(t.occupancy(128, 128, 0), 4);
        assert_eq!(t.occupancy(128, 32, 48 * 1024), 3);
        assert_eq!(t.occupancy(1024, 32, 0), 2);
        assert_eq!(Target::of(Arch::Sm90a).occupancy(256, 255, 100 * 1024), 1);
    }
}
