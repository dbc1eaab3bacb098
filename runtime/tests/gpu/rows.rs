//! Cross-entropy, embedding and their gradients.

use crate::harness::Case;
use crate::rig::{Check, Input, Rig};
use rambac_ir::ops::*;
use rambac_ir::testing::Rng;
use rambac_ir::{Bindings, DType, Dim, HostArray, Ty};

pub const ALL: &[Case] =
    &[("cross_entropy", cross_entropy), ("linear_cross_entropy", linear_cross_entropy), ("embedding", embedding)];

/// `[N, L, more..]`
fn rows_of(more: &[usize]) -> Vec<Dim> {
    [Dim::sym("N"), Dim::sym("L")].into_iter().chain(more.iter().map(|&c| Dim::int(c))).collect()
}

/// What finds defects of the loss's templates: rows of several warps, of one vector and of two a thread; one that does not count;
/// rows that shared memory holds a part of.
pub fn quick_loss(rig: &Rig) -> Result<(), String> {
    loss_of(rig, 1500)?;
    loss_of(rig, 30_000)
}

fn loss_of(rig: &Rig, vocab: usize) -> Result<(), String> {
    let mut rng = Rng(4);
    let d = Bindings::new([("N", 1), ("L", 3)]);
    let labels = HostArray::i32(&[1, 3], vec![vocab as i32 - 1, -100, 1]);
    let labels = Input::of(Ty::i32(rows_of(&[])), labels);
    let mut real = |t: Ty| Input::new(&mut rng, t, &d, -2.0, 2.0);
    let g = real(Ty::f32(rows_of(&[])));
    let z = real(Ty::f32(rows_of(&[vocab])));
    let x = vec![z, labels.clone(), g.clone()];
    rig.check(&Check::new(CrossEntropy { ignore: -100 }, x[..2].to_vec(), &d, 2e-6))?;
    rig.check(&Check::new(CrossEntropyGrad { ignore: -100 }, x, &d, 2e-6))?;
    let x = vec![real(Ty::f32(rows_of(&[8]))), real(Ty::f32([Dim::int(vocab), Dim::int(8)])), labels, g];
    rig.check(&Check::new(LinearCrossEntropyGrad { ignore: -100 }, x, &d, 4e-6)).map(drop)
}

/// As [`quick_loss`], of the embedding's: ids of several warps and tiles, some of no row of the table, columns that fill no warp.
pub fn quick_embedding(rig: &Rig) -> Result<(), String> {
    let (mut rng, vocab, cols, tokens) = (Rng(5), 70, 33, 300);
    let d = Bindings::new([("N", 1), ("L", tokens)]);
    let mut ids: Vec<i32> = (0..tokens).map(|_| rng.below(vocab) as i32).collect();
    (ids[3], ids[200]) = (vocab as i32, -1);
    let ids = Input::of(Ty::i32(rows_of(&[])), HostArray::i32(&[1, tokens], ids));
    let mut real = |t: Ty| Input::new(&mut rng, t, &d, -1.0, 1.0);
    let table = real(Ty::f32([Dim::int(vocab), Dim::int(cols)]));
    let dy = real(Ty::f32(rows_of(&[cols])));
    rig.check(&Check::new(Embedding {}, vec![ids.clone(), table], &d, 0.0))?;
    rig.check(&Check::new(EmbeddingGrad { vocab: Dim::int(vocab) }, vec![ids, dy], &d, 1e-6)).map(drop)
}

fn cross_entropy(rig: &Rig) -> Result<String, String> {
    loss_of(rig, 30_000)?;
    let mut rng = Rng(1);
    for (dtype, tolerance) in [(DType::F32, 2e-6), (DType::BF16, 8e-3)] {
        for vocab in [7, 256, 1000] {
            let d = Bindings::new([("N", 2), ("L", 5)]);
            let rows = [Dim::sym("N"), Dim::sym("L")];
            let ty = |t, more: &[Dim]| Ty::new(t, rows.iter().chain(more).cloned());
            for wide in [None, Some(2)] {
                let mut z = Input::new(&mut rng, ty(dtype, &[Dim::int(vocab)]), &d, -30.0, 30.0);
                z.wide = wide;
                // Rows that begin with −∞, and one with a NaN, which must be seen.
                if let rambac_ir::host::Data::Float(v) = &mut z.value.data {
                    v[..vocab / 2].fill(f64::NEG_INFINITY);
                    v[vocab + vocab / 2] = f64::NAN;
                }
                let mut labels = Input::new(&mut rng, ty(DType::I32, &[]), &d, (vocab / 2) as f64, vocab as f64);
                if let rambac_ir::host::Data::Int(v) = &mut labels.value.data {
                    v[3] = -100;
                }
                let g = Input::new(&mut rng, ty(dtype, &[]), &d, -1.0, 1.0);
                rig.check(&Check::new(CrossEntropy { ignore: -100 }, vec![z.clone(), labels.clone()], &d, tolerance))?;
                rig.check(&Check::new(CrossEntropyGrad { ignore: -100 }, vec![z, labels, g], &d, tolerance))?;
            }
        }
    }
    Ok(String::new())
}

/// More rows than parts, fewer, and parts of unlike size.
fn linear_cross_entropy(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(3);
    for (dtype, tolerance) in [(DType::F32, 4e-6), (DType::BF16, 2e-2)] {
        for (n, l) in [(1, 3), (2, 13), (3, 16)] {
            let d = Bindings::new([("N", n), ("L", l)]);
            let ty = |t, more: &[Dim]| Ty::new(t, [Dim::sym("N"), Dim::sym("L")].iter().chain(more).cloned());
            let h = Input::new(&mut rng, ty(dtype, &[Dim::int(24)]), &d, -1.0, 1.0).wide(2);
            let w = Input::new(&mut rng, Ty::new(dtype, [Dim::int(37), Dim::int(24)]), &d, -1.0, 1.0);
            let mut labels = Input::new(&mut rng, ty(DType::I32, &[]), &d, 0.0, 37.0);
            if let rambac_ir::host::Data::Int(v) = &mut labels.value.data {
                v[1] = -100;
            }
            let g = Input::new(&mut rng, ty(dtype, &[]), &d, -1.0, 1.0);
            let x = vec![h, w, labels, g];
            rig.check(&Check::new(LinearCrossEntropy { ignore: -100 }, x[..3].to_vec(), &d, tolerance))?;
            rig.check(&Check::new(LinearCrossEntropyGrad { ignore: -100 }, x, &d, tolerance))?;
        }
    }
    Ok(String::new())
}

fn embedding(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(2);
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 1e-3)] {
        for (vocab, cols, l) in [(5, 8, 3), (70, 33, 150), (256, 136, 40)] {
            let d = Bindings::new([("N", 2), ("L", l)]);
            let rows = [Dim::sym("N"), Dim::sym("L")];
            let ids = Input::new(&mut rng, Ty::i32(rows.iter().cloned()), &d, 0.0, vocab as f64);
            let table = Input::new(&mut rng, Ty::new(dtype, [Dim::int(vocab), Dim::int(cols)]), &d, -1.0, 1.0);
            let dy_ty = Ty::new(dtype, rows.iter().cloned().chain([Dim::int(cols)]));
            let dy = Input::new(&mut rng, dy_ty, &d, -1.0, 1.0).wide(2);
            rig.check(&Check::new(Embedding {}, vec![ids.clone(), table], &d, 0.0))?;
            rig.check(&Check::new(EmbeddingGrad { vocab: Dim::int(vocab) }, vec![ids, dy], &d, tolerance))?;
        }
    }
    Ok(String::new())
}
