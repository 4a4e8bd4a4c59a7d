"""The precision and provider for a CPU, chosen by measurement: the fastest image tower within its parity budget.

Every way that this machine and the servers' processor both have is timed; `export` then tries them from the fastest
to the slowest, and refuses those that are over their budget.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vilu.checkpoint import Checkpoint
from vilu.clip import Clip
from vilu.errors import UserError
from vilu.export import checks
from vilu.export.cache import Cache
from vilu.export.checks import OverBudgetError
from vilu.export.export import export
from vilu.export.graphs import ImageGraph, write_graph
from vilu.export.int8 import quantise
from vilu.export.job import Progress
from vilu.export.parity import Session
from vilu.export.precision import needs
from vilu.export.sample import Sample, draw_sample
from vilu.export.towers import Towers
from vilu.serving.backends.onnxruntime import session

WAYS = tuple((precision, p) for precision in ("float32", "bfloat16", "int8") for p in ("openvino", "cpu"))
BATCH = 16
SECONDS = 60.0  # for all ways together
LEAST_RUNS = 3  # of each way and pass
CHOSEN, SLOWER = "chosen", "slower"  # verdicts


@dataclass(frozen=True)
class Tried:
    """A precision and provider, and what became of it.

    Attributes:
        precision: of the towers.
        provider: "openvino" or "cpu".
        images_per_second: of the image tower; None where it was not timed.
        verdict: why it was not timed, or is not taken; CHOSEN, or SLOWER than that.
    """

    precision: str
    provider: str
    images_per_second: float | None
    verdict: str


def export_fastest(
    checkpoint: Checkpoint,
    output: Path,
    *,
    clip: Clip,
    images: Sequence[np.ndarray] | None = None,
    labels: Sequence[int] | None = None,
    provider: str | None = None,
    cores: int | None = None,
    max_batch_size: int = 32,
    cpu_flags: Collection[str] | None = None,
    cache: Path | None = None,
    tried: Sequence[Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Time every precision and provider for a CPU, and export the fastest that is within its parity budget.

    Args:
        provider: consider this one alone.
        cpu_flags: what the servers' processor can, as /proc/cpuinfo names it; None: as this machine.
        tried: what `set_aside` gives: the speeds that are known, so that nothing is timed again.
        options: as those of `export`, which the other arguments are too.

    Returns:
        What parity.json holds; "tried" lists a `Tried` for each way.

    Raises:
        UserError: as `export` does.
        OverBudgetError: no way is within its budget.
    """
    checks.check_output(output, options.get("version"))
    checks.check_options(options.get("preprocess", "exact"), max_batch_size)
    class_set = checks.require_clip_and_class_set(checkpoint)
    with tempfile.TemporaryDirectory(prefix="vilu-auto-") as folder:
        cache = cache or Path(folder) / "cache"  # at least from here to the export
        if tried is None:
            rows = list(_offered(provider, cpu_flags))
            if all(row.verdict for row in rows):
                reasons = dict.fromkeys(row.verdict for row in rows if provider in (None, row.provider))
                why = "; ".join(reasons) or f"a CPU has openvino and cpu, not the provider {provider}"
                raise UserError(f"--precision auto: {why}")
            try:
                sample = draw_sample(clip, class_set.names, images, labels, calibrate=True)
            except UserError as reason:
                rows = [replace(r, verdict=r.verdict or str(reason)) if r.precision == "int8" else r for r in rows]
                sample = draw_sample(clip, class_set.names, images, labels, calibrate=False)
            threads = min(cores or session.cores(), session.cores())
            found = _time(rows, clip, sample, Path(folder), cache, threads, min(BATCH, max_batch_size), progress)
            rows = [replace(row, images_per_second=found.get((row.precision, row.provider))) for row in rows]
        else:
            rows = [Tried(**row) for row in tried]
        speeds = {(r.precision, r.provider): r.images_per_second for r in rows if r.images_per_second and not r.verdict}
        order = sorted(speeds, key=lambda way: -speeds[way])
        for way in order:
            chosen = [_decide(row, way) for row in rows]
            try:
                return export(
                    checkpoint,
                    output,
                    clip=clip,
                    images=images,
                    labels=labels,
                    precision=way[0],
                    provider=way[1],
                    cores=cores,
                    max_batch_size=max_batch_size,
                    cache=cache,
                    tried=[asdict(row) for row in chosen],
                    progress=progress,
                    **options,
                )
            except OverBudgetError as reason:
                rows = [replace(r, verdict=str(reason)) if (r.precision, r.provider) == way else r for r in rows]
    raise OverBudgetError(
        "no precision is within its parity budget: " + "; ".join(r.verdict for r in rows if r.verdict)
    )


def set_aside(tried: Sequence[Mapping[str, Any]], reason: str) -> list[dict[str, Any]]:
    """What was tried, with the reason against the way that was chosen; slower ones may then be taken."""
    verdicts = {CHOSEN: reason, SLOWER: ""}
    return [{**row, "verdict": verdicts.get(row["verdict"], row["verdict"])} for row in tried]


def _offered(provider: str | None, cpu_flags: Collection[str] | None) -> Iterator[Tried]:
    """Every way, with the reason against those that cannot be timed here or that the servers' processor lacks."""
    for precision, name in WAYS:
        verdict = ""
        lacking = needs(precision, session.cpu_flags() if cpu_flags is None else cpu_flags)
        if provider not in (None, name):
            verdict = f"--provider {provider} was asked for"
        elif precision == "bfloat16" and name == "cpu":
            verdict = "ONNX Runtime's CPU provider has no bfloat16"
        elif lacking:
            verdict = f"not faster: the processor lacks {lacking}"
        elif cpu_flags is not None and (lacking := needs(precision, session.cpu_flags())):
            verdict = f"cannot be measured: this machine lacks {lacking}"
        elif name == "openvino" and not session.has_openvino():
            verdict = "OpenVINO is not installed here: pip install openvino"
        yield Tried(precision, name, None, verdict)


def _decide(row: Tried, way: tuple[str, str]) -> Tried:
    if (row.precision, row.provider) == way:
        return replace(row, verdict=CHOSEN)
    return replace(row, verdict=row.verdict or SLOWER)


def _time(
    rows: Sequence[Tried],
    clip: Clip,
    sample: Sample,
    folder: Path,
    cache: Path,
    threads: int,
    batch: int,
    progress: Progress | None,
) -> dict[tuple[str, str], float]:
    """Images a second of each way without a verdict: the median over two passes, the second in the opposite order.

    Two sizes of batches take turns, as a server's batches differ: OpenVINO takes longer where the size has changed. A
    tower so large that this would take minutes is timed on smaller batches.
    """
    ways = [(row.precision, row.provider) for row in rows if not row.verdict]
    steps, done = len(ways) * 3, 0
    pixels, paths = sample.pixels[:batch], {}
    for way in ways:
        paths[way] = _tower(clip, sample, folder, Cache(cache), *way)
        done += 1
        if progress:
            progress(f"writing {' '.join(way)}", done, steps)
    times: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for way in (*ways, *reversed(ways)):
        tower = session.open_session(paths[way], way[1], way[0], threads)
        if way == ways[0] and not times[way]:  # all ways are timed at the batch that this one can be timed at
            pixels = pixels[: _fitting(tower, pixels, SECONDS / steps / 2)]
        feeds = [{"PIXELS": pixels[:size]} for size in (len(pixels), max(1, len(pixels) - 1))]
        for feed in feeds:
            tower.run(["IMAGE_EMBEDDING"], feed)
        end = time.perf_counter() + SECONDS / steps
        runs = 0
        while runs < LEAST_RUNS or (time.perf_counter() < end and runs < 50):
            start = time.perf_counter()
            for feed in feeds:
                tower.run(["IMAGE_EMBEDDING"], feed)
            times[way].append(time.perf_counter() - start)
            runs += 1
        done += 1
        if progress:
            progress(f"timing {' '.join(way)}", done, steps)
    images = sum(len(feed["PIXELS"]) for feed in feeds)
    return {way: images / statistics.median(found) for way, found in times.items()}


def _fitting(tower: Session, pixels: np.ndarray, seconds: float) -> int:
    """How many of the images a batch may have so that it is run LEAST_RUNS times and once before in about `seconds`."""
    feed = {"PIXELS": pixels[:1]}
    tower.run(["IMAGE_EMBEDDING"], feed)
    start = time.perf_counter()
    tower.run(["IMAGE_EMBEDDING"], feed)
    return max(1, min(len(pixels), int(seconds / (LEAST_RUNS + 1) / (time.perf_counter() - start))))


def _tower(clip: Clip, sample: Sample, folder: Path, cache: Cache, precision: str, provider: str) -> Path:
    """The image tower's graph for a way; those in floating point share one."""
    kind = f"int8-{provider}" if precision == "int8" else "float"
    path = folder / kind / "clip_image" / "1" / "model.onnx"
    if not path.exists():
        pixels = torch.from_numpy(sample.pixels[:2])
        with torch.no_grad():
            dim = clip.encode_pixels(pixels).shape[1]

        def write() -> None:
            write_graph(ImageGraph(clip), pixels, path, "PIXELS", {"IMAGE_EMBEDDING": [dim]}, fused=True)

        Towers(clip, cache).graph(path, True, write)
        if precision == "int8":
            quantise(path, {"PIXELS": sample.calibration}, symmetric=provider != "cpu")
    return path
