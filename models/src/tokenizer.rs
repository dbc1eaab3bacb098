//! Text to token ids and back: plain bytes, or a tokenizer.json of the tokenizers library.
//!
//! Decoding can go token by token: characters that span tokens are held back until they are whole.

use crate::error::ModelError;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

/// Turns text into ids and back.  Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer(Kind);

#[derive(Clone)]
enum Kind {
    Bytes,
    Json(Arc<Json>),
}

struct Json {
    inner: tokenizers::Tokenizer,
    origin: String,
    /// Largest id + 1; ids may have gaps, so this can exceed the number of tokens.
    size: usize,
}

impl Tokenizer {
    /// One token per byte.
    pub fn bytes() -> Self {
        Self(Kind::Bytes)
    }

    /// Reads a tokenizer.json, or the one in a folder.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, ModelError> {
        let mut path = path.as_ref().to_path_buf();
        if path.is_dir() {
            path.push("tokenizer.json");
        }
        let bytes = std::fs::read(&path).map_err(|source| ModelError::Read { path: path.clone(), source })?;
        Self::from_json(&bytes, &path.display().to_string())
    }

    /// Reads the text of a tokenizer.json; `origin` names it in messages.
    pub fn from_json(json: &[u8], origin: &str) -> Result<Self, ModelError> {
        let inner = guarded(origin, "cannot be loaded", || tokenizers::Tokenizer::from_bytes(json))?;
        let size = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        Ok(Self(Kind::Json(Arc::new(Json { inner, origin: origin.into(), size }))))
    }

    /// The file it came from, or "bytes".
    pub fn origin(&self) -> &str {
        match &self.0 {
            Kind::Bytes => "bytes",
            Kind::Json(j) => &j.origin,
        }
    }

    /// Whether each byte is a token.
    pub fn is_bytes(&self) -> bool {
        matches!(self.0, Kind::Bytes)
    }

    /// All ids are below this.
    pub fn vocab_size(&self) -> usize {
        match &self.0 {
            Kind::Bytes => 256,
            Kind::Json(j) => j.size,
        }
    }

    /// An error if it can produce ids that a model with `vocab_size` embeddings does not know.
    pub fn check_vocab(&self, vocab_size: usize) -> Result<(), ModelError> {
        let size = self.vocab_size();
        if size <= vocab_size {
            return Ok(());
        }
        Err(ModelError::TokenizerTooLarge { origin: self.origin().into(), max_id: size - 1, vocab_size })
    }

    /// The ids of `text`, without special tokens around it.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>, ModelError> {
        match &self.0 {
            Kind::Bytes => Ok(text.bytes().map(i32::from).collect()),
            Kind::Json(j) => {
                let encoding = guarded(&j.origin, "cannot encode this text", || j.inner.encode(text, false))?;
                // Ids index an embedding of at most 2^24 rows, checked by `check_vocab`.
                Ok(encoding.get_ids().iter().map(|&id| i32::try_from(id).unwrap_or(i32::MAX)).collect())
            }
        }
    }

    /// The text of `ids`; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[i32]) -> Result<String, ModelError> {
        match &self.0 {
            Kind::Bytes => {
                let bytes: Vec<u8> = ids.iter().map(|&id| self.byte(id)).collect::<Result<_, _>>()?;
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Kind::Json(j) => {
                let ids: Vec<u32> = ids.iter().map(|&id| self.id(id, j.size)).collect::<Result<_, _>>()?;
                guarded(&j.origin, "cannot decode these ids", || j.inner.decode(&ids, true))
            }
        }
    }

    /// A decoder that takes one id at a time.
    pub fn stream(&self) -> DecodeStream {
        DecodeStream { tokenizer: self.clone(), held: vec![], context: 0, shown: 0 }
    }

    fn byte(&self, id: i32) -> Result<u8, ModelError> {
        u8::try_from(id).map_err(|_| self.bad_id(id, 256))
    }

    fn id(&self, id: i32, size: usize) -> Result<u32, ModelError> {
        u32::try_from(id).ok().filter(|&u| (u as usize) < size).ok_or_else(|| self.bad_id(id, size))
    }

    fn bad_id(&self, id: i32, size: usize) -> ModelError {
        ModelError::TokenId { origin: self.origin().into(), id: id.into(), size }
    }
}

/// Decodes token by token; what it returns, joined, is the decoding of all ids.
pub struct DecodeStream {
    tokenizer: Tokenizer,
    /// Bytes of an unfinished character, or ids: `context` already shown ones that the next depend on, then new ones.
    held: Vec<i32>,
    context: usize,
    /// Length of the text of the context, in bytes.
    shown: usize,
}

/// Ids held back at most: no character is longer, so what is still broken then is broken for good.
const MAX_HELD: usize = 32;

impl DecodeStream {
    /// Takes one id; the text that became certain, often empty.
    pub fn push(&mut self, id: i32) -> Result<String, ModelError> {
        if self.tokenizer.is_bytes() {
            self.tokenizer.byte(id)?;
            self.held.push(id);
            return Ok(self.take_bytes(false));
        }
        // Checked before it is kept, so that a bad id does not spoil the stream.
        self.tokenizer.decode(&[id])?;
        self.held.push(id);
        let text = self.tokenizer.decode(&self.held)?;
        if text.ends_with('\u{fffd}') && self.held.len() - self.context < MAX_HELD {
            return Ok(String::new());
        }
        self.advance(&text)
    }

    /// The rest: an unfinished character becomes U+FFFD.
    pub fn finish(mut self) -> Result<String, ModelError> {
        if self.tokenizer.is_bytes() {
            return Ok(self.take_bytes(true));
        }
        let text = self.tokenizer.decode(&self.held)?;
        self.advance(&text)
    }

    /// Returns what is new in `text`, the decoding of `held`, and keeps the new ids as context: decoders treat the
    /// first token of a text specially (no leading space), so new ids are never decoded alone.
    fn advance(&mut self, text: &str) -> Result<String, ModelError> {
        let new = text.get(self.shown..).unwrap_or_default().to_string();
        self.held.drain(..self.context);
        self.context = self.held.len();
        self.shown = self.tokenizer.decode(&self.held)?.len();
        Ok(new)
    }

    fn take_bytes(&mut self, all: bool) -> String {
        let bytes: Vec<u8> = self.held.iter().map(|&b| b as u8).collect();
        let keep = if all { 0 } else { unfinished(&bytes) };
        let done = bytes.len() - keep;
        self.held.drain(..done);
        String::from_utf8_lossy(&bytes[..done]).into_owned()
    }
}

/// How many bytes at the end start a character that more bytes could finish.
fn unfinished(bytes: &[u8]) -> usize {
    for n in 1..=bytes.len().min(3) {
        let tail = &bytes[bytes.len() - n..];
        // `error_len() == None` is exactly "unexpected end".
        if let Err(e) = std::str::from_utf8(tail)
            && e.valid_up_to() == 0
            && e.error_len().is_none()
        {
            return n;
        }
    }
    0
}

/// Runs a call into the tokenizers library; its errors and even its panics on malformed files become ours.
fn guarded<T>(origin: &str, action: &'static str, f: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, ModelError> {
    let fail = |reason| ModelError::Tokenizer { origin: origin.into(), action, reason };
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(result) => result.map_err(|e| fail(e.to_string())),
        Err(_) => Err(fail("the tokenizers library panicked on it".into())),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A small byte-level BPE: all 256 bytes and two merges.
    pub(crate) fn byte_level(extra_id: u32) -> String {
        // The byte-level alphabet of GPT-2: printable bytes stand for themselves, the rest from U+0100 on.
        let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
        let mut next = 256;
        let mut vocab = serde_json::Map::new();
        for b in 0..256u32 {
            let c = if printable(b) {
                b
            } else {
                next += 1;
                next - 1
            };
            vocab.insert(char::from_u32(c).unwrap().to_string(), b.into());
        }
        vocab.insert("th".into(), 256.into());
        vocab.insert("the".into(), extra_id.into());
        serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "vocab": vocab, "merges": ["t h", "th e"]}
        })
        .to_string()
    }

    fn json() -> Tokenizer {
        Tokenizer::from_json(byte_level(257).as_bytes(), "test.json").unwrap()
    }

    fn streamed(t: &Tokenizer, ids: &[i32]) -> String {
        let mut stream = t.stream();
        let mut s: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        s.push_str(&stream.finish().unwrap());
        s
    }

    #[test]
    fn encodes_and_decodes() {
        assert_eq!(json().encode("the thé").unwrap(), [257, 32, 256, 0xc3, 0xa9]);
        assert_eq!(json().decode(&[257, 32, 256, 0xc3, 0xa9]).unwrap(), "the thé");
        assert_eq!(Tokenizer::bytes().encode("é").unwrap(), [0xc3, 0xa9]);
    }

    #[test]
    fn a_character_is_held_until_whole() {
        for t in [json(), Tokenizer::bytes()] {
            let mut s = t.stream();
            assert_eq!(s.push(0xc3).unwrap(), "");
            assert_eq!(s.push(0xa9).unwrap(), "é");
            assert_eq!(s.push(65).unwrap(), "A");
            assert_eq!(s.push(0xf0).unwrap(), "");
            assert_eq!(s.finish().unwrap(), "\u{fffd}");
        }
    }

    #[test]
    fn mistakes_are_errors() {
        let gap = Tokenizer::from_json(byte_level(999).as_bytes(), "gap.json").unwrap();
        assert_eq!(gap.vocab_size(), 1000);
        let message = gap.check_vocab(258).unwrap_err().to_string();
        assert!(message.contains("gap.json") && message.contains("999") && message.contains("258"), "{message}");
        assert!(gap.check_vocab(1000).is_ok());
        for (t, id) in [(json(), 258), (json(), -1), (Tokenizer::bytes(), 256), (Tokenizer::bytes(), -1)] {
            assert!(t.decode(&[id]).unwrap_err().to_string().contains(&id.to_string()));
            let mut s = t.stream();
            assert!(s.push(id).is_err());
            assert_eq!(s.push(65).unwrap(), "A");
        }
        assert!(Tokenizer::from_file("/nowhere/tokenizer.json").err().unwrap().to_string().contains("/nowhere"));
        assert!(Tokenizer::from_json(b"{}", "empty.json").err().unwrap().to_string().contains("empty.json"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn text_survives(s in "\\PC{0,40}") {
            for t in [json(), Tokenizer::bytes()] {
                let ids = t.encode(&s).unwrap();
                prop_assert_eq!(&t.decode(&ids).unwrap(), &s);
                prop_assert_eq!(&streamed(&t, &ids), &s);
            }
        }

        /// Broken byte sequences too come out as decoding them at once gives.
        #[test]
        fn streaming_bytes_is_decoding(ids in prop::collection::vec(0i32..256, 0..60)) {
            let t = Tokenizer::bytes();
            prop_assert_eq!(streamed(&t, &ids), t.decode(&ids).unwrap());
        }

        #[test]
        fn streaming_tokens_never_fails(ids in prop::collection::vec(0i32..258, 0..60)) {
            streamed(&json(), &ids);
        }

        #[test]
        fn mutated_files_never_panic(at in 0usize..10_000, with: u8) {
            let mut text = byte_level(257).into_bytes();
            let n = text.len();
            text[at % n] = with;
            if let Ok(t) = Tokenizer::from_json(&text, "x") {
                let _ = t.encode("the end");
            }
        }
    }
}
