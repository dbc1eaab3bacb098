//! Writes an executable; whole or not at all.

use super::error::ExecutableError;
use super::{DIGITS, HASH_AT, Mode, Part, TOKENIZER, VERSION, cubin_name, header_hash, ptx_name};
use crate::checkpoint::CheckpointError;
use crate::gpu::Code;
use crate::store::Store;
use crate::tensor::Data;
use half::bf16;
use rambac_codegen::cuda::{Arch, GpuProgram, Kernel, describe, kernel};
use rambac_codegen::describe::program;
use rambac_codegen::hash::Pieces;
use rambac_ir::ops::SourceKind;
use rambac_ir::{Bindings, DType, Ty};
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// What goes in.
pub struct Contents<'a> {
    pub mode: Mode,
    /// What was compiled, as it was named.
    pub model: &'a str,
    /// config.json of the model.
    pub config: Option<&'a str>,
    /// tokenizer.json of the model.
    pub tokenizer: Option<&'a [u8]>,
    /// How it was compiled, for people.
    pub settings: Value,
    pub parts: &'a [Part],
    /// Of every GPU target, in the order of the parts' programs: its kernels, and who compiled them.
    pub targets: &'a [(Arch, Code, String)],
    /// Holds every param of every part; `None` leaves weights out.
    pub weights: Option<&'a Store>,
}

/// Sizes in bytes of what was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    pub header: usize,
    pub kernels: usize,
    pub weights: usize,
    pub all: usize,
}

/// A tensor's elements.
#[derive(Clone, Copy)]
enum Elements<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    I32(&'a [i32]),
    Bool(&'a [u8]),
    Bytes(&'a [u8]),
}

struct Entry<'a> {
    name: String,
    shape: Vec<usize>,
    elements: Elements<'a>,
}

impl Elements<'_> {
    fn dtype(&self) -> (&'static str, usize) {
        match self {
            Elements::F32(_) => ("F32", 4),
            Elements::Bf16(_) => ("BF16", 2),
            Elements::I32(_) => ("I32", 4),
            Elements::Bool(_) => ("BOOL", 1),
            Elements::Bytes(_) => ("U8", 1),
        }
    }
    fn bytes(&self) -> usize {
        let n = match self {
            Elements::F32(v) => v.len(),
            Elements::Bf16(v) => v.len(),
            Elements::I32(v) => v.len(),
            Elements::Bool(v) | Elements::Bytes(v) => v.len(),
        };
        n * self.dtype().1
    }
    /// All bytes in order, lowest first, a piece at a time.
    fn pieces(&self, f: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        fn wide<T: Copy, const W: usize>(
            v: &[T],
            to: fn(T) -> [u8; W],
            f: &mut dyn FnMut(&[u8]) -> io::Result<()>,
        ) -> io::Result<()> {
            let mut buffer = vec![];
            for some in v.chunks(1 << 16) {
                buffer.clear();
                buffer.extend(some.iter().flat_map(|&x| to(x)));
                f(&buffer)?;
            }
            Ok(())
        }
        match *self {
            Elements::F32(v) => wide(v, f32::to_le_bytes, f),
            Elements::Bf16(v) => wide(v, bf16::to_le_bytes, f),
            Elements::I32(v) => wide(v, i32::to_le_bytes, f),
            Elements::Bool(v) | Elements::Bytes(v) => f(v),
        }
    }
    fn hash(&self) -> String {
        let mut p = Pieces::default();
        let hashed = self.pieces(&mut |b| {
            p.add(b);
            Ok(())
        });
        hashed.expect("BUG: hashing does no IO");
        p.finish()
    }
}

/// Writes `c` to `path`, over what is there.
///
/// # Errors
/// A weight that is missing or whose name is taken; what the system refuses.
pub fn write(path: &Path, c: &Contents) -> Result<Written, ExecutableError> {
    let names: Vec<&str> = c.parts.iter().map(|p| p.name.as_str()).collect();
    assert!(c.mode.takes(&names), "BUG: {names:?} are no parts of an executable that is to {}", c.mode.name());
    let mut entries = weights(c)?;
    let weight_bytes = entries.iter().map(|e| e.elements.bytes()).sum();
    let bytes = |name, b| Entry { name, shape: vec![<[u8]>::len(b)], elements: Elements::Bytes(b) };
    entries.extend(c.tokenizer.map(|t| bytes(TOKENIZER.into(), t)));
    let mut kernel_bytes = 0;
    for (i, (arch, code, _)) in c.targets.iter().enumerate() {
        for k in kernels(c.parts.iter().map(|p| &*p.gpu[i])) {
            let made = code.0.get(&k.name).unwrap_or_else(|| panic!("BUG: kernel {} was not compiled", k.name));
            let cubin = made.cubin.as_deref().unwrap_or_default();
            kernel_bytes += made.ptx.len() + cubin.len();
            entries.push(bytes(ptx_name(&k.name, *arch), made.ptx.as_bytes()));
            entries.push(bytes(cubin_name(&k.name, *arch), cubin));
        }
    }
    // Wide elements first: then every tensor is aligned to its own.
    entries.sort_by(|a, b| (b.elements.dtype().1, &a.name).cmp(&(a.elements.dtype().1, &b.name)));
    let texts = metadata(c);
    // Quoted, since that takes as long as making them.
    let made = || texts.par_iter().map(|(key, text)| (key.clone(), quoted(&text()))).collect::<Vec<_>>();
    let (metadata, hashes) =
        rayon::join(made, || entries.par_iter().map(|e| e.elements.hash()).collect::<Vec<String>>());
    let header = header(&metadata, &entries, &hashes);

    let write = |f: std::fs::File| -> io::Result<()> {
        let mut f = BufWriter::with_capacity(1 << 20, f);
        f.write_all(&header)?;
        for e in &entries {
            e.elements.pieces(&mut |b| f.write_all(b))?;
        }
        f.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
    };
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let new = path.with_file_name(format!(".{name}.new-{}", std::process::id()));
    let done = std::fs::File::create(&new).and_then(write).and_then(|()| std::fs::rename(&new, path));
    if let Err(e) = done {
        let _ = std::fs::remove_file(&new);
        return Err(CheckpointError::io(path, "write it")(e).into());
    }
    let all = header.len() + entries.iter().map(|e| e.elements.bytes()).sum::<usize>();
    Ok(Written { header: header.len(), kernels: kernel_bytes, weights: weight_bytes, all })
}

/// Every param once.
fn weights<'a>(c: &Contents<'a>) -> Result<Vec<Entry<'a>>, ExecutableError> {
    let Some(store) = c.weights else { return Ok(vec![]) };
    let unsavable = |what: String| Err(ExecutableError::Unsavable { what });
    let params = c.parts.iter().flat_map(|p| &p.program.sources).filter(|s| s.kind == SourceKind::Param);
    let params: BTreeMap<&str, &Ty> = params.map(|s| (s.name.as_str(), &s.ty)).collect();
    let mut out = vec![];
    for (name, ty) in params {
        if name.starts_with("kernel.") || name == TOKENIZER || name == "__metadata__" {
            return unsavable(format!("the param name {name:?} is reserved in executables; give it another"));
        }
        let Some(t) = store.get(name) else { return unsavable(format!("the weights lack the param {name:?}")) };
        // What the reader would call damaged is not written.
        let known = matches!(ty.dtype, DType::F32 | DType::BF16 | DType::I32);
        if !known || ty.bind(&Bindings::default()).ok().as_ref() != Some(&t.ty()) {
            let found = t.ty();
            return unsavable(format!(
                "the param {name:?} is {ty}, its weights are {found}; f32, bf16 and i32 can be saved"
            ));
        }
        let elements = match &t.data {
            Data::F32(v) => Elements::F32(v),
            Data::Bf16(v) => Elements::Bf16(v),
            Data::I32(v) => Elements::I32(v),
            Data::Bool(v) => Elements::Bool(v),
        };
        out.push(Entry { name: name.into(), shape: t.shape.clone(), elements });
    }
    Ok(out)
}

/// Every kernel of these programs once, by name.
pub(super) fn kernels<'a>(programs: impl Iterator<Item = &'a GpuProgram>) -> Vec<&'a Kernel> {
    let mut all: BTreeMap<&str, &Kernel> = BTreeMap::new();
    for k in programs.flat_map(|p| &p.kernels) {
        let first = all.entry(&k.name).or_insert(k);
        assert!(*first == k, "BUG: two kernels have the name {}", k.name);
    }
    all.into_values().collect()
}

/// A string of `__metadata__`, made when it is asked for.
type Text<'a> = (String, Box<dyn Fn() -> String + Sync + 'a>);

/// The strings of `__metadata__` but for its hash and the tensors' hashes.
fn metadata<'a>(c: &'a Contents) -> Vec<Text<'a>> {
    let mut m: Vec<Text> = vec![];
    let mut put = |key: String, text: Box<dyn Fn() -> String + Sync + 'a>| m.push((key, text));
    put("rambac_executable".into(), Box::new(|| VERSION.to_string()));
    put("compiler".into(), Box::new(|| concat!("rambac ", env!("CARGO_PKG_VERSION")).into()));
    put("model".into(), Box::new(|| c.model.into()));
    put("mode".into(), Box::new(|| c.mode.name().into()));
    put("settings".into(), Box::new(|| c.settings.to_string()));
    if let Some(config) = c.config {
        put("config".into(), Box::new(|| config.into()));
    }
    put("parts".into(), Box::new(|| json!(c.parts.iter().map(|p| &p.name).collect::<Vec<_>>()).to_string()));
    put("targets".into(), Box::new(|| json!(c.targets.iter().map(|t| t.0.name()).collect::<Vec<_>>()).to_string()));
    for p in c.parts {
        put(format!("ir.{}.before", p.name), Box::new(|| p.before.clone()));
        put(format!("ir.{}.after", p.name), Box::new(|| p.after.clone()));
        if let Some(text) = &p.after_gpu {
            put(format!("ir.{}.gpu", p.name), Box::new(|| text.clone()));
        }
        put(format!("program.{}", p.name), Box::new(|| program(&p.program).to_string()));
        for (gpu, (arch, ..)) in p.gpu.iter().zip(c.targets) {
            put(format!("gpu.{}.{arch}", p.name), Box::new(|| describe(gpu)));
        }
    }
    for (i, (arch, code, compiler)) in c.targets.iter().enumerate() {
        let one = |k: &Kernel| {
            let mut d = kernel(k);
            let usage = code.0.get(&k.name).and_then(|c| c.usage.first());
            d["usage"] = json!(usage);
            d
        };
        let all = move || -> Vec<Value> { kernels(c.parts.iter().map(|p| &*p.gpu[i])).into_iter().map(one).collect() };
        put(format!("kernels.{arch}"), Box::new(move || json!({ "compiler": compiler, "kernels": all() }).to_string()));
    }
    m
}

fn quoted(s: &str) -> String {
    serde_json::to_string(s).expect("BUG: any text can be quoted")
}

/// Length and header, padded so that the data is aligned.
fn header(metadata: &[(String, String)], entries: &[Entry], hashes: &[String]) -> Vec<u8> {
    let mut text = vec![0; 8];
    text.extend(HASH_AT);
    text.extend([b'0'; DIGITS]);
    text.push(b'"');
    let mut put = |parts: &[&str]| parts.iter().for_each(|p| text.extend(p.as_bytes()));
    let named: Map<String, Value> =
        entries.iter().zip(hashes).map(|(e, h)| (e.name.clone(), h.as_str().into())).collect();
    let named = quoted(&Value::Object(named).to_string());
    for (key, value) in metadata.iter().map(|(k, v)| (k.as_str(), v)).chain([("hashes", &named)]) {
        put(&[",", &quoted(key), ":", value]);
    }
    put(&["}"]);
    let mut at = 0;
    for e in entries {
        let end = at + e.elements.bytes();
        let (dtype, _) = e.elements.dtype();
        let tensor = json!({ "dtype": dtype, "shape": e.shape, "data_offsets": [at, end] });
        put(&[",", &quoted(&e.name), ":", &tensor.to_string()]);
        at = end;
    }
    put(&["}"]);
    text.resize(text.len().next_multiple_of(8), b' ');
    let length = text.len() as u64 - 8;
    text[..8].copy_from_slice(&length.to_le_bytes());
    let hash = header_hash(&text).expect("BUG: the hash is the first key");
    let digits = 8 + HASH_AT.len();
    text[digits..digits + DIGITS].copy_from_slice(hash.as_bytes());
    text
}
