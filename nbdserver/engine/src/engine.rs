//! The engine: what workers, fault threads and Python share.

use std::cell::Cell;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use crate::dirty::Log;
use crate::export::Export;
use crate::extents::FileId;
use crate::fault::Faults;
use crate::file::{File, Means};
use crate::handshake::Handshakes;
use crate::limits::{Holding, Limits};
use crate::meter::Meter;
use crate::peer::{Crowd, Peer};
use crate::pool::Pool;
use crate::record::Recorder;
use crate::register::register_pool;
use crate::ring::{Operations, Ring, SyncRings};
use crate::server::{self, Acceptor};
use crate::threads::Threads;
use crate::transform::Transform;
use crate::users::Users;
use crate::worker::{Inbox, Latch, Message, Worker};

/// Submission entries of a worker's ring: more operations wait in the worker. Each entry is some 100 bytes of memory that
/// may count against RLIMIT_MEMLOCK.
const RING_ENTRIES: [u32; 3] = [256, 64, 16];
/// Shards of `Users` for threads that are not workers.
const OTHER_SHARDS: usize = 8;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backend {
    Auto,
    IoUring,
    Threads,
}

pub struct Settings {
    pub workers: usize,
    pub pool: usize,
    pub backend: Backend,
    pub fault_threads: usize,
    pub limits: Limits,
    pub record: Option<String>,
}

/// How a file is to be used: see `file::Means`.
#[derive(Clone, Copy)]
pub struct Mode {
    pub direct: bool,
    pub unsafe_: bool,
    pub threads: bool,
    pub transfer_max: usize,
}

/// Why the engine could not start, in words.
pub struct StartError(pub String);

/// The open files by number. Numbers are never used again.
#[derive(Default)]
pub struct Files {
    table: RwLock<HashMap<FileId, Arc<File>>>,
    next: AtomicU32,
}

/// Transforms, sets of meters and dirty logs by number, from 1 on: what extents name. They live as long as the engine.
#[derive(Default)]
pub struct Effects {
    transforms: RwLock<Vec<Arc<Transform>>>,
    meters: RwLock<Vec<Arc<[Arc<Meter>]>>>,
    logs: RwLock<Vec<Arc<Log>>>,
}

impl Effects {
    pub fn transform(&self, number: u32) -> Option<Arc<Transform>> {
        let index = number.checked_sub(1)? as usize;
        self.transforms.read().unwrap().get(index).cloned()
    }

    pub fn meters(&self, number: u32) -> Option<Arc<[Arc<Meter>]>> {
        let index = number.checked_sub(1)? as usize;
        self.meters.read().unwrap().get(index).cloned()
    }

    pub fn log(&self, number: u32) -> Option<Arc<Log>> {
        let index = number.checked_sub(1)? as usize;
        self.logs.read().unwrap().get(index).cloned()
    }

    pub fn add_log(&self, log: Arc<Log>) -> u32 {
        let mut logs = self.logs.write().unwrap();
        logs.push(log);
        logs.len() as u32
    }

    pub fn add_transform(&self, transform: Transform) -> u32 {
        let mut transforms = self.transforms.write().unwrap();
        transforms.push(Arc::new(transform));
        transforms.len() as u32
    }

    /// The number of a set of meters: the same for the same meters.
    pub fn intern_meters(&self, set: &[Arc<Meter>]) -> u32 {
        let same = |known: &Arc<[Arc<Meter>]>| {
            known.len() == set.len() && known.iter().zip(set).all(|(a, b)| Arc::ptr_eq(a, b))
        };
        let mut meters = self.meters.write().unwrap();
        let index = meters.iter().position(same).unwrap_or_else(|| {
            meters.push(set.into());
            meters.len() - 1
        });
        index as u32 + 1
    }
}

pub struct Engine {
    pub effects: Effects,
    pub pool: Arc<Pool>,
    pub users: Arc<Users>,
    pub files: Files,
    pub faults: Faults,
    pub handshakes: Handshakes,
    pub inboxes: Vec<Arc<Inbox>>,
    pub threads: Threads,
    pub limits: Mutex<Limits>,
    pub crowd: Arc<Crowd>,
    /// Clients that were one too many.
    pub turned_away: AtomicU64,
    /// Ordinary memory of requests and replies.
    pub holding: Holding,
    /// Why there is no io_uring, if there is none.
    pub refused: Option<String>,
    /// Why not all of the pool is registered, if it is not though there is io_uring.
    pub unregistered: Option<Errno>,
    /// What all rings have been given to do.
    pub ops: Arc<Operations>,
    /// Bytes of replies that had to leave the pool, over all connections.
    pub spilled: Arc<AtomicUsize>,
    recorder: Option<Arc<Recorder>>,
    sync_rings: Option<Arc<SyncRings>>,
    rings: Mutex<Vec<Ring>>,
    running: Mutex<Vec<JoinHandle<()>>>,
    acceptor: Mutex<Option<Acceptor>>,
    exports: AtomicU32,
}

impl Files {
    pub fn get(&self, file: FileId) -> Option<Arc<File>> {
        self.table.read().unwrap().get(&file).cloned()
    }
}

impl Engine {
    pub fn new(settings: &Settings) -> Result<Arc<Engine>, StartError> {
        let said =
            |what: &str, error: &dyn std::fmt::Display| StartError(format!("{what}: {error}"));
        let pool = Pool::new(settings.pool).map_err(|error| said("the buffer pool", &error))?;
        let recorder = match &settings.record {
            None => None,
            Some(directory) => Some(Arc::new(
                Recorder::create(Path::new(directory))
                    .map_err(|error| said("the I/O recorder", &error))?,
            )),
        };
        let ops = Arc::new(Operations::default());
        let (mut rings, refused) = match settings.backend {
            Backend::Threads => (
                Vec::new(),
                Some("the thread backend was asked for".to_owned()),
            ),
            backend => match make_rings(settings.workers + 1, &ops) {
                Ok(rings) => (rings, None),
                Err(error) if backend == Backend::IoUring => {
                    return Err(said("io_uring", &format!("{error}{}", hint(&error))));
                }
                Err(error) => (
                    Vec::new(),
                    Some(format!("io_uring: {error}{}", hint(&error))),
                ),
            },
        };
        let registered = register_pool(&rings, &pool);
        pool.set_registered(registered.bytes);
        let threads = Threads::start().map_err(|error| said("starting threads", &error))?;
        let sync_rings = rings
            .pop()
            .map(|like| Arc::new(SyncRings::new(like, pool.clone())));
        let inboxes: Result<Vec<_>, _> = (0..settings.workers).map(|_| Inbox::new()).collect();
        let inboxes = inboxes.map_err(|error| said("eventfd", &error))?;
        Ok(Arc::new(Engine {
            effects: Effects::default(),
            pool,
            users: Users::new(settings.workers + OTHER_SHARDS),
            files: Files::default(),
            faults: Faults::new(settings.fault_threads),
            handshakes: Handshakes::default(),
            inboxes,
            threads,
            limits: Mutex::new(settings.limits),
            crowd: Arc::default(),
            turned_away: AtomicU64::new(0),
            holding: Holding::default(),
            refused,
            unregistered: registered.refused,
            ops,
            spilled: Arc::default(),
            recorder,
            sync_rings,
            rings: Mutex::new(rings),
            running: Mutex::default(),
            acceptor: Mutex::default(),
            exports: AtomicU32::new(0),
        }))
    }

    /// Start the workers. They get connections from `listen` on.
    pub fn start(self: &Arc<Self>) -> Result<(), StartError> {
        let said = |error: std::io::Error| StartError(format!("starting a worker: {error}"));
        let mut rings = std::mem::take(&mut *self.rings.lock().unwrap());
        let mut running = self.running.lock().unwrap();
        for index in (0..self.inboxes.len()).rev() {
            let worker = Worker::new(self.clone(), index, rings.pop()).map_err(said)?;
            let builder = std::thread::Builder::new().name(format!("nbd-worker-{index}"));
            self.inboxes[index].open();
            let inbox = Closing(self.inboxes[index].clone());
            let run = move || {
                let _inbox = inbox;
                worker.run();
            };
            running.push(builder.spawn(run).map_err(said)?);
        }
        let acceptor = Acceptor::start(self.clone()).map_err(said)?;
        *self.acceptor.lock().unwrap() = Some(acceptor);
        Ok(())
    }

    /// Accept on a listener from now on; its number. None: the engine is not running.
    pub fn listen(&self, listener: OwnedFd) -> Option<u32> {
        let acceptor = self.acceptor.lock().unwrap();
        acceptor.as_ref().map(|acceptor| acceptor.add(listener))
    }

    /// Serve who is at the other end of a connected socket. False: the engine is not running.
    pub fn connected(&self, socket: OwnedFd) -> bool {
        let peer = Peer::of(&socket);
        let admitted = self.crowd.admit(&peer, usize::MAX, usize::MAX);
        admitted.is_ok_and(|admitted| server::hand_over(self, socket, peer, None, admitted))
    }

    pub fn set_limits(&self, limits: Limits) {
        *self.limits.lock().unwrap() = limits;
        for inbox in &self.inboxes {
            inbox.send(Message::Limits(limits));
        }
    }

    /// Close the listener of that number.
    pub fn unlisten(&self, number: u32) {
        if let Some(acceptor) = self.acceptor.lock().unwrap().as_ref() {
            acceptor.remove(number);
        }
    }

    /// Connections open now, or on their way to a worker.
    pub fn connections(&self) -> usize {
        self.inboxes.iter().map(|inbox| inbox.connections()).sum()
    }

    /// Accept no more, finish the requests that were taken (until `timeout`), close every connection, and end the
    /// fault and handshake queues, so that the threads that serve them come back. Whether all threads have ended as they
    /// should: false if one has panicked, now or before.
    pub fn stop(&self, timeout: Duration) -> bool {
        if let Some(acceptor) = self.acceptor.lock().unwrap().take() {
            acceptor.stop();
        }
        let deadline = Instant::now() + timeout;
        for inbox in &self.inboxes {
            inbox.stop(deadline);
        }
        let mut orderly = true;
        for handle in self.running.lock().unwrap().drain(..) {
            orderly &= handle.join().is_ok();
        }
        self.threads.stop();
        self.faults.stop(deadline);
        self.handshakes.stop();
        orderly
    }

    pub fn new_export(&self, size: u64, read_only: bool) -> Arc<Export> {
        let id = self.exports.fetch_add(1, Relaxed);
        Arc::new(Export::new(id, size, read_only))
    }

    pub fn open_file(
        &self,
        fd: OwnedFd,
        name: String,
        read_only: bool,
        mode: Mode,
    ) -> Result<Arc<File>, Errno> {
        let id = self.files.next.fetch_add(1, Relaxed);
        let means = Means {
            direct: mode.direct,
            unsafe_: mode.unsafe_,
            threads: mode.threads,
            transfer_max: mode.transfer_max,
            pool: self.pool.clone(),
            rings: self.sync_rings.clone().filter(|_| !mode.threads),
            recorder: self.recorder.clone(),
        };
        let file = Arc::new(File::new(id, fd, name, read_only, means)?);
        self.files.table.write().unwrap().insert(id, file.clone());
        Ok(file)
    }

    /// Forget a file: no new I/O finds it, running I/O is waited for, and no ring holds it any more.
    pub fn close_file(&self, file: FileId) {
        if self.files.table.write().unwrap().remove(&file).is_none() {
            return;
        }
        self.users.wait_unused(file, 0, u64::MAX);
        let latch = Arc::new(Latch::new());
        for inbox in &self.inboxes {
            inbox.send(Message::Forget(file, latch.clone()));
        }
        latch.wait_alone();
    }

    /// Which shard of `users` the calling thread uses.
    pub fn shard(&self) -> usize {
        thread_local!(static SHARD: Cell<Option<usize>> = const { Cell::new(None) });
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        SHARD.with(|shard| {
            let own = shard.get().unwrap_or_else(|| NEXT.fetch_add(1, Relaxed));
            shard.set(Some(own));
            self.inboxes.len() + own % OTHER_SHARDS
        })
    }
}

/// A worker's inbox, while it runs: when it has ended, be it by a panic, nobody is to wait for it.
struct Closing(Arc<Inbox>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Rings, all alike: smaller ones where the kernel has not the memory for longer ones.
fn make_rings(count: usize, ops: &Arc<Operations>) -> std::io::Result<Vec<Ring>> {
    let make = |entries| {
        (0..count)
            .map(|_| Ring::new(entries, ops.clone()))
            .collect()
    };
    let mut made: std::io::Result<Vec<Ring>> = make(RING_ENTRIES[0]);
    for entries in &RING_ENTRIES[1..] {
        match &made {
            Err(error) if Errno::from_io_error(error) == Some(Errno::NOMEM) => {}
            _ => break,
        }
        made = make(*entries);
    }
    made
}

/// Since Linux 6.14 rings are memory that is locked.
fn hint(error: &std::io::Error) -> String {
    match getrlimit(Resource::Memlock).current {
        Some(limit) if Errno::from_io_error(error) == Some(Errno::NOMEM) => {
            format!("; RLIMIT_MEMLOCK is {limit}")
        }
        _ => String::new(),
    }
}
