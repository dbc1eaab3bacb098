//! Loads and stores of all spaces, with their checks and counts.

use super::cluster::{Block, Common};
use super::trouble::{in_variable, local_name, shared_name};
use super::warp::Warp;
use super::{Env, Sink, lanes};
use crate::check::Kind;
use crate::check::global::{Clash as GlobalClash, Side};
use crate::count::{self, Way};
use crate::isa::{Access, Lanes, window};
use crate::memory::{FRESH, locate};
use crate::parse::ast::Space;

/// What loads give that could not be done.
const POISON: u64 = 0xdead_beef_dead_beef;

/// Space of a generic address.
pub(crate) fn window_of(address: u64) -> Space {
    match address >> 56 {
        1 => Space::Shared,
        2 => Space::Local,
        3 => Space::Const,
        4 => Space::Param,
        _ => Space::Global,
    }
}

/// (rank of the block, offset) of an address in a cluster's shared window.
#[inline(always)]
pub(crate) fn shared_place(address: u64) -> (usize, usize) {
    let low = address as u32;
    ((low >> window::RANK_SHIFT) as usize, (low & ((1 << window::RANK_SHIFT) - 1)) as usize)
}

/// An access that was found to lie inside memory.
#[derive(Clone, Copy, Default)]
pub(crate) struct Spot {
    /// Buffer, or rank of the block.
    pub unit: usize,
    pub at: usize,
}

impl Warp {
    pub fn addresses(&self, base: u32, offset: i64) -> Lanes {
        let mut a = self.regs[base as usize];
        for x in &mut a {
            *x = x.wrapping_add_signed(offset);
        }
        a
    }

    /// Checks global accesses of a warp; the lanes that may go on.
    #[allow(clippy::too_many_arguments)]
    pub fn global_spots(
        &self,
        a: &Lanes,
        size: usize,
        pc: u32,
        mask: u32,
        store: bool,
        env: &Env,
        sink: &mut Sink,
        blocks: &[Block],
        common: &Common,
        spots: &mut [Spot; 32],
    ) -> u32 {
        let mut good = 0;
        if env.early && mask & !self.waited != 0 {
            self.too_early(a, size, pc, mask & !self.waited, store, env, sink, blocks, common);
        }
        for lane in lanes(mask) {
            let (unit, at) = locate(a[lane]);
            let ok = env.memory.buffers.get(unit).is_some_and(|b| {
                at >= 0 && at as usize + size <= b.bytes && (at as usize).is_multiple_of(size) && (!store || b.writable)
            });
            if ok {
                spots[lane] = Spot { unit, at: at as usize };
                good |= 1 << lane;
            } else {
                let (kind, text) = self.global_trouble(a[lane], size, store, env);
                self.find(env, sink, blocks, common, kind, pc, lane as u32, Some(a[lane]), || text);
            }
        }
        good
    }

    /// Accesses of threads that have not waited for earlier launches, of a launch that begins before these have ended.
    #[allow(clippy::too_many_arguments)]
    fn too_early(
        &self,
        a: &Lanes,
        size: usize,
        pc: u32,
        mask: u32,
        store: bool,
        env: &Env,
        sink: &mut Sink,
        blocks: &[Block],
        common: &Common,
    ) {
        for lane in lanes(mask) {
            let (unit, at) = locate(a[lane]);
            let Some(b) = env.memory.buffers.get(unit) else { continue };
            let fresh = |at: usize| b.written.get(at..at + size).is_some_and(|w| w.contains(&FRESH));
            if at >= 0 && (store || fresh(at as usize)) {
                let what = if store { "a write to" } else { "a read of what an earlier launch writes, " };
                let text = || format!("{what} byte {at} of buffer \"{}\" before griddepcontrol.wait", b.name);
                self.find(env, sink, blocks, common, Kind::Early, pc, lane as u32, Some(a[lane]), text);
            }
        }
    }

    /// Counts sectors and bytes by buffer.
    #[allow(clippy::too_many_arguments)]
    pub fn count_global(
        &self,
        a: &Lanes,
        size: usize,
        pc: u32,
        mask: u32,
        way: Way,
        env: &Env,
        sink: &mut Sink,
        common: &mut Common,
    ) {
        let (sectors, n) = count::sectors(a, mask);
        let store = way.stores();
        if env.options.footprint {
            for s in &sectors[..n] {
                let (unit, at) = locate(s << 5);
                sink.moves(common.footprint.access(unit, at as usize / 32, way), unit, pc);
            }
        }
        sink.pcs[pc as usize].sectors += n as u64;
        let mut i = 0;
        while i < n {
            let unit = locate(sectors[i] << 5).0;
            let mut k = i + 1;
            while k < n && locate(sectors[k] << 5).0 == unit {
                k += 1;
            }
            let t = &mut sink.traffic[unit];
            if store {
                t.write_sectors += (k - i) as u64
            } else {
                t.read_sectors += (k - i) as u64
            }
            i = k;
        }
        let first = locate(a[mask.trailing_zeros() as usize]).0;
        let whole = lanes(mask).all(|l| locate(a[l]).0 == first);
        let mut add = |unit: usize, bytes: u64| {
            let t = &mut sink.traffic[unit];
            if store { t.write_bytes += bytes } else { t.read_bytes += bytes }
        };
        if whole {
            add(first, u64::from(mask.count_ones()) * size as u64);
        } else {
            lanes(mask).for_each(|l| add(locate(a[l]).0, size as u64));
        }
    }

    /// Counts passes through shared memory.
    pub fn count_shared(&self, a: &Lanes, size: usize, pc: u32, mask: u32, sink: &mut Sink) {
        let (passes, conflicts) = count::banks(a, mask, size);
        let c = &mut sink.pcs[pc as usize];
        c.passes += passes;
        c.conflicts += conflicts;
    }

    /// Checks shared accesses of a warp; the lanes that may go on.
    #[allow(clippy::too_many_arguments)]
    pub fn shared_spots(
        &self,
        a: &Lanes,
        size: usize,
        pc: u32,
        mask: u32,
        store: bool,
        env: &Env,
        sink: &mut Sink,
        blocks: &[Block],
        common: &Common,
        spots: &mut [Spot; 32],
    ) -> u32 {
        let mut good = 0;
        for lane in lanes(mask) {
            let (unit, at) = shared_place(a[lane]);
            if blocks.get(unit).is_some_and(|b| at + size <= b.shared.bytes.len()) && at.is_multiple_of(size) {
                spots[lane] = Spot { unit, at };
                good |= 1 << lane;
                continue;
            }
            let what = if store { "a store" } else { "a load" };
            let (kind, text) = match blocks.get(unit) {
                Some(b) if at + size <= b.shared.bytes.len() => {
                    (Kind::Misaligned, format!("{what} of {size} bytes of {} ", shared_name(env, at)))
                }
                Some(b) => {
                    let n = b.shared.bytes.len();
                    (Kind::OutOfBounds, format!("{what} of {size} bytes at byte {at} of {n} bytes of shared memory"))
                }
                None => (
                    Kind::OutOfBounds,
                    format!("{what} in shared memory of block {unit} of a cluster of {}", blocks.len()),
                ),
            };
            self.find(env, sink, blocks, common, kind, pc, lane as u32, Some(a[lane]), || text);
        }
        good
    }

    /// Lanes of a generic access by space, most of them at once.
    fn by_space(a: &Lanes, mask: u32) -> [(Space, u32); 5] {
        let mut all = [Space::Global, Space::Shared, Space::Local, Space::Const, Space::Param].map(|s| (s, 0));
        for lane in lanes(mask) {
            let k = (a[lane] >> 56) as usize;
            all[if k < 5 { k } else { 0 }].1 |= 1 << lane;
        }
        all
    }

    #[allow(clippy::too_many_arguments)]
    pub fn load(
        &mut self,
        x: &Access,
        pc: u32,
        mask: u32,
        env: &Env,
        sink: &mut Sink,
        blocks: &mut [Block],
        common: &mut Common,
    ) {
        let a = self.addresses(x.address, x.offset);
        if x.space == Space::Generic {
            for (space, m) in Self::by_space(&a, mask) {
                if m != 0 {
                    self.load_from(space, x, &a, pc, m, env, sink, blocks, common);
                }
            }
        } else {
            self.load_from(x.space, x, &a, pc, mask, env, sink, blocks, common);
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn load_from(
        &mut self,
        space: Space,
        x: &Access,
        a: &Lanes,
        pc: u32,
        mask: u32,
        env: &Env,
        sink: &mut Sink,
        blocks: &mut [Block],
        common: &mut Common,
    ) {
        let width = x.width as usize;
        let size = width * x.regs.len();
        let mut spots = [Spot::default(); 32];
        let good;
        match space {
            Space::Global | Space::Generic => {
                good = self.global_spots(a, size, pc, mask, false, env, sink, blocks, common, &mut spots);
                if good != 0 {
                    let way = if x.strong { Way::Past } else { Way::Load };
                    self.count_global(a, size, pc, good, way, env, sink, common);
                }
                for lane in lanes(good) {
                    let s = spots[lane];
                    let side = Side { cluster: common.id, actor: self.actor(pc, lane as u32) };
                    if let Some(c) = env.shadows[s.unit].read(s.at, size, lane as u32, x.strong, &side)
                        && (env.options.uninitialised || c != GlobalClash::Uninitialised)
                    {
                        self.global_clash(c, s, false, pc, lane, env, sink, blocks, common);
                    }
                }
                let held = (x.strong && width == 8)
                    .then(|| env.memory.wide.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
                for (k, reg) in x.regs.iter().enumerate() {
                    let Some(dst) = reg else { continue };
                    let d = &mut self.regs[*dst as usize];
                    for lane in lanes(good) {
                        let s = spots[lane];
                        d[lane] = env.memory.buffers[s.unit].load(s.at + k * width, x.width);
                    }
                }
                drop(held);
                // After the location was read: what its writer handed on before is there.
                if x.strong {
                    self.acquire(a, good, env, common);
                }
            }
            Space::Shared => {
                good = self.shared_spots(a, size, pc, mask, false, env, sink, blocks, common, &mut spots);
                if good != 0 {
                    self.count_shared(a, size, pc, good, sink);
                }
                for lane in lanes(good) {
                    let s = spots[lane];
                    let actor = self.actor(pc, lane as u32);
                    if let Some(c) = blocks[s.unit].shared.read(s.at, size, lane as u32, x.strong, &actor) {
                        let who = self.who(env, blocks, common, lane as u32);
                        self.shared_clash(c, s, false, pc, lane, env, sink, who);
                    }
                }
                for (k, reg) in x.regs.iter().enumerate() {
                    let Some(dst) = reg else { continue };
                    let d = &mut self.regs[*dst as usize];
                    for lane in lanes(good) {
                        let s = spots[lane];
                        d[lane] = blocks[s.unit].shared.load(s.at + k * width, x.width);
                    }
                }
                if x.strong {
                    self.acquire(a, good, env, common);
                }
            }
            Space::Local => {
                good = self.local_spots(a, size, pc, mask, env, sink, blocks, common, &mut spots);
                if env.options.uninitialised {
                    for lane in lanes(good) {
                        let s = spots[lane];
                        if self.local_written[s.at..s.at + size].contains(&0) {
                            let at = s.at - lane * env.program.local_bytes as usize;
                            let text = || format!("{} was never written by this thread", local_name(env, at));
                            let who = self.who(env, blocks, common, lane as u32);
                            sink.findings.add(env.program, Kind::Uninitialised, pc, None, who, Some(a[lane]), text);
                        }
                    }
                }
                for (k, reg) in x.regs.iter().enumerate() {
                    let Some(dst) = reg else { continue };
                    for lane in lanes(good) {
                        let from = spots[lane].at + k * width;
                        let mut b = [0u8; 8];
                        b[..width].copy_from_slice(&self.local[from..from + width]);
                        self.regs[*dst as usize][lane] = u64::from_le_bytes(b);
                    }
                }
            }
            Space::Const | Space::Param => {
                let (bytes, name) =
                    if space == Space::Const { (env.constants, "constant") } else { (env.params, "parameter") };
                let mut ok = 0;
                for lane in lanes(mask) {
                    let at = (a[lane] & ((1 << 56) - 1)) as usize;
                    if at.checked_add(size).is_some_and(|end| end <= bytes.len()) && at.is_multiple_of(width) {
                        spots[lane].at = at;
                        ok |= 1 << lane;
                    } else {
                        let text =
                            || format!("a load of {size} bytes at byte {at} of {} of {name} memory", bytes.len());
                        self.find(env, sink, blocks, common, Kind::OutOfBounds, pc, lane as u32, Some(a[lane]), text);
                    }
                }
                good = ok;
                for (k, reg) in x.regs.iter().enumerate() {
                    let Some(dst) = reg else { continue };
                    for lane in lanes(good) {
                        let from = spots[lane].at + k * width;
                        let mut b = [0u8; 8];
                        b[..width].copy_from_slice(&bytes[from..from + width]);
                        self.regs[*dst as usize][lane] = u64::from_le_bytes(b);
                    }
                }
            }
        }
        if good != mask {
            for dst in x.regs.iter().flatten() {
                let keep = if width == 8 { u64::MAX } else { (1 << (8 * width)) - 1 };
                self.put(*dst, mask & !good, &[POISON & keep; 32]);
            }
        }
        if x.sign_extend > 0 && width < 8 {
            let keep = if x.sign_extend == 8 { u64::MAX } else { (1 << (8 * x.sign_extend)) - 1 };
            for dst in x.regs.iter().flatten() {
                let d = &mut self.regs[*dst as usize];
                for lane in lanes(mask) {
                    let shift = 64 - 8 * width as u32;
                    d[lane] = ((d[lane] << shift) as i64 >> shift) as u64 & keep;
                }
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn local_spots(
        &self,
        a: &Lanes,
        size: usize,
        pc: u32,
        mask: u32,
        env: &Env,
        sink: &mut Sink,
        blocks: &[Block],
        common: &Common,
        spots: &mut [Spot; 32],
    ) -> u32 {
        let all = env.program.local_bytes as usize;
        let mut good = 0;
        for lane in lanes(mask) {
            let at = (a[lane] & ((1 << 56) - 1)) as usize;
            let inside = at.checked_add(size).is_some_and(|end| end <= all) && in_variable(env, at, size);
            if inside && at.is_multiple_of(size) {
                spots[lane].at = lane * all + at;
                good |= 1 << lane;
            } else {
                let (kind, text) = if inside {
                    (Kind::Misaligned, format!("{size} bytes of {}", local_name(env, at)))
                } else {
                    (Kind::OutOfBounds, format!("{size} bytes at byte {at} of {all} bytes of local memory"))
                };
                self.find(env, sink, blocks, common, kind, pc, lane as u32, Some(a[lane]), || text);
            }
        }
        good
    }

    #[allow(clippy::too_many_arguments)]
    pub fn store(
        &mut self,
        x: &Access,
        pc: u32,
        mask: u32,
        env: &Env,
        sink: &mut Sink,
        blocks: &mut [Block],
        common: &mut Common,
    ) {
        let a = self.addresses(x.address, x.offset);
        if x.space == Space::Generic {
            for (space, m) in Self::by_space(&a, mask) {
                if m != 0 {
                    self.store_to(space, x, &a, pc, m, env, sink, blocks, common);
                }
            }
        } else {
            self.store_to(x.space, x, &a, pc, mask, env, sink, blocks, common);
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn store_to(
        &mut self,
        space: Space,
        x: &Access,
        a: &Lanes,
        pc: u32,
        mask: u32,
        env: &Env,
        sink: &mut Sink,
        blocks: &mut [Block],
        common: &mut Common,
    ) {
        let width = x.width as usize;
        let size = width * x.regs.len();
        let keep = if width == 8 { u64::MAX } else { (1 << (8 * width)) - 1 };
        let mut spots = [Spot::default(); 32];
        match space {
            Space::Global | Space::Generic => {
                let good = self.global_spots(a, size, pc, mask, true, env, sink, blocks, common, &mut spots);
                if good != 0 {
                    self.count_global(a, size, pc, good, Way::Store, env, sink, common);
                }
                if x.strong {
                    self.publish(x.release, a, good, env, common);
                }
                for lane in lanes(good) {
                    let s = spots[lane];
                    let buffer = &env.memory.buffers[s.unit];
                    let mut same = true;
                    let value = |k: usize| x.regs[k].map_or(0, |r| self.regs[r as usize][lane]) & keep;
                    for k in 0..x.regs.len() {
                        same &= buffer.load(s.at + k * width, x.width) == value(k);
                    }
                    let side = Side { cluster: common.id, actor: self.actor(pc, lane as u32) };
                    if let Some(c) = env.shadows[s.unit].write(s.at, size, lane as u32, x.strong, same, &side) {
                        self.global_clash(c, s, true, pc, lane, env, sink, blocks, common);
                    }
                    let held = (x.strong && width == 8)
                        .then(|| env.memory.wide.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
                    if !same {
                        for k in 0..x.regs.len() {
                            buffer.store(s.at + k * width, x.width, value(k));
                        }
                    }
                    drop(held);
                }
                common.events += u64::from(x.strong);
            }
            Space::Shared => {
                let good = self.shared_spots(a, size, pc, mask, true, env, sink, blocks, common, &mut spots);
                if good != 0 {
                    self.count_shared(a, size, pc, good, sink);
                }
                if x.strong {
                    self.publish(x.release, a, good, env, common);
                    common.events += 1;
                }
                for lane in lanes(good) {
                    let s = spots[lane];
                    let value = |k: usize| x.regs[k].map_or(0, |r| self.regs[r as usize][lane]) & keep;
                    let shared = &mut blocks[s.unit].shared;
                    let mut same = shared.is_written(s.at);
                    for k in 0..x.regs.len() {
                        same &= shared.load(s.at + k * width, x.width) == value(k);
                    }
                    let clash = shared.write(s.at, size, lane as u32, x.strong, same, &self.actor(pc, lane as u32));
                    for k in 0..x.regs.len() {
                        shared.store(s.at + k * width, x.width, value(k));
                    }
                    if let Some(c) = clash {
                        let who = self.who(env, blocks, common, lane as u32);
                        self.shared_clash(c, s, true, pc, lane, env, sink, who);
                    }
                }
            }
            Space::Local => {
                let good = self.local_spots(a, size, pc, mask, env, sink, blocks, common, &mut spots);
                for lane in lanes(good) {
                    let at = spots[lane].at;
                    for (k, r) in x.regs.iter().enumerate() {
                        let v = r.map_or(0, |r| self.regs[r as usize][lane]).to_le_bytes();
                        let to = at + k * width;
                        self.local[to..to + width].copy_from_slice(&v[..width]);
                        self.local_written[to..to + width].fill(1);
                    }
                }
            }
            Space::Const | Space::Param => {
                let lane = mask.trailing_zeros();
                let text = || "a store to memory that can only be read".into();
                self.find(env, sink, blocks, common, Kind::ReadOnlyWrite, pc, lane, Some(a[lane as usize]), text);
            }
        }
    }

    /// Hands on what lanes know by strong writes at addresses, if a fence or the write itself releases it.
    pub fn publish(&mut self, release: bool, a: &Lanes, mask: u32, env: &Env, common: &mut Common) {
        if release {
            self.clock += 1;
            for l in lanes(mask) {
                (self.fenced[l], self.fenced_block[l]) = (self.clock, self.clock);
            }
        }
        for lane in lanes(mask) {
            if self.fenced_block[lane] == 0 {
                continue;
            }
            let past_at = |clock: u32| {
                let mut past = self.views.of(lane as u32).clone();
                past.add(self.index, 1 << lane, self.live, clock);
                past
            };
            common.flags.entry(a[lane]).or_default().join(&past_at(self.fenced_block[lane]));
            if self.fenced[lane] != 0 && window_of(a[lane]) == Space::Global {
                env.releases.release(a[lane], common.id, &past_at(self.fenced[lane]));
            }
        }
    }

    /// Lanes learn what was handed on by strong writes where they read.
    pub fn acquire(&mut self, a: &Lanes, mask: u32, env: &Env, common: &Common) {
        for lane in lanes(mask) {
            if let Some(past) = common.flags.get(&a[lane]) {
                self.learn(1 << lane, past);
            }
            if let Some(known) = env.releases.acquire(a[lane]) {
                self.learn_known(1 << lane, common.id, &known);
            }
        }
    }

    /// Copies within a thread's local memory, for calls.
    pub fn copy_local(&mut self, copies: &[(u32, u32, u32)], lane: usize, local_bytes: usize) {
        for &(from, to, n) in copies {
            let (from, to) = (lane * local_bytes + from as usize, lane * local_bytes + to as usize);
            self.local.copy_within(from..from + n as usize, to);
            self.local_written.copy_within(from..from + n as usize, to);
        }
    }
}
