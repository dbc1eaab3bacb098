//! Matrix products.

use crate::common::*;
use half::bf16;
use rambac_cpu::kernels::gemm::{batched_matmul, matmul, matmul_bf16, matmul_then};
use rambac_cpu::par::SharedMut;
use rambac_cpu::{Mat, MatMut};
use std::ops::Range;

fn reference(a: &[f32], ta: bool, b: &[f32], tb: bool, m: usize, n: usize, k: usize) -> Vec<f64> {
    let mut c = vec![0.0; m * n];
    for i in 0..m {
        for p in 0..k {
            let v = a[if ta { p * m + i } else { i * k + p }] as f64;
            for j in 0..n {
                c[i * n + j] += v * b[if tb { j * k + p } else { p * n + j }] as f64;
            }
        }
    }
    c
}

#[test]
fn gemm_matches_reference() {
    let mut src = Source::new(1);
    let shapes = [
        (1, 1, 1),
        (1, 300, 77),
        (1, 1100, 256),
        (3, 17, 5),
        (6, 513, 130),
        (7, 9, 3),
        (5, 4, 0),
        (13, 40, 64),
        (65, 129, 33),
        (64, 64, 64),
        (200, 300, 50),
        (67, 45, 3000),
        (8, 8, 1025),
        (500, 1100, 20),
        (130, 1030, 70),
    ];
    for (m, n, k) in shapes {
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            let (a, b, c0) = (src.vec(m * k), src.vec(k * n), src.vec(m * n));
            let ap = if ta { Padded::new(&a, k, m, 5) } else { Padded::new(&a, m, k, 5) };
            let bp = if tb { Padded::new(&b, n, k, 2) } else { Padded::new(&b, k, n, 2) };
            let want = reference(&a, ta, &b, tb, m, n, k);
            for add in [false, true] {
                let got = same_bits(|| {
                    let mut c = if add { Padded::new(&c0, m, n, 1) } else { Padded::out(m, n, 1) };
                    matmul(ap.mat(), ta, bp.mat(), tb, c.mat_mut(), add);
                    c.values()
                });
                let want: Vec<f64> = want.iter().zip(&c0).map(|(w, &c)| if add { w + c as f64 } else { *w }).collect();
                close(&format!("{m}x{n}x{k} {ta} {tb} {add}"), &got, &want, 3e-6);
            }
        }
    }
}

#[test]
fn gemm_bf16_weights_match_reference() {
    let mut src = Source::new(3);
    let shapes =
        [(1, 1, 1), (1, 300, 77), (2, 513, 130), (6, 70, 96), (7, 9, 3), (31, 65, 34), (33, 130, 33), (100, 300, 700)];
    for (m, n, k) in shapes {
        let a = src.vec(m * k);
        let w: Vec<bf16> = src.vec(n * k).into_iter().map(bf16::from_f32).collect();
        let wide: Vec<f32> = w.iter().map(|w| w.to_f32()).collect();
        let want = reference(&a, false, &wide, true, m, n, k);
        let ap = Padded::new(&a, m, k, 5);
        let got = same_bits(|| {
            let mut c = Padded::out(m, n, 1);
            matmul_bf16(ap.mat(), Mat::new(&w, n, k), c.mat_mut(), None);
            c.values()
        });
        close(&format!("{m}x{n}x{k}"), &got, &want, 3e-6);
    }
}

/// An epilogue meets every element once, finished, on every path.
#[test]
fn gemm_epilogue_follows_the_product() {
    let mut src = Source::new(5);
    for (m, n, k) in [(1, 300, 77), (5, 9, 0), (40, 64, 8), (64, 40, 3000), (500, 600, 350), (67, 45, 2100)] {
        let (a, b) = (src.vec(m * k), src.vec(k * n));
        let half: Vec<bf16> = b.iter().map(|b| bf16::from_f32(*b)).collect();
        for (ta, tb) in [(false, false), (false, true), (true, false)] {
            let ap = if ta { Mat::new(&a, k, m) } else { Mat::new(&a, m, k) };
            let bp = if tb { Mat::new(&b, n, k) } else { Mat::new(&b, k, n) };
            for narrow in [false, true] {
                if narrow && (ta || !tb) {
                    continue;
                }
                let run = |then: Option<f32>| {
                    let mut c = vec![0.0; m * n];
                    let shared = SharedMut::new(&mut c);
                    // SAFETY: the product's result, and its parts in the epilogue.
                    let out = unsafe { MatMut::from_raw(shared.ptr(0, m * n), m, n, n) };
                    let twice = |rows: Range<usize>, cols: Range<usize>| {
                        for r in rows {
                            let part = unsafe { shared.slice(r * n + cols.start, cols.len()) };
                            part.iter_mut().for_each(|c| *c = *c * then.unwrap_or(1.0) + 1.0);
                        }
                    };
                    match (narrow, then) {
                        (true, None) => matmul_bf16(ap, Mat::new(&half, n, k), out, None),
                        (true, _) => matmul_bf16(ap, Mat::new(&half, n, k), out, Some(&twice)),
                        (false, None) => matmul(ap, ta, bp, tb, out, false),
                        (false, _) => matmul_then(ap, ta, bp, tb, out, &twice),
                    }
                    c
                };
                let want: Vec<f32> = run(None).into_iter().map(|c| c * 2.0 + 1.0).collect();
                assert_eq!(same_bits(|| run(Some(2.0))), want, "{m}x{n}x{k} {ta} {tb} {narrow}");
            }
        }
    }
}

/// A row of a product with few rows does not depend on how many there are: a batch decodes as each of its texts.
#[test]
fn gemm_few_rows_are_independent() {
    let mut src = Source::new(4);
    let (n, k) = (37, 83);
    let (a, w) = (src.vec(11 * k), src.vec(n * k));
    let half: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
    let run = |a: &[f32]| {
        let m = a.len() / k;
        let (mut c, mut d) = (vec![0.0; m * n], vec![0.0; m * n]);
        matmul(Mat::new(a, m, k), false, Mat::new(&w, n, k), true, MatMut::new(&mut c, m, n), false);
        matmul_bf16(Mat::new(a, m, k), Mat::new(&half, n, k), MatMut::new(&mut d, m, n), None);
        [c, d]
    };
    let all = run(&a);
    for (i, row) in a.chunks(k).enumerate() {
        for (one, all) in run(row).iter().zip(&all) {
            assert!(one.iter().zip(&all[i * n..]).all(|(x, y)| x.to_bits() == y.to_bits()), "row {i}");
        }
    }
}

#[test]
fn gemm_batched_matches_reference() {
    let mut src = Source::new(2);
    for (batch, m, n, k) in [(1, 3, 4, 5), (37, 16, 9, 11), (5, 64, 65, 66), (300, 1, 7, 3)] {
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            let (a, b) = (src.vec(batch * m * k), src.vec(batch * k * n));
            let got = same_bits(|| {
                let mut c = vec![f32::NAN; batch * m * n];
                batched_matmul(batch, &a, &b, &mut c, m, n, k, ta, tb);
                c
            });
            let want: Vec<f64> = (0..batch)
                .flat_map(|i| reference(&a[i * m * k..][..m * k], ta, &b[i * k * n..][..k * n], tb, m, n, k))
                .collect();
            close("batched", &got, &want, 3e-6);
        }
    }
}
