//! One command under one condition, and what came of it.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ganglion_tests::{LIMIT, Process, eventually, program};
use tempfile::TempDir;

use crate::fixture::{Fixture, OLD};
use crate::table::{Condition, ROWS, Row};

/// Width of the narrow terminal.
const NARROW: usize = 40;
pub(crate) struct Cell<'a> {
    row: &'a Row,
    condition: Condition,
    words: Vec<String>,
    run: PathBuf,
    out: PathBuf,
    _folder: TempDir,
    /// Coordinator that the command asks.
    _asked: Option<Process>,
}

/// Outcome of a command.
pub(crate) struct Seen {
    pub(crate) code: i32,
    stdout: String,
    stderr: String,
    /// Changes of files that it must leave alone.
    harm: Vec<String>,
    pub(crate) seconds: f64,
}

impl<'a> Cell<'a> {
    /// Prepares a cell; `None` where this machine does not allow the condition.
    pub(crate) fn new(fixture: &'a Fixture, row: &'a Row, condition: Condition) -> Option<Cell<'a>> {
        let folder = tempfile::tempdir().unwrap();
        let (mut run, mut out) = (folder.path().join("run"), folder.path().join("out"));
        match condition {
            Condition::FullDisk => {
                let number = ROWS.iter().position(|known| known.command == row.command).unwrap();
                let own = fixture.on_full_disk(number)?;
                (run, out) = (own.join("run"), own.join("out"));
            }
            Condition::NoRun => fs::create_dir(&run).unwrap(),
            _ => fixture.copy_run(&run),
        }
        if condition == Condition::Device {
            out = fixture.device.clone()?;
            // A command that writes no file is given the device as its run.
            if !["{out}", "{new}"].iter().any(|file| row.line.contains(file)) {
                run.clone_from(&out);
            }
        } else if condition != Condition::FullDisk {
            fs::write(&out, OLD).unwrap();
        }
        harm(&run, condition);
        let new = if condition == Condition::Device { out.clone() } else { out.with_file_name("new") };
        let asks = row.line.contains("{asked}");
        let goes_on = matches!(
            condition,
            Condition::FullOutput | Condition::ClosedPipe | Condition::DumbTerminal | Condition::Narrow
        );
        let asked = (asks && goes_on && row.line.starts_with("stop")).then(|| stay(&run));
        let asked_run = if asks && goes_on && asked.is_none() { fixture.live() } else { run.clone() };
        let fill = |word: &str| {
            let mut word = word.replace("{run}", text(&run)).replace("{out}", text(&out));
            word = word.replace("{new}", text(&new));
            word = word.replace("{asked}", text(&asked_run)).replace("{url}", &fixture.url());
            for shared in ["pictures", "images", "labels"] {
                word = word.replace(&format!("{{{shared}}}"), text(&fixture.path(shared)));
            }
            // Only where the answer is lost, so that few have to be there.
            let may_leave = matches!(condition, Condition::FullOutput | Condition::ClosedPipe);
            if word == "{worker}" { if may_leave { fixture.worker() } else { 99 }.to_string() } else { word }
        };
        let words = row.line.split_whitespace().map(fill).collect();
        Some(Cell { row, condition, words, run, out, _folder: folder, _asked: asked })
    }

    pub(crate) fn run(self) -> Seen {
        let begun = Instant::now();
        let mut command = self.command();
        let errors = tempfile::tempfile().unwrap();
        let output = tempfile::tempfile().unwrap();
        command.stdin(Stdio::null()).stderr(errors.try_clone().unwrap());
        match self.condition {
            Condition::FullOutput => {
                command.stdout(OpenOptions::new().write(true).open("/dev/full").unwrap())
            }
            Condition::ClosedPipe => {
                let (reader, writer) = io::pipe().unwrap();
                drop(reader);
                command.stdout(writer)
            }
            _ => command.stdout(output.try_clone().unwrap()),
        };
        let mut child = command.spawn().unwrap();
        // The pipe's end in this process must not keep it open.
        drop(command);
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if begun.elapsed() > LIMIT {
                child.kill().unwrap();
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let seconds = begun.elapsed().as_secs_f64();
        let (stdout, stderr) = (content(output), content(errors));
        let code = status.code().unwrap_or(-1);
        Seen { code, stdout, stderr, harm: self.harm_done(code), seconds }
    }

    /// The command, on a terminal where the condition is one.
    fn command(&self) -> Command {
        let name = self.row.command.split(' ').next().unwrap();
        let mut command = Command::new(program(name));
        command.args(&self.words);
        let (kind, width) = match self.condition {
            Condition::DumbTerminal => ("dumb", 80),
            Condition::Narrow => ("xterm", NARROW),
            _ => {
                command.env_remove("TERM");
                return command;
            }
        };
        let words = std::iter::once(text(&program(name)).to_string()).chain(self.words.iter().cloned());
        let line: Vec<String> = words.map(|word| format!("'{word}'")).collect();
        let mut terminal = Command::new("script");
        let line = format!("stty rows 24 cols {width}; exec {}", line.join(" "));
        terminal.args(["--quiet", "--return", "--flush", "--command", &line, "/dev/null"]).env("TERM", kind);
        terminal
    }

    fn harm_done(&self, code: i32) -> Vec<String> {
        let mut harm = Vec::new();
        if self.condition == Condition::Device {
            if !fs::symlink_metadata(&self.out).unwrap().file_type().is_char_device() {
                harm.push("the device is none any more".to_string());
            }
        } else if !self.is_kept(code) {
            harm.push("the old file is lost".to_string());
        }
        for folder in [self.out.parent(), self.run.parent()].into_iter().flatten() {
            let names = fs::read_dir(folder).unwrap().flatten().map(|entry| entry.file_name());
            let drafts = names.filter(|name| name.to_string_lossy().ends_with(".new"));
            harm.extend(drafts.map(|name| format!("{} is left", name.display())));
        }
        harm
    }
}

impl Cell<'_> {
    /// Whether the output file is the old one, or a new one that may be there.
    fn is_kept(&self, code: i32) -> bool {
        let kept = fs::read(&self.out).unwrap_or_default();
        // The file is written before the message about it, which fails then; and a list of bad samples is
        // written where there are any.
        let may_be_new = matches!(self.condition, Condition::FullOutput | Condition::ClosedPipe) || code == 0;
        kept == OLD.as_bytes() || may_be_new && !kept.is_empty() || kept == b"2.png\n"
    }
}

impl Seen {
    /// Faults of the outcome; `expected` is an exit code, and texts that must be there.
    pub(crate) fn faults(&self, expected: &str, condition: Condition) -> Vec<String> {
        let (code, texts) = expected.split_once(' ').unwrap_or((expected, ""));
        let all = format!("{}{}", self.stdout, self.stderr);
        let mut faults = self.harm.clone();
        let mut expect = |holds: bool, fault: String| faults.extend((!holds).then_some(fault));
        expect(self.code.to_string() == code, format!("exit code {} instead of {code}", self.code));
        for text in texts.split(" | ") {
            expect(all.contains(text), format!("no {text:?}"));
        }
        expect(!all.contains("panicked"), "it panics".to_string());
        let on_terminal = matches!(condition, Condition::DumbTerminal | Condition::Narrow);
        let words = if on_terminal { &all } else { &self.stderr };
        match self.code {
            0 => {}
            141 => expect(self.stderr.is_empty(), "a closed pipe is told".to_string()),
            _ => expect(!words.trim().is_empty(), "it fails without a word".to_string()),
        }
        if condition == Condition::DumbTerminal {
            expect(
                !all.contains('\x1b') && !all.replace("\r\n", "\n").contains('\r'),
                "it draws".to_string(),
            );
        }
        if condition == Condition::Narrow {
            let wide = widest_drawn(&all);
            expect(wide <= NARROW, format!("a drawn line of {wide} columns"));
        }
        faults
    }

    /// First line of what it said.
    pub(crate) fn first_words(&self) -> String {
        let said = if self.stderr.is_empty() { &self.stdout } else { &self.stderr };
        let words = said.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
        words.trim().chars().take(150).collect()
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--- standard output\n{}--- standard error\n{}", self.stdout, self.stderr)
    }
}

/// Columns of the widest line that is drawn over: one that ends in a carriage return alone.
fn widest_drawn(text: &str) -> usize {
    let plain = console::strip_ansi_codes(text).replace("\r\n", "\n");
    let drawn =
        plain.split('\n').flat_map(|line| line.split('\r').rev().skip(1).map(console::measure_text_width));
    drawn.max().unwrap_or_default()
}

/// Damages a run as the condition says.
fn harm(run: &Path, condition: Condition) {
    let checkpoint =
        || run.join("checkpoints").join(fs::read_to_string(run.join("checkpoints/latest")).unwrap().trim());
    match condition {
        Condition::JobCut => cut(&run.join("job.toml")),
        Condition::JournalCut => {
            for beside in ["-wal", "-shm"] {
                let _ = fs::remove_file(run.join(format!("journal.sqlite{beside}")));
            }
            cut(&run.join("journal.sqlite"));
        }
        Condition::CheckpointCut => {
            for file in fs::read_dir(checkpoint()).unwrap().flatten().map(|entry| entry.path()) {
                if file.extension().is_some_and(|extension| extension == "safetensors") {
                    cut(&file);
                }
            }
        }
        Condition::NanWeights => nan(&checkpoint()),
        _ => {}
    }
}

fn cut(file: &Path) {
    let length = fs::metadata(file).unwrap().len();
    File::options().write(true).open(file).unwrap().set_len(length / 2).unwrap();
}

/// Makes every number of a checkpoint's generator one that is none, as a training may that diverged.
fn nan(checkpoint: &Path) {
    let (weights, manifest) =
        (checkpoint.join("generator_ema.safetensors"), checkpoint.join("manifest.json"));
    let mut bytes = fs::read(&weights).unwrap();
    let hash = |bytes: &[u8]| blake3::hash(bytes).to_hex().to_string();
    let old = hash(&bytes);
    let header = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap() + 8;
    bytes[header..].chunks_exact_mut(4).for_each(|number| number.copy_from_slice(&f32::NAN.to_le_bytes()));
    // The manifest tells of these weights.
    let text = fs::read_to_string(&manifest).unwrap();
    assert!(text.contains(&old));
    fs::write(manifest, text.replace(&old, &hash(&bytes))).unwrap();
    fs::write(weights, bytes).unwrap();
}

/// Starts a coordinator that answers for a finished run.
fn stay(run: &Path) -> Process {
    let mut command = Command::new(program("coordinator"));
    command.args(["--workers", "0", "--stay", "--listen", "127.0.0.1:0", "--run-dir"]).arg(run);
    for setting in ganglion_tests::SMALL_MLP.iter().chain(&["job.steps=2", "job.data_shards=2"]) {
        command.args(["--set", setting]);
    }
    let process = Process::start(command);
    let events = run.join("events.jsonl");
    let stays =
        || fs::read_to_string(&events).is_ok_and(|events| events.contains("\"staying\"")).then_some(());
    eventually("a coordinator that stays", stays);
    process
}

fn content(mut file: File) -> String {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
