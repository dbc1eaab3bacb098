//! The choice of chunks: the `k` best finite scores of every row.
//!
//! Equal scores: the smaller chunk wins.  A row with fewer than `k` finite scores fills fewer slots; unfilled slots
//! hold index 0 and are beyond `count`.  The choice has no gradient.
//!
//! `sinks` and `recent` are units that every row takes whatever their scores are: the first and the last so many that
//! it sees (whose score is not -inf).  They count among the `k`; with `k = sinks + recent` nothing else is chosen.

use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, float, mismatch, rank, traffic};
use crate::dim::Dim;
use crate::host::HostArray;
use crate::ty::{ConcreteTy, Ty};
use crate::{op_struct, word_enum};

word_enum! {
    /// How the chosen chunks are ordered.
    Order {
        /// Largest chunk index first.
        Recent = "recent",
        /// Best score first.
        Score = "score",
    }
}

op_struct! {
    /// `select s`: `s: [N, L, h, C]` → indices `i32[N, L, h, k]`, count `i32[N, L, h]`.
    Select = "select" { k: usize, order: Order = Order::Recent, sinks: usize = 0, recent: usize = 0 }
}

/// Chosen chunks of one row of scores, in order; the first `sinks` and the last `recent` that are visible are among them.
pub(super) fn choose(row: &[f64], k: usize, order: Order, (sinks, recent): (usize, usize)) -> Vec<usize> {
    let mut all: Vec<usize> = (0..row.len()).filter(|&c| row[c] > f64::NEG_INFINITY).collect();
    let forced: Vec<usize> =
        all.iter().enumerate().filter(|(i, _)| *i < sinks || i + recent >= all.len()).map(|(_, &c)| c).collect();
    // -0 equals 0.
    let by_score = |&a: &usize, &b: &usize| (row[b] + 0.0).total_cmp(&(row[a] + 0.0)).then(a.cmp(&b));
    all.retain(|c| !forced.contains(c));
    all.sort_by(by_score);
    all.truncate(k - forced.len().min(k));
    all.extend(forced);
    all.sort_by(by_score);
    if order == Order::Recent {
        all.sort_by(|a, b| b.cmp(a));
    }
    all
}

impl Select {
    /// The `k` best.
    pub fn new(k: usize, order: Order) -> Self {
        Self { k, order, sinks: 0, recent: 0 }
    }
}

impl OpDef for Select {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 1)?;
        float(x, 0)?;
        rank(x, 0, 4)?;
        if self.k == 0 {
            return Err(mismatch("k must be at least 1"));
        }
        if self.sinks.saturating_add(self.recent) > self.k {
            let forced = format!("sinks = {} and recent = {}", self.sinks, self.recent);
            return Err(mismatch(format!("{forced} are more than k = {}; they count among the k", self.k)));
        }
        let rows = &x[0].shape[..3];
        let k = Dim::int(self.k);
        Ok(vec![Ty::i32(rows.iter().chain([&k]).cloned()), Ty::i32(rows.iter().cloned())])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: x[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let c = x[0].shape[3];
        let (mut idx, mut count) = (vec![], vec![]);
        for row in 0..y[1].elements() {
            let chosen = choose(&x[0].f()[row * c..][..c], self.k, self.order, (self.sinks, self.recent));
            count.push(chosen.len() as i32);
            idx.extend((0..self.k).map(|i| chosen.get(i).map_or(0, |&c| c as i32)));
        }
        vec![HostArray::i32(&y[0].shape, idx), HostArray::i32(&y[1].shape, count)]
    }
    fn vjp(&self, _: &mut Vjp) -> Gradients {
        Ok(vec![None])
    }
}
