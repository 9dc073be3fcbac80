//! The files of a checkpoint, over a storage in memory.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;

use common::{Bench, bits, content, fingerprints, job, save};
use ganglion_membership::{Checkpoint, Position};
use ganglion_proto::job::{LossKind, ModelKind};
use ganglion_storage::{Address, MANIFEST, Storage, in_folder};
use ganglion_worker::checkpoint::init_weights::Beginning;
use ganglion_worker::checkpoint::{CheckpointError, Files, Snapshot, joined, state_digest};
use ganglion_worker::nn::tensor_bytes::to_bytes;
use ganglion_worker::state::State;
use safetensors::SafeTensors;
use tch::Device;

/// The same snapshot with other bits in one byte.
fn changed(bench: &Bench, snapshot: &Snapshot, byte: usize, bits: u8) -> Snapshot {
    let mut flat = snapshot.bytes(0..bench.model.layout.len).to_vec();
    flat[byte] ^= bits;
    Snapshot::whole((snapshot.step, snapshot.phase), flat.into(), snapshot.counters)
}

fn snapshot(bench: &Bench) -> Snapshot {
    let mut counters = bench.state.counters;
    (counters.position.0, counters.ledger, counters.skipped) = (15, 0xdead_beef_0123_4567, 3);
    Snapshot::whole((5, 0), to_bytes(&bench.state.flat).into(), counters)
}

fn files<'a>(bench: &'a Bench, storage: &'a Storage) -> Files<'a> {
    bench.files(storage)
}

fn bench() -> Bench {
    Bench::new(job(ModelKind::Dcgan28, LossKind::NonSaturating))
}

async fn flip_a_bit(storage: &Storage, checkpoint: &Checkpoint, file: &str) {
    let mut bytes = content(storage, checkpoint, file).await;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    storage.replace(&in_folder(&checkpoint.folder(), file), &bytes.into()).await.unwrap();
}

#[tokio::test]
async fn what_was_written_is_read_back() {
    let (bench, storage) = (bench(), Storage::in_memory());
    let (files, snapshot) = (files(&bench, &storage), snapshot(&bench));
    let saved = save(&files, &snapshot).await;
    assert_eq!((saved.position.0, saved.folder().as_str()), (15, "step-00000005"));
    let read = files.read(&saved).await.unwrap();
    assert!(read == snapshot);
    assert_eq!(saved.state_digest, state_digest(&bench.model.layout, &snapshot));
}

/// Module invariant 1.
#[tokio::test]
async fn the_bytes_do_not_depend_on_who_writes_them_or_in_which_order() {
    let (bench, one, other) = (bench(), Storage::in_memory(), Storage::in_memory());
    let snapshot = snapshot(&bench);
    let saved = save(&files(&bench, &one), &snapshot).await;
    let fingerprints = fingerprints(&bench.model.layout, &snapshot);
    for index in (0..bench.model.file_count(4)).rev() {
        files(&bench, &other).write(&snapshot, &fingerprints, index).await.unwrap();
    }
    for file in &saved.files {
        let (one, other) =
            (content(&one, &saved, &file.file).await, content(&other, &saved, &file.file).await);
        assert!(one == other, "{}", file.file);
        assert_eq!(blake3::hash(&one).to_hex().as_str(), file.blake3);
    }
}

/// A writer copies nothing but what its files hold, and reports the same.
#[tokio::test]
async fn a_snapshot_of_a_files_tensors_is_enough_to_write_it() {
    let (mut bench, one, other) = (bench(), Storage::in_memory(), Storage::in_memory());
    let snapshot = snapshot(&bench);
    let fingerprints = fingerprints(&bench.model.layout, &snapshot);
    bench.state.counters = snapshot.counters;
    for index in 0..bench.model.file_count(4) {
        let ranges = joined(files(&bench, &one).ranges(&[index]));
        let part = Snapshot::of(&bench.state, (5, 0), &ranges).unwrap();
        let whole = files(&bench, &one).write(&snapshot, &fingerprints, index).await.unwrap();
        assert_eq!(files(&bench, &other).write(&part, &fingerprints, index).await.unwrap(), whole);
    }
}

/// A copy that was damaged before its file was written looks like another state to the coordinator.
#[tokio::test]
async fn the_report_of_a_damaged_copy_has_another_fingerprint() {
    let (bench, storage) = (bench(), Storage::in_memory());
    let (snapshot, files) = (snapshot(&bench), files(&bench, &storage));
    let fingerprints = fingerprints(&bench.model.layout, &snapshot);
    for index in 0..bench.model.file_count(4) {
        let good = files.write(&snapshot, &fingerprints, index).await.unwrap();
        let Some(range) = files.ranges(&[index]).pop() else { continue };
        let damaged = changed(&bench, &snapshot, 4 * range.end - 1, 1);
        let bad = files.write(&damaged, &fingerprints, index).await.unwrap();
        assert_ne!(good.fingerprint, bad.fingerprint, "{}", good.file.file);
    }
}

/// The digest as the contract spells it out, from the files alone.
#[tokio::test]
async fn the_digest_follows_from_the_files() {
    let (bench, storage) = (bench(), Storage::in_memory());
    let saved = save(&files(&bench, &storage), &snapshot(&bench)).await;
    let mut tensors = BTreeMap::new();
    for file in saved.state_files() {
        let bytes = content(&storage, &saved, &file.file).await;
        for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().iter() {
            let mut record = [name.as_bytes(), b"\0", tensor.dtype().to_string().as_bytes(), b"\0"].concat();
            record.extend((tensor.shape().len() as u64).to_le_bytes());
            tensor.shape().iter().for_each(|size| record.extend((*size as u64).to_le_bytes()));
            record.extend(tensor.data());
            assert!(tensors.insert(name.to_string(), record).is_none(), "{name} is in two files");
        }
    }
    let records: Vec<u8> = tensors.into_values().flatten().collect();
    assert_eq!(blake3::hash(&records).to_hex().as_str(), saved.state_digest);
}

#[tokio::test]
async fn the_digest_depends_on_every_element_and_counter() {
    let bench = bench();
    let snapshot = snapshot(&bench);
    let digest = state_digest(&bench.model.layout, &snapshot);
    for tensor in bench.model.layout.tensors() {
        let other = changed(&bench, &snapshot, 4 * tensor.range.end - 1, 0x80);
        assert_ne!(
            state_digest(&bench.model.layout, &other),
            digest,
            "the sign of the last of {}",
            tensor.name
        );
    }
    let mut other = snapshot.clone();
    other.counters.ledger += 1;
    assert_ne!(state_digest(&bench.model.layout, &other), digest);
}

#[tokio::test]
async fn the_index_maps_every_tensor_to_its_file() {
    let (bench, storage) = (bench(), Storage::in_memory());
    let saved = save(&files(&bench, &storage), &snapshot(&bench)).await;
    let index = content(&storage, &saved, "state.safetensors.index.json").await;
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    let (mut total, mut count) = (0, 0);
    for file in saved.state_files() {
        let bytes = content(&storage, &saved, &file.file).await;
        for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().iter() {
            assert_eq!(index["weight_map"][name], file.file.as_str());
            total += tensor.data().len();
            count += 1;
        }
    }
    assert_eq!(index["metadata"]["total_size"], total);
    assert_eq!(index["weight_map"].as_object().unwrap().len(), count);
}

/// Module invariant 3.
#[tokio::test]
async fn a_flipped_bit_is_found_and_the_file_named() {
    let (bench, storage) = (bench(), Storage::in_memory());
    let files = files(&bench, &storage);
    let saved = save(&files, &snapshot(&bench)).await;
    let part = &saved.state_files()[1].file;
    flip_a_bit(&storage, &saved, part).await;
    let Err(CheckpointError::Corrupt(what)) = files.read(&saved).await else { panic!("it was not noticed") };
    assert!(what.contains(part), "{what}");
}

/// Module invariant 2.
#[tokio::test]
async fn a_damaged_file_is_written_again_and_a_good_one_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let storage = Storage::open(&Address::Folder(folder.path().to_path_buf())).unwrap();
    let bench = bench();
    let (files, snapshot) = (files(&bench, &storage), snapshot(&bench));
    let saved = save(&files, &snapshot).await;
    flip_a_bit(&storage, &saved, &saved.files[0].file).await;
    let inode = |index: usize| {
        let file = folder.path().join(saved.folder()).join(&saved.files[index].file);
        std::fs::metadata(file).unwrap().ino()
    };
    let (damaged, good) = (inode(0), inode(1));
    assert_eq!(save(&files, &snapshot).await, saved);
    assert!(files.read(&saved).await.is_ok());
    assert!(inode(0) != damaged && inode(1) == good);
}

/// An existing manifest counts only once it was compared.
#[tokio::test]
async fn a_checkpoint_that_is_there_is_compared_before_it_is_taken_for_done() {
    let (bench, storage) = (bench(), Storage::in_memory());
    let (files, ours) = (files(&bench, &storage), snapshot(&bench));
    let theirs = changed(&bench, &ours, 0, 1);
    let folder = files.write_whole(&theirs).await.unwrap();
    assert_eq!(files.write_whole(&theirs).await.unwrap(), folder, "the same state is done");
    let path = in_folder(&folder, MANIFEST);
    let manifest = storage.text(&path).await.unwrap().unwrap();
    let refused = files.write_whole(&ours).await.unwrap_err();
    assert!(
        matches!(&refused, CheckpointError::Corrupt(what) if what.contains("holds another state")),
        "{refused}"
    );
    assert_eq!(storage.text(&path).await.unwrap().unwrap(), manifest, "it is left as it is");
    let there = ganglion_proto::manifest::parse(&manifest).unwrap();
    assert!(files.read(&there).await.is_ok_and(|read| read == theirs));
    // A damaged manifest belongs to no state, nor does a torn one.
    for damage in ["file", "manifest"] {
        match damage {
            "file" => flip_a_bit(&storage, &there, &there.files[0].file).await,
            _ => storage.replace(&path, &"{".into()).await.unwrap(),
        }
        files.write_whole(&ours).await.unwrap();
        let written = storage.text(&path).await.unwrap().unwrap();
        let written = ganglion_proto::manifest::parse(&written).unwrap();
        assert!(files.read(&written).await.is_ok_and(|read| read == ours), "{damage}");
    }
}

#[tokio::test]
async fn a_checkpoint_of_another_model_is_refused() {
    let storage = Storage::in_memory();
    let (wide, narrow) = (bench(), Bench::new(job(ModelKind::Mlp28, LossKind::NonSaturating)));
    let saved = save(&files(&wide, &storage), &snapshot(&wide)).await;
    let error = files(&narrow, &storage).read(&saved).await.unwrap_err();
    assert!(matches!(error, CheckpointError::Corrupt(_)), "{error}");
}

/// A run that starts from another one takes only its weights and its average.
#[test]
fn a_run_begins_with_the_weights_of_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let mut other = bench();
    let _ = tch::no_grad(|| other.state.flat.g_add_scalar_(0.25));
    other.state.counters.position = Position(9);
    let snapshot = Snapshot::whole((3, 0), to_bytes(&other.state.flat).into(), other.state.counters);
    let storage = Storage::open(&Address::parse(folder.path().to_str().unwrap()).unwrap()).unwrap();
    let files = other.files(&storage);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let written = runtime.block_on(files.write_whole(&snapshot)).unwrap();
    let place = folder.path().join(written);
    let begun = Beginning::read(place.to_str().unwrap(), &other.model.layout).unwrap();
    let state = begun.state(&other.model.layout, 5, Device::Cpu);
    let same = |start: usize, numel: usize| {
        let section = |state: &State| bits(&state.section(start..start + numel));
        section(&state) == section(&other.state)
    };
    for sections in other.model.layout.networks() {
        let start = sections.weight_range().start;
        assert!(sections.parameters.entries().all(|(spec, at)| same(start + at, spec.numel())));
        assert!(!same(sections.moment_range(0).start, 1), "moments begin anew");
    }
    assert_eq!(state.counters.position, Position(0));

    let narrow = Bench::new(job(ModelKind::Mlp28, LossKind::NonSaturating));
    let error = Beginning::read(place.to_str().unwrap(), &narrow.model.layout).unwrap_err();
    assert!(error.contains("model.init_from") && error.contains("set model.kind"), "{error}");
    let error = Beginning::read(folder.path().to_str().unwrap(), &narrow.model.layout).unwrap_err();
    assert!(error.contains("has no manifest.json; give the folder of a checkpoint"), "{error}");
}
