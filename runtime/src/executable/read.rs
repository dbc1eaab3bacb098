//! Reads an executable: everything is checked before anything is used.

use super::error::ExecutableError;
use super::write::kernels;
use super::{DIGITS, HASH_AT, Mode, Part, TOKENIZER, VERSION, cubin_name, header_hash, ptx_name};
use crate::checkpoint::{Dtype, TensorFile};
use crate::gpu::Code;
use crate::store::Store;
use crate::tensor::Tensor;
use rambac_codegen::cuda::{Arch, Kernel, Launch, describe, kernel};
use rambac_codegen::describe::{difference, program};
use rambac_codegen::hash::sha256;
use rambac_codegen::nvrtc::{Compiled, Usage};
use rambac_ir::ops::SourceKind;
use rambac_ir::{DType, Ty, text, verify};
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

type Result<T> = std::result::Result<T, ExecutableError>;

/// A loaded executable; see [`open`](Executable::open).
pub struct Executable {
    pub mode: Mode,
    /// What was compiled, as it was named.
    pub model: String,
    /// Who made the file.
    pub compiler: String,
    /// config.json of the model, where it is one.
    pub config: Option<String>,
    /// How it was compiled.
    pub settings: Value,
    pub parts: Vec<Part>,
    /// Its GPU targets.
    pub targets: Vec<Arch>,
    file: TensorFile,
    hashes: BTreeMap<String, String>,
    /// Types of the params of all parts.
    params: BTreeMap<String, Ty>,
    kernels: Vec<Vec<KernelInfo>>,
}

/// A kernel and what it takes.
#[derive(Clone, Debug)]
pub struct KernelInfo {
    pub kernel: Kernel,
    pub usage: Option<Usage>,
    /// Of its PTX and CUBIN.
    pub bytes: [usize; 2],
}

impl std::fmt::Debug for Executable {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Executable({}, {})", self.file.path().display(), self.mode.name())
    }
}

/// The value of `kernels.ARCH`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredKernels {
    compiler: String,
    kernels: Vec<Value>,
}

/// The header's strings, each to be read once.
struct Metadata<'a> {
    path: &'a Path,
    all: BTreeMap<&'a str, &'a str>,
}

impl<'a> Metadata<'a> {
    fn optional(&mut self, key: &str) -> Option<&'a str> {
        self.all.remove(key)
    }
    fn take(&mut self, key: &str) -> Result<&'a str> {
        self.optional(key).ok_or_else(|| ExecutableError::damaged(self.path, format!("its header lacks {key}")))
    }
    fn json<T: for<'d> Deserialize<'d>>(&mut self, key: &str) -> Result<T> {
        let text = self.take(key)?;
        serde_json::from_str(text).map_err(|e| {
            ExecutableError::damaged(self.path, format!("{key} in its header is not what it should be ({e})"))
        })
    }
}

impl Executable {
    /// Maps a file and checks all of it but the weights' bytes, which are checked when they are read.
    ///
    /// # Errors
    /// No executable; damage; a graph that this version compiles to another program.
    pub fn open(path: impl AsRef<Path>) -> Result<Executable> {
        let path = path.as_ref();
        let file = TensorFile::open(path)?;
        check_header(path, &file)?;
        let damaged = |what: String| ExecutableError::damaged(path, what);
        let mut m = Metadata { path, all: file.metadata().iter().map(|(k, v)| (k.as_str(), v.as_str())).collect() };
        m.take("hash")?;
        m.take("rambac_executable")?;
        let compiler = m.take("compiler")?.to_string();
        let model = m.take("model")?.to_string();
        let mode = m.take("mode")?;
        let mode = Mode::from_name(mode).ok_or_else(|| damaged(format!("there is no mode {mode:?}")))?;
        let settings: Value = m.json("settings")?;
        let config = m.optional("config").map(str::to_string);
        let names: Vec<String> = m.json("parts")?;
        if !mode.takes(&names.iter().map(String::as_str).collect::<Vec<_>>()) {
            return Err(damaged(format!("{names:?} are no parts of an executable that is to {}", mode.name())));
        }
        let targets: Vec<String> = m.json("targets")?;
        let arch = |n: &String| Arch::from_name(n).ok_or_else(|| damaged(format!("there is no target {n:?}")));
        let targets = targets.iter().map(arch).collect::<Result<Vec<Arch>>>()?;
        if targets.iter().collect::<BTreeSet<_>>().len() != targets.len() {
            return Err(damaged("a target comes twice".into()));
        }
        let hashes: BTreeMap<String, String> = m.json("hashes")?;

        let compiled = names.iter().map(|n| part(path, &mut m, n, &targets, &compiler));
        let parts = compiled.collect::<Result<Vec<Part>>>()?;
        let mut stored = vec![];
        for (i, arch) in targets.iter().enumerate() {
            stored.push(stored_kernels(path, &mut m, &file, &parts, (i, *arch), &compiler)?);
        }
        if let Some(key) = m.all.keys().next() {
            return Err(damaged(format!("its header has {key:?}, which is not known")));
        }
        let mut params: BTreeMap<String, Ty> = BTreeMap::new();
        for s in parts.iter().flat_map(|p| &p.program.sources).filter(|s| s.kind == SourceKind::Param) {
            let known = params.entry(s.name.clone()).or_insert_with(|| s.ty.clone());
            if *known != s.ty {
                return Err(damaged(format!("the param {:?} is {known} in one part and {} in another", s.name, s.ty)));
            }
        }
        let e = Executable {
            mode,
            model,
            compiler,
            config,
            settings,
            parts,
            targets,
            file,
            hashes,
            params,
            kernels: stored,
        };
        e.check_tensors()?;
        Ok(e)
    }

    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The part of that name.
    pub fn part(&self, name: &str) -> Option<&Part> {
        self.parts.iter().find(|p| p.name == name)
    }

    /// Whether it holds weights.
    pub fn has_weights(&self) -> bool {
        self.params.keys().next().is_some_and(|n| self.file.info(n).is_some())
    }

    /// Number and bytes of its weights.
    pub fn weights_size(&self) -> (usize, usize) {
        let all = self.params.keys().filter_map(|n| self.file.info(n));
        all.fold((0, 0), |(n, b), t| (n + 1, b + t.shape.iter().product::<usize>() * t.dtype.size()))
    }

    /// Params of all parts.
    pub fn params(&self) -> impl Iterator<Item = (&str, &Ty)> {
        self.params.iter().map(|(n, t)| (n.as_str(), t))
    }

    /// Kernels of a target, by name.
    ///
    /// # Errors
    /// A target that it was not compiled for.
    pub fn kernels(&self, arch: Arch) -> Result<&[KernelInfo]> {
        Ok(&self.kernels[self.target(arch)?])
    }

    fn target(&self, arch: Arch) -> Result<usize> {
        let have: Vec<&str> = self.targets.iter().map(|a| a.name()).chain(["the cpu"]).collect();
        self.targets.iter().position(|a| *a == arch).ok_or_else(|| ExecutableError::NoTarget {
            path: self.path().into(),
            wanted: arch.to_string(),
            have: have.join(", "),
        })
    }

    /// A part's program for a GPU and the code of its kernels.
    ///
    /// # Errors
    /// A target that it was not compiled for.
    pub fn code(&self, part: &Part, arch: Arch) -> Result<(std::sync::Arc<rambac_codegen::cuda::GpuProgram>, Code)> {
        let i = self.target(arch)?;
        let program = part.gpu[i].clone();
        let mut code = Code::default();
        for k in &self.kernels[i] {
            let name = &k.kernel.name;
            if !program.kernels.iter().any(|p| p.name == *name) {
                continue;
            }
            let ptx = String::from_utf8_lossy(self.file.get_raw(&ptx_name(name, arch))?.1).into_owned();
            let cubin = Some(self.file.get_raw(&cubin_name(name, arch))?.1.to_vec());
            let usage = k.usage.clone().into_iter().collect();
            code.0.insert(name.clone(), Compiled { ptx, cubin, log: String::new(), usage });
        }
        Ok((program, code))
    }

    /// The weights, compared with their hashes; `None` if there are none in it.
    ///
    /// # Errors
    /// Damage.
    pub fn weights(&self) -> Result<Option<Store>> {
        if !self.has_weights() {
            return Ok(None);
        }
        let one = |name: &String| -> Result<(String, Tensor)> {
            self.check(name)?;
            let (info, _) = self.file.get_raw(name)?;
            let t = match info.dtype {
                Dtype::BF16 => {
                    let (shape, data) = self.file.get_bf16(name)?;
                    Tensor::bf16(&shape, data)
                }
                Dtype::I32 => {
                    let (shape, data) = self.file.get_i32(name)?;
                    Tensor::i32(&shape, data)
                }
                _ => {
                    let (shape, data) = self.file.get_f32(name)?;
                    Tensor::f32(&shape, data)
                }
            };
            Ok((name.clone(), t))
        };
        let names: Vec<&String> = self.params.keys().collect();
        let all = names.into_par_iter().map(one).collect::<Result<BTreeMap<_, _>>>()?;
        Ok(Some(Store(all)))
    }

    /// tokenizer.json, where it is in it.
    pub fn tokenizer(&self) -> Option<&[u8]> {
        self.file.get_raw(TOKENIZER).ok().map(|t| t.1)
    }

    /// Compares every byte with what was written.
    ///
    /// # Errors
    /// The first tensor that is damaged.
    pub fn verify(&self) -> Result<()> {
        let names: Vec<&String> = self.hashes.keys().collect();
        names.into_par_iter().try_for_each(|n| self.check(n))
    }

    /// Compares a tensor with its hash.
    fn check(&self, name: &str) -> Result<()> {
        check_tensor(&self.file, name, self.hashes.get(name))
    }

    /// Exactly the tensors that must be here, each with a hash; all but weights are compared with it.
    fn check_tensors(&self) -> Result<()> {
        let path = self.path();
        let damaged = |what: String| Err(ExecutableError::damaged(path, what));
        let mut left: BTreeSet<&str> = self.file.names().collect();
        let named: BTreeSet<&str> = self.hashes.keys().map(String::as_str).collect();
        if let Some(n) = left.symmetric_difference(&named).next() {
            return damaged(format!("the tensor {n:?} is not both in the file and among its hashes"));
        }
        let mut now: Vec<String> = vec![];
        for (arch, all) in self.targets.iter().zip(&self.kernels) {
            now.extend(all.iter().flat_map(|k| [ptx_name(&k.kernel.name, *arch), cubin_name(&k.kernel.name, *arch)]));
        }
        now.extend(left.get(TOKENIZER).map(|t| t.to_string()));
        now.par_iter().try_for_each(|n| self.check(n))?;
        now.iter().for_each(|n| {
            left.remove(n.as_str());
        });
        let weights = self.has_weights();
        for (name, ty) in self.params.iter().filter(|_| weights) {
            let Some(info) = self.file.info(name) else { return damaged(format!("the param {name:?} has no weights")) };
            let shape: Option<Vec<usize>> = ty.shape.iter().map(|d| d.as_int()).collect();
            let dtype = match ty.dtype {
                DType::F32 => Some(Dtype::F32),
                DType::BF16 => Some(Dtype::BF16),
                DType::I32 => Some(Dtype::I32),
                _ => None,
            };
            if shape.as_ref() != Some(&info.shape) || dtype != Some(info.dtype) {
                let found = format!("{} {:?}", info.dtype, info.shape);
                return damaged(format!("the param {name:?} is {ty}, but its weights are {found}"));
            }
            left.remove(name.as_str());
        }
        match left.first() {
            Some(n) => damaged(format!("no part uses the tensor {n:?}")),
            None => Ok(()),
        }
    }
}

fn check_tensor(file: &TensorFile, name: &str, hash: Option<&String>) -> Result<()> {
    let (_, bytes) = file.get_raw(name)?;
    match hash {
        Some(h) if *h == sha256(bytes) => Ok(()),
        _ => Err(ExecutableError::damaged(file.path(), format!("the bytes of {name:?} are not what was written"))),
    }
}

/// The header is an executable's, of this version, and what was written.
fn check_header(path: &Path, file: &TensorFile) -> Result<()> {
    let Some(version) = file.metadata().get("rambac_executable") else {
        return Err(ExecutableError::NotOne { path: path.into(), what: "a safetensors file without a program".into() });
    };
    if *version != VERSION.to_string() {
        let compiler = file.metadata().get("compiler").cloned().unwrap_or_else(|| "another version".into());
        return Err(ExecutableError::Version { path: path.into(), found: version.clone(), compiler });
    }
    let header = file.header();
    let at = 8 + HASH_AT.len();
    let written = header.get(at..at + DIGITS);
    match header_hash(header) {
        Some(h) if Some(h.as_bytes()) == written => Ok(()),
        _ => Err(ExecutableError::damaged(path, "its header is not what was written")),
    }
}

/// Compares a description with the one made here.
fn compare(path: &Path, compiler: &str, what: String, stored: &str, made: &str) -> Result<()> {
    // Texts are compared first: they are equal almost always, and reading megabytes of JSON takes longer.
    if stored == made {
        return Ok(());
    }
    let stored: Value = serde_json::from_str(stored)
        .map_err(|e| ExecutableError::damaged(path, format!("{what} in its header is not JSON ({e})")))?;
    let made: Value = serde_json::from_str(made).expect("BUG: a description is JSON");
    match difference(&stored, &made) {
        None => Ok(()),
        Some(at) => Err(ExecutableError::Differs { path: path.into(), compiler: compiler.into(), what, at }),
    }
}

/// Compiles a part from its graph, and refuses it if the file says otherwise.
fn part(path: &Path, m: &mut Metadata, name: &str, targets: &[Arch], compiler: &str) -> Result<Part> {
    let before = m.take(&format!("ir.{name}.before"))?;
    let after = m.take(&format!("ir.{name}.after"))?;
    let graph = |text: &str| {
        let g = text::parse(text).map_err(|e| ExecutableError::ir(path, name, &e))?;
        verify::verify(&g).map_err(|e| ExecutableError::ir(path, name, &e))?;
        Ok::<_, ExecutableError>(g)
    };
    graph(before)?;
    let after_gpu = m.optional(&format!("ir.{name}.gpu"));
    let gpu = after_gpu.map(graph).transpose()?;
    let gpu = after_gpu.map(String::from).zip(gpu.as_ref());
    let p = Part::lowered(name, before.into(), (after.into(), &graph(after)?), gpu, targets)?;
    let key = format!("program.{name}");
    compare(path, compiler, key.clone(), m.take(&key)?, &program(&p.program).to_string())?;
    for (gpu, arch) in p.gpu.iter().zip(targets) {
        let key = format!("gpu.{name}.{arch}");
        compare(path, compiler, key.clone(), m.take(&key)?, &describe(gpu))?;
    }
    Ok(p)
}

/// The kernels of target `i`: the ones that the parts launch, with code that fits.
fn stored_kernels(
    path: &Path,
    m: &mut Metadata,
    file: &TensorFile,
    parts: &[Part],
    (i, arch): (usize, Arch),
    compiler: &str,
) -> Result<Vec<KernelInfo>> {
    let damaged = |what: String| ExecutableError::damaged(path, what);
    let key = format!("kernels.{arch}");
    let mut stored: StoredKernels = m.json(&key)?;
    let wanted = kernels(parts.iter().map(|p| &*p.gpu[i]));
    let mut usages = vec![];
    for k in &mut stored.kernels {
        let usage = k.as_object_mut().and_then(|o| o.shift_remove("usage")).unwrap_or_default();
        let usage: Option<Usage> = serde_json::from_value(usage)
            .map_err(|e| damaged(format!("a kernel's usage in {key} is not what it should be ({e})")))?;
        usages.push(usage);
    }
    let made: Value = wanted.iter().map(|k| kernel(k)).collect();
    compare(path, compiler, key, &json!(stored.kernels).to_string(), &made.to_string())?;
    if stored.compiler.is_empty() {
        return Err(damaged("it does not say who compiled its kernels".into()));
    }
    let launches: Vec<&Launch> =
        parts.iter().flat_map(|p| &p.gpu[i].steps).flat_map(|s| s.forms.iter()).flat_map(|f| f.launches()).collect();
    let mut out = vec![];
    for (k, usage) in wanted.into_iter().zip(usages) {
        let code = |name: &str| -> Result<&[u8]> {
            let (info, bytes) = file.get_raw(name).map_err(|e| damaged(e.to_string()))?;
            if info.dtype != Dtype::U8 || info.shape.len() != 1 {
                return Err(damaged(format!("{name:?} holds no bytes but {} {:?}", info.dtype, info.shape)));
            }
            Ok(bytes)
        };
        let (ptx_at, cubin_at) = (ptx_name(&k.name, arch), cubin_name(&k.name, arch));
        let (ptx, cubin) = (code(&ptx_at)?, code(&cubin_at)?);
        let text = std::str::from_utf8(ptx).map_err(|_| damaged(format!("{ptx_at:?} is no text")))?;
        let arguments = launches.iter().find(|l| l.kernel.name == k.name).map_or(0, |l| l.params.len());
        if parameters(text, &k.name) != Some(arguments) {
            return Err(damaged(format!("{ptx_at:?} has no kernel {} of {arguments} parameters", k.name)));
        }
        if !cubin.starts_with(b"\x7fELF") {
            return Err(damaged(format!("{cubin_at:?} is no CUBIN")));
        }
        let bytes = [ptx.len(), cubin.len()];
        out.push(KernelInfo { kernel: k.clone(), usage, bytes });
    }
    Ok(out)
}

/// Parameters of an entry in PTX; `None` if there is none of that name.
fn parameters(ptx: &str, kernel: &str) -> Option<usize> {
    let entry = ptx.match_indices(".entry").find_map(|(i, e)| {
        let rest = ptx[i + e.len()..].trim_start().strip_prefix(kernel)?;
        rest.trim_start().strip_prefix('(')
    })?;
    let list = entry.split(')').next()?;
    Some(list.matches(".param").count())
}

#[cfg(test)]
mod tests {
    use super::parameters;

    #[test]
    fn parameters_of_an_entry() {
        let ptx =
            ".visible .entry add2(\n .param .u64 a) {}\n.visible .entry add(\n\t.param .u64 x,\n\t.param .u32 n\n)\n{";
        assert_eq!((parameters(ptx, "add"), parameters(ptx, "add2"), parameters(ptx, "ad")), (Some(2), Some(1), None));
        assert_eq!(parameters(".entry none()", "none"), Some(0));
    }
}
