//! The passes in order.

use crate::{
    cse, dce, fold, fuse_attention, fuse_epilogue, fuse_map, fuse_norm, fuse_selection, narrow, recompute, simplify,
};
use rambac_ir::Graph;

/// What a user can choose about compiling.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Compute a layer's activations again for its backward instead of keeping them.
    pub recompute: bool,
    /// Keep the weights of products and the embedding table in bf16, see `narrow`.
    pub bf16_weights: bool,
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
    ("recompute", |g, o| if o.recompute { recompute::recompute(g) } else { g.clone() }),
    ("fuse_map", |g, _| fuse_map::fuse_map(g)),
    ("dce", |g, _| dce::dce(g)),
    ("fuse_residual", |g, _| fuse_norm::fuse_residual(g)),
    ("fuse_epilogue", |g, _| fuse_epilogue::fuse_epilogue(g)),
];

/// Runs every pass; `seen` is told of each result (for `explain` and the viewer).
pub fn optimise_with(g: &Graph, options: &Options, mut seen: impl FnMut(&'static str, &Graph)) -> Graph {
    let mut g = g.clone();
    for (name, pass) in PASSES {
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

/// Runs every pass.
pub fn optimise(g: &Graph, options: &Options) -> Graph {
    optimise_with(g, options, |_, _| {})
}
