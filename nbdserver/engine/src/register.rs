//! How much of the pool the kernel registers with the rings.
//!
//! RLIMIT_MEMLOCK bounds what all processes of a user without CAP_IPC_LOCK may pin, rings included (since Linux 6.14),
//! and nothing tells how much of it is left: so it is tried out.

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

use crate::pool::{PAGE, Pool};
use crate::ring::Ring;

/// What is left to rings that are made later, for threads that block: as much as some dozens take, and no more than this
/// part of what could be registered.
const LEFT: usize = 256 << 10;
const LEFT_PART: usize = 8;
/// What fits is found to within this part of it.
const PRECISION_PART: usize = 64;

/// How many bytes from the begin of the pool all rings have registered, and why no more.
pub struct Registered {
    pub bytes: usize,
    pub refused: Option<Errno>,
}

/// Register as much of the pool with `rings` as the kernel allows.
pub fn register_pool(rings: &[Ring], pool: &Pool) -> Registered {
    if rings.is_empty() {
        return Registered {
            bytes: 0,
            refused: None,
        };
    }
    let size = pool.size();
    let limit = getrlimit(Resource::Memlock).current;
    let limit = limit.map_or(size, |limit| usize::try_from(limit).unwrap_or(size));
    // A capability may be worth nothing (in a user namespace), so that the limit holds all the same.
    let mut refused = Errno::NOMEM;
    if limit >= size || may_ignore_limit() {
        pool.about_to_register(size);
        match register_all(rings, pool, size) {
            Ok(()) => {
                return Registered {
                    bytes: size,
                    refused: None,
                };
            }
            Err(errno) => refused = errno,
        }
    }
    let mut bytes = 0;
    if refused == Errno::NOMEM {
        bytes = most(limit.min(size), |bytes| register_all(rings, pool, bytes));
        rings.iter().for_each(Ring::unregister);
        pool.about_to_register(bytes);
    }
    while bytes > 0 && register_all(rings, pool, bytes).is_err() {
        bytes = pages(bytes / 2); // others of the same user have taken it meanwhile
    }
    Registered {
        bytes,
        refused: Some(refused),
    }
}

fn may_ignore_limit() -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK))
}

fn pages(bytes: usize) -> usize {
    bytes / PAGE * PAGE
}

/// The most (nearly) for which `attempt` succeeds, less what is to be left.
fn most(first: usize, mut attempt: impl FnMut(usize) -> Result<(), Errno>) -> usize {
    let (mut fits, mut does_not) = (0, pages(first) + PAGE);
    let mut next = pages(first);
    while next > fits {
        match attempt(next) {
            Ok(()) => fits = next,
            Err(_) => does_not = next,
        }
        let is_near = does_not - fits <= (does_not / PRECISION_PART).max(PAGE);
        next = if is_near {
            fits
        } else {
            pages(fits + (does_not - fits) / 2)
        };
    }
    pages(fits - (fits / LEFT_PART).min(LEFT))
}

/// Have all rings register the same, or none anything.
fn register_all(rings: &[Ring], pool: &Pool, bytes: usize) -> Result<(), Errno> {
    // All of them first: what one has cloned from another stays counted until both have let go of it.
    rings.iter().for_each(Ring::unregister);
    for (index, ring) in rings.iter().enumerate() {
        let like = index.checked_sub(1).map(|before| &rings[before]);
        if let Err(errno) = ring.register(pool, bytes, like) {
            rings[..index].iter().for_each(Ring::unregister);
            return Err(errno);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    /// What `most` makes of a kernel that lets `limit` bytes through, and what was tried.
    fn found(first: usize, limit: usize) -> (usize, Vec<usize>) {
        let mut tried = Vec::new();
        let bytes = most(first, |bytes| {
            tried.push(bytes);
            if bytes <= limit {
                Ok(())
            } else {
                Err(Errno::NOMEM)
            }
        });
        (bytes, tried)
    }

    #[test]
    fn nearly_all_that_fits_is_found() {
        for (first, limit) in [
            (8 * MIB, 8 * MIB),
            (8 * MIB, 8 * MIB - 28672),
            (8 * MIB, 3 * MIB),
            (8 * MIB, 100_000),
            (65_536, 40_960),
            (1 << 33, 5 << 30),
        ] {
            let (bytes, tried) = found(first, limit);
            let room = limit / PRECISION_PART + LEFT.min(limit / LEFT_PART) + 2 * PAGE;
            assert!(
                bytes <= limit && bytes + room >= limit,
                "{first} {limit}: {bytes}"
            );
            assert!(tried.len() < 16, "{tried:?}");
            assert!(tried.iter().all(|bytes| bytes.is_multiple_of(PAGE)));
        }
    }

    #[test]
    fn where_nothing_fits_it_is_nothing() {
        assert_eq!(found(8 * MIB, 0).0, 0);
        assert_eq!(found(100, 100).0, 0);
    }
}
