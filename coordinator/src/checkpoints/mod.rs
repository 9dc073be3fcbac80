//! Checkpoints: which there are, writing them, the best one, and patience with their storage.

pub mod best;
pub mod catalog;
pub mod model_card;
pub mod retry;
pub mod writer;
