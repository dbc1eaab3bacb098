//! Tensors in host memory: what goes into a run and what comes out.

use crate::bf16_data::Bf16Data;
use half::bf16;
use rambac_cpu::ChunkRows;
use rambac_ir::ty::ConcreteTy;
use rambac_ir::{DType, HostArray};

/// The elements of a [`Tensor`].
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    F32(Vec<f32>),
    Bf16(Bf16Data),
    I32(Vec<i32>),
    /// One byte an element, 0 or 1.
    Bool(Vec<u8>),
}

/// A dense row-major tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data: Data,
}

impl Tensor {
    pub fn f32(shape: &[usize], data: Vec<f32>) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>(), "BUG: {} elements for {shape:?}", data.len());
        Self { shape: shape.to_vec(), data: Data::F32(data) }
    }
    pub fn bf16(shape: &[usize], data: Bf16Data) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>(), "BUG: {} elements for {shape:?}", data.len());
        Self { shape: shape.to_vec(), data: Data::Bf16(data) }
    }
    pub fn i32(shape: &[usize], data: Vec<i32>) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>(), "BUG: {} elements for {shape:?}", data.len());
        Self { shape: shape.to_vec(), data: Data::I32(data) }
    }
    /// Zeros of a type.
    pub fn zeros(ty: &ConcreteTy) -> Self {
        let n = ty.elements();
        let data = match ty.dtype {
            DType::I32 => Data::I32(vec![0; n]),
            DType::Bool => Data::Bool(vec![0; n]),
            DType::BF16 => Data::Bf16(vec![bf16::ZERO; n].into()),
            _ => Data::F32(vec![0.0; n]),
        };
        Self { shape: ty.shape.clone(), data }
    }
    pub fn dtype(&self) -> DType {
        match self.data {
            Data::F32(_) => DType::F32,
            Data::Bf16(_) => DType::BF16,
            Data::I32(_) => DType::I32,
            Data::Bool(_) => DType::Bool,
        }
    }
    pub fn ty(&self) -> ConcreteTy {
        ConcreteTy { dtype: self.dtype(), shape: self.shape.clone() }
    }
    /// Whether this is a tensor of type `ty`.
    pub fn is(&self, ty: &ConcreteTy) -> bool {
        self.dtype() == ty.dtype && self.shape == ty.shape
    }
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The floats; `None` for another type.
    pub fn as_f32(&self) -> Option<&[f32]> {
        if let Data::F32(v) = &self.data { Some(v) } else { None }
    }
    /// Rounds f32 to bf16, to nearest even; other types stay.
    pub fn narrow(&mut self) {
        if let Data::F32(v) = &self.data {
            self.data = Data::Bf16(Bf16Data::round(v));
        }
    }
    /// The integers; `None` for another type.
    pub fn as_i32(&self) -> Option<&[i32]> {
        if let Data::I32(v) = &self.data { Some(v) } else { None }
    }
    pub fn view(&self) -> TensorRef<'_> {
        match &self.data {
            Data::F32(v) => TensorRef::F32(&self.shape, v),
            Data::Bf16(v) => TensorRef::Bf16(&self.shape, v),
            Data::I32(v) => TensorRef::I32(&self.shape, v),
            Data::Bool(v) => TensorRef::Bool(&self.shape, v),
        }
    }
    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        match &mut self.data {
            Data::F32(v) => v.as_mut_ptr().cast(),
            Data::Bf16(v) => v.make_mut().as_mut_ptr().cast(),
            Data::I32(v) => v.as_mut_ptr().cast(),
            Data::Bool(v) => v.as_mut_ptr(),
        }
    }
    pub fn to_host(&self) -> HostArray {
        match &self.data {
            Data::F32(v) => HostArray::f32(&self.shape, v.iter().map(|&x| x as f64)),
            Data::Bf16(v) => HostArray::float(DType::BF16, &self.shape, v.iter().map(|x| x.to_f64()).collect()),
            Data::I32(v) => HostArray::i32(&self.shape, v.clone()),
            Data::Bool(v) => HostArray::bool(&self.shape, v.iter().map(|&x| x != 0).collect()),
        }
    }
    /// Rounds floats to the element type, and f16, which tensors do not hold, to f32.
    pub fn from_host(a: &HostArray) -> Self {
        let data = match a.dtype {
            DType::I32 => Data::I32(a.i().to_vec()),
            DType::Bool => Data::Bool((0..a.len()).map(|i| a.get(i) as u8).collect()),
            DType::BF16 => Data::Bf16(a.f().iter().map(|&x| bf16::from_f32(x as f32)).collect::<Vec<_>>().into()),
            _ => Data::F32(a.f().iter().map(|&x| x as f32).collect()),
        };
        Self { shape: a.shape.clone(), data }
    }
}

/// A borrowed tensor.
#[derive(Clone, Copy, Debug)]
pub enum TensorRef<'a> {
    F32(&'a [usize], &'a [f32]),
    Bf16(&'a [usize], &'a [bf16]),
    I32(&'a [usize], &'a [i32]),
    Bool(&'a [usize], &'a [u8]),
    /// Floats of a chunk memory in pages; only kernels that say so read them (`KernelTraits::paged_inputs`).
    Paged(&'a [usize], &'a dyn ChunkRows),
}

impl<'a> TensorRef<'a> {
    fn parts(&self) -> (DType, &'a [usize]) {
        match self {
            TensorRef::F32(s, _) => (DType::F32, s),
            TensorRef::Bf16(s, _) => (DType::BF16, s),
            TensorRef::I32(s, _) => (DType::I32, s),
            TensorRef::Bool(s, _) => (DType::Bool, s),
            TensorRef::Paged(s, _) => (DType::F32, s),
        }
    }
    pub fn ty(&self) -> ConcreteTy {
        let (dtype, shape) = self.parts();
        ConcreteTy { dtype, shape: shape.to_vec() }
    }
    /// Whether this is a whole tensor of type `ty`.
    pub fn is(&self, ty: &ConcreteTy) -> bool {
        let (dtype, shape) = self.parts();
        dtype == ty.dtype && *shape == *ty.shape && self.len() == ty.elements()
    }
    /// Elements actually there.
    pub fn len(&self) -> usize {
        match self {
            TensorRef::F32(_, v) => v.len(),
            TensorRef::Bf16(_, v) => v.len(),
            TensorRef::I32(_, v) => v.len(),
            TensorRef::Bool(_, v) => v.len(),
            TensorRef::Paged(s, _) => s.iter().product(),
        }
    }
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    pub(crate) fn as_ptr(&self) -> *const u8 {
        match self {
            TensorRef::F32(_, v) => v.as_ptr().cast(),
            TensorRef::Bf16(_, v) => v.as_ptr().cast(),
            TensorRef::I32(_, v) => v.as_ptr().cast(),
            TensorRef::Bool(_, v) => v.as_ptr(),
            TensorRef::Paged(..) => std::ptr::null(),
        }
    }
    pub(crate) fn pages(&self) -> Option<&'a dyn ChunkRows> {
        if let TensorRef::Paged(_, p) = self { Some(*p) } else { None }
    }
}
