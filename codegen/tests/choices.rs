//! What every family of ops chooses at a table of sizes, and the stubs that it writes, as snapshots.
//!
//! Nothing is compiled.  A line of `choices_FAMILY` is one step at one size: the form that runs there, its launches, products and
//! workspace; below it the reason, where it is another than the line before had.  `stubs_FAMILY` has every stub of its graphs in
//! bf16.  `INSTA_UPDATE=always cargo test -p rambac-codegen --test choices` writes them again.

use rambac_codegen::cuda::{Arch, Call, GpuProgram, Target, emit};
use rambac_codegen::{Kernels, lower_for};
use rambac_ir::{Bindings, DType, text};
use std::collections::BTreeSet;
use std::fmt::Write;

/// A graph of one op, `T` standing for the type of elements.
struct Case {
    what: &'static str,
    inputs: &'static [(&'static str, &'static str)],
    op: &'static str,
    /// Values of its symbols.
    sizes: &'static [&'static [(&'static str, usize)]],
}

const TYPES: [DType; 2] = [DType::F32, DType::BF16];

impl Case {
    /// `Err`: why no kernel takes it.
    fn program(&self, dtype: DType, arch: Arch) -> Result<GpuProgram, String> {
        let t = dtype.name();
        let inputs = self.inputs.iter().map(|(name, ty)| {
            // Some say their own type.
            let ty = if ty.starts_with('[') { format!("{t}{ty}") } else { (*ty).to_string() };
            format!("  %{name} = input \"{name}\" : {ty}\n")
        });
        let syms: Vec<&str> = self.sizes[0].iter().map(|s| s.0).collect();
        let results = self.op.split(" = ").next().expect("an op has results");
        let outputs: Vec<String> = results.split(", ").enumerate().map(|(i, r)| format!("\"y{i}\" = {r}")).collect();
        let (inputs, outputs) = (inputs.collect::<String>(), outputs.join(", "));
        let op = self.op.replace("TYPE", t);
        let graph = format!("graph g({}) {{\n{inputs}  {op}\n  return {outputs}\n}}\n", syms.join(", "));
        let graph = text::parse(&graph).unwrap_or_else(|e| panic!("{}: {e:?}\n{graph}", self.what));
        emit(lower_for(&graph, Kernels::Gpu), Target::of(arch)).map_err(|e| e.why.to_string())
    }

    /// A line per size.
    fn choices(&self, dtype: DType, arch: Arch) -> String {
        let p = match self.program(dtype, arch) {
            Ok(p) => p,
            Err(why) => return format!("refused: {why}\n"),
        };
        let step = p.steps.last().expect("an op is a step");
        let (mut out, mut last) = (String::new(), String::new());
        for sizes in self.sizes {
            let b = Bindings::new(sizes.iter().copied());
            let f = step.form(&b).unwrap();
            let launches = f.launches().count();
            let products = f.calls.iter().filter(|c| matches!(c, Call::Gemm(_))).count();
            let products = if products > 0 { format!(", {products} products") } else { String::new() };
            let workspace = bytes(f.workspace_bytes(&b).unwrap());
            let _ = writeln!(out, "{b}: {}, {launches} launches{products}, {workspace}", f.name);
            if f.why != last {
                let _ = writeln!(out, "    {}", f.why);
                last.clone_from(&f.why);
            }
        }
        out
    }
}

fn bytes(n: usize) -> String {
    match n {
        0 => "no workspace".into(),
        n if n < 1 << 20 => format!("{:.1} KiB", n as f64 / 1024.0),
        n => format!("{:.1} MiB", n as f64 / (1 << 20) as f64),
    }
}

fn choices(cases: &[Case]) -> String {
    let mut out = String::new();
    for c in cases {
        let _ = writeln!(out, "# {}", c.what);
        for dtype in TYPES {
            let texts = Arch::ALL.map(|a| c.choices(dtype, a));
            if texts[0] == texts[1] {
                let _ = writeln!(out, "## {dtype} on {} and {}\n{}", Arch::ALL[0], Arch::ALL[1], texts[0]);
            } else {
                Arch::ALL.into_iter().zip(texts).for_each(|(a, t)| out += &format!("## {dtype} on {a}\n{t}\n"));
            }
        }
    }
    out
}

/// Stubs of all cases in bf16; of the second target those that the first does not have.
fn stubs(cases: &[Case]) -> String {
    let (mut out, mut seen) = (String::new(), BTreeSet::new());
    for (arch, case) in Arch::ALL.into_iter().flat_map(|a| cases.iter().map(move |c| (a, c))) {
        for k in case.program(DType::BF16, arch).map_or(vec![], |p| p.kernels) {
            let lines = k.source.lines().count();
            assert!(lines <= 25, "the stub of {} has {lines} lines", k.name);
            if seen.insert(k.source.clone()) {
                let _ = writeln!(out, "// {arch}: {} threads, {} bytes of dynamic shared memory", k.threads, k.shared);
                let _ = writeln!(out, "{}", k.source);
            }
        }
    }
    out
}

macro_rules! families {
    ($($name:ident: [$($case:expr),* $(,)?]),* $(,)?) => {$(
        #[test]
        fn $name() {
            let cases = [$($case),*];
            insta::assert_snapshot!(concat!("choices_", stringify!($name)), choices(&cases));
            insta::assert_snapshot!(concat!("stubs_", stringify!($name)), stubs(&cases));
        }
    )*};
}

/// Tokens and chunks: a decode step, a short text, the two ends of what is trained.
const CHUNKED: &[&[(&str, usize)]] = &[
    &[("N", 1), ("L", 1), ("C", 64)],
    &[("N", 1), ("L", 256), ("C", 4)],
    &[("N", 1), ("L", 4096), ("C", 64)],
    &[("N", 8), ("L", 4096), ("C", 64)],
    &[("N", 1), ("L", 512), ("C", 4096)],
];
const TOKENS: &[&[(&str, usize)]] =
    &[&[("N", 1), ("L", 1)], &[("N", 1), ("L", 256)], &[("N", 1), ("L", 4096)], &[("N", 8), ("L", 4096)]];
const ROWS: &[&[(&str, usize)]] = &[&[("N", 1)], &[("N", 4096)]];

/// The 370M model's attention to chunks.
const ATTEND: &[(&str, &str)] = &[
    ("q", "[N, L, 16, 64]"),
    ("k", "[N, 64*C, 1, 64]"),
    ("v", "[N, 64*C, 1, 64]"),
    ("i", "i32[N, L, 1, 8]"),
    ("n", "i32[N, L, 1]"),
    ("w", "[N, L, 1, 8]"),
    ("dy", "[N, L, 16, 64]"),
];
/// A head dim that fills no tiles evenly, in chunks of 48, two key heads.
const ATTEND_ODD: &[(&str, &str)] = &[
    ("q", "[N, L, 6, 80]"),
    ("k", "[N, 48*C, 2, 80]"),
    ("v", "[N, 48*C, 2, 80]"),
    ("i", "i32[N, L, 2, 5]"),
    ("n", "i32[N, L, 2]"),
    ("w", "[N, L, 2, 5]"),
    ("dy", "[N, L, 6, 80]"),
];
const ATTEND_ANY: &[(&str, &str)] = &[
    ("q", "[N, L, 2, 20]"),
    ("k", "[N, 10*C, 1, 20]"),
    ("v", "[N, 10*C, 1, 20]"),
    ("i", "i32[N, L, 1, 2]"),
    ("n", "i32[N, L, 1]"),
    ("w", "[N, L, 1, 2]"),
    ("dy", "[N, L, 2, 20]"),
];
const SELECT: &[(&str, &str)] = &[("q", "[N, L, 1, 64]"), ("m", "[N, C, 1, 64]"), ("t", "i32[N]")];
const SELECT_GRAD: &[(&str, &str)] = &[
    ("q", "[N, L, 1, 64]"),
    ("m", "[N, C, 1, 64]"),
    ("i", "i32[N, L, 1, 8]"),
    ("n", "i32[N, L, 1]"),
    ("s", "[N, L, 1, 8]"),
    ("w", "[N, L, 1, 8]"),
    ("dw", "[N, L, 1, 8]"),
];
const SCAN: &[(&str, &str)] = &[
    ("x", "[N, L, 32, 64]"),
    ("dt", "[N, L, 32]"),
    ("a", "[32]"),
    ("b", "[N, L, 1, 128]"),
    ("c", "[N, L, 1, 128]"),
    ("d", "[32]"),
    ("h0", "[N, 32, 64, 128]"),
    ("dy", "[N, L, 32, 64]"),
    ("dh", "[N, 32, 64, 128]"),
];
const SCAN_WIDE: &[(&str, &str)] = &[
    ("x", "[N, L, 8, 64]"),
    ("dt", "[N, L, 8]"),
    ("a", "[8]"),
    ("b", "[N, L, 2, 256]"),
    ("c", "[N, L, 2, 256]"),
    ("d", "[8]"),
    ("h0", "[N, 8, 64, 256]"),
    ("dy", "[N, L, 8, 64]"),
    ("dh", "[N, 8, 64, 256]"),
];
const CONV: &[(&str, &str)] = &[
    ("x", "[N, L, 2304]"),
    ("w", "[2304, 1, 4]"),
    ("bias", "[2304]"),
    ("s0", "[N, 3, 2304]"),
    ("dy", "[N, L, 2304]"),
    ("ds", "[N, 3, 2304]"),
];

families! {
    chunk_attention: [
        Case { what: "370m", inputs: ATTEND.split_at(6).0, sizes: CHUNKED,
               op: "%y = chunk_attention %q, %k, %v, %i, %n, %w {chunk = 64, scale = 0.125}" },
        Case { what: "head_dim 80, chunks of 48, three query heads a key head", inputs: ATTEND_ODD.split_at(6).0,
               sizes: CHUNKED, op: "%y = chunk_attention %q, %k, %v, %i, %n, %w {chunk = 48, scale = 0.125}" },
        Case { what: "head_dim 20", inputs: ATTEND_ANY.split_at(6).0, sizes: CHUNKED.split_at(1).0,
               op: "%y = chunk_attention %q, %k, %v, %i, %n, %w {chunk = 10, scale = 0.125}" },
    ],
    chunk_attention_grad: [
        Case { what: "370m", inputs: ATTEND, sizes: CHUNKED,
               op: "%a, %b, %c, %d = chunk_attention_grad %q, %k, %v, %i, %n, %w, %dy {chunk = 64, scale = 0.125}" },
        Case { what: "head_dim 80, chunks of 48, three query heads a key head", inputs: ATTEND_ODD, sizes: CHUNKED,
               op: "%a, %b, %c, %d = chunk_attention_grad %q, %k, %v, %i, %n, %w, %dy {chunk = 48, scale = 0.125}" },
        Case { what: "head_dim 20", inputs: ATTEND_ANY, sizes: CHUNKED.split_at(1).0,
               op: "%a, %b, %c, %d = chunk_attention_grad %q, %k, %v, %i, %n, %w, %dy {chunk = 10, scale = 0.125}" },
    ],
    selection: [
        Case { what: "370m", inputs: SELECT, sizes: CHUNKED,
               op: "%i, %n, %w, %s = selection %q, %m, %t {chunk = 64, scale = 0.125, k = 8, rule = stick_breaking}" },
        Case { what: "64 slots in the order of scores", inputs: SELECT, sizes: CHUNKED,
               op: "%i, %n, %w, %s = selection %q, %m, %t {chunk = 64, scale = 0.125, k = 64, order = score, rule = softmax}" },
        Case { what: "65 slots", inputs: SELECT, sizes: CHUNKED.split_at(1).0,
               op: "%i, %n, %w, %s = selection %q, %m, %t {chunk = 64, scale = 0.125, k = 65, rule = softmax}" },
    ],
    selection_grad: [
        Case { what: "370m", inputs: SELECT_GRAD, sizes: CHUNKED,
               op: "%a, %b = selection_grad %q, %m, %i, %n, %s, %w, %dw {scale = 0.125, rule = stick_breaking}" },
    ],
    attention: [
        Case { what: "the 370M model's chunk encoder", inputs: &[("q", "[N, 65, 16, 64]"), ("k", "[N, 65, 16, 64]"), ("v", "[N, 65, 16, 64]")],
               sizes: ROWS, op: "%y = attention %q, %k, %v {scale = 0.125}" },
        Case { what: "a length that a symbol decides", inputs: &[("q", "[N, L, 8, 128]"), ("k", "[N, L, 2, 128]"), ("v", "[N, L, 2, 128]")],
               sizes: TOKENS, op: "%y = attention %q, %k, %v {scale = 0.125, causal = true}" },
    ],
    attention_grad: [
        Case { what: "the 370M model's chunk encoder",
               inputs: &[("q", "[N, 65, 16, 64]"), ("k", "[N, 65, 16, 64]"), ("v", "[N, 65, 16, 64]"), ("dy", "[N, 65, 16, 64]")],
               sizes: ROWS, op: "%a, %b, %c = attention_grad %q, %k, %v, %dy {scale = 0.125}" },
    ],
    selective_scan: [
        Case { what: "370m", inputs: SCAN.split_at(7).0, sizes: TOKENS,
               op: "%y, %h = selective_scan %x, %dt, %a, %b, %c, %d, %h0 {block = 64}" },
        Case { what: "states of 256, two groups", inputs: SCAN_WIDE.split_at(7).0, sizes: TOKENS,
               op: "%y, %h = selective_scan %x, %dt, %a, %b, %c, %d, %h0 {block = 64}" },
    ],
    selective_scan_grad: [
        Case { what: "370m", inputs: SCAN, sizes: TOKENS,
               op: "%p, %q, %r, %s, %t, %u, %v = selective_scan_grad %x, %dt, %a, %b, %c, %d, %h0, %dy, %dh {block = 64}" },
        Case { what: "states of 256, two groups", inputs: SCAN_WIDE, sizes: TOKENS,
               op: "%p, %q, %r, %s, %t, %u, %v = selective_scan_grad %x, %dt, %a, %b, %c, %d, %h0, %dy, %dh {block = 64}" },
    ],
    causal_conv1d: [
        Case { what: "370m", inputs: CONV.split_at(4).0, sizes: TOKENS, op: "%y, %s = causal_conv1d %x, %w, %bias, %s0" },
    ],
    causal_conv1d_grad: [
        Case { what: "370m", inputs: CONV, sizes: TOKENS,
               op: "%a, %b, %c, %d = causal_conv1d_grad %x, %w, %bias, %s0, %dy, %ds" },
    ],
    norms: [
        Case { what: "rms_norm of 1024", inputs: &[("x", "[N, 1024]"), ("w", "[1024]")], sizes: ROWS,
               op: "%y = rms_norm %x, %w {eps = 1e-5}" },
        Case { what: "rms_norm of 50", inputs: &[("x", "[N, 50]"), ("w", "[50]")], sizes: ROWS,
               op: "%y = rms_norm %x, %w {eps = 1e-5}" },
        Case { what: "its gradient", inputs: &[("x", "[N, 1024]"), ("w", "[1024]"), ("dy", "[N, 1024]")], sizes: ROWS,
               op: "%a, %b = rms_norm_grad %x, %w, %dy {eps = 1e-5}" },
        Case { what: "gated_rms_norm of 2048", inputs: &[("x", "[N, 2048]"), ("z", "[N, 2048]"), ("w", "[2048]")], sizes: ROWS,
               op: "%y = gated_rms_norm %x, %z, %w {eps = 1e-5}" },
        Case { what: "its gradient", inputs: &[("x", "[N, 2048]"), ("z", "[N, 2048]"), ("w", "[2048]"), ("dy", "[N, 2048]")], sizes: ROWS,
               op: "%a, %b, %c = gated_rms_norm_grad %x, %z, %w, %dy {eps = 1e-5}" },
        Case { what: "rotary", inputs: &[("x", "[N, 65, 16, 64]")], sizes: ROWS, op: "%y = rotary %x {base = 10000.0}" },
    ],
    products: [
        Case { what: "a linear layer with a sum on its tiles", inputs: &[("x", "f32[N, 1024]"), ("w", "f32[4096, 1024]"), ("r", "f32[N, 4096]")], sizes: ROWS,
               op: "%y = matmul_map %x, %w, %r {trans_b = true, body = [\"add v1 v0\"], outs = [2], dtypes = [f32]}" },
        Case { what: "alone", inputs: &[("x", "[N, 1024]"), ("w", "[4096, 1024]")], sizes: ROWS,
               op: "%y = matmul %x, %w {trans_b = true}" },
    ],
    rows: [
        Case { what: "embedding", inputs: &[("i", "i32[N]"), ("w", "[50304, 1024]")], sizes: ROWS, op: "%y = embedding %i, %w" },
        Case { what: "its gradient", inputs: &[("i", "i32[N]"), ("dy", "[N, 1024]")], sizes: ROWS,
               op: "%y = embedding_grad %i, %dy {vocab = 50304}" },
        Case { what: "means of chunks", inputs: &[("x", "[N, 4096, 1, 64]")], sizes: ROWS, op: "%y = summarise %x {chunk = 64}" },
        Case { what: "a sum of rows", inputs: &[("x", "[N, 1024]")], sizes: ROWS, op: "%y = reduce %x {f = sum, axes = [0]}" },
        Case { what: "a largest element", inputs: &[("x", "[N, 1024]")], sizes: ROWS, op: "%y = reduce %x {f = max, axes = [1]}" },
        Case { what: "transposed", inputs: &[("x", "[N, 1024]")], sizes: ROWS, op: "%y = transpose %x {perm = [1, 0]}" },
        Case { what: "a silu times a gate", inputs: &[("x", "[N, 1024]"), ("z", "[N, 1024]")], sizes: ROWS,
               op: "%y = map %x, %z {shape = [N, 1024], body = [\"silu v0\", \"mul v2 v1\"], outs = [3], dtypes = [TYPE]}" },
    ],
    many_tensors: [
        Case { what: "a sum of squares", inputs: &[("a", "[64, 33]"), ("b", "[N, 1024]")], sizes: ROWS,
               op: "%y = sum_squares %a, %b" },
        Case { what: "the same map on two tensors", inputs: &[("ap", "[64, 33]"), ("p", "[64, 33]"), ("aq", "[5]"), ("q", "[5]"), ("rate", "[]")], sizes: ROWS,
               op: "%y, %z = map_each %ap, %p, %aq, %q, %rate {own = 2, shared = 1, body = [\"mul v0 v2\", \"sub v1 v3\"], outs = [4], dtypes = [TYPE]}" },
    ],
    unfused: [
        Case { what: "scores", inputs: SELECT, sizes: CHUNKED, op: "%y = score %q, %m, %t {chunk = 64, scale = 0.125}" },
        Case { what: "their gradients", inputs: &[("q", "[N, L, 1, 64]"), ("m", "[N, C, 1, 64]"), ("ds", "[N, L, 1, C]")], sizes: CHUNKED,
               op: "%a, %b = score_grad %q, %m, %ds {scale = 0.125}" },
        Case { what: "the best eight", inputs: &[("s", "[N, L, 1, C]")], sizes: CHUNKED, op: "%i, %n = select %s {k = 8}" },
        Case { what: "their weights", inputs: &[("s", "[N, L, 1, C]"), ("i", "i32[N, L, 1, 8]"), ("n", "i32[N, L, 1]")], sizes: CHUNKED,
               op: "%w = weigh %s, %i, %n {rule = softmax}" },
        Case { what: "gradients of these", inputs: &[("s", "[N, L, 1, C]"), ("i", "i32[N, L, 1, 8]"), ("n", "i32[N, L, 1]"), ("dw", "[N, L, 1, 8]")], sizes: CHUNKED,
               op: "%ds = weigh_grad %s, %i, %n, %dw {rule = softmax}" },
        Case { what: "attention to chunks of one softmax", inputs: ATTEND.split_at(5).0, sizes: CHUNKED,
               op: "%y, %l = attend %q, %k, %v, %i, %n {chunk = 64, scale = 0.125, joint = true}" },
    ],
    cross_entropy: [
        Case { what: "370m", inputs: &[("x", "[N, 1024]"), ("w", "[50304, 1024]"), ("t", "i32[N]")], sizes: ROWS,
               op: "%y = linear_cross_entropy %x, %w, %t" },
    ],
}
