"""Times of a call: of the GPU, of the host until the call returns, and of the caller until the answer is there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

GRAPH_CALLS = 20  # in one graph, so that the graph's own launch is divided among them


class DeviceFailedError(RuntimeError):
    """The GPU reported an error: its context is lost, and with it the process's further use of it."""


def raise_if_failed(error: Exception) -> None:
    """Raise DeviceFailedError where the GPU has failed, whatever the error says: it answers nothing from then on."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        raise DeviceFailedError(f"the GPU failed: {str(error).splitlines()[0][:200]}") from error


def wall(run: Callable[[], Any], *, seconds: float) -> list[float]:
    """Seconds of each call, after a warm-up, until the time is spent (2 calls at least, 2,000 at most)."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 or (time.perf_counter() < end and len(times) < 2000):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def answered(run: Callable[[], Any]) -> None:
    run()
    torch.cuda.synchronize()


def host(run: Callable[[], Any], repeats: int = 200) -> list[float]:
    """Seconds until each call returns, its work only queued (or less is repeated, where the queue fills)."""
    times: list[float] = []
    end = time.perf_counter() + 1
    while len(times) < 5 or (time.perf_counter() < end and len(times) < repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return times


def gpu(run: Callable[[], Any], *, cold: bool, repeats: int = 50, seconds: float = 1.0) -> list[float]:
    """Seconds of each call on the GPU. Slow calls are repeated less, 5 times.

    Args:
        cold: before each call one buffer is overwritten and a second one read, each larger than L2: the first evicts
            what the call reads, the second what the first left to be written back.
    """
    flush, clean = (torch.zeros(64 << 20, dtype=torch.int32, device="cuda") for _ in range(2))
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    repeats = min(repeats, max(5, int(seconds / (time.perf_counter() - began))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        if cold:
            flush.zero_()
            clean.amax()
        # The GPU idles about 0.5 ms, in which the host issues the call: its own time stays out of the GPU's.
        torch.cuda._sleep(1_000_000)
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def graph(run: Callable[[], Any], calls: int = 1) -> Callable[[], None]:
    """So many calls, one after another, as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=side):
        for _ in range(calls):
            run()
    return captured.replay


def device_limits() -> dict[str, float]:
    """This GPU's copy bandwidth (bytes/s, read plus written) and matrix rate (operations/s) by type, measured."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found = {"bandwidth": 2 * source.numel() / statistics.median(gpu(lambda: target.copy_(source), cold=False))}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        a = torch.randn(8192, 8192, device="cuda").to(dtype)
        took = statistics.median(gpu(lambda a=a: a @ a, cold=False, repeats=20))  # type: ignore[misc]
        found[str(dtype)[6:]] = 2 * 8192**3 / took
    return found
