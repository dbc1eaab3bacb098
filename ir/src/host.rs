//! Arrays of the reference interpreter: floats are held in `f64` whatever their element type.

use crate::ty::{ConcreteTy, DType};

/// The elements of a [`HostArray`].
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    Float(Vec<f64>),
    Int(Vec<i32>),
    Bool(Vec<bool>),
}

/// A dense row-major array.
#[derive(Clone, Debug, PartialEq)]
pub struct HostArray {
    pub dtype: DType,
    pub shape: Vec<usize>,
    pub data: Data,
}

impl HostArray {
    /// An f32 array; `data` in row-major order.
    pub fn f32(shape: &[usize], data: impl IntoIterator<Item = f64>) -> Self {
        Self::float(DType::F32, shape, data.into_iter().collect())
    }
    pub fn float(dtype: DType, shape: &[usize], data: Vec<f64>) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>(), "BUG: {} elements for {shape:?}", data.len());
        Self { dtype, shape: shape.to_vec(), data: Data::Float(data) }
    }
    pub fn i32(shape: &[usize], data: Vec<i32>) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>(), "BUG: {} elements for {shape:?}", data.len());
        Self { dtype: DType::I32, shape: shape.to_vec(), data: Data::Int(data) }
    }
    pub fn bool(shape: &[usize], data: Vec<bool>) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>(), "BUG: {} elements for {shape:?}", data.len());
        Self { dtype: DType::Bool, shape: shape.to_vec(), data: Data::Bool(data) }
    }
    pub fn filled(ty: &ConcreteTy, v: f64) -> Self {
        let n = ty.elements();
        let data = match ty.dtype {
            DType::I32 => Data::Int(vec![v as i32; n]),
            DType::Bool => Data::Bool(vec![v != 0.0; n]),
            _ => Data::Float(vec![v; n]),
        };
        Self { dtype: ty.dtype, shape: ty.shape.clone(), data }
    }
    /// An array of `ty` whose elements come from `f64` values (integers truncate, bool is `!= 0`).
    pub fn from_f64(ty: &ConcreteTy, v: Vec<f64>) -> Self {
        assert_eq!(v.len(), ty.elements(), "BUG: {} elements for {ty}", v.len());
        let data = match ty.dtype {
            DType::I32 => Data::Int(v.iter().map(|&x| x as i32).collect()),
            DType::Bool => Data::Bool(v.iter().map(|&x| x != 0.0).collect()),
            _ => Data::Float(v),
        };
        Self { dtype: ty.dtype, shape: ty.shape.clone(), data }
    }

    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    pub fn ty(&self) -> ConcreteTy {
        ConcreteTy { dtype: self.dtype, shape: self.shape.clone() }
    }
    /// The floats; panics on other types, which shape inference has excluded.
    pub fn f(&self) -> &[f64] {
        match &self.data {
            Data::Float(v) => v,
            _ => panic!("BUG: float data wanted, {} found", self.dtype),
        }
    }
    /// The integers; panics on other types, which shape inference has excluded.
    pub fn i(&self) -> &[i32] {
        match &self.data {
            Data::Int(v) => v,
            _ => panic!("BUG: i32 data wanted, {} found", self.dtype),
        }
    }
    /// Element `at` as `f64` whatever its type.
    pub fn get(&self, at: usize) -> f64 {
        match &self.data {
            Data::Float(v) => v[at],
            Data::Int(v) => v[at] as f64,
            Data::Bool(v) => v[at] as u8 as f64,
        }
    }
    pub fn to_f64(&self) -> Vec<f64> {
        (0..self.len()).map(|i| self.get(i)).collect()
    }
    /// The same elements under another shape.
    pub fn reshaped(&self, shape: &[usize]) -> Self {
        assert_eq!(self.len(), shape.iter().product::<usize>(), "BUG: reshape {:?} to {shape:?}", self.shape);
        Self { dtype: self.dtype, shape: shape.to_vec(), data: self.data.clone() }
    }
    /// The elements picked by `index`, one source position per element of `shape`.
    pub fn gathered(&self, shape: &[usize], index: impl Iterator<Item = usize>) -> Self {
        let data = match &self.data {
            Data::Float(v) => Data::Float(index.map(|i| v[i]).collect()),
            Data::Int(v) => Data::Int(index.map(|i| v[i]).collect()),
            Data::Bool(v) => Data::Bool(index.map(|i| v[i]).collect()),
        };
        Self { dtype: self.dtype, shape: shape.to_vec(), data }
    }
    /// Rounds every float to the precision of the element type.
    pub fn round_to_dtype(&mut self) {
        let dtype = self.dtype;
        if let Data::Float(v) = &mut self.data {
            for x in v {
                *x = round(*x, dtype);
            }
        }
    }
}

/// `x` rounded to nearest even in `dtype`.
pub fn round(x: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F32 => x as f32 as f64,
        DType::BF16 => {
            let f = x as f32;
            if f.is_nan() {
                return f64::NAN;
            }
            let bits = f.to_bits();
            let up = ((bits >> 16) & 1) + 0x7fff;
            f32::from_bits(bits.wrapping_add(up) & 0xffff_0000) as f64
        }
        DType::F16 => {
            if !x.is_finite() || x == 0.0 {
                return x;
            }
            // 11 significant bits, the smallest normal exponent -14, the largest finite 65504.
            let e = x.abs().log2().floor().max(-14.0);
            let ulp = (e - 10.0).exp2();
            let y = (x / ulp).round_ties_even() * ulp;
            if y.abs() > 65504.0 { f64::INFINITY.copysign(x) } else { y }
        }
        DType::I32 | DType::Bool => x,
    }
}

/// Row-major strides of a shape, in elements.
pub fn strides(shape: &[usize]) -> Vec<usize> {
    let mut s = vec![1; shape.len()];
    for i in (0..shape.len().saturating_sub(1)).rev() {
        s[i] = s[i + 1] * shape[i + 1];
    }
    s
}

/// Every index of `shape` in row-major order.
pub fn indices(shape: &[usize]) -> impl Iterator<Item = Vec<usize>> + '_ {
    let n: usize = shape.iter().product();
    let st = strides(shape);
    (0..n).map(move |i| st.iter().zip(shape).map(|(&s, &d)| i / s % d).collect())
}
