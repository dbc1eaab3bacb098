//! The window without a display: its main views as pictures, and what clicks and keys do.
//!
//! Pictures are drawn by `soft.rs`, so that any machine draws the same.  `UPDATE_SNAPSHOTS=1` writes them anew.

mod soft;

use clap::Parser;
use eframe::egui::{Context, DroppedFile, Event, Key, Modifiers, PointerButton, Pos2, Theme, ViewportId, pos2, vec2};
use egui_kittest::Harness;
use rambac::ViewArgs;
use rambac_codegen::cuda::Arch;
use rambac_ir::{Bindings, text};
use rambac_models::preset;
use rambac_models::stack::{self, Carry};
use rambac_passes::train_step::{AdamW, train_step};
use rambac_picture::{ColourBy, Look, Open, Scene};
use rambac_viewer::{App, Tab, opener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const SIZE: [f32; 2] = [1180.0, 720.0];

fn scene(name: &str) -> Scene {
    let loss = stack::loss(&preset(name).unwrap(), Carry::Zero, false).unwrap();
    let step = train_step(&loss, &AdamW::default(), |_| true).unwrap();
    Scene::new(&format!("{name}, a training step"), &step, &Bindings::new([("N", 1), ("L", 4096)])).unwrap()
}

/// A training step that was compiled once: pictures of it change with the window alone, and with what ops are said to cost.
fn stored() -> Scene {
    let g = text::parse(include_str!("step.ir")).unwrap();
    Scene::compiled("tiny, a training step", g.clone(), g, &Bindings::new([("N", 1), ("L", 4096)])).unwrap()
}

fn app(scene: Scene, change: impl FnOnce(&mut Look)) -> App {
    let mut look = Look { stage: scene.last(), ..Look::default() };
    change(&mut look);
    App::new(&Context::default(), scene, look, Arch::Sm80)
}

/// The window with what it shows drawn a few times, so that sizes have settled.
fn window(app: App) -> Harness<'static, App> {
    let size = vec2(SIZE[0], SIZE[1]);
    let builder = Harness::builder().with_size(size).with_theme(Theme::Light).renderer(soft::Soft::default());
    let mut h = builder.build_ui_state(|ui, app: &mut App| app.draw(ui), app);
    h.run_steps(4);
    h
}

fn press(h: &mut Harness<'_, App>, key: Key) {
    h.key_press(key);
    h.run_steps(3);
}

/// A click; the graph's widget begins below the bar, at the window's left side.
fn click(h: &mut Harness<'_, App>, at: Pos2, button: PointerButton) {
    h.event(Event::PointerMoved(at));
    h.run_steps(1);
    for pressed in [true, false] {
        h.event(Event::PointerButton { pos: at, button, pressed, modifiers: Modifiers::NONE });
        h.run_steps(1);
    }
    h.run_steps(2);
}

/// Where a box is in the window.
fn place(h: &Harness<'_, App>, label: &str) -> Pos2 {
    let p = h.state().place_of(label).unwrap_or_else(|| panic!("no box {label:?}"));
    p + h.state().corner().to_vec2()
}

#[test]
fn folded() {
    let mut h = window(app(stored(), |_| {}));
    h.snapshot("folded");
}

/// A click opens a box, a click on a node tells of it, a right click folds around it, Escape lets go.
#[test]
fn opened_by_clicks() {
    let mut h = window(app(stored(), |_| {}));
    let before = h.state().boxes();
    let at = place(&h, "layers.0");
    click(&mut h, at, PointerButton::Primary);
    let opened = h.state().boxes();
    assert!(opened > before + 5, "{before} boxes, then {opened}");
    h.remove_cursor();
    h.run_steps(3);
    h.snapshot("opened");
    let at = place(&h, "selective_scan");
    click(&mut h, at, PointerButton::Primary);
    let (label, node) = h.state().selection();
    assert!(label == Some("selective_scan") && node.is_some(), "{label:?}");
    h.remove_cursor();
    h.run_steps(3);
    h.snapshot("node");
    let at = place(&h, "selective_scan");
    click(&mut h, at, PointerButton::Secondary);
    assert_eq!(h.state().boxes(), before);
    press(&mut h, Key::Escape);
    assert_eq!(h.state().selection().0, None);
}

/// A click with shift tells of a box without opening it; Enter opens it.
#[test]
fn boxes_are_told_of() {
    let mut h = window(app(stored(), |_| {}));
    let before = h.state().boxes();
    let at = place(&h, "layers.0");
    h.event(Event::PointerMoved(at));
    h.run_steps(1);
    h.event(Event::ModifiersChanged(Modifiers::SHIFT));
    click(&mut h, at, PointerButton::Primary);
    h.event(Event::ModifiersChanged(Modifiers::NONE));
    h.run_steps(1);
    assert_eq!((h.state().boxes(), h.state().selection().0), (before, Some("layers.0")));
    press(&mut h, Key::Enter);
    assert!(h.state().boxes() > before && h.state().selection().0.is_none());
}

#[test]
fn coloured_by_time() {
    let mut h = window(app(stored(), |l| l.colour = ColourBy::Time));
    h.snapshot("time");
}

/// Keys go from pass to pass.
#[test]
fn passes() {
    let s = scene("tiny");
    let fused = s.stages.iter().position(|s| s.name == "fuse_attention").unwrap();
    let mut h = window(app(s, |l| l.stage = fused));
    press(&mut h, Key::OpenBracket);
    assert_eq!(h.state().pass(), "fuse_selection");
    press(&mut h, Key::CloseBracket);
    assert_eq!(h.state().pass(), "fuse_attention");
    assert!(h.state().marked() > 0);
}

/// What appeared is marked in the graph after a pass, what vanished in the one before it.
#[test]
fn before_and_after() {
    let [before, after] = [include_str!("before.ir"), include_str!("after.ir")].map(|t| text::parse(t).unwrap());
    let s = Scene::compiled("hsa", before, after, &Bindings::new([("N", 1), ("L", 4096)])).unwrap();
    let mut h = window(app(s, |_| {}));
    h.snapshot("after");
    press(&mut h, Key::B);
    h.snapshot("before");
}

#[test]
fn memory() {
    let mut a = app(stored(), |_| {});
    a.show_tab(Tab::Memory);
    let mut h = window(a);
    h.snapshot("memory");
    // A click on a buffer leads to the node that makes it.
    click(&mut h, pos2(500.0, 600.0), PointerButton::Primary);
    let (label, node) = h.state().selection();
    assert!(node.is_some() && h.state().place_of("head").is_some(), "{label:?}");
    press(&mut h, Key::M);
    assert!(h.state().tab() == Tab::Memory);
}

/// `/` leads to the field; what is found is selected, the next one with Enter.  What is inside a box is listed.
#[test]
fn search() {
    let mut h = window(app(stored(), |_| {}));
    press(&mut h, Key::Slash);
    h.event(Event::Text("selective_scan".into()));
    h.run_steps(3);
    let first = h.state().selection().0.map(str::to_string);
    assert_eq!(first.as_deref(), Some("layers.0"));
    h.snapshot("search");
    press(&mut h, Key::Enter);
    let second = h.state().selection().0.map(str::to_string);
    assert!(second.is_some() && second != first, "{second:?}");
    let mut h = window(app(stored(), |l| l.open = Open::All));
    press(&mut h, Key::Slash);
    h.event(Event::Text("selective_scan".into()));
    h.run_steps(3);
    let (label, node) = h.state().selection();
    assert!(label == Some("selective_scan") && node.is_some(), "{label:?}");
}

/// A file that is dropped on the window and is malformed leaves what there was and says why; a right one is shown.
#[test]
fn dropped_files() {
    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        view: ViewArgs,
    }
    let given = Cli::parse_from(["viewer", "tiny"]).view;
    let mut h = window(app(stored(), |_| {}).with_opener(opener(given)));
    let boxes = h.state().boxes();
    let drop = |h: &mut Harness<'_, App>, path: &str| {
        h.input_mut().dropped_files.push(Arc::new(Dropped(path.into())));
        h.run_steps(4);
    };
    drop(&mut h, "tests/window/malformed.ir");
    assert_eq!(h.state().boxes(), boxes);
    h.snapshot("malformed");
    press(&mut h, Key::Escape);
    drop(&mut h, "../models/variants/nsa.ir");
    assert!(h.state().place_of("attention").is_some() && h.state().boxes() != boxes);
}

#[derive(Debug)]
struct Dropped(PathBuf);

impl DroppedFile for Dropped {
    fn path(&self) -> &Path {
        &self.0
    }
    fn bytes(&self) -> Result<Vec<u8>, String> {
        std::fs::read(&self.0).map_err(|e| e.to_string())
    }
}

#[test]
fn keys_are_listed() {
    let mut h = window(app(stored(), |_| {}));
    press(&mut h, Key::F1);
    h.snapshot("keys");
    press(&mut h, Key::Escape);
}

#[test]
fn every_preset_opens() {
    for name in ["tiny", "small", "mamba2-130m", "370m", "3b"] {
        let mut h = window(app(scene(name), |_| {}));
        press(&mut h, Key::M);
        assert!(h.state().boxes() > 10, "{name}");
    }
}

/// Of thousands of boxes only those in view are drawn, and a window in which nothing happens sleeps.
#[test]
fn a_large_model_is_fluid() {
    let mut h = window(app(scene("370m"), |l| l.open = Open::All));
    assert!(h.state().boxes() > 3_000);
    let sleeps =
        |h: &Harness<'_, App>| h.output().viewport_output[&ViewportId::ROOT].repaint_delay > Duration::from_secs(1);
    assert!(sleeps(&h), "it asks for frames though nothing happens");
    h.event(Event::PointerMoved(pos2(600.0, 400.0)));
    h.run_steps(1);
    let shapes = h.output().shapes.len();
    assert!((100..4_000).contains(&shapes), "{shapes} shapes in a frame");
    h.remove_cursor();
    h.run_steps(12);
    assert!(sleeps(&h), "it goes on after the mouse has gone");
    // All of it in view: what is too small to be told is drawn in few shapes.
    press(&mut h, Key::F);
    let shapes = h.output().shapes.len();
    assert!(shapes < 15_000, "{shapes} shapes in a frame");
}
