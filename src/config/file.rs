//! The configuration file.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::cli::Options;

/// Bytes of a configuration file.
const BYTES_MAX: u64 = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    #[error("reading the configuration file {} failed: is the path right?", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("the configuration file {} has more than {BYTES_MAX} bytes: is it the right one?", path.display())]
    TooLong { path: PathBuf },
    #[error("the configuration file {} is no TOML: {text}", path.display())]
    Syntax { path: PathBuf, text: String },
    #[error(
        "the configuration file {} has the unknown key `{key}`{}; known are {known}", path.display(),
        suggest(.nearest)
    )]
    UnknownKey {
        path: PathBuf,
        key: String,
        nearest: Option<String>,
        known: String,
    },
    #[error("the configuration file {} has a wrong value: {text}", path.display())]
    Value { path: PathBuf, text: String },
}

fn suggest(nearest: &Option<String>) -> String {
    nearest
        .as_ref()
        .map(|name| format!(" (did you mean `{name}`?)"))
        .unwrap_or_default()
}

/// # Errors
/// The file can't be read, is no TOML, or says something that is not understood.
pub(super) fn read(path: &Path) -> Result<Options, FileError> {
    let path_buf = || path.to_owned();
    let unreadable = |source| FileError::Read {
        path: path_buf(),
        source,
    };
    let mut text = String::new();
    let file = File::open(path).map_err(unreadable)?;
    file.take(BYTES_MAX + 1)
        .read_to_string(&mut text)
        .map_err(unreadable)?;
    if text.len() as u64 > BYTES_MAX {
        return Err(FileError::TooLong { path: path_buf() });
    }
    let table: toml::Table = toml::from_str(&text).map_err(|error| FileError::Syntax {
        path: path_buf(),
        text: error.to_string(),
    })?;
    let names = Options::names();
    if let Some(key) = table.keys().find(|key| !names.contains(key)) {
        // `epoch_ms` for `epoch-ms` is what people write.
        let dashed = key.replace('_', "-");
        return Err(FileError::UnknownKey {
            path: path_buf(),
            key: key.clone(),
            nearest: names.contains(&dashed).then_some(dashed),
            known: names.join(", "),
        });
    }
    // From the text again: its errors name line and column.
    toml::from_str(&text).map_err(|error| FileError::Value {
        path: path_buf(),
        text: error.to_string(),
    })
}
