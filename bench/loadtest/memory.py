"""The memory of a server while traffic runs, and how it grows."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from bench.loadtest.processes import Processes
from bench.loadtest.traffic import Ledger

Sample = tuple[int, int, int]  # requests so far, PSS, USS


class Memory:
    """Samples the memory of a server's processes beside the traffic; `ledger` is the one being written."""

    def __init__(self, processes: Processes | None, seconds: float = 1.0) -> None:
        self.processes, self.seconds = processes, seconds
        self.ledger, self.before = Ledger(), 0
        self.samples: list[Sample] = []
        self.parts: dict[str, dict[str, int]] = {}

    def follow(self, ledger: Ledger) -> None:
        self.before += self.ledger.sent
        self.ledger = ledger

    @contextlib.asynccontextmanager
    async def sampled(self) -> AsyncIterator[None]:
        async def forever(processes: Processes) -> None:
            while True:
                usage = await asyncio.to_thread(processes.usage)
                pss, uss = (sum(part[i] for part in usage.values()) for i in (0, 1))
                self.samples.append((self.before + self.ledger.sent, pss, uss))
                self.parts["last"] = {name: part[0] for name, part in usage.items()}
                self.parts.setdefault("first", self.parts["last"])
                await asyncio.sleep(self.seconds)

        task = asyncio.create_task(forever(self.processes)) if self.processes else None
        try:
            yield
        finally:
            if task is not None:
                task.cancel()

    def growth(self) -> dict[str, Any] | None:
        """From the first tenth of the samples to the last tenth, and the slope of a line through all; None without
        samples."""
        if len(self.samples) < 10:
            return None
        table = np.array(self.samples, float)
        tenth = max(2, len(table) // 10)
        found: dict[str, Any] = {"samples": len(table)}
        for column, name in ((1, "pss"), (2, "uss")):
            first, last = table[:tenth, column].mean(), table[-tenth:, column].mean()
            slope = np.polyfit(table[:, 0], table[:, column], 1)[0]  # bytes a request = KB per 1000
            found[name] = {"first_mb": first / 1e6, "last_mb": last / 1e6, "peak_mb": table[:, column].max() / 1e6,
                           "growth": last / first - 1, "slope_kb_per_1000_requests": slope}  # fmt: skip
        every = max(1, len(self.samples) // 100)
        found["requests_pss_uss_mb"] = [[n, round(p / 1e6, 1), round(u / 1e6, 1)] for n, p, u in self.samples[::every]]
        found["parts_mb"] = {
            when: {name: round(value / 1e6, 1) for name, value in sorted(part.items())}
            for when, part in self.parts.items()
        }
        return found
