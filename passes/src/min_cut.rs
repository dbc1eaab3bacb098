//! Minimum cuts of small flow networks, by Dinic's algorithm in integers: the same cut on every machine.

use std::collections::VecDeque;

/// A capacity that no cut crosses.
pub const INFINITE: u64 = 1 << 60;

/// A network under construction.
pub struct Network {
    /// Edges from each vertex; an edge's reverse is its number with the last bit flipped.
    from: Vec<Vec<usize>>,
    to: Vec<usize>,
    left: Vec<u64>,
}

impl Network {
    pub fn new(vertices: usize) -> Self {
        Self { from: vec![vec![]; vertices], to: vec![], left: vec![] }
    }

    /// Adds an edge; capacities of all finite edges together must stay below [`INFINITE`].
    pub fn edge(&mut self, from: usize, to: usize, capacity: u64) {
        for (a, b, c) in [(from, to, capacity), (to, from, 0)] {
            self.from[a].push(self.to.len());
            self.to.push(b);
            self.left.push(c);
        }
    }

    /// Steps from `source` over edges with capacity left; `usize::MAX`: out of reach.
    fn levels(&self, source: usize) -> Vec<usize> {
        let mut level = vec![usize::MAX; self.from.len()];
        level[source] = 0;
        let mut queue = VecDeque::from([source]);
        while let Some(v) = queue.pop_front() {
            for &e in &self.from[v] {
                let w = self.to[e];
                if self.left[e] > 0 && level[w] == usize::MAX {
                    level[w] = level[v] + 1;
                    queue.push_back(w);
                }
            }
        }
        level
    }

    /// Sends up to `most` from `v` to `sink` along rising levels; `next` remembers which edges are used up.
    fn push(&mut self, v: usize, sink: usize, most: u64, level: &[usize], next: &mut [usize]) -> u64 {
        if v == sink {
            return most;
        }
        while next[v] < self.from[v].len() {
            let e = self.from[v][next[v]];
            let w = self.to[e];
            if self.left[e] > 0 && level[w] == level[v] + 1 {
                let sent = self.push(w, sink, most.min(self.left[e]), level, next);
                if sent > 0 {
                    self.left[e] -= sent;
                    self.left[e ^ 1] += sent;
                    return sent;
                }
            }
            next[v] += 1;
        }
        0
    }

    /// The vertices on the source's side of the minimum cut; of several such cuts the one with the fewest.
    pub fn cut(mut self, source: usize, sink: usize) -> Vec<bool> {
        loop {
            let level = self.levels(source);
            if level[sink] == usize::MAX {
                return level.iter().map(|l| *l != usize::MAX).collect();
            }
            let mut next = vec![0; self.from.len()];
            while self.push(source, sink, INFINITE, &level, &mut next) > 0 {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn capacity(edges: &[(usize, usize, u64)], side: &[bool]) -> u64 {
        edges.iter().filter(|(a, b, _)| side[*a] && !side[*b]).map(|e| e.2).sum()
    }

    proptest! {
        /// Against every cut of a small network.
        #[test]
        fn no_cut_is_smaller(edges in proptest::collection::vec((0usize..7, 0usize..7, 0u64..20), 0..30)) {
            let mut n = Network::new(7);
            edges.iter().for_each(|&(a, b, c)| n.edge(a, b, c));
            let side = n.cut(0, 6);
            prop_assert!(side[0] && !side[6]);
            let all = (0..1usize << 5).map(|bits| {
                let side: Vec<bool> = (0..7).map(|v| v == 0 || (v < 6 && bits >> (v - 1) & 1 == 1)).collect();
                (capacity(&edges, &side), side.iter().filter(|s| **s).count())
            });
            let least = all.min().unwrap();
            prop_assert_eq!((capacity(&edges, &side), side.iter().filter(|s| **s).count()), least);
        }
    }
}
