"""What `vilu serve --record` costs: answers a second, and CPU time of all the server's processes for each answer.

One server answers behind two front doors, each a process of its own, of which one records every answer. Both get the
same question in turns, as a pair, in an order that alternates. On a busy machine the CPU times say more than the rates.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image

from bench.common import quantiles
from bench.loadtest.load_generator import request
from bench.loadtest.processes import descendants
from bench.loadtest.wire import INFER
from vilu.errors import UserError
from vilu.serving import Server
from vilu.serving.address import free_port

PAIRS, QUESTIONS, AT_A_TIME = 20, 400, 8  # questions: in one half of a pair
START_SECONDS = 60.0


def recording_cost(server: Server, work: Path) -> dict[str, Any]:
    """Measure it before a running server. work: a folder for the record, which is made."""
    assert server.process is not None
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "PNG")
    question = request(buffer.getvalue())
    rates, served = np.zeros((PAIRS, 2)), np.zeros(2)  # served: CPU seconds of the server behind
    with contextlib.ExitStack() as stack:
        more = ((), ("--record", str(work / "record")))
        doors = [stack.enter_context(_door(server.grpc_url, *options)) for options in more]
        for url, _ in doors:
            asyncio.run(_rate(url, question))
        before = np.array([_cpu([pid]) for _, pid in doors])
        for pair in range(PAIRS):
            for which in (0, 1) if pair % 2 == 0 else (1, 0):
                start = _cpu(descendants(server.process.pid))
                rates[pair, which] = asyncio.run(_rate(doors[which][0], question))
                served[which] += _cpu(descendants(server.process.pid)) - start
        time.sleep(1)  # the last write
        used = np.array([_cpu([pid]) for _, pid in doors]) - before
    door_ms, all_ms = (1e3 * seconds / (PAIRS * QUESTIONS) for seconds in (used, used + served))
    return {
        "pairs": PAIRS,
        "questions": QUESTIONS,
        "at_a_time": AT_A_TIME,
        "plain_per_second": float(np.median(rates[:, 0])),
        "recording_per_second": float(np.median(rates[:, 1])),
        "ratio": quantiles((rates[:, 1] / rates[:, 0]).tolist()),
        "plain_door_cpu_ms": float(door_ms[0]),
        "recording_door_cpu_ms": float(door_ms[1]),
        "plain_cpu_ms": float(all_ms[0]),
        "recording_cpu_ms": float(all_ms[1]),
        # The servers' own part is the same for both, and its noise is larger than what recording costs.
        "cost": float((door_ms[1] - door_ms[0]) / all_ms.mean()),
    }


@contextlib.contextmanager
def _door(upstream: str, *options: str) -> Iterator[tuple[str, int]]:
    """HOST:PORT and the process of `vilu serve` before a running server."""
    port, http = free_port(), free_port()
    ports = ["--grpc-port", str(port), "--http-port", str(http), "--metrics-port", "0"]
    command = [sys.executable, "-m", "vilu", "serve", "--upstream", upstream, *ports, *options]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + START_SECONDS
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{http}/readyz"):
                    break
                if process.poll() is not None or time.monotonic() > end:
                    raise UserError("a front door did not start")
                time.sleep(0.1)
            yield f"127.0.0.1:{port}", process.pid
        finally:
            process.terminate()


def _cpu(pids: list[int]) -> float:
    """User and system seconds of processes."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


async def _rate(url: str, question: bytes) -> float:
    """Answers a second of a closed loop."""
    left = iter(range(QUESTIONS))
    async with grpc.aio.insecure_channel(url) as channel:
        call = channel.unary_unary(INFER)

        async def closed() -> None:
            for _ in left:
                await call(question, timeout=60)

        start = time.perf_counter()
        await asyncio.gather(*(closed() for _ in range(AT_A_TIME)))
        return QUESTIONS / (time.perf_counter() - start)
