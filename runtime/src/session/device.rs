//! A session's programs on a device, and the part of its chunks that is there.
//!
//! ```text
//! device    landmarks of all chunks (every token looks through them) | slots with keys and values of some chunks
//!           tables: the page of every 128 landmarks, the slot of every chunk                 codegen/src/cuda/pages.rs
//! host      the chunk store of every sequence, in memory or in a file: all chunks            chunk_store
//! ```
//! A chunk that becomes whole goes to its store and, if there is a slot for every chunk, to the device; a decoding step then
//! needs nothing of the host but its token.  Where slots are fewer, the upper half stops before it attends: chosen chunks that
//! are not there are gathered from the store into slots that the clock gives (`slots.rs`).  A segment whose choices might need
//! more slots than there are goes through the upper half in parts.

use super::slots::{Place, Slots};
use super::{Segment, Sequence, SessionError, SessionParts};
use crate::chunk_store::{ChunkStore, Geometry, Part, Precision};
use crate::gpu::{Bytes, GpuError, Machine, ProgramId};
use crate::store::Store;
use crate::tensor::Tensor;
use rambac_codegen::cuda::pages::{CHUNK_TABLE, KV_SLOTS, LANDMARK_PAGE, LANDMARK_PAGES, LANDMARK_TABLE};
use rambac_ir::ops::{Op, SourceKind};
use rambac_ir::ty::ConcreteTy;
use rambac_ir::{Bindings, DType};
use std::ops::Range;

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
    /// Bytes of slots, landmarks and tables.
    pub bytes: usize,
}

/// Parts of 4: what landmarks may take of the memory for chunks.
const LANDMARK_SHARE: usize = 4;

fn bytes_i32(shape: &[usize], v: &[i32]) -> Bytes {
    let ty = ConcreteTy { dtype: DType::I32, shape: shape.to_vec() };
    Bytes { ty, data: v.iter().flat_map(|x| x.to_le_bytes()).collect() }
}
fn bytes_f32(shape: &[usize], v: &[f32]) -> Bytes {
    let ty = ConcreteTy { dtype: DType::F32, shape: shape.to_vec() };
    Bytes { ty, data: v.iter().flat_map(|x| x.to_le_bytes()).collect() }
}
fn floats(b: &Bytes, out: &mut Vec<f32>) {
    out.extend(b.data.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)));
}
fn ints(b: &Bytes, out: &mut Vec<i32>) {
    out.extend(b.data.as_chunks::<4>().0.iter().map(|x| i32::from_le_bytes(*x)));
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
}

/// The chunks on the device.
struct Pools {
    geometry: Geometry,
    /// Chunks that a token may choose, over all heads.
    per_token: usize,
    slots: Slots,
    most_slots: usize,
    /// Pages of landmarks: in the pool, in use, and at most.
    pages: usize,
    pages_used: usize,
    most_pages: usize,
    /// Of every sequence: the slot of a chunk, -1 if it has none; the page of every LANDMARK_PAGE chunks.
    tables: Vec<Vec<i32>>,
    landmark_pages: Vec<Vec<i32>>,
    /// Sequences and chunks that the tables on the device are for.
    shown: Option<(Range<usize>, usize)>,
    gathered: u64,
    evicted: u64,
}

impl OnDevice {
    /// Takes a machine on which the parts are loaded; gives it the weights.
    pub fn new(
        mut machine: Machine,
        parts: SessionParts<ProgramId>,
        params: &Store,
        sequences: usize,
        geometry: Geometry,
        memory: DeviceMemory,
    ) -> Result<OnDevice, SessionError> {
        let mut used = 0;
        for (name, t) in &params.0 {
            let b = Bytes::from_tensor(t.view());
            used += b.data.len();
            machine.set(name, &b)?;
        }
        let mut pools = None;
        if let Some(upper) = parts.upper {
            let mut arena = 0;
            for (_, &id) in parts.named() {
                arena = arena.max(arena_bytes(&machine, id, sequences, memory.segment, geometry.chunk)?);
            }
            let left = match (memory.limit, machine.device().space()) {
                (Some(limit), _) => limit.saturating_sub(used + arena),
                (None, Ok(Some(space))) => (space.free / 10 * 9).saturating_sub(arena),
                // As much as there is: more chunks than positions can be counted.
                _ => usize::MAX / 8,
            };
            let per_token = chosen_per_token(&machine, upper);
            let (slot, page) = (slot_bytes(geometry), page_bytes(geometry));
            let (most_slots, most_pages) =
                (left / LANDMARK_SHARE * (LANDMARK_SHARE - 1) / slot, left / LANDMARK_SHARE / page);
            let (least_slots, least_pages) = (per_token * sequences, sequences);
            if most_slots < least_slots || most_pages < least_pages {
                let chunks =
                    LANDMARK_SHARE * (least_pages * page).max((least_slots * slot).div_ceil(LANDMARK_SHARE - 1));
                return Err(SessionError::DeviceMemory {
                    have: memory.limit.unwrap_or(left),
                    need: used + arena + chunks,
                });
            }
            pools = Some(Pools {
                geometry,
                per_token,
                slots: Slots::new(0),
                most_slots: most_slots.min(i32::MAX as usize),
                pages: 0,
                pages_used: 0,
                most_pages: most_pages.min(i32::MAX as usize),
                tables: vec![vec![]; sequences],
                landmark_pages: vec![vec![]; sequences],
                shown: None,
                gathered: 0,
                evicted: 0,
            });
        }
        let mut s = OnDevice { machine, parts, states: vec![], hidden: vec![], made: Default::default(), pools };
        if let Some(p) = &mut s.pools {
            p.grow_slots(&mut s.machine, (p.per_token * sequences).max(16), &[])?;
            p.grow_pages(&mut s.machine, sequences, &[])?;
        }
        Ok(s)
    }

    pub fn residency(&self) -> Option<Residency> {
        let p = self.pools.as_ref()?;
        let tables = p.shown.as_ref().map_or(0, |(s, c)| s.len() * (c + c / LANDMARK_PAGE) * 4);
        Some(Residency {
            slots: p.slots.len(),
            resident: p.slots.resident(),
            gathered: p.gathered,
            evicted: p.evicted,
            bytes: p.slots.len() * slot_bytes(p.geometry) + p.pages * page_bytes(p.geometry) + tables,
        })
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
            let slots = p.slots.len();
            p.slots = Slots::new(slots);
            p.pages_used = 0;
            p.tables.iter_mut().chain(&mut p.landmark_pages).for_each(Vec::clear);
            p.shown = None;
        }
        Ok(())
    }

    /// The programs carry the states of whole batches: those of the sequences beside `rows` of `all` step aside.
    pub fn narrow(&mut self, rows: Range<usize>, all: usize) -> Result<(), SessionError> {
        for (name, ty) in &self.states {
            let (aside, size) = (aside(name), ty.bytes() / all);
            let mut part = ty.clone();
            part.shape[0] = rows.len();
            self.machine.rename(name, &aside)?;
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
            self.machine.rename(&aside, name)?;
        }
        Ok(())
    }

    pub fn lower(&mut self, n: usize, ids: &[i32]) -> Result<(), SessionError> {
        let l = ids.len() / n;
        let ids = bytes_i32(&[n, l], ids);
        let out = self.machine.run(self.parts.lower, &Bindings::new([("N", n), ("L", l)]), &[("input_ids", &ids)])?;
        self.hidden.clear();
        out.iter().filter(|(name, _)| name == "hidden").for_each(|(_, b)| floats(b, &mut self.hidden));
        Ok(())
    }
    /// What [`lower`](Self::lower) made.
    pub fn hidden(&self) -> &[f32] {
        &self.hidden
    }

    /// Memory of `chunks` chunks of hidden rows.
    pub fn chunks(&mut self, chunks: usize, shape: [usize; 3], rows: &[f32]) -> Result<[&[f32]; 3], SessionError> {
        let id = self.parts.chunks.expect("BUG: only a model of two halves has chunks");
        let out =
            self.machine.run(id, &Bindings::new([("N", 1), ("B", chunks)]), &[("hidden", &bytes_f32(&shape, rows))])?;
        for (name, to) in ["k", "v", "landmarks"].iter().zip(&mut self.made) {
            to.clear();
            out.iter().filter(|(n, _)| n == name).for_each(|(_, b)| floats(b, to));
        }
        Ok([0, 1, 2].map(|i| self.made[i].as_slice()))
    }

    /// Chunks were added to the store of sequence `seq`.
    pub fn appended(&mut self, seq: usize, sequences: &[Sequence]) -> Result<(), SessionError> {
        let Some(p) = &mut self.pools else { return Ok(()) };
        p.appended(&mut self.machine, seq, sequences)
    }

    pub fn flash(&mut self, shape: [usize; 3]) -> Result<(), SessionError> {
        let id = self.parts.upper_flash.expect("BUG: only a model of two halves has an upper one");
        let hidden = bytes_f32(&shape, &self.hidden);
        self.machine.run(id, &Bindings::new([("N", shape[0]), ("L", shape[1])]), &[("hidden", &hidden)])?;
        Ok(())
    }

    /// `sequences` are all; those that run are `seqs`.
    pub fn upper(
        &mut self,
        shape: [usize; 3],
        seqs: Range<usize>,
        start: &[i32],
        sequences: &[Sequence],
        out: &mut Segment,
    ) -> Result<(), SessionError> {
        let id = self.parts.upper.expect("BUG: only a model of two halves has an upper one");
        let p = self.pools.as_mut().expect("BUG: halves have chunks");
        let [n, l, d] = shape;
        let chunks = seqs.clone().map(|s| p.tables[s].len()).max().unwrap_or(0);
        // Few numbers bind few plans, and whole pages of landmarks.
        let c = chunks.max(LANDMARK_PAGE).next_power_of_two();
        p.show(&mut self.machine, seqs.clone(), c)?;
        let all_here = p.slots.resident() == p.tables.iter().map(Vec::len).sum::<usize>();
        let rows = if all_here { l } else { (p.slots.len() / (p.per_token * n)).clamp(1, l) };
        assert!(n == 1 || rows == l, "BUG: several sequences have a token each");
        for first in (0..l).step_by(rows) {
            let rows = rows.min(l - first);
            let part = if rows == l { &self.hidden[..] } else { &self.hidden[first * d..(first + rows) * d] };
            let begin: Vec<i32> = start.iter().map(|s| s + first as i32).collect();
            let (hidden, start) = (bytes_f32(&[n, rows, d], part), bytes_i32(&[n], &begin));
            let inputs = [("hidden", &hidden), ("start", &start)];
            let dims =
                Bindings::new([("N", n), ("L", rows), ("C", c), (KV_SLOTS, p.slots.len()), (LANDMARK_PAGES, p.pages)]);
            let made = if all_here {
                self.machine.run(id, &dims, &inputs)?
            } else {
                let mut failed = None;
                let mut chosen = |m: &mut Machine, indices: &[i32], count: &[i32]| {
                    p.gather(m, seqs.clone(), c, sequences, indices, count).or_else(|e| match e {
                        SessionError::Gpu(e) => Err(e),
                        // The run goes on over what is there and then fails.
                        other => {
                            failed = Some(other);
                            Ok(())
                        }
                    })
                };
                let made = self.machine.run_choosing(id, &dims, &inputs, &mut chosen)?;
                if let Some(e) = failed {
                    return Err(e);
                }
                made
            };
            for (name, b) in &made {
                match name.as_str() {
                    "upper" => floats(b, &mut out.hidden),
                    "indices" => ints(b, &mut out.retrieved.indices),
                    "count" => ints(b, &mut out.retrieved.count),
                    "weights" => floats(b, &mut out.retrieved.weights),
                    "query" => floats(b, &mut out.retrieved.query),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    pub fn head(&mut self, shape: [usize; 3], hidden: &[f32], out: &mut Vec<f32>) -> Result<(), SessionError> {
        let dims = Bindings::new([("N", 1), ("L", shape[1])]);
        let made = self.machine.run(self.parts.head, &dims, &[("upper", &bytes_f32(&shape, hidden))])?;
        out.clear();
        made.iter().filter(|(name, _)| name == "logits").for_each(|(_, b)| floats(b, out));
        Ok(())
    }
}

fn aside(state: &str) -> String {
    format!("{state} of all sequences")
}

/// Bytes of a slot's keys and values.
fn slot_bytes(g: Geometry) -> usize {
    2 * g.heads * g.chunk * g.dim * g.precision.bytes()
}
/// Bytes of a page of landmarks.
fn page_bytes(g: Geometry) -> usize {
    LANDMARK_PAGE * g.heads * g.landmark_dim * g.precision.bytes()
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

/// Bytes of activations of a part for segments, and for a token of every sequence.
fn arena_bytes(m: &Machine, id: ProgramId, n: usize, segment: usize, chunk: usize) -> Result<usize, GpuError> {
    let mut most = 0;
    for (n, l) in [(1, segment.max(1)), (n, 1)] {
        let dims = [("N", n), ("L", l), ("C", LANDMARK_PAGE), ("B", l / chunk + 1), (KV_SLOTS, 1), (LANDMARK_PAGES, 1)];
        let plan = m.program(id).plan(&Bindings::new(dims))?;
        most = most.max(plan.arena + plan.inputs);
    }
    Ok(most)
}

impl Pools {
    fn dtype(&self) -> DType {
        match self.geometry.precision {
            Precision::Bf16 => DType::BF16,
            Precision::F32 => DType::F32,
        }
    }

    /// Makes the pool of slots larger; what was there is gone.
    fn grow_slots(&mut self, m: &mut Machine, slots: usize, sequences: &[Sequence]) -> Result<(), SessionError> {
        let Geometry { heads, chunk, dim, .. } = self.geometry;
        let slots = slots.min(self.most_slots);
        let ty = ConcreteTy { dtype: self.dtype(), shape: vec![slots, chunk, heads, dim] };
        for name in ["k", "v"] {
            m.remove(name)?;
            m.allocate(name, &ty)?;
        }
        self.slots = Slots::new(slots);
        self.tables.iter_mut().for_each(|t| t.fill(-1));
        self.shown = None;
        self.bring_all(m, sequences)
    }

    /// Brings every chunk, if all have room.
    fn bring_all(&mut self, m: &mut Machine, sequences: &[Sequence]) -> Result<(), SessionError> {
        if self.tables.iter().map(Vec::len).sum::<usize>() > self.slots.len() {
            return Ok(());
        }
        self.slots.begin();
        for seq in 0..self.tables.len() {
            for chunk in 0..self.tables[seq].len() {
                if self.tables[seq][chunk] < 0 {
                    self.bring(m, seq, chunk, sequences)?;
                }
            }
        }
        Ok(())
    }

    /// Makes the pool of landmarks larger and fills it again.
    fn grow_pages(&mut self, m: &mut Machine, pages: usize, sequences: &[Sequence]) -> Result<(), SessionError> {
        let Geometry { heads, landmark_dim, .. } = self.geometry;
        if pages > self.most_pages {
            let (have, need) = (self.most_pages * page_bytes(self.geometry), pages * page_bytes(self.geometry));
            return Err(SessionError::Landmarks { have, need });
        }
        self.pages = (2 * self.pages).max(pages).min(self.most_pages);
        m.remove("landmarks")?;
        let shape = vec![self.pages, LANDMARK_PAGE, heads, landmark_dim];
        m.allocate("landmarks", &ConcreteTy { dtype: self.dtype(), shape })?;
        for (seq, x) in sequences.iter().enumerate() {
            for chunk in 0..self.tables[seq].len() {
                self.bring_landmark(m, seq, chunk, x)?;
            }
        }
        Ok(())
    }

    fn bring_landmark(&self, m: &mut Machine, seq: usize, chunk: usize, x: &Sequence) -> Result<(), SessionError> {
        let store = store_of(x);
        let mut row = vec![];
        store.raw(Part::Landmarks, chunk, &mut row);
        let page = self.landmark_pages[seq][chunk / LANDMARK_PAGE] as usize;
        m.write("landmarks", (page * LANDMARK_PAGE + chunk % LANDMARK_PAGE) * row.len(), &row)?;
        store.failure().map_or(Ok(()), |e| Err(e.into()))
    }

    /// Puts a chunk into a slot.
    fn bring(&mut self, m: &mut Machine, seq: usize, chunk: usize, sequences: &[Sequence]) -> Result<(), SessionError> {
        let place = self.slots.take((seq as u32, chunk as u32));
        let slot = match place.expect("BUG: parts of a segment never choose more chunks than there are slots") {
            Place::Here(slot) => slot,
            Place::Free(slot, before) => {
                if let Some((s, c)) = before {
                    self.tables[s as usize][c as usize] = -1;
                    self.evicted += 1;
                }
                let store = store_of(&sequences[seq]);
                let mut rows = vec![];
                for (name, part) in [("k", Part::Keys), ("v", Part::Values)] {
                    store.raw(part, chunk, &mut rows);
                    m.write(name, slot * rows.len(), &rows)?;
                }
                self.gathered += 1;
                if let Some(e) = store.failure() {
                    return Err(e.into());
                }
                slot
            }
        };
        self.tables[seq][chunk] = slot as i32;
        Ok(())
    }

    fn appended(&mut self, m: &mut Machine, seq: usize, sequences: &[Sequence]) -> Result<(), SessionError> {
        let (had, have) = (self.tables[seq].len(), store_of(&sequences[seq]).chunks());
        while self.landmark_pages[seq].len() * LANDMARK_PAGE < have {
            if self.pages_used == self.pages {
                self.grow_pages(m, self.pages + 1, sequences)?;
            }
            self.landmark_pages[seq].push(self.pages_used as i32);
            self.pages_used += 1;
        }
        for chunk in had..have {
            self.tables[seq].push(-1);
            self.bring_landmark(m, seq, chunk, &sequences[seq])?;
        }
        self.shown = None;
        let all: usize = self.tables.iter().map(Vec::len).sum();
        if all > self.slots.len() && self.slots.len() < self.most_slots {
            return self.grow_slots(m, all.next_power_of_two(), sequences);
        }
        self.bring_all(m, sequences)
    }

    /// Gives the device the tables of `seqs`, of `c` chunks each.
    fn show(&mut self, m: &mut Machine, seqs: Range<usize>, c: usize) -> Result<(), SessionError> {
        if self.shown.as_ref() == Some(&(seqs.clone(), c)) {
            return Ok(());
        }
        let mut rows = |name: &str, tables: &[Vec<i32>], width: usize| {
            let mut all = vec![-1; seqs.len() * width];
            for (row, t) in all.chunks_exact_mut(width).zip(&tables[seqs.clone()]) {
                row[..t.len()].copy_from_slice(t);
            }
            m.set(name, &bytes_i32(&[seqs.len(), width], &all))
        };
        rows(CHUNK_TABLE, &self.tables, c)?;
        rows(LANDMARK_TABLE, &self.landmark_pages, c / LANDMARK_PAGE)?;
        self.shown = Some((seqs, c));
        Ok(())
    }

    /// Brings what was chosen: `indices` `[n, rows, h, K]`, `count` `[n, rows, h]`.
    fn gather(
        &mut self,
        m: &mut Machine,
        seqs: Range<usize>,
        c: usize,
        sequences: &[Sequence],
        indices: &[i32],
        count: &[i32],
    ) -> Result<(), SessionError> {
        let (k, rows) = (indices.len() / count.len().max(1), count.len() / seqs.len());
        let mut wanted: Vec<(usize, usize)> = vec![];
        for (row, n) in count.iter().enumerate() {
            let chosen = &indices[row * k..][..*n as usize];
            wanted.extend(chosen.iter().map(|&i| (seqs.start + row / rows, i as usize)));
        }
        wanted.sort_unstable();
        wanted.dedup();
        self.slots.begin();
        // What is here first, so that nothing of it goes for what is not.
        let (here, missing): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|&(s, i)| self.tables[s][i] >= 0);
        for &(seq, chunk) in here.iter().chain(&missing) {
            self.bring(m, seq, chunk, sequences)?;
        }
        for (seq, chunk) in missing {
            let at = ((seq - seqs.start) * c + chunk) * 4;
            m.write(CHUNK_TABLE, at, &self.tables[seq][chunk].to_le_bytes())?;
        }
        Ok(())
    }
}

fn store_of(x: &Sequence) -> &ChunkStore {
    x.chunks.as_ref().expect("BUG: halves have stores")
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
