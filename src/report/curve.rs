//! Thins a curve while it is read: however many points come, a bounded number of buckets holds where each stretch began and ended, its
//! extremes and its mean.

/// The most buckets of a curve. A plot is about as many pixels wide.
const BUCKETS: usize = 400;

/// The part of a curve over which the smooth line averages.
const SMOOTHED_OVER: f64 = 0.08;

/// The fewest buckets that a smooth line is drawn for.
const FEWEST_TO_SMOOTH: usize = 25;

/// A place on a plot.
pub type Point = (f64, f64);

/// A curve of any length.
#[derive(Debug, Clone, Default)]
pub struct Curve {
    buckets: Vec<Bucket>,
    /// Points per bucket; a power of two.
    width: usize,
    /// The newest point, which a bucket may hide.
    last: Option<Point>,
}

/// Consecutive points.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    lowest: Point,
    highest: Point,
    sum: f64,
    count: usize,
    last_x: f64,
}

impl Bucket {
    fn of(point: Point) -> Self {
        Self { lowest: point, highest: point, sum: point.1, count: 1, last_x: point.0 }
    }

    fn join(&mut self, later: Self) {
        self.lowest = if later.lowest.1 < self.lowest.1 { later.lowest } else { self.lowest };
        self.highest = if later.highest.1 > self.highest.1 { later.highest } else { self.highest };
        self.sum += later.sum;
        self.count += later.count;
        self.last_x = later.last_x;
    }

    fn mean(&self) -> f64 {
        self.sum / self.count as f64
    }
}

impl Curve {
    /// Adds the next point; one that is not finite is left out.
    pub fn add(&mut self, x: f64, y: f64) {
        if !(x.is_finite() && y.is_finite()) {
            return;
        }
        self.last = Some((x, y));
        self.width = self.width.max(1);
        match self.buckets.last_mut() {
            Some(last) if last.count < self.width => last.join(Bucket::of((x, y))),
            _ => {
                if self.buckets.len() == BUCKETS {
                    self.halve();
                }
                self.buckets.push(Bucket::of((x, y)));
            }
        }
    }

    fn halve(&mut self) {
        let pairs = self.buckets.chunks(2).map(|pair| {
            let mut joined = pair[0];
            pair[1..].iter().for_each(|later| joined.join(*later));
            joined
        });
        self.buckets = pairs.collect();
        self.width *= 2;
    }

    /// The first and the last place, and the smallest and the largest value; `None` without points.
    #[must_use]
    pub fn extent(&self) -> Option<[Point; 2]> {
        let low = self.buckets.iter().map(|bucket| bucket.lowest.1).reduce(f64::min)?;
        let high = self.buckets.iter().map(|bucket| bucket.highest.1).reduce(f64::max)?;
        let first = self.buckets.first()?;
        Some([(first.lowest.0.min(first.highest.0), low), (self.last?.0, high)])
    }

    /// The line through the extremes of each bucket, in their order, up to the newest point. Few points are all on it.
    #[must_use]
    pub fn line(&self) -> Vec<Point> {
        let mut line: Vec<Point> = Vec::with_capacity(2 * self.buckets.len() + 1);
        for Bucket { lowest, highest, .. } in &self.buckets {
            let (first, second) = if lowest.0 <= highest.0 { (lowest, highest) } else { (highest, lowest) };
            line.push(*first);
            if second != first {
                line.push(*second);
            }
        }
        line.extend(self.last.filter(|last| line.last() != Some(last)));
        line
    }

    /// The exponential average of the buckets' means, corrected for its start; empty for a short curve.
    #[must_use]
    pub fn smooth(&self) -> Vec<Point> {
        if self.buckets.len() < FEWEST_TO_SMOOTH {
            return Vec::new();
        }
        let keep = 1.0 - 1.0 / (SMOOTHED_OVER * self.buckets.len() as f64).max(1.0);
        let (mut sum, mut weight) = (0.0, 0.0);
        let smoothed = self.buckets.iter().map(|bucket| {
            let share = bucket.count as f64;
            sum = keep * sum + share * bucket.mean();
            weight = keep * weight + share;
            (bucket.last_x, sum / weight)
        });
        smoothed.collect()
    }

    /// The values at both ends: the means of the first and of the last tenth.
    #[must_use]
    pub fn ends(&self) -> Option<[f64; 2]> {
        let tenth = self.buckets.len().div_ceil(10);
        let mean = |part: &[Bucket]| {
            let count: usize = part.iter().map(|bucket| bucket.count).sum();
            (count > 0).then(|| part.iter().map(|bucket| bucket.sum).sum::<f64>() / count as f64)
        };
        Some([mean(&self.buckets[..tenth])?, mean(&self.buckets[self.buckets.len() - tenth..])?])
    }

    /// The newest value.
    #[must_use]
    pub fn newest(&self) -> Option<f64> {
        self.last.map(|(_, y)| y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(points: usize, y: impl Fn(usize) -> f64) -> Curve {
        let mut curve = Curve::default();
        (0..points).for_each(|x| curve.add(x as f64, y(x)));
        curve
    }

    #[test]
    fn few_points_are_all_on_the_line() {
        let line = curve(300, |x| (x % 7) as f64).line();
        assert_eq!(line, (0..300).map(|x| (x as f64, (x % 7) as f64)).collect::<Vec<_>>());
    }

    #[test]
    fn a_million_points_keep_their_extremes_their_order_and_the_newest() {
        let value = |x: usize| match x {
            123_456 => 9.0,
            777_777 => -9.0,
            999_999 => 0.25,
            _ => (x % 2) as f64,
        };
        let curve = curve(1_000_000, value);
        let line = curve.line();
        assert!(line.len() <= 2 * BUCKETS + 1 && line.len() > BUCKETS / 2, "{}", line.len());
        assert!(line.is_sorted_by(|a, b| a.0 < b.0));
        assert!(line.contains(&(123_456.0, 9.0)) && line.contains(&(777_777.0, -9.0)));
        assert_eq!(curve.extent(), Some([(0.0, -9.0), (999_999.0, 9.0)]));
        assert_eq!((line.last(), curve.newest()), (Some(&(999_999.0, 0.25)), Some(0.25)));
        assert!(curve.smooth().iter().all(|(_, y)| (0.49..0.51).contains(y)));
    }

    #[test]
    fn the_smooth_line_of_a_constant_is_that_constant_from_the_start() {
        assert!(curve(100, |_| 3.0).smooth().iter().all(|(_, y)| (y - 3.0).abs() < 1e-12));
        assert!(curve(10, |_| 3.0).smooth().is_empty());
        assert_eq!(curve(20, |x| x as f64).ends(), Some([0.5, 18.5]));
    }

    #[test]
    fn what_is_not_finite_is_left_out() {
        let mut curve = curve(2, |x| x as f64);
        curve.add(2.0, f64::NAN);
        curve.add(f64::INFINITY, 7.0);
        assert_eq!(curve.line(), [(0.0, 0.0), (1.0, 1.0)]);
        assert!(Curve::default().extent().is_none() && Curve::default().ends().is_none());
    }
}
