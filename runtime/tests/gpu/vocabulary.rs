//! What variants of attention are made of: dense scores and masks, choices with forced units, weights, merges, sums of slots,
//! ranges of keys with a log-sum-exp, joint softmaxes; and all of their gradients.

use crate::attend::{Shape, check_attention_op, choices, dims, operands, shape, tolerance};
use crate::harness::Case;
use crate::rig::{Check, Input, Rig};
use rambac_codegen::cuda::Arch;
use rambac_ir::ops::*;
use rambac_ir::testing::Rng;
use rambac_ir::{Bindings, DType, Dim, HostArray, Ty};

pub const ALL: &[Case] = &[
    ("dense_scores_and_their_gradient", scores),
    ("masks", masks),
    ("softmax_of_rows", softmax),
    ("choice_among_dense_scores", choice),
    ("weights_of_chosen_scores", weights),
    ("merges_of_attentions", merges),
    ("sums_of_slots", slots),
    ("attention_to_ranges_of_keys", ranges),
    ("attention_behind_keys_that_came_before", behind),
    ("joint_softmax_over_chosen_chunks", joint),
    ("a_softmax_per_chunk_unfused", apart),
];

use DType::{BF16, F16, F32};

fn sym(name: &str) -> Dim {
    Dim::sym(name)
}
fn ty(dtype: DType, rows: &[&str], cols: &[usize]) -> Ty {
    Ty::new(dtype, rows.iter().map(|s| sym(s)).chain(cols.iter().map(|&c| Dim::int(c))))
}

/// Sizes are tokens, units, key heads, query heads per key head, width.
fn check_score(
    rig: &Rig,
    rng: &mut Rng,
    dtype: DType,
    sizes: [usize; 5],
    chunk: usize,
    form: &'static str,
) -> Result<(), String> {
    let [l, c, h, group, r] = sizes;
    let b = Bindings::new([("N", 2), ("L", l), ("C", c)]);
    let q = Input::new(rng, ty(dtype, &["N", "L"], &[h * group, r]), &b, -1.0, 1.0);
    let lm = Input::new(rng, ty(dtype, &["N", "C"], &[h, r]), &b, -1.0, 1.0);
    let start = Input::of(ty(DType::I32, &["N"], &[]), HostArray::i32(&[2], vec![0, 7]));
    let ds_ty = Ty::new(dtype, [sym("N"), sym("L"), Dim::int(h * group), sym("C")]);
    let mut ds = Input::new(rng, ds_ty, &b, -1.0, 1.0);
    // As a mask leaves them: 0 for most.
    if let rambac_ir::host::Data::Float(v) = &mut ds.value.data {
        v.iter_mut().enumerate().filter(|(i, _)| i % c > i / c / (h * group) % l).for_each(|(_, x)| *x = 0.0);
    }
    let scale = (r as f64).powf(-0.5);
    let check = Check::new(Score { chunk, scale }, vec![q.clone(), lm.clone(), start], &b, tolerance(dtype));
    rig.check(&check.in_form(form))?;
    let form = if form == "score" { "score_grad" } else { form };
    rig.check(&Check::new(ScoreGrad { scale }, vec![q, lm, ds], &b, 2.0 * tolerance(dtype)).in_form(form)).map(|_| ())
}

fn scores(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(1);
    for (dtype, sizes, chunk) in [
        (F32, [70, 70, 1, 2, 16], 1),
        (BF16, [130, 9, 2, 1, 64], 16),
        (F16, [65, 130, 1, 3, 32], 1),
        (F32, [5, 1, 1, 1, 128], 3),
    ] {
        check_score(rig, &mut rng, dtype, sizes, chunk, "score")?;
    }
    for (dtype, sizes, chunk) in [(F32, [9, 5, 2, 2, 5], 2), (BF16, [7, 7, 1, 1, 136], 1)] {
        check_score(rig, &mut rng, dtype, sizes, chunk, "any_size")?;
    }
    Ok(String::new())
}

fn masks(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(2);
    for (dtype, l, c, chunk) in [(F32, 20, 7, 3), (BF16, 300, 300, 1)] {
        let b = Bindings::new([("N", 2), ("L", l), ("C", c)]);
        let s = Ty::new(dtype, [sym("N"), sym("L"), Dim::int(1), sym("C")]);
        let start = Input::of(ty(DType::I32, &["N"], &[]), HostArray::i32(&[2], vec![0, 5]));
        rig.check(&Check::new(Mask { chunk }, vec![Input::new(&mut rng, s, &b, -1.0, 1.0), start], &b, 0.0))?;
    }
    Ok(String::new())
}

/// -inf at random, and in whole rows.
fn with_gaps(mut x: Input, rng: &mut Rng) -> Input {
    let k = *x.value.shape.last().unwrap();
    if let rambac_ir::host::Data::Float(v) = &mut x.value.data {
        for (i, v) in v.iter_mut().enumerate() {
            if (i / k).is_multiple_of(5) || rng.uniform(0.0, 1.0) < 0.3 {
                *v = f64::NEG_INFINITY;
            }
        }
    }
    x
}

fn softmax(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(3);
    for (dtype, k) in [(F32, 1), (F32, 33), (BF16, 100), (F16, 600)] {
        let b = Bindings::new([("N", 2), ("L", 7), ("K", k)]);
        let x = Input::new(&mut rng, ty(dtype, &["N", "L", "K"], &[]), &b, -20.0, 20.0);
        rig.check(&Check::new(Softmax {}, vec![with_gaps(x, &mut rng)], &b, tolerance(dtype)))?;
    }
    Ok(String::new())
}

fn choice(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(4);
    for (dtype, [rows, c], k, order, (sinks, recent)) in [
        (F32, [11, 40], 4, Order::Recent, (0, 0)),
        (F32, [11, 300], 64, Order::Recent, (1, 2)),
        (BF16, [9, 70], 5, Order::Score, (2, 3)),
        (F16, [9, 3], 8, Order::Recent, (1, 1)),
        (F32, [5, 1000], 400, Order::Score, (0, 1)),
        (F32, [6, 90], 33, Order::Recent, (3, 30)),
    ] {
        let b = Bindings::new([("N", 1), ("L", rows), ("C", c)]);
        let s = Ty::new(dtype, [sym("N"), sym("L"), Dim::int(2), sym("C")]);
        let mut s = with_gaps(Input::new(&mut rng, s, &b, -4.0, 4.0), &mut rng);
        // Whole numbers are often equal, and zeros of both signs are.
        if let rambac_ir::host::Data::Float(v) = &mut s.value.data {
            v.iter_mut().for_each(|x| *x = x.round());
        }
        rig.check(&Check::new(Select { k, order, sinks, recent }, vec![s], &b, 0.0))?;
    }
    Ok(String::new())
}

fn check_weigh(rig: &Rig, rng: &mut Rng, s: &Shape, rule: Weighting) -> Result<(), String> {
    let b = dims(s);
    let (index, count) = choices(rng, s);
    let scores = Ty::new(s.dtype, [sym("N"), sym("L"), Dim::int(s.h), sym("C")]);
    let slots = ty(s.dtype, &["N", "L"], &[s.h, s.k]);
    let x = vec![
        Input::new(rng, scores, &b, -2.0, 2.0),
        Input::of(slots.with_dtype(DType::I32), HostArray::i32(&[s.n, s.l, s.h, s.k], index)),
        Input::of(ty(DType::I32, &["N", "L"], &[s.h]), HostArray::i32(&[s.n, s.l, s.h], count)),
        Input::new(rng, slots, &b, -1.0, 1.0),
    ];
    rig.check(&Check::new(Weigh { rule }, x[..3].to_vec(), &b, tolerance(s.dtype)))?;
    rig.check(&Check::new(WeighGrad { rule }, x, &b, 2.0 * tolerance(s.dtype))).map(|_| ())
}

fn weights(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(5);
    use Weighting::{Logit, One, Sigmoid, Softmax, StickBreaking};
    for (s, rule) in [
        (shape(F32, [2, 9, 7, 0], [2, 1], 16, 16, 3), StickBreaking),
        (shape(BF16, [1, 40, 3, 0], [1, 1], 16, 16, 5), Softmax),
        (shape(F16, [1, 9, 40, 0], [1, 1], 16, 16, 9), Sigmoid),
        (shape(F32, [1, 9, 5, 0], [3, 1], 16, 16, 4), Logit),
        (shape(F32, [1, 3, 5, 0], [1, 1], 16, 16, 100), One),
    ] {
        check_weigh(rig, &mut rng, &s, rule)?;
    }
    Ok(String::new())
}

fn check_merge(rig: &Rig, rng: &mut Rng, dtype: DType, heads: usize, of: &[usize], d: usize) -> Result<(), String> {
    let b = Bindings::new([("N", 2), ("L", 5)]);
    let o = ty(dtype, &["N", "L"], &[heads, d]);
    let mut x = vec![];
    for &h in of {
        x.push(Input::new(rng, o.clone(), &b, -1.0, 1.0));
        x.push(with_gaps(Input::new(rng, ty(dtype, &["N", "L"], &[h]), &b, -3.0, 3.0), rng));
    }
    rig.check(&Check::new(Merge {}, x.clone(), &b, tolerance(dtype)))?;
    x.push(Input::new(rng, o, &b, -1.0, 1.0));
    x.push(Input::new(rng, ty(dtype, &["N", "L"], &[heads]), &b, -1.0, 1.0));
    rig.check(&Check::new(MergeGrad {}, x, &b, 2.0 * tolerance(dtype))).map(|_| ())
}

fn merges(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(6);
    for (dtype, heads, of, d) in
        [(F32, 4, &[4, 2][..], 16), (BF16, 2, &[2, 2, 1][..], 40), (F16, 1, &[1][..], 7), (F32, 6, &[3, 6, 2][..], 33)]
    {
        check_merge(rig, &mut rng, dtype, heads, of, d)?;
    }
    Ok(String::new())
}

fn check_slots(rig: &Rig, rng: &mut Rng, dtype: DType, [heads, h, k, d]: [usize; 4], axis: bool) -> Result<(), String> {
    let b = Bindings::new([("N", 2), ("L", 5)]);
    let row = ty(dtype, &["N", "L"], &[heads, d]);
    let mut x = match axis {
        true => vec![Input::new(rng, ty(dtype, &["N", "L"], &[heads, k, d]), &b, -1.0, 1.0)],
        false => (0..k).map(|_| Input::new(rng, row.clone(), &b, -1.0, 1.0)).collect(),
    };
    x.push(Input::new(rng, ty(dtype, &["N", "L"], &[h, k]), &b, -1.0, 1.0));
    rig.check(&Check::new(Aggregate {}, x.clone(), &b, tolerance(dtype)))?;
    x.push(Input::new(rng, row, &b, -1.0, 1.0));
    rig.check(&Check::new(AggregateGrad {}, x, &b, 2.0 * tolerance(dtype))).map(|_| ())
}

fn slots(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(7);
    for (dtype, sizes, axis) in [
        (F32, [4, 2, 3, 16], true),
        (F32, [4, 4, 3, 16], false),
        (BF16, [3, 1, 5, 40], true),
        (F16, [2, 1, 2, 7], false),
    ] {
        check_slots(rig, &mut rng, dtype, sizes, axis)?;
    }
    Ok(String::new())
}

/// Windows, own chunks, units; with and without a log-sum-exp, by tiles and by rows.
fn ranges(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(8);
    // Batch, tokens, key heads, query heads per key head, head_dim.
    for (dtype, sizes, (window, local, unit), lse, fixed) in [
        (F32, [1, 130, 1, 2, 16], (32, 0, 0), false, false),
        (BF16, [2, 70, 1, 2, 32], (0, 16, 0), false, false),
        (F16, [1, 100, 2, 1, 32], (40, 32, 0), false, true),
        (BF16, [1, 40, 1, 1, 64], (1, 0, 0), false, true),
        // A log-sum-exp; rows that see nothing.
        (F32, [1, 100, 1, 2, 32], (0, 0, 16), true, false),
        (F32, [2, 40, 2, 2, 16], (0, 0, 7), true, true),
        (F32, [1, 90, 1, 3, 16], (0, 16, 0), true, false),
        (BF16, [1, 70, 1, 2, 16], (0, 0, 8), false, false),
        // Sizes that no tile takes.
        (F32, [2, 11, 2, 2, 8], (0, 0, 3), true, false),
        (F32, [1, 11, 1, 2, 8], (0, 4, 0), true, false),
        (BF16, [1, 13, 1, 1, 7], (5, 0, 0), false, false),
    ] {
        let causal = unit == 0;
        let op = Attention { window, local, unit, lse, ..Attention::new((sizes[4] as f64).powf(-0.5), causal) };
        check_attention_op(rig, &mut rng, dtype, sizes, op, fixed)?;
    }
    for causal in [false, true] {
        let op = Attention { lse: true, ..Attention::new(1.5, causal) };
        check_attention_op(rig, &mut rng, F32, [2, 40, 1, 2, 16], op, false)?;
    }
    Ok(String::new())
}

/// Queries behind a memory of keys: sizes are sequences, rows, keys that there is room for, key heads, query heads per key head,
/// head_dim; sequences are at different places.
fn check_behind(
    rig: &Rig,
    rng: &mut Rng,
    dtype: DType,
    sizes: [usize; 6],
    op: Attention,
    (first, fixed): (usize, bool),
    form: &'static str,
) -> Result<(), String> {
    let [n, l, room, h, group, d] = sizes;
    let b = Bindings::new([("N", n), ("L", l), ("K", room)]);
    let keys = if fixed { Dim::int(room) } else { sym("K") };
    let of = |t: Dim, heads: usize| Ty::new(dtype, [sym("N"), t, Dim::int(heads), Dim::int(d)]);
    let start = (0..n).map(|i| (first + 7 * i) as i32).collect();
    let x = vec![
        Input::new(rng, of(sym("L"), h * group), &b, -1.5, 1.5).wide(2),
        Input::new(rng, of(keys.clone(), h), &b, -1.5, 1.5),
        Input::new(rng, of(keys, h), &b, -1.5, 1.5),
        Input::of(ty(DType::I32, &["N"], &[]), HostArray::i32(&[n], start)),
    ];
    rig.check(&Check::new(op, x, &b, tolerance(dtype)).in_form(form)).map(|_| ())
}

fn behind(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(19);
    let causal = |scale: f64| Attention::new(scale, true);
    for (dtype, sizes, op, at, form) in [
        // A token, as decoding has it; a segment; the first; one at the end of the room, and beyond it.
        (F32, [2, 1, 90, 2, 2, 16], causal(0.25), (40, false), "attention"),
        (BF16, [1, 70, 200, 1, 2, 64], causal(0.125), (100, true), "attention"),
        (F32, [1, 40, 64, 1, 1, 32], causal(0.2), (0, true), "attention"),
        (F32, [2, 5, 30, 1, 3, 16], causal(0.25), (20, false), "attention"),
        (BF16, [2, 9, 96, 2, 1, 32], Attention { window: 12, ..causal(0.2) }, (33, true), "attention"),
        (F32, [1, 130, 300, 1, 1, 16], Attention { window: 40, local: 32, ..causal(0.25) }, (150, false), "attention"),
        (
            BF16,
            [2, 3, 40, 1, 4, 16],
            Attention { unit: 4, lse: true, ..Attention::new(0.25, false) },
            (60, false),
            "attention",
        ),
        (F32, [2, 33, 100, 1, 2, 16], Attention { local: 16, lse: true, ..causal(0.25) }, (50, false), "attention"),
        // Sizes that no tile takes.
        (F32, [2, 3, 20, 2, 2, 7], Attention { lse: true, ..causal(0.3) }, (4, false), "any_size"),
        (BF16, [2, 4, 20, 1, 1, 5], Attention { window: 6, ..causal(0.3) }, (12, false), "any_size"),
        (
            F32,
            [1, 6, 9, 1, 3, 40],
            Attention { unit: 3, lse: true, ..Attention::new(0.3, false) },
            (14, false),
            "any_size",
        ),
    ] {
        check_behind(rig, &mut rng, dtype, sizes, op, at, form)?;
    }
    Ok(String::new())
}

/// `attend` and `attend_grad` with one softmax over all chunks, the gradient with what the forward gave.
fn check_joint(rig: &Rig, rng: &mut Rng, s: &Shape, arch: Arch, form: [&'static str; 2]) -> Result<(), String> {
    let (op, x) = (
        Attend { chunk: s.chunk, scale: (s.d as f64).powf(-0.5), off_by_one: s.off, joint: true },
        operands(rng, s, s.n == 1, true),
    );
    let b = dims(s);
    let dy = x[6].clone();
    let x = x[..5].to_vec();
    rig.check(&Check::new(op.clone(), x.clone(), &b, tolerance(s.dtype)).on(arch).in_form(form[0]))?;
    let rows = ty(s.dtype, &["N", "L"], &[s.h * s.group]);
    let y: Vec<_> = [&dy.ty, &rows].iter().map(|t| t.bind(&b).unwrap()).collect();
    let mut known = op.eval(&x.iter().map(|x| &x.value).collect::<Vec<_>>(), &y);
    known.iter_mut().for_each(HostArray::round_to_dtype);
    let [o, lse] = <[HostArray; 2]>::try_from(known).unwrap();
    let Attend { chunk, scale, off_by_one, joint } = op;
    let more = [Input::of(dy.ty.clone(), o), Input::of(rows.clone(), lse), dy, Input::new(rng, rows, &b, -1.0, 1.0)];
    let check = Check::new(
        AttendGrad { chunk, scale, off_by_one, joint },
        [x, more.to_vec()].concat(),
        &b,
        2.0 * tolerance(s.dtype),
    );
    rig.check(&check.on(arch).in_form(form[1])).map(|_| ())
}

fn joint(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(9);
    for s in [
        shape(F32, [1, 30, 5, 0], [1, 2], 64, 64, 3),
        shape(BF16, [2, 21, 9, 0], [2, 4], 32, 32, 4),
        shape(F32, [2, 13, 4, 1], [1, 3], 48, 32, 3),
        shape(F16, [1, 37, 6, 2], [1, 1], 16, 16, 4),
        // More slots than chunks: some are chosen twice; chunks in parts.
        shape(F32, [1, 6, 3, 0], [1, 5], 32, 96, 5),
        shape(BF16, [1, 9, 3, 0], [1, 16], 128, 64, 2),
    ] {
        check_joint(rig, &mut rng, &s, Arch::Sm80, ["query_tile", "chunk_major"])?;
    }
    check_joint(
        rig,
        &mut rng,
        &shape(BF16, [1, 21, 3, 0], [1, 4], 64, 64, 2),
        Arch::Sm90a,
        ["query_tile", "chunk_major"],
    )?;
    for s in [
        shape(F32, [2, 5, 3, 1], [2, 3], 7, 3, 4),
        shape(BF16, [1, 9, 4, 0], [1, 2], 40, 16, 2),
        // Single tokens are chosen.
        shape(F32, [1, 12, 12, 0], [2, 2], 16, 1, 8),
    ] {
        check_joint(rig, &mut rng, &s, Arch::Sm80, ["any_size", "any_size"])?;
    }
    Ok(String::new())
}

fn apart(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(10);
    for s in [shape(F32, [2, 5, 3, 1], [2, 3], 7, 3, 4), shape(BF16, [1, 9, 4, 0], [1, 2], 16, 16, 2)] {
        let scale = (s.d as f64).powf(-0.5);
        let (b, mut x) = (dims(&s), operands(&mut rng, &s, false, false)[..5].to_vec());
        let op = Attend { chunk: s.chunk, scale, off_by_one: s.off, joint: false };
        rig.check(&Check::new(op, x.clone(), &b, tolerance(s.dtype)))?;
        x.push(Input::new(&mut rng, ty(s.dtype, &["N", "L"], &[s.h * s.group, s.k, s.d]), &b, -1.0, 1.0));
        let grad = AttendGrad { chunk: s.chunk, scale, off_by_one: s.off, joint: false };
        rig.check(&Check::new(grad, x, &b, 2.0 * tolerance(s.dtype)))?;
    }
    Ok(String::new())
}

// Small cases for templates with defects.

pub fn quick_scores(rig: &Rig) -> Result<(), String> {
    check_score(rig, &mut Rng(11), F32, [70, 40, 2, 2, 16], 1, "score")
}
pub fn quick_choice(rig: &Rig) -> Result<(), String> {
    choice(rig)?;
    check_weigh(rig, &mut Rng(12), &shape(F32, [2, 9, 7, 0], [2, 1], 16, 16, 3), Weighting::StickBreaking)
}
pub fn quick_mix(rig: &Rig) -> Result<(), String> {
    softmax(rig)?;
    check_merge(rig, &mut Rng(13), F32, 4, &[4, 2], 16)?;
    check_slots(rig, &mut Rng(14), F32, [4, 2, 3, 16], true)
}
pub fn quick_ranges(rig: &Rig) -> Result<(), String> {
    let mut rng = Rng(15);
    // The last token that sees the first 64 keys is the first of a block of rows.
    for (window, local, unit) in [(34, 0, 0), (0, 16, 0), (0, 0, 8)] {
        let op = Attention { window, local, unit, lse: true, ..Attention::new(0.25, unit == 0) };
        check_attention_op(rig, &mut rng, F32, [1, 100, 1, 2, 16], op, false)?;
    }
    let op = Attention { window: 34, ..Attention::new(0.25, true) };
    check_behind(rig, &mut rng, F32, [2, 20, 130, 1, 2, 16], op, (50, false), "attention")?;
    crate::attend::quick_attention(rig)
}
pub fn quick_joint(rig: &Rig) -> Result<(), String> {
    let mut rng = Rng(16);
    check_joint(rig, &mut rng, &shape(F32, [1, 21, 6, 0], [1, 2], 16, 32, 3), Arch::Sm80, ["query_tile", "chunk_major"])
}
pub fn quick_any(rig: &Rig) -> Result<(), String> {
    let mut rng = Rng(17);
    check_joint(rig, &mut rng, &shape(F32, [2, 5, 3, 0], [2, 3], 7, 3, 4), Arch::Sm80, ["any_size", "any_size"])?;
    let op = Attention { window: 3, ..Attention::new(0.25, true) };
    check_behind(rig, &mut rng, F32, [2, 3, 12, 1, 2, 7], op, (4, false), "any_size")?;
    let op = Attention { unit: 3, lse: true, ..Attention::new(0.25, false) };
    check_attention_op(rig, &mut rng, F32, [2, 11, 2, 2, 8], op, false)
}
