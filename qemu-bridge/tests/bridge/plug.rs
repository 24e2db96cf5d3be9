//! The plug on a tap into which the test writes what a guest would send. Each test has a network
//! of its own.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command as ProcessCommand;
use std::time::Instant;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{MsgFlags, recv};
use nix::unistd::{Uid, gettid};
use qemu_bridge::gate::{Gate, GateError, Operation, PlugGate};
use qemu_bridge::shape::{Netdev, Nic};

use crate::support::{PATIENCE, not_run};

const TAP: &str = "tap0";
/// For local experiments. A packet socket for one protocol sees what has passed the ingress hook,
/// one for all protocols what comes to it (`__netif_receive_skb_core`, net/core/dev.c).
const PROTOCOL: u16 = 0x88b5;

nix::ioctl_write_int!(tun_set_iff, b'T', 202);

/// A network with a tap, on the guest's side and beyond the gate.
struct Net {
    queues: Vec<File>,
    beyond: OwnedFd,
}

/// Runs a test in a network namespace of its own, if this kernel has a plug.
fn in_a_network(queues: usize, test: impl FnOnce(&mut Net) + Send) {
    std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            if let Err(error) = unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS) {
                return not_run("the plug", &format!("needs root ({error})"));
            }
            let (private, none) = (MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>);
            mount(none, "/", none, private, none).unwrap();
            // What is there names the devices of another namespace.
            mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none).unwrap();
            if !tc("qdisc add dev lo root plug limit 1000") {
                return not_run("the plug", "this kernel has no sch_plug (the lab's has)");
            }
            test(&mut Net::new(queues));
        });
        run.join().unwrap();
    });
}

fn tc(words: &str) -> bool {
    let mut tc = ProcessCommand::new("tc");
    tc.args(words.split(' ')).output().unwrap().status.success()
}

impl Net {
    fn new(queues: usize) -> Net {
        let queues = (0..queues).map(|_| open_tap(queues > 1)).collect();
        let up = ProcessCommand::new("ip")
            .args(["link", "set", TAP, "up"])
            .status();
        assert!(up.unwrap().success());
        Net {
            queues,
            beyond: listen(),
        }
    }

    /// The guest sends a frame that carries a number.
    fn send(&mut self, number: u8) {
        self.send_of(number, 60);
    }

    fn send_of(&mut self, number: u8, bytes: usize) {
        let mut frame = vec![0; bytes];
        frame[..6].fill(0xff);
        frame[12..14].copy_from_slice(&PROTOCOL.to_be_bytes());
        frame[14] = number;
        let queue = usize::from(number) % self.queues.len();
        self.queues[queue].write_all(&frame).unwrap();
    }

    /// Waits for these to come out, in this order.
    fn expect(&self, numbers: &[u8]) {
        for &number in numbers {
            let mut fds = [PollFd::new(
                std::os::fd::AsFd::as_fd(&self.beyond),
                PollFlags::POLLIN,
            )];
            let patience = PollTimeout::try_from(PATIENCE).unwrap();
            assert_eq!(
                poll(&mut fds, patience).unwrap(),
                1,
                "{number} does not come"
            );
            assert_eq!(self.next(), Some(number));
        }
        assert_eq!(self.next(), None);
    }

    fn next(&self) -> Option<u8> {
        let mut frame = [0; 64];
        match recv(self.beyond.as_raw_fd(), &mut frame, MsgFlags::MSG_DONTWAIT) {
            Ok(_) => Some(frame[14]),
            Err(Errno::EAGAIN) => None,
            Err(error) => panic!("{error}"),
        }
    }
}

fn open_tap(several: bool) -> File {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun");
    let file = file.unwrap();
    let mut request = [0_u8; 40];
    request[..TAP.len()].copy_from_slice(TAP.as_bytes());
    let multi_queue = if several { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | multi_queue) as u16;
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: the descriptor is open, and the argument points to a `struct ifreq`, 40 bytes, that
    // lives through the call.
    unsafe { tun_set_iff(file.as_raw_fd(), request.as_mut_ptr() as libc::c_ulong) }.unwrap();
    file
}

/// A socket that gets the frames that the rest of the host gets.
fn listen() -> OwnedFd {
    let protocol = i32::from(PROTOCOL.to_be());
    // SAFETY: takes numbers only; a result that isn't negative is a descriptor of ours alone.
    let socket = unsafe {
        let fd = libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            protocol,
        );
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd)
    };
    // The frames of a full plug come all at once.
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(1 << 20))
        .unwrap();
    socket
}

/// Needs no plug: it does not come that far.
#[test]
fn a_privilege_that_is_missing_can_be_told() {
    let nobody = std::thread::spawn(|| {
        const NOBODY: libc::c_long = 65534;
        if Uid::effective().is_root() {
            // SAFETY: takes numbers only. The system call itself is for this thread alone, and the
            // privileges of its effective user go with that.
            let dropped = unsafe { libc::syscall(libc::SYS_setresuid, -1, NOBODY, -1) };
            assert_eq!(dropped, 0);
        }
        let mut nics = nics();
        nics[0].netdevs[0].ifname = Some("lo".to_owned());
        PlugGate::install(&nics, gettid().as_raw()).unwrap_err()
    });
    let error = nobody.join().unwrap();
    let source = error.source().and_then(|source| source.downcast_ref());
    let denied = |source: &io::Error| source.kind() == io::ErrorKind::PermissionDenied;
    assert!(source.is_some_and(denied), "{error:?}");
    assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
}

fn nics() -> Vec<Nic> {
    let netdev = Netdev {
        id: "n0".to_owned(),
        kind: "tap".to_owned(),
        ifname: Some(TAP.to_owned()),
        fd: None,
    };
    vec![Nic {
        name: "net0".to_owned(),
        model: "virtio-net-pci".to_owned(),
        mac: String::new(),
        netdevs: vec![netdev],
    }]
}

fn install() -> PlugGate {
    PlugGate::install(&nics(), gettid().as_raw()).unwrap()
}

fn perform(gate: &mut PlugGate, operation: Operation) {
    assert!(gate.perform(operation).unwrap().is_empty());
}

/// Waits until the gate tells of output.
fn wait_for_output(gate: &mut PlugGate) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut fds = [PollFd::new(gate.waiting_fd().unwrap(), PollFlags::POLLIN)];
        assert_eq!(
            poll(&mut fds, PollTimeout::try_from(PATIENCE).unwrap()),
            Ok(1)
        );
        if gate.drain() {
            return;
        }
        assert!(Instant::now() < deadline, "the output is not noticed");
    }
}

fn is_left_behind() -> bool {
    let tap = if_nametoindex(TAP).unwrap();
    let output = ProcessCommand::new("tc")
        .args(["qdisc", "show", "dev", TAP])
        .output();
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    if_nametoindex(format!("ftplug{tap}").as_str()).is_ok() || text.contains("clsact")
}

#[test]
fn a_release_lets_out_exactly_the_finished_epoch() {
    for queues in [1, 2] {
        in_a_network(queues, |net| {
            let mut gate = install();
            assert_eq!(gate.name(), "plug on n0 (tap0)");
            net.send(1);
            net.expect(&[1]);
            perform(&mut gate, Operation::Close);
            net.send(2);
            net.send(3);
            perform(&mut gate, Operation::Release); // of the epoch before
            net.expect(&[]);
            for number in [4, 6, 8] {
                perform(&mut gate, Operation::Advance);
                net.send(number);
                net.send(number + 1);
                net.expect(&[]);
                perform(&mut gate, Operation::Release);
                net.expect(&[number - 2, number - 1]);
            }
            // An epoch without output.
            for released in [&[8, 9][..], &[]] {
                perform(&mut gate, Operation::Advance);
                perform(&mut gate, Operation::Release);
                net.expect(released);
            }
            net.send(10);
            perform(&mut gate, Operation::Open);
            net.send(11);
            net.expect(&[10, 11]);
            // And once more.
            perform(&mut gate, Operation::Close);
            net.send(12);
            perform(&mut gate, Operation::Advance);
            perform(&mut gate, Operation::Release);
            net.expect(&[12]);
            assert_eq!(gate.dropped_packets(), 0);
            perform(&mut gate, Operation::Open);
            gate.remove();
            assert!(!is_left_behind());
        });
    }
}

#[test]
fn an_aborted_boundary_loses_nothing_and_lets_nothing_out() {
    in_a_network(1, |net| {
        let mut gate = install();
        perform(&mut gate, Operation::Close);
        perform(&mut gate, Operation::Close);
        net.send(1);
        perform(&mut gate, Operation::Advance);
        net.send(2);
        perform(&mut gate, Operation::Advance);
        net.send(3);
        net.expect(&[]);
        // The second of the two is acknowledged: 2 may leave as well, and leaves one later.
        perform(&mut gate, Operation::Release);
        net.expect(&[1]);
        wait_for_output(&mut gate);
        perform(&mut gate, Operation::Advance);
        net.send(4);
        perform(&mut gate, Operation::Release);
        net.expect(&[2, 3]);
        perform(&mut gate, Operation::Advance);
        perform(&mut gate, Operation::Release);
        net.expect(&[4]);
    });
}

#[test]
fn waiting_output_is_noticed_once_an_epoch() {
    in_a_network(1, |net| {
        let mut gate = install();
        net.send(1);
        perform(&mut gate, Operation::Close);
        assert!(!gate.drain(), "it was sent before");
        net.send(2);
        wait_for_output(&mut gate);
        net.send(3);
        assert!(!gate.drain(), "once is enough");
        let mut fds = [PollFd::new(gate.waiting_fd().unwrap(), PollFlags::POLLIN)];
        assert_eq!(
            poll(&mut fds, PollTimeout::ZERO),
            Ok(0),
            "nor does it wake anybody"
        );
        perform(&mut gate, Operation::Advance);
        assert!(!gate.drain(), "it was sent before");
        perform(&mut gate, Operation::Release);
        net.expect(&[1, 2, 3]);
        assert!(!gate.drain(), "what is released does not count again");
        net.send(4);
        wait_for_output(&mut gate);
    });
}

#[test]
fn what_is_held_stays_held_when_the_daemon_ends() {
    in_a_network(1, |net| {
        let mut gate = install();
        perform(&mut gate, Operation::Close);
        net.send(1);
        perform(&mut gate, Operation::Advance);
        net.send(2);
        drop(gate);
        net.send(3);
        net.expect(&[]);
        // Its successor drops what nobody can vouch for, and begins open.
        let mut gate = install();
        net.send(4);
        net.expect(&[4]);
        perform(&mut gate, Operation::Close);
        net.send(5);
        gate.discard();
        assert!(!is_left_behind());
        net.send(6);
        net.expect(&[6]);

        let mut gate = install();
        perform(&mut gate, Operation::Close);
        net.send(7);
        gate.remove();
        assert!(!is_left_behind());
        net.send(8);
        net.expect(&[7, 8]);
    });
}

#[test]
fn what_a_plug_can_not_hold_is_counted() {
    in_a_network(1, |net| {
        let mut gate = install();
        perform(&mut gate, Operation::Close);
        for _ in 0..1100 {
            net.send_of(1, 65_000);
        }
        perform(&mut gate, Operation::Advance);
        let dropped = gate.dropped_packets();
        assert!((50..200).contains(&dropped), "{dropped} of 71 MB");
        gate.discard();
    });
}

#[test]
fn what_is_no_tap_of_ours_is_refused_and_left_alone() {
    in_a_network(1, |net| {
        let pid = gettid().as_raw();
        let refused = |nics: &[Nic], what: &str| {
            let error = PlugGate::install(nics, pid).unwrap_err();
            let text = error.to_string();
            assert!(matches!(error, GateError::NoPlug { .. }), "{text}");
            assert!(text.contains(what), "{text}");
            assert!(text.contains("--gate filter"), "{text}");
        };
        let mut user = nics();
        user[0].netdevs[0].kind = "user".to_owned();
        refused(&user, "of type user");
        let mut gone = nics();
        gone[0].netdevs[0].ifname = Some("tap7".to_owned());
        refused(&gone, "tap7 is not in this network namespace");
        let mut nameless = nics();
        nameless[0].netdevs[0].ifname = None;
        refused(&nameless, "ifname= or fd=");
        assert!(tc("qdisc add dev tap0 ingress"));
        refused(&nics(), "tc qdisc del dev tap0 ingress");
        assert!(!is_left_behind());
        assert!(tc("qdisc del dev tap0 ingress"));
        // Given by descriptor, as libvirt does.
        let mut given = nics();
        given[0].netdevs[0].ifname = None;
        given[0].netdevs[0].fd = Some(net.queues[0].as_raw_fd());
        let mut gate = PlugGate::install(&given, pid).unwrap();
        gate.discard();
    });
}
