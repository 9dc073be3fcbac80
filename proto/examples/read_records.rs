//! Reads the records of a run, while it goes on or later: its metrics, and how often its group changed.
//!
//!     cargo run --release -p ganglion-proto --example read_records -- runs/mnist-mlp

use std::error::Error;
use std::fs;
use std::path::PathBuf;

use ganglion_proto::record::MetricsRow;
use serde_json::Value;

/// The complete lines of a file: the last one may be incomplete while the run goes on.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.split_inclusive('\n').filter(|line| line.ends_with('\n'))
}

fn main() -> Result<(), Box<dyn Error>> {
    let run = PathBuf::from(std::env::args().nth(1).ok_or("name a run directory, such as runs/mnist-mlp")?);
    let metrics = fs::read_to_string(run.join("metrics.jsonl"))?;
    println!("{:>8} {:>12} {:>12}  scalars", "step", "images seen", "images/s");
    for line in lines(&metrics) {
        let row: MetricsRow = serde_json::from_str(line)?;
        let scalars: Vec<String> =
            row.scalars.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        println!(
            "{:>8} {:>12} {:>12.0}  {}",
            row.step,
            row.images_seen,
            row.images_per_second,
            scalars.join(", ")
        );
    }
    let events = fs::read_to_string(run.join("events.jsonl"))?;
    let events = lines(&events).map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
    for formed in events.iter().filter(|event| event["kind"] == "generation_formed") {
        println!("generation {}: {} workers", formed["generation"], formed["world_size"]);
    }
    Ok(())
}
