//! The coordinator: assigns data shards and hyperparameters to workers, supervises their group, and
//! owns the run directory.
//!
//! The crate never links libtorch. Every decision about the group is [`ganglion_membership::Machine`]'s;
//! this crate is the shell around it: sockets, clock, files and processes.
#![forbid(unsafe_code)]

pub mod access;
pub mod alarms;
pub mod audit;
pub mod certs;
pub mod checkpoints;
pub mod cli;
pub mod clock;
pub mod data_check;
pub mod detach;
pub mod error;
pub mod exclusion;
pub mod host;
pub mod http;
pub mod inspect;
pub mod job_file;
pub mod journal;
pub mod judged;
pub mod keeper;
pub mod logging;
pub mod mend;
pub mod mirror;
pub mod model_card;
pub mod node;
pub mod operate;
pub mod ownership;
pub mod patience;
pub mod recover;
pub mod report;
pub mod resume;
pub mod run;
pub mod run_dir;
pub mod security;
pub mod server;
pub mod shell;
pub mod supervisor;
