//! Circumstances on every page of measurements: date, machine and load.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

use ganglion_proto::clock;
use ganglion_storage::whole;

/// Returns the seconds since the Unix epoch.
pub fn now() -> f64 {
    clock::now()
}

/// Returns the mean number of runnable processes over the last minute.
pub fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_string()
}

/// Returns the current date and time in UTC.
pub fn date() -> String {
    let date = Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]).output();
    date.map(|said| String::from_utf8_lossy(&said.stdout).trim().to_string()).unwrap_or_default()
}

/// Describes this machine's cores.
pub fn machine() -> String {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let value = |name| cpu_value(&cpus, name).unwrap_or("unknown");
    // A virtual machine's name often does not tell the generation.
    let model = format!("{}, family {} model {}", value("model name"), value("cpu family"), value("model"));
    let units = ["avx2", "avx512f", "avx512_bf16", "amx_bf16"];
    let units: Vec<&str> = units.into_iter().filter(|unit| has_unit(&cpus, unit)).collect();
    format!("{} cores of {model} ({})", cores(), units.join(", "))
}

/// Returns the number of processes that can run at once.
pub fn cores() -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    u32::try_from(cores).unwrap_or(u32::MAX)
}

/// Returns the processor time that a process has used, in seconds; 0 once it is gone.
pub fn processor_time(pid: i32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let number = |field: usize| after_name.split_whitespace().nth(field)?.parse::<u32>().ok();
    // Linux counts processor time in hundredths of a second on every machine.
    f64::from(number(11).unwrap_or(0) + number(12).unwrap_or(0)) / 100.0
}

/// Returns the sum of the numbers that a file of a process, such as `status` of `/proc`, lists under these names;
/// `None` once it is gone.
pub fn listed(pid: i32, file: &str, names: &[&str]) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).ok()?;
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    let chosen = lines.filter(|(name, _)| names.contains(name));
    Some(chosen.filter_map(|(_, value)| value.split_whitespace().next()?.parse::<u64>().ok()).sum())
}

/// Whether this machine's CPU has instructions for bf16.
pub fn computes_bf16() -> bool {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    ["avx512_bf16", "amx_bf16"].iter().any(|unit| has_unit(&cpus, unit))
}

fn has_unit(cpus: &str, unit: &str) -> bool {
    cpu_value(cpus, "flags").is_some_and(|flags| flags.split(' ').any(|flag| flag == unit))
}

fn cpu_value<'a>(cpus: &'a str, name: &str) -> Option<&'a str> {
    cpus.lines().find_map(|line| Some(line.strip_prefix(name)?.split_once(": ")?.1.trim()))
}

/// Replaces the generated part of a page, between two lines of it; keeps the parts written by hand.
pub fn write_part(path: &Path, begin: &str, end: &str, part: &str) -> io::Result<()> {
    let page = fs::read_to_string(path)?;
    let (before, after) = around(&page, begin, end)?;
    whole::write(path, format!("{before}{begin}\n\n{part}\n\n{end}{after}").as_bytes())
}

/// Checks that a part can be put into a page, before time is spent on it.
pub fn try_part(path: &Path, begin: &str, end: &str) -> io::Result<()> {
    around(&fs::read_to_string(path)?, begin, end)?;
    whole::try_out(path)
}

/// Returns the text written by hand, before and after a part.
fn around<'a>(page: &'a str, begin: &str, end: &str) -> io::Result<(&'a str, &'a str)> {
    let bounds = page.split_once(begin).and_then(|(before, rest)| Some((before, rest.split_once(end)?.1)));
    bounds.ok_or_else(|| {
        let problem =
            format!("it has no place for generated text: a line `{begin}`, and one `{end}` after it");
        io::Error::new(io::ErrorKind::InvalidData, problem)
    })
}
