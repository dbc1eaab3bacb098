//! Exchange within a warp: `shfl`, `vote`, `match`, `redux`, `elect`, `bar.warp.sync`.

use super::warp::{Flow, Path, Wait, Warp};
use super::{Site, lanes};
use crate::check::Kind;
use crate::isa::{Op, Redux, Shfl, ShflKind, Slot, Vote};

impl Warp {
    /// Waits until the lanes that `members` names have come; the lanes that go on now, if any do.
    pub fn gather(&mut self, members: [u64; 32], mask: u32, site: &mut Site) -> Option<u32> {
        let pc = site.pc;
        let (mut complete, mut missing) = (0, 0);
        for lane in lanes(mask) {
            let want = members[lane] as u32;
            if want >> lane & 1 == 0 {
                let text = || format!("the mask {want:#010x} of lanes doesn't name lane {lane}, which is here");
                self.find(site, Kind::DivergentWarp, lane as u32, None, text);
            }
            let lacking = want & self.live & !mask;
            missing |= lacking;
            if lacking == 0 {
                complete |= 1 << lane;
            }
        }
        if missing == 0 {
            return Some(mask);
        }
        // It was counted as executed.
        let undo = |sink: &mut super::Sink, lanes: u32, warps: u64| {
            let count = &mut sink.pcs[pc as usize];
            count.warps -= warps;
            count.threads -= u64::from(lanes.count_ones());
        };
        self.split_off_others(mask);
        if complete == 0 {
            undo(site.sink, mask, 1);
            self.retired -= 1;
            self.paths[self.current].wait = Wait::Lanes { missing };
            return None;
        }
        undo(site.sink, mask & !complete, 0);
        let path = &mut self.paths[self.current];
        path.mask = complete;
        let (mask, calls) = (mask & !complete, path.calls.clone());
        self.paths.push(Path { pc, mask, calls, wait: Wait::Lanes { missing }, forced: false });
        Some(complete)
    }

    pub fn exchange(&mut self, op: &Op, mask: u32, site: &mut Site) -> Flow {
        let members: Slot = match op {
            Op::Shfl(s) => s.mask,
            Op::Vote { mask, .. }
            | Op::Match { mask, .. }
            | Op::Redux { mask, .. }
            | Op::BarWarp { mask }
            | Op::Elect { mask, .. } => *mask,
            _ => unreachable!("BUG: not an exchange"),
        };
        let members = self.regs[members as usize];
        let Some(mask) = self.gather(members, mask, site) else { return Flow::Again };
        let mut out = [0u64; 32];
        // Lanes that take part together with a lane.
        let group = |lane: usize| members[lane] as u32 & mask;
        match op {
            Op::Shfl(s) => self.shuffle(s, mask, site),
            Op::Vote { kind, dst, p, .. } => {
                let held = p.mask(&self.preds);
                let mut yes = 0;
                for lane in lanes(mask) {
                    let all = group(lane);
                    let held = held & all;
                    out[lane] = u64::from(held);
                    let v = match kind {
                        Vote::All => held == all,
                        Vote::Any => held != 0,
                        Vote::Uni => held == 0 || held == all,
                        Vote::Ballot => false,
                    };
                    yes |= u32::from(v) << lane;
                }
                if *kind == Vote::Ballot {
                    self.put(*dst, mask, &out);
                } else {
                    self.put_pred(*dst as u16, mask, yes);
                }
            }
            Op::Match { all, wide, dst, p, a, .. } => {
                let a = self.regs[*a as usize];
                let keep = if *wide { u64::MAX } else { u64::from(u32::MAX) };
                let mut yes = 0;
                for lane in lanes(mask) {
                    let g = group(lane);
                    let same = lanes(g).filter(|&l| a[l] & keep == a[lane] & keep).fold(0u32, |m, l| m | 1 << l);
                    let agree = same == g;
                    yes |= u32::from(agree) << lane;
                    out[lane] = u64::from(if *all && !agree { 0 } else { same });
                }
                self.put(*dst, mask, &out);
                if let Some(p) = p {
                    self.put_pred(*p, mask, yes);
                }
            }
            Op::Redux { kind, dst, a, .. } => {
                let a = self.regs[*a as usize];
                for lane in lanes(mask) {
                    let values = lanes(group(lane)).map(|l| a[l] as u32);
                    let signed = |v: u32| v as i32;
                    out[lane] = u64::from(
                        match kind {
                            Redux::Add => values.reduce(u32::wrapping_add),
                            Redux::MinU => values.min(),
                            Redux::MaxU => values.max(),
                            Redux::MinS => values.min_by_key(|&v| signed(v)),
                            Redux::MaxS => values.max_by_key(|&v| signed(v)),
                            Redux::And => values.reduce(|x, y| x & y),
                            Redux::Or => values.reduce(|x, y| x | y),
                            Redux::Xor => values.reduce(|x, y| x ^ y),
                        }
                        .unwrap_or(0),
                    );
                }
                self.put(*dst, mask, &out);
            }
            Op::BarWarp { .. } => {
                let mut left = mask;
                while left != 0 {
                    let named = group(left.trailing_zeros() as usize) | 1 << left.trailing_zeros();
                    self.meet(named);
                    left &= !named;
                }
            }
            Op::Elect { dst, p, .. } => {
                let leader = mask.trailing_zeros();
                self.put_pred(*p, mask, 1 << leader);
                if let Some(d) = dst {
                    self.put(*d, mask, &[u64::from(leader); 32]);
                }
            }
            _ => {}
        }
        Flow::Next
    }

    fn shuffle(&mut self, s: &Shfl, mask: u32, site: &mut Site) {
        let r = &self.regs;
        let (a, b, c) = (r[s.a as usize], r[s.b as usize], r[s.c as usize]);
        let mut out = a;
        let mut inside = 0;
        let mut bad = None;
        for lane in lanes(mask) {
            let (l, by) = (lane as i32, (b[lane] & 31) as i32);
            let (clamp, segment) = ((c[lane] & 31) as i32, (c[lane] >> 8 & 31) as i32);
            let most = l & segment | clamp & !segment;
            let least = l & segment;
            let (from, yes) = match s.kind {
                ShflKind::Up => (l - by, l - by >= most),
                ShflKind::Down => (l + by, l + by <= most),
                ShflKind::Bfly => (l ^ by, l ^ by <= most),
                ShflKind::Idx => (least | by & !segment, (least | by & !segment) <= most),
            };
            if yes {
                inside |= 1 << lane;
                if mask >> from & 1 == 0 {
                    bad = bad.or(Some((lane as u32, from)));
                }
                out[lane] = a[(from & 31) as usize];
            }
        }
        if let Some((lane, from)) = bad {
            let text = || format!("lane {lane} asks lane {from}, which takes no part: the value is undefined");
            self.find(site, Kind::DivergentWarp, lane, None, text);
        }
        self.put(s.dst, mask, &out);
        if let Some(p) = s.p {
            self.put_pred(p, mask, inside);
        }
    }
}
