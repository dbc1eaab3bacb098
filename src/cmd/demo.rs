//! `rambac demo`: a small RAMba learns to find a passkey on this machine, does it far beyond its training length, and
//! is saved.

use super::{eval, train};
use crate::cli::Demo;
use crate::error::Result;
use crate::show;
use rambac_models::Config;
use rambac_models::recipe::Recipe;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The model of the demo: D 64, 2+2 layers, chunks of 16, eight of them per token.
fn config() -> Config {
    Config {
        encoder_layers: 0,
        chunk_size: 16,
        chunk_topk: 8,
        num_attention_heads: 2,
        num_kv_heads: 1,
        num_key_value_heads: 2,
        retrieval_dim: 32,
        mamba_chunk_size: 32,
        ..Config::default()
    }
}

/// Runs the verb.
pub fn run(a: &Demo, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    let recipe = Recipe { seed: a.seed, ..Recipe::passkey() };
    println!(
        "A RAMba (Mamba-2 with hierarchical sparse attention), random weights, learns to find a passkey:\n\n    \
         …words words |The passkey is: 4071562| words … |What is the passkey? The passkey is: 4071562\n\n\
         The needle may be anywhere in the text.  First the model learns to copy, on rows of 64 bytes;\n\
         then passkeys join and rows grow to 1,024 bytes.  Then it is asked in texts up to 64 times longer.\n"
    );
    let state = train::RunState {
        recipe,
        position: train::Position { step: 0, planned: 0, tokens: 0, smooth: None, seconds: 0.0 },
        recompute: false,
        precision: a.place.precision.unwrap_or_default(),
        memory_limit: None,
        data: None,
    };
    let out = a.out.clone().unwrap_or_else(|| fresh("runs/demo"));
    let mut run = train::Run::start(config(), None, state, None, &out, a.place.device, pool.clone())?;
    run.time_limit = Some(Duration::from_secs(a.minutes * 60));
    train::catch_interrupt();
    let t = Instant::now();
    let done = run.train()?;
    let p = &run.state.position;
    println!(
        "{} {} tokens in {:.0} s ({} tokens/s)\n",
        if done { "trained on" } else { "stopped after" },
        show::count(p.tokens),
        t.elapsed().as_secs_f64(),
        show::thousands(p.tokens as f64 / p.seconds)
    );
    if train::interrupted() {
        let (r, d) = (program(), out.display());
        println!("go on with:\n  {r} train --resume {d}\n  {r} eval passkey {d} --len 1024,4096,16K,64K --cases 20");
        return Ok(ExitCode::from(130));
    }
    println!("{}", eval::HEADER);
    for (len, cases) in [(256, 100), (1024, 200), (4096, 100), (16384, 40), (65536, 10)] {
        let how = eval::How { seed: a.seed ^ 0x5eed, progress: true, ..eval::How::default() };
        let s = eval::passkey(&run.config, run.store(), &pool, len, cases, &how)?;
        let note = if len == 1024 { "  <- training length" } else { "" };
        println!("{}{note}", eval::row(&s));
    }
    let (d, r) = (out.display(), program());
    println!(
        "\nsaved: {d}/latest\n\ngo on from here:\n  {r} eval passkey {d} --len 4096,256K,1M --cases 5\n  \
         {r} generate {d} --tokens 7 \\\n    \
         --prompt ' |The passkey is: 1234567| and so on. |What is the passkey? The passkey is: '\n  \
         {r} explain {d} --train --len 1024\n  {r} inspect {d}\n  \
         {r} train small --data FILE --len 1024 --steps 500 --out runs/mine"
    );
    Ok(ExitCode::SUCCESS)
}

/// `base`, or `base-2`, `base-3`, … where there is a run already.
fn fresh(base: &str) -> std::path::PathBuf {
    let name = |i: u32| if i == 1 { base.to_string() } else { format!("{base}-{i}") };
    (1..)
        .map(|i| std::path::PathBuf::from(name(i)))
        .find(|p| !p.exists())
        .expect("BUG: there are infinitely many names")
}

/// How this program was called, so that its hints can be pasted.
fn program() -> String {
    std::env::args().next().unwrap_or_else(|| "rambac".into())
}
