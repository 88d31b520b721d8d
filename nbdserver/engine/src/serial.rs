//! Byte ranges of a file that must not be written by two at once: a read-modify-write has its blocks to itself.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};

/// Somebody who holds a range, or waits for it.
struct Entry {
    range: Range<u64>,
    alone: bool,
    number: u64,
}

/// All entries, in the order in which they came.
#[derive(Default)]
struct State {
    entries: Vec<Entry>,
    next: u64,
}

/// Who writes where. Whole writes share a range; a read-modify-write is alone on its own. Who came first goes first, so that
/// a range that many share cannot keep out whoever wants to be alone there.
#[derive(Default)]
pub struct Serial {
    state: Mutex<State>,
    left: Condvar,
}

/// A range that is held until this is dropped.
pub struct Span {
    serial: Arc<Serial>,
    number: u64,
}

impl Drop for Span {
    fn drop(&mut self) {
        let mut state = self.serial.state.lock().unwrap();
        state.entries.retain(|entry| entry.number != self.number);
        drop(state);
        self.serial.left.notify_all();
    }
}

impl State {
    /// Whether nobody who came before `number` is in the way.
    fn is_free(&self, range: &Range<u64>, alone: bool, number: u64) -> bool {
        let before = |entry: &&Entry| entry.number < number;
        self.entries.iter().take_while(before).all(|entry| {
            let apart = entry.range.end <= range.start || range.end <= entry.range.start;
            apart || !(alone || entry.alone)
        })
    }
}

impl Serial {
    /// Hold `range`, waiting until that is possible. Hold no other of the same file meanwhile.
    pub fn hold(self: &Arc<Self>, range: Range<u64>, alone: bool) -> Span {
        let mut state = self.state.lock().unwrap();
        let span = self.enter(&mut state, range.clone(), alone);
        while !state.is_free(&range, alone, span.number) {
            state = self.left.wait(state).unwrap();
        }
        span
    }

    /// Share `range`; None where somebody is, or wants to be, alone there.
    pub fn try_share(self: &Arc<Self>, range: Range<u64>) -> Option<Span> {
        let mut state = self.state.lock().unwrap();
        let free = state.is_free(&range, false, u64::MAX);
        free.then(|| self.enter(&mut state, range, false))
    }

    fn enter(self: &Arc<Self>, state: &mut State, range: Range<u64>, alone: bool) -> Span {
        let number = state.next;
        state.next += 1;
        state.entries.push(Entry {
            range,
            alone,
            number,
        });
        Span {
            serial: self.clone(),
            number,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

    #[test]
    fn whole_writes_share_and_a_read_modify_write_is_alone() {
        let serial = Arc::new(Serial::default());
        let first = serial.hold(0..8192, false);
        let second = serial.try_share(4096..12288).expect("shared");
        let state = serial.state.lock().unwrap();
        assert!(!state.is_free(&(8191..8192), true, u64::MAX));
        drop(state);
        drop((first, second));
        let alone = serial.hold(4096..8192, true);
        assert!(serial.try_share(0..4097).is_none());
        assert!(serial.try_share(0..4096).is_some());
        assert!(serial.try_share(8192..8193).is_some());
        drop(alone);
        assert!(serial.try_share(0..4097).is_some());
    }

    #[test]
    fn who_waits_is_woken() {
        let serial = Arc::new(Serial::default());
        let alone = serial.hold(0..10, true);
        let other = serial.clone();
        let waiting = std::thread::spawn(move || drop(other.hold(5..15, true)));
        drop(alone);
        waiting.join().unwrap();
    }

    #[test]
    fn who_waits_to_be_alone_keeps_out_those_who_come_later() {
        let serial = Arc::new(Serial::default());
        let shared = serial.hold(0..10, false);
        let (other, done) = (serial.clone(), Arc::new(AtomicBool::new(false)));
        let was_alone = done.clone();
        let waiting = std::thread::spawn(move || {
            let _alone = other.hold(5..15, true);
            was_alone.store(true, SeqCst);
        });
        while serial.state.lock().unwrap().entries.len() < 2 {
            std::thread::yield_now();
        }
        assert!(serial.try_share(9..10).is_none());
        assert!(serial.try_share(0..5).is_some());
        let later = serial.clone();
        let after = std::thread::spawn(move || {
            let _shared = later.hold(0..10, false);
            assert!(done.load(SeqCst));
        });
        drop(shared);
        waiting.join().unwrap();
        after.join().unwrap();
    }
}
