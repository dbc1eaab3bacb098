//! The choice of chunks, attention to them, and their gradients.

use crate::harness::Case;
use crate::rig::{Check, Input, Rig, Seen, random};
use rambac_codegen::cuda::Arch;
use rambac_ir::ops::*;
use rambac_ir::testing::Rng;
use rambac_ir::{Bindings, DType, Dim, HostArray, Ty};

pub const ALL: &[Case] = &[
    ("chunk_attention_query_tiles", query_tiles),
    ("chunk_attention_pairs", pairs),
    ("chunk_attention_chunk_major", chunk_major),
    ("chunk_attention_of_neighbours", neighbours),
    ("chunk_attention_grad", grad),
    ("chunk_attention_at_the_370m_shape", full_shape),
    ("chunk_attention_of_drawn_shapes", drawn),
    ("selection_chooses_what_its_definition_does", selection),
    ("selection_grad", selection_grad),
    ("attention_and_its_gradient", attention),
    ("attention_and_selection_of_any_size", any_size),
];

/// One case of attention to chunks.
#[derive(Clone, Copy)]
pub struct Shape {
    pub dtype: DType,
    pub n: usize,
    pub l: usize,
    pub chunks: usize,
    pub h: usize,
    pub group: usize,
    pub d: usize,
    pub chunk: usize,
    pub k: usize,
    pub off: f64,
}

pub const fn shape(dtype: DType, sizes: [usize; 4], heads: [usize; 2], d: usize, chunk: usize, k: usize) -> Shape {
    let [n, l, chunks, _] = sizes;
    Shape { dtype, n, l, chunks, h: heads[0], group: heads[1], d, chunk, k, off: sizes[3] as f64 / 2.0 }
}

pub fn tolerance(t: DType) -> f64 {
    match t {
        DType::BF16 => 1.2e-2,
        DType::F16 => 1.5e-3,
        _ => 4e-6,
    }
}

pub fn dims(s: &Shape) -> Bindings {
    Bindings::new([("N", s.n), ("L", s.l), ("C", s.chunks)])
}

/// Choices: some rows full, some of fewer, some of none; in no order, and of more slots than chunks some twice.
pub fn choices(rng: &mut Rng, s: &Shape) -> (Vec<i32>, Vec<i32>) {
    let rows = s.n * s.l * s.h;
    let (mut index, mut count) = (vec![], vec![]);
    for _ in 0..rows {
        let most = s.k;
        let n = if rng.uniform(0.0, 1.0) < 0.6 { most } else { rng.below(most + 1) };
        let mut all: Vec<i32> = (0..s.chunks as i32).collect();
        for i in 0..n {
            match s.chunks > i {
                true => all.swap(i, i + rng.below(s.chunks - i)),
                false => all.push(rng.below(s.chunks) as i32),
            }
        }
        count.push(n as i32);
        index.extend((0..s.k).map(|i| if i < n { all[i] } else { 0 }));
    }
    (index, count)
}

/// Choices of which most are the neighbour's before.
fn alike(rng: &mut Rng, s: &Shape) -> (Vec<i32>, Vec<i32>) {
    let (mut index, mut count) = choices(rng, s);
    for row in s.h..count.len() {
        // A stretch of tokens goes its own ways.
        if !(row / s.h).is_multiple_of(s.l) && (row / s.h % 64 > 20) && rng.uniform(0.0, 1.0) < 0.9 {
            count[row] = count[row - s.h];
            index.copy_within((row - s.h) * s.k..(row - s.h + 1) * s.k, row * s.k);
        }
    }
    (index, count)
}

pub fn operands(rng: &mut Rng, s: &Shape, wide: bool, dy: bool) -> Vec<Input> {
    let chosen = choices(rng, s);
    operands_with(rng, s, chosen, wide, dy)
}

fn operands_with(rng: &mut Rng, s: &Shape, chosen: (Vec<i32>, Vec<i32>), wide: bool, dy: bool) -> Vec<Input> {
    let (b, heads) = (dims(s), s.h * s.group);
    let [n, l] = [Dim::sym("N"), Dim::sym("L")];
    let tokens = Dim::sym("C").checked_mul(&Dim::int(s.chunk)).unwrap();
    let ty = |rows: &[&Dim], cols: &[usize]| {
        Ty::new(s.dtype, rows.iter().map(|d| (*d).clone()).chain(cols.iter().map(|&c| Dim::int(c))))
    };
    let real = |rng: &mut Rng, t: Ty, low: f64, high: f64| Input::new(rng, t, &b, low, high);
    let (index, count) = chosen;
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

/// Runs a shape in a form.
fn attend(rig: &Rig, arch: Arch, rng: &mut Rng, s: &Shape, wide: bool, form: &'static str) -> Result<(), String> {
    rig.check(&check_attend(rng, s, wide).on(arch).in_form(form)).map(|_| ())
}

pub fn check_attend(rng: &mut Rng, s: &Shape, wide: bool) -> Check {
    let op = ChunkAttention { chunk: s.chunk, scale: (s.d as f64).powf(-0.5), off_by_one: s.off };
    Check::new(op, operands(rng, s, wide, false), &dims(s), tolerance(s.dtype))
}

fn pairs(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(8);
    use DType::{BF16, F16, F32};
    for s in [
        // A token of each of two sequences, as decoding has them.
        shape(BF16, [2, 1, 9, 0], [1, 16], 64, 64, 8),
        shape(F32, [1, 3, 5, 1], [2, 4], 32, 32, 3),
        shape(F16, [1, 2, 4, 0], [1, 1], 16, 128, 6),
    ] {
        attend(rig, Arch::Sm80, &mut rng, &s, s.n == 1, "pairs")?;
        // It is what would be chosen.
        let seen = rig.check(&check_attend(&mut rng, &s, false))?;
        let name = seen.program.steps.last().unwrap().form(&dims(&s)).map_err(|e| e.to_string())?.name;
        if name != "pairs" {
            return Err(format!("{name} was chosen for {} tokens", s.l));
        }
    }
    Ok(String::new())
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
    // In parts, some of them empty.
    for (s, form) in [
        (shape(BF16, [1, 37, 3, 0], [1, 16], 64, 64, 3), "chunk_major_tokens"),
        (shape(F32, [1, 5, 2, 1], [2, 2], 32, 32, 2), "chunk_major_tokens"),
        (shape(F32, [3, 21, 3, 1], [2, 2], 32, 32, 2), "chunk_major_sequences"),
        (shape(F16, [10, 4, 2, 0], [1, 4], 16, 16, 2), "chunk_major_sequences"),
    ] {
        attend(rig, Arch::Sm80, &mut rng, &s, s.n == 1, form)?;
    }
    // Products of warpgroups.
    for s in [
        shape(BF16, [1, 40, 3, 0], [1, 12], 64, 64, 2),
        shape(F16, [2, 60, 3, 1], [2, 5], 64, 64, 3),
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

/// Runs a shape whose neighbours choose alike, in a form with tiles for them, few blocks; `below`: all logits are far below zero.
fn attend_alike(rig: &Rig, rng: &mut Rng, s: &Shape, below: bool, form: &'static str) -> Result<(), String> {
    let op = ChunkAttention { chunk: s.chunk, scale: (s.d as f64).powf(-0.5), off_by_one: s.off };
    let chosen = alike(rng, s);
    let mut x = operands_with(rng, s, chosen, s.n == 1, false);
    if below {
        for (i, low) in [(0, -6.0), (1, 5.0)] {
            x[i] = Input::new(rng, x[i].ty.clone(), &dims(s), low, low + 1.0);
        }
    }
    rig.check(&Check::new(op, x, &dims(s), tolerance(s.dtype)).on(Arch::Sm90a).sms(1).in_form(form)).map(|_| ())
}

fn neighbours(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(18);
    use DType::{BF16, F16};
    for (s, form) in [
        // A tile is eight tokens, in full and in part; some tiles share nothing.
        (shape(BF16, [1, 101, 20, 0], [1, 16], 64, 64, 4), "shared_tiles"),
        // A thread's rows are of two tokens; two sequences, two key heads, zero logits; chunks chosen twice.
        (shape(F16, [2, 37, 6, 1], [2, 8], 64, 64, 8), "shared_tiles"),
        (shape(BF16, [1, 70, 9, 0], [1, 4], 64, 64, 2), "shared_tiles"),
        (shape(BF16, [1, 33, 3, 2], [1, 8], 64, 64, 10), "shared_tiles"),
        // In parts, some of them empty.
        (shape(F16, [1, 45, 3, 0], [1, 16], 64, 64, 3), "shared_tiles_tokens"),
        (shape(BF16, [3, 30, 3, 0], [1, 16], 64, 64, 3), "shared_tiles_sequences"),
    ] {
        attend_alike(rig, &mut rng, &s, false, form)?;
    }
    Ok(String::new())
}

/// Shapes that nobody chose, in every form.
fn drawn(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(10);
    const SHAPES: usize = 6;
    for _ in 0..SHAPES {
        let dtype = rng.pick(&[DType::F32, DType::BF16, DType::F16]);
        let sizes = [1 + rng.below(2), 1 + rng.below(30), 1 + rng.below(6), rng.below(3)];
        let heads = [1 + rng.below(2), 1 + rng.below(20)];
        let (d, chunk) = (rng.pick(&[16, 32, 48]), rng.pick(&[16, 32, 48, 80, 112]));
        let s = shape(dtype, sizes, heads, d, chunk, 1 + rng.below(6));
        for form in ["query_tile", "pairs", "chunk_major"] {
            // Many heads per key head never go chunk by chunk.
            if form != "chunk_major" || 3 * s.group < s.chunk {
                attend(rig, Arch::Sm80, &mut rng, &s, s.n == 1, form)?;
            }
        }
        rig.check(&check_grad(&mut rng, &s))?;
    }
    Ok(format!(": {SHAPES} shapes"))
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
    // Denominators are found in one go through the rows where the chunk fits, gradients in one for each of two parts.
    let seen = rig.check(&check_grad(&mut rng, &shape(F32, [1, 40, 2, 0], [1, 16], 64, 64, 2)))?;
    let read = |kernel: &str| -> u64 {
        let of = seen.counts.iter().filter(|c| c.kernel.starts_with(kernel));
        of.flat_map(|c| &c.buffers).map(|b| b.1.read_bytes).sum()
    };
    let (stats, grad) = (read("attend_grad_stats"), read("attend_grad_f32"));
    if 10 * stats > 7 * grad {
        return Err(format!("{stats} bytes are read for denominators, {grad} for gradients"));
    }
    // Products of warpgroups.
    for s in [shape(F16, [2, 30, 3, 1], [2, 3], 64, 64, 2), shape(BF16, [1, 5, 9, 0], [1, 70], 64, 64, 3)] {
        rig.check(&check_grad(&mut rng, &s).on(Arch::Sm90a))?;
    }
    Ok(String::new())
}

/// Conflicts of the kernel that multiplies most, as a part of its passes through shared memory; few of them.
fn conflicts(seen: &Seen) -> Result<String, String> {
    let Some(c) = seen.counts.iter().max_by_key(|c| c.tensor_flops) else {
        return Ok(", the device does not count".into());
    };
    let share = c.shared_conflicts as f64 / c.shared_passes as f64;
    if share > 0.02 {
        return Err(format!("{}: {share:.3} of shared accesses conflict", c.kernel));
    }
    Ok(format!(": {:.2}% of shared accesses conflict", 100.0 * share))
}

/// Bytes and conflicts at the shape that the 370M model has, a part of a sequence long.
fn full_shape(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(4);
    let s = shape(DType::BF16, [1, 128, 8, 0], [1, 16], 64, 64, 2);
    let mut text = String::new();
    for arch in Arch::ALL {
        let seen = rig.check(&check_grad(&mut rng, &s).on(arch))?;
        text = conflicts(&seen)?;
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

pub type Selecting = (DType, [usize; 5], usize, usize, Vec<i32>, Order, Weighting);

pub fn check_selection(rng: &mut Rng, case: Selecting) -> Check {
    let (dtype, [n, l, c, h, r], chunk, k, start, order, rule) = case;
    let b = Bindings::new([("N", n), ("L", l), ("C", c)]);
    let ty = |len: &str| Ty::new(dtype, [Dim::sym("N"), Dim::sym(len), Dim::int(h), Dim::int(r)]);
    let q = whole(rng, ty("L"), &b, 2);
    let x = vec![
        if n == 1 { q.wide(2) } else { q },
        whole(rng, ty("C"), &b, 2),
        Input::of(Ty::i32([Dim::sym("N")]), HostArray::i32(&[n], start)),
    ];
    Check::new(Selection { chunk, scale: 0.125, k, order, rule }, x, &b, tolerance(dtype))
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
        let case = check_selection(&mut rng, (dtype, [n, l, c, h, r], chunk, k, start, order, rule));
        for form in ["split", "select_64", "select_128"] {
            // A form for few tokens is slow with many; 64 slots leave no place for 128 landmarks.
            if (form != "split" || l < 50) && (form != "select_128" || k < 64) {
                rig.check(&case.clone().in_form(form))?;
            }
        }
    }
    // Products of warpgroups.
    for (form, case) in [
        ("select_64", (BF16, [1, 200, 70, 1, 192], 3, 8, vec![5], Order::Recent, StickBreaking)),
        ("select_128", (F16, [1, 40, 260, 2, 48], 1, 16, vec![240], Order::Score, Sigmoid)),
        ("split", (BF16, [2, 1, 300, 1, 64], 1, 8, vec![299, 150], Order::Recent, StickBreaking)),
        ("select_64", (F32, [1, 20, 30, 1, 16], 1, 20, vec![12], Order::Recent, Softmax)),
    ] {
        rig.check(&check_selection(&mut rng, case).on(Arch::Sm90a).in_form(form))?;
    }
    // Landmarks so narrow that few passes are theirs: those that put choices in order show.
    let narrow = (BF16, [1, 128, 8, 1, 16], 16, 4, vec![0], Order::Recent, StickBreaking);
    let narrow = check_selection(&mut rng, narrow);
    let mut text = String::new();
    for arch in Arch::ALL {
        for form in ["select_64", "select_128"] {
            text = conflicts(&rig.check(&narrow.clone().on(arch).in_form(form))?)?;
        }
    }
    Ok(text)
}

fn check_selection_grad(rng: &mut Rng, s: &Shape, r: usize, rule: Weighting) -> Check {
    let b = dims(s);
    let (index, count) = choices(rng, s);
    let [n, l] = [Dim::sym("N"), Dim::sym("L")];
    let ty = |len: &Dim, cols: &[usize]| {
        Ty::new(s.dtype, [n.clone(), len.clone()].into_iter().chain(cols.iter().map(|&c| Dim::int(c))))
    };
    let slots = ty(&l, &[s.h, s.k]);
    let x = vec![
        Input::new(rng, ty(&l, &[s.h, r]), &b, -1.0, 1.0).wide(2),
        Input::new(rng, ty(&Dim::sym("C"), &[s.h, r]), &b, -1.0, 1.0),
        Input::of(slots.with_dtype(DType::I32), HostArray::i32(&[s.n, s.l, s.h, s.k], index)),
        Input::of(ty(&l, &[s.h]).with_dtype(DType::I32), HostArray::i32(&[s.n, s.l, s.h], count)),
        Input::new(rng, slots.clone(), &b, -2.0, 2.0),
        Input::new(rng, slots.clone(), &b, 0.0, 1.0),
        Input::new(rng, slots, &b, -1.0, 1.0),
    ];
    Check::new(SelectionGrad { scale: (r as f64).powf(-0.5), rule }, x, &b, tolerance(s.dtype))
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
        rig.check(&check_selection_grad(&mut rng, &s, r, rule))?;
    }
    Ok(String::new())
}

/// `sizes` are batch, tokens, key heads, query heads per key head, head_dim; `fixed`: the number of tokens is no symbol.
fn check_attention(
    rig: &Rig,
    rng: &mut Rng,
    dtype: DType,
    sizes: [usize; 5],
    causal: bool,
    fixed: bool,
) -> Result<(), String> {
    let op = rambac_ir::ops::Attention::new((sizes[4] as f64).powf(-0.5), causal);
    check_attention_op(rig, rng, dtype, sizes, op, fixed)
}

/// As [`check_attention`], of any range of keys, with a log-sum-exp if the op gives one.
pub fn check_attention_op(
    rig: &Rig,
    rng: &mut Rng,
    dtype: DType,
    sizes: [usize; 5],
    op: rambac_ir::ops::Attention,
    fixed: bool,
) -> Result<(), String> {
    let [b, t, h, group, d] = sizes;
    let keys = t.checked_div(op.unit).map_or(t, |units| units + 1);
    let bindings = Bindings::new([("B", b), ("T", t), ("K", keys)]);
    let len = if fixed { Dim::int(t) } else { Dim::sym("T") };
    let key_len = if op.unit > 0 { if fixed { Dim::int(keys) } else { Dim::sym("K") } } else { len.clone() };
    let ty = |len: &Dim, heads: usize| Ty::new(dtype, [Dim::sym("B"), len.clone(), Dim::int(heads), Dim::int(d)]);
    let mut x: Vec<Input> = [(&len, h * group), (&key_len, h), (&key_len, h), (&len, h * group)]
        .into_iter()
        .map(|(len, heads)| Input::new(rng, ty(len, heads), &bindings, -1.5, 1.5))
        .collect();
    if !fixed {
        x.iter_mut().for_each(|x| x.wide = Some(2));
    }
    if op.lse {
        let rows = Ty::new(dtype, [Dim::sym("B"), len.clone(), Dim::int(h * group)]);
        x.push(Input::new(rng, rows, &bindings, -1.0, 1.0));
    }
    let rambac_ir::ops::Attention { scale, causal, window, local, unit, lse } = op;
    rig.check(&Check::new(op, x[..3].to_vec(), &bindings, tolerance(dtype)))?;
    let grad = AttentionGrad { scale, causal, window, local, unit, lse };
    rig.check(&Check::new(grad, x, &bindings, 1.5 * tolerance(dtype)))?;
    Ok(())
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
        check_attention(rig, &mut rng, dtype, [b, t, h, group, d], causal, fixed)?;
    }
    Ok(String::new())
}

// Small cases for templates with defects.

pub fn quick_query_tiles(rig: &Rig) -> Result<(), String> {
    use DType::{BF16, F16, F32};
    let mut rng = Rng(11);
    for s in [
        shape(F16, [2, 3, 7, 2], [2, 4], 32, 32, 9),
        shape(BF16, [1, 21, 70, 0], [1, 4], 32, 32, 3),
        shape(F32, [1, 3, 7, 1], [1, 5], 32, 96, 2),
    ] {
        attend(rig, Arch::Sm80, &mut rng, &s, false, "query_tile")?;
    }
    Ok(())
}

pub fn quick_chunk_major(rig: &Rig) -> Result<(), String> {
    let mut rng = Rng(12);
    attend(rig, Arch::Sm80, &mut rng, &shape(DType::BF16, [1, 41, 3, 0], [1, 5], 16, 16, 2), true, "chunk_major")
}

pub fn quick_grad(rig: &Rig) -> Result<(), String> {
    let mut rng = Rng(13);
    for s in [
        shape(DType::BF16, [1, 41, 2, 0], [1, 5], 16, 16, 2),
        shape(DType::F32, [1, 4, 2, 1], [1, 5], 16, 96, 2),
        // A chunk that does not fit shared memory.
        shape(DType::F32, [1, 2, 2, 1], [1, 2], 128, 160, 2),
    ] {
        rig.check(&check_grad(&mut rng, &s))?;
    }
    Ok(())
}

pub fn quick_hopper(rig: &Rig) -> Result<(), String> {
    let mut rng = Rng(14);
    attend(rig, Arch::Sm90a, &mut rng, &shape(DType::BF16, [1, 61, 2, 0], [1, 5], 64, 64, 2), true, "chunk_major")?;
    let s = shape(DType::BF16, [1, 41, 2, 0], [1, 8], 64, 64, 2);
    rig.check(&check_grad(&mut rng, &s).on(Arch::Sm90a)).map(|_| ())
}

pub fn quick_neighbours(rig: &Rig) -> Result<(), String> {
    use DType::{BF16, F16};
    let mut rng = Rng(19);
    for (s, below) in [
        (shape(BF16, [1, 61, 14, 0], [1, 16], 64, 64, 3), false),
        (shape(F16, [2, 37, 3, 1], [2, 8], 64, 64, 4), false),
        (shape(BF16, [1, 24, 2, 0], [1, 16], 64, 64, 2), true),
    ] {
        attend_alike(rig, &mut rng, &s, below, "shared_tiles")?;
    }
    Ok(())
}

pub fn quick_selection(rig: &Rig) -> Result<(), String> {
    use DType::{BF16, F16, F32};
    let mut rng = Rng(15);
    for c in [
        (BF16, [1, 40, 100, 1, 64], 1, 8, vec![80], Order::Recent, Weighting::StickBreaking),
        (F16, [1, 20, 260, 1, 80], 1, 16, vec![250], Order::Score, Weighting::Softmax),
        (F32, [2, 37, 9, 2, 16], 4, 3, vec![0, 20], Order::Recent, Weighting::Sigmoid),
    ] {
        let c = check_selection(&mut rng, c);
        for form in ["select_128", "split"] {
            rig.check(&c.clone().in_form(form))?;
        }
        // By warpgroups, where they make the products.
        rig.check(&c.on(Arch::Sm90a))?;
    }
    let c = (F32, [1, 3, 256, 1, 16], 1, 4, vec![250], Order::Recent, Weighting::StickBreaking);
    rig.check(&check_selection(&mut rng, c).in_pages(F32).in_parts(2).in_form("split")).map(drop)
}

pub fn quick_selection_grad(rig: &Rig) -> Result<(), String> {
    use DType::{BF16, F32};
    let mut rng = Rng(16);
    for (s, r, rule) in [
        (shape(F32, [1, 300, 3, 0], [1, 1], 16, 16, 2), 8, Weighting::StickBreaking),
        (shape(BF16, [1, 70, 40, 0], [1, 1], 16, 16, 8), 48, Weighting::Softmax),
        (shape(F32, [1, 20, 300, 0], [1, 1], 16, 16, 3), 8, Weighting::Sigmoid),
    ] {
        rig.check(&check_selection_grad(&mut rng, &s, r, rule))?;
    }
    Ok(())
}

pub fn quick_attention(rig: &Rig) -> Result<(), String> {
    let mut rng = Rng(17);
    check_attention(rig, &mut rng, DType::F16, [1, 130, 1, 1, 16], true, false)?;
    check_attention(rig, &mut rng, DType::BF16, [2, 7, 1, 2, 16], false, true)
}

/// Sizes that no tile takes: a warp per row.
fn any_size(rig: &Rig) -> Result<String, String> {
    use DType::{BF16, F16, F32};
    let mut rng = Rng(9);
    for s in [
        shape(F32, [2, 5, 3, 1], [2, 3], 7, 3, 4),
        shape(BF16, [1, 9, 4, 0], [1, 2], 40, 16, 2),
        shape(F16, [1, 3, 2, 2], [1, 1], 144, 1, 3),
    ] {
        attend(rig, Arch::Sm80, &mut rng, &s, s.n == 1, "any_size")?;
        rig.check(&check_grad(&mut rng, &s).in_form("any_size"))?;
    }
    for (dtype, sizes, causal) in [(F32, [2, 5, 2, 3, 7], true), (BF16, [1, 20, 1, 1, 40], false)] {
        check_attention(rig, &mut rng, dtype, sizes, causal, false)?;
    }
    for (window, local) in [(3, 0), (1, 0), (0, 4), (6, 5), (40, 0)] {
        let op = rambac_ir::ops::Attention { window, local, ..rambac_ir::ops::Attention::new(0.3, true) };
        check_attention_op(rig, &mut rng, F32, [2, 11, 2, 2, 8], op, false)?;
    }
    for case in [
        (F32, [2, 9, 7, 3, 5], 2, 3, vec![4, 9], Order::Recent, Weighting::StickBreaking),
        (BF16, [1, 4, 70, 1, 3], 1, 70, vec![66], Order::Score, Weighting::Softmax),
    ] {
        rig.check(&check_selection(&mut rng, case).in_form("any_size"))?;
    }
    for (s, r) in [
        (shape(F32, [2, 9, 5, 0], [3, 1], 16, 16, 4), 5),
        (shape(BF16, [1, 12, 3, 0], [1, 1], 16, 16, 2), 3),
        (shape(F32, [1, 3, 5, 0], [1, 1], 16, 16, 300), 4),
    ] {
        rig.check(&check_selection_grad(&mut rng, &s, r, Weighting::StickBreaking).in_form("any_size"))?;
    }
    Ok(String::new())
}
