//! mbarriers: barriers in shared memory that count arrivals and bytes.
//!
//! Their state is kept beside memory, by address.  A state token is the phase it was taken in (upper half) and what was
//! pending (lower half).

use super::cluster::{Block, Common};
use super::memory::{shared_place, window_of};
use super::trouble::shared_name;
use super::warp::{Flow, Warp};
use super::{Site, lanes};
use crate::check::Kind;
use crate::check::past::Past;
use crate::isa::{MbarrierKind, MbarrierOp};
use crate::parse::ast::Space;

pub(crate) struct Mbarrier {
    at: usize,
    expected: u32,
    pending: u32,
    /// Bytes that must still come; may be negative for a moment.
    bytes: i64,
    phase: u64,
    past: Past,
    done: Past,
    /// Thread and clock of its `init`.
    made: (u32, u32),
}

impl Mbarrier {
    pub fn is_at(&self, at: usize) -> bool {
        self.at == at
    }

    /// What is wrong with its use by a thread with this past.
    pub fn unready(&self, thread: u32, past: &Past) -> Option<String> {
        let (by, clock) = self.made;
        let text = || format!("it was initialised by thread {by} of the cluster with no barrier between");
        (by != thread && !past.knows(by, clock)).then(text)
    }

    fn advance(&mut self, events: &mut u64) {
        if self.pending == 0 && self.bytes == 0 {
            self.phase += 1;
            self.pending = self.expected;
            self.done = std::mem::take(&mut self.past);
            *events += 1;
        }
    }
}

/// Bytes of a copy have come; false if there is no mbarrier.
pub(crate) fn complete(blocks: &mut [Block], place: (usize, usize), bytes: i64, past: &Past, events: &mut u64) -> bool {
    let Some(b) = blocks.get_mut(place.0).and_then(|b| b.mbarriers.iter_mut().find(|m| m.at == place.1)) else {
        return false;
    };
    b.bytes -= bytes;
    b.past.join(past);
    b.advance(events);
    true
}

impl Warp {
    pub fn mbarrier(&mut self, x: &MbarrierOp, mask: u32, site: &mut Site) -> Flow {
        let value = |w: &Warp, lane: usize| x.value.map(|v| w.regs[v as usize][lane]);
        if x.kind == MbarrierKind::PendingCount {
            let mut out = [0; 32];
            for lane in lanes(mask) {
                out[lane] = value(self, lane).unwrap_or(0) & 0xffff_ffff;
            }
            if let Some(d) = x.dst {
                self.put(d, mask, &out);
            }
            return Flow::Next;
        }
        if let MbarrierKind::AsyncArrive { .. } = x.kind {
            self.wait_copies(None, mask, site.env, site.blocks);
        }
        if matches!(x.kind, MbarrierKind::Arrive { .. } | MbarrierKind::AsyncArrive { .. }) {
            self.clock += 1;
        }
        let a = self.addresses(x.address, x.offset);
        let mut passed = 0;
        for lane in lanes(mask) {
            let place = shared_place(a[lane]);
            let trouble = if x.space == Space::Generic && window_of(a[lane]) != Space::Shared {
                Some("its address is not in shared memory".to_string())
            } else if !place.1.is_multiple_of(8) {
                Some("it must lie at a multiple of 8 bytes".to_string())
            } else if site.blocks.get(place.0).is_none_or(|b| place.1 + 8 > b.shared.bytes.len()) {
                Some("it lies outside shared memory".to_string())
            } else {
                None
            };
            let trouble = trouble.or_else(|| self.mbarrier_lane(x, lane, place, site.blocks, site.common, &mut passed));
            if let Some(text) = trouble {
                let text = || format!("{}: {text}", shared_name(site.env, place.1));
                self.find(site, Kind::Mbarrier, lane as u32, Some(a[lane]), text);
            }
        }
        if let MbarrierKind::Test { .. } = x.kind {
            let mut left = passed & mask;
            while left != 0 {
                let place = shared_place(a[left.trailing_zeros() as usize]);
                let same = lanes(left).filter(|&l| shared_place(a[l]) == place).fold(0u32, |m, l| m | 1 << l);
                left &= !same;
                if let Some(b) = site.blocks.get(place.0).and_then(|b| b.mbarriers.iter().find(|m| m.at == place.1)) {
                    self.learn(same, &b.done);
                }
            }
            if let Some(p) = x.p {
                self.put_pred(p, mask, passed);
            }
            if passed & mask == 0 {
                return Flow::Asked;
            }
        }
        Flow::Next
    }

    /// One lane's operation; what is wrong with it.
    fn mbarrier_lane(
        &mut self,
        x: &MbarrierOp,
        lane: usize,
        place: (usize, usize),
        blocks: &mut [Block],
        common: &mut Common,
        passed: &mut u32,
    ) -> Option<String> {
        let value = x.value.map(|v| self.regs[v as usize][lane]);
        let bytes = x.bytes.map(|v| i64::from(self.regs[v as usize][lane] as u32));
        let all = &mut blocks[place.0].mbarriers;
        let index = all.iter().position(|m| m.at == place.1);
        if x.kind == MbarrierKind::Init {
            let expected = value.unwrap_or(0) as u32;
            if expected == 0 || expected >= 1 << 20 {
                return Some(format!("it can't wait for {expected} arrivals"));
            }
            let new = Mbarrier {
                at: place.1,
                expected,
                pending: expected,
                bytes: 0,
                phase: 0,
                past: Past::default(),
                done: Past::default(),
                made: (self.index * 32 + lane as u32, self.clock),
            };
            match index {
                Some(i) => all[i] = new,
                None => all.push(new),
            }
            return None;
        }
        let Some(i) = index else { return Some("there is no mbarrier: mbarrier.init must come first".into()) };
        if let Some(text) = all[i].unready(self.index * 32 + lane as u32, self.views.of(lane as u32)) {
            return Some(text);
        }
        let b = &mut all[i];
        match x.kind {
            MbarrierKind::Inval => {
                all.swap_remove(i);
            }
            MbarrierKind::ExpectTx => b.bytes += bytes.unwrap_or(0),
            MbarrierKind::CompleteTx => {
                b.bytes -= bytes.unwrap_or(0);
                b.advance(&mut common.events);
            }
            MbarrierKind::AsyncArrive { noinc: false } => {
                // One more is expected and comes at once.
                self.hand_on(1 << lane, &mut b.past);
            }
            MbarrierKind::Arrive { .. } | MbarrierKind::AsyncArrive { .. } => {
                let count = if x.bytes.is_some() { 1 } else { value.unwrap_or(1) as u32 };
                b.bytes += bytes.unwrap_or(0);
                let token = b.phase << 32 | u64::from(b.pending);
                if count > b.pending {
                    return Some(format!("{count} arrive where {} are still expected", b.pending));
                }
                if x.kind == (MbarrierKind::Arrive { drop: true }) {
                    b.expected -= count.min(b.expected);
                }
                b.pending -= count;
                self.hand_on(1 << lane, &mut b.past);
                b.advance(&mut common.events);
                if let Some(d) = x.dst {
                    self.regs[d as usize][lane] = token;
                }
            }
            MbarrierKind::Test { parity, .. } => {
                let v = value.unwrap_or(0);
                let done = if parity { b.phase & 1 != v & 1 } else { b.phase > v >> 32 };
                if done {
                    *passed |= 1 << lane;
                }
            }
            MbarrierKind::Init | MbarrierKind::PendingCount => {}
        }
        None
    }
}
