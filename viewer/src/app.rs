//! The window's state, and what can be done to it.

mod keys;
mod measure;
mod panels;

pub use measure::Measure;

use crate::canvas::{Canvas, Eye};
use crate::memory::MemoryTab;
use crate::side::{BoxSide, Compiled, Side};
use eframe::egui::{self, Context, Ui, Vec2};
use rambac_codegen::cuda::Arch;
use rambac_ir::{Bindings, NodeId};
use rambac_picture::export::{APPEARED, VANISHED};
use rambac_picture::family::Colour;
use rambac_picture::fold::boxes_of;
use rambac_picture::scene::Figures;
use rambac_picture::{Look, Open, Picture, Scene};
use std::collections::HashSet;
use std::path::Path;

/// Behind everything.
const BACKGROUND: [f32; 4] = [1.0; 4];

/// Makes a scene of a file, or says why not.
pub type Opener = Box<dyn Fn(&Path) -> Result<Scene, String>>;

/// What the middle shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tab {
    Graph,
    Memory,
}

/// Where the eye goes at the next frame, when the widget's size is known.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Goal {
    /// Everything, or from the left as much as can be read.
    Start,
    /// Everything; where that is in view already, as at the start.
    Whole,
    Item(usize),
    /// The item lies where it lay on the screen.
    Keep(usize, egui::Pos2),
}

/// The window.
pub struct App {
    scene: Scene,
    look: Look,
    picture: Picture,
    canvas: Canvas,
    memory: MemoryTab,
    tab: Tab,
    eye: Eye,
    /// Of the graph's widget, once drawn.
    size: Option<Vec2>,
    corner: egui::Pos2,
    goal: Option<Goal>,
    /// What is told: of the selected node, or of the selected box.
    side: Option<Side>,
    box_side: Option<BoxSide>,
    /// The item that is selected, which may be a box.
    selected: Option<usize>,
    compiled: Compiled,
    arch: Arch,
    search: String,
    hits: Vec<usize>,
    hit: usize,
    focus_search: bool,
    /// Sizes as they are edited.
    sizes: Vec<(String, usize)>,
    /// Why the sizes do not fit.
    wrong: Option<String>,
    total: Figures,
    /// What colours mean.
    legend: Vec<(String, Colour)>,
    /// The list of keys is shown.
    help: bool,
    /// How files are opened that are dropped on the window.
    opener: Option<Opener>,
    /// A file that was dropped and cannot be shown: its name, and why.
    refused: Option<(String, String)>,
}

impl App {
    pub fn new(cx: &Context, scene: Scene, look: Look, arch: Arch) -> Self {
        cx.set_theme(egui::Theme::Light);
        let picture = Picture::new(&scene, &look);
        let canvas = Canvas::new(&picture, mark(&look));
        let sizes = scene.dims.iter().map(|(s, v)| (s.to_string(), v)).collect();
        let memory = MemoryTab::new(&scene);
        let mut app = Self {
            scene,
            look,
            picture,
            canvas,
            memory,
            tab: Tab::Graph,
            eye: Eye::default(),
            size: None,
            corner: egui::Pos2::ZERO,
            goal: Some(Goal::Start),
            side: None,
            box_side: None,
            selected: None,
            compiled: Compiled::default(),
            arch,
            search: String::new(),
            hits: vec![],
            hit: 0,
            focus_search: false,
            sizes,
            wrong: None,
            total: Figures::default(),
            legend: vec![],
            help: false,
            opener: None,
            refused: None,
        };
        app.drawn();
        app
    }

    /// After a picture is made: what is said of all of it.
    fn drawn(&mut self) {
        self.total = self.picture.cards.iter().map(|c| c.figures).fold(Figures::default(), |a, b| a + b);
        self.legend = self.picture.legend(&self.scene, self.look.colour);
    }

    /// The same, which opens files that are dropped on it.
    pub fn with_opener(self, opener: Opener) -> Self {
        Self { opener: Some(opener), ..self }
    }

    /// Opens files that were dropped on the window; one that cannot be shown leaves all as it was.
    fn dropped(&mut self, cx: &Context) {
        let files = cx.input_mut(|i| std::mem::take(&mut i.raw.dropped_files));
        let path = files.first().map(|f| f.path().to_path_buf());
        let Some((path, opener)) = path.zip(self.opener.as_ref()) else { return };
        match opener(&path) {
            Ok(scene) => {
                cx.send_viewport_cmd(egui::ViewportCommand::Title(window_title(&scene)));
                let look = Look { stage: scene.last(), colour: self.look.colour, ..Look::default() };
                *self = Self { opener: self.opener.take(), ..Self::new(cx, scene, look, self.arch) };
            }
            Err(why) => {
                let name = path.file_name().map_or(path.display().to_string(), |n| n.to_string_lossy().into());
                self.refused = Some((name, why));
            }
        }
    }

    pub fn show_tab(&mut self, tab: Tab) {
        self.tab = tab;
    }

    /// Nodes that the pass in view changed.
    pub fn marked(&self) -> usize {
        self.picture.cards.iter().map(|c| c.marked).sum()
    }

    pub fn tab(&self) -> Tab {
        self.tab
    }

    /// Boxes drawn now.
    pub fn boxes(&self) -> usize {
        self.picture.cards.len()
    }

    /// The label of the selected box, and of the node that is told of.
    pub fn selection(&self) -> (Option<&str>, Option<NodeId>) {
        (self.selected.map(|i| self.picture.cards[i].label.as_str()), self.side.as_ref().map(|s| s.node))
    }

    /// The name of the pass in view.
    pub fn pass(&self) -> &str {
        self.scene.stages[self.look.stage].name
    }

    /// Where the middle of the first box with this label is in the graph's widget.
    pub fn place_of(&self, label: &str) -> Option<egui::Pos2> {
        let i = self.picture.cards.iter().position(|c| c.label == label)?;
        Some(self.eye.to_screen(self.picture.layout.centres[i]))
    }

    /// The upper left corner of the graph's widget.
    pub fn corner(&self) -> egui::Pos2 {
        self.corner
    }

    /// Draws anew after the look has changed; `keep` stays where it is on the screen.
    fn redraw(&mut self, keep: Option<usize>) {
        let anchor = keep.map(|i| {
            (
                self.picture.view.items[i].nodes[0],
                self.eye.to_screen(self.picture.layout.centres[i]),
                self.picture.stage,
            )
        });
        let node = self.selected.map(|i| self.picture.view.items[i].nodes[0]);
        let stage = self.picture.stage;
        self.picture = Picture::new(&self.scene, &self.look);
        self.canvas = Canvas::new(&self.picture, mark(&self.look));
        self.drawn();
        self.hits = self.picture.find(&self.scene, &self.search);
        self.hit = 0;
        if let Some((id, at, of)) = anchor
            && let Some(id) =
                if of == self.picture.stage { Some(id) } else { self.scene.same(of, id, self.picture.stage) }
        {
            self.goal = Some(Goal::Keep(self.picture.view.item_of[id.index()], at));
        }
        // The selected node, if it is still there.
        let moved = node.and_then(|n| self.scene.same(stage, n, self.picture.stage));
        self.select(moved.map(|n| self.picture.view.item_of[n.index()]));
    }

    fn set_stage(&mut self, stage: usize) {
        let middle = self.middle();
        self.look.stage = stage.min(self.scene.last());
        if self.look.stage == 0 {
            self.look.before = false;
        }
        self.redraw(middle);
    }

    fn set_before(&mut self, before: bool) {
        self.look.before = before;
        let middle = self.middle();
        self.redraw(middle);
    }

    /// The item nearest to the middle of the window.
    fn middle(&self) -> Option<usize> {
        let middle = (self.size? / 2.0).to_pos2();
        let far = |i: &usize| self.eye.to_screen(self.picture.layout.centres[*i]).distance_sq(middle);
        (0..self.picture.cards.len()).min_by(|a, b| far(a).total_cmp(&far(b)))
    }

    /// Selects an item: a node is told of, a box only marked.
    fn select(&mut self, item: Option<usize>) {
        self.selected = item;
        self.canvas.select(item);
        (self.side, self.box_side) = (None, None);
        let Some(i) = item else { return };
        let shown = &self.picture.view.items[i];
        if shown.folded.is_some() {
            self.box_side = Some(BoxSide::new(&self.scene, &self.picture, i, &self.search));
        } else {
            self.side = Some(Side::new(&self.scene, self.picture.stage, shown.nodes[0], self.arch));
        }
    }

    /// Opens a box, or the run it is.
    fn open(&mut self, item: usize) {
        let Some(b) = &self.picture.view.items[item].folded else { return };
        let name = b.name.clone();
        if let Open::Only(names) = &mut self.look.open {
            names.insert(name);
        }
        // It is no more.
        self.selected = None;
        self.redraw(Some(item));
    }

    /// Folds the box around an item, innermost first.
    fn close(&mut self, item: usize) {
        let shown = &self.picture.view.items[item];
        let graph = &self.scene.stages[self.picture.stage].graph;
        let all = boxes_of(graph, shown.nodes[0]);
        if self.look.open == Open::All {
            // Everything else stays open: the boxes of all nodes, named.
            let names = graph.iter().flat_map(|(id, _)| scopes(graph, id)).collect::<HashSet<_>>();
            self.look.open = Open::Only(names);
        }
        let Open::Only(names) = &mut self.look.open else { return };
        if let Some(name) = all.iter().rev().find(|n| names.contains(*n)) {
            names.remove(name);
            self.redraw(Some(item));
        }
    }

    /// Opens what holds a node, selects it and looks at it.
    fn go_to(&mut self, id: NodeId) {
        let graph = &self.scene.stages[self.picture.stage].graph;
        if let Open::Only(names) = &mut self.look.open {
            names.extend(boxes_of(graph, id));
        }
        self.redraw(None);
        let item = self.picture.view.item_of[id.index()];
        self.select(Some(item));
        self.goal = Some(Goal::Item(item));
        self.tab = Tab::Graph;
    }

    fn next_hit(&mut self, step: isize) {
        if self.hits.is_empty() {
            return;
        }
        let n = self.hits.len() as isize;
        self.hit = (self.hit as isize + step).rem_euclid(n) as usize;
        let item = self.hits[self.hit];
        self.select(Some(item));
        self.goal = Some(Goal::Item(item));
        self.tab = Tab::Graph;
    }

    fn resize(&mut self) {
        let dims: Bindings = Bindings::new(self.sizes.iter().map(|(n, v)| (n.as_str(), *v)));
        match self.scene.resize(&dims) {
            Ok(()) => {
                self.wrong = None;
                self.memory = MemoryTab::new(&self.scene);
                let middle = self.middle();
                self.redraw(middle);
            }
            Err(e) => self.wrong = Some(e.to_string()),
        }
    }

    fn open_all(&mut self) {
        self.look.open = Open::All;
        self.redraw(None);
        self.goal = Some(Goal::Start);
    }

    fn close_all(&mut self) {
        self.look.open = Open::default();
        self.redraw(None);
        self.goal = Some(Goal::Start);
    }
}

/// The colour of what changed.
fn mark(look: &Look) -> Colour {
    if look.before { VANISHED } else { APPEARED }
}

/// The window's title.
pub fn window_title(scene: &Scene) -> String {
    format!("rambac: {}", scene.title)
}

/// The boxes of a node by its scope alone: names of runs that are not are harmless.
fn scopes(g: &rambac_ir::Graph, id: NodeId) -> Vec<String> {
    let scope = g.node(id).scope.as_deref().unwrap_or_default();
    let name = rambac_picture::fold::layer(scope).to_string();
    vec![format!("×{name}"), name]
}

impl eframe::App for App {
    fn clear_color(&self, _: &egui::Visuals) -> [f32; 4] {
        BACKGROUND
    }

    fn ui(&mut self, ui: &mut Ui, _: &mut eframe::Frame) {
        self.draw(ui);
    }
}
