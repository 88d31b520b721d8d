//! The extent cache of one export: the TLB of the layer graph.
//!
//! ```text
//! disk range  ->  (file, offset, writable) | Zero | Code
//! ```
//!
//! A fault resolves a range in Python and *fills* it in; a layer whose mapping changes says
//! *changed*, which drops. The two race, and the cache is where the race is decided: a fill names
//! the sequence number it began at, and of what it brings every byte that has changed since is cut
//! out. So nothing in the cache is ever older than the last change of its range.
//!
//! Where every cluster is apart from those beside it there would be an entry for each. So a layer may
//! give a table of its own as it is, packed, a word for each cluster, and what is in a word.
//!
//! What a lookup answers may be used only by one who became a user of the place (see `users`)
//! and found the range unchanged since.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

/// Which of the engine's open files.
pub type FileId = u32;

/// Changes that are remembered, so that fills which began before them can still be judged. A fill
/// takes milliseconds and a layer changes some thousand clusters a second; one that is overtaken
/// by more changes than this is resolved again.
const HISTORY_MAX: usize = 1024;

/// Where bytes of the disk live.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// At `offset` of a file; `writable`: they may be overwritten there with no metadata change.
    File {
        file: FileId,
        offset: u64,
        writable: bool,
    },
    /// Nowhere: they read as zeroes.
    Zero,
    /// Only the layer's code knows.
    Code,
}

impl Target {
    pub fn is_writable(self) -> bool {
        matches!(self, Target::File { writable: true, .. })
    }

    /// The same place, with this permission. Nothing but a file's place ever has it.
    fn with_writable(mut self, permission: bool) -> Target {
        if let Target::File { writable, .. } = &mut self {
            *writable = permission;
        }
        self
    }

    /// Where what lies `distance` bytes further on lives; None past the end of the address space.
    fn advanced(mut self, distance: u64) -> Option<Target> {
        if let Target::File { offset, .. } = &mut self {
            *offset = offset.checked_add(distance)?;
        }
        Some(self)
    }
}

/// What happens to requests on the way to a place, as numbers of the engine's tables; 0 is nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Through {
    pub transform: u32,
    /// Where the piece begins in the space that the transform counts in.
    pub position: u64,
    pub meters: u32,
    /// The dirty log that writes are marked in.
    pub log: u32,
    /// Where the piece begins in the space that the log counts in.
    pub log_position: u64,
}

impl Through {
    /// The same, `distance` bytes further on; None past the end of the address space.
    fn advanced(mut self, distance: u64) -> Option<Through> {
        if self.transform != 0 {
            self.position = self.position.checked_add(distance)?;
        }
        if self.log != 0 {
            self.log_position = self.log_position.checked_add(distance)?;
        }
        Some(self)
    }
}

/// `length` bytes of the disk that live at `target`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    pub length: u64,
    pub target: Target,
    pub through: Through,
}

impl Piece {
    /// The part from `start` up to `end`, both counted from the piece's begin and within it.
    fn cut(&self, start: u64, end: u64) -> Piece {
        let part = self.advanced(start);
        let part = part.expect("a place was checked when it was entered");
        Piece {
            length: end - start,
            ..part
        }
    }

    /// A piece of this length that begins `distance` bytes further on, if there can be one.
    fn advanced(&self, distance: u64) -> Option<Piece> {
        Some(Piece {
            length: self.length,
            target: self.target.advanced(distance)?,
            through: self.through.advanced(distance)?,
        })
    }

    /// Whether `next`, which follows on the disk, just continues this piece.
    fn continues_at(&self, next: &Piece) -> bool {
        self.advanced(self.length).is_some_and(|expected| {
            expected.target == next.target && expected.through == next.through
        })
    }

    /// The same, with this permission to write.
    fn with_writable(self, permission: bool) -> Piece {
        Piece {
            target: self.target.with_writable(permission),
            ..self
        }
    }
}

/// What a packed table of places says, word by word; `Table` is made of it. Whoever packs gives words of any layout of its
/// own, and says here what is in them.
#[derive(Clone, Debug)]
pub struct Packing {
    /// Bytes of the disk that a word is of, a power of two of at least 4, and what places are multiples of.
    pub unit: u64,
    pub file: FileId,
    /// Where in a word its place is. A word with one of the bits `refused` names none, and so does a place of 0.
    pub places: u64,
    pub refused: u64,
    /// The words that with one of these masks have its value are zeroes.
    pub zeroes: Vec<(u64, u64)>,
    /// Places end here at the latest.
    pub limit: u64,
}

/// Places of many units in a row, a word each.
struct Table {
    unit: u64,
    file: FileId,
    /// UNKNOWN, ZERO, or a place and PLACED.
    words: Box<[u64]>,
}

const UNKNOWN: u64 = 0;
const ZERO: u64 = 1;
const PLACED: u64 = 2;
/// Words that take up about as much memory as an entry. A table of fewer runs than that is entered as pieces.
const WORDS_PER_ENTRY: usize = 10;

impl Table {
    fn new(packing: &Packing, words: &[u64]) -> Table {
        let decode = |word: &u64| {
            let place = word & packing.places;
            let fits = place
                .checked_add(packing.unit)
                .is_some_and(|end| end <= packing.limit);
            let named = place != 0 && place.is_multiple_of(packing.unit) && fits;
            if packing
                .zeroes
                .iter()
                .any(|(mask, value)| word & mask == *value)
            {
                ZERO
            } else if word & packing.refused == 0 && named {
                place | PLACED
            } else {
                UNKNOWN
            }
        };
        Table {
            unit: packing.unit,
            file: packing.file,
            words: words.iter().map(decode).collect(),
        }
    }

    fn length(&self) -> u64 {
        self.unit * self.words.len() as u64
    }

    fn weight(&self) -> usize {
        self.words.len() / WORDS_PER_ENTRY
    }

    /// Which piece, if any is known, `position` bytes from the table's start is in, from there on.
    fn piece(&self, position: u64) -> Option<Piece> {
        let skip = position % self.unit;
        let target = self.target(*self.words.get((position / self.unit) as usize)?)?;
        Some(Piece {
            length: self.unit - skip,
            target: target.advanced(skip)?,
            through: Through::default(),
        })
    }

    fn target(&self, word: u64) -> Option<Target> {
        match word {
            UNKNOWN => None,
            ZERO => Some(Target::Zero),
            _ => Some(Target::File {
                file: self.file,
                offset: word & !PLACED,
                writable: false,
            }),
        }
    }

    /// How many words from `index` on are one extent: they continue one another, or are all unknown.
    fn run(&self, index: usize) -> usize {
        let step = if self.words[index] & PLACED == 0 {
            0
        } else {
            self.unit
        };
        let pairs = self.words[index..].windows(2);
        1 + pairs
            .take_while(|pair| pair[0].checked_add(step) == Some(pair[1]))
            .count()
    }

    /// Forget the units that the bytes from `start` up to `end` touch.
    fn forget(&mut self, start: u64, end: u64) {
        let count = self.words.len() as u64;
        let (first, stop) = (start / self.unit, end.div_ceil(self.unit).min(count));
        if first < stop {
            self.words[first as usize..stop as usize].fill(UNKNOWN);
        }
    }
}

/// Resolved extents of one export: bounded, merged, never stale. Offsets and lengths are bytes.
pub struct Cache {
    /// By disk offset. Disjoint, none empty; no end passes u64::MAX, neither the disk's nor the
    /// file's.
    entries: BTreeMap<u64, Piece>,
    /// What is known besides: packed tables, by disk offset, disjoint. What both know is the same.
    tables: BTreeMap<u64, Table>,
    /// The tables' weights, of which no more than half of the bound are kept.
    tables_weight: usize,
    entries_max: usize,
    sequence: u64,
    /// The last changes, oldest first: the newest is the one that made `sequence` what it is.
    history: VecDeque<Range<u64>>,
    /// Where eviction goes on: a clock's hand over the disk.
    hand: u64,
}

impl Cache {
    /// An empty cache that holds at most `entries_max` (at least 1) entries.
    pub fn new(entries_max: usize) -> Cache {
        Cache {
            entries: BTreeMap::new(),
            tables: BTreeMap::new(),
            tables_weight: 0,
            entries_max: entries_max.max(1),
            sequence: 0,
            history: VecDeque::new(),
            hand: 0,
        }
    }

    /// The number of changes so far. Remember it from before a resolve to fill in its answer.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The number of entries held.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// The number of units in packed tables.
    pub fn packed(&self) -> usize {
        self.tables.values().map(|table| table.words.len()).sum()
    }

    /// The memory that all of it takes up, bytes, but for what is free in the nodes of trees.
    pub fn bytes(&self) -> usize {
        self.entries.len() * size_of::<(u64, Piece)>() + self.packed() * size_of::<u64>()
    }

    /// Whether there is a packed table for what is at `offset`.
    pub fn has_table(&self, offset: u64) -> bool {
        let table = self.tables.range(..=offset).next_back();
        table.is_some_and(|(start, table)| offset - start < table.length())
    }

    /// Append to `out` the pieces that cover a prefix of the range, merged as far as a reader does
    /// not mind (what is writable only in part becomes not writable). Returns the bytes covered:
    /// it stops at the first byte that is not known.
    pub fn lookup(&self, offset: u64, length: u64, out: &mut Vec<Piece>) -> u64 {
        let first = out.len();
        let mut covered = 0;
        for piece in self.known(offset, length) {
            covered += piece.length;
            append(out, first, piece);
        }
        covered
    }

    /// As `lookup`, but stops at the first byte that is not known to live at a writable place of a
    /// file: the whole range may be overwritten in place if all of it is covered.
    pub fn lookup_writable(&self, offset: u64, length: u64, out: &mut Vec<Piece>) -> u64 {
        let first = out.len();
        let mut covered = 0;
        for piece in self.known(offset, length) {
            if !piece.target.is_writable() {
                break;
            }
            covered += piece.length;
            append(out, first, piece);
        }
        covered
    }

    /// Which parts of the range are known, for `write` as writable, as (length, is known) runs.
    pub fn runs(&self, offset: u64, length: u64, write: bool) -> Vec<(u64, bool)> {
        let end = offset.saturating_add(length);
        let mut runs: Vec<(u64, bool)> = Vec::new();
        let mut position = offset;
        while position < end {
            let mut found = self.known(position, end - position);
            let piece = found.next();
            let (count, known) = match piece {
                Some(piece) => (piece.length, !write || piece.target.is_writable()),
                None => (self.next_known(position).min(end) - position, false),
            };
            position += count;
            match runs.last_mut() {
                Some((length, was)) if *was == known => *length += count,
                _ => runs.push((count, known)),
            }
        }
        runs
    }

    /// Where something may be known again, behind `position`, where nothing is.
    fn next_known(&self, position: u64) -> u64 {
        let after = position.saturating_add(1);
        let entry = self.entries.range(after..).next().map(|(&start, _)| start);
        let inside = self.tables.range(..=position).next_back();
        let unit = inside
            .filter(|(start, table)| position - **start < table.length())
            .map(|(start, table)| position - (position - start) % table.unit + table.unit);
        let table = self.tables.range(after..).next().map(|(&start, _)| start);
        entry
            .into_iter()
            .chain(unit)
            .chain(table)
            .min()
            .unwrap_or(u64::MAX)
    }

    /// Enter what a resolve answered that began when `sequence()` was `sequence`: pieces that are
    /// contiguous from `offset`. What has changed since is cut out; false, and nothing is entered,
    /// if so much has that it is no longer known what.
    ///
    /// A place that is known to be writable stays so when an answer to another intent names the
    /// same place without saying it: only `changed` takes a permission away. What does not fit
    /// (more pieces than the cache's bound, an end past u64::MAX) is left out.
    pub fn fill(&mut self, sequence: u64, offset: u64, pieces: &[Piece]) -> bool {
        let overtaken = self.sequence.saturating_sub(sequence);
        if overtaken > self.history.len() as u64 {
            return false;
        }
        let mut end = offset;
        for piece in pieces.iter().take(self.entries_max) {
            let Some(next) = end.checked_add(piece.length) else {
                break;
            };
            if piece.advanced(piece.length).is_none() {
                break;
            }
            if piece.length > 0 {
                self.enter(end, *piece);
            }
            end = next;
        }
        for index in self.history.len() - overtaken as usize..self.history.len() {
            let changed = self.history[index].clone();
            self.remove(changed.start.max(offset), changed.end.min(end));
        }
        self.evict(offset..end);
        true
    }

    /// `fill` of as many units as there are words, none of them writable. A table of long runs is entered as pieces, any
    /// other as it is. False also if it would pass the end of the address space.
    pub fn fill_table(
        &mut self,
        sequence: u64,
        offset: u64,
        packing: &Packing,
        words: &[u64],
    ) -> bool {
        let overtaken = self.sequence.saturating_sub(sequence);
        let fits = packing
            .unit
            .checked_mul(words.len() as u64)
            .is_some_and(|length| offset.checked_add(length).is_some());
        if overtaken > self.history.len() as u64 || !fits {
            return false;
        }
        let mut table = Table::new(packing, words);
        for changed in self
            .history
            .range(self.history.len() - overtaken as usize..)
        {
            table.forget(
                changed.start.max(offset) - offset,
                changed.end.max(offset) - offset,
            );
        }
        let mut runs = Vec::new();
        let mut index = 0;
        while index < table.words.len() && runs.len() <= table.weight() {
            let count = table.run(index);
            runs.push((index, count));
            index += count;
        }
        if index == table.words.len() {
            self.enter_runs(offset, &table, &runs);
        } else {
            self.enter_table(offset, table);
        }
        true
    }

    fn enter_runs(&mut self, offset: u64, table: &Table, runs: &[(usize, usize)]) {
        for &(index, count) in runs {
            let start = index as u64 * table.unit;
            if let Some(piece) = table.piece(start) {
                let length = count as u64 * table.unit;
                self.enter(offset + start, Piece { length, ..piece });
            }
        }
        self.evict(offset..offset + table.length());
    }

    fn enter_table(&mut self, offset: u64, table: Table) {
        let end = offset + table.length();
        while let Some((&start, other)) = self.tables.range(..end).next_back()
            && start + other.length() > offset
        {
            self.drop_table(start);
        }
        self.tables_weight += table.weight();
        self.tables.insert(offset, table);
        while self.tables_weight > self.entries_max / 2 && self.tables.len() > 1 {
            let from = |at| {
                self.tables
                    .range(at..)
                    .map(|(&start, _)| start)
                    .find(|start| *start != offset)
            };
            let victim = from(self.hand).or_else(|| from(0)).expect("there are two");
            self.hand = victim;
            self.drop_table(victim);
        }
        self.evict(0..0);
    }

    fn drop_table(&mut self, start: u64) {
        if let Some(table) = self.tables.remove(&start) {
            self.tables_weight -= table.weight();
        }
    }

    /// Forget the bytes from `start` up to `end`, whatever knows them.
    fn forget(&mut self, start: u64, end: u64) {
        self.remove(start, end);
        let mut before = end;
        while let Some((&first, table)) = self.tables.range_mut(..before).next_back() {
            let stop = first + table.length();
            if stop <= start {
                break;
            }
            if start <= first && stop <= end {
                self.drop_table(first);
            } else {
                table.forget(start.max(first) - first, end - first);
            }
            before = first;
        }
    }

    /// The mapping of the range is no longer what it was: drop it, and number the change.
    pub fn changed(&mut self, offset: u64, length: u64) {
        let end = offset.saturating_add(length);
        self.forget(offset, end);
        self.sequence += 1;
        if self.history.len() == HISTORY_MAX {
            self.history.pop_front();
        }
        self.history.push_back(offset..end);
        self.evict(0..0); // A cut in the middle of an entry leaves one more.
    }

    /// Forget everything. Running fills are not affected: it is not a change.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.tables.clear();
        self.tables_weight = 0;
    }

    /// What is known of the range without a gap from `offset` on, cut to it.
    fn known(&self, offset: u64, length: u64) -> impl Iterator<Item = Piece> {
        let end = offset.saturating_add(length);
        let mut position = offset;
        let mut rest = None;
        std::iter::from_fn(move || {
            if position >= end {
                return None;
            }
            // The first entry is the one that begins at or before `offset`, found from the left;
            // the others need a second descent of the tree, which most lookups never make.
            let entry = if position == offset {
                self.entries.range(..=offset).next_back()
            } else {
                rest.get_or_insert_with(|| self.entries.range(position..))
                    .next()
            };
            let part = match entry {
                Some((&start, piece)) if start <= position && start + piece.length > position => {
                    piece.cut(position - start, piece.length.min(end - start))
                }
                _ => {
                    rest = None; // it is past what a table may know
                    self.packed_piece(position, end)?
                }
            };
            position += part.length;
            Some(part)
        })
    }

    /// What a table knows from `position` on, cut to `end`, and to where an entry begins, which may know more.
    fn packed_piece(&self, position: u64, end: u64) -> Option<Piece> {
        if self.tables.is_empty() {
            return None;
        }
        let (start, table) = self.tables.range(..=position).next_back()?;
        let piece = table.piece(position - start)?;
        let entry = self.entries.range(position..).next();
        let limit = entry.map_or(end, |(&next, _)| next.min(end)) - position;
        Some(piece.cut(0, piece.length.min(limit)))
    }

    /// Make the range of `piece` live at its target, merged with neighbours that it continues.
    fn enter(&mut self, offset: u64, piece: Piece) {
        let permitted = self.permitted(offset, piece);
        self.replace(offset, piece);
        for (offset, part) in permitted {
            self.replace(offset, part);
        }
    }

    /// The parts of `piece`'s range that are known to live where it says, and to be writable,
    /// which it does not say.
    fn permitted(&self, offset: u64, piece: Piece) -> Vec<(u64, Piece)> {
        let mut permitted = Vec::new();
        if piece.target != piece.target.with_writable(true) {
            for (start, known) in self.overlapping(offset, offset + piece.length) {
                let begin = start.max(offset);
                let end = (start + known.length).min(offset + piece.length);
                let part = known.cut(begin - start, end - start);
                let said = piece.cut(begin - offset, end - offset);
                if part == said.with_writable(true) {
                    permitted.push((begin, part));
                }
            }
        }
        permitted
    }

    fn replace(&mut self, mut offset: u64, mut piece: Piece) {
        let end = offset + piece.length;
        self.remove(offset, end);
        if let Some((&start, left)) = self.entries.range(..offset).next_back()
            && start + left.length == offset
            && left.continues_at(&piece)
        {
            piece = Piece {
                length: left.length + piece.length,
                ..*left
            };
            offset = start;
        }
        if let Some(right) = self.entries.get(&end)
            && piece.continues_at(right)
        {
            piece.length += right.length;
            self.entries.remove(&end);
        }
        self.entries.insert(offset, piece);
    }

    /// Forget the bytes from `start` up to `end`.
    fn remove(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        if let Some((&first, piece)) = self.entries.range_mut(..start).next_back()
            && first + piece.length > start
        {
            let whole = *piece;
            *piece = whole.cut(0, start - first);
            if first + whole.length > end {
                self.entries
                    .insert(end, whole.cut(end - first, whole.length));
                return;
            }
        }
        while let Some((&first, &piece)) = self.entries.range(start..end).next() {
            self.entries.remove(&first);
            if first + piece.length > end {
                self.entries
                    .insert(end, piece.cut(end - first, piece.length));
                return;
            }
        }
    }

    /// The entries that overlap the (not empty) range, with their offsets, in order.
    fn overlapping(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, &Piece)> {
        let before = self.entries.range(..start).next_back();
        before
            .into_iter()
            .filter(move |(first, piece)| **first + piece.length > start)
            .chain(self.entries.range(start..end))
            .map(|(first, piece)| (*first, piece))
    }

    /// Come back to the bound, sparing `kept` (what was just entered) as long as there is another.
    fn evict(&mut self, kept: Range<u64>) {
        while self.entries.len() > self.entries_max {
            let from = |offset| self.entries.range(offset..).next().map(|(&first, _)| first);
            let mut victim = from(self.hand).or_else(|| from(0));
            if victim.is_some_and(|first| kept.contains(&first)) {
                victim = from(kept.end).or_else(|| from(0));
            }
            let Some(first) = victim else { return };
            self.entries.remove(&first);
            self.hand = first;
        }
    }
}

/// Push `piece`, merged with the last one if that is among those from index `first` on.
fn append(out: &mut Vec<Piece>, first: usize, piece: Piece) {
    if out.len() > first
        && let Some(last) = out.last_mut()
    {
        let permission = last.target.is_writable() && piece.target.is_writable();
        let merged = last.with_writable(permission);
        if merged.continues_at(&piece.with_writable(permission)) {
            *last = Piece {
                length: last.length + piece.length,
                ..merged
            };
            return;
        }
    }
    out.push(piece);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn what_is_known_is_told_in_runs() {
        let mut cache = Cache::new(8);
        assert_eq!(cache.runs(0, 10, false), vec![(10, false)]);
        cache.fill(0, 10, &[piece(10, READABLE), piece(10, WRITABLE)]);
        cache.fill(0, 40, &[piece(10, Target::Zero)]);
        let read = vec![(5, false), (20, true), (10, false), (5, true)];
        assert_eq!(cache.runs(5, 40, false), read);
        let write = vec![(15, false), (10, true), (15, false)];
        assert_eq!(cache.runs(5, 40, true), write);
        assert_eq!(cache.runs(12, 3, false), vec![(3, true)]);
    }

    const READABLE: Target = place(0, false);
    const WRITABLE: Target = place(0, true);

    const fn place(offset: u64, writable: bool) -> Target {
        Target::File {
            file: 1,
            offset,
            writable,
        }
    }

    fn piece(length: u64, target: Target) -> Piece {
        Piece {
            length,
            target,
            through: Through::default(),
        }
    }

    #[test]
    fn a_transform_counts_on_from_piece_to_piece() {
        let through = |position| Through {
            transform: 1,
            position,
            ..Through::default()
        };
        let at = |offset, length, position| Piece {
            through: through(position),
            ..piece(length, place(offset, true))
        };
        let mut cache = Cache::new(10);
        cache.fill(0, 0, &[at(512, 100, 7), at(612, 100, 107)]);
        assert_eq!(cache.len(), 1);
        assert_eq!(looked_up(&cache, 10, 20), (20, vec![at(522, 20, 17)]));
        // The same place, but not the same position: not one entry.
        cache.fill(0, 200, &[at(712, 100, 300)]);
        assert_eq!(cache.len(), 2);
        cache.changed(50, 10);
        assert_eq!(looked_up(&cache, 60, 10), (10, vec![at(572, 10, 67)]));
    }

    fn looked_up(cache: &Cache, offset: u64, length: u64) -> (u64, Vec<Piece>) {
        let mut out = Vec::new();
        (cache.lookup(offset, length, &mut out), out)
    }

    #[test]
    fn an_empty_cache_knows_nothing() {
        let cache = Cache::new(10);
        assert_eq!(looked_up(&cache, 0, u64::MAX), (0, vec![]));
        assert_eq!(looked_up(&cache, u64::MAX, 0), (0, vec![]));
    }

    #[test]
    fn a_lookup_is_cut_to_the_range() {
        let mut cache = Cache::new(10);
        assert!(cache.fill(0, 100, &[piece(100, place(1000, true))]));
        assert_eq!(
            looked_up(&cache, 110, 20),
            (20, vec![piece(20, place(1010, true))])
        );
        assert_eq!(
            looked_up(&cache, 190, 20),
            (10, vec![piece(10, place(1090, true))])
        );
        assert_eq!(looked_up(&cache, 99, 20), (0, vec![]));
        assert_eq!(looked_up(&cache, 200, 1), (0, vec![]));
    }

    #[test]
    fn pieces_that_continue_are_one_entry() {
        let mut cache = Cache::new(10);
        cache.fill(
            0,
            10,
            &[piece(10, place(10, true)), piece(10, place(20, true))],
        );
        cache.fill(0, 30, &[piece(10, place(30, true))]);
        cache.fill(0, 0, &[piece(10, place(0, true))]);
        assert_eq!(cache.len(), 1);
        assert_eq!(looked_up(&cache, 0, 99), (40, vec![piece(40, WRITABLE)]));
        cache.fill(
            0,
            40,
            &[
                piece(5, Target::Zero),
                piece(5, Target::Zero),
                piece(5, Target::Code),
            ],
        );
        assert_eq!(cache.len(), 3);
    }

    #[test]
    fn a_reader_does_not_mind_permissions() {
        let mut cache = Cache::new(10);
        cache.fill(0, 0, &[piece(10, WRITABLE), piece(10, place(10, false))]);
        assert_eq!(looked_up(&cache, 0, 20), (20, vec![piece(20, READABLE)]));
        let mut out = vec![piece(7, Target::Zero)];
        assert_eq!(cache.lookup_writable(0, 20, &mut out), 10);
        assert_eq!(out, [piece(7, Target::Zero), piece(10, WRITABLE)]);
    }

    #[test]
    fn what_was_in_the_vector_before_is_not_merged_with() {
        let mut cache = Cache::new(10);
        cache.fill(0, 0, &[piece(10, Target::Zero)]);
        let mut out = vec![piece(7, Target::Zero)];
        assert_eq!(cache.lookup(0, 10, &mut out), 10);
        assert_eq!(out, [piece(7, Target::Zero), piece(10, Target::Zero)]);
    }

    #[test]
    fn a_change_cuts_a_hole() {
        let mut cache = Cache::new(10);
        cache.fill(0, 0, &[piece(100, WRITABLE)]);
        cache.changed(40, 20);
        assert_eq!((cache.sequence(), cache.len()), (1, 2));
        assert_eq!(looked_up(&cache, 0, 100), (40, vec![piece(40, WRITABLE)]));
        assert_eq!(
            looked_up(&cache, 60, 100),
            (40, vec![piece(40, place(60, true))])
        );
    }

    #[test]
    fn a_stale_answer_is_cut() {
        let mut cache = Cache::new(10);
        let before = cache.sequence();
        cache.changed(40, 20);
        assert!(cache.fill(before, 0, &[piece(100, WRITABLE)]));
        assert_eq!(looked_up(&cache, 0, 100).0, 40);
        assert_eq!(looked_up(&cache, 40, 20).0, 0);
        assert_eq!(looked_up(&cache, 60, 40).0, 40);
        assert!(cache.fill(cache.sequence(), 40, &[piece(20, place(40, true))]));
        assert_eq!(looked_up(&cache, 0, 100), (100, vec![piece(100, WRITABLE)]));
    }

    #[test]
    fn an_answer_older_than_the_history_is_refused() {
        let mut cache = Cache::new(10);
        for _ in 0..HISTORY_MAX {
            cache.changed(1000, 1);
        }
        assert!(cache.fill(0, 0, &[piece(1, Target::Zero)]));
        cache.changed(1000, 1);
        assert!(!cache.fill(0, 5, &[piece(1, Target::Zero)]));
        assert!(cache.fill(1, 7, &[piece(1, Target::Zero)]));
        assert_eq!(cache.len(), 2);
    }

    #[test]
    fn only_a_change_takes_permission_away() {
        let mut cache = Cache::new(10);
        cache.fill(0, 10, &[piece(10, place(10, true))]);
        cache.fill(0, 0, &[piece(100, READABLE)]);
        let mut out = Vec::new();
        assert_eq!(cache.lookup_writable(10, 10, &mut out), 10);
        assert_eq!(cache.lookup_writable(20, 1, &mut out), 0);
        cache.fill(0, 10, &[piece(10, place(500, false))]);
        assert_eq!(cache.lookup_writable(10, 10, &mut out), 0);
    }

    #[test]
    fn everything_may_change() {
        let mut cache = Cache::new(10);
        cache.fill(0, 0, &[piece(u64::MAX, Target::Code)]);
        assert_eq!(looked_up(&cache, 5, u64::MAX).0, u64::MAX - 5);
        cache.changed(7, u64::MAX - 7);
        assert_eq!(looked_up(&cache, 5, u64::MAX).0, 2);
        cache.changed(0, u64::MAX);
        assert_eq!(cache.len(), 0);
    }

    #[test]
    fn ends_past_the_address_space_are_left_out() {
        let mut cache = Cache::new(10);
        assert!(cache.fill(
            0,
            u64::MAX - 9,
            &[piece(5, Target::Zero), piece(5, Target::Zero)]
        ));
        assert_eq!(looked_up(&cache, u64::MAX - 9, 9).0, 5);
        assert!(cache.fill(0, 0, &[piece(10, place(u64::MAX - 5, false))]));
        assert_eq!(looked_up(&cache, 0, 10).0, 0);
    }

    #[test]
    fn the_bound_holds() {
        let mut cache = Cache::new(4);
        let pieces: Vec<_> = (0..9).map(|i| piece(1, place(i * 100, true))).collect();
        cache.fill(0, 0, &pieces);
        assert_eq!((cache.len(), looked_up(&cache, 0, 9).0), (4, 4));
        cache.fill(0, 100, &pieces[..3]);
        assert_eq!((cache.len(), looked_up(&cache, 100, 3).0), (4, 3));
        cache.clear();
        cache.fill(0, 0, &[piece(1, Target::Code), piece(9, Target::Zero)]);
        cache.fill(0, 20, &[piece(1, Target::Code), piece(9, Target::Zero)]);
        cache.changed(5, 1);
        assert_eq!(cache.len(), 4);
    }

    const UNIT: u64 = 4;

    fn packing() -> Packing {
        Packing {
            unit: UNIT,
            file: 1,
            places: 0xff00,
            refused: 0x1,
            zeroes: vec![(0x3, 0x2)],
            limit: 0x8000,
        }
    }

    fn packed(places: &[u64]) -> Vec<u64> {
        places.iter().map(|place| place << 8).collect()
    }

    #[test]
    fn a_table_knows_what_its_words_say() {
        let mut cache = Cache::new(1000);
        // Every unit apart; then zeroes, a refused one, one past the limit, and zeroes again.
        let mut words = packed(&[
            9, 5, 7, 3, 1, 11, 13, 2, 6, 4, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26,
        ]);
        words.extend([0x2, 0x1, 0x8000, 0x2]);
        assert!(cache.fill_table(0, 100, &packing(), &words));
        assert_eq!((cache.len(), cache.packed()), (0, 24));
        let at = |offset: u64| place(offset << 8, false);
        let known = vec![
            piece(2, place(0x902, false)),
            piece(4, at(5)),
            piece(1, at(7)),
        ];
        assert_eq!(looked_up(&cache, 102, 7), (7, known));
        assert_eq!(
            looked_up(&cache, 176, 90),
            (8, vec![piece(4, at(26)), piece(4, Target::Zero)])
        );
        assert_eq!(looked_up(&cache, 184, 4).0, 0);
        assert_eq!(looked_up(&cache, 188, 9).0, 0);
        assert_eq!(looked_up(&cache, 192, 9), (4, vec![piece(4, Target::Zero)]));
        assert_eq!(looked_up(&cache, 99, 9).0, 0);
        assert_eq!(
            cache.runs(90, 120, false),
            vec![(10, false), (84, true), (8, false), (4, true), (14, false)]
        );
        assert_eq!(cache.lookup_writable(100, 4, &mut Vec::new()), 0);
    }

    #[test]
    fn a_table_of_long_runs_is_entered_as_pieces() {
        let mut cache = Cache::new(1000);
        let packing = Packing {
            unit: 256,
            ..packing()
        };
        let words: Vec<u64> = (1..=20).map(|index| index * 256).collect();
        assert!(cache.fill_table(0, 512, &packing, &words));
        assert_eq!((cache.len(), cache.packed()), (1, 0));
        assert_eq!(looked_up(&cache, 600, 99999).0, 512 + 20 * 256 - 600);
    }

    #[test]
    fn what_changes_is_cut_out_of_tables_too() {
        let mut cache = Cache::new(1000);
        let words = packed(&(1..40).map(|index| index * 37 % 41).collect::<Vec<_>>());
        let before = cache.sequence();
        cache.changed(105, 4); // before the table comes: an older answer
        assert!(cache.fill_table(before, 100, &packing(), &words));
        assert_eq!(
            cache.runs(100, 16, false),
            vec![(4, true), (8, false), (4, true)]
        );
        cache.changed(112, 1);
        assert_eq!(
            cache.runs(100, 24, false),
            vec![(4, true), (12, false), (8, true)]
        );
        cache.fill(cache.sequence(), 106, &[piece(2, place(7, true))]);
        assert_eq!(
            cache.runs(100, 12, false),
            vec![(4, true), (2, false), (2, true), (4, false)]
        );
        assert!(cache.has_table(100) && !cache.has_table(99) && !cache.has_table(100 + 39 * UNIT));
        cache.changed(0, 1000);
        assert_eq!((cache.packed(), cache.tables_weight), (0, 0));
        for _ in 0..HISTORY_MAX {
            cache.changed(0, 1);
        }
        assert!(!cache.fill_table(before, 100, &packing(), &words));
    }

    #[test]
    fn tables_are_bounded_and_disjoint() {
        let mut cache = Cache::new(20);
        let words = packed(&(1..41).map(|index| index * 37 % 41).collect::<Vec<_>>());
        for index in 0..9 {
            assert!(cache.fill_table(0, index * 1000, &packing(), &words));
            assert!(cache.has_table(index * 1000));
        }
        assert_eq!(cache.packed(), 80);
        assert!(cache.fill_table(0, 8100, &packing(), &words));
        assert!(!cache.has_table(8000) && cache.has_table(8100));
        assert!(!cache.fill_table(0, u64::MAX - 100, &packing(), &words));
    }

    #[test]
    fn tables_and_entries_equal_a_model() {
        for seed in 0..100 {
            let mut random = Random(seed);
            let mut cache = Cache::new(usize::MAX);
            // What is true of a byte now, and what was when a running fill began.
            let mut truth: Vec<u64> = (0..DISK / UNIT).map(|_| random.below(200)).collect();
            let (mut sequence, mut answer) = (0, truth.clone());
            for _ in 0..400 {
                let unit = random.below(DISK / UNIT) as usize;
                match random.below(5) {
                    0 => {
                        truth[unit] = random.below(200);
                        cache.changed(unit as u64 * UNIT, UNIT);
                    }
                    1 => (sequence, answer) = (cache.sequence(), truth.clone()),
                    2 => {
                        let words = packed(&answer[unit..]);
                        assert!(cache.fill_table(sequence, unit as u64 * UNIT, &packing(), &words));
                    }
                    3 if answer[unit] < 128 => {
                        let known = piece(UNIT, place(answer[unit] << 8, random.one_in(2)));
                        assert!(cache.fill(sequence, unit as u64 * UNIT, &[known]));
                    }
                    _ => {
                        let (offset, length) = random_range(&mut random);
                        let mut position = offset;
                        for piece in looked_up(&cache, offset, length).1 {
                            for byte in position..position + piece.length {
                                let there = place(
                                    (truth[(byte / UNIT) as usize] << 8) + byte % UNIT,
                                    false,
                                );
                                let found =
                                    piece.target.advanced(byte - position).expect("in bounds");
                                assert_eq!(found.with_writable(false), there);
                            }
                            position += piece.length;
                        }
                    }
                }
            }
        }
    }

    /// What every byte of a small disk lives at, the simplest way.
    struct Model {
        bytes: Vec<Option<Target>>,
        changes: Vec<(u64, u64)>,
    }

    impl Model {
        fn fill(&mut self, sequence: u64, offset: u64, pieces: &[Piece]) {
            let mut position = offset;
            for piece in pieces {
                for distance in 0..piece.length {
                    self.enter(
                        sequence,
                        position + distance,
                        piece.target.advanced(distance),
                    );
                }
                position += piece.length;
            }
        }

        fn enter(&mut self, sequence: u64, position: u64, target: Option<Target>) {
            let since = &self.changes[sequence as usize..];
            let known = &mut self.bytes[position as usize];
            if since
                .iter()
                .any(|(offset, length)| (*offset..offset + length).contains(&position))
            {
                *known = None;
            } else if target.map(|target| target.with_writable(true)) != *known {
                *known = target;
            }
        }

        fn changed(&mut self, offset: u64, length: u64) {
            self.changes.push((offset, length));
            self.bytes[offset as usize..(offset + length) as usize].fill(None);
        }
    }

    const DISK: u64 = 256;

    fn random_range(random: &mut Random) -> (u64, u64) {
        let offset = random.below(DISK);
        (offset, 1 + random.below((DISK - offset).min(40)))
    }

    fn random_pieces(random: &mut Random, offset: u64, mut length: u64) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut position = offset;
        while length > 0 {
            let part = 1 + random.below(length);
            // Mostly one of two linear mappings, so that pieces often continue each other.
            let target = match random.below(8) {
                0 => Target::Zero,
                1 => Target::Code,
                kind => place(position + 1000 * (kind / 5), random.one_in(2)),
            };
            pieces.push(piece(part, target));
            position += part;
            length -= part;
        }
        pieces
    }

    /// Every byte of `pieces` is where the model says, and is writable only if it says so.
    fn agree(model: &Model, offset: u64, pieces: &[Piece]) {
        let mut position = offset;
        for piece in pieces {
            for distance in 0..piece.length {
                let known = model.bytes[(position + distance) as usize].expect("known to both");
                let found = piece.target.advanced(distance).expect("in bounds");
                assert_eq!(known.with_writable(false), found.with_writable(false));
                assert!(known.is_writable() || !found.is_writable());
            }
            position += piece.length;
        }
    }

    /// What the cache knows is what the model knows; with `exact` it knows all that the model does.
    fn compare(cache: &Cache, model: &Model, (offset, length): (u64, u64), exact: bool) {
        let mut out = Vec::new();
        let covered = cache.lookup(offset, length, &mut out);
        assert_eq!(covered, out.iter().map(|piece| piece.length).sum::<u64>());
        agree(model, offset, &out);

        let mut out = Vec::new();
        let overwritable = cache.lookup_writable(offset, length, &mut out);
        assert_eq!(
            overwritable,
            out.iter().map(|piece| piece.length).sum::<u64>()
        );
        assert!(out.iter().all(|piece| piece.target.is_writable()));
        agree(model, offset, &out);

        if exact {
            let known = &model.bytes[offset as usize..(offset + length) as usize];
            let is_writable = |target: &&Option<Target>| target.is_some_and(Target::is_writable);
            assert_eq!(
                covered,
                known.iter().take_while(|target| target.is_some()).count() as u64
            );
            assert_eq!(
                overwritable,
                known.iter().take_while(is_writable).count() as u64
            );
        }
    }

    fn check_entries(cache: &Cache) {
        assert!(cache.len() <= cache.entries_max);
        let mut end = 0;
        let mut last: Option<Piece> = None;
        for (&offset, piece) in &cache.entries {
            assert!(piece.length > 0 && offset >= end);
            if let Some(last) = last.filter(|_| offset == end) {
                assert!(!last.continues_at(piece), "neighbours are merged");
            }
            (end, last) = (offset + piece.length, Some(*piece));
        }
    }

    fn run(seed: u64, entries_max: usize, exact: bool) {
        let mut random = Random(seed);
        let mut cache = Cache::new(entries_max);
        let mut model = Model {
            bytes: vec![None; DISK as usize],
            changes: Vec::new(),
        };
        let mut running: Vec<u64> = vec![0; 4];
        for _ in 0..600 {
            let (offset, length) = random_range(&mut random);
            match random.below(4) {
                0 => {
                    cache.changed(offset, length);
                    model.changed(offset, length);
                }
                1 => {
                    let fault = random.below(4) as usize;
                    running[fault] = cache.sequence();
                }
                2 => {
                    let sequence = running[random.below(4) as usize];
                    let pieces = random_pieces(&mut random, offset, length);
                    let entered = cache.fill(sequence, offset, &pieces);
                    assert!(entered, "the history is long enough for this test");
                    model.fill(sequence, offset, &pieces[..pieces.len().min(entries_max)]);
                }
                _ => compare(&cache, &model, (offset, length), exact),
            }
            check_entries(&cache);
            compare(&cache, &model, (0, DISK), exact);
        }
    }

    #[test]
    fn equals_the_model() {
        for seed in 0..200 {
            run(seed, usize::MAX, true);
        }
    }

    #[test]
    fn bounded_it_forgets_and_is_never_wrong() {
        for seed in 0..200 {
            run(seed, 1 + seed as usize % 12, false);
        }
    }
}
