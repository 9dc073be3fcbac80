//! The group protocol: who trains together, from which state, and what happens when that changes.
//!
//! This crate is pure. [`Machine`] takes events and returns actions; it has no clock, socket, task or channel, and it
//! iterates over ordered maps only, so the same events always give the same actions. The coordinator's shell owns the
//! clock and the sockets, journals each decision and carries it out.
//!
//! ```text
//!              all expected are loaded              fault, loss, planned join
//!  Gathering ---------------------------> Training ----------------------------> Regrouping
//!      |                                   |    ^                                    |
//!      | stop                  all finished|    +------------------------------------+
//!      v                                   v          all members ready or dead
//!    Ended <--------------------------- Closing
//!              last checkpoint committed
//! ```
//!
//! Regrouping goes back to Gathering when no member is left: the newest checkpoint then goes on.

mod checkpoint;
mod machine;
mod passport;
mod shards;
mod types;

pub use checkpoint::{Assembly, Checkpoint, PartConflict, StoredFile, WrittenPart};
pub use machine::{
    Action, Event, Fault, Group, LoadedFacts, Loss, Machine, Member, Outcome, Plan, PlanKind, Recovered,
    Rejection, Settings, Start,
};
pub use passport::{Difference, Passport};
pub use shards::shard_ranges;
pub use types::{Generation, Position, Rank, Term, Time, WorkerId};
