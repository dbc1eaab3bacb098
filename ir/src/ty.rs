//! Element types and tensor types.

use crate::dim::{Bindings, Dim, DimError};
use std::fmt;

/// The type of an element.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum DType {
    F32,
    BF16,
    F16,
    I32,
    Bool,
}

impl DType {
    pub const ALL: [DType; 5] = [DType::F32, DType::BF16, DType::F16, DType::I32, DType::Bool];

    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            DType::I32 => "i32",
            DType::Bool => "bool",
        }
    }
    pub fn from_name(s: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|d| d.name() == s)
    }
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::BF16 | DType::F16 => 2,
            DType::Bool => 1,
        }
    }
    pub fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::BF16 | DType::F16)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A tensor type: row-major, any rank, rank 0 is a scalar.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Ty {
    pub dtype: DType,
    pub shape: Vec<Dim>,
}

impl Ty {
    pub fn new(dtype: DType, shape: impl IntoIterator<Item = impl Into<Dim>>) -> Self {
        Self { dtype, shape: shape.into_iter().map(Into::into).collect() }
    }
    pub fn scalar(dtype: DType) -> Self {
        Self { dtype, shape: vec![] }
    }
    pub fn f32(shape: impl IntoIterator<Item = impl Into<Dim>>) -> Self {
        Self::new(DType::F32, shape)
    }
    pub fn i32(shape: impl IntoIterator<Item = impl Into<Dim>>) -> Self {
        Self::new(DType::I32, shape)
    }
    pub fn rank(&self) -> usize {
        self.shape.len()
    }
    /// The same shape with another element type.
    pub fn with_dtype(&self, dtype: DType) -> Ty {
        Ty { dtype, shape: self.shape.clone() }
    }
    /// Number of elements as a dim; `None` on overflow.
    pub fn elements(&self) -> Option<Dim> {
        Dim::product(&self.shape)
    }
    pub fn bind(&self, b: &Bindings) -> Result<ConcreteTy, DimError> {
        let shape = self.shape.iter().map(|d| d.eval(b)).collect::<Result<Vec<_>, _>>()?;
        let bytes =
            shape.iter().try_fold(self.dtype.size(), |p, &d| p.checked_mul(d)).filter(|&b| b <= isize::MAX as usize);
        if bytes.is_none() {
            return Err(DimError::Overflow { dim: self.to_string(), bindings: b.to_string() });
        }
        Ok(ConcreteTy { dtype: self.dtype, shape })
    }
}

impl fmt::Display for Ty {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let dims: Vec<String> = self.shape.iter().map(|d| d.to_string()).collect();
        write!(f, "{}[{}]", self.dtype, dims.join(", "))
    }
}
impl fmt::Debug for Ty {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A tensor type with all symbols bound.  Its byte size never overflows `isize`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ConcreteTy {
    pub dtype: DType,
    pub shape: Vec<usize>,
}

impl ConcreteTy {
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
    pub fn bytes(&self) -> usize {
        self.elements() * self.dtype.size()
    }
}

impl fmt::Display for ConcreteTy {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)
    }
}
