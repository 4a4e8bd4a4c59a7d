"""What bench/throughput.py measures, as rows: their parity and ratios, the tables, the picture, the JSON."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from contenders import Way
from loadgen import Load, Window, percentiles
from rich.console import Console
from rich.table import Table

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


def quantiles(values: Sequence[float]) -> dict[str, float]:
    q20, median, q80 = np.quantile(values, (0.2, 0.5, 0.8))
    return {"median": float(median), "q20": float(q20), "q80": float(q80)}


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
    server: Counter[str] = Counter()
    for w in windows:
        for part, used in w.server_cpu.items():
            server[part] += used * w.seconds / seconds
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
        "server_cpu": dict(server) or None,
        "cpu_ms_per_image": 1e3 * server.total() * seconds / images if server and images else None,
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

    def ratio(a: float, b: float) -> float | None:
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


def show(value: Mapping[str, float] | None, digits: int = 1) -> str:
    if value is None:
        return ""
    return f"{value['median']:.{digits}f} [{value['q20']:.{digits}f}–{value['q80']:.{digits}f}]"


def print_rows(console: Console, rows: Sequence[Row], part: str, title: str) -> None:
    """One table of contenders; `part` is "tower" or "answer"."""
    table = Table(title=title, title_justify="left")
    table.add_column("contender", no_wrap=True)
    table.add_column("precision")
    for name in ("batch 1, ms", "batch 1, images/s", f"batch {BATCH}, images/s", "CPU ms", "x first", "agree", "P err"):
        table.add_column(name, justify="right")
    table.add_column("cosine", justify="right")
    table.add_column("")
    first = rows[0].rate(f"{part} {BATCH}")
    for row in rows:
        one, many = row.timings.get(f"{part} 1"), row.timings.get(f"{part} {BATCH}")
        rate = row.rate(f"{part} {BATCH}")
        parity = row.parity
        table.add_row(
            row.name,
            row.precision,
            show(one.latency()) if one else "",
            show(one.rate()) if one else "",
            show(many.rate()) if many else "",
            f"{many.cpu_ms():.1f}" if many else "",
            f"{rate / first:.2f}" if rate and first else "",
            f"{parity['agreement']:.1%}" if parity else "",
            f"{parity['failure_max_error']:.0e}" if parity else "",
            f"{parity['cosine_mean']:.5f}" if parity else "",
            row.note if row.agrees or not row.parity else "[red]over budget: no rank",
        )
    console.print(table)


def print_served(console: Console, servers: Sequence[Served]) -> None:
    """The loads, and where the time goes in the server at concurrency 16."""
    table = Table(title="(c) the server over gRPC, one image a request", title_justify="left")
    for name in ("precision", "loop", "at a time | 1/s", "images/s", "p50 ms", "p90", "p99", "errors", "tower's batch",
                 "server cores", "CPU ms", "MiB", "client cores"):  # fmt: skip
        table.add_column(name, justify="right")
    for served in servers:
        for row in served.summaries():
            times = [f"{row['latency_ms'][p]:.0f}" if row["latency_ms"][p] is not None else "-" for p in
                     ("p50", "p90", "p99")]  # fmt: skip
            tower = row["models"].get("clip_image")
            table.add_row(
                row["precision"], row["mode"], f"{row['level']:.4g}", show(row["throughput"]), *times,
                ", ".join(f"{n} {k}" for k, n in row["errors"].items()) or "0",
                f"{tower['mean_batch']:.1f}" if tower else "-",
                f"{sum(row['server_cpu'].values()):.2f}" if row["server_cpu"] else "-",
                f"{row['cpu_ms_per_image']:.1f}" if row["cpu_ms_per_image"] else "-",
                f"{row['memory_mib']:.0f}" if row["memory_mib"] else "-", f"{row['client_cpu']:.2f}",
            )  # fmt: skip
        if served.parity is not None and not served.parity["within_budget"]:
            console.print(f"[red]server ({served.precision}): answers over the parity budget, no rank")
    console.print(table)
    for served in servers:
        if BATCH in served.closed:
            print_profile(console, served)


def print_profile(console: Console, served: Served) -> None:
    row = summary(served.closed[BATCH])
    table = Table(title=f"inside the server ({served.precision}), {BATCH} at a time", title_justify="left")
    for name in ("model", "batch", "ms/execution", "ms/image", "busy", "queue ms"):
        table.add_column(name, justify="right")
    for name, m in row["models"].items():
        table.add_row(name, f"{m['mean_batch']:.1f}", f"{m['ms_per_execution']:.1f}", f"{m['ms_per_image']:.2f}",
                      f"{m['busy']:.0%}", f"{m['queue_ms']:.1f}")  # fmt: skip
    console.print(table)
    if row["server_cpu"]:
        parts = (f"{part} {used:.2f}" for part, used in sorted(row["server_cpu"].items()))
        console.print(f"cores used: {', '.join(parts)}, client {row['client_cpu']:.2f}")


def picture(rows: Sequence[Row], servers: Sequence[Served], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    figure.suptitle(title)
    left, middle, right = figure.subplots(1, 3)
    colours = {"float32": "tab:gray", "float16": "tab:orange", "bfloat16": "tab:orange", "int8": "tab:blue"}
    for axis, part, label in ((left, "tower", "pixels in, embedding out"), (middle, "answer", "JPEG in, answer out")):
        kind = f"{part} {BATCH}"
        shown = [row for row in rows if kind in row.timings]
        bars: list[tuple[str, dict[str, float], str, bool]] = [
            (f"{r.name}, {r.precision}", r.timings[kind].rate(), colours.get(r.precision, "tab:gray"), r.agrees)
            for r in shown
        ]
        if part == "answer":
            bars += [
                (f"server at {BATCH}, {s.precision}", quantiles([w.throughput for w in s.closed[BATCH]]),
                 colours.get(s.precision, "tab:gray"), s.parity is None or s.parity["within_budget"])
                for s in servers if BATCH in s.closed
            ]  # fmt: skip
        for y, (_, rate, colour, agrees) in enumerate(bars):
            axis.barh(
                y, rate["median"], color=colour, hatch=None if agrees else "xx",
                xerr=[[rate["median"] - rate["q20"]], [rate["q80"] - rate["median"]]],
            )  # fmt: skip
        names = [name if agrees else f"{name}\n(over budget)" for name, _, _, agrees in bars]
        axis.set_yticks(range(len(bars)), names, fontsize=8)
        axis.set(title=f"{label}, batch {BATCH}", xlabel="images/s")
        axis.invert_yaxis()
    for served in servers:
        levels = sorted(served.closed)
        colour = colours.get(served.precision, "tab:gray")
        points = [(summary(served.closed[k])["latency_ms"], served.closed[k]) for k in levels]
        rates = [statistics.median(w.throughput for w in windows) for _, windows in points]
        for p, style in (("p50", "o-"), ("p99", "x:")):
            right.plot(rates, [times[p] for times, _ in points], style, color=colour, label=f"{served.precision}, {p}")
        for level, rate, (times, _) in zip(levels, rates, points, strict=True):
            if times["p50"] is not None:
                right.annotate(
                    str(level), (rate, times["p50"]), textcoords="offset points", xytext=(4, -10), fontsize=8
                )
    right.set(title="server, closed loop (labels: requests in flight)", xlabel="images/s", ylabel="latency, ms")
    right.set_ylim(bottom=0)
    if servers:
        right.legend()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=100, format="png")
    temporary.replace(path)


def document(
    rows: Sequence[Row], servers: Sequence[Served], about: Mapping[str, Any], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """What BASE.json holds."""
    contenders = [
        {
            "contender": row.name, "precision": row.precision, "note": row.note or None, "parity": row.parity or None,
            "timings": {
                kind: {"batch": t.images, "calls": len(t.seconds), "latency_ms": t.latency(), "images_per_s": t.rate(),
                       "cpu_ms_per_image": t.cpu_ms()}
                for kind, t in row.timings.items()
            },
        }
        for row in rows
    ]  # fmt: skip
    loads = [row for served in servers for row in served.summaries()]
    parity = {served.precision: served.parity for served in servers}
    return {**about, **extra, "contenders": contenders, "server_parity": parity, "server": loads}


def print_report(
    console: Console, rows: Sequence[Row], servers: Sequence[Served], report: Mapping[str, Any], decoding: Timing | None
) -> None:
    console.print(
        f"{report.get('clip', '')} on {report['device']}, {report['threads']} threads, {report['images']} images, "
        f"torch {report['torch']}, onnxruntime {report['onnxruntime']}, commit {report['commit']}, "
        f"load before {report['load']:.1f}; medians [20–80 quantiles]"
    )
    if rows:
        print_rows(console, rows, "tower", "(a) image tower: pixels in, embedding out")
        print_rows(console, rows, "answer", "(b) encoded JPEG in, answer out, in one process")
    if servers:
        print_served(console, servers)
    if decoding:
        console.print(f"decoding on all cores: {show(decoding.rate(), 0)} images/s")
    for export in report["export"]:
        if "note" in export:
            console.print(f"export ({export['precision']}): {export['note']}")
    table = Table(title="what was asked for (stated, not asserted)", title_justify="left")
    for name in ("", "goal", "measured", ""):
        table.add_column(name)
    for row in report["targets"]:
        value = row["measured"]
        verdict = {None: "", True: "yes", False: "[red]no"}[met(row)]
        table.add_row(row["what"], row["goal"], "-" if value is None else f"{value:.2f} {row['unit']}", verdict)
    console.print(table)
