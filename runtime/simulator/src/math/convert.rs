//! `cvt` in all its forms, one lane at a time, and the fast loops for its common ones.

use super::round::{self, Round, to_format, to_whole};
use crate::isa::{AluFn, Lanes, Ty};
use half::{bf16, f16};

/// A conversion as its suffixes say.
#[derive(Clone, Copy, Debug)]
pub struct Convert {
    pub to: Ty,
    pub from: Ty,
    pub mode: Round,
    /// Round to a whole number (`.rni` …).
    pub whole: bool,
    pub ftz: bool,
    pub sat: bool,
    pub relu: bool,
    /// Overflow gives the largest finite value.
    pub finite: bool,
}

/// A source value, exact.
#[derive(Clone, Copy)]
enum Value {
    Int(i128),
    Float(f64),
}

fn read(bits: u64, ty: Ty) -> Value {
    use Ty::*;
    match ty {
        U8 | B8 => Value::Int(i128::from(bits as u8)),
        U16 | B16 => Value::Int(i128::from(bits as u16)),
        U32 | B32 => Value::Int(i128::from(bits as u32)),
        S8 => Value::Int(i128::from(bits as i8)),
        S16 => Value::Int(i128::from(bits as i16)),
        S32 => Value::Int(i128::from(bits as i32)),
        S64 => Value::Int(i128::from(bits as i64)),
        F16 => Value::Float(f16::from_bits(bits as u16).to_f64()),
        Bf16 => Value::Float(bf16::from_bits(bits as u16).to_f64()),
        F32 | Tf32 => Value::Float(f64::from(f32::from_bits(bits as u32))),
        F64 => Value::Float(f64::from_bits(bits)),
        _ => Value::Int(i128::from(bits)),
    }
}

/// Range of an integer type.
fn range(ty: Ty) -> (i128, i128) {
    let bits = ty.bits();
    if ty.signed() { (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) } else { (0, (1 << bits) - 1) }
}

fn mask(ty: Ty) -> u64 {
    if ty.bits() >= 64 { u64::MAX } else { (1 << ty.bits()) - 1 }
}

/// Bits of `x` in an 8-bit float; NaN is all ones below the sign.
fn to_fp8(x: f64, ty: Ty, relu: bool) -> u64 {
    let (f, bias, nan, top) = match ty {
        Ty::E4m3x2 => (round::E4M3, 7, 0x7f, 448.0),
        _ => (round::E5M2, 15, 0x7f, 57344.0),
    };
    if x.is_nan() {
        return nan;
    }
    let x = if relu && x < 0.0 { 0.0 } else { x };
    // Always `.satfinite`.
    let r = to_format(x, f, Round::Nearest).clamp(-top, top);
    let sign = u64::from(r.is_sign_negative()) << 7;
    if r == 0.0 {
        return sign;
    }
    let exponent = ((r.abs().to_bits() >> 52) as i32 - 1023).max(f.least);
    let whole = (r.abs() / 2f64.powi(exponent - f.fraction)) as u64;
    // A subnormal has no implied one: adding the field of its exponent, 0 then, is the same formula.
    sign | ((((exponent + bias - 1) as u64) << f.fraction) + whole)
}

pub fn from_fp8(bits: u64, ty: Ty) -> f64 {
    let (fraction, bias) = if ty == Ty::E4m3x2 { (3, 7) } else { (2, 15) };
    let sign = if bits >> 7 & 1 == 1 { -1.0 } else { 1.0 };
    let e = (bits & 0x7f) >> fraction;
    let m = bits & ((1 << fraction) - 1);
    if ty == Ty::E4m3x2 && bits & 0x7f == 0x7f {
        return f64::NAN;
    }
    if ty == Ty::E5m2x2 && e == 31 {
        return if m == 0 { sign * f64::INFINITY } else { f64::NAN };
    }
    let scale = 2f64.powi(if e == 0 { 1 - bias - fraction } else { e as i32 - bias - fraction });
    sign * scale * (m | if e == 0 { 0 } else { 1 << fraction }) as f64
}

impl Convert {
    fn finish(&self, x: f64) -> f64 {
        let mut x = x;
        if self.sat {
            x = if x > 0.0 { x.min(1.0) } else { 0.0 };
        }
        if self.relu && x <= 0.0 {
            x = 0.0;
        }
        x
    }

    /// Bits of a float of the target type; `e` is the sign of what `x` lacks to be exact.
    fn float(&self, x: f64, e: f64) -> u64 {
        let x = self.finish(x);
        let small = |f: round::Format| {
            let r = to_format(x, f, self.mode);
            if self.finite && x.is_infinite() | r.is_infinite() { f.max.copysign(r) } else { r }
        };
        match self.to {
            Ty::F32 => {
                if x.is_nan() {
                    return 0x7fff_ffff;
                }
                let mut r = round::to_f32(x, e, self.mode);
                if self.ftz {
                    r = super::lanes::flush(r);
                }
                u64::from(r.to_bits())
            }
            Ty::F64 => x.to_bits(),
            Ty::F16 if x.is_nan() => 0x7fff,
            Ty::F16 => u64::from(f16::from_f64(small(round::F16)).to_bits()),
            Ty::Bf16 if x.is_nan() => 0x7fff,
            Ty::Bf16 => u64::from(bf16::from_f64(small(round::BF16)).to_bits()),
            Ty::Tf32 if x.is_nan() => 0x7fff_ffff,
            Ty::Tf32 => u64::from((small(round::TF32) as f32).to_bits()),
            _ => 0,
        }
    }

    /// One lane.
    pub fn lane(&self, bits: u64) -> u64 {
        let mut v = read(bits, self.from);
        if let Value::Float(x) = &mut v
            && self.ftz
            && self.from == Ty::F32
        {
            *x = f64::from(super::lanes::flush(*x as f32));
        }
        match (v, self.to.float()) {
            (Value::Int(i), false) => {
                let (low, high) = range(self.to);
                (if self.sat { i.clamp(low, high) } else { i }) as u64 & mask(self.to)
            }
            (Value::Int(i), true) => {
                // i has at most 64 bits: f64 may lack some; what it lacks decides directed modes.
                let x = i as f64;
                let e = (i - x as i128) as f64;
                if self.to == Ty::F64 {
                    return round::adjust(x, e, self.mode).to_bits();
                }
                // To odd, so that the second rounding is the only one that counts.
                let odd = round::sum_to_odd(x, e);
                self.float(odd, 0.0)
            }
            (Value::Float(x), false) => {
                if x.is_nan() {
                    return match self.to {
                        // As the hardware has it for 64-bit targets of f32 and f64.
                        Ty::S64 | Ty::U64 => 1 << 63,
                        _ => 0,
                    };
                }
                let (low, high) = range(self.to);
                let w = to_whole(x, self.mode);
                // `as` saturates to i128, which holds both ends of every range.
                (w as i128).clamp(low, high) as u64 & mask(self.to)
            }
            (Value::Float(x), true) => {
                let x = if self.whole { to_whole(x, self.mode) } else { x };
                if self.from == self.to && !self.whole && !self.sat && !self.relu {
                    return bits & mask(self.to);
                }
                self.float(x, 0.0)
            }
        }
    }

    /// Two f32 into a pair, the first operand in the upper half.
    pub fn pair(&self, high: u64, low: u64) -> u64 {
        let one = |bits: u64| {
            let x = f64::from(f32::from_bits(bits as u32));
            match self.to {
                Ty::F16x2 => Convert { to: Ty::F16, ..*self }.lane(bits),
                Ty::Bf16x2 => Convert { to: Ty::Bf16, ..*self }.lane(bits),
                _ => to_fp8(x, self.to, self.relu),
            }
        };
        let half = if matches!(self.to, Ty::E4m3x2 | Ty::E5m2x2) { 8 } else { 16 };
        one(high) << half | one(low)
    }

    /// The loop of a common conversion.
    pub fn fast(&self) -> Option<AluFn> {
        use Ty::*;
        if self.sat || self.relu || self.finite || self.ftz {
            return None;
        }
        let (to, from) = (self.to, self.from);
        if !to.float() && !from.float() {
            return Some(match (from, to.bytes()) {
                (S8, 2) => alu1!(|a: i8| -> i16 { i16::from(a) }),
                (S8, 4) => alu1!(|a: i8| -> i32 { i32::from(a) }),
                (S8, 8) => alu1!(|a: i8| -> i64 { i64::from(a) }),
                (S16, 4) => alu1!(|a: i16| -> i32 { i32::from(a) }),
                (S16, 8) => alu1!(|a: i16| -> i64 { i64::from(a) }),
                (S32, 8) => alu1!(|a: i32| -> i64 { i64::from(a) }),
                (U8 | B8, 2..) => alu1!(|a: u8| -> u8 { a }),
                (U16 | B16, 4..) => alu1!(|a: u16| -> u16 { a }),
                (U32 | B32, 8..) => alu1!(|a: u32| -> u32 { a }),
                (_, 1) => alu1!(|a: u8| -> u8 { a }),
                (_, 2) => alu1!(|a: u16| -> u16 { a }),
                (_, 4) => alu1!(|a: u32| -> u32 { a }),
                _ => alu1!(|a: u64| -> u64 { a }),
            });
        }
        Some(match (to, from, self.mode, self.whole) {
            (F32, S32, Round::Nearest, _) => alu1!(|a: i32| -> f32 { a as f32 }),
            (F32, U32, Round::Nearest, _) => alu1!(|a: u32| -> f32 { a as f32 }),
            (F32, S64, Round::Nearest, _) => alu1!(|a: i64| -> f32 { a as f32 }),
            (F32, U64, Round::Nearest, _) => alu1!(|a: u64| -> f32 { a as f32 }),
            (F64, S32, ..) => alu1!(|a: i32| -> f64 { f64::from(a) }),
            (F64, U32, ..) => alu1!(|a: u32| -> f64 { f64::from(a) }),
            (S32, F32, Round::Zero, _) => alu1!(|a: f32| -> i32 { a as i32 }),
            (U32, F32, Round::Zero, _) => alu1!(|a: f32| -> u32 { a as u32 }),
            (F64, F32, _, false) => alu1!(|a: f32| -> f64 { f64::from(a) }),
            (F32, F64, Round::Nearest, false) => alu1!(|a: f64| -> f32 { a as f32 }),
            (F32, F16, _, false) => alu1!(|a: f16| -> f32 { a.to_f32() }),
            (F32, Bf16, _, false) => alu1!(|a: bf16| -> f32 { a.to_f32() }),
            (F16, F32, Round::Nearest, false) => alu1!(|a: f32| -> f16 { f16::from_f32(a) }),
            (Bf16, F32, Round::Nearest, false) => alu1!(|a: f32| -> bf16 { bf16::from_f32(a) }),
            _ => return None,
        })
    }

    /// The loop of a common conversion of two f32 into a pair.
    pub fn fast_pair(&self) -> Option<AluFn> {
        if self.relu || self.finite || self.ftz || self.mode != Round::Nearest {
            return None;
        }
        match self.to {
            Ty::F16x2 => Some(alu2!(|a: f32, b: f32| -> [f16; 2] { [f16::from_f32(b), f16::from_f32(a)] })),
            Ty::Bf16x2 => Some(alu2!(|a: f32, b: f32| -> [bf16; 2] { [bf16::from_f32(b), bf16::from_f32(a)] })),
            _ => None,
        }
    }

    /// All lanes, the slow way.
    pub fn all(&self, out: &mut Lanes, a: &Lanes, b: &Lanes) {
        match self.to {
            Ty::F16x2 | Ty::Bf16x2 | Ty::E4m3x2 | Ty::E5m2x2 if self.from == Ty::F32 => {
                for i in 0..32 {
                    out[i] = self.pair(a[i], b[i]);
                }
            }
            Ty::F16x2 => {
                for i in 0..32 {
                    let one = |bits: u64| u64::from(f16::from_f64(from_fp8(bits & 0xff, self.from)).to_bits());
                    out[i] = one(a[i]) | one(a[i] >> 8) << 16;
                }
            }
            _ => {
                for i in 0..32 {
                    out[i] = self.lane(a[i]);
                }
            }
        }
    }
}
