//! Files that claim more than they hold: memory is bounded by the file.

use std::io::Read;

use super::packed_files::{tarred, zipped};
use super::*;
use zip::CompressionMethod;

/// A gzip file of some bytes followed by zeros.
fn packed_zeros(head: &[u8], zeros: u64) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(head).unwrap();
    std::io::copy(&mut std::io::repeat(0).take(zeros), &mut encoder).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn a_small_compressed_file_cannot_become_a_large_one() {
    // The announced size decides before unpacking: 3.2 GB in a file of some bytes.
    let header = idx_bytes(0x0803, [50_000, 256, 250], &[]);
    let message = refusal(open_bytes(DataKind::Idx, &packed_zeros(&header, 1 << 20)));
    assert_says(&message, &["announces 3200000000 bytes", "more than the 268435456", "gunzip"]);
    // The file is read no further than its announced size.
    let header = idx_bytes(0x0803, [1, 2, 2], &[]);
    let message = refusal(open_bytes(DataKind::Idx, &packed_zeros(&header, 64 << 20)));
    assert_says(&message, &["more than the 4 bytes"]);
    // A large file with a true size is read, for any content.
    let header = idx_bytes(0x0803, [2_000, 100, 100], &[]);
    assert_eq!(open_bytes(DataKind::Idx, &packed_zeros(&header, 20_000_000)).unwrap().len(), 2_000);
}

#[test]
fn labels_are_read_no_further_than_they_announce() {
    let folder = TempDir::new().unwrap();
    let images = folder.path().join("train-images-idx3-ubyte");
    fs::write(&images, idx_bytes(0x0803, [3, 2, 2], &[7; 12])).unwrap();
    let labels = folder.path().join("train-labels-idx1-ubyte.gz");
    for (count, expected) in
        [(u32::MAX, "announces 4294967295 bytes"), (3, "3 labels, but holds more than 3")]
    {
        let head = [0x0801, count].map(u32::to_be_bytes);
        fs::write(&labels, packed_zeros(head.as_flattened(), 16 << 20)).unwrap();
        assert_says(&refusal(DataSet::open_labelled(&data(DataKind::Idx, &images))), &[expected]);
    }
}

#[test]
fn a_picture_cannot_claim_more_pixels_than_its_file_may_hold() {
    /// Changes the size of a PNG file, and corrects the checksum of its header.
    fn resized(png: &[u8], width: u32, height: u32) -> Vec<u8> {
        let mut png = png.to_vec();
        png[16..20].copy_from_slice(&width.to_be_bytes());
        png[20..24].copy_from_slice(&height.to_be_bytes());
        let mut crc = flate2::Crc::new();
        crc.update(&png[12..29]);
        png[29..33].copy_from_slice(&crc.sum().to_be_bytes());
        png
    }
    let small = encoded(&picture(8, 8, 1), ImageFormat::Png);
    for (width, height) in [(20_000, 6_000), (1 << 30, 1 << 30), (u32::MAX >> 1, u32::MAX >> 1)] {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("a.png"), resized(&small, width, height)).unwrap();
        let source = Data { resize: Some(8), ..data(DataKind::Folder, folder.path()) };
        let message = refusal(DataSet::open(&source));
        assert_says(&message, &["a.png: cannot decode the image"]);
    }
}

/// A zip file whose one member claims another length.
fn claiming(path: &Path, content: &[u8], method: CompressionMethod, length: u32) {
    zipped(path, method, &[("a.png".to_string(), content.to_vec())]);
    let mut bytes = fs::read(path).unwrap();
    let directory = bytes.windows(4).rposition(|four| four == b"PK\x01\x02").unwrap();
    bytes[directory + 24..directory + 28].copy_from_slice(&length.to_le_bytes());
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_member_cannot_claim_another_length() {
    let root = TempDir::new().unwrap();
    let zip = root.path().join("a.zip");
    let content = encoded(&picture(8, 8, 1), ImageFormat::Png);
    let length = u32::try_from(content.len()).unwrap();
    for method in [CompressionMethod::Stored, CompressionMethod::Deflated] {
        for wrong in [u32::MAX - 1, 200 << 20, length + 1, length - 1] {
            claiming(&zip, &content, method, wrong);
            let opened = DataSet::open(&data(DataKind::Folder, &zip));
            // A stored member that claims less is cut to that length, and is no picture then.
            assert_says(&refusal(opened), &["a.zip", "a.png"]);
        }
    }
    // The length of a member of a tar is in octal digits from byte 124 on.
    let tar = root.path().join("a.tar");
    tarred(&tar, &[("a.png".to_string(), content)]);
    let mut bytes = fs::read(&tar).unwrap();
    bytes[124..136].copy_from_slice(b"77777777777\0");
    let sum: u32 = bytes[..148].iter().chain(&[b' '; 8]).chain(&bytes[156..512]).map(|b| u32::from(*b)).sum();
    bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    fs::write(&tar, bytes).unwrap();
    assert_says(&refusal(DataSet::open(&data(DataKind::Folder, &tar))), &["a.tar", "cut off"]);
}

#[test]
fn members_cannot_lead_out_of_their_archive() {
    let root = TempDir::new().unwrap();
    let zip = root.path().join("a.zip");
    let content = encoded(&picture(8, 8, 1), ImageFormat::Png);
    let names = ["1.png", "../2.png", "/etc/3.png", "a\\..\\4.png", "5\x1b[2J.png"];
    let members: Vec<_> = names.iter().map(|name| ((*name).to_string(), content.clone())).collect();
    zipped(&zip, CompressionMethod::Stored, &members);
    let opened = DataSet::open(&data(DataKind::Folder, &zip)).unwrap();
    assert_eq!(opened.len(), 1);
    let left = &opened.found().left_out["members whose names lead out of their archive"];
    assert_eq!((left.count, left.example.as_str()), (4, "../2.png"));
}
