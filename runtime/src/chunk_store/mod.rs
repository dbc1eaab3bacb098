//! The chunk memory of a sequence: keys, values and landmarks of every whole chunk, in append-only pages.
//!
//! ```text
//! page of PAGE chunks:  landmarks [h][PAGE][r] | keys [PAGE][h][S][d] | values [PAGE][h][S][d]
//! ```
//! Pages are in memory, or in a file that is read as chunks are chosen, so that the resident memory of a process does
//! not grow with its context.  Elements are bf16 (rounded to nearest even) or f32.  Invariants: a chunk once appended
//! never changes; a failed append leaves what was there; nothing ever holds the whole memory as one array.
//!
//! Deliberately absent: memory maps, under which a full disk or a truncated file kills the process.

mod error;
mod pages;

pub use error::StoreError;
use pages::Pages;
use std::io;
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

    /// An empty store in a new file.
    ///
    /// # Errors
    /// A file that is there already, or can't be made.
    pub fn create(path: &Path, geometry: Geometry) -> Result<Self, StoreError> {
        Ok(Self::over(geometry, Pages::create(path, geometry)?, 0))
    }

    /// The first `chunks` chunks of a file; what follows them will be overwritten.
    ///
    /// # Errors
    /// A file that is no store, of another geometry, or shorter than it must be.
    pub fn open(path: &Path, geometry: Geometry, chunks: usize) -> Result<Self, StoreError> {
        Ok(Self::over(geometry, Pages::open(path, geometry, chunks)?, chunks))
    }

    fn over(geometry: Geometry, pages: Pages, chunks: usize) -> Self {
        Self { geometry, chunks, pages, buffer: vec![], failed: Mutex::new(None) }
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
    /// The file, if it is one.
    pub fn path(&self) -> Option<&Path> {
        self.pages.path()
    }

    /// Forgets everything.
    ///
    /// # Errors
    /// A file that can't be shortened.
    pub fn clear(&mut self) -> Result<(), StoreError> {
        self.chunks = 0;
        self.pages.clear()
    }

    /// Waits until everything appended is on the disk.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.pages.flush()
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
        let mut done = 0;
        while done < new {
            let first = self.chunks + done;
            let n = (PAGE - first % PAGE).min(new - done);
            for head in 0..heads {
                let from =
                    (done..done + n).flat_map(|c| &landmarks[(c * heads + head) * landmark_dim..][..landmark_dim]);
                self.write(Part::Landmarks, head, first, from)?;
            }
            for (part, x) in [(Part::Keys, k), (Part::Values, v)] {
                // From token-major to head-major within the chunk.
                let order = (done..done + n).flat_map(|c| (0..heads).map(move |h| (c, h)));
                let from =
                    order.flat_map(|(c, h)| (0..chunk).flat_map(move |t| &x[(c * chunk + t) * row + h * dim..][..dim]));
                self.write(part, 0, first, from)?;
            }
            done += n;
        }
        self.chunks += new;
        Ok(())
    }

    /// Writes consecutive elements from the place of a chunk's head on.
    fn write<'a>(
        &mut self,
        part: Part,
        head: usize,
        chunk: usize,
        elements: impl Iterator<Item = &'a f32>,
    ) -> Result<(), StoreError> {
        self.buffer.clear();
        match self.geometry.precision {
            Precision::F32 => self.buffer.extend(elements.flat_map(|x| x.to_le_bytes())),
            Precision::Bf16 => self.buffer.extend(elements.flat_map(|&x| half::bf16::from_f32(x).to_le_bytes())),
        }
        let at = self.place(part, head, chunk);
        self.pages.write(chunk / PAGE, at, &self.buffer)
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

    /// The bytes of a chunk as they are stored, of all heads: rows `[S, h, d]` of keys or values, the landmarks `[h, r]`;
    /// zeros where the file fails, see [`failure`](Self::failure).
    pub fn raw(&self, part: Part, chunk: usize, out: &mut Vec<u8>) {
        let g = &self.geometry;
        let (rows, width) = match part {
            Part::Landmarks => (1, g.landmark_dim * g.precision.bytes()),
            _ => (g.chunk, g.dim * g.precision.bytes()),
        };
        out.clear();
        out.resize(rows * g.heads * width, 0);
        for head in 0..g.heads {
            let at = self.place(part, head, chunk);
            let read = self.pages.read(chunk / PAGE, at, rows * width, |bytes| {
                for (t, row) in bytes.chunks_exact(width).enumerate() {
                    out[(t * g.heads + head) * width..][..width].copy_from_slice(row);
                }
            });
            if let Err(e) = read {
                self.failed.lock().unwrap_or_else(|p| p.into_inner()).get_or_insert(e);
            }
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
        Some(StoreError::io(self.path().unwrap_or(Path::new("memory")), "read chunks of it")(e))
    }
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
            }
            let again = ChunkStore::open(&path, g, total).unwrap();
            let round = |x: f32| if f32s { x } else { half::bf16::from_f32(x).to_f32() };
            for s in stores.iter().chain([&again]) {
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
                    s.raw(Part::Keys, first, &mut raw);
                    prop_assert_eq!(raw.len(), chunk * heads * dim * width);
                    for (i, b) in raw.chunks_exact(width).enumerate() {
                        let x = k[first * chunk * heads * dim + i];
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

    fn filled(path: &Path) -> ChunkStore {
        let mut s = ChunkStore::create(path, SMALL).unwrap();
        s.append(&values(300 * 8, 1), &values(300 * 8, 2), &values(300 * 4, 3)).unwrap();
        s
    }

    #[test]
    fn bad_files_are_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        filled(&path).flush().unwrap();
        let message = |r: Result<ChunkStore, StoreError>| match r {
            Ok(_) => panic!("a bad file was taken"),
            Err(e) => e.to_string(),
        };
        assert!(message(ChunkStore::create(&path, SMALL)).contains("is there already"));
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
        let mut s = filled(&path);
        let before = s.chunks();
        s.pages = Pages::over(Path::new("/dev/full"), SMALL).unwrap();
        let e = s.append(&values(8, 1), &values(8, 2), &values(4, 3)).unwrap_err().to_string();
        assert!(e.contains("/dev/full") && e.contains("space"), "{e}");
        assert_eq!(s.chunks(), before);
        let again = ChunkStore::open(&path, SMALL, before).unwrap();
        let mut out = vec![0.0; 8];
        again.read(Part::Keys, 0, 299, 1, &mut out);
        assert_eq!(out[0], half::bf16::from_f32(values(300 * 8, 1)[299 * 8]).to_f32());
    }
}
