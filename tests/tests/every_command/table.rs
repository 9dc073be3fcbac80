//! The table of outcomes.

/// Condition under which a command runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    /// Run and output file are on a disk without a free byte.
    FullDisk,
    /// Standard output is `/dev/full`.
    FullOutput,
    /// The output file is a device that is full; if it writes none, its run is that device.
    Device,
    /// Nobody reads its standard output.
    ClosedPipe,
    /// The weights of the generator are not finite.
    NanWeights,
    /// A terminal with TERM=dumb.
    DumbTerminal,
    /// A terminal of 40 columns.
    Narrow,
    /// The run is an empty folder.
    NoRun,
    /// The run is finished and whole.
    Finished,
    /// Half of job.toml is lost.
    JobCut,
    /// Half of journal.sqlite is lost.
    JournalCut,
    /// Half of each file of the checkpoint is lost.
    CheckpointCut,
}

use Condition::{
    CheckpointCut, ClosedPipe, Device, DumbTerminal, Finished, FullDisk, FullOutput, JobCut, JournalCut,
    NanWeights, Narrow, NoRun,
};

/// All conditions, in the order of a row's cells.
pub(crate) const CONDITIONS: &[Condition] = &[
    FullDisk,
    FullOutput,
    Device,
    ClosedPipe,
    NanWeights,
    DumbTerminal,
    Narrow,
    NoRun,
    Finished,
    JobCut,
    JournalCut,
    CheckpointCut,
];

/// A command, and what it does under each condition.
pub(crate) struct Row {
    /// Name, as `--help` lists it.
    pub(crate) command: &'static str,
    /// Arguments. `{run}` is a finished run, `{asked}` one that goes on where its coordinator is to answer,
    /// `{out}` a file to write, which is there already, and `{new}` a place where nothing is.
    pub(crate) line: &'static str,
    /// Exit code of each condition, and texts that it prints, between bars; `-` where there is nothing to
    /// try.
    pub(crate) cells: &'static [(Condition, &'static str)],
}

impl Row {
    pub(crate) fn expected(&self, condition: Condition) -> &'static str {
        let found = self.cells.iter().find(|(known, _)| *known == condition);
        found.unwrap_or_else(|| panic!("{} has no cell for {condition:?}", self.command)).1
    }
}

const FULL: &str = "1 error: cannot write the output: no space left on device";
const CLOSED: &str = "141";

#[rustfmt::skip] // a line a cell
pub(crate) const ROWS: &[Row] = &[
    Row {
        command: "coordinator",
        line: "--run-dir {run} --workers 1 --set model.width=16 --set model.latent_dim=8 --set job.shard_batch=2 --set job.steps=2 --set job.data_shards=2",
        cells: &[
            (FullDisk, "1 journal.sqlite | full"),
            (FullOutput, FULL),
            (Device, "2 --run-dir"),
            (ClosedPipe, CLOSED),
            (NanWeights, "0 is finished"),
            (DumbTerminal, "0 is finished"),
            (Narrow, "0 is finished"),
            (NoRun, "0 is complete"),
            (Finished, "0 is finished"),
            (JobCut, "2 job.toml"),
            (JournalCut, "2 coordinator recover"),
            (CheckpointCut, "2 checkpoints are not there"),
        ],
    },
    Row {
        command: "coordinator audit",
        line: "audit {run}",
        cells: &[
            (FullDisk, "0 ok    "),
            (FullOutput, FULL),
            (Device, "2 no run is there"),
            (ClosedPipe, CLOSED),
            (NanWeights, "0 ok    "),
            (DumbTerminal, "0 ok    "),
            (Narrow, "0 ok    "),
            (NoRun, "2 no run is there"),
            (Finished, "0 ok    "),
            (JobCut, "2 job.toml"),
            (JournalCut, "2 journal.sqlite"),
            (CheckpointCut, "1 BREACH | error: 1 claim does not hold"),
        ],
    },
    Row {
        command: "coordinator status",
        line: "status {asked}",
        cells: &[
            (FullDisk, "0 it is complete"),
            (FullOutput, FULL),
            (Device, "2 give"),
            (ClosedPipe, CLOSED),
            (NanWeights, "0 it is complete"),
            (DumbTerminal, "0 generation 1"),
            (Narrow, "0 generation 1"),
            (NoRun, "2 give"),
            (Finished, "0 it is complete"),
            (JobCut, "2 job.toml"),
            (JournalCut, "2 journal.sqlite"),
            (CheckpointCut, "0 it is complete"),
        ],
    },
    Row {
        command: "coordinator runs",
        line: "runs {run}/..",
        cells: &[
            (FullDisk, "0 complete"),
            (FullOutput, FULL),
            (Device, "2 give"),
            (ClosedPipe, CLOSED),
            (NanWeights, "0 complete"),
            (DumbTerminal, "0 complete"),
            (Narrow, "0 complete"),
            (NoRun, "0 no runs in"),
            (Finished, "0 complete"),
            (JobCut, "0 unreadable | job.toml"),
            (JournalCut, "0 unreadable | journal.sqlite"),
            (CheckpointCut, "0 complete"),
        ],
    },
    Row {
        command: "coordinator checkpoints",
        line: "checkpoints {run} --verify",
        cells: &[
            (FullDisk, "0 whole"),
            (FullOutput, FULL),
            (Device, "2 give"),
            (ClosedPipe, CLOSED),
            (NanWeights, "0 whole"),
            (DumbTerminal, "0 whole"),
            (Narrow, "0 whole"),
            (NoRun, "2 give"),
            (Finished, "0 whole"),
            (JobCut, "2 job.toml"),
            (JournalCut, "0 whole"),
            (CheckpointCut, "1 error: damaged checkpoints"),
        ],
    },
    Row {
        command: "coordinator recover",
        line: "recover {run}",
        cells: &[
            (FullDisk, "1 journal.sqlite | full"),
            (FullOutput, FULL),
            (Device, "2 give"),
            (ClosedPipe, CLOSED),
            (NanWeights, "0"),
            (DumbTerminal, "0"),
            (Narrow, "0"),
            (NoRun, "2 give"),
            (Finished, "0"),
            (JobCut, "2 job.toml"),
            (JournalCut, "0"),
            (CheckpointCut, "0"),
        ],
    },
    Row {
        command: "coordinator data check",
        line: "data check --data folder:{pictures} --bad {out}",
        cells: &[
            (FullDisk, "1 No space left on device | --bad"),
            (FullOutput, FULL),
            (Device, "1 No space left on device | --bad"),
            (ClosedPipe, CLOSED),
            (NanWeights, "-"),
            (DumbTerminal, "2 error: 1 of 3 samples cannot be used"),
            (Narrow, "2 error: 1 of 3 samples cannot be used"),
            (NoRun, "-"),
            (Finished, "2 error: 1 of 3 samples cannot be used"),
            (JobCut, "-"),
            (JournalCut, "-"),
            (CheckpointCut, "-"),
        ],
    },
    Row {
        command: "coordinator certs init",
        line: "certs init --dir {new}",
        cells: &[
            (FullDisk, "1 No space left on device | --dir"),
            (FullOutput, FULL),
            (Device, "2 --dir"),
            (ClosedPipe, CLOSED),
            (NanWeights, "-"),
            (DumbTerminal, "0 made certificates"),
            (Narrow, "0 made certificates"),
            (NoRun, "-"),
            (Finished, "0 made certificates"),
            (JobCut, "-"),
            (JournalCut, "-"),
            (CheckpointCut, "-"),
        ],
    },
    Row {
        command: "coordinator drain",
        line: "drain {worker} {asked}",
        cells: &[
            (FullDisk, "1 no coordinator"),
            (FullOutput, FULL),
            (Device, "2 give"),
            (ClosedPipe, CLOSED),
            (NanWeights, "-"),
            (DumbTerminal, "2 no worker 99"),
            (Narrow, "2 no worker 99"),
            (NoRun, "2 give"),
            (Finished, "1 no coordinator"),
            (JobCut, "1 no coordinator"),
            (JournalCut, "1 no coordinator"),
            (CheckpointCut, "1 no coordinator"),
        ],
    },
    Row {
        command: "coordinator scale",
        line: "scale 2 {asked}",
        cells: &[
            (FullDisk, "1 no coordinator"),
            (FullOutput, FULL),
            (Device, "2 give"),
            (ClosedPipe, CLOSED),
            (NanWeights, "-"),
            (DumbTerminal, "0 2 workers"),
            (Narrow, "0 2 workers"),
            (NoRun, "2 give"),
            (Finished, "1 no coordinator"),
            (JobCut, "1 no coordinator"),
            (JournalCut, "1 no coordinator"),
            (CheckpointCut, "1 no coordinator"),
        ],
    },
    Row {
        command: "coordinator stop",
        line: "stop {asked}",
        cells: &[
            (FullDisk, "1 no coordinator"),
            (FullOutput, FULL),
            (Device, "2 give"),
            (ClosedPipe, CLOSED),
            (NanWeights, "-"),
            (DumbTerminal, "0 it is complete"),
            (Narrow, "0 it is complete"),
            (NoRun, "2 give"),
            (Finished, "1 no coordinator"),
            (JobCut, "1 no coordinator"),
            (JournalCut, "1 no coordinator"),
            (CheckpointCut, "1 no coordinator"),
        ],
    },
    Row {
        command: "coordinator completions",
        line: "completions bash",
        cells: &[
            (FullDisk, "-"),
            (FullOutput, FULL),
            (Device, "-"),
            (ClosedPipe, CLOSED),
            (NanWeights, "-"),
            (DumbTerminal, "0 _coordinator"),
            (Narrow, "0 _coordinator"),
            (NoRun, "-"),
            (Finished, "0 _coordinator"),
            (JobCut, "-"),
            (JournalCut, "-"),
            (CheckpointCut, "-"),
        ],
    },
    Row {
        command: "worker",
        line: "--coordinator {url}",
        cells: &[
            (FullDisk, "-"),
            (FullOutput, "0 connecting to the coordinator"),
            (Device, "-"),
            (ClosedPipe, "0 connecting to the coordinator"),
            (NanWeights, "-"),
            (DumbTerminal, "0 connecting to the coordinator"),
            (Narrow, "0 connecting to the coordinator"),
            (NoRun, "-"),
            (Finished, "0 connecting to the coordinator"),
            (JobCut, "-"),
            (JournalCut, "-"),
            (CheckpointCut, "-"),
        ],
    },
    Row {
        command: "worker sample",
        line: "sample {run} --count 10 --out {out}",
        cells: &[
            (FullDisk, "1 No space left on device | --out"),
            (FullOutput, FULL),
            (Device, "1 No space left on device | --out"),
            (ClosedPipe, CLOSED),
            (NanWeights, "2 not finite"),
            (DumbTerminal, "0 /out"),
            (Narrow, "0 /out"),
            (NoRun, "2 neither a run nor a checkpoint"),
            (Finished, "0 /out"),
            (JobCut, "2 job.toml"),
            (JournalCut, "0 /out"),
            (CheckpointCut, "2 generator_ema.safetensors"),
        ],
    },
    Row {
        command: "worker interpolate",
        line: "interpolate {run} --count 2 --points 2 --frames 2 --out {out}",
        cells: &[
            (FullDisk, "1 No space left on device | --out"),
            (FullOutput, FULL),
            (Device, "1 No space left on device | --out"),
            (ClosedPipe, CLOSED),
            (NanWeights, "2 not finite"),
            (DumbTerminal, "0 /out"),
            (Narrow, "0 /out"),
            (NoRun, "2 neither a run nor a checkpoint"),
            (Finished, "0 /out"),
            (JobCut, "2 job.toml"),
            (JournalCut, "0 /out"),
            (CheckpointCut, "2 generator_ema.safetensors"),
        ],
    },
    Row {
        command: "worker export",
        line: "export {run} --out {out}",
        cells: &[
            (FullDisk, "1 No space left on device | --out"),
            (FullOutput, FULL),
            (Device, "1 No space left on device | --out"),
            (ClosedPipe, CLOSED),
            (NanWeights, "2 not finite"),
            (DumbTerminal, "0 /out: noise"),
            (Narrow, "0 /out: noise"),
            (NoRun, "2 neither a run nor a checkpoint"),
            (Finished, "0 /out: noise"),
            (JobCut, "2 job.toml"),
            (JournalCut, "0 /out: noise"),
            (CheckpointCut, "2 generator_ema.safetensors"),
        ],
    },
    Row {
        command: "worker eval",
        line: "eval {run} --samples 80 --reference 80",
        cells: &[
            (FullDisk, "0 frechet_distance"),
            (FullOutput, FULL),
            (Device, "2 neither a run nor a checkpoint"),
            (ClosedPipe, CLOSED),
            (NanWeights, "2 not finite"),
            (DumbTerminal, "0 frechet_distance"),
            (Narrow, "0 frechet_distance"),
            (NoRun, "2 neither a run nor a checkpoint"),
            (Finished, "0 frechet_distance"),
            (JobCut, "2 job.toml"),
            (JournalCut, "0 frechet_distance"),
            (CheckpointCut, "2 generator_ema.safetensors"),
        ],
    },
    Row {
        command: "worker gpus",
        line: "gpus",
        cells: &[
            (FullDisk, "-"),
            (FullOutput, FULL),
            (Device, "-"),
            (ClosedPipe, CLOSED),
            (NanWeights, "-"),
            (DumbTerminal, "0"),
            (Narrow, "0"),
            (NoRun, "-"),
            (Finished, "0"),
            (JobCut, "-"),
            (JournalCut, "-"),
            (CheckpointCut, "-"),
        ],
    },
    Row {
        command: "worker probe",
        line: "probe {run} --device cpu",
        cells: &[
            (FullDisk, "0 same bits | yes"),
            (FullOutput, FULL),
            (Device, "2 no run is there"),
            (ClosedPipe, CLOSED),
            (NanWeights, "0 same bits | yes"),
            (DumbTerminal, "0 same bits | yes"),
            (Narrow, "0 same bits | yes"),
            (NoRun, "2 no run is there"),
            (Finished, "0 same bits | yes"),
            (JobCut, "2 job.toml"),
            (JournalCut, "0 same bits | yes"),
            (CheckpointCut, "0 same bits | yes"),
        ],
    },
    Row {
        command: "worker train-classifier",
        line: "train-classifier --images {images} --labels {labels} --epochs 1 --out {out}",
        cells: &[
            (FullDisk, "1 No space left on device | --out"),
            (FullOutput, FULL),
            (Device, "1 No space left on device | --out"),
            (ClosedPipe, CLOSED),
            (NanWeights, "-"),
            (DumbTerminal, "0 blake3"),
            (Narrow, "0 blake3"),
            (NoRun, "-"),
            (Finished, "0 blake3"),
            (JobCut, "-"),
            (JournalCut, "-"),
            (CheckpointCut, "-"),
        ],
    },
];
