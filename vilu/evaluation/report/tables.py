"""An evaluation as a table in the terminal, and as a folder of JSON, CSV, pictures and one HTML file."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from vilu import atomic
from vilu.errors import UserError
from vilu.evaluation.bootstrap import COLUMNS, Column
from vilu.evaluation.evaluate import COMPARED, OURS, Evaluation, Result
from vilu.evaluation.metrics import Comparison, Interval

DIGITS = {"aurc": 2, "ece": 2, "brier": 2}  # after the point, in percent; 1 for the rest
WIDE, MIDDLE = 180, 138  # columns of a terminal that has room for intervals, and for every metric
NARROW = ("auc", "fpr95", "aurc", "ece")
HEAD = ["set", "candidates", "samples", "method", "metric", "value", "low", "high"]
HEAD += ["vilu_minus", "vilu_minus_low", "vilu_minus_high", "p_value", "reason"]
JSON, CSV, HTML = "evaluation.json", "evaluation.csv", "report.html"


def text(column: Column, value: float) -> str:
    """A metric as tables print it: in percent."""
    return f"{100 * value:.{DIGITS.get(column.key, 1)}f}"


def difference(column: Column, pair: Comparison) -> str:
    """ViLU minus a method, with its p-value."""
    return f"{100 * pair.difference:+.{DIGITS.get(column.key, 1)}f} (p {pair.p_value:.2g})"


def best(result: Result) -> dict[str, float]:
    """The best value of each column that has one."""
    found: dict[str, float] = {}
    for column in COLUMNS:
        cells = [row.cells[column.key].value for row in result.rows if column.key in row.cells]
        if cells:
            found[column.key] = max(cells) if column.higher else min(cells)
    return found


def caption(result: Result) -> str:
    """What a result is about, in one line."""
    parts = [f"{result.samples:,} images"]
    if result.candidates:
        parts.append(f"{'groups' if result.captions else 'classes'}: {result.candidates:,}")
    parts.append(f"CLIP is right on {result.accuracy:.1%}")
    if result.dropped:
        parts.append(f"{result.dropped:,} in an incomplete group left out")
    if result.trained_on:
        parts.append(f"baselines fitted on {result.trained_on}")
    return ", ".join(parts)


def print_tables(evaluation: Evaluation, console: Console) -> None:
    """One table a data set, and their mean; a narrow terminal gets fewer metrics, a wide one intervals."""
    for result in (*evaluation.results, *([evaluation.mean] if evaluation.mean else [])):
        console.print(_rich_table(result, console.width))
        if result.note:
            console.print(escape_markup(result.note), style="yellow")
        for row in result.rows:
            if row.reason:
                console.print(escape_markup(f"{row.method}: {row.reason}"), style="yellow")
    for name, sweep in evaluation.sweeps.items():
        if len(sweep) > 1:
            table = Table(
                "K", *evaluation.methods, title=escape_markup(f"{name}: AUC against the number of candidates")
            )
            for result in sweep:
                cells = [row.cells.get("auc") for row in result.rows]
                table.add_row(str(result.candidates), *("" if c is None else f"{100 * c.value:.1f}" for c in cells))
            console.print(table)
    for name, curve in evaluation.curves.items():
        console.print(escape_markup(f"{name}: {curve.needed.text}"))


def _rich_table(result: Result, width: int) -> Table:
    top = best(result)
    columns = COLUMNS if width >= MIDDLE else [c for c in COLUMNS if c.key in NARROW]
    table = Table(title=f"{escape_markup(result.name)} (%)", caption=escape_markup(caption(result)), box=SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for column in columns:
        table.add_column(f"{column.title} {'↑' if column.higher else '↓'}", justify="right", no_wrap=True)
    for column in compared():
        table.add_column(f"{OURS} − it,\n{column.title} (p)", justify="right", no_wrap=True)
    for row in result.rows:
        cells = []
        for column in columns:
            cell = row.cells.get(column.key)
            shown = "" if cell is None else text(column, cell.value)
            if cell is not None and cell.value == top[column.key]:
                shown = f"[bold]{shown}[/]"
            if cell is not None and width >= WIDE:
                shown += f"\n[dim]{text(column, cell.low)}–{text(column, cell.high)}[/]"
            cells.append(shown)
        pairs = [difference(c, row.against[c.key]) if c.key in row.against else "" for c in compared()]
        table.add_row(row.method, *cells, *pairs)
    return table


def compared() -> list[Column]:
    """The columns in which ViLU is compared with each method."""
    return [column for column in COLUMNS if column.key in COMPARED]


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation in JSON's types: null for what is not defined, no NaN."""
    return {
        "format": "vilu-evaluation",
        "version": 1,
        "settings": {
            **evaluation.settings,
            "resamples": evaluation.resamples,
            "level": evaluation.level,
            "seed": evaluation.seed,
        },
        "versions": versions(),
        "metrics": {
            c.key: {"title": c.title, "better": "higher" if c.higher else "lower", "definition": c.definition}
            for c in COLUMNS
        },
        "results": [_json_result(result) for result in evaluation.results],
        "mean": _json_result(evaluation.mean) if evaluation.mean else None,
        "sweeps": {name: [_json_result(result) for result in sweep] for name, sweep in evaluation.sweeps.items()},
        "learning_curves": {name: asdict(curve) for name, curve in evaluation.curves.items()},
    }


def _json_result(result: Result) -> dict[str, Any]:
    return {
        "name": result.name,
        "trained_on": result.trained_on or None,
        "captions": result.captions,
        "candidates": result.candidates or None,
        "samples": result.samples,
        "dropped": result.dropped,
        "failures": result.failures,
        "accuracy": result.accuracy,
        "note": result.note or None,
        "methods": {
            row.method: {
                "reason": row.reason or None,
                "metrics": {c.key: asdict(row.cells[c.key]) if c.key in row.cells else None for c in COLUMNS},
                "vilu_minus": {c.key: asdict(row.against[c.key]) if c.key in row.against else None for c in compared()},
            }
            for row in result.rows
        },
    }


def versions() -> dict[str, str]:
    """Of what computed the numbers."""
    found = {"python": platform.python_version()}
    for package in ("vilu", "torch", "numpy", "scikit-learn", "open_clip_torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def as_csv(evaluation: Evaluation) -> str:
    """One line a data set, number of candidates, method and metric."""
    buffer = io.StringIO()
    lines = csv.writer(buffer, lineterminator="\n")
    lines.writerow(HEAD)
    for result in _every(evaluation):
        for row in result.rows:
            for column in COLUMNS:
                cell: Interval | None = row.cells.get(column.key)
                pair = row.against.get(column.key)
                lines.writerow(
                    [result.name, result.candidates or "", result.samples, row.method, column.key]
                    + (["", "", ""] if cell is None else [cell.value, cell.low, cell.high])
                    + (["", "", "", ""] if pair is None else [pair.difference, pair.low, pair.high, pair.p_value])
                    + [row.reason]
                )
    return buffer.getvalue()


def _every(evaluation: Evaluation) -> Iterator[Result]:
    for result in evaluation.results:
        yield from evaluation.sweeps.get(result.name, (result,))
    if evaluation.mean:
        yield evaluation.mean


def check_output(output: Path) -> None:
    """Raise UserError unless a report can be written to this folder without harm to anything else in it."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is not a folder")
    if output.is_dir():
        present = {path.name for path in output.iterdir()}
        try:
            ours = set(json.loads((output / JSON).read_text("utf-8"))["files"])
        except (OSError, ValueError, KeyError, TypeError):
            ours = set()
        if present - ours:
            raise UserError(f"{output}: holds {min(present - ours)!r}, which is no part of an earlier report")
    atomic.check_folder(output)


def write(evaluation: Evaluation, output: Path) -> list[Path]:
    """Write the report to a folder, whole or not at all; an earlier report there is replaced.

    Returns:
        the files.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    from vilu.evaluation.report.figures import pictures
    from vilu.evaluation.report.html import as_html

    check_output(output)
    drawn = pictures(evaluation)
    files: dict[str, bytes] = {
        CSV: as_csv(evaluation).encode(),
        HTML: as_html(evaluation, drawn).encode(),
        **drawn,
    }
    document = {**as_json(evaluation), "files": sorted([*files, JSON])}
    files[JSON] = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False).encode()
    with atomic.folder(output) as report:
        for name, content in files.items():
            (report / name).write_bytes(content)
    return [output / name for name in files]
