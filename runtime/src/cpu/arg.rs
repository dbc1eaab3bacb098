//! An operand or result of a kernel: a pointer with its bound type.

use super::Shaped;
use crate::tensor::{Data, Tensor};
use half::bf16;
use rambac_cpu::{ChunkRows, Mat, MatMut, Rows};
use rambac_ir::ty::ConcreteTy;
use rambac_ir::{DType, HostArray};

/// See the module's comment.  The executor guarantees that it points to memory of its type, that inputs and sources
/// are not written meanwhile, and that a result overlaps an operand only where the op allows it.
pub struct Arg<'a> {
    ptr: *mut u8,
    pub ty: &'a ConcreteTy,
    /// `(cols, stride)`; `None`: contiguous.
    strided: Option<(usize, usize)>,
    pages: Option<&'a dyn ChunkRows>,
}

// SAFETY: see the struct's comment.
unsafe impl Sync for Arg<'_> {}
unsafe impl Send for Arg<'_> {}

impl<'a> Arg<'a> {
    pub(crate) fn new(base: *mut u8, offset: usize, ty: &'a ConcreteTy, strided: Option<(usize, usize)>) -> Self {
        Self { ptr: base.wrapping_add(offset * ty.dtype.size()), ty, strided, pages: None }
    }
    pub(crate) fn paged(ty: &'a ConcreteTy, pages: &'a dyn ChunkRows) -> Self {
        Self { ptr: std::ptr::null_mut(), ty, strided: None, pages: Some(pages) }
    }
    /// The same operand or result.
    pub(crate) fn reborrow(&self) -> Arg<'_> {
        Arg { ..*self }
    }
    pub(crate) fn len(&self) -> usize {
        self.ty.elements()
    }
    pub(crate) fn ptr(&self) -> *mut u8 {
        self.ptr
    }
    /// `(rows, cols, stride)` of the memory.
    pub(crate) fn rows(&self) -> (usize, usize, usize) {
        match self.strided {
            Some((cols, stride)) => (self.len().checked_div(cols).unwrap_or(0), cols, stride),
            None => (1, self.len(), self.len()),
        }
    }
    pub(crate) fn is_contiguous(&self) -> bool {
        self.strided.is_none()
    }

    /// Whether it lies in the same memory as `other`.
    pub(crate) fn is(&self, other: &Arg) -> bool {
        self.ptr == other.ptr
    }

    fn check(&self, dtype: DType) {
        assert!(self.pages.is_none(), "BUG: a kernel that knows no pages got them");
        assert_eq!(self.ty.dtype, dtype, "BUG: a kernel asked {} for {dtype}", self.ty);
    }
    /// As [`mat`](Self::mat), or the pages where they stand for the array.
    pub fn chunk_rows(&self, cols: usize) -> Rows<'_> {
        match self.pages {
            Some(pages) => Rows::Paged(pages),
            None => Rows::Dense(self.mat(cols)),
        }
    }
    fn contiguous(&self) {
        assert!(self.strided.is_none(), "BUG: a kernel without strides got a strided {}", self.ty);
    }
    /// Contiguous floats.
    pub fn f32(&self) -> &[f32] {
        self.check(DType::F32);
        self.contiguous();
        // SAFETY: the struct's contract.
        unsafe { std::slice::from_raw_parts(dangling(self.ptr), self.len()) }
    }
    /// Whether contiguous floats are all finite.
    pub(crate) fn is_finite(&self) -> bool {
        self.f32().iter().all(|v| v.is_finite())
    }
    /// Contiguous integers.
    pub fn i32(&self) -> &[i32] {
        self.check(DType::I32);
        self.contiguous();
        // SAFETY: the struct's contract.
        unsafe { std::slice::from_raw_parts(dangling(self.ptr), self.len()) }
    }
    /// Contiguous bf16s.
    pub fn bf16(&self) -> &[bf16] {
        self.check(DType::BF16);
        self.contiguous();
        // SAFETY: the struct's contract.
        unsafe { std::slice::from_raw_parts(dangling(self.ptr), self.len()) }
    }
    /// Contiguous bf16s of a result.
    #[allow(clippy::mut_from_ref)]
    pub fn bf16_mut(&self) -> &mut [bf16] {
        self.check(DType::BF16);
        self.contiguous();
        // SAFETY: the struct's contract; a kernel takes each result once.
        unsafe { std::slice::from_raw_parts_mut(dangling(self.ptr), self.len()) }
    }
    /// Contiguous floats of a result.
    #[allow(clippy::mut_from_ref)]
    pub fn f32_mut(&self) -> &mut [f32] {
        self.check(DType::F32);
        self.contiguous();
        // SAFETY: the struct's contract; a kernel takes each result once.
        unsafe { std::slice::from_raw_parts_mut(dangling(self.ptr), self.len()) }
    }
    /// Contiguous integers of a result.
    #[allow(clippy::mut_from_ref)]
    pub fn i32_mut(&self) -> &mut [i32] {
        self.check(DType::I32);
        self.contiguous();
        // SAFETY: the struct's contract; a kernel takes each result once.
        unsafe { std::slice::from_raw_parts_mut(dangling(self.ptr), self.len()) }
    }
    /// Contiguous bools of a result, 0 or 1.
    #[allow(clippy::mut_from_ref)]
    pub fn bool_mut(&self) -> &mut [u8] {
        self.check(DType::Bool);
        self.contiguous();
        // SAFETY: the struct's contract; a kernel takes each result once.
        unsafe { std::slice::from_raw_parts_mut(dangling(self.ptr), self.len()) }
    }
    /// As a matrix whose rows are `cols` long, or as long as the view's rows where it is strided (a multiple of `cols`).
    pub fn mat(&self, cols: usize) -> Mat<'_> {
        self.check(DType::F32);
        let (rows, cols, stride) = self.matrix(cols);
        // SAFETY: the struct's contract.
        unsafe { Mat::from_raw(dangling(self.ptr), rows, cols, stride) }
    }
    /// As [`mat`](Self::mat), of bf16s.
    pub fn mat_bf16(&self, cols: usize) -> Mat<'_, bf16> {
        self.check(DType::BF16);
        let (rows, cols, stride) = self.matrix(cols);
        // SAFETY: the struct's contract.
        unsafe { Mat::from_raw(dangling(self.ptr), rows, cols, stride) }
    }
    /// As [`mat`](Self::mat), of a result.
    pub fn mat_mut(&self, cols: usize) -> MatMut<'_> {
        self.check(DType::F32);
        let (rows, cols, stride) = self.matrix(cols);
        // SAFETY: the struct's contract; a kernel takes each result once.
        unsafe { MatMut::from_raw(dangling(self.ptr), rows, cols, stride) }
    }
    fn matrix(&self, cols: usize) -> (usize, usize, usize) {
        match self.strided {
            // Rows without elements are rows still: a product over them is 0.
            None if cols == 0 => (self.shape().split_last().map_or(0, |(_, rows)| rows.iter().product()), 0, 0),
            None => (self.len() / cols, cols, cols),
            Some((c, stride)) => {
                assert!(cols > 0 && c.is_multiple_of(cols), "BUG: rows of {cols} wanted, the view has rows of {c}");
                (self.len().checked_div(c).unwrap_or(0), c, stride)
            }
        }
    }

    /// Copies the elements into `t`, whose memory is used again where it has the type.
    pub(crate) fn copy_to(&self, t: &mut Tensor) {
        if !t.is(self.ty) {
            *t = self.to_tensor();
            return;
        }
        match &mut t.data {
            Data::F32(v) => v.copy_from_slice(self.f32()),
            Data::I32(v) => v.copy_from_slice(self.i32()),
            Data::Bool(v) => {
                self.contiguous();
                // SAFETY: the struct's contract; the type was compared.
                v.copy_from_slice(unsafe { std::slice::from_raw_parts(dangling(self.ptr), self.len()) });
            }
            Data::Bf16(_) => *t = self.to_tensor(),
        }
    }
    pub(crate) fn to_tensor(&self) -> Tensor {
        let data = match self.ty.dtype {
            DType::I32 => Data::I32(self.i32().to_vec()),
            DType::Bool => {
                self.contiguous();
                // SAFETY: the struct's contract.
                Data::Bool(unsafe { std::slice::from_raw_parts(dangling(self.ptr), self.len()) }.to_vec())
            }
            DType::BF16 => Data::Bf16(self.bf16().to_vec().into()),
            _ => Data::F32(self.f32().to_vec()),
        };
        Tensor { shape: self.ty.shape.clone(), data }
    }
    pub(crate) fn to_host(&self) -> HostArray {
        self.to_tensor().to_host()
    }
    pub(crate) fn write_host(&self, a: &HostArray) {
        match Tensor::from_host(a).data {
            Data::F32(v) => self.f32_mut().copy_from_slice(&v),
            Data::Bf16(v) => self.bf16_mut().copy_from_slice(&v),
            Data::I32(v) => self.i32_mut().copy_from_slice(&v),
            // SAFETY: the struct's contract.
            Data::Bool(v) => unsafe { std::ptr::copy_nonoverlapping(v.as_ptr(), self.ptr, v.len()) },
        }
    }
}

/// A null base belongs to an empty buffer; slices want a well-aligned pointer even then.
fn dangling<T>(p: *mut u8) -> *mut T {
    if p.is_null() { std::ptr::NonNull::dangling().as_ptr() } else { p.cast() }
}

impl Arg<'_> {
    /// A row length that this and `others` share: the strided views' rows, else `cols`.
    pub(crate) fn rows_for(&self, cols: usize, others: &[&Arg]) -> usize {
        let strided = std::iter::once(self).chain(others.iter().copied()).find_map(|a| a.strided.map(|(c, _)| c));
        strided.unwrap_or(cols)
    }
}
