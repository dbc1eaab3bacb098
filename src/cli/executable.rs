//! Arguments about executables: making, running, what is kept of them.

use super::{AttentionArgs, Data, MemoryArgs, PrecisionArg, Weights, binding, length, positive, size};
use crate::device::On;
use clap::{Args, ValueEnum};
use rambac_codegen::cuda::Arch;
use std::path::PathBuf;

/// What code is made for.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq, Debug)]
pub enum Target {
    /// This machine's kind: needs no code in the file, and is always in it
    Cpu,
    /// A100 and everything after it
    #[value(name = "sm_80")]
    Sm80,
    /// H100 and H200 alone
    #[value(name = "sm_90a")]
    Sm90a,
}

/// A GPU's instruction set.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq, Debug)]
pub enum GpuTarget {
    /// A100 and everything after it
    #[value(name = "sm_80")]
    Sm80,
    /// H100 and H200 alone
    #[value(name = "sm_90a")]
    Sm90a,
}

impl Target {
    /// `None` for the CPU.
    pub fn arch(self) -> Option<Arch> {
        match self {
            Target::Cpu => None,
            Target::Sm80 => Some(Arch::Sm80),
            Target::Sm90a => Some(Arch::Sm90a),
        }
    }
}

impl GpuTarget {
    pub fn arch(self) -> Arch {
        match self {
            GpuTarget::Sm80 => Arch::Sm80,
            GpuTarget::Sm90a => Arch::Sm90a,
        }
    }
}

#[derive(Args)]
pub struct Compile {
    /// A preset, a folder with config.json (and weights), a training run, a config, or an .ir file
    pub model: String,
    #[command(flatten)]
    pub attention: AttentionArgs,
    /// Compile even an attention of which `rambac try` says that it sees the future, mixes sequences or gives NaN
    #[arg(long, requires = "attention")]
    pub anyway: bool,
    /// Inference with an attention variant: tokens that there is room for, prompt and answer together, for what it keeps of a
    /// text has its place in the file's programs; other models read any text
    #[arg(long, value_name = "TOKENS", value_parser = size, default_value = "4096", conflicts_with = "train")]
    pub context: usize,
    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    pub out: PathBuf,
    /// What to make code for
    #[arg(long, value_name = "ARCH,…", value_delimiter = ',', default_value = "cpu")]
    pub target: Vec<Target>,
    /// For reading texts and writing on (the default for models): one set of programs serves both, as none depends on a
    /// text's length
    #[arg(long, visible_aliases = ["prefill", "decode"], conflicts_with = "train")]
    pub infer: bool,
    /// For training: loss, gradients, clipping and AdamW as one program
    #[arg(long)]
    pub train: bool,
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// Tokens per row at which --memory-limit must hold; any length runs
    #[arg(long, value_parser = size, default_value = "4096", requires = "memory_limit")]
    pub len: usize,
    /// Rows per step at which --memory-limit must hold; any number runs
    #[arg(long, default_value_t = 1, value_parser = positive(), requires = "memory_limit")]
    pub batch: usize,
    /// What activations are kept in; bf16 needs a GPU target
    #[arg(long, value_enum, default_value_t = PrecisionArg::F32, requires = "train")]
    pub precision: PrecisionArg,
    /// Peak learning rate
    #[arg(long, requires = "train", default_value_t = 1e-3)]
    pub lr: f64,
    /// Steps of the learning rate's schedule
    #[arg(long, requires = "train", default_value_t = 1000)]
    pub steps: u64,
    /// How the weights lie in memory
    #[arg(long, value_enum, default_value_t = Weights::F32, conflicts_with = "train")]
    pub weights: Weights,
    /// Leave the weights out: `run` then draws fresh ones
    #[arg(long, conflicts_with = "init")]
    pub no_weights: bool,
    /// Put fresh weights in, drawn from this seed
    #[arg(long, value_name = "SEED")]
    pub init: Option<u64>,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct Run {
    /// A file made by `rambac compile`
    pub file: PathBuf,
    /// cpu; cuda:0, cuda:1, …: a GPU; simulator: the GPU kernels in the file, instruction by instruction and watched, for
    /// small sizes
    #[arg(long, value_name = "DEVICE", default_value_t)]
    pub device: On,
    /// Inference: what a GPU may hold of weights, activations and chunks [default: most of what is free]
    #[arg(long, value_name = "SIZE", value_parser = super::bytes)]
    pub device_memory: Option<usize>,
    /// Which of the file's GPU programs runs [default: the best for the device, of the simulator the first]
    #[arg(long, value_name = "ARCH")]
    pub target: Option<GpuTarget>,
    /// Training: steps to run; graphs: runs
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: u64,
    /// Training: what the rows hold
    #[arg(long, value_enum, default_value_t = Data::Passkey)]
    pub task: Data,
    /// Training: tokens per row; graphs: the symbol L
    #[arg(long, value_parser = size, default_value = "256")]
    pub len: usize,
    /// Training: rows per step; graphs: the symbol N
    #[arg(long, default_value_t = 1, value_parser = positive())]
    pub batch: usize,
    /// Graphs: values of any symbols
    #[arg(long, value_name = "N=1,L=4096,…", value_delimiter = ',', value_parser = binding)]
    pub dims: Vec<(String, usize)>,
    /// Graphs: a safetensors file with inputs by name; those it lacks are drawn, whole numbers are 0
    #[arg(long, value_name = "FILE")]
    pub inputs: Option<PathBuf>,
    /// Inference: the text to go on from; several are written on together
    #[arg(long, conflicts_with = "ids")]
    pub prompt: Vec<String>,
    /// Inference: token ids to go on from; ids are written too
    #[arg(long, value_name = "1,2,3", value_delimiter = ',')]
    pub ids: Vec<i32>,
    /// Inference: tokens to write
    #[arg(long, default_value_t = 64)]
    pub tokens: usize,
    /// Inference: 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f64,
    /// Inference: tokens of the prompt that are fed at once
    #[arg(long, default_value_t = 1024, value_parser = positive())]
    pub segment: usize,
    /// Of everything that is drawn
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Write the steps as a trace for Perfetto (ui.perfetto.dev): of training and graphs all runs, of inference on a device the
    /// first 512 of parts
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    /// Write the trained weights, or the graph's outputs, to a safetensors file
    #[arg(long, value_name = "FILE")]
    pub save: Option<PathBuf>,
    /// One JSON object per step, or per output of a graph
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct Tune {
    /// Preset, folder, training run, config.json or .ir file
    pub model: String,
    #[command(flatten)]
    pub attention: AttentionArgs,
    /// GPU to measure on
    #[arg(long, default_value = "cuda:0")]
    pub device: On,
    /// The training step in place of the loss
    #[arg(long)]
    pub train: bool,
    /// Sequences (the symbol N)
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub batch: usize,
    /// Tokens of a sequence (the symbol L)
    #[arg(long, default_value = "4096", value_name = "L", value_parser = length)]
    pub len: usize,
    /// What activations are kept in
    #[arg(long, value_enum, default_value_t = PrecisionArg::F32)]
    pub precision: PrecisionArg,
    /// Only steps of this op, such as chunk_attention
    #[arg(long)]
    pub op: Option<String>,
    /// One JSON object per step
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct Kernels {
    /// File to write [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Compiles nothing: status 1 if this file is not what would be written now
    #[arg(long, value_name = "FILE", conflicts_with = "out")]
    pub check: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum, PartialEq, Eq, Debug)]
pub enum CacheTask {
    /// Every kernel with its registers and spills
    List,
    /// Read everything and compare it with what was written; status 1 if something is damaged
    Verify,
    /// Remove all entries
    Clear,
}

#[derive(Args)]
pub struct Cache {
    #[arg(value_enum)]
    pub task: CacheTask,
    /// One JSON object per kernel
    #[arg(long)]
    pub json: bool,
}
