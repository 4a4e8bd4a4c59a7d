"""What bench/throughput.py measures, as rows: times, parity with the reference, loads on a server, and the ratios."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.common import percentiles, quantiles
from bench.contenders import Way
from bench.loadtest.load_generator import Load, Window
from vilu.export.precision import BUDGETS

BATCH = 16


@dataclass
class Timing:
    """Seconds per call, by the clock and of all threads' CPU time, and how many images a call holds."""

    images: int
    seconds: list[float] = field(default_factory=list)
    cpu: float = 0.0

    def take(self, call: Callable[[], Any], seconds: float) -> None:
        """Time calls until `seconds` are spent, two at least; a first one is not counted."""
        call()
        end = time.perf_counter() + seconds
        before, used = len(self.seconds), time.process_time()
        while len(self.seconds) < before + 2 or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            self.seconds.append(time.perf_counter() - start)
        self.cpu += time.process_time() - used

    def cpu_ms(self) -> float:
        """CPU milliseconds per image: says more than the clock where a machine is shared."""
        return 1e3 * self.cpu / len(self.seconds) / self.images

    def latency(self) -> dict[str, float]:
        """Median and 20/80 quantiles, in milliseconds."""
        return quantiles([1e3 * s for s in self.seconds])

    def rate(self) -> dict[str, float]:
        """Images a second: median and 20/80 quantiles."""
        return quantiles([self.images / s for s in self.seconds])


@dataclass
class Row:
    """A contender with its parity and times; `way` is None where it cannot run here, and `note` says why."""

    name: str
    precision: str
    ours: bool = False
    way: Way | None = None
    note: str = ""
    parity: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)  # "tower 1", "tower 16", "answer 1", "answer 16"

    @property
    def agrees(self) -> bool:
        return bool(self.parity.get("within_budget"))

    def rate(self, kind: str) -> float:
        """Images a second, 0 where there is none that counts."""
        return self.timings[kind].rate()["median"] if self.agrees and kind in self.timings else 0.0


@dataclass(frozen=True)
class Reference:
    """Eager float32 with open_clip's transform and the authors' head, over all timed images."""

    embedding: np.ndarray
    failure: np.ndarray
    index: np.ndarray

    def judge(
        self, precision: str, failure: np.ndarray, index: np.ndarray, embedding: np.ndarray | None = None
    ) -> dict[str, Any]:
        """How far a contender's answers are, and whether the budget of an export of this precision allows that."""
        budget = BUDGETS[precision]
        error = np.abs(failure.astype(np.float64) - self.failure)
        found: dict[str, Any] = {
            "images": len(index),
            "agreement": float(np.mean(index == self.index)),
            "failure_mean_error": float(error.mean()),
            "failure_max_error": float(error.max()),
        }
        fine = bool(np.isfinite(error).all()) and found["agreement"] >= budget.agreement
        worst = found["failure_max_error"]
        if embedding is not None:
            cosine = np.sum(embedding * self.embedding, axis=1, dtype=np.float64)
            cosine /= np.linalg.norm(embedding, axis=1) * np.linalg.norm(self.embedding, axis=1)
            found |= {"cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min())}
            worst = max(worst, float(np.abs(embedding - self.embedding).max()))
            fine &= bool(np.isfinite(cosine).all()) and (budget.cosine is None or found["cosine_mean"] >= budget.cosine)
        fine &= budget.error is None or worst <= budget.error
        return found | {"within_budget": fine}


@dataclass
class Served:
    """A server under load: windows by concurrency (closed loop) and by rate (open loop)."""

    precision: str
    load: Load
    rates: list[float]
    parity: dict[str, Any] | None
    closed: dict[int, list[Window]] = field(default_factory=dict)
    open: dict[float, list[Window]] = field(default_factory=dict)

    def peak(self) -> float:
        level = BATCH if BATCH in self.closed else max(self.closed, default=0)
        return self.at(level)

    def at(self, level: int) -> float:
        """Images a second at this concurrency; 0 where not measured or the answers are over budget."""
        if level not in self.closed or (self.parity is not None and not self.parity["within_budget"]):
            return 0.0
        return statistics.median(w.throughput for w in self.closed[level])

    def summaries(self) -> Iterator[dict[str, Any]]:
        for mode, windows in (("closed", self.closed), ("open, Poisson", self.open)):
            for level, group in windows.items():
                yield {"precision": self.precision, "mode": mode, "level": level, **summary(group)}


def summary(windows: Sequence[Window]) -> dict[str, Any]:
    """Windows of one load as one row."""
    seconds = sum(w.seconds for w in windows)
    images = sum(w.answered for w in windows)
    latencies = [latency for w in windows for latency in w.latencies]
    memory = [w.memory for w in windows if w.memory is not None]
    server: dict[str, float] = {}
    for w in windows:
        for part, used in w.server_cpu.items():
            server[part] = server.get(part, 0.0) + used * w.seconds / seconds
    models = {}
    for name in sorted({name for w in windows for name in w.models}):
        shares = [w.models[name] for w in windows if name in w.models]
        sizes: Counter[int] = Counter()
        for share in shares:
            sizes.update({size: count for size, (count, _) in share.batches.items()})
        executions, inside = sum(s.executions for s in shares), sum(s.seconds for s in shares)
        requests = sum(s.requests for s in shares)
        models[name] = {
            "executions": executions,
            "mean_batch": sum(s.images for s in shares) / executions,
            "batches": {str(size): count for size, count in sorted(sizes.items())},
            "ms_per_execution": 1e3 * inside / executions,
            "ms_per_image": 1e3 * inside / max(1, sum(s.images for s in shares)),
            "busy": inside / seconds,
            "queue_ms": 1e3 * sum(s.queue_seconds for s in shares) / max(1, requests),
        }
    return {
        "seconds": seconds,
        "throughput": quantiles([w.throughput for w in windows]),
        "latency_ms": percentiles(latencies),
        "answered": images,
        "errors": dict(sum((w.errors for w in windows), Counter())),
        "client_cpu": sum(w.client_cpu * w.seconds for w in windows) / seconds,
        "server_cpu": server or None,
        "cpu_ms_per_image": 1e3 * sum(server.values()) * seconds / images if server and images else None,
        "memory_mib": max(memory) / 2**20 if memory else None,
        "models": models,
    }


def limit(decode_seconds: float, tower_seconds: float) -> float:
    """Images a second that these cores allow: both parts, each measured on all cores, share them, one after the other.

    Args:
        decode_seconds: per image, images decoded on all cores at once.
        tower_seconds: per image at batch 16, with a thread on every core.
    """
    return 1 / (decode_seconds + tower_seconds)


def targets(
    rows: Sequence[Row], servers: Sequence[Served], decoding: Timing | None, exports: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The ratios that were asked for beside those measured; None where this run has nothing to say."""
    found: list[dict[str, Any]] = []
    tower, answer = f"tower {BATCH}", f"answer {BATCH}"

    def say(what: str, goal: str, value: float | None, unit: str = "x") -> None:
        found.append({"what": what, "goal": goal, "measured": value, "unit": unit})

    def best(kind: str, ours: bool, precisions: Sequence[str]) -> Row | None:
        chosen = [r for r in rows if r.ours == ours and r.precision in precisions and r.rate(kind)]
        return max(chosen, key=lambda r: r.rate(kind), default=None)

    def rate(row: Row | None) -> float:
        return row.rate(tower) if row else 0.0

    def ratio(a: float | None, b: float) -> float | None:
        return a / b if a and b else None

    every = tuple(BUDGETS)
    baseline = rows[0] if rows else None
    mine = best(tower, True, every)
    if baseline is not None:
        name = f"exported tower ({mine.precision if mine else 'none'}) / eager float32"
        say(name, ">= 4", ratio(rate(mine), rate(baseline)))
    for precision in dict.fromkeys(row.precision for row in rows if row.ours):
        own, peer = best(tower, True, (precision,)), best(tower, False, (precision,))
        if own and peer:
            name = f"exported tower / fastest peer at {precision} ({peer.name})"
            say(name, ">= 1", ratio(rate(own), rate(peer)))
    half, int8 = best(tower, True, ("bfloat16", "float16")), best(tower, True, ("int8",))
    say("int8 tower / 16-bit tower", ">= 1.5", ratio(rate(int8), rate(half)))
    for served in servers:
        where = f"server ({served.precision})"
        own = best(tower, True, (served.precision,))
        if baseline is not None:
            say(f"{where} at 16 / authors' way", ">= 3.5", ratio(served.at(16), baseline.rate(answer)))
        if own and decoding:
            allowed = limit(1 / decoding.rate()["median"], 1 / own.rate(tower))
            say(f"{where} at 16 / limit of {allowed:.1f} images/s", ">= 0.8", ratio(served.at(16), allowed))
        alone = best("answer 1", True, (served.precision,))
        if alone and served.at(1):
            taken = percentiles([x for w in served.closed[1] for x in w.latencies])["p50"]
            inside = alone.timings["answer 1"].latency()["median"]
            say(f"{where} latency at 1 / in process", "<= 1.3", ratio(taken, inside))
    for export in exports:
        if "seconds" in export:
            say(f"export ({export['precision']})", "<= 60", export["seconds"], "s")
            say(f"export ({export['precision']})", "<= 6", export["peak_gib"], "GiB")
    return found


def met(row: Mapping[str, Any]) -> bool | None:
    if row["measured"] is None:
        return None
    sign, goal = row["goal"].split()
    return bool(row["measured"] >= float(goal)) if sign == ">=" else bool(row["measured"] <= float(goal))
