//! The table of arithmetic: (mnemonic, suffixes, type) → a loop over lanes.

use super::mods::Mods;
use crate::isa::{AluFn, Lanes, Ty};
use crate::math::approx;
use crate::math::lanes::{Flushed, Lane, flush, map_f32, saturate};
use crate::math::round::{self, RM, RN, RP, RZ, Round};
use half::{bf16, f16};

/// One function per combination of rounding, `.ftz` and `.sat`.
macro_rules! pick {
    ($f:ident, $m:expr) => {{
        let m: Modes = $m;
        macro_rules! with {
            ($r:ident) => {
                match (m.ftz, m.sat) {
                    (false, false) => $f::<$r, false, false> as AluFn,
                    (false, true) => $f::<$r, false, true>,
                    (true, false) => $f::<$r, true, false>,
                    (true, true) => $f::<$r, true, true>,
                }
            };
        }
        match m.round {
            Round::Zero => with!(RZ),
            Round::Down => with!(RM),
            Round::Up => with!(RP),
            _ => with!(RN),
        }
    }};
}

#[derive(Clone, Copy)]
struct Modes {
    round: Round,
    ftz: bool,
    sat: bool,
}

macro_rules! f32_op {
    ($name:ident, |$a:ident, $b:ident, $c:ident, $r:ident| $nearest:expr, $other:expr) => {
        fn $name<const R: u8, const FTZ: bool, const SAT: bool>(out: &mut Lanes, a: &Lanes, b: &Lanes, c: &Lanes) {
            map_f32::<FTZ, SAT>(out, a, b, c, |$a, $b, $c| {
                let _ = ($b, $c);
                if R == RN {
                    $nearest
                } else {
                    let $r = Round::of(R);
                    $other
                }
            });
        }
    };
}

f32_op!(add_f32, |a, b, c, r| a + b, round::add_f32(a, b, r));
f32_op!(sub_f32, |a, b, c, r| a - b, round::add_f32(a, -b, r));
f32_op!(mul_f32, |a, b, c, r| a * b, round::mul_f32(a, b, r));
f32_op!(fma_f32, |a, b, c, r| a.mul_add(b, c), round::fma_f32(a, b, c, r));
f32_op!(div_f32, |a, b, c, r| a / b, round::div_f32(a, b, r));
f32_op!(rcp_f32, |a, b, c, r| 1.0 / a, round::div_f32(1.0, a, r));
f32_op!(sqrt_f32, |a, b, c, r| a.sqrt(), round::sqrt_f32(a, r));

macro_rules! f64_op {
    ($name:ident, |$a:ident, $b:ident, $c:ident, $r:ident| $e:expr) => {
        fn $name<const R: u8>(out: &mut Lanes, a: &Lanes, b: &Lanes, c: &Lanes) {
            for i in 0..32 {
                let ($a, $b, $c) = (f64::get(a[i]), f64::get(b[i]), f64::get(c[i]));
                let _ = ($b, $c);
                let $r = Round::of(R);
                out[i] = $e.put();
            }
        }
    };
}

f64_op!(add_f64, |a, b, c, r| round::add_f64(a, b, r));
f64_op!(sub_f64, |a, b, c, r| round::add_f64(a, -b, r));
f64_op!(mul_f64, |a, b, c, r| round::mul_f64(a, b, r));
f64_op!(fma_f64, |a, b, c, r| round::fma_f64(a, b, c, r));
f64_op!(div_f64, |a, b, c, r| round::div_f64(a, b, r));
f64_op!(rcp_f64, |a, b, c, r| round::div_f64(1.0, a, r));
f64_op!(sqrt_f64, |a, b, c, r| round::sqrt_f64(a, r));

macro_rules! pick64 {
    ($f:ident, $r:expr) => {
        match $r {
            Round::Zero => $f::<RZ> as AluFn,
            Round::Down => $f::<RM>,
            Round::Up => $f::<RP>,
            _ => $f::<RN>,
        }
    };
}

/// Arithmetic of 16-bit floats: exact enough in f32 or f64 that one more rounding is the only one.
trait Half: Lane {
    fn wide(self) -> f32;
    fn narrow(x: f32) -> Self;
    fn narrow64(x: f64) -> Self;
}

macro_rules! halves {
    ($($t:ty = $format:expr),*) => { $(
        impl Half for $t {
            fn wide(self) -> f32 {
                self.to_f32()
            }
            fn narrow(x: f32) -> $t {
                <$t>::from_f32(x)
            }
            fn narrow64(x: f64) -> $t {
                <$t>::from_f64(round::to_format(x, $format, Round::Nearest))
            }
        }
    )* };
}
halves!(f16 = round::F16, bf16 = round::BF16);

impl<T: Half> Half for Flushed<T>
where
    Flushed<T>: Lane,
{
    fn wide(self) -> f32 {
        self.0.wide()
    }
    fn narrow(x: f32) -> Self {
        Flushed(T::narrow(x))
    }
    fn narrow64(x: f64) -> Self {
        Flushed(T::narrow64(x))
    }
}

fn fused<T: Half>(a: T, b: T, c: T) -> T {
    let (p, c) = (f64::from(a.wide()) * f64::from(b.wide()), f64::from(c.wide()));
    T::narrow64(round::sum_to_odd(p, c))
}

fn relu<T: Half>(x: T) -> T {
    if x.wide() > 0.0 || x.wide().is_nan() { x } else { T::narrow(0.0) }
}

fn clamp<T: Half>(x: T) -> T {
    T::narrow(saturate(x.wide()))
}

/// The smaller: a NaN gives way to a number, and -0 is below +0.
fn least<T: Copy + PartialOrd>(a: T, b: T, nan: bool, negative: impl Fn(T) -> bool) -> T {
    #[allow(clippy::eq_op)]
    let is_nan = |x: T| x != x;
    if is_nan(a) {
        return if nan { a } else { b };
    }
    if is_nan(b) {
        return if nan { b } else { a };
    }
    if a < b || (a == b && negative(a)) { a } else { b }
}

fn most<T: Copy + PartialOrd>(a: T, b: T, nan: bool, negative: impl Fn(T) -> bool) -> T {
    #[allow(clippy::eq_op)]
    let is_nan = |x: T| x != x;
    if is_nan(a) {
        return if nan { a } else { b };
    }
    if is_nan(b) {
        return if nan { b } else { a };
    }
    if a > b || (a == b && !negative(a)) { a } else { b }
}

fn min32(a: f32, b: f32, nan: bool) -> f32 {
    least(a, b, nan, f32::is_sign_negative)
}
fn max32(a: f32, b: f32, nan: bool) -> f32 {
    most(a, b, nan, f32::is_sign_negative)
}

/// Both halves of a pair.
macro_rules! both {
    ($t:ty, $name:expr, $nan:expr, $relu:expr, $sat:expr) => {{
        Some(match ($name, $relu, $sat, $nan) {
            ("add", _, false, _) => {
                alu2!(|a: [$t; 2], b: [$t; 2]| -> [$t; 2] { each2(a, b, |a, b| <$t>::narrow(a.wide() + b.wide())) })
            }
            ("sub", _, false, _) => {
                alu2!(|a: [$t; 2], b: [$t; 2]| -> [$t; 2] { each2(a, b, |a, b| <$t>::narrow(a.wide() - b.wide())) })
            }
            ("mul", _, false, _) => {
                alu2!(|a: [$t; 2], b: [$t; 2]| -> [$t; 2] { each2(a, b, |a, b| <$t>::narrow(a.wide() * b.wide())) })
            }
            ("add", _, true, _) => alu2!(|a: [$t; 2], b: [$t; 2]| -> [$t; 2] {
                each2(a, b, |a, b| clamp(<$t>::narrow(a.wide() + b.wide())))
            }),
            ("sub", _, true, _) => alu2!(|a: [$t; 2], b: [$t; 2]| -> [$t; 2] {
                each2(a, b, |a, b| clamp(<$t>::narrow(a.wide() - b.wide())))
            }),
            ("mul", _, true, _) => alu2!(|a: [$t; 2], b: [$t; 2]| -> [$t; 2] {
                each2(a, b, |a, b| clamp(<$t>::narrow(a.wide() * b.wide())))
            }),
            ("fma", false, false, _) => {
                alu3!(|a: [$t; 2], b: [$t; 2], c: [$t; 2]| -> [$t; 2] {
                    [fused(a[0], b[0], c[0]), fused(a[1], b[1], c[1])]
                })
            }
            ("fma", true, false, _) => {
                alu3!(|a: [$t; 2], b: [$t; 2], c: [$t; 2]| -> [$t; 2] {
                    [relu(fused(a[0], b[0], c[0])), relu(fused(a[1], b[1], c[1]))]
                })
            }
            ("fma", _, true, _) => {
                alu3!(|a: [$t; 2], b: [$t; 2], c: [$t; 2]| -> [$t; 2] {
                    [clamp(fused(a[0], b[0], c[0])), clamp(fused(a[1], b[1], c[1]))]
                })
            }
            ("min", _, _, false) => alu2!(|a: [$t; 2], b: [$t; 2]| -> [$t; 2] {
                each2(a, b, |a, b| <$t>::narrow(min32(a.wide(), b.wide(), false)))
            }),
            ("min", _, _, true) => alu2!(|a: [$t; 2], b: [$t; 2]| -> [$t; 2] {
                each2(a, b, |a, b| <$t>::narrow(min32(a.wide(), b.wide(), true)))
            }),
            ("max", _, _, false) => alu2!(|a: [$t; 2], b: [$t; 2]| -> [$t; 2] {
                each2(a, b, |a, b| <$t>::narrow(max32(a.wide(), b.wide(), false)))
            }),
            ("max", _, _, true) => alu2!(|a: [$t; 2], b: [$t; 2]| -> [$t; 2] {
                each2(a, b, |a, b| <$t>::narrow(max32(a.wide(), b.wide(), true)))
            }),
            ("neg", ..) => alu1!(|a: u32| -> u32 { a ^ 0x8000_8000 }),
            ("abs", ..) => alu1!(|a: u32| -> u32 { a & 0x7fff_7fff }),
            ("ex2", ..) => alu1!(|a: [$t; 2]| -> [$t; 2] {
                [<$t>::narrow(approx::ex2(a[0].wide())), <$t>::narrow(approx::ex2(a[1].wide()))]
            }),
            ("tanh", ..) => alu1!(|a: [$t; 2]| -> [$t; 2] {
                [<$t>::narrow(approx::tanh(a[0].wide())), <$t>::narrow(approx::tanh(a[1].wide()))]
            }),
            _ => return None,
        })
    }};
}

fn each2<T: Copy>(a: [T; 2], b: [T; 2], f: impl Fn(T, T) -> T) -> [T; 2] {
    [f(a[0], b[0]), f(a[1], b[1])]
}

/// A function of pairs that only works on the low halves of its operands.
fn low_half(name: &str, (ty, ftz): (Ty, bool), nan: bool, relu_: bool, sat: bool) -> Option<AluFn> {
    macro_rules! one {
        ($t:ty) => {
            Some(match (name, relu_, sat, nan) {
                ("add", _, false, _) => alu2!(|a: $t, b: $t| -> $t { <$t>::narrow(a.wide() + b.wide()) }),
                ("sub", _, false, _) => alu2!(|a: $t, b: $t| -> $t { <$t>::narrow(a.wide() - b.wide()) }),
                ("mul", _, false, _) => alu2!(|a: $t, b: $t| -> $t { <$t>::narrow(a.wide() * b.wide()) }),
                ("add", _, true, _) => alu2!(|a: $t, b: $t| -> $t { clamp(<$t>::narrow(a.wide() + b.wide())) }),
                ("sub", _, true, _) => alu2!(|a: $t, b: $t| -> $t { clamp(<$t>::narrow(a.wide() - b.wide())) }),
                ("mul", _, true, _) => alu2!(|a: $t, b: $t| -> $t { clamp(<$t>::narrow(a.wide() * b.wide())) }),
                ("fma", false, false, _) => alu3!(|a: $t, b: $t, c: $t| -> $t { fused(a, b, c) }),
                ("fma", true, false, _) => alu3!(|a: $t, b: $t, c: $t| -> $t { relu(fused(a, b, c)) }),
                ("fma", _, true, _) => alu3!(|a: $t, b: $t, c: $t| -> $t { clamp(fused(a, b, c)) }),
                ("min", _, _, false) => alu2!(|a: $t, b: $t| -> $t { <$t>::narrow(min32(a.wide(), b.wide(), false)) }),
                ("min", _, _, true) => alu2!(|a: $t, b: $t| -> $t { <$t>::narrow(min32(a.wide(), b.wide(), true)) }),
                ("max", _, _, false) => alu2!(|a: $t, b: $t| -> $t { <$t>::narrow(max32(a.wide(), b.wide(), false)) }),
                ("max", _, _, true) => alu2!(|a: $t, b: $t| -> $t { <$t>::narrow(max32(a.wide(), b.wide(), true)) }),
                ("neg", ..) => alu1!(|a: u16| -> u16 { a ^ 0x8000 }),
                ("abs", ..) => alu1!(|a: u16| -> u16 { a & 0x7fff }),
                ("ex2", ..) => alu1!(|a: $t| -> $t { <$t>::narrow(approx::ex2(a.wide())) }),
                ("tanh", ..) => alu1!(|a: $t| -> $t { <$t>::narrow(approx::tanh(a.wide())) }),
                _ => return None,
            })
        };
    }
    match (ty, ftz) {
        (Ty::F16, false) => one!(f16),
        (Ty::F16, true) => one!(Flushed<f16>),
        (Ty::Bf16, false) => one!(bf16),
        (Ty::Bf16, true) => one!(Flushed<bf16>),
        _ => None,
    }
}

fn half(name: &str, ty: Ty, m: &mut Mods) -> Option<AluFn> {
    m.take("rn");
    let ftz = m.take("ftz");
    m.take("approx");
    let (nan, relu_, sat) = (m.take("NaN"), m.take("relu"), m.take("sat"));
    if ftz && matches!(name, "neg" | "abs") {
        // Signs change in the bits of what was flushed.
        return match (ty, name) {
            (Ty::F16, "neg") => Some(alu1!(|a: Flushed<f16>| -> u16 { a.0.to_bits() ^ 0x8000 })),
            (Ty::F16, _) => Some(alu1!(|a: Flushed<f16>| -> u16 { a.0.to_bits() & 0x7fff })),
            (Ty::F16x2, "neg") => Some(alu1!(|a: [Flushed<f16>; 2]| -> u32 { a.put() as u32 ^ 0x8000_8000 })),
            (Ty::F16x2, _) => Some(alu1!(|a: [Flushed<f16>; 2]| -> u32 { a.put() as u32 & 0x7fff_7fff })),
            _ => None,
        };
    }
    match (ty, ftz) {
        (Ty::F16x2, false) => both!(f16, name, nan, relu_, sat),
        (Ty::F16x2, true) => both!(Flushed<f16>, name, nan, relu_, sat),
        (Ty::Bf16x2, false) => both!(bf16, name, nan, relu_, sat),
        (Ty::Bf16x2, true) => both!(Flushed<bf16>, name, nan, relu_, sat),
        _ => low_half(name, (ty, ftz), nan, relu_, sat),
    }
}

fn float32(name: &str, m: &mut Mods) -> Option<AluFn> {
    let (approx, full) = (m.take("approx"), m.take("full"));
    let modes = Modes { round: m.round().unwrap_or(Round::Nearest), ftz: m.take("ftz"), sat: m.take("sat") };
    macro_rules! plain {
        ($f:expr) => {{
            fn g<const FTZ: bool>(out: &mut Lanes, a: &Lanes, b: &Lanes, c: &Lanes) {
                #[allow(clippy::redundant_closure_call)]
                map_f32::<FTZ, false>(out, a, b, c, |a, b, c| ($f)(a, b, c));
            }
            if modes.ftz { g::<true> as AluFn } else { g::<false> }
        }};
    }
    Some(match name {
        "add" => pick!(add_f32, modes),
        "sub" => pick!(sub_f32, modes),
        "mul" => pick!(mul_f32, modes),
        "fma" | "mad" => pick!(fma_f32, modes),
        "div" if approx => plain!(|a, b, _: f32| approx::div(a, b)),
        "div" if full => plain!(|a: f32, b: f32, _: f32| a / b),
        "div" => pick!(div_f32, modes),
        "rcp" if approx => plain!(|a, _: f32, _: f32| approx::rcp(a)),
        "rcp" => pick!(rcp_f32, modes),
        "sqrt" if approx => plain!(|a: f32, _: f32, _: f32| a.sqrt()),
        "sqrt" => pick!(sqrt_f32, modes),
        "rsqrt" => plain!(|a, _: f32, _: f32| approx::rsqrt(a)),
        "ex2" => plain!(|a, _: f32, _: f32| approx::ex2(a)),
        "lg2" => plain!(|a, _: f32, _: f32| approx::lg2(a)),
        "sin" => plain!(|a, _: f32, _: f32| approx::sin(a)),
        "cos" => plain!(|a, _: f32, _: f32| approx::cos(a)),
        "tanh" => plain!(|a, _: f32, _: f32| approx::tanh(a)),
        "neg" => plain!(|a: f32, _: f32, _: f32| -a),
        "abs" => plain!(|a: f32, _: f32, _: f32| a.abs()),
        "min" if m.take("NaN") => plain!(|a, b, _: f32| min32(a, b, true)),
        "min" => plain!(|a, b, _: f32| min32(a, b, false)),
        "max" if m.take("NaN") => plain!(|a, b, _: f32| max32(a, b, true)),
        "max" => plain!(|a, b, _: f32| max32(a, b, false)),
        "copysign" => alu2!(|a: u32, b: u32| -> u32 { b & 0x7fff_ffff | a & 0x8000_0000 }),
        "testp" => return None,
        _ => return None,
    })
}

fn float64(name: &str, m: &mut Mods) -> Option<AluFn> {
    let approx = m.take("approx");
    let r = m.round().unwrap_or(Round::Nearest);
    m.take("ftz");
    Some(match name {
        "add" => pick64!(add_f64, r),
        "sub" => pick64!(sub_f64, r),
        "mul" => pick64!(mul_f64, r),
        "fma" | "mad" => pick64!(fma_f64, r),
        "div" => pick64!(div_f64, r),
        "rcp" if approx => alu1!(|a: f64| -> f64 { approx::rcp_f64(a) }),
        "rcp" => pick64!(rcp_f64, r),
        "rsqrt" => alu1!(|a: f64| -> f64 { approx::rsqrt_f64(a) }),
        "sqrt" => pick64!(sqrt_f64, r),
        "neg" => alu1!(|a: u64| -> u64 { a ^ 1 << 63 }),
        "abs" => alu1!(|a: u64| -> u64 { a & !(1 << 63) }),
        "min" => alu2!(|a: f64, b: f64| -> f64 { least(a, b, false, f64::is_sign_negative) }),
        "max" => alu2!(|a: f64, b: f64| -> f64 { most(a, b, false, f64::is_sign_negative) }),
        "copysign" => alu2!(|a: u64, b: u64| -> u64 { b & !(1 << 63) | a & 1 << 63 }),
        _ => return None,
    })
}

macro_rules! integer {
    ($name:expr, $t:ty, $u:ty, $w:ty) => {
        Some(match $name {
            "add" => alu2!(|a: $t, b: $t| -> $t { a.wrapping_add(b) }),
            "sub" => alu2!(|a: $t, b: $t| -> $t { a.wrapping_sub(b) }),
            "mul.lo" => alu2!(|a: $t, b: $t| -> $t { a.wrapping_mul(b) }),
            "mul.hi" => alu2!(|a: $t, b: $t| -> $t { (((a as $w) * (b as $w)) >> <$t>::BITS) as $t }),
            "mad.lo" => alu3!(|a: $t, b: $t, c: $t| -> $t { a.wrapping_mul(b).wrapping_add(c) }),
            "mad.hi" => {
                alu3!(|a: $t, b: $t, c: $t| -> $t { ((((a as $w) * (b as $w)) >> <$t>::BITS) as $t).wrapping_add(c) })
            }
            "sad" => alu3!(|a: $t, b: $t, c: $t| -> $t { (a.abs_diff(b) as $t).wrapping_add(c) }),
            // PTX leaves division by zero open; the hardware gives all ones.
            "div" => alu2!(|a: $t, b: $t| -> $t { if b == 0 { !0 } else { a.wrapping_div(b) } }),
            "rem" => alu2!(|a: $t, b: $t| -> $t { if b == 0 { a } else { a.wrapping_rem(b) } }),
            "min" => alu2!(|a: $t, b: $t| -> $t { a.min(b) }),
            "max" => alu2!(|a: $t, b: $t| -> $t { a.max(b) }),
            "neg" => alu1!(|a: $t| -> $t { (0 as $t).wrapping_sub(a) }),
            // The amount is 32 bits wide; too far a shift leaves zeros, or signs.
            "shr" => alu2!(|a: $t, b: u32| -> $t {
                if b >= <$t>::BITS { if a < (0 as $t) { !0 } else { 0 } } else { a >> b }
            }),
            "shl" => alu2!(|a: $u, b: u32| -> $u { if b >= <$u>::BITS { 0 } else { a << b } }),
            _ => return None,
        })
    };
}

fn integer(name: &str, ty: Ty) -> Option<AluFn> {
    use Ty::*;
    match name {
        "abs" => {
            return Some(match ty {
                S16 => alu1!(|a: i16| -> i16 { a.wrapping_abs() }),
                S32 => alu1!(|a: i32| -> i32 { a.wrapping_abs() }),
                S64 => alu1!(|a: i64| -> i64 { a.wrapping_abs() }),
                _ => return None,
            });
        }
        "mul.wide" => {
            return Some(match ty {
                U16 => alu2!(|a: u16, b: u16| -> u32 { u32::from(a) * u32::from(b) }),
                S16 => alu2!(|a: i16, b: i16| -> i32 { i32::from(a) * i32::from(b) }),
                U32 => alu2!(|a: u32, b: u32| -> u64 { u64::from(a) * u64::from(b) }),
                S32 => alu2!(|a: i32, b: i32| -> i64 { i64::from(a) * i64::from(b) }),
                _ => return None,
            });
        }
        "mad.wide" => {
            return Some(match ty {
                U16 => alu3!(|a: u16, b: u16, c: u32| -> u32 { (u32::from(a) * u32::from(b)).wrapping_add(c) }),
                S16 => alu3!(|a: i16, b: i16, c: i32| -> i32 { (i32::from(a) * i32::from(b)).wrapping_add(c) }),
                U32 => alu3!(|a: u32, b: u32, c: u64| -> u64 { (u64::from(a) * u64::from(b)).wrapping_add(c) }),
                S32 => alu3!(|a: i32, b: i32, c: i64| -> i64 { (i64::from(a) * i64::from(b)).wrapping_add(c) }),
                _ => return None,
            });
        }
        _ => {}
    }
    match ty {
        U16 | B16 => integer!(name, u16, u16, u32),
        S16 => integer!(name, i16, u16, i32),
        U32 | B32 => integer!(name, u32, u32, u64),
        S32 => integer!(name, i32, u32, i64),
        U64 | B64 => integer!(name, u64, u64, u128),
        S64 => integer!(name, i64, u64, i128),
        _ => None,
    }
}

fn bits(name: &str, ty: Ty, m: &mut Mods) -> Option<AluFn> {
    use Ty::*;
    let wide = ty.bytes() == 8;
    Some(match (name, ty.bytes()) {
        ("and", _) => alu2!(|a: u64, b: u64| -> u64 { a & b }),
        ("or", _) => alu2!(|a: u64, b: u64| -> u64 { a | b }),
        ("xor", _) => alu2!(|a: u64, b: u64| -> u64 { a ^ b }),
        ("not", 2) => alu1!(|a: u16| -> u16 { !a }),
        ("not", 4) => alu1!(|a: u32| -> u32 { !a }),
        ("not", _) => alu1!(|a: u64| -> u64 { !a }),
        ("cnot", _) => alu1!(|a: u64| -> u64 { u64::from(a == 0) }),
        ("popc", 4) => alu1!(|a: u32| -> u32 { a.count_ones() }),
        ("popc", _) => alu1!(|a: u64| -> u32 { a.count_ones() }),
        ("clz", 4) => alu1!(|a: u32| -> u32 { a.leading_zeros() }),
        ("clz", _) => alu1!(|a: u64| -> u32 { a.leading_zeros() }),
        ("brev", 4) => alu1!(|a: u32| -> u32 { a.reverse_bits() }),
        ("brev", _) => alu1!(|a: u64| -> u64 { a.reverse_bits() }),
        ("bfind", _) => {
            let shift = m.take("shiftamt");
            match (ty, shift) {
                (U32, false) => alu1!(|a: u32| -> u32 { 31u32.wrapping_sub(a.leading_zeros()) }),
                (S32, false) => alu1!(|a: i32| -> u32 { 31u32.wrapping_sub((a ^ (a >> 31)).leading_zeros()) }),
                (U64, false) => alu1!(|a: u64| -> u32 { 63u32.wrapping_sub(a.leading_zeros()) }),
                (S64, false) => alu1!(|a: i64| -> u32 { 63u32.wrapping_sub((a ^ (a >> 63)).leading_zeros()) }),
                (U32, true) => alu1!(|a: u32| -> u32 { if a == 0 { !0 } else { a.leading_zeros() } }),
                (S32, true) => alu1!(|a: i32| -> u32 {
                    let a = a ^ (a >> 31);
                    if a == 0 { !0 } else { a.leading_zeros() }
                }),
                _ => return None,
            }
        }
        ("bfe", _) => match ty {
            U32 | B32 => alu3!(|a: u32, b: u8, c: u8| -> u32 { field(u64::from(a), b, c, 32, false) as u32 }),
            S32 => alu3!(|a: i32, b: u8, c: u8| -> u32 { field(i64::from(a) as u64, b, c, 32, true) as u32 }),
            U64 | B64 => alu3!(|a: u64, b: u8, c: u8| -> u64 { field(a, b, c, 64, false) }),
            S64 => alu3!(|a: u64, b: u8, c: u8| -> u64 { field(a, b, c, 64, true) }),
            _ => return None,
        },
        ("bmsk", _) => {
            if m.take("wrap") {
                alu2!(|a: u32, b: u32| -> u32 { ones(b & 31) << (a & 31) })
            } else {
                m.take("clamp");
                alu2!(|a: u32, b: u32| -> u32 { if a > 31 { 0 } else { ones(b.min(32)) << a } })
            }
        }
        ("shf.l", _) if m.take("wrap") => alu3!(|a: u32, b: u32, c: u32| -> u32 { funnel(a, b, 32 - (c & 31)) }),
        ("shf.l", _) if m.take("clamp") => alu3!(|a: u32, b: u32, c: u32| -> u32 { funnel(a, b, 32 - c.min(32)) }),
        ("shf.r", _) if m.take("wrap") => alu3!(|a: u32, b: u32, c: u32| -> u32 { funnel(a, b, c & 31) }),
        ("shf.r", _) if m.take("clamp") => alu3!(|a: u32, b: u32, c: u32| -> u32 { funnel(a, b, c.min(32)) }),
        ("prmt", _) => {
            let modes: [(&str, AluFn); 6] = [
                (
                    "f4e",
                    alu3!(|a: u32, b: u32, c: u32| -> u32 {
                        permute(a, b, [0x3210, 0x4321, 0x5432, 0x6543][c as usize & 3])
                    }),
                ),
                (
                    "b4e",
                    alu3!(|a: u32, b: u32, c: u32| -> u32 {
                        permute(a, b, [0x5670, 0x6701, 0x7012, 0x0123][c as usize & 3])
                    }),
                ),
                ("rc8", alu3!(|a: u32, b: u32, c: u32| -> u32 { permute(a, b, 0x1111 * (c & 3)) })),
                (
                    "ecl",
                    alu3!(|a: u32, b: u32, c: u32| -> u32 {
                        permute(a, b, [0x3210, 0x3211, 0x3222, 0x3333][c as usize & 3])
                    }),
                ),
                (
                    "ecr",
                    alu3!(|a: u32, b: u32, c: u32| -> u32 {
                        permute(a, b, [0x0000, 0x1110, 0x2210, 0x3210][c as usize & 3])
                    }),
                ),
                ("rc16", alu3!(|a: u32, b: u32, c: u32| -> u32 { permute(a, b, [0x1010, 0x3232][c as usize & 1]) })),
            ];
            for (mode, f) in modes {
                if m.take(mode) {
                    return Some(f);
                }
            }
            alu3!(|a: u32, b: u32, c: u32| -> u32 { permute(a, b, c) })
        }
        ("fns", _) if !wide => alu3!(|a: u32, b: u32, c: i32| -> u32 { nth_set(a, b, c) }),
        _ => return None,
    })
}

fn ones(n: u32) -> u32 {
    if n >= 32 { !0 } else { (1 << n) - 1 }
}

/// Bits `c` up to `c + 32` of b:a, for c in 0..=32.
fn funnel(a: u32, b: u32, c: u32) -> u32 {
    ((u64::from(b) << 32 | u64::from(a)) >> c) as u32
}

/// `bfe`: `length` bits from `from`, sign-extended by the field's top bit or, beyond the register, by its own.
fn field(a: u64, from: u8, length: u8, width: u32, signed: bool) -> u64 {
    let (from, length) = (u32::from(from), u32::from(length));
    let msb = width - 1;
    let top = if !signed || length == 0 { 0 } else { a >> (from + length - 1).min(msb) & 1 };
    let mut out = if top == 1 { !0u64 } else { 0 };
    for i in 0..length.min(width) {
        if from + i > msb {
            break;
        }
        out = out & !(1 << i) | (a >> (from + i) & 1) << i;
    }
    out
}

/// `bfi`: the low `length` bits of `a` at `from` of `b`.
fn insert(a: u64, b: u64, from: u64, length: u64, width: u64) -> u64 {
    let (from, length) = (from & 0xff, length & 0xff);
    if from >= width || length == 0 {
        return b;
    }
    let n = length.min(width - from);
    let mask = if n >= 64 { !0 } else { ((1u64 << n) - 1) << from };
    b & !mask | (a << from) & mask
}

fn nth_set(mask: u32, base: u32, offset: i32) -> u32 {
    let step: i32 = if offset < 0 { -1 } else { 1 };
    let (mut at, mut left) = (base as i32, offset.unsigned_abs().max(1));
    while (0..32).contains(&at) {
        if mask >> at & 1 == 1 {
            left -= 1;
            if left == 0 {
                return at as u32;
            }
        }
        at += step;
    }
    !0
}

/// `prmt` in its general form: a nibble chooses a byte of b:a, its top bit the byte's sign eight times.
fn permute(a: u32, b: u32, selector: u32) -> u32 {
    let all = u64::from(b) << 32 | u64::from(a);
    (0..4).fold(0, |out, i| {
        let s = selector >> (4 * i);
        let byte = (all >> (8 * (s & 7))) as u8;
        let byte = if s & 8 != 0 { if byte & 0x80 != 0 { 0xff } else { 0 } } else { byte };
        out | u32::from(byte) << (8 * i)
    })
}

fn dot4(a: u32, b: u32, c: u32, signs: (bool, bool)) -> u32 {
    let byte = |x: u32, i: u32, signed: bool| {
        let v = (x >> (8 * i)) as u8;
        if signed { i32::from(v as i8) } else { i32::from(v) }
    };
    (0..4).fold(c as i32, |s, i| s.wrapping_add(byte(a, i, signs.0) * byte(b, i, signs.1))) as u32
}

/// The loop of an arithmetic instruction; `name` holds `.lo`, `.hi`, `.wide` where it has one.
pub fn arithmetic(name: &str, ty: Ty, m: &mut Mods) -> Option<AluFn> {
    match name {
        "mov" => return Some(alu1!(|a: u64| -> u64 { a })),
        "and" | "or" | "xor" | "not" | "cnot" | "popc" | "clz" | "brev" | "bfind" | "bfe" | "bmsk" | "shf.l"
        | "shf.r" | "prmt" | "fns" => return bits(name, ty, m),
        "shl" | "shr" => return integer(name, ty),
        "dp4a" => {
            let second = m.one_of(&["u32", "s32"]) == Some("s32");
            return Some(match (ty.signed(), second) {
                (false, false) => alu3!(|a: u32, b: u32, c: u32| -> u32 { dot4(a, b, c, (false, false)) }),
                (true, false) => alu3!(|a: u32, b: u32, c: u32| -> u32 { dot4(a, b, c, (true, false)) }),
                (false, true) => alu3!(|a: u32, b: u32, c: u32| -> u32 { dot4(a, b, c, (false, true)) }),
                (true, true) => alu3!(|a: u32, b: u32, c: u32| -> u32 { dot4(a, b, c, (true, true)) }),
            });
        }
        "slct" => {
            return Some(if m.take("f32") {
                m.take("ftz");
                alu3!(|a: u64, b: u64, c: f32| -> u64 { if c >= 0.0 || flush(c) == 0.0 { a } else { b } })
            } else {
                m.take("s32");
                alu3!(|a: u64, b: u64, c: i32| -> u64 { if c >= 0 { a } else { b } })
            });
        }
        _ => {}
    }
    match ty {
        Ty::F32 => float32(name, m),
        Ty::F64 => float64(name, m),
        Ty::F16 | Ty::F16x2 | Ty::Bf16 | Ty::Bf16x2 => half(name, ty, m),
        Ty::S32 if m.take("sat") => Some(match name {
            "add" => alu2!(|a: i32, b: i32| -> i32 { a.saturating_add(b) }),
            "sub" => alu2!(|a: i32, b: i32| -> i32 { a.saturating_sub(b) }),
            _ => return None,
        }),
        Ty::S32 if m.take("relu") => Some(match name {
            "min" => alu2!(|a: i32, b: i32| -> i32 { a.min(b).max(0) }),
            "max" => alu2!(|a: i32, b: i32| -> i32 { a.max(b).max(0) }),
            _ => return None,
        }),
        _ => integer(name, ty),
    }
}

/// `bfi` has four operands: the third is packed (from | length << 8) by the decoder.
pub fn bit_insert(ty: Ty) -> AluFn {
    if ty.bytes() == 4 {
        alu3!(|a: u32, b: u32, c: u64| -> u32 { insert(u64::from(a), u64::from(b), c, c >> 8, 32) as u32 })
    } else {
        alu3!(|a: u64, b: u64, c: u64| -> u64 { insert(a, b, c, c >> 8, 64) })
    }
}

/// (from, length) as `bit_insert` wants them.
pub fn pack_field() -> AluFn {
    alu2!(|a: u8, b: u8| -> u16 { u16::from(a) | u16::from(b) << 8 })
}
