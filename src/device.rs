//! Devices by name, and programs made ready for one: the only place of the command that opens a device.

use crate::error::{Result, told, warn, wrap};
use miette::miette;
use rambac_codegen::cuda::{Arch, Cache, GpuProgram, Target, emit, tune};
use rambac_codegen::libraries::installed;
use rambac_codegen::nvrtc::Nvrtc;
use rambac_codegen::{Kernels, Program, lower_for};
use rambac_cuda::{CUBLASLT, CudaDevice};
use rambac_ir::{Bindings, DimError, Graph};
use rambac_passes::{Options, optimise};
use rambac_runtime::gpu::{Code, Device, Machine, Placement, ProgramId, archs};
use rambac_runtime::session::{DeviceMemory, SessionParts};
use rambac_runtime::{Session, SessionGraphs, SessionOptions, Store};
use rambac_simulator::device::Simulator;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

/// Where a program runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum On {
    /// Fused kernels on this machine's cores.
    #[default]
    Cpu,
    /// Each op's definition in f64: slow, for tests.
    Reference,
    /// GPU kernels on this machine's cores, instruction by instruction and watched: for small sizes.
    Simulator,
    /// A GPU.
    Cuda(usize),
}

impl fmt::Display for On {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            On::Cpu => f.write_str("cpu"),
            On::Reference => f.write_str("reference"),
            On::Simulator => f.write_str("simulator"),
            On::Cuda(i) => write!(f, "cuda:{i}"),
        }
    }
}

impl FromStr for On {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<On, String> {
        let cuda = |i: &str| i.parse().map(On::Cuda).ok();
        match s {
            "cpu" => Some(On::Cpu),
            "reference" => Some(On::Reference),
            "simulator" => Some(On::Simulator),
            "cuda" => Some(On::Cuda(0)),
            other => other.strip_prefix("cuda:").and_then(cuda),
        }
        .ok_or_else(|| "a device is cpu, reference, simulator, cuda:0, cuda:1, …".into())
    }
}

impl On {
    /// Whether it runs GPU programs.
    pub fn gpu(self) -> bool {
        matches!(self, On::Simulator | On::Cuda(_))
    }

    /// Opens a device that runs GPU programs.
    ///
    /// # Errors
    /// It is not there, or runs no GPU programs.
    pub fn open(self) -> Result<Box<dyn Device>> {
        Ok(match self {
            On::Cpu | On::Reference => return Err(miette!("{self} runs no GPU programs")),
            On::Simulator => Box::new(Simulator::strict(rambac_simulator::Options::default()).forgetful()),
            On::Cuda(i) => Box::new(CudaDevice::open(i, &cublaslt()).map_err(wrap)?),
        })
    }
}

/// Files of cuBLASLt, best first.
pub fn cublaslt() -> Vec<PathBuf> {
    installed(CUBLASLT, "RAMBAC_CUBLASLT")
}

/// How inference is to run.
pub struct Inferring<'a> {
    pub on: On,
    /// Bytes of the device.
    pub memory: Option<usize>,
    /// Tokens of the longest segment.
    pub segment: usize,
    pub options: &'a SessionOptions,
}

/// The parts of a session after a GPU's passes.
pub fn gpu_graphs(graphs: &SessionGraphs, passes: &Options) -> SessionParts<Graph> {
    let passes = passes.on_gpu();
    graphs.map(|g| optimise(g, &passes))
}

/// They as programs, with their memory in arrays.
pub fn gpu_programs(graphs: &SessionGraphs, passes: &Options) -> SessionParts<Program> {
    gpu_graphs(graphs, passes).map(|g| lower_for(g, Kernels::Gpu))
}

/// A session where it is to run.
///
/// # Errors
/// A device that is not there or too small; a kernel that does not compile; a store that can't be opened.
pub fn session(
    how: &Inferring,
    graphs: &SessionGraphs,
    params: Store,
    pool: &Arc<rayon::ThreadPool>,
) -> Result<Session> {
    match how.on {
        On::Cpu if how.memory.is_some() => Err(miette!("--device-memory is for GPUs: add --device cuda:0")),
        On::Cpu => Session::new(graphs, params, pool.clone(), how.options).map_err(wrap),
        On::Reference => Err(miette!("inference runs on cpu, simulator and cuda:0, not by the ops' definitions")),
        On::Simulator | On::Cuda(_) => pool.install(|| {
            let mut gpu = Gpu::open(how.on)?.at(vec![Bindings::new([("N", 1), ("L", how.segment)])]);
            let graphs = gpu_graphs(graphs, &how.options.passes);
            let programs = Session::device_programs(&graphs, how.options.precision);
            let parts = programs.try_map(|p| gpu.compile(p.clone()))?;
            let memory = DeviceMemory { limit: how.memory, segment: how.segment };
            Session::on_device(gpu.machine, parts, params, pool.clone(), how.options, memory).map_err(wrap)
        }),
    }
}

/// What stands in the brackets of a device's name, `cuda:0 (NVIDIA H200)`: before them is where it is plugged in.
pub fn maker_name(name: &str) -> &str {
    name.split_once('(').map_or(name, |n| n.1.trim_end_matches(')'))
}

/// `p` with what was measured on a device at any of these sizes in front of what is predicted.  Where a symbol of the program has
/// no size nothing was.
fn measured(
    mut p: GpuProgram,
    sizes: &[Bindings],
    device: &str,
    cache: &Cache,
) -> std::result::Result<GpuProgram, DimError> {
    // To look for choices costs time, and mostly there are none.
    let sizes = if cache.devices().iter().any(|d| d == device) { sizes } else { &[] };
    for b in sizes {
        let syms = p.program.syms.iter().map(|s| Some((s.as_str(), b.get(s)?)));
        let Some(own) = syms.collect::<Option<Vec<_>>>() else { continue };
        if let Some(m) = tune::measured(&p, &Bindings::new(own), device, cache)? {
            p = m;
        }
    }
    Ok(p)
}

/// A device that runs GPU programs, and what makes them.
pub struct Gpu {
    pub machine: Machine,
    /// What it runs, best first.
    pub archs: &'static [Arch],
    /// See [`at`](Self::at).
    sizes: Vec<Bindings>,
    /// Opened when the first kernel is to be compiled.
    nvrtc: Option<Nvrtc>,
    cache: Cache,
}

impl Gpu {
    /// Opens a device.
    ///
    /// # Errors
    /// It is not there, or runs no GPU programs.
    pub fn open(on: On) -> Result<Gpu> {
        let (device, placement) = (on.open()?, if on == On::Simulator { Placement::Apart } else { Placement::Arena });
        let archs = archs(device.capability());
        if archs.is_empty() {
            let name = device.name();
            let oldest = Arch::ALL[0];
            return Err(miette!("{name} is too old: kernels are made for {oldest} and later"));
        }
        let (mut machine, cache) = (Machine::new(device, placement), Cache::standard());
        machine.on_warning(Box::new(warn));
        Ok(Gpu { machine, archs, sizes: vec![], nvrtc: None, cache })
    }

    /// For programs that will run at these sizes: there they run as `rambac tune` found it to be fastest.
    pub fn at(self, sizes: Vec<Bindings>) -> Gpu {
        Gpu { sizes, ..self }
    }

    /// The best of these architectures that the device runs.
    pub fn choose(&self, of: &[Arch]) -> Option<Arch> {
        // The simulator runs all: then the order of what is there counts.
        match self.archs == Arch::ALL {
            true => of.first().copied(),
            false => self.archs.iter().copied().find(|a| of.contains(a)),
        }
    }

    /// As [`choose`](Self::choose), or the one that was asked for.
    ///
    /// # Errors
    /// The device does not run it; `None`: it runs none of them.
    pub fn target(&mut self, asked: Option<Arch>, of: &[Arch]) -> Result<Option<Arch>> {
        match asked {
            Some(a) if self.archs.contains(&a) => Ok(Some(a)),
            Some(a) => Err(miette!("{} does not run code for {a}", self.machine.device().name())),
            None => Ok(self.choose(of)),
        }
    }

    /// Chooses the forms of a program for this device, compiles their kernels (several at once, on the pool of the
    /// caller) and loads them.
    ///
    /// # Errors
    /// A step that no kernel takes; no compiler; a kernel that does not compile.
    pub fn compile(&mut self, program: Program) -> Result<ProgramId> {
        let gpu = emit(program, Target::of(self.archs[0])).map_err(wrap)?;
        let device = maker_name(self.machine.device().name());
        let gpu = Arc::new(measured(gpu, &self.sizes, device, &self.cache).map_err(wrap)?);
        let nvrtc = match &mut self.nvrtc {
            Some(n) => n,
            none => none.insert(Nvrtc::open_any().map_err(wrap)?),
        };
        let code = Code::compile(nvrtc, &[&gpu], &self.cache).map_err(wrap)?;
        self.machine.load(gpu, &code).map_err(wrap)
    }
}

impl rambac_runtime::trainer_gpu::Gpu for Gpu {
    fn machine(&mut self) -> &mut Machine {
        &mut self.machine
    }
    fn target(&self) -> Target {
        Target::of(self.archs[0])
    }
    fn load(&mut self, program: Program) -> std::result::Result<ProgramId, String> {
        self.compile(program).map_err(|e| told(&e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Weights;
    use crate::model;
    use rambac_codegen::cuda::Form;
    use rambac_codegen::cuda::tune::{Measure, Trial, tune};
    use rambac_codegen::program::Step;
    use rambac_ir::HostArray;
    use rambac_ir::ops::{Op, SourceKind};

    /// A device on which every candidate takes half as long as the one before.
    struct Ever(f64);

    impl Measure for Ever {
        fn device(&self) -> String {
            "NVIDIA Fake".into()
        }
        fn trial(
            &mut self,
            step: &Step,
            _: &Form,
            dims: &Bindings,
            operands: &[HostArray],
        ) -> std::result::Result<Trial, String> {
            self.0 /= 2.0;
            let tys = step.outputs.iter().map(|v| v.ty.bind(dims)).collect::<std::result::Result<Vec<_>, _>>();
            let tys = tys.map_err(|e| e.to_string())?;
            Ok(Trial { seconds: self.0, results: step.op.def().eval(&operands.iter().collect::<Vec<_>>(), &tys) })
        }
    }

    /// What `tune` keeps is what a program runs that is made for these sizes on this device, and no other.
    #[test]
    fn what_was_measured_runs() {
        let text = "graph conv(N, L) {
  %x = input \"x\" : f32[N, L, 32]
  %w = input \"w\" : f32[32, 1, 4]
  %bias = input \"bias\" : f32[32]
  %s0 = input \"s0\" : f32[N, 3, 32]
  %y, %t = causal_conv1d %x, %w, %bias, %s0
  return \"y\" = %y, \"t\" = %t
}
";
        let program = lower_for(&rambac_ir::text::parse(text).unwrap(), Kernels::Gpu);
        let p = emit(program, Target::of(Arch::Sm80)).unwrap();
        let dir = tempfile::TempDir::new().unwrap();
        let cache = Cache::at(dir.path());
        let at = |l| Bindings::new([("N", 1), ("L", l)]);
        for l in [40, 64] {
            let c = tune(&p.program.steps[0], &p.target, &at(l), &mut Ever(1.0), &cache).unwrap();
            assert!(c.chosen > 0, "{c:?}");
        }
        // A size that the program lacks, and one that lacks a symbol of it, are no trouble.
        let sizes = [Bindings::new([("N", 1)]), Bindings::new([("N", 1), ("L", 40), ("C", 7)]), at(64), at(80)];
        let name = maker_name("cuda:3 (NVIDIA Fake)");
        let m = measured(p.clone(), &sizes, name, &cache).unwrap();
        let runs = |m: &GpuProgram, l| m.forms(&at(l)).unwrap()[0].measured;
        assert!(runs(&m, 40) && runs(&m, 64) && !runs(&m, 80) && !runs(&m, 41));
        let launched = m.forms(&at(40)).unwrap()[0].launches().next().unwrap().kernel.clone();
        assert!(m.kernels.contains(&launched));
        assert!(!runs(&measured(p.clone(), &sizes, "NVIDIA Other", &cache).unwrap(), 40));
        assert!(!runs(&measured(p, &[at(80)], name, &cache).unwrap(), 40));
    }

    /// A trainer, which knows no reports, is told causes and help, too.
    #[test]
    fn nothing_of_an_error_is_lost() {
        #[derive(Debug, thiserror::Error)]
        #[error("above")]
        struct Above(#[source] std::io::Error);
        assert_eq!(told(&wrap(Above(std::io::Error::other("the cause")))), "above: the cause");
        let e = wrap(Above(std::io::Error::other("what lies above")));
        assert_eq!(told(&e), "above: what lies above");
        let text = told(&miette!(help = "do this", "it is gone").wrap_err("not loaded"));
        assert!(text.starts_with("not loaded: it is gone"), "{text}");
        assert_eq!(told(&miette!(help = "do this", "it is gone")), "it is gone; do this");
    }

    #[test]
    fn weights_in_bf16_are_read_as_they_lie() {
        for preset in ["tiny", "mamba2-130m", "370m"] {
            let graphs = model::session_graphs(&model::config(preset).unwrap().0, 0).unwrap();
            for (part, p) in gpu_programs(&graphs, &Weights::Bf16.options()).named() {
                let params: Vec<_> =
                    p.sources.iter().filter(|s| s.kind == SourceKind::Param).map(|s| s.buffer).collect();
                for s in p.steps.iter().filter(|s| matches!(s.op, Op::Cast(_) | Op::FusedMap(_))) {
                    let whole = s.inputs.iter().find(|v| params.contains(&v.buffer) && v.ty.shape.len() == 2);
                    assert!(whole.is_none(), "{preset}, {part}: {} of {whole:?}", s.op.mnemonic());
                }
            }
        }
    }
}
