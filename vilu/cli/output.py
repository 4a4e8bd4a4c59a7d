"""What commands say: results on standard output; notes and progress on standard error; all of it in `--log-file`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vilu.errors import UserError

if TYPE_CHECKING:
    from logging import Handler, Logger


class _Settings:
    quiet = verbose = False
    log: Logger | None = None
    handlers: tuple[Handler, ...] = ()


_settings = _Settings()


def set_up(quiet: bool = False, verbose: bool = False, log_file: Path | None = None) -> None:
    """Set how much the command of this process says.

    Args:
        quiet: no notes and no progress; results, warnings and errors stay.
        verbose: also show what the libraries log, and where in the program an error arose.
        log_file: file that everything said is appended to, with the time.

    Raises:
        UserError: both quiet and verbose, or the file cannot be written.
    """
    if quiet and verbose:
        raise UserError("--quiet and --verbose: give one or the other")
    _settings.quiet, _settings.verbose, _settings.log = quiet, verbose, None
    if not (verbose or log_file or _settings.handlers):
        return
    import logging

    root, ours = logging.getLogger(), logging.getLogger("vilu.cli.said")
    for handler in _settings.handlers:
        root.removeHandler(handler)
        handler.close()
    handlers: list[Handler] = []
    if verbose:
        handlers.append(logging.StreamHandler())
        handlers[0].addFilter(lambda record: record.name != ours.name)  # the screen has these already
    if log_file is not None:
        try:
            handlers.append(logging.FileHandler(log_file, encoding="utf-8", errors="backslashreplace"))
        except OSError as error:
            raise UserError(f"--log-file {log_file}: cannot be written ({error.strerror})") from None
        _settings.log = ours
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
    logging.getLogger("vilu").setLevel(logging.DEBUG if verbose else logging.INFO if log_file else logging.NOTSET)
    _settings.handlers = tuple(handlers)


def is_quiet() -> bool:
    """Whether notes and progress are not shown."""
    return _settings.quiet


def in_terminal() -> bool:
    """Whether standard output is a terminal, so that a person reads it."""
    return sys.stdout.isatty()


def result(text: str) -> None:
    """Print a result on standard output."""
    if _settings.log is not None:
        _settings.log.info("%s", text)
    print(text, flush=True)  # click.echo writes UTF-8 to a terminal that has another encoding


def document(value: dict[str, Any] | list[Any]) -> None:
    """Print a result as one JSON document on standard output. NaN and infinity, which JSON lacks, become null."""
    result(json.dumps(_finite(value), indent=2, allow_nan=False, default=str))


def note(text: str) -> None:
    """Print a note on standard error. --quiet hides it."""
    if _settings.log is not None:
        _settings.log.info("%s", text)
    if not _settings.quiet:
        click.echo(text, err=True)


def result_or_note(as_json: bool) -> Callable[[str], None]:
    """Return how a command says its results: on standard output, or on standard error beside a JSON document."""
    return note if as_json else result


def warn(text: str) -> None:
    """Print a warning or an error on standard error."""
    if _settings.log is not None:
        _settings.log.warning("%s", text)
    click.echo(text, err=True)


def printable(text: str) -> str:
    """Return the text with control characters and bytes that are not UTF-8 written as escapes.

    A file's name can hold a tab, a line break, or codes that steer a terminal.

    Example:
        >>> printable("a\\tb")
        'a\\\\tb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def failed(text: str) -> None:
    """Print the error that ends a command; with --verbose also where it arose."""
    warn(text)
    if _settings.verbose:
        import traceback

        with contextlib.suppress(OSError):
            click.echo(traceback.format_exc(), err=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
