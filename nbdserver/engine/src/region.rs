//! The pool's memory: shared memory of a fixed size, on huge pages where they can be had.
//!
//! ```text
//! hugetlb       pages that the administrator has set aside (vm.nr_hugepages): all of the pool, or none
//! transparent   the kernel is asked to put whole blocks on huge pages (MADV_HUGEPAGE, MADV_COLLAPSE), as far as it likes
//! normal        what it did not
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::pool::{BLOCK, PAGE};

/// linux/mman.h, since Linux 6.1: put a range on huge pages now, whatever it is on.
const MADV_COLLAPSE: libc::c_int = 25;

/// Mapped once, at a multiple of BLOCK, for as long as this lives.
pub struct Region {
    memory: NonNull<u8>,
    size: usize,
    hugetlb: bool,
    memfd: OwnedFd,
}

impl Region {
    /// `size` is a multiple of BLOCK. Memory is taken as it is touched, except where it had been set aside anyway.
    pub fn new(size: usize) -> io::Result<Region> {
        Region::hugetlb(size).or_else(|_| Region::pageable(size))
    }

    /// On huge pages that were set aside for such use. Err if there are not enough: all are taken now, because a huge page
    /// that is missing when it is touched is a SIGBUS.
    fn hugetlb(size: usize) -> io::Result<Region> {
        let memfd = create(size, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?;
        let region = Region {
            memory: map(&memfd, size, None)?,
            size,
            hugetlb: true,
            memfd,
        };
        // Mapping has reserved the pages. That a control group or the machine's nodes forbid their use shows here.
        fallocate(&region.memfd, FallocateFlags::empty(), 0, size as u64)?;
        Ok(region)
    }

    fn pageable(size: usize) -> io::Result<Region> {
        let memfd = create(size, MemfdFlags::empty())?;
        Ok(Region {
            memory: map(&memfd, size, Some(aligned_space(size)?))?,
            size,
            hugetlb: false,
            memfd,
        })
    }

    pub fn as_ptr(&self) -> *mut u8 {
        self.memory.as_ptr()
    }

    pub fn size(&self) -> usize {
        self.size
    }

    #[cfg(test)]
    pub fn memfd(&self) -> &OwnedFd {
        &self.memfd
    }

    /// The first `bytes` are about to be pinned, which touches them: the last time that they can move to huge pages.
    pub fn about_to_pin(&self, bytes: usize) {
        let length = bytes / BLOCK * BLOCK;
        self.advise(length);
        // Only what is there is moved.
        if !self.hugetlb
            && length > 0
            && fallocate(&self.memfd, FallocateFlags::empty(), 0, length as u64).is_ok()
        {
            // SAFETY: moves the contents of our own mapping, nothing of which is used by anybody yet. Where the kernel
            // cannot, or has no such call, pages stay what they are.
            let _ = unsafe { libc::madvise(self.as_ptr().cast(), length, MADV_COLLAPSE) };
        }
    }

    /// No more than `bytes` is pinned: give back what else has been touched, and let it come on huge pages.
    pub fn pinned(&self, bytes: usize) {
        let start = bytes.next_multiple_of(PAGE) as u64;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if !self.hugetlb && start < self.size as u64 {
            // What is not given back is only memory that stays ours.
            let _ = fallocate(&self.memfd, flags, start, self.size as u64 - start);
        }
        self.advise(self.size);
    }

    fn advise(&self, bytes: usize) {
        // SAFETY: advice on how to back our own mapping. A kernel without huge pages takes none, and nothing is lost.
        let _ = unsafe { madvise(self.as_ptr().cast(), bytes, Advice::LinuxHugepage) };
    }

    /// What kind of pages it is on, and how many bytes are on huge ones now.
    pub fn pages(&self) -> (&'static str, usize) {
        if self.hugetlb {
            return ("hugetlb", self.size);
        }
        match self.transparent() {
            0 => ("normal", 0),
            bytes => ("transparent", bytes),
        }
    }

    /// Bytes mapped by transparent huge pages now; 0 if the kernel does not say.
    fn transparent(&self) -> usize {
        let Ok(maps) = std::fs::read_to_string("/proc/self/smaps") else {
            return 0;
        };
        let begin = format!("{:x}-", self.as_ptr().addr());
        let mapping = maps.lines().skip_while(|line| !line.starts_with(&begin));
        mapping
            .skip(1)
            .find_map(|line| line.strip_prefix("ShmemPmdMapped:"))
            .and_then(|value| value.trim().trim_end_matches(" kB").parse().ok())
            .map_or(0, |kibibytes: usize| kibibytes << 10)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped with this size, and whoever had pointers into it kept the region. An error would mean that the
        // arguments are wrong, and leaves the memory mapped.
        let _ = unsafe { munmap(self.as_ptr().cast(), self.size) };
    }
}

/// Shared memory, sealed, so that nobody who is handed the descriptor can shrink it under the mapping.
fn create(size: usize, kind: MemfdFlags) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | kind;
    let memfd = memfd_create("nbdserver-pool", flags)?;
    ftruncate(&memfd, size as u64)?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    fcntl_add_seals(&memfd, seals)?;
    Ok(memfd)
}

/// Map all of it: at `place`, which has been reserved for it, or anywhere.
fn map(memfd: &OwnedFd, size: usize, place: Option<NonNull<u8>>) -> io::Result<NonNull<u8>> {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let (address, flags) = match place {
        Some(place) => (place.as_ptr().cast(), MapFlags::SHARED | MapFlags::FIXED),
        None => (std::ptr::null_mut(), MapFlags::SHARED),
    };
    // SAFETY: a new mapping of memory that nobody shrinks, at an address of the kernel's choice, or in place of a
    // reservation of this size.
    let memory = unsafe { mmap(address, size, protection, flags, memfd, 0) }?;
    NonNull::new(memory.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// Address space of `size` bytes that begins at a multiple of BLOCK, as huge pages do.
fn aligned_space(size: usize) -> io::Result<NonNull<u8>> {
    let (nothing, private) = (ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE);
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let space = unsafe { mmap_anonymous(std::ptr::null_mut(), size + BLOCK, nothing, private) }?
        .cast::<u8>();
    let before = space.addr().next_multiple_of(BLOCK) - space.addr();
    let start = space.wrapping_add(before);
    // SAFETY: the two ends of the mapping just made.
    unsafe {
        if before > 0 {
            munmap(space.cast(), before)?;
        }
        munmap(start.wrapping_add(size).cast(), BLOCK - before)?;
    }
    NonNull::new(start).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_at_a_block() {
        for blocks in 1..4 {
            let region = Region::new(blocks * BLOCK).expect("memory");
            assert!(region.as_ptr().addr().is_multiple_of(BLOCK));
            // SAFETY: the last byte of the mapping.
            unsafe { region.as_ptr().add(blocks * BLOCK - 1).write(7) };
        }
    }

    #[test]
    fn what_is_not_pinned_is_given_back_and_the_rest_stays() {
        let region = Region::pageable(4 * BLOCK).expect("memory");
        // SAFETY: all of the mapping, which nobody else knows of.
        let bytes = unsafe { std::slice::from_raw_parts_mut(region.as_ptr(), 4 * BLOCK) };
        bytes.fill(7);
        region.pinned(BLOCK + 1);
        assert!(bytes[..BLOCK + PAGE].iter().all(|byte| *byte == 7));
        assert!(bytes[BLOCK + PAGE..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn more_than_was_set_aside_is_not_to_be_had() {
        // More memory than any machine has, but not more than can be mapped.
        assert!(Region::hugetlb(1 << 45).is_err());
    }
}
