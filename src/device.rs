//! Devices by name, and programs made ready for one: the only place of the command that opens a device.

use crate::error::{Result, wrap};
use miette::miette;
use rambac_codegen::Program;
use rambac_codegen::cuda::{Arch, Cache, Target, emit};
use rambac_codegen::libraries::installed;
use rambac_codegen::nvrtc::Nvrtc;
use rambac_cuda::{CUBLASLT, CudaDevice};
use rambac_runtime::gpu::{Code, Device, Machine, Placement, ProgramId, archs};
use rambac_simulator::Options;
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
}

/// Files of cuBLASLt, best first.
pub fn cublaslt() -> Vec<PathBuf> {
    installed(CUBLASLT, "RAMBAC_CUBLASLT")
}

/// A device that runs GPU programs, and what makes them.
pub struct Gpu {
    pub machine: Machine,
    /// What it runs, best first.
    pub archs: &'static [Arch],
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
        let (device, placement): (Box<dyn Device>, Placement) = match on {
            On::Cpu | On::Reference => return Err(miette!("{on} runs no GPU programs")),
            On::Simulator => (Box::new(Simulator::strict(Options::default())), Placement::Apart),
            On::Cuda(i) => (Box::new(CudaDevice::open(i, &cublaslt()).map_err(wrap)?), Placement::Arena),
        };
        let archs = archs(device.capability());
        if archs.is_empty() {
            let name = device.name();
            let oldest = Arch::ALL[0];
            return Err(miette!("{name} is too old: kernels are made for {oldest} and later"));
        }
        Ok(Gpu { machine: Machine::new(device, placement), archs, nvrtc: None, cache: Cache::standard() })
    }

    /// The best of these architectures that the device runs.
    pub fn choose(&self, of: &[Arch]) -> Option<Arch> {
        // The simulator runs all: then the order of what is there counts.
        match self.archs == Arch::ALL {
            true => of.first().copied(),
            false => self.archs.iter().copied().find(|a| of.contains(a)),
        }
    }

    /// Chooses the forms of a program for this device, compiles their kernels (several at once, on the pool of the
    /// caller) and loads them.
    ///
    /// # Errors
    /// A step that no kernel takes; no compiler; a kernel that does not compile.
    pub fn compile(&mut self, program: Program) -> Result<ProgramId> {
        let gpu = Arc::new(emit(program, Target::of(self.archs[0])).map_err(wrap)?);
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
        self.compile(program).map_err(|e| e.to_string())
    }
}
