//! A model cut for inference.

use crate::chunk_store::{Geometry, Precision};
use rambac_ir::Graph;

/// The parts of a model, and the sizes that the session itself must know.
pub struct SessionParts<T> {
    /// `input_ids` → `hidden`.
    pub lower: T,
    /// `hidden` → `k`, `v`, `landmarks`; `None` for a plain Mamba-2.
    pub chunks: Option<T>,
    /// `hidden`, `start`, `k`, `v`, `landmarks` → `upper`.
    pub upper: Option<T>,
    /// `hidden` → `upper`, without retrieval and attention.
    pub upper_flash: Option<T>,
    /// `upper` → `logits`.
    pub head: T,
    pub chunk_size: usize,
    pub hidden_size: usize,
    /// `[heads, dim]` of keys and values, and of landmarks.
    pub kv: [usize; 2],
    pub landmark: [usize; 2],
}

/// Parts that are not compiled yet.
pub type SessionGraphs = SessionParts<Graph>;

impl<T> SessionParts<T> {
    /// The same with every part changed.
    pub fn map<U>(&self, mut f: impl FnMut(&T) -> U) -> SessionParts<U> {
        match self.try_map(|p| Ok::<_, std::convert::Infallible>(f(p))) {
            Ok(parts) => parts,
            Err(never) => match never {},
        }
    }
    /// As [`map`](Self::map), if every change succeeds.
    ///
    /// # Errors
    /// The first that `f` gives.
    pub fn try_map<U, E>(&self, mut f: impl FnMut(&T) -> Result<U, E>) -> Result<SessionParts<U>, E> {
        Ok(SessionParts {
            lower: f(&self.lower)?,
            chunks: self.chunks.as_ref().map(&mut f).transpose()?,
            upper: self.upper.as_ref().map(&mut f).transpose()?,
            upper_flash: self.upper_flash.as_ref().map(&mut f).transpose()?,
            head: f(&self.head)?,
            chunk_size: self.chunk_size,
            hidden_size: self.hidden_size,
            kv: self.kv,
            landmark: self.landmark,
        })
    }
    pub(super) fn geometry(&self, precision: Precision) -> Geometry {
        Geometry {
            heads: self.kv[0],
            chunk: self.chunk_size,
            dim: self.kv[1],
            landmark_dim: self.landmark[1],
            precision,
        }
    }
    /// The parts that there are, with their names.
    pub fn named(&self) -> Vec<(&'static str, &T)> {
        let all = [
            ("lower", Some(&self.lower)),
            ("chunks", self.chunks.as_ref()),
            ("upper", self.upper.as_ref()),
            ("upper_flash", self.upper_flash.as_ref()),
            ("head", Some(&self.head)),
        ];
        all.into_iter().filter_map(|(name, part)| Some((name, part?))).collect()
    }
}
