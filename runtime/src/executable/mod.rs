//! The executable: one safetensors file with all that a run needs.
//!
//! Tensors are the weights under their checkpoint names, `kernel.NAME.ARCH.cubin` and `.ptx` as bytes, and perhaps
//! `tokenizer.json`.  `__metadata__` holds strings:
//!
//! | key | value |
//! |---|---|
//! | `hash` | SHA-256 of the header, its length's eight bytes before it, with 64 zeros in the hash's own place; the first key |
//! | `rambac_executable` | the form's version |
//! | `compiler`, `model`, `mode`, `settings` | who made it of what for what |
//! | `config`  | config.json of the model, where it is one |
//! | `parts`, `targets` | JSON lists of names: `["step"]`, `["sm_80"]` |
//! | `ir.PART.before`, `ir.PART.after` | the graph before and after the passes, as text |
//! | `ir.PART.gpu` | after the passes for GPUs, where these give another graph |
//! | `program.PART` | the Program as JSON, see [`rambac_codegen::describe`] |
//! | `gpu.PART.ARCH` | the GPU program as JSON, see [`rambac_codegen::cuda::describe`] |
//! | `kernels.ARCH` | JSON: per kernel threads, shared memory, stub, registers and spills |
//! | `hashes` | JSON: SHA-256 of every tensor |
//!
//! **Loading trusts nothing.**  The header is what was written (its hash), the graph is verified, and what was made of it is
//! made again and compared: no buffer, operand or kernel that the file names is used, only what lowering its graph gives,
//! and a file whose program differs in anything is refused.  So a Program needs no way back from JSON.  Weights are
//! compared with their hash when they are read; all else before [`Executable::open`] returns.
//!
//! Deliberately absent: signatures.  The hashes tell damage, not malice; a file that was forged whole is as safe to load as
//! any graph in text form.  Its kernels' code is not made again: run on a GPU, a forged file runs what its author wrote.

mod error;
mod read;
mod write;

pub use error::ExecutableError;
pub use read::{Executable, KernelInfo};
pub use write::{Contents, Written, write};

use rambac_codegen::cuda::{Arch, GpuProgram, Target, emit};
use rambac_codegen::{Kernels, Program, lower, lower_for};
use rambac_ir::{DType, Graph, text};
use rambac_passes::{Options, optimise};
use rayon::prelude::*;
use std::sync::Arc;

/// Of the file's form.
pub const VERSION: u32 = 1;

/// What an executable is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// One part, `step`: loss, gradients, clipping, AdamW.
    Train,
    /// The parts of a [`Session`](crate::Session): reading a text and writing on.
    Infer,
    /// One part, `graph`: a graph as it was written.
    Graph,
}

impl Mode {
    const ALL: [Mode; 3] = [Mode::Train, Mode::Infer, Mode::Graph];

    pub fn name(self) -> &'static str {
        match self {
            Mode::Train => "train",
            Mode::Infer => "infer",
            Mode::Graph => "graph",
        }
    }
    fn from_name(s: &str) -> Option<Mode> {
        Mode::ALL.into_iter().find(|m| m.name() == s)
    }
    /// Whether parts of these names, in this order, are what it needs.
    fn takes(self, parts: &[&str]) -> bool {
        match self {
            Mode::Train => parts == ["step"],
            Mode::Graph => parts == ["graph"],
            Mode::Infer => parts == ["lower", "head"] || parts == ["lower", "chunks", "upper", "upper_flash", "head"],
        }
    }
}

/// A graph and what it was compiled to.
#[derive(Clone, Debug)]
pub struct Part {
    pub name: String,
    /// The graph before the passes, as text.
    pub before: String,
    /// The graph after the passes, as text; and after those for GPUs, if there is a target that wants another.
    pub after: String,
    pub after_gpu: Option<String>,
    pub program: Arc<Program>,
    /// One per GPU target, in their order.
    pub gpu: Vec<Arc<GpuProgram>>,
}

impl Part {
    /// Runs the passes and lowers.
    ///
    /// # Errors
    /// A step that can't run on one of the targets.
    pub fn compile(name: &str, graph: &Graph, options: &Options, targets: &[Arch]) -> Result<Part, ExecutableError> {
        let passed = |o: &Options| text::print(&optimise(graph, o));
        let on_gpu = Some(options.on_gpu()).filter(|o| !targets.is_empty() && o.precision != options.precision);
        let (before, (after, after_gpu)) =
            rayon::join(|| text::print(graph), || rayon::join(|| passed(options), || on_gpu.as_ref().map(passed)));
        let after_gpu = after_gpu.filter(|g| *g != after);
        // From the text, as the reader will.
        let parse = |t: &String| text::parse(t).map_err(|e| ExecutableError::unprintable(name, &e));
        let (graph, gpu) = (parse(&after)?, after_gpu.as_ref().map(parse).transpose()?);
        Part::lowered(name, before, (after, &graph), after_gpu.zip(gpu.as_ref()), targets)
    }

    /// Of graphs after the passes, as texts and read; the second is that of GPUs if theirs is another.
    fn lowered(
        name: &str,
        before: String,
        (after, graph): (String, &Graph),
        gpu: Option<(String, &Graph)>,
        targets: &[Arch],
    ) -> Result<Part, ExecutableError> {
        let (after_gpu, gpu_graph) = gpu.map_or((None, graph), |(text, g)| (Some(text), g));
        // The GPUs' program has other copies, and is lowered once for all of them.  Where the upper half of a model's inference
        // runs on a GPU, its memory lies in pages.
        let gpus = || {
            let lowered = || {
                let pages =
                    (name == "upper").then(|| crate::session::upper_half(gpu_graph, DType::BF16).ok()).flatten();
                pages.unwrap_or_else(|| lower_for(gpu_graph, Kernels::Gpu))
            };
            let program = (!targets.is_empty()).then(|| Arc::new(lowered()));
            let one = |a: &Arch| Ok(Arc::new(emit(program.clone().expect("BUG: there is a target"), Target::of(*a))?));
            targets.par_iter().map(one).collect::<Result<Vec<_>, ExecutableError>>()
        };
        let (program, gpu) = rayon::join(|| Arc::new(lower(graph)), gpus);
        Ok(Part { name: name.into(), before, after, after_gpu, program, gpu: gpu? })
    }
}

fn ptx_name(kernel: &str, arch: Arch) -> String {
    format!("kernel.{kernel}.{arch}.ptx")
}

fn cubin_name(kernel: &str, arch: Arch) -> String {
    format!("kernel.{kernel}.{arch}.cubin")
}

/// The tensor that holds the model's tokenizer.
const TOKENIZER: &str = "tokenizer.json";

/// What stands before the digits of the hash in every header.
const HASH_AT: &[u8] = b"{\"__metadata__\":{\"hash\":\"";

/// Digits of a hash.
const DIGITS: usize = 64;

/// The hash of a header whose own hash lies at its place.
fn header_hash(header: &[u8]) -> Option<String> {
    let at = 8 + HASH_AT.len();
    if header.get(8..at)? != HASH_AT || header.len() < at + DIGITS {
        return None;
    }
    let mut p = rambac_codegen::hash::Pieces::default();
    p.add(&header[..at]).add(&[b'0'; DIGITS]).add(&header[at + DIGITS..]);
    Some(p.finish())
}
