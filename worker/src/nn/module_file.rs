//! Files of TorchScript modules, checked before libtorch reads them.

use std::io::Cursor;
use std::path::Path;

use ganglion_proto::archive::{TORCH_SCRIPT, check_claims, kind_of};

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
    const MEND: &str = "write one with torch.jit.script(module).save(...)";
    match kind_of(Cursor::new(&bytes)) {
        Some(kind) if kind != TORCH_SCRIPT => Err(format!("is {kind}, not {TORCH_SCRIPT}; {MEND}")),
        // A file that is no archive is refused by libtorch, with its own message.
        _ => match check_claims(Cursor::new(&bytes)) {
            Ok(()) => Ok(bytes),
            Err(error) => Err(format!("{error}; {MEND}")),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
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
            (archive("G/archive_format"), "a .pt2 file of torch.export"),
            (archive("G/models/model.json/serialized_exported_program.json"), "a .pt2 file"),
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
