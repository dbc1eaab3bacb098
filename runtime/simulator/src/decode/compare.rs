//! The tables of comparisons and of arithmetic with the carry flag.

// Comparisons with NaN are what is meant: `!(a >= b)` is "less or unordered".
#![allow(clippy::neg_cmp_op_on_partial_ord, clippy::double_comparisons, clippy::nonminimal_bool)]

use crate::isa::{CarryFn, CmpFn, Lanes, Ty};
use crate::math::lanes::{Flushed, Lane, flush};
use half::{bf16, f16};

macro_rules! carry {
    ($t:ty, |$a:ident, $b:ident, $c:ident, $cc:ident| $e:expr) => {{
        fn f(out: &mut Lanes, a: &Lanes, b: &Lanes, c: &Lanes, carry: u32) -> u32 {
            let mut flags = 0;
            for i in 0..32 {
                let ($a, $b, $c) = (<$t>::get(a[i]), <$t>::get(b[i]), <$t>::get(c[i]));
                let $cc = (carry >> i & 1) as $t;
                let _ = ($c, $cc);
                let (r, o): ($t, bool) = $e;
                out[i] = r.put();
                flags |= u32::from(o) << i;
            }
            flags
        }
        f as CarryFn
    }};
}

macro_rules! carries {
    ($name:expr, $t:ty, $w:ty) => {
        Some(match $name {
            "add" => carry!($t, |a, b, c, cc| a.overflowing_add(b)),
            "addc" => carry!($t, |a, b, c, cc| {
                let (s, x) = a.overflowing_add(b);
                let (s, y) = s.overflowing_add(cc);
                (s, x || y)
            }),
            "sub" => carry!($t, |a, b, c, cc| a.overflowing_sub(b)),
            "subc" => carry!($t, |a, b, c, cc| {
                let (s, x) = a.overflowing_sub(b);
                let (s, y) = s.overflowing_sub(cc);
                (s, x || y)
            }),
            "mad.lo" => carry!($t, |a, b, c, cc| a.wrapping_mul(b).overflowing_add(c)),
            "mad.hi" => carry!($t, |a, b, c, cc| ((((a as $w) * (b as $w)) >> <$t>::BITS) as $t).overflowing_add(c)),
            "madc.lo" => carry!($t, |a, b, c, cc| {
                let (s, x) = a.wrapping_mul(b).overflowing_add(c);
                let (s, y) = s.overflowing_add(cc);
                (s, x || y)
            }),
            "madc.hi" => carry!($t, |a, b, c, cc| {
                let (s, x) = ((((a as $w) * (b as $w)) >> <$t>::BITS) as $t).overflowing_add(c);
                let (s, y) = s.overflowing_add(cc);
                (s, x || y)
            }),
            _ => return None,
        })
    };
}

/// Arithmetic that reads or sets the carry flag.  `mad.hi` of signed operands multiplies as signed.
pub fn carry(name: &str, ty: Ty) -> Option<CarryFn> {
    match (ty, name) {
        (Ty::S32, "mad.hi" | "madc.hi") | (Ty::S64, "mad.hi" | "madc.hi") => None,
        (Ty::U32 | Ty::S32 | Ty::B32, _) => carries!(name, u32, u64),
        (Ty::U64 | Ty::S64 | Ty::B64, _) => carries!(name, u64, u128),
        _ => None,
    }
}

macro_rules! whole_compare {
    ($op:expr, $t:ty) => {
        match $op {
            "eq" => Some(cmp2!(|a: $t, b: $t| a == b)),
            "ne" => Some(cmp2!(|a: $t, b: $t| a != b)),
            "lt" | "lo" => Some(cmp2!(|a: $t, b: $t| a < b)),
            "le" | "ls" => Some(cmp2!(|a: $t, b: $t| a <= b)),
            "gt" | "hi" => Some(cmp2!(|a: $t, b: $t| a > b)),
            "ge" | "hs" => Some(cmp2!(|a: $t, b: $t| a >= b)),
            _ => None,
        }
    };
}

macro_rules! float_compare {
    ($op:expr, $t:ty, |$x:ident| $map:expr) => {{
        macro_rules! with {
            (|$a:ident, $b:ident| $e:expr) => {
                Some(cmp2!(|p: $t, q: $t| {
                    let ($a, $b) = (
                        {
                            let $x = p;
                            $map
                        },
                        {
                            let $x = q;
                            $map
                        },
                    );
                    $e
                }))
            };
        }
        match $op {
            "eq" => with!(|a, b| a == b),
            "ne" => with!(|a, b| a < b || a > b),
            "lt" => with!(|a, b| a < b),
            "le" => with!(|a, b| a <= b),
            "gt" => with!(|a, b| a > b),
            "ge" => with!(|a, b| a >= b),
            "equ" => with!(|a, b| !(a < b || a > b)),
            "neu" => with!(|a, b| a != b),
            "ltu" => with!(|a, b| !(a >= b)),
            "leu" => with!(|a, b| !(a > b)),
            "gtu" => with!(|a, b| !(a <= b)),
            "geu" => with!(|a, b| !(a < b)),
            "num" => with!(|a, b| !a.is_nan() && !b.is_nan()),
            "nan" => with!(|a, b| a.is_nan() || b.is_nan()),
            _ => None,
        }
    }};
}

/// The loop of a comparison.
pub fn compare(op: &str, ty: Ty, ftz: bool) -> Option<CmpFn> {
    use Ty::*;
    match ty {
        U16 | B16 => whole_compare!(op, u16),
        S16 => whole_compare!(op, i16),
        U32 | B32 => whole_compare!(op, u32),
        S32 => whole_compare!(op, i32),
        U64 | B64 => whole_compare!(op, u64),
        S64 => whole_compare!(op, i64),
        F32 if ftz => float_compare!(op, f32, |x| flush(x)),
        F32 => float_compare!(op, f32, |x| x),
        F64 => float_compare!(op, f64, |x| x),
        F16 if ftz => float_compare!(op, Flushed<f16>, |x| x.0.to_f32()),
        F16 => float_compare!(op, f16, |x| x.to_f32()),
        Bf16 => float_compare!(op, bf16, |x| x.to_f32()),
        _ => None,
    }
}

/// `testp`
pub fn test(what: &str, ty: Ty) -> Option<CmpFn> {
    macro_rules! tests {
        ($t:ty) => {
            Some(match what {
                "finite" => cmp2!(|a: $t, b: $t| {
                    let _ = b;
                    a.is_finite()
                }),
                "infinite" => cmp2!(|a: $t, b: $t| {
                    let _ = b;
                    a.is_infinite()
                }),
                "number" => cmp2!(|a: $t, b: $t| {
                    let _ = b;
                    !a.is_nan()
                }),
                "notanumber" => cmp2!(|a: $t, b: $t| {
                    let _ = b;
                    a.is_nan()
                }),
                "normal" => cmp2!(|a: $t, b: $t| {
                    let _ = b;
                    a.is_normal()
                }),
                "subnormal" => cmp2!(|a: $t, b: $t| {
                    let _ = b;
                    a.is_subnormal()
                }),
                _ => return None,
            })
        };
    }
    match ty {
        Ty::F32 => tests!(f32),
        Ty::F64 => tests!(f64),
        _ => None,
    }
}
