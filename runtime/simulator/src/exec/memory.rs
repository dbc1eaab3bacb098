//! Loads and stores of all spaces, with their checks and counts.

use super::cluster::Common;
use super::trouble::{in_variable, local_name, shared_name};
use super::warp::Warp;
use super::{Env, Site, lanes};
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

/// Where a generic address lies in its window.
pub(crate) fn offset(address: u64) -> usize {
    (address & ((1 << 56) - 1)) as usize
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

    /// Where lanes access memory: those that `place` finds nothing for are findings, the others may go on.
    #[inline(always)]
    fn spots(
        &self,
        a: &Lanes,
        mask: u32,
        site: &mut Site,
        spots: &mut [Spot; 32],
        place: impl Fn(&Site, usize) -> Result<Spot, (Kind, String)>,
    ) -> u32 {
        let mut good = 0;
        for lane in lanes(mask) {
            match place(site, lane) {
                Ok(spot) => {
                    spots[lane] = spot;
                    good |= 1 << lane;
                }
                Err((kind, text)) => self.find(site, kind, lane as u32, Some(a[lane]), || text),
            }
        }
        good
    }

    /// [`spots`](Self::spots) in global memory.
    pub fn global_spots(
        &self,
        a: &Lanes,
        size: usize,
        mask: u32,
        store: bool,
        site: &mut Site,
        spots: &mut [Spot; 32],
    ) -> u32 {
        if site.env.early && mask & !self.waited != 0 {
            self.too_early(a, size, mask & !self.waited, store, site);
        }
        self.spots(a, mask, site, spots, |site, lane| {
            let (unit, at) = locate(a[lane]);
            let fits = site.env.memory.buffers.get(unit).is_some_and(|b| {
                at >= 0 && at as usize + size <= b.bytes && (at as usize).is_multiple_of(size) && (!store || b.writable)
            });
            if fits {
                Ok(Spot { unit, at: at as usize })
            } else {
                Err(self.global_trouble(a[lane], size, store, site.env))
            }
        })
    }

    /// Accesses of threads that have not waited for earlier launches, of a launch that begins before these have ended.
    fn too_early(&self, a: &Lanes, size: usize, mask: u32, store: bool, site: &mut Site) {
        for lane in lanes(mask) {
            let (unit, at) = locate(a[lane]);
            let Some(b) = site.env.memory.buffers.get(unit) else { continue };
            let fresh = |at: usize| b.written.get(at..at + size).is_some_and(|w| w.contains(&FRESH));
            if at >= 0 && (store || fresh(at as usize)) {
                let what = if store { "a write to" } else { "a read of what an earlier launch writes, " };
                let text = || format!("{what} byte {at} of buffer \"{}\" before griddepcontrol.wait", b.name);
                self.find(site, Kind::Early, lane as u32, Some(a[lane]), text);
            }
        }
    }

    /// Counts sectors and bytes by buffer.
    pub fn count_global(&self, a: &Lanes, size: usize, mask: u32, way: Way, site: &mut Site) {
        let pc = site.pc;
        let (sectors, n) = count::sectors(a, mask);
        let store = way.stores();
        if site.env.options.footprint {
            for s in &sectors[..n] {
                let (unit, at) = locate(s << 5);
                site.sink.moves(site.common.footprint.access(unit, at as usize / 32, way), unit, pc);
            }
        }
        site.sink.pcs[pc as usize].sectors += n as u64;
        let mut i = 0;
        while i < n {
            let unit = locate(sectors[i] << 5).0;
            let mut k = i + 1;
            while k < n && locate(sectors[k] << 5).0 == unit {
                k += 1;
            }
            let t = &mut site.sink.traffic[unit];
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
            let t = &mut site.sink.traffic[unit];
            if store { t.write_bytes += bytes } else { t.read_bytes += bytes }
        };
        if whole {
            add(first, u64::from(mask.count_ones()) * size as u64);
        } else {
            lanes(mask).for_each(|l| add(locate(a[l]).0, size as u64));
        }
    }

    /// Counts passes through shared memory.
    pub fn count_shared(&self, a: &Lanes, size: usize, mask: u32, site: &mut Site) {
        let pc = site.pc;
        let (passes, conflicts) = count::banks(a, mask, size);
        let c = &mut site.sink.pcs[pc as usize];
        c.passes += passes;
        c.conflicts += conflicts;
    }

    /// [`spots`](Self::spots) in shared memory.
    pub fn shared_spots(
        &self,
        a: &Lanes,
        size: usize,
        mask: u32,
        store: bool,
        site: &mut Site,
        spots: &mut [Spot; 32],
    ) -> u32 {
        let what = if store { "a store" } else { "a load" };
        self.spots(a, mask, site, spots, |site, lane| {
            let (unit, at) = shared_place(a[lane]);
            let Some(b) = site.blocks.get(unit) else {
                let text = format!("{what} in shared memory of block {unit} of a cluster of {}", site.blocks.len());
                return Err((Kind::OutOfBounds, text));
            };
            let n = b.shared.bytes.len();
            if at + size > n {
                let text = format!("{what} of {size} bytes at byte {at} of {n} bytes of shared memory");
                return Err((Kind::OutOfBounds, text));
            }
            if !at.is_multiple_of(size) {
                return Err((Kind::Misaligned, format!("{what} of {size} bytes of {} ", shared_name(site.env, at))));
            }
            Ok(Spot { unit, at })
        })
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

    pub fn load(&mut self, x: &Access, mask: u32, site: &mut Site) {
        let a = self.addresses(x.address, x.offset);
        if x.space == Space::Generic {
            for (space, m) in Self::by_space(&a, mask) {
                if m != 0 {
                    self.load_from(space, x, &a, m, site);
                }
            }
        } else {
            self.load_from(x.space, x, &a, mask, site);
        }
    }

    fn load_from(&mut self, space: Space, x: &Access, a: &Lanes, mask: u32, site: &mut Site) {
        let pc = site.pc;
        let width = x.width as usize;
        let size = width * x.regs.len();
        let mut spots = [Spot::default(); 32];
        let good;
        match space {
            Space::Global | Space::Generic => {
                good = self.global_spots(a, size, mask, false, site, &mut spots);
                if good != 0 {
                    let way = if x.strong { Way::Past } else { Way::Load };
                    self.count_global(a, size, good, way, site);
                }
                for lane in lanes(good) {
                    let s = spots[lane];
                    let side = Side { cluster: site.common.id, actor: self.actor(pc, lane as u32) };
                    if let Some(c) = site.env.shadows[s.unit].read(s.at, size, lane as u32, x.strong, &side)
                        && (site.env.options.uninitialised || c != GlobalClash::Uninitialised)
                    {
                        self.global_clash(c, s, false, lane, site);
                    }
                }
                let held = (x.strong && width == 8)
                    .then(|| site.env.memory.wide.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
                for (k, reg) in x.regs.iter().enumerate() {
                    let Some(dst) = reg else { continue };
                    let d = &mut self.regs[*dst as usize];
                    for lane in lanes(good) {
                        let s = spots[lane];
                        d[lane] = site.env.memory.buffers[s.unit].load(s.at + k * width, x.width);
                    }
                }
                drop(held);
                // After the location was read: what its writer handed on before is there.
                if x.strong {
                    self.acquire(a, good, site.env, site.common);
                }
            }
            Space::Shared => {
                good = self.shared_spots(a, size, mask, false, site, &mut spots);
                if good != 0 {
                    self.count_shared(a, size, good, site);
                }
                for lane in lanes(good) {
                    let s = spots[lane];
                    let actor = self.actor(pc, lane as u32);
                    if let Some(c) = site.blocks[s.unit].shared.read(s.at, size, lane as u32, x.strong, &actor) {
                        self.shared_clash(c, s, false, lane, site);
                    }
                }
                for (k, reg) in x.regs.iter().enumerate() {
                    let Some(dst) = reg else { continue };
                    let d = &mut self.regs[*dst as usize];
                    for lane in lanes(good) {
                        let s = spots[lane];
                        d[lane] = site.blocks[s.unit].shared.load(s.at + k * width, x.width);
                    }
                }
                if x.strong {
                    self.acquire(a, good, site.env, site.common);
                }
            }
            Space::Local => {
                good = self.local_spots(a, size, mask, site, &mut spots);
                if site.env.options.uninitialised {
                    for lane in lanes(good) {
                        let s = spots[lane];
                        if self.local_written[s.at..s.at + size].contains(&0) {
                            let at = s.at - lane * site.env.program.local_bytes as usize;
                            let text = || format!("{} was never written by this thread", local_name(site.env, at));
                            let who = self.who(site.env, site.blocks, site.common, lane as u32);
                            site.sink.findings.add(
                                site.env.program,
                                Kind::Uninitialised,
                                pc,
                                None,
                                who,
                                Some(a[lane]),
                                text,
                            );
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
                let (bytes, name) = if space == Space::Const {
                    (site.env.constants, "constant")
                } else {
                    (site.env.params, "parameter")
                };
                good = self.spots(a, mask, site, &mut spots, |_, lane| {
                    let (at, all) = (offset(a[lane]), bytes.len());
                    if at.checked_add(size).is_some_and(|end| end <= all) && at.is_multiple_of(width) {
                        return Ok(Spot { unit: 0, at });
                    }
                    let text = format!("a load of {size} bytes at byte {at} of {all} of {name} memory");
                    Err((Kind::OutOfBounds, text))
                });
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

    /// [`spots`](Self::spots) in the threads' local memory.
    fn local_spots(&self, a: &Lanes, size: usize, mask: u32, site: &mut Site, spots: &mut [Spot; 32]) -> u32 {
        let all = site.env.program.local_bytes as usize;
        self.spots(a, mask, site, spots, |site, lane| {
            let at = offset(a[lane]);
            if at.checked_add(size).is_none_or(|end| end > all) || !in_variable(site.env, at, size) {
                let text = format!("{size} bytes at byte {at} of {all} bytes of local memory");
                return Err((Kind::OutOfBounds, text));
            }
            if !at.is_multiple_of(size) {
                return Err((Kind::Misaligned, format!("{size} bytes of {}", local_name(site.env, at))));
            }
            Ok(Spot { unit: 0, at: lane * all + at })
        })
    }

    pub fn store(&mut self, x: &Access, mask: u32, site: &mut Site) {
        let a = self.addresses(x.address, x.offset);
        if x.space == Space::Generic {
            for (space, m) in Self::by_space(&a, mask) {
                if m != 0 {
                    self.store_to(space, x, &a, m, site);
                }
            }
        } else {
            self.store_to(x.space, x, &a, mask, site);
        }
    }

    fn store_to(&mut self, space: Space, x: &Access, a: &Lanes, mask: u32, site: &mut Site) {
        let pc = site.pc;
        let width = x.width as usize;
        let size = width * x.regs.len();
        let keep = if width == 8 { u64::MAX } else { (1 << (8 * width)) - 1 };
        let mut spots = [Spot::default(); 32];
        match space {
            Space::Global | Space::Generic => {
                let good = self.global_spots(a, size, mask, true, site, &mut spots);
                if good != 0 {
                    self.count_global(a, size, good, Way::Store, site);
                }
                if x.strong {
                    self.publish(x.release, a, good, site.env, site.common);
                }
                for lane in lanes(good) {
                    let s = spots[lane];
                    let buffer = &site.env.memory.buffers[s.unit];
                    let mut same = true;
                    let value = |k: usize| x.regs[k].map_or(0, |r| self.regs[r as usize][lane]) & keep;
                    for k in 0..x.regs.len() {
                        same &= buffer.load(s.at + k * width, x.width) == value(k);
                    }
                    let side = Side { cluster: site.common.id, actor: self.actor(pc, lane as u32) };
                    if let Some(c) = site.env.shadows[s.unit].write(s.at, size, lane as u32, x.strong, same, &side) {
                        self.global_clash(c, s, true, lane, site);
                    }
                    let held = (x.strong && width == 8)
                        .then(|| site.env.memory.wide.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
                    if !same {
                        for k in 0..x.regs.len() {
                            buffer.store(s.at + k * width, x.width, value(k));
                        }
                    }
                    drop(held);
                }
                site.common.events += u64::from(x.strong);
            }
            Space::Shared => {
                let good = self.shared_spots(a, size, mask, true, site, &mut spots);
                if good != 0 {
                    self.count_shared(a, size, good, site);
                }
                if x.strong {
                    self.publish(x.release, a, good, site.env, site.common);
                    site.common.events += 1;
                }
                for lane in lanes(good) {
                    let s = spots[lane];
                    let value = |k: usize| x.regs[k].map_or(0, |r| self.regs[r as usize][lane]) & keep;
                    let shared = &mut site.blocks[s.unit].shared;
                    let mut same = shared.is_written(s.at);
                    for k in 0..x.regs.len() {
                        same &= shared.load(s.at + k * width, x.width) == value(k);
                    }
                    let clash = shared.write(s.at, size, lane as u32, x.strong, same, &self.actor(pc, lane as u32));
                    for k in 0..x.regs.len() {
                        shared.store(s.at + k * width, x.width, value(k));
                    }
                    if let Some(c) = clash {
                        self.shared_clash(c, s, true, lane, site);
                    }
                }
            }
            Space::Local => {
                let good = self.local_spots(a, size, mask, site, &mut spots);
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
                self.find(site, Kind::ReadOnlyWrite, lane, Some(a[lane as usize]), text);
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
