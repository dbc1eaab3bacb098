//! Named tensors that live between runs: params and states.

use crate::huge_pages;
use crate::tensor::Tensor;
use std::collections::BTreeMap;

/// See the module's comment.  Ordered by name, so that everything made from it is deterministic.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Store(pub BTreeMap<String, Tensor>);

impl Store {
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.0.get(name)
    }
    pub fn insert(&mut self, name: impl Into<String>, t: Tensor) {
        self.0.insert(name.into(), t);
    }
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
    /// Asks for [large pages](crate::huge_pages) under all tensors.
    pub fn prefer_huge_pages(&self) {
        huge_pages::prefer(self.0.values().map(|t| (t.view().as_ptr(), t.ty().bytes())));
    }
    pub fn bytes(&self) -> usize {
        self.0.values().map(|t| t.ty().bytes()).sum()
    }
}
