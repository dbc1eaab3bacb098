//! Models: configurations, parameter names and initialisation, tokenisers, and the data they train on.
//!
//! Everything here is host-side and pure: a [`Config`] says what a model is, [`Config::parameters`] which tensors it
//! owns, [`Tokenizer`] how text becomes ids, and a [`data::Task`] what a training step sees.  No devices, no threads.

pub mod config;
pub mod data;
mod error;
pub mod mamba2;
pub mod params;
pub mod presets;
pub mod ramba;
pub mod recipe;
pub mod segment;
pub mod stack;
pub mod tokenizer;
pub mod variants;

pub use config::{Config, LayerKind, ModelType, Parsed, Problem};
pub use error::ModelError;
pub use params::{Init, InitRule, ParamSpec, canonical_name, init_tensor};
pub use presets::{Preset, preset};
pub use tokenizer::{DecodeStream, Tokenizer};
pub use variants::Attention;
