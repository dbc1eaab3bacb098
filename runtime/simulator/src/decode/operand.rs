//! Names and constants → slots, predicates and addresses; and the arithmetic instructions, which are little more.

use super::{Decoder, Image, Name, Result, alu, compare, exactly};
use crate::decode::mods::Mods;
use crate::isa::{BoolOp, Class, Op, Place, Pred, Slot, Special, Ty};
use crate::math::convert::Convert;
use crate::math::round::Round;
use crate::parse::ast::{self, Operand, Space};

/// An address operand: base register or constant, offset, where a variable's name says so its space.
pub(super) struct Address {
    pub base: Slot,
    pub offset: i64,
    pub space: Option<Space>,
}

fn special(name: &str) -> Option<Special> {
    let (base, axis) = match name.split_once('.') {
        None => (name, 0),
        Some((base, "x")) => (base, 0),
        Some((base, "y")) => (base, 1),
        Some((base, "z")) => (base, 2),
        Some(_) => return None,
    };
    Some(match base {
        "%tid" => Special::Tid(axis),
        "%ntid" => Special::Ntid(axis),
        "%ctaid" => Special::Ctaid(axis),
        "%nctaid" => Special::Nctaid(axis),
        "%clusterid" => Special::ClusterId(axis),
        "%nclusterid" => Special::NclusterId(axis),
        "%cluster_ctaid" => Special::ClusterCtaid(axis),
        "%cluster_nctaid" => Special::ClusterNctaid(axis),
        "%cluster_ctarank" => Special::ClusterCtarank,
        "%cluster_nctarank" => Special::ClusterNctarank,
        "%laneid" => Special::LaneId,
        "%warpid" => Special::WarpId,
        "%nwarpid" => Special::NwarpId,
        "%lanemask_eq" => Special::LaneMaskEq,
        "%lanemask_lt" => Special::LaneMaskLt,
        "%lanemask_le" => Special::LaneMaskLe,
        "%lanemask_gt" => Special::LaneMaskGt,
        "%lanemask_ge" => Special::LaneMaskGe,
        "%dynamic_smem_size" => Special::DynamicShared,
        "%total_smem_size" => Special::TotalShared,
        "%smid" | "%gridid" => Special::Zero,
        "%nsmid" => Special::One,
        _ => return None,
    })
}

impl Decoder<'_> {
    pub(super) fn constant(&mut self, value: u64) -> Slot {
        if let Some(&s) = self.constants.get(&value) {
            return s;
        }
        let s = self.new_slot();
        self.constants.insert(value, s);
        s
    }

    fn special(&mut self, what: Special) -> Slot {
        if let Some(&s) = self.specials.get(&what) {
            return s;
        }
        let s = self.new_slot();
        self.specials.insert(what, s);
        s
    }

    fn lookup(&mut self, name: &str) -> Option<Name> {
        if let Some(n) = self.scopes.iter().rev().find_map(|s| s.get(name)) {
            if let Name::Reg(r) = n {
                self.named.push((*r, false));
            }
            return Some(n.clone());
        }
        let Image { globals, constants } = self.image;
        if let Some(&a) = globals.get(name) {
            return Some(Name::Var(Space::Global, a));
        }
        if let Some(&a) = constants.get(name) {
            return Some(Name::Var(Space::Const, a));
        }
        if let Some(&a) = self.shared_known.get(name) {
            return Some(Name::Var(Space::Shared, a));
        }
        let v = self.module.vars.iter().find(|v| v.name == name && v.space == Space::Shared)?;
        if v.bytes == 0 {
            return Some(Name::Dynamic);
        }
        let at = u64::from(self.new_shared(name, v.bytes, v.align));
        self.shared_known.insert(name.to_string(), at);
        Some(Name::Var(Space::Shared, at))
    }

    fn unknown(name: &str) -> String {
        format!("\"{name}\" is not declared")
    }

    fn variable_address(&mut self, space: Space, at: u64) -> Slot {
        if space != Space::Shared {
            return self.constant(at);
        }
        if let Some(&s) = self.shared_addresses.get(&at) {
            return s;
        }
        let s = self.new_slot();
        self.shared_addresses.insert(at, s);
        s
    }

    fn dynamic_address(&mut self, offset: i64) -> Slot {
        if let Some(&(s, _)) = self.dynamic.iter().find(|d| d.1 == offset) {
            return s;
        }
        let s = self.new_slot();
        self.dynamic.push((s, offset));
        s
    }

    /// A value that is read.
    pub(super) fn source(&mut self, x: &Operand, ty: Ty) -> Result<Slot> {
        let mask = if ty.bytes() >= 8 { u64::MAX } else { (1 << ty.bits()) - 1 };
        match x {
            Operand::Name(name) => match self.lookup(name) {
                Some(Name::Reg(s)) => Ok(s),
                Some(Name::Pred(_)) => Err(format!("{name} is a predicate")),
                Some(Name::Var(space, at)) => Ok(self.variable_address(space, at)),
                Some(Name::Dynamic) => Ok(self.dynamic_address(0)),
                None if name == "WARP_SZ" => Ok(self.constant(32)),
                None => match special(name) {
                    Some(s) => Ok(self.special(s)),
                    None => Err(Self::unknown(name)),
                },
            },
            Operand::Offset(name, more) => match self.lookup(name) {
                Some(Name::Var(space, at)) => Ok(self.variable_address(space, at.wrapping_add_signed(*more))),
                Some(Name::Dynamic) => Ok(self.dynamic_address(*more)),
                _ => Err(format!("\"{name}\" is not a variable")),
            },
            Operand::Int(i) => Ok(self.constant(match ty {
                Ty::F32 => u64::from((*i as f32).to_bits()),
                Ty::F64 => (*i as f64).to_bits(),
                _ => *i as u64 & mask,
            })),
            Operand::F32(b) => Ok(self.constant(match ty {
                Ty::F64 => f64::from(f32::from_bits(*b)).to_bits(),
                _ => u64::from(*b),
            })),
            Operand::F64(b) => Ok(self.constant(match ty {
                Ty::F32 => u64::from((f64::from_bits(*b) as f32).to_bits()),
                _ => *b,
            })),
            _ => Err("a register or a constant is expected".into()),
        }
    }

    /// A register that is written; `_` is none.
    pub(super) fn target(&mut self, x: &Operand) -> Result<Option<Slot>> {
        match x {
            Operand::Name(name) if name == "_" => Ok(None),
            Operand::Name(name) => match self.lookup(name) {
                Some(Name::Reg(s)) => {
                    self.named.last_mut().expect("BUG: it was looked up").1 = true;
                    Ok(Some(s))
                }
                Some(_) => Err(format!("{name} can't be written: it is not a register of this kind")),
                None => Err(Self::unknown(name)),
            },
            _ => Err("a register is expected first".into()),
        }
    }

    pub(super) fn register(&mut self, x: &Operand) -> Result<Slot> {
        match self.target(x)? {
            Some(s) => Ok(s),
            None => Ok(self.new_slot()),
        }
    }

    pub(super) fn registers(&mut self, x: &Operand) -> Result<Box<[Slot]>> {
        match x {
            Operand::List(all) => all.iter().map(|o| self.register(o)).collect(),
            _ => Ok([self.register(x)?].into()),
        }
    }

    pub(super) fn sources(&mut self, x: &Operand, ty: Ty) -> Result<Box<[Slot]>> {
        match x {
            Operand::List(all) => all.iter().map(|o| self.source(o, ty)).collect(),
            _ => Ok([self.source(x, ty)?].into()),
        }
    }

    /// A predicate that is read.
    pub(super) fn predicate(&mut self, x: &Operand) -> Result<Pred> {
        let (name, negated) = match x {
            Operand::Name(n) => (n, false),
            Operand::Not(n) => (n, true),
            Operand::Int(i) => return Ok(Pred { index: 0, negated: *i == 0 }),
            _ => return Err("a predicate is expected".into()),
        };
        match self.lookup(name) {
            Some(Name::Pred(index)) => Ok(Pred { index, negated }),
            Some(_) => Err(format!("{name} is not a predicate")),
            None => Err(Self::unknown(name)),
        }
    }

    /// A predicate that is written.
    pub(super) fn predicate_target(&mut self, x: &Operand) -> Result<Option<u16>> {
        match x {
            Operand::Name(n) if n == "_" => Ok(None),
            _ => self.predicate(x).map(|p| Some(p.index)),
        }
    }

    /// `[base + offset]`
    pub(super) fn address(&mut self, x: &Operand) -> Result<Address> {
        let Operand::Address { base, offset, .. } = x else { return Err("an address in [] is expected".into()) };
        match base {
            None => Ok(Address { base: self.constant(0), offset: *offset, space: None }),
            Some(name) => match self.lookup(name) {
                Some(Name::Reg(base)) => Ok(Address { base, offset: *offset, space: None }),
                Some(Name::Var(space, at)) => {
                    Ok(Address { base: self.variable_address(space, at), offset: *offset, space: Some(space) })
                }
                Some(Name::Dynamic) => {
                    Ok(Address { base: self.dynamic_address(0), offset: *offset, space: Some(Space::Shared) })
                }
                Some(Name::Pred(_)) => Err(format!("{name} is a predicate, not an address")),
                None => Err(Self::unknown(name)),
            },
        }
    }

    /// Arithmetic, comparisons, conversions, moves.
    pub(super) fn arithmetic(
        &mut self,
        name: &str,
        m: &mut Mods,
        x: &[Operand],
        guard: Pred,
        place: Place,
        i: &ast::Inst,
    ) -> Result<(Op, Class)> {
        match name {
            "setp" => return self.setp(m, x),
            "set" => return self.set(m, x),
            "cvt" => return self.convert(m, x),
            "mov" => return self.mov(m, x),
            "selp" => {
                let [d, a, b, p] = exactly(x)?;
                let ty = m.ty().ok_or("a type is missing")?;
                let op = Op::Selp {
                    dst: self.register(d)?,
                    a: self.source(a, ty)?,
                    b: self.source(b, ty)?,
                    p: self.predicate(p)?,
                };
                return Ok((op, Class::Move));
            }
            "testp" => {
                let [p, a] = exactly(x)?;
                let what = m.one_of(&["finite", "infinite", "number", "notanumber", "normal", "subnormal"]);
                let ty = m.ty().ok_or("a type is missing")?;
                let f = compare::test(what.unwrap_or(""), ty).ok_or("this test is not known")?;
                let a = self.source(a, ty)?;
                let p = self.predicate_target(p)?.ok_or("a predicate is expected")?;
                return Ok((Op::Setp { f, a, b: a, combine: None, p, q: None }, Class::Compare));
            }
            "lop3" => {
                let [d, a, b, c, table] = exactly(x)?;
                m.take("b32");
                let Operand::Int(table) = table else { return Err("the table is a constant".into()) };
                let op = Op::Lop3 {
                    table: *table as u8,
                    dst: self.register(d)?,
                    a: self.source(a, Ty::B32)?,
                    b: self.source(b, Ty::B32)?,
                    c: self.source(c, Ty::B32)?,
                };
                return Ok((op, Class::Integer));
            }
            _ => {}
        }
        let mut full = name.to_string();
        if matches!(name, "mul" | "mad" | "madc" | "mul24" | "mad24" | "shf")
            && let Some(part) = m.one_of(&["lo", "hi", "wide", "l", "r"])
        {
            full = format!("{name}.{part}");
        }
        let ty = if name == "slct" || name == "dp4a" { m.find(Ty::named) } else { m.ty() };
        let ty = match (name, ty) {
            (_, Some(ty)) => ty,
            _ => return Err("the instruction is not known".into()),
        };
        if ty == Ty::Pred {
            return self.predicate_logic(name, x);
        }
        let class = class(name, ty);
        let carries = m.take("cc");
        if carries || matches!(name, "addc" | "subc" | "madc") {
            let f = compare::carry(&full, ty).ok_or("the instruction is not known")?;
            let [d, a, b, ..] = x else { return Err("3 operands are expected".into()) };
            let (dst, a, b) = (self.register(d)?, self.source(a, ty)?, self.source(b, ty)?);
            let c = if let Some(c) = x.get(3) { self.source(c, ty)? } else { 0 };
            return Ok((Op::Carry { f, dst, a, b, c, writes: carries }, class));
        }
        if name == "bfi" {
            let [d, a, b, from, length] = exactly(x)?;
            let (a, b) = (self.source(a, ty)?, self.source(b, ty)?);
            let (from, length) = (self.source(from, Ty::U32)?, self.source(length, Ty::U32)?);
            let field = self.new_slot();
            let op = Op::Alu { f: alu::pack_field(), dst: field, a: from, b: length, c: 0 };
            self.push(guard, op, place, i.name(), Class::Integer);
            return Ok((Op::Alu { f: alu::bit_insert(ty), dst: self.register(d)?, a, b, c: field }, class));
        }
        let Some(f) = alu::arithmetic(&full, ty, m) else { return Err("the instruction is not known".into()) };
        let wide = match ty {
            _ if !full.ends_with(".wide") => ty,
            Ty::U16 => Ty::U32,
            Ty::S16 => Ty::S32,
            Ty::U32 => Ty::U64,
            _ => Ty::S64,
        };
        // Types of a, b, c.
        let types = match name {
            "shl" | "shr" => [ty, Ty::U32, ty],
            "bfe" => [ty, Ty::U32, Ty::U32],
            "slct" => [ty, ty, Ty::B32],
            "fns" => [Ty::B32, Ty::B32, Ty::S32],
            _ => [ty, ty, wide],
        };
        let wanted = operands(name);
        if x.len() != wanted + 1 {
            return Err(format!("{} operands are expected, {} came", wanted + 1, x.len()));
        }
        let dst = self.register(&x[0])?;
        let mut s = [0; 3];
        for (k, o) in x[1..].iter().enumerate() {
            s[k] = self.source(o, types[k])?;
        }
        Ok((Op::Alu { f, dst, a: s[0], b: s[1], c: s[2] }, class))
    }

    fn predicate_logic(&mut self, name: &str, x: &[Operand]) -> Result<(Op, Class)> {
        let dst = self.predicate_target(x.first().ok_or("operands are missing")?)?.ok_or("a predicate is expected")?;
        let a = self.predicate(x.get(1).ok_or("an operand is missing")?)?;
        let (op, a, b) = match (name, x.get(2)) {
            ("not", None) => (BoolOp::And, Pred { negated: !a.negated, ..a }, Pred::TRUE),
            ("mov", None) => (BoolOp::And, a, Pred::TRUE),
            ("and", Some(b)) => (BoolOp::And, a, self.predicate(b)?),
            ("or", Some(b)) => (BoolOp::Or, a, self.predicate(b)?),
            ("xor", Some(b)) => (BoolOp::Xor, a, self.predicate(b)?),
            _ => return Err("the instruction is not known".into()),
        };
        Ok((Op::Pred { op, dst, a, b }, Class::Compare))
    }

    fn comparison(&mut self, m: &mut Mods) -> Result<(&'static str, Option<BoolOp>, bool)> {
        let op = m
            .one_of(&[
                "eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu", "geu",
                "num", "nan",
            ])
            .ok_or("the comparison is not known")?;
        let combine = m.find(|s| match s {
            "and" => Some(BoolOp::And),
            "or" => Some(BoolOp::Or),
            "xor" => Some(BoolOp::Xor),
            _ => None,
        });
        Ok((op, combine, m.take("ftz")))
    }

    fn setp(&mut self, m: &mut Mods, x: &[Operand]) -> Result<(Op, Class)> {
        let (op, combine, ftz) = self.comparison(m)?;
        let ty = m.ty().ok_or("a type is missing")?;
        let f = compare::compare(op, ty, ftz).ok_or("this comparison of this type is not known")?;
        let [d, a, b, rest @ ..] = x else { return Err("3 operands are expected".into()) };
        let (p, q) = match d {
            Operand::Pair(p, q) => (self.predicate_target(p)?, self.predicate_target(q)?),
            _ => (self.predicate_target(d)?, None),
        };
        let p = match p {
            Some(p) => p,
            None => self.new_pred(0),
        };
        let combine = match (combine, rest) {
            (Some(op), [c]) => Some((op, self.predicate(c)?)),
            (None, []) => None,
            _ => return Err("the number of operands is wrong".into()),
        };
        Ok((Op::Setp { f, a: self.source(a, ty)?, b: self.source(b, ty)?, combine, p, q }, Class::Compare))
    }

    fn set(&mut self, m: &mut Mods, x: &[Operand]) -> Result<(Op, Class)> {
        let (op, combine, ftz) = self.comparison(m)?;
        let to = m.ty().ok_or("a type is missing")?;
        let ty = m.ty().ok_or("the second type is missing")?;
        let one = match to {
            Ty::F32 => u64::from(1f32.to_bits()),
            Ty::U32 | Ty::S32 => 0xffff_ffff,
            Ty::U16 | Ty::S16 => 0xffff,
            Ty::F16 => 0x3c00,
            Ty::Bf16 => 0x3f80,
            _ => return Err("the type of the result is not known".into()),
        };
        let f = compare::compare(op, ty, ftz).ok_or("this comparison of this type is not known")?;
        let [d, a, b, rest @ ..] = x else { return Err("3 operands are expected".into()) };
        let combine = match (combine, rest) {
            (Some(op), [c]) => Some((op, self.predicate(c)?)),
            (None, []) => None,
            _ => return Err("the number of operands is wrong".into()),
        };
        let op = Op::Set { f, a: self.source(a, ty)?, b: self.source(b, ty)?, combine, dst: self.register(d)?, one };
        Ok((op, Class::Compare))
    }

    fn convert(&mut self, m: &mut Mods, x: &[Operand]) -> Result<(Op, Class)> {
        if m.take("pack") {
            return Err("the instruction is not known".into());
        }
        let (float, whole) = (m.round(), m.round_whole());
        let (ftz, sat, relu, finite) = (m.take("ftz"), m.take("sat"), m.take("relu"), m.take("satfinite"));
        let to = m.ty().ok_or("the type of the result is missing")?;
        let from = m.ty().ok_or("the type of the operand is missing")?;
        // A float becomes whole by truncation unless told otherwise.
        let default = if from.float() && !to.float() { Round::Zero } else { Round::Nearest };
        let c = Convert {
            to,
            from,
            mode: float.or(whole).unwrap_or(default),
            whole: whole.is_some(),
            ftz,
            sat,
            relu,
            finite,
        };
        let paired = matches!(to, Ty::F16x2 | Ty::Bf16x2 | Ty::E4m3x2 | Ty::E5m2x2) && from == Ty::F32;
        let known = paired
            || (to == Ty::F16x2 && matches!(from, Ty::E4m3x2 | Ty::E5m2x2))
            || ![to, from]
                .iter()
                .any(|t| matches!(t, Ty::F16x2 | Ty::Bf16x2 | Ty::E4m3x2 | Ty::E5m2x2 | Ty::Pred | Ty::B128));
        if !known {
            return Err("this conversion is not known".into());
        }
        if paired {
            let [d, a, b] = exactly(x)?;
            let (dst, a, b) = (self.register(d)?, self.source(a, from)?, self.source(b, from)?);
            return Ok((
                match c.fast_pair() {
                    Some(f) => Op::Alu { f, dst, a, b, c: 0 },
                    None => Op::Convert { by: c, dst, a, b },
                },
                Class::Convert,
            ));
        }
        let [d, a] = exactly(x)?;
        let (dst, a) = (self.register(d)?, self.source(a, from)?);
        Ok((
            match c.fast() {
                Some(f) => Op::Alu { f, dst, a, b: 0, c: 0 },
                None => Op::Convert { by: c, dst, a, b: 0 },
            },
            Class::Convert,
        ))
    }

    fn mov(&mut self, m: &mut Mods, x: &[Operand]) -> Result<(Op, Class)> {
        let [d, a] = exactly(x)?;
        let ty = m.ty().ok_or("a type is missing")?;
        let op = match (d, a) {
            _ if ty == Ty::Pred => return self.predicate_logic("mov", x),
            _ if ty == Ty::B128 => return Err("128-bit registers are not known".into()),
            (Operand::List(parts), _) => {
                let width = ty.bits() / parts.len().max(1) as u32;
                let a = self.source(a, ty)?;
                let parts = parts.iter().map(|p| self.target(p)).collect::<Result<Box<[_]>>>()?;
                Op::Unpack { a, parts, width }
            }
            (_, Operand::List(parts)) => {
                let width = ty.bits() / parts.len().max(1) as u32;
                let of = match width {
                    8 => Ty::B8,
                    16 => Ty::B16,
                    _ => Ty::B32,
                };
                let parts = parts.iter().map(|p| self.source(p, of)).collect::<Result<Box<[_]>>>()?;
                Op::Pack { dst: self.register(d)?, parts, width }
            }
            (_, Operand::Name(n)) if matches!(n.as_str(), "%clock" | "%clock_hi" | "%clock64" | "%globaltimer") => {
                Op::Clock { dst: self.register(d)?, narrow: ty.bytes() < 8 }
            }
            _ => {
                let f = alu::arithmetic("mov", ty, m).ok_or("the instruction is not known")?;
                Op::Alu { f, dst: self.register(d)?, a: self.source(a, ty)?, b: 0, c: 0 }
            }
        };
        Ok((op, Class::Move))
    }
}

/// Operands that an arithmetic instruction reads.
fn operands(name: &str) -> usize {
    match name {
        "neg" | "abs" | "not" | "cnot" | "popc" | "clz" | "brev" | "bfind" | "rcp" | "sqrt" | "rsqrt" | "sin"
        | "cos" | "lg2" | "ex2" | "tanh" => 1,
        "mad" | "fma" | "sad" | "bfe" | "prmt" | "shf" | "slct" | "dp4a" | "fns" | "mad24" => 3,
        _ => 2,
    }
}

fn class(name: &str, ty: Ty) -> Class {
    match (name, ty) {
        ("rcp" | "sqrt" | "rsqrt" | "sin" | "cos" | "lg2" | "ex2" | "tanh", _) => Class::Special,
        (_, Ty::F32) => Class::Float,
        (_, Ty::F64) => Class::Double,
        (_, Ty::F16 | Ty::F16x2 | Ty::Bf16 | Ty::Bf16x2) => Class::Half,
        _ => Class::Integer,
    }
}

impl Decoder<'_> {
    /// Space and offset of a variable.
    pub(super) fn lookup_var(&mut self, name: &str) -> Option<(Space, u64)> {
        match self.lookup(name)? {
            Name::Var(space, at) => Some((space, at)),
            _ => None,
        }
    }
}
