//! Whether a variant learns: a small model around it is trained on recall, copying and passkeys for a minute at most, and
//! asked at lengths it has not seen.
//!
//! Everything depends on the seed and the budget of tokens alone, so variants under one budget see the same rows.

use super::Subject;
use crate::error::{self, Result, wrap};
use crate::trouble::{self, Failed};
use rambac_codegen::{Memory, lower};
use rambac_ir::ops::Op;
use rambac_ir::{Bindings, Graph, NodeId};
use rambac_models::data::passkey::{DIGITS, min_len};
use rambac_models::data::recall::needle_row;
use rambac_models::data::{IGNORED, MixTask, PasskeyCase, RecallMix, RecallTask, Task};
use rambac_models::recipe::{Recipe, Rows, Stage};
use rambac_models::stack::{self, Carry};
use rambac_models::{Config, InitRule};
use rambac_passes::{Options, optimise};
use rambac_runtime::{Executor, MicroBatch, Store, Tensor, Trainer};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a training may take.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    pub tokens: u64,
    /// It ends after this, whatever was planned.
    pub time: Duration,
    pub seed: u64,
    /// Length of the last rows.
    pub len: usize,
    pub lr: f64,
    pub grid: Grid,
}

/// What rows must be multiples of; variants that share it see the same rows, and as many tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Texts have a multiple of so many tokens.
    pub unit: usize,
    /// The shortest rows have four chunks of so many.
    pub chunk: usize,
}

impl Grid {
    pub fn of(s: &Subject) -> Self {
        Self { unit: s.unit.max(1), chunk: s.sizes().chunk }
    }
    /// The grid that both can do with.
    pub fn with(self, other: Self) -> Self {
        Self { unit: super::lcm(self.unit, other.unit), chunk: self.chunk.max(other.chunk) }
    }
}

/// A point of the curve.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    pub tokens: u64,
    /// Smoothed.
    pub loss: f32,
}

/// One task at one length.
#[derive(Clone, Debug)]
pub struct Score {
    pub task: &'static str,
    pub len: usize,
    pub asked: usize,
    pub right: usize,
    /// Of every choice of the variant (see [`Learnt::choices`]), where it could choose the needle's unit.
    pub needles: Vec<Option<Needle>>,
}

/// How a choice stands to the unit that holds the needle.
#[derive(Clone, Copy, Debug)]
pub struct Needle {
    /// Its mean rank among the units that the token that asks could choose, from 1.
    pub rank: f64,
    /// How often it was chosen.
    pub chosen: f64,
}

impl Score {
    pub fn accuracy(&self) -> f64 {
        self.right as f64 / self.asked.max(1) as f64
    }
}

/// Which units the tokens of one text chose.
pub struct Heat {
    /// The choice.
    pub label: String,
    /// Rows of units, the number of heads that chose it, for tokens `step` apart.
    pub rows: Vec<Vec<u8>>,
    pub heads: u8,
    pub step: usize,
    /// Tokens of a unit, and how many there are.
    pub unit: usize,
    pub units: usize,
    /// The column that holds the needle.
    pub needle: usize,
}

/// What a training gave.
pub struct Learnt {
    pub curve: Vec<Point>,
    /// Labels of its choices, in the order of the text.
    pub choices: Vec<String>,
    pub scores: Vec<Score>,
    /// One for every choice.
    pub heat: Vec<Heat>,
    pub parameters: u64,
    pub tokens: u64,
    /// Tokens of the whole recipe, which rounds the budget to whole rows.
    pub planned: u64,
    pub seconds: f64,
    /// Planned memory of a step.
    pub peak: usize,
    /// Why it ended before its plan, if it did.
    pub stopped: Option<String>,
}

/// Tokens of a step, about.
const STEP_TOKENS: usize = 1024;

/// Rows that practise recall first, then passkeys too, at growing lengths.
fn recipe(b: &Budget) -> Recipe {
    use Rows::*;
    let whole = |len: usize| len.next_multiple_of(b.grid.unit.max(1));
    let stage = |len: usize, share: f64, mix: &[(f64, Rows)]| {
        let rows = (STEP_TOKENS / len).max(1);
        Stage {
            len,
            rows,
            steps: ((b.tokens as f64 * share) as u64 / (len * rows) as u64).max(1),
            mix: mix.to_vec(),
            until_loss: None,
        }
    };
    // Rows of passkeys hold a needle and a question.
    let (long, least) = (whole(b.len).max(whole(min_len())), whole((4 * b.grid.chunk).max(64)));
    let short = least.min(long);
    let mid = whole(b.len / 2).max(short).max(whole(min_len()));
    let stages = vec![
        stage(short, 0.45, &[(0.4, Recall), (0.6, CopyPrintable)]),
        stage(mid, 0.2, &[(0.3, Recall), (0.2, CopyPrintable), (0.2, Copy), (0.3, Passkey)]),
        stage(long, 0.35, &[(0.2, Recall), (0.2, Copy), (0.6, Passkey)]),
    ];
    let mut r =
        Recipe { stages, seed: b.seed, fan_in: true, few_digits_share: 0.3, ..Recipe::plain(Passkey, long, 1, 1) };
    let total = r.steps();
    (r.optim.lr, r.optim.warmup, r.optim.hold, r.optim.floor) = (b.lr, 30.min(total), total / 2, 0.05);
    r
}

/// Trains and asks.  `seen` is told of every point: tokens done of all, and the loss.
///
/// # Errors
/// A model that can't be trained: what it says of the loss is said with the step.
pub fn run(
    s: &Subject,
    config: &Config,
    budget: &Budget,
    pool: &Arc<rayon::ThreadPool>,
    mut seen: impl FnMut(&[Point], u64),
) -> Result<Learnt> {
    let r = recipe(budget);
    let loss = stack::loss(config, Carry::Zero, false).map_err(wrap)?;
    let store = crate::model::parameters(config, None, InitRule::FanIn, budget.seed)?;
    let adamw = crate::model::adamw(&r);
    let specs = config.parameters();
    let decays = |name: &str| specs.iter().any(|p| p.name == name && p.decay);
    let mut trainer =
        Trainer::new(&loss, &adamw, decays, 1, &Memory::Keep, store, pool.clone()).map_err(error::train)?;
    let largest = r.stages.iter().max_by_key(|s| s.len * s.rows).expect("BUG: a recipe has stages");
    let peak = trainer.plan(&Bindings::new([("N", largest.rows), ("L", largest.len)])).map_err(wrap)?.peak();
    let tasks: Vec<MixTask> = r.tasks(None).map_err(wrap)?;
    let (began, mut tokens, mut smooth, mut curve, mut stopped) = (Instant::now(), 0u64, None::<f32>, vec![], None);
    for step in 0..r.steps() {
        if began.elapsed() > budget.time {
            stopped = Some(format!("stopped after {} s at step {step} of {}", budget.time.as_secs(), r.steps()));
            break;
        }
        let (i, _) = r.stage_at(step).expect("BUG: the step is planned");
        let (rows, len) = (r.stages[i].rows, r.stages[i].len);
        let b = tasks[i].batch(step, rows, len).map_err(wrap)?;
        let shape = [rows, len];
        let inputs = vec![
            ("input_ids", Tensor::i32(&shape, b.input_ids)),
            ("labels", Tensor::i32(&shape, b.labels)),
            ("loss_weights", Tensor::f32(&shape, b.loss_weights)),
        ];
        let batch = [MicroBatch { dims: Bindings::new([("N", rows), ("L", len)]), inputs }];
        let report = match trainer.step(step, &batch) {
            Ok(report) => report,
            Err(e) => {
                let again = Some((&batch[..], &mut trainer.store));
                let attention = Some(s.path.as_path());
                let failed = Failed { config, carry: Carry::Zero, again, attention };
                return Err(trouble::explain(e, failed, pool, None));
            }
        };
        tokens += (rows * len) as u64;
        let now = smooth.map_or(report.loss, |m| m + 0.05 * (report.loss - m));
        smooth = Some(now);
        if step % 5 == 4 || step + 1 == r.steps() {
            curve.push(Point { tokens, loss: now });
            seen(&curve, r.tokens());
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    let mut asker = Asker::new(config, trainer.store, pool)?;
    let mut scores = vec![];
    let longest = r.stages.iter().map(|s| s.len).max().unwrap_or(0);
    for len in [longest / 2, longest, 2 * longest, 4 * longest].map(|l| l.next_multiple_of(budget.grid.unit)) {
        scores.push(asker.recall(len, budget.seed)?);
        scores.push(asker.needle(len, budget.seed)?);
        if len >= min_len() {
            scores.push(asker.passkey(len, 16, budget.seed ^ 0x5eed)?);
        }
    }
    scores.sort_by_key(|s| ["recall", "needle", "passkey"].iter().position(|t| *t == s.task));
    let heat = asker.heat(longest, budget.seed)?;
    let (choices, parameters, planned) = (asker.choices, config.n_parameters(), r.tokens());
    Ok(Learnt { curve, choices, scores, heat, parameters, tokens, planned, seconds, peak, stopped })
}

/// A trained model that reads whole texts, with its choices as outputs.
pub struct Asker {
    executor: Executor,
    store: Store,
    vocab: usize,
    /// Labels.
    choices: Vec<String>,
}

/// What one text gave.
struct Read {
    logits: Vec<f32>,
    choices: Vec<Choice>,
}

/// What a choice gave for one text.
struct Choice {
    /// `i32[1, L, h, K]`
    indices: Tensor,
    /// `i32[1, L, h]`
    count: Tensor,
    /// `f32[1, L, h, C]`
    scores: Tensor,
}

/// The forward with every choice and what it was made by as outputs.
fn with_choices(mut g: Graph) -> (Graph, Vec<String>) {
    let chosen: Vec<_> =
        g.iter().filter(|(_, n)| matches!(n.op, Op::Select(_))).map(|(id, n)| (id, n.inputs[0])).collect();
    for (i, (id, by)) in chosen.iter().enumerate() {
        for (name, value) in [("indices", id.result(0)), ("count", id.result(1)), ("scores", *by)] {
            g.outputs.push(rambac_ir::Output { name: format!("choice.{i}.{name}").into(), value });
        }
    }
    let label = |id: NodeId| g.label(id.result(0));
    let labels = chosen.iter().map(|&(id, _)| match &g.node(id).scope {
        // Layers that are alike.
        Some(scope) if chosen.iter().any(|&(other, _)| other != id && label(other) == label(id)) => {
            format!("{} of {scope}", label(id))
        }
        _ => label(id),
    });
    let labels = labels.collect();
    (g, labels)
}

impl Asker {
    /// Compiles the forward of a model; `store` has its weights.
    ///
    /// # Errors
    /// A model that does not build.
    pub fn new(c: &Config, store: Store, pool: &Arc<rayon::ThreadPool>) -> Result<Self> {
        let (g, choices) = with_choices(stack::forward(c, false).map_err(wrap)?);
        let executor = Executor::new(lower(&optimise(&g, &Options::default())), pool.clone());
        Ok(Self { executor, store, vocab: c.vocab_size, choices })
    }

    /// Labels of the choices that the model makes, layer by layer.
    pub fn choices(&self) -> &[String] {
        &self.choices
    }

    fn read(&mut self, tokens: &[i32]) -> Result<Read> {
        let dims = Bindings::new([("N", 1), ("L", tokens.len())]);
        let ids = Tensor::i32(&[1, tokens.len()], tokens.to_vec());
        let mut out = self.executor.run(&dims, &[("input_ids", ids.view())], &mut self.store).map_err(wrap)?;
        let mut take = |name: &str| out.iter().position(|(n, _)| n == name).map(|i| out.swap_remove(i).1);
        let logits = take("logits").and_then(|t| t.as_f32().map(<[f32]>::to_vec)).unwrap_or_default();
        let mut choice = |i: usize| {
            let mut part = |name| take(&format!("choice.{i}.{name}")).expect("BUG: every choice is an output");
            Choice { indices: part("indices"), count: part("count"), scores: part("scores") }
        };
        Ok(Read { logits, choices: (0..self.choices.len()).map(&mut choice).collect() })
    }

    fn best(&self, r: &Read, at: usize) -> i32 {
        let row = &r.logits[at * self.vocab..][..self.vocab];
        (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as i32
    }

    fn recall(&mut self, len: usize, seed: u64) -> Result<Score> {
        let task = RecallTask::new(seed ^ 0x5eed, RecallMix::default()).map_err(wrap)?;
        let (mut asked, mut right) = (0, 0);
        for row in 0..8 {
            let b = task.batch(row, 1, len).map_err(wrap)?;
            let r = self.read(&b.input_ids)?;
            for (at, &label) in
                b.labels.iter().enumerate().filter(|(at, l)| **l != IGNORED && b.loss_weights[*at] == 1.0)
            {
                asked += 1;
                right += usize::from(self.best(&r, at) == label);
            }
        }
        Ok(Score { task: "recall", len, asked, right, needles: vec![] })
    }

    fn needle(&mut self, len: usize, seed: u64) -> Result<Score> {
        let (mut right, mut found) = (0, vec![]);
        let cases = 24;
        for index in 0..cases {
            let n = needle_row(seed ^ 0x5eed, index, len).map_err(wrap)?;
            let r = self.read(&n.tokens)?;
            right += usize::from(self.best(&r, len - 1) == n.value);
            // The value, or the key before it: either will do.
            found.push(ranks(&r, len - 1, [n.at, n.at + 1]));
        }
        Ok(Score { task: "needle", len, asked: cases as usize, right, needles: means(&found) })
    }

    /// Digits of passkeys that are the first choice, over so many cases.
    ///
    /// # Errors
    /// A length that holds no case, or that the model does not take.
    pub fn passkey(&mut self, len: usize, cases: u64, seed: u64) -> Result<Score> {
        let (mut right, mut found) = (0, vec![]);
        for index in 0..cases {
            let (tokens, case) = passkey_tokens(seed, index, len)?;
            let r = self.read(&tokens)?;
            let first = case.prompt_len() - 1;
            let digits = case.answer();
            right += (0..DIGITS).filter(|&i| self.best(&r, first + i) == i32::from(digits[i])).count();
            found.push(ranks(&r, first, [case.digits_offset() - 1, case.digits_offset()]));
        }
        Ok(Score { task: "passkey", len, asked: cases as usize * DIGITS, right, needles: means(&found) })
    }

    fn heat(&mut self, len: usize, seed: u64) -> Result<Vec<Heat>> {
        if len < min_len() {
            return Ok(vec![]);
        }
        let (tokens, case) = passkey_tokens(seed ^ 0x5eed, 3, len)?;
        let r = self.read(&tokens)?;
        Ok(r.choices.iter().zip(&self.choices).map(|(c, label)| heat(c, label, len, case.digits_offset())).collect())
    }
}

/// What the tokens of a text of `len` chose; the needle is at token `needle`.
fn heat(c: &Choice, label: &str, len: usize, needle: usize) -> Heat {
    let (h, k, units) = (c.indices.shape[2], c.indices.shape[3], c.scores.shape[3]);
    let (i, n) = (c.indices.as_i32().unwrap_or_default(), c.count.as_i32().unwrap_or_default());
    let step = len.div_ceil(96);
    // Units of single tokens are shown in groups.
    let columns = units.min(96);
    let rows = (0..len).step_by(step).map(|t| {
        let mut row = vec![0u8; columns];
        for at in t * h..(t + 1) * h {
            for &c in &i[at * k..][..n[at] as usize] {
                let cell = &mut row[c as usize * columns / units];
                *cell = cell.saturating_add(1);
            }
        }
        row
    });
    let (rows, unit) = (rows.collect(), len / units.max(1));
    Heat { label: label.into(), rows, heads: h as u8, step, unit, units, needle: needle * columns / len.max(1) }
}

/// The tokens of a case, its answer but for the last digit included.
fn passkey_tokens(seed: u64, index: u64, len: usize) -> Result<(Vec<i32>, PasskeyCase)> {
    let case = PasskeyCase::new(seed, index, len).map_err(wrap)?;
    let mut bytes = vec![0u8; case.prompt_len()];
    case.prompt().fill(&mut bytes);
    bytes.extend(&case.answer()[..DIGITS - 1]);
    Ok((bytes.iter().map(|&b| b.into()).collect(), case))
}

/// Of the units that hold one of the tokens `at`, by every choice: the best rank over heads for the token `t`, from 1, and
/// whether one was chosen.  `None` where the token could not choose it.
fn ranks(r: &Read, t: usize, at: [usize; 2]) -> Vec<Option<(f64, bool)>> {
    r.choices.iter().map(|c| rank(c, t, at)).collect()
}

fn rank(c: &Choice, t: usize, at: [usize; 2]) -> Option<(f64, bool)> {
    let (i, n, s) = (c.indices.as_i32()?, c.count.as_i32()?, c.scores.as_f32()?);
    let (len, h, k, units) = (c.scores.shape[1], c.scores.shape[2], c.indices.shape[3], c.scores.shape[3]);
    let mut best: Option<f64> = None;
    let mut chosen = false;
    for unit in at.map(|a| a * units / len.max(1)) {
        for head in 0..h {
            let row = &s[(t * h + head) * units..][..units];
            if unit >= units || row[unit] == f32::NEG_INFINITY {
                continue;
            }
            let rank = 1.0 + row.iter().filter(|x| **x > row[unit]).count() as f64;
            best = Some(best.map_or(rank, |b: f64| b.min(rank)));
            let slots = &i[(t * h + head) * k..][..n[t * h + head] as usize];
            chosen |= slots.contains(&(unit as i32));
        }
    }
    best.map(|b| (b, chosen))
}

/// Means over texts, by choice.
fn means(found: &[Vec<Option<(f64, bool)>>]) -> Vec<Option<Needle>> {
    let of = |choice: usize| {
        let seen: Vec<(f64, bool)> = found.iter().filter_map(|text| text[choice]).collect();
        let n = seen.len() as f64;
        let rank = seen.iter().map(|f| f.0).sum::<f64>() / n;
        let chosen = seen.iter().filter(|f| f.1).count() as f64 / n;
        (!seen.is_empty()).then_some(Needle { rank, chosen })
    };
    (0..found.first().map_or(0, Vec::len)).map(of).collect()
}

/// The curve in block characters, `width` wide.
pub fn sparkline(curve: &[Point], width: usize) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let top = curve.iter().map(|p| p.loss).fold(0.0f32, f32::max).max(1e-6);
    let n = width.min(curve.len());
    (0..n)
        .map(|i| {
            let p = curve[(i * (curve.len() - 1)).checked_div(n - 1).unwrap_or(0)];
            BLOCKS[((p.loss / top * 7.0).round() as usize).min(7)]
        })
        .collect()
}
