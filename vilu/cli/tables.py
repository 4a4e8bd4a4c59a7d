"""The tables that commands print."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

if TYPE_CHECKING:
    from vilu.evaluation.outside import Outside
    from vilu.evaluation.results import Evaluation, Result
    from vilu.serving import Answer

WIDE, MIDDLE = 180, 138  # widths, in characters, that have room for intervals and for every metric
NARROW = ("auc", "fpr95", "aurc", "ece")


def print_tables(evaluation: Evaluation, console: Console) -> None:
    """Print a table per data set and one for their mean. A wide console gets intervals, a narrow one fewer metrics."""
    for result in (*evaluation.results, *([evaluation.mean] if evaluation.mean else [])):
        console.print(_result_table(result, console.width))
        if result.note:
            console.print(escape(result.note), style="yellow")
        for row in result.rows:
            if row.reason:
                console.print(escape(f"{row.method}: {row.reason}"), style="yellow")
    for name, sweep in evaluation.sweeps.items():
        if len(sweep) > 1:
            table = Table("K", *evaluation.methods, title=escape(f"{name}: AUC against the number of candidates"))
            for result in sweep:
                cells = [row.cells.get("auc") for row in result.rows]
                table.add_row(str(result.candidates), *("" if c is None else f"{100 * c.value:.1f}" for c in cells))
            console.print(table)
    for name, curve in evaluation.curves.items():
        console.print(escape(f"{name}: {curve.needed.text}"))


def print_outside(found: Sequence[Outside], console: Console) -> None:
    """Print a table for each pair of images inside and outside a class set."""

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.1f}"

    for one in found:
        inside, outside = one.samples
        table = Table(
            Column("method", no_wrap=True),
            *(Column(name, justify="right") for name in ("AUC ↑", "FPR95 ↓", "inside\naccepted", "outside\naccepted")),
            title=f"{escape(one.inside)} against {escape(one.outside)}, outside the class set (%)",
            caption=f"{inside:,} images inside, {outside:,} outside",
            box=SIMPLE_HEAD,
        )
        for row in one.rows:
            auc = f"{percent(row.auc.value)} [dim]{percent(row.auc.low)}–{percent(row.auc.high)}[/]"
            shares = percent(row.inside_accepted), percent(row.outside_accepted)
            table.add_row(row.method, auc, percent(row.fpr95), *shares)
        if one.both is not None:
            table.add_row("ViLU and outlier score", "", "", *map(percent, one.both))
        console.print(table)


def _result_table(result: Result, width: int) -> Table:
    from vilu.evaluation.columns import COLUMNS
    from vilu.evaluation.report import formatting as report
    from vilu.evaluation.results import OURS

    top = report.best(result)
    columns = COLUMNS if width >= MIDDLE else [c for c in COLUMNS if c.key in NARROW]
    table = Table(title=f"{escape(result.name)} (%)", caption=escape(report.caption(result)), box=SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for column in columns:
        table.add_column(f"{column.title} {'↑' if column.higher else '↓'}", justify="right", no_wrap=True)
    for column in report.compared():
        table.add_column(f"{OURS} − it,\n{column.title} (p)", justify="right", no_wrap=True)
    for row in result.rows:
        cells = []
        for column in columns:
            cell = row.cells.get(column.key)
            shown = "" if cell is None else report.percent(column, cell.value)
            if cell is not None and cell.value == top[column.key]:
                shown = f"[bold]{shown}[/]"
            if cell is not None and width >= WIDE:
                shown += f"\n[dim]{report.percent(column, cell.low)}–{report.percent(column, cell.high)}[/]"
            cells.append(shown)
        pairs = [report.difference(c, row.against[c.key]) if c.key in row.against else "" for c in report.compared()]
        table.add_row(row.method, *cells, *pairs)
    return table


def print_answers(answers: Sequence[Answer]) -> None:
    """Print a server's answers, one row per image."""
    table = Table(Column("file", overflow="fold"), "label", "confidence", "P(failure)", "")
    detailed = any(a.concepts for a in answers)
    if detailed:
        table.add_column("doubt between", min_width=13)
    for a in answers:
        verdict = "[green]accept[/]" if a.accept else "[red]reject[/]"
        doubt = [escape(", ".join(f"{label} {weight:.0%}" for label, weight in a.concepts[:3]))] if detailed else []
        cells = (escape(a.source), escape(a.label), f"{a.confidence:.3f}", f"{a.failure_probability:.3f}", verdict)
        table.add_row(*cells, *doubt)
    Console(file=sys.stdout).print(table)
