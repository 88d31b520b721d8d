"""``nbdserver ctl bitmap``: the dirty bitmaps of exports that are being served."""

from __future__ import annotations

from typing import Any

import click

from nbdserver.ctl import Session, SizeType, as_table, json_option, print_answer


@click.group("bitmap")
def bitmap() -> None:
    """Change the dirty bitmaps of an export, and what it offers of them, while clients are connected."""


@bitmap.command("list")
@click.argument("export")
@json_option
@click.pass_obj
def list_(session: Session, export: str, as_json: bool) -> None:
    """List the bitmaps that EXPORT's disk keeps."""
    rows = session.execute("query-dirty-bitmaps", export=export)
    print_answer(rows, as_json, lambda: as_table(_table(rows)))


def _table(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [("NAME", "GRANULARITY", "STATE", "DIRTY")]
    for row in rows:
        state = "inconsistent" if row["inconsistent"] else "recording" if row["recording"] else "disabled"
        count = "" if row["count"] is None else str(row["count"])
        table.append((row["name"], str(row["granularity"]), state, count))
    return table


@bitmap.command("add")
@click.argument("export")
@click.argument("name")
@click.option("--granularity", "-g", type=SizeType(), metavar="SIZE", help="What a bit stands for.")
@click.option("--disabled", is_flag=True, help="Record nothing until it is enabled.")
@json_option
@click.pass_obj
def add(session: Session, export: str, name: str, granularity: int | None, disabled: bool, as_json: bool) -> None:
    """Add the bitmap NAME, which records what is written from now on."""
    answer = session.execute(
        "block-dirty-bitmap-add", export=export, name=name, granularity=granularity, disabled=disabled
    )
    print_answer(answer, as_json, lambda: iter(()))


@bitmap.command("merge")
@click.argument("export")
@click.argument("target")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@json_option
@click.pass_obj
def merge(session: Session, export: str, target: str, sources: tuple[str, ...], as_json: bool) -> None:
    """Mark in TARGET all that is marked in the SOURCEs."""
    answer = session.execute("block-dirty-bitmap-merge", export=export, target=target, bitmaps=list(sources))
    print_answer(answer, as_json, lambda: iter(()))


@bitmap.command("offer")
@click.argument("export")
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.option("--all", "is_all", is_flag=True, help="All that there are.")
@json_option
@click.pass_obj
def offer(session: Session, export: str, names: tuple[str, ...], is_all: bool, as_json: bool) -> None:
    """Offer clients that come from now on the bitmaps NAME, and no others."""
    answer = session.execute("block-export-offer", export=export, bitmaps=True if is_all else list(names))
    print_answer(answer, as_json, lambda: iter(answer["contexts"]))


def _change(verb: str, help: str) -> None:
    @bitmap.command(verb, help=help)
    @click.argument("export")
    @click.argument("name")
    @json_option
    @click.pass_obj
    def command(session: Session, export: str, name: str, as_json: bool) -> None:
        answer = session.execute(f"block-dirty-bitmap-{verb}", export=export, name=name)
        print_answer(answer, as_json, lambda: iter(()))


_change("remove", "Remove the bitmap NAME, for good.")
_change("clear", "Mark nothing in NAME.")
_change("enable", "Have NAME record what is written.")
_change("disable", "Have NAME stay as it is.")
