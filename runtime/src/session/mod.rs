//! Inference over sequences, segment by segment and token by token, from one set of compiled programs.
//!
//! The stack is cut at the chunking layer: `lower` runs a segment, whole chunks of its hidden states become memory
//! (`chunks`), `upper` runs the segment over the memory so far.  Rows of an unfinished chunk wait.  Any split of a text
//! into segments gives the hidden states of the whole (to rounding, and to that of the store's precision); no program
//! is compiled again as the context grows, for the memory is read in pages and its length is no program's shape.
//!
//! Several sequences of different lengths are prefilled one by one and then decoded together.
//!
//! `cpu.rs` runs the programs on this machine's cores, `device.rs` on a GPU or the simulator, with `pools.rs` and `slots.rs` for
//! the chunks that are there; `saved.rs` puts a sequence by.

mod cpu;
mod device;
mod parts;
mod pools;
mod saved;
mod slots;

pub use device::{DeviceMemory, Residency};
pub use parts::{SessionGraphs, SessionParts};

use crate::chunk_store::{ChunkStore, Geometry, Part, Precision, StoreError};
use crate::executor::{ExecError, Executor};
use crate::gpu::{GpuError, Machine, ProgramId};
use crate::store::Store;
use crate::tensor::Tensor;
use cpu::Cpu;
use device::{OnDevice, Wanted};
use rambac_codegen::cuda::pages::{CHUNK_TABLE, LANDMARK_TABLE, LANDMARK_WINDOW};
use rambac_codegen::cuda::{PagesError, paged};
use rambac_codegen::program::SourceSlot;
use rambac_codegen::{Kernels, Program, lower, lower_for};
use rambac_ir::ops::{Op, SourceKind};
use rambac_ir::{Bindings, DType, Graph};
use rambac_passes::{Options, optimise};
use saved::fingerprint;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where a session keeps its chunks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Tier {
    #[default]
    Ram,
    /// A new file, which goes with the session unless that was [saved](Session::save).
    File(PathBuf),
    /// A new file that nobody goes on with: it has no name, and goes even with a process that is killed.
    Scratch(PathBuf),
    /// A file that [`Session::save`] left, with the sequence it belongs to.
    Resume(PathBuf),
}

impl Tier {
    /// The file, if it is one.
    fn path(&self) -> Option<&Path> {
        match self {
            Tier::Ram => None,
            Tier::File(path) | Tier::Scratch(path) | Tier::Resume(path) => Some(path),
        }
    }
    /// A number of the weights, where a later session must have the same.
    fn fingerprint(&self, params: &Store) -> u64 {
        if matches!(self, Tier::File(_) | Tier::Resume(_)) { fingerprint(params) } else { 0 }
    }
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
    #[error("{}: this model keeps no chunks that could be stored; leave --store out", .0.display())]
    NoChunks(PathBuf),
    #[error("a sequence of more than {} tokens cannot be counted", i32::MAX)]
    TooLong,
    #[error("there is room for {room} tokens of a text, and {need} are wanted")]
    Full { room: usize, need: usize },
    #[error(transparent)]
    Gpu(#[from] GpuError),
    #[error(
        "{} of device memory are too few, {} are needed: {parts}; give more with --device-memory, or feed shorter segments",
        exact(*have), exact(*need)
    )]
    DeviceMemory {
        have: usize,
        need: usize,
        /// Of what it is the sum.
        parts: String,
    },
}

fn size(bytes: usize) -> String {
    match bytes as f64 {
        b if b < 1024.0 => format!("{bytes} B"),
        b if b < 1048576.0 => format!("{:.1} KiB", b / 1024.0),
        b => format!("{:.1} MiB", b / 1048576.0),
    }
}

/// As it was given, so that two that differ by little are told apart.
fn exact(bytes: usize) -> String {
    format!("{bytes} bytes ({})", size(bytes))
}

/// What a sequence carries besides its scan states.
struct Sequence {
    chunks: Option<ChunkStore>,
    /// Hidden rows of the unfinished chunk.
    waiting: Vec<f32>,
    position: usize,
}

/// See the module's comment.
pub struct Session {
    engine: Engine,
    chunk_size: usize,
    hidden_size: usize,
    /// Of the weights.
    fingerprint: u64,
    /// Tokens of a text that its parts can keep.
    room: Option<usize>,
    sequences: Vec<Sequence>,
    /// Positions of the sequences that run.
    start: Vec<i32>,
    pool: Arc<rayon::ThreadPool>,
    /// Of a step whose logits alone are wanted.
    segment: Segment,
}

/// What is asked of a run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Every token's hidden states and choices.
    All,
    /// At least the last one's hidden states.
    Last,
    /// The memory alone, without retrieval and attention.
    Flash,
}

/// Where the programs run.
enum Engine {
    Cpu(Box<Cpu>),
    Device(Box<OnDevice>),
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
        let mut params = params;
        let n = options.sequences.max(1);
        let (geometry, halves) = (g.geometry(options.precision), g.upper.is_some());
        refuse(options, n, halves)?;
        let sources = || g.named().into_iter().flat_map(|(_, p)| &p.sources);
        let states = states(sources(), n)?;
        for slot in sources().filter(|s| s.kind == SourceKind::Param && s.ty.dtype == DType::BF16) {
            if let Some(t) = params.0.get_mut(&slot.name) {
                t.narrow();
            }
        }
        let fingerprint = options.tier.fingerprint(&params);
        let mut cpu = Cpu::new(g, params, &pool);
        for (name, t) in states {
            cpu.set_state(&name, t);
        }
        // Every token reads all of it.
        cpu.store.prefer_huge_pages();
        let mut s = Self {
            engine: Engine::Cpu(Box::new(cpu)),
            chunk_size: g.chunk_size,
            hidden_size: g.hidden_size,
            fingerprint,
            room: room(g.named().into_iter().map(|(_, p)| p)),
            sequences: vec![],
            start: vec![],
            pool,
            segment: Segment::default(),
        };
        s.open(options, n, geometry, halves)?;
        Ok(s)
    }

    /// Parts that have been through the passes as programs for a device, to be compiled there for [`on_device`](Self::on_device): the
    /// memory of the upper half lies in pages of the options' precision.
    pub fn device_programs(graphs: &SessionParts<Graph>, precision: Precision) -> SessionParts<Program> {
        let stored = match precision {
            Precision::Bf16 => DType::BF16,
            Precision::F32 => DType::F32,
        };
        let mut parts = graphs.map(|g| lower_for(g, Kernels::Gpu));
        let upper = graphs.upper.as_ref();
        parts.upper = upper.map(|g| upper_half(g, stored).expect("BUG: an upper half reads its memory by chunks"));
        parts
    }

    /// A session of programs that are loaded on a machine, see [`device_programs`](Self::device_programs).
    ///
    /// # Errors
    /// As [`new`](Self::new); too little memory on the device.
    pub fn on_device(
        machine: Machine,
        g: SessionParts<ProgramId>,
        mut params: Store,
        pool: Arc<rayon::ThreadPool>,
        options: &SessionOptions,
        memory: DeviceMemory,
    ) -> Result<Self, SessionError> {
        let n = options.sequences.max(1);
        let (geometry, halves) = (g.geometry(options.precision), g.upper.is_some());
        refuse(options, n, halves)?;
        device::narrow_params(&machine, &g, &mut params);
        let of_chunks = |name: &str| PAGED.contains(&name) || TABLES.contains(&name);
        let programs: Vec<_> = g.named().into_iter().map(|(_, &id)| machine.program(id).clone()).collect();
        let sources = programs.iter().flat_map(|p| &p.program.sources).filter(|s| !of_chunks(&s.name));
        let states = states(sources, n)?;
        let fingerprint = options.tier.fingerprint(&params);
        let room = room(programs.iter().map(|p| &*p.program));
        let (chunk_size, hidden_size) = (g.chunk_size, g.hidden_size);
        let on = OnDevice::new(machine, g, &params, &states, n, geometry, memory)?;
        let mut s = Self {
            engine: Engine::Device(Box::new(on)),
            chunk_size,
            hidden_size,
            fingerprint,
            room,
            sequences: vec![],
            start: vec![],
            pool,
            segment: Segment::default(),
        };
        s.open(options, n, geometry, halves)?;
        Ok(s)
    }

    /// Makes or takes up the sequences.
    fn open(
        &mut self,
        options: &SessionOptions,
        n: usize,
        geometry: Geometry,
        halves: bool,
    ) -> Result<(), SessionError> {
        if let Tier::Resume(path) = &options.tier {
            self.resume(path, geometry)?;
            return self.appended(0);
        }
        for _ in 0..n {
            let chunks = match &options.tier {
                _ if !halves => None,
                Tier::File(path) => Some(ChunkStore::create(path, geometry)?),
                Tier::Scratch(path) => Some(ChunkStore::scratch(path, geometry)?),
                _ => Some(ChunkStore::ram(geometry)),
            };
            self.sequences.push(Sequence { chunks, waiting: vec![], position: 0 });
        }
        Ok(())
    }

    fn appended(&mut self, seq: usize) -> Result<(), SessionError> {
        match &mut self.engine {
            Engine::Cpu(_) => Ok(()),
            Engine::Device(d) => d.appended(seq, &self.sequences),
        }
    }

    /// Tokens fed so far to sequence `seq`.
    pub fn position(&self, seq: usize) -> usize {
        self.sequences[seq].position
    }
    /// The chunks of sequence `seq`; `None` for a plain Mamba-2.
    pub fn chunks(&self, seq: usize) -> Option<&ChunkStore> {
        self.sequences[seq].chunks.as_ref()
    }
    /// Tokens of a text, prompt and answer together, that there is room for: attention variants keep a memory of one size.
    ///
    /// # Errors
    /// [`SessionError::Full`]: `tokens` are more.
    pub fn fits(&self, tokens: usize) -> Result<(), SessionError> {
        match self.room {
            Some(room) if tokens > room => Err(SessionError::Full { room, need: tokens }),
            _ => Ok(()),
        }
    }
    /// Bytes of weights and carried states on this machine; 0 where a device has them.
    pub fn bytes(&self) -> usize {
        match &self.engine {
            Engine::Cpu(c) => c.store.bytes(),
            Engine::Device(_) => 0,
        }
    }
    /// The threads it runs on: who feeds token after token keeps them [awake](rambac_cpu::team::awake) meanwhile.
    pub fn pool(&self) -> &Arc<rayon::ThreadPool> {
        &self.pool
    }
    /// What became of the chunks on a device; `None` on this machine's cores, and for a plain Mamba-2.
    pub fn residency(&self) -> Option<Residency> {
        match &self.engine {
            Engine::Cpu(_) => None,
            Engine::Device(d) => d.residency(),
        }
    }
    /// The device, and the parts that are loaded there.
    pub fn device(&mut self) -> Option<(&mut Machine, SessionParts<ProgramId>)> {
        match &mut self.engine {
            Engine::Cpu(_) => None,
            Engine::Device(d) => {
                let parts = d.parts().map(|p| *p);
                Some((d.machine(), parts))
            }
        }
    }
    /// The compiled parts in the order in which a token meets them: `lower`, `chunks` and `upper` where there are any, `head`;
    /// none of a device.
    pub fn parts(&mut self) -> Vec<&mut Executor> {
        match &mut self.engine {
            Engine::Cpu(c) => c.parts(),
            Engine::Device(_) => vec![],
        }
    }

    /// Forgets all sequences.
    ///
    /// # Errors
    /// A store's file that can't be shortened.
    pub fn reset(&mut self) -> Result<(), SessionError> {
        match &mut self.engine {
            Engine::Cpu(c) => c.reset(),
            Engine::Device(d) => d.reset()?,
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
        self.run_some(seq..seq + 1, ids, Mode::All, &mut out)?;
        Ok(out)
    }

    /// As [`feed`](Self::feed), of a text whose last token alone is asked for: its hidden states.  On a device the others stay there.
    ///
    /// # Errors
    /// As [`feed`](Self::feed).
    pub fn read(&mut self, seq: usize, ids: &[i32]) -> Result<Vec<f32>, SessionError> {
        let mut out = Segment::default();
        self.run_some(seq..seq + 1, ids, Mode::Last, &mut out)?;
        let before = out.hidden.len().saturating_sub(self.hidden_size);
        out.hidden.drain(..before);
        Ok(out.hidden)
    }

    /// Feeds tokens whose output nobody wants, without retrieval and attention ("flash inference"): the memory becomes
    /// the same, but the upper half's scan states have seen no attention.
    ///
    /// # Errors
    /// As [`feed`](Self::feed).
    pub fn skim(&mut self, seq: usize, ids: &[i32]) -> Result<(), SessionError> {
        self.run_some(seq..seq + 1, ids, Mode::Flash, &mut Segment::default())
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
        self.run_some(0..ids.len(), ids, Mode::All, out)
    }

    /// Feeds one token to every sequence; the logits `[sequences, V]` of the next ones.  On a device that holds every chunk this
    /// is one record of the device, started at once.
    ///
    /// # Errors
    /// As [`feed`](Self::feed).
    pub fn decode_into(&mut self, ids: &[i32], logits: &mut Vec<f32>) -> Result<(), SessionError> {
        assert_eq!(ids.len(), self.sequences.len(), "BUG: one token per sequence");
        if matches!(&self.engine, Engine::Device(d) if d.whole()) {
            return self.token(ids, Wanted::Logits(logits));
        }
        let mut segment = std::mem::take(&mut self.segment);
        let done = self.step_into(ids, &mut segment).and_then(|()| self.logits_into(&segment.hidden, logits));
        self.segment = segment;
        done
    }

    /// One token of every sequence on a device that holds every chunk.
    fn token(&mut self, ids: &[i32], wanted: Wanted) -> Result<(), SessionError> {
        let seqs = 0..self.sequences.len();
        self.advance(seqs.clone(), 1)?;
        let Engine::Device(d) = &mut self.engine else { unreachable!("BUG: callers look where it runs") };
        d.token(ids, &self.start, wanted)?;
        // A chunk that it completes is not visible to it.
        self.complete(seqs, 1)
    }

    /// Where sequences stand, and that they go on by `l` tokens.
    fn advance(&mut self, seqs: Range<usize>, l: usize) -> Result<(), SessionError> {
        self.start.clear();
        self.start.extend(self.sequences[seqs.clone()].iter().map(|x| x.position as i32));
        let furthest = self.sequences[seqs.clone()].iter().map(|x| x.position).max().unwrap_or(0);
        self.fits(furthest.saturating_add(l))?;
        for x in &mut self.sequences[seqs] {
            x.position += l;
            i32::try_from(x.position).map_err(|_| SessionError::TooLong)?;
        }
        Ok(())
    }

    /// The lower half's rows of `l` tokens of each sequence wait until a chunk is whole, which then becomes memory.
    fn complete(&mut self, seqs: Range<usize>, l: usize) -> Result<(), SessionError> {
        if self.sequences.iter().all(|x| x.chunks.is_none()) {
            return Ok(());
        }
        let (s, d) = (self.chunk_size, self.hidden_size);
        if l.is_multiple_of(s)
            && let (Engine::Device(d), [x]) = (&mut self.engine, &mut self.sequences[seqs.clone()])
            && x.waiting.is_empty()
            && let Some(chunks) = &mut x.chunks
        {
            // Whole chunks, whose rows are there.
            let [k, v, landmarks] = d.chunks(l / s, [1, l, self.hidden_size], None)?;
            chunks.append(k, v, landmarks)?;
            return self.appended(seqs.start);
        }
        let hidden = match &mut self.engine {
            Engine::Cpu(c) => c.hidden(),
            Engine::Device(d) => d.hidden()?,
        };
        for (x, rows) in self.sequences[seqs.clone()].iter_mut().zip(hidden.chunks_exact(l * d)) {
            x.waiting.extend_from_slice(rows);
        }
        for seq in seqs {
            let x = &mut self.sequences[seq];
            let whole = x.waiting.len() / (s * d);
            let (Some(chunks), true) = (&mut x.chunks, whole > 0) else { continue };
            let (shape, rows) = ([1, whole * s, d], &x.waiting[..whole * s * d]);
            let [k, v, landmarks] = match &mut self.engine {
                Engine::Cpu(c) => c.chunks(whole, shape, rows)?,
                Engine::Device(d) => d.chunks(whole, shape, Some(rows))?,
            };
            chunks.append(k, v, landmarks)?;
            x.waiting.drain(..whole * s * d);
            self.appended(seq)?;
        }
        Ok(())
    }

    /// As many tokens of each of `seqs`.
    fn run_some(&mut self, seqs: Range<usize>, ids: &[i32], mode: Mode, out: &mut Segment) -> Result<(), SessionError> {
        out.clear();
        if ids.is_empty() {
            return Ok(());
        }
        if seqs.len() == self.sequences.len() {
            return self.run(seqs, ids, mode, out);
        }
        let all = self.sequences.len();
        match &mut self.engine {
            Engine::Cpu(c) => c.narrow(seqs.clone(), all),
            Engine::Device(d) => d.narrow(seqs.clone(), all)?,
        }
        let result = self.run(seqs.clone(), ids, mode, out);
        match &mut self.engine {
            Engine::Cpu(c) => c.widen(seqs, all),
            Engine::Device(d) => result.is_ok().then(|| d.widen(seqs, all)).transpose().map(drop)?,
        }
        result
    }

    fn run(&mut self, seqs: Range<usize>, ids: &[i32], mode: Mode, out: &mut Segment) -> Result<(), SessionError> {
        let (n, s, d) = (seqs.len(), self.chunk_size, self.hidden_size);
        let l = ids.len() / n;
        let all = seqs.len() == self.sequences.len();
        if mode != Mode::Flash && l == 1 && all && matches!(&self.engine, Engine::Device(d) if d.whole()) {
            return self.token(ids, Wanted::Hidden(out));
        }
        self.advance(seqs.clone(), l)?;
        match &mut self.engine {
            Engine::Cpu(c) => c.lower(n, ids)?,
            Engine::Device(d) => d.lower(n, ids)?,
        }
        if self.sequences.iter().all(|x| x.chunks.is_none()) {
            out.hidden.extend_from_slice(match &mut self.engine {
                Engine::Cpu(c) => c.hidden(),
                Engine::Device(d) => d.hidden()?,
            });
            return Ok(());
        }
        self.complete(seqs.clone(), l)?;

        let shape = [n, l, d];
        match (&mut self.engine, mode) {
            (Engine::Cpu(c), Mode::Flash) => c.flash(shape),
            (Engine::Device(d), Mode::Flash) => d.flash(shape),
            (Engine::Cpu(c), _) => c.upper(shape, s, &self.start, &self.sequences[seqs], out),
            (Engine::Device(d), _) => d.upper(shape, seqs, (&self.start, mode == Mode::Last), &self.sequences, out),
        }
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
        match &mut self.engine {
            Engine::Cpu(c) => c.head(shape, hidden, out),
            Engine::Device(d) => d.head(shape, hidden, out),
        }
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
}

/// The upper half as a program for a device, its memory in pages of `stored`.
///
/// # Errors
/// Something reads the memory that takes no pages.
pub(crate) fn upper_half(g: &Graph, stored: DType) -> Result<Program, PagesError> {
    let kernels = if stored == DType::BF16 { Kernels::GpuPages } else { Kernels::Gpu };
    paged(lower_for(g, kernels), PAGED, stored)
}

/// Inputs of the upper half that are chunks, and what says on a device where they are.
pub(crate) const PAGED: &[&str] = &["k", "v", "landmarks"];
const TABLES: &[&str] = &[CHUNK_TABLE, LANDMARK_TABLE, LANDMARK_WINDOW];

impl Engine {
    fn states(&mut self) -> Result<Vec<(String, Tensor)>, SessionError> {
        match self {
            Engine::Cpu(c) => Ok(c.states()),
            Engine::Device(d) => d.states(),
        }
    }
    fn set_state(&mut self, name: &str, t: Tensor) -> Result<(), SessionError> {
        match self {
            Engine::Cpu(c) => {
                c.set_state(name, t);
                Ok(())
            }
            Engine::Device(d) => d.set_state(name, &t),
        }
    }
}

/// Scan states of `n` sequences as they begin.
fn states<'a>(sources: impl Iterator<Item = &'a SourceSlot>, n: usize) -> Result<Vec<(String, Tensor)>, SessionError> {
    let all = Bindings::new([("N", n)]);
    let mut out: Vec<(String, Tensor)> = vec![];
    for slot in sources.filter(|s| s.kind == SourceKind::State) {
        if !out.iter().any(|(name, _)| *name == slot.name) {
            out.push((slot.name.clone(), Tensor::zeros(&slot.ty.bind(&all).map_err(ExecError::from)?)));
        }
    }
    Ok(out)
}

/// Tokens that the memories to which programs append have room for; `None`: they keep none.
pub fn room<'a>(programs: impl Iterator<Item = &'a Program>) -> Option<usize> {
    let memories = programs.flat_map(|p| &p.steps).filter(|s| matches!(s.op, Op::Append(_)));
    memories.filter_map(|s| s.outputs[0].ty.shape[1].as_int()).min()
}

/// What no session can be.
fn refuse(options: &SessionOptions, n: usize, halves: bool) -> Result<(), SessionError> {
    match options.tier.path() {
        Some(_) if n > 1 => Err(SessionError::OneSequence(n)),
        Some(path) if !halves => Err(SessionError::NoChunks(path.into())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 4.3M and what is needed beyond it are the same number of MiB to one digit.
    #[test]
    fn a_limit_is_told_as_it_was_given() {
        let e = SessionError::DeviceMemory { have: 4_508_876, need: 4_508_900, parts: "4.3 MiB weights".into() };
        let text = e.to_string();
        assert!(
            text.starts_with(
                "4508876 bytes (4.3 MiB) of device memory are too few, 4508900 bytes (4.3 MiB) are needed"
            ),
            "{text}"
        );
        assert!(text.contains(": 4.3 MiB weights; give more with --device-memory"), "{text}");
    }
}
