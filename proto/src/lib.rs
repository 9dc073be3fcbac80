//! The wire contract of package `ganglion.v1` and its conversion to the types of the domain.
//!
//! The generated messages stay behind [`wire`]; the rest of Ganglion uses [`job::Job`] and the messages of
//! [`message`]. What a run agrees on besides messages is here as well: the order of its samples ([`stream`]),
//! the form of a checkpoint's manifest ([`manifest`]), of a timeline ([`trace`]) and of the structured log
//! ([`log`]). Whatever comes from the wire is checked on the way: see [`Malformed`].

mod bounds;
mod convert;
pub mod credentials;
pub mod data_report;
pub mod dial;
mod error;
pub mod evaluation;
pub mod failpoint;
pub mod found;
pub mod job;
pub mod listen;
pub mod log;
pub mod manifest;
pub mod message;
pub mod rows;
mod shown;
pub mod signals;
pub mod stream;
pub mod throttle;
pub mod trace;

/// The generated messages, clients and servers.
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::unwrap_used)]
pub mod wire {
    tonic::include_proto!("ganglion.v1");

    /// Describes all of them, for clients that ask what there is.
    pub const DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("ganglion");
}

pub use convert::{activity_to_wire, checked_status};
pub use error::Malformed;
pub use shown::{printable, printable_name, printable_start};

/// Version of the contract. A worker that speaks another is refused at its hello.
pub const PROTOCOL: u32 = 1;

/// The largest message either side accepts, in bytes.
pub const MESSAGE_LIMIT: usize = 16 << 20;
