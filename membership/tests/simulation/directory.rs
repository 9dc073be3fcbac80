//! The run directory, which outlives every process: the journal's rows and the checkpoints' files.

use std::collections::BTreeMap;

use ganglion_membership::{
    Checkpoint, Generation, Group, Passport, Position, Share, StoredFile, Stretch, Term, WorkerId,
    WrittenPart,
};

use crate::job::{Job, State};

/// A row of the journal.
#[derive(Clone, Debug)]
pub(crate) enum Row {
    Term(Term),
    Worker(WorkerId, Option<u64>),
    Group(Term, Group),
    Condemned(Generation),
    Closed(Generation),
    Passport(Passport),
    Token(u64),
}

/// Fault of the storage as a worker sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// Nothing is answered until it is mended.
    Hangs,
    /// Full, read-only or away: everything is refused at once.
    Fails,
    /// Everything takes long.
    Slow,
}

#[derive(Default)]
pub(crate) struct Directory {
    pub journal: Vec<Row>,
    /// Recorded rows of metrics: by step, its ledger.
    pub rows: BTreeMap<u64, u64>,
    pub term: Term,
    last_worker: u64,
    last_token: u64,
    pub group: Option<Group>,
    pub condemned: Option<Generation>,
    pub closed: Option<Generation>,
    pub passport: Option<Passport>,
    /// The workers that each token's process has been, oldest first.
    pub tokens: BTreeMap<u64, Vec<WorkerId>>,
    /// Whether writes and reads of checkpoints fail.
    pub storage_down: bool,
    /// Files by position, index and digest.
    pub files: BTreeMap<(u64, u32, String), State>,
    pub manifests: BTreeMap<u64, Checkpoint>,
    pub latest: Option<u64>,
}

impl Directory {
    pub(crate) fn journal(&mut self, row: Row) {
        match &row {
            Row::Term(term) => self.term = *term,
            Row::Worker(worker, token) => {
                self.last_worker = worker.0;
                if let Some(token) = token {
                    self.tokens.entry(*token).or_default().push(*worker);
                }
            }
            Row::Group(_, group) => self.group = Some(group.clone()),
            Row::Condemned(generation) => self.condemned = Some(*generation),
            Row::Closed(generation) => self.closed = Some(*generation),
            Row::Passport(passport) => self.passport = Some(passport.clone()),
            Row::Token(token) => {
                self.last_token = *token;
                self.tokens.insert(*token, Vec::new());
            }
        }
        self.journal.push(row);
    }

    /// The last step up to which all rows are recorded.
    pub(crate) fn rows_up_to(&self) -> u64 {
        (1..).zip(self.rows.keys()).take_while(|(step, recorded)| step == *recorded).count() as u64
    }

    pub(crate) fn next_worker(&self) -> WorkerId {
        WorkerId(self.last_worker + 1)
    }

    pub(crate) fn next_token(&self) -> u64 {
        self.last_token + 1
    }

    /// The token of the process that a worker is.
    pub(crate) fn token_of(&self, worker: WorkerId) -> Option<u64> {
        let is = |(_, workers): &(&u64, &Vec<WorkerId>)| workers.contains(&worker);
        self.tokens.iter().find(is).map(|(token, _)| *token)
    }

    /// Writes a file, which does no harm where it is there already; `None` while the storage is down.
    pub(crate) fn write_part(&mut self, job: &Job, state: &State, index: u32) -> Option<WrittenPart> {
        if self.storage_down {
            return None;
        }
        self.files.insert((state.position.0, index, state.digest()), *state);
        Some(part(job, state, index))
    }

    /// Writes a manifest where there is none; the one that is there goes before.
    pub(crate) fn write_manifest(&mut self, checkpoint: Checkpoint) -> Option<Checkpoint> {
        if self.storage_down {
            return None;
        }
        Some(self.manifests.entry(checkpoint.position.0).or_insert(checkpoint).clone())
    }

    /// Moves `latest`, never back.
    pub(crate) fn move_latest(&mut self, position: Position) {
        self.latest = Some(self.latest.map_or(position.0, |latest| latest.max(position.0)));
    }

    /// The most advanced checkpoint whose files are all there.
    pub(crate) fn newest_manifest(&self) -> Option<&Checkpoint> {
        self.manifests.values().rev().find(|checkpoint| self.is_whole(checkpoint))
    }

    pub(crate) fn is_whole(&self, checkpoint: &Checkpoint) -> bool {
        let there = |(index, file): (u32, &StoredFile)| {
            self.files.contains_key(&(checkpoint.position.0, index, file.blake3.clone()))
        };
        (0..).zip(&checkpoint.files).all(there)
    }

    /// What a checkpoint holds; `None` while the storage is down.
    pub(crate) fn load(&self, checkpoint: &Checkpoint) -> Option<State> {
        let key = (checkpoint.position.0, 0, checkpoint.state_digest.clone());
        if self.storage_down { None } else { self.files.get(&key).copied() }
    }
}

/// The report of a file.
pub(crate) fn part(job: &Job, state: &State, index: u32) -> WrittenPart {
    let (step, phase) = (state.position.0 / job.phases, state.position.0 % job.phases);
    WrittenPart {
        step,
        phase: u32::try_from(phase).expect("a step has few phases"),
        index,
        count: job.parts,
        file: file(state, index),
        fingerprint: state.fingerprint(),
        share: share(state, (index as usize, job.parts as usize)),
    }
}

/// The share of a file in the digest: each has some of the fingerprint's bytes.
fn share(state: &State, (index, parts): (usize, usize)) -> Share {
    let bytes = state.fingerprint().to_le_bytes();
    let [start, end] = [index, index + 1].map(|index| index * bytes.len() / parts);
    let stretch = Stretch::of(bytes.len() as u64, start as u64, &[&bytes[start..end]]);
    Share { total: bytes.len() as u64, stretches: vec![stretch] }
}

fn file(state: &State, index: u32) -> StoredFile {
    StoredFile { file: format!("state-{index}"), bytes: 1, blake3: state.digest() }
}

/// A checkpoint that one worker writes alone.
pub(crate) fn whole(job: &Job, state: &State) -> Checkpoint {
    let first = part(job, state, 0);
    Checkpoint {
        position: state.position,
        step: first.step,
        phase: first.phase,
        files: (0..job.parts).map(|index| file(state, index)).collect(),
        state_digest: state.digest(),
    }
}
