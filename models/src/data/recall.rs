//! Multi-query associative recall: keys with values, many of them asked for again.
//!
//! ```text
//! k7 v3  k2 v9  k7 v3  k5 v1  k2 v9 …        the loss is on values of keys that came before
//! ```
//! Every key is a token of its own and its value follows it, so nothing but recall has to be learnt, and every row asks
//! for it dozens of times: what a model can do with its context shows within a minute.  Filler of any length may stand
//! between, which makes one pair a needle.

use super::rng::stream;
use super::{Task, check_share, row_total};
use crate::error::ModelError;
use rand::Rng;
use rand::seq::SliceRandom;

/// Tokens below this are keys, from here on values.
const VALUES: i32 = 128;

/// The shape of rows.
#[derive(Clone, Debug, PartialEq)]
pub struct RecallMix {
    /// Keys of a row, at most 128.
    pub keys: usize,
    /// Share of places that ask for an earlier key.
    pub queries: f64,
    /// Loss weight of what can't be known.
    pub filler_weight: f32,
}

impl Default for RecallMix {
    fn default() -> Self {
        Self { keys: 32, queries: 0.6, filler_weight: 0.02 }
    }
}

/// See the module's comment.
#[derive(Clone, Debug)]
pub struct RecallTask {
    seed: u64,
    mix: RecallMix,
}

impl RecallTask {
    /// A task with its own seed.
    ///
    /// # Errors
    /// Settings out of range.
    pub fn new(seed: u64, mix: RecallMix) -> Result<Self, ModelError> {
        check_share("recall", "queries", mix.queries)?;
        check_share("recall", "filler_weight", f64::from(mix.filler_weight))?;
        if !(1..=VALUES as usize).contains(&mix.keys) {
            let value = mix.keys.to_string();
            return Err(ModelError::Setting { task: "recall", setting: "keys", value, expected: "1 to 128" });
        }
        Ok(Self { seed, mix })
    }
}

impl Task for RecallTask {
    fn name(&self) -> &'static str {
        "recall"
    }

    fn vocab_size(&self) -> usize {
        256
    }

    fn row(&self, step: u64, row: u64, len: usize) -> Result<(Vec<i32>, Vec<f32>), ModelError> {
        let total = row_total(self.name(), len, 4)?;
        let mut rng = stream(self.seed, "recall.row", &[step, row]);
        let mut keys: Vec<i32> = (0..VALUES).collect();
        keys.shuffle(&mut rng);
        let values: Vec<i32> = (0..self.mix.keys).map(|_| rng.random_range(VALUES..256)).collect();
        let (mut tokens, mut weights, mut known) = (Vec::with_capacity(total + 1), Vec::with_capacity(total + 1), 0);
        while tokens.len() < total {
            let asks = known > 0 && (known == self.mix.keys || rng.random_bool(self.mix.queries));
            let key = if asks { rng.random_range(0..known) } else { known };
            known += usize::from(!asks);
            tokens.extend([keys[key], values[key]]);
            weights.extend([self.mix.filler_weight, if asks { 1.0 } else { self.mix.filler_weight }]);
        }
        tokens.truncate(total);
        weights.truncate(total);
        Ok((tokens, weights))
    }
}

/// A needle of the same kind: filler of values, one pair at a depth, and its key at the end.
pub struct NeedleRow {
    pub tokens: Vec<i32>,
    /// Where the key of the needle stands; its value follows.
    pub at: usize,
    pub value: i32,
}

/// Row `index` of `len` tokens under `seed`; the last token is the key that is asked for.
///
/// # Errors
/// Fewer than 8 tokens.
pub fn needle_row(seed: u64, index: u64, len: usize) -> Result<NeedleRow, ModelError> {
    row_total("needle", len, 8)?;
    let mut rng = stream(seed, "recall.needle", &[index, len as u64]);
    let mut tokens: Vec<i32> = (0..len).map(|_| rng.random_range(VALUES..256)).collect();
    let key = rng.random_range(0..VALUES);
    let at = rng.random_range(0..len - 3);
    (tokens[at], tokens[len - 1]) = (key, key);
    let value = tokens[at + 1];
    Ok(NeedleRow { tokens, at, value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_known_keys_are_what_counts() {
        let task = RecallTask::new(3, RecallMix::default()).unwrap();
        let (tokens, weights) = task.row(1, 0, 256).unwrap();
        assert_eq!((tokens.len(), task.row(1, 0, 256).unwrap()), (257, (tokens.clone(), weights.clone())));
        let mut asked = 0;
        for i in (1..257).step_by(2) {
            let before = (0..i - 1).step_by(2).find(|&j| tokens[j] == tokens[i - 1]);
            assert_eq!(before.is_some(), weights[i] == 1.0, "{i}");
            asked += usize::from(before.is_some());
            assert!(before.is_none_or(|j| tokens[j + 1] == tokens[i]), "{i}");
        }
        assert!((60..128).contains(&asked), "{asked}");
    }

    #[test]
    fn a_needle_has_one_key() {
        for index in 0..50 {
            let n = needle_row(1, index, 64).unwrap();
            let keys: Vec<usize> = (0..64).filter(|&i| n.tokens[i] < VALUES).collect();
            assert_eq!((keys, n.tokens[n.at + 1]), (vec![n.at, 63], n.value));
        }
    }

    #[test]
    fn settings_out_of_range_are_errors() {
        assert!(RecallTask::new(0, RecallMix { keys: 0, ..Default::default() }).is_err());
        assert!(RecallTask::new(0, RecallMix { keys: 129, ..Default::default() }).is_err());
        assert!(RecallTask::new(0, RecallMix { queries: 1.5, ..Default::default() }).is_err());
        assert!(needle_row(0, 0, 4).is_err());
    }
}
