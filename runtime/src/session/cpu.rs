//! A session's programs on this machine's cores.

use super::{Segment, Sequence, SessionError, SessionParts};
use crate::chunk_store::{Geometry, Part};
use crate::executor::{ExecError, Executor, Outputs};
use crate::store::Store;
use crate::tensor::{Data, Tensor, TensorRef};
use rambac_codegen::Program;
use rambac_cpu::ChunkRows;
use rambac_ir::Bindings;
use std::ops::Range;
use std::sync::Arc;

/// A part of the model with the sizes and results of its last run, whose memory the next run uses again.
struct Compiled {
    executor: Executor,
    dims: Bindings,
    outputs: Outputs,
}

impl Compiled {
    fn run(
        &mut self,
        dims: &[(&str, usize)],
        inputs: &[(&str, TensorRef)],
        store: &mut Store,
    ) -> Result<(), ExecError> {
        self.dims.assign(dims);
        self.executor.run_into(&self.dims, inputs, store, &mut self.outputs, None)
    }
    /// A result of the last run; empty if the part has none of that name.
    fn floats(&self, name: &str) -> &[f32] {
        self.outputs.iter().find(|(n, _)| n == name).and_then(|(_, t)| t.as_f32()).unwrap_or_default()
    }
    /// As [`floats`](Self::floats).
    fn ints(&self, name: &str) -> &[i32] {
        self.outputs.iter().find(|(n, _)| n == name).and_then(|(_, t)| t.as_i32()).unwrap_or_default()
    }
}

struct Halves {
    chunks: Compiled,
    upper: Compiled,
    flash: Compiled,
}

/// One part of the chunk stores of several sequences, as kernels read it.
struct Pages<'a> {
    sequences: &'a [Sequence],
    part: Part,
}

impl ChunkRows for Pages<'_> {
    fn read(&self, seq: usize, head: usize, first: usize, chunks: usize, out: &mut [f32]) {
        let store = self.sequences[seq].chunks.as_ref().expect("BUG: a model with chunks has a store per sequence");
        store.read(self.part, head, first, chunks, out);
    }
}

/// See the module's comment.
pub(super) struct Cpu {
    lower: Compiled,
    halves: Option<Halves>,
    head: Compiled,
    /// Params, and the scan states of all sequences.
    pub store: Store,
    states: Vec<String>,
    /// Whole states while the programs run on a part of the sequences.
    aside: Vec<Tensor>,
}

impl Cpu {
    pub fn new(g: &SessionParts<Program>, store: Store, pool: &Arc<rayon::ThreadPool>) -> Cpu {
        let compile = |p: &Program| Compiled {
            executor: Executor::new(p.clone(), pool.clone()),
            dims: Bindings::default(),
            outputs: vec![],
        };
        let halves = match (&g.chunks, &g.upper, &g.upper_flash) {
            (Some(c), Some(u), Some(f)) => Some(Halves { chunks: compile(c), upper: compile(u), flash: compile(f) }),
            _ => None,
        };
        Cpu { lower: compile(&g.lower), halves, head: compile(&g.head), store, states: vec![], aside: vec![] }
    }

    /// The compiled parts in the order in which a token meets them.
    pub fn parts(&mut self) -> Vec<&mut Executor> {
        let mut all = vec![&mut self.lower.executor];
        all.extend(self.halves.iter_mut().flat_map(|h| [&mut h.chunks.executor, &mut h.upper.executor]));
        all.push(&mut self.head.executor);
        all
    }

    /// Makes a state of all sequences, or replaces it.
    pub fn set_state(&mut self, name: &str, t: Tensor) {
        if !self.states.iter().any(|s| s == name) {
            self.states.push(name.into());
        }
        self.store.insert(name, t);
    }

    pub fn states(&self) -> Vec<(String, Tensor)> {
        self.states.iter().map(|name| (name.clone(), self.store.0[name].clone())).collect()
    }

    pub fn reset(&mut self) {
        for name in &self.states {
            if let Some(Data::F32(v)) = self.store.0.get_mut(name).map(|t| &mut t.data) {
                v.fill(0.0);
            }
        }
    }

    /// The programs carry the states of whole batches: those of the sequences beside `rows` of `all` step aside.
    pub fn narrow(&mut self, rows: Range<usize>, all: usize) {
        for name in &self.states {
            let whole = self.store.0.remove(name).expect("BUG: states are in the store");
            let (size, mut shape) = (whole.len() / all, whole.shape.clone());
            shape[0] = rows.len();
            let part = whole.as_f32().expect("BUG: states are floats")[rows.start * size..rows.end * size].to_vec();
            self.store.insert(name.clone(), Tensor::f32(&shape, part));
            self.aside.push(whole);
        }
    }

    /// Undoes [`narrow`](Self::narrow).
    pub fn widen(&mut self, rows: Range<usize>, all: usize) {
        for (name, mut whole) in self.states.iter().zip(self.aside.drain(..)) {
            let part = self.store.0.remove(name).expect("BUG: inserted by `narrow`");
            if let (Data::F32(whole), Data::F32(part)) = (&mut whole.data, &part.data) {
                let size = whole.len() / all;
                whole[rows.start * size..rows.end * size].copy_from_slice(part);
            }
            self.store.insert(name.clone(), whole);
        }
    }

    pub fn lower(&mut self, n: usize, ids: &[i32]) -> Result<(), SessionError> {
        let l = ids.len() / n;
        let inputs = [("input_ids", TensorRef::I32(&[n, l], ids))];
        Ok(self.lower.run(&[("N", n), ("L", l)], &inputs, &mut self.store)?)
    }
    /// What [`lower`](Self::lower) made.
    pub fn hidden(&self) -> &[f32] {
        self.lower.floats("hidden")
    }

    /// Memory of `chunks` chunks of hidden rows.
    pub fn chunks(&mut self, chunks: usize, shape: [usize; 3], rows: &[f32]) -> Result<[&[f32]; 3], SessionError> {
        let halves = self.halves.as_mut().expect("BUG: only a model of two halves has chunks");
        let inputs = [("hidden", TensorRef::F32(&shape, rows))];
        halves.chunks.run(&[("N", 1), ("B", chunks)], &inputs, &mut self.store)?;
        Ok(["k", "v", "landmarks"].map(|name| halves.chunks.floats(name)))
    }

    pub fn flash(&mut self, shape: [usize; 3]) -> Result<(), SessionError> {
        let halves = self.halves.as_mut().expect("BUG: only a model of two halves has an upper one");
        let hidden = ("hidden", TensorRef::F32(&shape, self.lower.floats("hidden")));
        Ok(halves.flash.run(&[("N", shape[0]), ("L", shape[1])], &[hidden], &mut self.store)?)
    }

    pub fn upper(
        &mut self,
        shape: [usize; 3],
        chunk_size: usize,
        start: &[i32],
        sequences: &[Sequence],
        out: &mut Segment,
    ) -> Result<(), SessionError> {
        let halves = self.halves.as_mut().expect("BUG: only a model of two halves has an upper one");
        let [n, l, _] = shape;
        let stores = || sequences.iter().filter_map(|x| x.chunks.as_ref());
        let Geometry { heads, dim, landmark_dim, .. } = stores().next().expect("BUG: halves have stores").geometry();
        // A token sees what its position says: any number that is large enough will do, and few of them bind few plans.
        let c = stores().map(|x| x.chunks()).max().unwrap_or(0).next_power_of_two();
        let (kv_shape, lm_shape) = ([n, c * chunk_size, heads, dim], [n, c, heads, landmark_dim]);
        let [k, v, landmarks] = [Part::Keys, Part::Values, Part::Landmarks].map(|part| Pages { sequences, part });
        let by_sequence = [n];
        let inputs = [
            ("hidden", TensorRef::F32(&shape, self.lower.floats("hidden"))),
            ("start", TensorRef::I32(&by_sequence, start)),
            ("k", TensorRef::Paged(&kv_shape, &k)),
            ("v", TensorRef::Paged(&kv_shape, &v)),
            ("landmarks", TensorRef::Paged(&lm_shape, &landmarks)),
        ];
        let done = halves.upper.run(&[("N", n), ("L", l), ("C", c)], &inputs, &mut self.store);
        if let Some(e) = stores().find_map(|x| x.failure()) {
            return Err(e.into());
        }
        done?;
        out.hidden.extend_from_slice(halves.upper.floats("upper"));
        let r = &mut out.retrieved;
        r.indices.extend_from_slice(halves.upper.ints("indices"));
        r.count.extend_from_slice(halves.upper.ints("count"));
        r.weights.extend_from_slice(halves.upper.floats("weights"));
        r.query.extend_from_slice(halves.upper.floats("query"));
        Ok(())
    }

    pub fn head(&mut self, shape: [usize; 3], hidden: &[f32], out: &mut Vec<f32>) -> Result<(), SessionError> {
        let inputs = [("upper", TensorRef::F32(&shape, hidden))];
        self.head.run(&[("N", 1), ("L", shape[1])], &inputs, &mut self.store)?;
        out.clear();
        out.extend_from_slice(self.head.floats("logits"));
        Ok(())
    }
}
