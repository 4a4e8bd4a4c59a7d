"""The tables that commands print."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from vilu.cli import output

if TYPE_CHECKING:
    from vilu.evaluation.cascade_curve import CascadeCurve
    from vilu.evaluation.outside import Outside
    from vilu.evaluation.results import Evaluation, Result
    from vilu.serving import Answer

WIDE, MIDDLE = 180, 138  # widths, in characters, that have room for intervals and for every metric
SHORTEST = 8  # cells of a terminal that a shortened column keeps
NARROW = ("auc", "fpr95", "aurc", "ece")


def wide_console() -> Console:
    """The terminal, or a wide console for a file or a pipe: these have no width, so they get every column."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


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


def print_cascade(curve: CascadeCurve, console: Console) -> None:
    """Print a table of the models alone, and one of the cascades."""
    from vilu.evaluation.report import cascade as report

    tables = ((report.ALONE, report.alone_rows(curve)), (report.BEST, report.best_rows(curve)))
    for head, rows in tables:
        table = Table(
            Column(head[0], no_wrap=True), *(Column(cell, justify="right") for cell in head[1:]), box=SIMPLE_HEAD
        )
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    console.print(escape(f"{curve.name}: {report.caption(curve)}"))


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


ANSWER_COLUMNS = ("file", "label", "confidence", "P(failure)", "verdict")


def print_answers(answers: Sequence[Answer]) -> None:
    """Print a server's answers, one row per image: a table in a terminal, tab-separated lines elsewhere."""
    detailed, staged = any(a.concepts for a in answers), any(a.stage is not None for a in answers)
    more = ["doubt between"] * detailed + ["outlier score"] * any(a.outlier_score is not None for a in answers)
    rows = [[*answer_cells(answer, detailed), *([_stage(answer)] if staged else [])] for answer in answers]
    head = (*ANSWER_COLUMNS, *more, *(["stage"] if staged else []))
    print_rows(head, rows, cut=(0, 1, *([5] if detailed else [])))


def _stage(answer: Answer) -> str:
    return f"{answer.stage}, the next gave no answer" if answer.escalation_failed else str(answer.stage)


def answer_cells(answer: Answer, detailed: bool) -> list[str]:
    """Return the cells of ANSWER_COLUMNS; where it is detailed, also the labels that the doubt is between; then the
    outlier score of an answer that has one."""
    numbers = f"{answer.confidence:.3f}", f"{answer.failure_probability:.3f}"
    doubt = [", ".join(f"{label} {weight:.0%}" for label, weight in answer.concepts[:3])] if detailed else []
    outlier = [] if answer.outlier_score is None else [f"{answer.outlier_score:.3f}"]
    return [answer.source, answer.label, *numbers, "accept" if answer.accept else "reject", *doubt, *outlier]


def print_rows(head: Sequence[str], rows: Sequence[Sequence[str]], cut: Sequence[int]) -> None:
    """Print rows on standard output.

    In a terminal this is a table that fits its width. Elsewhere each row is a line of tab-separated cells, uncut and
    without the head, so that `cut` and `awk` read it.

    Args:
        head: title of each column.
        rows: cells of each row, as many as there are columns.
        cut: columns whose cells may be shortened in the middle where the terminal is too narrow.
    """
    shown = [[output.printable(cell) for cell in row] for row in rows]
    if not output.in_terminal():
        for row in shown:
            output.result("\t".join(row))
        return
    console = Console(file=sys.stdout)
    table = Table(
        *(Column(title, no_wrap=True) for title in head),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    widths = fitted_widths([head, *shown], console.width - 2 * (len(head) - 1), cut)
    for row in shown:
        cells = [escape(shorten(cell, width)) for cell, width in zip(row, widths, strict=True)]
        colour = {"accept": "green", "reject": "red"}
        table.add_row(*(f"[{colour[cell]}]{cell}[/]" if cell in colour else cell for cell in cells))
    console.print(table)


def fitted_widths(rows: Sequence[Sequence[str]], room: int, cut: Sequence[int]) -> list[int]:
    """Return the width of each column: the widest of those in `cut` give way until all fit into `room`.

    Example:
        >>> fitted_widths([["a long name of a file", "a label", "0.1"]], 20, cut=(0, 1))
        [10, 7, 3]
    """
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    places = [place for place in cut if place < len(widths)]
    while sum(widths) > room and places:
        widest = max(places, key=widths.__getitem__)
        if widths[widest] <= SHORTEST:
            break
        widths[widest] -= 1
    return widths


def shorten(text: str, width: int) -> str:
    """Return the text in at most `width` cells of a terminal; where it is longer, its middle is left out.

    The end of a file's name tells more than its beginning, so more of the end is kept.

    Example:
        >>> shorten("photos/2024/summer/IMG_0042.jpg", 16)
        'photo…G_0042.jpg'
    """
    if cell_len(text) <= width:
        return text
    tail = text
    while cell_len(tail) > (2 * width) // 3:
        tail = tail[1:]
    head = text
    while cell_len(head) > width - 1 - cell_len(tail):
        head = head[:-1]
    return f"{head}…{tail}"
