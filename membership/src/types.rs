//! Numbers that must not be mixed up.

use std::fmt;
use std::time::Duration;

/// Time since the shell's start, on a clock that never goes back.
pub type Time = Duration;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(
    /// A worker process, by its number in the run. Never used again, also not by a process that comes back.
    WorkerId,
    u64
);
number!(
    /// A worker's place in its group, from 0.
    Rank,
    u32
);
number!(
    /// One membership of the group. Only grows, and 0 is before the first.
    Generation,
    u64
);
number!(
    /// One start of a coordinator. Only grows.
    Term,
    u64
);
number!(
    /// The count of committed phases.
    Position,
    u64
);
