//! The program's subcommands beside training, a file for each, and its command line.

pub(crate) mod admin_client;
pub mod audit;
pub(crate) mod certs;
pub mod cli;
pub(crate) mod data_check;
pub(crate) mod inspect;
