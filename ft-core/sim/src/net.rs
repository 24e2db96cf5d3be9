//! The network between the hosts: links of three lanes, in order per lane, with delay, cuts and
//! resets. What travels on the control lane are the machines' own bytes.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use ft_core::wire::ChunkTag;

use crate::image::Chunk;
use crate::rng::Rng;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    Primary,
    Backup,
}

impl Side {
    pub fn other(self) -> Side {
        match self {
            Side::Primary => Side::Backup,
            Side::Backup => Side::Primary,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    Control,
    Bulk,
    Proof,
}

pub const LANES: [Lane; 3] = [Lane::Control, Lane::Bulk, Lane::Proof];

#[derive(Clone, Debug)]
pub enum Item {
    Message(Vec<u8>),
    Chunk {
        chunk: Rc<Chunk>,
        serial: u64,
        tag: ChunkTag,
    },
    Fin,
    Reset,
}

/// One direction of one lane.
#[derive(Debug, Default)]
struct Pipe {
    items: VecDeque<Item>,
    /// When the last item arrives: none overtakes another.
    last_at: u64,
    /// Items that were due while the network was cut.
    stuck: usize,
    /// Nothing more can be sent.
    closed: bool,
}

#[derive(Debug, Default)]
pub struct Link {
    /// By lane and by the side that receives.
    pipes: [[Pipe; 2]; 3],
    /// The daemons that made it, by number: a later one is not its owner.
    pub owners: [u32; 2],
}

/// An item is due: to be handed to [`Net::arrive`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    pub link: u32,
    pub lane: Lane,
    pub to: Side,
}

#[derive(Debug)]
pub struct Net {
    links: BTreeMap<u32, Link>,
    next: u32,
    /// By the side that would receive.
    cut: [bool; 2],
    /// Microseconds that an item is on its way, at least and at most.
    pub delay_us: (u64, u64),
}

impl Net {
    pub fn new(delay_us: (u64, u64)) -> Net {
        Net {
            links: BTreeMap::new(),
            next: 1,
            cut: [false; 2],
            delay_us,
        }
    }

    pub fn connect(&mut self, owners: [u32; 2]) -> u32 {
        let link = self.next;
        self.next += 1;
        self.links.insert(
            link,
            Link {
                owners,
                ..Link::default()
            },
        );
        // A link this old has no lane that anybody still listens to.
        while self.links.len() > 64 {
            self.links.pop_first();
        }
        link
    }

    pub fn owner(&self, link: u32, side: Side) -> Option<u32> {
        self.links.get(&link).map(|l| l.owners[side as usize])
    }

    pub fn delay(&self, rng: &mut Rng) -> u64 {
        rng.range(self.delay_us.0..=self.delay_us.1)
    }

    /// Puts an item on its way; says when it is due.
    pub fn send(
        &mut self,
        (now, rng): (u64, &mut Rng),
        delivery: Delivery,
        item: Item,
    ) -> Option<(u64, Delivery)> {
        let delay = self.delay(rng);
        let pipe = self.pipe(delivery)?;
        if pipe.closed {
            return None;
        }
        pipe.closed = matches!(item, Item::Fin | Item::Reset);
        if matches!(item, Item::Reset) {
            // What the kernel had queued is gone; deliveries that were due find nothing.
            pipe.items.clear();
            pipe.stuck = 0;
        }
        pipe.last_at = pipe.last_at.max(now + delay);
        pipe.items.push_back(item);
        Some((pipe.last_at, delivery))
    }

    /// The item that is due, unless the network is cut.
    pub fn arrive(&mut self, delivery: Delivery) -> Option<Item> {
        let cut = self.cut[delivery.to as usize];
        let pipe = self.pipe(delivery)?;
        if pipe.items.is_empty() {
            return None;
        }
        if cut || pipe.stuck > 0 {
            pipe.stuck = (pipe.stuck + 1).min(pipe.items.len());
            return None;
        }
        pipe.items.pop_front()
    }

    pub fn is_cut(&self) -> bool {
        self.cut != [false; 2]
    }

    pub fn cut(&mut self, to: Side) {
        self.cut[to as usize] = true;
    }

    /// Both directions work again; what is stuck arrives now.
    pub fn heal(&mut self, now: u64, rng: &mut Rng) -> Vec<(u64, Delivery)> {
        self.cut = [false; 2];
        let delays = self.delay_us;
        let mut due = Vec::new();
        for (&link, state) in &mut self.links {
            for (lane, pipes) in LANES.into_iter().zip(&mut state.pipes) {
                for (to, pipe) in [Side::Primary, Side::Backup].into_iter().zip(pipes) {
                    for _ in 0..std::mem::take(&mut pipe.stuck) {
                        pipe.last_at = pipe.last_at.max(now + rng.range(delays.0..=delays.1));
                        due.push((pipe.last_at, Delivery { link, lane, to }));
                    }
                }
            }
        }
        due
    }

    fn pipe(&mut self, delivery: Delivery) -> Option<&mut Pipe> {
        let link = self.links.get_mut(&delivery.link)?;
        Some(&mut link.pipes[delivery.lane as usize][delivery.to as usize])
    }
}
