//! IDX files, whole and damaged.

use proptest::prelude::*;

use super::*;

const IMAGES: u32 = 0x0803;

fn two_images() -> Vec<u8> {
    idx_bytes(IMAGES, [2, 2, 3], &[0, 51, 102, 153, 204, 255, 1, 2, 3, 4, 5, 6])
}

#[test]
fn plain_and_compressed_are_equal() {
    let plain = open_bytes(DataKind::Idx, &two_images()).unwrap();
    let compressed = open_bytes(DataKind::Idx, &gzip(&two_images())).unwrap();
    assert_eq!(shape(&plain), ImageShape { channels: 1, height: 2, width: 3 });
    assert_eq!(plain.len(), 2);
    assert_eq!(plain.fingerprint(), compressed.fingerprint());
    assert_eq!(read(&plain, 0), read(&compressed, 0));
    assert_eq!(read(&plain, 0), [0.0, 51.0, 102.0, 153.0, 204.0, 255.0].map(|b: f32| b / 127.5 - 1.0));
    assert_eq!(read(&plain, 0)[0].to_bits(), (-1.0_f32).to_bits());
    assert_eq!(read(&plain, 0)[5].to_bits(), 1.0_f32.to_bits());
}

/// Asserts that each file is refused with a message that holds the parts.
fn assert_refused(cases: &[(Vec<u8>, &[&str])]) {
    for (bytes, parts) in cases {
        let message = refusal(open_bytes(DataKind::Idx, bytes));
        assert_says(&message, &["the-file: "]);
        assert_says(&message, parts);
    }
}

#[test]
fn wrong_headers_are_refused() {
    let whole = two_images();
    let headed = |magic, sizes| idx_bytes(magic, sizes, &[7; 12]);
    let huge = u32::MAX;
    assert_refused(&[
        (vec![], &["found 0 bytes", "header of 16"]),
        (whole[..15].to_vec(), &["found 15 bytes", "header of 16", "cut off"]),
        (headed(0x0801, [2, 2, 3]), &["found labels", "images-idx3-ubyte"]),
        (headed(0x0804, [2, 2, 3]), &["0x00000804", "expected 0x00000803", "set data.kind"]),
        (headed(IMAGES, [0, 2, 3]), &["found no images"]),
        (headed(IMAGES, [2, 0, 3]), &["3 x 0 pixels", "1 to 8192"]),
        (headed(IMAGES, [2, 2, huge]), &["4294967295 x 2 pixels", "1 to 8192"]),
        (headed(IMAGES, [huge, 8192, 8192]), &["4294967295 images", "do not fit into memory"]),
        (headed(IMAGES, [60_000, 28, 28]), &["found 12 bytes", "expected 47040000", "cut off"]),
    ]);
}

#[test]
fn a_file_of_another_format_is_named_and_the_right_one_advised() {
    let floats = idx_bytes(0x0d03, [2, 2, 3], &[7; 48]);
    let png = encoded(&picture(8, 8, 1), ImageFormat::Png);
    let advice = "train-images-idx3-ubyte";
    assert_refused(&[
        (floats, &["IDX file of 32-bit floating-point numbers in 3 dimensions", advice]),
        (idx_bytes(0x0804, [2, 2, 3], &[7; 48]), &["IDX file of bytes in 4 dimensions", advice]),
        (idx_bytes(0x0801, [2, 2, 3], &[7; 48]), &["found labels, expected images", advice]),
        (png, &["PNG picture", "data.kind = \"folder\""]),
        (b"PK\x03\x04 and the rest of it".to_vec(), &["zip archive", "unpack it"]),
        (gzip(&gzip(&two_images())), &["compressed twice", "gunzip"]),
        (b"hello, world, hello, world".to_vec(), &["found magic number 0x68656c6c", advice]),
    ]);
    let folder = folder_of(&["a-images-idx3-ubyte", "train-images-idx3-ubyte.gz"]);
    let labels = folder.path().join("train-labels-idx1-ubyte");
    fs::write(&labels, [0, 0, 8, 1, 0, 0, 0, 0]).unwrap();
    let message = refusal(DataSet::open(&data(DataKind::Idx, &labels)));
    assert_says(&message, &["beside it lies a-images-idx3-ubyte, train-images-idx3-ubyte.gz"]);
    // Images in the place of labels.
    fs::write(&labels, two_images()).unwrap();
    let images = folder.path().join("train-images-idx3-ubyte.gz");
    let message = refusal(DataSet::open_labelled(&data(DataKind::Idx, &images)));
    assert_says(&message, &["found images", "*-labels-idx1-ubyte"]);
}

#[test]
fn damaged_contents_are_refused() {
    let whole = two_images();
    let compressed = gzip(&whole);
    let mut flipped = compressed.clone();
    let checksum = flipped.len() - 6;
    flipped[checksum] ^= 1;
    let corrupt: &[&str] = &["gzip data are corrupt or cut off", "get the file again"];
    assert_refused(&[
        (whole[..27].to_vec(), &["found 11 bytes", "expected 12 (2 images of 3 x 2)"]),
        ([&whole[..], b"x"].concat(), &["more than the 12 bytes", "damaged"]),
        (gzip(&[&whole[..], b"x"].concat()), &["more than the 12 bytes", "damaged"]),
        (gzip(&whole[..27]), &["found 11 bytes", "expected 12"]),
        (compressed[..compressed.len() - 4].to_vec(), corrupt),
        (compressed[..14].to_vec(), corrupt),
        ([&compressed[..], b"garbage"].concat(), corrupt),
        (flipped, corrupt),
    ]);
}

fn folder_of(names: &[&str]) -> TempDir {
    let folder = TempDir::new().unwrap();
    for (value, name) in (1..).zip(names) {
        let plain = idx_bytes(IMAGES, [1, 1, 1], &[value]);
        let bytes = if name.ends_with(".gz") { gzip(&plain) } else { plain };
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

/// The number, from 1, of the file of a folder that is read.
fn chosen(names: &[&str]) -> f32 {
    let folder = folder_of(names);
    let dataset = DataSet::open(&data(DataKind::Idx, folder.path())).unwrap();
    ((read(&dataset, 0)[0] + 1.0) * 127.5).round()
}

#[test]
fn a_folder_stands_for_its_training_images_or_its_only_ones() {
    let labels = "train-labels-idx1-ubyte";
    assert_eq!(chosen(&[labels, "t10k-images-idx3-ubyte", "train-images-idx3-ubyte"]), 3.0);
    assert_eq!(chosen(&["train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"]), 1.0);
    assert_eq!(chosen(&["train-images.idx3-ubyte", "t10k-images.idx3-ubyte"]), 1.0);
    assert_eq!(chosen(&[labels, "emnist-images-idx3-ubyte.gz"]), 2.0);
    assert_eq!(chosen(&["faces.idx3-ubyte"]), 1.0);
    assert_eq!(chosen(&["t10k-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte"]), 2.0);
}

#[test]
fn a_folder_with_several_or_none_is_refused() {
    let folder = folder_of(&["b-images-idx3-ubyte", "a-images-idx3-ubyte.gz"]);
    let message = refusal(DataSet::open(&data(DataKind::Idx, folder.path())));
    let listed = "(a-images-idx3-ubyte.gz, b-images-idx3-ubyte)";
    assert_says(&message, &["several IDX files", listed, "set data.path to one of them"]);
    let folder = folder_of(&["t10k-labels-idx1-ubyte"]);
    let message = refusal(DataSet::open(&data(DataKind::Idx, folder.path())));
    assert_says(&message, &["found no IDX file of images", "set data.path to the file"]);
}

proptest! {
    /// Invariant 2 of the data: no bytes cause a panic.
    #[test]
    fn any_bytes_are_an_error_or_samples(
        sizes in any::<[u8; 3]>(),
        tail in prop::collection::vec(any::<u8>(), 0..64),
        compress: bool,
        cut in 0..200_usize,
    ) {
        let mut bytes = idx_bytes(IMAGES, sizes.map(|size| u32::from(size % 4)), &tail);
        if compress {
            bytes = gzip(&bytes);
        }
        bytes.truncate(cut);
        if let Ok(dataset) = open_bytes(DataKind::Idx, &bytes) {
            prop_assert_eq!(read(&dataset, dataset.len() - 1).len(), shape(&dataset).numel());
        }
    }
}
