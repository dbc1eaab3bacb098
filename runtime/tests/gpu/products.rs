//! Products of a few rows, and the norms that they take in.

use crate::harness::Case;
use crate::rig::{Rig, near, random};
use rambac_codegen::cuda::{Arch, Target, emit};
use rambac_codegen::{Kernels, lower_for};
use rambac_ir::interp::{self, Precision};
use rambac_ir::ops::*;
use rambac_ir::testing::Rng;
use rambac_ir::{Bindings, Builder, DType, Dim, HostArray, Ty};
use rambac_runtime::gpu::Bytes;
use std::collections::HashMap;

pub const ALL: &[Case] = &[("products_of_few_rows", few_rows), ("products_of_drawn_shapes", drawn)];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Norm {
    None,
    Plain,
    Gated,
}

/// `y = norm(x)·wᵀ`, and with `two` another product of the same row that is added to something.
#[derive(Clone, Copy, Debug)]
struct Shape {
    dtype: DType,
    /// Of the weights.
    stored: DType,
    rows: [usize; 2],
    k: usize,
    n: usize,
    norm: Norm,
    two: bool,
}

/// Runs it, and says which forms were taken and how many bytes were moved of the least.
fn check(rig: &Rig, rng: &mut Rng, s: &Shape) -> Result<(Vec<&'static str>, f64), String> {
    let dims = Bindings::new([("N", s.rows[0]), ("L", s.rows[1])]);
    let mut b = Builder::new("product", &["N", "L"]);
    let mut given: HashMap<String, HostArray> = HashMap::new();
    let rows = |cols: usize| Ty::new(s.dtype, [Dim::sym("N"), Dim::sym("L"), Dim::int(cols)]);
    let mut input = |b: &mut Builder, name: &str, ty: Ty| {
        given.insert(name.into(), random(rng, &ty, &dims, -1.0, 1.0));
        b.input(name, ty)
    };
    // Wide rows: x is a part of them.
    let wide = input(&mut b, "x", rows(s.k + 16));
    let mut x = b.slice(wide, 2, 8, 8 + s.k);
    let norm = Ty::new(s.dtype, [Dim::int(s.k)]);
    match s.norm {
        Norm::None => {}
        Norm::Plain => {
            let g = input(&mut b, "g", norm);
            x = b.push(RmsNorm { eps: 0.1 }, &[x, g]);
        }
        Norm::Gated => {
            let (z, g) = (input(&mut b, "z", rows(s.k)), input(&mut b, "g", norm));
            x = b.push(GatedRmsNorm { eps: 0.1 }, &[x, z, g]);
        }
    }
    for i in 0..1 + usize::from(s.two) {
        let w = input(&mut b, ["w", "w1"][i], Ty::new(s.stored, [Dim::int(s.n), Dim::int(s.k)]));
        let w = if s.stored == s.dtype { w } else { b.cast(w, s.dtype) };
        let y = b.push(MatMul { trans_a: false, trans_b: true }, &[x, w]);
        b.output(["y", "y1"][i], y);
    }
    let graph = b.finish().map_err(|e| format!("{e:?}"))?;
    let want = interp::outputs(&graph, &dims, &given, Precision::Exact).map_err(|e| e.to_string())?;
    let program = emit(lower_for(&graph, Kernels::Gpu), Target::of(Arch::Sm80)).map_err(|e| e.to_string())?;
    let inputs: Vec<(String, Bytes)> = given.iter().map(|(n, a)| (n.clone(), Bytes::from_host(a))).collect();
    let (program, _, got, counts) = rig.run(program, &dims, &[], &inputs).map_err(|e| format!("{e}\n  {s:?}"))?;
    let tolerance = if s.dtype == DType::F32 { 2e-6 } else { 8e-3 };
    near(&want, &got, tolerance).map_err(|e| format!("{e}\n  {s:?}"))?;
    let forms = program.forms(&dims).map_err(|e| e.to_string())?.iter().map(|f| f.name).collect();
    let traffic = counts.iter().flat_map(|c| c.buffers.iter().map(|b| &b.1));
    let moved: u64 = traffic.map(|t| 32 * (t.read_sectors + t.write_sectors)).sum();
    Ok((forms, moved as f64 / (s.n * s.k * s.stored.size()) as f64))
}

const SHAPE: Shape =
    Shape { dtype: DType::F32, stored: DType::BF16, rows: [1, 1], k: 256, n: 30, norm: Norm::Plain, two: false };

/// What finds defects of the template.
pub fn quick(rig: &Rig) -> Result<(), String> {
    let mut rng = Rng(31);
    for norm in [Norm::Plain, Norm::Gated] {
        check(rig, &mut rng, &Shape { rows: [3, 1], norm, k: 520, ..SHAPE })?;
    }
    Ok(())
}

fn few_rows(rig: &Rig) -> Result<String, String> {
    quick(rig)?;
    let mut rng = Rng(32);
    use DType::{BF16, F16, F32};
    for (s, want) in [
        (SHAPE, &["within", "few_rows"][..]),
        (Shape { norm: Norm::Gated, stored: F32, two: true, ..SHAPE }, &["within", "few_rows", "few_rows"]),
        (Shape { norm: Norm::None, rows: [2, 4], ..SHAPE }, &["few_rows"]),
        (Shape { dtype: BF16, rows: [8, 1], ..SHAPE }, &["within", "few_rows"]),
        (Shape { dtype: F16, stored: F16, k: 24, n: 3, ..SHAPE }, &["within", "few_rows"]),
        // More rows: the norm runs, and the library.
        (Shape { rows: [3, 3], ..SHAPE }, &["rms_norm", "gemm"]),
    ] {
        let (forms, _) = check(rig, &mut rng, &s)?;
        let ran: Vec<&str> = forms.into_iter().filter(|f| !f.starts_with("copy") && *f != "map").collect();
        if ran != want {
            return Err(format!("{s:?} ran as {ran:?}, {want:?} wanted"));
        }
    }
    // A product of the 370M model, a part of its rows.
    let (_, ratio) = check(rig, &mut rng, &Shape { k: 2048, n: 64, norm: Norm::Gated, ..SHAPE })?;
    Ok(format!(": {ratio:.2} of the weights' bytes"))
}

fn drawn(rig: &Rig) -> Result<String, String> {
    const SHAPES: usize = 12;
    let mut rng = Rng(33);
    for _ in 0..SHAPES {
        let (dtype, stored) =
            rng.pick(&[(DType::F32, DType::F32), (DType::F32, DType::BF16), (DType::BF16, DType::BF16)]);
        let norm = rng.pick(&[Norm::None, Norm::Plain, Norm::Gated]);
        let rows = [1 + rng.below(3), 1 + rng.below(4)];
        let (k, n) = (1 + rng.below(600), 1 + rng.below(40));
        let two = rng.below(2) == 1;
        check(rig, &mut rng, &Shape { dtype, stored, rows, k, n, norm, two })?;
    }
    Ok(format!(": {SHAPES} shapes"))
}
