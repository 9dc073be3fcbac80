//! State sync: all members of a group get the state of one, in pieces.
//!
//! 1. A member that holds that state already keeps it, and nothing is copied for it.
//! 2. What a member receives replaces its own state only when all of it has arrived and its fingerprint is
//!    right. Until then the member keeps what it had.
//! 3. All members take part in each piece, so that they stay in step whoever lacks the state.

use std::ops::Range;

use c10d::Buffer;
use ganglion_membership::Position;
use ganglion_proto::failpoint;
use tch::{Kind, Tensor, no_grad};

use super::generation::TeamError;
use super::reduce::{Peers, Sharing, Wait, gather, pieces};
use super::report::Pending;
use super::trainer::Held;
use crate::objective::Model;
use crate::state::{State, narrow};

/// Floats of a piece that goes over the network: long enough that the start of a broadcast does not count, and
/// little beside a state.
const PIECE: usize = 4 << 20;

/// Number of words by which two states are compared: counters and fingerprint, the first of a report.
const SUMMARY: usize = 4;
/// Word of a member that holds no state of the update index.
const NONE: u64 = u64::MAX;

/// Returns the report that goes with a state, as words, of which the first [`SUMMARY`] are the state's own.
pub(super) fn report(held: &Held) -> Result<Vec<u64>, c10d::Error> {
    let fingerprint = c10d::aten::fingerprint(&held.state.flat, 0)?;
    Ok(held.pending.to_words(held.state.counters, fingerprint))
}

/// State of the source, as one member sees the exchange.
enum Side<'a> {
    /// This member is the source.
    Gives(&'a Tensor),
    /// This member lacks it.
    Takes(&'a Tensor),
    /// This member holds it.
    Holds,
}

impl Side<'_> {
    fn write(&self, piece: &Range<usize>, place: &Tensor) {
        if let Side::Gives(flat) = self {
            narrow(place, 0..piece.len()).copy_(&narrow(flat, piece.clone()));
        }
    }

    fn read(&self, piece: &Range<usize>, place: &Tensor) {
        if let Side::Takes(flat) = self {
            narrow(flat, piece.clone()).copy_(&narrow(place, 0..piece.len()));
        }
    }
}

/// Gives all members the state that member `source` holds at an update index, with its pending report. `held`
/// stays unchanged if this fails on the way.
pub(super) fn sync(
    peers: &Peers,
    (source, position, generation): (usize, Position, u64),
    model: &Model,
    held: &mut Option<Held>,
) -> Result<(), TeamError> {
    let rank = peers.shards.rank;
    let at_hand = held.as_ref().filter(|held| held.state.counters.position == position);
    let own = at_hand.map_or_else(|| Ok(vec![NONE; Pending::words(model)]), report)?;
    let all = gather(peers, &own)?;
    let (told, wanted) = (&all[source], &all[source][..SUMMARY]);
    if wanted[0] == NONE {
        return Err(TeamError::Diverged(format!(
            "rank {source} has no state of position {position} to give"
        )));
    }
    // After a loss the survivors mostly hold the same state already.
    if all.iter().all(|theirs| theirs.starts_with(wanted)) {
        return Ok(());
    }
    let damaged = || TeamError::Diverged("a report that came with a state is damaged".to_string());
    let (counters, fingerprint, pending) = Pending::from_words(told).ok_or_else(damaged)?;
    let lacks = !own.starts_with(wanted);
    let spare = lacks.then(|| State::zeros(model.layout.clone(), peers.device));
    // Numbered by generation: the source is about to send, a receiver has received and not taken over yet.
    if rank == source {
        failpoint::reached("heal-source", generation);
    }
    let side = match (&spare, &*held) {
        (Some(spare), _) => Side::Takes(&spare.flat),
        (None, Some(held)) if rank == source => Side::Gives(&held.state.flat),
        (None, _) => Side::Holds,
    };
    exchange(peers, source, position, model.layout.len, &side)?;
    if rank != source {
        failpoint::reached("heal", generation);
    }
    if let Some(mut state) = spare {
        if c10d::aten::fingerprint(&state.flat, 0)? != fingerprint {
            return Err(TeamError::Diverged("a state arrived without its fingerprint".to_string()));
        }
        state.counters = counters;
        *held = Some(Held { state, pending });
    } else if let Some(held) = held {
        held.pending = pending;
    }
    Ok(())
}

/// Exchanges a state of `len` floats, piece by piece.
fn exchange(
    peers: &Peers,
    source: usize,
    position: Position,
    len: usize,
    side: &Side<'_>,
) -> Result<(), TeamError> {
    let Peers { group, timeout, device, sharing, .. } = peers;
    // Each piece is bounded by the timeout of reduces; an abort of the group ends the wait at once.
    if let Sharing::All(memory) = sharing {
        let wait = Wait { group, timeout: *timeout, position: position.0 };
        let write = |piece: &Range<usize>, place: &Tensor| side.write(piece, place);
        return Ok(memory.pass(wait, len, write, |piece, places| side.read(piece, &places[source]))?);
    }
    let mut buffer = Buffer::zeros(PIECE.min(len), Kind::Float, *device)?;
    for piece in pieces(len, PIECE) {
        buffer.update(|place| side.write(&piece, place));
        buffer = group.broadcast(buffer, source)?.wait(*timeout)?;
        no_grad(|| side.read(&piece, buffer.tensor()));
    }
    Ok(())
}
