"""Faults done by clients: answers that nobody reads, batches that are spoiled, more requests than the server can do."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from bench.common import percentiles
from bench.loadtest import hostile
from bench.loadtest.processes import Processes
from bench.loadtest.questions import Question
from bench.loadtest.scene import Promise, Scene, guarding, launched, steady
from bench.loadtest.traffic import Ledger, asker, closed_loop, open_loop
from bench.loadtest.wire import STREAM, post
from vilu.serving import Server


async def poisoned(scene: Scene, server: Server, count: int = 40) -> list[Promise]:
    """Requests that tritonserver itself takes and then fails with the whole batch; and the same behind `vilu guard`."""
    found = []
    world = scene.asking.world
    good = [q for q in scene.asking.mixed(400, seed=9, mix={"vilu": 1, "embeddings": 1}, http=0) if q.images == 1]
    with guarding(server.grpc_url) as guarded:
        for attack in hostile.poison(world.images[0], world.embedding.shape[1]):
            for url, behind in ((server.grpc_url, ""), (guarded, ", behind vilu guard")):
                what = f"batched with others: {attack.name}{behind}"
                promise = Promise(what, "its sender gets an error, the others their answers")
                ledger = Ledger()
                async with asker(url, server.http_url) as by:
                    bad = asyncio.create_task(
                        hostile.attack(url, server.http_url, iter([attack] * count), concurrency=count)
                    )
                    await asyncio.gather(*(by.ask(q, ledger) for q in good[: 2 * count]))
                    tally = await bad
                promise.seen |= {"codes": {code: n for (_, code), n in tally.codes.items()}}
                promise.count(ledger)
                promise.expect(not tally.bad, f"its sender got {dict(tally.bad)}", of_the_server=not behind)
                problem = f"others got {ledger.messages.most_common(1)}"
                promise.expect(not ledger.refused, problem, of_the_server=not behind)
                found.append(promise)
    return found


async def cancel_storm(scene: Scene, count: int = 5000, wide: int = 500) -> Promise:
    """Questions `wide` at a time, most of them cancelled or given no time, to `vilu serve`; each answer is checked.

    tritonserver 2.51 alone ends at that, with a full queue, after 1,000 to 2,000 of them.
    """
    promise = Promise(
        f"{count} questions, {wide} at a time, cancelled or out of time (front door)",
        "the server lives, nothing is restarted, whoever stays is answered right",
    )
    ledger, draw, room = Ledger(), np.random.default_rng(0), asyncio.Semaphore(wide)
    questions = cycle([q for q in scene.asking.mixed(400, seed=11, mix={"vilu": 1}, http=0) if q.images == 1])
    with launched(scene.repository, scene.folder("storm") / "log", door=True) as running:
        await running.answering(180)
        before = running.servers()

        async def one(asked: Question) -> None:
            async with room:
                patience = float(draw.choice([0.0, 0.01, 0.2, 1.0, 60.0]))
                asking = asyncio.create_task(by.ask(asked, ledger))
                await asyncio.wait({asking}, timeout=patience)
                asking.cancel()
                await asyncio.wait({asking})

        async with asker(running.url, running.http_url, 60) as by:
            await asyncio.gather(*(one(next(questions)) for _ in range(count)))
        promise.expect(running.servers() == before, "tritonserver ended")
        promise.expect(ledger.right > 0, "nobody was answered")
        promise.expect(not ledger.wrongs, f"wrong answers: {ledger.wrong}")
        promise.expect(set(ledger.refused) <= {"UNAVAILABLE"}, f"refused with {dict(ledger.refused)}")
        after = Ledger()
        async with asker(running.url, running.http_url, 60) as by:
            await closed_loop(by, list(islice(questions, 50)), 4, after)
        promise.expect((after.right, after.wrongs) == (50, 0), f"afterwards {after.right} of 50 are right")
        promise.seen |= {"answered": ledger.right, "refused": dict(ledger.refused), "left": count - ledger.right}
    return promise


async def mute_clients(scene: Scene, server: Server, *, clients: int = 20, each: int = 50) -> list[Promise]:
    """Clients that ask `each` questions and never read an answer: over HTTP (pipelined), and over a gRPC stream."""
    assert server.process is not None
    processes = Processes(server.process.pid)
    found = []
    draw = np.random.default_rng(0)
    asked = {http: scene.asking.one("preprocess", draw, http=http) for http in (True, False)}
    for protocol, http in (("HTTP", True), ("gRPC stream", False)):
        what = f"{clients} clients that never read, {each} questions each, {protocol}"
        promise = Promise(what, "the others' answers keep coming; memory grows by no more than the answers nobody took")
        async with steady(scene, server.grpc_url, server.http_url) as traffic:
            await asyncio.sleep(scene.pause)
            before, done = processes.memory(), traffic.ledger.right
            mute = mute_sockets if http else mute_streams
            links, sent = await mute(server, asked[http], clients, each)
            await asyncio.sleep(3 * scene.pause)
            during, memory = traffic.ledger.right - done, processes.memory()
            for link in links:
                link.close()
            await asyncio.sleep(2 * scene.pause)
            after = processes.memory()
        promise.count(traffic.ledger)
        grown, kept = ((value - before) / 1e6 for value in (memory, after))
        promise.seen |= {"unread": sent, "right_meanwhile": during, "memory_grew_mb": grown, "kept_afterwards_mb": kept}
        promise.expect(during > 0, "the others were not answered meanwhile")
        promise.expect(
            set(traffic.ledger.refused) <= {"UNAVAILABLE", "503"}, f"refused: {dict(traffic.ledger.refused)}"
        )
        size = asked[http].images * scene.asking.world.pixels[0].nbytes + len(asked[http].body)
        promise.expect(grown < 64 + 2 * clients * each * size / 1e6, f"memory grew by {grown:.0f} MB")
        promise.expect(kept < 64 + grown / 4, f"{kept:.0f} MB are not given back", of_the_server=True)
        found.append(promise)
    return found


async def mute_sockets(server: Server, asked: Question, clients: int, each: int) -> tuple[list[Any], int]:
    """HTTP connections that send and never read: (connections, questions that the server took in whole)."""
    wire = post(f"/v2/models/{asked.model}/infer", asked.body, {"Inference-Header-Content-Length": str(asked.json)})
    links, sent = [], 0
    loop = asyncio.get_running_loop()
    for _ in range(clients):
        link = socket.socket()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.setblocking(False)
        await loop.sock_connect(link, ("127.0.0.1", server.http_port))
        links.append(link)
    for link in links:
        with contextlib.suppress(asyncio.TimeoutError, OSError):
            for _ in range(each):
                await asyncio.wait_for(loop.sock_sendall(link, wire), 0.1)
                sent += 1
    return links, sent


class _Stream:
    """A gRPC stream whose answers nobody takes; closed as a socket is."""

    def __init__(self, url: str, body: bytes, each: int) -> None:
        options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
        self.channel = grpc.insecure_channel(url, options=[*options, ("grpc.use_local_subchannel_pool", 1)])
        self.sent = 0
        self.done = threading.Event()
        self.call = self.channel.stream_stream(STREAM)(self._questions(body, each))

    def _questions(self, body: bytes, each: int) -> Iterator[bytes]:
        for _ in range(each):
            self.sent += 1
            yield body
        self.done.wait(30)  # an end of the questions would be an end of the stream

    def close(self) -> None:
        self.done.set()
        self.call.cancel()
        self.channel.close()


async def mute_streams(server: Server, asked: Question, clients: int, each: int) -> tuple[list[Any], int]:
    """gRPC streams that send and never read: (streams, questions)."""
    links = [_Stream(server.grpc_url, asked.body, each) for _ in range(clients)]
    await asyncio.sleep(2)
    return links, sum(link.sent for link in links)


def small_queues(root: Path, size: int) -> None:
    """Every model's queue in a repository cut to `size` requests."""
    for config in root.glob("*/config.pbtxt"):
        text = config.read_text("utf-8")
        config.write_text(re.sub(r"max_queue_size: \d+", f"max_queue_size: {size}", text), "utf-8")


async def overload(scene: Scene, server: Server, rate: float, seconds: float, capacity: float = 0.0) -> Promise:
    """Open loop at `rate` requests a second, far above what the server can do."""
    promise = Promise(
        f"overload, {rate:.0f} requests/s for {seconds:.0f} s",
        "what the queues cannot hold is refused at once with UNAVAILABLE (HTTP 503); what is answered is right; "
        "afterwards it answers all by itself",
    )
    ledger, calm = Ledger(), Ledger()
    draw = cycle(scene.questions)
    questions = [next(draw) for _ in range(int(rate * seconds))]
    async with asker(server.grpc_url, server.http_url) as by:
        start = time.monotonic()
        await open_loop(by, questions, rate, ledger)
        drained = time.monotonic() - start - seconds
        start = time.monotonic()
        await closed_loop(by, scene.questions, 2, calm)
    promise.count(ledger)
    shed = sum(ledger.refused[code] for code in ("UNAVAILABLE", "503"))
    promise.seen |= {
        "messages": dict(ledger.messages.most_common(4)),
        "capacity": capacity, "rate": rate, "shed": shed, "drained_seconds": drained,
        "refusal_ms": percentiles(ledger.refusals), "answer_ms": percentiles(ledger.all()),
        "after": {"sent": calm.sent, "right": calm.right, "refused": dict(calm.refused),
                  **percentiles(calm.all())},
    }  # fmt: skip
    promise.expect(shed > 0, "nothing was shed")
    promise.expect(
        set(ledger.refused) <= {"UNAVAILABLE", "503"},
        f"refused: {dict(ledger.refused)}: {ledger.messages.most_common(3)}",
    )
    promise.expect(calm.right == calm.sent, f"afterwards {dict(calm.refused)} {calm.wrong[:2]}")
    return promise
