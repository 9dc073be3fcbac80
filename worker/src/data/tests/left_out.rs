//! Samples that the job leaves out.

use ganglion_proto::job::Exclusion;

use super::*;

const NAMES: [&str; 5] = ["a/1.png", "a/2.png", "b/1.png", "b/2.png", "c/1.png"];

fn pictures() -> TempDir {
    picture_folder(&NAMES.map(|name| (name, 4, 4)))
}

fn exclusion(after_step: u64, names: Option<&str>, files: &[&str]) -> Exclusion {
    let files = files.iter().map(|file| (*file).to_owned()).collect();
    Exclusion { after_step, after_phase: 0, names: names.map(str::to_owned), files }
}

fn without(folder: &TempDir, exclusions: &[Exclusion]) -> Data {
    Data { exclusions: exclusions.to_vec(), ..data(DataKind::Folder, folder.path()) }
}

fn open(folder: &TempDir, exclusions: &[Exclusion]) -> Result<DataSet, DataError> {
    DataSet::open(&without(folder, exclusions))
}

fn remove(folder: &TempDir, name: &str) {
    fs::remove_file(folder.path().join(name)).unwrap();
}

/// Invariant 1.
#[test]
fn leaving_out_from_the_start_is_as_if_it_was_not_there() {
    let folder = pictures();
    let from_the_start = [exclusion(0, None, &["a/2.png", "c/1.png", "gone.png"])];
    fs::write(folder.path().join("c/1.png"), "not even a picture").unwrap();
    let there = open(&folder, &from_the_start).unwrap();
    ["a/2.png", "c/1.png"].iter().for_each(|name| remove(&folder, name));
    let (gone, never) = (open(&folder, &from_the_start).unwrap(), open(&folder, &[]).unwrap());
    for set in [&there, &gone] {
        assert_eq!((set.len(), set.fingerprint(), set.names()), (3, never.fingerprint(), never.names()));
        assert_eq!(read(set, 1), read(&never, 1));
    }
}

/// Invariant 2, whether the file is there, damaged or gone.
#[test]
fn leaving_out_later_keeps_every_index_and_hashes_what_is_left() {
    let folder = pictures();
    let (all, names) = (open(&folder, &[]).unwrap(), open(&folder, &[]).unwrap().names());
    let later = [exclusion(3, Some(&names), &["b/1.png"]), exclusion(7, Some(&names), &["a/1.png"])];
    let there = open(&folder, &later).unwrap();
    fs::write(folder.path().join("b/1.png"), "damaged").unwrap();
    let damaged = open(&folder, &later).unwrap();
    remove(&folder, "b/1.png");
    let gone = open(&folder, &later).unwrap();
    for set in [&there, &damaged, &gone] {
        assert_eq!((set.len(), set.left_out(), set.left()), (5, [2, 0].as_slice(), vec![1, 3, 4]));
        assert_eq!((set.fingerprint(), set.names()), (there.fingerprint(), names.clone()));
        assert_eq!(read(set, 4), read(&all, 4));
    }
    assert_ne!(there.fingerprint(), all.fingerprint());
    let needed = refusal(gone.read(2, &mut vec![0.0; shape(&gone).numel()]));
    assert_says(&needed, &["b/1.png", "put the file back", "--run-dir"]);
    fs::write(folder.path().join("c/1.png"), encoded(&picture(4, 4, 99), ImageFormat::Png)).unwrap();
    assert_ne!(open(&folder, &later).unwrap().fingerprint(), there.fingerprint(), "another picture is seen");
}

/// Invariant 3.
#[test]
fn a_name_that_was_never_there_is_refused_with_the_nearest() {
    let folder = pictures();
    let names = open(&folder, &[]).unwrap().names();
    for after_step in [0, 3] {
        let wrong = refusal(open(&folder, &[exclusion(after_step, Some(&names), &["a/3.png"])]));
        assert_says(&wrong, &["data.exclude: there is no sample a/3.png", "a/1.png, a/2.png"]);
    }
    assert_says(&refusal(open(&folder, &[exclusion(3, None, &["a/3.png"])])), &["no sample a/3.png"]);
    // Deleted and mistyped at once is no way around.
    remove(&folder, "b/1.png");
    assert_says(&refusal(open(&folder, &[exclusion(3, Some(&names), &["b/l.png"])])), &["no sample b/l.png"]);
    let right = [exclusion(0, Some(&names), &["a/1.png"]), exclusion(3, None, &["b/2.png"])];
    assert_says(&refusal(open(&folder, &right)), &["other samples than the run began with"]);
}

#[test]
fn not_all_can_be_left_out() {
    let folder = pictures();
    for after_step in [0, 3] {
        assert_says(
            &refusal(open(&folder, &[exclusion(after_step, None, &NAMES)])),
            &["leaves out every sample"],
        );
    }
}

#[test]
fn classes_keep_their_numbers_when_one_is_emptied() {
    let folder = pictures();
    let (b, names) = (["b/1.png", "b/2.png"], open(&folder, &[]).unwrap().names());
    let labelled = |exclusions: &[Exclusion]| DataSet::open_labelled(&without(&folder, exclusions)).unwrap();
    let (start, later) = ([exclusion(0, Some(&names), &b)], [exclusion(5, Some(&names), &b)]);
    assert_eq!(labelled(&start).labels(), [0, 0, 2]);
    assert_eq!(labelled(&later).labels(), [0, 0, 1, 1, 2]);
    fs::remove_dir_all(folder.path().join("b")).unwrap();
    assert_eq!((labelled(&start).labels(), labelled(&start).classes()), ([0, 0, 2].as_slice(), 3));
    assert_eq!((labelled(&later).labels(), labelled(&later).classes()), ([0, 0, 1, 1, 2].as_slice(), 3));
}

#[test]
fn a_sample_of_data_in_one_file_has_its_number_for_a_name() {
    let bytes = idx_bytes(0x803, [4, 2, 2], &[[1; 4], [2; 4], [3; 4], [4; 4]].concat());
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("images");
    fs::write(&file, bytes).unwrap();
    let open = |exclusions: Vec<Exclusion>| DataSet::open(&Data { exclusions, ..data(DataKind::Idx, &file) });
    let set = open(vec![exclusion(0, None, &["1"]), exclusion(9, None, &["3"])]).unwrap();
    assert_eq!((set.len(), set.left_out(), set.left()), (3, [2].as_slice(), vec![0, 1]));
    assert_eq!(read(&set, 1)[0], 3.0 / 127.5 - 1.0);
    assert_says(&refusal(open(vec![exclusion(9, None, &["4"])])), &["there is no sample 4", "0, 1, 2"]);
}

#[test]
fn a_damaged_sample_says_how_to_go_on_without_it() {
    let folder = picture_folder(&[("a b's/1.png", 4, 4), ("2.png", 4, 4)]);
    let whole = fs::read(folder.path().join("a b's/1.png")).unwrap();
    fs::write(folder.path().join("a b's/1.png"), &whole[..whole.len() - 20]).unwrap();
    let set = open(&folder, &[]).unwrap();
    let message = refusal(set.read(1, &mut vec![0.0; shape(&set).numel()]));
    assert_says(&message, &["a b's/1.png: cannot decode", r"--set 'data.exclude=a b'\''s/1.png'"]);
}
