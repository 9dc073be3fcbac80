use super::*;
use crate::job_file::{self, Source};
use crate::records::disk::tests::FullDisk;

fn row(step: u64) -> MetricsRow {
    MetricsRow {
        step,
        images_seen: step,
        ledger: step,
        scalars: [("kl", 0.5)].into_iter().collect(),
        time: 1.0,
        generation: 1,
        world_size: 1,
        images_per_second: 1.0,
        ..MetricsRow::default()
    }
}

struct Bench {
    folder: tempfile::TempDir,
    disk: Arc<FullDisk>,
    records: Records,
}

impl Bench {
    /// A run that reports each step, and has formed its first generation.
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let disk = Arc::new(FullDisk::default());
        let job = job_file::read(&Source::Embedded, &["metrics.every_steps=1".to_string()]).unwrap();
        let as_disk: Arc<dyn Disk> = disk.clone();
        let mut records = Records::open(job, folder.path(), Screen::silent(), &as_disk).unwrap();
        records.formed(Position(0));
        Bench { folder, disk, records }
    }

    fn metrics(&self) -> PathBuf {
        self.folder.path().join("metrics.jsonl")
    }

    fn rows(&self) -> usize {
        std::fs::read_to_string(self.metrics()).unwrap().lines().count()
    }

    /// Advances a second; returns the acknowledgement to the workers.
    async fn second(&mut self) -> Option<u64> {
        self.records.catch_up();
        if self.records.syncing.is_some() {
            self.records.synced().await;
        }
        self.records.acknowledge()
    }
}

/// Invariants 1 and 2: while the disk is full, more rows arrive than find room here.
#[tokio::test]
async fn a_full_disk_loses_no_row() {
    let mut bench = Bench::new();
    bench.records.take_row(row(1));
    assert_eq!(bench.second().await, Some(1));
    bench.disk.fill();
    let limit = bench.disk.rows_that_wait();
    let all = limit as u64 + 1000;
    (2..=all).for_each(|step| bench.records.take_row(row(step)));
    assert_eq!(bench.second().await, None);
    assert_eq!((bench.records.waiting.len(), bench.rows()), (limit, 1));
    assert!(!bench.records.are_durable(2) && bench.records.are_durable(1));

    bench.disk.free();
    let held = limit as u64 + 1;
    assert_eq!(bench.second().await, Some(held), "the prefix that was written, not what came after it");
    assert!(bench.records.has_room());
    assert_eq!(bench.records.missing(all), Some(held + 1));
    // The newest is computed before the others are reported again.
    bench.records.take_row(row(all + 1));
    assert_eq!(bench.second().await, None);
    (held + 1..=all).for_each(|step| bench.records.take_row(row(step)));
    assert_eq!(bench.second().await, Some(all + 1));
    assert_eq!(bench.records.missing(all + 1), None);
    assert_eq!(bench.rows() as u64, all + 1);
}

/// Invariant 3.
#[tokio::test]
async fn a_row_is_durable_before_it_is_acknowledged_and_before_its_checkpoint() {
    let mut bench = Bench::new();
    for step in [1, 2] {
        bench.records.take_row(row(step));
        let written = std::fs::metadata(bench.metrics()).unwrap().len();
        assert!(bench.disk.synced(&bench.metrics()) < written);
        assert_eq!(bench.records.acknowledge(), None);
        assert!(!bench.records.are_durable(step));
        assert_eq!(bench.second().await, Some(step));
        assert_eq!(bench.disk.synced(&bench.metrics()), written);
        assert!(bench.records.are_durable(step));
    }
    // A due row that has not arrived.
    assert!(!bench.records.are_durable(3));
    bench.records.take_row(row(4));
    assert_eq!(bench.second().await, None, "4 is durable, and 3 is not there");
    bench.records.give_up(4);
    assert_eq!(bench.second().await, Some(4));
    let told = std::fs::read_to_string(bench.folder.path().join("events.jsonl")).unwrap();
    assert!(told.contains(r#""kind":"metrics_lost","count":1,"first":3,"last":3"#), "{told}");
}

fn grid() -> SampleGrid {
    SampleGrid { real: false, step: 0, png: Vec::new(), width: 1, height: 1, channels: 1 }
}

#[tokio::test]
async fn real_samples_are_stored_and_told_of_once() {
    let mut bench = Bench::new();
    let path = |name: &str| bench.folder.path().join(name);
    std::fs::create_dir_all(path("samples")).unwrap();
    let (picture, of_step) = (path("samples/real.png"), path("samples/step-00000000.png"));
    let events = path("events.jsonl");
    let told = || {
        let events = std::fs::read_to_string(&events).unwrap();
        events.matches(r#""kind":"real_samples","file":"samples/real.png""#).count()
    };
    let real = |png: &[u8]| SampleGrid { real: true, png: png.to_vec(), ..grid() };
    // As of a coordinator that died between the two.
    std::fs::write(&picture, b"a").unwrap();
    bench.records.take_samples(real(b"a"));
    bench.records.take_samples(real(b"a"));
    bench.second().await;
    assert_eq!((std::fs::read(&picture).unwrap(), told()), (b"a".to_vec(), 1));
    assert!(bench.records.chronicle.look().has_real);
    // Other samples after some were left out.
    bench.records.take_samples(real(b"b"));
    bench.second().await;
    assert_eq!((std::fs::read(&picture).unwrap(), told()), (b"b".to_vec(), 2));
    assert!(!of_step.exists());
}

#[tokio::test]
async fn texts_are_stored_and_told_of_once() {
    let mut bench = Bench::new();
    let path = |name: &str| bench.folder.path().join(name);
    std::fs::create_dir_all(path("samples")).unwrap();
    let (file, events) = (path("samples/step-00000007.txt"), path("events.jsonl"));
    let texts = |text: &str| SampleTexts { step: 7, text: text.to_string() };
    for text in ["first", "first"] {
        bench.records.take_samples(texts(text));
        bench.second().await;
    }
    assert_eq!(std::fs::read_to_string(file).unwrap(), "first");
    let told = std::fs::read_to_string(events).unwrap();
    assert_eq!(told.matches(r#""kind":"samples","file":"samples/step-00000007.txt""#).count(), 1, "{told}");
    assert!(bench.records.chronicle.look().writes_text);
}

/// Invariant 2, and that an event names only a picture that is there.
#[tokio::test]
async fn a_picture_is_told_of_once_it_could_be_written() {
    let mut bench = Bench::new();
    let path = |name: &str| bench.folder.path().join(name);
    let (samples, events) = (path("samples"), path("events.jsonl"));
    let told = || std::fs::read_to_string(&events).unwrap().matches(r#""kind":"samples""#).count();
    let grid = |step: u64| SampleGrid { step, png: step.to_le_bytes().to_vec(), ..grid() };
    // No folder of that name can be written to.
    std::fs::write(&samples, "").unwrap();
    let newest = PICTURES_LIMIT as u64 + 2;
    (1..=newest).chain([newest]).for_each(|step| bench.records.take_samples(grid(step)));
    assert_eq!((told(), bench.records.pictures.len()), (0, PICTURES_LIMIT));
    std::fs::remove_file(&samples).unwrap();
    std::fs::create_dir(&samples).unwrap();
    bench.second().await;
    assert_eq!((told(), bench.records.pictures.len()), (PICTURES_LIMIT, 0));
    let picture = samples.join(format!("step-{newest:08}.png"));
    assert_eq!(std::fs::read(picture).unwrap(), newest.to_le_bytes());
    bench.records.take_samples(grid(newest));
    assert_eq!(told(), PICTURES_LIMIT, "it was drawn again");
}
