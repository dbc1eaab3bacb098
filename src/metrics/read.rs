//! Reading what runs wrote, whoever wrote it.

use super::{EVALUATIONS, METRICS, run_of};
use crate::error::Result;
use miette::miette;
use serde_json::Value as Json;
use std::path::{Path, PathBuf};

/// What a curve is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantity {
    /// Its key in `metrics.jsonl`.
    pub key: &'static str,
    pub title: &'static str,
    /// Its ticks are powers of ten.
    pub log: bool,
}

impl Quantity {
    /// All that are drawn, in order.
    pub const ALL: [Quantity; 6] = [
        Quantity { key: "loss", title: "loss", log: false },
        Quantity { key: "validation_loss", title: "validation loss", log: false },
        Quantity { key: "accuracy", title: "accuracy", log: false },
        Quantity { key: "lr", title: "learning rate", log: false },
        Quantity { key: "grad_norm", title: "gradient norm", log: true },
        Quantity { key: "tokens_per_s", title: "tokens/s", log: false },
    ];
}

/// One step's numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    pub step: u64,
    pub tokens: f64,
    /// Seconds of training until here.
    pub seconds: f64,
    /// The whole line.
    pub line: Json,
}

/// One line of `eval.jsonl`.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    pub step: Option<u64>,
    pub line: Json,
}

/// What a run measured.
#[derive(Clone, Debug)]
pub struct RunMetrics {
    /// How people call it: its folder's name.
    pub name: String,
    pub folder: PathBuf,
    pub points: Vec<Point>,
    pub evaluations: Vec<Evaluation>,
}

impl RunMetrics {
    /// The metrics of the run at `path`: its folder, a checkpoint in it, or a `.jsonl` file.
    ///
    /// # Errors
    /// Nothing there; a line that is no JSON object with a step.
    pub fn read(path: &Path) -> Result<Self> {
        let (folder, file) = match path.is_file() {
            true => (path.parent().unwrap_or(Path::new("")).to_path_buf(), path.to_path_buf()),
            false => {
                let run = run_of(path).ok_or_else(|| {
                    miette!(
                        help = "give the folder of a training run: what was --out DIR of rambac train",
                        "{}: there is no {METRICS} here",
                        path.display()
                    )
                })?;
                let file = run.join(METRICS);
                (run, file)
            }
        };
        let point = |line: Json| {
            let step = line["step"].as_u64()?;
            let of = |key: &str| line[key].as_f64();
            Some(Point {
                step,
                tokens: of("tokens").unwrap_or(f64::NAN),
                seconds: of("seconds").unwrap_or(f64::NAN),
                line,
            })
        };
        let points = lines(&file, point, "a JSON object with a step")?;
        if points.is_empty() {
            return Err(miette!("{}: no step was written yet", file.display()));
        }
        let evaluations = folder.join(EVALUATIONS);
        let evaluations = match evaluations.is_file() {
            true => lines(
                &evaluations,
                |line| line.is_object().then(|| Evaluation { step: line["step"].as_u64(), line }),
                "a JSON object",
            )?,
            false => vec![],
        };
        // `.` has a name, too.
        let named = if path.is_file() { path.to_path_buf() } else { folder.clone() };
        let name = named.canonicalize().unwrap_or(named);
        let name = name.file_name().map_or("run".into(), |n| n.to_string_lossy().into_owned());
        Ok(Self { name, folder, points, evaluations })
    }

    /// `(point, value)` wherever the key is a finite number; accuracies also come from evaluations of known steps, whose
    /// mean over lengths counts.
    pub fn values(&self, key: &str) -> Vec<(Point, f64)> {
        let of = |p: &Point| Some((p.clone(), p.line[key].as_f64().filter(|v| v.is_finite())?));
        let measured: Vec<(Point, f64)> = self.points.iter().filter_map(of).collect();
        if !measured.is_empty() || key != "accuracy" {
            return measured;
        }
        let mut by_step: Vec<(u64, Vec<f64>)> = vec![];
        for e in &self.evaluations {
            let (Some(step), Some(x)) = (e.step, e.line[key].as_f64()) else { continue };
            match by_step.iter_mut().find(|b| b.0 == step) {
                Some(b) => b.1.push(x),
                None => by_step.push((step, vec![x])),
            }
        }
        by_step.sort_by_key(|b| b.0);
        let at = |step: u64| self.points.iter().rev().find(|p| p.step <= step).cloned();
        by_step.into_iter().filter_map(|(s, x)| Some((at(s)?, x.iter().sum::<f64>() / x.len() as f64))).collect()
    }
}

/// Every line of `path` by `f`; the last one may be cut short, as when a run is killed while it writes.
fn lines<T>(path: &Path, f: impl Fn(Json) -> Option<T>, expected: &str) -> Result<Vec<T>> {
    let bytes = std::fs::read(path).map_err(|e| miette!("{}: {e}", path.display()))?;
    let text = String::from_utf8_lossy(&bytes);
    let mut out = vec![];
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        match serde_json::from_str(line).ok().and_then(&f) {
            Some(x) => out.push(x),
            None if i + 1 == text.lines().count() && !text.ends_with('\n') => {}
            None => return Err(miette!("{}:{}: this line is not {expected}", path.display(), i + 1)),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cut_lines_and_wrong_ones() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(METRICS);
        let whole = "{\"step\":1,\"loss\":2.5,\"tokens\":64,\"seconds\":0.5}\n{\"step\":2,\"loss\":null}\n";
        std::fs::write(&file, format!("{whole}{{\"step\":3,\"lo")).unwrap();
        let r = RunMetrics::read(dir.path()).unwrap();
        assert_eq!(r.points.iter().map(|p| p.step).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(r.values("loss").iter().map(|v| v.1).collect::<Vec<_>>(), [2.5]);
        let eval = "{\"step\":1,\"len\":64,\"accuracy\":0.5}\n{\"step\":1,\"len\":128,\"accuracy\":0.7}\n";
        std::fs::write(dir.path().join(EVALUATIONS), eval).unwrap();
        let r = RunMetrics::read(dir.path()).unwrap();
        assert!((r.values("accuracy")[0].1 - 0.6).abs() < 1e-12);
        std::fs::write(&file, format!("oops\n{whole}")).unwrap();
        let e = RunMetrics::read(dir.path()).unwrap_err().to_string();
        assert!(e.contains("metrics.jsonl:1: this line is not a JSON object"), "{e}");
        std::fs::write(&file, "").unwrap();
        assert!(RunMetrics::read(dir.path()).unwrap_err().to_string().contains("no step was written"));
        assert!(
            RunMetrics::read(&dir.path().join("none")).unwrap_err().to_string().contains("there is no metrics.jsonl")
        );
    }
}
