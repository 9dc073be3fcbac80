//! Errors inside a user's module, raised out of a forward pass, and panics of threads beside training.
//!
//! A forward pass returns nothing but tensors, and of the networks only the user's can fail in one: they
//! hold any program. So their errors unwind, and [`guarded`] catches them at the outer end of each thread
//! that computes passes. Partial results of such a pass are not used any more.

use std::any::Any;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// Environment variable with the time limit for the check of a module, in seconds.
// For modules that compile for longer, or machines that are slower.
pub(crate) const LIMIT_VARIABLE: &str = "GANGLION_MODULE_LIMIT";
/// Time limit where the environment sets none.
const LIMIT: Duration = Duration::from_secs(300);
/// Exit code for wrong input.
const WRONG_INPUT: i32 = 2;
/// Exit code of a Rust program whose main thread panics.
const PANICKED: i32 = 101;

/// An error of a user's module.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{module} fails {phase}: {detail}")]
pub struct BrokenModule {
    /// Path of the module's file.
    pub module: String,
    /// Part of the work that failed, such as `in training`.
    pub phase: &'static str,
    /// Reason, as libtorch words it.
    pub detail: String,
}

impl BrokenModule {
    /// Unwinds out of the pass.
    pub fn raise(self) -> ! {
        // No panic: the hook, which reports bugs of this program, is not called.
        // Unwinds through this program's frames only: the pass has left libtorch by then.
        resume_unwind(Box::new(self))
    }

    /// Whether the machine lacks memory and the module is not to blame.
    pub fn is_lack_of_memory(&self) -> bool {
        self.detail.contains("out of memory") || self.detail.contains("not enough memory")
    }
}

/// Runs work that computes passes; an error inside a user's module becomes the result.
///
/// # Errors
/// A module's program failed.
pub(crate) fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, BrokenModule> {
    // What the pass has written belongs to a shard gradient that is given up with it.
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| match panic.downcast::<BrokenModule>() {
        Ok(broken) => *broken,
        // A bug of this program stays one.
        Err(panic) => resume_unwind(panic),
    })
}

/// Runs work beside training, which goes on without its result: an error or a panic comes back in words.
///
/// # Errors
/// The work failed, or a module's program in it, or it panicked. The hook has reported a panic.
pub(crate) fn contained<T, E: Display>(work: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    let panicked = |panic: Box<dyn Any + Send>| match panic.downcast::<BrokenModule>() {
        Ok(broken) => broken.to_string(),
        Err(panic) => {
            let words = panic.downcast_ref::<String>().map(String::as_str);
            let words = words.or_else(|| panic.downcast_ref::<&str>().copied());
            format!("a bug of this program: {}", words.unwrap_or("a panic without words"))
        }
    };
    // The work's own values go with its result: nothing half done is seen.
    catch_unwind(AssertUnwindSafe(work))
        .map_err(panicked)
        .and_then(|result| result.map_err(|error| error.to_string()))
}

/// Starts a thread that others wait for. If it panics this process ends at once: they would wait for ever,
/// and the group goes on without a worker that is gone.
///
/// # Errors
/// The system has no thread left.
pub(crate) fn spawn_awaited(name: &str, work: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let awaited = move || {
        if catch_unwind(AssertUnwindSafe(work)).is_err() {
            // The hook has said what and where.
            c10d::exit_at_once(PANICKED);
        }
    };
    std::thread::Builder::new().name(name.to_string()).spawn(awaited).map(drop)
}

/// Ends this process with the exit code for wrong input, and an error message, unless it is dropped in
/// time. A module's program cannot be interrupted: while it runs nothing else ends its thread.
pub(crate) struct Watchdog(Sender<()>);

impl Watchdog {
    /// Watches over the check of a module.
    pub(crate) fn over(module: &str) -> Watchdog {
        let given = std::env::var(LIMIT_VARIABLE).ok().and_then(|text| text.parse().ok());
        let limit = given.map_or(LIMIT, Duration::from_secs);
        let (done, ended) = channel();
        let words = format!(
            "{module}: its check takes longer than {} s; does it end? {LIMIT_VARIABLE}=SECONDS allows more",
            limit.as_secs()
        );
        let watch = move || {
            if ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                tracing::error!("{words}");
                // The module's thread cannot be ended, and destructors would wait for it.
                c10d::exit_at_once(WRONG_INPUT);
            }
        };
        // If no thread can be started there is no limit; the check itself is unaffected.
        let _ = std::thread::Builder::new().name("watchdog".to_string()).spawn(watch);
        Watchdog(done)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        // An error means that the thread has ended already, or was never started.
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

    #[test]
    fn what_fails_beside_training_comes_back_in_words() {
        assert_eq!(contained(|| Ok::<_, String>(7)), Ok(7));
        assert_eq!(contained(|| Err::<(), _>("no memory")), Err("no memory".to_string()));
        let bug = || -> Result<(), String> { resume_unwind(Box::new("index 3 of 2".to_string())) };
        assert_eq!(contained(bug), Err("a bug of this program: index 3 of 2".to_string()));
        let broken =
            BrokenModule { module: "G.pt".to_string(), phase: "in sampling", detail: "x".to_string() };
        assert_eq!(contained(|| -> Result<(), String> { broken.clone().raise() }), Err(broken.to_string()));
    }
}
