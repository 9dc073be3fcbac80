//! Files of TorchScript modules, checked before libtorch reads them.
//!
//! Such a file is a zip archive. libtorch trusts the lengths that its members claim, so a small file could
//! fill the memory; here they are checked against the file's length first.

use std::io::Cursor;
use std::path::Path;

/// Number of bytes that members may claim beyond the file's length: the code is compressed, the weights are
/// not.
// Enough for the code of a large model, and little beside the memory of a worker.
const FREE_BYTES: u64 = 64 << 20;

/// Reads a file whose members claim no more than it can hold.
///
/// # Errors
/// The file cannot be read, or claims more than it may hold.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, String> {
    let unreadable = |error: std::io::Error| format!("cannot be read: {error}");
    // A device has no end, and opening a pipe waits for its writer.
    if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err("is no file".to_string());
    }
    let bytes = std::fs::read(path).map_err(unreadable)?;
    check(&bytes)?;
    Ok(bytes)
}

fn check(bytes: &[u8]) -> Result<(), String> {
    // A file that is no archive is refused by libtorch, with its own message.
    let Ok(mut archive) = zip::ZipArchive::new(Cursor::new(bytes)) else { return Ok(()) };
    let mut claimed = 0_u64;
    for index in 0..archive.len() {
        let member = archive.by_index_raw(index).map_err(|error| format!("is damaged: {error}"))?;
        // Claims may add up beyond 64 bits, which must not wrap to a small number.
        claimed = claimed.saturating_add(member.size());
    }
    let limit = bytes.len() as u64 + FREE_BYTES;
    if claimed > limit {
        return Err(format!(
            "claims to hold {claimed} bytes, and a file of its length may hold {limit}; it is damaged or made to do \
             harm, write it again with torch.jit.script(module).save(...)"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use zip::write::FileOptions;

    #[test]
    fn a_module_cannot_claim_more_than_its_file_may_hold() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("G.pt");
        for (length, expected) in [(1 << 10, true), (80 << 20, false)] {
            let mut archive = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
            archive.start_file("G/data.pkl", FileOptions::default()).unwrap();
            archive.write_all(&vec![0; length]).unwrap();
            archive.finish().unwrap();
            let read = read(&path);
            assert_eq!(read.is_ok(), expected, "{length}: {:?}", read.map(|bytes| bytes.len()));
        }
        std::fs::write(&path, "no archive").unwrap();
        assert_eq!(read(&path).unwrap(), b"no archive");
        assert!(read(Path::new("/dev/zero")).unwrap_err().contains("is no file"));
    }
}
