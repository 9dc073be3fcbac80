//! Statistics and their formatting.

use std::fmt::Write as _;

use serde_json::Value;

/// Durations in milliseconds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sample(Vec<f64>);

impl Sample {
    /// Creates a sample from seconds; those that are not finite, of moments that never came, are
    /// left out.
    pub(crate) fn new(seconds: impl IntoIterator<Item = f64>) -> Sample {
        let mut all: Vec<f64> = seconds.into_iter().filter(|s| s.is_finite()).map(|s| s * 1000.0).collect();
        all.sort_by(f64::total_cmp);
        Sample(all)
    }

    /// Smallest value that this share of all values does not exceed.
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let rank = (share * self.0.len() as f64).ceil() as usize; // between 0 and the length
        self.0.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
    }

    /// Median in milliseconds.
    pub(crate) fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// Formats a row of a table of spreads; `targets` are shares and the milliseconds that they
    /// must stay under.
    pub(crate) fn row(&self, what: &str, targets: &[(f64, f64)]) -> String {
        let shown: Vec<String> = [0.5, 0.9, 0.99, 1.0].map(|share| ms(self.quantile(share))).to_vec();
        let verdicts: Vec<String> = targets.iter().map(|target| self.verdict(*target)).collect();
        format!("| {what} | {} | {} |", shown.join(" | "), verdicts.join(", "))
    }

    fn verdict(&self, (share, limit): (f64, f64)) -> String {
        let name = if share == 0.5 { "median".to_string() } else { format!("p{:.0}", share * 100.0) };
        let verdict = if self.quantile(share) < limit { "met" } else { "**missed**" };
        format!("{name} < {}: {verdict}", ms(limit))
    }
}

/// Formats the head of a table of spreads.
pub(crate) fn spread_head(what: &str) -> String {
    format!("| {what} | median | p90 | p99 | max | target |\n|---|---|---|---|---|---|")
}

/// Formats milliseconds.
pub(crate) fn ms(milliseconds: f64) -> String {
    match milliseconds {
        none if none.is_nan() => "-".to_string(),
        long if long >= 9999.5 => format!("{:.1} s", long / 1000.0),
        short if short < 9.95 => format!("{short:.1} ms"),
        middle => format!("{middle:.0} ms"),
    }
}

/// Section of the report.
pub(crate) struct Section {
    title: String,
    lines: Vec<String>,
    /// Promises that did not hold.
    pub broken: Vec<String>,
}

impl Section {
    /// Creates an empty section. The load before it shows how busy the machine was with other work.
    pub(crate) fn new(title: &str) -> Section {
        Section { title: title.to_string(), lines: Vec::new(), broken: Vec::new() }
    }

    /// Adds a line.
    pub(crate) fn line(&mut self, line: impl Into<String>) {
        self.lines.push(line.into());
    }

    /// Adds a row that must show zero.
    pub(crate) fn promise_none(&mut self, what: &str, count: u64, of: &str) {
        let verdict = if count == 0 { "kept" } else { "**broken**" };
        self.line(format!("| {what} | {count} {of} | promise: 0, {verdict} |"));
        if count != 0 {
            self.broken.push(format!("{}: {what}: {count} {of}", self.title));
        }
    }

    /// Formats the section as Markdown, which a terminal can show too.
    pub(crate) fn render(&self) -> String {
        let mut text = format!("### {}\n\n", self.title);
        for line in &self.lines {
            let _ = writeln!(text, "{line}");
        }
        text
    }
}

/// Formats the head of a table of single values.
pub(crate) fn value_head(what: &str) -> String {
    format!("| {what} | measured | |\n|---|---|---|")
}

/// Returns a number of a JSON line; NaN if it has none.
pub(crate) fn number(line: &Value, key: &str) -> f64 {
    line[key].as_f64().unwrap_or(f64::NAN)
}

/// Returns a count of a JSON line; 0 if it has none.
pub(crate) fn count(line: &Value, key: &str) -> u64 {
    line[key].as_u64().unwrap_or_default()
}

/// Returns the time of the earliest line that `is` accepts; NaN if there is none.
pub(crate) fn first_time<'a>(lines: impl IntoIterator<Item = &'a Value>, is: impl Fn(&Value) -> bool) -> f64 {
    lines.into_iter().filter(|line| is(line)).map(|line| number(line, "time")).fold(f64::NAN, f64::min)
}
