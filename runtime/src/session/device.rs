//! A session's programs on a device, and the part of its chunks that is there.
//!
//! ```text
//! device    landmarks of all chunks (every token looks through them), or of some at a time | slots with keys and values of some
//!           tables: the page of every 128 landmarks, the slot of every chunk                 codegen/src/cuda/pages.rs
//! host      the chunk store of every sequence, in memory or in a file: all chunks            chunk_store
//! ```
//! A chunk that becomes whole goes to its store and, if there is a slot for every chunk, to the device; a decoding step then
//! needs nothing of the host but its token: all parts run as one chain (`gpu/chain.rs`), which from the third token on is a
//! record of the device.  What changes from token to token is on the device: the token, the sequences' positions (`start`, by
//! which kernels know which chunks are visible), the tables.  What is a size changes rarely: tables have as many entries as the
//! next power of two of the chunks, and slots and pages of landmarks are doubled when they are full, up to the limit of memory
//! (`pools.rs`).  Where slots are fewer, the upper half stops before it attends: chosen chunks that are not there are gathered from
//! the store into slots that the clock gives (`slots.rs`); landmarks that are not there come in parts before a choice.  What lies
//! before, between and behind is a record each.  A segment whose choices might need more slots than there are goes through the
//! upper half in parts.

use super::pools::{Bringing, Least, Pools};
use super::{Segment, Sequence, SessionError, SessionParts, size};
use crate::chunk_store::Geometry;
use crate::gpu::{Bytes, GpuError, Link, Machine, ProgramId};
use crate::store::Store;
use crate::tensor::Tensor;
use rambac_codegen::cuda::pages::{KV_SLOTS, LANDMARK_PAGE, LANDMARK_PAGES, LANDMARKS_AWAY};
use rambac_ir::ops::{Op, SourceKind};
use rambac_ir::ty::ConcreteTy;
use rambac_ir::{Bindings, DType};
use std::ops::Range;

/// Values of a machine: what the lower half makes of tokens, and the upper.
const HIDDEN: &str = "hidden";
const UPPER: &str = "upper";

/// How much of a device a session may take.
#[derive(Clone, Copy, Debug)]
pub struct DeviceMemory {
    /// Bytes of weights, states, activations and chunks; `None`: most of what is free.
    pub limit: Option<usize>,
    /// The longest segment that will be fed, in tokens.
    pub segment: usize,
}

/// What became of the chunks of a session on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Residency {
    /// Slots for keys and values, and those in use.
    pub slots: usize,
    pub resident: usize,
    /// Chunks that were brought to the device, and those that went for others.
    pub gathered: u64,
    pub evicted: u64,
    /// Pages of landmarks that there is room for, and parts in which those come that are more; 0: all are there.
    pub landmark_pages: usize,
    pub landmark_parts: usize,
    /// Bytes of slots, landmarks and tables.
    pub bytes: usize,
}

pub(super) fn bytes_i32(shape: &[usize], v: &[i32]) -> Bytes {
    let ty = ConcreteTy { dtype: DType::I32, shape: shape.to_vec() };
    Bytes { ty, data: little(v.iter().map(|x| x.to_le_bytes())) }
}
fn bytes_f32(shape: &[usize], v: &[f32]) -> Bytes {
    let ty = ConcreteTy { dtype: DType::F32, shape: shape.to_vec() };
    Bytes { ty, data: little(v.iter().map(|x| x.to_le_bytes())) }
}
/// Words in a row, as fast as memory is copied.
fn little(words: impl Iterator<Item = [u8; 4]>) -> Vec<u8> {
    words.collect::<Vec<_>>().into_flattened()
}
fn floats(b: &[u8], out: &mut Vec<f32>) {
    out.extend(b.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)));
}
fn ints(b: &[u8], out: &mut Vec<i32>) {
    out.extend(b.as_chunks::<4>().0.iter().map(|x| i32::from_le_bytes(*x)));
}
/// What the upper half tells beside its hidden rows.
fn tell(name: &str, b: &[u8], out: &mut Segment) {
    match name {
        UPPER => floats(b, &mut out.hidden),
        "indices" => ints(b, &mut out.retrieved.indices),
        "count" => ints(b, &mut out.retrieved.count),
        "weights" => floats(b, &mut out.retrieved.weights),
        "query" => floats(b, &mut out.retrieved.query),
        _ => {}
    }
}

/// Rows of which logits are made at once: of a whole segment they would take more than all else.
const HEAD_ROWS: usize = 64;

/// What a decoding step gives.
pub(super) enum Wanted<'a> {
    /// Hidden states and what was retrieved.
    Hidden(&'a mut Segment),
    /// `[sequences, V]`
    Logits(&'a mut Vec<f32>),
}

/// See the module's comment.
pub(super) struct OnDevice {
    machine: Machine,
    parts: SessionParts<ProgramId>,
    /// Of all sequences.
    states: Vec<(String, ConcreteTy)>,
    hidden: Vec<f32>,
    made: [Vec<f32>; 3],
    pools: Option<Pools>,
    /// What is taken beside chunks, and what may be in all.
    taken: Taken,
    have: usize,
}

impl OnDevice {
    /// Takes a machine on which the parts are loaded; gives it the weights, and the states of all sequences.
    pub fn new(
        mut machine: Machine,
        parts: SessionParts<ProgramId>,
        params: &Store,
        states: &[(String, Tensor)],
        sequences: usize,
        geometry: Geometry,
        memory: DeviceMemory,
    ) -> Result<OnDevice, SessionError> {
        let of_states: usize = states.iter().map(|(_, t)| t.ty().bytes()).sum();
        let mut taken = Taken {
            weights: params.0.values().map(|t| t.ty().bytes()).sum(),
            // Beside those of all sequences, those of the one that runs alone.
            states: of_states + if sequences > 1 { of_states / sequences } else { 0 },
            ..Taken::default()
        };
        for (part, &id) in parts.named() {
            let rows = if part == "head" { HEAD_ROWS } else { memory.segment };
            let (own, inputs) = part_bytes(&machine, id, sequences, rows, geometry.chunk)?;
            // One arena serves all, inputs stay where they are.
            (taken.activations, taken.inputs) = (taken.activations.max(own), taken.inputs + inputs);
        }
        let have = match (memory.limit, machine.device().space()) {
            (Some(limit), _) => limit,
            (None, Ok(Some(space))) => space.free / 10 * 9,
            // As much as there is: more chunks than positions can be counted.
            _ => usize::MAX / 8,
        };
        let left = have.checked_sub(taken.bytes());
        let pools = match (parts.upper, left) {
            (Some(upper), left) => {
                let per_token = chosen_per_token(&machine, upper);
                let pools = Pools::new(geometry, per_token, sequences, left.unwrap_or(0));
                Some(pools.map_err(|least| taken.too_few(have, Some(least)))?)
            }
            (None, None) => return Err(taken.too_few(have, None)),
            (None, Some(_)) => None,
        };
        for (name, t) in &params.0 {
            machine.set(name, &Bytes::from_tensor(t.view()))?;
        }
        let mut s =
            OnDevice { machine, parts, states: vec![], hidden: vec![], made: Default::default(), pools, taken, have };
        for (name, t) in states {
            s.set_state(name, t)?;
        }
        if let Some(p) = &mut s.pools {
            p.begin(&mut s.machine)?;
        }
        Ok(s)
    }

    pub fn residency(&self) -> Option<Residency> {
        self.pools.as_ref().map(Pools::residency)
    }

    pub fn set_state(&mut self, name: &str, t: &Tensor) -> Result<(), SessionError> {
        let b = Bytes::from_tensor(t.view());
        self.machine.set(name, &b)?;
        if !self.states.iter().any(|s| s.0 == name) {
            self.states.push((name.into(), b.ty));
        }
        Ok(())
    }
    pub fn states(&mut self) -> Result<Vec<(String, Tensor)>, SessionError> {
        let mut all = vec![];
        for (name, _) in &self.states {
            let b = self.machine.get(name)?.expect("BUG: states are on the device");
            all.push((name.clone(), b.to_tensor()));
        }
        Ok(all)
    }

    pub fn reset(&mut self) -> Result<(), SessionError> {
        for (name, ty) in &self.states {
            self.machine.set(name, &Bytes { ty: ty.clone(), data: vec![0; ty.bytes()] })?;
        }
        if let Some(p) = &mut self.pools {
            p.clear();
        }
        Ok(())
    }

    /// The programs carry the states of whole batches: those of the sequences beside `rows` of `all` step aside.  Nothing is
    /// allocated after the first time, so that what was recorded stays good.
    pub fn narrow(&mut self, rows: Range<usize>, all: usize) -> Result<(), SessionError> {
        for (name, ty) in &self.states {
            let (aside, size) = (aside(name), ty.bytes() / all);
            let mut part = ty.clone();
            part.shape[0] = rows.len();
            self.machine.rename(name, &aside)?;
            self.machine.rename(&alone(name), name)?;
            self.machine.allocate(name, &part)?;
            self.machine.copy_value((&aside, rows.start * size), (name, 0), rows.len() * size)?;
        }
        Ok(())
    }
    /// Undoes [`narrow`](Self::narrow).
    pub fn widen(&mut self, rows: Range<usize>, all: usize) -> Result<(), SessionError> {
        for (name, ty) in &self.states {
            let (aside, size) = (aside(name), ty.bytes() / all);
            self.machine.copy_value((name, 0), (&aside, rows.start * size), rows.len() * size)?;
            self.machine.rename(name, &alone(name))?;
            self.machine.rename(&aside, name)?;
        }
        Ok(())
    }

    /// What it makes stays on the device, where the other parts read it.
    pub fn lower(&mut self, n: usize, ids: &[i32]) -> Result<(), SessionError> {
        let l = ids.len() / n;
        let (ids, dims) = (bytes_i32(&[n, l], ids), Bindings::new([("N", n), ("L", l)]));
        let (program, inputs) = (self.parts.lower, [("input_ids", &ids)]);
        self.hidden.clear();
        let link = Link { program, dims: &dims, inputs: &inputs, keep: &[(HIDDEN, HIDDEN)], wanted: Some(&[]) };
        self.machine.run_chain(&[link], &mut |_, _, _, _| {})?;
        Ok(())
    }
    /// What [`lower`](Self::lower) made.
    pub fn hidden(&mut self) -> Result<&[f32], SessionError> {
        if self.hidden.is_empty() {
            let b = self.machine.get(HIDDEN)?.expect("BUG: the lower half ran");
            floats(&b.data, &mut self.hidden);
        }
        Ok(&self.hidden)
    }

    /// Memory of `chunks` chunks of hidden rows; without rows, of all that [`lower`](Self::lower) made.
    pub fn chunks(
        &mut self,
        chunks: usize,
        shape: [usize; 3],
        rows: Option<&[f32]>,
    ) -> Result<[&[f32]; 3], SessionError> {
        let program = self.parts.chunks.expect("BUG: only a model of two halves has chunks");
        let (rows, dims) = (rows.map(|r| bytes_f32(&shape, r)), Bindings::new([("N", 1), ("B", chunks)]));
        let inputs: Vec<_> = rows.iter().map(|r| (HIDDEN, r)).collect();
        self.made.iter_mut().for_each(Vec::clear);
        let made = &mut self.made;
        let link = Link { program, dims: &dims, inputs: &inputs, keep: &[], wanted: None };
        self.machine.run_chain(&[link], &mut |_, name, _, b| {
            if let Some(i) = ["k", "v", "landmarks"].iter().position(|n| *n == name) {
                floats(b, &mut made[i]);
            }
        })?;
        Ok([0, 1, 2].map(|i| self.made[i].as_slice()))
    }

    /// Chunks were added to the store of sequence `seq`.
    pub fn appended(&mut self, seq: usize, sequences: &[Sequence]) -> Result<(), SessionError> {
        let Some(p) = &mut self.pools else { return Ok(()) };
        let (taken, have) = (self.taken, self.have);
        p.appended(&mut self.machine, seq, sequences, |least| taken.too_few(have, Some(least)))
    }

    pub fn flash(&mut self, shape: [usize; 3]) -> Result<(), SessionError> {
        let id = self.parts.upper_flash.expect("BUG: only a model of two halves has an upper one");
        let dims = Bindings::new([("N", shape[0]), ("L", shape[1])]);
        let link = Link { program: id, dims: &dims, inputs: &[], keep: &[], wanted: Some(&[]) };
        self.machine.run_chain(&[link], &mut |_, _, _, _| {})?;
        Ok(())
    }

    /// `sequences` are all; those that run are `seqs`.  Of the last token alone with `last`, where every chunk is here.
    pub fn upper(
        &mut self,
        shape: [usize; 3],
        seqs: Range<usize>,
        (start, last): (&[i32], bool),
        sequences: &[Sequence],
        out: &mut Segment,
    ) -> Result<(), SessionError> {
        let id = self.parts.upper.expect("BUG: only a model of two halves has an upper one");
        let [n, l, d] = shape;
        let p = self.pools.as_mut().expect("BUG: halves have chunks");
        let c = p.entries(seqs.clone());
        p.show(&mut self.machine, seqs.clone(), c)?;
        let rows = p.rows(n, l);
        assert!(n == 1 || rows == l, "BUG: several sequences have a token each");
        if p.whole() {
            let (dims, start) = (Bindings::new(p.sizes(n, l, c)), bytes_i32(&[n], start));
            let inputs = [("start", &start)];
            let (keep, wanted): (&[_], Option<&[&str]>) =
                if last { (&[(UPPER, UPPER)], Some(&[])) } else { (&[], None) };
            let link = Link { program: id, dims: &dims, inputs: &inputs, keep, wanted };
            self.machine.run_chain(&[link], &mut |_, name, _, b| tell(name, b, out))?;
            if last {
                let row = self.machine.part(UPPER, (l - 1) * d * 4, d * 4)?;
                floats(&row, &mut out.hidden);
            }
            return Ok(());
        }
        self.hidden()?;
        let p = self.pools.as_mut().expect("BUG: it was there");
        for first in (0..l).step_by(rows) {
            let rows = rows.min(l - first);
            let part = if rows == l { &self.hidden[..] } else { &self.hidden[first * d..(first + rows) * d] };
            let begin: Vec<i32> = start.iter().map(|s| s + first as i32).collect();
            let (hidden, start) = (bytes_f32(&[n, rows, d], part), bytes_i32(&[n], &begin));
            let inputs = [(HIDDEN, &hidden), ("start", &start)];
            let dims = Bindings::new(p.sizes(n, rows, c));
            let mut pager = Bringing { pools: &mut *p, seqs: seqs.clone(), c, sequences, failed: None };
            let made = self.machine.run_paged(id, &dims, &inputs, &mut pager)?;
            if let Some(e) = pager.failed {
                return Err(e);
            }
            made.iter().for_each(|(name, b)| tell(name, &b.data, out));
        }
        Ok(())
    }

    /// Whether a decoding step needs nothing of the host: every chunk is here.
    pub fn whole(&self) -> bool {
        self.pools.as_ref().is_none_or(Pools::whole)
    }

    /// One token of every sequence through all parts at once, see the module's comment.  Afterwards [`hidden`](Self::hidden) is
    /// what the lower half made of it, for a model with chunks.
    pub fn token(&mut self, ids: &[i32], start: &[i32], wanted: Wanted) -> Result<(), SessionError> {
        let n = ids.len();
        let (ids, start) = (bytes_i32(&[n, 1], ids), bytes_i32(&[n], start));
        let halves = self.parts.upper.zip(self.pools.as_mut());
        let mut upper_dims = Bindings::default();
        if let Some((_, p)) = halves {
            let c = p.entries(0..n);
            p.show(&mut self.machine, 0..n, c)?;
            upper_dims = Bindings::new(p.sizes(n, 1, c));
        }
        let dims = Bindings::new([("N", n), ("L", 1)]);
        let logits = matches!(wanted, Wanted::Logits(_));
        // What the lower half makes is what the upper reads, or the head, or nobody.
        let lower_keeps: &[(&str, &str)] = match (self.parts.upper, logits) {
            (Some(_), _) => &[(HIDDEN, HIDDEN)],
            (None, true) => &[(HIDDEN, UPPER)],
            (None, false) => &[],
        };
        let (tokens, starts) = ([("input_ids", &ids)], [("start", &start)]);
        let lower_gives: &[&str] = if self.parts.upper.is_none() && logits { &[] } else { &[HIDDEN] };
        let mut links = vec![Link {
            program: self.parts.lower,
            dims: &dims,
            inputs: &tokens,
            keep: lower_keeps,
            wanted: Some(lower_gives),
        }];
        if let Some(program) = self.parts.upper {
            let (keep, wanted): (&[_], Option<&[&str]>) =
                if logits { (&[(UPPER, UPPER)], Some(&[])) } else { (&[], None) };
            links.push(Link { program, dims: &upper_dims, inputs: &starts, keep, wanted });
        }
        if logits {
            let program = self.parts.head;
            links.push(Link { program, dims: &dims, inputs: &[], keep: &[], wanted: Some(&["logits"]) });
        }
        let hidden = &mut self.hidden;
        hidden.clear();
        match wanted {
            Wanted::Logits(out) => {
                out.clear();
                self.machine.run_chain(&links, &mut |link, _, _, b| floats(b, if link == 0 { hidden } else { out }))?;
            }
            Wanted::Hidden(out) => {
                let mut read = |link: usize, name: &str, _: &ConcreteTy, b: &[u8]| match link {
                    0 => floats(b, hidden),
                    _ => tell(name, b, out),
                };
                self.machine.run_chain(&links, &mut read)?;
                if self.parts.upper.is_none() {
                    out.hidden.extend_from_slice(&self.hidden);
                }
            }
        }
        Ok(())
    }

    pub fn machine(&mut self) -> &mut Machine {
        &mut self.machine
    }
    pub fn parts(&self) -> &SessionParts<ProgramId> {
        &self.parts
    }

    pub fn head(&mut self, shape: [usize; 3], hidden: &[f32], out: &mut Vec<f32>) -> Result<(), SessionError> {
        out.clear();
        for rows in hidden.chunks(HEAD_ROWS * shape[2]) {
            let l = rows.len() / shape[2];
            let dims = Bindings::new([("N", 1), ("L", l)]);
            let made = self.machine.run(self.parts.head, &dims, &[(UPPER, &bytes_f32(&[1, l, shape[2]], rows))])?;
            made.iter().filter(|(name, _)| name == "logits").for_each(|(_, b)| floats(&b.data, out));
        }
        Ok(())
    }
}

fn aside(state: &str) -> String {
    format!("{state} of all sequences")
}
fn alone(state: &str) -> String {
    format!("{state} of those that run alone")
}

/// Chunks that a token of one sequence may choose, over all heads of a layer.
fn chosen_per_token(machine: &Machine, upper: ProgramId) -> usize {
    let steps = machine.program(upper).program.steps.iter();
    let of = |op: &Op, heads: Option<usize>| match op {
        Op::Selection(s) => Some(s.k * heads.unwrap_or(1)),
        _ => None,
    };
    steps.filter_map(|s| of(&s.op, s.inputs.first().and_then(|v| v.ty.shape.get(2)?.as_int()))).max().unwrap_or(1)
}

/// Bytes of activations of a part, and of its inputs: for segments, and for a token of every sequence.
fn part_bytes(m: &Machine, id: ProgramId, n: usize, segment: usize, chunk: usize) -> Result<(usize, usize), GpuError> {
    let program = m.program(id);
    // Workspace of a choice depends on what it is made among, and on how many tokens make it: in parts where slots are few.
    let lengths: Vec<usize> = if program.program.syms.iter().any(|s| s.as_str() == "C") {
        (0..).map(|i| 1 << (4 * i)).take_while(|c| c * chunk <= i32::MAX as usize).map(|c| c * LANDMARK_PAGE).collect()
    } else {
        vec![LANDMARK_PAGE]
    };
    let segment = segment.max(1);
    let parts = if lengths.len() > 1 {
        vec![(1, segment), (1, segment.min(64)), (1, segment.min(7)), (n, 1)]
    } else {
        vec![(1, segment), (n, 1)]
    };
    let mut most = (0, 0);
    for (n, l) in parts {
        for &c in &lengths {
            for away in 0..lengths.len().min(2) {
                let pools = [(KV_SLOTS, 1), (LANDMARK_PAGES, 1), (LANDMARKS_AWAY, away)];
                let sizes = [("N", n), ("L", l), ("C", c), ("B", l / chunk + 1)];
                let plan = program.plan(&Bindings::new(sizes.into_iter().chain(pools)))?;
                most = (most.0.max(plan.arena), most.1.max(plan.inputs));
            }
        }
    }
    Ok(most)
}

/// Bytes of the device that are taken beside chunks.
#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    weights: usize,
    states: usize,
    activations: usize,
    inputs: usize,
}

impl Taken {
    fn bytes(&self) -> usize {
        self.weights + self.states + self.activations + self.inputs
    }
    /// The error of a limit that all this, and what chunks need, does not fit.
    fn too_few(&self, have: usize, chunks: Option<Least>) -> SessionError {
        let mut parts = vec![
            ("weights", self.weights),
            ("states", self.states),
            ("activations", self.activations),
            ("what goes from part to part", self.inputs),
        ];
        if let Some(c) = chunks {
            parts.push(("the chunks that one token may choose", c.slots));
            parts.push(("a page of landmarks", c.landmarks));
            parts.push(("tables of all chunks", c.tables));
        }
        let need = parts.iter().map(|p| p.1).sum();
        let parts: Vec<String> =
            parts.iter().filter(|p| p.1 > 0).map(|(name, b)| format!("{} {name}", size(*b))).collect();
        SessionError::DeviceMemory { have, need, parts: parts.join(", ") }
    }
}

/// Params that a program wants in bf16.
pub(super) fn narrow_params(machine: &Machine, parts: &SessionParts<ProgramId>, params: &mut Store) {
    for (_, &id) in parts.named() {
        for slot in &machine.program(id).program.sources {
            if slot.kind == SourceKind::Param
                && slot.ty.dtype == DType::BF16
                && let Some(t) = params.0.get_mut(&slot.name)
            {
                t.narrow();
            }
        }
    }
}
