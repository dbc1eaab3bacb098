//! What a program's kernels were compiled to.

use rambac_codegen::cuda::{Arch, Cache, CompileError, Form, GpuProgram, Kernel};
use rambac_codegen::nvrtc::{Compiled, Nvrtc};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Instruction sets that a device of a compute capability runs, best first; without one: all, oldest first.
pub fn archs(capability: Option<(u32, u32)>) -> &'static [Arch] {
    match capability {
        None => &Arch::ALL,
        Some((9, 0)) => &[Arch::Sm90a, Arch::Sm80],
        Some((8.., _)) => &[Arch::Sm80],
        Some(_) => &[],
    }
}

/// Compiled kernels by name.
#[derive(Clone, Debug, Default)]
pub struct Code(pub BTreeMap<String, Compiled>);

impl Code {
    /// Compiles every kernel of some programs that `cache` does not hold, each once, several at a time.
    ///
    /// # Errors
    /// The first kernel that does not compile, with the compiler's log, its step and its text's place.
    pub fn compile(nvrtc: &Nvrtc, programs: &[&GpuProgram], cache: &Cache) -> Result<Code, CompileError> {
        let mut all: BTreeMap<&str, (&GpuProgram, &Kernel)> = BTreeMap::new();
        for (p, k) in programs.iter().flat_map(|p| p.kernels.iter().map(|k| (*p, k))) {
            let first = all.entry(&k.name).or_insert((p, k));
            assert!(first.1 == k, "BUG: two kernels have the name {}", k.name);
        }
        let all: Vec<(&GpuProgram, &Kernel)> = all.into_values().collect();
        let one = |(p, k): &(&GpuProgram, &Kernel)| match cache.compile(nvrtc, k, p.target.arch) {
            Ok(c) => Ok((k.name.clone(), c)),
            Err(e) => Err(CompileError { step: step_of(p, k), ..e }),
        };
        all.par_iter().map(one).collect::<Result<BTreeMap<_, _>, _>>().map(Code)
    }
}

/// The first step that launches a kernel: `loss: step 3 (rms_norm of f32[N, L])`.
fn step_of(p: &GpuProgram, k: &Kernel) -> Option<String> {
    let launches = |f: &Form| f.launches().any(|l| l.kernel.name == k.name);
    let i = p.steps.iter().position(|s| s.forms.iter().any(launches))?;
    let s = &p.program.steps[i];
    let tys: Vec<String> = s.inputs.iter().map(|v| v.ty.to_string()).collect();
    Some(format!("{}: step {i} ({} of {})", p.program.name, s.op.mnemonic(), tys.join(", ")))
}
