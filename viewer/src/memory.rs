//! The memory plan: every buffer over the steps in which it lives, at its address.

use crate::canvas::colour;
use eframe::egui::{self, Align2, Color32, FontId, Pos2, Rect, Sense, Shape, Stroke, StrokeKind, Ui, pos2, vec2};
use rambac_ir::NodeId;
use rambac_picture::Scene;
use rambac_picture::memory::{Block, blocks};
use rambac_picture::number::bytes;

/// The tab's state.
pub struct MemoryTab {
    blocks: Vec<Block>,
    /// First and last step in view.
    steps: (f32, f32),
}

impl MemoryTab {
    pub fn new(scene: &Scene) -> Self {
        let last = scene.program.steps.len().max(1) as f32;
        Self { blocks: blocks(&scene.program, &scene.plan), steps: (0.0, last) }
    }

    /// Shows it; the node whose buffer was clicked.
    pub fn show(&mut self, ui: &mut Ui, scene: &Scene) -> Option<NodeId> {
        let plan = &scene.plan;
        ui.add_space(4.0);
        ui.horizontal_wrapped(|ui| {
            ui.add_space(10.0);
            ui.label(format!(
                "{} at the peak: {} of activations and scratch (at least {} in this order), {} of weights and states, {} of \
                 inputs.",
                bytes(plan.peak()),
                bytes(plan.arena),
                bytes(plan.floor),
                bytes(plan.persistent),
                bytes(plan.inputs)
            ));
            ui.weak("Wheel: zoom in time. Drag: move. Click: the node. The line: bytes alive.");
        });
        let (response, painter) = ui.allocate_painter(ui.available_size(), Sense::click_and_drag());
        let area = Rect::from_min_max(response.rect.min + vec2(80.0, 10.0), response.rect.max - vec2(14.0, 30.0));
        if area.width() < 20.0 || area.height() < 20.0 {
            return None;
        }
        self.navigate(ui, &response, area, scene.program.steps.len());
        let (from, to) = self.steps;
        let most = plan.arena.max(1) as f32;
        let x = |s: f32| area.left() + (s - from) / (to - from) * area.width();
        let y = |b: f32| area.bottom() - b / most * area.height();
        for i in 0..=4 {
            let b = most * i as f32 / 4.0;
            painter.hline(area.x_range(), y(b), Stroke::new(1.0, Color32::from_gray(228)));
            let text = bytes(b as usize);
            painter.text(
                pos2(area.left() - 8.0, y(b)),
                Align2::RIGHT_CENTER,
                text,
                FontId::proportional(12.0),
                Color32::DARK_GRAY,
            );
        }
        let inside = painter.with_clip_rect(area.expand(1.0));
        let pointer = response.hover_pos().filter(|p| area.contains(*p));
        let mut under: Option<(&Block, Rect)> = None;
        for b in &self.blocks {
            let rect = Rect::from_min_max(
                pos2(x(b.steps.0 as f32), y((b.place.0 + b.place.1) as f32)),
                pos2(x(b.steps.1 as f32 + 1.0), y(b.place.0 as f32)),
            );
            if rect.right() < area.left() || rect.left() > area.right() || rect.height() < 0.15 {
                continue;
            }
            let edge = if rect.width() > 3.0 && rect.height() > 3.0 { 0.5 } else { 0.0 };
            inside.rect(rect, 0.0, colour(b.colour), Stroke::new(edge, Color32::WHITE), StrokeKind::Inside);
            if pointer.is_some_and(|p| rect.contains(p)) {
                under = Some((b, rect));
            }
        }
        let line: Vec<Pos2> =
            plan.alive.iter().enumerate().map(|(i, b)| pos2(x(i as f32 + 0.5), y(*b as f32))).collect();
        inside.add(Shape::line(line, Stroke::new(1.3, Color32::from_gray(30))));
        for i in 0..=6 {
            let s = from + (to - from) * i as f32 / 6.0;
            let at = pos2(x(s), area.bottom() + 6.0);
            let text = format!("{}", s.round() as usize);
            painter.text(at, Align2::CENTER_TOP, text, FontId::proportional(12.0), Color32::DARK_GRAY);
        }
        let p = pointer?;
        let step = (from + (p.x - area.left()) / area.width() * (to - from)) as usize;
        inside.vline(p.x, area.y_range(), Stroke::new(0.6, Color32::GRAY));
        if let Some((_, rect)) = under {
            inside.rect_stroke(rect, 0.0, Stroke::new(1.5, Color32::BLACK), StrokeKind::Outside);
        }
        let clicked = response.clicked();
        response.on_hover_ui_at_pointer(|ui| {
            if let Some(s) = scene.program.steps.get(step) {
                let scope =
                    scene.program.graph.node(s.node).scope.as_deref().map(|s| format!(" @{s}")).unwrap_or_default();
                let alive = bytes(plan.alive.get(step).copied().unwrap_or(0));
                ui.label(format!("step {step}: {}{scope}, {alive} alive", s.op.mnemonic()));
            }
            if let Some((b, _)) = under {
                ui.strong(&b.name);
                ui.label(format!("{} at {}, steps {} to {}", bytes(b.place.1), bytes(b.place.0), b.steps.0, b.steps.1));
            }
        });
        clicked.then_some(under?.0.node).flatten()
    }

    fn navigate(&mut self, ui: &Ui, response: &egui::Response, area: Rect, steps: usize) {
        let all = steps.max(1) as f32;
        let (from, to) = self.steps;
        let per_point = (to - from) / area.width();
        if let Some(p) = response.hover_pos() {
            let wheel = ui.input(|i| i.smooth_scroll_delta.y / 240.0 + i.zoom_delta().ln());
            if wheel != 0.0 {
                let at = from + (p.x - area.left()) * per_point;
                let width = ((to - from) / wheel.exp()).clamp(5.0_f32.min(all), all);
                let part = (at - from) / (to - from);
                self.steps = (at - width * part, at + width * (1.0 - part));
            }
        }
        if response.dragged() {
            let by = response.drag_delta().x * per_point;
            self.steps = (self.steps.0 - by, self.steps.1 - by);
        }
        if response.double_clicked() {
            self.steps = (0.0, all);
        }
        // Never beyond the ends.
        let width = self.steps.1 - self.steps.0;
        let from = self.steps.0.clamp(0.0, (all - width).max(0.0));
        self.steps = (from, from + width);
    }
}
