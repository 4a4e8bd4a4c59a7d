"""Accuracy against cost of cascades, as JSON and CSV, and as a folder with those, a figure and one HTML file."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from vilu import atomic
from vilu.evaluation.bootstrap import Interval
from vilu.evaluation.cascade_curve import METHODS, OURS, CascadeCurve
from vilu.evaluation.report.figures import cascade_figure
from vilu.evaluation.report.formatting import versions
from vilu.evaluation.report.html import template
from vilu.evaluation.report.tables import CSV, HTML, JSON, check_output

FIGURE = "accuracy-against-cost.png"
ALONE = ("model alone", "accuracy, %", "multiply-adds", "ms")
BEST = ("steered by", "accuracy, %", "to later stages, %", "multiply-adds", "ms", "cost, % of the last", f"{OURS} − it")
Table = list[tuple[str, ...]]


def as_json(curve: CascadeCurve, settings: Mapping[str, str]) -> dict[str, object]:
    """The curve as a JSON document."""
    return {
        "format": "vilu-cascade-evaluation",
        "version": 1,
        "settings": dict(settings),
        "versions": versions(),
        "methods": METHODS,
        **asdict(curve),
    }


def as_csv(curve: CascadeCurve) -> str:
    """The curve as CSV: a line for each model alone, and for each doubt and threshold."""
    buffer = io.StringIO()
    lines = csv.writer(buffer, lineterminator="\n")
    lines.writerow(
        ["method", "threshold", "to_later_stages", "accuracy", "low", "high", "multiply_adds", "milliseconds"]
    )
    for model in curve.alone:
        lines.writerow([f"{model.name} alone", "", "", *_numbers(model.accuracy), *asdict(model.cost).values()])
    for line in curve.lines:
        for point in line.points:
            shares = " ".join(map(str, point.reached[1:]))
            cells = [*_numbers(point.accuracy), *asdict(point.cost).values()]
            lines.writerow([line.method, point.threshold, shares, *cells])
    return buffer.getvalue()


def alone_rows(curve: CascadeCurve) -> Table:
    """The rows of a table with the columns ALONE."""
    return [
        (model.name, _percent(model.accuracy), count(model.cost.multiply_adds), f"{model.cost.milliseconds:.2f}")
        for model in curve.alone
    ]


def best_rows(curve: CascadeCurve) -> Table:
    """The rows of a table with the columns BEST: each doubt at its cheapest threshold within the margin."""
    rows: Table = []
    for line in curve.lines:
        point, pair = line.cheapest, line.against
        rows.append(
            (
                line.method,
                _percent(point.accuracy),
                ", ".join(f"{100 * share:.1f}" for share in point.reached[1:]),
                count(point.cost.multiply_adds),
                f"{point.cost.milliseconds:.2f}",
                _percent(line.share),
                "" if pair is None else f"{100 * pair.difference:+.1f} (p {pair.p_value:.2g})",
            )
        )
    return rows


def caption(curve: CascadeCurve) -> str:
    """What the rows of BEST are, in one line."""
    margin = f"{100 * curve.margin:g} points" if curve.margin else "nothing"
    return (
        f"each cascade at its cheapest threshold that loses at most {margin} against the last stage alone; "
        f"{curve.samples:,} images, {curve.level:.0%} intervals, {curve.resamples:,} resamples"
    )


def write(curve: CascadeCurve, output: Path, settings: Mapping[str, str]) -> None:
    """Write the report to a folder, whole or not at all; an earlier report there is replaced.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    check_output(output)
    figure = cascade_figure(curve)
    document = {**as_json(curve, settings), "files": sorted([FIGURE, CSV, HTML, JSON])}
    page = template("cascade.html").render(
        title=f"Accuracy against cost: {curve.name}",
        tables=[(ALONE, alone_rows(curve)), (BEST, best_rows(curve))],
        ours=OURS,
        caption=caption(curve),
        figure=base64.b64encode(figure).decode(),
        methods=METHODS,
        settings={**settings, **versions()},
    )
    with atomic.folder(output) as report:
        (report / FIGURE).write_bytes(figure)
        (report / CSV).write_text(as_csv(curve), "utf-8")
        (report / HTML).write_text(page, "utf-8")
        (report / JSON).write_text(json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False), "utf-8")


def count(multiply_adds: float) -> str:
    """A number of multiply-adds in words: "11.7 M"."""
    return f"{multiply_adds / 1e9:.2f} G" if multiply_adds >= 1e9 else f"{multiply_adds / 1e6:.1f} M"


def _numbers(interval: Interval) -> list[float]:
    return [interval.value, interval.low, interval.high]


def _percent(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} ({100 * interval.low:.1f}–{100 * interval.high:.1f})"
