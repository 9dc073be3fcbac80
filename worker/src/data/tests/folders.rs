//! Folders of pictures, whole and damaged.

use proptest::prelude::*;

use super::*;

fn open(folder: &TempDir) -> Result<DataSet, DataError> {
    DataSet::open(&data(DataKind::Folder, folder.path()))
}

#[test]
fn files_are_sorted_by_relative_path() {
    // In bytes, '-' and '.' come before '/', and capitals before small letters.
    let names = ["Z.png", "a-.PNG", "a.JPG", "a/b.png", "a/c/d.jpeg", "b.png"];
    let shuffled = [4, 1, 5, 0, 3, 2].map(|at| (names[at], 4, 4));
    let folder = picture_folder(&shuffled);
    fs::write(folder.path().join("readme.txt"), "no image").unwrap();
    fs::write(folder.path().join(".hidden.png"), "no image").unwrap();
    fs::create_dir(folder.path().join(".cache")).unwrap();
    fs::write(folder.path().join(".cache/e.png"), "no image").unwrap();
    let dataset = open(&folder).unwrap();
    assert_eq!(dataset.len(), 6);
    assert_eq!(shape(&dataset), ImageShape { channels: 3, height: 4, width: 4 });
    for (index, name) in names.iter().enumerate() {
        // The content is PNG under every name: the content counts.
        let seed = (1..).zip(&shuffled).find(|(_, picture)| picture.0 == *name).unwrap().0;
        assert_eq!(read(&dataset, index), planes(&picture(4, 4, seed)), "{name}");
    }
}

#[test]
fn jpeg_files_are_read() {
    let folder = TempDir::new().unwrap();
    let flat = RgbImage::from_pixel(16, 8, image::Rgb([200, 100, 50]));
    fs::write(folder.path().join("flat.jpg"), encoded(&flat, ImageFormat::Jpeg)).unwrap();
    let dataset = open(&folder).unwrap();
    assert_eq!(shape(&dataset), ImageShape { channels: 3, height: 8, width: 16 });
    for (found, expected) in read(&dataset, 0).iter().zip(planes(&flat)) {
        assert!((found - expected).abs() < 0.05, "{found} is not near {expected}");
    }
}

#[test]
fn channels_are_converted() {
    let folder = picture_folder(&[("colour.png", 3, 2)]);
    let grey = image::GrayImage::from_pixel(3, 2, image::Luma([7]));
    grey.save(folder.path().join("grey.png")).unwrap();
    let alpha = image::RgbaImage::from_pixel(3, 2, image::Rgba([1, 2, 3, 0]));
    alpha.save(folder.path().join("alpha.png")).unwrap();

    let colour = open(&folder).unwrap();
    assert_eq!(shape(&colour).channels, 3);
    // Wholly transparent.
    assert_eq!(read(&colour, 0), [1.0; 18]);
    let expected = planes(&RgbImage::from_pixel(3, 2, image::Rgb([7, 7, 7])));
    assert_eq!(read(&colour, 2), expected);

    let source = Data { channels: 1, ..data(DataKind::Folder, folder.path()) };
    let grey = DataSet::open(&source).unwrap();
    assert_eq!(shape(&grey), ImageShape { channels: 1, height: 2, width: 3 });
    assert_eq!(read(&grey, 2), vec![7.0 / 127.5 - 1.0; 6]);
    assert_ne!(grey.fingerprint(), colour.fingerprint());

    let message = refusal(DataSet::open(&Data { channels: 2, ..source }));
    assert_says(&message, &["data.channels = 2", "expected 1 (grey) or 3 (colour)"]);
}

#[test]
fn mixed_sizes_need_a_resize_or_a_crop() {
    let folder = picture_folder(&[("a.png", 8, 6), ("b.png", 8, 6), ("c/d.png", 5, 9)]);
    let message = refusal(open(&folder));
    assert_says(&message, &["a.png of 8 x 6", "c/d.png of 5 x 9", "set data.resize"]);

    for (resize, crop, side) in [(Some(7), None, 7), (Some(7), Some(4), 4), (None, Some(5), 5)] {
        let source = Data { resize, crop, ..data(DataKind::Folder, folder.path()) };
        let dataset = DataSet::open(&source).unwrap();
        assert_eq!(shape(&dataset), ImageShape { channels: 3, height: side, width: side });
        for index in 0..3 {
            read(&dataset, index);
        }
    }

    let source = Data { crop: Some(6), ..data(DataKind::Folder, folder.path()) };
    let message = refusal(DataSet::open(&source));
    assert_says(&message, &["c/d.png: ", "5 x 9", "too small for data.crop = 6", "at most 5"]);
}

#[test]
fn a_folder_without_images_is_refused() {
    let folder = picture_folder(&[(".hidden.png", 2, 2), ("picture.gif", 2, 2)]);
    let parts = ["found 0 images", "*.jpg", "*.png", "1 .gif (picture.gif)", "1 hidden", "set data.path"];
    assert_says(&refusal(open(&folder)), &parts);
    let file = picture_folder(&[("a.png", 2, 2)]).keep().join("a.png");
    let message = refusal(DataSet::open(&data(DataKind::Folder, &file)));
    assert_says(&message, &["a.png", "Not a directory", "correct data.path"]);
    fs::remove_dir_all(file.parent().unwrap()).unwrap();
}

#[test]
fn a_damaged_head_is_found_at_open() {
    let whole = encoded(&picture(9, 9, 1), ImageFormat::Png);
    for bytes in [&b""[..], b"not a picture at all", &whole[..20]] {
        let folder = picture_folder(&[("a.png", 9, 9)]);
        fs::write(folder.path().join("broken.png"), bytes).unwrap();
        let message = refusal(open(&folder));
        assert_says(&message, &["broken.png: cannot decode the image", "--set data.exclude="]);
    }
}

#[test]
fn a_file_that_is_cut_off_is_found_when_it_is_read() {
    for format in [ImageFormat::Png, ImageFormat::Jpeg] {
        let whole = encoded(&picture(64, 64, 1), format);
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("cut.png"), &whole[..whole.len() * 9 / 10]).unwrap();
        let dataset = open(&folder).unwrap();
        let mut out = vec![0.0; shape(&dataset).numel()];
        let message = refusal(dataset.read(0, &mut out));
        assert_says(&message, &["cut.png: cannot decode the image", "--set data.exclude="]);
    }
}

#[test]
fn a_file_that_changes_its_size_is_refused() {
    let folder = picture_folder(&[("a.png", 8, 6)]);
    let dataset = open(&folder).unwrap();
    let other = encoded(&picture(6, 8, 1), ImageFormat::Png);
    fs::write(folder.path().join("a.png"), other).unwrap();
    let mut out = vec![0.0; shape(&dataset).numel()];
    let message = refusal(dataset.read(0, &mut out));
    assert_says(&message, &["a.png: found 6 x 8 pixels, another size", "do not change"]);
}

#[test]
fn a_long_preamble_does_not_hide_the_size() {
    // Comments of 60 kB before the size: it is beyond the head that is read first.
    let whole = encoded(&picture(8, 8, 1), ImageFormat::Jpeg);
    let comment = [&[0xff, 0xfe, 0xea, 0x60][..], &[b' '; 0xea60 - 2]].concat();
    let folder = TempDir::new().unwrap();
    let bytes = [&whole[..2], &comment, &whole[2..]].concat();
    fs::write(folder.path().join("a.jpg"), bytes).unwrap();
    assert_eq!(shape(&open(&folder).unwrap()).to_string(), "3 x 8 x 8");
}

#[test]
fn the_fingerprint_covers_names_and_content() {
    let folder = picture_folder(&[("a.png", 8, 6), ("b.png", 8, 6)]);
    let mut fingerprints = vec![open(&folder).unwrap().fingerprint()];
    assert_eq!(fingerprints[0], open(&folder).unwrap().fingerprint());
    let other = encoded(&picture(8, 6, 77), ImageFormat::Png);
    fs::write(folder.path().join("a.png"), other).unwrap();
    fingerprints.push(open(&folder).unwrap().fingerprint());
    fs::rename(folder.path().join("a.png"), folder.path().join("c.png")).unwrap();
    fingerprints.push(open(&folder).unwrap().fingerprint());
    fingerprints.sort();
    fingerprints.dedup();
    assert_eq!(fingerprints.len(), 3);
}

/// A change anywhere in a file up to 1 MiB counts, and in the first, middle and last block of a longer one.
#[test]
fn the_fingerprint_covers_files_to_their_end() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.bmp");
    let length = 3 * 700 * 700;
    let last_block_but_one = 14 * (length - (64 << 10)) / 15 + 1000;
    for (side, places) in [(100, vec![60, 20_000, 30_000]), (700, vec![60, last_block_but_one, length])] {
        let image = RgbImage::from_pixel(side, side, image::Rgb([9; 3]));
        let bytes = encoded(&image, ImageFormat::Bmp);
        let mut fingerprints = Vec::new();
        for place in places {
            let mut changed = bytes.clone();
            changed[place] ^= 1;
            fs::write(&path, changed).unwrap();
            fingerprints.push(open(&folder).unwrap().fingerprint());
        }
        fs::write(&path, bytes).unwrap();
        fingerprints.push(open(&folder).unwrap().fingerprint());
        fingerprints.sort();
        fingerprints.dedup();
        assert_eq!(fingerprints.len(), 4, "{side}");
    }
}

#[cfg(unix)]
#[test]
fn links_are_followed_but_not_in_circles() {
    use std::os::unix::fs::symlink;
    let target = picture_folder(&[("x/a.png", 4, 4)]);
    let folder = picture_folder(&[("b.png", 4, 4)]);
    symlink(target.path().join("x"), folder.path().join("linked")).unwrap();
    assert_eq!(open(&folder).unwrap().len(), 2);
    symlink(folder.path(), folder.path().join("circle")).unwrap();
    assert_says(&refusal(open(&folder)), &["circle: found a link to a folder that holds it"]);
    fs::remove_file(folder.path().join("circle")).unwrap();
    symlink("/no/such/file", folder.path().join("broken.png")).unwrap();
    assert_says(&refusal(open(&folder)), &["broken.png", "No such file"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Invariant 2 of the data: damaged images are errors, or other pixels, never a panic.
    #[test]
    fn damaged_images_never_panic(
        format in 0..5_usize,
        at in any::<prop::sample::Index>(),
        value: u8,
        cut in any::<prop::sample::Index>(),
    ) {
        use ImageFormat::{Bmp, Jpeg, Png, Tiff, WebP};
        let format = [Jpeg, Png, WebP, Bmp, Tiff][format];
        let mut bytes = encoded(&picture(12, 10, 1), format);
        let at = at.index(bytes.len());
        bytes[at] = value;
        bytes.truncate(bytes.len().min(cut.index(2 * bytes.len())));
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("a.png"), &bytes).unwrap();
        let source = Data { resize: Some(6), ..data(DataKind::Folder, folder.path()) };
        if let Ok(dataset) = DataSet::open(&source) {
            let _ = dataset.read(0, &mut [0.0; 3 * 6 * 6]);
        }
    }
}
