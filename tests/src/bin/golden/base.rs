//! Programs of the commit to compare with.
//!
//! `target/golden` has one checkout, which is moved from commit to commit so that only the changes
//! are compiled, a target folder of its own for it, and a folder of programs for each commit that
//! was built.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Root folder of this repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is in the repository")
}

/// Returns the folder of a commit's programs, which are built if need be. The default is the newest
/// commit if the tree has uncommitted changes, otherwise the one before it: either way the
/// comparison covers one change.
pub(crate) fn programs(commit: Option<&str>) -> Result<PathBuf, String> {
    let commit = match commit {
        Some(commit) => commit,
        None if git(&["status", "--porcelain"])?.is_empty() => "HEAD^",
        None => "HEAD",
    };
    let hash = git(&["rev-parse", "--verify", &format!("{commit}^{{commit}}")])?;
    let said = git(&["log", "-1", "--format=%h %s", &hash])?;
    println!("the base is {commit}: {said}");
    let all = root().join("target/golden");
    let (programs, new) = (all.join(&hash), all.join("new"));
    if programs.is_dir() {
        return Ok(programs);
    }
    println!("building it in {}", all.display());
    let failed = |error: io::Error| format!("{}: {error}", all.display());
    check_out(&hash, &all)?;
    if !all.join("target").exists() {
        seed(&root().join("target/release"), &all.join("target/release")).map_err(failed)?;
    }
    build(&all)?;
    fs::create_dir_all(&new).map_err(failed)?;
    for name in programs_of(&all) {
        fs::copy(all.join("target/release").join(name), new.join(name)).map_err(failed)?;
    }
    fs::rename(&new, &programs).map_err(failed)?;
    Ok(programs)
}

/// Returns the version number of the arithmetic of a folder's programs. Builds without one count as
/// the first.
pub(crate) fn numerics(programs: &Path) -> Result<u32, String> {
    let told = output(Command::new(programs.join("worker")).arg("--version"))?;
    let number = told.split_once("(numerics ").and_then(|(_, rest)| rest.split_once(')'));
    match number {
        None => Ok(1),
        Some((number, _)) => number.parse().map_err(|_| format!("{told}: no number of its arithmetic")),
    }
}

/// Sets the files of `target/golden/source` to those of a commit. The checkout has an index of its
/// own, so the repository does not know of it, and removing the folder is enough to be rid of it.
fn check_out(hash: &str, all: &Path) -> Result<(), String> {
    let source = all.join("source");
    fs::create_dir_all(&source).map_err(|error| format!("{}: {error}", source.display()))?;
    let mut command = Command::new("git");
    command.arg("-C").arg(root()).arg("--work-tree").arg(&source).args(["read-tree", "--reset", "-u", hash]);
    output(command.env("GIT_INDEX_FILE", all.join("index"))).map(drop)
}

/// Copies the compiled dependencies of this tree's build: they are most of the work, and equal
/// unless the two commits have them in different versions.
fn seed(from: &Path, to: &Path) -> io::Result<()> {
    let deps = to.join("deps");
    fs::create_dir_all(&deps)?;
    let copy = |files: &[PathBuf], to: &Path| {
        let mut command = Command::new("cp");
        command.args(["--archive", "--reflink=auto", "--target-directory"]).arg(to).args(files);
        let is_done = command.status()?.success();
        if is_done { Ok(()) } else { Err(io::Error::other("cannot copy compiled dependencies")) }
    };
    let entries = fs::read_dir(from.join("deps"))?.collect::<io::Result<Vec<_>>>()?;
    let mut files: Vec<PathBuf> = entries.iter().map(fs::DirEntry::path).collect();
    let is_library =
        |ending: &std::ffi::OsStr| ["rlib", "rmeta", "so", "d"].iter().any(|known| ending == *known);
    files.retain(|file| file.extension().is_some_and(is_library));
    files.chunks(500).try_for_each(|some| copy(some, &deps))?;
    copy(&[from.join(".fingerprint"), from.join("build")], to)
}

/// Names of the programs of the checkout. Earlier commits have no others with failpoints.
fn programs_of(all: &Path) -> &'static [&'static str] {
    const NAMES: [&str; 4] = ["coordinator", "worker", "failing-coordinator", "failing-worker"];
    if all.join("source/tests/failing").exists() { &NAMES } else { &NAMES[..2] }
}

/// Builds the programs of the checkout, as `make build` does: the dependencies are the same.
fn build(all: &Path) -> Result<(), String> {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(all.join("source")).env("CARGO_TARGET_DIR", all.join("target"));
    command.args(["build", "--release", "--locked", "--quiet"]);
    command.args(["-p", "ganglion-coordinator", "-p", "ganglion-worker"]);
    if programs_of(all).len() > 2 {
        command.args(["-p", "ganglion-failing"]);
    }
    // The checkout has no libtorch of its own.
    if std::env::var_os("LIBTORCH").is_none() && std::env::var_os("LIBTORCH_USE_PYTORCH").is_none() {
        command.env("LIBTORCH", root().join(".libtorch/torch"));
    }
    let built = command.status().map_err(|error| format!("cargo: {error}"))?;
    if built.success() { Ok(()) } else { Err("the base does not build".to_string()) }
}

fn git(arguments: &[&str]) -> Result<String, String> {
    output(Command::new("git").arg("-C").arg(root()).args(arguments))
}

fn output(command: &mut Command) -> Result<String, String> {
    let program = Path::new(command.get_program()).display().to_string();
    let done = command.output().map_err(|error| format!("{program}: {error}"))?;
    if !done.status.success() {
        return Err(format!("{program}: {}", String::from_utf8_lossy(&done.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&done.stdout).trim().to_string())
}
