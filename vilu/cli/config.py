"""`--config FILE`: options of a command from a TOML file. The command line wins."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Any

import click

from vilu.cli.command import at_home
from vilu.cli.options import PATH
from vilu.errors import UserError

SECTIONS = ("serve", "train")
SECRETS = ("token", "control-token")


def _read(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        document = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file ({error})") from None
    for name, section in document.items():
        if name not in SECTIONS:
            raise UserError(f"{path}: no section [{name}]{_near(name, SECTIONS)}")
        if not isinstance(section, dict):
            raise UserError(f"{path}: {name} must be a section, [{name}]")
    section = ctx.command.name or ""
    ctx.default_map = options_of(ctx.command, document.get(section, {}), f"{path}, [{section}]")


def options_of(command: click.Command, section: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the values of a section by the names of the command's parameters.

    Args:
        command: the command.
        section: the values by the long names of its options, without the dashes in front.
        where: the section's place, for messages.

    Raises:
        UserError: an unknown option, a value of the wrong kind, or a secret in the file.
    """
    known: dict[str, click.Option] = {}
    for option in command.params:
        if isinstance(option, click.Option) and option.name != "config":
            shown = [name for name in option.opts if name.startswith("--") and name not in getattr(option, "old", ())]
            known |= {name[2:]: option for name in shown}
    found: dict[str, Any] = {}
    for key, value in section.items():
        if key not in known:
            raise UserError(f"{where}: no option {key!r}{_near(key, list(known))}")
        option = known[key]
        if key in SECRETS and not (isinstance(value, str) and value.startswith("@")):
            raise UserError(
                f"{where}: {key} does not belong in this file: name a file that holds it, as in '@token.txt'"
            )
        values = value if isinstance(value, list) and option.multiple else [value]
        for one in values:
            if isinstance(one, list | dict) or isinstance(one, bool) != option.is_flag:
                kind = "true or false" if option.is_flag else "a list of values" if option.multiple else "one value"
                raise UserError(f"{where}: {key} takes {kind}, got {one!r}")
        texts = [one if isinstance(one, bool) else at_home(str(one)) for one in values]
        found[option.name or key] = texts if option.multiple else texts[0]
    return found


def _near(name: str, known: list[str] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name.replace("_", "-").lower(), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


config_option = click.option(
    "--config",
    type=PATH,
    is_eager=True,
    expose_value=False,
    callback=_read,
    help="TOML file with this command's options, by their long names, in a section of its name. The command line wins.",
)
