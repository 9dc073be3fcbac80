//! Tables of the comparison with PyTorch.

use std::fmt::Write as _;

use ganglion_tests::measured::cores;

use crate::figures::{Figures, Rounds};
use crate::job::Precision;
use crate::rows::{self, Outcome, Row, contenders_in};

/// Rows with their outcomes.
type Results<'a> = [(&'a Row, Outcome)];

/// Formats all tables as Markdown.
pub(crate) fn render(results: &Results<'_>) -> String {
    let steps = [Precision::Fp32, Precision::Bf16].map(|precision| steps(precision, results));
    let tables = steps.into_iter().chain([first_steps(results), efficiencies(results)]);
    let tables: Vec<String> = tables.filter(|table| !table.is_empty()).collect();
    let mut text = tables.join("\n");
    if results.iter().any(|(row, _)| row.job.is_oversubscribed()) {
        let _ = write!(text, "\n(oversubscribed): more workers than this machine's {} cores.\n", cores());
    }
    text
}

fn measured<'a>(results: &'a Results<'_>) -> impl Iterator<Item = (&'a Row, &'a Rounds)> {
    results.iter().filter_map(|(row, outcome)| match outcome {
        Outcome::Measured(rounds) => Some((*row, rounds)),
        Outcome::NotRun(_) => None,
    })
}

fn label(row: &Row) -> String {
    let mark = if row.job.is_oversubscribed() { " (oversubscribed)" } else { "" };
    format!("{}{mark}", row.name())
}

/// Formats the step times in a precision.
fn steps(precision: Precision, results: &Results<'_>) -> String {
    let contenders = contenders_in(precision);
    let mut head = vec![format!("milliseconds a step, {}", precision.name()), "rounds x steps".to_string()];
    head.extend(contenders.iter().map(|contender| contender.name.to_string()));
    for other in &contenders[1..] {
        head.push(format!("against {}", other.name));
        head.extend(other.target.map(|_| "target".to_string()));
    }
    let mut table = Table::new(&head);
    for (row, outcome) in results.iter().filter(|(row, _)| row.job.precision == precision) {
        let mut cells = vec![label(row)];
        match outcome {
            Outcome::NotRun(reason) => cells.push((*reason).to_string()),
            Outcome::Measured(rounds) => {
                cells.push(rounds.extent());
                let step = |contender| format!("{:.1}", rounds.of(contender, Figures::step).median);
                cells.extend((0..contenders.len()).map(step));
                for (place, other) in contenders.iter().enumerate().skip(1) {
                    let ratio = rounds.ratio(place, 0, Figures::step);
                    let verdict = row.target(other).map_or(String::new(), |target| ratio.at_least(target));
                    cells.push(ratio.to_string());
                    cells.extend(other.target.map(|_| verdict));
                }
            }
        }
        table.row(cells);
    }
    table.text()
}

/// Formats the times of first steps, and the memory: for each contender, then against the usual
/// program.
fn first_steps(results: &Results<'_>) -> String {
    let mut table = Table::new(&[
        "",
        "first step, s: ours",
        "usual",
        "tuned",
        "against usual",
        "target",
        "resident, MiB: ours",
        "usual",
        "tuned",
        "of usual",
        "target",
    ]);
    for (row, rounds) in measured(results) {
        let first_step = |figures: &Figures| figures.first_step;
        let resident = |figures: &Figures| figures.resident;
        let faster = rounds.ratio(1, 0, first_step);
        let smaller = rounds.ratio(0, 1, resident);
        let mut cells = vec![label(row)];
        cells.extend([0, 1, 2].map(|contender| format!("{:.2}", rounds.of(contender, first_step).median)));
        cells.extend([faster.to_string(), faster.at_least(rows::FIRST_STEP)]);
        cells.extend([0, 1, 2].map(|contender| format!("{:.0}", rounds.of(contender, resident).median)));
        cells.extend([format!("{:.2}x", smaller.median), smaller.at_most(rows::RESIDENT)]);
        table.row(cells);
    }
    table.text()
}

/// Formats the parallel efficiency: the speed with n workers as a share of n times that of a single
/// one.
fn efficiencies(results: &Results<'_>) -> String {
    let mut table =
        Table::new(&["images/s over workers x images/s of one worker", "ours", "usual DDP", "tuned DDP"]);
    for (row, rounds) in measured(results).filter(|(row, _)| row.job.workers > 1) {
        let is_alone = |other: &Row| {
            other.job.workers == 1
                && (other.job.model, other.job.precision) == (row.job.model, row.job.precision)
        };
        let Some((one, alone)) = measured(results).find(|(other, _)| is_alone(other)) else { continue };
        let efficiency = |contender| {
            let together = row.job.images_per_second(rounds.of(contender, Figures::step).median);
            let single = one.job.images_per_second(alone.of(contender, Figures::step).median);
            format!("{:.2}", together / (f64::from(row.job.workers) * single))
        };
        let mut cells = vec![label(row)];
        cells.extend([0, 1, 2].map(efficiency));
        table.row(cells);
    }
    table.text()
}

/// Table in Markdown; the first column is text.
pub(crate) struct Table {
    columns: usize,
    head: String,
    rows: String,
}

impl Table {
    pub(crate) fn new(head: &[impl AsRef<str>]) -> Table {
        let names: Vec<&str> = head.iter().map(AsRef::as_ref).collect();
        let head = format!("| {} |\n|---|{}\n", names.join(" | "), "---:|".repeat(names.len() - 1));
        Table { columns: names.len(), head, rows: String::new() }
    }

    /// Adds a row; missing cells stay empty.
    pub(crate) fn row(&mut self, mut cells: Vec<String>) {
        cells.resize(self.columns, String::new());
        let _ = writeln!(self.rows, "| {} |", cells.join(" | "));
    }

    /// Formats the table; empty if it has no rows.
    pub(crate) fn text(&self) -> String {
        if self.rows.is_empty() { String::new() } else { format!("{}{}", self.head, self.rows) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::tests::rounds_of;
    use crate::job::MLP;

    #[test]
    fn twice_the_images_in_the_same_time_is_full_efficiency() {
        let (one, two) = (Row::new(MLP, 1), Row::new(MLP.on(2), 1));
        let alone = Outcome::Measured(rounds_of(&[&[10.0, 10.0, 10.0]]));
        let together = Outcome::Measured(rounds_of(&[&[10.0, 20.0, 40.0]]));
        let text = render(&[(&one, alone), (&two, together)]);
        let mark = if two.job.is_oversubscribed() { " (oversubscribed)" } else { "" };
        assert!(text.contains(&format!("| mlp-28, 2 workers{mark} | 1.00 | 0.50 | 0.25 |")), "{text}");
    }

    #[test]
    fn a_row_that_was_not_run_says_why_and_is_in_no_other_table() {
        let row = Row::new(MLP, 1).in_bf16();
        let text = render(&[(&row, Outcome::NotRun("not run: a reason"))]);
        assert!(text.contains("| mlp-28, 1 worker, bf16 | not run: a reason |"), "{text}");
        assert_eq!(text.matches("mlp-28").count(), 1, "{text}");
    }

    #[test]
    fn targets_stand_beside_the_ratio_that_they_are_for() {
        let (fp32, bf16) = (Row::new(MLP, 1).with_targets(3.0, 1.5), Row::new(MLP, 1).with_targets(3.0, 1.5));
        let measured = || Outcome::Measured(rounds_of(&[&[10.0, 20.0, 10.0, 40.0]]));
        let text = render(&[(&fp32, measured()), (&bf16.in_bf16(), measured())]);
        let in_fp32 = "2.00x (2.00-2.00) | 3x: **missed** | 1.00x (1.00-1.00) | 1.5x: **missed** |\n";
        assert!(text.contains(in_fp32), "{text}");
        let in_bf16 =
            "| 2.00x (2.00-2.00) | 1.00x (1.00-1.00) | 1.5x: **missed** | 4.00x (4.00-4.00) | 3x: met |\n";
        assert!(text.contains(in_bf16), "{text}");
    }
}
