//! Matrices, asynchronous copies and what they are waited for with.

use super::{Decoder, Result, exactly};
use crate::decode::mods::Mods;
use crate::isa::{
    AtomOp, Bulk, BulkKind, Class, CpAsync, Matrix, MbarrierKind, MbarrierOp, Mma, MmaTy, Op, Slot, Ty, Wgmma,
};
use crate::parse::ast::{Operand, Space};

/// `m16n8k16`
fn shape(m: &mut Mods) -> Option<(u32, u32, u32)> {
    m.find(|s| {
        let (rows, rest) = s.strip_prefix('m')?.split_once('n')?;
        let (cols, depth) = rest.split_once('k').unwrap_or((rest, "0"));
        Some((rows.parse().ok()?, cols.parse().ok()?, depth.parse().ok()?))
    })
}

fn mma_ty(m: &mut Mods) -> Option<MmaTy> {
    m.find(|s| {
        Some(match s {
            "f16" => MmaTy::F16,
            "bf16" => MmaTy::Bf16,
            "tf32" => MmaTy::Tf32,
            "f64" => MmaTy::F64,
            "u8" => MmaTy::U8,
            "s8" => MmaTy::S8,
            _ => return None,
        })
    })
}

fn int(x: &Operand) -> Result<u32> {
    match x {
        Operand::Int(i) => u32::try_from(*i).map_err(|_| format!("{i} is out of range")),
        _ => Err("a constant is expected".into()),
    }
}

fn shared(m: &mut Mods) -> bool {
    m.one_of(&["shared", "shared::cta", "shared::cluster"]).is_some()
}

impl Decoder<'_> {
    pub(super) fn tensor(&mut self, name: &str, m: &mut Mods, x: &[Operand]) -> Result<(Op, Class)> {
        match name {
            "ldmatrix" | "stmatrix" => {
                let load = name == "ldmatrix";
                m.take("sync");
                m.take("aligned");
                if shape(m) != Some((8, 8, 0)) {
                    return Err("only .m8n8 is known".into());
                }
                let count = m.one_of(&["x1", "x2", "x4"]).ok_or(".x1, .x2 or .x4 is missing")?;
                let transposed = m.take("trans");
                let generic = !shared(m);
                m.take("b16");
                let [first, second] = exactly(x)?;
                let (regs, address) = if load { (first, second) } else { (second, first) };
                let regs = if load { self.registers(regs)? } else { self.sources(regs, Ty::B32)? };
                if regs.len() != count[1..].parse().unwrap_or(0) {
                    return Err(format!("{} registers came", regs.len()));
                }
                let a = self.address(address)?;
                let op = Matrix { load, transposed, regs, address: a.base, offset: a.offset, generic };
                Ok((Op::Matrix(Box::new(op)), Class::MatrixMove))
            }
            "movmatrix" => {
                m.take("sync");
                m.take("aligned");
                shape(m);
                m.take("trans");
                m.take("b16");
                let [d, a] = exactly(x)?;
                Ok((Op::MoveMatrix { dst: self.register(d)?, a: self.source(a, Ty::B32)? }, Class::MatrixMove))
            }
            "mma" => self.mma(m, x),
            "wgmma" => self.wgmma(m, x),
            "cp" => self.copy(m, x),
            "mbarrier" => self.mbarrier(m, x),
            _ => {
                let generic = !shared(m);
                m.one_of(&["u32", "u64"]);
                if name == "mapa" {
                    let [d, a, rank] = exactly(x)?;
                    let (dst, a, rank) = (self.register(d)?, self.source(a, Ty::U64)?, self.source(rank, Ty::U32)?);
                    Ok((Op::Mapa { dst, a, rank, generic }, Class::Integer))
                } else {
                    let [d, a] = exactly(x)?;
                    Ok((
                        Op::GetCtaRank { dst: self.register(d)?, a: self.source(a, Ty::U64)?, generic },
                        Class::Integer,
                    ))
                }
            }
        }
    }

    fn mma(&mut self, m: &mut Mods, x: &[Operand]) -> Result<(Op, Class)> {
        if !m.take("sync") {
            return Err("only mma.sync is known".into());
        }
        m.take("aligned");
        let (rows, cols, depth) = shape(m).ok_or("the shape is missing")?;
        if !m.take("row") || !m.take("col") {
            return Err("only .row.col is known".into());
        }
        let saturate = m.take("satfinite");
        let out = m.one_of(&["f32", "f16", "f64", "s32"]).ok_or("the type of the result is missing")?;
        let a_ty = mma_ty(m).ok_or("the type of A is not known")?;
        let b_ty = mma_ty(m).ok_or("the type of B is not known")?;
        let sum = m.one_of(&["f32", "f16", "f64", "s32"]).ok_or("the type of C is missing")?;
        let whole = |t: MmaTy| matches!(t, MmaTy::S8 | MmaTy::U8);
        let known = match a_ty {
            MmaTy::F16 => {
                a_ty == b_ty && matches!((rows, cols, depth), (16, 8, 8 | 16)) && matches!(out, "f32" | "f16")
            }
            MmaTy::Bf16 => a_ty == b_ty && matches!((rows, cols, depth), (16, 8, 8 | 16)) && out == "f32",
            MmaTy::Tf32 => a_ty == b_ty && matches!((rows, cols, depth), (16, 8, 4 | 8)) && out == "f32",
            MmaTy::F64 => a_ty == b_ty && (rows, cols, depth) == (8, 8, 4) && out == "f64",
            _ => whole(b_ty) && matches!((rows, cols, depth), (16, 8, 16 | 32)) && out == "s32",
        };
        if !known {
            return Err("this combination of shape and types is not known".into());
        }
        let [d, a, b, c] = exactly(x)?;
        let op = Mma {
            m: rows as u8,
            n: cols as u8,
            k: depth as u8,
            a_ty,
            b_ty,
            half_sum: sum == "f16",
            half_out: out == "f16",
            saturate,
            d: self.registers(d)?,
            a: self.sources(a, Ty::B64)?,
            b: self.sources(b, Ty::B64)?,
            c: self.sources(
                c,
                if sum == "f64" {
                    Ty::F64
                } else if sum == "f32" {
                    Ty::F32
                } else {
                    Ty::B32
                },
            )?,
        };
        // 32 lanes hold 32 bits in each register.
        let bits = match a_ty {
            MmaTy::F16 | MmaTy::Bf16 => 16,
            MmaTy::Tf32 => 32,
            MmaTy::F64 => 64,
            _ => 8,
        };
        let count = |elements: u32| if a_ty == MmaTy::F64 { elements / 32 } else { elements * bits / 1024 };
        let results = |half: bool| if half { rows * cols / 64 } else { rows * cols / 32 };
        let want = [results(op.half_out), count(rows * depth), count(cols * depth), results(op.half_sum)];
        let have = [op.d.len(), op.a.len(), op.b.len(), op.c.len()];
        if want.iter().zip(have).any(|(&w, h)| w as usize != h) {
            return Err(format!("registers of D, A, B, C must be {want:?}, they are {have:?}"));
        }
        Ok((Op::Mma(Box::new(op)), Class::Tensor))
    }

    fn wgmma(&mut self, m: &mut Mods, x: &[Operand]) -> Result<(Op, Class)> {
        let what = m.one_of(&["mma_async", "fence", "commit_group", "wait_group"]).ok_or("this form is not known")?;
        m.take("sync");
        m.take("aligned");
        match what {
            "fence" => return Ok((Op::WgmmaFence, Class::Barrier)),
            "commit_group" => return Ok((Op::WgmmaCommit, Class::Barrier)),
            "wait_group" => {
                let [n] = exactly(x)?;
                return Ok((Op::WgmmaWait { keep: int(n)? }, Class::Barrier));
            }
            _ => {}
        }
        let (rows, cols, depth) = shape(m).ok_or("the shape is missing")?;
        let out = m.one_of(&["f32", "f16"]).ok_or("only results in f32 and f16 are known")?;
        let a_ty = mma_ty(m).ok_or("the type of A is not known")?;
        let b_ty = mma_ty(m).ok_or("the type of B is not known")?;
        let width = match a_ty {
            MmaTy::F16 | MmaTy::Bf16 => 16,
            MmaTy::Tf32 => 8,
            _ => return Err("this type is not known".into()),
        };
        if rows != 64 || a_ty != b_ty || depth != width || cols % 8 != 0 || !(8..=256).contains(&cols) {
            return Err("this combination of shape and types is not known".into());
        }
        let [d, a, b, scale_d, rest @ ..] = x else { return Err("operands are missing".into()) };
        let one = |o: Option<&Operand>| match o {
            Some(Operand::Int(i)) => Ok(*i),
            None => Ok(0),
            _ => Err("scales and transpositions are constants".to_string()),
        };
        let a_in_shared = !matches!(a, Operand::List(_));
        let (sa, sb) = (one(rest.first())?, one(rest.get(1))?);
        let (ta, tb) = if a_in_shared { (one(rest.get(2))?, one(rest.get(3))?) } else { (0, one(rest.get(2))?) };
        let op = Wgmma {
            n: cols as u16,
            k: depth as u8,
            a_ty,
            b_ty,
            d: self.registers(d)?,
            a: self.sources(a, Ty::B64)?,
            a_in_shared,
            b: self.source(b, Ty::B64)?,
            scale_d: self.predicate(scale_d)?,
            negate_a: sa == -1,
            negate_b: sb == -1,
            transpose_a: ta == 1,
            transpose_b: tb == 1,
            half_out: out == "f16",
        };
        let want = cols as usize / if op.half_out { 4 } else { 2 };
        if op.d.len() != want || (!a_in_shared && op.a.len() != 4) {
            return Err(format!("{want} registers of D are expected, {} came", op.d.len()));
        }
        Ok((Op::Wgmma(Box::new(op)), Class::Tensor))
    }

    fn copy(&mut self, m: &mut Mods, x: &[Operand]) -> Result<(Op, Class)> {
        let reduce = m.take("reduce");
        if !m.take("async") {
            return Err("this form is not known".into());
        }
        if m.take("bulk") {
            return self.bulk(reduce, m, x);
        }
        if m.take("commit_group") {
            return Ok((Op::CpAsyncCommit, Class::AsyncCopy));
        }
        if m.take("wait_group") {
            let [n] = exactly(x)?;
            return Ok((Op::CpAsyncWait { keep: Some(int(n)?) }, Class::AsyncCopy));
        }
        if m.take("wait_all") {
            return Ok((Op::CpAsyncWait { keep: None }, Class::AsyncCopy));
        }
        if m.take("mbarrier") {
            m.take("arrive");
            let noinc = m.take("noinc");
            let space = if shared(m) { Space::Shared } else { Space::Generic };
            m.take("b64");
            let [a] = exactly(x)?;
            let a = self.address(a)?;
            let kind = MbarrierKind::AsyncArrive { noinc };
            let op = MbarrierOp {
                kind,
                space,
                address: a.base,
                offset: a.offset,
                value: None,
                bytes: None,
                dst: None,
                p: None,
            };
            return Ok((Op::Mbarrier(Box::new(op)), Class::Barrier));
        }
        let full = m.one_of(&["ca", "cg"]);
        shared(m);
        m.take("global");
        m.find(|s| s.starts_with("L2::").then_some(()));
        m.find(|s| s.starts_with("L2::").then_some(()));
        let [dst, src, size, rest @ ..] = x else { return Err("operands are missing".into()) };
        let bytes = int(size)?;
        if !matches!(bytes, 4 | 8 | 16) || (full == Some("cg") && bytes != 16) {
            return Err(format!("{bytes} bytes can't be copied: 4, 8 or 16 with .ca, 16 with .cg"));
        }
        let (d, s) = (self.address(dst)?, self.address(src)?);
        let (mut src_bytes, mut ignore) = (None, None);
        if let Some(o) = rest.first() {
            match self.predicate(o) {
                Ok(p) if !matches!(o, Operand::Int(_)) => ignore = Some(p),
                _ => src_bytes = Some(self.source(o, Ty::U32)?),
            }
        }
        let op = CpAsync {
            dst: d.base,
            dst_offset: d.offset,
            src: s.base,
            src_offset: s.offset,
            bytes: bytes as u8,
            src_bytes,
            ignore,
        };
        Ok((Op::CpAsync(Box::new(op)), Class::AsyncCopy))
    }

    fn bulk(&mut self, reduce: bool, m: &mut Mods, x: &[Operand]) -> Result<(Op, Class)> {
        if m.take("commit_group") {
            return Ok((Op::BulkCommit, Class::AsyncCopy));
        }
        if m.take("wait_group") {
            m.take("read");
            let [n] = exactly(x)?;
            return Ok((Op::BulkWait { keep: int(n)? }, Class::AsyncCopy));
        }
        let prefetch = m.take("prefetch");
        let mut dims = 0u8;
        if m.take("tensor") {
            dims = m
                .find(|s| s.strip_suffix('d')?.parse().ok().filter(|d| (1..=5).contains(d)))
                .ok_or("dims are missing")?;
        }
        if m.one_of(&["im2col", "im2col_no_offs", "tile::gather4", "tile::scatter4"]).is_some() {
            return Err("only the mode .tile is known".into());
        }
        m.take("tile");
        // The first space is the destination.
        let to = m.one_of(&["shared::cluster", "shared::cta", "global", "L2"]).ok_or("the destination is missing")?;
        let from = m.one_of(&["shared::cta", "global"]);
        let multicast = m.take("multicast::cluster");
        m.one_of(&["mbarrier::complete_tx::bytes", "bulk_group"]);
        while m.find(|s| s.starts_with("L2::").then_some(())).is_some() {}
        if prefetch {
            return Ok((Op::Hint, Class::AsyncCopy));
        }
        let kind = match (to, from, reduce) {
            ("global", Some("shared::cta"), false) => BulkKind::Store,
            ("global", Some("shared::cta"), true) => {
                let op = m
                    .find(|s| {
                        Some(match s {
                            "add" => AtomOp::Add,
                            "min" => AtomOp::Min,
                            "max" => AtomOp::Max,
                            "and" => AtomOp::And,
                            "or" => AtomOp::Or,
                            "xor" => AtomOp::Xor,
                            _ => return None,
                        })
                    })
                    .ok_or("the operation is not known")?;
                m.take("noftz");
                // Of a tensor the map tells the type.
                let ty = if dims > 0 { Ty::F32 } else { m.ty().ok_or("a type is missing")? };
                BulkKind::Reduce(op, ty)
            }
            ("shared::cluster" | "shared::cta", Some("global"), false) => BulkKind::Load,
            ("shared::cluster", Some("shared::cta"), false) => BulkKind::Cluster,
            _ => return Err("this direction is not known".into()),
        };
        let [dst, src, rest @ ..] = x else { return Err("operands are missing".into()) };
        let (d, s) = (self.address(dst)?, self.address(src)?);
        let into = matches!(kind, BulkKind::Load | BulkKind::Cluster);
        let (sh, gl, map) = if into { (d, s, src) } else { (s, d, dst) };
        let coords: Box<[Slot]> = match map {
            Operand::Address { inner, .. } if dims > 0 => match &inner[..] {
                [list @ Operand::List(_)] => self.sources(list, Ty::S32)?,
                _ => return Err("coordinates in {} are expected".into()),
            },
            _ => [].into(),
        };
        if coords.len() != usize::from(dims) {
            return Err(format!("{dims} coordinates are expected, {} came", coords.len()));
        }
        let mut rest = rest.iter();
        let bytes =
            if dims == 0 { Some(self.source(rest.next().ok_or("the size is missing")?, Ty::U32)?) } else { None };
        let mut mbarrier = None;
        if matches!(kind, BulkKind::Load | BulkKind::Cluster) {
            let a = self.address(rest.next().ok_or("the mbarrier is missing")?)?;
            mbarrier = Some((a.base, a.offset));
        }
        let multicast = if multicast {
            Some(self.source(rest.next().ok_or("the multicast's mask is missing")?, Ty::U16)?)
        } else {
            None
        };
        let op = Bulk {
            kind,
            dims,
            shared: sh.base,
            shared_offset: sh.offset,
            global: gl.base,
            global_offset: gl.offset,
            coords,
            bytes,
            mbarrier,
            multicast,
        };
        Ok((Op::Bulk(Box::new(op)), Class::AsyncCopy))
    }

    fn mbarrier(&mut self, m: &mut Mods, x: &[Operand]) -> Result<(Op, Class)> {
        let what = m
            .one_of(&[
                "init",
                "inval",
                "arrive",
                "arrive_drop",
                "expect_tx",
                "complete_tx",
                "test_wait",
                "try_wait",
                "pending_count",
            ])
            .ok_or("this form is not known")?;
        let expects = matches!(what, "arrive" | "arrive_drop") && m.take("expect_tx");
        m.take("noComplete");
        let parity = m.take("parity");
        m.one_of(&["release", "acquire", "relaxed"]);
        m.one_of(&["cta", "cluster"]);
        let space = if shared(m) { Space::Shared } else { Space::Generic };
        m.take("b64");
        let mut op = MbarrierOp {
            kind: MbarrierKind::Init,
            space,
            address: 0,
            offset: 0,
            value: None,
            bytes: None,
            dst: None,
            p: None,
        };
        let at = |d: &mut Self, op: &mut MbarrierOp, o: &Operand| -> Result<()> {
            let a = d.address(o)?;
            (op.address, op.offset) = (a.base, a.offset);
            // The address of a variable needs no generic form.
            if a.space == Some(Space::Shared) {
                op.space = Space::Shared;
            }
            Ok(())
        };
        match what {
            "init" | "expect_tx" | "complete_tx" => {
                let [a, n] = exactly(x)?;
                at(self, &mut op, a)?;
                let n = self.source(n, Ty::U32)?;
                if what == "init" {
                    op.value = Some(n);
                } else {
                    op.kind = if what == "expect_tx" { MbarrierKind::ExpectTx } else { MbarrierKind::CompleteTx };
                    op.bytes = Some(n);
                }
            }
            "inval" => {
                let [a] = exactly(x)?;
                op.kind = MbarrierKind::Inval;
                at(self, &mut op, a)?;
            }
            "arrive" | "arrive_drop" => {
                op.kind = MbarrierKind::Arrive { drop: what == "arrive_drop" };
                // The state may be left out for a barrier of another block.
                let rest = match x {
                    [d @ Operand::Name(_), rest @ ..] => {
                        op.dst = self.target(d)?;
                        rest
                    }
                    all => all,
                };
                let [a, rest @ ..] = rest else { return Err("an address is expected".into()) };
                at(self, &mut op, a)?;
                match (expects, rest) {
                    (true, [n]) => op.bytes = Some(self.source(n, Ty::U32)?),
                    (false, [n]) => op.value = Some(self.source(n, Ty::U32)?),
                    (false, []) => {}
                    _ => return Err("the number of operands is wrong".into()),
                }
            }
            "pending_count" => {
                let [d, s] = exactly(x)?;
                op.kind = MbarrierKind::PendingCount;
                op.dst = self.target(d)?;
                op.value = Some(self.source(s, Ty::B64)?);
            }
            _ => {
                let [p, a, s, ..] = x else { return Err("operands are missing".into()) };
                op.kind = MbarrierKind::Test { parity, wait: what == "try_wait" };
                op.p = self.predicate_target(p)?;
                at(self, &mut op, a)?;
                op.value = Some(self.source(s, if parity { Ty::U32 } else { Ty::B64 })?);
            }
        }
        Ok((Op::Mbarrier(Box::new(op)), Class::Barrier))
    }
}
