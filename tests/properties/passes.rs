//! Every pass keeps the reference's values and never raises the cost, on grown graphs and on their gradients.
//!
//! Cost is the sum of the FLOPs and bytes of every op that an output needs, at the dims the graph was grown with;
//! recomputation is excepted, which buys memory with work, and so are selections of more slots than there are chunks:
//! what the fused form keeps per slot is then larger than the scores it saves.

use crate::support::{config, difference, reference, values, with_gradients};
use proptest::prelude::*;
use rambac_ir::ops::Op;
use rambac_ir::testing::{Grown, grown, grown_differentiable};
use rambac_ir::ty::ConcreteTy;
use rambac_ir::{Bindings, Cost, Graph, text, verify};
use rambac_passes::{Options, PASSES, Recompute, dce, optimise, recompute};

fn cost(g: &Graph, dims: &Bindings) -> Cost {
    let g = &dce::dce(g);
    let bind = |v| g.ty(v).bind(dims).unwrap();
    g.iter()
        .map(|(_, n)| {
            let x: Vec<ConcreteTy> = n.inputs.iter().map(|v| bind(*v)).collect();
            let y: Vec<ConcreteTy> = n.tys.iter().map(|t| t.bind(dims).unwrap()).collect();
            // A splat in another shape is a splat, whether it is written as a view or not.
            let splat = n.inputs.iter().all(|v| matches!(g.node(v.node).op, Op::Constant(_)));
            match &n.op {
                Op::Reshape(_) if splat => Cost { flops: 0.0, bytes: y[0].bytes() as f64 },
                op => op.def().cost(&x, &y),
            }
        })
        .sum()
}

/// What must hold between a graph and what a pass made of it.
fn keeps(name: &str, before: &Graph, after: &Graph, like: &Grown) -> Result<(), TestCaseError> {
    let show = || format!("{}\nbecame\n{}", text::print(before), text::print(after));
    prop_assert!(verify::verify(after).is_ok(), "{name}: {:?}\n{}", verify::verify(after), show());
    let names = |g: &Graph| g.outputs.iter().map(|o| (o.name.to_string(), g.ty(o.value).clone())).collect::<Vec<_>>();
    prop_assert_eq!(names(before), names(after), "{} changed the outputs", name);
    let signature = |g: &Graph| g.sources().map(|(_, s)| s.clone()).collect::<Vec<_>>();
    prop_assert_eq!(signature(before), signature(after), "{} changed the sources", name);
    for ((out, a), (_, b)) in reference(before, like).iter().zip(&reference(after, like)) {
        let d = difference(b, a);
        prop_assert!(d <= 1e-9, "{name}: output {out} differs by {d:e}\n{}", show());
    }
    Ok(())
}

/// Whether a choice has more slots than chunks to fill them.
fn has_idle_slots(g: &Graph, dims: &Bindings) -> bool {
    g.nodes.iter().any(|n| match &n.op {
        Op::Select(s) => g.ty(n.inputs[0]).bind(dims).unwrap().shape[3] < s.k,
        _ => false,
    })
}

fn no_dearer(name: &str, before: &Graph, after: &Graph, like: &Grown) -> Result<(), TestCaseError> {
    if has_idle_slots(before, &like.dims) {
        return Ok(());
    }
    let (a, b) = (cost(before, &like.dims), cost(after, &like.dims));
    let slack = 1.0 + 1e-12;
    prop_assert!(
        b.flops <= a.flops * slack && b.bytes <= a.bytes * slack,
        "{name} raised the cost at {} from {a:?} to {b:?}:\n{}\nbecame\n{}",
        like.dims,
        text::print(before),
        text::print(after)
    );
    Ok(())
}

/// Each pass alone, then the pipeline with and without recomputation.
fn check(g: &Graph, like: &Grown) -> Result<(), TestCaseError> {
    for (name, pass) in PASSES {
        let after = pass(g, &Options::default());
        keeps(name, g, &after, like)?;
        no_dearer(name, g, &after, like)?;
    }
    keeps("recompute", g, &recompute::recompute(g, &Recompute::All), like)?;
    let done = optimise(g, &Options::default());
    keeps("the pipeline", g, &done, like)?;
    no_dearer("the pipeline", g, &done, like)?;
    let again = Options { recompute: Recompute::All, ..Options::default() };
    keeps("the pipeline with recompute", g, &optimise(g, &again), like)?;
    // A second time there is nothing left to do.
    let again = optimise(&done, &Options::default());
    prop_assert!(values(&again).len() <= values(&done).len(), "optimising twice adds work");
    Ok(())
}

proptest! {
    #![proptest_config(config(150))]

    #[test]
    fn passes_keep_values(g in grown(20)) {
        check(&g.graph, &g)?;
    }

    #[test]
    fn passes_keep_gradients(g in grown_differentiable(14)) {
        check(&with_gradients(&g.graph), &g)?;
    }
}
