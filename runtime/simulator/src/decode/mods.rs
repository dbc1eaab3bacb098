//! The suffixes of an instruction.  Each must be taken by whoever decodes it: one that is left is unknown.

use crate::isa::Ty;
use crate::math::round::Round;

pub struct Mods<'a> {
    parts: &'a [String],
    taken: u64,
}

impl<'a> Mods<'a> {
    /// Suffixes, without the mnemonic.
    pub fn new(parts: &'a [String]) -> Mods<'a> {
        Mods { parts, taken: 0 }
    }

    fn free(&self, i: usize) -> bool {
        i < 64 && self.taken >> i & 1 == 0
    }

    /// Takes the first suffix that is `what`.
    pub fn take(&mut self, what: &str) -> bool {
        for i in 0..self.parts.len() {
            if self.free(i) && self.parts[i] == what {
                self.taken |= 1 << i;
                return true;
            }
        }
        false
    }

    /// Takes the first suffix that `f` knows.
    pub fn find<T>(&mut self, f: impl Fn(&str) -> Option<T>) -> Option<T> {
        for i in 0..self.parts.len() {
            if self.free(i)
                && let Some(v) = f(&self.parts[i])
            {
                self.taken |= 1 << i;
                return Some(v);
            }
        }
        None
    }

    /// The first of `all` that is there.
    pub fn one_of(&mut self, all: &[&'static str]) -> Option<&'static str> {
        self.find(|s| all.iter().copied().find(|a| *a == s))
    }

    /// Takes the first type.
    pub fn ty(&mut self) -> Option<Ty> {
        self.find(Ty::named)
    }

    /// Takes a rounding mode of floats.
    pub fn round(&mut self) -> Option<Round> {
        self.find(|s| {
            Some(match s {
                "rn" => Round::Nearest,
                "rz" => Round::Zero,
                "rm" => Round::Down,
                "rp" => Round::Up,
                "rna" => Round::Away,
                _ => return None,
            })
        })
    }

    /// Takes a rounding mode to whole numbers.
    pub fn round_whole(&mut self) -> Option<Round> {
        self.find(|s| {
            Some(match s {
                "rni" => Round::Nearest,
                "rzi" => Round::Zero,
                "rmi" => Round::Down,
                "rpi" => Round::Up,
                _ => return None,
            })
        })
    }

    /// 1, 2 or 4 elements; 8 of 32 bits exist since PTX 8.8.
    pub fn vector(&mut self) -> usize {
        self.find(|s| match s {
            "v2" => Some(2),
            "v4" => Some(4),
            "v8" => Some(8),
            _ => None,
        })
        .unwrap_or(1)
    }

    /// The first suffix that nobody took.
    pub fn rest(&self) -> Option<&'a str> {
        (0..self.parts.len()).find(|&i| self.free(i)).map(|i| self.parts[i].as_str())
    }
}
