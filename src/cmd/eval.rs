//! `rambac eval passkey`: does a model find a needle anywhere in a long context?
//!
//! The context goes through a session segment by segment; the answer is then fed as given, and a case counts only if
//! every digit was the model's first choice, which is the same as if it had written them itself.

use crate::cli::{Eval, EvalTask};
use crate::error::{Result, wrap};
use crate::model;
use indicatif::{ProgressBar, ProgressStyle};
use miette::{IntoDiagnostic, miette};
use rambac_models::Config;
use rambac_models::data::PasskeyCase;
use rambac_models::data::passkey::DIGITS;
use rambac_runtime::{Session, Store};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

/// What one context length gave.
#[derive(Clone, Copy, Debug, Default)]
pub struct Score {
    pub len: usize,
    pub cases: usize,
    /// Cases with every digit right.
    pub right: usize,
    /// Digits right in all.
    pub digits: usize,
    /// Cases whose last prompt token chose the needle's chunk.
    pub chosen: usize,
    pub seconds: f64,
    /// Largest chunk memory, in bytes.
    pub memory: usize,
}

impl Score {
    pub fn accuracy(&self) -> f64 {
        self.right as f64 / self.cases.max(1) as f64
    }
}

/// Runs the verb.
pub fn run(a: &Eval, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    let EvalTask::Passkey = a.task;
    let (config, weights) = model::config(&a.checkpoint)?;
    let weights = weights.ok_or_else(|| {
        miette!(
            help = format!("train one: rambac train {} --out DIR", a.checkpoint),
            "{} has no weights to evaluate",
            a.checkpoint
        )
    })?;
    let store = model::parameters(&config, Some(&weights), Default::default(), 0)?;
    let mut scores = vec![];
    if !a.json {
        println!("{HEADER}");
    }
    for &len in &a.len {
        let s = passkey(&config, &store, &pool, len, a.cases, a.seed, a.segment, !a.json)?;
        if a.json {
            println!(
                "{}",
                serde_json::json!({
                    "len": s.len, "cases": s.cases, "right": s.right, "accuracy": s.accuracy(),
                    "digits_right": s.digits, "digits": s.cases * DIGITS, "needle_chunk_chosen": s.chosen,
                    "tokens_per_s": (s.len * s.cases) as f64 / s.seconds, "seconds": s.seconds, "memory_bytes": s.memory,
                })
            );
        } else {
            println!("{}", row(&s));
        }
        scores.push(s);
    }
    Ok(ExitCode::SUCCESS)
}

/// Over [`row`]s.
pub const HEADER: &str = "    context   cases   keys right   digits right   needle chosen   tokens/s   chunk memory";

/// A line of the table.
pub fn row(s: &Score) -> String {
    let digits = s.digits as f64 / (s.cases * DIGITS).max(1) as f64;
    format!(
        "{:>11} {:>7} {:>6} {:>4.0} % {:>12.1} % {:>13.0} % {:>9.0}k {:>10.1} MiB",
        crate::cmd::train::grouped(s.len as u64),
        s.cases,
        s.right,
        100.0 * s.accuracy(),
        100.0 * digits,
        100.0 * s.chosen as f64 / s.cases.max(1) as f64,
        (s.len * s.cases) as f64 / s.seconds / 1e3,
        s.memory as f64 / (1 << 20) as f64,
    )
}

/// Evaluates `cases` cases of `len` tokens.
#[allow(clippy::too_many_arguments)]
pub fn passkey(
    config: &Config,
    store: &Store,
    pool: &Arc<rayon::ThreadPool>,
    len: usize,
    cases: usize,
    seed: u64,
    segment: usize,
    progress: bool,
) -> Result<Score> {
    if config.vocab_size < 256 {
        return Err(miette!("passkey is a task over bytes; the model's vocab_size is {}", config.vocab_size));
    }
    let mut session = Session::new(&model::session_graphs(config)?, store.clone(), pool.clone()).map_err(wrap)?;
    let bar = if progress { ProgressBar::new((len * cases) as u64) } else { ProgressBar::hidden() };
    let style = "{human_pos}/{human_len} tokens  {per_sec}  {msg}  {eta} left";
    bar.set_style(ProgressStyle::with_template(style).into_diagnostic()?);
    let t = Instant::now();
    let mut score = Score { len, cases, ..Score::default() };
    let mut bytes = vec![0u8; segment.max(1)];
    for index in 0..cases {
        let case = PasskeyCase::new(seed, index as u64, len).map_err(wrap)?;
        session.reset();
        let mut prompt = case.prompt();
        let mut last = vec![];
        let mut chosen = false;
        loop {
            let n = prompt.fill(&mut bytes);
            if n == 0 {
                break;
            }
            let ids: Vec<i32> = bytes[..n].iter().map(|&b| b.into()).collect();
            let seg = session.feed(&ids).map_err(wrap)?;
            last = seg.hidden[(n - 1) * config.hidden_size..].to_vec();
            let needle = [case.needle_offset(), case.digits_offset()].map(|o| (o / config.chunk_size) as i32);
            let slots = config.num_kv_heads * config.chunk_topk;
            let tail = seg.retrieved.indices.len().saturating_sub(slots);
            let weights = &seg.retrieved.weights[tail..];
            chosen = seg.retrieved.indices[tail..].iter().zip(weights).any(|(i, w)| *w > 0.0 && needle.contains(i));
            bar.inc(n as u64);
        }
        let answer = case.answer();
        let ids: Vec<i32> = answer[..DIGITS - 1].iter().map(|&b| b.into()).collect();
        last.extend(session.feed(&ids).map_err(wrap)?.hidden);
        let logits = session.logits(&last).map_err(wrap)?;
        let right = logits.chunks(config.vocab_size).zip(answer).filter(|(row, d)| argmax(row) == *d as usize).count();
        score.digits += right;
        score.right += (right == DIGITS) as usize;
        score.chosen += chosen as usize;
        let m = session.memory();
        score.memory = score.memory.max(4 * (m.k.len() + m.v.len() + m.landmarks.len()));
        bar.set_message(format!("{}/{} keys right", score.right, index + 1));
    }
    score.seconds = t.elapsed().as_secs_f64();
    bar.finish_and_clear();
    Ok(score)
}

/// The first of the largest.
fn argmax(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}
