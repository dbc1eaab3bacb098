//! The elementwise family: one row per function with its definition and derivative.
//!
//! Operands of an elementwise op have one shape; `broadcast` makes it so (the builder inserts it).

use super::{Cost, Gradients, OpDef, OpError, OpText, Vjp, arity, float, mismatch, operand, traffic};
use crate::attr::{Attr, AttrError, AttrReader};
use crate::builder::Builder;
use crate::graph::Value;
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, DType, Ty};

macro_rules! unary_table {
    ($($(#[$d:meta])* $case:ident, $name:literal, $f:expr, $vjp:expr;)*) => {
        /// Functions of one element.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum UnaryFn { $($(#[$d])* $case),* }
        impl UnaryFn {
            pub const ALL: &'static [UnaryFn] = &[$(UnaryFn::$case),*];
            const NAMES: &'static [&'static str] = &[$($name),*];
            pub fn name(self) -> &'static str { Self::NAMES[self as usize] }
            /// The definition.
            pub fn eval(self, x: f64) -> f64 { let f: fn(f64) -> f64 = match self { $(UnaryFn::$case => $f),* }; f(x) }
            fn vjp(self, b: &mut Builder, x: Value, y: Value, dy: Value) -> Value {
                let f: fn(&mut Builder, Value, Value, Value) -> Value = match self { $(UnaryFn::$case => $vjp),* };
                f(b, x, y, dy)
            }
        }
    };
}

/// The logistic function without overflow.
pub fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) }
}

/// `ln(1 + e^x)` without overflow.
pub fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

unary_table! {
    Neg, "neg", |x| -x, |b, _, _, dy| b.neg(dy);
    Exp, "exp", f64::exp, |b, _, y, dy| b.mul(dy, y);
    Log, "log", f64::ln, |b, x, _, dy| b.div(dy, x);
    Sqrt, "sqrt", f64::sqrt, |b, _, y, dy| { let h = b.scale(dy, 0.5); b.div(h, y) };
    /// `1/sqrt(x)`
    Rsqrt, "rsqrt", |x| 1.0 / x.sqrt(), |b, x, y, dy| {
        let t = b.div(y, x);
        let t = b.mul(dy, t);
        b.scale(t, -0.5)
    };
    /// `1/x`
    Recip, "recip", |x| 1.0 / x, |b, _, y, dy| { let t = b.square(y); let t = b.mul(dy, t); b.neg(t) };
    Sigmoid, "sigmoid", sigmoid, |b, _, y, dy| {
        let one = b.scalar_like(1.0, y);
        let t = b.sub(one, y);
        let t = b.mul(t, y);
        b.mul(dy, t)
    };
    /// `x * sigmoid(x)`
    Silu, "silu", |x| x * sigmoid(x), |b, x, y, dy| {
        // s + y (1 - s)
        let s = b.sigmoid(x);
        let one = b.scalar_like(1.0, x);
        let t = b.sub(one, s);
        let t = b.mul(y, t);
        let t = b.add(s, t);
        b.mul(dy, t)
    };
    Softplus, "softplus", softplus, |b, x, _, dy| { let s = b.sigmoid(x); b.mul(dy, s) };
    Tanh, "tanh", f64::tanh, |b, _, y, dy| {
        let t = b.square(y);
        let one = b.scalar_like(1.0, y);
        let t = b.sub(one, t);
        b.mul(dy, t)
    };
    Relu, "relu", |x| if x < 0.0 { 0.0 } else { x }, |b, x, _, dy| {
        let zero = b.scalar_like(0.0, x);
        let c = b.binary(BinaryFn::Gt, x, zero);
        b.select_where(c, dy, zero)
    };
    Abs, "abs", f64::abs, |b, x, _, dy| {
        let zero = b.scalar_like(0.0, x);
        let c = b.binary(BinaryFn::Lt, x, zero);
        let n = b.neg(dy);
        b.select_where(c, n, dy)
    };
    Square, "square", |x| x * x, |b, x, _, dy| { let t = b.mul(dy, x); b.scale(t, 2.0) };
    Sin, "sin", f64::sin, |b, x, _, dy| { let c = b.unary(UnaryFn::Cos, x); b.mul(dy, c) };
    /// `x`, through which no gradient flows.
    Detach, "detach", |x| x, |b, _, _, dy| b.scalar_like(0.0, dy);
    Cos, "cos", f64::cos, |b, x, _, dy| { let s = b.unary(UnaryFn::Sin, x); let t = b.mul(dy, s); b.neg(t) };
}

/// A function of one element.
#[derive(Clone, Debug, PartialEq)]
pub struct Unary {
    pub f: UnaryFn,
}

impl OpText for Unary {
    const MNEMONICS: &'static [&'static str] = UnaryFn::NAMES;
    fn mnemonic(&self) -> &'static str {
        self.f.name()
    }
    fn attrs(&self) -> Vec<(&'static str, Attr)> {
        vec![]
    }
    fn read(mnemonic: &str, _: &mut AttrReader) -> Result<Self, AttrError> {
        let f = UnaryFn::ALL.iter().copied().find(|f| f.name() == mnemonic).expect("BUG: a mnemonic of this family");
        Ok(Self { f })
    }
}

impl OpDef for Unary {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 1)?;
        float(x, 0)?;
        Ok(vec![x[0].clone()])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: y[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        vec![HostArray::from_f64(&y[0], x[0].f().iter().map(|&v| self.f.eval(v)).collect())]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let dy = cx.dy(0);
        Ok(vec![Some(self.f.vjp(cx.b, cx.x[0], cx.y[0], dy))])
    }
    fn is_elementwise(&self) -> bool {
        true
    }
}

macro_rules! binary_table {
    ($($case:ident, $name:literal, $result:ident, $f:expr;)*) => {
        /// Functions of two elements.  Comparisons give `bool`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum BinaryFn { $($case),* }
        impl BinaryFn {
            pub const ALL: &'static [BinaryFn] = &[$(BinaryFn::$case),*];
            const NAMES: &'static [&'static str] = &[$($name),*];
            pub fn name(self) -> &'static str { Self::NAMES[self as usize] }
            /// The definition; comparisons give 0 or 1.
            pub fn eval(self, a: f64, b: f64) -> f64 {
                let f: fn(f64, f64) -> f64 = match self { $(BinaryFn::$case => $f),* };
                f(a, b)
            }
            pub fn is_comparison(self) -> bool { match self { $(BinaryFn::$case => stringify!($result) == "Bool"),* } }
        }
    };
}

binary_table! {
    Add, "add", Same, |a, b| a + b;
    Sub, "sub", Same, |a, b| a - b;
    Mul, "mul", Same, |a, b| a * b;
    Div, "div", Same, |a, b| a / b;
    Max, "max", Same, f64::max;
    Min, "min", Same, f64::min;
    Lt, "lt", Bool, |a, b| (a < b) as u8 as f64;
    Le, "le", Bool, |a, b| (a <= b) as u8 as f64;
    Gt, "gt", Bool, |a, b| (a > b) as u8 as f64;
    Ge, "ge", Bool, |a, b| (a >= b) as u8 as f64;
    Eq, "eq", Bool, |a, b| (a == b) as u8 as f64;
    Ne, "ne", Bool, |a, b| (a != b) as u8 as f64;
}

/// A function of two elements of one shape and type; i32 has everything but `div`.
#[derive(Clone, Debug, PartialEq)]
pub struct Binary {
    pub f: BinaryFn,
}

impl OpText for Binary {
    const MNEMONICS: &'static [&'static str] = BinaryFn::NAMES;
    fn mnemonic(&self) -> &'static str {
        self.f.name()
    }
    fn attrs(&self) -> Vec<(&'static str, Attr)> {
        vec![]
    }
    fn read(mnemonic: &str, _: &mut AttrReader) -> Result<Self, AttrError> {
        let f = BinaryFn::ALL.iter().copied().find(|f| f.name() == mnemonic).expect("BUG: a mnemonic of this family");
        Ok(Self { f })
    }
}

impl OpDef for Binary {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 2)?;
        if x[0] != x[1] {
            return Err(mismatch(format!("operands differ: {} vs {}; broadcast or cast one", x[0], x[1])));
        }
        let int_ok = self.f != BinaryFn::Div;
        let ok = x[0].dtype.is_float() || (x[0].dtype == DType::I32 && int_ok);
        operand(x, 0, ok, if int_ok { "of a float type or i32" } else { "of a float type" })?;
        Ok(vec![if self.f.is_comparison() { x[0].with_dtype(DType::Bool) } else { x[0].clone() }])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: y[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        vec![HostArray::from_f64(&y[0], (0..x[0].len()).map(|i| self.f.eval(x[0].get(i), x[1].get(i))).collect())]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        if self.f.is_comparison() || cx.b.ty(cx.x[0]).dtype == DType::I32 {
            return Ok(vec![None, None]);
        }
        let dy = cx.dy(0);
        let (a, c, y) = (cx.x[0], cx.x[1], cx.y[0]);
        let b = &mut *cx.b;
        Ok(match self.f {
            BinaryFn::Add => vec![Some(dy), Some(dy)],
            BinaryFn::Sub => vec![Some(dy), Some(b.neg(dy))],
            BinaryFn::Mul => vec![Some(b.mul(dy, c)), Some(b.mul(dy, a))],
            BinaryFn::Div => {
                let da = b.div(dy, c);
                let t = b.mul(da, y);
                vec![Some(da), Some(b.neg(t))]
            }
            // At a tie the whole gradient goes to the first operand.
            BinaryFn::Max | BinaryFn::Min => {
                let zero = b.scalar_like(0.0, dy);
                let f = if self.f == BinaryFn::Max { BinaryFn::Ge } else { BinaryFn::Le };
                let first = b.binary(f, a, c);
                vec![Some(b.select_where(first, dy, zero)), Some(b.select_where(first, zero, dy))]
            }
            _ => unreachable!("BUG: comparisons returned above"),
        })
    }
    fn is_elementwise(&self) -> bool {
        true
    }
}

op_struct! {
    /// `where c, a, b`: `a` where `c` holds, else `b`.
    Where = "where" {}
}

impl OpDef for Where {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 3)?;
        operand(x, 0, x[0].dtype == DType::Bool, "bool")?;
        if x[1] != x[2] || x[0].shape != x[1].shape {
            return Err(mismatch(format!("operands differ: {}, {}, {}", x[0], x[1], x[2])));
        }
        Ok(vec![x[1].clone()])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: y[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let pick = |i: usize| if x[0].get(i) != 0.0 { x[1].get(i) } else { x[2].get(i) };
        vec![HostArray::from_f64(&y[0], (0..x[0].len()).map(pick).collect())]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        if !cx.b.ty(cx.y[0]).dtype.is_float() {
            return Ok(vec![None, None, None]);
        }
        let (dy, c) = (cx.dy(0), cx.x[0]);
        let zero = cx.b.scalar_like(0.0, dy);
        Ok(vec![None, Some(cx.b.select_where(c, dy, zero)), Some(cx.b.select_where(c, zero, dy))])
    }
    fn is_elementwise(&self) -> bool {
        true
    }
}

op_struct! {
    /// Another element type: floats round to nearest even, to i32 truncates, to bool is `!= 0`.
    Cast = "cast" { to: DType }
}

impl OpDef for Cast {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 1)?;
        Ok(vec![x[0].with_dtype(self.to)])
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        vec![HostArray::from_f64(&y[0], x[0].to_f64())]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let from = cx.b.ty(cx.x[0]).dtype;
        if !from.is_float() || !self.to.is_float() {
            return Ok(vec![None]);
        }
        let dy = cx.dy(0);
        Ok(vec![Some(cx.b.cast(dy, from))])
    }
    fn is_elementwise(&self) -> bool {
        true
    }
}
