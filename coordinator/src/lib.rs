//! The coordinator: assigns data shards and hyperparameters to workers, supervises their group, and
//! owns the run directory.
//!
//! The crate never links libtorch. Every decision about the group is [`ganglion_membership::Machine`]'s;
//! this crate is the shell around it: sockets, clock, files and processes.
#![forbid(unsafe_code)]

pub mod api;
pub mod checkpoints;
pub mod commands;
pub mod control;
pub mod error;
pub mod job_file;
pub mod journal;
pub mod records;
pub mod run_dir;
pub mod startup;
pub mod system;
pub mod workers;
