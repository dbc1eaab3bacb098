//! Bad PTX and bad launches are errors, and broken kernels are findings: nothing panics, whatever the text.

use rambac_driver::Error;
use rambac_simulator::device::{Arg, Code, Device, Extent, Simulator};
use rambac_simulator::{Kind, Options};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const PTX: &str = r#"
.version 8.0
.target sm_80
.address_size 64
.const .align 4 .b8 table[16] = {1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0};
.global .align 4 .u32 counter = 7;
.extern .shared .align 16 .b8 dyn[];
.func (.param .b32 r) twice(.param .b32 a) {
    .reg .b32 %r<4>;
    ld.param.b32 %r1, [a];
    add.s32 %r2, %r1, %r1;
    st.param.b32 [r], %r2;
    ret;
}
.visible .entry k(.param .u64 out, .param .u64 in, .param .u32 n) {
    .reg .pred %p<4>;
    .reg .b32 %r<40>;
    .reg .f32 %f<20>;
    .reg .f64 %fd<4>;
    .reg .b64 %rd<20>;
    .shared .align 16 .b8 tile[1024];
    .local .align 16 .b8 depot[64];
    ld.param.u64 %rd1, [out];
    ld.param.u64 %rd2, [in];
    ld.param.u32 %r1, [n];
    mov.u32 %r2, %tid.x;
    setp.ge.u32 %p1, %r2, %r1;
    mul.wide.u32 %rd3, %r2, 16;
    add.s64 %rd4, %rd2, %rd3;
    mov.u32 %r3, tile;
    mad.lo.u32 %r4, %r2, 16, %r3;
    cp.async.cg.shared.global [%r4], [%rd4], 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    ld.shared.v4.f32 {%f1, %f2, %f3, %f4}, [%r4];
    xor.b32 %r5, %r2, 1;
    shfl.sync.bfly.b32 %r6|%p2, %r2, 1, 31, -1;
    vote.sync.ballot.b32 %r7, %p2, -1;
    redux.sync.add.s32 %r8, %r7, -1;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r4];
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f5, %f6, %f7, %f8}, {%r10, %r11, %r12, %r13}, {%r10, %r11}, {%f1, %f2, %f3, %f4};
    cvt.rn.bf16x2.f32 %r14, %f5, %f6;
    lop3.b32 %r15, %r14, %r5, %r8, 150;
    prmt.b32 %r16, %r15, %r14, 30292;
    bfi.b32 %r17, %r16, %r15, 3, 7;
    { .param .b32 p0; st.param.b32 [p0+0], %r17; .param .b32 q0; call.uni (q0), twice, (p0); ld.param.b32 %r18, [q0+0]; }
    mov.u64 %rd5, depot;
    st.local.u32 [%rd5+4], %r18;
    ld.local.u32 %r19, [%rd5+4];
    ld.const.u32 %r20, [table+8];
    atom.global.add.u32 %r21, [counter], 1;
    ex2.approx.ftz.f32 %f9, %f5;
    fma.rn.f32 %f10, %f9, %f6, %f7;
    cvt.f64.f32 %fd1, %f10;
    div.rn.f64 %fd2, %fd1, %fd1;
    mov.b64 %rd6, {%r19, %r20};
    mov.b64 {%r22, %r23}, %rd6;
    selp.b32 %r24, %r22, %r23, %p1;
    mov.u32 %r25, 3;
$loop:
    add.s32 %r25, %r25, -1;
    setp.ne.s32 %p3, %r25, 0;
    @%p3 bra $loop;
    mul.wide.u32 %rd7, %r2, 4;
    add.s64 %rd8, %rd1, %rd7;
    @!%p1 st.global.u32 [%rd8], %r24;
    ret;
}
"#;

/// Loads and runs; findings, or why not.
fn run(ptx: &str, n: u32) -> Result<Vec<rambac_simulator::Finding>, Error> {
    let mut s = Simulator::new(Options { limit: 20_000, ..Options::default() });
    let m = s.load(&Code::ptx(ptx))?;
    let (out, input) = (s.alloc("out", 128)?, s.alloc("in", 512)?);
    s.copy_in(input, 0, &[1; 512])?;
    let kernel = s.kernels(m).first().cloned().unwrap_or_default();
    let extent = Extent { shared: 64, ..Extent::line(2, 32) };
    s.launch(m, &kernel, extent, &[out.into(), input.into(), Arg::from(n)])?;
    Ok(s.take_findings())
}

#[test]
fn the_program_as_it_is() {
    let findings = run(PTX, 32).unwrap();
    // Both blocks write equal values: no race.
    assert!(findings.is_empty(), "{}", findings[0]);
}

#[test]
fn damaged_text_never_panics() {
    let mut r = ChaCha8Rng::seed_from_u64(1);
    let words = [
        "%r1",
        "%rd4",
        ";",
        "}",
        "0",
        "-1",
        "[",
        "4294967296",
        ".f64",
        "%p1",
        "ret",
        "bra $loop",
        "0f7FC00000",
        "\0",
        "é",
        "bar.sync 1",
    ];
    let (mut ran, mut refused) = (0, 0);
    for _ in 0..3000 {
        let mut text = PTX.to_string();
        if r.random_bool(0.5) {
            // Another digit: registers, offsets and sizes are wrong, but the text is still PTX.
            let digits: Vec<usize> =
                text.bytes().enumerate().skip(100).filter(|c| c.1.is_ascii_digit()).map(|c| c.0).collect();
            let at = digits[r.random_range(0..digits.len())];
            text.replace_range(at..at + 1, &r.random_range(0..10).to_string());
        } else {
            let mut at = r.random_range(100..text.len());
            while !text.is_char_boundary(at) {
                at -= 1;
            }
            let end = (at + r.random_range(0..6)).min(text.len());
            text.replace_range(at..end, words[r.random_range(0..words.len())]);
        }
        match run(&text, 32) {
            Ok(_) => ran += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(ran > 100 && refused > 1000, "{ran} ran, {refused} were refused");
}

/// The line that `part` stands in.
fn line(ptx: &str, part: &str) -> u32 {
    1 + ptx.lines().position(|l| l.contains(part)).unwrap() as u32
}

fn message(ptx: &str) -> String {
    run(ptx, 32).unwrap_err().to_string()
}

#[test]
fn what_is_unknown_is_named_with_its_line() {
    let bad = PTX.replace("ex2.approx.ftz.f32 %f9, %f5;", "frobnicate.f32 %f9, %f5;");
    let at = line(&bad, "frobnicate");
    assert_eq!(message(&bad), format!("line {at}: frobnicate.f32: the instruction is not known"));
    let bad =
        PTX.replace("add.s32 %r25, %r25, -1;", "add.s32.odd %r25, %r25, -1;").replace("%r24, %r22", "%r24, %nothing");
    let (a, b) = (line(&bad, "%nothing"), line(&bad, ".odd"));
    let want =
        format!("line {a}: selp.b32: \"%nothing\" is not declared\nline {b}: add.s32.odd: \".odd\" is not known here");
    assert_eq!(message(&bad), want);
    let bad = PTX.replace("@%p3 bra $loop", "@%p3 bra $away");
    assert_eq!(message(&bad), format!("line {}: there is no label $away in k", line(&bad, "$away")));
    assert_eq!(message("int main() {}"), "line 1: \"int\" is not known here");
    assert_eq!(message(""), "line 1: this is no PTX: .version and .target are missing");
    let recursive = PTX.replace("add.s32 %r2, %r1, %r1;", "{ .param .b32 x; .param .b32 y; call (y), twice, (x); }");
    assert!(message(&recursive).contains("twice calls itself"), "{}", message(&recursive));
}

#[test]
fn launches_that_cannot_be() {
    let mut s = Simulator::default();
    let m = s.load(&Code::ptx(PTX)).unwrap();
    let out = s.alloc("out", 128).unwrap();
    let args = [out.into(), out.into(), Arg::from(1u32)];
    let mut fails = |kernel: &str, extent: Extent, args: &[Arg], part: &str| {
        let e = s.launch(m, kernel, extent, args).unwrap_err().to_string();
        assert!(e.contains(part), "{e}");
    };
    fails("j", Extent::line(1, 32), &args, "there is no kernel \"j\" in the module; it has k");
    fails("k", Extent::line(1, 32), &args[..2], "takes 3 parameters, 2 were given: k(u64, u64, u32)");
    fails("k", Extent::line(1, 32), &[out.into(), out.into(), Arg::from(1u64)], "parameter 2 of k is 4 bytes wide, 8");
    fails("k", Extent::line(1, 2000), &args, "blocks of 2000 threads: 1 to 1024");
    fails("k", Extent::line(0, 32), &args, "a side of 0 blocks");
    fails("k", Extent { shared: 1 << 20, ..Extent::line(1, 32) }, &args, "of shared memory: a block has at most");
}

#[test]
fn findings_name_their_place() {
    // One thread more than the buffer holds: 33 words of 32.
    let wrong = PTX.replace("add.s64 %rd8, %rd1, %rd7;", "add.s64 %rd8, %rd1, %rd7;\nadd.s64 %rd8, %rd8, 4;");
    let all = run(&wrong, 32).unwrap();
    let f = all.iter().find(|f| f.kind == Kind::OutOfBounds).unwrap();
    assert_eq!((f.thread, f.block, f.place.line, f.count), ([31, 0, 0], [0, 0, 0], line(&wrong, "st.global"), 2));
    assert_eq!(f.message, "a store of 4 bytes of buffer \"out\" (128 bytes), 0 bytes past its end");
    let text = f.to_string();
    for part in [
        f.kernel.as_str(),
        "\"out\"",
        "block (0, 0, 0), thread (31, 0, 0)",
        "address 0x",
        &format!("PTX line {}", f.place.line),
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let unwaited = run(&PTX.replace("cp.async.wait_group 0;", ""), 32).unwrap();
    assert_eq!(unwaited[0].kind, Kind::AsyncUnwaited);
}
