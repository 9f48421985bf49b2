//! The manifests of `pipelines/k8s/`, against the schemas of Kubernetes where Python's kubernetes-validate is installed.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{env, fs};

use crate::runs::text;

fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn manifests() -> Vec<PathBuf> {
    fs::read_dir(project().join("pipelines/k8s")).unwrap().map(|entry| entry.unwrap().path()).collect()
}

fn python(arguments: &[PathBuf]) -> Output {
    Command::new(env::var("PYTHON").unwrap_or("python3".into())).args(arguments).output().unwrap()
}

#[test]
fn manifests_are_what_the_schemas_say_and_others_are_refused() {
    let has_it =
        Command::new("sh").args(["-c", "${PYTHON:-python3} -c 'import kubernetes_validate' 2>/dev/null"]).status();
    if !has_it.unwrap().success() {
        println!("skipped, because there is no Python with kubernetes-validate (PYTHON may name one)");
        return;
    }
    let check = |files: &[PathBuf]| python(&[&[project().join("tests/k8s/check.py")], files].concat());
    let done = check(&manifests());
    assert!(done.status.success(), "{}", text(&done.stderr));
    let dir = tempfile::tempdir().unwrap();
    let wrong = dir.path().join("wrong.yaml");
    let cases = [
        ("sample", "completions:", "completion:"),
        ("volume", "storage: 100Gi", "storage: [100]"),
        ("train", "slotsPerWorker:", "slots:"),
        ("train", "image: IMAGE", "images: IMAGE"),
    ];
    for (name, right, mistake) in cases {
        let manifest = fs::read_to_string(project().join(format!("pipelines/k8s/{name}.yaml"))).unwrap();
        assert!(manifest.contains(right), "{name}: {right}");
        fs::write(&wrong, manifest.replace(right, mistake)).unwrap();
        assert_eq!(check(std::slice::from_ref(&wrong)).status.code(), Some(1), "{name}: {mistake} passes");
    }
}

#[test]
fn the_scripts_that_manifests_run_are_installed() {
    let installed = fs::read_to_string(project().join("tests/install/main.rs")).unwrap();
    let mut found = 0;
    for manifest in manifests() {
        let content = fs::read_to_string(&manifest).unwrap();
        for rest in content.split("/usr/local/share/grpo-pipes/").skip(1) {
            let script = rest.split([' ', ']']).next().unwrap();
            assert!(installed.contains(&format!("(\"{script}\", ")), "{}: {script}", manifest.display());
            found += 1;
        }
    }
    assert!(found > 1, "{found}");
}
