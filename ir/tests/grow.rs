//! Properties of grown graphs: they survive the way through text, pass the verifier and evaluate to finite values.

use proptest::prelude::*;
use rambac_ir::interp::{self, Precision};
use rambac_ir::ops::Op;
use rambac_ir::testing::{Grown, Rng, grow, grown, grown_differentiable, has_gradient};
use rambac_ir::{Value, text, verify};
use std::collections::BTreeSet;

/// Runs a grown graph and returns every value.
fn run_all(g: &Grown, precision: Precision) -> Vec<(Value, rambac_ir::HostArray)> {
    let all: Vec<Value> = g.graph.iter().flat_map(|(id, n)| (0..n.tys.len()).map(move |r| id.result(r))).collect();
    let values = interp::run(&g.graph, &g.dims, &g.sources, &all, precision).unwrap_or_else(|e| panic!("{e}\n{g:?}"));
    all.into_iter().zip(values).collect()
}

fn check_finite(g: &Grown, precision: Precision) -> Result<(), TestCaseError> {
    for (v, a) in run_all(g, precision) {
        let n = g.graph.node(v.node);
        prop_assert_eq!(a.ty(), g.graph.ty(v).bind(&g.dims).unwrap());
        // Scores that are hidden, and the log-sum-exp of what sees nothing.
        let parts = matches!(&n.op, Op::Attend(a) if a.joint) || matches!(n.op, Op::Softmax(_));
        let masked = matches!(n.op, Op::Score(_) | Op::Mask(_)) || parts && v.result == 1;
        let bad = a.to_f64().into_iter().find(|x| !(x.is_finite() || masked && *x == f64::NEG_INFINITY));
        prop_assert!(bad.is_none(), "{} = {} holds {bad:?}", g.graph.label(v), n.op.mnemonic());
    }
    Ok(())
}

fn check_text(g: &Grown) -> Result<(), TestCaseError> {
    let printed = text::print(&g.graph);
    let parsed = text::parse(&printed);
    prop_assert!(parsed.is_ok(), "{:?}\n{printed}", parsed.err());
    let parsed = parsed.unwrap();
    prop_assert!(parsed == g.graph, "\n{printed}\n{}", text::print(&parsed));
    prop_assert_eq!(text::print(&parsed), printed);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn grown_graphs_hold(g in grown(24)) {
        check_text(&g)?;
        prop_assert!(verify::verify(&g.graph).is_ok(), "{:?}", verify::verify(&g.graph));
        verify::lint(&g.graph);
        check_finite(&g, Precision::Typed)?;
    }

    #[test]
    fn differentiable_graphs_hold(g in grown_differentiable(24)) {
        check_text(&g)?;
        prop_assert!(verify::verify(&g.graph).is_ok(), "{:?}", verify::verify(&g.graph));
        prop_assert!(g.graph.iter().all(|(_, n)| has_gradient(n.op.mnemonic())));
        prop_assert!(g.graph.output("loss").is_some());
        check_finite(&g, Precision::Exact)?;
    }
}

/// The strategy really covers the IR: a new op that it can't grow fails here.
#[test]
fn every_op_is_grown() {
    let mut rng = Rng(1);
    let mut seen = BTreeSet::new();
    let all = Op::mnemonics();
    for seed in 0..40 {
        let steps: Vec<(u16, u64)> = (0..all.len()).map(|op| (op as u16, rng.bits())).collect();
        seen.extend(grow(seed, &steps, false).graph.iter().map(|(_, n)| n.op.mnemonic()));
    }
    let missing: Vec<_> = all.into_iter().filter(|m| !seen.contains(m)).collect();
    assert!(missing.is_empty(), "never grown: {missing:?}");
}
