//! Command-line options.

use std::path::PathBuf;

/// Parts of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Part {
    /// Ganglion against PyTorch.
    Rows,
    /// Cost of the promise.
    Promise,
    /// Growth of the cost with jobs and clusters.
    Growth,
    /// Loss curves against PyTorch's.
    Losses,
    /// Packages against PyTorch and built-in models.
    Packages,
}

impl Part {
    pub(crate) const ALL: [Part; 5] = [Part::Rows, Part::Promise, Part::Growth, Part::Losses, Part::Packages];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Part::Rows => "rows",
            Part::Promise => "promise",
            Part::Growth => "growth",
            Part::Losses => "losses",
            Part::Packages => "packages",
        }
    }

    /// Returns the file name of the part's picture; `None` without one.
    pub(crate) fn picture(self) -> Option<&'static str> {
        match self {
            Part::Rows | Part::Promise | Part::Packages => None,
            Part::Growth => Some("growth.svg"),
            Part::Losses => Some("bench-losses.svg"),
        }
    }
}

/// Command-line options.
#[derive(Debug)]
pub(crate) struct Options {
    /// Parts to measure, in this order.
    pub parts: Vec<Part>,
    /// Texts of which a measurement's name must contain one, in parts whose measurements have
    /// names.
    pub only: Vec<String>,
    /// Number of runs of each contender; 0 for the usual number.
    pub rounds: usize,
    /// Number of steps of each run; 0 for the usual number.
    pub steps: u64,
    /// Whether bf16 is measured also on a CPU that computes it in software.
    pub is_bf16_forced: bool,
    /// Folder with PyTorch for Python.
    pub python_path: PathBuf,
    /// Page to write into.
    pub page: Option<PathBuf>,
    /// Folder for the pictures.
    pub pictures: Option<PathBuf>,
}

impl Options {
    /// Parses parts (`--rows`) and `--name value` pairs. Without parts all are measured, or the
    /// rows if only some measurements are asked for.
    pub(crate) fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options, String> {
        let mut options = Options {
            parts: Vec::new(),
            only: Vec::new(),
            rounds: 0,
            steps: 0,
            is_bf16_forced: false,
            python_path: ".tools/bench".into(),
            page: None,
            pictures: None,
        };
        while let Some(name) = arguments.next() {
            let part = name.strip_prefix("--").and_then(|part| Part::ALL.iter().find(|p| p.name() == part));
            match part {
                Some(part) => options.parts.push(*part),
                None if name == "--bf16" => options.is_bf16_forced = true,
                None => options.set(&name, arguments.next())?,
            }
        }
        if options.parts.is_empty() {
            options.parts = if options.only.is_empty() { Part::ALL.to_vec() } else { vec![Part::Rows] };
        }
        Ok(options)
    }

    fn set(&mut self, name: &str, value: Option<String>) -> Result<(), String> {
        let known = ["--only", "--rounds", "--steps", "--python-path", "--page", "--pictures"];
        if !known.contains(&name) {
            let parts = Part::ALL.map(|part| format!("--{}", part.name())).join(", ");
            return Err(format!("{name}: no such option; there are {parts}, --bf16, {}", known.join(", ")));
        }
        let value = value.ok_or_else(|| format!("{name}: no value"))?;
        let no_count = |_| format!("{name} {value}: no count");
        match name {
            "--rounds" => self.rounds = value.parse().map_err(no_count)?,
            "--steps" => self.steps = value.parse().map_err(no_count)?,
            "--only" => self.only.push(value),
            "--python-path" => self.python_path = value.into(),
            "--page" => self.page = Some(value.into()),
            _ => self.pictures = Some(value.into()),
        }
        Ok(())
    }

    /// Returns those of `all` that the options ask for, by their names.
    pub(crate) fn wanted<T>(&self, all: Vec<T>, name: impl Fn(&T) -> String) -> Result<Vec<T>, String> {
        let is_wanted = |one: &T| self.only.iter().any(|only| name(one).contains(only.as_str()));
        let names: Vec<String> = all.iter().map(&name).collect();
        let wanted: Vec<T> = all.into_iter().filter(|one| self.only.is_empty() || is_wanted(one)).collect();
        if wanted.is_empty() {
            return Err(format!("--only: none is called so; there are:\n{}", names.join("\n")));
        }
        Ok(wanted)
    }

    /// Returns the number of runs of each contender, given the usual number.
    pub(crate) fn rounds(&self, usual: usize) -> usize {
        if self.rounds > 0 { self.rounds } else { usual }
    }

    /// Returns the command that measures one part with these options.
    pub(crate) fn command(&self, part: Part) -> String {
        let mut words = vec![format!("target/release/bench --{}", part.name())];
        words.extend(self.only.iter().map(|only| format!("--only {only:?}")));
        words.extend((self.rounds > 0).then(|| format!("--rounds {}", self.rounds)));
        words.extend((self.steps > 0).then(|| format!("--steps {}", self.steps)));
        words.extend(self.is_bf16_forced.then(|| "--bf16".to_string()));
        words.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Options, String> {
        Options::parse(arguments.iter().map(ToString::to_string))
    }

    #[test]
    fn all_parts_are_meant_unless_some_are_named() {
        assert_eq!(parse(&[]).unwrap().parts, Part::ALL);
        assert_eq!(parse(&["--losses", "--rows"]).unwrap().parts, [Part::Losses, Part::Rows]);
        assert_eq!(parse(&["--only", "mlp-28"]).unwrap().parts, [Part::Rows]);
        assert_eq!(parse(&["--only", "mlp-28", "--promise"]).unwrap().parts, [Part::Promise]);
    }

    #[test]
    fn wrong_options_are_named() {
        assert!(parse(&["--row"]).unwrap_err().starts_with("--row: no such option"));
        assert_eq!(parse(&["--rounds"]).unwrap_err(), "--rounds: no value");
        assert_eq!(parse(&["--steps", "few"]).unwrap_err(), "--steps few: no count");
    }

    #[test]
    fn only_selects_by_parts_of_names() {
        let wanted = |only: &[&str]| {
            let options = parse(only).unwrap();
            options.wanted(vec!["mlp-28, 1", "mlp-28, 2", "dcgan-28, 1"], ToString::to_string)
        };
        assert_eq!(wanted(&[]).unwrap().len(), 3);
        assert_eq!(
            wanted(&["--only", "mlp-28, 2", "--only", "dcgan"]).unwrap(),
            ["mlp-28, 2", "dcgan-28, 1"]
        );
        assert!(wanted(&["--only", "gpt"]).unwrap_err().contains("dcgan-28, 1"));
    }

    #[test]
    fn a_part_tells_how_to_measure_it_again() {
        let options = parse(&["--only", "mlp-28, 1", "--rounds", "2", "--bf16", "--page", "x.md"]).unwrap();
        let command = "target/release/bench --rows --only \"mlp-28, 1\" --rounds 2 --bf16";
        assert_eq!(options.command(Part::Rows), command);
    }
}
