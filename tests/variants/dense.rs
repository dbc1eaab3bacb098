//! NSA, MoBA and DSA against dense computations: plain loops over all pairs of tokens, from the papers' formulas.

use super::*;
use rambac_passes::probe::random_sources;

/// Inputs of a fragment as plain functions of sequence, token, head and component.
struct Plain<'a> {
    s: &'a Sources,
    l: usize,
    heads: usize,
    kv: usize,
    d: usize,
    scale: f64,
}

impl Plain<'_> {
    fn at(&self, name: &str, b: usize, t: usize, h: usize, i: usize) -> f64 {
        let a = &self.s[name];
        a.get(((b * self.l + t) * a.shape[2] + h) * a.shape[3] + i)
    }
    fn group(&self) -> usize {
        self.heads / self.kv
    }
    /// Scaled score of query head `h` at `t` for the key of token `s`.
    fn z(&self, b: usize, t: usize, h: usize, s: usize) -> f64 {
        self.scale
            * (0..self.d).map(|i| self.at("q", b, t, h, i) * self.at("k", b, s, h / self.group(), i)).sum::<f64>()
    }
    /// Softmax attention of one row to a set of tokens.
    fn attend(&self, b: usize, t: usize, h: usize, tokens: &[usize]) -> Vec<f64> {
        let e: Vec<f64> = tokens.iter().map(|&s| self.z(b, t, h, s).exp()).collect();
        let sum: f64 = e.iter().sum();
        let value = |i| tokens.iter().zip(&e).map(|(&s, e)| e / sum * self.at("v", b, s, h / self.group(), i)).sum();
        (0..self.d).map(value).collect()
    }
    fn mean(&self, name: &str, b: usize, c: usize, chunk: usize, h: usize, i: usize) -> f64 {
        (0..chunk).map(|j| self.at(name, b, c * chunk + j, h, i)).sum::<f64>() / chunk as f64
    }
    /// The `k` best by score, the first and last so many complete chunks among them.
    fn best(scores: &[f64], k: usize, sinks: usize, recent: usize) -> Vec<usize> {
        let n = scores.len();
        let mut chosen: Vec<usize> = (0..n).filter(|&c| c < sinks || c + recent >= n).collect();
        let mut rest: Vec<usize> = (0..n).filter(|c| !chosen.contains(c)).collect();
        rest.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        chosen.extend(rest.into_iter().take(k.saturating_sub(chosen.len())));
        chosen
    }
}

/// Compares `o` of a built-in variant on the CPU with `row(plain, b, t, head)`.
fn compare(
    name: &str,
    l: usize,
    values: &[(&str, f64)],
    row: impl Fn(&Plain, &Fragment, usize, usize, usize) -> Vec<f64>,
) {
    let f = fragment(rambac_models::variants::built_in(name).unwrap().text, values);
    let dims = Bindings::new([("N", 2), ("L", l)]);
    let s = random_sources(&f.graph, &dims, 17).unwrap();
    let size = |n: &str| f.constant(n).unwrap() as usize;
    let p = Plain {
        s: &s,
        l,
        heads: size("heads"),
        kv: size("kv_heads"),
        d: size("dim"),
        scale: f.constant("scale").unwrap(),
    };
    let mut want = vec![];
    for b in 0..2 {
        for t in 0..l {
            for h in 0..p.heads {
                want.extend(row(&p, &f, b, t, h));
            }
        }
    }
    let got = run(&f.graph, &dims, &s).remove("o").unwrap();
    let off = apart(&got, &HostArray::f32(&[2, l, p.heads, p.d], want));
    assert!(off < 1e-5, "{name}: off by {off:e}");
}

/// MoBA: blocks by q · mean key, the best complete ones and the own block up to the token, under one softmax.
#[test]
fn moba() {
    for (heads, kv) in [(4, 4), (4, 2)] {
        let values = [("heads", heads as f64), ("kv_heads", kv as f64), ("k", 3.0), ("chunk", 8.0)];
        compare("moba", 72, &values, |p, _, b, t, h| {
            let (chunk, k, g) = (8, 3, p.group());
            let score = |c: usize| -> f64 {
                let of = |h: usize| {
                    (0..p.d).map(|i| p.at("q", b, t, h, i) * p.mean("k", b, c, chunk, h / g, i)).sum::<f64>()
                };
                // The query heads of a key head choose together.
                (h / g * g..(h / g + 1) * g).map(of).sum()
            };
            let scores: Vec<f64> = (0..t / chunk).map(score).collect();
            let mut tokens: Vec<usize> =
                Plain::best(&scores, k, 0, 0).into_iter().flat_map(|c| c * chunk..(c + 1) * chunk).collect();
            tokens.extend(t / chunk * chunk..=t);
            p.attend(b, t, h, &tokens)
        });
    }
}

/// NSA: compressed attention, attention to the chunks that got most of it over a group's heads, a window; gated.
#[test]
fn nsa() {
    let values = [("chunk", 8.0), ("k", 4.0), ("window", 12.0)];
    compare("nsa", 80, &values, |p, f, b, t, h| {
        let (chunk, k, window, g, n) = (8, 4, 12, p.group(), t / 8);
        let kv = h / g;
        let probabilities = |h: usize| -> Vec<f64> {
            let z =
                |c| p.scale * (0..p.d).map(|i| p.at("q", b, t, h, i) * p.mean("k", b, c, chunk, h / g, i)).sum::<f64>();
            let e: Vec<f64> = (0..n).map(|c| z(c).exp()).collect();
            let sum: f64 = e.iter().sum();
            e.iter().map(|e| e / sum).collect()
        };
        let own = probabilities(h);
        let compressed: Vec<f64> =
            (0..p.d).map(|i| own.iter().enumerate().map(|(c, w)| w * p.mean("v", b, c, chunk, kv, i)).sum()).collect();
        let mut importance = vec![0.0; n];
        for h in kv * g..(kv + 1) * g {
            importance.iter_mut().zip(probabilities(h)).for_each(|(a, b)| *a += b);
        }
        let mut tokens: Vec<usize> =
            Plain::best(&importance, k, 1, 2).into_iter().flat_map(|c| c * chunk..(c + 1) * chunk).collect();
        tokens.extend(t / chunk * chunk..=t);
        let selected = p.attend(b, t, h, &tokens);
        let near: Vec<usize> = (t.saturating_sub(window - 1)..=t).collect();
        let near = p.attend(b, t, h, &near);
        let width = f.constant("width").unwrap() as usize;
        let gate = |branch: usize| {
            let (x, w) = (&p.s["x"], &p.s["gate"]);
            let z: f64 =
                (0..width).map(|i| x.get((b * p.l + t) * width + i) * w.get((h * 3 + branch) * width + i)).sum();
            1.0 / (1.0 + (-z).exp())
        };
        let gates = [0, 1, 2].map(gate);
        (0..p.d).map(|i| gates[0] * compressed[i] + gates[1] * selected[i] + gates[2] * near[i]).collect()
    });
}

/// The indexer of DSA: Σ_j w_j relu(q_j · k_s) over earlier tokens.
fn index_scores(p: &Plain, f: &Fragment, b: usize, t: usize) -> Vec<f64> {
    let size = |n: &str| f.constant(n).unwrap() as usize;
    let (width, heads, dim) = (size("width"), size("index_heads"), size("index_dim"));
    let project = |name: &str, row: usize, t: usize| -> f64 {
        (0..width).map(|i| p.s["x"].get((b * p.l + t) * width + i) * p.s[name].get(row * width + i)).sum()
    };
    let key = |s: usize| -> Vec<f64> { (0..dim).map(|i| project("index_k", i, s)).collect() };
    let queries: Vec<Vec<f64>> =
        (0..heads).map(|j| (0..dim).map(|i| project("index_q", j * dim + i, t)).collect()).collect();
    let weights: Vec<f64> = (0..heads).map(|j| project("index_w", j, t)).collect();
    let score = |s: usize| -> f64 {
        let key = key(s);
        let dot = |q: &Vec<f64>| q.iter().zip(&key).map(|(a, b)| a * b).sum::<f64>();
        queries.iter().zip(&weights).map(|(q, w)| w * dot(q).max(0.0)).sum()
    };
    (0..t).map(score).collect()
}

/// DSA: the best earlier tokens and the token itself, under one softmax.
#[test]
fn dsa() {
    compare("dsa", 48, &[("k", 7.0), ("index_heads", 3.0)], |p, f, b, t, h| {
        let mut tokens = Plain::best(&index_scores(p, f, b, t), 7, 0, 0);
        tokens.push(t);
        p.attend(b, t, h, &tokens)
    });
}

/// The indexer's loss: the cross-entropy of its softmax to all heads' attention over earlier tokens.
#[test]
fn dsa_loss() {
    let l = 24;
    let f = fragment(rambac_models::variants::built_in("dsa").unwrap().text, &[]);
    let dims = Bindings::new([("N", 1), ("L", l)]);
    let s = random_sources(&f.graph, &dims, 19).unwrap();
    let p = Plain { s: &s, l, heads: 4, kv: 2, d: 16, scale: 0.25 };
    let (mut sum, mut mass) = (0.0, 0.0);
    for t in 1..l {
        let e: Vec<f64> = index_scores(&p, &f, 0, t).iter().map(|x| x.exp()).collect();
        let total: f64 = e.iter().sum();
        let mut teacher = vec![0.0; t];
        for h in 0..4 {
            let z: Vec<f64> = (0..t).map(|s| p.z(0, t, h, s).exp()).collect();
            let all: f64 = z.iter().sum();
            teacher.iter_mut().zip(&z).for_each(|(a, z)| *a += z / all);
        }
        sum -= teacher.iter().zip(&e).map(|(p, e)| p * (e / total).ln()).sum::<f64>();
        mass += teacher.iter().sum::<f64>();
    }
    let got = run(&f.graph, &dims, &s)["aux"].get(0);
    assert!((got - sum / mass).abs() < 1e-5 * got.abs(), "{got} {}", sum / mass);
}
