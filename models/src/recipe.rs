//! What a training run does: stages of lengths and data, the optimiser's settings, the seed.
//!
//! A recipe is plain data, kept in every checkpoint, so that a run goes on from the checkpoint alone.

use crate::data::{
    Alphabet, CopyMix, CopyTask, MixTask, PasskeyMix, PasskeyTask, RecallMix, RecallTask, Task, TextTask,
};
use crate::error::ModelError;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// One kind of training row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rows {
    /// A passkey in filler, asked for at the end.
    Passkey,
    /// Random strings that repeat, of all printable characters.
    CopyPrintable,
    /// The same of digits, lower case or letters and digits.
    Copy,
    /// Keys with values, many asked for again.
    Recall,
    /// Windows of the run's text.
    Text,
}

/// A part of a run with one batch shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    /// Tokens per row.
    pub len: usize,
    pub rows: usize,
    /// Steps at most.
    pub steps: u64,
    /// Kinds of rows with their shares.
    pub mix: Vec<(f64, Rows)>,
    /// The stage ends early when the smoothed loss falls below this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_loss: Option<f32>,
}

/// AdamW and its schedule over all stages.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Optim {
    /// Peak learning rate.
    pub lr: f64,
    /// Final learning rate as a part of the peak.
    pub floor: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// Steps at the peak, warm-up included, before the cosine begins.
    pub hold: u64,
    pub beta1: f64,
    pub beta2: f64,
    pub weight_decay: f64,
    /// Largest global norm of the gradient; 0: no clipping.
    pub clip: f64,
}

impl Default for Optim {
    fn default() -> Self {
        Self { lr: 1e-3, floor: 0.1, warmup: 100, hold: 0, beta1: 0.9, beta2: 0.95, weight_decay: 0.1, clip: 1.0 }
    }
}

/// See the module's comment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    pub seed: u64,
    pub stages: Vec<Stage>,
    pub optim: Optim,
    /// Loss weight of tokens that are not answers, in passkey and copy rows.
    pub filler_weight: f32,
    /// Share of passkeys made of two to four distinct digits.
    pub few_digits_share: f64,
    /// Share of rows that start from the scan states of the step before (state passing, arXiv 2507.02782).
    pub carry_share: f64,
    /// Micro-batches per step.
    pub accumulate: usize,
    /// Draw fresh weights from N(0, 1/√fan_in) instead of N(0, initializer_range).
    pub fan_in: bool,
}

impl Recipe {
    /// One stage of one kind of rows.
    pub fn plain(rows: Rows, len: usize, n: usize, steps: u64) -> Self {
        let stage = Stage { len, rows: n, steps, mix: vec![(1.0, rows)], until_loss: None };
        Self {
            seed: 0,
            stages: vec![stage],
            optim: Optim::default(),
            filler_weight: 0.05,
            few_digits_share: 0.0,
            carry_share: 0.0,
            accumulate: 1,
            fan_in: false,
        }
    }

    /// Passkey retrieval from scratch in minutes, for a model of chunk size 16.
    ///
    /// Copying is learnt first, on rows of 64 bytes, until it works: runs that move on too early answer at the lengths
    /// they saw and no further.  Then passkeys join, and rows grow to 1,024 bytes.
    pub fn passkey() -> Self {
        use Rows::*;
        let stage = |len, rows, tokens: u64, mix: &[(f64, Rows)], until_loss| Stage {
            len,
            rows,
            steps: tokens / (len * rows) as u64,
            mix: mix.to_vec(),
            until_loss,
        };
        let stages = vec![
            stage(64, 16, 1_300_000, &[(1.0, CopyPrintable)], Some(1.1)),
            stage(128, 8, 300_000, &[(0.3, CopyPrintable), (0.3, Copy), (0.4, Passkey)], None),
            stage(256, 8, 500_000, &[(0.2, CopyPrintable), (0.2, Copy), (0.6, Passkey)], None),
            stage(512, 4, 2_000_000, &[(0.1, CopyPrintable), (0.3, Copy), (0.6, Passkey)], None),
            stage(1024, 4, 6_000_000, &[(0.3, Copy), (0.7, Passkey)], None),
        ];
        let total: u64 = stages.iter().map(|s| s.steps).sum();
        let optim = Optim { lr: 6e-3, floor: 0.05, warmup: 50, hold: total * 11 / 20, ..Optim::default() };
        Self { stages, optim, fan_in: true, few_digits_share: 0.3, ..Self::plain(Passkey, 1024, 2, 1) }
    }

    /// Steps of all stages.
    pub fn steps(&self) -> u64 {
        self.stages.iter().map(|s| s.steps).sum()
    }
    /// Tokens of all stages.
    pub fn tokens(&self) -> u64 {
        self.stages.iter().map(|s| s.steps * (s.rows * s.len * self.accumulate) as u64).sum()
    }
    /// The stage of planned step `step` (from 0), and the step at which the next begins.
    pub fn stage_at(&self, step: u64) -> Option<(usize, u64)> {
        let mut end = 0;
        self.stages.iter().enumerate().find_map(|(i, s)| {
            end += s.steps;
            (step < end).then_some((i, end))
        })
    }
    /// Tokens of the planned steps before `step`.
    pub fn tokens_before(&self, step: u64) -> u64 {
        let mut left = step;
        let mut tokens = 0;
        for s in &self.stages {
            let n = s.steps.min(left);
            tokens += n * (s.rows * s.len * self.accumulate) as u64;
            left -= n;
        }
        tokens
    }

    /// One task per stage; `text` serves the rows of [`Rows::Text`].
    ///
    /// # Errors
    /// Settings out of range; rows of text without a text.
    pub fn tasks(&self, text: Option<&TextTask>) -> Result<Vec<MixTask>, ModelError> {
        let copy = |alphabet, separated| {
            let mix = CopyMix { alphabet, separated, filler_weight: self.filler_weight, ..CopyMix::default() };
            Ok::<Arc<dyn Task>, ModelError>(Arc::new(CopyTask::new(self.seed, mix)?))
        };
        let task = |rows: &Rows| -> Result<Arc<dyn Task>, ModelError> {
            match rows {
                Rows::CopyPrintable => copy(Alphabet::Printable, false),
                Rows::Copy => copy(Alphabet::Any, false),
                Rows::Passkey => {
                    let mix = PasskeyMix {
                        copy_share: 0.0,
                        few_digits_share: self.few_digits_share,
                        filler_weight: self.filler_weight,
                        ..PasskeyMix::default()
                    };
                    Ok(Arc::new(PasskeyTask::new(self.seed, mix)?))
                }
                Rows::Recall => Ok(Arc::new(RecallTask::new(self.seed, RecallMix::default())?)),
                Rows::Text => match text {
                    Some(t) => Ok(Arc::new(t.clone())),
                    None => Err(ModelError::Setting {
                        task: "text",
                        setting: "data",
                        value: "none".into(),
                        expected: "a text file: --data FILE",
                    }),
                },
            }
        };
        self.stages
            .iter()
            .map(|s| {
                let parts = s.mix.iter().map(|(share, rows)| Ok((*share, task(rows)?)));
                MixTask::new(self.seed, parts.collect::<Result<_, ModelError>>()?)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_follow_each_other() {
        let r = Recipe::passkey();
        assert_eq!(r.stage_at(0).map(|s| s.0), Some(0));
        let end = r.stages[0].steps;
        assert_eq!((r.stage_at(end - 1).map(|s| s.0), r.stage_at(end).map(|s| s.0)), (Some(0), Some(1)));
        assert_eq!(r.stage_at(r.steps()), None);
        assert_eq!(r.tokens_before(r.steps()), r.tokens());
        assert_eq!(r.tasks(None).map(|t| t.len()).ok(), Some(r.stages.len()));
    }

    #[test]
    fn survives_json() {
        let r = Recipe::passkey();
        let text = serde_json::to_string(&r).unwrap();
        assert_eq!(serde_json::from_str::<Recipe>(&text).unwrap(), r);
    }

    #[test]
    fn text_rows_need_a_text() {
        assert!(Recipe::plain(Rows::Text, 8, 1, 1).tasks(None).is_err());
    }
}
