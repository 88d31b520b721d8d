"""Block jobs: the images under an export are changed while it is served, and clients notice nothing.

::

    snapshot    vm ──────────> old          ──>   vm ──> overlay ──────────────> old
    stream      vm ──> active ──> mid ──> base   ──>   vm ──> active (which has taken in what mid had) ──> base
    commit      vm ──> active ──> mid ──> base   ──>   vm ──> base (which has taken in what active and mid had)
                vm ──> active ──> mid ──> base   ──>   vm ──> active ──> base (which has taken in what mid had)

QEMU's jobs of these names (qapi/block-core.json). Killed at any instant, every image shows what was flushed, whichever
of the two chains is in the files:

- *snapshot*: the overlay is durable, name and all, before anything is written to it; what has been written to the old
  image is flushed before it becomes a backing file.
- *stream*: the active image's header is made to name another backing file when all it needs of the old one is durable
  in it.
- *commit*: the base is changed only where the images above hide it. When all that they have is durable in it, the
  header above is made to name it; the active image, if that is committed, is emptied, durably and at one instant,
  before the first write goes to the base: it goes on showing the disk, through the base. Its storage is given back
  afterwards, so that guests do not wait for that.

Jobs that copy do so while the guest writes. A *stream* copies a range alone with it, as `copy-on-read` does. A *commit*
of the active image copies what the guest has written meanwhile again, until little is left, and the rest in a drained
section.
"""
