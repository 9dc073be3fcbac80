//! Command-line options.

use std::path::PathBuf;

/// Command-line options.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Options {
    /// Commit to compare with.
    pub base: Option<String>,
    /// Folder of that commit's programs, if they are built already.
    pub base_programs: Option<PathBuf>,
    /// Text that the names of the jobs must contain.
    pub only: Option<String>,
}

impl Options {
    /// Parses `--name value` pairs.
    pub(crate) fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options, String> {
        let mut options = Options::default();
        while let Some(name) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{name}: no value"));
            match name.as_str() {
                "--base" => options.base = Some(value()?),
                "--base-programs" => options.base_programs = Some(value()?.into()),
                "--only" => options.only = Some(value()?),
                _ => return Err(format!("{name}: there are --base, --base-programs and --only")),
            }
        }
        if options.base.is_some() && options.base_programs.is_some() {
            return Err("--base and --base-programs: keep one of them".to_string());
        }
        Ok(options)
    }
}
