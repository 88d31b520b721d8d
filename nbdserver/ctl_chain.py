"""``nbdserver ctl snapshot``, ``commit`` and ``stream``: the images under exports that are being served."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click

from nbdserver.ctl import Session, SizeType, follow, json_option, print_answer
from nbdserver.image import wording

Function = TypeVar("Function", bound=Callable[..., Any])


@click.group("snapshot")
def snapshot() -> None:
    """Keep what the disk of an export is now, while clients are connected: in a new overlay's backing file, or inside
    its image."""


@snapshot.command("overlay")
@click.argument("export")
@click.argument("file", type=click.Path())
@json_option
@click.pass_obj
def overlay(session: Session, export: str, file: str, as_json: bool) -> None:
    """Put a new overlay at FILE above the image of EXPORT, which stays what it is now.

    From then on FILE is the disk: name it in the configuration before the server is started again. (A reload takes that
    for no change.)
    """
    answer = session.execute("blockdev-snapshot-sync", export=export, snapshot_file=file, directory=os.getcwd())
    print_answer(answer, as_json, lambda: _overlay_lines(export, answer))


def _overlay_lines(export: str, answer: dict[str, Any]) -> Iterator[str]:
    yield f"{export!r}: writes go to {answer['file']} now, and no longer to {answer['backing']}"
    yield "Name it in the configuration before the server is started again."


@snapshot.command("list")
@click.argument("export")
@json_option
@click.pass_obj
def list_(session: Session, export: str, as_json: bool) -> None:
    """List the internal snapshots of EXPORT's image."""
    rows = session.execute("query-snapshots", export=export)
    print_answer(rows, as_json, lambda: iter(wording.snapshot_list(rows) if rows else ()))


@snapshot.command("create")
@click.argument("export")
@click.argument("name")
@json_option
@click.pass_obj
def create(session: Session, export: str, name: str, as_json: bool) -> None:
    """Make an internal snapshot, called NAME, of the disk of EXPORT as it is now."""
    answer = session.execute("blockdev-snapshot-internal-sync", export=export, name=name)
    print_answer(answer, as_json, lambda: iter(()))


@snapshot.command("delete")
@click.argument("export")
@click.argument("name")
@json_option
@click.pass_obj
def delete(session: Session, export: str, name: str, as_json: bool) -> None:
    """Delete the internal snapshot NAME, an id or a name."""
    answer = session.execute("blockdev-snapshot-delete-internal-sync", export=export, name=name)
    print_answer(answer, as_json, lambda: iter(()))


@snapshot.command("apply")
@click.argument("export")
@click.argument("name")
@click.option("--force", is_flag=True, help="Even if there are clients, under whose hands the disk becomes another.")
@json_option
@click.pass_obj
def apply(session: Session, export: str, name: str, force: bool, as_json: bool) -> None:
    """Make the disk of EXPORT what it was in the internal snapshot NAME, an id or a name."""
    answer = session.execute("blockdev-snapshot-apply-internal-sync", export=export, name=name, force=force)
    print_answer(answer, as_json, lambda: iter(()))


def _job_options(function: Function) -> Function:
    for option in (
        click.option("--speed", type=SizeType(), metavar="SIZE", help="Bytes a second at most."),
        click.option("--job-id", metavar="ID", help="What the job is called."),
        click.option("--background", is_flag=True, help="Do not wait: print the job's ID."),
    ):
        function = option(function)
    return json_option(function)


@click.command("commit")
@click.argument("export")
@click.option("--base", metavar="FILE", help="The image to write into.  [default: the lowest one]")
@click.option("--top", metavar="FILE", help="The first image of the chain to commit.  [default: the active one]")
@_job_options
@click.pass_obj
def commit(
    session: Session,
    export: str,
    base: str | None,
    top: str | None,
    speed: int | None,
    job_id: str | None,
    background: bool,
    as_json: bool,
) -> None:
    """Write what images of EXPORT's chain hold into one below them, and have the chain do without them.

    If the active image is among them, the base becomes the disk, and that image is emptied. With --background, when
    `job-complete` says so.
    """
    answer = session.execute(
        "block-commit", export=export, base=base, top=top, job_id=job_id, speed=speed, directory=os.getcwd()
    )
    _go_on(session, answer, background, as_json, completes=answer["active"])


@click.command("stream")
@click.argument("export")
@click.option("--base", metavar="FILE", help="The image to stand on then.  [default: none]")
@_job_options
@click.pass_obj
def stream(
    session: Session,
    export: str,
    base: str | None,
    speed: int | None,
    job_id: str | None,
    background: bool,
    as_json: bool,
) -> None:
    """Copy what images below EXPORT's active one hold into it, and have it do without them."""
    answer = session.execute(
        "block-stream", export=export, base=base, job_id=job_id, speed=speed, directory=os.getcwd()
    )
    _go_on(session, answer, background, as_json)


def _go_on(
    session: Session, answer: dict[str, Any], background: bool, as_json: bool, *, completes: bool = False
) -> None:
    """Follow a job that has been started to its end, if that is wanted."""
    if background:
        print_answer(answer, as_json, lambda: iter((answer["id"],)))
        return
    if completes:
        follow(session, answer["id"], ("ready",), as_json=as_json, is_told=False)
        session.execute("job-complete", id=answer["id"])
    follow(session, answer["id"], ("concluded",), as_json=as_json)
