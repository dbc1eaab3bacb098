//! Numbers for people.

/// Three significant digits: `1.23`, `12.3`, `123`, `1234`.
pub fn digits(x: f64) -> String {
    let d = match x.abs() {
        a if a < 10.0 => 2,
        a if a < 100.0 => 1,
        _ => 0,
    };
    format!("{x:.d$}")
}

/// `12.3 GFLOP`, `1.5 µs`
pub fn si(x: f64, unit: &str) -> String {
    let (scale, prefix) = match x.abs() {
        0.0 => return format!("0 {unit}"),
        a if a >= 1e12 => (1e12, "T"),
        a if a >= 1e9 => (1e9, "G"),
        a if a >= 1e6 => (1e6, "M"),
        a if a >= 1e3 => (1e3, "k"),
        a if a >= 1.0 => (1.0, ""),
        a if a >= 1e-3 => (1e-3, "m"),
        a if a >= 1e-6 => (1e-6, "µ"),
        _ => (1e-9, "n"),
    };
    format!("{} {prefix}{unit}", digits(x / scale))
}

/// `12.3 MiB`
pub fn bytes(x: usize) -> String {
    let (scale, unit) = match x {
        _ if x >= 1 << 30 => (1u64 << 30, "GiB"),
        _ if x >= 1 << 20 => (1 << 20, "MiB"),
        _ if x >= 1 << 10 => (1 << 10, "KiB"),
        _ => return format!("{x} B"),
    };
    format!("{} {unit}", digits(x as f64 / scale as f64))
}

/// `text` for XML.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
