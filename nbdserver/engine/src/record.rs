//! The I/O recorder: what crash tests replay.
//!
//! Off unless a directory is given. One file per engine, `record.bin`, of little-endian records in the order of
//! the events; the beginning and the end of an operation are two events.
//!
//! ```text
//! u32 magic "RBDN"   u8 kind (1 begin, 2 end, 3 file)   u8 operation   u16 0
//! u32 file           u32 begin: flags (zero: 1 may unmap); end: errno
//! u64 sequence       u64 offset      u64 length
//! then, when a write begins, its payload; for kind 3, the file's name
//! ```

use std::fs;
use std::io::{IoSlice, Write};
use std::path::Path;
use std::sync::Mutex;

use rustix::io::Errno;

use crate::extents::FileId;

const MAGIC: u32 = 0x4e42_4452;
const BEGIN: u8 = 1;
const END: u8 = 2;
const FILE: u8 = 3;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Operation {
    Write = 1,
    Zero = 2,
    Discard = 3,
    Sync = 4,
    Resize = 5,
}

/// An operation that has begun and must be ended.
#[must_use]
pub struct Token {
    operation: Operation,
    file: FileId,
    sequence: u64,
}

struct Log {
    out: fs::File,
    next: u64,
}

pub struct Recorder {
    log: Mutex<Log>,
}

struct Entry {
    kind: u8,
    operation: u8,
    file: FileId,
    value: u32,
    sequence: u64,
    offset: u64,
    length: u64,
}

impl Entry {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(40);
        out.extend(MAGIC.to_le_bytes());
        out.extend([self.kind, self.operation, 0, 0]);
        out.extend(self.file.to_le_bytes());
        out.extend(self.value.to_le_bytes());
        out.extend(self.sequence.to_le_bytes());
        out.extend(self.offset.to_le_bytes());
        out.extend(self.length.to_le_bytes());
        out
    }
}

impl Recorder {
    /// Create `directory/record.bin`, replacing an older one.
    pub fn create(directory: &Path) -> std::io::Result<Recorder> {
        fs::create_dir_all(directory)?;
        let out = fs::File::create(directory.join("record.bin"))?;
        Ok(Recorder {
            log: Mutex::new(Log { out, next: 0 }),
        })
    }

    pub fn file(&self, file: FileId, name: &str) {
        let entry = Entry {
            kind: FILE,
            operation: 0,
            file,
            value: 0,
            sequence: 0,
            offset: 0,
            length: name.len() as u64,
        };
        self.put(
            &mut self.log.lock().unwrap(),
            &entry,
            &[IoSlice::new(name.as_bytes())],
        );
    }

    pub fn begin(
        &self,
        operation: Operation,
        file: FileId,
        flags: u32,
        (offset, length): (u64, u64),
        payload: &[IoSlice<'_>],
    ) -> Token {
        let mut log = self.log.lock().unwrap();
        log.next += 1;
        let sequence = log.next;
        let entry = Entry {
            kind: BEGIN,
            operation: operation as u8,
            file,
            value: flags,
            sequence,
            offset,
            length,
        };
        self.put(&mut log, &entry, payload);
        Token {
            operation,
            file,
            sequence,
        }
    }

    pub fn end(&self, token: Token, result: Result<(), Errno>) {
        let entry = Entry {
            kind: END,
            operation: token.operation as u8,
            file: token.file,
            value: result.err().map_or(0, |errno| errno.raw_os_error() as u32),
            sequence: token.sequence,
            offset: 0,
            length: 0,
        };
        self.put(&mut self.log.lock().unwrap(), &entry, &[]);
    }

    /// A record that cannot be written would make every crash test that relies on it a lie.
    fn put(&self, log: &mut Log, entry: &Entry, payload: &[IoSlice<'_>]) {
        let mut bytes = entry.encode();
        for slice in payload {
            bytes.extend_from_slice(slice);
        }
        log.out
            .write_all(&bytes)
            .expect("the I/O recorder cannot write");
    }
}
