//! Failpoints: named places at which a test can kill a process or stop one of its threads. Here they do nothing:
//! the programs of tests install the function that does.

use std::sync::OnceLock;

/// Called at each failpoint, with its name and number.
pub type Hook = fn(&str, u64);

static HOOK: OnceLock<Hook> = OnceLock::new();

/// Sets the function that is called at each failpoint of this process. The first one stays.
pub fn install(hook: Hook) {
    let _ = HOOK.set(hook);
}

/// Marks a failpoint. The number is an update index, a generation or a step; each point says which.
pub fn reached(point: &str, number: u64) {
    if let Some(hook) = HOOK.get() {
        hook(point, number);
    }
}
