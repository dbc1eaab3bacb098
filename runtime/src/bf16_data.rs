//! bf16 elements in host memory: owned, or part of a file that is mapped.
//!
//! A mapped part is read from the file as pages are touched, and shared with whoever else maps it; whoever wants to
//! write gets a copy.

use half::bf16;
use half::slice::HalfFloatSliceExt;
use memmap2::Mmap;
use std::ops::Deref;
use std::sync::Arc;

/// See the module's comment.
#[derive(Clone)]
pub struct Bf16Data(Repr);

#[derive(Clone)]
enum Repr {
    Owned(Vec<bf16>),
    /// Bytes `start..start + 2 * len`, at an even address.
    Mapped {
        map: Arc<Mmap>,
        start: usize,
        len: usize,
    },
}

impl Bf16Data {
    /// Rounds to nearest, ties to even.
    pub fn round(x: &[f32]) -> Self {
        let mut v = vec![bf16::ZERO; x.len()];
        v.convert_from_f32_slice(x);
        v.into()
    }

    /// The `len` elements, little-endian, from byte `start` of a mapped file on; copied if the address is odd.  `None` if
    /// the file is too short.
    pub(crate) fn mapped(map: &Arc<Mmap>, start: usize, len: usize) -> Option<Self> {
        let bytes = map.get(start..start.checked_add(len.checked_mul(2)?)?)?;
        if bytes.as_ptr().cast::<bf16>().is_aligned() {
            return Some(Self(Repr::Mapped { map: map.clone(), start, len }));
        }
        let (pairs, _) = bytes.as_chunks::<2>();
        Some(pairs.iter().map(|&b| bf16::from_le_bytes(b)).collect::<Vec<_>>().into())
    }

    /// Whether they lie in a file.
    pub fn is_mapped(&self) -> bool {
        matches!(self.0, Repr::Mapped { .. })
    }

    /// The elements to write to; mapped ones are copied first.
    pub fn make_mut(&mut self) -> &mut [bf16] {
        if self.is_mapped() {
            self.0 = Repr::Owned(self.to_vec());
        }
        match &mut self.0 {
            Repr::Owned(v) => v,
            Repr::Mapped { .. } => unreachable!("BUG: just copied"),
        }
    }
}

impl From<Vec<bf16>> for Bf16Data {
    fn from(v: Vec<bf16>) -> Self {
        Self(Repr::Owned(v))
    }
}

impl Deref for Bf16Data {
    type Target = [bf16];
    fn deref(&self) -> &[bf16] {
        match &self.0 {
            Repr::Owned(v) => v,
            Repr::Mapped { map, start, len } => {
                let at = map[*start..*start + 2 * len].as_ptr();
                // SAFETY: in the file and aligned since `mapped`; bf16 is any two bytes; the map lives as long as `self`
                // and mapped files are not changed in place (see `checkpoint`).
                unsafe { std::slice::from_raw_parts(at.cast(), *len) }
            }
        }
    }
}

impl PartialEq for Bf16Data {
    fn eq(&self, o: &Self) -> bool {
        **self == **o
    }
}

impl std::fmt::Debug for Bf16Data {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
