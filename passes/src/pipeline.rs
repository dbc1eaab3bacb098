//! The passes in order.

use crate::recompute::Recompute;
use crate::{
    cse, dce, fold, fuse_attention, fuse_each, fuse_epilogue, fuse_loss, fuse_map, fuse_norm, fuse_selection, mixed,
    narrow, recompute, simplify,
};
use rambac_ir::Graph;

/// How floats are kept between ops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// Everything in f32.
    #[default]
    F32,
    /// Activations and operands of products in bf16, see `mixed`.
    Bf16,
}

/// What can be chosen about compiling.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// What of the forward is computed again for the backward instead of being kept.
    pub recompute: Recompute,
    /// Inputs of layers that are held at once, see `recompute_layers`; 0: all are.
    pub held: usize,
    /// Keep the weights of products and the embedding table in bf16, see `narrow`.
    pub bf16_weights: bool,
    /// What activations are kept in.
    pub precision: Precision,
}

impl Options {
    /// As these, for a GPU.  Where weights are bf16 activations are too, for products have operands of one type: else all weights
    /// would be made f32 again in every run.
    pub fn on_gpu(&self) -> Options {
        let precision = if self.bf16_weights { Precision::Bf16 } else { self.precision };
        Options { precision, ..self.clone() }
    }
}

/// A pass and its name.
pub type Pass = (&'static str, fn(&Graph, &Options) -> Graph);

/// What [`optimise`] runs, in this order.  Autodiff comes before: it needs to know the loss.
pub const PASSES: &[Pass] = &[
    ("dce", |g, _| dce::dce(g)),
    ("narrow", |g, o| if o.bf16_weights { narrow::narrow(g) } else { g.clone() }),
    ("fold", |g, _| fold::fold(g)),
    ("simplify", |g, _| simplify::simplify(g)),
    ("cse", |g, _| cse::cse(g)),
    ("fuse_norm", |g, _| fuse_norm::fuse_norm(g)),
    ("fuse_selection", |g, _| fuse_selection::fuse_selection(g)),
    ("fuse_attention", |g, _| fuse_attention::fuse_attention(g)),
    ("fuse_loss", |g, _| fuse_loss::fuse_loss(g)),
    ("mixed", |g, o| if o.precision == Precision::Bf16 { mixed::mixed(g) } else { g.clone() }),
    (RECOMPUTE, |g, o| recompute::recompute(g, &o.recompute)),
    ("recompute_layers", |g, o| recompute::recompute_layers(g, o.held)),
    ("fuse_map", |g, _| fuse_map::fuse_map(g)),
    ("dce", |g, _| dce::dce(g)),
    ("fuse_each", |g, _| fuse_each::fuse_each(g)),
    ("fuse_residual", |g, _| fuse_norm::fuse_residual(g)),
    ("fuse_epilogue", |g, _| fuse_epilogue::fuse_epilogue(g)),
];

/// The pass that buys memory with work, and before which [`prepare`] stops.
pub const RECOMPUTE: &str = "recompute";

fn run(passes: &[Pass], g: &Graph, options: &Options, mut seen: impl FnMut(&'static str, &Graph)) -> Graph {
    let mut g = g.clone();
    for (name, pass) in passes {
        g = pass(&g, options);
        if cfg!(debug_assertions)
            && let Err(e) = rambac_ir::verify::verify(&g)
        {
            let all: Vec<String> = e.iter().map(|d| d.message.clone()).collect();
            panic!("BUG: {name} broke the graph: {}", all.join("; "));
        }
        seen(name, &g);
    }
    g
}

fn cut() -> usize {
    PASSES.iter().position(|p| p.0 == RECOMPUTE).expect("BUG: the pipeline recomputes")
}

/// Runs every pass; `seen` is told of each result (for `explain` and the viewer).
pub fn optimise_with(g: &Graph, options: &Options, seen: impl FnMut(&'static str, &Graph)) -> Graph {
    run(PASSES, g, options, seen)
}

/// Runs every pass.
pub fn optimise(g: &Graph, options: &Options) -> Graph {
    optimise_with(g, options, |_, _| {})
}

/// The graph as the pass [`RECOMPUTE`] meets it, whose nodes [`Recompute::Nodes`] names.
pub fn prepare(g: &Graph, options: &Options) -> Graph {
    run(&PASSES[..cut()], g, options, |_, _| {})
}

/// The rest of [`optimise`] on what [`prepare`] gave.
pub fn complete(prepared: &Graph, options: &Options) -> Graph {
    run(&PASSES[cut()..], prepared, options, |_, _| {})
}
