"""Faults done to a real server under load: what is promised for each, and what was seen.

Every fault is a function of a Scene; its Seen is fine only where the promise was kept. Nothing is mocked: processes are
killed, files broken, shared memory is filled (in a mount namespace of the server's own).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import grpc
import hostile
import numpy as np
import torch
from hostile import over_tcp, post
from loadgen import STREAM, Processes, percentiles
from traffic import Answers, Asking, Ledger, Question, asker, closed, opened, question, strings
from tritonclient import grpc as grpc_api
from tritonclient.utils import InferenceServerException

from vilu.errors import UserError
from vilu.serving import AsyncClient, Server, classes
from vilu.serving.access import CONTROL, Access
from vilu.serving.server import free_port, probe

NOTICED = 10.0  # seconds, promised by `vilu serve --supervise`
STUBS = ("preprocess", "clip_image", "vilu_head", "vilu_embeddings", "vilu_full", "clip_text")
PUSHED = ("clip_image", "vilu_full", "vilu_embeddings", "preprocess", "vilu_head")
STEER = "the-token-of-the-one-who-breaks-it"
# What may be told to requests in flight when their process dies.
BROKEN = {"UNAVAILABLE", "INTERNAL", "500", "503", "ServerDisconnectedError", "ClientConnectorError", "ClientOSError",
          "CANCELLED", "400", "INVALID_ARGUMENT", "UNKNOWN", "DEADLINE_EXCEEDED", "TimeoutError",
          "ServerTimeoutError", "ConnectionTimeoutError"}  # fmt: skip


@dataclass
class Seen:
    """One fault. seen: figures; problems: where the promise was not kept; of_the_server: where tritonserver itself does
    not keep it."""

    fault: str
    promised: str
    seen: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    of_the_server: list[str] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        return not self.problems

    def expect(self, kept: bool, problem: str, *, of_the_server: bool = False) -> None:
        if not kept:
            (self.of_the_server if of_the_server else self.problems).append(problem)

    def count(self, ledger: Ledger) -> None:
        """Every request accounted for, and no wrong answer."""
        self.seen |= {"sent": ledger.sent, "right": ledger.right, "wrong": ledger.wrongs, "lost": ledger.lost,
                      "refused": dict(ledger.refused)}  # fmt: skip
        self.expect(ledger.wrongs == 0, f"wrong answers: {ledger.wrong[:2]}")
        self.expect(ledger.lost == 0, f"{ledger.lost} requests without an end")
        self.expect(ledger.right > 0, "no request was answered")


@dataclass
class Scene:
    """repository: copied before it is changed. questions: what the others ask meanwhile. work: an empty folder."""

    repository: Path
    asking: Asking
    work: Path
    questions: Sequence[Question] = ()
    concurrency: int = 4
    pause: float = 1.0  # seconds of traffic before and after
    turn: int = 0

    def __post_init__(self) -> None:
        self.questions = self.questions or self.asking.mixed(200, seed=5)

    def folder(self, name: str) -> Path:
        self.turn += 1
        folder = self.work / f"{self.turn}-{name}"
        folder.mkdir(parents=True)
        return folder

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.repository, self.folder(name) / "model_repository"))


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


@asynccontextmanager
async def steady(scene: Scene, grpc_url: str, http_url: str, timeout: float = 10.0) -> AsyncIterator[Steady]:
    async with asker(grpc_url, http_url, timeout) as by:
        traffic = Steady(by, scene.questions, scene.concurrency)
        try:
            yield traffic
        finally:
            await traffic.stop()


class Launched:
    """`vilu serve` as an operator starts it: url, HTTP url, the launcher's process, its log."""

    def __init__(self, repository: Path, log: Path, *flags: str, before: Sequence[str] = ()) -> None:
        ports: dict[str, int] = {}
        while len(set(ports.values())) < 3:
            ports = {kind: free_port() for kind in ("grpc", "http", "metrics")}
        self.url, self.http_url = f"127.0.0.1:{ports['grpc']}", f"http://127.0.0.1:{ports['http']}"
        self.log = log
        command = [*before, sys.executable, "-m", "vilu", "serve", "--model-repository", str(repository)]
        command += [*(f"--{kind}-port={port}" for kind, port in ports.items()), *flags]
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output)

    async def answering(self, seconds: float = 60.0) -> float:
        """Seconds until it answers; UserError where it does not."""
        start = time.monotonic()
        while True:
            try:
                await asyncio.to_thread(probe, self.url, timeout=2.0)
                return time.monotonic() - start
            except UserError as error:
                if time.monotonic() - start > seconds or self.process.poll() is not None:
                    told = self.log.read_text(errors="replace")[-500:]
                    raise UserError(f"{self.url}: {error}; {told}") from None
                await asyncio.sleep(0.05)

    def servers(self) -> list[int]:
        """Process ids of the tritonserver under the launcher."""
        return [pid for pid in below(self.process.pid) if Path(command_of(pid)[0]).name == "tritonserver"]

    def stub(self, model: str) -> int:
        """Process id of a model's Python stub; 0 where it has none, or a dead one."""
        for pid in below(self.process.pid):
            words = command_of(pid)
            if "triton_python_backend_stub" in words[0] and any(f"{model}_0" in word for word in words):
                return pid
        return 0

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def launched(repository: Path, log: Path, *flags: str, before: Sequence[str] = ()) -> Iterator[Launched]:
    running = Launched(repository, log, *flags, before=before)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(30)
        running.end()


@contextmanager
def guarding(url: str) -> Iterator[str]:
    """`vilu guard` before a server's gRPC: its HOST:PORT."""
    command = [sys.executable, "-m", "vilu", "guard", "--url", url, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as front:
        assert front.stderr is not None
        try:
            line = front.stderr.readline()
            if not line.startswith("guarding"):
                raise UserError(f"vilu guard: {line.strip()}")
            yield line.split()[-1]
        finally:
            front.terminate()
            front.wait(30)


def below(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(child) for child in task.read_text().split()]
    return found


def command_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return [""]


async def kills(scene: Scene, victims: Sequence[str] = (*STUBS, "server")) -> list[Seen]:
    """kill -9 of each stub, and of the server, one after the other under one supervised server."""
    found = []
    folder = scene.folder("kills")
    with launched(scene.repository, folder / "log", "--supervise") as running:
        await running.answering()
        for turn, victim in enumerate(victims):
            if turn and turn % 4 == 0:
                await asyncio.sleep(60)  # the supervisor gives up after 5 restarts in 60 s
            what = "kill -9 of the server" if victim == "server" else f"kill -9 of the stub of {victim}"
            seen = Seen(what, f"supervised: answers again within {NOTICED:.0f} s; only requests in flight are lost")
            async with steady(scene, running.url, running.http_url) as traffic:
                await asyncio.sleep(scene.pause / 2)
                before = running.servers()
                os.kill(before[0] if victim == "server" else running.stub(victim), signal.SIGKILL)
                start = time.monotonic()
                while (now := running.servers()) == before or not now:
                    if time.monotonic() - start > 30:
                        break
                    await asyncio.sleep(0.02)
                noticed = time.monotonic() - start
                await running.answering()
                seen.seen |= {"restarted_seconds": noticed, "answering_seconds": time.monotonic() - start}
                await asyncio.sleep(scene.pause / 2)
                back = time.monotonic()
                await asyncio.sleep(scene.pause)
            seen.count(traffic.ledger)
            seen.expect(any(at > back for at in traffic.answered_at), "the others are not answered again")
            seen.expect(seen.seen["answering_seconds"] <= NOTICED, f"took {seen.seen['answering_seconds']:.1f} s")
            seen.expect(set(traffic.ledger.refused) <= BROKEN, f"told {dict(traffic.ledger.refused)}")
            found.append(seen)
    return found


async def ended_by_a_request(scene: Scene) -> Seen:
    """The request that divides by zero in tritonserver 2.51."""
    seen = Seen("a string output asked for as classes", f"supervised: answers again within {NOTICED:.0f} s")
    with launched(scene.repository, scene.folder("classes") / "log", "--supervise") as running:
        await running.answering()
        before = running.servers()
        attack = hostile.deadly(scene.asking.world.images[0])
        tally = await hostile.attack(running.url, running.http_url, iter([attack]))
        start = time.monotonic()
        seen.seen |= {"told": next(iter(tally.codes))[1]}
        while running.servers() == before and time.monotonic() - start < 3:
            await asyncio.sleep(0.02)
        seen.seen |= {"ended": running.servers() != before}
        await running.answering()
        seen.seen |= {"answering_seconds": time.monotonic() - start}
        seen.expect(seen.seen["answering_seconds"] <= NOTICED, f"took {seen.seen['answering_seconds']:.1f} s")
    return seen


async def sigterm(scene: Scene, rounds: int = 1, *, after_restart: bool = False, keep_alive: bool = False) -> Seen:
    """SIGTERM under load, `rounds` times.

    after_restart: of a supervised server that has just restarted. keep_alive: idle HTTP connections stay open, for
    whose end tritonserver waits.
    """
    more = " after a restart" if after_restart else " with idle HTTP connections open" if keep_alive else ""
    code, when = ("0", "") if not keep_alive else ("0 or 1", ", when --exit-timeout-secs (10) is over at the latest")
    seen = Seen(
        f"SIGTERM under load{more}",
        "what is in flight is answered, or refused at once with UNAVAILABLE where it was not begun; "
        f"exit code {code}{when}; no process and no shared memory stays",
    )
    ends: list[int | None] = []
    seconds: list[float] = []
    total = Ledger()
    left: list[str] = []
    flags = ["--supervise"] if after_restart else []
    for _ in range(rounds):
        with launched(scene.repository, scene.folder("sigterm") / "log", *flags) as running:
            await running.answering()
            if after_restart:
                async with steady(scene, running.url, running.http_url):
                    before = running.servers()
                    os.kill(running.stub("preprocess"), signal.SIGKILL)
                    while running.servers() in (before, []) and running.process.poll() is None:
                        await asyncio.sleep(0.05)
                await running.answering()
            async with asker(running.url, running.http_url, 15.0, keep_alive=keep_alive) as by:
                traffic = Steady(by, scene.questions, scene.concurrency)
                await asyncio.sleep(scene.pause / 2)
                family, mine = below(running.process.pid), f"vilu_{running.process.pid}_"
                start = time.monotonic()
                running.process.send_signal(signal.SIGTERM)
                traffic.ends.set()  # what is in flight now was taken before
                total.add(await traffic.stop())
                with contextlib.suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(running.process.wait, 40)
            ends.append(running.process.poll())
            seconds.append(time.monotonic() - start)
            left += [f"process {pid}" for pid in family if alive(pid)]
            left += [path.name for path in Path("/dev/shm").glob(f"{mine}*")]
    seen.count(total)
    seen.seen |= {"exit_codes": ends, "seconds": max(seconds), "left": left, "told": dict(total.told)}
    seen.expect(set(total.refused) <= {"UNAVAILABLE", "503"}, f"requests in flight were told {dict(total.told)}")
    seen.expect(set(ends) <= ({0, 1} if keep_alive else {0}), f"exit codes {ends}")
    seen.expect(max(seconds) < 16, f"took {max(seconds):.1f} s")
    seen.expect(not left, f"left behind: {left}")
    return seen


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for a parent that does not care is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def corrupt(scene: Scene, models: Sequence[str] = PUSHED) -> list[Seen]:
    """Broken models pushed through model control while the old ones serve."""
    found = []
    root = scene.copy("corrupt")

    def cut(path: Path) -> Callable[[], object]:
        return lambda: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    changes = {
        "clip_image": ("model.onnx cut in half", cut(root / "clip_image" / "1" / "model.onnx")),
        "vilu_full": (
            "model.onnx of noise",
            lambda: (root / "vilu_full" / "1" / "model.onnx").write_bytes(os.urandom(4096)),
        ),
        "vilu_embeddings": ("ragged.onnx cut in half", cut(root / "vilu_embeddings" / "1" / "ragged.onnx")),
        "preprocess": (
            "model.py that raises",
            lambda: (root / "preprocess" / "1" / "model.py").write_text("raise SystemExit('broken on purpose')\n"),
        ),
        "vilu_head": ("config.pbtxt cut", cut(root / "vilu_head" / "config.pbtxt")),
    }
    access = Access(control_token=STEER)
    with Server(root, log=scene.folder("corrupt-log") / "log", access=access, stop_seconds=3) as server:
        api = grpc_api.InferenceServerClient(server.grpc_url)
        headers = {f"triton-grpc-protocol-{CONTROL}": STEER}
        for model in models:
            what, change = changes[model]
            seen = Seen(f"pushed: {model}, {what}", "refused; the old model keeps answering, nobody's request is lost")
            async with steady(scene, server.grpc_url, server.http_url) as traffic:
                change()
                try:
                    await asyncio.to_thread(api.load_model, model, headers=headers, client_timeout=30)
                    seen.problems.append("it was taken")
                except InferenceServerException as error:
                    seen.seen |= {"status": str(error.status()), "told": str(error.message())[:120]}
                await asyncio.sleep(scene.pause)
            seen.count(traffic.ledger)
            seen.expect(not traffic.ledger.refused, f"others were told {dict(traffic.ledger.refused)}")
            found.append(seen)
        api.close()
    return found


async def replaced(scene: Scene, times: int = 100) -> Seen:
    """A class set replaced over and over under load, by two that differ in every name."""
    seen = Seen(f"a class set replaced {times} times", "every answer comes from one whole set, the one that it names")
    world, spec = scene.asking.world, scene.asking.world.clip.spec
    first = world.closed
    sets = [first, world.answers([f"other {name}" for name in first.names], torch.from_numpy(first.rows[::-1].copy()))]
    served: dict[int, Answers] = {}
    found: list[tuple[str, int, bytes]] = []
    access = Access(control_token=STEER)
    with Server(scene.copy("replaced"), log=scene.folder("replaced-log") / "log", access=access) as server:
        async with (
            AsyncClient(server.grpc_url) as client,
            asker(server.grpc_url, server.http_url) as by,
        ):

            async def put(turn: int) -> None:
                chosen = sets[turn % 2]
                told = await classes.put_set(
                    client, "both", chosen.names, text_embeddings=chosen.rows, fingerprint=spec.fingerprint,
                    control_token=STEER,
                )  # fmt: skip
                served[told.version] = chosen

            await put(0)
            traffic = Steady(by, [of_a_set(scene.asking, i, "both", found) for i in range(40)], scene.concurrency)
            start = time.monotonic()
            for turn in range(1, times + 1):
                await put(turn)
            seconds = time.monotonic() - start
            await asyncio.sleep(scene.pause)
            seen.count(await traffic.stop())
    seen.expect(not traffic.ledger.refused, f"told {dict(traffic.ledger.refused)} {traffic.ledger.told.most_common(2)}")
    versions, mixed = set(), 0
    for told, image, label in found:
        version = int(told.rpartition("@")[2])
        versions.add(version)
        answers = served.get(version)
        right = [] if answers is None else [answers.names[i] for i in (answers.index[image], answers.second[image])]
        mixed += label.decode() not in right
    seen.seen |= {"seconds": seconds, "replaced": times, "versions_seen_in_answers": len(versions), "mixed": mixed}
    seen.expect(mixed == 0, f"{mixed} answers are not of the set that they name")
    seen.expect(len(versions) > 1, "all answers were of one version")
    return seen


def of_a_set(asking: Asking, seed: int, name: str, found: list[tuple[str, int, bytes]]) -> Question:
    """A question of one image to a named class set; what was told is kept, to be judged when all versions are known."""
    image = seed % len(asking.world.images)

    def check(got: Any) -> str | None:
        (told,), (label,) = strings(got["CLASS_SET"]), strings(got["LABEL"])
        found.append((told.decode(), image, label))
        return None

    tensors = {"IMAGE": asking.encoded(np.array([image]))}
    return question("class set", "vilu", tensors, ("LABEL", "CLASS_SET"), check, parameters={"class_set": name})


async def poisoned(scene: Scene, server: Server, count: int = 40) -> list[Seen]:
    """Requests that tritonserver itself takes and then fails with the whole batch; and the same behind `vilu guard`."""
    found = []
    world = scene.asking.world
    good = [q for q in scene.asking.mixed(400, seed=9, mix={"vilu": 1, "embeddings": 1}, http=0) if q.images == 1]
    with guarding(server.grpc_url) as guarded:
        for attack in hostile.poison(world.images[0], world.embedding.shape[1]):
            for url, behind in ((server.grpc_url, ""), (guarded, ", behind vilu guard")):
                what = f"batched with others: {attack.name}{behind}"
                seen = Seen(what, "its sender gets an error, the others their answers")
                ledger = Ledger()
                async with asker(url, server.http_url) as by:
                    bad = asyncio.create_task(
                        hostile.attack(url, server.http_url, iter([attack] * count), concurrency=count)
                    )
                    await asyncio.gather(*(by.ask(q, ledger) for q in good[: 2 * count]))
                    tally = await bad
                seen.seen |= {"codes": {code: n for (_, code), n in tally.codes.items()}}
                seen.count(ledger)
                seen.expect(not tally.bad, f"its sender was told {dict(tally.bad)}", of_the_server=not behind)
                told = f"others were told {ledger.told.most_common(1)}"
                seen.expect(not ledger.refused, told, of_the_server=not behind)
                found.append(seen)
    return found


def can_unshare() -> bool:
    """Whether this process may give a child a /dev/shm of its own."""
    command = ["unshare", "-m", "sh", "-c", "mount -t tmpfs tmpfs /dev/shm"]
    try:
        return subprocess.run(command, capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


async def full_memory(scene: Scene, free: int = 300 << 10) -> Seen:
    """/dev/shm filled to `free` bytes under a running server, in a mount namespace of its own."""
    seen = Seen(
        f"/dev/shm full but for {free >> 10} KB",
        "small requests are answered; one that needs more is refused with an error, and the server lives",
    )
    before = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh"]
    image = scene.asking.world.images[0] + bytes(8 << 20)  # decoders stop at an image's end
    flag = "--exit-timeout-secs=3"  # requests that were refused so may hold a model
    with launched(scene.repository, scene.folder("memory") / "log", flag, before=before) as running:
        await running.answering()
        async with steady(scene, running.url, running.http_url) as traffic:
            await asyncio.sleep(scene.pause)
            room = Path(f"/proc/{running.servers()[0]}/root/dev/shm")
            filler = room / "filler"
            try:
                with filler.open("wb") as file:
                    space = os.statvfs(room)
                    os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - free)
                done = traffic.ledger.right
                await asyncio.sleep(scene.pause)
                small = traffic.ledger.right - done
                large = [await ask_image(running.http_url, image) for _ in range(3)]
                done = traffic.ledger.right
                await asyncio.sleep(scene.pause)
                seen.seen |= {"free_kb": free >> 10, "right_while_full": small + traffic.ledger.right - done,
                              "large_were_told": large}  # fmt: skip
            finally:
                filler.unlink(missing_ok=True)
            done = traffic.ledger.right
            again = await ask_image(running.http_url, image)
            await asyncio.sleep(scene.pause)
            after = traffic.ledger.right - done
        seen.count(traffic.ledger)
        seen.seen |= {"large_after": again, "right_after": after, "alive": running.process.poll() is None}
        seen.expect(seen.seen["right_while_full"] > 0, "no small request was answered while it was full")
        seen.expect(not {"200", "no answer", "closed", "no connection"} & set(large), f"large ones were told {large}")
        seen.expect(after > 0 and again == "200", f"afterwards a large one was told {again}")
        seen.expect(running.process.poll() is None, "the server ended")
    return seen


async def ask_image(http_url: str, image: bytes) -> str:
    """Status of one image over HTTP."""
    body = len(image).to_bytes(4, "little") + image
    tensor = {"name": "IMAGE", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": len(body)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    host, _, port = http_url.removeprefix("http://").rpartition(":")
    wire = post("/v2/models/vilu/infer", head + body, {"Inference-Header-Content-Length": str(len(head))})
    return (await over_tcp(host, int(port), wire))[0]


async def mute_clients(scene: Scene, server: Server, *, clients: int = 20, each: int = 50) -> list[Seen]:
    """Clients that ask `each` questions and never read an answer: over HTTP (pipelined), and over a gRPC stream."""
    assert server.process is not None
    processes = Processes(server.process.pid)
    found = []
    draw = np.random.default_rng(0)
    asked = {http: scene.asking.one("preprocess", draw, http=http) for http in (True, False)}
    for protocol, http in (("HTTP", True), ("gRPC stream", False)):
        what = f"{clients} clients that never read, {each} questions each, {protocol}"
        seen = Seen(what, "the others' answers keep coming; memory grows by no more than the answers nobody took")
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
        seen.count(traffic.ledger)
        grown, kept = ((value - before) / 1e6 for value in (memory, after))
        seen.seen |= {"unread": sent, "right_meanwhile": during, "memory_grew_mb": grown, "kept_afterwards_mb": kept}
        seen.expect(during > 0, "the others were not answered meanwhile")
        seen.expect(set(traffic.ledger.refused) <= {"UNAVAILABLE", "503"}, f"told {dict(traffic.ledger.refused)}")
        size = asked[http].images * scene.asking.world.pixels[0].nbytes + len(asked[http].body)
        seen.expect(grown < 64 + 2 * clients * each * size / 1e6, f"memory grew by {grown:.0f} MB")
        seen.expect(kept < 64 + grown / 4, f"{kept:.0f} MB are not given back", of_the_server=True)
        found.append(seen)
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


async def overload(scene: Scene, server: Server, rate: float, seconds: float, capacity: float = 0.0) -> Seen:
    """Open loop at `rate` requests a second, far above what the server can do."""
    seen = Seen(
        f"overload, {rate:.0f} requests/s for {seconds:.0f} s",
        "what the queues cannot hold is refused at once with UNAVAILABLE (HTTP 503); what is answered is right; "
        "afterwards it answers all by itself",
    )
    ledger, calm = Ledger(), Ledger()
    draw = cycle(scene.questions)
    questions = [next(draw) for _ in range(int(rate * seconds))]
    async with asker(server.grpc_url, server.http_url) as by:
        start = time.monotonic()
        await opened(by, questions, rate, ledger)
        drained = time.monotonic() - start - seconds
        start = time.monotonic()
        await closed(by, scene.questions, 2, calm)
    seen.count(ledger)
    shed = sum(ledger.refused[code] for code in ("UNAVAILABLE", "503"))
    seen.seen |= {
        "told": dict(ledger.told.most_common(4)),
        "capacity": capacity, "rate": rate, "shed": shed, "drained_seconds": drained,
        "refusal_ms": percentiles(ledger.refusals), "answer_ms": percentiles(ledger.all()),
        "after": {"sent": calm.sent, "right": calm.right, "refused": dict(calm.refused),
                  **percentiles(calm.all())},
    }  # fmt: skip
    seen.expect(shed > 0, "nothing was shed")
    seen.expect(
        set(ledger.refused) <= {"UNAVAILABLE", "503"}, f"told {dict(ledger.refused)}: {ledger.told.most_common(3)}"
    )
    seen.expect(calm.right == calm.sent, f"afterwards {dict(calm.refused)} {calm.wrong[:2]}")
    return seen
