//! The engine: the training loop, and all that it does with an objective's gradients.
//!
//! [`trainer`] takes part in one generation after the other. [`generation`] forms the group and gives all its
//! members one state; [`train`] is the loop, and [`report`] reports its steps;
//! [`reduce`] sums gradients; [`commit`] applies their mean, after [`finite`] judged it.

pub mod checkpoint_writer;
pub mod commit;
pub mod finite;
pub mod generation;
pub mod gradient_log;
pub mod passport;
pub mod profile;
pub mod reduce;
pub mod report;
pub mod train;
pub mod trainer;
