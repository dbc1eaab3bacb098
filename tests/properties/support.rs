//! What the properties share: deterministic configurations, graphs made from grown ones, runs on the CPU.

use proptest::test_runner::{Config, RngSeed};
use rambac_ir::interp::{self, Precision};
use rambac_ir::ops::*;
use rambac_ir::testing::Grown;
use rambac_ir::{Builder, DType, Graph, HostArray, Node, Output, Ty, Value};
use rambac_models::stack;
use rambac_passes::gradients;
use rambac_runtime::{ExecError, Executor, SessionGraphs, Store, Tensor};
use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

/// `cases` graphs, the same in every run; `PROPTEST_CASES` and `PROPTEST_RNG_SEED` ask for more, or for others.
pub fn config(cases: u32) -> Config {
    let asked = |name| std::env::var_os(name).is_some();
    let default = Config::default();
    Config {
        cases: if asked("PROPTEST_CASES") { default.cases } else { cases },
        rng_seed: if asked("PROPTEST_RNG_SEED") { default.rng_seed } else { RngSeed::Fixed(0x5eed) },
        failure_persistence: None,
        ..default
    }
}

/// Two threads, shared by all tests of this binary.
pub fn pool() -> Arc<rayon::ThreadPool> {
    static POOL: LazyLock<Arc<rayon::ThreadPool>> = LazyLock::new(|| threads(2));
    POOL.clone()
}

pub fn threads(n: usize) -> Arc<rayon::ThreadPool> {
    Arc::new(rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap())
}

/// The parts that a session runs.
pub fn session_graphs(c: &rambac_models::Config) -> SessionGraphs {
    session_graphs_for(c, 128)
}

/// With room for so many tokens, where an attention variant keeps a memory of them.
pub fn session_graphs_for(c: &rambac_models::Config, room: usize) -> SessionGraphs {
    let variant = c.attention.as_ref().map(|a| {
        let room = room.next_multiple_of(stack::segment_unit(c).unwrap());
        stack::segments(c, room).unwrap_or_else(|e| panic!("{}: {e}", a.name))
    });
    let half =
        |part: Result<Option<Graph>, rambac_ir::BuildErrors>| if variant.is_none() { part.unwrap() } else { None };
    SessionGraphs {
        chunks: half(stack::chunks(c)),
        upper: half(stack::upper(c)),
        upper_flash: half(stack::upper_flash(c)),
        lower: variant.unwrap_or_else(|| stack::lower(c).unwrap()),
        head: stack::head(c).unwrap(),
        chunk_size: c.chunk_size,
        hidden_size: c.hidden_size,
        kv: [c.num_kv_heads, c.attention_head_dim()],
        landmark: [c.num_kv_heads, c.retrieval_head_dim()],
    }
}

/// Every value of a graph, in order.
pub fn values(g: &Graph) -> Vec<Value> {
    g.iter().flat_map(|(id, n)| (0..n.tys.len()).map(move |r| id.result(r))).collect()
}

fn single(ty: &Ty) -> Ty {
    if ty.dtype.is_float() { ty.with_dtype(DType::F32) } else { ty.clone() }
}

fn single_dtype(d: DType) -> DType {
    if d.is_float() { DType::F32 } else { d }
}

fn single_body(body: &mut MapBody, dtypes: &mut [DType]) {
    dtypes.iter_mut().for_each(|d| *d = single_dtype(*d));
    for i in body {
        if let MapFn::Cast(to) = &mut i.f {
            *to = single_dtype(*to);
        }
    }
}

/// The same graph with f32 for every float type: what the CPU runs.
pub fn as_f32(g: &Grown) -> Grown {
    let old = &g.graph;
    let empty = Graph { name: old.name.clone(), syms: old.syms.clone(), ..Graph::default() };
    let mut b = Builder::extend(empty);
    let mut map: Vec<Vec<Value>> = vec![];
    for n in &old.nodes {
        let op = match n.op.clone() {
            Op::Source(s) => Op::Source(Source { ty: single(&s.ty), ..s }),
            Op::Constant(c) => Op::Constant(Constant { ty: single(&c.ty), ..c }),
            Op::Iota(i) => Op::Iota(Iota { ty: single(&i.ty), ..i }),
            Op::Cast(c) => Op::Cast(Cast { to: single_dtype(c.to) }),
            Op::FusedMap(mut m) => {
                single_body(&mut m.body, &mut m.dtypes);
                Op::FusedMap(m)
            }
            Op::MapEach(mut m) => {
                single_body(&mut m.body, &mut m.dtypes);
                Op::MapEach(m)
            }
            Op::MatMulMap(mut m) => {
                single_body(&mut m.body, &mut m.dtypes);
                Op::MatMulMap(m)
            }
            op => op,
        };
        let x: Vec<Value> = n.inputs.iter().map(|v| map[v.node.index()][v.result as usize]).collect();
        map.push(b.copy(&Node { op, ..n.clone() }, &x));
    }
    for o in &old.outputs {
        b.output(&o.name, map[o.value.node.index()][o.value.result as usize]);
    }
    let sources = g.sources.iter().map(|(name, a)| {
        let mut a = a.clone();
        a.dtype = single_dtype(a.dtype);
        a.round_to_dtype();
        (name.clone(), a)
    });
    Grown { sources: sources.collect(), graph: b.finish().unwrap(), dims: g.dims.clone() }
}

/// The graph with the gradient of `loss` at every float source as outputs.
pub fn with_gradients(g: &Graph) -> Graph {
    let loss = g.output("loss").unwrap();
    let wrt: Vec<(String, Value)> = g
        .sources()
        .filter(|(_, s)| s.ty.dtype.is_float())
        .map(|(id, s)| (format!("grad.{}", s.name), id.result(0)))
        .collect();
    let at: Vec<Value> = wrt.iter().map(|w| w.1).collect();
    let (g, grads) = gradients(g.clone(), loss, &at).unwrap();
    let mut b = Builder::extend(g);
    wrt.iter().zip(grads).for_each(|((name, _), d)| b.output(name, d));
    b.finish().unwrap()
}

/// The graph with every value as an output `v<node>_<result>`, before its own.
pub fn with_all_outputs(g: &Graph) -> Graph {
    let mut out = g.clone();
    let name = |v: &Value| format!("v{}_{}", v.node.0, v.result).into();
    out.outputs = values(g).iter().map(|v| Output { name: name(v), value: *v }).collect();
    out.outputs.extend(g.outputs.iter().cloned());
    out
}

/// Outputs by the definitions of the ops.
pub fn reference(g: &Graph, like: &Grown) -> Vec<(String, HostArray)> {
    interp::outputs(g, &like.dims, &like.sources, Precision::Exact).unwrap_or_else(|e| panic!("{e}\n{like:?}"))
}

/// Runs a graph on the CPU as it stands; its plain outputs and the store afterwards.
pub fn run_cpu(g: &Graph, like: &Grown) -> Result<(Vec<(String, Tensor)>, Store), ExecError> {
    let mut e = Executor::new(rambac_codegen::lower(g), pool());
    let (mut inputs, mut store) = (HashMap::new(), Store::default());
    for (_, s) in g.sources() {
        let t = Tensor::from_host(&like.sources[&s.name]);
        match s.kind {
            SourceKind::Input => drop(inputs.insert(s.name.clone(), t)),
            _ => store.insert(s.name.clone(), t),
        }
    }
    let views: Vec<_> = inputs.iter().map(|(n, t)| (n.as_str(), t.view())).collect();
    let out = e.run(&like.dims, &views, &mut store)?;
    Ok((out, store))
}

/// Equal bits, so that NaN equals itself and 0 differs from -0.
pub fn same_bits(a: &Tensor, b: &Tensor) -> bool {
    use rambac_runtime::tensor::Data::*;
    a.shape == b.shape
        && match (&a.data, &b.data) {
            (F32(a), F32(b)) => a.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits()),
            (a, b) => a == b,
        }
}

/// The largest difference relative to the largest finite magnitude; infinite where infinities or types differ.
pub fn difference(a: &HostArray, b: &HostArray) -> f64 {
    if a.ty() != b.ty() {
        return f64::INFINITY;
    }
    let (a, b) = (a.to_f64(), b.to_f64());
    let scale = b.iter().filter(|x| x.is_finite()).fold(1e-300f64, |m, x| m.max(x.abs()));
    let one = |(x, y): (&f64, &f64)| match (x - y).abs() {
        _ if x == y => 0.0,
        d if d.is_nan() => f64::INFINITY,
        d => d / scale,
    };
    a.iter().zip(&b).map(one).fold(0.0, f64::max)
}
