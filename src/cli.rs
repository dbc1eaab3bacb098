//! The command line.

use clap::{Args, Parser, Subcommand, ValueEnum};
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
    #[arg(long, global = true, default_value_t = 0)]
    pub threads: usize,
}

#[derive(Subcommand)]
pub enum Verb {
    /// Compare a device with stored values and gradients: ops and whole models
    Check(Check),
}

/// Where a program runs.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq, Debug)]
pub enum Device {
    /// Each op's definition in f64: slow, for tests
    Reference,
    /// Fused kernels on this machine's cores
    Cpu,
}

#[derive(Args)]
pub struct Check {
    /// Folder of fixtures: *.safetensors are ops, subfolders with config.json are models
    pub dir: PathBuf,
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    pub device: Device,
    /// Largest relative error ‖a-b‖/‖b‖ of values
    #[arg(long, default_value_t = 1e-5)]
    pub tolerance: f64,
    /// Largest relative error of gradients
    #[arg(long, default_value_t = 1e-4)]
    pub grad_tolerance: f64,
    /// Only fixtures whose name contains this
    #[arg(long)]
    pub only: Option<String>,
    /// One JSON object per tensor
    #[arg(long)]
    pub json: bool,
}
