"""The phases of a load test, and what each must show to keep its promise."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from bench.common import percentiles
from bench.loadtest import client_faults, faults, hostile
from bench.loadtest.hostile_requests import Generator
from bench.loadtest.memory import Memory
from bench.loadtest.processes import Processes
from bench.loadtest.questions import GUARDED, MIX, Question, QuestionMaker, label_tensor, make_question
from bench.loadtest.scene import Promise, Scene
from bench.loadtest.traffic import Ledger, Steady, asker, closed_loop, open_loop
from bench.loadtest.world import World
from vilu import Checkpoint
from vilu.clip import Clip
from vilu.export.repository import KEPT_PROMPTS
from vilu.preprocess.image import pixels
from vilu.serving import Server
from vilu.tiny import data
from vilu.train import Recipe, train_head

GROWTH = 0.05  # of the server's memory after warm-up, at most
Tick = Callable[[str], None]


class At(NamedTuple):
    """Where a server listens."""

    grpc_url: str
    http_url: str


@dataclass(frozen=True)
class Plan:
    """requests, hostile: at least that many. images, sets, pool: distinct ones. overload: seconds of it. kept: prompts
    whose embeddings the server keeps, asked for in warm-up."""

    requests: int
    hostile: int
    images: int
    sets: int
    pool: int
    overload: float
    kept: int = KEPT_PROMPTS


FULL = Plan(50_000, 5_000, 384, 120, 4000, 5.0)
QUICK = Plan(3_000, 400, 96, 20, 600, 3.0)


def trained(clip: Clip) -> Checkpoint:
    """A head over the digits and shapes of the embedded worlds, trained on both; its answers spread from 0 to 1."""
    digits, shapes = data.digits("train"), data.shapes("train", 1500)
    batch = np.stack([pixels(Image.fromarray(image), clip.transform) for image in (*digits.images, *shapes.images)])
    embedding = torch.cat([clip.embed_images([batch[i : i + 256]]) for i in range(0, len(batch), 256)])
    labels = torch.from_numpy(np.concatenate([digits.labels, shapes.labels + len(digits.names)]))
    class_set = clip.class_set((*digits.names, *shapes.names))
    scale = clip.spec.logit_scale
    head = train_head(embedding, labels, class_set.text_embeddings, attention_scale=scale, recipe=Recipe(seed=0))
    return Checkpoint(head, clip.spec, class_set)


def fill(world: World, count: int, most: int = 1000) -> Iterator[Question]:
    """Questions with `count` labels nobody asked before, which fill the server's cache of text embeddings."""
    vector = world.embedding.numpy()[:1]
    for start in range(0, count, most):
        names = label_tensor([[f"kept label {i}" for i in range(start, min(count, start + most))]])
        tensors = {"IMAGE_EMBEDDING": vector, "LABELS": names}
        yield make_question("fill", "vilu_embeddings", tensors, ["LABEL"], lambda got: None)


async def traffic_phase(
    asking: QuestionMaker, at: At, plan: Plan, processes: Processes | None, tick: Tick
) -> tuple[Ledger, list[dict[str, Any]], dict[str, Any] | None]:
    """(a): warm-up, then phases of closed and open loop: everything together, a row per phase, the memory."""
    pool = asking.mixed(plan.pool)
    draw = np.random.default_rng(1)
    total, rows, memory = Ledger(), [], Memory(processes)
    async with asker(at.grpc_url, at.http_url) as by:
        tick("warm-up")
        warm, start = Ledger(), time.perf_counter()
        await closed_loop(by, fill(asking.world, plan.kept), 1, warm)
        await closed_loop(by, pool, 32, warm)
        await closed_loop(by, pool[:600], 200, warm)  # as deep as queues may get: what that needs is kept
        while warm.sent < plan.requests // 10:
            await closed_loop(by, pool, 8, warm)
        rows.append(row("warm-up", warm, time.perf_counter() - start))
        total.add(warm)
        async with memory.sampled():
            peak = 0.0
            for load, share in ((1, 0.08), (8, 0.27), (32, 0.25), (0.5, 0.15), (0.7, 0.25)):
                questions = [pool[i] for i in draw.integers(len(pool), size=int(plan.requests * share) + 1)]
                name = f"closed loop, {load} at a time" if load >= 1 else f"open loop, {load * peak:.0f} a second"
                tick(name)
                part, start = Ledger(), time.perf_counter()
                memory.follow(part)
                if load >= 1:
                    await closed_loop(by, questions, int(load), part)
                else:
                    await open_loop(by, questions, load * peak, part)
                rows.append(row(name, part, time.perf_counter() - start))
                peak = max(peak, part.sent / (time.perf_counter() - start)) if load >= 1 else peak
                total.add(part)
    return total, rows, memory.growth()


def row(name: str, ledger: Ledger, seconds: float) -> dict[str, Any]:
    return {"phase": name, "seconds": seconds, "requests": ledger.sent, "images": ledger.images,
            "requests_per_second": ledger.sent / seconds, "images_per_second": ledger.images / seconds,
            "wrong": ledger.wrongs, "lost": ledger.lost, "refused": dict(ledger.refused),
            "messages": dict(ledger.messages.most_common(3)), **percentiles(ledger.all())}  # fmt: skip


def mixed(total: Ledger, memory: Mapping[str, Any] | None) -> Promise:
    promise = Promise(
        f"mixed traffic, {total.sent} requests",
        f"every answer is the eager model's; none is lost or refused; memory grows by less than {GROWTH:.0%}",
    )
    promise.count(total)
    promise.expect(not total.refused, f"refused: {dict(total.refused)} {total.messages.most_common(2)}")
    if memory is not None:
        for name in ("pss", "uss"):
            promise.seen[f"{name}_growth"] = memory[name]["growth"]
            promise.expect(memory[name]["growth"] < GROWTH, f"{name.upper()} grew by {memory[name]['growth']:.1%}")
    return promise


async def hostile_phase(
    asking: QuestionMaker, at: At, count: int, most: int, tick: Tick, guarded: str = ""
) -> tuple[hostile.Tally, Ledger]:
    """(b): hostile requests, with good ones in between; what came of both.

    guarded: HOST:PORT of `vilu guard`: all goes through it, and what would spoil batches or end the server, too.
    """
    world = asking.world
    dim = world.embedding.shape[1]
    made = Generator(world.images[:60], world.clip.transform, dim, most, guarded=bool(guarded))
    worst = [*hostile.poison(world.images[0], dim), hostile.deadly(world.images[0])] if guarded else []

    def attacks() -> Iterator[hostile.Attack]:
        for i, one in enumerate(made.attacks(count, seed=2)):
            if i % 50 == 0:
                tick(f"hostile request {i}")
                yield from worst
            yield one

    url, mix = guarded or at.grpc_url, GUARDED if guarded else MIX
    async with asker(url, at.http_url) as by:
        steady = Steady(by, asking.mixed(200, seed=3, mix=mix, http=0 if guarded else 0.25), 2)
        try:
            tally = await hostile.attack(url, at.http_url, attacks())
        finally:
            good = await steady.stop()
    return tally, good


def tallied(tally: hostile.Tally) -> dict[str, Any]:
    families: dict[str, Counter[str]] = {}
    for (name, code), number in tally.codes.items():
        families.setdefault(name, Counter())[code] += number
    known = [{"request": name, "code": code, "number": number, "why": hostile.KNOWN[name][1]}
             for (name, code), number in sorted(tally.known.items())]  # fmt: skip
    return {"sent": tally.sent, "codes": {name: dict(codes) for name, codes in sorted(families.items())},
            "known": known, "bad": [{"request": n, "code": c, "number": k, "message": tally.messages[n, c]}
                                    for (n, c), k in sorted(tally.bad.items())]}  # fmt: skip


def judged(tally: hostile.Tally, good: Ledger, server: Server | None, guarded: bool = False) -> Promise:
    other = "" if guarded else " (listed: where tritonserver itself answers otherwise)"
    promise = Promise(
        f"hostile inputs, {tally.sent} requests{', behind vilu guard' if guarded else ''}",
        f"each gets an error of the 4xx class{other}; the server lives; good requests in between are answered right",
    )
    promise.count(good)
    promise.seen |= {"hostile": tally.sent, "by_the_server_itself": sum(tally.known.values())}
    promise.expect(not (guarded and tally.known), f"answered with {dict(tally.known)}")
    promise.expect(
        not tally.bad, f"answered with {[(*key, n, tally.messages[key]) for key, n in tally.bad.items()][:5]}"
    )
    promise.expect(not good.refused, f"good ones got {dict(good.refused)} {good.messages.most_common(2)}")
    if server is not None and server.process is not None:
        promise.expect(server.process.poll() is None and not server.dead_stubs(), "a process died")
    return promise


async def guard_cost(asking: QuestionMaker, at: At, guarded: str, count: int) -> list[dict[str, Any]]:
    """Closed loops of `vilu` with one image, straight and through `vilu guard` in turn: medians of three rounds."""
    questions = [q for q in asking.mixed(3 * count, seed=4, mix={"vilu": 1}, http=0) if q.images == 1][:count]
    rows = []
    for load in (1, 16):
        rates: dict[str, list[float]] = {"straight": [], "guarded": []}
        middle: dict[str, list[float]] = {"straight": [], "guarded": []}
        for _ in range(3):
            for name, url in (("straight", at.grpc_url), ("guarded", guarded)):
                ledger = Ledger()
                async with asker(url, at.http_url) as by:
                    start = time.perf_counter()
                    await closed_loop(by, questions, load, ledger)
                rates[name].append(ledger.right / (time.perf_counter() - start))
                middle[name].append(1e3 * float(np.median(ledger.all())))
        row: dict[str, Any] = {"at_a_time": load}
        for name in rates:
            row |= {f"{name}_per_second": float(np.median(rates[name])), f"{name}_p50": float(np.median(middle[name]))}
        rows.append(row | {"ratio": row["guarded_per_second"] / row["straight_per_second"]})
    return rows


async def door_cost(asking: QuestionMaker, direct: At, door: At, count: int) -> list[dict[str, Any]]:
    """Closed loops of `vilu` with one image, of tritonserver and of the front door with its own, in turn: medians of
    five rounds, and how many questions were refused."""
    questions = [q for q in asking.mixed(3 * count, seed=4, mix={"vilu": 1}, http=0) if q.images == 1][:count]
    rows = []
    for load in (1, 16, 200):
        rates: dict[str, list[float]] = {"direct": [], "door": []}
        middle: dict[str, list[float]] = {"direct": [], "door": []}
        refused = dict.fromkeys(rates, 0)
        for turn in range(5):
            for name, at in (("direct", direct), ("door", door))[:: 1 if turn % 2 else -1]:
                ledger = Ledger()
                async with asker(at.grpc_url, at.http_url, 60) as by:
                    start = time.perf_counter()
                    await closed_loop(by, questions, load, ledger)
                rates[name].append(ledger.right / (time.perf_counter() - start))
                middle[name].append(1e3 * float(np.median(ledger.all())))
                refused[name] += sum(ledger.refused.values())
        row: dict[str, Any] = {"at_a_time": load}
        for name in rates:
            row |= {f"{name}_per_second": float(np.median(rates[name])), f"{name}_p50": float(np.median(middle[name]))}
            row |= {f"{name}_refused": refused[name], f"{name}_rounds": rates[name]}
        rows.append(row | {"ratio": row["door_per_second"] / row["direct_per_second"]})
    return rows


def all_faults(scene: Scene, tick: Tick) -> list[Promise]:
    """(d): every fault; the servers they are done to are their own."""
    found: list[Promise] = []
    steps: list[tuple[str, Callable[[], Any]]] = [
        ("kill -9", lambda: asyncio.run(faults.kills(scene))),
        ("SIGTERM under load", lambda: asyncio.run(faults.sigterm(scene, 5))),
        ("SIGTERM after a restart", lambda: asyncio.run(faults.sigterm(scene, 3, after_restart=True))),
        ("SIGTERM, idle connections", lambda: asyncio.run(faults.sigterm(scene, keep_alive=True))),
        ("corrupt models", lambda: asyncio.run(faults.corrupt(scene))),
        ("a request that ends the server", lambda: asyncio.run(faults.ended_by_a_request(scene))),
        ("a storm of cancels", lambda: asyncio.run(client_faults.cancel_storm(scene))),
        ("a class set replaced", lambda: asyncio.run(faults.replaced(scene))),
    ]
    if faults.can_unshare():
        steps.append(("full /dev/shm", lambda: asyncio.run(faults.full_memory(scene))))

    def alone(fault: Callable[..., Any]) -> Any:
        log = scene.folder("alone") / "log"
        with Server(scene.repository, log=log, startup_seconds=180, stop_seconds=3) as server:
            return asyncio.run(fault(scene, server))

    steps.append(("clients that never read", lambda: alone(client_faults.mute_clients)))
    steps.append(("poisoned batches", lambda: alone(client_faults.poisoned)))
    for name, step in steps:
        tick(name)
        seen = step()
        found += seen if isinstance(seen, list) else [seen]
    return found
