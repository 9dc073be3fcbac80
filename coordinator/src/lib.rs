//! The coordinator: assigns data shards and hyperparameters to workers, supervises their group, and
//! owns the run directory.
//!
//! The crate never links libtorch. Every decision about the group is [`ganglion_membership::Machine`]'s;
//! this crate is the shell around it: sockets, clock, files and processes.
//!
//! A job is checked as a whole, before anything is started:
//!
//! ```
//! use ganglion_coordinator::job_file::{Source, read};
//!
//! let job = read(&Source::Embedded, &["job.seed=7".to_string()]).unwrap();
//! assert_eq!(job.job.seed, 7);
//! let errors = read(&Source::Embedded, &["job.step=100".to_string()]).unwrap_err();
//! assert!(errors.to_string().contains("did you mean job.steps?"), "{errors}");
//! ```
#![forbid(unsafe_code)]
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod api;
mod checkpoints;
pub mod commands;
pub mod control;
pub mod error;
pub mod job_file;
pub mod journal;
pub mod records;
pub mod run_dir;
pub mod startup;
mod system;
pub mod workers;
