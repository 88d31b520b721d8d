"""LUKS1 on disk: structures and constants, no logic.

Specification: "LUKS1 On-Disk Format Specification", version 1.2.3 (in cryptsetup's ``docs/on-disk-format.pdf``). All
numbers are big-endian; all places are counted in sectors of 512 bytes.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

SECTOR: Final = 512

# -- Header (specification: "PHDR layout") -----------------------------------------------------------------------------

MAGIC: Final = b"LUKS\xba\xbe"
VERSION: Final = 1


class HeaderFields(NamedTuple):
    """The header up to the key slots. Names are filled up with NUL bytes."""

    magic: bytes
    version: int
    cipher_name: bytes
    cipher_mode: bytes
    hash_spec: bytes
    payload_offset_sectors: int
    key_bytes: int
    mk_digest: bytes
    mk_digest_salt: bytes
    mk_digest_iterations: int
    uuid: bytes


HEADER: Final = struct.Struct(">6sH32s32s32sII20s32sI40s")

#: Where those fields begin, for messages.
VERSION_AT: Final = 6
CIPHER_NAME_AT: Final = 8
CIPHER_MODE_AT: Final = 40
HASH_SPEC_AT: Final = 72
PAYLOAD_OFFSET_AT: Final = 104
KEY_BYTES_AT: Final = 108
MK_DIGEST_ITERATIONS_AT: Final = 164

MK_DIGEST_LENGTH: Final = 20

#: Of every PBKDF2 here.
SALT_LENGTH: Final = 32

# -- Key slots (specification: "key slot layout") ----------------------------------------------------------------------


class KeySlotFields(NamedTuple):
    state: int
    iterations: int
    salt: bytes
    material_offset_sectors: int
    stripes: int


KEY_SLOT: Final = struct.Struct(">II32sII")
KEY_SLOTS_AT: Final = HEADER.size
KEY_SLOTS_COUNT: Final = 8
KEY_SLOT_ACTIVE: Final = 0x00AC71F3
KEY_SLOT_INACTIVE: Final = 0x0000DEAD

#: Where a slot's fields begin in it, for messages.
ITERATIONS_AT: Final = 4
MATERIAL_OFFSET_AT: Final = 40
STRIPES_AT: Final = 44

#: The number of stripes that every key is split into.
STRIPES: Final = 4000

HEADER_LENGTH: Final = KEY_SLOTS_AT + KEY_SLOTS_COUNT * KEY_SLOT.size
