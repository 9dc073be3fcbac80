//! An objective with the layouts that follow from it.

use std::borrow::Cow;
use std::sync::Arc;

use ganglion_membership::{Position, StepShape};
use ganglion_proto::PHASES;
use ganglion_proto::job::{Job, Precision};
use ganglion_proto::record::check_scalar;
use ganglion_storage::Storage;

use super::{GradLayout, Objective, Phase, Reads, ScalarRole, Setting, Unsuitable};
use crate::checkpoint::{Files, WeightsFile, file_count};
use crate::state::{State, StateLayout};

/// An objective, and what follows from it for a run: layouts in memory, names, counts.
pub struct Model {
    /// The objective.
    pub objective: Arc<dyn Objective>,
    /// Layout of the state.
    pub layout: StateLayout,
    weights: Option<WeightsFile>,
    phases: Vec<Phase>,
    shape: StepShape,
    /// Layouts of gradients, each once; and for each phase which of them it has.
    gradients: Vec<GradLayout>,
    layout_of: Vec<usize>,
    reported: Vec<Cow<'static, str>>,
}

impl Model {
    /// Lays an objective out, for passes of a precision.
    ///
    /// # Errors
    /// No phase reads samples, or a scalar has a name that no column of the metrics can have.
    pub fn new(objective: Arc<dyn Objective>, precision: Precision) -> Result<Model, Unsuitable> {
        let layout = StateLayout::new(&objective.networks(), &objective.own_tensors(), precision);
        let phases = objective.phases();
        let shape = shape(&phases)?;
        let weights = objective.weights_file();
        let (gradients, layout_of, reported) = (Vec::new(), Vec::new(), Vec::new());
        let mut model = Model { objective, layout, weights, phases, shape, gradients, layout_of, reported };
        for phase in model.phases.clone() {
            model.lay_out(phase);
        }
        // In this order: losses are the first columns of a row.
        for role in [ScalarRole::Loss, ScalarRole::Diagnostic] {
            model.name(role);
        }
        let settings: Vec<String> = model.objective.settings().iter().map(Setting::column).collect();
        // Before training: a row that cannot be written would show only at the first report.
        for name in model.reported.iter().map(AsRef::as_ref).chain(settings.iter().map(String::as_str)) {
            check_scalar(name).map_err(|error| Unsuitable(error.to_string()))?;
        }
        Ok(model)
    }

    /// Adds the layout of a phase's gradients.
    fn lay_out(&mut self, phase: Phase) {
        let network = self.layout.network(phase.network);
        let (parameters, buffers) = (network.parameters.clone(), network.buffers.clone());
        let (passes, scalars) = (self.objective.passes(phase), self.objective.scalars(phase));
        let gradient = GradLayout::of(parameters, buffers, passes, scalars);
        // Phases with equal layouts share their buffers, which saves memory.
        let known = self.gradients.iter().position(|known| *known == gradient);
        self.layout_of.push(known.unwrap_or(self.gradients.len()));
        if known.is_none() {
            self.gradients.push(gradient);
        }
    }

    /// Adds the names of the scalars of a role.
    fn name(&mut self, role: ScalarRole) {
        let scalars = self.gradients.iter().flat_map(GradLayout::scalars);
        for scalar in scalars.filter(|scalar| scalar.role == role) {
            // The phases of one network report the same scalars; a row has each once.
            if !self.reported.contains(&scalar.name) {
                self.reported.push(scalar.name.clone());
            }
        }
    }

    /// Writer and reader of the files of checkpoints.
    pub fn files<'a>(&'a self, storage: &'a Storage, data_shards: u32) -> Files<'a> {
        Files { storage, data_shards, layout: &self.layout, weights: self.weights.as_ref() }
    }

    /// Number of files of a checkpoint.
    pub fn file_count(&self, data_shards: u32) -> usize {
        file_count(&self.layout, self.weights.as_ref(), data_shards)
    }

    /// The updates of every step, in order.
    pub fn phases(&self) -> &[Phase] {
        &self.phases
    }

    /// Shape of a step.
    pub fn shape(&self) -> &StepShape {
        &self.shape
    }

    /// The job, counting steps and samples as this objective does.
    pub fn counting(&self, job: Job) -> Job {
        Job { shape: Some(self.shape.clone()), ..job }
    }

    /// Number of whole steps before an update index, and the phase of the update.
    pub fn place(&self, position: Position) -> (u64, Phase) {
        let phase = usize::try_from(self.shape.phase(position)).expect("a step has few phases");
        (self.shape.steps(position), self.phases[phase])
    }

    /// Number of whole steps before an update index.
    pub fn steps(&self, position: Position) -> u64 {
        self.shape.steps(position)
    }

    /// Whether a phase is a step's last.
    pub fn is_last(&self, phase: Phase) -> bool {
        phase.index as usize + 1 == self.phases.len()
    }

    /// The layouts of gradients, each once.
    pub fn gradients(&self) -> &[GradLayout] {
        &self.gradients
    }

    /// Index of a phase's layout among [`gradients`](Self::gradients).
    pub fn layout_of(&self, phase: Phase) -> usize {
        self.layout_of[phase.index as usize]
    }

    /// Layout of a phase's gradients.
    pub fn gradient(&self, phase: Phase) -> &GradLayout {
        &self.gradients[self.layout_of(phase)]
    }

    /// Name of the network that a phase updates.
    pub fn network(&self, phase: Phase) -> &str {
        &self.layout.network(phase.network).name
    }

    /// Number of updates of a phase's network before that phase of a step.
    pub fn updates_before(&self, steps: u64, phase: Phase) -> u64 {
        // Adam counts the updates of one network, of which a step may have several.
        let count = |phases: &[Phase]| phases.iter().filter(|other| other.network == phase.network).count();
        steps * count(&self.phases) as u64 + count(&self.phases[..phase.index as usize]) as u64
    }

    /// Names of the reported scalars, each once: losses, then diagnostics, in the order of a step.
    pub fn reported(&self) -> &[Cow<'static, str>] {
        &self.reported
    }

    /// Scalars of a row that a state has beside the reported ones: the settings that change over a run.
    pub fn settings(&self, state: &State) -> Vec<(String, f64)> {
        let steps = self.steps(state.counters.position);
        let value = |setting: &Setting<'_>| (setting.column(), (setting.value)(steps, state));
        self.objective.settings().iter().map(value).collect()
    }

    /// Number of batches that a step reads.
    pub fn batches_per_step(&self) -> u32 {
        self.batches_before(u32::MAX)
    }

    /// Place of a phase's samples among the batches of a step.
    pub fn batch_of(&self, phase: Phase) -> u32 {
        let before = self.batches_before(phase.index);
        // The batch before: the newest that a phase of the step has read.
        if phase.reads == Reads::Same { before.saturating_sub(1) } else { before }
    }

    fn batches_before(&self, index: u32) -> u32 {
        u32::try_from(self.shape.batches_of(index.into())).expect("a step has few phases")
    }

    /// The first phase of a step from phase `index` on that reads samples.
    pub fn next_reader(&self, index: u32) -> Option<Phase> {
        self.phases[index as usize..].iter().copied().find(|phase| phase.reads != Reads::Nothing)
    }
}

/// Shape of steps with these phases.
fn shape(phases: &[Phase]) -> Result<StepShape, Unsuitable> {
    // Only these move the stream (D2).
    let readers = phases.iter().filter(|phase| phase.reads == Reads::Next).map(|phase| phase.index).collect();
    let count = u32::try_from(phases.len()).ok().filter(|count| *count <= PHASES);
    let shape = count.and_then(|count| StepShape::new(count, readers));
    shape.ok_or_else(|| {
        Unsuitable(format!(
            "a step of the objective needs 1 to {PHASES} phases with the indices 0, 1 and so on, of which one reads the \
             next samples"
        ))
    })
}
