//! Blocks that run together: their memory, barriers and the scheduler of their warps.

use super::barriers::Barrier;
use super::bulk::BulkCopy;
use super::mbarrier::Mbarrier;
use super::warp::{Path, Stop, Wait, Warp};
use super::{Env, Random, Sink};
use crate::check::past::Past;
use crate::check::shared::SharedMemory;
use crate::check::{Kind, Who};
use crate::count::Footprint;
use crate::isa::Op;
use std::collections::HashMap;

/// One block.
pub(crate) struct Block {
    /// Its place in the grid.
    pub at: [u32; 3],
    /// Within the cluster.
    pub rank: u32,
    pub shared: SharedMemory,
    pub barriers: Vec<Barrier>,
    pub mbarriers: Vec<Mbarrier>,
    /// Threads that have not left.
    pub live: u32,
    /// All that the block began with.
    pub threads: u32,
}

pub(crate) struct Cluster {
    pub id: u32,
    pub blocks: Vec<Block>,
    pub warps: Vec<Warp>,
    pub common: Common,
    order: Vec<usize>,
    random: Random,
    executed: u64,
    idle_rounds: u32,
}

/// What all blocks of a cluster share.
pub(crate) struct Common {
    pub id: u32,
    pub warps_per_block: u32,
    /// Writes that the asynchronous engine sees.
    pub proxied: Past,
    /// What threads handed on by strong writes, by address, to others of the cluster.
    pub flags: HashMap<u64, Past>,
    pub footprint: Footprint,
    pub barrier: Barrier,
    pub copies: Vec<BulkCopy>,
    /// Mixes the order of what has none.
    pub random: Random,
    /// Something happened that a waiting warp may wait for.
    pub events: u64,
    /// A trap: nothing of the cluster goes on.
    pub stopped: bool,
}

pub(crate) enum Progress {
    More,
    Done,
}

/// Rounds in which every warp only asks for what doesn't come.
const IDLE: u32 = 2000;

fn position(id: u64, extent: [u32; 3]) -> [u32; 3] {
    let [x, y, _] = extent.map(u64::from);
    [(id % x) as u32, (id / x % y) as u32, (id / x / y) as u32]
}

impl Cluster {
    pub fn new(env: &Env, id: u32) -> Cluster {
        let size = env.cluster.iter().product::<u32>();
        let threads = env.block.iter().product::<u32>();
        let per = threads.div_ceil(32);
        let n_warps = (size * per) as usize;
        let bytes = (env.program.shared_bytes + env.dynamic_shared) as usize;
        let (grain, o) = (env.program.grain_shared, env.options);
        let blocks = (0..size)
            .map(|rank| Block {
                at: [0; 3],
                rank,
                shared: SharedMemory::new(bytes, grain, n_warps, o.races, o.uninitialised),
                barriers: (0..16).map(|_| Barrier::new(n_warps)).collect(),
                mbarriers: vec![],
                live: threads,
                threads,
            })
            .collect();
        let mut c = Cluster {
            id,
            blocks,
            warps: (0..n_warps).map(|w| Warp::new(env, w as u32, per)).collect(),
            common: Common {
                id,
                warps_per_block: per,
                proxied: Past::new(n_warps),
                flags: HashMap::new(),
                footprint: Footprint::new(size as usize, per as usize, bytes),
                barrier: Barrier::new(n_warps),
                copies: vec![],
                random: Random(0),
                events: 0,
                stopped: false,
            },
            order: (0..n_warps).collect(),
            random: Random(0),
            executed: 0,
            idle_rounds: 0,
        };
        c.place(env, id);
        c
    }

    /// Makes an ended cluster the cluster `id`.
    pub fn reset(&mut self, env: &Env, id: u32) {
        let threads = env.block.iter().product::<u32>();
        let n_warps = self.warps.len();
        for b in &mut self.blocks {
            b.shared.clear();
            b.barriers.iter_mut().for_each(|x| *x = Barrier::new(n_warps));
            b.mbarriers.clear();
            b.live = threads;
        }
        for w in &mut self.warps {
            w.reset(env);
        }
        self.common.proxied.clear();
        self.common.flags.clear();
        self.common.footprint.clear();
        self.common.barrier = Barrier::new(n_warps);
        self.common.copies.clear();
        self.common.events = 0;
        self.common.stopped = false;
        self.executed = 0;
        self.idle_rounds = 0;
        self.place(env, id);
    }

    fn place(&mut self, env: &Env, id: u32) {
        self.id = id;
        self.common.id = id;
        self.random = Random(env.options.seed ^ u64::from(id) << 20);
        self.common.random = Random(!env.options.seed ^ u64::from(id) << 20);
        let clusters = std::array::from_fn(|i| env.grid[i] / env.cluster[i]);
        let at = position(u64::from(id), clusters);
        for b in &mut self.blocks {
            let within = position(u64::from(b.rank), env.cluster);
            b.at = std::array::from_fn(|i| at[i] * env.cluster[i] + within[i]);
        }
        for w in &mut self.warps {
            w.start(env, &self.blocks[w.block as usize], at, clusters);
        }
    }

    /// Runs until all warps have ended or so many instructions are spent.
    pub fn run(&mut self, env: &Env, sink: &mut Sink, budget: u64) -> Progress {
        let mixed = env.options.seed != 0;
        let until = self.executed + budget;
        loop {
            if mixed {
                self.random.shuffle(&mut self.order);
            }
            let (mut alive, mut moved, mut asked) = (false, false, false);
            let events = self.common.events;
            for k in 0..self.order.len() {
                let w = self.order[k];
                if self.warps[w].ended() {
                    continue;
                }
                alive = true;
                let turn = match (mixed, env.options.footprint) {
                    (true, _) => 1 + self.random.below(64),
                    // What is near depends on warps going on together.
                    (_, true) => 16,
                    _ => 256,
                };
                let warp = &mut self.warps[w];
                let before = warp.retired;
                let stop = warp.run(env, sink, &mut self.blocks, &mut self.common, turn);
                self.executed += warp.retired - before;
                match stop {
                    Stop::Turn => moved = true,
                    // Asked for something that isn't there yet.
                    Stop::Asked => asked = true,
                    Stop::Blocked => moved |= warp.retired != before,
                    Stop::Ended => moved = true,
                }
                if self.common.stopped {
                    return Progress::Done;
                }
            }
            if !alive {
                return Progress::Done;
            }
            moved |= self.common.events != events;
            if !moved && super::bulk::land_one(env, &mut self.blocks, &mut self.common) {
                continue;
            }
            if !moved && self.force(env, sink) {
                continue;
            }
            if !moved && !asked {
                self.deadlock(env, sink);
                return Progress::Done;
            }
            if moved {
                self.idle_rounds = 0;
            } else {
                self.idle_rounds += 1;
                if self.idle_rounds > IDLE {
                    self.deadlock(env, sink);
                    return Progress::Done;
                }
            }
            if self.executed >= env.options.limit {
                let w = self.warps.iter().find(|w| !w.ended());
                if let Some(w) = w {
                    let (pc, lane) = w.waiting_at();
                    let text = format!(
                        "stopped after {} instructions of one block's warps: does this loop end, and what does it wait for?",
                        self.executed
                    );
                    let who = self.who(env, w, lane);
                    sink.findings.add(env.program, Kind::Limit, pc, None, who, None, || text);
                }
                return Progress::Done;
            }
            if self.executed >= until {
                return Progress::More;
            }
        }
    }

    fn who(&self, env: &Env, w: &Warp, lane: u32) -> Who {
        w.who(env, &self.blocks, &self.common, lane)
    }

    /// Threads that wait at a barrier for others of their warp, which wait elsewhere: a mistake, noted, and they go on.
    fn force(&mut self, env: &Env, sink: &mut Sink) -> bool {
        for w in 0..self.warps.len() {
            let warp = &self.warps[w];
            let at_barrier = |p: &Path| {
                matches!(p.wait, Wait::Lanes { .. })
                    && matches!(env.program.code[p.pc as usize].op, Op::Bar(_) | Op::ClusterArrive { .. })
            };
            let Some(i) = warp.paths.iter().position(at_barrier) else { continue };
            let (mask, pc) = (warp.paths[i].mask, warp.paths[i].pc);
            let text = || {
                let all = warp.live;
                format!("only lanes {mask:#010x} of the warp's {all:#010x} come to this barrier, all must")
            };
            let who = self.who(env, warp, mask.trailing_zeros());
            sink.findings.add(env.program, Kind::DivergentBarrier, pc, None, who, None, text);
            let path = &mut self.warps[w].paths[i];
            path.wait = Wait::None;
            path.forced = true;
            return true;
        }
        false
    }

    /// Nothing can go on: says what every path waits for.
    fn deadlock(&mut self, env: &Env, sink: &mut Sink) {
        for w in &self.warps {
            for p in &w.paths {
                let who = self.who(env, w, p.mask.trailing_zeros());
                let n = p.mask.count_ones();
                let block = &self.blocks[w.block as usize];
                let text = match &p.wait {
                    Wait::Barrier { id, .. } => {
                        let b = &block.barriers[*id as usize];
                        let want = b.expected.unwrap_or(block.live);
                        format!(
                            "{n} threads of a warp wait at barrier {id}, where {} of {want} threads came",
                            b.arrived
                        )
                    }
                    Wait::Lanes { missing } => format!(
                        "{n} threads wait for lanes {missing:#010x} of their warp, which never come to this instruction"
                    ),
                    Wait::Cluster { .. } => format!("{n} threads wait for the cluster's barrier"),
                    Wait::None => format!("{n} threads ask for a phase of an mbarrier that never completes"),
                };
                let kind = if matches!(p.wait, Wait::Lanes { .. }) { Kind::DivergentWarp } else { Kind::Deadlock };
                sink.findings.add(env.program, kind, p.pc, None, who, None, || text);
            }
        }
    }
}
