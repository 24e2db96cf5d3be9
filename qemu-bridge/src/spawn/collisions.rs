//! What a command line wants on this host that somebody else has already.
//!
//! A standby is often tried out beside its primary, with the same line. QEMU would exit on some
//! collisions; on others it would silently do harm: a second `-serial file:` truncates the first's file, a second
//! socket takes the first's place, and two guests on one RAM file are the end of both. Disk images have QEMU's own
//! locks. Host-side options may differ between the two hosts, so the cure is always another port or path.

use std::fs;
use std::io::ErrorKind;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::options::{Keys, QemuOption, parse_options};
use crate::qmp::dial;
use crate::refusals::Refusal;

/// VNC's display 0.
const VNC_PORT: u32 = 5900;

/// Something on the host that a QEMU would take for itself.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Resource {
    Tcp {
        host: String,
        port: String,
    },
    Udp {
        host: String,
        port: String,
    },
    /// A socket that QEMU listens on.
    Socket {
        path: String,
    },
    /// A file that QEMU writes.
    File {
        path: String,
    },
}

/// Looks for everything in `argv` that is taken. What is free now may be taken when QEMU starts;
/// then QEMU says so.
pub fn find_collisions(argv: &[String]) -> Vec<Refusal> {
    let options = parse_options(argv.get(1..).unwrap_or_default());
    let wanted = options
        .iter()
        .flat_map(|o| resources(o).into_iter().map(move |r| (o, r)));
    wanted
        .filter_map(|(option, resource)| {
            let why = resource.taken()?;
            Some(Refusal {
                name: option.words().collect::<Vec<_>>().join(" "),
                why,
                cure: format!(
                    "host-side options may differ on the standby: use another {}",
                    resource.kind()
                ),
            })
        })
        .collect()
}

impl Resource {
    fn kind(&self) -> &'static str {
        match self {
            Resource::Tcp { .. } | Resource::Udp { .. } => "port",
            Resource::Socket { .. } | Resource::File { .. } => "path",
        }
    }

    /// Why it can't be had, if so.
    fn taken(&self) -> Option<String> {
        match self {
            Resource::Tcp { host, port } => bind_failure(
                TcpListener::bind(address(host, port)?),
                &format!("TCP port {port}"),
            ),
            Resource::Udp { host, port } => bind_failure(
                UdpSocket::bind(address(host, port)?),
                &format!("UDP port {port}"),
            ),
            Resource::Socket { path } => listens(path)
                .then(|| format!("another program listens on {path}, and would be cut off")),
            Resource::File { path } => {
                let (pid, name) = writer_of(Path::new(path))?;
                Some(format!(
                    "{path} is open in {name} (process {pid}), and would be overwritten"
                ))
            }
        }
    }
}

/// Whether a program listens there, also one that is too busy to accept.
fn listens(path: &str) -> bool {
    match dial(Path::new(path)) {
        Ok(_) => true,
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}

/// A name that can't be resolved is left to QEMU to complain about.
fn address(host: &str, port: &str) -> Option<(String, u16)> {
    let host = if host.is_empty() { "0.0.0.0" } else { host };
    Some((host.trim_matches(['[', ']']).to_owned(), port.parse().ok()?))
}

fn bind_failure<T>(result: std::io::Result<T>, what: &str) -> Option<String> {
    match result.err()?.kind() {
        ErrorKind::AddrInUse => Some(format!("{what} is taken")),
        ErrorKind::PermissionDenied => Some(format!("{what} may not be opened by this user")),
        ErrorKind::AddrNotAvailable => Some(format!("{what}: this host doesn't have the address")),
        _ => None,
    }
}

/// Another process that has the file open for writing.
fn writer_of(path: &Path) -> Option<(i32, String)> {
    let file = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    let own = i32::try_from(std::process::id()).ok()?;
    let pids = fs::read_dir("/proc")
        .ok()?
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let writes = |pid: i32| {
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            return false;
        };
        entries.flatten().any(|entry| {
            let same = fs::metadata(entry.path())
                .is_ok_and(|m| (m.dev(), m.ino()) == (file.dev(), file.ino()));
            same && is_open_for_writing(pid, &entry.file_name().to_string_lossy())
        })
    };
    let pid = pids.filter(|pid| *pid != own).find(|pid| writes(*pid))?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some((pid, name.trim().to_owned()))
}

fn is_open_for_writing(pid: i32, fd: &str) -> bool {
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
    let flags = info.lines().find_map(|l| l.strip_prefix("flags:"));
    let flags = flags
        .and_then(|f| i32::from_str_radix(f.trim(), 8).ok())
        .unwrap_or(0);
    flags & libc::O_ACCMODE != libc::O_RDONLY
}

/// What one option takes on the host.
fn resources(option: &QemuOption) -> Vec<Resource> {
    let value = option.value.as_deref().unwrap_or("");
    match option.name.as_str() {
        "netdev" | "nic" | "net" => option
            .keys("type")
            .all("hostfwd")
            .filter_map(forwarded_port)
            .collect(),
        "qmp" | "qmp-pretty" | "monitor" | "serial" | "parallel" | "debugcon" | "gdb" => {
            character_device(value)
        }
        "chardev" => chardev(&option.keys("backend")),
        "vnc" => display(value.split(',').next().unwrap_or("")),
        "spice" => spice(&option.keys("port")),
        "s" => vec![Resource::Tcp {
            host: String::new(),
            port: "1234".to_owned(),
        }],
        "pidfile" | "D" => vec![Resource::File {
            path: value.to_owned(),
        }],
        "object" => ram_file(&option.keys("qom-type")),
        _ => Vec::new(),
    }
}

/// `tcp:[ADDRESS]:PORT-[GUEST ADDRESS]:PORT`
fn forwarded_port(rule: &str) -> Option<Resource> {
    let (outside, _) = rule.split_once('-')?;
    let (protocol, outside) = outside.split_once(':')?;
    let (host, port) = outside.rsplit_once(':')?;
    let (host, port) = (host.to_owned(), port.to_owned());
    match protocol {
        "tcp" | "" => Some(Resource::Tcp { host, port }),
        "udp" => Some(Resource::Udp { host, port }),
        _ => None,
    }
}

/// The old way of writing a character device: `unix:PATH,server=on`, `tcp:HOST:PORT,server`, `file:PATH`.
fn character_device(value: &str) -> Vec<Resource> {
    let value = value.strip_prefix("mon:").unwrap_or(value);
    let keys = QemuOption::new("", value).keys("device");
    let Some((kind, rest)) = value
        .split(',')
        .next()
        .and_then(|device| device.split_once(':'))
    else {
        return Vec::new();
    };
    let listens = keys.is_on("server");
    match kind {
        "unix" if listens => vec![Resource::Socket {
            path: rest.to_owned(),
        }],
        "tcp" | "telnet" | "websocket" if listens => tcp(rest),
        "file" => vec![Resource::File {
            path: rest.to_owned(),
        }],
        _ => Vec::new(),
    }
}

fn tcp(address: &str) -> Vec<Resource> {
    let Some((host, port)) = address.rsplit_once(':') else {
        return Vec::new();
    };
    vec![Resource::Tcp {
        host: host.to_owned(),
        port: port.to_owned(),
    }]
}

fn chardev(keys: &Keys) -> Vec<Resource> {
    let text = |key: &str| keys.get(key).map(str::to_owned);
    let mut found: Vec<Resource> = text("logfile")
        .into_iter()
        .map(|path| Resource::File { path })
        .collect();
    match (keys.get("backend"), text("path"), text("port")) {
        (Some("file"), Some(path), _) => found.push(Resource::File { path }),
        (Some("socket"), Some(path), _) if keys.is_on("server") => {
            found.push(Resource::Socket { path })
        }
        (Some("socket"), None, Some(port)) if keys.is_on("server") => {
            found.push(Resource::Tcp {
                host: text("host").unwrap_or_default(),
                port,
            });
        }
        _ => {}
    }
    found
}

/// `unix:PATH`, or `[HOST]:DISPLAY`.
fn display(value: &str) -> Vec<Resource> {
    if let Some(path) = value.strip_prefix("unix:") {
        return vec![Resource::Socket {
            path: path.to_owned(),
        }];
    }
    let Some((host, number)) = value.rsplit_once(':') else {
        return Vec::new();
    };
    let port = number
        .parse::<u32>()
        .ok()
        .and_then(|n| n.checked_add(VNC_PORT));
    let port = port.map(|p| Resource::Tcp {
        host: host.to_owned(),
        port: p.to_string(),
    });
    port.into_iter().collect()
}

fn spice(keys: &Keys) -> Vec<Resource> {
    let host = keys.get("addr").unwrap_or("");
    let ports = ["port", "tls-port"]
        .into_iter()
        .filter_map(|key| keys.get(key));
    ports
        .map(|port| Resource::Tcp {
            host: host.to_owned(),
            port: port.to_owned(),
        })
        .collect()
}

/// RAM in a named file: shared by two guests it would be nobody's.
fn ram_file(keys: &Keys) -> Vec<Resource> {
    let path = match keys.get("qom-type") {
        Some("memory-backend-file") => keys.get("mem-path"),
        _ => None,
    };
    let own = |path: &&str| !path.starts_with("/proc/self/fd/");
    path.filter(own)
        .map(|path| Resource::File {
            path: path.to_owned(),
        })
        .into_iter()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::process::{Command, Stdio};
    use std::thread;
    use std::time::{Duration, Instant};

    fn argv(words: &[&str]) -> Vec<String> {
        std::iter::once("qemu")
            .chain(words.iter().copied())
            .map(str::to_owned)
            .collect()
    }

    fn wanted(words: &[&str]) -> Vec<Resource> {
        parse_options(&argv(words)[1..])
            .iter()
            .flat_map(resources)
            .collect()
    }

    fn on_tcp(host: &str, port: &str) -> Resource {
        Resource::Tcp {
            host: host.to_owned(),
            port: port.to_owned(),
        }
    }

    #[test]
    fn every_way_of_asking_is_understood() {
        let socket = |path: &str| Resource::Socket {
            path: path.to_owned(),
        };
        let file = |path: &str| Resource::File {
            path: path.to_owned(),
        };
        let cases: &[(&[&str], &[Resource])] = &[
            (
                &[
                    "-nic",
                    "user,hostfwd=tcp::2222-:22,hostfwd=tcp:127.0.0.1:80-10.0.2.15:80",
                ],
                &[on_tcp("", "2222"), on_tcp("127.0.0.1", "80")],
            ),
            (
                &["-netdev", "user,id=n,hostfwd=udp::53-:53"],
                &[Resource::Udp {
                    host: String::new(),
                    port: "53".to_owned(),
                }],
            ),
            (&["-qmp", "unix:/a,server=on,wait=off"], &[socket("/a")]),
            (&["-monitor", "unix:/a,server,nowait"], &[socket("/a")]),
            (
                &["-serial", "mon:telnet:127.0.0.1:4444,server=on"],
                &[on_tcp("127.0.0.1", "4444")],
            ),
            (&["-serial", "tcp:other:4444"], &[]),
            (&["-serial", "file:/log"], &[file("/log")]),
            (
                &["-chardev", "socket,id=c,path=/b,server=on,logfile=/l"],
                &[file("/l"), socket("/b")],
            ),
            (
                &["-chardev", "socket,id=c,host=::1,port=9,server=on"],
                &[on_tcp("::1", "9")],
            ),
            (&["-vnc", ":1"], &[on_tcp("", "5901")]),
            (&["-vnc", "unix:/v"], &[socket("/v")]),
            (
                &["-spice", "port=3001,disable-ticketing=on"],
                &[on_tcp("", "3001")],
            ),
            (&["-s", "-pidfile", "/p"], &[on_tcp("", "1234"), file("/p")]),
            (
                &[
                    "-object",
                    "memory-backend-file,id=m,size=1M,mem-path=/dev/shm/x",
                ],
                &[file("/dev/shm/x")],
            ),
            (
                &[
                    "-object",
                    "memory-backend-file,id=m,size=1M,mem-path=/proc/self/fd/9",
                ],
                &[],
            ),
            (
                &["-serial", "stdio", "-nographic", "-append", "file:/x"],
                &[],
            ),
        ];
        for (words, expected) in cases {
            assert_eq!(wanted(words), *expected, "{words:?}");
        }
    }

    /// Another test's child has what was just closed here until its exec: asked again for a while.
    fn assert_free(words: &[&str]) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !find_collisions(&argv(words)).is_empty() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(find_collisions(&argv(words)), []);
    }

    #[test]
    fn taken_ports_and_sockets_are_named_and_free_ones_are_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let forward = format!("user,hostfwd=tcp:127.0.0.1:{port}-:22");
        let found = find_collisions(&argv(&["-nic", &forward]));
        assert_eq!(found.len(), 1);
        assert!(
            found[0]
                .to_string()
                .contains(&format!("TCP port {port} is taken")),
            "{}",
            found[0]
        );
        drop(listener);
        assert_free(&["-nic", &forward]);

        let path = std::env::temp_dir().join(format!("ft-collision-{}", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let socket = format!("unix:{},server=on", path.display());
        assert_eq!(find_collisions(&argv(&["-qmp", &socket])).len(), 1);
        drop(listener);
        // What is left is only a name, which QEMU replaces.
        assert_free(&["-qmp", &socket]);
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn file_that_another_process_writes_is_named_with_it() {
        let path = std::env::temp_dir().join(format!("ft-log-{}", std::process::id()));
        let log = fs::File::create(&path).unwrap();
        let serial = format!("file:{}", path.display());
        // That we have it open ourselves is no collision.
        assert_eq!(find_collisions(&argv(&["-serial", &serial])), []);
        let mut other = Command::new("sleep")
            .arg("60")
            .stdout(Stdio::from(log))
            .spawn()
            .unwrap();
        let found = find_collisions(&argv(&["-serial", &serial]));
        other.kill().unwrap();
        other.wait().unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!(found.len(), 1);
        assert!(found[0].why.contains("sleep"), "{}", found[0]);
    }
}
