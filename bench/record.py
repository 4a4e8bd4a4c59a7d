"""Measures what recording costs: `python bench/record.py REPOSITORY [--pairs 20]`.

One server answers behind two front doors, each a process of its own, of which one records every answer. Both get the
same questions in turns, plain door and recording door as a pair, in an order that alternates. The result is the ratio
of their answers a second, over the pairs, and the CPU time of an answer, of the door alone and of the server with it.
On a busy machine the CPU times say more.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import click
import grpc
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the package `bench`, as this file is run by its path

from bench.common import machine, quantiles
from bench.loadtest.wire import INFER, message, pack_strings
from vilu.serving import Server
from vilu.serving.address import free_port

OUTPUTS = ("LABEL", "CLASS_INDEX", "CONFIDENCE", "FAILURE_PROBABILITY", "ACCEPT")


@contextlib.contextmanager
def door(upstream: str, *options: str) -> Iterator[tuple[str, int]]:
    """HOST:PORT and the process of `vilu serve` before a running server."""
    port, http = free_port(), free_port()
    ports = ["--grpc-port", str(port), "--http-port", str(http), "--metrics-port", "0"]
    command = [sys.executable, "-m", "vilu", "serve", "--upstream", upstream, *ports, *options]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{http}/readyz"):
                    break
                if process.poll() is not None or time.monotonic() > end:
                    raise click.ClickException("a front door did not start")
                time.sleep(0.1)
            yield f"127.0.0.1:{port}", process.pid
        finally:
            process.terminate()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def tree_seconds(pid: int) -> float:
    """The same of a process and all below it."""
    total = cpu_seconds(pid)
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        total += sum(tree_seconds(int(child)) for child in task.read_text().split())
    return total


async def rate(url: str, question: bytes, questions: int, askers: int) -> float:
    """Answers a second of so many askers in a closed loop."""
    left = iter(range(questions))
    async with grpc.aio.insecure_channel(url) as channel:
        call = channel.unary_unary(INFER)

        async def closed() -> None:
            for _ in left:
                await call(question, timeout=60)

        start = time.perf_counter()
        await asyncio.gather(*(closed() for _ in range(askers)))
        return questions / (time.perf_counter() - start)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("repository", type=click.Path(path_type=Path, exists=True))
@click.option("--pairs", type=click.IntRange(2), default=20, show_default=True)
@click.option("--questions", type=click.IntRange(1), default=400, show_default=True, help="In one half of a pair.")
@click.option("--askers", type=click.IntRange(1), default=8, show_default=True)
def main(repository: Path, pairs: int, questions: int, askers: int) -> None:
    """Measure what recording costs a server of REPOSITORY."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "PNG")
    asked = message("vilu", [("IMAGE", "BYTES", (1, 1), pack_strings(buffer.getvalue()))])
    for name in OUTPUTS:
        asked.outputs.add(name=name)
    question = asked.SerializeToString()
    ratios, rates = [], []
    served = np.zeros(2)  # CPU seconds of the server
    with tempfile.TemporaryDirectory() as folder, Server(repository) as server, contextlib.ExitStack() as stack:
        doors = [stack.enter_context(door(server.grpc_url, *more)) for more in ((), ("--record", folder))]
        for url, _ in doors:
            asyncio.run(rate(url, question, questions, askers))
        before = np.array([cpu_seconds(pid) for _, pid in doors])
        for pair in range(pairs):
            found = [0.0, 0.0]
            for which in (0, 1) if pair % 2 == 0 else (1, 0):
                assert server.process is not None
                start = tree_seconds(server.process.pid)
                found[which] = asyncio.run(rate(doors[which][0], question, questions, askers))
                served[which] += tree_seconds(server.process.pid) - start
            rates.append(found)
            ratios.append(found[1] / found[0])
        time.sleep(1)  # the last write
        cpu = np.array([cpu_seconds(pid) for _, pid in doors]) - before
    plain, recording = np.median(rates, axis=0).tolist()
    names = ("plain", "recording")

    def milliseconds(seconds: np.ndarray) -> dict[str, float]:
        return dict(zip(names, (1e3 * seconds / (pairs * questions)).round(4).tolist(), strict=True))

    result = {
        "answers_per_second": {"plain": plain, "recording": recording},
        "ratio": quantiles(ratios),
        "door_cpu_ms_per_answer": milliseconds(cpu),
        "cpu_ms_per_answer": milliseconds(cpu + served),
        "machine": machine("cpu"),
    }
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
