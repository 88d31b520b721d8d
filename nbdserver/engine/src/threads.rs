//! The thread backend: where io_uring is not to be had, these threads block so that workers need not.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use crate::request::{Body, Request};
use crate::transfer::{Transfer, run_all};
use crate::wire::command;

/// Threads of the pool: as deep a queue as most devices want, bounded because each costs a stack.
const THREADS: usize = 16;

struct Job {
    request: Request,
    transfers: Vec<Transfer>,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    stopping: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
}

/// A bounded set of threads that carry out transfers and answer the request.
pub struct Threads {
    shared: Arc<Shared>,
    handles: Mutex<Vec<JoinHandle<()>>>,
}

impl Threads {
    pub fn start() -> std::io::Result<Threads> {
        let shared = Arc::new(Shared::default());
        let mut handles = Vec::new();
        for index in 0..THREADS {
            let shared = shared.clone();
            let builder = std::thread::Builder::new().name(format!("nbd-io-{index}"));
            handles.push(builder.spawn(move || shared.serve())?);
        }
        Ok(Threads {
            shared,
            handles: Mutex::new(handles),
        })
    }

    pub fn submit(&self, request: Request, transfers: Vec<Transfer>) {
        self.shared
            .queue
            .lock()
            .unwrap()
            .jobs
            .push_back(Job { request, transfers });
        self.shared.work.notify_one();
    }

    /// Finish what was submitted, then end.
    pub fn stop(&self) {
        self.shared.queue.lock().unwrap().stopping = true;
        self.shared.work.notify_all();
        for handle in self.handles.lock().unwrap().drain(..) {
            handle.join().expect("an I/O thread panicked");
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn serve(&self) {
        while let Some(job) = self.next() {
            run(job.request, job.transfers);
        }
    }

    fn next(&self) -> Option<Job> {
        let mut queue = self.queue.lock().unwrap();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.stopping {
                return None;
            }
            queue = self.work.wait(queue).unwrap();
        }
    }
}

/// Carry out all transfers of a read or write, blocking, and answer it.
fn run(request: Request, transfers: Vec<Transfer>) {
    crate::points::reached("threads.run");
    let write = request.header.command == command::WRITE;
    let result = run_all(&request, &transfers, write);
    drop(transfers);
    match result {
        Err(errno) => request.finish(Err(errno.into())),
        Ok(()) if write => request.finish(Ok(Body::None)),
        Ok(()) => request.finish_read(),
    }
}
