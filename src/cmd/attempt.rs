//! `rambac try` and `rambac compare`: is a variant of attention right, what does it cost, does it learn?

use crate::cli::{Attempt, Compare, TryArgs};
use crate::error::{self, Result};
use crate::show::{self, Table};
use crate::workbench::Subject;
use crate::workbench::checks::{self, Checks};
use crate::workbench::cost::{self, Costs};
use crate::workbench::learn::{self, Budget, Grid, Learnt};
use crate::workbench::page::{self, Entry};
use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use miette::{IntoDiagnostic, miette};
use rambac_ir::Severity;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What was found of one variant.
struct Found {
    subject: Subject,
    checks: Checks,
    /// `None` where nothing could be asked of it.
    costs: Option<Costs>,
    learnt: Option<Learnt>,
}

/// Runs `try`.
pub fn run(a: &Attempt, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    let began = Instant::now();
    let subject = Subject::open(&a.variant, &a.how.set)?;
    let (out, grid) = (a.how.out.clone().unwrap_or_else(|| subject.report()), Grid::of(&subject));
    let found = examine(subject, grid, &a.how, &pool)?;
    let title = format!("{}: {}", found.subject.name, if found.checks.ok() { "right" } else { "not right" });
    write(&out, &title, std::slice::from_ref(&found))?;
    println!("\n{} in all; the report: {}", show::seconds(began.elapsed().as_secs_f64()), out.display());
    let ok = found.checks.ok();
    complain(found);
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs `compare`.
pub fn compare(a: &Compare, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    if a.variants.len() < 2 {
        return Err(miette!("give two variants or more to compare, or one to `rambac try`"));
    }
    // All of them, before any is trained.
    let mut subjects = a.variants.iter().map(|v| Subject::open(v, &a.how.set)).collect::<Result<Vec<_>>>()?;
    let names: Vec<String> = subjects.iter().map(|s| s.name.clone()).collect();
    for s in subjects.iter_mut().filter(|s| names.iter().filter(|n| **n == s.name).count() > 1) {
        s.name = s.path.with_extension("").display().to_string();
    }
    let grid = subjects.iter().map(Grid::of).reduce(Grid::with).expect("BUG: there are two or more");
    let mut all = vec![];
    for s in subjects {
        all.push(examine(s, grid, &a.how, &pool)?);
    }
    println!("\n{}", budget(&all));
    let at = |l: &Learnt, task: &str, i: usize| {
        let of: Vec<_> = l.scores.iter().filter(|s| s.task == task).collect();
        of.get(i).map_or("-".into(), |s| format!("{:.0} % @{}", 100.0 * s.accuracy(), s.len))
    };
    let mut t = Table::new(
        1,
        &[
            "variant",
            "lines",
            "right",
            "work at 16K",
            "memory",
            "tokens/s",
            "loss",
            "recall",
            "longer",
            "needle",
            "longer",
            "passkey",
        ],
    );
    for f in &all {
        let c = f.costs.as_ref().map(|c| &c.lines[2]);
        let l = f.learnt.as_ref();
        let learnt = |g: &dyn Fn(&Learnt) -> String| l.map_or("-".into(), g);
        t.row([
            f.subject.name.clone(),
            f.checks.lines.to_string(),
            if f.checks.ok() { "yes" } else { "no" }.into(),
            c.map_or("-".into(), |c| format!("{} of full", show::share(c.own.flops, c.full.flops))),
            c.map_or("-".into(), |c| show::bytes(c.own.peak)),
            learnt(&|l| format!("{:.1}k", l.tokens as f64 / l.seconds.max(1e-9) / 1e3)),
            learnt(&|l| l.curve.last().map_or("-".into(), |p| format!("{:.2}", p.loss))),
            learnt(&|l| at(l, "recall", 1)),
            learnt(&|l| at(l, "recall", 3)),
            learnt(&|l| at(l, "needle", 1)),
            learnt(&|l| at(l, "needle", 3)),
            learnt(&|l| at(l, "passkey", 1)),
        ]);
    }
    t.print();
    let out = a.how.out.clone().unwrap_or_else(|| PathBuf::from("compare.html"));
    let names: Vec<&str> = all.iter().map(|f| f.subject.name.as_str()).collect();
    write(&out, &names.join(", "), &all)?;
    println!("\nthe report: {}", out.display());
    let ok = all.iter().all(|f| f.checks.ok());
    all.into_iter().for_each(complain);
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What every variant was trained on: the same tokens, but for those that were stopped.
fn budget(all: &[Found]) -> String {
    let learnt = || all.iter().filter_map(|f| Some((&f.subject.name, f.learnt.as_ref()?)));
    let Some((_, first)) = learnt().next() else { return "Side by side".into() };
    let stopped = learnt().filter(|(_, l)| l.tokens < l.planned);
    let stopped: Vec<String> = stopped.map(|(n, l)| format!("{n} after {}", show::count(l.tokens))).collect();
    let mut text = format!("Side by side, each trained on the same {} tokens", show::count(first.planned));
    if !stopped.is_empty() {
        text += &format!("; out of time, so not comparable: {} (give more --seconds)", stopped.join(", "));
    }
    show::wrapped(&text, 96, "  ")
}

/// Prints what is wrong, at its lines.
fn complain(f: Found) {
    let mut findings = f.checks.findings;
    if findings.is_empty() {
        return;
    }
    findings.sort_by_key(|d| d.severity != Severity::Error);
    error::report(error::findings(&f.subject.path, &f.subject.text, findings));
}

fn write(out: &std::path::Path, title: &str, all: &[Found]) -> Result<()> {
    let entry = |f: &'_ Found| -> (String, String) { (f.subject.name.clone(), f.subject.text.clone()) };
    let texts: Vec<(String, String)> = all.iter().map(entry).collect();
    let entries: Vec<Entry> = all
        .iter()
        .zip(&texts)
        .map(|(f, (name, text))| Entry {
            name,
            text,
            checks: &f.checks,
            costs: f.costs.as_ref(),
            learnt: f.learnt.as_ref(),
        })
        .collect();
    if let Some(dir) = out.parent().filter(|d| !d.as_os_str().is_empty()) {
        std::fs::create_dir_all(dir).map_err(|e| miette!("{}: {e}", dir.display()))?;
    }
    std::fs::write(out, page::html(title, &entries)).map_err(|e| miette!("{}: {e}", out.display()))
}

fn examine(s: Subject, grid: Grid, how: &TryArgs, pool: &Arc<rayon::ThreadPool>) -> Result<Found> {
    println!("{} ({})", s.name, s.path.display());
    let mut t = Table::new(2, &["", "type"]);
    checks::interface(&s).into_iter().for_each(|(what, ty)| t.row([what, ty]));
    t.print();
    let consts: Vec<String> = s.fragment.consts.iter().map(|(n, v)| format!("{n} {}", short(*v))).collect();
    println!("  {}", show::wrapped(&format!("at {}; texts in multiples of {}", consts.join(", "), s.unit), 96, "  "));

    let len = how.len.next_multiple_of(grid.unit);
    let checks = pool.install(|| checks::run(&s, len, pool))?;
    println!("\nIs it right?  ({} operations)", checks.lines);
    for a in &checks.answers {
        let text = format!("{:<15} {}", a.what, a.detail);
        println!("  {} {}", if a.ok { "✓" } else { "✗" }, show::wrapped(&text, 92, "                    "));
    }

    let costs = if checks.asked() { Some(cost::run(&s)?) } else { None };
    match &costs {
        Some(c) => show_costs(c),
        None => println!("\nnot asked further, nor costs counted: first put this right"),
    }
    // Nothing is to be learnt of what is wrong.
    let train = !how.no_train && checks.ok();
    let learnt = if train { Some(train_it(&s, how, (len, grid), pool)?) } else { None };
    if !how.no_train && checks.asked() && !checks.ok() {
        println!("\nnot trained: first put right what is wrong");
    }
    Ok(Found { subject: s, checks, costs, learnt })
}

fn show_costs(costs: &Costs) {
    println!("\nWhat does it cost?  (forward and backward of the attention alone, beside full attention)");
    let mut t = Table::new(0, &["tokens", "work", "of full", "moved", "memory", "of full"]);
    for l in &costs.lines {
        t.row([
            show::count(l.len as u64),
            show::si(l.own.flops, "FLOP"),
            show::share(l.own.flops, l.full.flops),
            show::si(l.own.bytes, "B"),
            show::bytes(l.own.peak),
            show::share(l.own.peak as f64, l.full.peak as f64),
        ]);
    }
    t.print();
    let fused: Vec<String> = costs.fused.iter().map(|(op, n)| format!("{n} {op}")).collect();
    println!("  kernels: {}", if fused.is_empty() { "none of attention's own".into() } else { fused.join(", ") });
    for u in &costs.unfused {
        println!("  {}", show::wrapped(u, 96, "    "));
    }
}

fn short(v: f64) -> String {
    if v.fract() == 0.0 { format!("{v}") } else { format!("{v:.3}") }
}

fn train_it(s: &Subject, how: &TryArgs, (len, grid): (usize, Grid), pool: &Arc<rayon::ThreadPool>) -> Result<Learnt> {
    let config = s.model(how.transformer)?;
    let budget =
        Budget { tokens: how.tokens, time: Duration::from_secs(how.seconds), seed: how.seed, len, lr: how.lr, grid };
    println!(
        "\nDoes it learn?  ({} parameters: {}; {} tokens of recall, copying and passkeys)",
        show::count(config.n_parameters()),
        if how.transformer {
            "window attention and feed-forward layers around it"
        } else {
            "a Mamba-2 block before it and one after"
        },
        show::count(budget.tokens)
    );
    let bar = ProgressBar::new(budget.tokens).with_finish(ProgressFinish::AndClear);
    let style = "  {elapsed_precise} [{bar:20}] {msg}";
    bar.set_style(ProgressStyle::with_template(style).into_diagnostic()?.progress_chars("=> "));
    let l = learn::run(s, &config, &budget, pool, |curve, total| {
        let last = curve[curve.len() - 1];
        bar.set_length(total);
        bar.set_position(last.tokens);
        bar.set_message(format!("loss {:.3}  {}", last.loss, learn::sparkline(curve, 40)));
    })?;
    bar.finish_and_clear();
    println!("  loss {}", learn::sparkline(&l.curve, 80));
    let ends = (l.curve.first(), l.curve.last());
    if let (Some(a), Some(b)) = ends {
        println!(
            "  {:.2} → {:.2} in {} ({} tokens/s, {} planned for a step)",
            a.loss,
            b.loss,
            show::seconds(l.seconds),
            show::thousands(l.tokens as f64 / l.seconds),
            show::bytes(l.peak)
        );
    }
    if let Some(why) = &l.stopped {
        println!("  {why}: give more --seconds, or fewer --tokens");
    }
    let mut head: Vec<String> = ["task", "tokens", "right", "of"].map(String::from).to_vec();
    for label in &l.choices {
        let of = if l.choices.len() > 1 { format!(" by {label}") } else { String::new() };
        head.extend([format!("needle's rank{of}"), "chosen".into()]);
    }
    let mut t = Table::new(1, &head.iter().map(String::as_str).collect::<Vec<_>>());
    for x in &l.scores {
        let mut row = vec![
            x.task.to_string(),
            show::count(x.len as u64),
            format!("{:.0} %", 100.0 * x.accuracy()),
            x.asked.to_string(),
        ];
        for i in 0..l.choices.len() {
            row.extend(match x.needles.get(i).copied().flatten() {
                Some(n) => [format!("{:.1}", n.rank), format!("{:.0} %", 100.0 * n.chosen)],
                None => ["-".into(), "-".into()],
            });
        }
        t.row(row);
    }
    t.print();
    Ok(l)
}
