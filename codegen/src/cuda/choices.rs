//! Choices that were measured on a device, kept beside the compiled kernels.
//!
//! A choice lies in `FOLDER/choices/DEVICE/OP-KEY.json`, where the key is a hash of the device's name, its architecture and the step
//! with all its sizes: op, attributes, types, distances of rows.  The file says all of that in words, what every candidate took
//! or why it was refused, and its own hash.  It appears by rename.  A choice among other candidates than there are now, because a
//! template or a list of tiles changed, is as good as none.

use super::cache::Cache;
use super::form::Form;
use super::target::{Arch, Target};
use crate::hash::{Parts, sha256};
use crate::program::{Step, View};
use rambac_ir::{Bindings, DimError};
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};

/// Of the files' form.
const VERSION: u32 = 1;

/// A file beyond this is taken for garbage.
const MOST: u64 = 1 << 20;

/// What became of a candidate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Its results are right, and it took so many seconds.
    Seconds(f64),
    /// Why it is never to be taken.
    Refused(String),
}

/// A way to run a step, and what became of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Candidate {
    pub form: String,
    pub why: String,
    /// See [`fingerprint`].
    pub fingerprint: String,
    pub verdict: Verdict,
}

/// A measured choice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    version: u32,
    pub device: String,
    pub arch: String,
    /// The step in words; see [`site`].
    pub step: String,
    /// In the order in which they were predicted to be best: the first is what runs where nothing is measured.
    pub candidates: Vec<Candidate>,
    /// The place of the fastest that is right.
    pub chosen: usize,
}

impl Choice {
    /// `None` if no candidate is right.
    pub fn new(device: &str, arch: Arch, step: String, candidates: Vec<Candidate>) -> Option<Choice> {
        let seconds = |c: &Candidate| match c.verdict {
            Verdict::Seconds(s) if s.is_finite() => Some(s),
            _ => None,
        };
        // Of equals the one that was predicted.
        let all = candidates.iter().enumerate().filter_map(|(i, c)| Some((i, seconds(c)?)));
        let chosen = all.min_by(|a, b| a.1.total_cmp(&b.1)).map(|a| a.0)?;
        Some(Choice { version: VERSION, device: device.into(), arch: arch.to_string(), step, candidates, chosen })
    }
    /// What was chosen, and in how many seconds it ran.
    pub fn best(&self) -> (&Candidate, f64) {
        match &self.candidates[self.chosen] {
            c @ Candidate { verdict: Verdict::Seconds(s), .. } => (c, *s),
            _ => unreachable!("BUG: a choice is made of what ran"),
        }
    }
    /// How much faster it is than what would run without it; `None` where that was refused.
    pub fn gain(&self) -> Option<f64> {
        match self.candidates[0].verdict {
            Verdict::Seconds(s) => Some(s / self.best().1),
            Verdict::Refused(_) => None,
        }
    }
    /// In a line, for `explain`.
    pub fn reason(&self) -> String {
        let seconds = super::tune::duration(self.best().1);
        let than = match (self.chosen, self.gain()) {
            (0, _) => "as predicted".to_string(),
            (_, Some(g)) => format!("{g:.2} times as fast as {}, which was predicted", self.candidates[0].form),
            (_, None) => format!("{}, which was predicted, gives wrong results", self.candidates[0].form),
        };
        format!("measured on {}: {seconds}, {than}; {}", self.device, self.best().0.why)
    }
    fn sound(&self) -> bool {
        let runs = |c: &Candidate| matches!(c.verdict, Verdict::Seconds(s) if s.is_finite());
        self.version == VERSION && self.candidates.get(self.chosen).is_some_and(runs)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    choice: Choice,
    sha256: String,
}

fn seal(choice: &Choice) -> String {
    sha256(serde_json::to_string(choice).expect("BUG: a choice is plain data").as_bytes())
}

/// A file of a choice, as `list` and `verify` show it.
#[derive(Clone, Debug)]
pub struct Kept {
    pub path: PathBuf,
    pub bytes: u64,
    /// Or what is wrong with it.
    pub choice: Result<Choice, String>,
}

/// What makes a form this form: its calls, their kernels' texts and headers, its workspace.
pub fn fingerprint(f: &Form) -> String {
    let plain = Form { why: String::new(), measured: false, when: vec![], ..f.clone() };
    let mut p = Parts::default();
    p.add(super::describe::form(&plain).to_string().as_bytes());
    for l in f.launches() {
        p.add(super::describe::kernel(&l.kernel).to_string().as_bytes());
    }
    let mut all = p.finish();
    all.truncate(32);
    all
}

/// A step in words, with the sizes that `b` gives it.
///
/// # Errors
/// A dim without a value.
pub fn site(step: &Step, b: &Bindings) -> Result<String, DimError> {
    let view = |v: &View| -> Result<String, DimError> {
        let mut s = v.ty.bind(b)?.to_string();
        if let Some(r) = &v.strided {
            s += &format!(" in rows of {} every {}", r.cols.eval(b)?, r.stride.eval(b)?);
        }
        // What matters of a place is how it is aligned.
        match v.offset.eval(b)? * v.ty.dtype.size() % 128 {
            0 => Ok(s),
            at => Ok(format!("{s} from byte {at}")),
        }
    };
    let list = |all: &[View]| all.iter().map(view).collect::<Result<Vec<_>, _>>().map(|v| v.join(", "));
    // A shape among the attributes is that of a result.
    let attrs = step.op.attrs().into_iter().filter(|a| a.0 != "shape").map(|(n, a)| format!("{n} = {a}"));
    let attrs = attrs.collect::<Vec<_>>().join(", ");
    Ok(format!("{} {{{attrs}}} of {} to {}", step.op.mnemonic(), list(&step.inputs)?, list(&step.outputs)?))
}

/// A device's name as a folder can have it.
fn slug(device: &str) -> String {
    let c = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    device.chars().take(80).map(c).collect()
}

fn file(device: &str, target: &Target, site: &str) -> String {
    let mut p = Parts::default();
    p.add(&VERSION.to_le_bytes()).add(device.as_bytes()).add(target.arch.name().as_bytes()).add(site.as_bytes());
    let op: String = site.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
    format!("{op}-{}.json", &p.finish()[..32])
}

fn read(path: &Path) -> Result<Option<Choice>, String> {
    match std::fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e.to_string()),
        Ok(m) if m.len() > MOST => return Err(format!("it has {} bytes", m.len())),
        Ok(_) => {}
    }
    let text = std::fs::read(path).map_err(|e| e.to_string())?;
    let s: Sealed = serde_json::from_slice(&text).map_err(|e| format!("it can't be read ({e})"))?;
    if s.sha256 != seal(&s.choice) || !s.choice.sound() {
        return Err("it is not what was written".into());
    }
    Ok(Some(s.choice))
}

impl Cache {
    fn choice_path(&self, device: &str, target: &Target, site: &str) -> Option<PathBuf> {
        Some(self.folder()?.join("choices").join(slug(device)).join(file(device, target, site)))
    }

    /// The choice for a step in words, if one was made among these candidates.  A damaged one is none.
    pub fn choice(&self, device: &str, target: &Target, site: &str, candidates: &[Form]) -> Option<Choice> {
        let c = read(&self.choice_path(device, target, site)?).ok()??;
        let same = c.candidates.len() == candidates.len()
            && c.candidates.iter().zip(candidates).all(|(c, f)| c.fingerprint == fingerprint(f));
        let own = (c.device.as_str(), c.arch.as_str(), c.step.as_str()) == (device, target.arch.name(), site);
        (same && own).then_some(c)
    }

    /// Keeps a choice; that it can't be kept is no failure, see [`trouble`](Cache::trouble).
    pub fn keep(&self, target: &Target, choice: &Choice) {
        let Some(path) = self.choice_path(&choice.device, target, &choice.step) else { return };
        let sealed = Sealed { choice: choice.clone(), sha256: seal(choice) };
        let text = serde_json::to_string_pretty(&sealed).expect("BUG: a choice is plain data");
        if let Err(e) = super::cache::put(&path, text.as_bytes()) {
            self.troubled("measured choices", &path, &e);
        }
    }

    /// Devices on which something was measured.
    pub fn devices(&self) -> Vec<String> {
        let all = self.choices().unwrap_or_default();
        let mut names: Vec<String> = all.into_iter().filter_map(|k| Some(k.choice.ok()?.device)).collect();
        names.sort();
        names.dedup();
        names
    }

    /// All choices, by device and step.
    ///
    /// # Errors
    /// A folder that can't be read; that there is none yet is no error.
    pub fn choices(&self) -> io::Result<Vec<Kept>> {
        let mut all = vec![];
        for path in self.choice_files()? {
            if path.extension().is_some_and(|e| e == "json") && !super::cache::is_unfinished(&path) {
                let bytes = std::fs::metadata(&path).map_or(0, |m| m.len());
                let choice = read(&path).and_then(|c| c.ok_or_else(|| "it is gone".into()));
                all.push(Kept { path, bytes, choice });
            }
        }
        all.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(all)
    }

    /// Files of choices, whole or not.
    pub(super) fn choice_files(&self) -> io::Result<Vec<PathBuf>> {
        let Some(folder) = self.folder() else { return Ok(vec![]) };
        let folder = folder.join("choices");
        let devices = match std::fs::read_dir(&folder) {
            Ok(f) => f,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            Err(e) => return Err(io::Error::new(e.kind(), format!("{}: {e}", folder.display()))),
        };
        let mut all = vec![];
        for device in devices.flatten().map(|d| d.path()).filter(|d| d.is_dir()) {
            let files = std::fs::read_dir(&device)
                .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", device.display())))?;
            all.extend(files.flatten().map(|f| f.path()).filter(|p| super::cache::is_ours(p)));
        }
        Ok(all)
    }
}
