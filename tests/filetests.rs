//! File tests: `tests/filetests/*/*.ir` hold a header, an input and what it must become.
//!
//! ```text
//! # test: pass fuse_selection fuse_attention
//! # dims: N=2, L=32
//! # What this shows.
//! graph …
//! ----
//! graph …
//! ```
//! Tests are `text` (parse and print), `verify` (errors and warnings) and `pass NAMES…`: passes of the pipeline by name,
//! `recompute`, `autodiff` (gradients of the output `loss` at every param, as outputs `grad.<param>`) and `optimise` (the
//! whole pipeline).  Below the result stand the reasons why something was not fused.  With `dims`, input and result
//! must also evaluate to the same outputs.  `BLESS=1 cargo test --test filetests` writes the results anew.

use rambac_ir::diagnostic::render;
use rambac_ir::interp::{self, Precision};
use rambac_ir::ops::SourceKind;
use rambac_ir::testing::Rng;
use rambac_ir::{Bindings, Graph, HostArray, text, verify};
use rambac_passes::train_step::gradient_graph;
use rambac_passes::{
    Options, PASSES, Recompute, fuse_attention, fuse_epilogue, fuse_loss, fuse_selection, mixed, narrow, optimise,
    recompute,
};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

const SEPARATOR: &str = "----\n";

struct FileTest {
    words: Vec<String>,
    dims: Option<Bindings>,
    input: String,
    expected: Option<String>,
}

fn read(source: &str) -> Result<FileTest, String> {
    let (input, expected) = match source.split_once(&format!("\n{SEPARATOR}")) {
        Some((i, e)) => (format!("{i}\n"), Some(e.to_string())),
        None => (source.to_string(), None),
    };
    let header = |key: &str| input.lines().find_map(|l| l.strip_prefix(&format!("# {key}: ")));
    let words: Vec<String> =
        header("test").ok_or("no line `# test: …`")?.split_whitespace().map(str::to_string).collect();
    let dims = match header("dims") {
        None => None,
        Some(d) => {
            let pair = |p: &str| {
                let (name, value) = p.split_once('=')?;
                Some((name.trim().to_string(), value.trim().parse().ok()?))
            };
            let pairs: Vec<(String, usize)> =
                d.split(',').map(pair).collect::<Option<_>>().ok_or("dims are written `N=2, L=32`")?;
            Some(Bindings::new(pairs.iter().map(|(n, v)| (n.as_str(), *v))))
        }
    };
    Ok(FileTest { words, dims, input, expected })
}

fn run(t: &FileTest) -> Result<String, String> {
    let words: Vec<&str> = t.words.iter().map(String::as_str).collect();
    match words[..] {
        ["text"] => Ok(match text::parse(&t.input) {
            Ok(g) => text::print(&g),
            Err(e) => render(&e, &t.input),
        }),
        ["verify"] => {
            let g = text::parse(&t.input).map_err(|e| render(&e, &t.input))?;
            let found = match verify::verify(&g) {
                Err(errors) => errors,
                Ok(()) => verify::lint(&g),
            };
            Ok(render(&found, &t.input))
        }
        ["pass", ref names @ ..] => passes(t, names),
        _ => Err(format!("unknown test `{}`", words.join(" "))),
    }
}

fn passes(t: &FileTest, names: &[&str]) -> Result<String, String> {
    let mut g = text::parse(&t.input).map_err(|e| render(&e, &t.input))?;
    verify::verify(&g).map_err(|e| render(&e, &t.input))?;
    let mut reasons = vec![];
    // Compared are the graphs before and after the rewrites; differentiating adds outputs.
    let mut before = g.clone();
    for name in names {
        g = match *name {
            "autodiff" => {
                let g = gradient_graph(&g).map_err(|e| e.to_string())?;
                before = g.clone();
                g
            }
            "recompute" => recompute::recompute(&g, &Recompute::All),
            "recompute_layers" => recompute::recompute_layers(&g, 2),
            "narrow" => narrow::narrow(&g),
            "mixed" => mixed::mixed(&g),
            "optimise" => optimise(&g, &Options::default()),
            name => match PASSES.iter().find(|(n, _)| *n == name) {
                Some((_, pass)) => pass(&g, &Options::default()),
                None => return Err(format!("unknown pass {name}")),
            },
        };
        verify::verify(&g).map_err(|e| format!("{name} broke the graph:\n{}", render(&e, "")))?;
        reasons.extend(match *name {
            "fuse_selection" => fuse_selection::unfused(&g),
            "fuse_attention" => fuse_attention::unfused(&g),
            "fuse_epilogue" => fuse_epilogue::unfused(&g),
            "fuse_loss" => fuse_loss::unfused(&g),
            _ => vec![],
        });
    }
    if let Some(dims) = &t.dims {
        same_outputs(&before, &g, dims)?;
    }
    let printed = text::print(&g);
    if text::parse(&printed).ok().as_ref() != Some(&g) {
        return Err(format!("the result does not survive its text form:\n{printed}"));
    }
    let stays: String = reasons.iter().map(|(id, why)| format!("# {} stays: {why}\n", g.label(id.result(0)))).collect();
    Ok(printed + &stays)
}

fn same_outputs(before: &Graph, after: &Graph, dims: &Bindings) -> Result<(), String> {
    let mut rng = Rng(7);
    let mut sources = HashMap::new();
    for (_, s) in before.sources() {
        let ty = s.ty.bind(dims).map_err(|e| e.to_string())?;
        let mut draw = || match (s.kind, ty.dtype.is_float()) {
            (SourceKind::Input, false) => 0.0,
            _ => rng.uniform(-1.0, 1.0),
        };
        let values = (0..ty.elements()).map(|_| draw()).collect();
        sources.insert(s.name.clone(), HostArray::from_f64(&ty, values));
    }
    let eval = |g: &Graph| interp::outputs(g, dims, &sources, Precision::Exact).map_err(|e| e.to_string());
    for ((name, a), (_, b)) in eval(before)?.iter().zip(&eval(after)?) {
        for (i, (x, y)) in a.to_f64().iter().zip(b.to_f64()).enumerate() {
            let equal = *x == y || (x - y).abs() <= 1e-12 * (1.0 + x.abs());
            if !equal || a.ty() != b.ty() {
                return Err(format!("output {name}[{i}] was {x} and became {y}"));
            }
        }
    }
    Ok(())
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut out = vec![];
    for e in std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
        let path = e.unwrap().path();
        if path.is_dir() {
            out.extend(files(&path));
        } else if path.extension().is_some_and(|e| e == "ir") {
            out.push(path);
        }
    }
    out.sort();
    out
}

fn check(path: &Path, bless: bool) -> Result<(), String> {
    let source = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
    let t = read(&source)?;
    let got = run(&t)?;
    if t.expected.as_deref() == Some(got.as_str()) {
        return Ok(());
    }
    if bless {
        return std::fs::write(path, format!("{}{SEPARATOR}{got}", t.input)).map_err(|e| e.to_string());
    }
    let expected = t.expected.unwrap_or_else(|| "(nothing yet)\n".into());
    let (e, g): (Vec<&str>, Vec<&str>) = (expected.lines().collect(), got.lines().collect());
    let at = (0..e.len().max(g.len())).find(|&i| e.get(i) != g.get(i)).unwrap_or(0);
    let line = |all: &[&str]| all.get(at).copied().unwrap_or("(the end)").to_string();
    Err(format!("line {} of the result\n  expected {}\n  got      {}\nall of it:\n{got}", at + 1, line(&e), line(&g)))
}

#[test]
fn every_file() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/filetests");
    let bless = std::env::var_os("BLESS").is_some_and(|v| v == "1");
    let all = files(&root);
    let mut failed = vec![];
    for path in &all {
        let name = path.strip_prefix(&root).unwrap_or(path).display();
        match check(path, bless) {
            Ok(()) => println!("ok   {name}"),
            Err(e) => failed.push(format!("{name}: {e}")),
        }
    }
    assert!(!all.is_empty(), "{}: no file tests", root.display());
    assert!(
        failed.is_empty(),
        "{} of {} files failed; if that is meant: BLESS=1 cargo test --test filetests\n\n{}",
        failed.len(),
        all.len(),
        failed.join("\n\n")
    );
}

/// Every pass of the pipeline has a file.
#[test]
fn every_pass_has_a_file() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/filetests/pass");
    let mut words: Vec<String> = vec![];
    for path in files(&root) {
        words.extend(read(&std::fs::read_to_string(path).unwrap()).unwrap().words);
    }
    let missing: Vec<&str> = PASSES.iter().map(|p| p.0).filter(|n| !words.iter().any(|w| w == n)).collect();
    assert!(missing.is_empty(), "no file test runs {missing:?}");
}
