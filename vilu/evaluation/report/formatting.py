"""Numbers and data sets in words, as every form of the report shows them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from vilu.evaluation.bootstrap import Comparison
from vilu.evaluation.columns import COLUMNS, Column
from vilu.evaluation.results import COMPARED, Result

DIGITS = {"aurc": 2, "ece": 2, "brier": 2}  # after the point, in percent; 1 for the other metrics


def percent(column: Column, value: float) -> str:
    """The value of a metric in percent, with the digits that tables show."""
    return f"{100 * value:.{DIGITS.get(column.key, 1)}f}"


def difference(column: Column, pair: Comparison) -> str:
    """ViLU minus a method in percent, with its p-value."""
    return f"{100 * pair.difference:+.{DIGITS.get(column.key, 1)}f} (p {pair.p_value:.2g})"


def best(result: Result) -> dict[str, float]:
    """By metric key, the best value of any method, where the metric is defined for one."""
    found: dict[str, float] = {}
    for column in COLUMNS:
        cells = [row.cells[column.key].value for row in result.rows if column.key in row.cells]
        if cells:
            found[column.key] = max(cells) if column.higher else min(cells)
    return found


def caption(result: Result) -> str:
    """The data that a result is about, in one line."""
    parts = [f"{result.samples:,} images"]
    if result.candidates:
        parts.append(f"{'captions in a group' if result.captions else 'classes'}: {result.candidates:,}")
    chance = f" (chance: {result.chance:.1%}, {result.chance_rule})" if result.chance_rule else ""
    parts.append(f"CLIP is right on {result.accuracy:.1%}{chance}")
    if result.dropped:
        parts.append(f"{result.dropped:,} images in an incomplete group left out")
    if result.trained_on:
        parts.append(f"baselines fitted on {result.trained_on}")
    return ", ".join(parts)


def compared() -> list[Column]:
    """The metrics in which ViLU is compared with each other method."""
    return [column for column in COLUMNS if column.key in COMPARED]


def versions() -> dict[str, str]:
    """By package name, the version that computed the numbers."""
    found = {"python": platform.python_version()}
    for package in ("vilu", "torch", "numpy", "scikit-learn", "open_clip_torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
