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
use std::time::Duration;

use rustix::io::Errno;

use crate::file::File;
use crate::pool::Pool;
use crate::vector::Vector;

/// A padded transfer is carried out in pieces of at most this: bounce buffers are few.
const CHUNK: u64 = 1 << 20;
/// How long to wait for a bounce buffer before asking again: others will give theirs back.
const PAUSE: Duration = Duration::from_millis(1);

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

/// Memory of the pool for a bounce buffer, waiting for it.
pub fn bounce(pool: &Arc<Pool>, length: usize) -> Vector {
    loop {
        if let Some(slots) = pool.allocate_bounce(length) {
            return Vector::new(slots);
        }
        std::thread::sleep(PAUSE);
    }
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
        let buffer = bounce(pool, (padded.end - padded.start) as usize);
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
        let buffer = bounce(pool, (padded.end - padded.start) as usize);
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
