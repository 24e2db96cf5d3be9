//! QEMU's command line, just far enough: which word is an option, and what `key=value,...` says.

use serde_json::{Map, Value};

/// Options that take no value. Every other one takes the next word.
const FLAGS: &[&str] = &[
    "S",
    "s",
    "h",
    "help",
    "version",
    "nodefaults",
    "no-user-config",
    "nographic",
    "daemonize",
    "enable-kvm",
    "no-acpi",
    "no-hpet",
    "no-reboot",
    "no-shutdown",
    "full-screen",
    "snapshot",
    "win2k-hack",
    "no-fd-bootchk",
    "usb",
    "only-migratable",
    "mem-prealloc",
    "singlestep",
    "one-insn-per-tb",
    "preconfig",
    "xen-attach",
    "xen-domid-restrict",
    "alt-grab",
    "ctrl-grab",
    "no-quit",
    "enable-sync-profile",
    "perfmap",
    "jitdump",
    "async-teardown",
    "semihosting",
    "portrait",
    "old-param",
];

/// One option of a command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuOption {
    /// Without its dashes; empty for a bare word, which QEMU takes as a disk image.
    pub name: String,
    pub value: Option<String>,
}

impl QemuOption {
    pub fn new(name: &str, value: &str) -> QemuOption {
        QemuOption {
            name: name.to_owned(),
            value: Some(value.to_owned()),
        }
    }

    pub fn flag(name: &str) -> QemuOption {
        QemuOption {
            name: name.to_owned(),
            value: None,
        }
    }

    /// The words that it is on a command line.
    pub fn words(&self) -> impl Iterator<Item = String> + '_ {
        // QEMU takes one dash or two; a name that begins with one needs both.
        let dashes = if self.name.starts_with('-') {
            "--"
        } else {
            "-"
        };
        let dashed = (!self.name.is_empty()).then(|| format!("{dashes}{}", self.name));
        dashed.into_iter().chain(self.value.clone())
    }

    /// The value as keys; `implied` names the first one if it is not written out.
    pub fn keys(&self, implied: &str) -> Keys {
        Keys::parse(self.value.as_deref().unwrap_or(""), implied)
    }
}

/// Splits the words after the program's name.
pub fn parse_options(words: &[String]) -> Vec<QemuOption> {
    let mut words = words.iter();
    let mut options = Vec::new();
    while let Some(word) = words.next() {
        let name = match word.strip_prefix('-') {
            Some(name) if !matches!(name, "" | "-") => name.strip_prefix('-').unwrap_or(name),
            _ => {
                options.push(QemuOption::new("", word));
                continue;
            }
        };
        let value = match FLAGS.contains(&name) {
            true => None,
            false => words.next().cloned(),
        };
        options.push(QemuOption {
            name: name.to_owned(),
            value,
        });
    }
    options
}

/// What `key=value,key=value` or a JSON object says, in order; later keys win.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    pairs: Vec<(String, String)>,
    /// The same with its types, if it was written as JSON.
    json: Option<Map<String, Value>>,
}

impl Keys {
    fn parse(text: &str, implied: &str) -> Keys {
        if text.starts_with('{')
            && let Ok(object) = serde_json::from_str::<Map<String, Value>>(text)
        {
            let pairs = object
                .iter()
                .map(|(key, value)| (key.clone(), json_text(value)));
            return Keys {
                pairs: pairs.collect(),
                json: Some(object),
            };
        }
        let mut pairs = Vec::new();
        for (at, item) in split_commas(text).into_iter().enumerate() {
            match item.split_once('=') {
                Some((key, value)) => pairs.push((key.to_owned(), value.to_owned())),
                None if at == 0 => pairs.push((implied.to_owned(), item)),
                // A key alone means `on`, with `no` before it `off`.
                None => pairs.push((item, "on".to_owned())),
            }
        }
        Keys { pairs, json: None }
    }

    pub fn get(&self, key: &str) -> Option<&str> {
        let found = self.pairs.iter().rev().find(|(k, _)| k == key);
        found.map(|(_, value)| value.as_str())
    }

    /// All values of a key that may be given several times, such as `hostfwd`.
    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> + 'a {
        self.pairs
            .iter()
            .filter(move |(k, _)| k == key)
            .map(|(_, value)| value.as_str())
    }

    pub fn is_on(&self, key: &str) -> bool {
        matches!(self.get(key), Some("on" | "true" | "yes" | "y"))
    }

    pub fn set(&mut self, key: &str, value: &str) {
        self.remove(key);
        if let Some(object) = &mut self.json {
            let value = match value {
                "on" => Value::Bool(true),
                "off" => Value::Bool(false),
                text => Value::String(text.to_owned()),
            };
            object.insert(key.to_owned(), value);
        }
        self.pairs.push((key.to_owned(), value.to_owned()));
    }

    pub fn remove(&mut self, key: &str) {
        self.pairs.retain(|(k, _)| k != key);
        if let Some(object) = &mut self.json {
            object.remove(key);
        }
    }

    /// The same in QEMU's words. `implied` is the key that stands first without its name.
    pub fn to_text(&self, implied: &str) -> String {
        if let Some(object) = &self.json {
            return serde_json::to_string(object).expect("JSON values always serialise");
        }
        let words = self.pairs.iter().enumerate().map(|(at, (key, value))| {
            match at == 0 && key == implied {
                true => escape_commas(value),
                false => format!("{}={}", escape_commas(key), escape_commas(value)),
            }
        });
        words.collect::<Vec<_>>().join(",")
    }
}

/// QEMU writes a comma inside a value twice.
pub(super) fn escape_commas(value: &str) -> String {
    value.replace(',', ",,")
}

fn split_commas(text: &str) -> Vec<String> {
    let mut items = Vec::new();
    let mut item = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c != ',' {
            item.push(c);
        } else if chars.next_if_eq(&',').is_some() {
            item.push(',');
        } else {
            items.push(std::mem::take(&mut item));
        }
    }
    if !item.is_empty() {
        items.push(item);
    }
    items
}

fn json_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Bool(true) => "on".to_owned(),
        Value::Bool(false) => "off".to_owned(),
        other => other.to_string(),
    }
}

/// Bytes in QEMU's way of writing sizes (`512`, `1.5G`); a plain number counts `unit` bytes.
pub(super) fn parse_size(text: &str, unit: u64) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "" => unit,
        "b" | "B" => 1,
        "k" | "K" => 1 << 10,
        "m" | "M" => 1 << 20,
        "g" | "G" => 1 << 30,
        "t" | "T" => 1 << 40,
        _ => return None,
    };
    if let Ok(whole) = digits.parse::<u64>() {
        return whole.checked_mul(factor);
    }
    let (whole, fraction) = digits.split_once('.')?;
    // Exact in integers: a float would lose bytes of large sizes.
    let scale = 10u64.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let fraction = fraction.parse::<u64>().ok()?.checked_mul(factor)? / scale;
    whole
        .parse::<u64>()
        .ok()?
        .checked_mul(factor)?
        .checked_add(fraction)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn values_that_look_like_options_stay_values() {
        let options = parse_options(&words("-S --m 64 -append -S disk.img -nographic"));
        let expected = [
            QemuOption::flag("S"),
            QemuOption::new("m", "64"),
            QemuOption::new("append", "-S"),
            QemuOption::new("", "disk.img"),
            QemuOption::flag("nographic"),
        ];
        assert_eq!(options, expected);
        let again: Vec<String> = options.iter().flat_map(QemuOption::words).collect();
        assert_eq!(again, words("-S -m 64 -append -S disk.img -nographic"));
    }

    #[test]
    fn keys_survive_commas_and_json() {
        let keys = Keys::parse("memory-backend-file,id=a,mem-path=/x,,y,share", "qom-type");
        assert_eq!(keys.get("qom-type"), Some("memory-backend-file"));
        assert_eq!(keys.get("mem-path"), Some("/x,y"));
        assert!(keys.is_on("share"));
        assert_eq!(
            keys.to_text("qom-type"),
            "memory-backend-file,id=a,mem-path=/x,,y,share=on"
        );
        let mut keys = Keys::parse(
            r#"{"qom-type":"memory-backend-ram","id":"7","size":65536,"share":false}"#,
            "x",
        );
        assert!(!keys.is_on("share"));
        keys.set("share", "on");
        let object: Value = serde_json::from_str(&keys.to_text("x")).unwrap();
        assert_eq!(object["share"], true);
        assert_eq!(object["size"], 65536);
        assert_eq!(object["id"], "7");
        let forwards = Keys::parse("user,id=n,hostfwd=tcp::1-:2,hostfwd=tcp::3-:4", "type");
        assert_eq!(
            forwards.all("hostfwd").collect::<Vec<_>>(),
            ["tcp::1-:2", "tcp::3-:4"]
        );
    }

    #[test]
    fn sizes_are_read_as_qemu_reads_them() {
        assert_eq!(parse_size("64", 1 << 20), Some(64 << 20));
        assert_eq!(parse_size("1.5G", 1 << 20), Some(3 << 29));
        assert_eq!(parse_size("64M", 1), Some(64 << 20));
        for wrong in ["", "x", "1X", "1.", ".5G", "99999999999T", "-1"] {
            assert_eq!(parse_size(wrong, 1 << 20), None, "{wrong}");
        }
    }
}
