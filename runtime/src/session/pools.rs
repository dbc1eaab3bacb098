//! The part of a session's chunks that is on a device: pools of slots and of landmarks, and the tables that say what is where.

use super::device::bytes_i32;
use super::slots::{Place, Slots};
use super::{Residency, Sequence, SessionError};
use crate::chunk_store::{ChunkStore, Geometry, Part, Precision};
use crate::gpu::Machine;
use rambac_codegen::cuda::pages::{CHUNK_TABLE, KV_SLOTS, LANDMARK_PAGE, LANDMARK_PAGES, LANDMARK_TABLE};
use rambac_ir::DType;
use rambac_ir::ty::ConcreteTy;
use std::ops::Range;

/// Parts of 4: what landmarks may take of the memory for chunks.
const LANDMARK_SHARE: usize = 4;

/// The chunks on the device.
pub(super) struct Pools {
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

/// Bytes of a slot's keys and values.
fn slot_bytes(g: Geometry) -> usize {
    2 * g.heads * g.chunk * g.dim * g.precision.bytes()
}
/// Bytes of a page of landmarks.
fn page_bytes(g: Geometry) -> usize {
    LANDMARK_PAGE * g.heads * g.landmark_dim * g.precision.bytes()
}

impl Pools {
    /// Pools that take at most `left` bytes of the device.
    ///
    /// # Errors
    /// That is too little; so many bytes are needed.
    pub fn new(geometry: Geometry, per_token: usize, sequences: usize, left: usize) -> Result<Pools, usize> {
        let (slot, page) = (slot_bytes(geometry), page_bytes(geometry));
        let (most_slots, most_pages) =
            (left / LANDMARK_SHARE * (LANDMARK_SHARE - 1) / slot, left / LANDMARK_SHARE / page);
        let (least_slots, least_pages) = (per_token * sequences, sequences);
        if most_slots < least_slots || most_pages < least_pages {
            return Err(LANDMARK_SHARE * (least_pages * page).max((least_slots * slot).div_ceil(LANDMARK_SHARE - 1)));
        }
        Ok(Pools {
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
        })
    }

    /// The first slots and pages.
    pub fn begin(&mut self, m: &mut Machine) -> Result<(), SessionError> {
        let sequences = self.tables.len();
        self.grow_slots(m, (self.per_token * sequences).max(16), &[])?;
        self.grow_pages(m, sequences, &[])
    }

    /// Forgets all chunks.
    pub fn clear(&mut self) {
        self.slots = Slots::new(self.slots.len());
        self.pages_used = 0;
        self.tables.iter_mut().chain(&mut self.landmark_pages).for_each(Vec::clear);
        self.shown = None;
    }

    pub fn residency(&self) -> Residency {
        let tables = self.shown.as_ref().map_or(0, |(s, c)| s.len() * (c + c / LANDMARK_PAGE) * 4);
        Residency {
            slots: self.slots.len(),
            resident: self.slots.resident(),
            gathered: self.gathered,
            evicted: self.evicted,
            bytes: self.slots.len() * slot_bytes(self.geometry) + self.pages * page_bytes(self.geometry) + tables,
        }
    }

    /// Entries of the tables of sequences: few numbers bind few plans, and make whole pages of landmarks.
    pub fn entries(&self, seqs: Range<usize>) -> usize {
        self.tables[seqs].iter().map(Vec::len).max().unwrap_or(0).max(LANDMARK_PAGE).next_power_of_two()
    }

    /// The sizes of the upper half's run over tables of `c` entries.
    pub fn sizes(&self, n: usize, rows: usize, c: usize) -> [(&'static str, usize); 5] {
        [("N", n), ("L", rows), ("C", c), (KV_SLOTS, self.slots.len()), (LANDMARK_PAGES, self.pages)]
    }

    /// Tokens of each of `n` sequences whose choices always have slots, `l` at most.
    pub fn rows(&self, n: usize, l: usize) -> usize {
        if self.whole() { l } else { (self.slots.len() / (self.per_token * n)).clamp(1, l) }
    }

    /// Every chunk has a slot.
    pub fn whole(&self) -> bool {
        self.slots.resident() == self.tables.iter().map(Vec::len).sum::<usize>()
    }

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

    pub fn appended(&mut self, m: &mut Machine, seq: usize, sequences: &[Sequence]) -> Result<(), SessionError> {
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
    pub fn show(&mut self, m: &mut Machine, seqs: Range<usize>, c: usize) -> Result<(), SessionError> {
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
    pub fn gather(
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
