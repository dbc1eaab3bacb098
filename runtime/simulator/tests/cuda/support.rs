//! Buffers, launches and comparisons for the programs.

use rambac_codegen::nvrtc::Nvrtc;
use rambac_simulator::Options;
use rambac_simulator::check::Finding;
use rambac_simulator::count::Counts;
use rambac_simulator::device::{Arg, BufferId, Code, Device, Extent, ModuleId, Simulator};

/// A program with its inputs and what must come out.
pub struct Case {
    pub name: &'static str,
    /// File and text.
    pub file: &'static str,
    pub source: &'static str,
    pub arch: &'static str,
    pub kernel: &'static str,
    pub run: fn(&mut Bench) -> Result<(), String>,
}

/// Numbers as bytes.
pub trait Number: Copy {
    const BYTES: usize;
    fn bytes(self) -> Vec<u8>;
    fn of(b: &[u8]) -> Self;
}

macro_rules! numbers {
    ($($t:ty),*) => { $(
        impl Number for $t {
            const BYTES: usize = size_of::<$t>();
            fn bytes(self) -> Vec<u8> { self.to_le_bytes().to_vec() }
            fn of(b: &[u8]) -> $t { <$t>::from_le_bytes(b.try_into().unwrap()) }
        }
    )* };
}
numbers!(u8, u16, u32, i32, u64, f32, f64);

/// A simulator with a program loaded.
pub struct Bench {
    pub sim: Simulator,
    pub module: ModuleId,
    pub kernel: &'static str,
    pub counts: Option<Counts>,
}

impl Bench {
    pub fn new(ptx: &str, kernel: &'static str, options: Options) -> Result<Bench, String> {
        let mut sim = Simulator::new(options);
        let module = sim.load(&Code::ptx(ptx)).map_err(|e| e.to_string())?;
        Ok(Bench { sim, module, kernel, counts: None })
    }

    /// A buffer that the kernel must not write.
    pub fn input<T: Number>(&mut self, name: &str, data: &[T]) -> BufferId {
        let b = self.inout(name, data);
        self.sim.protect(b);
        b
    }

    pub fn inout<T: Number>(&mut self, name: &str, data: &[T]) -> BufferId {
        let bytes: Vec<u8> = data.iter().flat_map(|v| v.bytes()).collect();
        let b = self.sim.alloc(name, bytes.len()).unwrap();
        self.sim.copy_in(b, 0, &bytes).unwrap();
        b
    }

    /// A buffer without content.
    pub fn output<T: Number>(&mut self, name: &str, n: usize) -> BufferId {
        self.sim.alloc(name, n * T::BYTES).unwrap()
    }

    pub fn get<T: Number>(&mut self, b: BufferId) -> Vec<T> {
        let mut bytes = vec![0; self.sim.bytes(b)];
        self.sim.copy_out(b, 0, &mut bytes).unwrap();
        bytes.chunks_exact(T::BYTES).map(T::of).collect()
    }

    pub fn launch(&mut self, extent: Extent, args: &[Arg]) -> Result<(), String> {
        self.sim.launch(self.module, self.kernel, extent, args).map_err(|e| e.to_string())?;
        self.sim.synchronise().map_err(|e| e.to_string())?;
        self.counts = self.sim.take_counts().pop();
        Ok(())
    }

    pub fn counts(&self) -> &Counts {
        self.counts.as_ref().unwrap()
    }
}

/// All equal, bit for bit.
pub fn same<T: Number + std::fmt::Debug>(what: &str, got: &[T], want: &[T]) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("{what}: {} values, {} wanted", got.len(), want.len()));
    }
    match (0..got.len()).find(|&i| got[i].bytes() != want[i].bytes()) {
        None => Ok(()),
        Some(i) => Err(format!("{what}[{i}] is {:?}, {:?} wanted", got[i], want[i])),
    }
}

/// All within `tolerance` relative to the larger of 1 and the wanted value.
pub fn close<T: Number + Into<f64>>(what: &str, got: &[T], want: &[f64], tolerance: f64) -> Result<(), String> {
    assert_eq!(got.len(), want.len());
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let g: f64 = g.into();
        let off = (g - w).abs() / w.abs().max(1.0);
        if !(off <= tolerance || (g.is_nan() && w.is_nan()) || g == w) {
            return Err(format!("{what}[{i}] is {g:e}, {w:e} wanted (off by {off:e}, tolerance {tolerance:e})"));
        }
    }
    Ok(())
}

/// Every schedule that programs must survive.
pub fn schedules() -> Vec<Options> {
    let mut all = vec![];
    for seed in 0..4 {
        for lazy in [false, true] {
            all.push(Options { seed, lazy, limit: 1 << 20, ..Options::default() });
        }
    }
    all
}

pub fn compile(n: &Nvrtc, case: &Case, source: &str) -> Result<String, String> {
    let arch = format!("--gpu-architecture={}", case.arch);
    let options = [arch.as_str(), "-lineinfo", "--std=c++17"];
    n.compile(case.file, source, &[], &options).map(|c| c.ptx).map_err(|e| e.to_string())
}

/// What differs, and what was found.
type Ran = (Result<(), String>, Vec<Finding>);

/// One run of a program.
pub fn once(case: &Case, ptx: &str, options: Options) -> Ran {
    match Bench::new(ptx, case.kernel, options) {
        Err(e) => (Err(e), vec![]),
        Ok(mut b) => {
            let r = (case.run)(&mut b);
            (r, b.sim.take_findings())
        }
    }
}

/// A program by all compilers and schedules: right and without findings.
pub fn run(case: &Case, compilers: &[Nvrtc]) -> Result<String, String> {
    for n in compilers {
        let ptx = compile(n, case, case.source)?;
        for o in schedules() {
            let (result, findings) = once(case, &ptx, o);
            let at = format!("NVRTC {}.{}, seed {}, lazy {}", n.version.0, n.version.1, o.seed, o.lazy);
            result.map_err(|e| format!("{at}: {e}"))?;
            if let Some(f) = findings.first() {
                return Err(format!("{at}: {} findings, first: {f}", findings.len()));
            }
        }
    }
    Ok(String::new())
}

/// Both major versions are there and their PTX is of the versions we claim to read.
pub fn versions(compilers: &[Nvrtc]) -> Result<String, String> {
    let majors: Vec<i32> = compilers.iter().map(|n| n.version.0).collect();
    if majors != [12, 13] {
        return Err(format!("majors {majors:?}, 12 and 13 wanted"));
    }
    Ok(String::new())
}
