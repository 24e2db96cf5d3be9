//! The few requests to the kernel's network that the gate is made of (rtnetlink(7);
//! include/uapi/linux/{rtnetlink,pkt_sched,pkt_cls,if_link}.h, tc_act/tc_mirred.h).
//!
//! The kernel carries out a request inside of `send`, under a lock that it has for all changes to
//! the network: tens of microseconds, more while somebody else reconfigures it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
    sockopt::ReceiveTimeout,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::message::{Reply, Request, attribute, replies, u32_at};

/// The kernel has answered when `send` returns; this is for what should never be.
const PATIENCE: Duration = Duration::from_secs(1);
/// Larger than any answer to these requests.
const ANSWER_BYTES: usize = 16 << 10;

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
/// `NLM_F_CREATE | NLM_F_EXCL`.
const NEW: u16 = 0x400 | 0x200;
/// `NLM_F_ECHO`: the kernel also answers with what it has made of the request.
const ECHO: u16 = 0x8;

const IFF_UP: u32 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;

const TCMSG_BYTES: usize = 20;
const TC_H_ROOT: u32 = 0xffff_ffff;
/// `TC_H_CLSACT`, the parent and the handle of that queueing discipline.
const CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)`.
const CLSACT_INGRESS: u32 = 0xffff_fff2;
/// Of the plug: `1:`.
const PLUG_HANDLE: u32 = 0x0001_0000;
/// Priority 1, and `ETH_P_ALL` in network byte order.
const FIRST_OF_ALL: u32 = 1 << 16 | 0x0003_u16.to_be() as u32;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_STATS2: u16 = 7;
const TCA_STATS_QUEUE: u16 = 3;
const TCA_MATCHALL_ACT: u16 = 2;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TC_ACT_STOLEN: u32 = 4;
const TCA_EGRESS_REDIR: u32 = 1;

/// What a plug can be told (`struct tc_plug_qopt`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plug {
    Buffer,
    ReleaseOne,
    ReleaseIndefinite,
}

/// Of a queueing discipline (`struct gnet_stats_queue`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct QueueStatistics {
    pub(super) packets: u32,
    pub(super) drops: u32,
}

/// A socket to the kernel's network, of the network namespace in which it was made.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    answer: Vec<u8>,
}

impl Netlink {
    pub(super) fn open() -> io::Result<Netlink> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        let patience = TimeVal::milliseconds(PATIENCE.as_millis() as i64);
        setsockopt(&socket, ReceiveTimeout, &patience)?;
        Ok(Netlink {
            socket,
            sequence: 0,
            answer: vec![0; ANSWER_BYTES],
        })
    }

    /// Makes an intermediate functional block: a device whose egress queue others can be sent
    /// through (drivers/net/ifb.c).
    pub(super) fn add_ifb(&mut self, name: &str) -> io::Result<()> {
        let request = self
            .request(RTM_NEWLINK, NEW, &ifinfomsg(0, 0))
            .string(IFLA_IFNAME, name)
            .nested(IFLA_LINKINFO, |r| r.string(IFLA_INFO_KIND, "ifb"));
        self.ask(request).map(drop)
    }

    pub(super) fn switch_on(&mut self, device: u32) -> io::Result<()> {
        let request = self.request(RTM_NEWLINK, 0, &ifinfomsg(device, IFF_UP));
        self.ask(request).map(drop)
    }

    /// What its queue holds is dropped.
    pub(super) fn remove_device(&mut self, device: u32) -> io::Result<()> {
        let request = self.request(RTM_DELLINK, 0, &ifinfomsg(device, 0));
        self.ask(request).map(drop)
    }

    /// Holds from the first packet on, at most `bytes`.
    pub(super) fn add_plug(&mut self, device: u32, bytes: u32) -> io::Result<()> {
        let fixed = tcmsg(device, PLUG_HANDLE, TC_H_ROOT, 0);
        let request = self
            .request(RTM_NEWQDISC, NEW, &fixed)
            .string(TCA_KIND, "plug")
            .attribute(TCA_OPTIONS, &words(&[0, bytes]));
        self.ask(request).map(drop)
    }

    /// What its queue is like afterwards.
    pub(super) fn plug(&mut self, device: u32, plug: Plug) -> io::Result<QueueStatistics> {
        let fixed = tcmsg(device, PLUG_HANDLE, TC_H_ROOT, 0);
        let action = match plug {
            Plug::Buffer => 0,
            Plug::ReleaseOne => 1,
            Plug::ReleaseIndefinite => 2,
        };
        let request = self
            .request(RTM_NEWQDISC, ECHO, &fixed)
            .string(TCA_KIND, "plug")
            .attribute(TCA_OPTIONS, &words(&[action, 0]));
        self.ask(request)
    }

    pub(super) fn add_clsact(&mut self, device: u32) -> io::Result<()> {
        let fixed = tcmsg(device, CLSACT_HANDLE, CLSACT, 0);
        let request = self
            .request(RTM_NEWQDISC, NEW, &fixed)
            .string(TCA_KIND, "clsact");
        self.ask(request).map(drop)
    }

    /// With all its filters.
    pub(super) fn remove_clsact(&mut self, device: u32) -> io::Result<()> {
        let fixed = tcmsg(device, CLSACT_HANDLE, CLSACT, 0);
        let request = self.request(RTM_DELQDISC, 0, &fixed);
        self.ask(request).map(drop)
    }

    /// All that comes in at `from` goes to the egress queue of `to`.
    pub(super) fn redirect(&mut self, from: u32, to: u32) -> io::Result<()> {
        let fixed = tcmsg(from, 0, CLSACT_INGRESS, FIRST_OF_ALL);
        let mirred = words(&[0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to]);
        let action = |r: Request| {
            r.string(TCA_ACT_KIND, "mirred")
                .nested(TCA_ACT_OPTIONS, |r| r.attribute(TCA_MIRRED_PARMS, &mirred))
        };
        let request = self
            .request(RTM_NEWTFILTER, NEW, &fixed)
            .string(TCA_KIND, "matchall")
            // The first, and only, action.
            .nested(TCA_OPTIONS, |r| {
                r.nested(TCA_MATCHALL_ACT, |r| r.nested(1, action))
            });
        self.ask(request).map(drop)
    }

    fn request(&mut self, kind: u16, flags: u16, fixed: &[u8]) -> Request {
        self.sequence = self.sequence.wrapping_add(1);
        Request::new(kind, flags, self.sequence, fixed)
    }

    /// Sends a request and reads to the end of its answer.
    fn ask(&mut self, request: Request) -> io::Result<QueueStatistics> {
        let fd = self.socket.as_raw_fd();
        send(fd, &request.finish(), MsgFlags::empty())?;
        let mut statistics = QueueStatistics::default();
        loop {
            let length = match recv(fd, &mut self.answer, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                length => length?,
            };
            for reply in replies(&self.answer[..length], self.sequence) {
                match reply {
                    Reply::Done { errno: 0 } => return Ok(statistics),
                    Reply::Done { errno } => return Err(io::Error::from_raw_os_error(errno)),
                    Reply::Message { kind, body } if kind == RTM_NEWQDISC => {
                        statistics = queue_statistics(body).unwrap_or(statistics);
                    }
                    Reply::Message { .. } => {}
                }
            }
        }
    }
}

/// Out of a message about a queueing discipline, from its fixed part on.
fn queue_statistics(body: &[u8]) -> Option<QueueStatistics> {
    let statistics = attribute(body.get(TCMSG_BYTES..)?, TCA_STATS2)?;
    let queue = attribute(statistics, TCA_STATS_QUEUE)?;
    Some(QueueStatistics {
        packets: u32_at(queue, 0)?,
        drops: u32_at(queue, 8)?,
    })
}

/// `struct ifinfomsg`: family, type, index, flags, which of them to change.
fn ifinfomsg(device: u32, flags: u32) -> Vec<u8> {
    words(&[0, device, flags, flags])
}

/// `struct tcmsg`: family, device, handle, parent, and for a filter its priority and protocol.
fn tcmsg(device: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    words(&[0, device, handle, parent, info])
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
