"""What an offline job wrote, counted from its files: the numbers of the summary, and its picture."""

from __future__ import annotations

import io
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vilu.errors import UserError
from vilu.serving.offline.blocks import UNIT_BITS
from vilu.serving.offline.files import name_of

BINS = 20  # of the histogram of failure probabilities, from 0 to 1
REASONS = 20  # reasons that the summary lists
_NUMBER = re.compile(r"\d[\dx.,]*")


@dataclass
class Counts:
    """Counts of a data set's rows.

    Attributes:
        folder: whether each file of the input is one row.
        rows: how many there are.
        accepted: how many answers are accepted.
        reasons: reason of a bad image -> how many.
        stages: stage of a cascade -> how many answers it gave.
        histogram: failure probabilities in BINS equal bins.
        seen: for each file of the input, a bit for each row that the output holds.
        twice: row ids that the output holds more than once.
    """

    folder: bool = False
    rows: int = 0
    accepted: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    stages: Counter[int] = field(default_factory=Counter)
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    seen: dict[int, np.ndarray] = field(default_factory=dict)
    twice: int = 0

    @property
    def bad(self) -> int:
        return sum(self.reasons.values())

    def mark(self, ids: np.ndarray) -> None:
        """Note the row ids (N,) int64 of some rows."""
        places, rows = ids >> UNIT_BITS, ids & ((1 << UNIT_BITS) - 1)
        if self.folder:
            places, rows = np.zeros_like(places), places
        for place in np.unique(places):
            mine = rows[places == place]
            bits = self.seen.get(int(place), np.zeros(0, bool))
            if mine.max() >= len(bits):
                bits = np.pad(bits, (0, int(mine.max()) + 1 - len(bits) + len(bits) // 2))
            unique = np.unique(mine)
            self.twice += int(bits[unique].sum()) + len(mine) - len(unique)
            bits[unique] = True
            self.seen[int(place)] = bits

    def check(self, expected: int | None, output: str) -> None:
        """Raise UserError unless there is exactly one row an input row."""
        gaps = sum(int(np.flatnonzero(bits)[-1]) + 1 - int(bits.sum()) for bits in self.seen.values() if bits.any())
        short = gaps if expected is None else expected - self.rows + self.twice
        if self.twice or short:
            raise UserError(f"{output}: {short} rows are missing and {self.twice} are there twice; please report this")


def check_bad(bad: int, rows: int, share: float) -> None:
    """Raise UserError where more than the share (0 to 1) of the rows are bad images."""
    if bad > share * rows:
        raise UserError(f"{bad} of {rows} images are bad, more than {share:g} of them: the job stops")


def count(
    system: Any, data: str, folder: bool = False, pictured: bool = False, without: tuple[str, ...] = ()
) -> Counts:
    """Count the rows of a data set's folder, block by block; of a folder that is missing, none.

    Args:
        system: pyarrow file system.
        data: folder inside it.
        folder: whether each file of the input is one row.
        pictured: count everything; else the rows and the bad images alone.
        without: beginnings of the names of files that do not count.
    """
    import pyarrow.dataset as ds
    from pyarrow import fs

    counts = Counts(folder)
    selector = fs.FileSelector(data, recursive=True, allow_not_found=True)
    names = {each.path: name_of(each.path) for each in system.get_file_info(selector)}
    paths = [path for path, name in names.items() if name.endswith(".parquet") and not name.startswith(without)]
    if not paths:
        return counts
    table = ds.dataset(paths, filesystem=system, format="parquet")
    staged = pictured and "stage" in table.schema.names
    columns = ["error", *(["row_id", "accept", "failure_probability"] if pictured else []), *["stage"] * staged]
    for batch in table.to_batches(columns=columns):
        counts.rows += len(batch)
        for error in batch.column("error").drop_null().to_pylist():
            counts.reasons[_NUMBER.sub("N", error)] += 1
        if pictured and len(batch):
            counts.mark(batch.column("row_id").to_numpy())
            counts.accepted += batch.column("accept").true_count
            failure = batch.column("failure_probability").drop_null().to_numpy()
            counts.histogram += np.histogram(failure, BINS, (0.0, 1.0))[0]
        if staged:
            counts.stages.update(batch.column("stage").drop_null().to_pylist())
    return counts


def summarise(after: Counts, before: Counts, seconds: float, job: dict[str, Any]) -> dict[str, Any]:
    """Return the summary of a finished job; `before` counts what earlier runs left, `seconds` is this run's time."""
    answered = after.rows - after.bad
    now = after.rows - before.rows
    stages = len((job.get("cascade") or {}).get("stages", ()))
    return {
        "rows": after.rows,
        "answered": answered,
        "accepted": after.accepted,
        "accept_rate": after.accepted / answered if answered else None,
        **({"stages": {str(n): after.stages[n] for n in range(1, stages + 1)}} if stages else {}),
        "bad_images": after.bad,
        "reasons": dict(after.reasons.most_common(REASONS)),
        "failure_probability_histogram": {
            "edges": np.linspace(0, 1, BINS + 1).round(4).tolist(),
            "counts": after.histogram.tolist(),
        },
        "this_run": {"rows": now, "seconds": round(seconds, 3), "images_per_second": round(now / seconds, 2)},
        "job": job,
    }


def stage_shares(summary: dict[str, Any]) -> str:
    """Say which share of a summary's answers each stage of a cascade gave; "" without a cascade."""
    shares = [f"{n / summary['answered']:.1%} by stage {stage}" for stage, n in summary.get("stages", {}).items() if n]
    return f", {', '.join(shares)}" if shares else ""


def draw(summary: dict[str, Any], counts: Counts) -> bytes:
    """Return the summary as a PNG: the failure probabilities with the threshold, and the bad images by reason."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    reasons = counts.reasons.most_common(6)
    figure = Figure(figsize=(8, 3.2 + (0.4 + 0.3 * len(reasons) if reasons else 0)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if reasons else 1, 1, squeeze=False)[:, 0]
    threshold = summary["job"]["threshold"]
    width = 1 / BINS
    axes[0].bar(np.arange(BINS) * width + width / 2, counts.histogram, 0.9 * width, color="#4477aa")
    axes[0].axvline(threshold, color="#cc3311", label=f"threshold {threshold:.3g}")
    axes[0].set(xlabel="failure probability", ylabel="images", xlim=(0, 1))
    rate = summary["accept_rate"]
    accepted = "" if rate is None else f", {rate:.1%} of the answers accepted"
    axes[0].set_title(f"{summary['rows']:,} rows{accepted}{stage_shares(summary)}")
    axes[0].legend()
    if reasons:
        axes[1].barh(
            [text[:60] for text, _ in reversed(reasons)], [number for _, number in reversed(reasons)], color="#cc3311"
        )
        axes[1].set(xlabel="bad images")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
