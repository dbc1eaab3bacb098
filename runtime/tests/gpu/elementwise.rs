//! Maps, copies, products and reductions: single ops, and whole grown graphs.

use crate::harness::Case;
use crate::rig::{Check, Input, Rig};
use rambac_codegen::cuda::{Target, emit};
use rambac_codegen::{Kernels, lower_for};
use rambac_ir::interp::{Precision, outputs};
use rambac_ir::ops::*;
use rambac_ir::testing::Rng;
use rambac_ir::{Bindings, Builder, DType, Dim, HostArray, Ty};
use rambac_runtime::gpu::Bytes;
use std::collections::HashMap;

pub const ALL: &[Case] = &[
    ("map_functions", functions),
    ("map_types_and_rows", types_and_rows),
    ("map_broadcasts", broadcasts),
    ("map_integers", integers),
    ("moves", moves),
    ("rows_appended_to_a_memory", appended),
    ("reductions", reductions),
    ("products", products),
    ("many_tensors", many_tensors),
];

fn dims(n: usize, l: usize) -> Bindings {
    Bindings::new([("N", n), ("L", l)])
}

fn ty(d: DType, shape: &[Dim]) -> Ty {
    Ty::new(d, shape.iter().cloned())
}

fn sym(s: &str) -> Dim {
    Dim::sym(s)
}

/// Tensors of these sizes: `own` operands of each with these types, in one region with a scalar; all results in two types.
fn update(rng: &mut Rng, sizes: &[usize], types: &[DType]) -> Check {
    let d = Bindings::new([("N", 3), ("L", 5)]);
    let mut x = vec![];
    for &n in sizes {
        // A symbol decides the size of some.
        let shape = if n.is_multiple_of(15) { vec![sym("N"), sym("L"), Dim::int(n / 15)] } else { vec![Dim::int(n)] };
        x.extend(types.iter().map(|&t| Input::new(rng, ty(t, &shape), &d, -2.0, 2.0)));
    }
    x.push(Input::new(rng, ty(DType::F32, &[]), &d, 0.5, 1.5));
    let (own, s) = (types.len(), types.len() as u32);
    // v0·s + v1², for one operand v0·s + v0².
    let other = (own - 1) as u32;
    let inst = |f, args: &[u32]| MapInst { f, args: args.to_vec() };
    let body = vec![
        inst(MapFn::Binary(BinaryFn::Mul), &[0, s]),
        inst(MapFn::Unary(UnaryFn::Square), &[other]),
        inst(MapFn::Binary(BinaryFn::Add), &[s + 1, s + 2]),
    ];
    let (outs, dtypes) = (vec![own + 3, own + 1], vec![DType::F32, DType::BF16]);
    Check::new(MapEach { own, shared: 1, body, outs, dtypes }, x, &d, 5e-3)
}

fn norm_of(rng: &mut Rng, sizes: &[usize], t: DType) -> Check {
    let d = Bindings::default();
    let x = sizes.iter().map(|&n| Input::new(rng, ty(t, &[Dim::int(n)]), &d, -2.0, 2.0)).collect();
    Check::new(SumSquares {}, x, &d, if t == DType::F32 { 1e-6 } else { 4e-3 })
}

/// One region over many tensors, and the sum of all their squares: ends of tensors, empty ones, several blocks.
fn many_tensors(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(9);
    for sizes in [&[5000, 1, 0, 4096, 30, 4097, 0][..], &[8], &[3, 5, 7], &[8192, 16]] {
        for types in [&[DType::F32][..], &[DType::F32, DType::BF16], &[DType::F16, DType::F32, DType::F32]] {
            rig.check(&update(&mut rng, sizes, types))?;
        }
        for t in [DType::F32, DType::BF16] {
            rig.check(&norm_of(&mut rng, sizes, t))?;
        }
    }
    // More than a launch's arguments hold.
    let many: Vec<usize> = (0..1500).map(|i| i % 9).collect();
    let seen = rig.check(&norm_of(&mut rng, &many, DType::F32))?;
    let launches = seen.program.steps[0].forms[0].calls.len();
    if launches < 3 {
        return Err(format!("1500 tensors in {launches} launches"));
    }
    Ok(format!(", 1500 tensors in {launches} launches"))
}

/// For defects.
pub fn quick_each(rig: &Rig) -> Result<(), String> {
    let mut rng = Rng(9);
    rig.check(&update(&mut rng, &[4096, 4100, 9], &[DType::F32]))?;
    rig.check(&norm_of(&mut rng, &[4096, 4100, 9], DType::F32)).map(drop)
}

/// Every function of a map, over its domain.
fn functions(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(1);
    let d = dims(3, 37);
    let shape = [sym("N"), sym("L")];
    let mut worst = 0f64;
    for &f in UnaryFn::ALL {
        let positive = matches!(f, UnaryFn::Log | UnaryFn::Sqrt | UnaryFn::Rsqrt);
        let (lo, hi) = if positive { (0.01, 20.0) } else { (-20.0, 20.0) };
        let x = Input::new(&mut rng, ty(DType::F32, &shape), &d, lo, hi);
        let op = FusedMap {
            shape: shape.to_vec(),
            body: vec![MapInst { f: MapFn::Unary(f), args: vec![0] }],
            outs: vec![1],
            dtypes: vec![DType::F32],
        };
        worst = worst.max(rig.check(&Check::new(op, vec![x], &d, 1e-6))?.worst);
    }
    for &f in BinaryFn::ALL {
        let x = Input::new(&mut rng, ty(DType::F32, &shape), &d, -3.0, 3.0);
        let y = Input::new(&mut rng, ty(DType::F32, &shape), &d, 0.5, 3.0);
        let dtype = if f.is_comparison() { DType::Bool } else { DType::F32 };
        let op = FusedMap {
            shape: shape.to_vec(),
            body: vec![MapInst { f: MapFn::Binary(f), args: vec![0, 1] }],
            outs: vec![2],
            dtypes: vec![dtype],
        };
        rig.check(&Check::new(op, vec![x, y], &d, 1e-6))?;
    }
    Ok(format!(", worst {worst:.1e}"))
}

fn silu_gate(shape: &[Dim], dtype: DType) -> FusedMap {
    // v3 = silu(v0) · v1 + v2, and its square.
    let inst = |f, args: &[u32]| MapInst { f, args: args.to_vec() };
    FusedMap {
        shape: shape.to_vec(),
        body: vec![
            inst(MapFn::Unary(UnaryFn::Silu), &[0]),
            inst(MapFn::Binary(BinaryFn::Mul), &[3, 1]),
            inst(MapFn::Binary(BinaryFn::Add), &[4, 2]),
            inst(MapFn::Unary(UnaryFn::Square), &[5]),
        ],
        outs: vec![5, 6],
        dtypes: vec![dtype, DType::F32],
    }
}

/// bf16, f16 and f32; rows that are parts of wider ones; odd sizes.
fn types_and_rows(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(2);
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::BF16, 5e-3), (DType::F16, 6e-4)] {
        for (cols, l) in [(64, 5), (24, 33), (7, 19), (1, 1)] {
            for wide in [false, true] {
                let d = dims(2, l);
                let shape = [sym("N"), sym("L"), Dim::int(cols)];
                let mut x: Vec<Input> =
                    (0..3).map(|_| Input::new(&mut rng, ty(dtype, &shape), &d, -2.0, 2.0)).collect();
                if wide {
                    x[0].wide = Some(2);
                    x[2].wide = Some(2);
                }
                rig.check(&Check::new(silu_gate(&shape, dtype), x, &d, tolerance))?;
            }
        }
    }
    Ok(String::new())
}

/// Scalars, suffixes, prefixes, with integer and with symbolic sizes.
fn broadcasts(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(3);
    let d = dims(3, 21);
    for cols in [64, 5] {
        let shape = [sym("N"), sym("L"), Dim::int(cols)];
        let forms: [&[Dim]; 6] = [
            &[],
            &[Dim::int(cols)],
            &[sym("L"), Dim::int(cols)],
            &[sym("N"), sym("L"), Dim::int(1)],
            &[sym("N"), Dim::int(1), Dim::int(1)],
            &[Dim::int(1), Dim::int(1), Dim::int(cols)],
        ];
        for f in forms {
            let x = [&shape[..], f, f].map(|s| Input::new(&mut rng, ty(DType::F32, s), &d, -2.0, 2.0));
            rig.check(&Check::new(silu_gate(&shape, DType::F32), x.to_vec(), &d, 1e-6))?;
        }
    }
    Ok(String::new())
}

/// Integers keep all their bits.
fn integers(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(4);
    let d = dims(2, 31);
    let shape = [sym("N"), sym("L")];
    let big = |rng: &mut Rng| Input::new(rng, ty(DType::I32, &shape), &d, -1e9, 1e9);
    for f in [BinaryFn::Add, BinaryFn::Sub, BinaryFn::Max, BinaryFn::Min, BinaryFn::Lt, BinaryFn::Eq, BinaryFn::Ne] {
        let x = vec![big(&mut rng), big(&mut rng)];
        rig.check(&Check::new(Binary { f }, x, &d, 0.0))?;
    }
    let c = Input::new(&mut rng, ty(DType::Bool, &shape), &d, 0.0, 2.0);
    let x = vec![c, big(&mut rng), big(&mut rng)];
    rig.check(&Check::new(Where {}, x, &d, 0.0))?;
    for to in [DType::F32, DType::I32, DType::Bool] {
        let x = Input::new(&mut rng, ty(DType::F32, &shape), &d, -9.0, 9.0);
        rig.check(&Check::new(Cast { to }, vec![x], &d, 0.0))?;
        let x = Input::new(&mut rng, ty(DType::I32, &shape), &d, -9.0, 9.0);
        rig.check(&Check::new(Cast { to }, vec![x], &d, 0.0))?;
    }
    for (value, dtype) in
        [(0.5, DType::F32), (-100.0, DType::I32), (16_777_217.0, DType::I32), (1.0, DType::Bool), (0.25, DType::BF16)]
    {
        rig.check(&Check::new(Constant { value, ty: ty(dtype, &shape) }, vec![], &d, 0.0))?;
    }
    rig.check(&Check::new(Iota { axis: 1, ty: ty(DType::I32, &shape) }, vec![], &d, 0.0))?;
    Ok(String::new())
}

fn moves(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(5);
    let d = dims(3, 10);
    for dtype in [DType::F32, DType::BF16, DType::I32, DType::Bool] {
        let mut x = |shape: &[Dim]| Input::new(&mut rng, ty(dtype, shape), &d, 0.0, 9.0);
        let cube = [sym("N"), sym("L"), Dim::int(6)];
        let to = vec![sym("N"), sym("L"), Dim::int(6)];
        let middle = x(&[sym("N"), Dim::int(1), Dim::int(6)]);
        rig.check(&Check::new(Broadcast { shape: to.clone() }, vec![middle], &d, 0.0))?;
        let last = x(&[Dim::int(6)]);
        rig.check(&Check::new(Broadcast { shape: to }, vec![last], &d, 0.0))?;
        let a = x(&cube);
        rig.check(&Check::new(Transpose { perm: vec![2, 0, 1] }, vec![a], &d, 0.0))?;
        let a = x(&cube);
        rig.check(&Check::new(Pad { axis: 2, before: 2, after: 3 }, vec![a], &d, 0.0))?;
        let a = x(&cube).wide(2);
        rig.check(&Check::new(Reshape { shape: vec![sym("N"), Dim::int(6), sym("L")] }, vec![a], &d, 0.0))?;
    }
    Ok(String::new())
}

/// Rows behind what a memory holds; sizes are sequences, room, rows, width; sequences hold different numbers.
fn check_append(rig: &Rig, rng: &mut Rng, dtype: DType, sizes: [usize; 4], first: i32) -> Result<(), String> {
    let [n, t, l, width] = sizes;
    let d = Bindings::new([("N", n), ("T", t), ("L", l)]);
    let rows = |axis: &str| ty(dtype, &[sym("N"), sym(axis), Dim::int(2), Dim::int(width)]);
    let memory = Input::new(rng, rows("T"), &d, -1.0, 1.0);
    let new = Input::new(rng, rows("L"), &d, -1.0, 1.0);
    let start = HostArray::i32(&[n], (0..n as i32).map(|i| first + 2 * i).collect());
    let start = Input::of(ty(DType::I32, &[sym("N")]), start);
    let check = Check::new(Append {}, vec![memory, new, start], &d, 0.0);
    rig.check(&check)?;
    in_place(rig, &check)
}

/// The same where the memory is kept: it is written where it lies, and what was there stays.
fn in_place(rig: &Rig, c: &Check) -> Result<(), String> {
    let mut b = Builder::new("kept", &["N", "T", "L"]);
    let memory = b.state("memory", c.inputs[0].ty.clone());
    let (rows, start) = (b.input("rows", c.inputs[1].ty.clone()), b.input("start", c.inputs[2].ty.clone()));
    let all = b.push(Append {}, &[memory, rows, start]);
    b.output("memory", all);
    // What reads the memory then sees the rows.
    let sum = b.sum(all, vec![1], false);
    b.output("sum", sum);
    let g = b.finish().map_err(|e| e.to_string())?;
    let program = emit(lower_for(&g, Kernels::Gpu), Target::of(c.arch)).map_err(|e| e.to_string())?;
    let steps: Vec<&str> = program.program.steps.iter().map(|s| s.op.mnemonic()).collect();
    if steps != ["append", "reduce"] {
        return Err(format!("a kept memory is copied: {steps:?}"));
    }
    let bytes = |i: usize| Bytes::from_host(&c.inputs[i].value);
    let inputs = [("rows".to_string(), bytes(1)), ("start".to_string(), bytes(2))];
    let (.., out, _) = rig.run(program, &c.dims, &[("memory".to_string(), bytes(0))], &inputs)?;
    let given: HashMap<String, HostArray> =
        ["memory", "rows", "start"].into_iter().zip(&c.inputs).map(|(n, x)| (n.into(), x.value.clone())).collect();
    let want = outputs(&g, &c.dims, &given, Precision::Typed).map_err(|e| e.to_string())?;
    let sum = want.iter().find(|(n, _)| n == "sum").map(|(_, v)| v).ok_or("the sum is lost")?;
    let got = out.last().ok_or("nothing came out")?;
    let off = (0..sum.len()).map(|i| (got.get(i) - sum.get(i)).abs()).fold(0.0, f64::max);
    let allowed = if sum.dtype == DType::F32 { 1e-5 } else { 0.1 };
    if off <= allowed { Ok(()) } else { Err(format!("a kept memory is off by {off:.1e}")) }
}

/// What finds defects of `append_rows`.
pub fn quick_append(rig: &Rig) -> Result<(), String> {
    check_append(rig, &mut Rng(8), DType::F32, [2, 9, 3, 4], 1)?;
    // The last rows have no room.
    check_append(rig, &mut Rng(8), DType::F32, [2, 9, 3, 4], 6)
}

/// One row, many, all; a memory that is full before they are in.
fn appended(rig: &Rig) -> Result<String, String> {
    quick_append(rig)?;
    let mut rng = Rng(9);
    for dtype in [DType::F32, DType::BF16] {
        for (sizes, first) in
            [([3, 40, 1, 16], 0), ([1, 300, 17, 5], 200), ([2, 8, 8, 1], 0), ([3, 10, 4, 8], 5), ([1, 6, 0, 4], 2)]
        {
            check_append(rig, &mut rng, dtype, sizes, first)?;
        }
    }
    Ok(String::new())
}

fn reductions(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(6);
    for (n, l) in [(2, 5), (1, 1), (3, 700), (1, 9000)] {
        let d = dims(n, l);
        let shape = [sym("N"), sym("L"), Dim::int(3)];
        for f in [ReduceFn::Sum, ReduceFn::Max] {
            for axes in [vec![0, 1], vec![0, 1, 2], vec![1], vec![2], vec![1, 2]] {
                let x = Input::new(&mut rng, ty(DType::F32, &shape), &d, -1.0, 3.0);
                rig.check(&Check::new(Reduce { f, axes, keep: false }, vec![x], &d, 2e-6))?;
            }
        }
    }
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::BF16, 8e-3)] {
        for (chunk, width) in [(16, 64), (5, 3), (1, 8)] {
            let d = Bindings::new([("N", 2), ("C", 7)]);
            let t = sym("C").checked_mul(&Dim::int(chunk)).expect("small sizes multiply");
            let x = Input::new(&mut rng, ty(dtype, &[sym("N"), t, Dim::int(width)]), &d, -1.0, 3.0);
            for mode in [Summary::Mean, Summary::Max, Summary::Min] {
                rig.check(&Check::new(Summarise { chunk, mode }, vec![x.clone()], &d, tolerance))?;
            }
        }
    }
    Ok(String::new())
}

fn products(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(7);
    let d = dims(2, 13);
    let (n, l) = (sym("N"), sym("L"));
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::BF16, 4e-3)] {
        let mut x = |shape: &[Dim]| Input::new(&mut rng, ty(dtype, shape), &d, -1.0, 1.0);
        // A linear layer on a part of wider rows, its gradients, and a batch.
        let a = x(&[n.clone(), l.clone(), Dim::int(20)]).wide(2);
        let w = x(&[Dim::int(9), Dim::int(20)]);
        rig.check(&Check::new(MatMul { trans_a: false, trans_b: true }, vec![a, w], &d, tolerance))?;
        let (a, b) = (x(&[l.clone(), Dim::int(20)]), x(&[l.clone(), Dim::int(9)]));
        rig.check(&Check::new(MatMul { trans_a: true, trans_b: false }, vec![a, b], &d, tolerance))?;
        let (a, b) = (x(&[n.clone(), l.clone(), Dim::int(5)]), x(&[n.clone(), l.clone(), Dim::int(5)]));
        rig.check(&Check::new(MatMul { trans_a: false, trans_b: true }, vec![a, b], &d, tolerance))?;
    }
    Ok(String::new())
}
