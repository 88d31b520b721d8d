//! Transfers: the file I/O of one request, whoever carries it out.
//!
//! A worker tries a transfer inline; what would block goes to the ring or to a thread of the pool; a fault thread
//! just blocks. All of them run this code, so that they cannot differ.

use std::ops::Range;
use std::sync::Arc;

use rustix::io::Errno;

use crate::engine::Files;
use crate::export::Place;
use crate::extents::Target;
use crate::file::File;
use crate::request::Request;
use crate::users::Use;

/// Holes shorter than this are sent as zeroes: a chunk of their own would cost more.
const HOLE_MIN: usize = 4096;

/// `range` of a request's memory to or from `offset` of `file`, whose place is in use as long as this lives.
pub struct Transfer {
    pub file: Arc<File>,
    pub offset: u64,
    pub range: Range<usize>,
    pub _usage: Option<Use>,
}

impl Transfer {
    /// Carry out what is left of it, blocking.
    pub fn run(&self, request: &Request, write: bool) -> Result<(), Errno> {
        if write {
            self.file
                .write(self.offset, &request.vector, self.range.clone())
        } else {
            self.file
                .read(self.offset, &request.vector, self.range.clone())
        }
    }

    /// Read what is in the page cache; true when that was all. What is left is then all that `range` says.
    pub fn read_nowait(&mut self, request: &Request) -> Result<bool, Errno> {
        while !self.range.is_empty() {
            let mut slices = request.vector.io_slices_mut(self.range.clone());
            let done = self.file.read_nowait(self.offset, &mut slices)?;
            if done == 0 {
                return Ok(false);
            }
            self.advance(done);
        }
        Ok(true)
    }

    pub fn advance(&mut self, done: usize) {
        self.offset += done as u64;
        self.range.start += done;
    }
}

/// The transfers for `places`, which lie one after the other from `start` of the request's memory. Zeroes of a read are
/// noted (or filled in) on the way. Ends at the first CODE; returns how many bytes of memory were dealt with.
pub fn plan(
    request: &mut Request,
    files: &Files,
    start: usize,
    places: Vec<Place>,
    transfers: &mut Vec<Transfer>,
) -> Result<usize, Errno> {
    let mut position = start;
    for place in places {
        let range = position..position + place.piece.length as usize;
        match place.piece.target {
            Target::Code => break,
            Target::Zero => note_zeroes(request, range.clone()),
            Target::File { file, offset, .. } => transfers.push(Transfer {
                // A file that is gone had its extents dropped first: to find one is our bug, but a client's
                // request is not where to crash for it.
                file: files.get(file).ok_or(Errno::BADF)?,
                offset,
                range: range.clone(),
                _usage: place.usage,
            }),
        }
        position = range.end;
    }
    Ok(position - start)
}

fn note_zeroes(request: &mut Request, range: Range<usize>) {
    if !request.takes_holes() || range.len() < HOLE_MIN {
        request.vector.zero(range);
        return;
    }
    match request.holes.last_mut() {
        Some((start, length)) if *start + *length == range.start => *length += range.len(),
        _ => request.holes.push((range.start, range.len())),
    }
}
