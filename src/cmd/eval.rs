//! `rambac eval passkey`: does a model find a needle anywhere in a long context?
//!
//! The context goes through a session segment by segment and is never whole anywhere; the answer is then fed as given,
//! and a case counts only if every digit was the model's first choice, which is the same as if it had written them itself.

use crate::cli::{Eval, EvalTask, Weights};
use crate::device::{self, Inferring, On};
use crate::error::{Result, warn, wrap};
use crate::profile::Profile;
use crate::show::count;
use crate::workbench::learn::{Asker, Needle};
use crate::{machine, metrics, model, show};
use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use miette::{IntoDiagnostic, miette};
use rambac_models::Config;
use rambac_models::data::PasskeyCase;
use rambac_models::data::passkey::DIGITS;
use rambac_runtime::checkpoint::Checkpoint;
use rambac_runtime::session::Retrieved;
use rambac_runtime::{Session, SessionOptions, Store, Tier};
use serde_json::{Value as Json, json};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

/// How cases are run.
pub struct How {
    pub seed: u64,
    /// Tokens fed at once.
    pub segment: usize,
    /// Skim all but the last segments.
    pub flash: bool,
    pub session: SessionOptions,
    pub on: On,
    /// Bytes of the device.
    pub memory: Option<usize>,
    /// A line per case.
    pub diagnose: bool,
    pub json: bool,
    pub progress: bool,
    /// Where a trace of the device goes.
    pub profile: Option<PathBuf>,
}

impl Default for How {
    fn default() -> Self {
        Self {
            seed: 1,
            segment: 4096,
            flash: false,
            session: SessionOptions::default(),
            on: On::Cpu,
            memory: None,
            diagnose: false,
            json: false,
            progress: false,
            profile: None,
        }
    }
}

/// What one context length gave.
#[derive(Clone, Copy, Debug, Default)]
pub struct Score {
    pub len: usize,
    pub cases: usize,
    /// Cases with every digit right.
    pub right: usize,
    /// Digits right in all.
    pub digits: usize,
    /// Cases all of whose digits were asked for with a chunk of the needle among the chosen.
    pub chosen: usize,
    pub seconds: f64,
    /// Bytes of the largest chunk store, wherever it is.
    pub stored: usize,
    /// Largest resident memory seen, in bytes.
    pub resident: usize,
    /// The most that a device held, in bytes, and the parts in which landmarks came there; 0: none did.
    pub device: Option<usize>,
    pub parts: usize,
}

impl Score {
    pub fn accuracy(&self) -> f64 {
        self.right as f64 / self.cases.max(1) as f64
    }
    /// What is taken now.
    fn see(&mut self, session: &mut Session) {
        self.resident = self.resident.max(machine::rss());
        self.device = self.device.max(session.device().map(|(m, _)| m.bytes()));
        self.parts = self.parts.max(session.residency().map_or(0, |r| r.landmark_parts));
    }
    /// Of the cases, those in which the needle was chosen; `None`: there are no chunks to choose.
    pub fn chosen_part(&self) -> Option<f64> {
        (self.stored > 0).then(|| self.chosen as f64 / self.cases.max(1) as f64)
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
    if config.attention.is_some() {
        if a.flash || a.chunks.store != "ram" {
            return Err(miette!(
                "--flash and --store are about chunks that a model keeps of a text: with an attention variant it keeps all tokens"
            ));
        }
        if a.diagnose {
            return Err(miette!(
                help = "without --device and --weights, eval tells the needle's rank among the units that are chosen",
                "--diagnose is about the chunks of hierarchical sparse attention, which this model has not"
            ));
        }
        // By segments only where that is asked for: whole texts tell the needle's rank.
        let placed = a.on.device != On::Cpu || a.on.device_memory.is_some() || a.on.profile.is_some();
        if !placed && a.weights == Weights::F32 {
            return whole(a, &config, &weights, &pool);
        }
    }
    let mut session = model::session_options(&a.chunks, None, 1, a.weights);
    // Nobody goes on with a case.
    if let Tier::File(path) = session.tier {
        session.tier = Tier::Scratch(path);
    }
    let store = model::parameters_for(&model::session_graphs(&config, 1)?, &session.passes, &config, Some(&weights))?;
    let mut how = How {
        seed: a.seed,
        segment: a.segment,
        flash: a.flash,
        session,
        on: a.on.device,
        memory: a.on.device_memory,
        diagnose: a.diagnose,
        json: a.json,
        progress: !a.json,
        profile: a.on.profile.clone(),
    };
    for &len in &a.len {
        possible(&config, len, a.seed)?;
    }
    if !a.json {
        println!("{HEADER}");
    }
    let evaluated = weights.clone();
    for &len in &a.len {
        let s = passkey(&config, &store, &pool, len, a.cases, &how)?;
        // The trace is of the first length.
        how.profile = None;
        let line = json!({
            "len": s.len, "cases": s.cases, "right": s.right, "accuracy": s.accuracy(),
            "digits_right": s.digits, "digits": s.cases * DIGITS, "needle_chunk_chosen": s.chosen,
            "tokens_per_s": (s.len * s.cases) as f64 / s.seconds, "seconds": s.seconds,
            "memory_bytes": s.stored, "resident_bytes": s.resident, "flash": how.flash,
            "device_bytes": s.device, "landmark_parts": s.parts,
        });
        if a.json {
            println!("{line}");
        } else {
            println!("{}", row(&s));
        }
        keep(&evaluated, line);
    }
    Ok(ExitCode::SUCCESS)
}

/// Refuses a length that no case has, before others take their time.
fn possible(config: &Config, len: usize, seed: u64) -> Result<()> {
    if config.vocab_size < 256 {
        return Err(miette!("passkey is a task over bytes; the model's vocab_size is {}", config.vocab_size));
    }
    if i32::try_from(len).is_err() {
        return Err(miette!("--len {len}: a sequence of more than {} tokens cannot be counted", i32::MAX));
    }
    PasskeyCase::new(seed, 0, len).map(drop).map_err(wrap)
}

/// A model with an attention variant reads every text at once, so lengths are bounded by memory.
fn whole(a: &Eval, config: &Config, weights: &std::path::Path, pool: &Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    let unit = rambac_models::stack::segment_unit(config).map_err(|e| miette!("{e}"))?;
    for &len in &a.len {
        possible(config, len, a.seed)?;
        if !len.is_multiple_of(unit) {
            let help = crate::show::nearest(len, unit);
            return Err(miette!(help = help, "--len {len}: the attention reads texts in multiples of {unit} tokens"));
        }
    }
    let store = model::parameters(config, Some(weights), rambac_models::InitRule::Normal, 0)?;
    let mut asker = Asker::new(config, store, pool)?;
    for &len in &a.len {
        let t = Instant::now();
        let s = asker.passkey(len, a.cases as u64, a.seed)?;
        let rate = (len * a.cases) as f64 / t.elapsed().as_secs_f64();
        let known = asker.choices().iter().zip(&s.needles).filter_map(|(label, n)| Some((label, (*n)?)));
        let needles: Vec<_> = known.collect();
        if a.json {
            let choice =
                |(label, n): &(&String, Needle)| json!({ "choice": label, "rank": n.rank, "chosen": n.chosen });
            let line = json!({
                "len": len, "cases": a.cases, "digits_right": s.right, "digits": s.asked,
                "needles": needles.iter().map(choice).collect::<Vec<_>>(), "tokens_per_s": rate,
            });
            println!("{line}");
        } else {
            let told = |(label, n): &(&String, Needle)| {
                let by = if asker.choices().len() > 1 { format!(" by {label}") } else { String::new() };
                format!(", the needle's rank{by} {:.1}, chosen {:.0} %", n.rank, 100.0 * n.chosen)
            };
            let needle: String = needles.iter().map(told).collect();
            println!(
                "{:>9} tokens, {} cases: {:.1} % of digits right{needle}, {} tokens/s",
                count(len as u64),
                a.cases,
                100.0 * s.accuracy(),
                show::thousands(rate)
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Adds a result to the evaluations of the run that the checkpoint lies in, if it lies in one: what `plot` and `report`
/// show.
fn keep(checkpoint: &Path, mut line: Json) {
    let Some(run) = metrics::run_of(checkpoint) else { return };
    line["step"] = json!(Checkpoint::open(checkpoint).ok().and_then(|c| c.step));
    if let Err(e) = metrics::add_evaluation(&run, &line) {
        warn(format!("the result is not kept for plots and reports: {e}"));
    }
}

/// Over [`row`]s.
pub const HEADER: &str =
    "    context   cases   keys right   digits right   needle chosen   tokens/s   chunks stored   resident";

/// A line of the table.
pub fn row(s: &Score) -> String {
    let digits = s.digits as f64 / (s.cases * DIGITS).max(1) as f64;
    let chosen = s.chosen_part().map_or("-  ".into(), |part| format!("{:.0} %", 100.0 * part));
    format!(
        "{:>11} {:>7} {:>6} {:>4.0} % {:>12.1} % {chosen:>15} {:>10} {:>15} {:>10}",
        count(s.len as u64),
        s.cases,
        s.right,
        100.0 * s.accuracy(),
        100.0 * digits,
        show::thousands((s.len * s.cases) as f64 / s.seconds),
        show::bytes(s.stored),
        show::bytes(s.resident),
    ) + &match (s.device, s.parts) {
        (None, _) => String::new(),
        (Some(b), 0) => format!("   {} on the device", show::bytes(b)),
        (Some(b), n) => format!("   {} on the device, landmarks in {}", show::bytes(b), show::plural(n, "part")),
    }
}

/// What retrieval did for one digit: over heads, the best of the chunks that hold the digit or the byte before it.
#[derive(Clone, Copy)]
struct Found {
    /// 1 is the best score; `None`: they are not stored yet, or nobody asked.
    rank: Option<usize>,
    weight: f32,
    right: bool,
}

/// Evaluates `cases` cases of `len` tokens.
pub fn passkey(
    config: &Config,
    store: &Store,
    pool: &Arc<rayon::ThreadPool>,
    len: usize,
    cases: usize,
    how: &How,
) -> Result<Score> {
    possible(config, len, how.seed)?;
    let segment = how.segment.min(len);
    let graphs = model::session_graphs(config, len + DIGITS)?;
    let at = Inferring { on: how.on, memory: how.memory, segment, options: &how.session };
    let mut session = device::session(&at, &graphs, store.clone(), pool)?;
    let bar = if how.progress { ProgressBar::new((len * cases) as u64) } else { ProgressBar::hidden() };
    // It goes before an error is told, too.
    let bar = bar.with_finish(ProgressFinish::AndClear);
    let style = "{human_pos}/{human_len} tokens  {per_sec}  {msg}  {eta} left";
    bar.set_style(ProgressStyle::with_template(style).into_diagnostic()?);
    let mut profile = how.profile.as_ref().map(|p| Profile::session(p, &mut session)).transpose()?;
    let t = Instant::now();
    let mut score = Score { len, cases, ..Score::default() };
    let mut bytes = vec![0u8; segment];
    let (mut read, mut beat) = (0, show::Beat::starts());
    for index in 0..cases {
        let case = PasskeyCase::new(how.seed, index as u64, len).map_err(wrap)?;
        session.reset().map_err(wrap)?;
        let mut prompt = case.prompt();
        let mut hidden = vec![];
        let mut retrieved = Retrieved::default();
        loop {
            let n = prompt.fill(&mut bytes);
            if n == 0 {
                break;
            }
            let ids: Vec<i32> = bytes[..n].iter().map(|&b| b.into()).collect();
            if how.flash && prompt.remaining() >= segment {
                session.skim(0, &ids).map_err(wrap)?;
            } else {
                let mut seg = session.feed(0, &ids).map_err(wrap)?;
                hidden = seg.hidden.split_off((n - 1) * config.hidden_size);
                retrieved = seg.retrieved;
            }
            score.see(&mut session);
            read += n as u64;
            bar.inc(n as u64);
            let status = format!("{}/{index} keys right, {} resident", score.right, show::bytes(machine::rss()));
            if how.progress {
                let rate = show::rate(read as f64 / t.elapsed().as_secs_f64());
                beat.tell(&bar, || {
                    format!("{} of {} tokens, {rate}/s, {status}", count(read), count((len * cases) as u64))
                });
            }
            bar.set_message(status);
        }
        let answer = case.answer();
        let ids: Vec<i32> = answer[..DIGITS - 1].iter().map(|&b| b.into()).collect();
        let mut retrieved = vec![last(retrieved, config)];
        for id in ids {
            let seg = session.feed(0, &[id]).map_err(wrap)?;
            hidden.extend(seg.hidden);
            retrieved.push(seg.retrieved);
        }
        let logits = session.logits(&hidden).map_err(wrap)?;
        if let Some(p) = &mut profile {
            p.note(&mut session)?;
        }
        let right = logits.chunks(config.vocab_size).zip(answer).map(|(row, d)| argmax(row) == d as usize);
        let found: Vec<Found> = (retrieved.iter().zip(right).enumerate())
            .map(|(i, (r, right))| {
                let chunks = [0, 1].map(|back| (case.digits_offset() + i - back) / config.chunk_size);
                find(&session, r, chunks, right, how.diagnose)
            })
            .collect();
        let digits = found.iter().filter(|f| f.right).count();
        score.digits += digits;
        score.right += usize::from(digits == DIGITS);
        score.chosen += usize::from(found.iter().all(|f| f.weight > 0.0));
        score.stored = score.stored.max(session.chunks(0).map_or(0, |c| c.bytes()));
        score.see(&mut session);
        if how.diagnose {
            let line = diagnosis(index, case.needle_offset(), len, &found, config.chunk_topk, how.json);
            bar.suspend(|| println!("{line}"));
        }
    }
    profile.iter_mut().try_for_each(Profile::finish)?;
    score.seconds = t.elapsed().as_secs_f64();
    bar.finish_and_clear();
    Ok(score)
}

/// The retrieval of a segment's last token alone.
fn last(r: Retrieved, config: &Config) -> Retrieved {
    let tail = |n: usize, width: usize| n.saturating_sub(config.num_kv_heads * width)..n;
    let k = config.chunk_topk;
    Retrieved {
        indices: r.indices[tail(r.indices.len(), k)].to_vec(),
        count: r.count[tail(r.count.len(), 1)].to_vec(),
        weights: r.weights[tail(r.weights.len(), k)].to_vec(),
        query: r.query[tail(r.query.len(), config.retrieval_head_dim())].to_vec(),
    }
}

fn find(session: &Session, r: &Retrieved, chunks: [usize; 2], right: bool, rank: bool) -> Found {
    let of = |(i, w): (&i32, &f32)| if chunks.contains(&(*i as usize)) { *w } else { 0.0 };
    let weight = r.indices.iter().zip(&r.weights).map(of).fold(0.0, f32::max);
    let ranks = |c: usize| if rank { session.rank(0, &r.query, c) } else { vec![] };
    let rank = chunks.iter().flat_map(|&c| ranks(c)).min().map(|better| better + 1);
    Found { rank, weight, right }
}

/// A line on one case: which part failed first, if one did.
fn diagnosis(index: usize, depth: usize, len: usize, found: &[Found], k: usize, as_json: bool) -> String {
    let wrong = found.iter().find(|f| !f.right);
    let verdict = match wrong {
        None => "right",
        Some(f) if f.rank.is_none_or(|r| r > k) => "selection: the needle's chunks were not among the best",
        Some(f) if f.weight < 0.05 => "weights: chosen, but the more recent chunks took the weight",
        Some(_) => "attention or recurrent states: chosen and weighed, but the digit is wrong",
    };
    if as_json {
        let (ranks, weights): (Vec<_>, Vec<_>) = found.iter().map(|f| (f.rank, f.weight)).unzip();
        let right: Vec<_> = found.iter().map(|f| f.right).collect();
        return json!({
            "case": index, "len": len, "needle_at": depth, "digits_right": right, "ranks": ranks, "weights": weights,
            "verdict": verdict,
        })
        .to_string();
    }
    let digits: String = found.iter().map(|f| if f.right { '+' } else { '-' }).collect();
    let ranks: Vec<String> = found.iter().map(|f| f.rank.map_or("-".into(), |r| r.to_string())).collect();
    let weights: Vec<String> = found.iter().map(|f| format!("{:.2}", f.weight)).collect();
    format!(
        "  case {index:>3}: needle at {:>4.1} %  digits {digits}  ranks {}  weights {}  {verdict}",
        100.0 * depth as f64 / len as f64,
        ranks.join(" "),
        weights.join(" ")
    )
}

/// The first of the largest.
fn argmax(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}
