//! Checkpoints: which there are, writing them, the best one, and patience with their storage.

pub(crate) mod best;
pub(crate) mod catalog;
pub(crate) mod model_card;
pub(crate) mod retry;
pub(crate) mod writer;
