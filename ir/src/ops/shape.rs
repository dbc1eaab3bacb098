//! Ops that move elements without computing: broadcast, reshape, transpose, slice, pad, concat.

use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, mismatch, operand};
use crate::dim::Dim;
use crate::graph::Value;
use crate::host::{HostArray, indices, strides};
use crate::op_struct;
use crate::ty::{ConcreteTy, Ty};

/// NumPy's rule: trailing dims are equal or 1 in `from`.
pub fn broadcasts_to(from: &[Dim], to: &[Dim]) -> bool {
    from.len() <= to.len() && from.iter().rev().zip(to.iter().rev()).all(|(f, t)| f == t || f.is_one())
}

/// For each element of `to`, its source position in `from`.
pub fn broadcast_index<'a>(from: &'a [usize], to: &'a [usize]) -> impl Iterator<Item = usize> + 'a {
    let skip = to.len() - from.len();
    let st = strides(from);
    indices(to).map(move |ix| (0..from.len()).map(|k| if from[k] == 1 { 0 } else { ix[skip + k] * st[k] }).sum())
}

op_struct! {
    /// Repeats along new leading axes and axes of size 1.
    Broadcast = "broadcast" { shape: Vec<Dim> }
}

impl OpDef for Broadcast {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 1)?;
        operand(x, 0, broadcasts_to(&x[0].shape, &self.shape), format!("broadcastable to {:?}", self.shape))?;
        Ok(vec![Ty::new(x[0].dtype, self.shape.clone())])
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        vec![x[0].gathered(&y[0].shape, broadcast_index(&x[0].shape, &y[0].shape))]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let from = cx.b.ty(cx.x[0]).clone();
        if !from.dtype.is_float() {
            return Ok(vec![None]);
        }
        let dy = cx.dy(0);
        Ok(vec![Some(cx.b.sum_to(dy, &from.shape))])
    }
    fn is_elementwise(&self) -> bool {
        true
    }
}

op_struct! {
    /// The same elements in the same order under another shape.
    Reshape = "reshape" { shape: Vec<Dim> }
}

impl OpDef for Reshape {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 1)?;
        let y = Ty::new(x[0].dtype, self.shape.clone());
        match (x[0].elements(), y.elements()) {
            (Some(a), Some(b)) if a == b => Ok(vec![y]),
            (Some(a), Some(b)) => Err(mismatch(format!("{} has {a} elements, {:?} has {b}", x[0], self.shape))),
            _ => Err(mismatch("number of elements overflows")),
        }
    }
    fn cost(&self, _: &[ConcreteTy], _: &[ConcreteTy]) -> Cost {
        Cost::default()
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        vec![x[0].reshaped(&y[0].shape)]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let from = cx.b.ty(cx.x[0]).clone();
        if !from.dtype.is_float() {
            return Ok(vec![None]);
        }
        let dy = cx.dy(0);
        Ok(vec![Some(cx.b.reshape(dy, from.shape))])
    }
}

op_struct! {
    /// Axis `i` of the result is axis `perm[i]` of the operand.
    Transpose = "transpose" { perm: Vec<usize> }
}

impl OpDef for Transpose {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 1)?;
        let mut seen = self.perm.clone();
        seen.sort();
        if seen != (0..x[0].rank()).collect::<Vec<_>>() {
            return Err(mismatch(format!("perm {:?} is no permutation of the axes of {}", self.perm, x[0])));
        }
        Ok(vec![Ty::new(x[0].dtype, self.perm.iter().map(|&p| x[0].shape[p].clone()))])
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let st = strides(&x[0].shape);
        let at = |ix: Vec<usize>| ix.iter().zip(&self.perm).map(|(i, &p)| i * st[p]).sum::<usize>();
        vec![x[0].gathered(&y[0].shape, indices(&y[0].shape).map(at))]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        if !cx.b.ty(cx.x[0]).dtype.is_float() {
            return Ok(vec![None]);
        }
        let mut inverse = vec![0; self.perm.len()];
        for (i, &p) in self.perm.iter().enumerate() {
            inverse[p] = i;
        }
        let dy = cx.dy(0);
        Ok(vec![Some(cx.b.transpose(dy, inverse))])
    }
}

fn int_axis(x: &Ty, axis: usize) -> Result<usize, OpError> {
    match x.shape.get(axis) {
        None => Err(mismatch(format!("axis {axis} of {x}, which has rank {}", x.rank()))),
        Some(d) => d.as_int().ok_or_else(|| mismatch(format!("axis {axis} of {x} must have an integer size, not {d}"))),
    }
}

fn with_axis(x: &Ty, axis: usize, size: usize) -> Ty {
    let mut y = x.clone();
    y.shape[axis] = Dim::int(size);
    y
}

op_struct! {
    /// Positions `start..end` along `axis`, whose size is an integer.
    Slice = "slice" { axis: usize, start: usize, end: usize }
}

impl OpDef for Slice {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 1)?;
        let d = int_axis(x[0], self.axis)?;
        if self.start > self.end || self.end > d {
            return Err(mismatch(format!("{}..{} is outside axis {} of {}", self.start, self.end, self.axis, x[0])));
        }
        Ok(vec![with_axis(x[0], self.axis, self.end - self.start)])
    }
    fn cost(&self, _: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 0.0, bytes: 2.0 * y[0].bytes() as f64 }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let st = strides(&x[0].shape);
        let at = |mut ix: Vec<usize>| {
            ix[self.axis] += self.start;
            ix.iter().zip(&st).map(|(i, s)| i * s).sum::<usize>()
        };
        vec![x[0].gathered(&y[0].shape, indices(&y[0].shape).map(at))]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let ty = cx.b.ty(cx.x[0]);
        let d = ty.shape[self.axis].as_int().unwrap_or(0);
        if !ty.dtype.is_float() {
            return Ok(vec![None]);
        }
        let dy = cx.dy(0);
        Ok(vec![Some(cx.b.push(Pad { axis: self.axis, before: self.start, after: d - self.end }, &[dy]))])
    }
}

op_struct! {
    /// Zeros before and after along `axis`, whose size is an integer.
    Pad = "pad" { axis: usize, before: usize, after: usize }
}

impl OpDef for Pad {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 1)?;
        let d = int_axis(x[0], self.axis)?;
        let size = d.checked_add(self.before).and_then(|s| s.checked_add(self.after));
        Ok(vec![with_axis(x[0], self.axis, size.ok_or_else(|| mismatch("padded size overflows"))?)])
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let st = strides(&x[0].shape);
        let d = x[0].shape[self.axis];
        let at = |mut ix: Vec<usize>| {
            let i = ix[self.axis].checked_sub(self.before).filter(|&i| i < d)?;
            ix[self.axis] = i;
            Some(ix.iter().zip(&st).map(|(i, s)| i * s).sum::<usize>())
        };
        vec![HostArray::from_f64(&y[0], indices(&y[0].shape).map(|ix| at(ix).map_or(0.0, |i| x[0].get(i))).collect())]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let ty = cx.b.ty(cx.x[0]);
        if !ty.dtype.is_float() {
            return Ok(vec![None]);
        }
        let d = ty.shape[self.axis].as_int().unwrap_or(0);
        let dy = cx.dy(0);
        Ok(vec![Some(cx.b.slice(dy, self.axis, self.before, self.before + d))])
    }
}

op_struct! {
    /// Operands one after another along `axis`, whose sizes are integers.
    Concat = "concat" { axis: usize }
}

impl OpDef for Concat {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        let Some(first) = x.first() else {
            return Err(OpError::Arity { expected: "at least 1".into(), found: 0 });
        };
        let mut size = 0usize;
        for (i, t) in x.iter().enumerate() {
            let d = int_axis(t, self.axis)?;
            operand(
                x,
                i,
                with_axis(t, self.axis, 0) == with_axis(first, self.axis, 0),
                format!("like {first} but for axis {}", self.axis),
            )?;
            size = size.checked_add(d).ok_or_else(|| mismatch("size overflows"))?;
        }
        Ok(vec![with_axis(first, self.axis, size)])
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let inner: usize = y[0].shape[self.axis + 1..].iter().product();
        let outer: usize = y[0].shape[..self.axis].iter().product();
        let mut out = Vec::with_capacity(y[0].elements());
        for o in 0..outer {
            for a in x {
                let run = a.shape[self.axis] * inner;
                out.extend((o * run..(o + 1) * run).map(|i| a.get(i)));
            }
        }
        vec![HostArray::from_f64(&y[0], out)]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        if !cx.b.ty(cx.y[0]).dtype.is_float() {
            return Ok(vec![None; cx.x.len()]);
        }
        let dy = cx.dy(0);
        let mut at = 0;
        let parts: Vec<Option<Value>> =
            cx.x.iter()
                .map(|&v| {
                    let d = cx.b.ty(v).shape[self.axis].as_int().unwrap_or(0);
                    at += d;
                    Some(cx.b.slice(dy, self.axis, at - d, at))
                })
                .collect();
        Ok(parts)
    }
}
