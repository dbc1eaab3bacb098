//! The selective scan against its recurrence in float64 and the reverse recurrence for gradients.

use crate::common::*;
use rambac_cpu::kernels::scan::{Operands, SelectiveScan};

/// x, dt, a, b, c, d, h0.
type Args = [Vec<f32>; 7];

fn args(s: &SelectiveScan, src: &mut Source, dt: (f32, f32)) -> Args {
    let rows = s.n * s.l;
    [
        src.vec(rows * s.heads * s.head_dim),
        src.range(rows * s.heads, dt.0, dt.1),
        src.range(s.heads, -2.0, -0.1),
        src.vec(rows * s.groups * s.state),
        src.vec(rows * s.groups * s.state),
        src.vec(s.heads),
        src.vec(s.n * s.heads * s.head_dim * s.state),
    ]
}

/// y, h, and the gradients of all arguments from dy and dh, by the recurrence and its adjoint.
fn reference(s: &SelectiveScan, v: &Args, dy: &[f32], dh: &[f32]) -> Vec<Vec<f64>> {
    let [x, dt, a, b, c, d, h0] = v.each_ref().map(|v| f64s(v));
    let (p, r) = (s.head_dim, s.state);
    let mut y = vec![0.0; x.len()];
    let mut hf = vec![0.0; h0.len()];
    let mut grads = [&x, &dt, &a, &b, &c, &d, &h0].map(|v| vec![0.0f64; v.len()]);
    for i in 0..s.n {
        for m in 0..s.heads {
            let g = m * s.groups / s.heads;
            let at = (i * s.heads + m) * p * r;
            let mut hs = vec![h0[at..at + p * r].to_vec()];
            let xi = |t: usize| (i * s.l + t) * s.heads * p + m * p;
            let bi = |t: usize| (i * s.l + t) * s.groups * r + g * r;
            let ti = |t: usize| (i * s.l + t) * s.heads + m;
            for t in 0..s.l {
                let decay = (dt[ti(t)] * a[m]).exp();
                let mut h = hs[t].clone();
                for q in 0..p {
                    let mut sum = d[m] * x[xi(t) + q];
                    for e in 0..r {
                        h[q * r + e] = decay * h[q * r + e] + dt[ti(t)] * x[xi(t) + q] * b[bi(t) + e];
                        sum += h[q * r + e] * c[bi(t) + e];
                    }
                    y[xi(t) + q] = sum;
                }
                hs.push(h);
            }
            hf[at..at + p * r].copy_from_slice(&hs[s.l]);
            let mut gh: Vec<f64> = f64s(&dh[at..at + p * r]);
            for t in (0..s.l).rev() {
                let (dtt, decay) = (dt[ti(t)], (dt[ti(t)] * a[m]).exp());
                let mut ddecay = 0.0;
                for q in 0..p {
                    let (xq, dyq) = (x[xi(t) + q], dy[xi(t) + q] as f64);
                    grads[5][m] += dyq * xq;
                    grads[0][xi(t) + q] += dyq * d[m];
                    for e in 0..r {
                        let k = q * r + e;
                        grads[4][bi(t) + e] += dyq * hs[t + 1][k];
                        gh[k] += dyq * c[bi(t) + e];
                        grads[0][xi(t) + q] += gh[k] * dtt * b[bi(t) + e];
                        grads[3][bi(t) + e] += gh[k] * dtt * xq;
                        grads[1][ti(t)] += gh[k] * xq * b[bi(t) + e];
                        ddecay += gh[k] * hs[t][k];
                        gh[k] *= decay;
                    }
                }
                grads[1][ti(t)] += ddecay * decay * a[m];
                grads[2][m] += ddecay * decay * dtt;
            }
            grads[6][at..at + p * r].copy_from_slice(&gh);
        }
    }
    [vec![y, hf], grads.into()].concat()
}

/// The same outputs from the kernels, on padded matrices.
fn run(s: &SelectiveScan, v: &Args, dy: &[f32], dh: &[f32]) -> Vec<Vec<f32>> {
    let rows = s.n * s.l;
    let (wide, gr) = (s.heads * s.head_dim, s.groups * s.state);
    let [x, dt, a, b, c, d, h0] = v;
    let (px, pdt) = (Padded::new(x, rows, wide, 3), Padded::new(dt, rows, s.heads, 1));
    let (pb, pc, pdy) = (Padded::new(b, rows, gr, 5), Padded::new(c, rows, gr, 2), Padded::new(dy, rows, wide, 1));
    let mut y = Padded::out(rows, wide, 4);
    let mut h = vec![f32::NAN; h0.len()];
    let o = Operands { x: px.mat(), dt: pdt.mat(), a, b: pb.mat(), c: pc.mat(), d };
    s.forward(&o, h0, y.mat_mut(), &mut h);
    // The same bits where the state is replaced.
    let (mut again, mut state) = (Padded::out(rows, wide, 1), h0.clone());
    s.forward_in_place(&o, again.mat_mut(), &mut state);
    assert!(again.values() == y.values() && state == h, "in place: {s:?}");
    let (mut dx, mut ddt) = (Padded::out(rows, wide, 1), Padded::out(rows, s.heads, 2));
    let (mut db, mut dc) = (Padded::out(rows, gr, 3), Padded::out(rows, gr, 4));
    let [mut da, mut dd, mut dh0] = [a, d, h0].map(|v| vec![f32::NAN; v.len()]);
    s.backward(
        px.mat(),
        pdt.mat(),
        a,
        pb.mat(),
        pc.mat(),
        d,
        h0,
        pdy.mat(),
        dh,
        dx.mat_mut(),
        ddt.mat_mut(),
        &mut da,
        db.mat_mut(),
        dc.mat_mut(),
        &mut dd,
        &mut dh0,
    );
    vec![y.values(), h, dx.values(), ddt.values(), da, db.values(), dc.values(), dd, dh0]
}

const NAMES: [&str; 9] = ["y", "h", "dx", "ddt", "da", "db", "dc", "dd", "dh0"];

#[track_caller]
fn check(s: SelectiveScan, seed: u64, dt: (f32, f32), tol: f64) {
    let mut src = Source::new(seed);
    let v = args(&s, &mut src, dt);
    let (dy, dh) = (src.vec(v[0].len()), src.vec(v[6].len()));
    let want = reference(&s, &v, &dy, &dh);
    for ((got, want), name) in run(&s, &v, &dy, &dh).iter().zip(&want).zip(NAMES) {
        close(&format!("{name} of {s:?}"), got, want, tol);
    }
}

#[test]
fn scan_matches_recurrence() {
    let sizes = [
        (1, 1, 1, 1, 1, 1, 64),
        (2, 1, 4, 8, 2, 16, 64),
        (2, 5, 4, 8, 2, 16, 64),
        (1, 7, 2, 3, 1, 5, 4),
        (2, 37, 4, 8, 1, 16, 16),
        (1, 64, 4, 16, 2, 8, 16),
        (1, 300, 2, 32, 1, 16, 64),
        (3, 130, 6, 24, 3, 7, 256),
        (1, 65, 9, 17, 3, 33, 13),
    ];
    for (i, (n, l, heads, head_dim, groups, state, block)) in sizes.into_iter().enumerate() {
        check(SelectiveScan { n, l, heads, head_dim, groups, state, block }, i as u64, (0.0, 0.5), 1e-5);
    }
}

#[test]
fn scan_strong_decay() {
    let s = SelectiveScan { n: 1, l: 150, heads: 2, head_dim: 8, groups: 1, state: 8, block: 64 };
    check(s, 20, (0.0, 40.0), 1e-5); // block sums beyond -1000
    // One enormous step between small ones: later differences must stay exact.
    let mut src = Source::new(21);
    let mut v = args(&s, &mut src, (0.001, 0.02));
    for t in [10, 70, 149] {
        v[1][t * 2] = 5000.0;
        v[0][t * 16..t * 16 + 16].fill(0.001);
    }
    let (dy, dh) = (src.vec(v[0].len()), src.vec(v[6].len()));
    let want = reference(&s, &v, &dy, &dh);
    for ((got, want), name) in run(&s, &v, &dy, &dh).iter().zip(&want).zip(NAMES) {
        close(name, got, want, 1e-5);
    }
}

#[test]
fn scan_threads_and_windows() {
    // Large enough for several windows of backward, and parallel.
    let s = SelectiveScan { n: 1, l: 1100, heads: 4, head_dim: 32, groups: 2, state: 32, block: 16 };
    let mut src = Source::new(22);
    let v = args(&s, &mut src, (0.0, 0.3));
    let (dy, dh) = (src.vec(v[0].len()), src.vec(v[6].len()));
    same_bits(|| run(&s, &v, &dy, &dh).concat());
    // States of 2^19 floats: 16 blocks of one step make a window.
    let s = SelectiveScan { n: 1, l: 40, heads: 16, head_dim: 128, groups: 1, state: 256, block: 1 };
    check(s, 23, (0.0, 0.5), 1e-5);
}
