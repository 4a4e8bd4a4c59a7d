"""The `vilu` command: one group, each command's imports made only when it runs."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from vilu import __version__
from vilu.errors import UserError

# command -> module and attribute of its click command
_COMMANDS = {
    "ask": "vilu.serving.ask:ask_command",
    "calibrate": "vilu.cli.calibrate:calibrate_command",
    "classes": "vilu.serving.classes:classes_command",
    "demo": "vilu.cli.demo:demo_command",
    "eval": "vilu.cli.eval:eval_command",
    "export": "vilu.cli.export:export_command",
    "guard": "vilu.serving.guard:guard_command",
    "health": "vilu.cli.serve:health_command",
    "serve": "vilu.cli.serve:serve_command",
    "train": "vilu.cli.train:train_command",
    "versions": "vilu.export.versions:versions_command",
    "web": "vilu.serving.web:web_command",
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name].split(":")
        try:
            return getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] == "vilu":
                raise
            extras = dict.fromkeys(("ask", "classes", "guard"), "client") | {"web": "web"}
            extras |= dict.fromkeys(("health", "serve"), "server")
            extra = extras.get(cmd_name, "export")
            raise UserError(
                f"`vilu {cmd_name}` needs the package {error.name!r}: pip install 'vilu[{extra}]'"
            ) from None


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vilu")
def group() -> None:
    """CLIP answers with the probability that each is wrong: train, export, serve, ask."""


def run(command: click.Command, name: str) -> None:
    """Run a command; the user's mistake is one line on stderr and exit code 2."""
    try:
        code = command.main(prog_name=name, standalone_mode=False)
    except UserError as error:
        click.echo(f"{name}: {error}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        click.echo(f"{name}: {error.format_message()}", err=True)
        sys.exit(2)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def main() -> None:
    """Entry point of `vilu`."""
    run(group, "vilu")


def export_main() -> None:
    """Entry point of `vilu-export`, the same as `vilu export`."""
    from vilu.cli.export import export_command

    run(export_command, "vilu-export")
