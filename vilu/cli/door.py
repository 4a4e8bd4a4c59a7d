"""Options of the front door, which `vilu serve` and `vilu guard` share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vilu.cli.options import PATH, SECONDS, FloatRange, all_of
from vilu.errors import UserError

if TYPE_CHECKING:
    from vilu.serving.door import Limits
    from vilu.serving.record.recorder import RecordOptions

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


SHARE = FloatRange(0, 1, True)

# A command receives these options as the names of RECORD.
RECORD = (
    "record",
    "record_share",
    "record_embeddings",
    "record_entropy",
    "keep_days",
    "label_accepted",
    "label_rejected",
)
record_options = all_of(
    click.option(
        "--record",
        metavar="DIR|postgresql://...|@FILE",
        help="Record one row for each answer, never the image (docs/monitor.md). A URL with a password goes in a FILE.",
    ),
    click.option("--record-share", type=SHARE, help="Share of the requests to record.  [default: 1]"),
    click.option("--record-embeddings", is_flag=True, help="Record the image embedding (float16) and the entropy too."),
    click.option("--record-entropy", is_flag=True, help="Record the entropy too. It costs the server some time."),
    click.option("--keep-days", type=SECONDS, help="Remove rows that are older, in days.  [default: keep all]"),
    click.option(
        "--label-accepted", type=SHARE, help="Share of the accepted answers that people will label.  [default: 0.02]"
    ),
    click.option(
        "--label-rejected", type=SHARE, help="Share of the rejected answers that people will label.  [default: 1]"
    ),
)


def record_of(options: dict[str, Any]) -> RecordOptions | None:
    """Remove the options of the record from a command's options and return what is recorded; None for nothing."""
    given = {name: options.pop(name) for name in RECORD}
    where = given.pop("record")
    others = [name for name, value in given.items() if value]
    if where is None and others:
        raise UserError(f"--{others[0].replace('_', '-')}: is for --record")
    if where is None:
        return None
    try:
        from vilu.serving.record.recorder import RecordOptions
    except ModuleNotFoundError as error:
        raise UserError(f"--record needs the package {error.name!r}: pip install 'vilu[record]'") from None
    return RecordOptions(where, **{name.removeprefix("record_"): value for name, value in given.items() if value})


def limits_of(options: dict[str, Any], **defaults: Any) -> Limits:
    """Remove the limits from a command's options and return them."""
    from vilu.serving.door import Limits

    given = {name: options.pop(name, None) for name in LIMITS}
    return Limits(**defaults | {name: value for name, value in given.items() if value is not None})


def watched_files(*tokens: tuple[str | None, str]) -> list[Path]:
    """Return the files that hold tokens. Each argument is an option's value and the variable that stands in for it."""
    words = [os.environ.get(variable, "") if option is None else option for option, variable in tokens]
    return [Path(word[1:]) for word in words if word.startswith("@")]
