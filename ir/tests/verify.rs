//! The verifier and the linter: every rule with a graph that breaks it, and the message it gets.

use rambac_ir::diagnostic::render;
use rambac_ir::ops::*;
use rambac_ir::{Builder, Dim, Graph, NodeId, Output, Sym, Ty, Value, text, verify};
use std::fmt::Write;

/// Sources that most examples need.
const HEAD: &str = r#"
  %rq = input "rq" : f32[N, L, 2, 8]
  %lm = input "lm" : f32[N, L/16, 2, 8]
  %start = input "start" : i32[N]
  %q = input "q" : f32[N, L, 4, 32]
  %k = input "k" : f32[N, L, 2, 32]
  %s = score %rq, %lm, %start {chunk = 16, scale = 0.25}
  %i, %n = select %s {k = 4}
  %w = weigh %s, %i, %n {rule = softmax}
"#;

/// Errors and warnings of a body with `HEAD` before it.
fn findings(body: &str) -> String {
    let src = format!("graph g(N, L) {{{HEAD}{}}}\n", body.trim_start_matches('\n'));
    let g = text::parse(&src).unwrap_or_else(|e| panic!("{}", render(&e, &src)));
    let found = match verify::verify(&g) {
        Err(e) => e,
        Ok(()) => verify::lint(&g),
    };
    render(&found, &src)
}

fn good() -> Graph {
    let mut b = Builder::new("g", &["N"]);
    let x = b.input("x", Ty::f32([Dim::sym("N"), 4.into()]));
    let w = b.param("w", Ty::f32([4usize]));
    let y = b.rms_norm(x, w, 1e-5);
    let z = b.neg(y);
    b.output("z", z);
    b.finish().unwrap()
}

/// What the verifier says of `good()` after a change, without source locations.
fn broken(change: impl FnOnce(&mut Graph)) -> String {
    let mut g = good();
    change(&mut g);
    let errors = verify::verify(&g).expect_err("the change went unnoticed");
    let mut out = String::new();
    for e in errors {
        writeln!(out, "{}: {}{}", e.severity, e.message, e.help.map_or(String::new(), |h| format!(" [{h}]"))).unwrap();
    }
    out
}

#[test]
fn structure() {
    assert!(verify::verify(&good()).is_ok());
    let all = [
        ("later operand", broken(|g| g.nodes[2].inputs[0] = NodeId(3).result(0))),
        ("own operand", broken(|g| g.nodes[2].inputs[0] = NodeId(2).result(0))),
        ("operand beyond", broken(|g| g.nodes[2].inputs[1] = NodeId(99).result(0))),
        ("result beyond", broken(|g| g.nodes[2].inputs[1] = NodeId(1).result(1))),
        ("arity", broken(|g| g.nodes[2].inputs.truncate(1))),
        ("types", broken(|g| g.nodes[3].tys[0] = Ty::f32([7usize]))),
        ("no types", broken(|g| g.nodes[3].tys.clear())),
        ("names", broken(|g| g.nodes[3].names.clear())),
        ("eps", broken(|g| g.nodes[2].op = RmsNorm { eps: -1.0 }.into())),
        ("nan", broken(|g| g.nodes[2].op = RmsNorm { eps: f64::NAN }.into())),
        ("undeclared symbol", broken(|g| g.syms.clear())),
        ("symbol twice", broken(|g| g.syms.push(Sym::new("N")))),
        ("odd symbol", broken(|g| g.syms.push(Sym::new("n*2")))),
        (
            "sources",
            broken(|g| {
                if let Op::Source(s) = &mut g.nodes[1].op {
                    s.name = "x".into()
                }
            }),
        ),
        ("outputs", broken(|g| g.outputs.push(g.outputs[0].clone()))),
        ("output beyond", broken(|g| g.outputs[0].value = Value { node: NodeId(7), result: 0 })),
        ("update", broken(|g| g.outputs.push(Output { name: "w".into(), value: NodeId(3).result(0) }))),
        (
            "fraction",
            broken(|g| {
                let ty = Ty::f32([Dim::int(3).checked_div(64).unwrap()]);
                if let Op::Source(s) = &mut g.nodes[1].op {
                    s.ty = ty.clone();
                }
                g.nodes[1].tys[0] = ty;
            }),
        ),
    ];
    let text: Vec<String> = all.into_iter().map(|(what, errors)| format!("{what}\n{errors}")).collect();
    insta::assert_snapshot!(text.join("\n"));
}

#[test]
fn selections_belong_together() {
    let other = "  %rq2 = neg %rq\n  %s2 = score %rq2, %lm, %start {chunk = 16, scale = 0.25}\n  %i2, %n2 = select %s2 {k = 4}\n  %w2 = weigh %s2, %i2, %n2 {rule = softmax}\n";
    let all = [
        ("count of another", format!("{other}  %o = attend %q, %k, %k, %i, %n2 {{chunk = 16, scale = 1}}\n  return %o, %w\n")),
        (
            "weights of another",
            format!("{other}  %o = chunk_attention %q, %k, %k, %i, %n, %w2 {{chunk = 16, scale = 1}}\n  return %o\n"),
        ),
        (
            "weights of another, aggregated",
            format!("{other}  %o = attend %q, %k, %k, %i, %n {{chunk = 16, scale = 1}}\n  %y = aggregate %o, %w2\n  return %y\n"),
        ),
        ("scores of another", format!("{other}  %w3 = weigh %s2, %i, %n {{rule = softmax}}\n  return %w3\n")),
        ("chunk size", "  %o = attend %q, %k, %k, %i, %n {chunk = 8, scale = 1}\n  return %o\n".into()),
        (
            "number of chunks",
            "  %k2 = input \"k2\" : f32[N, 64, 2, 32]\n  %o = attend %q, %k2, %k2, %i, %n {chunk = 16, scale = 1}\n  return %o\n"
                .into(),
        ),
        (
            "constant count",
            "  %c = constant 4 : i32[N, L, 2]\n  %o = attend %q, %k, %k, %i, %c {chunk = 16, scale = 1}\n  return %o\n".into(),
        ),
    ];
    let text: Vec<String> = all.into_iter().map(|(what, body)| format!("{what}\n{}", findings(&body))).collect();
    insta::assert_snapshot!(text.join("\n"));
}

/// Legal graphs that look like the traps.
#[test]
fn legal_selections_pass() {
    let all = [
        // A recomputed selection is the same one.
        "  %s2 = score %rq, %lm, %start {chunk = 16, scale = 0.25}\n  %i2, %n2 = select %s2 {k = 4}\n  %o = attend %q, %k, %k, %i2, %n {chunk = 16, scale = 1}\n  %y = aggregate %o, %w\n  return %y\n",
        // A fused selection beside the unfused.
        "  %i2, %n2, %w2, %p = selection %rq, %lm, %start {chunk = 16, scale = 0.25, k = 4, rule = softmax}\n  %w3 = weigh %s, %i2, %n2 {rule = sigmoid}\n  %y = chunk_attention %q, %k, %k, %i2, %n2, %w3 {chunk = 16, scale = 1}\n  return %y\n",
        // Gated weights, one choice shared by both heads.
        "  %g = input \"g\" : f32[N, L, 2, 4]\n  %wg = mul %w, %g\n  %y = chunk_attention %q, %k, %k, %i, %n, %wg {chunk = 16, scale = 1}\n  return %y\n",
        "  %i1 = slice %i {axis = 2, start = 0, end = 1}\n  %i3 = broadcast %i1 {shape = [N, L, 2, 4]}\n  %n1 = reshape %n {shape = [N, L, 2, 1]}\n  %n2 = slice %n1 {axis = 2, start = 0, end = 1}\n  %n3 = broadcast %n2 {shape = [N, L, 2, 1]}\n  %n4 = reshape %n3 {shape = [N, L, 2]}\n  %o = attend %q, %k, %k, %i3, %n4 {chunk = 16, scale = 1}\n  return %o\n",
        // Indices from outside.
        "  %i2 = state \"i\" : i32[N, L, 2, 4]\n  %n2 = state \"n\" : i32[N, L, 2]\n  %o = attend %q, %k, %k, %i2, %n2 {chunk = 16, scale = 1}\n  return %o\n",
        // Scores and a mask of one's own.
        "  %m = input \"m\" : f32[N, L, 2, 4]\n  %p = input \"p\" : bool[N, L, 2, 4]\n  %x = constant -inf : f32[N, L, 2, 4]\n  %s2 = where %p, %m, %x\n  %i2, %n2 = select %s2 {k = 4}\n  return %i2\n",
        // A bias that the mask survives.
        "  %b = input \"b\" : f32[N, L, 2, L/16]\n  %s2 = add %s, %b\n  %i2, %n2 = select %s2 {k = 4}\n  %w2 = weigh %s2, %i2, %n2 {rule = softmax}\n  return %w2\n",
    ];
    for body in all {
        assert_eq!(findings(body), "", "{body}");
    }
}

#[test]
fn warnings() {
    let learned = "  %wq = param \"wq\" : f32[8, 8]\n  %rq2 = matmul %rq, %wq\n  %s2 = score %rq2, %lm, %start {chunk = 16, scale = 0.25}\n  %i2, %n2 = select %s2 {k = 4}\n";
    let attend = "  %y = chunk_attention %q, %k, %k, %i2, %n2, %w2 {chunk = 16, scale = 1}\n  return %y\n";
    let all = [
        ("scores without a mask", "  %m = input \"m\" : f32[N, L, 2, 7]\n  %i2, %n2 = select %m {k = 4}\n  return %i2\n".into()),
        ("mask undone", "  %e = exp %s\n  %i2, %n2 = select %e {k = 4}\n  return %i2\n".into()),
        ("mask undone by max", "  %z = constant 0 : f32[N, L, 2, L/16]\n  %e = max %s, %z\n  %i2, %n2 = select %e {k = 4}\n  return %i2\n".into()),
        (
            "weighs others",
            "  %b = input \"b\" : f32[N, L, 2, L/16]\n  %s2 = add %s, %b\n  %i2, %n2 = select %s2 {k = 4}\n  %w2 = weigh %s, %i2, %n2 {rule = softmax}\n  return %w2\n".into(),
        ),
        (
            "k too large",
            "  %m = input \"m\" : f32[N, 3, 2, 8]\n  %s2 = score %rq, %m, %start {chunk = 16, scale = 0.25}\n  %i2, %n2 = select %s2 {k = 4}\n  return %i2\n"
                .into(),
        ),
        ("learned, weights of one", format!("{learned}  %w2 = weigh %s2, %i2, %n2 {{rule = one}}\n{attend}")),
        ("learned, constant weights", format!("{learned}  %w2 = constant 0.25 : f32[N, L, 2, 4]\n{attend}")),
        (
            "learned, weights unused",
            format!("{learned}  %w3 = weigh %s2, %i2, %n2 {{rule = softmax}}\n  %w2 = constant 0.25 : f32[N, L, 2, 4]\n{attend}"),
        ),
        (
            "learned, fused, weights unused",
            "  %wq = param \"wq\" : f32[8, 8]\n  %rq2 = matmul %rq, %wq\n  %i2, %n2, %w3, %p = selection %rq2, %lm, %start {chunk = 16, scale = 0.25, k = 4, rule = softmax}\n  %o = attend %q, %k, %k, %i2, %n2 {chunk = 16, scale = 1}\n  return %o\n".into(),
        ),
    ];
    let text: Vec<String> = all.into_iter().map(|(what, body)| format!("{what}\n{}", findings(&body))).collect();
    insta::assert_snapshot!(text.join("\n"));
    // What is learned by its weights is fine.
    assert_eq!(findings(&format!("{learned}  %w2 = weigh %s2, %i2, %n2 {{rule = softmax}}\n{attend}")), "");
}
