//! Zip archives of PyTorch's, looked at before libtorch reads them.
//!
//! libtorch trusts the lengths that members of an archive claim, so a small file could fill the memory; here
//! they are checked against the file's length first.

use std::io::{Read, Seek, SeekFrom};

use zip::ZipArchive;

/// Kind of file that holds a TorchScript module.
pub const TORCH_SCRIPT: &str = "a TorchScript module";
/// Kind of file that holds a package.
pub const PACKAGE: &str = "a package";

/// Path of the manifest in a package, below the archive's top folder.
pub const PACKAGE_MANIFEST: &str = "ganglion/manifest.json";

/// Number of bytes that members may claim beyond the file's length.
// Enough for the compressed code of a large model, and little beside the memory of a worker.
const FREE_BYTES: u64 = 64 << 20;
/// Number of bytes by which a kind is told, but for archives.
const HEAD: u64 = 4096;

/// Names a kind of file that is easily taken for another by its content; `None` if it is of no such kind,
/// or cannot be read.
pub fn kind_of(mut file: impl Read + Seek) -> Option<&'static str> {
    let mut head = Vec::new();
    file.by_ref().take(HEAD).read_to_end(&mut head).ok()?;
    let is_safetensors = head.len() > 9 && head[5..10] == *b"\0\0\0{\"";
    match head.as_slice() {
        [] => Some("an empty file"),
        [b'P', b'K', 3, 4, ..] => Some(kind_of_archive(file)),
        [0x80, 2..=5, ..] => Some("a pickle file, as torch.save wrote them before PyTorch 1.6"),
        [0x89, b'P', b'N', b'G', ..] | [0xff, 0xd8, ..] => Some("a picture"),
        [0x1f, 0x8b, ..] => Some("a gzip file"),
        [0x7f, b'E', b'L', b'F', ..] => Some("a program or library"),
        _ if is_safetensors => Some("a safetensors file"),
        _ if head.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace()) => {
            Some("a text file")
        }
        _ => None,
    }
}

/// Names what a zip file of PyTorch's holds, by the names of its members.
fn kind_of_archive(file: impl Read + Seek) -> &'static str {
    let Ok(archive) = ZipArchive::new(file) else {
        return "a zip file that is cut off or damaged";
    };
    let ends = |ending: &str| archive.file_names().any(|name| is_member(name, ending));
    let has = |wanted: &str| archive.file_names().any(|name| name.split('/').any(|part| part == wanted));
    match () {
        () if ends(PACKAGE_MANIFEST) => PACKAGE,
        () if has("archive_format") || has("serialized_exported_program.json") => {
            "a .pt2 file of torch.export without a manifest of Ganglion's"
        }
        () if has("constants.pkl") => TORCH_SCRIPT,
        () if has("data.pkl") => "what torch.save wrote, such as a state_dict",
        () => "a zip file without anything of PyTorch's",
    }
}

/// Whether a member of an archive has this path, below the archive's own top folder or without one.
pub(crate) fn is_member(name: &str, path: &str) -> bool {
    name.strip_suffix(path).is_some_and(|folder| folder.is_empty() || folder.ends_with('/'))
}

/// Checks that the members of a zip archive claim no more than the file can hold. A file that is no archive
/// claims nothing.
///
/// # Errors
/// Members claim more, or the archive is damaged; the text says how.
pub fn check_claims(mut file: impl Read + Seek) -> Result<(), String> {
    let unreadable = |error: std::io::Error| format!("cannot be read: {error}");
    let length = file.seek(SeekFrom::End(0)).map_err(unreadable)?;
    let Ok(mut archive) = ZipArchive::new(file) else { return Ok(()) };
    let mut claimed = 0_u64;
    for index in 0..archive.len() {
        let member = archive.by_index_raw(index).map_err(|error| format!("is damaged: {error}"))?;
        // Claims may add up beyond 64 bits, which must not wrap to a small number.
        claimed = claimed.saturating_add(member.size());
    }
    let limit = length + FREE_BYTES;
    if claimed > limit {
        return Err(format!(
            "claims to hold {claimed} bytes, and a file of its length may hold {limit}; it is damaged or made to do harm"
        ));
    }
    Ok(())
}
