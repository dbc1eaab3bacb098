//! What MODEL means on the command line: a preset, a folder, a config, a checkpoint or an IR file.

use crate::cli::{AttentionArgs, Chunks, StorePrecision, Weights};
use crate::error::{Result, findings, warn, wrap};
use miette::miette;
use rambac_ir::Graph;
use rambac_models::recipe::Recipe;
use rambac_models::{Attention, Config, InitRule, canonical_name, init_tensor, preset};
use rambac_passes::train_step::AdamW;
use rambac_passes::{Options, narrow};
use rambac_runtime::checkpoint::{self, WeightsFolder};
use rambac_runtime::chunk_store::Precision;
use rambac_runtime::{Bf16Data, SessionGraphs, SessionOptions, SessionParts, Store, Tensor, Tier};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What was named.
pub enum Named {
    /// A model by its configuration, with the folder of its weights if there are any.
    Model { config: Config, weights: Option<PathBuf> },
    /// A graph in text form.
    Ir { path: PathBuf, text: String, graph: Graph },
}

/// Resolves MODEL.
///
/// # Errors
/// Neither a preset nor a readable path; a config or an IR text with errors.
pub fn resolve(name: &str) -> Result<Named> {
    let path = Path::new(name);
    if !path.exists() {
        if path.extension().is_some() || name.contains('/') {
            return Err(miette!(
                help = "give a preset (tiny, small, …), a folder with config.json, a config, or an .ir file",
                "{name}: no such file or folder"
            ));
        }
        return Ok(Named::Model { config: preset(name).map_err(wrap)?, weights: None });
    }
    if path.extension().is_some_and(|e| e == "ir") {
        let text = std::fs::read_to_string(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::InvalidData => miette!("{name}: this is no text (UTF-8); a graph is one"),
            _ => miette!("{name}: cannot read this graph: {e}"),
        })?;
        let graph = rambac_ir::text::parse(&text).map_err(|e| findings(path, &text, e))?;
        rambac_ir::verify::verify(&graph).map_err(|e| findings(path, &text, e))?;
        return Ok(Named::Ir { path: path.into(), text, graph });
    }
    let folder = if path.is_dir() { Some(model_folder(path)?) } else { None };
    let parsed = Config::from_path(folder.as_deref().unwrap_or(path)).map_err(wrap)?;
    parsed.warnings.iter().for_each(warn);
    let mut config = parsed.config;
    let weights = folder.filter(|f| {
        ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"].iter().any(|w| f.join(w).exists())
    });
    if let (Some(w), true) = (&weights, parsed.tie_is_assumed) {
        config.tie_word_embeddings = !WeightsFolder::open(w).map_err(wrap)?.contains("lm_head.weight");
    }
    Ok(Named::Model { config, weights })
}

/// As [`resolve`], with another attention in the model's stack.
///
/// # Errors
/// As [`resolve`] and [`with_attention`].
pub fn resolve_with(name: &str, attention: &AttentionArgs) -> Result<Named> {
    with_attention(name, resolve(name)?, attention)
}

/// What `name` is, with another attention in the model's stack.
///
/// # Errors
/// A variant that is none; a graph, which has no stack.
pub fn with_attention(name: &str, named: Named, attention: &AttentionArgs) -> Result<Named> {
    match named {
        Named::Model { config, weights } => Ok(Named::Model { config: attention.apply(config)?, weights }),
        Named::Ir { .. } if attention.attention.is_some() => {
            Err(miette!("{name}: --attention changes a model's stack, not a graph"))
        }
        ir => Ok(ir),
    }
}

/// The folder that holds config.json: `dir` itself, or the latest checkpoint of a training run.
fn model_folder(dir: &Path) -> Result<PathBuf> {
    if dir.join("config.json").exists() {
        return Ok(dir.into());
    }
    checkpoint::latest(dir).map_err(|e| {
        miette!("{}: there is neither a config.json nor a whole checkpoint in this folder ({e})", dir.display())
    })
}

/// The optimiser of a recipe.
pub fn adamw(r: &Recipe) -> AdamW {
    let o = &r.optim;
    AdamW {
        lr: o.lr,
        beta1: o.beta1,
        beta2: o.beta2,
        weight_decay: o.weight_decay,
        clip: o.clip,
        warmup: o.warmup,
        hold: o.hold,
        steps: r.steps(),
        floor: o.floor,
        ..AdamW::default()
    }
}

/// Resolves MODEL to a configuration and weights.
///
/// # Errors
/// As [`config`]; a model that has none.
pub fn trained(name: &str) -> Result<(Config, PathBuf)> {
    let (config, weights) = config(name)?;
    let weights = weights.ok_or_else(|| {
        miette!(
            help = "train a model first (rambac demo, rambac train), or give a folder with model.safetensors",
            "{name}: there are no weights here"
        )
    })?;
    Ok((config, weights))
}

/// Resolves MODEL to a configuration.
///
/// # Errors
/// As [`resolve`]; an IR file.
pub fn config(name: &str) -> Result<(Config, Option<PathBuf>)> {
    match resolve(name)? {
        Named::Model { config, weights } => Ok((config, weights)),
        Named::Ir { path, .. } => Err(miette!(
            help = "this command needs a model: a preset, a folder with config.json, or a config",
            "{} is a graph in text form",
            path.display()
        )),
    }
}

/// The parameters: from `weights`, or fresh from `seed`.
///
/// # Errors
/// Weights that do not belong to the configuration: every missing, unexpected or misshapen tensor is listed.
pub fn parameters(config: &Config, weights: Option<&Path>, rule: InitRule, seed: u64) -> Result<Store> {
    load(config, weights, rule, seed, &HashSet::new())
}

/// As [`parameters`], as `graphs` compiled with `options` want them: bf16 weights are never all there in f32.
///
/// # Errors
/// As [`parameters`].
pub fn parameters_for(
    graphs: &SessionGraphs,
    options: &Options,
    config: &Config,
    weights: Option<&Path>,
) -> Result<Store> {
    let all = [Some(&graphs.lower), graphs.chunks.as_ref(), graphs.upper.as_ref(), Some(&graphs.head)];
    let bf16 = all.into_iter().flatten().filter(|_| options.bf16_weights).flat_map(narrow::narrowed).collect();
    load(config, weights, InitRule::default(), 0, &bf16)
}

/// See [`parameters`]; those named in `bf16` in bf16.
///
/// # Errors
/// As [`parameters`].
pub fn load(config: &Config, weights: Option<&Path>, rule: InitRule, seed: u64, bf16: &HashSet<&str>) -> Result<Store> {
    let specs = config.parameters_with(rule);
    let mut store = Store::default();
    let Some(path) = weights else {
        for s in &specs {
            let values = init_tensor(s, seed);
            let t = match bf16.contains(s.name.as_str()) {
                true => Tensor::bf16(&s.shape, Bf16Data::round(&values)),
                false => Tensor::f32(&s.shape, values),
            };
            store.insert(s.name.clone(), t);
        }
        return Ok(store);
    };
    let mut folder = WeightsFolder::open(path).map_err(wrap)?;
    folder.rename(canonical_name).map_err(wrap)?;
    let ignored: &[&str] = if config.tie_word_embeddings { &["lm_head.weight"] } else { &[] };
    folder.check(specs.iter().map(|s| (s.name.as_str(), s.shape.as_slice())), ignored).map_err(wrap)?;
    for s in &specs {
        let t = if bf16.contains(s.name.as_str()) {
            let (shape, data) = folder.get_bf16(&s.name).map_err(wrap)?;
            Tensor::bf16(&shape, data)
        } else {
            let (shape, data) = folder.get_f32(&s.name).map_err(wrap)?;
            Tensor::f32(&shape, data)
        };
        store.insert(s.name.clone(), t);
    }
    Ok(store)
}

/// The graphs that a [`Session`](rambac_runtime::Session) runs.  An attention variant keeps keys, values and what else it needs of
/// `room` tokens, prompt and answer together; every other model reads any text.
///
/// # Errors
/// An op of the variant that has no form for segments, and why; no room.
pub fn session_graphs(c: &Config, room: usize) -> Result<SessionGraphs> {
    use rambac_models::stack;
    if let Some(a) = &c.attention {
        return variant_graphs(c, a, room);
    }
    let lower = stack::lower(c).map_err(wrap)?;
    let (chunks, upper) = (stack::chunks(c).map_err(wrap)?, stack::upper(c).map_err(wrap)?);
    let (flash, head) = (stack::upper_flash(c).map_err(wrap)?, stack::head(c).map_err(wrap)?);
    Ok(session_parts(c, (lower, chunks, upper, flash, head)))
}

fn variant_graphs(c: &Config, a: &Attention, room: usize) -> Result<SessionGraphs> {
    use rambac_models::stack;
    let refused = |why: String| {
        miette!(
            help = "rambac train, compile --train, eval passkey and explain take it, for they read whole texts",
            "attention {}: it can't read a text segment by segment, which inference needs: {why}",
            a.name
        )
    };
    let unit = stack::segment_unit(c).map_err(refused)?;
    let capacity = room.max(1).checked_next_multiple_of(unit).filter(|&t| i32::try_from(t).is_ok());
    let capacity =
        capacity.ok_or_else(|| miette!("there can't be room for {room} tokens: no position counts so far"))?;
    let all = stack::segments(c, capacity).map_err(refused)?;
    Ok(session_parts(c, (all, None, None, None, stack::head(c).map_err(wrap)?)))
}

/// Parts in the order of a session, with the sizes that it must know.
pub fn session_parts<T>(c: &Config, parts: (T, Option<T>, Option<T>, Option<T>, T)) -> SessionParts<T> {
    let (lower, chunks, upper, upper_flash, head) = parts;
    SessionParts {
        lower,
        chunks,
        upper,
        upper_flash,
        head,
        chunk_size: c.chunk_size,
        hidden_size: c.hidden_size,
        kv: [c.num_kv_heads, c.attention_head_dim()],
        landmark: [c.num_kv_heads, c.retrieval_head_dim()],
    }
}

/// What the flags say about a session of `sequences` sequences; a new file is one to go on with.
pub fn session_options(chunks: &Chunks, resume: Option<&Path>, sequences: usize, weights: Weights) -> SessionOptions {
    let tier = match (resume, chunks.store.as_str()) {
        (Some(path), _) => Tier::Resume(path.into()),
        (None, "ram") => Tier::Ram,
        (None, path) => Tier::File(path.into()),
    };
    let precision = match chunks.store_dtype {
        StorePrecision::Bf16 => Precision::Bf16,
        StorePrecision::F32 => Precision::F32,
    };
    SessionOptions { sequences, precision, tier, passes: weights.options() }
}

/// A pool of `threads` threads; 0 means one per core.
///
/// # Errors
/// The system gives no threads.
pub fn pool(threads: usize) -> Result<Arc<rayon::ThreadPool>> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    Ok(Arc::new(pool.map_err(|e| miette!("cannot start {threads} threads: {e}"))?))
}
