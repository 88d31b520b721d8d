//! Meters: leaky buckets that hold requests up, as QEMU's throttle has them (docs/throttle.txt).
//!
//! Each limit is a bucket that leaks at `average` units a second and must not overflow. Its size is what a burst may use
//! up: `max` for `length` seconds, or a tenth of a second's average where no burst is allowed.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Without a burst a bucket holds this part of a second's units.
const STEADY_PART: f64 = 10.0;

/// One limit, in units (bytes or requests) a second; an average of 0 is no limit.
#[derive(Clone, Copy, Default, Debug)]
pub struct Limit {
    pub average: f64,
    pub max: f64,
    /// How long a burst at `max` may last, seconds.
    pub length: f64,
}

#[derive(Clone, Copy)]
struct Bucket {
    limit: Limit,
    level: f64,
    burst_level: f64,
}

/// The six limits in order: bps total, read, write; iops total, read, write.
pub struct Meter {
    /// Larger requests count as several (0: never).
    iops_size: u64,
    state: Mutex<State>,
}

struct State {
    buckets: [Bucket; 6],
    leaked: Instant,
}

impl Bucket {
    fn leak(&mut self, seconds: f64) {
        self.level = (self.level - self.limit.average * seconds).max(0.0);
        self.burst_level = (self.burst_level - self.limit.max * seconds).max(0.0);
    }

    /// How long until the bucket has room, seconds; 0 if it has.
    fn wait(&self) -> f64 {
        let Limit {
            average,
            max,
            length,
        } = self.limit;
        if average == 0.0 {
            return 0.0;
        }
        let size = if max > 0.0 {
            max * length
        } else {
            average / STEADY_PART
        };
        let extra = self.level - size;
        if extra > 0.0 {
            return extra / average;
        }
        // Within a long burst its own rate must not be passed either.
        if max > 0.0 && length > 1.0 {
            let extra = self.burst_level - max / STEADY_PART;
            if extra > 0.0 {
                return extra / max;
            }
        }
        0.0
    }
}

impl Meter {
    pub fn new(limits: [Limit; 6], iops_size: u64) -> Meter {
        let bucket = |limit| Bucket {
            limit,
            level: 0.0,
            burst_level: 0.0,
        };
        let state = State {
            buckets: limits.map(bucket),
            leaked: Instant::now(),
        };
        Meter {
            iops_size,
            state: Mutex::new(state),
        }
    }

    /// Account for a request that may run now; or say how long to wait before asking again.
    pub fn take(&self, length: u64, write: bool) -> Result<(), Duration> {
        self.take_at(Instant::now(), length, write)
    }

    fn take_at(&self, now: Instant, length: u64, write: bool) -> Result<(), Duration> {
        let mut state = self.state.lock().unwrap();
        let seconds = now.saturating_duration_since(state.leaked).as_secs_f64();
        state.leaked = state.leaked.max(now);
        for bucket in &mut state.buckets {
            bucket.leak(seconds);
        }
        let own = if write { 2 } else { 1 };
        let concerned = [0, own, 3, 3 + own];
        let wait = concerned.map(|index| state.buckets[index].wait());
        let longest = wait.into_iter().fold(0.0, f64::max);
        if longest > 0.0 {
            return Err(Duration::from_secs_f64(longest));
        }
        for index in concerned {
            let units = if index < 3 {
                length as f64
            } else {
                self.operations(length)
            };
            state.buckets[index].level += units;
            state.buckets[index].burst_level += units;
        }
        Ok(())
    }

    fn operations(&self, length: u64) -> f64 {
        if self.iops_size == 0 || length <= self.iops_size {
            return 1.0;
        }
        length as f64 / self.iops_size as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bps(average: f64, max: f64, length: f64) -> Meter {
        let mut limits = [Limit::default(); 6];
        limits[0] = Limit {
            average,
            max,
            length,
        };
        Meter::new(limits, 0)
    }

    /// Bytes that get through in `seconds`, asked for `length` at a time.
    fn through(meter: &Meter, seconds: f64, length: u64) -> u64 {
        let begun = meter.state.lock().unwrap().leaked;
        let mut now = begun;
        let mut total = 0;
        while (now - begun).as_secs_f64() < seconds {
            match meter.take_at(now, length, false) {
                Ok(()) => total += length,
                Err(wait) => now += wait,
            }
        }
        total
    }

    #[test]
    fn the_average_is_kept() {
        let total = through(&bps(1e6, 0.0, 1.0), 10.0, 4096);
        assert!((9_900_000..10_300_000).contains(&total), "{total}");
    }

    #[test]
    fn a_burst_comes_on_top_once() {
        let total = through(&bps(1e6, 5e6, 1.0), 10.0, 4096);
        assert!((14_500_000..15_500_000).contains(&total), "{total}");
    }

    #[test]
    fn a_long_burst_keeps_its_own_rate() {
        let total = through(&bps(1e6, 5e6, 4.0), 1.0, 4096);
        assert!((5_000_000..6_000_000).contains(&total), "{total}");
    }

    #[test]
    fn no_limit_never_waits() {
        let meter = Meter::new([Limit::default(); 6], 0);
        assert_eq!(meter.take(u64::MAX, true), Ok(()));
    }

    #[test]
    fn reads_do_not_wait_for_the_writes_limit() {
        let mut limits = [Limit::default(); 6];
        limits[5] = Limit {
            average: 10.0,
            max: 0.0,
            length: 1.0,
        };
        let meter = Meter::new(limits, 4096);
        assert_eq!(meter.take(1 << 20, true), Ok(()));
        assert!(meter.take(1, true).is_err());
        assert_eq!(meter.take(1 << 20, false), Ok(()));
    }
}
