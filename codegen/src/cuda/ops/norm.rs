//! RMS norm, gated or not, with its gradient, and the rotary embedding: rows held by the lanes of a warp or by a block.

use super::reduce::rows_of;
use super::slots::Slots;
use super::{Cuda, Site, Unsupported, because};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Form, Operand};
use crate::cuda::stub::Stub;
use rambac_ir::ops::*;
use rambac_ir::{DType, Dim};

/// Threads that hold a row, `vec` neighbouring elements each time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lanes {
    vec: usize,
    lanes: usize,
    threads: usize,
}

impl Lanes {
    /// Lanes of one warp as long as each has at most `most` elements, else a block.
    fn choose(width: usize, vec: usize, most: usize) -> Option<Lanes> {
        let vectors = width.div_ceil(vec).next_power_of_two();
        let lanes = vectors.min(32).max(width.div_ceil(most.max(vec)).next_power_of_two());
        // More than a warp: then the block.
        let threads = if lanes > 32 { lanes } else { 128 };
        (lanes <= 1024).then_some(Lanes { vec, lanes, threads })
    }
    fn rows(self) -> usize {
        self.threads / self.lanes
    }
}

struct Norm {
    width: usize,
    rows: Expr,
    dtype: DType,
    lanes: Lanes,
    axis: usize,
    eps: f64,
}

impl Norm {
    fn new(site: &Site, eps: f64, vectors: &[Operand], most: usize) -> Result<Norm, Unsupported> {
        let x = Operand::Input(0);
        let shape: &[Dim] = &site.inputs[0].ty.shape;
        let axis = shape.len() - 1;
        let (width, dtype) = (site.int(x, axis)?, site.dtype(x));
        let even = 1 << width.max(1).trailing_zeros().min(4);
        // Rows in f32 are read in two pieces beside rows of 16 bits.
        let least = vectors.iter().map(|&at| site.dtype(at).size()).min().unwrap_or(dtype.size());
        let vec = site.vector(vectors, even.min(16 / least));
        let Some(lanes) = Lanes::choose(width.max(1), vec, most) else {
            return because(format!("rows of {width} are wider than the {} that a block holds", 1024 * most));
        };
        Ok(Norm { width, rows: rows_of(shape), dtype, lanes, axis, eps })
    }
    fn stub(&self, template: &'static str) -> Stub {
        let l = self.lanes;
        Stub::new("rms_norm", template, l.threads)
            .tag(self.dtype)
            .int("width", self.width)
            .tag(self.width)
            .float("eps", self.eps)
            .int("vec", l.vec)
            .int("lanes", l.lanes)
            .int("threads", l.threads)
            .tag(format!("v{}x{}", l.vec, l.lanes))
            .hashed()
    }
    fn who(&self) -> String {
        match self.lanes.lanes {
            l if l > 32 => format!("a block of {l} threads holds a row of {}", self.width),
            l => format!("{l} lanes hold a row of {}", self.width),
        }
    }
}

/// Rows of operands: addresses and distances.
impl Norm {
    fn read(&self, site: &Site, stub: Stub, name: &str, at: Operand) -> Result<Stub, Unsupported> {
        Ok(stub.read(name, site.dtype(at), at).i64(&format!("{name}_stride"), site.row_stride(at, self.axis)?))
    }
    fn write(&self, site: &Site, stub: Stub, name: &str, at: Operand) -> Result<Stub, Unsupported> {
        Ok(stub.write(name, site.dtype(at), at).i64(&format!("{name}_stride"), site.row_stride(at, self.axis)?))
    }
}

const X: Operand = Operand::Input(0);

/// The norm of x, or of x·silu(z).
fn forward(site: &Site, eps: f64, z: Option<Operand>, w: Operand) -> Result<Vec<Form>, Unsupported> {
    let y = Operand::Output(0);
    site.contiguous(w)?;
    let vectors: Vec<Operand> = [X, w, y].into_iter().chain(z).collect();
    let n = Norm::new(site, eps, &vectors, 32)?;
    let name = if z.is_some() { "gated_rms_norm" } else { "rms_norm" };
    let mut stub = n.read(site, n.stub(name), "x", X)?;
    if let Some(z) = z {
        stub = n.read(site, stub, "z", z)?;
    }
    let l = n.write(site, stub.read("w", site.dtype(w), w), "y", y)?.i64("rows", n.rows.clone()).launch((
        n.rows.clone().ceil_div(n.lanes.rows()),
        1,
        1,
    ));
    Ok(vec![Form::new(name, n.who(), vec![l.into()])])
}

/// Operands of a norm's gradient beside x, and its results beside dx.
struct Backward {
    /// The gate and its gradient.
    gate: Option<(Operand, Operand)>,
    w: Operand,
    dy: Operand,
    /// Added to dx.
    base: Option<Operand>,
    dw: Operand,
    /// dx once more, in bf16.
    copy: Option<Operand>,
}

fn backward(site: &Site, eps: f64, b: &Backward) -> Result<Vec<Form>, Unsupported> {
    let (dx, slots) = (Operand::Output(0), Operand::Workspace(0));
    site.contiguous(b.w)?;
    site.contiguous(b.dw)?;
    let more = b.gate.into_iter().flat_map(|(z, dz)| [z, dz]).chain(b.base).chain(b.copy);
    let vectors: Vec<Operand> = [X, b.w, b.dy, dx].into_iter().chain(more).collect();
    // Under a gate a lane keeps more of a row: with half as many elements twice as many warps fit, while they are no more
    // than half of what a block may have.
    let width = site.int(X, site.inputs[0].ty.shape.len() - 1)?;
    let most = if b.gate.is_some() && width.div_ceil(8).next_power_of_two() <= 512 { 8 } else { 16 };
    let n = Norm::new(site, eps, &vectors, most)?;
    let name = match (b.gate, b.base, b.copy) {
        (Some(_), ..) => "gated_rms_norm_grad",
        (None, Some(_), None) => "rms_norm_grad_add",
        (None, Some(_), Some(_)) => "rms_norm_grad_add_copy",
        (None, None, None) => "rms_norm_grad",
        (None, None, Some(_)) => "rms_norm_grad_copy",
    };
    // Few slots: a block sums the weights' gradient over many rows.  As many blocks as are resident, so that all end together.
    let resident = (if b.gate.is_some() { 768 } else { 512 } / n.lanes.threads).clamp(1, 16);
    let blocks = n.rows.clone().ceil_div(n.lanes.rows()).min(resident * site.target.sms);
    let mut stub = n.read(site, n.stub(name).blocks_per_sm(resident), "x", X)?;
    if let Some((z, _)) = b.gate {
        stub = n.read(site, stub, "z", z)?;
    }
    stub = n.read(site, stub.read("w", site.dtype(b.w), b.w), "dy", b.dy)?;
    if let Some(base) = b.base {
        stub = n.read(site, stub, "base", base)?;
    }
    stub = n.write(site, stub, "dx", dx)?;
    if let Some((_, dz)) = b.gate {
        stub = n.write(site, stub, "dz", dz)?;
    }
    if let Some(copy) = b.copy {
        stub = n.write(site, stub, "copy", copy)?;
    }
    let grad = stub.write("slots", DType::F32, slots).i64("rows", n.rows.clone()).launch((blocks.clone(), 1, 1));
    let sum = Slots::of_row(slots, blocks.clone(), n.width).sum(site, b.dw, 0, 1);
    let why = format!("{}, {blocks} sums of the weight's gradient", n.who());
    let form = Form::new(name, why, vec![grad.into(), sum.into()]);
    Ok(vec![form.with("slots", DType::F32, blocks * n.width)])
}

impl Cuda for RmsNorm {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        forward(site, self.eps, None, Operand::Input(1))
    }
}

impl Cuda for RmsNormGrad {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let [w, dy, base] = [1, 2, 3].map(Operand::Input);
        let base = (site.inputs.len() > 3).then_some(base);
        let copy = (site.outputs.len() > 2).then_some(Operand::Output(2));
        backward(site, self.eps, &Backward { gate: None, w, dy, base, dw: Operand::Output(1), copy })
    }
}

impl Cuda for GatedRmsNorm {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        forward(site, self.eps, Some(Operand::Input(1)), Operand::Input(2))
    }
}

impl Cuda for GatedRmsNormGrad {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let [z, w, dy] = [1, 2, 3].map(Operand::Input);
        let gate = Some((z, Operand::Output(1)));
        backward(site, self.eps, &Backward { gate, w, dy, base: None, dw: Operand::Output(2), copy: None })
    }
}

impl Cuda for Rotary {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        const THREADS: usize = 128;
        let (x, y) = (Operand::Input(0), Operand::Output(0));
        let shape: &[Dim] = &site.inputs[0].ty.shape;
        let axis = shape.len() - 2;
        let (heads, d, dtype) = (site.int(x, axis)?, site.int(x, axis + 1)?, site.dtype(x));
        let even = 1 << (d / 2).trailing_zeros().min(4);
        let vec = site.vector(&[x, y], even.min(16 / dtype.size()));
        // Tables of at most 32 KiB.
        let rows = (4096 / (d / 2)).clamp(1, 8);
        if d > 8192 {
            return because(format!("heads of {d} are wider than 8192"));
        }
        let all = Expr::product(&shape[..axis]);
        let stub = if site.inputs.len() > 1 {
            let start = Operand::Input(1);
            site.contiguous(start)?;
            Stub::new("rotary", "rotary_from", THREADS).read("start", DType::I32, start)
        } else {
            Stub::new("rotary", "rotary", THREADS)
        };
        let l = stub
            .element("T", dtype)
            .int("heads", heads)
            .tag(format!("h{heads}"))
            .int("head_dim", d)
            .tag(format!("d{d}"))
            .line(format!("static constexpr double log2_base = {:?};", self.base.log2()))
            .flag("inverse", self.inverse)
            .tag(if self.inverse { "back" } else { "forth" })
            .int("vec", vec)
            .int("rows", rows)
            .int("threads", THREADS)
            .hashed()
            .read("x", dtype, x)
            .i64("x_stride", site.row_stride(x, axis)?)
            .write("y", dtype, y)
            .i64("y_stride", site.row_stride(y, axis)?)
            .i64("rows", all.clone())
            .i32("period", &shape[axis - 1])
            .launch((all.ceil_div(rows), 1, 1));
        Ok(vec![Form::new("rotary", format!("{rows} rows a block share a table of sines"), vec![l.into()])])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warp_holds_a_row_while_its_registers_do() {
        let choose = |width, vec, most| Lanes::choose(width, vec, most).map(|l| (l.lanes, l.threads));
        // The 370M model: the residual stream and the gated norm, forward and backward.
        assert_eq!(choose(1024, 8, 32), Some((32, 128)));
        assert_eq!(choose(1024, 8, 16), Some((64, 64)));
        assert_eq!(choose(2048, 8, 32), Some((64, 64)));
        assert_eq!(choose(2048, 8, 16), Some((128, 128)));
        // Norms over a head.
        assert_eq!(choose(64, 8, 32), Some((8, 128)));
        assert_eq!(choose(33, 1, 32), Some((32, 128)));
        assert_eq!(choose(1, 1, 32), Some((1, 128)));
        assert_eq!(choose(1024 * 33, 8, 32), None);
    }
}
