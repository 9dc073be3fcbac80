//! An objective with the layouts that follow from it.

use std::borrow::Cow;
use std::sync::Arc;

use ganglion_membership::{Position, StepShape};
use ganglion_proto::job::{Job, Precision};
use ganglion_storage::Storage;
use tch::{Device, Tensor};

use super::{
    Evaluator, GradLayout, NetworkId, Objective, Phase, Reads, ScalarRole, ScalarSpec, Setting, Unsuitable,
    checks,
};
use crate::checkpoint::{Files, WeightsFile, file_count};
use crate::nn::{Init, TensorSpec};
use crate::state::{State, StateLayout};

/// Name of the norm of a gradient among the scalars of a row; that of a phase behind it, where there are several.
const NORM: &str = "gradient_norm";

/// An objective, and what follows from it for a run: layouts in memory, names, counts.
pub struct Model {
    /// The objective.
    pub objective: Arc<dyn Objective>,
    /// Layout of the state.
    pub layout: StateLayout,
    weights: Option<WeightsFile>,
    phases: Vec<Phase>,
    /// Names of the phases.
    names: Vec<String>,
    shape: StepShape,
    /// Layouts of gradients, by phase.
    gradients: Vec<GradLayout>,
    /// Reduce of a step in which a phase does not run: its index, and its empty layout.
    idle: (usize, GradLayout),
    /// Layouts that reduces have room for; and for each phase which of them it needs.
    reduces: Vec<GradLayout>,
    reduce_of: Vec<usize>,
    reported: Vec<Cow<'static, str>>,
    kept: Vec<Kept>,
}

/// Scalars of a phase that does not run in every step. The state keeps their newest means in a tensor, so that
/// a row has them whoever reports it, also after a checkpoint.
struct Kept {
    phase: u32,
    /// Index of the tensor among the objective's own.
    tensor: usize,
}

impl Model {
    /// Lays an objective out, for passes of a precision.
    ///
    /// # Errors
    /// Phases do not make a step, or names are not those of scalars, phases or tensors.
    pub fn new(objective: Arc<dyn Objective>, precision: Precision) -> Result<Model, Unsuitable> {
        let phases = objective.phases();
        let shape = checks::shape(&phases)?;
        let names: Vec<String> =
            phases.iter().map(|phase| objective.phase_name(*phase).into_owned()).collect();
        checks::phase_names(&names, |index| phases[index].every > 1)?;
        let mut own = objective.own_tensors();
        let mut kept = Vec::new();
        for (phase, name) in phases.iter().zip(&names).filter(|(phase, _)| phase.every > 1) {
            let scalars = scalars_of(&*objective, *phase, &names)?;
            let count = i64::try_from(scalars.len()).expect("few scalars");
            kept.push(Kept { phase: phase.index, tensor: own.len() });
            own.push(TensorSpec::parameter(format!("scalars.{name}"), &[count], Init::Constant(0.0)));
        }
        let networks = objective.networks();
        let moments = checks::moments(&*objective, &networks, &phases)?;
        let layout = StateLayout::with_moments(&networks, &moments, &own, precision);
        checks::tensor_names(&layout)?;
        let weights = objective.weights_file();
        let (gradients, reduces, reduce_of, reported) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let idle = (0, GradLayout::default());
        let mut model = Model {
            objective,
            layout,
            weights,
            phases,
            names,
            shape,
            gradients,
            idle,
            reduces,
            reduce_of,
            reported,
            kept,
        };
        for phase in model.phases.clone() {
            let gradient = model.gradient_of(phase)?;
            let reduce = model.room_for(&gradient);
            model.reduce_of.push(reduce);
            model.gradients.push(gradient);
        }
        if !model.kept.is_empty() {
            model.idle.0 = model.room_for(&GradLayout::default());
        }
        // In this order: losses are the first columns of a row.
        for role in [ScalarRole::Loss, ScalarRole::Diagnostic, ScalarRole::Norm] {
            model.name_scalars(role);
        }
        let settings: Vec<String> = model.objective.settings().iter().map(Setting::column).collect();
        // Before training: a row that cannot be written would show only at the first report.
        checks::scalars(model.reported.iter().map(AsRef::as_ref).chain(settings.iter().map(String::as_str)))?;
        checks::evaluated(&model.objective.evaluator().map(Evaluator::scalars).unwrap_or_default())?;
        Ok(model)
    }

    /// Lays the gradients of a phase out.
    fn gradient_of(&self, phase: Phase) -> Result<GradLayout, Unsuitable> {
        let objective = &*self.objective;
        let (passes, scalars) = (objective.passes(phase), scalars_of(objective, phase, &self.names)?);
        Ok(GradLayout::new(&self.layout, phase.updates, &objective.follows(phase), passes, scalars))
    }

    /// Index of the layout of a reduce that has room for a gradient; it is added or extended if need be.
    fn room_for(&mut self, gradient: &GradLayout) -> usize {
        // Phases of the same networks share the buffers of a reduce, which saves memory.
        let known = self.reduces.iter().position(|known| known.is_alike(gradient));
        let index = known.unwrap_or(self.reduces.len());
        match self.reduces.get_mut(index) {
            Some(known) if known.len() < gradient.len() => *known = gradient.clone(),
            Some(_) => {}
            None => self.reduces.push(gradient.clone()),
        }
        index
    }

    /// Adds the names of the scalars of a role.
    fn name_scalars(&mut self, role: ScalarRole) {
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

    /// Layouts that the reduces of a step need room for, each once.
    pub fn reduces(&self) -> &[GradLayout] {
        &self.reduces
    }

    /// Index among [`reduces`](Self::reduces) of a phase in a step, and the layout of what it reduces: nothing
    /// where the phase does not run.
    pub fn reduce_of(&self, phase: Phase, step: u64) -> (usize, &GradLayout) {
        if phase.runs_in(step) {
            return (self.reduce_of[phase.index as usize], self.gradient(phase));
        }
        (self.idle.0, &self.idle.1)
    }

    /// Layout of a phase's gradients.
    pub fn gradient(&self, phase: Phase) -> &GradLayout {
        &self.gradients[phase.index as usize]
    }

    /// Name of a phase.
    pub fn name(&self, phase: Phase) -> &str {
        &self.names[phase.index as usize]
    }

    /// Names of the phases, each once, in the order of a step.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for name in &self.names {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        names
    }

    /// Number of updates of a network before a phase of a step.
    pub fn updates_before(&self, steps: u64, phase: Phase, network: NetworkId) -> u64 {
        // Adam counts the updates of one network, of which a step may have several, and some steps fewer.
        let updating = self.phases.iter().filter(|other| other.updates.contains(network));
        let updates = updating.map(|other| {
            let in_steps = steps.div_ceil(u64::from(other.every));
            in_steps + u64::from(other.index < phase.index && other.runs_in(steps))
        });
        updates.sum()
    }

    /// Keeps the means of a phase's scalars in the state, if the phase does not run in every step.
    pub fn keep_scalars(&self, phase: Phase, means: &Tensor, state: &State) {
        if let Some(kept) = self.kept.iter().find(|kept| kept.phase == phase.index) {
            state.own(kept.tensor).copy_(means);
        }
    }

    /// The scalars that a state keeps, by their places among the reported ones.
    pub fn kept_scalars(&self, state: &State) -> Vec<(usize, f64)> {
        let mut values = Vec::new();
        for kept in &self.kept {
            let phase = self.phases[kept.phase as usize];
            let means = state.own(kept.tensor).to_device(Device::Cpu);
            let means = Vec::<f32>::try_from(means).expect("floats on the CPU");
            for (scalar, mean) in self.gradient(phase).scalars().iter().zip(means) {
                let place = self.reported.iter().position(|name| *name == scalar.name);
                // A phase of every step that reports a scalar of the same name has newer values.
                values.extend(
                    place.filter(|_| self.is_kept(&scalar.name)).map(|place| (place, f64::from(mean))),
                );
            }
        }
        values
    }

    fn is_kept(&self, name: &str) -> bool {
        let mut of_every_step = self.phases.iter().filter(|phase| phase.every == 1);
        !of_every_step.any(|phase| self.gradient(*phase).scalars().iter().any(|scalar| scalar.name == name))
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

    /// Place of the newest batch that a step has read once a phase has its samples.
    pub fn newest_batch(&self, phase: Phase) -> u32 {
        self.batches_before(phase.index + 1).saturating_sub(1)
    }

    fn batches_before(&self, index: u32) -> u32 {
        u32::try_from(self.shape.batches_of(index.into())).expect("a step has few phases")
    }

    /// The first phase from phase `index` on that reads samples in a step.
    pub fn next_reader(&self, step: u64, index: u32) -> Option<Phase> {
        let mut phases = self.phases[index as usize..].iter().copied();
        phases.find(|phase| phase.reads != Reads::Nothing && phase.runs_in(step))
    }
}

/// Scalars of a phase's gradients: the objective's, and the norm if the phase clips.
fn scalars_of(
    objective: &dyn Objective,
    phase: Phase,
    names: &[String],
) -> Result<Vec<ScalarSpec>, Unsuitable> {
    let mut scalars = objective.scalars(phase);
    if objective.optimizer(phase, 0).clip_norm.is_none() {
        return Ok(scalars);
    }
    let own = &names[phase.index as usize];
    // With one name there is nothing to tell apart.
    let name = if names.iter().all(|name| name == own) { NORM.to_string() } else { format!("{NORM}_{own}") };
    // In a row they would be one.
    if scalars.iter().any(|scalar| scalar.name == name) {
        return Err(Unsuitable(format!(
            "the objective has a scalar {name}, as the norm of gradients that are clipped is called; rename it"
        )));
    }
    scalars.push(ScalarSpec::new(name, ScalarRole::Norm));
    Ok(scalars)
}
