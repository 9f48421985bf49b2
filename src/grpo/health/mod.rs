//! Detects why a run learns nothing though its numbers are finite, and names the cause in the metrics and in one line to the user.
//!
//! A cause depends on a step's groups and metrics, and on the metrics of the steps before it, which a run keeps in its directory: a
//! run that was killed names the same causes when it resumes.

mod cause;

use crate::error::{Error, Result};
use crate::grpo::completion::ScoredCompletion;
use crate::grpo::groups::Group;
use crate::grpo::metrics::Metrics;
use crate::lines::record::Line;

pub use cause::Cause;

/// Consecutive steps without any learning signal that are a cause; in a single step all rewards may agree by chance.
const SILENT_STEPS: usize = 5;

/// The fewest steps at each end of the run that are compared, because the mean of a single step is noisy.
const WINDOW: usize = 10;

/// Fraction of the initial entropy below which it counts as collapsed: the policy hardly explores any more, and reward stops rising
/// (Cui et al. 2025, <https://arxiv.org/abs/2505.22617>). The recipe `tiny`, which learns, keeps a third.
const COLLAPSED: f32 = 0.05;

/// Fraction of the band above which the difference between sampler and trainer is a cause: a later step may be refused.
const NEAR_THE_BAND: f64 = 0.5;

/// Smallest rise of the rewards for format, each at most 0.5, that counts: a tenth more of the completions are in format.
const FORMAT_RISE: f32 = 0.05;

/// Correctness, at most 2, that needs no further rise.
const CORRECT_ENOUGH: f32 = 1.8;

/// Means differ if they are this many standard errors apart.
const STANDARD_ERRORS: f32 = 2.0;

/// Steps after which a cause is reported again.
const TOLD_AGAIN: u64 = 100;

/// The metric that names the cause.
pub const METRIC: &str = "health";

/// Judges the steps of a run, or of a single call.
pub struct Health {
    /// How far sampler and trainer may differ (nats).
    band: f64,
    /// The steps of the run so far. `None` without a run, where each step is judged by itself, so that one call of many steps reports
    /// the same as many calls of one.
    past: Option<Vec<Seen>>,
    /// Causes found since the last report, with their steps.
    found: Vec<(Cause, u64)>,
    /// The step at which each cause was last reported.
    told: [Option<u64>; Cause::COUNT],
}

/// The metrics of a step that are compared with other steps, in f32 as in the file of metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Seen {
    step: u64,
    entropy: Option<f32>,
    silent: bool,
    format: Option<f32>,
    correctness: Option<f32>,
}

impl Health {
    /// Judges each step by itself. `band` is how far log-probabilities of sampler and trainer may differ (nats).
    #[must_use]
    pub fn of_steps(band: f64) -> Self {
        Self { band, past: None, found: Vec::new(), told: [None; Cause::COUNT] }
    }

    /// Judges a step together with the steps before it in its run, whose metrics are read from `past`.
    ///
    /// # Errors
    /// Those of `past`, [`Error::Record`] when a line is damaged.
    pub fn of_run(band: f64, metrics: impl Iterator<Item = Result<Line>>) -> Result<Self> {
        let mut past = Vec::new();
        for line in metrics {
            let line = line?;
            let record = line.record()?;
            let step = record.get("policy_step")?;
            remember(&mut past, Seen::of(step, &|name| record.get_optional(name))?);
        }
        Ok(Self { past: Some(past), ..Self::of_steps(band) })
    }

    /// Adds the name of the cause to a line of metrics, if there is one. [`Health::tell`] reports it.
    #[must_use]
    pub fn mark(&mut self, line: &Metrics, groups: &[Group]) -> Metrics {
        let step = line.get("policy_step").unwrap_or_default() as u64;
        let get = |name: &str| Ok::<_, Error>(line.get(name).map(|number| number as f32).filter(|x| x.is_finite()));
        let seen = Seen::of(step, &get).expect("reading from memory cannot fail");
        let mut line = line.clone();
        if let Some(cause) = self.judge(&line, groups, seen) {
            line.word(METRIC, cause.name());
            self.found.push((cause, step));
        }
        line
    }

    /// Reports the causes found, except those reported recently.
    pub fn tell(&mut self, say: &dyn Fn(&str)) {
        for (cause, step) in self.found.drain(..) {
            let told = &mut self.told[cause as usize];
            if told.is_none_or(|told| step >= told + TOLD_AGAIN) {
                say(&format!("step {step}: {METRIC}: {}: {}", cause.name(), cause.advice()));
                *told = Some(step);
            }
        }
    }

    fn judge(&mut self, line: &Metrics, groups: &[Group], seen: Seen) -> Option<Cause> {
        let all = |holds: fn(&ScoredCompletion) -> bool| groups.iter().flat_map(|group| &group.completions).all(holds);
        let (silent, past): (_, &[Seen]) = match &mut self.past {
            None => (seen.silent, &[]),
            Some(past) => {
                remember(past, seen);
                let last = past.len().checked_sub(SILENT_STEPS).map(|from| &past[from..]);
                (last.is_some_and(|last| last.iter().all(|seen| seen.silent)), past)
            }
        };
        let difference = line.get("sampling/sampling_logp_difference/mean").unwrap_or_default();
        let causes = [
            (all(|one| one.reward.is_none()), Cause::RewardNull),
            (all(|one| one.truncated), Cause::AllTruncated),
            (has_collapsed(past), Cause::EntropyCollapse),
            (silent, Cause::NoSignal),
            (difference > NEAR_THE_BAND * self.band, Cause::SamplerMismatch),
            (learns_format_only(past), Cause::FormatOnly),
        ];
        causes.into_iter().find_map(|(holds, cause)| holds.then_some(cause))
    }
}

impl Seen {
    fn of(step: u64, get: &dyn Fn(&str) -> Result<Option<f32>>) -> Result<Self> {
        let mut formats = Vec::new();
        for name in ["strict_format", "soft_format", "xmlcount"] {
            formats.extend(get(&format!("rewards/{name}/mean"))?);
        }
        Ok(Self {
            step,
            entropy: get("entropy")?,
            silent: get("frac_reward_zero_std")? == Some(1.0),
            format: (!formats.is_empty()).then(|| formats.iter().sum::<f32>() / formats.len() as f32),
            correctness: get("rewards/correctness/mean")?,
        })
    }
}

/// Adds a step; of several updates on one batch, the first.
fn remember(past: &mut Vec<Seen>, seen: Seen) {
    if past.last().is_none_or(|last| last.step != seen.step) {
        past.push(seen);
    }
}

/// Compares the mean entropy of the last steps with that of the first.
fn has_collapsed(past: &[Seen]) -> bool {
    let Some((first, last)) = ends(past, WINDOW, |seen| seen.entropy) else { return false };
    first.mean > 0.0 && last.mean < COLLAPSED * first.mean
}

/// Compares the last quarter of the run's steps with the first: the longer the run, the smaller the difference that can be told from
/// noise.
fn learns_format_only(past: &[Seen]) -> bool {
    let window = past.len() / 4;
    if window < WINDOW {
        return false;
    }
    let ends = (ends(past, window, |seen| seen.format), ends(past, window, |seen| seen.correctness));
    let (Some((format_before, format)), Some((before, now))) = ends else { return false };
    let chance = STANDARD_ERRORS * (before.error_squared + now.error_squared).sqrt();
    format.mean - format_before.mean >= FORMAT_RISE && now.mean < CORRECT_ENOUGH && now.mean - before.mean <= chance
}

/// The mean over some steps, and the square of its standard error.
struct Window {
    mean: f32,
    error_squared: f32,
}

/// The first and the last `window` steps; `None` when they overlap or one lacks the number.
fn ends(past: &[Seen], window: usize, of: fn(&Seen) -> Option<f32>) -> Option<(Window, Window)> {
    if past.len() < 2 * window {
        return None;
    }
    Some((Window::of(&past[..window], of)?, Window::of(&past[past.len() - window..], of)?))
}

impl Window {
    fn of(steps: &[Seen], of: fn(&Seen) -> Option<f32>) -> Option<Self> {
        let numbers: Vec<f32> = steps.iter().map(of).collect::<Option<_>>()?;
        let count = numbers.len() as f32;
        let mean = numbers.iter().sum::<f32>() / count;
        let squares: f32 = numbers.iter().map(|number| (number - mean).powi(2)).sum();
        Some(Self { mean, error_squared: squares / (count - 1.0) / count })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpo::groups::Groups;
    use crate::grpo::limits::SequenceLimits;
    use crate::lines::jsonl::Input;

    fn line(step: u64, numbers: &[(&str, f64)]) -> Metrics {
        let mut line = Metrics::default();
        line.count("policy_step", step);
        numbers.iter().for_each(|(name, number)| line.real(name, *number));
        line
    }

    /// A group without a cause.
    fn sound() -> Vec<Group> {
        let text = |sample| {
            format!(
                r#"{{"group_id":"a","group_size":2,"sample_index":{sample},"prompt_token_ids":[1],"completion_token_ids":[2],
                "logprobs":[-1],"finish_reason":"stop","reward":{sample}}}"#
            )
        };
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let lines: String = (0..2).map(|sample| text(sample).replace('\n', " ") + "\n").collect();
        std::io::Write::write_all(&mut file, lines.as_bytes()).unwrap();
        let limits = SequenceLimits { vocab_size: 50, positions: 16 };
        Groups::new(Input::open(file.path()).unwrap(), limits).collect::<Result<_>>().unwrap()
    }

    fn named(line: &Metrics) -> Option<String> {
        let json: serde_json::Value = serde_json::from_slice(&line.to_json()).unwrap();
        json.get(METRIC).map(|name| name.as_str().unwrap().to_owned())
    }

    /// The cause at each of a run's steps, the run killed and started again before each of them.
    fn course(steps: usize, numbers: impl Fn(f64) -> Vec<(&'static str, f64)>) -> Vec<Option<String>> {
        let (dir, groups) = (tempfile::tempdir().unwrap(), sound());
        let path = dir.path().join("metrics.jsonl");
        let mut uninterrupted = Health::of_run(0.05, std::iter::empty()).unwrap();
        std::fs::write(&path, "").unwrap();
        let mut text = Vec::new();
        let mut step = |step: usize| {
            let line = line(step as u64, &numbers(step as f64));
            let marked = Health::of_run(0.05, Input::open(&path).unwrap()).unwrap().mark(&line, &groups);
            assert_eq!(marked, uninterrupted.mark(&line, &groups));
            text.extend_from_slice(&[&marked.to_json()[..], b"\n"].concat());
            std::fs::write(&path, &text).unwrap();
            named(&marked)
        };
        (1..=steps).map(&mut step).collect()
    }

    /// The first step with a cause, and the last one's cause.
    fn first_and_last(
        steps: usize,
        numbers: impl Fn(f64) -> Vec<(&'static str, f64)>,
    ) -> (Option<usize>, Option<String>) {
        let course = course(steps, numbers);
        (course.iter().position(Option::is_some).map(|at| at + 1), course.last().cloned().flatten())
    }

    #[test]
    fn entropy_has_collapsed_when_a_twentieth_of_it_is_left() {
        let falls = |to: f64| move |step: f64| vec![("entropy", if step < 15.0 { 0.4 } else { to })];
        assert_eq!(first_and_last(40, falls(0.019)), (Some(24), Some("entropy_collapse".into())));
        assert_eq!(first_and_last(40, falls(0.021)), (None, None));
        assert_eq!(first_and_last(40, |_| vec![("entropy", 0.0)]), (None, None), "nothing has fallen");
    }

    #[test]
    fn one_silent_step_is_chance_and_five_are_not() {
        let silent_from = |from: f64| {
            move |step: f64| vec![("frac_reward_zero_std", if step >= from || step == 2.0 { 1.0 } else { 0.9 })]
        };
        assert_eq!(first_and_last(12, silent_from(6.0)), (Some(10), Some("no_signal".into())));
        assert_eq!(first_and_last(9, silent_from(6.0)), (None, None));
        let line = line(1, &[("frac_reward_zero_std", 1.0)]);
        let marked = Health::of_steps(0.05).mark(&line, &sound());
        assert_eq!(named(&marked).as_deref(), Some("no_signal"), "a call that knows no run has one step to tell of");
    }

    #[test]
    fn format_that_rises_alone_is_told_from_chance() {
        let scatter = |step: f64| 0.2 * (step * 2.1).sin();
        let course = |format: f64, correct: f64, start: f64| {
            move |step: f64| {
                let done = (step / 60.0).min(1.0);
                vec![
                    ("rewards/strict_format/mean", 0.1 + format * done),
                    ("rewards/correctness/mean", start + correct * done + scatter(step)),
                ]
            }
        };
        assert_eq!(first_and_last(80, course(0.3, 0.0, 0.5)).1.as_deref(), Some("format_only"));
        assert_eq!(first_and_last(80, course(0.3, 0.8, 0.5)).1, None, "both rise");
        assert_eq!(first_and_last(80, course(0.03, 0.0, 0.5)).1, None, "neither rises");
        assert_eq!(first_and_last(80, course(0.3, 0.0, 1.9)).1, None, "nothing is missing in it");
        assert!(first_and_last(39, course(0.3, 0.0, 0.5)).0.is_none(), "too short a run to say");
    }

    #[test]
    fn a_cause_is_told_once_in_a_while() {
        let mut health = Health::of_steps(0.05);
        let (groups, told) = (sound(), std::cell::RefCell::new(Vec::new()));
        for step in 1..=250 {
            let difference = if step % 2 == 0 { 0.03 } else { 0.02 };
            let line = line(step, &[("sampling/sampling_logp_difference/mean", difference)]);
            assert_eq!(named(&health.mark(&line, &groups)).is_some(), step % 2 == 0);
            health.tell(&|words| told.borrow_mut().push(words.to_owned()));
        }
        let steps: Vec<_> = told.borrow().iter().map(|words| words.split(':').next().unwrap().to_owned()).collect();
        assert_eq!(steps, ["step 2", "step 102", "step 202"]);
        assert!(told.borrow()[0].starts_with("step 2: health: sampler_mismatch: "), "{:?}", told.borrow());
    }
}
