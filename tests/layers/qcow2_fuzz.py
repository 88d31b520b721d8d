"""Everything that can be done to an image, done to broken ones; and what it takes.

``python -m tests.layers.qcow2_fuzz SEEDS RESULT FIRST STOP STEP`` is a process that works through every ``STEP``-th
case from ``FIRST`` to ``STOP``, in the directory it is started in, and puts what came of them into the file RESULT.
Each case follows from its number and NBDSERVER_SEED: to see one again, run it alone (FIRST, FIRST + 1, 1).
"""

from __future__ import annotations

import dataclasses
import errno
import faulthandler
import functools
import json
import pickle
import random
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from layers.file import File
from layers.qcow2 import Qcow2
from nbdserver.errors import ConfigError, ImageError, RequestError
from nbdserver.files import FileOpener, Files
from nbdserver.format import ImageCheck, Repair
from nbdserver.graph import Graph
from nbdserver.layer import ALLOCATION_DEPTH, DIRTY_BITMAP
from nbdserver.reference import Reference, open_stack
from tests.layers.qcow2_mutate import Mutator
from tests.layers.qcow2_seeds import Field, Seed, fields
from tests.serving import SEED

KIB, MIB = 1 << 10, 1 << 20

#: What one case may take: processor time, so that a busy machine does not count, and memory.
CPU_S_MAX = 2.0
MEMORY_MAX = 256 * MIB
#: How often one that took too long is tried again.
RETRIES = 2
#: When a case hangs for certain, even where the machine is busy: the process ends, and says where it was.
HANG_S = 120

#: As errors of the system, these may be the answer: no room for what the image says, or no such file beside it.
ANSWERS = (errno.ENOSPC, errno.EFBIG, errno.EIO, errno.ENOENT, errno.ENOTSUP, errno.EROFS)

#: Cases that are told for having taken most.
SHOWN = 5

#: Cases after which what has come of them is saved: a long run can be looked at, and ended.
SAVED = 500

#: Of a disk that is too large to be read as a whole.
SAMPLED = 2 * MIB


@dataclasses.dataclass
class Tally:
    """What came of many cases."""

    cases: int = 0
    #: By what was done: how often it could be, and how often it was refused.
    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    failures: list[str] = dataclasses.field(default_factory=list)
    #: (seconds, case), (bytes, case): those that took most, the worst first.
    slowest: list[tuple[float, str]] = dataclasses.field(default_factory=list)
    largest: list[tuple[int, str]] = dataclasses.field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Tally:
        """What a worker has left."""
        said = json.loads(path.read_text())
        took = {name: [(most, case) for most, case in said[name]] for name in ("slowest", "largest")}
        return cls(said["cases"], Counter(said["outcomes"]), said["failures"], **took)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(vars(self)))

    def add(self, other: Tally) -> None:
        self.cases += other.cases
        self.outcomes += other.outcomes
        self.failures += other.failures
        self.slowest = sorted(self.slowest + other.slowest, reverse=True)[:SHOWN]
        self.largest = sorted(self.largest + other.largest, reverse=True)[:SHOWN]


class Case:
    """A broken image in the file ``image`` of the working directory."""

    def __init__(self, seed: Seed, known_fields: list[Field], pick: random.Random, outcomes: Counter[str]) -> None:
        self._seed, self._pick, self._outcomes = seed, pick, outcomes
        self._mutator = Mutator(bytearray(seed.image), known_fields, pick)
        self._mutator.run()
        self._path = Path("image")
        self._path.write_bytes(self._mutator.data)
        for name, data in seed.beside.items():
            Path(name).write_bytes(data)

    @property
    def notes(self) -> str:
        return f"{self._seed.name}: {'; '.join(self._mutator.notes)}"

    def run(self) -> None:
        self._attempt("check", lambda: self._check(Repair.NONE))
        self._attempt("read", self._read)
        self._attempt("snapshots", self._read_snapshots)
        if self._pick.random() < 0.4:
            self._attempt("repair", self._repair)
        self._attempt("write", self._write)
        if self._pick.random() < 0.2:
            self._attempt("check again", lambda: self._check(Repair.NONE))

    def _attempt(self, what: str, call: Callable[[], object]) -> None:
        """An answer, or an error that says what is wrong and where."""
        try:
            call()
            self._outcomes[f"{what}: done"] += 1
            return
        except ImageError as error:
            assert error.message and (error.path or isinstance(error.__cause__, ImageError)), f"says not where: {error}"
        except (ConfigError, RequestError) as error:
            assert str(error), "says nothing"
        except OSError as error:
            assert error.errno in ANSWERS, repr(error)
        self._outcomes[f"{what}: refused"] += 1

    # -- checking ---------------------------------------------------------------------------------------------------

    def _check(self, repair: Repair) -> ImageCheck:
        file = File("image")
        with open_stack(file, read_only=repair is Repair.NONE):
            return Qcow2.check(file, repair=repair, opener=FileOpener(Graph(), Files()))

    def _repair(self) -> None:
        how = self._pick.choice((Repair.LEAKS, Repair.ALL, Repair.ALL))
        left = self._check(how)
        again = self._check(Repair.NONE)
        for name in ("corruptions", "leaks"):
            assert getattr(again, name) == getattr(left, name), f"{name}: repaired, {left}, but then {again}"
        assert again.check_errors <= left.check_errors  # that leaks alone cannot be repaired is one
        if self._mutator.is_harmless:
            self._attempt("read repaired", self._read)

    # -- reading ----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        layer = Qcow2(File("image"))
        with open_stack(layer, read_only=True) as disk:
            layer.info()
            self._read_disk(disk)
            if self._mutator.is_harmless:
                assert disk.size == self._seed.size
                for offset, data in self._seed.known:
                    assert disk.read(offset, len(data)) == data, f"other data at {offset:#x}"
            for _ in islice(layer.map(0, disk.size), 5000):
                pass
            layer.snapshots()
            for bitmap in layer.bitmaps()[:3]:
                context = f"{DIRTY_BITMAP}{bitmap.name}"
                self._attempt("bitmap", functools.partial(disk.status, 0, min(disk.size, 64 * MIB), context))

    def _read_disk(self, disk: Reference) -> None:
        """All of it, or the beginning, the end, and what was known to be somewhere."""
        size = disk.size
        ranges = [(0, SAMPLED), (size - SAMPLED, SAMPLED), *((at, len(data)) for at, data in self._seed.known)]
        ranges.append((self._pick.randrange(size or 1), self._pick.choice((1, 511, 70_000))))
        for start, length in ranges:
            start, end = max(start, 0), min(start + length, size)
            if start < end:
                self._attempt("range", functools.partial(disk.read, start, end - start))
        self._attempt("status", lambda: disk.status(0, min(size, (1 << 32) - 1)))
        self._attempt("depth", lambda: disk.status(0, min(size, 64 * MIB), ALLOCATION_DEPTH))

    def _read_snapshots(self) -> None:
        layer = Qcow2(File("image"))
        with open_stack(layer, read_only=True):
            names = [snapshot.id for snapshot in layer.snapshots()[:2]]
        for name in names:
            with open_stack(Qcow2(File("image"), snapshot=name)) as disk:
                self._attempt("snapshot", functools.partial(disk.read, 0, min(disk.size, SAMPLED)))

    # -- writing ----------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        layer = Qcow2(File("image"))
        with open_stack(layer) as disk:
            for _ in range(self._pick.randint(2, 5)):
                self._attempt("request", lambda: self._change(disk))
            self._attempt("flush", disk.flush)
            if self._pick.random() < 0.4:
                self._attempt("point", lambda: self._pass_point(layer))
            self._attempt("request", lambda: self._change(disk))

    def _change(self, disk: Reference) -> None:
        known = self._pick.choice(self._seed.known)[0]
        start = min(self._pick.choice((0, known, self._pick.randrange(disk.size or 1))), disk.size)
        length = min(self._pick.choice((1, 512, 5000, 70_000)), disk.size - start)
        kind = self._pick.choice(("write", "write", "write", "zero", "trim"))
        if kind == "write":
            disk.write(start, b"w" * length)
        elif kind == "zero":
            disk.zero(start, length)
        else:
            disk.trim(start, length)

    def _pass_point(self, layer: Qcow2) -> None:
        kind = self._pick.choice(("create", "apply", "delete", "resize", "bitmap"))
        if kind == "create":
            layer.create_snapshot("fuzz")
        elif kind == "resize":
            layer.resize(max(layer.size + self._pick.choice((-MIB, -512, 512, 3 * MIB)), 0) // 512 * 512)
        elif kind == "bitmap":
            layer.add_bitmap("fuzz")
        elif snapshots := layer.snapshots():
            name = self._pick.choice(snapshots).id
            (layer.apply_snapshot if kind == "apply" else layer.delete_snapshot)(name)


class Worker:
    """Runs cases, and measures them."""

    def __init__(self, seeds: list[Seed]) -> None:
        self._seeds = seeds
        # Large ones take ten times as long, and have little that others have not.
        self._weights = [0.2 if len(seed.image) > 8 * MIB else 1.0 for seed in seeds]
        self._fields: dict[str, list[Field]] = {}
        self.tally = Tally()

    def run(self, number: int) -> None:
        """One case; again if it took too long: on a busy machine, what others do is now and then taken for its own."""
        tally = self._once(number)
        for _ in range(RETRIES):
            if tally.slowest[0][0] > CPU_S_MAX:
                tally = min(tally, self._once(number), key=lambda each: each.slowest)
        ((taken, which),), ((grown, _),) = tally.slowest, tally.largest
        if taken > CPU_S_MAX or grown > MEMORY_MAX:
            tally.failures.append(f"{which}\ntook {taken:.2f} s and {grown / MIB:.0f} MiB")
        self.tally.add(tally)

    def _once(self, number: int) -> Tally:
        pick, tally = random.Random(f"{SEED} case {number}"), Tally(1)
        (seed,) = pick.choices(self._seeds, self._weights)
        known_fields = self._fields.get(seed.name) or self._fields.setdefault(seed.name, fields(seed.image))
        case = Case(seed, known_fields, pick, tally.outcomes)
        which = f"case {number}, {case.notes}"
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        began = time.process_time()
        try:
            case.run()
        except Exception:
            tally.failures.append(f"{which}\n{traceback.format_exc()}")
        tally.slowest = [(time.process_time() - began, which)]
        tally.largest = [(_memory("VmHWM") - before, which)]
        return tally


def _memory(what: str) -> int:
    """A line of /proc/self/status, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * KIB
    raise AssertionError(f"no {what}")


def main(seeds: str, result: str, first: str, stop: str, step: str) -> None:
    worker = Worker(pickle.loads(Path(seeds).read_bytes()))
    # Beyond what is measured: what runs away ends here, and not with the machine's memory.
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + 4 * MEMORY_MAX,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 44,) * 2)
    for number in range(int(first), int(stop), int(step)):
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        worker.run(number)
        if worker.tally.cases % SAVED == 0:
            worker.tally.save(Path(result))
    faulthandler.cancel_dump_traceback_later()
    worker.tally.save(Path(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
