//! State of training: one flat buffer of f32, and three counters.
//!
//! 1. Nothing in the state depends on the cluster: it is a function of the job, the data and the update
//!    index.
//! 2. Each tensor starts on a 64-byte boundary of the buffer. The gaps hold +0.0 for ever, and no
//!    reader sees them.
//! 3. [`crate::engine::commit`] is the only writer while a run trains.
//! 4. Passes compute with a function of the state: its parameters, or their cast to the job's precision,
//!    which is made anew whenever they change.
//!
//! The buffer holds, in this order: for each network the parameters, the buffers (such as batch
//! normalisation's) and what its optimizer keeps, such as Adam's two moments; then the moving averages of networks' parameters and buffers;
//! then the objective's own tensors.

use std::borrow::Cow;
use std::ops::Range;

use ganglion_membership::Position;
use ganglion_proto::NETWORKS;
use ganglion_proto::job::Precision;
use tch::{Device, Kind, Tensor, no_grad};

use crate::nn::{Init, TensorSpec};
use crate::random::{Key, Purpose, Stream};

/// Number of floats in 64 bytes: the grid on which tensors, chunks and optimizer slices lie.
pub const ALIGNMENT: usize = 16;

/// Rounds a number of floats up to the grid.
pub fn align(numel: usize) -> usize {
    numel.next_multiple_of(ALIGNMENT)
}

/// Index of a network among those of the objective.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetworkId(pub usize);

/// Set of an objective's networks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetworkSet(u64);

impl NetworkSet {
    /// The set of these networks.
    ///
    /// # Panics
    /// A network's index is [`NETWORKS`] or more.
    pub fn of(networks: impl IntoIterator<Item = NetworkId>) -> NetworkSet {
        let add = |set: u64, NetworkId(index): NetworkId| {
            assert!(index < NETWORKS, "an objective has at most {NETWORKS} networks");
            set | 1 << index
        };
        NetworkSet(networks.into_iter().fold(0, add))
    }

    /// Whether a network belongs to the set.
    pub fn contains(self, NetworkId(index): NetworkId) -> bool {
        index < NETWORKS && self.0 >> index & 1 == 1
    }

    /// The networks, in ascending order.
    pub fn iter(self) -> impl Iterator<Item = NetworkId> {
        (0..NETWORKS).map(NetworkId).filter(move |network| self.contains(*network))
    }

    /// The first network.
    pub fn first(self) -> Option<NetworkId> {
        self.iter().next()
    }
}

/// Index of a buffer of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferId {
    /// The network.
    pub network: NetworkId,
    /// Index among the network's buffers.
    pub index: usize,
}

/// Tensors of a network, with its name.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedNetwork {
    /// Name in messages and files.
    pub name: Cow<'static, str>,
    /// Trained tensors, in order.
    pub parameters: Vec<TensorSpec>,
    /// Tensors that follow the batches without being trained, in order.
    pub buffers: Vec<TensorSpec>,
    /// Name in files of the moving average of both, for a network that has one.
    pub average: Option<Cow<'static, str>>,
}

/// Tensors that an optimizer keeps for each parameter of a network. All begin as zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moments {
    /// None.
    None,
    /// The momentum of stochastic gradient descent.
    Momentum,
    /// Adam's first and second moments.
    #[default]
    Adam,
}

impl Moments {
    /// Names in files.
    fn names(self) -> &'static [&'static str] {
        match self {
            Moments::None => &[],
            Moments::Momentum => &["momentum_buffer"],
            Moments::Adam => &["exp_avg", "exp_avg_sq"],
        }
    }
}

/// Offsets of tensors in a flat buffer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Layout {
    entries: Vec<(TensorSpec, usize)>,
    len: usize,
}

impl Layout {
    /// Lays tensors out one after the other.
    pub fn new(specs: Vec<TensorSpec>) -> Layout {
        let mut len = 0;
        let place = |spec: TensorSpec| {
            let offset = len;
            len += align(spec.numel());
            (spec, offset)
        };
        let entries = specs.into_iter().map(place).collect();
        Layout { entries, len }
    }

    /// Floats in all, gaps included: a multiple of [`ALIGNMENT`].
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// A tensor and its offset in floats.
    pub fn entry(&self, index: usize) -> (&TensorSpec, usize) {
        let (spec, offset) = &self.entries[index];
        (spec, *offset)
    }

    /// Each tensor and its offset in floats.
    pub fn entries(&self) -> impl Iterator<Item = (&TensorSpec, usize)> {
        self.entries.iter().map(|(spec, offset)| (spec, *offset))
    }

    /// Ranges of the tensors that decay, or of those that do not, with the gaps behind them. Neighbours are one
    /// range.
    pub fn by_decay(&self, decays: bool) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for (spec, offset) in self.entries().filter(|(spec, _)| spec.decays == decays) {
            let end = offset + align(spec.numel());
            match ranges.last_mut() {
                Some(last) if last.end == offset => last.end = end,
                _ => ranges.push(offset..end),
            }
        }
        ranges
    }

    /// Returns the tensors as views of `flat`.
    pub fn views(&self, flat: &Tensor) -> Vec<Tensor> {
        let view = |(spec, offset): &(TensorSpec, usize)| {
            narrow(flat, *offset..*offset + spec.numel()).view(spec.shape.as_slice())
        };
        self.entries.iter().map(view).collect()
    }
}

/// Returns a view of the elements `range` of a flat tensor.
pub fn narrow(flat: &Tensor, range: Range<usize>) -> Tensor {
    let signed = |n: usize| i64::try_from(n).expect("a tensor has fewer than 2^63 elements");
    flat.narrow(0, signed(range.start), signed(range.len()))
}

/// Offsets of one network's sections in the state's buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct Sections {
    /// Name of the network.
    pub name: Cow<'static, str>,
    /// Layout of the parameters within their section.
    pub parameters: Layout,
    /// Layout of the buffers within their section.
    pub buffers: Layout,
    start: usize,
    moments: Moments,
    /// Name and start of the moving average of parameters and buffers.
    average: Option<(Cow<'static, str>, usize)>,
}

impl Sections {
    fn new(network: &NamedNetwork, moments: Moments, start: usize) -> Sections {
        Sections {
            name: network.name.clone(),
            parameters: Layout::new(network.parameters.clone()),
            buffers: Layout::new(network.buffers.clone()),
            start,
            moments,
            average: None,
        }
    }

    /// Range of the parameters in the state's buffer.
    pub fn parameter_range(&self) -> Range<usize> {
        self.start..self.start + self.parameters.len()
    }

    /// Range of the buffers, directly behind the parameters.
    pub fn buffer_range(&self) -> Range<usize> {
        let start = self.parameter_range().end;
        start..start + self.buffers.len()
    }

    /// Range of parameters and buffers together: everything that a forward pass reads.
    pub fn weight_range(&self) -> Range<usize> {
        self.start..self.buffer_range().end
    }

    /// Returns parameters and buffers as views of a flat tensor that holds both, like
    /// [`Sections::weight_range`].
    pub fn views(&self, weights: &Tensor) -> (Vec<Tensor>, Vec<Tensor>) {
        let (parameters, buffers) = (self.parameters.len(), self.buffers.len());
        (
            self.parameters.views(&narrow(weights, 0..parameters)),
            self.buffers.views(&narrow(weights, parameters..parameters + buffers)),
        )
    }

    /// Range of the moving average: of the parameters, then of the buffers.
    pub fn average_range(&self) -> Option<Range<usize>> {
        self.average.as_ref().map(|(_, start)| *start..*start + self.weight_range().len())
    }

    /// Range of a moment, by its number among those that the optimizer keeps.
    ///
    /// # Panics
    /// The optimizer keeps fewer.
    pub fn moment_range(&self, index: usize) -> Range<usize> {
        assert!(index < self.moments.names().len(), "{} keeps {:?}", self.name, self.moments);
        let start = self.buffer_range().end + index * self.parameters.len();
        start..start + self.parameters.len()
    }

    /// End of all that belongs to the network, but for its average.
    fn end(&self) -> usize {
        self.buffer_range().end + self.moments.names().len() * self.parameters.len()
    }
}

/// A tensor of the state by its name in checkpoints.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedTensor {
    /// Name in checkpoints.
    pub name: String,
    /// Dimensions.
    pub shape: Vec<i64>,
    /// Range of its elements in the state's buffer.
    pub range: Range<usize>,
}

/// Layout of a whole state.
#[derive(Clone, Debug, PartialEq)]
pub struct StateLayout {
    networks: Vec<Sections>,
    /// Layout of the objective's own tensors within their section, and its start.
    own: (Layout, usize),
    /// Number of floats in the buffer.
    pub len: usize,
    /// Precision in which passes compute.
    pub precision: Precision,
}

impl StateLayout {
    /// Lays out these networks for Adam, then the objective's `own` tensors.
    pub fn new(networks: &[NamedNetwork], own: &[TensorSpec], precision: Precision) -> StateLayout {
        StateLayout::with_moments(networks, &vec![Moments::Adam; networks.len()], own, precision)
    }

    /// Lays out these networks with the moments of each, then the objective's `own` tensors.
    pub fn with_moments(
        networks: &[NamedNetwork],
        moments: &[Moments],
        own: &[TensorSpec],
        precision: Precision,
    ) -> StateLayout {
        let mut len = 0;
        let mut sections = Vec::with_capacity(networks.len());
        for (network, moments) in networks.iter().zip(moments) {
            let placed = Sections::new(network, *moments, len);
            len = placed.end();
            sections.push(placed);
        }
        for (placed, network) in sections.iter_mut().zip(networks) {
            placed.average = network.average.clone().map(|name| (name, len));
            len += placed.average_range().map_or(0, |range| range.len());
        }
        let own = (Layout::new(own.to_vec()), len);
        len += own.0.len();
        StateLayout { networks: sections, own, len, precision }
    }

    /// Sections of all networks, in order.
    pub fn networks(&self) -> &[Sections] {
        &self.networks
    }

    /// Sections of one network.
    pub fn network(&self, network: NetworkId) -> &Sections {
        &self.networks[network.0]
    }

    /// Returns every tensor of the buffer by name, in the order of the buffer.
    pub fn tensors(&self) -> Vec<NamedTensor> {
        let mut tensors = Vec::new();
        let mut add = |prefix: &str, layout: &Layout, start: usize| {
            tensors.extend(layout.entries().map(|(spec, offset)| NamedTensor {
                name: format!("{prefix}{}", spec.name),
                shape: spec.shape.clone(),
                range: start + offset..start + offset + spec.numel(),
            }));
        };
        for network in &self.networks {
            let name = &network.name;
            add(&format!("{name}."), &network.parameters, network.parameter_range().start);
            add(&format!("{name}."), &network.buffers, network.buffer_range().start);
            for (index, kind) in network.moments.names().iter().enumerate() {
                let start = network.moment_range(index).start;
                add(&format!("optimizer.{name}.{kind}."), &network.parameters, start);
            }
        }
        for network in &self.networks {
            if let Some((name, start)) = &network.average {
                add(&format!("{name}."), &network.parameters, *start);
                add(&format!("{name}."), &network.buffers, start + network.parameters.len());
            }
        }
        add("", &self.own.0, self.own.1);
        tensors
    }

    /// Prefixes of the names of all weights: of the networks' tensors and of their averages.
    pub fn weight_prefixes(&self) -> Vec<String> {
        let averages = self.networks.iter().filter_map(|network| network.average.as_ref());
        let names = self.networks.iter().map(|network| &network.name).chain(averages.map(|(name, _)| name));
        names.map(|name| format!("{name}.")).collect()
    }
}

/// Integer state: update index, sample checksum, consecutive skips.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Update index: the number of committed phases.
    pub position: Position,
    /// Sample checksum: the sum mod 2^64 of the hashes of (place in the stream, sample) of every real
    /// sample committed.
    pub ledger: u64,
    /// Number of consecutive skipped phases up to here, whose reduced gradients were not finite.
    pub skipped: u64,
}

/// State at an update index.
pub struct State {
    /// Layout of `flat`.
    pub layout: StateLayout,
    /// The buffer, on the training device.
    pub flat: Tensor,
    /// Integer state.
    pub counters: Counters,
    networks: Vec<NetworkViews>,
}

struct NetworkViews {
    weights: Tensor,
    buffers: Vec<Tensor>,
    master: Vec<Tensor>,
    /// Parameters cast to the precision of passes; `None` for fp32.
    cast: Option<Tensor>,
    trainable: Vec<Tensor>,
    frozen: Vec<Tensor>,
}

impl NetworkViews {
    fn new(flat: &Tensor, sections: &Sections, precision: Precision) -> NetworkViews {
        // `data` gives each network a version counter of its own: a commit of one network does not
        // invalidate a graph that was built with the other.
        let weights = narrow(flat, sections.parameter_range()).data();
        let detached = |flat: &Tensor| -> Vec<Tensor> {
            sections.parameters.views(flat).into_iter().map(|view| view.detach()).collect()
        };
        let cast = (precision == Precision::Bf16).then(|| weights.to_kind(Kind::BFloat16));
        let computed_with = || -> Vec<Tensor> {
            let Some(cast) = &cast else { return detached(&weights) };
            let pairs = detached(&weights).into_iter().zip(detached(cast));
            let choose =
                |((spec, _), (exact, cast)): ((&TensorSpec, usize), _)| if spec.exact { exact } else { cast };
            sections.parameters.entries().zip(pairs).map(choose).collect()
        };
        let leaves =
            |views: Vec<Tensor>| views.into_iter().map(|view| view.set_requires_grad(true)).collect();
        NetworkViews {
            master: leaves(detached(&weights)),
            trainable: leaves(computed_with()),
            frozen: computed_with(),
            buffers: sections.buffers.views(&narrow(flat, sections.buffer_range()).data()),
            weights,
            cast,
        }
    }
}

impl State {
    /// Returns a state of zeros, to be filled.
    pub fn zeros(layout: StateLayout, device: Device) -> State {
        let len = i64::try_from(layout.len).expect("a state has fewer than 2^63 floats");
        let flat = Tensor::zeros([len], (Kind::Float, device));
        let views = |sections: &Sections| NetworkViews::new(&flat, sections, layout.precision);
        let networks = layout.networks.iter().map(views).collect();
        State { layout, flat, counters: Counters::default(), networks }
    }

    /// Returns the state at update index 0: weights drawn from the seed, each average equal to its
    /// network.
    pub fn initial(layout: StateLayout, seed: u64, device: Device) -> State {
        State::drawn(layout, seed, device, usize::MAX)
    }

    /// Returns a state like the initial one that takes less time: each tensor repeats the first numbers that
    /// are drawn for it.
    pub fn stand_in(layout: StateLayout, seed: u64, device: Device) -> State {
        // A prime: rows of a matrix repeat no other row.
        State::drawn(layout, seed, device, 65_521)
    }

    /// Returns a state whose tensors have this many drawn numbers at most, and then the same again.
    fn drawn(layout: StateLayout, seed: u64, device: Device, most: usize) -> State {
        let state = State::zeros(layout, device);
        for (phase, sections) in (0..).zip(&state.layout.networks) {
            let weights = sections.weight_range();
            let specs = sections
                .parameters
                .entries()
                .chain(sections.buffers.entries().map(|(s, offset)| (s, sections.parameters.len() + offset)));
            for (shard, (spec, offset)) in (0..).zip(specs) {
                let key = Key { seed, step: 0, phase, shard, purpose: Purpose::Weights };
                let start = weights.start + offset;
                draw(&narrow(&state.flat, start..start + spec.numel()), key, spec, most);
            }
            if let Some(average) = sections.average_range() {
                narrow(&state.flat, average).copy_(&narrow(&state.flat, weights));
            }
        }
        let phase = u32::try_from(state.layout.networks.len()).expect("a few networks");
        for (shard, (spec, offset)) in (0..).zip(state.layout.own.0.entries()) {
            let key = Key { seed, step: 0, phase, shard, purpose: Purpose::Weights };
            let start = state.layout.own.1 + offset;
            draw(&narrow(&state.flat, start..start + spec.numel()), key, spec, most);
        }
        state.cast();
        state
    }

    /// Tensor `index` of the objective's own.
    pub fn own(&self, index: usize) -> Tensor {
        let (layout, start) = &self.layout.own;
        let (spec, offset) = layout.entries().nth(index).expect("an objective asks for what it declared");
        let range = start + offset..start + offset + spec.numel();
        narrow(&self.flat, range).view(spec.shape.as_slice())
    }

    /// A network's parameters as autograd's leaves, in the precision of passes.
    pub fn trainable(&self, network: NetworkId) -> &[Tensor] {
        &self.networks[network.0].trainable
    }

    /// A network's parameters as constants: a backward pass computes no gradient for them.
    pub fn frozen(&self, network: NetworkId) -> &[Tensor] {
        &self.networks[network.0].frozen
    }

    /// A network's parameters in fp32, as autograd's leaves.
    pub fn master(&self, network: NetworkId) -> &[Tensor] {
        &self.networks[network.0].master
    }

    /// Buffers of a network.
    pub fn buffers(&self, network: NetworkId) -> &[Tensor] {
        &self.networks[network.0].buffers
    }

    /// Casts all parameters to the precision of passes. Call it after the buffer was written as a whole.
    pub fn cast(&self) {
        (0..self.networks.len()).for_each(|network| self.cast_network(NetworkId(network)));
    }

    /// Casts a network's parameters to the precision of passes. Call it after they changed.
    pub fn cast_network(&self, network: NetworkId) {
        let views = &self.networks[network.0];
        if let Some(cast) = &views.cast {
            no_grad(|| cast.shallow_clone().copy_(&views.weights));
        }
    }

    /// A network's parameters, flat.
    pub fn parameters(&self, network: NetworkId) -> &Tensor {
        &self.networks[network.0].weights
    }

    /// Returns a view of a part of the buffer.
    pub fn section(&self, range: Range<usize>) -> Tensor {
        narrow(&self.flat, range)
    }
}

/// Floats that are drawn at once: so few that they stay in the cache.
const PIECE: usize = 1 << 16;

/// Returns the initial values of a tensor, flat.
pub fn initial_values(key: Key, spec: &TensorSpec) -> Tensor {
    let numel = i64::try_from(spec.numel()).expect("fewer than 2^63");
    let values = Tensor::empty([numel], (Kind::Float, Device::Cpu));
    draw(&values, key, spec, usize::MAX);
    values
}

/// Writes the initial values of a tensor to its place, flat: so many drawn ones at most, again and again.
fn draw(place: &Tensor, key: Key, spec: &TensorSpec, most: usize) {
    let mut stream = key.stream();
    let mut fill = |next: &mut dyn FnMut(&mut Stream, usize) -> Tensor| {
        let end = spec.numel();
        let drawn = end.min(most);
        for start in (0..drawn).step_by(PIECE) {
            let piece = start..(start + PIECE).min(drawn);
            let values = next(&mut stream, piece.len());
            narrow(place, piece).copy_(&values);
        }
        for start in (drawn..end).step_by(most) {
            let again = start..end.min(start + most);
            narrow(place, again.clone()).copy_(&narrow(place, 0..again.len()));
        }
    };
    match &spec.init {
        Init::Constant(value) => drop(place.shallow_clone().fill_(f64::from(*value))),
        Init::Uniform { bound } => {
            fill(&mut |stream, count| Tensor::from_slice(&stream.uniform(-bound, *bound, count)));
        }
        Init::Normal { mean, deviation } => fill(&mut |stream, count| {
            Tensor::from_slice(&stream.normal(count)) * f64::from(*deviation) + f64::from(*mean)
        }),
        Init::Given(values) => place.shallow_clone().copy_(&Tensor::from_slice(values)),
    }
}

#[cfg(test)]
mod tests;
