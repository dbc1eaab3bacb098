//! The vocabulary of attention that selects, op by op: what runs where scores or branches are composed in ways that no fused
//! kernel knows.
//!
//! All arrays are contiguous.  One task has some rows; what is summed over rows (a landmark's gradient) is summed by one task
//! in the order of the rows.

use crate::kernels::selection::{Order, Weighting, weigh, weigh_backward};
use crate::par::{SharedMut, for_blocks, rows_per_task};

/// Batch, tokens, query heads, landmark heads, width and units of scores: `q` is (n, l, heads, dim), landmarks
/// (n, units, landmark_heads, dim), scores (n, l, heads, units).
#[derive(Clone, Copy, Debug)]
pub struct Scores {
    pub n: usize,
    pub l: usize,
    pub heads: usize,
    pub landmark_heads: usize,
    pub dim: usize,
    pub units: usize,
    pub scale: f32,
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    // Eight sums, so that it vectorises; always the same eight.
    let (mut sums, wide) = ([0.0f32; 8], a.len() / 8 * 8);
    for (a, b) in a[..wide].chunks_exact(8).zip(b[..wide].chunks_exact(8)) {
        (0..8).for_each(|i| sums[i] += a[i] * b[i]);
    }
    let tail: f32 = a[wide..].iter().zip(&b[wide..]).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + tail
}

fn axpy(factor: f32, x: &[f32], y: &mut [f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += factor * x);
}

/// Units that the token at `start + t` sees.
fn visible(start: i32, t: usize, chunk: usize, units: usize) -> usize {
    ((start.max(0) as usize + t) / chunk).min(units)
}

impl Scores {
    fn rows(&self) -> usize {
        self.n * self.l * self.heads
    }
    /// The row of a unit that a row of queries meets.
    fn landmark(&self, row: usize, unit: usize) -> usize {
        let (seq, head) = (row / (self.l * self.heads), row % self.heads * self.landmark_heads / self.heads);
        ((seq * self.units + unit) * self.landmark_heads + head) * self.dim
    }

    /// `out[t, c] = scale · q_t · landmark_c`, -inf where the unit of `chunk` tokens is not complete.
    pub fn forward(&self, q: &[f32], landmarks: &[f32], start: &[i32], chunk: usize, out: &mut [f32]) {
        let out = SharedMut::new(out);
        let (dim, units) = (self.dim, self.units);
        for_blocks(self.rows(), rows_per_task(units * dim), self.rows() * units * dim, |_, first, last| {
            for row in first..last {
                // SAFETY: every task has its own rows.
                let line = unsafe { out.slice(row * units, units) };
                let (seq, t) = (row / (self.l * self.heads), row / self.heads % self.l);
                let (seen, hidden) = line.split_at_mut(visible(start[seq], t, chunk, units));
                hidden.fill(f32::NEG_INFINITY);
                let q = &q[row * dim..][..dim];
                for (c, s) in seen.iter_mut().enumerate() {
                    *s = self.scale * dot(q, &landmarks[self.landmark(row, c)..][..dim]);
                }
            }
        });
    }

    /// Gradients of `q` and the landmarks, both overwritten; `ds` is 0 where the score is -inf.
    pub fn backward(&self, q: &[f32], landmarks: &[f32], ds: &[f32], dq: &mut [f32], dlandmarks: &mut [f32]) {
        let Scores { l, heads, landmark_heads, dim, units, scale, .. } = *self;
        let work = self.rows() * units * dim;
        let dq = SharedMut::new(dq);
        for_blocks(self.rows(), rows_per_task(units * dim), work, |_, first, last| {
            for row in first..last {
                // SAFETY: every task has its own rows.
                let out = unsafe { dq.slice(row * dim, dim) };
                out.fill(0.0);
                for (c, &g) in ds[row * units..][..units].iter().enumerate().filter(|(_, g)| **g != 0.0) {
                    axpy(scale * g, &landmarks[self.landmark(row, c)..][..dim], out);
                }
            }
        });
        let dl = SharedMut::new(dlandmarks);
        let group = heads / landmark_heads.max(1);
        for_blocks(self.n * units * landmark_heads, rows_per_task(l * group * dim), work, |_, first, last| {
            for i in first..last {
                let (seq, c, head) = (i / landmark_heads / units, i / landmark_heads % units, i % landmark_heads);
                // SAFETY: every task has its own rows.
                let out = unsafe { dl.slice(i * dim, dim) };
                out.fill(0.0);
                for row in (0..l).flat_map(|t| (0..group).map(move |g| (seq * l + t) * heads + head * group + g)) {
                    let g = ds[row * units + c];
                    if g != 0.0 {
                        axpy(scale * g, &q[row * dim..][..dim], out);
                    }
                }
            }
        });
    }
}

/// Copies scores (n, l, heads, units), with -inf where a unit of `chunk` tokens is not complete.
pub fn mask(s: &[f32], start: &[i32], (l, heads, units): (usize, usize, usize), chunk: usize, out: &mut [f32]) {
    let out = SharedMut::new(out);
    let rows = start.len() * l * heads;
    for_blocks(rows, rows_per_task(units), rows * units, |_, first, last| {
        for row in first..last {
            // SAFETY: every task has its own rows.
            let line = unsafe { out.slice(row * units, units) };
            let seen = visible(start[row / (l * heads)], row / heads % l, chunk, units);
            line[..seen].copy_from_slice(&s[row * units..][..seen]);
            line[seen..].fill(f32::NEG_INFINITY);
        }
    });
}

/// The choice of units by dense scores, rows of `units`.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    pub units: usize,
    pub k: usize,
    pub order: Order,
    /// Visible units that are always chosen: the first and the last so many.
    pub sinks: usize,
    pub recent: usize,
}

impl Choice {
    /// Fills indices (rows, k) and counts (rows); equal scores are won by the smaller unit.
    pub fn run(&self, s: &[f32], indices: &mut [i32], count: &mut [i32]) {
        let (rows, shared) = (count.len(), (SharedMut::new(indices), SharedMut::new(count)));
        for_blocks(rows, rows_per_task(self.units * 2), rows * self.units * 2, |_, first, last| {
            let mut best: Vec<(f32, usize)> = Vec::with_capacity(self.k + 1);
            for row in first..last {
                // SAFETY: every task has its own rows.
                let (out, n) = unsafe { (shared.0.slice(row * self.k, self.k), shared.1.slice(row, 1)) };
                self.row(&s[row * self.units..][..self.units], &mut best);
                n[0] = best.len() as i32;
                out.fill(0);
                best.iter().zip(out).for_each(|(b, o)| *o = b.1 as i32);
            }
        });
    }

    fn row(&self, s: &[f32], best: &mut Vec<(f32, usize)>) {
        best.clear();
        let seen = s.iter().filter(|s| **s > f32::NEG_INFINITY).count();
        let forced = (self.sinks + self.recent).min(seen);
        let (mut at, mut free) = (0, self.k.saturating_sub(forced));
        // Forced ones stand in front with their own scores; free ones after them, best first.
        for (c, &score) in s.iter().enumerate().filter(|(_, s)| **s > f32::NEG_INFINITY) {
            if at < self.sinks || at + self.recent >= seen {
                best.insert(0, (score, c));
            } else if free > 0 {
                let first = best.len() - (self.k.saturating_sub(forced) - free);
                let place = first + best[first..].partition_point(|b| b.0 >= score);
                best.insert(place, (score, c));
                free -= 1;
            } else if let Some(last) = best.last()
                && self.k > forced
                && score > last.0
            {
                best.pop();
                let first = best.len() + 1 - (self.k - forced);
                let place = first + best[first..].partition_point(|b| b.0 >= score);
                best.insert(place, (score, c));
            }
            at += 1;
        }
        match self.order {
            Order::Recent => best.sort_unstable_by_key(|b| std::cmp::Reverse(b.1)),
            Order::Score => best.sort_unstable_by(|a, b| (b.0 + 0.0).total_cmp(&(a.0 + 0.0)).then(a.1.cmp(&b.1))),
        }
    }
}

/// The rule's weights of the scores (rows, units) that were chosen.
pub fn weigh_chosen(
    rule: Weighting,
    s: &[f32],
    units: usize,
    indices: &[i32],
    count: &[i32],
    k: usize,
    out: &mut [f32],
) {
    let shared = SharedMut::new(out);
    for_blocks(count.len(), rows_per_task(32 * k), count.len() * 32 * k, |_, first, last| {
        let mut picked = vec![0.0; k];
        for row in first..last {
            // SAFETY: every task has its own rows.
            let out = unsafe { shared.slice(row * k, k) };
            pick(s, units, &indices[row * k..][..count[row] as usize], row, &mut picked);
            weigh(rule, &picked, &count[row..=row], k, out);
        }
    });
}

fn pick(s: &[f32], units: usize, indices: &[i32], row: usize, out: &mut [f32]) {
    indices.iter().zip(out).for_each(|(&i, o)| *o = s[row * units + i as usize]);
}

/// The gradient of the scores, overwritten, from that of the weights.
#[allow(clippy::too_many_arguments)]
pub fn weigh_chosen_backward(
    rule: Weighting,
    s: &[f32],
    units: usize,
    indices: &[i32],
    count: &[i32],
    k: usize,
    dw: &[f32],
    ds: &mut [f32],
) {
    let shared = SharedMut::new(ds);
    for_blocks(count.len(), rows_per_task(32 * k + units), count.len() * (32 * k + units), |_, first, last| {
        let (mut picked, mut w, mut g) = (vec![0.0; k], vec![0.0; k], vec![0.0; k]);
        for row in first..last {
            // SAFETY: every task has its own rows.
            let out = unsafe { shared.slice(row * units, units) };
            out.fill(0.0);
            let chosen = &indices[row * k..][..count[row] as usize];
            pick(s, units, chosen, row, &mut picked);
            weigh(rule, &picked, &count[row..=row], k, &mut w);
            weigh_backward(rule, &picked, &w, &count[row..=row], k, &dw[row * k..][..k], &mut g);
            chosen.iter().zip(&g).for_each(|(&i, g)| out[i as usize] += g);
        }
    });
}

/// Softmax and log-sum-exp of rows of `k`.
pub fn softmax(x: &[f32], k: usize, p: &mut [f32], lse: &mut [f32]) {
    let (rows, shared) = (lse.len(), (SharedMut::new(p), SharedMut::new(lse)));
    for_blocks(rows, rows_per_task(16 * k), rows * 16 * k, |_, first, last| {
        for row in first..last {
            // SAFETY: every task has its own rows.
            let (p, lse) = unsafe { (shared.0.slice(row * k, k), shared.1.slice(row, 1)) };
            lse[0] = softmax_row(&x[row * k..][..k], p);
        }
    });
}

fn softmax_row(x: &[f32], p: &mut [f32]) -> f32 {
    let top = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if top == f32::NEG_INFINITY {
        p.fill(0.0);
        return top;
    }
    let mut sum = 0.0;
    for (p, x) in p.iter_mut().zip(x) {
        *p = (x - top).exp();
        sum += *p;
    }
    p.iter_mut().for_each(|p| *p /= sum);
    top + sum.ln()
}

/// What is mixed: outputs (rows, dim) or (rows, k, dim) with weights or log-sum-exps that several heads may share.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    /// n · l · heads.
    pub rows: usize,
    pub heads: usize,
    pub dim: usize,
}

impl Mix {
    /// The row of an array with `heads` heads that belongs to a row here.
    fn shared(&self, row: usize, heads: usize) -> usize {
        row / self.heads * heads + row % self.heads * heads / self.heads
    }
    fn each(&self, slots: usize, f: impl Fn(usize) + Sync + Send) {
        let cost = 2 * slots * self.dim + 16 * slots;
        for_blocks(self.rows, rows_per_task(cost), self.rows * cost, |_, first, last| (first..last).for_each(&f));
    }

    /// `y = Σ w_s o_s`; one `o` holds all slots, or there is one a slot.
    pub fn aggregate(&self, o: &[&[f32]], w: &[f32], w_heads: usize, k: usize, y: &mut [f32]) {
        let (dim, y) = (self.dim, SharedMut::new(y));
        self.each(k, |row| {
            // SAFETY: every task has its own rows.
            let out = unsafe { y.slice(row * dim, dim) };
            out.fill(0.0);
            let w = &w[self.shared(row, w_heads) * k..][..k];
            for (s, &w) in w.iter().enumerate() {
                axpy(w, slot(o, row, s, k, dim), out);
            }
        });
    }

    /// Gradients of the outputs and of the weights, all overwritten.
    #[allow(clippy::too_many_arguments)]
    pub fn aggregate_backward(
        &self,
        o: &[&[f32]],
        w: &[f32],
        w_heads: usize,
        k: usize,
        dy: &[f32],
        d_o: &mut [&mut [f32]],
        dw: &mut [f32],
    ) {
        let dim = self.dim;
        let one = d_o.len() == 1;
        let d_o: Vec<SharedMut> = d_o.iter_mut().map(|d| SharedMut::new(d)).collect();
        let dw = SharedMut::new(dw);
        // Heads that share weights are one task: their sums have one order.
        let group = self.heads / w_heads.max(1);
        let cost = group * (4 * k * dim + 16 * k);
        let all = self.rows / group.max(1);
        for_blocks(all, rows_per_task(cost), all * cost, |_, first, last| {
            for at in first..last {
                // SAFETY: every task has its own weights and rows.
                let dw = unsafe { dw.slice(at * k, k) };
                dw.fill(0.0);
                for row in (0..group).map(|g| at / w_heads * self.heads + at % w_heads * group + g) {
                    let dy = &dy[row * dim..][..dim];
                    for s in 0..k {
                        let (part, place) = if one { (0, row * k + s) } else { (s, row) };
                        // SAFETY: as above.
                        let out = unsafe { d_o[part].slice(place * dim, dim) };
                        out.iter_mut().zip(dy).for_each(|(o, g)| *o = w[at * k + s] * g);
                        dw[s] += dot(slot(o, row, s, k, dim), dy);
                    }
                }
            }
        });
    }

    /// Outputs with their log-sum-exps, whose heads are given, become the one over all keys.
    pub fn merge(&self, parts: &[(&[f32], &[f32], usize)], y: &mut [f32], lse: &mut [f32]) {
        let (dim, y, lse) = (self.dim, SharedMut::new(y), SharedMut::new(lse));
        self.each(parts.len(), |row| {
            // SAFETY: every task has its own rows.
            let (out, lse) = unsafe { (y.slice(row * dim, dim), lse.slice(row, 1)) };
            out.fill(0.0);
            let (w, all) = self.weights(parts, row);
            lse[0] = all;
            for (part, w) in parts.iter().zip(w) {
                axpy(w, &part.0[row * dim..][..dim], out);
            }
        });
    }

    fn weights(&self, parts: &[(&[f32], &[f32], usize)], row: usize) -> (Vec<f32>, f32) {
        let z: Vec<f32> = parts.iter().map(|p| p.1[self.shared(row, p.2)]).collect();
        let mut w = vec![0.0; z.len()];
        let lse = softmax_row(&z, &mut w);
        (w, lse)
    }

    /// Gradients of every part's output and log-sum-exp, all overwritten.
    pub fn merge_backward(
        &self,
        parts: &[(&[f32], &[f32], usize)],
        dy: &[f32],
        dlse: &[f32],
        d_parts: &mut [(&mut [f32], &mut [f32])],
    ) {
        let dim = self.dim;
        for d in d_parts.iter_mut() {
            d.1.fill(0.0);
        }
        let shared: Vec<(SharedMut, SharedMut)> =
            d_parts.iter_mut().map(|d| (SharedMut::new(d.0), SharedMut::new(d.1))).collect();
        // The heads of a token are one task: some share a log-sum-exp.
        let tokens = self.rows / self.heads.max(1);
        let cost = self.heads * parts.len() * (4 * dim + 32);
        for_blocks(tokens, rows_per_task(cost), tokens * cost, |_, first, last| {
            for row in first * self.heads..last * self.heads {
                let (w, _) = self.weights(parts, row);
                let dy = &dy[row * dim..][..dim];
                let dots: Vec<f32> = parts.iter().map(|p| dot(&p.0[row * dim..][..dim], dy)).collect();
                let mean: f32 = w.iter().zip(&dots).map(|(w, d)| w * d).sum();
                for (i, (d_o, d_lse)) in shared.iter().enumerate() {
                    // SAFETY: every task has its own tokens.
                    let (out, at) =
                        unsafe { (d_o.slice(row * dim, dim), d_lse.slice(self.shared(row, parts[i].2), 1)) };
                    out.iter_mut().zip(dy).for_each(|(o, g)| *o = w[i] * g);
                    at[0] += w[i] * (dots[i] - mean + dlse[row]);
                }
            }
        });
    }
}

/// Slot `s` of a row.
fn slot<'a>(o: &[&'a [f32]], row: usize, s: usize, k: usize, dim: usize) -> &'a [f32] {
    match o {
        [one] => &one[(row * k + s) * dim..][..dim],
        many => &many[s][row * dim..][..dim],
    }
}
