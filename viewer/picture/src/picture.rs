//! A stage of a scene as it is drawn: boxes with labels, colours, sizes and places.

use crate::family::{Colour, ColourBy, Family, family, heat};
use crate::fold::{Open, View, fold, node_label};
use crate::layout::{Layout, layout};
use crate::number::{bytes, si};
use crate::scene::{Figures, Scene};
use rambac_ir::NodeId;
use std::collections::HashMap;

/// What to draw, and how.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Look {
    /// The stage.
    pub stage: usize,
    /// Draw the stage before it, with what vanishes marked, in place of the stage with what appeared.
    pub before: bool,
    pub colour: ColourBy,
    pub open: Open,
}

/// A box.
#[derive(Clone, Debug, PartialEq)]
pub struct Card {
    pub label: String,
    /// A second line.
    pub detail: String,
    pub fill: Colour,
    pub width: f64,
    pub height: f64,
    /// Nodes in it that appeared, or that vanish.
    pub marked: usize,
    pub figures: Figures,
    /// A box that opens.
    pub opens: bool,
}

/// See the module's comment.
pub struct Picture {
    /// The stage whose graph this is.
    pub stage: usize,
    pub view: View,
    pub layout: Layout,
    pub cards: Vec<Card>,
}

/// Letters are about this wide, in the size that labels have.
pub const LETTER: f64 = 6.6;
/// Size of labels.
pub const FONT: f64 = 12.0;
const LEAST_HEIGHT: f64 = 30.0;
/// What the most expensive box is higher than one that costs nothing.
const GROWTH: f64 = 80.0;
/// Longest label.
const LETTERS: usize = 30;

impl Picture {
    /// Folds, colours and lays out.
    pub fn new(scene: &Scene, look: &Look) -> Picture {
        let before = look.before && look.stage > 0;
        let stage = look.stage - usize::from(before);
        let g = &scene.stages[stage].graph;
        let difference = scene.difference(look.stage);
        let mut marked = difference.appeared;
        if before {
            marked = vec![false; g.nodes.len()];
            difference.vanished.iter().for_each(|id| marked[id.index()] = true);
        }
        let figures = scene.figures(stage);
        let view = fold(g, &look.open);
        let sum = |nodes: &[NodeId]| nodes.iter().map(|n| figures[n.index()]).fold(Figures::default(), |a, b| a + b);
        let sums: Vec<Figures> = view.items.iter().map(|i| sum(&i.nodes)).collect();
        let of = |f: &Figures| look.colour.figure(f).unwrap_or(0.0);
        let most = sums.iter().map(of).fold(0.0, f64::max);
        let slowest = sums.iter().map(|f| f.seconds).fold(0.0, f64::max);
        let cards: Vec<Card> = (view.items.iter().zip(&sums))
            .map(|(item, f)| {
                let node = g.node(item.nodes[0]);
                let label = match &item.folded {
                    Some(b) if b.count > 1 => format!("{} × {}", b.count, b.label),
                    Some(b) => b.label.clone(),
                    None => node_label(node),
                };
                let changed = item.nodes.iter().filter(|n| marked[n.index()]).count();
                let detail = match &item.folded {
                    None => node.tys.first().map(|t| t.to_string()).unwrap_or_default(),
                    Some(_) => {
                        let ops = format!("{} ops", item.nodes.len());
                        match look.colour.figure(f) {
                            Some(v) => format!("{ops}, {}", figure_text(look.colour, v)),
                            None if f.flops > 0.0 => format!("{ops}, {}", si(f.flops, "FLOP")),
                            None => ops,
                        }
                    }
                };
                let detail = match changed {
                    0 => detail,
                    n if item.folded.is_some() => format!("{detail}, {}{n}", if before { "−" } else { "+" }),
                    _ => detail,
                };
                let fill = match look.colour {
                    ColourBy::Family => main_family(scene, stage, &item.nodes, &figures).colour(),
                    _ => heat(if most > 0.0 { of(f) / most } else { 0.0 }),
                };
                let (label, detail) = (cut(&label), cut(&detail));
                let letters = label.chars().count().max((detail.chars().count() * 5).div_ceil(6));
                let share = if slowest > 0.0 { (f.seconds / slowest).sqrt() } else { 0.0 };
                let plain = if detail.is_empty() { LEAST_HEIGHT - 8.0 } else { LEAST_HEIGHT + 4.0 };
                Card {
                    label,
                    detail,
                    fill,
                    width: letters as f64 * LETTER + 18.0,
                    height: plain + GROWTH * share,
                    marked: changed,
                    figures: *f,
                    opens: item.folded.is_some(),
                }
            })
            .collect();
        let sizes: Vec<_> = cards.iter().map(|c| [c.width, c.height]).collect();
        let edges: Vec<_> = view.edges.iter().map(|e| (e.0, e.1)).collect();
        let layout = layout(&sizes, &edges);
        Picture { stage, view, layout, cards }
    }

    /// What the colours mean: a word and its colour.
    pub fn legend(&self, scene: &Scene, colour: ColourBy) -> Vec<(String, Colour)> {
        if colour != ColourBy::Family {
            let most = self.cards.iter().filter_map(|c| colour.figure(&c.figures)).fold(0.0, f64::max);
            let parts = [0.0, 0.1, 0.3, 0.6, 1.0];
            return parts.map(|p| (figure_text(colour, p * most), heat(p))).to_vec();
        }
        let g = &scene.stages[self.stage].graph;
        let has = |f: Family| g.nodes.iter().any(|n| family(&n.op) == f);
        Family::ALL.into_iter().filter(|f| has(*f)).map(|f| (f.name().to_string(), f.colour())).collect()
    }

    /// Items whose label, nodes' names, ops or scopes contain `text`, whatever its case.
    pub fn find(&self, scene: &Scene, text: &str) -> Vec<usize> {
        let lower = text.to_lowercase();
        let labelled = |i: usize| !text.is_empty() && self.cards[i].label.to_lowercase().contains(&lower);
        (0..self.cards.len()).filter(|&i| labelled(i) || self.hits(scene, i, text).next().is_some()).collect()
    }

    /// Nodes of item `i` whose names, ops or scopes contain `text`, whatever its case.
    pub fn hits<'a>(&'a self, scene: &'a Scene, i: usize, text: &str) -> impl Iterator<Item = NodeId> + 'a {
        let text = text.to_lowercase();
        let g = &scene.stages[self.stage].graph;
        self.view.items[i].nodes.iter().copied().filter(move |&id| {
            let n = g.node(id);
            !text.is_empty()
                && (n.op.mnemonic().contains(&text)
                    || node_label(n).to_lowercase().contains(&text)
                    || n.scope.as_deref().is_some_and(|s| s.to_lowercase().contains(&text))
                    || (0..n.tys.len()).any(|r| g.label(id.result(r)).to_lowercase().contains(&text)))
        })
    }
}

/// The family that takes most of the time, else most of the ops; inputs only where there is nothing else.
fn main_family(scene: &Scene, stage: usize, nodes: &[NodeId], figures: &[Figures]) -> Family {
    let g = &scene.stages[stage].graph;
    if let [only] = nodes {
        return family(&g.node(*only).op);
    }
    let mut weights: HashMap<Family, (f64, usize)> = HashMap::new();
    for id in nodes {
        let w = weights.entry(family(&g.node(*id).op)).or_default();
        *w = (w.0 + figures[id.index()].seconds, w.1 + 1);
    }
    let mut all: Vec<(Family, (f64, usize))> = weights.into_iter().collect();
    all.sort_by(|a, b| b.1.0.total_cmp(&a.1.0).then(b.1.1.cmp(&a.1.1)).then(a.0.cmp(&b.0)));
    let computes = all.iter().find(|(f, _)| !matches!(f, Family::Source | Family::Constant));
    computes.or(all.first()).map_or(Family::Source, |a| a.0)
}

/// A number in its unit.
pub fn figure_text(colour: ColourBy, v: f64) -> String {
    match colour {
        ColourBy::Flops => si(v, "FLOP"),
        ColourBy::Bytes => si(v, "B"),
        ColourBy::Time => si(v, "s"),
        ColourBy::Memory => bytes(v as usize),
        ColourBy::Family => String::new(),
    }
}

fn cut(s: &str) -> String {
    if s.chars().count() <= LETTERS {
        return s.into();
    }
    s.chars().take(LETTERS - 1).chain(['…']).collect()
}
