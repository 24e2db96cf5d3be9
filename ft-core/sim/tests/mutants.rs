//! Planted bugs: each patch of `mutants/` is applied to a copy of the sources, and the simulator
//! that is built from it must find it. The same seeds must pass without one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Enough for every mutant many times over; the run stops at the fifth violation.
const SEEDS: &str = "600";

/// The copy of the sources, removed again whatever happens.
struct Copy {
    root: PathBuf,
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

impl Copy {
    fn new() -> Copy {
        let root = std::env::temp_dir().join(format!("ft-sim-mutants-{}", std::process::id()));
        fs::create_dir_all(&root).expect("making the copy's folder");
        let copy = Copy { root };
        let manifest = fs::read_to_string(workspace().join("Cargo.toml")).expect("reading it");
        fs::write(copy.root.join("Cargo.toml"), virtual_manifest(&manifest)).expect("writing it");
        let lock = workspace().join("Cargo.lock");
        fs::copy(lock, copy.root.join("Cargo.lock")).expect("copying Cargo.lock");
        copy
    }

    /// Fresh sources, with a patch or as they are.
    fn plant(&self, patch: Option<&Path>) {
        let target = self.root.join("ft-core");
        let _ = fs::remove_dir_all(&target);
        copy_tree(&workspace().join("ft-core"), &target);
        if let Some(patch) = patch {
            let output = run(Command::new("git")
                .arg("apply")
                .arg(patch)
                .current_dir(&self.root));
            assert!(
                output.status.success(),
                "{}: {}",
                patch.display(),
                text(&output)
            );
        }
    }

    /// Whether the simulator is content, and what it said.
    fn simulate(&self) -> (bool, String) {
        // A folder of its own below the shared one: dependencies are built once, and the build
        // that runs this test holds no lock on it.
        let build = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mutants");
        let cargo = |arguments: &[&str]| {
            let mut command = Command::new(env!("CARGO"));
            command
                .args(arguments)
                .current_dir(&self.root)
                .env("CARGO_TARGET_DIR", &build);
            run(&mut command)
        };
        let built = cargo(&["build", "--offline", "-q", "-p", "ft-sim"]);
        assert!(built.status.success(), "{}", text(&built));
        let output = cargo(&[
            "run",
            "--offline",
            "-q",
            "-p",
            "ft-sim",
            "--",
            "--seeds",
            SEEDS,
        ]);
        (output.status.success(), text(&output))
    }
}

#[test]
fn every_planted_bug_is_found() {
    let mut patches: Vec<PathBuf> =
        fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("mutants"))
            .expect("reading the mutants")
            .map(|entry| entry.expect("reading the mutants").path())
            .collect();
    patches.sort();
    assert_eq!(patches.len(), 10, "a planted bug is missing");

    let copy = Copy::new();
    copy.plant(None);
    let (content, said) = copy.simulate();
    assert!(content, "a violation without a planted bug:\n{said}");
    for patch in &patches {
        copy.plant(Some(patch));
        let (content, said) = copy.simulate();
        assert!(!content, "{} was not found:\n{said}", patch.display());
        let found = said
            .lines()
            .find(|line| line.starts_with("seed "))
            .unwrap_or_default();
        println!(
            "{}: {found}",
            patch.file_stem().unwrap_or_default().display()
        );
    }
}

/// The workspace's inherited settings with only the two packages that the simulator needs.
fn virtual_manifest(manifest: &str) -> String {
    let members = "members = [\"ft-core\", \"ft-core/sim\"]";
    let inherited = manifest.split("\n[package]").next().unwrap_or_default();
    let mut lines: Vec<&str> = inherited
        .lines()
        .map(|line| {
            if line.starts_with("members") {
                members
            } else {
                line
            }
        })
        .collect();
    // An assertion and an overflow must be seen, and the build must be quick.
    lines.extend(["[profile.dev]", "opt-level = 1", "debug = false"]);
    lines.join("\n")
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("making a folder of the copy");
    for entry in fs::read_dir(from).expect("reading the sources") {
        let path = entry.expect("reading the sources").path();
        let copied = to.join(path.file_name().expect("an entry has a name"));
        if path.is_dir() {
            copy_tree(&path, &copied);
        } else {
            fs::copy(&path, &copied).expect("copying the sources");
        }
    }
}

fn workspace() -> PathBuf {
    let sim = Path::new(env!("CARGO_MANIFEST_DIR"));
    sim.ancestors()
        .nth(2)
        .expect("ft-core/sim is two levels down")
        .to_path_buf()
}

fn run(command: &mut Command) -> Output {
    command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

fn text(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!(
        "{}{}",
        String::from_utf8_lossy(out),
        String::from_utf8_lossy(err)
    )
}
