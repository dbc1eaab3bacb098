//! Any text file as training data: random windows of its bytes, or of its tokens.
//!
//! Bytes are read from a map of the file; with a tokenizer.json the whole file is tokenised once and kept in memory.
//! The last 5 % are for validation.  The file must not change while it is in use.

use super::Task;
use super::rng::stream;
use crate::error::ModelError;
use crate::tokenizer::Tokenizer;
use memmap2::Mmap;
use rand::Rng;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Share of the tokens, at the end, that training never sees: 1 / 20.
const VALIDATION: usize = 20;
/// Bytes that are tokenised at a time; cut at line ends.
const PIECE: usize = 1 << 20;

/// A tokenised text.  Cheap to clone.
#[derive(Clone)]
pub struct Text(Arc<Inner>);

struct Inner {
    path: PathBuf,
    tokens: Tokens,
    vocab_size: usize,
}

enum Tokens {
    Bytes(Mmap),
    Ids(Vec<i32>),
}

/// A part of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// The first 95 %.
    Train,
    /// The last 5 %.
    Validation,
}

impl Text {
    /// Opens `path` and tokenises it.  An error if it is empty, or not UTF-8 where the tokenizer needs that.
    pub fn open(path: impl AsRef<Path>, tokenizer: &Tokenizer) -> Result<Self, ModelError> {
        let path = path.as_ref().to_path_buf();
        let unreadable = |source| ModelError::Read { path: path.clone(), source };
        let file = File::open(&path).map_err(unreadable)?;
        let meta = file.metadata().map_err(unreadable)?;
        if !meta.is_file() {
            return Err(unreadable(std::io::Error::other("not a regular file; give one text file")));
        }
        if meta.len() == 0 {
            return Err(ModelError::EmptyText { path });
        }
        // SAFETY: the map is only read; that nobody truncates the file meanwhile is the documented condition.
        let map = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
        let tokens =
            if tokenizer.is_bytes() { Tokens::Bytes(map) } else { Tokens::Ids(tokenise(&path, &map, tokenizer)?) };
        Ok(Self(Arc::new(Inner { path, tokens, vocab_size: tokenizer.vocab_size() })))
    }

    /// Tokens in all.
    pub fn len(&self) -> usize {
        match &self.0.tokens {
            Tokens::Bytes(b) => b.len(),
            Tokens::Ids(ids) => ids.len(),
        }
    }

    /// Whether there are no tokens (a tokenizer can drop everything).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The positions of a part.
    pub fn range(&self, split: Split) -> Range<usize> {
        let cut = self.len() - self.len() / VALIDATION;
        match split {
            Split::Train => 0..cut,
            Split::Validation => cut..self.len(),
        }
    }

    /// Tokens of `range`, which must lie within the text.
    pub fn tokens(&self, range: Range<usize>) -> Vec<i32> {
        match &self.0.tokens {
            Tokens::Bytes(b) => b.get(range).unwrap_or_default().iter().map(|&b| i32::from(b)).collect(),
            Tokens::Ids(ids) => ids.get(range).unwrap_or_default().to_vec(),
        }
    }

    /// Random windows of a part.
    pub fn task(&self, seed: u64, split: Split) -> TextTask {
        TextTask { text: self.clone(), seed, split }
    }
}

fn tokenise(path: &Path, bytes: &[u8], tokenizer: &Tokenizer) -> Result<Vec<i32>, ModelError> {
    let text =
        std::str::from_utf8(bytes).map_err(|e| ModelError::NotUtf8 { path: path.into(), at: e.valid_up_to() })?;
    let mut ids = Vec::with_capacity(text.len() / 3);
    let mut rest = text;
    while !rest.is_empty() {
        // After a line end where there is one, else anywhere between characters.
        let limit = rest.floor_char_boundary_at(PIECE);
        let cut = if limit == rest.len() { limit } else { rest[..limit].rfind('\n').map_or(limit, |i| i + 1) };
        let (piece, tail) = rest.split_at(cut);
        ids.extend(tokenizer.encode(piece)?);
        rest = tail;
    }
    Ok(ids)
}

/// `str::floor_char_boundary`, which is newer than the oldest supported compiler.
trait FloorCharBoundary {
    fn floor_char_boundary_at(&self, at: usize) -> usize;
}

impl FloorCharBoundary for str {
    fn floor_char_boundary_at(&self, at: usize) -> usize {
        (0..=at.min(self.len())).rev().find(|&i| self.is_char_boundary(i)).unwrap_or(0)
    }
}

/// Random windows of one part of a text.
#[derive(Clone)]
pub struct TextTask {
    text: Text,
    seed: u64,
    split: Split,
}

impl Task for TextTask {
    fn name(&self) -> &'static str {
        "text"
    }

    fn vocab_size(&self) -> usize {
        self.text.0.vocab_size
    }

    fn row(&self, step: u64, row: u64, len: usize) -> Result<(Vec<i32>, Vec<f32>), ModelError> {
        let range = self.text.range(self.split);
        let too_short = || {
            let split = if self.split == Split::Train { "training" } else { "validation" };
            ModelError::TextTooShort { path: self.text.0.path.clone(), split, have: range.len(), len }
        };
        let needed = len.checked_add(1).ok_or_else(too_short)?;
        let places = range.len().checked_sub(needed).ok_or_else(too_short)?;
        let domain = if self.split == Split::Train { "text.train" } else { "text.validation" };
        let start = range.start + stream(self.seed, domain, &[step, row]).random_range(0..=places as u64) as usize;
        Ok((self.text.tokens(start..start + needed), vec![1.0; needed]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::byte_level;
    use std::io::Write;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut f = tempfile::NamedTempFile::new().unwrap();
        f.write_all(bytes).unwrap();
        f
    }

    #[test]
    fn windows_are_text_and_shifted() {
        let content: Vec<u8> = (0..4000u32).flat_map(|i| format!("line {i}\n").into_bytes()).collect();
        let f = file(&content);
        let text = Text::open(f.path(), &Tokenizer::bytes()).unwrap();
        assert_eq!(text.len(), content.len());
        let task = text.task(1, Split::Train);
        let batch = task.batch(9, 3, 50).unwrap();
        assert_eq!(batch, task.batch(9, 3, 50).unwrap());
        assert_ne!(batch, task.batch(10, 3, 50).unwrap());
        for r in 0..3 {
            let (ids, labels) = (&batch.input_ids[r * 50..][..50], &batch.labels[r * 50..][..50]);
            assert_eq!(ids[1..], labels[..49]);
            let bytes: Vec<u8> = ids.iter().map(|&t| t as u8).collect();
            assert!(content.windows(50).any(|w| w == bytes));
        }
        let cut = text.range(Split::Validation).start;
        assert_eq!(text.range(Split::Train).end, cut);
        // 95 %, and one window that fills a part exactly.
        assert_eq!(content.len() - cut, content.len() / 20);
        let all = text.task(1, Split::Validation).batch(0, 1, content.len() - cut - 1).unwrap();
        assert_eq!(all.input_ids[0], i32::from(content[cut]));
    }

    #[test]
    fn tokenises_in_pieces() {
        let content = "the other thé\n".repeat(200_000);
        let f = file(content.as_bytes());
        let tokenizer = Tokenizer::from_json(byte_level(257).as_bytes(), "t.json").unwrap();
        let text = Text::open(f.path(), &tokenizer).unwrap();
        assert_eq!(tokenizer.decode(&text.tokens(0..text.len())).unwrap(), content);
    }

    #[test]
    fn unusable_files_are_errors() {
        let bytes = Tokenizer::bytes();
        let message = |r: Result<Text, ModelError>| r.err().unwrap().to_string();
        assert!(message(Text::open("/nowhere.txt", &bytes)).contains("/nowhere.txt"));
        assert!(message(Text::open("/tmp", &bytes)).contains("regular file"));
        assert!(message(Text::open(file(b"").path(), &bytes)).contains("empty"));
        let tokenizer = Tokenizer::from_json(byte_level(257).as_bytes(), "t.json").unwrap();
        let bad = message(Text::open(file(b"abc\xff").path(), &tokenizer));
        assert!(bad.contains("byte 3"), "{bad}");
        let f = file(&[b'x'; 100]);
        let text = Text::open(f.path(), &bytes).unwrap();
        let short = text.task(0, Split::Train).batch(0, 1, 95).unwrap_err().to_string();
        assert!(short.contains("95 tokens") && short.contains("96"), "{short}");
        assert!(text.task(0, Split::Train).batch(0, 1, 94).is_ok());
        assert!(text.task(0, Split::Validation).row(0, 0, usize::MAX).is_err());
    }
}
