//! Comparison of training quality: losses of Ganglion and of the tuned program, on the same job.

use crate::chart::{Axis, Line, Panel, Scale};
use crate::contenders;
use crate::figures::{Report, Spread};
use crate::job::{Job, MLP, TRANSFORMER, VAE};
use crate::options::Options;
use crate::table::Table;

/// Number of steps whose mean is one point of a curve.
const WINDOW: usize = 25;
/// Number of the last steps, whose mean is in the table.
const LAST: usize = 100;

/// Trains with both programs.
pub(crate) fn measure(options: &Options) -> Result<Report, String> {
    let job = Job { steps: 1000, ..MLP }.asked(options);
    eprintln!("losses: {}, ours", job.name());
    let ours = contenders::ours(&job)?.losses;
    eprintln!("losses: {}, tuned DDP", job.name());
    let tuned = contenders::peer(&job, "tuned", &[], &options.python_path)?.losses;
    let mut table = Table::new(&[&format!("mean loss of the last {LAST} steps"), "ours", "tuned DDP"]);
    let mut panels = Vec::new();
    for (place, network) in ["discriminator", "generator"].into_iter().enumerate() {
        let [ours, tuned] = [&ours, &tuned].map(|losses| losses.iter().map(|pair| pair[place]).collect());
        let cells = [&ours, &tuned].map(|losses: &Vec<f64>| format!("{:.3}", mean_of_last(losses)));
        table.row([vec![network.to_string()], cells.to_vec()].concat());
        panels.push(panel(&job, network, [("ours", &ours), ("tuned DDP", &tuned)]));
    }
    let mut text = table.text();
    for (job, unit) in [(VAE, "nats an image"), (TRANSFORMER, "nats a token")] {
        let (more, drawn) = from_seeds(job, unit, options)?;
        text = format!("{text}\n{more}");
        panels.extend(drawn);
    }
    Ok(Report { text, panels, problems: Vec::new() })
}

/// Seeds of runs whose spread is told.
const SEEDS: [u64; 5] = [0, 1, 2, 3, 4];

/// Trains a model on two workers from several seeds, with both programs; returns a table, and the curves of
/// the first seed.
fn from_seeds(job: Job, unit: &str, options: &Options) -> Result<(String, Vec<Panel>), String> {
    let job = Job { steps: 1000, ..job.on(2) }.asked(options);
    let name = job.name();
    let mut all = [Vec::new(), Vec::new()];
    for seed in SEEDS {
        let job = Job { seed, ..job.clone() };
        eprintln!("losses: {name}, seed {seed}");
        all[0].push(contenders::ours(&job)?.losses);
        all[1].push(contenders::peer(&job, "tuned", &[], &options.python_path)?.losses);
    }
    let title = format!("{name}, {unit}: mean of the last {LAST} steps, from {} seeds", SEEDS.len());
    let mut table = Table::new(&[&title, "ours", "tuned DDP"]);
    let mut panels = Vec::new();
    let distinct = if job.losses[0] == job.losses[1] { 1 } else { 2 };
    for (place, loss) in job.losses.into_iter().take(distinct).enumerate() {
        let of = |losses: &Vec<[f64; 2]>| losses.iter().map(|pair| pair[place]).collect::<Vec<f64>>();
        let cells = all.iter().map(|runs| {
            let Spread { median, least, most } = Spread::of(runs.iter().map(|run| mean_of_last(&of(run))));
            format!("{median:.2} ({least:.2}-{most:.2})")
        });
        table.row(std::iter::once(loss.to_string()).chain(cells).collect());
        let [ours, tuned] = all.each_ref().map(|runs| of(&runs[0]));
        panels.push(panel(&job, loss, [("ours", &ours), ("tuned DDP", &tuned)]));
    }
    Ok((table.text(), panels))
}

fn mean_of_last(losses: &[f64]) -> f64 {
    mean(&losses[losses.len().saturating_sub(LAST)..])
}

#[allow(clippy::cast_precision_loss)] // a count of steps
fn mean(losses: &[f64]) -> f64 {
    losses.iter().sum::<f64>() / losses.len() as f64
}

fn panel(job: &Job, network: &str, curves: [(&str, &Vec<f64>); 2]) -> Panel {
    let line = |(label, losses): (&str, &Vec<f64>)| Line {
        label: label.to_string(),
        points: smooth(losses),
        has_dots: false,
    };
    Panel {
        title: format!("{}, {network}", job.name()),
        x: Axis { label: "step".to_string(), scale: Scale::Linear, ticks: Vec::new() },
        y: Axis { label: format!("loss, mean of {WINDOW} steps"), scale: Scale::Linear, ticks: Vec::new() },
        lines: curves.map(line).to_vec(),
        whiskers: Vec::new(),
        shaded: None,
    }
}

/// Returns the means of consecutive values, at the middle of each window.
#[allow(clippy::cast_precision_loss)] // a count of steps
fn smooth(losses: &[f64]) -> Vec<(f64, f64)> {
    let means = losses.windows(WINDOW).map(mean).enumerate();
    means.step_by(WINDOW / 5).map(|(from, mean)| ((from + 1) as f64 + WINDOW as f64 / 2.0, mean)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_of_one_value_stays_so_when_smoothed() {
        let points = smooth(&[0.5; 100]);
        assert!(points.iter().all(|point| point.1 == 0.5), "{points:?}");
        assert_eq!(points[0].0, 13.5);
        assert!(smooth(&[0.5; WINDOW - 1]).is_empty());
    }
}
