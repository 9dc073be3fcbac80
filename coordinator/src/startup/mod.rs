//! From a command line to a coordinator that trains: recovery, listeners, and what is announced.

pub(crate) mod exclusion;
pub mod host;
mod listen;
pub(crate) mod mend;
pub mod program;
pub(crate) mod recover;
pub(crate) mod resume;
pub mod run;
pub(crate) mod take_over;
