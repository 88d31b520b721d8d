//! Accepting: one thread for all listeners; connections go to the worker that has the fewest.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{SocketAddrAny, SocketFlags, acceptfrom_with, sockopt};
use rustix::process::{Resource, getrlimit};

use crate::engine::Engine;
use crate::worker::Message;

/// How long to wait when the process is out of descriptors: the pending connection stays in the backlog.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);
/// Connections at once, where the limit on descriptors allows as many: each may hold some MiB of requests and replies.
const CONNECTIONS_MAX: usize = 4096;
/// The default send buffer stalls large replies.
const SEND_BUFFER: usize = 2 << 20;

pub struct Acceptor {
    stop: Arc<OwnedFd>,
    handle: JoinHandle<()>,
}

impl Acceptor {
    pub fn start(engine: Arc<Engine>, listeners: Vec<OwnedFd>) -> std::io::Result<Acceptor> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let stopped = stop.clone();
        let handle = std::thread::Builder::new()
            .name("nbd-accept".into())
            .spawn(move || accept_all(&engine, &listeners, &stopped))?;
        Ok(Acceptor { stop, handle })
    }

    /// Close the listeners; what has been accepted stays.
    pub fn stop(self) {
        rustix::io::write(&self.stop, &1u64.to_ne_bytes()).expect("an eventfd takes a one");
        self.handle.join().expect("the accepting thread panicked");
    }
}

fn accept_all(engine: &Engine, listeners: &[OwnedFd], stop: &OwnedFd) {
    let connections_max = connections_max();
    loop {
        let mut fds: Vec<PollFd<'_>> = listeners
            .iter()
            .map(|fd| PollFd::new(fd, PollFlags::IN))
            .collect();
        fds.push(PollFd::new(stop, PollFlags::IN));
        match poll(&mut fds, None) {
            Err(Errno::INTR) => continue,
            result => result.expect("poll on descriptors that are open"),
        };
        if !fds[listeners.len()].revents().is_empty() {
            return;
        }
        for (listener, polled) in listeners.iter().zip(&fds) {
            if !polled.revents().is_empty() {
                accept_one(engine, listener, connections_max);
            }
        }
    }
}

/// How many connections may be open: half of the descriptors, as images need some too.
fn connections_max() -> usize {
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(descriptors / 2).map_or(CONNECTIONS_MAX, |half| half.min(CONNECTIONS_MAX))
}

fn accept_one(engine: &Engine, listener: &OwnedFd, connections_max: usize) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    match acceptfrom_with(listener, flags) {
        Ok((socket, address)) => {
            let open: usize = engine.inboxes.iter().map(|inbox| inbox.connections()).sum();
            if open >= connections_max {
                return; // hung up on, rather than left to wait for nobody knows what
            }
            // Both are for speed; a socket that refuses them works all the same.
            let _ = sockopt::set_tcp_nodelay(&socket, true);
            let _ = sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER);
            let inbox = engine
                .inboxes
                .iter()
                .min_by_key(|inbox| inbox.connections())
                .expect("at least one worker");
            inbox.adopt();
            inbox.send(Message::Connect {
                socket,
                peer: peer(address),
            });
        }
        Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
            std::thread::sleep(EXHAUSTED_PAUSE);
        }
        // The client has gone again, or another error that is the connection's own.
        Err(_) => {}
    }
}

fn peer(address: Option<SocketAddrAny>) -> String {
    match address.map(std::net::SocketAddr::try_from) {
        Some(Ok(address)) => address.to_string(),
        _ => "unix".into(),
    }
}
