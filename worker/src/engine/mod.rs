//! The engine: the training loop, and all that it does with an objective's gradients.
//!
//! `trainer` takes part in one generation after the other. `generation` forms the group, and
//! `state_sync` gives all its members one state; `train` is the loop, `together` computes several shards in
//! one pass, and `report` reports the steps; [`reduce`] sums gradients; [`commit`] applies their mean, after
//! [`finite`] judged it.

pub(crate) mod checkpoint_writer;
pub mod commit;
pub mod finite;
pub(crate) mod generation;
pub(crate) mod gradient_log;
pub(crate) mod passport;
pub(crate) mod profile;
pub mod reduce;
pub(crate) mod report;
mod state_sync;
pub(crate) mod together;
pub(crate) mod train;
pub(crate) mod trainer;
