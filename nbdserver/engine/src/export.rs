//! An export as the engine knows it: a size, a cache of extents, a gate, counters.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, RwLock};
use std::time::{Duration, Instant};

use crate::extents::{Cache, Packing, Piece, Target};
use crate::users::{Use, Users};
use crate::worker::Inbox;

/// Extents cached for one export: at about 80 bytes each, 80 MiB at the most. Packed tables, of 8 bytes a unit, may take up
/// half as much besides.
const CACHE_ENTRIES_MAX: usize = 1 << 20;

/// What happened, per export. `hits` are requests answered without Python; the others count calls into it.
#[derive(Default)]
pub struct Counters {
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub hits: AtomicU64,
    pub faults: AtomicU64,
    pub resolve_calls: AtomicU64,
    pub read_calls: AtomicU64,
    pub write_calls: AtomicU64,
    pub other_calls: AtomicU64,
    pub bytes_read: AtomicU64,
    pub bytes_written: AtomicU64,
}

#[derive(Default)]
struct Gate {
    /// Drained sections open now; they nest.
    depth: usize,
    /// Workers with connections that wait for the end of the drained section.
    parked: Vec<Arc<Inbox>>,
}

pub struct Export {
    pub id: u32,
    size: AtomicU64,
    pub read_only: bool,
    /// Every write is followed by a flush before it is answered.
    pub writethrough: AtomicBool,
    /// Each byte stays at one place of a file, which is no other byte's ever: replies may leave from the page cache.
    pub in_place: AtomicBool,
    pub counters: Counters,
    /// Faults of this export on fault threads now: no export may have them all.
    pub faulting: AtomicUsize,
    cache: RwLock<Cache>,
    running: AtomicUsize,
    closed: AtomicBool,
    gate: Mutex<Gate>,
    drained: Condvar,
    opened: Condvar,
}

/// A request that runs on an export; drained sections wait for its end.
pub struct Running(Arc<Export>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// One file's part of a request, whose place is in use until this is dropped.
pub struct Place {
    pub piece: Piece,
    pub usage: Option<Use>,
}

impl Export {
    pub fn new(id: u32, size: u64, read_only: bool) -> Export {
        Export {
            id,
            size: AtomicU64::new(size),
            read_only,
            writethrough: AtomicBool::new(false),
            in_place: AtomicBool::new(false),
            counters: Counters::default(),
            faulting: AtomicUsize::new(0),
            cache: RwLock::new(Cache::new(CACHE_ENTRIES_MAX)),
            running: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            gate: Mutex::default(),
            drained: Condvar::new(),
            opened: Condvar::new(),
        }
    }

    /// Bytes. Stays what it is while a request runs.
    pub fn size(&self) -> u64 {
        self.size.load(SeqCst)
    }

    /// The disk has another size: to be called in a drained section.
    pub fn resize(&self, size: u64) {
        self.size.store(size, SeqCst);
    }

    // -- extents ---------------------------------------------------------------------------------------------

    pub fn sequence(&self) -> u64 {
        self.cache.read().unwrap().sequence()
    }

    pub fn fill(&self, sequence: u64, offset: u64, pieces: &[Piece]) -> bool {
        self.cache.write().unwrap().fill(sequence, offset, pieces)
    }

    pub fn fill_table(&self, sequence: u64, offset: u64, packing: &Packing, words: &[u64]) -> bool {
        let mut cache = self.cache.write().unwrap();
        cache.fill_table(sequence, offset, packing, words)
    }

    pub fn has_table(&self, offset: u64) -> bool {
        self.cache.read().unwrap().has_table(offset)
    }

    pub fn changed(&self, offset: u64, length: u64) {
        self.cache.write().unwrap().changed(offset, length);
    }

    pub fn clear(&self) {
        self.cache.write().unwrap().clear();
    }

    /// Which parts of the range are known (for `write`: known to be writable), as (length, is known) runs.
    pub fn known(&self, offset: u64, length: u64, write: bool) -> Vec<(u64, bool)> {
        self.cache.read().unwrap().runs(offset, length, write)
    }

    pub fn extents(&self) -> usize {
        self.cache.read().unwrap().len()
    }

    /// Units in packed tables.
    pub fn packed(&self) -> usize {
        self.cache.read().unwrap().packed()
    }

    pub fn cache_bytes(&self) -> usize {
        self.cache.read().unwrap().bytes()
    }

    /// Where a prefix of the range can be read. Becoming the user of a place and looking it up are one step: both
    /// happen under the lock that `changed` takes.
    pub fn readable(
        &self,
        users: &Arc<Users>,
        shard: usize,
        (offset, length): (u64, u64),
        places: &mut Vec<Place>,
    ) -> u64 {
        let mut pieces = Vec::new();
        let cache = self.cache.read().unwrap();
        let covered = cache.lookup(offset, length, &mut pieces);
        crate::points::reached("export.readable");
        places.extend(
            pieces
                .into_iter()
                .map(|piece| Place::enter(users, shard, piece)),
        );
        covered
    }

    /// Where a prefix of the range can be written in place; as `readable`.
    pub fn writable(
        &self,
        users: &Arc<Users>,
        shard: usize,
        (offset, length): (u64, u64),
        places: &mut Vec<Place>,
    ) -> u64 {
        let mut pieces = Vec::new();
        let cache = self.cache.read().unwrap();
        let covered = cache.lookup_writable(offset, length, &mut pieces);
        crate::points::reached("export.writable");
        places.extend(
            pieces
                .into_iter()
                .map(|piece| Place::enter(users, shard, piece)),
        );
        covered
    }

    // -- the gate --------------------------------------------------------------------------------------------

    /// Begin a request, unless a drained section holds new ones up.
    pub fn enter(self: &Arc<Self>) -> Option<Running> {
        self.running.fetch_add(1, SeqCst);
        if self.closed.load(SeqCst) {
            self.leave();
            return None;
        }
        Some(Running(self.clone()))
    }

    /// Begin a request once no drained section holds it up; None when that takes too long.
    pub fn enter_waiting(self: &Arc<Self>, timeout: Duration) -> Option<Running> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(running) = self.enter() {
                return Some(running);
            }
            let mut gate = self.gate.lock().unwrap();
            while gate.depth > 0 {
                let left = deadline.checked_duration_since(Instant::now())?;
                gate = self.opened.wait_timeout(gate, left).unwrap().0;
            }
        }
    }

    /// Whether a drained section waits for running requests, or has begun.
    pub fn is_draining(&self) -> bool {
        self.closed.load(SeqCst)
    }

    /// Have `inbox` woken when the gate opens. False: it is open already.
    pub fn park(&self, inbox: &Arc<Inbox>) -> bool {
        let mut gate = self.gate.lock().unwrap();
        if gate.depth > 0 && !gate.parked.iter().any(|other| Arc::ptr_eq(other, inbox)) {
            gate.parked.push(inbox.clone());
        }
        gate.depth > 0
    }

    fn leave(&self) {
        if self.running.fetch_sub(1, SeqCst) == 1 && self.closed.load(SeqCst) {
            let _gate = self.gate.lock().unwrap();
            self.drained.notify_all();
        }
    }

    /// Hold up new requests and wait until none runs; false, with the gate open again, when that takes too long.
    pub fn drain_begin(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut gate = self.gate.lock().unwrap();
        gate.depth += 1;
        self.closed.store(true, SeqCst);
        while self.running.load(SeqCst) > 0 {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                self.open_gate(gate);
                return false;
            };
            gate = self.drained.wait_timeout(gate, left).unwrap().0;
        }
        true
    }

    pub fn drain_end(&self) {
        self.open_gate(self.gate.lock().unwrap());
    }

    fn open_gate(&self, mut gate: std::sync::MutexGuard<'_, Gate>) {
        assert!(gate.depth > 0, "drain_end without drain_begin");
        gate.depth -= 1;
        if gate.depth == 0 {
            self.closed.store(false, SeqCst);
            self.opened.notify_all();
            for inbox in gate.parked.drain(..) {
                inbox.wake();
            }
        }
    }
}

impl Place {
    fn enter(users: &Arc<Users>, shard: usize, piece: Piece) -> Place {
        let usage = match piece.target {
            Target::File { file, offset, .. } => {
                Some(users.enter(shard, file, offset, piece.length))
            }
            Target::Zero | Target::Code => None,
        };
        Place { piece, usage }
    }
}

pub fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRANULE: u64 = 1 << 16;

    fn export(size: u64) -> Arc<Export> {
        Arc::new(Export::new(0, size, false))
    }

    #[test]
    fn who_waits_for_the_gate_enters_when_it_opens() {
        let export = export(GRANULE);
        assert!(export.drain_begin(Duration::ZERO));
        assert!(export.enter_waiting(Duration::from_millis(1)).is_none());
        let waiting = {
            let export = export.clone();
            std::thread::spawn(move || export.enter_waiting(Duration::from_secs(60)).is_some())
        };
        std::thread::sleep(Duration::from_millis(10));
        export.drain_end();
        assert!(waiting.join().unwrap());
        assert!(export.drain_begin(Duration::ZERO), "it has left again");
    }
}
