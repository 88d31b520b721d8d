"""scripts/bench: our server side by side with every other that is installed."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import click

from tests.bench.amounts import amounts
from tests.bench.contest import Contest
from tests.bench.images import MIB, Images
from tests.bench.plot import svg
from tests.bench.report import Compared, Grown, Results, as_json, markdown, summary
from tests.bench.rows import Growth, Row, growths, rows


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Fewer rows, shorter samples, a smaller image: under 2 minutes.")
@click.option("--row", "patterns", multiple=True, metavar="NAME", help="Only these rows; patterns such as 'tcp-*'.")
@click.option("--list", "listing", is_flag=True, help="Name the rows and end.")
@click.option("--rounds", type=click.IntRange(1), help="Samples of each server.  [default: 5; quick: 3]")
@click.option("--size", type=click.IntRange(16), metavar="MIB", help="Of the image.  [default: 1024; quick: 256]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write every sample there.")
@click.option("--svg", "svg_path", type=click.Path(path_type=Path), help="Write a plot of the comparison there.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("/var/tmp"),
    show_default=True,
    help="Where images are made, and deleted at the end: a file system with room for 8 GiB that knows direct I/O.",
)
def main(
    quick: bool,
    patterns: Sequence[str],
    listing: bool,
    rounds: int | None,
    size: int | None,
    json_path: Path | None,
    svg_path: Path | None,
    directory: Path,
) -> None:
    """Compare this server with qemu-nbd, nbdkit and nbd-server, whichever are installed.

    Same file, same client, alternating rounds. Each row is a ratio to the best of the others in the same rounds: of the
    rate, and of the server's CPU time per request. All of it takes under 15 minutes.

    Exits with 1 if a row is not what is wanted of it.
    """
    _allow_files()
    with tempfile.TemporaryDirectory(prefix="nbdserver-bench-", dir=directory) as place:
        bench = Bench(Path(place), quick, rounds or (3 if quick else 5), patterns, size)
        if listing:
            click.echo("\n".join(bench.names()))
            return
        results = bench.run()
    click.echo(markdown(results), nl=False)
    if json_path:
        json_path.write_text(json.dumps(as_json(results), indent=1) + "\n")
    if svg_path:
        svg_path.write_text(svg(results.compared))
    sys.exit(not results.are_met())


class Bench:
    """One run over the rows that were chosen."""

    def __init__(
        self, directory: Path, quick: bool, rounds: int, patterns: Sequence[str], size_mib: int | None
    ) -> None:
        self.directory = directory
        self.quick = quick
        self.patterns = patterns
        # Once the fastest of the peers; the full run goes on with the thriftiest too.
        self.kept = 1 if quick else 2
        self.results = Results(rounds, seconds=0.3 if quick else 0.5)
        self.images = Images(directory, (size_mib or (256 if quick else 1024)) * MIB)
        self.began = time.monotonic()

    def names(self) -> list[str]:
        named = [*growths(self.images, 0), *amounts(self.images, self.directory, 0)]
        return [row.name for row in rows(self.images, 0) if self._is_chosen(row.name, row.quick)] + [
            name for name, _ in named if self._is_chosen(name, False)
        ]

    def run(self) -> Results:
        unknown = [name for name in self.patterns if not any(fnmatchcase(row, name) for row in self.names())]
        if unknown:
            raise click.UsageError(f"no row is called {', '.join(unknown)}; --list names them")
        seconds = self.results.seconds
        for row in rows(self.images, seconds):
            if self._is_chosen(row.name, row.quick):
                self._say(row.name)
                self._compare(row)
        for name, make in growths(self.images, seconds):
            if self._is_chosen(name, False):
                self._say(name)
                self._grow(make())
        for name, measure in amounts(self.images, self.directory, self.results.rounds):
            if self._is_chosen(name, False):
                self._say(name)
                self.results.amounts += measure()
        return self.results

    def _is_chosen(self, name: str, quick: bool) -> bool:
        if self.patterns:
            return any(fnmatchcase(name, pattern) for pattern in self.patterns)
        return quick or not self.quick

    def _compare(self, row: Row) -> None:
        contestants = list(row.contestants())
        if len(contestants) < 2:
            return self._say(f"{row.name}: nobody to compare with is installed")
        with Contest(contestants, self.directory) as contest:
            contest.trial(self.kept)
            ours, *peers = contest.rounds(self.results.rounds)
        self.results.compared.append(Compared(row.name, ours, peers, row.wanted))
        return self._say(f"{row.name}: {summary(self.results.compared[-1])}")

    def _grow(self, growth: Growth) -> None:
        with Contest(growth.points, self.directory) as contest:
            contest.rounds(1)
            self.results.grown.append(Grown(growth.name, contest.rounds(self.results.rounds), growth.rate_min))

    def _say(self, text: str) -> None:
        click.echo(f"{time.monotonic() - self.began:4.0f} s  {text}", err=True)


def _allow_files() -> None:
    """The connections of the rows that have many, at both ends: servers inherit the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
