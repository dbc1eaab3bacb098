//! The one-op programs of `rambac bench select`, `attend` and `scan`: operands, the op as people write it, its gradient.

use super::{Bencher, Timed, WARM_UP};
use crate::cli::{PrecisionArg, Selections};
use crate::error::{Result, wrap};
use miette::miette;
use rambac_codegen::lower;
use rambac_ir::ops::*;
use rambac_ir::ty::ConcreteTy;
use rambac_ir::{Builder, DType, Dim, Graph, Ty, Value};
use rambac_models::data::rng;
use rambac_passes::{Options, gradients, optimise};
use rambac_runtime::executor::StepTimes;
use rambac_runtime::{Executor, Store, Tensor};
use rand::Rng;
use rand::seq::index::sample;

/// A graph under construction, and what its gradient is taken by.
struct Operands {
    b: Builder,
    /// Operands that kernels read in bf16 are bf16.
    half: bool,
    wrt: Vec<(String, Value, bool)>,
}

fn tokens(tail: &[usize]) -> Vec<Dim> {
    [Dim::sym("N"), Dim::sym("L")].into_iter().chain(tail.iter().map(|&d| Dim::int(d))).collect()
}

impl Operands {
    fn new(name: &str, half: bool) -> Operands {
        Operands { b: Builder::new(name, &["N", "L"]), half, wrt: vec![] }
    }

    fn single(&mut self, name: &str, dims: Vec<Dim>) -> Value {
        let x = self.b.input(name, Ty::f32(dims));
        self.wrt.push((name.into(), x, false));
        x
    }

    fn half(&mut self, name: &str, dims: Vec<Dim>) -> Value {
        if !self.half {
            return self.single(name, dims);
        }
        let x = self.b.input(name, Ty::f32(dims).with_dtype(DType::BF16));
        let x = self.b.cast(x, DType::F32);
        self.wrt.push((name.into(), x, true));
        x
    }

    /// An output, in bf16 if kernels write it so.
    fn output(&mut self, name: &str, v: Value, half: bool) {
        let v = if half && self.half { self.b.cast(v, DType::BF16) } else { v };
        self.b.output(name, v);
    }

    /// The forward, and the forward beside the gradient of `y` by every operand, which fusion wants together.
    fn finish(mut self, y: Value, half: bool) -> Result<[Graph; 2]> {
        let graph = self.b.finish().map_err(wrap)?;
        self.b = Builder::extend(graph.clone());
        let dims = self.b.ty(y).shape.clone();
        let dy = if half { self.half("dy", dims) } else { self.single("dy", dims) };
        let loss = self.b.mul(y, dy);
        let loss = self.b.sum_all(loss);
        self.wrt.pop();
        let values: Vec<Value> = self.wrt.iter().map(|w| w.1).collect();
        let (back, grads) = gradients(self.b.finish().map_err(wrap)?, loss, &values).map_err(wrap)?;
        self.b = Builder::extend(back);
        for ((name, _, half), d) in std::mem::take(&mut self.wrt).into_iter().zip(grads) {
            self.output(&format!("grad.{name}"), d, half);
        }
        Ok([graph, self.b.finish().map_err(wrap)?])
    }
}

/// A plausible range for an operand.
pub fn range(name: &str) -> (f32, f32) {
    match name {
        "dt" => (1e-3, 0.1),
        "a" => (-8.0, -1.0),
        "w" => (0.0, 0.2),
        _ => (-1.0, 1.0),
    }
}

impl Bencher<'_> {
    fn operands(&self, name: &str) -> Operands {
        Operands::new(name, self.a.place.precision == Some(PrecisionArg::Bf16))
    }

    pub fn select(&self) -> Result<[Graph; 2]> {
        let c = &self.config;
        let (h, r) = (c.num_kv_heads, c.retrieval_head_dim());
        let mut x = self.operands("select");
        let q = x.half("q", tokens(&[h, r]));
        let chunks = Dim::sym("L").checked_div(c.chunk_size as u64).unwrap_or(Dim::int(0));
        let lm = x.half("landmarks", vec![Dim::sym("N"), chunks, Dim::int(h), Dim::int(r)]);
        let start = x.b.constant(0.0, Ty::i32([Dim::sym("N")]));
        let s = x.b.push(Score { chunk: c.chunk_size, scale: 1.0 / (r as f64).sqrt() }, &[q, lm, start]);
        let i = x.b.push_all(Select::new(c.chunk_topk, Order::Recent), &[s]);
        let rule = if c.enable_softmax { Weighting::Softmax } else { Weighting::StickBreaking };
        let w = x.b.push(Weigh { rule }, &[s, i[0], i[1]]);
        x.output("indices", i[0], false);
        x.output("weights", w, false);
        x.finish(w, false)
    }

    pub fn attend(&self) -> Result<[Graph; 2]> {
        let c = &self.config;
        let (heads, h, d, k) = (c.num_attention_heads, c.num_kv_heads, c.attention_head_dim(), c.chunk_topk);
        let mut x = self.operands("attend");
        let q = x.half("q", tokens(&[heads, d]));
        let keys = x.half("k", tokens(&[h, d]));
        let v = x.half("v", tokens(&[h, d]));
        let i = x.b.input("indices", Ty::i32(tokens(&[h, k])));
        let n = x.b.input("count", Ty::i32(tokens(&[h])));
        let w = x.single("w", tokens(&[h, k]));
        let off_by_one = if c.enable_softmax1 { 1.0 } else { 0.0 };
        let attend = Attend { chunk: c.chunk_size, scale: 1.0 / (d as f64).sqrt(), off_by_one, joint: false };
        let o = x.b.push(attend, &[q, keys, v, i, n]);
        let y = x.b.push(Aggregate {}, &[o, w]);
        x.output("y", y, true);
        x.finish(y, true)
    }

    pub fn scan(&self) -> Result<[Graph; 2]> {
        let c = &self.config;
        let (m, p, g, r) = (c.n_ssm_heads(), c.head_dim, c.n_groups, c.state_size);
        let mut x = self.operands("scan");
        let xs = x.half("x", tokens(&[m, p]));
        let dt = x.single("dt", tokens(&[m]));
        let a = x.single("a", vec![Dim::int(m)]);
        let b = x.half("b", tokens(&[g, r]));
        let cs = x.half("c", tokens(&[g, r]));
        let d = x.single("d", vec![Dim::int(m)]);
        let h0 = x.b.constant(0.0, Ty::f32([Dim::sym("N"), Dim::int(m), Dim::int(p), Dim::int(r)]));
        let y = x.b.push(SelectiveScan { block: c.mamba_chunk_size }, &[xs, dt, a, b, cs, d, h0]);
        x.output("y", y, true);
        x.finish(y, true)
    }

    /// Forward and backward of the one op `fused`.
    pub fn op(&self, [forward, backward]: [Graph; 2], fused: &str) -> Result<Vec<Timed>> {
        let alone = |g: &Graph, direction: &str, op: &str| match self.a.place.device.gpu() {
            true => self.op_on_device(g, direction, op),
            false => self.op_alone(g, direction, op),
        };
        Ok(vec![alone(&forward, "forward", fused)?, alone(&backward, "backward", &format!("{fused}_grad"))?])
    }

    /// Only the steps `op` of a program count.
    fn op_alone(&self, g: &Graph, direction: &str, op: &str) -> Result<Timed> {
        let mut e = Executor::new(lower(&optimise(g, &Options::default())), self.pool.clone());
        let plan = e.plan(&self.dims).map_err(wrap)?;
        self.fits(&plan)?;
        let mut inputs = vec![];
        for s in &e.program().sources {
            inputs.push((s.name.clone(), self.filled(&s.name, &s.ty)?));
        }
        let views: Vec<_> = inputs.iter().map(|(n, t)| (n.as_str(), t.view())).collect();
        let (mut store, mut seconds, mut steps) = (Store::default(), vec![], StepTimes::new());
        let wanted: Vec<bool> = e.program().steps.iter().map(|s| s.op.mnemonic() == op).collect();
        if !wanted.contains(&true) {
            return Err(miette!("BUG: the program of {} holds no {op}", g.name));
        }
        for run in 0..WARM_UP + self.a.runs {
            let mut times = StepTimes::new();
            e.run_timed(&self.dims, &views, &mut store, Some(&mut times)).map_err(wrap)?;
            if run >= WARM_UP {
                seconds.push(times.iter().zip(&wanted).filter(|(_, w)| **w).map(|(t, _)| t.as_secs_f64()).sum());
                steps.resize(times.len(), Default::default());
                steps.iter_mut().zip(&times).for_each(|(s, t)| *s += *t);
            }
        }
        seconds.sort_by(f64::total_cmp);
        let mut t = self.timed(&format!("{} {direction}", g.name), e.program().clone(), plan, seconds, steps)?;
        t.cost = t.costs.iter().zip(&wanted).filter(|(_, w)| **w).map(|(c, _)| *c).sum();
        Ok(t)
    }

    /// A plausible value for an input of one of the op programs.
    fn filled(&self, name: &str, ty: &Ty) -> Result<Tensor> {
        let ty = ty.bind(&self.dims).map_err(wrap)?;
        if ty.dtype == DType::I32 {
            return Ok(Tensor::i32(&ty.shape, self.choices(name, &ty)));
        }
        let mut r = rng::stream(0, "bench", &name.bytes().map(u64::from).collect::<Vec<_>>());
        let n = ty.elements();
        let (low, high) = range(name);
        Ok(Tensor::f32(&ty.shape, (0..n).map(|_| r.random_range(low..high)).collect()))
    }

    /// Indices and counts of chosen chunks `[N, L, h(, K)]`, newest first.
    pub fn choices(&self, name: &str, ty: &ConcreteTy) -> Vec<i32> {
        let (chunk, heads) = (self.config.chunk_size, self.config.num_kv_heads);
        let k = self.config.chunk_topk;
        let visible = |row: usize| row / heads % self.a.len / chunk;
        let n = ty.elements();
        if name == "count" {
            return (0..n).map(|row| visible(row).min(k) as i32).collect();
        }
        let mut indices = vec![0; n];
        for (row, slots) in indices.chunks_exact_mut(k).enumerate() {
            // Tokens of one chunk see the same chunks.
            let first = (row / heads - row / heads % chunk) * heads + row % heads;
            let group = if self.a.selections == Selections::Clustered { first } else { row };
            let mut r = rng::stream(0, "bench", &[group as u64]);
            let mut chosen = sample(&mut r, visible(row), visible(row).min(k)).into_vec();
            chosen.sort_by(|a, b| b.cmp(a));
            slots.iter_mut().zip(chosen).for_each(|(s, c)| *s = c as i32);
        }
        indices
    }
}
