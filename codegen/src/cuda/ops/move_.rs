//! Ops that move elements: copies are maps without arithmetic, the rest gathers element by element.

use super::map::copy;
use super::{Cuda, Site, Unsupported, because};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Form, Operand};
use crate::cuda::stub::{Stub, packed};
use crate::lower::simple_broadcast;
use rambac_ir::Dim;
use rambac_ir::ops::*;

const THREADS: usize = 256;

/// What one axis of the result adds to an element's place in the operand.
struct Axis {
    size: Dim,
    /// Elements per position; `None`: the operand has one element for all.
    step: Option<Expr>,
    /// Subtracted from the position; outside `0..inner` the result is 0.
    pad: Option<(usize, Dim)>,
    /// Added to the position.
    skip: usize,
}

/// Elements per position of every axis of a contiguous array.
fn steps(shape: &[Dim]) -> Vec<Expr> {
    (0..shape.len()).map(|k| Expr::product(&shape[k + 1..])).collect()
}

fn gather(site: &Site, name: &str, axes: &[Axis]) -> Result<Vec<Form>, Unsupported> {
    let (x, y) = (Operand::Input(0), Operand::Output(0));
    site.contiguous(x)?;
    site.contiguous(y)?;
    let n = Expr::product(&site.outputs[0].ty.shape);
    let mut stub =
        Stub::new("move", "move", THREADS).tag(name).read("x", site.dtype(x), x).write("y", site.dtype(y), y);
    let mut text = vec!["i64 rest = i, from = 0; bool inside = true;".to_string()];
    for (k, a) in axes.iter().enumerate().rev() {
        stub.add_i64(&format!("d{k}"), &a.size);
        text.push(format!("i64 p{k} = take_axis(rest, d{k}, n);"));
        if let Some((before, inner)) = &a.pad {
            stub.add_i64(&format!("w{k}"), inner);
            text.push(format!("p{k} -= {before}; inside &= p{k} >= 0 && p{k} < w{k};"));
        }
        if a.skip > 0 {
            text.push(format!("p{k} += {};", a.skip));
        }
        if let Some(s) = &a.step {
            stub.add_i64(&format!("s{k}"), s.clone());
            text.push(format!("from += p{k} * s{k};"));
        }
    }
    let stub = stub.i64("n", n.clone());
    let mut body = format!("    i64 i = (i64)blockIdx.x * {THREADS} + threadIdx.x;\n    if (i >= n) return;\n");
    body += &packed("    ", "    ", &text, " ", "");
    body += &format!("    y[i] = inside ? x[from] : {}{{}};\n", site.c_type(y));
    let launch = stub.hashed().launch_body((n.ceil_div(THREADS), 1, 1), body);
    Ok(vec![Form::new("move", "one element a thread, gathered", vec![launch.into()])])
}

impl Cuda for Reshape {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        copy(site)
    }
}

impl Cuda for Append {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let ([memory, rows, start], y) = ([0, 1, 2].map(Operand::Input), Operand::Output(0));
        [memory, rows, start, y].into_iter().try_for_each(|at| site.contiguous(at))?;
        let (shape, t) = (&site.outputs[0].ty.shape, site.dtype(y));
        let place = |at: Operand| (site.view(at).buffer, &site.view(at).offset);
        let kept = place(memory) == place(y);
        let n = Expr::product(if kept { &site.inputs[1].ty.shape } else { shape });
        let stub =
            Stub::new("move", if kept { "append_in_place" } else { "append_rows" }, THREADS).tag(t).write("y", t, y);
        let launch = if kept { stub } else { stub.read("memory", t, memory) }
            .read("rows", t, rows)
            .read("start", rambac_ir::DType::I32, start)
            .i64("n", n.clone())
            .i64("t", &shape[1])
            .i64("l", &site.inputs[1].ty.shape[1])
            .i64("width", Expr::product(&shape[2..]))
            .launch_body(
                (n.ceil_div(THREADS), 1, 1),
                match kept {
                    true => "    append_in_place(y, rows, start, n, t, l, width);\n".into(),
                    false => "    append_rows(y, memory, rows, start, n, t, l, width);\n".into(),
                },
            );
        let why = if kept { "an element of the new rows a thread" } else { "an element of the memory a thread" };
        Ok(vec![Form::new("append", why, vec![launch.into()])])
    }
}

impl Cuda for Broadcast {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let from = &site.inputs[0].ty.shape;
        if simple_broadcast(from, &self.shape) {
            return copy(site);
        }
        let skip = self.shape.len() - from.len();
        let step = steps(from);
        let axis = |k: usize| {
            let own = k.checked_sub(skip).filter(|&j| !from[j].is_one());
            Axis { size: self.shape[k].clone(), step: own.map(|j| step[j].clone()), pad: None, skip: 0 }
        };
        gather(site, "broadcast", &(0..self.shape.len()).map(axis).collect::<Vec<_>>())
    }
}

impl Cuda for Transpose {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let (from, to) = (&site.inputs[0].ty.shape, &site.outputs[0].ty.shape);
        let step = steps(from);
        let axis = |k: usize| Axis { size: to[k].clone(), step: Some(step[self.perm[k]].clone()), pad: None, skip: 0 };
        gather(site, "transpose", &(0..to.len()).map(axis).collect::<Vec<_>>())
    }
}

impl Cuda for Slice {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let (from, to) = (&site.inputs[0].ty.shape, &site.outputs[0].ty.shape);
        let step = steps(from);
        let axis = |k: usize| Axis {
            size: to[k].clone(),
            step: Some(step[k].clone()),
            pad: None,
            skip: if k == self.axis { self.start } else { 0 },
        };
        gather(site, "slice", &(0..to.len()).map(axis).collect::<Vec<_>>())
    }
}

impl Cuda for Pad {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let (from, to) = (&site.inputs[0].ty.shape, &site.outputs[0].ty.shape);
        let step = steps(from);
        let axis = |k: usize| Axis {
            size: to[k].clone(),
            step: Some(step[k].clone()),
            pad: (k == self.axis).then(|| (self.before, from[k].clone())),
            skip: 0,
        };
        gather(site, "pad", &(0..to.len()).map(axis).collect::<Vec<_>>())
    }
}

impl Cuda for Concat {
    fn forms(&self, _: &Site) -> Result<Vec<Form>, Unsupported> {
        because("operands of a concat are written in place; this step should not exist")
    }
}

impl Cuda for Iota {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let y = Operand::Output(0);
        site.contiguous(y)?;
        let shape = &site.outputs[0].ty.shape;
        let n = Expr::product(shape);
        let stub = Stub::new("move", "iota", THREADS)
            .tag(site.dtype(y))
            .write("y", site.dtype(y), y)
            .i64("inner", Expr::product(&shape[self.axis + 1..]))
            .i64("size", &shape[self.axis])
            .i64("n", n.clone());
        let body = format!(
            "    i64 i = (i64)blockIdx.x * {THREADS} + threadIdx.x;\n    \
             if (i < n) y[i] = as_element<{}>((i32)(i / inner % size));\n",
            site.c_type(y)
        );
        let launch = stub.launch_body((n.ceil_div(THREADS), 1, 1), body);
        Ok(vec![Form::new("iota", "one element a thread", vec![launch.into()])])
    }
}
