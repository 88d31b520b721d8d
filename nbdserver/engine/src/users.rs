//! Who is doing I/O on a place of a file, over all exports, the hot path and Python alike.
//!
//! ```text
//! a reader                          who ends a mapping
//! enter(place)                      metadata changes
//! is the place still resolved so?   changed(range)
//! I/O                               wait_unused(place)
//! drop(use)                         the place is freed, reused, overwritten
//! ```
//!
//! Either the reader sees the change and goes elsewhere, or its use is seen and waited for.
//! Announcing must cost next to nothing, waiting need not: every worker announces in a shard of its
//! own, and who waits looks at all of them.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
#[cfg(test)]
use std::time::Duration;
use std::time::Instant;

use crate::extents::FileId;

/// The running uses of all places of all files.
pub struct Users {
    shards: Vec<Arc<Shard>>,
}

impl Users {
    /// `shards`: one for each thread that should not contend with others, at least 1.
    pub fn new(shards: usize) -> Arc<Users> {
        let shards = (0..shards.max(1)).map(|_| Arc::default()).collect();
        Arc::new(Users { shards })
    }

    /// Announce I/O on `length` bytes of a file from `offset`, until the answer is dropped (on any
    /// thread). `shard` is taken modulo their number.
    pub fn enter(&self, shard: usize, file: FileId, offset: u64, length: u64) -> Use {
        let shard = &self.shards[shard % self.shards.len()];
        let place = Place::new(file, offset, length);
        let slot = shard.lock().enter(place);
        Use {
            shard: Arc::clone(shard),
            slot,
        }
    }

    /// Return when no use that overlaps the range and was entered before this call is running any
    /// more. Those that enter later are not waited for, so it returns however busy the place is.
    ///
    /// Hold no lock, and no use of your own of that range.
    pub fn wait_unused(&self, file: FileId, offset: u64, length: u64) {
        self.wait(Place::new(file, offset, length), None);
    }

    /// As `wait_unused`; false if that was not so within `timeout`.
    #[cfg(test)]
    pub fn wait_unused_timeout(
        &self,
        file: FileId,
        offset: u64,
        length: u64,
        timeout: Duration,
    ) -> bool {
        // A timeout past the end of time is none.
        let deadline = Instant::now().checked_add(timeout);
        self.wait(Place::new(file, offset, length), deadline)
    }

    /// Whether a use that overlaps the range is running now.
    pub fn in_use(&self, file: FileId, offset: u64, length: u64) -> bool {
        let place = Place::new(file, offset, length);
        self.shards
            .iter()
            .any(|shard| shard.lock().overlaps(place, u64::MAX))
    }

    fn wait(&self, place: Place, deadline: Option<Instant>) -> bool {
        // What entered before the call is told by numbers taken before any waiting.
        let limits: Vec<u64> = self
            .shards
            .iter()
            .map(|shard| shard.lock().entered)
            .collect();
        let mut shards = self.shards.iter().zip(limits);
        shards.all(|(shard, limit)| shard.wait_unused(place, limit, deadline))
    }
}

/// A running use: drop it when the I/O is done.
#[must_use = "the use ends when it is dropped"]
pub struct Use {
    shard: Arc<Shard>,
    slot: usize,
}

impl Drop for Use {
    fn drop(&mut self) {
        let mut uses = self.shard.lock();
        uses.leave(self.slot);
        if uses.waiters > 0 {
            self.shard.left.notify_all();
        }
    }
}

/// `start` up to `end` of a file.
#[derive(Clone, Copy)]
struct Place {
    file: FileId,
    start: u64,
    end: u64,
}

impl Place {
    fn new(file: FileId, offset: u64, length: u64) -> Place {
        Place {
            file,
            start: offset,
            end: offset.saturating_add(length),
        }
    }

    fn overlaps(&self, other: &Place) -> bool {
        self.file == other.file && self.start < other.end && other.start < self.end
    }
}

/// One worker's uses; on cache lines of its own (two, as the hardware fetches them in pairs).
#[derive(Default)]
#[repr(align(128))]
struct Shard {
    uses: Mutex<Uses>,
    /// A use has left while somebody waits.
    left: Condvar,
}

impl Shard {
    /// A panic elsewhere leaves the uses whole: every change of them is complete or not begun.
    fn lock(&self) -> MutexGuard<'_, Uses> {
        self.uses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wait for the uses of `place` numbered below `limit`. False if the deadline passes first.
    fn wait_unused(&self, place: Place, limit: u64, deadline: Option<Instant>) -> bool {
        let mut uses = self.lock();
        while uses.overlaps(place, limit) {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return false;
            }
            uses.waiters += 1;
            uses = match left {
                None => self.left.wait(uses).unwrap_or_else(PoisonError::into_inner),
                Some(left) => {
                    self.left
                        .wait_timeout(uses, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
            uses.waiters -= 1;
        }
        true
    }
}

/// A slab of uses: as long as there were ever at once, which in-flight limits bound.
#[derive(Default)]
struct Uses {
    slots: Vec<Option<(u64, Place)>>,
    free: Vec<usize>,
    /// How many have entered so far: the number of the next.
    entered: u64,
    waiters: usize,
}

impl Uses {
    fn enter(&mut self, place: Place) -> usize {
        let running = Some((self.entered, place));
        self.entered += 1;
        if let Some(slot) = self.free.pop() {
            self.slots[slot] = running;
            return slot;
        }
        self.slots.push(running);
        self.slots.len() - 1
    }

    fn leave(&mut self, slot: usize) {
        debug_assert!(self.slots[slot].is_some());
        self.slots[slot] = None;
        self.free.push(slot);
    }

    fn overlaps(&self, place: Place, limit: u64) -> bool {
        let mut running = self.slots.iter().flatten();
        running.any(|(number, other)| *number < limit && other.overlaps(&place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
    use std::thread;

    const SOON: Duration = Duration::from_millis(20);
    const LATE: Duration = Duration::from_secs(20);

    /// Wait, and say whether that ended by being woken. One who misses that finds out at the
    /// deadline that all is well, and answers true nevertheless.
    fn woken(users: &Users, file: FileId, offset: u64, length: u64) -> bool {
        let begun = Instant::now();
        users.wait_unused_timeout(file, offset, length, LATE) && begun.elapsed() < LATE
    }

    #[test]
    fn uses_overlap_by_file_and_range() {
        let users = Users::new(2);
        let running = users.enter(1, 7, 100, 10);
        for (file, offset, length, expected) in [
            (7, 100, 10, true),
            (7, 109, 1, true),
            (7, 0, 101, true),
            (7, 0, u64::MAX, true),
            (7, 50, u64::MAX, true),
            (7, 0, 100, false),
            (7, 110, 10, false),
            (7, 105, 0, true),
            (8, 100, 10, false),
        ] {
            assert_eq!(
                users.in_use(file, offset, length),
                expected,
                "{file} {offset} {length}"
            );
        }
        drop(running);
        assert!(!users.in_use(7, 100, 10));
    }

    #[test]
    fn waiting_for_nobody_returns_at_once() {
        let users = Users::new(3);
        let _other = users.enter(0, 1, 0, 10);
        users.wait_unused(1, 10, 10);
        users.wait_unused(2, 0, u64::MAX);
        assert!(users.wait_unused_timeout(1, 10, 10, Duration::ZERO));
    }

    #[test]
    fn waiting_ends_with_the_last_use() {
        let users = Users::new(4);
        let running: Vec<Use> = (0..8).map(|shard| users.enter(shard, 1, 0, 4096)).collect();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                assert!(woken(&users, 1, 0, 1));
                done.store(true, SeqCst);
            });
            for one in running {
                thread::sleep(SOON / 10);
                assert!(!done.load(SeqCst));
                drop(one);
            }
        });
        assert!(done.load(SeqCst));
    }

    #[test]
    fn waiting_gives_up_in_time() {
        let users = Users::new(2);
        let running = users.enter(1, 1, 0, 10);
        assert!(!users.wait_unused_timeout(1, 0, 1, SOON));
        assert!(!users.wait_unused_timeout(1, 0, 1, Duration::ZERO));
        drop(running);
        assert!(users.wait_unused_timeout(1, 0, 1, Duration::ZERO));
        assert!(users.wait_unused_timeout(1, 0, 1, Duration::MAX));
    }

    #[test]
    fn those_who_enter_later_are_not_waited_for() {
        let users = Users::new(1);
        let first = users.enter(0, 1, 0, 10);
        thread::scope(|scope| {
            let waiter = scope.spawn(|| woken(&users, 1, 0, 10));
            while users.shards[0].lock().waiters == 0 {
                thread::yield_now();
            }
            let later = users.enter(0, 1, 0, 10);
            drop(first);
            assert!(waiter.join().expect("no panic"));
            drop(later);
        });
    }

    #[test]
    fn a_slot_used_again_is_another_use() {
        let users = Users::new(1);
        let first = users.enter(0, 1, 0, 10);
        thread::scope(|scope| {
            let waiter = scope.spawn(|| woken(&users, 1, 0, 10));
            while users.shards[0].lock().waiters == 0 {
                thread::yield_now();
            }
            let slot = first.slot;
            drop(first);
            let again = users.enter(0, 1, 0, 10);
            assert_eq!(again.slot, slot);
            assert!(waiter.join().expect("no panic"));
            drop(again);
        });
    }

    #[test]
    fn a_use_may_end_on_another_thread() {
        let users = Users::new(1);
        let running = users.enter(0, 1, 0, 10);
        thread::spawn(move || drop(running))
            .join()
            .expect("no panic");
        assert!(!users.in_use(1, 0, 10));
    }

    /// Readers announce, look where the block is, and read; a mover moves it, waits, and spoils the
    /// old place. A reader that reads what is spoilt has not been waited for.
    #[test]
    fn nobody_reads_a_place_after_it_is_unused() {
        const PLACES: u64 = 4;
        const GOOD: u64 = 1;
        let users = Users::new(3);
        let contents: Vec<AtomicU64> = (0..PLACES).map(|_| AtomicU64::new(GOOD)).collect();
        let mapping = AtomicU64::new(0);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for shard in 0..3 {
                let (users, contents, mapping, stop) = (&users, &contents, &mapping, &stop);
                scope.spawn(move || {
                    while !stop.load(SeqCst) {
                        let place = mapping.load(SeqCst);
                        let running = users.enter(shard, 1, place * 512, 512);
                        if mapping.load(SeqCst) == place {
                            assert_eq!(contents[place as usize].load(SeqCst), GOOD);
                        }
                        drop(running);
                    }
                });
            }
            let mut random = Random(3);
            for _ in 0..2000 {
                let old = mapping.load(SeqCst);
                let new = (old + 1 + random.below(PLACES - 1)) % PLACES;
                contents[new as usize].store(GOOD, SeqCst);
                mapping.store(new, SeqCst);
                assert!(woken(&users, 1, old * 512, 512));
                contents[old as usize].store(0, SeqCst);
            }
            stop.store(true, SeqCst);
        });
        assert!(!users.in_use(1, 0, u64::MAX));
        assert!(
            users
                .shards
                .iter()
                .all(|shard| shard.lock().slots.len() <= 1)
        );
    }
}
