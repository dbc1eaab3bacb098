//! The choice of chunks, attention to them, and their gradients.

use crate::harness::Case;
use crate::rig::{Check, Input, Rig, random};
use rambac_codegen::cuda::Arch;
use rambac_ir::ops::*;
use rambac_ir::testing::Rng;
use rambac_ir::{Bindings, DType, Dim, HostArray, Ty};

pub const ALL: &[Case] = &[
    ("chunk_attention_query_tiles", query_tiles),
    ("chunk_attention_chunk_major", chunk_major),
    ("chunk_attention_grad", grad),
    ("chunk_attention_at_the_370m_shape", full_shape),
    ("selection_chooses_what_its_definition_does", selection),
    ("selection_grad", selection_grad),
    ("attention_and_its_gradient", attention),
];

/// One case of attention to chunks.
#[derive(Clone, Copy)]
struct Shape {
    dtype: DType,
    n: usize,
    l: usize,
    chunks: usize,
    h: usize,
    group: usize,
    d: usize,
    chunk: usize,
    k: usize,
    off: f64,
}

const fn shape(dtype: DType, sizes: [usize; 4], heads: [usize; 2], d: usize, chunk: usize, k: usize) -> Shape {
    let [n, l, chunks, _] = sizes;
    Shape { dtype, n, l, chunks, h: heads[0], group: heads[1], d, chunk, k, off: sizes[3] as f64 / 2.0 }
}

fn tolerance(t: DType) -> f64 {
    match t {
        DType::BF16 => 1.2e-2,
        DType::F16 => 1.5e-3,
        _ => 4e-6,
    }
}

fn dims(s: &Shape) -> Bindings {
    Bindings::new([("N", s.n), ("L", s.l), ("C", s.chunks)])
}

/// Choices: some rows full, some of fewer, some of none; in no order.
fn choices(rng: &mut Rng, s: &Shape) -> (Vec<i32>, Vec<i32>) {
    let rows = s.n * s.l * s.h;
    let (mut index, mut count) = (vec![], vec![]);
    for _ in 0..rows {
        let most = s.k.min(s.chunks);
        let n = if rng.uniform(0.0, 1.0) < 0.6 { most } else { rng.below(most + 1) };
        let mut all: Vec<i32> = (0..s.chunks as i32).collect();
        for i in 0..n {
            let j = i + rng.below(s.chunks - i);
            all.swap(i, j);
        }
        count.push(n as i32);
        index.extend((0..s.k).map(|i| if i < n { all[i] } else { 0 }));
    }
    (index, count)
}

fn operands(rng: &mut Rng, s: &Shape, wide: bool, dy: bool) -> Vec<Input> {
    let (b, heads) = (dims(s), s.h * s.group);
    let [n, l] = [Dim::sym("N"), Dim::sym("L")];
    let tokens = Dim::sym("C").checked_mul(&Dim::int(s.chunk)).unwrap();
    let ty = |rows: &[&Dim], cols: &[usize]| {
        Ty::new(s.dtype, rows.iter().map(|d| (*d).clone()).chain(cols.iter().map(|&c| Dim::int(c))))
    };
    let real = |rng: &mut Rng, t: Ty, low: f64, high: f64| Input::new(rng, t, &b, low, high);
    let (index, count) = choices(rng, s);
    let slots = ty(&[&n, &l], &[s.h, s.k]);
    // Unfilled slots weigh 0.
    let w = random(rng, &slots, &b, 0.0, 1.0);
    let filled = |i: usize| i % s.k < count[i / s.k] as usize;
    let w = HostArray::from_f64(&w.ty(), (0..w.len()).map(|i| if filled(i) { w.get(i) } else { 0.0 }).collect());
    let rows = [s.n, s.l, s.h];
    let mut x = vec![
        real(rng, ty(&[&n, &l], &[heads, s.d]), -2.0, 2.0),
        real(rng, ty(&[&n, &tokens], &[s.h, s.d]), -2.0, 2.0),
        real(rng, ty(&[&n, &tokens], &[s.h, s.d]), -1.0, 1.0),
        Input::of(slots.with_dtype(DType::I32), HostArray::i32(&[s.n, s.l, s.h, s.k], index)),
        Input::of(ty(&[&n, &l], &[s.h]).with_dtype(DType::I32), HostArray::i32(&rows, count)),
        Input::of(slots, w),
    ];
    if dy {
        x.push(real(rng, ty(&[&n, &l], &[heads, s.d]), -1.0, 1.0));
    }
    if wide {
        for i in [0, 1, 2, 6] {
            if i < x.len() {
                x[i].wide = Some(2);
            }
        }
    }
    x
}

/// Runs a shape; the form that ran must be the wanted one.
fn attend(rig: &Rig, arch: Arch, rng: &mut Rng, s: &Shape, wide: bool, form: &str) -> Result<(), String> {
    let op = ChunkAttention { chunk: s.chunk, scale: (s.d as f64).powf(-0.5), off_by_one: s.off };
    let c = Check::new(op, operands(rng, s, wide, false), &dims(s), tolerance(s.dtype)).on(arch);
    let seen = rig.check(&c)?;
    let name = seen.program.steps.last().unwrap().form(&c.dims).map_err(|e| e.to_string())?.name;
    if name == form { Ok(()) } else { Err(format!("{name} ran, {form} was to be tested\n{}", c.describe())) }
}

fn query_tiles(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(1);
    use DType::{BF16, F16, F32};
    for s in [
        // Many query heads: a tile is a token; more chunks than tokens.
        shape(BF16, [1, 9, 16, 0], [1, 16], 64, 64, 4),
        shape(F32, [1, 5, 9, 0], [1, 16], 64, 64, 3),
        // Few: several tokens in a tile; G that divides nothing; two sequences, two key heads.
        shape(F16, [2, 21, 70, 2], [2, 4], 32, 32, 3),
        shape(BF16, [1, 37, 90, 0], [2, 1], 16, 16, 4),
        shape(F32, [2, 13, 20, 1], [1, 3], 48, 32, 3),
        // More query heads than rows of a block; chunks in parts; more slots than chunks.
        shape(BF16, [1, 3, 3, 0], [1, 130], 128, 256, 5),
        shape(F32, [1, 3, 7, 1], [1, 5], 128, 96, 2),
        shape(F16, [1, 1, 8, 0], [1, 2], 80, 48, 64),
    ] {
        attend(rig, Arch::Sm80, &mut rng, &s, s.n == 1, "query_tile")?;
    }
    Ok(String::new())
}

fn chunk_major(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(2);
    use DType::{BF16, F16, F32};
    for s in [
        shape(BF16, [1, 70, 3, 0], [1, 16], 64, 64, 3),
        shape(F32, [2, 40, 3, 1], [1, 4], 32, 32, 2),
        shape(F16, [1, 300, 2, 2], [2, 1], 16, 16, 2),
        shape(BF16, [1, 30, 2, 0], [1, 3], 48, 128, 2),
        shape(F32, [1, 9, 1, 0], [2, 2], 64, 64, 1),
    ] {
        attend(rig, Arch::Sm80, &mut rng, &s, s.n == 1, "chunk_major")?;
    }
    // Products of warpgroups.
    for s in [
        shape(BF16, [1, 40, 3, 0], [1, 16], 64, 64, 2),
        shape(F16, [2, 60, 3, 1], [2, 4], 64, 64, 3),
        shape(BF16, [1, 30, 3, 0], [1, 3], 128, 64, 2),
        shape(F16, [1, 30, 2, 0], [1, 2], 64, 128, 2),
        shape(BF16, [1, 20, 1, 0], [1, 5], 128, 128, 1),
        // And what they do not take.
        shape(F32, [1, 20, 2, 0], [1, 4], 64, 64, 2),
    ] {
        attend(rig, Arch::Sm90a, &mut rng, &s, s.n == 1, "chunk_major")?;
    }
    Ok(String::new())
}

fn check_grad(rng: &mut Rng, s: &Shape) -> Check {
    let op = ChunkAttentionGrad { chunk: s.chunk, scale: (s.d as f64).powf(-0.5), off_by_one: s.off };
    Check::new(op, operands(rng, s, s.n == 1, true), &dims(s), 1.5 * tolerance(s.dtype))
}

fn grad(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(3);
    use DType::{BF16, F16, F32};
    for s in [
        shape(BF16, [1, 40, 4, 0], [1, 16], 64, 64, 2),
        shape(F32, [1, 9, 4, 0], [1, 16], 64, 64, 3),
        shape(F16, [2, 21, 5, 2], [2, 4], 32, 32, 3),
        shape(BF16, [1, 70, 6, 0], [2, 1], 16, 16, 4),
        shape(F32, [2, 13, 3, 1], [1, 3], 48, 32, 3),
        // Chunks in parts: denominators are found first.
        shape(BF16, [1, 3, 3, 0], [1, 40], 128, 256, 3),
        shape(F32, [1, 4, 2, 1], [1, 5], 128, 96, 2),
        // No choice at all.
        shape(BF16, [1, 5, 2, 0], [1, 2], 16, 16, 1),
    ] {
        rig.check(&check_grad(&mut rng, &s))?;
    }
    // Products of warpgroups.
    for s in [shape(F16, [2, 30, 3, 1], [2, 3], 64, 64, 2), shape(BF16, [1, 5, 9, 0], [1, 70], 64, 64, 3)] {
        rig.check(&check_grad(&mut rng, &s).on(Arch::Sm90a))?;
    }
    Ok(String::new())
}

/// Bytes and conflicts at the shape that the 370M model has, a part of a sequence long.
fn full_shape(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(4);
    let s = shape(DType::BF16, [1, 128, 8, 0], [1, 16], 64, 64, 2);
    let mut text = String::new();
    for arch in Arch::ALL {
        let seen = rig.check(&check_grad(&mut rng, &s).on(arch))?;
        let (at, _) = (0..seen.counts.len())
            .map(|i| (i, seen.counts[i].tensor_flops))
            .max_by_key(|c| c.1)
            .ok_or("nothing was launched")?;
        let c = &seen.counts[at];
        let share = c.shared_conflicts as f64 / c.shared_passes as f64;
        if share > 0.02 {
            return Err(format!("{share:.3} of shared accesses conflict"));
        }
        text = format!(": {:.2}% of shared accesses conflict", 100.0 * share);
    }
    Ok(text)
}

/// Whole numbers, so that scores are exact and often equal.
fn whole(rng: &mut Rng, ty: Ty, b: &Bindings, most: usize) -> Input {
    let bound = ty.bind(b).unwrap();
    let n = bound.elements();
    let v = (0..n).map(|_| rng.below(2 * most + 1) as f64 - most as f64).collect();
    Input::of(ty, HostArray::from_f64(&bound, v))
}

fn selection(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(5);
    use DType::{BF16, F16, F32};
    use Weighting::{One, Sigmoid, Softmax, StickBreaking};
    for (dtype, [n, l, c, h, r], chunk, k, start, order, rule) in [
        (BF16, [1, 200, 70, 1, 64], 3, 8, vec![5], Order::Recent, StickBreaking),
        (F32, [2, 37, 9, 2, 32], 4, 3, vec![0, 20], Order::Score, Softmax),
        (F16, [1, 150, 300, 1, 48], 1, 16, vec![160], Order::Recent, Sigmoid),
        (BF16, [1, 130, 100, 1, 128], 2, 64, vec![40], Order::Score, StickBreaking),
        (F32, [1, 20, 30, 1, 16], 1, 20, vec![12], Order::Recent, One),
        (F32, [1, 10, 260, 1, 8], 1, 2, vec![255], Order::Score, StickBreaking),
        // Nothing is complete.
        (BF16, [1, 3, 4, 1, 16], 64, 2, vec![0], Order::Recent, Softmax),
    ] {
        let b = Bindings::new([("N", n), ("L", l), ("C", c)]);
        let ty = |len: &str| Ty::new(dtype, [Dim::sym("N"), Dim::sym(len), Dim::int(h), Dim::int(r)]);
        let q = whole(&mut rng, ty("L"), &b, 2);
        let x = vec![
            if n == 1 { q.wide(2) } else { q },
            whole(&mut rng, ty("C"), &b, 2),
            Input::of(Ty::i32([Dim::sym("N")]), HostArray::i32(&[n], start)),
        ];
        let op = Selection { chunk, scale: 0.125, k, order, rule };
        rig.check(&Check::new(op, x, &b, tolerance(dtype)))?;
    }
    Ok(String::new())
}

fn selection_grad(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(6);
    use DType::{BF16, F16, F32};
    use Weighting::{One, Sigmoid, Softmax, StickBreaking};
    for (s, r, rule) in [
        (shape(BF16, [1, 70, 9, 0], [1, 1], 16, 16, 8), 256, StickBreaking),
        (shape(F32, [2, 37, 3, 0], [2, 1], 16, 16, 5), 64, Softmax),
        (shape(F16, [1, 140, 5, 0], [2, 1], 16, 16, 3), 48, Sigmoid),
        (shape(F32, [1, 20, 70, 0], [1, 1], 16, 16, 64), 16, StickBreaking),
        (shape(F32, [1, 20, 4, 0], [1, 1], 16, 16, 2), 8, One),
    ] {
        let b = dims(&s);
        let (index, count) = choices(&mut rng, &s);
        let [n, l] = [Dim::sym("N"), Dim::sym("L")];
        let ty = |len: &Dim, cols: &[usize]| {
            Ty::new(s.dtype, [n.clone(), len.clone()].into_iter().chain(cols.iter().map(|&c| Dim::int(c))))
        };
        let slots = ty(&l, &[s.h, s.k]);
        let x = vec![
            Input::new(&mut rng, ty(&l, &[s.h, r]), &b, -1.0, 1.0).wide(2),
            Input::new(&mut rng, ty(&Dim::sym("C"), &[s.h, r]), &b, -1.0, 1.0),
            Input::of(slots.with_dtype(DType::I32), HostArray::i32(&[s.n, s.l, s.h, s.k], index)),
            Input::of(ty(&l, &[s.h]).with_dtype(DType::I32), HostArray::i32(&[s.n, s.l, s.h], count)),
            Input::new(&mut rng, slots.clone(), &b, -2.0, 2.0),
            Input::new(&mut rng, slots.clone(), &b, 0.0, 1.0),
            Input::new(&mut rng, slots, &b, -1.0, 1.0),
        ];
        let op = SelectionGrad { scale: (r as f64).powf(-0.5), rule };
        rig.check(&Check::new(op, x, &b, tolerance(s.dtype)))?;
    }
    Ok(String::new())
}

fn attention(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(7);
    use DType::{BF16, F16, F32};
    for (dtype, [b, t, h, group, d], causal, fixed) in [
        // A chunk and its summary, as the encoder has them.
        (BF16, [2, 65, 2, 1, 64], false, true),
        (F32, [1, 65, 1, 2, 32], false, true),
        (F16, [1, 130, 1, 1, 32], true, false),
        (F32, [1, 70, 1, 3, 48], true, false),
        (BF16, [1, 100, 1, 2, 128], false, false),
        (BF16, [3, 7, 1, 4, 16], true, true),
        (F32, [1, 1, 2, 1, 128], false, false),
    ] {
        let bindings = Bindings::new([("B", b), ("T", t)]);
        let len = if fixed { Dim::int(t) } else { Dim::sym("T") };
        let ty = |heads: usize| Ty::new(dtype, [Dim::sym("B"), len.clone(), Dim::int(heads), Dim::int(d)]);
        let mut x: Vec<Input> = [h * group, h, h, h * group]
            .into_iter()
            .map(|heads| Input::new(&mut rng, ty(heads), &bindings, -1.5, 1.5))
            .collect();
        if !fixed {
            x.iter_mut().for_each(|x| x.wide = Some(2));
        }
        let scale = (d as f64).powf(-0.5);
        let o = rambac_ir::ops::Attention { scale, causal };
        rig.check(&Check::new(o, x[..3].to_vec(), &bindings, tolerance(dtype)))?;
        rig.check(&Check::new(AttentionGrad { scale, causal }, x, &bindings, 1.5 * tolerance(dtype)))?;
    }
    Ok(String::new())
}
