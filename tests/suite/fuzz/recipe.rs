//! Recipes are data: whatever stands in one, nothing of it is run.

use std::fs;

use super::inputs;
use super::mutate::{Dice, mutate};
use crate::runs::{Root, text};

/// What bash would run, if it were let.
const WORDS: [&str; 16] = [
    "a[$(touch own)]",
    "$(touch own)",
    "`touch own`",
    "; touch own;",
    "\ntouch own\n",
    "\nb[$(touch own)]=1\n",
    "PATH=",
    "\nIFS=",
    "SCORER=touch own",
    "$((a[$(touch own)]))",
    "=",
    "#",
    "\0",
    "\n",
    "-",
    "\u{1b}[2J",
];

/// Begins a run with each recipe as the scripts do, and calculates with its numbers as they do; prints its code.
const READ: &str = r#"cd "$1"
. pipelines/common.sh
set +e
for file in recipes/*.env; do
    (
        begin "$file.run" --recipe "$file"
        echo $((STEPS * PROMPTS_PER_STEP + EPOCHS + SUPERVISED_STEPS * SUPERVISED_BATCH))
    ) >/dev/null 2>"$file.said" </dev/null
    echo "$file $?"
done
"#;

#[test]
fn a_damaged_or_hostile_recipe_runs_nothing() {
    let root = Root::new(&[]);
    fs::create_dir(root.path("recipes")).unwrap();
    let seed = fs::read(root.path("pipelines/recipes/tiny.env")).unwrap();
    let count = (inputs() / 500).min(10_000);
    for input in 0..count {
        let bytes = mutate(&mut Dice::of("recipe", input), std::slice::from_ref(&seed), &WORDS);
        fs::write(root.path(&format!("recipes/{input}.env")), bytes).unwrap();
    }
    let done = std::process::Command::new("bash")
        .args(["-c", READ, "read", root.path("").to_str().unwrap()])
        .output()
        .unwrap();
    let codes: Vec<_> = text(&done.stdout).lines().map(str::to_owned).collect();
    assert_eq!(codes.len() as u64, count, "{}", text(&done.stderr));
    for line in codes {
        let (file, code) = line.split_once(' ').unwrap();
        let said = fs::read(root.path(&format!("{file}.said"))).unwrap();
        let said = String::from_utf8_lossy(&said);
        // 1 is bash's own, of a number that is none to it, such as 0.5 steps.
        assert!(["0", "1", "3"].contains(&code), "{line}: {said}");
        assert!(code != "3" || said.starts_with("grpo-step: recipes/") && said.lines().count() == 1, "{line}: {said}");
    }
    assert!(!root.path("own").exists() && !root.path("recipes/own").exists());
}

#[test]
fn a_run_whose_files_have_commands_in_them_runs_none() {
    let cases = [
        ("EPOCHS=a[$(touch own)]\n", 3, "EPOCHS is a whole number, and not "),
        ("b[$(touch own)]=1\n", 3, "not NAME=VALUE"),
        ("DATA=--output=own\n", 3, "DATA begins with a minus"),
        ("SCORER=touch own\n", 2, "now: SCORER="),
    ];
    for (line, code, reason) in cases {
        let root = Root::new(&[]);
        fs::create_dir_all(root.run("")).unwrap();
        let tiny = fs::read_to_string(root.path("pipelines/recipes/tiny.env")).unwrap();
        let name = line.split('=').next().unwrap();
        let others: String = tiny
            .lines()
            .filter(|other| !other.starts_with(&format!("{name}=")))
            .map(|other| other.to_owned() + "\n")
            .collect();
        fs::write(root.run("recipe.env"), format!("FORK=old/step_000004\nSEED=1\n{line}{others}")).unwrap();
        let done = root.train(&[]);
        let said = text(&done.stderr);
        assert_eq!(done.status.code(), Some(code), "{said}");
        assert!(said.contains(reason), "{said}");
        assert!(!root.path("own").exists());
    }
}
