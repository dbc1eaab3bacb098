//! Every variant: short, without warnings, causal, apart, of any length, with true gradients that reach what it learns, and
//! the same on the CPU's kernels as by definition.

use super::*;
use rambac_ir::interp::{self, Precision};
use rambac_ir::{text, verify};
use rambac_passes::probe;

#[test]
fn they_are_short_and_clean() {
    for (name, source) in everyone() {
        let f = fragment(source, &[]);
        assert_eq!(f.graph.name, name);
        let warnings = verify::lint(&f.graph);
        assert!(warnings.is_empty(), "{name}: {warnings:?}");
        let lines = f.attention_nodes().len();
        assert!(lines <= 20, "{name} takes {lines} lines of attention");
        // Consts are values in what is printed.
        let printed = text::print(&f.graph);
        assert_eq!(text::parse(&printed).as_ref().ok(), Some(&f.graph), "{name}\n{printed}");
    }
}

#[test]
fn they_hold_what_attention_must() {
    for (name, source) in everyone() {
        let f = fragment(source, &[]);
        let g = &f.graph;
        let u = unit(g);
        let l = u * 32usize.div_ceil(u).max(4);
        let none = |what: &str, found: Vec<rambac_ir::Diagnostic>| {
            assert!(found.is_empty(), "{name} {what}: {}", rambac_ir::diagnostic::render(&found, source));
        };
        none("finite", probe::finite(g, l, 3).unwrap().into_iter().collect());
        none("causal", probe::causality(g, l, 3).unwrap());
        none("any length", probe::any_length(g, l, 3).unwrap().into_iter().collect());
        none("apart", probe::sequences_apart(g, l, 3).unwrap().into_iter().collect());
        let learning = probe::learning(g, l, 3).unwrap();
        none("gradients", learning.findings);
        assert!(learning.worst < 1e-5, "{name}: gradients are off by {:e}", learning.worst);
    }
}

/// Values and gradients of the optimised graph on the CPU, at other sizes than the text's too, with blocks of several tiles.
#[test]
fn kernels_agree_with_definitions() {
    for (name, source) in everyone() {
        for sizes in [&[][..], &[("heads", 6.0), ("kv_heads", 3.0), ("dim", 8.0), ("width", 48.0)]] {
            let known = fragment(source, &[]).consts;
            let values: Vec<(&str, f64)> =
                sizes.iter().filter(|(n, _)| known.iter().any(|c| c.0 == *n)).copied().collect();
            let f = fragment(source, &values);
            let (g, outputs) = probe::with_gradients(&f.graph).unwrap();
            let u = unit(&g);
            let dims = Bindings::new([("N", 2), ("L", u * 112usize.div_ceil(u).max(4))]);
            let sources = probe::random_sources(&g, &dims, 5).unwrap();
            let want = interp::outputs(&g, &dims, &sources, Precision::Exact).unwrap();
            let got = run(&g, &dims, &sources);
            assert_eq!(want.len(), outputs.len());
            for (output, want) in &want {
                let a = &got[output];
                let (size, off) = (want.to_f64().iter().fold(0.0f64, |m, v| m.max(v.abs())), apart(a, want));
                assert!(off < 2e-5 || size < 1e-12, "{name} {values:?} {output}: off by {off:e}");
            }
        }
    }
}
