//! TensorBoard's curves and pictures, drawn from the lines of `metrics.jsonl` and `events.jsonl`.
//!
//! 1. Each line is drawn once: the event files of earlier coordinators are read back, so a line
//!    that a death or a full disk kept from being drawn is drawn by the next coordinator.
//! 2. A row is one record of an event file, written as a whole or not at all.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ganglion_proto::record::{EventLine, MetricsRow, RunEvent};

use super::scalars::Shown;
use super::tensorboard::{Png, TensorBoard};

/// Tag of the curve that every row has a point of.
const MARK: &str = "cluster/world_size";
/// Tag of the series of pictures.
const PICTURES: &str = "samples";
/// Tag of the picture of real samples.
const REAL: &str = "real_samples";
/// Prefix of the tags of an evaluation's figures.
const EVALUATION: &str = "evaluation/";

/// Shared handle of the event file; clones refer to the same one.
#[derive(Clone, Debug)]
pub(crate) struct Curves(Arc<Mutex<Board>>);

/// Steps that are already drawn.
#[derive(Debug, Default)]
struct Drawn {
    rows: BTreeSet<u64>,
    evaluations: BTreeSet<u64>,
    pictures: BTreeSet<u64>,
    /// Holds 0 once the real samples are drawn.
    real: BTreeSet<u64>,
}

#[derive(Debug)]
struct Board {
    run: PathBuf,
    file: TensorBoard,
    drawn: Drawn,
}

impl Curves {
    /// Reads back the drawings of earlier coordinators in a run directory, and begins a new event file.
    ///
    /// # Errors
    /// The folder cannot be read, or no file can be created in it.
    pub(crate) fn open(run: &Path) -> io::Result<Curves> {
        let folder = run.join("tensorboard");
        let mut drawn = Drawn::default();
        TensorBoard::read_back(&folder, |step, tag| {
            let steps = match tag {
                // One tag for each row suffices: a row is one record, and so is there as a whole or not
                // (2).
                MARK => &mut drawn.rows,
                PICTURES => &mut drawn.pictures,
                REAL => &mut drawn.real,
                _ if tag.starts_with(EVALUATION) => &mut drawn.evaluations,
                _ => return,
            };
            steps.insert(step);
        })?;
        let board = Board { run: run.to_path_buf(), file: TensorBoard::create(&folder)?, drawn };
        Ok(Curves(Arc::new(Mutex::new(board))))
    }

    fn lock(&self) -> MutexGuard<'_, Board> {
        // No method leaves the board inconsistent, so a poisoned lock may be used.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Draws a line of `metrics.jsonl`, unless it is already drawn.
    pub(crate) fn row(&self, line: &[u8]) {
        // A line of another version without the fixed columns is not drawn.
        let Ok(row) = serde_json::from_slice::<MetricsRow>(line) else { return };
        let mut board = self.lock();
        // Lines are read again by each coordinator, and TensorBoard would draw a point twice (1).
        if board.drawn.rows.insert(row.step) {
            board.file.scalars(row.step, row.time, points(&row));
        }
    }

    /// Draws a line of `events.jsonl`, if it is an evaluation or a picture.
    pub(crate) fn event(&self, line: &[u8]) {
        match EventLine::parse(line) {
            Ok(EventLine { time, event: Ok(RunEvent::Evaluation(row)), .. }) => {
                let mut board = self.lock();
                if board.drawn.evaluations.insert(row.step) {
                    let figures =
                        row.metrics.iter().map(|(name, value)| (format!("{EVALUATION}{name}"), value));
                    board.file.scalars(row.step, time, finite(figures));
                }
            }
            Ok(EventLine { time, event: Ok(RunEvent::Samples { file, step }), .. }) => {
                self.lock().picture(PICTURES, step, time, &file);
            }
            Ok(EventLine { time, event: Ok(RunEvent::RealSamples { file }), .. }) => {
                self.lock().picture(REAL, 0, time, &file);
            }
            _ => {}
        }
    }

    /// Hands all records to the operating system, so that TensorBoard can see them.
    ///
    /// # Errors
    /// The file cannot be written. The remaining records are kept for a while, and drawn by the
    /// next coordinator at the latest.
    pub(crate) fn flush(&self) -> io::Result<()> {
        // Locked while writing: only the coordinator's loop draws, so no other thread waits.
        self.lock().file.flush()
    }
}

impl Board {
    fn picture(&mut self, tag: &str, step: u64, time: f64, file: &str) {
        let drawn = if tag == REAL { &mut self.drawn.real } else { &mut self.drawn.pictures };
        if drawn.contains(&step) {
            return;
        }
        // Accepts only a name in the folder of samples; a picture that was removed is not drawn.
        let Some(name) = file.strip_prefix("samples/").filter(|name| !name.contains('/')) else { return };
        let Ok(bytes) = fs::read(self.run.join("samples").join(name)) else { return };
        if let Some(png) = Png::of(&bytes) {
            self.file.image_png(tag, step, time, png);
            drawn.insert(step);
        }
    }
}

#[allow(clippy::cast_precision_loss)] // curves for people
fn points(row: &MetricsRow) -> Vec<(String, f64)> {
    let scalars = row.scalars.iter().map(|(name, value)| (Shown::new(name).tag(), value));
    let fixed = [
        ("throughput/images_per_second", Some(row.images_per_second)),
        (MARK, Some(f64::from(row.world_size))),
        ("gpu/memory_bytes", row.gpu_memory_bytes.map(|bytes| bytes as f64)),
        ("gpu/utilisation_percent", row.gpu_utilisation.map(f64::from)),
    ];
    let fixed = fixed.into_iter().filter_map(|(tag, value)| Some((tag.to_string(), value?)));
    let parts = row.profile.iter().flat_map(|(network, profile)| {
        let tag = move |part| format!("milliseconds_of_a_step/{network}_{part}");
        profile.parts().map(|(part, milliseconds)| (tag(part), milliseconds))
    });
    finite(scalars.chain(fixed).chain(parts))
}

fn finite(points: impl Iterator<Item = (String, f64)>) -> Vec<(String, f64)> {
    points.filter(|(_, value)| value.is_finite()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::metrics::{row_of, scored};
    use ganglion_proto::record::Profile;
    use std::collections::BTreeMap;

    /// Number of occurrences of each series and step in the event files of a run.
    pub(super) fn drawn(run: &Path) -> BTreeMap<(String, u64), u32> {
        let mut drawn = BTreeMap::new();
        TensorBoard::read_back(&run.join("tensorboard"), |step, tag| {
            *drawn.entry((tag.to_string(), step)).or_insert(0) += 1;
        })
        .unwrap();
        drawn
    }

    fn line(step: u64) -> Vec<u8> {
        let scalars = [("loss_generator", 0.5), ("kl", 2.0), ("setting_r1", 1.0)].into_iter().collect();
        MetricsRow { step, scalars, ..MetricsRow::default() }.line().into()
    }

    /// Invariant 1: records lost with an earlier process, torn records, and new ones.
    #[test]
    fn each_line_is_drawn_once_by_whoever_comes() {
        let run = tempfile::tempdir().unwrap();
        fs::create_dir(run.path().join("samples")).unwrap();
        let png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x03\0\0\0\x02\x08\0";
        fs::write(run.path().join("samples/step-00000002.png"), png).unwrap();
        let events = [
            r#"{"time":1.0,"kind":"samples","step":2,"file":"samples/step-00000002.png"}"#,
            r#"{"time":1.0,"kind":"samples","step":3,"file":"samples/../../outside.png"}"#,
            r#"{"time":1.0,"kind":"evaluation","step":2,"metrics":{"a":1.5,"b":null},"features":"f","seconds":1.0}"#,
        ];
        let tell = |steps: std::ops::RangeInclusive<u64>, curves: &Curves| {
            steps.for_each(|step| curves.row(&line(step)));
            events.iter().for_each(|event| curves.event(event.as_bytes()));
        };
        let dies = Curves::open(run.path()).unwrap();
        dies.row(&line(1));
        dies.flush().unwrap();
        tell(1..=4, &dies);
        // Two of its records reached the file, the second in part.
        let board = dies.lock();
        let file = fs::read_dir(run.path().join("tensorboard")).unwrap().next().unwrap().unwrap().path();
        let unwritten = board.file.unwritten();
        let mut content = fs::read(&file).unwrap();
        content.extend_from_slice(&unwritten[..unwritten.len() / 3]);
        fs::write(&file, content).unwrap();
        drop(board);
        std::mem::forget(dies);
        for _ in 0..2 {
            let next = Curves::open(run.path()).unwrap();
            tell(1..=5, &next);
            next.flush().unwrap();
        }
        let drawn = drawn(run.path());
        assert!(drawn.values().all(|count| *count == 1), "{drawn:?}");
        let of = |tag: &str| {
            drawn.keys().filter(|(known, _)| known == tag).map(|(_, step)| *step).collect::<Vec<_>>()
        };
        for tag in [MARK, "loss/generator", "scalar/kl", "setting/r1"] {
            assert_eq!(of(tag), [1, 2, 3, 4, 5], "{tag}");
        }
        assert_eq!((of(PICTURES), of("evaluation/a"), of("evaluation/b")), (vec![2], vec![2], vec![]));
    }

    #[test]
    fn a_row_shows_all_its_columns() {
        let profile = Profile { compute: 2.5, ..Profile::default() };
        let row = MetricsRow {
            profile: [("discriminator", profile), ("generator", profile)].into_iter().collect(),
            gpu_memory_bytes: Some(5),
            gpu_utilisation: Some(97),
            scalars: scored(0.75, 0.25),
            ..row_of(1)
        };
        let points = points(&row);
        assert_eq!(points.len(), 4 + 2 + 2 + 10);
        assert!(points.contains(&("milliseconds_of_a_step/generator_compute".to_string(), 2.5)));
        assert!(points.contains(&("gpu/utilisation_percent".to_string(), 97.0)));
    }
}
