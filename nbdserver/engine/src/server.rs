//! Accepting: one thread for all listeners, which come and go; connections go to the worker that has the fewest.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with, sockopt};

use crate::engine::Engine;
use crate::handshake::{Event, Said};
use crate::peer::{Admitted, Full, Peer};
use crate::worker::{Adopted, Message};

/// How long to wait when the process is out of descriptors: the pending connection stays in the backlog.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);
/// How often Python is told, at the most, that clients are turned away.
const SAID_PAUSE: Duration = Duration::from_secs(1);
/// Of Unix sockets, whose default stalls large replies (the kernel doubles it): some replies of 256 KiB, and no more, for
/// what waits for the client longer has left the processor's cache. TCP's is the kernel's to choose, by the way to the client.
const SEND_BUFFER: usize = 384 << 10;

/// What the accepting thread is told.
enum Order {
    Add(u32, OwnedFd),
    /// Close the listener of that number; `Sender` is dropped when that is done.
    Remove(u32, Sender<()>),
    Stop,
}

pub struct Acceptor {
    orders: Mutex<Orders>,
    ordered: Arc<OwnedFd>,
    handle: JoinHandle<()>,
}

struct Orders {
    sender: Sender<Order>,
    /// The number of the next listener. Numbers are never used again.
    next: u32,
}

impl Acceptor {
    pub fn start(engine: Arc<Engine>) -> std::io::Result<Acceptor> {
        let ordered = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (sender, orders) = channel();
        let waker = ordered.clone();
        let handle = std::thread::Builder::new()
            .name("nbd-accept".into())
            .spawn(move || accept_all(&engine, &orders, &waker))?;
        Ok(Acceptor {
            orders: Mutex::new(Orders { sender, next: 0 }),
            ordered,
            handle,
        })
    }

    /// Accept on a listener from now on; its number.
    pub fn add(&self, listener: OwnedFd) -> u32 {
        let mut orders = self.orders.lock().unwrap();
        let number = orders.next;
        orders.next += 1;
        self.order(&orders, Order::Add(number, listener));
        number
    }

    /// Accept no more on a listener; it is closed when this returns. What it has accepted stays.
    pub fn remove(&self, number: u32) {
        let (closed, wait) = channel();
        self.order(&self.orders.lock().unwrap(), Order::Remove(number, closed));
        // An error says that the sender has been dropped, which is what is waited for.
        let _ = wait.recv();
    }

    /// Close the listeners; what has been accepted stays.
    pub fn stop(self) {
        self.order(&self.orders.lock().unwrap(), Order::Stop);
        self.handle.join().expect("the accepting thread panicked");
    }

    fn order(&self, orders: &Orders, order: Order) {
        orders
            .sender
            .send(order)
            .expect("the accepting thread takes orders until it is stopped");
        rustix::io::write(&self.ordered, &1u64.to_ne_bytes()).expect("an eventfd takes a one");
    }
}

fn accept_all(engine: &Engine, orders: &Receiver<Order>, ordered: &OwnedFd) {
    let mut said = None;
    let mut listeners: Vec<(u32, OwnedFd)> = Vec::new();
    loop {
        let mut fds: Vec<PollFd<'_>> = listeners
            .iter()
            .map(|(_, fd)| PollFd::new(fd, PollFlags::IN))
            .collect();
        fds.push(PollFd::new(ordered, PollFlags::IN));
        match poll(&mut fds, None) {
            Err(Errno::INTR) => continue,
            result => result.expect("poll on descriptors that are open"),
        };
        for ((number, listener), polled) in listeners.iter().zip(&fds) {
            if !polled.revents().is_empty() {
                accept_one(engine, *number, listener, &mut said);
            }
        }
        // The counter only wakes: that it was read already is no error.
        let _ = rustix::io::read(ordered, &mut [0; 8]);
        for order in orders.try_iter() {
            match order {
                Order::Add(number, listener) => listeners.push((number, listener)),
                Order::Remove(number, _closed) => listeners.retain(|(other, _)| *other != number),
                Order::Stop => return,
            }
        }
    }
}

fn accept_one(engine: &Engine, number: u32, listener: &OwnedFd, said: &mut Option<Instant>) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    match accept_with(listener, flags) {
        Ok(socket) => {
            let peer = Peer::of(&socket);
            let limits = *engine.limits.lock().unwrap();
            let admitted = engine
                .crowd
                .admit(&peer, limits.connections, limits.peer_connections);
            match admitted {
                Ok(admitted) => {
                    // Where no worker is left the client is hung up on.
                    hand_over(engine, socket, peer, Some(number), admitted);
                }
                // Hung up on, rather than left to wait for nobody knows what.
                Err(full) => turn_away(engine, &peer, full, said),
            }
        }
        Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
            std::thread::sleep(EXHAUSTED_PAUSE);
        }
        // The client has gone again, or another error that is the connection's own.
        Err(_) => {}
    }
}

/// Give a connection to the worker that has the fewest. False: there is none.
pub fn hand_over(
    engine: &Engine,
    socket: OwnedFd,
    peer: Peer,
    listener: Option<u32>,
    admitted: Admitted,
) -> bool {
    // Both are for speed, and a socket that refuses them works all the same. Only TCP knows the first.
    if sockopt::set_tcp_nodelay(&socket, true).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER);
    }
    let inboxes = engine.inboxes.iter().filter(|inbox| inbox.is_open());
    let Some(inbox) = inboxes.min_by_key(|inbox| inbox.connections()) else {
        return false;
    };
    inbox.send(Message::Connect {
        socket,
        peer,
        listener,
        adopted: Adopted::by(inbox, admitted),
    });
    true
}

/// Count a client that is one too many, and tell Python of some.
fn turn_away(engine: &Engine, peer: &Peer, full: Full, said: &mut Option<Instant>) {
    engine.turned_away.fetch_add(1, Relaxed);
    if said.is_some_and(|before| before.elapsed() < SAID_PAUSE) {
        return;
    }
    *said = Some(Instant::now());
    let limit = match full {
        Full::InAll => "connections",
        Full::OfThisPeer => "connections_per_peer",
    };
    engine.handshakes.push(Event {
        connection: 0,
        inbox: engine.inboxes[0].clone(),
        said: Said::Full(format!("{peer} is one too many: [limits] {limit}")),
    });
}
