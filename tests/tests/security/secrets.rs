//! Certificates and tokens, made by the program that users make them with.

use std::path::PathBuf;
use std::process::Command;

use ganglion_proto::credentials::TlsFiles;
use ganglion_proto::dial::Credentials;
use ganglion_tests::{OVER_GLOO, Process, Run, program};

/// Files made by `coordinator certs init`.
pub(crate) struct Secrets(PathBuf);

impl Secrets {
    /// Makes certificates and a token beside a run.
    pub(crate) fn new(run: &Run, name: &str) -> Secrets {
        let folder = run.beside(name);
        let mut command = Command::new(program("coordinator"));
        command.args(["certs", "init", "--dir"]).arg(&folder);
        let ended = Process::start(command).wait();
        assert_eq!(ended.code, Some(0), "{}", ended.output);
        Secrets(folder)
    }

    /// Path of one of the files or folders.
    pub(crate) fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_string()
    }

    /// The join token.
    pub(crate) fn token(&self) -> String {
        std::fs::read_to_string(self.0.join("join-token")).unwrap().trim().to_string()
    }

    /// Arguments of a coordinator with TLS and join token.
    pub(crate) fn coordinator(&self, workers: u32) -> Vec<String> {
        let workers = workers.to_string();
        let (folder, token) = (self.path("coordinator"), self.path("join-token"));
        ["--workers", &workers, "--tls-dir", &folder, "--join-token-file", &token]
            .map(str::to_string)
            .to_vec()
    }

    /// Worker with these secrets.
    pub(crate) fn worker(&self, url: &str) -> Process {
        worker(url, &["--tls-dir", &self.path("worker"), "--join-token-file", &self.path("join-token")])
    }

    /// Arguments of a worker with these secrets.
    pub(crate) fn credentials(&self) -> Credentials {
        let tls = Some(TlsFiles::new(&self.0.join("worker")));
        Credentials { tls, name: None, token_file: Some(self.0.join("join-token")) }
    }
}

/// Worker with these arguments.
pub(crate) fn worker(url: &str, arguments: &[&str]) -> Process {
    let mut command = Command::new(program("worker"));
    command.args(["--coordinator", url]).args(arguments).env(OVER_GLOO.0, OVER_GLOO.1);
    Process::start(command)
}

/// Starts a coordinator with secrets.
pub(crate) fn start(run: &Run, secrets: &Secrets, workers: u32) -> Process {
    let arguments = secrets.coordinator(workers);
    let mut command = run.command(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    command.env(OVER_GLOO.0, OVER_GLOO.1);
    Process::start(command)
}

/// Address of a run's coordinator.
pub(crate) fn url(run: &Run) -> String {
    run.wait_for("coordinator_started", |_| true)["address"].as_str().unwrap().to_string()
}
