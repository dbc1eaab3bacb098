//! The window's state and its panels.

use crate::canvas::{self, Eye, Items, Touched};
use crate::memory::MemoryTab;
use crate::side::{Compiled, Side};
use eframe::egui::{self, Align, CentralPanel, Color32, Context, Key, Layout, Modifiers, Panel, RichText, Ui, Vec2};
use rambac_codegen::cuda::Arch;
use rambac_ir::{Bindings, NodeId};
use rambac_picture::export::{APPEARED, VANISHED, title};
use rambac_picture::fold::boxes_of;
use rambac_picture::number::si;
use rambac_picture::scene::Figures;
use rambac_picture::{ColourBy, Look, Open, Picture, Scene};
use std::collections::HashSet;

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
    items: Items,
    memory: MemoryTab,
    tab: Tab,
    eye: Eye,
    /// Of the graph's widget, once drawn.
    size: Option<Vec2>,
    corner: egui::Pos2,
    goal: Option<Goal>,
    side: Option<Side>,
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
}

impl App {
    pub fn new(cx: &Context, scene: Scene, look: Look, arch: Arch) -> Self {
        cx.set_theme(egui::Theme::Light);
        let picture = Picture::new(&scene, &look);
        let items = canvas::items(&picture, mark(&look));
        let sizes = scene.dims.iter().map(|(s, v)| (s.to_string(), v)).collect();
        let memory = MemoryTab::new(&scene);
        let mut app = Self {
            scene,
            look,
            picture,
            items,
            memory,
            tab: Tab::Graph,
            eye: Eye::default(),
            size: None,
            corner: egui::Pos2::ZERO,
            goal: Some(Goal::Whole),
            side: None,
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
        };
        app.total = app.sum();
        app
    }

    fn sum(&self) -> Figures {
        self.picture.cards.iter().map(|c| c.figures).fold(Figures::default(), |a, b| a + b)
    }

    pub fn show_tab(&mut self, tab: Tab) {
        self.tab = tab;
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
        let node = self.side.as_ref().map(|s| s.node);
        let stage = self.picture.stage;
        self.picture = Picture::new(&self.scene, &self.look);
        self.items = canvas::items(&self.picture, mark(&self.look));
        self.total = self.sum();
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
        self.selected = None;
        self.side = moved.map(|n| Side::new(&self.scene, self.picture.stage, n, self.arch));
        self.selected = moved.map(|n| self.picture.view.item_of[n.index()]);
        canvas::select(&mut self.items, self.selected);
    }

    fn set_stage(&mut self, stage: usize) {
        let middle = self.middle();
        self.look.stage = stage.min(self.scene.last());
        if self.look.stage == 0 {
            self.look.before = false;
        }
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
        canvas::select(&mut self.items, item);
        self.side = match item.map(|i| &self.picture.view.items[i]) {
            Some(i) if i.folded.is_none() => Some(Side::new(&self.scene, self.picture.stage, i.nodes[0], self.arch)),
            _ => None,
        };
    }

    /// Opens a box, or the run it is.
    fn open(&mut self, item: usize) {
        let Some(b) = &self.picture.view.items[item].folded else { return };
        let name = b.name.clone();
        if let Open::Only(names) = &mut self.look.open {
            names.insert(name);
        }
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

    fn keys(&mut self, cx: &Context) {
        if cx.input_mut(|i| i.consume_key(Modifiers::COMMAND, Key::F)) {
            self.focus_search = true;
        }
        // Letters typed into a field are no commands.
        if cx.egui_wants_keyboard_input() {
            return;
        }
        let pressed = |k: Key| cx.input(|i| i.key_pressed(k) && i.modifiers.is_none());
        if pressed(Key::Slash) {
            self.focus_search = true;
        }
        if pressed(Key::F) || pressed(Key::Home) {
            self.goal = Some(Goal::Whole);
        }
        if pressed(Key::M) {
            self.tab = if self.tab == Tab::Graph { Tab::Memory } else { Tab::Graph };
        }
        if pressed(Key::Escape) {
            self.select(None);
        }
        if pressed(Key::OpenBracket) {
            self.set_stage(self.look.stage.saturating_sub(1));
        }
        if pressed(Key::CloseBracket) {
            self.set_stage(self.look.stage + 1);
        }
        if pressed(Key::B) && self.look.stage > 0 {
            self.look.before = !self.look.before;
            let middle = self.middle();
            self.redraw(middle);
        }
        if pressed(Key::O) {
            self.open_all();
        }
        if pressed(Key::C) {
            self.close_all();
        }
        if pressed(Key::N) {
            self.next_hit(1);
        }
        if let Some(i) = self.selected {
            if pressed(Key::Enter) {
                self.open(i);
            } else if pressed(Key::Backspace) {
                self.close(i);
            }
        }
        let Some(size) = self.size else { return };
        let middle = size / 2.0;
        if pressed(Key::Plus) || pressed(Key::Equals) {
            self.eye.zoom_at(middle, 1.25);
        }
        if pressed(Key::Minus) {
            self.eye.zoom_at(middle, 0.8);
        }
        let arrows = [
            (Key::ArrowLeft, [1.0, 0.0]),
            (Key::ArrowRight, [-1.0, 0.0]),
            (Key::ArrowUp, [0.0, 1.0]),
            (Key::ArrowDown, [0.0, -1.0]),
        ];
        for (key, by) in arrows {
            if pressed(key) {
                self.eye.pan += Vec2::from(by) * 120.0;
            }
        }
    }

    fn open_all(&mut self) {
        self.look.open = Open::All;
        self.redraw(None);
        self.goal = Some(Goal::Whole);
    }

    fn close_all(&mut self) {
        self.look.open = Open::default();
        self.redraw(None);
        self.goal = Some(Goal::Whole);
    }

    /// Everything, in its panels.
    pub fn draw(&mut self, ui: &mut Ui) {
        let cx = ui.ctx().clone();
        self.keys(&cx);
        Panel::top("bar").show(ui, |ui| {
            ui.add_space(3.0);
            ui.horizontal_wrapped(|ui| self.bar(ui));
            ui.add_space(2.0);
        });
        Panel::bottom("passes").show(ui, |ui| {
            ui.add_space(4.0);
            self.passes(ui);
            ui.add_space(4.0);
        });
        if self.tab == Tab::Graph && self.selected.is_some() {
            Panel::right("side").default_size(380.0).size_range(240.0..=700.0).show(ui, |ui| {
                egui::ScrollArea::vertical().auto_shrink([false, false]).show(ui, |ui| self.side(ui));
            });
        }
        let frame = egui::Frame::central_panel(ui.style()).fill(Color32::WHITE).inner_margin(0.0);
        CentralPanel::default().frame(frame).show(ui, |ui| match self.tab {
            Tab::Graph => self.graph(ui),
            Tab::Memory => self.memory.show(ui, &self.scene),
        });
    }

    fn bar(&mut self, ui: &mut Ui) {
        ui.selectable_value(&mut self.tab, Tab::Graph, "Graph");
        ui.selectable_value(&mut self.tab, Tab::Memory, "Memory");
        ui.separator();
        ui.label("Colour");
        let mut colour = self.look.colour;
        egui::ComboBox::from_id_salt("colour").selected_text(colour.name()).show_ui(ui, |ui| {
            for c in ColourBy::ALL {
                ui.selectable_value(&mut colour, c, c.name());
            }
        });
        if colour != self.look.colour {
            self.look.colour = colour;
            let middle = self.middle();
            self.redraw(middle);
        }
        ui.separator();
        if ui.button("Fit").on_hover_text("F").clicked() {
            self.goal = Some(Goal::Whole);
        }
        if ui.button("Open all").on_hover_text("O; a click opens one box").clicked() {
            self.open_all();
        }
        if ui.button("Fold").on_hover_text("C; a right click folds around one node").clicked() {
            self.close_all();
        }
        ui.separator();
        let mut changed = false;
        for (name, value) in &mut self.sizes {
            ui.label(name.as_str());
            let drag = egui::DragValue::new(value).range(1..=1usize << 30).speed(16.0);
            changed |= ui.add(drag).changed();
        }
        if changed {
            self.resize();
        }
        ui.separator();
        let mut arch = self.arch;
        egui::ComboBox::from_id_salt("arch").width(70.0).selected_text(arch.name()).show_ui(ui, |ui| {
            Arch::ALL.iter().for_each(|a| drop(ui.selectable_value(&mut arch, *a, a.name())));
        });
        if arch != self.arch {
            self.arch = arch;
            self.select(self.selected);
        }
        ui.separator();
        let field =
            egui::TextEdit::singleline(&mut self.search).hint_text("Search: op, name, layer").desired_width(180.0);
        let field = ui.add(field);
        if std::mem::take(&mut self.focus_search) {
            field.request_focus();
        }
        if field.changed() {
            self.hits = self.picture.find(&self.scene, &self.search);
            self.hit = 0;
            if let Some(&first) = self.hits.first() {
                self.select(Some(first));
                self.goal = Some(Goal::Item(first));
            }
        }
        if field.lost_focus() && ui.input(|i| i.key_pressed(Key::Enter)) {
            self.next_hit(1);
            field.request_focus();
        }
        if !self.search.is_empty() {
            let at = if self.hits.is_empty() { 0 } else { self.hit + 1 };
            ui.label(format!("{at} of {}", self.hits.len()));
        }
        if let Some(w) = &self.wrong {
            ui.colored_label(Color32::from_rgb(170, 40, 40), w);
        }
    }

    fn passes(&mut self, ui: &mut Ui) {
        let mut stage = self.look.stage;
        ui.horizontal(|ui| {
            ui.label("Passes");
            let last = self.scene.last();
            ui.spacing_mut().slider_width = (ui.available_width() * 0.3).max(120.0);
            ui.add(egui::Slider::new(&mut stage, 0..=last).show_value(false));
            let name = self.scene.stages[self.look.stage].name;
            let nodes = self.scene.stages[self.look.stage].graph.nodes.len();
            let shown = match (self.look.stage, self.look.before) {
                (0, _) => name.to_string(),
                (n, true) => format!("{n} of {last}: before {name}"),
                (n, false) => format!("{n} of {last}: after {name}"),
            };
            ui.strong(shown);
            if self.look.stage > 0 {
                let before = self.scene.stages[self.look.stage - 1].graph.nodes.len();
                let mut b = self.look.before;
                ui.selectable_value(&mut b, true, "before").on_hover_text("B; what it takes away is marked red");
                ui.selectable_value(&mut b, false, "after").on_hover_text("B; what it adds is marked green");
                if b != self.look.before {
                    self.look.before = b;
                    let middle = self.middle();
                    self.redraw(middle);
                }
                let marked: usize = self.picture.cards.iter().map(|c| c.marked).sum();
                let (what, c) = if b { ("vanish", VANISHED) } else { ("appeared", APPEARED) };
                ui.label(format!("{before} → {nodes} nodes,"));
                ui.colored_label(canvas::colour(c), format!("{marked} {what}"));
            } else {
                ui.label(format!("{nodes} nodes"));
            }
            ui.with_layout(Layout::right_to_left(Align::Center), |ui| {
                let t = &self.total;
                ui.weak(format!("{}, {} moved", si(t.flops, "FLOP"), si(t.bytes, "B")));
            });
        });
        if stage != self.look.stage {
            self.set_stage(stage);
        }
    }

    fn side(&mut self, ui: &mut Ui) {
        let Some(item) = self.selected else { return };
        let go = match &self.side {
            Some(s) => s.show(ui, &mut self.compiled),
            None => {
                let card = &self.picture.cards[item];
                ui.heading(&card.label);
                ui.label(title(&self.scene, &self.picture, item));
                ui.add_space(6.0);
                if ui.button("Open").clicked() {
                    self.open(item);
                }
                None
            }
        };
        if let Some(id) = go {
            self.go_to(id);
        }
    }

    fn graph(&mut self, ui: &mut Ui) {
        let size = ui.available_size();
        if self.size.is_none_or(|s| s != size) {
            self.size = Some(size);
        }
        match self.goal.take() {
            Some(Goal::Whole) => self.eye = Eye::whole(self.picture.layout.extent, size, 0.35),
            Some(Goal::Item(i)) => {
                self.eye = Eye::on(self.picture.layout.centres[i], size, self.eye.zoom.clamp(0.7, 1.5));
            }
            Some(Goal::Keep(i, at)) => {
                let now = self.eye.to_screen(self.picture.layout.centres[i]);
                self.eye.pan += at - now;
            }
            None => {}
        }
        let corner = ui.max_rect().min;
        self.corner = corner;
        let t = canvas::show(ui, &mut self.items, &mut self.eye);
        self.legend(ui, corner);
        self.touched(ui, t);
    }

    fn touched(&mut self, ui: &mut Ui, t: Touched) {
        if let Some(i) = t.hovered {
            let text = title(&self.scene, &self.picture, i);
            egui::Tooltip::always_open(
                ui.ctx().clone(),
                ui.layer_id(),
                ui.id().with("hover"),
                egui::PopupAnchor::Pointer,
            )
            .show(|ui| {
                ui.set_max_width(520.0);
                ui.label(RichText::new(text).size(11.5));
            });
            if ui.input(|i| i.pointer.secondary_clicked()) {
                self.close(i);
                return;
            }
        }
        if let Some(i) = t.clicked.or(t.double_clicked) {
            if self.picture.cards[i].opens {
                self.open(i);
            } else {
                self.select(Some(i));
            }
        } else if t.away {
            self.select(None);
        }
    }

    fn legend(&self, ui: &mut Ui, corner: egui::Pos2) {
        let all = self.picture.legend(&self.scene, self.look.colour);
        egui::Area::new(egui::Id::new("legend")).fixed_pos(corner + egui::vec2(10.0, 10.0)).interactable(false).show(
            ui.ctx(),
            |ui| {
                egui::Frame::new().fill(Color32::from_white_alpha(225)).inner_margin(6.0).corner_radius(4.0).show(
                    ui,
                    |ui| {
                        for (name, c) in all {
                            ui.horizontal(|ui| {
                                let (rect, _) = ui.allocate_exact_size(egui::vec2(12.0, 12.0), egui::Sense::hover());
                                ui.painter().rect_filled(rect, 3.0, canvas::colour(c));
                                ui.label(RichText::new(name).size(11.5));
                            });
                        }
                    },
                );
            },
        );
    }
}

/// The colour of what changed.
fn mark(look: &Look) -> [u8; 3] {
    if look.before { VANISHED } else { APPEARED }
}

/// The boxes of a node by its scope alone: names of runs that are not are harmless.
fn scopes(g: &rambac_ir::Graph, id: NodeId) -> Vec<String> {
    let scope = g.node(id).scope.as_deref().unwrap_or_default();
    let name = rambac_picture::fold::layer(scope).to_string();
    vec![format!("×{name}"), name]
}

impl eframe::App for App {
    fn ui(&mut self, ui: &mut Ui, _: &mut eframe::Frame) {
        self.draw(ui);
    }
}
