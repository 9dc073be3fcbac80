//! The program's subcommands, and how a failure ends it.

mod encode;
pub(crate) mod error;
pub(crate) mod evaluate;
pub(crate) mod generator_file;
pub mod join;
pub(crate) mod linger;
pub(crate) mod probe;
pub mod program;
pub(crate) mod restored;
pub(crate) mod sample;
mod tokens;
