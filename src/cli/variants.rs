//! Arguments of the workbench for attention that selects.

use super::size;
use crate::error::{Result, findings};
use clap::Args;
use miette::miette;
use rambac_models::variants::{Fragment, Sizes};
use rambac_models::{Attention, Config};
use std::path::{Path, PathBuf};

/// Another attention in a model's stack.
#[derive(Args, Clone, Debug, Default)]
pub struct AttentionArgs {
    /// In place of hierarchical sparse attention: a built-in variant (`rambac new --list`) or FILE.ir
    #[arg(long, value_name = "VARIANT")]
    pub attention: Option<String>,
    /// Window attention and feed-forward layers in place of Mamba-2 blocks
    #[arg(long, requires = "attention")]
    pub transformer: bool,
}

impl AttentionArgs {
    /// The file that holds a variant of one's own.
    pub fn file(&self) -> Option<&Path> {
        self.attention.as_deref().map(Path::new).filter(|p| p.is_file())
    }

    /// The configuration with what the flags say.
    ///
    /// # Errors
    /// A variant that is none, or none at the model's sizes.
    pub fn apply(&self, config: Config) -> Result<Config> {
        let Some(name) = &self.attention else { return Ok(config) };
        let attention = if let Some(path) = self.file() {
            let text = std::fs::read_to_string(path).map_err(|e| miette!("{name}: {e}"))?;
            let told = |e| findings(path, &text, e);
            let own = Fragment::read(&text, &[]).map_err(told)?;
            // Mistakes at the model's sizes have their lines too.
            Fragment::at(&text, &Sizes::of(&config), &[]).map_err(told)?;
            Attention { name: own.graph.name, text: text.into() }
        } else {
            Attention::named(name).map_err(|e| miette!("--attention: {e}"))?
        };
        let config = Config { attention: Some(attention), transformer: self.transformer, ..config };
        config.validate(&format!("--attention {name}")).map_err(crate::error::wrap)?;
        Ok(config)
    }
}

/// `k=8`
fn constant(s: &str) -> std::result::Result<(String, f64), String> {
    let (name, value) = s.split_once('=').ok_or("write it as CONST=NUMBER, such as k=8")?;
    let value = value.trim().parse().map_err(|_| format!("{value:?} is not a number"))?;
    Ok((name.trim().to_string(), value))
}

/// How variants are tried.
#[derive(Args, Clone, Debug)]
pub struct TryArgs {
    /// Checks and costs alone
    #[arg(long)]
    pub no_train: bool,
    /// Other values for consts of the text
    #[arg(long, value_name = "CONST=NUMBER", value_delimiter = ',', value_parser = constant)]
    pub set: Vec<(String, f64)>,
    /// Tokens to train on; results depend on this and the seed alone, unless --seconds cuts them short
    #[arg(long, value_parser = tokens, default_value = "1200K")]
    pub tokens: u64,
    /// Training ends after this many seconds
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: u64,
    /// Longest rows of the training
    #[arg(long, value_parser = size, default_value = "256")]
    pub len: usize,
    /// Peak learning rate
    #[arg(long, default_value_t = 6e-3)]
    pub lr: f64,
    /// Window attention and feed-forward layers around it in place of Mamba-2 blocks
    #[arg(long)]
    pub transformer: bool,
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Where the report goes [default: beside the file, FILE.html; compare.html]
    #[arg(long, value_name = "FILE.html")]
    pub out: Option<PathBuf>,
}

/// `1200K`
fn tokens(s: &str) -> std::result::Result<u64, String> {
    size(s).map(|n| n as u64)
}

#[derive(Args)]
pub struct Attempt {
    /// FILE.ir, or a built-in variant (`rambac new --list`)
    pub variant: String,
    #[command(flatten)]
    pub how: TryArgs,
}

#[derive(Args)]
pub struct Compare {
    /// Files or built-in variants
    #[arg(required = true, num_args = 1..)]
    pub variants: Vec<String>,
    #[command(flatten)]
    pub how: TryArgs,
}

#[derive(Args)]
pub struct New {
    /// Its name: NAME.ir is written here
    pub name: Option<String>,
    /// The built-in variant to start from
    #[arg(long, default_value = "moba")]
    pub from: String,
    /// What is built in
    #[arg(long, conflicts_with = "name")]
    pub list: bool,
}
