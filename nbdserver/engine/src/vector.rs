//! A request's memory: chunks of the pool (or ordinary memory), addressed as one range of bytes.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Arc;

use crate::pool::Slot;

/// The memory of one request. Slots are shared with Python's memoryviews where a layer is called.
#[derive(Clone, Default)]
pub struct Vector {
    segments: Vec<(Arc<Slot>, Range<usize>)>,
    length: usize,
}

impl Vector {
    pub fn new(slots: Vec<Slot>) -> Vector {
        let whole = |slot: Slot| {
            let range = 0..slot.len();
            (Arc::new(slot), range)
        };
        Vector::of(slots.into_iter().map(whole).collect())
    }

    /// The given parts of slots, one after the other.
    pub fn of(segments: Vec<(Arc<Slot>, Range<usize>)>) -> Vector {
        let length = segments.iter().map(|(_, range)| range.len()).sum();
        Vector { segments, length }
    }

    pub fn len(&self) -> usize {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Whether any of it is memory of the pool.
    pub fn is_pooled(&self) -> bool {
        self.segments
            .iter()
            .any(|(slot, _)| slot.pool_offset().is_some())
    }

    /// The parts of the slots that make up `range`, in order.
    pub fn parts(&self, range: Range<usize>) -> impl Iterator<Item = (&Arc<Slot>, Range<usize>)> {
        assert!(range.start <= range.end && range.end <= self.length);
        let mut base = 0;
        self.segments.iter().filter_map(move |(slot, segment)| {
            let start = range.start.max(base) - base;
            let end = range.end.min(base + segment.len()).saturating_sub(base);
            base += segment.len();
            (start < end).then(|| (slot, segment.start + start..segment.start + end))
        })
    }

    pub fn io_slices(&self, range: Range<usize>) -> Vec<IoSlice<'_>> {
        self.parts(range)
            .map(|(slot, part)| IoSlice::new(slot.slice(part)))
            .collect()
    }

    pub fn io_slices_mut(&self, range: Range<usize>) -> Vec<IoSliceMut<'_>> {
        self.parts(range)
            .map(|(slot, part)| IoSliceMut::new(slot.slice_mut(part)))
            .collect()
    }

    /// A copy of the bytes of `range`.
    pub fn to_vec(&self, range: Range<usize>) -> Vec<u8> {
        self.parts(range)
            .flat_map(|(slot, part)| slot.slice(part))
            .copied()
            .collect()
    }

    pub fn zero(&self, range: Range<usize>) {
        for (slot, part) in self.parts(range) {
            slot.slice_mut(part).fill(0);
        }
    }

    /// Copy `data` in from `start`.
    pub fn fill(&self, start: usize, mut data: &[u8]) {
        for (slot, part) in self.parts(start..start + data.len()) {
            let (now, rest) = data.split_at(part.len());
            slot.slice_mut(part).copy_from_slice(now);
            data = rest;
        }
    }
}
