"""Permissions: what each user of a layer does to it, and what it lets the others do meanwhile. QEMU's ``BLK_PERM_*``.

::

    export "a" ──writes──> qcow2 ──writes, shares no writing──> file     every edge has a grant: (used, shared)
    export "b" ──reads──> qcow2 ──"backing": reads, shares no writing──┘  and here two of them exclude each other

Export "b" is refused: what one user of a node does, all others must share. What a layer is granted it hands down to its
children, as a filter, a format or otherwise (`Layer.child_grant`); at the bottom are files, where grants become the
locks that QEMU takes too (`nbdserver.locks`). The graph computes them (`Graph.open`), before a file is opened for them.

As QEMU has it (block.c, bdrv_default_perms), but stricter: no backing file is written while it is one, and whoever has
a file open lets nobody else write it, whatever the format.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntFlag
from typing import Final, NamedTuple


class Permission(IntFlag):
    """QEMU's ``BLK_PERM_*``; a permission's lock byte is its bit number."""

    NONE = 0
    #: To read data that is what it should be: not that of a disk halfway through a change.
    CONSISTENT_READ = 1
    #: To change the contents.
    WRITE = 2
    #: To write what the disk shows already: a copy on read. Whoever may WRITE may do so too.
    WRITE_UNCHANGED = 4
    #: To change the size.
    RESIZE = 8

    @property
    def label(self) -> str:
        """The name in QEMU's messages."""
        return str(self.name).lower().replace("_", " ")

    @property
    def verb(self) -> str:
        """The name in ours: what a user with it does."""
        return VERBS[self]


VERBS: Final = {
    Permission.CONSISTENT_READ: "reads",
    Permission.WRITE: "writes",
    Permission.WRITE_UNCHANGED: "copies into",
    Permission.RESIZE: "resizes",
}

NONE: Final = Permission.NONE
ALL: Final = Permission(sum(Permission))
READ: Final = Permission.CONSISTENT_READ
#: What only who has a node opened for writing can do.
WRITING: Final = Permission.WRITE | Permission.WRITE_UNCHANGED
#: What must not happen behind the back of who keeps something in memory of what a node holds.
CHANGING: Final = Permission.WRITE | Permission.RESIZE


class Grant(NamedTuple):
    """``used``: what a user of a node does to it. ``shared``: what it lets the others do."""

    used: Permission
    shared: Permission

    @property
    def writes(self) -> bool:
        return bool(self.used & WRITING)


#: What a client gets. That of several exports of one node each lets the others write is what they share it for.
READER: Final = Grant(READ, ALL)
WRITER: Final = Grant(READ | Permission.WRITE, ALL)
#: Who only looks what a node is: not held up by anybody, and holding up nobody.
ONLOOKER: Final = Grant(NONE, ALL)


# -- what a layer that is granted so much needs of a child, and leaves to its other users -----------------------------


def as_filter(own: Grant) -> Grant:
    """Of a layer whose bytes are the child's."""
    return own


def as_format(own: Grant, *, is_writable: bool) -> Grant:
    """Of a layer that keeps metadata in the child: they are read whatever for, and nobody else may change them. While
    it ``is_writable`` it writes them when it likes, perhaps after the last user who wrote has gone."""
    used = own.used | READ | (CHANGING if own.writes or is_writable else NONE)
    return Grant(used, own.shared & ~CHANGING)


def as_data(own: Grant) -> Grant:
    """Of a layer that keeps data in the child which its metadata elsewhere tell of. Written at its end, it grows."""
    used = own.used | (CHANGING if own.writes else NONE)
    return Grant(used, own.shared & ~CHANGING)


def as_backing(own: Grant) -> Grant:
    """Of a layer that shows the child where it has nothing itself."""
    return Grant(own.used & READ, READ | Permission.WRITE_UNCHANGED)


def as_replica(own: Grant) -> Grant:
    """Of a layer whose children are to hold the same: what is written to one alone makes them differ."""
    return Grant(own.used, own.shared & ~CHANGING)


def as_file(own: Grant, *, read_only: bool) -> Grant:
    """Of the layer at the bottom, which has a file open. One open for writing may be written, and grow, later."""
    if own == ONLOOKER and read_only:
        return ONLOOKER
    used = READ if read_only else own.used | READ | CHANGING
    return Grant(used, own.shared & ~CHANGING)


# -- several users ----------------------------------------------------------------------------------------------------


def together(grants: Iterable[Grant]) -> Grant:
    """What all users of a node do to it, and what all of them share."""
    used, shared = NONE, ALL
    for grant in grants:
        used |= grant.used
        shared &= grant.shared
    return Grant(used, shared)


def refused(one: Grant, other: Grant) -> Permission:
    """The first thing that one user does and the other does not share; NONE if there is none such."""
    lacking = one.used & ~other.shared
    return next((permission for permission in Permission if permission & lacking), NONE)
