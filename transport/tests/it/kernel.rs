//! What the link does when the kernel kills its process or refuses it something.

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::PoisonError;
use std::time::Instant;

use transport::tcp::{Incoming, TcpConfig, TcpConnector, TcpError, TcpLink, ZeroCopy};
use transport::{Arena, Event, Lane, Link, LossKind};

use crate::conformance::{End, Seen, WATCHDOG, WHOLE, drive, filled, pattern, wait_readable};
use crate::tcp_pair;

const VICTIM: &str = "CURLING_TEST_VICTIM";

/// Kills a process that is busy on all lanes: the kernel closes the proof lane in good order, as
/// nothing was ever sent on it, whatever it does with the others.
#[test]
fn a_killed_process_is_proved_dead() {
    if let Ok(address) = std::env::var(VICTIM) {
        victim(address.parse().expect("an address"));
    }
    for round in 0..10 {
        let (mut listener, address) = tcp_pair::listener(&TcpConfig::default());
        let mut child = Command::new(std::env::current_exe().expect("procfs"))
            .args([
                "kernel::a_killed_process_is_proved_dead",
                "--exact",
                "--nocapture",
            ])
            .env(VICTIM, address.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the test binary runs");
        let mut end = End::new(tcp_pair::accept(&mut listener));
        let arena = Arena::new(64);
        // It pushes into each grant as soon as it hears of it.
        for _ in 0..32 {
            let chunk = arena.alloc().expect("a chunk");
            let grant = end.link.grant(chunk, 0).expect("grant");
            end.send(&grant.0);
        }
        let arrivals = |end: &End<TcpLink>| end.count(|it| matches!(it, Seen::Arrived { .. }));
        while arrivals(&end) < 1 + round {
            wait_readable(&[end.link.ready_fd()], WATCHDOG);
            end.progress();
        }
        let start = Instant::now();
        child.kill().expect("it is ours");
        let proof = loop {
            wait_readable(&[end.link.ready_fd()], WATCHDOG);
            end.progress();
            let losses = end.take_losses();
            if let Some(loss) = losses.into_iter().find(|it| it.lane == Lane::Proof) {
                break loss;
            }
        };
        println!("proof of death after {} us", start.elapsed().as_micros());
        child.wait().expect("it is ours");
        assert_eq!(proof.kind, LossKind::Fin);
    }
}

/// Pushes into every grant that it is sent, until it is killed.
fn victim(address: SocketAddr) -> ! {
    let mut connector =
        TcpConnector::start(address, tcp_pair::pairing(), &TcpConfig::default()).expect("start");
    let mut link = loop {
        wait_readable(&[connector.ready_fd()], WATCHDOG);
        if let Some(link) = connector.progress().expect("connector") {
            break link;
        }
    };
    let arena = Arena::new(64);
    loop {
        let mut grants = Vec::new();
        link.progress(&mut |event| match event {
            Event::Message(bytes) => {
                grants.push(transport::Grant(bytes.try_into().expect("a grant")));
            }
            // The test is gone before it could kill this process.
            Event::Lost(_) => std::process::exit(0),
            _ => {}
        })
        .expect("progress");
        for grant in grants {
            link.push(filled(&arena, WHOLE, 0), grant, 0).expect("push");
        }
        // Whether there is room for it doesn't matter: the lane is to be busy.
        let _ = link.send(&[0; 1000]);
        link.flush().expect("flush");
        wait_readable(&[link.ready_fd()], std::time::Duration::from_millis(1));
    }
}

/// Runs `body` in a thread that the kernel denies io_uring with `errno`.
fn without_io_uring<T: Send>(errno: i32, body: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                deny_io_uring(errno);
                body()
            })
            .join()
            .expect("the body ends")
    })
}

/// A seccomp filter for this thread: io_uring_setup fails with `errno`.
fn deny_io_uring(errno: i32) {
    let instruction = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let mut filter = [
        // The system call's number is the first word of seccomp_data.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            1,
            libc::SYS_io_uring_setup as u32,
        ),
        instruction(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | errno as u32,
        ),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the program and its filter live during the calls; both only affect this thread.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        assert_eq!(
            libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program),
            0
        );
    }
}

#[test]
fn a_kernel_without_io_uring_is_named() {
    let (mut listener, address) = tcp_pair::listener(&TcpConfig::default());
    for (errno, expected) in [
        (libc::EPERM, "kernel.io_uring_disabled"),
        (libc::ENOSYS, "Linux 6.1 or later"),
        (libc::EINVAL, "IORING_SETUP_DEFER_TASKRUN"),
    ] {
        let config = TcpConfig::default();
        let pairing = tcp_pair::pairing();
        let mut connector = TcpConnector::start(address, pairing, &config).expect("start");
        let error = std::thread::scope(|scope| {
            let connecting = scope.spawn(|| {
                without_io_uring(errno, move || {
                    loop {
                        wait_readable(&[connector.ready_fd()], WATCHDOG);
                        match connector.progress() {
                            Ok(None) => {}
                            Ok(Some(_)) => panic!("io_uring works here"),
                            Err(error) => return error,
                        }
                    }
                })
            });
            let mut accepted = false;
            while !accepted {
                wait_readable(&[listener.ready_fd()], WATCHDOG);
                listener
                    .progress(&mut |incoming| accepted |= matches!(incoming, Incoming::Link(_)))
                    .expect("listener");
            }
            connecting.join().expect("it ends")
        });
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn an_acceptor_without_io_uring_tells_the_connector() {
    let config = TcpConfig::default();
    let (mut listener, address) = tcp_pair::listener(&config);
    let pairing = tcp_pair::pairing();
    let mut connector = TcpConnector::start(address, pairing, &config).expect("start");
    let told = std::thread::scope(|scope| {
        scope.spawn(|| {
            without_io_uring(libc::EPERM, move || {
                let mut refused = None;
                while refused.is_none() {
                    wait_readable(&[listener.ready_fd()], WATCHDOG);
                    listener
                        .progress(&mut |incoming| match incoming {
                            Incoming::Refused { reason, .. } => refused = Some(reason),
                            Incoming::Link(_) => panic!("io_uring works here"),
                        })
                        .expect("listener");
                }
            });
        });
        loop {
            wait_readable(&[connector.ready_fd()], WATCHDOG);
            match connector.progress() {
                Ok(None) => {}
                Ok(Some(_)) => panic!("there is nobody to link with"),
                Err(error) => return error,
            }
        }
    });
    match told {
        TcpError::Refused { reason } => {
            assert!(reason.contains("io_uring is forbidden"), "{reason}")
        }
        other => panic!("{other:?}"),
    }
}

/// Takes CAP_IPC_LOCK from this thread. Without it RLIMIT_MEMLOCK counts.
fn drop_ipc_lock() {
    const CAP_IPC_LOCK: u32 = 14;
    const VERSION_3: u32 = 0x2008_0522;
    let mut header = [VERSION_3, 0];
    // Effective, permitted and inheritable, of the low and the high capabilities.
    let mut sets = [[0u32; 3]; 2];
    // SAFETY: header and sets have the layout of version 3 and live during the calls; 0 is this
    // thread.
    unsafe {
        assert_eq!(
            libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()),
            0
        );
        for set in &mut sets[0] {
            *set &= !(1 << CAP_IPC_LOCK);
        }
        assert_eq!(
            libc::syscall(libc::SYS_capset, header.as_mut_ptr(), sets.as_ptr()),
            0
        );
    }
}

/// Runs `body` in a thread that can lock at most `bytes` of memory.
fn with_lockable<T: Send + 'static>(bytes: u64, body: impl FnOnce() -> T + Send + 'static) -> T {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};

    // The limit is the whole process's: one test at a time.
    static LIMIT: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _turn = LIMIT.lock().unwrap_or_else(PoisonError::into_inner);
    let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).expect("getrlimit");
    setrlimit(Resource::RLIMIT_MEMLOCK, bytes.min(hard), hard).expect("setrlimit");
    // Only this thread lacks the capability that makes the limit not count, if the process has it.
    let done = std::thread::spawn(|| {
        drop_ipc_lock();
        body()
    })
    .join();
    setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard).expect("setrlimit");
    done.expect("the body ends")
}

#[test]
fn without_lockable_memory_chunks_are_sent_by_copying() {
    // Enough for the ring and some of the chunks.
    with_lockable(3 << 20, || {
        let (a, b) = tcp_pair::pair_with(&TcpConfig {
            zero_copy: ZeroCopy::Always,
            ..TcpConfig::default()
        });
        let (mut a, mut b) = (End::new(a), End::new(b));
        let arena = Arena::new(32);
        for tag in 0..12 {
            let chunk = arena.alloc().expect("a chunk");
            let to = b.link.grant(chunk, 0).expect("grant");
            a.push(filled(&arena, WHOLE, tag), to, tag);
        }
        a.flush();
        drive(&mut a, &mut b, |a, b| {
            a.seen.len() == 12 && b.seen.len() == 12
        });
        for (chunk, tag) in b.take_arrived() {
            assert_eq!(chunk.bytes(), pattern(WHOLE, tag));
        }
    });
}

/// Since 6.14 or so the rings count against the limit.
#[test]
fn a_link_without_any_lockable_memory_works_or_says_so() {
    with_lockable(0, || {
        let config = TcpConfig::default();
        let (mut listener, address) = tcp_pair::listener(&config);
        let pairing = tcp_pair::pairing();
        let mut connector = TcpConnector::start(address, pairing, &config).expect("start");
        loop {
            wait_readable(&[listener.ready_fd(), connector.ready_fd()], WATCHDOG);
            listener.progress(&mut |_| {}).expect("listener");
            match connector.progress() {
                Ok(None) => {}
                Ok(Some(_)) => break,
                Err(error) => {
                    assert!(error.to_string().contains("RLIMIT_MEMLOCK"), "{error}");
                    break;
                }
            }
        }
    });
}
