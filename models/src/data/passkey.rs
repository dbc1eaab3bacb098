//! Passkey retrieval: a needle with seven random digits somewhere in a long haystack, a question at the end.
//!
//! Documents are bytes.  The haystack is a pure function of (seed, position), made block by block, so that a case of
//! 64 million bytes streams without being held.  A row of length L has L + 1 bytes, the last ones being the answer:
//! the model reads L tokens and every answer digit is a label.  Evaluation uses the same layout: the prompt is
//! everything before the first digit.

use super::copy::CopyMix;
use super::rng::stream;
use super::{Task, check_share, row_total};
use crate::error::ModelError;
use rand::Rng;
use std::io;
use std::sync::LazyLock;

/// Digits of a passkey.
pub const DIGITS: usize = 7;
/// Bytes of haystack that are generated at a time.
const BLOCK: usize = 4096;
const QUESTION: &str = " |What is the passkey? The passkey is: ";
/// Names that tell several passkeys of one document apart.
const LABELS: &[&str] = &[
    "amber", "birch", "cobalt", "delta", "ember", "falcon", "garnet", "harbor", "indigo", "juniper", "kestrel",
    "lagoon",
];

/// Words of the filler, by length and alphabet.  Every length from 1 to 12 occurs, so any gap at a block's end can be
/// filled exactly.
static WORDS: LazyLock<Vec<&str>> = LazyLock::new(|| include_str!("words.txt").split_whitespace().collect());

/// Filler text: byte `p` depends on the seed and `p` alone.
#[derive(Clone)]
pub struct Haystack {
    seed: u64,
    index: u64,
    block: Vec<u8>,
}

impl Haystack {
    /// The haystack of `seed`; nothing is generated yet.
    pub fn new(seed: u64) -> Self {
        Self { seed, index: u64::MAX, block: Vec::new() }
    }

    /// Fills `out` with the bytes from position `at` on.
    pub fn read_at(&mut self, mut at: u64, mut out: &mut [u8]) {
        while !out.is_empty() {
            let (index, offset) = (at / BLOCK as u64, (at % BLOCK as u64) as usize);
            if self.index != index || self.block.is_empty() {
                self.block = filler_block(self.seed, index);
                self.index = index;
            }
            let n = out.len().min(BLOCK - offset);
            let (now, rest) = out.split_at_mut(n);
            now.copy_from_slice(&self.block[offset..offset + n]);
            out = rest;
            at = at.wrapping_add(n as u64);
        }
    }
}

/// `BLOCK` bytes of sentences that end exactly at the block's end.
fn filler_block(seed: u64, index: u64) -> Vec<u8> {
    let mut rng = stream(seed, "passkey.haystack", &[index]);
    let up_to = |letters: usize| WORDS.partition_point(|w| w.len() <= letters);
    let mut out = Vec::with_capacity(BLOCK);
    let mut left_in_sentence = rng.random_range(5..=12);
    loop {
        let room = BLOCK - out.len();
        // A last word of exactly the right length; steps below never leave a room of less than 3.
        if room <= 14 {
            let words = &WORDS[up_to(room - 3)..up_to(room - 2)];
            out.extend_from_slice(words[rng.random_range(0..words.len())].as_bytes());
            out.extend_from_slice(b". ");
            return out;
        }
        let words = if room < 18 { &WORDS[..up_to(10)] } else { &WORDS[..] };
        out.extend_from_slice(words[rng.random_range(0..words.len())].as_bytes());
        left_in_sentence -= 1;
        if left_in_sentence == 0 {
            out.push(b'.');
            left_in_sentence = rng.random_range(5..=12);
        }
        out.push(b' ');
    }
}

/// A text put into the haystack: after how many haystack bytes, what, and where in it an answer stands.
#[derive(Clone)]
struct Insert {
    depth: u64,
    text: Vec<u8>,
    /// Start of `DIGITS` answer digits within `text`.
    answer: Option<usize>,
}

/// A haystack with texts put into it, by increasing depth.
#[derive(Clone)]
struct Document {
    hay_seed: u64,
    inserts: Vec<Insert>,
    total: u64,
}

impl Document {
    /// Fills `out` from byte `at` on; the caller keeps `at + out.len() <= total`.
    fn read_at(&self, hay: &mut Haystack, at: u64, out: &mut [u8]) {
        let end = at + out.len() as u64;
        // `pos` is where the next part starts in the document, `taken` the haystack bytes before it.
        let (mut pos, mut taken) = (0u64, 0u64);
        let clip = |start: u64, len: u64| (start.max(at), (start + len).min(end));
        for insert in self.inserts.iter().map(Some).chain([None]) {
            let hay_len = insert.map_or(self.total - pos, |i| i.depth - taken);
            let (from, to) = clip(pos, hay_len);
            if from < to {
                hay.read_at(taken + (from - pos), &mut out[(from - at) as usize..(to - at) as usize]);
            }
            taken += hay_len;
            pos += hay_len;
            let Some(insert) = insert else { break };
            let (from, to) = clip(pos, insert.text.len() as u64);
            if from < to {
                let source = &insert.text[(from - pos) as usize..(to - pos) as usize];
                out[(from - at) as usize..(to - at) as usize].copy_from_slice(source);
            }
            pos += insert.text.len() as u64;
        }
    }

    /// Document offset of insert `k`.
    fn offset(&self, k: usize) -> u64 {
        self.inserts[k].depth + self.inserts[..k].iter().map(|i| i.text.len() as u64).sum::<u64>()
    }
}

fn digits(rng: &mut impl Rng) -> [u8; DIGITS] {
    std::array::from_fn(|_| b'0' + rng.random_range(0..10u8))
}

/// A key of two to four distinct digits: what comes after a digit then depends on more than that digit.
fn few_digits(rng: &mut impl Rng) -> [u8; DIGITS] {
    let n = rng.random_range(2..=4);
    let pool = rand::seq::index::sample(rng, 10, n).into_vec();
    std::array::from_fn(|_| b'0' + pool[rng.random_range(0..n)] as u8)
}

/// The needle's text; with a label if a document has several.
fn needle_text(label: Option<&str>, digits: &[u8; DIGITS]) -> Vec<u8> {
    let of = label.map(|l| format!(" of {l}")).unwrap_or_default();
    [format!(" |The passkey{of} is: ").as_bytes(), digits, b"|"].concat()
}

/// The question's text, up to where the answer goes.
fn question_text(label: Option<&str>) -> Vec<u8> {
    match label {
        None => QUESTION.into(),
        Some(l) => format!(" |What is the passkey of {l}? The passkey of {l} is: ").into(),
    }
}

/// The shortest row: needle, question, answer and one byte of haystack, less the one byte that is only a label.
pub fn min_len() -> usize {
    needle_text(None, &[b'0'; DIGITS]).len() + QUESTION.len() + DIGITS
}

/// One evaluation case.  The model reads `len` tokens in all: the prompt, then its own digits but the last.
#[derive(Clone)]
pub struct PasskeyCase {
    document: Document,
    answer: [u8; DIGITS],
    len: usize,
}

impl PasskeyCase {
    /// Case number `index` under `seed`: a pure function of the arguments.  The needle's depth is uniform.
    pub fn new(seed: u64, index: u64, len: usize) -> Result<Self, ModelError> {
        if len < min_len() {
            return Err(ModelError::RowTooShort { task: "passkey", len, min: min_len() });
        }
        // Cases stream, so far longer ones than rows are fine; the bound only keeps sums from overflowing.
        if len > usize::MAX / 4 {
            let expected = "a length that some machine could read";
            return Err(ModelError::Setting { task: "passkey", setting: "len", value: len.to_string(), expected });
        }
        let mut rng = stream(seed, "passkey.case", &[index, len as u64]);
        let answer = digits(&mut rng);
        let needle = needle_text(None, &answer);
        let end = [question_text(None).as_slice(), &answer].concat();
        let total = len as u64 + 1;
        let hay_len = total - needle.len() as u64 - end.len() as u64;
        let depth = rng.random_range(0..=hay_len);
        let inserts = vec![
            Insert { depth, text: needle, answer: None },
            Insert { depth: hay_len, text: end, answer: Some(QUESTION.len()) },
        ];
        Ok(Self { document: Document { hay_seed: rng.random(), inserts, total }, answer, len })
    }

    /// Tokens that the model reads: prompt and all answer digits but the last.
    pub fn context_len(&self) -> usize {
        self.len
    }

    /// Bytes before the first answer digit.
    pub fn prompt_len(&self) -> usize {
        self.len + 1 - DIGITS
    }

    /// The digits to be produced, as ASCII.
    pub fn answer(&self) -> [u8; DIGITS] {
        self.answer
    }

    /// Offset of the needle's first byte in the prompt.
    pub fn needle_offset(&self) -> usize {
        self.document.offset(0) as usize
    }

    /// Offset of the needle's first digit in the prompt.
    pub fn digits_offset(&self) -> usize {
        self.needle_offset() + self.document.inserts[0].text.len() - 1 - DIGITS
    }

    /// The chunk that holds the needle's first digit.
    pub fn needle_chunk(&self, chunk_size: usize) -> usize {
        self.digits_offset() / chunk_size.max(1)
    }

    /// The prompt, as a stream that never holds more than a few kilobytes.
    pub fn prompt(&self) -> Prompt<'_> {
        Prompt { case: self, hay: Haystack::new(self.document.hay_seed), at: 0 }
    }
}

/// Streams a case's prompt.
pub struct Prompt<'a> {
    case: &'a PasskeyCase,
    hay: Haystack,
    at: u64,
}

impl Prompt<'_> {
    /// Goes to byte `at`, or to the end if that is beyond it.
    pub fn seek(&mut self, at: usize) {
        self.at = at.min(self.case.prompt_len()) as u64;
    }

    /// Bytes not read yet.
    pub fn remaining(&self) -> usize {
        self.case.prompt_len() - self.at as usize
    }

    /// Fills as much of `out` as the prompt still has; the number of bytes written.
    pub fn fill(&mut self, out: &mut [u8]) -> usize {
        let n = out.len().min(self.remaining());
        self.case.document.read_at(&mut self.hay, self.at, &mut out[..n]);
        self.at += n as u64;
        n
    }
}

impl io::Read for Prompt<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        Ok(self.fill(out))
    }
}

/// What training rows are made of.
#[derive(Clone, Debug, PartialEq)]
pub struct PasskeyMix {
    /// Share of rows that are copy documents instead.
    pub copy_share: f64,
    /// The copy documents.
    pub copy: CopyMix,
    /// Needles per document: uniform in 1..=needles.  Several carry labels, which the questions name.
    pub needles: usize,
    /// Questions per document, each after its needle; the last stands at the end.
    pub questions: usize,
    /// Needle depth as a share of the haystack, least and most.
    pub depth: (f64, f64),
    /// Share of keys made of two to four distinct digits, which are harder to copy.
    pub few_digits_share: f64,
    /// Loss weight of everything that is not an answer.
    pub filler_weight: f32,
}

impl Default for PasskeyMix {
    fn default() -> Self {
        Self {
            copy_share: 0.5,
            copy: CopyMix::default(),
            needles: 1,
            questions: 1,
            depth: (0.0, 1.0),
            few_digits_share: 0.0,
            filler_weight: 0.05,
        }
    }
}

/// Training rows for passkey retrieval.
#[derive(Clone, Debug)]
pub struct PasskeyTask {
    seed: u64,
    mix: PasskeyMix,
}

impl PasskeyTask {
    /// A task with its own seed; cases of [`PasskeyCase`] are never among its rows.
    pub fn new(seed: u64, mix: PasskeyMix) -> Result<Self, ModelError> {
        let out_of_range =
            |setting, value: String, expected| ModelError::Setting { task: "passkey", setting, value, expected };
        check_share("passkey", "copy_share", mix.copy_share)?;
        check_share("passkey", "few_digits_share", mix.few_digits_share)?;
        check_share("passkey", "filler_weight", f64::from(mix.filler_weight))?;
        mix.copy.check()?;
        if !(1..=LABELS.len()).contains(&mix.needles) {
            return Err(out_of_range("needles", mix.needles.to_string(), "1 to 12"));
        }
        if !(1..=1024).contains(&mix.questions) {
            return Err(out_of_range("questions", mix.questions.to_string(), "1 to 1024"));
        }
        let (low, high) = mix.depth;
        if !(0.0 <= low && low <= high && high <= 1.0) {
            return Err(out_of_range("depth", format!("{low}..={high}"), "0 <= least <= most <= 1"));
        }
        Ok(Self { seed, mix })
    }

    /// A document of exactly `total` bytes and the loss weight of each; `total > min_len()`.
    fn document(&self, rng: &mut impl Rng, total: usize) -> (Vec<u8>, Vec<f32>) {
        let mut needles = rng.random_range(1..=self.mix.needles);
        let mut questions = self.mix.questions;
        // Where the row is too short for all of it, fewer questions, then fewer needles.
        let (mut inserts, hay_len) = loop {
            let labels: Vec<Option<&str>> = match needles {
                1 => vec![None],
                n => rand::seq::index::sample(rng, LABELS.len(), n).into_iter().map(|i| Some(LABELS[i])).collect(),
            };
            let key = |_| if rng.random_bool(self.mix.few_digits_share) { few_digits(rng) } else { digits(rng) };
            let keys: Vec<[u8; DIGITS]> = labels.iter().map(key).collect();
            let mut texts: Vec<Insert> = (labels.iter().zip(&keys))
                .map(|(label, key)| Insert { depth: 0, text: needle_text(*label, key), answer: None })
                .collect();
            let asked: Vec<usize> = (0..questions).map(|_| rng.random_range(0..needles)).collect();
            for (k, &i) in asked.iter().enumerate() {
                let mut text = question_text(labels[i]);
                let answer = Some(text.len());
                text.extend_from_slice(&keys[i]);
                // In the middle the question is closed as needles are; at the end the answer is last.
                if k + 1 < questions {
                    text.push(b'|');
                }
                texts.push(Insert { depth: 0, text, answer });
            }
            let fixed: usize = texts.iter().map(|t| t.text.len()).sum();
            if let Some(hay_len) = total.checked_sub(fixed) {
                for t in &mut texts[..needles] {
                    let (low, high) = self.mix.depth;
                    let share = low + (high - low) * rng.random::<f64>();
                    // Rounded down from len + 1 places, so that both ends are as likely as the middle.
                    t.depth = ((share * (hay_len as f64 + 1.0)) as u64).min(hay_len as u64);
                }
                for (k, &i) in asked.iter().enumerate() {
                    let last = k + 1 == questions;
                    texts[needles + k].depth =
                        if last { hay_len as u64 } else { rng.random_range(texts[i].depth..=hay_len as u64) };
                }
                break (texts, hay_len as u64);
            }
            if questions > 1 { questions -= 1 } else { needles -= 1 }
        };
        debug_assert!(inserts.iter().all(|i| i.depth <= hay_len));
        // Stable: needles stay before questions at the same place, and the final question stays last.
        inserts.sort_by_key(|i| i.depth);
        let document = Document { hay_seed: rng.random(), inserts, total: total as u64 };
        let mut text = vec![0; total];
        document.read_at(&mut Haystack::new(document.hay_seed), 0, &mut text);
        let mut weights = vec![self.mix.filler_weight; total];
        for (k, insert) in document.inserts.iter().enumerate() {
            if let Some(start) = insert.answer {
                let at = document.offset(k) as usize + start;
                weights[at..at + DIGITS].fill(1.0);
            }
        }
        (text, weights)
    }
}

impl Task for PasskeyTask {
    fn name(&self) -> &'static str {
        "passkey"
    }

    fn vocab_size(&self) -> usize {
        256
    }

    fn row(&self, step: u64, row: u64, len: usize) -> Result<(Vec<i32>, Vec<f32>), ModelError> {
        let total = row_total(self.name(), len, min_len())?;
        let mut rng = stream(self.seed, "passkey.row", &[step, row]);
        let (text, weights) = if rng.random_bool(self.mix.copy_share) {
            self.mix.copy.document(&mut rng, total)
        } else {
            self.document(&mut rng, total)
        };
        Ok((text.into_iter().map(i32::from).collect(), weights))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;
    use std::io::Read;

    fn text(case: &PasskeyCase) -> String {
        let mut s = String::new();
        case.prompt().read_to_string(&mut s).unwrap();
        s
    }

    #[test]
    fn words_are_sorted_lower_case_and_of_every_length() {
        assert!(WORDS.windows(2).all(|w| (w[0].len(), w[0]) < (w[1].len(), w[1])));
        assert!(WORDS.iter().all(|w| w.bytes().all(|b| b.is_ascii_lowercase())));
        for n in 1..=12 {
            assert!(WORDS.iter().any(|w| w.len() == n), "no word of {n} letters");
        }
    }

    #[test]
    fn a_case_has_one_needle_and_the_question_last() {
        for index in 0..50 {
            let case = PasskeyCase::new(7, index, 1024).unwrap();
            let s = text(&case);
            assert_eq!(s.len(), 1024 + 1 - 7);
            let key = String::from_utf8(case.answer().to_vec()).unwrap();
            assert!(s.ends_with(" |What is the passkey? The passkey is: "), "{s}");
            assert_eq!(s.matches(" |The passkey is: ").count(), 1);
            assert_eq!(s.find(&format!(" |The passkey is: {key}|")), Some(case.needle_offset()));
            assert_eq!(&s[case.digits_offset()..case.digits_offset() + 7], key);
            assert_eq!(case.needle_chunk(64), case.digits_offset() / 64);
        }
        assert_ne!(text(&PasskeyCase::new(7, 0, 1024).unwrap()), text(&PasskeyCase::new(8, 0, 1024).unwrap()));
    }

    #[test]
    fn depth_is_uniform() {
        let mut counts = [0; 10];
        for index in 0..2000 {
            let case = PasskeyCase::new(1, index, 10_000).unwrap();
            counts[case.needle_offset() * 10 / 10_000] += 1;
        }
        assert!(counts.iter().all(|&c| (140..=260).contains(&c)), "{counts:?}");
    }

    #[test]
    fn no_two_chunks_are_alike() {
        let mut hay = Haystack::new(5);
        let mut bytes = vec![0; 1 << 20];
        hay.read_at(0, &mut bytes);
        let chunks: HashSet<&[u8]> = bytes.chunks_exact(64).collect();
        assert_eq!(chunks.len(), bytes.len() / 64);
        assert!(bytes.iter().all(|b| b.is_ascii_lowercase() || b". ".contains(b)));
    }

    #[test]
    fn far_places_cost_nothing() {
        let case = PasskeyCase::new(1, 2, 64 << 20).unwrap();
        let mut prompt = case.prompt();
        prompt.seek(case.needle_offset());
        let mut s = [0; 25];
        assert_eq!(prompt.fill(&mut s), 25);
        assert_eq!(&s[18..25], &case.answer()[..7], "{}", String::from_utf8_lossy(&s));
        prompt.seek(usize::MAX);
        assert_eq!(prompt.fill(&mut s), 0);
        assert!(PasskeyCase::new(1, 2, usize::MAX / 4).is_ok());
        assert!(PasskeyCase::new(1, 2, usize::MAX).is_err());
    }

    #[test]
    fn rows_put_their_weight_on_answers() {
        let mix = PasskeyMix { copy_share: 0.0, needles: 4, questions: 6, ..Default::default() };
        let task = PasskeyTask::new(2, mix).unwrap();
        let mut labelled = 0;
        for row in 0..40 {
            let (tokens, weights) = task.row(0, row, 2048).unwrap();
            let s: String = tokens.iter().map(|&t| t as u8 as char).collect();
            let answers: Vec<usize> = (1..s.len()).filter(|&i| weights[i] == 1.0 && weights[i - 1] != 1.0).collect();
            assert_eq!(answers.len(), 6);
            assert_eq!(answers[5], s.len() - 7);
            for at in answers {
                let question = &s[..at];
                let asked = question.rfind("? ").unwrap() + 2;
                // "The passkey of amber is: 1234567" must stand earlier as a needle.
                let needle = format!(" |{}{}|", &question[asked..], &s[at..at + 7]);
                assert!(s[..asked].contains(&needle), "{needle} not in {s}");
                labelled += usize::from(needle.contains(" of "));
            }
        }
        assert!(labelled > 0);
    }

    #[test]
    fn mixes_out_of_range_are_errors() {
        let bad = |f: fn(&mut PasskeyMix)| {
            let mut mix = PasskeyMix::default();
            f(&mut mix);
            PasskeyTask::new(0, mix).unwrap_err().to_string()
        };
        assert!(bad(|m| m.copy_share = -0.1).contains("copy_share"));
        assert!(bad(|m| m.needles = 0).contains("needles"));
        assert!(bad(|m| m.questions = 0).contains("questions"));
        assert!(bad(|m| m.depth = (0.9, 0.1)).contains("depth"));
        assert!(bad(|m| m.filler_weight = f32::NAN).contains("filler_weight"));
        let task = PasskeyTask::new(0, PasskeyMix::default()).unwrap();
        let message = task.batch(0, 1, 10).unwrap_err().to_string();
        assert!(message.contains("10 tokens is too short") && message.contains(&min_len().to_string()), "{message}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Any way of reading gives the same bytes.
        #[test]
        fn reading_in_pieces_is_reading_at_once(seed: u64, len in 71usize..20_000, cuts in prop::collection::vec(1usize..5000, 1..8)) {
            prop_assume!(len >= min_len());
            let case = PasskeyCase::new(seed, 3, len).unwrap();
            let whole = text(&case).into_bytes();
            let (mut prompt, mut pieces) = (case.prompt(), vec![]);
            for n in cuts.iter().cycle() {
                let mut piece = vec![0; *n];
                let got = prompt.fill(&mut piece);
                pieces.extend_from_slice(&piece[..got]);
                if got == 0 { break }
            }
            prop_assert_eq!(&pieces, &whole);
            let at = seed as usize % whole.len();
            let mut tail = vec![0; whole.len() - at];
            prompt.seek(at);
            prompt.fill(&mut tail);
            prop_assert_eq!(&tail[..], &whole[at..]);
        }

        /// Rows have the length asked for at every length, whatever has to be left out.
        #[test]
        fn rows_fit_every_length(seed: u64, extra in 0usize..600, needles in 1usize..=12, questions in 1usize..20) {
            let mix = PasskeyMix { copy_share: 0.2, needles, questions, ..Default::default() };
            let task = PasskeyTask::new(seed, mix).unwrap();
            let batch = task.batch(1, 2, min_len() + extra).unwrap();
            prop_assert_eq!(batch.labels.len(), 2 * (min_len() + extra));
            prop_assert_eq!(&batch, &task.batch(1, 2, min_len() + extra).unwrap());
            prop_assert!(batch.input_ids.iter().all(|t| (0..256).contains(t)));
        }
    }
}
