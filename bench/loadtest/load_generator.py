"""Load on a running server over gRPC, as cheap as the client can be, because it shares the server's cores.

Requests are serialised once and sent as bytes, answers are not parsed, and one event loop holds all of them. Every
window measures the server too: Triton's own statistics, and the CPU time and memory of its processes from /proc.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb

from bench.loadtest.processes import Processes
from bench.loadtest.wire import INFER, SERVICE, message, pack_strings
from vilu.serving.answers import OUTPUTS

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


def request(image: bytes, model: str = "vilu") -> bytes:
    """A serialised ModelInferRequest of one encoded image, for the answer without its details."""
    made = message(model, [("IMAGE", "BYTES", (1, 1), pack_strings(image))], OUTPUTS)
    return bytes(made.SerializeToString())


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
            f"{SERVICE}/ModelStatistics",
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
