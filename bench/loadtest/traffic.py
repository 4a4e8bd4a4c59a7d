"""Questions sent to a running server, closed and open loop, and a ledger of what became of every one of them."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import aiohttp
import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb

from bench.loadtest.questions import Question
from bench.loadtest.wire import INFER

TIMEOUT = 60.0


@dataclass
class Ledger:
    """What became of every request: sent = right + wrong + refused, or some were lost.

    refused: code -> number; wrong: the first few problems; latencies: seconds of right answers by (kind,
    protocol), from when they were due; refusals: seconds of the refused, from when they were sent.
    """

    sent: int = 0
    right: int = 0
    images: int = 0
    wrong: list[str] = field(default_factory=list)
    wrongs: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    latencies: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    refusals: list[float] = field(default_factory=list)
    messages: Counter[str] = field(default_factory=Counter)

    @property
    def lost(self) -> int:
        return self.sent - self.right - self.wrongs - self.refused.total()

    def all(self) -> list[float]:
        return [seconds for part in self.latencies.values() for seconds in part]

    def add(self, other: Ledger) -> None:
        self.sent, self.right, self.images = (
            self.sent + other.sent,
            self.right + other.right,
            self.images + other.images,
        )
        self.wrongs += other.wrongs
        self.wrong += other.wrong[: 10 - len(self.wrong)]
        self.refused += other.refused
        self.messages += other.messages
        self.refusals += other.refusals
        for key, values in other.latencies.items():
            self.latencies[key] += values


class Asker:
    """Sends questions and enters what came of them. One per event loop; use `asker`."""

    def __init__(self, channel: Any, session: aiohttp.ClientSession, http_url: str, timeout: float) -> None:
        self._call = channel.unary_unary(INFER)
        self._session, self._http, self._timeout = session, http_url, timeout

    async def ask(self, asked: Question, ledger: Ledger, due: float | None = None) -> None:
        sent = time.perf_counter()
        ledger.sent += 1
        try:
            code, got = await (self._over_http(asked) if asked.http else self._over_grpc(asked))
        except asyncio.CancelledError:
            return  # stays in `lost`
        now = time.perf_counter()
        if isinstance(got, str):
            ledger.refused[code] += 1
            ledger.refusals.append(now - sent)
            ledger.messages[got[:120]] += 1
            return
        try:
            problem = asked.check(got)
        except KeyError:
            problem = "an output is missing"
        if problem is None:
            ledger.right += 1
            ledger.images += asked.images
            seconds = now - (sent if due is None else due)
            ledger.latencies[asked.kind, "HTTP" if asked.http else "gRPC"].append(seconds)
        else:
            ledger.wrongs += 1
            if len(ledger.wrong) < 10:
                ledger.wrong.append(f"{asked.kind}: {problem}")

    async def _over_grpc(self, asked: Question) -> tuple[str, Mapping[str, bytes] | str]:
        try:
            answer = pb.ModelInferResponse.FromString(await self._call(asked.body, timeout=self._timeout))
        except grpc.aio.AioRpcError as error:
            return str(error.code().name), str(error.details())
        names = [output.name for output in answer.outputs]
        return "OK", dict(zip(names, answer.raw_output_contents, strict=True))

    async def _over_http(self, asked: Question) -> tuple[str, Mapping[str, bytes] | str]:
        headers = {"Inference-Header-Content-Length": str(asked.json)} if asked.json else {}
        try:
            async with self._session.post(
                f"{self._http}/v2/models/{asked.model}/infer", data=asked.body, headers=headers
            ) as reply:
                body = await reply.read()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            return type(error).__name__, str(error)
        if reply.status != 200:
            return str(reply.status), body.decode(errors="replace")
        length = int(reply.headers.get("Inference-Header-Content-Length", len(body)))
        found, at = {}, length
        for output in json.loads(body[:length])["outputs"]:
            size = output["parameters"]["binary_data_size"]
            found[output["name"]] = body[at : at + size]
            at += size
        return "OK", found


@asynccontextmanager
async def asker(
    grpc_url: str, http_url: str, timeout: float = TIMEOUT, *, keep_alive: bool = True
) -> AsyncIterator[Asker]:
    options = [("grpc.max_receive_message_length", -1)]
    limit = aiohttp.TCPConnector(limit=0, force_close=not keep_alive)
    async with (
        grpc.aio.insecure_channel(grpc_url, options=options) as channel,
        aiohttp.ClientSession(connector=limit, timeout=aiohttp.ClientTimeout(total=timeout)) as session,
    ):
        yield Asker(channel, session, http_url, timeout)


async def closed_loop(by: Asker, questions: Iterable[Question], concurrency: int, ledger: Ledger) -> None:
    """All questions, `concurrency` of them always in flight."""
    turn: Iterator[Question] = iter(questions)

    async def worker() -> None:
        for asked in turn:
            await by.ask(asked, ledger)

    await asyncio.gather(*(worker() for _ in range(concurrency)))


async def open_loop(by: Asker, questions: Sequence[Question], rate: float, ledger: Ledger, seed: int = 0) -> None:
    """All questions, each at its own random (Poisson) time at `rate` a second, whatever became of the others."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, len(questions))
    begin = time.perf_counter()
    tasks = []
    for asked, due in zip(questions, begin + np.cumsum(gaps), strict=True):
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(by.ask(asked, ledger, due)))
    await asyncio.gather(*tasks)


class Steady:
    """Mixed traffic in the background, until it is stopped; pauses after an error, as a client would."""

    def __init__(self, by: Any, questions: Sequence[Question], concurrency: int) -> None:
        self.ledger, self.ends = Ledger(), asyncio.Event()
        self.answered_at: list[float] = []
        turn = cycle(questions)

        async def worker() -> None:
            while not self.ends.is_set():
                right = self.ledger.right
                await by.ask(next(turn), self.ledger)
                if self.ledger.right > right:
                    self.answered_at.append(time.monotonic())
                else:
                    await asyncio.sleep(0.02)

        self.tasks = [asyncio.create_task(worker()) for _ in range(concurrency)]

    async def stop(self) -> Ledger:
        self.ends.set()
        await asyncio.gather(*self.tasks)
        return self.ledger
