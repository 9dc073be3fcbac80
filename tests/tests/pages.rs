//! The commands of README.md and docs/, run as a reader would: page after page, in one fresh folder.
//!
//! A block of a page is indented by four spaces, or fenced. Beside what needs help stands a mark, a
//! comment that readers do not see:
//!
//! ```text
//! <!-- test: set job.steps=20; replace 10.0.0.1 with 127.0.0.1 -->
//! ```
//!
//! | order | meaning |
//! |---|---|
//! | `set KEY=VALUE ...` | every training of the block gets these settings too, so that it is short |
//! | `replace A with B` | in the block's text |
//! | `before COMMAND`, `after COMMAND` | what the reader has done before, and a check |
//! | `background COMMAND` | the line that begins so runs on while the others do, and must end well too |
//! | `section of FILE` | a part of a job: that job file with this part is trained |
//! | `continue` | Python that goes on from the Python block before |
//! | `pytorch` | needs PyTorch for Python: run where `GANGLION_PYTORCH` is set |
//! | `skip WHY` | not run, for this reason |
//!
//! Lines `make ...` are only looked up in the Makefile.
#![allow(clippy::unwrap_used)] // a test may panic

use std::cell::RefCell;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use ganglion_tests::{Process, program};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Commands that a block may begin with, without a mark.
const COMMANDS: &[&str] = &["coordinator", "worker", "make", "#"];
/// Time limit of a block in seconds.
const LIMIT: &str = "90";

struct Block {
    /// Page and line.
    place: String,
    language: String,
    text: String,
    marks: Vec<Mark>,
}

#[derive(Clone)]
enum Mark {
    Set(String),
    Replace(String, String),
    Before(String),
    After(String),
    Background(String),
    SectionOf(String),
    Continue,
    PyTorch,
    Skip(String),
}

impl Mark {
    fn parse(order: &str) -> Option<Mark> {
        let (verb, rest) = order.split_once(char::is_whitespace).unwrap_or((order, ""));
        let rest = rest.trim().to_string();
        Some(match verb {
            "set" => Mark::Set(rest),
            "replace" => {
                let (from, to) = rest.split_once(" with ")?;
                Mark::Replace(from.trim().to_string(), to.trim().to_string())
            }
            "before" => Mark::Before(rest),
            "after" => Mark::After(rest),
            "background" => Mark::Background(rest),
            "section" => Mark::SectionOf(rest.strip_prefix("of ")?.to_string()),
            "continue" => Mark::Continue,
            "pytorch" => Mark::PyTorch,
            "skip" if !rest.is_empty() => Mark::Skip(rest),
            _ => return None,
        })
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// README.md, then the pages of docs/ in the order of their index.
fn pages() -> Vec<String> {
    let index = fs::read_to_string(root().join("docs/README.md")).unwrap();
    let links = index.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link);
    let pages = links.filter(|link| link.ends_with(".md") && !link.contains('/'));
    let mut all = vec!["README.md".to_string()];
    all.extend(pages.map(|page| format!("docs/{page}")));
    all
}

fn is_in_list(above: &[&str]) -> bool {
    let text = above.iter().rev().find(|line| !line.trim().is_empty());
    let numbered =
        |line: &str| line.split_once(". ").is_some_and(|(number, _)| number.parse::<u32>().is_ok());
    text.is_some_and(|line| line.starts_with("- ") || line.starts_with("  ") || numbered(line))
}

/// Splits a page into its blocks.
fn blocks(page: &str) -> Vec<Block> {
    let text = fs::read_to_string(root().join(page)).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let (mut found, mut marks, mut at) = (Vec::new(), Vec::new(), 0);
    while at < lines.len() {
        let (line, place) = (lines[at], format!("{page}:{}", at + 1));
        if line.starts_with("<!-- test:") {
            let until = (at..lines.len()).find(|at| lines[*at].contains("-->")).unwrap();
            let all = lines[at..=until].join("\n").replace("<!-- test:", "").replace("-->", "");
            let orders = all.split([';', '\n']).map(str::trim).filter(|order| !order.is_empty());
            let parse = |order| Mark::parse(order).unwrap_or_else(|| panic!("{place}: what is {order:?}?"));
            marks = orders.map(parse).collect();
            at = until + 1;
            continue;
        }
        let mut push = |language: &str, range: &[&str]| {
            let text = range.join("\n");
            let (place, language) = (place.clone(), language.to_string());
            found.push(Block { place, language, text, marks: std::mem::take(&mut marks) });
        };
        if let Some(language) = line.strip_prefix("```") {
            let until = (at + 1..lines.len()).find(|at| lines[*at].starts_with("```")).unwrap();
            push(language, &lines[at + 1..until]);
            at = until + 1;
        } else if line.starts_with("    ") && !is_in_list(&lines[..at]) {
            let part = |line: &&&str| line.starts_with("    ") || line.is_empty();
            let length = lines[at..].iter().take_while(part).count();
            let text = lines[at..at + length].iter().map(|line| line.strip_prefix("    ").unwrap_or(line));
            push("", &text.collect::<Vec<_>>());
            at += length;
        } else {
            assert!(line.trim().is_empty() || marks.is_empty(), "{place}: a mark without a block");
            at += 1;
        }
    }
    found
}

/// Folder as after `git clone` and `make build`: the programs, and pictures of the reader's own.
struct Folder {
    folder: tempfile::TempDir,
    port: u16,
    /// Python that a block may continue.
    python: RefCell<String>,
}

impl Folder {
    fn fresh() -> Folder {
        let folder = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(root()).unwrap() {
            let name = entry.unwrap().file_name();
            if !["target", "runs", "dist", ".git"].iter().any(|left_out| name == *left_out) {
                symlink(root().join(&name), folder.path().join(&name)).unwrap();
            }
        }
        let bin = folder.path().join("bin");
        fs::create_dir(&bin).unwrap();
        let script = |name: &str, text: String| {
            fs::write(bin.join(name), format!("#!/bin/bash\n{text}\n")).unwrap();
            fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).unwrap();
        };
        // Only a training has settings, and it has no command before its options.
        let settings = r#"case "${1:-}" in ""|-*) for s in $(eval "echo $PAGE_SET"); do set -- "$@" --set "$s"; done;; esac"#;
        let coordinator = program("coordinator");
        script("coordinator", format!("{settings}\nexec {} \"$@\"", coordinator.display()));
        script("worker", format!("exec {} \"$@\"", program("worker").display()));
        script("make", format!("exec {} --dry-run \"$@\" >/dev/null", make().display()));
        pictures(&folder.path().join("pictures"));
        Folder { folder, port: free_port(), python: RefCell::default() }
    }

    /// Runs a block; returns what went wrong.
    fn run(&self, block: &Block) -> Result<(), String> {
        let (script, set) = self.script(block);
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", LIMIT, "bash", "-euo", "pipefail", "-c", &script]);
        let path = std::env::var("PATH").unwrap();
        let bin = self.folder.path().join("bin");
        command.env("PATH", format!("{}:{path}", bin.display())).env("PAGE_SET", set);
        command.env("PORT", self.port.to_string()).env_remove("GANGLION_BIN").current_dir(self.folder.path());
        let ended = Process::start(command).wait();
        if ended.code == Some(0) { Ok(()) } else { Err(format!("exit {:?}:\n{}", ended.code, ended.output)) }
    }

    /// Returns a block as a script, and the settings of its trainings.
    fn script(&self, block: &Block) -> (String, String) {
        let (mut text, mut set) = (block.text.clone(), String::new());
        let (mut before, mut after) = (String::new(), String::new());
        for mark in &block.marks {
            if let Mark::Replace(from, to) = mark {
                assert!(text.contains(from.as_str()), "{}: there is no {from:?} to replace", block.place);
                text = text.replace(from.as_str(), to);
            }
        }
        for mark in &block.marks {
            match mark {
                Mark::Set(settings) => set = settings.clone(),
                Mark::Before(command) => writeln!(before, "{command}").unwrap(),
                Mark::After(command) => writeln!(after, "{command}").unwrap(),
                Mark::Background(command) => {
                    let start = text.find(command.as_str()).expect("the line for the background");
                    let end = text[start..].find('\n').map_or(text.len(), |length| start + length);
                    text.insert_str(end, " &");
                    after.insert_str(0, "wait $!\n");
                }
                Mark::SectionOf(base) => {
                    let job = with_section(&fs::read_to_string(root().join(base)).unwrap(), &text);
                    fs::create_dir_all(self.folder.path().join("jobs")).unwrap();
                    fs::write(self.folder.path().join("jobs/page.toml"), job).unwrap();
                    text = "coordinator --workers 1 --config jobs/page.toml".to_string();
                }
                Mark::Replace(..) | Mark::Continue | Mark::PyTorch | Mark::Skip(_) => {}
            }
        }
        if block.language == "python" {
            if block.marks.iter().any(|mark| matches!(mark, Mark::Continue)) {
                text = format!("{}\n{text}", self.python.borrow());
            }
            self.python.replace(text.clone());
            text = format!("python3 - <<'PYTHON'\n{text}\nPYTHON");
        }
        let trap = "trap 'echo \"this line failed: $BASH_COMMAND\"' ERR";
        (format!("{before}{trap}\n{text}\n{after}"), set)
    }
}

impl Drop for Folder {
    /// Ends what runs on in the folder.
    fn drop(&mut self) {
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            if fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(self.folder.path())) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}

fn make() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap();
    std::env::split_paths(&path).map(|folder| folder.join("make")).find(|make| make.is_file()).expect("make")
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Makes a folder of pictures of two classes, some of them transparent.
fn pictures(folder: &Path) {
    for (class, name) in ["cats", "dogs"].iter().enumerate() {
        fs::create_dir_all(folder.join(name)).unwrap();
        for number in 0..80_u8 {
            let pixel = |x: u32, y: u32| {
                let mix = |factor: u32| u8::try_from((x * factor + y * u32::from(number)) % 256).unwrap();
                image::Rgba([mix(3), mix(5), mix(7), if number % 2 == 0 { 255 } else { mix(11) }])
            };
            let side = 70 + u32::try_from(class).unwrap();
            let file = folder.join(name).join(format!("{number:04}.png"));
            image::RgbaImage::from_fn(side, side, pixel).save(file).unwrap();
        }
    }
}

/// Returns a job with sections of it replaced or added.
fn with_section(job: &str, sections: &str) -> String {
    let table = |text: &str| text.parse::<toml::Table>().unwrap();
    let mut job = table(job);
    for (name, section) in table(sections) {
        match (job.get_mut(&name), section) {
            (Some(toml::Value::Table(old)), toml::Value::Table(new)) => old.extend(new),
            (_, section) => drop(job.insert(name, section)),
        }
    }
    job.to_string()
}

#[test]
fn every_command_of_the_pages_runs() {
    let folder = Folder::fresh();
    let pytorch = std::env::var_os("GANGLION_PYTORCH").is_some();
    let (mut skipped, mut failed, mut run) = (String::new(), String::new(), 0);
    for block in pages().iter().flat_map(|page| blocks(page)) {
        let why = block.marks.iter().find_map(|mark| match mark {
            Mark::Skip(why) => Some(why.as_str()),
            Mark::PyTorch if !pytorch => Some("needs PyTorch for Python: `make test-pytorch`"),
            _ => None,
        });
        if let Some(why) = why {
            writeln!(skipped, "{}: {why}", block.place).unwrap();
            continue;
        }
        let first = block.text.split_whitespace().next().unwrap_or_default();
        assert!(
            !block.marks.is_empty() || COMMANDS.contains(&first) || block.language == "python",
            "{}: this block does not begin with a command of ours; a mark must say what it is",
            block.place
        );
        let begun = std::time::Instant::now();
        match folder.run(&block) {
            Ok(()) => println!("{}: {:.1} s", block.place, begun.elapsed().as_secs_f64()),
            Err(what) => writeln!(failed, "{}\n{}\n{what}\n", block.place, block.text).unwrap(),
        }
        run += 1;
    }
    println!("{run} blocks were run; not run:\n{skipped}");
    assert!(failed.is_empty(), "these blocks do not run as they are:\n\n{failed}");
}
