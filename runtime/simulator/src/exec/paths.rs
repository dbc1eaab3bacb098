//! How a warp's paths are chosen, part and meet.

use super::cluster::{Block, Common};
use super::warp::{Flow, Path, Wait, Warp};
use super::{Env, Site, lanes};
use crate::check::Kind;
use crate::isa::Slot;

/// Instructions after which a path lets another of its warp run.
pub(crate) const PATIENCE: u32 = 2000;

impl Warp {
    /// Whether a path can run.
    fn ready(path: &Path, live: u32, block: &Block, common: &Common) -> bool {
        match path.wait {
            Wait::None => true,
            // Lanes that left are waited for no longer.
            Wait::Lanes { missing } => missing & live == 0,
            Wait::Barrier { id, generation } => block.barriers[id as usize].generation != generation,
            Wait::Cluster { generation } => common.barrier.generation != generation,
        }
    }

    /// Chooses the path to run; false if none can.
    pub fn choose(&mut self, env: &Env, blocks: &[Block], common: &mut Common, mixed: bool) -> bool {
        self.wake(env, blocks, common);
        self.join_paths();
        let block = &blocks[self.block as usize];
        let mut best: Option<usize> = None;
        let mut n = 0;
        for i in 0..self.paths.len() {
            let p = &self.paths[i];
            if !Self::ready(p, self.live, block, common) {
                continue;
            }
            n += 1;
            if mixed {
                if common.random.below(n) == 0 {
                    best = Some(i);
                }
                continue;
            }
            let key = |p: &Path| (std::cmp::Reverse(p.calls.len()), p.pc);
            if best.is_none_or(|b| key(p) < key(&self.paths[b])) {
                best = Some(i);
            }
        }
        let Some(mut i) = best else { return false };
        if let Wait::Lanes { .. } = self.paths[i].wait {
            self.paths[i].wait = Wait::None;
        }
        // A path that has run long while others wait lets them.
        if !mixed && n > 1 && self.turns > PATIENCE {
            self.turns = 0;
            let later = (1..self.paths.len()).map(|k| (self.current + k) % self.paths.len());
            i = later.into_iter().find(|&k| Self::ready(&self.paths[k], self.live, block, common)).unwrap_or(i);
            self.current = i;
        } else {
            self.current = i;
        }
        true
    }

    /// Unites paths that stand at the same place and wait for nothing, or for each other.
    fn join_paths(&mut self) {
        let mut i = 0;
        while i < self.paths.len() {
            let mut k = i + 1;
            while k < self.paths.len() {
                let (a, b) = (&self.paths[i], &self.paths[k]);
                let free = |p: &Path| matches!(p.wait, Wait::None | Wait::Lanes { .. });
                if a.pc == b.pc && free(a) && free(b) && a.calls == b.calls {
                    let gone = self.paths.swap_remove(k);
                    self.paths[i].mask |= gone.mask;
                    self.paths[i].wait = Wait::None;
                    self.paths[i].forced = false;
                } else {
                    k += 1;
                }
            }
            i += 1;
        }
    }

    /// First instruction after the current path's where another path stands.
    pub fn nearest_other(&self) -> u32 {
        let pc = self.paths[self.current].pc;
        let others = self.paths.iter().enumerate().filter(|(i, _)| *i != self.current);
        others.map(|(_, p)| p.pc).filter(|&p| p > pc).min().unwrap_or(u32::MAX)
    }

    /// Lanes of the current path go apart: `mask` stays, the others go on behind the instruction.
    pub fn split_off_others(&mut self, mask: u32) {
        let path = &mut self.paths[self.current];
        let rest = path.mask & !mask;
        if rest != 0 {
            path.mask = mask;
            let (pc, calls) = (path.pc + 1, path.calls.clone());
            self.paths.push(Path { pc, mask: rest, calls, wait: Wait::None, forced: false });
        }
    }

    /// Threads leave.
    pub fn leave(&mut self, mask: u32, site: &mut Site) {
        if site.env.early && mask & !self.waited != 0 {
            let text =
                || "a thread leaves that has not waited for earlier launches: who waits for it has not either".into();
            let lane = (mask & !self.waited).trailing_zeros();
            self.find(site, Kind::Early, lane, None, text);
        }
        // Others wait for them at a barrier of the whole block.
        let waiting = site.blocks[self.block as usize].barriers.iter().find(|b| b.arrived > 0 && b.expected.is_none());
        if let Some(pc) = waiting.and_then(|b| b.pc) {
            let text = || super::barriers::left_without(mask.count_ones());
            self.find(&mut site.at(pc), Kind::DivergentBarrier, mask.trailing_zeros(), None, text);
        }
        self.live &= !mask;
        let block = &mut site.blocks[self.block as usize];
        block.live -= mask.count_ones();
        site.common.events += 1;
        let path = &mut self.paths[self.current];
        path.mask &= !mask;
        if path.mask == 0 {
            self.paths.swap_remove(self.current);
            self.current = 0;
        } else {
            path.pc += 1;
        }
        super::barriers::threads_left(site.blocks, self.block as usize, site.common);
    }

    pub fn jump_table(&mut self, index: Slot, targets: &[u32], mask: u32, site: &mut Site) -> Flow {
        let pc = site.pc;
        self.split_off_others(mask);
        let index = self.regs[index as usize];
        let calls = self.paths[self.current].calls.clone();
        let mut left = mask;
        let mut first = true;
        while left != 0 {
            let lane = left.trailing_zeros();
            let i = index[lane as usize];
            let same = lanes(left).filter(|&l| index[l] == i).fold(0u32, |m, l| m | 1 << l);
            left &= !same;
            let target = match targets.get(i as usize) {
                Some(&t) => t,
                None => {
                    let text = || format!("jump {i} of a table of {}", targets.len());
                    self.find(site, Kind::Operand, lane, None, text);
                    pc + 1
                }
            };
            if first {
                let path = &mut self.paths[self.current];
                (path.pc, path.mask) = (target, same);
                first = false;
            } else {
                self.paths.push(Path { pc: target, mask: same, calls: calls.clone(), wait: Wait::None, forced: false });
            }
        }
        Flow::Again
    }
}
