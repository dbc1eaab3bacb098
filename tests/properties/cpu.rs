//! The CPU against the reference, one op at a time; see [`each_op`](crate::each_op).

use crate::each_op::{self, Run};
use crate::support::{as_f32, config, run_cpu, values, with_gradients};
use proptest::prelude::*;
use rambac_ir::ops::*;
use rambac_ir::testing::{Grown, Rng, grown, grown_differentiable};
use rambac_ir::{Builder, DType, Graph, HostArray, Value, text};
use rambac_passes::train_step::{AdamW, train_step};
use rambac_passes::{Options, Recompute, narrow, optimise};

fn check_graph(g: &Graph, like: &Grown) -> Result<(), TestCaseError> {
    let run = |g: &Graph, like: &Grown| run_cpu(g, like).map_err(|e| e.to_string());
    each_op::check_graph(&Run { run: &run, slack: 1.0 }, g, like)?;
    prop_assert_eq!(rambac_cpu::par::heap_peak(), 0, "a kernel took more scratch than it told\n{}", text::print(g));
    Ok(())
}

fn every_form(g: &Graph, like: &Grown) -> Result<(), TestCaseError> {
    check_graph(g, like)?;
    check_graph(&optimise(g, &Options::default()), like)?;
    check_graph(&optimise(g, &Options { recompute: Recompute::All, ..Options::default() }), like)
}

/// Turns some outputs into updates: of sources of their type, of each other's sources, of sources that are outputs too.
fn with_updates(g: &Grown, seed: u64) -> Graph {
    let mut rng = Rng(seed);
    let mut b = Builder::extend(g.graph.clone());
    let sources: Vec<(Value, Source)> = g.graph.sources().map(|(id, s)| (id.result(0), s.clone())).collect();
    for (v, s) in sources.iter().filter(|(_, s)| s.kind != SourceKind::Input) {
        let same: Vec<Value> = values(&g.graph).into_iter().filter(|w| *g.graph.ty(*w) == s.ty).collect();
        if !rng.one_in(4) {
            let to = if rng.one_in(2) && same.len() > 1 { rng.pick(&same) } else { b.copied(*v) };
            b.output(&s.name, to);
        }
        if rng.one_in(4) {
            b.output(&format!("old.{}", s.name), *v);
        }
    }
    b.finish().unwrap()
}

trait Copied {
    fn copied(&mut self, v: Value) -> Value;
}

impl Copied for Builder {
    /// Another value of the type of `v`, computed from it.
    fn copied(&mut self, v: Value) -> Value {
        if self.ty(v).dtype.is_float() { self.neg(v) } else { v }
    }
}

proptest! {
    #![proptest_config(config(120))]

    #[test]
    fn every_op(g in grown(16)) {
        let g = as_f32(&g);
        every_form(&g.graph, &g)?;
    }

    /// Weights of products and tables in bf16: the same rounded weights in the reference, with and without the casts
    /// as steps (as outputs they are, else kernels read through them).
    #[test]
    fn bf16_weights(g in grown(16)) {
        let mut g = as_f32(&g);
        for (_, s) in narrow::narrow(&g.graph).sources().filter(|(_, s)| s.ty.dtype == DType::BF16) {
            let a = g.sources.get_mut(&s.name).unwrap();
            a.dtype = DType::BF16;
            a.round_to_dtype();
        }
        let graph = narrow::narrow(&g.graph);
        check_graph(&graph, &g)?;
        check_graph(&optimise(&graph, &Options::default()), &g)?;
    }

    #[test]
    fn every_gradient(g in grown_differentiable(12)) {
        let g = as_f32(&g);
        every_form(&with_gradients(&g.graph), &g)?;
    }

    #[test]
    fn updates_replace_values_after_the_run(g in grown(12), seed in any::<u64>()) {
        let g = as_f32(&g);
        every_form(&with_updates(&g, seed), &g)?;
    }

    #[test]
    fn training_steps(g in grown_differentiable(8)) {
        let mut g = as_f32(&g);
        let opt = AdamW { lr: 0.01, warmup: 0, ..AdamW::default() };
        let step = train_step(&g.graph, &opt, |name| name.ends_with('1')).unwrap();
        for (_, s) in step.sources() {
            let ty = s.ty.bind(&g.dims).unwrap();
            g.sources.entry(s.name.clone()).or_insert_with(|| HostArray::filled(&ty, 0.0));
        }
        every_form(&step, &g)?;
    }
}
