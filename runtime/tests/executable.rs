//! The executable file: what is written is read back, any damage is refused, other tools can open it.

use proptest::prelude::*;
use rambac_codegen::cuda::{Arch, Param};
use rambac_codegen::nvrtc::{Compiled, Usage};
use rambac_ir::{Bindings, Builder, Dim, Graph, Ty};
use rambac_passes::Options;
use rambac_runtime::checkpoint::TensorFile;
use rambac_runtime::executable::{Contents, Mode, Part, write};
use rambac_runtime::gpu::Code;
use rambac_runtime::{Executable, Executor, Store, Tensor};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

/// Ops that have GPU kernels, with a strided view and two symbols.
fn graph() -> Graph {
    let mut b = Builder::new("mix", &["N", "L"]);
    let (n, l) = (Dim::sym("N"), Dim::sym("L"));
    let x = b.input("x", Ty::f32([n, l, Dim::int(16)]));
    let w = b.param("w", Ty::f32([4, 8]));
    let scale = b.param("scale", Ty::f32([4]));
    let part = b.slice(x, 2, 8, 16);
    let y = b.linear(part, w);
    let shape = b.ty(y).shape.clone();
    let scale = b.broadcast(scale, shape);
    let y = b.mul(y, scale);
    b.output("y", y);
    b.finish().unwrap()
}

fn weights() -> Store {
    let mut s = Store::default();
    s.insert("w", Tensor::f32(&[4, 8], (0..32).map(|i| i as f32 * 0.25 - 3.0).collect()));
    s.insert("scale", Tensor::f32(&[4], vec![1.0, -2.0, 0.5, 3.0]));
    s
}

/// Code that no device would run, but of the right form.
fn code(part: &Part, target: usize) -> Code {
    let mut code = Code::default();
    let steps = part.gpu[target].steps.iter().flat_map(|s| s.forms.iter());
    for l in steps.flat_map(|f| f.launches()) {
        let params: Vec<&str> = l
            .params
            .iter()
            .map(|p| if matches!(p, Param::Address(_)) { ".param .u64 p" } else { ".param .b32 n" })
            .collect();
        let ptx = format!(".visible .entry {}(\n{}\n)\n{{ ret; }}\n", l.kernel.name, params.join(",\n"));
        let usage = Usage { kernel: l.kernel.name.clone(), registers: 32, ..Usage::default() };
        let c = Compiled { ptx, cubin: Some(b"\x7fELF and so on".to_vec()), log: String::new(), usage: vec![usage] };
        code.0.insert(l.kernel.name.clone(), c);
    }
    code
}

fn write_to(path: &Path, targets: &[Arch], weights: Option<&Store>) {
    write_with(path, targets, weights, &Options::default());
}

fn write_with(path: &Path, targets: &[Arch], weights: Option<&Store>, options: &Options) {
    let part = Part::compile("graph", &graph(), options, targets).unwrap();
    let all: Vec<_> = targets.iter().enumerate().map(|(i, a)| (*a, code(&part, i), "a compiler".into())).collect();
    let parts = [part];
    let contents = Contents {
        mode: Mode::Graph,
        model: "mix.ir",
        config: None,
        tokenizer: Some(b"{}"),
        settings: serde_json::json!({ "recompute": false }),
        parts: &parts,
        targets: &all,
        weights,
    };
    let written = write(path, &contents).unwrap();
    assert_eq!(written.all as u64, std::fs::metadata(path).unwrap().len());
    assert_eq!(written.header % 8, 0);
}

/// A whole file and its folder.
fn file(targets: &[Arch]) -> (TempDir, PathBuf) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("mix.rambac");
    write_to(&path, targets, Some(&weights()));
    (dir, path)
}

#[test]
fn what_is_written_is_read_and_runs() {
    let (_dir, path) = file(&Arch::ALL);
    let e = Executable::open(&path).unwrap();
    e.verify().unwrap();
    assert_eq!((e.mode, e.model.as_str(), e.targets.as_slice()), (Mode::Graph, "mix.ir", &Arch::ALL[..]));
    assert_eq!(e.weights().unwrap().unwrap(), weights());
    assert_eq!(e.weights_size(), (2, 144));
    assert_eq!(e.tokenizer(), Some(&b"{}"[..]));
    assert_eq!(rambac_ir::text::parse(&e.parts[0].before).unwrap(), graph());
    for arch in Arch::ALL {
        let (program, code) = e.code(&e.parts[0], arch).unwrap();
        assert_eq!(program.kernels.len(), code.0.len());
        assert!(e.kernels(arch).unwrap().iter().all(|k| k.usage.as_ref().is_some_and(|u| u.registers == 32)));
    }
    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap());
    let mut run = Executor::new((*e.parts[0].program).clone(), pool);
    let x = Tensor::f32(&[2, 3, 16], (0..96).map(|i| (i % 7) as f32).collect());
    let dims = Bindings::new([("N", 2), ("L", 3)]);
    let out = run.run(&dims, &[("x", x.view())], &mut e.weights().unwrap().unwrap()).unwrap();
    let of = |row: usize, i: usize| ((row * 16 + 8 + i) % 7) as f32;
    let want: Vec<f32> = (0..6)
        .flat_map(|row| {
            (0..4).map(move |j| {
                let sum: f32 = (0..8).map(|i| of(row, i) * ((j * 8 + i) as f32 * 0.25 - 3.0)).sum();
                sum * [1.0, -2.0, 0.5, 3.0][j]
            })
        })
        .collect();
    assert_eq!(out[0].1.as_f32().unwrap(), want);
}

/// The format's own reader, as Python has it, takes the file.
#[test]
fn other_tools_open_it() {
    let (_dir, path) = file(&[Arch::Sm80]);
    let bytes = std::fs::read(&path).unwrap();
    let t = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let w = t.tensor("w").unwrap();
    assert_eq!((w.dtype(), w.shape()), (safetensors::Dtype::F32, &[4, 8][..]));
    assert_eq!(&w.data()[..4], (-3.0f32).to_le_bytes());
    assert_eq!(w.data().as_ptr().addr() % 4, bytes.as_ptr().addr() % 4);
    let kernels = t.names().iter().filter(|n| n.ends_with(".sm_80.ptx")).count();
    assert!(kernels >= 1 && kernels == t.names().iter().filter(|n| n.ends_with(".sm_80.cubin")).count());
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let meta = header.metadata().clone().unwrap();
    assert_eq!(meta["rambac_executable"], "1");
    assert!(meta["ir.graph.before"].starts_with("graph mix(N, L) {"));
    let program: serde_json::Value = serde_json::from_str(&meta["program.graph"]).unwrap();
    assert_eq!(program["symbols"], serde_json::json!(["N", "L"]));
    let gpu: serde_json::Value = serde_json::from_str(&meta["gpu.graph.sm_80"]).unwrap();
    assert_eq!(gpu.as_array().unwrap().len(), program["steps"].as_array().unwrap().len());
}

/// Weights in bf16 are made f32 on the CPU; on a GPU what they are multiplied with is made bf16, and they are read as they are.
#[test]
fn gpus_have_a_graph_of_their_own() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("half.rambac");
    let options = Options { bf16_weights: true, ..Options::default() };
    write_with(&path, &[Arch::Sm80, Arch::Sm90a], None, &options);
    let e = Executable::open(&path).unwrap();
    let part = &e.parts[0];
    let gpu = part.after_gpu.as_ref().unwrap();
    let rounded = |text: &str| text.contains("{to = bf16}");
    assert!(!rounded(&part.after) && rounded(gpu), "{}\n{gpu}", part.after);
    assert_eq!(part.gpu.len(), 2);
    for p in &part.gpu {
        assert_eq!(rambac_ir::text::print(&p.program.graph), *gpu);
    }
    // Without a GPU there is one graph.
    write_with(&path, &[], None, &options);
    assert!(Executable::open(&path).unwrap().parts[0].after_gpu.is_none());
}

#[test]
fn without_weights() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("a");
    write_to(&path, &[], None);
    let e = Executable::open(&path).unwrap();
    assert!(!e.has_weights() && e.weights().unwrap().is_none());
    assert_eq!(e.params().map(|p| p.0).collect::<Vec<_>>(), ["scale", "w"]);
    let no = e.kernels(Arch::Sm90a).unwrap_err().to_string();
    assert!(no.contains("no code for sm_90a in it, only for the cpu; compile it with --target sm_90a"), "{no}");
    let missing = Store::default();
    let part = Part::compile("graph", &graph(), &Options::default(), &[]).unwrap();
    let contents = Contents {
        mode: Mode::Graph,
        model: "",
        config: None,
        tokenizer: None,
        settings: serde_json::Value::Null,
        parts: &[part],
        targets: &[],
        weights: Some(&missing),
    };
    assert!(write(&path, &contents).unwrap_err().to_string().contains("lack the param \"scale\""));
    // What was there is still whole.
    Executable::open(&path).unwrap();
}

#[test]
fn other_files_are_told_apart() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("w.safetensors");
    let tensors = [rambac_runtime::checkpoint::TensorRef::f32("w", &[1], &[1.0])];
    rambac_runtime::checkpoint::write_safetensors(&path, &tensors, &[]).unwrap();
    let e = Executable::open(&path).unwrap_err().to_string();
    assert!(e.contains("without a program") && e.contains("rambac compile"), "{e}");
    let tensors = [rambac_runtime::checkpoint::TensorRef::f32("w", &[1], &[1.0])];
    let later = [("rambac_executable", "7"), ("compiler", "rambac 9.0")];
    rambac_runtime::checkpoint::write_safetensors(&path, &tensors, &later).unwrap();
    let e = Executable::open(&path).unwrap_err().to_string();
    assert!(e.contains("form 7, made by rambac 9.0; this version reads form 1"), "{e}");
    assert!(Executable::open(dir.path().join("none")).unwrap_err().to_string().contains("cannot open it"));
}

fn refused(path: &Path) -> Option<String> {
    Executable::open(path).and_then(|e| e.verify()).err().map(|e| e.to_string())
}

/// Every byte changed, and every length cut, in turn.
#[test]
fn every_byte_counts() {
    let (dir, path) = file(&[Arch::Sm80]);
    let whole = std::fs::read(&path).unwrap();
    let bad = dir.path().join("bad");
    for i in (0..whole.len()).step_by(5) {
        let mut b = whole.clone();
        b[i] ^= 1 << (i / 5 % 8);
        std::fs::write(&bad, &b).unwrap();
        assert!(refused(&bad).is_some_and(|e| e.contains("bad")), "byte {i} of {}", whole.len());
    }
    for n in (0..whole.len()).step_by(29) {
        std::fs::write(&bad, &whole[..n]).unwrap();
        assert!(refused(&bad).is_some(), "cut to {n}");
    }
    std::fs::write(&bad, &whole).unwrap();
    assert_eq!(refused(&bad), None);
}

/// Writes a file's header anew, with the hash that it should have.
fn forge(path: &Path, change: impl Fn(&str) -> String) {
    let whole = std::fs::read(path).unwrap();
    let n = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut header = change(std::str::from_utf8(&whole[8..8 + n]).unwrap()).into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(&header);
    let at = 8 + "{\"__metadata__\":{\"hash\":\"".len();
    if out.len() >= at + 64 {
        out[at..at + 64].fill(b'0');
        let hash = rambac_codegen::hash::sha256(&out);
        out[at..at + 64].copy_from_slice(hash.as_bytes());
    }
    out.extend(&whole[8 + n..]);
    std::fs::write(path, out).unwrap();
}

/// Lies with a right hash are found by compiling again.
#[test]
fn forged_programs_are_refused() {
    let lies = [
        (
            r#"\"offset\":\"8\""#,
            r#"\"offset\":\"9\""#,
            "program.graph at steps[0].inputs[0].offset: \"9\" in the first",
        ),
        (r#"\"buffer\":2"#, r#"\"buffer\":4294967295"#, "program.graph"),
        (r#"\"address\":\""#, r#"\"address\":\"other "#, "gpu.graph.sm_80"),
        ("step_by", "step_by", ""),
        (r#"\"threads\":"#, r#"\"threads\":1"#, "kernels.sm_80"),
        ("slice %0 {axis = 2, start = 8, end = 16}", "slice %0 {axis = 2, start = 0, end = 8}", "program.graph"),
        ("slice %0 {axis = 2, start = 8, end = 16}", "slice %0 {axis = 2, start = 9, end = 17}", "not well-formed"),
        ("slice %0 {axis = 2, start = 8, end = 16}", "slice %0 {axis = 2, st", "not well-formed"),
        (r#""parts":"[\"graph\"]""#, r#""parts":"[\"step\"]""#, "no parts of an executable"),
        (r#""parts":"[\"graph\"]""#, r#""parts":"[\"graph\",\"graph\"]""#, "no parts of an executable"),
        (r#""targets":"[\"sm_80\"]""#, r#""targets":"[]""#, "not known"),
        (r#""targets":"[\"sm_80\"]""#, r#""targets":"[\"sm_99\"]""#, "no target \"sm_99\""),
        (r#""mode":"graph""#, r#""mode":"fly""#, "no mode \"fly\""),
        (r#""shape":[4,8]"#, r#""shape":[8,4]"#, "but its weights are F32 [8, 4]"),
        (r#""model":"#, r#""extra":"1","model":"#, "\"extra\", which is not known"),
    ];
    for (from, to, expect) in lies {
        let (_dir, path) = file(&[Arch::Sm80]);
        if expect.is_empty() {
            // The forger's own work is not what is refused.
            forge(&path, str::to_string);
            assert_eq!(refused(&path), None);
            continue;
        }
        forge(&path, |h| {
            assert!(h.contains(from), "no {from} in {h}");
            // The graph after the passes is the one that counts.
            match from.starts_with("slice") {
                true => h.replace(from, to),
                false => h.replacen(from, to, 1),
            }
        });
        let e = refused(&path).unwrap_or_else(|| panic!("{from} → {to} went unseen"));
        assert!(e.contains(expect), "{from} → {to}: {e}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Digits and words of a header changed at random, with a right hash: refused, or the same program.
    #[test]
    fn forged_headers_never_panic(edits in prop::collection::vec((any::<prop::sample::Index>(), 0usize..8, 0usize..8), 1..4)) {
        let (_dir, path) = file(&[Arch::Sm80]);
        forge(&path, |h| {
            let mut text: Vec<char> = h.chars().collect();
            for (at, kind, with) in &edits {
                let at = 95 + at.index(text.len() - 95);
                let near: Vec<usize> = (at..text.len()).filter(|&i| text[i].is_ascii_digit() || text[i] == '[' || text[i] == '{').take(1).collect();
                let Some(&i) = near.first() else { continue };
                match kind {
                    0 => { text.remove(i); }
                    1 => text.insert(i, '9'),
                    2 => text[i] = '-',
                    3 => { (0..30).for_each(|_| text.insert(i, '7')); }
                    _ => text[i] = char::from(b'0' + *with as u8),
                }
            }
            text.into_iter().collect()
        });
        if let Ok(e) = Executable::open(&path) {
            let _ = (e.verify(), e.weights());
            prop_assert_eq!(e.parts[0].program.buffers.len(), rambac_codegen::lower(&e.parts[0].program.graph).buffers.len());
        }
        let _ = TensorFile::open(&path);
    }
}
