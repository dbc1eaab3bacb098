//! RAMba's own layers as IR: the chunk memory, retrieval, and hierarchical sparse attention (arXiv 2504.16795).

use crate::config::Config;
use crate::segment::Around;
use rambac_ir::ops::*;
use rambac_ir::{Builder, Dim, Ty, Value};

/// What attention layers read: keys and values per token, one landmark per chunk.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// `[N, T, h, d]`, T tokens in whole chunks.
    pub k: Value,
    /// `[N, T, h, d]`
    pub v: Value,
    /// `[N, T/S, h, r]`
    pub landmarks: Value,
}

/// The chunks that every token chose, `[N, L, h, K]`.
#[derive(Clone, Copy, Debug)]
pub struct Chosen {
    pub indices: Value,
    /// Filled slots, `[N, L, h]`.
    pub count: Value,
    pub weights: Value,
    /// What they were chosen by, `[N, L, h, r]`; a chunk's score is its product with the landmark, over √r.
    pub query: Value,
}

/// Types of the memory for a batch of `n` with `chunks` chunks.
pub fn memory_types(c: &Config, n: &Dim, chunks: &Dim) -> [Ty; 3] {
    let int = Dim::int;
    let t = chunks.checked_mul(&int(c.chunk_size)).expect("BUG: a checked config's sizes multiply");
    let kv = Ty::f32([n.clone(), t, int(c.num_kv_heads), int(c.attention_head_dim())]);
    let lm = Ty::f32([n.clone(), chunks.clone(), int(c.num_kv_heads), int(c.retrieval_head_dim())]);
    [kv.clone(), kv, lm]
}

fn param(b: &mut Builder, p: &str, name: &str, shape: &[usize]) -> Value {
    b.param(&format!("{p}{name}"), Ty::f32(shape.to_vec()))
}

/// Splits the last axis into `heads`.
fn heads(b: &mut Builder, x: Value, heads: usize) -> Value {
    let mut shape = b.ty(x).shape.clone();
    if let Some(width) = shape.pop().and_then(|d| d.as_int()) {
        shape.extend([Dim::int(heads), Dim::int(width / heads)]);
    }
    b.reshape(x, shape)
}

/// Joins the last two axes.
fn join(b: &mut Builder, x: Value) -> Value {
    let mut shape = b.ty(x).shape.clone();
    if let (Some(d), Some(h)) = (shape.pop(), shape.pop()) {
        shape.push(d.checked_mul(&h).expect("BUG: a checked config's sizes multiply"));
    }
    b.reshape(x, shape)
}

/// Bidirectional attention inside a chunk: `x: [B, T, D]`.
fn encoder_attention(b: &mut Builder, c: &Config, p: &str, x: Value) -> Value {
    let d = c.attention_head_dim();
    let project = |b: &mut Builder, name: &str, n_heads: usize| {
        let w = param(b, p, &format!("{name}.weight"), &[n_heads * d, c.hidden_size]);
        let bias = param(b, p, &format!("{name}.bias"), &[n_heads * d]);
        let y = b.linear(x, w);
        let y = b.add(y, bias);
        heads(b, y, n_heads)
    };
    let q = project(b, "q_proj", c.num_attention_heads);
    let k = project(b, "k_proj", c.num_key_value_heads);
    let v = project(b, "v_proj", c.num_key_value_heads);
    let turn = |b: &mut Builder, x: Value, norm: &str| {
        let w = param(b, p, norm, &[d]);
        let x = b.rms_norm(x, w, c.rms_eps);
        b.push(Rotary { base: 10000.0, inverse: false }, &[x])
    };
    let q = turn(b, q, "q_norm.weight");
    let k = turn(b, k, "k_norm.weight");
    let y = b.push(Attention::new(1.0 / (d as f64).sqrt(), false), &[q, k, v]);
    let y = join(b, y);
    let w = param(b, p, "o_proj.weight", &[c.hidden_size, c.hidden_size]);
    b.linear(y, w)
}

/// SwiGLU: `down(SiLU(gate x) · up x)`.
fn mlp(b: &mut Builder, c: &Config, p: &str, x: Value) -> Value {
    let w = param(b, p, "gate_proj.weight", &[c.mlp_dim(), c.hidden_size]);
    let gate = b.linear(x, w);
    let gate = b.silu(gate);
    let w = param(b, p, "up_proj.weight", &[c.mlp_dim(), c.hidden_size]);
    let up = b.linear(x, w);
    let y = b.mul(gate, up);
    let w = param(b, p, "down_proj.weight", &[c.hidden_size, c.mlp_dim()]);
    b.linear(y, w)
}

fn encoder_layer(b: &mut Builder, c: &Config, p: &str, x: Value) -> Value {
    let w = param(b, p, "input_layernorm.weight", &[c.hidden_size]);
    let u = b.rms_norm(x, w, c.rms_eps);
    let y = encoder_attention(b, c, &format!("{p}self_attn."), u);
    let x = b.add(x, y);
    let w = param(b, p, "post_attention_layernorm.weight", &[c.hidden_size]);
    let u = b.rms_norm(x, w, c.rms_eps);
    let y = mlp(b, c, &format!("{p}mlp."), u);
    b.add(x, y)
}

/// The chunking layer: `x: [N, T, D]`, T a multiple of S, → the memory.
pub fn chunking(b: &mut Builder, c: &Config, p: &str, x: Value) -> Memory {
    let shape = b.ty(x).shape.clone();
    let (n, t, d, s) = (shape[0].clone(), shape[1].clone(), c.hidden_size, c.chunk_size);
    let chunks = t.checked_div(s as u64).expect("BUG: a checked config's chunk size is positive");
    let rows = n.checked_mul(&chunks).expect("BUG: dims of a batch multiply");
    let int = Dim::int;
    let (e, summary) = if c.encoder_layers > 0 {
        let x = b.reshape(x, vec![rows.clone(), int(s), int(d)]);
        let cls = param(b, p, "cls_emb", &[1, 1, d]);
        let cls = b.broadcast(cls, vec![rows.clone(), int(1), int(d)]);
        let mut x = b.concat(&[x, cls], 1);
        for j in 0..c.encoder_layers {
            x = encoder_layer(b, c, &format!("{p}encoder.layers.{j}."), x);
        }
        let w = param(b, p, "encoder.norm.weight", &[d]);
        let x = b.rms_norm(x, w, c.rms_eps);
        let e = b.slice(x, 1, 0, s);
        let e = b.reshape(e, shape);
        let summary = b.slice(x, 1, s, s + 1);
        (e, b.reshape(summary, vec![n, chunks, int(d)]))
    } else {
        let w = param(b, p, "norm.weight", &[d]);
        let e = b.rms_norm(x, w, c.rms_eps);
        let summary = b.push(Summarise { chunk: s, mode: Summary::Mean }, &[e]);
        (e, summary)
    };
    let w = param(b, p, "proj_k.weight", &[c.kv_dim(), d]);
    let k = b.linear(e, w);
    let mut k = heads(b, k, c.num_kv_heads);
    if c.enable_qk_norm {
        let w = param(b, p, "k_rmsnorm.weight", &[c.attention_head_dim()]);
        k = b.rms_norm(k, w, c.rms_eps);
    }
    let w = param(b, p, "proj_v.weight", &[c.kv_dim(), d]);
    let v = b.linear(e, w);
    let v = heads(b, v, c.num_kv_heads);
    let w = param(b, p, "lmk_ln.weight", &[c.retrieval_dim, d]);
    let landmarks = b.linear(summary, w);
    Memory { k, v, landmarks: heads(b, landmarks, c.num_kv_heads) }
}

/// How `enable_lmk_norm` comes to the landmarks that a retrieval layer is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landmarks {
    /// They are as the chunking layer made them.
    Raw,
    /// Their norms are 1 already ([`unit_landmarks`]): the layer's weight for them moves over to the query.
    Unit,
}

/// Landmarks as they are stored: with `enable_lmk_norm` divided by their norm once and for all, not at every token.
pub fn unit_landmarks(b: &mut Builder, c: &Config, landmarks: Value) -> Value {
    if !c.enable_lmk_norm {
        return landmarks;
    }
    let ones = b.constant(1.0, Ty::f32([c.retrieval_head_dim()]));
    b.rms_norm(landmarks, ones, c.rms_eps)
}

/// The retrieval layer: every token of `x: [N, L, D]` chooses and weighs chunks.  `start: i32[N]` is the position of a
/// sequence's first token.
pub fn retrieval(
    b: &mut Builder,
    c: &Config,
    p: &str,
    x: Value,
    (landmarks, form): (Value, Landmarks),
    start: Value,
) -> Chosen {
    let w = param(b, p, "pre_norm.weight", &[c.hidden_size]);
    let u = b.rms_norm(x, w, c.rms_eps);
    let w = param(b, p, "ln.weight", &[c.retrieval_dim, c.hidden_size]);
    let q = b.linear(u, w);
    let (mut q, mut lm) = (heads(b, q, c.num_kv_heads), landmarks);
    let r = c.retrieval_head_dim();
    if c.enable_lmk_norm {
        let w = param(b, p, "lmk_q_norm.weight", &[r]);
        q = b.rms_norm(q, w, c.rms_eps);
        let w = param(b, p, "lmk_k_norm.weight", &[r]);
        match form {
            Landmarks::Raw => lm = b.rms_norm(lm, w, c.rms_eps),
            Landmarks::Unit => q = b.mul(q, w),
        }
    }
    let s = b.push(Score { chunk: c.chunk_size, scale: 1.0 / (r as f64).sqrt() }, &[q, lm, start]);
    let i = b.push_all(Select::new(c.chunk_topk, Order::Recent), &[s]);
    let rule = if c.enable_softmax { Weighting::Softmax } else { Weighting::StickBreaking };
    let weights = b.push(Weigh { rule }, &[s, i[0], i[1]]);
    Chosen { indices: i[0], count: i[1], weights, query: q }
}

/// One hierarchical sparse attention layer on `x: [N, L, D]`.
pub fn attention(b: &mut Builder, c: &Config, p: &str, x: Value, memory: &Memory, chosen: &Chosen) -> Value {
    let (d, width) = (c.attention_head_dim(), c.hidden_size);
    let w = param(b, p, "pre_norm.weight", &[width]);
    let u = b.rms_norm(x, w, c.rms_eps);
    let w = param(b, p, "q_proj.weight", &[width, width]);
    let q = b.linear(u, w);
    let mut q = heads(b, q, c.num_attention_heads);
    if c.enable_qk_norm {
        let w = param(b, p, "q_norm.weight", &[d]);
        q = b.rms_norm(q, w, c.rms_eps);
    }
    let attend = Attend {
        chunk: c.chunk_size,
        scale: 1.0 / (d as f64).sqrt(),
        off_by_one: if c.enable_softmax1 { 1.0 } else { 0.0 },
        joint: false,
    };
    let o = b.push(attend, &[q, memory.k, memory.v, chosen.indices, chosen.count]);
    let y = b.push(Aggregate {}, &[o, chosen.weights]);
    let y = join(b, y);
    let w = param(b, p, "o_proj.weight", &[width, width]);
    let y = b.linear(y, w);
    b.add(x, y)
}

/// Queries, keys and values of a layer's own input `[N, L, D]`, and that input normalised.
fn projected(b: &mut Builder, c: &Config, p: &str, x: Value) -> (Value, [Value; 3]) {
    let (d, kv) = (c.hidden_size, c.kv_dim());
    let w = param(b, p, "pre_norm.weight", &[d]);
    let u = b.rms_norm(x, w, c.rms_eps);
    let mut project = |name: &str, width: usize, n: usize| {
        let w = param(b, p, &format!("{name}.weight"), &[width, d]);
        let y = b.linear(u, w);
        heads(b, y, n)
    };
    let q = project("q_proj", d, c.num_attention_heads);
    let (k, v) = (project("k_proj", kv, c.num_kv_heads), project("v_proj", kv, c.num_kv_heads));
    (u, [q, k, v])
}

fn unprojected(b: &mut Builder, c: &Config, p: &str, x: Value, o: Value) -> Value {
    let y = join(b, o);
    let w = param(b, p, "o_proj.weight", &[c.hidden_size, c.hidden_size]);
    let y = b.linear(y, w);
    b.add(x, y)
}

/// A layer of the config's attention variant on `x: [N, L, D]`, and its loss of its own if it has one.  Positions are left to
/// the layers around it.
pub fn variant(b: &mut Builder, c: &Config, p: &str, x: Value) -> (Value, Option<Value>) {
    let a = c.attention.as_ref().expect("BUG: a variant's layer without a variant");
    let f = a.fragment(c).unwrap_or_else(|e| panic!("BUG: a checked config holds a fragment that is none: {e}"));
    let (u, qkv) = projected(b, c, p, x);
    let (o, aux) = f.inline(b, &format!("{p}variant."), u, qkv);
    (unprojected(b, c, p, x, o), aux)
}

/// As [`variant`], of a segment: keys, values and what else the variant keeps of the text come from `memory` by their names.
///
/// # Errors
/// The variant has no form for segments.
pub fn variant_segment(
    b: &mut Builder,
    c: &Config,
    p: &str,
    x: Value,
    (start, capacity): (Value, usize),
    memory: &mut dyn FnMut(&mut Builder, &str, Value) -> Value,
) -> Result<Value, String> {
    let a = c.attention.as_ref().expect("BUG: a variant's layer without a variant");
    let f = a.fragment(c)?;
    let (u, [q, k, v]) = projected(b, c, p, x);
    let around = Around { start, capacity, rows: [u, q, k, v], memory };
    let o = f.segment(b, &format!("{p}variant."), around)?;
    Ok(unprojected(b, c, p, x, o))
}

/// As [`window`], of a segment.
pub fn window_segment(
    b: &mut Builder,
    c: &Config,
    p: &str,
    x: Value,
    start: Value,
    memory: &mut dyn FnMut(&mut Builder, &str, Value) -> Value,
) -> Value {
    let (_, [q, k, v]) = projected(b, c, p, x);
    let [q, k] = [q, k].map(|x| b.push(Rotary { base: 10000.0, inverse: false }, &[x, start]));
    let (k, v) = (memory(b, "k", k), memory(b, "v", v));
    let scale = 1.0 / (c.attention_head_dim() as f64).sqrt();
    let o = b.push(Attention { window: c.window_size, ..Attention::new(scale, true) }, &[q, k, v, start]);
    unprojected(b, c, p, x, o)
}

/// A layer of attention to a sliding window, with rotary positions.
pub fn window(b: &mut Builder, c: &Config, p: &str, x: Value) -> Value {
    let (_, [q, k, v]) = projected(b, c, p, x);
    let [q, k] = [q, k].map(|x| b.push(Rotary { base: 10000.0, inverse: false }, &[x]));
    let scale = 1.0 / (c.attention_head_dim() as f64).sqrt();
    let o = b.push(Attention { window: c.window_size, ..Attention::new(scale, true) }, &[q, k, v]);
    unprojected(b, c, p, x, o)
}

/// A feed-forward layer on `x: [N, L, D]`.
pub fn feed_forward(b: &mut Builder, c: &Config, p: &str, x: Value) -> Value {
    let w = param(b, p, "norm.weight", &[c.hidden_size]);
    let u = b.rms_norm(x, w, c.rms_eps);
    let y = mlp(b, c, &format!("{p}mlp."), u);
    b.add(x, y)
}
