//! Bulk copies, plain and by tensor map: the asynchronous engine moves bytes between global and shared memory and tells an
//! mbarrier (into shared memory) or a bulk group (out of it).
//!
//! Eager copies happen at once; lazy ones into shared memory when nothing else of the cluster can go on, those out of it
//! when their group is waited for.

use super::atomics::reduce;
use super::cluster::{Block, Common};
use super::mbarrier;
use super::memory::{Spot, offset, shared_place, window_of};
use super::tensor_map::TensorMap;
use super::trouble::shared_name;
use super::warp::Warp;
use super::{Env, Site, lanes};
use crate::check::Kind;
use crate::check::global::{Clash as GlobalClash, Side};
use crate::check::past::Past;
use crate::check::shared::Actor;
use crate::count::Way;
use crate::isa::{Bulk, BulkKind};
use crate::memory::locate;
use crate::parse::ast::Space;

/// A piece of a copy: place in shared memory, place in global memory if there is one, bytes.
#[derive(Clone, Copy)]
struct Piece {
    shared: Spot,
    global: Option<Spot>,
    bytes: usize,
}

/// A copy into shared memory under way.
pub(crate) struct BulkCopy {
    pieces: Vec<Piece>,
    /// Source within shared memory, for copies between blocks.
    source: Option<Spot>,
    mbarriers: Vec<((usize, usize), i64)>,
    warp: u32,
    lane: u32,
    clock: u32,
    /// What the issuing thread knew and did.
    past: Past,
}

/// A copy out of shared memory under way.
pub(crate) struct StoreCopy {
    lane: u32,
    group: u32,
    kind: BulkKind,
    pieces: Vec<Piece>,
}

fn land(c: &BulkCopy, env: &Env, blocks: &mut [Block], events: &mut u64) {
    for p in &c.pieces {
        let mut data = vec![0u8; p.bytes];
        if let Some(g) = p.global {
            env.memory.buffers[g.unit].read(g.at, &mut data);
        } else if let Some(s) = c.source {
            let from = s.at + p.shared.at - c.pieces[0].shared.at;
            data.copy_from_slice(&blocks[s.unit].shared.bytes[from..from + p.bytes]);
        }
        let shared = &mut blocks[p.shared.unit].shared;
        shared.bytes[p.shared.at..p.shared.at + p.bytes].copy_from_slice(&data);
        let actor = Actor { warp: c.warp, clock: c.clock, pc: 0, past: &c.past };
        shared.end_copy(p.shared.at, p.bytes, c.lane, true, &actor);
    }
    for &(place, bytes) in &c.mbarriers {
        mbarrier::complete(blocks, place, bytes, &c.past, events);
    }
}

/// Completes the oldest copy of a cluster; false if there is none.
pub(crate) fn land_one(env: &Env, blocks: &mut [Block], common: &mut Common) -> bool {
    if common.copies.is_empty() {
        return false;
    }
    let i = if env.options.seed == 0 { 0 } else { common.random.below(common.copies.len() as u64) as usize };
    let c = common.copies.remove(i);
    land(&c, env, blocks, &mut common.events);
    true
}

fn store_out(c: &StoreCopy, env: &Env, blocks: &[Block]) {
    for p in &c.pieces {
        let Some(g) = p.global else { continue };
        let data = &blocks[p.shared.unit].shared.bytes[p.shared.at..p.shared.at + p.bytes];
        let buffer = &env.memory.buffers[g.unit];
        match c.kind {
            BulkKind::Reduce(op, ty) => {
                let w = ty.bytes();
                for (i, part) in data.chunks_exact(w).enumerate() {
                    let mut b = [0u8; 8];
                    b[..w].copy_from_slice(part);
                    let b = u64::from_le_bytes(b);
                    buffer.update(g.at + i * w, w as u8, &env.memory.wide, |old| reduce(op, ty, old, b));
                }
            }
            _ => buffer.write(g.at, data),
        }
    }
}

impl Warp {
    pub fn bulk(&mut self, x: &Bulk, mask: u32, site: &mut Site) {
        for lane in lanes(mask) {
            if let Err(text) = self.bulk_lane(x, lane, site) {
                self.find(site, Kind::Operand, lane as u32, None, || text);
            }
        }
    }

    fn bulk_lane(&mut self, x: &Bulk, lane: usize, site: &mut Site) -> Result<(), String> {
        let pc = site.pc;
        let shared = self.addresses(x.shared, x.shared_offset)[lane];
        let global = self.addresses(x.global, x.global_offset)[lane];
        let (rank, base) = shared_place(shared);
        let into = matches!(x.kind, BulkKind::Load | BulkKind::Cluster);
        let mut ranks = vec![rank];
        if let Some(m) = x.multicast {
            let m = self.regs[m as usize][lane] as u32 & 0xffff;
            ranks = (0..site.blocks.len()).filter(|r| m >> r & 1 == 1).collect();
        }
        // What moves: (offset in shared memory, global address, bytes or none outside the tensor).
        let list: Vec<(usize, u64, Option<usize>)> = if x.dims > 0 {
            let map = self.tensor_map(global, site.env)?;
            if map.sizes.len() != usize::from(x.dims) {
                return Err(format!("the tensor map has {} dims, the copy {}", map.sizes.len(), x.dims));
            }
            if !base.is_multiple_of(128) {
                return Err(format!("shared address {base} of a tensor copy must be a multiple of 128"));
            }
            let coords: Vec<i32> = x.coords.iter().map(|c| self.regs[*c as usize][lane] as i32).collect();
            let mut list = map.pieces(&coords);
            // Swizzling goes by addresses, not by offsets in the box; it moves nothing below a multiple of 128.
            for p in &mut list {
                p.0 = map.swizzle.apply(base + p.0) - base;
            }
            if list.iter().any(|p| p.2.is_none()) && !into {
                list.retain(|p| p.2.is_some());
            }
            list.into_iter().map(|(at, from, n)| (at, from, n.or(if into { None } else { Some(0) }))).collect()
        } else {
            let bytes = x.bytes.map_or(0, |b| self.regs[b as usize][lane] as u32) as usize;
            if !bytes.is_multiple_of(16)
                || !base.is_multiple_of(16)
                || (x.kind != BulkKind::Cluster && !global.is_multiple_of(16))
            {
                return Err(format!("sizes and addresses of bulk copies are multiples of 16 (size {bytes})"));
            }
            (0..bytes / 16).map(|i| (16 * i, global + 16 * i as u64, Some(16))).collect()
        };
        if let (BulkKind::Reduce(_, ty), true) = (x.kind, x.dims > 0)
            && usize::from(self.tensor_map(global, site.env)?.element) != ty.bytes()
        {
            return Err("reductions of tensors are known of f32 only".into());
        }
        let element = if x.dims > 0 { usize::from(self.tensor_map(global, site.env)?.element) } else { 16 };
        let total: usize = list.iter().map(|p| p.2.unwrap_or(element)).sum();
        let size = site.blocks.first().map_or(0, |b| b.shared.bytes.len());
        for &r in &ranks {
            if r >= site.blocks.len() || list.iter().any(|p| base + p.0 + p.2.unwrap_or(element) > size) {
                return Err(format!("{total} bytes at byte {base} of {size} bytes of shared memory"));
            }
        }
        let mut pieces = vec![];
        for (k, &r) in ranks.iter().enumerate() {
            for &(at, from, n) in &list {
                let spot = Spot { unit: r, at: base + at };
                let bytes = n.unwrap_or(element);
                let mut place = None;
                if n.is_some() && x.kind != BulkKind::Cluster {
                    let (unit, g) = locate(from);
                    let b = site.env.memory.buffers.get(unit).filter(|_| window_of(from) == Space::Global);
                    let ok = b.is_some_and(|b| g >= 0 && g as usize + bytes <= b.bytes && (into || b.writable));
                    if !ok {
                        let mut a = [0; 32];
                        a[lane] = from;
                        let mut spots = [Spot::default(); 32];
                        self.global_spots(&a, bytes, 1 << lane, !into, site, &mut spots);
                        continue;
                    }
                    let g = Spot { unit, at: g as usize };
                    place = Some(g);
                    if k == 0 {
                        self.watch_global(g, bytes, x.kind, lane, site);
                    }
                }
                let actor = self.actor(pc, lane as u32);
                let memory = &mut site.blocks[r].shared;
                let clash = if into {
                    // Elements at an end of the tensor come one by one: their 16 bytes are one place.
                    let first = spot.at.is_multiple_of(16);
                    first.then(|| memory.begin_copy(spot.at, 16, lane as u32, &actor)).flatten()
                } else {
                    memory.async_read(spot.at, bytes, lane as u32, &actor, &site.common.proxied)
                };
                if into && site.env.options.lazy {
                    memory.bytes[spot.at..spot.at + bytes].fill(0xff);
                }
                if let Some(c) = clash {
                    self.shared_clash(c, spot, into, lane, site);
                }
                pieces.push(Piece { shared: spot, global: place, bytes });
            }
        }
        if into {
            let mut mbarriers = vec![];
            if let Some((slot, offset)) = x.mbarrier {
                let (owner, at) = shared_place(self.addresses(slot, offset)[lane]);
                // Each block that a multicast reaches signals its own.
                for &r in &ranks {
                    let r = if x.multicast.is_some() { r } else { owner };
                    let bar = site.blocks.get(r).and_then(|b| b.mbarriers.iter().find(|m| m.is_at(at)));
                    let Some(bar) = bar else {
                        return Err(format!("there is no mbarrier at {}", shared_name(site.env, at)));
                    };
                    if let Some(text) = bar.unready(self.index * 32 + lane as u32, self.views.of(lane as u32)) {
                        return Err(format!("the mbarrier at {}: {text}", shared_name(site.env, at)));
                    }
                    mbarriers.push(((r, at), total as i64));
                }
            }
            let source = (x.kind == BulkKind::Cluster).then(|| {
                let (unit, at) = shared_place(global);
                Spot { unit, at }
            });
            if source.is_some_and(|s| s.unit >= site.blocks.len() || s.at + total > size) {
                return Err("the source lies outside shared memory".into());
            }
            if let Some(s) = source {
                let actor = self.actor(pc, lane as u32);
                let clash =
                    site.blocks[s.unit].shared.async_read(s.at, total, lane as u32, &actor, &site.common.proxied);
                if let Some(c) = clash {
                    self.shared_clash(c, s, false, lane, site);
                }
            }
            let clock = self.clock;
            self.clock += 1;
            let mut past = Past::default();
            self.hand_on(1 << lane, &mut past);
            let copy = BulkCopy { pieces, source, mbarriers, warp: self.index, lane: lane as u32, clock, past };
            if site.env.options.lazy {
                site.common.copies.push(copy);
            } else {
                land(&copy, site.env, site.blocks, &mut site.common.events);
            }
        } else {
            let copy = StoreCopy { lane: lane as u32, group: self.copies.bulk_groups[lane], kind: x.kind, pieces };
            if site.env.options.lazy {
                self.copies.bulk.push(copy);
            } else {
                store_out(&copy, site.env, site.blocks);
            }
        }
        Ok(())
    }

    fn watch_global(&self, g: Spot, bytes: usize, kind: BulkKind, lane: usize, site: &mut Site) {
        let pc = site.pc;
        let load = kind == BulkKind::Load;
        let side = Side { cluster: site.common.id, actor: self.actor(pc, lane as u32) };
        let shadow = &site.env.shadows[g.unit];
        let clash = match kind {
            BulkKind::Reduce(..) => {
                let read = shadow.read(g.at, bytes, lane as u32, true, &side);
                read.or(shadow.write(g.at, bytes, lane as u32, true, false, &side))
            }
            _ if load => shadow.read(g.at, bytes, lane as u32, false, &side),
            _ => shadow.write(g.at, bytes, lane as u32, false, false, &side),
        };
        if let Some(c) = clash.filter(|&c| site.env.options.uninitialised || c != GlobalClash::Uninitialised) {
            self.global_clash(c, g, !load, lane, site);
        }
        // Neighbouring pieces share a sector: count it with its first.
        let sector = u64::from(g.at.is_multiple_of(32));
        if site.env.options.footprint && sector == 1 {
            let way = if load { Way::Past } else { Way::Store };
            site.sink.moves(site.common.footprint.access(g.unit, g.at / 32, way), g.unit, pc);
        }
        let t = &mut site.sink.traffic[g.unit];
        if load {
            t.read_bytes += bytes as u64;
            t.read_sectors += sector;
        } else {
            t.write_bytes += bytes as u64;
            t.write_sectors += sector;
        }
        site.sink.pcs[pc as usize].sectors += sector;
    }

    fn tensor_map(&self, address: u64, env: &Env) -> Result<TensorMap, String> {
        let bad = || "the tensor map can't be read: make it by TensorMap::encode".to_string();
        let mut bytes = [0u8; 128];
        let at = offset(address);
        match window_of(address) {
            Space::Param => bytes.copy_from_slice(env.params.get(at..at + 128).ok_or_else(bad)?),
            Space::Const => bytes.copy_from_slice(env.constants.get(at..at + 128).ok_or_else(bad)?),
            _ => {
                let (unit, at) = locate(address);
                let b = env.memory.buffers.get(unit).ok_or_else(bad)?;
                if at < 0 || at as usize + 128 > b.bytes {
                    return Err(bad());
                }
                b.read(at as usize, &mut bytes);
            }
        }
        TensorMap::decode(&bytes).ok_or_else(bad)
    }

    pub fn bulk_commit(&mut self, mask: u32) {
        for lane in lanes(mask) {
            self.copies.bulk_groups[lane] += 1;
        }
    }

    pub fn bulk_wait(&mut self, keep: u32, mask: u32, env: &Env, blocks: &[Block]) {
        let pending = std::mem::take(&mut self.copies.bulk);
        for c in pending {
            let lane = c.lane as usize;
            if mask >> lane & 1 == 1 && c.group + keep < self.copies.bulk_groups[lane] {
                store_out(&c, env, blocks);
            } else {
                self.copies.bulk.push(c);
            }
        }
    }
}
