//! Direct I/O: what O_DIRECT asks for (aligned offsets, lengths and memory), and what is done for requests that are not so.
//!
//! ```text
//!            |........block........|........block........|........block........|
//! request          [==================================]
//! padded     [head |                                  | tail]     read, changed, written: alone on its blocks
//! ```
//!
//! Bounce buffers come from the pool, so that a padded transfer is still fixed-buffer I/O.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use rustix::io::Errno;

use crate::file::File;
use crate::pool::Pool;
use crate::vector::Vector;

/// A padded transfer is carried out in pieces of at most this: bounce buffers are few.
const CHUNK: u64 = 1 << 20;

/// What a file wants of direct I/O, bytes; powers of two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Alignment {
    pub memory: usize,
    pub block: u64,
}

impl Alignment {
    /// Whether `range` of `vector` may be transferred at `offset` as it is.
    pub fn suits(&self, offset: u64, vector: &Vector, range: Range<usize>) -> bool {
        offset.is_multiple_of(self.block)
            && vector.parts(range).all(|(slot, part)| {
                (part.len() as u64).is_multiple_of(self.block)
                    && (slot.as_ptr() as usize + part.start).is_multiple_of(self.memory)
            })
    }

    /// The blocks that `range` of the file touches.
    pub fn pad(&self, range: Range<u64>) -> Range<u64> {
        let end = range.end.div_ceil(self.block).saturating_mul(self.block);
        range.start - range.start % self.block..end
    }
}

/// Memory for a bounce buffer, of the pool if it can be. Whoever asks may be alone on blocks that others wait for, and those
/// may hold the memory: so nobody waits for it.
pub fn bounce(pool: &Arc<Pool>, length: usize) -> Result<Vector, Errno> {
    pool.allocate_bounce(length)
        .map(Vector::new)
        .ok_or(Errno::NOMEM)
}

/// The same in pieces of whole blocks each, which where blocks are longer than pages those of the pool need not be.
fn bounce_blocks(pool: &Arc<Pool>, length: usize, alignment: Alignment) -> Result<Vector, Errno> {
    let buffer = bounce(pool, length)?;
    if alignment.suits(0, &buffer, 0..length) {
        return Ok(buffer);
    }
    let slots = pool.allocate_ordinary_bounce(length);
    slots.map(Vector::new).ok_or(Errno::NOMEM)
}

/// Copy `length` bytes from `start` of `from` to `at` of `to`.
fn copy(from: &Vector, start: usize, to: &Vector, at: usize, length: usize) {
    let mut position = at;
    for slice in from.io_slices(start..start + length) {
        to.fill(position, &slice);
        position += slice.len();
    }
}

/// Read what is not aligned, by way of a bounce buffer.
pub fn read_padded(
    file: &File,
    pool: &Arc<Pool>,
    alignment: Alignment,
    offset: u64,
    vector: &Vector,
    range: Range<usize>,
) -> Result<(), Errno> {
    let end = offset + range.len() as u64;
    let mut at = offset;
    while at < end {
        let until = end.min(at - at % alignment.block + CHUNK);
        let padded = alignment.pad(at..until);
        let buffer = bounce_blocks(pool, (padded.end - padded.start) as usize, alignment)?;
        file.read_aligned(padded.start, &buffer, 0..buffer.len())?;
        let start = range.start + (at - offset) as usize;
        let skip = (at - padded.start) as usize;
        copy(&buffer, skip, vector, start, (until - at) as usize);
        file.counters.bounced.fetch_add(until - at, Relaxed);
        at = until;
    }
    Ok(())
}

/// Write what is not aligned: read the blocks at its ends, change them, write all. The caller is alone on them.
pub fn write_padded(
    file: &File,
    pool: &Arc<Pool>,
    alignment: Alignment,
    offset: u64,
    vector: &Vector,
    range: Range<usize>,
) -> Result<(), Errno> {
    let end = offset + range.len() as u64;
    let block = alignment.block as usize;
    let mut at = offset;
    while at < end {
        let until = end.min(at - at % alignment.block + CHUNK);
        let padded = alignment.pad(at..until);
        let buffer = bounce_blocks(pool, (padded.end - padded.start) as usize, alignment)?;
        if at != padded.start {
            file.read_aligned(padded.start, &buffer, 0..block)?;
        }
        if until != padded.end && (at == padded.start || buffer.len() > block) {
            let last = padded.end - alignment.block;
            file.read_aligned(last, &buffer, buffer.len() - block..buffer.len())?;
        }
        let start = range.start + (at - offset) as usize;
        let skip = (at - padded.start) as usize;
        copy(vector, start, &buffer, skip, (until - at) as usize);
        file.counters.bounced.fetch_add(until - at, Relaxed);
        file.write_aligned(padded.start, &buffer, 0..buffer.len())?;
        at = until;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::{BLOCK, PAGE};

    #[test]
    fn bounces_are_in_pieces_of_whole_blocks() {
        let pool = Pool::new(8 * BLOCK).expect("a memfd");
        let pages = std::iter::from_fn(|| pool.allocate(PAGE)).flatten();
        // Every other page is kept: nothing but single pages is free.
        let mut pages: Vec<_> = pages.collect();
        pages.sort_by_key(|page| page.pool_offset());
        let _kept: Vec<_> = pages.into_iter().step_by(2).collect();
        let _reserve = pool.allocate_bounce(BLOCK).expect("the reserve");
        for (block, pieces) in [(512, 16), (4096, 16), (16384, 1)] {
            let alignment = Alignment { memory: 512, block };
            let buffer = bounce_blocks(&pool, 16 * PAGE, alignment).expect("memory");
            assert_eq!(buffer.parts(0..buffer.len()).count(), pieces);
            assert!(alignment.suits(0, &buffer, 0..buffer.len()));
        }
    }

    #[test]
    fn blocks_are_padded_to() {
        let alignment = Alignment {
            memory: 512,
            block: 4096,
        };
        for (range, padded) in [
            (0..1, 0..4096),
            (4095..4097, 0..8192),
            (4096..8192, 4096..8192),
        ] {
            assert_eq!(alignment.pad(range), padded);
        }
    }
}
