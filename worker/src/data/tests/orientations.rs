//! Pictures rotated by their EXIF data.

use super::packed_files::{tarred, zipped};
use super::*;

/// EXIF data with nothing but an orientation.
fn exif(orientation: u8) -> Vec<u8> {
    let tiff = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0";
    [&tiff[..], &[orientation, 0, 0, 0], &[0; 4]].concat()
}

/// Left half white, right half black: 40 x 20 pixels.
fn halves() -> RgbImage {
    RgbImage::from_fn(40, 20, |x, _| image::Rgb([if x < 20 { 255 } else { 0 }; 3]))
}

fn jpeg(orientation: u8) -> Vec<u8> {
    let plain = encoded(&halves(), ImageFormat::Jpeg);
    let payload = [b"Exif\0\0", exif(orientation).as_slice()].concat();
    let length = u16::try_from(payload.len() + 2).unwrap().to_be_bytes();
    [&plain[..2], &[0xff, 0xe1], &length, &payload, &plain[2..]].concat()
}

fn with_exif(format: ImageFormat, orientation: u8) -> Vec<u8> {
    use image::ImageEncoder;
    let (image, mut bytes) = (halves(), Vec::new());
    let (pixels, colour) = (image.as_raw(), image::ExtendedColorType::Rgb8);
    match format {
        ImageFormat::Png => {
            let mut encoder = image::codecs::png::PngEncoder::new(&mut bytes);
            encoder.set_exif_metadata(exif(orientation)).unwrap();
            encoder.write_image(pixels, 40, 20, colour).unwrap();
        }
        ImageFormat::WebP => {
            let mut encoder = image::codecs::webp::WebPEncoder::new_lossless(&mut bytes);
            encoder.set_exif_metadata(exif(orientation)).unwrap();
            encoder.write_image(pixels, 40, 20, colour).unwrap();
        }
        _ => return jpeg(orientation),
    }
    bytes
}

/// A grey TIFF file of one strip with an orientation.
fn tiff(orientation: u8) -> Vec<u8> {
    let pixels: Vec<u8> = halves().pixels().map(|pixel| pixel[0]).collect();
    let entries: [(u16, u16, u32); 9] = [
        (256, 3, 40),
        (257, 3, 20),
        (258, 3, 8),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8 + 2 + 9 * 12 + 4),
        (274, 3, u32::from(orientation)),
        (278, 3, 20),
        (279, 4, 800),
    ];
    let mut bytes = b"II*\0\x08\0\0\0".to_vec();
    bytes.extend(9_u16.to_le_bytes());
    for (tag, kind, value) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(1_u32.to_le_bytes());
        bytes.extend(value.to_le_bytes());
    }
    bytes.extend([0; 4]);
    bytes.extend(pixels);
    bytes
}

fn all(orientation: u8) -> Vec<(String, Vec<u8>)> {
    let of = |format| with_exif(format, orientation);
    vec![
        ("1.jpg".to_string(), jpeg(orientation)),
        ("2.png".to_string(), of(ImageFormat::Png)),
        ("3.webp".to_string(), of(ImageFormat::WebP)),
        ("4.tif".to_string(), tiff(orientation)),
    ]
}

/// Whether the pixel at a place of a sample of 20 columns and 40 rows, or the other way round, is white.
fn is_white(dataset: &DataSet, index: usize, x: usize, y: usize) -> bool {
    read(dataset, index)[y * shape(dataset).width + x] > 0.0
}

#[test]
fn orientation_is_followed_unless_the_job_ignores_it() {
    let root = TempDir::new().unwrap();
    let folder = root.path().join("folder");
    fs::create_dir(&folder).unwrap();
    all(6).iter().for_each(|(name, content)| fs::write(folder.join(name), content).unwrap());
    let (zip, tar) = (root.path().join("a.zip"), root.path().join("a.tar"));
    zipped(&zip, zip::CompressionMethod::Deflated, &all(6));
    tarred(&tar, &all(6));
    let mut fingerprints = Vec::new();
    for path in [folder, zip, tar] {
        let source = data(DataKind::Folder, &path);
        let opened = DataSet::open(&source).unwrap();
        assert_eq!((shape(&opened).width, shape(&opened).height), (20, 40), "{}", path.display());
        assert_eq!((opened.found().turned, opened.found().least), (4, [20, 40]));
        assert_says(&opened.found().to_string(), &["4 turned as their EXIF data say"]);
        for index in 0..4 {
            // 6 is a quarter to the right: what was left is up.
            let seen = [(2, 2), (17, 2), (2, 37), (17, 37)].map(|(x, y)| is_white(&opened, index, x, y));
            assert_eq!(seen, [true, true, false, false], "{index} of {}", path.display());
        }
        fingerprints.push(opened.fingerprint());
        let ignored = DataSet::open(&Data { orientation: Orientation::Ignore, ..source }).unwrap();
        assert_eq!((shape(&ignored).width, shape(&ignored).height), (40, 20));
        assert!(is_white(&ignored, 0, 2, 17) && !is_white(&ignored, 0, 37, 2));
        assert_eq!(ignored.found().turned, 0);
    }
    assert!(fingerprints.iter().all(|fingerprint| *fingerprint == fingerprints[0]));
}

/// Half a turn keeps the size, and is another picture.
#[test]
fn a_turn_that_keeps_the_size_is_in_the_fingerprint() {
    let root = TempDir::new().unwrap();
    fs::write(root.path().join("a.jpg"), jpeg(3)).unwrap();
    let source = data(DataKind::Folder, root.path());
    let followed = DataSet::open(&source).unwrap();
    let ignored = DataSet::open(&Data { orientation: Orientation::Ignore, ..source }).unwrap();
    assert_ne!(followed.fingerprint(), ignored.fingerprint());
    assert!(!is_white(&followed, 0, 2, 2) && is_white(&ignored, 0, 2, 2));
}
