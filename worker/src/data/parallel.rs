//! Parallel map over many files, on all processors.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Number of items that a thread takes at a time: enough to be cheap, few enough that all threads end
/// together.
const BLOCK: usize = 64;

/// Returns the results for items in their order, or the error of the first item that has one.
pub(super) fn map<T: Sync, R: Send, E: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    map_blocks(items, BLOCK, work)
}

/// The same for few items that take long, of which a thread takes `size` at a time.
pub(super) fn map_blocks<T: Sync, R: Send, E: Send>(
    items: &[T],
    size: usize,
    work: impl Fn(&T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    // All of them: training has not begun.
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let done = Mutex::new(Vec::new());
    let run = || {
        // Only a hint to stop early; results go through the lock.
        while !failed.load(Ordering::Relaxed) {
            // Blocks are taken in order, so all before a failure are taken, and are finished.
            let block = next.fetch_add(1, Ordering::Relaxed);
            let Some(items) = items.chunks(size).nth(block) else { return };
            let results: Result<Vec<R>, E> = items.iter().map(&work).collect();
            if results.is_err() {
                failed.store(true, Ordering::Relaxed);
            }
            // Held for one push after a block of work.
            done.lock().unwrap_or_else(PoisonError::into_inner).push((block, results));
        }
    };
    thread::scope(|scope| {
        let others: Vec<_> =
            // No thread without a block.
            (1..threads.min(items.len().div_ceil(size))).map(|_| scope.spawn(run)).collect();
        run();
        for other in others {
            other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    // In the order of the items, so the error that is returned is the first, whatever the threads did.
    done.sort_by_key(|(block, _)| *block);
    let mut all = Vec::with_capacity(items.len());
    for (_, results) in done {
        all.extend(results?);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_their_order_and_the_first_error_wins() {
        let items: Vec<u32> = (0..10_000).collect();
        assert_eq!(map(&items, |item| Ok::<_, u32>(item * 2)).unwrap()[9_999], 19_998);
        for _ in 0..20 {
            let error = map(&items, |item| if *item % 1000 == 777 { Err(*item) } else { Ok(()) });
            assert_eq!(error, Err(777));
        }
        assert_eq!(map(&[], |_: &u32| Ok::<u32, u32>(1)), Ok(vec![]));
    }
}
