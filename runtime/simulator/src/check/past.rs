//! What a thread knows of what others did before: vector clocks over the warps of a cluster, by lane where lanes differ.
//!
//! Every warp has a clock that advances where some of its lanes hand their past on (barriers, `bar.warp.sync`, mbarrier arrivals,
//! fences).  An access of a thread stamped `t` lies in a past iff `t` is below what that past has for the thread.  Mostly all
//! lanes of a warp have handed on the same, and one number per warp says it; where only some have (a `__syncwarp` with a
//! mask, an arrival of an elected lane), the warp has numbers by lane beside it.

use std::collections::HashMap;
use std::sync::Arc;

/// Pasts of other clusters' threads, by cluster.
pub type Known = HashMap<u32, Past>;

/// See the module's comment.
#[derive(Clone, Debug, Default)]
pub struct Past {
    /// Of each warp of the cluster: what all of its lanes did before this is known.
    warps: Vec<u32>,
    /// Warps of some of whose lanes more is known.
    lanes: Vec<(u32, [u32; 32])>,
    /// Of other clusters: what was learnt through global memory.
    others: Option<Arc<Known>>,
}

impl Past {
    pub fn new(n_warps: usize) -> Past {
        Past { warps: vec![0; n_warps], lanes: vec![], others: None }
    }

    pub fn clear(&mut self) {
        self.warps.fill(0);
        self.lanes.clear();
        self.others = None;
    }

    fn of_lanes(&self, warp: u32) -> Option<&[u32; 32]> {
        self.lanes.iter().find(|l| l.0 == warp).map(|l| &l.1)
    }

    /// Whether what a thread of the cluster did at `clock` lies in this past.
    #[inline(always)]
    pub fn knows(&self, thread: u32, clock: u32) -> bool {
        let known = self.warps.get((thread >> 5) as usize).is_some_and(|&w| clock < w);
        known || !self.lanes.is_empty() && self.unknown(thread >> 5, clock, 1 << (thread & 31)) == 0
    }

    /// Lanes of a warp whose accesses at `clock` do not lie in this past.
    pub fn unknown(&self, warp: u32, clock: u32, mask: u32) -> u32 {
        if self.warps.get(warp as usize).is_some_and(|&w| clock < w) {
            return 0;
        }
        let Some(l) = self.of_lanes(warp) else { return mask };
        (0..32).filter(|&i| mask >> i & 1 == 1 && clock >= l[i]).fold(0, |m, i| m | 1 << i)
    }

    /// As [`knows`](Self::knows), of a thread of another cluster.
    pub fn knows_of(&self, cluster: u32, thread: u32, clock: u32) -> bool {
        self.others.as_ref().and_then(|o| o.get(&cluster)).is_some_and(|p| p.knows(thread, clock))
    }

    /// Adds what lanes of a warp did before `clock`; those of `live` that are not among them may have done more.
    pub fn add(&mut self, warp: u32, mask: u32, live: u32, clock: u32) {
        let w = warp as usize;
        if self.warps.len() <= w {
            self.warps.resize(w + 1, 0);
        }
        if live & !mask == 0 {
            self.warps[w] = self.warps[w].max(clock);
            self.lanes.retain(|l| l.0 != warp);
            return;
        }
        let at = self.lanes.iter().position(|l| l.0 == warp).unwrap_or_else(|| {
            self.lanes.push((warp, [0; 32]));
            self.lanes.len() - 1
        });
        for (i, l) in self.lanes[at].1.iter_mut().enumerate() {
            // Who left does nothing more.
            *l = if live >> i & 1 == 0 {
                u32::MAX
            } else if mask >> i & 1 == 1 {
                (*l).max(clock)
            } else {
                *l
            };
        }
        self.settle(at);
    }

    /// Says for a warp as a whole what is known of all of its lanes.
    fn settle(&mut self, at: usize) {
        let (warp, lanes) = &self.lanes[at];
        let (warp, least) = (*warp as usize, lanes.iter().copied().min().unwrap_or(0));
        let all = least.max(self.warps[warp]);
        if all != u32::MAX {
            self.warps[warp] = all;
        }
        if self.lanes[at].1.iter().all(|&l| l == u32::MAX || l <= all) {
            self.lanes.swap_remove(at);
        }
    }

    /// Adds another past, but not what it has of other clusters.
    pub fn join_own(&mut self, other: &Past) {
        if self.warps.len() < other.warps.len() {
            self.warps.resize(other.warps.len(), 0);
        }
        for (a, &b) in self.warps.iter_mut().zip(&other.warps) {
            *a = (*a).max(b);
        }
        for (warp, theirs) in &other.lanes {
            match self.lanes.iter_mut().find(|l| l.0 == *warp) {
                Some((_, mine)) => mine.iter_mut().zip(theirs).for_each(|(a, &b)| *a = (*a).max(b)),
                None => self.lanes.push((*warp, *theirs)),
            }
        }
        for at in (0..self.lanes.len()).rev() {
            self.settle(at);
        }
    }

    /// Adds another past.
    pub fn join(&mut self, other: &Past) {
        self.join_own(other);
        match (&mut self.others, &other.others) {
            (_, None) => {}
            (mine @ None, theirs) => *mine = theirs.clone(),
            (Some(mine), Some(theirs)) if Arc::ptr_eq(mine, theirs) => {}
            (Some(mine), Some(theirs)) => {
                let mine = Arc::make_mut(mine);
                theirs.iter().for_each(|(c, p)| mine.entry(*c).or_default().join_own(p));
            }
        }
    }

    /// Adds pasts of threads of all clusters; `own` is this one.
    pub fn join_known(&mut self, own: u32, known: &Known) {
        for (c, p) in known {
            if *c == own {
                self.join_own(p);
            } else {
                let others = self.others.get_or_insert_default();
                Arc::make_mut(others).entry(*c).or_default().join_own(p);
            }
        }
    }

    /// What it has of other clusters.
    pub fn others(&self) -> Option<&Known> {
        self.others.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_hand_on_their_own_past() {
        let mut p = Past::new(2);
        p.add(1, 0b11, 0xf, 5);
        assert!(p.knows(33, 4) && !p.knows(33, 5) && !p.knows(34, 4) && !p.knows(0, 0));
        assert_eq!(p.unknown(1, 4, 0xf), 0b1100);
        // The others follow: now it is known of the warp.
        p.add(1, 0b1100, 0xf, 7);
        assert!(p.knows(35, 6) && p.knows(33, 4) && !p.knows(33, 5));
        p.add(1, 0xf, 0xf, 9);
        assert_eq!((p.warps[1], p.lanes.len()), (9, 0));
    }

    #[test]
    fn joins_take_the_later_of_each() {
        let (mut a, mut b) = (Past::new(2), Past::new(2));
        a.add(0, 1, 3, 4);
        b.add(0, 2, 3, 6);
        b.add(1, 3, 3, 2);
        a.join(&b);
        assert!(a.knows(0, 3) && !a.knows(0, 4) && a.knows(1, 5) && a.knows(40, 1));
        let mut far = Past::new(2);
        far.join_known(0, &Known::from([(7, a.clone()), (0, b)]));
        assert!(far.knows_of(7, 1, 5) && !far.knows_of(7, 1, 6) && !far.knows_of(6, 1, 0) && far.knows(1, 5));
        a.join(&far);
        assert!(a.knows_of(7, 0, 3));
    }
}
