//! Inference over one sequence, segment by segment, from one set of compiled programs.
//!
//! The stack is cut at the chunking layer: `lower` runs a segment, whole chunks of its hidden states become memory
//! (`chunks`), `upper` runs the segment over the memory so far.  Rows of an unfinished chunk wait.  Any split of a text
//! into segments gives the hidden states of the whole (to rounding); no program is compiled again as the context grows.

use crate::executor::{ExecError, Executor};
use crate::store::Store;
use crate::tensor::{Tensor, TensorRef};
use rambac_codegen::lower;
use rambac_ir::ops::SourceKind;
use rambac_ir::{Bindings, Graph};
use rambac_passes::{Options, optimise};
use std::sync::Arc;

/// The parts of a model, and the sizes that the session itself must know.
pub struct SessionGraphs {
    /// `input_ids` → `hidden`.
    pub lower: Graph,
    /// `hidden` → `k`, `v`, `landmarks`; `None` for a plain Mamba-2.
    pub chunks: Option<Graph>,
    /// `hidden`, `start`, `k`, `v`, `landmarks` → `upper`.
    pub upper: Option<Graph>,
    /// `upper` → `logits`.
    pub head: Graph,
    pub chunk_size: usize,
    pub hidden_size: usize,
    /// `[heads, dim]` of keys and values, and of landmarks.
    pub kv: [usize; 2],
    pub landmark: [usize; 2],
}

/// The growing chunk memory of one sequence.
#[derive(Clone, Debug, Default)]
pub struct ChunkMemory {
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub landmarks: Vec<f32>,
    pub chunks: usize,
}

struct Halves {
    chunks: Executor,
    upper: Executor,
}

/// See the module's comment.
pub struct Session {
    lower: Executor,
    halves: Option<Halves>,
    head: Executor,
    sizes: (usize, usize, [usize; 2], [usize; 2]),
    store: Store,
    states: Vec<String>,
    memory: ChunkMemory,
    /// Hidden rows of the unfinished chunk.
    waiting: Vec<f32>,
    position: usize,
}

/// What a run of the upper half tells of its last retrieval.
#[derive(Clone, Debug, Default)]
pub struct Retrieved {
    /// `[L, h, K]`
    pub indices: Vec<i32>,
    /// `[L, h]`
    pub count: Vec<i32>,
    /// `[L, h, K]`
    pub weights: Vec<f32>,
}

/// The upper half's output for a segment, `[L, D]`, and its retrieval where the graph gives it.
pub struct Segment {
    pub hidden: Vec<f32>,
    pub retrieved: Retrieved,
}

fn dims(pairs: &[(&str, usize)]) -> Bindings {
    Bindings::new(pairs.iter().copied())
}

fn take(out: &mut Vec<(String, Tensor)>, name: &str) -> Option<Tensor> {
    let at = out.iter().position(|(n, _)| n == name)?;
    Some(out.swap_remove(at).1)
}

fn floats(out: &mut Vec<(String, Tensor)>, name: &str) -> Vec<f32> {
    match take(out, name).map(|t| t.data) {
        Some(crate::tensor::Data::F32(v)) => v,
        _ => vec![],
    }
}

fn ints(out: &mut Vec<(String, Tensor)>, name: &str) -> Vec<i32> {
    match take(out, name).map(|t| t.data) {
        Some(crate::tensor::Data::I32(v)) => v,
        _ => vec![],
    }
}

impl Session {
    /// Compiles the parts; `params` holds the weights.
    ///
    /// # Errors
    /// A state whose size can't be known.
    pub fn new(g: &SessionGraphs, params: Store, pool: Arc<rayon::ThreadPool>) -> Result<Self, ExecError> {
        let compile = |g: &Graph| Executor::new(lower(&optimise(g, &Options::default())), pool.clone());
        let halves = match (&g.chunks, &g.upper) {
            (Some(c), Some(u)) => Some(Halves { chunks: compile(c), upper: compile(u) }),
            _ => None,
        };
        let mut s = Self {
            lower: compile(&g.lower),
            halves,
            head: compile(&g.head),
            sizes: (g.chunk_size, g.hidden_size, g.kv, g.landmark),
            store: params,
            states: vec![],
            memory: ChunkMemory::default(),
            waiting: vec![],
            position: 0,
        };
        let one = dims(&[("N", 1)]);
        let programs = [Some(&s.lower), s.halves.as_ref().map(|h| &h.upper)];
        let mut states = vec![];
        for slot in programs.into_iter().flatten().flat_map(|e| &e.program().sources) {
            if slot.kind == SourceKind::State {
                states.push((slot.name.clone(), slot.ty.bind(&one)?));
            }
        }
        for (name, ty) in states {
            s.store.insert(name.clone(), Tensor::zeros(&ty));
            s.states.push(name);
        }
        Ok(s)
    }

    /// Tokens fed so far.
    pub fn position(&self) -> usize {
        self.position
    }
    pub fn memory(&self) -> &ChunkMemory {
        &self.memory
    }

    /// Forgets the sequence.
    pub fn reset(&mut self) {
        for name in &self.states {
            if let Some(t) = self.store.0.get_mut(name) {
                *t = Tensor::zeros(&t.ty());
            }
        }
        self.memory.k.clear();
        self.memory.v.clear();
        self.memory.landmarks.clear();
        self.memory.chunks = 0;
        self.waiting.clear();
        self.position = 0;
    }

    /// Feeds the next tokens; returns the last layer's hidden states for them.
    ///
    /// # Errors
    /// An id outside the vocabulary; no memory.
    pub fn feed(&mut self, ids: &[i32]) -> Result<Segment, ExecError> {
        let l = ids.len();
        if l == 0 {
            return Ok(Segment { hidden: vec![], retrieved: Retrieved::default() });
        }
        let (s, d, [h, hd], [lh, lr]) = self.sizes;
        let one = [1.0f32];
        let carry = ("carry", TensorRef::F32(&[1], &one));
        let ids_shape = [1, l];
        let inputs = [("input_ids", TensorRef::I32(&ids_shape, ids)), carry];
        let mut out = self.lower.run(&dims(&[("N", 1), ("L", l)]), &inputs, &mut self.store)?;
        let hidden = floats(&mut out, "hidden");
        let start = [self.position as i32];
        self.position += l;
        let Some(halves) = &mut self.halves else {
            return Ok(Segment { hidden, retrieved: Retrieved::default() });
        };

        self.waiting.extend_from_slice(&hidden);
        let whole = self.waiting.len() / (s * d);
        if whole > 0 {
            let rows = &self.waiting[..whole * s * d];
            let shape = [1, whole * s, d];
            let inputs = [("hidden", TensorRef::F32(&shape, rows))];
            let mut out = halves.chunks.run(&dims(&[("N", 1), ("B", whole)]), &inputs, &mut self.store)?;
            self.memory.k.extend(floats(&mut out, "k"));
            self.memory.v.extend(floats(&mut out, "v"));
            self.memory.landmarks.extend(floats(&mut out, "landmarks"));
            self.memory.chunks += whole;
            self.waiting.drain(..whole * s * d);
        }

        let c = self.memory.chunks;
        let (hidden_shape, kv_shape, lm_shape) = ([1, l, d], [1, c * s, h, hd], [1, c, lh, lr]);
        let inputs = [
            ("hidden", TensorRef::F32(&hidden_shape, &hidden)),
            ("start", TensorRef::I32(&[1], &start)),
            ("k", TensorRef::F32(&kv_shape, &self.memory.k)),
            ("v", TensorRef::F32(&kv_shape, &self.memory.v)),
            ("landmarks", TensorRef::F32(&lm_shape, &self.memory.landmarks)),
            carry,
        ];
        let mut out = halves.upper.run(&dims(&[("N", 1), ("L", l), ("C", c)]), &inputs, &mut self.store)?;
        let retrieved = Retrieved {
            indices: ints(&mut out, "indices"),
            count: ints(&mut out, "count"),
            weights: floats(&mut out, "weights"),
        };
        Ok(Segment { hidden: floats(&mut out, "upper"), retrieved })
    }

    /// Logits `[rows, V]` of hidden states `[rows, D]`.
    ///
    /// # Errors
    /// No memory.
    pub fn logits(&mut self, hidden: &[f32]) -> Result<Vec<f32>, ExecError> {
        let d = self.sizes.1;
        let rows = hidden.len() / d;
        let shape = [1, rows, d];
        let inputs = [("upper", TensorRef::F32(&shape, hidden))];
        let mut out = self.head.run(&dims(&[("N", 1), ("L", rows)]), &inputs, &mut self.store)?;
        Ok(floats(&mut out, "logits"))
    }
}
