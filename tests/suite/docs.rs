//! The commands of every page run, or it says why not; those of a page that cannot run have options that exist.
//!
//! In a page, a block marked `sh` is run by bash, all blocks of a page one after the other in one directory. A block marked `sh skip: WHY`
//! is not run, but every command of ours in it must know its options, and make its targets. Other blocks whose first line is a comment
//! with a file's name are written to that file first.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::runs::{Root, text};

const COMMANDS: [&str; 6] = ["gsm8k-prep", "rollout", "score", "grpo-step", "evaluate", "export-hf"];

/// A fenced block: what follows the fence, and its lines.
struct Block {
    info: String,
    text: String,
}

fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Pages with commands.
fn pages() -> Vec<PathBuf> {
    let mut pages: Vec<PathBuf> =
        fs::read_dir(project().join("docs")).unwrap().map(|entry| entry.unwrap().path()).collect();
    pages.extend(["README.md", "README.es.md"].map(|name| project().join(name)));
    pages.retain(|page| page.extension().is_some_and(|extension| extension == "md") && page.is_file());
    pages.sort();
    pages
}

fn blocks(page: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for line in page.lines() {
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(info)) => open = Some(Block { info: info.trim().into(), text: String::new() }),
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some(block), None) => block.text.extend([line, "\n"]),
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "a block that does not end");
    blocks
}

impl Block {
    /// The commands of a block of them; those of a transcript follow `$ `, and go on where a line ends with an operator.
    fn commands(&self) -> Option<String> {
        if self.info.split(' ').next() != Some("console") {
            return (self.info.split(' ').next() == Some("sh")).then(|| self.text.clone());
        }
        let mut commands = String::new();
        let mut goes_on = false;
        for line in self.text.lines() {
            let command = line.strip_prefix("$ ").or(goes_on.then_some(line));
            goes_on = command.is_some_and(|command| command.ends_with(['|', '\\']));
            commands.extend(command.into_iter().flat_map(|command| [command, "\n"]));
        }
        Some(commands)
    }

    /// The file that the block is, by its first line.
    fn file(&self) -> Option<&str> {
        let first = self.text.lines().next()?;
        let name = first.strip_prefix("# ").or(first.strip_prefix("// "))?;
        let is_name = name.contains('.') && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        (self.commands().is_none() && is_name).then_some(name)
    }

    fn is_skipped(&self) -> bool {
        self.info.contains("skip: ")
    }
}

fn executable(path: &Path, script: &str) {
    fs::write(path, script).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Makes a directory that looks like the project's, in which cargo has nothing to do.
fn prepare(root: &Root) {
    for name in ["Makefile", "Cargo.toml"] {
        symlink(project().join(name), root.path(name)).unwrap();
    }
    fs::create_dir(root.path("shims")).unwrap();
    executable(&root.path("shims/cargo"), "#!/bin/sh\n");
}

fn bash(root: &Root, path: &str, script: &str) -> std::process::Output {
    let mut command = root.shell(&format!("set -euo pipefail\nexport PATH='{path}'\n{script}"));
    for name in ["HF_TOKEN", "HF_HUB_OFFLINE", "MAKEFLAGS", "MAKELEVEL", "NAME"] {
        command.env_remove(name);
    }
    command.env("HF_ENDPOINT", "http://127.0.0.1:1").env("CUDA", "0").stdin(Stdio::null()).output().unwrap()
}

/// What a page needs that this machine may lack.
fn missing(script: &str) -> Option<&'static str> {
    let has = |program: &str| Command::new(program).arg("--version").stdin(Stdio::null()).output().is_ok();
    ["jq", "python3", "zstdcat", "make", "rustc"].into_iter().find(|program| script.contains(program) && !has(program))
}

#[test]
fn the_commands_of_every_page_run() {
    let root = Root::new(&[]);
    prepare(&root);
    let system = std::env::var("PATH").unwrap();
    let path = format!("{}:{}:{system}", root.path("shims").display(), root.path("target/release").display());
    let done = bash(&root, &path, "make train");
    assert!(done.status.success(), "{}", text(&done.stderr));
    for page in pages() {
        let all = blocks(&fs::read_to_string(&page).unwrap());
        let scripts: Vec<String> = all.iter().filter(|block| !block.is_skipped()).filter_map(Block::commands).collect();
        let script = scripts.concat();
        if let Some(program) = missing(&script) {
            println!("skipped, because there is no {program}: {}", page.display());
            continue;
        }
        for block in &all {
            if let Some(name) = block.file() {
                fs::write(root.path(name), &block.text).unwrap();
            }
        }
        let done = bash(&root, &path, &format!("exec 2>&1\nset -x\n{script}"));
        assert!(done.status.success(), "{}:\n{}", page.display(), text(&done.stdout));
    }
}

/// A place where the six commands only read their options, make only knows its targets, and nothing else does anything.
fn only_reads_options(root: &Root) -> String {
    let commands = Path::new(env!("CARGO_BIN_EXE_rollout")).parent().unwrap();
    let place = root.path("reads");
    fs::create_dir(&place).unwrap();
    for name in COMMANDS {
        let real = commands.join(name);
        executable(&place.join(name), &format!("#!/bin/sh\nexec '{}' \"$@\" --help >/dev/null\n", real.display()));
    }
    let system = std::env::var("PATH").unwrap();
    executable(&place.join("make"), &format!("#!/bin/sh\nPATH='{system}' exec make -n \"$@\" >/dev/null\n"));
    place.display().to_string()
}

const NOTHING_ELSE: &str = "command_not_found_handle() { :; }\n";

#[test]
fn commands_that_are_not_run_have_options_and_targets_that_exist() {
    let root = Root::new(&[]);
    prepare(&root);
    let place = only_reads_options(&root);
    let check = |name: &str, script: &str| {
        let script = script.replace("target/release/", "").replace(" ./", " ");
        let done = bash(&root, &place, &format!("{NOTHING_ELSE}exec 2>&1\nset -x\n{script}"));
        (done.status.success(), format!("{name}:\n{}", text(&done.stdout)))
    };
    for wrong in ["rollout --no-such-option", "make no-such-target", "gsm8k-prep | score --reward bogus=1 | evaluate"] {
        assert!(!check("", wrong).0, "{wrong} passes");
    }
    let mut found = 0;
    for page in pages() {
        for block in blocks(&fs::read_to_string(&page).unwrap()).iter().filter(|block| block.is_skipped()) {
            let (fine, said) = check(&page.display().to_string(), &block.commands().unwrap());
            assert!(fine, "{said}");
            found += 1;
        }
    }
    assert!(found > 0, "no page has a block that is not run");
}

#[test]
fn the_notebook_for_colab_has_commands_that_exist() {
    let root = Root::new(&[]);
    prepare(&root);
    let place = only_reads_options(&root);
    let notebook: Value = serde_json::from_slice(&fs::read(project().join("pipelines/colab.ipynb")).unwrap()).unwrap();
    let cells = notebook["cells"].as_array().unwrap().iter().filter(|cell| cell["cell_type"] == "code");
    let lines: Vec<String> = cells
        .flat_map(|cell| cell["source"].as_array().unwrap())
        .map(|line| line.as_str().unwrap().trim_end().to_owned())
        .collect();
    let shell: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix('!')).collect();
    assert!(lines.len() <= 12 && shell.len() >= 5, "{lines:?}");
    let known = |line: &&String| line.starts_with(['!', '%']) || line.starts_with("REPOSITORY = ");
    assert_eq!(lines.iter().filter(known).count(), lines.len(), "{lines:?}");
    let script = shell.join("\n").replace("target/release/", "");
    let done = bash(&root, &place, &format!("REPOSITORY=x\n{NOTHING_ELSE}exec 2>&1\nset -x\n{script}"));
    assert!(done.status.success(), "{}", text(&done.stdout));
    let recipe = script.split("RECIPE=").nth(1).unwrap().split_whitespace().next().unwrap();
    assert!(project().join(format!("pipelines/recipes/{recipe}.env")).is_file(), "{recipe}");
}

#[test]
fn the_tables_about_more_machines_are_what_the_script_computes() {
    let done = Command::new("bash").arg(project().join("pipelines/bench/scaling.sh")).output().unwrap();
    let (page, tables) = (fs::read_to_string(project().join("docs/scaling.md")).unwrap(), text(&done.stdout));
    assert!(tables.contains("\n| 1024 | ") && page.contains(&tables), "{tables}{}", text(&done.stderr));
}

/// Links between pages, and to files and headings.
#[test]
fn links_lead_somewhere() {
    for page in pages() {
        let content = fs::read_to_string(&page).unwrap();
        for link in content.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.starts_with("http") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            assert!(target.exists(), "{}: {link}", page.display());
            if !heading.is_empty() {
                let target = fs::read_to_string(&target).unwrap();
                let slug = |line: &str| {
                    line.trim_start_matches('#')
                        .trim()
                        .to_lowercase()
                        .replace(' ', "-")
                        .replace(['`', ',', '.', '?'], "")
                };
                let is_there = target.lines().filter(|line| line.starts_with('#')).any(|line| slug(line) == heading);
                let named = target.contains(&format!("<a name=\"{heading}\"></a>"));
                assert!(is_there || named, "{}: {link}", page.display());
            }
        }
    }
}
