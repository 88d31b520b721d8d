"""``qcow2``: QEMU's copy-on-write image format, versions 2 and 3, read and written.

::

    guest cluster ──L1, L2──> normal      ──> file        in place if it is this cluster's alone (COPIED)
    (or subcluster)           unallocated ──> backing     where the backing file has it, else zeroes
                              zero        ──> zeroes
                              compressed  ──> code        deflate, zstd

"file" is the image itself, or an external data file. Normal clusters of an encrypted image are reached by a cipher.

Reading and writing in place need nothing of this package once an extent is known. All else, a write that must
allocate, zeroing and trimming, ends in a change of the tables in memory, which a flush brings into the file.

================ ============================================================================
`layer`          the layer: resolve, read, status
`writing`        write, zero, trim: what to allocate, copy, link
`order`          the order of writes that makes a crash at any instant harmless: read it first
`mapping`        L1 and L2 tables             `clusters`    what an L2 entry says
`refcounts`      refcounts and allocation     `freespace`   free clusters behind the cursor
`cache`          tables in memory             `occupied`    the overlap check
`header`         what is read and refused     `survey`      checks before the first write
`storage`        the image file               `host`        host clusters, there or in a data file
`compression`    decompressing                `intervals`   sets of numbers as runs
`encryption`     guest data that lies encrypted in the file
`snapshots`      made, applied, deleted       `points`      what it takes to pass a point in time
`snapshot_table` the table of them            `references`  what L2 tables refer to
`head`           the header's fields that change at points in time
`marks`          dirty and corrupt            `info`        what there is to say of an image
`bitmaps`        dirty bitmaps, kept true     `bitmap_store` into the file, safe at every instant
`bitmap_directory` as the file has them
`resize`         another size, with what lay behind the end never shown
`create`         new images                   `compose`     the first cluster, put together
`extensions`     header extensions, changed   `measure`     how large an image would be
`check`          what is wrong with an image  `repair`      and mending it (`rebuild`: refcounts)
`census`         all that names clusters      `places`      of this, what is not mapping
`tally`          counting it                  `subject`     the image that is checked
`findings`       what has been found
================ ============================================================================

Specification: QEMU's ``docs/interop/qcow2.rst``; structures are declared in `layers.ondisk.qcow2`. Refused by name:
the AES encryption that QEMU had before LUKS, unknown incompatible features; for writing also images that are marked as
corrupt.
"""

from layers.qcow2.layer import Qcow2

__all__ = ["Qcow2"]
