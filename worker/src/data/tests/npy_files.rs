//! Arrays.

use ganglion_proto::array::{ArraySpec, ElementKind};
use ganglion_proto::job::Exclusion;
use proptest::prelude::*;

use super::*;

/// A file as `numpy.save` writes it.
fn npy(descr: &str, fortran: &str, shape: &str, numbers: &[u8]) -> Vec<u8> {
    let header = format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}\n");
    let length = u16::try_from(header.len()).unwrap().to_le_bytes();
    [b"\x93NUMPY\x01\x00", length.as_slice(), header.as_bytes(), numbers].concat()
}

fn rows(descr: &str, shape: &str, numbers: &[u8]) -> Vec<u8> {
    npy(descr, "False", shape, numbers)
}

fn floats(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// A folder with these arrays.
fn folder(arrays: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in arrays {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn of(path: &Path) -> Data {
    Data::plain(DataKind::Arrays, Some(path.to_owned()), 0)
}

fn arrays(data: &DataSet, index: usize) -> Vec<Vec<u8>> {
    match data.read_all(&[index]).unwrap() {
        Values::Arrays(arrays) => arrays,
        other => panic!("no arrays: {other:?}"),
    }
}

/// The refusal of one file.
fn refused(bytes: Vec<u8>) -> String {
    let folder = folder(&[("x.npy", bytes)]);
    refusal(DataSet::open(&of(&folder.path().join("x.npy"))))
}

#[test]
fn a_sample_is_a_row_of_each_array() {
    let x = floats(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    let folder = folder(&[
        ("x.npy", rows("<f4", "(3, 2)", &x)),
        ("label.npy", rows("<i8", "(3,)", &[7_i64, 8, 9].map(i64::to_le_bytes).concat())),
        ("notes.txt", b"no".to_vec()),
    ]);
    let data = DataSet::open(&of(folder.path())).unwrap();
    let specs = [
        ArraySpec { name: "label".into(), kind: ElementKind::Int64, shape: vec![] },
        ArraySpec { name: "x".into(), kind: ElementKind::Float32, shape: vec![2] },
    ];
    assert_eq!((data.len(), data.shape()), (3, &SampleShape::Arrays(specs.to_vec())));
    assert_eq!(arrays(&data, 1), [8_i64.to_le_bytes().to_vec(), floats(&[2.0, 3.0])]);
    let line = data.found().to_string();
    assert_says(
        &line,
        &["3 samples of label (int64), x (2 float32)", "left out: 1 files that are no .npy (notes.txt)"],
    );
    // One file, and some of several.
    let one = DataSet::open(&of(&folder.path().join("x.npy"))).unwrap();
    let some = DataSet::open(&Data { names: Some(vec!["x".into()]), ..of(folder.path()) }).unwrap();
    assert_eq!(one.fingerprint(), some.fingerprint());
    assert_ne!(one.fingerprint(), data.fingerprint());
    let other = refusal(DataSet::open(&Data { names: Some(vec!["y".into()]), ..of(folder.path()) }));
    assert_says(&other, &["data.names: there is no array y", "there are: label, x"]);
}

#[test]
fn numbers_of_every_kind_are_read_as_they_were_written() {
    let wide = |numbers: &[u8], size: usize| -> Vec<u8> {
        numbers.iter().flat_map(|number| [&[*number][..], &vec![0; size - 1]].concat()).collect()
    };
    for (descr, size, kind, becomes) in [
        ("|b1", 1, ElementKind::Bool, 1),
        ("|u1", 1, ElementKind::Uint8, 1),
        ("|i1", 1, ElementKind::Int8, 1),
        ("<i2", 2, ElementKind::Int16, 2),
        ("<u2", 2, ElementKind::Int32, 4),
        ("<i4", 4, ElementKind::Int32, 4),
        ("<u4", 4, ElementKind::Int64, 8),
        ("<i8", 8, ElementKind::Int64, 8),
        ("<f2", 2, ElementKind::Float16, 2),
        ("<f4", 4, ElementKind::Float32, 4),
        ("<f8", 8, ElementKind::Float64, 8),
        (">i2", 2, ElementKind::Int16, 2),
        (">u2", 2, ElementKind::Int32, 4),
        (">i4", 4, ElementKind::Int32, 4),
        (">f4", 4, ElementKind::Float32, 4),
        (">f8", 8, ElementKind::Float64, 8),
    ] {
        let mut stored = wide(&[0, 1, 1, 0], size);
        if descr.starts_with('>') {
            stored.chunks_exact_mut(size).for_each(<[u8]>::reverse);
        }
        let folder = folder(&[("x.npy", rows(descr, "(2, 2)", &stored))]);
        let data = DataSet::open(&of(folder.path())).unwrap();
        let spec = ArraySpec { name: "x".into(), kind, shape: vec![2] };
        assert_eq!(data.shape(), &SampleShape::Arrays(vec![spec]), "{descr}");
        assert_eq!(arrays(&data, 1), [wide(&[1, 0], becomes)], "{descr}");
    }
}

#[test]
fn what_cannot_be_read_is_refused_in_plain_words() {
    let four = floats(&[1.0, 2.0, 3.0, 4.0]);
    let huge = [b"\x93NUMPY\x02\x00".as_slice(), &u32::MAX.to_le_bytes(), b"{}"].concat();
    for (bytes, parts) in [
        (npy("<f4", "True", "(2, 2)", &four), &["Fortran order", "numpy.ascontiguousarray"][..]),
        (rows("|O", "(4,)", &four), &["Python objects (pickle)", "never read"]),
        (rows("<f4", "(5,)", &four), &["has 16 bytes of numbers, and by its header 20", "numpy.save"]),
        (rows("<f4", "(3,)", &four), &["has 16 bytes of numbers, and by its header 12"]),
        (huge, &["has a header of 4294967295 bytes"]),
        (rows("<u8", "(2,)", &four), &["uint64", "save it as int64"]),
        (rows("<c8", "(2,)", &four), &["holds <c8, which are no numbers of a known kind", "astype"]),
        (rows("<U4", "(1,)", &four), &["no numbers of a known kind"]),
        (rows("<f4", "()", &four[..4]), &["has 0 axes"]),
        (rows("<f4", "(0, 4)", &[]), &["is empty"]),
        (rows("<f4", "(4, 0)", &[]), &["is empty"]),
        (rows("<f4", "(4, 4611686018427387904)", &four), &["a sample takes at most"]),
        (rows("<f4", "(18446744073709551615,)", &four), &["there are at most 2^32 - 1"]),
        (rows("<f4", "(-1,)", &four), &["a header that cannot be read"]),
        (b"PK\x03\x04 and so on".to_vec(), &[".npz archive", "unpack it"]),
        (b"\x93NUMPY\x09\x00".to_vec(), &["version 9"]),
        (b"\x93NUM".to_vec(), &["is no array as numpy.save writes it"]),
        (b"no array at all".to_vec(), &["is no array as numpy.save writes it"]),
        (rows("<f4", "(4,)", &four)[..30].to_vec(), &["ends within its header"]),
        (rows("|b1", "(4,)", &[0, 1, 2, 1]), &["the number at [2] is 2, and a truth value is 0 or 1"]),
    ] {
        assert_says(&refused(bytes), &[&["x.npy"], parts].concat());
    }
    let records = String::from_utf8(rows("X", "(4,)", &[])[10..].to_vec()).unwrap();
    let records = records.replace("'X'", "[('a', '<f4'), ('b', '<i4')]");
    let length = u16::try_from(records.len()).unwrap().to_le_bytes();
    let records = [b"\x93NUMPY\x01\x00", length.as_slice(), records.as_bytes()].concat();
    assert_says(&refused(records), &["records of fields", "no numbers of a known kind"]);
}

#[test]
fn one_axis_lies_the_same_in_fortran_order() {
    let folder = folder(&[("x.npy", npy("<f4", "True", "(2, 1)", &floats(&[1.0, 2.0])))]);
    let data = DataSet::open(&of(folder.path())).unwrap();
    assert_eq!(arrays(&data, 1), [floats(&[2.0])]);
}

#[test]
fn a_number_that_is_not_finite_is_named_and_can_be_left_out() {
    for (descr, bytes) in [
        ("<f4", floats(&[0.0, 1.0, 2.0, f32::NAN, 4.0, 5.0, 6.0, 7.0])),
        ("<f8", [0.0, 1.0, 2.0, f64::INFINITY, 4.0, 5.0, 6.0, 7.0].map(f64::to_le_bytes).concat()),
        (">f2", [0_u16, 1, 2, 0xfc00, 4, 5, 6, 7].map(u16::to_be_bytes).concat()),
    ] {
        let folder = folder(&[("x.npy", rows(descr, "(4, 1, 2)", &bytes))]);
        let job = of(folder.path());
        let refused = refusal(DataSet::open(&job));
        assert_says(
            &refused,
            &["x.npy: the number at [1, 0, 1] is ", "leave sample 1 out with data.exclude"],
        );
        let exclusion = Exclusion { after_step: 0, after_phase: 0, names: None, files: vec!["1".into()] };
        let data = DataSet::open(&Data { exclusions: vec![exclusion], ..job }).unwrap();
        assert_eq!(data.len(), 3);
    }
}

#[test]
fn arrays_of_other_lengths_are_refused() {
    let folder =
        folder(&[("x.npy", rows("|u1", "(3,)", &[1, 2, 3])), ("y.npy", rows("|u1", "(2,)", &[1, 2]))]);
    let refused = refusal(DataSet::open(&of(folder.path())));
    assert_says(&refused, &["x has 3 rows and y has 2", "all must have equally many"]);
    let empty = tempfile::tempdir().unwrap();
    assert_says(&refusal(DataSet::open(&of(empty.path()))), &["found 0 arrays", "NAME.npy"]);
    assert_says(&refusal(DataSet::open_labelled(&of(folder.path()))), &["gives no classes"]);
}

proptest! {
    /// Whatever a file holds, it is read or refused.
    #[test]
    fn no_file_is_too_much(at in 0_usize..90, byte in any::<u8>(), cut in 0_usize..120) {
        let mut bytes = rows("<f4", "(3, 2)", &floats(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]));
        let at = at.min(bytes.len() - 1);
        bytes[at] = byte;
        bytes.truncate(cut.max(1));
        let folder = folder(&[("x.npy", bytes)]);
        if let Ok(data) = DataSet::open(&of(folder.path())) {
            arrays(&data, data.len() - 1);
        }
    }
}
