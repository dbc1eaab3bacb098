//! Numbers and tables for people.

use indicatif::ProgressBar;
pub use rambac_picture::number::{bytes, digits};
use std::time::{Duration, Instant};

/// `1,234,567`
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// `12.3 G` + unit.
pub fn si(x: f64, unit: &str) -> String {
    let (scale, prefix) = match x.abs() {
        a if a >= 1e12 => (1e12, "T"),
        a if a >= 1e9 => (1e9, "G"),
        a if a >= 1e6 => (1e6, "M"),
        a if a >= 1e3 => (1e3, "k"),
        _ => (1.0, ""),
    };
    let number = if prefix.is_empty() && x.fract() == 0.0 { format!("{x}") } else { digits(x / scale) };
    format!("{number} {prefix}{unit}").trim_end().to_string()
}

/// `1.23 s`, `12.3 ms`, `123 µs`
pub fn seconds(s: f64) -> String {
    match s {
        _ if s >= 1.0 => format!("{} s", digits(s)),
        _ if s >= 1e-3 => format!("{} ms", digits(s * 1e3)),
        _ => format!("{} µs", digits(s * 1e6)),
    }
}

/// `12.3 %` of a whole; a dash where there is none.
pub fn share(part: f64, whole: f64) -> String {
    if whole > 0.0 { format!("{:.1} %", part / whole * 100.0) } else { "-".into() }
}

/// `12,345`, `56.6`, of things per second.
pub fn rate(x: f64) -> String {
    if x >= 1000.0 { count(x as u64) } else { digits(x) }
}

/// `123k`, `12.3k`, `56.6`, of things per second.
pub fn thousands(x: f64) -> String {
    if x >= 1000.0 { format!("{}k", digits(x / 1e3)) } else { digits(x) }
}

/// How often a long run speaks up where no bar can be drawn.
const BEAT: Duration = Duration::from_secs(10);

/// Lines in place of a progress bar, where standard error is a file or a pipe.
pub struct Beat(Instant);

impl Beat {
    /// The first line comes after a while.
    pub fn starts() -> Self {
        Self(Instant::now())
    }
    /// Prints what `line` says if it is time, and `bar` is drawn nowhere.
    pub fn tell(&mut self, bar: &ProgressBar, line: impl FnOnce() -> String) {
        if bar.is_hidden() && self.0.elapsed() >= BEAT {
            eprintln!("{}", line());
            self.0 = Instant::now();
        }
    }
}

/// The lengths around `len`, which is none, that are whole chunks.
pub fn nearest(len: usize, unit: usize) -> String {
    let below = len / unit * unit;
    let above = below.saturating_add(unit);
    let known = if below == 0 { format!("is --len {above}") } else { format!("are --len {below} and --len {above}") };
    format!("the nearest {known}: rows are whole chunks of {unit} tokens")
}

/// `1 step`, `2 steps`
pub fn plural(n: usize, noun: &str) -> String {
    if n == 1 { format!("1 {noun}") } else { format!("{} {noun}s", count(n as u64)) }
}

/// `text` in at most `width` characters, its middle cut out if it must be.
pub fn fit(text: &str, width: usize) -> String {
    let n = text.chars().count();
    if n <= width {
        return text.into();
    }
    let keep = width.saturating_sub(1);
    let head = keep / 2;
    let tail: String = text.chars().skip(n - (keep - head)).collect();
    text.chars().take(head).chain(['…']).chain(tail.chars()).collect()
}

/// Lines of `text` of at most `width` characters, cut at spaces; every line after the first stands behind `indent`.
pub fn wrapped(text: &str, width: usize, indent: &str) -> String {
    let mut out = String::new();
    let mut used = 0;
    for word in text.split(' ') {
        let n = word.chars().count();
        if used > 0 && used + 1 + n > width {
            out.push('\n');
            out.push_str(indent);
            used = 0;
        } else if used > 0 {
            out.push(' ');
            used += 1;
        }
        out.push_str(word);
        used += n;
    }
    out
}

/// Columns of text: the first `left` are set left, the others right.
pub struct Table {
    left: usize,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(left: usize, head: &[&str]) -> Self {
        Self { left, rows: vec![head.iter().map(|h| h.to_string()).collect()] }
    }
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }
    /// Prints it, indented by two.
    pub fn print(&self) {
        print!("{}", self.text());
    }
    fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |c: usize| self.rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut out = String::new();
        for row in &self.rows {
            let cells = row.iter().enumerate().map(|(c, s)| {
                let pad = " ".repeat(widths[c] - s.chars().count());
                if c < self.left { format!("{s}{pad}") } else { format!("{pad}{s}") }
            });
            out.push_str(format!("  {}", cells.collect::<Vec<_>>().join("  ")).trim_end());
            out.push('\n');
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!([count(0), count(999), count(1000), count(1234567)], ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([si(0.0, "FLOP"), si(1500.0, "B"), si(2.5e9, "FLOP/s")], ["0 FLOP", "1.50 kB", "2.50 GFLOP/s"]);
        assert_eq!([bytes(3), bytes(1 << 20), bytes(100 << 30)], ["3 B", "1.00 MiB", "100 GiB"]);
        assert_eq!([seconds(1.5), seconds(0.0123), seconds(1e-5)], ["1.50 s", "12.3 ms", "10.0 µs"]);
        assert_eq!(
            [thousands(0.12), thousands(45.6), thousands(86_100.0), thousands(235_400.0)],
            ["0.12", "45.6", "86.1k", "235k"]
        );
        assert_eq!([share(1.0, 8.0), share(1.0, 0.0)], ["12.5 %", "-"]);
        assert_eq!([plural(1, "step"), plural(0, "step")], ["1 step", "0 steps"]);
    }

    #[test]
    fn text_fits() {
        assert_eq!([fit("abc", 3), fit("abcdefg", 5), fit("abc", 0)], ["abc", "ab…fg", "…"]);
        assert_eq!(wrapped("one two three four", 10, "  "), "one two\n  three four");
        let mut t = Table::new(1, &["op", "time"]);
        t.row(["matmul".to_string(), "1".into()]);
        assert_eq!(t.text(), "  op      time\n  matmul     1\n");
    }
}
