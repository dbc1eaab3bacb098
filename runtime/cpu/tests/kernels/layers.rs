//! Norms, embedding, cross-entropy, reductions, rotary, permutation.

use crate::common::*;
use rambac_cpu::kernels::linear_cross_entropy::LinearCrossEntropy;
use rambac_cpu::kernels::{cross_entropy, embedding, norm, reduce, rotary, transpose};
use rambac_cpu::{Mat, MatMut};

fn norm_reference(x: &[f64], z: Option<&[f64]>, w: &[f64], eps: f64) -> Vec<f64> {
    let u: Vec<f64> = match z {
        Some(z) => x.iter().zip(z).map(|(x, z)| x * z / (1.0 + (-z).exp())).collect(),
        None => x.to_vec(),
    };
    let group = |u: &[f64]| {
        let r = 1.0 / (u.iter().map(|v| v * v).sum::<f64>() / u.len() as f64 + eps).sqrt();
        u.iter().zip(w).map(|(u, w)| w * u * r).collect::<Vec<_>>()
    };
    u.chunks(w.len()).flat_map(group).collect()
}

#[test]
fn norm_matches_reference_and_differences() {
    let mut src = Source::new(30);
    for (rows, groups, width) in [(1, 1, 3), (3, 1, 7), (2, 4, 5), (5, 2, 70)] {
        let cols = groups * width;
        let (x, z, w, dy) =
            (src.vec(rows * cols), src.range(rows * cols, -3.0, 3.0), src.vec(width), src.vec(rows * cols));
        let eps = 1e-5f32;
        let [px, pz, pdy] = [(&x, 1), (&z, 2), (&dy, 3)].map(|(v, pad)| Padded::new(v, rows, cols, pad));
        let [mut y, mut dx, mut dz] = [1, 2, 3].map(|pad| Padded::out(rows, cols, pad));
        let mut dw = vec![f32::NAN; width];
        norm::rms_norm(px.mat(), &w, eps, y.mat_mut());
        close("rms_norm", &y.values(), &norm_reference(&f64s(&x), None, &f64s(&w), eps as f64), 1e-6);
        norm::rms_norm_backward(px.mat(), &w, eps, pdy.mat(), Some(pz.mat()), dx.mat_mut(), &mut dw);
        let with_base = dx.values();
        norm::rms_norm_backward(px.mat(), &w, eps, pdy.mat(), None, dx.mat_mut(), &mut dw);
        let sums = dx.values().iter().zip(&z).map(|(d, z)| d + z).collect::<Vec<_>>();
        assert_eq!(with_base, sums, "dx with a base");
        let d = gradients(&[&x, &w], |v| dot(&norm_reference(&v[0], None, &v[1], eps as f64), &dy));
        close("dx", &dx.values(), &d[0], 2e-5);
        close("dw", &dw, &d[1], 2e-5);

        norm::gated_rms_norm(px.mat(), pz.mat(), &w, eps, y.mat_mut());
        let want = norm_reference(&f64s(&x), Some(&f64s(&z)), &f64s(&w), eps as f64);
        close("gated", &y.values(), &want, 1e-6);
        norm::gated_rms_norm_backward(px.mat(), pz.mat(), &w, eps, pdy.mat(), dx.mat_mut(), dz.mat_mut(), &mut dw);
        let d = gradients(&[&x, &z, &w], |v| dot(&norm_reference(&v[0], Some(&v[1]), &v[2], eps as f64), &dy));
        for (name, got, want) in [("dx", dx.values(), &d[0]), ("dz", dz.values(), &d[1]), ("dw", dw, &d[2])] {
            close(&format!("gated {name} {rows} {groups} {width}"), &got, want, 2e-5);
        }
    }
    let (rows, cols) = (1000, 96);
    let (x, z, w) = (src.vec(rows * cols), src.vec(rows * cols), src.vec(32));
    let [px, pz] = [&x, &z].map(|v| Padded::new(v, rows, cols, 1));
    same_bits(|| {
        let [mut y, mut dx, mut dz] = [1, 2, 3].map(|pad| Padded::out(rows, cols, pad));
        let mut dw = vec![f32::NAN; 32];
        norm::gated_rms_norm(px.mat(), pz.mat(), &w, 1e-5, y.mat_mut());
        norm::gated_rms_norm_backward(px.mat(), pz.mat(), &w, 1e-5, px.mat(), dx.mat_mut(), dz.mat_mut(), &mut dw);
        [y.values(), dx.values(), dz.values(), dw].concat()
    });
}

#[test]
fn embedding_gathers_and_scatters() {
    let mut src = Source::new(31);
    for (tokens, vocab, d) in [(1, 1, 1), (50, 7, 9), (3000, 300, 130)] {
        let (table, dy) = (src.vec(vocab * d), src.vec(tokens * d));
        let mut ids = src.ids(tokens, vocab as i32);
        ids[..tokens / 2].fill(0);
        let pt = Padded::new(&table, vocab, d, 1);
        let mut y = Padded::out(tokens, d, 2);
        embedding::gather(&ids, pt.mat(), y.mat_mut());
        let want: Vec<f32> = ids.iter().flat_map(|&i| table[i as usize * d..][..d].to_vec()).collect();
        assert_eq!(y.values(), want);
        let pdy = Padded::new(&dy, tokens, d, 3);
        let got = same_bits(|| {
            let mut dt = Padded::out(vocab, d, 1);
            embedding::scatter_add(&ids, pdy.mat(), dt.mat_mut());
            dt.values()
        });
        let mut want = vec![0.0; vocab * d];
        for (i, &id) in ids.iter().enumerate() {
            for j in 0..d {
                want[id as usize * d + j] += dy[i * d + j] as f64;
            }
        }
        close("scatter", &got, &want, 1e-5);
    }
}

#[test]
fn cross_entropy_matches_reference() {
    let mut src = Source::new(32);
    for (rows, vocab) in [(1, 1), (7, 33), (300, 257)] {
        let logits = src.range(rows * vocab, -20.0, 20.0);
        let (mut labels, dloss) = (src.ids(rows, vocab as i32), src.vec(rows));
        labels[rows - 1] = -100;
        let p = Padded::new(&logits, rows, vocab, 3);
        let got = same_bits(|| {
            let (mut loss, mut lse) = (vec![f32::NAN; rows], vec![f32::NAN; rows]);
            cross_entropy::forward(p.mat(), &labels, &mut loss, &mut lse);
            let mut d = Padded::out(rows, vocab, 1);
            cross_entropy::backward(p.mat(), &labels, &lse, &dloss, d.mat_mut());
            [loss, lse, d.values()].concat()
        });
        for r in 0..rows {
            let row = f64s(&logits[r * vocab..(r + 1) * vocab]);
            let lse = row.iter().map(|v| v.exp()).sum::<f64>().ln();
            let ignored = labels[r] < 0;
            let loss = if ignored { 0.0 } else { lse - row[labels[r] as usize] };
            assert!((got[r] as f64 - loss).abs() < 1e-5 && (got[rows + r] as f64 - lse).abs() < 1e-5);
            for (j, v) in row.iter().enumerate() {
                let one = (labels[r] == j as i32) as i32 as f64;
                let want = if ignored { 0.0 } else { dloss[r] as f64 * ((v - lse).exp() - one) };
                assert!((got[2 * rows + r * vocab + j] as f64 - want).abs() < 1e-6);
            }
        }
    }
}

#[test]
fn reduce_matches_reference() {
    let mut src = Source::new(33);
    for (outer, axis, inner) in
        [(1, 1, 1), (3, 0, 2), (2, 5, 7), (1, 100_003, 1), (900, 13, 1), (2, 300, 700), (5, 1, 9), (1, 5000, 3)]
    {
        let x = src.vec(outer * axis * inner);
        let got = same_bits(|| {
            let [mut s, mut m, mut mean] = [(); 3].map(|_| vec![f32::NAN; outer * inner]);
            reduce::sum(&x, outer, axis, inner, &mut s);
            reduce::max(&x, outer, axis, inner, &mut m);
            reduce::sum_scaled(&x, outer, axis, inner, 1.0 / axis.max(1) as f32, &mut mean);
            [s, m, mean].concat()
        });
        let (mut sum, mut max) = (vec![0.0; outer * inner], vec![f32::NEG_INFINITY; outer * inner]);
        for (i, &v) in x.iter().enumerate() {
            let at = i / (axis * inner) * inner + i % inner;
            sum[at] += v as f64;
            max[at] = max[at].max(v);
        }
        let len = outer * inner;
        close("sum", &got[..len], &sum, 1e-6);
        assert_eq!(&got[len..2 * len], &max[..]);
        let mean: Vec<f64> = sum.iter().map(|v| v / axis.max(1) as f64).collect();
        close("mean", &got[2 * len..], &mean, 1e-6);
    }
}

#[test]
fn rotary_turns_and_turns_back() {
    let mut src = Source::new(34);
    let (outer, t, heads, dim) = (3, 40, 2, 16);
    let (rows, cols) = (outer * t, heads * dim);
    let x = src.vec(rows * cols);
    let p = Padded::new(&x, rows, cols, 1);
    for start in [vec![], vec![1_000_000], vec![5, 0, 777]] {
        let got = same_bits(|| {
            let mut y = Padded::out(rows, cols, 2);
            rotary::apply(p.mat(), t, dim, 10000.0, &start, false, y.mat_mut());
            y.values()
        });
        for (i, &g) in got.iter().enumerate() {
            let (r, c) = (i / cols, i % cols);
            let at = r % t + *start.get(if start.len() == 1 { 0 } else { r / t }).unwrap_or(&0) as usize;
            let (j, half) = (c % dim % (dim / 2), dim / 2);
            let (sin, cos) = (at as f64 * 10000f64.powf(-2.0 * j as f64 / dim as f64)).sin_cos();
            let other = if c % dim < half { -(x[i + half] as f64) } else { x[i - half] as f64 };
            assert!((g as f64 - (x[i] as f64 * cos + other * sin)).abs() < 1e-6);
        }
        let mut back = Padded::out(rows, cols, 1);
        rotary::apply(Padded::new(&got, rows, cols, 3).mat(), t, dim, 10000.0, &start, true, back.mat_mut());
        close("inverse", &back.values(), &f64s(&x), 1e-6);
    }
}

#[test]
fn transpose_permutes() {
    let cases: [(&[usize], &[usize]); 9] = [
        (&[], &[]),
        (&[5], &[0]),
        (&[3, 4], &[1, 0]),
        (&[70, 90], &[1, 0]),
        (&[2, 33, 5, 40], &[0, 2, 1, 3]),
        (&[2, 33, 5, 40], &[3, 1, 0, 2]),
        (&[7, 1, 50, 1], &[2, 3, 1, 0]),
        (&[4, 100, 130], &[0, 2, 1]),
        (&[3, 4, 5, 6, 7], &[4, 2, 0, 3, 1]),
    ];
    for (shape, perm) in cases {
        let len: usize = shape.iter().product();
        let x: Vec<u32> = (0..len as u32).collect();
        let mut y = vec![u32::MAX; len];
        transpose::permute(&x, shape, perm, &mut y);
        for (i, &v) in y.iter().enumerate() {
            // Coordinates of y[i], put back in x's order.
            let (mut rest, mut coordinates) = (i, vec![0; shape.len()]);
            for &p in perm.iter().rev() {
                coordinates[p] = rest % shape[p];
                rest /= shape[p];
            }
            let at = shape.iter().zip(&coordinates).fold(0, |a, (n, c)| a * n + c);
            assert_eq!(v as usize, at, "{shape:?} {perm:?}");
        }
    }
}

#[test]
fn linear_cross_entropy_matches_reference() {
    let mut src = Source::new(35);
    // Ragged blocks of rows and of the vocabulary, one row, one class.
    for (rows, vocab, dim) in [(1, 1, 1), (7, 33, 5), (300, 257, 9), (1100, 40, 16), (70, 3000, 8)] {
        let op = LinearCrossEntropy { rows, vocab, dim };
        let (h, w) = (src.range(rows * dim, -3.0, 3.0), src.range(vocab * dim, -3.0, 3.0));
        let (mut labels, dloss) = (src.ids(rows, vocab as i32), src.vec(rows));
        labels[rows - 1] = -100;
        let (ph, pw) = (Padded::new(&h, rows, dim, 3), Padded::new(&w, vocab, dim, 0));
        let got = same_bits(|| {
            let (mut loss, mut again) = (vec![f32::NAN; rows], vec![f32::NAN; rows]);
            let (mut dh, mut dw) = (Padded::out(rows, dim, 2), Padded::out(vocab, dim, 0));
            op.forward(ph.mat(), pw.mat(), &labels, &mut loss);
            op.backward(ph.mat(), pw.mat(), &labels, &dloss, dh.mat_mut(), dw.mat_mut(), &mut again);
            assert_eq!(loss, again, "the losses differ between the directions");
            [loss, dh.values(), dw.values()].concat()
        });
        let (mut loss, mut dh, mut dw) = (vec![0.0; rows], vec![0.0; rows * dim], vec![0.0; vocab * dim]);
        for r in (0..rows).filter(|&r| labels[r] >= 0) {
            let row = f64s(&h[r * dim..][..dim]);
            let z: Vec<f64> =
                (0..vocab).map(|v| row.iter().zip(&w[v * dim..]).map(|(a, &b)| a * b as f64).sum()).collect();
            let lse = z.iter().map(|v| v.exp()).sum::<f64>().ln();
            loss[r] = lse - z[labels[r] as usize];
            for v in 0..vocab {
                let dz = dloss[r] as f64 * ((z[v] - lse).exp() - (labels[r] == v as i32) as i32 as f64);
                for j in 0..dim {
                    dh[r * dim + j] += dz * w[v * dim + j] as f64;
                    dw[v * dim + j] += dz * row[j];
                }
            }
        }
        let what = format!("{rows} rows, {vocab} classes, width {dim}");
        close(&format!("loss of {what}"), &got[..rows], &loss, 2e-6);
        close(&format!("dh of {what}"), &got[rows..rows * (dim + 1)], &dh, 1e-5);
        close(&format!("dw of {what}"), &got[rows * (dim + 1)..], &dw, 1e-5);
    }
}

/// Logits far apart, equal, and infinite; a NaN is seen, but not through a row that is ignored.
#[test]
fn linear_cross_entropy_at_its_edges() {
    let (vocab, dim) = (600, 1);
    let op = LinearCrossEntropy { rows: 1, vocab, dim };
    let run = |w: &[f32], h: f32, label: i32| {
        let (mut loss, mut dh, mut dw) = ([f32::NAN], [f32::NAN], vec![f32::NAN; vocab]);
        let (dh_out, dw_out) = (MatMut::new(&mut dh, 1, 1), MatMut::new(&mut dw, vocab, 1));
        op.backward(Mat::new(&[h], 1, 1), Mat::new(w, vocab, 1), &[label], &[1.0], dh_out, dw_out, &mut loss);
        (loss[0], dh[0], dw)
    };
    let flat = vec![0.0; vocab];
    assert!((run(&flat, 1.0, 3).0 - (vocab as f32).ln()).abs() < 1e-6);
    let mut far = vec![-1e30; vocab];
    far[500] = 1e30;
    assert_eq!(run(&far, 1.0, 500).0, 0.0);
    assert_eq!(run(&far, 1.0, 0).0, 2e30);
    // A part of the vocabulary is impossible.
    let mut some = vec![f32::NEG_INFINITY; vocab];
    some[599] = 2.0;
    let (loss, _, dw) = run(&some, 1.0, 599);
    assert!(loss == 0.0 && dw.iter().all(|v| *v == 0.0), "{loss}");
    some[0] = f32::NAN;
    assert!(run(&some, 1.0, 599).0.is_nan());
    let (loss, _, dw) = run(&some, 1.0, -100);
    assert!(loss == 0.0 && dw.iter().all(|v| *v == 0.0), "{loss}");
    some[0] = f32::INFINITY;
    assert!(!run(&some, 1.0, 599).0.is_finite());
}

/// Scratch is bounded whatever the number of rows, and what is said is what is taken.
#[test]
fn linear_cross_entropy_scratch_is_bounded() {
    for (vocab, dim) in [(256, 128), (50_280, 768), (262_144, 16)] {
        let of = |rows| LinearCrossEntropy { rows, vocab, dim };
        let most = of(1 << 20).backward_scratch();
        assert!(most * 4 <= (64 << 20) + (48 << 20), "{vocab} x {dim}: {} MiB", most >> 18);
        assert!(of(1 << 24).backward_scratch() == most && of(1 << 20).forward_scratch() <= most);
    }
}
