//! The bundled digits, and properties of every kind of data.

use std::collections::BTreeSet;

use super::*;

#[test]
fn the_bundled_digits_open() {
    let dataset = DataSet::open(&Data::bundled_digits()).unwrap();
    assert_eq!(dataset.len(), 10_000);
    assert_eq!(shape(&dataset), ImageShape { channels: 1, height: 28, width: 28 });
    assert_eq!(shape(&dataset).to_string(), "1 x 28 x 28");
    let mut extremes = (0, 0);
    let mut sum = 0.0;
    for index in 0..dataset.len() {
        let pixels = read(&dataset, index);
        assert!(pixels.iter().all(|pixel| (-1.0..=1.0).contains(pixel)));
        extremes.0 += usize::from(pixels.contains(&-1.0));
        extremes.1 += usize::from(pixels.contains(&1.0));
        sum += pixels.iter().map(|&pixel| f64::from(pixel)).sum::<f64>();
    }
    // Counted in the file by another program: every digit has background, most a pixel of full ink.
    assert_eq!(extremes, (10_000, 8979));
    // The mean of these digits is 33.79 of 255.
    let mean = (sum / (10_000.0 * 784.0) + 1.0) * 127.5;
    assert!((mean - 33.79).abs() < 0.01, "mean byte {mean}");
}

#[test]
fn the_fingerprint_is_of_the_samples_and_their_framing() {
    let whole = DataSet::open(&Data::bundled_digits()).unwrap();
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../data/mnist-10k/t10k-images-idx3-ubyte.gz");
    let same = DataSet::open(&data(DataKind::Idx, Path::new(file))).unwrap();
    assert_eq!(whole.fingerprint(), same.fingerprint());
    let framings = [(Some(14), None), (None, Some(14)), (Some(28), Some(14)), (None, None)];
    let fingerprints: BTreeSet<[u8; 32]> = framings
        .into_iter()
        .map(|(resize, crop)| Data { resize, crop, ..Data::bundled_digits() })
        .map(|framed| DataSet::open(&framed).unwrap().fingerprint())
        .collect();
    assert_eq!(fingerprints.len(), 4);
}

#[test]
fn a_path_for_the_bundled_digits_is_refused() {
    let source = data(DataKind::Mnist10k, Path::new("mine"));
    let message = refusal(DataSet::open(&source));
    assert_says(&message, &["data.path is set", "mnist-10k", "remove data.path"]);
}

#[test]
fn other_kinds_need_a_path() {
    for kind in [DataKind::Idx, DataKind::Cifar10, DataKind::Folder] {
        let message = refusal(DataSet::open(&Data { kind, ..Data::bundled_digits() }));
        assert_says(&message, &["data.path is missing; set it"]);
        let message = refusal(DataSet::open(&data(kind, Path::new("/no/such/place"))));
        assert_says(&message, &["cannot read /no/such/place", "No such file", "correct data.path"]);
    }
}
