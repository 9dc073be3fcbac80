//! Growth of the step time with a job and with the workers.

use ganglion_tests::measured::cores;

use crate::chart::{Axis, Line, Panel, Scale};
use crate::contenders;
use crate::figures::{Figures, Report, Rounds, Spread};
use crate::job::{Job, MLP};
use crate::options::Options;
use crate::table::Table;

const ROUNDS: usize = 3;
/// Job that all runs of this part are derived from.
const BASE: Job = Job { steps: 120, warm_up: 20, ..MLP };

/// Quantity that grows while everything else stays.
struct Growth {
    title: &'static str,
    /// Unit of the quantity.
    axis: &'static str,
    /// Scale of the step times.
    scale: Scale,
    /// Values of the quantity, and the job for each.
    jobs: Vec<(u32, Job)>,
}

fn growths() -> Vec<Growth> {
    let global_batch = 128;
    let with_shards = |data_shards: u32, workers: u32| {
        (data_shards, Job { workers, data_shards, shard_batch: global_batch / data_shards, ..BASE })
    };
    let width = |width| (parameters(width), Job { width, ..BASE });
    let batch = |shard_batch| (shard_batch, Job { shard_batch, ..BASE });
    let on = |workers| (workers, with_shards(8, workers).1);
    vec![
        Growth {
            title: "mlp-28 of width 64 to 1024, 1 worker, batch 64",
            axis: "parameters",
            scale: Scale::Log,
            jobs: [64, 128, 256, 512, 1024].map(width).to_vec(),
        },
        Growth {
            title: "mlp-28, 1 worker, 1 data shard",
            axis: "images a batch",
            scale: Scale::Log,
            jobs: [16, 32, 64, 128, 256, 512].map(batch).to_vec(),
        },
        Growth {
            title: "mlp-28, 1 worker, global batch 128",
            axis: "data shards",
            scale: Scale::Linear,
            jobs: [1, 2, 4, 8, 16].map(|shards| with_shards(shards, 1)).to_vec(),
        },
        Growth {
            title: "mlp-28, 8 data shards, global batch 128",
            axis: "workers",
            scale: Scale::Linear,
            jobs: [1, 2, 3, 4, 6, 8].map(on).to_vec(),
        },
    ]
}

/// Number of parameters of both networks of mlp-28 with the default noise of 100 numbers: weights
/// and biases of 100-w-w-784 and 784-w-w-1.
fn parameters(w: u32) -> u32 {
    let generator = (100 + 1) * w + (w + 1) * w + (w + 1) * 784;
    let discriminator = (784 + 1) * w + (w + 1) * w + (w + 1);
    generator + discriminator
}

impl Growth {
    /// Measures the milliseconds of a step for each job.
    fn measure(&self, place: &str, options: &Options) -> Result<Vec<Spread>, String> {
        let names: Vec<String> = self.jobs.iter().map(|(to, _)| format!("{to} {}", self.axis)).collect();
        let run = |job: usize| contenders::ours(&self.jobs[job].1.clone().asked(options));
        let rounds = Rounds::run(place, options.rounds(ROUNDS), &names, run)?;
        Ok((0..self.jobs.len()).map(|job| rounds.of(job, Figures::step)).collect())
    }

    fn panel(&self, times: &[Spread]) -> Panel {
        let at = |(to, _): &(u32, Job)| f64::from(*to);
        let whiskers = self.jobs.iter().zip(times).map(|(job, time)| (at(job), time.least, time.most));
        let is_oversubscribed = self.jobs.iter().any(|(_, job)| job.is_oversubscribed());
        Panel {
            title: self.title.to_string(),
            x: Axis {
                label: self.axis.to_string(),
                scale: Scale::Log,
                ticks: self.jobs.iter().map(at).collect(),
            },
            y: Axis { label: "ms a step".to_string(), scale: self.scale, ticks: Vec::new() },
            lines: vec![Line {
                label: String::new(),
                points: self.jobs.iter().zip(times).map(|(job, time)| (at(job), time.median)).collect(),
                has_dots: true,
            }],
            whiskers: whiskers.collect(),
            shaded: is_oversubscribed
                .then(|| (f64::from(cores()) + 0.5, format!("more workers than {} cores", cores()))),
        }
    }
}

/// Measures all quantities.
pub(crate) fn measure(options: &Options) -> Result<Report, String> {
    let growths = growths();
    let mut table = Table::new(&["what grows", "to", "ms a step", "least-most", "images/s"]);
    let mut panels = Vec::new();
    for (place, growth) in growths.iter().enumerate() {
        let times = growth.measure(&format!("growth {}/{}", place + 1, growths.len()), options)?;
        for (row, ((to, job), time)) in growth.jobs.iter().zip(&times).enumerate() {
            let what = if row == 0 { format!("{}: {}", growth.title, growth.axis) } else { String::new() };
            let mark = if job.is_oversubscribed() { " (oversubscribed)" } else { "" };
            table.row(vec![
                what,
                format!("{to}{mark}"),
                format!("{:.1}", time.median),
                format!("{:.1}-{:.1}", time.least, time.most),
                format!("{:.0}", job.images_per_second(time.median)),
            ]);
        }
        panels.push(growth.panel(&times));
    }
    Ok(Report { text: table.text(), panels, problems: Vec::new() })
}
