"""Shared by the tests of this folder: `vilu serve` as a process, and other programs that are waited for."""

import contextlib
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vilu.serving.address import free_port, open_directly

ROOT = Path(__file__).parents[2]


@dataclass
class Replica:
    """A running `vilu serve`; its ports stay the same where it is started again."""

    process: subprocess.Popen[bytes]
    http: int
    grpc: int
    metrics: int
    log: Path
    said: int  # characters of the log that were there before


def until(holds, what="it", seconds=60.0):
    """Wait until `holds()` is true; it may raise OSError meanwhile."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if holds():
                return
        assert time.monotonic() < deadline, f"{what} did not come up"
        time.sleep(0.1)


def answers(url):
    """Whether an address answers with 200."""
    with open_directly(url, timeout=2) as reply:
        return reply.status == 200


def start(words, log, *, ports=None, env=None, **options: Any):
    """Start the command `words` of `vilu serve` on free ports (or `ports`) and return it at once."""
    http, grpc, metrics = ports or (free_port() for _ in range(3))
    given = [*words, "--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    with Path(log).open("ab") as output:
        said = len(Path(log).read_text())
        process = subprocess.Popen(given, env=env, stdout=output, stderr=output, **options)
    return Replica(process, http, grpc, metrics, Path(log), said)


def ready(replica, seconds=90.0):
    """Wait until it says that it serves, which it does after its first answer."""

    def holds():
        text = replica.log.read_text()[replica.said :]
        assert replica.process.poll() is None, text[-3000:]
        return re.search(rf"^serving .*127\.0\.0\.1:{replica.http}\b", text, re.MULTILINE) is not None

    until(holds, "vilu serve", seconds)


def stop(process, seconds=30):
    """Terminate a process and return its exit code."""
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


@contextlib.contextmanager
def serving(repository, folder, *words, name="serve", **options):
    """A `vilu serve` of the repository that answers; it ends with the block."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"} | options.pop("env", {})
    command = [sys.executable, "-m", "vilu", "serve", "--model-repository", str(repository), *words]
    replica = start(command, folder / f"{name}.log", env=env, **options)
    try:
        ready(replica)
        yield replica
    finally:
        stop(replica.process)


@contextlib.contextmanager
def program(*words, log, url, seconds=30.0, **options):
    """A program that runs until the end of the block; inside, `url` answers."""
    with Path(log).open("wb") as output:
        process = subprocess.Popen([str(word) for word in words], stdout=output, stderr=output, **options)
    try:

        def holds():
            assert process.poll() is None, Path(log).read_text()[-3000:]
            return answers(url)

        until(holds, str(words[0]), seconds)
        yield process
    finally:
        stop(process)
