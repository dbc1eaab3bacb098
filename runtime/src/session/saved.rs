//! What a sequence in a file needs to go on later: `FILE.state` beside the chunks of `FILE`, a safetensors file.
//!
//! It holds the rows that wait for their chunk and the scan states, and in its metadata where the sequence stands, a number of
//! the weights, the sum of the chunks, and a seal over all of these.  Invariants: it is replaced by renaming, after the
//! chunks that it speaks of are on the disk; nothing of a damaged file is used.

use super::{Sequence, Session, SessionError};
use crate::checkpoint::{TensorFile, TensorRef, write_safetensors};
use crate::chunk_store::{ChunkStore, Geometry, StoreError};
use crate::store::Store;
use crate::tensor::{Data, Tensor};
use std::path::{Path, PathBuf};

/// Keys of the numbers in the metadata; the seal is another.
const NUMBERS: [&str; 4] = ["position", "chunks", "weights", "sum"];
const SEAL: &str = "seal";

impl Session {
    /// Writes what a sequence in a file needs to go on later beside its file; whole or not at all.
    ///
    /// # Errors
    /// A full disk, or what else the system refuses.
    pub fn save(&mut self) -> Result<(), SessionError> {
        let x = &mut self.sequences[0];
        let Some(chunks) = &mut x.chunks else { return Ok(()) };
        let Some(path) = chunks.path().map(Path::to_path_buf) else { return Ok(()) };
        // The state speaks of chunks: they must be there first.
        chunks.flush()?;
        let shape = [x.waiting.len() / self.hidden_size, self.hidden_size];
        let states = self.engine.states()?;
        let mut tensors = vec![TensorRef::f32("waiting", &shape, &x.waiting)];
        let floats = |t| Tensor::as_f32(t).expect("BUG: states are floats");
        tensors.extend(states.iter().map(|(name, t)| TensorRef::f32(name.as_str(), &t.shape, floats(t))));
        let numbers = [x.position as u64, chunks.chunks() as u64, self.fingerprint, chunks.sum()];
        let sealed = states.iter().map(|(name, t)| (name.as_str(), floats(t)));
        let seal = seal(numbers, sealed.chain([("waiting", x.waiting.as_slice())]));
        let mut about: Vec<(&str, String)> = NUMBERS.into_iter().zip(numbers.map(|n| n.to_string())).collect();
        about.push((SEAL, seal.to_string()));
        let about: Vec<(&str, &str)> = about.iter().map(|(k, v)| (*k, v.as_str())).collect();
        let (target, new) = (state_path(&path), state_path(&path).with_extension("state.new"));
        let renamed = || {
            std::fs::rename(&new, &target).map_err(StoreError::io(&target, "put the new state here"))?;
            Ok(())
        };
        let written = write_safetensors(&new, &tensors, &about).map_err(StoreError::from).and_then(|()| renamed());
        if let Err(e) = written {
            // Gives back the space, which may be what was lacking; the error to report is the first one.
            let _ = std::fs::remove_file(&new);
            return Err(e.into());
        }
        chunks.keep();
        Ok(())
    }

    /// Takes up what [`save`](Self::save) left.
    pub(super) fn resume(&mut self, path: &Path, geometry: Geometry) -> Result<(), SessionError> {
        let state = state_path(path);
        if let Err(e) = path.metadata() {
            return Err(StoreError::io(path, "open it")(e).into());
        }
        if !state.exists() {
            let reason = format!(
                "its sequence is lost: {} is not beside it; whoever wrote it was killed, or it was copied alone.  Start a \
                 new one",
                state.display()
            );
            return Err(StoreError::State { path: path.into(), reason }.into());
        }
        let file = TensorFile::open(&state).map_err(StoreError::from)?;
        let wrong = |reason: &str| StoreError::State { path: state.clone(), reason: reason.into() };
        let number = |key: &str| -> Result<u64, StoreError> {
            let value = file.metadata().get(key).and_then(|v| v.parse().ok());
            value.ok_or_else(|| wrong("it does not say where the sequence stands: it is no state of a chunk store"))
        };
        let [position, stored, weights, sum] = NUMBERS.map(number);
        let numbers = [position?, stored?, weights?, sum?];
        let [position, stored, weights, sum] = numbers;
        if weights != self.fingerprint {
            return Err(StoreError::Weights { path: path.into() }.into());
        }
        let (position, stored) = (position as usize, stored as usize);
        let mut read = vec![];
        for (name, t) in self.engine.states()? {
            let (shape, data) = file.get_f32(&name).map_err(StoreError::from)?;
            if shape != t.shape {
                return Err(wrong("a state of another shape: it was made by another model").into());
            }
            read.push((name, shape, data));
        }
        let (_, waiting) = file.get_f32("waiting").map_err(StoreError::from)?;
        let sealed = read.iter().map(|(name, _, data)| (name.as_str(), data.as_slice()));
        if number(SEAL)? != seal(numbers, sealed.chain([("waiting", waiting.as_slice())])) {
            return Err(StoreError::Damaged { path: state }.into());
        }
        let rows = position.checked_sub(stored.saturating_mul(self.chunk_size));
        if rows.is_none_or(|r| r >= self.chunk_size || r * self.hidden_size != waiting.len()) {
            return Err(wrong("its position and its chunks contradict each other").into());
        }
        let mut chunks = ChunkStore::open(path, geometry, stored)?;
        self.pool.install(|| chunks.verify(sum))?;
        for (name, shape, data) in read {
            self.engine.set_state(&name, Tensor::f32(&shape, data))?;
        }
        self.sequences.push(Sequence { chunks: Some(chunks), waiting, position });
        Ok(())
    }
}

/// The file beside a store's that holds the rest of its sequence.
fn state_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".state");
    name.into()
}

/// FNV-1a over words, names and bits of floats.
struct Hash(u64);

impl Hash {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
    fn word(&mut self, x: u64) {
        self.0 = (self.0 ^ x).wrapping_mul(0x0100_0000_01b3);
    }
    fn name(&mut self, name: &str) {
        name.bytes().for_each(|b| self.word(b.into()));
    }
    fn floats(&mut self, v: &[f32]) {
        v.iter().for_each(|x| self.word(x.to_bits().into()));
    }
}

/// A number that another state would hardly have.
fn seal<'a>(numbers: [u64; 4], tensors: impl Iterator<Item = (&'a str, &'a [f32])>) -> u64 {
    let mut h = Hash::new();
    numbers.into_iter().for_each(|n| h.word(n));
    for (name, data) in tensors {
        h.name(name);
        h.floats(data);
    }
    h.0
}

/// A number that other weights would hardly have.
pub(super) fn fingerprint(params: &Store) -> u64 {
    let mut h = Hash::new();
    for (name, t) in &params.0 {
        h.name(name);
        match &t.data {
            Data::F32(v) => h.floats(v),
            Data::Bf16(v) => v.iter().for_each(|x| h.word(x.to_bits().into())),
            Data::I32(_) | Data::Bool(_) => panic!("BUG: {name} is no weight"),
        }
    }
    h.0
}
