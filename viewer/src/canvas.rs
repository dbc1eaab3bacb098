//! The graph on the screen: boxes and curves for `egui_graphs`, which pans, hovers and clicks them.
//!
//! What lies outside the window makes no shapes, and letters too small to read are not laid out: a training step has
//! thousands of boxes.  While nothing happens the last shapes stay, and the window sleeps.

use eframe::egui::epaint::{RectShape, TextShape};
use eframe::egui::{Color32, CornerRadius, FontId, Pos2, Rect, Sense, Shape, Stroke, StrokeKind, Ui, Vec2, pos2, vec2};
use egui_graphs::{
    DisplayEdge, DisplayNode, DrawContext, EdgeProps, Graph, GraphChange, GraphView, Layout, LayoutState,
    MetadataFrame, Node, NodeProps, SettingsInteraction, SettingsNavigation,
};
use petgraph::graph::IndexType;
use petgraph::stable_graph::{DefaultIx, NodeIndex};
use petgraph::{Directed, EdgeType};
use rambac_picture::family::{Colour, wants_dark};
use rambac_picture::picture::{Card, FONT, Picture};
use std::sync::Arc;

/// Under which `egui_graphs` keeps its state.
const ID: &str = "graph";
/// Letters smaller than this many points are left out.
const READABLE: f32 = 5.0;
/// Boxes lower than this many points are dots of their colour.
const DOT: f32 = 5.0;
/// Below this zoom an edge is one line from end to end, and long ones are left out: thousands of them would be grey all over,
/// and drawing that would take longest of all.
const STRAIGHT: f32 = 0.06;
/// Below this zoom it has no bends.
const BENT: f32 = 0.25;

pub fn colour(c: Colour) -> Color32 {
    Color32::from_rgb(c[0], c[1], c[2])
}

/// What is drawn of an item.
#[derive(Clone)]
pub struct Face {
    card: Card,
    mark: Color32,
}

/// What is drawn of an edge, in the graph's coordinates.
#[derive(Clone)]
pub struct Wire {
    points: Vec<Pos2>,
    bounds: Rect,
    width: f32,
    long: bool,
}

type Items = Graph<Arc<Face>, Arc<Wire>, Directed, DefaultIx, BoxShape, Curve>;

/// The picture as the widget wants it; node `i` is item `i`.
fn items(p: &Picture, mark: Colour) -> Items {
    let mut g = Items::new();
    for (card, c) in p.cards.iter().zip(&p.layout.centres) {
        let face = Face { card: card.clone(), mark: colour(mark) };
        g.add_node_custom(Arc::new(face), |n| n.set_location(pos2(c[0] as f32, c[1] as f32)));
    }
    for (path, &(from, to, n)) in p.layout.paths.iter().zip(&p.view.edges) {
        let points: Vec<Pos2> = path.iter().map(|q| pos2(q[0] as f32, q[1] as f32)).collect();
        let wire = Wire {
            bounds: Rect::from_points(&points).expand(4.0),
            points,
            width: 1.0 + (n as f32).ln() * 0.5,
            long: p.layout.columns[to] - p.layout.columns[from] > 12,
        };
        g.add_edge_custom(NodeIndex::new(from), NodeIndex::new(to), Arc::new(wire), |_| {});
    }
    g
}

/// A node's shape.
#[derive(Clone)]
pub struct BoxShape {
    face: Arc<Face>,
    at: Pos2,
    selected: bool,
    hovered: bool,
}

impl BoxShape {
    fn rect(&self) -> Rect {
        Rect::from_center_size(self.at, vec2(self.face.card.width as f32, self.face.card.height as f32))
    }
}

impl From<NodeProps<Arc<Face>>> for BoxShape {
    fn from(p: NodeProps<Arc<Face>>) -> Self {
        Self { at: p.location(), selected: p.selected, hovered: p.hovered, face: p.payload }
    }
}

impl<E: Clone, Ty: EdgeType, Ix: IndexType> DisplayNode<Arc<Face>, E, Ty, Ix> for BoxShape {
    fn closest_boundary_point(&self, dir: Vec2) -> Pos2 {
        let half = self.rect().size() / 2.0;
        let scale = (half.x / dir.x.abs().max(1e-6)).min(half.y / dir.y.abs().max(1e-6));
        self.at + dir * scale
    }

    fn shapes(&mut self, cx: &DrawContext) -> Vec<Shape> {
        let zoom = cx.meta.zoom;
        let rect = Rect::from_center_size(cx.meta.canvas_to_screen_pos(self.at), self.rect().size() * zoom);
        if !cx.painter.clip_rect().intersects(rect.expand(8.0)) {
            return vec![];
        }
        let card = &self.face.card;
        let fill = colour(card.fill);
        let plain = !self.selected && !self.hovered;
        if plain && rect.height() < DOT {
            let fill = if card.marked > 0 { self.face.mark } else { fill };
            let size = rect.size().max(Vec2::splat(1.0));
            return vec![Shape::rect_filled(Rect::from_center_size(rect.center(), size), 0.0, fill)];
        }
        let corner = CornerRadius::same((5.0 * zoom).clamp(0.0, 12.0) as u8);
        let outline = match () {
            () if self.selected => Stroke::new(2.5, Color32::from_rgb(20, 60, 160)),
            () if card.marked > 0 => Stroke::new(2.5, self.face.mark),
            () if self.hovered => Stroke::new(1.8, Color32::BLACK),
            () => Stroke::new(0.8_f32.min(zoom + 0.2), Color32::from_rgb(74, 85, 104)),
        };
        let mut out = Vec::with_capacity(4);
        if card.opens && zoom > 0.2 {
            let behind = rect.translate(Vec2::splat(4.0 * zoom));
            out.push(RectShape::new(behind, corner, fill.gamma_multiply(0.5), outline, StrokeKind::Middle).into());
        }
        out.push(RectShape::new(rect, corner, fill, outline, StrokeKind::Middle).into());
        // Few sizes, so that few letters are drawn for the first time while zooming.
        let size = (FONT as f32 * zoom * 2.0).round() / 2.0;
        if size < READABLE {
            return out;
        }
        let ink = if wants_dark(card.fill) { Color32::from_rgb(28, 36, 48) } else { Color32::WHITE };
        let mut write = |text: &str, size: f32, down: f32, ink: Color32| {
            let galley = cx.ctx.fonts_mut(|f| f.layout_no_wrap(text.to_string(), FontId::proportional(size), ink));
            let at = rect.center() - galley.size() / 2.0 + vec2(0.0, down * zoom);
            out.push(TextShape::new(at, galley, ink).into());
        };
        let up = if card.detail.is_empty() { 0.0 } else { -7.0 };
        write(&card.label, size, up, ink);
        if !card.detail.is_empty() && size >= READABLE + 1.0 {
            write(&card.detail, size * 10.0 / 12.0, 7.0, ink.gamma_multiply(0.8));
        }
        out
    }

    fn update(&mut self, p: &NodeProps<Arc<Face>>) {
        (self.at, self.selected, self.hovered) = (p.location(), p.selected, p.hovered);
    }

    fn is_inside(&self, pos: Pos2) -> bool {
        self.rect().contains(pos)
    }
}

/// An edge's shape.
#[derive(Clone)]
pub struct Curve(Arc<Wire>);

impl From<EdgeProps<Arc<Wire>>> for Curve {
    fn from(p: EdgeProps<Arc<Wire>>) -> Self {
        Self(p.payload)
    }
}

impl<Ty: EdgeType, Ix: IndexType> DisplayEdge<Arc<Face>, Arc<Wire>, Ty, Ix, BoxShape> for Curve {
    fn shapes(
        &mut self,
        start: &Node<Arc<Face>, Arc<Wire>, Ty, Ix, BoxShape>,
        end: &Node<Arc<Face>, Arc<Wire>, Ty, Ix, BoxShape>,
        cx: &DrawContext,
    ) -> Vec<Shape> {
        let at = |p: Pos2| cx.meta.canvas_to_screen_pos(p);
        let bounds = Rect::from_two_pos(at(self.0.bounds.min), at(self.0.bounds.max));
        let clip = cx.painter.clip_rect();
        if !clip.intersects(bounds) {
            return vec![];
        }
        let lit = start.selected() || end.selected() || start.hovered() || end.hovered();
        if cx.meta.zoom < STRAIGHT && self.0.long && !lit {
            return vec![];
        }
        let base = match (start.selected() || start.hovered(), lit) {
            (true, _) => Color32::from_rgb(30, 110, 200),
            (_, true) => Color32::from_rgb(190, 90, 30),
            _ => Color32::from_rgb(138, 148, 166),
        };
        let faint = if lit {
            1.0
        } else if self.0.long {
            0.3
        } else {
            0.75
        };
        let width = if lit { 1.8 } else { self.0.width * cx.meta.zoom.clamp(0.25, 1.0) };
        let stroke = Stroke::new(width, base.gamma_multiply(faint));
        if cx.meta.zoom < STRAIGHT
            && let [first, .., last] = self.0.points[..]
        {
            return vec![Shape::line_segment([at(first), at(last)], stroke)];
        }
        // One line per part that is in view: where translucent lines meet they would be seen twice.
        let (mut out, mut line) = (vec![], vec![]);
        let flush = |line: &mut Vec<Pos2>, out: &mut Vec<Shape>| match line.len() {
            0 | 1 => line.clear(),
            2 => out.push(Shape::line_segment([line[0], line[1]], stroke)),
            _ => out.push(Shape::line(std::mem::take(line), stroke)),
        };
        for w in self.0.points.windows(2) {
            let (a, b) = (at(w[0]), at(w[1]));
            if !clip.intersects(Rect::from_two_pos(a, b).expand(2.0)) {
                flush(&mut line, &mut out);
                line.clear();
                continue;
            }
            if line.is_empty() {
                line.push(a);
            }
            bend(&mut line, a, b, cx.meta.zoom);
        }
        flush(&mut line, &mut out);
        out
    }

    fn update(&mut self, _: &EdgeProps<Arc<Wire>>) {}

    fn is_inside(
        &self,
        _: &Node<Arc<Face>, Arc<Wire>, Ty, Ix, BoxShape>,
        _: &Node<Arc<Face>, Arc<Wire>, Ty, Ix, BoxShape>,
        _: Pos2,
    ) -> bool {
        false
    }
}

/// Goes on from `a` to `b`, leaving and arriving level, by as many points as can be told apart.
fn bend(line: &mut Vec<Pos2>, a: Pos2, b: Pos2, zoom: f32) {
    let out = ((b.x - a.x) / 2.0).min(80.0 * zoom);
    let parts = match (a.y - b.y).abs() {
        dy if dy < 1.0 || zoom < BENT => 1,
        dy => (dy.max(out).sqrt() as usize + 2).min(12),
    };
    let (c, d) = (a + vec2(out, 0.0), b - vec2(out, 0.0));
    for i in 1..=parts {
        let t = i as f32 / parts as f32;
        let u = 1.0 - t;
        let by = |p: Pos2, w: f32| p.to_vec2() * w;
        let p = by(a, u * u * u) + by(c, 3.0 * u * u * t) + by(d, 3.0 * u * t * t) + by(b, t * t * t);
        line.push(p.to_pos2());
    }
}

/// Places are given; nothing moves.
#[derive(Debug, Default, Clone, serde::Serialize, serde::Deserialize)]
struct Still;

impl LayoutState for Still {}

impl Layout<Still> for Still {
    fn from_state(state: Still) -> impl Layout<Still> {
        state
    }
    fn next<N, E, Ty, Ix, Dn, De>(&mut self, _: &mut Graph<N, E, Ty, Ix, Dn, De>, _: &Ui)
    where
        N: Clone,
        E: Clone,
        Ty: EdgeType,
        Ix: IndexType,
        Dn: DisplayNode<N, E, Ty, Ix>,
        De: DisplayEdge<N, E, Ty, Ix, Dn>,
    {
    }
    fn state(&self) -> Still {
        Still
    }
}

/// Which part of the graph is seen: `screen = graph · zoom + pan`, from the widget's corner.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Eye {
    pub zoom: f32,
    pub pan: Vec2,
}

impl Default for Eye {
    fn default() -> Self {
        Self { zoom: 1.0, pan: Vec2::ZERO }
    }
}

impl Eye {
    pub fn to_screen(self, p: [f64; 2]) -> Pos2 {
        pos2(p[0] as f32 * self.zoom, p[1] as f32 * self.zoom) + self.pan
    }

    /// Scales by `factor` so that what is at `at` stays there.
    pub fn zoom_at(&mut self, at: Vec2, factor: f32) {
        let zoom = (self.zoom * factor).clamp(0.004, 6.0);
        self.pan = at - (at - self.pan) * (zoom / self.zoom);
        self.zoom = zoom;
    }

    /// All of `extent` in a widget of `size`, but never so small that nothing can be told: then from its left end.
    pub fn whole(extent: [f64; 2], size: Vec2, least: f32) -> Eye {
        let extent = vec2(extent[0].max(1.0) as f32, extent[1].max(1.0) as f32);
        let room = vec2((size.x - 60.0).max(10.0), (size.y - 60.0).max(10.0));
        let zoom = (room.x / extent.x).min(room.y / extent.y).min(1.2);
        let zoom = zoom.max(least.min(1.2));
        let left = if extent.x * zoom > room.x { 30.0 } else { (size.x - extent.x * zoom) / 2.0 };
        Eye { zoom, pan: vec2(left, (size.y - extent.y * zoom) / 2.0) }
    }

    /// `at` in the middle, readable.
    pub fn on(at: [f64; 2], size: Vec2, zoom: f32) -> Eye {
        Eye { zoom, pan: size / 2.0 - vec2(at[0] as f32, at[1] as f32) * zoom }
    }
}

/// What was done to the graph in a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Touched {
    pub clicked: Option<usize>,
    pub double_clicked: Option<usize>,
    pub hovered: Option<usize>,
    /// A click beside all boxes.
    pub away: bool,
}

/// A picture on the screen.
pub struct Canvas {
    items: Items,
    last: Option<Drawn>,
}

/// What was drawn, and from where.
struct Drawn {
    from: Place,
    /// How full the letters' texture was: when it is made anew, shapes that know their places in it are worthless.
    letters: f32,
    shapes: Vec<Shape>,
}

/// What shapes depend on beside the items.
#[derive(Clone, Copy, PartialEq)]
struct Place {
    eye: Eye,
    rect: Rect,
    scale: f32,
}

impl Canvas {
    /// `mark` is the colour of what changed.
    pub fn new(p: &Picture, mark: Colour) -> Self {
        Self { items: items(p, mark), last: None }
    }

    /// Marks one item as selected, and no other.
    pub fn select(&mut self, item: Option<usize>) {
        self.last = None;
        let all: Vec<NodeIndex> = self.items.g().node_indices().collect();
        for n in all {
            if let Some(node) = self.items.g_mut().node_weight_mut(n) {
                node.set_selected(Some(n.index()) == item);
            }
        }
    }

    /// Draws the graph and moves the eye as mouse and wheel say.
    pub fn show(&mut self, ui: &mut Ui, eye: &mut Eye) -> Touched {
        let rect = ui.available_rect_before_wrap();
        if let Some(at) =
            ui.input(|i| i.pointer.hover_pos()).filter(|p| rect.contains(*p) && ui.rect_contains_pointer(rect))
        {
            let (wheel, pinch) = ui.input(|i| (i.smooth_scroll_delta.y, i.zoom_delta()));
            let factor = pinch * (wheel / 240.0).exp();
            if factor != 1.0 {
                eye.zoom_at(at - rect.min, factor);
            }
        }
        let from = Place { eye: *eye, rect, scale: ui.ctx().pixels_per_point() };
        let letters = ui.fonts(|f| f.font_atlas_fill_ratio());
        let quiet = ui.input(|i| i.events.is_empty() && !i.pointer.any_down());
        if let Some(d) = self.last.as_ref().filter(|d| quiet && d.from == from && d.letters <= letters) {
            // The widget's place, with the identity that it has when it is drawn.
            let (_, painter) = ui.allocate_painter(rect.size(), Sense::click_and_drag());
            painter.extend(d.shapes.iter().cloned());
            return Touched { hovered: self.hovered(), ..Touched::default() };
        }
        let layer = ui.layer_id();
        let first = ui.ctx().graphics_mut(|g| g.entry(layer).next_idx().0);
        let mut frame = MetadataFrame::new(Some(ID.into()));
        (frame.zoom, frame.pan) = (eye.zoom, eye.pan);
        frame.save(ui);
        let interaction = SettingsInteraction::new().with_node_clicking_enabled(true).with_hover_enabled(true);
        let navigation = SettingsNavigation::new()
            .with_fit_to_screen_enabled(false)
            .with_zoom_and_pan_enabled(true)
            // The wheel is ours: it zooms without a key held.
            .with_zoom_speed(0.0);
        let r = GraphView::<Still, Still>::new()
            .with_interactions(&interaction)
            .with_navigations(&navigation)
            .with_id(Some(ID.into()))
            .show(ui, &mut self.items);
        // The widget fits the graph to the window in its first frame: not ours.
        for c in &r.changes {
            if let GraphChange::Panned { new_pan, .. } = c
                && r.response.dragged()
            {
                eye.pan = *new_pan;
            }
        }
        // Only what was drawn from where it was asked for is kept: not that first frame.
        let seen = MetadataFrame::new(Some(ID.into())).load(ui);
        let settled = quiet && from.eye == *eye && (seen.zoom, seen.pan) == (eye.zoom, eye.pan);
        self.last = settled.then(|| {
            let shapes = ui.ctx().graphics(|g| {
                let all = g.get(layer).map(|l| l.all_entries().skip(first)).into_iter().flatten();
                all.map(|s| s.shape.clone()).collect()
            });
            Drawn { from, letters, shapes }
        });
        let of = |f: fn(&GraphChange<DefaultIx>) -> Option<NodeIndex>| r.changes.iter().find_map(f).map(|n| n.index());
        let clicked = of(|c| if let GraphChange::NodeClicked { node } = c { Some(*node) } else { None });
        let double_clicked = of(|c| if let GraphChange::NodeDoubleClicked { node } = c { Some(*node) } else { None });
        Touched {
            clicked,
            double_clicked,
            hovered: self.hovered(),
            away: r.response.clicked() && clicked.is_none() && double_clicked.is_none(),
        }
    }

    fn hovered(&self) -> Option<usize> {
        self.items.hovered_node().map(|n| n.index())
    }
}
