//! Products of a few rows, as decoding has them: every weight is read once, and nothing else counts.

use super::map::end_hook;
use super::{Cuda, Site, row_stride};
use crate::View;
use crate::cuda::expr::Expr;
use crate::cuda::form::{Call, Condition, Operand};
use crate::cuda::join::{FEW, one_token};
use crate::cuda::stub::{Stub, c_type};
use crate::cuda::target::{Arch, Target};
use rambac_ir::Dim;
use rambac_ir::ops::*;

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
    /// Loads of 16 bytes of weights where rows allow it; threads for all of k up to 256.  Blocks read the same row of x, so few of
    /// them are better while there is one for nearly every multiprocessor.
    fn choose(k: usize, vec: usize, n: &Dim, target: &Target) -> Lie {
        let threads = k.div_ceil(vec).next_power_of_two().clamp(32, 256);
        let many = n.as_int().is_some_and(|n| n.div_ceil(8) >= 15 * target.sms / 16);
        Lie { vec, threads, outs: if many && threads >= 64 { 8 } else { 4 } }
    }
}

/// A form of a product in the making: its conditions, call and reason.
pub(super) struct FewRows {
    pub needs: Vec<Condition>,
    pub call: Call,
    pub why: String,
}

/// What becomes of sums: the hook's text, its value in the kernel's body, and what it may read before the kernel waits.
struct End {
    text: String,
    value: String,
    ahead: Vec<Operand>,
}

/// Products `c = a·bᵀ` for at most [`FEW`] rows of the step's first operand, with what is joined to them.  Of a map of the product
/// `map` is given: then the kernel ends its sums by it and `c` is the map's result.
pub(super) fn products(site: &Site, map: Option<&FusedMap>) -> Vec<FewRows> {
    let conv = site.joined.conv.is_some();
    let mut all = if conv { rows_of(site, map, true).unwrap_or_default() } else { vec![] };
    // Where the convolution can't be joined nothing is: `join` asks for as many forms as there are sizes.
    if !conv || !all.is_empty() {
        all.extend(rows_of(site, map, false).unwrap_or_default());
    }
    all
}

/// Threads that a multiprocessor has registers for: the sums of 8 rows take many, operands in f32 too, and rows that are no
/// whole number of steps some.
fn threads_per_sm(rows: usize, halves: bool, whole: bool) -> usize {
    match (rows, halves) {
        (1, true) if whole => 768,
        (1, true) => 512,
        _ => 256,
    }
}

fn rows_of(site: &Site, map: Option<&FusedMap>, conv: bool) -> Option<Vec<FewRows>> {
    let (a, b, c) = (Operand::Input(0), Operand::Input(1), Operand::Output(0));
    let result = &site.outputs[0];
    let first = site.inputs.len() - site.joined.operands();
    // What is read along k: the rows, or what the norm makes them of.
    let (x, z, weight, eps) = match site.joined.norm {
        Some(n) if n.gated => {
            (Operand::Input(first), Some(Operand::Input(first + 1)), Some(Operand::Input(first + 2)), n.eps)
        }
        Some(n) => (Operand::Input(first), None, Some(Operand::Input(first + 1)), n.eps),
        None => (a, None, None, 0.0),
    };
    let shape = &site.inputs[0].ty.shape;
    let k = shape.last()?.as_int().filter(|&k| k > 0)?;
    let rows = Expr::product(&shape[..shape.len() - 1]);
    let (t, w, out) = (site.dtype(x), site.dtype(b), result.ty.dtype);
    if site.inputs[1].ty.rank() != 2 || (w != t && w.size() != 2) || z.is_some_and(|z| site.dtype(z) != t) {
        return None;
    }
    let along: Vec<Operand> = [x, b].into_iter().chain(z).chain(weight).collect();
    let most = (16 / w.size()).min(1 << k.trailing_zeros());
    let lie = Lie::choose(k, site.vector(&along, most), result.ty.shape.last()?, site.target);
    let stride = |v: &View| row_stride(v, v.ty.rank() - 1).ok();
    let (x_stride, w_stride, y_stride) = (stride(site.view(x))?, stride(site.view(b))?, stride(result)?);
    let n = Expr::from(result.ty.shape.last()?);
    let name = match (z, weight) {
        (Some(_), _) => "product_gated",
        (None, Some(_)) => "product_normed",
        (None, None) => "product_rows",
    };
    let early = site.target.arch == Arch::Sm90a;
    let (halves, whole) = (t.size().max(w.size()) == 2, k.is_multiple_of(lie.threads * lie.vec));
    let call = |most: usize| -> Option<Call> {
        let mut s = Stub::new("few_rows", name, lie.threads)
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
            .flag("early", early)
            .hashed()
            .blocks_per_sm((threads_per_sm(most, halves, whole) / lie.threads).clamp(1, 16))
            .write("y", out, c)
            .i64("y_stride", y_stride.clone())
            .read("x", t, x)
            .i64("x_stride", x_stride.clone())
            .read("w", w, b)
            .i64("w_stride", w_stride.clone());
        let mut row = "PlainRow{}".to_string();
        if let Some(g) = weight {
            let ty = c_type(site.dtype(g));
            s = s.read("weight", site.dtype(g), g);
            row = format!("NormedRow<{ty}>{{weight}}");
            if let Some(z) = z {
                s = s.read("z", t, z).i64("z_stride", stride(site.view(z))?);
                row = format!("GatedRow<{ty}, {}>{{weight, z, z_stride}}", c_type(t));
            }
        }
        let (mut s, end) = ending(site, s, map, conv)?;
        if early {
            s = s.early([b].into_iter().chain(end.ahead));
        }
        let s = s.hook(&end.text).i32("rows", rows.clone()).i32("n", n.clone());
        let body =
            format!("    few_rows<Config>(y, y_stride, x, x_stride, w, w_stride, rows, n, {row}, {});\n", end.value);
        Some(s.launch_body((n.clone().ceil_div(lie.outs), 1, 1), body).into())
    };
    let mut all = vec![];
    for most in [1, FEW] {
        // A number of rows that is known needs one of them.
        let needed = rows.as_int().is_none_or(|m| m <= most && (most == 1 || m > 1));
        if needed {
            let with: String =
                [(weight.is_some(), ", the norm with them"), (conv, ", the convolution of their one token")]
                    .into_iter()
                    .filter_map(|(is, text)| is.then_some(text))
                    .collect();
            let why = format!("at most {most} rows: every weight is read once, {} rows of {k} a block{with}", lie.outs);
            let mut needs = vec![Condition::Below(rows.clone(), Expr::int(most + 1))];
            if conv {
                needs.extend(one_token(&shape[1]));
            }
            all.push(FewRows { needs, call: call(most)?, why });
        }
    }
    Some(all)
}

/// How sums end; `None`: no hook does that.
fn ending(site: &Site, s: Stub, map: Option<&FusedMap>, conv: bool) -> Option<(Stub, End)> {
    let own = site.inputs.len() - site.joined.operands();
    if let Some(m) = map {
        let operands: Vec<_> = (2..own).map(|i| (Operand::Input(i), &site.inputs[i])).collect();
        let (text, value, s) = end_hook(m, &operands, s)?;
        return Some((s, End { text, value, ahead: vec![] }));
    }
    let Some(c) = site.joined.conv.filter(|_| conv) else {
        return Some((s, End { text: String::new(), value: "AsItIs{}".into(), ahead: vec![] }));
    };
    // Behind the norm's operands.
    let at = own + site.joined.norm.map_or(0, |n| 2 + usize::from(n.gated));
    let [w, bias, s0] = [at, at + 1, at + 2].map(Operand::Input);
    let (y, state) = (Operand::Output(1), Operand::Output(2));
    let shape = &site.view(w).ty.shape;
    let (channels, taps) = (shape.first()?.as_int()?, shape.last()?.as_int().filter(|&k| k > 1)?);
    let exact = site.dtype(w);
    if [bias, s0, state].iter().any(|&v| site.dtype(v) != exact) {
        return None;
    }
    let t = site.dtype(y);
    let s = s
        .read("conv_w", exact, w)
        .read("bias", exact, bias)
        .read("s0", exact, s0)
        .write("conv_y", t, y)
        .i64("conv_stride", row_stride(site.view(y), 2).ok()?)
        .write("s", exact, state);
    let value = format!(
        "Convolved<{}, {}, {taps}, {}>{{{}, {channels}, conv_w, bias, s0, conv_y, conv_stride, s}}",
        c_type(t),
        c_type(exact),
        c.silu,
        c.first
    );
    Some((s, End { text: String::new(), value, ahead: vec![w, bias, s0] }))
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
        let lie = |k, vec, n: usize| Lie::choose(k, vec, &n.into(), &Target::of(Arch::Sm90a));
        assert_eq!(lie(1024, 8, 4384), Lie { vec: 8, threads: 128, outs: 8 });
        assert_eq!((lie(2048, 8, 1024).outs, lie(2048, 8, 768).outs, lie(64, 8, 4384).outs), (8, 4, 4));
        assert_eq!(lie(64, 4, 64).threads, 32);
        assert_eq!(lie(1 << 20, 1, 64).threads, 256);
    }
}
