//! The program's subcommands beside training, a file for each, and its command line.

pub mod admin_client;
pub mod audit;
pub mod certs;
pub mod cli;
pub mod data_check;
pub mod inspect;
