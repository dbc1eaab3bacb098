//! Curves of training runs as SVG.

use crate::error::Result;
use crate::metrics::{Point, Quantity, RunMetrics};
use crate::show;
use miette::{Report, miette};
use plotters::coord::Shift;
use plotters::prelude::*;

/// What stands below the curves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Axis {
    Step,
    Tokens,
    /// Seconds of training
    Time,
}

/// How curves are drawn.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    pub axis: Axis,
    /// Steps over which the strong line is a mean; the measured values lie faintly behind it.
    pub smooth: usize,
    /// Loss on a logarithmic axis.
    pub log_loss: bool,
}

impl Default for Style {
    fn default() -> Self {
        Self { axis: Axis::Tokens, smooth: 20, log_loss: false }
    }
}

/// Colours of runs, told apart by colour-blind readers too (after Okabe and Ito).
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(120, 94, 240),
    RGBColor(100, 100, 100),
];
const INK: RGBColor = RGBColor(40, 44, 52);
const FAINT: RGBColor = RGBColor(225, 228, 233);
const FONT: &str = "sans-serif";
/// Pixels of one picture.
const CELL: (u32, u32) = (560, 300);
/// Pixels of the line with the runs' names.
const HEAD: u32 = 34;
/// Points of a line: more cannot be told apart.
const POINTS: usize = 700;

/// Those of `wanted` that any of the runs has values of.
pub fn known(runs: &[RunMetrics], wanted: &[Quantity]) -> Vec<Quantity> {
    wanted.iter().filter(|q| runs.iter().any(|r| !r.values(q.key).is_empty())).copied().collect()
}

/// The curves of `runs`, a picture per quantity, two side by side.
///
/// # Errors
/// Nothing to draw.
pub fn svg(runs: &[RunMetrics], quantities: &[Quantity], style: &Style) -> Result<String> {
    let cells = known(runs, quantities);
    if cells.is_empty() {
        let names: Vec<&str> = quantities.iter().map(|q| q.key).collect();
        return Err(miette!("no run has a finite value of {}", names.join(", ")));
    }
    let columns = cells.len().min(2);
    let rows = cells.len().div_ceil(columns);
    let size = (CELL.0 * columns as u32, HEAD + CELL.1 * rows as u32);
    let mut text = String::new();
    draw(&mut text, size, runs, &cells, (rows, columns), style).map_err(|e| Report::msg(format!("BUG: {e}")))?;
    // Scales with the page that shows it.
    Ok(text.replacen("<svg ", "<svg font-family=\"sans-serif\" ", 1))
}

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

fn draw(
    text: &mut String,
    size: (u32, u32),
    runs: &[RunMetrics],
    quantities: &[Quantity],
    (rows, columns): (usize, usize),
    style: &Style,
) -> Drawn {
    let root = SVGBackend::with_string(text, size).into_drawing_area();
    root.fill(&WHITE)?;
    let (head, body) = root.split_vertically(HEAD);
    legend(&head, runs)?;
    for (area, q) in body.split_evenly((rows, columns)).iter().zip(quantities) {
        picture(area, runs, *q, style)?;
    }
    root.present()?;
    Ok(())
}

fn colour(run: usize) -> RGBColor {
    COLOURS[run % COLOURS.len()]
}

fn legend(area: &DrawingArea<SVGBackend, Shift>, runs: &[RunMetrics]) -> Drawn {
    // A font that is not measured: letters are taken to be this wide.
    const LETTER: i32 = 8;
    let wide = area.dim_in_pixel().0 as i32 - 40;
    let longest = (wide / runs.len().max(1) as i32 - 40) / LETTER;
    let mut x = 20;
    for (i, r) in runs.iter().enumerate() {
        let name = show::fit(&r.name, longest.max(3) as usize);
        area.draw(&PathElement::new([(x, 18), (x + 22, 18)], colour(i).stroke_width(3)))?;
        area.draw(&Text::new(name.clone(), (x + 28, 11), (FONT, 14).into_font().color(&INK)))?;
        x += 28 + name.chars().count() as i32 * LETTER + 22;
    }
    Ok(())
}

/// Points of a line.
type Line = Vec<(f64, f64)>;

/// Where a point stands on the axis.
fn place(p: &Point, axis: Axis) -> Option<f64> {
    let x = match axis {
        Axis::Step => p.step as f64,
        Axis::Tokens => p.tokens,
        Axis::Time => p.seconds,
    };
    x.is_finite().then_some(x)
}

/// A run's values of a quantity: as measured, and as means.
fn line(run: &RunMetrics, q: Quantity, style: &Style, log: bool) -> (Line, Line) {
    let values = run.values(q.key).into_iter().filter(|(_, v)| !log || *v > 0.0);
    let all = values.filter_map(|(p, v)| Some((place(&p, style.axis)?, v)));
    // On a logarithmic axis the mean is geometric.
    let all: Line = all.map(|(x, y)| (x, if log { y.log10() } else { y })).collect();
    let half = style.smooth / 2;
    let mean = |i: usize| {
        let part = &all[i.saturating_sub(half)..(i + half + 1).min(all.len())];
        (all[i].0, part.iter().map(|p| p.1).sum::<f64>() / part.len() as f64)
    };
    let means = (0..all.len()).map(mean).collect();
    (thinned(all), thinned(means))
}

/// At most about [`POINTS`] points: of each stretch the lowest and the highest.
fn thinned(all: Line) -> Line {
    if all.len() <= POINTS {
        return all;
    }
    let mut out = vec![];
    for part in all.chunks(all.len().div_ceil(POINTS / 2)) {
        let low = (0..part.len()).min_by(|&a, &b| part[a].1.total_cmp(&part[b].1)).unwrap_or(0);
        let high = (0..part.len()).max_by(|&a, &b| part[a].1.total_cmp(&part[b].1)).unwrap_or(0);
        out.push(part[low.min(high)]);
        if low != high {
            out.push(part[low.max(high)]);
        }
    }
    out
}

/// The range that an axis shows of values `low..high`.
fn range(values: impl Iterator<Item = f64> + Clone, from_zero: bool) -> std::ops::Range<f64> {
    let low = values.clone().fold(f64::INFINITY, f64::min);
    let high = values.fold(f64::NEG_INFINITY, f64::max);
    let low = if from_zero { low.min(0.0) } else { low };
    let room = if high > low { (high - low) * 0.04 } else { high.abs().max(1e-9) * 0.1 };
    let below = if from_zero && low == 0.0 { 0.0 } else { room };
    low - below..high + room
}

/// `0.0034`, `1.2k`, `3M`
fn tick(x: f64) -> String {
    let trimmed = |x: f64, d: usize| {
        let s = format!("{x:.d$}");
        if s.contains('.') { s.trim_end_matches('0').trim_end_matches('.').to_string() } else { s }
    };
    match x.abs() {
        0.0 => "0".into(),
        a if a >= 1e9 => trimmed(x / 1e9, 2) + "G",
        a if a >= 1e6 => trimmed(x / 1e6, 2) + "M",
        a if a >= 1e3 => trimmed(x / 1e3, 2) + "k",
        a if a >= 0.01 => trimmed(x, 3),
        _ => format!("{x:.1e}"),
    }
}

/// An axis with round numbers; of logarithms, if `log`.
struct Scale {
    range: std::ops::Range<f64>,
    log: bool,
}

impl Scale {
    fn new(range: std::ops::Range<f64>, log: bool) -> Self {
        Self { range, log }
    }
}

impl Ranged for Scale {
    type FormatOption = plotters::coord::ranged1d::NoDefaultFormatting;
    type ValueType = f64;
    fn map(&self, v: &f64, pixels: (i32, i32)) -> i32 {
        let part = (v - self.range.start) / (self.range.end - self.range.start);
        pixels.0 + (part * f64::from(pixels.1 - pixels.0)).round() as i32
    }
    fn key_points<Hint: plotters::coord::ranged1d::KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        if self.log { log_ticks(&self.range) } else { ticks(&self.range) }
    }
    fn range(&self) -> std::ops::Range<f64> {
        self.range.clone()
    }
}

impl plotters::coord::ranged1d::ValueFormatter<f64> for Scale {
    fn format_ext(&self, v: &f64) -> String {
        tick(if self.log { 10f64.powf(*v) } else { *v })
    }
}

/// Round numbers within a range: about six.
fn ticks(r: &std::ops::Range<f64>) -> Vec<f64> {
    let raw = (r.end - r.start) / 6.0;
    let power = 10f64.powf(raw.log10().floor());
    let step = power * [1.0, 2.0, 5.0, 10.0].into_iter().find(|m| m * power >= raw).unwrap_or(10.0);
    let first = (r.start / step).ceil() as i64;
    // Of whole steps, so that zero is zero.
    (first..).map(|i| i as f64 * step).take_while(|v| *v <= r.end).collect()
}

/// Logarithms of round numbers within a range of logarithms.
fn log_ticks(r: &std::ops::Range<f64>) -> Vec<f64> {
    let decades = r.end - r.start;
    let digits: &[f64] = match decades {
        d if d < 0.7 => &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
        d if d < 3.0 => &[1.0, 2.0, 5.0],
        _ => &[1.0],
    };
    let all = (r.start.floor() as i32..=r.end.ceil() as i32)
        .flat_map(|e| digits.iter().map(move |d| d.log10() + f64::from(e)));
    all.filter(|v| r.contains(v)).collect()
}

fn picture(area: &DrawingArea<SVGBackend, Shift>, runs: &[RunMetrics], q: Quantity, style: &Style) -> Drawn {
    let log = q.log || (style.log_loss && q.key.ends_with("loss"));
    let lines: Vec<(Line, Line)> = runs.iter().map(|r| line(r, q, style, log)).collect();
    let points = lines.iter().flat_map(|(a, b)| a.iter().chain(b));
    // One axis for all pictures.
    let x = range(runs.iter().flat_map(|r| r.points.iter()).filter_map(|p| place(p, style.axis)), false);
    // What is measured may have a few wild values; the axis follows most of them.
    let mut ys: Vec<f64> = points.map(|p| p.1).collect();
    ys.sort_by(f64::total_cmp);
    let cut = ys.len() / 200;
    let kept = ys[cut..ys.len() - cut].iter().copied();
    let means = lines.iter().flat_map(|(_, m)| m.iter().map(|p| p.1));
    let y = match q.key {
        "accuracy" => 0.0..1.02,
        _ => range(kept.chain(means), !log && !q.key.ends_with("loss")),
    };
    let label = (FONT, 12).into_font().color(&INK);
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .margin_right(22)
        .caption(q.title, (FONT, 15).into_font().color(&INK))
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(Scale::new(x, false), Scale::new(y.clone(), log))?;
    let below = match style.axis {
        Axis::Step => "step",
        Axis::Tokens => "tokens",
        Axis::Time => "seconds of training",
    };
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(RGBColor(160, 166, 176))
        .label_style(label.clone())
        .axis_desc_style(label)
        .x_labels(12)
        .y_labels(12)
        .x_desc(below)
        .draw()?;
    let inside = |l: &Line| l.iter().map(|p| (p.0, p.1.clamp(y.start, y.end))).collect::<Vec<_>>();
    for (i, (measured, _)) in lines.iter().enumerate() {
        if style.smooth > 1 {
            chart.draw_series(LineSeries::new(inside(measured), colour(i).mix(0.25).stroke_width(1)))?;
        }
    }
    for (i, (_, means)) in lines.iter().enumerate() {
        match means[..] {
            [only] => drop(chart.draw_series([Circle::new(only, 3, colour(i).filled())])?),
            _ => drop(chart.draw_series(LineSeries::new(inside(means), colour(i).stroke_width(2)))?),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn run(name: &str, steps: u64) -> RunMetrics {
        let point = |s: u64| {
            let line = json!({ "loss": 5.0 / (1.0 + s as f64), "grad_norm": 10f64.powi(-(s as i32 % 3)), "lr": 1e-3 });
            Point { step: s, tokens: 64.0 * s as f64, seconds: s as f64, line }
        };
        RunMetrics {
            name: name.into(),
            folder: "".into(),
            points: (1..=steps).map(point).collect(),
            evaluations: vec![],
        }
    }

    #[test]
    fn one_picture_per_known_quantity() {
        let runs = [run("a<b>", 1), run("b", 5000)];
        let s = svg(&runs, &Quantity::ALL, &Style::default()).unwrap();
        for title in ["loss", "learning rate", "gradient norm", "a&lt;b&gt;"] {
            assert!(s.contains(title), "{title} is not in the picture");
        }
        assert!(!s.contains("accuracy") && !s.contains("NaN"), "{s}");
        assert!(s.len() < 300_000, "{} bytes", s.len());
        assert!(svg(&runs, &[Quantity::ALL[2]], &Style::default()).is_err());
    }

    #[test]
    fn tick_texts() {
        let of = [0.0, 0.25, 1500.0, 2e6, 0.001, -3.0].map(tick);
        assert_eq!(of, ["0", "0.25", "1.5k", "2M", "1.0e-3", "-3"]);
    }

    #[test]
    fn round_ticks() {
        assert_eq!(ticks(&(0.0..6.3)), [0.0, 2.0, 4.0, 6.0]);
        assert_eq!(ticks(&(-0.1..0.25)), [-0.1, 0.0, 0.1, 0.2]);
        let values = |r| log_ticks(&r).into_iter().map(|v| 10f64.powf(v)).map(tick).collect::<Vec<_>>();
        assert_eq!(values(-0.1..1.1), ["1", "2", "5", "10"]);
        assert_eq!(values(-2.0..3.0), ["0.01", "0.1", "1", "10", "100"]);
    }

    /// Spikes stay visible in thinned lines.
    #[test]
    fn thinning_keeps_extremes() {
        let all: Line = (0..10_000).map(|i| (i as f64, if i == 4321 { 9.0 } else { 1.0 })).collect();
        let t = thinned(all);
        assert!(t.len() <= POINTS && t.contains(&(4321.0, 9.0)));
        assert!(t.windows(2).all(|w| w[0].0 < w[1].0));
    }
}
