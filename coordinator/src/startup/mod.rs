//! From a command line to a coordinator that trains: recovery, listeners, and what is announced.

pub mod exclusion;
pub mod host;
mod listen;
pub mod mend;
pub mod recover;
pub mod resume;
pub mod run;
pub(crate) mod take_over;
