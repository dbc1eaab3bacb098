//! The workbench for attention that selects: what `try` and `compare` ask of a variant, learn of it and show.

pub mod checks;
pub mod cost;
pub mod gate;
pub mod learn;
pub mod page;

use crate::error::{Result, findings};
use miette::miette;
use rambac_ir::Graph;
use rambac_models::variants::{self, Fragment, Sizes};
use rambac_models::{Attention, Config};
use std::path::{Path, PathBuf};

/// A variant under examination.
pub struct Subject {
    /// Its file's, without the ending; of a built-in one its own.
    pub name: String,
    /// Its file; of a built-in one a name that stands for it in messages.
    pub path: PathBuf,
    pub built_in: bool,
    pub text: String,
    pub fragment: Fragment,
    /// Texts have a multiple of so many tokens.
    pub unit: usize,
}

impl Subject {
    /// A file, or a built-in variant by its name; `values` replace consts of the text.
    ///
    /// # Errors
    /// Neither; everything wrong with the text.
    pub fn open(name: &str, values: &[(String, f64)]) -> Result<Self> {
        let path = Path::new(name);
        let (path, text, built_in) = match (path.is_file(), variants::built_in(name)) {
            (true, _) => {
                (path.to_path_buf(), std::fs::read_to_string(path).map_err(|e| miette!("{name}: {e}"))?, false)
            }
            (false, Some(v)) => (format!("{name}.ir (built in)").into(), v.text.to_string(), true),
            (false, None) => {
                let known: Vec<&str> = variants::BUILT_IN.iter().map(|v| v.name).collect();
                return Err(miette!(
                    help = format!("built in are: {}; `rambac new NAME` writes a file to start from", known.join(", ")),
                    "{name}: no such file, and no built-in variant of that name"
                ));
            }
        };
        let values: Vec<(&str, f64)> = values.iter().map(|(n, v)| (n.as_str(), *v)).collect();
        let fragment = Fragment::read(&text, &values).map_err(|e| findings(&path, &text, e))?;
        let unit = unit(&fragment.graph);
        let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned());
        let name = stem.filter(|_| !built_in).unwrap_or_else(|| fragment.graph.name.clone());
        Ok(Self { name, path, built_in, text, fragment, unit })
    }

    /// Where its report goes: beside its file.
    pub fn report(&self) -> PathBuf {
        if self.built_in { format!("{}.html", self.name).into() } else { self.path.with_extension("html") }
    }

    /// The sizes of its text.
    pub fn sizes(&self) -> Sizes {
        sizes(&self.fragment)
    }

    /// Tokens of the texts that checks run on.
    pub fn check_len(&self) -> usize {
        check_len(self.unit)
    }

    /// A small model around it: one block, the variant, one block.
    ///
    /// # Errors
    /// Sizes of the text that no model has.
    pub fn model(&self, transformer: bool) -> Result<Config> {
        let s = self.sizes();
        let config = Config {
            hidden_size: s.width,
            num_attention_heads: s.heads,
            num_key_value_heads: s.heads,
            num_kv_heads: s.kv_heads,
            retrieval_dim: s.kv_heads * 16,
            chunk_size: s.chunk,
            chunk_topk: s.k,
            num_lower_layers: 1,
            num_upper_layers: 1,
            encoder_layers: 0,
            window_size: 32,
            transformer,
            attention: Some(Attention { name: self.name.clone(), text: self.baked().into() }),
            ..Config::default()
        };
        if s.width != s.heads * s.dim {
            return Err(miette!(
                help = "make width = heads*dim in its const line, or pass --no-train",
                "{}: heads * dim = {} must equal width = {} for a model around it",
                self.path.display(),
                s.heads * s.dim,
                s.width
            ));
        }
        config.validate(&self.path.display().to_string()).map_err(crate::error::wrap)?;
        Ok(config)
    }

    /// The text with the values that were given on the command line.
    fn baked(&self) -> String {
        let Ok((_, own)) = rambac_ir::text::parse_with(&self.text, &[]) else { return self.text.clone() };
        let differs = own.iter().zip(&self.fragment.consts).any(|(a, b)| a != b);
        if !differs {
            return self.text.clone();
        }
        // All consts in one line, in the place of the first.
        let all: Vec<String> = self.fragment.consts.iter().map(|(n, v)| format!("{n} = {v}")).collect();
        let mut first = true;
        let line = |l: &str| {
            if !l.trim_start().starts_with("const ") {
                return l.to_string();
            }
            let was = std::mem::replace(&mut first, false);
            if was { format!("  const {}", all.join(", ")) } else { String::new() }
        };
        self.text.lines().map(line).collect::<Vec<_>>().join("\n") + "\n"
    }
}

/// The sizes that a text has by its consts, or what stands for them.
fn sizes(f: &Fragment) -> Sizes {
    let size = |name: &str, default: usize| f.constant(name).map_or(default, |v| v as usize);
    let (heads, dim) = (size("heads", 4), size("dim", 16));
    Sizes {
        heads,
        kv_heads: size("kv_heads", heads),
        dim,
        width: size("width", heads * dim),
        chunk: size("chunk", 16),
        k: size("k", 4),
    }
}

/// Tokens of a text to check on: four units, and no fewer than 32.
fn check_len(unit: usize) -> usize {
    unit * 32usize.div_ceil(unit).max(4)
}

/// What the length of a text must be a multiple of.
fn unit(g: &Graph) -> usize {
    let dims = g.nodes.iter().flat_map(|n| n.tys.iter().flat_map(|t| &t.shape));
    dims.map(|d| d.divisor() as usize).fold(1, lcm)
}

fn lcm(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    a / x.max(1) * b
}
