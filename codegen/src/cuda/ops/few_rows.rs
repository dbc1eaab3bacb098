//! Products of a few rows, as decoding has them: every weight is read once, and nothing else counts.

use super::{Cuda, Site, row_stride};
use crate::View;
use crate::cuda::expr::Expr;
use crate::cuda::few_rows::{FEW, Joined};
use crate::cuda::form::{Call, Condition, Operand};
use crate::cuda::stub::Stub;
use rambac_ir::ops::Op;

/// How a product's threads lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lie {
    /// Elements of a load.
    vec: usize,
    threads: usize,
    /// Rows of the weights per block.
    outs: usize,
}

impl Lie {
    /// Loads of 16 bytes of weights where rows allow it; threads for all of k up to 256.
    fn choose(k: usize, vec: usize) -> Lie {
        Lie { vec, threads: k.div_ceil(vec).next_power_of_two().clamp(32, 256), outs: 4 }
    }
}

/// Products `c = a·bᵀ` for at most [`FEW`] rows of the step's first operand, with the norm that is joined: a condition each,
/// its call and a reason.
pub(super) fn products(site: &Site, c: Operand, result: &View) -> Vec<(Condition, Call, String)> {
    rows_of(site, c, result).unwrap_or_default()
}

fn rows_of(site: &Site, c: Operand, result: &View) -> Option<Vec<(Condition, Call, String)>> {
    let (a, b) = (Operand::Input(0), Operand::Input(1));
    let last = site.inputs.len() - site.joined.operands();
    // What is read along k: the rows, or what the norm makes them of.
    let (x, z, weight, eps) = match site.joined {
        Joined::Norm { eps, gated: true } => {
            (Operand::Input(last), Some(Operand::Input(last + 1)), Some(Operand::Input(last + 2)), eps)
        }
        Joined::Norm { eps, gated: false } => (Operand::Input(last), None, Some(Operand::Input(last + 1)), eps),
        _ => (a, None, None, 0.0),
    };
    let shape = &site.inputs[0].ty.shape;
    let k = shape.last()?.as_int().filter(|&k| k > 0)?;
    let rows = Expr::product(&shape[..shape.len() - 1]);
    let (t, w, out) = (site.dtype(x), site.dtype(b), result.ty.dtype);
    if site.inputs[1].ty.rank() != 2 || (w != t && w.size() != 2) || weight.is_some_and(|g| site.dtype(g) != t) {
        return None;
    }
    let along: Vec<Operand> = [x, b].into_iter().chain(z).chain(weight).collect();
    let most = (16 / w.size()).min(1 << k.trailing_zeros());
    let lie = Lie::choose(k, site.vector(&along, most));
    let stride = |v: &View| row_stride(v, v.ty.rank() - 1).ok();
    let (x_stride, w_stride, y_stride) = (stride(site.view(x))?, stride(site.view(b))?, stride(result)?);
    let n = Expr::from(result.ty.shape.last()?);
    let template = match (z, weight) {
        (Some(_), _) => "product_gated",
        (None, Some(_)) => "product_normed",
        (None, None) => "product_rows",
    };
    let call = |most: usize| -> Option<Call> {
        let mut s = Stub::new("few_rows", template, lie.threads)
            .element("T", t)
            .element("W", w)
            .element("Out", out)
            .int("width", k)
            .int("rows", most)
            .tag(format!("k{k}_r{most}"))
            .int("outs", lie.outs)
            .int("vec", lie.vec)
            .int("threads", lie.threads)
            .float("eps", eps)
            .hashed()
            // Registers for the sums of 8 rows.
            .blocks_per_sm(if most == 1 { 512 } else { 384 } / lie.threads)
            .write("y", out, c)
            .i64("y_stride", y_stride.clone())
            .read("x", t, x)
            .i64("x_stride", x_stride.clone());
        if let Some(z) = z {
            s = s.read("z", t, z).i64("z_stride", stride(site.view(z))?);
        }
        s = s.read("w", w, b).i64("w_stride", w_stride.clone());
        if let Some(g) = weight {
            s = s.read("weight", t, g);
        }
        let s = s.i32("rows", rows.clone()).i32("n", n.clone());
        Some(s.launch((n.clone().ceil_div(lie.outs), 1, 1)).into())
    };
    let mut all = vec![];
    for most in [1, FEW] {
        // A number of rows that is known needs one of them.
        let needed = rows.as_int().is_none_or(|m| m <= most && (most == 1 || m > 1));
        if needed {
            let norm = if weight.is_some() { ", the norm with them" } else { "" };
            let why = format!("at most {most} rows: every weight is read once, {} rows of {k} a block{norm}", lie.outs);
            all.push((Condition::Below(rows.clone(), Expr::int(most + 1)), call(most)?, why));
        }
    }
    Some(all)
}

/// Whether a step is a product that has forms for few rows.
pub fn takes_few_rows(op: &Op, site: &Site) -> bool {
    let forms = match op {
        Op::MatMul(o) => o.forms(site),
        Op::MatMulMap(o) => o.forms(site),
        _ => return false,
    };
    forms.is_ok_and(|f| f.len() > 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_lie_along_a_row() {
        assert_eq!(Lie::choose(1024, 8), Lie { vec: 8, threads: 128, outs: 4 });
        assert_eq!(Lie::choose(64, 4).threads, 32);
        assert_eq!(Lie::choose(1 << 20, 1).threads, 256);
    }
}
