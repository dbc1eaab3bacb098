//! Parameter names and shapes are those of the published layout: `names/<model>/names.txt` lists what the PyTorch model
//! saved for `names/<model>/config.json`.

use rambac_models::Config;
use std::path::Path;

fn same_names(model: &str) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/names").join(model);
    let parsed = Config::from_path(&dir).unwrap();
    assert!(parsed.warnings.is_empty(), "{:?}", parsed.warnings);
    let mut ours: Vec<String> =
        parsed.config.parameters().iter().map(|p| format!("{} {:?}", p.name, p.shape)).collect();
    ours.sort();
    let listed = std::fs::read_to_string(dir.join("names.txt")).unwrap();
    let mut theirs: Vec<&str> = listed.lines().collect();
    theirs.sort();
    assert_eq!(ours, theirs, "{model}");
}

#[test]
fn mamba2() {
    same_names("mamba2");
}

#[test]
fn ramba_tiny() {
    same_names("ramba_tiny");
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/names/ramba_tiny");
    assert_eq!(Config::from_path(dir).unwrap().config, Config::default());
}

#[test]
fn ramba_deep() {
    same_names("ramba_deep");
}

#[test]
fn ramba_norms() {
    same_names("ramba_norms");
}

#[test]
fn ramba_plain_chunks() {
    same_names("ramba_plain_chunks");
}
