//! Unary functions against float64, in units in the last place, and at the edges.

use crate::common::Source;
use rambac_cpu::kernels::vmath as v;

type Slices = fn(&[f32], &mut [f32]);
/// Name, kernel, reference, allowed units in the last place.
type Case = (&'static str, Slices, fn(f64) -> f64, f64);

fn ulps(got: f32, want: f64) -> f64 {
    let w = want as f32;
    if got.to_bits() == w.to_bits() || (got.is_nan() && w.is_nan()) {
        return 0.0;
    }
    if !w.is_finite() || !got.is_finite() {
        return f64::INFINITY;
    }
    let a = w.abs().max(f32::MIN_POSITIVE);
    let ulp = (f32::from_bits(a.to_bits() + 1) - a) as f64;
    (got as f64 - want).abs() / ulp
}

#[test]
fn vmath_accuracy() {
    let mut src = Source::new(3);
    let wide: Vec<f32> = (0..1 << 16).map(|i| f32::from_bits((i as u32) << 16 | 0x1234)).collect();
    let cases: [Case; 12] = [
        ("exp", v::exp, f64::exp, 2.0),
        ("log", v::log, f64::ln, 2.0),
        ("sqrt", v::sqrt, f64::sqrt, 0.51),
        ("rsqrt", v::rsqrt, |x| 1.0 / x.sqrt(), 1.6),
        ("recip", v::recip, |x| 1.0 / x, 0.51),
        ("sigmoid", v::sigmoid, |x| if x < 0.0 { x.exp() / (1.0 + x.exp()) } else { 1.0 / (1.0 + (-x).exp()) }, 3.0),
        ("silu", v::silu, |x| if x < -300.0 { -0.0 } else { x / (1.0 + (-x).exp()) }, 4.0),
        ("softplus", v::softplus, |x| if x > 30.0 { x + (-x).exp() } else { x.exp().ln_1p() }, 3.0),
        ("tanh", v::tanh, f64::tanh, 3.0),
        ("relu", v::relu, |x| if x < 0.0 { 0.0 } else { x }, 0.0),
        ("neg", v::neg, |x| -x, 0.0),
        ("abs", v::abs, f64::abs, 0.0),
    ];
    for (name, f, g, bound) in cases {
        let mut x = src.range(20_000, -110.0, 110.0);
        x.extend(src.range(20_000, -2.0, 2.0));
        x.extend(src.range(5_003, -1e-3, 1e-3));
        x.extend(&wide);
        x.extend([0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1.0, -1.0, f32::MAX, f32::MIN, 1e-45, -1e-45]);
        x.extend([88.72, 88.73, -87.3, -87.4, -103.9, -104.1, f32::MIN_POSITIVE]);
        let mut y = vec![f32::NAN; x.len()];
        f(&x, &mut y);
        let mut worst = (0.0, 0.0, 0.0);
        for (&x, &y) in x.iter().zip(&y) {
            let e = ulps(y, g(x as f64));
            // silu below -88 is a denormal times x: only absolutely accurate.
            if e > worst.0 && !(name == "silu" && y.abs() < 1e-35) {
                worst = (e, x, y);
            }
        }
        println!("{name}: {} ulp at {} -> {}", worst.0, worst.1, worst.2);
        assert!(worst.0 <= bound, "{name}: {} ulp at {} -> {}, want {}", worst.0, worst.1, worst.2, g(worst.1 as f64));
    }
}

#[test]
fn vmath_sin_cos_dsilu() {
    let mut src = Source::new(4);
    let mut x = src.range(20_000, -8000.0, 8000.0);
    x.extend(src.range(20_000, -4.0, 4.0));
    x.extend([0.0, 1e6, -1e9, 1e30, 1e-20]);
    let mut y = vec![0.0; x.len()];
    v::sin(&x, &mut y);
    for (&x, &y) in x.iter().zip(&y) {
        assert!((y as f64 - (x as f64).sin()).abs() < 1.2e-7, "sin {x} -> {y}");
    }
    v::cos(&x, &mut y);
    for (&x, &y) in x.iter().zip(&y) {
        assert!((y as f64 - (x as f64).cos()).abs() < 1.2e-7, "cos {x} -> {y}");
    }
    v::dsilu(&x, &mut y);
    for (&x, &y) in x.iter().zip(&y) {
        let (x, s) = (x as f64, 1.0 / (1.0 + (-x as f64).exp()));
        let want = if x < -200.0 { 0.0 } else { s + x * s * (1.0 - s) };
        assert!((y as f64 - want).abs() < 3e-7, "dsilu {x} -> {y}, want {want}");
    }
    for f in [v::sin as Slices, v::cos] {
        let mut y = [0.0; 3];
        f(&[f32::INFINITY, f32::NEG_INFINITY, f32::NAN], &mut y);
        assert!(y.iter().all(|v| v.is_nan()));
    }
}
