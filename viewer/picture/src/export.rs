//! Pictures of a graph as files: SVG and DOT.

use crate::family::{Colour, wants_dark};
use crate::layout::Point;
use crate::number::escaped;
use crate::picture::{FONT, LETTER, Look, Picture};
use crate::scene::Scene;
use std::fmt::Write;

/// Around everything.
const MARGIN: f64 = 24.0;
/// Lines above the graph.
const HEAD: f64 = 64.0;
/// What appeared, and what vanishes.
pub const APPEARED: Colour = [34, 139, 60];
pub const VANISHED: Colour = [200, 40, 40];

/// `#rrggbb`
pub fn hex(c: Colour) -> String {
    format!("#{:02x}{:02x}{:02x}", c[0], c[1], c[2])
}

/// A curve through the points that leaves and arrives level.
fn curve(points: &[Point]) -> String {
    let mut d = format!("M{:.1} {:.1}", points[0][0], points[0][1]);
    for w in points.windows(2) {
        let bend = ((w[1][0] - w[0][0]) / 2.0).min(80.0);
        let [(x0, y0), (x1, y1)] = [(w[0][0], w[0][1]), (w[1][0], w[1][1])];
        let _ = write!(d, "C{:.1} {y0:.1} {:.1} {y1:.1} {x1:.1} {y1:.1}", x0 + bend, x1 - bend);
    }
    d
}

/// The heading of a picture: what is shown at which sizes.
fn heading(scene: &Scene, look: &Look) -> String {
    let stage = scene.stages[look.stage].name;
    let stage = match (look.stage, look.before) {
        (0, _) => stage.to_string(),
        (_, true) => format!("before {stage}"),
        (_, false) => format!("after {stage}"),
    };
    format!("{}, {stage}, at {}", scene.title, scene.dims)
}

/// The picture as SVG; boxes have titles, which browsers show on hovering.
pub fn svg(scene: &Scene, look: &Look) -> String {
    let p = Picture::new(scene, look);
    let legend = p.legend(scene, look.colour);
    let legend_width: f64 = legend.iter().map(|(name, _)| name.chars().count() as f64 * LETTER + 34.0).sum();
    let head = heading(scene, look);
    let width = p.layout.extent[0].max(legend_width).max(head.chars().count() as f64 * 9.0) + 2.0 * MARGIN;
    let height = p.layout.extent[1] + HEAD + 2.0 * MARGIN;
    let mut s = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
         viewBox=\"0 0 {width:.0} {height:.0}\" font-family=\"Ubuntu, sans-serif\" font-size=\"{FONT}\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"{MARGIN}\" y=\"36\" font-size=\"16\" fill=\"#222831\">{}</text>\n",
        escaped(&head)
    );
    let mut x = MARGIN;
    for (name, colour) in &legend {
        let _ = writeln!(
            s,
            "<rect x=\"{x:.0}\" y=\"52\" width=\"14\" height=\"14\" rx=\"3\" fill=\"{}\"/>\
             <text x=\"{:.0}\" y=\"63\" fill=\"#222831\">{}</text>",
            hex(*colour),
            x + 19.0,
            escaped(name)
        );
        x += name.chars().count() as f64 * LETTER + 34.0;
    }
    let _ = writeln!(s, "<g transform=\"translate({MARGIN} {})\">", HEAD + MARGIN);
    for (path, (from, to, n)) in p.layout.paths.iter().zip(&p.view.edges) {
        let long = p.layout.columns[*to] - p.layout.columns[*from] > 12;
        let wide = 1.0 + (*n as f64).ln().max(0.0) * 0.6;
        let opacity = if long { 0.25 } else { 0.7 };
        let _ = writeln!(
            s,
            "<path d=\"{}\" fill=\"none\" stroke=\"#8a94a6\" stroke-width=\"{wide:.1}\" stroke-opacity=\"{opacity}\"/>",
            curve(path)
        );
    }
    let mark = if look.before { VANISHED } else { APPEARED };
    for (i, (card, c)) in p.cards.iter().zip(&p.layout.centres).enumerate() {
        let (x, y) = (c[0] - card.width / 2.0, c[1] - card.height / 2.0);
        let ink = if wants_dark(card.fill) { "#1c2430" } else { "#ffffff" };
        let (stroke, wide) = if card.marked > 0 { (hex(mark), 2.5) } else { ("#4a5568".into(), 0.8) };
        let _ = write!(s, "<g><title>{}</title>", escaped(&title(scene, &p, i)));
        if card.opens {
            // A second sheet behind: there is more inside.
            let _ = write!(
                s,
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"5\" fill=\"{}\" stroke=\"#4a5568\" \
                 stroke-width=\"0.6\" fill-opacity=\"0.5\"/>",
                x + 4.0,
                y + 4.0,
                card.width,
                card.height,
                hex(card.fill)
            );
        }
        let _ = write!(
            s,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"5\" fill=\"{}\" stroke=\"{stroke}\" \
             stroke-width=\"{wide}\"/>",
            card.width,
            card.height,
            hex(card.fill)
        );
        let middle = if card.detail.is_empty() { c[1] + 4.0 } else { c[1] - 3.0 };
        let _ = write!(
            s,
            "<text x=\"{:.1}\" y=\"{middle:.1}\" text-anchor=\"middle\" fill=\"{ink}\">{}</text>",
            c[0],
            escaped(&card.label)
        );
        if !card.detail.is_empty() {
            let _ = write!(
                s,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"{ink}\" font-size=\"10\" \
                 fill-opacity=\"0.8\">{}</text>",
                c[0],
                middle + 13.0,
                escaped(&card.detail)
            );
        }
        s += "</g>\n";
    }
    s + "</g>\n</svg>\n"
}

/// What is said of an item on hovering: its line, or what a box holds.
pub fn title(scene: &Scene, p: &Picture, i: usize) -> String {
    let (item, f) = (&p.view.items[i], &p.cards[i].figures);
    let cost = format!(
        "{}, {}, {}",
        crate::number::si(f.flops, "FLOP"),
        crate::number::si(f.bytes, "B"),
        crate::number::bytes(f.memory as usize)
    );
    match &item.folded {
        None => format!("{}\n{cost}", scene.stages[p.stage].lines()[item.nodes[0].index()]),
        Some(b) => format!("{}: {} nodes\n{cost}", b.label, item.nodes.len()),
    }
}

/// The picture in the language of Graphviz, its places kept for `neato -n`.
pub fn dot(scene: &Scene, look: &Look) -> String {
    let p = Picture::new(scene, look);
    let quoted = |t: &str| format!("\"{}\"", t.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"));
    let mut s = format!(
        "digraph {} {{\n  rankdir=LR;\n  node [shape=box, style=\"rounded,filled\", fontname=\"sans-serif\"];\n",
        quoted(&heading(scene, look))
    );
    let mark = if look.before { VANISHED } else { APPEARED };
    for (i, (card, c)) in p.cards.iter().zip(&p.layout.centres).enumerate() {
        let label =
            if card.detail.is_empty() { card.label.clone() } else { format!("{}\n{}", card.label, card.detail) };
        let marked = if card.marked > 0 { format!(", color=\"{}\", penwidth=2.5", hex(mark)) } else { String::new() };
        let _ = writeln!(
            s,
            "  n{i} [label={}, tooltip={}, fillcolor=\"{}\", pos=\"{:.1},{:.1}\"{marked}];",
            quoted(&label),
            quoted(&title(scene, &p, i)),
            hex(card.fill),
            c[0],
            -c[1]
        );
    }
    for (from, to, n) in &p.view.edges {
        let label = if *n > 1 { format!(" [label=\"{n}\"]") } else { String::new() };
        let _ = writeln!(s, "  n{from} -> n{to}{label};");
    }
    s + "}\n"
}
