//! `rambac generate`: writes on from a prompt, token by token, with programs that are compiled once.

use crate::cli::Generate;
use crate::device::{self, Inferring};
use crate::error::{Result, warn, wrap};
use crate::model;
use crate::profile::Profile;
use crate::sample::Sampling;
use crate::show;
use miette::{IntoDiagnostic, miette};
use rambac_cpu::team;
use rambac_models::data::rng::stream;
use rambac_models::{Config, Tokenizer};
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
    let (config, weights) = model::trained(&a.checkpoint)?;
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
    let mut prompts = vec![];
    for text in texts(a)? {
        let ids = tokenizer.encode(&text).map_err(wrap)?;
        if ids.is_empty() {
            return Err(miette!("the prompt is empty: give at least one character to go on from"));
        }
        prompts.push(ids);
    }
    let options = model::session_options(&a.chunks, a.resume_store.as_deref(), prompts.len(), a.weights);
    let graphs = model::session_graphs(&config)?;
    let params = model::parameters_for(&graphs, &options.passes, &config, Some(&weights))?;
    let how = Inferring { on: a.on.device, memory: a.on.device_memory, segment: a.segment, options: &options };
    let mut session = device::session(&how, &graphs, params, &pool)?;

    let w = Writing {
        from: &a.checkpoint,
        ids: false,
        tokens: a.tokens,
        sampling,
        seed: a.seed,
        segment: a.segment,
        flash: a.flash,
        profile: a.on.profile.as_deref(),
    };
    write_on(&mut session, &config, &tokenizer, &prompts, &w)
}

/// How to write on.
pub struct Writing<'a> {
    /// Where the weights come from, for messages.
    pub from: &'a str,
    /// Write ids, not their text.
    pub ids: bool,
    pub tokens: usize,
    pub sampling: Sampling,
    pub seed: u64,
    /// Tokens fed at once.
    pub segment: usize,
    pub flash: bool,
    /// Where a trace of the device goes.
    pub profile: Option<&'a Path>,
}

/// Reads the prompts, one per sequence of the session, and writes on.
pub fn write_on(
    session: &mut Session,
    config: &Config,
    tokenizer: &Tokenizer,
    prompts: &[Vec<i32>],
    a: &Writing,
) -> Result<ExitCode> {
    let mut profile = a.profile.map(|p| Profile::session(p, session)).transpose()?;
    let begin = Instant::now();
    let mut hidden = vec![];
    for (seq, ids) in prompts.iter().enumerate() {
        let exact = if a.flash { (ids.len() / a.segment).saturating_sub(1) * a.segment } else { 0 };
        for segment in ids[..exact].chunks(a.segment) {
            session.skim(seq, segment).map_err(wrap)?;
        }
        let mut last = vec![];
        for segment in ids[exact..].chunks(a.segment) {
            last = session.feed(seq, segment).map_err(wrap)?.hidden;
        }
        hidden.extend_from_slice(&last[last.len() - config.hidden_size..]);
    }
    let prefill = begin.elapsed();

    let begin = Instant::now();
    let mut out = std::io::stdout();
    let mut texts: Vec<_> = prompts.iter().map(|_| tokenizer.stream()).collect();
    // One text is shown as it comes; several would mix.
    let mut written = vec![String::new(); prompts.len()];
    let mut next = vec![0; prompts.len()];
    let mut logits = session.logits(&hidden).map_err(wrap)?;
    let pool = session.pool().clone();
    let mut token = |i: usize| -> Result<()> {
        for (seq, row) in logits.chunks_exact_mut(config.vocab_size).enumerate() {
            // A model may have more rows in its embedding than its tokenizer has ids.
            let row = &row[..tokenizer.vocab_size().min(row.len())];
            let key = [i as u64, seq as u64];
            let key = if seq == 0 { &key[..1] } else { &key[..] };
            let id = a.sampling.choose(row, &mut stream(a.seed, "generate", key)).ok_or_else(|| {
                miette!(
                    help = format!("look for the broken tensor with: rambac inspect {}", a.from),
                    "the model's predictions are not finite"
                )
            })? as i32;
            next[seq] = id;
            let piece = if a.ids { format!("{id} ") } else { texts[seq].push(id).map_err(wrap)? };
            if prompts.len() == 1 {
                write!(out, "{piece}").into_diagnostic()?;
                out.flush().into_diagnostic()?;
            } else {
                written[seq].push_str(&piece);
            }
        }
        // The last token is read only by who goes on later.
        if i + 1 < a.tokens || session.chunks(0).is_some_and(|c| c.path().is_some()) {
            session.decode_into(&next, &mut logits).map_err(wrap)?;
            if let Some(p) = &mut profile {
                p.note(session)?;
            }
        }
        Ok(())
    };
    team::awake(&pool, || (0..a.tokens).try_for_each(&mut token))?;
    profile.iter_mut().try_for_each(Profile::finish)?;
    session.save().map_err(wrap)?;
    for (seq, (text, done)) in texts.into_iter().zip(&written).enumerate() {
        if prompts.len() > 1 {
            writeln!(out, "--- {}", seq + 1).into_diagnostic()?;
        }
        let rest = if a.ids { String::new() } else { text.finish().map_err(wrap)? };
        writeln!(out, "{done}{rest}").into_diagnostic()?;
    }
    let rate = |n: usize, t: Duration| show::digits(n as f64 / t.as_secs_f64().max(1e-9));
    let fed: usize = prompts.iter().map(Vec::len).sum();
    eprintln!(
        "{} at {} tokens/s, after {} of {} at {} tokens/s",
        show::plural(a.tokens * prompts.len(), "token"),
        rate(a.tokens * prompts.len(), begin.elapsed()),
        if prompts.len() == 1 { "a prompt".to_string() } else { format!("{} prompts", prompts.len()) },
        show::count(fed as u64),
        rate(fed, prefill)
    );
    if let Some(path) = session.chunks(0).and_then(|c| c.path()) {
        let path = path.display();
        eprintln!(
            "{} tokens stand in {path}; go on with: --resume-store {path}",
            show::count(session.position(0) as u64)
        );
    }
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

fn texts(a: &Generate) -> Result<Vec<String>> {
    match &a.prompt_file {
        None => Ok(a.prompt.clone()),
        Some(path) => Ok(vec![std::fs::read_to_string(path).map_err(|e| miette!("{}: {e}", path.display()))?]),
    }
}
