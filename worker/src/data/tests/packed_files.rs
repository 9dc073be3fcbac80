//! Pictures in zip and tar files.

use std::io::Write;

use zip::CompressionMethod;
use zip::write::FileOptions;

use super::*;

const NAMES: [&str; 3] = ["a/1.png", "a/2.png", "b/1.png"];

fn picture(shade: u8) -> Vec<u8> {
    let mut png = Cursor::new(Vec::new());
    let image = RgbImage::from_fn(6, 6, |x, y| {
        image::Rgb([shade, u8::try_from(x * 40).unwrap(), u8::try_from(y * 40).unwrap()])
    });
    DynamicImage::ImageRgb8(image).write_to(&mut png, ImageFormat::Png).unwrap();
    png.into_inner()
}

fn contents() -> Vec<(String, Vec<u8>)> {
    NAMES.iter().zip([10, 20, 30]).map(|(name, shade)| (name.to_string(), picture(shade))).collect()
}

fn in_folder(root: &Path) {
    for (name, content) in contents() {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
}

pub(super) fn zipped(path: &Path, method: CompressionMethod, contents: &[(String, Vec<u8>)]) {
    let mut zip = zip::ZipWriter::new(fs::File::create(path).unwrap());
    for (name, content) in contents {
        zip.start_file(name.as_str(), FileOptions::default().compression_method(method)).unwrap();
        zip.write_all(content).unwrap();
    }
    zip.finish().unwrap();
}

pub(super) fn tarred(path: &Path, contents: &[(String, Vec<u8>)]) {
    let mut tar = tar::Builder::new(fs::File::create(path).unwrap());
    for (name, content) in contents {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        tar.append_data(&mut header, format!("./{name}"), content.as_slice()).unwrap();
    }
    tar.finish().unwrap();
}

#[test]
fn pictures_give_the_same_samples_packed_and_unpacked() {
    let root = TempDir::new().unwrap();
    let folder = root.path().join("folder");
    in_folder(&folder);
    let plain = DataSet::open_labelled(&data(DataKind::Folder, &folder)).unwrap();
    let [stored, deflated, tar] =
        ["stored.zip", "deflated.ZIP", "all.tar"].map(|name| root.path().join(name));
    zipped(&stored, CompressionMethod::Stored, &contents());
    zipped(&deflated, CompressionMethod::Deflated, &contents());
    let mut backwards = contents();
    backwards.reverse();
    tarred(&tar, &backwards);
    for archive in [stored, deflated, tar] {
        let packed = DataSet::open_labelled(&data(DataKind::Folder, &archive)).unwrap();
        assert_eq!(packed.fingerprint(), plain.fingerprint(), "{}", archive.display());
        assert_eq!(packed.labels(), [0, 0, 1]);
        for index in 0..plain.len() {
            assert_eq!(read(&packed, index), read(&plain, index));
        }
    }
}

#[test]
fn archives_in_a_folder_are_read_with_the_classes_beside_their_pictures() {
    let root = TempDir::new().unwrap();
    for (shard, first) in [("shard-0.tar", 3), ("shard-1.tar", 0)] {
        let contents = [
            ("1.png", picture(1)),
            ("1.cls", format!("{first}\n").into_bytes()),
            ("2.png", picture(2)),
            ("2.cls", b"1".to_vec()),
        ];
        tarred(&root.path().join(shard), &contents.map(|(name, content)| (name.to_string(), content)));
    }
    let packed = DataSet::open_labelled(&data(DataKind::Folder, root.path())).unwrap();
    assert_eq!((packed.len(), packed.labels()), (4, &[3, 1, 0, 1][..]));
}

/// Fewer archives are open than exist, in any order of reading.
#[test]
fn few_archives_are_open_however_many_there_are() {
    let root = TempDir::new().unwrap();
    let archives = 300;
    for i in 0..archives {
        let shade = u8::try_from(i % 256).unwrap();
        tarred(&root.path().join(format!("{i:05}.tar")), &[(format!("{i:06}.png"), picture(shade))]);
    }
    let open_here = || {
        let files =
            fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        files.filter(|file| file.starts_with(root.path())).count()
    };
    let opened = DataSet::open(&data(DataKind::Folder, root.path())).unwrap();
    assert_eq!(opened.len(), archives);
    assert!(open_here() <= 64, "{} are open", open_here());
    for i in (0..archives).rev().chain(0..archives) {
        let expected = f32::from(u8::try_from(i % 256).unwrap()) / 127.5 - 1.0;
        assert_eq!(read(&opened, i)[0], expected);
    }
    assert!(open_here() <= 64, "{} are open", open_here());
    // An archive that is opened again must be unchanged.
    tarred(&root.path().join("00000.tar"), &[("000000.png".to_string(), picture(9))]);
    (1..archives).for_each(|i| drop(read(&opened, i)));
    let mut out = vec![0.0; shape(&opened).numel()];
    assert_says(&refusal(opened.read(0, &mut out)), &["00000.tar", "another file than at the start"]);
}

#[test]
fn an_archive_that_is_none_or_is_cut_off_is_named() {
    let root = TempDir::new().unwrap();
    let [zip, tar] = ["broken.zip", "cut.tar"].map(|name| root.path().join(name));
    fs::write(&zip, b"PK\x03\x04 and no more").unwrap();
    assert_says(&refusal(DataSet::open(&data(DataKind::Folder, &zip))), &["broken.zip", "cannot be read"]);
    tarred(&tar, &contents());
    let whole = fs::read(&tar).unwrap();
    fs::write(&tar, &whole[..600]).unwrap();
    assert_says(&refusal(DataSet::open(&data(DataKind::Folder, &tar))), &["cut.tar", "make"]);
}
