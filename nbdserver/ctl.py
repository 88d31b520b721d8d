"""``nbdserver ctl``: a running server, asked and told through its control socket.

Every command prints a table for people, or with ``--json`` what the server has returned.
"""

from __future__ import annotations

import json
import os
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, Final, TypeVar

import click

from nbdserver import config, explain, registry
from nbdserver.control import ControlClient
from nbdserver.errors import ConfigError

#: Where the server's configuration is, if nothing else says which server is meant.
CONFIG_DEFAULT: Final = "exports.toml"

#: Seconds between two looks at a job that is waited for.
JOB_POLL_S: Final = 0.2

Function = TypeVar("Function", bound=Callable[..., Any])


class Session:
    """What the commands share: the way to the server, and how to print."""

    def __init__(self, path: str | None) -> None:
        self._path = path

    def execute(self, command: str, **arguments: Any) -> Any:
        """Raises ConfigError, RemoteError."""
        given = {key: value for key, value in arguments.items() if value is not None}
        with ControlClient(self._path or _configured_path()) as client:
            return client.execute(command, **given)


def _configured_path() -> str:
    """The control socket that the configuration here names. Raises ConfigError."""
    if not os.path.exists(CONFIG_DEFAULT):
        raise ConfigError(f"name the server's control socket by --socket (there is no {CONFIG_DEFAULT} here)")
    path = config.load(CONFIG_DEFAULT).control
    if path is None:
        raise ConfigError("is not set: the server has no control socket", file=CONFIG_DEFAULT, key="control")
    return path


def json_option(function: Function) -> Function:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def print_answer(answer: Any, as_json: bool, lines: Callable[[], Iterator[str]]) -> None:
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    for line in lines():
        click.echo(line)


class SizeType(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        try:
            return registry.parse_size(int(value) if str(value).isdecimal() else value)
        except ValueError as error:
            self.fail(f"found {value!r}, allowed is {error}", parameter, context)


@click.group("ctl", short_help="Ask and change a running server.")
@click.option(
    "--socket",
    "-s",
    "path",
    metavar="PATH",
    envvar="NBDSERVER_CONTROL",
    help="The server's control socket.  [default: NBDSERVER_CONTROL, or what exports.toml here says]",
)
@click.pass_context
def ctl(context: click.Context, path: str | None) -> None:
    """Ask and change a running server through its control socket (see `control` in exports.toml, and --control)."""
    context.obj = Session(path)


# -- questions -----------------------------------------------------------------------------------------------------


@ctl.command("list")
@json_option
@click.pass_obj
def list_(session: Session, as_json: bool) -> None:
    """List the exports and their clients."""
    rows = session.execute("query-block-exports")
    print_answer({"exports": rows}, as_json, lambda: as_table(_export_table(rows), _client_table(rows)))


def as_table(*tables: Sequence[Sequence[str]]) -> Iterator[str]:
    """Tables of more than a heading, with an empty line between them."""
    there = [rows for rows in tables if len(rows) > 1]
    for index, rows in enumerate(there):
        if index:
            yield ""
        yield from (line.rstrip() for line in explain.columns(rows))


def _export_table(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [("EXPORT", "SIZE", "ACCESS", "STATE", "CLIENTS", "LAYERS")]
    for row in rows:
        if "size" not in row:
            more = row["why"] if "why" in row else f"{row['instances']} in use"
            table.append((row["name"], "", "", f"{row['state']}: {more}", "", ""))
            continue
        layers = " ".join(_layer_words(layer) for layer in row["layers"])
        access = ("read-only" if row["read_only"] else "writable") + (", restricted" if row["access"] else "")
        state = row["state"] + (", default" if row["default"] else "") + ("" if row["configured"] else ", added")
        table.append((row["name"], str(row["size"]), access, state, str(len(row["clients"])), layers))
    return table


def _layer_words(layer: dict[str, Any]) -> str:
    role = layer["path"].strip("/")
    name = f"({layer['filename']})" if layer["type"] == "file" else ""
    return f"{role}{':' if role else ''}{layer['type']}{name}"


def _client_table(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [("CLIENT", "EXPORT", "ADDRESS", "SINCE", "REQUESTS", "READ", "WRITTEN")]
    for client in (client for row in rows for client in row.get("clients", ())):
        since = datetime.fromtimestamp(client["since"]).isoformat(" ", "seconds")
        counts = (str(client[key]) for key in ("requests", "bytes_read", "bytes_written"))
        table.append((str(client["id"]), client["export"], client["address"], since, *counts))
    return table


@ctl.command()
@json_option
@click.pass_obj
def stats(session: Session, as_json: bool) -> None:
    """Show the counters of the engine, of exports, their layers and files, and of clients."""
    answer = session.execute("query-stats")
    print_answer(answer, as_json, lambda: _flat(answer))


def _flat(value: Any, path: str = "") -> Iterator[str]:
    """A nested answer as lines "a.b.c: 5"."""
    items: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        yield f"{path}: {value}"
    for key, item in items:
        yield from _flat(item, f"{path}.{key}" if path else key)


@ctl.command("explain")
@click.argument("export")
@click.argument("operation", type=click.Choice(list(explain.OPERATIONS)))
@click.argument("range_", metavar="OFFSET+LENGTH")
@json_option
@click.pass_obj
def explain_(session: Session, export: str, operation: str, range_: str, as_json: bool) -> None:
    """Show the way of one request through the open layers of EXPORT, as `nbdserver explain` does of a configuration.

    Says of each part also whether the engine has it cached: if so, and if it is mapped, it is served with no Python.
    """
    try:
        offset, length = explain.parse_range(range_)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="OFFSET+LENGTH") from error
    answer = session.execute("explain", export=export, operation=operation, offset=offset, length=length)
    print_answer(answer, as_json, lambda: iter((explain.table(explain.Explanation.of_json(answer)),)))


# -- changes -------------------------------------------------------------------------------------------------------


@ctl.command()
@click.option("--hard", is_flag=True, help="Disconnect the clients of exports that are removed or changed.")
@json_option
@click.pass_obj
def reload(session: Session, hard: bool, as_json: bool) -> None:
    """Take up a changed configuration.

    New exports appear. Removed ones take no new clients, and end after their last. Unchanged ones are not touched.
    Changed ones are replaced; one that needs a file which its predecessor has, waits for the end of that. When anything
    in the configuration is wrong, nothing changes.
    """
    answer = session.execute("reload", hard=hard)
    print_answer(answer, as_json, lambda: _reload_lines(answer))


def _reload_lines(answer: dict[str, Any]) -> Iterator[str]:
    for key, found in answer.items():
        if key == "unchanged":
            yield f"{key}: {len(found)}"
            continue
        for name in found:
            why = f": {found[name]}" if isinstance(found, dict) else ""
            yield f"{key}: {name}{why}"


@ctl.command()
@click.argument("name")
@click.argument("image", required=False)
@click.option("--format", "-f", metavar="FORMAT", help="The format of IMAGE, such as qcow2 or raw.  [default: probed]")
@click.option(
    "--layers", metavar="TOML", help="Layers instead of an image, as in a configuration: [{type = ...}, ...]."
)
@click.option("--read-only", "-r", is_flag=True, help="Serve it read-only.")
@click.option("--description", metavar="TEXT", help="What clients are told of it.")
@click.option("--tls-required", is_flag=True, help="Serve it to clients with TLS alone.")
@click.option("--access", metavar="TOML", help='Whom it is for, as in a configuration: {users = ["alice"]}.')
@json_option
@click.pass_obj
def add(
    session: Session,
    name: str,
    image: str | None,
    format: str | None,
    layers: str | None,
    read_only: bool,
    description: str | None,
    tls_required: bool,
    access: str | None,
    as_json: bool,
) -> None:
    """Serve one more export: IMAGE, or layers, as NAME. A reload does not touch it.

    Its layers may stand on those of an export that is served: {node = "@vm"}. So a disk that is being written can be
    backed up as it is now:

    \b
      nbdserver ctl filter add vm '{type = "copy-before-write", target = [{type = "memory", size = "20G"}]}'
      nbdserver ctl add vm-now --layers '[{type = "snapshot-access"}, {node = "@vm"}]'
    """
    answer = session.execute(
        "block-export-add",
        name=name,
        image=image,
        format=format,
        layers=None if layers is None else toml_value(layers, "--layers"),
        read_only=read_only or None,
        description=description,
        tls="required" if tls_required else None,
        access=None if access is None else toml_value(access, "--access"),
        directory=os.getcwd(),
    )
    writable = "read-only" if answer["read_only"] else "writable"
    print_answer(answer, as_json, lambda: iter((f"{name!r}: {answer['size']} bytes, {writable}",)))


def toml_value(text: str, hint: str) -> Any:
    """A value as it stands in a configuration. Raises click.BadParameter."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{text!r} is no TOML: {error}", param_hint=hint) from error


@ctl.command()
@click.argument("name")
@click.option("--hard", "mode", flag_value="hard", help="Disconnect its clients.")
@click.option("--drain", "mode", flag_value="drain", help="Take no new clients; it ends after the last.")
@json_option
@click.pass_obj
def remove(session: Session, name: str, mode: str | None, as_json: bool) -> None:
    """Serve an export no longer. By default, only if it has no clients.

    The next reload brings it back if the configuration has it.
    """
    answer = session.execute("block-export-del", name=name, mode=mode)
    words = "has ended" if answer["ended"] else "ends after its last client"
    print_answer(answer, as_json, lambda: iter((f"{name!r} {words}",)))


@ctl.command()
@click.argument("client", type=int)
@json_option
@click.pass_obj
def disconnect(session: Session, client: int, as_json: bool) -> None:
    """Close the connection of one client, by the number that `list` shows."""
    print_answer(session.execute("disconnect", client=client), as_json, lambda: iter(()))


@ctl.command()
@click.argument("export")
@click.argument("size", type=SizeType())
@json_option
@click.pass_obj
def resize(session: Session, export: str, size: int, as_json: bool) -> None:
    """Give the disk of EXPORT another size. Clients see it when they connect again."""
    answer = session.execute("block_resize", export=export, size=size)
    print_answer(answer, as_json, lambda: iter((f"{export!r}: {size} bytes",)))


# -- filters -------------------------------------------------------------------------------------------------------


@ctl.group("filter")
def filter_() -> None:
    """Put filters above the layers of an export, and take them away, while clients are connected."""


@filter_.command("add")
@click.argument("export")
@click.argument("table", metavar="TOML")
@json_option
@click.pass_obj
def filter_add(session: Session, export: str, table: str, as_json: bool) -> None:
    """Put a filter above EXPORT, as a configuration has it: '{type = "throttle", bps_total = "10M"}'."""
    answer = session.execute("filter-add", export=export, filter=toml_value(table, "TOML"), directory=os.getcwd())
    print_answer(answer, as_json, lambda: iter(()))


@filter_.command("remove")
@click.argument("export")
@json_option
@click.pass_obj
def filter_remove(session: Session, export: str, as_json: bool) -> None:
    """Take the topmost layer of EXPORT away, which must be a filter."""
    answer = session.execute("filter-remove", export=export)
    print_answer(answer, as_json, lambda: iter((f"removed: {answer['type']}",)))


# -- jobs ----------------------------------------------------------------------------------------------------------


@ctl.command()
@json_option
@click.pass_obj
def jobs(session: Session, as_json: bool) -> None:
    """List the jobs, and how far they are."""
    answer = session.execute("query-jobs")
    print_answer({"jobs": answer}, as_json, lambda: as_table(_job_table(answer)))


def _job_table(jobs: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [("JOB", "TYPE", "STATUS", "DONE", "OF", "SPEED", "ERROR")]
    for job in jobs:
        counts = (str(job[key]) for key in ("current-progress", "total-progress", "speed"))
        table.append((job["id"], job["type"], job["status"], *counts, job.get("error", "")))
    return table


@ctl.command("job-wait")
@click.argument("job_id", metavar="JOB")
@json_option
@click.pass_obj
def job_wait(session: Session, job_id: str, as_json: bool) -> None:
    """Wait until JOB has concluded (or is ready), with a progress bar. Exit status 1 if it has failed."""
    follow(session, job_id, ("concluded", "ready"), as_json=as_json)


def follow(session: Session, id: str, until: Sequence[str], *, as_json: bool, is_told: bool = True) -> None:
    """Wait until a job has come to one of these states, with a progress bar; what has become of it is printed if it is
    to be told, or has failed, which ends the program. Raises ConfigError, RemoteError."""
    job = _job(session, id)
    with click.progressbar(length=1, label=id, file=sys.stderr, hidden=as_json) as bar:
        while job["status"] not in (*until, "concluded"):
            _show(bar, job)
            time.sleep(JOB_POLL_S)
            job = _job(session, id)
        _show(bar, job)
    if is_told or "error" in job:
        print_answer(job, as_json, lambda: as_table(_job_table([job])))
    if "error" in job:
        raise click.exceptions.Exit(1)


def _job(session: Session, id: str) -> dict[str, Any]:
    for job in session.execute("query-jobs"):
        if job["id"] == id:
            return dict(job)
    raise ConfigError(f"there is no job {id!r}")


def _show(bar: Any, job: dict[str, Any]) -> None:
    bar.length = max(job["total-progress"], 1)
    bar.update(job["current-progress"] - bar.pos)


def _job_command(name: str, help: str) -> None:
    """A command that names a job, and nothing else."""

    @ctl.command(name, help=help)
    @click.argument("job_id", metavar="JOB")
    @json_option
    @click.pass_obj
    def command(session: Session, job_id: str, as_json: bool) -> None:
        print_answer(session.execute(name, id=job_id), as_json, lambda: iter(()))


_job_command("job-pause", "Have JOB wait.")
_job_command("job-resume", "Have JOB go on.")
_job_command("job-cancel", "Have JOB end without having done its work.")
_job_command("job-complete", "Have JOB, which is ready, come to its end.")
_job_command("job-dismiss", "Forget JOB, which has concluded.")


@ctl.command("job-set-speed")
@click.argument("job_id", metavar="JOB")
@click.argument("speed", type=SizeType())
@json_option
@click.pass_obj
def job_set_speed(session: Session, job_id: str, speed: int, as_json: bool) -> None:
    """Have JOB do SPEED bytes a second at most; 0: as many as it can."""
    print_answer(session.execute("block-job-set-speed", id=job_id, speed=speed), as_json, lambda: iter(()))


@ctl.command("quit")
@json_option
@click.pass_obj
def quit_(session: Session, as_json: bool) -> None:
    """Stop the server: what was accepted is finished."""
    print_answer(session.execute("quit"), as_json, lambda: iter(()))
