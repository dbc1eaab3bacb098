//! Kills a process that writes checkpoints, again and again, and fills its disk: the last whole one always loads.
//!
//! The writer is this test binary itself, started anew with `RAMBAC_CHECKPOINT_WRITER` naming the folder.

use rambac_runtime::checkpoint::{Checkpoint, CheckpointDir, CheckpointError, Snapshot, TensorRef, latest};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const WRITER: &str = "RAMBAC_CHECKPOINT_WRITER";
const KILLS: u32 = 30;
/// Large enough that kills land inside writes, small enough that many checkpoints fit in a second.
const VALUES: usize = 200_000;

fn save(dir: &CheckpointDir, step: u64, value: u64) -> Result<(), CheckpointError> {
    let values = vec![value as f32; VALUES];
    let tensors = [TensorRef::f32("w", &[VALUES], &values)];
    let json = format!(r#"{{"step": {step}, "value": {value}}}"#);
    dir.save(step, &Snapshot { config: &json, weights: &tensors, state: &tensors, trainer: &json, files: &[] })?;
    Ok(())
}

/// Step and value of the newest checkpoint, whose parts must all agree.
fn consistent(root: &Path) -> (u64, u64) {
    let c = Checkpoint::open(root).unwrap();
    assert_eq!(c.config, c.trainer);
    let (model, state) = (c.model.get_f32("w").unwrap().1, c.state.get_f32("w").unwrap().1);
    assert!(model.len() == VALUES && model == state && model.iter().all(|v| *v == model[0]));
    let (step, value) = (c.step.unwrap(), model[0] as u64);
    assert_eq!(c.trainer, format!(r#"{{"step": {step}, "value": {value}}}"#));
    (step, value)
}

fn spawn(test: &str, root: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(WRITER, root);
    command.stdout(Stdio::null()).spawn().unwrap()
}

/// Not a test of its own: the process to be killed.  Writes every step twice, so that replacing is interrupted too.
#[test]
fn writer() {
    let Some(root) = std::env::var_os(WRITER) else { return };
    let dir = CheckpointDir::open(&root, Some(2)).unwrap();
    let mut value = latest(&root).map_or(0, |_| consistent(Path::new(&root)).1);
    loop {
        value += 1;
        save(&dir, value / 2, value).unwrap();
    }
}

#[test]
fn killed_at_any_instant() {
    if std::env::var_os(WRITER).is_some() {
        return;
    }
    let tmp = tempfile::TempDir::new().unwrap();
    let root = tmp.path().join("run");
    let (mut seen, mut random) = ((0, 0), 0x2545_f491_4f6c_dd1d_u64);
    for round in 0..KILLS {
        let mut child = spawn("writer", &root);
        // The first needs one checkpoint to lose.
        let deadline = Instant::now() + Duration::from_secs(60);
        while round == 0 && latest(&root).is_err() {
            assert!(Instant::now() < deadline, "the writer writes nothing");
            std::thread::sleep(Duration::from_millis(1));
        }
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        std::thread::sleep(Duration::from_micros((random >> 33) % 150_000));
        child.kill().unwrap();
        child.wait().unwrap();
        let now = consistent(&root);
        // Through the link itself too: it never dangles.
        assert_eq!(
            Checkpoint::open(root.join("latest")).unwrap().path.join("x").parent(),
            Some(root.join("latest").as_path())
        );
        assert!(now >= seen, "went back from {seen:?} to {now:?} in round {round}");
        seen = now;
    }
    assert!(seen.1 > u64::from(KILLS), "only {seen:?} was written: the kills came too early to mean anything");
    CheckpointDir::open(&root, Some(2)).unwrap();
    let leftovers = std::fs::read_dir(&root)
        .unwrap()
        .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with(".tmp"));
    assert_eq!(leftovers.count(), 0);
}

/// Not a test of its own: a process that may write files of at most 64 KiB, which fails like a full disk.
#[test]
fn writer_without_space() {
    let Some(root) = std::env::var_os(WRITER) else { return };
    let limit = libc::rlimit { rlim_cur: 65536, rlim_max: 65536 };
    // SAFETY: plain system calls; ignoring the signal turns it into an error of write.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
    }
    let dir = CheckpointDir::open(&root, Some(1)).unwrap();
    let message = save(&dir, 2, 2).unwrap_err().to_string();
    assert!(message.contains("model.safetensors: cannot write it") && message.contains("untouched"), "{message}");
    std::process::exit(42);
}

#[test]
fn no_space_loses_nothing() {
    if std::env::var_os(WRITER).is_some() {
        return;
    }
    let tmp = tempfile::TempDir::new().unwrap();
    save(&CheckpointDir::open(tmp.path(), None).unwrap(), 1, 1).unwrap();
    let status = spawn("writer_without_space", tmp.path()).wait().unwrap();
    assert_eq!(status.code(), Some(42));
    assert_eq!(consistent(tmp.path()), (1, 1));
    let names: Vec<_> = std::fs::read_dir(tmp.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 3, "half a checkpoint was left behind: {names:?}");
}
