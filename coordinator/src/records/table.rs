//! Plain-text tables.

use std::fmt;
use std::time::Duration;

use indicatif::{HumanBytes, HumanDuration};

use crate::system::clock::now;

/// Rows under headings. A column is as wide as necessary; numbers are aligned to the right, texts,
/// whose heading begins with `<`, to the left.
pub(crate) struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

struct Column {
    heading: String,
    to_the_left: bool,
}

impl Table {
    /// Creates a table without rows.
    pub(crate) fn new(headings: &[&str]) -> Table {
        let column = |heading: &&str| Column {
            heading: heading.trim_start_matches('<').to_string(),
            to_the_left: heading.starts_with('<'),
        };
        Table { columns: headings.iter().map(column).collect(), rows: Vec::new() }
    }

    /// Adds a row, one cell per column.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<String> = cells.into_iter().collect();
        debug_assert_eq!(cells.len(), self.columns.len(), "a row has a cell a column");
        self.rows.push(cells);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let headings: Vec<String> = self.columns.iter().map(|column| column.heading.clone()).collect();
        let lines: Vec<&Vec<String>> = std::iter::once(&headings).chain(&self.rows).collect();
        let width = |at: usize| lines.iter().map(|cells| cells[at].chars().count()).max().unwrap_or_default();
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        for (number, cells) in lines.iter().enumerate() {
            let cells = cells.iter().zip(&widths).zip(&self.columns);
            let cells = cells.map(|((cell, width), column)| match column.to_the_left {
                true => format!("{cell:<width$}"),
                false => format!("{cell:>width$}"),
            });
            let line = cells.collect::<Vec<_>>().join("  ");
            let end = if number + 1 == lines.len() { "" } else { "\n" };
            write!(f, "{}{end}", line.trim_end())?;
        }
        Ok(())
    }
}

/// Renders the age of a Unix time in seconds.
pub(crate) fn ago(time: f64) -> String {
    let elapsed = Duration::try_from_secs_f64(now() - time).unwrap_or_default();
    format!("{} ago", HumanDuration(elapsed))
}

/// Renders a number of bytes with its unit.
pub(crate) fn size(bytes: u64) -> String {
    HumanBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let mut table = Table::new(&["<name", "step"]);
        table.row(["a".to_string(), "10".to_string()]);
        table.row(["longer".to_string(), "2".to_string()]);
        assert_eq!(table.to_string(), "name    step\na         10\nlonger     2");
    }
}
