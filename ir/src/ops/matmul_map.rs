//! A product with a fused elementwise region on its result: the product itself never reaches memory.
//!
//! Made by the pass `fuse_epilogue`.  Register `v0` of the body is the product, `v1..` are the operands after its two,
//! which broadcast to it; see `fused_map.rs`.

use super::fused_map::{FusedMap, MapBody};
use super::{Cost, MatMul, OpDef, OpError, mismatch, traffic};
use crate::dim::Dim;
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, DType, Ty};

op_struct! {
    /// `matmul_map a, b, …`: the map of `matmul a, b` and the other operands.  All results have the product's shape.
    MatMulMap = "matmul_map" {
        trans_a: bool = false, trans_b: bool = false, body: MapBody, outs: Vec<usize>, dtypes: Vec<DType>
    }
}

impl MatMulMap {
    /// The product's own op.
    pub fn product(&self) -> MatMul {
        MatMul { trans_a: self.trans_a, trans_b: self.trans_b }
    }
    /// The region, whose operands are the product, of this shape, and the rest.
    pub fn map(&self, shape: Vec<Dim>) -> FusedMap {
        FusedMap { shape, body: self.body.clone(), outs: self.outs.clone(), dtypes: self.dtypes.clone() }
    }
}

impl OpDef for MatMulMap {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        let (pair, rest) = x.split_at(x.len().min(2));
        let product = self.product().infer(pair)?.remove(0);
        if product.dtype != DType::F32 {
            return Err(mismatch(format!("the product is {}; maps of products compute in f32", product.dtype)));
        }
        let operands: Vec<&Ty> = std::iter::once(&product).chain(rest.iter().copied()).collect();
        self.map(product.shape.clone()).infer(&operands)
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        let (product, map) = (self.product().cost(&x[..2], y), self.map(vec![]).cost(&x[2..], y));
        Cost { flops: product.flops + map.flops, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let ty = ConcreteTy { dtype: DType::F32, shape: y[0].shape.clone() };
        let product = self.product().eval(&x[..2], &[ty]).remove(0);
        let operands: Vec<&HostArray> = std::iter::once(&product).chain(x[2..].iter().copied()).collect();
        self.map(vec![]).eval(&operands, y)
    }
}
