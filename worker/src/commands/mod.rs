//! The program's subcommands, and how a failure ends it.

pub mod error;
pub mod evaluate;
pub mod generator_file;
pub mod join;
pub mod linger;
pub mod sample;
