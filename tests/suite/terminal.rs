//! What `grpo-step` shows of a run on a terminal, and what it prints where there is none.

use std::fs;
use std::process::{Command, Output, Stdio};

use crate::runs::text;
use crate::signals::long_step;

/// Trains three short steps with standard error on a terminal of so many columns; `None` without util-linux's `script`, which makes one.
fn on_a_terminal(columns: usize, numbers: &[(&str, &str)]) -> Option<String> {
    if Command::new("script").arg("--version").output().is_err() {
        eprintln!("skipped: no program `script`");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let (_, records) = long_step(dir.path(), &[(0, 2, 4), (1, 2, 4), (2, 2, 4)]);
    fs::write(dir.path().join("records.jsonl"), records).unwrap();
    let train = format!(
        "stty cols {columns} rows 40; exec {} --follow {dir} --groups-per-step 1 --total-steps 3 --max-staleness 2 \
         --logprob-band 1e9 {dir}/records.jsonl >/dev/null",
        env!("CARGO_BIN_EXE_grpo-step"),
        dir = dir.path().display(),
    );
    let mut script = Command::new("script");
    script.args(["-qec", &train, "/dev/null"]).env("TERM", "xterm").env_remove("NO_COLOR").env_remove("CI");
    script.envs(numbers.iter().copied()).stdin(Stdio::null());
    let Output { status, stdout, .. } = script.output().unwrap();
    let shown = text(&stdout);
    assert!(status.success(), "{shown}");
    Some(shown)
}

#[test]
fn a_terminal_shows_a_panel_and_ends_with_a_line() {
    let Some(shown) = on_a_terminal(80, &[]) else { return };
    for part in ["waiting for the first step", "step 1/3", "━", "reward", "entropy", "length", "▁"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let last = shown.trim_end().lines().last().unwrap_or_default();
    assert!(shown.contains("\u{1b}[36m") && last.contains("grpo-step: "), "{shown}");
    assert!(shown.contains("grpo-step: step 3/3: reward 0.500"), "{shown}");
}

#[test]
fn a_narrow_terminal_and_one_without_colours_are_respected() {
    let Some(shown) = on_a_terminal(30, &[("NO_COLOR", "1")]) else { return };
    assert!(shown.contains("step 1/3") && !shown.contains("\u{1b}[36m"), "{shown}");
    // The lines of a panel fill the terminal's, so that each begins where the one before ended.
    let panels = shown.split(['\r', '\n']).filter(|text| text.contains("reward") && !text.contains("grpo-step: "));
    let panels: Vec<String> = panels.map(without_escapes).collect();
    assert!(!panels.is_empty(), "{shown}");
    for panel in panels {
        let lines: Vec<String> = panel.chars().collect::<Vec<_>>().chunks(30).map(String::from_iter).collect();
        for word in ["reward", "entropy", "length"] {
            assert!(lines.iter().any(|line| line.trim_start().starts_with(word)), "{word}: {lines:?}");
        }
    }
}

/// What is seen of a text.
fn without_escapes(line: &str) -> String {
    let mut plain = String::new();
    let mut rest = line;
    while let Some((before, after)) = rest.split_once("\u{1b}[") {
        plain.push_str(before);
        rest = after.split_once(|c: char| c.is_ascii_alphabetic()).map_or("", |(_, rest)| rest);
    }
    plain + rest
}

#[test]
fn what_is_no_terminal_gets_plain_lines_and_on_request_a_sample_of_each_step() {
    let dir = tempfile::tempdir().unwrap();
    let (run, records) = long_step(dir.path(), &[(0, 2, 4), (1, 2, 4)]);
    let more = "\"prompt\":[{\"role\":\"user\",\"content\":\"How many?\"}],\"answer\":\"7\",\"extracted\":\"8\",\
                \"completion\":\"I say\\u001b 8\",\"reward\"";
    fs::write(dir.path().join("records.jsonl"), records.replace("\"reward\"", more)).unwrap();
    let train = |verbose: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_grpo-step"));
        command.arg("--follow").arg(dir.path()).args(["--groups-per-step", "1", "--max-staleness", "2", "--keep", "9"]);
        command
            .args(["--logprob-band", "1e9", "--total-steps", "2"])
            .args(verbose)
            .arg(dir.path().join("records.jsonl"));
        let done = command.stdin(Stdio::null()).output().unwrap();
        assert!(done.status.success(), "{}", text(&done.stderr));
        text(&done.stderr)
    };
    let said = train(&["--verbose"]);
    let want = "-------------------- step 1\nQuestion:\nHow many?\n\nAnswer:\n7\n\nResponse (reward 0.000):\nI say\\u{1b} 8\n\nExtracted:\n8\n";
    assert!(said.contains(want) && said.matches("Question:").count() == 2, "{said}");
    assert!(said.contains("grpo-step: step 2/2: reward 0.500") && !said.contains('▁'), "{said}");
    let state = fs::read(run.checkpoint(2).join("state.json")).unwrap();
    assert!(!text(&state).contains("--verbose"), "checkpoints do not depend on what was printed");
}
