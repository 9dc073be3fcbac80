//! Gathering of a few words of each rank on all of them.
//!
//! Over Gloo in ceil(log2 W) rounds (Bruck et al., 1997): in round k a rank sends what it has to the one
//! 2^k before it, and receives as much from the one 2^k behind. Gloo's own all-gather passes words from
//! neighbour to neighbour, W - 1 times one after the other.

use c10d::{Buffer, Error};
use tch::{Device, Kind, Tensor};

use super::Peers;

/// Size of a word.
const WORD: usize = size_of::<u64>();

/// Returns the words of all ranks, by rank. All give as many.
pub(in crate::engine) fn gather(peers: &Peers, words: &[u64]) -> Result<Vec<Vec<u64>>, Error> {
    let Peers { group, timeout, shards, device, .. } = peers;
    let (rank, world_size) = (shards.rank, shards.world_size());
    let length = WORD * words.len();
    let mut known: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let room = |ranks: usize| Buffer::zeros(ranks * length, Kind::Uint8, *device);
    let sent = |bytes: &[u8]| {
        let mut own = room(bytes.len() / length)?;
        own.update(|own| own.copy_(&Tensor::from_slice(bytes)));
        Ok::<_, Error>(own)
    };
    if !group.exchanges() {
        let (_, all) = group.all_gather(sent(&known)?, room(world_size)?)?.wait(*timeout)?;
        return Ok(by_rank(&bytes_of(&all), words.len()));
    }
    // What this rank knows is of itself and of those behind it, in order.
    let mut distance = 1;
    while distance < world_size {
        let ranks = distance.min(world_size - distance);
        let (own, bytes) = (sent(&known[..ranks * length])?, ranks * length);
        let to = [((rank + world_size - distance) % world_size, bytes)];
        let from = [((rank + distance) % world_size, bytes)];
        // Waits for one rank: bounded, and ended at once by an abort.
        let (_, came) = group.exchange(own, &to, room(ranks)?, &from)?.wait(*timeout)?;
        known.extend(bytes_of(&came));
        distance *= 2;
    }
    known.rotate_right(rank * length);
    Ok(by_rank(&known, words.len()))
}

fn bytes_of(buffer: &Buffer) -> Vec<u8> {
    Vec::try_from(buffer.tensor().to_device(Device::Cpu)).expect("bytes on the CPU")
}

fn by_rank(bytes: &[u8], words: usize) -> Vec<Vec<u64>> {
    let all: Vec<u64> = bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
    all.chunks_exact(words).map(<[u64]>::to_vec).collect()
}
