//! The NBD transmission phase on the wire: parsing, judging and encoding, with no socket in sight.
//!
//! ```text
//! request            magic 4 | flags 2 | command 2 | cookie 8 | offset 8 | length 4 | WRITE: payload
//! extended request   magic 4 | flags 2 | command 2 | cookie 8 | offset 8 | length 8 | PAYLOAD_LEN: payload
//! simple reply       magic 4 | error 4 | cookie 8 | READ without error: payload
//! chunk              magic 4 | flags 2 | kind 2 | cookie 8 | length 4 | payload of `length` bytes
//! extended chunk     magic 4 | flags 2 | kind 2 | cookie 8 | offset 8 | length 8 | payload of `length` bytes
//! ```
//!
//! Specification: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>, "Transmission
//! phase", and the same document on the branch `extension-ext-header`. Everything is big-endian.

/// The size of a request without its payload: compact, and with extended headers.
pub const REQUEST_SIZE: usize = 28;
pub const EXTENDED_REQUEST_SIZE: usize = 32;

/// The longest error message: proto.md, "Conventions", on strings.
pub const MESSAGE_MAX: usize = 4096;

/// The longest payload that any session may allow, of either direction.
pub const PAYLOAD_MAX: u32 = 64 << 20;

/// A WRITE's payload up to this length is read and thrown away if the request is refused; to send a
/// longer one is an attack, and ends the connection. proto.md, "Size constraints": 2^25 bytes are
/// never to be taken for one.
pub const DRAIN_MAX: u64 = 1 << 25;

/// The longest extent of a status chunk in its compact form: what 32 bits hold, a multiple of every block size.
const EXTENT_MAX: u64 = (1 << 32) - (1 << 16);

/// Meta contexts that a BLOCK_STATUS may name in its payload: more than an export has.
const NAMED_CONTEXTS_MAX: u64 = 1 << 10;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;

/// How client and server talk in the transmission phase, by what was negotiated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Style {
    Simple,
    /// Structured replies.
    Structured,
    /// Extended headers, both ways.
    Extended,
}

impl Style {
    /// Whether replies are chunks.
    pub fn chunks(self) -> bool {
        self != Style::Simple
    }

    /// The size of a request without its payload.
    pub fn request_size(self) -> usize {
        if self == Style::Extended {
            EXTENDED_REQUEST_SIZE
        } else {
            REQUEST_SIZE
        }
    }
}

/// `NBD_CMD_*`: proto.md, "Request types".
pub mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// `NBD_CMD_FLAG_*`: proto.md, "Command flags".
pub mod flag {
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// `NBD_REPLY_TYPE_*` and `NBD_REPLY_FLAG_DONE`: proto.md, "Structured reply types".
pub mod chunk {
    pub const FLAG_DONE: u16 = 1 << 0;

    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR: u16 = (1 << 15) + 1;
}

/// `NBD_E*`: proto.md, "Error values".
pub mod error {
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const ENOMEM: u32 = 12;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
    pub const EOVERFLOW: u32 = 75;
    pub const ENOTSUP: u32 = 95;
    pub const ESHUTDOWN: u32 = 108;
}

/// A request as it came, not judged yet. Offset and length are bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    /// How much of the export it is about.
    pub length: u64,
    /// How many bytes follow it.
    pub payload: u64,
}

/// The peer has lost the thread: what it sent is no request, and nothing after it can be one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadMagic(pub u32);

/// Parse the request that `bytes` begin with; None: it is not whole yet. Whether it makes sense is for `judge` to say.
pub fn parse_request(bytes: &[u8], style: Style) -> Result<Option<Header>, BadMagic> {
    let Some(bytes) = bytes.get(..style.request_size()) else {
        return Ok(None);
    };
    let extended = style == Style::Extended;
    let magic = u32::from_be_bytes(field(bytes, 0));
    let wanted = if extended {
        EXTENDED_REQUEST_MAGIC
    } else {
        REQUEST_MAGIC
    };
    if magic != wanted {
        return Err(BadMagic(magic));
    }
    let flags = u16::from_be_bytes(field(bytes, 4));
    let command = u16::from_be_bytes(field(bytes, 6));
    let length = if extended {
        u64::from_be_bytes(field(bytes, 24))
    } else {
        u64::from(u32::from_be_bytes(field(bytes, 24)))
    };
    // QEMU's client writes without the flag that says so, and its server does not mind: nor do we.
    let has_payload = command == command::WRITE || extended && flags & flag::PAYLOAD_LEN != 0;
    Ok(Some(Header {
        flags,
        command,
        cookie: u64::from_be_bytes(field(bytes, 8)),
        offset: u64::from_be_bytes(field(bytes, 16)),
        length,
        payload: if has_payload { length } else { 0 },
    }))
}

fn field<const SIZE: usize>(bytes: &[u8], at: usize) -> [u8; SIZE] {
    std::array::from_fn(|index| bytes[at + index])
}

/// Whether the request asks for some of the negotiated meta contexts, which its payload names.
pub fn names_contexts(header: &Header) -> bool {
    header.command == command::BLOCK_STATUS
        && header.payload > 0
        && (header.payload - 1) / 4 < NAMED_CONTEXTS_MAX + 2
}

/// The payload of a request that names contexts: how much of the export it is about, and the identifiers of the contexts.
/// None if it is malformed, or does not name some of those in `negotiated`, each once.
pub fn parse_named_contexts(
    payload: &[u8],
    negotiated: &[(u32, String)],
) -> Option<(u64, Vec<u32>)> {
    let (length, rest) = payload.split_first_chunk::<8>()?;
    let (words, odd) = rest.as_chunks::<4>();
    let named: Vec<u32> = words.iter().map(|word| u32::from_be_bytes(*word)).collect();
    let is_known = |id: &u32| negotiated.iter().any(|(known, _)| known == id);
    let is_first = |(index, id): (usize, &u32)| !named[..index].contains(id);
    let lawful = odd.is_empty()
        && !named.is_empty()
        && named.iter().all(is_known)
        && named.iter().enumerate().all(is_first);
    lawful.then_some((u64::from_be_bytes(*length), named))
}

/// What was negotiated, and so what a request must satisfy.
#[derive(Clone, Debug)]
pub struct Rules {
    /// The export's size.
    pub size: u64,
    pub read_only: bool,
    /// The longest READ or WRITE.
    pub payload_max: u32,
    /// What offsets and lengths must be multiples of: a power of two, at least 1.
    pub block_min: u32,
    pub style: Style,
    /// At least one meta context was negotiated.
    pub block_status: bool,
    /// The server is stopping: no more requests are accepted.
    pub stopping: bool,
}

/// What is to be done with a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It may run (and a WRITE's payload follows).
    Run,
    /// Answer with this NBD error and message.
    Error(u32, &'static str),
    /// Read and throw away the payload of `length` bytes, then answer with this error and message.
    ErrorDrain(u32, &'static str),
    /// End the connection.
    Fatal(&'static str),
}

/// Judge a request by the letter of proto.md.
///
/// Where the letter leaves it open: a length of 0 is a success with no effect, as qemu-nbd has it,
/// but for BLOCK_STATUS, which cannot answer with no extent (EINVAL). DISC is obeyed whatever its
/// other fields say. TRIM, WRITE_ZEROES, CACHE and FLUSH run whether or not they were advertised.
pub fn judge(header: &Header, rules: &Rules) -> Verdict {
    if header.payload > DRAIN_MAX.max(u64::from(rules.payload_max)) {
        return Verdict::Fatal("the payload is too long to be read");
    }
    match refusal(header, rules) {
        None => Verdict::Run,
        Some((error, message)) if header.payload > 0 => Verdict::ErrorDrain(error, message),
        Some((error, message)) => Verdict::Error(error, message),
    }
}

pub type Refusal = Option<(u32, &'static str)>;

fn refusal(header: &Header, rules: &Rules) -> Refusal {
    use command::{BLOCK_STATUS, CACHE, DISC, FLUSH, READ, TRIM, WRITE, WRITE_ZEROES};
    match header.command {
        DISC => None,
        _ if rules.stopping => Some((error::ESHUTDOWN, "the server is shutting down")),
        FLUSH => bad_flags(header, rules).or_else(|| bad_flush(header)),
        READ | CACHE | BLOCK_STATUS => bad_flags(header, rules)
            .or_else(|| bad_range(header, rules))
            .or_else(|| bad_question(header, rules)),
        WRITE | TRIM | WRITE_ZEROES => bad_permission(rules)
            .or_else(|| bad_flags(header, rules))
            .or_else(|| bad_range(header, rules))
            .or_else(|| bad_payload(header, rules)),
        _ => Some((error::EINVAL, "unknown command")),
    }
}

fn bad_permission(rules: &Rules) -> Refusal {
    rules
        .read_only
        .then_some((error::EPERM, "the export is read-only"))
}

fn bad_flags(header: &Header, rules: &Rules) -> Refusal {
    let extended = rules.style == Style::Extended;
    let own = match header.command {
        command::READ if rules.style.chunks() => flag::DF,
        command::WRITE if extended => flag::PAYLOAD_LEN,
        command::BLOCK_STATUS if extended => flag::REQ_ONE | flag::PAYLOAD_LEN,
        command::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
        command::BLOCK_STATUS => flag::REQ_ONE,
        _ => 0,
    };
    // FUA must be accepted on every command.
    let unknown = header.flags & !(own | flag::FUA) != 0;
    unknown.then_some((error::EINVAL, "a flag that this command does not have"))
}

fn bad_flush(header: &Header) -> Refusal {
    let reserved = header.offset != 0 || header.length != 0;
    reserved.then_some((error::EINVAL, "offset and length of a flush must be 0"))
}

/// Why a request of this range is refused of an export of `size` bytes.
pub fn past_end(header: &Header, size: u64) -> Refusal {
    let end = header.offset.checked_add(header.length);
    if end.is_some_and(|end| end <= size) {
        return None;
    }
    let grows = matches!(header.command, command::WRITE | command::WRITE_ZEROES);
    let error = if grows { error::ENOSPC } else { error::EINVAL };
    Some((error, "the range ends past the end of the export"))
}

fn bad_range(header: &Header, rules: &Rules) -> Refusal {
    if let Some(refusal) = past_end(header, rules.size) {
        return Some(refusal);
    }
    let block = u64::from(rules.block_min.max(1));
    let unaligned = !(header.offset | header.length).is_multiple_of(block);
    unaligned.then_some((
        error::EINVAL,
        "the range is not aligned to the minimum block size",
    ))
}

fn bad_payload(header: &Header, rules: &Rules) -> Refusal {
    let long = header.command == command::WRITE && header.length > u64::from(rules.payload_max);
    long.then_some((error::EINVAL, "longer than the maximum payload size"))
}

fn bad_question(header: &Header, rules: &Rules) -> Refusal {
    match header.command {
        command::READ if header.length > u64::from(rules.payload_max) => {
            // proto.md keeps EOVERFLOW for those who may know it: clients of structured replies.
            let error = if rules.style.chunks() {
                error::EOVERFLOW
            } else {
                error::EINVAL
            };
            Some((error, "longer than the maximum payload size"))
        }
        command::BLOCK_STATUS if !rules.style.chunks() || !rules.block_status => {
            Some((error::EINVAL, "no meta context was negotiated"))
        }
        command::BLOCK_STATUS if header.payload > 0 => {
            Some((error::EINVAL, "a list of meta contexts that makes no sense"))
        }
        command::BLOCK_STATUS if header.length == 0 => {
            Some((error::EINVAL, "the status of no bytes"))
        }
        _ => None,
    }
}

/// The NBD error that says best what a system call's `errno` says: proto.md, "Error values".
pub fn nbd_errno(errno: i32) -> u32 {
    match errno {
        libc::EPERM | libc::EACCES | libc::EROFS => error::EPERM,
        libc::ENOMEM => error::ENOMEM,
        libc::EINVAL => error::EINVAL,
        libc::EFBIG | libc::ENOSPC | libc::EDQUOT => error::ENOSPC,
        libc::EOVERFLOW => error::EOVERFLOW,
        libc::ENOTTY | libc::EOPNOTSUPP => error::ENOTSUP,
        libc::ESHUTDOWN => error::ESHUTDOWN,
        _ => error::EIO,
    }
}

/// A simple reply's header; a READ's payload follows it if `error` is 0.
pub fn simple_reply(out: &mut Vec<u8>, error: u32, cookie: u64) {
    out.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&error.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
}

/// What chunks answer to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Question {
    /// Extended headers are in use.
    pub extended: bool,
    pub cookie: u64,
    /// The request's.
    pub offset: u64,
}

impl Question {
    /// A chunk's header; `length` bytes of payload follow it.
    fn chunk(self, out: &mut Vec<u8>, flags: u16, kind: u16, length: u32) {
        let magic = if self.extended {
            EXTENDED_CHUNK_MAGIC
        } else {
            CHUNK_MAGIC
        };
        out.extend_from_slice(&magic.to_be_bytes());
        out.extend_from_slice(&flags.to_be_bytes());
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        if self.extended {
            out.extend_from_slice(&self.offset.to_be_bytes());
            out.extend_from_slice(&u64::from(length).to_be_bytes());
        } else {
            out.extend_from_slice(&length.to_be_bytes());
        }
    }

    /// The chunk that ends a reply and says nothing else.
    pub fn none(self, out: &mut Vec<u8>) {
        self.chunk(out, chunk::FLAG_DONE, chunk::NONE, 0);
    }

    /// The begin of a data chunk: `length` (at least 1, at most 2^32 - 9) bytes of the export from `offset` follow it.
    pub fn data(self, out: &mut Vec<u8>, flags: u16, offset: u64, length: u32) {
        debug_assert!(0 < length && length <= u32::MAX - 8);
        self.chunk(out, flags, chunk::OFFSET_DATA, 8 + length);
        out.extend_from_slice(&offset.to_be_bytes());
    }

    /// A whole hole chunk: `length` (at least 1) bytes of the export from `offset` are zeroes.
    pub fn hole(self, out: &mut Vec<u8>, flags: u16, offset: u64, length: u32) {
        debug_assert!(0 < length);
        self.chunk(out, flags, chunk::OFFSET_HOLE, 12);
        out.extend_from_slice(&offset.to_be_bytes());
        out.extend_from_slice(&length.to_be_bytes());
    }

    /// A whole status chunk of one meta context: `extents` (at least 1) are (length, status flags). In the compact form
    /// an extent's length has 32 bits: there the chunk ends with the first that is longer, cut to a whole number of
    /// blocks.
    pub fn block_status(self, out: &mut Vec<u8>, flags: u16, context: u32, extents: &[(u64, u32)]) {
        debug_assert!(!extents.is_empty() && extents.iter().all(|(length, _)| *length > 0));
        if self.extended {
            let count = u32::try_from(extents.len()).expect("few extents");
            self.chunk(out, flags, chunk::BLOCK_STATUS_EXT, 8 + 16 * count);
            out.extend_from_slice(&context.to_be_bytes());
            out.extend_from_slice(&count.to_be_bytes());
            for (length, status) in extents {
                out.extend_from_slice(&length.to_be_bytes());
                out.extend_from_slice(&u64::from(*status).to_be_bytes());
            }
            return;
        }
        let whole = extents
            .iter()
            .position(|(length, _)| *length > EXTENT_MAX)
            .map_or(extents, |long| &extents[..=long]);
        let length = u32::try_from(4 + 8 * whole.len()).expect("few extents");
        self.chunk(out, flags, chunk::BLOCK_STATUS, length);
        out.extend_from_slice(&context.to_be_bytes());
        for (length, status) in whole {
            let length = (*length).min(EXTENT_MAX) as u32;
            out.extend_from_slice(&length.to_be_bytes());
            out.extend_from_slice(&status.to_be_bytes());
        }
    }

    /// A whole error chunk: `error` (not 0), and a message for people, cut to `MESSAGE_MAX` bytes.
    pub fn error(self, out: &mut Vec<u8>, flags: u16, error: u32, message: &str) {
        debug_assert!(error != 0);
        let message = sendable(message);
        self.chunk(out, flags, chunk::ERROR, 6 + message.len() as u32);
        out.extend_from_slice(&error.to_be_bytes());
        out.extend_from_slice(&(message.len() as u16).to_be_bytes());
        out.extend_from_slice(message.as_bytes());
    }
}

/// The longest begin of `message` that is an NBD string: no NUL, not too long, whole characters.
fn sendable(message: &str) -> &str {
    let mut end = message.find('\0').unwrap_or(message.len()).min(MESSAGE_MAX);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    &message[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use Verdict::{Error, ErrorDrain, Fatal, Run};

    const MIB: u64 = 1 << 20;
    const CHUNK_HEADER_SIZE: usize = 20;

    const RULES: Rules = Rules {
        size: 100 * MIB,
        read_only: false,
        payload_max: 32 << 20,
        block_min: 1,
        style: Style::Structured,
        block_status: true,
        stopping: false,
    };

    fn header(command: u16, flags: u16, offset: u64, length: u64) -> Header {
        Header {
            flags,
            command,
            cookie: 7,
            offset,
            length,
            payload: if command == command::WRITE { length } else { 0 },
        }
    }

    fn encoded(header: &Header) -> [u8; REQUEST_SIZE] {
        let mut bytes = Vec::new();
        bytes.extend(REQUEST_MAGIC.to_be_bytes());
        bytes.extend(header.flags.to_be_bytes());
        bytes.extend(header.command.to_be_bytes());
        bytes.extend(header.cookie.to_be_bytes());
        bytes.extend(header.offset.to_be_bytes());
        bytes.extend((header.length as u32).to_be_bytes());
        bytes.try_into().expect("28 bytes")
    }

    /// The verdict without its message.
    fn verdict(rules: &Rules, command: u16, flags: u16, offset: u64, length: u64) -> Verdict {
        match judge(&header(command, flags, offset, length), rules) {
            Error(error, message) => {
                assert!(!message.is_empty());
                Error(error, "")
            }
            ErrorDrain(error, message) => {
                assert!(!message.is_empty());
                ErrorDrain(error, "")
            }
            Fatal(_) => Fatal(""),
            Run => Run,
        }
    }

    const COMMANDS: [u16; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
    const RANGED: [u16; 6] = [
        command::READ,
        command::WRITE,
        command::TRIM,
        command::CACHE,
        command::WRITE_ZEROES,
        command::BLOCK_STATUS,
    ];

    fn refused(command: u16, error: u32) -> Verdict {
        if command == command::WRITE {
            ErrorDrain(error, "")
        } else {
            Error(error, "")
        }
    }

    #[test]
    fn a_request_is_parsed() {
        let bytes = *b"\x25\x60\x95\x13\x00\x01\x00\x06\x01\x02\x03\x04\x05\x06\x07\x08\
                       \x80\x00\x00\x00\x00\x00\x00\x01\xff\xff\xff\xff";
        let header = parse_request(&bytes, Style::Simple)
            .expect("well-formed")
            .expect("whole");
        assert_eq!(header.flags, flag::FUA);
        assert_eq!(header.command, command::WRITE_ZEROES);
        assert_eq!(header.cookie, 0x0102_0304_0506_0708);
        assert_eq!(header.offset, (1 << 63) + 1);
        assert_eq!(header.length, 0xffff_ffff);
        assert_eq!(encoded(&header), bytes);
    }

    #[test]
    fn another_magic_is_no_request() {
        let mut bytes = encoded(&header(0, 0, 0, 0));
        bytes[3] ^= 1;
        assert_eq!(
            parse_request(&bytes, Style::Structured),
            Err(BadMagic(0x2560_9512))
        );
    }

    #[test]
    fn good_requests_run() {
        for command in RANGED {
            assert_eq!(verdict(&RULES, command, 0, 0, 4096), Run);
            assert_eq!(verdict(&RULES, command, flag::FUA, RULES.size - 1, 1), Run);
        }
        assert_eq!(verdict(&RULES, command::FLUSH, 0, 0, 0), Run);
        assert_eq!(verdict(&RULES, command::FLUSH, flag::FUA, 0, 0), Run);
    }

    #[test]
    fn a_disconnect_is_obeyed_whatever_it_says() {
        assert_eq!(verdict(&RULES, command::DISC, u16::MAX, u64::MAX, 9), Run);
    }

    #[test]
    fn an_unknown_command_is_einval() {
        for unknown in [8, 9, 0x100, u16::MAX] {
            assert_eq!(
                verdict(&RULES, unknown, 0, 0, 512),
                Error(error::EINVAL, "")
            );
        }
    }

    #[test]
    fn each_flag_belongs_to_its_command() {
        let owners = [
            (flag::NO_HOLE, command::WRITE_ZEROES),
            (flag::DF, command::READ),
            (flag::REQ_ONE, command::BLOCK_STATUS),
            (flag::FAST_ZERO, command::WRITE_ZEROES),
        ];
        for (flag, owner) in owners {
            for command in RANGED {
                let expected = if command == owner {
                    Run
                } else {
                    refused(command, error::EINVAL)
                };
                assert_eq!(verdict(&RULES, command, flag, 0, 512), expected);
            }
            assert_eq!(
                verdict(&RULES, command::FLUSH, flag, 0, 0),
                Error(error::EINVAL, "")
            );
        }
        for unknown in 5..16 {
            for command in RANGED {
                let expected = refused(command, error::EINVAL);
                assert_eq!(verdict(&RULES, command, 1 << unknown, 0, 512), expected);
            }
        }
    }

    #[test]
    fn df_needs_structured_replies() {
        let rules = Rules {
            style: Style::Simple,
            ..RULES
        };
        assert_eq!(
            verdict(&rules, command::READ, flag::DF, 0, 512),
            Error(error::EINVAL, "")
        );
        assert_eq!(verdict(&rules, command::READ, 0, 0, 512), Run);
    }

    #[test]
    fn past_the_end() {
        for (offset, length) in [
            (RULES.size, 1),
            (RULES.size - 1, 2),
            (u64::MAX, 2),
            (u64::MAX, 0),
        ] {
            for command in RANGED {
                let grows = [command::WRITE, command::WRITE_ZEROES].contains(&command);
                let error = if grows { error::ENOSPC } else { error::EINVAL };
                let expected = match length {
                    0 => Error(error, ""), // a write of nothing has no payload to throw away
                    _ => refused(command, error),
                };
                assert_eq!(verdict(&RULES, command, 0, offset, length), expected);
            }
        }
    }

    #[test]
    fn nothing_is_done_with_success_but_has_no_status() {
        for command in RANGED {
            let status = command == command::BLOCK_STATUS;
            let expected = if status {
                Error(error::EINVAL, "")
            } else {
                Run
            };
            assert_eq!(verdict(&RULES, command, 0, 0, 0), expected);
            assert_eq!(verdict(&RULES, command, 0, RULES.size, 0), expected);
        }
    }

    #[test]
    fn a_read_only_export_is_not_written() {
        let rules = Rules {
            read_only: true,
            ..RULES
        };
        for command in RANGED {
            let writes = [command::WRITE, command::TRIM, command::WRITE_ZEROES].contains(&command);
            let expected = if writes {
                refused(command, error::EPERM)
            } else {
                Run
            };
            assert_eq!(verdict(&rules, command, 0, 0, 512), expected);
        }
        assert_eq!(verdict(&rules, command::FLUSH, 0, 0, 0), Run);
    }

    #[test]
    fn the_minimum_block_size_is_kept() {
        let rules = Rules {
            block_min: 512,
            ..RULES
        };
        for command in RANGED {
            let expected = refused(command, error::EINVAL);
            assert_eq!(verdict(&rules, command, 0, 512, 1024), Run);
            assert_eq!(verdict(&rules, command, 0, 1, 512), expected);
            assert_eq!(verdict(&rules, command, 0, 512, 511), expected);
        }
    }

    #[test]
    fn block_status_needs_a_context() {
        let without = Rules {
            block_status: false,
            ..RULES
        };
        let simple = Rules {
            style: Style::Simple,
            ..RULES
        };
        for rules in [without, simple] {
            let found = verdict(&rules, command::BLOCK_STATUS, 0, 0, 512);
            assert_eq!(found, Error(error::EINVAL, ""));
        }
    }

    #[test]
    fn a_server_that_stops_takes_nothing_but_a_disconnect() {
        let rules = Rules {
            stopping: true,
            ..RULES
        };
        for command in RANGED {
            let expected = refused(command, error::ESHUTDOWN);
            assert_eq!(verdict(&rules, command, 0, 0, 512), expected);
        }
        assert_eq!(verdict(&rules, command::DISC, 0, 0, 0), Run);
    }

    #[test]
    fn a_flush_has_no_range() {
        assert_eq!(
            verdict(&RULES, command::FLUSH, 0, 1, 0),
            Error(error::EINVAL, "")
        );
        assert_eq!(
            verdict(&RULES, command::FLUSH, 0, 0, 1),
            Error(error::EINVAL, "")
        );
    }

    #[test]
    fn payloads_are_bounded_and_effects_are_not() {
        let long = 32 * MIB + 1;
        let simple = Rules {
            style: Style::Simple,
            ..RULES
        };
        assert_eq!(
            verdict(&RULES, command::READ, 0, 0, long),
            Error(error::EOVERFLOW, "")
        );
        assert_eq!(
            verdict(&simple, command::READ, 0, 0, long),
            Error(error::EINVAL, "")
        );
        for command in RANGED
            .into_iter()
            .filter(|command| *command > command::WRITE)
        {
            assert_eq!(verdict(&RULES, command, 0, 0, RULES.size), Run);
        }
        let small = Rules {
            payload_max: 1 << 20,
            ..RULES
        };
        assert_eq!(verdict(&small, command::WRITE, 0, 0, MIB), Run);
        assert_eq!(
            verdict(&small, command::WRITE, 0, 0, MIB + 1),
            ErrorDrain(error::EINVAL, "")
        );
        assert_eq!(
            verdict(&small, command::WRITE, 0, 0, 32 * MIB),
            ErrorDrain(error::EINVAL, "")
        );
        assert_eq!(verdict(&small, command::WRITE, 0, 0, long), Fatal(""));
        let large = Rules {
            payload_max: 64 << 20,
            ..RULES
        };
        assert_eq!(verdict(&large, command::WRITE, 0, 0, 64 * MIB), Run);
        assert_eq!(
            verdict(&large, command::WRITE, 0, 0, 64 * MIB + 1),
            Fatal("")
        );
        // However wrong the rest is: nobody reads that much for nothing.
        let read_only = Rules {
            read_only: true,
            ..RULES
        };
        assert_eq!(
            verdict(&read_only, command::WRITE, u16::MAX, u64::MAX, long),
            Fatal("")
        );
    }

    #[test]
    fn errno_is_translated() {
        let pairs = [
            (1, error::EPERM),
            (13, error::EPERM),
            (30, error::EPERM),
            (5, error::EIO),
            (12, error::ENOMEM),
            (22, error::EINVAL),
            (28, error::ENOSPC),
            (27, error::ENOSPC),
            (122, error::ENOSPC),
            (75, error::EOVERFLOW),
            (95, error::ENOTSUP),
            (25, error::ENOTSUP),
            (108, error::ESHUTDOWN),
            (9, error::EIO),
            (0, error::EIO),
            (-1, error::EIO),
            (i32::MAX, error::EIO),
        ];
        for (errno, expected) in pairs {
            assert_eq!(nbd_errno(errno), expected, "{errno}");
        }
    }

    const COMPACT: Question = Question {
        extended: false,
        cookie: 7,
        offset: 0x1000,
    };
    const EXTENDED: Question = Question {
        extended: true,
        ..COMPACT
    };

    #[test]
    fn replies_are_encoded() {
        let mut out = Vec::new();
        simple_reply(&mut out, error::EIO, 0x0102);
        assert_eq!(out, b"\x67\x44\x66\x98\0\0\0\x05\0\0\0\0\0\0\x01\x02");

        out.clear();
        COMPACT.none(&mut out);
        assert_eq!(out, b"\x66\x8e\x33\xef\0\x01\0\0\0\0\0\0\0\0\0\x07\0\0\0\0");
        assert_eq!(out.len(), CHUNK_HEADER_SIZE);

        out.clear();
        COMPACT.data(&mut out, 0, 0x1000, 512);
        assert_eq!(out[4..8], *b"\0\0\0\x01");
        assert_eq!(out[16..], *b"\0\0\x02\x08\0\0\0\0\0\0\x10\0");

        out.clear();
        COMPACT.hole(&mut out, chunk::FLAG_DONE, 0x1000, 512);
        assert_eq!(out[4..8], *b"\0\x01\0\x02");
        assert_eq!(out[16..], *b"\0\0\0\x0c\0\0\0\0\0\0\x10\0\0\0\x02\0");

        out.clear();
        COMPACT.block_status(&mut out, 0, 9, &[(512, 3), (1024, 0)]);
        assert_eq!(out[4..8], *b"\0\0\0\x05");
        assert_eq!(
            out[16..],
            *b"\0\0\0\x14\0\0\0\x09\0\0\x02\0\0\0\0\x03\0\0\x04\0\0\0\0\0"
        );

        out.clear();
        COMPACT.error(&mut out, chunk::FLAG_DONE, error::EINVAL, "no");
        assert_eq!(out[4..8], *b"\0\x01\x80\x01");
        assert_eq!(out[16..], *b"\0\0\0\x08\0\0\0\x16\0\x02no");
    }

    #[test]
    fn extended_replies_are_encoded() {
        let head =
            b"\x6e\x8a\x27\x8c\0\x01\0\x02\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x0c";
        let mut out = Vec::new();
        EXTENDED.hole(&mut out, chunk::FLAG_DONE, 0x1200, 512);
        assert_eq!(out[..32], *head);
        assert_eq!(out[32..], *b"\0\0\0\0\0\0\x12\0\0\0\x02\0");

        out.clear();
        EXTENDED.block_status(&mut out, 0, 9, &[(1 << 33, 3), (1024, 0)]);
        assert_eq!(out[4..8], *b"\0\0\0\x06");
        assert_eq!(out[24..32], *b"\0\0\0\0\0\0\0\x28");
        assert_eq!(out[32..40], *b"\0\0\0\x09\0\0\0\x02");
        assert_eq!(out[40..56], *b"\0\0\0\x02\0\0\0\0\0\0\0\0\0\0\0\x03");
        assert_eq!(out[56..], *b"\0\0\0\0\0\0\x04\0\0\0\0\0\0\0\0\0");
    }

    #[test]
    fn a_compact_status_ends_with_the_first_extent_that_is_too_long() {
        let mut out = Vec::new();
        COMPACT.block_status(&mut out, 0, 9, &[(512, 0), (1 << 40, 3), (512, 0)]);
        assert_eq!(out[16..20], *b"\0\0\0\x14");
        assert_eq!(out[32..], *b"\xff\xff\0\0\0\0\0\x03");
    }

    #[test]
    fn an_extended_request_is_parsed() {
        let bytes = *b"\x21\xe4\x1c\x71\0\x21\0\x01\x01\x02\x03\x04\x05\x06\x07\x08\
                       \0\0\0\0\0\0\x10\0\0\0\0\x01\0\0\0\0";
        let parse = |bytes: &[u8]| parse_request(bytes, Style::Extended);
        let header = parse(&bytes).expect("well-formed").expect("whole");
        assert_eq!(header.flags, flag::FUA | flag::PAYLOAD_LEN);
        assert_eq!((header.length, header.payload), (1 << 32, 1 << 32));
        assert_eq!(parse(&bytes[..31]), Ok(None));
        assert!(parse_request(&bytes, Style::Structured).is_err());
        let mut effect = bytes;
        (effect[5], effect[7]) = (0, command::TRIM as u8);
        let header = parse(&effect).expect("well-formed").expect("whole");
        assert_eq!((header.length, header.payload), (1 << 32, 0));
    }

    #[test]
    fn payloads_of_extended_requests() {
        let rules = Rules {
            style: Style::Extended,
            ..RULES
        };
        let with_payload = |command, payload| Header {
            payload,
            ..header(command, flag::PAYLOAD_LEN, 0, payload)
        };
        assert_eq!(judge(&with_payload(command::WRITE, 512), &rules), Run);
        assert_eq!(judge(&header(command::WRITE, 0, 0, 512), &rules), Run);
        for command in COMMANDS {
            let expected = match command {
                command::WRITE | command::DISC => continue,
                _ => judge(&with_payload(command, 512), &rules),
            };
            assert!(
                matches!(expected, ErrorDrain(error::EINVAL, _)),
                "{command}"
            );
            let long = with_payload(command, (32 << 20) + 1);
            assert!(matches!(judge(&long, &rules), Fatal(_)), "{command}");
        }
    }

    #[test]
    fn contexts_are_named_once_each_and_must_be_known() {
        let known = [(3, "a".to_owned()), (5, "b".to_owned())];
        let parse = |bytes: &[u8]| parse_named_contexts(bytes, &known);
        let length = b"\0\0\0\x01\0\0\0\0";
        let with = |rest: &[u8]| [length, rest].concat();
        assert_eq!(
            parse(&with(b"\0\0\0\x05\0\0\0\x03")),
            Some((1 << 32, vec![5, 3]))
        );
        for bad in [
            &b""[..],
            b"\0\0\0",
            b"\0\0\0\x05\0",
            b"\0\0\0\x05\0\0\0\x05",
            b"\0\0\0\x04",
        ] {
            assert_eq!(parse(&with(bad)), None);
        }
        assert_eq!(parse(b"\0\0\0"), None);
    }

    #[test]
    fn messages_are_cut_to_what_a_string_may_be() {
        assert_eq!(sendable("a\0b"), "a");
        assert_eq!(sendable(&"x".repeat(5000)).len(), MESSAGE_MAX);
        // 4096 is not a multiple of 3: the character that does not fit goes as a whole.
        assert_eq!(sendable(&"\u{20ac}".repeat(2000)).len(), 4095);
        let mut out = Vec::new();
        COMPACT.error(&mut out, 0, error::EIO, &"x".repeat(70_000));
        assert_eq!(out.len(), CHUNK_HEADER_SIZE + 6 + MESSAGE_MAX);
    }

    /// What must hold of any verdict on any request.
    fn check_verdict(header: &Header, rules: &Rules) {
        let writes = matches!(header.command, 1 | 4 | 6);
        let end = u128::from(header.offset) + u128::from(header.length);
        match judge(header, rules) {
            Run if header.command == command::DISC => {}
            Run => {
                assert!(!rules.stopping);
                assert!(COMMANDS.contains(&header.command));
                assert!(end <= u128::from(rules.size));
                assert!(!(writes && rules.read_only));
                assert!(header.command > 1 || header.length <= u64::from(rules.payload_max));
            }
            Error(error, message) => {
                assert!(error != 0 && !message.is_empty());
                assert_eq!(header.payload, 0, "it would be taken for requests");
            }
            ErrorDrain(error, message) => {
                assert!(error != 0 && !message.is_empty());
                assert!(0 < header.payload);
                assert!(header.payload <= DRAIN_MAX.max(u64::from(rules.payload_max)));
            }
            Fatal(message) => {
                assert!(!message.is_empty());
                assert!(header.payload > 0);
            }
        }
    }

    fn random_rules(random: &mut Random) -> Rules {
        Rules {
            size: random.next() >> random.below(64),
            read_only: random.one_in(3),
            payload_max: (random.next() >> random.below(64)) as u32,
            block_min: 1 << random.below(17),
            style: [Style::Simple, Style::Structured, Style::Extended][random.below(3) as usize],
            block_status: random.one_in(2),
            stopping: random.one_in(8),
        }
    }

    #[test]
    fn any_bytes_are_judged() {
        let mut random = Random(1);
        for _ in 0..20_000 {
            let header = header(
                random.below(10) as u16,
                (random.next() & random.next() & random.next()) as u16,
                random.next() >> random.below(64),
                u64::from(random.next() as u32 >> random.below(32)),
            );
            let mut bytes = encoded(&header);
            for _ in 0..random.below(4) {
                bytes[random.below(REQUEST_SIZE as u64) as usize] ^= 1 << random.below(8);
            }
            let magic_kept = bytes[..4] == REQUEST_MAGIC.to_be_bytes();
            let parsed = parse_request(&bytes, Style::Structured);
            assert_eq!(parsed.is_ok(), magic_kept);
            if let Ok(Some(header)) = parsed {
                assert_eq!(encoded(&header), bytes);
                check_verdict(&header, &random_rules(&mut random));
            }
        }
    }

    #[test]
    fn lengths_beyond_32_bits_are_judged() {
        let mut random = Random(2);
        for _ in 0..20_000 {
            let (offset, length) = (random.next() >> random.below(64), random.next());
            let header = header(
                random.below(9) as u16,
                0,
                offset,
                length >> random.below(64),
            );
            check_verdict(&header, &random_rules(&mut random));
        }
    }
}
