//! Tells how far a command is: a moving line on a terminal, else a plain line each few seconds, on stderr or in the log.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};

use crate::process::command::{detail, has_log, note};

const LINE_INTERVAL: Duration = Duration::from_secs(5);
const BAR_INTERVAL: Duration = Duration::from_millis(100);

/// Reports of work under way.
pub struct Progress {
    name: &'static str,
    started: Instant,
    said: Instant,
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
        Self { name, started: now, said: now, bar }
    }

    /// Seconds since the start.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// After each piece of work; asks for the words only when it is time to say something.
    pub fn tell(&mut self, words: impl FnOnce() -> String) {
        let interval = if self.bar.is_some() { BAR_INTERVAL } else { LINE_INTERVAL };
        if self.said.elapsed() < interval {
            return;
        }
        self.said = Instant::now();
        match &self.bar {
            Some(bar) => {
                bar.set_message(words());
                bar.tick();
            }
            None => detail(self.name, &words()),
        }
    }

    /// A line that stays.
    pub fn note(&self, words: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| note(self.name, words)),
            None => note(self.name, words),
        }
    }

    /// The same, but in the log alone where there is one.
    pub fn detail(&self, words: &str) {
        match &self.bar {
            Some(_) => self.note(words),
            None => detail(self.name, words),
        }
    }
}
