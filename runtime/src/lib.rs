//! Runs Programs: the CPU device, tensors and the store, the executor, checkpoints, the executable file.

pub mod bf16_data;
pub mod checkpoint;
pub mod chunk_store;
pub mod cpu;
pub mod executable;
pub mod executor;
pub mod gpu;
pub mod huge_pages;
pub mod session;
pub mod store;
pub mod tensor;
pub mod trainer;
pub mod trainer_gpu;

pub use bf16_data::Bf16Data;
pub use executable::Executable;
pub use executor::{ExecError, Executor};
pub use session::{Session, SessionError, SessionGraphs, SessionOptions, SessionParts, Tier};
pub use store::Store;
pub use tensor::{Tensor, TensorRef};
pub use trainer::{MicroBatch, StepReport, TrainError, Trainer};
