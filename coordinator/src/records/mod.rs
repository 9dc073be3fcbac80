//! Records and reports of a run: metrics rows, events, TensorBoard curves and pictures, a progress
//! line, a timeline.
//!
//! Metrics and events are files of JSON lines that outlive every process. Everything here is called
//! from the coordinator's loop, except waits for the disk; nothing else here has a thread, sleeps
//! or decides anything.

pub mod alarms;
pub mod line_file;
pub mod logging;
pub mod mirror;

pub mod chronicle;
pub mod curve;
pub mod curves;
pub mod damage;
pub mod disk;
pub mod events;
pub mod metrics;
pub mod progress;
pub mod receipts;
pub mod scalars;
pub mod status;
pub mod table;
pub mod tensorboard;
pub mod timeline;
pub mod view;
