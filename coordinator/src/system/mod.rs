//! This machine: its clock, and its name.

pub mod clock;
pub mod node;
