//! An export as the engine knows it: a size, a cache of extents, a gate, dirty logs, counters.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, RwLock};
use std::time::{Duration, Instant};

use crate::extents::{Cache, Piece, Target};
use crate::users::{Use, Users};
use crate::worker::Inbox;

/// Extents cached for one export: at about 64 bytes each, 64 MiB at the most.
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
    pub size: AtomicU64,
    pub read_only: bool,
    /// Every write is followed by a flush before it is answered.
    pub writethrough: bool,
    pub counters: Counters,
    /// Faults of this export on fault threads now: no export may have them all.
    pub faulting: AtomicUsize,
    cache: RwLock<Cache>,
    running: AtomicUsize,
    closed: AtomicBool,
    gate: Mutex<Gate>,
    drained: Condvar,
    logging: AtomicBool,
    logs: RwLock<Vec<Arc<DirtyLog>>>,
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
    pub fn new(id: u32, size: u64, read_only: bool, writethrough: bool) -> Export {
        Export {
            id,
            size: AtomicU64::new(size),
            read_only,
            writethrough,
            counters: Counters::default(),
            faulting: AtomicUsize::new(0),
            cache: RwLock::new(Cache::new(CACHE_ENTRIES_MAX)),
            running: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            gate: Mutex::default(),
            drained: Condvar::new(),
            logging: AtomicBool::new(false),
            logs: RwLock::default(),
        }
    }

    // -- extents ---------------------------------------------------------------------------------------------

    pub fn sequence(&self) -> u64 {
        self.cache.read().unwrap().sequence()
    }

    pub fn fill(&self, sequence: u64, offset: u64, pieces: &[Piece]) -> bool {
        self.cache.write().unwrap().fill(sequence, offset, pieces)
    }

    pub fn changed(&self, offset: u64, length: u64) {
        self.cache.write().unwrap().changed(offset, length);
    }

    pub fn clear(&self) {
        self.cache.write().unwrap().clear();
    }

    pub fn extents(&self) -> usize {
        self.cache.read().unwrap().len()
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
            for inbox in gate.parked.drain(..) {
                inbox.wake();
            }
        }
    }

    // -- dirty logs ------------------------------------------------------------------------------------------

    pub fn add_log(&self, log: Arc<DirtyLog>) {
        self.logs.write().unwrap().push(log);
        self.logging.store(true, SeqCst);
    }

    pub fn remove_log(&self, log: &Arc<DirtyLog>) {
        let mut logs = self.logs.write().unwrap();
        logs.retain(|other| !Arc::ptr_eq(other, log));
        self.logging.store(!logs.is_empty(), SeqCst);
    }

    /// A range has been written (zeroed, trimmed): called when that has completed and before it is answered.
    pub fn written(&self, offset: u64, length: u64) {
        if self.logging.load(SeqCst) {
            crate::points::reached("export.written");
            for log in self.logs.read().unwrap().iter() {
                log.mark(offset, length);
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

/// Which granules of an export have been written since each was last taken: a bit a granule.
pub struct DirtyLog {
    granularity: u64,
    bits: Vec<AtomicU64>,
}

impl DirtyLog {
    /// `granularity` in bytes, a power of two.
    pub fn new(size: u64, granularity: u64) -> DirtyLog {
        assert!(granularity.is_power_of_two());
        let words = size.div_ceil(granularity).div_ceil(64) as usize;
        DirtyLog {
            granularity,
            bits: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn mark(&self, offset: u64, length: u64) {
        if length == 0 {
            return;
        }
        for granule in offset / self.granularity..=(offset + length - 1) / self.granularity {
            if let Some(word) = self.bits.get((granule / 64) as usize) {
                word.fetch_or(1 << (granule % 64), SeqCst);
            }
        }
    }

    /// The dirty ranges as (offset, length), and clean from now on. The last may pass the end of the disk.
    pub fn take(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for (index, word) in self.bits.iter().enumerate() {
            let bits = word.swap(0, SeqCst);
            for bit in (0..64).filter(|bit| bits >> bit & 1 == 1) {
                let at = (index as u64 * 64 + bit) * self.granularity;
                match runs.last_mut() {
                    Some((start, length)) if *start + *length == at => *length += self.granularity,
                    _ => runs.push((at, self.granularity)),
                }
            }
        }
        runs
    }
}

pub fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Relaxed);
}
