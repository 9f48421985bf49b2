//! A few lines at the bottom of a terminal that are drawn anew in place, with messages above them.

use std::io::{IsTerminal, stderr, stdout};
use std::time::Duration;

use console::{Term, measure_text_width, truncate_str};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};

use super::message::note;

/// How often the spinner turns, which shows that the command is alive.
const TICK: Duration = Duration::from_millis(120);

/// Heights of the columns of a sparkline, the lowest first.
const COLUMNS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Lines that stay at the bottom of the terminal until they are dropped.
pub struct Panel {
    name: &'static str,
    bar: ProgressBar,
}

impl Panel {
    /// A panel of the command `name`. `None` where stderr is no terminal that can draw one, or stdout is one: lines of data would run
    /// through it.
    #[must_use]
    pub fn open(name: &'static str) -> Option<Self> {
        let is_able = std::env::var_os("TERM").is_some_and(|term| term != "dumb");
        if !stderr().is_terminal() || stdout().is_terminal() || !is_able {
            return None;
        }
        let style = ProgressStyle::with_template("{spinner} {msg}").expect("a constant");
        let target = ProgressDrawTarget::term(Term::stderr(), 10);
        let bar = ProgressBar::with_draw_target(None, target).with_style(style).with_finish(ProgressFinish::AndClear);
        bar.enable_steady_tick(TICK);
        Some(Self { name, bar })
    }

    /// Columns that a line has room for, beside the spinner.
    #[must_use]
    pub fn width(&self) -> usize {
        usize::from(Term::stderr().size_checked().map_or(80, |(_, columns)| columns)).saturating_sub(3)
    }

    /// Shows these lines in the place of those before; what does not fit is cut off.
    pub fn show(&self, lines: &[String]) {
        let width = self.width();
        let cut: Vec<_> = lines.iter().map(|line| truncate_str(line, width, "")).collect();
        self.bar.set_message(cut.join("\n  "));
    }

    /// Prints a line above the panel.
    pub fn note(&self, words: &str) {
        self.bar.suspend(|| note(self.name, words));
    }
}

/// The newest `columns` values as a row of small columns, from the smallest to the largest of them; of a constant, all are low.
#[must_use]
pub fn sparkline(values: &[f64], columns: usize) -> String {
    let newest = &values[values.len().saturating_sub(columns)..];
    let low = newest.iter().copied().fold(f64::INFINITY, f64::min);
    let high = newest.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let top = (COLUMNS.len() - 1) as f64;
    let height = |value: &f64| if high > low { ((value - low) / (high - low) * top).round() as usize } else { 0 };
    newest.iter().map(|value| COLUMNS[height(value)]).collect()
}

/// A text filled up with spaces to so many columns.
#[must_use]
pub fn padded(text: &str, columns: usize) -> String {
    text.to_owned() + &" ".repeat(columns.saturating_sub(measure_text_width(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sparkline_spans_the_newest_values() {
        assert_eq!(sparkline(&[0.0, 1.0, 2.0, 3.0, 7.0], 8), "▁▂▃▄█");
        assert_eq!(sparkline(&[100.0, 0.0, 1.0], 2), "▁█");
        assert_eq!(sparkline(&[2.0, 2.0], 8), "▁▁");
        assert_eq!(sparkline(&[], 8), "");
    }

    #[test]
    fn a_text_is_filled_up_by_its_width_and_not_by_its_bytes() {
        assert_eq!(padded("▁é", 4), "▁é  ");
        assert_eq!(padded("long", 2), "long");
    }
}
