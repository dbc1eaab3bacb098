//! `rambac generate`: writes on from a prompt, token by token, with programs that are compiled once.

use crate::cli::Generate;
use crate::error::{Result, warn, wrap};
use crate::model;
use crate::sample::Sampling;
use crate::show;
use miette::{IntoDiagnostic, miette};
use rambac_models::data::rng::stream;
use rambac_models::{InitRule, Tokenizer};
use rambac_runtime::Session;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Runs the verb.
pub fn run(a: &Generate, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    let sampling = Sampling { temperature: a.temperature, top_k: a.top_k, top_p: a.top_p };
    if let Some(problem) = sampling.problem() {
        return Err(miette!("{problem}"));
    }
    if a.temperature == 0.0 && (a.top_k.is_some() || a.top_p.is_some()) {
        warn("without --temperature the likeliest token is always taken: --top-k and --top-p change nothing");
    }
    let (config, weights) = model::config(&a.checkpoint)?;
    let weights = weights.ok_or_else(|| {
        miette!(
            help = "train a model first (rambac demo, rambac train), or give a folder with model.safetensors",
            "{}: there are no weights here",
            a.checkpoint
        )
    })?;
    let tokenizer = tokenizer(a, &weights)?;
    tokenizer.check_vocab(config.vocab_size).map_err(wrap)?;
    if tokenizer.is_bytes() && config.vocab_size > 512 {
        warn(format!(
            "there is no tokenizer.json in {}, so bytes are taken as tokens, of which this model knows {}; give its \
             tokenizer with --tokenizer",
            weights.display(),
            config.vocab_size
        ));
    }
    let ids = tokenizer.encode(&prompt(a)?).map_err(wrap)?;
    if ids.is_empty() {
        return Err(miette!("the prompt is empty: give at least one character to go on from"));
    }
    let params = model::parameters(&config, Some(&weights), InitRule::default(), 0)?;
    let mut session = Session::new(&model::session_graphs(&config)?, params, pool).map_err(wrap)?;

    let begin = Instant::now();
    let mut hidden = vec![];
    for segment in ids.chunks(a.segment) {
        hidden = session.feed(segment).map_err(wrap)?.hidden;
    }
    let last = hidden.split_off(hidden.len().saturating_sub(config.hidden_size));
    let mut logits = session.logits(&last).map_err(wrap)?;
    let prefill = begin.elapsed();

    let begin = Instant::now();
    let mut out = std::io::stdout().lock();
    let mut text = tokenizer.stream();
    for i in 0..a.tokens {
        // A model may have more rows in its embedding than its tokenizer has ids.
        logits.truncate(tokenizer.vocab_size());
        let id = sampling.choose(&logits, &mut stream(a.seed, "generate", &[i as u64])).ok_or_else(|| {
            miette!(
                help = format!("look for the broken tensor with: rambac inspect {}", a.checkpoint),
                "the model's predictions are not finite"
            )
        })? as i32;
        write!(out, "{}", text.push(id).map_err(wrap)?).into_diagnostic()?;
        out.flush().into_diagnostic()?;
        if i + 1 < a.tokens {
            let hidden = session.feed(&[id]).map_err(wrap)?.hidden;
            logits = session.logits(&hidden).map_err(wrap)?;
        }
    }
    writeln!(out, "{}", text.finish().map_err(wrap)?).into_diagnostic()?;
    let rate = |n: usize, t: Duration| show::digits(n as f64 / t.as_secs_f64().max(1e-9));
    eprintln!(
        "{} at {} tokens/s, after a prompt of {} at {} tokens/s",
        show::plural(a.tokens, "token"),
        rate(a.tokens, begin.elapsed()),
        show::count(ids.len() as u64),
        rate(ids.len(), prefill)
    );
    Ok(ExitCode::SUCCESS)
}

/// The one that was named, else the folder's, else bytes.
fn tokenizer(a: &Generate, folder: &Path) -> Result<Tokenizer> {
    let beside = folder.join("tokenizer.json");
    match &a.tokenizer {
        Some(path) => Tokenizer::from_file(path).map_err(wrap),
        None if beside.exists() => Tokenizer::from_file(beside).map_err(wrap),
        None => Ok(Tokenizer::bytes()),
    }
}

fn prompt(a: &Generate) -> Result<String> {
    match (&a.prompt, &a.prompt_file) {
        (Some(text), _) => Ok(text.clone()),
        (None, Some(path)) => std::fs::read_to_string(path).map_err(|e| miette!("{}: {e}", path.display())),
        (None, None) => Err(miette!("give the text to go on from with --prompt or --prompt-file")),
    }
}
