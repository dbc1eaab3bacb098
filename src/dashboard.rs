//! A run's numbers in the terminal while it trains: `train --tui`.
//!
//! The terminal belongs to a thread of its own, so that keys are heard and times go on during long steps.

use crate::machine;
use crate::show;
use miette::{Report, miette};
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Block, Chart, Dataset, Gauge, GraphType, Paragraph, Sparkline};
use std::collections::VecDeque;
use std::io::IsTerminal;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often it is drawn, and how long a key may wait.
const TICK: Duration = Duration::from_millis(100);
/// Points of the curve: twice as many are halved.
const POINTS: usize = 1000;
/// Lines of news that are kept.
const NEWS: usize = 50;

/// What is known before the first step.
#[derive(Clone, Debug, Default)]
pub struct About {
    pub title: String,
    pub stages: usize,
    /// Tokens of the whole recipe.
    pub tokens: u64,
    /// Bytes that the plan says the run takes.
    pub planned: usize,
}

/// A step that was done.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub step: u64,
    /// From 0.
    pub stage: usize,
    pub len: usize,
    pub rows: usize,
    /// Tokens of the plan that are behind.
    pub done: u64,
    /// Tokens of this step.
    pub tokens: u64,
    pub seconds: f64,
    pub loss: f32,
    pub smooth: f32,
    pub grad_norm: f32,
    pub lr: f32,
}

enum Message {
    Step(Step),
    News(String),
    End,
}

/// See the module's comment.  The terminal is given back when it is dropped.
pub struct Dashboard {
    to: Sender<Message>,
    thread: Option<JoinHandle<()>>,
}

impl Dashboard {
    /// Takes the terminal; `stop` is called when q or Ctrl-C is pressed, and once more when it is pressed again.
    ///
    /// # Errors
    /// Standard output is no terminal.
    pub fn start(about: About, stop: impl Fn() + Send + 'static) -> Result<Self, Report> {
        if !std::io::stdout().is_terminal() {
            return Err(miette!(
                help = "leave --tui out: the progress bar or --json serve pipes and files",
                "--tui draws in a terminal, and standard output is none"
            ));
        }
        let mut terminal = ratatui::try_init().map_err(|e| miette!("--tui: the terminal refuses: {e}"))?;
        // Terminals without a second screen still show what was there.
        let _ = terminal.clear();
        let (to, from) = mpsc::channel();
        let work = move || {
            let mut state = State::new(about);
            listen(&mut state, &from, &stop, |s| drop(terminal.draw(|f| s.draw(f, machine::rss()))));
            // The terminal is gone if this fails; there is nobody to tell.
            let _ = ratatui::try_restore();
        };
        Ok(Self { to, thread: Some(std::thread::spawn(work)) })
    }

    /// Shows a step.
    pub fn step(&self, s: Step) {
        // A thread that has ended shows nothing more; training goes on.
        let _ = self.to.send(Message::Step(s));
    }

    /// Shows a line of news.
    pub fn news(&self, text: String) {
        let _ = self.to.send(Message::News(text));
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        let _ = self.to.send(Message::End);
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

fn listen(state: &mut State, from: &Receiver<Message>, stop: &dyn Fn(), mut draw: impl FnMut(&State)) {
    let mut drawn: Option<Instant> = None;
    loop {
        match from.recv_timeout(TICK / 2) {
            Ok(Message::Step(s)) => state.add(s),
            Ok(Message::News(text)) => state.tell(text),
            Ok(Message::End) | Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {}
        }
        while event::poll(Duration::ZERO).unwrap_or(false) {
            let Ok(Event::Key(k)) = event::read() else { continue };
            let quits = k.code == KeyCode::Char('q')
                || (k.code == KeyCode::Char('c') && k.modifiers.contains(KeyModifiers::CONTROL));
            if quits && k.kind == KeyEventKind::Press {
                if state.stopping {
                    let _ = ratatui::try_restore();
                }
                state.stopping = true;
                stop();
            }
        }
        if drawn.is_none_or(|t| t.elapsed() >= TICK) {
            draw(state);
            drawn = Some(Instant::now());
        }
    }
}

/// All that is drawn.
struct State {
    about: About,
    began: Instant,
    last: Option<Step>,
    /// `(tokens, loss)`, as measured and smoothed; every `every`-th step.
    measured: Vec<(f64, f64)>,
    smooth: Vec<(f64, f64)>,
    every: u64,
    /// Tokens per second, newest last.
    rates: VecDeque<f64>,
    /// Tokens and seconds since this process began.
    done: (u64, f64),
    news: VecDeque<String>,
    stopping: bool,
}

impl State {
    fn new(about: About) -> Self {
        Self {
            about,
            began: Instant::now(),
            last: None,
            measured: vec![],
            smooth: vec![],
            every: 1,
            rates: VecDeque::new(),
            done: (0, 0.0),
            news: VecDeque::new(),
            stopping: false,
        }
    }

    fn add(&mut self, s: Step) {
        self.last = Some(s);
        self.done = (self.done.0 + s.tokens, self.done.1 + s.seconds);
        self.rates.push_back(s.tokens as f64 / s.seconds.max(1e-9));
        if self.rates.len() > 400 {
            self.rates.pop_front();
        }
        if s.step.is_multiple_of(self.every) {
            self.measured.push((s.done as f64, s.loss.into()));
            self.smooth.push((s.done as f64, s.smooth.into()));
        }
        if self.measured.len() >= 2 * POINTS {
            for line in [&mut self.measured, &mut self.smooth] {
                let mut odd = false;
                line.retain(|_| {
                    odd = !odd;
                    odd
                });
            }
            self.every *= 2;
        }
    }

    fn tell(&mut self, text: String) {
        self.news.push_back(text);
        if self.news.len() > NEWS {
            self.news.pop_front();
        }
    }

    /// Tokens per second over the last steps.
    fn rate(&self) -> f64 {
        let n = self.rates.len().min(20);
        let sum: f64 = self.rates.iter().rev().take(n).map(|r| 1.0 / r).sum();
        if n == 0 { 0.0 } else { n as f64 / sum }
    }

    fn draw(&self, f: &mut Frame, resident: usize) {
        let [top, bar, middle, bottom] =
            Layout::vertical([Constraint::Length(1), Constraint::Length(3), Constraint::Min(8), Constraint::Length(9)])
                .areas(f.area());
        self.draw_title(f, top);
        self.draw_progress(f, bar);
        self.draw_loss(f, middle);
        let [left, right] = Layout::horizontal([Constraint::Length(44), Constraint::Min(10)]).areas(bottom);
        self.draw_numbers(f, left, resident);
        let [rates, news] = Layout::vertical([Constraint::Length(4), Constraint::Min(3)]).areas(right);
        self.draw_rates(f, rates);
        self.draw_news(f, news);
    }

    fn draw_title(&self, f: &mut Frame, area: Rect) {
        let strong = Style::new().add_modifier(Modifier::BOLD);
        let keys = if self.stopping { "stopping after this step, q again ends at once" } else { "q saves and stops" };
        let title = Line::from(vec![Span::styled(format!(" {}", self.about.title), strong)]);
        f.render_widget(Paragraph::new(title), area);
        f.render_widget(Paragraph::new(format!("{keys} ")).right_aligned(), area);
    }

    fn draw_progress(&self, f: &mut Frame, area: Rect) {
        let done = self.last.map_or(0, |s| s.done);
        let part = done as f64 / self.about.tokens.max(1) as f64;
        let left = match self.rate() {
            r if r > 0.0 => clock(self.about.tokens.saturating_sub(done) as f64 / r),
            _ => "?".into(),
        };
        let label = format!(
            "{:.1} %   {} of {} tokens   {left} left, {} so far",
            100.0 * part,
            show::count(done),
            show::count(self.about.tokens),
            clock(self.began.elapsed().as_secs_f64())
        );
        let gauge = Gauge::default().ratio(part.clamp(0.0, 1.0)).label(label).use_unicode(true);
        f.render_widget(gauge.block(Block::bordered()).gauge_style(Style::new().fg(Color::Blue)), area);
    }

    fn draw_loss(&self, f: &mut Frame, area: Rect) {
        let x = [self.measured.first().map_or(0.0, |p| p.0), self.measured.last().map_or(1.0, |p| p.0)];
        let x = if x[1] > x[0] { x } else { [x[0], x[0] + 1.0] };
        let all = self.measured.iter().chain(&self.smooth).map(|p| p.1).filter(|y| y.is_finite());
        let (low, high) = all.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), y| (l.min(y), h.max(y)));
        let (low, high) = if low < high { (low, high) } else { (0.0, 1.0) };
        let room = (high - low) * 0.05;
        let y = [low - room, high + room];
        let faint = Dataset::default()
            .marker(Marker::Dot)
            .graph_type(GraphType::Scatter)
            .style(Style::new().fg(Color::DarkGray))
            .data(&self.measured);
        let strong = Dataset::default()
            .marker(Marker::Braille)
            .graph_type(GraphType::Line)
            .style(Style::new().fg(Color::Cyan))
            .data(&self.smooth);
        let ticks = |r: [f64; 2], f: fn(f64) -> String| [r[0], (r[0] + r[1]) / 2.0, r[1]].map(f).map(Line::from);
        let loss = self.last.map_or(String::new(), |s| format!(" {:.4}", s.smooth));
        let chart = Chart::new(vec![faint, strong])
            .block(Block::bordered().title(format!(" loss{loss} ")))
            .x_axis(Axis::default().bounds(x).labels(ticks(x, |v| show::si(v.round(), ""))))
            .y_axis(Axis::default().bounds(y).labels(ticks(y, |v| format!("{v:.2}"))));
        f.render_widget(chart, area);
    }

    fn draw_numbers(&self, f: &mut Frame, area: Rect, resident: usize) {
        let faint = Style::new().fg(Color::DarkGray);
        let row =
            |name: &str, value: String| Line::from(vec![Span::styled(format!(" {name:<14}"), faint), Span::raw(value)]);
        let mut lines = vec![];
        if let Some(s) = self.last {
            lines.push(row("step", show::count(s.step)));
            lines.push(row("stage", format!("{} of {}: {} x {}", s.stage + 1, self.about.stages, s.rows, s.len)));
            lines.push(row("learning rate", format!("{:.3e}", s.lr)));
            lines.push(row("gradient norm", format!("{:.3}", s.grad_norm)));
            lines.push(row("throughput", format!("{} tokens/s", show::count(self.rate() as u64))));
        }
        lines.push(row("resident", format!("{} ({} planned)", show::bytes(resident), show::bytes(self.about.planned))));
        if let Some((total, free)) = machine::memory() {
            lines.push(row("machine", format!("{} free of {}", show::bytes(free), show::bytes(total))));
        }
        f.render_widget(Paragraph::new(lines).block(Block::bordered().title(" now ")), area);
    }

    fn draw_rates(&self, f: &mut Frame, area: Rect) {
        let wide = usize::from(area.width.saturating_sub(2));
        let newest: Vec<u64> = self.rates.iter().rev().take(wide).rev().map(|r| *r as u64).collect();
        let line = Sparkline::default().data(newest).style(Style::new().fg(Color::Green));
        f.render_widget(line.block(Block::bordered().title(" tokens/s, step by step ")), area);
    }

    fn draw_news(&self, f: &mut Frame, area: Rect) {
        let tall = usize::from(area.height.saturating_sub(2));
        let lines: Vec<Line> =
            self.news.iter().skip(self.news.len().saturating_sub(tall)).map(|n| Line::from(format!(" {n}"))).collect();
        f.render_widget(Paragraph::new(lines).block(Block::bordered().title(" news ")), area);
    }
}

/// `1:02:03`, `4:05`
fn clock(seconds: f64) -> String {
    let s = seconds.round().min(1e9) as u64;
    match s / 3600 {
        0 => format!("{}:{:02}", s / 60, s % 60),
        h => format!("{h}:{:02}:{:02}", s / 60 % 60, s % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn text(state: &State, width: u16, height: u16) -> String {
        let mut t = Terminal::new(TestBackend::new(width, height)).unwrap();
        t.draw(|f| state.draw(f, 200 << 20)).unwrap();
        let buffer = t.backend().buffer();
        let rows = buffer.content().chunks(width.into());
        rows.map(|r| r.iter().map(|c| c.symbol()).collect::<String>() + "\n").collect()
    }

    fn trained(steps: u64) -> State {
        let about = About { title: "small into runs/x".into(), stages: 2, tokens: 4096 * 1000, planned: 300 << 20 };
        let mut s = State::new(about);
        for i in 1..=steps {
            let loss = 2.0 + 4.0 / (1.0 + i as f32 / 10.0);
            let (grad_norm, lr) = (0.5, 1e-3);
            let step = Step {
                step: i,
                stage: 1,
                len: 1024,
                rows: 4,
                done: 4096 * i,
                tokens: 4096,
                seconds: 0.25,
                loss,
                smooth: loss,
                grad_norm,
                lr,
            };
            s.add(step);
        }
        s.tell("stage 1 done: 16 x 64".into());
        s
    }

    #[test]
    fn shows_what_a_run_does() {
        let t = text(&trained(500), 100, 30);
        for part in [
            "small into runs/x",
            "q saves and stops",
            "50.0 %",
            "2,048,000 of 4,096,000 tokens",
            "2:05 left",
            "loss 2.0784",
            "step          500",
            "2 of 2: 4 x 1024",
            "16,384 tokens/s",
            "200 MiB (300 MiB planned)",
            "stage 1 done: 16 x 64",
        ] {
            assert!(t.contains(part), "no {part:?} in\n{t}");
        }
        // A curve was drawn.
        assert!(t.chars().any(|c| ('\u{2801}'..='\u{28ff}').contains(&c)), "{t}");
    }

    /// Any size of window, no steps, many steps, and losses that are no numbers.
    #[test]
    fn never_panics() {
        let mut odd = trained(10);
        odd.add(Step { loss: f32::NAN, smooth: f32::NAN, seconds: 0.0, ..odd.last.unwrap() });
        for state in [State::new(About::default()), trained(1), trained(2), trained(5000), odd] {
            assert!(state.measured.len() < 2 * POINTS);
            for (w, h) in [(1, 1), (10, 4), (44, 12), (80, 24), (200, 60)] {
                text(&state, w, h);
            }
        }
    }
}
