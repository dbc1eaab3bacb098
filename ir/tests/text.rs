//! The text form: examples, rendered errors, odd names, and that no mutation of a text makes the parser panic.

use rambac_ir::diagnostic::{Diagnostic, render};
use rambac_ir::ops::*;
use rambac_ir::testing::Rng;
use rambac_ir::{Builder, DType, Dim, Graph, Loc, Ty, text, verify};

/// A layer that selects, written by hand.
const HSA: &str = r#"
# hierarchical sparse attention
graph hsa(N, L) {
  %rq    = input "rq" : f32[N, L, 1, 16]        // retrieval queries
  %q     = input "q" : f32[N, L, 16, 64]
  %k     = input "k" : f32[N, L, 1, 64]
  %v     = input "v" : f32[N, L, 1, 64]
  %start = input "start" : i32[N]
  %w_o   = param "o_proj.weight" : f32[1024, 1024]
  %e     = summarise %k {chunk = 64}
  %w_lm  = param "lmk.weight" : f32[16, 64]
  %lm    = matmul %e, %w_lm {trans_b = true} : f32[N, L/64, 1, 16] @layers.3.mixer
  %s     = score %rq, %lm, %start {chunk = 64, scale = 0.25} : f32[N, L, 1, L/64]
  %i, %n = select %s {k = 8, order = recent} : i32[N, L, 1, 8], i32[N, L, 1]
  %w     = weigh %s, %i, %n {rule = stick_breaking}
  %o     = attend %q, %k, %v, %i, %n {chunk = 64, scale = 0.125, off_by_one = 1}
  %y     = aggregate %o, %w : f32[N, L, 16, 64]
  %7     = reshape %y {shape = [N, L, 1024]}
  %out   = matmul %7, %w_o {trans_b = true} : f32[N, L, 1024]
  %zero  = constant 0.0 : f32[N, L, 1024]
  %d     = sub %out, %zero
  %sq    = square %d
  %loss  = reduce %sq {f = sum, axes = [0, 1, 2]}
  return %y, "out" = %out, "loss" = %loss
}
"#;

fn parsed(src: &str) -> Graph {
    text::parse(src).unwrap_or_else(|e| panic!("{}", render(&e, src)))
}

/// The rendered errors of a text: the parser's, or else the verifier's.
fn errors(src: &str) -> String {
    let errors = match text::parse(src) {
        Ok(g) => verify::verify(&g).expect_err("no error was found"),
        Err(e) => e,
    };
    check_spans(src, &errors);
    render(&errors, src)
}

fn check_spans(src: &str, errors: &[Diagnostic]) {
    for d in errors {
        let span = d.span.clone().unwrap_or(0..0);
        assert!(src.get(span).is_some(), "{d:?} is outside the text");
    }
}

/// A graph of these lines, with N and L.
fn graph(lines: &str) -> String {
    format!("graph g(N, L) {{\n{}\n}}\n", lines.trim_matches('\n'))
}

#[test]
fn a_layer_reads_and_prints() {
    let g = parsed(HSA);
    verify::verify(&g).unwrap_or_else(|e| panic!("{}", render(&e, HSA)));
    assert_eq!(verify::lint(&g).iter().map(|d| d.to_string()).collect::<Vec<_>>(), Vec::<String>::new());
    let printed = text::print(&g);
    assert_eq!(parsed(&printed), g);
    insta::assert_snapshot!(printed);
}

#[test]
fn nodes_know_their_line_and_names() {
    let g = parsed(HSA);
    let matmul = &g.nodes[8];
    let Loc::Text(span) = &matmul.loc else { panic!("{:?}", matmul.loc) };
    assert!(HSA[span.clone()].starts_with("%lm    = matmul") && HSA[span.clone()].ends_with("@layers.3.mixer"));
    assert_eq!(matmul.scope.as_deref(), Some("layers.3.mixer"));
    assert_eq!(matmul.names, vec![Some("lm".into())]);
    let reshape = g.iter().find(|(_, n)| matches!(n.op, Op::Reshape(_))).unwrap().1;
    assert_eq!(reshape.names, vec![None]);
    assert_eq!(g.outputs.iter().map(|o| &*o.name).collect::<Vec<_>>(), ["y", "out", "loss"]);
}

/// Names with odd characters, clashing names, odd numbers: all of it survives.
#[test]
fn odd_graphs_survive() {
    let mut b = Builder::new("a graph \"of\" sorts", &["N", "Ctx_2"]);
    let dim = Dim::sym("N").checked_mul(&Dim::sym("Ctx_2")).unwrap().checked_div(64).unwrap();
    let names = [
        "x",
        "x",
        "x~2",
        "7",
        "7_1",
        "",
        "a b",
        "\"",
        "\\",
        "a\nb\r\t\0\u{7f}",
        "größe 🦀",
        "x.y",
        "1e5",
        "%x",
        "#",
        "//",
        "}",
        "-",
        "_",
        "inf",
    ];
    for (i, name) in names.iter().enumerate() {
        let scope = ["", "layers.3", "odd scope \"", "a-b", "#"][i % 5];
        let x = b.scoped(scope, |b| b.input(&format!("{name} {i}"), Ty::new(DType::BF16, [dim.clone(), 3.into()])));
        b.name(x, name);
        b.output(name, x);
    }
    for value in [0.0, -0.0, 1e-300, -1e300, 0.1, f64::INFINITY, f64::NEG_INFINITY, 5e-324, 1e16, 123456789.125] {
        b.constant(value, Ty::f32([0usize; 0]));
    }
    b.constant(1.0, Ty::scalar(DType::Bool));
    b.constant(-3.0, Ty::i32([usize::MAX]));
    let x = b.param("x", Ty::f32([2usize, 3]));
    b.push(RmsNorm { eps: 1e-5 }, &[x, x]);
    let logits = b.param("l", Ty::f32([2usize, 3]));
    let labels = b.input("labels", Ty::i32([2usize]));
    b.push(CrossEntropy { ignore: -7 }, &[logits, labels]);
    let parts = ["mul v0 v1", "const -1e-5", "const inf", "where v2 v0 v1", "cast.bf16 v3"];
    let body = parts.map(|p| rambac_ir::attr::AttrValue::from_attr(&rambac_ir::attr::Attr::Str(p.into())).unwrap());
    let y = b.input("y", Ty::f32([3usize]));
    let (outs, dtypes) = (vec![6, 2], vec![DType::F32, DType::Bool]);
    let m = b.push_all(FusedMap { shape: vec![2.into(), 3.into()], body: body.to_vec(), outs, dtypes }, &[x, y]);
    b.name(m[1], "second");
    b.push(Slice { axis: 0, start: 0, end: 2 }, &[x]);
    // Builder mistakes are recorded, not built: rms_norm's weight above had the wrong rank.
    let mut g = Builder::extend(b.graph().clone()).finish().unwrap();
    let printed = text::print(&g);
    assert_eq!(parsed(&printed), g, "{printed}");
    insta::assert_snapshot!(printed);
    g.outputs.clear();
    g.syms.clear();
    g.nodes.clear();
    assert_eq!(parsed(&text::print(&g)), g);
}

#[test]
fn every_broken_line_is_reported() {
    let src = graph(
        r#"
  %x = input "x" : f32[N, L, 7]
  %a = matmull %x, %x
  %b = rms_norm %x, %x {epz = 1e-5}
  %c = rms_norm %x, %x {eps = 1e-5, foo = 1}
  %d = matmul %x, %x {trans_b = yes}
  %e = add %x, %y
  %f = add %x, %g
  %g = add %x, %x : f32[N, L, 8]
  %h = mul %g, %a
  %i = mul %X, %a : f32[N]
  %x = neg %x
  %j, %k = neg %x
  %s = select %x {k = 0}
  %t = input f32[N]
  %u = input "u"
  %v = input "v" : f23[N]
  %w = input "w" : f32[M, L]
  %z = reshape %x {shape = [N, K*7]}
  %1 = slice %x {axis = 2, start = 5, end = 9}
  %2 = slice %x {axis = 2, start = 5, start = 6, end = 7}
  %3 = neg %x, %x
  %4 = transpose %x {perm = [0, 1, 1]} junk
  %5 = "neg" %x
  neg %x
  %6 = neg %x : f32[N, L, 7], f32[N]
  %8 = constant : f32[N]
  %9 = constant 8x : f32[N]
  %10 = input "never closed : f32[N]
  %11 = iota {axis = 3} : i32[N]
  %12 = neg % x
  %13 = broadcast %x {shape = [N, L/0]}
  %14 = broadcast %x {shape = [N, L/N]}
  %15 = broadcast %x {shape = [99999999999999999999]}
  %16 = broadcast %x {shape = [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]}
  %17 = embedding %x, %x ! oops
  return "y" = %b, "z" = %nope
  %18 = neg %x
"#,
    );
    insta::assert_snapshot!(errors(&src));
}

#[test]
fn frames_are_checked() {
    let all = [
        "",
        "  \n# nothing\n",
        "graph",
        "graph g(N, N, l) {\n  return\n}",
        "graph g(N {\n  %x = input \"x\" : f32[N, M]\n  return %x\n}",
        "graph g() {\n  %x = input \"x\" : f32[2]\n}",
        "graph g() {\n  %x = input \"x\" : f32[2]\n  return %x",
        "graph g() {\n  return\n}\n}\ngraph h() {",
        "%x = input \"x\" : f32[2]\n%y = negg %x\nreturn %y",
        "graph g() {\n  %x = input \"x\" : f32[N]\n  return %x\n}",
    ];
    let rendered: Vec<String> = all.iter().map(|src| format!("{src:?}\n{}", errors(src))).collect();
    insta::assert_snapshot!(rendered.join("\n"));
}

/// Texts are cut, doubled, swapped and scrambled: the parser answers with a graph or with errors inside the text.
#[test]
fn mutations_never_panic() {
    let mut rng = Rng(2026);
    let clean = text::print(&parsed(HSA));
    let mut accepted = 0;
    for round in 0..6000 {
        let base = if round % 2 == 0 { HSA } else { &clean };
        let mut src = base.to_string();
        for _ in 0..1 + rng.below(3) {
            src = mutate(&mut rng, &src);
        }
        match text::parse(&src) {
            Ok(g) => {
                accepted += 1;
                assert_eq!(parsed(&text::print(&g)), g, "{src}");
                if let Err(e) = verify::verify(&g) {
                    check_spans(&src, &e);
                }
                check_spans(&src, &verify::lint(&g));
            }
            Err(e) => {
                assert!(!e.is_empty());
                check_spans(&src, &e);
                render(&e, &src);
            }
        }
    }
    // Some mutations leave a valid text; most don't.
    assert!((300..4000).contains(&accepted), "{accepted} accepted");
}

/// Words, numbers and single characters.
fn tokens(line: &str) -> Vec<String> {
    let mut out: Vec<String> = vec![];
    for c in line.chars() {
        match out.last_mut() {
            Some(t) if c.is_alphanumeric() && t.ends_with(|l: char| l.is_alphanumeric()) => t.push(c),
            _ => out.push(c.to_string()),
        }
    }
    out
}

fn mutate(rng: &mut Rng, src: &str) -> String {
    let mut lines: Vec<String> = src.split('\n').map(String::from).collect();
    let at = rng.below(lines.len());
    let mut t = tokens(&lines[at]);
    let n = t.len();
    let odd = [
        "%",
        "\"",
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        "=",
        ",",
        ":",
        "@",
        "/",
        "*",
        "-",
        "~2",
        "#",
        "é",
        "🦀",
        "\0",
        "\r",
        "18446744073709551616",
        "9223372036854775808",
        "18446744073709551615",
        "0",
        "1e999",
        "-1",
        "inf",
        "nan",
        "f32[",
        "L/0",
        "return",
        "graph",
    ];
    match rng.below(9) {
        0 => drop(lines.remove(at)),
        1 => lines.insert(at, lines[at].clone()),
        2 => {
            let other = rng.below(lines.len());
            lines.swap(at, other);
        }
        _ if n == 0 => {}
        3 => drop(t.remove(rng.below(n))),
        4 => {
            let i = rng.below(n);
            t.insert(i, t[i].clone());
        }
        5 => {
            let (i, j) = (rng.below(n), rng.below(n));
            t.swap(i, j);
        }
        6 => t.truncate(rng.below(n)),
        7 => t[rng.below(n)] = rng.pick(&odd).to_string(),
        _ => t.insert(rng.below(n + 1), rng.pick(&odd).to_string()),
    }
    if n > 0 && at < lines.len() && lines[at] == src.split('\n').nth(at).unwrap_or_default() {
        lines[at] = t.concat();
    }
    lines.join("\n")
}

/// Garbage of any kind.
#[test]
fn noise_never_panics() {
    let mut rng = Rng(5);
    let alphabet: Vec<char> = "graph(){}[]%@:=,\"\\u{}~/-*#09.eEN L\n\t\u{0}é🦀xinput".chars().collect();
    for _ in 0..3000 {
        let n = rng.below(120);
        let mut src: String = (0..n).map(|_| rng.pick(&alphabet)).collect();
        if rng.one_in(2) {
            src = format!("graph g(N, L) {{\n{src}\n}}");
        }
        if let Err(e) = text::parse(&src) {
            check_spans(&src, &e);
            render(&e, &src);
        }
    }
    let deep = graph(&format!("  %x = reduce %x {{axes = {}}}", "[".repeat(100_000)));
    assert!(text::parse(&deep).is_err());
}
