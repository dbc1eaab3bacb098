//! A warp: its registers, the paths its threads have taken, and the instruction loop.
//!
//! Threads that stand at the same instruction with the same calls behind them form a path.  Paths split at branches and
//! join where they meet.  In order (seed 0) the path that is deepest in calls, then furthest behind, runs: so paths meet
//! again right after the code that parted them, as compilers lay it out.  Mixed, any path may run next at any
//! instruction; and even in order a path yields after a while, so that threads that spin for others of their warp make
//! progress.

use super::async_copy::Copies;
use super::cluster::{Block, Common};
use super::paths::PATIENCE;
use super::views::Views;
use super::{Env, Sink, Site, lanes};
use crate::check::shared::Actor;
use crate::check::{Kind, Who};
use crate::isa::{Lanes, Op, Slot, Special};

/// What a path waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    None,
    /// Other lanes must come to the same instruction.
    Lanes {
        missing: u32,
    },
    /// The barrier's generation must pass.
    Barrier {
        id: u32,
        generation: u64,
    },
    Cluster {
        generation: u64,
    },
}

#[derive(Clone, Debug)]
pub(crate) struct Path {
    pub pc: u32,
    pub mask: u32,
    /// The `call`s that the path is in.
    pub calls: Vec<u32>,
    pub wait: Wait,
    /// Goes on at a barrier although others of its warp don't come.
    pub forced: bool,
}

/// Why a warp's turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    Turn,
    Asked,
    Blocked,
    Ended,
}

/// What an instruction did to the path.
pub(crate) enum Flow {
    Next,
    /// The path changed: look again which runs.
    Again,
    /// As `Next`, and the turn ends: what was asked for isn't there.
    Asked,
}

pub(crate) struct Warp {
    pub regs: Vec<Lanes>,
    pub preds: Vec<u32>,
    /// Within the cluster.
    pub index: u32,
    /// Its block's rank, and its own number within the block.
    pub block: u32,
    pub within: u32,
    /// Lanes that are threads, and those that have not left.
    pub threads: u32,
    pub live: u32,
    pub paths: Vec<Path>,
    pub current: usize,
    pub local: Vec<u8>,
    pub local_written: Vec<u8>,
    pub clock: u32,
    pub views: Views,
    /// Of each lane: clock at its last device-wide fence, 0 if none.
    pub fenced: [u32; 32],
    /// Likewise, at its last fence of any scope.
    pub fenced_block: [u32; 32],
    /// The cluster barrier's generation at this warp's arrival.
    pub cluster_phase: u64,
    pub copies: Copies,
    pub wgmma: super::wgmma::Pending,
    pub retired: u64,
    pub turns: u32,
    /// Lanes that waited for earlier launches.
    pub waited: u32,
}

impl Warp {
    pub fn new(env: &Env, index: u32, per_block: u32) -> Warp {
        let p = env.program;
        let n_warps = (per_block * env.cluster.iter().product::<u32>()) as usize;
        let total = env.block.iter().product::<u32>();
        let within = index % per_block;
        let count = (total - within * 32).min(32);
        let mut w = Warp {
            regs: vec![[0; 32]; p.n_slots],
            preds: vec![0; p.n_preds],
            index,
            block: index / per_block,
            within,
            threads: if count == 32 { u32::MAX } else { (1 << count) - 1 },
            live: 0,
            paths: vec![],
            current: 0,
            local: vec![0; p.local_bytes as usize * 32],
            local_written: vec![0; p.local_bytes as usize * 32],
            clock: 1,
            views: Views::new(n_warps),
            fenced: [0; 32],
            fenced_block: [0; 32],
            cluster_phase: 0,
            copies: Copies::default(),
            wgmma: super::wgmma::Pending::default(),
            retired: 0,
            turns: 0,
            waited: 0,
        };
        for &(slot, value) in &p.constants {
            w.regs[slot as usize] = [value; 32];
        }
        w.reset(env);
        w
    }

    pub fn reset(&mut self, _env: &Env) {
        self.preds.fill(0);
        self.preds[0] = u32::MAX;
        self.live = self.threads;
        self.paths = vec![Path { pc: 0, mask: self.threads, calls: vec![], wait: Wait::None, forced: false }];
        self.current = 0;
        self.local_written.fill(0);
        self.clock = 1;
        self.views.clear();
        self.fenced = [0; 32];
        self.fenced_block = [0; 32];
        self.copies = Copies::default();
        self.wgmma = super::wgmma::Pending::default();
        self.turns = 0;
        self.waited = 0;
    }

    /// Fills the special registers.
    pub fn start(&mut self, env: &Env, block: &Block, cluster_at: [u32; 3], clusters: [u32; 3]) {
        let [nx, ny, _] = env.block;
        for &(slot, special) in &env.program.specials {
            let within = self.within;
            let of = |lane: u32| -> u64 {
                let t = within * 32 + lane;
                let ones = |n: u32| if n >= 32 { u32::MAX } else { (1u32 << n) - 1 };
                u64::from(match special {
                    Special::Tid(0) => t % nx,
                    Special::Tid(1) => t / nx % ny,
                    Special::Tid(_) => t / nx / ny,
                    Special::Ntid(i) => env.block[i as usize],
                    Special::Ctaid(i) => block.at[i as usize],
                    Special::Nctaid(i) => env.grid[i as usize],
                    Special::ClusterId(i) => cluster_at[i as usize],
                    Special::NclusterId(i) => clusters[i as usize],
                    Special::ClusterCtaid(i) => block.at[i as usize] % env.cluster[i as usize],
                    Special::ClusterNctaid(i) => env.cluster[i as usize],
                    Special::ClusterCtarank => block.rank,
                    Special::ClusterNctarank => env.cluster.iter().product(),
                    Special::LaneId => lane,
                    Special::WarpId => within,
                    Special::NwarpId => env.block.iter().product::<u32>().div_ceil(32),
                    Special::LaneMaskEq => 1 << lane,
                    Special::LaneMaskLt => ones(lane),
                    Special::LaneMaskLe => ones(lane + 1),
                    Special::LaneMaskGt => !ones(lane + 1),
                    Special::LaneMaskGe => !ones(lane),
                    Special::DynamicShared => env.dynamic_shared,
                    Special::TotalShared => env.dynamic_shared + env.program.shared_bytes,
                    Special::Zero => 0,
                    Special::One => 1,
                })
            };
            self.regs[slot as usize] = std::array::from_fn(|lane| of(lane as u32));
        }
        // Addresses in shared memory carry the block's rank, as in a cluster's window.
        if block.rank > 0 {
            for &slot in &env.program.shared_slots {
                let base = u64::from(block.rank) << crate::isa::window::RANK_SHIFT;
                let value = env.program.constants.iter().find(|c| c.0 == slot).map_or(0, |c| c.1);
                self.regs[slot as usize] = [base + value; 32];
            }
        }
    }

    pub fn ended(&self) -> bool {
        self.live == 0
    }

    /// Where a warp that doesn't go on stands: (pc, lane).
    pub fn waiting_at(&self) -> (u32, u32) {
        self.paths.first().map_or((0, 0), |p| (p.pc, p.mask.trailing_zeros()))
    }

    pub fn who(&self, env: &Env, blocks: &[Block], common: &Common, lane: u32) -> Who {
        let t = self.within * 32 + lane;
        let [nx, ny, _] = env.block;
        let b = &blocks[self.block as usize];
        let rank = u64::from(common.id) << 4 | u64::from(b.rank);
        Who { block: b.at, thread: [t % nx, t / nx % ny, t / nx / ny], rank: (rank, t) }
    }

    pub fn actor(&self, pc: u32, lane: u32) -> Actor<'_> {
        Actor { warp: self.index, clock: self.clock, pc, past: self.views.of(lane) }
    }

    /// Writes a result to the lanes of a mask.
    #[inline(always)]
    pub fn put(&mut self, dst: Slot, mask: u32, out: &Lanes) {
        let d = &mut self.regs[dst as usize];
        if mask == u32::MAX {
            *d = *out;
        } else {
            for i in 0..32 {
                d[i] = if mask >> i & 1 == 1 { out[i] } else { d[i] };
            }
        }
    }

    pub fn put_pred(&mut self, dst: u16, mask: u32, value: u32) {
        let p = &mut self.preds[dst as usize];
        *p = *p & !mask | value & mask;
    }

    /// Runs up to `turn` instructions.
    pub fn run(&mut self, env: &Env, sink: &mut Sink, blocks: &mut [Block], common: &mut Common, turn: u64) -> Stop {
        let mixed = env.options.seed != 0;
        let code = &env.program.code;
        let mut site = Site { pc: 0, env, sink, blocks, common };
        let end = self.retired + turn;
        'choose: loop {
            if self.live == 0 {
                return Stop::Ended;
            }
            if self.paths.len() > 1 || self.paths[0].wait != Wait::None {
                if !self.choose(env, site.blocks, site.common, mixed) {
                    return Stop::Blocked;
                }
            } else {
                self.current = 0;
            }
            let several = self.paths.len() > 1;
            // Until which instruction this path runs alone.
            let limit = if several { self.nearest_other() } else { u32::MAX };
            loop {
                if self.retired >= end {
                    return Stop::Turn;
                }
                let path = &mut self.paths[self.current];
                let pc = path.pc;
                let inst = &code[pc as usize];
                site.pc = pc;
                let mask = path.mask & inst.guard.mask(&self.preds);
                self.retired += 1;
                let count = &mut site.sink.pcs[pc as usize];
                count.warps += 1;
                count.threads += u64::from(mask.count_ones());
                if let Some(registers) = env.program.touches.get(pc as usize)
                    && !registers.is_empty()
                    && mask != 0
                {
                    self.touch(registers, mask, &mut site);
                }
                let flow = match &inst.op {
                    Op::Alu { f, dst, a, b, c } => {
                        let mut out = [0u64; 32];
                        let r = &self.regs;
                        f(&mut out, &r[*a as usize], &r[*b as usize], &r[*c as usize]);
                        self.put(*dst, mask, &out);
                        Flow::Next
                    }
                    Op::Setp { f, a, b, combine, p, q } => {
                        let r = f(&self.regs[*a as usize], &self.regs[*b as usize]);
                        let with = |r: u32, preds: &[u32]| match combine {
                            None => r,
                            Some((op, c)) => op.apply(r, c.mask(preds)),
                        };
                        let (yes, no) = (with(r, &self.preds), with(!r, &self.preds));
                        self.put_pred(*p, mask, yes);
                        if let Some(q) = q {
                            self.put_pred(*q, mask, no);
                        }
                        Flow::Next
                    }
                    Op::Bra { target } => {
                        let target = *target;
                        let path = &mut self.paths[self.current];
                        if mask == path.mask {
                            path.pc = target;
                        } else if mask == 0 {
                            path.pc += 1;
                        } else {
                            path.mask &= !mask;
                            path.pc += 1;
                            let calls = path.calls.clone();
                            self.paths.push(Path { pc: target, mask, calls, wait: Wait::None, forced: false });
                        }
                        if several || self.paths.len() > 1 {
                            self.turns += 1;
                            continue 'choose;
                        }
                        continue;
                    }
                    _ if mask == 0 => Flow::Next,
                    op => self.execute(op, mask, &mut site),
                };
                match flow {
                    Flow::Next => self.paths[self.current].pc = pc + 1,
                    Flow::Asked => {
                        self.paths[self.current].pc = pc + 1;
                        return Stop::Asked;
                    }
                    Flow::Again => {
                        if site.common.stopped {
                            return Stop::Ended;
                        }
                        continue 'choose;
                    }
                }
                if several {
                    self.turns += 1;
                    if mixed || self.turns > PATIENCE || pc + 1 >= limit {
                        continue 'choose;
                    }
                }
            }
        }
    }

    /// Notes what a lane did wrong.
    pub fn find(&self, site: &mut Site, kind: Kind, lane: u32, address: Option<u64>, message: impl FnOnce() -> String) {
        self.find_two(site, kind, None, lane, address, message);
    }

    /// The same, of this instruction and another.
    pub fn find_two(
        &self,
        site: &mut Site,
        kind: Kind,
        other: Option<u32>,
        lane: u32,
        address: Option<u64>,
        message: impl FnOnce() -> String,
    ) {
        let who = self.who(site.env, site.blocks, site.common, lane);
        site.sink.findings.add(site.env.program, kind, site.pc, other, who, address, message);
    }

    /// Instructions other than the commonest, with at least one lane.
    fn execute(&mut self, op: &Op, mask: u32, site: &mut Site) -> Flow {
        let pc = site.pc;
        let mut out: Lanes = [0; 32];
        match op {
            Op::Ld(a) => self.load(a, mask, site),
            Op::St(a) => self.store(a, mask, site),
            Op::Selp { dst, a, b, p } => {
                let chosen = p.mask(&self.preds);
                let (a, b) = (&self.regs[*a as usize], &self.regs[*b as usize]);
                for i in 0..32 {
                    out[i] = if chosen >> i & 1 == 1 { a[i] } else { b[i] };
                }
                self.put(*dst, mask, &out);
            }
            Op::Lop3 { table, dst, a, b, c } => {
                let (a, b, c) = (&self.regs[*a as usize], &self.regs[*b as usize], &self.regs[*c as usize]);
                let terms: [u64; 8] =
                    std::array::from_fn(|k| if table >> k & 1 == 1 { u64::from(u32::MAX) } else { 0 });
                for i in 0..32 {
                    let (x, y, z) = (a[i], b[i], c[i]);
                    // Bit k of the table is the result for bits (x, y, z) of k.
                    out[i] = terms[0] & !x & !y & !z
                        | terms[1] & !x & !y & z
                        | terms[2] & !x & y & !z
                        | terms[3] & !x & y & z
                        | terms[4] & x & !y & !z
                        | terms[5] & x & !y & z
                        | terms[6] & x & y & !z
                        | terms[7] & x & y & z;
                }
                self.put(*dst, mask, &out);
            }
            Op::Convert { by, dst, a, b } => {
                by.all(&mut out, &self.regs[*a as usize], &self.regs[*b as usize]);
                self.put(*dst, mask, &out);
            }
            Op::Carry { f, dst, a, b, c, writes } => {
                // The carry flag is the predicate kept for it.
                let r = &self.regs;
                let carry = f(&mut out, &r[*a as usize], &r[*b as usize], &r[*c as usize], self.preds[1]);
                self.put(*dst, mask, &out);
                if *writes {
                    self.put_pred(1, mask, carry);
                }
            }
            Op::Set { f, a, b, combine, dst, one } => {
                let mut r = f(&self.regs[*a as usize], &self.regs[*b as usize]);
                if let Some((op, c)) = combine {
                    r = op.apply(r, c.mask(&self.preds));
                }
                for (i, o) in out.iter_mut().enumerate() {
                    *o = if r >> i & 1 == 1 { *one } else { 0 };
                }
                self.put(*dst, mask, &out);
            }
            Op::Pred { op, dst, a, b } => {
                let value = op.apply(a.mask(&self.preds), b.mask(&self.preds));
                self.put_pred(*dst, mask, value);
            }
            Op::Pack { dst, parts, width } => {
                for (k, part) in parts.iter().enumerate() {
                    let p = &self.regs[*part as usize];
                    for i in 0..32 {
                        out[i] |= p[i] << (k as u32 * width);
                    }
                }
                self.put(*dst, mask, &out);
            }
            Op::Unpack { a, parts, width } => {
                let whole = self.regs[*a as usize];
                let keep = (1u64 << width) - 1;
                for (k, part) in parts.iter().enumerate() {
                    if let Some(dst) = part {
                        for i in 0..32 {
                            out[i] = whole[i] >> (k as u32 * width) & keep;
                        }
                        self.put(*dst, mask, &out);
                    }
                }
            }
            Op::Clock { dst, narrow } => {
                let now = if *narrow { self.retired & 0xffff_ffff } else { self.retired };
                self.put(*dst, mask, &[now; 32]);
            }
            Op::Brx { index, targets } => return self.jump_table(*index, targets, mask, site),
            Op::Call(call) => {
                self.split_off_others(mask);
                for lane in lanes(mask) {
                    self.copy_local(&call.copies, lane, site.env.program.local_bytes as usize);
                }
                let path = &mut self.paths[self.current];
                path.calls.push(pc);
                path.pc = call.target;
                return Flow::Again;
            }
            Op::Ret => {
                let Some(&call) = self.paths[self.current].calls.last() else {
                    self.leave(mask, site);
                    return Flow::Again;
                };
                self.split_off_others(mask);
                if let Op::Call(c) = &site.env.program.code[call as usize].op {
                    for lane in lanes(mask) {
                        self.copy_local(&c.results, lane, site.env.program.local_bytes as usize);
                    }
                }
                let path = &mut self.paths[self.current];
                path.calls.pop();
                path.pc = call + 1;
                return Flow::Again;
            }
            Op::Exit => {
                self.leave(mask, site);
                return Flow::Again;
            }
            Op::Trap => {
                let lane = mask.trailing_zeros();
                self.find(site, Kind::Trap, lane, None, || "the kernel stops itself here".into());
                site.common.stopped = true;
                return Flow::Again;
            }
            Op::IsSpace { p, a, space } => {
                let a = self.regs[*a as usize];
                let mut r = 0;
                for (i, &a) in a.iter().enumerate() {
                    r |= u32::from(super::memory::window_of(a) == *space) << i;
                }
                self.put_pred(*p, mask, r);
            }
            Op::Atom(a) => self.atomic(a, mask, site),
            Op::Shfl(_)
            | Op::Vote { .. }
            | Op::Match { .. }
            | Op::Redux { .. }
            | Op::BarWarp { .. }
            | Op::Elect { .. } => {
                return self.exchange(op, mask, site);
            }
            Op::ActiveMask { dst } => self.put(*dst, mask, &[u64::from(mask); 32]),
            Op::Bar(b) => return self.barrier(b, mask, site),
            Op::ClusterArrive { aligned } => {
                return self.cluster_arrive(*aligned, mask, site);
            }
            Op::ClusterWait { .. } => return self.cluster_wait(mask),
            Op::Fence { wide, proxy } => self.fence(*wide, *proxy, mask, site.common),
            Op::Matrix(_) | Op::MoveMatrix { .. } | Op::Mma(_) => {
                return self.matrix(op, mask, site);
            }
            Op::CpAsync(c) => self.copy_async(c, mask, site),
            Op::CpAsyncCommit => self.commit(mask),
            Op::CpAsyncWait { keep } => self.wait_copies(*keep, mask, site.env, site.blocks),
            Op::Mbarrier(b) => return self.mbarrier(b, mask, site),
            Op::Mapa { dst, a, rank, generic } => {
                let (a, rank) = (self.regs[*a as usize], self.regs[*rank as usize]);
                let shift = crate::isa::window::RANK_SHIFT;
                let low = (1 << shift) - 1;
                for i in 0..32 {
                    let keep = if *generic { a[i] & crate::isa::window::SHARED } else { 0 };
                    out[i] = keep | (a[i] & low) | rank[i] << shift;
                }
                self.put(*dst, mask, &out);
            }
            Op::GetCtaRank { dst, a, .. } => {
                let a = self.regs[*a as usize];
                for i in 0..32 {
                    out[i] = a[i] >> crate::isa::window::RANK_SHIFT & 0xff;
                }
                self.put(*dst, mask, &out);
            }
            Op::Bulk(b) => self.bulk(b, mask, site),
            Op::BulkCommit => self.bulk_commit(mask),
            Op::BulkWait { keep } => self.bulk_wait(*keep, mask, site.env, site.blocks),
            Op::Wgmma(_) | Op::WgmmaFence | Op::WgmmaCommit | Op::WgmmaWait { .. } => {
                return self.wgmma(op, mask, site);
            }
            Op::WaitEarlier => self.waited |= mask,
            Op::Nop | Op::Hint => {}
            Op::Alu { .. } | Op::Setp { .. } | Op::Bra { .. } => unreachable!("BUG: run in the loop"),
        }
        Flow::Next
    }
}
