//! This machine: its clock, and its name.

pub(crate) mod clock;
pub(crate) mod node;
