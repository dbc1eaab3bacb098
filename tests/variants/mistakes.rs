//! Mistakes that people make, and where and how they are told: by the verifier where it can know, else by `rambac try`.

use std::path::Path;
use std::process::Command;

const HEAD: &str = "graph mine(N, L) {\n  const heads = 4, kv_heads = 2, dim = 16, width = 64, chunk = 16, k = 2, scale = 1/sqrt(dim)\n  \
                    %x = input \"x\" : f32[N, L, width]\n  %q = input \"q\" : f32[N, L, heads, dim]\n  %k = input \"k\" : f32[N, L, \
                    kv_heads, dim]\n  %v = input \"v\" : f32[N, L, kv_heads, dim]\n  %t0 = constant 0 : i32[N]\n";
const POOLED: &str = "  %g = reshape %q {shape = [N, L, kv_heads, heads/kv_heads, dim]}\n  %qs = reduce %g {f = sum, axes = [3]}\n  %kc = summarise %k {chunk = chunk}\n";

/// What `rambac try` says of a text, and that it fails.
fn told(dir: &Path, body: &str, more: &[&str]) -> String {
    let file = dir.join("mine.ir");
    std::fs::write(&file, format!("{HEAD}{body}}}\n")).unwrap();
    let out = Command::new(env!("CARGO_BIN_EXE_rambac"))
        .args(["--threads", "2", "try", "mine.ir", "--no-train"])
        .args(more)
        .current_dir(dir)
        .env("NO_COLOR", "1")
        .env("COLUMNS", "200")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    assert_eq!(out.status.code(), Some(1), "{text}");
    text
}

#[track_caller]
fn expect(text: &str, parts: &[&str]) {
    // Whatever the width of the terminal.
    let flat = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for p in parts {
        assert!(flat.contains(p), "{p:?} is not in:\n{text}");
    }
}

#[test]
fn mistakes_are_told_with_line_and_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let attend =
        "  %y, %ly = attend %q, %k, %v, %i, %n {chunk = chunk, scale = scale, joint = true}\n  return \"o\" = %y\n";

    // Scores of one's own, without a mask.
    let unmasked = format!(
        "{POOLED}  %qt = transpose %qs {{perm = [0, 2, 1, 3]}}\n  %kt = transpose %kc {{perm = [0, 2, 1, 3]}}\n  \
         %st = matmul %qt, %kt {{trans_b = true}}\n  %s = transpose %st {{perm = [0, 2, 1, 3]}}\n  %i, %n = select %s {{k = k}}\n{attend}"
    );
    let text = told(dir.path(), &unmasked, &[]);
    expect(
        &text,
        &[
            "✗ causal",
            "%st = matmul: tokens before",
            "these scores are not masked",
            "mask %scores, %start",
            "mine.ir:13:3",
        ],
    );
    expect(&text, &["✗ well-formed", "nothing hides chunks that are not complete"]);

    // Attention without causal.
    let text = told(dir.path(), "  %y = attention %q, %k, %v {scale = scale}\n  return \"o\" = %y\n", &[]);
    expect(&text, &["✗ causal", "%y = attention: tokens before 1 change", "say causal = true", "mine.ir:8:3"]);

    // A mask that uncovers chunks before they are complete.
    let early = format!(
        "{POOLED}  %s = score %qs, %kc, %t0 {{chunk = 8, scale = scale}}\n  %i, %n = select %s {{k = k}}\n{attend}"
    );
    expect(
        &told(dir.path(), &early, &[]),
        &["its chunk is 16, but %s = score has chunk 8", "make them equal", "mine.ir:13:3"],
    );

    // A text that is said to begin later.
    let later = format!(
        "{POOLED}  %t1 = constant 15 : i32[N]\n  %s = score %qs, %kc, %t1 {{chunk = chunk, scale = scale}}\n  %i, %n = select %s {{k = k}}\n{attend}"
    );
    let text = told(dir.path(), &later, &[]);
    expect(
        &text,
        &["%s = score: a text begins at token 0, but it starts at %t1", "%t0 = constant 0 : i32[N]", "mine.ir:12:3"],
    );

    // A mask undone.
    let undone = format!(
        "{POOLED}  %s = score %qs, %kc, %t0 {{chunk = chunk, scale = scale}}\n  %e = exp %s\n  %i, %n = select %e {{k = k}}\n{attend}"
    );
    expect(
        &told(dir.path(), &undone, &[]),
        &["turns the -inf of unfinished chunks into numbers", "✗ causal", "mine.ir:13:3"],
    );

    // A scorer that learns nothing: its scores only choose.
    let deaf = format!(
        "  %wq = param \"scorer\" : f32[kv_heads*dim, width]\n  %rf = matmul %x, %wq {{trans_b = true}}\n  \
         %rq = reshape %rf {{shape = [N, L, kv_heads, dim]}}\n  %kc = summarise %k {{chunk = chunk}}\n  \
         %s = score %rq, %kc, %t0 {{chunk = chunk, scale = scale}}\n  %i, %n = select %s {{k = k}}\n{attend}"
    );
    let text = told(dir.path(), &deaf, &[]);
    expect(
        &text,
        &[
            "no gradient reaches this learned scorer",
            "✗ gradients",
            "no gradient reaches \"scorer\"",
            "mine.ir:8:3",
            "\"aux\" = %loss",
        ],
    );

    // Query heads that key heads can't share.
    let text = told(
        dir.path(),
        "  %y = attention %q, %k, %v {scale = scale, causal = true}\n  return \"o\" = %y\n",
        &["--set", "kv_heads=3"],
    );
    expect(&text, &["query heads 4 must be a multiple of key heads 3", "mine.ir:8:3"]);

    // Every query head chooses for itself, though two share a key head.
    let own = format!(
        "  %kc = summarise %k {{chunk = chunk}}\n  %s = score %q, %kc, %t0 {{chunk = chunk, scale = scale}}\n  %i, %n = select %s {{k = k}}\n{attend}"
    );
    let text = told(dir.path(), &own, &[]);
    expect(&text, &["chosen for 4 heads, but there are 2 key heads", "reduce {f = sum, axes = [3]}", "mine.ir:11:3"]);

    // More to choose than there is.
    let many = format!(
        "{POOLED}  %s = score %qs, %kc, %t0 {{chunk = chunk, scale = scale}}\n  %i, %n = select %s {{k = k}}\n{attend}"
    );
    let text = told(dir.path(), &many, &["--set", "k=40", "--len", "256"]);
    expect(&text, &["k is 40, but a text of 256 tokens has only 16 of L/16", "choose fewer (k = 8)", "mine.ir:12:3"]);

    // Forced units that do not fit.
    let text = told(dir.path(), &many.replace("{k = k}", "{k = k, sinks = 1, recent = 2}"), &[]);
    expect(&text, &["sinks = 1 and recent = 2 are more than k = 2", "mine.ir:12:3"]);

    // NaN: the first token sees nothing, and its weights are divided by their sum.
    let nan = format!(
        "{POOLED}  %s = score %qs, %kc, %t0 {{chunk = chunk, scale = scale}}\n  %i, %n = select %s {{k = k}}\n  \
         %w = weigh %s, %i, %n {{rule = sigmoid}}\n  %sum = reduce %w {{f = sum, axes = [3], keep = true}}\n  \
         %all = broadcast %sum {{shape = [N, L, kv_heads, k]}}\n  %p = div %w, %all\n  \
         %o = attend %q, %k, %v, %i, %n {{chunk = chunk, scale = scale}}\n  %y = aggregate %o, %p\n  return \"o\" = %y\n"
    );
    expect(&told(dir.path(), &nan, &[]), &["✗ finite", "%p = div: it gives NaN or infinity", "mine.ir:16:3"]);

    // A mean over the text: the future, and it depends on the length.
    let mean = "  %m = reduce %v {f = max, axes = [1], keep = true}\n  %all = broadcast %m {shape = [N, L, kv_heads, dim]}\n  \
                %vv = add %v, %all\n  %y = attention %q, %k, %vv {scale = scale, causal = true}\n  return \"o\" = %y\n";
    expect(&told(dir.path(), mean, &[]), &["✗ causal", "✗ any length", "mine.ir:9:3"]);
}

#[test]
fn interfaces_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let text = told(dir.path(), "  %z = input \"z\" : f32[N, L, 4]\n  %y = add %q, %q\n  return \"out\" = %y\n", &[]);
    expect(&text, &["a variant has no input \"z\"", "a variant has no output \"out\"", "return \"o\" = %y"]);
    let text = told(dir.path(), "  %y = add %k, %k\n  return \"o\" = %y\n", &[]);
    expect(&text, &["\"o\" is f32[N, L, 2, 16], but must be f32[N, L, 4, 16]"]);
    let text = told(dir.path(), "  return \"o\" = %q\n", &["--set", "chnk=4"]);
    expect(&text, &["the graph has no const `chnk`", "its consts: heads, kv_heads"]);
}
