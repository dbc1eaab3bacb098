//! The command line.

mod executable;
mod see;
mod variants;

pub use executable::{Cache, CacheTask, Compile, GpuTarget, Kernels, Run, Tune};
pub use see::{Attend, Colours, Plot, Report, View};
pub use variants::{Attempt, AttentionArgs, Compare, New, TryArgs};

use crate::device::On;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use rambac_codegen::Memory;
use rambac_ir::Bindings;
use std::path::PathBuf;

/// An ML compiler and executor for state-space and sparse-attention sequence models.
///
/// MODEL is a preset (tiny, small, mamba2-130m, 370m, 3b), a folder with config.json and weights, a training run, a
/// config.json, or where it says so an .ir file.
#[derive(Parser)]
#[command(name = "rambac", version, propagate_version = true, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    pub verb: Verb,
    /// Threads; 0 is one per core.  Results do not depend on it.
    #[arg(long, global = true, default_value_t = 0, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(0..=1024))]
    pub threads: usize,
}

#[derive(Subcommand)]
pub enum Verb {
    /// Train a small RAMba on passkey here and now, evaluate it far beyond its training length, save it
    Demo(Demo),
    /// Train a model on passkey, copying, or any text
    Train(Train),
    /// Draw the curves of training runs: loss, accuracy, learning rate, gradient norm, tokens/s
    Plot(Plot),
    /// Make one page about a training run: curves, evaluations, cost, memory, settings, machine
    Report(Report),
    /// Make a page that shows which chunks the tokens of a text choose, by layer and head
    Attend(Attend),
    /// Evaluate a checkpoint on long contexts
    Eval(Eval),
    /// Write on from a prompt
    Generate(Generate),
    /// Compile a model or a graph into one file that runs: programs, GPU kernels, weights
    Compile(Compile),
    /// Run what `compile` made
    Run(Run),
    /// What compiling does to a model: passes, fusion, work, memory
    Explain(Explain),
    /// Is a variant of attention right, what does it cost, does it learn?  In a minute
    #[command(name = "try")]
    Try(Attempt),
    /// Several variants side by side, under the same budget
    Compare(Compare),
    /// Write a variant of attention to start from
    New(New),
    /// Show a model's graph in a window, or as a picture: layers, passes, work, memory, kernels
    View(View),
    /// How fast a training step, a forward or one op runs here
    Bench(Bench),
    /// What is in an executable, a checkpoint, a model's folder or a safetensors file
    Inspect(Inspect),
    /// Measure the ways in which a model's steps can run on a GPU, and keep what is fastest
    Tune(Tune),
    /// Compiled GPU kernels and measured choices that are kept between runs
    Cache(Cache),
    /// The table of all GPU kernels of the presets, as docs/kernels.md holds it
    #[command(hide = true)]
    Kernels(Kernels),
    /// What this machine has and whether all is well
    Doctor(Doctor),
    /// Compare a device with stored values and gradients: ops and whole models
    Check(Check),
    /// Run a CUDA kernel given as PTX on the CPU and say what it does wrong and what it moves
    #[command(after_help = "\
A kernel of your own, y = a·x + y of 1000 numbers:
  nvcc --ptx -lineinfo saxpy.cu
  rambac simulate saxpy.ptx --grid 8 --block 128 --arg y=f32[1000]:iota:rw --arg x=f32[1000]:random \\
      --arg a=f32:2 --arg n=i32:1000 --report

Each buffer lies by itself, so an index that leaves it is found, and so are reads of what nothing wrote, races, copies
that are not waited for and barriers that not all threads come to. The status is 1 if anything was found. With -lineinfo
findings name lines of the source.")]
    Simulate(Simulate),
}

/// The command line of this process.  Numbers below zero reach their flag, whose own message says what is wanted, instead of
/// looking like flags themselves.
pub fn parse() -> Cli {
    let matches = with_negative_numbers(Cli::command()).get_matches();
    Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit())
}

fn with_negative_numbers(c: clap::Command) -> clap::Command {
    let c = c.mut_args(|a| {
        if a.get_action().takes_values() && !a.is_positional() { a.allow_negative_numbers(true) } else { a }
    });
    let verbs: Vec<String> = c.get_subcommands().map(|s| s.get_name().to_string()).collect();
    verbs.into_iter().fold(c, |c, verb| c.mut_subcommand(verb, with_negative_numbers))
}

impl Verb {
    /// Whether it leaves something behind that is worth more than what it prints.
    pub fn outlives_reader(&self) -> bool {
        match self {
            Verb::Train(_) | Verb::Demo(_) => true,
            Verb::Generate(a) => a.resume_store.is_some() || a.chunks.store != "ram",
            _ => false,
        }
    }
}

#[derive(Args)]
pub struct Check {
    /// Folder of fixtures: *.safetensors are ops, subfolders with config.json are models
    pub dir: PathBuf,
    /// cpu; reference: each op's definition in f64; simulator: GPU kernels, instruction by instruction and watched; cuda:0,
    /// cuda:1, …: a GPU
    #[arg(long, value_name = "DEVICE", default_value_t)]
    pub device: On,
    /// What activations are kept in; bf16 is for GPUs, and compared with the ops' definitions on values rounded alike
    #[arg(long, value_enum, default_value_t = PrecisionArg::F32)]
    pub precision: PrecisionArg,
    /// Largest relative error ‖a-b‖/‖b‖ of values [default: 1e-5; in bf16 0.01, of models 0.06]
    #[arg(long)]
    pub tolerance: Option<f64>,
    /// Largest relative error of gradients [default: 1e-4; in bf16 0.03, of models 0.2]
    #[arg(long)]
    pub grad_tolerance: Option<f64>,
    /// Only fixtures whose name contains this
    #[arg(long)]
    pub only: Option<String>,
    /// One JSON object per tensor
    #[arg(long)]
    pub json: bool,
}

/// `4`, `4,2`, `4,2,1`
fn triple(s: &str) -> Result<[u32; 3], String> {
    let all: Vec<u32> = s.split([',', 'x']).map(str::parse).collect::<Result<_, _>>().map_err(|e| format!("{e}"))?;
    match all[..] {
        [x] => Ok([x, 1, 1]),
        [x, y] => Ok([x, y, 1]),
        [x, y, z] => Ok([x, y, z]),
        _ => Err("up to three numbers are expected, as in 4,2,1".into()),
    }
}

#[derive(Args)]
pub struct Simulate {
    /// PTX, as NVRTC or nvcc --ptx writes it
    #[arg(value_name = "FILE.ptx")]
    pub ptx: PathBuf,
    /// Which kernel [default: the only one]
    #[arg(long)]
    pub kernel: Option<String>,
    /// Blocks, e.g. 4 or 4,2,1
    #[arg(long, value_parser = triple, default_value = "1")]
    pub grid: [u32; 3],
    /// Threads of a block
    #[arg(long, value_parser = triple, default_value = "32")]
    pub block: [u32; 3],
    /// Blocks of a cluster
    #[arg(long, value_parser = triple, default_value = "1")]
    pub cluster: [u32; 3],
    /// Bytes of dynamic shared memory
    #[arg(long, default_value_t = 0)]
    pub shared: u32,
    /// The kernel's arguments, in order.
    #[arg(
        long = "arg",
        value_name = "SPEC",
        help = "An argument, in order: y=f32[1024] is written, x=f32[1024]:iota is read, z=f32[64]:zero:rw is both, \
                n=i32:1024 is a number; contents are zero, iota, random, a number, @FILE"
    )]
    pub args: Vec<String>,
    /// Write a buffer's bytes after the first run
    #[arg(long, value_name = "NAME=FILE")]
    pub save: Vec<String>,
    /// First schedule; 0 is in order, others mix warps, lanes and blocks
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Run under so many schedules; every second makes asynchronous copies as late as may be
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    pub schedules: u64,
    /// Show instructions, traffic and conflicts
    #[arg(long)]
    pub report: bool,
    /// Instructions of warps after which a block is stopped
    #[arg(long, default_value_t = 1 << 30)]
    pub limit: u64,
    /// One JSON object per finding and run
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct Demo {
    /// Where to save [default: runs/demo, or the next free name]
    #[arg(long)]
    pub out: Option<PathBuf>,
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Stop training after this many minutes
    #[arg(long, default_value_t = 6)]
    pub minutes: u64,
    #[command(flatten)]
    pub place: TrainPlace,
}

/// Data that needs no file.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq, Debug)]
pub enum Data {
    /// A number hidden in filler, asked for at the end
    Passkey,
    /// Random strings that repeat
    Copy,
    /// Keys with values, many asked for again
    Recall,
}

#[derive(Args)]
pub struct Train {
    /// What to train: a preset, a config, or a folder with weights to start from
    pub model: Option<String>,
    #[command(flatten)]
    pub attention: AttentionArgs,
    /// Train even an attention of which `rambac try` says that it sees the future, mixes sequences or gives NaN
    #[arg(long, requires = "attention")]
    pub anyway: bool,
    /// Generated data
    #[arg(long, value_enum, default_value_t = Data::Passkey)]
    pub task: Data,
    /// Train on this text file instead
    #[arg(long, value_name = "FILE", conflicts_with = "task")]
    pub data: Option<PathBuf>,
    /// tokenizer.json for --data [default: bytes]
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// The demo's recipe: copying first, then passkeys at growing lengths (for chunk size 16)
    #[arg(long, conflicts_with_all = ["task", "data", "len", "batch", "steps", "warmup", "lr_floor"])]
    pub curriculum: bool,
    /// Tokens per row, e.g. 1024 or 4K
    #[arg(long, value_parser = size, default_value = "1024")]
    pub len: usize,
    /// Rows per step
    #[arg(long, default_value_t = 4)]
    pub batch: usize,
    /// Micro-batches per step: gradients of this many batches are added up
    #[arg(long, default_value_t = 1)]
    pub accumulate: usize,
    #[arg(long, default_value_t = 1000)]
    pub steps: u64,
    /// Peak learning rate [default: 1e-3]
    #[arg(long)]
    pub lr: Option<f64>,
    /// Final learning rate as a part of the peak
    #[arg(long, default_value_t = 0.1)]
    pub lr_floor: f64,
    #[arg(long, default_value_t = 100)]
    pub warmup: u64,
    #[arg(long, default_value_t = 0.1)]
    pub weight_decay: f64,
    /// Largest gradient norm; 0: no clipping
    #[arg(long, default_value_t = 1.0)]
    pub clip: f64,
    /// Draw fresh weights from N(0, 1/sqrt(fan in)); better for small models
    #[arg(long)]
    pub fan_in: bool,
    /// Share of rows that go on from the scan states of the step before
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub state_passing: f64,
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// Folder for checkpoints, metrics.jsonl and TensorBoard's files; DIR/latest is always the newest whole checkpoint
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Steps between checkpoints; 0: only at the end
    #[arg(long, value_name = "N", default_value_t = 500)]
    pub save_every: u64,
    /// Go on with a run, bit for bit; all settings come from its checkpoint
    #[arg(long, value_name = "DIR", conflicts_with_all = [
        "model", "attention", "transformer", "task", "data", "tokenizer", "curriculum", "len", "batch", "accumulate", "steps", "lr", "lr_floor", "warmup",
        "weight_decay", "clip", "fan_in", "state_passing", "recompute", "memory_limit", "seed",
    ])]
    pub resume: Option<PathBuf>,
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    #[command(flatten)]
    pub place: TrainPlace,
    /// One JSON object per step on standard output instead of a progress bar
    #[arg(long)]
    pub json: bool,
    /// A dashboard in the terminal: the curve, throughput, memory, time left
    #[arg(long, conflicts_with = "json")]
    pub tui: bool,
    /// Write the first steps as a trace for Perfetto (ui.perfetto.dev): every op with its time, FLOPs and bytes
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    /// Steps in the trace
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..), requires = "profile")]
    pub profile_steps: u64,
}

/// Where training runs, and in what.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct TrainPlace {
    /// cpu; simulator: GPU kernels on this machine's cores, watched, for the smallest sizes; cuda:0, cuda:1, …: a GPU.  A run
    /// may go on on another device
    #[arg(long, value_name = "DEVICE", default_value_t)]
    pub device: On,
    /// What activations are kept in; bf16 is for GPUs [default: f32, or what a resumed run had]
    #[arg(long, value_enum)]
    pub precision: Option<PrecisionArg>,
}

/// How much memory a training step may take.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct MemoryArgs {
    /// Compute all activations again in the backward instead of keeping them: least memory, more time
    #[arg(long)]
    pub recompute: bool,
    /// Plan no more memory than this, e.g. 2GiB or 800M, computing as little again as that takes; the process itself takes
    /// about 15 MiB more
    #[arg(long, value_name = "SIZE", value_parser = bytes, conflicts_with = "recompute")]
    pub memory_limit: Option<usize>,
}

impl MemoryArgs {
    /// What the flags ask for, at each of these dims.
    pub fn choice(self, dims: Vec<Bindings>) -> Memory {
        match (self.memory_limit, self.recompute) {
            (Some(limit), _) => Memory::Within { limit, dims },
            (None, true) => Memory::Recompute,
            (None, false) => Memory::Keep,
        }
    }
}

#[derive(Clone, Copy, ValueEnum, PartialEq, Eq, Debug)]
pub enum EvalTask {
    Passkey,
}

/// Where and how the chunks of a context are stored.
#[derive(Args, Clone, Debug)]
pub struct Chunks {
    /// Keep the chunks in this new file in place of memory, which then does not grow with the context
    #[arg(long, value_name = "ram|FILE", default_value = "ram")]
    pub store: String,
    /// How keys, values and landmarks are stored
    #[arg(long, value_enum, default_value_t = StorePrecision::Bf16)]
    pub store_dtype: StorePrecision,
}

/// Where inference runs.
#[derive(Args)]
pub struct Inference {
    /// cpu; cuda:0, cuda:1, …: a GPU; simulator: GPU kernels, instruction by instruction and watched, for tiny models
    #[arg(long, value_name = "DEVICE", default_value_t)]
    pub device: On,
    /// What a GPU may hold of weights, activations and chunks; chunks that have no place there are fetched when they are chosen
    /// [default: most of what is free]
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub device_memory: Option<usize>,
    /// On a device: write the first 512 runs of the model's parts as a trace for Perfetto (ui.perfetto.dev), every op with its
    /// time, FLOPs, bytes and share of what limits it
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum, PartialEq, Eq, Debug)]
pub enum StorePrecision {
    Bf16,
    F32,
}

#[derive(Args)]
pub struct Eval {
    #[arg(value_enum)]
    pub task: EvalTask,
    /// A training run, a checkpoint, or a folder with config.json and weights
    pub checkpoint: String,
    /// Context lengths, e.g. 4096,64K,1M (K = 1024)
    #[arg(long, value_delimiter = ',', value_parser = size, default_value = "1024,4096,16K")]
    pub len: Vec<usize>,
    #[arg(long, default_value_t = 20, value_parser = positive())]
    pub cases: usize,
    /// Tokens per segment of the prefill
    #[arg(long, default_value_t = 4096, value_parser = positive())]
    pub segment: usize,
    /// Leave retrieval and attention out for all but the last segments ("flash inference"): an approximation, since the
    /// upper half's recurrent states then see no attention; its cost per token does not grow with the context
    #[arg(long)]
    pub flash: bool,
    #[command(flatten)]
    pub chunks: Chunks,
    #[command(flatten)]
    pub on: Inference,
    /// Also a line per case: how far the needle's chunks were from being chosen (rank 1 is the best), their weight, the digits
    #[arg(long)]
    pub diagnose: bool,
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// How the weights lie in memory; bf16 halves it and changes results a little
    #[arg(long, value_enum, default_value_t = Weights::F32)]
    pub weights: Weights,
    /// One JSON object per length
    #[arg(long)]
    pub json: bool,
}

/// How the weights of a model lie in memory.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq, Debug)]
pub enum Weights {
    /// Single precision
    F32,
    /// Matrices and the embedding table in bf16, rounded if they are not stored so; sums stay in f32
    Bf16,
}

impl Weights {
    /// What it asks of the compiler.
    pub fn options(self) -> rambac_passes::Options {
        rambac_passes::Options { bf16_weights: self == Weights::Bf16, ..Default::default() }
    }
}

/// `4096`, `64K`, `1M`.
pub fn size(s: &str) -> Result<usize, String> {
    let (digits, unit) = match s.trim().to_ascii_uppercase() {
        t if t.ends_with('K') => (t[..t.len() - 1].to_string(), 1usize << 10),
        t if t.ends_with('M') => (t[..t.len() - 1].to_string(), 1 << 20),
        t if t.ends_with('G') => (t[..t.len() - 1].to_string(), 1 << 30),
        t => (t, 1),
    };
    let n: usize = digits.parse().map_err(|_| "a size such as 4096, 64K or 1M is wanted")?;
    n.checked_mul(unit)
        .filter(|&n| n > 0)
        .ok_or_else(|| if n == 0 { "it must be at least 1" } else { "too large" }.into())
}

/// A [`size`] that any program can be bound to.
pub fn length(s: &str) -> Result<usize, String> {
    size(s).and_then(|n| if n < 1 << 40 { Ok(n) } else { Err("too large".into()) })
}

/// `2GiB`, `800M`, `1.5 GB`: units of 1024 with or without `iB`, of 1000 with `B` alone.
pub fn bytes(s: &str) -> Result<usize, String> {
    let wanted = || "a size such as 2GiB, 800M or 1.5GB is wanted".to_string();
    let text = s.trim();
    let unit = text.find(|c: char| c.is_ascii_alphabetic()).ok_or_else(wanted)?;
    let (number, unit) = (text[..unit].trim(), text[unit..].to_ascii_lowercase());
    let number: f64 = number.parse().map_err(|_| wanted())?;
    let power = |c: char| "kmgt".find(c).map(|p| p as i32 + 1);
    let scale = match (unit.chars().next().and_then(power), unit.get(1..)) {
        (Some(p), Some("" | "ib")) => 1024f64.powi(p),
        (Some(p), Some("b")) => 1000f64.powi(p),
        (None, _) if unit == "b" => 1.0,
        _ => return Err(wanted()),
    };
    let bytes = number * scale;
    if !(1.0..9e18).contains(&bytes) {
        return Err("too large or zero".into());
    }
    Ok(bytes as usize)
}

/// What to time.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq, Debug)]
pub enum Work {
    /// A whole training step: loss, gradients, clipping, AdamW
    Train,
    /// The loss alone
    Forward,
    /// Scores of chunks, causal mask, top-k and weights; forward and backward
    Select,
    /// Attention within the selected chunks; forward and backward
    Attend,
    /// The Mamba-2 recurrence; forward and backward
    Scan,
    /// Reading a text of --len tokens: every layer, and the last token's logits
    Prefill,
    /// One token after another, after a text of --len tokens: every layer and the logits
    Decode,
}

/// A number of at least 1.
fn positive() -> clap::builder::RangedU64ValueParser<usize> {
    clap::builder::RangedU64ValueParser::new().range(1..1 << 40)
}

#[derive(Args)]
pub struct Bench {
    #[arg(value_enum, default_value_t = Work::Train)]
    pub what: Work,
    /// Model whose sizes to use: a preset, a folder with config.json, or a config
    #[arg(long, value_name = "MODEL", default_value = "small")]
    pub preset: String,
    #[command(flatten)]
    pub attention: AttentionArgs,
    /// Tokens of a sequence; decode: of the random text that is read, untimed, before the timed tokens, so that a model
    /// with chunks has that many tokens to choose from
    #[arg(long, default_value = "4096", value_parser = length)]
    pub len: usize,
    /// Sequences
    #[arg(long, default_value_t = 1, value_parser = positive())]
    pub batch: usize,
    /// Timed runs, after two that do not count
    #[arg(long, default_value_t = 5, value_parser = positive())]
    pub runs: usize,
    /// How the weights lie in memory: forward, prefill and decode
    #[arg(long, value_enum, default_value_t = Weights::F32)]
    pub weights: Weights,
    #[command(flatten)]
    pub memory: MemoryArgs,
    #[command(flatten)]
    pub place: TrainPlace,
    /// Which chunks tokens choose, in attend: each token its own, or those of a chunk the same
    #[arg(long, value_enum, default_value_t = Selections::Uniform)]
    pub selections: Selections,
    /// Also the time per kind of op; with a FILE also the last run of train or forward as a trace for Perfetto
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    pub profile: Option<Option<PathBuf>>,
    /// One JSON object per line
    #[arg(long)]
    pub json: bool,
}

/// Made-up choices of chunks.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq, Debug)]
pub enum Selections {
    Uniform,
    Clustered,
}

#[derive(Args)]
pub struct Explain {
    /// A preset, a folder with config.json, a config, or an .ir file
    pub model: String,
    #[command(flatten)]
    pub attention: AttentionArgs,
    /// Value of the symbol L: tokens of a sequence
    #[arg(long, default_value = "4096", value_parser = length)]
    pub len: usize,
    /// Value of the symbol N: sequences
    #[arg(long, default_value_t = 1, value_parser = positive())]
    pub batch: usize,
    /// Values of any symbols
    #[arg(long, value_name = "N=1,L=4096,…", value_delimiter = ',', value_parser = binding)]
    pub dims: Vec<(String, usize)>,
    /// The whole training step in place of the loss alone
    #[arg(long)]
    pub train: bool,
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// What activations are kept in; bf16 is for GPUs, and then --target is sm_90a if it is left out
    #[arg(long, value_enum, default_value_t = PrecisionArg::F32)]
    pub precision: PrecisionArg,
    /// Print the optimised graph in text form instead
    #[arg(long, conflicts_with_all = ["program", "json"])]
    pub ir: bool,
    /// Print the program's steps instead
    #[arg(long, conflicts_with = "json")]
    pub program: bool,
    /// Also how every step runs on this GPU, and why so
    #[arg(long, value_name = "ARCH")]
    pub target: Option<GpuTarget>,
    /// Compile the kernels too, to see their registers and spills
    #[arg(long, requires = "target")]
    pub compile: bool,
    /// One JSON object per line
    #[arg(long)]
    pub json: bool,
}

impl Explain {
    pub fn precision(&self) -> rambac_passes::Precision {
        self.precision.into()
    }
    /// The GPU whose kernels and memory it is about.
    pub fn gpu(&self) -> Option<rambac_codegen::cuda::Arch> {
        let bf16 = (self.precision == PrecisionArg::Bf16).then_some(GpuTarget::Sm90a);
        self.target.or(bf16).map(GpuTarget::arch)
    }
}

/// What activations and operands of products are kept in.
#[derive(Clone, Copy, Debug, Default, ValueEnum, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PrecisionArg {
    /// Everything in f32
    #[default]
    F32,
    /// Activations and products' operands in bf16; sums, states, losses, gradients and master weights in f32
    Bf16,
}

impl From<PrecisionArg> for rambac_passes::Precision {
    fn from(p: PrecisionArg) -> Self {
        match p {
            PrecisionArg::F32 => Self::F32,
            PrecisionArg::Bf16 => Self::Bf16,
        }
    }
}

/// `L=4096`
fn binding(s: &str) -> Result<(String, usize), String> {
    let (name, value) = s.split_once('=').ok_or("write it as SYMBOL=NUMBER, such as L=4096")?;
    let value = value.trim().parse().map_err(|_| format!("{value:?} is not a whole number"))?;
    Ok((name.trim().to_string(), value))
}

#[derive(Args)]
pub struct Inspect {
    /// An executable, a training run, a checkpoint, a model's folder, a config.json, or a .safetensors file
    pub path: PathBuf,
    /// Also the least, largest and mean value of every tensor, and its standard deviation
    #[arg(long)]
    pub stats: bool,
    /// One JSON object per line
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct Doctor {
    /// One JSON object per line
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(group = clap::ArgGroup::new("text").required(true).args(["prompt", "prompt_file"]))]
pub struct Generate {
    /// A training run, a checkpoint, or a model's folder with weights
    pub checkpoint: String,
    /// The text to go on from; several are written on together
    #[arg(long)]
    pub prompt: Vec<String>,
    /// A file that holds it; - is standard input
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,
    /// Tokens to write
    #[arg(long, default_value_t = 64)]
    pub tokens: usize,
    /// 0 always takes the likeliest token; 1 draws as the model predicts; more is wilder
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f64,
    /// Draw only among the K likeliest tokens
    #[arg(long, value_name = "K", value_parser = positive())]
    pub top_k: Option<usize>,
    /// Draw only among the likeliest tokens that make up this probability
    #[arg(long, value_name = "P")]
    pub top_p: Option<f64>,
    /// Same seed, same draws
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// tokenizer.json [default: the one in the folder, else bytes]
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// How the weights lie in memory; bf16 halves it, is nearly twice as fast and changes predictions a little
    #[arg(long, value_enum, default_value_t = Weights::F32)]
    pub weights: Weights,
    /// Tokens of the prompt that are fed at once
    #[arg(long, default_value_t = 1024, value_parser = positive())]
    pub segment: usize,
    /// Leave retrieval and attention out for all but the last segments of the prompt ("flash inference", an approximation)
    #[arg(long)]
    pub flash: bool,
    #[command(flatten)]
    pub chunks: Chunks,
    #[command(flatten)]
    pub on: Inference,
    /// Go on with the sequence that --store FILE left: the prompt follows what it has read and written
    #[arg(long, value_name = "FILE", conflicts_with = "store")]
    pub resume_store: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_in_bytes() {
        let same =
            [("2GiB", 2 << 30), ("2g", 2 << 30), ("800M", 800 << 20), ("1.5 GB", 1_500_000_000), ("64kib", 65536)];
        for (text, n) in same {
            assert_eq!(bytes(text), Ok(n), "{text}");
        }
        assert_eq!((bytes("17b"), bytes("1T")), (Ok(17), Ok(1 << 40)));
        for wrong in ["", "GiB", "2", "2X", "2GiBs", "-1G", "0M", "1e30G", "nanG", "2 G B", "1é"] {
            assert!(bytes(wrong).is_err(), "{wrong:?} is {:?}", bytes(wrong));
        }
    }
}
