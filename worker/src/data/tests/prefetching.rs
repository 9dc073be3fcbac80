//! Reading ahead.

use std::collections::BTreeSet;
use std::sync::Arc;

use ganglion_proto::stream::{SampleStream, StreamShape, ledger_term};
use tch::{Device, Tensor};

use super::*;
use crate::random::{Key, Purpose};

/// Seven samples of one pixel, sample i with byte i.
fn seven() -> Arc<DataSet> {
    let bytes = idx_bytes(0x0803, [7, 1, 1], &[0, 1, 2, 3, 4, 5, 6]);
    Arc::new(open_bytes(DataKind::Idx, &bytes).unwrap())
}

fn plan() -> Plan {
    Plan {
        seed: 5,
        data_shards: 4,
        shard_batch: 3,
        phases: 2,
        shards: 1..3,
        first_step: 10,
        first_phase: 1,
        end_step: 13,
        depth: 2,
        changes: Vec::new(),
    }
}

#[test]
fn batches_come_in_order_with_the_samples_of_the_stream() {
    for depth in [0, 1, 8] {
        let mut prefetcher = Prefetcher::start(seven(), Plan { depth, ..plan() });
        let mut stream = SampleStream::new(5, 7);
        for (step, phase) in [(10, 1), (11, 0), (11, 1), (12, 0), (12, 1)] {
            let batch = prefetcher.next().unwrap();
            assert_eq!((batch.step, batch.phase), (step, phase));
            let mut ledger = 0_u64;
            let mut samples = Vec::new();
            for shard in 1..3 {
                let first =
                    StreamShape { phases: 2, data_shards: 4, shard_batch: 3 }.first(step, phase, shard);
                for q in first..first + 3 {
                    let sample = stream.sample(q);
                    samples.push(f32::from(u8::try_from(sample).unwrap()) / 127.5 - 1.0);
                    ledger = ledger.wrapping_add(ledger_term(q, sample));
                }
            }
            assert_eq!(batch.values.pixels(), samples);
            assert_eq!(batch.ledger, ledger);
            prefetcher.recycle(batch);
        }
        assert!(matches!(prefetcher.next(), Err(DataError::Finished)));
        assert!(matches!(prefetcher.next(), Err(DataError::Finished)));
    }
}

/// With a copy on the CPU in place of one on a GPU.
#[test]
fn a_wait_ends_with_the_batch_and_takes_none() {
    let limit = std::time::Duration::from_secs(60);
    let mut prefetcher = Prefetcher::start(seven(), plan());
    for (step, phase) in [(10, 1), (11, 0), (11, 1), (12, 0), (12, 1)] {
        assert!(prefetcher.wait(limit) && prefetcher.wait(limit));
        let batch = prefetcher.next().unwrap();
        assert_eq!((batch.step, batch.phase), (step, phase));
    }
    assert!(prefetcher.wait(limit), "nothing more is waited for");
    assert!(matches!(prefetcher.next(), Err(DataError::Finished)));
}

#[test]
fn what_is_read_is_uploaded_and_a_failure_of_that_ends_the_batches() {
    let mut left = 2;
    let upload = move |pixels: &[f32]| {
        left -= 1;
        if left < 0 { Err(c10d::Error::Fatal("full".to_string())) } else { Ok(Tensor::from_slice(pixels)) }
    };
    let key = |step, phase| Key { seed: 1, step, phase, shard: 0, purpose: Purpose::Noise };
    let draws = |step, phase| {
        vec![
            Tensor::from_slice(&[step as f32, 0.5, -0.0]),
            Tensor::from_slice(&[i64::MIN, -1, 7]),
            Tensor::from_slice(&[phase as f32, 2.0, 3.0, 4.0]).view([2, 2]),
        ]
    };
    let draw = move |step, phase| vec![(key(step, phase), draws(step, phase))];
    let beside = Beside { draw: Some(Box::new(draw)), upload: Some(Box::new(upload)) };
    let mut prefetcher = Prefetcher::start_with(seven(), plan(), beside);
    for _ in 0..2 {
        let batch = prefetcher.next().unwrap();
        assert_eq!(Vec::<f32>::try_from(batch.uploaded.as_ref().unwrap()).unwrap(), batch.values.pixels());
        let found = batch.draws.all(key(batch.step, batch.phase), Device::Cpu, || panic!("it was made"));
        let wanted = draws(batch.step, batch.phase);
        assert!(
            found.len() == 3 && found.iter().zip(&wanted).all(|(a, b)| a.equal(b) && a.size() == b.size())
        );
        prefetcher.recycle(batch);
    }
    assert!(matches!(prefetcher.next(), Err(DataError::Upload(detail)) if detail.contains("full")));
    assert!(matches!(prefetcher.next(), Err(DataError::Finished)));
}

#[test]
fn the_ledger_does_not_depend_on_the_split() {
    let ledger = |shards| {
        let mut prefetcher = Prefetcher::start(seven(), Plan { shards, ..plan() });
        prefetcher.next().unwrap().ledger
    };
    let whole = ledger(0..4);
    assert_eq!(whole, ledger(0..1).wrapping_add(ledger(1..4)));
    assert_eq!(ledger(2..2), 0);
}

/// Invariant 2 of the prefetcher: recycled memory goes round. Depth 0 hands over one by one, so after the
/// first batches each further one lies in memory that was given back.
#[test]
fn memory_is_used_again() {
    let mut prefetcher = Prefetcher::start(seven(), Plan { depth: 0, end_step: 1000, ..plan() });
    let mut buffers = BTreeSet::new();
    for _ in 0..100 {
        let batch = prefetcher.next().unwrap();
        buffers.insert(batch.values.pixels().as_ptr().addr());
        prefetcher.recycle(batch);
    }
    // One buffer with the caller, one being filled, and one in between.
    assert!(buffers.len() <= 3, "{} buffers", buffers.len());
}

#[test]
fn memory_from_another_split_fits() {
    let mut wide = Prefetcher::start(seven(), Plan { shards: 0..4, ..plan() });
    let mut narrow = Prefetcher::start(seven(), Plan { shards: 1..2, depth: 0, ..plan() });
    narrow.recycle(wide.next().unwrap());
    for _ in 0..5 {
        assert_eq!(narrow.next().unwrap().values.pixels().len(), 3);
    }
}

/// Invariant 3 of the prefetcher: the data set is free again, so the thread is gone.
#[test]
fn dropping_ends_the_thread() {
    for (depth, taken) in [(0, 0), (1, 1), (3, 4), (100, 0)] {
        let dataset = seven();
        let endless = Plan { depth, end_step: u64::MAX, ..plan() };
        let mut prefetcher = Prefetcher::start(Arc::clone(&dataset), endless);
        for _ in 0..taken {
            prefetcher.next().unwrap();
        }
        drop(prefetcher);
        assert_eq!(Arc::strong_count(&dataset), 1);
    }
}

#[test]
fn an_error_of_reading_arrives_once() {
    let folder = picture_folder(&[("a.png", 4, 4)]);
    let dataset = Arc::new(DataSet::open(&data(DataKind::Folder, folder.path())).unwrap());
    fs::write(folder.path().join("a.png"), "damaged in the meantime").unwrap();
    let mut prefetcher = Prefetcher::start(dataset, plan());
    assert_says(&refusal(prefetcher.next()), &["a.png: cannot decode the image"]);
    assert!(matches!(prefetcher.next(), Err(DataError::Finished)));
}

#[test]
fn a_data_set_can_be_shared() {
    fn shared<T: Send + Sync>() {}
    fn handed_over<T: Send>() {}
    shared::<DataSet>();
    shared::<DataError>();
    handed_over::<Batch>();
}
