"""The `vilu` command. Each subcommand has its own module here, which imports heavy packages only when it runs."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from importlib import import_module
from pathlib import Path

import click

from vilu import __version__
from vilu.cli.command import Group
from vilu.errors import UserError

COMMANDS = (
    "ask",
    "calibrate",
    "classes",
    "demo",
    "embed",
    "eval",
    "export",
    "feedback",
    "guard",
    "health",
    "info",
    "monitor",
    "predict",
    "score",
    "serve",
    "train",
    "versions",
    "web",
)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EPIPE)  # what a failed write may say


class _Lazy(Group):
    """Imports the module of a command when the command is named or listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"vilu.cli.{cmd_name}"), f"{cmd_name}_command")
        return command


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vilu")
@click.option("-q", "--quiet", is_flag=True, help="Show no notes and no progress, only results, warnings and errors.")
@click.option(
    "-v", "--verbose", is_flag=True, help="Also show what the libraries log, and where in the program an error arose."
)
@click.option("--log-file", type=click.Path(path_type=Path), help="File to append everything to that is said.")
def group(quiet: bool, verbose: bool, log_file: Path | None) -> None:
    """Serve CLIP's answers with the probability that each is wrong.

    Train a failure predictor, evaluate it, export it with CLIP, serve both, and ask the server.

    Exit codes: 0 done, 1 it failed (such as a server that does not answer), 2 wrong use (such as an unknown option or a
    bad input file), 130 interrupted.
    """
    from vilu.cli.output import set_up

    set_up(quiet, verbose, log_file)


def run(command: click.Command, name: str) -> None:
    """Run a command and exit.

    An error prints one line on stderr. The exit code is 2 for a user's mistake, and 1 for what failed.
    """
    from vilu.cli import output

    _open_closed()
    output.set_up()
    _print_anything()
    try:
        code = command.main(prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        output.failed(f"{name}: {error}")
        sys.exit(error.exit_code)
    except getattr(click.exceptions, "NoArgsIsHelpError", ()) as error:  # click 8.2 and later
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        output.failed(f"{name}: {' '.join(error.format_message().split())}")
        sys.exit(2)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        # click turns an interrupt into Abort, whose cause may say what was kept.
        kept = str(error.__cause__ or error.__context__ or error)
        if kept:
            output.failed(f"{name}: {kept}")
        sys.exit(130)
    except PermissionError as error:
        if error.filename is None:
            raise
        output.failed(f"{name}: {os.fsdecode(error.filename)}: {error.strerror}")
        sys.exit(2)
    except OSError as error:
        if error.filename is not None or error.errno not in FULL:
            raise
        # What is left in the buffer cannot be written either, and Python would complain of it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.errno != errno.EPIPE:  # who closed the pipe knows it
            output.failed(f"{name}: its output cannot be written ({error.strerror})")
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _open_closed() -> None:
    """Open what a caller has closed of standard input, output and error, as "vilu ... >&-" does: it holds nothing.

    Without this the next file that is opened would take its number, and what is printed would go there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            setattr(sys, name, open(number, "w" if number else "r"))


def _print_anything() -> None:
    """Let standard output take every text: "?" where a terminal's encoding lacks a character.

    A file's name that is not UTF-8 keeps its bytes.
    """

    def encoded(error: UnicodeError) -> tuple[bytes, int]:
        assert isinstance(error, UnicodeEncodeError)
        text = error.object[error.start : error.end]
        return b"".join(bytes([ord(c) & 255]) if "\udc80" <= c <= "\udcff" else b"?" for c in text), error.end

    codecs.register_error("vilu", encoded)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="vilu")


def main() -> None:
    """Run `vilu`."""
    run(group, "vilu")


def export_main() -> None:
    """Run `vilu-export`, which does the same as `vilu export`."""
    from vilu.cli.export import export_command

    run(export_command, "vilu-export")
