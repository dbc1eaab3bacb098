//! The memory plan: no two buffers that live at once share a byte, every view lies in its buffer, the arena is at least
//! what lives at once.

use crate::support::{as_f32, config, with_all_outputs, with_gradients};
use proptest::prelude::*;
use rambac_codegen::plan::ALIGN;
use rambac_codegen::{BufferKind, Program, View, lower, plan};
use rambac_ir::testing::{grown, grown_differentiable};
use rambac_ir::{Bindings, Graph};
use rambac_passes::{Options, Recompute, optimise};
use rambac_runtime::cpu::scratch;

/// Everything the executor relies on.
pub fn check(p: &Program, dims: &Bindings) -> Result<(), TestCaseError> {
    let m = plan(p, dims, scratch).unwrap();
    prop_assert!(m.floor <= m.arena, "the arena of {} is below the floor {}", m.arena, m.floor);
    prop_assert!(m.peak() >= m.arena + m.persistent + m.inputs);
    let arena = |b: usize| p.buffers[b].kind == BufferKind::Arena;
    for b in 0..p.buffers.len() {
        prop_assert!(m.sizes[b] >= p.buffers[b].ty.bind(dims).unwrap().bytes());
        let Some(at) = m.offsets[b] else {
            prop_assert!(!arena(b) || m.lifetimes[b].is_none(), "buffer {b} is used and has no place");
            continue;
        };
        prop_assert!(at % ALIGN == 0 && at + m.sizes[b] <= m.arena, "buffer {b} leaves the arena");
        for c in 0..b {
            let (Some(other), Some((f, l)), Some((g, k))) = (m.offsets[c], m.lifetimes[b], m.lifetimes[c]) else {
                continue;
            };
            let together = f <= k && g <= l;
            let apart = at + m.sizes[b] <= other || other + m.sizes[c] <= at;
            prop_assert!(!together || apart, "buffers {b} and {c} live at once and overlap");
        }
    }
    for (i, &(at, bytes)) in m.scratch.iter().enumerate().filter(|(_, s)| s.1 > 0) {
        prop_assert!(at % ALIGN == 0 && at + bytes <= m.arena, "scratch of step {i} leaves the arena");
        for b in 0..p.buffers.len() {
            let (Some(other), Some((f, l))) = (m.offsets[b], m.lifetimes[b]) else { continue };
            let apart = at + bytes <= other || other + m.sizes[b] <= at;
            prop_assert!(i < f || l < i || apart, "buffer {b} lies in the scratch of step {i}");
        }
    }
    let mut written = vec![false; p.buffers.len()];
    p.sources.iter().for_each(|s| written[s.buffer.index()] = true);
    for (i, s) in p.steps.iter().enumerate() {
        for v in &s.inputs {
            inside(p, v, dims)?;
            prop_assert!(written[v.buffer.index()], "step {i} ({}) reads what nothing wrote", s.op.mnemonic());
        }
        for v in &s.outputs {
            inside(p, v, dims)?;
            written[v.buffer.index()] = true;
        }
    }
    for o in &p.outputs {
        inside(p, &o.view, dims)?;
        prop_assert!(written[o.view.buffer.index()], "output {} is never written", o.name);
        prop_assert!(o.view.strided.is_none(), "output {} is strided", o.name);
    }
    Ok(())
}

/// The last element that a view touches lies in its buffer, and its rows do not overlap.
fn inside(p: &Program, v: &View, dims: &Bindings) -> Result<(), TestCaseError> {
    let (ty, buffer) = (v.ty.bind(dims).unwrap(), p.buffers[v.buffer.index()].ty.bind(dims).unwrap());
    prop_assert_eq!(ty.dtype, buffer.dtype);
    let n = ty.elements();
    if n == 0 {
        return Ok(());
    }
    let offset = v.offset.eval(dims).unwrap();
    let end = match &v.strided {
        None => offset + n,
        Some(s) => {
            let (cols, stride) = (s.cols.eval(dims).unwrap(), s.stride.eval(dims).unwrap());
            prop_assert!(cols > 0 && n % cols == 0 && stride >= cols, "{ty}: rows of {cols}, {stride} apart");
            offset + (n / cols - 1) * stride + cols
        }
    };
    prop_assert!(end <= buffer.elements(), "{ty} at {offset} ends at {end} of {buffer}");
    Ok(())
}

fn every_lowering(g: &Graph, dims: &Bindings) -> Result<(), TestCaseError> {
    check(&lower(g), dims)?;
    check(&lower(&with_all_outputs(g)), dims)?;
    for recompute in [Recompute::Nothing, Recompute::All] {
        check(&lower(&optimise(g, &Options { recompute, ..Options::default() })), dims)?;
    }
    Ok(())
}

proptest! {
    #![proptest_config(config(300))]

    #[test]
    fn plans_hold(g in grown(24)) {
        let g = as_f32(&g);
        every_lowering(&g.graph, &g.dims)?;
    }

    #[test]
    fn plans_of_gradients_hold(g in grown_differentiable(16)) {
        let g = as_f32(&g);
        every_lowering(&with_gradients(&g.graph), &g.dims)?;
    }
}
