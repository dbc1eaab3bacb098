//! Several tasks as one: every row is drawn from one of them.

use super::Task;
use super::rng::stream;
use crate::error::ModelError;
use rand::Rng;
use std::sync::Arc;

/// Tasks with their shares, which need not add up to 1.
#[derive(Clone)]
pub struct MixTask {
    seed: u64,
    parts: Vec<(f64, Arc<dyn Task>)>,
}

impl MixTask {
    /// `parts` must not be empty and shares not negative.
    pub fn new(seed: u64, parts: Vec<(f64, Arc<dyn Task>)>) -> Result<Self, ModelError> {
        let total: f64 = parts.iter().map(|p| p.0).sum();
        if parts.iter().any(|p| p.0 < 0.0) || total.is_nan() || total <= 0.0 || total.is_infinite() {
            let value = format!("{:?}", parts.iter().map(|p| p.0).collect::<Vec<_>>());
            return Err(ModelError::Setting {
                task: "mix",
                setting: "shares",
                value,
                expected: "numbers >= 0, one above 0",
            });
        }
        Ok(Self { seed, parts })
    }
}

impl Task for MixTask {
    fn name(&self) -> &'static str {
        if let [(_, only)] = &self.parts[..] { only.name() } else { "mix" }
    }
    fn vocab_size(&self) -> usize {
        self.parts.iter().map(|p| p.1.vocab_size()).max().unwrap_or(1)
    }
    fn row(&self, step: u64, row: u64, len: usize) -> Result<(Vec<i32>, Vec<f32>), ModelError> {
        let total: f64 = self.parts.iter().map(|p| p.0).sum();
        let mut at = stream(self.seed, "mix.row", &[step, row]).random::<f64>() * total;
        let chosen = self.parts.iter().find(|(share, _)| {
            at -= share;
            at < 0.0
        });
        let (_, task) = chosen.or(self.parts.last()).expect("BUG: a mix is not empty");
        task.row(step, row, len)
    }
}
