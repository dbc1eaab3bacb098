//! `rambac simulate`: runs a PTX file's kernel on the CPU, watches it, and says what it found.

use crate::cli::Simulate;
use crate::error::{Result, wrap};
use crate::show;
use miette::miette;
use rambac_simulator::device::{Arg, BufferId, Code, Device, Extent, ModuleId, Simulator, signature};
use rambac_simulator::isa::Ty;
use rambac_simulator::{Finding, Options, report};
use rand::{Rng, SeedableRng};
use serde_json::json;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

/// What an argument says.
struct Spec {
    name: String,
    ty: Ty,
    /// Elements of a buffer; none for a scalar.
    elements: Option<usize>,
    init: Option<String>,
    /// A buffer with content that the kernel may write.
    writable: bool,
}

const FORMS: &str = "name=f32[1024] (written by the kernel), name=f32[1024]:iota (read only), name=f32[1024]:zero:rw, \
                     n=i32:1024; types u8 … s64, i32, f16, bf16, f32, f64; content: zero, iota, random, a number, @FILE";

fn ty(s: &str) -> Option<Ty> {
    let s = if let Some(bits) = s.strip_prefix('i') { format!("s{bits}") } else { s.to_string() };
    Ty::named(&s).filter(|t| !matches!(t, Ty::Pred | Ty::B128 | Ty::Tf32 | Ty::E4m3x2 | Ty::E5m2x2))
}

fn spec(text: &str) -> Result<Spec> {
    let bad = |what: &str| miette!(help = FORMS.to_string(), "--arg {text}: {what}");
    let (name, rest) = text.split_once('=').ok_or_else(|| bad("'=' is missing"))?;
    let mut parts = rest.splitn(2, ':');
    let shape = parts.next().unwrap_or_default();
    let mut init = parts.next().map(str::to_string);
    let mut writable = false;
    if let Some(i) = &mut init
        && let Some(short) = i.strip_suffix(":rw")
    {
        *i = short.to_string();
        writable = true;
    }
    let (of, elements) = match shape.split_once('[') {
        None => (shape, None),
        Some((of, n)) => {
            let n = n.strip_suffix(']').ok_or_else(|| bad("']' is missing"))?;
            (of, Some(n.parse().map_err(|_| bad(&format!("\"{n}\" is no number of elements")))?))
        }
    };
    let ty = ty(of).ok_or_else(|| bad(&format!("\"{of}\" is no type")))?;
    if elements.is_none() && init.is_none() {
        return Err(bad("a scalar needs a value"));
    }
    Ok(Spec { name: name.into(), ty, elements, init, writable })
}

/// Bytes of one value.
fn value(ty: Ty, v: f64) -> Vec<u8> {
    let w = ty.bytes();
    match ty {
        Ty::F32 => (v as f32).to_le_bytes().to_vec(),
        Ty::F64 => v.to_le_bytes().to_vec(),
        Ty::F16 => half::f16::from_f64(v).to_le_bytes().to_vec(),
        Ty::Bf16 => half::bf16::from_f64(v).to_le_bytes().to_vec(),
        _ => (v as i128).to_le_bytes()[..w].to_vec(),
    }
}

/// The content that an argument asks for, `n` elements.
fn content(s: &Spec, init: &str, n: usize) -> Result<Vec<u8>> {
    let bytes = n * s.ty.bytes();
    if let Some(file) = init.strip_prefix('@') {
        let data = std::fs::read(file).map_err(|e| miette!("--arg {}: {file}: can't be read ({e})", s.name))?;
        if data.len() != bytes {
            return Err(miette!("--arg {}: {file} holds {} bytes, {bytes} are expected", s.name, data.len()));
        }
        return Ok(data);
    }
    // Of equal names equal numbers.
    let seed = s.name.bytes().fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(b)));
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut out = Vec::with_capacity(bytes);
    for i in 0..n {
        let v = match init {
            "zero" => 0.0,
            "iota" => i as f64,
            "random" if s.ty.float() => random.random_range(-1.0..1.0),
            "random" => f64::from(random.random_range(0..100)),
            number if s.ty.float() => number
                .parse()
                .map_err(|_| miette!(help = FORMS.to_string(), "--arg {}: \"{number}\" is no content", s.name))?,
            number => {
                let v: i128 = number
                    .parse()
                    .map_err(|_| miette!(help = FORMS.to_string(), "--arg {}: \"{number}\" is no content", s.name))?;
                let bits = s.ty.bits();
                if v >= 1 << bits || v < -(1 << (bits - 1)) {
                    return Err(miette!("--arg {}: {v} doesn't fit {bits} bits", s.name));
                }
                out.extend(&v.to_le_bytes()[..s.ty.bytes()]);
                continue;
            }
        };
        out.extend(value(s.ty, v));
    }
    Ok(out)
}

/// The first values of a buffer.
fn first(ty: Ty, data: &[u8]) -> String {
    let w = ty.bytes();
    let one = |b: &[u8]| {
        let mut wide = [0u8; 16];
        wide[..w].copy_from_slice(b);
        let bits = u128::from_le_bytes(wide);
        match ty {
            Ty::F32 => f32::from_bits(bits as u32).to_string(),
            Ty::F64 => f64::from_bits(bits as u64).to_string(),
            Ty::F16 => half::f16::from_bits(bits as u16).to_string(),
            Ty::Bf16 => half::bf16::from_bits(bits as u16).to_string(),
            _ if ty.signed() => {
                let shift = 128 - 8 * w as u32;
                ((bits << shift) as i128 >> shift).to_string()
            }
            _ => bits.to_string(),
        }
    };
    let shown: Vec<String> = data.chunks_exact(w).take(4).map(one).collect();
    format!("{}{}", shown.join(" "), if data.len() > 4 * w { " …" } else { "" })
}

/// FNV-1a, 64 bits.
fn checksum(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

fn kernel(sim: &Simulator, module: ModuleId, wanted: Option<&str>) -> Result<String> {
    let all = sim.kernels(module);
    match (wanted, &all[..]) {
        (Some(k), _) => Ok(k.to_string()),
        (None, [one]) => Ok(one.clone()),
        (None, []) => Err(miette!("there is no kernel in this module")),
        (None, _) => Err(miette!("say which with --kernel: {}", all.join(", "))),
    }
}

struct Ran {
    findings: Vec<Finding>,
    counts: Option<rambac_simulator::count::Counts>,
    files: Vec<(u32, String)>,
    /// (name, type, content) of what the kernel may write.
    results: Vec<(String, Ty, Vec<u8>)>,
    kernel: String,
}

fn once(a: &Simulate, text: &str, specs: &[Spec], options: Options, pool: &rayon::ThreadPool) -> Result<Ran> {
    let mut sim = Simulator::new(options);
    let path = &a.ptx;
    let module = sim.load(&Code::ptx(text)).map_err(|e| miette!("{}: {e}", path.display()))?;
    let kernel = kernel(&sim, module, a.kernel.as_deref())?;
    let program = sim.program(module, &kernel).map_err(|e| miette!("{}: {e}", path.display()))?;
    let mut args: Vec<Arg> = vec![];
    let mut written: Vec<(String, Ty, BufferId)> = vec![];
    if specs.len() != program.params.len() {
        return Err(miette!(
            help = FORMS.to_string(),
            "{} takes {} arguments, {} came: {}",
            kernel,
            program.params.len(),
            specs.len(),
            signature(&program)
        ));
    }
    for (i, (s, p)) in specs.iter().zip(&program.params).enumerate() {
        let Some(n) = s.elements else {
            let bytes = content(s, s.init.as_deref().unwrap_or_default(), 1)?;
            if bytes.len() != p.bytes {
                return Err(miette!(
                    "--arg {}: parameter {i} of {kernel} is {} bytes wide, {:?} has {}",
                    s.name,
                    p.bytes,
                    s.ty,
                    bytes.len()
                ));
            }
            args.push(Arg::Bytes(bytes));
            continue;
        };
        // Bytes given by value: a struct, a tensor map.
        if p.bytes == n * s.ty.bytes()
            && p.bytes != 8
            && let Some(init) = &s.init
        {
            args.push(Arg::Bytes(content(s, init, n)?));
            continue;
        }
        if p.bytes != 8 {
            return Err(miette!(
                "--arg {}: parameter {i} of {kernel} is {} bytes wide, no buffer's address",
                s.name,
                p.bytes
            ));
        }
        let b = sim.alloc(&s.name, n * s.ty.bytes()).map_err(wrap)?;
        if let Some(init) = &s.init {
            sim.copy_in(b, 0, &content(s, init, n)?).map_err(wrap)?;
        }
        if s.init.is_some() && !s.writable {
            sim.protect(b);
        } else {
            written.push((s.name.clone(), s.ty, b));
        }
        args.push(b.into());
    }
    let extent = Extent { grid: a.grid, block: a.block, cluster: a.cluster, shared: a.shared, early: false };
    pool.install(|| sim.launch(module, &kernel, extent, &args)).map_err(wrap)?;
    sim.synchronise().map_err(wrap)?;
    let mut results = vec![];
    for (name, ty, b) in written {
        let mut data = vec![0; sim.bytes(b)];
        sim.copy_out(b, 0, &mut data).map_err(wrap)?;
        results.push((name, ty, data));
    }
    let files = sim.files(module).to_vec();
    Ok(Ran { findings: sim.take_findings(), counts: sim.take_counts().pop(), files, results, kernel })
}

/// Runs the verb.
pub fn run(a: &Simulate, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    let text = std::fs::read_to_string(&a.ptx).map_err(|e| miette!("{}: can't be read ({e})", a.ptx.display()))?;
    let specs: Vec<Spec> = a.args.iter().map(|s| spec(s)).collect::<Result<_>>()?;
    let (mut found, mut differs) = (0, false);
    let mut first_run: Option<Ran> = None;
    for k in 0..a.schedules {
        // The second of two runs makes asynchronous copies as late as may be.
        let options = Options { seed: a.seed + k, lazy: k % 2 == 1, limit: a.limit, ..Options::default() };
        let began = std::time::Instant::now();
        let ran = once(a, &text, &specs, options, &pool)?;
        let seconds = began.elapsed().as_secs_f64();
        found += ran.findings.len();
        let threads = ran.counts.as_ref().map_or(0, |c| c.thread_instructions);
        if a.json {
            for f in &ran.findings {
                let at = rambac_simulator::check::place_name(&f.place, &ran.files);
                println!(
                    "{}",
                    json!({ "finding": f.kind.name(), "message": f.message, "at": at, "ptx_line": f.place.line,
                            "block": f.block, "thread": f.thread, "count": f.count, "seed": options.seed })
                );
            }
            let sums: serde_json::Map<String, serde_json::Value> =
                ran.results.iter().map(|r| (r.0.clone(), json!(format!("{:016x}", checksum(&r.2))))).collect();
            println!(
                "{}",
                json!({ "kernel": ran.kernel, "seed": options.seed, "lazy": options.lazy, "findings": ran.findings.len(),
                        "results": sums, "seconds": seconds, "thread_instructions": threads })
            );
        } else {
            let late = if options.lazy { ", late copies" } else { "" };
            println!(
                "{}: schedule {}{late}: {}, {}, {}",
                ran.kernel,
                options.seed,
                show::plural(ran.findings.len(), "finding"),
                show::seconds(seconds),
                show::si(threads as f64 / seconds, "thread instructions/s")
            );
            for (name, ty, data) in &ran.results {
                println!("  {name:<16} {:016x}  {}", checksum(data), first(*ty, data));
            }
            print!("{}", report::findings(&ran.findings, &ran.files));
        }
        match &first_run {
            None => first_run = Some(ran),
            Some(f) => differs |= f.results.iter().zip(&ran.results).any(|(x, y)| x.2 != y.2),
        }
    }
    if let Some(r) = &first_run {
        for s in &a.save {
            let (name, file) = s.split_once('=').ok_or_else(|| miette!("--save {s}: NAME=FILE is expected"))?;
            let (_, _, data) = r
                .results
                .iter()
                .find(|x| x.0 == name)
                .ok_or_else(|| miette!("--save {s}: the kernel writes no buffer \"{name}\""))?;
            std::fs::write(Path::new(file), data).map_err(|e| miette!("{file}: can't be written ({e})"))?;
        }
        if let Some(c) = r.counts.as_ref().filter(|_| a.report && !a.json) {
            print!("{}", report::counts(c));
        }
    }
    if !a.json && a.schedules > 1 {
        println!("{}", if differs { "results differ between schedules" } else { "equal results in all schedules" });
    }
    Ok(if found == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
