//! Wall-clock time, for records and diagnostics. No decision of the group protocol depends on it.

pub(crate) use ganglion_proto::clock::{now, wall_clock};
