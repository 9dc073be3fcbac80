//! Connections, which deliver in order or break, and partitions, in which they stall.

use std::collections::{BTreeSet, VecDeque};

use ganglion_membership::member::Resume;
use ganglion_membership::{
    Fault, Generation, Group, LoadedFacts, Plan, Position, Progress, Term, WorkerId, WrittenPart,
};

use crate::job::Instant;
use crate::worker::StepRow;

/// A connection; also the id of the session that it carries.
pub(crate) type ConnId = usize;
/// A process of a worker.
pub(crate) type Proc = u32;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Node {
    Coordinator,
    Worker(Proc),
}

/// What a worker says to its coordinator.
#[derive(Clone, Debug)]
pub(crate) enum Up {
    Hello {
        proc: Proc,
        /// Which of its attempts to open a session this is.
        attempt: u64,
        token: Option<u64>,
        resume: Option<Resume>,
    },
    Loaded(LoadedFacts),
    Ready(Generation, Option<Position>),
    Fault(Generation, Fault),
    Heartbeat(Progress),
    Row(StepRow),
    Leave,
    PartWritten(Generation, WrittenPart),
    Finished {
        generation: Generation,
        position: Position,
        complete: bool,
    },
    /// It has come to the store of a generation.
    Enter(Generation),
}

/// What a coordinator says to a worker.
#[derive(Clone, Debug)]
pub(crate) enum Down {
    /// The newest generation whose states must not be used goes with it.
    Welcome {
        term: Term,
        worker: WorkerId,
        condemned: Option<Generation>,
    },
    Assignment(Term, Group),
    Abort {
        generation: Generation,
        probe: bool,
        condemned: bool,
    },
    Announce(Plan),
    /// The answer to a heartbeat.
    Pulse,
    /// Rows up to this step are recorded.
    RowsRecorded(u64),
    Release,
    Reject,
    Saved(Position),
    /// All members have come to the store; their addresses by rank.
    Met(Generation, Vec<Proc>),
}

/// What members say to each other.
#[derive(Clone, Debug)]
pub(crate) enum Peer {
    Greet {
        term: Term,
        generation: Generation,
        members: u64,
        position: Position,
    },
    /// One half of the source's state; the ledger goes with the second.
    Chunk {
        half: usize,
        value: u64,
        ledger: u64,
        fingerprint: u64,
        tainted: bool,
    },
    Print(u64),
    /// A rank's sum, read from its buffer when the network takes it, and its trailer.
    Part {
        buffer: u64,
        sum: u64,
        samples: u64,
        trailer: Trailer,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trailer {
    pub generation: Generation,
    pub position: Position,
    pub fingerprint: u64,
    pub plan: u64,
}

#[derive(Clone, Debug)]
pub(crate) enum Packet {
    Up(Box<Up>),
    Down(Box<Down>),
    Peer(Peer),
    /// The other side ended the connection, or it broke.
    End,
}

/// A connection. Side 0 opened it.
pub(crate) struct Conn {
    pub ends: [Node; 2],
    /// The term and generation of a link between two members.
    pub link: Option<(Term, Generation)>,
    pub closed: [bool; 2],
    pub broken: bool,
    /// When the last packet to each side arrives.
    pub last: [Instant; 2],
    /// What waits for a partition's end.
    pub stalled: [VecDeque<Packet>; 2],
}

impl Conn {
    pub(crate) fn side_of(&self, node: Node) -> usize {
        usize::from(self.ends[0] != node)
    }
}

#[derive(Default)]
pub(crate) struct Network {
    pub conns: Vec<Conn>,
    cut: BTreeSet<(Node, Node)>,
}

impl Network {
    pub(crate) fn open(&mut self, from: Node, to: Node, link: Option<(Term, Generation)>) -> ConnId {
        self.conns.push(Conn {
            ends: [from, to],
            link,
            closed: [false; 2],
            broken: false,
            last: [0; 2],
            stalled: Default::default(),
        });
        self.conns.len() - 1
    }

    /// The link of two members in a generation, if one of them opened it.
    pub(crate) fn link(&self, a: Proc, b: Proc, of: (Term, Generation)) -> Option<ConnId> {
        let ends = [Node::Worker(a), Node::Worker(b)];
        let is = |conn: &Conn| conn.link == Some(of) && conn.ends.iter().all(|end| ends.contains(end));
        self.conns.iter().rposition(is)
    }

    pub(crate) fn cut(&mut self, a: Node, b: Node) {
        self.cut.insert((a.min(b), a.max(b)));
    }

    pub(crate) fn mend(&mut self, a: Node, b: Node) {
        self.cut.remove(&(a.min(b), a.max(b)));
    }

    pub(crate) fn mend_all(&mut self) {
        self.cut.clear();
    }

    pub(crate) fn is_cut(&self, a: Node, b: Node) -> bool {
        !self.cut.is_empty() && self.cut.contains(&(a.min(b), a.max(b)))
    }

    /// Connections of a node, or between two, that still carry something.
    pub(crate) fn of(&self, a: Node, b: Option<Node>) -> Vec<ConnId> {
        let is =
            |conn: &Conn| !conn.broken && conn.ends.contains(&a) && b.is_none_or(|b| conn.ends.contains(&b));
        (0..self.conns.len()).filter(|id| is(&self.conns[*id])).collect()
    }
}
