//! The page of the table.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

use crate::figures::Section;
use crate::options::Options;

const BEGIN: &str = "<!-- Written by `make bench-recovery`; changes below this line are lost. -->";
const END: &str = "<!-- Written by hand again. -->";

/// The generated part.
pub fn render(options: &Options, sections: &[Section]) -> String {
    let parts: Vec<String> = sections.iter().map(Section::render).collect();
    format!(
        "Measured {} on {}, by `{}`.\n\n{}",
        date(),
        machine(),
        options.command,
        parts.join("\n").trim_end()
    )
}

/// Puts the generated part into a page and leaves what is written by hand.
pub fn write(path: &Path, part: &str) -> io::Result<()> {
    let page = fs::read_to_string(path)?;
    let bounds = page.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let Some((before, after)) = bounds else {
        let problem = "it has no place for generated text";
        return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
    };
    fs::write(path, format!("{before}{BEGIN}\n\n{part}\n\n{END}{after}"))
}

fn date() -> String {
    let date = Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]).output();
    date.map(|said| String::from_utf8_lossy(&said.stdout).trim().to_string()).unwrap_or_default()
}

fn machine() -> String {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{cores} cores of {}", model.map_or("an unknown CPU", |(_, name)| name.trim()))
}
