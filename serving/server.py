"""Starting tritonserver, waiting for a real answer, and stopping it.

A Python stub that dies early hangs a load without an error, and a forced exit leaks shared memory; so everything that
can be checked is checked before the start, start-up and stop have deadlines that end in SIGKILL, and "ready" means
that an inference has succeeded (the server's own readiness says less).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vilu.answers import RequestRefused
from vilu.errors import FailedError, UserError
from vilu.serving.access import Access
from vilu.serving.address import free_port, join_host_port, listen, open_directly, reachable_host
from vilu.serving.answers import AccessDenied
from vilu.serving.async_client import EMBEDDINGS, AsyncClient
from vilu.serving.client import Client
from vilu.serving.overlay import Overlay
from vilu.serving.repository import check_repository
from vilu.serving.server_log import copy_without_alarms, has_gpu, load_failure
from vilu.serving.tritonserver import (
    build_backends,
    check_flags,
    default_flags,
    environment,
    find_tritonserver,
    has_flag,
    safe_path,
    temporary_base,
)

SHARED_MEMORY = Path("/dev/shm")
STUB_MEMORY = 1 << 20  # of /dev/shm, that each process of a Python model takes at its start
_STUB = "triton_python_backend_stub"  # a process's name has 15 characters
STUB_DEAD_SECONDS, OTHER_DEAD_SECONDS = 1.0, 5.0
STARTS = 3  # of a server that its own fault ends before its first answer (rare)
CRASHES = (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)
PROBE_TIMEOUT = 2.0  # seconds for a supervised server to answer

# Outlives its launcher: the pipe on its standard input ends when the launcher does, however that came about, and the
# server must not stay behind, holding ports and shared memory. $1: process group; $2: shared memory's prefix.
_WATCHDOG = 'read _; kill -TERM "$1"; sleep 2; kill -KILL "-$1"; rm -f "$2"*'


def check_shared_memory(repository: Path) -> None:
    """Refuse a /dev/shm in which the repository's Python models cannot even start.

    Raises:
        UserError: how much is free, and how much is needed.
    """
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return
    instances = 0
    for config in repository.glob("*/config.pbtxt"):
        text = config.read_text("utf-8")
        if re.search(r'^\s*backend:\s*"(python|onnxruntime)"', text, re.MULTILINE):
            instances += sum(int(count) for count in re.findall(r"\bcount:\s*(\d+)", text)) or 1
    if free < instances * STUB_MEMORY:
        raise UserError(
            f"{SHARED_MEMORY} has {free >> 20} MiB free, but {instances} processes of Python models need "
            f"{instances * STUB_MEMORY >> 20} MiB of shared memory: start the container with --shm-size=1g"
        )


def _exit_timeout(flags: Sequence[str], default: float) -> float:
    """Seconds the server gives requests in flight: the user's --exit-timeout-secs where it is given."""
    for word, following in zip(flags, [*flags, ""][1:], strict=True):
        name, _, value = word.partition("=")
        if name == "--exit-timeout-secs":
            with contextlib.suppress(ValueError):
                return float(value or following)
    return default


class Server:
    """A running tritonserver, as a context manager: inside, it has answered a real request.

    Args:
        repository: the model repository.
        tritonserver: explicit path of the binary.
        host: address to listen on; loopback by default.
        http_port, grpc_port, metrics_port: 0 picks a free one.
        flags: passed through to tritonserver.
        startup_seconds: deadline of the first answer.
        stop_seconds: how long the server may finish what it has; then the whole process group is killed.
        log: file for the server's output; by default this process's own.
        overlay: serve the repository without its queue limits, for a front that has its own (`Overlay`).
        access: tokens and TLS. With TLS, HTTP listens on loopback whatever the host.

    Raises:
        UserError: nothing to start, a bad repository, or no answer before the deadline.
    """

    def __init__(
        self,
        repository: str | os.PathLike[str],
        *,
        tritonserver: str | os.PathLike[str] | None = None,
        host: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        flags: Sequence[str] = (),
        startup_seconds: float = 60,
        stop_seconds: float = 10,
        log: Path | None = None,
        access: Access | None = None,
        overlay: bool = False,
    ) -> None:
        self.repository = Path(repository).resolve()
        self.found = find_tritonserver(tritonserver)
        check_repository(self.repository)
        self.host = host
        ports = [http_port, grpc_port, metrics_port]
        for i in range(3):
            if not ports[i]:
                ports[i] = next(port for port in iter(free_port, 0) if port not in ports)  # a given one may be free
        self.http_port, self.grpc_port, self.metrics_port = ports
        self.flags = list(flags)
        self.startup_seconds, self.stop_seconds = startup_seconds, stop_seconds
        self.log = log
        self.access = access or Access()
        self.process: subprocess.Popen[bytes] | None = None
        self.overlay = Overlay(self.repository) if overlay else None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._log_copy: threading.Thread | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._failure = ""  # of the first model that did not load
        self._crashes = 0  # before a first answer
        self._dead_since: dict[int, float] = {}
        # Names of its own distinguish a killed server's shared memory from other servers'.
        self.prefix = f"vilu_{os.getpid()}_{self.grpc_port}_"

    @property
    def grpc_url(self) -> str:
        scheme = "grpcs://" if self.access.tls_cert else ""
        return f"{scheme}{join_host_port(reachable_host(self.host), self.grpc_port)}"

    @property
    def http_url(self) -> str:
        return f"http://{join_host_port(reachable_host(self.access.http_host(self.host)), self.http_port)}"

    def __enter__(self) -> Server:
        while True:
            try:
                self.start()
                self.wait_until_answering()
                return self
            except BaseException as error:
                again = isinstance(error, FailedError) and self.start_again()
                self.stop()
                if not again:
                    raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process; returns at once.

        Raises:
            UserError: a port is taken, an option unknown, or /dev/shm too small.
        """
        check_flags(self.found, self.flags)
        for port in (self.http_port, self.grpc_port, self.metrics_port):
            listen(self.host, port).close()
        check_shared_memory(self.repository)
        self._failure = ""
        self._folder = tempfile.TemporaryDirectory(prefix="vilu-tritonserver-", dir=temporary_base())
        folder = Path(self._folder.name)
        (folder / "backends").mkdir()
        build_backends(self.found, folder / "backends")
        models, env = safe_path(self.repository, folder), environment(self.found)
        if self.overlay is not None:
            models = self.overlay.show_in(folder / "models")
            # What is put while it runs is kept where it is without an overlay.
            env.setdefault("VILU_CLASS_SETS", str(self.repository / "class_sets" / "sets"))
        ours = [f"--model-repository={models}"]
        for kind in ("http", "grpc", "metrics"):
            host = self.access.http_host(self.host) if kind == "http" else self.host
            if ":" in host:
                host = f"[{host}]" if kind == "grpc" else f"ipv6:{host}"
            ours += [f"--{kind}-address={host}", f"--{kind}-port={getattr(self, f'{kind}_port')}"]
        ours.append(f"--backend-config=python,shm-region-prefix-name={self.prefix}")
        ours.append(f"--exit-timeout-secs={math.ceil(self.stop_seconds)}")
        ours = [
            flag for flag in ours if flag.startswith("--backend-config") or not has_flag(self.flags, flag.split("=")[0])
        ]
        given = [*ours, *self.access.flags(self.host), *self.flags]
        command = [str(self.found.binary), *default_flags(self.found, given, folder / "backends"), *given]
        output = self.log.open("wb") if self.log else None
        filtered = not has_gpu()  # else it raises alarms about CUDA
        try:
            self.process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.PIPE if filtered else subprocess.STDOUT if output else None,
                start_new_session=True,
            )
            if self.process.stderr is not None:
                target = os.dup(output.fileno() if output else 2)
                self._log_copy = copy_without_alarms(self.process.stderr, os.fdopen(target, "wb"), self._notice)
        finally:
            if output is not None:
                output.close()
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHDOG, "vilu-watchdog", str(self.process.pid), f"{SHARED_MEMORY}/{self.prefix}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait_until_answering(self) -> None:
        """Wait for a real inference to succeed. Raises UserError when the server ends or the deadline passes."""
        assert self.process is not None
        deadline = time.monotonic() + self.startup_seconds
        reason = "it gave no answer"
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise FailedError(f"tritonserver ended at start with code {self.process.returncode}{self.log_hint()}")
            try:
                if self.answers(timeout=max(1.0, deadline - time.monotonic())):
                    return
            except Exception as error:  # not up yet, or not well: the last reason is reported
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            time.sleep(0.1)
        raise FailedError(f"tritonserver did not answer in {self.startup_seconds:.0f} s: {reason}{self.log_hint()}")

    def answers(self, timeout: float) -> bool:
        """Whether the server is ready and, where the repository has the `vilu` ensemble, answers through it.

        Raises:
            Exception: what a client raises where it does not.
        """
        with open_directly(f"{self.http_url}/v2/health/ready", timeout=timeout) as reply:
            if reply.status != 200:
                return False
        model = next((name for name in ("vilu", EMBEDDINGS) if (self.repository / name).is_dir()), None)
        if model is not None:
            probe(self.http_url, model=model, timeout=timeout, token=self.access.token)
            if not self.access.tls_cert:  # the certificate is for a name that only clients know
                probe(self.grpc_url, model=model, timeout=timeout, token=self.access.token)
        return True

    def version(self) -> str:
        """Return its version, or "" where it does not say."""
        try:
            with open_directly(f"{self.http_url}/v2", timeout=PROBE_TIMEOUT) as reply:
                return str(json.load(reply)["version"])
        except (OSError, ValueError, KeyError):
            return ""

    def inferences(self) -> int:
        """How many images all models together have answered; 0 where the server does not say."""
        try:
            with open_directly(f"{self.http_url}/v2/models/stats", timeout=PROBE_TIMEOUT) as reply:
                return sum(int(model["inference_count"]) for model in json.load(reply)["model_stats"])
        except (OSError, ValueError, KeyError):
            return 0

    def dead_stubs(self) -> list[str]:
        """Names of Python model instances whose process has died: the server neither restarts nor reaps one, and goes
        on saying that the model is ready.

        A process counts once it has been dead for a while: an unloaded model's stub is reaped at once, and the `sh`
        that starts a stub, or `addr2line`, is dead for a moment under a healthy server.
        """
        assert self.process is not None
        now = time.monotonic()
        dead = {pid: name for pid in _children(self.process.pid) if (name := _zombie(pid))}
        self._dead_since = {pid: self._dead_since.get(pid, now) for pid in dead}
        long = {pid: STUB_DEAD_SECONDS if name == _STUB[:15] else OTHER_DEAD_SECONDS for pid, name in dead.items()}
        return [f"{name} ({pid})" for pid, name in dead.items() if now - self._dead_since[pid] >= long[pid]]

    def log_hint(self) -> str:
        """Why a model did not load, where one did not, and where the log is."""
        if self._log_copy is not None and self.process is not None and self.process.poll() is not None:
            self._log_copy.join(1)  # the last lines
        return (f": {self._failure}" if self._failure else "") + (f"; see {self.log}" if self.log else "")

    @property
    def stub_died_loading(self) -> bool:
        """Whether a Python model did not load because its process was killed: that says nothing against the model."""
        return "is not healthy" in self.log_hint()

    def start_again(self) -> bool:
        """Whether another start is worth trying after one that failed: a crash of tritonserver itself ended it, which
        is no mistake of its user's, and this is not the last of `STARTS`. Each call counts as one.
        """
        if self.process is None or self.process.poll() not in CRASHES:
            return False
        self._crashes += 1
        return self._crashes < STARTS

    def _notice(self, line: bytes) -> None:
        self._failure = self._failure or load_failure(line)

    def stop(self, seconds: float | None = None) -> int | None:
        """Stop everything within the deadline (or these seconds) and leave nothing in shared memory. Returns the exit
        code."""
        process = self.process
        if process is not None:
            if self._watchdog is not None:
                self._watchdog.kill()
                self._watchdog.communicate()
                self._watchdog = None
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            if seconds is None:
                seconds = _exit_timeout(self.flags, self.stop_seconds) + 5
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                print(f"tritonserver did not stop in {seconds:.0f} s: killed", file=sys.stderr, flush=True)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # stubs that ignored the server's end, too
            process.wait()
            if self._log_copy is not None:
                self._log_copy.join(1)
                self._log_copy = None
            for left in SHARED_MEMORY.glob(f"{self.prefix}*"):
                left.unlink(missing_ok=True)
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        return process.returncode if process is not None else None


def probe(url: str, *, model: str = "vilu", **options: Any) -> None:
    """Ask a server about an image of one pixel: the way through every step of the ensemble, by a `Client`'s options.

    A server of a head alone, which has no `vilu`, is asked about one embedding.

    Raises:
        UserError: no answer, or an error in its place.
    """
    with Client(url, model=model, **options) as client:
        answer = client.ask([PROBE_IMAGE])[0] if model != EMBEDDINGS else None
        if answer is None or (answer.error is not None and model == "vilu" and client.run(_is_head_alone)):
            dim = client.run(_embedding_width)
            client.ask_embeddings(np.ones((1, dim)))[0].raise_for_error()
        else:
            answer.raise_for_error()


async def _embedding_width(client: AsyncClient) -> int:
    """D, the length of an embedding that the server's head reads."""
    inputs = (await client.config(EMBEDDINGS))["input"]
    return next(int(one["dims"][0]) for one in inputs if one["name"] == "IMAGE_EMBEDDING")


async def _is_head_alone(client: AsyncClient) -> bool:
    """Whether a server has the model that takes embeddings, and no `vilu`."""
    found = []
    for name in ("vilu", EMBEDDINGS):
        try:
            await client.config(name)
            found.append(name)
        except AccessDenied:
            raise
        except RequestRefused:
            continue
    return found == [EMBEDDINGS]


# A 1x1 white PNG: small, and it goes through every step of the ensemble.
PROBE_IMAGE = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8ffff3f0005fe02fe0def46b8"
    "0000000049454e44ae426082"
)


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in task.read_text().split()]
    return found


def _zombie(pid: int) -> str:
    """The command's name of a process that has ended and was not waited for; "" for any other."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    name, _, rest = stat[stat.index("(") + 1 :].rpartition(")")
    return name if rest.split()[0] == "Z" else ""
