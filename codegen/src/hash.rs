//! SHA-256 as text: names of cached kernels, and what tells damage from content.

use sha2::{Digest, Sha256};
use std::fmt::Write;

/// 64 hexadecimal digits.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Of parts one by one; where one ends and the next begins makes a difference.
#[derive(Clone, Default)]
pub struct Parts(Sha256);

impl Parts {
    pub fn add(&mut self, part: &[u8]) -> &mut Self {
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
        self
    }
    pub fn finish(self) -> String {
        hex(&self.0.finalize())
    }
}

/// Of bytes that come piece by piece; the same as [`sha256`] of all of them.
#[derive(Clone, Default)]
pub struct Pieces(Sha256);

impl Pieces {
    pub fn add(&mut self, piece: &[u8]) -> &mut Self {
        self.0.update(piece);
        self
    }
    pub fn finish(self) -> String {
        hex(&self.0.finalize())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_sha256sum_says() {
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(b"abc"), abc);
        let mut p = Pieces::default();
        p.add(b"a").add(b"bc");
        assert_eq!(p.finish(), abc);
        let of = |parts: &[&str]| {
            let mut p = Parts::default();
            parts.iter().for_each(|x| {
                p.add(x.as_bytes());
            });
            p.finish()
        };
        assert_ne!(of(&["ab", "c"]), of(&["a", "bc"]));
    }
}
