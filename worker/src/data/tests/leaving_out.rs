//! Nothing is dropped silently: which files are samples, and how the others are reported.

use super::packed_files::{tarred, zipped};
use super::*;
use zip::CompressionMethod;

/// A grey picture of noise.
fn noise(seed: u8) -> RgbImage {
    RgbImage::from_fn(8, 8, |x, y| image::Rgb([u8::try_from((x * 31 + y * 57) % 199).unwrap() ^ seed; 3]))
}

fn png(seed: u8) -> Vec<u8> {
    encoded(&noise(seed), ImageFormat::Png)
}

fn named(members: &[(&str, Vec<u8>)]) -> Vec<(String, Vec<u8>)> {
    members.iter().map(|(name, content)| ((*name).to_string(), content.clone())).collect()
}

fn open(path: &Path) -> Result<DataSet, DataError> {
    DataSet::open(&data(DataKind::Folder, path))
}

fn open_labelled(path: &Path) -> Result<DataSet, DataError> {
    DataSet::open_labelled(&data(DataKind::Folder, path))
}

fn left_out(dataset: &DataSet) -> Vec<(&str, u64, &str)> {
    let left = dataset.found().left_out.iter();
    left.map(|(kind, left)| (kind.as_str(), left.count, left.example.as_str())).collect()
}

fn class_counts(dataset: &DataSet) -> Vec<(&str, u64)> {
    dataset.found().classes.iter().map(|class| (class.name.as_str(), class.samples)).collect()
}

#[test]
fn the_picture_of_a_key_is_trained_on_and_its_class_counts() {
    let root = TempDir::new().unwrap();
    let mut members = Vec::new();
    for i in 0..8_u8 {
        members.push((format!("{i:04}.png"), png(i)));
        members.push((format!("{i:04}.seg.png"), png(100 + i)));
        members.push((format!("{i:04}.cls"), (i % 2).to_string().into_bytes()));
    }
    // A mask without its picture is not a picture.
    members.push(("0009.seg.png".to_string(), png(109)));
    tarred(&root.path().join("0.tar"), &members);
    let opened = open_labelled(root.path()).unwrap();
    assert_eq!((opened.len(), opened.labels()), (8, &[0, 1, 0, 1, 0, 1, 0, 1][..]));
    for i in 0..8 {
        assert_eq!(read(&opened, i), planes(&noise(u8::try_from(i).unwrap())));
    }
    assert_eq!(left_out(&opened), [("other parts of samples", 9, "0.tar/0000.seg.png")]);
    let line = opened.found().to_string();
    assert_says(&line, &["8 samples", "in tar files is its png", "2 classes by files *.cls: 0 (4), 1 (4)"]);
    // Without classes, files of labels are left out, and reported.
    let opened = open(root.path()).unwrap();
    assert_eq!(left_out(&opened)[0], (".cls", 8, "0.tar/0000.cls"));
}

#[test]
fn the_job_may_say_which_ending_is_the_picture() {
    let root = TempDir::new().unwrap();
    let parts = [("1.input.png", 1), ("1.target.png", 2), ("2.input.png", 3), ("2.target.png", 4)];
    let members: Vec<_> = parts.iter().map(|(name, seed)| (*name, png(*seed))).collect();
    tarred(&root.path().join("a.tar"), &named(&members));
    let message = refusal(open(root.path()));
    assert_says(&message, &["a.tar/1.input.png", "data.image_extension", "input.png, target.png"]);
    let source = data(DataKind::Folder, root.path());
    let chosen = Data { image_extension: Some("target.png".into()), ..source.clone() };
    let opened = DataSet::open(&chosen).unwrap();
    assert_eq!((opened.len(), read(&opened, 1)), (2, planes(&noise(4))));
    assert_eq!(left_out(&opened), [("pictures of other endings", 2, "a.tar/1.input.png")]);
    let none = Data { image_extension: Some("bmp".into()), ..source };
    assert_says(&refusal(DataSet::open(&none)), &["found 0 images", "*.bmp", "4 pictures of other endings"]);
}

#[test]
fn of_two_pictures_of_a_key_the_photograph_counts() {
    let root = TempDir::new().unwrap();
    let jpeg = encoded(&noise(1), ImageFormat::Jpeg);
    tarred(&root.path().join("a.tar"), &named(&[("1.png", png(1)), ("1.jpg", jpeg)]));
    let opened = open(root.path()).unwrap();
    assert_eq!(left_out(&opened), [("other parts of samples", 1, "a.tar/1.png")]);
    assert_says(&opened.found().to_string(), &["is its jpg"]);
    // A name with dots belongs to a picture if that is alone, and always outside of tar files.
    tarred(&root.path().join("a.tar"), &named(&[("shot 10.15.png", png(1)), ("shot 11.15.png", png(2))]));
    assert_eq!(open(root.path()).unwrap().len(), 2);
    let folder = picture_folder(&[("1.png", 8, 8), ("1.seg.png", 8, 8)]);
    assert_eq!(open(folder.path()).unwrap().len(), 2);
}

#[test]
fn classes_may_be_in_json_files() {
    let root = TempDir::new().unwrap();
    let json = |text: &str| text.as_bytes().to_vec();
    let members = |second: &str| {
        named(&[
            ("1.png", png(1)),
            ("1.json", json(r#"{"caption": "x", "label": 2}"#)),
            ("2.png", png(2)),
            ("2.json", json(second)),
        ])
    };
    let tar = root.path().join("a.tar");
    tarred(&tar, &members(r#"{"cls": 0}"#));
    let opened = open_labelled(root.path()).unwrap();
    assert_eq!((opened.labels(), opened.classes()), (&[2, 0][..], 3));
    tarred(&tar, &members(r#"{"label": "cat"}"#));
    assert_says(&refusal(open_labelled(root.path())), &["a.tar/2.json", "whole number under label, cls"]);
    // JSON files with other content are no labels, so folders count.
    let captions = named(&[("cat/1.png", png(1)), ("cat/1.json", json(r#"{"caption": "x"}"#))]);
    tarred(&tar, &captions);
    let opened = open_labelled(root.path()).unwrap();
    assert_eq!(class_counts(&opened), [("cat", 1)]);
    assert_eq!(left_out(&opened), [(".json", 1, "a.tar/cat/1.json")]);
}

#[test]
fn a_class_in_words_or_without_end_is_refused() {
    let root = TempDir::new().unwrap();
    for (text, expected) in
        [("cat\x1b[2J".repeat(1000), "expected a whole number"), ("1".repeat(2 << 20), "at most")]
    {
        tarred(&root.path().join("a.tar"), &named(&[("1.png", png(1)), ("1.cls", text.into_bytes())]));
        let message = refusal(open_labelled(root.path()));
        assert_says(&message, &["a.tar/1.cls", expected]);
        assert!(message.len() < 400 && !message.contains('\x1b'), "{message:?}");
    }
}

#[test]
fn many_kinds_of_pictures_are_read() {
    let root = TempDir::new().unwrap();
    let formats = [
        ("a.png", ImageFormat::Png),
        ("b.webp", ImageFormat::WebP),
        ("c.bmp", ImageFormat::Bmp),
        ("d.tif", ImageFormat::Tiff),
        ("e.TIFF", ImageFormat::Tiff),
        ("f.jpe", ImageFormat::Png),
        ("g.jfif", ImageFormat::Png),
    ];
    for (name, format) in formats {
        fs::write(root.path().join(name), encoded(&noise(7), format)).unwrap();
    }
    fs::write(root.path().join("h.gif"), "GIF").unwrap();
    fs::write(root.path().join("LICENSE"), "free").unwrap();
    fs::write(root.path().join(".hidden.png"), "no picture").unwrap();
    fs::create_dir(root.path().join(".cache")).unwrap();
    fs::write(root.path().join("dataset.json"), "{}").unwrap();
    let opened = open(root.path()).unwrap();
    assert_eq!(opened.len(), formats.len());
    (0..formats.len()).for_each(|index| assert_eq!(read(&opened, index), planes(&noise(7)), "{index}"));
    let expected = [
        (".gif", 1, "h.gif"),
        (".json", 1, "dataset.json"),
        ("hidden", 2, ".cache"),
        ("without an ending", 1, "LICENSE"),
    ];
    assert_eq!(left_out(&opened), expected);
    assert_eq!(opened.name(1), root.path().join("b.webp").display().to_string());
}

/// 49 of 50 files have an extension that was once skipped silently.
#[test]
fn a_folder_that_is_mostly_webp_is_read_whole() {
    let root = TempDir::new().unwrap();
    fs::write(root.path().join("0.png"), png(0)).unwrap();
    for i in 1..50 {
        fs::write(root.path().join(format!("{i}.webp")), encoded(&noise(i), ImageFormat::WebP)).unwrap();
    }
    let opened = open(root.path()).unwrap();
    assert_eq!((opened.len(), left_out(&opened)), (50, vec![]));
}

/// Two classes in three shards.
#[test]
fn shards_are_no_classes() {
    let root = TempDir::new().unwrap();
    for shard in 0..3_u8 {
        let members: Vec<(String, Vec<u8>)> = ["cat", "dog"]
            .iter()
            .flat_map(|class| (0..8).map(move |i| (format!("{class}/{shard}{i}.png"), png(i))))
            .collect();
        tarred(&root.path().join(format!("shard-{shard}.tar")), &members);
    }
    let opened = open_labelled(root.path()).unwrap();
    assert_eq!(class_counts(&opened), [("cat", 24), ("dog", 24)]);
    assert_says(&opened.found().to_string(), &["48 samples", "2 classes by folder: cat (24), dog (24)"]);
}

/// A data set as StyleGAN's tools write it, inside a folder: four classes.
#[test]
fn the_list_in_an_archive_counts() {
    let root = TempDir::new().unwrap();
    let names: Vec<String> = (0..24).map(|i| format!("{:05}/img{i:08}.png", i / 12)).collect();
    let labels: Vec<_> = names.iter().enumerate().map(|(i, name)| (name.clone(), i % 4)).collect();
    let list = serde_json::json!({ "labels": labels }).to_string().into_bytes();
    let mut members: Vec<(String, Vec<u8>)> =
        (0..).zip(&names).map(|(i, name)| (name.clone(), png(i))).collect();
    members.push(("dataset.json".to_string(), list.clone()));
    zipped(&root.path().join("set.zip"), CompressionMethod::Deflated, &members);
    let expected: Vec<u32> = (0..24).map(|i| i % 4).collect();
    let opened = open_labelled(root.path()).unwrap();
    assert_eq!(opened.labels(), expected);
    assert_says(&opened.found().to_string(), &["4 classes by dataset.json: 0 (6)"]);
    assert_eq!(open_labelled(&root.path().join("set.zip")).unwrap().labels(), expected);
    // The list may lie beside the archive too, as if that were unpacked there.
    members.pop();
    zipped(&root.path().join("set.zip"), CompressionMethod::Stored, &members);
    fs::write(root.path().join("dataset.json"), list).unwrap();
    assert_eq!(open_labelled(root.path()).unwrap().labels(), expected);
    // A picture that no list covers has no class.
    fs::remove_file(root.path().join("dataset.json")).unwrap();
    fs::create_dir(root.path().join("more")).unwrap();
    fs::write(root.path().join("more/dataset.json"), r#"{"labels": [["1.png", 0]]}"#).unwrap();
    fs::write(root.path().join("more/1.png"), png(1)).unwrap();
    assert_says(&refusal(open_labelled(root.path())), &["set.zip/00000", "none above it"]);
}

/// Archives and folders, alone and mixed: the first folder that tells pictures apart.
#[test]
fn the_class_is_the_first_folder_that_counts() {
    type Archives<'a> = &'a [(&'a str, &'a [&'a str])];
    let cases: [(&str, Archives<'_>, &[&str]); 9] = [
        (
            "a folder of archives a class",
            &[("cat/a.tar", &["1.png"]), ("dog/b.zip", &["x/1.png"])],
            &["cat", "dog"],
        ),
        ("an archive of folders", &[("a.tar", &["set/cat/1.png", "set/dog/1.png"])], &["cat", "dog"]),
        (
            "archives of a folder of their own name each",
            &[("s0.tar", &["s0/cat/1.png", "s0/dog/1.png"]), ("s1.zip", &["s1/cat/2.png", "s1/owl/1.png"])],
            &["cat", "dog", "owl"],
        ),
        (
            "archives that are a class each",
            &[("cat.zip", &["cat/1.png"]), ("dog.zip", &["dog/1.png"])],
            &["cat", "dog"],
        ),
        (
            "files and archives",
            &[("", &["cat/1.png"]), ("a.tar", &["cat/2.png", "dog/1.png"])],
            &["cat", "dog"],
        ),
        (
            "below a folder that holds all",
            &[("x/y/a.tar", &["cat/1.png"]), ("", &["x/y/dog/1.png"])],
            &["cat", "dog"],
        ),
        ("deep classes", &[("", &["cat/in/1.png", "dog/out/1.png", "dog/2.png"])], &["cat", "dog"]),
        ("one class", &[("", &["cat/1.png", "cat/2.png"])], &["cat"]),
        (
            "an archive of one class in two folders",
            &[("a.zip", &["cat/in/1.png", "cat/out/1.png"])],
            &["in", "out"],
        ),
    ];
    for (case, archives, expected) in cases {
        let root = TempDir::new().unwrap();
        for (name, members) in archives {
            let path = root.path().join(name);
            let members: Vec<_> = members.iter().map(|name| ((*name).to_string(), png(1))).collect();
            let make = |path: &Path| fs::create_dir_all(path.parent().unwrap()).unwrap();
            make(&path);
            match path.extension().and_then(|ending| ending.to_str()) {
                Some("tar") => tarred(&path, &members),
                Some("zip") => zipped(&path, CompressionMethod::Stored, &members),
                _ => members.iter().for_each(|(name, content)| {
                    make(&root.path().join(name));
                    fs::write(root.path().join(name), content).unwrap();
                }),
            }
        }
        let opened = open_labelled(root.path()).unwrap_or_else(|error| panic!("{case}: {error}"));
        let names: Vec<&str> = class_counts(&opened).iter().map(|(name, _)| *name).collect();
        assert_eq!(names, expected, "{case}");
    }
    let root = TempDir::new().unwrap();
    for name in ["cat.tar", "dog.tar"] {
        tarred(&root.path().join(name), &named(&[("1.png", png(1))]));
    }
    assert_says(
        &refusal(open_labelled(root.path())),
        &["cat.tar/1.png", "an archive does not count", "subfolder"],
    );
}
