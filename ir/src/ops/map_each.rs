//! One elementwise region applied to many tensors of any shapes: the update of every parameter is one op.
//!
//! Made by the pass `fuse_each`.  Every tensor brings operands of its own, all of its shape; scalars at the end serve all.

use super::fused_map::{FusedMap, MapBody};
use super::{Cost, OpDef, OpError, mismatch, traffic};
use crate::dim::Dim;
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, DType, Ty};

op_struct! {
    /// `map_each a0, b0, …, a1, b1, …, s, …`: `own` operands of every tensor, then `shared` scalars.  Registers `v0..` of the
    /// body are a tensor's operands and the scalars; results are the map's of the first tensor, of the second, …
    MapEach = "map_each" { own: usize, shared: usize = 0, body: MapBody, outs: Vec<usize>, dtypes: Vec<DType> }
}

impl MapEach {
    /// The region of a tensor of this shape.
    pub fn map(&self, shape: Vec<Dim>) -> FusedMap {
        FusedMap { shape, body: self.body.clone(), outs: self.outs.clone(), dtypes: self.dtypes.clone() }
    }
    /// The operands of every tensor, and the scalars.
    pub fn split<'a, T>(&self, x: &'a [T]) -> (std::slice::Chunks<'a, T>, &'a [T]) {
        let (own, shared) = x.split_at(x.len().saturating_sub(self.shared));
        (own.chunks(self.own.max(1)), shared)
    }
    /// Whether result `r` may lie over operand `i`: both are the same tensor's, and no other's elements are read for it.
    pub fn may_overwrite(&self, r: usize, i: usize) -> bool {
        r / self.outs.len().max(1) == i / self.own.max(1)
    }
}

impl OpDef for MapEach {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        if self.own == 0 || x.len() < self.shared + self.own || !(x.len() - self.shared).is_multiple_of(self.own) {
            let n = x.len();
            return Err(mismatch(format!("{n} operands are no tensors of {} and {} scalars", self.own, self.shared)));
        }
        let (tensors, shared) = self.split(x);
        if let Some(s) = shared.iter().find(|t| t.rank() > 0) {
            return Err(mismatch(format!("a scalar must have rank 0, but is {s}")));
        }
        let mut out = vec![];
        for own in tensors {
            if let Some(t) = own.iter().find(|t| t.shape != own[0].shape) {
                return Err(mismatch(format!("operands of a tensor differ in shape: {} and {t}", own[0])));
            }
            if let Some((t, first)) = own.iter().zip(x).find(|(t, first)| t.dtype != first.dtype) {
                return Err(mismatch(format!("operands of tensors differ in type: {first} and {t}")));
            }
            let operands: Vec<&Ty> = own.iter().chain(shared).copied().collect();
            out.extend(self.map(own[0].shape.clone()).infer(&operands)?);
        }
        Ok(out)
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        let each = |y: &[ConcreteTy]| self.map(vec![]).cost(&[], y).flops;
        Cost { flops: y.chunks(self.outs.len()).map(each).sum(), bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let (tensors, shared) = self.split(x);
        let map = self.map(vec![]);
        let each = |(own, y): (&[&HostArray], &[ConcreteTy])| {
            map.eval(&own.iter().chain(shared).copied().collect::<Vec<_>>(), y)
        };
        tensors.zip(y.chunks(self.outs.len())).flat_map(each).collect()
    }
}
