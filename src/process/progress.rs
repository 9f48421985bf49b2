//! Reports progress: a live line on a terminal, else a plain line every few seconds, on stderr or in the log.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};

use crate::process::message::{detail, has_log, note};

const LINE_INTERVAL: Duration = Duration::from_secs(5);
const BAR_INTERVAL: Duration = Duration::from_millis(100);

/// Shows how far a command is.
pub struct Progress {
    name: &'static str,
    started: Instant,
    shown: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Starts the clock of the command `name`.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        let bar = (std::io::stderr().is_terminal() && !has_log()).then(|| {
            let style = ProgressStyle::with_template("{spinner} {prefix}: {msg}").expect("a constant");
            ProgressBar::new_spinner().with_style(style).with_prefix(name).with_finish(ProgressFinish::AndClear)
        });
        let now = Instant::now();
        Self { name, started: now, shown: now, bar }
    }

    /// Seconds since the start.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Call after each piece of work. `words` is called only when a message is due.
    pub fn update(&mut self, words: impl FnOnce() -> String) {
        let interval = if self.bar.is_some() { BAR_INTERVAL } else { LINE_INTERVAL };
        if self.shown.elapsed() < interval {
            return;
        }
        self.shown = Instant::now();
        match &self.bar {
            Some(bar) => {
                bar.set_message(words());
                bar.tick();
            }
            None => detail(self.name, &words()),
        }
    }

    /// Prints a line that stays.
    pub fn note(&self, words: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| note(self.name, words)),
            None => note(self.name, words),
        }
    }

    /// Prints a line that stays, in the log only if there is one.
    pub fn detail(&self, words: &str) {
        match &self.bar {
            Some(_) => self.note(words),
            None => detail(self.name, words),
        }
    }
}
