//! The chunk memory of a sequence: keys, values and landmarks of every whole chunk, in append-only pages.
//!
//! ```text
//! page of PAGE chunks:  landmarks [h][PAGE][r] | keys [PAGE][h][S][d] | values [PAGE][h][S][d]
//! ```
//! Pages are in memory, or in a file that is read as chunks are chosen, so that the resident memory of a process does
//! not grow with its context.  Elements are bf16 (rounded to nearest even) or f32.  Invariants: a chunk once appended
//! never changes; a failed append leaves what was there; nothing ever holds the whole memory as one array.  A file is
//! one process's at a time, and a sum over all that was appended tells whether it is still what it was.
//!
//! Deliberately absent: memory maps, under which a full disk or a truncated file kills the process.

mod error;
mod pages;

pub use error::StoreError;
use pages::Pages;
use rayon::prelude::*;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;

/// Chunks of a page.
const PAGE: usize = 256;

/// How elements are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    Bf16,
    F32,
}

impl Precision {
    pub fn bytes(self) -> usize {
        match self {
            Precision::Bf16 => 2,
            Precision::F32 => 4,
        }
    }
    fn name(self) -> &'static str {
        match self {
            Precision::Bf16 => "bf16",
            Precision::F32 => "f32",
        }
    }
}

/// What a chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Heads of keys, values and landmarks.
    pub heads: usize,
    /// Tokens of a chunk.
    pub chunk: usize,
    /// Width of a key or value of one head.
    pub dim: usize,
    /// Width of a landmark of one head.
    pub landmark_dim: usize,
    pub precision: Precision,
}

impl Geometry {
    /// Elements of all landmarks, and of all keys, of a page.
    fn parts(&self) -> (usize, usize) {
        (self.heads * PAGE * self.landmark_dim, PAGE * self.heads * self.chunk * self.dim)
    }
    /// Elements of a page.
    fn page(&self) -> usize {
        let (landmarks, keys) = self.parts();
        landmarks + 2 * keys
    }
    /// Bytes of one chunk.
    pub fn chunk_bytes(&self) -> usize {
        self.page() / PAGE * self.precision.bytes()
    }
}

/// What is read of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Keys,
    Values,
    Landmarks,
}

/// See the module's comment.
pub struct ChunkStore {
    geometry: Geometry,
    chunks: usize,
    pages: Pages,
    /// Of every piece that was appended, see [`piece`].
    sum: u64,
    /// Bytes on their way to a page.
    buffer: Vec<u8>,
    /// The first failed read since it was last asked for.
    failed: Mutex<Option<io::Error>>,
}

impl ChunkStore {
    /// An empty store in memory.
    pub fn ram(geometry: Geometry) -> Self {
        Self::over(geometry, Pages::ram(geometry), 0)
    }

    /// An empty store in a new file, which goes with the store unless that is [kept](Self::keep).
    ///
    /// # Errors
    /// A file that is there already, or can't be made.
    pub fn create(path: &Path, geometry: Geometry) -> Result<Self, StoreError> {
        Ok(Self::over(geometry, Pages::create(path, geometry, false)?, 0))
    }

    /// As [`create`](Self::create), but the file has no name: it goes with its process, however that ends.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn scratch(path: &Path, geometry: Geometry) -> Result<Self, StoreError> {
        Ok(Self::over(geometry, Pages::create(path, geometry, true)?, 0))
    }

    /// The first `chunks` chunks of a file; what follows them will be overwritten.
    ///
    /// # Errors
    /// A file that is no store, of another geometry, shorter than it must be, or in use.
    pub fn open(path: &Path, geometry: Geometry, chunks: usize) -> Result<Self, StoreError> {
        Ok(Self::over(geometry, Pages::open(path, geometry, chunks)?, chunks))
    }

    fn over(geometry: Geometry, pages: Pages, chunks: usize) -> Self {
        Self { geometry, chunks, pages, sum: 0, buffer: vec![], failed: Mutex::new(None) }
    }

    pub fn geometry(&self) -> Geometry {
        self.geometry
    }
    /// Chunks stored.
    pub fn chunks(&self) -> usize {
        self.chunks
    }
    /// Bytes of the chunks stored, wherever they are.
    pub fn bytes(&self) -> usize {
        self.chunks * self.geometry.chunk_bytes()
    }
    /// The file, if it is one with a name.
    pub fn path(&self) -> Option<&Path> {
        self.pages.name()
    }
    /// A number that other contents of a file would not have.
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// Reads the whole file and compares it with the [`sum`](Self::sum) that it had, on the threads of the caller's pool.
    ///
    /// # Errors
    /// A file that can't be read, or whose contents have changed.
    pub fn verify(&mut self, sum: u64) -> Result<(), StoreError> {
        let path = || self.pages.path().unwrap_or(Path::new("memory"));
        let sums = (0..self.chunks.div_ceil(PAGE)).into_par_iter().map(|page| self.page_sum(page));
        let found = sums.try_reduce(|| 0, |a, b| Ok(a.wrapping_add(b)));
        if found.map_err(StoreError::io(path(), "read chunks of it"))? != sum {
            return Err(StoreError::Damaged { path: path().into() });
        }
        self.sum = sum;
        Ok(())
    }

    /// The sum of a page's pieces.
    fn page_sum(&self, page: usize) -> io::Result<u64> {
        let g = &self.geometry;
        let (first, n) = (page * PAGE, PAGE.min(self.chunks - page * PAGE));
        let landmarks = (0..g.heads).map(|head| (Part::Landmarks, head, n));
        let runs = landmarks.chain([(Part::Keys, 0, n * g.heads), (Part::Values, 0, n * g.heads)]);
        let mut sum = 0u64;
        for (part, head, pieces) in runs {
            let (at, size) = (self.place(part, head, first), self.piece(part));
            self.pages
                .read(page, at, pieces * size, |bytes| sum = sum.wrapping_add(pieces_sum(bytes, size, page, at)))?;
        }
        Ok(sum)
    }

    /// Bytes of a chunk's landmark, keys or values of one head.
    fn piece(&self, part: Part) -> usize {
        let g = &self.geometry;
        let elements = if part == Part::Landmarks { g.landmark_dim } else { g.chunk * g.dim };
        elements * g.precision.bytes()
    }

    /// Forgets everything.
    ///
    /// # Errors
    /// A file that can't be shortened.
    pub fn clear(&mut self) -> Result<(), StoreError> {
        (self.chunks, self.sum) = (0, 0);
        self.pages.clear()
    }

    /// Waits until everything appended is on the disk.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.pages.flush()
    }

    /// From now on a file with a name stays when the store goes.
    pub fn keep(&mut self) {
        self.pages.keep();
    }

    /// Adds whole chunks: `k`, `v` are `[chunks · S, h, d]`, `landmarks` `[chunks, h, r]`.
    ///
    /// # Errors
    /// A full disk; the chunks that were there stay.
    pub fn append(&mut self, k: &[f32], v: &[f32], landmarks: &[f32]) -> Result<(), StoreError> {
        let Geometry { heads, chunk, dim, landmark_dim, .. } = self.geometry;
        let (row, lines) = (heads * dim, heads * chunk * dim);
        let new = landmarks.len() / (heads * landmark_dim);
        assert!(k.len() == new * lines && v.len() == k.len(), "BUG: keys of other chunks than the landmarks");
        let (mut done, mut sum) = (0, self.sum);
        while done < new {
            let first = self.chunks + done;
            let n = (PAGE - first % PAGE).min(new - done);
            for head in 0..heads {
                let from =
                    (done..done + n).flat_map(|c| &landmarks[(c * heads + head) * landmark_dim..][..landmark_dim]);
                sum = sum.wrapping_add(self.write(Part::Landmarks, head, first, from)?);
            }
            for (part, x) in [(Part::Keys, k), (Part::Values, v)] {
                // From token-major to head-major within the chunk.
                let order = (done..done + n).flat_map(|c| (0..heads).map(move |h| (c, h)));
                let from =
                    order.flat_map(|(c, h)| (0..chunk).flat_map(move |t| &x[(c * chunk + t) * row + h * dim..][..dim]));
                sum = sum.wrapping_add(self.write(part, 0, first, from)?);
            }
            done += n;
        }
        (self.chunks, self.sum) = (self.chunks + new, sum);
        Ok(())
    }

    /// Writes consecutive elements from the place of a chunk's head on; their sum, where they go to a file.
    fn write<'a>(
        &mut self,
        part: Part,
        head: usize,
        chunk: usize,
        elements: impl Iterator<Item = &'a f32>,
    ) -> Result<u64, StoreError> {
        self.buffer.clear();
        match self.geometry.precision {
            Precision::F32 => self.buffer.extend(elements.flat_map(|x| x.to_le_bytes())),
            Precision::Bf16 => self.buffer.extend(elements.flat_map(|&x| half::bf16::from_f32(x).to_le_bytes())),
        }
        let (page, at) = (chunk / PAGE, self.place(part, head, chunk));
        self.pages.write(page, at, &self.buffer)?;
        Ok(self.pages.path().map_or(0, |_| pieces_sum(&self.buffer, self.piece(part), page, at)))
    }

    /// Byte of a chunk's head in its page.
    fn place(&self, part: Part, head: usize, chunk: usize) -> usize {
        let g = &self.geometry;
        let (landmarks, keys) = g.parts();
        let of_chunk = |c: usize| (c * g.heads + head) * g.chunk * g.dim;
        let element = match part {
            Part::Landmarks => (head * PAGE + chunk % PAGE) * g.landmark_dim,
            Part::Keys => landmarks + of_chunk(chunk % PAGE),
            Part::Values => landmarks + keys + of_chunk(chunk % PAGE),
        };
        element * g.precision.bytes()
    }

    /// Reads chunks `first..first + n` of a head, row after row, as f32; zeros where the file fails, see
    /// [`failure`](Self::failure).
    pub fn read(&self, part: Part, head: usize, first: usize, n: usize, out: &mut [f32]) {
        let g = &self.geometry;
        // Landmarks of a head lie side by side in a page; keys only chunk by chunk.
        let (run, size) = match part {
            Part::Landmarks => (PAGE, g.landmark_dim),
            _ => (1, g.chunk * g.dim),
        };
        let mut at = first;
        while at < first + n {
            let many = (run - at % run).min(first + n - at);
            let out = &mut out[(at - first) * size..][..many * size];
            // Beyond the last chunk there is nothing to read, and nobody who could see it.
            if at + many > self.chunks {
                out.fill(0.0);
                let there = self.chunks.saturating_sub(at);
                if there == 0 {
                    return;
                }
                self.fetch(part, head, at, &mut out[..there * size]);
            } else {
                self.fetch(part, head, at, out);
            }
            at += many;
        }
    }

    /// The bytes of chunks as they are stored, of all heads: rows `[S, h, d]` of keys or values a chunk, landmarks `[h, r]`;
    /// zeros where the file fails, see [`failure`](Self::failure).
    pub fn raw(&self, part: Part, chunks: Range<usize>, out: &mut Vec<u8>) {
        let g = &self.geometry;
        // Landmarks of a head lie side by side in a page; keys only chunk by chunk.
        let (run, rows, width) = match part {
            Part::Landmarks => (PAGE, 1, g.landmark_dim * g.precision.bytes()),
            _ => (1, g.chunk, g.dim * g.precision.bytes()),
        };
        out.clear();
        out.resize(chunks.len() * rows * g.heads * width, 0);
        let mut first = chunks.start;
        while first < chunks.end {
            let many = (run - first % run).min(chunks.end - first);
            let out = &mut out[(first - chunks.start) * rows * g.heads * width..];
            for head in 0..g.heads {
                let at = self.place(part, head, first);
                let read = self.pages.read(first / PAGE, at, many * rows * width, |bytes| {
                    for (t, row) in bytes.chunks_exact(width).enumerate() {
                        out[(t * g.heads + head) * width..][..width].copy_from_slice(row);
                    }
                });
                if let Err(e) = read {
                    self.failed.lock().unwrap_or_else(|p| p.into_inner()).get_or_insert(e);
                }
            }
            first += many;
        }
    }

    fn fetch(&self, part: Part, head: usize, chunk: usize, out: &mut [f32]) {
        let precision = self.geometry.precision;
        let at = self.place(part, head, chunk);
        let read = self.pages.read(chunk / PAGE, at, out.len() * precision.bytes(), |bytes| match precision {
            Precision::F32 => {
                for (y, x) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *y = f32::from_le_bytes(*x);
                }
            }
            Precision::Bf16 => {
                for (y, x) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *y = f32::from_bits(u32::from(u16::from_le_bytes(*x)) << 16);
                }
            }
        });
        if let Err(e) = read {
            self.failed.lock().unwrap_or_else(|p| p.into_inner()).get_or_insert(e);
        }
    }

    /// The first read that failed since the last call.
    pub fn failure(&self) -> Option<StoreError> {
        let e = self.failed.lock().unwrap_or_else(|p| p.into_inner()).take()?;
        Some(StoreError::io(self.pages.path().unwrap_or(Path::new("memory")), "read chunks of it")(e))
    }
}

/// The sum over pieces of `size` bytes, side by side from byte `at` of a page on: each piece's bytes and place, as FNV-1a
/// over words.  A change of one piece always changes it, and the order of pieces does not matter.
fn pieces_sum(bytes: &[u8], size: usize, page: usize, at: usize) -> u64 {
    let mix = |h: u64, x: u64| (h ^ x).wrapping_mul(0x0100_0000_01b3).rotate_left(29);
    let piece = |(i, bytes): (usize, &[u8])| {
        let place = mix(mix(0xcbf2_9ce4_8422_2325, page as u64), (at + i * size) as u64);
        let (words, rest) = bytes.as_chunks::<8>();
        let h = words.iter().fold(place, |h, w| mix(h, u64::from_le_bytes(*w)));
        rest.iter().fold(h, |h, &b| mix(h, b.into()))
    };
    bytes.chunks_exact(size.max(1)).enumerate().map(piece).fold(0, u64::wrapping_add)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + seed * 101) as f32 * 0.013).sin()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// What was appended in any pieces is read back, from memory as from a file, also a file opened again.
        #[test]
        fn reads_what_was_appended(
            heads in 1usize..4, chunk in 1usize..5, dim in 1usize..9, landmark_dim in 1usize..9,
            pieces in prop::collection::vec(1usize..300, 1..5), f32s: bool,
        ) {
            let precision = if f32s { Precision::F32 } else { Precision::Bf16 };
            let g = Geometry { heads, chunk, dim, landmark_dim, precision };
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("store");
            let mut stores = [ChunkStore::ram(g), ChunkStore::create(&path, g).unwrap()];
            let total: usize = pieces.iter().sum();
            let (k, v, lm) = (
                values(total * chunk * heads * dim, 1), values(total * chunk * heads * dim, 2), values(total * heads * landmark_dim, 3),
            );
            for s in &mut stores {
                let mut at = 0;
                for &n in &pieces {
                    let kv = at * chunk * heads * dim..(at + n) * chunk * heads * dim;
                    s.append(&k[kv.clone()], &v[kv], &lm[at * heads * landmark_dim..(at + n) * heads * landmark_dim]).unwrap();
                    at += n;
                }
                s.flush().unwrap();
                s.keep();
            }
            let [ram, file] = stores;
            let sum = file.sum();
            drop(file);
            let mut again = ChunkStore::open(&path, g, total).unwrap();
            again.verify(sum).unwrap();
            let round = |x: f32| if f32s { x } else { half::bf16::from_f32(x).to_f32() };
            for s in [&ram, &again] {
                prop_assert_eq!(s.chunks(), total);
                for head in 0..heads {
                    let (first, n) = (total / 3, total - total / 3);
                    let mut out = vec![f32::NAN; n * chunk * dim];
                    s.read(Part::Values, head, first, n, &mut out);
                    for (i, &x) in out.iter().enumerate() {
                        let (row, d) = (first * chunk + i / dim, i % dim);
                        prop_assert_eq!(x, round(v[(row * heads + head) * dim + d]));
                    }
                    let (mut raw, width) = (vec![], precision.bytes());
                    s.raw(Part::Keys, first..first + 1, &mut raw);
                    prop_assert_eq!(raw.len(), chunk * heads * dim * width);
                    for (i, b) in raw.chunks_exact(width).enumerate() {
                        let x = k[first * chunk * heads * dim + i];
                        let want = if f32s { x.to_le_bytes().to_vec() } else { half::bf16::from_f32(x).to_le_bytes().to_vec() };
                        prop_assert_eq!(b, &want[..]);
                    }
                    s.raw(Part::Landmarks, first..first + n, &mut raw);
                    for (i, b) in raw.chunks_exact(width).enumerate() {
                        let x = lm[first * heads * landmark_dim + i];
                        let want = if f32s { x.to_le_bytes().to_vec() } else { half::bf16::from_f32(x).to_le_bytes().to_vec() };
                        prop_assert_eq!(b, &want[..]);
                    }
                    let mut out = vec![f32::NAN; n * landmark_dim];
                    s.read(Part::Landmarks, head, first, n, &mut out);
                    for (i, &x) in out.iter().enumerate() {
                        prop_assert_eq!(x, round(lm[((first + i / landmark_dim) * heads + head) * landmark_dim + i % landmark_dim]));
                    }
                }
                prop_assert!(s.failure().is_none());
            }
        }
    }

    const SMALL: Geometry = Geometry { heads: 1, chunk: 2, dim: 4, landmark_dim: 4, precision: Precision::Bf16 };

    /// 300 chunks in a new file.
    fn filled(path: &Path) -> ChunkStore {
        let mut s = ChunkStore::create(path, SMALL).unwrap();
        s.append(&values(300 * 8, 1), &values(300 * 8, 2), &values(300 * 4, 3)).unwrap();
        s.flush().unwrap();
        s
    }

    fn kept(path: &Path) -> ChunkStore {
        let mut s = filled(path);
        s.keep();
        s
    }

    #[test]
    fn bad_files_are_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        drop(kept(&path));
        let message = |r: Result<ChunkStore, StoreError>| match r {
            Ok(_) => panic!("a bad file was taken"),
            Err(e) => e.to_string(),
        };
        assert!(message(ChunkStore::create(&path, SMALL)).contains("is there already"));
        let exact = Geometry { precision: Precision::F32, ..SMALL };
        assert!(message(ChunkStore::open(&path, exact, 300)).contains("--store-dtype bf16"), "precision");
        let other = Geometry { dim: 8, ..SMALL };
        assert!(message(ChunkStore::open(&path, other, 300)).contains("another model"), "geometry");
        assert!(message(ChunkStore::open(&path, SMALL, 600)).contains("torn"));
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert!(message(ChunkStore::open(&path, SMALL, 300)).contains("torn"));
        std::fs::write(&path, b"nothing").unwrap();
        assert!(message(ChunkStore::open(&path, SMALL, 1)).contains("no chunk store"));
        assert!(message(ChunkStore::open(&dir.path().join("absent"), SMALL, 1)).contains("absent"));
    }

    /// A byte changed in any part of any page, a page that never reached the disk, and no change at all.
    #[test]
    fn damage_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let s = kept(&path);
        let (sum, whole) = (s.sum(), std::fs::read(&path).unwrap());
        drop(s);
        let verify = || ChunkStore::open(&path, SMALL, 300).unwrap().verify(sum);
        verify().unwrap();
        let header = whole.len() - 2 * SMALL.page() * 2 + (PAGE * 2 - 300) * 16;
        // Landmarks, keys and values of the first page, and of the second.
        for at in [0, 2047, 2048, 6143, 6144, 10239, 10240, 10240 + 44 * 8 - 1, whole.len() - header - 1] {
            let mut damaged = whole.clone();
            damaged[header + at] ^= 0x40;
            std::fs::write(&path, &damaged).unwrap();
            assert!(verify().unwrap_err().to_string().contains("damaged"), "byte {at}");
        }
        let mut hole = whole.clone();
        hole[header..header + 4096].fill(0);
        std::fs::write(&path, &hole).unwrap();
        assert!(verify().is_err());
        // What lies behind the last chunk is nobody's.
        std::fs::write(&path, &whole).unwrap();
        let mut s = ChunkStore::open(&path, SMALL, 300).unwrap();
        s.append(&values(8, 1), &values(8, 2), &values(4, 3)).unwrap();
        drop(s);
        verify().unwrap();
    }

    #[test]
    fn what_is_not_kept_goes_and_one_process_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        drop(filled(&path));
        assert!(!path.exists());
        let s = kept(&path);
        let locked = ChunkStore::open(&path, SMALL, 300).map(drop).unwrap_err().to_string();
        assert!(locked.contains("another process"), "{locked}");
        drop(s);
        assert!(ChunkStore::open(&path, SMALL, 300).is_ok() && path.exists());
        std::fs::remove_file(&path).unwrap();
        let mut s = ChunkStore::scratch(&path, SMALL).unwrap();
        s.append(&values(8, 1), &values(8, 2), &values(4, 3)).unwrap();
        assert!(!path.exists() && s.path().is_none());
        let mut out = vec![0.0; 8];
        s.read(Part::Values, 0, 0, 1, &mut out);
        assert_eq!(out[3], half::bf16::from_f32(values(8, 2)[3]).to_f32());
        assert!(s.failure().is_none());
    }

    /// A file that is shortened under a running process is an error of the next read, not a crash.
    #[test]
    fn a_file_shortened_meanwhile_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let s = filled(&path);
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(5000).unwrap();
        let mut out = vec![1.0; 8];
        s.read(Part::Values, 0, 299, 1, &mut out);
        assert!(s.failure().unwrap().to_string().contains("store"));
        assert!(s.failure().is_none());
    }

    /// `/dev/full` refuses every write as a full disk does.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_keeps_what_was_stored() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let mut s = kept(&path);
        let (before, sum) = (s.chunks(), s.sum());
        s.pages = Pages::over(Path::new("/dev/full"), SMALL).unwrap();
        let e = s.append(&values(8, 1), &values(8, 2), &values(4, 3)).unwrap_err().to_string();
        assert!(e.contains("/dev/full") && e.contains("space"), "{e}");
        assert_eq!((s.chunks(), s.sum()), (before, sum));
        let again = ChunkStore::open(&path, SMALL, before).unwrap();
        let mut out = vec![0.0; 8];
        again.read(Part::Keys, 0, 299, 1, &mut out);
        assert_eq!(out[0], half::bf16::from_f32(values(300 * 8, 1)[299 * 8]).to_f32());
    }
}
