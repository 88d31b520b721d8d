//! A worker: one thread that serves a share of the connections, and never waits for long.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};

use crate::client::Client;
use crate::connection::{Cached, Connection, Outgoing, Payload, Phase, Sent};
use crate::engine::Engine;
use crate::export::{Place, count};
use crate::extents::FileId;
use crate::handshake::{Action, Event, Said};
use crate::limits::Limits;
use crate::parts::{Split, takes_parts};
use crate::peer::{Admitted, Peer};
use crate::pool::Ticket;
use crate::request::{Body, Failure, Reply, Request, Session, status_length};
use crate::ring::Ring;
use crate::tls::{Progress, Transport};
use crate::transfer::{Transfer, charge, finish_read, is_code, plan, prepare_write, run_all};
use crate::vector::Vector;
use crate::wire::{self, Header, Rules, Verdict, command};

/// What one receive takes in: many small requests, or a large part of a payload.
const RECEIVE: usize = 256 << 10;
/// The same from a client that is sending large payloads: what comes along with a request has to be copied to its memory.
const RECEIVE_BULK: usize = 512;
/// A payload that makes a client one that sends large ones.
const BULK: usize = 32 << 10;
/// Bytes to send that do not wait for the rest of the batch: while they are in the processor's cache, and so that the client
/// has something to do meanwhile.
const SEND_SOON: usize = 128 << 10;
/// Receives for one connection before others have their turn.
const RECEIVES_MAX: usize = 4;
/// Bytes of a reply from which on it costs less to have the kernel send them from the page cache than to copy them.
const SENDFILE_MIN: usize = 32 << 10;
/// Turns of these in which a client that is gone is heard out: more than its socket can hold.
const HEARD_OUT_MAX: usize = 1024;
/// What is begun for one connection before others have their turn: so many requests, and fewer where they are long.
const TURN: u32 = 64;
const TURN_BYTES: usize = 32 << 10;
/// Which part of the pool the requests of one connection may hold at the most (one request may always run).
const WEIGHT_PART: usize = 4;
/// How long a client may leave its replies unread while their memory is wanted by others.
const UNREAD_MAX: Duration = Duration::from_secs(5);
/// Bytes that may wait to be sent before a connection's next request is begun: enough to keep its socket busy, and few enough
/// to be in the processor's cache still when it takes them.
const OUTGOING_MAX: usize = 256 << 10;
/// Replies that clients do not read, in ordinary memory because the pool was needed; beyond it such clients go.
const SPILL_MAX: usize = 256 << 20;
/// The longest option payload taken in; up to OPTION_SKIP_MAX it is thrown away and refused, beyond it the
/// connection ends.
const OPTION_MAX: u32 = 64 << 10;
const OPTION_SKIP_MAX: u32 = 4 << 20;
const OPTION_HEADER: usize = 16;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
const GREETING: &[u8; 18] = b"NBDMAGICIHAVEOPT\x00\x03"; // FIXED_NEWSTYLE | NO_ZEROES
/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(500);
/// The same while somebody waits for memory, which clients that have stopped reading may be holding.
const TICK_SHORT: Duration = Duration::from_millis(50);

const INBOX: u64 = u64::MAX;
const RING: u64 = u64::MAX - 1;
/// A connection's token: its place in `connections`, and above that how often the place has been used.
const PLACE_BITS: u32 = 24;

pub enum Message {
    Connect {
        socket: OwnedFd,
        peer: Peer,
        listener: Option<u32>,
        adopted: Adopted,
    },
    Limits(Limits),
    Reply(Reply),
    Action(u64, Action),
    Forget(FileId, Arc<Latch>),
    /// Close the connection with this token.
    Disconnect(u64),
    Wake,
    /// The pool is used up.
    Short,
    Stop(Instant),
}

/// Waits until every other holder has let go.
pub struct Latch {
    held: Mutex<()>,
    released: Condvar,
}

impl Latch {
    pub fn new() -> Latch {
        Latch {
            held: Mutex::new(()),
            released: Condvar::new(),
        }
    }

    pub fn wait_alone(self: &Arc<Self>) {
        let mut held = self.held.lock().unwrap();
        while Arc::strong_count(self) > 1 {
            held = self
                .released
                .wait_timeout(held, Duration::from_millis(1))
                .unwrap()
                .0;
        }
    }
}

#[derive(Default)]
struct Letters {
    messages: Vec<Message>,
    /// Whether a worker runs that will take them.
    open: bool,
}

/// What other threads have for a worker.
pub struct Inbox {
    letters: Mutex<Letters>,
    event: OwnedFd,
    connections: AtomicUsize,
    /// The server is stopping, and the worker still has requests that were accepted before.
    finishing: AtomicBool,
}

impl Inbox {
    pub fn new() -> Result<Arc<Inbox>, Errno> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Inbox {
            letters: Mutex::default(),
            event,
            connections: AtomicUsize::new(0),
            finishing: AtomicBool::new(false),
        }))
    }

    pub fn send(&self, message: Message) {
        let mut letters = self.letters.lock().unwrap();
        if !letters.open {
            return;
        }
        letters.messages.push(message);
        if letters.messages.len() == 1 {
            rustix::io::write(&self.event, &1u64.to_ne_bytes()).expect("an eventfd takes a one");
        }
    }

    pub fn wake(&self) {
        self.send(Message::Wake);
    }

    /// The worker is about to run. What was sent before was for nobody.
    pub fn open(&self) {
        self.letters.lock().unwrap().open = true;
    }

    /// The worker has ended.
    pub fn close(&self) {
        let mut letters = self.letters.lock().unwrap();
        letters.open = false;
        letters.messages.clear();
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Relaxed)
    }

    /// Whether a worker runs that takes what is sent.
    pub fn is_open(&self) -> bool {
        self.letters.lock().unwrap().open
    }

    /// The server stops: finish what was accepted until `deadline`.
    pub fn stop(&self, deadline: Instant) {
        self.finishing.store(true, Relaxed);
        self.send(Message::Stop(deadline));
    }

    /// Whether a worker runs that has not yet finished what was accepted before the server began to stop.
    fn is_finishing(&self) -> bool {
        self.finishing.load(Relaxed) && self.is_open()
    }

    fn take(&self) -> Vec<Message> {
        let mut letters = self.letters.lock().unwrap();
        if letters.messages.is_empty() {
            return Vec::new();
        }
        // The counter only wakes: that it was read already is no error.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        std::mem::take(&mut letters.messages)
    }
}

/// A connection that a worker has, or is about to get, counts as its own for as long as this lives.
pub struct Adopted(Arc<Inbox>, Arc<Admitted>);

impl Adopted {
    pub fn by(inbox: &Arc<Inbox>, admitted: Admitted) -> Adopted {
        inbox.connections.fetch_add(1, Relaxed);
        Adopted(inbox.clone(), Arc::new(admitted))
    }

    pub fn admitted(&self) -> &Arc<Admitted> {
        &self.1
    }
}

impl Drop for Adopted {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Relaxed);
    }
}

/// A connection that Python has been told of, and will be told of again when it is closed, however that comes about.
pub struct Announced {
    engine: Arc<Engine>,
    inbox: Arc<Inbox>,
    token: u64,
    adopted: Adopted,
}

impl Announced {
    /// What makes it count among all connections.
    pub fn admitted(&self) -> Arc<Admitted> {
        self.adopted.admitted().clone()
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        self.engine.handshakes.push(Event {
            connection: self.token,
            inbox: self.inbox.clone(),
            said: Said::Closed {
                _admitted: self.admitted(),
            },
        });
    }
}

pub struct Worker {
    engine: Arc<Engine>,
    index: usize,
    inbox: Arc<Inbox>,
    epoll: OwnedFd,
    ring: Option<Ring>,
    connections: Vec<Option<Box<Connection>>>,
    free: Vec<usize>,
    used: u64,
    open: usize,
    /// Connections that have something to send or to resume when the batch is over.
    dirty: Vec<u64>,
    stalled: Vec<u64>,
    /// Connections that have taken in more than has been looked at: their sockets will not tell.
    again: Vec<u64>,
    scratch: Vec<u8>,
    head: Vec<u8>,
    /// Until when what was accepted is finished; everything else is refused.
    stopping: Option<Instant>,
    /// All workers have finished: connections end.
    ending: bool,
    limits: Limits,
    /// When this round of the loop began, and when deadlines were last looked at.
    now: Instant,
    ticked: Instant,
    /// The pool is, or has just been, used up.
    short: bool,
    /// Requests that wait for their meters, in the order in which they came.
    delayed: VecDeque<(Waiting, Request)>,
}

/// What a delayed request waits for.
#[derive(Clone, Copy)]
struct Waiting {
    due: Instant,
    meters: u32,
}

/// What became of a request that a worker began.
enum Began {
    Answered(Reply),
    /// Its reply comes by the inbox, or from the ring.
    Later,
}

impl Worker {
    pub fn new(engine: Arc<Engine>, index: usize, ring: Option<Ring>) -> std::io::Result<Worker> {
        let inbox = engine.inboxes[index].clone();
        let limits = *engine.limits.lock().unwrap();
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(
            &epoll,
            &inbox.event,
            EventData::new_u64(INBOX),
            EventFlags::IN,
        )?;
        if let Some(ring) = &ring {
            epoll::add(
                &epoll,
                ring.as_fd(),
                EventData::new_u64(RING),
                EventFlags::IN,
            )?;
        }
        Ok(Worker {
            engine,
            index,
            inbox,
            epoll,
            ring,
            connections: Vec::new(),
            free: Vec::new(),
            used: 0,
            open: 0,
            dirty: Vec::new(),
            stalled: Vec::new(),
            again: Vec::new(),
            scratch: vec![0; RECEIVE],
            head: Vec::new(),
            stopping: None,
            ending: false,
            limits,
            now: Instant::now(),
            ticked: Instant::now(),
            short: false,
            delayed: VecDeque::new(),
        })
    }

    pub fn run(mut self) {
        ignore_broken_pipes();
        let mut events = Vec::with_capacity(64);
        while !self.finished() {
            events.clear();
            let tick = Timespec::try_from(self.pause()).expect("less than a second");
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                Some(&tick),
            ) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => panic!("epoll_wait: {errno}"),
            }
            self.now = Instant::now();
            for event in &events {
                match event.data.u64() {
                    INBOX | RING => {}
                    token => self.ready(token, event.flags),
                }
            }
            for token in std::mem::take(&mut self.again) {
                self.ready(token, EventFlags::IN);
            }
            self.take_messages();
            self.resume_delayed();
            self.reap();
            self.tidy();
            self.tick();
            self.wind_down();
        }
    }

    fn finished(&self) -> bool {
        let Some(deadline) = self.stopping else {
            return false;
        };
        let busy = self.open > 0 || self.ring.as_ref().is_some_and(|ring| !ring.is_idle());
        !busy || Instant::now() >= deadline && self.ring.as_ref().is_none_or(Ring::is_idle)
    }

    // -- connections -----------------------------------------------------------------------------------------

    fn connect(&mut self, socket: OwnedFd, peer: Peer, listener: Option<u32>, adopted: Adopted) {
        if self.stopping.is_some() {
            return;
        }
        let place = self.free.pop().unwrap_or_else(|| {
            self.connections.push(None);
            self.connections.len() - 1
        });
        self.used += 1;
        let token = self.used << PLACE_BITS | place as u64;
        let transport = Transport::new(socket);
        let (data, nothing) = (EventData::new_u64(token), EventFlags::empty());
        if epoll::add(&self.epoll, &transport.socket, data, nothing).is_err() {
            self.free.push(place);
            return;
        }
        let client = Client::new(peer, listener, self.inbox.clone(), token);
        self.tell(token, Said::Open(client.clone()));
        let connection = Connection {
            transport,
            token,
            client,
            announced: Announced {
                engine: self.engine.clone(),
                inbox: self.inbox.clone(),
                token,
                adopted,
            },
            phase: Phase::Deciding,
            deadline: self.now + self.limits.handshake,
            active: self.now,
            left: TURN,
            waits_turn: false,
            input: Vec::new(),
            skip: 0,
            payload: None,
            bulk: false,
            split: None,
            ticket: None,
            parked: None,
            stalled: false,
            deaf: false,
            closing: false,
            outgoing: Outgoing::default(),
            requests: 0,
            weight: 0,
            interest: EventFlags::empty(),
            dirty: false,
            progress: (0, 0),
        };
        self.open += 1;
        self.put_back(Box::new(connection));
    }

    /// Take a connection out of its place, to work on it. None: it has gone.
    fn take_out(&mut self, token: u64) -> Option<Box<Connection>> {
        let place = (token & ((1 << PLACE_BITS) - 1)) as usize;
        let slot = self.connections.get_mut(place)?;
        if slot.as_ref()?.token == token {
            slot.take()
        } else {
            None
        }
    }

    fn put_back(&mut self, mut connection: Box<Connection>) {
        if !connection.dirty {
            connection.dirty = true;
            self.dirty.push(connection.token);
        }
        let place = (connection.token & ((1 << PLACE_BITS) - 1)) as usize;
        self.connections[place] = Some(connection);
    }

    fn close(&mut self, mut connection: Box<Connection>) {
        connection.transport.close();
        self.free
            .push((connection.token & ((1 << PLACE_BITS) - 1)) as usize);
        self.open -= 1;
    }

    fn tell(&self, connection: u64, said: Said) {
        self.engine.handshakes.push(Event {
            connection,
            inbox: self.inbox.clone(),
            said,
        });
    }

    fn ready(&mut self, token: u64, flags: EventFlags) {
        let Some(mut connection) = self.take_out(token) else {
            return;
        };
        if flags.intersects(EventFlags::ERR | EventFlags::HUP) {
            self.hear_out(&mut connection);
            return self.close(connection);
        }
        connection.left = TURN;
        if std::mem::take(&mut connection.waits_turn) && self.resume(&mut connection).is_err() {
            return self.close(connection);
        }
        let readable = flags.contains(EventFlags::IN) && connection.is_listening();
        if readable && self.receive(&mut connection).is_err() {
            return self.close(connection);
        }
        self.put_back(connection)
    }

    /// Take in what has arrived and begin what is whole. Err: the connection is over.
    fn receive(&mut self, connection: &mut Connection) -> Result<(), ()> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let result = self.receive_into(connection, &mut scratch);
        self.scratch = scratch;
        result
    }

    fn receive_into(
        &mut self,
        connection: &mut Connection,
        scratch: &mut Vec<u8>,
    ) -> Result<(), ()> {
        if matches!(connection.phase, Phase::Tls) {
            return self.shake(connection);
        }
        for _ in 0..RECEIVES_MAX {
            if !connection.is_listening() {
                break;
            }
            let kept = connection.input.len();
            let room = if connection.bulk {
                RECEIVE_BULK
            } else {
                RECEIVE
            };
            if scratch.len() < kept + room {
                scratch.resize(kept + room, 0);
            }
            scratch[..kept].copy_from_slice(&connection.input);
            let (wanted, received) = connection.receive(&mut scratch[kept..kept + room]);
            let got = match received {
                Ok(0) => {
                    connection.deaf = true;
                    break;
                }
                Ok(got) => {
                    connection.active = self.now;
                    got
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => continue,
                Err(_) => return Err(()),
            };
            let beyond = connection.fill_payload(got);
            if let Some(payload) = connection.payload.take_if(|payload| payload.is_whole()) {
                self.begin(connection, payload.header, payload.vector, None);
            }
            connection.input = Vec::new(); // a connection that waits keeps no memory
            let total = kept + beyond;
            let consumed = self.parse(connection, &scratch[..total])?;
            connection
                .input
                .extend_from_slice(&scratch[consumed..total]);
            if got < wanted {
                break; // the socket is empty, and will say when it no longer is
            }
        }
        Ok(())
    }

    /// Parse what was kept, after whatever held it up has passed.
    fn resume(&mut self, connection: &mut Connection) -> Result<(), ()> {
        connection.stalled = false;
        if let Some((header, vector, named)) = connection.parked.take() {
            self.begin(connection, header, vector, named);
        }
        let input = std::mem::take(&mut connection.input);
        let consumed = self.parse(connection, &input)?;
        connection.input.extend_from_slice(&input[consumed..]);
        Ok(())
    }

    /// Begin everything in `data` that is whole; how many bytes that was. Err: the connection is over.
    fn parse(&mut self, connection: &mut Connection, data: &[u8]) -> Result<usize, ()> {
        let mut position = 0;
        loop {
            let rest = &data[position..];
            if connection.skip > 0 {
                let skipped = connection.skip.min(rest.len() as u64);
                connection.skip -= skipped;
                position += skipped as usize;
                if connection.skip > 0 {
                    return Ok(position);
                }
                continue;
            }
            let consumed = match &connection.phase {
                _ if connection.stalled || connection.closing => None,
                _ if connection.payload.is_some() => None,
                Phase::Deciding | Phase::StartTls(_) | Phase::Tls => None,
                Phase::Flags => self.parse_flags(connection, rest),
                Phase::Options => self.parse_option(connection, rest)?,
                Phase::Transmission(..) if connection.split.is_some() => {
                    self.parse_part(connection, rest)
                }
                Phase::Transmission(session, export) => {
                    let (session, export) = (session.clone(), export.clone());
                    self.parse_request(connection, &session, &export, rest)?
                }
            };
            match consumed {
                Some(count) => position += count,
                None => return Ok(position),
            }
            if connection.outgoing.is_worth_sending(SEND_SOON) {
                self.send(connection).map_err(|_| ())?;
            }
        }
    }

    // -- the handshake ---------------------------------------------------------------------------------------

    fn parse_flags(&mut self, connection: &mut Connection, data: &[u8]) -> Option<usize> {
        let flags = u32::from_be_bytes(data.get(..4)?.try_into().expect("four bytes"));
        connection.phase = Phase::Deciding;
        self.tell(connection.token, Said::Flags(flags));
        Some(4)
    }

    fn parse_option(
        &mut self,
        connection: &mut Connection,
        data: &[u8],
    ) -> Result<Option<usize>, ()> {
        let Some(header) = data.get(..OPTION_HEADER) else {
            return Ok(None);
        };
        let magic = u64::from_be_bytes(header[..8].try_into().expect("eight bytes"));
        let code = u32::from_be_bytes(header[8..12].try_into().expect("four bytes"));
        let length = u32::from_be_bytes(header[12..].try_into().expect("four bytes"));
        if magic != OPTION_MAGIC || length > OPTION_SKIP_MAX {
            return Err(());
        }
        if length > OPTION_MAX {
            connection.phase = Phase::Deciding;
            connection.skip = u64::from(length);
            self.tell(connection.token, Said::Oversized { code, length });
            return Ok(Some(OPTION_HEADER));
        }
        let end = OPTION_HEADER + length as usize;
        let Some(payload) = data.get(OPTION_HEADER..end) else {
            return Ok(None);
        };
        connection.phase = Phase::Deciding;
        self.tell(
            connection.token,
            Said::Option {
                code,
                data: payload.to_vec(),
            },
        );
        Ok(Some(end))
    }

    /// Go on with TLS's own handshake.
    fn shake(&mut self, connection: &mut Connection) -> Result<(), ()> {
        match connection.transport.shake() {
            Ok(Progress::Waiting) => Ok(()),
            Ok(Progress::Done(peer)) => {
                connection.phase = Phase::Deciding;
                self.tell(connection.token, Said::Secured(peer));
                Ok(())
            }
            Ok(Progress::Failed(why)) => {
                self.tell(connection.token, Said::Insecure(why));
                Err(())
            }
            Err(errno) => {
                self.tell(connection.token, Said::Insecure(errno.to_string()));
                Err(())
            }
        }
    }

    fn act(&mut self, token: u64, action: Action) {
        let Some(mut connection) = self.take_out(token) else {
            return;
        };
        match action {
            Action::Greet => {
                connection.outgoing.bytes(GREETING.to_vec());
                connection.phase = Phase::Flags;
            }
            Action::Next { data } => {
                connection.outgoing.bytes(data);
                connection.phase = Phase::Options;
            }
            Action::StartTls { data, context } => {
                if !connection.input.is_empty() {
                    // Whoever wrote that may not be who will speak TLS.
                    let why = "something was sent in plain text after STARTTLS".to_owned();
                    self.tell(token, Said::Insecure(why));
                    return self.close(connection);
                }
                connection.outgoing.bytes(data);
                connection.phase = Phase::StartTls(context);
            }
            Action::Begin {
                data,
                export,
                style,
                contexts,
                payload_max,
                block_min,
            } => {
                connection.outgoing.bytes(data);
                let inbox = self.inbox.clone();
                let session = Session {
                    inbox,
                    connection: token,
                    _admitted: connection.announced.admitted(),
                    style,
                    payload_max,
                    block_min,
                    plain: connection.transport.is_plain(),
                    contexts,
                };
                connection.phase = Phase::Transmission(Arc::new(session), export);
            }
            Action::End { data } => {
                connection.outgoing.bytes(data);
                connection.closing = true;
            }
        }
        connection.closing |= self.ending;
        match self.resume(&mut connection) {
            Ok(()) => self.put_back(connection),
            Err(()) => self.close(connection),
        }
    }

    // -- the transmission phase ------------------------------------------------------------------------------

    fn parse_request(
        &mut self,
        connection: &mut Connection,
        session: &Arc<Session>,
        export: &crate::export::Export,
        data: &[u8],
    ) -> Result<Option<usize>, ()> {
        let mut size = session.style.request_size();
        if data.len() < size {
            return Ok(None);
        }
        // There was room when it began to wait for memory. To wait for room again would be to sit on that memory.
        if let Some((header, ticket)) = connection.ticket.take() {
            let vector = self.claim(connection, header, ticket);
            return Ok(vector.map(|vector| {
                size + self.take_request(connection, header, vector, None, &data[size..])
            }));
        }
        if !self.has_room(connection) {
            connection.stalled = true;
            return Ok(None);
        }
        if connection.left == 0 {
            connection.stalled = true;
            connection.waits_turn = true;
            self.again.push(connection.token);
            return Ok(None);
        }
        let mut header = wire::parse_request(data, session.style)
            .map_err(|_| ())?
            .expect("a whole request");
        let mut named = None;
        if wire::names_contexts(&header) {
            let Some(payload) = data.get(size..size + header.payload as usize) else {
                return Ok(None);
            };
            // What cannot be used stays a payload, and is refused as such.
            if let Some((length, ids)) = wire::parse_named_contexts(payload, &session.contexts) {
                size += payload.len();
                (header.length, header.payload) = (length, 0);
                named = Some(ids);
            }
        }
        let rules = Rules {
            size: export.size(),
            read_only: export.read_only,
            payload_max: session.payload_max,
            block_min: session.block_min,
            style: session.style,
            block_status: !session.contexts.is_empty(),
            stopping: self.stopping.is_some(),
        };
        match wire::judge(&header, &rules) {
            Verdict::Fatal(_) => return Err(()),
            Verdict::Error(error, why) => {
                self.refuse(connection, session, &header, error, why);
                return Ok(Some(size));
            }
            Verdict::ErrorDrain(error, why) => {
                self.refuse(connection, session, &header, error, why);
                connection.skip = header.payload;
                return Ok(Some(size));
            }
            Verdict::Run => {}
        }
        if header.command == command::DISC {
            connection.deaf = true;
            return Ok(None);
        }
        let memory = match header.command {
            command::READ | command::WRITE => header.length as usize,
            _ => 0,
        };
        if memory == 0 {
            let taken = self.take_request(connection, header, Vector::default(), named, &[]);
            return Ok(Some(size + taken));
        }
        let pool = &self.engine.pool;
        if memory > pool.whole_max() && takes_parts(&header, session.style) {
            connection.split = Some(Split::new(header, pool.part_length()));
            return Ok(Some(size));
        }
        let vector = self.allocate(connection, header);
        Ok(vector.map(|vector| {
            size + self.take_request(connection, header, vector, None, &data[size..])
        }))
    }

    /// Go on with a request that is carried out in parts; `data` is payload, if there is any.
    fn parse_part(&mut self, connection: &mut Connection, data: &[u8]) -> Option<usize> {
        let split = connection.split.as_ref()?;
        let waits_for_room = connection.ticket.is_none() && !self.has_room(connection);
        if split.is_running() || waits_for_room {
            connection.stalled = true;
            return None;
        }
        let header = split.next();
        let vector = match connection.ticket.take() {
            Some((_, ticket)) => self.claim(connection, header, ticket),
            None => self.allocate(connection, header),
        }?;
        connection.split.as_mut()?.begin();
        Some(self.take_request(connection, header, vector, None, data))
    }

    /// Memory for a request; None: it waits for it, with a ticket.
    fn allocate(&mut self, connection: &mut Connection, header: Header) -> Option<Vector> {
        let memory = header.length as usize;
        if let Some(slots) = self.engine.pool.allocate(memory) {
            return Some(Vector::new(slots));
        }
        let inbox = self.inbox.clone();
        let waker = Arc::new(move || inbox.wake());
        connection.ticket = Some((header, self.engine.pool.enqueue(memory, waker)));
        self.engine
            .inboxes
            .iter()
            .for_each(|inbox| inbox.send(Message::Short));
        self.stall(connection);
        None
    }

    /// The memory that a request has been waiting for; None: it still is.
    fn claim(
        &mut self,
        connection: &mut Connection,
        header: Header,
        ticket: Ticket,
    ) -> Option<Vector> {
        let slots = self.engine.pool.claim(&ticket);
        if slots.is_none() {
            connection.ticket = Some((header, ticket));
            self.stall(connection);
        }
        slots.map(Vector::new)
    }

    /// A request that has its memory: take what `data` has of its payload, and begin it when it is whole. Returns how
    /// much of `data` that was.
    fn take_request(
        &mut self,
        connection: &mut Connection,
        header: Header,
        vector: Vector,
        named: Option<Vec<u32>>,
        data: &[u8],
    ) -> usize {
        connection.requests += 1;
        connection.weight += vector.len();
        let cost = 1 + vector.len() / TURN_BYTES;
        connection.left = connection.left.saturating_sub(cost as u32);
        if let Phase::Transmission(session, _) = &connection.phase {
            connection.weight += status_length(&header, session, named.as_deref());
        }
        connection.bulk = header.command == command::WRITE && vector.len() >= BULK;
        if header.command != command::WRITE {
            self.begin(connection, header, vector, named);
            return 0;
        }
        let here = &data[..data.len().min(vector.len())];
        vector.fill(0, here);
        if here.len() == vector.len() {
            self.begin(connection, header, vector, None);
        } else {
            connection.payload = Some(Payload {
                header,
                vector,
                filled: here.len(),
            });
        }
        here.len()
    }

    fn refuse(
        &mut self,
        connection: &mut Connection,
        session: &Session,
        header: &Header,
        error: u32,
        why: &str,
    ) {
        connection.left = connection.left.saturating_sub(1);
        let reply = Reply {
            connection: connection.token,
            cookie: header.cookie,
            offset: header.offset,
            style: session.style,
            whole: false,
            part: None,
            weight: 0,
            held: Some(self.engine.holding.hold(why.len())),
            result: Err(Failure {
                errno: error as i32,
                message: why.to_owned(),
            }),
        };
        if self.stopping.is_some() {
            // Not counted among the requests: whoever goes on asking does not hold up the end.
            connection.outgoing.message(reply, &mut self.head);
        } else {
            connection.requests += 1;
            connection.reply(reply, &mut self.head);
        }
    }

    /// Whether another request may begin.
    fn has_room(&self, connection: &Connection) -> bool {
        let memory_max = self
            .limits
            .memory
            .min(self.engine.pool.size() / WEIGHT_PART);
        connection.outgoing.len() < OUTGOING_MAX
            && (connection.requests == 0
                || connection.requests < self.limits.requests
                    && connection.weight < memory_max
                    && self.engine.holding.bytes() < self.limits.replies)
    }

    fn stall(&mut self, connection: &mut Connection) {
        connection.stalled = true;
        self.stalled.push(connection.token);
    }

    /// Run a request as far as it goes without waiting.
    fn begin(
        &mut self,
        connection: &mut Connection,
        mut header: Header,
        vector: Vector,
        named: Option<Vec<u32>>,
    ) {
        let Phase::Transmission(session, export) = &connection.phase else {
            unreachable!("a request outside the transmission phase");
        };
        let Some(running) = export.enter() else {
            let opened = !export.park(&self.inbox);
            connection.parked = Some((header, vector, named));
            self.stall(connection);
            if opened {
                self.inbox.wake();
            }
            return;
        };
        // From here on the export's size stays what it is, and whether its writes go through.
        if export.writethrough.load(Relaxed) {
            header.flags |= wire::flag::FUA;
        }
        let past_end = wire::past_end(&header, export.size());
        let held = vector.is_empty().then(|| {
            let reply = status_length(&header, session, named.as_deref());
            self.engine.holding.hold(reply)
        });
        let request = Request {
            header,
            export: export.clone(),
            vector,
            session: session.clone(),
            named,
            holes: Vec::new(),
            part: connection.split.as_ref().map(Split::part),
            charged: 0,
            held,
            _running: running,
        };
        if let Some((errno, why)) = past_end {
            // It was within the disk when it came, and has waited since.
            let failure = Failure {
                errno: errno as i32,
                message: why.to_owned(),
            };
            connection.reply(request.reply(Err(failure)), &mut self.head);
            return;
        }
        count_request(&request);
        let is_first = request.part.is_none_or(|part| part.first);
        connection.client.began(&request.header, is_first);
        if let Began::Answered(reply) = self.start(request) {
            connection.reply(reply, &mut self.head);
        }
    }

    fn start(&mut self, request: Request) -> Began {
        match request.header.command {
            command::READ => self.read(request),
            command::WRITE => self.write(request),
            _ => self.fault(request),
        }
    }

    fn fault(&self, request: Request) -> Began {
        self.engine.faults.push(&self.engine, request);
        Began::Later
    }

    fn read(&mut self, mut request: Request) -> Began {
        let Header { offset, length, .. } = request.header;
        let mut places = Vec::new();
        let users = &self.engine.users;
        let covered = request
            .export
            .readable(users, self.index, (offset, length), &mut places);
        if covered < length || self.has_code(&places) {
            drop(places);
            return self.fault(request);
        }
        if let Err(due) = self.charge(&mut request, &places, false) {
            drop(places);
            return self.delay(request, due);
        }
        count(&request.export.counters.hits, 1);
        crate::points::reached("worker.read");
        let mut transfers = Vec::new();
        if let Err(errno) = plan(&mut request, &self.engine, 0, places, &mut transfers) {
            return Began::Answered(request.reply(Err(errno.into())));
        }
        if let Some(cached) = from_cache(&request, &transfers) {
            drop(transfers);
            return Began::Answered(request.reply_cached(cached));
        }
        for index in 0..transfers.len() {
            match transfers[index].read_nowait(&request) {
                Ok(true) => {}
                Ok(false) => {
                    if let Err(errno) = finish_read(&request, &transfers[..index]) {
                        return Began::Answered(request.reply(Err(errno.into())));
                    }
                    transfers.drain(..index);
                    return self.offload(request, transfers);
                }
                Err(errno) => {
                    drop(transfers);
                    return Began::Answered(request.reply(Err(errno.into())));
                }
            }
        }
        let result = finish_read(&request, &transfers);
        drop(transfers);
        Began::Answered(match result {
            Ok(()) => request.reply_read(),
            Err(errno) => request.reply(Err(errno.into())),
        })
    }

    fn write(&mut self, mut request: Request) -> Began {
        let Header {
            offset,
            length,
            flags,
            ..
        } = request.header;
        if flags & wire::flag::FUA != 0 {
            return self.fault(request);
        }
        let mut places = Vec::new();
        let users = &self.engine.users;
        let covered = request
            .export
            .writable(users, self.index, (offset, length), &mut places);
        if covered < length || self.has_code(&places) {
            drop(places);
            return self.fault(request);
        }
        if let Err(due) = self.charge(&mut request, &places, true) {
            drop(places);
            return self.delay(request, due);
        }
        count(&request.export.counters.hits, 1);
        crate::points::reached("worker.write");
        let mut transfers = Vec::new();
        if let Err(errno) = plan(&mut request, &self.engine, 0, places, &mut transfers) {
            return Began::Answered(request.reply(Err(errno.into())));
        }
        if transfers
            .iter()
            .any(|transfer| transfer.file.writes_slowly())
        {
            return self.offload(request, transfers);
        }
        let result = run_all(&request, &transfers, true);
        drop(transfers);
        Began::Answered(request.reply(result.map(|()| Body::None).map_err(Into::into)))
    }

    /// What would block: to the ring, or to a thread.
    fn offload(&mut self, request: Request, mut transfers: Vec<Transfer>) -> Began {
        let write = request.header.command == command::WRITE;
        let ring = self.ring.as_mut().filter(|_| {
            let mut takes = |transfer: &mut Transfer| {
                transfer.file.takes_ring() && transfer.takes_ring(&request, write)
            };
            transfers.iter_mut().all(&mut takes)
        });
        let Some(ring) = ring else {
            transfers.iter_mut().for_each(Transfer::leave_ring);
            self.engine.threads.submit(request, transfers);
            return Began::Later;
        };
        if write && let Err(errno) = prepare_write(&request, &transfers) {
            return Began::Answered(request.reply(Err(errno.into())));
        }
        ring.start(request, transfers);
        Began::Later
    }

    fn has_code(&self, places: &[Place]) -> bool {
        let mut start = 0;
        places.iter().any(|place| {
            let code = is_code(&self.engine, &place.piece, start);
            start += place.piece.length as usize;
            code
        })
    }

    // -- meters ----------------------------------------------------------------------------------------------

    /// Err: the request must wait until then. Whoever waits for the same meters goes first.
    fn charge(&self, request: &mut Request, places: &[Place], write: bool) -> Result<(), Waiting> {
        let pieces = || places.iter().map(|place| &place.piece);
        let Some(meters) = pieces()
            .map(|piece| piece.through.meters)
            .find(|set| *set != 0)
        else {
            return Ok(());
        };
        if request.export.is_draining() {
            return Ok(()); // a throttle lets go
        }
        if let Some(last) = self
            .delayed
            .iter()
            .rev()
            .find(|other| other.0.meters == meters)
        {
            return Err(Waiting {
                due: last.0.due,
                meters,
            });
        }
        charge(&self.engine, pieces(), write, &mut request.charged).map_err(|wait| Waiting {
            due: Instant::now() + wait,
            meters,
        })
    }

    fn delay(&mut self, request: Request, waiting: Waiting) -> Began {
        self.delayed.push_back((waiting, request));
        Began::Later
    }

    /// Go on with the requests whose time has come, in the order in which they came.
    fn resume_delayed(&mut self) {
        let now = Instant::now();
        for (waiting, request) in std::mem::take(&mut self.delayed) {
            if waiting.due > now && !request.export.is_draining() {
                self.delayed.push_back((waiting, request));
            } else if let Began::Answered(reply) = self.start(request) {
                self.answer(reply);
            }
        }
    }

    // -- everything else -------------------------------------------------------------------------------------

    fn take_messages(&mut self) {
        for message in self.inbox.take() {
            match message {
                Message::Connect {
                    socket,
                    peer,
                    listener,
                    adopted,
                } => self.connect(socket, peer, listener, adopted),
                Message::Limits(limits) => self.limits = limits,
                Message::Reply(reply) => self.answer(reply),
                Message::Action(token, action) => self.act(token, action),
                Message::Forget(file, latch) => {
                    if let Some(ring) = &mut self.ring {
                        ring.forget(file);
                    }
                    drop(latch);
                }
                Message::Disconnect(token) => {
                    if let Some(connection) = self.take_out(token) {
                        self.close(connection);
                    }
                }
                Message::Wake => self.wake(),
                Message::Short => self.short = true,
                Message::Stop(deadline) => self.stop(deadline),
            }
        }
    }

    fn answer(&mut self, reply: Reply) {
        if let Some(mut connection) = self.take_out(reply.connection) {
            connection.reply(reply, &mut self.head);
            connection.active = self.now;
            self.put_back(connection);
        }
    }

    fn wake(&mut self) {
        for token in std::mem::take(&mut self.stalled) {
            let Some(mut connection) = self.take_out(token) else {
                continue;
            };
            connection.left = TURN;
            match self.resume(&mut connection) {
                Ok(()) => self.put_back(connection),
                Err(()) => self.close(connection),
            }
        }
    }

    fn reap(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        let mut replies = Vec::new();
        ring.reap(&mut replies)
            .expect("io_uring_enter on a ring of ours");
        ring.submit().expect("io_uring_enter on a ring of ours");
        for reply in replies {
            self.answer(reply);
        }
    }

    /// Send what the batch has produced, resume who was waiting for that, and see to what epoll is asked.
    fn tidy(&mut self) {
        while let Some(token) = self.dirty.pop() {
            let Some(mut connection) = self.take_out(token) else {
                continue;
            };
            connection.dirty = false;
            match self.tidy_one(&mut connection) {
                Ok(true) => {
                    let place = (token & ((1 << PLACE_BITS) - 1)) as usize;
                    self.connections[place] = Some(connection);
                }
                Ok(false) | Err(()) => self.close(connection),
            }
        }
        // Resuming may have queued operations.
        if let Some(ring) = &mut self.ring {
            ring.submit().expect("io_uring_enter on a ring of ours");
        }
    }

    /// Send as much as the socket takes.
    fn send(&self, connection: &mut Connection) -> Result<Sent, Errno> {
        let before = connection.outgoing.total();
        let sent = connection.send();
        if connection.outgoing.total() > before {
            connection.active = self.now;
        }
        sent
    }

    /// False or Err: the connection is over.
    fn tidy_one(&mut self, connection: &mut Connection) -> Result<bool, ()> {
        let waits_for_room = |connection: &Connection| {
            connection.stalled
                && !connection.waits_turn
                && connection.ticket.is_none()
                && connection.parked.is_none()
                && !connection.awaits_part()
        };
        loop {
            let sent = self.send(connection);
            let room = self.has_room(connection);
            match sent {
                Err(_) => {
                    self.hear_out(connection);
                    return Ok(false);
                }
                Ok(_) if waits_for_room(connection) && room => self.resume(connection)?,
                Ok(Sent::All | Sent::Blocked) => break,
            }
        }
        if connection.deaf && !connection.stalled {
            connection.drop_payload();
        }
        let silent = connection.is_silent();
        if silent && let Phase::StartTls(context) = &connection.phase {
            connection.transport.start(context).map_err(|_| ())?;
            connection.phase = Phase::Tls;
        }
        if connection.closing && silent {
            return Ok(false);
        }
        let working = connection.requests > 0
            || connection.stalled
            || matches!(connection.phase, Phase::Deciding);
        if connection.deaf && silent && !working {
            return Ok(false);
        }
        self.ask(connection)
    }

    /// Begin everything that a client has sent who takes no replies any more: it may have relied on being heard. Nobody is
    /// there to be told if that fails.
    fn hear_out(&mut self, connection: &mut Connection) {
        if !matches!(connection.phase, Phase::Transmission(..)) {
            return;
        }
        // From now on a socket that is empty has come to its end.
        match shutdown(&connection.transport.socket, Shutdown::Read) {
            Ok(()) | Err(Errno::NOTCONN) => {}
            Err(_) => return,
        }
        connection.left = u32::MAX;
        if std::mem::take(&mut connection.waits_turn) && self.resume(connection).is_err() {
            return;
        }
        for _ in 0..HEARD_OUT_MAX {
            if !connection.is_listening() || self.receive(connection).is_err() {
                return;
            }
        }
    }

    fn ask(&mut self, connection: &mut Connection) -> Result<bool, ()> {
        let listening = connection.is_listening();
        if listening && connection.transport.has_input() {
            self.again.push(connection.token);
        }
        let mut interest = EventFlags::empty();
        interest.set(EventFlags::IN, listening);
        interest.set(EventFlags::OUT, !connection.is_silent());
        if interest != connection.interest {
            let data = EventData::new_u64(connection.token);
            epoll::modify(&self.epoll, &connection.transport.socket, data, interest)
                .map_err(|_| ())?;
            connection.interest = interest;
        }
        Ok(true)
    }

    fn tick_length(&self) -> Duration {
        if self.short || self.stopping.is_some() {
            TICK_SHORT
        } else {
            TICK
        }
    }

    /// How long there is nothing to do but what epoll tells.
    fn pause(&self) -> Duration {
        if !self.again.is_empty() {
            return Duration::ZERO;
        }
        // Not longer than TICK_SHORT while requests are delayed: a drained section lets them go.
        let due = self.delayed.iter().map(|(waiting, _)| waiting.due).min();
        due.map_or(self.tick_length(), |due| {
            due.saturating_duration_since(Instant::now())
                .min(TICK_SHORT)
        })
    }

    /// Look at deadlines, and at who holds memory that others wait for.
    fn tick(&mut self) {
        let now = self.now;
        if now - self.ticked < self.tick_length() {
            return;
        }
        self.ticked = now;
        self.short = self.engine.pool.is_short();
        if self.short {
            self.spill_stuck();
        }
        let is_over = self.engine.holding.bytes() >= self.limits.replies;
        for place in 0..self.connections.len() {
            let ends = self.connections[place]
                .as_ref()
                .is_some_and(|connection| self.is_over(connection, is_over));
            if ends {
                let connection = self.connections[place].take().expect("the one looked at");
                self.close(connection);
            }
        }
    }

    /// Whether the time of a connection is up. `short`: others wait for memory that replies hold.
    fn is_over(&self, connection: &Connection, short: bool) -> bool {
        if !matches!(connection.phase, Phase::Transmission(..)) {
            return connection.deadline <= self.now;
        }
        let idles = |limit| connection.is_idle(self.now, limit);
        self.limits.idle.is_some_and(idles)
            || short && !connection.outgoing.is_empty() && idles(UNREAD_MAX)
    }

    /// Take back memory of the pool from clients that do not go on reading or sending; who holds too much goes.
    fn spill_stuck(&mut self) {
        for place in 0..self.connections.len() {
            let Some(mut connection) = self.connections[place].take() else {
                continue;
            };
            let (pool, spilled) = (&self.engine.pool, &self.engine.spilled);
            if connection.is_stuck() && !connection.spill(pool, spilled, SPILL_MAX) {
                self.close(connection);
            } else {
                self.connections[place] = Some(connection);
            }
        }
    }

    /// What was accepted is finished and answered. What still comes is refused, for as long as any worker has such work:
    /// proto.md, "Terminating the transmission phase" and "Termination of the session during option haggling".
    fn stop(&mut self, deadline: Instant) {
        self.stopping = Some(deadline);
    }

    /// Once everything has been finished, here and by the other workers, let all connections end.
    fn wind_down(&mut self) {
        if self.stopping.is_none() || self.ending {
            return;
        }
        let mut connections = self.connections.iter().flatten();
        let finishing = connections.any(|connection| connection.has_accepted());
        if self.inbox.finishing.swap(finishing, Relaxed) && !finishing {
            self.engine.inboxes.iter().for_each(|inbox| inbox.wake());
        }
        if self.engine.inboxes.iter().any(|inbox| inbox.is_finishing()) {
            return;
        }
        self.ending = true;
        for place in 0..self.connections.len() {
            let Some(mut connection) = self.connections[place].take() else {
                continue;
            };
            // An option that Python is about to answer still is, and then the connection ends.
            connection.closing |= !matches!(connection.phase, Phase::Deciding);
            connection.drop_payload();
            self.put_back(connection);
        }
        self.tidy();
    }
}

/// Have no signal end the process because a client has gone while the kernel sent it a file: the call says so as well.
fn ignore_broken_pipes() {
    // SAFETY: the set is a value of ours, emptied before it is used; blocking a signal for this thread touches no memory.
    unsafe {
        let mut signals = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        libc::sigaddset(&raw mut signals, libc::SIGPIPE);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut());
    }
}

/// What a read can be answered with straight from the page cache: if all of it is there, in one place that stays its own,
/// and nothing on the way looks at it.
fn from_cache(request: &Request, transfers: &[Transfer]) -> Option<Cached> {
    let length = request.vector.len();
    let may = request.session.plain && request.export.in_place.load(Relaxed);
    match transfers {
        [transfer] if may && length >= SENDFILE_MIN => transfer.cached(length),
        _ => None,
    }
}

fn count_request(request: &Request) {
    let counters = &request.export.counters;
    let (requests, bytes) = match request.header.command {
        command::READ => (&counters.reads, &counters.bytes_read),
        command::WRITE => (&counters.writes, &counters.bytes_written),
        _ => return,
    };
    let is_first = request.part.is_none_or(|part| part.first);
    count(requests, u64::from(is_first));
    count(bytes, request.header.length);
}
