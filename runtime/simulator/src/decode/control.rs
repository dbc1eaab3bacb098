//! Jumps, calls, barriers, fences and exchange within a warp.

use super::{Decoder, Frame, Result, exactly};
use crate::decode::mods::Mods;
use crate::isa::{Bar, BarKind, Call, Class, Op, Pred, Redux, Shfl, ShflKind, Ty, Vote};
use crate::parse::ast::{Operand, Space};

impl Decoder<'_> {
    pub(super) fn control(&mut self, name: &str, m: &mut Mods, x: &[Operand], line: u32) -> Result<(Op, Class)> {
        Ok(match name {
            "bra" => {
                m.take("uni");
                let [Operand::Name(label)] = x else { return Err("a label is expected".into()) };
                self.jumps.push((self.code.len(), vec![label.clone()], line, self.open.clone()));
                (Op::Bra { target: 0 }, Class::Control)
            }
            "brx" => {
                m.take("idx");
                m.take("uni");
                let [index, Operand::Name(table)] = x else { return Err("an index and a table are expected".into()) };
                let index = self.source(index, Ty::U32)?;
                let targets = self.targets.get(table).ok_or("the table of targets must stand in front")?.clone();
                self.jumps.push((self.code.len(), targets, line, self.open.clone()));
                (Op::Brx { index, targets: [].into() }, Class::Control)
            }
            "call" => {
                m.take("uni");
                (self.call(x, line)?, Class::Control)
            }
            "ret" => {
                m.take("uni");
                (Op::Ret, Class::Control)
            }
            "exit" => (Op::Exit, Class::Control),
            "trap" | "brkpt" => (Op::Trap, Class::Control),
            "nanosleep" => {
                m.take("u32");
                (Op::Hint, Class::Control)
            }
            "griddepcontrol" => {
                let wait = m.one_of(&["launch_dependents", "wait"]).is_some_and(|s| s == "wait");
                (if wait { Op::WaitEarlier } else { Op::Hint }, Class::Control)
            }
            "pmevent" => (Op::Hint, Class::Control),
            "setmaxnreg" => {
                m.one_of(&["inc", "dec"]);
                m.take("sync");
                m.take("aligned");
                m.take("u32");
                (Op::Hint, Class::Control)
            }
            "bar" | "barrier" => (self.barrier(name, m, x)?, Class::Barrier),
            "membar" => {
                let proxy = m.take("proxy");
                let wide = m.one_of(&["gl", "sys", "cta", "alias"]).is_some_and(|s| s == "gl" || s == "sys");
                (Op::Fence { wide, proxy }, Class::Barrier)
            }
            "fence" => {
                let proxy = m.take("proxy");
                m.one_of(&["sc", "acq_rel", "acquire", "release", "mbarrier_init", "alias"]);
                m.find(|s| s.starts_with("async").then_some(()));
                m.one_of(&["global", "shared::cta", "shared::cluster"]);
                m.find(|s| s.starts_with("tensormap").then_some(()));
                m.find(|s| s.starts_with("sync_restrict").then_some(()));
                let mut wide = false;
                while let Some(s) = m.one_of(&["cta", "gpu", "sys", "cluster", "release", "acquire"]) {
                    wide |= s == "gpu" || s == "sys";
                }
                (Op::Fence { wide, proxy }, Class::Barrier)
            }
            "shfl" => {
                m.take("sync");
                let kind = m
                    .find(|s| {
                        Some(match s {
                            "up" => ShflKind::Up,
                            "down" => ShflKind::Down,
                            "bfly" => ShflKind::Bfly,
                            "idx" => ShflKind::Idx,
                            _ => return None,
                        })
                    })
                    .ok_or("the kind of exchange is missing")?;
                m.take("b32");
                let [d, a, b, c, mask] = exactly(x).map_err(|e| format!("{e} (only shfl.sync is known)"))?;
                let (d, p) = match d {
                    Operand::Pair(d, p) => (&**d, self.predicate_target(p)?),
                    _ => (d, None),
                };
                let op = Shfl {
                    kind,
                    dst: self.register(d)?,
                    p,
                    a: self.source(a, Ty::B32)?,
                    b: self.source(b, Ty::U32)?,
                    c: self.source(c, Ty::U32)?,
                    mask: self.source(mask, Ty::U32)?,
                };
                (Op::Shfl(Box::new(op)), Class::Warp)
            }
            "vote" => {
                m.take("sync");
                let kind = self.vote_kind(m)?;
                m.one_of(&["pred", "b32"]);
                let [d, p, mask] = exactly(x).map_err(|e| format!("{e} (only vote.sync is known)"))?;
                let p = self.predicate(p)?;
                let mask = self.source(mask, Ty::U32)?;
                // Of a vote with a predicate result `dst` is the predicate's index.
                let dst = match kind {
                    Vote::Ballot => self.register(d)?,
                    _ => u32::from(self.predicate_target(d)?.unwrap_or(self.carry)),
                };
                (Op::Vote { kind, dst, p, mask }, Class::Warp)
            }
            "match" => {
                let all = m.one_of(&["any", "all"]).ok_or("any or all is missing")? == "all";
                m.take("sync");
                let ty = m.ty().ok_or("a type is missing")?;
                let [d, a, mask] = exactly(x)?;
                let (d, p) = match d {
                    Operand::Pair(d, p) => (&**d, self.predicate_target(p)?),
                    _ => (d, None),
                };
                let (dst, a, mask) = (self.register(d)?, self.source(a, ty)?, self.source(mask, Ty::U32)?);
                (Op::Match { all, wide: ty.bytes() == 8, dst, p, a, mask }, Class::Warp)
            }
            "redux" => {
                m.take("sync");
                let what = m.one_of(&["add", "min", "max", "and", "or", "xor"]).ok_or("the operation is missing")?;
                let ty = m.ty().ok_or("a type is missing")?;
                let kind = match (what, ty) {
                    ("add", Ty::U32 | Ty::S32) => Redux::Add,
                    ("min", Ty::U32) => Redux::MinU,
                    ("max", Ty::U32) => Redux::MaxU,
                    ("min", Ty::S32) => Redux::MinS,
                    ("max", Ty::S32) => Redux::MaxS,
                    ("and", _) => Redux::And,
                    ("or", _) => Redux::Or,
                    ("xor", _) => Redux::Xor,
                    _ => return Err("this operation of this type is not known".into()),
                };
                let [d, a, mask] = exactly(x)?;
                let (dst, a, mask) = (self.register(d)?, self.source(a, ty)?, self.source(mask, Ty::U32)?);
                (Op::Redux { kind, dst, a, mask }, Class::Warp)
            }
            "activemask" => {
                m.take("b32");
                let [d] = exactly(x)?;
                (Op::ActiveMask { dst: self.register(d)? }, Class::Warp)
            }
            _ => {
                // elect.sync d|p, mask
                m.take("sync");
                let [d, mask] = exactly(x)?;
                let Operand::Pair(d, p) = d else { return Err("a register and a predicate are expected".into()) };
                let p = self.predicate_target(p)?.ok_or("a predicate is expected")?;
                (Op::Elect { dst: self.target(d)?, p, mask: self.source(mask, Ty::U32)? }, Class::Warp)
            }
        })
    }

    fn vote_kind(&mut self, m: &mut Mods) -> Result<Vote> {
        m.find(|s| {
            Some(match s {
                "all" => Vote::All,
                "any" => Vote::Any,
                "uni" => Vote::Uni,
                "ballot" => Vote::Ballot,
                _ => return None,
            })
        })
        .ok_or_else(|| "the kind of vote is missing".into())
    }

    fn barrier(&mut self, name: &str, m: &mut Mods, x: &[Operand]) -> Result<Op> {
        if m.take("cluster") {
            let arrive = m.one_of(&["arrive", "wait"]).ok_or("arrive or wait is missing")? == "arrive";
            m.one_of(&["release", "relaxed", "acquire"]);
            let aligned = m.take("aligned");
            return Ok(if arrive { Op::ClusterArrive { aligned } } else { Op::ClusterWait { aligned } });
        }
        if m.take("warp") {
            m.take("sync");
            let [mask] = exactly(x)?;
            return Ok(Op::BarWarp { mask: self.source(mask, Ty::U32)? });
        }
        m.take("cta");
        let what = m.one_of(&["sync", "arrive", "red"]).ok_or("sync, arrive or red is missing")?;
        let aligned = m.take("aligned") || name == "bar";
        let mut bar = Bar { kind: BarKind::Sync, id: 0, threads: None, aligned, dst: None, p_dst: None, p: Pred::TRUE };
        let mut ids = x;
        match what {
            "arrive" => bar.kind = BarKind::Arrive,
            "red" => {
                let kind = m.one_of(&["popc", "and", "or"]).ok_or("the operation is missing")?;
                m.one_of(&["u32", "pred"]);
                let [d, rest @ .., p] = x else { return Err("operands are missing".into()) };
                match kind {
                    "popc" => {
                        bar.kind = BarKind::Popc;
                        bar.dst = Some(self.register(d)?);
                    }
                    "and" => bar.kind = BarKind::Red(Vote::All),
                    _ => bar.kind = BarKind::Red(Vote::Any),
                }
                if kind != "popc" {
                    bar.p_dst = self.predicate_target(d)?;
                }
                bar.p = self.predicate(p)?;
                ids = rest;
            }
            _ => {}
        }
        let [id, rest @ ..] = ids else { return Err("the barrier's number is missing".into()) };
        bar.id = self.source(id, Ty::U32)?;
        bar.threads = match rest {
            [] => None,
            [n] => Some(self.source(n, Ty::U32)?),
            _ => return Err("too many operands".into()),
        };
        if bar.kind == BarKind::Arrive && bar.threads.is_none() {
            return Err("arrive needs the number of threads".into());
        }
        Ok(Op::Bar(Box::new(bar)))
    }

    /// `call (r), f, (a, b)`
    fn call(&mut self, x: &[Operand], line: u32) -> Result<Op> {
        let none = Operand::List(vec![]);
        let (results, name, args) = match x {
            [Operand::List(_), Operand::Name(n), Operand::List(_)] => (&x[0], n, &x[2]),
            [Operand::List(_), Operand::Name(n)] => (&x[0], n, &none),
            [Operand::Name(n), Operand::List(_)] => (&none, n, &x[1]),
            [Operand::Name(n)] => (&none, n, &none),
            _ => return Err("this form of a call is not known (indirect calls are not)".into()),
        };
        let Some(f) = self.module.functions.iter().find(|f| f.name == *name && !f.entry) else {
            return Err(format!("there is no function {name} in the module (indirect calls are not known)"));
        };
        if !self.frames.contains_key(name) {
            let mut frame = Frame { params: vec![], returns: vec![] };
            for v in &f.params {
                frame.params.push((self.new_local(v.bytes, v.align), v.bytes as u32));
            }
            for v in &f.returns {
                frame.returns.push((self.new_local(v.bytes, v.align), v.bytes as u32));
            }
            self.frames.insert(name.clone(), frame);
            self.pending.push(name.clone());
        }
        self.edges.push((self.function.clone(), name.clone(), line));
        let places = |d: &mut Self, list: &Operand| -> Result<Vec<u32>> {
            let Operand::List(all) = list else { return Ok(vec![]) };
            all.iter()
                .map(|o| match o {
                    Operand::Name(n) => match d.lookup_var(n) {
                        Some((Space::Local, at)) => Ok(at as u32),
                        _ => Err(format!("{n} must be a .param variable of this function")),
                    },
                    _ => Err("arguments are .param variables".into()),
                })
                .collect()
        };
        let (results, args) = (places(self, results)?, places(self, args)?);
        let frame = &self.frames[name];
        if args.len() != frame.params.len() || results.len() != frame.returns.len() {
            return Err(format!("{name} takes {} and returns {} values", frame.params.len(), frame.returns.len()));
        }
        let copies = args.iter().zip(&frame.params).map(|(&from, &(to, n))| (from, to, n)).collect();
        let results = results.iter().zip(&frame.returns).map(|(&to, &(from, n))| (from, to, n)).collect();
        self.calls.push((self.code.len(), name.clone()));
        Ok(Op::Call(Box::new(Call { target: 0, copies, results })))
    }
}
