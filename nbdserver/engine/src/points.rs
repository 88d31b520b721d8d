//! Named points in the engine at which a test can stop a thread, to force one order of events.
//!
//! ```text
//! the test                        the thread under test
//! let stop = arm("fault.filled", 1)
//! stop.wait_reached(timeout)      reached("fault.filled")   stands still ...
//! (what shall happen meanwhile)
//! stop.release()                                            ... goes on
//! ```
//!
//! While nothing is armed a point costs one relaxed load.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How many stops are armed. A thread that passes a point before it learns of the arming was not
/// ordered after it by anything, and could have passed earlier just as well.
static ARMED: AtomicUsize = AtomicUsize::new(0);

static POINTS: Mutex<Vec<Arc<Point>>> = Mutex::new(Vec::new());

/// This thread is at the point `name`: stand still if a test says so.
#[inline]
pub fn reached(name: &'static str) {
    if ARMED.load(Relaxed) != 0 {
        stand_still(name);
    }
}

/// Stop the thread whose pass of `name` is the `nth` from now on (the first is 1). Only that one: others pass, as it does
/// itself next time. Several stops of one name each have their own count.
pub fn arm(name: &str, nth: usize) -> Stop {
    arm_point(name, nth, false)
}

/// Have the next thread that reaches `name` panic there.
pub fn arm_panic(name: &str) -> Stop {
    arm_point(name, 1, true)
}

fn arm_point(name: &str, nth: usize, panics: bool) -> Stop {
    let state = Mutex::new(State::Waiting(nth.max(1)));
    let point = Arc::new(Point {
        name: name.to_owned(),
        panics,
        state,
        changed: Condvar::new(),
    });
    lock(&POINTS).push(Arc::clone(&point));
    ARMED.fetch_add(1, Relaxed);
    Stop(point)
}

/// An armed point. Dropping it releases whoever stands there, and disarms it.
#[must_use = "dropping it disarms the point"]
pub struct Stop(Arc<Point>);

impl Stop {
    /// Wait until a thread has reached the point. False if none did within `timeout`.
    pub fn wait_reached(&self, timeout: Duration) -> bool {
        let state = lock(&self.0.state);
        let waiting = |state: &mut State| matches!(state, State::Waiting(_));
        let waited = self.0.changed.wait_timeout_while(state, timeout, waiting);
        matches!(
            *waited.unwrap_or_else(PoisonError::into_inner).0,
            State::Reached | State::Left
        )
    }

    /// Let the thread go on. If none has come yet, none will be stopped.
    pub fn release(&self) {
        let mut state = lock(&self.0.state);
        *state = match *state {
            State::Waiting(_) | State::Disarmed => State::Disarmed,
            State::Reached | State::Left => State::Left,
        };
        self.0.changed.notify_all();
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.release();
        lock(&POINTS).retain(|point| !Arc::ptr_eq(point, &self.0));
        ARMED.fetch_sub(1, Relaxed);
    }
}

struct Point {
    name: String,
    panics: bool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Clone, Copy)]
enum State {
    /// This many passes from now, the last of which stops.
    Waiting(usize),
    /// A thread stands here.
    Reached,
    /// It has been released.
    Left,
    /// Released before anybody came.
    Disarmed,
}

impl Point {
    /// Count one pass; if it is the one, stand still until released, or panic.
    fn pass(&self) {
        let mut state = lock(&self.state);
        match *state {
            State::Waiting(1) if self.panics => {
                *state = State::Left;
                self.changed.notify_all();
                drop(state);
                panic!("a test wants this at {:?}", self.name);
            }
            State::Waiting(1) => {
                *state = State::Reached;
                self.changed.notify_all();
                let standing = |state: &mut State| matches!(state, State::Reached);
                drop(self.changed.wait_while(state, standing));
            }
            State::Waiting(passes) => *state = State::Waiting(passes - 1),
            State::Reached | State::Left | State::Disarmed => {}
        }
    }
}

#[cold]
fn stand_still(name: &str) {
    let mut points = lock(&POINTS).clone();
    points.retain(|point| point.name == name);
    for point in points {
        point.pass();
    }
}

/// A test that failed while it held a lock must not fail others.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    const SOON: Duration = Duration::from_millis(20);
    const LATE: Duration = Duration::from_secs(20);

    // Tests run at once and points are global: every test has its own names.

    #[test]
    fn a_point_that_is_not_armed_is_passed() {
        reached("points.nobody");
        let stop = arm("points.somebody", 1);
        reached("points.nobody");
        assert!(!stop.wait_reached(Duration::ZERO));
    }

    #[test]
    fn a_thread_stands_until_released() {
        let stop = arm("points.stands", 1);
        thread::scope(|scope| {
            let stopped = scope.spawn(|| reached("points.stands"));
            assert!(stop.wait_reached(LATE));
            thread::sleep(SOON);
            assert!(!stopped.is_finished());
            reached("points.stands"); // Only one is stopped.
            stop.release();
        });
        assert!(stop.wait_reached(Duration::ZERO));
        reached("points.stands");
    }

    #[test]
    fn the_nth_pass_is_stopped() {
        let stop = arm("points.nth", 3);
        reached("points.nth");
        reached("points.nth");
        assert!(!stop.wait_reached(Duration::ZERO));
        thread::scope(|scope| {
            scope.spawn(|| reached("points.nth"));
            assert!(stop.wait_reached(LATE));
            stop.release();
        });
    }

    #[test]
    fn dropping_releases() {
        let stop = arm("points.dropped", 1);
        thread::scope(|scope| {
            let stopped = scope.spawn(|| reached("points.dropped"));
            assert!(stop.wait_reached(LATE));
            drop(stop);
            stopped.join().expect("no panic");
        });
        reached("points.dropped");
    }

    #[test]
    fn what_is_released_in_advance_stops_nobody() {
        let stop = arm("points.advance", 1);
        stop.release();
        reached("points.advance");
        assert!(!stop.wait_reached(Duration::ZERO));
    }

    #[test]
    fn several_are_armed_at_once() {
        let (one, two) = (arm("points.one", 1), arm("points.two", 1));
        thread::scope(|scope| {
            scope.spawn(|| {
                reached("points.one");
                reached("points.two");
            });
            assert!(one.wait_reached(LATE));
            assert!(!two.wait_reached(SOON));
            one.release();
            assert!(two.wait_reached(LATE));
            two.release();
        });
    }
}
