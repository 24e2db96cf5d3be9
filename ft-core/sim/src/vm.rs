//! A QEMU with its guest: pages with values, a device state, an output gate, and a monitor that
//! carries out one command after the other.

use std::collections::VecDeque;
use std::rc::Rc;

use ft_core::shape::BlockShape;
use ft_core::{BlockId, DirtySet, Epoch, PAGE_BYTES, PageRun, RunState, VmShape};

use crate::rng::Rng;

/// Pages of the guest's RAM blocks; the last one is read-only.
pub const BLOCK_PAGES: [u64; 3] = [90, 64, 6];
const WRITABLE_BLOCKS: u64 = 2;

/// A page's content: a number that no other write has used; 0 is a zero page.
pub type Value = u64;
/// RAM by block and page.
pub type Ram = Vec<Vec<Value>>;

pub fn shape() -> VmShape {
    let names = ["extra-ram", "main-ram", "pc.bios"];
    let block = |(name, pages): (&str, u64)| BlockShape {
        name: name.to_owned(),
        bytes: pages * PAGE_BYTES as u64,
        read_only: name == "pc.bios",
    };
    VmShape {
        properties: vec![("machine".to_owned(), "pc".to_owned())],
        blocks: names.into_iter().zip(BLOCK_PAGES).map(block).collect(),
    }
}

/// What a save writes; `tick` counts the guest's steps, so a later state has a higher one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    pub tick: u64,
    pub random: u64,
}

/// RAM and devices at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub ram: Ram,
    pub device: Device,
}

/// What another monitor or we tell QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qmp {
    Stop,
    Save,
    MoveGate,
    CloseGate,
    OpenGate,
    Release(Epoch),
    Cont,
    FenceStop,
}

/// What QEMU says on our monitor, in the order in which it happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QmpOut {
    Done(Qmp),
    Failed(Qmp),
    StopEvent,
    ResumeEvent,
    ShutdownEvent,
}

/// Two stages, as two chained `filter-buffer` objects make them.
#[derive(Debug, Default)]
pub struct Gate {
    pub closed: bool,
    /// Ticks of the packets of the running epoch, and of the one before it.
    current: Vec<u64>,
    commit: Vec<u64>,
    /// Released while the guest stood still: they leave when it goes on.
    queued: Vec<u64>,
}

#[derive(Debug)]
pub struct Vm {
    pub ram: Ram,
    pub device: Device,
    pub running: bool,
    /// Stopped by the kernel: answers nothing.
    pub frozen: bool,
    pub gate: Gate,
    /// Commands on our monitor that are not carried out yet.
    pub queue: VecDeque<Qmp>,
    pub saved: Option<Rc<Snapshot>>,
    /// Pages written since they were armed, by block; grows with the block.
    written: Vec<Vec<bool>>,
    /// Links whose proof lane it holds a copy of.
    pub proofs: Vec<u32>,
    /// The guest has powered off.
    pub shut_down: bool,
}

impl Vm {
    pub fn new(rng: &mut Rng) -> Vm {
        let fill = |pages| {
            (0..pages)
                .map(|_| if rng.chance(300) { 0 } else { rng.number() })
                .collect()
        };
        let ram: Ram = BLOCK_PAGES.into_iter().map(fill).collect();
        Vm {
            written: blank(&ram),
            ram,
            ..Vm::standby()
        }
    }

    /// Waits for a state to be loaded: no RAM is worth anything, not even its ROMs.
    pub fn standby() -> Vm {
        let ram: Ram = BLOCK_PAGES
            .into_iter()
            .map(|pages| vec![0; pages as usize])
            .collect();
        Vm {
            written: blank(&ram),
            ram,
            device: Device { tick: 0, random: 0 },
            running: false,
            frozen: false,
            gate: Gate::default(),
            queue: VecDeque::new(),
            saved: None,
            proofs: Vec::new(),
            shut_down: false,
        }
    }

    /// The guest computes a little. Returns a packet's tick that left at once, if one did.
    pub fn step(&mut self, rng: &mut Rng, writes: u64, packet: bool) -> Option<u64> {
        self.device = Device {
            tick: self.device.tick + 1,
            random: rng.number(),
        };
        for _ in 0..writes {
            let block = rng.below(WRITABLE_BLOCKS) as usize;
            let page = rng.below(self.ram[block].len() as u64) as usize;
            let value = if rng.chance(100) { 0 } else { rng.number() };
            self.write(block, page, value);
        }
        self.write(0, 0, self.device.tick);
        if !packet {
            return None;
        }
        if self.gate.closed {
            self.gate.current.push(self.device.tick);
            return None;
        }
        Some(self.device.tick)
    }

    fn write(&mut self, block: usize, page: usize, value: Value) {
        self.ram[block][page] = value;
        self.written[block][page] = true;
    }

    /// A RAM block becomes longer behind the tracker's back.
    pub fn grow(&mut self, pages: usize) {
        let block = self.ram.len() - 2;
        let length = self.ram[block].len() + pages;
        self.ram[block].resize(length, 0);
        self.written[block].resize(length, false);
    }

    pub fn snapshot(&self) -> Rc<Snapshot> {
        Rc::new(Snapshot {
            ram: self.ram.clone(),
            device: self.device,
        })
    }

    pub fn run_state(&self) -> RunState {
        if self.running {
            RunState::Running
        } else {
            RunState::Stopped
        }
    }

    pub fn arm_all(&mut self) {
        self.written = blank(&self.ram);
    }

    /// The tracker's scan: the pages written since they were armed, as it finds the blocks now.
    pub fn scan(&self) -> DirtySet {
        let pages: Vec<u64> = self.written.iter().map(|b| b.len() as u64).collect();
        let mut set = DirtySet::new(&pages);
        for (block, written) in (0u16..).zip(&self.written) {
            for (first, _) in (0u64..).zip(written).filter(|(_, w)| **w) {
                set.set(PageRun {
                    block: BlockId(block),
                    first,
                    count: 1,
                });
            }
        }
        set
    }

    pub fn arm(&mut self, dirty: &DirtySet) {
        for run in dirty.runs() {
            let block = &mut self.written[usize::from(run.block.0)];
            block[run.first as usize..(run.first + run.count) as usize].fill(false);
        }
    }

    pub fn move_gate(&mut self) {
        self.gate.commit.append(&mut self.gate.current);
    }

    /// The packets that are let go.
    pub fn release(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.gate.commit)
    }

    /// The packets that have left when these are let go, and nothing but the guest holds them.
    pub fn leave(&mut self, mut packets: Vec<u64>) -> Vec<u64> {
        self.gate.queued.append(&mut packets);
        match self.running {
            true => std::mem::take(&mut self.gate.queued),
            false => Vec::new(),
        }
    }

    /// The oldest packet that is still here.
    pub fn oldest_held(&self) -> Option<u64> {
        let gate = &self.gate;
        let held = gate.queued.iter().chain(&gate.commit).chain(&gate.current);
        held.copied().min()
    }

    pub fn open_gate(&mut self) -> Vec<u64> {
        self.gate.closed = false;
        self.move_gate();
        self.release()
    }
}

fn blank(ram: &Ram) -> Vec<Vec<bool>> {
    ram.iter().map(|block| vec![false; block.len()]).collect()
}
