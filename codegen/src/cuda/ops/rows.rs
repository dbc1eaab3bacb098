//! Ops on whole rows that need no tensor cores: cross-entropy, embedding and their gradients.

use super::reduce::rows_of;
use super::{Cuda, Site, Unsupported, because};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Form, Operand};
use crate::cuda::stub::Stub;
use crate::cuda::target::Target;
use rambac_ir::ops::*;
use rambac_ir::{DType, Dim};

/// A block per row: long rows are read by more threads.
fn row_threads(cols: &Dim) -> usize {
    cols.as_int().map_or(256, |c| c.div_ceil(8).next_power_of_two().clamp(32, 256))
}

/// What the two kernels of `cross_entropy.cuh` have in common.
pub(super) struct CrossEntropyStub<'a> {
    pub template: &'static str,
    pub dtype: DType,
    pub cols: &'a Dim,
    pub ignore: i64,
    /// Logits that can be moved at once.
    pub vec: usize,
    pub target: &'a Target,
}

/// Bytes of a row up to which the second cache keeps the rows that are under way at a time.
const CACHED: usize = 64 << 10;

/// A stub without its parameters.
pub(super) fn cross_entropy(s: &CrossEntropyStub) -> Result<Stub, Unsupported> {
    let size = s.dtype.size();
    // Gradients read a row twice.  Two blocks are resident: each may hold half, less what sums and the hardware take.
    let bytes = if s.template == "cross_entropy" { 0 } else { s.target.shared_per_block / 2 - 2048 };
    let long = s.cols.as_int().filter(|&cols| cols * size > CACHED && bytes > CACHED / 2);
    let threads = if long.is_some() { 512 } else { row_threads(s.cols) };
    // Turns of all threads.
    let turn = threads * s.vec;
    let held = long.map_or(0, |cols| cols.div_ceil(turn).min(bytes / size / turn) * turn);
    let Ok(ignore) = i32::try_from(s.ignore) else {
        return because(format!("the ignored label {} is no i32", s.ignore));
    };
    Ok(Stub::new("cross_entropy", s.template, threads)
        .tag(s.dtype)
        .int("threads", threads)
        .int("vec", s.vec)
        .tag(format!("v{}", s.vec))
        .int("held", held)
        .tag(format!("h{held}"))
        .shared(held * size)
        .line(format!("static constexpr i32 ignore = {ignore};"))
        .tag(threads)
        .tag(format!("i{}", ignore as u32)))
}

/// Elements of a row that can be moved at once, at most `most`.
pub(super) fn row_vector(cols: &Dim, most: usize) -> usize {
    std::iter::successors(Some(most), |v| (*v > 1).then_some(v / 2))
        .find(|&v| cols.is_multiple_of(v as u64))
        .unwrap_or(1)
}

fn labelled(site: &Site, template: &'static str, ignore: i64) -> Result<(Stub, Dim, Expr), Unsupported> {
    let (z, labels) = (Operand::Input(0), Operand::Input(1));
    site.contiguous(labels)?;
    let shape = &site.inputs[0].ty.shape;
    let cols = shape[shape.len() - 1].clone();
    let rows: Vec<Operand> = if template == "cross_entropy" { vec![z] } else { vec![z, Operand::Output(0)] };
    let widest = rows.iter().map(|&at| site.dtype(at).size()).max().unwrap_or(4);
    let vec = row_vector(&cols, site.vector(&rows, 16 / widest));
    let stub = cross_entropy(&CrossEntropyStub {
        template,
        dtype: site.dtype(z),
        cols: &cols,
        ignore,
        vec,
        target: site.target,
    })?
    .read("z", site.dtype(z), z)
    .i64("stride", site.row_stride(z, shape.len() - 1)?)
    .read("labels", DType::I32, labels);
    Ok((stub, cols, rows_of(shape)))
}

impl Cuda for CrossEntropy {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let y = Operand::Output(0);
        site.contiguous(y)?;
        let (stub, cols, rows) = labelled(site, "cross_entropy", self.ignore)?;
        let l = stub.write("y", site.dtype(y), y).i32("cols", &cols).launch((rows, 1, 1));
        Ok(vec![Form::new("cross_entropy", format!("a block per row of {cols}"), vec![l.into()])])
    }
}

impl Cuda for CrossEntropyGrad {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let (g, y) = (Operand::Input(2), Operand::Output(0));
        site.contiguous(g)?;
        let (stub, cols, rows) = labelled(site, "cross_entropy_grad", self.ignore)?;
        let axis = site.inputs[0].ty.shape.len() - 1;
        let l = stub
            .read("dloss", site.dtype(g), g)
            .write("dz", site.dtype(y), y)
            .i64("dz_stride", site.row_stride(y, axis)?)
            .i32("cols", &cols)
            .launch((rows, 1, 1));
        Ok(vec![Form::new("cross_entropy_grad", format!("a block per row of {cols}"), vec![l.into()])])
    }
}

impl Cuda for Embedding {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        const THREADS: usize = 256;
        let (ids, table, y) = (Operand::Input(0), Operand::Input(1), Operand::Output(0));
        [ids, table].into_iter().try_for_each(|at| site.contiguous(at))?;
        let (vocab, cols) = (&site.inputs[1].ty.shape[0], &site.inputs[1].ty.shape[1]);
        let most = site.vector(&[table, y], 16 / site.dtype(y).size().max(site.dtype(table).size()));
        let w = (0..).map(|k| most >> k).find(|&w| w <= 1 || cols.is_multiple_of(w as u64)).unwrap_or(1);
        let n = Expr::product(&site.inputs[0].ty.shape);
        let l = Stub::new("embedding", "embedding", THREADS)
            .element("T", site.dtype(y))
            .element("Table", site.dtype(table))
            .int("threads", THREADS)
            .int("w", w)
            .tag(w)
            .read("ids", DType::I32, ids)
            .read("table", site.dtype(table), table)
            .write("y", site.dtype(y), y)
            .i64("y_stride", site.row_stride(y, site.outputs[0].ty.shape.len() - 1)?)
            .i64("n", n.clone())
            .i32("cols", cols)
            .i32("vocab", vocab)
            .launch(((n * cols.clone()).ceil_div(THREADS * w), 1, 1));
        Ok(vec![Form::new("embedding", format!("{w} elements a thread"), vec![l.into()])])
    }
}

impl Cuda for EmbeddingGrad {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        const ROWS: usize = 32;
        let (ids, dy, y) = (Operand::Input(0), Operand::Input(1), Operand::Output(0));
        [ids, y].into_iter().try_for_each(|at| site.contiguous(at))?;
        let (vocab, cols) = (&site.outputs[0].ty.shape[0], &site.outputs[0].ty.shape[1]);
        let threads = cols.as_int().map_or(128, |c| c.next_power_of_two().clamp(32, 128));
        let l = Stub::new("embedding", "embedding_grad", threads)
            .element("T", site.dtype(y))
            .int("threads", threads)
            .int("rows", ROWS)
            .int("batch", 16)
            .tag(threads)
            .read("ids", DType::I32, ids)
            .read("dy", site.dtype(dy), dy)
            .i64("stride", site.row_stride(dy, site.inputs[1].ty.shape.len() - 1)?)
            .write("dtable", site.dtype(y), y)
            .i64("n", Expr::product(&site.inputs[0].ty.shape))
            .i32("cols", cols)
            .i32("vocab", vocab)
            .launch((Expr::from(vocab).ceil_div(ROWS), Expr::from(cols).ceil_div(threads), 1));
        let why = format!("a block owns {ROWS} rows of the table, no atomics");
        Ok(vec![Form::new("embedding_grad", why, vec![l.into()])])
    }
}
