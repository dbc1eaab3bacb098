//! The report as one page of HTML that needs nothing else: tables and drawings in SVG.

use super::checks::Checks;
use super::cost::Costs;
use super::learn::{Heat, Learnt, Point};
use crate::show;
use std::fmt::Write;

/// What is known of one variant.
pub struct Entry<'a> {
    pub name: &'a str,
    pub text: &'a str,
    pub checks: &'a Checks,
    pub costs: Option<&'a Costs>,
    pub learnt: Option<&'a Learnt>,
}

const COLOURS: [&str; 8] = ["#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f"];

/// Text as HTML.
fn escaped(s: &str) -> String {
    s.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn table(out: &mut String, head: &[&str], rows: &[Vec<String>]) {
    let cells =
        |tag: &str, row: &[String]| row.iter().map(|c| format!("<{tag}>{}</{tag}>", escaped(c))).collect::<String>();
    let head: Vec<String> = head.iter().map(|h| h.to_string()).collect();
    let _ = write!(out, "<table><tr>{}</tr>", cells("th", &head));
    for r in rows {
        let _ = write!(out, "<tr>{}</tr>", cells("td", r));
    }
    *out += "</table>\n";
}

/// The whole page.
pub fn html(title: &str, entries: &[Entry]) -> String {
    let mut out = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{0}</title><style>\
         body{{font:14px/1.5 system-ui,sans-serif;max-width:1060px;margin:24px auto;padding:0 16px;color:#1f2937}}\
         table{{border-collapse:collapse;margin:8px 0 20px}}td,th{{padding:3px 12px 3px 0;text-align:right;border-bottom:1px solid \
         #e5e7eb;font-variant-numeric:tabular-nums}}td:first-child,th:first-child{{text-align:left}}td:last-child{{max-width:620px}}\
         pre{{background:#f8fafc;padding:12px;overflow:auto;font-size:12px}}h2{{margin-top:32px}}.row{{display:flex;gap:32px;\
         flex-wrap:wrap}}.left td,.left th{{text-align:left}}</style><h1>{0}</h1>\n",
        escaped(title)
    );
    learning(&mut out, entries);
    costs(&mut out, entries);
    for e in entries {
        one(&mut out, e);
    }
    out += "</html>\n";
    out
}

fn learning(out: &mut String, entries: &[Entry]) {
    let trained: Vec<(&Entry, &Learnt)> = entries.iter().filter_map(|e| Some((e, e.learnt?))).collect();
    if trained.is_empty() {
        return;
    }
    *out += "<h2>Does it learn?</h2><div class=row>";
    let curves: Vec<(&str, &[Point])> = trained.iter().map(|(e, l)| (e.name, &l.curve[..])).collect();
    *out += &curve(&curves);
    *out += "<div>";
    let mut lens: Vec<usize> = trained.iter().flat_map(|(_, l)| l.scores.iter().map(|s| s.len)).collect();
    lens.sort_unstable();
    lens.dedup();
    let head: Vec<String> = ["".to_string()].into_iter().chain(lens.iter().map(|l| show::count(*l as u64))).collect();
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    for (task, what) in [
        ("recall", "Recall: values right, by tokens of the text"),
        ("needle", "One pair in filler, asked at the end"),
        ("passkey", "Passkey: digits right"),
    ] {
        let mut rows = vec![];
        for (e, l) in &trained {
            let at = |len: &usize| l.scores.iter().find(|s| s.task == task && s.len == *len);
            let cell = |len: &usize| at(len).map_or("-".into(), |s| format!("{:.0} %", 100.0 * s.accuracy()));
            rows.push([e.name.to_string()].into_iter().chain(lens.iter().map(cell)).collect());
            for (i, label) in l.choices.iter().enumerate() {
                let needle = |len: &usize| at(len).and_then(|s| *s.needles.get(i)?);
                if !lens.iter().any(|l| needle(l).is_some()) {
                    continue;
                }
                let ranked =
                    |len| needle(len).map_or("-".into(), |n| format!("{:.1} ({:.0} %)", n.rank, 100.0 * n.chosen));
                let of = if l.choices.len() > 1 { format!(" by {label}") } else { String::new() };
                let head = format!("  rank of the needle{of} (chosen)");
                rows.push([head].into_iter().chain(lens.iter().map(ranked)).collect());
            }
        }
        let _ = write!(out, "<b>{what}</b>");
        table(out, &head, &rows);
    }
    *out += "</div></div>\n";
    let rows: Vec<Vec<String>> = trained
        .iter()
        .map(|(e, l)| {
            let rate = l.tokens as f64 / l.seconds.max(1e-9);
            vec![
                e.name.to_string(),
                show::count(l.parameters),
                show::count(l.tokens),
                show::seconds(l.seconds),
                format!("{:.1}k", rate / 1e3),
                show::bytes(l.peak),
                l.stopped.clone().unwrap_or_default(),
            ]
        })
        .collect();
    table(out, &["", "parameters", "tokens trained", "time", "tokens/s", "memory of a step", ""], &rows);
}

/// Loss over tokens.
fn curve(all: &[(&str, &[Point])]) -> String {
    let (w, h, left, bottom) = (460.0, 280.0, 40.0, 28.0);
    let tokens = all.iter().flat_map(|c| c.1).map(|p| p.tokens).max().unwrap_or(1).max(1) as f64;
    let top = f64::from(all.iter().flat_map(|c| c.1).map(|p| p.loss).fold(0.1f32, f32::max)).ceil();
    let x = |t: u64| left + t as f64 / tokens * (w - left - 8.0);
    let y = |l: f64| 8.0 + (1.0 - l / top) * (h - bottom - 8.0);
    let mut s = format!("<svg width={w} height={h} viewBox='0 0 {w} {h}' font-size=11 font-family=system-ui>");
    for i in 0..=4 {
        let v = top * f64::from(i) / 4.0;
        let _ = write!(
            s,
            "<line x1={left} x2={} y1={1} y2={1} stroke='#e5e7eb'/><text x={2} y={3} text-anchor=end>{v:.1}</text>",
            w - 8.0,
            y(v),
            left - 4.0,
            y(v) + 4.0
        );
    }
    let _ = write!(
        s,
        "<text x={} y={} text-anchor=end>{} tokens</text><text x={left} y={}>loss</text>",
        w - 8.0,
        h - 8.0,
        show::count(tokens as u64),
        h - 8.0
    );
    for (i, (name, points)) in all.iter().enumerate() {
        let c = COLOURS[i % COLOURS.len()];
        let path: Vec<String> =
            points.iter().map(|p| format!("{:.1},{:.1}", x(p.tokens), y(f64::from(p.loss)))).collect();
        let _ = write!(
            s,
            "<polyline points='{}' fill=none stroke='{c}' stroke-width=1.5 /><text x={} y={} fill='{c}'>{}</text>",
            path.join(" "),
            left + 60.0 + 90.0 * (i % 4) as f64,
            22.0 + 14.0 * (i / 4) as f64,
            escaped(name)
        );
    }
    s + "</svg>"
}

fn costs(out: &mut String, entries: &[Entry]) {
    *out += "<h2>What does it cost?</h2><p>One forward and backward of the attention alone, one sequence, beside full attention.</p>";
    let mut rows = vec![];
    for e in entries {
        for l in e.costs.iter().flat_map(|c| &c.lines) {
            rows.push(vec![
                e.name.to_string(),
                show::count(l.len as u64),
                show::si(l.own.flops, "FLOP"),
                show::share(l.own.flops, l.full.flops),
                show::si(l.own.bytes, "B"),
                show::bytes(l.own.peak),
                show::bytes(l.full.peak),
            ]);
        }
    }
    table(out, &["", "tokens", "work", "of full", "moved", "memory", "memory of full"], &rows);
}

fn one(out: &mut String, e: &Entry) {
    let _ = write!(out, "<h2>{}</h2><p>{} operations.</p><div class=left>", escaped(e.name), e.checks.lines);
    let mark = |ok: bool| if ok { "✓" } else { "✗" }.to_string();
    let rows: Vec<Vec<String>> =
        e.checks.answers.iter().map(|a| vec![a.what.to_string(), mark(a.ok), a.detail.clone()]).collect();
    table(out, &["question", "", "answer"], &rows);
    for d in &e.checks.findings {
        let line = d
            .span
            .as_ref()
            .map_or(String::new(), |s| format!("line {}: ", 1 + e.text[..s.start].matches('\n').count()));
        let help = escaped(d.help.as_deref().unwrap_or(""));
        let _ = write!(out, "<p><b>{line}{}</b><br>{help}</p>", escaped(&d.message));
    }
    if let Some(c) = e.costs {
        let fused: Vec<String> = c.fused.iter().map(|(op, n)| format!("{n} {op}")).collect();
        let fused = if fused.is_empty() { "none of attention's own".into() } else { fused.join(", ") };
        let _ = write!(out, "<p>Kernels: {fused}.</p>");
        for u in &c.unfused {
            let _ = write!(out, "<p>{}</p>", escaped(u));
        }
    }
    *out += "</div>";
    if let Some(l) = e.learnt {
        l.heat.iter().for_each(|h| *out += &heat(h));
        if l.choices.is_empty() {
            *out += "<p>It chooses nothing, so there is no map of choices and no rank of the needle.</p>";
        }
    }
    let _ = write!(out, "<pre>{}</pre>", escaped(e.text));
}

/// Tokens downwards, units to the right; the needle's column is marked.
fn heat(h: &Heat) -> String {
    let columns = h.rows.first().map_or(0, Vec::len);
    let cell = (560.0 / columns.max(1) as f64).min(24.0);
    let (w, height) = (cell * columns as f64, 4.0 * h.rows.len() as f64);
    let mut s = format!(
        "<p><b>What tokens choose</b> by {} in a passkey text: units of {} to the right{}, every {} token downwards; the line \
         marks the needle.</p><svg width={} height={}>",
        escaped(&h.label),
        show::plural(h.unit, "token"),
        if columns < h.units { ", some in one column" } else { "" },
        ordinal(h.step),
        w + 2.0,
        height + 2.0
    );
    let _ = write!(s, "<rect width={w} height={height} fill='#f1f5f9'/>");
    for (y, row) in h.rows.iter().enumerate() {
        for (x, &n) in row.iter().enumerate().filter(|(_, n)| **n > 0) {
            let strength = (f64::from(n) / f64::from(h.heads.max(1))).min(1.0);
            let _ = write!(
                s,
                "<rect x={:.1} y={} width={cell:.1} height=4 fill='#2563eb' opacity={:.2} />",
                x as f64 * cell,
                4 * y,
                0.25 + 0.75 * strength
            );
        }
    }
    let x = (h.needle as f64 + 0.5) * cell;
    let _ = write!(s, "<line x1={x:.1} x2={x:.1} y1=0 y2={height} stroke='#dc2626' stroke-dasharray='2 3'/></svg>");
    s
}

fn ordinal(n: usize) -> String {
    match n {
        1 => "".into(),
        2 => "second".into(),
        3 => "third".into(),
        n => format!("{n}th"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped() {
        let page = html("a < b & c", &[]);
        assert!(page.contains("<title>a &lt; b &amp; c</title>") && page.ends_with("</html>\n"), "{page}");
        assert!(!page.contains("http"), "the page needs nothing else");
    }
}
