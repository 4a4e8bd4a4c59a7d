"""`vilu feedback` takes what people say about recorded answers."""

from __future__ import annotations

import csv
import sys
from dataclasses import asdict
from pathlib import Path

import click

from vilu.cli import output as said
from vilu.cli.command import Command
from vilu.cli.options import record_option
from vilu.errors import UserError


@click.command("feedback", cls=Command, extra="record")
@click.argument("source", metavar="FILE|-", required=False)
@record_option
@click.option("--to-label", is_flag=True, help="List the answers that were chosen to be labelled and have no feedback.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def feedback_command(source: str | None, record: str, to_label: bool, as_json: bool) -> None:
    """Say which recorded answers were right.

    FILE is CSV with a line of column names, or JSON lines. Each row has the id of an answer, and either feedback (right
    or wrong) or label (the true label). - reads standard input. If one line is bad, nothing is taken.
    """
    from vilu.serving.record import open_record
    from vilu.serving.record.feedback import give_feedback, read_feedback
    from vilu.serving.record.feedback import to_label as waiting

    if (source is None) != to_label:
        raise UserError("give either FILE or --to-label")
    opened = open_record(record)
    if source is None:
        rows = [row | {"time": row["time"].isoformat()} for row in waiting(opened)]
        if as_json:
            said.document(rows)
            return
        table = csv.writer(sys.stdout)
        table.writerow(("id", "time", "class_set", "label", "failure_probability", "accept"))
        table.writerows(row.values() for row in rows)
        return
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: cannot be read ({getattr(error, 'strerror', None) or 'it is not UTF-8'})") from None
    taken = give_feedback(opened, read_feedback(text, "standard input" if source == "-" else source))
    if as_json:
        said.document(asdict(taken))
    else:
        said.result(
            f"{taken.taken} taken, {taken.repeated} known before, {taken.changed} changed, "
            f"{taken.unknown} about ids that the record does not have"
        )
