//! Byte ranges of a file that must not be written by two at once: a read-modify-write has its blocks to itself.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};

struct Held {
    range: Range<u64>,
    alone: bool,
    number: u64,
}

#[derive(Default)]
struct State {
    held: Vec<Held>,
    next: u64,
}

/// Who writes where. Whole writes share a range; a read-modify-write is alone on its own.
#[derive(Default)]
pub struct Serial {
    state: Mutex<State>,
    released: Condvar,
}

/// A range that is held until this is dropped.
pub struct Span {
    serial: Arc<Serial>,
    number: u64,
}

impl Drop for Span {
    fn drop(&mut self) {
        let mut state = self.serial.state.lock().unwrap();
        state.held.retain(|held| held.number != self.number);
        drop(state);
        self.serial.released.notify_all();
    }
}

impl State {
    fn is_free(&self, range: &Range<u64>, alone: bool) -> bool {
        self.held.iter().all(|held| {
            let apart = held.range.end <= range.start || range.end <= held.range.start;
            apart || !(alone || held.alone)
        })
    }
}

impl Serial {
    /// Hold `range`, waiting until that is possible. Hold no other of the same file meanwhile.
    pub fn hold(self: &Arc<Self>, range: Range<u64>, alone: bool) -> Span {
        let mut state = self.state.lock().unwrap();
        while !state.is_free(&range, alone) {
            state = self.released.wait(state).unwrap();
        }
        self.enter(&mut state, range, alone)
    }

    /// Share `range`; None where somebody is alone there.
    pub fn try_share(self: &Arc<Self>, range: Range<u64>) -> Option<Span> {
        let mut state = self.state.lock().unwrap();
        state
            .is_free(&range, false)
            .then(|| self.enter(&mut state, range, false))
    }

    fn enter(self: &Arc<Self>, state: &mut State, range: Range<u64>, alone: bool) -> Span {
        state.next += 1;
        let number = state.next;
        state.held.push(Held {
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

    #[test]
    fn whole_writes_share_and_a_read_modify_write_is_alone() {
        let serial = Arc::new(Serial::default());
        let first = serial.hold(0..8192, false);
        let second = serial.try_share(4096..12288).expect("shared");
        assert!(!serial.state.lock().unwrap().is_free(&(8191..8192), true));
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
}
