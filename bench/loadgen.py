"""Load on a running tritonserver over gRPC, as cheap as the client can be: it shares the server's cores.

Requests are serialised once and sent as bytes, answers are not parsed; one event loop holds all of them. Every window
measures the server too: Triton's own statistics, and the CPU time and memory of its processes from /proc.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb

from vilu.serving.client import OUTPUTS

_SERVICE = "/inference.GRPCInferenceService"
INFER, STREAM = f"{_SERVICE}/ModelInfer", f"{_SERVICE}/ModelStreamInfer"
_TICK = os.sysconf("SC_CLK_TCK")
DRAIN_SECONDS = 30.0
PATIENCE = 5.0


@dataclass
class Window:
    """One stretch of time under one load.

    latencies: seconds of every request that ended well within it (open loop: that was due within it, counted from
    when it was due, so that a server that falls behind is not spared); errors: status -> number; client_cpu,
    server_cpu: CPU seconds per second; memory: bytes of the server's processes; models: Triton's statistics.
    """

    seconds: float
    latencies: list[float] = field(default_factory=list)
    answered: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    client_cpu: float = 0.0
    server_cpu: dict[str, float] = field(default_factory=dict)
    memory: int | None = None
    models: dict[str, ModelShare] = field(default_factory=dict)

    @property
    def throughput(self) -> float:
        """Requests a second that were answered well within the window."""
        return self.answered / self.seconds


@dataclass
class ModelShare:
    """What one model did in a window: batches: size -> (executions, seconds in the model)."""

    requests: int
    queue_seconds: float
    batches: dict[int, tuple[int, float]]

    @property
    def images(self) -> int:
        return sum(size * count for size, (count, _) in self.batches.items())

    @property
    def executions(self) -> int:
        return sum(count for count, _ in self.batches.values())

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.batches.values())


def ticker(bar: Callable[[str, int, int], None]) -> Callable[[str], None]:
    """tick(what) for a progress bar whose total nobody knows."""
    steps = itertools.count(1)

    def tick(what: str) -> None:
        step = next(steps)
        bar(what, step, step + 1)

    return tick


class Processes:
    """The process group of a local server: CPU time by part, and memory."""

    def __init__(self, group: int) -> None:
        self.group = group

    def _members(self) -> list[Path]:
        found = []
        for folder in Path("/proc").iterdir():
            with suppress(OSError, ValueError, IndexError):
                if folder.name.isdigit() and int(_stat(folder)[2]) == self.group:
                    found.append(folder)
        return found

    def cpu(self) -> dict[str, float]:
        """Part ("tritonserver", or the model of a Python stub) -> CPU seconds so far."""
        total: Counter[str] = Counter()
        for folder in self._members():
            with suppress(OSError, IndexError):
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                fields = _stat(folder)
                total[_part(words)] += (int(fields[11]) + int(fields[12])) / _TICK  # type: ignore[assignment]
        return dict(total)

    def memory(self) -> int:
        """Bytes, pages shared by several processes counted once (PSS; RSS where that cannot be read)."""
        return sum(pss for pss, _ in self.usage().values())

    def usage(self) -> dict[str, tuple[int, int]]:
        """Part -> bytes with shared pages counted once (PSS), and of its own pages alone (USS); RSS for both where
        they cannot be read."""
        total: dict[str, tuple[int, int]] = {}
        for folder in self._members():
            with suppress(OSError, IndexError, ValueError):
                part = _part((folder / "cmdline").read_bytes().decode(errors="replace").split("\0"))
                try:
                    lines = (folder / "smaps_rollup").read_text().splitlines()[1:]
                    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
                    pss, uss = sizes["Pss"], sizes["Private_Clean"] + sizes["Private_Dirty"]
                except OSError:
                    pss = uss = int(_stat(folder)[21]) * os.sysconf("SC_PAGE_SIZE")
                was = total.get(part, (0, 0))
                total[part] = was[0] + pss, was[1] + uss
        return total


def _stat(folder: Path) -> list[str]:
    """/proc/PID/stat from its third field (state) on: the second may hold spaces."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def _part(words: Sequence[str]) -> str:
    if "triton_python_backend_stub" not in Path(words[0]).name:
        return Path(words[0]).name
    return Path(words[1]).parents[1].name  # MODEL/VERSION/FILE


def request(image: bytes, model: str = "vilu") -> bytes:
    """A serialised ModelInferRequest of one encoded image, for the answer without its details."""
    message = pb.ModelInferRequest(model_name=model)
    message.inputs.add(name="IMAGE", datatype="BYTES", shape=[1, 1])
    for name in OUTPUTS:
        message.outputs.add(name=name)
    message.raw_input_contents.append(len(image).to_bytes(4, "little") + image)
    return bytes(message.SerializeToString())


class Load:
    """Sends prepared requests in turn to a server.

    Args:
        url: HOST:PORT of its gRPC port.
        requests: what `request` gives.
        processes: the server's, where it runs on this machine.
        timeout: seconds for each request.
    """

    def __init__(
        self, url: str, requests: Sequence[bytes], *, processes: Processes | None = None, timeout: float = 60.0
    ) -> None:
        self.url, self.requests, self.processes, self.timeout = url, list(requests), processes, timeout

    def closed(self, concurrency: int, seconds: float, *, ramp: float = 0.5) -> Window:
        """`concurrency` requests always in flight.

        Not counted: the first `ramp` seconds, and until every first request has its answer. A slow server's window is
        longer, until it holds two answers for each in flight; at most PATIENCE times what was asked for.
        """
        return asyncio.run(self._run(lambda call, window: self._closed(call, window, concurrency, seconds, ramp)))

    def open(self, rate: float, seconds: float, *, seed: int = 0) -> Window:
        """Requests due at random (Poisson) times at `rate` a second, whether or not earlier ones were answered."""
        return asyncio.run(self._run(lambda call, window: self._open(call, window, rate, seconds, seed)))

    async def _run(self, load: Callable[[Any, _Probe], Awaitable[Window]]) -> Window:
        async with grpc.aio.insecure_channel(self.url, options=[("grpc.max_receive_message_length", -1)]) as channel:
            call = channel.unary_unary(INFER)  # bytes in, bytes out
            return await load(call, _Probe(channel, self.processes))

    async def _one(self, call: Any, index: int) -> str | None:
        """None, or the status of the failure."""
        try:
            await call(self.requests[index % len(self.requests)], timeout=self.timeout)
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return None

    async def _closed(self, call: Any, probe: _Probe, concurrency: int, seconds: float, ramp: float) -> Window:
        ended: list[tuple[float, float, str | None]] = []  # when, latency, error
        stop = asyncio.Event()
        turn = iter(range(1 << 62))

        async def worker() -> None:
            while not stop.is_set():
                start = time.perf_counter()
                error = await self._one(call, next(turn))
                now = time.perf_counter()
                ended.append((now, now - start, error))
                if error is not None:
                    await asyncio.sleep(0.01)  # a server that is gone must not be hammered

        async def until(answers: int, least: float) -> None:
            start = time.perf_counter()
            await asyncio.sleep(least)
            while len(ended) < answers and time.perf_counter() < start + PATIENCE * max(least, 1.0):
                await asyncio.sleep(0.02)

        workers = [asyncio.create_task(worker()) for _ in range(concurrency)]
        await until(concurrency, ramp)
        await probe.start()
        await until(len(ended) + 2 * concurrency, seconds)
        window = await probe.stop()
        stop.set()
        await asyncio.gather(*workers)
        inside = [(latency, error) for when, latency, error in ended if probe.began <= when <= probe.ended]
        window.latencies = [latency for latency, error in inside if error is None]
        window.answered = len(window.latencies)
        window.errors = Counter(error for _, error in inside if error is not None)
        return window

    async def _open(self, call: Any, probe: _Probe, rate: float, seconds: float, seed: int) -> Window:
        draw = random.Random(seed)
        latencies: list[float] = []
        errors: Counter[str] = Counter()

        async def one(index: int, due: float) -> None:
            error = await self._one(call, index)
            if error is None:
                latencies.append(time.perf_counter() - due)
            else:
                errors[error] += 1

        await self._one(call, 0)  # the connection
        await probe.start()
        sent, due, tasks = 0, probe.began, set()
        while (due := due + draw.expovariate(rate)) < probe.began + seconds:
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.add(asyncio.create_task(one(sent, due)))
            sent += 1
        if (wait := probe.began + seconds - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        in_time = len(latencies)
        window = await probe.stop()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=DRAIN_SECONDS)
            for task in late:
                task.cancel()
            errors["UNANSWERED"] += len(late)
        window.latencies, window.answered, window.errors = latencies, in_time, +errors
        return window


class _Probe:
    """What the server and this process have used between `start` and `stop`."""

    def __init__(self, channel: Any, processes: Processes | None) -> None:
        self.processes = processes
        self._statistics = channel.unary_unary(
            f"{_SERVICE}/ModelStatistics",
            request_serializer=pb.ModelStatisticsRequest.SerializeToString,
            response_deserializer=pb.ModelStatisticsResponse.FromString,
        )
        self.began = self.ended = 0.0

    async def _models(self) -> dict[str, ModelShare]:
        answer = await self._statistics(pb.ModelStatisticsRequest(), timeout=30)
        return {
            m.name: ModelShare(
                m.inference_stats.success.count + m.inference_stats.fail.count,
                m.inference_stats.queue.ns / 1e9,
                {
                    b.batch_size: (
                        b.compute_infer.count,
                        (b.compute_input.ns + b.compute_infer.ns + b.compute_output.ns) / 1e9,
                    )
                    for b in m.batch_stats
                },
            )
            for m in answer.model_stats
        }

    async def start(self) -> None:
        self._before = await self._models()
        self._server = self.processes.cpu() if self.processes else {}
        self._client = time.process_time()
        self.began = time.perf_counter()

    async def stop(self) -> Window:
        self.ended = time.perf_counter()
        seconds = self.ended - self.began
        client = (time.process_time() - self._client) / seconds
        server = self.processes.cpu() if self.processes else {}
        memory = self.processes.memory() if self.processes else None
        models = {}
        for name, now in (await self._models()).items():
            was = self._before.get(name, ModelShare(0, 0.0, {}))
            batches = {}
            for size, (count, spent) in now.batches.items():
                old_count, old_spent = was.batches.get(size, (0, 0.0))
                if count > old_count:
                    batches[size] = (count - old_count, spent - old_spent)
            if batches:
                models[name] = ModelShare(now.requests - was.requests, now.queue_seconds - was.queue_seconds, batches)
        used = {part: (spent - self._server.get(part, 0.0)) / seconds for part, spent in server.items()}
        return Window(seconds, client_cpu=client, server_cpu=used, memory=memory, models=models)


def percentiles(latencies: Sequence[float]) -> dict[str, float | None]:
    """p50, p90, p99 in milliseconds; None where nothing was answered."""
    cuts = np.percentile(latencies, (50, 90, 99)) * 1e3 if len(latencies) else (None, None, None)
    return {name: None if cut is None else float(cut) for name, cut in zip(("p50", "p90", "p99"), cuts, strict=True)}
