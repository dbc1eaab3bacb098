//! `rambac report`: one page about a training run, to send to a colleague: what was trained, how it went, what it can do,
//! what a step costs, where memory goes, and on what machine.

use crate::cli::MemoryArgs;
use crate::cli::Report;
use crate::cmd::explain::{describe, model_step};
use crate::cmd::train::RunState;
use crate::curves::{self, Style};
use crate::error::{self, Result, warn, wrap};
use crate::metrics::{self, Quantity, RunMetrics};
use crate::page::escaped;
use crate::show;
use crate::work::{self, Sums};
use miette::miette;
use rambac_codegen::fit::Machine;
use rambac_codegen::{fit, lower, plan};
use rambac_ir::Bindings;
use rambac_models::Config;
use rambac_models::recipe::Rows;
use rambac_passes::train_step::AdamW;
use rambac_passes::{Options, optimise};
use rambac_picture::memory;
use rambac_runtime::checkpoint::Checkpoint;
use rambac_runtime::cpu::scratch;
use serde_json::Value as Json;
use std::fmt::Write;
use std::process::ExitCode;

/// What the page is made from.
const PAGE: &str = include_str!("report.html");

/// Runs the verb.
pub fn run(a: &Report) -> Result<ExitCode> {
    let run = RunMetrics::read(&a.run)?;
    let checkpoint = Checkpoint::open(&run.folder)
        .map_err(|e| miette!(help = "stop the run with Ctrl-C, or train with --save-every, to have one", "{e}"))?;
    let origin = checkpoint.path.join("config.json");
    let config = Config::from_json(&checkpoint.config, &origin.to_string_lossy()).map_err(wrap)?.config;
    let state: RunState = serde_json::from_str(&checkpoint.trainer)
        .map_err(|e| miette!("{}: trainer.json is not a training state: {e}", checkpoint.path.display()))?;
    let out = a.out.clone().unwrap_or_else(|| run.folder.join("report.html"));
    let page = page(&run, &config, &state)?;
    std::fs::write(&out, page).map_err(|e| miette!("{}: {e}", out.display()))?;
    println!("{}", out.display());
    Ok(ExitCode::SUCCESS)
}

fn page(run: &RunMetrics, config: &Config, state: &RunState) -> Result<String> {
    let title = format!("Training run {}", run.name);
    let parts = [
        ("title", escaped(&title)),
        ("summary", summary(run, config, state)),
        ("curves", section_curves(run)?),
        ("evaluations", evaluations(run)),
        ("cost", cost(config, state)?),
        ("model", model(config)?),
        ("recipe", recipe(state)),
        ("environment", environment(run)),
    ];
    // One pass over the template: what is put in is never searched again.
    let mut out = String::new();
    let mut rest = PAGE;
    while let Some((before, after)) = rest.split_once("{{") {
        let (name, after) = after.split_once("}}").ok_or_else(|| miette!("BUG: report.html has an open place"))?;
        let part = parts.iter().find(|p| p.0 == name).ok_or_else(|| miette!("BUG: report.html wants {name}"))?;
        out += before;
        out += &part.1;
        rest = after;
    }
    Ok(out + rest)
}

/// Rows of two cells.
fn pairs(rows: &[(String, String)]) -> String {
    let row = |(k, v): &(String, String)| format!("<tr><th>{}</th><td>{}</td></tr>", escaped(k), escaped(v));
    format!("<table class=\"pairs\">{}</table>", rows.iter().map(row).collect::<String>())
}

fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let cells = |tag: &str, all: &mut dyn Iterator<Item = &str>| -> String {
        all.map(|c| format!("<{tag}>{}</{tag}>", escaped(c))).collect()
    };
    let body: String =
        rows.iter().map(|r| format!("<tr>{}</tr>", cells("td", &mut r.iter().map(String::as_str)))).collect();
    let head = cells("th", &mut head.iter().copied());
    format!("<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
}

fn summary(run: &RunMetrics, config: &Config, state: &RunState) -> String {
    let p = &state.position;
    let losses = run.values("loss");
    let tail = &losses[losses.len().saturating_sub(50)..];
    let loss = tail.iter().map(|v| v.1).sum::<f64>() / tail.len().max(1) as f64;
    let done = state.recipe.stage_at(p.planned).is_none();
    let cards = [
        ("parameters", show::si(config.n_parameters() as f64, "")),
        ("tokens", show::si(p.tokens as f64, "")),
        ("steps", show::count(p.step)),
        ("loss, last 50 steps", if losses.is_empty() { "-".into() } else { format!("{loss:.4}") }),
        ("time in steps", duration(p.seconds)),
        ("tokens/s", show::si(p.tokens as f64 / p.seconds.max(1e-9), "")),
    ];
    let mut out = format!("<p>{}</p><div class=\"cards\">", escaped(&describe(config)));
    for (name, value) in cards {
        let _ = write!(out, "<div><b>{}</b><span>{}</span></div>", escaped(&value), escaped(name));
    }
    let state = if done { "The recipe is finished." } else { "The recipe is not finished: the run can go on." };
    out + "</div><p class=\"faint\">" + state + "</p>"
}

fn section_curves(run: &RunMetrics) -> Result<String> {
    let runs = std::slice::from_ref(run);
    if curves::known(runs, &Quantity::ALL).is_empty() {
        return Ok("<p>No step has a finite value.</p>".into());
    }
    Ok(format!("<div class=\"picture\">{}</div>", curves::svg(runs, &Quantity::ALL, &Style::default())?))
}

fn evaluations(run: &RunMetrics) -> String {
    if run.evaluations.is_empty() {
        let path = run.folder.display();
        return format!(
            "<p class=\"faint\">None yet: <code>rambac eval passkey {}</code></p>",
            escaped(&path.to_string())
        );
    }
    let rows: Vec<Vec<String>> = run
        .evaluations
        .iter()
        .map(|e| {
            let l = &e.line;
            let number = |k: &str| l[k].as_f64();
            let count = |k: &str| l[k].as_u64().map_or("-".into(), show::count);
            let part = |a: &str, b: &str| match (number(a), number(b)) {
                (Some(a), Some(b)) if b > 0.0 => format!("{:.1} %", 100.0 * a / b),
                _ => "-".into(),
            };
            vec![
                e.step.map_or("-".into(), show::count),
                count("len"),
                count("cases"),
                format!("{} ({})", count("right"), part("right", "cases")),
                part("digits_right", "digits"),
                part("needle_chunk_chosen", "cases"),
                number("tokens_per_s").map_or("-".into(), |x| show::si(x, "")),
                number("memory_bytes").map_or("-".into(), |x| show::bytes(x as usize)),
            ]
        })
        .collect();
    let head = ["step", "context", "cases", "keys right", "digits right", "needle chosen", "tokens/s", "chunks stored"];
    format!("<p>Passkey retrieval, by length of the context.</p>{}", table(&head, &rows))
}

/// Work and memory of a step at the largest stage, as planned.
fn cost(config: &Config, state: &RunState) -> Result<String> {
    let Some(s) = state.recipe.stages.iter().max_by_key(|s| s.len * s.rows) else { return Ok(String::new()) };
    let dims = Bindings::new([("N", s.rows), ("L", s.len)]);
    let graph = model_step(config, &AdamW::default())?;
    let memory = MemoryArgs { recompute: state.recompute, memory_limit: state.memory_limit }.choice(vec![dims.clone()]);
    let others = Options { precision: state.precision.into(), ..Options::default() };
    let options = fit::options(&graph, &memory, &Machine::Cpu(scratch), 0, &others).map_err(error::unfit)?;
    let program = lower(&optimise(&graph, &options));
    let plan = plan(&program, &dims, scratch).map_err(wrap)?;
    let costs = program.costs(&dims).map_err(wrap)?;
    let mut sums = Sums::new();
    for (step, c) in program.steps.iter().zip(&costs) {
        let phase = work::phase(program.graph.node(step.node).scope.as_deref());
        sums.add((work::kind(step), phase), 0.0, *c);
    }
    let all = sums.cost();
    sums.lines
        .sort_by(|a, b| b.1.cost.flops.total_cmp(&a.1.cost.flops).then(b.1.cost.bytes.total_cmp(&a.1.cost.bytes)));
    let rows: Vec<Vec<String>> = sums
        .lines
        .iter()
        .map(|((op, phase), l)| {
            let c = l.cost;
            let (flops, bytes) = (show::share(c.flops, all.flops), show::share(c.bytes, all.bytes));
            vec![
                op.to_string(),
                phase.to_string(),
                l.steps.to_string(),
                show::si(c.flops, ""),
                flops,
                show::si(c.bytes, "B"),
                bytes,
            ]
        })
        .collect();
    let tokens = (s.rows * s.len) as f64;
    let intro = format!(
        "A micro-batch of {} × {} tokens, the largest of the run, as planned: {} in {} steps, {} a token, {} moved.",
        s.rows,
        show::count(s.len as u64),
        show::si(all.flops, "FLOP"),
        program.steps.len(),
        show::si(all.flops / tokens, "FLOP"),
        show::si(all.bytes, "B")
    );
    let peak = format!(
        "Memory: {} at the peak: {} of activations and scratch, {} of weights and optimiser, {} of inputs.",
        show::bytes(plan.peak()),
        show::bytes(plan.arena),
        show::bytes(plan.persistent),
        show::bytes(plan.inputs)
    );
    let picture = memory::svg(&program, &plan, "Buffers of a step over its steps, at their addresses");
    Ok(format!(
        "<p>{}</p><details><summary>Work by kind of op</summary>{}</details><p>{}</p><div class=\"picture\">{picture}</div>",
        escaped(&intro),
        table(&["op", "phase", "steps", "FLOPs", "share", "bytes", "share"], &rows),
        escaped(&peak)
    ))
}

fn model(config: &Config) -> Result<String> {
    let json: Json = serde_json::from_str(&config.to_json()).map_err(|e| miette!("BUG: config.json: {e}"))?;
    let rows: Vec<(String, String)> = json
        .as_object()
        .into_iter()
        .flatten()
        .map(|(k, v)| (k.clone(), v.as_str().map_or_else(|| v.to_string(), str::to_string)))
        .collect();
    Ok(pairs(&rows))
}

fn recipe(state: &RunState) -> String {
    let r = &state.recipe;
    let rows: Vec<Vec<String>> = r
        .stages
        .iter()
        .enumerate()
        .map(|(i, s)| {
            let name = |rows: &Rows| format!("{rows:?}");
            let mix: Vec<String> =
                s.mix.iter().map(|(part, rows)| format!("{:.0} % {}", 100.0 * part, name(rows))).collect();
            vec![
                (i + 1).to_string(),
                show::count(s.len as u64),
                s.rows.to_string(),
                show::count(s.steps),
                mix.join(", "),
                s.until_loss.map_or("-".into(), |l| format!("loss below {l}")),
            ]
        })
        .collect();
    let o = &r.optim;
    let settings = [
        (
            "optimiser",
            format!("AdamW, β {} and {}, weight decay {}, clipping at {}", o.beta1, o.beta2, o.weight_decay, o.clip),
        ),
        ("learning rate", format!("{} at its peak, {} steps of warm-up, then to {} of it", o.lr, o.warmup, o.floor)),
        ("micro-batches per step", r.accumulate.to_string()),
        ("state passing", format!("{} of the rows", r.carry_share)),
        ("seed", r.seed.to_string()),
    ];
    let settings: Vec<(String, String)> = settings.into_iter().map(|(k, v)| (k.to_string(), v)).collect();
    table(&["stage", "tokens per row", "rows", "steps at most", "rows of", "ends early at"], &rows) + &pairs(&settings)
}

fn environment(run: &RunMetrics) -> String {
    let path = run.folder.join(metrics::ENVIRONMENT);
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let sessions: Vec<Json> = text.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    if sessions.is_empty() {
        warn(format!("{} does not say on what machine it ran", run.folder.display()));
        return "<p class=\"faint\">Not recorded.</p>".into();
    }
    let all = sessions.iter().map(|s| {
        let rows: Vec<(String, String)> = s
            .as_object()
            .into_iter()
            .flatten()
            .map(|(k, v)| (k.replace('_', " "), v.as_str().map_or_else(|| v.to_string(), str::to_string)))
            .collect();
        pairs(&rows)
    });
    all.collect()
}

fn duration(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match s {
        0..=119 => format!("{s} s"),
        120..=7199 => format!("{} min", s / 60),
        _ => format!("{} h {} min", s / 3600, s / 60 % 60),
    }
}
