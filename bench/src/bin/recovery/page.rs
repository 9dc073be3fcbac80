//! Page with the tables.

use std::io;
use std::path::Path;

use ganglion_tests::measured::{date, machine, try_part, write_part};

use crate::figures::Section;
use crate::options::Options;

const BEGIN: &str = "<!-- Written by `make bench-recovery`; changes below this line are lost. -->";
const END: &str = "<!-- Written by hand again. -->";

/// Formats the generated part.
pub(crate) fn render(options: &Options, sections: &[Section]) -> String {
    let parts: Vec<String> = sections.iter().map(Section::render).collect();
    format!(
        "Measured {} on {}, by `{}`.\n\n{}",
        date(),
        machine(),
        options.command,
        parts.join("\n").trim_end()
    )
}

/// Checks that the generated part can be put into a page.
pub(crate) fn try_out(path: &Path) -> io::Result<()> {
    try_part(path, BEGIN, END)
}

/// Replaces the generated part of a page and keeps the parts written by hand.
pub(crate) fn write(path: &Path, part: &str) -> io::Result<()> {
    write_part(path, BEGIN, END, part)
}
