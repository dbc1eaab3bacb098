//! `atom` and `red`.  Lanes go one after another, in order or, with a seed, from a random lane on.

use super::memory::{Spot, window_of};
use super::warp::Warp;
use super::{Site, lanes};
use crate::check::global::Side;
use crate::count::Way;
use crate::isa::{Atom, AtomOp, Ty};
use crate::math::lanes::{Lane, flush};
use crate::parse::ast::Space;
use half::{bf16, f16};

/// The new value of a location.
fn apply(op: AtomOp, ty: Ty, old: u64, b: u64, c: u64) -> u64 {
    fn pair<T: Lane>(a: u64, b: u64, f: impl Fn(T, T) -> T) -> u64 {
        let ([x, y], [z, w]) = (<[T; 2]>::get(a), <[T; 2]>::get(b));
        [f(x, z), f(y, w)].put()
    }
    fn h(a: f16, b: f16, f: fn(f32, f32) -> f32) -> f16 {
        f16::from_f32(f(a.to_f32(), b.to_f32()))
    }
    fn g(a: bf16, b: bf16, f: fn(f32, f32) -> f32) -> bf16 {
        bf16::from_f32(f(a.to_f32(), b.to_f32()))
    }
    let float: fn(f32, f32) -> f32 = match op {
        AtomOp::Min => f32::min,
        AtomOp::Max => f32::max,
        _ => |a, b| a + b,
    };
    match (op, ty) {
        (AtomOp::And, _) => old & b,
        (AtomOp::Or, _) => old | b,
        (AtomOp::Xor, _) => old ^ b,
        (AtomOp::Exch, _) => b,
        (AtomOp::Cas, _) => {
            if old == b {
                c
            } else {
                old
            }
        }
        (AtomOp::Inc, _) => {
            if old >= b {
                0
            } else {
                old + 1
            }
        }
        (AtomOp::Dec, _) => {
            if old == 0 || old > b {
                b
            } else {
                old - 1
            }
        }
        (_, Ty::F16) => h(f16::get(old), f16::get(b), float).put(),
        (_, Ty::Bf16) => g(bf16::get(old), bf16::get(b), float).put(),
        (_, Ty::F16x2) => pair(old, b, |x, y| h(x, y, float)),
        (_, Ty::Bf16x2) => pair(old, b, |x, y| g(x, y, float)),
        (AtomOp::Add, Ty::F32) => (f32::get(old) + f32::get(b)).put(),
        (AtomOp::Add, Ty::F64) => (f64::get(old) + f64::get(b)).put(),
        (AtomOp::Add, Ty::U64 | Ty::S64) => old.wrapping_add(b),
        (AtomOp::Add, _) => u64::from((old as u32).wrapping_add(b as u32)),
        (AtomOp::Min, Ty::S32) => (old as i32).min(b as i32).put(),
        (AtomOp::Max, Ty::S32) => (old as i32).max(b as i32).put(),
        (AtomOp::Min, Ty::S64) => (old as i64).min(b as i64) as u64,
        (AtomOp::Max, Ty::S64) => (old as i64).max(b as i64) as u64,
        (AtomOp::Min, _) => old.min(b),
        (AtomOp::Max, _) => old.max(b),
    }
}

/// As [`apply`], in global memory: sums of f32 take subnormal numbers as zeros there, and give none (PTX ISA, `atom`).
fn apply_global(op: AtomOp, ty: Ty, old: u64, b: u64, c: u64) -> u64 {
    match (op, ty) {
        (AtomOp::Add, Ty::F32) => flush(flush(f32::get(old)) + flush(f32::get(b))).put(),
        _ => apply(op, ty, old, b, c),
    }
}

/// As [`apply_global`]; for reductions of bulk copies.
pub(crate) fn reduce(op: AtomOp, ty: Ty, old: u64, b: u64) -> u64 {
    apply_global(op, ty, old, b, 0)
}

impl Warp {
    pub fn atomic(&mut self, x: &Atom, mask: u32, site: &mut Site) {
        let pc = site.pc;
        let a = self.addresses(x.address, x.offset);
        let mut shared = 0;
        for lane in lanes(mask) {
            let s = if x.space == Space::Generic { window_of(a[lane]) } else { x.space };
            shared |= u32::from(s == Space::Shared) << lane;
        }
        let width = x.ty.bytes();
        let size = width * x.b.len();
        let mut spots = [Spot::default(); 32];
        let mut good = 0;
        let global = mask & !shared;
        if global != 0 {
            good |= self.global_spots(&a, size, global, true, site, &mut spots);
            let counted = good & global;
            if counted != 0 {
                self.count_global(&a, size, counted, Way::Atomic, site);
                site.sink.traffic[spots[counted.trailing_zeros() as usize].unit].atomics +=
                    u64::from(counted.count_ones());
                self.publish(x.release, &a, counted, site.env, site.common);
            }
        }
        if mask & shared != 0 {
            let m = self.shared_spots(&a, size, mask & shared, true, site, &mut spots);
            if m != 0 {
                self.count_shared(&a, size, m, site);
                self.publish(x.release, &a, m, site.env, site.common);
            }
            good |= m;
        }
        site.common.events += 1;
        let keep = if width == 8 { u64::MAX } else { (1 << (8 * width)) - 1 };
        let from = if site.env.options.seed != 0 { site.common.random.below(32) as u32 } else { 0 };
        for k in 0..32 {
            let lane = ((from + k) % 32) as usize;
            if good >> lane & 1 == 0 {
                continue;
            }
            let s = spots[lane];
            let side = Side { cluster: site.common.id, actor: self.actor(pc, lane as u32) };
            if shared >> lane & 1 == 0 {
                let shadow = &site.env.shadows[s.unit];
                let read = shadow.read(s.at, size, lane as u32, true, &side);
                let clash = read.or(shadow.write(s.at, size, lane as u32, true, false, &side));
                if let Some(c) = clash {
                    self.global_clash(c, s, true, lane, site);
                }
            } else {
                let actor = self.actor(pc, lane as u32);
                let memory = &mut site.blocks[s.unit].shared;
                let read = memory.read(s.at, size, lane as u32, true, &actor);
                if let Some(c) = read.or(memory.write(s.at, size, lane as u32, true, false, &actor)) {
                    self.shared_clash(c, s, true, lane, site);
                }
            }
            for (k, &b) in x.b.iter().enumerate() {
                let at = s.at + k * width;
                let (b, c) = (self.regs[b as usize][lane] & keep, self.regs[x.c as usize][lane] & keep);
                let old = if shared >> lane & 1 == 0 {
                    let buffer = &site.env.memory.buffers[s.unit];
                    buffer.update(at, x.ty.bytes() as u8, &site.env.memory.wide, |old| {
                        apply_global(x.op, x.ty, old, b, c)
                    })
                } else {
                    let memory = &mut site.blocks[s.unit].shared;
                    let old = memory.load(at, width as u8);
                    memory.store(at, width as u8, apply(x.op, x.ty, old, b, c));
                    old
                };
                if let Some(Some(d)) = x.dst.get(k) {
                    self.regs[*d as usize][lane] = old;
                }
            }
        }
        // After the location was read: what its writer handed on before is there.
        self.acquire(&a, good, site.env, site.common);
    }
}
