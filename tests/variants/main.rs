//! Attention variants: every built-in one and some that are not, asked and checked; the published ones against dense
//! computations of their own, written from the papers' formulas without the vocabulary.

mod dense;
mod mistakes;
mod stacks;
mod tutorial;
mod vocabulary;

use rambac_codegen::lower;
use rambac_ir::ops::SourceKind;
use rambac_ir::{Bindings, Graph, HostArray};
use rambac_models::variants::Fragment;
use rambac_passes::probe::Sources;
use rambac_passes::{Options, optimise};
use rambac_runtime::{Executor, Store, Tensor};
use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

/// Two threads, shared by all tests here.
fn pool() -> Arc<rayon::ThreadPool> {
    static POOL: LazyLock<Arc<rayon::ThreadPool>> =
        LazyLock::new(|| Arc::new(rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap()));
    POOL.clone()
}

/// Variants that the project has no file of: written for these tests from the vocabulary alone.
const UNSEEN: [(&str, &str); 2] = [
    ("top_p", include_str!("../fixtures/variants/top_p.ir")),
    ("two_level", include_str!("../fixtures/variants/two_level.ir")),
];

fn everyone() -> Vec<(&'static str, &'static str)> {
    let built_in = rambac_models::variants::BUILT_IN.iter().map(|v| (v.name, v.text));
    built_in.chain(UNSEEN).collect()
}

fn fragment(text: &str, values: &[(&str, f64)]) -> Fragment {
    Fragment::read(text, values).unwrap_or_else(|e| panic!("{}", rambac_ir::diagnostic::render(&e, text)))
}

/// What texts must be a multiple of.
fn unit(g: &Graph) -> usize {
    let lcm = |a: usize, b: usize| (1..=b).map(|i| a * i).find(|m| m.is_multiple_of(b)).unwrap();
    g.nodes.iter().flat_map(|n| n.tys.iter().flat_map(|t| &t.shape)).map(|d| d.divisor() as usize).fold(1, lcm)
}

/// Runs a graph on the CPU's kernels, whole pipeline.
fn run(g: &Graph, dims: &Bindings, sources: &Sources) -> HashMap<String, HostArray> {
    let mut store = Store::default();
    let mut inputs = vec![];
    for (_, s) in g.sources() {
        let t = Tensor::from_host(&sources[&s.name]);
        if s.kind == SourceKind::Input {
            inputs.push((s.name.clone(), t));
        } else {
            store.insert(s.name.clone(), t);
        }
    }
    let views: Vec<_> = inputs.iter().map(|(n, t)| (n.as_str(), t.view())).collect();
    let mut e = Executor::new(lower(&optimise(g, &Options::default())), pool());
    e.run(dims, &views, &mut store).unwrap().into_iter().map(|(n, t)| (n, t.to_host())).collect()
}

/// Relative difference ‖a - b‖ / ‖b‖.
fn apart(a: &HostArray, b: &HostArray) -> f64 {
    assert_eq!(a.shape, b.shape);
    let (a, b) = (a.to_f64(), b.to_f64());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied()).max(1e-12)
}
