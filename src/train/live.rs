//! Shows how far a run is: a small panel on a terminal, else a line each tenth step.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use console::style;

use crate::grpo::metrics::Metrics;
use crate::process::panel::{Panel, padded, sparkline};
use crate::process::stopwatch::Stopwatch;
use crate::run::{HELD_OUT, Run};
use crate::train::COMMAND;
use crate::train::step_line::StepLines;

/// Steps whose mean duration tells the time that is left.
const RECENT: usize = 20;

/// Values that are kept for a sparkline.
const KEPT: usize = 64;

/// Columns of the name and of the value before a sparkline.
const NAME: usize = 16;
const VALUE: usize = 9;

/// Columns of the bar.
const BAR: usize = 24;

/// Metrics with a line of their own after the rewards, and their names there.
const SHOWN: [(&str, &str); 4] =
    [(HELD_OUT, "held-out"), ("kl", "KL"), ("entropy", "entropy"), ("completions/mean_length", "length")];

/// Tells how far the run is.
pub struct Live {
    lines: StepLines,
    newest: Option<String>,
    panel: Option<(Panel, Course)>,
}

impl Live {
    /// Starts the clock. `total` are the steps of the whole run, where they are known; `run` may have been evaluated already.
    #[must_use]
    pub fn new(total: Option<u64>, run: &Run) -> Self {
        let held_out = || run.held_out().into_iter().map(|(_, accuracy)| accuracy).collect();
        let panel = Panel::open(COMMAND).map(|panel| (panel, Course::new(total, held_out())));
        let live = Self { lines: StepLines::new(total), newest: None, panel };
        if let Some((panel, _)) = &live.panel {
            panel.show(&["waiting for the first step".into()]);
        }
        live
    }

    /// Prints a message; it stays above the panel.
    pub fn say(&self, words: &str, say: &dyn Fn(&str)) {
        match &self.panel {
            Some((panel, _)) => panel.note(words),
            None => say(words),
        }
    }

    /// Notes a line of metrics.
    pub fn see(&mut self, line: &Metrics) {
        self.newest = self.lines.of(line);
        if let Some((_, course)) = &mut self.panel {
            course.see(line);
        }
    }

    /// Shows a step that was finished.
    pub fn show(&mut self, stopwatch: &Stopwatch, say: &dyn Fn(&str)) {
        match &mut self.panel {
            Some((panel, course)) => {
                course.end_step();
                panel.show(&course.lines(panel.width(), stopwatch));
            }
            None => self.newest.iter().for_each(|words| say(words)),
        }
    }

    /// Takes the panel away, and leaves the newest numbers as a line.
    pub fn finish(self, say: &dyn Fn(&str)) {
        let Some((panel, course)) = self.panel else { return };
        drop(panel);
        course.newest.iter().for_each(|line| say(&self.lines.always(line)));
    }
}

/// The course of the numbers that the panel shows.
struct Course {
    total: Option<u64>,
    newest: Option<Metrics>,
    /// By name as in the metrics: the newest values.
    values: Vec<(String, Vec<f64>)>,
    /// When the last steps ended, and how many tokens had been trained on.
    ends: VecDeque<(Instant, f64)>,
}

impl Course {
    fn new(total: Option<u64>, held_out: Vec<f64>) -> Self {
        let values = if held_out.is_empty() { Vec::new() } else { vec![(HELD_OUT.to_owned(), held_out)] };
        Self { total, newest: None, values, ends: VecDeque::new() }
    }

    fn see(&mut self, line: &Metrics) {
        let parts = line.names().filter(|name| is_part(name));
        let names = ["reward"].into_iter().chain(parts).chain(SHOWN.iter().map(|(name, _)| *name));
        for name in names {
            let Some(value) = line.get(name) else { continue };
            match self.values.iter_mut().find(|(other, _)| other == name) {
                Some((_, values)) => {
                    values.push(value);
                    values.drain(..values.len().saturating_sub(KEPT));
                }
                None => self.values.push((name.to_owned(), vec![value])),
            }
        }
        self.newest = Some(line.clone());
    }

    fn end_step(&mut self) {
        let tokens = self.newest.as_ref().and_then(|line| line.get("num_tokens")).unwrap_or_default();
        self.ends.push_back((Instant::now(), tokens));
        if self.ends.len() > RECENT + 1 {
            self.ends.pop_front();
        }
    }

    /// Seconds per step, and tokens per second, over the last steps; `None` before the second.
    fn speed(&self) -> Option<(f64, f64)> {
        let ((began, before), (ended, after)) = (self.ends.front()?, self.ends.back()?);
        let (steps, seconds) = ((self.ends.len() - 1) as f64, ended.duration_since(*began).as_secs_f64());
        (steps > 0.0 && seconds > 0.0).then(|| (seconds / steps, (after - before) / seconds))
    }

    fn lines(&self, width: usize, stopwatch: &Stopwatch) -> Vec<String> {
        let mut lines = vec![self.head(width)];
        let columns = width.saturating_sub(NAME + VALUE + 2).min(KEPT);
        for (name, values) in &self.values {
            let short = name.strip_prefix("rewards/").and_then(|name| name.strip_suffix("/mean"));
            let short = short.map(|part| format!("  {part}"));
            let shown = SHOWN.iter().find(|(other, _)| other == name).map(|(_, shown)| (*shown).to_owned());
            let name = short.or(shown).unwrap_or_else(|| name.clone());
            let name: String = name.chars().take(NAME - 1).collect();
            let value = values.last().map_or(String::new(), |value| format!("{value:.3}"));
            let line = style(sparkline(values, columns)).for_stderr().cyan();
            lines.push(format!("{}{value:>VALUE$}  {line}", padded(&name, NAME)));
        }
        let speed = self.speed().map(|(_, tokens)| format!("{tokens:.0} tokens/s"));
        let mut shares = stopwatch.shares();
        if !shares.is_empty() {
            let rest = 1.0 - shares.iter().map(|(_, share)| share).sum::<f64>();
            shares.push(("waiting for samples", rest.max(0.0)));
        }
        let shares = shares.into_iter().map(|(part, share)| format!("{part} {:.0} %", 100.0 * share));
        let foot: Vec<String> = speed.into_iter().chain(shares).collect();
        if !foot.is_empty() {
            lines.push(style(foot.join("  ")).for_stderr().dim().to_string());
        }
        lines
    }

    fn head(&self, width: usize) -> String {
        let step = self.newest.as_ref().and_then(|line| line.get("policy_step")).unwrap_or_default() as u64;
        let Some(total) = self.total else { return format!("step {step}") };
        let done = (step as f64 / total.max(1) as f64).min(1.0);
        let left = self.speed().map(|(seconds, _)| {
            let left = Duration::from_secs_f64(seconds * total.saturating_sub(step) as f64);
            format!("  {} left, {seconds:.1} s per step", clock(left))
        });
        let (head, left) = (format!("step {step}/{total}  "), left.unwrap_or_default());
        let room = width.saturating_sub(head.len() + left.len()).min(BAR);
        let full = (done * room as f64).round() as usize;
        let (full, rest) = ("━".repeat(full), "━".repeat(room - full));
        format!("{head}{}{}{left}", style(full).for_stderr().green(), style(rest).for_stderr().dim())
    }
}

fn is_part(name: &str) -> bool {
    name.starts_with("rewards/") && name.ends_with("/mean")
}

/// Hours, minutes and seconds.
fn clock(time: Duration) -> String {
    let (seconds, minutes, hours) = (time.as_secs() % 60, time.as_secs() / 60 % 60, time.as_secs() / 3600);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn course(steps: u64) -> Course {
        let mut course = Course::new(Some(100), vec![0.25, 0.5]);
        for step in 1..=steps {
            let mut line = Metrics::default();
            line.count("policy_step", step);
            line.count("num_tokens", 1000 * step);
            line.real("reward", step as f64);
            line.real("rewards/correctness/mean", 2.0);
            line.real("rewards/correctness/std", 2.0);
            line.real("entropy", 1.0 / step as f64);
            course.see(&line);
            course.end_step();
        }
        course
    }

    fn plain(lines: &[String]) -> Vec<String> {
        lines.iter().map(|line| console::strip_ansi_codes(line).into_owned()).collect()
    }

    #[test]
    fn the_panel_has_a_line_per_number_with_its_course() {
        let lines = plain(&course(8).lines(77, &Stopwatch::new(["training"])));
        assert!(lines[0].starts_with("step 8/100  ━━━━━━") && lines[0].contains(" left, "), "{lines:?}");
        assert_eq!(lines[1], "held-out            0.500  ▁█");
        assert_eq!(lines[2], "reward              8.000  ▁▂▃▄▅▆▇█");
        assert_eq!(lines[3], "  correctness       2.000  ▁▁▁▁▁▁▁▁");
        assert!(lines[4].starts_with("entropy             0.125  █"), "{lines:?}");
        assert!(lines[5].ends_with(" tokens/s") && lines.len() == 6, "{lines:?}");
    }

    #[test]
    fn a_long_run_keeps_the_newest_values() {
        let course = course(200);
        assert!(course.values[1..].iter().all(|(_, values)| values.len() == KEPT) && course.ends.len() == RECENT + 1);
        let lines = plain(&course.lines(40, &Stopwatch::new(["training"])));
        assert!(lines[1].chars().count() <= 40, "{lines:?}");
    }

    #[test]
    fn time_is_hours_minutes_and_seconds() {
        assert_eq!([5, 65, 3723].map(|seconds| clock(Duration::from_secs(seconds))), ["0:05", "1:05", "1:02:03"]);
    }
}
