//! Mistakes that people make, and where and how they are told: by the verifier where it can know, else by `rambac try`.

use std::path::Path;
use std::process::Command;

const HEAD: &str = "graph mine(N, L) {\n  const heads = 4, kv_heads = 2, dim = 16, width = 64, chunk = 16, k = 2, scale = 1/sqrt(dim)\n  \
                    %x = input \"x\" : f32[N, L, width]\n  %q = input \"q\" : f32[N, L, heads, dim]\n  %k = input \"k\" : f32[N, L, \
                    kv_heads, dim]\n  %v = input \"v\" : f32[N, L, kv_heads, dim]\n  %t0 = constant 0 : i32[N]\n";
const POOLED: &str = "  %g = reshape %q {shape = [N, L, kv_heads, heads/kv_heads, dim]}\n  %qs = reduce %g {f = sum, axes = [3]}\n  %kc = summarise %k {chunk = chunk}\n";

/// What `rambac try` says of a text, and that it fails.
fn told(dir: &Path, body: &str, more: &[&str]) -> String {
    write(dir, "mine", body);
    let (code, text) = rambac(dir, &[&["try", "mine.ir", "--no-train"], more].concat());
    assert_eq!(code, Some(1), "{text}");
    text
}

fn write(dir: &Path, name: &str, body: &str) {
    std::fs::write(dir.join(format!("{name}.ir")), format!("{HEAD}{body}}}\n")).unwrap();
}

/// The status of a command, and all that it prints.
fn rambac(dir: &Path, args: &[&str]) -> (Option<i32>, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_rambac"))
        .args(["--threads", "2"])
        .args(args)
        .current_dir(dir)
        .env("NO_COLOR", "1")
        .env("COLUMNS", "200")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    assert!(!text.contains("panicked"), "{text}");
    (out.status.code(), text)
}

#[track_caller]
fn expect(text: &str, parts: &[&str]) {
    // Whatever the width of the terminal.
    let flat =
        text.split(|c: char| c.is_whitespace() || c == '│').filter(|w| !w.is_empty()).collect::<Vec<_>>().join(" ");
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
    // Nothing is counted of chunks that do not exist.
    expect(&text, &["not asked further"]);
    assert!(!text.contains("What does it cost") && !text.contains("Error:"), "{text}");

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

#[test]
fn the_line_that_lets_unfinished_chunks_be_chosen_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let attend =
        "  %y, %ly = attend %q, %k, %v, %i, %n {chunk = chunk, scale = scale, joint = true}\n  return \"o\" = %y\n";
    // A mask of one's own that asks where a chunk begins.
    let own = format!(
        "{POOLED}  %pos = iota {{axis = 1}} : i32[N, L, kv_heads, L/chunk]\n  %c = iota {{axis = 3}} : i32[N, L, kv_heads, L/chunk]\n  \
         %size = constant chunk : i32[N, L, kv_heads, L/chunk]\n  %first = mul %c, %size\n  %ok = ge %pos, %first\n  \
         %none = constant -inf : f32[N, L, kv_heads, L/chunk]\n  %all = constant 0 : f32[N, L, kv_heads, L/chunk]\n  \
         %s = where %ok, %all, %none\n  %i, %n = select %s {{k = k}}\n{attend}"
    );
    let text = told(dir.path(), &own, &[]);
    expect(
        &text,
        &["%s = where: it lets token 0 choose chunk 0, whose last token is 15", "(c + 1)*16", "mine.ir:18:3"],
    );

    // A floor under the scores.
    let floor = format!(
        "{POOLED}  %m = score %qs, %kc, %t0 {{chunk = chunk, scale = scale}}\n  %low = constant -1e9 : f32[N, L, kv_heads, L/chunk]\n  \
         %s = max %m, %low\n  %i, %n = select %s {{k = k}}\n{attend}"
    );
    let text = told(dir.path(), &floor, &[]);
    expect(&text, &["%s = max: it lets token 0 choose chunk 0", "mask %scores, %start {chunk = 16}", "mine.ir:13:3"]);

    // A preference for chunks whatever the token, and nothing that hides them; that it is another in longer texts is no second
    // mistake.
    let prior = format!(
        "{POOLED}  %p = reduce %kc {{f = sum, axes = [3]}}\n  %pt = transpose %p {{perm = [0, 2, 1]}}\n  \
         %p1 = reshape %pt {{shape = [N, 1, kv_heads, L/chunk]}}\n  %s = broadcast %p1 {{shape = [N, L, kv_heads, L/chunk]}}\n  \
         %i, %n = select %s {{k = 4}}\n{attend}"
    );
    let text = told(dir.path(), &prior, &[]);
    expect(
        &text,
        &["%s = broadcast: it lets token 0 choose chunk 0", "✗ any length", "mine.ir:14:3", "mine.ir: 2 errors"],
    );
}

#[test]
fn heads_that_choose_for_others_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let rest = "  %kc = summarise %k {chunk = chunk}\n  %s = score %qs, %kc, %t0 {chunk = chunk, scale = scale}\n  \
                %i, %n = select %s {k = k}\n  %y, %ly = attend %q, %k, %v, %i, %n {chunk = chunk, scale = scale, joint = true}\n  \
                return \"o\" = %y\n";
    let crossed =
        "  %g = reshape %q {shape = [N, L, heads/kv_heads, kv_heads, dim]}\n  %qs = reduce %g {f = sum, axes = [2]}\n";
    let text = told(dir.path(), &format!("{crossed}{rest}"), &[]);
    let what =
        "%g = reshape: key head 0 is chosen for by query heads 0, 2, but query heads 0, 1 attend what it chooses";
    expect(&text, &["✗ heads together", what, "neighbours share one", "mine.ir:8:3"]);

    // The first query heads choose for all.
    let first = "  %qs = slice %q {axis = 2, start = 0, end = kv_heads}\n";
    let text = told(dir.path(), &format!("{first}{rest}"), &[]);
    expect(&text, &["✗ heads together", "key head 1 is chosen for by query heads 1, but query heads 2, 3 attend"]);

    // Too few heads for the keys.
    let few = "  %g = reduce %q {f = sum, axes = [2]}\n  %qs = reshape %g {shape = [N, L, 1, dim]}\n";
    let text = told(dir.path(), &format!("{few}{rest}"), &[]);
    expect(
        &text,
        &[
            "query heads 1 must be a multiple of the landmarks' heads 2: sum the queries of each group alone",
            "mine.ir:11:3",
        ],
    );

    // All of them together may.
    let all =
        "  %g = reduce %q {f = sum, axes = [2], keep = true}\n  %qs = broadcast %g {shape = [N, L, kv_heads, dim]}\n";
    write(dir.path(), "mine", &format!("{all}{rest}"));
    let (code, text) = rambac(dir.path(), &["try", "mine.ir", "--no-train"]);
    assert_eq!(code, Some(0), "{text}");
}

#[test]
fn keys_that_stand_for_chunks_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let body = "  %kc = summarise %k {chunk = chunk}\n  %vc = summarise %v {chunk = chunk}\n  %y = attention %q, %kc, %vc {scale = \
                scale}\n  return \"o\" = %y\n";
    let text = told(dir.path(), body, &[]);
    expect(&text, &["L/16 keys for L tokens: say unit = S, if a key stands for a chunk of S tokens", "mine.ir:10:3"]);
}

const LEAK: &str = "  %y = attention %q, %k, %v {scale = scale}\n  return \"o\" = %y\n";

#[test]
fn what_try_calls_wrong_is_not_trained_in_silence() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let train = ["train", "tiny", "--len", "128", "--batch", "1", "--steps", "1", "--attention", "mine.ir", "--out"];
    let compile = ["compile", "tiny", "--context", "64", "--attention", "mine.ir", "-o"];

    // The future: refused by both, with the line; nothing is written.
    write(at, "mine", LEAK);
    let what = ["%y = attention: tokens before 1 change", "say causal = true", "mine.ir:8:3"];
    for (args, out) in [(&train[..], "runs"), (&compile[..], "out.rambac")] {
        let (code, text) = rambac(at, &[args, &[out]].concat());
        assert_eq!(code, Some(1), "{text}");
        expect(&text, &what);
        expect(&text, &["first put right what is wrong", "--anyway"]);
        assert!(!at.join(out).exists(), "{out}");
    }
    let (code, text) = rambac(at, &[&train[..], &["runs", "--anyway"]].concat());
    assert_eq!(code, Some(0), "{text}");
    expect(&text, &what);
    // As a graph it may be meant.
    let (code, text) = rambac(at, &["compile", "mine.ir", "-o", "graph.rambac"]);
    assert_eq!(code, Some(0), "{text}");
    expect(&text, &["mine.ir: 1 warning", what[0]]);

    // A scorer that learns nothing: a warning, but not where nothing is to be learnt.
    let deaf = "  %wq = param \"scorer\" : f32[kv_heads*dim, width]\n  %rf = matmul %x, %wq {trans_b = true}\n  \
         %rq = reshape %rf {shape = [N, L, kv_heads, dim]}\n  %kc = summarise %k {chunk = chunk}\n  \
         %s = score %rq, %kc, %t0 {chunk = chunk, scale = scale}\n  %i, %n = select %s {k = k}\n  \
         %y, %ly = attend %q, %k, %v, %i, %n {chunk = chunk, scale = scale, joint = true}\n  return \"o\" = %y\n";
    write(at, "mine", deaf);
    let (code, text) = rambac(at, &[&train[..], &["deaf"]].concat());
    assert_eq!(code, Some(0), "{text}");
    expect(&text, &["⚠", "no gradient reaches \"scorer\", so it never learns", "mine.ir:8:3"]);
    let (code, text) = rambac(at, &[&compile[..], &["deaf.rambac"]].concat());
    assert_eq!(code, Some(0), "{text}");
    assert!(!text.contains("no gradient"), "{text}");

    // More to choose than rows have.
    let (code, text) = rambac(
        at,
        &[
            "train",
            "tiny",
            "--len",
            "48",
            "--batch",
            "1",
            "--steps",
            "1",
            "--task",
            "recall",
            "--attention",
            "mine.ir",
            "--out",
            "few",
        ],
    );
    assert_eq!(code, Some(0), "{text}");
    expect(&text, &["but a text of 48 tokens has only 3 of L/16", "mine.ir:13:3"]);

    // One that is right is not spoken of.
    write(at, "mine", &LEAK.replace("{scale = scale}", "{scale = scale, causal = true}"));
    let (code, text) = rambac(at, &[&train[..], &["right"]].concat());
    assert_eq!(code, Some(0), "{text}");
    assert!(!text.contains("mine.ir"), "{text}");
}

#[test]
fn a_loss_that_is_no_number_is_traced_to_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let burst = "  %big = constant 1000 : f32[N, L, heads, dim]\n  %a = mul %q, %big\n  %e = exp %a\n  \
                 %o = attention %e, %k, %v {scale = scale, causal = true}\n  %y = mul %o, %e\n  return \"o\" = %y\n";
    write(at, "mine", burst);
    // At the size of a check nothing overflows in f64 that does in f32.
    let args = [
        "train",
        "tiny",
        "--len",
        "128",
        "--batch",
        "2",
        "--steps",
        "9",
        "--warmup",
        "1",
        "--lr",
        "5",
        "--attention",
        "mine.ir",
        "--anyway",
        "--out",
        "runs",
    ];
    let (code, text) = rambac(at, &args);
    assert_eq!(code, Some(1), "{text}");
    expect(
        &text,
        &[
            "the gradient's norm NaN",
            "run again on the same batch, %e = exp of layers.",
            "mine.ir:10:3",
            "no checkpoint was written yet",
        ],
    );
    let (code, text) = rambac(at, &[&args[..], &["--save-every", "1"]].concat());
    assert_eq!(code, Some(1), "{text}");
    if at.join("runs/latest").exists() {
        expect(&text, &["the last whole checkpoint is of step", "rambac train --resume runs"]);
    }
}

#[test]
fn reports_and_budgets() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let two = format!(
        "{POOLED}  %s = score %qs, %kc, %t0 {{chunk = chunk, scale = scale}}\n  %i, %n = select %s {{k = k}}\n  \
         %k4 = summarise %k {{chunk = 4*chunk}}\n  %s4 = score %qs, %k4, %t0 {{chunk = 4*chunk, scale = scale}}\n  \
         %i4, %n4 = select %s4 {{k = 1}}\n  %a, %la = attend %q, %k, %v, %i, %n {{chunk = chunk, scale = scale, joint = true}}\n  \
         %b, %lb = attend %q, %k, %v, %i4, %n4 {{chunk = 4*chunk, scale = scale, joint = true}}\n  %y = add %a, %b\n  return \"o\" = %y\n"
    );
    // Two files of one graph name, side by side and in one folder.
    write(at, "one", &two);
    write(at, "other", &LEAK.replace("{scale = scale}", "{scale = scale, causal = true}"));
    for name in ["one", "other"] {
        let (code, text) = rambac(at, &["try", &format!("{name}.ir"), "--no-train"]);
        assert_eq!(code, Some(0), "{text}");
        expect(&text, &[&format!("the report: {name}.html")]);
    }
    let page = |name: &str| std::fs::read_to_string(at.join(format!("{name}.html"))).unwrap();
    assert!(page("one").contains("select %s4") && !page("other").contains("select"));

    // Each choice has its rank, and units of 64 tokens and of one see as many tokens.
    let (code, text) = rambac(at, &["compare", "one.ir", "other.ir", "moba", "--tokens", "6K", "--len", "192"]);
    assert_eq!(code, Some(0), "{text}");
    expect(
        &text,
        &["needle's rank by %i chosen needle's rank by %i4 chosen", "Side by side, each trained on the same"],
    );
    let page = page("compare");
    assert!(page.contains("by %i in a passkey text") && page.contains("by %i4 in a passkey text"));
    let budget = text.split("each trained on the same ").nth(1).unwrap().split(' ').next().unwrap();
    assert_eq!(page.matches(&format!("<td>{budget}</td>")).count(), 3, "{budget}");
}
