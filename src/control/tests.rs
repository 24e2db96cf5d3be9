use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::thread::{self, JoinHandle};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::*;
use crate::cli::{Operation, Target};
use crate::exit::Exit;

/// A path for a socket, in a directory that is gone when the test ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let dir = std::env::temp_dir().join(format!("cr-control-{name}-{}", std::process::id()));
        Scratch(dir)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("deep/c.sock")
    }

    fn target(&self) -> Target {
        Target {
            control: Some(self.socket()),
            ..Target::default()
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A daemon: serves until it is told to detach.
fn serve(mut server: ControlServer) -> JoinHandle<Vec<Request>> {
    thread::spawn(move || {
        let mut asked = Vec::new();
        while asked.last() != Some(&Request::Detach) {
            turn(&mut server, &mut asked);
        }
        server.end("detached", 0);
        asked
    })
}

/// Waits for whatever comes next, and answers it.
fn turn(server: &mut ControlServer, asked: &mut Vec<Request>) {
    let mut fds: Vec<_> = server
        .fds()
        .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
        .collect();
    poll(&mut fds, PollTimeout::NONE).unwrap();
    drop(fds);
    server.progress(&mut |request| {
        asked.push(request);
        let rehearsals = asked.iter().filter(|r| **r == Request::Rehearse).count();
        match request {
            Request::Status => json!({
                "mode": "primary", "protected": true, "rehearsals": rehearsals,
                "rehearsal": { "ok": true, "text": "it started", "age_us": 1 },
            }),
            Request::Switchover => json!({ "error": "no backup" }),
            _ => json!({ "accepted": true }),
        }
    });
}

#[test]
fn an_operator_asks_and_is_answered() {
    let scratch = Scratch::new("ask");
    let daemon = serve(ControlServer::bind(&scratch.socket()).unwrap());
    let target = || scratch.target();
    let run = |operation| run(operation).unwrap();
    assert_eq!(
        run(Operation::Status {
            json: false,
            target: target()
        }),
        Exit::Clean
    );
    assert_eq!(
        run(Operation::Status {
            json: true,
            target: target()
        }),
        Exit::Clean
    );
    assert_eq!(run(Operation::Rehearse { target: target() }), Exit::Clean);
    assert_eq!(run(Operation::Continue { target: target() }), Exit::Clean);
    assert_eq!(
        run(Operation::Switchover { target: target() }),
        Exit::Refused
    );
    // Returns when the daemon has ended.
    assert_eq!(run(Operation::Detach { target: target() }), Exit::Clean);
    let asked = daemon.join().unwrap();
    use Request::{Continue, Detach, Rehearse, Status, Switchover};
    // Before a command the client looks whether it makes sense; after a rehearsal, how it went.
    let status = [Status, Status];
    let rehearse = [Status, Rehearse, Status];
    let others = [Continue, Switchover, Detach].map(|command| [Status, command]);
    assert_eq!(
        asked,
        [&status[..], &rehearse, others.as_flattened()].concat()
    );
    assert!(!scratch.socket().exists());
}

#[test]
fn an_end_that_was_not_asked_for_is_no_success() {
    let scratch = Scratch::new("end");
    let detach = || {
        crate::control::run(Operation::Detach {
            target: scratch.target(),
        })
    };
    let until_detach = |mut server: ControlServer| {
        let mut asked = Vec::new();
        while asked.last() != Some(&Request::Detach) {
            turn(&mut server, &mut asked);
        }
        server
    };
    let server = ControlServer::bind(&scratch.socket()).unwrap();
    let daemon = thread::spawn(move || until_detach(server).end("the backup has activated", 10));
    assert_eq!(detach().unwrap(), Exit::Other);
    daemon.join().unwrap();

    let server = ControlServer::bind(&scratch.socket()).unwrap();
    let daemon = thread::spawn(move || drop(until_detach(server)));
    let died = detach().unwrap_err().to_string();
    assert!(died.contains("has died"), "{died}");
    daemon.join().unwrap();
}

#[test]
fn only_its_user_can_open_it() {
    let scratch = Scratch::new("mode");
    let _server = ControlServer::bind(&scratch.socket()).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&scratch.socket()), 0o600);
    assert_eq!(mode(&scratch.0), 0o700);
}

#[test]
fn garbage_gets_an_answer_or_is_let_go_and_the_next_one_is_served() {
    let scratch = Scratch::new("garbage");
    let daemon = serve(ControlServer::bind(&scratch.socket()).unwrap());
    let connect = || UnixStream::connect(scratch.socket()).unwrap();
    let answer = |stream: UnixStream| {
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        line
    };
    let lines: [&[u8]; 7] = [
        b"\n",
        b"status\n",
        b"{}\n",
        b"{\"command\":\"fly\"}\n",
        b"{\"command\":[[[[[[[[[[[[[[[[[[[[\n",
        b"\xff\xfe\x00\n",
        b"[1,2]\n",
    ];
    for line in lines {
        let mut stream = connect();
        stream.write_all(line).unwrap();
        assert!(answer(stream).contains("not understood"), "{line:?}");
    }
    // A line that never ends.
    let mut stream = connect();
    stream.write_all(&[b'x'; LINE_BYTES_MAX]).unwrap();
    let mut all = String::new();
    stream.read_to_string(&mut all).unwrap();
    assert!(all.contains("at most 4096 bytes"), "{all}");
    // Hanging up in the middle of one.
    connect().write_all(b"{\"comm").unwrap();
    // In pieces, and two at once.
    let mut stream = connect();
    for piece in [
        "{\"command\":",
        "\"status\"}",
        "\n{\"command\":\"rehearse\"}\n",
    ] {
        stream.write_all(piece.as_bytes()).unwrap();
    }
    let mut reader = BufReader::new(stream);
    for expected in ["protected", "accepted"] {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert!(line.contains(expected), "{line}");
    }
    crate::control::run(Operation::Detach {
        target: scratch.target(),
    })
    .unwrap();
    assert_eq!(
        daemon.join().unwrap(),
        [
            Request::Status,
            Request::Rehearse,
            Request::Status,
            Request::Detach
        ]
    );
}

#[test]
fn there_is_a_bound_on_connections_and_silent_ones_give_way() {
    let scratch = Scratch::new("many");
    let mut server = ControlServer::bind(&scratch.socket()).unwrap();
    let nobody_asks = &mut |_| panic!("nobody asks");
    let mut clients = Vec::new();
    for _ in 0..100 {
        clients.push(UnixStream::connect(scratch.socket()).unwrap());
        server.progress(nobody_asks);
    }
    assert_eq!(server.connections.len(), CONNECTIONS_MAX);
    assert_eq!(server.fds().count(), CONNECTIONS_MAX + 1);
    let mut said = String::new();
    clients[99].read_to_string(&mut said).unwrap();
    assert!(said.contains("too many"), "{said}");

    server.connections[3].heard -= IDLE;
    let _new = UnixStream::connect(scratch.socket()).unwrap();
    server.progress(nobody_asks);
    assert_eq!(server.connections.len(), CONNECTIONS_MAX);
    assert!(
        server
            .connections
            .iter()
            .all(|connection| connection.silence() < IDLE)
    );
    drop(clients);
    server.progress(nobody_asks);
    assert_eq!(server.connections.len(), 1);
}

#[test]
fn a_client_that_does_not_read_is_let_go() {
    let scratch = Scratch::new("deaf");
    let mut server = ControlServer::bind(&scratch.socket()).unwrap();
    let mut deaf = UnixStream::connect(scratch.socket()).unwrap();
    deaf.set_nonblocking(true).unwrap();
    let long = "x".repeat(8000);
    for _ in 0..1000 {
        let _ = deaf.write(b"{\"command\":\"status\"}\n");
        server.progress(&mut |_| json!({ "text": long }));
        if server.connections.is_empty() {
            return;
        }
    }
    panic!("it is still there");
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let scratch = Scratch::new("stale");
    let first = ControlServer::bind(&scratch.socket()).unwrap();
    let error = ControlServer::bind(&scratch.socket()).unwrap_err();
    let owner = format!("another daemon (process {}) has", std::process::id());
    assert!(error.to_string().contains(&owner), "{error}");
    drop(first);
    // As a killed daemon leaves it.
    drop(UnixListener::bind(scratch.socket()).unwrap());
    assert!(scratch.socket().exists());
    let second = ControlServer::bind(&scratch.socket()).unwrap();
    // Somebody else's is not removed.
    fs::remove_file(scratch.socket()).unwrap();
    let others = UnixListener::bind(scratch.socket()).unwrap();
    drop(second);
    assert!(scratch.socket().exists());
    drop(others);

    fs::remove_file(scratch.socket()).unwrap();
    fs::write(scratch.socket(), "precious").unwrap();
    let error = ControlServer::bind(&scratch.socket()).unwrap_err();
    assert!(error.to_string().contains("is no socket"), "{error}");
}

#[test]
fn a_path_that_is_too_long_is_explained() {
    let scratch = Scratch::new("long");
    let error = ControlServer::bind(&scratch.0.join("x".repeat(110))).unwrap_err();
    let error = format!("{:#}", anyhow::Error::new(error));
    assert!(
        error.contains("at most 107") && error.contains("--control"),
        "{error}"
    );
}

#[test]
fn a_daemon_that_hangs_is_said_to_and_not_waited_for() {
    let scratch = Scratch::new("hangs");
    let server = ControlServer::bind(&scratch.socket()).unwrap();
    // Nobody accepts: until the backlog is full, that looks like an answer that takes its time.
    let mut waiting = Vec::new();
    let full = loop {
        match dial(&scratch.socket()) {
            Ok(stream) => waiting.push(stream),
            Err(error) => break error,
        }
    };
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
    let target = scratch.target();
    let shown = run(Operation::Status {
        json: false,
        target: target.clone(),
    });
    assert_eq!(shown.unwrap(), Exit::Other);
    let error = run(Operation::Rehearse { target }).unwrap_err();
    assert!(error.to_string().contains("hangs"), "{error:#}");
    let error = ControlServer::bind(&scratch.socket()).unwrap_err();
    assert!(
        error.to_string().contains("another daemon that hangs"),
        "{error}"
    );
    drop(server);
}

#[test]
fn one_that_does_not_answer_hides_no_other() {
    let (scratch, other) = (Scratch::new("starting"), Scratch::new("answers"));
    let _starting = ControlServer::bind(&scratch.socket()).unwrap();
    let daemon = serve(ControlServer::bind(&other.socket()).unwrap());
    let mut shown = String::new();
    let sockets = [scratch.socket(), other.socket()];
    let exit = client::show(&sockets, false, &mut |text| shown += text);
    assert_eq!(exit, Some(Exit::Other));
    let rows: Vec<_> = shown.lines().collect();
    assert!(
        rows[1].starts_with("  no answer   ") && rows[1].contains("is starting, or hangs"),
        "{shown}"
    );
    assert!(rows[4].starts_with("  protected   yes"), "{shown}");
    let target = other.target();
    run(Operation::Detach { target }).unwrap();
    daemon.join().unwrap();
}

#[test]
fn what_the_daemon_would_refuse_is_refused_with_a_reason() {
    let scratch = Scratch::new("unprotected");
    let mut server = ControlServer::bind(&scratch.socket()).unwrap();
    let target = scratch.target();
    let asked = thread::spawn(move || {
        run(Operation::Switchover {
            target: target.clone(),
        })
        .unwrap()
    });
    let mut requests = Vec::new();
    while !asked.is_finished() {
        server.progress(&mut |request| {
            requests.push(request);
            json!({ "mode": "primary", "protected": false, "state": "syncing" })
        });
        thread::yield_now();
    }
    assert_eq!(asked.join().unwrap(), Exit::Refused);
    assert_eq!(requests, [Request::Status]);
}
