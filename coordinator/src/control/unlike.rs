//! Refusal of a worker that would compute other bits than the run: what differs, and the way on from there.
//!
//! 1. Each cause is named with the value here and the value in the run; files by their names, where the run
//!    has a list of them.
//! 2. The advice is for what differs: it never says that the same command goes on where it cannot.

use std::collections::BTreeMap;

use ganglion_membership::{Difference, NUMERICS};
use ganglion_proto::job::exclude_argument;
use ganglion_proto::record::found::FileFound;
use ganglion_proto::words::{are, counted, listed_up_to, were};
use serde::{Deserialize, Serialize};

/// Most files of one kind that a message names.
const NAMED: usize = 5;
/// Most files that a command may leave out by name: a line that a shell takes, and a person reads.
const LEFT_OUT: usize = 20;
/// Items that are hashes of a computation: they differ because something else does.
const HASHES: [&str; 2] = ["hash_commit", "hash_forward_backward"];
/// Items about the samples.
const DATA: [&str; 2] = ["data", "data_names"];

/// Files of a data set with the hashes of their content, as the run began with them.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SampleFiles {
    /// Fingerprint of the data set that they make up.
    data: String,
    files: BTreeMap<String, String>,
}

/// Data set as a worker found it, and whether it is on the coordinator's machine.
#[derive(Debug, Default)]
pub(super) struct Newcomer {
    pub(super) samples: u64,
    pub(super) files: Vec<FileFound>,
    pub(super) is_local: bool,
}

/// Data set as the run has it.
#[derive(Debug, Default)]
pub(super) struct OfTheRun {
    pub(super) samples: Option<u64>,
    pub(super) files: Option<SampleFiles>,
    /// Whether its networks are from files of the user's.
    pub(super) has_modules: bool,
}

impl SampleFiles {
    pub(super) fn new(data: &str, files: &[FileFound]) -> SampleFiles {
        let files = files.iter().map(|file| (file.name.clone(), file.shown_hash())).collect();
        SampleFiles { data: data.to_owned(), files }
    }

    /// Whether these are the files of the data set with a fingerprint.
    pub(super) fn are_of(&self, data: &str) -> bool {
        self.data == data
    }
}

/// Files in which two data sets differ.
#[derive(Debug, Default, PartialEq, Eq)]
struct Changes<'a> {
    missing: Vec<&'a str>,
    changed: Vec<&'a str>,
    new: Vec<&'a str>,
}

impl<'a> Changes<'a> {
    fn between(run: &'a SampleFiles, here: &'a [FileFound]) -> Changes<'a> {
        let found: BTreeMap<&str, String> =
            here.iter().map(|file| (file.name.as_str(), file.shown_hash())).collect();
        let mut changes = Changes::default();
        for (name, hash) in &run.files {
            match found.get(name.as_str()) {
                None => changes.missing.push(name),
                Some(other) if other != hash => changes.changed.push(name),
                Some(_) => {}
            }
        }
        let is_new = |name: &&str| !run.files.contains_key(*name);
        changes.new = found.keys().copied().filter(is_new).collect();
        changes
    }

    fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.changed.is_empty() && self.new.is_empty()
    }

    fn describe(&self) -> String {
        let told = |names: &[&str], verb: &str, what: &str| match names {
            [] => None,
            [one] => Some(format!("{one} {verb} {what}")),
            many => {
                let names = listed_up_to(many, NAMED);
                Some(format!("{} {verb} {what}: {names}", counted(many.len(), "file")))
            }
        };
        let verb = |names: &[&str]| are(names.len());
        let parts = [
            told(&self.missing, verb(&self.missing), "missing"),
            told(&self.changed, were(self.changed.len() as u64), "changed"),
            told(&self.new, verb(&self.new), "new"),
        ];
        parts.into_iter().flatten().collect::<Vec<_>>().join("; ")
    }

    fn advice(&self) -> String {
        let them = |names: &[&str]| if names.len() == 1 { "it" } else { "them" };
        let gone: Vec<&str> = [&self.missing[..], &self.changed[..]].concat();
        let mut ways = Vec::new();
        if !gone.is_empty() {
            ways.push(format!("put {} back as the run began with {0}", them(&gone)));
        }
        if !self.new.is_empty() {
            ways.push(format!("take what is new away: {}", listed_up_to(&self.new, NAMED)));
        }
        let mut advice = format!("{}: the same command then goes on", ways.join(" and "));
        // The job can leave out samples that it had, and not take in others.
        if self.new.is_empty() && gone.len() <= LEFT_OUT {
            let without = exclude_argument(&gone);
            advice += &format!(". Or go on without {}: the same command with {without}", them(&gone));
        }
        advice
    }
}

/// Message about a worker that would compute other bits than the run.
pub(super) fn other_bits(differences: &[Difference], newcomer: &Newcomer, run: &OfTheRun) -> String {
    let is_data = |difference: &&Difference| DATA.contains(&difference.item.as_str());
    let is_hash = |difference: &&Difference| HASHES.contains(&difference.item.as_str());
    let causes: Vec<&Difference> = differences.iter().filter(|one| !is_data(one) && !is_hash(one)).collect();
    let (mut told, mut ways) = (Vec::new(), Vec::new());
    if differences.iter().any(|one| is_data(&one)) {
        let (what, way) = data(differences, newcomer, run);
        told.push(what);
        ways.push(way);
    }
    told.extend(causes.iter().map(|cause| describe(cause)));
    ways.extend(causes.iter().map(|cause| advice(cause)));
    if told.is_empty() {
        told.push("the same computation gives other results there".to_owned());
        ways.push("use a machine with the same model of CPU, and of GPU if it has one".to_owned());
        if run.has_modules {
            ways.push(
                "put the files of model.generator and model.discriminator back as they were".to_owned(),
            );
        }
    }
    ways.dedup();
    let anew = match newcomer.is_local {
        true => ". Or begin a new run with another --run-dir",
        false => "",
    };
    format!(
        "this worker would compute other bits than the run: {}; {}{anew}",
        told.join("; "),
        ways.join("; ")
    )
}

/// Describes how the data differ, and the way on.
fn data(differences: &[Difference], newcomer: &Newcomer, run: &OfTheRun) -> (String, String) {
    let back = "give it the data that the run began with: the same command then goes on";
    let (changes, here) = (run.files.as_ref(), &newcomer.files);
    let changes = changes.filter(|_| !here.is_empty()).map(|files| Changes::between(files, here));
    let (what, way) = match changes.filter(|changes| !changes.is_empty()) {
        Some(changes) => (changes.describe(), changes.advice()),
        None => (counts(differences, newcomer.samples, run.samples), back.to_owned()),
    };
    let way = if newcomer.is_local { way } else { "give its machine the same data as the run's".to_owned() };
    (format!("its data differ: {what}"), way)
}

fn counts(differences: &[Difference], here: u64, run: Option<u64>) -> String {
    let renamed = differences.iter().any(|difference| difference.item == "data_names");
    match run.filter(|run| *run != here) {
        Some(run) => format!("{} here and {run} in the run", counted(here, "sample")),
        None if renamed => format!("{} as in the run, with other names", counted(here, "sample")),
        None => format!("{} as in the run, with other content or classes", counted(here, "sample")),
    }
}

/// Describes an item for people.
fn describe(difference: &Difference) -> String {
    let Difference { item, expected, found } = difference;
    let name = match item.as_str() {
        "c_library" => "the C library",
        "cpu_capability" => "the set of the CPU's instructions that libtorch uses",
        "device" => "the device",
        "gpu" => "the kind of GPU",
        "gpu_capability" => "the GPU's compute capability",
        "gpu_libraries" => "the set of the GPU's libraries",
        "gpu_settings" => "the set of variables that steer the GPU's libraries",
        "exclusions" => "the list of samples that data.exclude leaves out",
        "initial_weights" => "the checkpoint of model.init_from",
        NUMERICS => "numerics, the version of the build's arithmetic,",
        "step" => "a step of the objective",
        "threads" => "job.threads",
        other => other,
    };
    let shown = |value: &str| if value.is_empty() { "unknown".to_owned() } else { format!("\"{value}\"") };
    format!("{name} is {} here and {} in the run", shown(found), shown(expected))
}

/// Way on from a difference of the worker's build or machine.
fn advice(Difference { item, expected, .. }: &Difference) -> String {
    let known = !expected.is_empty();
    match item.as_str() {
        NUMERICS if known => format!("use a build whose `worker --version` says numerics {expected}"),
        "cpu_capability" if known => format!(
            "use a CPU that has {expected}; where it has more, start with ATEN_CPU_CAPABILITY={}, and where that variable \
             is set, without it",
            expected.to_lowercase()
        ),
        "device" if expected == "cpu" => "start the worker with --device cpu".to_owned(),
        "device" if known => "use a worker with a GPU".to_owned(),
        "gpu" if known => format!("use a {expected}"),
        "gpu_libraries" if known => format!("use a worker with {expected}"),
        "gpu_settings" => format!(
            "start the worker with the run's variables: {}",
            if known { expected.as_str() } else { "none of these" }
        ),
        "libtorch" if known => format!("use a worker with libtorch {expected}"),
        "c_library" if known => format!("use a machine or an image with {expected}"),
        "initial_weights" => "put the checkpoint that model.init_from names back as it was".to_owned(),
        _ => "use the build that the run began with".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn difference(item: &str, expected: &str, found: &str) -> Difference {
        Difference { item: item.to_owned(), expected: expected.to_owned(), found: found.to_owned() }
    }

    fn files(of: &[(&str, u64)]) -> Vec<FileFound> {
        of.iter().map(|(name, hash)| FileFound { name: (*name).to_owned(), hash: *hash }).collect()
    }

    /// Message about data that differ, of a local worker.
    fn about_data(run: &[(&str, u64)], here: &[(&str, u64)]) -> String {
        let differences = [difference("data", "a", "b"), difference("data_names", "c", "d")];
        let newcomer = Newcomer { samples: here.len() as u64, files: files(here), is_local: true };
        let known = (!run.is_empty()).then(|| SampleFiles::new("a", &files(run)));
        let run = OfTheRun { samples: Some(3), files: known, has_modules: false };
        other_bits(&differences, &newcomer, &run)
    }

    #[track_caller]
    fn says(told: &str, parts: &[&str]) {
        parts.iter().for_each(|part| assert!(told.contains(part), "{part:?} is not in {told:?}"));
    }

    #[test]
    fn files_that_differ_are_named_with_the_way_on() {
        let run = [("a.png", 1), ("b/017.png", 2), ("c d.png", 3)];
        let told = about_data(&run, &[("a.png", 1), ("c d.png", 3)]);
        says(&told, &["its data differ: b/017.png is missing; put it back", "--set data.exclude=b/017.png"]);
        let told = about_data(&run, &[("a.png", 1), ("b/017.png", 2), ("c d.png", 9)]);
        says(&told, &["c d.png was changed; put it back", "--set 'data.exclude=c d.png'"]);
        let told = about_data(&run, &[("a.png", 1)]);
        says(&told, &["2 files are missing: b/017.png, c d.png; put them back", "go on without them"]);
        let told = about_data(&run, &[("a.png", 1), ("b/017.png", 2), ("c d.png", 3), ("e.png", 4)]);
        says(&told, &["e.png is new; take what is new away: e.png: the same command then goes on"]);
        assert!(!told.contains("data.exclude"), "a new file cannot be left out later: {told}");
    }

    #[test]
    fn without_a_list_of_files_the_numbers_are_told() {
        says(&about_data(&[], &[("a.png", 1)]), &["1 sample here and 3 in the run"]);
        let told = about_data(&[], &[("a.png", 1), ("b.png", 1), ("c.png", 1)]);
        says(&told, &["3 samples as in the run, with other names", "another --run-dir"]);
    }

    #[test]
    fn the_advice_is_for_what_differs() {
        let told =
            |differences: &[Difference]| other_bits(differences, &Newcomer::default(), &OfTheRun::default());
        let hash = || difference("hash_commit", "1", "2");
        says(
            &told(&[difference(NUMERICS, "1", "2")]),
            &["\"2\" here and \"1\" in the run", "says numerics 1"],
        );
        let cpu = told(&[difference("cpu_capability", "AVX512", "DEFAULT"), hash()]);
        says(&cpu, &["\"DEFAULT\" here and \"AVX512\" in the run", "a CPU that has AVX512"]);
        assert!(!cpu.contains("computation") && !cpu.contains("same command"), "{cpu}");
        says(&told(&[difference("libtorch", "2.5", "2.6")]), &["use a worker with libtorch 2.5"]);
        says(&told(&[difference("device", "cpu", "cuda")]), &["--device cpu"]);
        let gpu = told(&[difference("gpu", "NVIDIA H200, 132 SMs", "NVIDIA H100, 114 SMs"), hash()]);
        says(&gpu, &["the kind of GPU is \"NVIDIA H100, 114 SMs\" here", "use a NVIDIA H200, 132 SMs"]);
        let tf32 = told(&[difference("gpu_settings", "", "NVIDIA_TF32_OVERRIDE=0")]);
        says(&tf32, &["start the worker with the run's variables: none of these"]);
        says(&told(&[difference("threads", "1", "2")]), &["job.threads is \"2\" here and \"1\" in the run"]);
        says(&told(&[hash()]), &["the same computation gives other results", "the same model of CPU"]);
        let run = OfTheRun { has_modules: true, ..OfTheRun::default() };
        says(&other_bits(&[hash()], &Newcomer::default(), &run), &["the files of model.generator"]);
        let remote = told(&[difference("data", "a", "b")]);
        says(&remote, &["give its machine the same data"]);
        assert!(!remote.contains("--run-dir"), "{remote}");
    }
}
