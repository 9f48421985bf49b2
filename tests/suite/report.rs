//! The page that `evaluate --run` writes: its parts, what it escapes, and how a browser takes it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::fixtures::directory;
use crate::process::{Finished, run};

const EVALUATE: &str = env!("CARGO_BIN_EXE_evaluate");

/// What a hostile completion may hold.
const HOSTILE: &str =
    "</pre></script><script>alert('x')</script><img src=http://a.example/x onerror=y> & \"q\" {{ 7 * 7 }}";

/// A directory with runs.
struct Runs(TempDir);

impl Runs {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A run of so many steps whose reward rises to `top`.
    fn make(&self, name: &str, steps: u64, top: f64) {
        let dir = self.path(name);
        for sub in ["rollouts", "eval", "checkpoints/step_000000"] {
            fs::create_dir_all(dir.join(sub)).unwrap();
        }
        let recipe = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines/recipes/tiny.env"));
        let recipe = recipe.unwrap().replace("LEARNING_RATE=2e-4", "LEARNING_RATE=5e-4");
        fs::write(dir.join("recipe.env"), format!("SEED=7\nSCORER=\n{recipe}")).unwrap();
        let metrics: String = (1..=steps).map(|step| metrics(step, top * step as f64 / steps as f64) + "\n").collect();
        fs::write(dir.join("metrics.jsonl"), metrics).unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(directory().join("tiny-qwen2").join(file), dir.join("checkpoints/step_000000").join(file))
                .unwrap();
        }
        std::os::unix::fs::symlink("checkpoints/step_000000", dir.join("policy")).unwrap();
        for (time, right) in [("before", 3), ("after", 9)] {
            self.evaluate(name, time, right);
        }
    }

    /// The evaluation of ten prompts of which so many are solved.
    fn evaluate(&self, name: &str, time: &str, right: usize) {
        let record = |prompt: usize| {
            let correctness = if prompt < right { 2.0 } else { 0.0 };
            json!({"prompt_id": prompt.to_string(), "completion": "x", "answer": "1", "finish_reason": "stop",
                   "completion_token_ids": [1, 2], "rewards": {"correctness": correctness}, "reward": correctness})
        };
        let records = self.path(name).join(format!("eval/{time}.greedy.jsonl.zst"));
        let text: String = (0..10).map(|prompt| record(prompt).to_string() + "\n").collect();
        fs::write(&records, zstd::encode_all(text.as_bytes(), 0).unwrap()).unwrap();
        let summary = records.with_extension("").with_extension("json");
        let done = run(EVALUATE, &[records.to_str().unwrap(), "--json", "-o", summary.to_str().unwrap()], "");
        assert_eq!(done.code, Some(0), "{}", done.stderr);
    }

    /// The rollouts of a step: groups of four completions, whose rewards are 0 to 3.
    fn sample(&self, name: &str, step: u64, groups: usize, completion: &str) {
        let record = |group: usize, sample: usize| {
            json!({"prompt_id": format!("p{group}"), "group_id": format!("{step}:p{group}"), "group_size": 4,
                   "prompt": [{"role": "system", "content": HOSTILE}, {"role": "user", "content": format!("question {group}?")}],
                   "answer": "42", "sample_index": sample, "completion": completion, "extracted": HOSTILE,
                   "completion_token_ids": [5, 6, 7], "logprobs": [-0.01, -0.75, -6.0],
                   "finish_reason": if sample == 3 { "length" } else { "stop" },
                   "rewards": {"correctness": sample}, "reward": sample})
        };
        let all = (0..groups).flat_map(|group| (0..4).map(move |sample| (group, sample)));
        let text: String = all.map(|(group, sample)| record(group, sample).to_string() + "\n").collect();
        let path = self.path(name).join(format!("rollouts/step_{step:06}.jsonl.zst"));
        fs::write(path, zstd::encode_all(text.as_bytes(), 0).unwrap()).unwrap();
    }

    fn report(&self, runs: &[&str], more: &[&str]) -> Finished {
        let dirs: Vec<String> = runs.iter().map(|name| self.path(name).to_str().unwrap().to_owned()).collect();
        let page = self.path("page.html");
        let recipes = Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines/recipes");
        let mut args = vec!["--html", page.to_str().unwrap(), "--recipes", recipes.to_str().unwrap()];
        args.extend(dirs.iter().flat_map(|dir| ["--run", dir]));
        args.extend(more);
        run(EVALUATE, &args, "")
    }

    /// The page about these runs.
    fn page(&self, runs: &[&str]) -> String {
        let done = self.report(runs, &[]);
        assert_eq!((done.code, done.stdout.as_str()), (Some(0), ""), "{}", done.stderr);
        fs::read_to_string(self.path("page.html")).unwrap()
    }
}

fn metrics(step: u64, reward: f64) -> String {
    let health = if step == 3 { "no_signal" } else { "" };
    let mut line = json!({"step": step, "policy_step": step, "loss": 0.01, "grad_norm": if step == 2 { Value::Null } else { json!(1.5) },
        "reward": reward, "rewards/correctness/mean": reward, "rewards/</svg><b>/mean": 1.0, "entropy": 0.5,
        "completions/mean_length": 20.0, "num_tokens": 100 * step, "novel": 3.0});
    if !health.is_empty() {
        line["health"] = health.into();
    }
    line.to_string()
}

#[test]
fn a_page_has_metrics_evaluations_samples_and_recipe() {
    let runs = Runs::new();
    runs.make("one", 150, 3.0);
    (1..=7).for_each(|step| runs.sample("one", step, 6, "plain"));
    let page = runs.page(&["one"]);
    for part in [
        "<dd>150<span> of 150</span></dd>",
        "<h4>rewards&#x2f;correctness&#x2f;mean</h4>",
        "Mean reward of the step&#x27;s completions.",
        "Bad: it stays flat for hundreds of steps, or falls.",
        "<h4>novel</h4>",
        "<b>no_signal</b> in 1 step, 3 to 3: all rewards are equal",
        "30.0 %",
        "90.0 %",
        "<b>+60.0</b>",
        "6 of 10 were solved more often after training and 0 less often",
        "4 of 6 groups",
        "question 3?",
        "advantage +1.16",
        "advantage -1.16",
        "title=\"-0.750 nats, 47.2 %\"",
        "<span class=\"part cut\">cut off</span>",
        "is compared with <code>tiny</code>",
        "<td>5e-4 <s>2e-4</s></td>",
        "make train RECIPE=tiny SEED=7 NAME=one-again LEARNING_RATE=5e-4",
    ] {
        assert!(page.contains(part), "{part} is not in {page}");
    }
    for step in [1, 2, 3, 5, 6, 7] {
        assert!(page.contains(&format!("Step {step} <small>")), "step {step}");
    }
    assert!(!page.contains("question 4?") && !page.contains("Step 4 <small>") && !page.contains("In progress"));
    assert_eq!(page.matches("<svg").count(), 10, "one for each metric, but for the steps themselves");

    assert_eq!(runs.report(&["one"], &["--step", "4"]).code, Some(0));
    let page = fs::read_to_string(runs.path("page.html")).unwrap();
    assert!(page.contains("Step 4 <small>") && !page.contains("Step 5 <small>"));
}

#[test]
fn what_stands_in_records_is_text_and_never_markup() {
    let runs = Runs::new();
    runs.make("one", 30, 3.0);
    fs::remove_file(runs.path("one/policy")).unwrap(); // without a tokenizer the completions are plain text
    runs.sample("one", 1, 1, HOSTILE);
    let page = runs.page(&["one"]);
    let escaped = "&lt;&#x2f;pre&gt;&lt;&#x2f;script&gt;&lt;script&gt;alert(&#x27;x&#x27;)";
    assert_eq!(
        page.matches(escaped).count(),
        9,
        "a prompt, four completions, and what was extracted from them: {page}"
    );
    for raw in ["<script", "<img", "</svg><b>", "{{ 7"] {
        let there = page.matches(raw).count();
        assert_eq!(there, if raw == "{{ 7" { 9 } else { 0 }, "{raw}");
    }
    assert!(page.contains("default-src 'none'"), "nothing is loaded, and no script runs");
    assert!(!page.contains("src=\"http") && !page.contains("url("));
}

#[test]
fn a_run_in_progress_has_a_page() {
    let runs = Runs::new();
    runs.make("one", 20, 3.0);
    let path = runs.path("one/metrics.jsonl");
    let whole = fs::read_to_string(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 30]).unwrap();
    fs::remove_file(runs.path("one/eval/after.greedy.json")).unwrap();
    fs::write(runs.path("one/rollouts/step_000020.jsonl.tmp"), "half").unwrap();
    let page = runs.page(&["one"]);
    for part in [
        "<dd>19<span> of 150</span></dd>",
        "In progress, or stopped",
        "The evaluation after training is not there yet.",
        "one has no rollouts of these steps.",
    ] {
        assert!(page.contains(part), "{part}: {page}");
    }

    fs::write(&path, whole.replacen("\"step\":5,", "\"step\":", 1)).unwrap();
    let done = runs.report(&["one"], &[]);
    assert_eq!(done.code, Some(3));
    assert!(done.stderr.contains("one/metrics.jsonl:5: "), "{}", done.stderr);

    fs::create_dir(runs.path("new")).unwrap();
    fs::copy(runs.path("one/recipe.env"), runs.path("new/recipe.env")).unwrap();
    assert!(runs.page(&["new"]).contains("No step is finished yet."));
    fs::create_dir(runs.path("none")).unwrap();
    let done = runs.report(&["none"], &[]);
    assert_eq!(done.code, Some(2));
    assert!(done.stderr.contains("it has neither recipe.env nor metrics.jsonl"), "{}", done.stderr);
    assert_eq!(run(EVALUATE, &["--run", "x"], "").code, Some(2), "no --html");
}

#[test]
fn runs_are_laid_over_one_another() {
    let runs = Runs::new();
    runs.make("one", 10, 3.0);
    runs.make("two", 20, 1.0);
    let recipe = fs::read_to_string(runs.path("two/recipe.env")).unwrap();
    fs::write(runs.path("two/recipe.env"), recipe.replace("LOSS=grpo", "LOSS=gspo")).unwrap();
    let page = runs.page(&["one", "two"]);
    let reward = page.split("<h4>reward</h4>").nth(1).unwrap().split("</figure>").next().unwrap();
    for part in ["stroke=\"#000100\"", "stroke=\"#000200\"", "class=\"now c0\"", "class=\"now c1\""] {
        assert!(reward.contains(part), "{part}: {reward}");
    }
    assert!(page.contains("<td>grpo</td><td>gspo <s>grpo</s></td>"), "{page}");
    assert!(page.contains("NAME=one-again") && page.contains("NAME=two-again"));
}

#[test]
fn many_lines_of_metrics_make_a_small_page() {
    let runs = Runs::new();
    runs.make("one", 3, 3.0);
    let line = |step: u64| {
        let reward = if step == 77_777 { 50.0 } else { 1.0 + (step % 2) as f64 };
        format!("{{\"step\":{step},\"policy_step\":{step},\"reward\":{reward}}}\n")
    };
    fs::write(runs.path("one/metrics.jsonl"), (1..=200_000).map(line).collect::<String>()).unwrap();
    let page = runs.page(&["one"]);
    assert!(page.len() < 100_000, "{}", page.len());
    assert!(page.contains("least 1, most 50"), "the one peak is kept");
}

/// Opens the page in a frame as wide as a phone, and asks the frame about it: the page itself runs no script.
#[test]
fn a_browser_shows_the_page_without_errors_requests_or_scrolling_sideways() {
    let browsers = ["chromium", "chromium-browser", "google-chrome", "chrome"];
    let is_there = |name: &&&str| Command::new(name).arg("--version").output().is_ok_and(|done| done.status.success());
    let Some(browser) = browsers.iter().find(is_there) else {
        return eprintln!("skipped: none of {} is installed", browsers.join(", "));
    };
    let runs = Runs::new();
    runs.make("one", 150, 3.0);
    runs.make("a-run-whose-name-is-longer-than-a-phone-is-wide-and-has-no-place-to-break_at_all", 40, 2.0);
    runs.sample("one", 1, 2, &"long".repeat(200));
    let page = runs.page(&["one", "a-run-whose-name-is-longer-than-a-phone-is-wide-and-has-no-place-to-break_at_all"]);
    fs::write(runs.path("page.html"), page.replace("<details", "<details open")).unwrap();
    let frame = "<!doctype html><iframe src='page.html' width='360' height='800' style='border:0'></iframe><pre id='seen'></pre><script>
        addEventListener('load', () => {
            const frame = document.querySelector('iframe'), page = frame.contentDocument.documentElement;
            const requests = frame.contentWindow.performance.getEntriesByType('resource').map(entry => entry.name);
            seen.textContent = ['width', page.scrollWidth, 'room', page.clientWidth, 'charts',
                page.querySelectorAll('svg polyline').length > 20, 'requests', requests.length].join(' ');
        });
    </script>";
    fs::write(runs.path("frame.html"), frame).unwrap();
    let done = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"])
        .args(["--enable-logging=stderr", "--dump-dom"])
        .arg(format!("--user-data-dir={}", runs.path("profile").display()))
        .arg(format!("file://{}", runs.path("frame.html").display()))
        .output()
        .unwrap();
    let (shown, said) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(shown.contains("width 360 room 360 charts true requests 0<"), "{shown} {said}");
    assert!(!said.contains("CONSOLE"), "{said}");
}
