"""The figures of an evaluation, as PNG files in memory."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from vilu.evaluation import cascade_curve, metrics
from vilu.evaluation.cascade_curve import CascadeCurve
from vilu.evaluation.columns import BINS
from vilu.evaluation.metrics import Floats, one_sided
from vilu.evaluation.results import OURS, SIGNIFICANCE, Evaluation, LearningCurve, Result

DPI = 110
POINTS = 1000  # of a curve; more cannot be seen
CROWDED = 0.3  # share of the values in one bin of a density from which ranks are drawn
COLOURS = {
    "MCM": "#7f7f7f",
    "Entropy": "#bcbd22",
    "Doctor": "#8c564b",
    "Rel-U": "#17becf",
    "TrustVLM": "#d62728",
    "class bias": "#393b79",
    "LVU-BCE": "#2ca02c",
    "LVU-MSE": "#98df8a",
    "ConfidNet": "#9467bd",
    "ProbVLM": "#e377c2",
    "BayesVLM": "#ff7f0e",
    "ViLU": "#1f4fd8",
    "random": "#17becf",
}
MARKERS = "o^sDvP*X"  # of the stages of a cascade
RIGHT, WRONG = "#2c7fb8", "#d95f0e"


class LineStyle(TypedDict):
    """Options of matplotlib's `plot`."""

    color: str | None
    linewidth: float
    zorder: int


def figures(evaluation: Evaluation) -> dict[str, bytes]:
    """All figures of an evaluation, by file name, as PNG, in the order of the report.

    A figure that a data set has no values for is left out.
    """
    found: dict[str, bytes] = {}
    for i, result in enumerate(evaluation.results, 1):
        for kind, draw in KINDS.items():
            if result.confidences and not (kind == "roc" and one_sided(result.correct)):
                found[file_name(kind, result.name, i)] = _png(draw(result))
        if len(evaluation.sweeps.get(result.name, ())) > 1:
            found[file_name("candidates", result.name, i)] = _png(_candidates(evaluation.sweeps[result.name]))
        if result.name in evaluation.curves:
            found[file_name("learning-curve", result.name, i)] = _png(_curve(evaluation.curves[result.name]))
    return found


def cascade_figure(curve: CascadeCurve) -> bytes:
    """Accuracy against multiply-adds and against milliseconds, as PNG: a line a doubt, and each model alone."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    kinds = (("multiply_adds", "million multiply-adds an image", 1e-6), ("milliseconds", "ms an image", 1.0))
    panels = figure.subplots(1, 2, sharey=True)
    for axis, (key, title, unit) in zip(panels, kinds, strict=True):
        for line in curve.lines:
            cost = [unit * getattr(point.cost, key) for point in line.points]
            style = _style(OURS if line.method == cascade_curve.OURS else line.method)
            axis.plot(cost, [100 * point.accuracy.value for point in line.points], label=line.method, **style)
            bounds = zip(*((100 * point.accuracy.low, 100 * point.accuracy.high) for point in line.points), strict=True)
            axis.fill_between(cost, *bounds, color=style["color"], alpha=0.1, linewidth=0)
        for number, (alone, marker) in enumerate(zip(curve.alone, MARKERS, strict=False), 1):
            label = f"{_plain(alone.name)} alone (stage {number})"
            place = unit * getattr(alone.cost, key), 100 * alone.accuracy.value
            axis.plot(*place, marker, color="black", markersize=7, zorder=4, label=label)
        wanted = 100 * (curve.alone[-1].accuracy.value - curve.margin)
        label = f"{100 * curve.margin:g} points below the last stage"
        axis.axhline(wanted, color="0.4", linewidth=0.8, linestyle=":", label=label)
        axis.set(xlabel=title, xlim=(0, None))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(_plain(curve.name), fontsize=11)
    return _png(figure)


def file_name(kind: str, name: str, number: int, ending: str = "png") -> str:
    """A file name of ASCII letters, digits and hyphens, whatever the data set is called; the number keeps it unique."""
    return f"{number}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')[:40] or 'data'}-{kind}.{ending}"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _plain(text: str) -> str:
    """Text of the user, escaped so that matplotlib does not read it as a formula."""
    return text.replace("$", r"\$")


def _axes(title: str, x: str, y: str, size: tuple[float, float] = (8.2, 4.6)) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    axis.set(xlabel=x, ylabel=y)
    axis.set_title(_plain(title), fontsize=11)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _legend(figure: Figure, title: str | None = None) -> None:
    """Put the legend beside the axes, where it covers no curve."""
    figure.legend(loc="outside right upper", title=title, fontsize=8, frameon=False, alignment="left")


def _style(method: str) -> LineStyle:
    ours = method == OURS
    return {"color": COLOURS.get(method), "linewidth": 2.6 if ours else 1.3, "zorder": 3 if ours else 2}


def _thin(*columns: Floats) -> list[Floats]:
    at = np.unique(np.linspace(0, len(columns[0]) - 1, POINTS).astype(int))
    return [column[at] for column in columns]


def _cell(result: Result, method: str, key: str) -> float | None:
    row = next(row for row in result.rows if row.method == method)
    return row.cells[key].value if key in row.cells else None


def _roc(result: Result) -> Figure:
    from sklearn.metrics import roc_curve

    figure, axis = _axes(result.name, "wrong answers accepted (FPR)", "right answers accepted (TPR)")
    for method, confidence in result.confidences.items():
        fpr, tpr, _ = roc_curve(result.correct, confidence)
        axis.plot(*_thin(fpr, tpr), label=f"{method} ({_cell(result, method, 'auc'):.1%})", **_style(method))
    axis.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle=":")
    axis.axhline(0.95, color="0.7", linewidth=0.8, linestyle=":")
    axis.set(xlim=(0, 1), ylim=(0, 1.01))
    _legend(figure, "AUC")
    return figure


def _risk(result: Result) -> Figure:
    figure, axis = _axes(result.name, "coverage (share of answers kept)", "risk (error rate among the answers kept)")
    for method, confidence in result.confidences.items():
        coverage, risk = metrics.risk_coverage(confidence, result.correct)
        label = f"{method} ({100 * (_cell(result, method, 'aurc') or 0):.2f})"
        axis.plot(*_thin(coverage, risk), label=label, **_style(method))
    axis.set(xlim=(0, 1))
    # The first few answers alone make any risk: they must not set the scale.
    axis.set_ylim(0, min(1.0, max(0.02, 2 * float((~result.correct).mean()))))
    _legend(figure, "AURC, %")
    return figure


def _densities(result: Result) -> Figure:
    columns = min(3, len(result.confidences))
    rows = -(-len(result.confidences) // columns)
    figure = Figure(figsize=(4.1 * columns, 2.7 * rows + 0.8), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(result.confidences) :]:
        axis.set_visible(False)
    for axis, (method, confidence) in zip(axes, result.confidences.items(), strict=False):
        values, bins, unit = _spread(confidence)
        for side, colour, label in (
            (result.correct, RIGHT, "right answers"),
            (~result.correct, WRONG, "wrong answers"),
        ):
            if side.any():
                share = np.full(int(side.sum()), 100 / side.sum())
                style: dict[str, Any] = {"histtype": "stepfilled", "facecolor": (*to_rgb(colour), 0.25)}
                name = label if axis is axes[0] else None
                axis.hist(values[side], bins, weights=share, edgecolor=colour, linewidth=1.4, label=name, **style)
        axis.set_title(method, fontsize=11)
        axis.set_xlabel(unit, fontsize=9)
        axis.set_ylabel("% of them", fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.yaxis.set_major_locator(MaxNLocator(3))
        axis.ticklabel_format(axis="x", scilimits=(-3, 4))
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=10, frameon=False)
    figure.suptitle(f"{_plain(result.name)}: confidence of right and wrong answers", fontsize=11)
    return figure


def _spread(confidence: Floats) -> tuple[Floats, Floats, str]:
    """What a density is drawn over: (values, edges of the bins, name of the axis).

    Where more than CROWDED of the values fall into one bin, as most of CLIP's confidences do near 1, nothing could be
    read; their ranks are drawn instead.
    """
    low, high = np.quantile(confidence, [0.005, 0.995])
    if high > low:
        values = np.clip(confidence, low, high)
        counts, bins = np.histogram(values, 30, (low, high))
        if counts.max() <= CROWDED * len(values):
            return values, bins, "confidence"
    from scipy.stats import rankdata

    ranks: Floats = 100 * (rankdata(confidence) - 0.5) / len(confidence)
    return ranks, np.linspace(0, 100, 31), "confidence, rank in %"


def _reliability(result: Result) -> Figure:
    figure, axis = _axes(result.name, "mean P(failure) in the bin", "failure rate in the bin")
    for method, probability in result.failure_probabilities.items():
        mean, rate, samples = metrics.reliability(probability, result.correct, BINS)
        kept = samples > 0
        label = f"{method} ({100 * (_cell(result, method, 'ece') or 0):.2f})"
        axis.plot(mean[kept], rate[kept], marker="o", markersize=3, label=label, **_style(method))
    axis.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle=":")
    axis.set(xlim=(0, 1), ylim=(0, 1))
    if result.failure_probabilities:
        _legend(figure, "ECE, %")
    else:
        axis.text(0.5, 0.6, "no method here gives a probability", ha="center")
    return figure


KINDS: Mapping[str, Callable[[Result], Figure]] = {
    "roc": _roc,
    "risk-coverage": _risk,
    "densities": _densities,
    "reliability": _reliability,
}


def _candidates(sweep: Sequence[Result]) -> Figure:
    figure, axis = _axes(sweep[0].name, "number of candidates K in a group", "AUC")
    for method in (row.method for row in sweep[0].rows):
        cells = [next(r for r in result.rows if r.method == method).cells.get("auc") for result in sweep]
        drawn = [(result.candidates, cell) for result, cell in zip(sweep, cells, strict=True) if cell is not None]
        if drawn:
            sizes = [size for size, _ in drawn]
            axis.plot(
                sizes, [cell.value for _, cell in drawn], marker="o", markersize=4, label=method, **_style(method)
            )
            axis.fill_between(
                sizes,
                [cell.low for _, cell in drawn],
                [cell.high for _, cell in drawn],
                color=COLOURS.get(method),
                alpha=0.12,
                linewidth=0,
            )
    sizes = [result.candidates for result in sweep]
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    if axis.get_legend_handles_labels()[0]:
        _legend(figure)
    return figure


def _curve(curve: LearningCurve) -> Figure:
    figure, axis = _axes(curve.test, "training images", "AUC", (9.2, 4.6))
    axis.axhline(curve.mcm.value, color=COLOURS["MCM"], label=f"MCM, no training ({curve.mcm.value:.1%})")
    axis.axhspan(curve.mcm.low, curve.mcm.high, color=COLOURS["MCM"], alpha=0.15, linewidth=0)
    points = [point for point in curve.points if point.mean is not None]
    sizes = [point.size for point in points]
    means = [point.mean for point in points if point.mean is not None]
    bounds = [(p.size, p.low, p.high) for p in points if p.low is not None and p.high is not None]
    axis.plot(sizes, means, marker="o", label=OURS, **_style(OURS))
    axis.fill_between(
        [size for size, _, _ in bounds],
        [low for _, low, _ in bounds],
        [high for _, _, high in bounds],
        color=COLOURS[OURS],
        alpha=0.15,
        linewidth=0,
    )
    seeds = [(point.size, auc) for point in points for auc in point.aucs]
    axis.plot([s for s, _ in seeds], [auc for _, auc in seeds], ".", color=COLOURS[OURS], markersize=4, alpha=0.6)
    better = [(point.size, mean) for point, mean in zip(points, means, strict=True) if point.better]
    values = [value for p in points for value in (*p.aucs, p.low, p.high) if value is not None]
    values += [curve.mcm.low, curve.mcm.high]
    if better:
        x, y = [size for size, _ in better], [mean for _, mean in better]
        axis.plot(x, y, "o", color="#2ca02c", zorder=4, label=f"better than MCM, p < {SIGNIFICANCE}")
    needed = curve.needed
    if curve.power_law and sizes:
        a, b, c = curve.power_law
        end = max(sizes[-1], needed.high or needed.size or 0)
        line = np.geomspace(sizes[0], end, 200)
        axis.plot(line, a - b * line**-c, color=COLOURS[OURS], linewidth=1, linestyle="--", label="power law")
        values.append(a - b * end**-c)
    if needed.size is not None:
        axis.axvline(needed.size, color="#2ca02c", linewidth=1, linestyle=":")
        if needed.kind == "extrapolated" and needed.low is not None:
            axis.axvspan(needed.low, needed.high or axis.get_xlim()[1], color="#2ca02c", alpha=0.08, linewidth=0)
    axis.set_xscale("log")
    ticks = sorted({*sizes, *([needed.size] if needed.size else [])})
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.xaxis.set_minor_formatter(NullFormatter())
    room = 0.05 * (max(values) - min(values)) + 1e-3
    axis.set_ylim(max(0.0, min(values) - room), min(1.0, max(values) + room))
    axis.set_title(_plain(f"{curve.test}: {needed.text}"), fontsize=9, wrap=True)
    _legend(figure)
    return figure
