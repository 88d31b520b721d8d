//! Dirty bitmaps: which parts of a disk have been written; and dirty logs, which extents name.
//!
//! ```text
//! extent ──> log ──> bitmap, bitmap, ...     a write that has completed is marked in each, before it is answered
//! ```
//!
//! Bits lie in pages, which take memory only once some of their bits are set and some are not.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, OnceLock, RwLock};

const WORD_BITS: u64 = 64;
const PAGE_WORDS: usize = 512;
const PAGE_BITS: u64 = PAGE_WORDS as u64 * WORD_BITS;

type Words = Box<[AtomicU64]>;

#[derive(Default)]
struct Page {
    /// All of its bits that the bitmap has are set, whatever `words` say.
    full: AtomicBool,
    /// None: no bit is set.
    words: OnceLock<Words>,
}

impl Page {
    fn words(&self) -> &Words {
        self.words
            .get_or_init(|| (0..PAGE_WORDS).map(|_| AtomicU64::new(0)).collect())
    }

    fn word(&self, index: usize) -> u64 {
        if self.full.load(SeqCst) {
            return u64::MAX;
        }
        self.words
            .get()
            .map_or(0, |words| words[index].load(SeqCst))
    }

    fn set(&self, index: usize, mask: u64) {
        let word = &self.words()[index];
        // Most writes go where others went: that costs no exclusive cache line.
        if word.load(SeqCst) & mask != mask {
            word.fetch_or(mask, SeqCst);
        }
    }

    /// Set the bits from `first` up to `stop`.
    fn mark(&self, first: u64, stop: u64) {
        if self.full.load(SeqCst) {
            return;
        }
        for index in first / WORD_BITS..stop.div_ceil(WORD_BITS) {
            let start = index * WORD_BITS;
            self.set(
                index as usize,
                mask(first.saturating_sub(start), (stop - start).min(WORD_BITS)),
            );
        }
    }

    /// Whether all bits are alike, and set or not.
    fn uniform(&self) -> Option<bool> {
        if self.full.load(SeqCst) {
            return Some(true);
        }
        self.words.get().is_none().then_some(false)
    }
}

/// The bits of a word from `first` up to `stop` (at most 64).
fn mask(first: u64, stop: u64) -> u64 {
    let below = |bit: u64| 1u64.checked_shl(bit as u32).unwrap_or(0).wrapping_sub(1);
    below(stop) & !below(first)
}

struct Bits {
    /// The disk's size, bytes.
    size: u64,
    count: u64,
    pages: Vec<Page>,
}

impl Bits {
    fn new(size: u64, count: u64) -> Bits {
        let pages = count.div_ceil(PAGE_BITS) as usize;
        Bits {
            size,
            count,
            pages: (0..pages).map(|_| Page::default()).collect(),
        }
    }

    /// The bits that page `number` has.
    fn in_page(&self, number: usize) -> u64 {
        (self.count - number as u64 * PAGE_BITS).min(PAGE_BITS)
    }

    /// Word `index` of all, without bits that the bitmap does not have.
    fn word(&self, index: u64) -> u64 {
        let Some(left) = self.count.checked_sub(index * WORD_BITS) else {
            return 0;
        };
        let (page, at) = (index as usize / PAGE_WORDS, index as usize % PAGE_WORDS);
        match self.pages.get(page) {
            Some(page) => page.word(at) & mask(0, left.min(WORD_BITS)),
            None => 0,
        }
    }

    fn mark(&self, first: u64, stop: u64) {
        let mut at = first;
        while at < stop {
            let number = (at / PAGE_BITS) as usize;
            let start = number as u64 * PAGE_BITS;
            let end = (stop - start).min(PAGE_BITS);
            let page = &self.pages[number];
            if at == start && end == self.in_page(number) {
                page.full.store(true, SeqCst);
            } else {
                page.mark(at - start, end);
            }
            at = start + end;
        }
    }

    /// The first bit from `at` up to `stop` that is not `value`; `stop` if there is none.
    fn find_other(&self, mut at: u64, stop: u64, value: bool) -> u64 {
        while at < stop {
            let number = (at / PAGE_BITS) as usize;
            let next = match self.pages[number].uniform() {
                Some(found) if found == value => (number as u64 + 1) * PAGE_BITS,
                Some(_) => return at,
                None => {
                    let word = self.word(at / WORD_BITS);
                    let other = (if value { !word } else { word }) & !mask(0, at % WORD_BITS);
                    if other != 0 {
                        let found = at / WORD_BITS * WORD_BITS + u64::from(other.trailing_zeros());
                        return found.min(stop);
                    }
                    (at / WORD_BITS + 1) * WORD_BITS
                }
            };
            at = next;
        }
        stop
    }

    fn is_set(&self, bit: u64) -> bool {
        self.word(bit / WORD_BITS) >> (bit % WORD_BITS) & 1 == 1
    }
}

/// A bit for each `granularity` bytes of a disk. Thread-safe; a bit that is being set while others are looked at counts
/// as either.
pub struct Bitmap {
    /// The granularity's logarithm.
    shift: u32,
    bits: RwLock<Bits>,
}

impl Bitmap {
    /// All clear; `granularity` in bytes, a power of two.
    pub fn new(size: u64, granularity: u64) -> Bitmap {
        assert!(granularity.is_power_of_two());
        let shift = granularity.trailing_zeros();
        Bitmap {
            shift,
            bits: RwLock::new(Bits::new(size, size.div_ceil(granularity))),
        }
    }

    pub fn granularity(&self) -> u64 {
        1 << self.shift
    }

    pub fn size(&self) -> u64 {
        self.bits.read().unwrap().size
    }

    /// Set the bits of all that the range touches; what passes the end has none.
    pub fn mark(&self, offset: u64, length: u64) {
        let bits = self.bits.read().unwrap();
        let end = offset.saturating_add(length).min(bits.size);
        if offset < end {
            bits.mark(offset >> self.shift, ((end - 1) >> self.shift) + 1);
        }
    }

    /// Set the bits that are set in `other`, whose granularity may be another.
    pub fn merge(&self, other: &Bitmap) {
        if std::ptr::eq(self, other) {
            return;
        }
        let (bits, from) = (self.bits.read().unwrap(), other.bits.read().unwrap());
        let stop = from.count;
        let mut at = from.find_other(0, stop, false);
        while at < stop {
            let end = from.find_other(at, stop, true);
            let first = at << other.shift >> self.shift;
            let last = (((end - 1) << other.shift) | (other.granularity() - 1)) >> self.shift;
            bits.mark(first.min(bits.count), (last + 1).min(bits.count));
            at = from.find_other(end, stop, false);
        }
    }

    /// Clear every bit.
    pub fn clear(&self) {
        let mut bits = self.bits.write().unwrap();
        *bits = Bits::new(bits.size, bits.count);
    }

    /// The disk has another size: bits of what it grows by are clear, those of what it loses are forgotten.
    pub fn resize(&self, size: u64) {
        let mut bits = self.bits.write().unwrap();
        let resized = Bits::new(size, size.div_ceil(self.granularity()));
        let mut old = std::mem::replace(&mut *bits, resized);
        let kept = old.count.min(bits.count);
        let whole = (kept / PAGE_BITS) as usize;
        for number in 0..whole {
            bits.pages[number] = std::mem::take(&mut old.pages[number]);
        }
        // What is said of the page in which one of them ends may not hold: its bits are set anew.
        let mut at = old.find_other(whole as u64 * PAGE_BITS, kept, false);
        while at < kept {
            let end = old.find_other(at, kept, true);
            bits.mark(at, end);
            at = old.find_other(end, kept, false);
        }
    }

    /// How many bits are set.
    pub fn count(&self) -> u64 {
        let bits = self.bits.read().unwrap();
        let pages = bits.pages.iter().enumerate();
        let counted = pages.map(|(number, page)| match page.uniform() {
            Some(true) => bits.in_page(number),
            Some(false) => 0,
            None => {
                let first = (number * PAGE_WORDS) as u64;
                let words = first..first + PAGE_WORDS as u64;
                words
                    .map(|word| u64::from(bits.word(word).count_ones()))
                    .sum()
            }
        });
        counted.sum()
    }

    /// (length, is dirty) runs from `offset` on that cover the range, neighbours unlike; but at most `count_max` of them.
    /// What passes the end is clean.
    pub fn runs(&self, offset: u64, length: u64, count_max: usize) -> Vec<(u64, bool)> {
        let bits = self.bits.read().unwrap();
        let end = offset.saturating_add(length);
        let mut runs: Vec<(u64, bool)> = Vec::new();
        let mut at = offset;
        while at < end && runs.len() < count_max {
            let bit = at >> self.shift;
            let dirty = at < bits.size && bits.is_set(bit);
            let other = if at < bits.size {
                bits.find_other(bit, bits.count, dirty)
            } else {
                bits.count
            };
            let edge = (u128::from(other) << self.shift).min(u128::from(bits.size)) as u64;
            let next = if other == bits.count && !dirty {
                end
            } else {
                edge.min(end)
            };
            runs.push((next - at, dirty));
            at = next;
        }
        runs
    }

    /// `length` bytes from byte `start` on (multiples of 8) of the bits in a row, eight a byte, the lowest bit first.
    pub fn data(&self, start: u64, length: usize) -> Vec<u8> {
        let bits = self.bits.read().unwrap();
        let first = start / 8;
        let words = first..first + length as u64 / 8;
        words
            .flat_map(|word| bits.word(word).to_le_bytes())
            .collect()
    }

    /// Set the bits that are set in `data`, which lies as `data` gives it.
    pub fn load(&self, start: u64, data: &[u8]) {
        let bits = self.bits.read().unwrap();
        for (index, bytes) in (start / 8..).zip(data.chunks_exact(8)) {
            let value = u64::from_le_bytes(bytes.try_into().expect("a chunk of eight"));
            if let Some(page) = bits.pages.get(index as usize / PAGE_WORDS)
                && value != 0
            {
                page.set(index as usize % PAGE_WORDS, value);
            }
        }
    }
}

/// The bitmaps that writes to a layer are marked in. Extents name it, and where it counts from.
#[derive(Default)]
pub struct Log {
    bitmaps: RwLock<Vec<Arc<Bitmap>>>,
}

impl Log {
    /// Mark in these from now on, and in no others.
    pub fn set(&self, bitmaps: Vec<Arc<Bitmap>>) {
        *self.bitmaps.write().unwrap() = bitmaps;
    }

    pub fn mark(&self, offset: u64, length: u64) {
        crate::points::reached("log.mark");
        for bitmap in self.bitmaps.read().unwrap().iter() {
            bitmap.mark(offset, length);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    /// A bit a granule, the simplest way.
    struct Model {
        size: u64,
        granularity: u64,
        bits: Vec<bool>,
    }

    impl Model {
        fn new(size: u64, granularity: u64) -> Model {
            let bits = vec![false; size.div_ceil(granularity) as usize];
            Model {
                size,
                granularity,
                bits,
            }
        }

        fn mark(&mut self, offset: u64, length: u64) {
            for byte_run in offset / self.granularity..(offset + length).div_ceil(self.granularity)
            {
                if let Some(bit) = self.bits.get_mut(byte_run as usize) {
                    *bit = true;
                }
            }
        }

        fn is_dirty(&self, offset: u64) -> bool {
            offset < self.size && self.bits[(offset / self.granularity) as usize]
        }

        fn resize(&mut self, size: u64) {
            self.size = size;
            self.bits
                .resize(size.div_ceil(self.granularity) as usize, false);
        }
    }

    fn compare(bitmap: &Bitmap, model: &Model, random: &mut Random) {
        let count = model.bits.iter().filter(|bit| **bit).count() as u64;
        assert_eq!(bitmap.count(), count);
        assert_eq!(bitmap.size(), model.size);
        let offset = random.below(model.size);
        let length = 1 + random.below(5000);
        let count_max = 1 + random.below(20) as usize;
        let runs = bitmap.runs(offset, length, count_max);
        let mut at = offset;
        for (length, dirty) in &runs {
            assert!(*length > 0);
            for byte in (at..at + length).step_by(model.granularity as usize) {
                assert_eq!(model.is_dirty(byte), *dirty, "at {byte}");
            }
            assert_eq!(model.is_dirty(at + length - 1), *dirty);
            at += length;
        }
        assert!(at == offset + length || (runs.len() == count_max && at < offset + length));
        assert!(runs.windows(2).all(|pair| pair[0].1 != pair[1].1));
        let start = random.below(model.bits.len() as u64) / 64 * 8;
        let data = bitmap.data(start, 64);
        for (index, byte) in data.iter().enumerate() {
            for bit in 0..8 {
                let known = model.bits.get(start as usize * 8 + index * 8 + bit);
                assert_eq!(byte >> bit & 1 == 1, known == Some(&true));
            }
        }
    }

    #[test]
    fn equals_the_model() {
        for seed in 0..20 {
            let mut random = Random(seed);
            let granularity = 1 << random.below(3);
            let size = 1 + random.below(3 * PAGE_BITS);
            let bitmap = Bitmap::new(size, granularity);
            let mut model = Model::new(size, granularity);
            for _ in 0..30 {
                let (offset, length) = (random.below(model.size), 1 + random.below(model.size));
                match random.below(12) {
                    0 => {
                        let size = 1 + random.below(3 * PAGE_BITS);
                        bitmap.resize(size);
                        model.resize(size);
                    }
                    1 => {
                        bitmap.clear();
                        model.bits.fill(false);
                    }
                    2 => {
                        let start = random.below(model.bits.len() as u64) / 64 * 8;
                        let data: Vec<u8> = (0..64).map(|_| random.below(256) as u8).collect();
                        bitmap.load(start, &data);
                        for (index, byte) in data.iter().enumerate() {
                            for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
                                if let Some(known) =
                                    model.bits.get_mut((start as usize + index) * 8 + bit)
                                {
                                    *known = true;
                                }
                            }
                        }
                    }
                    3..6 => {
                        bitmap.mark(offset, length);
                        model.mark(offset, length);
                    }
                    6 => {
                        let other = Bitmap::new(model.size, 1 << random.below(4));
                        other.mark(offset, 1 + random.below(100));
                        bitmap.merge(&other);
                        let mut at = 0;
                        for (length, dirty) in other.runs(0, model.size, 1000) {
                            if dirty {
                                model.mark(at, length);
                            }
                            at += length;
                        }
                    }
                    _ => {
                        bitmap.mark(offset, 1 + length % 7);
                        model.mark(offset, 1 + length % 7);
                    }
                }
                compare(&bitmap, &model, &mut random);
            }
        }
    }

    #[test]
    fn a_large_bitmap_that_is_empty_or_full_takes_little_memory() {
        let bitmap = Bitmap::new(64 << 40, 65536);
        assert_eq!(bitmap.count(), 0);
        bitmap.mark(0, u64::MAX);
        assert_eq!(bitmap.count(), 1 << 30);
        let bits = bitmap.bits.read().unwrap();
        assert!(bits.pages.iter().all(|page| page.words.get().is_none()));
        drop(bits);
        assert_eq!(
            bitmap.runs(4096, 1 << 50, 9),
            [
                ((64 << 40) - 4096, true),
                ((1 << 50) - (64 << 40) + 4096, false)
            ]
        );
    }

    #[test]
    fn a_log_marks_in_all_its_bitmaps() {
        let bitmaps: Vec<_> = [512, 4096]
            .map(|granularity| Arc::new(Bitmap::new(1 << 20, granularity)))
            .into();
        let log = Log::default();
        log.mark(0, 512);
        log.set(bitmaps.clone());
        log.mark(8191, 2);
        assert_eq!(
            bitmaps[0].runs(0, 1 << 20, 2),
            [(7680, false), (1024, true)]
        );
        assert_eq!(
            bitmaps[1].runs(0, 1 << 20, 2),
            [(4096, false), (8192, true)]
        );
    }
}
