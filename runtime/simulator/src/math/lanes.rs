//! Values of a lane and the macros that make loops over 32 of them.

use crate::isa::Lanes;
use half::{bf16, f16};

/// A type that a lane's 64 bits can hold.
pub trait Lane: Copy {
    fn get(bits: u64) -> Self;
    fn put(self) -> u64;
}

macro_rules! integers {
    ($($t:ty: $u:ty),*) => { $(
        impl Lane for $t {
            #[inline(always)]
            fn get(bits: u64) -> $t { bits as $t }
            #[inline(always)]
            fn put(self) -> u64 { self as $u as u64 }
        }
    )* };
}
integers!(u8: u8, u16: u16, u32: u32, u64: u64, i8: u8, i16: u16, i32: u32, i64: u64);

impl Lane for f32 {
    #[inline(always)]
    fn get(bits: u64) -> f32 {
        f32::from_bits(bits as u32)
    }
    /// NaN results have one form in PTX.
    #[inline(always)]
    fn put(self) -> u64 {
        if self.is_nan() { 0x7fff_ffff } else { u64::from(self.to_bits()) }
    }
}

impl Lane for f64 {
    #[inline(always)]
    fn get(bits: u64) -> f64 {
        f64::from_bits(bits)
    }
    #[inline(always)]
    fn put(self) -> u64 {
        if self.is_nan() { 0x7ff8_0000_0000_0000 } else { self.to_bits() }
    }
}

impl Lane for f16 {
    #[inline(always)]
    fn get(bits: u64) -> f16 {
        f16::from_bits(bits as u16)
    }
    #[inline(always)]
    fn put(self) -> u64 {
        if self.is_nan() { 0x7fff } else { u64::from(self.to_bits()) }
    }
}

impl Lane for bf16 {
    #[inline(always)]
    fn get(bits: u64) -> bf16 {
        bf16::from_bits(bits as u16)
    }
    #[inline(always)]
    fn put(self) -> u64 {
        if self.is_nan() { 0x7fff } else { u64::from(self.to_bits()) }
    }
}

/// A 16-bit float whose subnormal numbers count as zeros of the same sign, where it is read and where it is written: `.ftz`.
#[derive(Clone, Copy)]
pub struct Flushed<T>(pub T);

macro_rules! flushed {
    ($($t:ty),*) => { $(
        impl Lane for Flushed<$t> {
            #[inline(always)]
            fn get(bits: u64) -> Self {
                let x = <$t>::get(bits);
                let zero = x.classify() == std::num::FpCategory::Subnormal;
                Flushed(if zero { <$t>::from_bits(x.to_bits() & 0x8000) } else { x })
            }
            #[inline(always)]
            fn put(self) -> u64 {
                Self::get(self.0.put()).0.put()
            }
        }
    )* };
}
flushed!(f16, bf16);

/// A packed pair, the first in the low half.
impl<T: Lane> Lane for [T; 2] {
    #[inline(always)]
    fn get(bits: u64) -> [T; 2] {
        [T::get(bits & 0xffff), T::get(bits >> 16 & 0xffff)]
    }
    #[inline(always)]
    fn put(self) -> u64 {
        self[0].put() | self[1].put() << 16
    }
}

/// A result of one operand: `alu1!(|a: u32| -> u32 { … })`.
macro_rules! alu1 {
    (|$a:ident: $t:ty| -> $r:ty $body:block) => {{
        fn f(out: &mut $crate::isa::Lanes, a: &$crate::isa::Lanes, _: &$crate::isa::Lanes, _: &$crate::isa::Lanes) {
            for i in 0..32 {
                let $a = <$t as $crate::math::lanes::Lane>::get(a[i]);
                let r: $r = $body;
                out[i] = $crate::math::lanes::Lane::put(r);
            }
        }
        f as $crate::isa::AluFn
    }};
}

/// A result of two operands, which may differ in type.
macro_rules! alu2 {
    (|$a:ident: $t:ty, $b:ident: $u:ty| -> $r:ty $body:block) => {{
        fn f(out: &mut $crate::isa::Lanes, a: &$crate::isa::Lanes, b: &$crate::isa::Lanes, _: &$crate::isa::Lanes) {
            for i in 0..32 {
                let $a = <$t as $crate::math::lanes::Lane>::get(a[i]);
                let $b = <$u as $crate::math::lanes::Lane>::get(b[i]);
                let r: $r = $body;
                out[i] = $crate::math::lanes::Lane::put(r);
            }
        }
        f as $crate::isa::AluFn
    }};
}

/// A result of three operands.
macro_rules! alu3 {
    (|$a:ident: $t:ty, $b:ident: $u:ty, $c:ident: $v:ty| -> $r:ty $body:block) => {{
        fn f(out: &mut $crate::isa::Lanes, a: &$crate::isa::Lanes, b: &$crate::isa::Lanes, c: &$crate::isa::Lanes) {
            for i in 0..32 {
                let $a = <$t as $crate::math::lanes::Lane>::get(a[i]);
                let $b = <$u as $crate::math::lanes::Lane>::get(b[i]);
                let $c = <$v as $crate::math::lanes::Lane>::get(c[i]);
                let r: $r = $body;
                out[i] = $crate::math::lanes::Lane::put(r);
            }
        }
        f as $crate::isa::AluFn
    }};
}

/// A comparison as a mask.
macro_rules! cmp2 {
    (|$a:ident: $t:ty, $b:ident: $u:ty| $body:expr) => {{
        fn f(a: &$crate::isa::Lanes, b: &$crate::isa::Lanes) -> u32 {
            let mut flags = [0u32; 32];
            for i in 0..32 {
                let $a = <$t as $crate::math::lanes::Lane>::get(a[i]);
                let $b = <$u as $crate::math::lanes::Lane>::get(b[i]);
                let r: bool = $body;
                flags[i] = u32::from(r) << i;
            }
            flags.iter().fold(0, |m, f| m | f)
        }
        f as $crate::isa::CmpFn
    }};
}

/// Subnormal numbers become zeros of the same sign.
#[inline(always)]
pub fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// Clamped to [0, 1]; NaN becomes 0.
#[inline(always)]
pub fn saturate(x: f32) -> f32 {
    if x > 0.0 { x.min(1.0) } else { 0.0 }
}

/// `f` of f32 lanes with the modifiers `.ftz` and `.sat`.
#[inline(always)]
pub fn map_f32<const FTZ: bool, const SAT: bool>(
    out: &mut Lanes,
    a: &Lanes,
    b: &Lanes,
    c: &Lanes,
    f: impl Fn(f32, f32, f32) -> f32,
) {
    let get = |bits: u64| {
        let x = f32::get(bits);
        if FTZ { flush(x) } else { x }
    };
    for i in 0..32 {
        let mut r = f(get(a[i]), get(b[i]), get(c[i]));
        if FTZ {
            r = flush(r);
        }
        if SAT {
            r = saturate(r);
        }
        out[i] = r.put();
    }
}
