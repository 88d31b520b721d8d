"""``qcow2``: QEMU's copy-on-write image format, versions 2 and 3, read and written.

::

    guest cluster ──L1, L2──> normal      ──> file        in place if it is this cluster's alone (COPIED)
    (or subcluster)           unallocated ──> backing     where the backing file has it, else zeroes
                              zero        ──> zeroes
                              compressed  ──> code        deflate, zstd

"file" is the image itself, or an external data file.

Reading and writing in place need nothing of this package once an extent is known. All else, a write that must
allocate, zeroing and trimming, ends in a change of the tables in memory, which a flush brings into the file.

================ ============================================================================
Specification: QEMU's ``docs/interop/qcow2.rst``; structures are declared in `layers.ondisk.qcow2`. Refused by name:
encryption, unknown incompatible features; for writing also the dirty and corrupt bits, and persistent bitmaps, which
would silently become worthless.
"""

from layers.qcow2.layer import Qcow2

__all__ = ["Qcow2"]
