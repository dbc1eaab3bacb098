//! A sequence whose chunks lie in a file: what goes beside it, so that it can go on later.

use super::{Sequence, Session, SessionError};
use crate::checkpoint::{TensorFile, TensorRef as Saved, write_safetensors};
use crate::chunk_store::{ChunkStore, Geometry, StoreError};
use crate::store::Store;
use crate::tensor::{Data, Tensor};
use std::path::{Path, PathBuf};

impl Session {
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
        let states = self.engine.states()?;
        let mut tensors = vec![Saved::f32("waiting", &shape, &x.waiting)];
        for (name, t) in &states {
            tensors.push(Saved::f32(name.as_str(), &t.shape, t.as_f32().expect("BUG: states are floats")));
        }
        let about = [
            ("position", x.position.to_string()),
            ("chunks", chunks.chunks().to_string()),
            ("weights", self.fingerprint.to_string()),
        ];
        let about: Vec<(&str, &str)> = about.iter().map(|(k, v)| (*k, v.as_str())).collect();
        let (target, new) = (state_path(path), state_path(path).with_extension("state.new"));
        write_safetensors(&new, &tensors, &about).map_err(StoreError::from)?;
        std::fs::rename(&new, &target)
            .map_err(|source| StoreError::Io { path: target.clone(), action: "put the new state here", source }.into())
    }

    pub(super) fn resume(&mut self, path: &Path, geometry: Geometry) -> Result<(), SessionError> {
        let state = state_path(path);
        let file = TensorFile::open(&state).map_err(StoreError::from)?;
        let wrong = |reason: &str| StoreError::State { path: state.clone(), reason: reason.into() };
        let number = |key: &str| -> Result<u64, StoreError> {
            let value = file.metadata().get(key).and_then(|v| v.parse().ok());
            value.ok_or_else(|| wrong("it does not say where the sequence stands: it is no state of a chunk store"))
        };
        if number("weights")? != self.fingerprint {
            return Err(StoreError::Weights { path: path.into() }.into());
        }
        let (position, stored) = (number("position")? as usize, number("chunks")? as usize);
        for (name, t) in self.engine.states()? {
            let (shape, data) = file.get_f32(&name).map_err(StoreError::from)?;
            if shape != t.shape {
                return Err(wrong("a state of another shape: it was made by another model").into());
            }
            self.engine.set_state(&name, Tensor::f32(&shape, data))?;
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

/// A number that other weights would hardly have: FNV-1a over names and bits.
pub(super) fn fingerprint(params: &Store) -> u64 {
    let mut h = 0xcbf2_9ce4_8422_2325u64;
    let mut mix = |x: u64| h = (h ^ x).wrapping_mul(0x0100_0000_01b3);
    for (name, t) in &params.0 {
        name.bytes().for_each(|b| mix(b.into()));
        match &t.data {
            Data::F32(v) => v.iter().for_each(|x| mix(x.to_bits().into())),
            Data::Bf16(v) => v.iter().for_each(|x| mix(x.to_bits().into())),
            Data::I32(_) | Data::Bool(_) => panic!("BUG: {name} is no weight"),
        }
    }
    h
}
