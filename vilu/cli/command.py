"""Classes that all commands share: near names, a message for a missing package, options with former names."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import click

from vilu.errors import UserError


def at_home(value: str) -> str:
    """Return an argument with the user's home in place of ~, where a shell does not do it.

    These places are "~/photos/*.jpg", --data=~/photos, @~/token and a configuration file.
    """
    found = re.match("((?:--[a-z-]+=)?@?)(~/.*)", value, re.DOTALL)
    return found[1] + os.path.expanduser(found[2]) if found else value


class Command(click.Command):
    """A command that imports its packages when it runs. If one is missing, one line names the extra to install.

    extra: extra of vilu that installs the packages, such as "client".
    """

    def __init__(self, *args: Any, extra: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.extra = extra

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        given = [at_home(one) for one in args]
        with self._packages(f"{parent.command_path if parent else ''} {info_name or ''}".strip()):
            return super().make_context(info_name, given, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with self._packages(ctx.command_path):
            return super().invoke(ctx)

    @contextlib.contextmanager
    def _packages(self, command: str) -> Iterator[None]:
        try:
            yield
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", "vilu") or package in sys.stdlib_module_names:
                raise
            raise UserError(f"`{command}` needs the package {package!r}: pip install 'vilu[{self.extra}]'") from None


class Group(click.Group):
    """A group that suggests the commands whose names are near to an unknown one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(args[0].lower(), known, n=2)
            hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"There are {', '.join(known)}."
            ctx.fail(f"No such command {args[0]!r}. {hint}")
        return super().resolve_command(ctx, args)


class RenamedOption(click.Option):
    """An option that still accepts its former names. Neither the help nor an error message shows them.

    old: former names as click.option wants them: "--name", or "--name/--no-name" for a flag.
    """

    def __init__(self, param_decls: list[str], *, old: str, **kwargs: Any) -> None:
        super().__init__([*param_decls, old], **kwargs)
        self.old = {name.strip() for name in old.split("/")}

    def _shown(self) -> click.Option:
        shown = copy.copy(self)
        shown.opts = [name for name in self.opts if name not in self.old]
        shown.secondary_opts = [name for name in self.secondary_opts if name not in self.old]
        return shown

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        return click.Option.get_help_record(self._shown(), ctx)

    def get_error_hint(self, *args: Any, **kwargs: Any) -> str:
        return click.Option.get_error_hint(self._shown(), *args, **kwargs)
