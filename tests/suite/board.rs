//! What a run's events are to TensorBoard, read back by its own Python package where that is installed.

use std::fs;
use std::process::Command;

use serde_json::Value;

use crate::runs::{Root, text};

/// Prints each tag with its points.
const READ: &str = "
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], size_guidance={'scalars': 0, 'tensors': 0})
events.Reload()
print(json.dumps({tag: [[one.step, one.value, one.wall_time] for one in events.Scalars(tag)] for tag in events.Tags()['scalars']}))
";

#[test]
fn tensorboard_reads_each_step_of_a_resumed_run_once() {
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let has = Command::new(&python).args(["-c", "import tensorboard"]).output();
    if !has.is_ok_and(|done| done.status.success()) {
        return eprintln!("skipped: {python} has no package tensorboard");
    }
    let root = Root::new(&[("STEPS", "6")]);
    root.train_whole();
    let resumed = root.back_to(2);
    let old = fs::read(resumed.run("tensorboard/events.out.tfevents")).unwrap();
    resumed.train_whole();
    let new = fs::read(resumed.run("tensorboard/events.out.tfevents")).unwrap();
    assert!(old != new && old[..200] == new[..200], "steps 3 to 6 were made again, and those before kept");

    let done = Command::new(&python).args(["-c", READ]).arg(resumed.run("tensorboard")).output().unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
    let found: Value = serde_json::from_slice(&done.stdout).unwrap();
    let metrics = fs::read_to_string(resumed.run("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (name, _) in lines[0].as_object().unwrap().iter().filter(|(name, value)| *name != "step" && value.is_number()) {
        let points = found[format!("train/{name}")].as_array().unwrap_or_else(|| panic!("no {name}: {found}"));
        assert_eq!(points.len(), 6, "{name}: {points:?}");
        for (point, line) in points.iter().zip(&lines) {
            let (got, want) = (point[1].as_f64().unwrap(), line[name].as_f64().unwrap());
            assert!(point[0] == line["step"] && (got - want).abs() <= 1e-6 * want.abs(), "{name}: {point} {line}");
        }
        assert!(points[0][2].as_f64() > Some(1.7e9), "the time of a clock");
    }
}
