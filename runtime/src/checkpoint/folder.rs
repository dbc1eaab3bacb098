//! A training run's checkpoints: each is whole or absent, whenever the process dies.
//!
//! ```text
//! DIR/step-00000123/config.json            the model
//!                   model.safetensors      its weights, under their published names
//!                   state.safetensors      the optimizer and whatever else resuming needs
//!                   trainer.json           the trainer's own settings and counters
//! DIR/latest -> step-00000123
//! DIR/.lock                                held while a process writes here
//! ```
//!
//! A step is written to `.tmp-…`, flushed file by file, and renamed; then `latest` is replaced by renaming a new link
//! over it.  So at any instant `latest` names a whole step (or, before the first, nothing), and a `step-…` folder
//! is never half-written or half-deleted.  `.tmp-…` is garbage unless the lock is held.

use super::error::CheckpointError;
use super::safetensors_io::{TensorFile, TensorRef, write_safetensors};
use super::weights::{CONFIG, WEIGHTS};
use serde_json::Value;
use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

const STATE: &str = "state.safetensors";
const TRAINER: &str = "trainer.json";
const LATEST: &str = "latest";
const LOCK: &str = ".lock";
const STEP: &str = "step-";
const TEMPORARY: &str = ".tmp-";

/// What one checkpoint holds.
#[derive(Clone, Copy, Debug)]
pub struct Snapshot<'a> {
    /// The text of config.json.
    pub config: &'a str,
    /// Under their published names.
    pub weights: &'a [TensorRef<'a>],
    /// Optimizer moments, carried states, …
    pub state: &'a [TensorRef<'a>],
    /// JSON text of the trainer's own.
    pub trainer: &'a str,
    /// Further files, e.g. tokenizer.json: plain names and contents.
    pub files: &'a [(&'a str, &'a [u8])],
}

/// The folder that a run writes its checkpoints to.  Holds the folder's lock until dropped.
#[derive(Debug)]
pub struct CheckpointDir {
    root: PathBuf,
    keep: Option<usize>,
    _lock: File,
}

impl CheckpointDir {
    /// Makes `root` if needed, proves that it can be written, takes its lock and removes what dead processes left.
    /// `keep` is how many of the newest checkpoints stay (at least 1; all if `None`).
    pub fn open(root: impl AsRef<Path>, keep: Option<usize>) -> Result<Self, CheckpointError> {
        let root = root.as_ref().to_path_buf();
        fs::create_dir_all(&root).map_err(CheckpointError::io(&root, "create this folder"))?;
        let path = root.join(LOCK);
        let mut options = File::options();
        let lock = options.create(true).truncate(false).write(true).open(&path);
        let lock = lock.map_err(CheckpointError::io(&path, "create it"))?;
        match lock.try_lock() {
            Ok(()) => remove_temporaries(&root)?,
            Err(TryLockError::WouldBlock) => return Err(CheckpointError::Locked { path: root }),
            // Some network file systems have no locks.  Then leftovers stay, since they might be someone's work.
            Err(TryLockError::Error(_)) => {}
        }
        Ok(Self { root, keep, _lock: lock })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Steps present, oldest first.
    pub fn steps(&self) -> Result<Vec<u64>, CheckpointError> {
        Ok(step_folders(&self.root)?.into_iter().map(|(step, _)| step).collect())
    }

    /// Writes a checkpoint and points `latest` at it; a checkpoint of the same step is replaced.  Returns its folder.
    /// After an error everything that was there before still is.
    pub fn save(&self, step: u64, snapshot: &Snapshot<'_>) -> Result<PathBuf, CheckpointError> {
        check(snapshot)?;
        let name = format!("{STEP}{step:08}");
        let (temporary, target) = (self.temporary(&name), self.root.join(&name));
        let written = write_step(&temporary, snapshot).and_then(|()| replace(&temporary, &target));
        if let Err(e) = written {
            // Gives back the space, which may be what was lacking; the error to report is the first one.
            let _ = fs::remove_dir_all(&temporary);
            return Err(e);
        }
        sync_dir(&self.root)?;
        self.point_latest_at(&name)?;
        // Holds the replaced step, if there was one.
        remove_dir(&temporary)?;
        self.prune(step)?;
        Ok(target)
    }

    fn temporary(&self, name: &str) -> PathBuf {
        self.root.join(format!("{TEMPORARY}{}-{name}", std::process::id()))
    }

    fn point_latest_at(&self, name: &str) -> Result<(), CheckpointError> {
        let (link, latest) = (self.temporary(LATEST), self.root.join(LATEST));
        match fs::remove_file(&link) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(CheckpointError::io(&link, "remove it")(e)),
            _ => {}
        }
        // Relative, so that the folder can be moved.
        std::os::unix::fs::symlink(name, &link).map_err(CheckpointError::io(&link, "create this link"))?;
        fs::rename(&link, &latest).map_err(CheckpointError::io(&latest, "replace this link"))?;
        sync_dir(&self.root)
    }

    /// Removes all but the newest steps; the one just written stays whatever its number, as `latest` points at it.
    fn prune(&self, written: u64) -> Result<(), CheckpointError> {
        let Some(keep) = self.keep else { return Ok(()) };
        let others = step_folders(&self.root)?.into_iter().rev().filter(|(step, _)| *step != written);
        for (_, path) in others.skip(keep.max(1) - 1) {
            // Renamed first: a step that is being deleted must not look like a step.
            let doomed = self.temporary("old");
            remove_dir(&doomed)?;
            fs::rename(&path, &doomed).map_err(CheckpointError::io(&path, "remove this old checkpoint"))?;
            remove_dir(&doomed)?;
        }
        Ok(())
    }
}

/// Refuses what [`Checkpoint::open`] would not read again.
fn check(snapshot: &Snapshot<'_>) -> Result<(), CheckpointError> {
    for (name, text) in [(CONFIG, snapshot.config), (TRAINER, snapshot.trainer)] {
        if let Err(e) = serde_json::from_str::<Value>(text) {
            return Err(CheckpointError::Unsavable { what: format!("{name} to be written is not valid JSON ({e})") });
        }
    }
    for (name, _) in snapshot.files {
        let plain = Path::new(name).file_name().is_some_and(|n| n == *name);
        if !plain || [CONFIG, TRAINER, STATE, WEIGHTS].contains(name) {
            return Err(CheckpointError::Unsavable { what: format!("{name:?} is reserved or not a plain file name") });
        }
    }
    Ok(())
}

fn write_step(dir: &Path, snapshot: &Snapshot<'_>) -> Result<(), CheckpointError> {
    remove_dir(dir)?;
    fs::create_dir(dir).map_err(CheckpointError::io(dir, "create this folder"))?;
    write_file(&dir.join(CONFIG), snapshot.config.as_bytes())?;
    write_file(&dir.join(TRAINER), snapshot.trainer.as_bytes())?;
    for (name, bytes) in snapshot.files {
        write_file(&dir.join(name), bytes)?;
    }
    write_safetensors(&dir.join(WEIGHTS), snapshot.weights, &[])?;
    write_safetensors(&dir.join(STATE), snapshot.state, &[])?;
    sync_dir(dir)
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let mut file = File::create(path).map_err(CheckpointError::io(path, "create it"))?;
    file.write_all(bytes).map_err(CheckpointError::io(path, "write it"))?;
    file.sync_all().map_err(CheckpointError::io(path, "flush it to the disk"))
}

/// A rename is on the disk only once its folder is.
fn sync_dir(path: &Path) -> Result<(), CheckpointError> {
    let dir = File::open(path).map_err(CheckpointError::io(path, "open this folder"))?;
    match dir.sync_all() {
        // File systems that cannot flush folders say so; there is nothing more to be done then.
        Err(e) if !matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => {
            Err(CheckpointError::io(path, "flush this folder to the disk")(e))
        }
        _ => Ok(()),
    }
}

/// Moves folder `from` to `to`.  If `to` exists the two change places, so that there is a whole `to` at every instant.
fn replace(from: &Path, to: &Path) -> Result<(), CheckpointError> {
    if fs::symlink_metadata(to).is_err() {
        return fs::rename(from, to).map_err(CheckpointError::io(to, "put the new checkpoint here"));
    }
    match exchange(from, to) {
        // Without an atomic exchange there is a moment without `to`; `latest()` then falls back to an older step.
        Err(e) if matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => {
            let old = from.with_extension("old");
            remove_dir(&old)?;
            fs::rename(to, &old).map_err(CheckpointError::io(to, "move the old checkpoint away"))?;
            fs::rename(from, to).map_err(CheckpointError::io(to, "put the new checkpoint here"))?;
            remove_dir(&old)
        }
        other => other.map_err(CheckpointError::io(to, "replace this checkpoint")),
    }
}

#[cfg(target_os = "linux")]
fn exchange(a: &Path, b: &Path) -> std::io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let [a, b] = [a, b].map(|p| std::ffi::CString::new(p.as_os_str().as_bytes()));
    let (a, b) = (a?, b?);
    // SAFETY: two valid C strings that outlive the call.
    let done =
        unsafe { libc::renameat2(libc::AT_FDCWD, a.as_ptr(), libc::AT_FDCWD, b.as_ptr(), libc::RENAME_EXCHANGE) };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[cfg(not(target_os = "linux"))]
fn exchange(_: &Path, _: &Path) -> std::io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

/// Removes a folder and all in it; fine if there is none.
fn remove_dir(path: &Path) -> Result<(), CheckpointError> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(CheckpointError::io(path, "remove it")(e)),
        _ => Ok(()),
    }
}

fn remove_temporaries(root: &Path) -> Result<(), CheckpointError> {
    for entry in fs::read_dir(root).map_err(CheckpointError::io(root, "list this folder"))? {
        let path = entry.map_err(CheckpointError::io(root, "list this folder"))?.path();
        if path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(TEMPORARY)) {
            let is_dir = fs::symlink_metadata(&path).is_ok_and(|m| m.is_dir());
            let removed = if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(CheckpointError::io(&path, "remove this leftover"))?;
        }
    }
    Ok(())
}

/// Every `step-…` folder of `root`, by step.
fn step_folders(root: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    let mut steps = vec![];
    for entry in fs::read_dir(root).map_err(CheckpointError::io(root, "list this folder"))? {
        let path = entry.map_err(CheckpointError::io(root, "list this folder"))?.path();
        if let Some(step) = step_of(&path) {
            steps.push((step, path));
        }
    }
    steps.sort();
    Ok(steps)
}

fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix(STEP)?.parse().ok()
}

/// The newest whole checkpoint of a run's folder: what `latest` points at or, if that is missing or broken, the
/// highest step that is whole.
pub fn latest(dir: impl AsRef<Path>) -> Result<PathBuf, CheckpointError> {
    Checkpoint::open_latest(dir.as_ref()).map(|c| c.path)
}

/// A checkpoint read back.
#[derive(Debug)]
pub struct Checkpoint {
    /// Its folder.
    pub path: PathBuf,
    /// Its step, if the folder still has its name.
    pub step: Option<u64>,
    /// The text of config.json.
    pub config: String,
    /// The text of trainer.json.
    pub trainer: String,
    /// The weights.
    pub model: TensorFile,
    /// The optimizer and other state.
    pub state: TensorFile,
}

impl Checkpoint {
    /// Opens a checkpoint's folder, or the newest one of a run's folder, and checks that it is whole.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = path.as_ref();
        // A run's folder has no trainer.json of its own.
        let is_run = path.is_dir() && !path.join(TRAINER).exists() && step_of(path).is_none();
        if is_run { Self::open_latest(path) } else { Self::open_step(path) }
    }

    fn open_latest(dir: &Path) -> Result<Self, CheckpointError> {
        let mut broken = vec![];
        // Through the link's target, so that a `latest` that moves on meanwhile does not mix two checkpoints.
        let newest = fs::read_link(dir.join(LATEST)).ok().map(|target| dir.join(target));
        let others = step_folders(dir)?.into_iter().rev().map(|(_, path)| path);
        for path in newest.iter().cloned().chain(others.filter(|p| Some(p) != newest.as_ref())) {
            match Self::open_step(&path) {
                Ok(found) => return Ok(found),
                Err(e) => broken.push(e.to_string()),
            }
        }
        Err(CheckpointError::NoCheckpoint { path: dir.into(), broken })
    }

    fn open_step(path: &Path) -> Result<Self, CheckpointError> {
        let text = |name: &str| {
            let file = path.join(name);
            let text = fs::read_to_string(&file).map_err(CheckpointError::io(&file, "read it"))?;
            let bad = |e| CheckpointError::Json { path: file.clone(), reason: format!("not valid JSON ({e})") };
            serde_json::from_str::<Value>(&text).map_err(bad)?;
            Ok(text)
        };
        Ok(Self {
            path: path.into(),
            step: step_of(path),
            config: text(CONFIG)?,
            trainer: text(TRAINER)?,
            model: TensorFile::open(path.join(WEIGHTS))?,
            state: TensorFile::open(path.join(STATE))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    fn save(dir: &CheckpointDir, step: u64, value: f32) -> Result<PathBuf, CheckpointError> {
        let values = vec![value; 1000];
        let tensors = [TensorRef::f32("w", &[1000], &values)];
        let trainer = format!(r#"{{"value": {value}}}"#);
        let files: &[(&str, &[u8])] = &[("tokenizer.json", b"{}")];
        dir.save(step, &Snapshot { config: "{}", weights: &tensors, state: &tensors, trainer: &trainer, files })
    }

    fn value(path: &Path) -> f32 {
        Checkpoint::open(path).unwrap().model.get_f32("w").unwrap().1[0]
    }

    #[test]
    fn saves_replaces_and_prunes() {
        let tmp = TempDir::new().unwrap();
        let root = tmp.path().join("a/run");
        let dir = CheckpointDir::open(&root, Some(2)).unwrap();
        assert!(latest(&root).unwrap_err().to_string().contains("no whole checkpoint"));
        for step in [1, 2, 30] {
            assert_eq!(save(&dir, step, step as f32).unwrap(), root.join(format!("step-{step:08}")));
        }
        assert_eq!(dir.steps().unwrap(), [2, 30]);
        // The same step again, as when a run ends on a step that was just saved.
        save(&dir, 30, 31.0).unwrap();
        assert_eq!(value(&root), 31.0);
        // A run that went back: its checkpoint is kept although newer steps exist.
        save(&dir, 4, 4.0).unwrap();
        assert_eq!(dir.steps().unwrap(), [4, 30]);
        assert_eq!(latest(&root).unwrap(), root.join("step-00000004"));
        assert_eq!(fs::read_link(root.join("latest")).unwrap(), Path::new("step-00000004"));
        for path in [root.clone(), root.join("latest"), root.join("step-00000004")] {
            let c = Checkpoint::open(&path).unwrap();
            assert_eq!((c.config.as_str(), c.trainer.as_str()), ("{}", r#"{"value": 4}"#));
            assert_eq!(c.state.get_f32("w").unwrap().1, [4.0; 1000]);
        }
        assert_eq!(fs::read(root.join("latest/tokenizer.json")).unwrap(), b"{}");
        let names: Vec<_> = fs::read_dir(&root).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 4, "{names:?}");
    }

    #[test]
    fn a_missing_or_broken_latest_falls_back() {
        let tmp = TempDir::new().unwrap();
        let dir = CheckpointDir::open(tmp.path(), None).unwrap();
        for step in [1, 2, 3] {
            save(&dir, step, step as f32).unwrap();
        }
        fs::remove_file(tmp.path().join("latest")).unwrap();
        assert_eq!(value(tmp.path()), 3.0);
        std::os::unix::fs::symlink("step-00000099", tmp.path().join("latest")).unwrap();
        assert_eq!(value(tmp.path()), 3.0);
        let model = tmp.path().join("step-00000003/model.safetensors");
        let bytes = fs::read(&model).unwrap();
        fs::write(&model, &bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(value(tmp.path()), 2.0);
        fs::write(tmp.path().join("step-00000002/trainer.json"), "{").unwrap();
        assert_eq!(value(tmp.path()), 1.0);
        fs::remove_file(tmp.path().join("step-00000001/state.safetensors")).unwrap();
        let m = latest(tmp.path()).unwrap_err().to_string();
        assert!(m.contains("truncated") && m.contains("trainer.json") && m.contains("state.safetensors"), "{m}");
    }

    #[test]
    fn leftovers_go_and_the_lock_holds() {
        let tmp = TempDir::new().unwrap();
        fs::create_dir_all(tmp.path().join(".tmp-123-step-00000001/x")).unwrap();
        std::os::unix::fs::symlink("nowhere", tmp.path().join(".tmp-123-latest")).unwrap();
        let dir = CheckpointDir::open(tmp.path(), None).unwrap();
        let names: Vec<_> = fs::read_dir(tmp.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, [".lock"]);
        let m = CheckpointDir::open(tmp.path(), None).unwrap_err().to_string();
        assert!(m.contains("another process"), "{m}");
        drop(dir);
        assert!(CheckpointDir::open(tmp.path(), None).is_ok());
    }

    #[test]
    fn unusable_places_and_contents_are_errors() {
        let tmp = TempDir::new().unwrap();
        let file = tmp.path().join("file");
        fs::write(&file, "").unwrap();
        let m = CheckpointDir::open(file.join("run"), None).unwrap_err().to_string();
        assert!(m.contains("cannot create this folder") && m.contains("file, not a folder"), "{m}");
        let m = CheckpointDir::open("/proc/rambac-test", None).unwrap_err().to_string();
        assert!(m.contains("/proc/rambac-test"), "{m}");
        let dir = CheckpointDir::open(tmp.path(), None).unwrap();
        let snapshot = Snapshot { config: "{}", weights: &[], state: &[], trainer: "{", files: &[] };
        assert!(dir.save(1, &snapshot).unwrap_err().to_string().contains("trainer.json"));
        for name in ["../x", "config.json", "", "a/b"] {
            let snapshot = Snapshot { trainer: "{}", files: &[(name, b"")], ..snapshot };
            assert!(dir.save(1, &snapshot).is_err(), "{name}");
        }
        assert!(Checkpoint::open(tmp.path().join("none")).is_err());
        assert!(dir.steps().unwrap().is_empty());
    }
}
