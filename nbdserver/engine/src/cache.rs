//! What of a file is in the page cache.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::param::page_size;

/// cachestat(2), Linux 6.5: the same number for every architecture that Rust's engines of io_uring know.
const CACHESTAT: libc::c_long = 451;

/// The kernel does not know it, or a sandbox forbids it.
static IS_MISSING: AtomicBool = AtomicBool::new(false);

/// `struct cachestat_range` of linux/mman.h.
#[repr(C)]
struct Range {
    offset: u64,
    length: u64,
}

/// `struct cachestat` of linux/mman.h: pages.
#[repr(C)]
#[derive(Default)]
struct Counts {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Whether every page of a range, which is not empty, is in the page cache; it may still be on its way from the disk. False,
/// too, where the kernel does not tell.
pub fn holds(file: &impl AsFd, offset: u64, length: u64) -> bool {
    if IS_MISSING.load(Relaxed) {
        return false;
    }
    let range = Range { offset, length };
    let mut counts = Counts::default();
    let descriptor = file.as_fd().as_raw_fd();
    // SAFETY: both structures are laid out as the kernel's, and live beyond the call, which keeps no pointer.
    let result =
        unsafe { libc::syscall(CACHESTAT, descriptor, &raw const range, &raw mut counts, 0) };
    if result != 0 {
        // For this file (EOPNOTSUPP, EPERM), or for all: who asks again pays a call that fails.
        let errno = std::io::Error::last_os_error().raw_os_error();
        IS_MISSING.fetch_or(errno == Some(libc::ENOSYS), Relaxed);
        return false;
    }
    let page = page_size() as u64;
    counts.cached > (offset + length - 1) / page - offset / page
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_just_written_is_in_the_page_cache_and_what_is_behind_its_end_is_not() {
        let path = std::env::temp_dir().join(format!("nbdserver-cache-{}", std::process::id()));
        let mut file = std::fs::File::create(&path).unwrap();
        file.write_all(&vec![7; 1 << 20]).unwrap();
        let page = page_size() as u64;
        let there = [(0, 1), (page - 1, 2), (0, 1 << 20), (3, (1 << 20) - 3)];
        for (offset, length) in there {
            assert!(holds(&file, offset, length), "{offset}+{length}");
        }
        assert!(!holds(&file, 0, (1 << 20) + 1));
        assert!(!holds(&file, 1 << 20, 1));
        std::fs::remove_file(&path).unwrap();
    }
}
