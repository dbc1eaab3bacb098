//! Softmax over rows, merges of attentions, weighted sums of slots, and their gradients.

use super::{Cuda, Site, Unsupported, because};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Form, Operand, Param};
use crate::cuda::stub::{Stub, c_type};
use rambac_ir::Dim;
use rambac_ir::ops::*;

const THREADS: usize = 256;

fn contiguous(site: &Site) -> Result<(), Unsupported> {
    (0..site.inputs.len()).try_for_each(|i| site.contiguous(Operand::Input(i)))?;
    (0..site.outputs.len()).try_for_each(|i| site.contiguous(Operand::Output(i)))
}
fn warps(n: Expr) -> Expr {
    (n * 32).ceil_div(THREADS)
}
fn long(n: impl Into<Expr>) -> Param {
    Param::Long(n.into())
}

impl Cuda for Softmax {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        contiguous(site)?;
        let x = Operand::Input(0);
        let (t, shape) = (site.dtype(x), &site.inputs[0].ty.shape);
        let (rows, k) = (Expr::product(&shape[..shape.len() - 1]), &shape[shape.len() - 1]);
        let launch = Stub::new("mix", "softmax_rows", THREADS)
            .tag(t)
            .write("p", t, Operand::Output(0))
            .write("lse", t, Operand::Output(1))
            .read("x", t, x)
            .i64("rows", rows.clone())
            .i64("k", k)
            .launch_body((warps(rows), 1, 1), "    softmax_rows(p, lse, x, rows, k);\n".into());
        Ok(vec![Form::new("softmax", "a warp per row, read twice", vec![launch.into()])])
    }
}

/// Outputs and log-sum-exps of `count` parts, and how many heads share one of these.
fn parts(site: &Site, count: usize) -> Result<Vec<Param>, Unsupported> {
    let heads = site.int(Operand::Input(0), 2)?;
    let mut words = vec![];
    for i in 0..count {
        let (o, lse) = (Operand::Input(2 * i), Operand::Input(2 * i + 1));
        words.extend([Param::Address(o), Param::Address(lse), long(heads / site.int(lse, 2)?)]);
    }
    Ok(words)
}

impl Cuda for Merge {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        contiguous(site)?;
        let (count, y) = (site.inputs.len() / 2, Operand::Output(0));
        let (t, shape) = (site.dtype(y), &site.outputs[0].ty.shape);
        let n = Expr::product(shape);
        let launch = Stub::new("mix", "merge", THREADS)
            .tag(t)
            .tag(count)
            .write("y", t, y)
            .write("lse", t, Operand::Output(1))
            .table("parts", parts(site, count)?)
            .i64("n", n.clone())
            .i64("d", &shape[3])
            .launch_body(
                (n.ceil_div(THREADS), 1, 1),
                format!("    merge<{}, {count}>(y, lse, parts, n, d);\n", c_type(t)),
            );
        Ok(vec![Form::new("merge", format!("{count} parts, an element a thread"), vec![launch.into()])])
    }
}

impl Cuda for MergeGrad {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        contiguous(site)?;
        let count = site.outputs.len() / 2;
        let [dy, dlse] = [2 * count, 2 * count + 1].map(Operand::Input);
        let (t, shape) = (site.dtype(dy), &site.inputs[0].ty.shape);
        let tokens = Expr::product(&shape[..2]);
        let grads = (0..2 * count).map(|i| Param::Address(Operand::Output(i))).collect();
        let launch = Stub::new("mix", "merge_grad", THREADS)
            .tag(t)
            .tag(count)
            .table("parts", parts(site, count)?)
            .table("grads", grads)
            .read("dy", t, dy)
            .read("dlse", t, dlse)
            .i64("tokens", tokens.clone())
            .i32("heads", &shape[2])
            .i64("d", &shape[3])
            .launch_body(
                (warps(tokens), 1, 1),
                format!("    merge_grad<{}, {count}>(parts, grads, dy, dlse, tokens, heads, d);\n", c_type(t)),
            );
        Ok(vec![Form::new("merge_grad", format!("{count} parts, a warp per token"), vec![launch.into()])])
    }
}

/// Where slots are: an axis of an array, or arrays.
struct Slots {
    /// `None`: they are arrays.
    axis: bool,
    count: usize,
    slots: Dim,
    d: Dim,
    /// Heads that share a weight.
    group: usize,
    /// Elements of all rows of a slot.
    n: Expr,
}

impl Slots {
    /// Of `count` operands before the weights.
    fn new(site: &Site, count: usize) -> Result<Slots, Unsupported> {
        let (o, w) = (&site.inputs[0].ty.shape, &site.inputs[count].ty.shape);
        let heads = site.int(Operand::Input(0), 2)?;
        let Some(h) = w[2].as_int().filter(|h| *h > 0) else { return because("the weights' heads must be a number") };
        let axis = o.len() == 5;
        let rows = Expr::product(&o[..3]);
        let d = o[o.len() - 1].clone();
        Ok(Slots { axis, count, slots: w[3].clone(), group: heads / h, n: rows * d.clone(), d })
    }
    /// Adds what says where slots are; the expression that names them.
    fn at(&self, s: Stub, name: &str, t: &str, of: fn(usize) -> Operand, dtype: rambac_ir::DType) -> (Stub, String) {
        let constant = if t.starts_with("const") { "const " } else { "" };
        if self.axis {
            let s = if constant.is_empty() { s.write(name, dtype, of(0)) } else { s.read(name, dtype, of(0)) };
            return (s, format!("SlotAxis<{t}>{{{name}, slots, d}}"));
        }
        let s = s.table(name, (0..self.count).map(|i| Param::Address(of(i))).collect());
        (s, format!("SlotArrays<{t}>{{{name}.at, d}}"))
    }
    fn sized(&self, s: Stub, n: &Expr) -> Stub {
        s.i64("n", n.clone()).i64("slots", &self.slots).i64("d", &self.d).i64("group", self.group)
    }
    fn tag(&self) -> String {
        if self.axis { "axis".into() } else { self.count.to_string() }
    }
}

impl Cuda for Aggregate {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        contiguous(site)?;
        let (count, y) = (site.inputs.len() - 1, Operand::Output(0));
        let (a, t) = (Slots::new(site, count)?, site.dtype(y));
        let stub = Stub::new("mix", "aggregate", THREADS).tag(t).tag(a.tag()).write("y", t, y);
        let (stub, o) = a.at(stub, "o", &format!("const {}", c_type(t)), Operand::Input, t);
        let launch = a.sized(stub.read("w", t, Operand::Input(count)), &a.n).launch_body(
            (a.n.clone().ceil_div(THREADS), 1, 1),
            format!("    aggregate(y, {o}, w, n, slots, d, group);\n"),
        );
        Ok(vec![Form::new("aggregate", "an element a thread", vec![launch.into()])])
    }
}

impl Cuda for AggregateGrad {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        contiguous(site)?;
        let count = site.inputs.len() - 2;
        let [w, dy] = [count, count + 1].map(Operand::Input);
        let (a, t, dw) = (Slots::new(site, count)?, site.dtype(dy), Operand::Output(count));
        let stub = Stub::new("mix", "aggregate_slots", THREADS).tag(t).tag(a.tag());
        let (stub, out) = a.at(stub, "out", c_type(t), Operand::Output, t);
        let slots = a.sized(stub.read("w", t, w).read("dy", t, dy), &a.n).launch_body(
            (a.n.clone().ceil_div(THREADS), 1, 1),
            format!("    aggregate_slots({out}, w, dy, n, slots, d, group);\n"),
        );
        let weights = Expr::product(&site.inputs[count].ty.shape);
        let stub = Stub::new("mix", "aggregate_heads", THREADS).tag(t).tag(a.tag()).write("dw", t, dw);
        let (stub, o) = a.at(stub, "o", &format!("const {}", c_type(t)), Operand::Input, t);
        let heads = a.sized(stub.read("dy", t, dy), &weights).launch_body(
            (warps(weights.clone()), 1, 1),
            format!("    aggregate_heads(dw, {o}, dy, n, slots, d, group);\n"),
        );
        let why = "slots an element a thread, weights a warp each";
        Ok(vec![Form::new("aggregate_grad", why, vec![slots.into(), heads.into()])])
    }
}
