"""Bounds on what is believed of a LUKS image. Bytes unless the suffix says."""

from __future__ import annotations

from typing import Final

from nbdserver.limits import KIB

#: Hash rounds that trying one passphrase on all key slots may take: iterations, times the hashes that make up the key,
#: over all slots. About two minutes of a slow processor, so that a hostile image cannot hang its opening; room for
#: eight slots that were each made to take two seconds of a very fast one, which is what QEMU and cryptsetup aim at.
HASH_ROUNDS_COUNT_MAX: Final = 1 << 27

#: The fewest iterations of PBKDF2 in a new header, however quick they are: the specification's, and cryptsetup's.
ITERATIONS_MIN: Final = 1000

#: The longest that trying a passphrase on a new key slot may be asked to take.
ITER_TIME_MAX_MS: Final = 3_600_000

#: Key slots of a new header begin at multiples of this: the specification's LUKS_ALIGN_KEYSLOTS.
KEY_ALIGNMENT: Final = 4 * KIB

#: What is decrypted at once: it is copied on the way, so not too much.
DECRYPT_MAX: Final = 64 * KIB
