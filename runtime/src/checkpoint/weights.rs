//! A model's folder as published: config.json and weights in one safetensors file or in shards.

use super::error::{CheckpointError, Mismatch};
use super::safetensors_io::{TensorFile, TensorInfo};
use crate::bf16_data::Bf16Data;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The one file of unsharded weights.
pub(super) const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The configuration beside the weights.
pub(super) const CONFIG: &str = "config.json";

/// All tensors of a model, wherever they lie.
#[derive(Debug)]
pub struct WeightsFolder {
    path: PathBuf,
    config: Option<String>,
    files: Vec<TensorFile>,
    /// Name → (file, name in that file).
    tensors: BTreeMap<String, (usize, String)>,
}

impl WeightsFolder {
    /// Opens a folder with model.safetensors or model.safetensors.index.json (and perhaps config.json), or one
    /// safetensors file or index by its path.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = path.as_ref();
        let meta = fs::metadata(path).map_err(CheckpointError::io(path, "open it"))?;
        let dir = if meta.is_dir() { path } else { path.parent().unwrap_or(Path::new("")) };
        let file = if meta.is_dir() { find_weights(path)? } else { path.to_path_buf() };
        let (files, tensors) = match file.extension().and_then(|e| e.to_str()) {
            Some("json") => open_shards(&file)?,
            _ => {
                let f = TensorFile::open(&file)?;
                let tensors = f.names().map(|n| (n.to_string(), (0, n.to_string()))).collect();
                (vec![f], tensors)
            }
        };
        let config_path = dir.join(CONFIG);
        let config = match fs::read(&config_path) {
            Ok(bytes) => Some(String::from_utf8_lossy(&bytes).into_owned()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(CheckpointError::io(&config_path, "read it")(e)),
        };
        Ok(Self { path: path.into(), config, files, tensors })
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The text of config.json, if there is one.
    pub fn config(&self) -> Option<&str> {
        self.config.as_deref()
    }

    /// All tensors' names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Type and shape of a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        let (file, inner) = self.tensors.get(name)?;
        self.files[*file].info(inner)
    }

    /// Shape and values of a floating-point tensor, as float32.
    pub fn get_f32(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), CheckpointError> {
        let (file, inner) = self.find(name)?;
        file.get_f32(inner)
    }

    /// Shape and values of a floating-point tensor, as bf16: mapped, or rounded to nearest even.
    pub fn get_bf16(&self, name: &str) -> Result<(Vec<usize>, Bf16Data), CheckpointError> {
        let (file, inner) = self.find(name)?;
        file.get_bf16(inner)
    }

    /// Where a tensor lies.
    fn find(&self, name: &str) -> Result<(&TensorFile, &str), CheckpointError> {
        let missing =
            || CheckpointError::NoTensor { path: self.path.clone(), name: name.into(), count: self.tensors.len() };
        let (file, inner) = self.tensors.get(name).ok_or_else(missing)?;
        Ok((&self.files[*file], inner))
    }

    /// Calls every tensor by `canonical(its name)` from now on.  An error if two come to the same name.
    pub fn rename(&mut self, canonical: impl Fn(&str) -> Cow<'_, str>) -> Result<(), CheckpointError> {
        let mut renamed: BTreeMap<String, (usize, String)> = BTreeMap::new();
        let mut problems = vec![];
        for (old, (file, inner)) in &self.tensors {
            let name = canonical(old).into_owned();
            match renamed.get(&name) {
                Some((_, other)) => problems.push(Mismatch::Twice { name, found: [other.clone(), inner.clone()] }),
                None => {
                    renamed.insert(name, (*file, inner.clone()));
                }
            }
        }
        if !problems.is_empty() {
            return Err(CheckpointError::Mismatch { path: self.path.clone(), problems });
        }
        self.tensors = renamed;
        Ok(())
    }

    /// An error that lists every tensor of `expected` (name, shape) that is missing or has another shape, and every
    /// tensor that is not expected.  Names in `ignored` may be present without being expected.
    pub fn check<'e>(
        &self,
        expected: impl IntoIterator<Item = (&'e str, &'e [usize])>,
        ignored: &[&str],
    ) -> Result<(), CheckpointError> {
        let mut problems = vec![];
        let mut known: BTreeSet<&str> = ignored.iter().copied().collect();
        for (name, shape) in expected {
            known.insert(name);
            match self.info(name) {
                None => problems.push(Mismatch::Missing { name: name.into(), expected: shape.into() }),
                Some(info) if info.shape != shape => {
                    problems.push(Mismatch::Shape {
                        name: name.into(),
                        expected: shape.into(),
                        found: info.shape.clone(),
                    });
                }
                Some(_) => {}
            }
        }
        for name in self.names().filter(|n| !known.contains(n)) {
            let found = self.info(name).map(|i| i.shape.clone()).unwrap_or_default();
            problems.push(Mismatch::Unexpected { name: name.into(), found });
        }
        if problems.is_empty() { Ok(()) } else { Err(CheckpointError::Mismatch { path: self.path.clone(), problems }) }
    }
}

/// The weights' file or index in a folder.
fn find_weights(dir: &Path) -> Result<PathBuf, CheckpointError> {
    if let Some(path) = [WEIGHTS, INDEX].iter().map(|n| dir.join(n)).find(|p| p.exists()) {
        return Ok(path);
    }
    let pickles = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "pytorch_model-00001-of-00002.bin",
        "model.pt",
        "model.pth",
    ];
    match pickles.iter().map(|n| dir.join(n)).find(|p| p.exists()) {
        Some(path) => Err(CheckpointError::Pickle { path: path.with_file_name(pickles[0]) }),
        None => Err(CheckpointError::NoWeights { path: dir.into() }),
    }
}

type Shards = (Vec<TensorFile>, BTreeMap<String, (usize, String)>);

/// Opens every shard that an index names and checks that index and shards agree.
fn open_shards(index: &Path) -> Result<Shards, CheckpointError> {
    let bad = |reason: String| CheckpointError::Json { path: index.into(), reason };
    let bytes = fs::read(index).map_err(CheckpointError::io(index, "read it"))?;
    let json: Value = serde_json::from_slice(&bytes).map_err(|e| bad(format!("not valid JSON ({e})")))?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| bad("expected a \"weight_map\" of tensor names to shard files".into()))?;
    let mut shards: BTreeMap<&str, usize> = BTreeMap::new();
    let mut files = vec![];
    let mut tensors = BTreeMap::new();
    for (name, file) in map {
        // A plain name: an index must not reach outside its folder.
        let file = file.as_str().filter(|f| Path::new(f).file_name().is_some_and(|n| n == *f));
        let file = file.ok_or_else(|| bad(format!("the shard of {name:?} is not a plain file name: {}", map[name])))?;
        let at = match shards.get(file) {
            Some(&at) => at,
            None => {
                files.push(TensorFile::open(index.with_file_name(file))?);
                shards.insert(file, files.len() - 1);
                files.len() - 1
            }
        };
        tensors.insert(name.clone(), (at, name.clone()));
    }
    let mut wrong = vec![];
    for (name, (at, _)) in &tensors {
        if files[*at].info(name).is_none() {
            wrong.push(format!("{name} is not in {}", files[*at].path().display()));
        }
    }
    for (at, file) in files.iter().enumerate() {
        for name in file.names() {
            match tensors.get(name) {
                Some((owner, _)) if *owner == at => {}
                Some((owner, _)) => {
                    wrong.push(format!(
                        "{name} is in {} and in {}",
                        files[*owner].path().display(),
                        file.path().display()
                    ));
                }
                None => wrong.push(format!("{name} in {} is not in the index", file.path().display())),
            }
        }
    }
    if wrong.is_empty() {
        Ok((files, tensors))
    } else {
        Err(bad(format!("index and shards disagree: {}", wrong.join("; "))))
    }
}

#[cfg(test)]
mod tests {
    use super::super::safetensors_io::{TensorRef, write_safetensors};
    use super::*;
    use tempfile::TempDir;

    fn shard(dir: &TempDir, file: &str, names: &[&str]) {
        let tensors: Vec<_> = names.iter().map(|n| TensorRef::f32(*n, &[2], &[1.0, 2.0])).collect();
        write_safetensors(&dir.path().join(file), &tensors, &[]).unwrap();
    }

    fn index(dir: &TempDir, map: &str) {
        fs::write(dir.path().join(INDEX), format!(r#"{{"metadata":{{}},"weight_map":{map}}}"#)).unwrap();
    }

    fn message(dir: &TempDir) -> String {
        WeightsFolder::open(dir.path()).unwrap_err().to_string()
    }

    #[test]
    fn shards_are_one_set_of_tensors() {
        let dir = TempDir::new().unwrap();
        shard(&dir, "1.safetensors", &["a", "b"]);
        shard(&dir, "2.safetensors", &["c"]);
        index(&dir, r#"{"a":"1.safetensors","b":"1.safetensors","c":"2.safetensors"}"#);
        let w = WeightsFolder::open(dir.path()).unwrap();
        assert_eq!(w.names().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(w.get_f32("c").unwrap(), (vec![2], vec![1.0, 2.0]));
        assert_eq!(w.config(), None);
        fs::write(dir.path().join(CONFIG), "{}").unwrap();
        assert_eq!(WeightsFolder::open(dir.path().join(INDEX)).unwrap().config(), Some("{}"));
        assert_eq!(WeightsFolder::open(dir.path().join("1.safetensors")).unwrap().names().count(), 2);
    }

    #[test]
    fn disagreements_are_errors() {
        let dir = TempDir::new().unwrap();
        assert!(message(&dir).contains("no weights here"));
        shard(&dir, "1.safetensors", &["a", "b"]);
        index(&dir, r#"{"a":"1.safetensors","c":"1.safetensors"}"#);
        let m = message(&dir);
        assert!(m.contains("c is not in") && m.contains("b in") && m.contains("not in the index"), "{m}");
        shard(&dir, "2.safetensors", &["a"]);
        index(&dir, r#"{"a":"1.safetensors","b":"2.safetensors"}"#);
        assert!(message(&dir).contains("a is in"));
        index(&dir, r#"{"a":"missing.safetensors"}"#);
        assert!(message(&dir).contains("missing.safetensors: cannot open it"));
        for outside in ["../x.safetensors", "/etc/passwd", "a/b", "..", ""] {
            index(&dir, &format!(r#"{{"a":"{outside}"}}"#));
            assert!(message(&dir).contains("not a plain file name"), "{outside}");
        }
        index(&dir, r#"{"a":"pytorch_model.bin"}"#);
        assert!(message(&dir).contains("python -c"));
        fs::write(dir.path().join(INDEX), "{").unwrap();
        assert!(message(&dir).contains("not valid JSON"));
        fs::remove_file(dir.path().join(INDEX)).unwrap();
        fs::write(dir.path().join("pytorch_model.bin"), "x").unwrap();
        assert!(message(&dir).contains("python -c"));
    }

    #[test]
    fn all_mismatches_come_at_once() {
        let dir = TempDir::new().unwrap();
        shard(&dir, WEIGHTS, &["a", "b", "extra", "tied"]);
        let w = WeightsFolder::open(dir.path()).unwrap();
        let two: &[usize] = &[2];
        assert!(w.check([("a", two), ("b", two), ("extra", two)], &["tied"]).is_ok());
        let m = w.check([("a", two), ("b", &[1, 2][..]), ("new", two)], &["tied"]).unwrap_err().to_string();
        for part in
            ["3 problems", "missing: new [2]", "unexpected: extra [2]", "shape of b: expected [1, 2], found [2]"]
        {
            assert!(m.contains(part), "{m}");
        }
    }

    #[test]
    fn renamed_tensors_are_found_by_their_new_names() {
        let dir = TempDir::new().unwrap();
        shard(&dir, WEIGHTS, &["model.a", "b"]);
        let mut w = WeightsFolder::open(dir.path()).unwrap();
        w.rename(|n| n.strip_prefix("model.").unwrap_or(n).into()).unwrap();
        assert_eq!(w.get_f32("a").unwrap().0, [2]);
        assert!(!w.contains("model.a"));
        assert!(w.rename(|_| "same".into()).unwrap_err().to_string().contains("same comes twice"));
    }
}
