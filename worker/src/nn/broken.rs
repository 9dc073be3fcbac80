//! An error inside a module of the user's, on its way out of a pass.
//!
//! A forward pass has no result but its tensors, and of the networks only those of the user's can fail in
//! one: they hold any program. So their errors unwind, and [`guarded`] stands at the outer end of each thread
//! that computes passes. What a pass leaves behind is not used any more.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// The time that the check of a module may take, in seconds, by the environment.
pub const LIMIT_VARIABLE: &str = "GANGLION_MODULE_LIMIT";
/// That time where the environment does not say.
const LIMIT: Duration = Duration::from_secs(300);
/// The exit code for wrong input.
const WRONG_INPUT: i32 = 2;

/// A module's program failed.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{module} fails {phase}: {detail}")]
pub struct BrokenModule {
    /// The file that it is from.
    pub module: String,
    /// In which part of its work, such as `in training`.
    pub phase: &'static str,
    /// The reason, as libtorch words it.
    pub detail: String,
}

impl BrokenModule {
    /// Leaves the pass.
    pub fn raise(self) -> ! {
        // No panic: the hook, which tells of bugs in this program, is not called.
        resume_unwind(Box::new(self))
    }

    /// Whether the machine is to blame, and not the module.
    pub fn is_lack_of_memory(&self) -> bool {
        self.detail.contains("out of memory") || self.detail.contains("not enough memory")
    }
}

/// Does work that runs passes; an error inside a user's module is its result.
///
/// # Errors
/// A module's program failed.
pub fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, BrokenModule> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| match panic.downcast::<BrokenModule>() {
        Ok(broken) => *broken,
        Err(panic) => resume_unwind(panic),
    })
}

/// Ends this process with the exit code for wrong input, and a word, unless it is dropped in time. A module's
/// program cannot be interrupted: while it runs nothing else ends the thread that it runs in.
pub struct Watchdog(Sender<()>);

impl Watchdog {
    /// Watches over the check of a module.
    pub fn over(module: &str) -> Watchdog {
        let given = std::env::var(LIMIT_VARIABLE).ok().and_then(|text| text.parse().ok());
        let limit = given.map_or(LIMIT, Duration::from_secs);
        let (done, ended) = channel();
        let words = format!(
            "{module}: its check takes longer than {} s; does its forward end? {LIMIT_VARIABLE}=SECONDS allows more",
            limit.as_secs()
        );
        let watch = move || {
            if ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                tracing::error!("{words}");
                c10d::exit_at_once(WRONG_INPUT);
            }
        };
        // Without a thread for it there is no limit, and the check is as good.
        let _ = std::thread::Builder::new().name("watchdog".to_string()).spawn(watch);
        Watchdog(done)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_a_module_is_a_result_and_a_bug_stays_a_panic() {
        let broken = |detail: &str| BrokenModule {
            module: "D.pt".to_string(),
            phase: "in training",
            detail: detail.to_string(),
        };
        assert_eq!(guarded(|| 7), Ok(7));
        let caught = guarded(|| broken("sizes do not match").raise()).map(|never: ()| never).unwrap_err();
        assert_eq!(caught.to_string(), "D.pt fails in training: sizes do not match");
        assert!(!caught.is_lack_of_memory() && broken("CUDA out of memory").is_lack_of_memory());
        assert!(std::panic::catch_unwind(|| guarded(|| resume_unwind(Box::new("a bug")))).is_err());
    }
}
