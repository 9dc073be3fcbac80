//! Sources of classes, and every error message about them.

use super::*;

const LABELS: u32 = 0x0000_0801;

fn label_bytes(magic: u32, count: u32, labels: &[u8]) -> Vec<u8> {
    [[magic, count].map(u32::to_be_bytes).as_flattened(), labels].concat()
}

/// A folder with three images of 2 x 2 pixels, and these files beside them.
fn idx_folder(beside: &[(&str, Vec<u8>)]) -> TempDir {
    let folder = TempDir::new().unwrap();
    let images = idx_bytes(0x0000_0803, [3, 2, 2], &[7; 12]);
    fs::write(folder.path().join("train-images-idx3-ubyte"), images).unwrap();
    beside.iter().for_each(|(name, bytes)| fs::write(folder.path().join(name), bytes).unwrap());
    folder
}

fn open_labelled(folder: &TempDir, kind: DataKind) -> Result<DataSet, DataError> {
    DataSet::open_labelled(&data(kind, folder.path()))
}

#[test]
fn the_bundled_digits_have_labels_for_those_who_ask() {
    let (without, with) = (
        DataSet::open(&Data::bundled_digits()).unwrap(),
        DataSet::open_labelled(&Data::bundled_digits()).unwrap(),
    );
    assert_eq!((without.classes(), without.labels().len()), (0, 0));
    assert_eq!((with.classes(), with.labels().len()), (10, 10_000));
    assert_eq!(with.labels()[..5], [7, 2, 1, 0, 4]);
    assert_ne!(
        with.fingerprint(),
        without.fingerprint(),
        "labels are part of the data for those who use them"
    );
}

#[test]
fn an_idx_file_has_its_labels_beside_it() {
    for (name, bytes) in [
        ("train-labels-idx1-ubyte", label_bytes(LABELS, 3, &[4, 0, 4])),
        ("train-labels-idx1-ubyte.gz", gzip(&label_bytes(LABELS, 3, &[4, 0, 4]))),
    ] {
        let opened = open_labelled(&idx_folder(&[(name, bytes)]), DataKind::Idx).unwrap();
        assert_eq!((opened.classes(), opened.labels()), (5, [4, 0, 4].as_slice()));
    }
    let cases = [
        (None, "found no file of labels train-labels-idx1-ubyte"),
        (Some(label_bytes(LABELS, 2, &[1, 2])), "found 2 labels for 3 images"),
        (Some(label_bytes(LABELS, 4, &[1, 2, 3])), "announces 4 labels, but holds 3;"),
        (Some(label_bytes(0x0000_0803, 3, &[1, 2, 3])), "expected magic number 0x00000801"),
        (Some(vec![0, 0, 8]), "found no IDX file of labels"),
        (Some(vec![0x89, b'P', b'N', b'G']), "this is a PNG picture"),
    ];
    for (bytes, expected) in cases {
        let beside: Vec<_> = bytes.into_iter().map(|bytes| ("train-labels-idx1-ubyte", bytes)).collect();
        let folder = idx_folder(&beside);
        assert_says(&refusal(open_labelled(&folder, DataKind::Idx)), &[expected]);
        // Without a request for labels a bad file of labels is no error.
        DataSet::open(&data(DataKind::Idx, folder.path())).unwrap();
    }
}

#[test]
fn a_folders_classes_are_its_subfolders_in_sorted_order() {
    let folder =
        picture_folder(&[("b/1.png", 8, 8), ("a.b/2.png", 8, 8), ("a/x/3.png", 8, 8), ("b/0.png", 8, 8)]);
    let opened = open_labelled(&folder, DataKind::Folder).unwrap();
    // Samples: a.b/2, a/x/3, b/0, b/1. Classes: a, a.b, b.
    assert_eq!((opened.classes(), opened.labels()), (3, [1, 0, 2, 2].as_slice()));
    let flat = picture_folder(&[("a/1.png", 8, 8), ("2.png", 8, 8)]);
    assert_says(
        &refusal(open_labelled(&flat, DataKind::Folder)),
        &["2.png", "model.conditional", "subfolder"],
    );
}

#[test]
fn folders_are_numbered_as_people_count_or_as_a_run_began() {
    let names: Vec<String> = (0..12).map(|class| format!("{class}/a.png")).collect();
    let pictures: Vec<(&str, u32, u32)> = names.iter().map(|name| (name.as_str(), 4, 4)).collect();
    let folder = picture_folder(&pictures);
    let open = |class_order| {
        let source = Data { class_order, ..data(DataKind::Folder, folder.path()) };
        DataSet::open_labelled(&source).unwrap()
    };
    // Samples are in the order of bytes: 0, 1, 10, 11, 2 and so on.
    let natural = open(Some(ClassOrder::Natural));
    assert_eq!(natural.labels(), [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(natural.class_names()[10], "10");
    let before = open(None);
    assert_eq!(before.labels(), (0..12).collect::<Vec<u32>>());
    assert_eq!(before.class_names()[2], "10");
    assert_eq!(before.fingerprint(), open(Some(ClassOrder::Bytes)).fingerprint());
    assert_ne!(before.fingerprint(), natural.fingerprint(), "labels are part of the data");
    assert_eq!(natural.found().small_classes, 12);
    assert_eq!(
        natural.found().classes[11],
        ganglion_proto::record::found::Class { name: "11".to_owned(), samples: 1 }
    );
}

#[test]
fn a_folders_list_gives_classes() {
    let folder = picture_folder(&[("a/1.png", 8, 8), ("2.png", 8, 8)]);
    let list = folder.path().join("dataset.json");
    fs::write(&list, r#"{"labels": [["a/1.png", 3], ["2.png", 1]], "other": 1}"#).unwrap();
    let opened = open_labelled(&folder, DataKind::Folder).unwrap();
    assert_eq!((opened.classes(), opened.labels()), (4, [1, 3].as_slice()));
    for (text, expected) in [
        (r#"{"labels": [["a/1.png", 3]]}"#, "gives no class for"),
        (r#"{"labels": null}"#, "cannot be read"),
        (r#"{"labels": [["a/1.png", 70000], ["2.png", 1]]}"#, "found class 70000, expected 0 to 65535"),
    ] {
        fs::write(&list, text).unwrap();
        assert_says(&refusal(open_labelled(&folder, DataKind::Folder)), &["dataset.json", expected]);
    }
}
