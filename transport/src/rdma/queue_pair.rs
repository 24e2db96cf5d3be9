//! One RC queue pair, and the batches of requests that it is given.
//!
//! A request is begun, given its operation, and queued; a batch is posted with one doorbell. The
//! wrong order doesn't compile. A request has no operation yet:
//! ```compile_fail,E0599
//! # use transport::rdma::queue_pair::Batch;
//! fn wrong(batch: &mut Batch<'_>) {
//!     batch.request(1).queue();
//! }
//! ```
//! It has one already:
//! ```compile_fail,E0599
//! # use transport::rdma::queue_pair::Batch;
//! fn wrong(batch: &mut Batch<'_>) {
//!     batch
//!         .request(1)
//!         .send_and_invalidate([0; 24], 7)
//!         .send_and_invalidate([0; 24], 8)
//!         .queue();
//! }
//! ```
//! The batch is posted:
//! ```compile_fail,E0382
//! # use transport::rdma::queue_pair::Batch;
//! fn wrong(mut batch: Batch<'_>) {
//!     batch.post();
//!     batch.request(1).send_and_invalidate([0; 24], 7).queue();
//! }
//! ```
//! A batch is open on the queue pair:
//! ```compile_fail,E0499
//! # use transport::rdma::queue_pair::QueuePair;
//! fn wrong(pair: &mut QueuePair) {
//!     let first = pair.batch();
//!     let second = pair.batch();
//!     first.post();
//! }
//! ```
//! And the right order does:
//! ```
//! # use transport::rdma::queue_pair::Batch;
//! fn right(mut batch: Batch<'_>) {
//!     batch.request(1).send_and_invalidate([0; 24], 7).queue();
//!     batch.post().unwrap();
//! }
//! ```

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::ptr;
use std::rc::Rc;

use super::RdmaError;
use super::cm::Identifier;
use super::completion::CompletionQueue;
use super::device::ProtectionDomain;
use super::ffi;
use super::region::Piece;
use super::window::{Binding, RemoteWindow};

/// Bytes of the message that ends a write: small enough for every device to take from the request
/// itself.
pub const MESSAGE_BYTES: usize = 24;
/// How long a receiver asks a sender to wait when it has no buffer for a message: code 12 is
/// 0.64 ms (IB specification, table 45).
const MIN_RNR_TIMER: u8 = 12;

/// A queue pair, its completion queue and its domain.
pub struct QueuePair {
    id: Rc<Identifier>,
    cq: Rc<CompletionQueue>,
    _pd: Rc<ProtectionDomain>,
    planned: Vec<Planned>,
}

/// How many requests a queue pair can hold.
#[derive(Clone, Copy, Debug)]
pub struct Depth {
    pub sends: u32,
    pub receives: u32,
}

/// Requests that will be posted with one doorbell.
#[must_use = "nothing happens before `post`"]
#[derive(Debug)]
pub struct Batch<'qp> {
    pair: &'qp mut QueuePair,
}

/// A request of a [`Batch`] on its way into it.
#[must_use = "a request that isn't queued isn't in the batch"]
#[derive(Debug)]
pub struct Request<'batch, Stage> {
    planned: &'batch mut Vec<Planned>,
    request: Planned,
    stage: PhantomData<Stage>,
}

/// A [`Request`] that has no operation.
#[derive(Debug)]
pub struct Empty;
/// A [`Request`] that has one.
#[derive(Debug)]
pub struct Whole;

#[derive(Debug)]
struct Planned {
    id: u64,
    signalled: bool,
    operation: Operation,
}

#[derive(Debug)]
enum Operation {
    None,
    Write {
        from: Piece,
        to: RemoteWindow,
    },
    SendInvalidate {
        message: [u8; MESSAGE_BYTES],
        rkey: u32,
    },
    Bind(Binding),
}

impl QueuePair {
    /// Makes the queue pair of `id`: rdma_cm will connect it.
    pub fn new(
        id: &Rc<Identifier>,
        pd: &Rc<ProtectionDomain>,
        cq: &Rc<CompletionQueue>,
        depth: Depth,
    ) -> Result<QueuePair, RdmaError> {
        // SAFETY: all-zero is valid: integers and pointers that may be null.
        let mut attr: ffi::ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        attr.send_cq = cq.as_ptr();
        attr.recv_cq = cq.as_ptr();
        attr.qp_type = ffi::ibv_qp_type::IBV_QPT_RC;
        attr.cap.max_send_wr = depth.sends;
        attr.cap.max_recv_wr = depth.receives;
        attr.cap.max_send_sge = 1;
        attr.cap.max_recv_sge = 1;
        attr.cap.max_inline_data = MESSAGE_BYTES as u32;
        // SAFETY: identifier, domain and completion queue are alive, and stay so with the result.
        let done = unsafe { ffi::rdma_create_qp(id.as_ptr(), pd.as_ptr(), &raw mut attr) };
        if done != 0 {
            return Err(RdmaError::last("rdma_create_qp"));
        }
        Ok(QueuePair {
            id: Rc::clone(id),
            cq: Rc::clone(cq),
            _pd: Rc::clone(pd),
            planned: Vec::new(),
        })
    }

    pub fn completions(&self) -> &CompletionQueue {
        &self.cq
    }

    /// What is left to set once the connection stands: rdma_cm leaves the wait for a receive buffer
    /// at 655 ms.
    pub fn tune(&self) -> Result<(), RdmaError> {
        self.modify(
            ffi::ibv_qp_attr_mask::IBV_QP_STATE | ffi::ibv_qp_attr_mask::IBV_QP_MIN_RNR_TIMER,
            |attr| {
                attr.qp_state = ffi::ibv_qp_state::IBV_QPS_RTS;
                attr.min_rnr_timer = MIN_RNR_TIMER;
            },
        )
    }

    /// Moves it to the error state: every request comes back, and no write of the peer is carried
    /// out any more.
    pub fn fail(&self) -> Result<(), RdmaError> {
        self.modify(ffi::ibv_qp_attr_mask::IBV_QP_STATE, |attr| {
            attr.qp_state = ffi::ibv_qp_state::IBV_QPS_ERR;
        })
    }

    /// Gives the device a buffer for one message.
    ///
    /// # Safety
    /// The memory must stay, and nobody may use it, until the request has completed or the queue
    /// pair is gone.
    pub unsafe fn receive(&mut self, id: u64, into: Piece) -> io::Result<()> {
        let mut sge = into.sge();
        let mut wr = ffi::ibv_recv_wr {
            wr_id: id,
            next: ptr::null_mut(),
            sg_list: &raw mut sge,
            num_sge: 1,
        };
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair is alive, the request and its list live during the call, and the
        // caller vouches for the memory.
        match unsafe { ffi::ibv_post_recv(self.as_ptr(), &raw mut wr, &raw mut bad) } {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    pub fn batch(&mut self) -> Batch<'_> {
        self.planned.clear();
        Batch { pair: self }
    }

    fn modify(
        &self,
        mask: ffi::ibv_qp_attr_mask,
        set: impl FnOnce(&mut ffi::ibv_qp_attr),
    ) -> Result<(), RdmaError> {
        // SAFETY: all-zero is valid: it is integers.
        let mut attr: ffi::ibv_qp_attr = unsafe { std::mem::zeroed() };
        set(&mut attr);
        // SAFETY: the queue pair is alive, and the attributes live during the call.
        match unsafe { ffi::ibv_modify_qp(self.as_ptr(), &raw mut attr, mask.0 as i32) } {
            0 => Ok(()),
            errno => Err(RdmaError::code("ibv_modify_qp", errno)),
        }
    }

    fn as_ptr(&self) -> *mut ffi::ibv_qp {
        // SAFETY: the identifier is alive, and its queue pair goes only in `drop`.
        unsafe { (*self.id.as_ptr()).qp }
    }
}

impl<'qp> Batch<'qp> {
    /// Begins a request that will be called `id` in its completion.
    pub fn request(&mut self, id: u64) -> Request<'_, Empty> {
        Request {
            planned: &mut self.pair.planned,
            request: Planned {
                id,
                signalled: false,
                operation: Operation::None,
            },
            stage: PhantomData,
        }
    }

    pub fn len(&self) -> usize {
        self.pair.planned.len()
    }

    pub fn is_empty(&self) -> bool {
        self.pair.planned.is_empty()
    }

    /// Posts the requests in order; the last is signalled, whatever was asked for.
    pub fn post(self) -> io::Result<()> {
        let planned = &mut self.pair.planned;
        let Some(last) = planned.last_mut() else {
            return Ok(());
        };
        last.signalled = true;
        let mut pieces: Vec<ffi::ibv_sge> = planned.iter_mut().map(Planned::sge).collect();
        let mut requests: Vec<ffi::ibv_send_wr> = planned
            .iter()
            .zip(&mut pieces)
            .map(|(request, piece)| request.work(piece))
            .collect();
        let base = requests.as_mut_ptr();
        for index in 1..requests.len() {
            // SAFETY: `index` is inside. All links are made from one pointer to the whole list.
            unsafe { (*base.add(index - 1)).next = base.add(index) };
        }
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair is alive; the requests, their lists and inline messages live
        // during the call. Whoever queued a write vouched for its memory.
        let errno = unsafe { ffi::ibv_post_send(self.pair.as_ptr(), base, &raw mut bad) };
        match errno {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

impl<'batch> Request<'batch, Empty> {
    /// Writes `from` to the beginning of the peer's window.
    ///
    /// # Safety
    /// The memory must stay, and nobody may write it, until this request, or one that was posted
    /// after it, has completed, or the queue pair is gone.
    pub unsafe fn write(self, from: Piece, to: RemoteWindow) -> Request<'batch, Whole> {
        self.with(Operation::Write { from, to })
    }

    /// Sends a message, at whose arrival the peer's device takes the window `rkey` away.
    pub fn send_and_invalidate(
        self,
        message: [u8; MESSAGE_BYTES],
        rkey: u32,
    ) -> Request<'batch, Whole> {
        self.with(Operation::SendInvalidate { message, rkey })
    }

    /// Makes a window's next key good for writing.
    ///
    /// # Safety
    /// The window must outlive the request.
    pub unsafe fn bind(self, binding: Binding) -> Request<'batch, Whole> {
        self.with(Operation::Bind(binding))
    }

    fn with(mut self, operation: Operation) -> Request<'batch, Whole> {
        self.request.operation = operation;
        Request {
            planned: self.planned,
            request: self.request,
            stage: PhantomData,
        }
    }
}

impl Request<'_, Whole> {
    /// Puts the request at the end of the batch.
    pub fn queue(self) {
        self.planned.push(self.request);
    }
}

impl Planned {
    /// What the device reads of this side's memory, if it does.
    fn sge(&mut self) -> ffi::ibv_sge {
        match &self.operation {
            Operation::Write { from, .. } => from.sge(),
            Operation::SendInvalidate { message, .. } => ffi::ibv_sge {
                addr: message.as_ptr() as u64,
                length: MESSAGE_BYTES as u32,
                lkey: 0,
            },
            _ => ffi::ibv_sge {
                addr: 0,
                length: 0,
                lkey: 0,
            },
        }
    }

    fn work(&self, piece: &mut ffi::ibv_sge) -> ffi::ibv_send_wr {
        // SAFETY: all-zero is valid: integers, and pointers that may be null.
        let mut wr: ffi::ibv_send_wr = unsafe { std::mem::zeroed() };
        wr.wr_id = self.id;
        if self.signalled {
            wr.send_flags |= ffi::ibv_send_flags::IBV_SEND_SIGNALED.0;
        }
        match &self.operation {
            Operation::None => unreachable!("only whole requests are queued"),
            Operation::Write { to, .. } => {
                wr.opcode = ffi::ibv_wr_opcode::IBV_WR_RDMA_WRITE;
                wr.sg_list = piece;
                wr.num_sge = 1;
                wr.wr.rdma.remote_addr = to.address;
                wr.wr.rdma.rkey = to.rkey;
            }
            Operation::SendInvalidate { rkey, .. } => {
                wr.opcode = ffi::ibv_wr_opcode::IBV_WR_SEND_WITH_INV;
                wr.send_flags |= ffi::ibv_send_flags::IBV_SEND_INLINE.0;
                wr.sg_list = piece;
                wr.num_sge = 1;
                wr.imm_data_invalidated_rkey_union.invalidated_rkey = *rkey;
            }
            Operation::Bind(binding) => {
                wr.opcode = ffi::ibv_wr_opcode::IBV_WR_BIND_MW;
                // SAFETY: both variants of the union are plain data; this one is used with this
                // opcode.
                let bind = unsafe { &mut wr.bind_mw_tso_union.bind_mw };
                bind.mw = binding.mw;
                bind.rkey = binding.rkey;
                bind.bind_info = ffi::ibv_mw_bind_info {
                    mr: binding.mr,
                    addr: binding.address,
                    length: binding.bytes,
                    mw_access_flags: ffi::ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0,
                };
            }
        }
        wr
    }
}

impl Piece {
    fn sge(&self) -> ffi::ibv_sge {
        ffi::ibv_sge {
            addr: self.address,
            length: self.bytes,
            lkey: self.lkey,
        }
    }
}

impl fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("QueuePair").field(&self.id).finish()
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: the identifier is alive and has a queue pair. When the call returns, the device
        // uses no memory for it any more.
        unsafe { ffi::rdma_destroy_qp(self.id.as_ptr()) };
    }
}
