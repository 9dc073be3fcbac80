//! One job in one precision, run on all clusters by both builds.

use std::path::Path;
use std::sync::Mutex;
use std::thread;

use ganglion_tests::measured::cores;

use crate::Builds;
use crate::bits::Bits;
use crate::job::{Job, Outcome, Precision, Way};

/// Comparison of one job in one precision.
#[derive(Debug, Default)]
pub(crate) struct Row {
    /// Result of each way in a word.
    pub cells: [&'static str; Way::ALL.len()],
    /// Number of shard gradients that were compared.
    pub gradients: String,
    /// Differences of this build's bits from the base's.
    pub differences: Vec<String>,
    /// Runs that give no bits to compare, and clusters of this build that change the result.
    pub failures: Vec<String>,
}

/// Outcomes of a job in one way: the base's, then this tree's.
type Pair = [Result<Outcome, String>; 2];

/// Runs a job in all its ways with both builds, as many at once as there are cores.
pub(crate) fn run(job: &Job, precision: Precision, builds: &Builds) -> Row {
    let ways = job.ways(precision);
    let runs: Vec<(Way, &Path)> =
        ways.iter().flat_map(|way| [(*way, &*builds.base), (*way, &*builds.here)]).collect();
    let next = Mutex::new(0..runs.len());
    let take = || next.lock().expect("no thread panics while it holds it").next();
    let work = || {
        let mut own = Vec::new();
        while let Some(at) = take() {
            let (way, programs) = runs[at];
            own.push((at, job.run(precision, way, programs)));
        }
        own
    };
    let mut outcomes = thread::scope(|scope| {
        let threads: Vec<_> = (0..cores()).map(|_| scope.spawn(work)).collect();
        let joined = threads.into_iter().flat_map(|thread| thread.join().expect("a run does not panic"));
        joined.collect::<Vec<_>>()
    });
    outcomes.sort_by_key(|(at, _)| *at);
    let mut outcomes = outcomes.into_iter().map(|(_, outcome)| outcome);
    let mut next = || outcomes.next().expect("two for each way");
    let pairs = ways.iter().map(|way| (*way, [next(), next()])).collect::<Vec<(Way, Pair)>>();
    judge(&format!("{}, {}", job.name, precision.name()), &pairs)
}

fn judge(name: &str, pairs: &[(Way, Pair)]) -> Row {
    let mut row = Row::default();
    let mut first: Option<(Way, &Bits)> = None;
    for (way, pair) in pairs {
        let of = |what: &str| format!("{name}, {}: {what}", way.name());
        row.cells[*way as usize] = match pair {
            [Err(error), _] => row.fails(of(&format!("the base {error}"))),
            [_, Err(error)] => row.fails(of(error)),
            [Ok(Outcome::Refused(_)), Ok(Outcome::Refused(reason))] if reason.contains("job.precision") => {
                "not in it"
            }
            [Ok(Outcome::Refused(_)), Ok(Outcome::Done(_))] => "new",
            [_, Ok(Outcome::Refused(reason))] => row.fails(of(&format!("this build refuses it: {reason}"))),
            [Ok(Outcome::Done(base)), Ok(Outcome::Done(here))] => {
                row.gradients = match base.gradients.len() {
                    0 => "not logged by the base".to_string(),
                    count => format!("{count}"),
                };
                here.difference(base).map_or("equal", |what| row.differs(of(&what)))
            }
        };
        let [_, Ok(Outcome::Done(here))] = pair else { continue };
        let (reference, bits) = *first.get_or_insert((*way, here));
        if let Some(what) = here.difference(bits) {
            let against = format!("{name}, {} against {} of this build", way.name(), reference.name());
            row.cells[*way as usize] = row.fails(format!("{against}: {what}"));
        }
    }
    row
}

impl Row {
    fn differs(&mut self, what: String) -> &'static str {
        self.differences.push(what);
        "DIFFERENT"
    }

    fn fails(&mut self, what: String) -> &'static str {
        self.failures.push(what);
        "FAILED"
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn done(digest: &str) -> Result<Outcome, String> {
        Ok(Outcome::Done(Bits { digest: digest.to_string(), gradients: BTreeMap::new() }))
    }

    fn refused(why: &str) -> Result<Outcome, String> {
        Ok(Outcome::Refused(why.to_string()))
    }

    #[test]
    fn equal_bits_are_no_difference() {
        let row = judge("job", &[(Way::Alone, [done("a"), done("a")]), (Way::Three, [done("a"), done("a")])]);
        assert_eq!((row.cells, row.differences), (["equal", "equal", ""], Vec::new()));
    }

    #[test]
    fn a_change_that_all_clusters_make_alike_is_named_for_each() {
        let row = judge("job", &[(Way::Alone, [done("a"), done("b")]), (Way::Three, [done("a"), done("b")])]);
        assert_eq!(row.cells, ["DIFFERENT", "DIFFERENT", ""]);
        assert!(row.differences[0].starts_with("job, 1 worker: digest b instead of a"), "{row:?}");
    }

    #[test]
    fn a_cluster_that_changes_the_result_is_named_even_if_the_base_did_not_run() {
        let base = || refused("no such option");
        let row = judge("job", &[(Way::Alone, [base(), done("a")]), (Way::Three, [base(), done("b")])]);
        assert_eq!(row.cells, ["new", "FAILED", ""]);
        assert!(row.failures[0].starts_with("job, 3 workers against 1 worker of this build"), "{row:?}");
    }

    #[test]
    fn a_job_may_be_refused_by_both_for_its_precision_alone() {
        let both = |why| judge("job", &[(Way::Alone, [refused(why), refused(why)])]);
        assert_eq!(both("job.precision is not for it").failures.len(), 0);
        assert_eq!(both("no such option").failures.len(), 1);
        let row = judge("job", &[(Way::Alone, [done("a"), refused("job.precision")])]);
        assert_eq!(row.failures.len(), 1);
    }
}
