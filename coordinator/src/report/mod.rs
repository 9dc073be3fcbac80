//! What a run tells its user: metrics rows, events, TensorBoard curves and pictures, a progress line, a
//! timeline.
//!
//! Metrics and events are files of JSON, a line each, that outlive every process. Everything here is called
//! from the coordinator's loop, but for waits for the disk; nothing else has a thread, sleeps or decides
//! anything.

pub mod line_file;

pub mod chronicle;
pub mod curve;
pub mod curves;
pub mod damage;
pub mod disk;
pub mod events;
pub mod metrics;
pub mod progress;
pub mod receipts;
pub mod status;
pub mod table;
pub mod tensorboard;
pub mod timeline;
pub mod view;
