//! ft-core is sans-io: it names nothing that touches the world.

use std::fs;
use std::path::Path;

const FORBIDDEN: [&str; 9] = [
    "std::net",
    "std::os",
    "std::thread",
    "std::fs",
    "std::env",
    "std::process",
    "std::io",
    "Instant",
    "SystemTime",
];

#[test]
fn nothing_in_here_touches_the_world() {
    let mut files = 0;
    let mut found = Vec::new();
    visit(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut |path, text| {
            files += 1;
            for (number, line) in text.lines().enumerate() {
                let code = line.split("//").next().unwrap_or_default();
                for name in FORBIDDEN.iter().filter(|name| code.contains(**name)) {
                    found.push(format!("{}:{}: {name}", path.display(), number + 1));
                }
            }
        },
    );
    assert!(files > 20, "only {files} files were looked at");
    assert!(found.is_empty(), "{found:#?}");
}

fn visit(folder: &Path, look: &mut dyn FnMut(&Path, &str)) {
    for entry in fs::read_dir(folder).expect("reading the sources") {
        let path = entry.expect("reading the sources").path();
        if path.is_dir() {
            visit(&path, look);
        } else {
            look(
                &path,
                &fs::read_to_string(&path).expect("reading the sources"),
            );
        }
    }
}
