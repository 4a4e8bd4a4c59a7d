"""Where faults are done: a server that an operator would start, traffic beside it, and what was seen of a promise."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.loadtest.processes import command_of, descendants
from bench.loadtest.questions import Question, QuestionMaker
from bench.loadtest.traffic import Ledger, Steady, asker
from vilu.errors import UserError
from vilu.serving.address import free_port
from vilu.serving.server import probe


@dataclass
class Promise:
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
    asking: QuestionMaker
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


@asynccontextmanager
async def steady(scene: Scene, grpc_url: str, http_url: str, timeout: float = 10.0) -> AsyncIterator[Steady]:
    async with asker(grpc_url, http_url, timeout) as by:
        traffic = Steady(by, scene.questions, scene.concurrency)
        try:
            yield traffic
        finally:
            await traffic.stop()


class Launched:
    """`vilu serve` as an operator starts it: url, HTTP url, the launcher's process, its log.

    door: with the front door; without it the faults are done to tritonserver itself.
    """

    def __init__(
        self, repository: Path, log: Path, *flags: str, before: Sequence[str] = (), door: bool = False
    ) -> None:
        ports: dict[str, int] = {}
        while len(set(ports.values())) < 3:
            ports = {kind: free_port() for kind in ("grpc", "http", "metrics")}
        self.url, self.http_url = f"127.0.0.1:{ports['grpc']}", f"http://127.0.0.1:{ports['http']}"
        self.log = log
        command = [*before, sys.executable, "-m", "vilu", "serve", "--model-repository", str(repository)]
        command += [*(f"--{kind}-port={port}" for kind, port in ports.items()), *([] if door else ["--direct"]), *flags]
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
                    end = self.log.read_text(errors="replace")[-500:]
                    raise UserError(f"{self.url}: {error}; {end}") from None
                await asyncio.sleep(0.05)

    def servers(self) -> list[int]:
        """Process ids of the tritonserver under the launcher."""
        return [pid for pid in descendants(self.process.pid) if Path(command_of(pid)[0]).name == "tritonserver"]

    def stub(self, model: str) -> int:
        """Process id of a model's Python stub; 0 where it has none, or a dead one."""
        for pid in descendants(self.process.pid):
            words = command_of(pid)
            if "triton_python_backend_stub" in words[0] and any(f"{model}_0" in word for word in words):
                return pid
        return 0

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def launched(
    repository: Path, log: Path, *flags: str, before: Sequence[str] = (), door: bool = False
) -> Iterator[Launched]:
    running = Launched(repository, log, *flags, before=before, door=door)
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
