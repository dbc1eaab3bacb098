//! Every variant of attention as a GPU program: forward and gradients, op by op against definitions, and no step of a model with
//! it that a GPU refuses.

use crate::each_op::{Run, check_graph};
use crate::graphs::{SLACK, run};
use crate::harness::Case;
use crate::rig::Rig;
use rambac_codegen::cuda::{Arch, Target, emit};
use rambac_codegen::{Kernels, lower_for};
use rambac_ir::testing::Grown;
use rambac_ir::{Bindings, Graph};
use rambac_models::stack::{self, Carry};
use rambac_models::variants::{BUILT_IN, Fragment};
use rambac_models::{Attention, Config, preset};
use rambac_passes::train_step::{AdamW, train_step};
use rambac_passes::{Options, Precision, optimise, probe};

macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        pub const ALL: &[Case] = &[
            $((concat!("variant_", stringify!($name)), |rig| built_in(rig, stringify!($name))),)*
            ("variants_nobody_has_seen", unseen),
            ("variants_in_models_compile", compile),
        ];
        const NAMES: &[&str] = &[$(stringify!($name)),*];
    };
}
cases! {
    full, window, block_sparse, stick_breaking, hsa, hsa_softmax, swa_hsa, landmark, moba, quest, infllm, nsa, dsa,
}

/// Variants of which the project has no file.
const UNSEEN: [(&str, &str); 2] = [
    ("top_p", include_str!("../fixtures/variants/top_p.ir")),
    ("two_level", include_str!("../fixtures/variants/two_level.ir")),
];

fn unit(g: &Graph) -> usize {
    let lcm = |a: usize, b: usize| (1..=b).map(|i| a * i).find(|m| m.is_multiple_of(b)).unwrap_or(a * b);
    g.nodes.iter().flat_map(|n| n.tys.iter().flat_map(|t| &t.shape)).map(|d| d.divisor() as usize).fold(1, lcm)
}

fn check(rig: &Rig, name: &str, text: &str, values: &[(&str, f64)]) -> Result<(), String> {
    let told = |e: Vec<rambac_ir::Diagnostic>| rambac_ir::diagnostic::render(&e, text);
    let known = Fragment::read(text, &[]).map_err(told)?.consts;
    let values: Vec<(&str, f64)> = values.iter().filter(|(n, _)| known.iter().any(|c| c.0 == *n)).copied().collect();
    let f = Fragment::read(text, &values).map_err(told)?;
    let (g, _) = probe::with_gradients(&f.graph).map_err(|e| e.to_string())?;
    let u = unit(&g);
    let dims = Bindings::new([("N", 2), ("L", u * 40usize.div_ceil(u).max(3))]);
    let mut sources = probe::random_sources(&g, &dims, 5).map_err(|e| e.to_string())?;
    sources.values_mut().for_each(rambac_ir::HostArray::round_to_dtype);
    let g = optimise(&g, &Options::default());
    let like = Grown { graph: g.clone(), dims, sources };
    let run = |g: &Graph, like: &Grown| run(rig, g, like);
    check_graph(&Run { run: &run, slack: SLACK }, &g, &like).map_err(|e| format!("{name}: {e}"))
}

/// At its own sizes, which tensor cores take, and at sizes that no tile takes with other numbers of heads.
fn built_in(rig: &Rig, name: &str) -> Result<String, String> {
    let v = rambac_models::variants::built_in(name).ok_or("there is no such variant")?;
    check(rig, name, v.text, &[])?;
    let odd =
        [("heads", 3.0), ("kv_heads", 3.0), ("dim", 6.0), ("width", 18.0), ("chunk", 6.0), ("rank", 5.0), ("k", 3.0)];
    check(rig, name, v.text, &odd)?;
    Ok(String::new())
}

fn unseen(rig: &Rig) -> Result<String, String> {
    UNSEEN.iter().try_for_each(|(name, text)| check(rig, name, text, &[]))?;
    Ok(String::new())
}

/// A model of each kind of stack with the variant, in both precisions, for every architecture.
fn compile(_: &Rig) -> Result<String, String> {
    let tiny = preset("tiny").map_err(|e| e.to_string())?;
    let mut programs = 0;
    let known: Vec<&str> = BUILT_IN.iter().map(|v| v.name).collect();
    if known != NAMES {
        return Err(format!("the cases are {NAMES:?}, the variants {known:?}"));
    }
    for v in BUILT_IN {
        for transformer in [false, true] {
            let c = Config {
                num_lower_layers: 1,
                num_upper_layers: 1,
                num_upper_groups: 1,
                num_mamba_per_gca: 1,
                encoder_layers: 0,
                transformer,
                attention: Some(Attention::named(v.name)?),
                ..tiny.clone()
            };
            let loss = stack::loss(&c, Carry::Zero, false).map_err(|e| format!("{e:?}"))?;
            let step = train_step(&loss, &AdamW::default(), |_| true).map_err(|e| e.to_string())?;
            let forward = stack::forward(&c, false).map_err(|e| format!("{e:?}"))?;
            let segments = stack::segments(&c, 4096).map_err(|e| format!("{}: {e}", v.name))?;
            let all = [&step, &forward, &segments].into_iter();
            for (g, precision) in all.flat_map(|g| [Precision::F32, Precision::Bf16].map(|p| (g, p))) {
                let g = optimise(g, &Options { precision, ..Options::default() });
                let program = std::sync::Arc::new(lower_for(&g, Kernels::Gpu));
                for arch in Arch::ALL {
                    emit(program.clone(), Target::of(arch)).map_err(|e| format!("{}: {e}", v.name))?;
                    programs += 1;
                }
            }
        }
    }
    Ok(format!(", {programs} programs"))
}
