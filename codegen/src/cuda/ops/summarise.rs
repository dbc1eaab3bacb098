//! Means of chunks.

use super::{Cuda, Site, Unsupported, because};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Form, Operand};
use crate::cuda::stub::Stub;
use rambac_ir::Dim;
use rambac_ir::ops::*;

const THREADS: usize = 128;

impl Cuda for Summarise {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let (x, y) = (Operand::Input(0), Operand::Output(0));
        site.contiguous(x)?;
        site.contiguous(y)?;
        let (t, shape) = (site.dtype(x), &site.outputs[0].ty.shape);
        let Some(width) = Dim::product(&shape[2..]) else { return because("a size overflows") };
        let fits = |v: &usize| width.is_multiple_of(*v as u64);
        let most = site.vector(&[x, y], 16 / t.size());
        let vec = std::iter::successors(Some(most), |v| (*v > 1).then_some(v / 2)).find(fits).unwrap_or(1);
        let columns = Expr::from(&width).ceil_div(vec);
        let vectors = Expr::product(&shape[..2]) * columns.clone();
        let launch = Stub::new("summarise", "summarise", THREADS)
            .element("T", t)
            .int("chunk", self.chunk)
            .tag(format!("s{}", self.chunk))
            .int("vec", vec)
            .tag(format!("v{vec}"))
            .write("y", t, y)
            .read("x", t, x)
            .i64("width", columns)
            .i64("vectors", vectors.clone())
            .launch((vectors.ceil_div(THREADS), 1, 1));
        Ok(vec![Form::new("summarise", format!("a thread has {vec} columns of a chunk"), vec![launch.into()])])
    }
}
