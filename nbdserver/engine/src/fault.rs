//! Faults: requests that need Python, at least in part.
//!
//! A fault thread (one of Python's) takes a fault and carries its request out, blocking; `Fault::run` comes back to Python
//! whenever something is not mapped, not writable, or CODE, and says what is wanted.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::engine::Engine;
use crate::export::{Place, count};
use crate::extents::Target;
use crate::request::{Body, Failure, Request};
use crate::transfer::{Transfer, charge, is_code, plan, run_all};
use crate::wire::{command, flag};

/// After so many fruitless resolutions (the mapping changes faster than it can be entered) the request is run
/// through Python whole.
const RESOLVES_MAX: u32 = 8;

/// How long a fault thread sleeps for a meter before it looks again whether the export is being drained.
const METER_PAUSE_MAX: Duration = Duration::from_millis(50);

/// The longest range looked up, or asked of Python, at once: what the longest usual payload needs. CACHE may name 4 GiB,
/// which can be millions of extents.
const AT_ONCE_MAX: u64 = 32 << 20;

/// What Python is asked to do. Ranges lie in the export.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Enter extents for the range; `sequence` was current before.
    Resolve {
        offset: u64,
        length: u64,
        sequence: u64,
    },
    Read {
        offset: u64,
        length: u64,
    },
    /// Make a prefix of the range writable, or write it; `mapped`: it is writable, and is to be written by its layer all the
    /// same.
    Write {
        offset: u64,
        length: u64,
        sequence: u64,
        mapped: bool,
    },
    Zero {
        offset: u64,
        length: u64,
    },
    Trim {
        offset: u64,
        length: u64,
    },
    Status {
        offset: u64,
        length: u64,
    },
    Flush,
}

pub struct Fault {
    pub engine: Arc<Engine>,
    /// None once it has been answered.
    pub request: Option<Request>,
    pub step: Step,
    /// Bytes done, from the request's start.
    done: u64,
    resolves: u32,
    flushed: bool,
}

impl Fault {
    pub fn new(engine: Arc<Engine>, request: Request) -> Fault {
        Fault {
            engine,
            request: Some(request),
            step: Step::Flush,
            done: 0,
            resolves: 0,
            flushed: false,
        }
    }

    /// Go on until Python is needed (true; see `step`) or the request has been answered (false).
    pub fn run(&mut self) -> bool {
        match self.advance() {
            Ok(Some(step)) => {
                self.count(step);
                self.step = step;
                true
            }
            Ok(None) => {
                self.succeed();
                false
            }
            Err(errno) => {
                self.fail(errno.into());
                false
            }
        }
    }

    fn request(&self) -> &Request {
        self.request
            .as_ref()
            .expect("a fault that has not been answered")
    }

    fn advance(&mut self) -> Result<Option<Step>, Errno> {
        let header = &self.request().header;
        let (offset, length) = (header.offset + self.done, header.length - self.done);
        let fua = header.flags & flag::FUA != 0;
        let step = match header.command {
            command::READ => self.read()?,
            command::WRITE => match self.write()? {
                None if fua && !self.flushed => Some(Step::Flush),
                step => step,
            },
            command::CACHE => self.cache()?,
            command::FLUSH => (!self.flushed).then_some(Step::Flush),
            command::WRITE_ZEROES => (length > 0).then_some(Step::Zero { offset, length }),
            command::TRIM => (length > 0).then_some(Step::Trim { offset, length }),
            command::BLOCK_STATUS => Some(Step::Status { offset, length }),
            command => unreachable!("command {command} is no request"),
        };
        Ok(step)
    }

    /// The rest of the request's range (no more than AT_ONCE_MAX), places for a prefix of it, and how long that prefix is.
    fn look_up(&self, write: bool) -> (u64, u64, Vec<Place>, u64) {
        let request = self.request();
        let offset = request.header.offset + self.done;
        let length = (request.header.length - self.done).min(AT_ONCE_MAX);
        let mut places = Vec::new();
        let (users, shard) = (&self.engine.users, self.engine.shard());
        let covered = if write {
            request
                .export
                .writable(users, shard, (offset, length), &mut places)
        } else {
            request
                .export
                .readable(users, shard, (offset, length), &mut places)
        };
        (offset, length, places, covered)
    }

    /// Read what is mapped; then say what is missing.
    fn read(&mut self) -> Result<Option<Step>, Errno> {
        loop {
            let sequence = self.request().export.sequence();
            let (offset, length, places, covered) = self.look_up(false);
            if length == 0 {
                return Ok(None);
            }
            if covered == 0 {
                self.resolves += 1;
                return Ok(Some(if self.resolves > RESOLVES_MAX {
                    Step::Read { offset, length }
                } else {
                    Step::Resolve {
                        offset,
                        length,
                        sequence,
                    }
                }));
            }
            let first = places[0].piece;
            if is_code(&self.engine, &first, self.done as usize) {
                return Ok(Some(Step::Read {
                    offset,
                    length: first.length,
                }));
            }
            self.transfer(places, false)?;
        }
    }

    /// Write what is writable in place; then say what is not.
    fn write(&mut self) -> Result<Option<Step>, Errno> {
        loop {
            let sequence = self.request().export.sequence();
            let (offset, length, places, covered) = self.look_up(true);
            if length == 0 {
                return Ok(None);
            }
            let mapped = covered > 0;
            if !mapped {
                return Ok(Some(Step::Write {
                    offset,
                    length,
                    sequence,
                    mapped,
                }));
            }
            let first = places[0].piece;
            if is_code(&self.engine, &first, self.done as usize) {
                let length = first.length;
                return Ok(Some(Step::Write {
                    offset,
                    length,
                    sequence,
                    mapped,
                }));
            }
            self.transfer(places, true)?;
        }
    }

    /// Carry out the transfers of a prefix, up to the first CODE.
    fn transfer(&mut self, places: Vec<Place>, write: bool) -> Result<(), Errno> {
        let mut transfers: Vec<Transfer> = Vec::new();
        let start = self.done as usize;
        let request = self
            .request
            .as_mut()
            .expect("a fault that has not been answered");
        let mut charged = 0;
        let pieces = || places.iter().map(|place| &place.piece);
        while let Err(wait) = charge(&self.engine, pieces(), write, &mut charged) {
            if request.export.is_draining() {
                break; // a throttle lets go
            }
            std::thread::sleep(wait.min(METER_PAUSE_MAX));
        }
        let planned = plan(request, &self.engine, start, places, &mut transfers)?;
        run_all(request, &transfers, write)?;
        self.advanced(planned as u64);
        Ok(())
    }

    /// Have the range's mapping entered and its bytes brought into the page cache. Advice: errors are not passed on.
    fn cache(&mut self) -> Result<Option<Step>, Errno> {
        loop {
            let sequence = self.request().export.sequence();
            let (offset, length, places, covered) = self.look_up(false);
            if length == 0 || (covered == 0 && self.resolves >= RESOLVES_MAX) {
                return Ok(None);
            }
            if covered == 0 {
                self.resolves += 1;
                return Ok(Some(Step::Resolve {
                    offset,
                    length,
                    sequence,
                }));
            }
            for place in places {
                if let Target::File { file, offset, .. } = place.piece.target
                    && let Some(file) = self.engine.files.get(file)
                {
                    file.prefetch(offset, place.piece.length);
                }
            }
            self.advanced(covered);
        }
    }

    /// Python (or a transfer) has dealt with `length` more bytes.
    pub fn advanced(&mut self, length: u64) {
        self.done += length;
        self.resolves = 0;
        assert!(self.done <= self.request().header.length);
    }

    /// Python has carried out the step.
    pub fn stepped(&mut self, length: u64) {
        match self.step {
            Step::Flush => self.flushed = true,
            _ => self.advanced(length),
        }
    }

    fn succeed(&mut self) {
        let Some(request) = self.request.take() else {
            return;
        };
        self.leave(&request);
        let header = &request.header;
        match header.command {
            command::READ => request.finish_read(),
            _ => request.finish(Ok(Body::None)),
        }
    }

    /// Answer a block status request.
    pub fn status(&mut self, contexts: Vec<(u32, Vec<(u64, u32)>)>) {
        let Some(request) = self.request.take() else {
            return;
        };
        self.leave(&request);
        request.finish(Ok(Body::Status(contexts)));
    }

    pub fn fail(&mut self, failure: Failure) {
        let Some(request) = self.request.take() else {
            return;
        };
        self.leave(&request);
        request.finish(Err(failure));
    }

    fn leave(&self, request: &Request) {
        request.export.faulting.fetch_sub(1, SeqCst);
        self.engine.faults.left();
    }

    fn count(&self, step: Step) {
        let counters = &self.request().export.counters;
        let counter = match step {
            Step::Resolve { .. } => &counters.resolve_calls,
            Step::Read { .. } => &counters.read_calls,
            Step::Write { .. } => &counters.write_calls,
            _ => &counters.other_calls,
        };
        count(counter, 1);
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        // A fault that Python dropped without an answer is a bug of ours; the client gets one all the same.
        if self.request.is_some() {
            self.fail(Errno::IO.into());
        }
    }
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<(Arc<Engine>, Request)>,
    stopping: bool,
}

/// Requests that wait for a fault thread. No export may have all threads, so that one that hangs holds up nobody else.
pub struct Faults {
    queue: Mutex<Queue>,
    work: Condvar,
    emptied: Condvar,
    export_max: usize,
}

impl Faults {
    pub fn new(threads: usize) -> Faults {
        let export_max = threads.saturating_sub(threads.div_ceil(4)).max(1);
        Faults {
            queue: Mutex::default(),
            work: Condvar::new(),
            emptied: Condvar::new(),
            export_max,
        }
    }

    pub fn push(&self, engine: &Arc<Engine>, request: Request) {
        count(&request.export.counters.faults, 1);
        self.queue
            .lock()
            .unwrap()
            .waiting
            .push_back((engine.clone(), request));
        self.work.notify_one();
    }

    /// The next fault that needs Python, having done all that does not; None when the engine has stopped.
    pub fn take(&self) -> Option<Fault> {
        loop {
            let (engine, request) = self.pop()?;
            let mut fault = Fault::new(engine, request);
            if fault.run() {
                return Some(fault);
            }
        }
    }

    fn pop(&self) -> Option<(Arc<Engine>, Request)> {
        let mut queue = self.queue.lock().unwrap();
        loop {
            let next = queue
                .waiting
                .iter()
                .position(|(_, request)| request.export.faulting.load(SeqCst) < self.export_max);
            if let Some(index) = next {
                let (engine, request) = queue.waiting.remove(index).expect("the index found");
                request.export.faulting.fetch_add(1, SeqCst);
                if queue.waiting.is_empty() {
                    self.emptied.notify_all();
                }
                return Some((engine, request));
            }
            if queue.stopping && queue.waiting.is_empty() {
                return None;
            }
            queue = self.work.wait(queue).unwrap();
        }
    }

    /// A fault has ended: its export may have another.
    fn left(&self) {
        let _queue = self.queue.lock().unwrap();
        self.work.notify_one();
    }

    /// No more are coming. Those that wait for a thread are still served, until `deadline`: nobody waits for an answer.
    pub fn stop(&self, deadline: Instant) {
        let mut queue = self.queue.lock().unwrap();
        queue.stopping = true;
        self.work.notify_all();
        while !queue.waiting.is_empty() && Instant::now() < deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            queue = self.emptied.wait_timeout(queue, left).unwrap().0;
        }
        let waiting = std::mem::take(&mut queue.waiting);
        drop(queue);
        drop(waiting);
        self.work.notify_all();
    }
}
