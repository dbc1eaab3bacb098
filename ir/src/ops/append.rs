//! Rows that follow what a memory holds: how a segment of a text comes into keys and values that are kept.
//!
//! `y[n, start_n + t] = rows[n, t]`, everything else as in `memory`; rows that would lie beyond its end are left out.  For
//! inference: it has no gradient.

use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, exactly, operand, traffic};
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, DType, Ty};

op_struct! {
    /// `append memory, rows, start`: `memory: [N, T, ..]`, `rows: [N, L, ..]`, `start: i32[N]` → `[N, T, ..]`.
    Append = "append" {}
}

impl OpDef for Append {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 3)?;
        operand(x, 0, x[0].rank() >= 2, "of rank 2 or more: [N, T, ..]")?;
        operand(x, 1, x[1].rank() == x[0].rank(), "of the memory's rank")?;
        let (m, l) = (&x[0].shape, &x[1].shape[1]);
        let rows: Vec<_> = [&m[0], l].into_iter().chain(&m[2..]).collect();
        exactly(x, 1, x[0].dtype, &rows)?;
        exactly(x, 2, DType::I32, &[&m[0]])?;
        Ok(vec![x[0].clone()])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        // What stays need not move.
        Cost { flops: 0.0, bytes: traffic(&x[1..], &[]) + y[0].bytes().min(x[1].bytes()) as f64 }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let (t, l) = (y[0].shape[1], x[1].shape[1]);
        let width: usize = y[0].shape[2..].iter().product();
        let mut out = x[0].to_f64();
        for (i, v) in x[1].to_f64().into_iter().enumerate() {
            let (n, row, col) = (i / (l * width), i / width % l, i % width);
            let at = x[2].i()[n].max(0) as usize + row;
            if at < t {
                out[(n * t + at) * width + col] = v;
            }
        }
        vec![HostArray::from_f64(&y[0], out)]
    }
    fn vjp(&self, _: &mut Vjp) -> Gradients {
        Err(OpError::NoGradient)
    }
}
