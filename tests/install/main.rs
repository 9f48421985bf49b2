//! Installs: the commands, their manual pages and completions, the recipes and the scripts behind `make train`.
//!
//! `make install` and `make dist` run it with `--prefix DIR`. Run by `cargo test`, it installs to a directory of its own and checks that
//! what is there works from another one. It is a test, not a command, so that clap's generators are no part of any build but this.

#![allow(clippy::unwrap_used, clippy::print_stdout)] // it is a test

mod check;
mod commands;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Command, CommandFactory};
use clap_complete::{Shell, generate};
use clap_mangen::Man;

/// What is installed of the project as it is, and where.
const FILES: [(&str, &str); 13] = [
    ("pipelines/common.sh", "share/grpo-pipes/pipelines"),
    ("pipelines/train.sh", "share/grpo-pipes/pipelines"),
    ("pipelines/step.sh", "share/grpo-pipes/pipelines"),
    ("pipelines/fork.sh", "share/grpo-pipes/pipelines"),
    ("pipelines/verify.sh", "share/grpo-pipes/pipelines"),
    ("pipelines/evaluate.sh", "share/grpo-pipes/pipelines"),
    ("pipelines/data.sh", "share/grpo-pipes/pipelines"),
    ("pipelines/sample-shard.sh", "share/grpo-pipes/pipelines"),
    ("pipelines/merge-shards.sh", "share/grpo-pipes/pipelines"),
    ("pipelines/recipes", "share/grpo-pipes/pipelines"),
    ("README.md", "share/doc/grpo-pipes"),
    ("LICENSE-APACHE", "share/doc/grpo-pipes"),
    ("LICENSE-MIT", "share/doc/grpo-pipes"),
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let done = match &args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--prefix", prefix] => install(Path::new(prefix)).map(|()| println!("installed to {prefix}")),
        ["--prefix", ..] => Err(io::Error::other("usage: --prefix DIR")),
        // What the other tests are asked for by name, or listed for.
        [first, ..] if !first.starts_with("--nocapture") && !"install".contains(*first) => Ok(()),
        _ => {
            check::all();
            Ok(())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            println!("install: {err}");
            ExitCode::FAILURE
        }
    }
}

/// The commands: their options, and the programs that this was built with.
fn commands() -> [(Command, &'static str); 6] {
    use commands::{evaluate, export_hf, grpo_step, gsm8k_prep, rollout, score};
    [
        (gsm8k_prep::Args::command(), env!("CARGO_BIN_EXE_gsm8k-prep")),
        (rollout::Args::command(), env!("CARGO_BIN_EXE_rollout")),
        (score::Args::command(), env!("CARGO_BIN_EXE_score")),
        (grpo_step::Args::command(), env!("CARGO_BIN_EXE_grpo-step")),
        (evaluate::Args::command(), env!("CARGO_BIN_EXE_evaluate")),
        (export_hf::Args::command(), env!("CARGO_BIN_EXE_export-hf")),
    ]
}

/// Installs everything below `prefix`, in the place of what an earlier version left under the same names.
fn install(prefix: &Path) -> io::Result<()> {
    let shells = [
        (Shell::Bash, "share/bash-completion/completions", "", ""),
        (Shell::Zsh, "share/zsh/site-functions", "_", ""),
        (Shell::Fish, "share/fish/vendor_completions.d", "", ".fish"),
    ];
    for (mut command, program) in commands() {
        let name = command.get_name().to_owned();
        put(Path::new(program), &prefix.join("bin"))?;
        for (shell, dir, before, after) in &shells {
            let mut text = Vec::new();
            generate(*shell, &mut command, &name, &mut text);
            write(&prefix.join(dir).join(format!("{before}{name}{after}")), &text)?;
        }
        let mut page = Vec::new();
        Man::new(command).render(&mut page)?;
        write(&prefix.join(format!("share/man/man1/{name}.1")), &page)?;
    }
    let project = Path::new(env!("CARGO_MANIFEST_DIR"));
    FILES.iter().try_for_each(|(from, to)| put(&project.join(from), &prefix.join(to)))
}

/// Copies a file, or a directory with all that is in it, into a directory.
fn put(from: &Path, dir: &Path) -> io::Result<()> {
    let to = dir.join(from.file_name().unwrap());
    if from.is_dir() {
        return entries(from)?.iter().try_for_each(|entry| put(entry, &to));
    }
    fs::create_dir_all(dir)?;
    remove(&to)?;
    fs::copy(from, &to).map(drop)
}

fn write(to: &Path, bytes: &[u8]) -> io::Result<()> {
    fs::create_dir_all(to.parent().unwrap())?;
    remove(to)?;
    fs::write(to, bytes)
}

/// A program that runs cannot be written to, but another can take its name.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
        _ => Ok(()),
    }
}

fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect()
}
