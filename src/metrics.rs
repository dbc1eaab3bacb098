//! What a training run tells of every step: `metrics.jsonl` for programs, TensorBoard's event files beside it.
//!
//! A line of `metrics.jsonl` is a JSON object with `step` and numbers.  Evaluations of a run's checkpoints lie in its
//! `eval.jsonl`, a line per context length.

mod events;
mod read;

pub use read::{Point, Quantity, RunMetrics};

use crate::error::Result;
use crate::{machine, show};
use miette::{Report, miette};
use serde_json::{Value as Json, json};
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// What was measured at every step.
pub const METRICS: &str = "metrics.jsonl";
/// What `rambac eval` found.
pub const EVALUATIONS: &str = "eval.jsonl";
/// On what machine the run ran: a line per start.
pub const ENVIRONMENT: &str = "environment.jsonl";
/// The folder of TensorBoard's files.
const EVENTS: &str = "tensorboard";

/// Writes what a run measures.
pub struct Metrics {
    lines: File,
    events: events::Writer,
}

fn io(path: &Path, e: std::io::Error) -> Report {
    miette!("{}: {e}; is the disk full?", path.display())
}

impl Metrics {
    /// The files of the run in `dir` with what they hold up to `step`: what came after will be done again.
    ///
    /// # Errors
    /// Files that can't be read or written.
    pub fn open(dir: &Path, step: u64) -> Result<Self> {
        let lines = lines_up_to(&dir.join(METRICS), step)?;
        add_line(&dir.join(ENVIRONMENT), &environment(step))?;
        let folder = dir.join(EVENTS);
        let events = events::Writer::create(&folder, step).map_err(|e| io(&folder, e))?;
        Ok(Self { lines, events })
    }

    /// Writes the numbers of a step.
    ///
    /// # Errors
    /// A full disk, or what else the system refuses.
    pub fn write(&mut self, line: &Json) -> Result<()> {
        writeln!(self.lines, "{line}").map_err(|e| io(Path::new(METRICS), e))?;
        let Some(step) = line["step"].as_u64() else { return Ok(()) };
        // Where a step belongs is no curve.
        let is_curve = |k: &str| !matches!(k, "step" | "stage" | "len" | "rows");
        let numbers = line.as_object().into_iter().flatten().filter(|(k, _)| is_curve(k));
        let scalars: Vec<(String, f32)> =
            numbers.filter_map(|(k, v)| Some((format!("train/{k}"), v.as_f64()? as f32))).collect();
        self.events.scalars(step, &scalars).map_err(|e| io(Path::new(EVENTS), e))
    }
}

/// `path` with its lines up to `step`, open to go on.
fn lines_up_to(path: &Path, step: u64) -> Result<File> {
    let fail = |e: std::io::Error| miette!("{}: {e}", path.display());
    let old = match std::fs::read_to_string(path) {
        Ok(t) => t,
        Err(e) if e.kind() == ErrorKind::NotFound => String::new(),
        Err(e) => return Err(fail(e)),
    };
    let keeps =
        |l: &&str| serde_json::from_str::<Json>(l).ok().and_then(|v| v["step"].as_u64()).is_some_and(|s| s <= step);
    let kept: String = old.lines().filter(keeps).map(|l| format!("{l}\n")).collect();
    if kept.len() != old.len() {
        // By rename: a kill in between must not lose the history.
        let new = path.with_extension("jsonl.new");
        std::fs::write(&new, kept).and_then(|()| std::fs::rename(&new, path)).map_err(fail)?;
    }
    File::options().create(true).append(true).open(path).map_err(fail)
}

/// The folder of the run that `path` is, or lies in as a checkpoint; `None` where nothing was trained.
pub fn run_of(path: &Path) -> Option<PathBuf> {
    let full = path.canonicalize().ok()?;
    let folders = [Some(full.as_path()), full.parent()];
    folders.into_iter().flatten().find(|d| d.join(METRICS).is_file()).map(Path::to_path_buf)
}

/// Adds a line to the evaluations of a run.
///
/// # Errors
/// What the system refuses.
pub fn add_evaluation(run: &Path, line: &Json) -> Result<()> {
    add_line(&run.join(EVALUATIONS), line)
}

fn add_line(path: &Path, line: &Json) -> Result<()> {
    let file = File::options().create(true).append(true).open(path);
    file.and_then(|mut f| writeln!(f, "{line}")).map_err(|e| io(path, e))
}

/// What matters of this machine and process.
fn environment(step: u64) -> Json {
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let simd = rambac_cpu::simd::choose().map_or_else(|e| e.to_string(), |l| l.name().to_string());
    let command: Vec<String> = std::env::args().skip(1).collect();
    json!({
        "rambac": env!("CARGO_PKG_VERSION"), "command": format!("rambac {}", command.join(" ")), "from_step": step,
        "started": utc(seconds), "processor": machine::cpu_name().unwrap_or_else(|| std::env::consts::ARCH.into()),
        "cores": std::thread::available_parallelism().map_or(1, usize::from), "vectors": simd,
        "memory": machine::memory().map_or("unknown".into(), |(total, _)| show::bytes(total)),
        "system": format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
    })
}

/// `2026-01-31 12:34 UTC` of seconds since 1970 (days to dates after Hinnant's civil_from_days).
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let mp = (5 * day_of_year + 2) / 153;
    let (day, month) = (day_of_year - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", rest / 3600, rest / 60 % 60)
}

#[cfg(test)]
mod tests {
    #[test]
    fn dates() {
        let of = [0, 951_782_400, 1_709_208_000, 4_102_444_799].map(super::utc);
        assert_eq!(
            of,
            ["1970-01-01 00:00 UTC", "2000-02-29 00:00 UTC", "2024-02-29 12:00 UTC", "2099-12-31 23:59 UTC"]
        );
    }
}
