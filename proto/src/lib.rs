//! Wire contract of package `ganglion.v1` and its conversion to the types of the domain.
//!
//! The generated messages stay behind [`wire`]; the rest of Ganglion uses [`job::Job`] and the
//! messages of [`message`]. Other formats that processes of a run share are here as well: the order
//! of samples ([`stream`]), the manifest of a checkpoint ([`manifest`]), the timeline ([`trace`])
//! and the structured log ([`log`]). Content from the wire is checked during conversion: see
//! [`Malformed`].
//!
//! Both programs print through [`out`] and [`progress`].
//!
//! A line of `metrics.jsonl` is a [`MetricsRow`](record::MetricsRow):
//!
//! ```
//! use ganglion_proto::record::MetricsRow;
//!
//! let line = r#"{"step": 100, "images_seen": 12800, "ledger": "00c0ffee00c0ffee", "loss_generator": 0.7,
//!                "time": 1.5, "generation": 1, "world_size": 2}"#;
//! let row: MetricsRow = serde_json::from_str(line)?;
//! assert_eq!((row.step, row.scalars.get("loss_generator")), (100, Some(0.7)));
//! # Ok::<(), serde_json::Error>(())
//! ```
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod archive;
pub mod array;
mod bounds;
pub mod clock;
mod convert;
pub mod credentials;
pub mod data_report;
pub mod dial;
mod error;
pub mod evaluation;
pub mod failpoint;
pub mod format;
pub mod home;
pub mod job;
pub mod listen;
pub mod log;
pub mod manifest;
pub mod message;
pub mod names;
pub mod out;
pub mod package;
pub mod progress;
pub mod record;
pub mod rows;
mod shown;
pub mod signals;
pub mod stream;
pub mod throttle;
pub mod trace;
pub mod words;

/// Generated messages, clients and servers.
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::unwrap_used)]
pub mod wire {
    tonic::include_proto!("ganglion.v1");

    /// File descriptor set of all messages and services, for gRPC reflection.
    pub const DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("ganglion");
}

pub use bounds::{NETWORKS, PHASES, SAMPLE_TEXT};
pub use convert::{activity_to_wire, checked_status};
pub use error::Malformed;
pub use shown::{printable, printable_name, printable_start};

/// Version of the wire contract, and of how the members of a group exchange sums. A worker with another
/// version is refused at its hello.
pub const PROTOCOL: u32 = 6;

/// Largest message that either side accepts, in bytes.
pub const MESSAGE_LIMIT: usize = 16 << 20;
