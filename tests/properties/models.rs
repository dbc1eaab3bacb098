//! The graphs of every preset: what fusion promises, what recomputation saves, that every part lowers.  Nothing of the
//! large ones is run.

use crate::plan::check;
use rambac_codegen::cuda::{Arch, Target};
use rambac_codegen::{Machine, Program, lower, plan};
use rambac_ir::{Bindings, Dim, Graph, Sym, Ty, verify};
use rambac_models::presets::PRESETS;
use rambac_models::stack::{self, Carry};
use rambac_models::{Config, preset};
use rambac_passes::train_step::{AdamW, accumulate, apply, train_step};
use rambac_passes::{Options, Precision, Recompute, optimise};
use rambac_runtime::cpu::scratch;
use rambac_runtime::executor::slow_steps;

fn training(c: &Config, carry: Carry) -> Graph {
    let specs = c.parameters();
    let decays = |name: &str| specs.iter().any(|s| s.name == name && s.decay);
    train_step(&stack::loss(c, carry, false).unwrap(), &AdamW::default(), decays).unwrap()
}

/// Whether a value grows with the square of the length, as scores do.
fn is_quadratic(ty: &Ty) -> bool {
    let l = Sym::new("L");
    ty.elements().unwrap().syms().iter().filter(|s| **s == l).count() > 1
}

/// Whether a value holds an output per token, head and slot.
fn is_per_chunk(c: &Config, ty: &Ty) -> bool {
    let head = [c.num_attention_heads, c.chunk_topk].map(Dim::int);
    ty.rank() == 5 && ty.shape[1] == Dim::sym("L") && ty.shape[2..4] == head
}

/// No op of `g` nor buffer of `p` holds scores or per-chunk outputs, and nothing runs by its reference evaluation.
fn assert_fused(name: &str, c: &Config, g: &Graph, p: &Program) {
    let tys = g.iter().flat_map(|(id, n)| n.tys.iter().map(move |t| (id, t)));
    let bad: Vec<String> = tys
        .filter(|(_, t)| is_quadratic(t) || is_per_chunk(c, t))
        .map(|(id, t)| format!("{id} = {} {t}", g.node(id).op.mnemonic()))
        .collect();
    assert!(bad.is_empty(), "{name}: {bad:?}");
    assert!(!p.buffers.iter().any(|b| is_quadratic(&b.ty) || is_per_chunk(c, &b.ty)), "{name}: a buffer");
    assert!(slow_steps(p).is_empty(), "{name}: {:?}", slow_steps(p));
}

fn dims(c: &Config) -> Bindings {
    Bindings::new([("N", 2), ("L", c.chunk_size * 32)])
}

/// One preset's training step: fused, sound, and smaller with recomputation.
fn check_training(name: &str) {
    let c = preset(name).unwrap();
    let written = training(&c, Carry::Zero);
    let has = |f: &dyn Fn(&Ty) -> bool| written.nodes.iter().flat_map(|n| &n.tys).any(f);
    // Before fusion there are such values, or looking for them means nothing.
    assert_eq!(has(&is_quadratic) && has(&|t| is_per_chunk(&c, t)), c.num_upper_groups > 0, "{name}");
    let mut arenas = vec![];
    for recompute in [Recompute::Nothing, Recompute::All] {
        let g = optimise(&written, &Options { recompute: recompute.clone(), ..Options::default() });
        verify::verify(&g).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        let p = lower(&g);
        assert_fused(name, &c, &g, &p);
        check(&p, &dims(&c)).unwrap_or_else(|e| panic!("{name}: {e}"));
        arenas.push(plan(&p, &dims(&c), scratch).unwrap().arena);
    }
    assert!(arenas[1] < arenas[0], "{name}: recomputation needs {} bytes, keeping {}", arenas[1], arenas[0]);
    println!("{name}: activations {} MiB, with recomputation {} MiB", arenas[0] >> 20, arenas[1] >> 20);
}

#[test]
fn training_of_tiny() {
    check_training("tiny");
}

#[test]
fn training_of_small() {
    check_training("small");
}

#[test]
fn training_of_mamba2_130m() {
    check_training("mamba2-130m");
}

#[test]
fn training_of_370m() {
    check_training("370m");
}

#[test]
fn training_of_3b() {
    check_training("3b");
}

/// The tests above name every preset.
#[test]
fn no_preset_is_left_out() {
    let names: Vec<&str> = PRESETS.iter().map(|p| p.name).collect();
    assert_eq!(names, ["tiny", "small", "mamba2-130m", "370m", "3b"]);
}

/// Carried states and accumulation, on the small presets.
#[test]
fn other_steps() {
    for name in ["tiny", "small"] {
        let c = preset(name).unwrap();
        let loss = stack::loss(&c, Carry::States, false).unwrap();
        let all = [
            training(&c, Carry::States),
            accumulate(&loss).unwrap(),
            apply(&loss, &AdamW::default(), |_| true, &[]).unwrap(),
        ];
        for g in all {
            for recompute in [Recompute::Nothing, Recompute::All] {
                let g = optimise(&g, &Options { recompute, ..Options::default() });
                let p = lower(&g);
                assert_fused(name, &c, &g, &p);
                check(&p, &dims(&c)).unwrap_or_else(|e| panic!("{name}: {e}"));
            }
        }
    }
}

/// A million tokens in one row on a GPU in bf16: what the residual stream, a layer and the weights take, and no more.  Nothing
/// grows faster than the length.
#[test]
fn a_million_tokens_fit_one_gpu() {
    let c = preset("370m").unwrap();
    let written = training(&c, Carry::Zero);
    let machine = Machine::Gpu(Target::of(Arch::Sm90a));
    let dims = [1usize << 20, 1 << 21].map(|l| Bindings::new([("N", 1), ("L", l)]));
    let mut flops = vec![];
    // Layers computed again once more; and twice, which fits 80 GB.
    for (held, gib) in [(10, 95), (6, 78)] {
        let options = Options { precision: Precision::Bf16, recompute: Recompute::All, held, ..Options::default() };
        let (p, plans) = machine.plans(&optimise(&written, &options), &dims).unwrap();
        let peak = plans[0].peak();
        assert!(peak <= gib << 30, "{held} inputs of layers held: {} MiB", peak >> 20);
        assert!(!p.graph.nodes.iter().flat_map(|n| &n.tys).any(is_quadratic));
        let grows = |a: usize, b: usize| b > 2 * a + 64;
        let sizes = plans[0].sizes.iter().zip(&plans[1].sizes);
        let work = plans[0].scratch.iter().map(|s| s.1).zip(plans[1].scratch.iter().map(|s| s.1));
        assert!(!sizes.map(|(a, b)| (*a, *b)).chain(work).any(|(a, b)| grows(a, b)));
        flops.push(p.costs(&dims[0]).unwrap().into_iter().map(|c| c.flops).sum::<f64>());
        println!(
            "370m at 1M: {} MiB with {held} inputs of layers held, {:.3e} FLOPs",
            peak >> 20,
            flops[flops.len() - 1]
        );
    }
    assert!(flops[1] < 1.2 * flops[0], "one more forward costs {flops:?}");
}

/// What prefill and decoding run: the forward, and the parts of a segment.
#[test]
fn inference_of_every_preset() {
    for p in PRESETS {
        let c = p.config();
        let parts = [
            stack::forward(&c, false).map(Some),
            stack::lower(&c).map(Some),
            stack::chunks(&c),
            stack::upper(&c),
            stack::head(&c).map(Some),
        ];
        let mut built = 0;
        for g in parts.into_iter().filter_map(|g| g.unwrap()) {
            let g = optimise(&g, &Options::default());
            let program = lower(&g);
            assert_fused(p.name, &c, &g, &program);
            for l in [1, 5, 64] {
                let dims = Bindings::new([("N", 1), ("L", l * c.chunk_size), ("B", 3), ("C", 4)]);
                check(&program, &dims).unwrap_or_else(|e| panic!("{}: {}: {e}", p.name, g.name));
            }
            built += 1;
        }
        assert_eq!(built, if c.num_upper_groups > 0 { 5 } else { 3 }, "{}", p.name);
    }
}
