//! The window without a display: its main views as pictures, and what clicks and keys do.
//!
//! Pictures are drawn by a software renderer; without one (Debian: mesa-vulkan-drivers) every test is counted as ignored and
//! the reason printed.  `UPDATE_SNAPSHOTS=1` writes the pictures anew.

#[path = "../../tests/pages/harness.rs"]
mod harness;

use eframe::egui::{Context, Event, Key, Modifiers, PointerButton, Pos2, Theme, pos2, vec2};
use egui_kittest::Harness;
use egui_kittest::wgpu::WgpuTestRenderer;
use rambac_codegen::cuda::Arch;
use rambac_ir::Bindings;
use rambac_models::preset;
use rambac_models::stack::{self, Carry};
use rambac_passes::train_step::{AdamW, train_step};
use rambac_picture::{ColourBy, Look, Open, Scene};
use rambac_viewer::{App, Tab};
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    harness::run(&[
        ("folded", folded),
        ("opened_by_clicks", opened_by_clicks),
        ("colours", colours),
        ("passes", passes),
        ("memory", memory),
        ("search", search),
        ("every_preset_opens", every_preset_opens),
        ("a_large_model_is_fluid", a_large_model_is_fluid),
    ])
}

const SIZE: [f32; 2] = [1280.0, 800.0];

fn scene(name: &str) -> Scene {
    let loss = stack::loss(&preset(name).unwrap(), Carry::Zero, false).unwrap();
    let step = train_step(&loss, &AdamW::default(), |_| true).unwrap();
    Scene::new(&format!("{name}, a training step"), &step, &Bindings::new([("N", 1), ("L", 4096)])).unwrap()
}

fn app(scene: Scene, change: impl FnOnce(&mut Look)) -> App {
    let mut look = Look { stage: scene.last(), ..Look::default() };
    change(&mut look);
    App::new(&Context::default(), scene, look, Arch::Sm80)
}

/// The window with what it shows drawn a few times, so that sizes have settled.
fn window(app: App) -> Result<Harness<'static, App>, String> {
    let renderer = std::panic::catch_unwind(WgpuTestRenderer::new).map_err(|_| {
        "no software renderer on this machine (Debian: apt-get install mesa-vulkan-drivers)".to_string()
    })?;
    let builder = Harness::builder().with_size(vec2(SIZE[0], SIZE[1])).with_theme(Theme::Light).renderer(renderer);
    let mut h = builder.build_ui_state(|ui, app: &mut App| app.draw(ui), app);
    h.run_steps(4);
    Ok(h)
}

/// Compares the window with its stored picture.
fn compare(h: &mut Harness<'_, App>, name: &str) -> Result<(), String> {
    let stored = format!("{}/tests/snapshots/{name}.png", env!("CARGO_MANIFEST_DIR"));
    if !std::path::Path::new(&stored).exists() && std::env::var_os("UPDATE_SNAPSHOTS").is_none() {
        return Err(format!("there is no {stored} to compare with; UPDATE_SNAPSHOTS=1 writes it"));
    }
    h.snapshot(name);
    Ok(())
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

fn folded() -> Result<(), String> {
    let mut h = window(app(scene("tiny"), |_| {}))?;
    compare(&mut h, "folded")?;
    Ok(())
}

/// A click opens a box, a click on a node tells of it, a right click folds around it, Escape lets go.
fn opened_by_clicks() -> Result<(), String> {
    let mut h = window(app(scene("tiny"), |_| {}))?;
    let before = h.state().boxes();
    let at = place(&h, "layers.0");
    click(&mut h, at, PointerButton::Primary);
    let opened = h.state().boxes();
    assert!(opened > before + 5, "{before} boxes, then {opened}");
    h.key_press(Key::F);
    h.run_steps(2);
    let at = place(&h, "selective_scan");
    click(&mut h, at, PointerButton::Primary);
    let (label, node) = h.state().selection();
    assert!(label == Some("selective_scan") && node.is_some(), "{label:?}");
    h.remove_cursor();
    h.run_steps(3);
    compare(&mut h, "node")?;
    let at = place(&h, "selective_scan");
    click(&mut h, at, PointerButton::Secondary);
    assert_eq!(h.state().boxes(), before);
    h.key_press(Key::Escape);
    h.run_steps(2);
    assert_eq!(h.state().selection().0, None);
    Ok(())
}

fn colours() -> Result<(), String> {
    let mut h = window(app(scene("tiny"), |l| l.colour = ColourBy::Time))?;
    compare(&mut h, "time")?;
    Ok(())
}

/// Keys go from pass to pass, and from after to before.
fn passes() -> Result<(), String> {
    let s = scene("tiny");
    let fused = s.stages.iter().position(|s| s.name == "fuse_attention").unwrap();
    let mut h = window(app(s, |l| l.stage = fused))?;
    h.key_press(Key::OpenBracket);
    h.run_steps(2);
    assert_eq!(h.state().pass(), "fuse_selection");
    h.key_press(Key::CloseBracket);
    h.run_steps(2);
    assert_eq!(h.state().pass(), "fuse_attention");
    compare(&mut h, "after")?;
    h.key_press(Key::B);
    h.run_steps(2);
    compare(&mut h, "before")?;
    Ok(())
}

fn memory() -> Result<(), String> {
    let mut a = app(scene("tiny"), |_| {});
    a.show_tab(Tab::Memory);
    let mut h = window(a)?;
    compare(&mut h, "memory")?;
    h.key_press(Key::M);
    h.run_steps(2);
    assert!(h.state().place_of("head").is_some());
    Ok(())
}

/// `/` leads to the field; what is found is selected, the next one with Enter.
fn search() -> Result<(), String> {
    let mut h = window(app(scene("tiny"), |l| l.open = Open::All))?;
    h.key_press(Key::Slash);
    h.run_steps(2);
    h.event(Event::Text("selective_scan".into()));
    h.run_steps(3);
    let first = h.state().selection();
    assert_eq!(first.0, Some("selective_scan"));
    let first = first.1;
    h.key_press(Key::Enter);
    h.run_steps(3);
    let (label, node) = h.state().selection();
    assert!(label == Some("selective_scan") && node != first, "{label:?}");
    Ok(())
}

fn every_preset_opens() -> Result<(), String> {
    for name in ["tiny", "small", "mamba2-130m", "370m", "3b"] {
        let mut h = window(app(scene(name), |_| {}))?;
        h.key_press(Key::M);
        h.run_steps(2);
        assert!(h.state().boxes() > 10, "{name}");
    }
    Ok(())
}

/// Thousands of boxes: building a frame of the whole graph, and of a part that can be read.
fn a_large_model_is_fluid() -> Result<(), String> {
    let s = scene("370m");
    let t = Instant::now();
    let mut h = window(app(s, |l| l.open = Open::All))?;
    println!("  370m, all open: {} boxes, first frames after {:.2} s", h.state().boxes(), t.elapsed().as_secs_f64());
    let frame = |what: &str, h: &mut Harness<'_, App>| {
        let t = Instant::now();
        h.run_steps(10);
        let ms = t.elapsed().as_secs_f64() * 100.0;
        println!("  {what}: {ms:.1} ms a frame without drawing it");
        ms
    };
    h.event(Event::PointerMoved(pos2(600.0, 400.0)));
    let near = frame("readable", &mut h);
    // Generous: other work may run beside this.
    assert!(near < 200.0, "{near} ms");
    Ok(())
}
