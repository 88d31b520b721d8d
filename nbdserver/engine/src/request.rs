//! A request on its way through the engine, and the reply that ends it.

use std::sync::Arc;

use rustix::io::Errno;

use crate::connection::Cached;
use crate::export::{Export, Running};
use crate::limits::Held;
use crate::parts::Part;
use crate::peer::Admitted;
use crate::vector::Vector;
use crate::wire::{self, Header, Style, command, flag};
use crate::worker::{Inbox, Message};

/// What a connection negotiated, as its requests need it.
pub struct Session {
    pub inbox: Arc<Inbox>,
    /// The connection's number within its worker; never used again.
    pub connection: u64,
    /// It counts as a connection until its last request has ended.
    pub _admitted: Arc<Admitted>,
    pub style: Style,
    /// The longest READ or WRITE, and what offsets and lengths must be multiples of.
    pub payload_max: u32,
    pub block_min: u32,
    /// Whether bytes go to the socket as they are: no TLS.
    pub plain: bool,
    /// Meta contexts as (identifier, name).
    pub contexts: Vec<(u32, String)>,
}

pub struct Request {
    pub header: Header,
    pub export: Arc<Export>,
    pub vector: Vector,
    pub session: Arc<Session>,
    /// The meta contexts a BLOCK_STATUS asks for, by their identifiers; None: all.
    pub named: Option<Vec<u32>>,
    /// Ranges of a read that are known to be zeroes, as (start, length); their memory is not filled.
    pub holes: Vec<(usize, usize)>,
    /// None: it is all of what the client asked for.
    pub part: Option<Part>,
    /// Meters charged so far, of those on its way.
    pub charged: u32,
    /// The ordinary memory that it and its reply take, if it has no payload.
    pub held: Option<Held>,
    /// Drained sections wait for it to be dropped.
    pub _running: Running,
}

/// Why a request failed: an errno of the system, and words for clients that take them.
pub struct Failure {
    pub errno: i32,
    pub message: String,
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Failure {
        Failure {
            errno: errno.raw_os_error(),
            message: String::new(),
        }
    }
}

impl Failure {
    /// The failure as it answers this request. proto.md, "Error values": only a fast zero may fail with ENOTSUP, and a
    /// client takes an error that it does not expect for EINVAL.
    fn of(mut self, header: &Header) -> Failure {
        let is_fast =
            header.command == command::WRITE_ZEROES && header.flags & flag::FAST_ZERO != 0;
        if !is_fast && wire::nbd_errno(self.errno) == wire::error::ENOTSUP {
            self.errno = wire::error::EINVAL as i32;
        }
        self
    }
}

/// What a successful reply carries.
pub enum Body {
    None,
    Data {
        vector: Vector,
        holes: Vec<(usize, usize)>,
    },
    /// The answer to a read, which leaves from a file's page cache.
    Cached(Cached),
    /// Block status: per meta context its identifier and (length, flags) runs.
    Status(Vec<(u32, Vec<(u64, u32)>)>),
}

pub struct Reply {
    pub connection: u64,
    pub cookie: u64,
    pub offset: u64,
    pub style: Style,
    /// Whether the answer must be one chunk (the DF flag).
    pub whole: bool,
    pub part: Option<Part>,
    /// Bytes of memory the request held.
    pub weight: usize,
    pub held: Option<Held>,
    pub result: Result<Body, Failure>,
}

/// Block status descriptors in one reply, for each context: `limits.py` has the same.
const STATUS_COUNT_MAX: usize = 8192;
/// Bytes of a descriptor with extended headers.
const DESCRIPTOR: usize = 16;

/// The longest answer to a request for block status, bytes; 0 for any other. `named`: the contexts it asks for.
pub fn status_length(header: &Header, session: &Session, named: Option<&[u32]>) -> usize {
    if header.command != command::BLOCK_STATUS {
        return 0;
    }
    let contexts = named.map_or(session.contexts.len(), <[u32]>::len);
    contexts * STATUS_COUNT_MAX * DESCRIPTOR
}

impl Request {
    /// The meta contexts whose status is asked for, as (identifier, name).
    pub fn contexts(&self) -> Vec<(u32, String)> {
        let asked = |id| self.named.as_ref().is_none_or(|named| named.contains(id));
        let contexts = self.session.contexts.iter();
        contexts.filter(|(id, _)| asked(id)).cloned().collect()
    }

    /// Whether holes may be answered as holes.
    pub fn takes_holes(&self) -> bool {
        self.session.style.chunks() && self.header.flags & flag::DF == 0
    }

    /// End the request; its reply goes to whoever called, to be sent.
    pub fn reply(self, result: Result<Body, Failure>) -> Reply {
        Reply {
            connection: self.session.connection,
            cookie: self.header.cookie,
            offset: self.header.offset,
            style: self.session.style,
            whole: self.header.flags & flag::DF != 0,
            part: self.part,
            weight: self.vector.len()
                + status_length(&self.header, &self.session, self.named.as_deref()),
            held: self.held,
            result: result.map_err(|failure| failure.of(&self.header)),
        }
    }

    /// The reply to a read whose memory and holes are complete.
    pub fn reply_read(mut self) -> Reply {
        let vector = std::mem::take(&mut self.vector);
        let holes = std::mem::take(&mut self.holes);
        let weight = vector.len();
        let mut reply = self.reply(Ok(Body::Data { vector, holes }));
        reply.weight = weight;
        reply
    }

    /// The reply to a read whose bytes leave from the page cache: it needs its memory no longer.
    pub fn reply_cached(mut self, cached: Cached) -> Reply {
        self.vector = Vector::default();
        let weight = cached.length;
        let mut reply = self.reply(Ok(Body::Cached(cached)));
        reply.weight = weight;
        reply
    }

    /// End the request from another thread than its worker's.
    pub fn finish(self, result: Result<Body, Failure>) {
        let inbox = self.session.inbox.clone();
        inbox.send(Message::Reply(self.reply(result)));
    }

    pub fn finish_read(self) {
        let inbox = self.session.inbox.clone();
        inbox.send(Message::Reply(self.reply_read()));
    }
}
