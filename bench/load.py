"""A served model under what users, enemies and accidents do to it: every answer checked, every request accounted for.

    python bench/load.py [--requests N] [--hostile N] [--faults] [--quick] [--output BASE]

(a) mixed traffic over all models, gRPC and HTTP, closed and open loop, against the eager model's answers, with the
memory of the server's processes; (b) hostile requests, with good ones in between, and the same
behind `vilu guard`, with what that costs; (c) an overload; with --faults (d) processes killed, models broken, /dev/shm
filled, clients that never read. The server is the real one, on a head trained
here over the embedded CLIP; or --repository with the --ckpt it was exported from, or --url with both of its ports.
Writes BASE.json and BASE.md; exit code 1 where a promise was not kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import click
import faults
import hostile
import numpy as np
import torch
from faults import Scene, Seen
from head import machine
from loadgen import Processes, percentiles, ticker
from PIL import Image
from rich.console import Console
from traffic import GUARDED, MIX, Asking, Ledger, Question, World, asker, closed, digits_and_shapes, label_sets, opened
from traffic import question as make_question
from traffic import words as label_tensor

from vilu import Checkpoint, load_checkpoint, load_clip
from vilu.clip import Clip
from vilu.errors import UserError
from vilu.export.repository import KEPT_PROMPTS
from vilu.preprocess.image import pixels
from vilu.serving import Server
from vilu.tiny import data
from vilu.train import Recipe, train_head

ROOT = Path(__file__).parents[1]
GROWTH = 0.05  # of the server's memory after warm-up, at most
Sample = tuple[int, int, int]  # requests so far, PSS, USS
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


def fill(world: World, count: int, most: int = 1000) -> Iterator[Question]:
    """Questions with `count` labels nobody asked before, which fill the server's cache of text embeddings."""
    vector = world.embedding.numpy()[:1]
    for start in range(0, count, most):
        names = label_tensor([[f"kept label {i}" for i in range(start, min(count, start + most))]])
        tensors = {"IMAGE_EMBEDDING": vector, "LABELS": names}
        yield make_question("fill", "vilu_embeddings", tensors, ["LABEL"], lambda got: None)


async def traffic(
    asking: Asking, at: At, plan: Plan, processes: Processes | None, tick: Tick
) -> tuple[Ledger, list[dict[str, Any]], dict[str, Any] | None]:
    """(a): warm-up, then phases of closed and open loop: everything together, a row per phase, the memory."""
    pool = asking.mixed(plan.pool)
    draw = np.random.default_rng(1)
    total, rows, memory = Ledger(), [], Memory(processes)
    async with asker(at.grpc_url, at.http_url) as by:
        tick("warm-up")
        warm, start = Ledger(), time.perf_counter()
        await closed(by, fill(asking.world, plan.kept), 1, warm)
        await closed(by, pool, 32, warm)
        await closed(by, pool[:600], 200, warm)  # as deep as queues may get: what that needs is kept
        while warm.sent < plan.requests // 10:
            await closed(by, pool, 8, warm)
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
                    await closed(by, questions, int(load), part)
                else:
                    await opened(by, questions, load * peak, part)
                rows.append(row(name, part, time.perf_counter() - start))
                peak = max(peak, part.sent / (time.perf_counter() - start)) if load >= 1 else peak
                total.add(part)
    return total, rows, memory.growth()


def row(name: str, ledger: Ledger, seconds: float) -> dict[str, Any]:
    return {"phase": name, "seconds": seconds, "requests": ledger.sent, "images": ledger.images,
            "requests_per_second": ledger.sent / seconds, "images_per_second": ledger.images / seconds,
            "wrong": ledger.wrongs, "lost": ledger.lost, "refused": dict(ledger.refused),
            "told": dict(ledger.told.most_common(3)), **percentiles(ledger.all())}  # fmt: skip


async def enemies(
    asking: Asking, at: At, count: int, most: int, tick: Tick, guarded: str = ""
) -> tuple[hostile.Tally, Ledger]:
    """(b): hostile requests, with good ones in between; what came of both.

    guarded: HOST:PORT of `vilu guard`: all goes through it, and what would spoil batches or end the server, too.
    """
    world = asking.world
    dim = world.embedding.shape[1]
    made = hostile.Generator(world.images[:60], world.clip.transform, dim, most, guarded=bool(guarded))
    worst = [*hostile.poison(world.images[0], dim), hostile.deadly(world.images[0])] if guarded else []

    def told() -> Iterator[hostile.Attack]:
        for i, one in enumerate(made.attacks(count, seed=2)):
            if i % 50 == 0:
                tick(f"hostile request {i}")
                yield from worst
            yield one

    url, mix = guarded or at.grpc_url, GUARDED if guarded else MIX
    async with asker(url, at.http_url) as by:
        steady = faults.Steady(by, asking.mixed(200, seed=3, mix=mix, http=0 if guarded else 0.25), 2)
        try:
            tally = await hostile.attack(url, at.http_url, told())
        finally:
            good = await steady.stop()
    return tally, good


async def guard_cost(asking: Asking, at: At, guarded: str, count: int) -> list[dict[str, Any]]:
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
                    await closed(by, questions, load, ledger)
                rates[name].append(ledger.right / (time.perf_counter() - start))
                middle[name].append(percentiles(ledger.all())["p50"])
        row: dict[str, Any] = {"at_a_time": load}
        for name in rates:
            row |= {f"{name}_per_second": float(np.median(rates[name])), f"{name}_p50": float(np.median(middle[name]))}
        rows.append(row | {"ratio": row["guarded_per_second"] / row["straight_per_second"]})
    return rows


def run(
    *,
    requests: int | None = None,
    hostile_count: int | None = None,
    with_faults: bool = False,
    quick: bool = False,
    ckpt: Path | None = None,
    repository: Path | None = None,
    url: str | None = None,
    output: Path | None = None,
    plan: Plan | None = None,
) -> dict[str, Any]:
    """The whole run; returns what BASE.json holds. Raises UserError for the user's mistakes."""
    from vilu.cli.progress import progress_bar

    plan = plan or (QUICK if quick else FULL)
    requests = plan.requests if requests is None else requests
    hostile_count = plan.hostile if hostile_count is None else hostile_count
    plan = replace(plan, requests=requests, hostile=hostile_count)
    if (url or repository) and ckpt is None:
        raise UserError(
            "--url and --repository need --ckpt, the checkpoint that is served: answers are checked with it"
        )
    if url and with_faults:
        raise UserError("--faults are done to a server of the bench's own, not to --url")
    torch.set_num_threads(1)  # the server has the cores
    about = environment()
    console = Console(width=None if sys.stdout.isatty() else 160)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vilu-load-")))
        bar = stack.enter_context(progress_bar())
        tick = ticker(bar)
        tick("the eager model")
        checkpoint, clip = model(ckpt)
        if repository is None and url is None:
            from vilu.export import export

            tick("exporting")
            repository = work / "model_repository"
            export(checkpoint, repository, clip=clip)
        world = World(clip, checkpoint, digits_and_shapes(plan.images), label_sets(plan.sets))
        processes, server = None, None
        if url is not None:
            at = At(*addresses(url))
        else:
            assert repository is not None
            tick("starting a server")
            server = Server(repository, log=work / "log", startup_seconds=180, stop_seconds=3)
            stack.enter_context(server)
            assert server.process is not None
            processes = Processes(server.process.pid)
            at = At(server.grpc_url, server.http_url)
        most = asyncio.run(largest_batch(at))
        asking = Asking(world, most)
        report: dict[str, Any] = {"environment": about, "largest_batch": most}
        found: list[Seen] = []
        if plan.requests:
            total, rows, memory = asyncio.run(traffic(asking, at, plan, processes, tick))
            latencies = {f"{kind}, {protocol}": {"requests": len(values), **percentiles(values)}
                         for (kind, protocol), values in sorted(total.latencies.items())}  # fmt: skip
            report["traffic"] = {"total": row("all", total, sum(r["seconds"] for r in rows)), "phases": rows,
                                 "by_question": latencies, "memory": memory, "mix": MIX}  # fmt: skip
            found.append(mixed(total, memory))
            capacity = max(r["requests_per_second"] for r in rows if r["phase"].startswith("closed"))
        else:
            capacity = 150.0
        if plan.hostile:
            tally, good = asyncio.run(enemies(asking, at, plan.hostile, most, tick))
            report["hostile"] = tallied(tally)
            found.append(judged(tally, good, server))
            tick("the guard")
            with faults.guarding(at.grpc_url) as guarded:
                tally, good = asyncio.run(enemies(asking, at, plan.hostile, most, tick, guarded))
                found.append(judged(tally, good, server, guarded=True))
                report["guard"] = asyncio.run(guard_cost(asking, at, guarded, plan.sets * 10))
        if server is not None:
            assert repository is not None
            server.stop()
            if plan.hostile:
                stuck = hostile.in_flight((work / "log").read_text(errors="replace"))
                found[-1].expect(not stuck, f"in flight for ever: {stuck}")
            scene = Scene(repository, asking, work / "faults")
            tick("overload")
            with Server(repository, log=work / "overload.log", startup_seconds=180, stop_seconds=3) as calm:
                found.append(asyncio.run(faults.overload(scene, calm, 3 * capacity, plan.overload, capacity)))
            if with_faults:
                found += all_faults(scene, tick)
        bar("done", 1, 1)
    about["load_after"] = os.getloadavg()[0]
    report["promises"] = [asdict(seen) | {"kept": seen.fine} for seen in found]
    text = markdown(report)
    console.print(text, markup=False, highlight=False)
    output = output or ROOT / f"bench/results/load{'-quick' if quick else ''}-cpu"
    output.parent.mkdir(parents=True, exist_ok=True)
    for suffix, words in ((".json", json.dumps(report, indent=1) + "\n"), (".md", text)):
        temporary = output.with_name(f".{output.name}{suffix}")
        temporary.write_text(words, "utf-8")
        temporary.replace(output.with_name(output.name + suffix))
    return report


def model(ckpt: Path | None) -> tuple[Checkpoint, Clip]:
    if ckpt is None:
        clip = load_clip()
        return trained(clip), clip
    checkpoint = load_checkpoint(ckpt)
    if checkpoint.clip is None or checkpoint.class_set is None:
        raise UserError(f"{ckpt}: names no CLIP and no classes")
    spec = checkpoint.clip
    return checkpoint, load_clip(spec.name, spec.pretrained, fingerprint=spec.fingerprint)


def addresses(text: str) -> tuple[str, str]:
    """(gRPC's HOST:PORT, HTTP's URL) of "HOST:PORT,http://HOST:PORT"."""
    grpc_url, _, http_url = text.partition(",")
    if "://" in grpc_url or not http_url.startswith("http://"):
        raise UserError(f"--url {text}: expected both ports, as in 127.0.0.1:8001,http://127.0.0.1:8000")
    return grpc_url, http_url.rstrip("/")


async def largest_batch(at: At) -> int:
    async with aiohttp.ClientSession() as session:
        try:
            async with session.get(f"{at.http_url}/v2/models/vilu/config") as reply:
                return max(1, int((await reply.json())["max_batch_size"]))
        except (aiohttp.ClientError, KeyError, ValueError) as error:
            raise UserError(f"{at.http_url}: tells nothing of the model vilu ({error})") from None


def all_faults(scene: Scene, tick: Tick) -> list[Seen]:
    """(d): every fault; the servers they are done to are their own."""
    found: list[Seen] = []
    steps: list[tuple[str, Callable[[], Any]]] = [
        ("kill -9", lambda: asyncio.run(faults.kills(scene))),
        ("SIGTERM under load", lambda: asyncio.run(faults.sigterm(scene, 5))),
        ("SIGTERM after a restart", lambda: asyncio.run(faults.sigterm(scene, 3, after_restart=True))),
        ("SIGTERM, idle connections", lambda: asyncio.run(faults.sigterm(scene, keep_alive=True))),
        ("corrupt models", lambda: asyncio.run(faults.corrupt(scene))),
        ("a request that ends the server", lambda: asyncio.run(faults.ended_by_a_request(scene))),
        ("a class set replaced", lambda: asyncio.run(faults.replaced(scene))),
    ]
    if faults.can_unshare():
        steps.append(("full /dev/shm", lambda: asyncio.run(faults.full_memory(scene))))

    def alone(fault: Callable[..., Any]) -> Any:
        log = scene.folder("alone") / "log"
        with Server(scene.repository, log=log, startup_seconds=180, stop_seconds=3) as server:
            return asyncio.run(fault(scene, server))

    steps.append(("clients that never read", lambda: alone(faults.mute_clients)))
    steps.append(("poisoned batches", lambda: alone(faults.poisoned)))
    for name, step in steps:
        tick(name)
        seen = step()
        found += seen if isinstance(seen, list) else [seen]
    return found


def mixed(total: Ledger, memory: Mapping[str, Any] | None) -> Seen:
    seen = Seen(
        f"mixed traffic, {total.sent} requests",
        f"every answer is the eager model's; none is lost or refused; memory grows by less than {GROWTH:.0%}",
    )
    seen.count(total)
    seen.expect(not total.refused, f"refused: {dict(total.refused)} {total.told.most_common(2)}")
    if memory is not None:
        for name in ("pss", "uss"):
            seen.seen[f"{name}_growth"] = memory[name]["growth"]
            seen.expect(memory[name]["growth"] < GROWTH, f"{name.upper()} grew by {memory[name]['growth']:.1%}")
    return seen


def judged(tally: hostile.Tally, good: Ledger, server: Server | None, guarded: bool = False) -> Seen:
    other = "" if guarded else " (listed: what tritonserver itself tells otherwise)"
    seen = Seen(
        f"hostile inputs, {tally.sent} requests{', behind vilu guard' if guarded else ''}",
        f"each gets an error of the 4xx class{other}; the server lives; good requests in between are answered right",
    )
    seen.count(good)
    seen.seen |= {"hostile": tally.sent, "by_the_server_itself": sum(tally.known.values())}
    seen.expect(not (guarded and tally.known), f"told {dict(tally.known)}")
    seen.expect(not tally.bad, f"told {[(*key, n, tally.told[key]) for key, n in tally.bad.items()][:5]}")
    seen.expect(not good.refused, f"good ones were told {dict(good.refused)} {good.told.most_common(2)}")
    if server is not None and server.process is not None:
        seen.expect(server.process.poll() is None and not server.dead_stubs(), "a process died")
    return seen


def tallied(tally: hostile.Tally) -> dict[str, Any]:
    families: dict[str, Counter[str]] = {}
    for (name, code), number in tally.codes.items():
        families.setdefault(name, Counter())[code] += number
    known = [{"request": name, "code": code, "number": number, "why": hostile.KNOWN[name][1]}
             for (name, code), number in sorted(tally.known.items())]  # fmt: skip
    return {"sent": tally.sent, "codes": {name: dict(codes) for name, codes in sorted(families.items())},
            "known": known, "bad": [{"request": n, "code": c, "number": k, "told": tally.told[n, c]}
                                    for (n, c), k in sorted(tally.bad.items())]}  # fmt: skip


def environment() -> dict[str, Any]:
    about = machine("cpu") | {"cores": len(os.sched_getaffinity(0)), "command": " ".join(["load.py", *sys.argv[1:]])}
    for package in ("nvidia-pytriton", "tritonclient", "grpcio", "numpy", "openvino"):
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            about[package] = None
    return about


def number(value: Any) -> str:
    return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [[number(cell).replace("|", "/") for cell in line] for line in rows]
    return [" | ".join(line).join(("| ", " |")) for line in (head, ["---"] * len(head), *cells)] + [""]


def markdown(report: Mapping[str, Any]) -> str:
    about = report["environment"]
    where = f"{about['cores']} cores of an {about['device']}"
    lines = [f"# {about['command']}", "", f"{where}, tritonserver of nvidia-pytriton "
             f"{about['nvidia-pytriton']}, commit {about['commit']}, {about['time']}", ""]  # fmt: skip
    rows: list[Sequence[Any]] = []
    for seen in report["promises"]:
        told = json.dumps(short(seen["seen"]), ensure_ascii=False).replace('"', "")[1:-1]
        rows.append((seen["fault"], seen["promised"], kept(seen), told))
    lines += table(("what", "promised", "kept?", "seen"), rows)
    if "traffic" in report:
        part = report["traffic"]
        lines += ["## Mixed traffic", "", "Milliseconds; open loop: from when a request was due.", ""]
        keys = ("phase", "requests", "images", "requests_per_second", "images_per_second", "p50", "p90", "p99")
        rows = [[line[key] for key in keys] + [line["wrong"], line["lost"], sum(line["refused"].values())]
                for line in (*part["phases"], part["total"])]  # fmt: skip
        lines += table(
            ("phase", "requests", "images", "requests/s", "images/s", "p50", "p90", "p99", "wrong", "lost", "refused"),
            rows,
        )
        rows = [
            (name, *(line[key] for key in ("requests", "p50", "p90", "p99")))
            for name, line in part["by_question"].items()
        ]
        lines += table(("question", "requests", "p50", "p90", "p99"), rows)
        if part["memory"]:
            grown = part["memory"]
            rows = [(name.upper(), grown[name]["first_mb"], grown[name]["last_mb"], grown[name]["peak_mb"],
                     f"{grown[name]['growth']:+.2%}", f"{grown[name]['slope_kb_per_1000_requests']:+.0f}")
                    for name in ("pss", "uss")]  # fmt: skip
            lines += ["Memory of the server and its stubs, MB, after warm-up:", ""]
            lines += table(("", "first tenth", "last tenth", "peak", "growth", "KB per 1000 requests"), rows)
    if "guard" in report:
        lines += ["## The cost of vilu guard", "", "`vilu` with one image, closed loop, medians of three rounds.", ""]
        rows = [(line["at_a_time"], line["straight_per_second"], line["guarded_per_second"], f"{line['ratio']:.2f}",
                 line["straight_p50"], line["guarded_p50"]) for line in report["guard"]]  # fmt: skip
        lines += table(("at a time", "straight/s", "guarded/s", "ratio", "straight p50", "guarded p50"), rows)
    if report.get("hostile", {}).get("known"):
        lines += ["## What tritonserver itself tells otherwise", ""]
        rows = [(line["request"], line["code"], line["number"], line["why"]) for line in report["hostile"]["known"]]
        lines += table(("request", "told", "number", "why"), rows)
    return "\n".join(lines)


def kept(seen: Mapping[str, Any]) -> str:
    words = ["**not kept**: " + "; ".join(seen["problems"])] if seen["problems"] else []
    words += ["not by tritonserver itself: " + "; ".join(seen["of_the_server"])] if seen["of_the_server"] else []
    return "; ".join(words) or "kept"


def short(value: Any) -> Any:
    """The same with numbers rounded, for a table."""
    if isinstance(value, dict):
        return {key: short(part) for key, part in value.items()}
    if isinstance(value, list):
        return [short(part) for part in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


@click.command()
@click.option("--requests", type=click.IntRange(0), help=f"Of mixed traffic; 0: none.  [default: {FULL.requests}]")
@click.option("--hostile", "hostile_count", type=click.IntRange(0), help=f"0: none.  [default: {FULL.hostile}]")
@click.option("--faults", "with_faults", is_flag=True, help="Kill, break and fill things, too.")
@click.option("--quick", is_flag=True, help="A small run.")
@click.option("--ckpt", type=click.Path(path_type=Path), help="What --repository or --url serves.")
@click.option("--repository", type=click.Path(path_type=Path), help="A model repository, in place of an export.")
@click.option("--url", help="A running server: HOST:PORT of gRPC, comma, http://HOST:PORT.")
@click.option("--output", type=click.Path(path_type=Path), help="Without suffix.  [default: bench/results/load-cpu]")
def main(**given: Any) -> None:
    """Every answer checked, every request accounted for."""
    try:
        report = run(**given)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    if not all(seen["kept"] for seen in report["promises"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
