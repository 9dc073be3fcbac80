//! Pictures with transparent parts, and pictures that are cut, padded or enlarged.

use ganglion_proto::job::{Background, Fit};
use image::{Luma, LumaA, Rgba};

use super::*;

/// A PNG file of two pixels with these chunks before the pixels: rows of one byte for each pixel.
fn png(bits: u8, colour_type: u8, before: &[(&[u8; 4], &[u8])], row: &[u8]) -> Vec<u8> {
    let chunk = |name: &[u8; 4], content: &[u8]| {
        let mut crc = flate2::Crc::new();
        crc.update(name);
        crc.update(content);
        let length = u32::try_from(content.len()).unwrap();
        [&length.to_be_bytes(), &name[..], content, &crc.sum().to_be_bytes()].concat()
    };
    let header = [&[0, 0, 0, 2, 0, 0, 0, 1][..], &[bits, colour_type, 0, 0, 0]].concat();
    let mut packed = flate2::write::ZlibEncoder::new(Vec::new(), Compression::fast());
    packed.write_all(&[&[0], row].concat()).unwrap();
    let mut bytes = [b"\x89PNG\r\n\x1a\n".to_vec(), chunk(b"IHDR", &header)].concat();
    before.iter().for_each(|(name, content)| bytes.extend(chunk(name, content)));
    bytes.extend(chunk(b"IDAT", &packed.finish().unwrap()));
    bytes.extend(chunk(b"IEND", &[]));
    bytes
}

fn saved(image: impl Into<DynamicImage>) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, ImageFormat::Png).unwrap();
    bytes.into_inner()
}

fn folder_of(files: &[(&str, Vec<u8>)]) -> TempDir {
    let folder = TempDir::new().unwrap();
    files.iter().for_each(|(name, bytes)| fs::write(folder.path().join(name), bytes).unwrap());
    folder
}

/// Red, green and blue of the pixels of a picture of two, as a job with this background reads it.
fn seen(file: &[u8], background: Option<Background>) -> [u8; 6] {
    let folder = folder_of(&[("a.png", file.to_vec())]);
    let opened = DataSet::open(&Data { background, ..data(DataKind::Folder, folder.path()) }).unwrap();
    let planes = read(&opened, 0);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a byte, as it was
    let byte = |at: usize| ((planes[at] + 1.0) * 127.5).round() as u8;
    [0, 2, 4, 1, 3, 5].map(byte)
}

/// The first pixel is wholly transparent over a colour that no viewer shows, the second is opaque or half.
#[test]
fn transparent_parts_show_the_background() {
    let rgba = image::RgbaImage::from_fn(2, 1, |x, _| Rgba([[9, 8, 7, 0], [200, 100, 0, 128]][x as usize]));
    let grey = image::GrayAlphaImage::from_fn(2, 1, |x, _| LumaA([[9, 0], [100, 255]][x as usize]));
    let deep = image::ImageBuffer::from_fn(2, 1, |x, _| {
        Rgba([[9 * 257, 0, 0, 0], [65535, 257, 0, 65535_u16]][x as usize])
    });
    let palette = png(8, 3, &[(b"PLTE", &[9, 8, 7, 1, 2, 3]), (b"tRNS", &[0])], &[0, 1]);
    let keyed = png(8, 0, &[(b"tRNS", &[0, 9])], &[9, 100]);
    let cases = [
        ("RGBA", saved(rgba), [255, 255, 255, 227, 177, 127]),
        ("grey and alpha", saved(grey), [255, 255, 255, 100, 100, 100]),
        ("16 bits", saved(deep), [255, 255, 255, 255, 1, 0]),
        ("palette", palette, [255, 255, 255, 1, 2, 3]),
        ("grey with a key", keyed, [255, 255, 255, 100, 100, 100]),
    ];
    for (what, file, expected) in cases {
        assert_eq!(seen(&file, Some(Background::WHITE)), expected, "{what}");
        let stored = seen(&file, None);
        assert_eq!(stored, seen(&file, Some(Background::Stored)), "{what}");
        assert_ne!(stored[..3], expected[..3], "{what}");
        assert_eq!(seen(&file, Some(Background::Colour([1, 2, 3])))[..3], [1, 2, 3], "{what}");
    }
}

#[test]
fn pictures_without_transparent_parts_keep_their_bits() {
    // Of 16 bits, of which a conversion to 8 in another order would round otherwise.
    let opaque = image::ImageBuffer::from_fn(2, 1, |x, _| {
        Rgba([[12_345, 54_321, 700, u16::MAX], [64_000, 3, 40_000, u16::MAX]][x as usize])
    });
    for file in [saved(opaque), saved(image::GrayImage::from_fn(2, 1, |x, _| Luma([[7, 200][x as usize]])))] {
        let folder = folder_of(&[("a.png", file)]);
        for channels in [1, 3] {
            let of = |background| {
                let source = Data { background, channels, ..data(DataKind::Folder, folder.path()) };
                read(&DataSet::open(&source).unwrap(), 0)
            };
            assert_eq!(of(None), of(Some(Background::WHITE)));
        }
    }
}

/// Otherwise a run that began before there was a background could not go on, or would go on with other
/// pixels.
#[test]
fn a_background_is_part_of_the_data_where_it_may_show() {
    let fingerprint = |folder: &TempDir, background| {
        let source = Data { background, ..data(DataKind::Folder, folder.path()) };
        DataSet::open(&source).unwrap().fingerprint()
    };
    let plain = picture_folder(&[("a.png", 2, 1)]);
    let [before, white, black] = [None, Some(Background::WHITE), Some(Background::BLACK)];
    assert_eq!(fingerprint(&plain, before), fingerprint(&plain, black));
    let alpha = image::RgbaImage::from_pixel(2, 1, Rgba([1, 2, 3, 4]));
    fs::write(plain.path().join("b.png"), saved(alpha)).unwrap();
    let all = [before, white, black].map(|background| fingerprint(&plain, background));
    assert!(all[0] != all[1] && all[1] != all[2] && all[0] != all[2]);
    assert_eq!(fingerprint(&plain, Some(Background::Stored)), all[0]);
    let opened = DataSet::open(&data(DataKind::Folder, plain.path())).unwrap();
    assert_eq!((opened.found().alpha, opened.found().background.as_str()), (1, "white"));
}

#[test]
fn pictures_that_lose_much_or_are_enlarged_are_counted() {
    let folder = picture_folder(&[("wide.png", 400, 28), ("square.png", 64, 64), ("tall.png", 60, 100)]);
    let of = |settings: Data| DataSet::open(&settings).unwrap().found().clone();
    let source = Data { resize: Some(32), ..data(DataKind::Folder, folder.path()) };
    let found = of(source.clone());
    assert_eq!((found.least, found.greatest), ([60, 28], [400, 100]));
    assert_eq!((found.cropped.count, found.cropped_most), (2, 93));
    assert_eq!(found.cropped.example, "tall.png");
    assert_eq!((found.enlarged.count, found.enlarged.example.as_str()), (1, "wide.png"));
    let padded = of(Data { fit: Fit::Pad, ..source.clone() });
    assert_eq!((padded.cropped.count, padded.cropped_most, padded.enlarged.count), (0, 0, 0));
    let checked = check::check(&source, check::Look { threads: 2, any_size: false }, |_, _| {}).unwrap();
    let same = |found: &ganglion_proto::record::found::Found| {
        (found.cropped.clone(), found.cropped_most, found.enlarged.clone(), found.least, found.greatest)
    };
    assert_eq!(same(&checked.found), same(&found), "a check says the same");
}

#[test]
fn all_of_a_padded_picture_is_there() {
    let strip = RgbImage::from_fn(8, 4, |x, _| image::Rgb(if x < 4 { [10, 20, 30] } else { [90, 80, 70] }));
    let folder = folder_of(&[("a.png", encoded(&strip, ImageFormat::Png))]);
    let source = Data {
        resize: Some(8),
        fit: Fit::Pad,
        background: Some(Background::BLACK),
        ..data(DataKind::Folder, folder.path())
    };
    let expected = RgbImage::from_fn(8, 8, |x, y| match y {
        2..=5 => *strip.get_pixel(x, y - 2),
        _ => image::Rgb([0; 3]),
    });
    assert_eq!(read(&DataSet::open(&source).unwrap(), 0), planes(&expected));
    let message = refusal(DataSet::open(&Data { crop: Some(4), ..source.clone() }));
    assert_says(&message, &["data.fit = \"pad\" cuts nothing"]);
    let message = refusal(DataSet::open(&Data { resize: None, ..source }));
    assert_says(&message, &["set data.resize"]);
}
