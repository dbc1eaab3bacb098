//! What is told of the selected node: its line, types, cost, its other half, and the kernel it becomes.

use eframe::egui::{self, Color32, RichText, Ui};
use rambac_codegen::cuda::{Arch, Kernel};
use rambac_ir::NodeId;
use rambac_picture::detail::{Detail, Inside, Runs, resources, runs};
use rambac_picture::{Picture, Scene};
use std::collections::HashMap;
use std::sync::mpsc::{Receiver, channel};

/// What a kernel takes, or why that is not known.
type Resources = Result<Vec<(&'static str, String)>, String>;

/// Longest list of nodes that is shown whole.
const LISTED: usize = 12;

/// A selected box with what is in it.
pub struct BoxSide {
    label: String,
    inside: Inside,
    /// Nodes in it that the search finds.
    found: Vec<(NodeId, String)>,
}

/// What was clicked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Go {
    Open,
    To(NodeId),
}

impl BoxSide {
    pub fn new(scene: &Scene, p: &Picture, item: usize, search: &str) -> Self {
        let g = &scene.stages[p.stage].graph;
        let name = |id: NodeId| {
            let scope = g.node(id).scope.as_deref().map(|s| format!(" in {s}")).unwrap_or_default();
            (id, format!("{} = {}{scope}", g.label(id.result(0)), g.node(id).op.mnemonic()))
        };
        Self {
            label: p.cards[item].label.clone(),
            inside: Inside::of(scene, p.stage, &p.view.items[item]),
            found: p.hits(scene, item, search).map(name).collect(),
        }
    }

    /// Shows it; what was clicked.
    pub fn show(&self, ui: &mut Ui) -> Option<Go> {
        ui.heading(&self.label);
        let layers = if self.inside.layers > 1 { format!("{} layers, ", self.inside.layers) } else { String::new() };
        ui.label(RichText::new(format!("{layers}{} nodes", self.inside.nodes)).weak());
        ui.add_space(4.0);
        let mut go = ui.button("Open").on_hover_text("Enter, or a click on the box").clicked().then_some(Go::Open);
        if !self.found.is_empty() {
            heading(ui, "Found inside");
            go = list(ui, &self.found).map(Go::To).or(go);
        }
        heading(ui, "Cost");
        let costs: Vec<(String, String)> = self.inside.costs.iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
        table(ui, "costs", &costs);
        heading(ui, "Ops, and their predicted time");
        table(ui, "ops", &self.inside.ops);
        go
    }
}

/// The selected node with what is known of it.
pub struct Side {
    pub node: NodeId,
    detail: Detail,
    /// Only of the last stage, whose nodes become steps.
    runs: Option<Runs>,
    arch: Arch,
}

/// Kernels that were compiled, whichever node asked.
#[derive(Default)]
pub struct Compiled {
    known: HashMap<(String, &'static str), Resources>,
    waiting: Option<((String, &'static str), Receiver<Resources>)>,
}

impl Compiled {
    fn poll(&mut self) {
        if let Some((key, from)) = &self.waiting
            && let Ok(r) = from.try_recv()
        {
            self.known.insert(key.clone(), r);
            self.waiting = None;
        }
    }

    /// Begins to compile, in a thread: it takes a part of a second.
    fn start(&mut self, kernel: &Kernel, arch: Arch, cx: egui::Context) {
        let (to, from) = channel();
        let (k, key) = (kernel.clone(), (kernel.name.clone(), arch.name()));
        std::thread::spawn(move || {
            // Nobody waits any more if the window is closed.
            let _ = to.send(resources(&k, arch));
            cx.request_repaint();
        });
        self.waiting = Some((key, from));
    }
}

fn table(ui: &mut Ui, id: &str, rows: &[(String, String)]) {
    egui::Grid::new(id).num_columns(2).spacing([12.0, 3.0]).show(ui, |ui| {
        for (name, value) in rows {
            ui.label(RichText::new(name).weak());
            ui.add(egui::Label::new(value).wrap());
            ui.end_row();
        }
    });
}

fn code(ui: &mut Ui, text: &str) {
    egui::Frame::new().fill(Color32::from_gray(240)).inner_margin(6.0).corner_radius(3.0).show(ui, |ui| {
        ui.add(egui::Label::new(RichText::new(text).monospace().size(11.0)).wrap().selectable(true));
    });
}

/// A heading in small letters.
fn heading(ui: &mut Ui, text: &str) {
    ui.add_space(8.0);
    ui.label(RichText::new(text).strong());
}

/// Links to nodes; the one that was clicked.
fn list(ui: &mut Ui, all: &[(NodeId, String)]) -> Option<NodeId> {
    let mut go = None;
    for (id, name) in all.iter().take(LISTED) {
        if ui.link(name).clicked() {
            go = Some(*id);
        }
    }
    if all.len() > LISTED {
        ui.label(RichText::new(format!("and {} more", all.len() - LISTED)).weak());
    }
    go
}

impl Side {
    pub fn new(scene: &Scene, stage: usize, node: NodeId, arch: Arch) -> Self {
        let runs = (stage == scene.last()).then(|| runs(scene, node, arch));
        Self { node, detail: Detail::of(scene, stage, node), runs, arch }
    }

    /// Shows it; the node that was clicked in one of its lists.
    pub fn show(&self, ui: &mut Ui, compiled: &mut Compiled) -> Option<NodeId> {
        compiled.poll();
        let d = &self.detail;
        ui.heading(&d.label);
        if let Some(s) = &d.scope {
            ui.label(RichText::new(format!("in {s}")).weak());
        }
        code(ui, &d.line);
        heading(ui, "Type, and at these sizes");
        let types: Vec<(String, String)> = d.types.clone();
        table(ui, "types", &types);
        heading(ui, "Cost");
        let costs: Vec<(String, String)> = d.costs.iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
        table(ui, "costs", &costs);
        let mut go = None;
        let mut titled = |ui: &mut Ui, title: &str, all: &[(NodeId, String)]| {
            if !all.is_empty() {
                heading(ui, title);
                go = list(ui, all).or(go);
            }
        };
        let back = d.scope.as_deref().is_some_and(|s| s == "grad" || s.starts_with("grad."));
        titled(ui, if back { "Is the gradient of" } else { "In the backward" }, &d.counterparts);
        titled(ui, "Reads", &d.operands);
        titled(ui, "Is read by", &d.users);
        self.kernel(ui, compiled);
        go
    }

    fn kernel(&self, ui: &mut Ui, compiled: &mut Compiled) {
        heading(ui, "Becomes");
        let step = match &self.runs {
            None => {
                ui.label("Move the slider to the last pass to see the kernel it becomes.");
                return;
            }
            Some(Runs::Nothing(why)) => {
                ui.label(format!("No step: {why}."));
                return;
            }
            Some(Runs::Step(s)) => s,
        };
        let mut rows = vec![("step".to_string(), step.step.to_string()), ("on the CPU".to_string(), step.cpu.clone())];
        match &step.gpu {
            Ok((form, why)) => {
                rows.push((format!("on {}", self.arch), form.clone()));
                rows.push(("why".into(), why.clone()));
                if step.products > 0 {
                    rows.push(("dense products".into(), format!("{} of the vendor's library", step.products)));
                }
            }
            Err(why) => rows.push((format!("on {}", self.arch), format!("cannot run: {why}"))),
        }
        table(ui, "runs", &rows);
        for k in &step.kernels {
            let key = (k.name.clone(), self.arch.name());
            ui.add_space(6.0);
            ui.label(RichText::new(&k.name).monospace().strong());
            match compiled.known.get(&key) {
                Some(Ok(lines)) => {
                    let rows: Vec<(String, String)> = lines.iter().map(|(a, b)| (a.to_string(), b.clone())).collect();
                    table(ui, &k.name, &rows);
                }
                Some(Err(e)) => drop(ui.colored_label(Color32::from_rgb(170, 40, 40), e)),
                None if compiled.waiting.as_ref().is_some_and(|w| w.0 == key) => drop(ui.spinner()),
                None => {
                    let free = compiled.waiting.is_none();
                    if ui.add_enabled(free, egui::Button::new("Registers, spills, shared memory")).clicked() {
                        compiled.start(k, self.arch, ui.ctx().clone());
                    }
                }
            }
            egui::CollapsingHeader::new("CUDA stub")
                .id_salt(&k.name)
                .default_open(true)
                .show(ui, |ui| code(ui, &k.source));
        }
    }
}
