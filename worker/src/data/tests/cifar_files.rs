//! CIFAR-10 files, whole and damaged.

use super::*;

/// A record whose channel c has the value `first` + c everywhere but in its first pixel, which has 255 - c.
fn record(label: u8, first: u8) -> Vec<u8> {
    let mut bytes = vec![label];
    for channel in 0..3 {
        bytes.push(255 - channel);
        bytes.extend([first + channel; 1023]);
    }
    bytes
}

#[test]
fn a_file_opens_planar() {
    let dataset = open_bytes(DataKind::Cifar10, &[record(3, 10), record(9, 20)].concat()).unwrap();
    assert_eq!(dataset.len(), 2);
    assert_eq!(shape(&dataset), ImageShape { channels: 3, height: 32, width: 32 });
    let expected: Vec<f32> = record(9, 20)[1..].iter().map(|&byte| f32::from(byte) / 127.5 - 1.0).collect();
    assert_eq!(read(&dataset, 1), expected);
}

#[test]
fn a_folder_is_its_five_training_files_in_order() {
    let folder = TempDir::new().unwrap();
    for batch in 1..=4 {
        let path = folder.path().join(format!("data_batch_{batch}.bin"));
        fs::write(path, record(0, batch)).unwrap();
    }
    fs::write(folder.path().join("test_batch.bin"), record(0, 99)).unwrap();
    let message = refusal(DataSet::open(&data(DataKind::Cifar10, folder.path())));
    assert_says(&message, &["data_batch_5.bin missing", "cifar-10-batches-bin"]);

    fs::write(folder.path().join("data_batch_5.bin"), record(0, 5)).unwrap();
    let dataset = DataSet::open(&data(DataKind::Cifar10, folder.path())).unwrap();
    let second_pixels: Vec<f32> =
        (0..dataset.len()).map(|index| ((read(&dataset, index)[1] + 1.0) * 127.5).round()).collect();
    assert_eq!(second_pixels, [1.0, 2.0, 3.0, 4.0, 5.0]);
}

#[test]
fn damaged_files_are_refused() {
    let whole = record(0, 1);
    let cases: [(Vec<u8>, &[&str]); 4] = [
        (vec![], &["empty file"]),
        (whole[..3000].to_vec(), &["found 3000 bytes", "multiple of 3073"]),
        ([&whole[..], &record(10, 1)].concat(), &["label 10 in record 1", "expected 0 to 9"]),
        (gzip(&whole), &["gzip archive", "unpack it"]),
    ];
    for (bytes, parts) in cases {
        assert_says(&refusal(open_bytes(DataKind::Cifar10, &bytes)), parts);
    }
}

#[test]
fn classes_have_the_names_of_the_file_beside_the_records() {
    let folder = TempDir::new().unwrap();
    (1..=5).for_each(|batch| {
        fs::write(folder.path().join(format!("data_batch_{batch}.bin")), record(batch, 1)).unwrap();
    });
    let open = || DataSet::open_labelled(&data(DataKind::Cifar10, folder.path())).unwrap();
    let plain = open();
    assert_eq!(plain.class_names()[3], "cat");
    let names =
        |of: [&str; 10]| fs::write(folder.path().join("batches.meta.txt"), of.join("\n") + "\n\n").unwrap();
    let mut own = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"];
    names(own);
    assert_eq!(open().fingerprint(), plain.fingerprint(), "CIFAR-10's own names change nothing");
    own[3] = "lynx";
    names(own);
    assert_eq!(open().class_names()[3], "lynx");
    assert_ne!(open().fingerprint(), plain.fingerprint(), "all workers must have the same names");
    fs::write(folder.path().join("batches.meta.txt"), "one\n").unwrap();
    assert_eq!(open().class_names(), plain.class_names());
}
