"""The group of commands ``nbdserver image``. Each is a module here, imported when it is called."""

from __future__ import annotations

import importlib
from typing import Any, Final

import click

COMMANDS: Final = (
    "bitmap",
    "check",
    "commit",
    "compare",
    "convert",
    "create",
    "info",
    "map",
    "measure",
    "rebase",
    "resize",
    "snapshot",
)

#: Where the exit status of wrong usage is click's own, 2: what 1 says there is that images differ.
STATUS_2: Final = frozenset({"compare"})


class _WrongUsage(click.UsageError):
    """As qemu-img exits. (2 would say of a check that the image is corrupt.)"""

    exit_code = 1


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"nbdserver.image.{cmd_name}").command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            if error.ctx is not None and error.ctx.info_name in STATUS_2:
                raise
            raise _WrongUsage(error.format_message(), error.ctx) from error


@click.group(cls=_Commands, short_help="Make, examine, copy and change image files.")
def image() -> None:
    """Make, examine, copy and change image files: qemu-img's commands, with its options and exit statuses.

    Images are locked as QEMU locks them: what a virtual machine or a server is writing is refused, unless it is only
    to be looked at, with --force-share. Files that an image names (its backing files) are opened in the directory of
    the image, and below it; elsewhere only if --root says so.

    \b
    Examples:
      nbdserver image create -f qcow2 -b base.qcow2 -F qcow2 vm.qcow2
      nbdserver image convert -O qcow2 -c disk.raw disk.qcow2
      nbdserver image info --backing-chain vm.qcow2
      nbdserver image check --repair leaks vm.qcow2
    """
