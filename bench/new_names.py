"""Measures what unknown class names cost the users of the closed set: `python bench/new_names.py [--precision int8]`.

It starts a real server over ViT-B-32 with random weights, which cost as much as trained ones. Some askers of `vilu`
send one image after the other in a closed loop. In every other window one more asker sends `vilu_open` ten new names
once a second, and each name costs a run of the text tower. The results are medians over the windows, in OUTPUT.json and
OUTPUT.md.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import grpc
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the package `bench`, as this file is run by its path

from bench.common import RESULTS, markdown_table, percentiles, write_results
from bench.exports import export_all
from bench.inputs import photos, stand_in
from bench.loadtest.load_generator import request
from bench.loadtest.wire import INFER, message, pack_strings
from bench.throughput import PHOTOS, environment
from vilu import load_clip
from vilu.data.pipeline import cores
from vilu.serving import Server

NAMES, EVERY = 10, 1.0  # new names in a question, seconds from one question to the next


async def window(
    url: str, requests: list[bytes], image: bytes, askers: int, seconds: float, first: int
) -> dict[str, Any]:
    """Rate and latencies of `askers` of `requests`; with `first` >= 0 and new names, numbered from there."""
    end = time.monotonic() + seconds
    latencies: list[float] = []
    opened: list[float] = []
    async with grpc.aio.insecure_channel(url) as channel:
        call = channel.unary_unary(INFER)

        async def closed(at: int) -> None:
            while time.monotonic() < end:
                start = time.perf_counter()
                await call(requests[at % len(requests)], timeout=60)
                latencies.append(time.perf_counter() - start)
                at += 1

        async def ask(number: int) -> None:
            names = pack_strings(*(b"new name %d" % (NAMES * number + i) for i in range(NAMES)))
            tensors = [("IMAGE", "BYTES", (1, 1), pack_strings(image)), ("LABELS", "BYTES", (1, NAMES), names)]
            start = time.perf_counter()
            await call(message("vilu_open", tensors).SerializeToString(), timeout=60)
            opened.append(time.perf_counter() - start)

        async def steady() -> None:
            number, asked = first, []
            while time.monotonic() < end:
                asked.append(asyncio.create_task(ask(number)))
                number += 1
                await asyncio.sleep(EVERY)
            await asyncio.gather(*asked)

        tasks = [closed(i) for i in range(askers)] + ([steady()] if first >= 0 else [])
        await asyncio.gather(*tasks)
    found = {"images_per_second": len(latencies) / seconds, **percentiles(latencies), "max": 1e3 * max(latencies)}
    return found | ({"new_names_p50": percentiles(opened)["p50"], "questions": len(opened)} if opened else {})


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--precision", default="float32", show_default=True)
@click.option("--askers", type=click.IntRange(1), default=2, show_default=True)
@click.option("--seconds", type=click.FloatRange(1), default=15.0, show_default=True, help="Length of a window.")
@click.option("--windows", type=click.IntRange(1), default=3, show_default=True, help="Windows of each kind.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS / "new-names-cpu", show_default=True)
def main(precision: str, askers: int, seconds: float, windows: int, output: Path) -> None:
    """Closed-set traffic with and without new names beside it."""
    clip = load_clip("ViT-B-32", "random")
    jpegs = photos(PHOTOS, None)
    checkpoint = stand_in(clip, jpegs)
    about = environment("cpu", cores())
    with tempfile.TemporaryDirectory(prefix="vilu-names-") as folder:
        exports: list[dict[str, Any]] = []
        ready = export_all(checkpoint, jpegs, (), precision, False, "cpu", Path(folder), exports, click.echo)
        if not ready:
            raise click.ClickException(str(exports))
        requests = [request(jpeg) for jpeg in jpegs[:32]]
        found: dict[str, list[dict[str, Any]]] = {"without": [], "with": []}
        with Server(ready[0][1], log=Path(folder) / "log", startup_seconds=180) as server:
            asyncio.run(window(server.grpc_url, requests, jpegs[0], askers, 3.0, -1))
            for i in range(windows):
                for kind, first in (("without", -1), ("with", 1000 * i)):
                    found[kind].append(asyncio.run(window(server.grpc_url, requests, jpegs[0], askers, seconds, first)))
    rows = {
        kind: {key: float(np.median([one[key] for one in some])) for key in some[0]} for kind, some in found.items()
    }
    about["load_after"] = os.getloadavg()[0]
    report = {"environment": about, "precision": precision, "askers": askers, "seconds": seconds, "medians": rows,
              "windows": found}  # fmt: skip
    table = []
    for kind, row in rows.items():
        own = f"{row['new_names_p50']:.0f}" if "new_names_p50" in row else ""
        times = (f"{row[key]:.0f}" for key in ("p50", "p99", "max"))
        table.append((kind, f"{row['images_per_second']:.1f}", *times, own))
    lines = [
        f"# new_names.py --precision {precision}",
        "",
        f"ViT-B-32 in {precision}, {askers} closed askers, {about['cores']} cores of an {about['device']}, commit "
        f"{about['commit']}. Medians of {windows} windows of {seconds:g} s; milliseconds.",
        "",
        *markdown_table((f"{NAMES} new names a second", "images/s", "p50", "p99", "longest", "their own p50"), table),
    ]
    text = "\n".join(lines) + "\n"
    click.echo(text)
    write_results(output, {".json": report, ".md": text})


if __name__ == "__main__":
    main()
