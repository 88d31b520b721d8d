//! The buffer pool: one region of shared memory, cut up into slots.
//!
//! ```text
//! region    | 2 MiB block | 2 MiB block | ...           a memfd, mapped once, registered once
//! block     | 1 MiB | 512 K | 256 K | 128 K | ...       a buddy tree with leaves of one page
//! slot      one to 512 pages of one block               what a request owns; freed by dropping
//! ```
//!
//! Where the kernel registers only the first part of the region (RLIMIT_MEMLOCK), memory is taken
//! from that part as long as all of a request fits there, and else, if it can be, from the other: a
//! request is registered when all of its memory is.
//!
//! A slot has exactly the pages it needs: what a power of two is too long by goes back at once. As
//! long as there is room in one piece, memory of up to 2 MiB is one slot; when the pool is
//! fragmented it is several smaller ones. So whether a length fits is a question of how much is
//! free, never of where, and nobody who waits for memory is starved by fragments.
//!
//! Who finds no room queues up; memory that comes back goes to the head of the queue. An eighth is
//! kept for bounce buffers, which are allowed to overtake: they end the requests that hold the
//! rest. When even that is used up they get ordinary memory, as much as they need: they are few
//! and short, because those who make them are few threads, and a request that could not be carried
//! out for want of them would be an error of the disk to whoever sent it.
//!
//! Memory is not zeroed between uses. Whoever sends from a slot must have overwritten all that it
//! sends: a read fills its slots to the last byte (zeroes past the end of a file included) before
//! it is answered, a write's payload is received before it is used.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::buddies::{Buddies, Zone};
use crate::region::Region;

/// The unit of allocation: a page, and the alignment that direct I/O never finds too small.
pub const PAGE: usize = 4096;

/// The longest slot: a huge page.
pub const BLOCK: usize = 2 << 20;

/// One byte in this many is in the reserve, which only bounce buffers may use.
const RESERVE: usize = 8;

/// A request that is cut because of the pool's size is cut into parts of this part of the pool, so
/// that it leaves room for others.
const PARTS: usize = 4;

/// Registered memory of less than this is not worth cutting long requests for, which takes time.
const WORTH_PARTS: usize = 1 << 20;

/// Ordinary memory that clients may take up, with requests that the pool cannot hold or payloads
/// that they do not go on sending: two of the longest requests.
pub const ORDINARY_MAX: usize = 64 << 20;

/// Numbers the pools of this process.
static POOLS: AtomicU32 = AtomicU32::new(0);

/// The pool. It lives until its last slot is dropped.
pub struct Pool {
    id: u32,
    pages: usize,
    region: Region,
    /// Bytes from the begin of the region that are registered with the kernel.
    registered: AtomicUsize,
    state: Mutex<State>,
}

// SAFETY: the region is plain memory that belongs to the slots; all else is behind the mutex.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

struct State {
    buddies: Buddies,
    ordinary: usize,
    queue: VecDeque<Waiter>,
}

/// What tells one use of a slot from every other: which pool, which page it begins at, and how
/// often a slot that began there has been freed before.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Registration {
    pub pool: u32,
    pub slot: u32,
    pub generation: u32,
}

impl Pool {
    /// A pool of `bytes` (at least 1), rounded up to 2 MiB. Memory is taken as it is touched (or
    /// registered).
    pub fn new(bytes: usize) -> io::Result<Arc<Pool>> {
        let too_large = || io::Error::from(io::ErrorKind::InvalidInput);
        let size = bytes
            .max(1)
            .checked_next_multiple_of(BLOCK)
            .ok_or_else(too_large)?;
        let pages = u32::try_from(size / PAGE).map_err(|_| too_large())? as usize;
        Ok(Arc::new(Pool {
            id: POOLS.fetch_add(1, Relaxed),
            pages,
            region: Region::new(size)?,
            registered: AtomicUsize::new(size),
            state: Mutex::new(State {
                buddies: Buddies::new(pages, pages),
                ordinary: 0,
                queue: VecDeque::new(),
            }),
        }))
    }

    #[cfg(test)]
    fn id(&self) -> u32 {
        self.id
    }

    /// The whole region, for registering it: address and size.
    pub fn as_region(&self) -> (*mut u8, usize) {
        (self.region.as_ptr(), self.size())
    }

    pub fn size(&self) -> usize {
        self.region.size()
    }

    /// See `Region::about_to_pin`.
    pub fn about_to_register(&self, bytes: usize) {
        self.region.about_to_pin(bytes);
    }

    /// What kind of pages it is on, and how many bytes are on huge ones now.
    pub fn page_kind(&self) -> (&'static str, usize) {
        self.region.pages()
    }

    /// What is free, the reserve included.
    pub fn free_bytes(&self) -> usize {
        self.lock().buddies.free() * PAGE
    }

    /// Only the first `bytes` of the region are registered (0: nothing is, the flag is never set).
    /// A pool begins as registered throughout. Asserts that none of it is in use.
    pub fn set_registered(&self, bytes: usize) {
        let mut state = self.lock();
        assert_eq!(state.buddies.free(), self.pages, "the pool is in use");
        state.buddies = Buddies::new(self.pages, bytes / PAGE);
        self.registered.store(bytes, Relaxed);
        self.region.pinned(bytes);
    }

    /// Bytes from the begin of the region that are registered.
    pub fn registered(&self) -> usize {
        self.registered.load(Relaxed)
    }

    /// The longest request whose memory can be had at once: longer ones are carried out in parts, if
    /// they may be. Where only some of the pool is registered that is what counts, unless it is too
    /// little to be worth it.
    pub fn whole_max(&self) -> usize {
        match self.registered() {
            bytes if bytes >= WORTH_PARTS => bytes.min(self.capacity()),
            _ => self.capacity(),
        }
    }

    /// How long parts are: a power of two, so that they are aligned as the whole is.
    pub fn part_length(&self) -> usize {
        1 << (self.whole_max() / PARTS).ilog2()
    }

    /// Memory of `length` bytes in all. None when it does not fit now, when only the reserve is
    /// left, or when others queue for memory: then `enqueue`.
    pub fn allocate(self: &Arc<Self>, length: usize) -> Option<Vec<Slot>> {
        let mut state = self.lock();
        if !state.queue.is_empty() {
            return None;
        }
        self.grant(&mut state, length)
    }

    /// Memory for a bounce buffer: overtakes the queue, may use the reserve, then ordinary memory.
    /// None when the system has none.
    pub fn allocate_bounce(self: &Arc<Self>, length: usize) -> Option<Vec<Slot>> {
        let slots = self.cut(&mut self.lock(), length, 0);
        slots.or_else(|| self.allocate_ordinary_bounce(length))
    }

    /// Ordinary memory in one piece, for a bounce buffer.
    pub fn allocate_ordinary_bounce(self: &Arc<Self>, length: usize) -> Option<Vec<Slot>> {
        Some(vec![self.map_slot(length, 0)?])
    }

    /// Ordinary memory, within ORDINARY_MAX: for what has to leave the pool.
    pub fn allocate_ordinary(self: &Arc<Self>, length: usize) -> Option<Vec<Slot>> {
        let mut state = self.lock();
        self.ordinary(&mut state, length)
    }

    /// Whether anybody waits for memory.
    pub fn is_short(&self) -> bool {
        !self.lock().queue.is_empty()
    }

    /// Queue for memory of `length` bytes. When it has been granted `waker` is called, once, on
    /// the thread that gave the memory back (or on this one, before this returns, if it fits
    /// now), with no lock held; it must not block. Then `claim`.
    ///
    /// Asserts that the length can ever be granted: what is longer than the pool without its
    /// reserve is granted as ordinary memory, but no more than `ORDINARY_MAX`.
    pub fn enqueue(self: &Arc<Self>, length: usize, waker: Waker) -> Ticket {
        assert!(
            self.capacity().max(ORDINARY_MAX) >= length,
            "{length} bytes never fit"
        );
        let grant: Grant = Arc::default();
        let ticket = Ticket {
            pool: Arc::clone(self),
            grant: Arc::clone(&grant),
        };
        self.lock().queue.push_back(Waiter {
            length,
            waker,
            grant,
        });
        self.serve();
        ticket
    }

    /// The memory queued for, if it has been granted and not been claimed yet.
    pub fn claim(&self, ticket: &Ticket) -> Option<Vec<Slot>> {
        lock(&ticket.grant).take()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn reserve_pages(&self) -> usize {
        self.pages / RESERVE
    }

    /// The most that can be had at once without touching the reserve.
    fn capacity(&self) -> usize {
        (self.pages - self.reserve_pages()) * PAGE
    }

    /// Memory for a request, which may not touch the reserve.
    fn grant(self: &Arc<Self>, state: &mut State, length: usize) -> Option<Vec<Slot>> {
        if length > self.capacity() {
            return self.ordinary(state, length);
        }
        self.cut(state, length, self.reserve_pages())
    }

    /// Slots of the pool that leave `reserve` pages free.
    fn cut(
        self: &Arc<Self>,
        state: &mut State,
        length: usize,
        reserve: usize,
    ) -> Option<Vec<Slot>> {
        let wanted = length.div_ceil(PAGE);
        if wanted > state.buddies.free().saturating_sub(reserve) {
            return None;
        }
        let (first, other) = if wanted <= state.buddies.free_in(Zone::Registered) {
            (Zone::Registered, Zone::Plain)
        } else {
            (Zone::Plain, Zone::Registered)
        };
        let mut slots = Vec::with_capacity(length.div_ceil(BLOCK));
        let mut left = length;
        while left > 0 {
            let is_left = state.buddies.free_in(first) > 0;
            let zone = if is_left { first } else { other };
            let (page, pages) = state.buddies.take(zone, left.div_ceil(PAGE));
            let length = left.min(pages * PAGE);
            let generation = state.buddies.generations[page];
            slots.push(Slot {
                pool: Arc::clone(self),
                memory: self.memory_at(page),
                length,
                origin: Origin::Pool { page, generation },
            });
            left -= length;
        }
        Some(slots)
    }

    fn memory_at(&self, page: usize) -> NonNull<u8> {
        assert!(page < self.pages);
        let memory = self.region.as_ptr().wrapping_add(page * PAGE);
        NonNull::new(memory).expect("a mapping is never at 0")
    }

    /// Memory that is not the pool's, within ORDINARY_MAX.
    fn ordinary(self: &Arc<Self>, state: &mut State, length: usize) -> Option<Vec<Slot>> {
        let size = ordinary_size(length);
        if size > ORDINARY_MAX - state.ordinary {
            return None;
        }
        let slot = self.map_slot(length, size)?;
        state.ordinary += size;
        Some(vec![slot])
    }

    fn map_slot(self: &Arc<Self>, length: usize, counted: usize) -> Option<Slot> {
        Some(Slot {
            pool: Arc::clone(self),
            memory: map_ordinary(ordinary_size(length)).ok()?,
            length,
            origin: Origin::Ordinary { counted },
        })
    }

    /// Grant what is queued for, in order, as far as it fits.
    fn serve(self: &Arc<Self>) {
        loop {
            let mut state = self.lock();
            let Some(length) = state.queue.front().map(|waiter| waiter.length) else {
                return;
            };
            let Some(slots) = self.grant(&mut state, length) else {
                return;
            };
            let waiter = state.queue.pop_front().expect("there was a front");
            // Under the pool's lock, so that a ticket is either queued or has its grant.
            *lock(&waiter.grant) = Some(slots);
            drop(state);
            (waiter.waker)();
        }
    }

    fn leave(&self, grant: &Grant) -> Option<Waiter> {
        let queue = &mut self.lock().queue;
        let index = queue
            .iter()
            .position(|waiter| Arc::ptr_eq(&waiter.grant, grant))?;
        queue.remove(index)
    }

    fn take_back(self: &Arc<Self>, slot: &Slot) {
        let mut state = self.lock();
        match slot.origin {
            Origin::Pool { page, .. } => {
                state.buddies.generations[page] = state.buddies.generations[page].wrapping_add(1);
                state.buddies.give(page, slot.length.div_ceil(PAGE));
            }
            Origin::Ordinary { counted } => {
                let size = ordinary_size(slot.length);
                state.ordinary -= counted;
                // SAFETY: mapped with this size for this slot, which is being dropped.
                let _ = unsafe { munmap(slot.memory.as_ptr().cast(), size) };
            }
        }
        let queued = !state.queue.is_empty();
        drop(state);
        if queued {
            self.serve();
        }
    }
}

/// Called when what was queued for has been granted.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

type Grant = Arc<Mutex<Option<Vec<Slot>>>>;

struct Waiter {
    length: usize,
    waker: Waker,
    grant: Grant,
}

/// A place in the queue for memory. Dropping it gives up the place, or the memory if it has been
/// granted and not claimed.
#[must_use = "dropping it gives up the place in the queue"]
pub struct Ticket {
    pool: Arc<Pool>,
    grant: Grant,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // What the waker owns may be slots: it is dropped, as they are, with no lock held.
        drop(self.pool.leave(&self.grant));
        drop(self.pool.claim(self));
        // The next in the queue may need less than this one did.
        self.pool.serve();
    }
}

/// Owned memory of `len()` bytes, aligned to a page: pages of the pool or ordinary memory. Dropping
/// it gives them back.
///
/// A slot belongs to one request, which alone decides who touches which part of it and when. Its
/// bytes have no invariants: where a layer's Python code holds a memoryview of it, or the kernel is
/// still reading it for a client, a write at the wrong time garbles data and nothing else.
pub struct Slot {
    pool: Arc<Pool>,
    memory: NonNull<u8>,
    length: usize,
    origin: Origin,
}

enum Origin {
    Pool {
        page: usize,
        generation: u32,
    },
    /// `counted` bytes of it against ORDINARY_MAX.
    Ordinary {
        counted: usize,
    },
}

// SAFETY: a slot owns its memory, which is not tied to a thread.
unsafe impl Send for Slot {}
// SAFETY: what is shared is bytes without invariants; see the type's documentation.
unsafe impl Sync for Slot {}

impl Slot {
    /// The length that was asked for (or this slot's part of it), at least 1.
    #[allow(clippy::len_without_is_empty)] // It never is.
    pub fn len(&self) -> usize {
        self.length
    }

    pub fn as_ptr(&self) -> *mut u8 {
        self.memory.as_ptr()
    }

    #[cfg(test)]
    pub fn bytes(&self) -> &[u8] {
        self.slice(0..self.length)
    }

    #[cfg(test)]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.slice_mut(0..self.length)
    }

    /// A part of the bytes. Asserts that it is one.
    pub fn slice(&self, range: Range<usize>) -> &[u8] {
        self.check(&range);
        // SAFETY: in bounds of memory that this slot owns and that has been initialised (by the
        // kernel).
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().add(range.start), range.len()) }
    }

    /// A part of the bytes, to be written through a shared slot: for I/O into it. Asserts that it
    /// is one.
    #[allow(clippy::mut_from_ref)]
    pub fn slice_mut(&self, range: Range<usize>) -> &mut [u8] {
        self.check(&range);
        // SAFETY: in bounds of memory that this slot owns. The slot's one request never runs two
        // transfers into overlapping parts at once; a Python memoryview is to it what another
        // process that maps the memfd would be, and bytes have no invariants to break.
        unsafe {
            std::slice::from_raw_parts_mut(self.memory.as_ptr().add(range.start), range.len())
        }
    }

    /// Where in the pool's region it begins. None if it is ordinary memory.
    pub fn pool_offset(&self) -> Option<usize> {
        match self.origin {
            Origin::Pool { page, .. } => Some(page * PAGE),
            Origin::Ordinary { .. } => None,
        }
    }

    /// The registered slot that this is. None if it is not all in registered memory.
    pub fn registration(&self) -> Option<Registration> {
        match self.origin {
            Origin::Pool { page, generation }
                if page * PAGE + self.length <= self.pool.registered.load(Relaxed) =>
            {
                Some(Registration {
                    pool: self.pool.id,
                    slot: page as u32,
                    generation,
                })
            }
            _ => None,
        }
    }

    fn check(&self, range: &Range<usize>) {
        assert!(
            range.start <= range.end && range.end <= self.length,
            "{range:?}"
        );
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.pool.take_back(self);
    }
}

/// Memory that is not the pool's: zeroes until it is touched.
fn map_ordinary(size: usize) -> io::Result<NonNull<u8>> {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let memory =
        unsafe { mmap_anonymous(std::ptr::null_mut(), size, protection, MapFlags::PRIVATE) }?;
    NonNull::new(memory.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// Ordinary memory is whole pages, as the pool's is.
fn ordinary_size(length: usize) -> usize {
    length.div_ceil(PAGE).saturating_mul(PAGE)
}

/// A panic elsewhere (in a waker) happens with no lock held; nothing here stops half-way.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
    use std::thread;
    use std::time::{Duration, Instant};

    const MIB: usize = 1 << 20;
    const LATE: Duration = Duration::from_secs(20);

    fn pool(bytes: usize) -> Arc<Pool> {
        Pool::new(bytes).expect("a memfd")
    }

    fn lengths(slots: &[Slot]) -> Vec<usize> {
        slots.iter().map(Slot::len).collect()
    }

    /// Everything is free, and in whole blocks.
    fn check_whole(pool: &Pool) {
        assert_eq!(pool.free_bytes(), pool.size());
        let state = pool.lock();
        assert_eq!(state.ordinary, 0);
        state.buddies.check_whole();
    }

    /// A waker that counts.
    fn counter() -> (Arc<AtomicUsize>, Waker) {
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        (count, Arc::new(move || _ = counted.fetch_add(1, SeqCst)))
    }

    fn nobody() -> Waker {
        Arc::new(|| ())
    }

    /// Take memory in single pages until only the reserve is left.
    fn exhaust(pool: &Arc<Pool>) -> Vec<Slot> {
        std::iter::from_fn(|| pool.allocate(PAGE))
            .flatten()
            .collect()
    }

    #[test]
    fn sizes_are_rounded_up() {
        for (asked, size) in [
            (0, BLOCK),
            (1, BLOCK),
            (BLOCK, BLOCK),
            (BLOCK + 1, 2 * BLOCK),
        ] {
            assert_eq!(pool(asked).size(), size);
            check_whole(&pool(asked));
        }
        assert!(Pool::new(usize::MAX).is_err());
    }

    #[test]
    fn pools_differ() {
        assert_ne!(pool(1).id(), pool(1).id());
    }

    #[test]
    fn memory_is_of_the_asked_length_in_few_pieces() {
        let pool = pool(16 * MIB);
        for (length, pieces) in [
            (0, vec![]),
            (1, vec![1]),
            (36 * 1024 + 1, vec![36 * 1024 + 1]),
            (BLOCK, vec![BLOCK]),
            (BLOCK + 1, vec![BLOCK, 1]),
            (5 * MIB, vec![BLOCK, BLOCK, MIB]),
        ] {
            let slots = pool.allocate(length).expect("room");
            assert_eq!(lengths(&slots), pieces);
            assert_eq!(
                pool.free_bytes(),
                pool.size() - length.div_ceil(PAGE) * PAGE
            );
            assert!(
                slots
                    .iter()
                    .all(|slot| slot.as_ptr().addr().is_multiple_of(PAGE))
            );
        }
        check_whole(&pool);
    }

    #[test]
    fn slots_are_the_memfd() {
        let pool = pool(BLOCK);
        let mut slot = pool.allocate(5000).expect("room").remove(0);
        slot.bytes_mut().fill(7);
        slot.slice_mut(4990..5000).copy_from_slice(b"0123456789");
        assert_eq!(slot.slice(4989..4992), [7, b'0', b'1']);
        let (base, size) = pool.as_region();
        let offset = slot.pool_offset().expect("of the pool");
        assert_eq!((base.wrapping_add(offset), size), (slot.as_ptr(), BLOCK));
        let mut read = [0; 5000];
        assert_eq!(
            rustix::io::pread(pool.region.memfd(), &mut read, offset as u64),
            Ok(5000)
        );
        assert_eq!(read, *slot.bytes());
        assert!(
            rustix::fs::ftruncate(pool.region.memfd(), 0).is_err(),
            "sealed"
        );
    }

    #[test]
    #[should_panic(expected = "4090..4097")]
    fn slices_are_in_bounds() {
        pool(BLOCK).allocate(PAGE).expect("room")[0].slice_mut(4090..4097);
    }

    #[test]
    fn the_reserve_is_for_bounces() {
        let pool = pool(8 * BLOCK);
        let slots = exhaust(&pool);
        assert_eq!(pool.free_bytes(), BLOCK);
        assert!(pool.allocate(1).is_none());
        let bounce = pool.allocate_bounce(BLOCK).expect("the reserve");
        assert_eq!(pool.free_bytes(), 0);
        assert!(bounce.iter().all(|slot| slot.registration().is_some()));
        drop((slots, bounce));
        check_whole(&pool);
    }

    #[test]
    fn bounces_get_ordinary_memory_whatever_clients_hold() {
        let pool = pool(BLOCK);
        let _all = pool.allocate_bounce(BLOCK).expect("room");
        let clients = pool.allocate_ordinary(ORDINARY_MAX).expect("in bounds");
        assert!(pool.allocate_ordinary(1).is_none());
        let mut first = pool.allocate_bounce(BLOCK).expect("ordinary memory");
        assert_eq!(
            (first[0].registration(), first[0].pool_offset()),
            (None, None)
        );
        first[0].bytes_mut()[BLOCK - 1] = 1;
        assert!(pool.allocate_bounce(usize::MAX).is_none());
        drop((first, clients));
        assert!(pool.allocate_ordinary(1).is_some());
    }

    #[test]
    fn a_generation_ends_when_its_slot_is_freed() {
        let pool = pool(BLOCK);
        let first = pool.allocate(2 * PAGE).expect("room")[0]
            .registration()
            .expect("live");
        let again = pool.allocate(2 * PAGE).expect("room");
        let second = again[0].registration().expect("live");
        assert_eq!((first.pool, first.slot), (second.pool, second.slot));
        assert_eq!(first.generation + 1, second.generation);
        assert_eq!(
            second.slot as usize * PAGE,
            again[0].pool_offset().expect("of the pool")
        );
    }

    #[test]
    fn only_what_is_registered_says_so() {
        let pool = pool(2 * BLOCK);
        pool.set_registered(BLOCK);
        for slot in exhaust(&pool) {
            let inside = slot.pool_offset().expect("of the pool") < BLOCK;
            assert_eq!(slot.registration().is_some(), inside);
        }
        check_whole(&pool);
        pool.set_registered(0);
        assert!(exhaust(&pool).iter().all(|s| s.registration().is_none()));
    }

    fn are_registered(slots: &[Slot]) -> bool {
        slots.iter().all(|slot| slot.registration().is_some())
    }

    #[test]
    fn what_is_registered_is_taken_first_and_whole() {
        let pool = pool(8 * BLOCK);
        pool.set_registered(5 * PAGE);
        let first = pool.allocate(3 * PAGE).expect("room");
        assert!(are_registered(&first));
        let longer = pool.allocate(3 * PAGE).expect("room");
        assert!(
            longer.iter().all(|slot| slot.registration().is_none()),
            "only two are left"
        );
        let rest = pool.allocate(2 * PAGE).expect("room");
        assert!(are_registered(&rest));
        drop(first);
        assert!(are_registered(
            &pool.allocate_bounce(3 * PAGE).expect("room")
        ));
        drop((longer, rest));
        check_whole(&pool);
    }

    #[test]
    fn where_neither_part_suffices_both_do() {
        let pool = pool(8 * BLOCK);
        pool.set_registered(BLOCK);
        let most = pool.allocate(7 * BLOCK - PAGE).expect("the plain part");
        assert!(most.iter().all(|slot| slot.registration().is_none()));
        let bounce = pool.allocate_bounce(BLOCK + PAGE).expect("the rest");
        assert_eq!(
            bounce.iter().filter(|s| s.registration().is_some()).count(),
            1
        );
        assert_eq!(pool.free_bytes(), 0);
        drop((most, bounce));
        check_whole(&pool);
    }

    #[test]
    #[should_panic(expected = "in use")]
    fn what_is_in_use_stays_what_it_is() {
        let pool = pool(BLOCK);
        let _slots = pool.allocate(1);
        pool.set_registered(0);
    }

    #[test]
    fn fragments_are_memory_too() {
        let pool = pool(8 * BLOCK);
        let mut slots = exhaust(&pool);
        slots.sort_by_key(Slot::pool_offset);
        // Every other page is kept: nothing but single pages is free.
        let kept: Vec<Slot> = slots.into_iter().step_by(2).collect();
        let free = pool.free_bytes() - BLOCK;
        let fragments = pool.allocate(free - 1).expect("it fits");
        assert_eq!(lengths(&fragments).iter().sum::<usize>(), free - 1);
        assert!(pool.allocate(1).is_none());
        drop((kept, fragments));
        check_whole(&pool);
    }

    #[test]
    fn a_slot_outlives_the_pool() {
        let pool = pool(BLOCK);
        let mut slot = pool.allocate(10).expect("room").remove(0);
        drop(pool);
        slot.bytes_mut().fill(1);
        assert_eq!(slot.bytes(), [1; 10]);
    }

    #[test]
    fn what_fits_is_granted_at_once() {
        let pool = pool(BLOCK);
        let (woken, waker) = counter();
        let ticket = pool.enqueue(PAGE, waker);
        assert_eq!(woken.load(SeqCst), 1);
        assert_eq!(lengths(&pool.claim(&ticket).expect("granted")), [PAGE]);
        assert!(pool.claim(&ticket).is_none(), "only once");
        drop(ticket);
        assert_eq!(woken.load(SeqCst), 1);
        check_whole(&pool);
    }

    #[test]
    fn the_queue_is_served_in_order_and_not_overtaken() {
        let pool = pool(8 * BLOCK);
        let mut slots = exhaust(&pool);
        let (first_woken, waker) = counter();
        let first = pool.enqueue(2 * PAGE, waker);
        let (second_woken, waker) = counter();
        let second = pool.enqueue(PAGE, waker);

        slots.pop();
        assert!(pool.claim(&first).is_none());
        assert!(
            pool.claim(&second).is_none(),
            "it would fit, but is not at the head"
        );
        assert!(
            pool.allocate(PAGE).is_none(),
            "it would fit, but others queue"
        );
        assert!(pool.allocate_bounce(PAGE).is_some(), "bounces overtake");
        assert_eq!(first_woken.load(SeqCst), 0);

        slots.pop();
        assert_eq!(
            (first_woken.load(SeqCst), second_woken.load(SeqCst)),
            (1, 0)
        );
        slots.pop();
        assert_eq!(
            (first_woken.load(SeqCst), second_woken.load(SeqCst)),
            (1, 1)
        );
        assert!(pool.claim(&second).is_some());
        assert!(pool.allocate(PAGE).is_some(), "nobody queues any more");
    }

    #[test]
    fn a_cancelled_ticket_makes_way() {
        let pool = pool(8 * BLOCK);
        let mut slots = exhaust(&pool);
        let (first_woken, waker) = counter();
        let first = pool.enqueue(MIB, waker);
        let (second_woken, waker) = counter();
        let second = pool.enqueue(PAGE, waker);
        slots.pop();
        drop(first);
        assert_eq!(
            (first_woken.load(SeqCst), second_woken.load(SeqCst)),
            (0, 1)
        );
        drop(second); // Granted, not claimed: given back.
        drop(slots);
        check_whole(&pool);
    }

    #[test]
    fn what_is_longer_than_the_pool_is_ordinary_memory() {
        let pool = pool(BLOCK);
        let ticket = pool.enqueue(32 * MIB, nobody());
        let slots = pool.claim(&ticket).expect("granted");
        assert_eq!(
            (lengths(&slots), slots[0].pool_offset()),
            (vec![32 * MIB], None)
        );
        let next = pool.enqueue(ORDINARY_MAX, nobody());
        assert!(pool.claim(&next).is_none());
        drop(slots);
        assert!(pool.claim(&next).is_some());
    }

    #[test]
    #[should_panic(expected = "never fit")]
    fn what_can_never_be_granted_is_a_bug() {
        drop(pool(BLOCK).enqueue(ORDINARY_MAX + 1, nobody()));
    }

    #[test]
    fn a_waker_may_use_the_pool() {
        let pool = pool(8 * BLOCK);
        let mut slots = exhaust(&pool);
        let owned = Mutex::new(slots.split_off(slots.len() - 3));
        let again = Arc::clone(&pool);
        let waker = Arc::new(move || {
            assert!(again.allocate(PAGE).is_none(), "one more queues");
            lock(&owned).clear();
        });
        let first = pool.enqueue(PAGE, waker);
        let (woken, waker) = counter();
        let second = pool.enqueue(3 * PAGE, waker);
        slots.pop();
        assert_eq!(woken.load(SeqCst), 1, "by what the first waker has freed");
        assert!(pool.claim(&first).is_some() && pool.claim(&second).is_some());
    }

    #[test]
    fn a_cancelled_waker_may_own_slots() {
        let pool = pool(8 * BLOCK);
        let mut slots = exhaust(&pool);
        let owned = slots.pop();
        let waker: Waker = Arc::new(move || assert!(owned.is_none(), "never called"));
        drop(pool.enqueue(BLOCK, waker));
        drop(slots);
        check_whole(&pool);
    }

    #[test]
    fn a_long_waiter_is_not_starved_by_short_ones() {
        let pool = pool(40 * MIB);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for seed in 0..3 {
                let (pool, stop) = (&pool, &stop);
                scope.spawn(move || {
                    let mut random = Random(seed);
                    let mut held: VecDeque<Vec<Slot>> = VecDeque::new();
                    while !stop.load(SeqCst) {
                        held.extend(pool.allocate(1 + random.below(100_000) as usize));
                        if held.len() > 250 || random.one_in(3) {
                            held.pop_front();
                        }
                    }
                });
            }
            thread::sleep(Duration::from_millis(20));
            for _ in 0..20 {
                let ticket = pool.enqueue(32 * MIB, nobody());
                let begun = Instant::now();
                while pool.claim(&ticket).is_none() {
                    if begun.elapsed() > LATE {
                        stop.store(true, SeqCst);
                        panic!("starved");
                    }
                    thread::yield_now();
                }
            }
            stop.store(true, SeqCst);
        });
        check_whole(&pool);
    }

    /// Slots in use, each filled with a mark of its own, and which pages they cover.
    struct Model {
        pool: Arc<Pool>,
        taken: Vec<bool>,
        held: Vec<(u8, Vec<Slot>)>,
    }

    impl Model {
        fn allocate(&mut self, length: usize, mark: u8) {
            let free = self.pool.free_bytes();
            let Some(mut slots) = self.pool.allocate(length) else {
                assert!(length.div_ceil(PAGE) * PAGE + self.pool.size() / RESERVE > free);
                return;
            };
            assert_eq!(lengths(&slots).iter().sum::<usize>(), length);
            for slot in &mut slots {
                assert!(slot.len() <= BLOCK);
                slot.bytes_mut().fill(mark);
                self.set_taken(slot, true);
            }
            self.held.push((mark, slots));
        }

        fn free(&mut self, index: usize) {
            let (mark, slots) = self.held.swap_remove(index);
            for slot in &slots {
                assert!(
                    slot.bytes().iter().all(|byte| *byte == mark),
                    "written by another"
                );
                self.set_taken(slot, false);
            }
        }

        fn set_taken(&mut self, slot: &Slot, value: bool) {
            let first = slot.pool_offset().expect("of the pool") / PAGE;
            for page in &mut self.taken[first..first + slot.len().div_ceil(PAGE)] {
                assert_ne!(std::mem::replace(page, value), value, "given twice");
            }
        }
    }

    #[test]
    fn memory_is_never_given_twice() {
        for seed in 0..30 {
            let pool = pool(3 * BLOCK);
            let mut random = Random(seed);
            let taken = vec![false; pool.pages];
            let mut model = Model {
                pool,
                taken,
                held: Vec::new(),
            };
            for step in 0..600_u32 {
                if model.held.is_empty() || random.one_in(2) {
                    let bound = 1 << random.below(22);
                    let length = 1 + random.below(bound) as usize;
                    model.allocate(length, step as u8);
                } else {
                    model.free(random.below(model.held.len() as u64) as usize);
                }
                let used = model.taken.iter().filter(|page| **page).count();
                assert_eq!(model.pool.free_bytes(), model.pool.size() - used * PAGE);
            }
            model.held.clear();
            check_whole(&model.pool);
        }
    }
}
