//! Rounding as IEEE 754 and the PTX ISA have it.
//!
//! Directed modes come from the result in double precision together with the sign of its error, which error-free
//! transformations give (Knuth's two-sum; a fused multiply-add for products, quotients and roots).  Results in f32 are
//! exact in every mode.  In f64 they are exact while the error itself is a normal number (results above 2^-969).

/// Rounding modes: nearest even, towards zero, down, up, nearest with ties away from zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Round {
    Nearest,
    Zero,
    Down,
    Up,
    Away,
}

pub const RN: u8 = 0;
pub const RZ: u8 = 1;
pub const RM: u8 = 2;
pub const RP: u8 = 3;

impl Round {
    pub const fn of(code: u8) -> Round {
        match code {
            RZ => Round::Zero,
            RM => Round::Down,
            RP => Round::Up,
            _ => Round::Nearest,
        }
    }
}

/// A sum as (rounded, error).
pub fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let s = a + b;
    if !s.is_finite() {
        return (s, 0.0);
    }
    let bb = s - a;
    (s, (a - (s - bb)) + (b - bb))
}

/// The f32 nearest to `s + e` by `mode`, where `e` is tiny beside `s`.
pub fn to_f32(s: f64, e: f64, mode: Round) -> f32 {
    let r = s as f32;
    if r.is_nan() || s.is_infinite() {
        return r;
    }
    let wide = f64::from(r);
    let above = s > wide || (s == wide && e > 0.0); // the exact value is above r
    let below = s < wide || (s == wide && e < 0.0);
    match mode {
        Round::Nearest | Round::Away => r,
        Round::Down => {
            if below {
                r.next_down()
            } else {
                r
            }
        }
        Round::Up => {
            if above {
                r.next_up()
            } else {
                r
            }
        }
        Round::Zero => {
            if below && wide > 0.0 {
                r.next_down()
            } else if above && wide < 0.0 {
                r.next_up()
            } else {
                r
            }
        }
    }
}

/// `r` is the nearest f64, `e` the sign of what is missing.
pub fn adjust(r: f64, e: f64, mode: Round) -> f64 {
    if r.is_nan() {
        return r;
    }
    match mode {
        Round::Down if e < 0.0 => r.next_down(),
        Round::Up if e > 0.0 => r.next_up(),
        Round::Zero if e < 0.0 && r > 0.0 => r.next_down(),
        Round::Zero if e > 0.0 && r < 0.0 => r.next_up(),
        _ => r,
    }
}

/// Exact sums that are zero are -0 when rounding down, unless both were +0.
fn zero_sum(a: f64, b: f64, mode: Round) -> f64 {
    if mode == Round::Down && !(a.is_sign_positive() && b.is_sign_positive() && a == 0.0) { -0.0 } else { a + b }
}

pub fn add_f32(a: f32, b: f32, mode: Round) -> f32 {
    let (a, b) = (f64::from(a), f64::from(b));
    let (s, e) = two_sum(a, b);
    if s == 0.0 { zero_sum(a, b, mode) as f32 } else { to_f32(s, e, mode) }
}

pub fn mul_f32(a: f32, b: f32, mode: Round) -> f32 {
    to_f32(f64::from(a) * f64::from(b), 0.0, mode)
}

pub fn fma_f32(a: f32, b: f32, c: f32, mode: Round) -> f32 {
    let (p, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let (s, e) = two_sum(p, c);
    if s == 0.0 { zero_sum(p, c, mode) as f32 } else { to_f32(s, e, mode) }
}

pub fn div_f32(a: f32, b: f32, mode: Round) -> f32 {
    if mode == Round::Nearest {
        return a / b;
    }
    let (a, b) = (f64::from(a), f64::from(b));
    let q = a / b;
    let e = if q.is_finite() { (-q).mul_add(b, a) * b.signum() } else { 0.0 };
    to_f32(q, e, mode)
}

pub fn sqrt_f32(a: f32, mode: Round) -> f32 {
    if mode == Round::Nearest {
        return a.sqrt();
    }
    let a = f64::from(a);
    let r = a.sqrt();
    let e = if r.is_finite() { (-r).mul_add(r, a) } else { 0.0 };
    to_f32(r, e, mode)
}

pub fn add_f64(a: f64, b: f64, mode: Round) -> f64 {
    let (s, e) = two_sum(a, b);
    if s.is_infinite() && a.is_finite() && b.is_finite() {
        return overflow(s, mode);
    }
    if s == 0.0 { zero_sum(a, b, mode) } else { adjust(s, e, mode) }
}

fn overflow(s: f64, mode: Round) -> f64 {
    match mode {
        Round::Zero => f64::MAX.copysign(s),
        Round::Down if s > 0.0 => f64::MAX,
        Round::Up if s < 0.0 => f64::MIN,
        _ => s,
    }
}

pub fn mul_f64(a: f64, b: f64, mode: Round) -> f64 {
    let p = a * b;
    if p.is_infinite() && a.is_finite() && b.is_finite() {
        return overflow(p, mode);
    }
    adjust(p, a.mul_add(b, -p), mode)
}

pub fn fma_f64(a: f64, b: f64, c: f64, mode: Round) -> f64 {
    let r = a.mul_add(b, c);
    if mode == Round::Nearest {
        return r;
    }
    let p = a * b;
    if r.is_infinite() && p.is_finite() && c.is_finite() {
        return overflow(r, mode);
    }
    if !p.is_finite() || !r.is_finite() {
        return r;
    }
    if r == 0.0 {
        return zero_sum(p, c, mode);
    }
    // Error of a fused multiply-add (Boldo and Muller): exact as a sum of two; its sign is that of the sum.
    let low = a.mul_add(b, -p);
    let (alpha1, alpha2) = two_sum(c, low);
    let (beta1, beta2) = two_sum(p, alpha1);
    let gamma = (beta1 - r) + beta2;
    adjust(r, gamma + alpha2, mode)
}

pub fn div_f64(a: f64, b: f64, mode: Round) -> f64 {
    let q = a / b;
    if !q.is_finite() || mode == Round::Nearest {
        return if q.is_infinite() && a.is_finite() && b != 0.0 { overflow(q, mode) } else { q };
    }
    adjust(q, (-q).mul_add(b, a) * b.signum(), mode)
}

pub fn sqrt_f64(a: f64, mode: Round) -> f64 {
    let r = a.sqrt();
    if r.is_finite() && mode != Round::Nearest { adjust(r, (-r).mul_add(r, a), mode) } else { r }
}

/// `a + b` rounded to odd in f64: rounding that once more to at most 51 bits is as if rounded once.
pub fn sum_to_odd(a: f64, b: f64) -> f64 {
    let (s, e) = two_sum(a, b);
    if e == 0.0 || s.to_bits() & 1 == 1 {
        return s;
    }
    if (e > 0.0) == (s > 0.0) { f64::from_bits(s.to_bits() + 1) } else { f64::from_bits(s.to_bits() - 1) }
}

/// A binary format below f32.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// Stored bits of the fraction.
    pub fraction: i32,
    /// Exponent of the smallest normal number.
    pub least: i32,
    /// Largest finite value.
    pub max: f64,
}

pub const F16: Format = Format { fraction: 10, least: -14, max: 65504.0 };
pub const BF16: Format = Format { fraction: 7, least: -126, max: 3.3895313892515355e38 };
pub const TF32: Format = Format { fraction: 10, least: -126, max: 3.4011621342146535e38 };
pub const E4M3: Format = Format { fraction: 3, least: -6, max: 448.0 };
pub const E5M2: Format = Format { fraction: 2, least: -14, max: 57344.0 };

/// `x` rounded to a format; overflow gives infinity or the largest value, as the mode says.
pub fn to_format(x: f64, f: Format, mode: Round) -> f64 {
    if !x.is_finite() || x == 0.0 {
        return x;
    }
    let exponent = ((x.to_bits() >> 52 & 0x7ff) as i32 - 1023).max(f.least);
    let unit = 2f64.powi(exponent - f.fraction);
    let scaled = x / unit; // a power of two: exact
    let whole = match mode {
        Round::Nearest => scaled.round_ties_even(),
        Round::Zero => scaled.trunc(),
        Round::Down => scaled.floor(),
        Round::Up => scaled.ceil(),
        Round::Away => scaled.round(),
    };
    let r = (whole * unit).copysign(x);
    if r.abs() <= f.max {
        return r;
    }
    match mode {
        Round::Zero => f.max.copysign(x),
        Round::Down if x > 0.0 => f.max,
        Round::Up if x < 0.0 => -f.max,
        _ => f64::INFINITY.copysign(x),
    }
}

/// A whole number by `mode`.
pub fn to_whole(x: f64, mode: Round) -> f64 {
    match mode {
        Round::Nearest => x.round_ties_even(),
        Round::Zero => x.trunc(),
        Round::Down => x.floor(),
        Round::Up => x.ceil(),
        Round::Away => x.round(),
    }
}
