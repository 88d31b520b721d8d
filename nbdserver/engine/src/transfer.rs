//! Transfers: the file I/O of one request, whoever carries it out.
//!
//! A worker tries a transfer inline; what would block goes to the ring or to a thread of the pool; a fault thread
//! just blocks. All of them run this code, so that they cannot differ.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use crate::connection::Cached;
use crate::dirty::Log;
use crate::engine::Engine;
use crate::export::Place;
use crate::extents::{Piece, Target, Through};
use crate::file::File;
use crate::request::Request;
use crate::serial::Span;
use crate::transform::Transform;
use crate::users::Use;
use crate::wire::command;

/// Holes shorter than a sector are sent as zeroes: a chunk of their own would cost more. qemu-nbd sends all others as holes.
const HOLE_MIN: usize = 512;

/// `range` of a request's memory to or from `offset` of `file`, whose place is in use as long as this lives.
pub struct Transfer {
    pub file: Arc<File>,
    /// What is left to do.
    pub offset: u64,
    pub range: Range<usize>,
    crypt: Option<Crypt>,
    mark: Option<Mark>,
    /// Held while a ring writes with direct I/O: no read-modify-write of its blocks meanwhile.
    span: Option<Span>,
    _usage: Option<Use>,
}

/// A transform of the whole of a transfer.
struct Crypt {
    transform: Arc<Transform>,
    position: u64,
    range: Range<usize>,
}

/// What a write marks where.
struct Mark {
    log: Arc<Log>,
    position: u64,
    length: u64,
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
            let range = self.file.at_once(self.range.clone());
            let mut slices = request.vector.io_slices_mut(range);
            let done = self.file.read_nowait(self.offset, &mut slices)?;
            if done == 0 {
                return Ok(false);
            }
            self.advance(done);
        }
        Ok(true)
    }

    /// The `length` bytes of a whole request, if one transfer takes them all, they leave as they are, and are in the page
    /// cache.
    pub fn cached(&self, length: usize) -> Option<Cached> {
        let whole = self.range == (0..length) && self.file.at_once(0..length) == (0..length);
        (whole && self.crypt.is_none() && self.file.is_cached(self.offset, length)).then(|| {
            Cached {
                file: self.file.clone(),
                offset: self.offset,
                length,
            }
        })
    }

    /// Whether a ring can carry it out: not what direct I/O has to pad, nor a write where something is padded now.
    pub fn takes_ring(&mut self, request: &Request, write: bool) -> bool {
        if !self
            .file
            .suits(self.offset, &request.vector, self.range.clone())
        {
            return false;
        }
        if write && self.file.direct.is_some() {
            self.span = self
                .file
                .serial
                .try_share(self.offset..self.offset + self.range.len() as u64);
            return self.span.is_some();
        }
        true
    }

    /// It goes to a thread after all, which holds what it needs itself.
    pub fn leave_ring(&mut self) {
        self.span = None;
    }

    pub fn advance(&mut self, done: usize) {
        self.offset += done as u64;
        self.range.start += done;
    }
}

/// Before any part of a write is carried out. The memory is the request's own and nobody wants it back, so it is
/// transformed where it is.
pub fn prepare_write(request: &Request, transfers: &[Transfer]) -> Result<(), Errno> {
    for crypt in transfers
        .iter()
        .filter_map(|transfer| transfer.crypt.as_ref())
    {
        let Crypt {
            transform,
            position,
            range,
        } = crypt;
        transform
            .encrypt(*position, &request.vector, range.clone())
            .map_err(|_| Errno::IO)?;
    }
    Ok(())
}

/// After all of a read has been carried out.
pub fn finish_read(request: &Request, transfers: &[Transfer]) -> Result<(), Errno> {
    for crypt in transfers
        .iter()
        .filter_map(|transfer| transfer.crypt.as_ref())
    {
        let Crypt {
            transform,
            position,
            range,
        } = crypt;
        transform
            .decrypt(*position, &request.vector, range.clone())
            .map_err(|_| Errno::IO)?;
    }
    Ok(())
}

/// A write has been carried out: mark it in its dirty logs, before it is answered, and before its places count as unused,
/// for who waits for that may rely on it. Also if it has failed: it may have been done in part.
pub fn mark(transfers: &[Transfer]) {
    for mark in transfers
        .iter()
        .filter_map(|transfer| transfer.mark.as_ref())
    {
        mark.log.mark(mark.position, mark.length);
    }
}

/// Carry out transfers, blocking.
pub fn run_all(request: &Request, transfers: &[Transfer], write: bool) -> Result<(), Errno> {
    if !write {
        transfers
            .iter()
            .try_for_each(|transfer| transfer.run(request, write))?;
        return finish_read(request, transfers);
    }
    prepare_write(request, transfers)?;
    let result = transfers
        .iter()
        .try_for_each(|transfer| transfer.run(request, write));
    mark(transfers);
    result
}

/// Whether a piece, which begins at `start` of a request's memory, is not for transfers: CODE, or part of a sector under
/// a transform.
pub fn is_code(engine: &Engine, piece: &Piece, start: usize) -> bool {
    if piece.target == Target::Code {
        return true;
    }
    let Through {
        transform,
        position,
        ..
    } = piece.through;
    transform != 0
        && engine.effects.transform(transform).is_none_or(|transform| {
            !transform.takes(position, piece.length as usize) || !transform.takes(start as u64, 0)
        })
}

/// The transfers for `places`, which lie one after the other from `start` of the request's memory. Zeroes of a read are
/// noted (or filled in) on the way. Ends at the first CODE; returns how many bytes of memory were dealt with.
pub fn plan(
    request: &mut Request,
    engine: &Engine,
    start: usize,
    places: Vec<Place>,
    transfers: &mut Vec<Transfer>,
) -> Result<usize, Errno> {
    let write = request.header.command == command::WRITE;
    let mut position = start;
    for place in places {
        if is_code(engine, &place.piece, position) {
            break;
        }
        let range = position..position + place.piece.length as usize;
        match place.piece.target {
            Target::Code => unreachable!("the first CODE ends the plan"),
            Target::Zero => note_zeroes(request, range.clone()),
            Target::File { file, offset, .. } => {
                let Through {
                    transform,
                    position,
                    log,
                    log_position,
                    ..
                } = place.piece.through;
                let log = engine.effects.log(log).filter(|_| write);
                let mark = log.map(|log| Mark {
                    log,
                    position: log_position,
                    length: place.piece.length,
                });
                let crypt = engine.effects.transform(transform);
                let crypt = crypt.map(|transform| Crypt {
                    transform,
                    position,
                    range: range.clone(),
                });
                transfers.push(Transfer {
                    // A file that is gone had its extents dropped first: to find one is our bug, but a client's
                    // request is not where to crash for it.
                    file: engine.files.get(file).ok_or(Errno::BADF)?,
                    offset,
                    range: range.clone(),
                    crypt,
                    mark,
                    span: None,
                    _usage: place.usage,
                });
            }
        }
        position = range.end;
    }
    Ok(position - start)
}

/// Charge the meters on the way to `pieces` for a request, those first that have not been charged yet (`charged` counts
/// them). Err: how long to wait before going on.
pub fn charge<'a>(
    engine: &Engine,
    pieces: impl Iterator<Item = &'a Piece>,
    write: bool,
    charged: &mut u32,
) -> Result<(), Duration> {
    let mut sets: Vec<(u32, u64)> = Vec::new();
    for piece in pieces.filter(|piece| piece.through.meters != 0) {
        match sets
            .iter_mut()
            .find(|(set, _)| *set == piece.through.meters)
        {
            Some((_, length)) => *length += piece.length,
            None => sets.push((piece.through.meters, piece.length)),
        }
    }
    let mut number = 0;
    for (set, length) in sets {
        for meter in engine.effects.meters(set).iter().flat_map(|set| set.iter()) {
            number += 1;
            if number > *charged {
                meter.take(length, write)?;
                *charged = number;
            }
        }
    }
    Ok(())
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
