//! Check of a data set: reads every sample as training does, on all processors.
//!
//! 1. A sample is good if training could read it: the same file, decoder and framing.
//! 2. Memory holds the paths, 4 bytes a sample for its size, and a picture a thread.
//! 3. The report does not depend on the number of threads.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ganglion_proto::data_report::{Bad, Report, Size};
use ganglion_proto::job::{Data, DataKind};
use ganglion_proto::record::found as seen;

use super::data_set::required_path;
use super::folder::{self, Folder, Looked};
use super::framing::Framing;
use super::{DataError, DataSet, remote};

/// Maximum number of bad samples that are named. With more than these the source of the files is to blame.
const NAMED: usize = 100_000;
/// Maximum number of sizes that are counted apart.
const SIZES: usize = 1 << 16;
/// Maximum number of sizes in the report.
const TOLD_SIZES: usize = 5;
/// Interval of progress reports.
const PERIOD: Duration = Duration::from_millis(100);
/// Number of samples that a thread takes at a time.
const STRIDE: usize = 16;

/// Options of a check.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Look {
    /// Number of threads.
    pub threads: usize,
    /// Whether samples may have any size. Otherwise those of another size than most are bad.
    pub any_size: bool,
}

/// Reads every sample, and reports to `progress` the number done and the total.
///
/// # Errors
/// The data set as a whole is wrong, or cannot be read.
pub(crate) fn check(data: &Data, look: Look, progress: impl FnMut(u64, u64)) -> Result<Report, DataError> {
    let started = Instant::now();
    let mut report = match data.kind {
        DataKind::Folder => of_folder(data, look, progress)?,
        DataKind::Mnist10k | DataKind::Idx | DataKind::Cifar10 => in_memory(data)?,
        DataKind::Text | DataKind::Arrays => of_rows(data)?,
    };
    report.kind = data.kind.to_string();
    report.path = data.path.as_ref().map(|path| path.display().to_string());
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// Checks data in few files, which are read as a whole: once they are, all samples are good.
fn in_memory(data: &Data) -> Result<Report, DataError> {
    // With classes if there are any; a data set without them is good as well.
    let (set, no_classes) = match DataSet::open_labelled(data) {
        Ok(set) => (set, None),
        Err(error) => (DataSet::open(data)?, Some(error.to_string())),
    };
    let (width, height, bytes) = set.stored();
    let samples = set.left().len() as u64;
    let found = seen::Found { samples, ..set.found().clone() };
    let sizes = vec![Size { width, height, samples }];
    Ok(Report { found, bytes, sizes, no_classes, ..Report::default() })
}

/// Checks text or arrays: the opening reads all of them.
fn of_rows(data: &Data) -> Result<Report, DataError> {
    let set = DataSet::open(data)?;
    let found = seen::Found { samples: set.left().len() as u64, ..set.found().clone() };
    Ok(Report { bytes: set.bytes(), found, ..Report::default() })
}

fn of_folder(data: &Data, how: Look, progress: impl FnMut(u64, u64)) -> Result<Report, DataError> {
    let mut elsewhere = seen::Found::default();
    let data = &remote::here(data, &mut elsewhere)?;
    let framing = Framing::new(data)?;
    let folder::ToCheck { folder, mut found, no_classes } = folder::to_check(required_path(data)?, data)?;
    found.left_out.append(&mut elsewhere.left_out);
    found.samples = folder.len() as u64;
    let mut seen = look(&folder, &framing, how.threads, progress);
    if !how.any_size {
        seen.blame_odd_sizes(&folder);
    }
    let no_classes = no_classes.map(|error| error.to_string());
    let mut report = Report { found, no_classes, ..Report::default() };
    seen.tell(&folder, &mut report);
    folder::report_background(data, &mut report.found);
    Ok(report)
}

/// Findings of the threads.
#[derive(Default)]
struct Seen {
    bytes: u64,
    /// Facts of the good pictures.
    pictures: seen::Found,
    formats: BTreeMap<&'static str, u64>,
    /// Number of samples by width and height.
    sizes: BTreeMap<[u32; 2], u64>,
    other_sizes: u64,
    /// Indices of the samples by framed height and width.
    framed: BTreeMap<(usize, usize), Vec<u32>>,
    /// Problem of each bad sample, by index.
    bad: BTreeMap<usize, String>,
    bad_count: u64,
}

impl Seen {
    fn note(&mut self, folder: &Folder, index: usize, looked: Result<Looked, DataError>) {
        let looked = match looked {
            Ok(looked) => looked,
            Err(error) => return self.blame(index, error.to_string()),
        };
        self.bytes += looked.bytes;
        *self.formats.entry(looked.format).or_default() += 1;
        self.framed.entry(looked.framed).or_default().push(u32::try_from(index).unwrap_or(u32::MAX));
        self.pictures.add_pictures(1, &looked.picture, || folder.relative(index));
        let size = looked.picture.size;
        if self.sizes.len() < SIZES || self.sizes.contains_key(&size) {
            *self.sizes.entry(size).or_default() += 1;
        } else {
            self.other_sizes += 1;
        }
    }

    fn blame(&mut self, index: usize, problem: String) {
        self.bad_count += 1;
        self.bad.insert(index, problem);
        // The last ones go: the first in the order of the data set are the ones to look at.
        if self.bad.len() > NAMED {
            self.bad.pop_last();
        }
    }

    fn join(&mut self, other: Seen) {
        self.bytes += other.bytes;
        self.pictures.join(&other.pictures);
        // Sizes beyond the limit depend on which thread saw them first; their sum does not.
        self.other_sizes += other.other_sizes;
        self.bad_count += other.bad_count;
        self.bad.extend(other.bad);
        while self.bad.len() > NAMED {
            self.bad.pop_last();
        }
        other.formats.into_iter().for_each(|(format, n)| *self.formats.entry(format).or_default() += n);
        other.sizes.into_iter().for_each(|(size, n)| *self.sizes.entry(size).or_default() += n);
        other.framed.into_iter().for_each(|(size, at)| self.framed.entry(size).or_default().extend(at));
    }

    /// Returns the framed size of most samples; of several the greatest.
    fn usual(&self) -> Option<(usize, usize)> {
        // By the size itself where two are as frequent, so that no order of threads decides.
        self.framed.iter().max_by_key(|(size, places)| (places.len(), **size)).map(|(size, _)| *size)
    }

    fn blame_odd_sizes(&mut self, folder: &Folder) {
        let Some(usual) = self.usual() else { return };
        let odd: Vec<((usize, usize), Vec<u32>)> = self
            .framed
            .iter()
            .filter(|(size, _)| **size != usual)
            .map(|(size, at)| (*size, at.clone()))
            .collect();
        for ((height, width), places) in odd {
            for index in places {
                let index = index as usize;
                let shown = folder.name(index);
                self.blame(
                    index,
                    format!(
                        "{shown}: found {width} x {height} pixels (width x height), where most have {} x {}; set \
                         data.resize to the size to train on",
                        usual.1, usual.0
                    ),
                );
            }
        }
    }

    fn tell(self, folder: &Folder, report: &mut Report) {
        let most = self.usual();
        report.bytes = self.bytes;
        report.formats = self.formats.into_iter().map(|(format, count)| (format.to_owned(), count)).collect();
        if let Some((height, width)) = most {
            let of = [folder.channels(), height, width].map(|side| u32::try_from(side).unwrap_or(u32::MAX));
            [report.found.channels, report.found.height, report.found.width] = of;
        }
        report.found.join(&self.pictures);
        let mut sizes: Vec<Size> = self
            .sizes
            .into_iter()
            .map(|([width, height], samples)| Size { width, height, samples })
            .collect();
        // A stable sort: sizes that are as frequent stay in their order.
        sizes.sort_by_key(|size| std::cmp::Reverse(size.samples));
        let rest = sizes.split_off(sizes.len().min(TOLD_SIZES));
        report.other_sizes = self.other_sizes + rest.iter().map(|size| size.samples).sum::<u64>();
        report.sizes = sizes;
        report.bad = self.bad_count;
        let named =
            self.bad.into_iter().map(|(index, problem)| Bad { name: folder.relative(index), problem });
        report.bad_samples = named.collect();
    }
}

/// Reads all files on `threads` threads.
fn look(folder: &Folder, framing: &Framing, threads: usize, mut progress: impl FnMut(u64, u64)) -> Seen {
    let (next, done) = (AtomicUsize::new(0), AtomicU64::new(0));
    let (all, len) = (Mutex::new(Seen::default()), folder.len());
    let work = || {
        let (mut seen, mut out) = (Seen::default(), Vec::new());
        loop {
            // Only the number matters: results go through the lock below.
            let first = next.fetch_add(STRIDE, Ordering::Relaxed);
            if first >= len {
                break;
            }
            for index in first..(first + STRIDE).min(len) {
                seen.note(folder, index, folder.look(index, framing, &mut out));
                done.fetch_add(1, Ordering::Relaxed);
            }
        }
        // Once for each thread, at its end.
        all.lock().unwrap_or_else(PoisonError::into_inner).join(seen);
    };
    let (working, ended) = mpsc::channel::<()>();
    thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            let (work, working) = (&work, working.clone());
            scope.spawn(move || {
                work();
                drop(working);
            });
        }
        drop(working);
        // The wait returns at once when the last thread ends.
        while ended.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
            progress(done.load(Ordering::Relaxed), len as u64);
        }
    });
    progress(len as u64, len as u64);
    all.into_inner().unwrap_or_else(PoisonError::into_inner)
}
