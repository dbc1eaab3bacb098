//! A fused elementwise region: one pass over memory for any number of elementwise ops.
//!
//! Made by the pass `fuse_map`.  The body is straight-line code over registers: `v0..` are the operands, then one
//! register per instruction.  An operand may be smaller than the region's shape: it broadcasts as NumPy does.

use super::map::{BinaryFn, UnaryFn};
use super::shape::{broadcast_index, broadcasts_to};
use super::{Cost, OpDef, OpError, mismatch, traffic};
use crate::attr::{Attr, AttrValue};
use crate::dim::Dim;
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, DType, Ty};

/// What one instruction of a body does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MapFn {
    Unary(UnaryFn),
    Binary(BinaryFn),
    Where,
    Cast(DType),
    Const(f64),
}

/// `v{i} = f(args)` where `i` is the number of operands plus the instruction's place.
#[derive(Clone, Debug, PartialEq)]
pub struct MapInst {
    pub f: MapFn,
    pub args: Vec<u32>,
}

impl AttrValue for MapInst {
    fn expected() -> String {
        "an instruction in quotes such as \"mul v0 v1\" or \"const 0.5\"".into()
    }
    fn to_attr(&self) -> Attr {
        let head = match self.f {
            MapFn::Unary(f) => f.name().to_string(),
            MapFn::Binary(f) => f.name().to_string(),
            MapFn::Where => "where".into(),
            MapFn::Cast(d) => format!("cast.{d}"),
            MapFn::Const(c) => format!("const {c:?}"),
        };
        Attr::Str(self.args.iter().fold(head, |s, a| s + &format!(" v{a}")))
    }
    fn from_attr(a: &Attr) -> Option<Self> {
        let Attr::Str(s) = a else { return None };
        let mut words = s.split_whitespace();
        let head = words.next()?;
        if head == "const" {
            let c = words.next()?.parse().ok()?;
            return words.next().is_none().then_some(MapInst { f: MapFn::Const(c), args: vec![] });
        }
        let args = words.map(|w| w.strip_prefix('v')?.parse().ok()).collect::<Option<Vec<u32>>>()?;
        let (f, n) = if let Some(&u) = UnaryFn::ALL.iter().find(|u| u.name() == head) {
            (MapFn::Unary(u), 1)
        } else if let Some(&b) = BinaryFn::ALL.iter().find(|b| b.name() == head) {
            (MapFn::Binary(b), 2)
        } else if head == "where" {
            (MapFn::Where, 3)
        } else {
            (MapFn::Cast(DType::from_name(head.strip_prefix("cast.")?)?), 1)
        };
        (args.len() == n).then_some(MapInst { f, args })
    }
}

/// A body: instructions and which registers leave it.
pub type MapBody = Vec<MapInst>;

op_struct! {
    /// The fused region.  All results have the shape `shape`; result `i` is register `outs[i]` as `dtypes[i]`.
    FusedMap = "map" { shape: Vec<Dim>, body: MapBody, outs: Vec<usize>, dtypes: Vec<DType> }
}

impl OpDef for FusedMap {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        for (i, t) in x.iter().enumerate() {
            if !broadcasts_to(&t.shape, &self.shape) {
                return Err(mismatch(format!(
                    "operand {i} of shape {:?} does not broadcast to {:?}",
                    t.shape, self.shape
                )));
            }
            if t.dtype == DType::I32 {
                return Err(mismatch(format!("operand {i} is i32; maps compute in floating point")));
            }
        }
        for (i, inst) in self.body.iter().enumerate() {
            if let Some(a) = inst.args.iter().find(|&&a| a as usize >= x.len() + i) {
                return Err(mismatch(format!("instruction {i} reads v{a}, which is not computed before it")));
            }
        }
        if self.outs.is_empty() || self.outs.len() != self.dtypes.len() {
            return Err(mismatch(format!("{} results but {} types", self.outs.len(), self.dtypes.len())));
        }
        if let Some(o) = self.outs.iter().find(|&&o| o >= x.len() + self.body.len()) {
            return Err(mismatch(format!("result v{o} is never computed")));
        }
        if self.dtypes.contains(&DType::I32) {
            return Err(mismatch("maps compute in floating point; no result can be i32"));
        }
        Ok(self.dtypes.iter().map(|&d| Ty::new(d, self.shape.clone())).collect())
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        let ops = self.body.iter().filter(|i| !matches!(i.f, MapFn::Const(_) | MapFn::Cast(_))).count();
        Cost { flops: ops as f64 * y[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let shape = &y[0].shape;
        let n = y[0].elements();
        let maps: Vec<Vec<usize>> = x.iter().map(|a| broadcast_index(&a.shape, shape).collect()).collect();
        let mut out = vec![Vec::with_capacity(n); y.len()];
        let mut v = vec![0.0; x.len() + self.body.len()];
        for i in 0..n {
            for ((r, a), map) in v.iter_mut().zip(x).zip(&maps) {
                *r = a.get(map[i]);
            }
            for (k, inst) in self.body.iter().enumerate() {
                let arg = |j: usize| v[inst.args[j] as usize];
                v[x.len() + k] = match inst.f {
                    MapFn::Unary(f) => f.eval(arg(0)),
                    MapFn::Binary(f) => f.eval(arg(0), arg(1)),
                    MapFn::Where => {
                        if arg(0) != 0.0 {
                            arg(1)
                        } else {
                            arg(2)
                        }
                    }
                    MapFn::Cast(DType::I32) => arg(0).trunc(),
                    MapFn::Cast(DType::Bool) => (arg(0) != 0.0) as u8 as f64,
                    MapFn::Cast(_) => arg(0),
                    MapFn::Const(c) => c,
                };
            }
            for (o, &r) in out.iter_mut().zip(&self.outs) {
                o.push(v[r]);
            }
        }
        out.into_iter().zip(y).map(|(o, t)| HostArray::from_f64(t, o)).collect()
    }
    fn is_elementwise(&self) -> bool {
        true
    }
}
