//! Barriers of blocks and clusters, and fences.

use super::cluster::{Block, Common};
use super::warp::{Flow, Wait, Warp};
use super::{Env, Site, lanes};
use crate::check::Kind;
use crate::check::past::Past;
use crate::isa::{Bar, BarKind, Op, Vote};

/// A barrier and what meets at it.
pub(crate) struct Barrier {
    /// Times it was passed.
    pub generation: u64,
    pub arrived: u32,
    /// Threads it waits for; `None` for all that have not left.
    pub expected: Option<u32>,
    /// What those who arrived know.
    past: Past,
    /// What those knew who passed last.
    done: Past,
    /// Threads whose predicate held, and all; of this and of the last generation.
    held: (u32, u32),
    last: (u32, u32),
    /// Where the first came from.
    pub pc: Option<u32>,
}

impl Barrier {
    pub fn new(n_warps: usize) -> Barrier {
        Barrier {
            generation: 0,
            arrived: 0,
            expected: None,
            past: Past::new(n_warps),
            done: Past::new(n_warps),
            held: (0, 0),
            last: (0, 0),
            pc: None,
        }
    }

    fn try_pass(&mut self, live: u32, events: &mut u64) {
        if self.arrived > 0 && self.arrived >= self.expected.unwrap_or(live) {
            self.generation += 1;
            self.arrived = 0;
            self.expected = None;
            std::mem::swap(&mut self.past, &mut self.done);
            self.past.clear();
            self.last = std::mem::take(&mut self.held);
            self.pc = None;
            *events += 1;
        }
    }

    fn arrive(&mut self, warp: &mut Warp, mask: u32, threads: u32) {
        warp.clock += 1;
        warp.hand_on(mask, &mut self.past);
        self.arrived += threads;
    }
}

/// Threads left: barriers that wait for all may be passed now.
pub(crate) fn threads_left(blocks: &mut [Block], rank: usize, common: &mut Common) {
    let block = &mut blocks[rank];
    for b in &mut block.barriers {
        if b.expected.is_none() {
            b.try_pass(block.live, &mut common.events);
        }
    }
    common.barrier.try_pass(cluster_live(blocks), &mut common.events);
}

/// A barrier is for all threads of a block; the hardware lets it pass without those that left.
pub(crate) fn left_without(n: u32) -> String {
    format!("{n} threads of the block left without coming to this barrier")
}

/// Threads of the cluster that have not left.
fn cluster_live(blocks: &[Block]) -> u32 {
    blocks.iter().map(|b| b.live).sum()
}

impl Warp {
    /// Takes over what was learnt at the barriers that were passed.
    pub fn wake(&mut self, env: &Env, blocks: &[Block], common: &Common) {
        for i in 0..self.paths.len() {
            let path = &self.paths[i];
            let barrier = match path.wait {
                Wait::Barrier { id, generation } => {
                    let b = &blocks[self.block as usize].barriers[id as usize];
                    if b.generation == generation {
                        continue;
                    }
                    b
                }
                Wait::Cluster { generation } if common.barrier.generation != generation => &common.barrier,
                _ => continue,
            };
            let (pc, mask, (held, all)) = (path.pc - 1, path.mask, barrier.last);
            self.pass(mask, &barrier.done);
            self.paths[i].wait = Wait::None;
            if let Op::Bar(bar) = &env.program.code[pc as usize].op {
                if let Some(dst) = bar.dst {
                    self.put(dst, mask, &[u64::from(held); 32]);
                }
                if let (Some(p), BarKind::Red(kind)) = (bar.p_dst, bar.kind) {
                    let yes = if kind == Vote::All { held == all } else { held > 0 };
                    self.put_pred(p, mask, if yes { u32::MAX } else { 0 });
                }
            }
        }
    }

    pub fn barrier(&mut self, bar: &Bar, mask: u32, site: &mut Site) -> Flow {
        let pc = site.pc;
        let lane = mask.trailing_zeros();
        let id = self.regs[bar.id as usize][lane as usize];
        if id > 15 {
            let text = || format!("there is no barrier {id}: a block has 0 to 15");
            self.find(site, Kind::Operand, lane, None, text);
            return Flow::Next;
        }
        if bar.aligned && !std::mem::take(&mut self.paths[self.current].forced) {
            // The warp's other threads may be on their way: how paths are scheduled is no mistake of the kernel.
            let all = [u64::from(self.threads); 32];
            if self.gather(all, mask, site).is_none() {
                return Flow::Again;
            }
        }
        let expected = bar.threads.map(|t| self.regs[t as usize][lane as usize] as u32);
        if let Some(n) = expected.filter(|n| n % 32 != 0 || *n == 0) {
            let text = || format!("a barrier for {n} threads: it must be a multiple of 32");
            self.find(site, Kind::Operand, lane, None, text);
        }
        let b = &site.blocks[self.block as usize].barriers[id as usize];
        let disagree = b.arrived > 0 && b.expected != expected;
        if let Some(first) = b.pc.filter(|&f| f != pc && bar.aligned && expected.is_none() && b.expected.is_none()) {
            let line = site.env.program.places[first as usize].line;
            let text = || format!("threads of the block meet here and at another barrier (PTX line {line}) at once");
            self.find_two(site, Kind::DivergentBarrier, Some(first), lane, None, text);
        }
        if disagree {
            let text = || format!("threads at barrier {id} don't agree on how many it is for");
            self.find(site, Kind::DivergentBarrier, lane, None, text);
        }
        let block = &site.blocks[self.block as usize];
        let gone = block.threads - block.live;
        if expected.is_none() && gone > 0 {
            let text = || left_without(gone);
            self.find(site, Kind::DivergentBarrier, lane, None, text);
        }
        self.split_off_others(mask);
        let block = &mut site.blocks[self.block as usize];
        let b = &mut block.barriers[id as usize];
        // A whole warp counts as 32 threads where threads are counted.
        let threads = if expected.is_some() && mask == self.live { 32 } else { mask.count_ones() };
        let held = mask & bar.p.mask(&self.preds);
        b.held.0 += held.count_ones();
        b.held.1 += mask.count_ones();
        b.expected = expected;
        b.pc.get_or_insert(pc);
        b.arrive(self, mask, threads);
        let path = &mut self.paths[self.current];
        path.pc = pc + 1;
        if bar.kind != BarKind::Arrive {
            path.wait = Wait::Barrier { id: id as u32, generation: b.generation };
        }
        b.try_pass(block.live, &mut site.common.events);
        Flow::Again
    }

    pub fn cluster_arrive(&mut self, aligned: bool, mask: u32, site: &mut Site) -> Flow {
        // As at a block's barrier: the warp's other threads may be on their way.
        if aligned && !std::mem::take(&mut self.paths[self.current].forced) {
            let all = [u64::from(self.threads); 32];
            if self.gather(all, mask, site).is_none() {
                return Flow::Again;
            }
        }
        self.cluster_phase = site.common.barrier.generation;
        let mut barrier = std::mem::replace(&mut site.common.barrier, Barrier::new(0));
        barrier.arrive(self, mask, mask.count_ones());
        barrier.try_pass(cluster_live(site.blocks), &mut site.common.events);
        site.common.barrier = barrier;
        Flow::Next
    }

    pub fn cluster_wait(&mut self, mask: u32) -> Flow {
        self.split_off_others(mask);
        let generation = self.cluster_phase;
        let path = &mut self.paths[self.current];
        path.pc += 1;
        path.wait = Wait::Cluster { generation };
        Flow::Again
    }

    pub fn fence(&mut self, wide: bool, proxy: bool, mask: u32, common: &mut Common) {
        self.clock += 1;
        lanes(mask).for_each(|l| self.fenced_block[l] = self.clock);
        if wide {
            lanes(mask).for_each(|l| self.fenced[l] = self.clock);
        }
        if proxy {
            self.hand_on(mask, &mut common.proxied);
        }
    }
}
