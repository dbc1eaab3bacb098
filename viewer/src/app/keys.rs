//! What keys and the mouse do, and the list of it.

use super::{App, Goal, Tab};
use eframe::egui::{self, Context, Key, Modifiers, RichText, Vec2};

/// How far an arrow moves, in points.
const STEP: f32 = 120.0;

/// For people: what to press, and what it does.
const LIST: [(&str, &str); 17] = [
    ("drag, arrows", "move"),
    ("wheel, pinch, + −", "zoom"),
    ("click on a box", "open it"),
    ("click on a node", "tell of it"),
    ("Shift-click on a box", "tell of it"),
    ("right click, Backspace", "fold what is around it"),
    ("Enter", "open the selected box"),
    ("Esc", "let go"),
    ("F, Home", "fit all into the window"),
    ("O, C", "open all, fold all"),
    ("/ or Ctrl-F", "search"),
    ("Enter, Shift-Enter, N", "next and previous hit"),
    ("[ ]", "pass before, pass after"),
    ("B", "before or after the pass"),
    ("M", "graph or memory"),
    ("a file dropped here", "open it"),
    ("? or F1", "this list"),
];

impl App {
    pub(super) fn keys(&mut self, cx: &Context) {
        if cx.input_mut(|i| i.consume_key(Modifiers::COMMAND, Key::F)) {
            self.focus_search = true;
        }
        if cx.input(|i| i.key_pressed(Key::F1)) {
            self.help = !self.help;
        }
        // Letters typed into a field are no commands.
        if cx.egui_wants_keyboard_input() {
            return;
        }
        if cx.input(|i| i.key_pressed(Key::Questionmark)) {
            self.help = !self.help;
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
            match self.help || self.refused.is_some() {
                true => (self.help, self.refused) = (false, None),
                false => self.select(None),
            }
        }
        if pressed(Key::OpenBracket) {
            self.set_stage(self.look.stage.saturating_sub(1));
        }
        if pressed(Key::CloseBracket) {
            self.set_stage(self.look.stage + 1);
        }
        if pressed(Key::B) && self.look.stage > 0 {
            self.set_before(!self.look.before);
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
        // Typed with shift on many keyboards.
        let (plus, minus) = cx.input(|i| {
            let any = |k: &[Key]| k.iter().any(|k| i.key_pressed(*k)) && !i.modifiers.command;
            (any(&[Key::Plus, Key::Equals]), any(&[Key::Minus]))
        });
        if self.tab == Tab::Memory {
            return;
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
        if plus {
            self.eye.zoom_at(middle, 1.25);
        }
        if minus {
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
                self.eye.pan += Vec2::from(by) * STEP;
            }
        }
    }

    pub(super) fn help_window(&mut self, cx: &Context) {
        let window = egui::Window::new("Keys and mouse").open(&mut self.help).collapsible(false).resizable(false);
        window.anchor(egui::Align2::CENTER_CENTER, Vec2::ZERO).show(cx, |ui| {
            egui::Grid::new("keys").num_columns(2).spacing([24.0, 5.0]).show(ui, |ui| {
                for (what, does) in LIST {
                    ui.label(RichText::new(what).strong());
                    ui.label(does);
                    ui.end_row();
                }
            });
        });
    }
}
