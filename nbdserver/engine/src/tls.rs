//! TLS on one connection: records in, records out; and what the server shows and demands of clients.
//!
//! OpenSSL reads from and writes to memory (`Pipe`); `Transport` moves that memory to and from the socket, many records at
//! a time. So nothing here ever waits, and a record is encrypted once, whatever the socket takes.

use std::cell::Cell;
use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::LazyLock;

use openssl::asn1::Asn1StringRef;
use openssl::error::ErrorStack;
use openssl::ex_data::Index;
use openssl::nid::Nid;
use openssl::ssl::{
    ErrorCode, Ssl, SslContext, SslContextBuilder, SslFiletype, SslMethod, SslMode, SslOptions,
    SslStream, SslVerifyMode, SslVersion,
};
use openssl::x509::store::X509Lookup;
use openssl::x509::verify::X509VerifyFlags;
use openssl::x509::{X509NameRef, X509VerifyResult};
use rustix::buffer::spare_capacity;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, SendFlags, recv, recvmsg, send};

use crate::connection::Cached;

/// The most that one record holds: RFC 8446, "Record Layer".
const RECORD_MAX: usize = 16 << 10;
/// What one receive takes in.
const RECEIVE: usize = 128 << 10;
/// Encrypted bytes that wait for the socket before it is tried: several records for a call, and still in the processor's
/// cache.
const OUTPUT_MAX: usize = 128 << 10;

/// Where the callback for pre-shared keys leaves the name of the key that the client chose.
static IDENTITY: LazyLock<Index<Ssl, String>> =
    LazyLock::new(|| Ssl::new_ex_index().expect("memory for an index"));

/// What the server shows, and demands of clients.
#[derive(Default)]
pub struct Settings {
    /// Its certificate (and those that lead to the authority's), and the key of it; PEM files.
    pub certificate: Option<String>,
    pub key: Option<String>,
    /// Who signs the clients' certificates, and which of these are revoked; PEM files. With it every client must have one.
    pub authority: Option<String>,
    pub revoked: Option<String>,
    /// Pre-shared keys by the names that clients give.
    pub keys: HashMap<String, Vec<u8>>,
}

/// The context that connections begin TLS with. Raises what OpenSSL said, and of which file.
pub fn context(settings: Settings) -> Result<SslContext, String> {
    let mut builder = SslContext::builder(SslMethod::tls_server()).map_err(|error| said(&error))?;
    begin(&mut builder).map_err(|error| said(&error))?;
    if let Some(path) = &settings.certificate {
        builder
            .set_certificate_chain_file(path)
            .map_err(|error| format!("{path}: {}", said(&error)))?;
    }
    if let Some(path) = &settings.key {
        builder
            .set_private_key_file(path, SslFiletype::PEM)
            .and_then(|()| builder.check_private_key())
            .map_err(|error| format!("{path}: {}", said(&error)))?;
    }
    if let Some(path) = &settings.authority {
        builder
            .set_ca_file(path)
            .map_err(|error| format!("{path}: {}", said(&error)))?;
        builder.set_verify(SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT);
    }
    if let Some(path) = &settings.revoked {
        revoke(&mut builder, path).map_err(|error| format!("{path}: {}", said(&error)))?;
    }
    if !settings.keys.is_empty() {
        share(&mut builder, settings.keys, settings.certificate.is_none())
            .map_err(|error| said(&error))?;
    }
    Ok(builder.build())
}

fn begin(builder: &mut SslContextBuilder) -> Result<(), ErrorStack> {
    builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
    builder.set_options(
        SslOptions::NO_TICKET | SslOptions::NO_RENEGOTIATION | SslOptions::CIPHER_SERVER_PREFERENCE,
    );
    builder.set_mode(
        SslMode::ENABLE_PARTIAL_WRITE
            | SslMode::ACCEPT_MOVING_WRITE_BUFFER
            | SslMode::RELEASE_BUFFERS,
    );
    // No session is ever resumed: an NBD connection lives long.
    builder.set_num_tickets(0)?;
    builder.set_session_id_context(b"nbdserver")
}

fn revoke(builder: &mut SslContextBuilder, path: &str) -> Result<(), ErrorStack> {
    let store = builder.cert_store_mut();
    store
        .add_lookup(X509Lookup::file())?
        .load_crl_file(path, SslFiletype::PEM)?;
    store.set_flags(X509VerifyFlags::CRL_CHECK)
}

/// Take clients that know one of the keys. `only`: there is no certificate.
fn share(
    builder: &mut SslContextBuilder,
    keys: HashMap<String, Vec<u8>>,
    only: bool,
) -> Result<(), ErrorStack> {
    // For TLS 1.2: what has forward secrecy and needs no parameters of ours.
    builder.set_cipher_list(if only {
        "ECDHE-PSK-CHACHA20-POLY1305:ECDHE-PSK-AES256-CBC-SHA384:ECDHE-PSK-AES128-CBC-SHA256"
    } else {
        "DEFAULT:!kPSK:!kRSAPSK:!kDHEPSK"
    })?;
    // OpenSSL takes keys of this kind for those with SHA-256 alone, and beside a certificate does not look for one.
    builder.set_ciphersuites(
        "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256:TLS_AES_256_GCM_SHA384",
    )?;
    builder.set_psk_server_callback(move |ssl, name, out| {
        let name = String::from_utf8_lossy(name.unwrap_or_default()).into_owned();
        let Some(key) = keys.get(&name).filter(|key| key.len() <= out.len()) else {
            return Ok(0); // no such key: OpenSSL ends the handshake
        };
        out[..key.len()].copy_from_slice(key);
        ssl.set_ex_data(*IDENTITY, name);
        Ok(key.len())
    });
    Ok(())
}

fn said(error: &ErrorStack) -> String {
    let last = error.errors().last();
    let reason = last.and_then(|error| error.reason());
    reason.map_or_else(|| error.to_string(), str::to_owned)
}

/// Who a client has shown itself to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// The subject of its certificate: RFC 4514.
    pub subject: Option<String>,
    /// The name of the pre-shared key it knows.
    pub identity: Option<String>,
    /// Protocol and cipher, for people.
    pub cipher: String,
}

thread_local! {
    /// Memory for a `Pipe`, which only those that have bytes waiting keep.
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    /// What is put together for a record.
    static RECORD: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Memory for a pipe that has none, if there is any to spare.
fn furnish(memory: &mut Vec<u8>) {
    if memory.capacity() == 0 {
        *memory = SPARE.take();
    }
}

/// Empty memory of a pipe is for another one, with which it is already in the processor's cache.
fn spare(memory: &mut Vec<u8>) {
    if memory.capacity() > 0 {
        memory.clear();
        SPARE.set(std::mem::take(memory));
    }
}

/// Memory that OpenSSL takes for a socket.
#[derive(Default)]
struct Pipe {
    input: Vec<u8>,
    taken: usize,
    output: Vec<u8>,
}

impl Read for Pipe {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let here = &self.input[self.taken..];
        if here.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let count = here.len().min(buffer.len());
        buffer[..count].copy_from_slice(&here[..count]);
        self.taken += count;
        Ok(count)
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        furnish(&mut self.output);
        self.output.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// TLS on one connection.
pub struct Tls {
    stream: SslStream<Pipe>,
    /// Of the output: sent.
    sent: usize,
}

/// How a handshake goes.
pub enum Progress {
    Waiting,
    Done(Peer),
    /// It failed, for this reason.
    Failed(String),
}

impl Tls {
    pub fn new(context: &SslContext) -> Result<Tls, ErrorStack> {
        let mut ssl = Ssl::new(context)?;
        ssl.set_accept_state();
        Ok(Tls {
            stream: SslStream::new(ssl, Pipe::default())?,
            sent: 0,
        })
    }

    /// Go on with the handshake. Whatever comes of it, `flush` has then something to send.
    pub fn shake(&mut self, socket: &OwnedFd) -> Result<Progress, Errno> {
        loop {
            let Err(error) = self.stream.do_handshake() else {
                return Ok(Progress::Done(self.peer()));
            };
            if error.code() != ErrorCode::WANT_READ {
                return Ok(Progress::Failed(self.reason(&error)));
            }
            self.flush(socket)?;
            match self.fill(socket) {
                Ok(0) => return Err(Errno::CONNRESET),
                Ok(_) => {}
                Err(Errno::AGAIN) => return Ok(Progress::Waiting),
                Err(errno) => return Err(errno),
            }
        }
    }

    fn reason(&self, error: &openssl::ssl::Error) -> String {
        let verified = self.stream.ssl().verify_result();
        let why = error.ssl_error().map_or_else(|| error.to_string(), said);
        if verified == X509VerifyResult::OK {
            why
        } else {
            format!("{why}: {}", verified.error_string())
        }
    }

    fn peer(&self) -> Peer {
        let ssl = self.stream.ssl();
        let certificate = ssl.peer_certificate();
        let cipher = ssl
            .current_cipher()
            .map_or("no cipher", |cipher| cipher.name());
        Peer {
            subject: certificate.map(|certificate| distinguished_name(certificate.subject_name())),
            identity: ssl.ex_data(*IDENTITY).cloned(),
            cipher: format!("{} {cipher}", ssl.version_str()),
        }
    }

    /// Take in encrypted bytes. 0: the client has closed its side.
    fn fill(&mut self, socket: &OwnedFd) -> Result<usize, Errno> {
        let pipe = self.stream.get_mut();
        if pipe.taken == pipe.input.len() {
            pipe.input.clear();
            pipe.taken = 0;
        }
        furnish(&mut pipe.input);
        pipe.input.reserve(RECEIVE);
        let room = spare_capacity(&mut pipe.input);
        let got = recv(socket, room, RecvFlags::DONTWAIT).map(|got| got.0);
        if pipe.input.is_empty() {
            spare(&mut pipe.input);
        }
        got
    }

    /// Decrypted bytes. 0: the client has closed its side. EPROTO: what came is not TLS, or has been tampered with.
    pub fn receive(&mut self, socket: &OwnedFd, buffer: &mut [u8]) -> Result<usize, Errno> {
        let mut received = 0;
        while received < buffer.len() {
            match self.stream.ssl_read(&mut buffer[received..]) {
                Ok(count) => received += count,
                Err(error) if error.code() == ErrorCode::ZERO_RETURN => break,
                Err(error) if error.code() == ErrorCode::WANT_READ => match self.fill(socket) {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(Errno::AGAIN) if received == 0 => return Err(Errno::AGAIN),
                    Err(Errno::AGAIN) => break,
                    Err(errno) => return Err(errno),
                },
                Err(_) => return Err(Errno::PROTO),
            }
        }
        Ok(received)
    }

    /// Whether there are bytes taken in that have not been received: no socket will tell of them.
    pub fn has_input(&self) -> bool {
        let pipe = self.stream.get_ref();
        self.stream.ssl().pending() > 0 || pipe.taken < pipe.input.len()
    }

    /// Whether there are bytes that the socket has not taken.
    pub fn has_output(&self) -> bool {
        self.sent < self.stream.get_ref().output.len()
    }

    /// Send bytes; how many of them were taken, to be sent now or by `flush`.
    pub fn send(&mut self, socket: &OwnedFd, slices: &[IoSlice<'_>]) -> Result<usize, Errno> {
        let mut taken = 0;
        let mut slices = slices.iter().map(|slice| &slice[..]).peekable();
        while slices.peek().is_some() {
            if self.stream.get_ref().output.len() - self.sent >= OUTPUT_MAX {
                match self.flush(socket) {
                    Ok(()) => {}
                    Err(Errno::AGAIN) if taken > 0 => return Ok(taken),
                    Err(errno) => return Err(errno),
                }
            }
            taken += self.seal(&mut slices)?;
        }
        match self.flush(socket) {
            Ok(()) | Err(Errno::AGAIN) => Ok(taken),
            Err(errno) => Err(errno),
        }
    }

    /// Encrypt one record's worth; how much that was.
    fn seal<'a>(
        &mut self,
        slices: &mut std::iter::Peekable<impl Iterator<Item = &'a [u8]>>,
    ) -> Result<usize, Errno> {
        if let Some(slice) = slices.peek_mut()
            && slice.len() >= RECORD_MAX
        {
            let sealed = self.stream.ssl_write(slice).map_err(|_| Errno::PROTO)?;
            *slice = &slice[sealed..];
            return Ok(sealed);
        }
        let mut record = RECORD.take();
        record.clear();
        while let Some(slice) = slices.peek_mut() {
            let count = slice.len().min(RECORD_MAX - record.len());
            record.extend_from_slice(&slice[..count]);
            *slice = &slice[count..];
            if !slice.is_empty() {
                break;
            }
            slices.next();
        }
        let mut sealed = 0;
        while sealed < record.len() {
            let count = self.stream.ssl_write(&record[sealed..]);
            sealed += count.map_err(|_| Errno::PROTO)?;
        }
        RECORD.set(record);
        Ok(sealed)
    }

    /// Send what waits. AGAIN: the socket is full.
    pub fn flush(&mut self, socket: &OwnedFd) -> Result<(), Errno> {
        while self.has_output() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match send(socket, &self.stream.get_ref().output[self.sent..], flags) {
                Ok(count) => self.sent += count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        self.sent = 0;
        spare(&mut self.stream.get_mut().output);
        Ok(())
    }

    /// Tell the client, if its socket takes that, that nothing more comes.
    pub fn close(&mut self, socket: &OwnedFd) {
        // It has failed only where there is nobody left to be told.
        let _ = self.stream.shutdown();
        let _ = self.flush(socket);
    }
}

/// A certificate's name as RFC 4514 writes it: the most specific part first.
fn distinguished_name(name: &X509NameRef) -> String {
    let mut parts: Vec<String> = name
        .entries()
        .map(|entry| {
            let kind = entry.object().nid();
            let kind = match kind.short_name() {
                Ok(short) if kind != Nid::UNDEF => short.to_owned(),
                _ => entry.object().to_string(),
            };
            format!("{kind}={}", escaped(entry.data()))
        })
        .collect();
    parts.reverse();
    parts.join(",")
}

/// RFC 4514, section 2.4.
fn escaped(value: &Asn1StringRef) -> String {
    let text = value.to_string().unwrap_or_default();
    let last = text.chars().count().saturating_sub(1);
    let mut out = String::new();
    for (index, letter) in text.chars().enumerate() {
        let at_end = letter == ' ' && (index == 0 || index == last) || letter == '#' && index == 0;
        if at_end || matches!(letter, '"' | '+' | ',' | ';' | '<' | '>' | '\\') {
            out.push('\\');
        }
        out.push(letter);
    }
    out
}

/// What a connection's bytes go through.
pub struct Transport {
    pub socket: OwnedFd,
    tls: Option<Box<Tls>>,
}

impl Transport {
    pub fn new(socket: OwnedFd) -> Transport {
        Transport { socket, tls: None }
    }

    /// From now on, TLS. Its handshake comes first.
    pub fn start(&mut self, context: &SslContext) -> Result<(), ErrorStack> {
        self.tls = Some(Box::new(Tls::new(context)?));
        Ok(())
    }

    pub fn shake(&mut self) -> Result<Progress, Errno> {
        let tls = self.tls.as_mut().expect("a handshake of TLS");
        let progress = tls.shake(&self.socket)?;
        match tls.flush(&self.socket) {
            Ok(()) | Err(Errno::AGAIN) => Ok(progress),
            Err(errno) => Err(errno),
        }
    }

    /// Whether there is something to receive of which the socket will not tell.
    pub fn has_input(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.has_input())
    }

    pub fn has_output(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.has_output())
    }

    /// Receive into `first` and, once that is full, into `second`. 0: the client has closed its side. AGAIN: there is
    /// nothing now.
    pub fn receive(&mut self, first: &mut [u8], second: &mut [u8]) -> Result<usize, Errno> {
        let Some(tls) = &mut self.tls else {
            if first.is_empty() {
                return recv(&self.socket, second, RecvFlags::empty()).map(|got| got.0);
            }
            let mut slices = [IoSliceMut::new(first), IoSliceMut::new(second)];
            let mut control = RecvAncillaryBuffer::default();
            let received = recvmsg(&self.socket, &mut slices, &mut control, RecvFlags::empty());
            return received.map(|received| received.bytes);
        };
        let mut received = 0;
        for buffer in [first, second]
            .into_iter()
            .filter(|buffer| !buffer.is_empty())
        {
            let wanted = buffer.len();
            match tls.receive(&self.socket, buffer) {
                Ok(got) => received += got,
                Err(Errno::AGAIN) if received > 0 => {}
                Err(errno) => return Err(errno),
            }
            if received < wanted {
                break;
            }
        }
        Ok(received)
    }

    pub fn close(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.close(&self.socket);
        }
    }

    /// Send bytes, without waiting; how many of them have been taken. AGAIN: none can be now. `more`: others follow, which
    /// they may leave along with.
    pub fn send(&mut self, slices: &[IoSlice<'_>], more: bool) -> Result<usize, Errno> {
        match &mut self.tls {
            None => {
                let mut flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                flags.set(SendFlags::MORE, more);
                let mut control = rustix::net::SendAncillaryBuffer::default();
                rustix::net::sendmsg(&self.socket, slices, &mut control, flags)
            }
            Some(tls) => tls.send(&self.socket, slices),
        }
    }

    /// Send bytes of a file from its page cache, but for the first `skip`; how many the socket has taken. 0: the file ends
    /// there. AGAIN: none can be taken now. There is no TLS on the way.
    pub fn send_cached(&mut self, cached: &Cached, skip: usize) -> Result<usize, Errno> {
        assert!(self.is_plain(), "the bytes of a file, past TLS");
        cached.file.send_to(
            &self.socket,
            cached.offset + skip as u64,
            cached.length - skip,
        )
    }

    /// Whether bytes go to the socket as they are.
    pub fn is_plain(&self) -> bool {
        self.tls.is_none()
    }

    /// Send what TLS holds back. AGAIN: the socket is full.
    pub fn flush(&mut self) -> Result<(), Errno> {
        match &mut self.tls {
            None => Ok(()),
            Some(tls) => tls.flush(&self.socket),
        }
    }
}
