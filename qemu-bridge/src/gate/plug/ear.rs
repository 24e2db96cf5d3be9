//! Notices that guests send something: packet sockets on their taps (packet(7)).
//!
//! The kernel shows a packet socket what comes in at the tap before it is redirected, and not again
//! when the intermediate device gives it back (`skb_skip_tc_classify`, net/core/dev.c). So a host
//! wakes up when there is output, and not to see whether there is: in emulation within emulation a
//! look every millisecond took a third of a processor.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, recv, setsockopt, socket, sockopt::RcvBuf,
};

/// Enough to become readable: once a packet is there, others are dropped before they are cloned
/// (`packet_rcv`, net/packet/af_packet.c). The kernel has a larger minimum of its own.
const QUEUE_BYTES: usize = 1;
/// The kernel's minimum has room for a few packets; a guest that sends all the time may add some
/// while they are taken out.
const EMPTYING_READS: u32 = 64;

/// Hears the guests of some taps send.
#[derive(Debug)]
pub(super) struct Ear {
    /// With each socket armed for one event: what was told once is not told again.
    all: Epoll,
    sockets: Vec<OwnedFd>,
}

impl Ear {
    pub(super) fn new() -> io::Result<Ear> {
        Ok(Ear {
            all: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            sockets: Vec::new(),
        })
    }

    /// Listens to the device with this index too, from [`Ear::forget`] on.
    ///
    /// # Errors
    /// The kernel refuses: CAP_NET_RAW is missing, or it has no packet sockets.
    pub(super) fn add(&mut self, device: u32) -> io::Result<()> {
        let socket = listen_to(device)?;
        let deaf = EpollEvent::new(EpollFlags::EPOLLONESHOT, 0);
        self.all.add(&socket, deaf)?;
        self.sockets.push(socket);
        Ok(())
    }

    /// Whatever was sent until now is not news; what comes next is.
    ///
    /// # Errors
    /// As [`Ear::again`].
    pub(super) fn forget(&mut self) -> io::Result<()> {
        for socket in &self.sockets {
            for _ in 0..EMPTYING_READS {
                match recv(socket.as_raw_fd(), &mut [], MsgFlags::MSG_DONTWAIT) {
                    // A device that went down, or is gone, says so once.
                    Ok(_) | Err(Errno::EINTR | Errno::ENETDOWN | Errno::ENODEV) => {}
                    Err(_) => break,
                }
            }
        }
        self.again()
    }

    /// Says once more that something was sent, if it was since [`Ear::forget`].
    ///
    /// # Errors
    /// epoll_ctl(2) fails.
    pub(super) fn again(&mut self) -> io::Result<()> {
        for socket in &self.sockets {
            let once = EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT;
            self.all.modify(socket, &mut EpollEvent::new(once, 0))?;
        }
        Ok(())
    }

    /// Whether something was sent that was not told yet.
    pub(super) fn has_heard(&mut self) -> bool {
        let mut heard = [EpollEvent::empty(); 8];
        self.all.wait(&mut heard, EpollTimeout::ZERO) != Ok(0)
    }
}

/// Readable when something was sent that was not told yet.
impl AsFd for Ear {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.all.0.as_fd()
    }
}

/// A socket that takes what comes in at a device, from now on.
fn listen_to(device: u32) -> io::Result<OwnedFd> {
    // Without a protocol it hears nothing until it is bound: all devices, else.
    let socket = socket(
        AddressFamily::Packet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    setsockopt(&socket, RcvBuf, &QUEUE_BYTES)?;
    ignore_outgoing(&socket)?;
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
        sll_ifindex: i32::try_from(device).map_err(io::Error::other)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the address is a sockaddr_ll that lives through the call, the length is its size, and
    // the descriptor is open.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    Errno::result(bound)?;
    Ok(socket)
}

/// Packets for the guest are none of its own (`PACKET_IGNORE_OUTGOING`, Linux 4.20).
fn ignore_outgoing(socket: &OwnedFd) -> io::Result<()> {
    let yes: libc::c_int = 1;
    // SAFETY: the option's value is a c_int that lives through the call, the length is its size, and
    // the descriptor is open.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_IGNORE_OUTGOING,
            (&raw const yes).cast(),
            size_of::<libc::c_int>() as u32,
        )
    };
    Errno::result(set)?;
    Ok(())
}
