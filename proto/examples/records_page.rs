//! Prints the reference page of a run's records, docs/records.md.

fn main() {
    print!("{}", ganglion_proto::record::page());
}
