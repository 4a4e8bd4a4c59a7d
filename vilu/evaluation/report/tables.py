"""An evaluation as JSON and CSV, and as a folder with those, its figures and one HTML file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from vilu import atomic
from vilu.errors import UserError
from vilu.evaluation.bootstrap import Interval
from vilu.evaluation.columns import COLUMNS
from vilu.evaluation.report.figures import figures, file_name
from vilu.evaluation.report.formatting import compared, versions
from vilu.evaluation.report.html import as_html
from vilu.evaluation.report.samples import Samples, as_file, by_class
from vilu.evaluation.results import Evaluation, Result

CSV_HEAD = ["set", "candidates", "samples", "method", "metric", "value", "low", "high"]
CSV_HEAD += ["vilu_minus", "vilu_minus_low", "vilu_minus_high", "p_value", "reason"]
JSON, CSV, HTML = "evaluation.json", "evaluation.csv", "report.html"


def as_json(evaluation: Evaluation) -> dict[str, object]:
    """The evaluation as a JSON document: null for what is not defined, never NaN."""
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


def _json_result(result: Result) -> dict[str, object]:
    return {
        "name": result.name,
        "trained_on": result.trained_on or None,
        "captions": result.captions,
        "candidates": result.candidates or None,
        "samples": result.samples,
        "dropped": result.dropped,
        "failures": result.failures,
        "accuracy": result.accuracy,
        "chance": result.chance or None,
        "chance_rule": result.chance_rule or None,
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


def as_csv(evaluation: Evaluation) -> str:
    """The evaluation as CSV: a line for each data set, number of candidates, method and metric."""
    buffer = io.StringIO()
    lines = csv.writer(buffer, lineterminator="\n")
    lines.writerow(CSV_HEAD)
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
    """Check that a report can be written to this folder.

    Raises:
        UserError: the folder holds anything but an earlier report, or cannot be written.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is not a folder")
    if output.is_dir():
        present = {path.name for path in output.iterdir()}
        try:
            ours = set(json.loads((output / JSON).read_text("utf-8"))["files"])
        except (OSError, ValueError, KeyError, TypeError):
            ours = set()
        if present - ours:
            raise UserError(f"{output}: holds {min(present - ours)!r}, which is not part of an earlier report")
    atomic.check_folder(output)


def write(
    evaluation: Evaluation, output: Path, *, samples: Mapping[str, Samples] | None = None, kind: str = "csv"
) -> list[Path]:
    """Write the report to a folder, whole or not at all; an earlier report there is replaced.

    Args:
        evaluation: what to report.
        output: the folder.
        samples: by the name of a result, its single images; the report then has a table by class, galleries, and a
            file of every image's scores.
        kind: format of these files, one of `samples.FORMATS`.

    Returns:
        the files written.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    check_output(output)
    images, samples = figures(evaluation), samples or {}
    files: dict[str, bytes] = {CSV: as_csv(evaluation).encode(), **images}
    for i, result in enumerate(evaluation.results, 1):
        if result.name in samples and result.confidences and kind != "none":
            files[file_name("samples", result.name, i, kind)] = as_file(result, samples[result.name], kind)
    files[HTML] = as_html(evaluation, images, samples, [name for name in files if "-samples." in name]).encode()
    classes = {r.name: by_class(r, samples[r.name]) for r in evaluation.results if r.name in samples}
    document = {**as_json(evaluation), "files": sorted([*files, JSON])}
    if classes:
        document["classes"] = {name: [asdict(row) for row in rows] for name, rows in classes.items()}
    files[JSON] = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False).encode()
    with atomic.folder(output) as report:
        for name, content in files.items():
            (report / name).write_bytes(content)
    return [output / name for name in files]
