//! The free pages of the pool: a buddy tree for each block, in two zones.
//!
//! ```text
//! pages  | 0 ...             border | border ...            pages |
//! zone   |        REGISTERED        |            PLAIN            |
//! ```
//!
//! A node is `2^order` pages, aligned to its size, and named by its first page. It lies in one zone:
//! nodes never merge over the border.

use crate::pool::{BLOCK, PAGE};

pub const BLOCK_PAGES: usize = BLOCK / PAGE;

/// Orders of the buddy tree: 1, 2, 4, ... 512 pages.
pub const ORDERS: usize = BLOCK_PAGES.ilog2() as usize + 1;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Zone {
    Registered,
    Plain,
}

pub struct Buddies {
    /// The first page of the plain zone.
    border: usize,
    zones: [Free; 2],
    nodes: Vec<Node>,
    /// How many slots that began at each page have been freed.
    pub generations: Vec<u32>,
}

/// The free nodes of a zone.
struct Free {
    pages: usize,
    /// The first free node of each order, or NONE.
    heads: [u32; ORDERS],
}

/// A page, as the first of a free node.
#[derive(Clone, Copy)]
struct Node {
    /// The free node's order, or NOT_FREE.
    order: u8,
    next: u32,
    previous: u32,
}

const NONE: u32 = u32::MAX;
const NOT_FREE: u8 = u8::MAX;

impl Buddies {
    /// All of `pages` (a multiple of BLOCK_PAGES, below NONE) free, the first `border` of them in the
    /// registered zone.
    pub fn new(pages: usize, border: usize) -> Buddies {
        let node = Node {
            order: NOT_FREE,
            next: NONE,
            previous: NONE,
        };
        let none = || Free {
            pages: 0,
            heads: [NONE; ORDERS],
        };
        let mut buddies = Buddies {
            border,
            zones: [none(), none()],
            nodes: vec![node; pages],
            generations: vec![0; pages],
        };
        // From the last to the first, so that the first are the next to be taken.
        for page in (0..pages).step_by(BLOCK_PAGES).rev() {
            let middle = border.clamp(page, page + BLOCK_PAGES);
            buddies.give(middle, page + BLOCK_PAGES - middle);
            buddies.give(page, middle - page);
        }
        buddies
    }

    /// How many pages are free, in both zones.
    pub fn free(&self) -> usize {
        self.zones.iter().map(|zone| zone.pages).sum()
    }

    /// How many pages of a zone are free.
    pub fn free_in(&self, zone: Zone) -> usize {
        self.zones[zone as usize].pages
    }

    /// Take `wanted` (at least 1) contiguous pages of a zone that has a free page, at most a block.
    /// When there are none in one piece it is the longest piece there is. Answers the first page and
    /// how many.
    pub fn take(&mut self, zone: Zone, wanted: usize) -> (usize, usize) {
        let wanted = wanted.min(BLOCK_PAGES);
        let fitting = wanted.next_power_of_two().ilog2() as usize;
        let heads = &self.zones[zone as usize].heads;
        let order = (fitting..ORDERS)
            .chain((0..fitting).rev())
            .find(|order| heads[*order] != NONE)
            .expect("a page is free");
        let page = heads[order] as usize;
        self.unlink(page, order);
        let taken = wanted.min(1 << order);
        self.give(page + taken, (1 << order) - taken);
        (page, taken)
    }

    /// Make pages free: of one block and zone, and not free now.
    pub fn give(&mut self, mut page: usize, mut pages: usize) {
        while pages > 0 {
            // The largest node that begins here and does not end too late.
            let order = page.trailing_zeros().min(pages.ilog2()) as usize;
            self.merge(page, order);
            page += 1 << order;
            pages -= 1 << order;
        }
    }

    fn zone(&self, page: usize) -> usize {
        if page < self.border {
            Zone::Registered as usize
        } else {
            Zone::Plain as usize
        }
    }

    /// Add a node to the free ones, together with its buddy if that is free too, and so on.
    fn merge(&mut self, mut page: usize, mut order: usize) {
        while order < ORDERS - 1 {
            let buddy = page ^ (1 << order);
            if self.nodes[buddy].order as usize != order || self.zone(buddy) != self.zone(page) {
                break;
            }
            self.unlink(buddy, order);
            page &= buddy;
            order += 1;
        }
        self.link(page, order);
    }

    fn link(&mut self, page: usize, order: usize) {
        debug_assert!(self.nodes[page].order == NOT_FREE && page.is_multiple_of(1 << order));
        let zone = self.zone(page);
        let next = std::mem::replace(&mut self.zones[zone].heads[order], page as u32);
        if next != NONE {
            self.nodes[next as usize].previous = page as u32;
        }
        self.nodes[page] = Node {
            order: order as u8,
            next,
            previous: NONE,
        };
        self.zones[zone].pages += 1 << order;
    }

    fn unlink(&mut self, page: usize, order: usize) {
        debug_assert!(self.nodes[page].order as usize == order);
        let zone = self.zone(page);
        let Node { next, previous, .. } = self.nodes[page];
        if next != NONE {
            self.nodes[next as usize].previous = previous;
        }
        if previous == NONE {
            self.zones[zone].heads[order] = next;
        } else {
            self.nodes[previous as usize].next = next;
        }
        self.nodes[page].order = NOT_FREE;
        self.zones[zone].pages -= 1 << order;
    }

    /// Asserts that everything is free, in the fewest nodes.
    #[cfg(test)]
    pub fn check_whole(&self) {
        let fresh = Buddies::new(self.nodes.len(), self.border);
        let orders = |buddies: &Buddies| -> Vec<u8> {
            buddies.nodes.iter().map(|node| node.order).collect()
        };
        assert_eq!(orders(self), orders(&fresh));
        assert_eq!(self.free(), self.nodes.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn nodes_never_merge_over_the_border() {
        for border in [0, 1, 3, 511, 512, 513, 1000, 1535, 1536] {
            let mut buddies = Buddies::new(3 * BLOCK_PAGES, border);
            assert_eq!(buddies.free_in(Zone::Registered), border);
            assert_eq!(buddies.free_in(Zone::Plain), 3 * BLOCK_PAGES - border);
            let mut random = Random(border as u64);
            let mut held: Vec<(usize, usize)> = Vec::new();
            for _ in 0..2000 {
                let zone = if random.one_in(2) {
                    Zone::Registered
                } else {
                    Zone::Plain
                };
                if buddies.free_in(zone) > 0 && random.one_in(2) {
                    let (page, pages) = buddies.take(zone, 1 + random.below(600) as usize);
                    assert_eq!(page < border, zone == Zone::Registered);
                    assert!(page >= border || page + pages <= border);
                    held.push((page, pages));
                } else if !held.is_empty() {
                    let (page, pages) = held.swap_remove(random.below(held.len() as u64) as usize);
                    buddies.give(page, pages);
                }
            }
            for (page, pages) in held {
                buddies.give(page, pages);
            }
            buddies.check_whole();
        }
    }

    #[test]
    fn the_first_pages_are_taken_first() {
        let mut buddies = Buddies::new(3 * BLOCK_PAGES, BLOCK_PAGES);
        assert_eq!(buddies.take(Zone::Registered, 1), (0, 1));
        assert_eq!(buddies.take(Zone::Plain, 1), (BLOCK_PAGES, 1));
    }
}
