//! The presets, whole training steps: what is folded, what passes change, what is told of nodes.

mod support;

use rambac_codegen::cuda::Arch;
use rambac_ir::{Bindings, Graph, NodeId};
use rambac_models::stack::{self, Carry};
use rambac_models::variants::BUILT_IN;
use rambac_models::{Attention, Config, preset};
use rambac_passes::train_step::{AdamW, train_step};
use rambac_picture::detail::{Detail, Inside, Runs, runs};
use rambac_picture::fold::{Open, boxes_of, fold};
use rambac_picture::{ColourBy, Look, Picture, Scene, export, memory, raster};
use support::picture_holds;

fn step(c: &Config) -> Graph {
    let loss = stack::loss(c, Carry::Zero, false).unwrap();
    train_step(&loss, &AdamW::default(), |_| true).unwrap()
}

fn scene(name: &str) -> Scene {
    let dims = Bindings::new([("N", 1), ("L", 4096)]);
    Scene::new(name, &step(&preset(name).unwrap()), &dims).unwrap()
}

fn look(s: &Scene) -> Look {
    Look { stage: s.last(), ..Look::default() }
}

fn find(s: &Scene, stage: usize, op: &str, scope: &str) -> NodeId {
    let hit = |n: &rambac_ir::Node| n.op.mnemonic() == op && n.scope.as_deref().is_some_and(|s| s.starts_with(scope));
    s.stages[stage].graph.iter().find(|(_, n)| hit(n)).map(|(id, _)| id).unwrap_or_else(|| panic!("no {op} in {scope}"))
}

/// 24 layers that are alike are one box, which opens into its layers, and a layer into its nodes.
#[test]
fn layers_fold() {
    let s = scene("370m");
    let p = Picture::new(&s, &look(&s));
    assert!(p.cards.len() < 200, "{} boxes", p.cards.len());
    let runs: Vec<&str> = p.cards.iter().map(|c| c.label.as_str()).filter(|l| l.contains(" × ")).collect();
    assert!(
        runs.iter().any(|r| r.contains("× layers.")) && runs.iter().any(|r| r.contains("× grad.layers.")),
        "{runs:?}"
    );
    let graph = &s.stages[s.last()].graph;
    let scan = find(&s, s.last(), "selective_scan", "layers.5");
    let boxes = boxes_of(graph, scan);
    assert_eq!(boxes.len(), 2, "{boxes:?}");
    let open = |n: usize| Open::Only(boxes[..n].iter().cloned().collect());
    let sizes: Vec<usize> = (0..3).map(|n| fold(graph, &open(n)).items.len()).collect();
    assert!(sizes[0] < sizes[1] && sizes[1] < sizes[2], "{sizes:?}");
    let v = fold(graph, &open(2));
    assert!(v.items[v.item_of[scan.index()]].folded.is_none());
    assert_eq!(fold(graph, &Open::All).items.len(), graph.nodes.len());
}

/// Every preset, folded, in every colour, as SVG that parses, as PNG and as DOT; its memory plan too.
#[test]
fn presets_are_drawn() {
    for name in ["tiny", "small", "mamba2-130m"] {
        let s = scene(name);
        for colour in ColourBy::ALL {
            let look = Look { colour, ..look(&s) };
            let png = raster::png(&export::svg(&s, &look), 0.5).unwrap();
            assert!(png.len() > 5_000, "{name}: {} bytes", png.len());
        }
        let dot = export::dot(&s, &look(&s));
        assert!(dot.starts_with("digraph") && dot.matches(" -> ").count() > 10);
        raster::png(&memory::svg(&s.program, &s.plan, name), 0.5).unwrap();
    }
}

/// Folded and with all open, as written and after the last pass: no overlaps, edges to the right, and twice the same.
fn lies_well(s: &Scene) {
    for (stage, open) in [(0, Open::default()), (s.last(), Open::default()), (s.last(), Open::All)] {
        let look = Look { stage, open, ..Look::default() };
        let p = Picture::new(s, &look);
        assert!(!p.cards.is_empty(), "{}", s.title);
        picture_holds(&p).unwrap_or_else(|e| panic!("{}, stage {stage}: {e}", s.title));
        let again = Picture::new(s, &look);
        assert!(p.layout == again.layout && p.cards == again.cards && p.view == again.view, "{}", s.title);
    }
}

#[test]
fn every_preset_lies_well() {
    for name in ["tiny", "small", "mamba2-130m", "370m", "3b"] {
        lies_well(&scene(name));
    }
}

/// Every variant: its own text, and a model's training step with it.
#[test]
fn every_variant_lies_well() {
    let dims = Bindings::new([("N", 1), ("L", 1024)]);
    for v in BUILT_IN {
        let own = rambac_ir::text::parse(v.text).unwrap();
        lies_well(&Scene::new(v.name, &own, &dims).unwrap());
        for transformer in [false, true] {
            let attention = Some(Attention::named(v.name).unwrap());
            let c = Config { attention, transformer, ..preset("tiny").unwrap() };
            lies_well(&Scene::new(v.name, &step(&c), &dims).unwrap());
        }
    }
}

/// The pass that fuses attention takes `attend` away and adds `chunk_attention`.
#[test]
fn passes_are_compared() {
    let s = scene("tiny");
    assert_eq!(s.difference(0).appeared.iter().filter(|a| **a).count(), 0);
    let fused = s.stages.iter().position(|s| s.name == "fuse_attention").unwrap();
    let d = s.difference(fused);
    let op = |stage: usize, id: usize| s.stages[stage].graph.nodes[id].op.mnemonic();
    let appeared: Vec<&str> = (0..d.appeared.len()).filter(|&i| d.appeared[i]).map(|i| op(fused, i)).collect();
    let vanished: Vec<&str> = d.vanished.iter().map(|id| op(fused - 1, id.index())).collect();
    assert!(appeared.contains(&"chunk_attention") && !appeared.contains(&"rms_norm"), "{appeared:?}");
    assert!(vanished.contains(&"attend") && !vanished.contains(&"rms_norm"), "{vanished:?}");
    let before = Picture::new(&s, &Look { stage: fused, before: true, ..Look::default() });
    assert_eq!(before.cards.iter().map(|c| c.marked).sum::<usize>(), d.vanished.len());
}

#[test]
fn nodes_tell_of_themselves() {
    let mut s = scene("tiny");
    let last = s.last();
    let scan = find(&s, last, "selective_scan", "layers.");
    let d = Detail::of(&s, last, scan);
    assert!(d.line.contains("= selective_scan") && d.line.contains("f32["), "{}", d.line);
    assert!(d.types[0].1.contains("4096"), "{:?}", d.types);
    let names: Vec<&str> = d.counterparts.iter().map(|c| c.1.as_str()).collect();
    assert!(names.iter().all(|n| n.contains("selective_scan_grad")) && names.len() == 1, "{names:?}");
    let back = Detail::of(&s, last, d.counterparts[0].0);
    assert!(back.counterparts.iter().any(|c| c.0 == scan), "{:?}", back.counterparts);
    for arch in Arch::ALL {
        let Runs::Step(step) = runs(&s, scan, arch) else { panic!("a scan is a step") };
        assert!(step.gpu.is_ok() && step.kernels.iter().all(|k| k.source.contains("extern \"C\"")), "{step:?}");
        assert!(!step.kernels.is_empty());
    }
    let source = s.stages[last].graph.sources().next().unwrap().0;
    assert!(matches!(runs(&s, source, Arch::Sm80), Runs::Nothing(_)));
    // At other sizes costs and shapes follow; sizes that do not fit leave all as it was.
    let peak = s.plan.peak();
    s.resize(&Bindings::new([("N", 2), ("L", 1024)])).unwrap();
    assert!(Detail::of(&s, last, scan).types[0].1.contains("1024") && s.plan.peak() != peak);
    let peak = s.plan.peak();
    assert!(s.resize(&Bindings::new([("N", 1), ("L", 17)])).is_err());
    assert_eq!((s.plan.peak(), s.dims.get(&rambac_ir::Sym::new("L"))), (peak, Some(1024)));
}

#[test]
fn search_finds_ops_names_and_layers() {
    let s = scene("tiny");
    let p = Picture::new(&s, &Look { open: Open::All, ..look(&s) });
    for text in ["selective", "IN_PROJ", "layers.1"] {
        assert!(!p.find(&s, text).is_empty(), "{text}");
    }
    assert!(p.find(&s, "").is_empty() && p.find(&s, "no such op").is_empty());
    // A folded layer is found by what is in it.
    let p = Picture::new(&s, &look(&s));
    let hits = p.find(&s, "selective_scan");
    assert!(hits.iter().any(|&i| p.cards[i].opens), "{hits:?}");
    let inside = |i: usize| p.hits(&s, i, "selective_scan").count();
    assert!(hits.iter().all(|&i| inside(i) > 0), "{hits:?}");
    let told = Inside::of(&s, p.stage, &p.view.items[hits[0]]);
    assert!(told.nodes == p.view.items[hits[0]].nodes.len() && told.ops.iter().any(|o| o.0 == "selective_scan"));
}
