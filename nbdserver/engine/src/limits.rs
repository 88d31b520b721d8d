//! What clients may have at the most. The administrator's, and may change while the server runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

/// What a request without a payload, and its reply, take of ordinary memory: a guess on the safe side.
const REQUEST_COST: usize = 512;

#[derive(Clone, Copy)]
pub struct Limits {
    /// Connections at once, and those of one peer.
    pub connections: usize,
    pub peer_connections: usize,
    /// Of one connection: requests under way, and bytes of the pool that they may hold (one may always run).
    pub requests: usize,
    pub memory: usize,
    /// Ordinary memory of requests without payloads and of their replies, over all connections: bytes. Beyond it each
    /// connection may have one request under way, and who does not read its replies goes.
    pub replies: usize,
    /// What a handshake may take.
    pub handshake: Duration,
    /// How long nothing may happen on a connection.
    pub idle: Option<Duration>,
}

/// Ordinary memory that requests hold, over all connections.
#[derive(Default)]
pub struct Holding {
    bytes: Arc<AtomicUsize>,
}

impl Holding {
    /// Hold what a request, and `reply` bytes that answer it, take.
    pub fn hold(&self, reply: usize) -> Held {
        let count = REQUEST_COST + reply;
        self.bytes.fetch_add(count, Relaxed);
        Held {
            bytes: self.bytes.clone(),
            count,
        }
    }

    pub fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }
}

pub struct Held {
    bytes: Arc<AtomicUsize>,
    count: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.bytes.fetch_sub(self.count, Relaxed);
    }
}
