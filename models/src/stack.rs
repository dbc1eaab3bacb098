//! Whole models as graphs: the forward, the loss, and the parts that inference runs segment by segment.
//!
//! The stack is `lower → chunking → upper`.  [`forward`] and [`loss`] run it at once; [`lower`], [`chunks`],
//! [`upper`] and [`head`] are the same layers cut where a sequence is cut: states go in and come out, and the chunk memory is an
//! input whose number of chunks `C` does not depend on the segment's length `L`.

use crate::config::{Config, LayerKind};
use crate::mamba2::{self, MambaState};
use crate::ramba::{self, Chosen, Landmarks, Memory};
use rambac_ir::ops::CrossEntropy;
use rambac_ir::{BuildErrors, Builder, DType, Dim, Graph, Ty, Value};

/// Names of a Mamba layer's carried states.
pub fn state_names(layer: usize) -> [String; 2] {
    [format!("carry.layers.{layer}.conv"), format!("carry.layers.{layer}.scan")]
}

/// Where scan and conv states come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carry {
    /// Every sequence starts from zero.
    Zero,
    /// From the persistent states, which the final ones replace; scaled by the input `carry: f32[N]`, 1 to go on from the
    /// run before and 0 to start anew.  No gradient flows back into them.
    States,
    /// From the persistent states as they are, which the final ones replace: inference.
    Kept,
}

/// Builds layers in order and keeps what they share.
struct Stack<'a> {
    b: Builder,
    c: &'a Config,
    carry: Carry,
    memory: Option<Memory>,
    landmarks: Landmarks,
    /// Attention of a segment over the text so far: the tokens that there is room for.
    capacity: Option<usize>,
    /// Why the variant has no form for segments.
    refused: Option<String>,
    /// Leave retrieval and attention out.
    skip_attention: bool,
    chosen: Option<Chosen>,
    /// `i32[N]`: position of each sequence's first token.
    start: Option<Value>,
    embeddings: Option<Value>,
    trace: Vec<(String, Value)>,
    /// Losses that layers have of their own.
    aux: Vec<Value>,
}

impl<'a> Stack<'a> {
    fn new(c: &'a Config, name: &str, syms: &[&str], carry: Carry) -> Self {
        let b = Builder::new(name, syms);
        Self {
            b,
            c,
            carry,
            memory: None,
            landmarks: Landmarks::Raw,
            capacity: None,
            refused: None,
            skip_attention: false,
            chosen: None,
            start: None,
            embeddings: None,
            trace: vec![],
            aux: vec![],
        }
    }

    fn tokens(&mut self) -> Value {
        let ids = self.b.input("input_ids", Ty::i32([Dim::sym("N"), Dim::sym("L")]));
        let table = self.table();
        self.b.scoped("embeddings", |b| b.push(rambac_ir::ops::Embedding {}, &[ids, table]))
    }

    fn table(&mut self) -> Value {
        let (v, d) = (self.c.vocab_size, self.c.hidden_size);
        *self.embeddings.get_or_insert_with(|| self.b.param("backbone.embeddings.weight", Ty::f32([v, d])))
    }

    fn mamba(&mut self, i: usize, x: Value) -> Value {
        let n = self.b.ty(x).shape[0].clone();
        let (conv, scan) = mamba2::state_types(self.c, &n);
        let c = self.c;
        match self.carry {
            Carry::Zero => {
                let state = MambaState { conv: self.b.constant(0.0, conv), scan: self.b.constant(0.0, scan) };
                mamba2::block(&mut self.b, c, &format!("backbone.layers.{i}."), x, state).0
            }
            Carry::States | Carry::Kept => {
                let names = state_names(i);
                let keep = (self.carry == Carry::States).then(|| self.carry_input(&n));
                let mut from = |name: &str, ty: Ty| {
                    let s = self.b.state(name, ty.clone());
                    let Some(keep) = keep else { return s };
                    let ones = [n.clone()].into_iter().chain(vec![Dim::int(1); ty.rank() - 1]).collect();
                    let k = self.b.reshape(keep, ones);
                    self.b.mul(s, k)
                };
                let state = MambaState { conv: from(&names[0], conv), scan: from(&names[1], scan) };
                let (y, end) = mamba2::block(&mut self.b, c, &format!("backbone.layers.{i}."), x, state);
                self.b.output(&names[0], end.conv);
                self.b.output(&names[1], end.scan);
                y
            }
        }
    }

    fn carry_input(&mut self, n: &Dim) -> Value {
        let have = self.b.graph().source("carry").map(|(id, _)| id.result(0));
        have.unwrap_or_else(|| self.b.input("carry", Ty::f32([n.clone()])))
    }

    fn layer(&mut self, i: usize, kind: LayerKind, x: Value) -> Value {
        let p = format!("backbone.layers.{i}.");
        let c = self.c;
        self.b.enter(&format!("layers.{i}"));
        let y = match kind {
            LayerKind::Mamba => self.mamba(i, x),
            LayerKind::Chunking => {
                self.memory = Some(ramba::chunking(&mut self.b, c, &p, x));
                x
            }
            LayerKind::Retrieval | LayerKind::Attention if self.skip_attention => x,
            LayerKind::Retrieval => {
                let memory = self.memory.expect("BUG: chunking comes before retrieval");
                let start = self.start();
                self.chosen = Some(ramba::retrieval(&mut self.b, c, &p, x, (memory.landmarks, self.landmarks), start));
                x
            }
            LayerKind::Attention => {
                let memory = self.memory.expect("BUG: chunking comes before attention");
                let chosen = self.chosen.expect("BUG: retrieval comes before attention");
                ramba::attention(&mut self.b, c, &p, x, &memory, &chosen)
            }
            LayerKind::Variant | LayerKind::Window if self.capacity.is_some() => self.over_text(i, kind, x),
            LayerKind::Variant => {
                let (y, aux) = ramba::variant(&mut self.b, c, &p, x);
                self.aux.extend(aux);
                y
            }
            LayerKind::Window => ramba::window(&mut self.b, c, &p, x),
            LayerKind::Mlp => ramba::feed_forward(&mut self.b, c, &p, x),
        };
        self.b.leave();
        self.trace.push((format!("trace.{i}"), y));
        y
    }

    /// A layer that attends over all tokens so far, which it keeps as states.
    fn over_text(&mut self, i: usize, kind: LayerKind, x: Value) -> Value {
        let (start, capacity, c) = (self.start(), self.capacity.unwrap_or(0), self.c);
        let p = format!("backbone.layers.{i}.");
        let mut memory = |b: &mut Builder, name: &str, rows: Value| {
            let state = format!("carry.layers.{i}.{name}");
            let mut ty = b.ty(rows).clone();
            ty.shape[1] = Dim::int(capacity);
            let kept = b.state(&state, ty);
            let all = b.push(rambac_ir::ops::Append {}, &[kept, rows, start]);
            b.output(&state, all);
            all
        };
        if kind == LayerKind::Window {
            return ramba::window_segment(&mut self.b, c, &p, x, start, &mut memory);
        }
        let y = ramba::variant_segment(&mut self.b, c, &p, x, (start, capacity), &mut memory);
        y.unwrap_or_else(|why| {
            self.refused.get_or_insert(why);
            x
        })
    }

    fn start(&mut self) -> Value {
        *self.start.get_or_insert_with(|| self.b.constant(0.0, Ty::i32([Dim::sym("N")])))
    }

    /// Logits `[.., V]` of hidden states.
    fn head(&mut self, x: Value) -> Value {
        let c = self.c;
        let table = if c.tie_word_embeddings { Some(self.table()) } else { None };
        self.b.scoped("head", |b| {
            let w = b.param("backbone.norm_f.weight", Ty::f32([c.hidden_size]));
            let x = b.rms_norm(x, w, c.layer_norm_epsilon);
            let w = table.unwrap_or_else(|| b.param("lm_head.weight", Ty::f32([c.vocab_size, c.hidden_size])));
            b.linear(x, w)
        })
    }

    fn all_layers(&mut self, mut x: Value) -> Value {
        for (i, kind) in self.c.layers().into_iter().enumerate() {
            x = self.layer(i, kind, x);
        }
        x
    }
}

/// Index of the chunking layer, which cuts the stack; its length for a plain Mamba-2.
pub fn cut(c: &Config) -> usize {
    let layers = c.layers();
    layers.iter().position(|k| *k == LayerKind::Chunking).unwrap_or(layers.len())
}

/// `input_ids: i32[N, L]` → `logits: [N, L, V]`.  `trace`: every layer's output and the chunk memory as outputs too.
///
/// # Errors
/// A config that did not pass [`Config::problems`].
pub fn forward(c: &Config, trace: bool) -> Result<Graph, BuildErrors> {
    let mut s = Stack::new(c, "forward", &["N", "L"], Carry::Zero);
    let x = s.tokens();
    let x = s.all_layers(x);
    let logits = s.head(x);
    s.b.output("logits", logits);
    if trace {
        traced(&mut s);
    }
    s.b.finish()
}

fn traced(s: &mut Stack) {
    for (name, v) in std::mem::take(&mut s.trace) {
        s.b.output(&name, v);
    }
    if let (Some(m), Some(c)) = (s.memory, s.chosen) {
        let named = [
            ("mem_k", m.k),
            ("mem_v", m.v),
            ("landmarks", m.landmarks),
            ("indices", c.indices),
            ("weights", c.weights),
        ];
        named.into_iter().for_each(|(name, v)| s.b.output(name, v));
    }
}

/// As [`forward`], and the `loss`: the mean of cross-entropy over labelled tokens, weighted by `loss_weights`.
///
/// Inputs `input_ids, labels: i32[N, L]` (labels are shifted; -100 is ignored), `loss_weights: f32[N, L]`, and with
/// [`Carry::States`] `carry: f32[N]`.  Losses that an attention variant has of its own are added to `loss`.  Also outputs `loss_sum` and `tokens`, the weighted sum and the sum of weights of
/// which the loss is the quotient.
///
/// # Errors
/// As [`forward`].
pub fn loss(c: &Config, carry: Carry, trace: bool) -> Result<Graph, BuildErrors> {
    let mut s = Stack::new(c, "loss", &["N", "L"], carry);
    let x = s.tokens();
    let x = s.all_layers(x);
    let logits = s.head(x);
    if trace {
        s.b.output("logits", logits);
        traced(&mut s);
    }
    let aux = std::mem::take(&mut s.aux);
    s.b.scoped("loss", |b| {
        let nl = [Dim::sym("N"), Dim::sym("L")];
        let labels = b.input("labels", Ty::i32(nl.clone()));
        let weights = b.input("loss_weights", Ty::f32(nl));
        let each = b.push(CrossEntropy { ignore: -100 }, &[logits, labels]);
        let ignored = b.scalar_like(-100.0, labels);
        let used = b.binary(rambac_ir::ops::BinaryFn::Ne, labels, ignored);
        let used = b.cast(used, DType::F32);
        let used = b.mul(used, weights);
        let tokens = b.sum_all(used);
        // A batch without a label has loss 0, not NaN.
        let least = b.scalar_like(1e-6, tokens);
        let divisor = b.max(tokens, least);
        let sum = b.mul(each, weights);
        let sum = b.sum_all(sum);
        let mean = b.div(sum, divisor);
        let all = aux.into_iter().fold(mean, |all, a| b.add(all, a));
        b.output("loss", all);
        b.output("loss_sum", sum);
        b.output("tokens", tokens);
    });
    s.b.finish()
}

/// What every retrieval layer chooses in a whole text: `input_ids: i32[N, L]` → for each such layer `i` its `indices.i`,
/// `count.i`, `weights.i` and `query.i`, and the `landmarks` whose products with a query are its scores.  `None` for a plain
/// Mamba-2.
///
/// # Errors
/// As [`forward`].
pub fn selections(c: &Config) -> Result<Option<Graph>, BuildErrors> {
    if c.num_upper_groups == 0 {
        return Ok(None);
    }
    let mut s = Stack::new(c, "selections", &["N", "L"], Carry::Zero);
    s.landmarks = Landmarks::Unit;
    let mut x = s.tokens();
    for (i, kind) in c.layers().into_iter().enumerate() {
        x = s.layer(i, kind, x);
        if let (LayerKind::Chunking, Some(m)) = (kind, s.memory) {
            let landmarks = ramba::unit_landmarks(&mut s.b, c, m.landmarks);
            s.memory = Some(Memory { landmarks, ..m });
            s.b.output("landmarks", landmarks);
        }
        if let (LayerKind::Retrieval, Some(chosen)) = (kind, s.chosen) {
            s.b.output(&format!("indices.{i}"), chosen.indices);
            s.b.output(&format!("count.{i}"), chosen.count);
            s.b.output(&format!("weights.{i}"), chosen.weights);
            s.b.output(&format!("query.{i}"), chosen.query);
        }
    }
    s.b.finish().map(Some)
}

/// The lower half of a segment: `input_ids: i32[N, L]` → `hidden: [N, L, D]`, states carried.
///
/// # Errors
/// As [`forward`].
pub fn lower(c: &Config) -> Result<Graph, BuildErrors> {
    let mut s = Stack::new(c, "lower", &["N", "L"], Carry::Kept);
    let mut x = s.tokens();
    for (i, kind) in c.layers().into_iter().enumerate().take(cut(c)) {
        x = s.layer(i, kind, x);
    }
    s.b.output("hidden", x);
    s.b.finish()
}

/// Tokens that the memory of [`segments`] must be a multiple of.
///
/// # Errors
/// The first thing wrong with the variant.
pub fn segment_unit(c: &Config) -> Result<usize, String> {
    let Some(a) = &c.attention else { return Ok(1) };
    let f = a.fragment(c)?;
    let divisors = f.graph.nodes.iter().flat_map(|n| &n.tys).flat_map(|t| &t.shape).map(|d| d.divisor() as usize);
    let lcm = |a: usize, b: usize| (1..=b).map(|i| a * i).find(|m| m.is_multiple_of(b)).unwrap_or(a);
    Ok(divisors.fold(1, lcm))
}

/// All layers of a model with an attention variant for a segment, `input_ids: i32[N, L]` → `hidden: [N, L, D]`: scan states, and
/// of every layer that attends keys, values and what else it needs of the `capacity` tokens that there is room for, are carried
/// as states, and with them the position.
///
/// # Errors
/// An op of the variant that has no form for segments, and why; a graph that does not build.
pub fn segments(c: &Config, capacity: usize) -> Result<Graph, String> {
    let mut s = Stack::new(c, "lower", &["N", "L"], Carry::Kept);
    s.capacity = Some(capacity);
    let n = Dim::sym("N");
    let at = s.b.state(POSITION, Ty::f32([n.clone()]));
    s.start = Some(s.b.cast(at, DType::I32));
    let ones = s.b.constant(1.0, Ty::f32([n, Dim::sym("L")]));
    let len = s.b.sum(ones, vec![1], false);
    let end = s.b.add(at, len);
    s.b.output(POSITION, end);
    let x = s.tokens();
    let x = s.all_layers(x);
    s.b.output("hidden", x);
    match s.refused.take() {
        Some(why) => Err(why),
        None => s.b.finish().map_err(|e| e.to_string()),
    }
}

/// The state of [`segments`] that counts the tokens so far.
const POSITION: &str = "carry.position";

/// Whole chunks of lower hidden states, `hidden: [N, S·B, D]` → `k`, `v`, `landmarks`.  `None` for a plain Mamba-2.
///
/// # Errors
/// As [`forward`].
pub fn chunks(c: &Config) -> Result<Option<Graph>, BuildErrors> {
    if c.num_upper_groups == 0 {
        return Ok(None);
    }
    let mut s = Stack::new(c, "chunks", &["N", "B"], Carry::Zero);
    let t = Dim::sym("B").checked_mul(&Dim::int(c.chunk_size)).expect("BUG: a checked config's sizes multiply");
    let x = s.b.input("hidden", Ty::f32([Dim::sym("N"), t, Dim::int(c.hidden_size)]));
    s.layer(cut(c), LayerKind::Chunking, x);
    let m = s.memory.expect("BUG: just built");
    s.b.output("k", m.k);
    s.b.output("v", m.v);
    let landmarks = ramba::unit_landmarks(&mut s.b, c, m.landmarks);
    s.b.output("landmarks", landmarks);
    s.b.finish().map(Some)
}

/// The upper half of a segment: `hidden: [N, L, D]`, `start: i32[N]` and a memory of `C` chunks → `upper: [N, L, D]`,
/// states carried, and the last retrieval's `query`, `indices`, `count` and `weights`.  `None` for a plain Mamba-2.
///
/// # Errors
/// As [`forward`].
pub fn upper(c: &Config) -> Result<Option<Graph>, BuildErrors> {
    upper_half(c, "upper", false)
}

/// The upper half without retrieval and attention: `hidden: [N, L, D]` → `upper: [N, L, D]`, states carried.  What the
/// published code calls flash inference: an approximation for tokens whose own output nobody reads.
///
/// # Errors
/// As [`forward`].
pub fn upper_flash(c: &Config) -> Result<Option<Graph>, BuildErrors> {
    upper_half(c, "upper_flash", true)
}

fn upper_half(c: &Config, name: &str, flash: bool) -> Result<Option<Graph>, BuildErrors> {
    if c.num_upper_groups == 0 {
        return Ok(None);
    }
    let syms: &[&str] = if flash { &["N", "L"] } else { &["N", "L", "C"] };
    let mut s = Stack::new(c, name, syms, Carry::Kept);
    s.landmarks = Landmarks::Unit;
    s.skip_attention = flash;
    let n = Dim::sym("N");
    let mut x = s.b.input("hidden", Ty::f32([n.clone(), Dim::sym("L"), Dim::int(c.hidden_size)]));
    if !flash {
        s.start = Some(s.b.input("start", Ty::i32([n.clone()])));
        let [k, v, lm] = ramba::memory_types(c, &n, &Dim::sym("C"));
        let (k, v) = (s.b.input("k", k), s.b.input("v", v));
        s.memory = Some(Memory { k, v, landmarks: s.b.input("landmarks", lm) });
    }
    for (i, kind) in c.layers().into_iter().enumerate().skip(cut(c) + 1) {
        x = s.layer(i, kind, x);
    }
    if let Some(chosen) = s.chosen {
        s.b.output("query", chosen.query);
        s.b.output("indices", chosen.indices);
        s.b.output("count", chosen.count);
        s.b.output("weights", chosen.weights);
    }
    s.b.output("upper", x);
    s.b.finish().map(Some)
}

/// The head: `upper: [N, L, D]` → `logits: [N, L, V]`.
///
/// # Errors
/// As [`forward`].
pub fn head(c: &Config) -> Result<Graph, BuildErrors> {
    let mut s = Stack::new(c, "head", &["N", "L"], Carry::Zero);
    let x = s.b.input("upper", Ty::f32([Dim::sym("N"), Dim::sym("L"), Dim::int(c.hidden_size)]));
    let logits = s.head(x);
    s.b.output("logits", logits);
    s.b.finish()
}
