//! `--measure`: how long the window takes to open, and how many frames a second it draws while everything moves.

use super::panels::READABLE;
use super::{App, BACKGROUND, Eye};
use eframe::egui::{Ui, Vec2, ViewportCommand, Visuals};
use rambac_picture::Open;
use std::time::{Duration, Instant};

/// How long each movement is watched.
const WATCHED: Duration = Duration::from_secs(4);

/// What is done to the graph.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Motion {
    /// As it opens, moved about.
    Folded,
    /// All open, letters readable, moved about.
    Near,
    /// All open, from near to far and back.
    Zoom,
    /// All of it in the window, moved about.
    Far,
}

const MOTIONS: [(Motion, &str); 4] = [
    (Motion::Folded, "layers folded, moving"),
    (Motion::Near, "all open, moving"),
    (Motion::Zoom, "all open, zooming"),
    (Motion::Far, "all open, all in view, moving"),
];

/// The window, watched.
pub struct Measure {
    app: App,
    began: Instant,
    opened: Option<Duration>,
    /// The motion, when it began, and when its frames began.
    now: usize,
    since: Instant,
    frames: Vec<Instant>,
}

impl Measure {
    /// `began` is when the process did.
    pub fn new(app: App, began: Instant) -> Self {
        Self { app, began, opened: None, now: 0, since: began, frames: vec![] }
    }

    /// Prints what was seen of a motion.
    fn report(&self) {
        let steps: Vec<f64> = self.frames.windows(2).map(|w| (w[1] - w[0]).as_secs_f64() * 1e3).collect();
        let mean = steps.iter().sum::<f64>() / steps.len().max(1) as f64;
        let slowest = steps.iter().copied().fold(0.0, f64::max);
        println!(
            "{:<30} {:>5} boxes  {:>5.0} frames/s, the slowest frame {slowest:.0} ms",
            MOTIONS[self.now].1,
            self.app.boxes(),
            1e3 / mean,
        );
    }

    /// Where the eye is, a time after the motion began.
    fn eye(&self, seconds: f32) -> Option<Eye> {
        let (size, app) = (self.app.size?, &self.app);
        let about = Vec2::angled(seconds * 1.5) * 260.0;
        let middle = app.picture.layout.centres.get(app.boxes() / 2)?;
        Some(match MOTIONS[self.now].0 {
            Motion::Folded => {
                let eye = Eye::whole(app.picture.layout.extent, size, READABLE);
                Eye { pan: eye.pan + about, ..eye }
            }
            Motion::Near => {
                let eye = Eye::on(*middle, size, 0.9);
                Eye { pan: eye.pan + about, ..eye }
            }
            // From letters that fill the window to boxes of a point.
            Motion::Zoom => Eye::on(*middle, size, 0.15 * (10.0_f32).powf((seconds * 1.5).sin())),
            Motion::Far => {
                let eye = Eye::whole(app.picture.layout.extent, size, 0.0);
                Eye { pan: eye.pan + about * 0.1, ..eye }
            }
        })
    }
}

impl eframe::App for Measure {
    fn clear_color(&self, _: &Visuals) -> [f32; 4] {
        BACKGROUND
    }

    fn ui(&mut self, ui: &mut Ui, _: &mut eframe::Frame) {
        let now = Instant::now();
        self.frames.push(now);
        // The frame before this one is on the screen.
        if self.opened.is_none() && self.frames.len() == 2 {
            let opened = now - self.began;
            println!("open after {:.2} s", opened.as_secs_f64());
            (self.opened, self.since, self.frames) = (Some(opened), now, vec![now]);
        }
        if self.opened.is_some() && now - self.since > WATCHED {
            self.report();
            self.now += 1;
            if self.now == MOTIONS.len() {
                ui.ctx().send_viewport_cmd(ViewportCommand::Close);
                self.now = 0;
                self.opened = None;
            } else if self.app.look.open != Open::All && MOTIONS[self.now].0 != Motion::Folded {
                self.app.open_all();
                self.app.goal = None;
            }
            // The first frame of a motion is not counted: all is drawn anew.
            (self.since, self.frames) = (Instant::now(), vec![]);
        }
        if let (Some(eye), true) = (self.eye((now - self.since).as_secs_f32()), self.opened.is_some()) {
            self.app.eye = eye;
        }
        self.app.draw(ui);
        ui.ctx().request_repaint();
    }
}
