//! The evaluations of a run so far, as a course over its steps.

use std::fs;

use serde_json::Value;

use super::Run;

/// What the course is called beside a run's metrics.
pub const HELD_OUT: &str = "held_out_accuracy";

impl Run {
    /// The steps at which held-out problems were sampled, in ascending order, each with the strict accuracy. Files that are not what
    /// `evaluate --json` writes of one policy's completions are left out.
    #[must_use]
    pub fn held_out(&self) -> Vec<(u64, f64)> {
        let files = fs::read_dir(self.evaluations()).into_iter().flatten().flatten().map(|file| file.path());
        let sampled = files.filter(|path| path.to_string_lossy().ends_with(".sampled.json"));
        let read = |path| {
            let summary: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
            Some((summary["policy_step"].as_u64()?, summary["accuracy_strict"]["value"].as_f64()?))
        };
        let mut course: Vec<(u64, f64)> = sampled.filter_map(read).collect();
        course.sort_by_key(|(step, _)| *step);
        course
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_course_has_the_sampled_evaluations_in_the_order_of_their_steps() {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::new(dir.path());
        assert_eq!(run.held_out(), []);
        fs::create_dir(run.evaluations()).unwrap();
        let files = [
            ("after.sampled.json", r#"{"policy_step": 150, "accuracy_strict": {"value": 0.75}}"#),
            ("before.sampled.json", r#"{"policy_step": 0, "accuracy_strict": {"value": 0.5}}"#),
            ("before.greedy.json", r#"{"policy_step": 0, "accuracy_strict": {"value": 0.9}}"#),
            ("step_000020.sampled.json", r#"{"policy_step": 20, "accuracy_strict": {"value": 0.25}}"#),
            ("step_000040.sampled.json", r#"{"policy_step": "mixed", "accuracy_strict": null}"#),
            ("step_000060.sampled.json", "{"),
        ];
        files.iter().for_each(|(name, text)| fs::write(run.evaluations().join(name), text).unwrap());
        assert_eq!(run.held_out(), [(0, 0.5), (20, 0.25), (150, 0.75)]);
    }
}
