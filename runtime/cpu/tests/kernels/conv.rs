//! Causal convolution against its definition and finite differences.

use crate::common::*;
use rambac_cpu::kernels::conv::CausalConv1d;

fn reference(s: &CausalConv1d, v: &[Vec<f64>]) -> (Vec<f64>, Vec<f64>) {
    let [x, w, bias, s0] = v else { panic!() };
    let (c, back) = (s.channels, s.kernel - 1);
    let input = |b: usize, t: usize, i: usize| {
        if t < back { s0[(b * back + t) * c + i] } else { x[(b * s.l + t - back) * c + i] }
    };
    let mut y = vec![];
    let mut tail = vec![];
    for b in 0..s.n {
        for t in 0..s.l {
            for i in 0..c {
                let v: f64 = bias[i] + (0..s.kernel).map(|j| w[i * s.kernel + j] * input(b, t + j, i)).sum::<f64>();
                y.push(if s.silu { v / (1.0 + (-v).exp()) } else { v });
            }
        }
        for j in 0..back {
            tail.extend((0..c).map(|i| input(b, s.l + j, i)));
        }
    }
    (y, tail)
}

#[test]
fn conv_matches_reference_and_differences() {
    let mut src = Source::new(5);
    for (n, l, channels, kernel, silu) in [
        (1, 1, 3, 4, true),
        (2, 2, 5, 4, true),
        (2, 9, 7, 4, false),
        (1, 70, 3, 3, true),
        (2, 3, 4, 1, true),
        (1, 5, 2, 9, true),
        (3, 2, 37, 4, true),
        (1, 1, 64, 4, false),
    ] {
        let s = CausalConv1d { n, l, channels, kernel, silu };
        let (x, w, bias) = (src.vec(n * l * channels), src.vec(channels * kernel), src.vec(channels));
        let s0 = src.vec(n * (kernel - 1) * channels);
        let (dy, ds) = (src.vec(x.len()), src.vec(s0.len()));
        let want = reference(&s, &[&x, &w, &bias, &s0].map(|v| f64s(v)));
        let px = Padded::new(&x, n * l, channels, 4);
        let mut tail = vec![f32::NAN; s0.len()];
        let mut y = Padded::out(n * l, channels, 2);
        s.forward(px.mat(), &w, &bias, &s0, y.mat_mut(), &mut tail);
        close("y", &y.values(), &want.0, 1e-6);
        close("tail", &tail, &want.1, 0.0);
        // The same bits where the state is replaced.
        let (mut again, mut state) = (Padded::out(n * l, channels, 2), s0.clone());
        s.forward_in_place(px.mat(), &w, &bias, again.mat_mut(), &mut state);
        assert!(again.values() == y.values() && state == tail, "in place: {s:?}");

        let pdy = Padded::new(&dy, n * l, channels, 1);
        let mut dx = Padded::out(n * l, channels, 3);
        let [mut dw, mut db, mut ds0] = [&w, &bias, &s0].map(|v| vec![f32::NAN; v.len()]);
        s.backward(px.mat(), &w, &bias, &s0, pdy.mat(), &ds, dx.mat_mut(), &mut dw, &mut db, &mut ds0);
        let d = gradients(&[&x, &w, &bias, &s0], |v| {
            let (y, t) = reference(&s, v);
            dot(&y, &dy) + dot(&t, &ds)
        });
        for (name, got, want) in [("dx", dx.values(), &d[0]), ("dw", dw, &d[1]), ("db", db, &d[2]), ("ds0", ds0, &d[3])]
        {
            close(&format!("{name} of {s:?}"), &got, want, 3e-6);
        }
    }
}

#[test]
fn conv_splits_and_threads() {
    // Two calls with the carried state equal one; bits do not depend on threads.
    let (n, l, channels, kernel) = (2, 333, 40, 4);
    let mut src = Source::new(6);
    let (x, w, bias) = (src.vec(n * l * channels), src.vec(channels * kernel), src.vec(channels));
    let s0 = src.vec(n * 3 * channels);
    let s = CausalConv1d { n, l, channels, kernel, silu: true };
    let whole = same_bits(|| {
        let mut y = Padded::out(n * l, channels, 0);
        let mut tail = vec![0.0; s0.len()];
        s.forward(Padded::new(&x, n * l, channels, 0).mat(), &w, &bias, &s0, y.mat_mut(), &mut tail);
        y.values().into_iter().chain(tail).collect()
    });
    let mut state = s0.clone();
    let mut parts = vec![vec![]; n];
    for (from, to) in [(0, 1), (1, 3), (3, 200), (200, 333)] {
        let xs: Vec<f32> =
            (0..n).flat_map(|b| x[(b * l + from) * channels..(b * l + to) * channels].to_vec()).collect();
        let mut y = Padded::out(n * (to - from), channels, 0);
        let mut next = vec![0.0; s0.len()];
        let part = CausalConv1d { l: to - from, ..s };
        part.forward(Padded::new(&xs, n * (to - from), channels, 0).mat(), &w, &bias, &state, y.mat_mut(), &mut next);
        for (b, y) in y.values().chunks((to - from) * channels).enumerate() {
            parts[b].extend_from_slice(y);
        }
        state = next;
    }
    let joined: Vec<f32> = parts.into_iter().flatten().chain(state).collect();
    close("joined", &joined, &f64s(&whole), 1e-6);
    same_bits(|| {
        let mut dx = Padded::out(n * l, channels, 0);
        let [mut dw, mut db, mut ds0] = [&w, &bias, &s0].map(|v| vec![f32::NAN; v.len()]);
        let px = Padded::new(&x, n * l, channels, 0);
        s.backward(px.mat(), &w, &bias, &s0, px.mat(), &s0, dx.mat_mut(), &mut dw, &mut db, &mut ds0);
        [dx.values(), dw, db, ds0].concat()
    });
}
