//! The io_uring backend: a ring a worker, the pool registered as fixed buffers, files registered as they are used.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libc::iovec;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use crate::extents::FileId;
use crate::file::File;
use crate::pool::{Pool, Slot};
use crate::record::Token;
use crate::request::{Body, Reply, Request};
use crate::transfer::{Transfer, finish_read, mark};
use crate::wire::command;

/// Submission entries of a ring on which one operation runs at a time.
const SYNC_ENTRIES: u32 = 2;
/// The kernel refuses a registered buffer larger than this.
pub const BUFFER_MAX: usize = 1 << 30;
/// Files registered at once with one ring; others are used by their descriptor.
const FILES_MAX: u32 = 1024;

/// A request whose transfers are under way.
struct Flight {
    request: Request,
    write: bool,
    parts: Vec<Part>,
    running: usize,
    error: Option<Errno>,
}

struct Part {
    transfer: Transfer,
    token: Option<Token>,
}

#[derive(Default)]
struct RegisteredFiles {
    places: HashMap<FileId, u32>,
    free: Vec<u32>,
}

pub struct Ring {
    ring: IoUring,
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    queued: VecDeque<squeue::Entry>,
    files: RegisteredFiles,
    ops: Arc<Operations>,
    /// Operations handed to the kernel and not reaped.
    in_kernel: usize,
}

impl Drop for Ring {
    /// What the kernel is still reading and writing (the worker has panicked) must not be given to others.
    fn drop(&mut self) {
        while self.in_kernel > 0 {
            match self
                .ring
                .submit_and_wait(1)
                .map_err(|error| errno_of(&error))
            {
                Ok(_) | Err(Errno::INTR | Errno::AGAIN | Errno::BUSY) => {}
                Err(_) => return std::mem::forget(std::mem::take(&mut self.flights)),
            }
            self.in_kernel -= self.ring.completion().count();
        }
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns its descriptor as long as it lives, and the borrow cannot outlive it.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl Ring {
    /// A ring that has registered nothing yet but a table for files.
    pub fn new(entries: u32, ops: Arc<Operations>) -> std::io::Result<Ring> {
        let ring = IoUring::new(entries)?;
        // It came with the operations on plain buffers (Linux 5.6), and nothing else tells of those.
        if !ring.params().is_feature_rw_cur_pos() {
            return Err(Errno::NOSYS.into());
        }
        let files = RegisteredFiles::new(&ring);
        Ok(Ring {
            ring,
            flights: Vec::new(),
            free: Vec::new(),
            queued: VecDeque::new(),
            files,
            ops,
            in_kernel: 0,
        })
    }

    /// Register the first `bytes` of the pool, nothing being registered. `like` is a ring that has registered them: its registration is cloned where the kernel can (Linux 6.12), so that the pages are counted against
    /// RLIMIT_MEMLOCK once.
    pub fn register(&self, pool: &Pool, bytes: usize, like: Option<&Ring>) -> Result<(), Errno> {
        register(&self.ring, pool, bytes, like.map(|other| &other.ring))
    }

    pub fn unregister(&self) {
        // An error says that nothing was registered.
        let _ = self.ring.submitter().unregister_buffers();
    }

    pub fn is_idle(&self) -> bool {
        self.flights.len() == self.free.len()
    }

    /// Start the transfers of a read or write (which has been prepared). There is at least one.
    pub fn start(&mut self, request: Request, transfers: Vec<Transfer>) {
        let write = request.header.command == command::WRITE;
        let parts: Vec<Part> = transfers
            .into_iter()
            .map(|transfer| {
                let token = if write {
                    transfer.file.begin_write(
                        transfer.offset,
                        &request.vector,
                        transfer.range.clone(),
                    )
                } else {
                    None
                };
                Part { transfer, token }
            })
            .collect();
        let running = parts.len();
        let index = self.free.pop().unwrap_or_else(|| {
            self.flights.push(None);
            self.flights.len() - 1
        });
        self.flights[index] = Some(Flight {
            request,
            write,
            parts,
            running,
            error: None,
        });
        for part in 0..running {
            self.queue(index, part);
        }
    }

    /// Queue the next contiguous piece of a part.
    fn queue(&mut self, index: usize, part: usize) {
        let flight = self.flights[index]
            .as_mut()
            .expect("a flight that is running");
        let Part { transfer, .. } = &flight.parts[part];
        let (slot, range) = flight
            .request
            .vector
            .parts(transfer.file.at_once(transfer.range.clone()))
            .next()
            .expect("a transfer that is not complete");
        let length = range.len() as u32;
        let buffer = slot.slice_mut(range.clone()).as_mut_ptr();
        let fixed = slot
            .registration()
            .and_then(|_| slot.pool_offset())
            .map(|offset| ((offset + range.start) / BUFFER_MAX) as u16);
        let file = self.files.place(&self.ring, &transfer.file);
        transfer
            .file
            .counters
            .transferred(flight.write, fixed.is_some());
        let entry = entry(flight.write, file, buffer, length, transfer.offset, fixed)
            .user_data((index as u64) << 32 | part as u64);
        self.queued.push_back(entry);
    }

    /// Hand what is queued to the kernel. What it has no room for now is handed over at the next turn.
    pub fn submit(&mut self) -> std::io::Result<()> {
        while self.push() && self.enter()? {}
        Ok(())
    }

    /// Move what is queued into the submission queue, as far as there is room; whether that has anything to submit.
    fn push(&mut self) -> bool {
        let mut queue = self.ring.submission();
        while !queue.is_full() {
            let Some(entry) = self.queued.pop_front() else {
                break;
            };
            self.ops.count(&entry);
            self.in_kernel += 1;
            // SAFETY: the memory belongs to the flight that `user_data` names, which lives until the completion has
            // been reaped; so do the file and the place it is in.
            unsafe { queue.push(&entry) }.expect("a submission queue with room");
        }
        !queue.is_empty()
    }

    /// Submit, and have completions that the completion queue had no room for moved into it. False: the kernel takes
    /// no more now, for want of memory (EAGAIN) or because completions are to be reaped first (EBUSY).
    fn enter(&self) -> std::io::Result<bool> {
        match self.ring.submit() {
            Ok(_) => Ok(true),
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::AGAIN | Errno::BUSY) => Ok(false),
                Some(Errno::INTR) => Ok(true),
                _ => Err(error),
            },
        }
    }

    /// Take in completions; the replies of the requests that ended with them go to `replies`.
    pub fn reap(&mut self, replies: &mut Vec<Reply>) -> std::io::Result<()> {
        loop {
            let done: Vec<(u64, i32)> = self
                .ring
                .completion()
                .map(|entry: cqueue::Entry| (entry.user_data(), entry.result()))
                .collect();
            self.in_kernel -= done.len();
            for (data, result) in done {
                self.completed((data >> 32) as usize, data as u32 as usize, result, replies);
            }
            // More completions than the queue holds stay in the kernel, until it is entered.
            if !self.ring.submission().cq_overflow() || !self.enter()? {
                return Ok(());
            }
        }
    }

    fn completed(&mut self, index: usize, part: usize, result: i32, replies: &mut Vec<Reply>) {
        crate::points::reached("ring.completed");
        let flight = self.flights[index]
            .as_mut()
            .expect("a completion for a flight");
        let Flight {
            request,
            write,
            parts,
            running,
            error,
        } = flight;
        let Part { transfer, token } = &mut parts[part];
        let ended = match result {
            _ if result < 0 => match Errno::from_raw_os_error(-result) {
                Errno::AGAIN | Errno::INTR => None,
                errno => Some(Err(errno)),
            },
            0 if *write => Some(Err(Errno::NOSPC)),
            _ if !*write && transfer.file.is_end(result as usize) => {
                transfer.advance(result as usize);
                request.vector.zero(transfer.range.clone());
                Some(Ok(()))
            }
            _ => {
                transfer.advance(result as usize);
                transfer.range.is_empty().then_some(Ok(()))
            }
        };
        let Some(ended) = ended else {
            self.queue(index, part);
            return;
        };
        transfer.file.end(token.take(), ended);
        *error = error.or(ended.err());
        *running -= 1;
        if *running == 0 {
            let flight = self.flights[index].take().expect("the flight looked at");
            self.free.push(index);
            replies.push(flight.reply());
        }
    }

    /// Let go of a file that is being closed.
    pub fn forget(&mut self, file: FileId) {
        if let Some(place) = self.files.places.remove(&file)
            && self
                .ring
                .submitter()
                .register_files_update(place, &[-1])
                .is_ok()
        {
            self.files.free.push(place);
        }
    }
}

impl Flight {
    fn reply(self) -> Reply {
        let Flight {
            request,
            write,
            parts,
            error,
            ..
        } = self;
        let transfers: Vec<Transfer> = parts.into_iter().map(|part| part.transfer).collect();
        let result = match error {
            Some(errno) => Err(errno),
            None if write => Ok(()),
            None => finish_read(&request, &transfers),
        };
        if write {
            mark(&transfers);
        }
        drop(transfers); // the places are no longer in use
        match result {
            Err(errno) => request.reply(Err(errno.into())),
            Ok(()) if write => request.reply(Ok(Body::None)),
            Ok(()) => request.reply_read(),
        }
    }
}

impl RegisteredFiles {
    /// As many places as the kernel gives: none before Linux 5.19, and no more than the process may have descriptors.
    fn new(ring: &IoUring) -> RegisteredFiles {
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let count = descriptors.min(u64::from(FILES_MAX)) as u32;
        let given = ring.submitter().register_files_sparse(count).is_ok();
        RegisteredFiles {
            places: HashMap::new(),
            free: (0..if given { count } else { 0 }).rev().collect(),
        }
    }

    /// Where `file` is registered, registering it at first use; None when there is no room.
    fn place(&mut self, ring: &IoUring, file: &File) -> Target {
        let descriptor = file.as_fd().as_raw_fd();
        if let Some(place) = self.places.get(&file.id) {
            return Target::Fixed(types::Fixed(*place));
        }
        let Some(place) = self.free.pop() else {
            return Target::Plain(types::Fd(descriptor));
        };
        if ring
            .submitter()
            .register_files_update(place, &[descriptor])
            .is_err()
        {
            self.free.push(place);
            return Target::Plain(types::Fd(descriptor));
        }
        self.places.insert(file.id, place);
        Target::Fixed(types::Fixed(place))
    }
}

enum Target {
    Fixed(types::Fixed),
    Plain(types::Fd),
}

fn entry(
    write: bool,
    target: Target,
    buffer: *mut u8,
    length: u32,
    offset: u64,
    fixed: Option<u16>,
) -> squeue::Entry {
    macro_rules! build {
        ($file:expr) => {
            match (write, fixed) {
                (false, None) => opcode::Read::new($file, buffer, length)
                    .offset(offset)
                    .build(),
                (true, None) => opcode::Write::new($file, buffer, length)
                    .offset(offset)
                    .build(),
                (false, Some(index)) => opcode::ReadFixed::new($file, buffer, length, index)
                    .offset(offset)
                    .build(),
                (true, Some(index)) => opcode::WriteFixed::new($file, buffer, length, index)
                    .offset(offset)
                    .build(),
            }
        };
    }
    match target {
        Target::Fixed(place) => build!(place),
        Target::Plain(descriptor) => build!(descriptor),
    }
}

/// Operations handed to the kernel through all rings, by kind: what the counters of the files must come to.
#[derive(Default)]
pub struct Operations {
    pub read: AtomicU64,
    pub write: AtomicU64,
    pub read_fixed: AtomicU64,
    pub write_fixed: AtomicU64,
}

impl Operations {
    fn count(&self, entry: &squeue::Entry) {
        let counter = match entry.get_opcode() as u8 {
            opcode::Read::CODE => &self.read,
            opcode::Write::CODE => &self.write,
            opcode::ReadFixed::CODE => &self.read_fixed,
            opcode::WriteFixed::CODE => &self.write_fixed,
            other => unreachable!("operation {other} is none of ours"),
        };
        counter.fetch_add(1, Relaxed);
    }
}

/// Rings for threads that block: each carries out one operation at a time, on registered buffers too.
pub struct SyncRings {
    /// A ring that has registered the pool.
    like: Mutex<Ring>,
    idle: Mutex<Vec<IoUring>>,
    /// The kernel has refused another ring: there are as many as it allows.
    full: AtomicBool,
    pool: Arc<Pool>,
    ops: Arc<Operations>,
}

impl SyncRings {
    pub fn new(like: Ring, pool: Arc<Pool>) -> SyncRings {
        SyncRings {
            ops: like.ops.clone(),
            like: Mutex::new(like),
            idle: Mutex::default(),
            full: AtomicBool::new(false),
            pool,
        }
    }

    /// Transfer `range` of a registered slot, blocking: how much was done. None: there is no ring to be had now.
    pub fn transfer(
        &self,
        write: bool,
        file: BorrowedFd<'_>,
        slot: &Slot,
        range: Range<usize>,
        offset: u64,
    ) -> Option<Result<usize, Errno>> {
        let idle = self.idle.lock().unwrap().pop();
        let mut ring = idle.or_else(|| self.another())?;
        let result = transfer_on(&mut ring, &self.ops, write, file, slot, range, offset);
        self.idle.lock().unwrap().push(ring);
        Some(result)
    }

    /// A new ring, unless the kernel has refused one before: RLIMIT_MEMLOCK, or the limit on descriptors.
    fn another(&self) -> Option<IoUring> {
        if self.full.load(Relaxed) {
            return None;
        }
        let ring = IoUring::new(SYNC_ENTRIES).ok().filter(|ring| {
            let like = self.like.lock().unwrap();
            register(ring, &self.pool, self.pool.registered(), Some(&like.ring)).is_ok()
        });
        if ring.is_none() {
            self.full.store(true, Relaxed);
        }
        ring
    }
}

fn transfer_on(
    ring: &mut IoUring,
    ops: &Operations,
    write: bool,
    file: BorrowedFd<'_>,
    slot: &Slot,
    range: Range<usize>,
    offset: u64,
) -> Result<usize, Errno> {
    let start = slot.pool_offset().expect("a registered slot") + range.start;
    let length = range.len() as u32;
    let buffer = slot.slice_mut(range).as_mut_ptr();
    let target = Target::Plain(types::Fd(file.as_raw_fd()));
    let fixed = Some((start / BUFFER_MAX) as u16);
    let entry = entry(write, target, buffer, length, offset, fixed);
    ops.count(&entry);
    // SAFETY: the caller lends file and memory until this returns, which is after the completion has been reaped.
    unsafe { ring.submission().push(&entry) }.expect("an empty submission queue");
    let mut submitted = ring.submit_and_wait(1);
    while submitted
        .as_ref()
        .is_err_and(|error| error.kind() == std::io::ErrorKind::Interrupted)
    {
        submitted = ring.submit_and_wait(1);
    }
    submitted.map_err(|error| errno_of(&error))?;
    let completion = ring.completion().next().expect("the completion waited for");
    match completion.result() {
        done if done >= 0 => Ok(done as usize),
        error => Err(Errno::from_raw_os_error(-error)),
    }
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// Register the first `bytes` of the pool, in entries of at most BUFFER_MAX; entry i begins at i * BUFFER_MAX.
fn register(
    ring: &IoUring,
    pool: &Pool,
    bytes: usize,
    like: Option<&IoUring>,
) -> Result<(), Errno> {
    if let Some(other) = like
        && ring
            .submitter()
            .register_buffers_clone(other.as_raw_fd())
            .is_ok()
    {
        return Ok(());
    }
    let (base, size) = pool.as_region();
    assert!(bytes <= size);
    let entries: Vec<iovec> = (0..bytes)
        .step_by(BUFFER_MAX)
        .map(|start| iovec {
            iov_base: base.wrapping_add(start).cast(),
            iov_len: BUFFER_MAX.min(bytes - start),
        })
        .collect();
    // SAFETY: the region is mapped as long as the pool lives, and the engine keeps the pool longer than its rings.
    unsafe { ring.submitter().register_buffers(&entries) }.map_err(|error| errno_of(&error))
}
