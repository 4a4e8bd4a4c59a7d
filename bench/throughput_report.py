"""The figures of bench/throughput.py as tables, as a picture and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.common import png, quantiles
from bench.throughput_rows import BATCH, Row, Served, Timing, met, summary


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


def picture(rows: Sequence[Row], servers: Sequence[Served], title: str) -> bytes:
    """A PNG: towers, whole answers, and the server's latency against its throughput."""
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
        for level, peak, (times, _) in zip(levels, rates, points, strict=True):
            if times["p50"] is not None:
                right.annotate(
                    str(level), (peak, times["p50"]), textcoords="offset points", xytext=(4, -10), fontsize=8
                )
    right.set(title="server, closed loop (labels: requests in flight)", xlabel="images/s", ylabel="latency, ms")
    right.set_ylim(bottom=0)
    if servers:
        right.legend()
    return png(figure, 100)
