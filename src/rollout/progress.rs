//! How far the sampling is, on stderr: a moving line on a terminal, else a plain line each few seconds.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};

use crate::cli::note;
use crate::engine::Work;

const INTERVAL: Duration = Duration::from_secs(5);

/// Reports work done.
pub struct Progress {
    name: &'static str,
    started: Instant,
    said: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Starts the clock.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{spinner} {prefix}: {msg}").expect("a constant");
            ProgressBar::new_spinner().with_style(style).with_prefix(name).with_finish(ProgressFinish::AndClear)
        });
        let now = Instant::now();
        Self { name, started: now, said: now, bar }
    }

    /// After each step; says something only when it is time.
    pub fn step(&mut self, work: Work) {
        if let Some(bar) = &self.bar {
            if self.said.elapsed() >= INTERVAL / 50 {
                self.said = Instant::now();
                bar.set_message(self.line(work));
                bar.tick();
            }
        } else if self.said.elapsed() >= INTERVAL {
            self.said = Instant::now();
            note(self.name, &self.line(work));
        }
    }

    /// The last line.
    pub fn finish(&self, work: Work, skipped: usize) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if skipped > 0 {
            note(self.name, &format!("{skipped} prompts left out: too long"));
        }
        note(self.name, &self.line(work));
    }

    fn line(&self, work: Work) -> String {
        let seconds = self.started.elapsed().as_secs_f64();
        let rate = work.tokens as f64 / seconds.max(1e-9);
        format!("{} sequences, {} tokens, {seconds:.1} s, {rate:.0} tokens/s", work.sequences, work.tokens)
    }
}
