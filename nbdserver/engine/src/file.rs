//! An open file: the leaf of every mapping. System calls, one sync at a time, and the recorder's hooks.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{
    FallocateFlags, FileType, SeekFrom, fallocate, fdatasync, fstat, ftruncate, seek,
};
use rustix::io::{Errno, ReadWriteFlags, preadv, preadv2, pwrite, pwritev};

use crate::extents::FileId;
use crate::record::{Operation, Recorder, Token};
use crate::vector::Vector;

/// The kernel's bound on one vectored call (UIO_MAXIOV).
const IOV_MAX: usize = 1024;
/// A buffered write slower than this means that the kernel is throttling writers of this file...
const SLOW_WRITE: Duration = Duration::from_millis(2);
/// ...and for this long its writes are not made on a worker that other connections wait for.
const SLOW_MEMORY: Duration = Duration::from_millis(100);
/// Zeroes are written out in pieces of this size where the file system cannot zero.
const ZERO_CHUNK: usize = 1 << 20;

#[derive(Default)]
pub struct Counters {
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub fixed: AtomicU64,
    pub plain: AtomicU64,
    pub syncs: AtomicU64,
}

#[derive(Default)]
struct Syncs {
    started: u64,
    finished: u64,
    running: bool,
    failed: Option<Errno>,
}

pub struct File {
    pub id: FileId,
    pub name: String,
    pub read_only: bool,
    /// Anonymous memory: never blocks.
    pub memory: bool,
    pub counters: Counters,
    fd: OwnedFd,
    regular: bool,
    nowait: AtomicBool,
    epoch: Instant,
    slow_until_ms: AtomicU64,
    syncs: Mutex<Syncs>,
    synced: Condvar,
    recorder: Option<Arc<Recorder>>,
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
        recorder: Option<Arc<Recorder>>,
    ) -> Result<File, Errno> {
        let regular = FileType::from_raw_mode(fstat(&fd)?.st_mode) == FileType::RegularFile;
        if let Some(recorder) = &recorder {
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
            regular,
            nowait: AtomicBool::new(true),
            epoch: Instant::now(),
            slow_until_ms: AtomicU64::new(0),
            syncs: Mutex::default(),
            synced: Condvar::new(),
            recorder,
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

    /// Read into `range` of `vector`, blocking; what lies past the end of the file reads as zeroes.
    pub fn read(&self, offset: u64, vector: &Vector, range: Range<usize>) -> Result<(), Errno> {
        self.counters.reads.fetch_add(1, Relaxed);
        self.counters.plain.fetch_add(1, Relaxed);
        let mut start = range.start;
        while start < range.end {
            let at = offset + (start - range.start) as u64;
            let mut slices = vector.io_slices_mut(start..range.end);
            let count = slices.len().min(IOV_MAX);
            match retry(|| preadv(&self.fd, &mut slices[..count], at))? {
                0 => {
                    vector.zero(start..range.end);
                    break;
                }
                done => start += done,
            }
        }
        Ok(())
    }

    /// Read only what is in the page cache: the bytes read, from the start of `range`; 0 where it would block (or
    /// at the end of the file: `read` tells the two apart).
    pub fn read_nowait(&self, offset: u64, slices: &mut [IoSliceMut<'_>]) -> Result<usize, Errno> {
        if !self.nowait.load(Relaxed) {
            return Ok(0);
        }
        let flags = if self.memory {
            ReadWriteFlags::empty()
        } else {
            ReadWriteFlags::NOWAIT
        };
        let count = slices.len().min(IOV_MAX);
        match preadv2(&self.fd, &mut slices[..count], offset, flags) {
            Ok(done) => {
                self.counters.reads.fetch_add(1, Relaxed);
                self.counters.plain.fetch_add(1, Relaxed);
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

    /// Whether a write would rather not be made on a worker: the kernel has been holding up writers of this file.
    pub fn writes_slowly(&self) -> bool {
        let until = self.slow_until_ms.load(Relaxed);
        until != 0 && (self.epoch.elapsed().as_millis() as u64) < until
    }

    /// Write `range` of `vector`, blocking; the file grows as needed.
    pub fn write(&self, offset: u64, vector: &Vector, range: Range<usize>) -> Result<(), Errno> {
        self.counters.writes.fetch_add(1, Relaxed);
        self.counters.plain.fetch_add(1, Relaxed);
        let token = self.begin_write(offset, vector, range.clone());
        let began = Instant::now();
        let result = self.write_all(offset, |start| {
            vector.io_slices(range.start + start..range.end)
        });
        self.end(token, result);
        let took = began.elapsed();
        if took > SLOW_WRITE {
            let until = self.epoch.elapsed() + SLOW_MEMORY;
            self.slow_until_ms.store(until.as_millis() as u64, Relaxed);
        }
        result
    }

    fn write_all<'a>(
        &self,
        offset: u64,
        rest: impl Fn(usize) -> Vec<IoSlice<'a>>,
    ) -> Result<(), Errno> {
        let mut done = 0;
        loop {
            let slices = rest(done);
            if slices.is_empty() {
                return Ok(());
            }
            let count = slices.len().min(IOV_MAX);
            match retry(|| pwritev(&self.fd, &slices[..count], offset + done as u64))? {
                0 => return Err(Errno::NOSPC),
                wrote => done += wrote,
            }
        }
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
        let recorder = self.recorder.as_ref()?;
        Some(recorder.begin(operation, self.id, flags, range, &payload()))
    }

    pub fn end(&self, token: Option<Token>, result: Result<(), Errno>) {
        if let (Some(recorder), Some(token)) = (&self.recorder, token) {
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
        match retry(|| fallocate(&self.fd, FallocateFlags::ZERO_RANGE, offset, length)) {
            Err(errno) if unsupported(errno) => {}
            result => return result,
        }
        if no_fallback {
            return Err(Errno::OPNOTSUPP);
        }
        let zeroes = vec![0; ZERO_CHUNK.min(length as usize)];
        self.write_all(offset, |done| {
            let left = (length as usize - done).min(zeroes.len());
            if left == 0 {
                Vec::new()
            } else {
                vec![IoSlice::new(&zeroes[..left])]
            }
        })
    }

    fn punch(&self, offset: u64, length: u64) -> Result<(), Errno> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        retry(|| fallocate(&self.fd, flags, offset, length))
    }

    /// Have the file reach `end`. By writing its last byte, which is the caller's to write: a truncation could cut off
    /// what another thread has written beyond it meanwhile.
    fn grow(&self, end: u64) -> Result<(), Errno> {
        if self.regular && self.size()? < end {
            retry(|| pwrite(&self.fd, &[0], end - 1))?;
        }
        Ok(())
    }

    /// Give storage back where the file system can; the contents of the range become undefined.
    pub fn discard(&self, offset: u64, length: u64) -> Result<(), Errno> {
        let token = self.begin(Operation::Discard, 0, (offset, length), Vec::new);
        let result = match self.punch(offset, length) {
            Err(errno) if unsupported(errno) => Ok(()),
            result => result,
        };
        self.end(token, result);
        result
    }

    pub fn resize(&self, size: u64) -> Result<(), Errno> {
        let token = self.begin(Operation::Resize, 0, (size, 0), Vec::new);
        let result = retry(|| ftruncate(&self.fd, size));
        self.end(token, result);
        result
    }

    /// Make every write that completed before the call durable. Those who come while a sync runs share the next
    /// one. A failed sync fails all later ones too: the kernel has dropped the pages and would report success.
    pub fn sync(&self) -> Result<(), Errno> {
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
        let length = std::num::NonZeroU64::new(length);
        // Advice: that it was not taken is nobody's failure.
        let _ = rustix::fs::fadvise(&self.fd, offset, length, rustix::fs::Advice::WillNeed);
    }
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
