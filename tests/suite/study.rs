//! What is measured of runs: an export of one, one under way, and many variants of one.

use std::fs;

use serde_json::Value;

use crate::runs::{Root, text};

fn json(root: &Root, name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(root.path(name)).unwrap()).unwrap()
}

#[test]
fn evaluations_on_the_way_change_nothing_of_a_run_and_its_export_evaluates_as_it_did() {
    let (whole, watched) = (Root::new(&[]), Root::new(&[("EVALUATE_EVERY", "2")]));
    whole.train_whole();
    let mut run = watched.start();
    run.wait_for(&watched.run("eval/step_000002.greedy.jsonl.zst"));
    run.kill_all();
    watched.train_whole();
    for step in [2, 4] {
        let summary = json(&watched, &format!("runs/run/eval/step_{step:06}.greedy.json"));
        assert_eq!((&summary["policy_step"], &summary["num_prompts"]), (&step.into(), &12.into()));
    }
    let mut files = [&whole, &watched].map(Root::files);
    let is_card = |name: &str| name.ends_with("/README.md"); // it has the recipe
    for files in &mut files {
        files.retain(|name, _| !name.contains("/eval/step_") && !name.ends_with("/recipe.env") && !is_card(name));
    }
    let different: Vec<&String> = files[0].keys().filter(|name| files[1].get(*name) != files[0].get(*name)).collect();
    assert!(files[0].len() > 20 && files[0].len() == files[1].len() && different.is_empty(), "{different:?}");

    let evaluate = |more: &[(&str, &str)]| {
        let mut script = whole.script("evaluate.sh", more);
        for number in ["RECIPE", "NAME", "TEST_PROMPTS", "TEST_SAMPLES"] {
            script.env_remove(number); // they are the run's
        }
        script.output().unwrap()
    };
    let done = evaluate(&[("MODEL", "runs/run/export")]);
    let table = text(&done.stdout);
    assert!(done.status.success(), "{}", text(&done.stderr));
    for line in
        ["prompts                   12\n", "accuracy, strict ", "accuracy, math ", "pass@2 ", "maj@2 ", "truncated "]
    {
        assert!(table.contains(line), "{line}: {table}");
    }
    // What is sampled depends on the step that a policy has reached, and an export has none.
    let of = |name: &str| {
        let mut summary = json(&whole, &format!("runs/{name}.greedy.json"));
        let summary = summary.as_object_mut().unwrap();
        summary.remove("policy_id");
        summary.remove("policy_step");
        Value::Object(summary.clone())
    };
    assert_eq!(of("evaluate-runs-run-export/eval/model"), of("run/eval/after"));
    assert_eq!(text(&evaluate(&[("MODEL", "runs/run/export")]).stdout), table);
    let done = evaluate(&[]);
    assert_eq!(done.status.code(), Some(2));
    assert!(text(&done.stderr).contains("usage: make evaluate MODEL="), "{}", text(&done.stderr));
}

#[test]
fn a_study_ranks_variants_that_began_alike_and_goes_on_where_it_stopped() {
    let numbers = [("NAME", "study"), ("STEPS", "2"), ("SEEDS", "1 2"), ("JOBS", "2"), ("VARIANTS", VARIANTS)];
    let root = Root::new(&numbers);
    let study = |kind: &str, more: &[(&str, &str)]| {
        let mut shell = root.shell(&format!("bash pipelines/bench/study.sh {kind}"));
        let done = shell.envs(more.iter().copied()).output().unwrap();
        assert!(done.status.success(), "{}", text(&done.stderr));
        (text(&done.stdout), text(&done.stderr))
    };
    let (table, said) = study("study", &[]);
    assert_eq!(said.lines().filter(|line| line.starts_with("runs/study/")).count(), 6, "{said}");
    let rows = |name: &str| table.lines().filter(|line| line.starts_with(name)).collect::<Vec<_>>();
    for name in ["baseline ", "few ", "placebo "] {
        let found = rows(name);
        assert!(found.len() == 1 && found[0].matches(" +- ").count() >= 3, "{table}");
    }
    let of = |run: &str, file: &str| fs::read(root.path(&format!("runs/study/{run}/{file}"))).unwrap();
    for seed in 1..=2 {
        let [one, other] = ["baseline", "few"].map(|name| format!("{name}-{seed}"));
        let start = "checkpoints/step_000000/model.safetensors";
        assert_eq!(of(&one, start), of(&other, start));
        assert_ne!(of(&one, "export/model.safetensors"), of(&other, "export/model.safetensors"));
    }
    let recipe = String::from_utf8(of("placebo-2", "recipe.env")).unwrap();
    assert!(recipe.contains("\nSCORER=score --placebo 1\n") && recipe.contains("\nSEED=2\n"), "{recipe}");

    let damaged = root.path("runs/study/few-2/eval/after.sampled.json");
    fs::remove_file(&damaged).unwrap();
    let (again, said) = study("study", &[]);
    assert_eq!(again, table);
    assert_eq!(said.lines().collect::<Vec<_>>(), ["runs/study/few-2: NUM_GENERATIONS=2"]);

    let sweep = [("NAME", "study"), ("SEEDS", "1"), ("GRID", "BETA=0,0.04 EPSILON=0.1")];
    let (table, _) = study("sweep", &sweep);
    let mut names: Vec<&str> = table.lines().skip(2).map(|line| line.split(' ').next().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["BETA=0+EPSILON=0.1", "BETA=0.04+EPSILON=0.1", "baseline"], "{table}");
}

const VARIANTS: &str = "few|NUM_GENERATIONS=2\nplacebo|SCORER=score --placebo 1";
