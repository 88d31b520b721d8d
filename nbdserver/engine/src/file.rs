//! An open file: the leaf of every mapping. System calls, one sync at a time, and the recorder's hooks.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

use rustix::fs::{
    AtFlags, FallocateFlags, FileType, Mode, OFlags, SeekFrom, StatxFlags, fallocate, fcntl_getfl,
    fcntl_setfl, fdatasync, fstat, ftruncate, open, seek, sendfile, statx,
};
use rustix::io::{Errno, ReadWriteFlags, preadv, preadv2, pwritev};

use crate::cache;
use crate::direct::{self, Alignment};
use crate::extents::FileId;
use crate::pool::{Pool, Slot};
use crate::record::{Operation, Recorder, Token};
use crate::ring::SyncRings;
use crate::serial::Serial;
use crate::vector::Vector;

/// linux/stat.h.
const STATX_DIOALIGN: u32 = 0x2000;
/// The kernel's bound on one vectored call (UIO_MAXIOV).
const IOV_MAX: usize = 1024;
/// A buffered write that waits for longer than this means that the kernel is throttling writers of this file...
const SLOW_WRITE: Duration = Duration::from_millis(2);
/// ...and for this long its writes are not made on a worker that other connections wait for.
const SLOW_MEMORY: Duration = Duration::from_millis(100);
/// After a write that took long, writes are watched for this long: did they wait for the kernel, or have other threads just
/// had the processor?
const WATCH_MEMORY: Duration = Duration::from_millis(200);
/// Zeroes are written out in pieces of this size where the file system cannot zero.
const ZERO_CHUNK: usize = 1 << 20;

#[derive(Default)]
pub struct Counters {
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub fixed: AtomicU64,
    pub plain: AtomicU64,
    /// Bytes that were copied, because their own memory would not do.
    pub bounced: AtomicU64,
    /// Bytes that left for clients from the page cache, in no memory of ours.
    pub sent: AtomicU64,
    pub syncs: AtomicU64,
}

impl Counters {
    /// The kernel has been given a read or write, on registered memory or not.
    pub fn transferred(&self, write: bool, fixed: bool) {
        let direction = if write { &self.writes } else { &self.reads };
        direction.fetch_add(1, Relaxed);
        let kind = if fixed { &self.fixed } else { &self.plain };
        kind.fetch_add(1, Relaxed);
    }
}

#[derive(Default)]
struct Syncs {
    started: u64,
    finished: u64,
    running: bool,
    failed: Option<Errno>,
}

/// How a file is used, and what its I/O needs besides the descriptor.
pub struct Means {
    /// O_DIRECT: past the page cache.
    pub direct: bool,
    /// Never sync: for what need not outlive the machine.
    pub unsafe_: bool,
    /// Never the ring.
    pub threads: bool,
    /// The most that is read or written at once.
    pub transfer_max: usize,
    pub pool: Arc<Pool>,
    pub rings: Option<Arc<SyncRings>>,
    pub recorder: Option<Arc<Recorder>>,
}

pub struct File {
    pub id: FileId,
    pub name: String,
    pub read_only: bool,
    /// Anonymous memory: never blocks.
    pub memory: bool,
    pub counters: Counters,
    fd: OwnedFd,
    /// See `cached`.
    cached: OnceLock<OwnedFd>,
    regular: bool,
    nowait: AtomicBool,
    epoch: Instant,
    slow_until_ms: AtomicU64,
    watched_until_ms: AtomicU64,
    syncs: Mutex<Syncs>,
    synced: Condvar,
    means: Means,
    /// What direct I/O asks for; None where the page cache is used.
    pub direct: Option<Alignment>,
    /// Who writes where, for files with direct I/O.
    pub serial: Arc<Serial>,
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl File {
    pub fn new(
        id: FileId,
        fd: OwnedFd,
        name: String,
        read_only: bool,
        mut means: Means,
    ) -> Result<File, Errno> {
        let direct = means.direct.then(|| set_direct(&fd)).transpose()?;
        if let Some(Alignment { block, .. }) = direct {
            let block = block as usize;
            means.transfer_max = (means.transfer_max / block * block).max(block);
        }
        let regular = FileType::from_raw_mode(fstat(&fd)?.st_mode) == FileType::RegularFile;
        if let Some(recorder) = &means.recorder {
            recorder.file(id, &name);
        }
        let memory = rustix::fs::fcntl_get_seals(&fd).is_ok();
        Ok(File {
            id,
            name,
            read_only,
            memory,
            counters: Counters::default(),
            fd,
            cached: OnceLock::new(),
            regular,
            nowait: AtomicBool::new(true),
            epoch: Instant::now(),
            slow_until_ms: AtomicU64::new(0),
            watched_until_ms: AtomicU64::new(0),
            syncs: Mutex::default(),
            synced: Condvar::new(),
            means,
            direct,
            serial: Arc::default(),
        })
    }

    /// The size now, bytes.
    pub fn size(&self) -> Result<u64, Errno> {
        if self.regular {
            Ok(fstat(&self.fd)?.st_size as u64)
        } else {
            seek(&self.fd, SeekFrom::End(0))
        }
    }

    /// How much storage it takes up now, bytes.
    pub fn stored(&self) -> Result<u64, Errno> {
        Ok(fstat(&self.fd)?.st_blocks as u64 * 512)
    }

    /// Whether the ring of a worker may carry out its I/O.
    pub fn takes_ring(&self) -> bool {
        !self.means.threads
    }

    /// How much of the beginning of `range` may be read or written at once.
    pub fn at_once(&self, range: Range<usize>) -> Range<usize> {
        range.start
            ..range
                .end
                .min(range.start.saturating_add(self.means.transfer_max))
    }

    /// Whether a transfer can be carried out as it is.
    pub fn suits(&self, offset: u64, vector: &Vector, range: Range<usize>) -> bool {
        self.direct
            .is_none_or(|alignment| alignment.suits(offset, vector, range))
    }

    /// Read into `range` of `vector`, blocking; what lies past the end of the file reads as zeroes.
    pub fn read(&self, offset: u64, vector: &Vector, range: Range<usize>) -> Result<(), Errno> {
        crate::points::reached("file.read");
        match self.direct {
            Some(alignment) if !alignment.suits(offset, vector, range.clone()) => {
                direct::read_padded(self, &self.means.pool, alignment, offset, vector, range)
            }
            _ => self.read_aligned(offset, vector, range),
        }
    }

    /// As `read`, of what may be read as it is.
    pub fn read_aligned(
        &self,
        offset: u64,
        vector: &Vector,
        range: Range<usize>,
    ) -> Result<(), Errno> {
        let mut start = range.start;
        while start < range.end {
            let at = offset + (start - range.start) as u64;
            match self.transfer(false, at, vector, start..range.end)? {
                done if self.is_end(done) => {
                    vector.zero(start + done..range.end);
                    break;
                }
                done => start += done,
            }
        }
        Ok(())
    }

    /// Whether a read that did so many bytes has met the end of the file: direct I/O stops within a block nowhere else.
    pub fn is_end(&self, done: usize) -> bool {
        done == 0
            || self
                .direct
                .is_some_and(|alignment| !(done as u64).is_multiple_of(alignment.block))
    }

    /// One system call, or one turn of a ring, for the beginning of a range: how much it did.
    fn transfer(
        &self,
        write: bool,
        offset: u64,
        vector: &Vector,
        range: Range<usize>,
    ) -> Result<usize, Errno> {
        let range = self.at_once(range);
        let (slot, part) = vector
            .parts(range.clone())
            .next()
            .expect("bytes to transfer");
        if let (Some(_), Some(rings)) = (self.direct, &self.means.rings)
            && slot.registration().is_some()
        {
            while let Some(done) =
                rings.transfer(write, self.fd.as_fd(), slot, part.clone(), offset)
            {
                self.counters.transferred(write, true);
                match done {
                    Err(Errno::AGAIN | Errno::INTR) => {}
                    done => return done,
                }
            }
        }
        self.counters.transferred(write, false);
        if write {
            let slices = vector.io_slices(range);
            retry(|| pwritev(&self.fd, &slices[..slices.len().min(IOV_MAX)], offset))
        } else {
            let mut slices = vector.io_slices_mut(range);
            let count = slices.len().min(IOV_MAX);
            retry(|| preadv(&self.fd, &mut slices[..count], offset))
        }
    }

    /// Read only what is in the page cache: the bytes read, from the start of `range`; 0 where it would block (or
    /// at the end of the file: `read` tells the two apart).
    pub fn read_nowait(&self, offset: u64, slices: &mut [IoSliceMut<'_>]) -> Result<usize, Errno> {
        if !self.nowait.load(Relaxed) || self.direct.is_some() {
            return Ok(0);
        }
        crate::points::reached("file.read_nowait");
        let flags = if self.memory {
            ReadWriteFlags::empty()
        } else {
            ReadWriteFlags::NOWAIT
        };
        let count = slices.len().min(IOV_MAX);
        match preadv2(&self.fd, &mut slices[..count], offset, flags) {
            Ok(done) => {
                self.counters.transferred(false, false);
                Ok(done)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                self.nowait.store(false, Relaxed);
                Ok(0)
            }
            Err(errno) => Err(errno),
        }
    }

    /// Whether all of a range is in the page cache, as far as can be told without waiting, and may be sent from there.
    pub fn is_cached(&self, offset: u64, length: usize) -> bool {
        if self.direct.is_some() || !self.regular || self.memory || length == 0 {
            return false;
        }
        crate::points::reached("file.is_cached");
        let last = offset + length as u64 - 1;
        // Pages that are still being read count among those that are there. They come in order: the last one tells.
        let arrived = preadv2(
            &self.fd,
            &mut [IoSliceMut::new(&mut [0])],
            last,
            ReadWriteFlags::NOWAIT,
        );
        arrived == Ok(1) && cache::holds(&self.fd, offset, length as u64)
    }

    /// Have the socket take bytes of the file from the page cache, as many as it can now: 0 at the end of the file, AGAIN
    /// where it is full. What has left the page cache meanwhile is read, and waited for.
    pub fn send_to(&self, socket: &OwnedFd, offset: u64, length: usize) -> Result<usize, Errno> {
        crate::points::reached("file.send_to");
        let mut position = offset;
        let sent = sendfile(socket, &self.fd, Some(&mut position), length)?;
        self.counters.sent.fetch_add(sent as u64, Relaxed);
        Ok(sent)
    }

    /// Ordinary memory for so many of its bytes. NOMEM.
    pub fn memory_for(&self, length: usize) -> Result<Vec<Slot>, Errno> {
        let slots = self.means.pool.allocate_ordinary(length);
        slots.ok_or(Errno::NOMEM)
    }

    /// Whether a write would rather not be made on a worker: the kernel has been holding up writers of this file, or will.
    pub fn writes_slowly(&self) -> bool {
        let until = self.slow_until_ms.load(Relaxed);
        self.direct.is_some() || (until != 0 && (self.epoch.elapsed().as_millis() as u64) < until)
    }

    /// Write `range` of `vector`, blocking; the file grows as needed.
    pub fn write(&self, offset: u64, vector: &Vector, range: Range<usize>) -> Result<(), Errno> {
        let began = Instant::now();
        let now_ms = (began - self.epoch).as_millis() as u64;
        let watched = now_ms < self.watched_until_ms.load(Relaxed);
        let before = watched.then(processor_wait);
        crate::points::reached("file.write");
        let result = match self.direct {
            None => self.write_aligned(offset, vector, range),
            Some(alignment) => self.write_direct(alignment, offset, vector, range),
        };
        if self.direct.is_none() && began.elapsed() > SLOW_WRITE {
            self.was_slow(began, before);
        }
        result
    }

    /// A write that began then took long; `before` is what `processor_wait` said before it, if that was asked.
    fn was_slow(&self, began: Instant, before: Option<Duration>) {
        let until = |memory| (self.epoch.elapsed() + memory).as_millis() as u64;
        self.watched_until_ms.store(until(WATCH_MEMORY), Relaxed);
        if let Some(before) = before
            && began.elapsed().saturating_sub(processor_wait() - before) > SLOW_WRITE
        {
            self.slow_until_ms.store(until(SLOW_MEMORY), Relaxed);
        }
    }

    fn write_direct(
        &self,
        alignment: Alignment,
        offset: u64,
        vector: &Vector,
        range: Range<usize>,
    ) -> Result<(), Errno> {
        let end = offset + range.len() as u64;
        let blocks = alignment.pad(offset..end);
        if alignment.suits(offset, vector, range.clone()) {
            let _shared = self.serial.hold(blocks, false);
            return self.write_aligned(offset, vector, range);
        }
        let _alone = self.serial.hold(blocks.clone(), true);
        crate::points::reached("file.alone");
        // Padding past the end of the file would make it longer, if only until it is cut off again. What lies there goes
        // through the page cache, which the kernel keeps coherent with direct I/O.
        let padded_end = if self.regular && blocks.end > end {
            let size = self.size()?;
            let whole = size - size % alignment.block;
            if blocks.end > size {
                whole.clamp(offset, end)
            } else {
                end
            }
        } else {
            end
        };
        let middle = range.start + (padded_end - offset) as usize;
        if padded_end > offset {
            let pool = &self.means.pool;
            direct::write_padded(self, pool, alignment, offset, vector, range.start..middle)?;
        }
        if padded_end < end {
            self.write_cached(padded_end, vector, middle..range.end)?;
        }
        Ok(())
    }

    /// Write through the page cache, though the file is open for direct I/O.
    fn write_cached(&self, offset: u64, vector: &Vector, range: Range<usize>) -> Result<(), Errno> {
        let cached = self.cached()?;
        self.recorded_write(offset, vector, range, |at, left| {
            self.counters.transferred(true, false);
            let slices = vector.io_slices(self.at_once(left));
            retry(|| pwritev(cached, &slices[..slices.len().min(IOV_MAX)], at))
        })
    }

    /// The same file, open a second time and without O_DIRECT.
    fn cached(&self) -> Result<&OwnedFd, Errno> {
        if let Some(cached) = self.cached.get() {
            return Ok(cached);
        }
        let path = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        let cached = open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(self.cached.get_or_init(|| cached))
    }

    /// As `write`, of what may be written as it is.
    pub fn write_aligned(
        &self,
        offset: u64,
        vector: &Vector,
        range: Range<usize>,
    ) -> Result<(), Errno> {
        self.recorded_write(offset, vector, range, |at, left| {
            self.transfer(true, at, vector, left)
        })
    }

    /// Write all of `range` by means of `write`, which is given an offset and what is left, and says how much it did.
    fn recorded_write(
        &self,
        offset: u64,
        vector: &Vector,
        range: Range<usize>,
        write: impl Fn(u64, Range<usize>) -> Result<usize, Errno>,
    ) -> Result<(), Errno> {
        let token = self.begin_write(offset, vector, range.clone());
        let mut start = range.start;
        let mut result = Ok(());
        while start < range.end && result.is_ok() {
            match write(offset + (start - range.start) as u64, start..range.end) {
                Ok(0) => result = Err(Errno::NOSPC),
                Ok(done) => start += done,
                Err(errno) => result = Err(errno),
            }
        }
        self.end(token, result);
        result
    }

    pub fn begin_write(&self, offset: u64, vector: &Vector, range: Range<usize>) -> Option<Token> {
        let length = range.len() as u64;
        self.begin(Operation::Write, 0, (offset, length), || {
            vector.io_slices(range)
        })
    }

    fn begin<'a>(
        &self,
        operation: Operation,
        flags: u32,
        range: (u64, u64),
        payload: impl FnOnce() -> Vec<IoSlice<'a>>,
    ) -> Option<Token> {
        let recorder = self.means.recorder.as_ref()?;
        Some(recorder.begin(operation, self.id, flags, range, &payload()))
    }

    pub fn end(&self, token: Option<Token>, result: Result<(), Errno>) {
        if let (Some(recorder), Some(token)) = (&self.means.recorder, token) {
            recorder.end(token, result);
        }
    }

    /// Make a range read as zeroes. `may_unmap` permits a hole; `no_fallback` forbids writing zeroes out.
    pub fn zero(
        &self,
        offset: u64,
        length: u64,
        may_unmap: bool,
        no_fallback: bool,
    ) -> Result<(), Errno> {
        let token = self.begin(
            Operation::Zero,
            u32::from(may_unmap),
            (offset, length),
            Vec::new,
        );
        crate::points::reached("file.zero");
        let result = self.zero_inner(offset, length, may_unmap, no_fallback);
        self.end(token, result);
        result
    }

    fn zero_inner(
        &self,
        offset: u64,
        length: u64,
        may_unmap: bool,
        no_fallback: bool,
    ) -> Result<(), Errno> {
        if may_unmap {
            match self.punch(offset, length) {
                Err(errno) if unsupported(errno) => {}
                result => {
                    result?;
                    return self.grow(offset + length);
                }
            }
        }
        // A block device's ZERO_RANGE may write the zeroes out, in the kernel.
        if no_fallback && !self.regular {
            return Err(Errno::OPNOTSUPP);
        }
        match self.allocate(FallocateFlags::ZERO_RANGE, offset, length) {
            Err(errno) if unsupported(errno) => {}
            result => return result,
        }
        if no_fallback {
            return Err(Errno::OPNOTSUPP);
        }
        self.write_zeroes(offset, length)
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), Errno> {
        let zeroes = direct::bounce(&self.means.pool, ZERO_CHUNK.min(length as usize))?;
        zeroes.zero(0..zeroes.len());
        let end = offset + length;
        let mut at = offset;
        while at < end {
            // Pieces end where blocks do, so that only the ends of the range are padded.
            let part = (end - at).min(ZERO_CHUNK as u64 - at % ZERO_CHUNK as u64);
            self.write(at, &zeroes, 0..part as usize)?;
            at += part;
        }
        Ok(())
    }

    fn punch(&self, offset: u64, length: u64) -> Result<(), Errno> {
        self.allocate(
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            length,
        )
    }

    fn allocate(&self, flags: FallocateFlags, offset: u64, length: u64) -> Result<(), Errno> {
        // A read-modify-write of a block that the range ends in would bring back what was there.
        let _shared = self.direct.map(|alignment| {
            self.serial
                .hold(alignment.pad(offset..offset + length), false)
        });
        retry(|| fallocate(&self.fd, flags, offset, length))
    }

    /// Have the file reach `end`. By writing its last byte, which is the caller's to write: a truncation could cut off
    /// what another thread has written beyond it meanwhile.
    fn grow(&self, end: u64) -> Result<(), Errno> {
        if self.regular && self.size()? < end {
            self.write_zeroes(end - 1, 1)?;
        }
        Ok(())
    }

    /// Give storage back where the file system can; the contents of the range become undefined.
    pub fn discard(&self, offset: u64, length: u64) -> Result<(), Errno> {
        let token = self.begin(Operation::Discard, 0, (offset, length), Vec::new);
        crate::points::reached("file.discard");
        let result = match self.punch(offset, length) {
            Err(errno) if unsupported(errno) => Ok(()),
            result => result,
        };
        self.end(token, result);
        result
    }

    pub fn resize(&self, size: u64) -> Result<(), Errno> {
        // Not while blocks at the end are read, changed and written back: they would come back with the old end.
        let _alone = self.direct.map(|_| self.serial.hold(0..u64::MAX, true));
        let token = self.begin(Operation::Resize, 0, (size, 0), Vec::new);
        let result = retry(|| ftruncate(&self.fd, size));
        self.end(token, result);
        result
    }

    /// Make every write that completed before the call durable. Those who come while a sync runs share the next
    /// one. A failed sync fails all later ones too: the kernel has dropped the pages and would report success.
    pub fn sync(&self) -> Result<(), Errno> {
        if self.means.unsafe_ {
            return Ok(());
        }
        let mut syncs = self.syncs.lock().unwrap();
        let wanted = syncs.started + 1;
        loop {
            if let Some(errno) = syncs.failed {
                return Err(errno);
            }
            if syncs.finished >= wanted {
                return Ok(());
            }
            if syncs.running {
                syncs = self.synced.wait(syncs).unwrap();
                continue;
            }
            syncs.running = true;
            syncs.started += 1;
            drop(syncs);
            self.counters.syncs.fetch_add(1, Relaxed);
            let token = self.begin(Operation::Sync, 0, (0, 0), Vec::new);
            crate::points::reached("file.sync");
            let result = retry(|| fdatasync(&self.fd));
            self.end(token, result);
            syncs = self.syncs.lock().unwrap();
            syncs.running = false;
            syncs.finished = syncs.started;
            syncs.failed = result.err();
            self.synced.notify_all();
        }
    }

    /// Consecutive (length, is data) runs that cover the range exactly. Past the end of the file is a hole; a file
    /// system that does not know is all data.
    pub fn status(&self, offset: u64, length: u64) -> Result<Vec<(u64, bool)>, Errno> {
        let end = offset + length;
        let mut runs = Vec::new();
        let mut position = offset;
        let size = self.size()?;
        while position < end {
            if position >= size {
                runs.push((end - position, false));
                break;
            }
            let limit = end.min(size);
            let data = match retry(|| seek(&self.fd, SeekFrom::Data(position))) {
                Ok(at) => at.min(limit),
                Err(Errno::NXIO) => limit,
                Err(Errno::INVAL | Errno::OPNOTSUPP) => position,
                Err(errno) => return Err(errno),
            };
            if data > position {
                runs.push((data - position, false));
                position = data;
                continue;
            }
            let hole = match retry(|| seek(&self.fd, SeekFrom::Hole(position))) {
                Ok(at) => at.min(limit),
                Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => limit,
                Err(errno) => return Err(errno),
            };
            // A hole where data was found a moment ago: the file is changing under us.
            let hole = if hole > position { hole } else { limit };
            runs.push((hole - position, true));
            position = hole;
        }
        Ok(runs)
    }

    /// Ask the kernel to bring a range into the page cache.
    pub fn prefetch(&self, offset: u64, length: u64) {
        if self.direct.is_some() {
            return; // nobody would read it there
        }
        let length = std::num::NonZeroU64::new(length);
        // Advice: that it was not taken is nobody's failure.
        let _ = rustix::fs::fadvise(&self.fd, offset, length, rustix::fs::Advice::WillNeed);
    }
}

/// Where the kernel does not say what direct I/O asks for: what no device finds too small.
const ALIGNMENT_UNKNOWN: Alignment = Alignment {
    memory: 4096,
    block: 4096,
};

/// Turn direct I/O on, and ask what it asks for (STATX_DIOALIGN, Linux 6.1).
fn set_direct(fd: &OwnedFd) -> Result<Alignment, Errno> {
    let flags = fcntl_getfl(fd)?;
    fcntl_setfl(fd, flags | OFlags::DIRECT)?;
    let wanted = StatxFlags::from_bits_retain(STATX_DIOALIGN);
    let Ok(told) = statx(fd, c"", AtFlags::EMPTY_PATH, wanted) else {
        return Ok(ALIGNMENT_UNKNOWN);
    };
    let (memory, block) = (
        told.stx_dio_mem_align as usize,
        u64::from(told.stx_dio_offset_align),
    );
    if told.stx_mask & STATX_DIOALIGN == 0 || !memory.is_power_of_two() || !block.is_power_of_two()
    {
        return Ok(ALIGNMENT_UNKNOWN);
    }
    Ok(Alignment { memory, block })
}

thread_local! {
    /// What the kernel tells of this thread's turns on the processor: Documentation/scheduler/sched-stats.rst, the part on
    /// /proc/<pid>/schedstat. None where it does not.
    static SCHEDSTAT: Option<std::fs::File> = std::fs::File::open("/proc/thread-self/schedstat").ok();
}

/// How long this thread has been ready to run, so far, while others had the processor; zero where the kernel does not tell.
fn processor_wait() -> Duration {
    let mut line = [0; 64];
    let told = SCHEDSTAT.with(|file| file.as_ref()?.read_at(&mut line, 0).ok());
    let text = std::str::from_utf8(&line[..told.unwrap_or(0)]).unwrap_or_default();
    let wait = text.split_ascii_whitespace().nth(1);
    Duration::from_nanos(wait.and_then(|word| word.parse().ok()).unwrap_or(0))
}

fn unsupported(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL
    )
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}
