//! The memory plan as a picture: every buffer of the arena over the steps in which it lives.

use crate::export::hex;
use crate::family::{Colour, Family, family};
use crate::number::{bytes, escaped};
use rambac_codegen::{BufferKind, MemoryPlan, Program};
use rambac_ir::NodeId;
use std::fmt::Write;

/// A buffer of the arena, or a step's scratch.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// First and last step that needs it.
    pub steps: (usize, usize),
    /// First byte in the arena, and their number.
    pub place: (usize, usize),
    pub colour: Colour,
    /// What made it, and its type.
    pub name: String,
    /// The node of the program's graph that made it, or whose scratch it is.
    pub node: Option<NodeId>,
}

/// All blocks of a plan.
pub fn blocks(p: &Program, plan: &MemoryPlan) -> Vec<Block> {
    let mut makers: Vec<Option<(usize, usize)>> = vec![None; p.buffers.len()];
    for (s, step) in p.steps.iter().enumerate() {
        for (r, v) in step.outputs.iter().enumerate() {
            makers[v.buffer.index()].get_or_insert((s, r));
        }
    }
    let mut out = vec![];
    for (b, buffer) in p.buffers.iter().enumerate().filter(|(_, b)| b.kind == BufferKind::Arena) {
        let (Some(at), Some((first, last))) = (plan.offsets[b], plan.lifetimes[b]) else { continue };
        let (name, colour) = match makers[b] {
            Some((s, r)) => {
                let n = p.graph.node(p.steps[s].node);
                let result = p.steps[s].node.result(if r < n.tys.len() { r } else { 0 });
                let scope = n.scope.as_deref().map(|s| format!(" @{s}")).unwrap_or_default();
                let name = format!("{} = {}{scope}", p.graph.label(result), p.steps[s].op.mnemonic());
                (name, family(&p.steps[s].op).colour())
            }
            None => (format!("b{b}"), Family::Source.colour()),
        };
        let name = format!("{name} : {}", buffer.ty);
        let last = last.min(p.steps.len().saturating_sub(1));
        let node = makers[b].map(|(s, _)| p.steps[s].node);
        out.push(Block { steps: (first, last), place: (at, plan.sizes[b]), colour, name, node });
    }
    for (s, &(at, n)) in plan.scratch.iter().enumerate().filter(|(_, s)| s.1 > 0) {
        let name = format!("scratch of {}", p.steps[s].op.mnemonic());
        let node = Some(p.steps[s].node);
        out.push(Block { steps: (s, s), place: (at, n), colour: [120, 124, 132], name, node });
    }
    out
}

/// The plan as SVG: steps to the right, addresses up, the sum of what lives as a line.
pub fn svg(p: &Program, plan: &MemoryPlan, title: &str) -> String {
    let (w, h, left, top, below) = (1080.0, 420.0, 80.0, 44.0, 46.0);
    let steps = p.steps.len().max(1) as f64;
    let most = plan.arena.max(1) as f64;
    let (x, y) = (|s: f64| left + s / steps * w, |b: f64| top + h - b / most * h);
    let mut s = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0:.0}\" height=\"{1:.0}\" viewBox=\"0 0 {0:.0} {1:.0}\" \
         font-family=\"Ubuntu, sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"{left}\" y=\"26\" font-size=\"15\" fill=\"#222831\">{2}</text>\n",
        left + w + 24.0,
        top + h + below,
        escaped(title)
    );
    for i in 0..=4 {
        let b = most * f64::from(i) / 4.0;
        let _ = writeln!(
            s,
            "<line x1=\"{left}\" x2=\"{:.0}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"#e1e4e9\"/>\
             <text x=\"{2:.0}\" y=\"{3:.1}\" text-anchor=\"end\" fill=\"#222831\">{4}</text>",
            left + w,
            y(b),
            left - 8.0,
            y(b) + 4.0,
            bytes(b as usize)
        );
    }
    for b in blocks(p, plan) {
        let (x0, x1) = (x(b.steps.0 as f64), x(b.steps.1 as f64 + 1.0));
        let (y1, y0) = (y(b.place.0 as f64), y((b.place.0 + b.place.1) as f64));
        if y1 - y0 < 0.2 {
            continue;
        }
        let _ = writeln!(
            s,
            "<rect x=\"{x0:.1}\" y=\"{y0:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\" stroke=\"#ffffff\" \
             stroke-width=\"0.4\"><title>{}&#10;{}, steps {}–{}</title></rect>",
            (x1 - x0).max(0.6),
            y1 - y0,
            hex(b.colour),
            escaped(&b.name),
            bytes(b.place.1),
            b.steps.0,
            b.steps.1
        );
    }
    let line: Vec<String> =
        plan.alive.iter().enumerate().map(|(i, b)| format!("{:.1},{:.1}", x(i as f64 + 0.5), y(*b as f64))).collect();
    let _ = writeln!(
        s,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"#222831\" stroke-width=\"1.2\"/>\n\
         <text x=\"{:.0}\" y=\"{:.0}\" fill=\"#222831\" text-anchor=\"middle\">steps 0 to {} (the line: bytes alive)</text>",
        line.join(" "),
        left + w / 2.0,
        top + h + 30.0,
        p.steps.len().saturating_sub(1)
    );
    s + "</svg>\n"
}
