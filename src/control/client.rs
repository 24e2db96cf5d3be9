//! The operator's side: finds the daemon, asks it, and shows what it says.

use std::borrow::Cow;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::Value;

use super::{Request, dial};
use crate::cli::{ModeName, Operation, Target};
use crate::config::{control_socket, runtime_dir};
use crate::exit::Exit;

/// A daemon that is alive answers within milliseconds.
const ANSWER_PATIENCE: Duration = Duration::from_secs(5);
/// A switchover waits for an epoch and an activation; a detach for an acknowledgement.
const END_PATIENCE: Duration = Duration::from_secs(60);
/// A QEMU has to be started for it.
const REHEARSAL_PATIENCE: Duration = Duration::from_secs(60);
const REHEARSAL_POLL: Duration = Duration::from_millis(50);
const ANSWER_BYTES_MAX: u64 = 64 << 10;
/// The daemon is not there, or refuses: the exit code of both.
const NO: Exit = Exit::Refused;

/// Carries out a subcommand.
///
/// # Errors
/// The daemon can't be asked, or doesn't answer.
pub(crate) fn run(operation: Operation) -> anyhow::Result<Exit> {
    match operation {
        Operation::Status { json, target } => status(&target, json),
        Operation::Detach { target } => command(Request::Detach, &target),
        Operation::Switchover { target } => command(Request::Switchover, &target),
        Operation::Continue { target } => command(Request::Continue, &target),
        Operation::Doctor { qmp } => crate::doctor::run(&qmp),
        Operation::Rehearse { target } => command(Request::Rehearse, &target),
    }
}

fn status(target: &Target, json: bool) -> anyhow::Result<Exit> {
    let exit = show(&sockets(target)?, json, &mut say);
    Ok(exit.unwrap_or_else(|| {
        eprintln!("{}", nobody(target));
        NO
    }))
}

/// One that doesn't answer is no reason to leave out the others. `None`: nobody listens.
pub(super) fn show(sockets: &[PathBuf], json: bool, say: &mut dyn FnMut(&str)) -> Option<Exit> {
    let mut worst = None;
    for socket in sockets {
        let reply = match Daemon::connect(socket) {
            Ok(None) => continue,
            Ok(Some(mut daemon)) => daemon.ask(Request::Status),
            Err(error) => Err(error),
        };
        let gap = if worst.is_some() { "\n" } else { "" };
        match &reply {
            Ok(reply) if json => say(&format!("{reply}\n")),
            Ok(reply) => say(&format!("{gap}{}", table(socket, reply))),
            Err(error) if json => eprintln!("{error:#}"),
            Err(error) => say(&format!(
                "{gap}{}\n  no answer   {error:#}\n",
                title(socket)
            )),
        }
        let exit = match reply {
            Ok(reply) if reply["protected"] == true => Exit::Clean,
            Ok(_) => Exit::Other,
            Err(error) => Exit::of_error(&error),
        };
        worst = worst.filter(|worst| *worst != Exit::Clean).or(Some(exit));
    }
    worst
}

fn command(request: Request, target: &Target) -> anyhow::Result<Exit> {
    let mut daemons = find(target)?;
    if target.control.is_none() && target.mode.is_none() {
        // A command is for the primary; where there is none, for the backup.
        let primary = |daemon: &Daemon| socket_mode(&daemon.socket) == Some(ModeName::Primary);
        if daemons.iter().any(primary) {
            daemons.retain(primary);
        }
    }
    let mut daemon = match daemons.len() {
        0 => {
            eprintln!("{}", nobody(target));
            return Ok(NO);
        }
        1 => daemons.remove(0),
        _ => {
            let names: Vec<_> = daemons
                .iter()
                .map(|d| d.socket.display().to_string())
                .collect();
            eprintln!(
                "several daemons run here, say --vm-id or --control: {}",
                names.join(", ")
            );
            return Ok(Exit::Usage);
        }
    };
    // The daemon would do nothing either, but only its log would say so.
    let before = daemon.ask(Request::Status)?;
    if let Some(why) = obstacle(request, &before) {
        eprintln!("refused: {why}");
        return Ok(NO);
    }
    let reply = daemon.ask(request)?;
    if let Some(error) = reply["error"].as_str() {
        eprintln!("refused: {error}");
        return Ok(NO);
    }
    if let Some(why) = reply["waits"].as_str() {
        eprintln!("{why}");
    }
    match request {
        Request::Detach | Request::Switchover => daemon.wait_for_its_end(),
        Request::Continue => {
            say("asked for; `curling-rdma status` shows whether the guest runs\n");
            Ok(Exit::Clean)
        }
        Request::Rehearse => daemon.wait_for_rehearsal(&before["rehearsals"]),
        Request::Status => unreachable!("status has its own way"),
    }
}

/// Why a daemon with this status can't do what is requested.
fn obstacle(request: Request, status: &Value) -> Option<String> {
    let state = status["state"].as_str().unwrap_or("unknown");
    match (request, status["mode"].as_str()?) {
        (Request::Switchover | Request::Rehearse, "primary") if status["protected"] != true => {
            Some(format!(
                "the backup has no complete epoch to start from (state: {state})"
            ))
        }
        (Request::Continue, "primary") if status["link_up"] == true && status["fenced"] != true => {
            Some(
                "the backup answers, there is nothing to continue from; `curling-rdma detach` \
                 ends the protection"
                    .to_owned(),
            )
        }
        (Request::Detach, "backup") if state == "active" => Some(
            "this host runs the guest now, there is nothing to stand down from; SIGTERM to the \
             daemon powers the guest down"
                .to_owned(),
        ),
        _ => None,
    }
}

/// Like `print!`, for a reader that may go away: it has seen enough then.
fn say(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}

struct Daemon {
    socket: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Daemon {
    /// `None`: nobody listens there.
    fn connect(socket: &Path) -> anyhow::Result<Option<Daemon>> {
        use std::io::ErrorKind::{ConnectionRefused, NotFound, WouldBlock};
        match dial(socket) {
            Ok(stream) => {
                stream.set_read_timeout(Some(ANSWER_PATIENCE))?;
                Ok(Some(Daemon {
                    socket: socket.to_owned(),
                    stream: BufReader::new(stream),
                }))
            }
            Err(error) if matches!(error.kind(), ConnectionRefused | NotFound) => Ok(None),
            Err(error) if error.kind() == WouldBlock => {
                bail!(
                    "the daemon at {} is starting, or hangs: it takes no connections",
                    socket.display()
                )
            }
            Err(error) => Err(error).with_context(|| format!("connecting to {}", socket.display())),
        }
    }

    fn ask(&mut self, request: Request) -> anyhow::Result<Value> {
        let socket = self.socket.display();
        let mut line = serde_json::to_vec(&request).context("writing a request")?;
        line.push(b'\n');
        let asked = self.stream.get_mut().write_all(&line);
        asked.with_context(|| format!("asking the daemon at {socket}"))?;
        let mut answer = String::new();
        let read = self
            .stream
            .by_ref()
            .take(ANSWER_BYTES_MAX)
            .read_line(&mut answer);
        if read
            .as_ref()
            .is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
        {
            let seconds = ANSWER_PATIENCE.as_secs();
            // It listens before it starts a QEMU, or looks at one.
            bail!("the daemon at {socket} is starting, or hangs: no answer for {seconds} s");
        }
        read.with_context(|| format!("waiting for an answer of the daemon at {socket}"))?;
        if answer.is_empty() {
            bail!("the daemon at {socket} has ended");
        }
        let wrong = || format!("the daemon at {socket} answers in another language");
        serde_json::from_str(&answer).with_context(wrong)
    }

    /// The daemon counts rehearsals: one more than before is ours, or as new.
    fn wait_for_rehearsal(&mut self, before: &Value) -> anyhow::Result<Exit> {
        let deadline = Instant::now() + REHEARSAL_PATIENCE;
        loop {
            let status = self.ask(Request::Status)?;
            if status["rehearsals"] != *before {
                let rehearsal = &status["rehearsal"];
                let text = rehearsal["text"].as_str().unwrap_or_default();
                if rehearsal["ok"] == true {
                    say(&format!("a failover would work: {text}\n"));
                    return Ok(Exit::Clean);
                }
                eprintln!("a failover would NOT work: {text}");
                return Ok(Exit::Other);
            }
            if Instant::now() > deadline {
                let seconds = REHEARSAL_PATIENCE.as_secs();
                bail!("no result after {seconds} s: the log of the backup's daemon says why");
            }
            std::thread::sleep(REHEARSAL_POLL);
        }
    }

    /// The daemon's last word is how it ended.
    fn wait_for_its_end(self) -> anyhow::Result<Exit> {
        self.stream.get_ref().set_read_timeout(Some(END_PATIENCE))?;
        let mut answer = String::new();
        let read = self.stream.take(ANSWER_BYTES_MAX).read_line(&mut answer);
        if read.is_err() {
            let seconds = END_PATIENCE.as_secs();
            bail!("not done after {seconds} s: `curling-rdma status` and the log say why");
        }
        let last: Value = serde_json::from_str(&answer).unwrap_or_default();
        let Some(how) = last["ended"].as_str() else {
            bail!(
                "the daemon has died: its log, and `curling-rdma status` on the other host, say how far it came"
            );
        };
        if last["exit_code"] == Exit::Clean as u8 {
            say(&format!("{how}\n"));
            return Ok(Exit::Clean);
        }
        eprintln!("it ended otherwise: {how}");
        Ok(Exit::Other)
    }
}

/// The daemons that are meant, and that answer.
fn find(target: &Target) -> anyhow::Result<Vec<Daemon>> {
    let mut daemons = Vec::new();
    for socket in sockets(target)? {
        daemons.extend(Daemon::connect(&socket)?);
    }
    Ok(daemons)
}

fn sockets(target: &Target) -> anyhow::Result<Vec<PathBuf>> {
    if let Some(socket) = &target.control {
        return Ok(vec![socket.clone()]);
    }
    let modes = match target.mode {
        Some(mode) => vec![mode],
        None => vec![ModeName::Primary, ModeName::Backup],
    };
    if let Some(vm_id) = &target.vm_id {
        return Ok(modes
            .into_iter()
            .map(|mode| control_socket(vm_id, mode))
            .collect());
    }
    let dir = runtime_dir();
    let entries = match fs::read_dir(&dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| format!("looking for daemons in {}", dir.display()))?,
    };
    let meant = |path: &PathBuf| socket_mode(path).is_some_and(|mode| modes.contains(&mode));
    let mut sockets: Vec<_> = entries.flatten().map(|e| e.path()).filter(meant).collect();
    sockets.sort();
    Ok(sockets)
}

fn socket_mode(socket: &Path) -> Option<ModeName> {
    let name = socket.file_name()?.to_str()?;
    [ModeName::Primary, ModeName::Backup]
        .into_iter()
        .find(|mode| name.ends_with(&format!("-{}.sock", mode.as_str())))
}

fn nobody(target: &Target) -> String {
    match (&target.control, &target.vm_id) {
        (Some(socket), _) => format!("no daemon answers at {}", socket.display()),
        (None, Some(vm_id)) => format!("no daemon for the VM {vm_id:?} answers on this host"),
        (None, None) => format!(
            "no daemon answers in {}: is it another user's, or has it its own --control?",
            runtime_dir().display()
        ),
    }
}

/// The name of a daemon, for people.
fn title(socket: &Path) -> Cow<'_, str> {
    socket.file_stem().unwrap_or_default().to_string_lossy()
}

/// Is it protected, since when, and how far is the backup behind?
fn table(socket: &Path, reply: &Value) -> String {
    let name = title(socket);
    let mode = reply["mode"].as_str().unwrap_or("daemon");
    let protected = if reply["protected"] == true {
        "yes"
    } else {
        "NO"
    };
    let state = reply["state"].as_str().unwrap_or("?");
    let link = match &reply["link_lost_us"] {
        _ if reply["link_up"] == true => "up".to_owned(),
        Value::Null => "DOWN".to_owned(),
        lost => format!("LOST {} ago", age(lost)),
    };
    let mut rows = vec![
        (
            "protected",
            match (state, protected) {
                // What the state is then is the backup's to say.
                ("protected", "NO") => "NO (the link is lost)".to_owned(),
                _ => format!("{protected} ({state} for {})", age(&reply["state_age_us"])),
            },
        ),
        ("link", link),
        ("epoch", number(&reply["epoch"])),
    ];
    if mode == "primary" {
        let running = if reply["guest_running"] == true {
            "running"
        } else {
            "stopped"
        };
        let fenced = if reply["fenced"] == true {
            ": the backup is silent"
        } else {
            ""
        };
        rows.push(("behind", age(&reply["behind_us"])));
        let paused = reply["paused_percent"].as_f64();
        let paused = paused.map_or_else(String::new, |share| {
            format!(", paused {share} % of the time")
        });
        rows.push(("guest", format!("{running}{fenced}{paused}")));
        if reply["dropped_packets"].as_u64().is_some_and(|n| n > 0) {
            rows.push((
                "dropped",
                format!("{} packets", number(&reply["dropped_packets"])),
            ));
        }
    } else {
        rows.push(("applied", number(&reply["applied"])));
        rows.push(("silent for", age(&reply["silent_us"])));
    }
    rows.push(("term", number(&reply["term"])));
    rows.push(("rehearsal", rehearsal(&reply["rehearsal"])));
    let mut table = format!("{name}\n");
    for (title, value) in rows {
        table += &format!("  {title:<11} {value}\n");
    }
    table
}

fn rehearsal(value: &Value) -> String {
    match value["ok"].as_bool() {
        None => "none yet".to_owned(),
        Some(true) => format!("ok, {} ago", age(&value["age_us"])),
        Some(false) => {
            let text = value["text"].as_str().unwrap_or_default();
            format!("FAILED, {} ago: {text}", age(&value["age_us"]))
        }
    }
}

fn number(value: &Value) -> String {
    value
        .as_u64()
        .map_or_else(|| "-".to_owned(), |number| number.to_string())
}

fn age(value: &Value) -> String {
    let Some(us) = value.as_u64() else {
        return "-".to_owned();
    };
    let seconds = us / 1_000_000;
    match seconds {
        0 => format!("{:.1} ms", us as f64 / 1e3),
        1..=119 => format!("{:.1} s", us as f64 / 1e6),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_table_answers_the_questions() {
        let reply = json!({
            "mode": "primary", "state": "protected", "protected": true, "link_up": true,
            "state_age_us": 7_500_000_000_u64, "epoch": 41, "behind_us": 21_300, "term": 2,
            "guest_running": true, "fenced": false, "paused_percent": 11.5,
            "rehearsal": { "ok": true, "text": "it started", "age_us": 600_000_000_u64 },
        });
        let table = table(Path::new("/run/curling-rdma/web-primary.sock"), &reply);
        let expected = "web-primary\n  protected   yes (protected for 2 h 5 min)\n  \
                        link        up\n  epoch       41\n  behind      21.3 ms\n  \
                        guest       running, paused 11.5 % of the time\n  term        2\n  \
                        rehearsal   ok, 10 min ago\n";
        assert_eq!(table, expected);
    }

    #[test]
    fn a_table_tells_since_when_the_link_is_lost() {
        let mut reply = json!({
            "mode": "primary", "state": "protected", "protected": false, "link_up": false,
            "link_lost_us": 2_500_000,
        });
        let shown = |reply: &Value| table(Path::new("s"), reply);
        let lost = "  protected   NO (the link is lost)\n  link        LOST 2.5 s ago\n";
        assert!(shown(&reply).contains(lost));
        reply["link_lost_us"] = Value::Null;
        assert!(shown(&reply).contains("link        DOWN\n"));
    }

    #[test]
    fn a_table_survives_another_version_of_the_daemon() {
        let table = table(Path::new("s"), &json!({}));
        assert!(table.contains("protected   NO (? for -)"), "{table}");
    }

    #[test]
    fn what_can_not_be_done_is_known_before_it_is_asked_for() {
        let (switchover, rehearse) = (Request::Switchover, Request::Rehearse);
        let status = |mode: &str, state: &str, protected: bool| json!({ "mode": mode, "state": state, "protected": protected });
        let cases = [
            (switchover, status("primary", "syncing", false), true),
            (switchover, status("primary", "protected", true), false),
            (rehearse, status("primary", "unprotected", false), true),
            (rehearse, status("backup", "protecting", false), false),
            (
                Request::Detach,
                status("primary", "unprotected", false),
                false,
            ),
            (Request::Detach, status("backup", "active", false), true),
            (Request::Detach, status("backup", "waiting", false), false),
            (
                Request::Continue,
                status("primary", "unprotected", false),
                false,
            ),
            (
                Request::Continue,
                json!({ "mode": "primary", "link_up": true, "fenced": false }),
                true,
            ),
            (switchover, json!({ "error": "of another version" }), false),
        ];
        for (request, status, refused) in cases {
            assert_eq!(
                obstacle(request, &status).is_some(),
                refused,
                "{request:?} {status}"
            );
        }
    }

    #[test]
    fn ages_are_for_people() {
        let cases = [
            (json!(null), "-"),
            (json!(1500), "1.5 ms"),
            (json!(2_500_000), "2.5 s"),
            (json!(600_000_000_u64), "10 min"),
            (json!(864_000_000_000_u64), "10 d"),
        ];
        for (value, expected) in cases {
            assert_eq!(age(&value), expected);
        }
    }

    #[test]
    fn a_socket_that_nobody_serves_is_code_3() {
        let control = Some(PathBuf::from("/nonexistent/c.sock"));
        let target = Target {
            control,
            ..Target::default()
        };
        let exit = run(Operation::Status {
            json: true,
            target: target.clone(),
        })
        .unwrap();
        assert_eq!(exit as u8, 3);
        assert_eq!(run(Operation::Detach { target }).unwrap() as u8, 3);
    }

    #[test]
    fn the_mode_is_in_the_name() {
        let mode = |name: &str| socket_mode(Path::new(name));
        assert_eq!(mode("/run/x/web-primary.sock"), Some(ModeName::Primary));
        assert_eq!(mode("web-backup.sock"), Some(ModeName::Backup));
        assert_eq!(mode("web.sock"), None);
    }
}
