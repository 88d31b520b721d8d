"""``image convert``: a disk copied into another image, of any format."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import click

from nbdserver.errors import ConfigError, ImageError, NbdserverError
from nbdserver.extent import Extent, Intent
from nbdserver.format import Compresses, HasBitmaps, HasClusters, MapEntry
from nbdserver.image import creation
from nbdserver.image.allocation import Run, bare, chain, joined, runs
from nbdserver.image.copying import (
    SPARSE_DEFAULT,
    SPARSE_MAX,
    WORKERS_DEFAULT,
    WORKERS_MAX,
    Copy,
    Range,
    whole_units,
)
from nbdserver.image.info import print_json
from nbdserver.image.opening import Images, is_device, layer_type
from nbdserver.image.options import PLAIN, Access, access_options, by_options
from nbdserver.image.parameters import (
    CACHE,
    FORMAT,
    SIZE,
    cache_option,
    force_share_option,
    output_option,
    progress_option,
    quiet_option,
    rate_option,
    warn,
)
from nbdserver.image.progress import progress
from nbdserver.layer import Layer, finish
from nbdserver.limits import KIB
from nbdserver.request import Flag

#: Where the allocation cannot be read, so much is taken for data (which then is read sector by sector).
SALVAGED = 64 * KIB


@click.command("convert", short_help="Copy a disk into an image of another format.")
@click.argument("paths", nargs=-1, metavar="FILE [FILE...] TARGET")
@click.option("-f", "--source-format", type=FORMAT, metavar="FMT", help="The format of all FILEs.  [default: probed]")
@click.option("-O", "--target-format", type=FORMAT, default="raw", show_default=True, metavar="FMT", help="Of TARGET.")
@click.option(
    "-o",
    "--target-format-options",
    "options",
    multiple=True,
    metavar="KEY=VALUE,...",
    help="What the format of TARGET lets choose. See: -O FMT -o help",
)
@click.option("-b", "-B", "--backing", metavar="FILE", help="Make TARGET an overlay of this image.")
@click.option("-F", "--backing-format", type=FORMAT, metavar="FMT", help="The format of that image.")
@click.option("-c", "--compress", is_flag=True, help="Compress the data, if the format can.")
@click.option("-l", "--snapshot", metavar="SNAPSHOT", help="Copy this internal snapshot (an id or a name) of FILE.")
@click.option(
    "-S",
    "--sparse-size",
    type=SIZE,
    default=SPARSE_DEFAULT,
    metavar="SIZE",
    help=f"How many zeroes in the data make a hole; 0: holes are filled, too.  [default: {SPARSE_DEFAULT}]",
)
@click.option("-n", "--no-create", is_flag=True, help="TARGET is there already: write into it.")
@click.option("--target-is-zero", is_flag=True, help="It contains nothing but zeroes, so write none (with -n).")
@click.option("--bitmaps", is_flag=True, help="Copy the persistent dirty bitmaps too.")
@click.option("--skip-broken-bitmaps", is_flag=True, help="But not those that are inconsistent.")
@click.option("--salvage", is_flag=True, help="Take what cannot be read for zeroes.")
@click.option(
    "-m", "--parallel", type=click.IntRange(1, WORKERS_MAX), default=WORKERS_DEFAULT, show_default=True, help="Threads."
)
@click.option("-W", "--oob-writes", is_flag=True, help="Write in any order: faster where TARGET is preallocated.")
@click.option(
    "-t", "--target-cache", type=CACHE, default="unsafe", show_default=True, help="unsafe: TARGET is not synced."
)
@cache_option("-T", "--source-cache")
@click.option(
    "-C",
    "--copy-range-offloading",
    "offload",
    is_flag=True,
    help="Have the file system copy, or share, the data where it can; zeroes in it are not looked for.",
)
@rate_option
@force_share_option
@output_option
@progress_option
@quiet_option
@click.option("--target-image-opts", "target_by_options", is_flag=True, help="TARGET is options (with -n), as FILE is.")
@access_options
def command(
    *, paths: tuple[str, ...], options: tuple[str, ...], target_format: str, as_json: bool, **wishes: Any
) -> None:
    """Copy the disk in FILE, or those in several FILEs one after the other, into the new image TARGET.

    Holes and zeroes stay holes. What was in TARGET before is overwritten (without -n), unless somebody uses it. As
    with qemu-img, TARGET is not synced unless --target-cache says so.
    """
    if creation.wants_help(options):
        click.echo("\n".join(creation.in_words(target_format)))
        return
    if len(paths) < 2:
        raise click.UsageError("name one image at least, and a target")
    conversion = Conversion(paths[:-1], paths[-1], target_format, options, **wishes)
    conversion.check()
    conversion.run()
    if as_json:
        print_json(paths[-1], target_format, conversion.access.roots)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What is wanted: the command's parameters, under their names."""

    sources: tuple[str, ...]
    target: str
    target_format: str
    options: tuple[str, ...] = ()
    source_format: str | None = None
    backing: str | None = None
    backing_format: str | None = None
    compress: bool = False
    snapshot: str | None = None
    sparse_size: int = SPARSE_DEFAULT
    no_create: bool = False
    target_is_zero: bool = False
    bitmaps: bool = False
    skip_broken_bitmaps: bool = False
    salvage: bool = False
    parallel: int = WORKERS_DEFAULT
    oob_writes: bool = False
    target_cache: str = "unsafe"
    offload: bool = False
    rate_limit: int | None = None
    force_share: bool = False
    wants_progress: bool = False
    quiet: bool = False
    target_by_options: bool = False
    access: Access = PLAIN

    def check(self) -> None:
        """Raise UsageError if the wishes contradict each other."""
        several = len(self.sources) > 1
        wrong = {
            f"a sparse size is a multiple of 512, up to {SPARSE_MAX}": self.sparse_size % 512
            or self.sparse_size > SPARSE_MAX,
            "-o is for images that are made, so not with -n": self.no_create and self.options,
            "-b is for images that are made, so not with -n": self.no_create and self.backing,
            "--target-is-zero is for images that are there, so only with -n": self.target_is_zero
            and not self.no_create,
            "--skip-broken-bitmaps is only for --bitmaps": self.skip_broken_bitmaps and not self.bitmaps,
            "-C leaves no data to look for zeroes in, so not with -S": self.offload
            and self.sparse_size != SPARSE_DEFAULT,
            "-C leaves no data to compress, so not with -c": self.offload and self.compress,
            "-C leaves no data to salvage, so not with --salvage": self.offload and self.salvage,
            "snapshots of several images cannot be joined": self.snapshot and several,
            "bitmaps of several images cannot be joined": self.bitmaps and several,
            "--target-image-opts are of an image that is there, so only with -n": self.target_by_options
            and not self.no_create,
            "several images that are joined cannot be an overlay": self.backing and several,
        }
        for message, is_wrong in wrong.items():
            if is_wrong:
                raise click.UsageError(message)

    def run(self) -> None:
        """Convert. Raises ConfigError, ImageError, OSError."""
        with self.access.images(force_share=self.force_share) as images:
            named = [self.access.named(images, source, self.source_format) for source in self.sources]
            sources = [images.open_snapshot(path, format, self.snapshot) for path, format in named]
            source = sources[0] if len(sources) == 1 else images.enter(_Joined(sources), read_only=True)
            if self.bitmaps:
                self._check_bitmaps(bare(sources[0]))
            target = self._existing(images, source) if self.no_create else self._made(images, source)
            copy = self._copy(source, target)
            ranges = self._ranges(sources, target)
            if self.compress:
                ranges = whole_units(ranges, copy.unit, source.size)
            with progress("converting", wanted=self.wants_progress, quiet=self.quiet) as tell:
                copy.run(ranges, source.size, tell)
            if self.bitmaps:
                self._copy_bitmaps(bare(sources[0]), target)
            finish(target.flush())

    @property
    def _cache(self) -> str:
        return "writethrough" if self.target_cache == "directsync" else self.target_cache

    # -- the target -------------------------------------------------------------------------------------------------

    def _made(self, images: Images, source: Layer) -> Layer:
        given = {"backing_file": self.backing, "backing_fmt": self.backing_format}
        try:
            options = creation.parse_options(self.target_format, self.options, given)
        except ConfigError as error:
            raise ConfigError(error.message, file=self.target, key=error.key) from error
        self._check_compression(options)
        keys = {}
        backing = creation.backing_of(self.target, options)
        if backing is not None:
            if len(self.sources) > 1:
                raise click.UsageError("several images that are joined cannot be an overlay")
            keys["backing"] = images.open(*backing)
        made = creation.make(images, self.target, self.target_format, source.size, options, cache=self._cache)
        return creation.open_new(images, made, self.target_format, keys)

    def _existing(self, images: Images, source: Layer) -> Layer:
        self._check_compression(None)
        path, format = self.target, self.target_format
        if self.target_by_options:
            path, named = by_options(images, self.target, None)
            format = named or format
        target = images.open(path, format, read_only=False, cache=self._cache)
        if self.compress and isinstance(target, Compresses) and target.why_uncompressed is not None:
            raise ImageError(target.why_uncompressed, path=path)
        if target.size < source.size:
            raise ImageError("is too small", path=path, found=target.size, wanted=f"at least {source.size}")
        return target

    def _check_compression(self, options: Any) -> None:
        if not self.compress:
            return
        cls = layer_type(self.target_format)
        if not isinstance(cls, Compresses):
            raise ConfigError(f"images of the format {self.target_format!r} cannot be compressed", file=self.target)
        if getattr(options, "preallocation", "off") not in ("off", None):
            raise ConfigError("what is compressed cannot be preallocated", file=self.target, key="preallocation")
        if getattr(options, "encrypt_format", None) is not None:
            raise ConfigError("what is compressed is not encrypted", file=self.target, key="encrypt.format")
        if getattr(options, "data_file", None):
            raise ConfigError("nothing is compressed in an external data file", file=self.target, key="data_file")

    # -- the data ---------------------------------------------------------------------------------------------------

    def _copy(self, source: Layer, target: Layer) -> Copy:
        return Copy(
            source,
            target,
            sparse=self.sparse_size,
            fills_holes=not self.sparse_size,
            is_zeroed=self.target_is_zero or (not self.no_create and _reads_as_zeroes(target)),
            flags=Flag.WRITE_COMPRESSED if self.compress else Flag.NONE,
            unit=target.cluster_size if self.compress and isinstance(target, Compresses) else 1,
            workers=self.parallel,
            # Compressing takes longer than writing, and is done where the writing is.
            in_order=isinstance(target, HasClusters) and not (self.oob_writes or self.compress),
            salvage=self._salvage if self.salvage else None,
            rate=self.rate_limit,
            offload=self.offload,
        )

    def _ranges(self, sources: list[Layer], target: Layer) -> Iterator[Range]:
        images, backing = chain(sources[0]), chain(target)[1:]
        if backing and not self.no_create:
            return _above(self._runs(images), backing[0].size)
        return self._all(sources)

    def _all(self, sources: list[Layer]) -> Iterator[Range]:
        start = 0
        for source in sources:
            for run in joined(self._runs(chain(source))):
                yield Range(start + run.start, run.length, run.entry.zero)
            start += source.size

    def _runs(self, images: list[Layer]) -> Iterator[Run]:
        start, end = 0, images[0].size
        while start < end:
            try:
                for run in runs(images, start, end):
                    yield run
                    start = run.end
            except (NbdserverError, OSError) as error:
                if not self.salvage:
                    raise
                self._salvage(f"the allocation at byte {start} cannot be read: {error}")
                length = min(SALVAGED - start % SALVAGED, end - start)
                yield Run(start, length, MapEntry(length, data=True), 0, True)
                start += length

    def _salvage(self, message: str) -> None:
        """Say what has been taken for zeroes."""
        if not self.quiet:
            warn(message)

    # -- bitmaps ----------------------------------------------------------------------------------------------------

    def _check_bitmaps(self, source: Layer) -> None:
        if not isinstance(source, HasBitmaps):
            raise ConfigError(f"images of the format {source.type!r} have no bitmaps", file=self.sources[0])
        if not isinstance(layer_type(self.target_format), HasBitmaps):
            raise ConfigError(f"images of the format {self.target_format!r} have no bitmaps", file=self.target)
        for bitmap in source.bitmaps():
            if bitmap.in_use and not self.skip_broken_bitmaps:
                raise ImageError(
                    f"its bitmap {bitmap.name!r} is inconsistent; try --skip-broken-bitmaps, or remove it",
                    path=self.sources[0],
                )

    def _copy_bitmaps(self, source: Layer, target: Layer) -> None:
        assert isinstance(source, HasBitmaps) and isinstance(target, HasBitmaps)
        for bitmap in source.bitmaps():
            if bitmap.in_use:
                self._salvage(f"the bitmap {bitmap.name!r} is inconsistent and not copied")
                continue
            target.add_bitmap(bitmap.name, granularity=bitmap.granularity, enabled=bitmap.auto)
            target.merge_bitmap(bitmap.name, source, bitmap.name)


def _above(found: Iterable[Run], backing_size: int) -> Iterator[Range]:
    """What an overlay of a disk of ``backing_size`` must hold for it to show what the topmost image of ``found`` holds,
    and its chain with it. As qemu-img takes it, both have the same backing file."""
    for run in found:
        if run.depth > 0:
            continue
        end = run.end if run.present else min(run.end, backing_size)  # behind it, there are zeroes anyway
        if run.start < end:
            yield Range(run.start, end - run.start, run.entry.zero)


def _reads_as_zeroes(target: Layer) -> bool:
    """Whether a new image does: it says so itself, or is in new files."""
    if len(chain(target)) > 1:
        return False
    files = [child.filename for _, child in target.children() if child.filename is not None]
    return not any(is_device(name) for name in files) or all(run.entry.zero for run in runs([target], 0, target.size))


@dataclasses.dataclass(eq=False)
class _Joined(Layer):
    """Several disks as one."""

    parts: list[Layer]

    @property
    def starts(self) -> list[int]:
        return [0, *itertools.accumulate(part.size for part in self.parts)]

    @property
    def size(self) -> int:
        return self.starts[-1]

    @property
    def read_only(self) -> bool:
        return True

    @property
    def filename(self) -> str | None:
        return self.parts[0].filename

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterator[Extent]:
        starts = self.starts
        index = bisect.bisect_right(starts, offset) - 1
        for part, start in zip(self.parts[index:], starts[index:], strict=False):
            if offset < start + part.size:
                yield Extent(start + part.size - offset, part, offset - start)
                offset = start + part.size
