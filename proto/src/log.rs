//! Structured log: one JSON object per line, for log collectors. Messages of a command that are no
//! events of the log take the same form: see [`line!`].
//!
//! 1. Each line has the time (`time`, seconds of Unix time), the level (`level`), the event
//!    (`message` and its own fields), and the place in the run: those of `run`, `term`,
//!    `generation`, `worker`, `rank` and `step` that this process knows.
//! 2. An event's own fields take precedence over the process's: a coordinator passes on its
//!    workers' lines.
//! 3. A line is one write; its only newline is its last byte.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::{clock, printable};

/// Environment variable by which a coordinator has its workers write the structured log.
pub const VARIABLE: &str = "GANGLION_LOG_FORMAT";
/// Option with the same meaning.
const OPTION: &str = "--log-format";
/// Value of both.
const JSON: &str = "json";

/// Whether this process's messages are objects.
static STRUCTURED: AtomicBool = AtomicBool::new(false);

/// Fields that place this process in the run.
static PLACE: RwLock<BTreeMap<&str, Value>> = RwLock::new(BTreeMap::new());

/// Sets a field that every line has from now on, such as `generation`.
pub fn note(key: &'static str, value: impl Into<Value>) {
    // Held for one insertion; a formatter waits no longer than that.
    PLACE.write().unwrap_or_else(PoisonError::into_inner).insert(key, value.into());
}

/// Sets whether this process's messages are objects.
pub fn structure(is_structured: bool) {
    STRUCTURED.store(is_structured, Ordering::Relaxed);
}

/// Whether this process's messages are objects.
pub fn is_structured() -> bool {
    STRUCTURED.load(Ordering::Relaxed)
}

/// Value of [`VARIABLE`] for a process that this one starts.
pub fn format() -> &'static str {
    if is_structured() { JSON } else { "text" }
}

/// Whether the environment or the command line asks for the structured log. For the messages about
/// a command line that cannot be parsed.
pub fn is_asked_for() -> bool {
    is_asked_by(
        std::env::args_os().map(|word| word.to_string_lossy().into_owned()),
        std::env::var(VARIABLE).ok(),
    )
}

fn is_asked_by(words: impl Iterator<Item = String>, variable: Option<String>) -> bool {
    let words: Vec<String> = words.collect();
    let mut given = words.iter().enumerate().filter_map(|(at, word)| match word.strip_prefix(OPTION) {
        Some("") => words.get(at + 1).map(String::as_str),
        Some(rest) => rest.strip_prefix('='),
        None => None,
    });
    given.next().map(str::to_string).or(variable).is_some_and(|format| format == JSON)
}

/// Renders a message: an object of the structured log, or a line for people.
pub fn line(level: Level, message: &str) -> String {
    if is_structured() {
        return Value::Object(object(level, |line| drop(line.insert("message".to_string(), message.into()))))
            .to_string();
    }
    let prefix = match level {
        Level::ERROR => ERROR,
        Level::WARN => WARNING,
        _ => "",
    };
    format!("{prefix}{}", printable(message))
}

/// Renders a message whose first word may be its level, such as `warning: ...`.
pub fn message(text: &str) -> String {
    if is_structured() {
        let (level, message) = split(text);
        return line(level, message);
    }
    printable(text).into_owned()
}

/// Splits a line for people into the level that it begins with, and the message.
fn split(line: &str) -> (Level, &str) {
    match (line.strip_prefix(ERROR), line.strip_prefix(WARNING)) {
        (Some(message), _) => (Level::ERROR, message),
        (_, Some(message)) => (Level::WARN, message),
        // An alarm keeps its word, since its name follows it.
        _ if line.starts_with("alarm: ") => (Level::WARN, line),
        _ => (Level::INFO, line),
    }
}

/// Begin of a line for people that tells of an error.
const ERROR: &str = "error: ";
/// Begin of a line for people that tells of a warning.
const WARNING: &str = "warning: ";

/// Environment variable that says which events are logged, such as `info` or `warn,ganglion_worker=debug`.
const FILTER: &str = "RUST_LOG";

/// Filter of this process's log: that of the environment, or this level where it has none that can be read.
pub fn filter(default: LevelFilter) -> Targets {
    let wanted = std::env::var(FILTER).ok().and_then(|text| text.parse().ok());
    wanted.unwrap_or_else(|| Targets::new().with_default(default))
}

/// Formatter that writes each event as a line of the structured log.
pub struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let line = object(*event.metadata().level(), |line| event.record(&mut Fields(line)));
        // JSON escapes newlines in texts, so the one at the end is the only one (invariant 3).
        writeln!(writer, "{}", Value::Object(line))
    }
}

/// Fields of a line: those of every line, and what `fill` adds.
fn object(level: Level, fill: impl FnOnce(&mut Map<String, Value>)) -> Map<String, Value> {
    let mut line = Map::new();
    line.insert("time".to_string(), clock::now().into());
    line.insert("level".to_string(), level.to_string().into());
    // Before the process's own fields, so that the event's win (invariant 2).
    fill(&mut line);
    let place = PLACE.read().unwrap_or_else(PoisonError::into_inner);
    for (key, value) in &*place {
        // A worker's line that the coordinator passes on has its own rank and step.
        if !line.contains_key(*key) {
            line.insert(key.to_string(), value.clone());
        }
    }
    line
}

/// Visitor that collects an event's fields.
struct Fields<'a>(&'a mut Map<String, Value>);

impl Fields<'_> {
    fn take(&mut self, field: &Field, value: impl Into<Value>) {
        self.0.insert(field.name().to_string(), value.into());
    }
}

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Of a type that has no other form here: the words of its `Debug`.
        self.take(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.take(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.take(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.take(field, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.take(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.take(field, value);
    }
}

/// Line of the structured log, reduced to the fields that a process needs to pass it on.
pub struct Line {
    /// Level of the event.
    pub level: String,
    /// Text of the event.
    pub message: String,
    /// Id of the worker; `None` if the line has none.
    pub worker: Option<u64>,
    /// Rank of the worker.
    pub rank: Option<u64>,
    /// Generation of the worker.
    pub generation: Option<u64>,
    /// Step of the worker.
    pub step: Option<u64>,
}

/// Parses a line of the structured log; `None` for any other text.
pub fn parse(line: &str) -> Option<Line> {
    // A worker's output may hold lines of libraries, which are passed on as they are.
    let fields: Map<String, Value> = serde_json::from_str(line).ok()?;
    let text = |key: &str| fields.get(key)?.as_str().map(str::to_string);
    let number = |key: &str| fields.get(key)?.as_u64();
    Some(Line {
        level: text("level")?,
        message: text("message")?,
        worker: number("worker"),
        rank: number("rank"),
        generation: number("generation"),
        step: number("step"),
    })
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(log: impl FnOnce()) -> String {
        let written = Written::default();
        let to = written.clone();
        let subscriber =
            tracing_subscriber::fmt().event_format(JsonLines).with_writer(move || to.clone()).finish();
        tracing::subscriber::with_default(subscriber, log);
        String::from_utf8(written.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn a_line_says_where_in_the_run_it_was_and_can_be_passed_on() {
        note("run", "mnist-mlp");
        note("rank", 1);
        let text = logged(|| tracing::warn!(worker = 7, step = 12, delayed = true, "two\nlines"));
        assert_eq!(text.matches('\n').count(), 1, "{text}");
        let line: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (&line["run"], &line["rank"], &line["delayed"]),
            (&"mnist-mlp".into(), &1.into(), &true.into())
        );
        assert!(line["time"].as_f64().unwrap() > 1e9);
        let line = parse(text.trim_end()).unwrap();
        assert_eq!((line.level.as_str(), line.message.as_str()), ("WARN", "two\nlines"));
        assert_eq!((line.worker, line.rank, line.step, line.generation), (Some(7), Some(1), Some(12), None));
    }

    #[test]
    fn an_events_own_fields_go_before_what_the_process_knows() {
        note("rank", 1);
        let text = logged(|| tracing::info!(rank = 3, "passed on"));
        assert_eq!(parse(&text).unwrap().rank, Some(3));
    }

    #[test]
    fn a_command_line_asks_before_it_is_parsed() {
        let asks = |line: &str, variable: Option<&str>| {
            is_asked_by(line.split(' ').map(str::to_string), variable.map(str::to_string))
        };
        assert!(asks("worker sample --log-format json", None) && asks("worker --log-format=json x", None));
        assert!(asks("worker", Some("json")) && !asks("worker --log-format text", Some("json")));
        assert!(!asks("worker json", None) && !asks("worker --log-formats=json --log-format", None));
    }

    #[test]
    fn a_message_is_a_line_for_people_and_splits_into_level_and_words() {
        for (level, text) in [(Level::ERROR, "error: x"), (Level::WARN, "warning: x"), (Level::INFO, "x")] {
            assert_eq!((line(level, "x").as_str(), split(text)), (text, (level, "x")));
        }
        assert_eq!(split("alarm: collapse"), (Level::WARN, "alarm: collapse"));
    }

    #[test]
    fn other_text_is_not_taken_for_a_line() {
        assert!(
            parse("WARN something").is_none() && parse("{\"level\":1}").is_none() && parse("[]").is_none()
        );
    }
}
