//! Inference over sequences, segment by segment and token by token, from one set of compiled programs.
//!
//! The stack is cut at the chunking layer: `lower` runs a segment, whole chunks of its hidden states become memory
//! (`chunks`), `upper` runs the segment over the memory so far.  Rows of an unfinished chunk wait.  Any split of a text
//! into segments gives the hidden states of the whole (to rounding, and to that of the store's precision); no program
//! is compiled again as the context grows, for the memory is read in pages and its length is no program's shape.
//!
//! Several sequences of different lengths are prefilled one by one and then decoded together.

use crate::checkpoint::{TensorFile, TensorRef as Saved, write_safetensors};
use crate::chunk_store::{ChunkStore, Geometry, Part, Precision, StoreError};
use crate::executor::{ExecError, Executor, Outputs};
use crate::store::Store;
use crate::tensor::{Data, Tensor, TensorRef};
use rambac_codegen::program::SourceSlot;
use rambac_codegen::{Program, lower};
use rambac_cpu::ChunkRows;
use rambac_ir::ops::SourceKind;
use rambac_ir::{Bindings, DType, Graph};
use rambac_passes::{Options, optimise};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The parts of a model, and the sizes that the session itself must know.
pub struct SessionParts<T> {
    /// `input_ids` → `hidden`.
    pub lower: T,
    /// `hidden` → `k`, `v`, `landmarks`; `None` for a plain Mamba-2.
    pub chunks: Option<T>,
    /// `hidden`, `start`, `k`, `v`, `landmarks` → `upper`.
    pub upper: Option<T>,
    /// `hidden` → `upper`, without retrieval and attention.
    pub upper_flash: Option<T>,
    /// `upper` → `logits`.
    pub head: T,
    pub chunk_size: usize,
    pub hidden_size: usize,
    /// `[heads, dim]` of keys and values, and of landmarks.
    pub kv: [usize; 2],
    pub landmark: [usize; 2],
}

/// Parts that are not compiled yet.
pub type SessionGraphs = SessionParts<Graph>;

impl<T> SessionParts<T> {
    /// The same with every part changed.
    pub fn map<U>(&self, mut f: impl FnMut(&T) -> U) -> SessionParts<U> {
        SessionParts {
            lower: f(&self.lower),
            chunks: self.chunks.as_ref().map(&mut f),
            upper: self.upper.as_ref().map(&mut f),
            upper_flash: self.upper_flash.as_ref().map(&mut f),
            head: f(&self.head),
            chunk_size: self.chunk_size,
            hidden_size: self.hidden_size,
            kv: self.kv,
            landmark: self.landmark,
        }
    }
    /// The parts that there are, with their names.
    pub fn named(&self) -> Vec<(&'static str, &T)> {
        let all = [
            ("lower", Some(&self.lower)),
            ("chunks", self.chunks.as_ref()),
            ("upper", self.upper.as_ref()),
            ("upper_flash", self.upper_flash.as_ref()),
            ("head", Some(&self.head)),
        ];
        all.into_iter().filter_map(|(name, part)| Some((name, part?))).collect()
    }
}

/// Where a session keeps its chunks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Tier {
    #[default]
    Ram,
    /// A new file.
    File(PathBuf),
    /// A file that [`Session::save`] left, with the sequence it belongs to.
    Resume(PathBuf),
}

/// What a session is to be.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Sequences decoded together.
    pub sequences: usize,
    pub precision: Precision,
    pub tier: Tier,
    /// How the parts are compiled.  Weights that this wants in bf16 are rounded if they are not.
    pub passes: Options,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self { sequences: 1, precision: Precision::Bf16, tier: Tier::Ram, passes: Options::default() }
    }
}

/// Why a session can't go on.  After an error of a run the sequence is spoilt: [`Session::reset`] it, or resume from
/// what was saved.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Exec(#[from] ExecError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("a chunk store in a file holds one sequence, not {0}; give one prompt, or keep the chunks in memory")]
    OneSequence(usize),
    #[error("this model has no chunks to store in {}: it is a plain Mamba-2", .0.display())]
    NoChunks(PathBuf),
    #[error("a sequence of more than {} tokens cannot be counted", i32::MAX)]
    TooLong,
}

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

/// What a sequence carries besides its scan states.
struct Sequence {
    chunks: Option<ChunkStore>,
    /// Hidden rows of the unfinished chunk.
    waiting: Vec<f32>,
    position: usize,
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
pub struct Session {
    lower: Compiled,
    halves: Option<Halves>,
    head: Compiled,
    chunk_size: usize,
    hidden_size: usize,
    /// Params, and the scan states of all sequences.
    store: Store,
    states: Vec<String>,
    sequences: Vec<Sequence>,
    /// Positions of the sequences that run.
    start: Vec<i32>,
    pool: Arc<rayon::ThreadPool>,
}

/// What a run of the upper half tells of its last retrieval, for `rows` tokens in order.
#[derive(Clone, Debug, Default)]
pub struct Retrieved {
    /// `[rows, h, K]`
    pub indices: Vec<i32>,
    /// `[rows, h]`
    pub count: Vec<i32>,
    /// `[rows, h, K]`
    pub weights: Vec<f32>,
    /// `[rows, h, r]`
    pub query: Vec<f32>,
}

/// The upper half's output for a segment, `[rows, D]`, and its retrieval where the graph gives it.
#[derive(Clone, Debug, Default)]
pub struct Segment {
    pub hidden: Vec<f32>,
    pub retrieved: Retrieved,
}

impl Segment {
    /// Without rows, the memory kept.
    fn clear(&mut self) {
        let Self { hidden, retrieved: Retrieved { indices, count, weights, query } } = self;
        hidden.clear();
        indices.clear();
        count.clear();
        weights.clear();
        query.clear();
    }
}

impl Session {
    /// Compiles the parts; `params` holds the weights.
    ///
    /// # Errors
    /// A state whose size can't be known; a file that can't be made or resumed.
    pub fn new(
        g: &SessionGraphs,
        params: Store,
        pool: Arc<rayon::ThreadPool>,
        options: &SessionOptions,
    ) -> Result<Self, SessionError> {
        Self::compiled(&g.map(|g| lower(&optimise(g, &options.passes))), params, pool, options)
    }

    /// As [`new`](Self::new), of parts that are compiled already.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn compiled(
        g: &SessionParts<Program>,
        params: Store,
        pool: Arc<rayon::ThreadPool>,
        options: &SessionOptions,
    ) -> Result<Self, SessionError> {
        let compile = |p: &Program| Compiled {
            executor: Executor::new(p.clone(), pool.clone()),
            dims: Bindings::default(),
            outputs: vec![],
        };
        let halves = match (&g.chunks, &g.upper, &g.upper_flash) {
            (Some(c), Some(u), Some(f)) => Some(Halves { chunks: compile(c), upper: compile(u), flash: compile(f) }),
            _ => None,
        };
        let n = options.sequences.max(1);
        let geometry = Geometry {
            heads: g.kv[0],
            chunk: g.chunk_size,
            dim: g.kv[1],
            landmark_dim: g.landmark[1],
            precision: options.precision,
        };
        match &options.tier {
            Tier::File(_) | Tier::Resume(_) if n > 1 => return Err(SessionError::OneSequence(n)),
            Tier::File(path) | Tier::Resume(path) if halves.is_none() => {
                return Err(SessionError::NoChunks(path.clone()));
            }
            _ => {}
        }
        let mut s = Self {
            lower: compile(&g.lower),
            halves,
            head: compile(&g.head),
            chunk_size: g.chunk_size,
            hidden_size: g.hidden_size,
            store: params,
            states: vec![],
            sequences: vec![],
            start: vec![],
            pool: pool.clone(),
        };
        let all = Bindings::new([("N", n)]);
        let programs = [Some(&s.lower), s.halves.as_ref().map(|h| &h.upper)];
        let mut states = vec![];
        for slot in programs.into_iter().flatten().flat_map(|e| &e.executor.program().sources) {
            if slot.kind == SourceKind::State {
                states.push((slot.name.clone(), slot.ty.bind(&all).map_err(ExecError::from)?));
            }
        }
        let sources: Vec<SourceSlot> = s.parts().iter().flat_map(|p| p.program().sources.clone()).collect();
        for slot in sources.iter().filter(|s| s.kind == SourceKind::Param && s.ty.dtype == DType::BF16) {
            if let Some(t) = s.store.0.get_mut(&slot.name) {
                t.narrow();
            }
        }
        let fingerprint = if options.tier == Tier::Ram { 0 } else { fingerprint(&s.store, &[]) };
        for (name, ty) in states {
            s.store.insert(name.clone(), Tensor::zeros(&ty));
            s.states.push(name);
        }
        // Every token reads all of it.
        s.store.prefer_huge_pages();
        if let Tier::Resume(path) = &options.tier {
            s.resume(path, geometry, fingerprint)?;
            return Ok(s);
        }
        for _ in 0..n {
            let chunks = match &options.tier {
                _ if s.halves.is_none() => None,
                Tier::File(path) => Some(ChunkStore::create(path, geometry)?),
                _ => Some(ChunkStore::ram(geometry)),
            };
            s.sequences.push(Sequence { chunks, waiting: vec![], position: 0 });
        }
        Ok(s)
    }

    /// Tokens fed so far to sequence `seq`.
    pub fn position(&self, seq: usize) -> usize {
        self.sequences[seq].position
    }
    /// The chunks of sequence `seq`; `None` for a plain Mamba-2.
    pub fn chunks(&self, seq: usize) -> Option<&ChunkStore> {
        self.sequences[seq].chunks.as_ref()
    }
    /// The threads it runs on: who feeds token after token keeps them [awake](rambac_cpu::team::awake) meanwhile.
    pub fn pool(&self) -> &Arc<rayon::ThreadPool> {
        &self.pool
    }
    /// Weights and carried states.
    pub fn store(&self) -> &Store {
        &self.store
    }
    /// The compiled parts in the order in which a token meets them: `lower`, `chunks` and `upper` where there are any, `head`.
    pub fn parts(&mut self) -> Vec<&mut Executor> {
        let mut all = vec![&mut self.lower.executor];
        all.extend(self.halves.iter_mut().flat_map(|h| [&mut h.chunks.executor, &mut h.upper.executor]));
        all.push(&mut self.head.executor);
        all
    }

    /// Forgets all sequences.
    ///
    /// # Errors
    /// A store's file that can't be shortened.
    pub fn reset(&mut self) -> Result<(), SessionError> {
        for name in &self.states {
            if let Some(Data::F32(v)) = self.store.0.get_mut(name).map(|t| &mut t.data) {
                v.fill(0.0);
            }
        }
        for s in &mut self.sequences {
            if let Some(c) = &mut s.chunks {
                c.clear()?;
            }
            s.waiting.clear();
            s.position = 0;
        }
        Ok(())
    }

    /// Feeds the next tokens of sequence `seq`; returns the last layer's hidden states for them.
    ///
    /// # Errors
    /// An id outside the vocabulary; no memory; a store that can't be written or read.
    pub fn feed(&mut self, seq: usize, ids: &[i32]) -> Result<Segment, SessionError> {
        let mut out = Segment::default();
        self.run_some(seq..seq + 1, ids, false, &mut out)?;
        Ok(out)
    }

    /// Feeds tokens whose output nobody wants, without retrieval and attention ("flash inference"): the memory becomes
    /// the same, but the upper half's scan states have seen no attention.
    ///
    /// # Errors
    /// As [`feed`](Self::feed).
    pub fn skim(&mut self, seq: usize, ids: &[i32]) -> Result<(), SessionError> {
        self.run_some(seq..seq + 1, ids, true, &mut Segment::default())
    }

    /// Feeds one token to every sequence; the hidden states are `[sequences, D]`.
    ///
    /// # Errors
    /// As [`feed`](Self::feed).
    pub fn step(&mut self, ids: &[i32]) -> Result<Segment, SessionError> {
        let mut out = Segment::default();
        self.step_into(ids, &mut out)?;
        Ok(out)
    }

    /// As [`step`](Self::step), into the segment of a step before: nothing is allocated after the first ones, but where a
    /// chunk becomes whole.
    ///
    /// # Errors
    /// As [`feed`](Self::feed).
    pub fn step_into(&mut self, ids: &[i32], out: &mut Segment) -> Result<(), SessionError> {
        assert_eq!(ids.len(), self.sequences.len(), "BUG: one token per sequence");
        self.run_some(0..ids.len(), ids, false, out)
    }

    /// As many tokens of each of `seqs`.
    fn run_some(
        &mut self,
        seqs: Range<usize>,
        ids: &[i32],
        flash: bool,
        out: &mut Segment,
    ) -> Result<(), SessionError> {
        out.clear();
        if ids.is_empty() {
            return Ok(());
        }
        if seqs.len() == self.sequences.len() {
            return self.run(seqs, ids, flash, out);
        }
        // The programs carry the states of whole batches: those of the others step aside.
        let (all, rows) = (self.sequences.len(), seqs.clone());
        let mut aside = vec![];
        for name in &self.states {
            let whole = self.store.0.remove(name).expect("BUG: states are in the store");
            let (size, mut shape) = (whole.len() / all, whole.shape.clone());
            shape[0] = rows.len();
            let part = whole.as_f32().expect("BUG: states are floats")[rows.start * size..rows.end * size].to_vec();
            self.store.insert(name.clone(), Tensor::f32(&shape, part));
            aside.push(whole);
        }
        let result = self.run(seqs, ids, flash, out);
        for (name, mut whole) in self.states.iter().zip(aside) {
            let part = self.store.0.remove(name).expect("BUG: inserted above");
            if let (Data::F32(whole), Data::F32(part)) = (&mut whole.data, &part.data) {
                let size = whole.len() / all;
                whole[rows.start * size..rows.end * size].copy_from_slice(part);
            }
            self.store.insert(name.clone(), whole);
        }
        result
    }

    fn run(&mut self, seqs: Range<usize>, ids: &[i32], flash: bool, out: &mut Segment) -> Result<(), SessionError> {
        let (n, s, d) = (seqs.len(), self.chunk_size, self.hidden_size);
        let l = ids.len() / n;
        let by_sequence = [n];
        let ids_shape = [n, l];
        let sequences = &mut self.sequences[seqs];
        self.start.clear();
        self.start.extend(sequences.iter().map(|x| x.position as i32));
        for x in sequences.iter_mut() {
            x.position += l;
            i32::try_from(x.position).map_err(|_| SessionError::TooLong)?;
        }
        let inputs = [("input_ids", TensorRef::I32(&ids_shape, ids))];
        self.lower.run(&[("N", n), ("L", l)], &inputs, &mut self.store)?;
        let hidden = self.lower.floats("hidden");
        let Some(halves) = &mut self.halves else {
            out.hidden.extend_from_slice(hidden);
            return Ok(());
        };

        for (x, rows) in sequences.iter_mut().zip(hidden.chunks_exact(l * d)) {
            x.waiting.extend_from_slice(rows);
            let whole = x.waiting.len() / (s * d);
            let (Some(chunks), true) = (&mut x.chunks, whole > 0) else { continue };
            let shape = [1, whole * s, d];
            let inputs = [("hidden", TensorRef::F32(&shape, &x.waiting[..whole * s * d]))];
            halves.chunks.run(&[("N", 1), ("B", whole)], &inputs, &mut self.store)?;
            let [k, v, landmarks] = ["k", "v", "landmarks"].map(|name| halves.chunks.floats(name));
            chunks.append(k, v, landmarks)?;
            x.waiting.drain(..whole * s * d);
        }

        let hidden_shape = [n, l, d];
        let hidden = ("hidden", TensorRef::F32(&hidden_shape, hidden));
        if flash {
            halves.flash.run(&[("N", n), ("L", l)], &[hidden], &mut self.store)?;
            return Ok(());
        }
        let sequences = &*sequences;
        let stores = || sequences.iter().filter_map(|x| x.chunks.as_ref());
        let Geometry { heads, dim, landmark_dim, .. } = stores().next().expect("BUG: halves have stores").geometry();
        // A token sees what its position says: any number that is large enough will do, and few of them bind few plans.
        let c = stores().map(|x| x.chunks()).max().unwrap_or(0).next_power_of_two();
        let (kv_shape, lm_shape) = ([n, c * s, heads, dim], [n, c, heads, landmark_dim]);
        let [k, v, landmarks] = [Part::Keys, Part::Values, Part::Landmarks].map(|part| Pages { sequences, part });
        let inputs = [
            hidden,
            ("start", TensorRef::I32(&by_sequence, &self.start)),
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

    /// Logits `[rows, V]` of hidden states `[rows, D]`.
    ///
    /// # Errors
    /// No memory.
    pub fn logits(&mut self, hidden: &[f32]) -> Result<Vec<f32>, SessionError> {
        let mut out = vec![];
        self.logits_into(hidden, &mut out)?;
        Ok(out)
    }

    /// As [`logits`](Self::logits), into the memory of a call before.
    ///
    /// # Errors
    /// As [`logits`](Self::logits).
    pub fn logits_into(&mut self, hidden: &[f32], out: &mut Vec<f32>) -> Result<(), SessionError> {
        let d = self.hidden_size;
        let rows = hidden.len() / d;
        let shape = [1, rows, d];
        let inputs = [("upper", TensorRef::F32(&shape, hidden))];
        self.head.run(&[("N", 1), ("L", rows)], &inputs, &mut self.store)?;
        out.clear();
        out.extend_from_slice(self.head.floats("logits"));
        Ok(())
    }

    /// How many stored chunks score better than `chunk` for a query `[h, r]` of [`Retrieved`], per head: chunks with a
    /// rank below K are chosen.
    pub fn rank(&self, seq: usize, query: &[f32], chunk: usize) -> Vec<usize> {
        const MANY: usize = 4096;
        let Some(chunks) = self.chunks(seq).filter(|c| chunk < c.chunks()) else { return vec![] };
        let r = chunks.geometry().landmark_dim;
        let mut lines = vec![0.0; MANY * r];
        let dot = |q: &[f32], x: &[f32]| q.iter().zip(x).map(|(a, b)| a * b).sum::<f32>();
        let mut ranks = vec![];
        for (head, q) in query.chunks_exact(r).enumerate() {
            chunks.read(Part::Landmarks, head, chunk, 1, &mut lines);
            let own = dot(q, &lines[..r]);
            let mut better = 0;
            for first in (0..chunks.chunks()).step_by(MANY) {
                let n = MANY.min(chunks.chunks() - first);
                chunks.read(Part::Landmarks, head, first, n, &mut lines);
                better += lines[..n * r].chunks_exact(r).filter(|x| dot(q, x) > own).count();
            }
            ranks.push(better);
        }
        ranks
    }

    /// Writes what a sequence in a file needs to go on later beside its file; whole or not at all.
    ///
    /// # Errors
    /// A full disk, or what else the system refuses.
    pub fn save(&mut self) -> Result<(), SessionError> {
        let x = &self.sequences[0];
        let Some((chunks, path)) = x.chunks.as_ref().and_then(|c| Some((c, c.path()?))) else { return Ok(()) };
        // The state speaks of chunks: they must be there first.
        chunks.flush()?;
        let shape = [x.waiting.len() / self.hidden_size, self.hidden_size];
        let mut tensors = vec![Saved::f32("waiting", &shape, &x.waiting)];
        for name in &self.states {
            let t = &self.store.0[name];
            tensors.push(Saved::f32(name.as_str(), &t.shape, t.as_f32().expect("BUG: states are floats")));
        }
        let about = [
            ("position", x.position.to_string()),
            ("chunks", chunks.chunks().to_string()),
            ("weights", fingerprint(&self.store, &self.states).to_string()),
        ];
        let about: Vec<(&str, &str)> = about.iter().map(|(k, v)| (*k, v.as_str())).collect();
        let (target, new) = (state_path(path), state_path(path).with_extension("state.new"));
        write_safetensors(&new, &tensors, &about).map_err(StoreError::from)?;
        std::fs::rename(&new, &target)
            .map_err(|source| StoreError::Io { path: target.clone(), action: "put the new state here", source }.into())
    }

    fn resume(&mut self, path: &Path, geometry: Geometry, weights: u64) -> Result<(), SessionError> {
        let state = state_path(path);
        let file = TensorFile::open(&state).map_err(StoreError::from)?;
        let wrong = |reason: &str| StoreError::State { path: state.clone(), reason: reason.into() };
        let number = |key: &str| -> Result<u64, StoreError> {
            let value = file.metadata().get(key).and_then(|v| v.parse().ok());
            value.ok_or_else(|| wrong("it does not say where the sequence stands: it is no state of a chunk store"))
        };
        if number("weights")? != weights {
            return Err(StoreError::Weights { path: path.into() }.into());
        }
        let (position, stored) = (number("position")? as usize, number("chunks")? as usize);
        for name in &self.states {
            let (shape, data) = file.get_f32(name).map_err(StoreError::from)?;
            if shape != self.store.0[name].shape {
                return Err(wrong("a state of another shape: it was made by another model").into());
            }
            self.store.insert(name.clone(), Tensor::f32(&shape, data));
        }
        let (_, waiting) = file.get_f32("waiting").map_err(StoreError::from)?;
        let rows = position.checked_sub(stored.saturating_mul(self.chunk_size));
        if rows.is_none_or(|r| r >= self.chunk_size || r * self.hidden_size != waiting.len()) {
            return Err(wrong("its position and its chunks contradict each other").into());
        }
        let chunks = Some(ChunkStore::open(path, geometry, stored)?);
        self.sequences.push(Sequence { chunks, waiting, position });
        Ok(())
    }
}

/// The file beside a store's that holds the rest of its sequence.
fn state_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".state");
    name.into()
}

/// A number that other weights would hardly have: FNV-1a over names and bits of all that is no state.
fn fingerprint(store: &Store, states: &[String]) -> u64 {
    let mut h = 0xcbf2_9ce4_8422_2325u64;
    let mut mix = |x: u64| h = (h ^ x).wrapping_mul(0x0100_0000_01b3);
    for (name, t) in store.0.iter().filter(|(name, _)| !states.contains(name)) {
        name.bytes().for_each(|b| mix(b.into()));
        match &t.data {
            Data::F32(v) => v.iter().for_each(|x| mix(x.to_bits().into())),
            Data::Bf16(v) => v.iter().for_each(|x| mix(x.to_bits().into())),
            Data::I32(_) | Data::Bool(_) => panic!("BUG: {name} is no weight"),
        }
    }
    h
}
