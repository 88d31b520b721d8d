//! One connection: its socket, what it has sent and not been parsed, what it has still to be sent.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use openssl::ssl::SslContext;
use rustix::io::Errno;

use crate::client::Client;
use crate::export::Export;
use crate::file::File;
use crate::limits::Held;
use crate::parts::Split;
use crate::pool::{Pool, Slot, Ticket};
use crate::request::{Body, Failure, Reply, Session};
use crate::tls::Transport;
use crate::vector::Vector;
use crate::wire::{self, Header, Question, Style, chunk};
use crate::worker::Announced;

/// Slices in one vectored send.
const SLICES_MAX: usize = 256;
/// Room for the largest reply of fixed size: a hole with an extended header.
const HEAD_MAX: usize = 44;

/// Something to send. `End` marks the end of a reply that held `weight` bytes, and may hold ordinary memory.
enum Item {
    Head {
        bytes: [u8; HEAD_MAX],
        length: u8,
    },
    Bytes(Vec<u8>),
    Slot(Arc<Slot>, Range<usize>),
    /// Bytes of a file, which leave from the page cache.
    Cached(Cached),
    Spilled(Spilled),
    End {
        weight: usize,
        _held: Option<Held>,
    },
}

impl Item {
    fn bytes(&self) -> &[u8] {
        match self {
            Item::Head { bytes, length } => &bytes[..usize::from(*length)],
            Item::Bytes(bytes) => bytes,
            Item::Slot(slot, range) => slot.slice(range.clone()),
            Item::Spilled(spilled) => &spilled.bytes,
            Item::Cached(_) | Item::End { .. } => &[],
        }
    }

    /// Bytes to send.
    fn len(&self) -> usize {
        match self {
            Item::Cached(cached) => cached.length,
            item => item.bytes().len(),
        }
    }
}

/// Bytes of a file whose place stays theirs while the file is open, all of them in its page cache when that was last looked
/// at.
pub struct Cached {
    pub file: Arc<File>,
    pub offset: u64,
    pub length: usize,
}

/// Bytes of a reply that had to leave the pool, counted against a bound that all connections share.
struct Spilled {
    bytes: Vec<u8>,
    total: Arc<AtomicUsize>,
}

impl Drop for Spilled {
    fn drop(&mut self) {
        self.total.fetch_sub(self.bytes.len(), Relaxed);
    }
}

/// What is on its way to the client.
#[derive(Default)]
pub struct Outgoing {
    items: VecDeque<Item>,
    /// Bytes of the first item that have been sent.
    sent: usize,
    /// Bytes queued and not sent.
    length: usize,
    /// Bytes ever sent.
    total: u64,
    /// The socket was full when it was last tried.
    blocked: bool,
}

pub enum Sent {
    /// Everything has left; the connection waits for nothing.
    All,
    /// The socket is full.
    Blocked,
}

impl Outgoing {
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Bytes queued and not sent.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Bytes ever sent: whether it grows says whether the client reads.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Whether there are so many bytes to send, and a socket that may take them.
    pub fn is_worth_sending(&self, length: usize) -> bool {
        self.length >= length && !self.blocked
    }

    fn push(&mut self, item: Item) {
        self.length += item.len();
        self.items.push_back(item);
    }

    pub fn bytes(&mut self, bytes: Vec<u8>) {
        if !bytes.is_empty() {
            self.push(Item::Bytes(bytes));
        }
    }

    /// Give the memory of the pool back, and keep the bytes in ordinary memory. False, with nothing moved, if all
    /// connections would then have more than `max` bytes there.
    pub fn spill(&mut self, total: &Arc<AtomicUsize>, max: usize) -> bool {
        if total.fetch_add(self.length, Relaxed) + self.length > max {
            total.fetch_sub(self.length, Relaxed);
            return false;
        }
        let mut moved = 0;
        for item in &mut self.items {
            if let Item::Slot(slot, range) = item {
                let bytes = slot.slice(range.clone()).to_vec();
                moved += bytes.len();
                *item = Item::Spilled(Spilled {
                    bytes,
                    total: total.clone(),
                });
            }
        }
        // What was counted beforehand and has not been moved (`sent` bytes of the first item were not counted).
        total.fetch_add(moved, Relaxed);
        total.fetch_sub(self.length, Relaxed);
        true
    }

    fn head(&mut self, write: impl FnOnce(&mut Vec<u8>), scratch: &mut Vec<u8>) {
        scratch.clear();
        write(scratch);
        let mut bytes = [0; HEAD_MAX];
        bytes[..scratch.len()].copy_from_slice(scratch);
        self.push(Item::Head {
            bytes,
            length: scratch.len() as u8,
        });
    }

    fn data(&mut self, vector: &Vector, range: Range<usize>) {
        for (slot, part) in vector.parts(range) {
            self.push(Item::Slot(slot.clone(), part));
        }
    }

    /// Queue a reply.
    pub fn reply(&mut self, mut reply: Reply, scratch: &mut Vec<u8>) {
        let (weight, held) = (reply.weight, reply.held.take());
        self.message(reply, scratch);
        self.push(Item::End {
            weight,
            _held: held,
        });
    }

    /// Queue a reply that nobody is told of when it has left.
    pub fn message(&mut self, reply: Reply, scratch: &mut Vec<u8>) {
        let question = Question {
            extended: reply.style == Style::Extended,
            cookie: reply.cookie,
            offset: reply.part.map_or(reply.offset, |part| part.offset),
        };
        let is_last = reply.part.is_none_or(|part| part.last);
        let (chunks, cookie) = (reply.style.chunks(), reply.cookie);
        match reply.result {
            Err(failure) => self.error(question, chunks, &failure, scratch),
            Ok(Body::Data { vector, holes }) if chunks && !vector.is_empty() => {
                assert!(!reply.whole || holes.is_empty(), "DF has no holes");
                self.chunks(question, reply.offset, &vector, &holes, is_last, scratch);
            }
            Ok(Body::Data { vector, .. }) if !chunks => {
                self.head(|out| wire::simple_reply(out, 0, cookie), scratch);
                self.data(&vector, 0..vector.len());
            }
            Ok(Body::Cached(cached)) => {
                let (flags, length) = (done_if(is_last), cached.length as u32);
                self.head(
                    |out| match chunks {
                        true => question.data(out, flags, reply.offset, length),
                        false => wire::simple_reply(out, 0, cookie),
                    },
                    scratch,
                );
                self.push(Item::Cached(cached));
            }
            Ok(Body::Status(contexts)) => {
                let last = contexts.len().saturating_sub(1);
                for (index, (id, runs)) in contexts.iter().enumerate() {
                    let mut out = Vec::with_capacity(40 + 16 * runs.len());
                    question.block_status(&mut out, done_if(index == last), *id, runs);
                    self.bytes(out);
                }
            }
            Ok(_) if !is_last => {}
            Ok(_) if chunks => self.head(|out| question.none(out), scratch),
            Ok(_) => self.head(|out| wire::simple_reply(out, 0, cookie), scratch),
        }
    }

    fn error(
        &mut self,
        question: Question,
        chunks: bool,
        failure: &Failure,
        scratch: &mut Vec<u8>,
    ) {
        let error = wire::nbd_errno(failure.errno);
        if chunks {
            let mut out = Vec::new();
            question.error(&mut out, chunk::FLAG_DONE, error, &failure.message);
            self.bytes(out);
        } else {
            self.head(
                |out| wire::simple_reply(out, error, question.cookie),
                scratch,
            );
        }
    }

    /// A read from `offset` (or the last part of one) in chunks: data and holes in order, the last chunk marked so.
    fn chunks(
        &mut self,
        question: Question,
        offset: u64,
        vector: &Vector,
        holes: &[(usize, usize)],
        is_last: bool,
        scratch: &mut Vec<u8>,
    ) {
        let end = vector.len();
        let mut position = 0;
        let mut holes = holes.iter().peekable();
        while position < end {
            let (is_hole, until) = match holes.peek() {
                Some((start, length)) if *start == position => (true, start + length),
                Some((start, _)) => (false, *start),
                None => (false, end),
            };
            let flags = done_if(is_last && until == end);
            let at = offset + position as u64;
            let length = (until - position) as u32;
            if is_hole {
                self.head(|out| question.hole(out, flags, at, length), scratch);
                holes.next();
            } else {
                self.head(|out| question.data(out, flags, at, length), scratch);
                self.data(vector, position..until);
            }
            position = until;
        }
    }

    /// Send as much as the socket takes. `ended` is called with the weight of each reply that has left whole.
    fn send(&mut self, transport: &mut Transport, ended: impl FnMut(usize)) -> Result<Sent, Errno> {
        let sent = self.send_items(transport, ended)?;
        self.blocked = matches!(sent, Sent::Blocked);
        Ok(sent)
    }

    fn send_items(
        &mut self,
        transport: &mut Transport,
        mut ended: impl FnMut(usize),
    ) -> Result<Sent, Errno> {
        loop {
            self.drop_sent(&mut ended);
            if self.items.is_empty() {
                return match transport.flush() {
                    Ok(()) => Ok(Sent::All),
                    Err(Errno::AGAIN) => Ok(Sent::Blocked),
                    Err(errno) => Err(errno),
                };
            }
            let sent = match self.items.front() {
                Some(Item::Cached(cached)) => transport.send_cached(cached, self.sent),
                _ => self.send_slices(transport),
            };
            match sent {
                Err(Errno::AGAIN) => return Ok(Sent::Blocked),
                Err(Errno::INTR) => {}
                // The file has become shorter, or cannot be read; or it is the socket, which will say so again.
                Ok(0) | Err(_) if matches!(self.items.front(), Some(Item::Cached(_))) => {
                    self.read_cached()?
                }
                sent => self.left(sent?),
            }
        }
    }

    /// Send from memory, up to what leaves from the page cache.
    fn send_slices(&self, transport: &mut Transport) -> Result<usize, Errno> {
        let is_cached = |item: &&Item| matches!(item, Item::Cached(_));
        let slices: Vec<IoSlice<'_>> = self
            .items
            .iter()
            .take_while(|item| !is_cached(item))
            .enumerate()
            .map(|(index, item)| {
                let skip = if index == 0 { self.sent } else { 0 };
                IoSlice::new(&item.bytes()[skip..])
            })
            .filter(|slice| !slice.is_empty())
            .take(SLICES_MAX)
            .collect();
        transport.send(&slices, self.items.iter().any(|item| is_cached(&item)))
    }

    /// So many bytes more have been taken by the socket.
    fn left(&mut self, sent: usize) {
        self.sent += sent;
        self.length -= sent;
        self.total += sent as u64;
    }

    /// Have in memory what cannot leave from the page cache: its header has left already. Err: nor can it be read.
    fn read_cached(&mut self) -> Result<(), Errno> {
        let Some(Item::Cached(cached)) = self.items.pop_front() else {
            unreachable!("the item that was being sent");
        };
        let slots = cached.file.memory_for(cached.length)?;
        let vector = Vector::new(slots);
        let (offset, range) = (cached.offset, 0..cached.length);
        cached.file.read(offset, &vector, range.clone())?;
        for (slot, part) in vector.parts(range).collect::<Vec<_>>().into_iter().rev() {
            self.items.push_front(Item::Slot(slot.clone(), part));
        }
        Ok(())
    }

    /// Take away what `sent` covers; `sent` is then within the first item that is left.
    fn drop_sent(&mut self, ended: &mut impl FnMut(usize)) {
        while let Some(item) = self.items.front() {
            let length = item.len();
            if self.sent < length {
                return;
            }
            self.sent -= length;
            if let Some(Item::End { weight, .. }) = self.items.pop_front() {
                ended(weight);
            }
        }
    }
}

fn done_if(last: bool) -> u16 {
    if last { chunk::FLAG_DONE } else { 0 }
}

pub enum Phase {
    /// The four bytes of the client's flags.
    Flags,
    Options,
    /// TLS begins once everything has been sent.
    StartTls(SslContext),
    /// TLS's own handshake.
    Tls,
    /// Python is deciding.
    Deciding,
    Transmission(Arc<Session>, Arc<Export>),
}

/// A write whose payload is still coming.
pub struct Payload {
    pub header: Header,
    pub vector: Vector,
    pub filled: usize,
}

impl Payload {
    pub fn is_whole(&self) -> bool {
        self.filled == self.vector.len()
    }

    /// Where the next bytes of it belong, and whether it is whole with them. None: it is whole.
    fn rest(&mut self) -> Option<(&mut [u8], bool)> {
        let left = self.filled..self.vector.len();
        let length = left.len();
        let (slot, part) = self.vector.parts(left).next()?;
        let is_last = part.len() == length;
        Some((slot.slice_mut(part), is_last))
    }
}

pub struct Connection {
    pub transport: Transport,
    pub token: u64,
    pub client: Arc<Client>,
    pub announced: Announced,
    pub phase: Phase,
    /// When the handshake must be over.
    pub deadline: Instant,
    /// When something was last received, sent, or to be sent.
    pub active: Instant,
    /// How much more is begun before others have their turn; and whether parsing waits for the next turn.
    pub left: u32,
    pub waits_turn: bool,
    /// Received and not parsed.
    pub input: Vec<u8>,
    /// Bytes of input to throw away before anything is parsed.
    pub skip: u64,
    pub payload: Option<Payload>,
    /// The client is sending large payloads.
    pub bulk: bool,
    /// A request that is carried out in parts: nothing else is begun until the last of them has been.
    pub split: Option<Split>,
    /// A request, or part of one, that waits for memory.
    pub ticket: Option<(Header, Ticket)>,
    /// A request that waits for a drained section to end.
    pub parked: Option<(Header, Vector, Option<Vec<u32>>)>,
    /// Parsing waits for memory, for a drained section to end, for replies to leave, or for the next turn.
    pub stalled: bool,
    /// Nothing more will be read: the client said so, has gone, or the server is stopping.
    pub deaf: bool,
    /// Close once everything has been sent.
    pub closing: bool,
    pub outgoing: Outgoing,
    /// Requests taken and not answered, and the bytes they hold.
    pub requests: usize,
    pub weight: usize,
    /// What epoll is asked for now.
    pub interest: rustix::event::epoll::EventFlags,
    pub dirty: bool,
    /// Bytes sent, and received of a payload, when it was last looked at whether the client goes on.
    pub progress: (u64, usize),
}

impl Connection {
    /// Whether what the client sends is taken in now.
    pub fn is_listening(&self) -> bool {
        let waits = matches!(self.phase, Phase::Deciding | Phase::StartTls(_));
        !self.deaf && !self.stalled && !self.closing && !waits
    }

    /// Whether it has requests that were accepted and are not answered.
    pub fn has_accepted(&self) -> bool {
        let incomplete = usize::from(self.payload.is_some());
        let begun = self.split.as_ref().is_some_and(Split::is_read);
        self.requests > incomplete || begun || self.ticket.is_some() || self.parked.is_some()
    }

    /// Receive into what is missing of a payload, and what comes after that into `buffer`. How many bytes there was room
    /// for, and how many came.
    pub fn receive(&mut self, buffer: &mut [u8]) -> (usize, Result<usize, Errno>) {
        let Some((rest, is_last)) = self.payload.as_mut().and_then(Payload::rest) else {
            return (buffer.len(), self.transport.receive(&mut [], buffer));
        };
        let room = if is_last { buffer.len() } else { 0 };
        let wanted = rest.len() + room;
        (wanted, self.transport.receive(rest, &mut buffer[..room]))
    }

    /// Of bytes received, those that the payload was missing are its own. How many are left.
    pub fn fill_payload(&mut self, received: usize) -> usize {
        let Some(payload) = &mut self.payload else {
            return received;
        };
        let taken = received.min(payload.vector.len() - payload.filled);
        payload.filled += taken;
        received - taken
    }

    /// Whether everything has left.
    pub fn is_silent(&self) -> bool {
        self.outgoing.is_empty() && !self.transport.has_output()
    }

    /// Send as much as the socket takes.
    pub fn send(&mut self) -> Result<Sent, Errno> {
        let Connection {
            outgoing,
            transport,
            requests,
            weight,
            ..
        } = self;
        outgoing.send(transport, |bytes| {
            *requests -= 1;
            *weight -= bytes;
        })
    }

    /// Queue a reply. After a part's, the next part may begin; after one that failed nobody wants the others.
    pub fn reply(&mut self, reply: Reply, scratch: &mut Vec<u8>) {
        let (is_part, has_failed) = (reply.part.is_some(), reply.result.is_err());
        self.outgoing.reply(reply, scratch);
        if let Some(split) = &mut self.split
            && is_part
            && (!split.ended() || has_failed)
        {
            self.skip += split.unread();
            self.split = None;
        }
    }

    /// Whether parsing waits for a reply: that of a part.
    pub fn awaits_part(&self) -> bool {
        self.split.as_ref().is_some_and(Split::is_running)
    }

    /// Forget a write whose payload will never be whole: it was not accepted.
    pub fn drop_payload(&mut self) {
        if let Some(payload) = self.payload.take() {
            self.requests -= 1;
            self.weight -= payload.vector.len();
        }
    }

    /// Whether the client, which is waited for, has done nothing for so long.
    pub fn is_idle(&self, now: Instant, limit: Duration) -> bool {
        let is_waiting = self.requests == 0 || !self.outgoing.is_empty() || self.payload.is_some();
        is_waiting && now.saturating_duration_since(self.active) >= limit
    }

    /// Whether the client has neither taken in nor sent anything since this was last asked, while memory of the
    /// pool waits for that.
    pub fn is_stuck(&mut self) -> bool {
        let filled = self.payload.as_ref().map_or(0, |payload| payload.filled);
        let progress = (self.outgoing.total(), filled);
        let waiting = !self.outgoing.is_empty() || self.payload.is_some();
        waiting && std::mem::replace(&mut self.progress, progress) == progress
    }

    /// Give back what memory of the pool waits for the client. False: there is no other memory to be had.
    pub fn spill(&mut self, pool: &Arc<Pool>, total: &Arc<AtomicUsize>, max: usize) -> bool {
        if let Some(payload) = &mut self.payload
            && payload.vector.is_pooled()
        {
            let Some(slots) = pool.allocate_ordinary(payload.vector.len()) else {
                return false;
            };
            let vector = Vector::new(slots);
            vector.fill(0, &payload.vector.to_vec(0..payload.filled));
            payload.vector = vector;
        }
        self.outgoing.spill(total, max)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{OpenOptions, remove_file, write};
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::file::Means;

    /// What reaches the other end of a reply that is to leave from the page cache of a file, opened so; and how that went.
    fn sent(name: &str, options: &OpenOptions) -> (Vec<u8>, Result<Sent, Errno>) {
        let name = format!("nbdserver-cached-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        write(&path, [7; 1000]).unwrap();
        let descriptor = options.open(&path).unwrap().into();
        remove_file(&path).unwrap();
        let means = Means {
            direct: false,
            unsafe_: false,
            threads: true,
            transfer_max: usize::MAX,
            pool: Pool::new(1 << 21).unwrap(),
            rings: None,
            recorder: None,
        };
        let file = Arc::new(File::new(0, descriptor, String::new(), true, means).unwrap());
        let (here, mut there) = UnixStream::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        let mut outgoing = Outgoing::default();
        outgoing.bytes(b"head".to_vec());
        outgoing.push(Item::Cached(Cached {
            file,
            offset: 10,
            length: 1500,
        }));
        let mut transport = Transport::new(here.into());
        let result = outgoing.send(&mut transport, |_| {});
        drop(transport);
        let mut received = Vec::new();
        there.read_to_end(&mut received).unwrap();
        (received, result)
    }

    #[test]
    fn what_a_file_has_no_more_is_sent_as_zeroes() {
        let (received, result) = sent("short", OpenOptions::new().read(true));
        assert!(matches!(result, Ok(Sent::All)));
        assert_eq!(received, [b"head", &[7; 990][..], &[0; 510]].concat());
    }

    #[test]
    fn what_cannot_be_read_after_its_header_has_left_ends_the_connection() {
        let (received, result) = sent("closed", OpenOptions::new().write(true));
        assert!(matches!(result, Err(Errno::BADF)));
        assert_eq!(received, b"head");
    }
}
