//! From a graph to a file with compiled kernels, and back to a run: the cache, the executable, the simulator.

use crate::harness::Case;
use crate::rig::Rig;
use rambac_codegen::cuda::form::Kernel;
use rambac_codegen::cuda::{Arch, Cache};
use rambac_ir::ops::SourceKind;
use rambac_ir::testing::Rng;
use rambac_ir::{Bindings, Builder, Dim, Graph, Ty};
use rambac_passes::Options;
use rambac_passes::train_step::{AdamW, train_step};
use rambac_runtime::executable::{Contents, Mode, Part, write};
use rambac_runtime::gpu::{Bytes, Code, Placement};
use rambac_runtime::{Executable, Executor, Store, Tensor};
use rambac_simulator::Options as Schedule;
use std::sync::Arc;
use tempfile::TempDir;

pub const ALL: &[Case] = &[("executable_trains", trains), ("executable_refused_kernel", refused)];

/// A layer with its loss: `mean((x·wᵀ)²)`.
pub fn layer() -> Graph {
    let mut b = Builder::new("layer", &["N"]);
    let x = b.input("x", Ty::f32([Dim::sym("N"), Dim::int(24)]));
    let w = b.param("w", Ty::f32([8, 24]));
    let y = b.linear(x, w);
    let y = b.square(y);
    let y = b.sum_all(y);
    let y = b.scale(y, 0.1);
    b.output("loss", y);
    b.finish().expect("the test's graph is well-formed")
}

fn trains(rig: &Rig) -> Result<String, String> {
    let arch = rig.arch();
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let dir = TempDir::new().map_err(|e| text(&e))?;
    let step = train_step(&layer(), &AdamW::default(), |_| true).map_err(|e| text(&e))?;
    let part = Part::compile("step", &step, &Options::default(), &[arch]).map_err(|e| text(&e))?;
    let cache = Cache::at(dir.path().join("cache"));
    let gpu = part.gpu[0].clone();
    let code = Code::compile(&rig.nvrtc, &[&gpu, &gpu], &cache).map_err(|e| text(&e))?;
    let (n, first) = (gpu.kernels.len(), cache.uses());
    let warm = Cache::at(dir.path().join("cache"));
    let again = Code::compile(&rig.nvrtc, &[&gpu], &warm).map_err(|e| text(&e))?;
    if (first.compiled, warm.uses().found, cache.trouble()) != (n, n, None) {
        return Err(format!("{n} kernels, {first:?}, then {:?}", warm.uses()));
    }
    for (name, c) in &code.0 {
        let same = again.0.get(name).is_some_and(|d| (&c.ptx, &c.cubin, &c.usage) == (&d.ptx, &d.cubin, &d.usage));
        if !same || c.cubin.is_none() || c.usage.is_empty() {
            return Err(format!("{name} came back another from the cache"));
        }
    }

    let mut rng = Rng(3);
    let mut draw = |n: usize| (0..n).map(|_| rng.uniform(-1.0, 1.0) as f32).collect::<Vec<f32>>();
    let mut weights = Store::default();
    weights.insert("w", Tensor::f32(&[8, 24], draw(8 * 24)));
    let path = dir.path().join("layer.rambac");
    let parts = [part];
    let contents = Contents {
        mode: Mode::Train,
        model: "layer",
        config: None,
        tokenizer: None,
        settings: serde_json::json!({}),
        parts: &parts,
        targets: &[(arch, code, "NVRTC".into())],
        weights: Some(&weights),
    };
    write(&path, &contents).map_err(|e| text(&e))?;

    let e = Executable::open(&path).map_err(|e| text(&e))?;
    let registers = e.kernels(arch).map_err(|e| text(&e))?.iter().filter_map(|k| k.usage.as_ref());
    let most = registers.map(|u| u.registers).max().unwrap_or(0);
    if most == 0 {
        return Err("no kernel says how many registers it takes".into());
    }
    let part = &e.parts[0];
    let (program, code) = e.code(part, arch).map_err(|e| text(&e))?;
    let mut store = e.weights().map_err(|e| text(&e))?.ok_or("no weights")?;
    for s in part.program.sources.iter().filter(|s| s.kind == SourceKind::State) {
        let ty = s.ty.bind(&Bindings::default()).map_err(|e| text(&e))?;
        store.insert(s.name.clone(), Tensor::zeros(&ty));
    }
    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(1).build().map_err(|e| text(&e))?);
    let mut cpu = Executor::new((*part.program).clone(), pool);
    let mut sim = rig.machine(Schedule::default(), Placement::Apart)?;
    let id = sim.load(program, &code).map_err(|e| text(&e))?;
    for (name, t) in &store.0 {
        sim.set(name, &Bytes::from_tensor(t.view())).map_err(|e| text(&e))?;
    }
    let dims = Bindings::new([("N", 5)]);
    for _ in 0..3 {
        let x = Tensor::f32(&[5, 24], draw(5 * 24));
        let a = cpu.run(&dims, &[("x", x.view())], &mut store).map_err(|e| text(&e))?;
        let b = sim.run(id, &dims, &[("x", &Bytes::from_tensor(x.view()))]).map_err(|e| text(&e))?;
        for ((name, a), (_, b)) in a.iter().zip(&b) {
            close(name, a, &b.to_tensor())?;
        }
    }
    for (name, t) in &store.0 {
        close(name, t, &sim.get(name).map_err(|e| text(&e))?.ok_or("a state is lost")?.to_tensor())?;
    }
    Ok(format!(" ({n} kernels, at most {most} registers)"))
}

fn close(name: &str, a: &Tensor, b: &Tensor) -> Result<(), String> {
    let (Some(x), Some(y)) = (a.as_f32(), b.as_f32()) else { return Err(format!("{name} is no f32")) };
    let scale = x.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
    match x.iter().zip(y).find(|(x, y)| (**x - **y).abs() > 2e-5 * scale) {
        _ if x.len() != y.len() => Err(format!("{name}: {:?} and {:?}", a.shape, b.shape)),
        Some((x, y)) => Err(format!("{name}: {x} on the CPU, {y} on the simulator")),
        None => Ok(()),
    }
}

/// The compiler's log, the op and the text's place stand in the error.
fn refused(rig: &Rig) -> Result<String, String> {
    let dir = TempDir::new().map_err(|e| e.to_string())?;
    let source = "extern \"C\" __global__ void k(float* y) { y[0] = nonsense; }\n";
    let k = Kernel { name: "k".into(), source: source.into(), threads: 32, shared: 0, blocks_per_sm: 1 };
    let e = Cache::at(dir.path()).compile(&rig.nvrtc, &k, Arch::Sm80).err().ok_or("it compiled")?;
    let (said, stub) = (e.to_string(), e.stub.ok_or("no stub was kept")?);
    for part in ["kernel k for sm_80", "k.cu(1): error", "nonsense", &stub.display().to_string()] {
        if !said.contains(part) {
            return Err(format!("no {part:?} in {said}"));
        }
    }
    match std::fs::read_to_string(&stub) {
        Ok(s) if s == source => Ok(String::new()),
        other => Err(format!("{}: {other:?}", stub.display())),
    }
}
