"""Options of the front door, which `vilu serve` and `vilu guard` share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vilu.cli.options import PATH, SECONDS, all_of

if TYPE_CHECKING:
    from vilu.serving.door import Limits

COUNT = click.IntRange(1)
LIMITS = {
    "in_flight": "--in-flight",
    "sent": "--in-flight-per-server",
    "body_bytes": "--max-request-bytes",
    "body_seconds": "--body-seconds",
    "connections": "--connections",
    "connections_per_address": "--connections-per-address",
    "per_connection": "--in-flight-per-connection",
    "timeout": "--timeout",
}


def _limit(name: str, kind: Any, text: str, default: str) -> Any:
    return click.option(LIMITS[name], name, type=kind, help=f"{text}  [default: {default}]")


# A command receives these options as `access_log`, `tokens` and the names of LIMITS.
door_options = all_of(
    click.option(
        "--tokens", type=PATH, help="File of tokens with names, a line each: NAME TOKEN. Read again on change."
    ),
    click.option("--access-log", metavar="FILE|-", help="Write a line of JSON for every request.  [default: none]"),
    _limit("in_flight", COUNT, "Questions to a model at a time. More are refused at once.", "256"),
    _limit("sent", COUNT, "Questions sent to one server at a time. The others wait in the door.", "64"),
    _limit("body_bytes", COUNT, "Largest request in bytes.", "67108864"),
    _limit("body_seconds", SECONDS, "Seconds that a request may take to arrive.", "30"),
    _limit("connections", COUNT, "Open connections to each protocol.", "2048"),
    _limit("connections_per_address", COUNT, "Open connections of one address to each protocol.", "512"),
    _limit("per_connection", COUNT, "Requests at a time on one gRPC connection.", "256"),
    _limit("timeout", SECONDS, "Seconds that a question may take.", "60"),
)


def limits_of(options: dict[str, Any], **defaults: Any) -> Limits:
    """Remove the limits from a command's options and return them."""
    from vilu.serving.door import Limits

    given = {name: options.pop(name, None) for name in LIMITS}
    return Limits(**defaults | {name: value for name, value in given.items() if value is not None})


def watched_files(*tokens: tuple[str | None, str]) -> list[Path]:
    """Return the files that hold tokens. Each argument is an option's value and the variable that stands in for it."""
    words = [os.environ.get(variable, "") if option is None else option for option, variable in tokens]
    return [Path(word[1:]) for word in words if word.startswith("@")]
