//! Functions whose results PTX only bounds.  Here they are computed in double precision and rounded once, so their
//! error is at most 0.5 ulp (of the result's format): always within the documented bound, never the hardware's bits.
//!
//! | function | documented error (PTX ISA) |
//! |---|---|
//! | `ex2.approx.f32` | 2 ulp |
//! | `lg2.approx.f32` | 2^-22 absolute in (0.5, 2), 2^-22 relative elsewhere |
//! | `rcp.approx.f32` | 1 ulp |
//! | `rsqrt.approx.f32` | 2^-22.9 relative |
//! | `sqrt.approx.f32` | 2^-23 relative |
//! | `sin`, `cos.approx.f32` | 2^-20.5 absolute in [-π, π] |
//! | `tanh.approx.f32` | 2^-11 relative |
//! | `div.approx.f32` | 2 ulp; `div.full` 2 ulp over the full range |
//! | `tanh`, `ex2.approx.f16` | 2^-10.987, 2^-9.9 relative |
//! | `rcp`, `rsqrt.approx.ftz.f64` | 2^-20 relative; the low 32 bits are zero |

pub fn ex2(x: f32) -> f32 {
    f64::from(x).exp2() as f32
}

pub fn lg2(x: f32) -> f32 {
    f64::from(x).log2() as f32
}

pub fn rcp(x: f32) -> f32 {
    1.0 / x
}

pub fn rsqrt(x: f32) -> f32 {
    if x == 0.0 { f32::INFINITY.copysign(x) } else { (1.0 / f64::from(x).sqrt()) as f32 }
}

pub fn sin(x: f32) -> f32 {
    f64::from(x).sin() as f32
}

pub fn cos(x: f32) -> f32 {
    f64::from(x).cos() as f32
}

pub fn tanh(x: f32) -> f32 {
    f64::from(x).tanh() as f32
}

/// `div.approx`: as PTX states, infinity by a divisor whose magnitude exceeds 2^126 gives NaN, a finite number gives 0.
pub fn div(a: f32, b: f32) -> f32 {
    if b.is_finite() && b.abs() > 2f32.powi(126) {
        return if a.is_infinite() { f32::NAN } else { 0f32.copysign(a) * b.signum() };
    }
    a / b
}

/// High word only; subnormal operands and results become zero.
fn coarse(x: f64) -> f64 {
    let x = if x.is_subnormal() { 0f64.copysign(x) } else { x };
    if x.is_nan() { x } else { f64::from_bits(x.to_bits() & !0xffff_ffff) }
}

pub fn rcp_f64(x: f64) -> f64 {
    let x = if x.is_subnormal() { 0f64.copysign(x) } else { x };
    coarse(1.0 / x)
}

pub fn rsqrt_f64(x: f64) -> f64 {
    let x = if x.is_subnormal() { 0f64.copysign(x) } else { x };
    coarse(if x == 0.0 { f64::INFINITY.copysign(x) } else { 1.0 / x.sqrt() })
}
