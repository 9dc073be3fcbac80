//! Command-line options.

use std::path::PathBuf;

/// Extent of the measurements; 0 leaves a section out.
#[derive(Debug)]
pub(crate) struct Options {
    /// Number of kills of a worker.
    pub kills: u32,
    /// Number of restarts of the coordinator.
    pub restarts: u32,
    /// Seconds for which an undisturbed job is measured.
    pub seconds: u32,
    /// Number of kills of a process of each other trainer.
    pub peer_kills: u32,
    /// Seed of the random moments and victims.
    pub seed: u64,
    /// Page to write the table into.
    pub page: Option<PathBuf>,
    /// Folder with PyTorch and torchft for Python.
    pub python_path: Option<PathBuf>,
    /// Command line of this program.
    pub command: String,
}

impl Options {
    /// Parses `--name value` pairs.
    pub(crate) fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options, String> {
        let mut options = Options {
            kills: 100,
            restarts: 20,
            seconds: 60,
            peer_kills: 5,
            seed: 1,
            page: None,
            python_path: None,
            command: String::new(),
        };
        while let Some(name) = arguments.next() {
            let value = arguments.next().ok_or_else(|| format!("{name}: no value"))?;
            options.set(&name, &value)?;
        }
        let Options { kills, restarts, seed, .. } = options;
        options.command = format!("make bench-recovery KILLS={kills} RESTARTS={restarts} SEED={seed}");
        Ok(options)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let count = || value.parse().map_err(|_| format!("{name} {value}: no count"));
        match name {
            "--kills" => self.kills = count()?,
            "--restarts" => self.restarts = count()?,
            "--seconds" => self.seconds = count()?,
            "--peer-kills" => self.peer_kills = count()?,
            "--seed" => self.seed = count()?.into(),
            "--page" => self.page = Some(value.into()),
            "--python-path" => self.python_path = Some(value.into()),
            _ => return Err(format!("{name}: no such option")),
        }
        Ok(())
    }
}

/// Reproducible random numbers: SplitMix64 of Steele, Lea and Flood (2014).
pub(crate) struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Draws uniformly from [0, 1).
    pub(crate) fn fraction(&mut self) -> f64 {
        f64::from(u32::try_from(self.next() >> 32).unwrap_or_default()) / 4_294_967_296.0
    }

    /// Draws one of the items.
    pub(crate) fn choose<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        let index = self.next() % from.len() as u64;
        &from[usize::try_from(index).expect("an index")]
    }

    /// Sleeps between `least` and `most` seconds.
    pub(crate) fn sleep(&mut self, least: f64, most: f64) {
        let seconds = least + (most - least) * self.fraction();
        std::thread::sleep(std::time::Duration::from_secs_f64(seconds));
    }
}
