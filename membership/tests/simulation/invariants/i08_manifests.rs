//! A manifest means that all its files are there, of equal digest, once each; `latest` never points backwards
//! or at an absent file.

use super::{Finding, Invariant, hold};
use crate::world::{Seen, World};

pub(super) struct Manifests;

impl Invariant for Manifests {
    fn see(&mut self, seen: &Seen, world: &World) -> Finding {
        let directory = &world.ctx.directory;
        match seen {
            Seen::ManifestWritten(checkpoint) => {
                let count = checkpoint.files.len() == world.ctx.job.parts as usize;
                let named = checkpoint.files.iter().enumerate().all(|(index, file)| {
                    file.file == format!("state-{index}") && file.blake3 == checkpoint.state_digest
                });
                hold(count && named && directory.is_whole(checkpoint), || {
                    format!("a manifest without its files: {checkpoint:?}")
                })
            }
            Seen::LatestMoved { from } => {
                let to = directory.latest;
                let there = to.is_some_and(|to| directory.manifests.contains_key(&to));
                hold(to >= *from && there, || format!("latest moves from {from:?} to {to:?}"))
            }
            _ => Ok(()),
        }
    }
}
