//! Arrays as a device holds them.

use crate::tensor::{Tensor, TensorRef};
use half::{bf16, f16};
use rambac_ir::ty::ConcreteTy;
use rambac_ir::{DType, HostArray};

/// A dense row-major array, lowest byte first.
#[derive(Clone, Debug, PartialEq)]
pub struct Bytes {
    pub ty: ConcreteTy,
    pub data: Vec<u8>,
}

impl Bytes {
    /// Floats are rounded to the array's type.
    pub fn from_host(a: &HostArray) -> Bytes {
        let data = match a.dtype {
            DType::F32 => a.f().iter().flat_map(|&x| (x as f32).to_le_bytes()).collect(),
            DType::BF16 => a.f().iter().flat_map(|&x| bf16::from_f32(x as f32).to_le_bytes()).collect(),
            DType::F16 => a.f().iter().flat_map(|&x| f16::from_f32(x as f32).to_le_bytes()).collect(),
            DType::I32 => a.i().iter().flat_map(|x| x.to_le_bytes()).collect(),
            DType::Bool => (0..a.len()).map(|i| (a.get(i) != 0.0) as u8).collect(),
        };
        Bytes { ty: a.ty(), data }
    }

    pub fn to_host(&self) -> HostArray {
        let four = || self.data.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
        let two = || self.data.chunks_exact(2).map(|b| [b[0], b[1]]);
        let shape = &self.ty.shape;
        match self.ty.dtype {
            DType::F32 => HostArray::f32(shape, four().map(|b| f64::from(f32::from_le_bytes(b)))),
            DType::BF16 => {
                HostArray::float(DType::BF16, shape, two().map(|b| bf16::from_le_bytes(b).to_f64()).collect())
            }
            DType::F16 => HostArray::float(DType::F16, shape, two().map(|b| f16::from_le_bytes(b).to_f64()).collect()),
            DType::I32 => HostArray::i32(shape, four().map(i32::from_le_bytes).collect()),
            DType::Bool => HostArray::bool(shape, self.data.iter().map(|&b| b != 0).collect()),
        }
    }

    /// A copy of a tensor that lies in one piece.
    pub fn from_tensor(t: TensorRef) -> Bytes {
        let data = match t {
            TensorRef::F32(_, v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            TensorRef::Bf16(_, v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            TensorRef::I32(_, v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            TensorRef::Bool(_, v) => v.to_vec(),
            TensorRef::Paged(..) => panic!("BUG: pages have no bytes in one piece"),
        };
        Bytes { ty: t.ty(), data }
    }

    /// f16, which tensors do not hold, becomes f32.
    pub fn to_tensor(&self) -> Tensor {
        match self.ty.dtype {
            // Most of a checkpoint; by way of `to_host` each number would be an f64 for a while.
            DType::F32 => {
                let v = self.data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                Tensor::f32(&self.ty.shape, v)
            }
            _ => Tensor::from_host(&self.to_host()),
        }
    }
}
