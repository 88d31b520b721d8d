//! The handshake's side of the seam: the engine frames, Python decides.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};

use openssl::ssl::SslContext;

use crate::client::Client;
use crate::export::Export;
use crate::peer::Admitted;
use crate::tls::Peer;
use crate::wire::Style;
use crate::worker::{Inbox, Message};

/// What a connection in its handshake has sent, whole.
pub enum Said {
    Open(Arc<Client>),
    Flags(u32),
    Option {
        code: u32,
        data: Vec<u8>,
    },
    /// An option too long to take in; its data has been thrown away.
    Oversized {
        code: u32,
        length: u32,
    },
    /// TLS has begun.
    Secured(Peer),
    /// TLS could not begin, for this reason; the connection has ended.
    Insecure(String),
    /// The connection counts as one until this has been heard.
    Closed {
        _admitted: Arc<Admitted>,
    },
    /// A client was one too many, and has been hung up on.
    Full(String),
}

pub struct Event {
    pub connection: u64,
    pub inbox: Arc<Inbox>,
    pub said: Said,
}

/// What Python decided. `data` is sent as it is.
pub enum Action {
    /// The client is welcome.
    Greet,
    /// Go on with the next option.
    Next { data: Vec<u8> },
    /// TLS begins, once `data` has been sent.
    StartTls { data: Vec<u8>, context: SslContext },
    /// The transmission phase begins.
    Begin {
        data: Vec<u8>,
        export: Arc<Export>,
        style: Style,
        contexts: Vec<(u32, String)>,
        payload_max: u32,
        block_min: u32,
    },
    /// The connection ends.
    End { data: Vec<u8> },
}

impl Event {
    pub fn act(&self, action: Action) {
        self.inbox.send(Message::Action(self.connection, action));
    }
}

#[derive(Default)]
struct Queue {
    events: VecDeque<Event>,
    stopping: bool,
}

/// Events that wait for Python.
#[derive(Default)]
pub struct Handshakes {
    queue: Mutex<Queue>,
    work: Condvar,
}

impl Handshakes {
    pub fn push(&self, event: Event) {
        self.queue.lock().unwrap().events.push_back(event);
        self.work.notify_one();
    }

    /// The next event; None when the engine has stopped.
    pub fn pop(&self) -> Option<Event> {
        let mut queue = self.queue.lock().unwrap();
        loop {
            if let Some(event) = queue.events.pop_front() {
                return Some(event);
            }
            if queue.stopping {
                return None;
            }
            queue = self.work.wait(queue).unwrap();
        }
    }

    pub fn stop(&self) {
        self.queue.lock().unwrap().stopping = true;
        self.work.notify_all();
    }
}
