//! A connection as others than its worker see it: who it is, what it has asked for, and the way to end it.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::export::count;
use crate::peer::Peer;
use crate::wire::{Header, command};
use crate::worker::{Inbox, Message};

/// What one connection has asked for: requests that were begun, and the bytes of its reads and writes.
#[derive(Default)]
pub struct Counters {
    pub requests: AtomicU64,
    pub bytes_read: AtomicU64,
    pub bytes_written: AtomicU64,
}

pub struct Client {
    pub peer: Peer,
    /// The number of the listener that it came by; None: it was handed over connected.
    pub listener: Option<u32>,
    pub counters: Counters,
    inbox: Arc<Inbox>,
    token: u64,
}

impl Client {
    pub fn new(peer: Peer, listener: Option<u32>, inbox: Arc<Inbox>, token: u64) -> Arc<Client> {
        Arc::new(Client {
            peer,
            listener,
            counters: Counters::default(),
            inbox,
            token,
        })
    }

    /// A request of this connection's, or a part of one, has begun.
    pub fn began(&self, header: &Header, is_first: bool) {
        count(&self.counters.requests, u64::from(is_first));
        match header.command {
            command::READ => count(&self.counters.bytes_read, header.length),
            command::WRITE => count(&self.counters.bytes_written, header.length),
            _ => {}
        }
    }

    /// Close the connection, whatever it is doing. What it has asked for and is running goes on, unanswered.
    pub fn disconnect(&self) {
        self.inbox.send(Message::Disconnect(self.token));
    }
}
