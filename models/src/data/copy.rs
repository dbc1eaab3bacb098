//! Copy cases: documents of random strings in which most repeat an earlier one.
//!
//! After the first characters of a repeat the rest is known to whoever finds the earlier place: dense practice for
//! retrieval, where a passkey has one question per document.  The loss is on those tails.

use super::rng::stream;
use super::{Task, check_share, row_total};
use crate::error::ModelError;
use rand::Rng;

/// What strings are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alphabet {
    /// All 94 printable characters: rare matches by chance, so copying is learnt fastest.
    Printable,
    /// Per document one of: digits, lower case, letters and digits.  Digits are what passkeys need.
    Any,
}

impl Alphabet {
    fn characters(self, rng: &mut impl Rng) -> Vec<u8> {
        let classes: &[&[std::ops::RangeInclusive<u8>]] = match self {
            Alphabet::Printable => &[&[b'!'..=b'~']],
            Alphabet::Any => &[&[b'0'..=b'9'], &[b'a'..=b'z'], &[b'0'..=b'9', b'a'..=b'z', b'A'..=b'Z']],
        };
        classes[rng.random_range(0..classes.len())].iter().cloned().flatten().collect()
    }
}

/// The shape of copy documents.
#[derive(Clone, Debug, PartialEq)]
pub struct CopyMix {
    /// Characters per string, least and most.
    pub length: (usize, usize),
    /// Share of strings that repeat an earlier one, chosen uniformly.
    pub repeat_share: f64,
    /// First characters of a repeat that nobody can know; the loss is on what follows.
    pub head: usize,
    /// Loss weight of everything that is not a tail.
    pub filler_weight: f32,
    pub alphabet: Alphabet,
    /// Whether a space ends every string; without it where a string begins has to be found out.
    pub separated: bool,
}

impl Default for CopyMix {
    fn default() -> Self {
        Self {
            length: (8, 14),
            repeat_share: 0.6,
            head: 3,
            filler_weight: 0.05,
            alphabet: Alphabet::Any,
            separated: true,
        }
    }
}

impl CopyMix {
    /// An error unless documents can be made.
    pub fn check(&self) -> Result<(), ModelError> {
        check_share("copy", "repeat_share", self.repeat_share)?;
        check_share("copy", "filler_weight", f64::from(self.filler_weight))?;
        let (low, high) = self.length;
        if low < 1 || low > high || high > 4096 || self.head >= low {
            let value = format!("{low}..={high} with head {}", self.head);
            return Err(ModelError::Setting {
                task: "copy",
                setting: "length",
                value,
                expected: "head < least <= most <= 4096",
            });
        }
        Ok(())
    }

    /// A document of exactly `total` bytes and the loss weight of each.
    pub(crate) fn document(&self, rng: &mut impl Rng, total: usize) -> (Vec<u8>, Vec<f32>) {
        let alphabet = self.alphabet.characters(rng);
        let mut text = Vec::with_capacity(total + self.length.1 + 1);
        let mut weights = Vec::with_capacity(text.capacity());
        // Start and length of each fresh string; copying only these keeps strings from being favoured by their copies.
        let mut fresh: Vec<(usize, usize)> = vec![];
        while text.len() < total {
            if !fresh.is_empty() && rng.random_bool(self.repeat_share) {
                let (start, len) = fresh[rng.random_range(0..fresh.len())];
                text.extend_from_within(start..start + len);
                weights.extend((0..len).map(|i| if i < self.head { self.filler_weight } else { 1.0 }));
            } else {
                let len = rng.random_range(self.length.0..=self.length.1);
                fresh.push((text.len(), len));
                text.extend((0..len).map(|_| alphabet[rng.random_range(0..alphabet.len())]));
                weights.resize(text.len(), self.filler_weight);
            }
            if self.separated {
                text.push(b' ');
                weights.push(self.filler_weight);
            }
        }
        text.truncate(total);
        weights.truncate(total);
        (text, weights)
    }
}

/// Copy documents only.
#[derive(Clone, Debug)]
pub struct CopyTask {
    seed: u64,
    mix: CopyMix,
}

impl CopyTask {
    /// A task with its own seed.
    pub fn new(seed: u64, mix: CopyMix) -> Result<Self, ModelError> {
        mix.check()?;
        Ok(Self { seed, mix })
    }
}

impl Task for CopyTask {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn vocab_size(&self) -> usize {
        256
    }

    fn row(&self, step: u64, row: u64, len: usize) -> Result<(Vec<i32>, Vec<f32>), ModelError> {
        let total = row_total(self.name(), len, 1)?;
        let mut rng = stream(self.seed, "copy.row", &[step, row]);
        let (text, weights) = self.mix.document(&mut rng, total);
        Ok((text.into_iter().map(i32::from).collect(), weights))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tails_of_repeats_are_what_counts() {
        let task = CopyTask::new(3, CopyMix::default()).unwrap();
        let batch = task.batch(5, 2, 1000).unwrap();
        assert_eq!(batch, task.batch(5, 2, 1000).unwrap());
        assert_ne!(batch.input_ids, task.batch(6, 2, 1000).unwrap().input_ids);
        let (tokens, weights) = task.row(5, 0, 1000).unwrap();
        assert_eq!(batch.labels[..1000], tokens[1..]);
        let text: String = tokens.iter().map(|&t| t as u8 as char).collect();
        let (mut at, mut repeats, mut whole) = (0, 0, 0);
        let words: Vec<&str> = text.split(' ').collect();
        for word in &words[..words.len() - 1] {
            whole += 1;
            assert!((8..=14).contains(&word.len()), "{word}");
            let counted = weights[at..at + word.len()].iter().filter(|w| **w == 1.0).count();
            if counted > 0 {
                repeats += 1;
                assert_eq!(counted, word.len() - 3);
                assert!(text[..at].contains(word), "{word} is new");
            }
            at += word.len() + 1;
        }
        assert!(repeats * 10 > whole * 4 && repeats * 10 < whole * 8, "{repeats} of {whole}");
    }

    #[test]
    fn settings_out_of_range_are_errors() {
        for mix in [
            CopyMix { repeat_share: 1.5, ..Default::default() },
            CopyMix { repeat_share: f64::NAN, ..Default::default() },
            CopyMix { length: (9, 8), ..Default::default() },
            CopyMix { head: 8, ..Default::default() },
            CopyMix { filler_weight: -1.0, ..Default::default() },
        ] {
            assert!(CopyTask::new(0, mix).is_err());
        }
        let task = CopyTask::new(0, CopyMix::default()).unwrap();
        assert!(task.batch(0, usize::MAX, 2).is_err());
        assert!(task.row(0, 0, usize::MAX).is_err() && task.row(0, 0, 0).is_err());
    }
}
