//! `rambac attend`: which chunks the tokens of a text choose, layer by layer and head by head, as a page to look at.
//!
//! The text is read whole by a graph that gives every retrieval layer's choice; what the page shows lies in the page.

use crate::cli::Attend;
use crate::cmd::explain::describe;
use crate::error::{Result, wrap};
use crate::show::{self, Table};
use crate::{machine, model, page};
use miette::miette;
use rambac_codegen::lower;
use rambac_ir::Bindings;
use rambac_models::stack;
use rambac_models::{Config, LayerKind, Tokenizer};
use rambac_passes::{Options, optimise};
use rambac_runtime::{Executor, Tensor};
use serde_json::{Value as Json, json};
use std::ops::Range;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

/// A slot that holds no chunk.
const EMPTY: u16 = u16::MAX;

/// What the page is made from.
const PAGE: &str = include_str!("attend.html");

/// One retrieval layer's choice for every token: `[tokens, heads, K]`.
struct Choice {
    layer: usize,
    indices: Vec<i32>,
    count: Vec<i32>,
    weights: Vec<f32>,
    /// `[tokens, heads, r]`
    query: Vec<f32>,
}

/// A text and what was chosen in it.
struct Read {
    /// Real tokens; after them the text was filled up to whole chunks.
    tokens: usize,
    chunk: usize,
    heads: usize,
    k: usize,
    choices: Vec<Choice>,
    /// `[chunks, heads, r]`
    landmarks: Vec<f32>,
}

/// Runs the verb.
pub fn run(a: &Attend, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    let (config, weights) = model::trained(&a.checkpoint)?;
    if config.is_plain() {
        return Err(miette!("{}: a plain Mamba-2 selects no chunks", a.checkpoint));
    }
    let text = std::fs::read(&a.text).map_err(|e| miette!("{}: cannot read this text: {e}", a.text.display()))?;
    let text = String::from_utf8_lossy(&text).into_owned();
    let tokenizer = match weights.join("tokenizer.json") {
        path if path.exists() => Tokenizer::from_file(path).map_err(wrap)?,
        _ => Tokenizer::bytes(),
    };
    tokenizer.check_vocab(config.vocab_size).map_err(wrap)?;
    let mut ids = tokenizer.encode(&text).map_err(wrap)?;
    let s = config.chunk_size;
    if ids.len() <= s {
        return Err(miette!(
            help = format!("give a text of more than {s} tokens: nothing can be chosen before one chunk is whole"),
            "{}: {} tokens",
            a.text.display(),
            ids.len()
        ));
    }
    if ids.len() > a.most {
        return Err(miette!(
            help = format!("cut the text, or allow it: --most {}", ids.len()),
            "{}: {} tokens; a page of more than {} is slow to open",
            a.text.display(),
            show::count(ids.len() as u64),
            show::count(a.most as u64)
        ));
    }
    let mut stream = tokenizer.stream();
    let mut pieces = ids.iter().map(|&id| stream.push(id).map_err(wrap)).collect::<Result<Vec<String>>>()?;
    if let (Some(last), rest) = (pieces.last_mut(), stream.finish().map_err(wrap)?) {
        last.push_str(&rest);
    }
    let needle = match &a.needle {
        Some(n) => Some(find(&pieces, n).ok_or_else(|| miette!("--needle: {n:?} is not in {}", a.text.display()))?),
        None => None,
    };
    let tokens = ids.len();
    ids.resize(tokens.next_multiple_of(s), 0);
    let read = read(&config, &weights, ids, tokens, pool)?;

    let name = |p: &Path| p.file_name().map_or(p.display().to_string(), |n| n.to_string_lossy().into_owned());
    let ranks = needle.clone().map(|n| ranks(&read, n)).unwrap_or_default();
    let layers: Vec<Json> = read.choices.iter().map(|c| layer_json(&read, c)).collect();
    let data = json!({
        "model": a.checkpoint, "about": describe(&config), "text": name(&a.text), "tokens": tokens, "chunk": s,
        "chunks": tokens.div_ceil(s), "k": read.k, "heads": read.heads, "pieces": pieces, "layers": layers,
        "needle": needle.as_ref().map(|n| json!([n.start / s, (n.end - 1) / s])), "needle_text": a.needle,
        "ranks": ranks.iter().map(|r| json!({ "layer": r.layer, "head": r.head, "rank": r.rank, "weight": r.weight })).collect::<Vec<_>>(),
    });
    std::fs::write(&a.html, page::filled(PAGE, &data)).map_err(|e| miette!("{}: {e}", a.html.display()))?;
    print_summary(a, &read, &ranks, needle);
    Ok(ExitCode::SUCCESS)
}

/// Tokens that hold the first `needle` of the text.
fn find(pieces: &[String], needle: &str) -> Option<Range<usize>> {
    let whole = pieces.concat();
    let at = whole.find(needle)?;
    let (from, to) = (at, at + needle.len().max(1));
    let mut ends = pieces.iter().scan(0, |n, p| {
        *n += p.len();
        Some(*n)
    });
    let first = ends.position(|e| e > from)?;
    let more = pieces[..=first].iter().map(String::len).sum::<usize>();
    let mut n = more;
    let last = (first..pieces.len()).find(|&i| {
        if i > first {
            n += pieces[i].len();
        }
        n >= to
    })?;
    Some(first..last + 1)
}

fn read(config: &Config, weights: &Path, ids: Vec<i32>, tokens: usize, pool: Arc<rayon::ThreadPool>) -> Result<Read> {
    let graph = stack::selections(config).map_err(wrap)?.ok_or_else(|| miette!("BUG: a model with chunks selects"))?;
    let mut e = Executor::new(lower(&optimise(&graph, &Options::default())), pool);
    let dims = Bindings::new([("N", 1), ("L", ids.len())]);
    let plan = e.plan(&dims).map_err(wrap)?;
    if let Some((total, _)) = machine::memory().filter(|(total, _)| plan.peak() > *total) {
        let (need, have) = (show::bytes(plan.peak()), show::bytes(total));
        return Err(miette!("a text of {tokens} tokens needs {need}, but this machine has {have}"));
    }
    let mut store = model::parameters(config, Some(weights), Default::default(), 0)?;
    let ids = Tensor::i32(&[1, ids.len()], ids);
    let out = e.run(&dims, &[("input_ids", ids.view())], &mut store).map_err(wrap)?;
    let of = |name: &str| out.iter().find(|(n, _)| n == name).map(|(_, t)| t).expect("BUG: the graph has this output");
    let floats = |name: &str| of(name).as_f32().expect("BUG: floats").to_vec();
    let ints = |name: &str| of(name).as_i32().expect("BUG: whole numbers").to_vec();
    let retrievals =
        config.layers().into_iter().enumerate().filter(|(_, k)| *k == LayerKind::Retrieval).map(|(i, _)| i);
    let choices = retrievals
        .map(|i| Choice {
            layer: i,
            indices: ints(&format!("indices.{i}")),
            count: ints(&format!("count.{i}")),
            weights: floats(&format!("weights.{i}")),
            query: floats(&format!("query.{i}")),
        })
        .collect();
    let (heads, k) = (config.num_kv_heads, config.chunk_topk);
    Ok(Read { tokens, chunk: config.chunk_size, heads, k, choices, landmarks: floats("landmarks") })
}

impl Read {
    /// Chunks and weights of a token's filled slots.
    fn slots<'a>(&self, c: &'a Choice, token: usize, head: usize) -> impl Iterator<Item = (usize, f32)> + 'a {
        let row = token * self.heads + head;
        let slots = row * self.k..row * self.k + (c.count[row].max(0) as usize).min(self.k);
        c.indices[slots.clone()].iter().zip(&c.weights[slots]).map(|(i, w)| (*i as usize, *w))
    }

    /// Chunks that can be chosen by some token.
    fn choosable(&self) -> usize {
        (self.tokens - 1) / self.chunk
    }

    /// Share of these that a head's tokens chose at all.
    fn coverage(&self, c: &Choice, head: usize) -> f64 {
        let mut chosen = vec![false; self.choosable()];
        for (i, w) in (0..self.tokens).flat_map(|t| self.slots(c, t, head)) {
            if let Some(x) = chosen.get_mut(i) {
                *x |= w > 0.0;
            }
        }
        chosen.iter().filter(|x| **x).count() as f64 / chosen.len().max(1) as f64
    }

    /// Mean over tokens that see a chunk: the sum of their weights, and how many chunks back the weight lies.
    fn weight_and_distance(&self, c: &Choice, head: usize) -> (f64, f64) {
        let (mut sum, mut far, mut n) = (0.0, 0.0, 0);
        for t in self.chunk..self.tokens {
            n += 1;
            for (i, w) in self.slots(c, t, head) {
                sum += f64::from(w);
                far += f64::from(w) * (t / self.chunk).saturating_sub(i) as f64;
            }
        }
        (sum / f64::from(n.max(1)), if sum > 0.0 { far / sum } else { 0.0 })
    }
}

fn layer_json(r: &Read, c: &Choice) -> Json {
    let heads = (0..r.heads).map(|h| {
        let (mut indices, mut weights) = (vec![], vec![]);
        for t in 0..r.tokens {
            let mut slots: Vec<(usize, f32)> = r.slots(c, t, h).collect();
            slots.resize(r.k, (usize::from(EMPTY), 0.0));
            for (i, w) in slots {
                indices.extend((i as u16).to_le_bytes());
                weights.push((w.clamp(0.0, 1.0) * 255.0).round() as u8);
            }
        }
        let (weight, distance) = r.weight_and_distance(c, h);
        json!({
            "indices": page::base64(&indices), "weights": page::base64(&weights), "coverage": r.coverage(c, h),
            "weight": weight, "distance": distance,
        })
    });
    json!({ "layer": c.layer, "heads": heads.collect::<Vec<_>>() })
}

/// How the last token finds the needle.
struct Rank {
    layer: usize,
    head: usize,
    /// Chunks with better scores than the best chunk of the needle; `None` if none of them is whole.
    rank: Option<usize>,
    weight: f32,
}

fn ranks(r: &Read, needle: Range<usize>) -> Vec<Rank> {
    let (last, visible) = (r.tokens - 1, r.choosable());
    let chunks = needle.start / r.chunk..=(needle.end - 1) / r.chunk;
    let mut out = vec![];
    for c in &r.choices {
        let d = c.query.len() / (c.count.len()).max(1);
        for head in 0..r.heads {
            let q = &c.query[(last * r.heads + head) * d..][..d];
            let score = |i: usize| {
                let lm = &r.landmarks[(i * r.heads + head) * d..][..d];
                q.iter().zip(lm).map(|(a, b)| a * b).sum::<f32>()
            };
            let scores: Vec<f32> = (0..visible).map(score).collect();
            let best = chunks.clone().filter(|i| *i < visible).map(|i| scores[i]).fold(f32::NEG_INFINITY, f32::max);
            let rank = best.is_finite().then(|| scores.iter().filter(|s| **s > best).count());
            let weight = r.slots(c, last, head).filter(|(i, _)| chunks.contains(i)).fold(0.0, |sum, (_, w)| sum + w);
            out.push(Rank { layer: c.layer, head, rank, weight });
        }
    }
    out
}

fn print_summary(a: &Attend, r: &Read, ranks: &[Rank], needle: Option<Range<usize>>) {
    println!(
        "{}: {} tokens, {} of {}, {} chosen by each token and head",
        a.text.display(),
        show::count(r.tokens as u64),
        show::plural(r.tokens.div_ceil(r.chunk), "chunk"),
        r.chunk,
        r.k
    );
    let head = ["layer", "head", "chunks ever chosen", "weight", "chunks back"];
    let mut t = Table::new(
        0,
        if needle.is_some() {
            &["layer", "head", "chunks ever chosen", "weight", "chunks back", "needle's rank", "its weight"]
        } else {
            &head
        },
    );
    for (i, c) in r.choices.iter().enumerate() {
        for h in 0..r.heads {
            let (weight, distance) = r.weight_and_distance(c, h);
            let mut row = vec![
                c.layer.to_string(),
                h.to_string(),
                show::share(r.coverage(c, h), 1.0),
                format!("{weight:.2}"),
                show::digits(distance),
            ];
            if let Some(x) = ranks.get(i * r.heads + h) {
                row.push(x.rank.map_or("not whole yet".into(), |n| (n + 1).to_string()));
                row.push(format!("{:.2}", x.weight));
            }
            t.row(row);
        }
    }
    t.print();
    if let Some(n) = needle {
        println!("  the needle is in tokens {} to {}; ranks are those of the text's last token", n.start, n.end - 1);
    }
    println!("{}", a.html.display());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needles_are_found_across_tokens() {
        let pieces: Vec<String> = ["ab", "", "cde", "f"].map(String::from).to_vec();
        assert_eq!(find(&pieces, "ab"), Some(0..1));
        assert_eq!(find(&pieces, "bc"), Some(0..3));
        assert_eq!(find(&pieces, "d"), Some(2..3));
        assert_eq!(find(&pieces, "ef"), Some(2..4));
        assert_eq!(find(&pieces, "x"), None);
    }
}
