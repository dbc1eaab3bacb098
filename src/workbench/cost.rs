//! What a variant costs beside full attention, length by length, and what compiling made of it.

use super::Subject;
use crate::error::{Result, wrap};
use rambac_codegen::{Program, lower, plan};
use rambac_ir::ops::Op;
use rambac_ir::{Bindings, Cost, Graph};
use rambac_models::variants::{self, Fragment};
use rambac_passes::{Options, fuse_attention, fuse_selection, optimise, pipeline, probe};
use rambac_runtime::cpu::scratch;
use rambac_runtime::executor::slow_steps;

/// Work and memory of one forward and backward of the attention alone.
#[derive(Clone, Copy)]
pub struct Work {
    pub flops: f64,
    pub bytes: f64,
    pub peak: usize,
}

/// One length.
pub struct Line {
    pub len: usize,
    pub own: Work,
    pub full: Work,
}

/// What compiling gave.
pub struct Costs {
    pub lines: Vec<Line>,
    /// Ops that are one kernel where the text has several, with their number.
    pub fused: Vec<(&'static str, usize)>,
    /// What stays in memory and why.
    pub unfused: Vec<String>,
}

/// Lengths that are compared.
pub const LENGTHS: [usize; 4] = [1 << 10, 1 << 12, 1 << 14, 1 << 16];

fn compiled(g: &Graph) -> Result<Program> {
    let (g, _) = probe::with_gradients(g).map_err(wrap)?;
    Ok(lower(&optimise(&g, &Options::default())))
}

fn work(p: &Program, len: usize) -> Result<Work> {
    let dims = Bindings::new([("N", 1), ("L", len)]);
    let cost: Cost = p.costs(&dims).map_err(wrap)?.into_iter().sum();
    Ok(Work { flops: cost.flops, bytes: cost.bytes, peak: plan(p, &dims, scratch).map_err(wrap)?.peak() })
}

/// Costs at [`LENGTHS`], rounded up to what the variant takes.
///
/// # Errors
/// A graph without gradients.
pub fn run(s: &Subject) -> Result<Costs> {
    let full = variants::built_in("full").expect("BUG: full attention is built in");
    let full = Fragment::at(full.text, &s.sizes(), &[]).map_err(|e| crate::error::findings(&s.path, full.text, e))?;
    let (own, full) = (compiled(&s.fragment.graph)?, compiled(&full.graph)?);
    let mut lines = vec![];
    for len in LENGTHS {
        let len = len.next_multiple_of(s.unit);
        lines.push(Line { len, own: work(&own, len)?, full: work(&full, len)? });
    }
    let mut unfused = vec![];
    let (g, _) = probe::with_gradients(&s.fragment.graph).map_err(wrap)?;
    let done = pipeline::optimise_with(&g, &Options::default(), |name, g| {
        let stay = match name {
            "fuse_selection" => fuse_selection::unfused(g),
            "fuse_attention" => fuse_attention::unfused(g),
            _ => vec![],
        };
        for (id, why) in stay {
            let v = id.result(0);
            unfused.push(format!(
                "{} = {}: {why}; so {} lies in memory",
                g.label(v),
                g.node(id).op.mnemonic(),
                g.ty(v)
            ));
        }
    });
    for (i, why) in slow_steps(&own) {
        unfused.push(format!("{}: {why}", own.steps[i].op.mnemonic()));
    }
    let count = |f: fn(&Op) -> bool| done.nodes.iter().filter(|n| f(&n.op)).count();
    let all = [
        ("selection", count(|o| matches!(o, Op::Selection(_)))),
        ("chunk_attention", count(|o| matches!(o, Op::ChunkAttention(_)))),
        ("attend (joint)", count(|o| matches!(o, Op::Attend(a) if a.joint))),
        ("attention", count(|o| matches!(o, Op::Attention(_)))),
        ("merge", count(|o| matches!(o, Op::Merge(_)))),
    ];
    Ok(Costs { lines, fused: all.into_iter().filter(|f| f.1 > 0).collect(), unfused })
}
