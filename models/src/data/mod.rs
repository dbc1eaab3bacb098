//! What models train on.  A task's batch is a pure function of (seed, step, row): resuming needs no state, and rows
//! can be made in any order.

pub mod copy;
pub mod mix;
pub mod passkey;
pub mod recall;
pub mod rng;
pub mod text;

pub use copy::{Alphabet, CopyMix, CopyTask};
pub use mix::MixTask;
pub use passkey::{Haystack, PasskeyCase, PasskeyMix, PasskeyTask};
pub use recall::{RecallMix, RecallTask};
pub use text::{Split, Text, TextTask};

use crate::error::ModelError;

/// A label that the loss ignores.
pub const IGNORED: i32 = -100;

/// Rows of tokens to train on; all vectors are row-major `[n, len]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// N, rows.
    pub n: usize,
    /// L, tokens per row.
    pub len: usize,
    /// Token ids.
    pub input_ids: Vec<i32>,
    /// Already shifted: the token after each input, or [`IGNORED`].
    pub labels: Vec<i32>,
    /// Weight of each label in the loss; the loss is Σ w·ce / Σ w.
    pub loss_weights: Vec<f32>,
}

/// A source of training rows.
pub trait Task: Send + Sync {
    /// For messages and metrics.
    fn name(&self) -> &'static str;

    /// Ids that occur: all are below this.
    fn vocab_size(&self) -> usize;

    /// One row of `len` inputs: `len + 1` tokens, and the loss weight of each as a label (the first has none, as it
    /// is never one, but its weight is still listed).  Depends on the task, `step` and `row` alone.
    fn row(&self, step: u64, row: u64, len: usize) -> Result<(Vec<i32>, Vec<f32>), ModelError>;

    /// `n` rows of `len` tokens for training step `step`.
    fn batch(&self, step: u64, n: usize, len: usize) -> Result<Batch, ModelError> {
        let too_large = || ModelError::BatchTooLarge { task: self.name(), n, len };
        let size = n.checked_mul(len).filter(|&s| s <= MAX_BATCH).ok_or_else(too_large)?;
        let mut batch = Batch { n, len, input_ids: vec![], labels: vec![], loss_weights: vec![] };
        batch.input_ids.try_reserve_exact(size).map_err(|_| too_large())?;
        batch.labels.try_reserve_exact(size).map_err(|_| too_large())?;
        batch.loss_weights.try_reserve_exact(size).map_err(|_| too_large())?;
        for r in 0..n {
            let (tokens, weights) = self.row(step, r as u64, len)?;
            debug_assert_eq!((tokens.len(), weights.len()), (len + 1, len + 1), "BUG: {} row", self.name());
            batch.input_ids.extend(&tokens[..len]);
            batch.labels.extend(&tokens[1..]);
            batch.loss_weights.extend(&weights[1..]);
        }
        Ok(batch)
    }
}

/// Tokens in a batch beyond which the request is taken for a mistake (12 GiB of ids, labels and weights).
const MAX_BATCH: usize = 1 << 30;

/// Tokens of a row with `len` inputs, if `len` is sensible.
pub(crate) fn row_total(task: &'static str, len: usize, min: usize) -> Result<usize, ModelError> {
    match len {
        _ if len < min => Err(ModelError::RowTooShort { task, len, min }),
        _ if len > MAX_BATCH => Err(ModelError::BatchTooLarge { task, n: 1, len }),
        _ => Ok(len + 1),
    }
}

/// Checks that a task's share or weight lies in [0, 1].
pub(crate) fn check_share(task: &'static str, setting: &'static str, value: f64) -> Result<(), ModelError> {
    if (0.0..=1.0).contains(&value) {
        return Ok(());
    }
    Err(ModelError::Setting { task, setting, value: value.to_string(), expected: "0 to 1" })
}
