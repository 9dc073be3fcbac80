//! Wire contract of package `ganglion.v1` and its conversion to the types of the domain.
//!
//! The generated messages stay behind [`wire`]; the rest of Ganglion uses [`job::Job`] and the
//! messages of [`message`]. Other formats that processes of a run share are here as well: the order
//! of samples ([`stream`]), the manifest of a checkpoint ([`manifest`]), the timeline ([`trace`])
//! and the structured log ([`log`]). Content from the wire is checked during conversion: see
//! [`Malformed`].

mod bounds;
mod convert;
pub mod credentials;
pub mod data_report;
pub mod dial;
mod error;
pub mod evaluation;
pub mod failpoint;
pub mod format;
pub mod found;
pub mod job;
pub mod listen;
pub mod log;
pub mod manifest;
pub mod message;
pub mod names;
pub mod record;
pub mod rows;
mod shown;
pub mod signals;
pub mod stream;
pub mod throttle;
pub mod trace;

/// Generated messages, clients and servers.
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::unwrap_used)]
pub mod wire {
    tonic::include_proto!("ganglion.v1");

    /// File descriptor set of all messages and services, for gRPC reflection.
    pub const DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("ganglion");
}

pub use convert::{activity_to_wire, checked_status};
pub use error::Malformed;
pub use shown::{printable, printable_name, printable_start};

/// Version of the wire contract. A worker with another version is refused at its hello.
pub const PROTOCOL: u32 = 2;

/// Largest message that either side accepts, in bytes.
pub const MESSAGE_LIMIT: usize = 16 << 20;
