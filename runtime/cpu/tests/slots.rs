//! One softmax over all chosen chunks against plain f64 loops, at sizes of several slabs and segments; the choice by dense
//! scores against sorting; bits against the number of threads.

use rambac_cpu::kernels::chunk_attention::ChunkAttention;
use rambac_cpu::kernels::selection::Order;
use rambac_cpu::kernels::slots::{Choice, Mix};
use rambac_cpu::{Mat, MatMut, Rows};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn random(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.5f32..1.5)).collect()
}

#[track_caller]
fn assert_close(what: &str, actual: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let unit = expected.iter().filter(|x| x.is_finite()).fold(1.0f64, |m, x| m.max(x.abs()));
    for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        assert!(f64::from(a) == e || (f64::from(a) - e).abs() <= tolerance * unit, "{what}[{i}]: {a} instead of {e}");
    }
}

/// Runs `f` in pools of 1, 2 and 3 threads; the results must be the same bits.
fn same_bits(f: impl Fn() -> Vec<Vec<f32>> + Sync) -> Vec<Vec<f32>> {
    let run = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(&f);
    let bits = |x: &[Vec<f32>]| x.iter().flatten().map(|x| x.to_bits()).collect::<Vec<u32>>();
    let one = run(1);
    for n in [2, 3] {
        assert!(bits(&run(n)) == bits(&one), "{n} threads give other bits than 1");
    }
    one
}

fn check_joint(s: ChunkAttention) {
    let mut rng = ChaCha8Rng::seed_from_u64(s.l as u64 + 31 * s.dim as u64);
    let (rows, chunks, group) = (s.n * s.l, s.keys / s.chunk, s.heads / s.kv_heads);
    let (width, kv) = (s.heads * s.dim, s.kv_heads * s.dim);
    let [q, dy] = [(); 2].map(|()| random(&mut rng, rows * width));
    let [k, v] = [(); 2].map(|()| random(&mut rng, s.n * s.keys * kv));
    let dlse = random(&mut rng, rows * s.heads);
    // Some tokens choose nothing; the others as many distinct chunks as they may, in any order.
    let (mut indices, mut count) = (vec![], vec![]);
    for _ in 0..rows * s.kv_heads {
        let mut all: Vec<i32> = (0..chunks as i32).collect();
        all.shuffle(&mut rng);
        let n = if rng.random_bool(0.1) { 0 } else { s.k.min(chunks) };
        all.resize(s.k.max(n), 0);
        all[n..].fill(0);
        indices.extend(&all[..s.k]);
        count.push(n as i32);
    }
    let (mut y, mut lse) = (vec![0.0; rows * width], vec![f64::NEG_INFINITY; rows * s.heads]);
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    let at = |x: &[f32], i: usize| f64::from(x[i]);
    for row in 0..rows {
        for h in 0..s.heads {
            let (chooser, q0) = (row * s.kv_heads + h / group, row * width + h * s.dim);
            let chosen = &indices[chooser * s.k..][..count[chooser] as usize];
            let key =
                |c: i32, j: usize| ((row / s.l * s.keys + c as usize * s.chunk + j) * s.kv_heads + h / group) * s.dim;
            let keys: Vec<usize> = chosen.iter().flat_map(|&c| (0..s.chunk).map(move |j| key(c, j))).collect();
            let z: Vec<f64> = keys
                .iter()
                .map(|&k0| f64::from(s.scale) * (0..s.dim).map(|i| at(&q, q0 + i) * at(&k, k0 + i)).sum::<f64>())
                .collect();
            let sum: f64 = z.iter().map(|z| z.exp()).sum::<f64>() + f64::from(s.off_by_one);
            lse[row * s.heads + h] = sum.ln();
            let p: Vec<f64> = z.iter().map(|z| z.exp() / sum).collect();
            let dp: Vec<f64> =
                keys.iter().map(|&k0| (0..s.dim).map(|i| at(&dy, q0 + i) * at(&v, k0 + i)).sum()).collect();
            let delta = p.iter().zip(&dp).map(|(p, d)| p * d).sum::<f64>() - at(&dlse, row * s.heads + h);
            for ((&k0, p), dp) in keys.iter().zip(&p).zip(&dp) {
                let ds = p * (dp - delta) * f64::from(s.scale);
                for i in 0..s.dim {
                    y[q0 + i] += p * at(&v, k0 + i);
                    dq[q0 + i] += ds * at(&k, k0 + i);
                    dk[k0 + i] += ds * at(&q, q0 + i);
                    dv[k0 + i] += p * at(&dy, q0 + i);
                }
            }
        }
    }
    let [qm, dym] = [&q, &dy].map(|x| Mat::new(x, rows, width));
    let [km, vm] = [&k, &v].map(|x| Mat::new(x, s.n * s.keys, kv));
    let got = same_bits(|| {
        let (mut y, mut lse) = (vec![f32::NAN; rows * width], vec![f32::NAN; rows * s.heads]);
        s.forward_joint(
            qm,
            Rows::Dense(km),
            Rows::Dense(vm),
            &indices,
            &count,
            MatMut::new(&mut y, rows, width),
            &mut lse,
        );
        let mut dq = vec![f32::NAN; q.len()];
        let (mut dk, mut dv) = (vec![f32::NAN; k.len()], vec![f32::NAN; v.len()]);
        s.backward_joint(
            qm,
            km,
            vm,
            &indices,
            &count,
            (Mat::new(&y, rows, width), &lse),
            (dym, &dlse),
            MatMut::new(&mut dq, rows, width),
            MatMut::new(&mut dk, s.n * s.keys, kv),
            MatMut::new(&mut dv, s.n * s.keys, kv),
        );
        vec![y, lse, dq, dk, dv]
    });
    for ((what, got), want) in ["y", "lse", "dq", "dk", "dv"].iter().zip(&got).zip([y, lse, dq, dk, dv]) {
        assert_close(&format!("{s:?} {what}"), got, &want, 2e-5);
    }
}

#[test]
fn a_joint_softmax_matches_the_formula() {
    let base = ChunkAttention {
        n: 2,
        l: 21,
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
        ChunkAttention { off_by_one: 1.0, dim: 13, chunk: 12, ..base },
        ChunkAttention { chunk: 1, k: 9, keys: 40, ..base },
        ChunkAttention { heads: 3, kv_heads: 3, k: 8, chunk: 8, ..base },
        ChunkAttention { k: 1, heads: 50, kv_heads: 1, dim: 5, ..base },
        // Lists longer than a slab, and several segments.
        ChunkAttention { n: 1, l: 600, heads: 8, kv_heads: 1, keys: 64, dim: 8, ..base },
    ];
    cases.into_iter().for_each(check_joint);
}

#[test]
fn large_logits_are_no_trouble() {
    let s = ChunkAttention {
        n: 1,
        l: 1,
        keys: 8,
        heads: 1,
        kv_heads: 1,
        dim: 4,
        k: 2,
        chunk: 4,
        scale: 1.0,
        off_by_one: 0.0,
    };
    let (q, v) = (vec![60.0f32; 4], vec![1.0f32; 32]);
    let k: Vec<f32> = (0..32).map(|i| if i < 16 { 50.0 } else { -50.0 }).collect();
    let (mut y, mut lse) = (vec![f32::NAN; 4], vec![f32::NAN]);
    let (km, vm) = (Rows::Dense(Mat::new(&k, 8, 4)), Rows::Dense(Mat::new(&v, 8, 4)));
    s.forward_joint(Mat::new(&q, 1, 4), km, vm, &[1, 0], &[2], MatMut::new(&mut y, 1, 4), &mut lse);
    assert!(y.iter().all(|y| (y - 1.0).abs() < 1e-6) && (lse[0] - (12000.0 + 4f32.ln())).abs() < 2e-2, "{y:?} {lse:?}");
}

#[test]
fn choices_are_those_of_sorting() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for case in 0..400 {
        let (units, k) = (rng.random_range(0..20), rng.random_range(1..8));
        let sinks = rng.random_range(0..=k.min(2));
        let recent = rng.random_range(0..=k - sinks);
        // Few values, so that many are equal.
        let s: Vec<f32> = (0..units)
            .map(|_| if rng.random_bool(0.3) { f32::NEG_INFINITY } else { rng.random_range(-3..3) as f32 })
            .collect();
        for order in [Order::Recent, Order::Score] {
            let seen: Vec<usize> = (0..units).filter(|&c| s[c] > f32::NEG_INFINITY).collect();
            let forced: Vec<usize> = seen
                .iter()
                .enumerate()
                .filter(|(i, _)| *i < sinks || i + recent >= seen.len())
                .map(|(_, &c)| c)
                .collect();
            let mut free: Vec<usize> = seen.into_iter().filter(|c| !forced.contains(c)).collect();
            free.sort_by(|&a, &b| s[b].total_cmp(&s[a]).then(a.cmp(&b)));
            free.truncate(k - forced.len().min(k));
            let mut want = [forced, free].concat();
            match order {
                Order::Recent => want.sort_by(|a, b| b.cmp(a)),
                Order::Score => want.sort_by(|&a, &b| s[b].total_cmp(&s[a]).then(a.cmp(&b))),
            }
            let (mut indices, mut count) = (vec![-1; k], vec![-1]);
            Choice { units, k, order, sinks, recent }.run(&s, &mut indices, &mut count);
            let got: Vec<usize> = indices[..count[0] as usize].iter().map(|&i| i as usize).collect();
            assert_eq!(got, want, "case {case}: {s:?} k {k} sinks {sinks} recent {recent}");
            assert!(indices[count[0] as usize..].iter().all(|i| *i == 0));
        }
    }
}

/// Merging parts in any way gives the same as all at once.
#[test]
fn merges_are_associative() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let mix = Mix { rows: 12, heads: 4, dim: 5 };
    let parts: Vec<(Vec<f32>, Vec<f32>)> = (0..3).map(|_| (random(&mut rng, 60), random(&mut rng, 12))).collect();
    let merge = |parts: &[(&[f32], &[f32], usize)]| {
        let (mut y, mut lse) = (vec![f32::NAN; 60], vec![f32::NAN; 12]);
        mix.merge(parts, &mut y, &mut lse);
        (y, lse)
    };
    let of = |i: usize| (&parts[i].0[..], &parts[i].1[..], 4);
    let all = merge(&[of(0), of(1), of(2)]);
    let two = merge(&[of(0), of(1)]);
    let then = merge(&[(&two.0, &two.1, 4), of(2)]);
    let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
    assert_close("y", &then.0, &wide(&all.0), 1e-6);
    assert_close("lse", &then.1, &wide(&all.1), 1e-6);
    // What sees nothing takes no part; where nothing sees anything, nothing comes out.
    let nothing = vec![f32::NEG_INFINITY; 12];
    let same = merge(&[of(0), (&parts[1].0, &nothing, 4)]);
    assert_eq!(same.0, parts[0].0);
    assert_eq!(merge(&[(&parts[0].0, &nothing, 4)]), (vec![0.0; 60], nothing.clone()));
}
