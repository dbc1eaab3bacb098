//! `rambac doctor`: what this machine has, how fast it is, and whether anything needed is broken.

use crate::cli::Doctor;
use crate::device::cublaslt;
use crate::error::Result;
use crate::machine;
use crate::show;
use rambac_cpu::kernels::gemm::matmul;
use rambac_cpu::{Mat, MatMut, simd};
use rambac_cuda::CUBLASLT_HELP;
use rambac_runtime::gpu::archs;
use serde_json::json;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

/// How a finding counts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Good,
    /// Worth knowing; nothing is broken.
    Note,
    Broken,
}

struct Finding {
    state: State,
    topic: &'static str,
    text: String,
}

/// Runs the verb.
pub fn run(a: &Doctor, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    let all = [
        cpu(&pool),
        vectors(),
        memory(),
        kernels(&pool),
        rates(&pool),
        temporary(),
        terminal(),
        gpu(),
        products(),
        nvrtc(),
        cache(),
    ];
    for f in &all {
        let state = match f.state {
            State::Good => "ok",
            State::Note => "note",
            State::Broken => "broken",
        };
        if a.json {
            println!("{}", json!({ "topic": f.topic, "state": state, "text": f.text }));
        } else {
            let indent = " ".repeat(22);
            println!("  {state:<7} {:<11} {}", f.topic, show::wrapped(&f.text, 76, &indent));
        }
    }
    let broken = all.iter().filter(|f| f.state == State::Broken).count();
    if !a.json {
        println!("{}", if broken == 0 { "All is well.".into() } else { show::plural(broken, "thing") + " broken." });
    }
    Ok(if broken == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn cpu(pool: &rayon::ThreadPool) -> Finding {
    let name = machine::cpu_name().unwrap_or_else(|| std::env::consts::ARCH.into());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = show::plural(pool.current_num_threads(), "thread");
    Finding {
        state: State::Good,
        topic: "processor",
        text: format!("{name}, {} for this process, {threads} in use", show::plural(cores, "core")),
    }
}

fn vectors() -> Finding {
    let chosen = match simd::choose() {
        Ok(level) => level.name(),
        Err(e) => return Finding { state: State::Broken, topic: "vectors", text: e.to_string() },
    };
    let by = if std::env::var_os(simd::VARIABLE).is_some_and(|v| !v.is_empty()) { "as" } else { "the best here;" };
    let change = if by == "as" { "says" } else { "chooses another" };
    let running = format!("kernels run on {chosen}, {by} {} {change}", simd::VARIABLE);
    let all = machine::simd();
    let list = |wanted: bool| all.iter().filter(|s| s.1 == wanted).map(|s| s.0).collect::<Vec<_>>().join(", ");
    let (have, lack) = (list(true), list(false));
    let lack = if lack.is_empty() { String::new() } else { format!("; not {lack}") };
    if have.is_empty() {
        let text = format!("none that the kernels know{lack}; {running}: several times slower");
        return Finding { state: State::Note, topic: "vectors", text };
    }
    Finding { state: State::Good, topic: "vectors", text: format!("{have}{lack}; {running}") }
}

fn memory() -> Finding {
    match machine::memory() {
        Some((total, free)) => {
            let state = if free < 1 << 30 { State::Note } else { State::Good };
            let text = format!("{}, {} free", show::bytes(total), show::bytes(free));
            Finding { state, topic: "memory", text }
        }
        None => Finding { state: State::Note, topic: "memory", text: "this system does not tell".into() },
    }
}

/// A small product, compared with its definition: catches vector code that this processor runs wrongly.
fn kernels(pool: &rayon::ThreadPool) -> Finding {
    let (m, n, k) = (33, 47, 65);
    let fill = |len: usize, by: usize| (0..len).map(|i| (i * by % 13) as f32 - 6.0).collect::<Vec<f32>>();
    let (a, b, mut c) = (fill(m * k, 5), fill(k * n, 7), vec![0.0f32; m * n]);
    pool.install(|| matmul(Mat::new(&a, m, k), false, Mat::new(&b, k, n), false, MatMut::new(&mut c, m, n), false));
    // Small whole numbers: sums are exact in any order.
    let right = (0..m * n).all(|i| c[i] == (0..k).map(|j| a[i / n * k + j] * b[j * n + i % n]).sum::<f32>());
    if right {
        Finding { state: State::Good, topic: "kernels", text: "a matrix product gives what it should".into() }
    } else {
        let text = "a matrix product gives wrong numbers; please report this with the lines above";
        Finding { state: State::Broken, topic: "kernels", text: text.into() }
    }
}

fn rates(pool: &rayon::ThreadPool) -> Finding {
    let r = machine::rates(pool);
    let text =
        format!("{} in large products (f32), {} in large copies", show::si(r.gemm, "FLOP/s"), show::si(r.copy, "B/s"));
    Finding { state: State::Good, topic: "speed", text }
}

/// Whether a file can be made in `dir`.
fn writable(dir: &Path) -> std::io::Result<()> {
    let path = dir.join(format!(".rambac-doctor-{}", std::process::id()));
    let mut file = std::fs::File::options().write(true).create_new(true).open(&path)?;
    let written = file.write_all(b"rambac doctor");
    std::fs::remove_file(&path)?;
    written
}

fn temporary() -> Finding {
    let dir = std::env::temp_dir();
    match writable(&dir) {
        Ok(()) => Finding { state: State::Good, topic: "files", text: format!("{} can be written", dir.display()) },
        Err(e) => Finding {
            state: State::Broken,
            topic: "files",
            text: format!("{} can't be written ({e}); set TMPDIR to a folder that can", dir.display()),
        },
    }
}

fn terminal() -> Finding {
    let text = match (std::io::stdout().is_terminal(), std::io::stderr().is_terminal()) {
        (_, true) => "progress bars are shown",
        (true, false) => "errors go elsewhere: progress bars are not shown",
        (false, false) => "none: progress bars are not shown",
    };
    Finding { state: State::Good, topic: "terminal", text: text.into() }
}

/// The driver and its devices.  That a machine has none is no fault of it.
fn gpu() -> Finding {
    let without = "programs run on the CPU, GPU kernels are compiled and simulated";
    let finding = |state, text| Finding { state, topic: "GPU", text };
    let s = match rambac_cuda::survey() {
        Ok(s) => s,
        Err(e) => return finding(State::Note, format!("{e}; {without}")),
    };
    let driver = format!("the driver knows CUDA {}.{}", s.driver.0, s.driver.1);
    if s.gpus.is_empty() {
        return finding(State::Note, format!("{driver} and sees no GPU; {without}"));
    }
    let all: Vec<String> = s
        .gpus
        .iter()
        .enumerate()
        .map(|(i, g)| {
            let (major, minor) = g.capability;
            let best = archs(Some(g.capability)).first();
            let runs = best.map_or("too old for its kernels".into(), |a| format!("runs kernels for {a}"));
            let (memory, sms) = (show::bytes(g.memory), show::plural(g.sms as usize, "multiprocessor"));
            format!("cuda:{i} is {}, {memory}, compute capability {major}.{minor}, {sms}, {runs}", g.name)
        })
        .collect();
    let state = if s.gpus.iter().any(|g| !archs(Some(g.capability)).is_empty()) { State::Good } else { State::Note };
    finding(state, format!("{driver}; {}", all.join("; ")))
}

/// The library of dense products, which only a GPU needs.
fn products() -> Finding {
    let finding = |state, text| Finding { state, topic: "products", text };
    match rambac_cuda::Library::cublaslt(&cublaslt()) {
        Ok(l) => {
            let place = l.path.map_or("found by the linker".into(), |p| p.display().to_string());
            let (v, minor) = (l.version / 10000, l.version / 100 % 100);
            finding(State::Good, format!("cuBLASLt {v}.{minor}.{} ({place})", l.version % 100))
        }
        // Without a GPU nothing wants it.
        Err(_) if rambac_cuda::survey().is_ok_and(|s| s.gpus.is_empty()) || rambac_cuda::survey().is_err() => {
            finding(State::Note, format!("no cuBLASLt, which only a GPU needs; for one: {CUBLASLT_HELP}"))
        }
        Err(e) => finding(State::Broken, format!("{e}: no GPU can be used")),
    }
}

/// The CUDA compiler, which needs no GPU.
fn nvrtc() -> Finding {
    use rambac_codegen::nvrtc::{HELP, Nvrtc, NvrtcError, VARIABLE, installed};
    let finding = |state, text| Finding { state, topic: "compiler", text };
    let places = installed();
    let open = |p: &PathBuf| Nvrtc::open(p).map(|n| (n, p.display().to_string()));
    let mut all = places.iter().map(open);
    // The first is used, whatever the others can do.
    let first = match all.next().unwrap_or_else(|| Ok((Nvrtc::open_any()?, "found by the linker".into()))) {
        Err(NvrtcError::Missing) => {
            return finding(State::Note, format!("NVRTC is not here: GPU kernels can't be compiled; {HELP}"));
        }
        first => works(first),
    };
    let (mut others, mut broken) = (vec![], vec![]);
    for n in all {
        let name = n.as_ref().map_or(String::new(), |n| n.0.name());
        match (name, works(n)) {
            (name, Ok(_)) if !others.contains(&name) => others.push(name),
            (_, Ok(_)) => {}
            (_, Err(e)) => broken.push(e),
        }
    }
    let mut text = match &first {
        Ok(what) => what.clone(),
        Err(e) => format!("{e}; {HELP}"),
    };
    if !others.is_empty() {
        text += &format!("; {VARIABLE} chooses another (here: {})", others.join(", "));
    }
    if !broken.is_empty() {
        text += &format!("; of no use are: {}", broken.join("; "));
    }
    finding(if first.is_ok() { State::Good } else { State::Note }, text)
}

/// Compiles a kernel for every target: a library may be here without its builtins.
fn works(
    opened: std::result::Result<(rambac_codegen::nvrtc::Nvrtc, String), rambac_codegen::nvrtc::NvrtcError>,
) -> std::result::Result<String, String> {
    use rambac_codegen::cuda::Arch;
    let (n, place) = opened.map_err(|e| e.to_string())?;
    let name = format!("{} ({place})", n.name());
    let source = "extern \"C\" __global__ void doctor(float* x) { x[threadIdx.x] += 1.0f; }\n";
    let fails = |arch: &Arch| {
        let option = format!("--gpu-architecture={arch}");
        n.compile("doctor.cu", source, &[], &[&option]).err().map(|e| format!("{name} can't compile for {arch}: {e}"))
    };
    match Arch::ALL.iter().find_map(fails) {
        Some(e) => Err(e),
        None => Ok(format!("{name} compiles for {}", Arch::ALL.map(|a| a.name()).join(" and "))),
    }
}

/// Where compiled kernels are kept.
fn cache() -> Finding {
    use rambac_codegen::cuda::{Cache, cache::VARIABLE};
    let finding = |state, text| Finding { state, topic: "cache", text };
    let cache = Cache::standard();
    let Some(folder) = cache.folder() else {
        return finding(State::Note, format!("none: every run compiles its GPU kernels; set {VARIABLE} to a folder"));
    };
    // It is made when it is first needed: then what counts is the nearest folder that exists.
    let there = folder.ancestors().find(|p| p.is_dir()).unwrap_or(folder);
    let folder = folder.display();
    if let Err(e) = writable(there) {
        return finding(State::Note, format!("{folder} can't be written ({e}); set {VARIABLE} to a folder that can"));
    }
    match cache.entries(false) {
        Err(e) => finding(State::Note, format!("{folder} can't be read ({e})")),
        Ok(all) => {
            let bytes: u64 = all.iter().map(|e| e.bytes).sum();
            let n = show::plural(all.len(), "kernel");
            finding(State::Good, format!("{folder}: {n}, {}", show::bytes(bytes as usize)))
        }
    }
}
