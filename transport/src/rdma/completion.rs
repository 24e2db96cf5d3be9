//! Completion queues with an event channel, whose descriptor says when to look.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::rc::Rc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::RdmaError;
use super::cm::Identifier;
use super::ffi;

/// The vendor that soft-RoCE calls itself (RXE_VENDOR_ID of the kernel's rxe_param.h).
const RXE_VENDOR: u32 = 0xff_ffff;
/// What soft-RoCE sets where IBV_WC_WITH_INV belongs: the kernel's own IB_WC_WITH_INVALIDATE, which
/// it hands to user space as it is (seen on Linux 6.12; rxe_resp.c, do_complete). Elsewhere this
/// bit means that a checksum is right.
const RXE_WITH_INVALIDATE: u32 = 1 << 2;

/// What a request came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// As it was given to the request.
    pub id: u64,
    pub result: Result<Done, Failure>,
}

/// A request that did what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// This side's request.
    Requested,
    /// A message came in: its bytes, and the key of the window that it took away.
    Received {
        bytes: u32,
        invalidated_rkey: Option<u32>,
    },
}

/// A request that failed, and took the queue pair with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}{}", self.hint())]
pub struct Failure {
    status: ffi::ibv_wc_status::Type,
    text: String,
}

impl Failure {
    /// The request didn't fail by itself: the queue pair was in the error state.
    pub fn is_flush(&self) -> bool {
        self.status == ffi::ibv_wc_status::IBV_WC_WR_FLUSH_ERR
    }

    fn hint(&self) -> &'static str {
        match self.status {
            ffi::ibv_wc_status::IBV_WC_REM_ACCESS_ERR => {
                ": the grant was taken back, or was used before"
            }
            ffi::ibv_wc_status::IBV_WC_RETRY_EXC_ERR => ": the peer's device does not answer",
            ffi::ibv_wc_status::IBV_WC_RNR_RETRY_EXC_ERR => ": the peer takes no messages",
            ffi::ibv_wc_status::IBV_WC_LOC_PROT_ERR => ": this side's memory is not registered",
            ffi::ibv_wc_status::IBV_WC_MW_BIND_ERR => ": a memory window can't be bound",
            _ => "",
        }
    }
}

/// Where the completions of one queue pair arrive.
pub struct CompletionQueue {
    cq: NonNull<ffi::ibv_cq>,
    channel: NonNull<ffi::ibv_comp_channel>,
    /// Flags that say that a message took a window away.
    with_invalidate: u32,
    /// Keeps the device open.
    _id: Rc<Identifier>,
}

impl CompletionQueue {
    /// A queue of `entries` that will write its descriptor at the next completion.
    pub fn new(id: &Rc<Identifier>, entries: u32) -> Result<Rc<CompletionQueue>, RdmaError> {
        let verbs = id.verbs().expect("the address is resolved").as_ptr();
        // SAFETY: the device's context lives as long as `id`, which the result keeps.
        let channel = NonNull::new(unsafe { ffi::ibv_create_comp_channel(verbs) })
            .ok_or_else(|| RdmaError::last("ibv_create_comp_channel"))?;
        // SAFETY: as above; the channel was just made.
        let cq = unsafe {
            ffi::ibv_create_cq(verbs, entries as i32, ptr::null_mut(), channel.as_ptr(), 0)
        };
        let Some(cq) = NonNull::new(cq) else {
            let error = RdmaError::last("ibv_create_cq");
            // SAFETY: nothing uses the channel.
            unsafe { ffi::ibv_destroy_comp_channel(channel.as_ptr()) };
            return Err(error);
        };
        let queue = CompletionQueue {
            cq,
            channel,
            with_invalidate: with_invalidate(id)?,
            _id: Rc::clone(id),
        };
        fcntl(queue.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .map_err(|errno| RdmaError::code("fcntl", errno as i32))?;
        queue.arm().map_err(|source| RdmaError::Io {
            operation: "ibv_req_notify_cq",
            source,
        })?;
        Ok(Rc::new(queue))
    }

    /// Takes the events off the descriptor. If there was one, the queue is armed again: what has
    /// completed since must be looked for.
    pub fn take_events(&self) -> io::Result<()> {
        let mut events = 0;
        loop {
            let (mut cq, mut context) = (ptr::null_mut(), ptr::null_mut());
            // SAFETY: the channel is alive, and the two places live during the call.
            let done = unsafe {
                ffi::ibv_get_cq_event(self.channel.as_ptr(), &raw mut cq, &raw mut context)
            };
            if done != 0 {
                break;
            }
            events += 1;
        }
        if events == 0 {
            return Ok(());
        }
        // SAFETY: so many events of this queue were taken.
        unsafe { ffi::ibv_ack_cq_events(self.cq.as_ptr(), events) };
        self.arm()
    }

    /// Takes the next completion.
    pub fn poll(&self) -> io::Result<Option<Completion>> {
        // SAFETY: all-zero is a valid work completion: it is integers.
        let mut wc: ffi::ibv_wc = unsafe { std::mem::zeroed() };
        // SAFETY: the queue is alive, and there is room for one entry.
        match unsafe { ffi::ibv_poll_cq(self.cq.as_ptr(), 1, &raw mut wc) } {
            0 => Ok(None),
            1 => Ok(Some(read(&wc, self.with_invalidate))),
            error => Err(io::Error::other(format!("ibv_poll_cq returned {error}"))),
        }
    }

    pub(super) fn as_ptr(&self) -> *mut ffi::ibv_cq {
        self.cq.as_ptr()
    }

    fn arm(&self) -> io::Result<()> {
        // SAFETY: the queue is alive.
        match unsafe { ffi::ibv_req_notify_cq(self.cq.as_ptr(), 0) } {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

fn with_invalidate(id: &Identifier) -> Result<u32, RdmaError> {
    let verbs = id.verbs().expect("the address is resolved").as_ptr();
    // SAFETY: all-zero is valid: it is integers.
    let mut attr: ffi::ibv_device_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the device's context is open, and the attributes live during the call.
    match unsafe { ffi::ibv_query_device(verbs, &raw mut attr) } {
        0 if attr.vendor_id == RXE_VENDOR => {
            Ok(ffi::ibv_wc_flags::IBV_WC_WITH_INV.0 | RXE_WITH_INVALIDATE)
        }
        0 => Ok(ffi::ibv_wc_flags::IBV_WC_WITH_INV.0),
        errno => Err(RdmaError::code("ibv_query_device", errno)),
    }
}

fn read(wc: &ffi::ibv_wc, with_invalidate: u32) -> Completion {
    let result = if wc.status != ffi::ibv_wc_status::IBV_WC_SUCCESS {
        // SAFETY: the function takes any number and returns a C string that lives for ever.
        let text = unsafe { CStr::from_ptr(ffi::ibv_wc_status_str(wc.status)) };
        Err(Failure {
            status: wc.status,
            text: text.to_string_lossy().into_owned(),
        })
    } else if wc.opcode & ffi::ibv_wc_opcode::IBV_WC_RECV != 0 {
        let invalidated = wc.wc_flags & with_invalidate != 0;
        // SAFETY: both fields of the union are plain integers.
        let key = unsafe { wc.imm_data_invalidated_rkey_union.invalidated_rkey };
        Ok(Done::Received {
            bytes: wc.byte_len,
            invalidated_rkey: invalidated.then_some(key),
        })
    } else {
        Ok(Done::Requested)
    };
    Completion {
        id: wc.wr_id,
        result,
    }
}

impl AsFd for CompletionQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel's descriptor is open as long as the channel.
        unsafe { BorrowedFd::borrow_raw(self.channel.as_ref().fd) }
    }
}

impl fmt::Debug for CompletionQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompletionQueue").finish_non_exhaustive()
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: the queue pair keeps it alive, so none uses it; every event is acknowledged. The
        // channel goes after the queue that writes to it.
        unsafe {
            if ffi::ibv_destroy_cq(self.cq.as_ptr()) != 0 {
                tracing::warn!("a completion queue is left behind");
            }
            ffi::ibv_destroy_comp_channel(self.channel.as_ptr());
        }
    }
}
