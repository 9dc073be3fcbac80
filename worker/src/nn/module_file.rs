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
    let about = std::fs::metadata(path).map_err(unreadable)?;
    if !about.is_file() {
        let what = if about.is_dir() { "is a folder" } else { "is no file" };
        return Err(format!("{what}, expected a TorchScript file"));
    }
    let bytes = std::fs::read(path).map_err(unreadable)?;
    match kind_of(&bytes) {
        Some(kind) if kind != TORCH_SCRIPT => {
            Err(format!("is {kind}, not {TORCH_SCRIPT}; write one with torch.jit.script(module).save(...)"))
        }
        _ => check(&bytes).map(|()| bytes),
    }
}

/// Kind of the files that are expected here.
const TORCH_SCRIPT: &str = "a TorchScript module";

/// Names a kind of file that is easily taken for another by its content; `None` if it is of no such kind.
pub(crate) fn kind_of(bytes: &[u8]) -> Option<&'static str> {
    let is_safetensors = bytes.len() > 9 && bytes[5..10] == *b"\0\0\0{\"";
    match bytes {
        [] => Some("an empty file"),
        [b'P', b'K', 3, 4, ..] => Some(kind_of_archive(bytes)),
        [0x80, 2..=5, ..] => Some("a pickle file, as torch.save wrote them before PyTorch 1.6"),
        [0x89, b'P', b'N', b'G', ..] | [0xff, 0xd8, ..] => Some("a picture"),
        [0x1f, 0x8b, ..] => Some("a gzip file"),
        _ if is_safetensors => Some("a safetensors file"),
        _ if bytes.iter().take(4096).all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace()) => {
            Some("a text file")
        }
        _ => None,
    }
}

/// Names what a zip file of PyTorch's holds, by the names of its members.
fn kind_of_archive(bytes: &[u8]) -> &'static str {
    let Ok(archive) = zip::ZipArchive::new(Cursor::new(bytes)) else {
        return "a zip file that is cut off or damaged";
    };
    let has = |wanted: &str| archive.file_names().any(|name| name.split('/').any(|part| part == wanted));
    match () {
        () if has("archive_format") || has("serialized_exported_program.json") => {
            "a .pt2 package of torch.export"
        }
        () if has("constants.pkl") => TORCH_SCRIPT,
        () if has("data.pkl") => "what torch.save wrote, such as a state_dict",
        () => "a zip file without anything of PyTorch's",
    }
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
            archive.start_file("G/constants.pkl", FileOptions::default()).unwrap();
            archive.write_all(&vec![0; length]).unwrap();
            archive.finish().unwrap();
            let read = read(&path);
            assert_eq!(read.is_ok(), expected, "{length}: {:?}", read.map(|bytes| bytes.len()));
        }
        std::fs::write(&path, b"\x08\xff no archive").unwrap();
        assert_eq!(read(&path).unwrap(), b"\x08\xff no archive");
        assert!(read(Path::new("/dev/zero")).unwrap_err().contains("is no file"));
        assert!(read(folder.path()).unwrap_err().contains("is a folder"));
    }

    #[test]
    fn other_kinds_of_files_are_named() {
        let archive = |member: &str| {
            let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
            archive.start_file(member, FileOptions::default()).unwrap();
            archive.finish().unwrap().into_inner()
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("G.pt");
        for (bytes, named) in [
            (archive("G/archive_format"), "a .pt2 package of torch.export"),
            (archive("G/models/model.json/serialized_exported_program.json"), "a .pt2 package"),
            (archive("archive/data.pkl"), "what torch.save wrote"),
            (archive("notes.txt"), "without anything of PyTorch's"),
            (archive("G/constants.pkl")[..40].to_vec(), "cut off or damaged"),
            (Vec::new(), "an empty file"),
            (b"hello\n".to_vec(), "a text file"),
            (b"\x80\x02\x8a\nl\xfc".to_vec(), "a pickle file"),
            (b"\x40\0\0\0\0\0\0\0{\"a\":{}}".to_vec(), "a safetensors file"),
        ] {
            std::fs::write(&path, &bytes).unwrap();
            let refused = read(&path).unwrap_err();
            assert!(refused.contains(named) && refused.contains("not a TorchScript module"), "{refused}");
        }
    }
}
