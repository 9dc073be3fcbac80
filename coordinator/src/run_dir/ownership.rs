//! Claims: the second fence around a run directory, for file systems whose locks do not reach other
//! machines, or do not exist.
//!
//! Each coordinator that holds a run directory has a claim in `owners/`, a file whose name is a
//! number. It requires of the file system only that a file can be created by one process alone,
//! which NFS and Lustre guarantee also without locks.
//!
//! 1. Claims are created exclusively, and a number is never used again: of two that start at once
//!    one is refused.
//! 2. The newest claim counts. Its holder renews it every [`RENEWAL`] and marks it when it ends.
//! 3. A claim is taken over once its holder is known to have ended: it said so, the kernel freed its lock, or
//!    its process is gone. Where none of these can be seen, on another machine, the claim must stay unrenewed
//!    for [`PATIENCE`], by the watcher's own clock.
//! 4. A holder looks for a newer claim whenever it renews its own and before each commit to the
//!    journal; it stops at once when there is one. A new claimant writes its number to `lock` as
//!    well: an existing file is read afresh whenever it is opened, also on NFS, where a new name in
//!    a folder may stay unseen for a minute.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::system::clock;
use crate::system::node::{Node, Relation, start_time};

/// Interval at which a holder renews its claim.
// Ten of these fit into PATIENCE, so one that fails or comes late does no harm.
pub(crate) const RENEWAL: Duration = Duration::from_secs(2);
/// Time for which a claim must stay unrenewed before it is taken over, where its holder cannot be
/// looked up.
// After the death of a machine the run stands still for this long, so it is as short as renewals that
// stall allow.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// Interval at which a watched claim is read.
const LOOK: Duration = Duration::from_millis(250);
/// Maximum number of attempts to get a claim. Each refusal means that another process got one,
/// which is then judged.
const ATTEMPTS: u32 = 16;
/// Maximum number of bytes read of a claim.
// Anything may lie under the name of a claim; one of ours has a few hundred bytes.
const CLAIM_LIMIT: u64 = 4096;

/// Holder of a run directory, as written in its claim.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Holder {
    /// Number of the claim.
    pub claim: u64,
    /// Process number of the holder.
    pub pid: u32,
    /// Start time of the process, by the system's clock; 0 where that is not known.
    pub started: u64,
    /// Machine that the holder runs on.
    #[serde(flatten)]
    pub node: Node,
    /// Newest term known to the holder: its own, once it has one.
    pub term: u64,
    /// Whether it has the kernel's lock as well, which is freed however the process ends.
    pub locked: bool,
    /// Whether the holder has released the run directory.
    pub released: bool,
}

impl Holder {
    fn this_process(claim: u64, locked: bool, term: u64) -> Holder {
        let pid = std::process::id();
        let started = start_time(pid).unwrap_or_default();
        Holder { claim, pid, started, node: Node::here(), term, locked, released: false }
    }
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} on {}", self.pid, self.node)
    }
}

/// Reason why a run directory cannot be claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another process holds it.
    #[error("held by another coordinator ({0})")]
    Held(String),
    /// The file system lacks what a claim needs.
    #[error(
        "{}: {error}; a run directory needs a file system on which files can be created exclusively and written",
        folder.display()
    )]
    Unusable {
        /// Folder of the claims.
        folder: PathBuf,
        /// Error of the system.
        error: io::Error,
    },
}

/// Error: another process has claimed the run directory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "another coordinator ({by}) has taken this run over, since this one gave no sign of life for {} s; this one stops, \
     and that one goes on with the run", PATIENCE.as_secs()
)]
pub struct Superseded {
    by: String,
}

/// Check that a run directory still belongs to this process. Usable from any thread.
#[derive(Clone, Debug)]
pub struct Fence {
    folder: PathBuf,
    claim: u64,
    lost: Arc<watch::Sender<Option<Superseded>>>,
}

impl Fence {
    /// Checks for a newer claim.
    pub fn check(&self) -> Result<(), Superseded> {
        // Once lost, for ever lost: the newer claim may have been removed since.
        if let Some(superseded) = self.lost.borrow().clone() {
            return Err(superseded);
        }
        // `lock` first: an existing file is read afresh also on NFS, a new name in `owners/` may
        // not be seen.
        let named = read(&self.folder.join("lock")).holder.filter(|holder| holder.claim > self.claim);
        // An unreadable folder is no evidence of a newer claim: a storage that fails for a moment must
        // not end the run.
        let newest = || newest(&claims(&self.folder)).ok().flatten().filter(|claim| *claim > self.claim);
        let by = match named {
            Some(holder) => holder.to_string(),
            None => match newest() {
                Some(claim) => name(&self.folder, claim),
                None => return Ok(()),
            },
        };
        let superseded = Superseded { by };
        // Wakes `lost`, whose caller then stops the coordinator.
        self.lost.send_replace(Some(superseded.clone()));
        Err(superseded)
    }

    /// Waits until a newer claim has been seen.
    pub async fn lost(&self) -> Superseded {
        let mut lost = self.lost.subscribe();
        match lost.wait_for(Option::is_some).await {
            Ok(superseded) => superseded.clone().expect("it was waited for"),
            // Cannot happen, since this fence has a sender.
            Err(_) => std::future::pending().await,
        }
    }
}

/// A claim held by this process, renewed by a thread of its own and released when dropped.
pub struct Ownership {
    fence: Fence,
    holder: Arc<Mutex<Holder>>,
    /// Newest term known to the previous holder.
    earlier_term: u64,
    renewing: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Ownership {
    /// Claims a run directory; `locked` says whether this process has its lock. `tell` receives
    /// reasons for waiting.
    pub fn claim(folder: &Path, locked: bool, tell: &dyn Fn(&str)) -> Result<Ownership, ClaimError> {
        Ownership::claim_from(folder, locked, PATIENCE, tell)
    }

    fn claim_from(
        folder: &Path,
        locked: bool,
        patience: Duration,
        tell: &dyn Fn(&str),
    ) -> Result<Ownership, ClaimError> {
        let owners = claims(folder);
        let unusable = |error| ClaimError::Unusable { folder: owners.clone(), error };
        fs::create_dir_all(&owners).map_err(unusable)?;
        for _ in 0..ATTEMPTS {
            let newest = newest(&owners).map_err(unusable)?;
            let mut earlier_term = 0;
            if let Some(claim) = newest {
                // Blocks up to `patience` if the holder cannot be looked up.
                earlier_term = overcome(&claim_file(folder, claim), locked, patience, tell)?;
            }
            let holder = Holder::this_process(newest.unwrap_or(0) + 1, locked, earlier_term);
            match create(folder, &holder) {
                Ok(()) => return Ok(Ownership::begin(folder, holder)),
                // Another process has this number now; the next round judges that one.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(unusable(error)),
            }
        }
        Err(ClaimError::Held("others claim it all the time".to_string()))
    }

    fn begin(folder: &Path, holder: Holder) -> Ownership {
        let fence = Fence {
            folder: folder.to_path_buf(),
            claim: holder.claim,
            lost: Arc::new(watch::Sender::new(None)),
        };
        let earlier_term = holder.term;
        let holder = Arc::new(Mutex::new(holder));
        let (stop, stopped) = channel();
        let (watched, renewed) = (fence.clone(), holder.clone());
        let renew = move || {
            let mut count = 0;
            let mut failing = false;
            // The pause, which ends at once when the owner is dropped. A lost claim is renewed no more.
            while stopped.recv_timeout(RENEWAL) == Err(RecvTimeoutError::Timeout) && watched.check().is_ok() {
                count += 1;
                // Held while writing: `begun` and the release write the same file.
                let holder = renewed.lock().unwrap_or_else(PoisonError::into_inner);
                let written = write(&claim_file(&watched.folder, holder.claim), &holder, count);
                if let (Err(error), false) = (&written, failing) {
                    tracing::warn!("the claim to the run directory cannot be renewed: {error}; trying again");
                }
                failing = written.is_err();
            }
        };
        // A thread and no task: a loop or a runtime that hangs must not make the holder look dead while
        // it can still commit.
        let renewing = std::thread::Builder::new().name("claim".to_string()).spawn(renew);
        // Without the thread the fence is still checked before each commit.
        let renewing = renewing.map_err(|error| tracing::warn!("the claim is not renewed: {error}")).ok();
        Ownership { fence, holder, earlier_term, renewing: renewing.map(|thread| (stop, thread)) }
    }

    /// Check for a newer claim.
    pub fn fence(&self) -> &Fence {
        &self.fence
    }

    /// Newest term known to the previous holder.
    pub fn earlier_term(&self) -> u64 {
        self.earlier_term
    }

    /// Writes the term of this process to the claim.
    pub fn begun(&self, term: u64) {
        let mut holder = self.holder.lock().unwrap_or_else(PoisonError::into_inner);
        holder.term = term;
        // `lock` has the newer holder's name by then, and must keep it.
        if self.fence.check().is_err() {
            return;
        }
        // Errors are ignored: the next renewal writes it again.
        let _ = write(&claim_file(&self.fence.folder, holder.claim), &holder, 0);
        let _ = write(&self.fence.folder.join("lock"), &holder, 0);
    }
}

impl Drop for Ownership {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.renewing.take() {
            drop(stop);
            // Joined before the release is written, so that no renewal overwrites it.
            let _ = thread.join();
        }
        let mut holder = self.holder.lock().unwrap_or_else(PoisonError::into_inner);
        holder.released = true;
        if self.fence.check().is_ok() {
            let _ = write(&claim_file(&self.fence.folder, holder.claim), &holder, 0);
        }
    }
}

/// Whether a run directory is claimed, seen from outside. For a holder on another machine the age
/// of its newest renewal decides, by this machine's clock.
pub(crate) fn is_claimed(folder: &Path, locks_work: bool) -> bool {
    let Some(claim) = newest(&claims(folder)).ok().flatten() else { return false };
    let file = claim_file(folder, claim);
    match judge(&read(&file), locks_work) {
        Verdict::Ended(_) => false,
        Verdict::Lives(_) => true,
        Verdict::Unknown => {
            let renewed = fs::metadata(&file).and_then(|file| file.modified());
            let age = |renewed| clock::wall_clock().duration_since(renewed).unwrap_or_default();
            renewed.is_ok_and(|renewed| age(renewed) < PATIENCE)
        }
    }
}

/// Description of the holder in a run directory's `lock`.
pub(crate) fn recorded_holder(folder: &Path) -> String {
    let claim = read(&folder.join("lock"));
    // An earlier version wrote a line of text.
    let text = || String::from_utf8_lossy(&claim.content).lines().next().unwrap_or_default().to_string();
    claim.holder.as_ref().map_or_else(text, ToString::to_string)
}

/// Content of a claim's file.
#[derive(Clone, Default, PartialEq, Eq)]
struct Claim {
    content: Vec<u8>,
    /// `None` while it is being written.
    holder: Option<Holder>,
}

/// State of a claim's holder.
enum Verdict {
    /// Ended; with the newest term known to it.
    Ended(u64),
    /// Running; with its description.
    Lives(String),
    /// Unknown: it cannot be looked up from here.
    Unknown,
}

fn judge(claim: &Claim, locked: bool) -> Verdict {
    // Being written, or torn: it may become a living holder's at any moment.
    let Some(holder) = &claim.holder else { return Verdict::Unknown };
    let here = Node::here();
    let same_kernel = !here.boot.is_empty() && here.boot == holder.node.boot;
    let ended = Verdict::Ended(holder.term);
    // Both had the lock of one kernel, which gives it to one process at a time: this one has it, so that
    // one is gone.
    if holder.released || (same_kernel && holder.locked && locked) {
        return ended;
    }
    match here.relation(&holder.node) {
        // The number alone may be another process's by now.
        Relation::Same if start_time(holder.pid) == Some(holder.started) => {
            Verdict::Lives(holder.to_string())
        }
        Relation::Same => ended,
        // A reboot ended it, whether it said so or not.
        Relation::Before if !same_kernel => ended,
        // Two containers of one name may run on one kernel.
        Relation::Before | Relation::Elsewhere => Verdict::Unknown,
    }
}

/// Waits until a claim may be superseded; returns the newest term that its holder knew of.
fn overcome(file: &Path, locked: bool, patience: Duration, tell: &dyn Fn(&str)) -> Result<u64, ClaimError> {
    let first = read(file);
    match judge(&first, locked) {
        Verdict::Ended(term) => return Ok(term),
        Verdict::Lives(holder) => return Err(ClaimError::Held(holder)),
        Verdict::Unknown => {}
    }
    let who = first.holder.as_ref().map_or("another coordinator".to_string(), ToString::to_string);
    tell(&format!(
        "this run was held by {who}, which did not say that it ended; taking it over if that one gives no sign of life \
         for {} s",
        patience.as_secs()
    ));
    let begun = Instant::now();
    while begun.elapsed() < patience {
        std::thread::sleep(LOOK.min(patience / 4));
        let now = read(file);
        // Each write has other bytes, so equal content means that nobody has written.
        if now == first {
            continue;
        }
        return match judge(&now, locked) {
            Verdict::Ended(term) => Ok(term),
            Verdict::Lives(holder) => Err(ClaimError::Held(holder)),
            Verdict::Unknown => Err(ClaimError::Held(
                now.holder.map_or("it is just starting".to_string(), |now| now.to_string()),
            )),
        };
    }
    // Its holder may still be alive and cut off. Its fence finds the newer claim before it commits
    // anything (M1).
    Ok(first.holder.map_or(0, |holder| holder.term))
}

/// Creates a claim; "already exists" if there is one of this number or a higher one.
fn create(folder: &Path, holder: &Holder) -> io::Result<()> {
    let file = claim_file(folder, holder.claim);
    // Created under its own name and not atomically: the empty file takes the number, also where
    // links are refused. A claim without content counts as a holder that is just starting.
    let mut created = OpenOptions::new().write(true).create_new(true).open(&file)?;
    let written = created.write_all(&text(holder, 0)).and_then(|()| created.sync_all());
    // A process that has the lock as well may start on a full disk; a renewal writes the content
    // once there is room.
    written.or_else(|error| if holder.locked { Ok(()) } else { Err(error) })?;
    drop(created);
    // A claimant that listed the claims long ago may come late, when its number was used and is
    // free again.
    if newest(&claims(folder))? != Some(holder.claim) {
        let _ = fs::remove_file(&file);
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    let written = write(&folder.join("lock"), holder, 0);
    written.or_else(|error| if holder.locked { Ok(()) } else { Err(error) })?;
    // Only lower ones: their holders were judged, and the newest number must stay taken.
    for claim in numbers(&claims(folder))?.into_iter().filter(|claim| *claim < holder.claim) {
        let _ = fs::remove_file(claim_file(folder, claim));
    }
    Ok(())
}

/// Overwrites a holder in place: other machines would not see a new file under the old name at once.
fn write(file: &Path, holder: &Holder, renewal: u64) -> io::Result<()> {
    let text = text(holder, renewal);
    let mut file = OpenOptions::new().write(true).create(true).truncate(false).open(file)?;
    file.write_all(&text)?;
    // After the content: a reader in between finds the new first line, and at worst the end of an older
    // text behind it.
    file.set_len(text.len() as u64)
}

/// Renders the holder as a line, and a second line that changes with each renewal.
fn text(holder: &Holder, renewal: u64) -> Vec<u8> {
    static WRITTEN: AtomicU64 = AtomicU64::new(0);
    // Relaxed: the numbers must differ, and order no other memory.
    let count = WRITTEN.fetch_add(1, Ordering::Relaxed);
    let holder = serde_json::to_string(holder).expect("numbers and texts can be written as JSON");
    format!("{holder}\nrenewal {renewal:010}, write {count:010}\n").into_bytes()
}

fn read(file: &Path) -> Claim {
    let mut content = Vec::new();
    let read = File::open(file).and_then(|file| file.take(CLAIM_LIMIT).read_to_end(&mut content));
    let line = content.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let holder = read.ok().and_then(|_| serde_json::from_slice(line).ok());
    Claim { content, holder }
}

fn name(folder: &Path, claim: u64) -> String {
    read(&claim_file(folder, claim)).holder.map_or(format!("claim {claim}"), |holder| holder.to_string())
}

fn claims(folder: &Path) -> PathBuf {
    folder.join("owners")
}

fn claim_file(folder: &Path, claim: u64) -> PathBuf {
    claims(folder).join(format!("{claim:010}"))
}

/// Numbers of the claims. Files with other names are ignored.
fn numbers(owners: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(owners)? {
        let name = entry?.file_name();
        let name = name.to_str().filter(|name| name.len() == 10);
        numbers.extend(name.and_then(|name| name.parse::<u64>().ok()));
    }
    Ok(numbers)
}

fn newest(owners: &Path) -> io::Result<Option<u64>> {
    Ok(numbers(owners)?.into_iter().max())
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;
    use crate::journal::{Fact, Journal, JournalError};

    const QUICK: Duration = Duration::from_millis(400);

    fn silent(_: &str) {}

    fn claim(folder: &Path) -> Result<Ownership, ClaimError> {
        Ownership::claim_from(folder, false, QUICK, &silent)
    }

    /// Leaves a claim behind, as a holder that died would.
    fn leave(folder: &Path, holder: &Holder) {
        fs::create_dir_all(claims(folder)).unwrap();
        create(folder, holder).unwrap();
    }

    fn elsewhere(claim: u64) -> Holder {
        let node = Node { host: "other".to_string(), boot: "b".to_string(), pids: "p".to_string() };
        Holder { node, term: 6, ..Holder::this_process(claim, true, 0) }
    }

    #[test]
    fn without_locks_a_run_directory_has_one_holder() {
        let folder = tempfile::tempdir().unwrap();
        let first = claim(folder.path()).unwrap();
        let refused = claim(folder.path()).err().unwrap().to_string();
        assert!(refused.contains(&format!("process {} on", std::process::id())), "{refused}");
        assert!(is_claimed(folder.path(), false));
        first.begun(3);
        drop(first);
        assert!(!is_claimed(folder.path(), false));
        let second = claim(folder.path()).unwrap();
        assert_eq!((second.fence.claim, second.earlier_term()), (2, 3));
    }

    /// Invariant 1.
    #[test]
    fn of_many_that_claim_at_once_one_gets_it() {
        let folder = tempfile::tempdir().unwrap();
        for claim_before in [None, Some(elsewhere(1))] {
            claim_before.iter().for_each(|holder| leave(folder.path(), holder));
            let start = Barrier::new(8);
            let taken: Vec<_> = std::thread::scope(|scope| {
                let try_it = || {
                    start.wait();
                    claim(folder.path()).ok()
                };
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(try_it)).collect();
                threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(taken.len(), 1);
            drop(taken);
            fs::remove_dir_all(claims(folder.path())).unwrap();
        }
    }

    /// Invariant 3.
    #[test]
    fn a_holder_that_is_known_to_have_ended_is_followed_at_once() {
        let here = Holder::this_process(1, false, 4);
        let initial = "pid:[4026531836]".to_string();
        let rebooted = Node { boot: "before".to_string(), pids: initial, ..here.node.clone() };
        let mut ended = vec![
            Holder { pid: u32::MAX, ..here.clone() },
            Holder { started: here.started + 1, ..here.clone() },
            Holder { released: true, ..elsewhere(1) },
        ];
        ended.extend((here.node.pids == rebooted.pids).then_some(Holder { node: rebooted, ..here }));
        for holder in ended {
            let folder = tempfile::tempdir().unwrap();
            leave(folder.path(), &holder);
            let told = |line: &str| panic!("{holder:?}: {line}");
            let taken = Ownership::claim_from(folder.path(), false, PATIENCE, &told).unwrap();
            assert_eq!(taken.earlier_term(), holder.term);
        }
    }

    /// Invariant 3: on another machine only silence decides.
    #[test]
    fn a_holder_elsewhere_is_taken_over_only_once_it_is_silent() {
        let folder = tempfile::tempdir().unwrap();
        leave(folder.path(), &elsewhere(1));
        let (stop, stopped) = channel::<()>();
        std::thread::scope(|scope| {
            let file = claim_file(folder.path(), 1);
            scope.spawn(move || {
                while stopped.recv_timeout(QUICK / 8) == Err(RecvTimeoutError::Timeout) {
                    write(&file, &elsewhere(1), 1).unwrap();
                }
            });
            let told = Mutex::new(String::new());
            let tell = |line: &str| *told.lock().unwrap() = line.to_string();
            let refused = Ownership::claim_from(folder.path(), true, QUICK * 8, &tell).err().unwrap();
            assert!(refused.to_string().contains("on other"), "{refused}");
            assert!(told.lock().unwrap().contains("no sign of life for 3 s"));
            assert!(is_claimed(folder.path(), true));
            drop(stop);
        });
        assert_eq!(claim(folder.path()).unwrap().earlier_term(), 6);
    }

    /// Invariant 4.
    #[test]
    fn who_was_taken_over_commits_nothing_more() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("journal.sqlite");
        let held = claim(folder.path()).unwrap();
        let mut journal = Journal::open(&file).unwrap();
        journal.guard(&held).unwrap();
        journal.set_fact(Fact::Run, "before").unwrap();
        leave(folder.path(), &elsewhere(2));
        let refused = journal.set_fact(Fact::Run, "after").unwrap_err();
        assert!(matches!(refused, JournalError::Superseded), "{refused}");
        assert_eq!(journal.fact(Fact::Run).unwrap().as_deref(), Some("before"));
        assert!(held.fence().check().unwrap_err().to_string().contains("process"));
        let file = claim_file(folder.path(), 2);
        let newer = fs::read(&file).unwrap();
        drop(held);
        assert_eq!(fs::read(&file).unwrap(), newer, "it leaves the other's claim alone");
        assert!(read(&folder.path().join("lock")).holder.unwrap().claim == 2);
    }

    /// A new term is above all that earlier holders knew of, also when the journal was lost.
    #[test]
    fn terms_grow_over_a_lost_journal() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("journal.sqlite");
        for expected in [1, 2] {
            let held = claim(folder.path()).unwrap();
            let mut journal = Journal::open(&file).unwrap();
            journal.guard(&held).unwrap();
            let term = journal.begin_term(1).unwrap().0;
            assert_eq!(term, expected);
            held.begun(term);
            drop(journal);
            fs::remove_file(&file).unwrap();
        }
    }
}
