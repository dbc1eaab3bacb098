//! Arguments of the verbs that show things.

use super::{AttentionArgs, GpuTarget, binding, positive, size};
use crate::curves::Axis;
use clap::{Args, ValueEnum};
use std::path::PathBuf;

#[derive(Args)]
pub struct Plot {
    /// Training runs, or their metrics.jsonl; several are drawn into the same pictures
    #[arg(required = true)]
    pub runs: Vec<PathBuf>,
    /// File to write: .svg or .png
    #[arg(long, short, value_name = "FILE", default_value = "curves.svg")]
    pub out: PathBuf,
    /// Only these curves: loss, validation_loss, accuracy, lr, grad_norm, tokens_per_s
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    pub only: Vec<String>,
    /// What stands below the curves
    #[arg(long, value_enum, default_value_t = Axis::Tokens)]
    pub axis: Axis,
    /// Steps over which the strong line is a mean; 1 draws what was measured
    #[arg(long, default_value_t = 20)]
    pub smooth: usize,
    /// Loss on a logarithmic axis
    #[arg(long)]
    pub log: bool,
}

/// What colours show.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq, Debug)]
pub enum Colours {
    /// The kind of op
    Family,
    Flops,
    Bytes,
    /// Predicted from FLOPs and bytes
    Time,
    /// Of results
    Memory,
}

#[derive(Args, Clone, Debug)]
pub struct View {
    /// A preset, a folder with config.json, a config, an .ir file, a built-in variant, or what `compile` made
    #[arg(value_name = "MODEL|EXECUTABLE")]
    pub model: String,
    #[command(flatten)]
    pub attention: AttentionArgs,
    /// The whole training step, with gradients, in place of the loss alone
    #[arg(long)]
    pub train: bool,
    /// Which part of an executable [default: the largest]
    #[arg(long, value_name = "NAME")]
    pub part: Option<String>,
    /// Value of the symbol L: tokens of a sequence
    #[arg(long, value_parser = size, default_value = "4096")]
    pub len: usize,
    /// Value of the symbol N: sequences
    #[arg(long, default_value_t = 1, value_parser = positive())]
    pub batch: usize,
    /// Values of any symbols
    #[arg(long, value_name = "N=1,L=4096,…", value_delimiter = ',', value_parser = binding)]
    pub dims: Vec<(String, usize)>,
    /// The graph after this pass [default: the last]; "as written" before all
    #[arg(long, value_name = "NAME")]
    pub pass: Option<String>,
    /// The graph before the pass, with what it takes away marked, in place of the graph after it
    #[arg(long)]
    pub before: bool,
    /// What the colours show
    #[arg(long, value_enum, default_value_t = Colours::Family)]
    pub colour: Colours,
    /// Open every layer
    #[arg(long)]
    pub open: bool,
    /// The GPU whose kernels are shown
    #[arg(long, value_name = "ARCH")]
    pub target: Option<GpuTarget>,
    /// Write a picture in place of opening the window: .svg, .png or .dot
    #[arg(long, value_name = "FILE")]
    pub export: Option<PathBuf>,
    /// Export the memory plan in place of the graph: .svg or .png
    #[arg(long, requires = "export")]
    pub memory: bool,
}

#[derive(Args)]
pub struct Attend {
    /// A training run, a checkpoint, or a folder with config.json and weights
    pub checkpoint: String,
    /// The text that is read
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// The page to write
    #[arg(long, value_name = "OUT", default_value = "attend.html")]
    pub html: PathBuf,
    /// A part of the text: how do its chunks rank for the last token?
    #[arg(long, value_name = "TEXT")]
    pub needle: Option<String>,
    /// Tokens of a text at most
    #[arg(long, value_name = "TOKENS", value_parser = size, default_value = "32K")]
    pub most: usize,
}

#[derive(Args)]
pub struct Report {
    /// A training run
    pub run: PathBuf,
    /// The page to write [default: report.html in the run's folder]
    #[arg(long, short, value_name = "FILE")]
    pub out: Option<PathBuf>,
}
