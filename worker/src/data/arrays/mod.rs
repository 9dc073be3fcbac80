//! Arrays: `.npy` files of equal length, one row of each to a sample.
//!
//! 1. Rows are read where they lie, by their place. Memory holds nothing of them.
//! 2. Each number is read once at the opening: the fingerprint covers all, and what is not finite is found.

mod npy;

use std::fs;
use std::path::{Path, PathBuf};

use ganglion_proto::array::ArraySpec;
use ganglion_proto::job::Data;
use ganglion_proto::printable_start;
use ganglion_proto::record::found::Found;
use ganglion_proto::words::counted;

use self::npy::Npy;
use super::{DataError, input};

/// Extension of the files.
pub(super) const ENDING: &str = "npy";
/// Most arrays of a sample.
const MAX_ARRAYS: usize = 256;

/// The arrays of a data set, in the order of their names.
#[derive(Debug)]
pub(super) struct Arrays {
    arrays: Vec<(String, Npy)>,
    samples: u64,
}

impl Arrays {
    /// Opens the arrays of section `[data]`, at a path on this machine.
    pub(super) fn open(source: &Data, path: &Path, found: &mut Found) -> Result<Arrays, DataError> {
        let mut files =
            if path.is_dir() { below(path, found)? } else { vec![(stem(path), path.to_path_buf())] };
        if let Some(names) = &source.names {
            choose(path, &mut files, names, found)?;
        }
        if files.is_empty() || files.len() > MAX_ARRAYS {
            let found = counted(files.len(), "array");
            return Err(input(
                path,
                &format!("found {found}, expected 1 to {MAX_ARRAYS} files NAME.{ENDING}"),
            ));
        }
        files.sort();
        let open = |(name, path): (String, PathBuf)| Npy::open(&path).map(|npy| (name, npy));
        let arrays = files.into_iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let samples = arrays[0].1.rows;
        if let Some((name, other)) = arrays.iter().find(|(_, npy)| npy.rows != samples) {
            return Err(input(
                path,
                &format!(
                    "{} has {} and {name} has {}; a sample is a row of each, so all must have equally many",
                    arrays[0].0,
                    counted(samples, "row"),
                    other.rows
                ),
            ));
        }
        Ok(Arrays { arrays, samples })
    }

    /// Number of samples, at least 1.
    pub(super) fn samples(&self) -> u64 {
        self.samples
    }

    /// Names, kinds and shapes.
    pub(super) fn specs(&self) -> Vec<ArraySpec> {
        let spec = |(name, npy): &(String, Npy)| ArraySpec {
            name: name.clone(),
            kind: npy.kind,
            shape: npy.shape.clone(),
        };
        self.arrays.iter().map(spec).collect()
    }

    /// Reads each number but those of samples that are left out; returns the hash of all.
    pub(super) fn check(&self, is_left_out: impl Fn(u64) -> bool) -> Result<blake3::Hash, DataError> {
        let mut hasher = blake3::Hasher::new();
        for ((_, npy), spec) in self.arrays.iter().zip(self.specs()) {
            // Name, kind and shape: the same bytes may be other numbers.
            let about = spec.to_string();
            hasher.update(&(about.len() as u64).to_le_bytes());
            hasher.update(about.as_bytes());
            hasher.update(npy.check(&is_left_out)?.as_bytes());
        }
        Ok(hasher.finalize())
    }

    /// Reads a sample: a row of each array.
    pub(super) fn read(&self, sample: usize, out: Vec<&mut [u8]>) -> Result<(), DataError> {
        self.arrays.iter().zip(out).try_for_each(|((_, npy), out)| npy.read(sample as u64, out))
    }
}

/// Finds the arrays in a folder.
fn below(folder: &Path, found: &mut Found) -> Result<Vec<(String, PathBuf)>, DataError> {
    let failed = |error| DataError::reading(folder, error);
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.extension().is_some_and(|ending| ending == ENDING) && !name.starts_with('.') {
            files.push((stem(&path), path));
        } else {
            let kind = if path.is_dir() { "folders" } else { "files that are no .npy" };
            found.leave_out(kind, printable_start(&name, 200));
        }
    }
    Ok(files)
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// Keeps the arrays that the job names.
fn choose(
    path: &Path,
    files: &mut Vec<(String, PathBuf)>,
    names: &[String],
    found: &mut Found,
) -> Result<(), DataError> {
    if let Some(missing) = names.iter().find(|name| !files.iter().any(|(own, _)| own == *name)) {
        let there: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).take(20).collect();
        let there = if there.is_empty() { "none".to_owned() } else { there.join(", ") };
        return Err(DataError::Input(format!(
            "data.names: there is no array {} in {}; there are: {there}",
            printable_start(missing, 200),
            path.display()
        )));
    }
    files.retain(|(name, _)| {
        let kept = names.contains(name);
        if !kept {
            found.leave_out("arrays that data.names does not have", printable_start(name, 200));
        }
        kept
    });
    Ok(())
}
