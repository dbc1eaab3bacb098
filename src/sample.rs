//! Choosing the next token from logits: greedy, or drawn with temperature, top-k and top-p (nucleus, arXiv 1904.09751).

use rand::Rng;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy; otherwise logits are divided by it.
    pub temperature: f64,
    /// Draw only among this many of the likeliest tokens.
    pub top_k: Option<usize>,
    /// Draw only among the fewest likeliest tokens whose probabilities sum to this.
    pub top_p: Option<f64>,
}

impl Sampling {
    /// What is wrong with the settings, if anything.
    pub fn problem(&self) -> Option<String> {
        let Self { temperature: t, top_k, top_p } = *self;
        if !(t.is_finite() && t >= 0.0) {
            return Some(format!("--temperature {t}: give 0 (greedy) or more"));
        }
        if top_k == Some(0) {
            return Some("--top-k 0 leaves no token to choose; give 1 or more".into());
        }
        if let Some(p) = top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
            return Some(format!("--top-p {p}: give a probability above 0 and at most 1"));
        }
        None
    }

    /// The token chosen; of equal ones the smaller counts as likelier.  `None` if a logit is NaN or +∞, or none is finite.
    pub fn choose(&self, logits: &[f32], rng: &mut impl Rng) -> Option<usize> {
        if self.temperature == 0.0 {
            return likeliest(logits);
        }
        if logits.iter().any(|x| x.is_nan() || *x == f32::INFINITY) {
            return None;
        }
        let mut order: Vec<usize> = (0..logits.len()).filter(|&i| logits[i].is_finite()).collect();
        let likelier = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
        order.sort_by(likelier);
        order.truncate(self.top_k.unwrap_or(usize::MAX));
        let top = f64::from(logits[*order.first()?]);
        let weights: Vec<f64> =
            order.iter().map(|&i| ((f64::from(logits[i]) - top) / self.temperature).exp()).collect();
        let sum_of = |w: &[f64]| w.iter().sum::<f64>();
        let kept = match self.top_p {
            None => weights.len(),
            Some(p) => {
                let enough = p * sum_of(&weights);
                let mut sum = 0.0;
                let last = weights.iter().position(|w| {
                    sum += w;
                    sum >= enough
                });
                last.map_or(weights.len(), |i| i + 1)
            }
        };
        let mut left = rng.random::<f64>() * sum_of(&weights[..kept]);
        let drawn = weights[..kept].iter().position(|w| {
            left -= w;
            left < 0.0
        });
        // Rounding can leave nothing drawn: then it was the last one.
        Some(order[drawn.unwrap_or(kept - 1)])
    }
}

/// The greedy choice: every token waits for it, so it goes through the logits in whole vectors.
fn likeliest(logits: &[f32]) -> Option<usize> {
    const LANES: usize = 16;
    let (parts, rest) = logits.as_chunks::<LANES>();
    let (mut most, mut bad) = ([f32::NEG_INFINITY; LANES], [false; LANES]);
    let mut look = |x: &[f32]| {
        for ((m, b), x) in most.iter_mut().zip(&mut bad).zip(x) {
            *m = if *x > *m { *x } else { *m };
            *b |= x.is_nan() | (*x == f32::INFINITY);
        }
    };
    parts.iter().for_each(|p| look(p));
    look(rest);
    let most = most.into_iter().fold(f32::NEG_INFINITY, f32::max);
    if bad.contains(&true) || most == f32::NEG_INFINITY {
        return None;
    }
    logits.iter().position(|x| *x == most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rambac_models::data::rng::stream;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, f32::NEG_INFINITY];

    fn sampling(temperature: f64, top_k: Option<usize>, top_p: Option<f64>) -> Sampling {
        Sampling { temperature, top_k, top_p }
    }

    /// How often each token comes in 20,000 draws.
    fn shares(s: Sampling) -> Vec<f64> {
        let mut n = vec![0.0; LOGITS.len()];
        for i in 0..20_000 {
            n[s.choose(&LOGITS, &mut stream(7, "test", &[i])).unwrap()] += 1.0 / 20_000.0;
        }
        n
    }

    fn near(a: &[f64], b: &[f64]) -> bool {
        a.iter().zip(b).all(|(a, b)| (a - b).abs() < 0.015)
    }

    #[test]
    fn greedy_takes_the_smaller_of_equals() {
        for s in [sampling(0.0, None, None), sampling(0.0, Some(3), Some(0.5))] {
            assert_eq!(s.choose(&LOGITS, &mut stream(0, "", &[])), Some(1));
        }
    }

    #[test]
    fn greedy_looks_everywhere() {
        let mut r = stream(5, "greedy", &[]);
        for n in 1..70 {
            let mut x: Vec<f32> = (0..n).map(|_| r.random_range(-3..3) as f32).collect();
            let want = (0..n).max_by(|&a, &b| x[a].total_cmp(&x[b]).then(b.cmp(&a)));
            let greedy = |x: &[f32]| sampling(0.0, None, None).choose(x, &mut stream(0, "", &[]));
            assert_eq!(greedy(&x), want);
            x[n - 1] = f32::NAN;
            assert_eq!(greedy(&x), None);
        }
    }

    #[test]
    fn draws_follow_the_softmax() {
        for t in [0.5, 1.0, 2.0] {
            let e: Vec<f64> = LOGITS.iter().map(|&x| (f64::from(x) / t).exp()).collect();
            let sum: f64 = e.iter().sum();
            let want: Vec<f64> = e.iter().map(|e| e / sum).collect();
            let have = shares(sampling(t, None, None));
            assert!(near(&have, &want), "{t}: {have:?} {want:?}");
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        assert!(near(&shares(sampling(1.0, Some(1), None)), &[0.0, 1.0, 0.0, 0.0, 0.0]));
        assert!(near(&shares(sampling(1.0, Some(2), None)), &[0.0, 0.5, 0.0, 0.5, 0.0]));
        // The two best hold 0.8 of the probability.
        assert!(near(&shares(sampling(1.0, None, Some(0.7))), &[0.0, 0.5, 0.0, 0.5, 0.0]));
        assert!(shares(sampling(1.0, None, Some(0.85)))[2] > 0.1);
        assert_eq!(shares(sampling(1.0, None, Some(0.85)))[0], 0.0);
        assert!(near(&shares(sampling(1.0, None, Some(1e-9))), &[0.0, 1.0, 0.0, 0.0, 0.0]));
        // More than there are is all.
        assert_eq!(shares(sampling(1.0, Some(99), Some(1.0))), shares(sampling(1.0, None, None)));
    }

    #[test]
    fn the_seed_decides() {
        let s = sampling(1.0, None, None);
        let text = |seed| (0..50).map(|i| s.choose(&LOGITS, &mut stream(seed, "x", &[i]))).collect::<Vec<_>>();
        assert_eq!(text(1), text(1));
        assert_ne!(text(1), text(2));
    }

    #[test]
    fn broken_logits_and_settings_are_refused() {
        let s = sampling(1.0, None, None);
        for bad in [&[f32::NAN, 1.0][..], &[f32::INFINITY], &[f32::NEG_INFINITY; 3], &[]] {
            assert_eq!(s.choose(bad, &mut stream(0, "", &[])), None);
            assert_eq!(sampling(0.0, None, None).choose(bad, &mut stream(0, "", &[])), None);
        }
        assert_eq!(s.problem(), None);
        for bad in [
            sampling(-1.0, None, None),
            sampling(f64::NAN, None, None),
            sampling(1.0, Some(0), None),
            sampling(1.0, None, Some(0.0)),
            sampling(1.0, None, Some(1.5)),
        ] {
            assert!(bad.problem().is_some(), "{bad:?}");
        }
    }
}
