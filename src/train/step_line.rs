//! Tells how far a run is, in one line each tenth step.

use std::time::Instant;

use crate::grpo::metrics::Metrics;

/// Steps between two lines.
const EVERY: u64 = 10;

/// The numbers that a line has, where the metrics have them.
const SHOWN: [&str; 4] = ["reward", "kl", "entropy", "completions/mean_length"];

/// Makes the lines.
pub struct StepLines {
    began: Instant,
    total: Option<u64>,
}

impl StepLines {
    /// Starts the clock; `total` are the steps of the whole run, where they are known.
    #[must_use]
    pub fn new(total: Option<u64>) -> Self {
        Self { began: Instant::now(), total }
    }

    /// The line of a step, from its metrics; `None` for most steps.
    #[must_use]
    pub fn of(&self, metrics: &Metrics) -> Option<String> {
        let step = metrics.get("policy_step")? as u64;
        if !step.is_multiple_of(EVERY) && self.total != Some(step) {
            return None;
        }
        Some(self.always(metrics))
    }

    /// The line of any step.
    #[must_use]
    pub fn always(&self, metrics: &Metrics) -> String {
        let step = metrics.get("policy_step").unwrap_or_default() as u64;
        let total = self.total.map_or(String::new(), |total| format!("/{total}"));
        let number = |name: &&str| metrics.get(name).map(|value| format!("{name} {value:.3}  "));
        let numbers: String = SHOWN.iter().filter_map(number).collect();
        format!("step {step}{total}: {numbers}({} s)", self.began.elapsed().as_secs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_tenth_step_and_the_last_have_a_line() {
        let line = |total, step| {
            let mut metrics = Metrics::default();
            metrics.count("policy_step", step);
            metrics.real("reward", 0.12345);
            metrics.real("completions/mean_length", 20.0);
            StepLines::new(total).of(&metrics)
        };
        let want = "step 20/25: reward 0.123  completions/mean_length 20.000  (0 s)";
        assert_eq!(line(Some(25), 20).as_deref(), Some(want));
        assert!(line(Some(25), 25).is_some() && line(Some(25), 24).is_none());
        assert!(line(None, 30).is_some_and(|line| line.starts_with("step 30: ")));
    }
}
