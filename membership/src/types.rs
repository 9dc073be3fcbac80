//! Newtypes of ids and counts that must not be mixed up.

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
    /// Id of a worker process in its run. Never reused, not even by a process that comes back.
    WorkerId,
    u64
);
number!(
    /// Rank of a worker in its group, from 0.
    Rank,
    u32
);
number!(
    /// Generation number: one membership of the group. Only grows; 0 is before the first.
    Generation,
    u64
);
number!(
    /// Term: one start of a coordinator. Only grows.
    Term,
    u64
);
number!(
    /// Update index: the count of committed phases.
    Position,
    u64
);
