//! Records and reports of a run: metrics rows, events, TensorBoard curves and pictures, a progress
//! line, a timeline.
//!
//! Metrics and events are files of JSON lines that outlive every process. Everything here is called
//! from the coordinator's loop, except waits for the disk; nothing else here has a thread, sleeps
//! or decides anything.

pub(crate) mod alarms;
pub(crate) mod line_file;
pub(crate) mod logging;
pub(crate) mod losses;
pub(crate) mod mirror;

pub(crate) mod chronicle;
pub(crate) mod curve;
pub(crate) mod curves;
pub(crate) mod damage;
pub mod disk;
pub(crate) mod events;
pub(crate) mod metrics;
pub mod progress;
pub(crate) mod receipts;
pub(crate) mod scalars;
pub(crate) mod status;
pub(crate) mod table;
pub(crate) mod tensorboard;
pub(crate) mod timeline;
pub(crate) mod view;
