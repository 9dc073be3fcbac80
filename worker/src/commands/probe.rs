//! Subcommand `worker probe`: the gradients of a job on a device, beside those on the CPU.

use std::fmt::Write as _;

use clap::Args;
use ganglion_proto::job::{Job, Precision};
use ganglion_proto::out;
use ganglion_proto::progress::Progress;
use ganglion_storage::run::RunName;
use serde::Serialize;
use serde_json::json;
use tch::{Device, Tensor};

use crate::commands::error::Failure;
use crate::commands::restored::Chosen;
use crate::data::DataSet;
use crate::device::{self, DeviceChoice};
use crate::engine::passport::{each_phase, stand_ins};
use crate::nn::tensor_bytes::to_bytes;
use crate::objective::{self, Model};
use crate::state::narrow;

/// Times that each phase is computed on the device; the first are no measure of its speed.
const TIMES: usize = 10;
const WARM_UP: usize = 3;

/// Arguments of `worker probe`.
#[derive(Args)]
pub(crate) struct Probe {
    /// The run whose job is computed: its folder, or its name in runs/; by default the newest in runs/.
    #[arg(value_name = "RUN")]
    run: Option<RunName>,
    /// Device to compare with the CPU: cpu, cuda:N for GPU N, or auto for a GPU if there is one.
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A phase on a device.
#[derive(Serialize)]
struct Measured {
    phase: String,
    /// Distance of its gradient from that of the CPU in fp32, relative to the latter's length.
    gradient: f64,
    /// Largest relative error of a loss.
    losses: f64,
    /// Whether each computation gave the same bits.
    repeats: bool,
    /// Median time, in milliseconds.
    milliseconds: f64,
}

/// Computes the gradient of each phase from the initial state, on substitutes for the samples of one shard.
///
/// # Errors
/// There is no such run or device, or the device gives other bits each time.
pub(crate) fn probe(arguments: &Probe) -> Result<(), Failure> {
    let progress = Progress::start("computing gradients");
    let device = arguments.device.resolve().map_err(Failure::Input)?;
    let chosen = Chosen::open(arguments.run.as_ref())?;
    let (job, data) = (&chosen.job, &chosen.data);
    crate::set_threads(job.job.threads);
    c10d::aten::set_deterministic(job.job.deterministic).map_err(Failure::other)?;
    device::set_tf32(device, job.job.tf32).map_err(Failure::other)?;
    let mut exact = job.clone();
    exact.job.precision = Precision::Fp32;
    let expected = gradients(&exact, data, Device::Cpu, 1)?;
    let found = gradients(job, data, device, TIMES)?;
    let rows: Vec<Measured> = expected.iter().zip(&found).map(|(cpu, here)| here.beside(cpu)).collect();
    drop(progress);
    let what = format!("{} samples of {} a shard, {}", job.job.shard_batch, data.shape(), precision(job));
    let name = device_name(device);
    let text = if arguments.json {
        format!("{:#}\n", json!({ "device": name, "precision": precision(job), "phases": rows }))
    } else {
        table(&format!("{what} on {name}, beside fp32 on the CPU"), &rows)
    };
    out::print(&text)?;
    match rows.iter().find(|row| !row.repeats) {
        None => Ok(()),
        Some(row) => Err(Failure::Other(format!("{} gives other bits each time on {name}", row.phase))),
    }
}

/// Gradient of a phase, computed some times.
struct Found {
    phase: String,
    /// Flat, on the CPU.
    gradient: Tensor,
    losses: Tensor,
    repeats: bool,
    seconds: Vec<f64>,
}

impl Found {
    fn beside(&self, expected: &Found) -> Measured {
        let length = |tensor: &Tensor| tensor.to_kind(tch::Kind::Double).norm().double_value(&[]);
        let relative = (&self.losses - &expected.losses).abs() / expected.losses.abs().clamp_min(1e-6);
        let mut seconds = self.seconds.get(WARM_UP..).unwrap_or_default().to_vec();
        seconds.sort_by(f64::total_cmp);
        Measured {
            phase: self.phase.clone(),
            gradient: length(&(&self.gradient - &expected.gradient)) / length(&expected.gradient).max(1e-30),
            losses: relative.max().double_value(&[]),
            repeats: self.repeats,
            milliseconds: 1e3 * seconds.get(seconds.len() / 2).copied().unwrap_or_default(),
        }
    }
}

fn gradients(job: &Job, data: &DataSet, device: Device, times: usize) -> Result<Vec<Found>, Failure> {
    let objective = objective::make(job, data, device).map_err(Failure::input)?;
    let model = Model::new(objective, job.job.precision).map_err(Failure::input)?;
    let batch = stand_ins(job, job.job.shard_batch, data, device);
    let mut found: Vec<Found> = Vec::new();
    for time in 0..times {
        let mut at = 0;
        each_phase(&model, job.job.seed, &batch, device, |_, phase, computed, begun| {
            device::wait(device)?;
            let seconds = begun.elapsed().as_secs_f64();
            let (layout, flat) = (model.gradient(phase), computed.flat.to_device(Device::Cpu));
            if time == 0 {
                let (gradient, losses) =
                    (narrow(&flat, layout.gradient()).copy(), narrow(&flat, layout.losses()).copy());
                let phase = model.name(phase).to_string();
                found.push(Found { phase, gradient, losses, repeats: true, seconds: Vec::new() });
            }
            let known = &mut found[at];
            let gradient = to_bytes(&narrow(&flat, layout.gradient()));
            known.repeats &= gradient == to_bytes(&known.gradient);
            known.seconds.push(seconds);
            at += 1;
            Ok(())
        })
        .map_err(Failure::other)?;
    }
    Ok(found)
}

fn precision(job: &Job) -> &'static str {
    if job.job.precision == Precision::Bf16 { "bf16" } else { "fp32" }
}

fn device_name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".to_string(),
    }
}

fn table(about: &str, rows: &[Measured]) -> String {
    let width = rows.iter().map(|row| row.phase.len()).max().unwrap_or(0).max(5);
    let mut text = format!("{about}\n\n{:<width$}  gradient  losses    same bits  ms\n", "phase");
    for Measured { phase, gradient, losses, repeats, milliseconds } in rows {
        let repeats = if *repeats { "yes" } else { "no" };
        let _ = writeln!(
            text,
            "{phase:<width$}  {gradient:<8.1e}  {losses:<8.1e}  {repeats:<9}  {milliseconds:.3}"
        );
    }
    text
}
