//! `rambac generate`: writes on from a prompt, token by token, with programs that are compiled once.

use crate::cli::Generate;
use crate::cmd::train::{catch_interrupt, interrupted};
use crate::device::{self, Inferring};
use crate::error::{Result, warn, wrap};
use crate::model;
use crate::profile::Profile;
use crate::sample::Sampling;
use crate::show;
use miette::miette;
use rambac_cpu::team;
use rambac_models::data::rng::stream;
use rambac_models::{Config, Tokenizer};
use rambac_runtime::Session;
use std::io::{ErrorKind, Read, Write};
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
    for ids in prompted(a, &tokenizer)? {
        if ids.is_empty() {
            return Err(miette!("the prompt is empty: give at least one character to go on from"));
        }
        prompts.push(ids);
    }
    let options = model::session_options(&a.chunks, a.resume_store.as_deref(), prompts.len(), a.weights);
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let graphs = model::session_graphs(&config, longest.saturating_add(a.tokens))?;
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

/// Reads the prompts, one per sequence of the session, and writes on.  Where the sequence lies in a file it is saved after the
/// prompt and at the end, and Ctrl-C, or a reader who leaves, ends it early: nothing that was read is lost.
pub fn write_on(
    session: &mut Session,
    config: &Config,
    tokenizer: &Tokenizer,
    prompts: &[Vec<i32>],
    a: &Writing,
) -> Result<ExitCode> {
    let mut profile = a.profile.map(|p| Profile::session(p, session)).transpose()?;
    let file = session.chunks(0).and_then(|c| c.path()).map(|p| p.display().to_string());
    if file.is_some() {
        catch_interrupt();
    }
    let stopped = |read: usize, of: usize| match (interrupted(), &file) {
        (true, Some(path)) => {
            Err(miette!("stopped after {read} of {of} tokens of the prompt; {path} is as it was before"))
        }
        _ => Ok(()),
    };
    let begin = Instant::now();
    let mut hidden = vec![];
    for (seq, ids) in prompts.iter().enumerate() {
        let exact = if a.flash { (ids.len() / a.segment).saturating_sub(1) * a.segment } else { 0 };
        for (i, segment) in ids[..exact].chunks(a.segment).enumerate() {
            stopped(i * a.segment, ids.len())?;
            session.skim(seq, segment).map_err(wrap)?;
        }
        let mut last = vec![];
        for (i, segment) in ids[exact..].chunks(a.segment).enumerate() {
            stopped(exact + i * a.segment, ids.len())?;
            last = session.read(seq, segment).map_err(wrap)?;
        }
        hidden.extend_from_slice(&last);
    }
    let prefill = begin.elapsed();
    session.save().map_err(wrap)?;

    let begin = Instant::now();
    let mut out = std::io::stdout();
    let mut texts: Vec<_> = prompts.iter().map(|_| tokenizer.stream()).collect();
    // One text is shown as it comes; several would mix.
    let mut written = vec![String::new(); prompts.len()];
    let mut next = vec![0; prompts.len()];
    let mut logits = session.logits(&hidden).map_err(wrap)?;
    let pool = session.pool().clone();
    let (mut lost, mut done) = (None, 0);
    // Whether to go on.
    let mut token = |i: usize| -> Result<bool> {
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
                // Whoever reads it has left: what was written is kept all the same.
                if let Err(e) = write!(out, "{piece}").and_then(|()| out.flush()) {
                    lost = Some(e);
                }
            } else {
                written[seq].push_str(&piece);
            }
        }
        // The last token is read only by who goes on later.
        if i + 1 < a.tokens || file.is_some() {
            session.decode_into(&next, &mut logits).map_err(wrap)?;
            if let Some(p) = &mut profile {
                p.note(session)?;
            }
        }
        done = i + 1;
        Ok(lost.is_none() && !(file.is_some() && interrupted()))
    };
    let decoded = team::awake(&pool, || {
        for i in 0..a.tokens {
            if !token(i)? {
                break;
            }
        }
        Result::Ok(())
    });
    profile.iter_mut().try_for_each(Profile::finish)?;
    let decoded = decoded.and_then(|()| session.save().map_err(wrap));
    if let (Err(e), Some(path)) = (&decoded, &file) {
        let help =
            format!("the sequence stands in {path} as it was after the prompt; go on with --resume-store {path}");
        return Err(miette!(help = help, "{e}"));
    }
    decoded?;
    let mut end = String::new();
    for (seq, (text, done)) in texts.into_iter().zip(&written).enumerate() {
        if prompts.len() > 1 {
            end += &format!("--- {}\n", seq + 1);
        }
        let rest = if a.ids { String::new() } else { text.finish().map_err(wrap)? };
        end += &format!("{done}{rest}\n");
    }
    let lost = lost.or_else(|| out.write_all(end.as_bytes()).and_then(|()| out.flush()).err());
    let rate = |n: usize, t: Duration| show::rate(n as f64 / t.as_secs_f64().max(1e-9));
    let fed: usize = prompts.iter().map(Vec::len).sum();
    eprintln!(
        "{} at {} tokens/s, after {} of {} at {} tokens/s",
        show::plural(done * prompts.len(), "token"),
        rate(done * prompts.len(), begin.elapsed()),
        if prompts.len() == 1 { "a prompt".to_string() } else { format!("{} prompts", prompts.len()) },
        show::count(fed as u64),
        rate(fed, prefill)
    );
    if let Some(path) = &file {
        eprintln!(
            "{} tokens stand in {path}; go on with: --resume-store {path}",
            show::count(session.position(0) as u64)
        );
    }
    match lost {
        Some(e) if e.kind() != ErrorKind::BrokenPipe => Err(miette!("standard output: {e}")),
        Some(_) => Ok(ExitCode::FAILURE),
        None if done < a.tokens => Ok(ExitCode::from(130)),
        None => Ok(ExitCode::SUCCESS),
    }
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

/// The ids of every prompt.
fn prompted(a: &Generate, tokenizer: &Tokenizer) -> Result<Vec<Vec<i32>>> {
    let Some(path) = &a.prompt_file else {
        return a.prompt.iter().map(|text| tokenizer.encode(text).map_err(wrap)).collect();
    };
    let (name, bytes) = match path.to_str() {
        Some("-") => {
            let mut bytes = vec![];
            ("standard input".to_string(), std::io::stdin().read_to_end(&mut bytes).map(|_| bytes))
        }
        _ => (path.display().to_string(), std::fs::read(path)),
    };
    let bytes = bytes.map_err(|e| miette!("{name}: cannot read this prompt: {e}"))?;
    if tokenizer.is_bytes() {
        return Ok(vec![bytes.into_iter().map(i32::from).collect()]);
    }
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        miette!("{name}: byte {at} is no UTF-8, and {} reads text", tokenizer.origin())
    })?;
    Ok(vec![tokenizer.encode(&text).map_err(wrap)?])
}
