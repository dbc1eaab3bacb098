//! `rambac new`: a variant to start from.

use crate::cli::New;
use crate::error::{Result, wrap};
use crate::show;
use miette::miette;
use rambac_models::variants::{self, BUILT_IN};
use std::path::PathBuf;
use std::process::ExitCode;

/// Runs the verb.
pub fn run(a: &New) -> Result<ExitCode> {
    if a.list {
        for v in BUILT_IN {
            println!("{:<15} {}", v.name, show::wrapped(&about(v.text), 84, &" ".repeat(16)));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let name = a.name.as_deref().ok_or_else(|| miette!("give the new variant a NAME, or --list"))?;
    let word = name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if !word {
        return Err(miette!("{name}: a name of small letters, digits and _ is wanted, such as my_attention"));
    }
    let Some(from) = variants::built_in(&a.from) else {
        // The list with the nearest name.
        let why = rambac_models::Attention::named(&a.from).err().unwrap_or_default();
        return Err(miette!("--from {}: {why}", a.from));
    };
    let path = PathBuf::from(format!("{name}.ir"));
    let text = text(name, from);
    let mut file = std::fs::File::options().write(true).create_new(true).open(&path).map_err(|e| match e.kind() {
        std::io::ErrorKind::AlreadyExists => {
            miette!(help = "choose another name, or move it away", "{} exists", path.display())
        }
        _ => miette!("{}: {e}", path.display()),
    })?;
    std::io::Write::write_all(&mut file, text.as_bytes()).map_err(wrap)?;
    println!("{}: written, from {}", path.display(), from.name);
    println!("  rambac try {} --no-train     # right? causal? at what cost?", path.display());
    println!("  rambac try {}                # and does it learn?", path.display());
    println!("  rambac compare {} full", path.display());
    println!("  rambac train small --attention {} --len 1024 --out runs/{name}", path.display());
    Ok(ExitCode::SUCCESS)
}

/// The first sentence of a text's comment.
fn about(text: &str) -> String {
    let lines = text.lines().map_while(|l| l.strip_prefix("# "));
    let all = lines.collect::<Vec<_>>().join(" ");
    all.split_once(". ").map_or(all.clone(), |(first, _)| format!("{first}."))
}

/// The built-in text under a new name, with what a fragment is.
fn text(name: &str, from: &variants::BuiltIn) -> String {
    let graph = from.text.replacen(&format!("graph {}(", from.name), &format!("graph {name}("), 1);
    format!(
        "# {name}: from {}.\n#\n\
         # Inputs, any of them: \"x\" f32[N, L, width] (the layer's input), \"q\" f32[N, L, heads, dim], \"k\" and \"v\"\n\
         # f32[N, L, kv_heads, dim].  What it learns itself is a param.  It returns \"o\" f32[N, L, heads, dim], and \"aux\", a\n\
         # scalar loss of its own, if it has one.  A stack sets heads, kv_heads, dim, width, chunk and k to its own sizes.\n#\n{graph}",
        from.name
    )
}
