//! A concat lies over what its parts are made from, where both have the same rows: gradients of a projection's slices over the
//! projection.
//!
//! ```text
//! zxd: [rows, 9]   z 4 | x 4 | d 1        z is last read by what makes dz, d by what makes dd: both go over them
//! dzxd             dz  | dx  | dd         x is still read when dx is made: that is made apart and copied there
//! ```
//! So the concat does not wait beside the projection while its parts are made one after another, which is when a layer's
//! backward is fullest.  A copy is worth that only where memory is bought with work already: where the projection is computed
//! again for the backward.  On GPUs alone: a kernel on CPUs would hold the same row as a shared and as a mutable slice.

use crate::lower::copy_step;
use crate::program::*;
use crate::traits::kernel_traits;
use rambac_ir::ops::Op;
use rambac_ir::{Dim, Graph, Ty};
use rambac_passes::cse::is_backward;
use std::ops::Range;

/// Columns of a buffer's rows that a view takes, where it is a part of them.
fn columns(v: &View) -> Option<(Range<usize>, &Dim)> {
    let s = v.strided.as_ref()?;
    let (from, cols) = (v.offset.as_int()?, s.cols.as_int()?);
    Some((from..from + cols, &s.stride))
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Where a buffer is read or written: step, place among the step's operands or results.
type Uses = Vec<(usize, usize)>;

struct Overlay<'a> {
    graph: &'a Graph,
    steps: &'a [Step],
    reads: Vec<Uses>,
    writes: Vec<Uses>,
}

/// Results that must be made apart, by step and result.
type Apart = Vec<(usize, usize)>;

impl Overlay<'_> {
    /// Whether a step's kernel may write result `o` over operand `k`, row by row.
    fn over(&self, step: usize, o: usize, k: usize) -> bool {
        let s = &self.steps[step];
        let t = kernel_traits(&s.op);
        let rows = matches!((&s.op, o, k), (Op::GatedRmsNormGrad(_), 1, 1));
        (rows || t.in_place || t.overwrites.contains(&(o, k))) && s.inputs[k].ty == s.outputs[o].ty
    }

    /// What must be made apart for `concat` to lie over `below`; `None` if it can't.
    fn fits(&self, concat: usize, below: usize) -> Option<Apart> {
        let (reads, writes) = (&self.reads[below], &self.writes[below]);
        let &[(maker, _)] = &writes[..] else { return None };
        let mut apart = vec![];
        for &(w, o) in &self.writes[concat] {
            let view = &self.steps[w].outputs[o];
            let (part, stride) = columns(view)?;
            if w <= maker {
                return None;
            }
            let mut alone = false;
            for &(r, k) in reads.iter().filter(|r| r.0 >= w) {
                let read = &self.steps[r].inputs[k];
                let (other, other_stride) = columns(read)?;
                if other_stride != stride || (overlap(&part, &other) && r > w) {
                    return None;
                }
                let same = other == part && self.over(w, o, k);
                alone |= overlap(&part, &other) && !same;
            }
            if alone {
                apart.push((w, o));
            }
        }
        let again = |s: usize| is_backward(self.graph.node(self.steps[s].node));
        (apart.is_empty() || again(maker)).then_some(apart)
    }
}

/// See the module's comment.
pub fn overlay(graph: &Graph, buffers: &mut Vec<Buffer>, steps: &mut Vec<Step>, outputs: &[OutputSlot]) {
    let uses = |of: fn(&Step) -> &[View], steps: &[Step]| {
        let mut all: Vec<Uses> = vec![vec![]; buffers.len()];
        for (i, s) in steps.iter().enumerate() {
            of(s).iter().enumerate().for_each(|(k, v)| all[v.buffer.index()].push((i, k)));
        }
        all
    };
    let (reads, writes) = (uses(|s| &s.inputs, steps), uses(|s| &s.outputs, steps));
    let free = |b: usize| buffers[b].kind == BufferKind::Arena && outputs.iter().all(|o| o.view.buffer.index() != b);
    let over = Overlay { graph, steps, reads, writes };
    let mut taken = vec![false; buffers.len()];
    let mut found: Vec<(usize, usize, Apart)> = vec![];
    for concat in (0..buffers.len()).filter(|&b| over.writes[b].len() > 1 && free(b)) {
        let ty: &Ty = &buffers[concat].ty;
        // What its makers read.
        let makers = over.writes[concat].iter().flat_map(|&(w, _)| &over.steps[w].inputs);
        let below = makers
            .map(|v| v.buffer.index())
            .filter(|&b| b != concat && free(b) && buffers[b].ty.dtype == ty.dtype && buffers[b].ty.shape == ty.shape);
        let fits = |b: usize| (!taken[b]).then(|| over.fits(concat, b)).flatten().map(|a| (b, a));
        if let Some((b, apart)) = below.into_iter().find_map(fits) {
            (taken[b], taken[concat]) = (true, true);
            found.push((concat, b, apart));
        }
    }
    let mut copies: Vec<(usize, Step)> = vec![];
    for (concat, below, apart) in found {
        let to = BufferId(below as u32);
        for s in steps.iter_mut() {
            let views = s.inputs.iter_mut().chain(&mut s.outputs);
            views.filter(|v| v.buffer.index() == concat).for_each(|v| v.buffer = to);
        }
        for (w, o) in apart {
            buffers.push(Buffer { ty: steps[w].outputs[o].ty.clone(), kind: BufferKind::Arena });
            let own = View {
                buffer: BufferId(buffers.len() as u32 - 1),
                offset: Dim::int(0),
                ty: steps[w].outputs[o].ty.clone(),
                strided: None,
            };
            let part = std::mem::replace(&mut steps[w].outputs[o], own.clone());
            copies.push((w, copy_step(steps[w].node, own, part)));
        }
    }
    copies.sort_by_key(|c| std::cmp::Reverse(c.0));
    copies.into_iter().for_each(|(w, copy)| steps.insert(w + 1, copy));
}
