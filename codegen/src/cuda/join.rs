//! Steps within the steps beside them, where a run is of one token or a few rows: a decoding step then has three launches a layer.
//!
//! ```text
//! %1 = rms_norm %x, %w          with at most 8 rows step 1 launches nothing, and the product reads x and w itself:
//! %2 = matmul %1, %p            r·Σ x·w·p, where r comes of a sum that the product's threads make on their way (few_rows.cuh)
//! %3 = causal_conv1d %2[..], …  of one token: whoever has a column's sum has the channel's state too, and makes %3
//! %4 = map %2[..], %b           of one token: the scan makes its steps and decays where it wants them (scan_step.cuh)
//! %5 = selective_scan %3[..], %4, …
//! ```
//! What is joined is a program's form, not its meaning: at other sizes all steps run as ever.  A step that does another's work has
//! that one's operands behind its own, and its results where it makes some.

use super::expr::Expr;
use super::form::Condition;
use super::ops::{Site, is_element, takes_few_rows};
use super::target::Target;
use crate::program::{Program, View};
use rambac_ir::Dim;
use rambac_ir::ops::{FusedMap, Op};
use std::sync::Arc;

/// Rows of a product that few_rows.cuh takes, at most.
pub const FEW: usize = 8;

/// A norm in front of a product, of the operands `x, w`, or `x, z, w` of a gated one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    pub eps: f64,
    pub gated: bool,
}

impl Norm {
    fn operands(self) -> usize {
        2 + usize::from(self.gated)
    }
}

/// A convolution of one token behind a product, of columns of its result and the operands `w, bias, s0`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Conv {
    /// The first column.
    pub first: usize,
    pub silu: bool,
}

impl Conv {
    pub const OPERANDS: usize = 3;
}

/// A map that makes an operand.
#[derive(Clone, Debug, PartialEq)]
pub struct Made {
    pub operand: usize,
    pub map: Arc<FusedMap>,
    /// Its own operands.
    pub inputs: usize,
}

/// A step by itself.
pub static ALONE: Joined = Joined { within: None, norm: None, conv: None, maps: vec![] };

/// How a step stands to those beside it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Joined {
    /// Others do its work where all of these hold.
    pub within: Option<Vec<Condition>>,
    /// What it does of others, in the order in which their operands stand behind its own.
    pub norm: Option<Norm>,
    pub conv: Option<Conv>,
    pub maps: Vec<Made>,
}

impl Joined {
    /// Operands behind those that the op has.
    pub fn operands(&self) -> usize {
        let maps: usize = self.maps.iter().map(|m| m.inputs).sum();
        self.norm.map_or(0, Norm::operands) + self.conv.map_or(0, |_| Conv::OPERANDS) + maps
    }
    /// Whether it stands alone.
    pub fn alone(&self) -> bool {
        *self == ALONE
    }
}

/// Rows of a step's first operand are few.
pub fn few(rows: Expr) -> Condition {
    Condition::Below(rows, Expr::int(FEW + 1))
}

/// A run is of one token: L is 1.
pub fn one_token(l: &Dim) -> [Condition; 2] {
    let l = Expr::from(l);
    [Condition::AtLeast(l.clone(), Expr::int(1)), Condition::Below(l, Expr::int(2))]
}

/// Finds steps that others can do, and gives these their operands and results.
pub fn join(mut program: Arc<Program>, target: &Target) -> (Arc<Program>, Vec<Joined>) {
    let mut joined = vec![Joined::default(); program.steps.len()];
    join_norms(&mut program, &mut joined, target);
    join_convs(&mut program, &mut joined, target);
    join_maps(&mut program, &mut joined);
    (program, joined)
}

fn join_norms(program: &mut Arc<Program>, joined: &mut [Joined], target: &Target) {
    let p = &**program;
    let mut pairs = vec![];
    for i in 0..p.steps.len() {
        let norm = match &p.steps[i].op {
            Op::RmsNorm(n) => Norm { eps: n.eps, gated: false },
            Op::GatedRmsNorm(n) => Norm { eps: n.eps, gated: true },
            _ => continue,
        };
        let readers = readers(p, i);
        let takes = |&r: &usize| {
            let with = Joined { norm: Some(norm), ..Joined::default() };
            reads_whole(p, i, r, 0) && lasts(p, i, r) && takes(p, r, (&p.steps[i].inputs, &[]), &with, target)
        };
        if readers.is_empty() || !readers.iter().all(takes) {
            continue;
        }
        joined[i].within = Some(vec![few(rows(&p.steps[i].inputs[0]))]);
        readers.iter().for_each(|&r| joined[r].norm = Some(norm));
        pairs.extend(readers.into_iter().map(|r| (i, r)));
    }
    give(program, &pairs);
}

fn join_convs(program: &mut Arc<Program>, joined: &mut [Joined], target: &Target) {
    let p = &**program;
    let mut pairs = vec![];
    for i in 0..p.steps.len() {
        let s = &p.steps[i];
        let Op::CausalConv1d(c) = &s.op else { continue };
        let x = &s.inputs[0];
        let Some(made) = (0..i).rev().find(|&m| p.steps[m].outputs.iter().any(|v| v.buffer == x.buffer)) else {
            continue;
        };
        let product = &p.steps[made];
        let (y, Some(first)) = (&product.outputs[0], x.offset.as_int()) else { continue };
        let width = y.ty.shape.last();
        // Columns of the product, as it makes them.
        let columns = x.strided.as_ref().map(|s| (&s.cols, &s.stride)) == x.ty.shape.last().zip(width)
            || (x.strided.is_none() && x.ty.shape == y.ty.shape);
        let same = y.offset.as_int() == Some(0) && y.strided.is_none() && x.ty.dtype == y.ty.dtype;
        // Nothing between looks at what is made earlier now, or at what that needs; it lies apart.
        let apart = s.outputs.iter().all(|o| o.buffer != x.buffer);
        let moved = |v: &View| s.outputs.iter().chain(&s.inputs[1..]).any(|o| o.buffer == v.buffer);
        let between = (made..i).any(|k| p.steps[k].outputs.iter().any(moved))
            || (made + 1..i).any(|k| p.steps[k].inputs.iter().any(|v| s.outputs.iter().any(|o| o.buffer == v.buffer)));
        let plain =
            matches!(product.op, Op::MatMul(_)) && s.outputs.iter().chain(&s.inputs[1..]).all(|v| v.strided.is_none());
        let with = Joined { conv: Some(Conv { first, silu: c.silu }), ..joined[made].clone() };
        if !plain || joined[made].conv.is_some() || !columns || !same || !apart || between {
            continue;
        }
        if !takes(p, made, (&s.inputs[1..], &s.outputs), &with, target) {
            continue;
        }
        let l = &x.ty.shape[1];
        joined[i].within = Some(one_token(l).into_iter().chain([few(rows(x))]).collect());
        joined[made] = with;
        pairs.push((i, made));
    }
    if pairs.is_empty() {
        return;
    }
    let steps = &mut Arc::make_mut(program).steps;
    for (i, made) in pairs {
        let (inputs, outputs) = (steps[i].inputs[1..].to_vec(), steps[i].outputs.clone());
        steps[made].inputs.extend(inputs);
        steps[made].outputs.extend(outputs);
    }
}

fn join_maps(program: &mut Arc<Program>, joined: &mut [Joined]) {
    /// A scan's steps and decays.
    const MADE: [usize; 2] = [1, 2];
    let p = &**program;
    let mut pairs = vec![];
    for r in 0..p.steps.len() {
        let Op::SelectiveScan(_) = &p.steps[r].op else { continue };
        let l = &p.steps[r].inputs[0].ty.shape[1];
        for k in MADE {
            let of = p.steps[r].inputs[k].buffer;
            let Some(i) = (0..r).rev().find(|&i| p.steps[i].outputs.iter().any(|v| v.buffer == of)) else { continue };
            let s = &p.steps[i];
            let Op::FusedMap(m) = &s.op else { continue };
            let alone = s.outputs.len() == 1 && joined[i].alone() && readers(p, i) == [r];
            if !alone || !reads_whole(p, i, r, k) || !lasts(p, i, r) || !is_element(m, &s.inputs) {
                continue;
            }
            joined[i].within = Some(one_token(l).to_vec());
            joined[r].maps.push(Made { operand: k, map: Arc::new(m.clone()), inputs: s.inputs.len() });
            pairs.push((i, r));
        }
    }
    give(program, &pairs);
}

/// Gives steps the operands of those whose work they do.
fn give(program: &mut Arc<Program>, pairs: &[(usize, usize)]) {
    if pairs.is_empty() {
        return;
    }
    let steps = &mut Arc::make_mut(program).steps;
    for &(i, r) in pairs {
        let more = steps[i].inputs.clone();
        steps[r].inputs.extend(more);
    }
}

fn rows(v: &View) -> Expr {
    Expr::product(&v.ty.shape[..v.ty.rank() - 1])
}

/// Steps that read a step's only result; none if it is a result of the program too.
fn readers(p: &Program, made: usize) -> Vec<usize> {
    let y = p.steps[made].outputs[0].buffer;
    // A buffer may hold another value before and after: this one lives until it is overwritten.
    let writes = |s: usize| p.steps[s].outputs.iter().any(|v| v.buffer == y);
    let end = (made + 1..p.steps.len()).find(|&s| writes(s)).unwrap_or(p.steps.len());
    if end == p.steps.len() && p.outputs.iter().any(|o| o.view.buffer == y) {
        return vec![];
    }
    (made + 1..(end + 1).min(p.steps.len())).filter(|&s| p.steps[s].inputs.iter().any(|v| v.buffer == y)).collect()
}

/// Whether a step's operand `k` is another's result: the whole of it, once, as rows of one matrix.
fn reads_whole(p: &Program, made: usize, reader: usize, k: usize) -> bool {
    let (y, r) = (&p.steps[made].outputs[0], &p.steps[reader]);
    let rows = |v: &View| Dim::product(&v.ty.shape[..v.ty.rank() - 1]);
    let a = &r.inputs[k];
    let whole =
        a.offset == y.offset && a.strided == y.strided && a.ty.shape.last() == y.ty.shape.last() && rows(a) == rows(y);
    whole && r.inputs.iter().filter(|v| v.buffer == y.buffer).count() == 1 && a.buffer == y.buffer
}

/// Whether what a step reads is as it was, also while a later one runs.
fn lasts(p: &Program, made: usize, reader: usize) -> bool {
    let kept = |v: &View| (made + 1..=reader).all(|s| p.steps[s].outputs.iter().all(|o| o.buffer != v.buffer));
    p.steps[made].inputs.iter().all(kept)
}

/// Whether a product has forms for few rows that do what `with` says, with these operands and results behind its own.
fn takes(p: &Program, product: usize, (more, made): (&[View], &[View]), with: &Joined, target: &Target) -> bool {
    let r = &p.steps[product];
    let both = |a: &[View], b: &[View]| -> Vec<View> { a.iter().chain(b).cloned().collect() };
    let (inputs, outputs) = (both(&r.inputs, more), both(&r.outputs, made));
    takes_few_rows(&r.op, &Site { inputs: &inputs, outputs: &outputs, target, joined: with })
}
