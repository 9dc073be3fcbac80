//! Group protocol: which workers train together, from which state, and how that changes.
//!
//! This crate is pure. [`Machine`], the coordinator's half, takes events and returns actions; [`Member`], a
//! worker's half, takes events and returns commands. They have no clock, socket, task or channel, and iterate
//! over ordered maps only, so the same events always give the same actions. The coordinator's shell owns the
//! clock and the sockets, journals each decision and carries it out; so does the worker with its threads.
//!
//! ```text
//!              all expected are loaded              fault, loss, planned change
//!  Gathering ---------------------------> Training ----------------------------> Regrouping
//!   |     ^                                |  ^  ^                                |      |
//!   |     | all dead or past their lease   |  |  +--------------------------------+      |
//!   |     +-------- Reconnecting ----------|--+           all members ready or lost      |
//!   | stop               ^   members back  | all finished                                |
//!   v                    |                 v                                             |
//! Ended <----------------|------------- Closing                                          |
//!        last checkpoint committed                                                       |
//!                        +---------------------------------------------------------------+
//!                                      no member is left, and not all are known dead
//! ```
//!
//! A new coordinator of a run that trained begins in Reconnecting.
//!
//! A coordinator that shall run two workers itself begins by starting them:
//!
//! ```
//! use std::time::Duration;
//! use ganglion_membership::{Action, Event, Limits, Machine, Recovered, Settings, Term};
//!
//! let limits = Limits::derive(Duration::from_secs(10));
//! let settings = Settings { term: Term(1), local_workers: 2, data_shards: 8, limits };
//! let mut machine = Machine::new(settings, Recovered::default());
//! let mut actions = Vec::new();
//! machine.handle(Duration::ZERO, Event::Started, &mut actions);
//! let spawned = actions.iter().filter(|action| matches!(action, Action::Spawn)).count();
//! assert_eq!(spawned, 2);
//! ```

mod backend;
mod checkpoint;
mod digest;
mod events;
mod limits;
mod machine;
pub mod member;
mod passport;
mod shape;
mod shards;
mod types;

pub use backend::Backend;
pub use checkpoint::{Assembly, Checkpoint, PartConflict, StoredFile, WrittenPart};
pub use digest::{Share, Stretch};
pub use events::{
    Action, Activity, Cause, Event, Fault, Group, GroupMember, LoadedFacts, Loss, Outcome, Plan, PlanKind,
    Progress, Recovered, Rejection, Rested, Settings, Start,
};
pub use limits::Limits;
pub use machine::Machine;
pub use member::Member;
pub use passport::{Difference, NUMERICS, OF_SAMPLES, Passport};
pub use shape::StepShape;
pub use shards::shard_ranges;
pub use types::{Generation, Position, Rank, Term, Time, WorkerId};
