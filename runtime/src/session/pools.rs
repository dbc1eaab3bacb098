//! The part of a session's chunks that is on a device: pools of slots and of landmarks, and the tables that say what is where.
//!
//! ```text
//! slots       keys and values of some chunks, brought when they are chosen
//! landmarks   pages, in the order in which they came:  near ones, which stay | room for some of the others
//! tables      an entry a chunk, and one a page of landmarks
//! ```
//! All of it stays within the bytes that it was given: pools grow up to that, and give way to tables.  Where landmarks are more
//! than their pool holds, those beyond the near ones go through the rest of it part by part whenever tokens choose: scores and the
//! best of them are the same as if all were there.

use super::device::bytes_i32;
use super::slots::{Place, Slots};
use super::{Residency, Sequence, SessionError};
use crate::chunk_store::{ChunkStore, Geometry, Part, Precision};
use crate::gpu::{GpuError, Machine, Pager};
use rambac_codegen::cuda::pages::{
    CHUNK_TABLE, KV_SLOTS, LANDMARK_PAGE, LANDMARK_PAGES, LANDMARK_TABLE, LANDMARK_WINDOW, LANDMARKS_AWAY,
};
use rambac_ir::DType;
use rambac_ir::ty::ConcreteTy;
use std::ops::Range;

/// Parts of 4: what landmarks may take of the memory for chunks, and what the others may take of theirs where they come and go.
const LANDMARK_SHARE: usize = 4;

/// The chunks on the device.
pub(super) struct Pools {
    geometry: Geometry,
    /// Chunks that a token may choose, over all heads.
    per_token: usize,
    /// Bytes for all of it.
    left: usize,
    slots: Slots,
    /// Pages of landmarks that the pool holds.
    pages: usize,
    /// The sequence of every page of landmarks, and which of its pages it is.
    owners: Vec<(usize, usize)>,
    /// The pages that lie behind the near ones, by place.
    held: Vec<Option<usize>>,
    /// Of every sequence: the slot of a chunk, -1 if it has none; the page of every LANDMARK_PAGE chunks.
    tables: Vec<Vec<i32>>,
    landmark_pages: Vec<Vec<usize>>,
    /// Sequences and chunks that the tables on the device are for: that of chunks, those of landmarks.
    shown: [Option<(Range<usize>, usize)>; 2],
    gathered: u64,
    evicted: u64,
}

/// What there is room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Room {
    slots: usize,
    pages: usize,
}

/// Bytes that chunks need at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Least {
    pub slots: usize,
    pub landmarks: usize,
    pub tables: usize,
}

impl Least {
    pub fn bytes(&self) -> usize {
        self.slots + self.landmarks + self.tables
    }
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
    /// That is too little; so much is needed.
    pub fn new(geometry: Geometry, per_token: usize, sequences: usize, left: usize) -> Result<Pools, Least> {
        let p = Pools {
            geometry,
            per_token,
            left,
            slots: Slots::new(0),
            pages: 0,
            owners: vec![],
            held: vec![],
            tables: vec![vec![]; sequences],
            landmark_pages: vec![vec![]; sequences],
            shown: [None, None],
            gathered: 0,
            evicted: 0,
        };
        p.room(LANDMARK_PAGE).map(|_| p)
    }

    /// The first slots and pages.
    pub fn begin(&mut self, m: &mut Machine) -> Result<(), SessionError> {
        let sequences = self.tables.len();
        let room = self.room(LANDMARK_PAGE).expect("BUG: `new` looked");
        self.resize_slots(m, (self.per_token * sequences).max(16).min(room.slots), &[])?;
        self.resize_pages(m, sequences.min(room.pages), &[])
    }

    /// What there is room for beside tables of `c` entries a sequence.
    fn room(&self, c: usize) -> Result<Room, Least> {
        let (slot, page, n) = (slot_bytes(self.geometry), page_bytes(self.geometry), self.tables.len());
        let least = Least { slots: self.per_token * n * slot, landmarks: page, tables: table_bytes(n, c) };
        let Some(spare) = self.left.checked_sub(least.bytes()) else { return Err(least) };
        let most = i32::MAX as usize;
        let pages = ((spare / page).min(self.left / LANDMARK_SHARE / page) + 1).min(most / LANDMARK_PAGE);
        Ok(Room { slots: ((self.left - least.tables - pages * page) / slot).min(most), pages })
    }

    /// Forgets all chunks.
    pub fn clear(&mut self) {
        self.slots = Slots::new(self.slots.len());
        self.owners.clear();
        self.held.clear();
        self.tables.iter_mut().for_each(Vec::clear);
        self.landmark_pages.iter_mut().for_each(Vec::clear);
        self.shown = [None, None];
    }

    pub fn residency(&self) -> Residency {
        let c = self.shown.iter().flatten().map(|(s, c)| table_bytes(s.len(), *c)).max().unwrap_or(0);
        Residency {
            slots: self.slots.len(),
            resident: self.slots.resident(),
            gathered: self.gathered,
            evicted: self.evicted,
            landmark_pages: self.pages,
            landmark_parts: self.parts(0..self.tables.len()),
            bytes: self.slots.len() * slot_bytes(self.geometry) + self.pages * page_bytes(self.geometry) + c,
        }
    }

    /// Entries of the tables of sequences: few numbers bind few plans, and make whole pages of landmarks.
    pub fn entries(&self, seqs: Range<usize>) -> usize {
        self.tables[seqs].iter().map(Vec::len).max().unwrap_or(0).max(LANDMARK_PAGE).next_power_of_two()
    }

    /// The sizes of the upper half's run over tables of `c` entries.
    pub fn sizes(&self, n: usize, rows: usize, c: usize) -> [(&'static str, usize); 6] {
        let away = usize::from(self.away());
        let pools = [(KV_SLOTS, self.slots.len()), (LANDMARK_PAGES, self.pages), (LANDMARKS_AWAY, away)];
        let [slots, pages, away] = pools;
        [("N", n), ("L", rows), ("C", c), slots, pages, away]
    }

    /// Tokens of each of `n` sequences whose choices always have slots, `l` at most.
    pub fn rows(&self, n: usize, l: usize) -> usize {
        let all = self.slots.resident() == self.chunks();
        if all { l } else { (self.slots.len() / (self.per_token * n)).clamp(1, l) }
    }

    /// Every chunk has a slot, and its landmark is there.
    pub fn whole(&self) -> bool {
        self.slots.resident() == self.chunks() && !self.away()
    }

    /// Chunks of all sequences.
    fn chunks(&self) -> usize {
        self.tables.iter().map(Vec::len).sum()
    }

    /// Not all landmarks are on the device.
    fn away(&self) -> bool {
        self.owners.len() > self.pages
    }
    /// Places of the pool through which the others go.
    fn passing(&self) -> usize {
        if self.away() { (self.pages / LANDMARK_SHARE).max(1) } else { 0 }
    }
    /// Pages that stay.
    fn near(&self) -> usize {
        self.pages - self.passing()
    }
    /// Of each of `seqs`: its near pages, and the number of its first other one among those of all.
    fn split(&self, seqs: Range<usize>) -> (Vec<(usize, usize)>, usize) {
        let (near, mut others) = (self.near(), 0);
        let of = |pages: &Vec<usize>| {
            let stay = pages.partition_point(|&g| g < near);
            let first = others;
            others += pages.len() - stay;
            (stay, first)
        };
        let all = self.landmark_pages[seqs].iter().map(of).collect();
        (all, others)
    }
    /// Parts in which the landmarks of `seqs` come; 0: those of all sequences are there.  Where others' are not there is one at least,
    /// which may bring nothing: sequences share their records, and these stop at parts.
    fn parts(&self, seqs: Range<usize>) -> usize {
        if self.away() { self.split(seqs).1.div_ceil(self.passing()).max(1) } else { 0 }
    }

    fn dtype(&self) -> DType {
        match self.geometry.precision {
            Precision::Bf16 => DType::BF16,
            Precision::F32 => DType::F32,
        }
    }

    /// Makes the pool of slots of another size; what was there is gone.
    fn resize_slots(&mut self, m: &mut Machine, slots: usize, sequences: &[Sequence]) -> Result<(), SessionError> {
        let Geometry { heads, chunk, dim, .. } = self.geometry;
        let ty = ConcreteTy { dtype: self.dtype(), shape: vec![slots, chunk, heads, dim] };
        // Never the old ones beside the new.
        ["k", "v"].into_iter().try_for_each(|name| m.remove(name))?;
        ["k", "v"].into_iter().try_for_each(|name| m.allocate(name, &ty))?;
        self.slots = Slots::new(slots);
        self.tables.iter_mut().for_each(|t| t.fill(-1));
        self.shown[0] = None;
        self.bring_all(m, sequences)
    }

    /// Brings every chunk, if all have room.
    fn bring_all(&mut self, m: &mut Machine, sequences: &[Sequence]) -> Result<(), SessionError> {
        if self.chunks() > self.slots.len() {
            return Ok(());
        }
        self.slots.begin();
        for seq in 0..self.tables.len() {
            for chunk in 0..self.tables[seq].len() {
                if self.tables[seq][chunk] < 0 {
                    self.bring(m, seq, chunk, sequences)?;
                    self.shown[0] = None;
                }
            }
        }
        Ok(())
    }

    /// Makes the pool of landmarks of another size and fills it again.
    fn resize_pages(&mut self, m: &mut Machine, pages: usize, sequences: &[Sequence]) -> Result<(), SessionError> {
        let Geometry { heads, landmark_dim, .. } = self.geometry;
        self.pages = pages;
        self.held.clear();
        m.remove("landmarks")?;
        let shape = vec![pages, LANDMARK_PAGE, heads, landmark_dim];
        m.allocate("landmarks", &ConcreteTy { dtype: self.dtype(), shape })?;
        for (seq, x) in sequences.iter().enumerate() {
            self.bring_near(m, seq, 0..self.tables[seq].len(), x)?;
        }
        Ok(())
    }

    /// Brings landmarks of chunks whose pages stay.
    fn bring_near(&self, m: &mut Machine, seq: usize, chunks: Range<usize>, x: &Sequence) -> Result<(), SessionError> {
        let near = self.near();
        for page in chunks.start / LANDMARK_PAGE..chunks.end.div_ceil(LANDMARK_PAGE) {
            let place = self.landmark_pages[seq][page];
            let of_page = page * LANDMARK_PAGE..(page + 1) * LANDMARK_PAGE;
            let chunks = chunks.start.max(of_page.start)..chunks.end.min(of_page.end);
            if place < near && !chunks.is_empty() {
                bring_landmarks(m, place, chunks, x)?;
            }
        }
        Ok(())
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
                    store.raw(part, chunk..chunk + 1, &mut rows);
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

    /// Chunks were added to the store of `seq`.
    ///
    /// # Errors
    /// No room for the tables; the device or the store fails.
    pub fn appended(
        &mut self,
        m: &mut Machine,
        seq: usize,
        sequences: &[Sequence],
        too_few: impl FnOnce(Least) -> SessionError,
    ) -> Result<(), SessionError> {
        let (had, have) = (self.tables[seq].len(), store_of(&sequences[seq]).chunks());
        self.tables[seq].resize(have, -1);
        // What was there of the page that grew is no longer all of it.
        if let Some(&last) = self.landmark_pages[seq].last() {
            self.held.iter_mut().filter(|h| **h == Some(last)).for_each(|h| *h = None);
        }
        while self.landmark_pages[seq].len() * LANDMARK_PAGE < have {
            self.landmark_pages[seq].push(self.owners.len());
            self.owners.push((seq, self.landmark_pages[seq].len() - 1));
            self.shown[1] = None;
        }
        let room = self.room(self.entries(0..self.tables.len())).map_err(too_few)?;
        let all = self.chunks();
        if self.slots.len() > room.slots || all > self.slots.len() && self.slots.len() < room.slots {
            self.resize_slots(m, all.next_power_of_two().min(room.slots), sequences)?;
        } else {
            self.bring_all(m, sequences)?;
        }
        let pages = self.owners.len();
        if self.pages > room.pages || pages > self.pages && self.pages < room.pages {
            return self.resize_pages(m, (2 * self.pages).max(pages).min(room.pages), sequences);
        }
        self.bring_near(m, seq, had..have, &sequences[seq])
    }

    /// Gives the device the tables of `seqs`, of `c` chunks each.
    pub fn show(&mut self, m: &mut Machine, seqs: Range<usize>, c: usize) -> Result<(), SessionError> {
        let now = Some((seqs.clone(), c));
        if self.shown[0] != now {
            let mut all = vec![-1; seqs.len() * c];
            for (row, t) in all.chunks_exact_mut(c).zip(&self.tables[seqs.clone()]) {
                row[..t.len()].copy_from_slice(t);
            }
            m.set(CHUNK_TABLE, &bytes_i32(&[seqs.len(), c], &all))?;
            self.shown[0] = now.clone();
        }
        if self.shown[1] != now {
            self.show_landmarks(m, seqs, c, 0)?;
            self.shown[1] = now;
        }
        Ok(())
    }

    /// Says which landmarks are there: the near ones in the first part, and those of a part.  Returns the pages that pass through
    /// the pool in this part, in their places.
    fn show_landmarks(
        &self,
        m: &mut Machine,
        seqs: Range<usize>,
        c: usize,
        part: usize,
    ) -> Result<Vec<usize>, SessionError> {
        let (width, passing, near) = (c / LANDMARK_PAGE, self.passing(), self.near());
        let (mut table, mut window, mut pass) = (vec![-1; seqs.len() * width], vec![], vec![]);
        let of_part = part * passing..(part + 1) * passing;
        for ((stay, first), (row, pages)) in self
            .split(seqs.clone())
            .0
            .into_iter()
            .zip(table.chunks_exact_mut(width).zip(&self.landmark_pages[seqs.clone()]))
        {
            let others = &pages[stay..];
            let from = of_part.start.saturating_sub(first).min(others.len());
            let to = of_part.end.saturating_sub(first).min(others.len());
            if part == 0 {
                row[..stay].iter_mut().zip(pages).for_each(|(at, &g)| *at = g as i32);
            }
            for (at, &g) in row[stay + from..stay + to].iter_mut().zip(&others[from..to]) {
                *at = (near + pass.len()) as i32;
                pass.push(g);
            }
            // Behind the first part, a sequence of which nothing is there goes on from what was found.
            let none = part > 0 && from == to;
            window.extend(if none {
                [1, 1]
            } else {
                [if part == 0 { 0 } else { stay + from } as i32, (stay + to) as i32]
            });
        }
        m.set(LANDMARK_TABLE, &bytes_i32(&[seqs.len(), width], &table))?;
        m.set(LANDMARK_WINDOW, &bytes_i32(&[seqs.len(), 2], &window))?;
        Ok(pass)
    }

    /// Brings a part of the landmarks that do not stay.
    fn pass(
        &mut self,
        m: &mut Machine,
        seqs: Range<usize>,
        c: usize,
        sequences: &[Sequence],
        part: usize,
    ) -> Result<(), SessionError> {
        let near = self.near();
        let pages = self.show_landmarks(m, seqs, c, part)?;
        // The next run begins with the first part.
        self.shown[1] = None;
        self.held.resize(self.passing(), None);
        for (at, g) in pages.into_iter().enumerate() {
            if self.held[at] == Some(g) {
                continue;
            }
            self.held[at] = None;
            let (seq, page) = self.owners[g];
            let last = ((page + 1) * LANDMARK_PAGE).min(self.tables[seq].len());
            bring_landmarks(m, near + at, page * LANDMARK_PAGE..last, &sequences[seq])?;
            self.held[at] = Some(g);
        }
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

/// Brings what a run over the chunks of `seqs` reads, as it goes on.
pub(super) struct Bringing<'a> {
    pub pools: &'a mut Pools,
    pub seqs: Range<usize>,
    /// Entries of the tables.
    pub c: usize,
    pub sequences: &'a [Sequence],
    /// What failed beside the device: the run goes on over what is there, and then fails.
    pub failed: Option<SessionError>,
}

impl Bringing<'_> {
    fn note(&mut self, done: Result<(), SessionError>) -> Result<(), GpuError> {
        match done {
            Err(SessionError::Gpu(e)) => Err(e),
            Err(other) => {
                self.failed.get_or_insert(other);
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

impl Pager for Bringing<'_> {
    fn parts(&self) -> usize {
        self.pools.parts(self.seqs.clone())
    }
    fn landmarks(&mut self, m: &mut Machine, part: usize) -> Result<(), GpuError> {
        let done = self.pools.pass(m, self.seqs.clone(), self.c, self.sequences, part);
        self.note(done)
    }
    fn chosen(&mut self, m: &mut Machine, indices: &[i32], count: &[i32]) -> Result<(), GpuError> {
        let done = self.pools.gather(m, self.seqs.clone(), self.c, self.sequences, indices, count);
        self.note(done)
    }
}

/// Bytes of the tables of `n` sequences.
fn table_bytes(n: usize, c: usize) -> usize {
    n * (c + c / LANDMARK_PAGE + 2) * 4
}

/// Puts landmarks of one page into a place of the pool.
fn bring_landmarks(m: &mut Machine, place: usize, chunks: Range<usize>, x: &Sequence) -> Result<(), SessionError> {
    let store = store_of(x);
    let (first, n, mut rows) = (chunks.start, chunks.len(), vec![]);
    store.raw(Part::Landmarks, chunks, &mut rows);
    m.write("landmarks", (place * LANDMARK_PAGE + first % LANDMARK_PAGE) * (rows.len() / n), &rows)?;
    store.failure().map_or(Ok(()), |e| Err(e.into()))
}

fn store_of(x: &Sequence) -> &ChunkStore {
    x.chunks.as_ref().expect("BUG: halves have stores")
}
