//! The steps of a training run.
//!
//! A GPU is never waited for where nothing depends on it: the next batch is made on a thread of its own, the next step is
//! started, and then the host looks at how the one before went.  It does wait before a checkpoint, at the end of a stage, and
//! where a loss decides whether a stage goes on: so the same steps are done, with the same numbers, as on the CPU.

use super::{Run, carry, interrupted};
use crate::dashboard::{Dashboard, Step};
use crate::error::{self, Result, wrap};
use crate::loader::Loader;
use crate::profile::Profile;
use crate::show::{self, Beat};
use crate::trouble::{self, Failed};
use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use miette::{IntoDiagnostic, Report};
use rambac_ir::Bindings;
use rambac_models::data::rng::stream;
use rambac_models::data::{MixTask, Task};
use rambac_models::recipe::Recipe;
use rambac_models::stack::{self, Carry};
use rambac_passes::train_step::STEP;
use rambac_runtime::{MicroBatch, StepReport, Tensor, TrainError};
use std::sync::Arc;
use std::time::Instant;

/// Planned steps that must be left for a stage to end early: fewer are not worth it.
const MIN_LEFT: u64 = 100;

/// A step that was started: its stage, and the first planned step of the next one.
struct Started {
    stage: usize,
    next: u64,
}

/// What people see of a run.
struct Shown {
    bar: ProgressBar,
    dashboard: Option<Dashboard>,
    /// Where there is neither.
    beat: Beat,
    /// Tokens and seconds since the rate was shown.
    tokens: u64,
    seconds: f64,
    /// When the last step was accounted for.
    clock: Instant,
}

/// The micro-batches of a planned step.
fn batch(r: &Recipe, tasks: &[MixTask], stage: usize, planned: u64) -> Result<Vec<MicroBatch>> {
    let s = &r.stages[stage];
    let mut out = vec![];
    for part in 0..r.accumulate as u64 {
        let id = planned * r.accumulate as u64 + part;
        let b = tasks[stage].batch(id, s.rows, s.len).map_err(wrap)?;
        let shape = [s.rows, s.len];
        let mut inputs = vec![
            ("input_ids", Tensor::i32(&shape, b.input_ids)),
            ("labels", Tensor::i32(&shape, b.labels)),
            ("loss_weights", Tensor::f32(&shape, b.loss_weights)),
        ];
        if r.carry_share > 0.0 {
            let keep = |row: u64| rand::Rng::random_bool(&mut stream(r.seed, "carry", &[id, row]), r.carry_share);
            let carry = (0..s.rows as u64).map(|row| keep(row) as u8 as f32).collect();
            inputs.push(("carry", Tensor::f32(&[s.rows], carry)));
        }
        out.push(MicroBatch { dims: Bindings::new([("N", s.rows), ("L", s.len)]), inputs });
    }
    Ok(out)
}

impl Run {
    /// What makes the batches of this run's steps.
    fn loader(&mut self) -> Result<Loader<Vec<MicroBatch>>> {
        let (recipe, tasks) = (self.state.recipe.clone(), self.tasks.clone());
        let ahead = self.trainer.machine().is_some();
        Loader::new(Arc::new(move |stage, planned| batch(&recipe, &tasks, stage, planned)), ahead)
    }

    /// Runs to the end of the recipe; `false` if it was stopped before.
    pub fn train(&mut self) -> Result<bool> {
        if self.state.recipe.stage_at(self.state.position.planned).is_none() {
            eprintln!(
                "this run finished at step {}; to train further, start from its weights: rambac train {} … --out DIR",
                self.state.position.step,
                self.folder().display()
            );
            return Ok(true);
        }
        self.announce()?;
        let total = self.state.recipe.tokens();
        let dashboard = if self.tui { Some(self.dashboard()?) } else { None };
        let bar = if self.json || self.tui { ProgressBar::hidden() } else { ProgressBar::new(total) };
        // An error is not to stand in it.
        let bar = bar.with_finish(ProgressFinish::AndClear);
        let style = "{elapsed_precise} [{wide_bar}] {human_pos}/{human_len}  {msg}  {eta} left";
        bar.set_style(ProgressStyle::with_template(style).into_diagnostic()?.progress_chars("=> "));
        bar.set_position(self.state.recipe.tokens_before(self.state.position.planned));
        bar.reset_eta();
        let began = Instant::now();
        let beat = Beat::starts();
        let mut shown = Shown { bar, dashboard, beat, tokens: 0, seconds: 0.0, clock: Instant::now() };
        let mut loader = self.loader()?;
        let mut saved = self.state.position.step;
        // The next step to start, and the one that was started and has not told how it went.
        let (mut ahead, mut flying) = (self.state.position.planned, None);
        while let Some((stage, next)) = self.state.recipe.stage_at(ahead) {
            let out_of_time = self.time_limit.is_some_and(|t| began.elapsed() >= t);
            if interrupted() || out_of_time {
                self.land(&mut flying, &mut shown)?;
                shown.bar.finish_and_clear();
                self.save()?;
                self.profile.iter_mut().try_for_each(Profile::finish)?;
                return Ok(false);
            }
            let following = self.state.recipe.stage_at(ahead + 1).map(|(stage, _)| (stage, ahead + 1));
            let batch = loader.batch((stage, ahead), following)?;
            let step = self.state.position.step + u64::from(flying.is_some());
            let this = Started { stage, next };
            // What a step tells may decide what comes after it.
            let until = self.state.recipe.stages[stage].until_loss.is_some();
            let due = self.save_every > 0 && (step + 1).is_multiple_of(self.save_every);
            match self.begin(step, &batch)? {
                Some((n, report)) if n == step => self.account(&this, report, &mut shown)?,
                Some((_, report)) => {
                    let before = flying.replace(this).expect("BUG: a step tells how it went that was not started");
                    self.account(&before, report, &mut shown)?;
                }
                None => flying = Some(this),
            }
            if until || due || ahead + 1 == next {
                self.land(&mut flying, &mut shown)?;
            }
            ahead = if flying.is_some() { ahead + 1 } else { self.state.position.planned };
            let step = self.state.position.step;
            if flying.is_none() && step > saved && self.save_every > 0 && step.is_multiple_of(self.save_every) {
                self.save()?;
                saved = step;
                shown.clock = Instant::now();
            }
        }
        self.land(&mut flying, &mut shown)?;
        let Shown { bar, dashboard, .. } = shown;
        bar.finish();
        drop(dashboard);
        self.profile.iter_mut().try_for_each(Profile::finish)?;
        self.trainer.sync().map_err(error::train)?;
        if saved != self.state.position.step || self.state.position.step == 0 {
            self.save()?;
        }
        if let Some(v) = self.validation_loss()? {
            eprintln!("validation loss {v:.4}");
        }
        Ok(true)
    }

    /// Starts a step; the report of a step that is known now, with its number.
    fn begin(&mut self, step: u64, batch: &[MicroBatch]) -> Result<Option<(u64, StepReport)>> {
        let on_device = self.trainer.machine().is_some();
        let times = if on_device { None } else { Profile::times(&self.profile) };
        let began = Instant::now();
        let Some(mut times) = times else {
            return self.trainer.start(step, batch).map_err(|e| self.explained(e, batch));
        };
        let report = self.trainer.step_timed(step, batch, Some(&mut times)).map_err(|e| self.explained(e, batch))?;
        if let Some(p) = &mut self.profile {
            let numbers = [("loss", report.loss.into()), ("gradient norm", report.grad_norm.into())];
            let program = self.trainer.program();
            p.run(&format!("step {}", step + 1), program, &batch[0].dims, (began, batch.len()), &times, &numbers)?;
        }
        Ok(Some((step, report)))
    }

    /// Why a step over `batch` failed.
    fn explained(&mut self, e: TrainError, batch: &[MicroBatch]) -> Report {
        let steps = self.folder.steps().unwrap_or_default();
        let next = trouble::checkpoints(self.folder.path(), &steps);
        let again = self.trainer.machine().is_none().then_some((batch, &mut self.trainer.store));
        let (carry, attention) = (carry(&self.state.recipe), self.attention.as_deref());
        trouble::explain(e, Failed { config: &self.config, carry, again, attention }, &self.pool, Some(next))
    }

    /// Waits for a step that was started, and accounts for it.
    fn land(&mut self, flying: &mut Option<Started>, shown: &mut Shown) -> Result<()> {
        let Some(s) = flying.take() else { return Ok(()) };
        let (_, report) = self
            .trainer
            .finish()
            .map_err(|e| self.explained(e, &[]))?
            .expect("BUG: what was started has told how it went");
        self.account(&s, report, shown)
    }

    /// A step is done: where the run stands, its metrics, what people see.
    fn account(&mut self, s: &Started, report: StepReport, shown: &mut Shown) -> Result<()> {
        let seconds = shown.clock.elapsed().as_secs_f64();
        if let (Some(p), watched) = (&mut self.profile, self.trainer.watched())
            && let Some(machine) = self.trainer.machine()
        {
            let numbers = [("loss", report.loss.into()), ("gradient norm", report.grad_norm.into())];
            let last = watched.len().saturating_sub(1);
            for (i, t) in watched.iter().enumerate() {
                let gpu = machine.program(t.program).clone();
                let name = format!("step {}: {}", self.state.position.step + 1, gpu.program.name);
                p.device_run(&name, &gpu, t, if i == last { &numbers } else { &[] })?;
            }
        }
        let (stage, next) = (s.stage, s.next);
        let s = &self.state.recipe.stages[stage];
        let tokens = (s.len * s.rows * self.state.recipe.accumulate) as u64;
        let (len, rows, until) = (s.len, s.rows, s.until_loss);
        let p = &mut self.state.position;
        p.step += 1;
        p.planned += 1;
        p.tokens += tokens;
        p.seconds += seconds;
        let smooth = p.smooth.map_or(report.loss, |m| m + 0.05 * (report.loss - m));
        p.smooth = Some(smooth);
        let line = serde_json::json!({
            "step": p.step, "tokens": p.tokens, "stage": stage, "len": len, "rows": rows, "loss": report.loss,
            "grad_norm": report.grad_norm, "lr": report.lr, "tokens_per_s": tokens as f64 / seconds, "seconds": p.seconds,
        });
        self.metrics.write(&line)?;
        if self.json {
            println!("{line}");
        }
        let early = until.is_some_and(|u| smooth < u && p.planned + MIN_LEFT < next);
        if early || p.planned == next {
            p.planned = next;
            p.smooth = None;
            // The schedule follows the plan, not the count of steps.
            self.trainer.set(STEP, Tensor::f32(&[], vec![next as f32])).map_err(error::train)?;
            let how = if early { "done early" } else { "done" };
            let tokens = show::count(p.tokens);
            let news = format!("stage {} {how}: {rows} x {len}, {tokens} tokens so far, loss {smooth:.3}", stage + 1);
            match &shown.dashboard {
                Some(d) => d.news(news),
                // A hidden bar says nothing.
                None if shown.bar.is_hidden() => eprintln!("{news}"),
                None => shown.bar.println(news),
            }
        }
        (shown.tokens, shown.seconds) = (shown.tokens + tokens, shown.seconds + seconds);
        if shown.seconds > 0.5 {
            let rate = show::thousands(shown.tokens as f64 / shown.seconds);
            shown.bar.set_message(format!("loss {smooth:.3}  {rate} tok/s"));
            (shown.tokens, shown.seconds) = (0, 0.0);
        }
        let done = self.state.recipe.tokens_before(self.state.position.planned);
        shown.bar.set_position(done);
        let step = self.state.position.step;
        if !self.json && !self.tui {
            let (done, total) = (show::count(done), show::count(self.state.recipe.tokens()));
            let rate = show::rate(tokens as f64 / seconds);
            shown.beat.tell(&shown.bar, || {
                format!("step {step}: {done} of {total} tokens, loss {smooth:.3}, {rate} tokens/s")
            });
        }
        if let Some(d) = &shown.dashboard {
            let (loss, grad_norm, lr) = (report.loss, report.grad_norm, report.lr);
            d.step(Step { step, stage, len, rows, done, tokens, seconds, loss, smooth, grad_norm, lr });
        }
        shown.clock = Instant::now();
        Ok(())
    }

    /// Mean loss over batches of the held-out part of a text, where training runs.
    fn validation_loss(&mut self) -> Result<Option<f32>> {
        let Some(task) = &self.validation else { return Ok(None) };
        let Some(s) = self.state.recipe.stages.last() else { return Ok(None) };
        let mut batches = vec![];
        for i in 0..8 {
            // A held-out part shorter than a row is no reason to fail a finished run.
            let Ok(b) = task.batch(i, s.rows, s.len) else { return Ok(None) };
            let shape = [s.rows, s.len];
            let inputs = vec![
                ("input_ids", Tensor::i32(&shape, b.input_ids)),
                ("labels", Tensor::i32(&shape, b.labels)),
                ("loss_weights", Tensor::f32(&shape, b.loss_weights)),
            ];
            batches.push(MicroBatch { dims: Bindings::new([("N", s.rows), ("L", s.len)]), inputs });
        }
        let loss = stack::loss(&self.config, Carry::Zero, false).map_err(wrap)?;
        let evaluated = self.trainer.evaluate(&loss, &batches, &self.pool);
        evaluated.map(Some).map_err(error::train)
    }
}
