//! Selection, chunk attention and dense attention against plain f64 loops, at odd sizes and edges, and their
//! bits against the number of threads.
//!
//! Gradients are checked against the closed formulas in f64 (softmax and product rule written out), not against
//! finite differences.

use rambac_cpu::kernels::chunk_attention::ChunkAttention;
use rambac_cpu::kernels::dense_attention::DenseAttention;
use rambac_cpu::kernels::selection::{Order, Selection, Weighting, weigh, weigh_backward};
use rambac_cpu::{ChunkRows, Mat, MatMut, RowShape, Rows};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn random(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.5f32..1.5)).collect()
}

/// Largest difference, relative to the largest expected value where that exceeds 1.
#[track_caller]
fn assert_close(what: &str, actual: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let unit = expected.iter().fold(1.0f64, |m, x| m.max(x.abs()));
    for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        assert!((a as f64 - e).abs() <= tolerance * unit, "{what}[{i}]: {a} instead of {e} (unit {unit})");
    }
}

/// Runs `f` in pools of 1, 2 and 3 threads; the results must be the same bits.
fn same_bits<T: PartialEq + std::fmt::Debug + Send>(f: impl Fn() -> T + Sync) -> T {
    let run = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(&f);
    let one = run(1);
    for threads in [2, 3] {
        assert!(run(threads) == one, "{threads} threads give other bits than 1");
    }
    one
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

// ---------------------------------------------------------------------------------------------------------
// Selection

/// Everything `forward` writes.
struct Selected {
    indices: Vec<i32>,
    count: Vec<i32>,
    weights: Vec<f32>,
    scores: Vec<f32>,
}

fn select(s: &Selection, q: Mat, landmarks: &[f32], start: &[i32]) -> Selected {
    let rows = s.n * s.l * s.heads;
    // Rubbish in the outputs must not matter.
    let mut out = Selected {
        indices: vec![-7; rows * s.k],
        count: vec![-7; rows],
        weights: vec![f32::NAN; rows * s.k],
        scores: vec![f32::NAN; rows * s.k],
    };
    let landmarks = Rows::Dense(Mat::new(landmarks, s.n * s.chunks, s.heads * s.dim));
    s.forward(q, landmarks, start, &mut out.indices, &mut out.count, &mut out.weights, &mut out.scores);
    out
}

fn check_selection(s: Selection, start: &[i32], ties: bool) {
    let mut rng = ChaCha8Rng::seed_from_u64(s.l as u64 + 31 * s.dim as u64);
    let (rows, width) = (s.n * s.l, s.heads * s.dim);
    let stride = width + 5;
    let mut q = random(&mut rng, rows * stride);
    let mut landmarks = random(&mut rng, s.n * s.chunks * width);
    if ties {
        // Small integers: scores are exact and collide often.
        q.iter_mut().chain(&mut landmarks).for_each(|x| *x = x.round());
    }
    // SAFETY: `q` holds `rows` rows of `stride`.
    let q_mat = unsafe { Mat::from_raw(q.as_ptr(), rows, width, stride) };
    let out = select(&s, q_mat, &landmarks, start);
    let landmark = |seq: usize, c: usize, h: usize| &landmarks[((seq * s.chunks + c) * s.heads + h) * s.dim..][..s.dim];
    for row in 0..rows {
        let (seq, t) = (row / s.l, start[row / s.l] as usize + row % s.l);
        for h in 0..s.heads {
            let at = row * s.heads + h;
            let visible = (t / s.chunk).min(s.chunks);
            let q = &q[row * stride + h * s.dim..][..s.dim];
            let score = |c: usize| {
                let dot: f64 = q.iter().zip(landmark(seq, c, h)).map(|(&a, &b)| a as f64 * b as f64).sum();
                dot * s.scale as f64
            };
            let count = visible.min(s.k);
            assert_eq!(out.count[at] as usize, count, "count of row {row}");
            let range = at * s.k..(at + 1) * s.k;
            let (indices, scores) = (&out.indices[range.clone()], &out.scores[range.clone()]);
            for slot in count..s.k {
                assert_eq!((indices[slot], scores[slot], out.weights[at * s.k + slot]), (0, 0.0, 0.0));
            }
            let chosen: Vec<usize> = indices[..count].iter().map(|&i| i as usize).collect();
            for (i, &c) in chosen.iter().enumerate() {
                assert!(c < visible && !chosen[..i].contains(&c), "row {row} chose {chosen:?} of {visible}");
                assert!((scores[i] as f64 - score(c)).abs() < 1e-4, "score");
            }
            let mut best: Vec<usize> = (0..visible).collect();
            best.sort_by(|&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
            best.truncate(count);
            if s.order == Order::Recent {
                best.sort_by(|a, b| b.cmp(a));
            }
            if ties {
                assert_eq!(
                    chosen,
                    best,
                    "row {row}, ties {scores:?} {:?}",
                    best.iter().map(|&c| score(c)).collect::<Vec<_>>()
                );
            } else if chosen != best {
                // Only rounding may explain another choice or order.
                let (mut a, mut b): (Vec<f64>, Vec<f64>) =
                    (chosen.iter().map(|&c| score(c)).collect(), best.iter().map(|&c| score(c)).collect());
                a.sort_by(f64::total_cmp);
                b.sort_by(f64::total_cmp);
                assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5), "row {row}: {chosen:?}, not {best:?}");
            }
            let expected = weights_reference(s.weighting, &scores[..count]);
            assert_close("weights", &out.weights[range][..count], &expected, 1e-5);
        }
    }
    check_selection_backward(&s, &mut rng, q_mat, &landmarks, &out);
    same_bits(|| {
        let again = select(&s, q_mat, &landmarks, start);
        (again.indices, again.count, bits(&again.weights), bits(&again.scores))
    });
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn weights_reference(rule: Weighting, scores: &[f32]) -> Vec<f64> {
    let s: Vec<f64> = scores.iter().map(|&s| s as f64).collect();
    match rule {
        Weighting::StickBreaking => {
            let mut left = 1.0;
            let mut weight = |s: &f64| {
                let w = left * sigmoid(*s);
                left *= 1.0 - sigmoid(*s);
                w
            };
            s.iter().map(&mut weight).collect()
        }
        Weighting::Softmax => {
            let sum: f64 = s.iter().map(|s| s.exp()).sum();
            s.iter().map(|s| s.exp() / sum).collect()
        }
        Weighting::Sigmoid => s.iter().map(|&s| sigmoid(s)).collect(),
        Weighting::One => vec![1.0; s.len()],
        Weighting::Logit => s.to_vec(),
    }
}

fn check_selection_backward(s: &Selection, rng: &mut ChaCha8Rng, q: Mat, landmarks: &[f32], out: &Selected) {
    let (rows, width) = (s.n * s.l, s.heads * s.dim);
    let dweights = random(rng, out.weights.len());
    let run = || {
        let (mut dq, mut dl) = (vec![f32::NAN; rows * width], vec![f32::NAN; landmarks.len()]);
        s.backward(
            q,
            landmarks,
            &out.indices,
            &out.count,
            &out.scores,
            &out.weights,
            &dweights,
            MatMut::new(&mut dq, rows, width),
            &mut dl,
        );
        (dq, dl)
    };
    let mut ds = vec![f32::NAN; dweights.len()];
    weigh_backward(s.weighting, &out.scores, &out.weights, &out.count, s.k, &dweights, &mut ds);
    let (mut dq, mut dl) = (vec![0.0f64; rows * width], vec![0.0f64; landmarks.len()]);
    for row in 0..rows {
        for h in 0..s.heads {
            let at = row * s.heads + h;
            for slot in 0..s.k {
                let i = at * s.k + slot;
                if slot >= out.count[at] as usize {
                    assert_eq!(ds[i], 0.0);
                    continue;
                }
                let line = ((row / s.l * s.chunks + out.indices[i] as usize) * s.heads + h) * s.dim;
                for d in 0..s.dim {
                    let slope = ds[i] as f64 * s.scale as f64;
                    dq[row * width + h * s.dim + d] += slope * landmarks[line + d] as f64;
                    dl[line + d] += slope * q.row(row)[h * s.dim + d] as f64;
                }
            }
        }
    }
    let (actual_q, actual_l) = run();
    assert_close("dq", &actual_q, &dq, 1e-5);
    assert_close("dlandmarks", &actual_l, &dl, 1e-5);
    same_bits(|| {
        let (dq, dl) = run();
        (bits(&dq), bits(&dl))
    });
}

#[test]
fn selection_matches_reference() {
    let base = Selection {
        n: 2,
        l: 150,
        heads: 2,
        dim: 9,
        chunks: 9,
        k: 3,
        chunk: 16,
        scale: 0.3,
        order: Order::Recent,
        weighting: Weighting::StickBreaking,
    };
    let cases = [
        (base, [0, 0]),
        (Selection { order: Order::Score, weighting: Weighting::Softmax, ..base }, [3, 40]),
        (Selection { weighting: Weighting::Sigmoid, l: 1, ..base }, [0, 100]),
        (Selection { weighting: Weighting::One, k: 12, ..base }, [7, 0]),
        (Selection { chunks: 0, ..base }, [7, 0]),
        (Selection { k: 0, ..base }, [7, 0]),
        (Selection { l: 0, ..base }, [7, 0]),
        (Selection { l: 40, chunks: 150, chunk: 1, dim: 32, k: 8, ..base }, [100, 0]),
        (Selection { l: 300, chunks: 300, chunk: 1, dim: 16, k: 8, heads: 1, ..base }, [0, 10]),
    ];
    for (shape, start) in cases {
        check_selection(shape, &start, false);
        check_selection(Selection { scale: 0.5, ..shape }, &start, true);
    }
}

#[test]
fn weights_survive_extreme_scores() {
    let scores = [80.0, -90.0, 200.0, -200.0];
    for rule in [Weighting::StickBreaking, Weighting::Softmax, Weighting::Sigmoid, Weighting::One] {
        let (mut w, mut ds) = ([f32::NAN; 4], [f32::NAN; 4]);
        weigh(rule, &scores, &[4], 4, &mut w);
        weigh_backward(rule, &scores, &w, &[4], 4, &[1.0; 4], &mut ds);
        assert!(w.iter().chain(&ds).all(|x| x.is_finite()), "{rule:?}: {w:?}, {ds:?}");
    }
}

#[test]
fn score_gradients_match_differences() {
    let scores = [0.3f32, -1.2, 0.8, 2.0, -0.1];
    let g = [0.7f32, -0.4, 1.1, 0.2, -0.9];
    for rule in [Weighting::StickBreaking, Weighting::Softmax, Weighting::Sigmoid, Weighting::One] {
        let (mut w, mut ds) = ([0.0f32; 5], [0.0f32; 5]);
        weigh(rule, &scores, &[4], 5, &mut w);
        weigh_backward(rule, &scores, &w, &[4], 5, &g, &mut ds);
        let loss = |s: &[f32]| -> f64 { weights_reference(rule, s).iter().zip(g).map(|(w, g)| w * g as f64).sum() };
        for i in 0..4 {
            let (mut up, mut down) = (scores, scores);
            up[i] += 1e-2;
            down[i] -= 1e-2;
            let slope = (loss(&up[..4]) - loss(&down[..4])) / (up[i] as f64 - down[i] as f64);
            assert!((slope - ds[i] as f64).abs() < 1e-4, "{rule:?} {i}: {} instead of {slope}", ds[i]);
        }
        assert_eq!(ds[4], 0.0);
    }
}

// ---------------------------------------------------------------------------------------------------------
// Attention

/// Gradients and output of softmax attention of one query row over some keys, accumulated with weight `w`.
struct Row<'a> {
    q: &'a [f32],
    dy: &'a [f32],
    /// Offsets of the keys' (and values') head in `k` and `v`.
    keys: Vec<usize>,
    scale: f64,
    zeros: f64,
    w: f64,
}

/// f64 sums of every output.
struct Sums {
    y: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

impl Row<'_> {
    /// Adds this row's parts at `at` in `y` and `dq`; returns `dy · o`.
    fn add(&self, k: &[f32], v: &[f32], at: usize, sums: &mut Sums) -> f64 {
        let dim = self.q.len();
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| a as f64 * b as f64).sum::<f64>();
        let logits: Vec<f64> = self.keys.iter().map(|&j| dot(self.q, &k[j..j + dim]) * self.scale).collect();
        let max = logits.iter().fold(0.0f64, |m, &x| m.max(x));
        let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum::<f64>() + self.zeros * (-max).exp();
        let p: Vec<f64> = logits.iter().map(|x| (x - max).exp() / sum).collect();
        let dp: Vec<f64> = self.keys.iter().map(|&j| dot(self.dy, &v[j..j + dim])).collect();
        let mean: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
        for (i, &j) in self.keys.iter().enumerate() {
            let ds = self.w * p[i] * (dp[i] - mean) * self.scale;
            for d in 0..dim {
                sums.y[at + d] += self.w * p[i] * v[j + d] as f64;
                sums.dv[j + d] += self.w * p[i] * self.dy[d] as f64;
                sums.dq[at + d] += ds * k[j + d] as f64;
                sums.dk[j + d] += ds * self.q[d] as f64;
            }
        }
        mean
    }
}

fn check_chunk_attention(s: ChunkAttention) {
    let mut rng = ChaCha8Rng::seed_from_u64(s.l as u64 + 31 * s.dim as u64 + 7 * s.heads as u64);
    let (rows, chunks, group) = (s.n * s.l, s.keys / s.chunk, s.heads / s.kv_heads);
    let (width, kv_width) = (s.heads * s.dim, s.kv_heads * s.dim);
    let stride = width + 3;
    let q = random(&mut rng, rows * stride + 1);
    let (k, v) = (random(&mut rng, s.n * s.keys * kv_width), random(&mut rng, s.n * s.keys * kv_width));
    let dy = random(&mut rng, rows * width);
    let mut indices = vec![0i32; rows * s.kv_heads * s.k];
    let mut weights = vec![0.0f32; indices.len()];
    let mut count = vec![0i32; rows * s.kv_heads];
    for row in 0..count.len() {
        // Mostly full lists, some short, some empty; different chunks of one list.
        let most = s.k.min(chunks);
        count[row] = if row % 5 == 0 { rng.random_range(0..=most) } else { most } as i32;
        let first = rng.random_range(0..chunks.max(1));
        for slot in 0..count[row] as usize {
            indices[row * s.k + slot] = ((first + slot) % chunks) as i32;
            weights[row * s.k + slot] = rng.random_range(0.0..1.0);
        }
    }
    // SAFETY: `q` holds `rows` rows of `stride`, off by one element to be unaligned.
    let q_mat = unsafe { Mat::from_raw(q.as_ptr().add(1), rows, width, stride) };
    let (k_mat, v_mat) = (Mat::new(&k, s.n * s.keys, kv_width), Mat::new(&v, s.n * s.keys, kv_width));
    let mut sums = Sums {
        y: vec![0.0; rows * width],
        dq: vec![0.0; rows * width],
        dk: vec![0.0; k.len()],
        dv: vec![0.0; v.len()],
    };
    let mut dweights = vec![0.0f64; weights.len()];
    for row in 0..rows {
        for head in 0..s.heads {
            let kv = row * s.kv_heads + head / group;
            for slot in 0..count[kv] as usize {
                let first = row / s.l * s.keys + indices[kv * s.k + slot] as usize * s.chunk;
                let at = row * width + head * s.dim;
                let part = Row {
                    q: &q_mat.row(row)[head * s.dim..][..s.dim],
                    dy: &dy[at..][..s.dim],
                    keys: (0..s.chunk).map(|j| (first + j) * kv_width + head / group * s.dim).collect(),
                    scale: s.scale as f64,
                    zeros: s.off_by_one as f64,
                    w: weights[kv * s.k + slot] as f64,
                };
                dweights[kv * s.k + slot] += part.add(&k, &v, at, &mut sums);
            }
        }
    }
    let forward = || {
        let mut y = vec![f32::NAN; rows * width];
        s.forward(
            q_mat,
            Rows::Dense(k_mat),
            Rows::Dense(v_mat),
            &indices,
            &count,
            &weights,
            MatMut::new(&mut y, rows, width),
        );
        y
    };
    let backward = || {
        let (mut dq, mut dw) = (vec![f32::NAN; rows * width], vec![f32::NAN; weights.len()]);
        let (mut dk, mut dv) = (vec![f32::NAN; k.len()], vec![f32::NAN; v.len()]);
        s.backward(
            q_mat,
            k_mat,
            v_mat,
            &indices,
            &count,
            &weights,
            Mat::new(&dy, rows, width),
            MatMut::new(&mut dq, rows, width),
            MatMut::new(&mut dk, s.n * s.keys, kv_width),
            MatMut::new(&mut dv, s.n * s.keys, kv_width),
            &mut dw,
        );
        [dq, dk, dv, dw]
    };
    assert_close("y", &forward(), &sums.y, 1e-5);
    let [dq, dk, dv, dw] = backward();
    assert_close("dq", &dq, &sums.dq, 1e-5);
    assert_close("dk", &dk, &sums.dk, 1e-5);
    assert_close("dv", &dv, &sums.dv, 1e-5);
    assert_close("dweights", &dw, &dweights, 1e-5);
    same_bits(|| bits(&forward()));
    same_bits(|| backward().map(|x| bits(&x)));
}

#[test]
fn chunk_attention_matches_reference() {
    let base = ChunkAttention {
        n: 2,
        l: 37,
        keys: 48,
        heads: 4,
        kv_heads: 2,
        dim: 16,
        k: 3,
        chunk: 16,
        scale: 0.25,
        off_by_one: 0.0,
    };
    let cases = [
        base,
        ChunkAttention { off_by_one: 1.0, dim: 13, chunk: 12, keys: 36, ..base },
        ChunkAttention { heads: 2, dim: 8, k: 1, ..base },
        ChunkAttention { heads: 16, kv_heads: 1, dim: 32, k: 8, ..base },
        ChunkAttention { heads: 50, kv_heads: 1, dim: 5, l: 3, ..base },
        ChunkAttention { l: 1, n: 3, heads: 3, kv_heads: 3, dim: 33, chunk: 7, keys: 35, ..base },
        ChunkAttention { keys: 0, ..base },
        ChunkAttention { k: 0, ..base },
        ChunkAttention { l: 0, ..base },
        ChunkAttention { chunk: 1, keys: 5, off_by_one: 2.0, ..base },
        ChunkAttention { chunk: 100, keys: 200, dim: 72, ..base },
        // Lists longer than a slab, and several segments.
        ChunkAttention { n: 1, l: 900, heads: 8, kv_heads: 1, keys: 64, dim: 8, k: 4, ..base },
        ChunkAttention { n: 2, l: 700, heads: 64, kv_heads: 1, keys: 64, dim: 16, k: 4, ..base },
    ];
    cases.into_iter().for_each(check_chunk_attention);
}

#[test]
fn chunk_attention_survives_large_logits() {
    let (q, k, v) = (vec![40.0f32; 8], vec![-30.0f32; 8 * 4], vec![1.0f32; 8 * 4]);
    for off_by_one in [0.0, 1.0] {
        let shape = ChunkAttention {
            n: 1,
            l: 1,
            keys: 4,
            heads: 1,
            kv_heads: 1,
            dim: 8,
            k: 1,
            chunk: 4,
            scale: 1.0,
            off_by_one,
        };
        let mut y = vec![f32::NAN; 8];
        let (q, k, v) = (Mat::new(&q, 1, 8), Mat::new(&k, 4, 8), Mat::new(&v, 4, 8));
        shape.forward(q, Rows::Dense(k), Rows::Dense(v), &[0], &[1], &[1.0], MatMut::new(&mut y, 1, 8));
        assert!(y.iter().all(|&y| (y - (1.0 - off_by_one)).abs() < 1e-6), "{y:?}");
    }
}

fn check_dense_attention(s: DenseAttention) {
    let mut rng = ChaCha8Rng::seed_from_u64(s.t as u64 + 31 * s.dim as u64);
    let (rows, group) = (s.batch * s.t, s.heads / s.kv_heads);
    let (width, kv_width) = (s.heads * s.dim, s.kv_heads * s.dim);
    // Queries, keys and values in one matrix, as a fused projection writes them.
    let stride = width + 2 * kv_width;
    let qkv = random(&mut rng, rows * stride);
    let all = Mat::new(&qkv, rows, stride);
    let (q, k, v) = (
        all.block(0, rows, 0, width),
        all.block(0, rows, width, kv_width),
        all.block(0, rows, width + kv_width, kv_width),
    );
    let flat = |x: Mat| (0..rows).flat_map(|r| x.row(r).to_vec()).collect::<Vec<f32>>();
    let (kf, vf) = (flat(k), flat(v));
    let dy = random(&mut rng, rows * width);
    let mut sums = Sums {
        y: vec![0.0; rows * width],
        dq: vec![0.0; rows * width],
        dk: vec![0.0; kf.len()],
        dv: vec![0.0; vf.len()],
    };
    for row in 0..rows {
        for head in 0..s.heads {
            let (first, at) = (row / s.t * s.t, row * width + head * s.dim);
            let last = if s.causal { row + 1 } else { first + s.t };
            let t = row - first;
            let window = if s.window > 0 { (t + 1).saturating_sub(s.window) } else { 0 };
            let first = first + window.max(t.checked_div(s.local).unwrap_or(0) * s.local);
            let part = Row {
                q: &q.row(row)[head * s.dim..][..s.dim],
                dy: &dy[at..][..s.dim],
                keys: (first..last).map(|j| j * kv_width + head / group * s.dim).collect(),
                scale: s.scale as f64,
                zeros: 0.0,
                w: 1.0,
            };
            part.add(&kf, &vf, at, &mut sums);
        }
    }
    let forward = || {
        let mut y = vec![f32::NAN; rows * width];
        s.forward(q, k, v, MatMut::new(&mut y, rows, width), None);
        y
    };
    let backward = || {
        let mut dq = vec![f32::NAN; rows * width];
        let (mut dk, mut dv) = (vec![f32::NAN; kf.len()], vec![f32::NAN; vf.len()]);
        s.backward(
            q,
            k,
            v,
            Mat::new(&dy, rows, width),
            None,
            MatMut::new(&mut dq, rows, width),
            MatMut::new(&mut dk, rows, kv_width),
            MatMut::new(&mut dv, rows, kv_width),
        );
        [dq, dk, dv]
    };
    assert_close("y", &forward(), &sums.y, 1e-5);
    let [dq, dk, dv] = backward();
    assert_close("dq", &dq, &sums.dq, 1e-5);
    assert_close("dk", &dk, &sums.dk, 1e-5);
    assert_close("dv", &dv, &sums.dv, 1e-5);
    same_bits(|| bits(&forward()));
    same_bits(|| backward().map(|x| bits(&x)));
}

#[test]
fn dense_attention_matches_reference() {
    let base = DenseAttention {
        start: 0,
        batch: 3,
        t: 17,
        keys: 17,
        heads: 4,
        kv_heads: 2,
        dim: 16,
        scale: 0.25,
        causal: false,
        window: 0,
        local: 0,
        unit: 0,
    };
    for (causal, window, local) in
        [(false, 0, 0), (true, 0, 0), (true, 1, 0), (true, 20, 0), (true, 0, 16), (true, 9, 30)]
    {
        let base = DenseAttention { causal, window, local, ..base };
        let cases = [
            base,
            DenseAttention { t: 65, heads: 2, dim: 20, ..base },
            DenseAttention { t: 1, ..base },
            DenseAttention { t: 0, ..base },
            DenseAttention { batch: 0, ..base },
            DenseAttention { batch: 1, t: 257, heads: 3, kv_heads: 1, dim: 33, ..base },
            DenseAttention { batch: 2, t: 33, heads: 64, kv_heads: 1, dim: 8, ..base },
        ];
        cases.into_iter().for_each(|c| check_dense_attention(DenseAttention { keys: c.t, ..c }));
    }
}

// ---------------------------------------------------------------------------------------------------------
// Paged memories

/// An array that pretends to be pages.
struct Pages<'a>(&'a [f32], RowShape, usize);

impl ChunkRows for Pages<'_> {
    fn read(&self, seq: usize, head: usize, first: usize, chunks: usize, out: &mut [f32]) {
        let (shape, heads) = (self.1, self.2);
        let rows = (seq * shape.chunks + first) * shape.per_chunk;
        for (r, out) in out.chunks_exact_mut(shape.dim).take(chunks * shape.per_chunk).enumerate() {
            out.copy_from_slice(&self.0[((rows + r) * heads + head) * shape.dim..][..shape.dim]);
        }
    }
}

/// A paged memory gives the bits of the same memory as an array, and so does one cut for few tokens.
#[test]
fn pages_are_the_array() {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    for (n, l, heads, dim, chunks, chunk) in
        [(2, 5, 2, 8, 40, 2), (1, 200, 1, 20, 700, 1), (2, 1, 2, 16, 40_000, 1), (1, 3, 1, 4, 70_000, 1)]
    {
        let shape = RowShape { chunks, per_chunk: 1, dim };
        let q = random(&mut rng, n * l * heads * dim);
        let landmarks: Vec<f32> =
            random(&mut rng, n * chunks * heads * dim).iter().map(|x| (x * 4.0).round()).collect();
        let s = Selection {
            n,
            l,
            heads,
            dim,
            chunks,
            k: 6,
            chunk,
            scale: 0.5,
            order: Order::Recent,
            weighting: Weighting::StickBreaking,
        };
        let start = vec![(chunks * chunk) as i32; n];
        let q = Mat::new(&q, n * l, heads * dim);
        let whole = select(&s, q, &landmarks, &start);
        let pages = Pages(&landmarks, shape, heads);
        let rows = n * l * heads;
        let (mut i, mut c, mut w, mut sc) =
            (vec![0; rows * s.k], vec![0; rows], vec![0.0; rows * s.k], vec![0.0; rows * s.k]);
        s.forward(q, Rows::Paged(&pages), &start, &mut i, &mut c, &mut w, &mut sc);
        assert!(i == whole.indices && c == whole.count && bits(&w) == bits(&whole.weights));
        // What a plain search finds: larger scores first, then smaller chunks.
        for row in 0..rows {
            let (t, h) = (row / heads, row % heads);
            let score = |c: usize| -> f64 {
                let lm = &landmarks[((t / l * chunks + c) * heads + h) * dim..][..dim];
                q.row(t)[h * dim..][..dim].iter().zip(lm).map(|(a, b)| *a as f64 * *b as f64).sum()
            };
            let worst = i[row * s.k..][..s.k].iter().map(|&c| score(c as usize)).fold(f64::INFINITY, f64::min);
            let better = (0..chunks).filter(|&c| score(c) > worst + 1e-4).count();
            assert!(better < s.k, "row {row} left out a better chunk");
        }

        let shape = RowShape { chunks, per_chunk: 2, dim };
        let (k, v) = (random(&mut rng, n * chunks * 2 * heads * dim), random(&mut rng, n * chunks * 2 * heads * dim));
        let a = ChunkAttention {
            n,
            l,
            keys: chunks * 2,
            heads,
            kv_heads: heads,
            dim,
            k: s.k,
            chunk: 2,
            scale: 0.3,
            off_by_one: 0.0,
        };
        let run = |k: Rows, v: Rows| {
            let mut y = vec![f32::NAN; n * l * heads * dim];
            a.forward(q, k, v, &i, &c, &w, MatMut::new(&mut y, n * l, heads * dim));
            bits(&y)
        };
        let dense = |x| Rows::Dense(Mat::new(x, n * chunks * 2, heads * dim));
        let (pk, pv) = (Pages(&k, shape, heads), Pages(&v, shape, heads));
        assert_eq!(run(dense(&k), dense(&v)), run(Rows::Paged(&pk), Rows::Paged(&pv)));
    }
}

#[test]
fn every_level() {
    rambac_cpu::simd::testing::rerun("every_level", "");
}
