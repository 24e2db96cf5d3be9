use std::io::Write;
use std::process::Command;

use super::*;

/// A directory of its own, gone when the test ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let dir = std::env::temp_dir().join(format!("cr-state-{name}-{}", process::id()));
        fs::create_dir_all(&dir).unwrap();
        Scratch(dir)
    }

    fn open(&self) -> anyhow::Result<StateStore> {
        StateStore::open(&self.0, "web", "primary")
    }

    fn file(&self) -> PathBuf {
        self.0.join("web-primary.state")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn term(term: u64) -> State {
    State {
        term: Term(term),
        protected: term % 2 == 1,
        activated: term % 3 == 1,
    }
}

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

#[test]
fn what_is_stored_is_there_after_a_restart() {
    let scratch = Scratch::new("restart");
    assert_eq!(scratch.open().unwrap().load(), State::default());
    for number in [1, 2, 7, u64::MAX] {
        let mut store = scratch.open().unwrap();
        store.store(term(number)).unwrap();
        assert_eq!(store.load(), term(number));
        drop(store);
        assert_eq!(scratch.open().unwrap().load(), term(number));
    }
    let files: Vec<_> = fs::read_dir(&scratch.0)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    assert_eq!(files, [scratch.file()], "no draft is left behind");
}

#[test]
fn the_two_sides_and_other_vms_have_files_of_their_own() {
    let scratch = Scratch::new("own");
    let mut primary = scratch.open().unwrap();
    primary.store(term(5)).unwrap();
    let backup = StateStore::open(&scratch.0, "web", "backup").unwrap();
    let other = StateStore::open(&scratch.0, "db", "primary").unwrap();
    assert_eq!(
        (backup.load(), other.load()),
        (State::default(), State::default())
    );
}

#[test]
fn two_daemons_can_not_share_a_file() {
    let scratch = Scratch::new("shared");
    let first = scratch.open().unwrap();
    let error = scratch.open().unwrap_err().to_string();
    assert!(
        error.contains("another primary daemon of the VM web"),
        "{error}"
    );
    assert!(error.contains("--vm-id"), "{error}");
    drop(first);
    scratch.open().unwrap();
}

#[test]
fn a_write_that_is_torn_at_any_byte_leaves_the_state_before_it_or_is_whole() {
    let scratch = Scratch::new("torn");
    let mut store = scratch.open().unwrap();
    store.store(term(1)).unwrap();
    store.store(term(2)).unwrap();
    let before = fs::read(scratch.file()).unwrap();
    store.store(term(3)).unwrap();
    let after = fs::read(scratch.file()).unwrap();
    assert_eq!(before.len(), after.len(), "the file never grows");
    drop(store);
    let offset = (0..before.len())
        .find(|at| before[*at] != after[*at])
        .unwrap() as u64;
    let start = (offset / RECORD_STRIDE * RECORD_STRIDE) as usize;
    for written in 0..=RECORD_BYTES {
        let mut torn = before.clone();
        torn[start..start + written].copy_from_slice(&after[start..start + written]);
        fs::write(scratch.file(), &torn).unwrap();
        let expected = if torn == after { term(3) } else { term(2) };
        assert_eq!(
            scratch.open().unwrap().load(),
            expected,
            "{written} bytes written"
        );
        // And it goes on from there: twice, so that each record was written.
        let mut store = scratch.open().unwrap();
        for number in [8, 9] {
            store.store(term(number)).unwrap();
        }
        drop(store);
        assert_eq!(scratch.open().unwrap().load(), term(9));
    }
}

#[test]
fn no_flipped_bit_goes_unnoticed() {
    for at in 0..RECORD_BYTES as u64 {
        let scratch = Scratch::new(&format!("bits{at}"));
        scratch.open().unwrap().store(term(1)).unwrap();
        let newest = Record {
            serial: 2,
            state: term(1),
        }
        .offset();
        flip(&scratch.file(), newest + at);
        assert_eq!(
            scratch.open().unwrap().load(),
            State::default(),
            "byte {at}"
        );
        flip(&scratch.file(), (RECORD_STRIDE - newest) + at);
        let error = scratch.open().unwrap_err().to_string();
        assert!(
            error.contains("is damaged") && error.contains("then remove the file"),
            "{error}"
        );
        fs::remove_file(scratch.file()).unwrap();
        scratch.open().unwrap();
    }
}

#[test]
fn a_file_that_is_something_else_is_refused() {
    for (name, bytes) in [
        ("empty", vec![]),
        ("short", vec![7; 31]),
        ("long", vec![0; 1 << 20]),
    ] {
        let scratch = Scratch::new(name);
        fs::write(scratch.file(), bytes).unwrap();
        let error = scratch.open().unwrap_err().to_string();
        assert!(error.contains("web-primary.state is damaged"), "{error}");
    }
}

#[test]
fn a_directory_that_can_not_be_made_is_named() {
    let error = StateStore::open(Path::new("/proc/nowhere"), "web", "primary").unwrap_err();
    assert!(
        format!("{error:#}").contains("/proc/nowhere (see --state-dir)"),
        "{error:#}"
    );
}

/// A file system of 32 KiB.
struct Tmpfs(Scratch);

impl Tmpfs {
    fn mount() -> Option<Tmpfs> {
        let scratch = Scratch::new("tmpfs");
        let mut mount = Command::new("mount");
        let mounted = mount
            .args(["-t", "tmpfs", "-o", "size=32k", "tmpfs"])
            .arg(&scratch.0);
        mounted
            .output()
            .is_ok_and(|output| output.status.success())
            .then(|| Tmpfs(scratch))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0.0).status();
    }
}

#[test]
fn a_full_disk_fails_nothing() {
    let Some(tmpfs) = Tmpfs::mount() else {
        // Past the harness, which shows nothing of a test that passes: scripts/test counts it.
        let line = b"\n--- a full disk: NOT RUN: mounting a tmpfs needs root\n";
        return std::io::stderr().write_all(line).unwrap();
    };
    let mut store = tmpfs.0.open().unwrap();
    let filled = fs::write(tmpfs.0.0.join("filler"), vec![1; 64 << 10]).unwrap_err();
    assert_eq!(filled.kind(), ErrorKind::StorageFull);
    for number in 1..=4 {
        store.store(term(number)).unwrap();
    }
    drop(store);
    assert_eq!(tmpfs.0.open().unwrap().load(), term(4));
    let error = StateStore::open(&tmpfs.0.0, "late", "primary").unwrap_err();
    assert!(
        format!("{error:#}").contains("making the state file"),
        "{error:#}"
    );
    assert_eq!(
        fs::read_dir(&tmpfs.0.0).unwrap().count(),
        2,
        "no half-made file is left"
    );
}
