//! A request that is longer than the pool can hold at once: carried out in parts, one after the other.
//!
//! ```text
//! write    payload |part|part|part|     each is received, written, and its memory given back; one reply at the end
//! read                                  each is a chunk (or more) of one reply
//! ```
//!
//! So a long request needs no other memory than the pool's, however small that is, and every part of it is registered. What
//! must be answered in one piece (simple replies, and DF) cannot be read so.

use crate::wire::{Header, Style, command, flag};

/// What a part, and its reply, know of the whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Where the whole request begins.
    pub offset: u64,
    pub first: bool,
    pub last: bool,
}

/// A request that is being carried out in parts.
#[derive(Debug)]
pub struct Split {
    header: Header,
    part_length: u64,
    begun: u64,
    running: bool,
}

/// Whether a request may be answered in parts.
pub fn takes_parts(header: &Header, style: Style) -> bool {
    header.command == command::WRITE || (style.chunks() && header.flags & flag::DF == 0)
}

impl Split {
    pub fn new(header: Header, part_length: usize) -> Split {
        Split {
            header,
            part_length: part_length as u64,
            begun: 0,
            running: false,
        }
    }

    pub fn is_read(&self) -> bool {
        self.header.command == command::READ
    }

    /// Whether a part is under way: one at a time.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// The next part, as a request.
    pub fn next(&self) -> Header {
        let length = (self.header.length - self.begun).min(self.part_length);
        let is_last = self.begun + length == self.header.length;
        // Done once, FUA is done for all: the parts before have been written when the last one is.
        let fua = if is_last { 0 } else { flag::FUA };
        let is_write = self.header.command == command::WRITE;
        Header {
            flags: self.header.flags & !fua,
            offset: self.header.offset + self.begun,
            length,
            payload: if is_write { length } else { 0 },
            ..self.header
        }
    }

    /// The next part has its memory.
    pub fn begin(&mut self) {
        assert!(!self.running);
        self.begun += self.next().length;
        self.running = true;
    }

    /// What the part that is under way is of the whole.
    pub fn part(&self) -> Part {
        Part {
            offset: self.header.offset,
            first: self.begun <= self.part_length,
            last: self.begun == self.header.length,
        }
    }

    /// The part under way has been answered. Whether another is to follow.
    pub fn ended(&mut self) -> bool {
        self.running = false;
        self.begun < self.header.length
    }

    /// Bytes of payload that no part will take in, after one has failed.
    pub fn unread(&self) -> u64 {
        if self.header.command == command::WRITE {
            self.header.length - self.begun
        } else {
            0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(command: u16, length: u64) -> Header {
        Header {
            flags: flag::FUA,
            command,
            cookie: 7,
            offset: 100,
            length,
            payload: length,
        }
    }

    #[test]
    fn parts_cover_the_whole_and_only_the_last_is_durable() {
        for (length, expected) in [
            (10, vec![(100, 4), (104, 4), (108, 2)]),
            (8, vec![(100, 4), (104, 4)]),
        ] {
            let mut split = Split::new(header(command::WRITE, length), 4);
            let mut parts = Vec::new();
            loop {
                let next = split.next();
                split.begin();
                assert!(split.is_running());
                let part = split.part();
                assert_eq!((part.offset, next.cookie), (100, 7));
                assert_eq!(part.first, parts.is_empty());
                assert_eq!(part.last, next.flags & flag::FUA != 0);
                assert_eq!(next.payload, next.length);
                parts.push((next.offset, next.length));
                assert_eq!(split.unread(), 100 + length - next.offset - next.length);
                if !split.ended() {
                    assert!(part.last);
                    break;
                }
            }
            assert_eq!(parts, expected);
        }
    }

    #[test]
    fn what_must_be_answered_in_one_piece_is_not_read_in_parts() {
        let mut read = header(command::READ, 10);
        assert!(!takes_parts(&read, Style::Simple));
        assert!(takes_parts(&read, Style::Structured));
        assert!(takes_parts(&read, Style::Extended));
        assert_eq!(Split::new(read, 4).unread(), 0);
        read.flags |= flag::DF;
        assert!(!takes_parts(&read, Style::Structured));
        assert!(takes_parts(&header(command::WRITE, 10), Style::Simple));
    }
}
