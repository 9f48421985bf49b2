//! Who may import whom: each room of `src/` imports rooms above it in this table, and no others.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// A room, and what it may import.
const ROOMS: [(&str, &str); 23] = [
    ("error", ""),
    ("directory", "error"),
    ("process", "error"),
    ("numbers", "error"),
    ("lines", "error process"),
    ("command", "error process lines"),
    ("tokenizer", "error directory lines"),
    ("reward", "error numbers lines"),
    ("gsm8k", "error process lines reward"),
    ("eval", "error numbers lines reward"),
    ("dataset", "error process lines reward"),
    ("model", "error directory process numbers"),
    ("gguf", "error numbers model"),
    ("optim", "error numbers"),
    ("gpu", "error numbers model optim"),
    ("engine", "error directory process numbers model gguf gpu"),
    ("checkpoint", "error directory process numbers lines tokenizer model gguf optim"),
    ("run", "error process lines checkpoint"),
    ("rollout", "error directory process numbers lines tokenizer gsm8k model gguf gpu engine checkpoint run"),
    ("grpo", "error numbers lines model"),
    ("report", "error lines tokenizer eval checkpoint run grpo"),
    ("train", "error directory process numbers lines command tokenizer model optim gpu checkpoint run grpo"),
    ("lib", "error"),
];

#[test]
fn rooms_import_only_what_stands_above_them() {
    let mut above = BTreeSet::new();
    for (room, allowed) in ROOMS {
        let allowed: BTreeSet<&str> = allowed.split_whitespace().collect();
        assert!(allowed.is_subset(&above), "{room} may import a room below it: {allowed:?}");
        above.insert(room);
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = BTreeSet::new();
    for path in rust_files(&source) {
        let name = path.strip_prefix(&source).unwrap().to_str().unwrap();
        let room = name.split('/').next().unwrap().trim_end_matches(".rs");
        let (_, allowed) =
            ROOMS.iter().find(|(known, _)| *known == room).unwrap_or_else(|| panic!("{name}: no such room"));
        for line in fs::read_to_string(&path).unwrap().lines().filter(|line| !line.trim_start().starts_with("//")) {
            for import in line.split("crate::").skip(1) {
                let import: String =
                    import.chars().take_while(|c| c.is_ascii_lowercase() || c.is_ascii_digit()).collect();
                if !import.is_empty() && import != room && !allowed.split_whitespace().any(|one| one == import) {
                    wrong.insert(format!("{name} imports {import}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn rust_files(dir: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.flat_map(|path| if path.is_dir() { rust_files(&path) } else { vec![path] });
    files
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("gpu/build.rs"))
        .collect()
}
