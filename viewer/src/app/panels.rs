//! Everything that the window shows around the graph, and what clicks in it do.

use super::{App, Goal, Tab};
use crate::canvas::{self, Eye, Touched};
use crate::side::Go;
use eframe::egui::{self, Align, CentralPanel, Color32, Context, Key, Layout, Panel, RichText, Ui, Vec2};
use rambac_codegen::cuda::Arch;
use rambac_picture::ColourBy;
use rambac_picture::export::{APPEARED, VANISHED, title};
use rambac_picture::number::si;

/// Labels can be read at this zoom.
pub(super) const READABLE: f32 = 0.55;

impl App {
    /// Everything, in its panels.
    pub fn draw(&mut self, ui: &mut Ui) {
        let cx = ui.ctx().clone();
        self.keys(&cx);
        self.dropped(&cx);
        Panel::top("bar").show(ui, |ui| {
            ui.add_space(3.0);
            ui.horizontal_wrapped(|ui| self.bar(ui));
            ui.add_space(2.0);
        });
        if self.tab == Tab::Graph {
            Panel::top("legend").show(ui, |ui| {
                ui.add_space(2.0);
                ui.horizontal_wrapped(|ui| self.legend(ui));
            });
        }
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
        // White already: filling all of it once more takes a third of a frame in software.
        let frame = egui::Frame::central_panel(ui.style()).fill(Color32::TRANSPARENT).inner_margin(0.0);
        CentralPanel::default().frame(frame).show(ui, |ui| match self.tab {
            Tab::Graph => self.graph(ui),
            Tab::Memory => {
                // Its nodes are those of the last pass.
                if let Some(id) = self.memory.show(ui, &self.scene) {
                    self.set_stage(self.scene.last());
                    self.set_before(false);
                    self.go_to(id);
                }
            }
        });
        self.help_window(&cx);
        self.refusal(&cx);
    }

    /// Why a file that was dropped here is not shown.
    fn refusal(&mut self, cx: &Context) {
        let Some((name, why)) = &self.refused else { return };
        let mut open = true;
        let window = egui::Window::new(format!("{name} cannot be shown")).id(egui::Id::new("refused"));
        let window = window.open(&mut open).collapsible(false).min_width(760.0);
        window.anchor(egui::Align2::CENTER_CENTER, Vec2::ZERO).show(cx, |ui| {
            egui::ScrollArea::both().max_height(420.0).show(ui, |ui| {
                ui.add(egui::Label::new(RichText::new(why).monospace().size(12.0)).extend().selectable(true));
            });
        });
        if !open {
            self.refused = None;
        }
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
            ui.add(egui::Label::new(name.as_str()).selectable(false));
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
            self.next_hit(if ui.input(|i| i.modifiers.shift) { -1 } else { 1 });
            field.request_focus();
        }
        if !self.search.is_empty() {
            let at = if self.hits.is_empty() { 0 } else { self.hit + 1 };
            ui.label(format!("{at} of {}", self.hits.len()));
        }
        ui.separator();
        if ui.button("?").on_hover_text("Keys and mouse").clicked() {
            self.help = !self.help;
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
                    self.set_before(b);
                }
                let marked = self.marked();
                let (what, c) = if b { ("vanish", VANISHED) } else { ("appeared", APPEARED) };
                ui.label(format!("{before} nodes before, {nodes} after,"));
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
        let go = match (&self.side, &self.box_side) {
            (Some(s), _) => s.show(ui, &mut self.compiled).map(Go::To),
            (None, Some(b)) => b.show(ui),
            (None, None) => None,
        };
        match (go, self.selected) {
            (Some(Go::To(id)), _) => self.go_to(id),
            (Some(Go::Open), Some(item)) => self.open(item),
            _ => {}
        }
    }

    fn graph(&mut self, ui: &mut Ui) {
        let size = ui.available_size();
        if self.size.is_none_or(|s| s != size) {
            self.size = Some(size);
        }
        match self.goal.take() {
            Some(Goal::Start) => self.eye = Eye::whole(self.picture.layout.extent, size, READABLE),
            Some(Goal::Whole) => {
                let [start, whole] = [READABLE, 0.0].map(|least| Eye::whole(self.picture.layout.extent, size, least));
                self.eye = if self.eye == whole { start } else { whole };
            }
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
        let t = self.canvas.show(ui, &mut self.eye);
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
            // With shift a box is only selected, and told of.
            if self.picture.cards[i].opens && !ui.input(|i| i.modifiers.shift) {
                self.open(i);
            } else {
                self.select(Some(i));
            }
        } else if t.away {
            self.select(None);
        }
    }

    /// What colours mean, in a row.
    fn legend(&self, ui: &mut Ui) {
        ui.spacing_mut().item_spacing = egui::vec2(5.0, 2.0);
        let mut entry = |name: &str, c, marked: bool| {
            // A swatch and its word stay in one line.
            let width = name.chars().count() as f32 * 6.0 + 28.0;
            ui.allocate_ui_with_layout(egui::vec2(width, 16.0), Layout::left_to_right(Align::Center), |ui| {
                let (rect, _) = ui.allocate_exact_size(egui::vec2(12.0, 12.0), egui::Sense::hover());
                let (fill, stroke) = match marked {
                    false => (canvas::colour(c), egui::Stroke::new(0.5, Color32::GRAY)),
                    true => (Color32::WHITE, egui::Stroke::new(2.5, canvas::colour(c))),
                };
                ui.painter().rect(rect, 3.0, fill, stroke, egui::StrokeKind::Inside);
                ui.label(RichText::new(name).size(11.5));
                ui.add_space(6.0);
            });
        };
        self.legend.iter().for_each(|(name, c)| entry(name, *c, false));
        match (self.look.stage, self.look.before) {
            (0, _) => {}
            (_, true) => entry("taken away by this pass", VANISHED, true),
            (_, false) => entry("new in this pass", APPEARED, true),
        }
    }
}
