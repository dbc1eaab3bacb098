//! What kernels were compiled to, kept between runs.
//!
//! A kernel's files lie in `FOLDER/kernels/ARCH/` under its name and a hash of everything that decides what comes out:
//! the compiler, the options, the architecture, the stub and all headers that it includes.
//!
//! ```text
//! map_f32_4f2a11c0-9c4e….cu      the stub, to read
//! map_f32_4f2a11c0-9c4e….ptx
//! map_f32_4f2a11c0-9c4e….cubin
//! map_f32_4f2a11c0-9c4e….json    registers, spills, the compiler's log; sizes and hashes of the two above and of itself
//! ```
//! - Every file appears by rename, the `.json` last: without it there is no entry.  Processes need not know of each other.
//! - What is read is compared with its hashes; a damaged entry is compiled again.
//! - A folder that can't be written costs time, nothing else: [`Cache::trouble`] says so.
//!
//! Beside them lie choices that were measured, see [`choices`](super::choices).
//!
//! Deliberately absent: limits of size and age (`clear` costs time, nothing else), locks.

use super::compile::{OPTIONS, compile};
use super::form::Kernel;
use super::headers::included;
use super::target::Arch;
use crate::hash::{Parts, sha256};
use crate::nvrtc::{Compiled, Nvrtc, NvrtcError, Usage};
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

/// Names the folder; empty: nothing is kept.
pub const VARIABLE: &str = "RAMBAC_CACHE";

/// Of the files' form.
const VERSION: u32 = 1;

/// A record beyond this is taken for garbage.
const MAX_RECORD: u64 = 16 << 20;

/// A kernel that the compiler refused.
#[derive(Debug)]
pub struct CompileError {
    pub kernel: String,
    pub arch: Arch,
    /// The step it belongs to, where that is known.
    pub step: Option<String>,
    /// Where its text lies.
    pub stub: Option<PathBuf>,
    pub error: Box<NvrtcError>,
}

impl std::error::Error for CompileError {}

impl std::fmt::Display for CompileError {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        if let Some(s) = &self.step {
            write!(f, "{s}: ")?;
        }
        write!(f, "kernel {} for {}: {}", self.kernel, self.arch, self.error)?;
        match &self.stub {
            Some(p) => write!(f, "\nits text is in {}", p.display()),
            None => Ok(()),
        }
    }
}

/// A compilation's files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    bytes: u64,
    sha256: String,
}

impl Content {
    fn of(data: &[u8]) -> Content {
        Content { bytes: data.len() as u64, sha256: sha256(data) }
    }
}

/// What a `.json` holds beside the hash of this.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    key: String,
    kernel: String,
    arch: String,
    compiler: String,
    options: Vec<String>,
    headers: Vec<String>,
    threads: u32,
    dynamic_shared: u32,
    usage: Vec<Usage>,
    log: String,
    ptx: Content,
    cubin: Option<Content>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    record: Record,
    sha256: String,
}

impl Record {
    fn sealed(&self) -> Sealed {
        Sealed { record: self.clone(), sha256: sha256(self.text().as_bytes()) }
    }
    fn text(&self) -> String {
        serde_json::to_string(self).expect("BUG: a record is plain data")
    }
}

/// How often what happened since the cache was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    pub found: usize,
    pub compiled: usize,
    /// Of those compiled, entries that were there but broken.
    pub damaged: usize,
}

/// See the module's comment.
pub struct Cache {
    folder: Option<PathBuf>,
    trouble: OnceLock<String>,
    found: AtomicUsize,
    compiled: AtomicUsize,
    damaged: AtomicUsize,
}

/// An entry, as `list` and `verify` show it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The `.json`.
    pub path: PathBuf,
    pub arch: Arch,
    pub kernel: String,
    pub compiler: String,
    pub usage: Option<Usage>,
    /// Of all its files.
    pub bytes: u64,
    pub modified: Option<SystemTime>,
    /// What is wrong with it.
    pub damage: Option<String>,
}

/// What `clear` took away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cleared {
    pub entries: usize,
    /// Measured choices.
    pub choices: usize,
    pub files: usize,
    pub bytes: u64,
}

impl Cache {
    /// In `folder`, which need not exist.
    pub fn at(folder: impl Into<PathBuf>) -> Cache {
        Cache::new(Some(folder.into()))
    }
    /// Keeps nothing.
    pub fn none() -> Cache {
        Cache::new(None)
    }
    /// Where the variable says, else in the user's cache folder; without either, nothing is kept.
    pub fn standard() -> Cache {
        let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        if let Some(v) = std::env::var_os(VARIABLE) {
            return if v.is_empty() { Cache::none() } else { Cache::at(v) };
        }
        // A relative XDG path is to be ignored, says its specification.
        let xdg = set("XDG_CACHE_HOME").filter(|p| p.is_absolute());
        Cache::new(xdg.or_else(|| set("HOME").map(|h| h.join(".cache"))).map(|p| p.join("rambac")))
    }

    fn new(folder: Option<PathBuf>) -> Cache {
        let zero = || AtomicUsize::new(0);
        Cache { folder, trouble: OnceLock::new(), found: zero(), compiled: zero(), damaged: zero() }
    }

    /// `None`: nothing is kept.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }
    pub fn uses(&self) -> Uses {
        let of = |a: &AtomicUsize| a.load(Ordering::Relaxed);
        Uses { found: of(&self.found), compiled: of(&self.compiled), damaged: of(&self.damaged) }
    }
    /// Why something could not be kept: the first time that it happened.
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.get().map(String::as_str)
    }

    /// The kernel's code, from here or from the compiler.
    ///
    /// # Errors
    /// The compiler's, with the stub's path.
    pub fn compile(&self, nvrtc: &Nvrtc, kernel: &Kernel, arch: Arch) -> Result<Compiled, CompileError> {
        // Two builds of one version are told apart by size: hashing a hundred megabytes would cost more than it gives.
        let size = std::fs::metadata(&nvrtc.path).map_or(0, |m| m.len());
        let compiler = format!("{} ({size} bytes)", nvrtc.name());
        self.through(&compiler, kernel, arch, || compile(nvrtc, kernel, arch))
    }

    /// As [`compile`](Self::compile), by any compiler of that name.
    fn through(
        &self,
        compiler: &str,
        kernel: &Kernel,
        arch: Arch,
        make: impl FnOnce() -> Result<Compiled, NvrtcError>,
    ) -> Result<Compiled, CompileError> {
        let key = key(compiler, kernel, arch);
        let base =
            self.folder.as_ref().map(|f| f.join("kernels").join(arch.name()).join(file_name(&kernel.name, &key)));
        if let Some(base) = &base {
            match read(base, &key) {
                Ok(Some(c)) => {
                    self.found.fetch_add(1, Ordering::Relaxed);
                    return Ok(c);
                }
                Ok(None) => {}
                Err(_) => {
                    self.damaged.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        let made = make().map_err(|error| self.failed(&base, kernel, arch, error))?;
        self.compiled.fetch_add(1, Ordering::Relaxed);
        if let Some(base) = &base
            && let Err(e) = write(base, &key, compiler, kernel, arch, &made)
        {
            self.troubled("compiled kernels", base, &e);
        }
        Ok(made)
    }

    /// Says, once, that something can't be kept.
    pub(super) fn troubled(&self, what: &str, path: &Path, e: &io::Error) {
        self.trouble.get_or_init(|| {
            let folder = self.folder.as_deref().unwrap_or(path).display();
            format!(
                "{what} can't be kept in {folder} ({e}), so the next run makes them again; set {VARIABLE} to a folder \
                 that can be written"
            )
        });
    }

    fn failed(&self, base: &Option<PathBuf>, kernel: &Kernel, arch: Arch, error: NvrtcError) -> CompileError {
        let beside = base.clone().map(|b| with(&b, "cu"));
        let elsewhere = std::env::temp_dir().join(format!("rambac-{}.cu", short(&kernel.name)));
        let stub = beside.into_iter().chain([elsewhere]).find(|p| put(p, kernel.source.as_bytes()).is_ok());
        CompileError { kernel: kernel.name.clone(), arch, step: None, stub, error: Box::new(error) }
    }

    /// All entries, by architecture and name; `check`: contents are read and compared with their hashes.
    ///
    /// # Errors
    /// A folder that can't be read; that there is none yet is no error.
    pub fn entries(&self, check: bool) -> io::Result<Vec<Entry>> {
        let mut all = vec![];
        for (arch, path) in self.files()? {
            let Some(base) = path.extension().is_some_and(|e| e == "json").then(|| path.with_extension("")) else {
                continue;
            };
            let record = record(&base);
            let damage = match &record {
                Err(e) => Some(e.clone()),
                Ok(None) => Some("it is gone".into()),
                Ok(Some(r)) if check => read(&base, &r.key).err(),
                Ok(Some(_)) => None,
            };
            let record = record.ok().flatten();
            let size = |e: &str| std::fs::metadata(with(&base, e)).map_or(0, |m| m.len());
            let stem = base.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            all.push(Entry {
                arch,
                kernel: record.as_ref().map_or(stem, |r| r.kernel.clone()),
                compiler: record.as_ref().map_or(String::new(), |r| r.compiler.clone()),
                usage: record.as_ref().and_then(|r| r.usage.first().cloned()),
                bytes: EXTENSIONS.iter().map(|e| size(e)).sum(),
                modified: std::fs::metadata(&path).and_then(|m| m.modified()).ok(),
                damage,
                path,
            });
        }
        all.sort_by(|a, b| (a.arch, &a.kernel, &a.path).cmp(&(b.arch, &b.kernel, &b.path)));
        Ok(all)
    }

    /// Removes all entries and what broken-off runs left, and nothing else.
    ///
    /// # Errors
    /// A file that can't be removed.
    pub fn clear(&self) -> io::Result<Cleared> {
        let mut c = Cleared::default();
        let kernels: Vec<PathBuf> = self.files()?.into_iter().map(|f| f.1).collect();
        let choices = self.choice_files()?;
        for (path, choice) in kernels.iter().map(|p| (p, false)).chain(choices.iter().map(|p| (p, true))) {
            let bytes = std::fs::metadata(path).map_or(0, |m| m.len());
            match std::fs::remove_file(path) {
                Ok(()) => {}
                // Another process was faster.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(io::Error::new(e.kind(), format!("{}: {e}", path.display()))),
            }
            c.files += 1;
            c.bytes += bytes;
            match path.extension().is_some_and(|e| e == "json") {
                true if choice => c.choices += 1,
                true => c.entries += 1,
                false => {}
            }
        }
        Ok(c)
    }

    /// Files of entries, whole or not.
    fn files(&self) -> io::Result<Vec<(Arch, PathBuf)>> {
        let mut all = vec![];
        let Some(folder) = &self.folder else { return Ok(all) };
        for arch in Arch::ALL {
            let folder = folder.join("kernels").join(arch.name());
            let files = match std::fs::read_dir(&folder) {
                Ok(f) => f,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(io::Error::new(e.kind(), format!("{}: {e}", folder.display()))),
            };
            all.extend(files.flatten().map(|e| e.path()).filter(|p| is_ours(p)).map(|p| (arch, p)));
        }
        Ok(all)
    }
}

const EXTENSIONS: [&str; 4] = ["json", "cu", "ptx", "cubin"];

/// Whether a file is one that a broken-off run left.
pub(super) fn is_unfinished(p: &Path) -> bool {
    p.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'))
}

/// Whether a file's name is one that this module gives: `NAME-KEY.EXTENSION`, perhaps with what marks it unfinished.
pub(super) fn is_ours(p: &Path) -> bool {
    let Some(name) = p.file_name().and_then(|n| n.to_str()) else { return false };
    let name = match name.strip_prefix('.').and_then(|n| n.split_once(".new-")) {
        Some((whole, _)) => whole,
        None => name,
    };
    let Some((stem, extension)) = name.rsplit_once('.') else { return false };
    let key = stem.rsplit_once('-').map_or("", |s| s.1);
    EXTENSIONS.contains(&extension) && key.len() == 32 && key.bytes().all(|b| b.is_ascii_hexdigit())
}

/// A hash of everything that decides what a compilation gives.
fn key(compiler: &str, kernel: &Kernel, arch: Arch) -> String {
    let mut p = Parts::default();
    p.add(&VERSION.to_le_bytes()).add(compiler.as_bytes()).add(arch.name().as_bytes());
    OPTIONS.iter().for_each(|o| {
        p.add(o.as_bytes());
    });
    p.add(kernel.name.as_bytes()).add(kernel.source.as_bytes());
    p.add(super::headers::hash(&kernel.source).as_bytes());
    let mut key = p.finish();
    key.truncate(32);
    key
}

/// A name that a file can have.
fn short(name: &str) -> String {
    name.chars().take(120).map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' }).collect()
}

fn file_name(kernel: &str, key: &str) -> String {
    format!("{}-{key}", short(kernel))
}

fn with(base: &Path, extension: &str) -> PathBuf {
    let mut s = base.as_os_str().to_owned();
    s.push(".");
    s.push(extension);
    s.into()
}

/// The record of an entry, `None` if there is none; a text says what is wrong with it.
fn record(base: &Path) -> Result<Option<Record>, String> {
    let path = with(base, "json");
    match std::fs::metadata(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e.to_string()),
        Ok(m) if m.len() > MAX_RECORD => return Err(format!("its record has {} bytes", m.len())),
        Ok(_) => {}
    }
    let text = std::fs::read(&path).map_err(|e| e.to_string())?;
    let s: Sealed = serde_json::from_slice(&text).map_err(|e| format!("its record can't be read ({e})"))?;
    if s.sha256 != sha256(s.record.text().as_bytes()) {
        return Err("its record is not what was written".into());
    }
    Ok(Some(s.record))
}

/// An entry's code, `None` if there is none; a text says what is wrong with it.
fn read(base: &Path, key: &str) -> Result<Option<Compiled>, String> {
    let Some(r) = record(base)? else { return Ok(None) };
    if r.version != VERSION || r.key != key {
        return Err("its record belongs to another entry".into());
    }
    let content = |extension: &str, c: &Content| -> Result<Vec<u8>, String> {
        let path = with(base, extension);
        let size = std::fs::metadata(&path).map_err(|e| format!("its .{extension}: {e}"))?.len();
        if size != c.bytes {
            return Err(format!("its .{extension} has {size} bytes, {} were written", c.bytes));
        }
        let data = std::fs::read(&path).map_err(|e| format!("its .{extension}: {e}"))?;
        match Content::of(&data) == *c {
            true => Ok(data),
            false => Err(format!("its .{extension} is not what was written")),
        }
    };
    let ptx = String::from_utf8(content("ptx", &r.ptx)?).map_err(|_| "its .ptx is no text".to_string())?;
    let cubin = r.cubin.as_ref().map(|c| content("cubin", c)).transpose()?;
    Ok(Some(Compiled { ptx, cubin, log: r.log, usage: r.usage }))
}

fn write(base: &Path, key: &str, compiler: &str, kernel: &Kernel, arch: Arch, c: &Compiled) -> io::Result<()> {
    let names: Vec<&str> = included(&kernel.source).iter().map(|h| h.0).collect();
    let r = Record {
        version: VERSION,
        key: key.into(),
        kernel: kernel.name.clone(),
        arch: arch.name().into(),
        compiler: compiler.into(),
        options: OPTIONS.iter().map(|o| o.to_string()).collect(),
        headers: names.iter().map(|n| n.to_string()).collect(),
        threads: kernel.threads,
        dynamic_shared: kernel.shared,
        usage: c.usage.clone(),
        log: c.log.clone(),
        ptx: Content::of(c.ptx.as_bytes()),
        cubin: c.cubin.as_deref().map(Content::of),
    };
    let stub =
        format!("// {arch}, {compiler}, {}\n// includes {}\n{}", OPTIONS.join(" "), names.join(", "), kernel.source);
    put(&with(base, "cu"), stub.as_bytes())?;
    put(&with(base, "ptx"), c.ptx.as_bytes())?;
    if let Some(b) = &c.cubin {
        put(&with(base, "cubin"), b)?;
    }
    let text = serde_json::to_string_pretty(&r.sealed()).map_err(io::Error::other)?;
    put(&with(base, "json"), text.as_bytes())
}

/// Writes a file that is whole or absent.
pub(super) fn put(path: &Path, data: &[u8]) -> io::Result<()> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::other(format!("{} is no file's path", path.display())));
    };
    std::fs::create_dir_all(folder)?;
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    let new = folder.join(format!(".{}.new-{}-{n}", name.to_string_lossy(), std::process::id()));
    let written =
        std::fs::File::create(&new).and_then(|mut f| f.write_all(data)).and_then(|()| std::fs::rename(&new, path));
    if written.is_err() {
        // What is left of it helps nobody.
        let _ = std::fs::remove_file(&new);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    fn kernel(name: &str, source: &str) -> Kernel {
        Kernel { name: name.into(), source: source.into(), threads: 128, shared: 0, blocks_per_sm: 1 }
    }

    /// What a compiler would give, and as large as that is.
    fn code(k: &Kernel) -> Compiled {
        let usage = Usage { kernel: k.name.clone(), registers: 40, spill_stores: 8, ..Usage::default() };
        let cubin = k.source.bytes().cycle().take(20_000).collect();
        Compiled {
            ptx: format!(".visible .entry {}()", k.name),
            cubin: Some(cubin),
            log: "ok".into(),
            usage: vec![usage],
        }
    }

    fn get(c: &Cache, k: &Kernel) -> Compiled {
        c.through("cc 1", k, Arch::Sm80, || Ok(code(k))).unwrap()
    }

    fn same(a: &Compiled, b: &Compiled) -> bool {
        (&a.ptx, &a.cubin, &a.log, &a.usage) == (&b.ptx, &b.cubin, &b.log, &b.usage)
    }

    #[test]
    fn compiles_once() {
        let dir = TempDir::new().unwrap();
        let k = kernel("map_f32", "#include \"map.cuh\"\n");
        let (first, again) = (Cache::at(dir.path()), Cache::at(dir.path()));
        assert!(same(&get(&first, &k), &code(&k)) && same(&get(&again, &k), &code(&k)));
        assert_eq!(first.uses(), Uses { found: 0, compiled: 1, damaged: 0 });
        assert_eq!(again.uses(), Uses { found: 1, compiled: 0, damaged: 0 });
        let all = again.entries(true).unwrap();
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].kernel.as_str(), all[0].damage.clone()), ("map_f32", None));
        assert_eq!(all[0].usage.as_ref().map(|u| (u.registers, u.spill_stores)), Some((40, 8)));
        let stub = std::fs::read_to_string(with(&all[0].path.with_extension(""), "cu")).unwrap();
        assert!(
            stub.starts_with("// sm_80, cc 1, --std=c++17") && stub.contains("includes types.cuh, map.cuh"),
            "{stub}"
        );
        // Nothing of others is removed.
        let other = all[0].path.with_file_name("notes.json");
        std::fs::write(&other, "mine").unwrap();
        let c = again.clear().unwrap();
        assert_eq!((c.entries, c.files), (1, 4));
        assert!(other.exists() && again.entries(false).unwrap().is_empty());
    }

    #[test]
    fn everything_that_matters_is_in_the_key() {
        let k = kernel("k", "#include \"move.cuh\"\n");
        let base = key("cc 1", &k, Arch::Sm80);
        assert_eq!(base, key("cc 1", &k, Arch::Sm80));
        let others = [
            key("cc 2", &k, Arch::Sm80),
            key("cc 1", &k, Arch::Sm90a),
            key("cc 1", &kernel("l", &k.source), Arch::Sm80),
            key("cc 1", &kernel("k", "#include \"map.cuh\"\n"), Arch::Sm80),
            key("cc 1", &kernel("k", "#include \"move.cuh\"\n\n"), Arch::Sm80),
        ];
        assert!(others.iter().all(|o| *o != base), "{others:?}");
    }

    /// Every damage of every file is seen, and mended.
    #[test]
    fn damage_is_compiled_again() {
        let dir = TempDir::new().unwrap();
        let k = kernel("k", "source");
        get(&Cache::at(dir.path()), &k);
        let base = Cache::at(dir.path()).entries(false).unwrap()[0].path.with_extension("");
        let mut seen = 0;
        for extension in ["json", "ptx", "cubin"] {
            let path = with(&base, extension);
            let whole = std::fs::read(&path).unwrap();
            let step = (whole.len() / 40).max(1);
            let flipped = (0..whole.len()).step_by(step).map(|i| {
                let mut b = whole.clone();
                b[i] ^= 0x15;
                b
            });
            let cut = (0..whole.len()).step_by(step).map(|i| whole[..i].to_vec());
            for bad in flipped.chain(cut) {
                std::fs::write(&path, &bad).unwrap();
                let c = Cache::at(dir.path());
                // White space of a record may change without harm.
                let harmless = extension == "json" && c.entries(true).unwrap()[0].damage.is_none();
                assert!(same(&get(&c, &k), &code(&k)));
                assert_eq!(c.uses().damaged, !harmless as usize, "{extension}: {}", String::from_utf8_lossy(&bad));
                assert!(harmless || std::fs::read(&path).unwrap() == whole, "{extension} was not mended");
                std::fs::write(&path, &whole).unwrap();
                seen += 1;
            }
            std::fs::remove_file(&path).unwrap();
            get(&Cache::at(dir.path()), &k);
            assert_eq!(std::fs::read(&path).unwrap(), whole);
        }
        assert!(seen > 200, "{seen}");
    }

    /// As many processes: no cache knows of another.
    #[test]
    fn many_at_once() {
        let dir = TempDir::new().unwrap();
        let kernels: Vec<Kernel> = (0..6).map(|i| kernel(&format!("k{i}"), &format!("source {i}"))).collect();
        std::thread::scope(|s| {
            for t in 0..8 {
                let (dir, kernels) = (dir.path(), &kernels);
                s.spawn(move || {
                    for i in 0..30 {
                        let (c, k) = (Cache::at(dir), &kernels[(i + t) % kernels.len()]);
                        assert!(same(&get(&c, k), &code(k)));
                        assert_eq!((c.uses().damaged, c.trouble()), (0, None));
                    }
                });
            }
        });
        let c = Cache::at(dir.path());
        assert!(c.entries(true).unwrap().iter().all(|e| e.damage.is_none()));
        assert_eq!(c.clear().unwrap(), Cleared { entries: 6, choices: 0, files: 24, bytes: c_bytes(&kernels) });
    }

    fn c_bytes(kernels: &[Kernel]) -> u64 {
        let dir = TempDir::new().unwrap();
        kernels.iter().for_each(|k| drop(get(&Cache::at(dir.path()), k)));
        Cache::at(dir.path()).entries(false).unwrap().iter().map(|e| e.bytes).sum()
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_no_failure() {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let c = Cache::at(&file);
        for i in 0..3 {
            let k = kernel(&format!("k{i}"), "s");
            assert!(same(&get(&c, &k), &code(&k)));
        }
        let said = c.trouble().unwrap();
        assert!(said.contains("file") && said.contains(VARIABLE), "{said}");
        assert_eq!(Cache::none().entries(true).unwrap().len(), 0);
    }

    #[test]
    fn a_refused_kernel_is_shown() {
        let dir = TempDir::new().unwrap();
        let k = kernel("k", "nonsense");
        let refuse =
            || Err(NvrtcError::Compile { name: "k.cu".into(), options: "-O".into(), log: "line 1: what?".into() });
        let e = Cache::at(dir.path()).through("cc 1", &k, Arch::Sm80, refuse).err().unwrap();
        let e = CompileError { step: Some("g: step 3 (map)".into()), ..e };
        let text = e.to_string();
        let stub = e.stub.clone().unwrap();
        assert!(
            text.starts_with("g: step 3 (map): kernel k for sm_80: k.cu does not compile (-O):\nline 1: what?"),
            "{text}"
        );
        assert!(text.ends_with(&format!("its text is in {}", stub.display())), "{text}");
        assert_eq!(std::fs::read_to_string(stub).unwrap(), "nonsense");
        // A stub alone is no entry.
        assert!(Cache::at(dir.path()).entries(true).unwrap().is_empty());
    }
}
