//! Where values come from: graph inputs, persistent params and states, constants, counters.

use super::{Cost, Gradients, OpDef, OpError, OpText, Vjp, arity, mismatch};
use crate::attr::{Attr, AttrError, AttrReader, AttrValue};
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, DType, Ty};

/// Who owns a source's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceKind {
    /// Given anew at every run.
    Input,
    /// A weight: lives between runs, is trained, is in the checkpoint under its name.
    Param,
    /// Lives between runs but is not trained: optimiser moments, carried scan states, counters.
    State,
}

/// A named value from outside: `input "ids" {ty = i32[N, L]}`, `param …`, `state …`.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    pub kind: SourceKind,
    pub name: String,
    pub ty: Ty,
}

impl SourceKind {
    /// `input`, `param` or `state`.
    pub fn name(self) -> &'static str {
        match self {
            SourceKind::Input => "input",
            SourceKind::Param => "param",
            SourceKind::State => "state",
        }
    }
}

impl OpText for Source {
    const MNEMONICS: &'static [&'static str] = &["input", "param", "state"];
    fn mnemonic(&self) -> &'static str {
        self.kind.name()
    }
    fn attrs(&self) -> Vec<(&'static str, Attr)> {
        vec![("name", self.name.to_attr()), ("ty", self.ty.to_attr())]
    }
    fn read(mnemonic: &str, r: &mut AttrReader) -> Result<Self, AttrError> {
        let kind = match mnemonic {
            "input" => SourceKind::Input,
            "param" => SourceKind::Param,
            _ => SourceKind::State,
        };
        Ok(Self { kind, name: r.required("name")?, ty: r.required("ty")? })
    }
}

impl OpDef for Source {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 0)?;
        Ok(vec![self.ty.clone()])
    }
    fn cost(&self, _: &[ConcreteTy], _: &[ConcreteTy]) -> Cost {
        Cost::default()
    }
    fn eval(&self, _: &[&HostArray], _: &[ConcreteTy]) -> Vec<HostArray> {
        panic!("BUG: the interpreter supplies sources")
    }
    fn vjp(&self, _: &mut Vjp) -> Gradients {
        Ok(vec![])
    }
}

op_struct! {
    /// One number everywhere: `constant {value = 0.5, ty = f32[N, L]}`.
    Constant = "constant" { value: f64, ty: Ty }
}

impl OpDef for Constant {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 0)?;
        let ok = match self.ty.dtype {
            DType::I32 => self.value.fract() == 0.0 && self.value.abs() <= i32::MAX as f64,
            DType::Bool => self.value == 0.0 || self.value == 1.0,
            _ => true,
        };
        if ok { Ok(vec![self.ty.clone()]) } else { Err(mismatch(format!("{} is no {}", self.value, self.ty.dtype))) }
    }
    fn eval(&self, _: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        vec![HostArray::filled(&y[0], self.value)]
    }
    fn vjp(&self, _: &mut Vjp) -> Gradients {
        Ok(vec![])
    }
}

op_struct! {
    /// The index along `axis`: `iota {axis = 1, ty = i32[N, L]}`.
    Iota = "iota" { axis: usize, ty: Ty }
}

impl OpDef for Iota {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 0)?;
        if self.axis >= self.ty.rank() || self.ty.dtype == DType::Bool {
            return Err(mismatch(format!("axis {} of {} counts nothing", self.axis, self.ty)));
        }
        Ok(vec![self.ty.clone()])
    }
    fn eval(&self, _: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let inner: usize = y[0].shape[self.axis + 1..].iter().product();
        let d = y[0].shape[self.axis];
        vec![HostArray::from_f64(&y[0], (0..y[0].elements()).map(|i| (i / inner % d) as f64).collect())]
    }
    fn vjp(&self, _: &mut Vjp) -> Gradients {
        Ok(vec![])
    }
}
