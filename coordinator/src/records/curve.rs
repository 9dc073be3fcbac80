//! A run's curves at every resolution, in bounded memory.
//!
//! 1. Level k holds the newest 2,048 buckets of 4^k steps, and the coarsest level all of the run.
//!    Adding a row and reading a range cost a bounded amount of work, however long the run is.
//! 2. A late row enters the bucket of its step; a level that has dropped that bucket leaves the row
//!    to the coarser ones.
//! 3. Values that are not finite, or were not recorded, are left out of means and bounds.

use std::collections::VecDeque;

/// Maximum number of series; those that appear later are left out.
const MOST_SERIES: usize = 128;
/// Maximum number of buckets of a level.
// No fewer than the dashboard asks for at once (`POINTS` in api/http/pages.rs).
const KEPT: usize = 2048;
/// Number of buckets of a level that make one of the next.
const FOLD: u64 = 4;

/// Summary of the rows in a range of steps.
#[derive(Clone, Debug)]
pub struct Bucket {
    /// Newest step in the bucket.
    pub step: u64,
    /// Time of that step's commit.
    pub time: f64,
    /// One summary per series, in the order of [`Curve::names`]; a series that appeared later has
    /// none.
    pub series: Vec<Summary>,
}

/// Summary of one series in a bucket.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    sum: f64,
    count: u64,
    /// Minimum; infinite if there is no value.
    pub low: f64,
    /// Maximum; negative infinite if there is no value.
    pub high: f64,
}

impl Summary {
    fn of(value: f64) -> Summary {
        let value = Some(value).filter(|value| value.is_finite());
        Summary {
            sum: value.unwrap_or(0.0),
            count: value.is_some().into(),
            low: value.unwrap_or(f64::INFINITY),
            high: value.unwrap_or(f64::NEG_INFINITY),
        }
    }

    fn add(&mut self, other: &Summary) {
        self.sum += other.sum;
        self.count += other.count;
        self.low = self.low.min(other.low);
        self.high = self.high.max(other.high);
    }

    /// Mean; `None` if there is no value.
    pub fn mean(&self) -> Option<f64> {
        #[allow(clippy::cast_precision_loss)] // counts of rows are far below 2^53
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

impl Bucket {
    fn add(&mut self, other: &Bucket) {
        if other.step > self.step {
            (self.step, self.time) = (other.step, other.time);
        }
        if self.series.len() < other.series.len() {
            self.series.resize(other.series.len(), Summary::of(f64::NAN));
        }
        self.series.iter_mut().zip(&other.series).for_each(|(summary, other)| summary.add(other));
    }
}

/// Buckets of one width, each with its index: its first step divided by the width.
#[derive(Debug)]
struct Level {
    width: u64,
    buckets: VecDeque<(u64, Bucket)>,
}

impl Level {
    fn add(&mut self, bucket: &Bucket) {
        let index = bucket.step / self.width;
        let place = match self.buckets.back() {
            // A row of a bucket that is there, or a late one. All others go to the end, without a
            // search.
            Some((last, _)) if *last >= index => self.buckets.partition_point(|(known, _)| *known < index),
            _ => self.buckets.len(),
        };
        match self.buckets.get_mut(place) {
            Some((known, there)) if *known == index => there.add(bucket),
            _ => self.buckets.insert(place, (index, bucket.clone())),
        }
    }
}

/// All curves of a run. See the module documentation.
#[derive(Debug)]
pub(crate) struct Curve {
    names: Vec<String>,
    levels: Vec<Level>,
}

impl Default for Curve {
    fn default() -> Self {
        Curve { names: Vec::new(), levels: vec![Level { width: 1, buckets: VecDeque::new() }] }
    }
}

impl Curve {
    /// Names of the series, in the order in which they appeared.
    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    /// Adds the named values of a step that was committed at `time`, in seconds of Unix time. Each
    /// step must be added once.
    pub(crate) fn add<'a>(&mut self, step: u64, time: f64, values: impl Iterator<Item = (&'a str, f64)>) {
        let mut series = vec![Summary::of(f64::NAN); self.names.len()];
        for (name, value) in values {
            match self.names.iter().position(|known| known == name) {
                Some(place) => series[place] = Summary::of(value),
                None if self.names.len() < MOST_SERIES => {
                    self.names.push(name.to_string());
                    series.push(Summary::of(value));
                }
                None => {}
            }
        }
        let bucket = Bucket { step, time, series };
        let coarsest = self.levels.len() - 1;
        for (at, level) in self.levels.iter_mut().enumerate() {
            // A finer level has dropped that bucket: a new one with this row alone would be wrong (2).
            let gone = at < coarsest
                && level.buckets.front().is_some_and(|(first, _)| *first > bucket.step / level.width);
            if !gone {
                level.add(&bucket);
            }
        }
        // Before buckets are dropped: the new level must be made of all rows.
        if self.levels[coarsest].buckets.len() > KEPT {
            self.grow();
        }
        for level in &mut self.levels {
            while level.buckets.len() > KEPT {
                level.buckets.pop_front();
            }
        }
    }

    /// Adds a level that is coarser than the coarsest one and holds the same rows.
    fn grow(&mut self) {
        let Some(coarsest) = self.levels.last() else { return };
        let mut next = Level { width: coarsest.width.saturating_mul(FOLD), buckets: VecDeque::new() };
        coarsest.buckets.iter().for_each(|(_, bucket)| next.add(bucket));
        self.levels.push(next);
    }

    /// Rows from a step on, as at most `points` + 1 buckets, oldest first.
    pub(crate) fn since(&self, from: u64, points: usize) -> Vec<Bucket> {
        let reaches = |level: &&Level| {
            level.buckets.len() < KEPT
                || level.buckets.front().is_some_and(|(first, _)| first * level.width <= from)
        };
        // The finest level that still has the first step asked for.
        let Some(level) = self.levels.iter().find(reaches).or(self.levels.last()) else { return Vec::new() };
        let start = level.buckets.partition_point(|(_, bucket)| bucket.step < from);
        let (Some((first, _)), Some((last, _))) = (level.buckets.get(start), level.buckets.back()) else {
            return Vec::new();
        };
        // By the index and not by the place, so that a bucket does not change its bounds when a row
        // is added.
        let fold = ((last - first + 1).div_ceil(points.max(1) as u64)).max(1).next_power_of_two();
        let mut merged: Vec<(u64, Bucket)> = Vec::new();
        for (index, bucket) in level.buckets.range(start..) {
            match merged.last_mut() {
                Some((known, there)) if *known == index / fold => there.add(bucket),
                _ => merged.push((index / fold, bucket.clone())),
            }
        }
        merged.into_iter().map(|(_, bucket)| bucket).collect()
    }

    /// Newest step; `None` before the first row.
    #[cfg(test)]
    pub(crate) fn last_step(&self) -> Option<u64> {
        self.levels.first()?.buckets.back().map(|(_, bucket)| bucket.step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[allow(clippy::cast_precision_loss)]
    fn add(curve: &mut Curve, step: u64, value: f64) {
        curve.add(step, step as f64, [("a", value)].into_iter());
    }

    fn curve(steps: impl Iterator<Item = u64>) -> Curve {
        let mut curve = Curve::default();
        #[allow(clippy::cast_precision_loss)]
        steps.for_each(|step| add(&mut curve, step, step as f64));
        curve
    }

    fn steps(buckets: &[Bucket]) -> Vec<u64> {
        buckets.iter().map(|bucket| bucket.step).collect()
    }

    #[test]
    fn a_short_run_is_told_row_by_row() {
        let curve = curve((1..=50).map(|row| row * 10));
        assert_eq!(steps(&curve.since(0, 1000)), (1..=50).map(|row| row * 10).collect::<Vec<_>>());
        assert_eq!(steps(&curve.since(481, 1000)), [490, 500]);
        assert!(curve.since(501, 10).is_empty());
        assert!(Curve::default().since(0, 10).is_empty());
    }

    /// Invariant 1: nothing is left out, nothing grows.
    #[test]
    fn a_long_run_is_whole_in_few_buckets() {
        let curve = curve(1..=1_000_000);
        for points in [1, 7, 600] {
            let buckets = curve.since(0, points);
            assert!(buckets.len() <= points + 1, "{} of {points}", buckets.len());
            let count: u64 = buckets.iter().map(|bucket| bucket.series[0].count).sum();
            assert_eq!(count, 1_000_000);
            assert_eq!(buckets.last().map(|bucket| bucket.step), Some(1_000_000));
        }
        assert!(curve.levels.iter().all(|level| level.buckets.len() <= KEPT));
        // The newest steps are there one by one.
        assert_eq!(curve.since(999_901, 1000).len(), 100);
        assert_eq!(curve.since(999_901, 1000)[0].series[0].mean(), Some(999_901.0));
    }

    #[test]
    fn a_bucket_tells_mean_and_bounds() {
        let curve = curve(1..=8);
        let all = &curve.since(0, 1);
        let summary = all.last().unwrap().series[0];
        assert_eq!((summary.mean(), summary.low, summary.high), (Some(8.0), 8.0, 8.0));
        let first = all[0].series[0];
        assert_eq!((first.mean(), first.low, first.high), (Some(4.0), 1.0, 7.0));
    }

    /// Invariant 2.
    #[test]
    fn a_late_row_is_in_its_bucket() {
        let mut curve = curve((1..=10_000).filter(|step| ![5, 9_990].contains(step)));
        add(&mut curve, 9_990, 0.0);
        add(&mut curve, 5, 0.0);
        let count = |buckets: &[Bucket]| buckets.iter().map(|bucket| bucket.series[0].count).sum::<u64>();
        assert_eq!(count(&curve.since(0, 100)), 10_000);
        assert_eq!(steps(&curve.since(9_989, 100)), (9_989..=10_000).collect::<Vec<_>>());
        assert_eq!(curve.last_step(), Some(10_000));
    }

    /// Invariant 3.
    #[test]
    fn what_is_not_finite_is_left_out() {
        let mut curve = Curve::default();
        add(&mut curve, 2, f64::NAN);
        assert_eq!(curve.since(0, 10)[0].series[0].mean(), None);
        add(&mut curve, 3, f64::INFINITY);
        add(&mut curve, 4, 2.0);
        let both = curve.since(0, 1);
        assert_eq!(both.iter().filter_map(|bucket| bucket.series[0].mean()).collect::<Vec<_>>(), [2.0]);
    }

    #[test]
    fn a_series_may_appear_later_and_the_number_of_series_is_bounded() {
        let mut curve = curve(1..=4);
        let late: Vec<String> = (0..2 * MOST_SERIES).map(|at| format!("s{at}")).collect();
        for step in [5, 6] {
            curve.add(step, 5.0, late.iter().map(|name| (name.as_str(), 2.0)));
        }
        assert_eq!((curve.names().len(), curve.names()[1].as_str()), (MOST_SERIES, "s0"));
        let one = &curve.since(0, 1);
        let last = one.last().unwrap();
        assert_eq!((last.series[1].mean(), last.series.len()), (Some(2.0), MOST_SERIES));
        assert_eq!(curve.since(0, 100)[0].series.len(), 1);
    }
}
