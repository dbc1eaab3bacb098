//! One safetensors file: mapped and checked when opened, converted when read; and written.
//!
//! Opening proves that every tensor lies inside the file, that its bytes are what shape and type need, and that the
//! tensors cover the data without holes or overlaps.  Reading after that cannot fail but for the wrong name or type.

use super::error::CheckpointError;
use crate::bf16_data::Bf16Data;
use memmap2::Mmap;
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Headers beyond this are taken for garbage, as by the format's reference implementation.
const MAX_HEADER: u64 = 100_000_000;

/// Element types of safetensors files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Dtype {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    Bool,
    F8E4M3,
    F8E5M2,
}

impl Dtype {
    const NAMES: &[(&str, Dtype, usize)] = &[
        ("F64", Dtype::F64, 8),
        ("F32", Dtype::F32, 4),
        ("F16", Dtype::F16, 2),
        ("BF16", Dtype::BF16, 2),
        ("I64", Dtype::I64, 8),
        ("I32", Dtype::I32, 4),
        ("I16", Dtype::I16, 2),
        ("I8", Dtype::I8, 1),
        ("U64", Dtype::U64, 8),
        ("U32", Dtype::U32, 4),
        ("U16", Dtype::U16, 2),
        ("U8", Dtype::U8, 1),
        ("BOOL", Dtype::Bool, 1),
        ("F8_E4M3", Dtype::F8E4M3, 1),
        ("F8_E5M2", Dtype::F8E5M2, 1),
    ];

    fn row(self) -> &'static (&'static str, Dtype, usize) {
        // Every variant has its row; the first stands in for the impossible.
        Self::NAMES.iter().find(|r| r.1 == self).unwrap_or(&Self::NAMES[0])
    }

    /// Bytes per element.
    pub fn size(self) -> usize {
        self.row().2
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.row().0)
    }
}

/// Where a tensor lies and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: Dtype,
    /// Row-major.
    pub shape: Vec<usize>,
    /// Bytes in the file's data part.
    start: usize,
    end: usize,
}

/// An open safetensors file.
pub struct TensorFile {
    path: PathBuf,
    map: Arc<Mmap>,
    /// Where the data part begins.
    data: usize,
    tensors: BTreeMap<String, TensorInfo>,
    metadata: BTreeMap<String, String>,
}

impl fmt::Debug for TensorFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TensorFile({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}

impl TensorFile {
    /// Maps and checks `path`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = path.as_ref();
        if is_pickle(path) {
            return Err(CheckpointError::Pickle { path: path.into() });
        }
        let file = File::open(path).map_err(CheckpointError::io(path, "open it"))?;
        let meta = file.metadata().map_err(CheckpointError::io(path, "open it"))?;
        if !meta.is_file() {
            return Err(CheckpointError::header(path, "it is not a regular file"));
        }
        if meta.len() < 8 {
            return Err(CheckpointError::Truncated { path: path.into(), expected: 8, found: meta.len() });
        }
        // SAFETY: only read, and the module's contract is that open files are not changed in place.
        let map = unsafe { Mmap::map(&file) }.map_err(CheckpointError::io(path, "map it"))?;
        let (data, tensors, metadata) = parse(path, &map)?;
        Ok(Self { path: path.into(), map: Arc::new(map), data, tensors, metadata })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tensors' names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Type and shape of a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// The raw header, with the eight bytes of its length before it.
    pub(crate) fn header(&self) -> &[u8] {
        &self.map[..self.data]
    }

    /// The strings under `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// A tensor's type, shape and little-endian bytes.
    pub fn get_raw(&self, name: &str) -> Result<(&TensorInfo, &[u8]), CheckpointError> {
        let missing = || CheckpointError::NoTensor { path: self.path.clone(), name: name.into(), count: self.len() };
        let info = self.tensors.get(name).ok_or_else(missing)?;
        // In range since `parse`.
        Ok((info, &self.map[self.data + info.start..self.data + info.end]))
    }

    /// Shape and values of a floating-point tensor (F64, F32, F16, BF16), as float32.
    pub fn get_f32(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), CheckpointError> {
        let (info, b) = self.get_raw(name)?;
        let values = match info.dtype {
            Dtype::F32 => convert(b, f32::from_le_bytes),
            Dtype::F64 => convert(b, |x| f64::from_le_bytes(x) as f32),
            Dtype::BF16 => convert(b, |x| f32::from_bits(u32::from(u16::from_le_bytes(x)) << 16)),
            Dtype::F16 => convert(b, |x| f16_to_f32(u16::from_le_bytes(x))),
            other => return Err(self.wrong_dtype(name, other.to_string(), "F32, F16, BF16 or F64")),
        };
        Ok((info.shape.clone(), values))
    }

    /// Shape and values of a floating-point tensor, as bf16: mapped as they are if the file holds bf16, else rounded to
    /// nearest even.
    pub fn get_bf16(&self, name: &str) -> Result<(Vec<usize>, Bf16Data), CheckpointError> {
        let (info, b) = self.get_raw(name)?;
        if info.dtype == Dtype::BF16 {
            let halves = Bf16Data::mapped(&self.map, self.data + info.start, b.len() / 2);
            return Ok((info.shape.clone(), halves.expect("BUG: in range since `parse`")));
        }
        let (shape, values) = self.get_f32(name)?;
        Ok((shape, Bf16Data::round(&values)))
    }

    /// Shape and values of an integer tensor (I32, or I64, U8 and BOOL whose values fit).
    pub fn get_i32(&self, name: &str) -> Result<(Vec<usize>, Vec<i32>), CheckpointError> {
        let (info, b) = self.get_raw(name)?;
        let values = match info.dtype {
            Dtype::I32 => convert(b, i32::from_le_bytes),
            Dtype::U8 | Dtype::Bool => b.iter().map(|&x| i32::from(x)).collect(),
            Dtype::I64 => {
                let wide: Vec<i64> = convert(b, i64::from_le_bytes);
                let narrow: Result<Vec<i32>, _> = wide.into_iter().map(|x| i32::try_from(x).map_err(|_| x)).collect();
                narrow
                    .map_err(|x| self.wrong_dtype(name, format!("I64 with the value {x}"), "values within 32 bits"))?
            }
            other => return Err(self.wrong_dtype(name, other.to_string(), "I32 or I64")),
        };
        Ok((info.shape.clone(), values))
    }

    fn wrong_dtype(&self, name: &str, found: String, expected: &'static str) -> CheckpointError {
        CheckpointError::Dtype { path: self.path.clone(), name: name.into(), found, expected }
    }
}

/// Whether `path` has the name of a pickled PyTorch file.
pub(super) fn is_pickle(path: &Path) -> bool {
    path.extension().and_then(|e| e.to_str()).is_some_and(|e| ["bin", "pt", "pth", "ckpt", "pkl"].contains(&e))
}

fn convert<const W: usize, T>(bytes: &[u8], f: impl Fn([u8; W]) -> T) -> Vec<T> {
    bytes.as_chunks::<W>().0.iter().map(|&x| f(x)).collect()
}

/// IEEE half to single, exactly.
fn f16_to_f32(h: u16) -> f32 {
    let sign = u32::from(h & 0x8000) << 16;
    let (exponent, mantissa) = (u32::from(h >> 10) & 0x1f, u32::from(h & 0x3ff));
    let magnitude = match exponent {
        // Zero and subnormals: the mantissa counts units of 2⁻²⁴.
        0 => (mantissa as f32 * f32::from_bits(0x3380_0000)).to_bits(),
        31 => 0x7f80_0000 | mantissa << 13,
        _ => (exponent + 112) << 23 | mantissa << 13,
    };
    f32::from_bits(sign | magnitude)
}

type Parsed = (usize, BTreeMap<String, TensorInfo>, BTreeMap<String, String>);

/// Checks the whole header: where the data begins, the tensors, the metadata.
fn parse(path: &Path, bytes: &[u8]) -> Result<Parsed, CheckpointError> {
    let bad = |reason: String| CheckpointError::header(path, reason);
    let found = bytes.len() as u64;
    let truncated = |expected| CheckpointError::Truncated { path: path.into(), expected, found };
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else { return Err(truncated(8)) };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(bad(format!("the header claims {length} bytes, more than the format's limit of {MAX_HEADER}")));
    }
    let header = rest.get(..length as usize).ok_or_else(|| truncated(8 + length))?;
    let text = std::str::from_utf8(header).map_err(|e| bad(format!("the header is not UTF-8 ({e})")))?;
    let object: Map<String, Value> =
        serde_json::from_str(text).map_err(|e| bad(format!("the header is not a JSON object ({e})")))?;
    let (mut tensors, mut metadata) = (BTreeMap::new(), BTreeMap::new());
    for (name, value) in object {
        if name == "__metadata__" {
            let Value::Object(m) = value else { return Err(bad("__metadata__ is not an object".into())) };
            for (key, value) in m {
                let Value::String(s) = value else { return Err(bad(format!("__metadata__ {key:?} is not a string"))) };
                metadata.insert(key, s);
            }
        } else {
            let info = tensor_info(&value).map_err(|reason| bad(format!("tensor {name:?}: {reason}")))?;
            tensors.insert(name, info);
        }
    }
    // In file order every tensor starts where the one before ends.
    let mut order: Vec<(&String, &TensorInfo)> = tensors.iter().collect();
    order.sort_by_key(|(_, t)| (t.start, t.end));
    let mut at = 0;
    for (name, t) in order {
        if t.start != at {
            return Err(bad(format!(
                "tensor {name:?} starts at {} where {at} was expected: a hole or an overlap",
                t.start
            )));
        }
        at = t.end;
    }
    // `at` is a tensor's end and may be anything; the sum must not overflow.
    let expected = (at as u64).saturating_add(8 + length);
    if expected > found {
        return Err(truncated(expected));
    }
    if expected < found {
        return Err(bad(format!("{} bytes follow the last tensor", found - expected)));
    }
    Ok((8 + length as usize, tensors, metadata))
}

/// One entry of the header, its size checked against shape and type.
fn tensor_info(v: &Value) -> Result<TensorInfo, String> {
    let name = v.get("dtype").and_then(Value::as_str).ok_or("no dtype")?;
    let &(_, dtype, size) =
        (Dtype::NAMES.iter().find(|r| r.0 == name)).ok_or_else(|| format!("the type {name:?} is not known"))?;
    let sizes = |key: &str| -> Option<Vec<usize>> {
        v.get(key)?.as_array()?.iter().map(|x| usize::try_from(x.as_u64()?).ok()).collect()
    };
    let shape = sizes("shape").ok_or("no shape of whole numbers")?;
    let [start, end] =
        sizes("data_offsets").and_then(|o| <[usize; 2]>::try_from(o).ok()).ok_or("no pair of data_offsets")?;
    let bytes = shape.iter().try_fold(size, |n, &d| n.checked_mul(d));
    if end.checked_sub(start) != bytes || bytes.is_none() {
        return Err(format!("{dtype} of shape {shape:?} cannot lie at offsets {start}..{end}"));
    }
    Ok(TensorInfo { dtype, shape, start, end })
}

/// Values to write.
#[derive(Clone, Copy, Debug)]
pub enum Data<'a> {
    /// float32
    F32(&'a [f32]),
    /// int32
    I32(&'a [i32]),
    /// int64
    I64(&'a [i64]),
    /// bytes
    U8(&'a [u8]),
}

impl Data<'_> {
    fn len(&self) -> usize {
        match self {
            Data::F32(d) => d.len(),
            Data::I32(d) => d.len(),
            Data::I64(d) => d.len(),
            Data::U8(d) => d.len(),
        }
    }

    fn dtype(&self) -> safetensors::Dtype {
        match self {
            Data::F32(_) => safetensors::Dtype::F32,
            Data::I32(_) => safetensors::Dtype::I32,
            Data::I64(_) => safetensors::Dtype::I64,
            Data::U8(_) => safetensors::Dtype::U8,
        }
    }
}

/// A tensor to write.
#[derive(Clone, Debug)]
pub struct TensorRef<'a> {
    /// Its name in the file.
    pub name: Cow<'a, str>,
    /// Row-major.
    pub shape: Cow<'a, [usize]>,
    /// As many values as the shape says.
    pub data: Data<'a>,
}

impl<'a> TensorRef<'a> {
    /// A float32 tensor.
    pub fn f32(name: impl Into<Cow<'a, str>>, shape: &'a [usize], data: &'a [f32]) -> Self {
        Self { name: name.into(), shape: shape.into(), data: Data::F32(data) }
    }

    /// An int32 tensor.
    pub fn i32(name: impl Into<Cow<'a, str>>, shape: &'a [usize], data: &'a [i32]) -> Self {
        Self { name: name.into(), shape: shape.into(), data: Data::I32(data) }
    }
}

impl safetensors::View for &TensorRef<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        self.data.dtype()
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// One tensor at a time is copied, so writing needs memory for the largest only.
    fn data(&self) -> Cow<'_, [u8]> {
        match self.data {
            Data::F32(d) => d.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Data::I32(d) => d.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Data::I64(d) => d.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Data::U8(d) => d.into(),
        }
    }

    fn data_len(&self) -> usize {
        self.data.len() * self.data.dtype().bitsize() / 8
    }
}

/// Writes `tensors` to a new file at `path` and waits until it is on the disk.  `format: pt` is added to the metadata,
/// without which transformers refuses a file.
pub fn write_safetensors(
    path: &Path,
    tensors: &[TensorRef<'_>],
    metadata: &[(&str, &str)],
) -> Result<(), CheckpointError> {
    let mut seen = HashMap::new();
    for t in tensors {
        let elements = t.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        if elements != Some(t.data.len()) {
            let what = format!("tensor {:?} of shape {:?} has {} values", t.name, t.shape, t.data.len());
            return Err(CheckpointError::Unsavable { what });
        }
        if t.name == "__metadata__" || seen.insert(&t.name, ()).is_some() {
            return Err(CheckpointError::Unsavable {
                what: format!("the tensor name {:?} is reserved or used twice", t.name),
            });
        }
    }
    let mut all: HashMap<String, String> = metadata.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    all.insert("format".into(), "pt".into());
    let views = tensors.iter().map(|t| (t.name.as_ref(), t));
    safetensors::serialize_to_file(views, Some(all), path).map_err(|e| match e {
        safetensors::SafeTensorError::IoError(source) => {
            CheckpointError::Io { path: path.into(), action: "write it", source }
        }
        other => CheckpointError::Unsavable { what: format!("{}: {other}", path.display()) },
    })?;
    let file = File::open(path).map_err(CheckpointError::io(path, "open it"))?;
    file.sync_all().map_err(CheckpointError::io(path, "flush it to the disk"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tempfile::TempDir;

    fn raw(dir: &TempDir, header: &str, data: &[u8]) -> PathBuf {
        let path = dir.path().join("t.safetensors");
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat();
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn message(path: &Path) -> String {
        TensorFile::open(path).unwrap_err().to_string()
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("a.safetensors");
        let tensors = [
            TensorRef::f32("b.weight", &[2, 2], &[1.0, -2.5, f32::MIN_POSITIVE, f32::INFINITY]),
            TensorRef::i32("ids", &[3], &[1, -1, i32::MAX]),
            TensorRef { name: "step".into(), shape: vec![].into(), data: Data::I64(&[7]) },
            TensorRef { name: "blob".into(), shape: vec![0, 5].into(), data: Data::U8(&[]) },
        ];
        write_safetensors(&path, &tensors, &[("by", "rambac")]).unwrap();
        let f = TensorFile::open(&path).unwrap();
        assert_eq!(f.names().collect::<Vec<_>>(), ["b.weight", "blob", "ids", "step"]);
        assert_eq!(f.get_f32("b.weight").unwrap(), (vec![2, 2], vec![1.0, -2.5, f32::MIN_POSITIVE, f32::INFINITY]));
        assert_eq!(f.get_i32("ids").unwrap(), (vec![3], vec![1, -1, i32::MAX]));
        assert_eq!(f.get_i32("step").unwrap(), (vec![], vec![7]));
        assert_eq!(f.get_i32("blob").unwrap(), (vec![0, 5], vec![]));
        assert_eq!(f.metadata()["format"], "pt");
        assert_eq!(f.metadata()["by"], "rambac");
        assert!(f.get_f32("ids").unwrap_err().to_string().contains("\"ids\" is I32, expected F32"));
        assert!(f.get_f32("nope").unwrap_err().to_string().contains("no tensor \"nope\" among its 4"));
        // The format's reference reader agrees.
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(safetensors::SafeTensors::deserialize(&bytes).unwrap().len(), 4);
        let wrong = [TensorRef::f32("x", &[3], &[1.0])];
        assert!(write_safetensors(&path, &wrong, &[]).unwrap_err().to_string().contains("[3] has 1 values"));
        let twice = [TensorRef::f32("x", &[1], &[1.0]), TensorRef::f32("x", &[1], &[1.0])];
        assert!(write_safetensors(&path, &twice, &[]).unwrap_err().to_string().contains("twice"));
    }

    #[test]
    fn halves_and_doubles_become_floats() {
        let dir = TempDir::new().unwrap();
        let halves: [u16; 8] = [0, 0x8000, 0x3c00, 0xc000, 0x7bff, 0x0001, 0x03ff, 0xfc00];
        let values = [0.0, -0.0, 1.0, -2.0, 65504.0, 2f32.powi(-24), 1023.0 * 2f32.powi(-24), f32::NEG_INFINITY];
        let bytes: Vec<u8> = halves.iter().flat_map(|h| h.to_le_bytes()).collect();
        let p = raw(&dir, r#"{"a":{"dtype":"F16","shape":[8],"data_offsets":[0,16]}}"#, &bytes);
        let read = TensorFile::open(&p).unwrap().get_f32("a").unwrap().1;
        assert_eq!(read.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), values.map(f32::to_bits));
        assert!(f16_to_f32(0x7e00).is_nan());
        let p = raw(&dir, r#"{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}"#, &0xc049u16.to_le_bytes());
        assert_eq!(TensorFile::open(&p).unwrap().get_f32("a").unwrap().1, [-3.140625]);
        let p = raw(&dir, r#"{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}"#, &0.1f64.to_le_bytes());
        assert_eq!(TensorFile::open(&p).unwrap().get_f32("a").unwrap().1, [0.1f32]);
        let p = raw(&dir, r#"{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#, &i64::MAX.to_le_bytes());
        assert!(TensorFile::open(&p).unwrap().get_i32("a").unwrap_err().to_string().contains(&i64::MAX.to_string()));
    }

    #[test]
    fn every_lie_of_a_header_is_named() {
        let dir = TempDir::new().unwrap();
        let case = |header: &str, data: usize, expect: &str| {
            let m = message(&raw(&dir, header, &vec![0; data]));
            assert!(m.contains(expect) && m.contains("t.safetensors"), "{header}: {m}");
        };
        case(r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#, 15, "truncated");
        case(r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#, 17, "1 bytes follow");
        case(r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,12]}}"#, 12, "cannot lie at offsets 0..12");
        case(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8, "a hole or an overlap");
        case(
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
            4,
            "overlap",
        );
        case(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[8,4]}}"#, 8, "cannot lie");
        case(r#"{"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}}"#, 4, "\"F33\" is not known");
        case(r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4, "whole numbers");
        case(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}"#, 4, "data_offsets");
        case(r#"{"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#, 0, "cannot lie");
        case(
            r#"{"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,18446744073709551615]}}"#,
            0,
            "truncated",
        );
        case("[1]", 0, "JSON object");
        case(r#"{"__metadata__":{"a":1}}"#, 0, "not a string");
        let path = dir.path().join("t.safetensors");
        std::fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
        assert!(message(&path).contains("more than the format's limit"));
        std::fs::write(&path, 100u64.to_le_bytes()).unwrap();
        assert!(message(&path).contains("truncated: 108 bytes expected by its header, 8 found"));
        std::fs::write(&path, b"").unwrap();
        assert!(message(&path).contains("truncated"));
        assert!(message(&dir.path().join("none")).contains("cannot open it"));
        assert!(message(&dir.path().join("pytorch_model.bin")).contains("python -c"));
        assert!(message(dir.path()).contains("not a regular file"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        /// Any bytes changed, added or cut: an error or tensors that can all be read.
        #[test]
        fn hostile_files_never_panic(edits in prop::collection::vec((0usize..400, any::<u8>()), 0..6), cut in 0usize..500) {
            let dir = TempDir::new().unwrap();
            let path = dir.path().join("a.safetensors");
            let tensors = [TensorRef::f32("a", &[2, 3], &[0.5; 6]), TensorRef::i32("b", &[1], &[3])];
            write_safetensors(&path, &tensors, &[("k", "v")]).unwrap();
            let mut bytes = std::fs::read(&path).unwrap();
            let n = bytes.len();
            for (at, with) in edits { bytes[at % n] = with }
            bytes.truncate(cut);
            std::fs::write(&path, &bytes).unwrap();
            if let Ok(f) = TensorFile::open(&path) {
                for name in f.names() {
                    let _ = (f.get_f32(name), f.get_i32(name));
                }
            }
        }

        /// Headers of the right form with any numbers in them.
        #[test]
        fn hostile_headers_never_panic(shape in prop::collection::vec(any::<u64>(), 0..4), a: u64, b: u64, kind in 0usize..15) {
            let dir = TempDir::new().unwrap();
            let name = Dtype::NAMES[kind].0;
            let header = format!(r#"{{"a":{{"dtype":"{name}","shape":{shape:?},"data_offsets":[{a},{b}]}}}}"#);
            if let Ok(f) = TensorFile::open(raw(&dir, &header, &[0; 64])) {
                let _ = f.get_f32("a");
            }
        }
    }
}
