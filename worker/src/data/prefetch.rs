//! Prefetching: a thread that fills batches in the order in which the training loop takes them.
//!
//! Invariants:
//! 1. Batches come in the order of (step, phase), each exactly once; within a batch, samples lie in the
//!    order of shards and then of the stream. This does not depend on timing.
//! 2. Memory is bounded: besides the batches that the caller keeps there are at most `depth` + 1, and a
//!    recycled buffer is used before a new one is made.
//! 3. The thread ends before the prefetcher's drop returns, at the latest when the sample that it reads is
//!    done.

use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ganglion_proto::stream::{Change, SampleStream, StreamShape, ledger_term};
use tch::{Kind, Tensor};

use super::values::{SampleMut, Values};
use super::{DataError, DataSet};
use crate::random::{Draws, Key};

/// Words on which each of several tensors in one piece begins: 64 bytes.
const ALIGNMENT: usize = 16;

/// Range of batches to read ahead: of all phases that read new samples, from (`first_step`, `first_phase`)
/// up to step `end_step`, exclusive.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Seed of the job.
    pub seed: u64,
    /// V: number of data shards of the job.
    pub data_shards: u32,
    /// b: number of samples of one data shard in one phase.
    pub shard_batch: u32,
    /// Number of phases in each step that read new samples. Only these are counted.
    pub phases: u32,
    /// Data shards to read for.
    pub shards: Range<u32>,
    /// Step of the first batch.
    pub first_step: u64,
    /// Phase of the first batch; later steps begin at phase 0.
    pub first_phase: u32,
    /// Step before which to stop.
    pub end_step: u64,
    /// Maximum number of batches ready.
    pub depth: usize,
    /// Changes of the stream by samples that are left out.
    pub changes: Vec<Change>,
}

impl Plan {
    /// Returns the (step, phase) of every batch, in order.
    fn batches(&self) -> impl Iterator<Item = (u64, u32)> + use<> {
        let &Plan { first_step, first_phase, end_step, phases, .. } = self;
        (first_step..end_step).flat_map(move |step| {
            // A run that goes on in the middle of a step has read the earlier phases' batches.
            let first = if step == first_step { first_phase } else { 0 };
            (first..phases).map(move |phase| (step, phase))
        })
    }
}

/// Real samples of one phase.
#[derive(Debug)]
pub struct Batch {
    /// Step that uses the batch.
    pub step: u64,
    /// Phase within the step, of those that read new samples.
    pub phase: u32,
    /// The samples, `shard_batch` for each shard, in the order of shards.
    pub values: Values,
    /// Class of each sample, in the same order; empty if the data set has no labels.
    pub labels: Vec<i64>,
    /// Pixels of images on the training device, if they were uploaded.
    pub uploaded: Option<Tensor>,
    /// Draws that were made ahead, on the training device.
    pub draws: Draws,
    /// Sample checksum: the sum mod 2^64 of [`ledger_term`] over the samples that were read.
    pub ledger: u64,
}

/// Function that copies words of 4 bytes to the training device, as a flat tensor of f32.
pub type Upload = Box<dyn FnMut(&[f32]) -> Result<Tensor, c10d::Error> + Send>;

/// Function from a step, and a phase of those that read new samples, to draws of it and of the phases up to
/// the next.
pub type Draw = Box<dyn Fn(u64, u32) -> Vec<(Key, Vec<Tensor>)> + Send>;

/// Work of the reading thread beside reading.
#[derive(Default)]
pub struct Beside {
    /// Makes draws ahead.
    pub draw: Option<Draw>,
    /// Copies pixels and draws.
    pub upload: Option<Upload>,
}

/// Reader of batches ahead of the training loop.
#[derive(Debug)]
pub struct Prefetcher {
    /// `None` only inside `drop`.
    batches: Option<Receiver<Result<Batch, DataError>>>,
    /// Batch that was received and not taken yet.
    ready: Option<Result<Batch, DataError>>,
    spent: Sender<Values>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Prefetcher {
    /// Starts the reading thread.
    ///
    /// # Panics
    /// If the plan's shards are not among its `data_shards`, or the system cannot start a thread.
    pub fn start(dataset: Arc<DataSet>, plan: Plan) -> Prefetcher {
        Prefetcher::start_with(dataset, plan, Beside::default())
    }

    /// The same, with other work for each batch.
    ///
    /// # Panics
    /// As [`start`](Prefetcher::start).
    pub fn start_with(dataset: Arc<DataSet>, plan: Plan, beside: Beside) -> Prefetcher {
        // A shard beyond would read another shard's samples (D2).
        assert!(plan.shards.end <= plan.data_shards, "shards {:?} of {}", plan.shards, plan.data_shards);
        // The bounded channel is the limit on memory: a full one blocks the reading thread.
        let (filled, batches) = sync_channel(plan.depth);
        let (spent, reusable) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        // On the caller's side, so that a wrong plan panics where it was made.
        let stream = SampleStream::with_changes(plan.seed, dataset.len() as u64, &plan.changes);
        let reader = Reader { dataset, plan, stream, beside, filled, reusable, stop: Arc::clone(&stop) };
        let thread = thread::Builder::new()
            .name("prefetch".to_owned())
            .spawn(move || reader.run())
            .expect("a process that trains can start one more thread");
        Prefetcher { batches: Some(batches), ready: None, spent, stop, thread: Some(thread) }
    }

    /// Returns the next batch, and waits until it is read.
    ///
    /// # Errors
    /// The error in reading it, once; [`DataError::Finished`] afterwards and once all batches of the plan
    /// are taken.
    ///
    /// # Panics
    /// With the panic of the reading thread, if it panicked.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator's caller would have to handle the end twice"
    )]
    pub fn next(&mut self) -> Result<Batch, DataError> {
        // `wait` may have received it already.
        if let Some(ready) = self.ready.take() {
            return ready;
        }
        let batches = self.batches.as_ref().expect("only drop takes the receiver");
        // Not bounded: a thread that ends, for any reason, closes the channel.
        batches.recv().unwrap_or_else(|_| {
            // The channel is closed: either the plan is done, or the thread panicked.
            if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) {
                resume_unwind(panic);
            }
            Err(DataError::Finished)
        })
    }

    /// Returns the next batch if it is read already. An error in reading it is left for
    /// [`next`](Prefetcher::next).
    pub fn try_next(&mut self) -> Option<Batch> {
        if self.ready.is_none() {
            self.ready = self.batches.as_ref().and_then(|batches| batches.try_recv().ok());
        }
        // An error stays for `next`, which can return it.
        self.ready.take_if(|batch| batch.is_ok()).and_then(Result::ok)
    }

    /// Waits until the next batch, or the error in reading it, is there, at most `limit`; returns whether
    /// it is.
    pub fn wait(&mut self, limit: Duration) -> bool {
        if self.ready.is_none()
            && let Some(batches) = &self.batches
        {
            match batches.recv_timeout(limit) {
                Ok(batch) => self.ready = Some(batch),
                Err(RecvTimeoutError::Timeout) => return false,
                // The next `next` tells which end it was.
                Err(RecvTimeoutError::Disconnected) => {}
            }
        }
        true
    }

    /// Returns a batch's memory to the pool for later batches. It may come from another prefetcher.
    pub fn recycle(&self, batch: Batch) {
        // Without the thread no batch will come, so the memory is not needed.
        let _ = self.spent.send(batch.values);
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        // Relaxed suffices: the thread may read one more sample before it sees the flag.
        self.stop.store(true, Ordering::Relaxed);
        // Unblocks a thread that waits for room in the channel.
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            // A panic was already printed by the thread, and a second one in a drop would end the process.
            let _ = thread.join();
        }
    }
}

/// State of the reading thread.
struct Reader {
    dataset: Arc<DataSet>,
    plan: Plan,
    stream: SampleStream,
    beside: Beside,
    filled: SyncSender<Result<Batch, DataError>>,
    reusable: Receiver<Values>,
    stop: Arc<AtomicBool>,
}

impl Reader {
    fn run(mut self) {
        for (step, phase) in self.plan.batches() {
            let Some(batch) = self.read(step, phase).transpose() else {
                return;
            };
            let failed = batch.is_err();
            // Waits while enough batches are ready (invariant 2). Dropping the receiver ends the wait.
            if self.filled.send(batch).is_err() || failed {
                return;
            }
        }
    }

    /// Reads one batch; `None` when asked to stop.
    fn read(&mut self, step: u64, phase: u32) -> Result<Option<Batch>, DataError> {
        let Plan { data_shards, shard_batch, phases, ref shards, .. } = self.plan;
        let shape = self.dataset.shape();
        // A buffer that came back, if there is one; a new one else.
        let mut values = self.reusable.try_recv().unwrap_or_else(|_| Values::new(shape, 0));
        values.resize(shape, shards.len() * shard_batch as usize);
        let mut ledger = 0_u64;
        let mut labels = Vec::new();
        let numbers = shards.clone().flat_map(|shard| {
            // In the order of shards, then of the stream (D2): the place in the batch says whose sample
            // it is.
            let first = StreamShape { phases, data_shards, shard_batch }.first(step, phase, shard);
            first..first + u64::from(shard_batch)
        });
        let mut wanted = Vec::new();
        for (q, out) in numbers.zip(values.samples_mut(shape)) {
            let sample = self.stream.sample(q);
            let index =
                usize::try_from(sample).expect("a sample's index is below the length of the data set");
            wanted.push((index, out));
            labels.extend(self.dataset.labels().get(index).copied().map(i64::from));
            // Counted where it is read, so the checksum is of what was really trained on (D9).
            ledger = ledger.wrapping_add(ledger_term(q, sample));
        }
        // A batch is given on whole, or not at all.
        if !self.read_all(wanted)? {
            return Ok(None);
        }
        let mut draws = Draws::of(self.beside.draw.iter().flat_map(|draw| draw(step, phase)));
        // On this thread and on a stream of its own, while the training thread computes.
        let uploaded = match &mut self.beside.upload {
            Some(upload) => uploaded(&mut values, &mut draws, upload),
            None => Ok(None),
        };
        let uploaded = uploaded.map_err(|error| DataError::Upload(error.to_string()))?;
        Ok(Some(Batch { step, phase, values, labels, uploaded, draws, ledger }))
    }

    /// Reads samples into their places, on several threads where they have to be decoded; returns false
    /// when asked to stop.
    fn read_all(&self, wanted: Vec<(usize, SampleMut<'_>)>) -> Result<bool, DataError> {
        // Data in memory are only copied, which threads would not speed up.
        let threads = if self.dataset.is_decoded() { decoders() } else { 1 };
        let each = wanted.len().div_ceil(threads).max(1);
        let (dataset, stop) = (&*self.dataset, &*self.stop);
        let read = |wanted: &mut dyn Iterator<Item = (usize, SampleMut<'_>)>| {
            for (index, out) in wanted {
                // Looked at before each sample: a drop waits for one of them at most (invariant 3).
                if stop.load(Ordering::Relaxed) {
                    return Ok(false);
                }
                dataset.read_into(index, out)?;
            }
            Ok(true)
        };
        let mut wanted = wanted.into_iter();
        if threads == 1 {
            return read(&mut wanted);
        }
        thread::scope(|scope| {
            let mut parts = Vec::new();
            while wanted.len() > 0 {
                let part: Vec<_> = wanted.by_ref().take(each).collect();
                parts.push(scope.spawn(move || read(&mut part.into_iter())));
            }
            // In the order of the samples, so that of several errors always the same one is returned.
            let parts =
                parts.into_iter().map(|part| part.join().unwrap_or_else(|panic| resume_unwind(panic)));
            parts.collect::<Result<Vec<bool>, _>>().map(|parts| parts.into_iter().all(|whole| whole))
        })
    }
}

/// Copies pixels of images and draws to the training device in one piece; returns the pixels.
fn uploaded(
    values: &mut Values,
    draws: &mut Draws,
    upload: &mut Upload,
) -> Result<Option<Tensor>, c10d::Error> {
    let mut alone = Vec::new();
    // Tokens and arrays go with each shard.
    let words = match values {
        Values::Pixels(pixels) => pixels,
        Values::Tokens(_) | Values::Arrays(_) => &mut alone,
    };
    let pixels = words.len();
    let mut places = Vec::new();
    for tensor in draws.tensors_mut() {
        // Where a tensor of any kind may begin.
        words.resize(words.len().next_multiple_of(ALIGNMENT), 0.0);
        let own =
            Vec::<f32>::try_from(tensor.flatten(0, -1).view_dtype(Kind::Float)).expect("words on the CPU");
        places.push((words.len(), own.len()));
        words.extend(own);
    }
    if words.is_empty() {
        return Ok(None);
    }
    let there = upload(words);
    words.truncate(pixels);
    let there = there?;
    let part = |begin: usize, len: usize| {
        let [begin, len] = [begin, len].map(|n| i64::try_from(n).expect("a batch is in memory"));
        there.narrow(0, begin, len)
    };
    for (tensor, (begin, len)) in draws.tensors_mut().zip(places) {
        *tensor = part(begin, len).view_dtype(tensor.kind()).view(tensor.size().as_slice());
    }
    Ok((pixels > 0).then(|| part(0, pixels)))
}

/// Number of decoding threads of one worker: it shares its machine with others, and with its own training.
fn decoders() -> usize {
    // Half of the processors: the other half trains.
    thread::available_parallelism().map_or(1, |processors| (processors.get() / 2).clamp(1, 8))
}
