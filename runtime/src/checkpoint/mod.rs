//! Weights and checkpoints on disk: reading safetensors, and writing folders that are whole or absent.
//!
//! - [`TensorFile`]: one safetensors file, mapped, every offset checked before use;
//! - [`WeightsFolder`]: config.json and weights, in one file or sharded, as published models come;
//! - [`CheckpointDir`]: a training run's checkpoints, written atomically, with `latest` pointing at the newest;
//! - [`Checkpoint`]: one of them, read back.
//!
//! Files are mapped and must not be changed in place while open; everything written here only ever appears by rename.

mod error;
mod folder;
mod safetensors_io;
mod weights;

pub use error::{CheckpointError, Mismatch};
pub use folder::{Checkpoint, CheckpointDir, Snapshot, latest};
pub use safetensors_io::{Data, Dtype, TensorFile, TensorInfo, TensorRef, write_safetensors};
pub use weights::WeightsFolder;
