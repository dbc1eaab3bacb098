//! Every arithmetic instruction against results from elsewhere: exact arithmetic in wider types, the `half` crate, tables
//! of the PTX ISA.  A kernel of one instruction runs over edge cases and random operands.

use half::{bf16, f16};
use rambac_simulator::device::{Arg, Code, Device, Extent, Simulator};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Register class of a suffix: (letter for declarations, bytes).
fn class(ty: &str) -> (&'static str, usize) {
    match ty {
        "pred" => ("pred", 4),
        "u8" | "s8" | "u16" | "s16" | "b16" | "f16" | "bf16" => ("b16", 2),
        "u64" | "s64" | "b64" => ("b64", 8),
        "f32" => ("f32", 4),
        "f64" => ("f64", 8),
        _ => ("b32", 4),
    }
}

/// A kernel: out[i] = op(a[i], b[i], c[i]); operands lie 8 bytes apart.
fn kernel(body: &str, out: &str, ins: &[&str]) -> String {
    let mut s = String::from(
        ".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry k(.param .u64 o, .param .u64 a, .param .u64 b, .param .u64 c) {\n\
         .reg .b64 %rd<20>;\n.reg .b32 %t<4>;\n.reg .pred %p<4>;\n",
    );
    for (i, ty) in ins.iter().enumerate() {
        s += &format!(".reg .{} %i{i};\n", class(ty).0);
    }
    s += &format!(".reg .{} %o;\n", class(out).0);
    s += "mov.u32 %t0, %tid.x;\nmov.u32 %t1, %ctaid.x;\nmad.lo.u32 %t2, %t1, 128, %t0;\nmul.wide.u32 %rd0, %t2, 8;\n";
    for (i, ty) in ins.iter().enumerate() {
        let p = ["a", "b", "c"][i];
        s += &format!("ld.param.u64 %rd{0}, [{p}];\nadd.u64 %rd{0}, %rd{0}, %rd0;\n", i + 1);
        s += &format!("ld.global.{} %i{i}, [%rd{}];\n", class(ty).0, i + 1);
    }
    s += "ld.param.u64 %rd10, [o];\nadd.u64 %rd10, %rd10, %rd0;\nmov.b64 %rd11, 0;\nst.global.b64 [%rd10], %rd11;\n";
    s += body;
    s += "\n";
    if out == "pred" {
        s += "selp.b32 %t3, 1, 0, %o;\nst.global.b32 [%rd10], %t3;\nret;\n}\n";
    } else {
        s += &format!("st.global.{} [%rd10], %o;\nret;\n}}\n", class(out).0);
    }
    s
}

type Triple = [u64; 3];

fn run(ptx: &str, inputs: &[Triple]) -> Vec<u64> {
    let mut sim = Simulator::default();
    let m = sim.load(&Code::ptx(ptx)).unwrap_or_else(|e| panic!("{e}\n{ptx}"));
    let n = inputs.len().next_multiple_of(128);
    let mut bufs = vec![sim.alloc("out", 8 * n).unwrap()];
    for k in 0..3 {
        let b = sim.alloc("in", 8 * n).unwrap();
        let bytes: Vec<u8> = (0..n).flat_map(|i| inputs.get(i).map_or(0, |t| t[k]).to_le_bytes()).collect();
        sim.copy_in(b, 0, &bytes).unwrap();
        bufs.push(b);
    }
    let args: Vec<Arg> = bufs.iter().map(|&b| b.into()).collect();
    sim.launch(m, "k", Extent::line((n / 128) as u32, 128), &args).unwrap_or_else(|e| panic!("{e}\n{ptx}"));
    assert!(sim.take_findings().is_empty(), "{ptx}");
    let mut out = vec![0; 8 * n];
    sim.copy_out(bufs[0], 0, &mut out).unwrap();
    out.chunks_exact(8).take(inputs.len()).map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Operands of a type: edges, then random ones.
fn values(ty: &str, n: usize, seed: u64) -> Vec<u64> {
    let mut r = ChaCha8Rng::seed_from_u64(seed);
    let bits = 8 * class(ty).1 as u32;
    let f = |v: f32| u64::from(v.to_bits());
    let edges: Vec<u64> = match ty {
        "f32" => [
            0.0,
            -0.0,
            1.0,
            -1.0,
            0.5,
            2.5,
            -3.5,
            1e-40,
            -1e-45,
            f32::MAX,
            f32::MIN_POSITIVE,
            f32::INFINITY,
            -f32::INFINITY,
            f32::NAN,
            1e30,
            -7e-30,
            16777217.0,
            0.1,
        ]
        .map(f)
        .to_vec(),
        "f64" => {
            [0.0, -0.0, 1.0, -1.5, 1e-310, f64::MAX, f64::INFINITY, f64::NAN, 0.1, 3e200].map(f64::to_bits).to_vec()
        }
        "f16" | "bf16" | "f16x2" | "bf16x2" => {
            vec![0, 0x8000, 0x3c00, 0x3f80, 0x7bff, 0x7c00, 0x7f80, 0xff80, 1, 0x8001, 0x7fff, 0x4248]
        }
        _ => vec![
            0,
            1,
            2,
            31,
            32,
            33,
            63,
            64,
            255,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            0x7fff_ffff_ffff_ffff,
            1 << 63,
            u64::MAX,
            0x0123_4567_89ab_cdef,
        ],
    };
    let mask = if bits >= 64 { u64::MAX } else { (1 << bits) - 1 };
    (0..n)
        .map(|i| {
            if i < edges.len() {
                return edges[i] & mask;
            }
            match (ty, i % 3) {
                ("f32", 0) => f(r.random_range(-10.0..10.0)),
                ("f32", 1) => f(r.random_range(-1e6..1e6)),
                ("f64", 0 | 1) => r.random_range(-1e3..1e3f64).to_bits(),
                _ => r.random::<u64>() & mask,
            }
        })
        .collect()
}

/// All pairs of the first operands' edges, and random triples.
fn triples(ins: &[&str]) -> Vec<Triple> {
    let cols: Vec<Vec<u64>> = (0..3).map(|k| values(ins.get(k).copied().unwrap_or("b32"), 60, k as u64 + 1)).collect();
    let mut all = vec![];
    for i in 0..60 {
        for j in 0..60 {
            all.push([cols[0][i], cols[1][j], cols[2][(i * 7 + j * 3) % 60]]);
        }
    }
    all
}

fn check(op: &str, out: &str, ins: &[&str], want: impl Fn(Triple) -> u64) {
    let names: Vec<String> = (0..ins.len()).map(|i| format!("%i{i}")).collect();
    check_body(&format!("{op} %o, {};", names.join(", ")), out, ins, want);
}

fn check_body(body: &str, out: &str, ins: &[&str], want: impl Fn(Triple) -> u64) {
    let all = triples(ins);
    let got = run(&kernel(body, out, ins), &all);
    for (t, g) in all.iter().zip(got) {
        let w = want(*t);
        assert_eq!(g, w, "{body}: {t:x?} gives {g:#x}, {w:#x} is right");
    }
}

fn f(x: u64) -> f32 {
    f32::from_bits(x as u32)
}
fn d(x: u64) -> f64 {
    f64::from_bits(x)
}
fn pf(x: f32) -> u64 {
    if x.is_nan() { 0x7fff_ffff } else { u64::from(x.to_bits()) }
}
fn pd(x: f64) -> u64 {
    if x.is_nan() { 0x7ff8 << 48 } else { x.to_bits() }
}
fn h(x: u64) -> f64 {
    f16::from_bits(x as u16).to_f64()
}
fn ph(x: f64) -> u64 {
    if x.is_nan() { 0x7fff } else { u64::from(f16::from_f64(x).to_bits()) }
}
fn bf(x: u64) -> f64 {
    bf16::from_bits(x as u16).to_f64()
}
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

#[test]
fn integers() {
    type Op = (&'static str, fn(i128, i128) -> i128);
    let ops: &[Op] = &[
        ("add", |a, b| a + b),
        ("sub", |a, b| a - b),
        ("mul.lo", |a, b| a.wrapping_mul(b)),
        ("min", |a, b| a.min(b)),
        ("max", |a, b| a.max(b)),
    ];
    for ty in ["u16", "s16", "u32", "s32", "u64", "s64"] {
        let bits = 8 * class(ty).1 as u32;
        let mask = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
        let signed = ty.starts_with('s');
        let wide = move |x: u64| {
            if signed { i128::from(((x << (64 - bits)) as i64) >> (64 - bits)) } else { i128::from(x & mask) }
        };
        for (name, f) in ops {
            check(&format!("{name}.{ty}"), ty, &[ty, ty], |t| f(wide(t[0]), wide(t[1])) as u64 & mask);
        }
        if bits < 64 || signed {
            check(&format!("mul.hi.{ty}"), ty, &[ty, ty], |t| {
                (wide(t[0]).wrapping_mul(wide(t[1])) >> bits) as u64 & mask
            });
        }
        check(&format!("mad.lo.{ty}"), ty, &[ty, ty, ty], |t| {
            (wide(t[0]).wrapping_mul(wide(t[1])).wrapping_add(wide(t[2]))) as u64 & mask
        });
        check_body(&format!("or.b{bits} %i1, %i1, 1; div.{ty} %o, %i0, %i1;"), ty, &[ty, ty], |t| {
            (wide(t[0]) / wide(t[1] | 1)) as u64 & mask
        });
        check_body(&format!("or.b{bits} %i1, %i1, 1; rem.{ty} %o, %i0, %i1;"), ty, &[ty, ty], |t| {
            (wide(t[0]) % wide(t[1] | 1)) as u64 & mask
        });
        check(&format!("shr.{ty}"), ty, &[ty, "u32"], |t| (wide(t[0]) >> (t[1] as u32).min(bits)) as u64 & mask);
        check(&format!("shl.b{bits}"), ty, &[ty, "u32"], |t| ((wide(t[0]) << (t[1] as u32).min(bits)) as u64) & mask);
        for (cmp, f) in [
            ("eq", i128::eq as fn(&i128, &i128) -> bool),
            ("ne", i128::ne),
            ("lt", i128::lt),
            ("le", i128::le),
            ("gt", i128::gt),
            ("ge", i128::ge),
        ] {
            check(&format!("setp.{cmp}.{ty}"), "pred", &[ty, ty], |t| u64::from(f(&wide(t[0]), &wide(t[1]))));
        }
    }
    check("mul.wide.s32", "s64", &["s32", "s32"], |t| (i64::from(t[0] as i32) * i64::from(t[1] as i32)) as u64);
    check("mul.wide.u32", "u64", &["u32", "u32"], |t| (t[0] & 0xffff_ffff) * (t[1] & 0xffff_ffff));
    check("mul.wide.u16", "u32", &["u16", "u16"], |t| (t[0] & 0xffff) * (t[1] & 0xffff));
    check("mad.wide.s32", "s64", &["s32", "s32", "s64"], |t| {
        (i64::from(t[0] as i32) * i64::from(t[1] as i32)).wrapping_add(t[2] as i64) as u64
    });
    check("add.sat.s32", "s32", &["s32", "s32"], |t| {
        (i64::from(t[0] as i32) + i64::from(t[1] as i32)).clamp(-(1 << 31), (1 << 31) - 1) as u32 as u64
    });
    check("sad.s32", "s32", &["s32", "s32", "s32"], |t| {
        (t[0] as i32).abs_diff(t[1] as i32).wrapping_add(t[2] as u32).into()
    });
    check("abs.s32", "s32", &["s32"], |t| (t[0] as i32).unsigned_abs().into());
    check("neg.s64", "s64", &["s64"], |t| t[0].wrapping_neg());
    check("slct.b32.s32", "b32", &["b32", "b32", "s32"], |t| if t[2] as i32 >= 0 { t[0] } else { t[1] });
    check("dp4a.s32.s32", "s32", &["s32", "s32", "s32"], |t| {
        let b = |x: u64, i: u32| i64::from((x >> (8 * i)) as i8);
        ((0..4).map(|i| b(t[0], i) * b(t[1], i)).sum::<i64>() + i64::from(t[2] as i32)) as u32 as u64
    });
    check_body("add.cc.u32 %o, %i0, %i1; addc.u32 %o, 0, 0;", "u32", &["u32", "u32"], |t| (t[0] + t[1]) >> 32);
    check_body("sub.cc.u64 %o, %i0, %i1; subc.u64 %o, 5, 0;", "u64", &["u64", "u64"], |t| 5 - u64::from(t[0] < t[1]));
}

#[test]
fn bits() {
    check("popc.b32", "u32", &["b32"], |t| t[0].count_ones().into());
    check("popc.b64", "u32", &["b64"], |t| t[0].count_ones().into());
    check("clz.b32", "u32", &["b32"], |t| (t[0] as u32).leading_zeros().into());
    check("clz.b64", "u32", &["b64"], |t| t[0].leading_zeros().into());
    check("brev.b32", "b32", &["b32"], |t| (t[0] as u32).reverse_bits().into());
    check("brev.b64", "b64", &["b64"], |t| t[0].reverse_bits());
    check("not.b16", "b16", &["b16"], |t| !t[0] & 0xffff);
    check("cnot.b32", "b32", &["b32"], |t| u64::from(t[0] == 0));
    // PTX ISA: the position of the highest bit that differs from the sign.
    check("bfind.s32", "u32", &["s32"], |t| {
        let v = t[0] as u32;
        let x = if v >> 31 == 1 { !v } else { v };
        (0..32).rev().find(|&i| x >> i & 1 == 1).map_or(0xffff_ffff, |i| i as u64)
    });
    // The pseudo code of the PTX ISA.
    for (ty, bits) in [("u32", 32u64), ("s32", 32), ("u64", 64), ("s64", 64)] {
        check(&format!("bfe.{ty}"), ty, &[ty, "u32", "u32"], |t| {
            let (a, pos, len) = (t[0], t[1] & 0xff, t[2] & 0xff);
            let msb = bits - 1;
            let sbit = if ty.starts_with('u') || len == 0 { 0 } else { a >> (pos + len - 1).min(msb) & 1 };
            (0..bits).fold(0, |d, i| {
                let b = if i < len && pos + i <= msb { a >> (pos + i) & 1 } else { sbit };
                d | b << i
            })
        });
    }
    check_body("bfi.b32 %o, %i0, %i1, %i2, 9;", "b32", &["b32", "b32", "b32"], |t| {
        let pos = t[2] & 0xff;
        (0..9).fold(t[1], |f, i| if pos + i < 32 { f & !(1 << (pos + i)) | (t[0] >> i & 1) << (pos + i) } else { f })
    });
    for table in [0x00u8, 0x80, 0xea, 0x96, 0x1b, 0xff, 0x3c] {
        check_body(&format!("lop3.b32 %o, %i0, %i1, %i2, {table};"), "b32", &["b32", "b32", "b32"], |t| {
            (0..32).fold(0, |d, i| {
                let k = (t[0] >> i & 1) << 2 | (t[1] >> i & 1) << 1 | t[2] >> i & 1;
                d | u64::from(table >> k & 1) << i
            })
        });
    }
    let both = |t: Triple| t[1] << 32 | t[0] & 0xffff_ffff;
    check("shf.l.wrap.b32", "b32", &["b32", "b32", "u32"], |t| (both(t) << (t[2] & 31)) >> 32);
    check("shf.r.wrap.b32", "b32", &["b32", "b32", "u32"], |t| both(t) >> (t[2] & 31) & 0xffff_ffff);
    check("shf.l.clamp.b32", "b32", &["b32", "b32", "u32"], |t| {
        (u128::from(both(t)) << t[2].min(32) >> 32) as u64 & 0xffff_ffff
    });
    check("shf.r.clamp.b32", "b32", &["b32", "b32", "u32"], |t| both(t) >> t[2].min(32) & 0xffff_ffff);
    check("prmt.b32", "b32", &["b32", "b32", "b32"], |t| {
        (0..4).fold(0, |d, i| {
            let s = t[2] >> (4 * i) & 15;
            let byte = both(t) >> (8 * (s & 7)) & 0xff;
            d | (if s < 8 { byte } else { 0xff * (byte >> 7) }) << (8 * i)
        })
    });
    // Tables of the PTX ISA: bytes chosen for selectors 0 to 3, highest first.
    for (mode, rows) in [
        ("f4e", ["3210", "4321", "5432", "6543"]),
        ("b4e", ["5670", "6701", "7012", "0123"]),
        ("rc8", ["0000", "1111", "2222", "3333"]),
        ("ecl", ["3210", "3211", "3222", "3333"]),
        ("ecr", ["0000", "1110", "2210", "3210"]),
        ("rc16", ["1010", "3232", "1010", "3232"]),
    ] {
        check(&format!("prmt.b32.{mode}"), "b32", &["b32", "b32", "b32"], |t| {
            rows[t[2] as usize & 3].bytes().fold(0, |d, c| d << 8 | both(t) >> (8 * (c - b'0')) & 0xff)
        });
    }
}

/// The f32 that rounding gives, found from its neighbours: `exact` compares a candidate with the exact result.
fn directed(near: f32, mode: &str, exact: impl Fn(f32) -> std::cmp::Ordering) -> f32 {
    use std::cmp::Ordering::*;
    if near.is_nan() {
        return near;
    }
    // Orders are those of the exact result against the candidate.
    let below = |x: f32| if exact(x) == Less { x.next_down() } else { x };
    let above = |x: f32| if exact(x) == Greater { x.next_up() } else { x };
    match mode {
        "rm" => below(near),
        "rp" => above(near),
        _ if near > 0.0 => below(near),
        _ => above(near),
    }
}

#[test]
fn floats() {
    check("add.f32", "f32", &["f32", "f32"], |t| pf(f(t[0]) + f(t[1])));
    check("sub.rn.f32", "f32", &["f32", "f32"], |t| pf(f(t[0]) - f(t[1])));
    check("mul.f32", "f32", &["f32", "f32"], |t| pf(f(t[0]) * f(t[1])));
    check("div.rn.f32", "f32", &["f32", "f32"], |t| pf(f(t[0]) / f(t[1])));
    check("fma.rn.f32", "f32", &["f32", "f32", "f32"], |t| pf(f(t[0]).mul_add(f(t[1]), f(t[2]))));
    check("add.ftz.f32", "f32", &["f32", "f32"], |t| pf(flush(flush(f(t[0])) + flush(f(t[1])))));
    check("mul.ftz.sat.f32", "f32", &["f32", "f32"], |t| {
        let r = flush(flush(f(t[0])) * flush(f(t[1])));
        pf(if r.is_nan() || r <= 0.0 { 0.0 } else { r.min(1.0) })
    });
    check("add.sat.f32", "f32", &["f32", "f32"], |t| {
        let r = f(t[0]) + f(t[1]);
        pf(if r.is_nan() || r <= 0.0 { 0.0 } else { r.min(1.0) })
    });
    check("sqrt.rn.f32", "f32", &["f32"], |t| pf(f(t[0]).sqrt()));
    check("rcp.rn.f32", "f32", &["f32"], |t| pf(1.0 / f(t[0])));
    check("neg.f32", "f32", &["f32"], |t| pf(-f(t[0])));
    check("abs.f32", "f32", &["f32"], |t| pf(f(t[0]).abs()));
    // minimum and maximum: a NaN gives way, -0 is below +0.
    let lower = |a: f32, b: f32| {
        if b.is_nan() || (!a.is_nan() && a.total_cmp(&b).is_lt()) { a } else { b }
    };
    check("min.f32", "f32", &["f32", "f32"], |t| pf(lower(f(t[0]), f(t[1]))));
    check("max.f32", "f32", &["f32", "f32"], |t| pf(-lower(-f(t[0]), -f(t[1]))));
    check("max.NaN.f32", "f32", &["f32", "f32"], |t| {
        let (a, b) = (f(t[0]), f(t[1]));
        if a.is_nan() || b.is_nan() { 0x7fff_ffff } else { pf(-lower(-a, -b)) }
    });
    for (ops, exact) in [("add", (|a, b| a + b) as fn(f64, f64) -> f64), ("mul", |a, b| a * b)] {
        for mode in ["rz", "rm", "rp"] {
            // Sums and products of such operands are exact in f64.
            let body = format!("{ops}.{mode}.f32 %o, %i0, %i1;");
            let mut r = ChaCha8Rng::seed_from_u64(5);
            let all: Vec<Triple> =
                (0..2000).map(|_| [pf(r.random_range(-900.0..900.0)), pf(r.random_range(-3.0..3.0)), 0]).collect();
            for (t, g) in all.iter().zip(run(&kernel(&body, "f32", &["f32", "f32"]), &all)) {
                let e = exact(f64::from(f(t[0])), f64::from(f(t[1])));
                let w = directed(e as f32, mode, |c| e.partial_cmp(&f64::from(c)).unwrap());
                assert_eq!(f(g), w, "{body} {} {}", f(t[0]), f(t[1]));
            }
        }
    }
    for mode in ["rz", "rm", "rp"] {
        let mut r = ChaCha8Rng::seed_from_u64(6);
        let all: Vec<Triple> =
            (0..2000).map(|_| [pf(r.random_range(-900.0..900.0)), pf(r.random_range(0.1..3.0)), 0]).collect();
        for (t, g) in
            all.iter().zip(run(&kernel(&format!("div.{mode}.f32 %o, %i0, %i1;"), "f32", &["f32", "f32"]), &all))
        {
            let (a, b) = (f64::from(f(t[0])), f64::from(f(t[1])));
            // a against q·b, exact in f64.
            let w = directed((a / b) as f32, mode, |c| a.partial_cmp(&(f64::from(c) * b)).unwrap());
            assert_eq!(f(g), w, "div.{mode} {a} {b}");
        }
        for (t, g) in all.iter().zip(run(&kernel(&format!("sqrt.{mode}.f32 %o, %i0;"), "f32", &["f32"]), &all)) {
            let a = f64::from(f(t[0]));
            if a >= 0.0 {
                let w = directed(a.sqrt() as f32, mode, |c| a.partial_cmp(&(f64::from(c) * f64::from(c))).unwrap());
                assert_eq!(f(g), w, "sqrt.{mode} {a}");
            }
        }
    }
    // Overflow and exact zeros by mode (PTX ISA, IEEE 754).
    let max = pf(f32::MAX);
    let got = |op: &str, a: f32, b: f32| {
        run(&kernel(&format!("{op}.f32 %o, %i0, %i1;"), "f32", &["f32", "f32"]), &[[pf(a), pf(b), 0]])[0]
    };
    assert_eq!(got("add.rz", f32::MAX, f32::MAX), max);
    assert_eq!(got("add.rp", f32::MAX, f32::MAX), pf(f32::INFINITY));
    assert_eq!(got("add.rm", f32::MAX, f32::MAX), max);
    assert_eq!(got("add.rm", 1.0, -1.0), pf(-0.0));
    assert_eq!(got("add.rp", 1.0, -1.0), 0);
    for (cmp, want) in [
        ("eq", (|a, b| a == b) as fn(f32, f32) -> bool),
        ("ne", |a, b| !a.is_nan() && !b.is_nan() && a != b),
        ("lt", |a, b| a < b),
        ("ge", |a, b| a >= b),
        ("equ", |a, b| a.is_nan() || b.is_nan() || a == b),
        ("neu", |a, b| a != b),
        ("ltu", |a, b| a.is_nan() || b.is_nan() || a < b),
        ("leu", |a, b| a.is_nan() || b.is_nan() || a <= b),
        ("gtu", |a, b| a.is_nan() || b.is_nan() || a > b),
        ("geu", |a, b| a.is_nan() || b.is_nan() || a >= b),
        ("num", |a, b| !a.is_nan() && !b.is_nan()),
        ("nan", |a, b| a.is_nan() || b.is_nan()),
    ] {
        check(&format!("setp.{cmp}.f32"), "pred", &["f32", "f32"], |t| u64::from(want(f(t[0]), f(t[1]))));
    }
}

#[test]
fn doubles() {
    check("add.f64", "f64", &["f64", "f64"], |t| pd(d(t[0]) + d(t[1])));
    check("mul.rn.f64", "f64", &["f64", "f64"], |t| pd(d(t[0]) * d(t[1])));
    check("div.rn.f64", "f64", &["f64", "f64"], |t| pd(d(t[0]) / d(t[1])));
    check("fma.rn.f64", "f64", &["f64", "f64", "f64"], |t| pd(d(t[0]).mul_add(d(t[1]), d(t[2]))));
    check("sqrt.rn.f64", "f64", &["f64"], |t| pd(d(t[0]).sqrt()));
    check("setp.lt.f64", "pred", &["f64", "f64"], |t| u64::from(d(t[0]) < d(t[1])));
    // Whole numbers: results are exact in 128 bits.
    let mut r = ChaCha8Rng::seed_from_u64(9);
    let all: Vec<Triple> = (0..2000)
        .map(|_| {
            [
                (r.random_range(-(1i64 << 53)..1 << 53) as f64).to_bits(),
                (r.random_range(-(1i64 << 53)..1 << 53) as f64).to_bits(),
                (r.random_range(-(1i64 << 53)..1 << 53) as f64).to_bits(),
            ]
        })
        .collect();
    for mode in ["rz", "rm", "rp"] {
        for (op, n, exact) in [
            ("add", 2, (|t: [i128; 3]| t[0] + t[1]) as fn([i128; 3]) -> i128),
            ("mul", 2, |t| t[0] * t[1]),
            ("fma", 3, |t| t[0] * t[1] + t[2]),
        ] {
            let names = ["%i0, %i1", "%i0, %i1, %i2"][n - 2];
            let ins = &["f64", "f64", "f64"][..n];
            for (t, g) in all.iter().zip(run(&kernel(&format!("{op}.{mode}.f64 %o, {names};"), "f64", ins), &all)) {
                let e = exact(t.map(|x| d(x) as i128));
                let g = d(g);
                let (low, high) = (g.next_down() as i128, g.next_up() as i128);
                let ok = match mode {
                    "rm" => g as i128 <= e && e < high,
                    "rp" => g as i128 >= e && e > low,
                    _ if e >= 0 => g as i128 <= e && e < high,
                    _ => g as i128 >= e && e > low,
                };
                assert!(ok || g as i128 == e, "{op}.{mode} {t:?} {g}");
            }
        }
    }
}

#[test]
fn halves() {
    check("add.f16", "f16", &["f16", "f16"], |t| ph(h(t[0]) + h(t[1])));
    check("mul.rn.f16", "f16", &["f16", "f16"], |t| ph(h(t[0]) * h(t[1])));
    let pb = |x: f64| if x.is_nan() { 0x7fff } else { u64::from(bf16::from_f64(x).to_bits()) };
    check("add.rn.bf16", "bf16", &["bf16", "bf16"], |t| {
        // Exact in f64 unless exponents are far apart, and then the small one is only a tie-breaker that never ties.
        let (a, b) = (bf(t[0]), bf(t[1]));
        if a.is_finite() && b.is_finite() && a != 0.0 && b != 0.0 && (a / b).abs().log2().abs() > 40.0 {
            return pb(if a.abs() > b.abs() { a } else { b });
        }
        pb(a + b)
    });
    check("max.f16", "f16", &["f16", "f16"], |t| {
        let (a, b) = (h(t[0]), h(t[1]));
        ph(if b.is_nan() || (!a.is_nan() && a.total_cmp(&b).is_gt()) { a } else { b })
    });
    // Subnormal numbers are zeros of their sign, as operands and as results; not without `.ftz`.
    let zero = |x: u64| if x & 0x7c00 == 0 { x & 0x8000 } else { x };
    check("add.ftz.f16", "f16", &["f16", "f16"], |t| zero(ph(h(zero(t[0])) + h(zero(t[1])))));
    check("mul.ftz.f16", "f16", &["f16", "f16"], |t| zero(ph(h(zero(t[0])) * h(zero(t[1])))));
    check("neg.ftz.f16", "f16", &["f16"], |t| zero(t[0]) ^ 0x8000);
    check("mul.ftz.f16x2", "f16x2", &["f16x2", "f16x2"], |t| {
        let one = |x: u64, y: u64| zero(ph(h(zero(x & 0xffff)) * h(zero(y & 0xffff))));
        one(t[0], t[1]) | one(t[0] >> 16, t[1] >> 16) << 16
    });
    check("setp.lt.ftz.f16", "pred", &["f16", "f16"], |t| u64::from(h(zero(t[0])) < h(zero(t[1]))));
    check("neg.bf16", "bf16", &["bf16"], |t| t[0] ^ 0x8000);
    check("fma.rn.f16x2", "f16x2", &["f16x2", "f16x2", "f16x2"], |t| {
        // Exact products; sums in f64 lose nothing for exponents within 11 bits of each other, else compare by thirds.
        let one = |k: u32| {
            let [a, b, c] = t.map(|x| h(x >> (16 * k)));
            let p = a * b;
            let s = p + c;
            let e = if s.is_finite() {
                let bb = s - p;
                (p - (s - bb)) + (c - bb)
            } else {
                0.0
            };
            // A tie of the rounded sum is broken by what it lost.
            let near = f16::from_f64(s);
            let other = if e > 0.0 {
                f16::from_f64(s.next_up())
            } else if e < 0.0 {
                f16::from_f64(s.next_down())
            } else {
                near
            };
            ph(if e != 0.0 { other.to_f64() } else { near.to_f64() })
        };
        one(0) | one(1) << 16
    });
}

#[test]
fn conversions() {
    check("cvt.f32.f16", "f32", &["f16"], |t| pf(h(t[0]) as f32));
    check("cvt.f32.bf16", "f32", &["bf16"], |t| pf(bf(t[0]) as f32));
    check("cvt.rn.f16.f32", "f16", &["f32"], |t| ph(f64::from(f(t[0]))));
    check("cvt.rn.bf16.f32", "bf16", &["f32"], |t| {
        if f(t[0]).is_nan() { 0x7fff } else { bf16::from_f32(f(t[0])).to_bits().into() }
    });
    check("cvt.rz.bf16.f32", "bf16", &["f32"], |t| if f(t[0]).is_nan() { 0x7fff } else { t[0] >> 16 });
    check("cvt.rn.relu.bf16.f32", "bf16", &["f32"], |t| {
        if f(t[0]).is_nan() {
            0x7fff
        } else if f(t[0]) <= 0.0 {
            0
        } else {
            bf16::from_f32(f(t[0])).to_bits().into()
        }
    });
    check("cvt.rna.tf32.f32", "b32", &["f32"], |t| {
        let x = t[0] as u32;
        // Half a unit is added to the magnitude, then the low bits are cut.
        if f(t[0]).is_nan() {
            0x7fff_ffff
        } else if f(t[0]).is_infinite() {
            x.into()
        } else {
            ((x + 0x1000) & !0x1fff).into()
        }
    });
    check("cvt.f64.f32", "f64", &["f32"], |t| pd(f64::from(f(t[0]))));
    check_body("cvt.rn.bf16x2.f32 %o, %i0, %i1;", "bf16x2", &["f32", "f32"], |t| {
        let one = |x: u64| if f(x).is_nan() { 0x7fff } else { u64::from(bf16::from_f32(f(x)).to_bits()) };
        one(t[0]) << 16 | one(t[1])
    });
    check_body("cvt.rn.f16x2.f32 %o, %i0, %i1;", "f16x2", &["f32", "f32"], |t| {
        ph(f64::from(f(t[0]))) << 16 | ph(f64::from(f(t[1])))
    });
}

#[test]
fn conversions_of_whole_numbers() {
    for (ty, low, high) in [
        ("s8", -128i128, 127),
        ("u8", 0, 255),
        ("s16", -32768, 32767),
        ("u16", 0, 65535),
        ("s32", -(1 << 31), (1 << 31) - 1),
        ("u32", 0, (1 << 32) - 1),
        ("s64", -(1 << 63), (1 << 63) - 1),
        ("u64", 0, (1 << 64) - 1),
    ] {
        let bits = 8 * class(ty).1 as u32;
        let mask = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
        for (mode, round) in [
            ("rni", f64::round_ties_even as fn(f64) -> f64),
            ("rzi", f64::trunc),
            ("rmi", f64::floor),
            ("rpi", f64::ceil),
        ] {
            check(&format!("cvt.{mode}.{ty}.f32"), ty, &["f32"], |t| {
                let x = f64::from(f(t[0]));
                if x.is_nan() {
                    return if ty.ends_with("64") { 1 << 63 } else { 0 };
                }
                let v = (round(x) as i128).clamp(low, high);
                // 8-bit results lie in registers of 16 bits: the type's bits count.
                v as u64 & if ty.ends_with('8') { 0xff } else { mask }
            });
        }
        if bits >= 16 {
            let wide = move |x: u64| {
                let b = if ty.ends_with('8') { 8 } else { bits };
                if ty.starts_with('s') {
                    i128::from(((x << (64 - b)) as i64) >> (64 - b))
                } else {
                    i128::from(x << (64 - b) >> (64 - b))
                }
            };
            check(&format!("cvt.rn.f32.{ty}"), "f32", &[ty], |t| pf(wide(t[0]) as f32));
            check(&format!("cvt.rn.f64.{ty}"), "f64", &[ty], |t| pd(wide(t[0]) as f64));
            check(&format!("cvt.rz.f32.{ty}"), "f32", &[ty], |t| {
                let v = wide(t[0]);
                let r = v as f32;
                let too_far = if v >= 0 { r as i128 > v } else { (r as i128) < v };
                pf(if !too_far {
                    r
                } else if v > 0 {
                    r.next_down()
                } else {
                    r.next_up()
                })
            });
        }
    }
    check("cvt.sat.s8.s32", "s8", &["s32"], |t| (t[0] as i32).clamp(-128, 127) as u8 as u64);
    check("cvt.sat.u8.s32", "u8", &["s32"], |t| (t[0] as i32).clamp(0, 255) as u64);
    check("cvt.s64.s32", "s64", &["s32"], |t| i64::from(t[0] as i32) as u64);
    check("cvt.u64.u32", "u64", &["u32"], |t| t[0] & 0xffff_ffff);
    check("cvt.s32.s16", "s32", &["s16"], |t| i32::from(t[0] as i16) as u32 as u64);
    check("cvt.u32.u64", "u32", &["u64"], |t| t[0] & 0xffff_ffff);
    check("cvt.rni.f32.f32", "f32", &["f32"], |t| pf(f(t[0]).round_ties_even()));
    check("cvt.rmi.f64.f64", "f64", &["f64"], |t| pd(d(t[0]).floor()));
    check("cvt.sat.f32.f32", "f32", &["f32"], |t| {
        pf(if f(t[0]).is_nan() || f(t[0]) <= 0.0 { 0.0 } else { f(t[0]).min(1.0) })
    });
    check("cvt.rn.f32.f64", "f32", &["f64"], |t| pf(d(t[0]) as f32));
}

/// Documented bounds, checked against f64.
#[test]
fn approximations() {
    let mut r = ChaCha8Rng::seed_from_u64(3);
    let all: Vec<Triple> = (0..2000).map(|_| [pf(r.random_range(-20.0..20.0)), 0, 0]).collect();
    let ulp = |x: f64| 2f64.powi((x.abs().log2().floor() as i32).max(-126) - 23);
    type Row = (&'static str, fn(f64) -> f64, fn(f64, f64) -> f64);
    let rows: &[Row] = &[
        ("ex2.approx.f32", f64::exp2, |_, u| 2.0 * u),
        ("lg2.approx.f32", f64::log2, |w, _| 2f64.powi(-22) * w.abs().max(1.0)),
        ("rcp.approx.f32", |x| 1.0 / x, |_, u| u),
        ("rsqrt.approx.f32", |x| 1.0 / x.sqrt(), |w, _| 2f64.powf(-22.9) * w),
        ("sqrt.approx.f32", f64::sqrt, |w, _| 2f64.powi(-23) * w),
        ("sin.approx.f32", f64::sin, |_, _| 2f64.powf(-20.5)),
        ("cos.approx.f32", f64::cos, |_, _| 2f64.powf(-20.5)),
        ("tanh.approx.f32", f64::tanh, |w, _| 2f64.powi(-11) * w.abs()),
    ];
    for (op, exact, bound) in rows {
        for (t, g) in all.iter().zip(run(&kernel(&format!("{op} %o, %i0;"), "f32", &["f32"]), &all)) {
            let x = f64::from(f(t[0]));
            let w = exact(x);
            if w.is_nan() {
                assert!(f(g).is_nan(), "{op} {x}");
                continue;
            }
            let off = (f64::from(f(g)) - w).abs();
            assert!(off <= bound(w, ulp(w)), "{op} of {x} is {}, {w} is right", f(g));
        }
    }
    // Values at the ends (tables of the PTX ISA).
    let at = |op: &str, x: f32| {
        f(run(&kernel(&format!("{op} %o, %i0;"), "f32", &["f32"]), &[[u64::from(x.to_bits()), 0, 0]])[0])
    };
    assert_eq!(at("ex2.approx.f32", f32::NEG_INFINITY), 0.0);
    assert_eq!(at("ex2.approx.ftz.f32", -1e-40), 1.0);
    assert_eq!(at("lg2.approx.f32", 0.0), f32::NEG_INFINITY);
    assert!(at("lg2.approx.f32", -1.0).is_nan());
    assert_eq!(at("rsqrt.approx.f32", -0.0), f32::NEG_INFINITY);
    assert_eq!(at("rcp.approx.ftz.f32", 1e-40), f32::INFINITY);
    assert_eq!(at("rcp.approx.f32", -0.0), f32::NEG_INFINITY);
}

/// Eight-bit floats by the tables of their formats.
#[test]
fn eight_bits() {
    let got = |body: &str, a: f32, b: f32| run(&kernel(body, "b16", &["f32", "f32"]), &[[pf(a), pf(b), 0]])[0];
    let e4 = "cvt.rn.satfinite.e4m3x2.f32 %o, %i0, %i1;";
    assert_eq!(got(e4, 1.0, -2.0), 0x38c0);
    assert_eq!(got(e4, 448.0, 1e9), 0x7e7e);
    assert_eq!(got(e4, 2f32.powi(-9), 2f32.powi(-6)), 0x0108);
    assert_eq!(got(e4, f32::NAN, 0.0), 0x7f00);
    assert_eq!(got(e4, 17.0, 19.0), 0x585a);
    let e5 = "cvt.rn.satfinite.e5m2x2.f32 %o, %i0, %i1;";
    assert_eq!(got(e5, 1.0, 57344.0), 0x3c7b);
    // And back, exactly.
    for (ty, max) in [("e4m3x2", 0x7e), ("e5m2x2", 0x7b)] {
        let body = format!("cvt.rn.f16x2.{ty} %o, %i0;");
        let all: Vec<Triple> = (0..=max).map(|b| [b | b << 8, 0, 0]).collect();
        let wide = run(&kernel(&body, "f16x2", &["b16"]), &all);
        for (t, w) in all.iter().zip(wide) {
            let x = f16::from_bits(w as u16).to_f32();
            assert_eq!(w >> 16, w & 0xffff);
            let back = got(&format!("cvt.rn.satfinite.{ty}.f32 %o, %i0, %i1;"), x, x);
            assert_eq!(back, t[0], "{ty} {x}");
        }
    }
}
