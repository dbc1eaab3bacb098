//! Loads, stores, atomics and address arithmetic between spaces.

use super::{Decoder, Result, alu, exactly};
use crate::decode::mods::Mods;
use crate::isa::{Access, AluFn, Atom, AtomOp, Class, Op, Ty, window};
use crate::parse::ast::{Operand, Space};

/// Takes a space's suffix.
fn space(m: &mut Mods) -> Option<Space> {
    m.find(|s| {
        Some(match s {
            "global" => Space::Global,
            "shared" | "shared::cta" | "shared::cluster" => Space::Shared,
            "const" => Space::Const,
            "local" => Space::Local,
            "param" | "param::entry" | "param::func" => Space::Param,
            _ => return None,
        })
    })
}

/// Takes hints that only cost or save time.
fn hints(m: &mut Mods) {
    while m
        .find(|s| {
            (matches!(s, "ca" | "cg" | "cs" | "lu" | "cv" | "wb" | "wt" | "nc" | "weak")
                || s.starts_with("L1::")
                || s.starts_with("L2::"))
            .then_some(())
        })
        .is_some()
    {}
}

fn scope(m: &mut Mods) {
    m.one_of(&["cta", "cluster", "gpu", "sys", "gl"]);
}

impl Decoder<'_> {
    fn grain(&mut self, space: Space, bytes: usize) {
        let bytes = bytes.min(4) as u32;
        if matches!(space, Space::Global | Space::Generic) {
            self.grain_global = self.grain_global.min(bytes);
        }
        if matches!(space, Space::Shared | Space::Generic) {
            self.grain_shared = self.grain_shared.min(bytes);
        }
    }

    pub(super) fn memory(&mut self, name: &str, m: &mut Mods, x: &[Operand]) -> Result<(Op, Class)> {
        match name {
            "ld" | "ldu" | "st" => self.access(name != "st", m, x),
            "atom" | "red" => self.atomic(name == "atom", m, x),
            "cvta" => {
                let to = m.take("to");
                let space = space(m).ok_or("a space is missing")?;
                let ty = m.ty().ok_or("a type is missing")?;
                let [d, a] = exactly(x)?;
                let base = match space {
                    Space::Shared => window::SHARED,
                    Space::Local => window::LOCAL,
                    Space::Const => window::CONST,
                    Space::Param => window::PARAM,
                    _ => 0,
                };
                let base = self.constant(if to { base.wrapping_neg() } else { base });
                let f: AluFn = alu2!(|a: u64, b: u64| -> u64 { a.wrapping_add(b) });
                Ok((Op::Alu { f, dst: self.register(d)?, a: self.source(a, ty)?, b: base, c: 0 }, Class::Integer))
            }
            "isspacep" => {
                let space = space(m).ok_or("a space is missing")?;
                let [p, a] = exactly(x)?;
                let p = self.predicate_target(p)?.ok_or("a predicate is expected")?;
                Ok((Op::IsSpace { p, a: self.source(a, Ty::U64)?, space }, Class::Compare))
            }
            "createpolicy" => {
                while m
                    .find(|s| {
                        (s.starts_with("fractional")
                            || s.starts_with("L2::")
                            || s == "b64"
                            || s == "range"
                            || s == "global"
                            || s == "cvt")
                            .then_some(())
                    })
                    .is_some()
                {}
                let d = self.register(x.first().ok_or("operands are missing")?)?;
                let zero = self.constant(0);
                let f = alu::arithmetic("mov", Ty::B64, m).ok_or("the instruction is not known")?;
                Ok((Op::Alu { f, dst: d, a: zero, b: 0, c: 0 }, Class::Move))
            }
            _ => {
                while m
                    .find(|s| {
                        (s.starts_with('L') || matches!(s, "global" | "local" | "tensormap" | "param" | "const"))
                            .then_some(())
                    })
                    .is_some()
                {}
                Ok((Op::Hint, Class::LoadOther))
            }
        }
    }

    fn access(&mut self, load: bool, m: &mut Mods, x: &[Operand]) -> Result<(Op, Class)> {
        let order = m.one_of(&["volatile", "relaxed", "acquire", "release", "mmio"]);
        if order == Some("mmio") {
            m.take("relaxed");
        }
        scope(m);
        let named = space(m);
        hints(m);
        let count = m.vector();
        let ty = m.ty().ok_or("a type is missing")?;
        if ty == Ty::B128 {
            return Err("128-bit registers are not known".into());
        }
        hints(m);
        // A last operand may be a cache policy.
        let [first, second, rest @ ..] = x else { return Err("2 operands are expected".into()) };
        if rest.len() > 1 {
            return Err("too many operands".into());
        }
        let (value, address) = if load { (first, second) } else { (second, first) };
        let a = self.address(address)?;
        // Parameters of functions lie in local memory.
        let space = match (named, a.space) {
            (Some(Space::Param), Some(s)) => s,
            (None, Some(s)) => s,
            (s, _) => s.unwrap_or(Space::Generic),
        };
        let regs: Vec<Option<u32>> = match (value, load) {
            (Operand::List(all), true) => all.iter().map(|o| self.target(o)).collect::<Result<_>>()?,
            (Operand::List(all), false) => all.iter().map(|o| self.source(o, ty).map(Some)).collect::<Result<_>>()?,
            (one, true) => vec![self.target(one)?],
            (one, false) => vec![Some(self.source(one, ty)?)],
        };
        if regs.len() != count {
            return Err(format!("{count} registers are expected, {} came", regs.len()));
        }
        let width = regs.iter().flatten().find_map(|r| self.widths.get(r).copied()).unwrap_or(4);
        self.grain(space, ty.bytes());
        let class = match (space, load) {
            (Space::Global | Space::Generic, true) => Class::LoadGlobal,
            (Space::Global | Space::Generic, false) => Class::StoreGlobal,
            (Space::Shared, true) => Class::LoadShared,
            (Space::Shared, false) => Class::StoreShared,
            (_, true) => Class::LoadOther,
            (_, false) => Class::StoreOther,
        };
        let access = Box::new(Access {
            space,
            width: ty.bytes() as u8,
            sign_extend: if load && ty.signed() { width } else { 0 },
            regs: regs.into(),
            address: a.base,
            offset: a.offset,
            strong: order.is_some(),
            acquire: order == Some("acquire"),
            release: order == Some("release"),
        });
        Ok((if load { Op::Ld(access) } else { Op::St(access) }, class))
    }

    fn atomic(&mut self, returns: bool, m: &mut Mods, x: &[Operand]) -> Result<(Op, Class)> {
        let order = m.one_of(&["relaxed", "acquire", "release", "acq_rel"]);
        scope(m);
        let space = space(m).unwrap_or(Space::Generic);
        hints(m);
        let op = m
            .find(|s| {
                Some(match s {
                    "add" => AtomOp::Add,
                    "min" => AtomOp::Min,
                    "max" => AtomOp::Max,
                    "and" => AtomOp::And,
                    "or" => AtomOp::Or,
                    "xor" => AtomOp::Xor,
                    "exch" => AtomOp::Exch,
                    "cas" => AtomOp::Cas,
                    "inc" => AtomOp::Inc,
                    "dec" => AtomOp::Dec,
                    _ => return None,
                })
            })
            .ok_or("the operation is not known")?;
        m.take("noftz");
        hints(m);
        let count = m.vector();
        let ty = m.ty().ok_or("a type is missing")?;
        let known = match op {
            AtomOp::Add => matches!(
                ty,
                Ty::U32 | Ty::S32 | Ty::U64 | Ty::S64 | Ty::F32 | Ty::F64 | Ty::F16 | Ty::F16x2 | Ty::Bf16 | Ty::Bf16x2
            ),
            AtomOp::Min | AtomOp::Max => {
                matches!(ty, Ty::U32 | Ty::S32 | Ty::U64 | Ty::S64 | Ty::F16 | Ty::F16x2 | Ty::Bf16 | Ty::Bf16x2)
            }
            AtomOp::Inc | AtomOp::Dec => ty == Ty::U32,
            AtomOp::Cas => matches!(ty, Ty::B16 | Ty::B32 | Ty::B64 | Ty::U32 | Ty::U64 | Ty::S32),
            _ => matches!(ty, Ty::B32 | Ty::B64 | Ty::U32 | Ty::U64 | Ty::S32),
        };
        if !known {
            return Err("this operation of this type is not known".into());
        }
        let (dst, rest) = if returns {
            let [d, rest @ ..] = x else { return Err("operands are missing".into()) };
            let dst: Box<[Option<u32>]> = match d {
                Operand::List(all) => all.iter().map(|o| self.target(o)).collect::<Result<_>>()?,
                _ => [self.target(d)?].into(),
            };
            (dst, rest)
        } else {
            (vec![None; count].into(), x)
        };
        let [address, b, rest @ ..] = rest else { return Err("operands are missing".into()) };
        let a = self.address(address)?;
        let b = self.sources(b, ty)?;
        if b.len() != count || dst.len() != count {
            return Err(format!("{count} registers are expected"));
        }
        let c = match (op, rest) {
            (AtomOp::Cas, [c, ..]) => self.source(c, ty)?,
            (AtomOp::Cas, []) => return Err("4 operands are expected".into()),
            _ => 0,
        };
        self.grain(space, ty.bytes());
        let (acquire, release) =
            (matches!(order, Some("acquire" | "acq_rel")), matches!(order, Some("release" | "acq_rel")));
        let atom = Atom { space, op, ty, dst, address: a.base, offset: a.offset, b, c, acquire, release };
        Ok((Op::Atom(Box::new(atom)), Class::Atomic))
    }
}
