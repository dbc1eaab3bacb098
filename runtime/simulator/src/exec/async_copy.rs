//! `cp.async`: copies of 4 to 16 bytes into shared memory that a thread waits for in groups.
//!
//! Between issue and wait the destination belongs to the copy: any access is a finding.  Eager copies happen at once,
//! lazy ones when they are waited for, and until then their destination holds ones.

use super::cluster::Block;
use super::memory::Spot;
use super::warp::Warp;
use super::{Env, Site, lanes};
use crate::check::global::{Clash as GlobalClash, Side};
use crate::count::Way;
use crate::isa::CpAsync;

struct Copy {
    lane: u32,
    group: u32,
    to: Spot,
    bytes: usize,
    /// Source, and bytes of it; the rest is zero.
    from: Option<Spot>,
    from_bytes: usize,
}

#[derive(Default)]
pub(crate) struct Copies {
    pending: Vec<Copy>,
    /// Of each lane: groups committed.
    groups: [u32; 32],
    pub bulk: Vec<super::bulk::StoreCopy>,
    pub bulk_groups: [u32; 32],
}

fn fill(c: &Copy, env: &Env, blocks: &mut [Block]) {
    let shared = &mut blocks[c.to.unit].shared;
    let mut data = [0u8; 16];
    if let Some(f) = c.from {
        env.memory.buffers[f.unit].read(f.at, &mut data[..c.from_bytes]);
    }
    shared.bytes[c.to.at..c.to.at + c.bytes].copy_from_slice(&data[..c.bytes]);
}

impl Warp {
    pub fn copy_async(&mut self, x: &CpAsync, mask: u32, site: &mut Site) {
        let pc = site.pc;
        let to = self.addresses(x.dst, x.dst_offset);
        let from = self.addresses(x.src, x.src_offset);
        let bytes = x.bytes as usize;
        let mut places = [Spot::default(); 32];
        let good = self.shared_spots(&to, bytes, mask, true, site, &mut places);
        let ignored = x.ignore.map_or(0, |p| p.mask(&self.preds));
        let mut sizes = [bytes; 32];
        if let Some(r) = x.src_bytes {
            for (s, &r) in sizes.iter_mut().zip(&self.regs[r as usize]) {
                *s = bytes.min(r as u32 as usize);
            }
        }
        let mut reads = 0;
        for lane in lanes(good & !ignored) {
            reads |= u32::from(sizes[lane] > 0) << lane;
        }
        // Alignment is that of the whole size, bounds are those of what is read.
        let mut sources = [Spot::default(); 32];
        let whole = lanes(reads).filter(|&l| sizes[l] == bytes).fold(0u32, |m, l| m | 1 << l);
        let mut read = self.global_spots(&from, bytes, whole, false, site, &mut sources);
        for lane in lanes(reads & !whole) {
            let (unit, at) = crate::memory::locate(from[lane]);
            let inside =
                site.env.memory.buffers.get(unit).is_some_and(|b| at >= 0 && at as usize + sizes[lane] <= b.bytes);
            if inside && (at as usize).is_multiple_of(bytes) {
                sources[lane] = Spot { unit, at: at as usize };
                read |= 1 << lane;
            } else {
                self.global_spots(&from, bytes, 1 << lane, false, site, &mut sources);
            }
        }
        if good != 0 {
            self.count_shared(&to, bytes, good, site);
        }
        if read != 0 {
            self.count_global(&from, bytes, read, Way::Past, site);
        }
        for lane in lanes(good) {
            let source = (read >> lane & 1 == 1).then_some(sources[lane]);
            if let Some(s) = source {
                let side = Side { cluster: site.common.id, actor: self.actor(pc, lane as u32) };
                if let Some(c) = site.env.shadows[s.unit].read(s.at, sizes[lane], lane as u32, false, &side)
                    && (site.env.options.uninitialised || c != GlobalClash::Uninitialised)
                {
                    self.global_clash(c, s, false, lane, site);
                }
            }
            let to = places[lane];
            let clash = site.blocks[to.unit].shared.begin_copy(to.at, bytes, lane as u32, &self.actor(pc, lane as u32));
            if let Some(c) = clash {
                self.shared_clash(c, to, true, lane, site);
            }
            let group = self.copies.groups[lane];
            let from_bytes = if source.is_some() { sizes[lane] } else { 0 };
            let copy = Copy { lane: lane as u32, group, to, bytes, from: source, from_bytes };
            if site.env.options.lazy {
                site.blocks[to.unit].shared.bytes[to.at..to.at + bytes].fill(0xff);
            } else {
                fill(&copy, site.env, site.blocks);
            }
            self.copies.pending.push(copy);
        }
    }

    pub fn commit(&mut self, mask: u32) {
        for lane in lanes(mask) {
            self.copies.groups[lane] += 1;
        }
    }

    /// Completes the copies of lanes in all but their `keep` last groups, or all copies.
    pub fn wait_copies(&mut self, keep: Option<u32>, mask: u32, env: &Env, blocks: &mut [Block]) {
        let mut pending = std::mem::take(&mut self.copies.pending);
        pending.retain(|c| {
            let lane = c.lane as usize;
            let due = match keep {
                None => true,
                Some(n) => c.group + n < self.copies.groups[lane],
            };
            if mask >> lane & 1 == 0 || !due {
                return true;
            }
            if env.options.lazy {
                fill(c, env, blocks);
            }
            let actor = self.actor(0, c.lane);
            blocks[c.to.unit].shared.end_copy(c.to.at, c.bytes, c.lane, false, &actor);
            false
        });
        self.copies.pending = pending;
    }
}
