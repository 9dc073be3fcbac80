//! Images of one size, all in memory.

use std::collections::BTreeSet;

use super::framing::Image;

/// Images of one size, all in memory.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) channels: usize,
    /// Images x height x width x channels, at least one image.
    pub(super) bytes: Vec<u8>,
}

impl Memory {
    /// Number of images.
    pub(super) fn len(&self) -> usize {
        self.bytes.len() / self.image_bytes()
    }

    /// Drops all images but those with these ascending indices.
    pub(super) fn keep(&mut self, kept: &[usize]) {
        let size = self.image_bytes();
        for (to, from) in kept.iter().enumerate() {
            // In place: the images may fill most of the memory.
            self.bytes.copy_within(from * size..(from + 1) * size, to * size);
        }
        self.bytes.truncate(kept.len() * size);
    }

    fn image_bytes(&self) -> usize {
        self.width as usize * self.height as usize * self.channels
    }

    /// Hashes all images but those at the given indices.
    pub(super) fn hash_without(&self, left_out: &[u64]) -> blake3::Hash {
        let mut content = blake3::Hasher::new();
        content.update(&self.height.to_le_bytes());
        content.update(&self.width.to_le_bytes());
        // The same hash as image by image, without a loop over them.
        if left_out.is_empty() {
            return content.update(&self.bytes).finalize();
        }
        let gone: BTreeSet<u64> = left_out.iter().copied().collect();
        for index in (0..self.len()).filter(|index| !gone.contains(&(*index as u64))) {
            content.update(self.image(index).bytes);
        }
        content.finalize()
    }

    pub(super) fn image(&self, index: usize) -> Image<'_> {
        let size = self.image_bytes();
        Image {
            width: self.width,
            height: self.height,
            channels: self.channels,
            bytes: &self.bytes[index * size..][..size],
        }
    }
}
