"""Faults done to a real server under load: processes are killed, models broken, class sets replaced, /dev/shm filled.

Every fault is a function that takes a Scene and returns a Promise. Nothing is mocked: shared memory is filled in a
mount namespace of the server's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tritonclient import grpc as grpc_api
from tritonclient.utils import InferenceServerException

from bench.loadtest import hostile
from bench.loadtest.processes import descendants
from bench.loadtest.questions import Question, QuestionMaker, make_question
from bench.loadtest.scene import Promise, Scene, launched, steady
from bench.loadtest.traffic import Ledger, Steady, asker
from bench.loadtest.wire import over_binary, over_tcp, pack_strings, unpack_strings
from bench.loadtest.world import Answers
from vilu.serving import AsyncClient, Server, classes
from vilu.serving.access import Access
from vilu.serving.tokens import CONTROL

NOTICED = 10.0  # seconds, promised by `vilu serve --supervise`
STUBS = ("preprocess", "clip_image", "vilu_head", "vilu_embeddings", "vilu_full", "clip_text")
PUSHED = ("clip_image", "vilu_full", "vilu_embeddings", "preprocess", "vilu_head")
STEER = "the-token-of-the-one-who-breaks-it"
# What requests may get that are in flight when their process dies.
BROKEN = {"UNAVAILABLE", "INTERNAL", "500", "503", "ServerDisconnectedError", "ClientConnectorError", "ClientOSError",
          "CANCELLED", "400", "INVALID_ARGUMENT", "UNKNOWN", "DEADLINE_EXCEEDED", "TimeoutError",
          "ServerTimeoutError", "ConnectionTimeoutError"}  # fmt: skip


async def kills(scene: Scene, victims: Sequence[str] = (*STUBS, "server")) -> list[Promise]:
    """kill -9 of each stub, and of the server, one after the other under one supervised server."""
    found = []
    folder = scene.folder("kills")
    with launched(scene.repository, folder / "log", "--supervise") as running:
        await running.answering()
        for turn, victim in enumerate(victims):
            if turn and turn % 4 == 0:
                await asyncio.sleep(60)  # the supervisor gives up after 5 restarts in 60 s
            what = "kill -9 of the server" if victim == "server" else f"kill -9 of the stub of {victim}"
            promise = Promise(
                what, f"supervised: answers again within {NOTICED:.0f} s; only requests in flight are lost"
            )
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
                promise.seen |= {"restarted_seconds": noticed, "answering_seconds": time.monotonic() - start}
                await asyncio.sleep(scene.pause / 2)
                back = time.monotonic()
                await asyncio.sleep(scene.pause)
            promise.count(traffic.ledger)
            promise.expect(any(at > back for at in traffic.answered_at), "the others are not answered again")
            promise.expect(
                promise.seen["answering_seconds"] <= NOTICED, f"took {promise.seen['answering_seconds']:.1f} s"
            )
            promise.expect(set(traffic.ledger.refused) <= BROKEN, f"refused: {dict(traffic.ledger.refused)}")
            found.append(promise)
    return found


async def ended_by_a_request(scene: Scene) -> Promise:
    """The request that divides by zero in tritonserver 2.51."""
    promise = Promise("a string output asked for as classes", f"supervised: answers again within {NOTICED:.0f} s")
    with launched(scene.repository, scene.folder("classes") / "log", "--supervise") as running:
        await running.answering()
        before = running.servers()
        attack = hostile.deadly(scene.asking.world.images[0])
        tally = await hostile.attack(running.url, running.http_url, iter([attack]))
        start = time.monotonic()
        promise.seen |= {"code": next(iter(tally.codes))[1]}
        while running.servers() == before and time.monotonic() - start < 3:
            await asyncio.sleep(0.02)
        promise.seen |= {"ended": running.servers() != before}
        await running.answering()
        promise.seen |= {"answering_seconds": time.monotonic() - start}
        promise.expect(promise.seen["answering_seconds"] <= NOTICED, f"took {promise.seen['answering_seconds']:.1f} s")
    return promise


async def sigterm(scene: Scene, rounds: int = 1, *, after_restart: bool = False, keep_alive: bool = False) -> Promise:
    """SIGTERM under load, `rounds` times.

    after_restart: of a supervised server that has just restarted. keep_alive: idle HTTP connections stay open, for
    whose end tritonserver waits.
    """
    more = " after a restart" if after_restart else " with idle HTTP connections open" if keep_alive else ""
    code, when = ("0", "") if not keep_alive else ("0 or 1", ", when --exit-timeout-secs (10) is over at the latest")
    promise = Promise(
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
                family, mine = descendants(running.process.pid), f"vilu_{running.process.pid}_"
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
    promise.count(total)
    promise.seen |= {"exit_codes": ends, "seconds": max(seconds), "left": left, "messages": dict(total.messages)}
    promise.expect(set(total.refused) <= {"UNAVAILABLE", "503"}, f"requests in flight got {dict(total.messages)}")
    promise.expect(set(ends) <= ({0, 1} if keep_alive else {0}), f"exit codes {ends}")
    promise.expect(max(seconds) < 16, f"took {max(seconds):.1f} s")
    promise.expect(not left, f"left behind: {left}")
    return promise


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for a parent that does not care is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def corrupt(scene: Scene, models: Sequence[str] = PUSHED) -> list[Promise]:
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
            promise = Promise(
                f"pushed: {model}, {what}", "refused; the old model keeps answering, nobody's request is lost"
            )
            async with steady(scene, server.grpc_url, server.http_url) as traffic:
                change()
                try:
                    await asyncio.to_thread(api.load_model, model, headers=headers, client_timeout=30)
                    promise.problems.append("it was taken")
                except InferenceServerException as error:
                    promise.seen |= {"status": str(error.status()), "message": str(error.message())[:120]}
                await asyncio.sleep(scene.pause)
            promise.count(traffic.ledger)
            promise.expect(not traffic.ledger.refused, f"others got {dict(traffic.ledger.refused)}")
            found.append(promise)
        api.close()
    return found


async def replaced(scene: Scene, times: int = 100) -> Promise:
    """A class set replaced over and over under load, by two that differ in every name."""
    promise = Promise(
        f"a class set replaced {times} times", "every answer comes from one whole set, the one that it names"
    )
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
                stored = await classes.put_set(
                    client, "both", chosen.names, text_embeddings=chosen.rows, fingerprint=spec.fingerprint,
                    control_token=STEER,
                )  # fmt: skip
                served[stored.version] = chosen

            await put(0)
            traffic = Steady(by, [of_a_set(scene.asking, i, "both", found) for i in range(40)], scene.concurrency)
            start = time.monotonic()
            for turn in range(1, times + 1):
                await put(turn)
            seconds = time.monotonic() - start
            await asyncio.sleep(scene.pause)
            promise.count(await traffic.stop())
    promise.expect(
        not traffic.ledger.refused, f"refused: {dict(traffic.ledger.refused)} {traffic.ledger.messages.most_common(2)}"
    )
    versions, mixed = set(), 0
    for class_set, image, label in found:
        version = int(class_set.rpartition("@")[2])
        versions.add(version)
        answers = served.get(version)
        right = [] if answers is None else [answers.names[i] for i in (answers.index[image], answers.second[image])]
        mixed += label.decode() not in right
    promise.seen |= {"seconds": seconds, "replaced": times, "versions_seen_in_answers": len(versions), "mixed": mixed}
    promise.expect(mixed == 0, f"{mixed} answers are not of the set that they name")
    promise.expect(len(versions) > 1, "all answers were of one version")
    return promise


def of_a_set(asking: QuestionMaker, seed: int, name: str, found: list[tuple[str, int, bytes]]) -> Question:
    """A question of one image to a named class set; its answer is kept, to be judged when all versions are known."""
    image = seed % len(asking.world.images)

    def check(got: Any) -> str | None:
        (class_set,), (label,) = unpack_strings(got["CLASS_SET"]), unpack_strings(got["LABEL"])
        found.append((class_set.decode(), image, label))
        return None

    tensors = {"IMAGE": asking.encoded(np.array([image]))}
    return make_question("class set", "vilu", tensors, ("LABEL", "CLASS_SET"), check, parameters={"class_set": name})


def can_unshare() -> bool:
    """Whether this process may give a child a /dev/shm of its own."""
    command = ["unshare", "-m", "sh", "-c", "mount -t tmpfs tmpfs /dev/shm"]
    try:
        return subprocess.run(command, capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


async def full_memory(scene: Scene, free: int = 300 << 10) -> Promise:
    """/dev/shm filled to `free` bytes under a running server, in a mount namespace of its own."""
    promise = Promise(
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
                promise.seen |= {"free_kb": free >> 10, "right_while_full": small + traffic.ledger.right - done,
                              "large_got": large}  # fmt: skip
            finally:
                filler.unlink(missing_ok=True)
            done = traffic.ledger.right
            again = await ask_image(running.http_url, image)
            await asyncio.sleep(scene.pause)
            after = traffic.ledger.right - done
        promise.count(traffic.ledger)
        promise.seen |= {"large_after": again, "right_after": after, "alive": running.process.poll() is None}
        promise.expect(promise.seen["right_while_full"] > 0, "no small request was answered while it was full")
        promise.expect(not {"200", "no answer", "closed", "no connection"} & set(large), f"large ones got {large}")
        promise.expect(after > 0 and again == "200", f"afterwards a large one got {again}")
        promise.expect(running.process.poll() is None, "the server ended")
    return promise


async def ask_image(http_url: str, image: bytes) -> str:
    """Status of one image over HTTP."""
    host, _, port = http_url.removeprefix("http://").rpartition(":")
    wire = over_binary("vilu", [("IMAGE", "BYTES", (1, 1), pack_strings(image))])
    return (await over_tcp(host, int(port), wire))[0]
