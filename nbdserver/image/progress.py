"""How far a long command has come: a bar on the terminal, or percentages where it was asked for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import click

from nbdserver.format import Progress, no_progress

#: The bar counts in these steps: it need not be drawn for each block.
STEPS = 1000


@contextlib.contextmanager
def progress(label: str, *, wanted: bool, quiet: bool) -> Iterator[Progress]:
    """Who is told how far things are, for the time of the block. Everything goes to stderr: a bar if that is a
    terminal; else, if it is ``wanted``, percentages. Thread-safe as far as the caller calls one at a time."""
    if quiet:
        yield no_progress
    elif sys.stderr.isatty():
        with _bar(label) as tell:
            yield tell
    elif wanted:
        with _percentages() as tell:
            yield tell
    else:
        yield no_progress


@contextlib.contextmanager
def _bar(label: str) -> Iterator[Progress]:
    at = 0
    with click.progressbar(length=STEPS, label=label, file=sys.stderr) as bar:

        def tell(done: int, total: int) -> None:
            nonlocal at
            step = done * STEPS // total if total else STEPS
            if step > at:
                bar.update(step - at)
                at = step

        yield tell
        bar.update(STEPS - at)


@contextlib.contextmanager
def _percentages() -> Iterator[Progress]:
    at = -1

    def tell(done: int, total: int) -> None:
        nonlocal at
        percent = done * 100 // total if total else 100
        if percent > at:
            at = percent
            click.echo(f"    ({percent:.2f}/100%)\r", nl=False, err=True)

    tell(0, 1)
    yield tell
    tell(1, 1)
    click.echo(err=True)
