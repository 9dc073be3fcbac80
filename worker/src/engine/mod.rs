//! The engine: the training loop, and all that it does with an objective's gradients.
//!
//! [`trainer`] is the loop. [`team`] forms the group of a generation and gives all its members one state;
//! [`reduce`] sums gradients; [`commit`] applies their mean, after [`finite`] judged it.

pub mod checkpoint_writer;
pub mod commit;
pub mod finite;
pub mod gradient_log;
pub mod passport;
pub mod profile;
pub mod reduce;
pub mod team;
pub mod trainer;
