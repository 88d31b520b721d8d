"""``luks``: a disk encrypted as LUKS version 1, read and written, as QEMU and cryptsetup make it.

::

    file   | header | key slots 0 to 7 | payload ...
                          │                 │
    passphrase ──PBKDF2──>│── master key ──>│ AES, sector by sector: the disk

Each key slot holds the master key, split into stripes (so that a slot can be wiped) and encrypted with a passphrase of
its own. Sectors have 512 bytes, and each is encrypted by itself, under its number on the disk.

============= ========================================================================================
`layer`       the layer                        `sectors`      the disk behind the header: resolve, read, write
`header`      what is read, what is refused        `keyslots`     from a passphrase to the master key
`ciphers`     sectors encrypted and decrypted      `antiforensic` the stripes of a key
`info`        what QEMU tells of it            `limits`       what an image may ask for
============= ========================================================================================

Specification: "LUKS1 On-Disk Format Specification"; structures are declared in `layers.ondisk.luks`. AES in modes xts,
cbc and ecb, with IVs plain, plain64 and essiv; refused by name: all else, and LUKS version 2.
"""

from layers.luks.layer import Luks

__all__ = ["Luks"]
