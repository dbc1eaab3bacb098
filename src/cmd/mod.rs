//! The verbs, one file each.

mod attempt;
mod bench;
mod cache;
mod check;
mod compile;
mod demo;
mod doctor;
mod eval;
mod explain;
mod generate;
mod inspect;
mod new;
mod report;
mod run;
mod simulate;
mod train;
mod tune;

use crate::cli::{Cli, Verb};
use crate::error::{Result, wrap};
use std::process::ExitCode;

/// Runs the verb that was given.
pub fn run(cli: Cli) -> Result<ExitCode> {
    // Before any kernel runs: a wrong name must not stop a run half-way.
    rambac_cpu::simd::choose().map_err(wrap)?;
    let pool = crate::model::pool(cli.threads)?;
    match cli.verb {
        Verb::Demo(a) => demo::run(&a, pool),
        Verb::Train(a) => train::run(&a, pool),
        Verb::Eval(a) => eval::run(&a, pool),
        Verb::Bench(a) => bench::run(&a, pool),
        Verb::Compile(a) => compile::run(&a, pool),
        Verb::Run(a) => run::run(&a, pool),
        Verb::Explain(a) => explain::run(&a, &pool),
        Verb::Inspect(a) => inspect::run(&a, &pool),
        Verb::Tune(a) => tune::run(&a, pool),
        Verb::Cache(a) => cache::run(&a),
        Verb::Report(a) => report::run(&a, pool),
        Verb::Doctor(a) => doctor::run(&a, pool),
        Verb::Generate(a) => generate::run(&a, pool),
        Verb::Check(a) => check::run(&a, pool),
        Verb::New(a) => new::run(&a),
        Verb::Try(a) => attempt::run(&a, pool),
        Verb::Compare(a) => attempt::compare(&a, pool),
        Verb::Simulate(a) => simulate::run(&a, pool),
    }
}
