//! Vectorised unary functions over slices, and the one-lane forms that other kernels fuse into their loops.
//!
//! `lane::*` are branch-free scalar functions generic over pulp's instruction set `S`; inlined into a loop inside
//! `simd::dispatch` they become vector code.  exp: Cody-Waite reduction and a degree-6 polynomial; log: fdlibm's
//! `logf` series; tanh: Cephes.  Errors are at most about 2 ulp (sin and cos: 2 ulp near zero, 1e-7 absolute).
//! Invariant: the slice functions do not allocate and do not start threads.

// Index loops over several arrays at once read like the formulas.
#![allow(clippy::needless_range_loop)]

use crate::simd::dispatch;
use pulp::{Simd, WithSimd};

/// Declares a function whose body is compiled once per instruction set and dispatched at run time.
/// The lifetime is shared by all borrowed arguments; `S: Simd` is in scope in the body.
macro_rules! simd_fn {
    (@ret) => { () };
    (@ret $ret:ty) => { $ret };
    ($(#[$m:meta])* $vis:vis fn $name:ident<$l:lifetime, $S:ident>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$m])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name<$l>($($arg: $ty),*) $(-> $ret)? {
            struct Op<$l> { $($arg: $ty,)* life: std::marker::PhantomData<&$l ()> }
            impl<$l> pulp::WithSimd for Op<$l> {
                type Output = $crate::kernels::vmath::simd_fn!(@ret $($ret)?);
                #[inline(always)]
                fn with_simd<$S: pulp::Simd>(self, _simd: $S) -> Self::Output {
                    let Self { $($arg,)* .. } = self;
                    $body
                }
            }
            $crate::simd::dispatch(Op { $($arg,)* life: std::marker::PhantomData })
        }
    };
}
pub(crate) use simd_fn;

/// One-lane functions.  Call them inside a dispatched loop.
pub mod lane {
    use pulp::Simd;

    /// `a * b + c`, fused where the instruction set fuses.
    #[inline(always)]
    pub fn fma<S: Simd>(a: f32, b: f32, c: f32) -> f32 {
        if S::IS_SCALAR { a * b + c } else { a.mul_add(b, c) }
    }

    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer held in the low bits
    const LN2_HI: f32 = 0.693_145_75; // 15 leading bits of ln 2, so that n * LN2_HI is exact
    const LN2_LO: f32 = 1.428_606_8e-6;

    #[inline(always)]
    fn pow2(n: i32) -> f32 {
        f32::from_bits((n.wrapping_add(127) << 23) as u32)
    }

    /// e^x.
    #[inline(always)]
    pub fn exp<S: Simd>(x: f32) -> f32 {
        // Comparisons written so that NaN passes through; beyond the bounds the result is 0 or inf anyway.
        let x = if x < -105.0 { -105.0 } else { x };
        let x = if x > 90.0 { 90.0 } else { x };
        let shifted = fma::<S>(x, std::f32::consts::LOG2_E, MAGIC);
        let n = (shifted.to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32);
        let nf = shifted - MAGIC;
        let r = fma::<S>(nf, -LN2_HI, x);
        let r = fma::<S>(nf, -LN2_LO, r);
        let mut p = 1.987_569_1e-4;
        p = fma::<S>(p, r, 1.398_2e-3);
        p = fma::<S>(p, r, 8.333_452e-3);
        p = fma::<S>(p, r, 4.166_579_6e-2);
        p = fma::<S>(p, r, 1.666_666_5e-1);
        p = fma::<S>(p, r, 0.5);
        let p = fma::<S>(p * r, r, r) + 1.0;
        // Two factors: 2^n alone may be outside the normal range.  NaN gives a wild n, masked by p = NaN.
        let half = n >> 1;
        p * pow2(half) * pow2(n.wrapping_sub(half))
    }

    /// Natural logarithm.
    #[inline(always)]
    pub fn log<S: Simd>(x: f32) -> f32 {
        let tiny = x < f32::MIN_POSITIVE;
        let scaled = if tiny { x * 8_388_608.0 } else { x };
        let bits = (scaled.to_bits() as i32).wrapping_sub(0x3f35_04f3);
        let e = (bits >> 23) as f32 - if tiny { 23.0 } else { 0.0 };
        let f = f32::from_bits((bits & 0x007f_ffff).wrapping_add(0x3f35_04f3) as u32) - 1.0;
        let s = f / (2.0 + f);
        let z = s * s;
        let w = z * z;
        let t1 = w * fma::<S>(w, 0.242_790_79, 0.400_009_72);
        let t2 = z * fma::<S>(w, 0.284_987_87, 0.666_666_6);
        let hfsq = 0.5 * f * f;
        let y = s * (hfsq + (t1 + t2)) + e * 9.058e-6 - hfsq + f + e * 6.931_381e-1;
        let y = if x == 0.0 { f32::NEG_INFINITY } else { y };
        let y = if x < 0.0 { f32::NAN } else { y };
        if x < f32::INFINITY { y } else { x } // inf and NaN are their own logarithm
    }

    /// log(1 + u) for u in [0, 1].
    #[inline(always)]
    pub fn log1p_unit<S: Simd>(u: f32) -> f32 {
        let w = 1.0 + u;
        // The part of u that rounding w lost, to first order.
        log::<S>(w) + (u - (w - 1.0)) / w
    }

    /// (sigmoid(x), 1 - sigmoid(x)), both accurate in both tails.
    #[inline(always)]
    pub fn sigmoids<S: Simd>(x: f32) -> (f32, f32) {
        let e = exp::<S>(-x.abs());
        let large = 1.0 / (1.0 + e);
        let small = e * large;
        if x < 0.0 { (small, large) } else { (large, small) }
    }

    /// 1 / (1 + e^-x).
    #[inline(always)]
    pub fn sigmoid<S: Simd>(x: f32) -> f32 {
        sigmoids::<S>(x).0
    }

    /// x * sigmoid(x).
    #[inline(always)]
    pub fn silu<S: Simd>(x: f32) -> f32 {
        let x = if x < -200.0 { -200.0 } else { x }; // -inf would give -inf * 0
        x * sigmoid::<S>(x)
    }

    /// (silu(x), its derivative s + x s (1 - s)).
    #[inline(always)]
    pub fn silu_with_derivative<S: Simd>(x: f32) -> (f32, f32) {
        let low = if x < -200.0 { -200.0 } else { x };
        let (s, c) = sigmoids::<S>(low);
        let bounded = if low > 200.0 { 200.0 } else { low }; // inf * 0 again
        (low * s, s * fma::<S>(bounded, c, 1.0))
    }

    /// Derivative of silu.
    #[inline(always)]
    pub fn dsilu<S: Simd>(x: f32) -> f32 {
        silu_with_derivative::<S>(x).1
    }

    /// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|).
    #[inline(always)]
    pub fn softplus<S: Simd>(x: f32) -> f32 {
        let relu = if x < 0.0 { 0.0 } else { x };
        relu + log1p_unit::<S>(exp::<S>(-x.abs()))
    }

    #[inline(always)]
    pub fn tanh<S: Simd>(x: f32) -> f32 {
        let a = x.abs();
        let z = x * x;
        let mut p = -5.704_988_5e-3;
        p = fma::<S>(p, z, 2.063_909e-2);
        p = fma::<S>(p, z, -5.373_971_7e-2);
        p = fma::<S>(p, z, 1.333_144_2e-1);
        p = fma::<S>(p, z, -3.333_328e-1);
        let small = fma::<S>(p * z, x, x);
        let e = exp::<S>(2.0 * a);
        let large = (1.0 - 2.0 / (e + 1.0)).copysign(x);
        if a < 0.625 { small } else { large }
    }

    /// (sin x, cos x) for |x| <= `TRIG_MAX`.
    #[inline(always)]
    pub fn sincos<S: Simd>(x: f32) -> (f32, f32) {
        let shifted = fma::<S>(x, std::f32::consts::FRAC_2_PI, MAGIC);
        let q = shifted.to_bits();
        let n = shifted - MAGIC;
        // pi/2 in three parts (Cephes' DP1..DP3 doubled); the leading ones are short, so their products are exact.
        let r = fma::<S>(n, -1.570_312_5, x);
        let r = fma::<S>(n, -4.837_513e-4, r);
        let r = fma::<S>(n, -7.549_79e-8, r);
        let z = r * r;
        let mut s = -1.951_529_6e-4;
        s = fma::<S>(s, z, 8.332_161e-3);
        s = fma::<S>(s, z, -1.666_665_5e-1);
        let s = fma::<S>(s * z, r, r);
        let mut c = 2.443_315_7e-5;
        c = fma::<S>(c, z, -1.388_731_6e-3);
        c = fma::<S>(c, z, 4.166_664_6e-2);
        let c = fma::<S>(c * z, z, fma::<S>(-0.5, z, 1.0));
        let (sin, cos) = if q & 1 == 0 { (s, c) } else { (c, s) };
        let sin = f32::from_bits(sin.to_bits() ^ ((q & 2) << 30));
        let cos = f32::from_bits(cos.to_bits() ^ ((q.wrapping_add(1) & 2) << 30));
        (sin, cos)
    }

    /// Largest argument whose reduction in `sincos` is accurate.
    pub const TRIG_MAX: f32 = 8192.0;
}

/// Reductions to inline into a dispatched loop: `W` independent lanes, joined pairwise, so the order of additions
/// depends on the length alone.
pub(crate) mod fold {
    use super::lane;
    use pulp::Simd;

    /// Enough running results to fill the pipelines of the widest machine.
    const W: usize = 64;

    #[inline(always)]
    fn join(mut acc: [f32; W], f: impl Fn(f32, f32) -> f32) -> f32 {
        let mut width = W / 2;
        while width > 0 {
            for i in 0..width {
                acc[i] = f(acc[i], acc[i + width]);
            }
            width /= 2;
        }
        acc[0]
    }

    /// Sum of f(x) over a slice.
    #[inline(always)]
    fn sum_of(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
        let mut acc = [0.0; W];
        let (blocks, rest) = x.as_chunks::<W>();
        for x in blocks {
            for i in 0..W {
                acc[i] += f(x[i]);
            }
        }
        for (a, &x) in acc.iter_mut().zip(rest) {
            *a += f(x);
        }
        join(acc, |a, b| a + b)
    }

    /// Sum of products.
    #[inline(always)]
    pub fn dot<S: Simd>(x: &[f32], y: &[f32]) -> f32 {
        assert_eq!(x.len(), y.len());
        let mut acc = [0.0; W];
        let ((xs, xr), (ys, yr)) = (x.as_chunks::<W>(), y.as_chunks::<W>());
        for (x, y) in xs.iter().zip(ys) {
            for i in 0..W {
                acc[i] = lane::fma::<S>(x[i], y[i], acc[i]);
            }
        }
        for ((a, &x), &y) in acc.iter_mut().zip(xr).zip(yr) {
            *a = lane::fma::<S>(x, y, *a);
        }
        join(acc, |a, b| a + b)
    }

    #[inline(always)]
    pub fn sum(x: &[f32]) -> f32 {
        sum_of(x, |x| x)
    }

    /// Sum of e^(x - shift).
    #[inline(always)]
    pub fn sum_exp<S: Simd>(x: &[f32], shift: f32) -> f32 {
        sum_of(x, |x| lane::exp::<S>(x - shift))
    }

    /// Largest element, -inf if empty, NaN if any is.
    #[inline(always)]
    pub fn max(x: &[f32]) -> f32 {
        let (mut acc, mut nan) = ([f32::NEG_INFINITY; W], [0u32; W]);
        let (blocks, rest) = x.as_chunks::<W>();
        for x in blocks {
            for i in 0..W {
                acc[i] = if x[i] > acc[i] { x[i] } else { acc[i] };
                nan[i] |= x[i].is_nan() as u32;
            }
        }
        for (i, &x) in rest.iter().enumerate() {
            acc[i] = if x > acc[i] { x } else { acc[i] };
            nan[i] |= x.is_nan() as u32;
        }
        if nan.iter().any(|&n| n != 0) {
            return f32::NAN;
        }
        join(acc, |a, b| if b > a { b } else { a })
    }
}

/// Declares slice functions `y[i] = f(x[i])`.
macro_rules! unary {
    ($($(#[$m:meta])* $name:ident = |$x:ident, $S:ident| $e:expr;)*) => {$(
        simd_fn! {
            $(#[$m])*
            pub fn $name<'a, $S>(x: &'a [f32], y: &'a mut [f32]) {
                assert_eq!(x.len(), y.len(), "BUG: {} inputs, {} outputs", x.len(), y.len());
                for (y, &$x) in y.iter_mut().zip(x) {
                    *y = $e;
                }
            }
        }
    )*};
}

unary! {
    /// e^x; inf above 88.73, 0 below -104.
    exp = |x, S| lane::exp::<S>(x);
    /// Natural logarithm; -inf at 0, NaN below.
    log = |x, S| lane::log::<S>(x);
    sqrt = |x, S| x.sqrt();
    /// 1 / sqrt(x).
    rsqrt = |x, S| 1.0 / x.sqrt();
    /// 1 / x.
    recip = |x, S| 1.0 / x;
    /// 1 / (1 + e^-x).
    sigmoid = |x, S| lane::sigmoid::<S>(x);
    /// x * sigmoid(x).
    silu = |x, S| lane::silu::<S>(x);
    /// Derivative of silu.
    dsilu = |x, S| lane::dsilu::<S>(x);
    /// log(1 + e^x).
    softplus = |x, S| lane::softplus::<S>(x);
    tanh = |x, S| lane::tanh::<S>(x);
    /// max(x, 0); NaN stays NaN.
    relu = |x, S| if x < 0.0 { 0.0 } else { x };
    neg = |x, S| -x;
    abs = |x, S| x.abs();
    square = |x, S| x * x;
}

struct Trig<'a> {
    x: &'a [f32],
    y: &'a mut [f32],
    cosine: bool,
}

impl WithSimd for Trig<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let mut wild = false;
        for (y, &x) in self.y.iter_mut().zip(self.x) {
            wild |= x.abs() > lane::TRIG_MAX;
            let (s, c) = lane::sincos::<S>(x);
            *y = if self.cosine { c } else { s };
        }
        if wild {
            // Rare and far out: the library's exact reduction.
            for (y, &x) in self.y.iter_mut().zip(self.x).filter(|(_, x)| x.abs() > lane::TRIG_MAX) {
                *y = if self.cosine { (x as f64).cos() } else { (x as f64).sin() } as f32;
            }
        }
    }
}

/// Sine, x in radians.
pub fn sin(x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "BUG: {} inputs, {} outputs", x.len(), y.len());
    dispatch(Trig { x, y, cosine: false });
}

/// Cosine, x in radians.
pub fn cos(x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "BUG: {} inputs, {} outputs", x.len(), y.len());
    dispatch(Trig { x, y, cosine: true });
}
