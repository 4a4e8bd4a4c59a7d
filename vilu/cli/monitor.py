"""`vilu monitor` watches the risk of a server's recorded answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vilu.cli import output as said
from vilu.cli.command import Command
from vilu.cli.options import SECONDS, FloatRange, host_option, record_option

if TYPE_CHECKING:
    from vilu.serving.monitor import Report, Watched


@click.command("monitor", cls=Command, extra="record")
@record_option
@click.option("--once", is_flag=True, help="Print a table and end, with exit code 1 where there is an alarm.")
@click.option("--json", "as_json", is_flag=True, help="With --once: print JSON.")
@click.option(
    "--target-risk",
    type=FloatRange(0, 1, True, True),
    help="Risk that must not be exceeded.  [default: what `vilu calibrate --target-risk` promised]",
)
@click.option(
    "--level",
    type=FloatRange(0, 1, True, True),
    default=0.05,
    show_default=True,
    help="Largest probability of a false alarm over all time, for the risk and for drift.",
)
@click.option("--window", type=SECONDS, default=86400, show_default=True, help="Length of a time window in seconds.")
@click.option(
    "--every", type=SECONDS, default=60, show_default=True, help="Seconds between two readings of the record."
)
@host_option
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8003, show_default=True, help="Port. 0 picks a free one."
)
@click.option("--token", metavar="TOKEN|@FILE", help="Token that feedback must carry.  [default: $VILU_TOKEN, or none]")
def monitor_command(
    record: str,
    once: bool,
    as_json: bool,
    target_risk: float | None,
    level: float,
    window: float,
    every: float,
    host: str,
    port: int,
    token: str | None,
) -> int:
    """Watch the risk of a server's recorded answers.

    For each class set and version: how many answers are accepted, how many of these are wrong by the feedback, within
    bounds that hold at all times at once, and whether the answers differ from the calibration data. Without --once, a
    service reads the record again and again. It takes feedback (POST /feedback), and has metrics (/metrics) and the
    report (/report.json).
    """
    from vilu.serving.monitor import watch
    from vilu.serving.monitor_service import as_plain, serve
    from vilu.serving.record import open_record
    from vilu.serving.tokens import token_from

    opened = open_record(record)
    if not once:
        word = token_from(token, "VILU_TOKEN")
        return serve(
            opened, host=host, port=port, every=every, token=word, target_risk=target_risk, level=level, window=window
        )
    report = watch(opened, target_risk=target_risk, level=level, window=window)
    if as_json:
        said.document(as_plain(report))
    else:
        _print(report)
    return 1 if report.alarm else 0


ALL = ("accepted", "labelled", "risk", "target", "expected", "drift")  # columns of the table


def _escalated(one: Watched) -> str:
    """The share of a cascade's answers that later stages gave, and of those that they could not give."""
    answered = sum(one.stages.values())
    if not answered:
        return ""
    failed = f", {one.escalation_failed / answered:.1%} failed" if one.escalation_failed else ""
    return f"{1 - one.stages.get('1', 0) / answered:.1%}{failed}"


def _print(report: Report) -> None:
    from rich.markup import escape
    from rich.table import Table

    from vilu.cli.tables import wide_console

    def percent(value: float | None) -> str:
        return "" if value is None or value != value else f"{value:.1%}"

    staged = ["later stages"] if any(one.stages for one in report.watched) else []
    table = Table("class set", "version", "answers", *staged, *ALL, "")
    for one in report.watched:
        risk = f"{percent(one.risk)} ({percent(one.low)}–{percent(one.high)})" if one.labelled else ""
        drift = max(one.drift.values(), default=None)
        table.add_row(
            escape(f"{one.class_set}@{one.class_set_version}" if one.class_set else "own labels"),
            str(one.model_version),
            str(one.answers),
            *[_escalated(one) for _ in staged],
            percent(one.accepted / one.answers),
            str(one.labelled),
            risk,
            percent(one.target_risk),
            percent(one.expected_risk),
            "" if drift is None else f"e{drift:.1f}",
            f"[red]{' and '.join(one.alarms)}[/]" if one.alarms else "[green]well[/]",
        )
    wide_console().print(table)
    told = report.feedback
    said.note(
        f"feedback: {told['used']} used, {told['unasked']} about answers that were not chosen, {told['changed']} "
        f"changed, {told['unknown']} about unknown ids"
    )
