//! Log of this process, and its formats.

use std::fmt;

use clap::ValueEnum;
use ganglion_proto::log::{JsonLines, filter};
use ganglion_proto::out;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::records::progress::Screen;

/// Format of logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// An object a line.
    Json,
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        })
    }
}

/// Starts this process's log, on a screen.
pub(crate) fn start_log(screen: &Screen, format: LogFormat) {
    // Progress and messages are not a log; only what is out of the ordinary comes on top of them.
    let filter = filter(LevelFilter::WARN);
    let screen = screen.clone();
    let log = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::TRACE)
        .with_target(false)
        .with_ansi(out::may_colour())
        // A closed terminal would have each line reported once more, to that terminal.
        .log_internal_errors(false)
        .with_writer(move || screen.clone());
    match format {
        LogFormat::Text => log.finish().with(filter).init(),
        LogFormat::Json => log.event_format(JsonLines).finish().with(filter).init(),
    }
}
