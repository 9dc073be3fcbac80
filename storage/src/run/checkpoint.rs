//! The checkpoints of a run, and the content of one.

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use ganglion_membership::Checkpoint;
use ganglion_proto::{format, manifest};
use serde::Deserialize;

use super::{CheckpointChoice, Chosen, JOB, RunError, RunName, chosen};
use crate::layout::{BEST, BEST_FORMAT, MANIFEST, in_folder};
use crate::{Address, Blocking, Error, Path as Place, Result as Stored, Storage, reason};

/// Maximum number of checkpoints that a message lists, the newest ones.
const LISTED: usize = 10;
/// Number of folders above a file or a folder in which the run's job is looked for.
// RUN/checkpoints/step-00001000/generator_ema.safetensors.
const ABOVE: usize = 3;

/// Advice where a run's job cannot be read.
const MEND_JOB: &str = "it says where the checkpoints are: restore it, or give the folder of a checkpoint";

/// A file of a checkpoint, as it was read.
#[derive(Debug)]
pub struct ContentOfRun {
    /// Where it was.
    pub name: String,
    /// Content of the file, which has the manifest's hash where there is a manifest.
    pub bytes: Bytes,
    /// Name and text of the run's job, if the file is known to be a run's.
    pub job: Option<(String, String)>,
    /// Line for the user where no run was named.
    pub told: Option<String>,
}

/// The place of a run's checkpoints: that of its job, or a folder in its own.
pub fn place_of(run: &Path, url: Option<&str>) -> String {
    url.map_or_else(|| run.join("checkpoints").display().to_string(), str::to_string)
}

/// The part of a job that says where the checkpoints are. All else may be of another version.
#[derive(Deserialize)]
struct JobFile {
    checkpoint: Option<Section>,
}

#[derive(Deserialize)]
struct Section {
    url: Option<String>,
}

/// The `checkpoint.url` in the text of a run's job.
fn url_in(run: &Path, text: &str) -> Result<Option<String>, RunError> {
    let job: JobFile = toml::from_str(text).map_err(|error| {
        let (file, error) = (run.join(JOB), error.message().to_string());
        RunError::Input(format!("{}: {error}; {MEND_JOB}", file.display()))
    })?;
    Ok(job.checkpoint.and_then(|section| section.url))
}

/// Reads a file of the checkpoint that a name leads to: a run's, or the checkpoint in a folder, a storage
/// or an address. Such a file may also be named itself. Without a name the newest run is taken.
///
/// # Errors
/// There is no such run, checkpoint or file, or it cannot be read.
pub fn read(name: Option<&RunName>, file: &str) -> Result<ContentOfRun, RunError> {
    match name.map(RunName::as_it_is) {
        Some(name) if !name.place().is_empty() && name.folder().is_none() => Elsewhere { name }.read(file),
        name => read_of_run(chosen(name.as_ref())?, file),
    }
}

/// Reads a file of a checkpoint of a run.
fn read_of_run(run: Chosen, file: &str) -> Result<ContentOfRun, RunError> {
    let Chosen { folder, checkpoint, told } = run;
    let (job, shown) = (folder.join(JOB), folder.display().to_string());
    let text = fs::read_to_string(&job)
        .map_err(|error| RunError::Input(format!("{}: {error}; {MEND_JOB}", job.display())))?;
    let shelf = Shelf::open(&shown, &folder, url_in(&folder, &text)?.as_deref())?;
    let found = shelf.checkpoint(checkpoint)?;
    let (name, bytes) = shelf.read(&found, file)?;
    Ok(ContentOfRun { name, bytes, job: Some((job.display().to_string(), text)), told })
}

/// The storage of a run's checkpoints, open.
pub struct Shelf {
    /// Name of the run or place, as the user gave it.
    shown: String,
    place: String,
    storage: Blocking,
}

impl Shelf {
    /// Opens the storage of the run in a folder, whose job has this `checkpoint.url`.
    ///
    /// # Errors
    /// The storage is not there, or cannot be opened.
    pub fn open(shown: &str, run: &Path, url: Option<&str>) -> Result<Shelf, RunError> {
        let place = place_of(run, url);
        let wrong =
            |what: String| RunError::Input(format!("{shown}: its checkpoints are in {place}: {what}"));
        let address = Address::parse(&place).map_err(|error| wrong(error.to_string()))?;
        if matches!(&address, Address::Folder(folder) if !folder.is_dir()) {
            return Err(match url {
                Some(_) => wrong(
                    "there is no such folder; mount or restore it, or give the folder of a checkpoint"
                        .to_string(),
                ),
                None => RunError::Input(format!(
                    "{shown} has no checkpoint: there is no folder {place}; restore it, or wait until one is saved"
                )),
            });
        }
        let storage = Storage::open(&address).map_err(wrong)?;
        Shelf::of(shown, place, storage)
    }

    fn of(shown: &str, place: String, storage: Storage) -> Result<Shelf, RunError> {
        let storage = Blocking::new(storage).map_err(|error| RunError::Storage(error.to_string()))?;
        Ok(Shelf { shown: shown.to_string(), place, storage })
    }

    /// The storage, for [`Shelf::wait`].
    pub fn storage(&self) -> &Storage {
        self.storage.storage()
    }

    /// Blocks until `work` on the storage is done. Must not be called from an async task.
    pub fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.storage.wait(work)
    }

    /// Waits for an answer of the storage.
    fn ask<T>(&self, work: impl Future<Output = Stored<T>>) -> Result<T, RunError> {
        self.wait(work).map_err(|error| {
            let line = format!("{}: {}", self.place, reason(&error));
            match self.storage().may_mend(&error) {
                true => RunError::Storage(line),
                false => RunError::Input(line),
            }
        })
    }

    /// The folder of a checkpoint; without a choice that of the newest.
    ///
    /// # Errors
    /// There is no such checkpoint; the message has those that there are.
    pub fn checkpoint(&self, choice: Option<CheckpointChoice>) -> Result<String, RunError> {
        let storage = self.storage();
        let if_complete = |folder: String, name: String| match self.ask(is_complete(storage, &folder))? {
            true => Ok(folder),
            false => self.lacks(&name),
        };
        match choice.unwrap_or(CheckpointChoice::Latest) {
            // By the manifests: the file `latest` is a hint, and may be empty or damaged.
            CheckpointChoice::Latest => {
                let newest = self.ask(newest(storage, 1))?.pop();
                newest.map_or_else(|| self.lacks("checkpoint"), Ok)
            }
            CheckpointChoice::Best => match self.ask(best(storage))? {
                Some(Ok(Best { folder, .. })) => {
                    let name = format!("{folder}, which its {BEST} names");
                    if_complete(folder, name)
                }
                Some(Err(error)) => self.lacks(&format!("{BEST} that can be read ({error})")),
                None => self.lacks(
                    "best checkpoint: none was evaluated, which evaluation.every_steps or evaluation.with_checkpoints \
                     asks for",
                ),
            },
            CheckpointChoice::At { step, phase: 0 } => {
                if_complete(Checkpoint::folder_of(step, 0), format!("checkpoint of step {step}"))
            }
            CheckpointChoice::At { step, phase } => {
                let folder = Checkpoint::folder_of(step, phase);
                if_complete(folder.clone(), folder)
            }
        }
    }

    /// Error for a checkpoint that is not there, with those that are.
    fn lacks<T>(&self, what: &str) -> Result<T, RunError> {
        let others = self.ask(others(self.storage()))?;
        Err(RunError::Input(format!("{} has no {what}; {others}", self.shown)))
    }

    /// Reads a file of a checkpoint, and holds it against the manifest. An empty folder is the place itself.
    fn read(&self, folder: &str, file: &str) -> Result<(String, Bytes), RunError> {
        let storage = self.storage();
        let at = |file: &str| match folder {
            "" => format!("{}/{file}", self.place),
            folder => format!("{}/{folder}/{file}", self.place),
        };
        let told = |file: &str, what: &str, way_on: &str| {
            format!("{}: {what}; restore it, or name another checkpoint{way_on}", at(file))
        };
        let wrong = |file: &str, what: &str, way_on: &str| RunError::Input(told(file, what, way_on));
        let use_it = format!("; to use {} as it is, give its path", at(file));
        let text = self.ask(storage.text(&in_folder(folder, MANIFEST)))?;
        let known = text.map(|text| manifest::parse(&text)).transpose();
        let known = known.map_err(|error| wrong(MANIFEST, &error.to_string(), &use_it))?;
        let bytes = self.ask(async {
            match storage.read(&in_folder(folder, file)).await {
                Err(Error::NotFound { .. }) => Ok(None),
                read => read.map(Some),
            }
        })?;
        let bytes = bytes.ok_or_else(|| RunError::NoFile(told(file, "there is no such file", "")))?;
        let hash = known.iter().flat_map(|known| &known.files).find(|known| known.file == file);
        match hash.is_none_or(|known| blake3::hash(&bytes).to_hex().as_str() == known.blake3) {
            true => Ok((at(file), bytes)),
            false => Err(wrong(file, "damaged: it does not have the manifest's hash", &use_it)),
        }
    }
}

/// A place that is no run's folder on this machine.
struct Elsewhere {
    name: RunName,
}

impl Elsewhere {
    fn read(&self, file: &str) -> Result<ContentOfRun, RunError> {
        let (place, choice) = (self.name.place().trim_end_matches('/'), self.name.checkpoint());
        let itself = |what: &str| match choice {
            Some(choice) => Err(RunError::Input(format!("{}: {what}; leave @{choice} out", self.name))),
            None => Ok(()),
        };
        let job = || job_above(Path::new(place));
        if Path::new(place).is_file() {
            itself("this is a file of a checkpoint")?;
            let bytes = fs::read(place).map_err(|error| self.wrong(&error.to_string()))?;
            return Ok(ContentOfRun { name: place.to_string(), bytes: bytes.into(), job: job(), told: None });
        }
        // A file in an object store.
        if let Some((root, file)) = place.rsplit_once('/').filter(|(_, file)| file.ends_with(".safetensors"))
        {
            itself("this is a file of a checkpoint")?;
            let (name, bytes) = self.open(root)?.read("", file)?;
            return Ok(ContentOfRun { name, bytes, job: None, told: None });
        }
        let shelf = self.open(place)?;
        let storage = shelf.storage();
        if let Some(text) = shelf.ask(storage.text(&Place::from(JOB)))? {
            // A run's folder that was copied to an object store.
            let url = url_in(Path::new(place), &text)?;
            let inner = Shelf::open(place, Path::new(place), url.as_deref())?;
            let (name, bytes) = inner.read(&inner.checkpoint(choice)?, file)?;
            return Ok(ContentOfRun { name, bytes, job: Some((format!("{place}/{JOB}"), text)), told: None });
        }
        let has = |name: &str| shelf.ask(storage.exists(&Place::from(name)));
        let folder = if has(MANIFEST)? || has(file)? {
            itself("this is a checkpoint")?;
            String::new()
        } else if shelf.ask(newest(storage, 1))?.is_empty() {
            return Err(self.nothing());
        } else {
            shelf.checkpoint(choice)?
        };
        let (name, bytes) = shelf.read(&folder, file)?;
        Ok(ContentOfRun { name, bytes, job: job(), told: None })
    }

    fn open(&self, place: &str) -> Result<Shelf, RunError> {
        let address = Address::parse(place).map_err(|error| self.wrong(&error.to_string()))?;
        if matches!(&address, Address::Folder(folder) if !folder.is_dir()) {
            return Err(self.nothing());
        }
        let storage = Storage::open(&address).map_err(|what| self.wrong(&what))?;
        Shelf::of(place, place.to_string(), storage)
    }

    fn wrong(&self, what: &str) -> RunError {
        RunError::Input(format!("{}: {what}", self.name))
    }

    fn nothing(&self) -> RunError {
        self.name.unknown("neither a run nor a checkpoint")
    }
}

/// Name and text of the job of the run that a file or a folder lies in.
fn job_above(place: &Path) -> Option<(String, String)> {
    let mut jobs = place.ancestors().take(ABOVE + 1).map(|folder| folder.join(JOB));
    let job: PathBuf = jobs.find(|job| job.is_file())?;
    Some((job.display().to_string(), fs::read_to_string(&job).ok()?))
}

/// The folders of the newest complete checkpoints, at most `count`, the newest first.
async fn newest(storage: &Storage, count: usize) -> Stored<Vec<String>> {
    let mut newest = Vec::new();
    for folder in storage.checkpoints().await?.into_iter().rev() {
        // From the newest on: there may be thousands, and each costs a request.
        if newest.len() == count {
            break;
        }
        if is_complete(storage, &folder).await? {
            newest.push(folder);
        }
    }
    Ok(newest)
}

async fn is_complete(storage: &Storage, folder: &str) -> Stored<bool> {
    storage.exists(&in_folder(folder, MANIFEST)).await
}

/// The checkpoints that a user may name instead, for messages.
async fn others(storage: &Storage) -> Stored<String> {
    let mut there = newest(storage, LISTED + 1).await?;
    if there.is_empty() {
        return Ok(format!("{} has none", storage.address()));
    }
    let name = |folder: &String| match Checkpoint::place_of(folder) {
        Some((step, phase)) => CheckpointChoice::At { step, phase }.to_string(),
        None => folder.clone(),
    };
    let older = if there.len() > LISTED { "..., " } else { "" };
    there.truncate(LISTED);
    there.reverse();
    let names: Vec<String> = there.iter().map(name).collect();
    let best = match best(storage).await?.and_then(Result::ok) {
        Some(Best { folder, .. }) if is_complete(storage, &folder).await? => {
            format!(", best is {}", name(&folder))
        }
        _ => String::new(),
    };
    Ok(format!("it has {older}{} (latest){best}", names.join(", ")))
}

/// Content of [`BEST`], as far as programs need it.
#[derive(Clone, Debug, Deserialize)]
pub struct Best {
    /// Folder of the checkpoint.
    pub folder: String,
    /// Name of the metric that decided.
    #[serde(default)]
    pub metric: String,
    /// Value of that metric.
    #[serde(default)]
    pub value: f64,
}

/// The best checkpoint, or the reason why the file that names it cannot be read; `None`
/// where none was evaluated.
pub async fn best(storage: &Storage) -> Stored<Option<Result<Best, String>>> {
    let text = storage.text(&Place::from(BEST)).await?;
    Ok(text.map(|text| format::parse(&text, BEST_FORMAT).map_err(|error| error.to_string())))
}

/// Reads the manifests on a storage, by folder. A manifest that is removed meanwhile is left out.
pub async fn manifests(storage: &Storage) -> Stored<Vec<(String, Result<Checkpoint, String>)>> {
    let mut manifests = Vec::new();
    for folder in storage.checkpoints().await? {
        let manifest = match storage.text(&in_folder(&folder, MANIFEST)).await {
            Ok(Some(text)) => manifest::parse(&text).map_err(|error| error.to_string()),
            // Not a checkpoint yet, or removed since the listing.
            Ok(None) => continue,
            // Unreachable proves nothing about the manifest, so nothing is claimed of it.
            Err(error) if storage.is_away(&error) => return Err(error),
            Err(error) => Err(format!("{MANIFEST}: {}", reason(&error))),
        };
        manifests.push((folder, manifest));
    }
    Ok(manifests)
}

#[cfg(test)]
mod tests {
    use ganglion_membership::{Position, StoredFile};

    use super::*;

    const FILE: &str = "generator_ema.safetensors";

    /// A run with checkpoints of these steps, of which the first is the best.
    struct Run {
        root: tempfile::TempDir,
    }

    impl Run {
        fn new(steps: &[u64], url: Option<&str>) -> Run {
            let run = Run { root: tempfile::tempdir().unwrap() };
            let url = url.map(|url| format!("url = \"{}\"\n", run.path(url))).unwrap_or_default();
            let (place, job) =
                (if url.is_empty() { "run/checkpoints" } else { "kept" }, "# \n[checkpoint]\n");
            run.write("run/job.toml", &format!("{job}{url}[later]\nkey = 1\n"));
            for step in steps {
                let content = format!("weights of {step}");
                let file = StoredFile {
                    file: FILE.to_string(),
                    bytes: content.len() as u64,
                    blake3: blake3::hash(content.as_bytes()).to_hex().to_string(),
                };
                let (position, state_digest) = (Position(2 * step), "d".to_string());
                let checkpoint =
                    Checkpoint { position, step: *step, phase: 0, files: vec![file], state_digest };
                let folder = format!("{place}/{}", checkpoint.folder());
                run.write(&format!("{folder}/{FILE}"), &content);
                run.write(&format!("{folder}/{MANIFEST}"), &manifest::render(&checkpoint));
            }
            if let Some(step) = steps.first() {
                let best = format!("{{\"format\": 1, \"folder\": \"{}\"}}", Checkpoint::folder_of(*step, 0));
                run.write(&format!("{place}/{BEST}"), &best);
            }
            run
        }

        fn path(&self, name: &str) -> String {
            self.root.path().join(name).display().to_string()
        }

        fn write(&self, name: &str, content: &str) {
            let path = self.root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }

        fn read(&self, name: &str) -> Result<String, String> {
            let name = self.path(name).parse().unwrap();
            let read = read(Some(&name), FILE).map_err(|error| error.to_string())?;
            Ok(String::from_utf8(read.bytes.to_vec()).unwrap())
        }

        #[track_caller]
        fn assert_refused(&self, name: &str, says: &[&str]) {
            let refused = self.read(name).unwrap_err();
            for part in says {
                assert!(refused.contains(part), "{part:?} is not in: {refused}");
            }
        }
    }

    #[test]
    fn a_name_leads_to_its_checkpoint_wherever_the_checkpoints_are() {
        for url in [None, Some("kept")] {
            let run = Run::new(&[4000, 6000], url);
            let place = url.map_or("run/checkpoints".to_string(), str::to_string);
            run.write(&format!("{place}/latest"), "");
            for name in ["run", "run/", "run@latest", "run@6000", "run@step-00006000", &place] {
                assert_eq!(run.read(name).unwrap(), "weights of 6000", "{name}");
            }
            let folder = format!("{place}/step-00004000");
            for name in
                ["run@best", "run@4000", &folder, &format!("{folder}/{FILE}"), &format!("{place}@best")]
            {
                assert_eq!(run.read(name).unwrap(), "weights of 4000", "{name}");
            }
            run.assert_refused(
                "run@5000",
                &["run has no checkpoint of step 5000; it has 4000, 6000 (latest), best is 4000"],
            );
            run.assert_refused(&format!("{folder}@best"), &["this is a checkpoint; leave @best out"]);
        }
    }

    #[test]
    fn the_job_of_a_checkpoint_is_that_of_its_run() {
        let run = Run::new(&[4], Some("kept"));
        let job = |name: &str| read(Some(&run.path(name).parse().unwrap()), FILE).unwrap().job;
        assert_eq!(job("run").unwrap().0, run.path("run/job.toml"));
        assert_eq!(job("kept"), None, "nothing there names the run");
        let run = Run::new(&[4], None);
        let job = |name: &str| read(Some(&run.path(name).parse().unwrap()), FILE).unwrap().job;
        for name in ["run/checkpoints/step-00000004", &format!("run/checkpoints/step-00000004/{FILE}")] {
            assert_eq!(job(name).unwrap().0, run.path("run/job.toml"));
        }
    }

    #[test]
    fn what_is_missing_is_named_with_the_way_on() {
        let run = Run::new(&[4, 6], None);
        run.write("run/checkpoints/step-00000006/generator_ema.safetensors", "weights of 66");
        run.assert_refused(
            "run",
            &["step-00000006/generator_ema.safetensors: damaged", "to use", "give its path"],
        );
        assert_eq!(run.read(&format!("run/checkpoints/step-00000006/{FILE}")).unwrap(), "weights of 66");
        run.write("run/checkpoints/step-00000006/manifest.json", "{");
        run.assert_refused("run", &["step-00000006/manifest.json: ", "restore it, or name another"]);
        fs::remove_file(run.path("run/checkpoints/step-00000006/manifest.json")).unwrap();
        assert_eq!(run.read("run").unwrap(), "weights of 4", "a folder without a manifest is no checkpoint");
        fs::remove_file(run.path(&format!("run/checkpoints/step-00000004/{FILE}"))).unwrap();
        run.assert_refused("run", &[FILE, "there is no such file"]);
        run.write("run/checkpoints/best.json", "{\"format\": 1, \"folder\": \"step-00000009\"}");
        run.assert_refused(
            "run@best",
            &["run has no step-00000009, which its best.json names; it has 4 (latest)"],
        );
        run.write("run/checkpoints/best.json", "{");
        run.assert_refused("run@best", &["best.json that can be read"]);
        fs::remove_file(run.path("run/checkpoints/best.json")).unwrap();
        run.assert_refused("run@best", &["none was evaluated", "evaluation.every_steps"]);
        fs::remove_dir_all(run.path("run/checkpoints")).unwrap();
        run.assert_refused("run", &["run has no checkpoint: there is no folder"]);
        run.write("run/job.toml", "[checkpoint");
        run.assert_refused("run", &["run/job.toml: ", "it says where the checkpoints are"]);
        run.assert_refused("other", &["other: neither a run nor a checkpoint is there"]);
        run.assert_refused("run@bset", &["run@bset: neither", "behind @ stands best, latest or a step"]);
        let run = Run::new(&[4], Some("kept"));
        fs::remove_dir_all(run.path("kept")).unwrap();
        run.assert_refused(
            "run",
            &["its checkpoints are in", "kept: there is no such folder; mount or restore it"],
        );
    }
}
